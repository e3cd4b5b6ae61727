"""What a dataset is: labelled images in three splits, whose batches are pure functions of (seed, step)."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Iterator
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor

from paper_lib.data.augment import FlipCrop

SPLITS = ("train", "held", "test")
AUGMENTED = ("train", "held")

# First word of every seed sequence, so that streams drawn for different purposes never coincide.
_ORDER, _AUGMENT, _HELD, _EVALUATION = 1, 2, 3, 4


class DataError(ValueError):
    """Data that is missing, unreadable or inconsistent; the message says what to do."""


@lru_cache(maxsize=8)
def _permutation(*key: int) -> np.ndarray:
    """Read-only permutation of range(key[-1]), drawn from a generator seeded with the whole key."""
    order = np.random.default_rng(key).permutation(key[-1])
    order.flags.writeable = False  # shared by every caller through the cache
    return order


def hold_out(n: int, held_out: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted rows (train, held) of n training images; `seed` chooses the held ones."""
    if not 0 <= held_out < n:
        raise ValueError(f"held_out={held_out}: must be at least 0 and less than the {n} training images")
    order = _permutation(_HELD, seed, n)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


class Dataset:
    """Labelled images with the splits "train", "held" (training images never trained on) and "test".

    Subclasses provide `_fetch`, which turns row numbers and augmentation numbers into tensors. All random
    numbers are drawn here, on the CPU, from generators of their own: the global ones are never touched.
    """

    def __init__(
        self,
        name: str,
        n_classes: int,
        shape: tuple[int, ...],
        rows: dict[str, np.ndarray],
        augment=None,
    ):
        self.name, self.n_classes, self.shape = name, n_classes, tuple(shape)
        self.device = torch.device("cpu")
        self._rows, self._augment = rows, augment

    @property
    def sizes(self) -> dict[str, int]:
        """Number of images in each split."""
        return {split: len(self._rows[split]) for split in SPLITS}

    @property
    def fingerprint(self) -> str:
        """Hash of everything that batches depend on: images, labels, splits, augmentation, normalization."""
        digest = hashlib.blake2b(self._content().encode(), digest_size=8)
        digest.update(repr((self.shape, self.n_classes, self._augment)).encode())
        for split in SPLITS:
            digest.update(self._rows[split].tobytes())
        return digest.hexdigest()

    def to(self, device: str | torch.device) -> Dataset:
        """The same dataset with its batches (and its images, if it holds them) on `device`."""
        moved = copy.copy(self)
        moved.device = torch.device(device)
        return moved

    def batch(
        self, step: int, size: int, seed: int, split: str = "train", *, rank: int = 0, world: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Batch number `step`: images (size / world, C, H, W) float32, normalized, and labels int64.

        An epoch is a permutation of the split without its ragged tail. Process `rank` of `world` gets rows
        rank, rank + world, ... of the global batch, exactly as a single process would see them.

        Raises ValueError for an unknown split, a batch larger than its split, a negative step or a size
        that `world` does not divide.
        """
        return self._fetch(*self._plan(step, size, seed, split, rank, world))

    def stream(
        self,
        start: int,
        stop: int,
        size: int,
        seed: int,
        split: str = "train",
        *,
        rank: int = 0,
        world: int = 1,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of steps start, ..., stop - 1 in order, prefetched where that pays."""
        plan = partial(self._plan, size=size, seed=seed, split=split, rank=rank, world=world)
        return self._fetch_all(plan, range(start, stop))

    def batches(self, steps: int | Iterable[int], size: int, seed: int, split: str = "train") -> tuple[Tensor, Tensor]:
        """Several batches stacked, (K, size, C, H, W) and (K, size): the given steps, or the first K."""
        steps = range(steps) if isinstance(steps, int) else list(steps)
        if not len(steps):
            raise ValueError("steps is empty: ask for at least one batch")
        pairs = [self.batch(step, size, seed, split) for step in steps]
        return torch.stack([x for x, _ in pairs]), torch.stack([y for _, y in pairs])

    def evaluation(
        self, split: str = "test", size: int = 500, limit: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The split's images as they are, in chunks of `size`, the last one ragged.

        The order is shuffled once and for all, so that any chunk, and the first `limit` images, are a fair
        sample. Raises ValueError for an unknown or empty split.
        """
        total = self._size(split)
        stop = total if limit is None else min(limit, total)
        if size < 1 or stop < 1:
            raise ValueError(f"size={size}, limit={limit}: must be at least 1")
        plan = partial(self._chunk, split=split, size=size, stop=stop)
        return self._fetch_all(plan, range(-(-stop // size)))

    def _plan(
        self, step: int, size: int, seed: int, split: str, rank: int, world: int
    ) -> tuple[str, np.ndarray, np.ndarray | None]:
        """What one process needs of one batch: (split, rows, augmentation numbers)."""
        total = self._size(split)
        if not 1 <= size <= total:
            raise ValueError(f"batch size {size}: must be from 1 to the {total} images of split {split!r}")
        if step < 0 or seed < 0:
            raise ValueError(f"step={step}, seed={seed}: must not be negative")
        if not 0 <= rank < world or size % world:
            raise ValueError(
                f"batch size {size} for rank {rank} of {world}: world must divide it, and rank be in range"
            )
        stream = SPLITS.index(split)
        epoch, position = divmod(step, total // size)
        order = _permutation(_ORDER, stream, seed, epoch, total)[position * size : (position + 1) * size]
        draws = None
        if self._augment is not None and split in AUGMENTED:
            draws = self._augment.draw(np.random.default_rng((_AUGMENT, stream, seed, step)), size)[rank::world]
        return split, self._rows[split][order[rank::world]], draws

    def _chunk(self, i: int, split: str, size: int, stop: int) -> tuple[str, np.ndarray, None]:
        order = _permutation(_EVALUATION, SPLITS.index(split), self._size(split))
        return split, self._rows[split][order[i * size : min((i + 1) * size, stop)]], None

    def _size(self, split: str) -> int:
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
        if not len(self._rows[split]):
            hint = "load the data with held_out > 0" if split == "held" else "the data has no such images"
            raise ValueError(f"split {split!r} is empty: {hint}")
        return len(self._rows[split])

    def _fetch_all(self, plan, items: Iterable[int]) -> Iterator[tuple[Tensor, Tensor]]:
        for item in items:
            yield self._fetch(*plan(item))

    def _fetch(self, split: str, rows: np.ndarray, draws: np.ndarray | None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _content(self) -> str:
        raise NotImplementedError


class TensorDataset(Dataset):
    """A dataset held whole on its device, as float32 images (used as they are) or uint8 ones.

    `images` and `labels` map "train" and "test" to tensors (N, ...) and (N,). uint8 images are normalized
    per channel by `mean` and `std` (in units of 0..1) when a batch is made, after augmentation.
    `content` stands for the tensors in the fingerprint; without it they are hashed, at about 1 GB/s.
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
        train, held = hold_out(len(images["train"]), held_out, seed)
        rows = {"train": train, "held": held, "test": np.arange(len(images["test"]))}
        super().__init__(name, n_classes, images["train"].shape[1:], rows, augment)
        self._images, self._labels = images, labels
        self._mean, self._std = mean, std
        self._hash = content

    def to(self, device: str | torch.device) -> TensorDataset:
        moved = super().to(device)
        moved._images = {split: x.to(device) for split, x in self._images.items()}
        moved._labels = {split: y.to(device) for split, y in self._labels.items()}
        return moved

    def _fetch(self, split: str, rows: np.ndarray, draws: np.ndarray | None) -> tuple[Tensor, Tensor]:
        store = "test" if split == "test" else "train"
        index = torch.from_numpy(rows).to(self.device, non_blocking=True)
        x = self._images[store].index_select(0, index)
        if draws is not None:
            x = self._augment.apply(x, torch.from_numpy(draws).to(self.device, non_blocking=True))
        if x.dtype == torch.uint8:
            x = normalize(x, self._mean, self._std)
        return x, self._labels[store].index_select(0, index)

    def _content(self) -> str:
        if self._hash is None:
            digest = hashlib.blake2b(digest_size=8)
            for tensor in (*self._images.values(), *self._labels.values()):
                digest.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
                digest.update(tensor.cpu().contiguous().numpy())
            self._hash = digest.hexdigest()
        return repr((self._hash, self._mean, self._std))


def normalize(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 images (N, C, H, W) as float32 (x / 255 - mean) / std, the same bits on every device."""
    # One subtraction and one division, each correctly rounded: no fused multiply-add to differ in.
    scale = _scale(mean, std, x.device)
    return x.float().sub_(scale[0]).div_(scale[1])


@lru_cache(maxsize=8)
def _scale(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> Tensor:
    """Mean and standard deviation in units of 0..255, on the device: copied once, as each copy waits for a GPU."""
    return torch.tensor([mean, std], dtype=torch.float32).mul(255).view(2, -1, 1, 1).to(device)
