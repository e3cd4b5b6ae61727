"""Executing a notebook with papermill, and keeping of an execution only what does not change from run to run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import nbformat
import papermill
from nbformat import NotebookNode
from papermill import PapermillExecutionError as ExecutionError

from paper_lib.results.environment import ROOT
from paper_lib.files import replacing

__all__ = ["ExecutionError", "execute", "publish", "publishable", "refresh", "with_checked_outputs", "write_smoke"]

CHECKED = "NBVAL_CHECK_OUTPUT"  # the comment that makes nbval compare a cell's output with the stored one
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(source: Path, output: Path, parameters: dict[str, Any]) -> NotebookNode:
    """Run a notebook in its own folder, passing its stderr (progress) through; what ran is left in `output`.

    Raises ExecutionError with the failing cell and its traceback.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    kernel = {"kernel_name": "python3", "cwd": source.parent, "extra_arguments": ["--log-level=ERROR"]}
    return papermill.execute_notebook(source, output, parameters, progress_bar=False, stderr_file=sys.stderr, **kernel)


def write_smoke(source: Path, into: Path) -> None:
    """Write a copy of a notebook with the smoke preset in place and its stored outputs kept, for nbval to check."""
    into.mkdir(parents=True, exist_ok=True)
    papermill.execute_notebook(source, into / source.name, {"preset": "smoke"}, prepare_only=True, progress_bar=False)


def publish(executed: NotebookNode, target: Path) -> None:
    """Write an executed notebook as it is committed, in one step."""
    with replacing(target) as temporary:
        nbformat.write(publishable(executed), temporary)


def refresh(source: Path, scratch: Path) -> None:
    """Run a notebook on the smoke preset and store the outputs of its checked cells in it, and no others."""
    executed = execute(source, scratch / source.name, {"preset": "smoke"})
    publish(with_checked_outputs(nbformat.read(source, as_version=4), executed), source)


def publishable(notebook: NotebookNode) -> NotebookNode:
    """Return a notebook without what changes from run to run or from machine to machine.

    Removed: times, progress (stderr and widgets), papermill's paths and random cell id, and the repository's own path.
    """
    notebook = nbformat.reads(nbformat.writes(notebook).replace(str(ROOT), "."), as_version=4)
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        cell.metadata = NotebookNode({"tags": tags} if tags else {})
        cell.id = "injected-parameters" if "injected-parameters" in tags else cell.id
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _is_progress(output)]
    return notebook


def with_checked_outputs(source: NotebookNode, executed: NotebookNode) -> NotebookNode:
    """Return `source` with the outputs that its checked cells had in an execution, and no others."""
    ran = {cell.id: cell for cell in executed.cells}
    for cell in source.cells:
        if cell.cell_type == "code":
            checked = CHECKED in cell.source
            cell.outputs = ran[cell.id].outputs if checked else []
            cell.execution_count = ran[cell.id].execution_count if checked else None  # nbval wants one beside outputs
    return source


def _is_progress(output: NotebookNode) -> bool:
    return output.get("name") == "stderr" or "application/vnd.jupyter.widget-view+json" in output.get("data", {})
