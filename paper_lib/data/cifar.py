"""Load CIFAR-10 and CIFAR-100 through torchvision, or write them as a tree of JPEG files."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torchvision import datasets
from tqdm import tqdm

from paper_lib.data.augment import FlipCrop
from paper_lib.data.dataset import DataError, TensorDataset
from paper_lib.errors import require
from paper_lib.files import lock

KINDS = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}
# Of the training images' channels, in units of 0..1.
MEAN = {"cifar10": (0.4914, 0.4822, 0.4465), "cifar100": (0.5071, 0.4865, 0.4409)}
STD = {"cifar10": (0.2470, 0.2435, 0.2616), "cifar100": (0.2673, 0.2564, 0.2762)}


def load(name: str, root: Path, seed: int, progress: bool) -> TensorDataset:
    """CIFAR (3, 32, 32) as uint8, with flips and crops padded by 4 pixels; `seed` is not used.

    It has 50,000 training and 10,000 test images, downloaded on first use; a download shows
    torchvision's progress bar whatever `progress` says. Raises DataError where the archive is
    neither there nor to be had.
    """
    splits = {split: _open(name, root, split) for split in ("train", "test")}
    images = {split: torch.from_numpy(kept.data) for split, kept in splits.items()}
    return TensorDataset(
        name,
        {split: x.permute(0, 3, 1, 2).contiguous() for split, x in images.items()},
        {split: torch.tensor(kept.targets) for split, kept in splits.items()},
        n_classes=len(splits["train"].classes),
        mean=MEAN[name],
        std=STD[name],
        augment=FlipCrop(pad=4),
    )


def write_jpegs(name: str, root: Path, folder: Path, quality: int = 75) -> None:
    """Write CIFAR, kept in `root`, as folder/train/<class>/<number>.jpg and folder/test/...

    The preset cifar10_small trains on such a tree. Raises ConfigError for another
    name than cifar10 or cifar100, or a folder that holds a tree already, and DataError as `load`.
    """
    require(name in KINDS, "dataset", name, " or ".join(KINDS))
    for split in ("train", "test"):
        free = not (folder / split).exists()
        require(free, "folder", str(folder), f"{split}/ is there already: name a new folder")
        images = _open(name, root, split)
        draft = folder / f".{split}"  # moved into place when it is whole
        shutil.rmtree(draft, ignore_errors=True)
        for i, (image, label) in enumerate(tqdm(images, desc=f"writing {split}", unit=" images")):
            path = draft / images.classes[label] / f"{i:05d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path, quality=quality)
        draft.rename(folder / split)


def _open(name: str, root: Path, split: str) -> datasets.CIFAR10:
    """One split, by one process at a time: the first downloads and unpacks the archive."""
    kind = KINDS[name]
    try:
        with lock(root / name):
            return kind(root, train=split == "train", download=True)
    # Unreachable host, full disk, wrong checksum, bad archive.
    except (OSError, RuntimeError, EOFError) as error:
        raise DataError(
            f"{name} is not in {root} and could not be downloaded ({error}). On a machine without "
            f"network, put the archive {kind.filename} (MD5 {kind.tgz_md5}) into {root} and run "
            "again: it is unpacked from there."
        ) from error
