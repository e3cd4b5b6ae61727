"""Watch runs by their gradients; read off them what averages save (claim C10)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from paper_lib.averaging import monitor
from paper_lib.averaging.monitor import Averages, Monitor, Window
from paper_lib.config import RunConfig, Study
from paper_lib.data import Dataset
from paper_lib.errors import require
from paper_lib.probing import evaluation, probe
from paper_lib.runs import Run
from paper_lib.runs.identity import of_source
from paper_lib.runs.methods import Arrays
from paper_lib.training import loop
from paper_lib.training.flat import FlatModel

SOURCE = of_source(Path(__file__), Path(monitor.__file__))  # of the methods below, for their keys


# --- methods ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Watched:
    """A run that was watched: its end, and what happened on the way.

    weights (P,) at its end; average (P,), the one of `Averages` that was then predicted to save
    most; at every step, (n_steps,), loss and lr, and the memory of the average that was best and
    its gain (nats); windows by the step at which they had ended.
    """

    seed: int
    weights: np.ndarray
    average: np.ndarray
    loss: np.ndarray
    lr: np.ndarray
    memory: np.ndarray
    gain: np.ndarray
    windows: dict[int, Window]

    @property
    def alarms(self) -> list[int]:
        """Steps at which the run was found stationary."""
        return [step for step, window in self.windows.items() if window.stationary]

    def loss_at_alarm(self) -> float:
        """Mean loss in the window of the first alarm, over that of as many last steps; or NaN."""
        if not self.alarms:
            return float("nan")
        at = self.alarms[0]
        n = self.windows[at].steps
        return float(self.loss[at - n : at].mean() / self.loss[-n:].mean())

    def to_arrays(self) -> Arrays:
        """What is kept of it: the arrays, and the windows as rows."""
        windows = [(step, *dataclasses.astuple(window)) for step, window in self.windows.items()]
        names = ("weights", "average", "loss", "lr", "memory", "gain")
        vectors = {name: getattr(self, name) for name in names}
        return {**vectors, "windows": np.array(windows, np.float64)}

    @classmethod
    def from_arrays(cls, seed: int, arrays: Arrays) -> Watched:
        """Inverse of `to_arrays`."""
        windows = {
            int(step): Window(int(end), int(steps), mean, t, bool(stationary))
            for step, end, steps, mean, t, stationary in arrays["windows"].tolist()
        }
        return cls(seed, **{**arrays, "windows": windows})


@dataclass(frozen=True)
class Watching:
    """`watch` with a `Monitor` of this memory and rate of false alarms; ends with a `Watched`."""

    memory: float
    alpha: float
    factor: float
    source: str = field(default=SOURCE, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("memory", "alpha", "factor"):  # 1 and 1.0 are one setting, and one key
            object.__setattr__(self, name, float(getattr(self, name)))

    def train(self, config: RunConfig, dataset: Dataset, net: FlatModel) -> Arrays:
        """Train from the network's weights, watching; see `runs.methods.Method`."""
        watcher = Monitor(self.memory, self.alpha)
        return watch(config, dataset, net, watcher, self.factor, Averages()).to_arrays()

    def result(self, seed: int, kept: Arrays) -> Watched:
        """The watched run."""
        return Watched.from_arrays(seed, kept)


def watch(
    config: RunConfig,
    dataset: Dataset,
    net: FlatModel,
    watcher: Monitor,
    factor: float,
    averages: Averages,
) -> Watched:
    """Train on the batches of `config`, multiplying the learning rate by `factor` at every alarm.

    With `factor` = 1 this is the run of `config` at its constant learning rate, to the same bits.
    Raises ConfigError unless `config` starts from an unperturbed initialization and has a constant
    learning rate, and where the run diverges.
    """
    velocity, lr = torch.zeros_like(net.weights), config.lr
    log: list[tuple[float, ...]] = []
    windows: dict[int, Window] = {}
    for step, loss in enumerate(_losses(config, dataset, net)):
        # With weight decay: the model is about all that the step descends.
        gradient = net.grad + config.weight_decay * net.weights
        if watcher.observe(gradient):
            lr *= factor
        if len(watcher.windows) > len(windows):
            windows[step] = watcher.windows[-1]
        averages.observe(net.weights, gradient)
        log.append((loss, lr, averages.best()[0], max(map(float, averages.gains))))
        loop.sgd_step(net, velocity, lr, config)
    average = averages.best()[1]
    ends = [torch.as_tensor(v).cpu().numpy().copy() for v in (net.weights, average)]
    loss, rates, memory, gain = np.array(log).T.copy()
    return Watched(config.seed, *ends, loss, rates, memory, gain, windows)


