"""Serve labelled images in three splits, in batches that are pure functions of (seed, step)."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from paper_lib.data.augment import FlipCrop

SPLITS = ("train", "held", "test")
AUGMENTED = ("train", "held")
SOURCE = {"train": "train", "held": "train", "test": "test"}  # which images a split is made of

# First word of every seed sequence, so that streams drawn for different purposes never coincide.
_ORDER, _AUGMENT, _HELD, _EVALUATION = 1, 2, 3, 4

Batch = tuple[Tensor, Tensor]  # images (N, C, H, W) and labels (N,)
Wanted = tuple[str, np.ndarray, np.ndarray | None]  # source, rows, augmentation numbers if any


class DataError(ValueError):
    """Data that is missing, unreadable or inconsistent; the message says what to do."""


@lru_cache(maxsize=8)
def _permutation(*key: int) -> np.ndarray:
    """Read-only permutation of range(key[-1]), by a generator seeded with the whole key."""
    order = np.random.default_rng(key).permutation(key[-1])
    order.flags.writeable = False  # shared by every caller through the cache
    return order


def _hold_out(n: int, held_out: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted rows (train, held) of n training images; `seed` chooses the held ones."""
    if not 0 <= held_out < n:
        raise ValueError(
            f"held_out={held_out}: must be at least 0 and less than the {n} training images"
        )
    order = _permutation(_HELD, seed, n)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


