"""Serve a tree of image files, root/train/<class>/* and root/val (or test)/<class>/*.

A tree that fits into memory is decoded once and kept whole; a larger one is streamed from disk.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from tqdm import tqdm

from paper_lib.data.augment import Box, FlipCrop, ResizedCrop, central_square
from paper_lib.data.dataset import Batch, DataError, Dataset, TensorDataset, Wanted, normalize
from paper_lib.errors import require
from paper_lib.files import cached_array, cpus

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
# ImageNet's channels, in units of 0..1: used for every tree of images.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EVALUATION_PART = 224 / 256  # of the shorter side, central: the usual resize to 256, crop to 224
IN_MEMORY_LIMIT = 8 * 10**9  # bytes of all images as uint8
CHUNK = 256  # images decoded per task where a tree is kept whole
MAX_WORKERS = 16

Crop = Callable[[int, int], Box]  # width and height of an image -> the part of it to keep


def load(
    name: str,
    root: Path,
    seed: int,
    progress: bool,
    image_size: int = 0,
    streaming: bool | None = None,
) -> Dataset:
    """A tree of images as (3, image_size, image_size); `seed` is not used.

    A tree that takes at most IN_MEMORY_LIMIT as uint8 is decoded once (shorter side resized to
    image_size, central square kept), cached in root/.decoded and held on the device, with flips
    and crops padded by an eighth of the side. A larger one is streamed: see StreamedImages.
    `streaming` overrides the choice. `decode` says what becomes of 16 bits, transparency, frames.

    Raises ConfigError for a bad image_size; DataError naming the file, class or folder for an
    image that is unreadable, or of 32 bits (when it is read), what is no regular file, fewer than
    two classes, an empty one, classes that differ between splits, or a missing split.
    """
    usable = isinstance(image_size, int) and 8 <= image_size <= 4096
    require(usable, "image_size", image_size, "from 8 to 4096 pixels, such as 32, 64, 224")
    tree = scan(root, progress)
    cut, rest = (len(files) for files in tree.files.values())
    large = (cut + rest) * 3 * image_size**2 > IN_MEMORY_LIMIT
    if large if streaming is None else streaming:
        return StreamedImages(name, tree, image_size)
    images = _decoded(root, tree, image_size, progress)
    return TensorDataset(
        name,
        {"train": images[:cut], "test": images[cut:]},
        tree.labels,
        n_classes=len(tree.classes),
        mean=MEAN,
        std=STD,
        augment=FlipCrop(pad=image_size // 8),
        content=tree.content,
    )


class StreamedImages(Dataset):
    """Files decoded when needed, trained on with random resized crops and flips.

    Batches are normalized on the device. Workers and single batches give the same bits: a worker
    gets the rows and random numbers of one whole batch, which were drawn outside.
    """

    def __init__(self, name: str, tree: Tree, image_size: int):
        shape = (3, image_size, image_size)
        super().__init__(name, len(tree.classes), shape, tree.labels, ResizedCrop())
        self._tree = tree

    def _fetch(self, source: str, rows: np.ndarray, draws: np.ndarray | None) -> Batch:
        return self._ready(*self._decode((source, rows, draws)))

    def _fetch_all(self, wanted: Iterable[Wanted]) -> Iterator[Batch]:
        decoded = in_workers(self._decode, wanted, pin_memory=self.device.type == "cuda")
        return (self._ready(x, y) for x, y in decoded)

    def _decode(self, wanted: Wanted) -> Batch:
        """uint8 images (N, 3, H, W) and labels (N,) on the CPU."""
        source, rows, draws = wanted
        crops: list[Crop] = [partial(central_square, part=EVALUATION_PART)] * len(rows)
        if draws is not None:
            crops = [partial(self._augment.box, draw=draw) for draw in draws]
        files = self._tree.files[source][rows]
        images = torch.from_numpy(decode_all(files, self.shape[-1], crops))
        if draws is not None:
            flipped = torch.from_numpy(self._augment.flips(draws))
            images[flipped] = images[flipped].flip(-1)
        return images, self._tree.labels[source][torch.from_numpy(rows)]

    def _ready(self, x: Tensor, y: Tensor) -> Batch:
        x, y = x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
        return normalize(x, MEAN, STD), y

    def _content(self) -> str:
        return self._tree.content


def _decoded(root: Path, tree: Tree, size: int, progress: bool) -> Tensor:
    """All images, train then test, (N, 3, size, size) uint8, from the cache or decoded into it."""
    folder, key = root / ".decoded", f"{size}px-{tree.content}"
    files = np.concatenate([tree.files["train"], tree.files["test"]])

    def fill(out: np.ndarray) -> None:
        starts = range(0, len(files), CHUNK)
        decoding = partial(decode_all, size=size, crops=[central_square] * CHUNK)
        chunks = in_workers(decoding, [files[i : i + CHUNK] for i in starts])
        bar = {"desc": "decoding", "unit": " images", "unit_scale": CHUNK, "disable": not progress}
        for i, images in zip(starts, tqdm(chunks, total=len(starts), **bar), strict=True):
            out[i : i + CHUNK] = images

    images = cached_array(folder, key, (len(files), 3, size, size), "uint8", fill)
    for stale in set(folder.glob(f"{size}px-*.npy")) - set(folder.glob(f"{key}-*.npy")):
        stale.unlink(missing_ok=True)
    return torch.from_numpy(images)


@dataclass(frozen=True)
class Tree:
    """What is in the folders: classes in label order; files and labels of "train" and "test".

    Paths are bytes in one array: reference counts of a list of strings would copy it into every
    worker.
    """

    classes: list[str]
    files: dict[str, np.ndarray]
    labels: dict[str, Tensor]
    content: str  # hash of the files' relative paths and bytes: the same for a copy of the tree


def scan(root: Path, progress: bool = False) -> Tree:
    """List a tree. Hidden files and files that are not images by their name are left out."""
    folders = {"train": root / "train", "test": root / "val"}
    if not folders["test"].is_dir():
        folders["test"] = root / "test"
    for folder in folders.values():
        if not folder.is_dir():
            layout = "train/<class>/ and val/<class>/ or test/<class>/"
            raise DataError(f"{root} must hold {layout}: {folder} is missing")
    classes = _classes(folders["train"], folders["test"])
    files, labels = {}, {}
    for split, folder in folders.items():
        of_class = [_images(folder / name) for name in classes]
        counts = torch.tensor([len(paths) for paths in of_class])
        labels[split] = torch.arange(len(classes)).repeat_interleave(counts)
        files[split] = np.array([os.fsencode(path) for path in chain.from_iterable(of_class)])
    paths = np.concatenate([files["train"], files["test"]])
    return Tree(classes, files, labels, _content(root, paths, progress))


def _content(root: Path, paths: np.ndarray, progress: bool) -> str:
    """Hash of files' relative paths and bytes.

    They are read once, and again after any change: nobody can set the time of the last one.
    """
    content, state = hashlib.blake2b(digest_size=8), hashlib.blake2b(digest_size=8)
    for path in paths:
        info = os.stat(path)
        known = repr((os.path.relpath(path, os.fsencode(root)), info.st_size))
        content.update(known.encode())
        state.update(f"{known} {info.st_ino} {info.st_mtime_ns} {info.st_ctime_ns}".encode())

    def fill(out: np.ndarray) -> None:
        for path in tqdm(paths, desc="reading", unit=" images", disable=not progress):
            content.update(Path(os.fsdecode(path)).read_bytes())
        out[:] = bytearray(content.digest())

    found = cached_array(root / ".decoded", f"content-{state.hexdigest()}", (8,), "uint8", fill)
    return found.tobytes().hex()


def _classes(train: Path, test: Path) -> list[str]:
    """Names of the class folders, the same in both splits."""
    of_train, of_test = (
        {path.name for path in split.iterdir() if path.is_dir() and path.name[0] != "."}
        for split in (train, test)
    )
    if len(of_train) < 2:
        raise DataError(f"{train} has {len(of_train)} class folders: two or more are needed")
    if odd := sorted(of_train ^ of_test):
        message = f"{odd[:5]} (at most 5 shown): give both the same class folders"
        raise DataError(f"classes differ: only one of {train} and {test} has {message}")
    return sorted(of_train)


def _images(folder: Path) -> list[str]:
    """Image files in a class folder and the folders in it, in the order of their paths."""
    found, seen, left = [], set(), [str(folder)]
    while left:
        where = left.pop()
        if (real := os.path.realpath(where)) in seen:
            raise DataError(f"{where} is a link to a folder of its own class: remove it")
        seen.add(real)
        shown = [entry for entry in os.scandir(where) if entry.name[0] != "."]
        left += [entry.path for entry in shown if entry.is_dir()]
        found += [e for e in shown if e.name.lower().endswith(EXTENSIONS) and not e.is_dir()]
    if odd := [entry.path for entry in found if not entry.is_file()]:  # a pipe would hang
        raise DataError(f"{odd[0]} is no file, or a link that leads nowhere: remove it")
    if not found:
        raise DataError(f"class folder {folder} has no images ({' '.join(EXTENSIONS)})")
    return sorted(entry.path for entry in found)


def decode(path: str | bytes, size: int, crop: Crop) -> np.ndarray:
    """The cropped part of an image, resized: (3, size, size) uint8, by RGB.

    It is turned as its EXIF data say, and put on white where it is transparent; of 16 bits the
    upper 8 are kept, and of several frames the first. Raises DataError naming the file if it is
    unreadable, or has 32 bits or floating-point values: which of them is white is not in the file.
    """
    try:
        with Image.open(path) as image:
            if image.mode in ("I", "F"):
                raise ValueError(f"mode {image.mode} has 32 bits: save it as 0 to 255")
            # Pillow itself turns TIFF files.
            orientation = image.getexif().get(ExifTags.Base.Orientation)
            turned = orientation in (5, 6, 7, 8) and image.format != "TIFF"
            width, height = image.size[::-1] if turned else image.size
            left, top, right, bottom = crop(width, height)
            # A JPEG is decoded at 1/2, 1/4 or 1/8 where the crop stays as large as what it
            # becomes: many times faster.
            wanted = width * size / (right - left), height * size / (bottom - top)
            w, h = map(math.ceil, wanted[::-1] if turned else wanted)
            image.draft(None, (w, h))
            rgb = _rgb(image)
            x, y = rgb.width / width, rgb.height / height
            box = (left * x, top * y, right * x, bottom * y)
            resized = rgb.resize((size, size), Image.Resampling.BILINEAR, box=box)
            return np.asarray(resized).transpose(2, 0, 1)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        message = f"unusable image {os.fsdecode(path)} ({error}): repair or remove it"
        raise DataError(message) from error


def _rgb(image: Image.Image) -> Image.Image:
    """An image upright, opaque and of 8 bits: `convert` alone clips 16 bits and drops alpha."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def decode_all(paths: Iterable[bytes], size: int, crops: Iterable[Crop]) -> np.ndarray:
    """Decode files, with a crop each, (N, 3, size, size) uint8; a worker does so in one thread."""
    threads = cpus() if get_worker_info() is None else 1
    with ThreadPoolExecutor(threads) as pool:
        return np.stack(list(pool.map(decode, paths, repeat(size), crops)))


def in_workers(
    function: Callable[[Any], Any], items: Iterable[Any], pin_memory: bool = False
) -> Iterator[Any]:
    """function(item) for each item, in order, computed ahead in DataLoader workers.

    Both must pickle; a DataError that the function raises is raised here.
    """
    loader = DataLoader(
        _Calls(function),
        sampler=items,
        batch_size=None,
        num_workers=min(cpus(), MAX_WORKERS),
        pin_memory=pin_memory,
        generator=torch.Generator(),  # otherwise the loader draws from the global generator
    )
    for result in loader:
        if isinstance(result, DataError):
            raise result
        yield result


class _Calls(torch.utils.data.Dataset):
    """What a function returns, or its DataError: raised in a worker, it would be a traceback."""

    def __init__(self, function: Callable[[Any], Any]):
        self.function = function

    def __getitem__(self, item: Any) -> Any:
        try:
            return self.function(item)
        except DataError as error:
            return error
