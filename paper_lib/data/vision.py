"""CIFAR-10 and CIFAR-100 through torchvision, downloaded on first use."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torchvision import datasets

from paper_lib.data.augment import FlipCrop
from paper_lib.data.dataset import DataError, TensorDataset
from paper_lib.files import lock

KINDS = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}
# Of the training images' channels, in units of 0..1.
MEAN = {"cifar10": (0.4914, 0.4822, 0.4465), "cifar100": (0.5071, 0.4865, 0.4409)}
STD = {"cifar10": (0.2470, 0.2435, 0.2616), "cifar100": (0.2673, 0.2564, 0.2762)}


def load(name: str, root: Path, *, held_out: int, seed: int, progress: bool) -> TensorDataset:
    """CIFAR (3, 32, 32): 50,000 training and 10,000 test images as uint8, with flip and padded crop by 4 pixels.

    A download shows torchvision's progress bar whatever `progress` says. Raises DataError where the archive is
    neither there nor to be had.
    """
    with lock(root / name):
        train, test = _open(name, root, train=True), _open(name, root, train=False)
    return TensorDataset(
        name,
        {"train": _images(train), "test": _images(test)},
        {"train": torch.tensor(train.targets), "test": torch.tensor(test.targets)},
        n_classes=len(train.classes),
        held_out=held_out,
        seed=seed,
        mean=MEAN[name],
        std=STD[name],
        augment=FlipCrop(pad=4),
    )


def _open(name: str, root: Path, train: bool) -> datasets.CIFAR10:
    kind = KINDS[name]
    try:
        return kind(root, train=train, download=True)
    except (OSError, RuntimeError, EOFError) as error:  # unreachable host, full disk, wrong checksum, bad archive
        raise DataError(
            f"{name} is not in {root} and could not be downloaded ({error}). On a machine without network, put the "
            f"archive {kind.filename} (MD5 {kind.tgz_md5}) into {root} and run again: it is unpacked from there."
        ) from error


def _images(dataset: datasets.CIFAR10) -> torch.Tensor:
    """(N, 32, 32, 3) as stored to (N, 3, 32, 32)."""
    return torch.from_numpy(np.ascontiguousarray(dataset.data.transpose(0, 3, 1, 2)))
