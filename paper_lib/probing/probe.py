"""Losses of chosen batches at chosen weights, without a trace on the network or the random state.

Batches are stacked: x (K, B, ...) and y (K, B) are K batches of B samples. Weights are one vector,
(P,); `losses` also takes rows of a matrix, (n, P). Everything comes back as NumPy arrays. All
losses are mean cross-entropies in nats, in float32, without label smoothing or weight decay.
What does not fit raises ConfigError.

Statistics are chosen by `buffers`. Without them BatchNorm normalizes each batch by its own
statistics, as in training. With buffers, (Q,), e.g. those of a snapshot or of `statistics`, it uses
these. Everything else is in evaluation mode either way (no dropout), so that a loss is a function
of weights and batch alone.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from paper_lib.averaging.batchnorm import layers, recompute_statistics
from paper_lib.data import Dataset
from paper_lib.errors import require
from paper_lib.files import say
from paper_lib.probing.batchnorm import batchwise_statistics, separable
from paper_lib.runs import Run
from paper_lib.training.flat import FlatModel, forked_rng, threads

# Samples in a forward pass: what fits a core's cache; what fills a GPU.
SAMPLES_AT_ONCE = {"cpu": 256, "cuda": 4096}
# Pixels per pass on a GPU, for about 16 GB: up to 1 kB each for losses alone; where activations are
# kept to be differentiated twice, up to 14 kB (a ResNet-18 without stem; a ResNet-50 takes 5).
PIXELS_AT_ONCE, PIXELS_KEPT = 2**22, 2**20
TOLD_FROM_S = 60  # a probe that takes longer says so beforehand
PROBE_STREAM = 1_000_000  # seeds of probing streams start here; runs use small seeds

Array = np.ndarray
Buffers = Array | None


def losses(
    net: FlatModel,
    weights: Array,
    x: Tensor,
    y: Tensor,
    buffers: Buffers = None,
    progress: str = "",
) -> Array:
    """Loss of each batch at each of the weights: (n, K), or (K,) for one vector.

    `buffers` are (Q,), or (n, Q).
    """
    rows = np.atleast_2d(weights)
    check_batches(x, y)
    at_once = batches_at_once(net, x, buffers, kept=False)
    found = np.empty((len(rows), len(x)), np.float32)
    per_row = buffers if buffers is not None and buffers.ndim == 2 else [buffers] * len(rows)
    bar = tqdm(total=len(rows), desc=progress, disable=not progress)

    def work(own: FlatModel, turns: Iterator[int]) -> None:
        with probing(own, buffers), torch.no_grad():
            for i in turns:
                load(own, rows[i], per_row[i])
                found[i] = torch.cat(list(passes(own, x, y, at_once))).cpu().numpy()
                bar.update()

    with bar:
        _in_threads(net, work, range(len(rows)))
    return found if np.ndim(weights) == 2 else found[0]


def _in_threads(
    net: FlatModel, work: Callable[[FlatModel, Iterator[int]], None], tasks: range
) -> None:
    """Let copies of the network share the tasks, one in each thread that torch may use.

    Whole forward passes share a CPU's cores much better than parts of a small convolution do.
    """
    n_threads = min(torch.get_num_threads(), len(tasks)) if net.device.type == "cpu" else 1
    turns = iter(tasks)  # taking from one iterator is atomic, so threads share it
    if n_threads == 1:
        return work(net, turns)
    try:
        copies = [FlatModel(copy.deepcopy(net.module), loss=net.loss) for _ in range(n_threads)]
    except (RuntimeError, TypeError):  # a tensor with a past, an open file: it cannot be copied
        return work(net, turns)
    pool = ThreadPoolExecutor(n_threads, initializer=torch.set_num_threads, initargs=(1,))
    with threads(1), pool:
        try:
            for future in as_completed([pool.submit(work, one, turns) for one in copies]):
                future.result()
        except BaseException:  # the pool waits for threads: leave the others nothing to do
            collections.deque(turns, maxlen=0)
            raise


def passes(net: FlatModel, x: Any, y: Tensor, at_once: int) -> Iterator[Tensor]:
    """Yield the losses (k,) of the k <= at_once batches of each pass, see `batches_at_once`."""
    for xs, ys in zip(x.split(at_once), y.split(at_once), strict=True):
        with batchwise_statistics(net.module, len(xs)), forked_rng(net.device):
            output = net.loss.chosen(net.forward(xs.flatten(0, 1)))
        outputs = [output] if at_once == 1 else output.unflatten(0, xs.shape[:2])
        yield torch.stack([net.loss.of(*pair) for pair in zip(outputs, ys, strict=True)])


def batches_at_once(net: FlatModel, x: Any, buffers: Buffers, kept: bool) -> int:
    """How many batches of x share a pass; one where they would not come out as they do alone.

    `kept`: activations are, to be differentiated. A loss of the user's own takes whole batches.
    """
    n = min(len(x), _batches_at_once(net.device.type, x.shape, kept))
    if net.loss.function is not None or not isinstance(x, Tensor):
        return 1
    with probing(net, buffers):
        return n if all(separable(net, x[:k], kept) for k in {n, len(x) % n} - {0, 1}) else 1


def _batches_at_once(device: str, shape: torch.Size, kept: bool) -> int:
    """How many batches of x, `shape` = (K, B, ...), share a pass; at least one, never a part."""
    samples = SAMPLES_AT_ONCE[device]
    if device == "cuda":
        samples = min(samples, (PIXELS_KEPT if kept else PIXELS_AT_ONCE) // shape[3:].numel())
    return max(1, samples // shape[1])


@contextlib.contextmanager
def probing(net: FlatModel, buffers: Buffers) -> Iterator[None]:
    """Evaluation mode, but for BatchNorm where there are no buffers; leaves no trace."""
    with net.preserved(train=True):
        batchwise = [layer for layer in layers(net.module) if layer.training]  # none kept frozen
        net.module.eval()
        for layer in batchwise:
            layer.training = buffers is None
        try:
            yield
        except torch.OutOfMemoryError as error:
            advice = "lower `batch_size` (a batch, with its statistics, is never split) or `width`"
            raise MemoryError(f"{net.device} ran out of memory probing: {advice}") from error


@contextlib.contextmanager
def probing_at(net: FlatModel, weights: Array, buffers: Buffers = None) -> Iterator[None]:
    """`probing` one weight vector."""
    with probing(net, buffers):
        load(net, weights, buffers)
        yield


def load(net: FlatModel, weights: Array, buffers: Buffers) -> None:
    """Set a network's weights (P,) and, where there are any, buffers (Q,)."""
    for name, values in ("weights", weights), ("buffers", buffers):
        if values is not None:
            vector: Tensor = getattr(net, name)
            fits = np.shape(values) == vector.shape
            needed = f"this network needs {tuple(vector.shape)}"
            require(fits, f"shape of {name}", np.shape(values), needed)
            vector.copy_(tensor(values))


