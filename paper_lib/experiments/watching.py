"""Watch runs by their gradients, next to fixed schedules; read gains off gradients (claim C10)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import schedulefree
import torch
from torch import nn

from paper_lib.averaging import monitor
from paper_lib.averaging.monitor import BLOCKS, Averages, Monitor, Window
from paper_lib.config import RunConfig, Study
from paper_lib.data import Dataset
from paper_lib.errors import require
from paper_lib.experiments.stationarity import replay
from paper_lib.probing import evaluation, probe
from paper_lib.probing.derivatives import full_gradients
from paper_lib.runs import Run, train_all
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


@dataclass(frozen=True)
class ScheduleFree:
    """`schedule_free` with this learning rate and momentum; ends with weights (P,)."""

    lr: float
    momentum: float
    package: str = field(default=version("schedulefree"), init=False)  # it takes the steps
    source: str = field(default=SOURCE, init=False, repr=False)

    def train(self, config: RunConfig, dataset: Dataset, net: FlatModel) -> Arrays:
        """Train from the network's weights; see `runs.methods.Method`."""
        return {"weights": schedule_free(config, dataset, net, self.lr, self.momentum)}

    def result(self, seed: int, kept: Arrays) -> np.ndarray:
        """The averaged weights, (P,)."""
        return kept["weights"]


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


def schedule_free(
    config: RunConfig, dataset: Dataset, net: FlatModel, lr: float, momentum: float
) -> np.ndarray:
    """The averaged weights (P,) of schedule-free SGD (Defazio et al. 2024), on config's batches.

    Raises ConfigError as `watch` does.
    """
    weights = nn.Parameter(net.weights)  # shares its memory, as the gradient does
    weights.grad = net.grad
    settings = {"lr": lr, "momentum": momentum, "weight_decay": config.weight_decay}
    optimizer = schedulefree.SGDScheduleFree([weights], **settings)
    optimizer.train()
    for _ in _losses(config, dataset, net):
        optimizer.step()
    optimizer.eval()
    return net.weights.cpu().numpy().copy()


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


# --- fixed schedules ----------------------------------------------------------------------------


def train_fixed(
    study: Study, step_at: float = 0.75, linear_at: float = 0.6
) -> dict[str, list[Run]]:
    """Runs of as many steps as the study's warm-up under schedules that know the end, by seed.

    "step" divides the learning rate by 10, "linear" begins to lower it to zero, at the last
    snapshot of the warm-up that lies in the given fraction of its steps. With momentum, the warm-up
    keeps the states that they start from.
    """
    run = study.run
    snapshots = run.snapshot_steps
    step, linear = (
        int(snapshots[snapshots <= part * run.steps].max()) for part in (step_at, linear_at)
    )
    if run.momentum:
        run = run.replace(checkpoints=tuple(sorted({*run.checkpoints, step, linear})))
    configs = {
        "constant": run,
        "step": run.branch(run.steps - step, at=step, schedule=(0.1,) * (run.steps - step)),
        "linear": run.branch(run.steps - linear, at=linear, schedule="linear"),
        "cosine": run.replace(schedule="cosine", record="", checkpoints=()),
    }
    every = [c.replace(seed=seed) for c in configs.values() for seed in study.seeds]
    trained = iter(train_all(every, study.dataset, study.net))
    return {name: [next(trained) for _ in study.seeds] for name in configs}


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


def measure_velocity(
    runs: Sequence[Run], first: int, n_points: int = 100, n_batches: int = 4
) -> pd.DataFrame:
    """E g_t . v_(t-1) along runs, and what the model makes of it, -|E g|^2 / (1 + m).

    One row per seed: seed; `used`, over all steps from first + 1 (first + 2 with momentum) to the
    end; `predicted`, from the product of g_t with the mean gradient G_t of n_batches held-out
    batches at n_points of these steps.
    """
    rows = []
    for run in runs:
        c = run.config
        begin = first + (1 if c.momentum else 0)
        g, v = run.gradients(begin, c.steps - 1)
        steps = np.linspace(begin, c.steps - 1, n_points).astype(int)
        products = [g[t - begin] @ full for t, _, full in full_gradients(run, steps, n_batches)]
        used = np.einsum("tp,tp->t", g[1:], v[:-1]).mean()
        predicted = -np.mean(products) / (1 + c.momentum)
        rows.append({"seed": c.seed, "used": used, "predicted": predicted})
    return pd.DataFrame(rows)


def measure_gains(
    runs: Sequence[Run],
    first: int,
    memories: Sequence[float],
    n_points: int = 8,
    n_batches: int = 8,
) -> pd.DataFrame:
    """What averages save: predicted from the gradients used, measured on held-out batches.

    Averages begin at step `first` of a run; its second half from there counts. One row per seed and
    memory: seed; memory; `predicted`, the mean of g_t . (x_t - a_t) / (1 + b) (see `Averages`);
    `measured`, the mean of the loss at x_t minus that at a_t over n_points steps, with batch
    statistics and weight decay, as the gradients have it.
    """
    tables = []
    for run in runs:
        c = run.config
        predicted, points = _averages(run, first, memories, n_points)
        held = run.dataset.batches(n_batches, c.batch_size, c.stream, "held")
        losses = probe.losses(run.network(), points, *held).mean(1)
        losses = losses + c.weight_decay / 2 * np.square(points).sum(1)
        losses = losses.reshape(n_points, 1 + len(memories))
        measured = (losses[:, :1] - losses[:, 1:]).mean(0)
        found = {"memory": memories, "predicted": predicted, "measured": measured}
        tables.append(pd.DataFrame({"seed": c.seed, **found}))
    return pd.concat(tables, ignore_index=True)


def _averages(
    run: Run, first: int, memories: Sequence[float], n_points: int
) -> tuple[np.ndarray, np.ndarray]:
    """Mean predicted gain of each memory over the second half from `first`, (K,), and x_t and
    averages at n_points steps of it, (n_points * (1 + K), P).
    """
    begin, end = first + (1 if run.config.momentum else 0), run.config.steps
    x, (g, _) = run.window(begin, end), run.gradients(begin, end - 1)
    averages, products, points = Averages(memories, smoothing=0), [], []
    at = np.linspace(len(g) // 2, len(g) - 1, n_points).astype(int)
    for i, gradient in enumerate(g):
        averages.observe(np.asarray(x[i]), gradient)
        products.append(averages.gains.copy())
        if i in at:
            points += [x[i], *(np.array(vector) for vector in averages.vectors)]
    return np.mean(products[len(g) // 2 :], axis=0), np.stack(points)


def t_of_run(run: Run, first: int, memory: float, alpha: float) -> float:
    """t of the test when a plain SGD run's steps from `first` to its end are one window."""
    g, _ = run.gradients(first, run.config.steps - 1)
    past, values = g[0].copy(), []
    for gradient in g[1:]:
        values.append(gradient @ past)
        past = memory * past + gradient
    return replay(np.array(values), alpha, len(values) // BLOCKS)[0].t
