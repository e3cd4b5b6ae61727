"""Serve labelled images in three splits, in batches that are pure functions of (seed, step)."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from functools import lru_cache
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from paper_lib.data.augment import FlipCrop
from paper_lib.data.loss import CROSS_ENTROPY, IGNORED, Function, Loss, as_loss
from paper_lib.errors import ConfigError, brief, check_names, require, require_folder_name

SPLITS = ("train", "held", "test")

# First word of every seed sequence, so that streams drawn for different purposes never coincide.
_ORDER, _AUGMENT, _HELD, _EVALUATION = 1, 2, 3, 4

Tensors = dict[str, Tensor]  # of "train" and "test"
Channels = tuple[float, ...]  # a value for each
Batch = tuple[Tensor, Tensor]  # images (N, C, H, W) and labels (N,)
Wanted = tuple[str, np.ndarray, np.ndarray | None]  # source, rows, augmentation numbers if any


class DataError(ConfigError):
    """Data that is missing, unreadable or inconsistent; the message says what to do."""

    def __init__(self, message: str):
        # Names of files may hold line breaks, and bytes that cannot be printed.
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


@lru_cache(maxsize=8)
def _permutation(*key: int) -> np.ndarray:
    """Read-only permutation of range(key[-1]), by a generator seeded with the whole key."""
    order = np.random.default_rng(key).permutation(key[-1])
    order.flags.writeable = False  # shared by every caller through the cache
    return order


class Dataset:
    """Labelled images in the splits "train", "held" (taken from the training images) and "test".

    Subclasses turn numbers of rows and of augmentations into tensors (`_fetch`), and say what
    stands for all images and labels in the fingerprint (`_content`). All random numbers are drawn
    here, by augment.draw(generator, size) too, on the CPU, from generators of their own: the
    global ones are never touched. Raises ConfigError for an unsafe name, or a single class.
    """

    def __init__(
        self,
        name: str,
        n_classes: int,
        shape: Sequence[int],
        targets: Mapping[str, Sized],
        augment: Any,
        loss: Loss = CROSS_ENTROPY,
    ):
        require_folder_name("name of a dataset", name)
        self.name, self.n_classes, self.shape = name, n_classes, tuple(shape)
        self.loss = dataclasses.replace(loss, n_classes=max(1, n_classes))
        self.device = torch.device("cpu")
        self._rows = {split: np.arange(len(targets.get(split, ()))) for split in SPLITS}
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
        return self._with(device=torch.device(device))

    def hold_out(self, n: int, seed: int = 0) -> Self:
        """The same dataset whose split "held" is n of all training images, chosen by `seed`."""
        rows = np.sort(np.concatenate([self._rows["train"], self._rows["held"]]))
        allowed = f"it must be at least 0 and less than the {len(rows)} training images"
        require(isinstance(n, int | np.integer) and 0 <= n < len(rows), "held_out", n, allowed)
        require(isinstance(seed, int | np.integer) and seed >= 0, "seed", seed, "an integer >= 0")
        order = _permutation(_HELD, seed, len(rows))
        chosen = {"train": rows[np.sort(order[n:])], "held": rows[np.sort(order[:n])]}
        return self._with(_rows=self._rows | chosen)

    def part(self, i: int, n: int) -> Self:
        """The same dataset handing out rows i, i + n, i + 2n, ... of every batch: one of n shares.

        Sizes of batches still count the whole batch, and n must divide them. Evaluation stays
        whole. Raises ConfigError unless 0 <= i < n.
        """
        require(0 <= i < n, "part", i, f"it must be from 0 to {n - 1}")
        first, stride = self._part
        return self._with(_part=(first + stride * i, stride * n))

    def _with(self, **attributes: Any) -> Self:
        changed = copy.copy(self)
        vars(changed).update(attributes)
        return changed

    def batch(self, step: int, size: int, seed: int, split: str = "train") -> Batch:
        """Batch number `step`: images (size, C, H, W), float32, and labels (size,), int64.

        An epoch is a permutation of the split without its ragged tail. Raises ConfigError for an
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
        steps = range(steps) if isinstance(steps, int) else steps
        x, y = zip(*(self.batch(step, size, seed, split) for step in steps), strict=True)
        return torch.stack(x), torch.stack(y)

    def evaluation(
        self, split: str = "test", size: int = 500, limit: int | None = None
    ) -> Iterator[Batch]:
        """The split's images as they are, in chunks of `size`, the last one ragged.

        The order is shuffled once and for all, so that any chunk, and the first `limit` images,
        are a fair sample. Raises ConfigError for an unknown or empty split.
        """
        source, rows = self._split(split)
        positive = size > 0 and (limit is None or limit > 0)
        require(positive, "size, limit", (size, limit), "they must be at least 1")
        rows = rows[_permutation(_EVALUATION, SPLITS.index(split), len(rows))[:limit]]
        chunks = (rows[i : i + size] for i in range(0, len(rows), size))
        return self._fetch_all((source, chunk, None) for chunk in chunks)

    def _plan(self, step: int, size: int, seed: int, split: str) -> Wanted:
        """What this part of one batch is made of."""
        source, rows = self._split(split)
        first, parts = self._part
        allowed = f"it must be from 1 to the {len(rows)} images of split {split!r}"
        require(1 <= size <= len(rows), "batch size", size, allowed)
        require(size % parts == 0, "batch size", size, f"it must be a multiple of {parts} parts")
        require(min(step, seed) >= 0, "step, seed", (step, seed), "they must not be negative")
        stream = SPLITS.index(split)
        epoch, position = divmod(step, len(rows) // size)
        order = _permutation(_ORDER, stream, seed, epoch, len(rows))
        order = order[position * size : (position + 1) * size]
        draws = None
        if self._augment is not None and source == "train":
            rng = np.random.default_rng((_AUGMENT, stream, seed, step))
            draws = self._augment.draw(rng, size)[first::parts]
        return source, rows[order[first::parts]], draws

    def _split(self, split: str) -> tuple[str, np.ndarray]:
        """Which images ("train" or "test") a split is made of, and their rows, at least one."""
        check_names([split], SPLITS, "split")
        filled = len(self._rows[split]) > 0
        require(filled, "split", split, "it is empty; 'held' needs data with held_out > 0")
        return "test" if split == "test" else "train", self._rows[split]

    def _fetch_all(self, wanted: Iterable[Wanted]) -> Iterator[Batch]:
        return (self._fetch(*one) for one in wanted)

    def _fetch(self, source: str, rows: np.ndarray, draws: np.ndarray | None) -> Batch:
        raise NotImplementedError

    def _content(self) -> str:
        raise NotImplementedError


class TensorDataset(Dataset):
    """A dataset held whole on its device, as float32 images (used as they are) or uint8 ones.

    `images` and `labels` map "train" and "test" to tensors (N, ...) and (N,), which are kept as
    they are and must not change. uint8 images are
    normalized per channel by `mean` and `std` (in units of 0..1) when a batch is made, after
    augmentation. `content` stands for the tensors in the fingerprint; without it they are hashed,
    at about 1 GB/s.
    """

    def __init__(
        self,
        name: str,
        images: Tensors,
        labels: Tensors,
        n_classes: int,
        *,
        mean: Channels = (0.0,),
        std: Channels = (1.0,),
        augment: FlipCrop | None = None,
        content: str | None = None,
        loss: Loss = CROSS_ENTROPY,
    ):
        super().__init__(name, n_classes, images["train"].shape[1:], labels, augment, loss)
        self._labels = labels
        self._images, self._mean, self._std, self._hash = images, mean, std, content

    def to(self, device: str | torch.device) -> Self:
        """The same dataset, its images, labels and batches on `device`."""
        images = {split: x.to(device) for split, x in self._images.items()}
        labels = {split: y.to(device) for split, y in self._labels.items()}
        return super().to(device)._with(_images=images, _labels=labels)

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


def normalize(x: Tensor, mean: Channels, std: Channels) -> Tensor:
    """uint8 images (N, C, H, W) as float32 (x / 255 - mean) / std, by channel."""
    # One subtraction and one division, each correctly rounded: the same bits on every device.
    scale = _scale(mean, std, x.device)
    return x.float().sub_(scale[0]).div_(scale[1])


@lru_cache(maxsize=8)
def _scale(mean: Channels, std: Channels, device: torch.device) -> Tensor:
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
    loss: str | Loss | Function = "cross_entropy",
    device: str | torch.device | None = None,
) -> TensorDataset:
    """Your own data: inputs x (N, ...) and targets y (N, ...); tensors or arrays.

    `loss` is "cross_entropy", for labels 0, 1, ... (-100: this position counts for nothing), "mse",
    or a function of a network's output and the targets, the mean over a batch; see `Loss`. Inputs
    are used as they are, but for uint8 images (N, C, H, W): these are normalized by the training
    images' mean and standard deviation per channel. No augmentation. All are copied to `device`, by
    default the GPU if there is one; runs train where their data is.

    Raises ConfigError for shapes, types or labels that do not fit together, NaN or infinity.
    """
    judged = as_loss(loss)
    try:
        images = {"train": torch.as_tensor(x).detach(), "test": torch.as_tensor(x_test).detach()}
        targets = {"train": torch.as_tensor(y), "test": torch.as_tensor(y_test)}
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"inputs and targets must be tensors or arrays: {brief(error)}"
        ) from error
    for split in images:
        _check(split, images[split], targets[split], judged)
    kinds = [(tuple(x.shape[1:]), x.dtype == torch.uint8) for x in images.values()]
    allowed = "training and test images must have one shape, and both be uint8 or floating-point"
    require(kinds[0] == kinds[1], "(shape, whether uint8)", kinds, allowed)
    scale: tuple[Channels, Channels] = (0.0,), (1.0,)
    if images["train"].dtype == torch.uint8:
        scale = _moments(images["train"])
    kind = torch.float32 if images["train"].is_floating_point() else images["train"].dtype
    images = {split: x.to(kind, copy=True) for split, x in images.items()}
    kind = torch.int64 if judged.counts else targets["train"].dtype
    targets = {split: y.to(kind, copy=True) for split, y in targets.items()}
    n_classes = int(max(y.max() for y in targets.values())) + 1 if judged.counts else 0
    options = {"mean": scale[0], "std": scale[1], "loss": judged}
    dataset = TensorDataset(name, images, targets, n_classes, **options)
    return dataset.hold_out(held_out, seed).to(device or default_device())


