"""CIFAR as a tree of JPEG files, the data of the presets cifar10_small and cifar10_jpeg."""

from __future__ import annotations

import shutil
from pathlib import Path

from torchvision import datasets
from tqdm import tqdm

from paper_lib.errors import require

KINDS = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}


def write(name: str, root: Path, folder: Path, quality: int = 75) -> None:
    """Write CIFAR's images to folder/train/<class>/<number>.jpg and folder/test/...; downloads it into `root` first.

    Raises ConfigError for another name than cifar10 or cifar100, or a folder that already holds such a tree.
    """
    require(name in KINDS, "dataset", name, " or ".join(KINDS))
    for split in ("train", "test"):
        require(not (folder / split).exists(), "folder", str(folder), f"{split}/ is there already: name a new folder")
        images = KINDS[name](root, train=split == "train", download=True)
        draft = folder / f".{split}"  # moved into place when it is whole
        shutil.rmtree(draft, ignore_errors=True)
        for i, (image, label) in enumerate(tqdm(images, desc=f"writing {split}", unit=" images")):
            path = draft / images.classes[label] / f"{i:05d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path, quality=quality)
        draft.rename(folder / split)
