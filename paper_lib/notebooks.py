"""Running the notebooks: what each depends on, whether its result is current, and what of an execution is kept."""

from __future__ import annotations

import argparse
import ast
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from paper_lib import environment
from paper_lib.config import ROOT, folder
from paper_lib.files import lock, replacing
from paper_lib.presets import study
from paper_lib.validate import ConfigError

SOURCES = ROOT / "notebooks"
BUILD = ROOT / ".build"
CHECKED = "NBVAL_CHECK_OUTPUT"  # the comment that makes nbval compare a cell's output with the stored one
KERNEL = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}


class NotebookError(ValueError):
    """A notebook that does not run to its end."""


# --- reading ----------------------------------------------------------------------------------------------------


def read(path: Path) -> NotebookNode:
    """Return a notebook."""
    return nbformat.read(path, as_version=4)


def code(cell: NotebookNode) -> str:
    """Return a code cell as plain Python, without IPython's magics; "" for any other cell."""
    lines = cell.source.splitlines() if cell.cell_type == "code" else []
    return "\n".join(line for line in lines if not line.lstrip().startswith(("%", "!")))


def imported_modules(source: str) -> set[Path]:
    """Return the files of paper_lib that a piece of Python imports itself."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    paths = (ROOT / (name.replace(".", "/") + ".py") for name in names if name.startswith("paper_lib."))
    return {path for path in paths if path.exists()}


def prerequisites(notebook: Path) -> set[Path]:
    """Return the files that a notebook's result depends on: itself, the pins, and all it imports, transitively."""
    pending = imported_modules("\n".join(code(cell) for cell in read(notebook).cells))
    found = {notebook, environment.PINS}
    while pending:
        module = pending.pop()
        found.add(module)
        pending |= imported_modules(module.read_text()) - found
    return found


# --- keeping ----------------------------------------------------------------------------------------------------


def publishable(notebook: NotebookNode) -> NotebookNode:
    """Return an executed notebook without what changes from run to run or from machine to machine.

    Removed: times, progress (stderr and widgets), papermill's paths and random cell id, and the repository's own path.
    """
    text = nbformat.writes(notebook).replace(str(ROOT), ".")
    notebook = nbformat.reads(text, as_version=4)
    notebook.metadata = NotebookNode(KERNEL)
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        cell.metadata = NotebookNode({"tags": tags} if tags else {})
        cell.id = "injected-parameters" if "injected-parameters" in tags else cell.id
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _is_progress(output)]
    return notebook


def _is_progress(output: NotebookNode) -> bool:
    widget = "application/vnd.jupyter.widget-view+json"
    return output.get("name") == "stderr" or widget in output.get("data", {})


def refreshed(source: NotebookNode, executed: NotebookNode) -> NotebookNode:
    """Return a source notebook with the outputs of its checked cells taken from an execution, and no others."""
    outputs = {cell.id: cell.outputs for cell in executed.cells if cell.cell_type == "code"}
    for cell in source.cells:
        if cell.cell_type == "code":
            cell.outputs = outputs[cell.id] if CHECKED in cell.source else []
            for output in cell.outputs:
                if "execution_count" in output:
                    output.execution_count = None
            cell.execution_count = None
    return publishable(source)


# --- running ----------------------------------------------------------------------------------------------------


def check(preset: str, seeds: Sequence[int]) -> dict[str, Any]:
    """Return the parameters that a notebook gets; ConfigError if the preset or the seeds cannot work."""
    parameters = {"preset": preset, **({"seeds": list(seeds)} if seeds else {})}
    study(**parameters)
    return parameters


def execute(source: Path, output: Path, parameters: dict[str, Any], **options: Any) -> NotebookNode:
    """Run a notebook with papermill, its stderr (progress) passed through; what ran is left in `output`.

    Raises NotebookError with the failing cell and its traceback.
    """
    import papermill

    output.parent.mkdir(parents=True, exist_ok=True)
    shared = {"kernel_name": "python3", "cwd": source.parent, "progress_bar": False, "stderr_file": sys.stderr}
    try:
        return papermill.execute_notebook(source, output, parameters, **shared, **options)
    except papermill.PapermillExecutionError as error:
        raise NotebookError(f"{source.name} failed; what ran is in {output}\n{error}") from error


