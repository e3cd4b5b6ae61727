"""Write results/<preset>/README.md: a preset's verdicts, claim by claim, and what made them.

What people wrote of a preset's results stands in results/<preset>/found.md, a section a claim: one
sentence, then a paragraph. Numbers in it are the ledger's, by the quantity's name:
`{{ measured("quantity") }}`, `{{ predicted("quantity") }}`.
The README's own table of claims is that of the digits.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import jinja2
import nbformat
import pandas as pd
from jinja2.sandbox import SandboxedEnvironment

from paper_lib.errors import ConfigError, check_names
from paper_lib.files import replacing
from paper_lib.presets import PRESETS
from paper_lib.results import claims
from scripts import ROOT, ResultError, damaged, environment, picture

MARKS = "<!-- claims: written by make readme -->\n", "<!-- end of claims -->"
TEMPLATES = SandboxedEnvironment(undefined=jinja2.StrictUndefined)
Said = dict[str, tuple[str, str]]  # by claim: a sentence, and a paragraph
NOTHING = ("", "")  # where nobody has written of a claim yet
PLURALS = {  # of a claim's verdict
    "holds": "hold",
    "holds in part": "hold in part",
    "fails": "fail",
    "undecided": "undecided",
}
HOW = (
    "A criterion holds or fails where the two-sided 95 % t interval over seeds lies within or "
    "beyond its bound, and is undecided where it contains it, or where its control does not fail. "
    "A claim holds if all of its criteria hold, holds in part if some hold and some fail, and is "
    "undecided where neither is so. Limits and checks do not count. ± is the standard deviation "
    "over seeds, not the interval."
)


def page(results: Path) -> str:
    """Return a preset's page in Markdown.

    FileNotFoundError if there are no results; ResultError or LedgerError for a damaged one.
    """
    rows = claims.table(results)
    said = found(results, rows)
    label = PRESETS[results.name].label if results.name in PRESETS else claims.plain(results.name)
    parts = [f"# What was found: {label}", counted(rows) + HOW]
    parts += [claims_table(rows, said, "figures", "notebooks")]
    for verdict in claims.by_claim(rows):
        parts += section(results, rows, said, verdict)
    judges = claims.role_of(rows) == "claim"
    parts += ["## Limits and checks", other_figures(results, rows), claims.markdown(rows[~judges])]
    parts += ["## Every criterion of a claim, and its control", claims.markdown(rows[judges])]
    parts += ["## Made with", made_with(results)]
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def section(
    results: Path, rows: pd.DataFrame, said: Said, verdict: claims.ClaimVerdict
) -> list[str]:
    """The heading of a claim, its verdict, what was written of it, and its notebooks' figures."""
    notebooks = dict.fromkeys(rows[rows.claim == verdict.claim].notebook)
    pictures = [results / "figures" / f"{name}.png" for name in notebooks]
    shown = [f"![{p.stem}](figures/{p.name})" for p in pictures if p.exists()]
    heading = f"## {verdict.claim}: {claims.CLAIMS[verdict.claim]}"
    written = " ".join(said.get(verdict.claim, NOTHING))
    return [heading, f"**{verdict.verdict}**: {verdict.counted}. {written}", *shown]


def found(results: Path, rows: pd.DataFrame) -> Said:
    """By claim, the sentence and the paragraph of found.md, with the measured numbers filled in.

    Raises ConfigError for a quantity that no ledger has, ResultError for what is no template.
    """
    path = results / "found.md"
    path = path if path.exists() else ROOT / "results" / results.name / "found.md"
    if not path.exists():
        return {}
    by_quantity = rows.set_index("quantity")

    def row(quantity: str) -> pd.Series:
        check_names([quantity], list(by_quantity.index), "quantity")
        return by_quantity.loc[quantity]

    def measured(quantity: str) -> str:
        return claims.with_spread(row(quantity).measured, row(quantity).spread)

    def predicted(quantity: str) -> str:
        return f"{row(quantity).predicted:.3g}"

    try:
        template = TEMPLATES.from_string(path.read_text())
        text = template.render(measured=measured, predicted=predicted)
    except (jinja2.TemplateError, UnicodeDecodeError) as error:
        raise ResultError(f"{path} cannot be read: {error}") from error
    sections = re.findall(r"^## (C\d+)\n+(.+?)\n\n(.*?)\s*(?=^## |\Z)", text, re.M | re.S)
    return {claim: (sentence, rest) for claim, sentence, rest in sections}


