"""What make calls: run notebooks, publish, compare with what is committed, describe."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # the checkout


def git(*words: str) -> bytes:
    """Return git's output in the checkout; nothing where it fails, as without a repository."""
    if not (ROOT / ".git").exists():  # a repository around a copy is another's
        return b""
    try:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return b""
