"""Load datasets: by name with `load`, or from tensors of your own with `from_tensors`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from paper_lib.data.dataset import (
    SPLITS,
    DataError,
    Dataset,
    TensorDataset,
    default_device,
    from_tensors,
)

__all__ = [
    "SPLITS",
    "DataError",
    "Dataset",
    "TensorDataset",
    "default_device",
    "from_tensors",
    "load",
]


def load(
    name: str,
    root: Path | str,
    *,
    held_out: int = 0,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
    **options,
) -> Dataset:
    """Load a dataset by name from files under `root`; what is missing is generated or downloaded.

    `held_out` training images, chosen by `seed`, become the split "held". Options that are None
    are left out; "imagefolder" takes those of paper_lib.data.images.load.

    Raises ValueError for an unknown name or option, DataError for missing or bad files.
    """
    loader = _loader(name)
    options = {option: value for option, value in options.items() if value is not None}
    unknown = sorted(set(options) - set(inspect.signature(loader).parameters))
    if unknown:
        raise ValueError(f"dataset {name!r} takes no {', '.join(unknown)}: leave it out")
    dataset = loader(Path(root), held_out=held_out, seed=seed, progress=progress, **options)
    return dataset.to(device)


def _loader(name: str) -> Callable[..., Dataset]:
    """Import what loads a dataset: only when it is asked for, because torchvision takes seconds."""
    if name == "digits":
        from paper_lib.data import digits

        return digits.load
    if name in ("cifar10", "cifar100"):
        from paper_lib.data import cifar

        return partial(cifar.load, name)
    if name == "imagefolder":
        from paper_lib.data import images

        return images.load
    names = "digits, cifar10, cifar100, imagefolder"
    raise ValueError(f"unknown dataset {name!r}: choose one of {names}, or use from_tensors")
