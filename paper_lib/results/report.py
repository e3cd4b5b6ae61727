"""What readers see of the results: the README's generated tables, and one self-contained HTML page per preset."""

from __future__ import annotations

import argparse
import base64
import html
import itertools
import json
import re
import sys
from collections import Counter
from pathlib import Path

from paper_lib.results import claims, notebooks
from paper_lib.runs import budget
from paper_lib.files import folder
from paper_lib.results.environment import ROOT
from paper_lib.files import replacing
from paper_lib.presets import PRESETS, study
from paper_lib.errors import ConfigError

README = ROOT / "README.md"
BLOCK = re.compile(r"(<!-- begin (\w+) (\w+) -->\n).*?(<!-- end \2 \3 -->)", flags=re.S)

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
img { max-width: 100% } table { border-collapse: collapse; font-size: 0.85rem; margin: 1rem 0 }
th, td { padding: 0.25rem 0.6rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top }
.no { color: #b3261e; font-weight: bold } .yes { color: #1b6e3c }
"""


def notebook_title(name: str) -> str:
    """The first heading of a notebook, without its number."""
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())["cells"]
    heading = "".join(cells[0]["source"]).splitlines()[0]
    return re.sub(r"^#+ *\d+ *· *", "", heading)


def environment(results: Path) -> dict:
    """results/<preset>/environment.json: versions, device, commit and wall times of the latest run."""
    return json.loads((results / "environment.json").read_text())


def claims_table(results: Path) -> str:
    """A preset's verdicts in Markdown: one line per claim and notebook, and why criteria fail."""
    table = claims.table(results)
    lines = ["| claim | notebook | criteria that hold | why others fail |", "|---|---|---|---|"]
    for (claim, notebook), rows in table.groupby(["claim", "notebook"], sort=False):
        reasons = "; ".join(filter(None, rows.reason[~rows.holds].unique())).replace("|", "\\|")
        link = f"[{notebook}]({_relative(results)}/notebooks/{notebook}.ipynb)"
        lines.append(f"| {claim} | {link} | {int(rows.holds.sum())} of {len(rows)} | {reasons} |")
    total = f"{claims.count(table)} [Every criterion]({_relative(results)}/claims.md), prediction and measurement."
    return "\n".join([total, "", *lines, ""])


def own_modules() -> dict[str, list[str]]:
    """The modules that a notebook imports and at most two others do, by notebook: where its figures come from."""
    imported = {
        path.stem: {module.stem for cell in json.loads(path.read_text())["cells"] for module in _imports(cell)}
        for path in notebooks.sources()
    }
    users = Counter(itertools.chain.from_iterable(imported.values()))
    return {name: sorted(module for module in modules if users[module] <= 3) for name, modules in imported.items()}


def _imports(cell: dict) -> set[Path]:
    return notebooks.imported_modules(notebooks.code(cell))


def notebooks_table(results: Path) -> str:
    """What each notebook shows, its figures, its code and its wall time, in Markdown."""
    lines = ["| executed notebook | figures | code | seconds |", "|---|---|---|---|"]
    relative, modules = _relative(results), own_modules()
    for name, entry in sorted(environment(results)["notebooks"].items()):
        figures = sorted((results / "figures").glob(f"{name[:2]}_*.png"))
        links = ", ".join(f"[{path.stem}]({relative}/figures/{path.name})" for path in figures)
        title = f"[{name}]({relative}/notebooks/{name}.ipynb): {notebook_title(name)}"
        code = [f"[notebook](notebooks/{name}.ipynb)", *(f"[{m}](paper_lib/{m}.py)" for m in modules[name])]
        lines.append(f"| {title} | {links} | {', '.join(code)} | {entry['seconds']:.0f} |")
    return "\n".join(lines) + "\n"


def _relative(results: Path) -> str:
    return results.relative_to(ROOT).as_posix()


def scoreboard_table(results: Path) -> str:
    """The accuracy table that notebook 14 wrote, in Markdown."""
    return (results / "scoreboard.md").read_text()


def costs_table(results: Path) -> str:
    """What the runs that a preset's notebooks share take, all seeds together, in Markdown: one line per preset."""
    del results  # counted, not measured
    lines = ["| preset | weights | million images | GB on disk | GB on the device |", "|---|---|---|---|---|"]
    for preset, chosen in PRESETS.items():
        table = budget.table(chosen)
        cells = [f"{table[name].sum():,.2f}" for name in ("million images", "GB on disk")]
        cells.append(f"{table['GB on device'].max():,.2f}")
        lines.append(f"| {preset} | {table.weights[0]:,} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


TABLES = {
    "claims": claims_table, "notebooks": notebooks_table, "scoreboard": scoreboard_table, "costs": costs_table
}  # fmt: skip


def updated(text: str) -> str:
    """Replace what stands between `<!-- begin TABLE PRESET -->` and its end by that table of that preset's results."""

    def block(match: re.Match) -> str:
        table = TABLES[match[2]](ROOT / "results" / match[3])
        return f"{match[1]}\n{table}\n{match[4]}"

    return BLOCK.sub(block, text)


def page(results: Path, label: str) -> str:
    """One HTML page with the verdicts and every figure of a preset, images included."""
    table = claims.table(results)
    made = environment(results)
    verdicts = table.assign(
        holds=["yes" if holds else f"no: {why}" for holds, why in zip(table.holds, table.reason, strict=True)]
    )
    rows = verdicts.drop(columns="reason").to_html(index=False, border=0, float_format=lambda v: f"{v:.3g}", na_rep="")
    rows = re.sub(r"<td>(yes|no)(:[^<]*)?</td>", r'<td class="\1">\1\2</td>', rows)
    parts = [f"<h1>{html.escape(label)}</h1>", f"<p>{claims.count(table)}</p>", rows]
    for name in sorted(made["notebooks"]):
        parts.append(f'<h2><a href="{name}.html">{html.escape(notebook_title(name))}</a></h2>')
        for figure in sorted((results / "figures").glob(f"{name[:2]}_*.png")):
            image = base64.b64encode(figure.read_bytes()).decode()
            parts.append(f'<img alt="{figure.stem}" src="data:image/png;base64,{image}">')
    parts.append(f"<h2>Made with</h2><pre>{html.escape(json.dumps(made, indent=1))}</pre>")
    head = f'<meta charset="utf-8"><title>{html.escape(label)}</title><style>{STYLE}</style>'
    return "\n".join([f'<!doctype html><html lang="en">{head}<body>', *parts, "</body></html>\n"])


def main(argv: list[str] | None = None) -> int:
    """`readme` regenerates the README's tables; `page PRESET FILE` writes a preset's page."""
    parser = argparse.ArgumentParser(prog="python -m paper_lib.results.report", description=main.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("readme")
    one = commands.add_parser("page")
    one.add_argument("preset")
    one.add_argument("file", type=Path)
    args = parser.parse_args(argv)
    try:
        if args.command == "readme":
            target, text = README, updated(README.read_text())
        else:
            target, text = args.file, page(folder("results") / args.preset, study(args.preset).label)
        with replacing(target) as temporary:
            temporary.write_text(text)
    except (ConfigError, FileNotFoundError) as error:
        print(f"error: {error}; `make figures` makes the results", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
