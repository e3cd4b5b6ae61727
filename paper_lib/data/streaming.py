"""Image files too many for memory: decoded batch by batch, in DataLoader workers when read in order."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from paper_lib.data.augment import ResizedCrop, central_square
from paper_lib.data.dataset import Dataset, hold_out, normalize
from paper_lib.data.decode import Crop, decode_all, in_workers
from paper_lib.training.parallel import cpus

# ImageNet's channels, in units of 0..1: used for every tree of images.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EVALUATION_PART = 224 / 256  # of the shorter side, central: the usual resize to 256, crop to 224


class StreamedImages(Dataset):
    """Files decoded when needed, trained on with random resized crops and flips; normalized on the device.

    `files` and `labels` map "train" and "test" to paths and to labels (N,) int64. Workers and single batches
    give the same bits: an item of the loader is one whole batch, named by its step.
    """

    def __init__(
        self,
        files: dict[str, list[str]],
        labels: dict[str, Tensor],
        n_classes: int,
        image_size: int,
        *,
        held_out: int,
        seed: int,
        content: str,
    ):
        train, held = hold_out(len(files["train"]), held_out, seed)
        rows = {"train": train, "held": held, "test": np.arange(len(files["test"]))}
        super().__init__("imagefolder", n_classes, (3, image_size, image_size), rows, ResizedCrop())
        # Bytes in one array, not a list of strings, whose reference counts would copy it into every worker.
        self._files = {split: np.array([os.fsencode(f) for f in paths]) for split, paths in files.items()}
        self._labels, self._tree = labels, content

    def _fetch(self, split: str, rows: np.ndarray, draws: np.ndarray | None) -> tuple[Tensor, Tensor]:
        return self._ready(*self._decode(split, rows, draws))

    def _fetch_all(self, plan, items: Iterable[int]) -> Iterator[tuple[Tensor, Tensor]]:
        pin_memory = self.device.type == "cuda"
        for x, y in in_workers(partial(self._job, plan), items, pin_memory):
            yield self._ready(x, y)

    def _job(self, plan, i: int) -> tuple[Tensor, Tensor]:
        return self._decode(*plan(i))

    def _decode(self, split: str, rows: np.ndarray, draws: np.ndarray | None) -> tuple[Tensor, Tensor]:
        """uint8 images and labels on the CPU."""
        store = "test" if split == "test" else "train"
        paths = [os.fsdecode(path) for path in self._files[store][rows]]
        threads = cpus() if get_worker_info() is None else 1
        images = torch.from_numpy(decode_all(paths, self.shape[-1], self._crops(len(rows), draws), threads))
        if draws is not None:
            flipped = torch.from_numpy(self._augment.flips(draws))
            images[flipped] = images[flipped].flip(-1)
        return images, self._labels[store][torch.from_numpy(rows)]

    def _crops(self, n: int, draws: np.ndarray | None) -> list[Crop]:
        if draws is None:
            return [partial(central_square, part=EVALUATION_PART)] * n
        return [partial(self._augment.box, draw=draw) for draw in draws]

    def _ready(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x, y = x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
        return normalize(x, MEAN, STD), y

    def _content(self) -> str:
        return self._tree
