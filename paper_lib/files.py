"""Where files are kept; files that are whole or absent: replacement, locks, room on the disk."""

from __future__ import annotations

import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock
import numpy as np
from tqdm import tqdm

from paper_lib.errors import require

LOCK_S = 1.0  # after which a process says that it waits


def say(line: str) -> None:
    """Print a line on stderr, beside any progress bar."""
    tqdm.write(line, file=sys.stderr)


def folder(kind: str) -> Path:
    """Return where `kind` ("data", "results" or "runs") lives.

    It is $PAPER_<KIND>, or a folder of that name in the working directory, or at the top of the
    checkout of this repository that the working directory is in; there, results go to
    .build/scratch, so that a notebook run by hand never touches those that are committed.
    """
    if named := os.environ.get(f"PAPER_{kind.upper()}"):
        is_folder = os.path.isdir(named) or not os.path.lexists(named)
        require(is_folder, f"PAPER_{kind.upper()}", named, "it must name a folder")
        return Path(named)
    for top in (Path.cwd(), *Path.cwd().parents):
        project = top / "pyproject.toml"
        if project.is_file() and '\nname = "paper-lib"\n' in project.read_text():
            return top / (".build/scratch" if kind == "results" else kind)
    return Path.cwd() / kind


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`, with its suffix, that takes its place at the end.

    Folders are made as needed; the content reaches the disk before the name does. After an error
    the temporary file is removed and `path` is as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold the lock of `path` between processes; say so where another one has it.

    The system releases it when its holder dies.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    free = filelock.FileLock(path.with_name(f".{path.name}.lock"))
    try:
        held = free.acquire(timeout=LOCK_S)
    except filelock.Timeout:
        say(f"waiting for another process, which is making {path}")
        held = free.acquire()
    with held:
        yield


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all that it holds, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def allocate(path: Path, shape: tuple[int, ...], dtype: str) -> np.memmap:
    """Create a .npy file of zeros with its disk space reserved, and map it for writing.

    Reserving matters: writing to a sparse map on a full disk kills the process instead of raising.
    """
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with open(path, "rb+") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise OSError with the arithmetic if `needed` bytes, and 5 % more, do not fit on the disk."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if needed * 1.05 > free:
        arithmetic = f"needs {needed / 1e9:.2f} GB, but {folder} has {free / 1e9:.2f} GB free"
        remedy = "free some space, set PAPER_RUNS to a larger disk, or record fewer snapshots"
        raise OSError(f"{what} {arithmetic}: {remedy}")


def cached_array(
    folder: Path, key: str, shape: tuple[int, ...], dtype: str, fill: Callable[[np.ndarray], None]
) -> np.ndarray:
    """The array that `fill` writes, from `folder`/`key`-<checksum>.npy; made if absent or damaged.

    It is mapped copy-on-write: processes share its pages, and writing never reaches the file. One
    process makes it while others wait; each reads it in full once, for the checksum (about 2 GB/s).
    """
    with lock(folder / key):
        for path in folder.glob(f"{key}-*.npy"):
            with suppress(ValueError, OSError, EOFError):
                array = np.load(path, mmap_mode="c")
                as_made = array.shape == shape and array.dtype == dtype
                if as_made and path.stem.endswith(_checksum(array)):
                    return array
            path.unlink()
        temporary = folder / f"{key}.tmp"
        try:
            array = allocate(temporary, shape, dtype)
            fill(array)
            array.flush()
            path = folder / f"{key}-{_checksum(array)}.npy"  # known only now
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return np.load(path, mmap_mode="c")


def _checksum(array: np.ndarray) -> str:
    return f"{zlib.crc32(array.data):08x}"


def cpus() -> int:
    """CPUs that this process may use, shared among the processes that torchrun started here."""
    affinity = getattr(os, "sched_getaffinity", None)
    usable = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, usable // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
