"""Checksums of a run's files, written with them and held against them before they are believed.

A list of checksums stands in its run's folder and names the run: JSON, then the CRC-32 of that. It
finds what disks, copies and mistakes do to files; it is no protection against forgery.
"""

from __future__ import annotations

import functools
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from paper_lib import files

FINISHED, HALF = "checksums.txt", "resume.txt"  # the lists of a run, and of one in training
BLOCK = 1 << 20  # bytes read at a time


class DamagedError(OSError):
    """A file of a run that is not what was written."""


class Sum(NamedTuple):
    """The CRC-32 of a file's first n bytes, and its size; what follows them may be anything."""

    crc: int
    n: int
    size: int

    def then(self, block: Any) -> Sum:
        """The checksum with the bytes of a block (any buffer) behind those that it has."""
        return Sum(zlib.crc32(block, self.crc), self.n + memoryview(block).nbytes, self.size)


def of(path: Path, n: int | None = None) -> Sum:
    """The checksum of a file's first n bytes, by default of all."""
    size = _file(path).stat().st_size
    return functools.reduce(Sum.then, _blocks(path, size if n is None else n), Sum(0, 0, size))


def _blocks(path: Path, n: int) -> Iterator[bytes]:
    with _file(path).open("rb") as file:
        while block := file.read(min(BLOCK, n)):
            n -= len(block)
            yield block


def _file(path: Path) -> Path:
    if not path.is_file():  # whoever opens a pipe waits for ever
        raise DamagedError(f"{path} is {'no file' if path.exists() else 'missing'}")
    return path


def write(path: Path, run: str, sums: Mapping[str, Sum]) -> None:
    """Write the list of a run's checksums, by file."""
    content = json.dumps({"run": run, "files": sums}, indent=1)
    with files.replacing(path) as temporary:
        temporary.write_text(f"{content}\n{zlib.crc32(content.encode()):08x}\n")


def verified(folder: Path, listed: str = FINISHED) -> dict[str, Sum]:
    """The checksums of a list, after reading all of its files.

    DamagedError, which names the file, where one is missing, is not what was written, or where the
    list is another run's; another OSError where one cannot be read, which may pass.
    """
    path, run = folder / listed, folder.name.removesuffix(".part")
    content, _, crc = b"".join(_blocks(path, BLOCK)).rstrip().rpartition(b"\n")
    if crc != b"%08x" % zlib.crc32(content):
        raise DamagedError(f"{path} is not what was written")
    found = json.loads(content)
    if found["run"] != run:
        raise DamagedError(f"{path} is that of another run, {found['run']}")
    sums = {name: Sum(*numbers) for name, numbers in found["files"].items()}
    for name, one in sums.items():
        if of(folder / name, one.n) != one:
            raise DamagedError(f"{folder / name} is not what was written")
    return sums


def check(folder: Path) -> None:
    """Raise an error unless a finished run is what was written, as `verified` does.

    A process reads its files once, and again only where a size or a time has changed.
    """
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    stats = [(path.name, path.stat()) for path in paths if path.exists()]
    _check(folder, tuple((n, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for n, s in stats))


@functools.cache  # which remembers no errors
def _check(folder: Path, times: tuple) -> None:
    verified(folder)
