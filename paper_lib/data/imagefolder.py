"""Trees of image files, root/train/<class>/* and root/val (or test)/<class>/*: ImageNet's layout, or a user's own."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from paper_lib.data.augment import FlipCrop, central_square
from paper_lib.data.cache import cached_array
from paper_lib.data.dataset import DataError, Dataset, TensorDataset
from paper_lib.data.decode import decode_all, in_workers
from paper_lib.data.streaming import MEAN, STD, StreamedImages

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
CHUNK = 256  # images decoded per task


@dataclass(frozen=True)
class Tree:
    """What is in the folders: classes in label order, and for "train" and "test" the files and their labels."""

    classes: list[str]
    files: dict[str, list[str]]
    labels: dict[str, torch.Tensor]
    content: str  # hash of the files' relative paths and sizes: the same for a copy of the tree
    state: str  # hash of modification times also: a change invalidates what was decoded


def load(
    root: Path,
    *,
    held_out: int,
    seed: int,
    progress: bool,
    image_size: int,
    streaming: bool | None = None,
    in_memory_limit: int = 8 * 10**9,
) -> Dataset:
    """A tree of images as (3, image_size, image_size).

    A tree that takes at most `in_memory_limit` bytes as uint8 is decoded once (shorter side resized to
    image_size, central square kept), cached in root/.decoded and held on the device, with flips and crops
    padded by an eighth of the side. A larger one is streamed: see StreamedImages. `streaming` overrides the choice.

    Raises DataError naming the file, class or folder for an unreadable image (when it is read), an empty class,
    classes that differ between splits, a missing split, or a root/.decoded that cannot be written (a root
    with links to another tree's folders will do).
    """
    if image_size < 8:
        raise ValueError(f"image_size={image_size}: must be at least 8 pixels, such as 32, 64 or 224")
    tree = scan(root)
    count = sum(len(files) for files in tree.files.values())
    if streaming is None:
        streaming = count * 3 * image_size**2 > in_memory_limit
    if streaming:
        return StreamedImages(
            tree.files, tree.labels, len(tree.classes), image_size, held_out=held_out, seed=seed, content=tree.content
        )
    images = _decoded(root, tree, image_size, progress)
    cut = len(tree.files["train"])
    return TensorDataset(
        "imagefolder",
        {"train": images[:cut], "test": images[cut:]},
        tree.labels,
        n_classes=len(tree.classes),
        held_out=held_out,
        seed=seed,
        mean=MEAN,
        std=STD,
        augment=FlipCrop(pad=image_size // 8),
        content=tree.content,
    )


def _decoded(root: Path, tree: Tree, size: int, progress: bool) -> torch.Tensor:
    """All images, train then test, (N, 3, size, size) uint8, from the cache or decoded into it."""
    files = tree.files["train"] + tree.files["test"]

    def fill(out: np.ndarray) -> None:
        starts = range(0, len(files), CHUNK)
        with tqdm(total=len(files), desc="decoding", unit=" images", disable=not progress) as bar:
            for start, images in zip(starts, in_workers(partial(_chunk, files, size), starts), strict=True):
                out[start : start + len(images)] = images
                bar.update(len(images))

    folder = root / ".decoded"
    try:
        images = cached_array(folder, f"{size}px-{tree.state}", (len(files), 3, size, size), "uint8", fill)
    except OSError as error:
        raise DataError(
            f"cannot keep decoded images in {folder} ({error}): make room there, or if it is read-only, make a folder "
            "with links to the tree's train and val (or test) folders and name that instead"
        ) from error
    for stale in set(folder.glob(f"{size}px-*.npy")) - set(folder.glob(f"{size}px-{tree.state}-*.npy")):
        stale.unlink(missing_ok=True)
    return torch.from_numpy(images)


def _chunk(files: list[str], size: int, start: int) -> np.ndarray:
    files = files[start : start + CHUNK]
    return decode_all(files, size, [central_square] * len(files), threads=1)


def scan(root: Path) -> Tree:
    """List a tree. Hidden files and files that are not images by their name are left out."""
    folders = {"train": root / "train", "test": root / "val"}
    if not folders["test"].is_dir():
        folders["test"] = root / "test"
    for folder in folders.values():
        if not folder.is_dir():
            raise DataError(f"{root} must hold train/<class>/ and val/<class>/ or test/<class>/: {folder} is missing")
    classes = _classes(folders)
    files, labels = {}, {}
    content, state = hashlib.blake2b(digest_size=8), hashlib.blake2b(digest_size=8)
    for split, folder in folders.items():
        files[split], of_split = [], []
        for label, name in enumerate(classes):
            entries = sorted(_images(folder / name), key=lambda entry: entry.path)
            if not entries:
                raise DataError(f"class folder {folder / name} has no images ({' '.join(EXTENSIONS)})")
            for entry in entries:
                info, relative = entry.stat(), os.path.relpath(entry.path, root)
                content.update(f"{relative} {info.st_size}\n".encode())
                state.update(f"{relative} {info.st_size} {info.st_mtime_ns}\n".encode())
            files[split] += [entry.path for entry in entries]
            of_split += [label] * len(entries)
        labels[split] = torch.tensor(of_split)
    return Tree(classes, files, labels, content.hexdigest(), state.hexdigest())


def _classes(folders: dict[str, Path]) -> list[str]:
    names = {split: {entry.name for entry in _visible(folder) if entry.is_dir()} for split, folder in folders.items()}
    if not names["train"]:
        raise DataError(f"{folders['train']} has no class folders: each class needs one, with its images")
    if names["train"] != names["test"]:
        only = {
            split: sorted(names[split] - names[other])[:5] for split, other in (("train", "test"), ("test", "train"))
        }
        raise DataError(
            f"classes differ: only in {folders['train']}: {only['train']}, only in {folders['test']}: {only['test']} "
            "(the first 5 of each); give both the same class folders"
        )
    return sorted(names["train"])


def _images(folder: Path | str) -> Iterator[os.DirEntry]:
    for entry in _visible(folder):
        if entry.is_dir():
            yield from _images(entry.path)
        elif entry.name.lower().endswith(EXTENSIONS):
            yield entry


def _visible(folder: Path | str) -> Iterator[os.DirEntry]:
    with os.scandir(folder) as entries:
        yield from (entry for entry in entries if not entry.name.startswith("."))
