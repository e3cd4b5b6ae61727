"""Keep named arrays in a .npz file, made once; only the training methods of experiments use it."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from paper_lib.files import lock, replacing

Arrays = dict[str, np.ndarray]


def cached_arrays(path: Path, make: Callable[[], Arrays]) -> Arrays:
    """The arrays that `make` returns, from the .npz file `path`; made if absent or damaged."""
    with lock(path):
        arrays = read_arrays(path)
        if arrays is None:
            arrays = make()
            with replacing(path) as temporary:
                np.savez(temporary, **arrays)
        return arrays


def read_arrays(path: Path) -> Arrays | None:
    """The arrays of a .npz file, or None where it is absent or damaged (it holds checksums)."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return dict(stored)
    # RuntimeError: damaged flags of the format.
    except (ValueError, OSError, EOFError, RuntimeError, zipfile.BadZipFile):
        return None