def line(
    net: FlatModel,
    weights: Array,
    direction: Array,
    positions: Array,
    x: Tensor,
    y: Tensor,
    buffers: Buffers = None,
) -> Array:
    """Losses at weights + t * direction for every t in `positions`, (n_positions, K)."""
    points = weights[None] + np.asarray(positions, np.float32)[:, None] * direction[None]
    return losses(net, points, x, y, buffers)


def statistics(net: FlatModel, weights: Array, x: Tensor) -> Array:
    """Buffers (Q,) with BatchNorm's means and variances at the given weights, over batches x.

    An averaged network needs this, and so does every network that it is compared with.
    """
    with probing_at(net, weights), torch.no_grad():
        recompute_statistics(net.module, x, net.forward)
        return net.buffers.cpu().numpy().copy()


def evaluate(
    net: FlatModel, weights: Array, buffers: Array, chunks: Iterable[tuple[Tensor, Tensor]]
) -> tuple[float, float]:
    """Mean loss and accuracy over chunks (x, y) of samples, in evaluation mode with `buffers`.

    The accuracy is NaN where the loss does not tell right answers from wrong ones.
    """
    loss, correct, n = 0.0, 0, 0
    with probing_at(net, weights, buffers), torch.no_grad():
        for x, y in chunks:
            output = net.forward(x)
            n_here = net.loss.counted(y)
            loss += net.loss(output, y).item() * n_here
            correct += net.loss.right(output, y) if net.loss.counts else 0
            n += n_here
    require(n > 0, "chunks", "none", "an evaluation needs at least one sample")
    return loss / n, correct / n if net.loss.counts else math.nan


