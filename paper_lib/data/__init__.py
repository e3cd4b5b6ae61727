"""Load datasets: by name with `load`, or of your own with `from_tensors` and `from_loaders`."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from paper_lib.data.dataset import DataError, Dataset, TensorDataset, default_device, from_tensors
from paper_lib.data.loader import LoadedDataset, from_loaders
from paper_lib.data.loss import Loss
from paper_lib.errors import check_names, require

__all__ = [
    "DataError",
    "Dataset",
    "LoadedDataset",
    "Loss",
    "TensorDataset",
    "default_device",
    "from_loaders",
    "from_tensors",
    "load",
]

MODULES = {"digits": "digits", "cifar10": "cifar", "cifar100": "cifar", "imagefolder": "images"}


def load(
    name: str,
    root: Path | str,
    *,
    held_out: int = 0,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
    **options: Any,
) -> Dataset:
    """Load a dataset by name from files under `root`; what is missing is generated or downloaded.

    `held_out` training images, chosen by `seed`, become the split "held". Options that are None
    are left out; only "imagefolder" takes any, those of paper_lib.data.images.load.

    Raises ConfigError for an unknown name or an option too many, DataError for bad files.
    """
    check_names([name], MODULES, "dataset")
    options = {option: value for option, value in options.items() if value is not None}
    require(name == "imagefolder" or not options, "options", options, f"{name} takes none")
    # Imported only when it is asked for, because torchvision takes seconds.
    module = import_module(f"paper_lib.data.{MODULES[name]}")
    try:
        dataset = module.load(name, Path(root), seed=seed, progress=progress, **options)
    except OSError as error:
        remedy = "repair or remove it; in place of a full or read-only folder, name one of links"
        raise DataError(f"cannot read or keep {name} in {root} ({error}): {remedy}") from error
    return dataset.hold_out(held_out, seed).to(device)
