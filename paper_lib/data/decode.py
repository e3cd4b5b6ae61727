"""From image files to pixels: one file, and many in parallel."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from paper_lib.data.augment import Box
from paper_lib.data.dataset import DataError
from paper_lib.training.parallel import cpus

Crop = Callable[[int, int], Box]  # width and height of an image -> the part of it to keep
MAX_WORKERS = 16


def decode(path: str, size: int, crop: Crop) -> np.ndarray:
    """The cropped part of an image, resized: (3, size, size) uint8. Raises DataError for an unreadable file."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            left, top, right, bottom = crop(width, height)
            # A JPEG is decoded at 1/2, 1/4 or 1/8 where the crop stays as large as what it becomes: many times faster.
            image.draft(None, (math.ceil(width * size / (right - left)), math.ceil(height * size / (bottom - top))))
            x, y = image.width / width, image.height / height
            box = (left * x, top * y, right * x, bottom * y)
            image = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR, box=box)
            return np.asarray(image).transpose(2, 0, 1)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"unreadable image {path} ({error}): repair or remove it") from error


def decode_all(paths: Sequence[str], size: int, crops: Iterable[Crop], threads: int) -> np.ndarray:
    """Decode files with a crop each: (N, 3, size, size) uint8. Threads pay for large images only."""
    if threads == 1:
        images = [decode(path, size, crop) for path, crop in zip(paths, crops, strict=True)]
    else:
        with ThreadPoolExecutor(threads) as pool:
            images = list(pool.map(decode, paths, repeat(size), crops))
    return np.stack(images)


def in_workers(function: Callable[[int], Any], items: Sequence[int], pin_memory: bool = False) -> Iterator[Any]:
    """function(item) for each item, in order, computed ahead in DataLoader workers; `function` must pickle."""
    loader = DataLoader(
        _Calls(function),
        sampler=items,
        batch_size=None,
        num_workers=min(cpus(), MAX_WORKERS),
        pin_memory=pin_memory,
        generator=torch.Generator(),  # without one of its own the loader draws from the global generator
    )
    for result in loader:
        if isinstance(result, DataError):
            raise result
        yield result


class _Calls(Dataset):
    """Item i is function(i), or the DataError that it raised: raised here, it would arrive wrapped in a traceback."""

    def __init__(self, function: Callable[[int], Any]):
        self.function = function

    def __getitem__(self, i: int) -> Any:
        try:
            return self.function(i)
        except DataError as error:
            return error
