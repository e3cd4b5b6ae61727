"""Which notebooks are out of date, and running those: `python -m paper_lib.results.notebooks`, as the Makefile calls it.

Only files that nobody commits say what is up to date, so that a fresh clone runs everything. Papermill is imported
where something runs, not before: finding that nothing is to be done takes a fraction of a second.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paper_lib.results import environment
from paper_lib.files import folder
from paper_lib.results.environment import ROOT
from paper_lib.files import lock, replacing
from paper_lib.presets import study
from paper_lib.errors import ConfigError

SOURCES = ROOT / "notebooks"
BUILD = ROOT / ".build"


class NotebookError(ValueError):
    """A notebook that does not run to its end."""


def sources() -> list[Path]:
    """Return the notebooks in reading order."""
    return sorted(SOURCES.glob("[0-9][0-9]_*.ipynb"))


def code(cell: dict[str, Any]) -> str:
    """Return a code cell as plain Python, without IPython's magics; "" for any other cell."""
    lines = "".join(cell["source"]).splitlines() if cell["cell_type"] == "code" else []
    return "\n".join(line for line in lines if not line.lstrip().startswith(("%", "!")))


def imported_modules(source: str) -> set[Path]:
    """Return the files of paper_lib that a piece of Python imports itself, by statements or by names in strings."""
    names, by_string = [], "import_module" in source
    for node in ast.walk(ast.parse(source)):
        if by_string and isinstance(node, ast.Constant) and str(node.value).isidentifier():
            names.append(f"paper_lib.data.{node.value}")
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    places = [ROOT / name.replace(".", "/") for name in names if name.startswith("paper_lib.")]
    paths = [file for place in places for file in (place.with_suffix(".py"), place / "__init__.py")]
    return {path for path in paths if path.exists()}


def prerequisites(notebook: Path) -> set[Path]:
    """Return the files that a notebook's result depends on: itself, the pins, and all it imports, transitively."""
    cells = json.loads(notebook.read_text())["cells"]
    pending = imported_modules("\n".join(code(cell) for cell in cells))
    found = {notebook, environment.PINS}
    while pending:
        module = pending.pop()
        found.add(module)
        pending |= imported_modules(module.read_text()) - found
    return found


@dataclass(frozen=True)
class Task:
    """One notebook on one preset; `seeds` () stands for the preset's own. ConfigError if they cannot work."""

    name: str
    preset: str
    seeds: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        study(**self.parameters)

    @property
    def parameters(self) -> dict[str, Any]:
        """What the notebook's parameters cell is given."""
        return {"preset": self.preset, **({"seeds": list(self.seeds)} if self.seeds else {})}

    @property
    def source(self) -> Path:
        """The notebook that people edit."""
        return SOURCES / f"{self.name}.ipynb"

    @property
    def results(self) -> Path:
        """The preset's results."""
        return folder("results").resolve() / self.preset

    @property
    def target(self) -> Path:
        """The executed notebook, committed for readers."""
        return self.results / "notebooks" / self.source.name

    @property
    def stamp(self) -> Path:
        """The uncommitted file whose content says how the target was made, and whose time says from what state."""
        return BUILD / self.preset / f"{self.name}.json"

    @property
    def settings(self) -> dict[str, Any]:
        """What, besides files, the result depends on."""
        return {**self.parameters, "results": str(self.results), "data": str(folder("data").resolve())}

    def is_current(self) -> bool:
        """Whether the target was made with these settings after the last change of everything it depends on."""
        if not (self.target.exists() and self.stamp.exists()):
            return False
        newest = max(path.stat().st_mtime_ns for path in prerequisites(self.source))
        return json.loads(self.stamp.read_text()) == self.settings and self.stamp.stat().st_mtime_ns >= newest


def run(task: Task) -> None:
    """Execute a notebook into results/<preset>/notebooks unless that is current.

    Nothing is taken for finished before it is: the result moves into place whole, then the stamp, dated when the
    run began, since what changed meanwhile it may not have seen. Two that want the same notebook run it once.
    Raises NotebookError with the failing cell and its traceback.
    """
    with lock(task.stamp):
        if task.is_current():
            return
        from paper_lib.results import execution

        print(f"{task.name}: running on {task.preset}", flush=True)
        began = time.time_ns()
        draft = task.stamp.with_suffix(".ipynb")
        try:
            executed = execution.execute(task.source, draft, task.parameters)
        except execution.ExecutionError as error:
            raise NotebookError(f"{task.name} failed, see {draft}\n{error}") from error
        execution.publish(executed, task.target)
        seconds = (time.time_ns() - began) / 1e9
        record(task.results, task.name, seconds)
        with replacing(task.stamp) as temporary:
            temporary.write_text(json.dumps(task.settings))
            os.utime(temporary, ns=(began, began))
    print(f"{task.name}: done in {seconds:.0f} s", flush=True)


def record(results: Path, name: str, seconds: float) -> None:
    """Write results/environment.json: what the latest run was made with, and each notebook's commit and wall time."""
    path = results / "environment.json"
    with lock(path):
        notebooks = json.loads(path.read_text())["notebooks"] if path.exists() else {}
        described = environment.describe()
        notebooks[name] = {"seconds": round(seconds), "commit": described["commit"]}
        described["notebooks"] = dict(sorted(notebooks.items()))
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(described, indent=2) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code (2 for settings that cannot work and for a notebook that fails)."""
    parser = argparse.ArgumentParser(prog="python -m paper_lib.results.notebooks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for command, what in (("outdated", "print the names of those out of date"), ("run", "run those out of date")):
        settings = commands.add_parser(command, help=what)
        settings.add_argument("names", nargs="*", help="default: all")
        settings.add_argument("--preset", required=True)
        settings.add_argument("--seeds", type=int, nargs="+", default=[])
    commands.add_parser("smoke", help="write copies on the smoke preset, for nbval").add_argument("into", type=Path)
    commands.add_parser("refresh", help="store the checked outputs").add_argument("names", nargs="*")
    args = parser.parse_args(argv)
    try:
        carry_out(args)
    except (ConfigError, NotebookError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing unfinished is taken for a result", file=sys.stderr)
        return 130
    return 0


def carry_out(args: argparse.Namespace) -> None:
    """Run one command."""
    if args.command in ("outdated", "run"):
        study(args.preset)  # an unknown preset is an error even where there are no notebooks
        names = args.names or [path.stem for path in sources()]
        for task in [Task(name, args.preset, tuple(args.seeds)) for name in names]:
            if args.command == "run":
                run(task)
            elif not task.is_current():
                print(task.name)
        return
    from paper_lib.results import execution

    if args.command == "smoke":
        for source in sources():
            execution.write_smoke(source, args.into)
    else:
        for source in sources():
            if not args.names or source.stem in args.names:
                execution.refresh(source, BUILD / "refresh")


if __name__ == "__main__":
    sys.exit(main())
