"""What make calls: run notebooks, publish, compare with what is committed, describe."""

import io
import json
import os
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]  # the checkout


class ResultError(ValueError):
    """A result that is damaged, or nowhere to be kept; the message says what to do."""


def damaged(file: Path, reason: object) -> ResultError:
    """Return the error of a result that cannot be read, for this reason."""
    reason = " ".join(str(reason).split())
    return ResultError(f"{file} is damaged ({reason}): make figures makes it again")


def git(*words: str) -> bytes:
    """Return git's output in the checkout; nothing where it fails, as without a repository."""
    if not (ROOT / ".git").exists():  # a repository around a copy is another's
        return b""
    try:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return b""


def environment(results: Path | bytes) -> dict[str, Any]:
    """Return what environment.json says; of no notebook where it is missing or damaged."""
    try:
        if isinstance(results, Path):
            results = (results / "environment.json").read_bytes()
        made = json.loads(results)
        whole = all(
            entry["seconds"] >= 0 and entry["commit"] for entry in made["notebooks"].values()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        whole = False
    return made if whole else {"notebooks": {}}


def read_figure(content: bytes, name: Path, numbers: str = "", words: str = "") -> Any:
    """Return a figure's table, which has these columns; ResultError where it is damaged."""
    import pandas as pd

    try:
        table = pd.read_csv(io.BytesIO(content))
        if table.empty:
            raise ValueError("it has no rows")
        for column in numbers.split():
            table[column].astype(float)
        for column in words.split():
            table[column].str.len()
    except (ValueError, KeyError, AttributeError) as error:  # of these pandas has several kinds
        raise damaged(name, error) from error
    return table


def end_with_make() -> None:
    """End this process as soon as the make that all began with, or its own parent, has ended.

    A make that is killed ends the shells that it started, and those nothing.
    """
    parent, first = os.getppid(), os.environ.get("MAKE_PID")

    def watch() -> None:
        while os.getppid() == parent and _runs(first):
            time.sleep(0.5)
        os._exit(143)  # as by SIGTERM; kernels and workers look after their parents themselves

    if first is not None:
        threading.Thread(target=watch, daemon=True).start()


def _runs(pid: str) -> bool:
    """Whether a process is there, and not only waiting for its parent to ask how it ended."""
    import psutil

    try:
        return psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


pytest_configure = end_with_make  # of the plugin that `pytest -p scripts` makes of this