def _losses(config: RunConfig, dataset: Dataset, net: FlatModel) -> Iterator[float]:
    """Leave the gradient of each batch of a new run in net.grad, and yield the batch's loss.

    Raises ConfigError for a branch, a schedule, a perturbed start, threads, or compilation.
    """
    require(config.start == 0, "start", config.start, "this method begins at the initialization")
    allowed = {"schedule": "constant", "perturbation": 0, "threads": 1, "compile": False}
    for name, value in allowed.items():
        found = getattr(config, name)
        require(found == value, name, found, f"this method has {value!r}")
    net.module.train()
    for step, x, y in loop.batches(config, dataset):
        yield float(loop.backward(net, step, x, y, config))


# --- tables -------------------------------------------------------------------------------------


def compare(
    study: Study, runs: Sequence[Run], ends: Mapping[str, Sequence[np.ndarray]]
) -> pd.DataFrame:
    """Evaluate the weights that methods end with, one vector per seed of the study.

    `runs`, one per seed, give network and images; BatchNorm is recomputed for all alike. One row
    per method and seed: method, seed, and the quantities of `Evaluator`.
    """
    tables = []
    for i, (seed, evaluate) in enumerate(evaluation.evaluators(runs, study.eval_images).items()):
        labels = pd.DataFrame({"method": list(ends), "seed": seed})
        weights = [vectors[i] for vectors in ends.values()]
        tables.append(evaluate.table(weights, labels, f"evaluation, seed {seed}"))
    return pd.concat(tables, ignore_index=True)


# --- what gradients say, on recorded runs -------------------------------------------------------


def measure_gains(
    runs: Sequence[Run],
    first: int,
    memories: Sequence[float],
    n_points: int = 32,
    n_batches: int = 8,
) -> pd.DataFrame:
    """What averages save: predicted from the gradients used, measured on held-out batches.

    Averages begin at step `first` of a run; its second half from there counts. One row per seed and
    memory: seed; memory; `predicted`, the mean of g_t . (x_t - a_t) / (1 + b) (see `Averages`);
    `unrelated`, the same with the gradients of the next run, a control; `measured`, the mean of the
    loss at x_t minus that at a_t over n_points steps, with batch statistics and weight decay, as
    the gradients have it.
    """
    tables, others = [], [*runs[1:], runs[0]]
    for run, other in zip(runs, others, strict=True):
        c = run.config
        begin = first + (1 if c.momentum else 0)
        x, gradients = run.window(begin, c.steps), run.gradients(begin, c.steps - 1)[0]
        predicted, points = _averages(x, gradients, memories, n_points)
        unrelated = _averages(x, other.gradients(begin, c.steps - 1)[0], memories, 1)[0]
        held = run.dataset.batches(n_batches, c.batch_size, c.stream, "held")
        losses = probe.losses(run.network(), points, *held).mean(1)
        losses = losses + c.weight_decay / 2 * np.square(points).sum(1)
        losses = losses.reshape(n_points, 1 + len(memories))
        measured = (losses[:, :1] - losses[:, 1:]).mean(0)
        found = {"predicted": predicted, "unrelated": unrelated, "measured": measured}
        tables.append(pd.DataFrame({"seed": c.seed, "memory": memories, **found}))
    return pd.concat(tables, ignore_index=True)


def _averages(
    x: np.ndarray, gradients: np.ndarray, memories: Sequence[float], n_points: int
) -> tuple[np.ndarray, np.ndarray]:
    """Mean predicted gain of each memory over the second half of iterates x (n + 1, P) and
    gradients (n, P), (K,), and x_t and averages at n_points steps of it, (n_points * (1 + K), P).
    """
    averages, products, points = Averages(memories, smoothing=0), [], []
    n = len(gradients)
    at = np.linspace(n // 2, n - 1, n_points).astype(int)
    for i, gradient in enumerate(gradients):
        averages.observe(np.asarray(x[i]), gradient)
        products.append(averages.gains.copy())
        for _ in range(np.count_nonzero(at == i)):  # a short run has fewer steps than points
            points += [x[i], *(np.array(vector) for vector in averages.vectors)]
    return np.mean(products[n // 2 :], axis=0), np.stack(points)