def per_run(
    runs: Sequence[Run],
    at: Sequence[int],
    measure: Callable[[Run, FlatModel, int], pd.DataFrame | dict],
    progress: str,
) -> pd.DataFrame:
    """Rows, or row, measure(run, network, step) of each run and step, with `seed` and `step`.

    The first is timed: where all would take longer than $PAPER_MINUTES, if that is set, fewer steps
    are measured, spread as the others, and a line says so.
    """

    def one(run: Run, net: FlatModel, step: int) -> pd.DataFrame:
        found = measure(run, net, step)
        table = pd.DataFrame([found]) if isinstance(found, dict) else found
        return table.assign(seed=run.config.seed, step=step)

    steps, began = [int(step) for step in at], time.monotonic()
    tables = [one(runs[0], runs[0].network(), steps[0])]
    steps = _affordable(steps, len(runs), time.monotonic() - began, progress)
    with tqdm(total=len(runs) * len(steps), initial=1, desc=progress) as bar:
        for run in runs:
            net = run.network()
            for step in steps[1:] if run is runs[0] else steps:
                tables.append(one(run, net, step))
                bar.update()
    return pd.concat(tables, ignore_index=True)


def _affordable(steps: list[int], n_runs: int, seconds: float, progress: str) -> list[int]:
    """Those steps for which $PAPER_MINUTES last, at `seconds` for each; the first and last stay."""
    needed = n_runs * len(steps) * seconds
    minutes = os.environ.get("PAPER_MINUTES") or "inf"
    is_number = re.fullmatch(r"inf|\d+\.?\d*", minutes) is not None
    require(is_number, "PAPER_MINUTES", minutes, "write a number, such as 5")
    allowed = 60 * float(minutes)
    if needed > min(allowed, TOLD_FROM_S):
        say(f"{progress}: {n_runs} x {len(steps)} at {seconds:.1f} s, {needed / 60:.0f} min")
    if needed <= allowed:
        return steps
    n = max(2, int(allowed / (n_runs * seconds)))
    say(f"{progress}: {n} of {len(steps)} steps within PAPER_MINUTES={minutes}")
    return [steps[i] for i in np.unique(np.linspace(0, len(steps) - 1, n).round().astype(int))]


def fixed_batches(
    dataset: Dataset, n: int, size: int, seed: int, split: str = "train"
) -> tuple[Tensor, Tensor]:
    """n batches for probing, (n, size, ...) and (n, size), from a stream that no run trains on."""
    return dataset.batches(n, size, PROBE_STREAM + seed, split)


def tensor(row: Array) -> Tensor:
    """A vector in float32, copied: rows of a mapped trajectory are read-only."""
    return torch.from_numpy(np.array(row, np.float32))


def check_batches(x: Tensor, y: Tensor) -> None:
    """ConfigError unless x and y are stacked batches."""
    stacked, batches = x.ndim >= 2 and x.shape[0] * x.shape[1] > 0, tuple(x.shape[:2])
    require(stacked, "x", tuple(x.shape), "batches are stacked as (K, B, ...), K and B at least 1")
    fits = y.shape[:2] == batches
    require(fits, "y", tuple(y.shape), f"targets must be (K, B, ...) with (K, B) = {batches}")