class Dataset:
    """Labelled images in the splits "train", "held" (taken from the training images) and "test".

    Subclasses turn numbers of rows and of augmentations into tensors (`_fetch`), and say what
    stands for all images and labels in the fingerprint (`_content`). All random numbers are drawn
    here, by augment.draw(generator, size) too, on the CPU, from generators of their own: the
    global ones are never touched.
    """

    def __init__(
        self,
        name: str,
        n_classes: int,
        shape: tuple[int, ...],
        counts: dict[str, int],
        *,
        held_out: int,
        seed: int,
        augment: Any = None,
    ):
        self.name, self.n_classes, self.shape = name, n_classes, tuple(shape)
        self.device = torch.device("cpu")
        train, held = _hold_out(counts["train"], held_out, seed)
        self._rows = {"train": train, "held": held, "test": np.arange(counts["test"])}
        self._augment = augment
        self._part = (0, 1)  # the first row of each whole batch that is handed out, and the stride

    @property
    def sizes(self) -> dict[str, int]:
        """Number of images in each split."""
        return {split: len(self._rows[split]) for split in SPLITS}

    @property
    def fingerprint(self) -> str:
        """Hash of what batches depend on: images, labels, splits, augmentation, normalization."""
        digest = hashlib.blake2b(self._content().encode(), digest_size=8)
        digest.update(repr((self.shape, self.n_classes, self._augment)).encode())
        for split in SPLITS:
            digest.update(self._rows[split].tobytes())
        return digest.hexdigest()

    def to(self, device: str | torch.device) -> Self:
        """The same dataset with its batches (and its images, if it holds them) on `device`."""
        moved = copy.copy(self)
        moved.device = torch.device(device)
        return moved

    def part(self, i: int, n: int) -> Self:
        """The same dataset handing out rows i, i + n, i + 2n, ... of every batch: one of n shares.

        Sizes of batches still count the whole batch, and n must divide them. Evaluation stays
        whole. Raises ValueError unless 0 <= i < n.
        """
        if not 0 <= i < n:
            raise ValueError(f"part {i} of {n}: must be from 0 to {n - 1}")
        shared = copy.copy(self)
        shared._part = (self._part[0] + self._part[1] * i, self._part[1] * n)
        return shared

    def batch(self, step: int, size: int, seed: int, split: str = "train") -> Batch:
        """Batch number `step`: images (size, C, H, W), float32, and labels (size,), int64.

        An epoch is a permutation of the split without its ragged tail. Raises ValueError for an
        unknown or empty split, a batch larger than its split, a negative step or seed, or a size
        that the number of parts does not divide.
        """
        return self._fetch(*self._plan(step, size, seed, split))

    def stream(
        self, start: int, stop: int, size: int, seed: int, split: str = "train"
    ) -> Iterator[Batch]:
        """The batches of steps start, ..., stop - 1 in order, prefetched where that pays."""
        return self._fetch_all(self._plan(step, size, seed, split) for step in range(start, stop))

    def batches(
        self, steps: int | Iterable[int], size: int, seed: int, split: str = "train"
    ) -> Batch:
        """Batches stacked, (K, size, C, H, W) and (K, size): of the steps given, or the first K."""
        steps = range(steps) if isinstance(steps, int) else list(steps)
        if not len(steps):
            raise ValueError("steps is empty: ask for at least one batch")
        x, y = zip(*(self.batch(step, size, seed, split) for step in steps), strict=True)
        return torch.stack(x), torch.stack(y)

    def evaluation(
        self, split: str = "test", size: int = 500, limit: int | None = None
    ) -> Iterator[Batch]:
        """The split's images as they are, in chunks of `size`, the last one ragged.

        The order is shuffled once and for all, so that any chunk, and the first `limit` images,
        are a fair sample. Raises ValueError for an unknown or empty split.
        """
        total = self._size(split)
        stop = total if limit is None else min(limit, total)
        if size < 1 or stop < 1:
            raise ValueError(f"size={size}, limit={limit}: must be at least 1")
        order = _permutation(_EVALUATION, SPLITS.index(split), total)
        rows = self._rows[split][order[:stop]]
        chunks = (rows[i : i + size] for i in range(0, stop, size))
        return self._fetch_all((SOURCE[split], chunk, None) for chunk in chunks)

    def _plan(self, step: int, size: int, seed: int, split: str) -> Wanted:
        """What this part of one batch is made of."""
        total = self._size(split)
        if not 1 <= size <= total:
            raise ValueError(
                f"batch size {size}: must be from 1 to the {total} images of split {split!r}"
            )
        if step < 0 or seed < 0:
            raise ValueError(f"step={step}, seed={seed}: must not be negative")
        first, parts = self._part
        if size % parts:
            raise ValueError(f"batch size {size}: must be a multiple of its {parts} parts")
        stream = SPLITS.index(split)
        epoch, position = divmod(step, total // size)
        order = _permutation(_ORDER, stream, seed, epoch, total)
        order = order[position * size : (position + 1) * size]
        draws = None
        if self._augment is not None and split in AUGMENTED:
            rng = np.random.default_rng((_AUGMENT, stream, seed, step))
            draws = self._augment.draw(rng, size)[first::parts]
        return SOURCE[split], self._rows[split][order[first::parts]], draws

    def _size(self, split: str) -> int:
        """Number of images of a split, at least 1."""
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
        if not len(self._rows[split]):
            held = "load the data with held_out > 0"
            hint = held if split == "held" else "the data has no such images"
            raise ValueError(f"split {split!r} is empty: {hint}")
        return len(self._rows[split])

    def _fetch_all(self, wanted: Iterable[Wanted]) -> Iterator[Batch]:
        return (self._fetch(*one) for one in wanted)

    def _fetch(self, source: str, rows: np.ndarray, draws: np.ndarray | None) -> Batch:
        raise NotImplementedError

    def _content(self) -> str:
        raise NotImplementedError


class TensorDataset(Dataset):
    """A dataset held whole on its device, as float32 images (used as they are) or uint8 ones.

    `images` and `labels` map "train" and "test" to tensors (N, ...) and (N,). uint8 images are
    normalized per channel by `mean` and `std` (in units of 0..1) when a batch is made, after
    augmentation. `content` stands for the tensors in the fingerprint; without it they are hashed,
    at about 1 GB/s.
    """

    def __init__(
        self,
        name: str,
        images: dict[str, Tensor],
        labels: dict[str, Tensor],
        n_classes: int,
        *,
        held_out: int = 0,
        seed: int = 0,
        mean: tuple[float, ...] = (0.0,),
        std: tuple[float, ...] = (1.0,),
        augment: FlipCrop | None = None,
        content: str | None = None,
    ):
        shape, counts = images["train"].shape[1:], {split: len(x) for split, x in images.items()}
        super().__init__(
            name, n_classes, shape, counts, held_out=held_out, seed=seed, augment=augment
        )
        self._images, self._labels = images, labels
        self._mean, self._std = mean, std
        self._hash = content

    def to(self, device: str | torch.device) -> Self:
        """The same dataset, its images, labels and batches on `device`."""
        moved = super().to(device)
        moved._images = {split: x.to(device) for split, x in self._images.items()}
        moved._labels = {split: y.to(device) for split, y in self._labels.items()}
        return moved

    def _fetch(self, source: str, rows: np.ndarray, draws: np.ndarray | None) -> Batch:
        index = torch.from_numpy(rows).to(self.device, non_blocking=True)
        x = self._images[source].index_select(0, index)
        if draws is not None:
            x = self._augment.apply(x, torch.from_numpy(draws).to(self.device, non_blocking=True))
        if x.dtype == torch.uint8:
            x = normalize(x, self._mean, self._std)
        return x, self._labels[source].index_select(0, index)

    def _content(self) -> str:
        if self._hash is None:
            digest = hashlib.blake2b(digest_size=8)
            for tensor in (*self._images.values(), *self._labels.values()):
                digest.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
                digest.update(tensor.cpu().contiguous().numpy().data)
            self._hash = digest.hexdigest()
        return repr((self._hash, self._mean, self._std))


def normalize(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 images (N, C, H, W) as float32 (x / 255 - mean) / std, by channel."""
    # One subtraction and one division, each correctly rounded: the same bits on every device.
    scale = _scale(mean, std, x.device)
    return x.float().sub_(scale[0]).div_(scale[1])


@lru_cache(maxsize=8)
def _scale(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> Tensor:
    """Mean and deviation (2, C, 1, 1) in units of 0..255; each copy to a GPU would wait for it."""
    scale = torch.tensor([mean, std], dtype=torch.float32).mul(255)
    return scale.view(2, -1, 1, 1).to(device)


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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
) -> TensorDataset:
    """Your own data: images x (N, ...), integer labels y (N,) in 0, 1, ...; tensors or arrays.

    They go to `device`, by default the GPU if there is one; runs train where their data is.
    Floating-point images are used as they are; uint8 ones (N, C, H, W) are normalized by the
    training images' mean and standard deviation per channel. No augmentation.

    Raises ValueError for shapes, types or labels that do not fit together.
    """
    images = {"train": torch.as_tensor(x), "test": torch.as_tensor(x_test)}
    labels = {"train": torch.as_tensor(y), "test": torch.as_tensor(y_test)}
    _check_images(images)
    _check_labels(images, labels)
    if images["train"].dtype == torch.uint8:
        mean, std = _moments(images["train"])
    else:
        mean, std = (0.0,), (1.0,)
        images = {split: images[split].float() for split in images}
    labels = {split: labels[split].long() for split in labels}
    n_classes = int(max(y.max() for y in labels.values())) + 1
    dataset = TensorDataset(
        name, images, labels, n_classes, held_out=held_out, seed=seed, mean=mean, std=std
    )
    return dataset.to(device or default_device())


def _check_images(images: dict[str, Tensor]) -> None:
    for split, x in images.items():
        if x.dtype != torch.uint8 and not x.is_floating_point():
            raise ValueError(f"{split}: images must be floating-point or uint8, not {x.dtype}")
        if x.dtype == torch.uint8 and x.dim() != 4:
            raise ValueError(f"{split}: uint8 images must be (N, C, H, W), not {tuple(x.shape)}")
    train, test = images["train"], images["test"]
    if train.shape[1:] != test.shape[1:]:
        shapes = tuple(train.shape[1:]), tuple(test.shape[1:])
        raise ValueError(
            f"training images have shape {shapes[0]}, test images {shapes[1]}: make them equal"
        )
    if (train.dtype == torch.uint8) != (test.dtype == torch.uint8):
        raise ValueError("training and test images must both be uint8 or both floating-point")


def _check_labels(images: dict[str, Tensor], labels: dict[str, Tensor]) -> None:
    for split, y in labels.items():
        n = len(images[split])
        if n == 0 or y.shape != (n,):
            shape = tuple(y.shape)
            raise ValueError(
                f"{split}: {n} images with labels of shape {shape}: need one label for each"
            )
        if y.is_floating_point() or y.dtype == torch.bool or y.min() < 0:
            found = f"{y.dtype} from {y.min().item()}"
            raise ValueError(f"{split}: labels must be integers from 0 up, not {found}")


def _moments(x: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of uint8 images (N, C, H, W), in units of 0..1."""
    # From a histogram per channel: exact, and never a float copy of all images.
    values = torch.arange(256, dtype=torch.float64) / 255
    counts = [torch.bincount(c.flatten().cpu(), minlength=256) for c in x.unbind(1)]
    p = torch.stack(counts).double()
    p = p / p.sum(1, keepdim=True)
    mean = p @ values
    # A constant channel has no deviation: one grey level stands for it.
    std = (p @ values**2 - mean**2).clamp(min=0).sqrt().clamp(min=1 / 255)
    return tuple(mean.tolist()), tuple(std.tolist())