def claims_table(rows: pd.DataFrame, said: Said, figures: str, notebooks: str) -> str:
    """The verdict on each claim and what was found, linked from folders of figures, notebooks."""
    lines = [["claim", "verdict", "what was found", "see"], ["---"] * 4]
    for verdict in claims.by_claim(rows):
        first = rows[rows.claim == verdict.claim].notebook.iloc[0]
        links = f"[figure]({figures}/{first}.png), [notebook]({notebooks}/{first}.ipynb)"
        claim = f"**{verdict.claim}** {claims.CLAIMS[verdict.claim]}"
        sentence = said.get(verdict.claim, NOTHING)[0]
        said_of_it = f"{verdict.verdict}, {verdict.counted.split(' criteria')[0]}"
        alone = " (model alone)" * (not rows[rows.claim == verdict.claim].network.any())
        lines.append([claim, said_of_it + alone, sentence, links])
    return claims.pipes(lines)


def counted(rows: pd.DataFrame) -> str:
    """How many claims hold, in part, fail or are undecided, as a sentence."""
    verdicts = [verdict.verdict for verdict in claims.by_claim(rows)]
    numbers = {name: verdicts.count(said) for said, name in PLURALS.items()}
    said = ", ".join(f"{number} {name}" for name, number in numbers.items() if number)
    return f"Of {len(verdicts)} claims {said}.\n\n"


def other_figures(results: Path, rows: pd.DataFrame) -> str:
    """Links to the figures that are not a notebook's first, by notebook."""
    lines = []
    for name in sorted(rows.notebook.unique()):
        pictures = sorted((results / "figures").glob(f"{name[:2]}_*.png"))
        others = [p for p in pictures if p.stem != name]
        links = [f"[{claims.plain(p.stem[3:])}](figures/{quote(p.name)})" for p in others]
        if links:
            title = f"[{name}](notebooks/{name}.ipynb), {notebook_title(name)}"
            lines.append(f"- {title}: {', '.join(links)}")
    return "\n".join(lines)


def notebook_title(name: str) -> str:
    """The first heading of a notebook, without its number."""
    path = ROOT / "notebooks" / f"{name}.ipynb"
    try:
        heading = nbformat.read(path, as_version=4).cells[0].source.splitlines()[0]
    except (OSError, ValueError, AttributeError, IndexError) as error:
        raise ResultError(f"{path} has no title to read: git checkout restores it") from error
    return re.sub(r"^#+ *\d+ *· *", "", heading)


def made_with(results: Path) -> str:
    """The environment of the latest run, and the commits that made the notebooks, in Markdown."""
    made, commits = environment(results), defaultdict(list)
    for name, entry in made["notebooks"].items():
        commits[entry["commit"]].append(f"{name[:2]} ({entry['seconds']} s)")
    try:
        packages = ", ".join(f"{name} {version}" for name, version in made["packages"].items())
        machine = ", ".join(made[key] for key in ("platform", "processor", "device"))
        lines = [f"Python {made['python']} on {machine}, {made['cores']} cores; {packages}.", ""]
    except (KeyError, TypeError, AttributeError) as error:
        raise damaged(results / "environment.json", "or missing") from error
    lines += [f"- commit {c}: {', '.join(commits[c])}" for c in commits]
    return "\n".join(map(claims.plain, lines))


def readme_table(results: Path) -> str:
    """The README's table of claims, linked from there."""
    rows = claims.table(results)
    links = "results/digits/figures", "notebooks"
    return counted(rows) + claims_table(rows, found(results, rows), *links)


def update_readme(results: Path) -> None:
    """Replace the README's table of claims, if it has one, by that of these results."""
    path = ROOT / "README.md"
    text = path.read_text() if path.exists() else ""
    parts = re.split("|".join(MARKS), text)
    if len(parts) == 3:
        with replacing(path) as temporary:
            temporary.write_text(readme_table(results).join(MARKS).join(parts[::2]))


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page of a folder of results; return the exit code."""
    parser = argparse.ArgumentParser(prog="make readme", description=__doc__)
    parser.add_argument("results", type=Path)
    try:
        write(parser.parse_args(argv).results.resolve())
    except (ConfigError, claims.LedgerError, ResultError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def write(results: Path) -> None:
    """Write the page and the picture of a folder of results; the README's table if it is its."""
    picture.draw(results)
    text = page(results)
    with replacing(results / "README.md") as temporary:
        temporary.write_text(text)
    if results == ROOT / "results" / "digits":
        update_readme(results)


if __name__ == "__main__":
    sys.exit(main())