def is_current(stamp: Path, settings: dict[str, Any], needed: set[Path]) -> bool:
    """Whether `stamp` was made with these settings, by a run that began after every needed file's last change."""
    if not stamp.exists() or json.loads(stamp.read_text()) != settings:
        return False
    return stamp.stat().st_mtime_ns >= max(path.stat().st_mtime_ns for path in needed)


def run(name: str, preset: str, seeds: Sequence[int]) -> None:
    """Execute notebooks/<name>.ipynb into results/<preset>/notebooks unless that is current.

    Nothing is taken for finished before it is: the result moves into place whole, then the stamp in .build is set.
    Two that want the same notebook run it once.
    """
    parameters = check(preset, seeds)
    source, stamp = SOURCES / f"{name}.ipynb", BUILD / preset / f"{name}.json"
    results = folder("results").resolve() / preset
    target = results / "notebooks" / source.name
    settings = {**parameters, "results": str(results), "data": str(folder("data").resolve())}
    with lock(stamp):
        if target.exists() and is_current(stamp, settings, prerequisites(source)):
            return
        print(f"{name}: running on {preset}", flush=True)
        began = time.time_ns()
        executed = execute(source, stamp.with_suffix(".ipynb"), parameters)
        with replacing(target) as temporary:
            nbformat.write(publishable(executed), temporary)
        seconds = (time.time_ns() - began) / 1e9
        record(results, name, seconds)
        with replacing(stamp) as temporary:
            temporary.write_text(json.dumps(settings))
            os.utime(temporary, ns=(began, began))
    print(f"{name}: done in {seconds:.0f} s", flush=True)


def record(results: Path, name: str, seconds: float) -> None:
    """Write results/environment.json: what the latest run was made with, and each notebook's commit and wall time."""
    path = results / "environment.json"
    with lock(path):
        earlier = json.loads(path.read_text())["notebooks"] if path.exists() else {}
        described = environment.describe()
        earlier[name] = {"seconds": round(seconds), "commit": described["commit"]}
        described["notebooks"] = dict(sorted(earlier.items()))
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(described, indent=2) + "\n")


def prepare(into: Path) -> None:
    """Copy every notebook into a folder with the smoke preset in place and its stored outputs kept, for nbval."""
    for source in sources():
        execute(source, into / source.name, {"preset": "smoke"}, prepare_only=True)


def refresh(names: Sequence[str]) -> None:
    """Run notebooks on the smoke preset and store the outputs of their checked cells in the sources."""
    for source in sources():
        if not names or source.stem in names:
            executed = execute(source, BUILD / "refresh" / source.name, {"preset": "smoke"})
            with replacing(source) as temporary:
                nbformat.write(refreshed(read(source), executed), temporary)


def sources() -> list[Path]:
    """Return the notebooks in reading order."""
    return sorted(SOURCES.glob("[0-9][0-9]_*.ipynb"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the Makefile asks for; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m paper_lib.notebooks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    setting = argparse.ArgumentParser(add_help=False)
    setting.add_argument("--preset", required=True)
    setting.add_argument("--seeds", type=int, nargs="*", default=[])
    commands.add_parser("check", parents=[setting], help="fail if a preset or seeds cannot work")
    runner = commands.add_parser("run", parents=[setting], help="execute one notebook, unless its result is current")
    runner.add_argument("name")
    commands.add_parser("prepare", help="make copies for nbval").add_argument("into", type=Path)
    commands.add_parser("refresh", help="store the checked outputs").add_argument("names", nargs="*")
    args = vars(parser.parse_args(argv))
    try:
        {"check": check, "run": run, "prepare": prepare, "refresh": refresh}[args.pop("command")](**args)
    except (ConfigError, NotebookError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing unfinished was kept as a result", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
