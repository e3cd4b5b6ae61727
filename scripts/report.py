"""Write results/<preset>/README.md: a preset's verdicts, its figures, and what made them."""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from pathlib import Path

from paper_lib.files import replacing
from paper_lib.presets import PRESETS
from paper_lib.results import claims
from scripts import ROOT


def page(results: Path) -> str:
    """Return a preset's page in Markdown; FileNotFoundError if there are no results."""
    table = claims.table(results)
    label = PRESETS[results.name].label if results.name in PRESETS else results.name
    parts = [f"# {label}", claims.count(table), notebooks_table(results)]
    scoreboard = results / "scoreboard.md"
    if scoreboard.exists():
        parts += ["## Averages and schedules", scoreboard.read_text()]
    parts += ["## Every criterion", claims.markdown(table), "## Made with", made_with(results)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def notebooks_table(results: Path) -> str:
    """What each notebook shows, its figures, the criteria that hold, and its wall time."""
    table, made = claims.table(results), _made(results)
    lines = [["notebook, as it ran", "figures", "criteria that hold", "seconds"], ["---"] * 4]
    for name, rows in table.groupby("notebook"):
        figures = sorted((results / "figures").glob(f"{name[:2]}_*.png"))
        links = ", ".join(f"[{path.stem}](figures/{path.name})" for path in figures)
        numbers = ", ".join(dict.fromkeys(rows.claim))
        held = f"{numbers}: {int(rows.holds.sum())} of {len(rows)}"
        seconds = made["notebooks"].get(name, {}).get("seconds", "")
        title = f"[{name}](notebooks/{name}.ipynb): {notebook_title(name)}"
        lines.append([title, links, held, str(seconds)])
    return claims.pipes(lines)


def notebook_title(name: str) -> str:
    """The first heading of a notebook, without its number."""
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())["cells"]
    heading = "".join(cells[0]["source"]).splitlines()[0]
    return re.sub(r"^#+ *\d+ *· *", "", heading)


def made_with(results: Path) -> str:
    """The environment of the latest run, and the commits that made the notebooks, in Markdown."""
    made, commits = _made(results), defaultdict(list)
    for name, entry in made["notebooks"].items():
        commits[entry["commit"]].append(name[:2])
    packages = ", ".join(f"{name} {version}" for name, version in made["packages"].items())
    machine = ", ".join(made[key] for key in ("platform", "processor", "device"))
    lines = [f"Python {made['python']} on {machine}, {made['cores']} cores; {packages}.", ""]
    return "\n".join(lines + [f"- {', '.join(commits[c])}: commit {c}" for c in commits])


def _made(results: Path) -> dict:
    return json.loads((results / "environment.json").read_text())


def main(folders: list[str]) -> int:
    """Write the page of each folder of results; return the exit code."""
    for results in map(Path, folders):
        try:
            text = page(results)
        except FileNotFoundError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        with replacing(results / "README.md") as temporary:
            temporary.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
