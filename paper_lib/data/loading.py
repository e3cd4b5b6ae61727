"""The way to data: datasets by name, and a user's own tensors."""

from __future__ import annotations

import inspect
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

from paper_lib.data.dataset import SPLITS, DataError, Dataset, TensorDataset

__all__ = ["LOADERS", "SPLITS", "DataError", "Dataset", "default_device", "from_tensors", "load"]


# Module with the `load` of each dataset, and that function's first arguments. Imported when first used: torchvision
# takes seconds.
LOADERS = {
    "digits": ("digits",),
    "cifar10": ("vision", "cifar10"),
    "cifar100": ("vision", "cifar100"),
    "imagefolder": ("imagefolder",),
}


def default_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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
    """A dataset by name, from files under `root`, where what is missing is generated or downloaded.

    `held_out` training images, chosen by `seed`, become the split "held". Options that are None are left
    out; imagefolder has image_size, streaming and in_memory_limit (see paper_lib.data.imagefolder.load).

    Raises ValueError for an unknown name or option, and DataError (a ValueError) for missing or bad files.
    """
    if name not in LOADERS:
        raise ValueError(f"unknown dataset {name!r}: choose one of {', '.join(LOADERS)}, or use from_tensors")
    module, *arguments = LOADERS[name]
    loader = partial(import_module(f"paper_lib.data.{module}").load, *arguments)
    options = {option: value for option, value in options.items() if value is not None}
    unknown = sorted(set(options) - set(inspect.signature(loader).parameters))
    if unknown:
        raise ValueError(f"dataset {name!r} takes no {', '.join(unknown)}: leave it out")
    return loader(Path(root), held_out=held_out, seed=seed, progress=progress, **options).to(device)


def from_tensors(
    x: Tensor,
    y: Tensor,
    x_test: Tensor,
    y_test: Tensor,
    *,
    held_out: int = 0,
    seed: int = 0,
    name: str = "tensors",
    device: str | torch.device | None = None,
) -> Dataset:
    """A user's own data: images x (N, ...) with integer labels y (N,) in 0, 1, ...; tensors or arrays.

    They go to `device`, by default the GPU if there is one, wherever they were; runs train where their data is.
    Floating-point images are used as they are; uint8 ones (N, C, H, W) are normalized by the training
    images' mean and standard deviation per channel. No augmentation.

    Raises ValueError for shapes, types or labels that do not fit together.
    """
    images = {"train": torch.as_tensor(x), "test": torch.as_tensor(x_test)}
    labels = {"train": torch.as_tensor(y), "test": torch.as_tensor(y_test)}
    for split in images:
        _check_pair(split, images[split], labels[split])
    if images["train"].shape[1:] != images["test"].shape[1:]:
        shapes = [tuple(images[split].shape[1:]) for split in images]
        raise ValueError(f"training images have shape {shapes[0]}, test images {shapes[1]}: make them equal")
    if len({x.dtype == torch.uint8 for x in images.values()}) > 1:
        raise ValueError("training and test images must both be uint8 or both floating-point")
    mean, std = (0.0,), (1.0,)
    if images["train"].dtype == torch.uint8:
        mean, std = _moments(images["train"])
    else:
        images = {split: x.float() for split, x in images.items()}
    labels = {split: y.long() for split, y in labels.items()}
    n_classes = int(max(y.max() for y in labels.values())) + 1
    dataset = TensorDataset(name, images, labels, n_classes, held_out=held_out, seed=seed, mean=mean, std=std)
    return dataset.to(device or default_device())


def _check_pair(split: str, x: Tensor, y: Tensor) -> None:
    if len(x) == 0 or y.shape != (len(x),):
        raise ValueError(f"{split}: {len(x)} images with labels of shape {tuple(y.shape)}: need one label for each")
    if y.is_floating_point() or y.dtype == torch.bool or y.min() < 0:
        raise ValueError(f"{split}: labels must be integers from 0 up, not {y.dtype} from {y.min().item()}")
    if x.dtype != torch.uint8 and not x.is_floating_point():
        raise ValueError(f"{split}: images must be floating-point or uint8, not {x.dtype}")
    if x.dtype == torch.uint8 and x.dim() != 4:
        raise ValueError(f"{split}: uint8 images must be (N, C, H, W), not {tuple(x.shape)}")


def _moments(x: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of uint8 images, in units of 0..1."""
    # From a histogram per channel: exact, and never a float copy of all images.
    values = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.stack([torch.bincount(c.flatten().cpu(), minlength=256) for c in x.unbind(1)]).double()
    p = counts / counts.sum(1, keepdim=True)
    mean = p @ values
    std = (p @ values**2 - mean**2).clamp(min=0).sqrt().clamp(min=1 / 255)  # a constant channel has none
    return tuple(mean.tolist()), tuple(std.tolist())
