"""Data of torch's own kind, a map-style Dataset in a DataLoader, in batches by (seed, step)."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler
from tqdm import tqdm

from paper_lib.data.dataset import Batch, Dataset
from paper_lib.data.loss import Function, Loss, as_loss
from paper_lib.errors import require


class LoadedDataset(Dataset):
    """What two DataLoaders serve, drawn by (seed, step) instead of their own order.

    Items are collated as the loaders do. Random augmentation by the global generator of torch (that
    is torchvision's) or of Python is a function of (seed, step) too. Several inputs, a tuple or a
    dictionary, become a TensorDict.
    """

    def __init__(self, loaders: dict[str, DataLoader], name: str, loss: Loss):
        sets = {split: loader.dataset for split, loader in loaders.items()}
        super().__init__(name, 0, (), sets, _Draws(), loss)
        self._sets, self._collate = sets, {s: one.collate_fn for s, one in loaders.items()}
        self._hash: str | None = None
        x, _ = self._fetch("train", np.arange(1), None)
        self.shape = tuple(x.shape[1:])

    def _fetch(self, source: str, rows: np.ndarray, draws: np.ndarray | None) -> Batch:
        items = []
        for row, draw in zip(rows, rows if draws is None else draws, strict=True):
            with _seeded(int(draw)):
                items.append(self._sets[source][int(row)])
        found = self._collate[source](items)
        pair = isinstance(found, tuple | list) and len(found) == 2
        allowed = "a batch must be a pair of inputs and targets: make it one by collate_fn"
        require(pair, "batch", type(found).__name__, allowed)
        x, y = found
        return stacked(x).to(self.device), y.to(self.device)

    def _content(self) -> str:
        """A hash of every item as it is served without augmentation's luck."""
        if self._hash is None:
            digest = hashlib.blake2b(digest_size=8)
            for split, items in self._sets.items():
                for row in tqdm(range(len(items)), desc=f"reading {split} data", leave=False):
                    x, y = self._fetch(split, np.array([row]), None)
                    for tensor in (*_tensors(x), y):
                        digest.update(tensor.cpu().contiguous().numpy().tobytes())
            self._hash = digest.hexdigest()
        return self._hash


def from_loaders(
    train: DataLoader,
    test: DataLoader,
    *,
    held_out: int = 0,
    seed: int = 0,
    name: str = "loaded",
    loss: str | Loss | Function = "cross_entropy",
) -> LoadedDataset:
    """Your own data, as your training loop has it: two DataLoaders, of pairs (inputs, targets).

    Inputs may be a tensor, a tuple or a dictionary of tensors, targets what the loss takes. What
    is taken from the loaders is their datasets and collate_fn; batches are drawn anew, each sample
    once an epoch. Raises ConfigError for a stream without a length, or weighted sampling.
    """
    loaders = {"train": train, "test": test}
    for split, loader in loaders.items():
        sized = hasattr(loader.dataset, "__getitem__") and hasattr(loader.dataset, "__len__")
        allowed = "it needs a dataset with a length, of which any item can be asked for"
        require(sized, f"{split} loader", type(loader.dataset).__name__, allowed)
        plain = isinstance(loader.sampler, RandomSampler | SequentialSampler)
        allowed = "every sample is drawn once an epoch: leave sampler= out"
        require(plain, f"{split} loader", type(loader.sampler).__name__, allowed)
    return LoadedDataset(loaders, name, as_loss(loss)).hold_out(held_out, seed)


class _Draws:
    """Numbers that seed the augmentation of each sample of a batch."""

    def draw(self, rng: np.random.Generator, size: int) -> np.ndarray:
        return rng.integers(2**32, size=size)

    def __repr__(self) -> str:
        return "seeds"


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """With the global generators of torch and Python seeded, and given back as they were."""
    state = random.getstate()
    try:
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            yield
    finally:
        random.setstate(state)


def stacked(x: Any) -> Any:
    """Inputs of a batch: a tensor as it is, a tuple or dictionary of them as a TensorDict."""
    if isinstance(x, Tensor):
        return x
    from tensordict import TensorDict  # it takes seconds to import, and few need it

    named = x if isinstance(x, Mapping) else {str(i): part for i, part in enumerate(x)}
    return TensorDict(dict(named), batch_size=[len(next(iter(named.values())))])


def _tensors(x: Any) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else list(x.values())
