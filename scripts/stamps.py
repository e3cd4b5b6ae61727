"""Stamps: what a notebook made, by which make knows whether it is up to date.

`python -m scripts.stamps FOLDER` removes the stamps of a folder whose files are neither as they
were made nor as they are committed: what was deleted or changed, or is by now that of other
settings, is made again; what git restores is believed.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from paper_lib.files import remove, replacing
from scripts import ROOT, environment, git


def digest(file: Path) -> str:
    """Return git's name for the content of a file."""
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def committed() -> dict[Path, str]:
    """Return git's names for the contents of the committed results."""
    lines = git("ls-tree", "-r", "-z", "HEAD", "results/").decode().split("\0")
    entries = (line.split("\t", 1) for line in lines if line)
    return {ROOT / name: entry.split()[2] for entry, name in entries}


def write(stamp: Path, files: Sequence[Path], made: int) -> None:
    """Write what files of results are, dated `made` (in ns): what changed since does not count."""
    with replacing(stamp) as temporary:
        temporary.write_text(json.dumps({str(file): digest(file) for file in files}, indent=1))
        os.utime(temporary, ns=(made, made))


def holds(stamp: Path) -> bool:
    """Whether every file of a stamp is as it was made, or is committed, and recorded."""
    try:
        made = {Path(name): then for name, then in json.loads(stamp.read_bytes()).items()}
        changed = {file: now for file, then in made.items() if (now := digest(file)) != then}
    except (OSError, ValueError, AttributeError):  # no such file, or not a stamp
        return False
    folders = {file.parents[1] for file in made}
    recorded = any(stamp.name in environment(folder)["notebooks"] for folder in folders)
    return recorded and (not changed or changed.items() <= committed().items())


def main(folder: Path) -> None:
    """Remove the stamps of a folder that do not hold."""
    for stamp in folder.iterdir():
        if not holds(stamp):
            remove(stamp)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
