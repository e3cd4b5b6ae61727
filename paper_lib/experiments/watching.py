"""Learning rates and averages that gradients choose, and what gradients say of averages (C10)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from paper_lib.averaging.monitor import MEMORIES, Averages, Monitor
from paper_lib.config import RunConfig, Study
from paper_lib.data import Dataset
from paper_lib.errors import require
from paper_lib.experiments.tables import tabulated
from paper_lib.probing import probe
from paper_lib.runs import Run, load_dataset
from paper_lib.training import loop
from paper_lib.training.flat import FlatModel, exact_float32, forked_rng, threads


@dataclass(frozen=True, eq=False)
class Watched:
    """A run that was watched."""

    weights: np.ndarray  # at its end, (P,)
    loss: np.ndarray  # of every step, (n_steps,)
    lr: np.ndarray  # of every step, (n_steps,)
    alarms: list[int]  # steps at which it was found stationary


def watch(
    config: RunConfig, dataset: Dataset, net: FlatModel, watcher: Monitor, factor: float
) -> Watched:
    """Train on the batches of `config`, multiplying the learning rate by `factor` at every alarm.

    With `factor` = 1 this is the run of `config` at its constant learning rate, to the same bits.
    ConfigError for a branch, a schedule, a perturbed start, threads or compilation, and where the
    run diverges.
    """
    velocity, lr = torch.zeros_like(net.weights), config.lr
    losses, rates, alarms = [], [], []
    for step, loss in enumerate(_losses(config, dataset, net)):
        # With weight decay: the model is about all that the step descends.
        if watcher.observe(net.grad + config.weight_decay * net.weights):
            lr *= factor
            alarms.append(step)
        losses.append(loss)
        rates.append(lr)
        loop.sgd_step(net, velocity, lr, config)
    return Watched(net.weights.cpu().numpy().copy(), np.array(losses), np.array(rates), alarms)


def watch_all(study: Study, memory: float, factor: float) -> list[Watched]:
    """`watch` the warm-up of a study for each of its seeds, by a `Monitor` of this memory."""
    found = []
    for seed in tqdm(study.seeds, desc="watched runs"):
        config = study.run.replace(seed=seed)
        dataset = study.dataset or load_dataset(config)
        net = loop.initial_model(config, dataset, study.net)
        with threads(1), forked_rng(dataset.device), exact_float32(dataset.device):
            found.append(watch(config, dataset, net, Monitor(memory), factor))
    return found


def _losses(config: RunConfig, dataset: Dataset, net: FlatModel) -> Iterator[float]:
    """Leave the gradient of each batch of a new run in net.grad, and yield the batch's loss."""
    require(config.start == 0, "start", config.start, "watching begins at the initialization")
    allowed = {"schedule": "constant", "perturbation": 0, "threads": 1, "compile": False}
    for name, value in allowed.items():
        found = getattr(config, name)
        require(found == value, name, found, f"a watched run has {value!r}")
    net.module.train()
    for step, x, y in loop.batches(config, dataset):
        yield float(loop.backward(net, step, x, y, config))


def observed(run: Run, memories: Sequence[float] = MEMORIES) -> Averages:
    """`Averages` of a run that recorded every iterate, as they stand at its end."""
    begin, end = run.config.start + (1 if run.config.momentum else 0), run.config.steps
    x, (g, _) = run.window(begin, end), run.gradients(begin, end - 1)
    averages = Averages(memories)
    for weights, gradient in zip(x, g, strict=False):  # the last iterate has no gradient
        averages.observe(np.asarray(weights), gradient)
    return averages


@tabulated
def measure_gains(
    runs: Sequence[Run],
    first: int,
    memories: Sequence[float],
    n_points: int = 8,
    n_batches: int = 8,
    shift: int = 50,
) -> Iterator[dict]:
    """What averages save: predicted from the gradients used, measured on held-out batches.

    Averages begin at step `first` of a run; its second half from there counts. One row per seed and
    memory: seed; memory; `predicted`, the mean of g_t . (x_t - a_t) / (1 + b) (see `Averages`);
    `shifted`, the same with the gradient used `shift` steps later, which knows nothing of x_t in
    steep directions; `measured`, the mean of the loss at x_t minus that at a_t over n_points steps,
    with batch statistics and weight decay, as the gradients have it.
    """
    for run in runs:
        c = run.config
        predicted, shifted, points = _averages(run, first, memories, n_points, shift)
        held = run.dataset.batches(n_batches, c.batch_size, c.stream, "held")
        losses = probe.losses(run.network(), points, *held).mean(1)
        losses = losses + c.weight_decay / 2 * np.square(points).sum(1)
        losses = losses.reshape(n_points, 1 + len(memories))
        found = {"seed": c.seed, "memory": memories, "predicted": predicted, "shifted": shifted}
        yield found | {"measured": (losses[:, :1] - losses[:, 1:]).mean(0)}


def _averages(
    run: Run, first: int, memories: Sequence[float], n_points: int, shift: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean predicted and shifted gain of each memory over the second half from `first`, (K,), and
    x_t and averages at n_points steps of it, (n_points * (1 + K), P).
    """
    begin, end = first + (1 if run.config.momentum else 0), run.config.steps
    x, (g, _) = run.window(begin, end), run.gradients(begin, end - 1)
    averages, products, points = Averages(memories, smoothing=0), [], []
    at = np.linspace(len(g) // 2, len(g) - 1, n_points).astype(int)
    for i, gradient in enumerate(g):
        averages.observe(np.asarray(x[i]), gradient)
        apart = x[i] - np.array(averages.vectors)
        later = apart @ g[min(i + shift, len(g) - 1)] / (1 + np.array(memories))
        products.append([averages.gains.copy(), later])
        points += [np.stack([x[i], *averages.vectors])] * int(np.sum(at == i))
    counted = np.array(products[len(g) // 2 :])
    whole = max(1, len(counted) - shift)  # steps that have a gradient so much later
    return counted[:, 0].mean(0), counted[:whole, 1].mean(0), np.concatenate(points)