def _check(split: str, x: Tensor, y: Tensor, loss: Loss) -> None:
    """Raise ConfigError for inputs or targets of a split that cannot be used."""
    raw, dense = x.dtype == torch.uint8, x.layout == torch.strided and not x.is_complex()
    kind = f"dense and real, not {x.layout} of {x.dtype}"
    require(dense and x.dtype != torch.bool, "inputs", split, f"they must be {kind}")
    form = f"they must be (N, ...), uint8 images (N, C, H, W), without a 0, not {tuple(x.shape)}"
    whole = x.dim() == 4 if raw else x.dim() > 1
    require(whole and x.numel() > 0, "inputs", split, form)
    need = f"each of its {len(x)} inputs needs one, but their shape is {tuple(y.shape)}"
    require(y.dim() > 0 and len(y) == len(x), "targets", split, need)
    if loss.counts:
        _check_labels(split, y)
    bad = x.float().isfinite().logical_not().flatten(1).any(1).nonzero().flatten().tolist()
    finite = f"NaN or infinity in {len(bad)} of them, the first of these: number {bad[:1]}"
    require(not bad, "inputs", split, f"{finite}; repair them or leave them out")


def _check_labels(split: str, y: Tensor) -> None:
    """Raise ConfigError for targets that are no labels, or all the same."""
    integer = not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool)
    labels = y[y != IGNORED].long()
    low, high = (int(labels.min()), int(labels.max())) if labels.numel() else (-1, -1)
    found = f"labels must be integers 0, 1, ... below a million, not {y.dtype} from {low} to {high}"
    require(integer and 0 <= low and high < 10**6, "targets", split, found)
    several = split == "test" or low < high
    require(several, "labels", labels[:1].tolist(), "train on two classes or more")


def _moments(x: Tensor) -> tuple[Channels, Channels]:
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
