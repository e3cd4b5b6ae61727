"""Arrays made once and kept on disk: locked while made, checked when read; large ones mapped into memory."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from paper_lib.files import allocate, lock, replacing

Arrays = dict[str, np.ndarray]


def cached_array(
    folder: Path,
    key: str,
    shape: tuple[int, ...],
    dtype: str,
    fill: Callable[[np.ndarray], None],
) -> np.ndarray:
    """The array that `fill` writes, from `folder`/`key`-<checksum>.npy, made first if absent or damaged.

    The result is mapped copy-on-write: processes share the pages and writing never reaches the file.
    """
    with lock(folder / key):
        for path in folder.glob(f"{key}-*.npy"):
            array = _read(path, shape, dtype)
            if array is not None:
                return array
            path.unlink()
        return _read(_make(folder, key, shape, dtype, fill), shape, dtype)


def cached_arrays(path: Path, make: Callable[[], Arrays]) -> Arrays:
    """The arrays that `make` returns, from the .npz file `path`, made first if absent or damaged."""
    with lock(path):
        arrays = read_arrays(path)
        if arrays is None:
            arrays = make()
            with replacing(path) as temporary:
                np.savez(temporary, **arrays)
        return arrays


def read_arrays(path: Path) -> Arrays | None:
    """The arrays of a .npz file, or None where it is absent, cut short or altered (their checksums are in the file)."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return dict(stored)
    except (ValueError, OSError, EOFError, RuntimeError, zipfile.BadZipFile):  # RuntimeError: flags of the format
        return None


def _make(folder: Path, key: str, shape, dtype, fill) -> Path:
    """Fill a temporary file, then move it to its name: the checksum in it is known only then."""
    temporary = folder / f"{key}.tmp"
    try:
        array = allocate(temporary, shape, dtype)
        fill(array)
        array.flush()
        path = folder / f"{key}-{_checksum(array)}.npy"
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _read(path: Path, shape: tuple[int, ...], dtype: str) -> np.ndarray | None:
    """The array, or None where the file is cut short, altered, or of another shape."""
    try:
        array = np.load(path, mmap_mode="c")
    except (ValueError, OSError, EOFError):
        return None
    sound = array.shape == tuple(shape) and array.dtype == dtype and path.stem.endswith(_checksum(array))
    return array if sound else None


def _checksum(array: np.ndarray) -> str:
    return f"{zlib.crc32(array.reshape(-1).view(np.uint8)):08x}"
