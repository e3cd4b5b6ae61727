"""Ways to train that no RunConfig describes, which watch gradients or average: trained side by side, and kept.

What a method ends with is <data>-<model>-<key>-<method>.npz among the runs. The key is that of its config (`runs`) with
the method's settings and the syntax trees of this module and of `monitor`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import schedulefree
import torch
from torch import nn
from tqdm import tqdm

from paper_lib import files, runs
from paper_lib.averaging.monitor import Averages, Monitor, Window
from paper_lib.config import RunConfig
from paper_lib.data import Dataset, cache
from paper_lib.data.cache import Arrays
from paper_lib.errors import require
from paper_lib.runs import identity
from paper_lib.training import loop
from paper_lib.training.flat import FlatModel, NetFactory, exact_float32, forked_rng

CODE = identity.of_source(Path(__file__), identity.PACKAGE / "averaging" / "monitor.py")


@dataclass(frozen=True, eq=False)
class Watched:
    """A run that was watched: its end, and what happened on the way.

    weights (P,) at its end; average (P,), the one of `Averages` that was then predicted to save most; at every step,
    (n_steps,), loss and lr, and the memory of the average that was best and its gain (nats); windows by the step at
    which they had ended.
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

    def to_arrays(self) -> Arrays:
        """What is kept of it: the arrays, and the windows as rows."""
        windows = [(step, *dataclasses.astuple(window)) for step, window in self.windows.items()]
        vectors = {name: getattr(self, name) for name in ("weights", "average", "loss", "lr", "memory", "gain")}
        return {**vectors, "windows": np.array(windows, np.float64)}

    @classmethod
    def from_arrays(cls, seed: int, arrays: Arrays) -> Watched:
        """Inverse of `to_arrays`."""
        windows = {
            int(step): Window(int(end), int(steps), mean, t, bool(stationary))
            for step, end, steps, mean, t, stationary in arrays["windows"].tolist()
        }
        return cls(seed, **{**arrays, "windows": windows})


# --- training loops ----------------------------------------------------------------------------------------------


def _backward(config: RunConfig, dataset: Dataset, net: FlatModel) -> Iterator[float]:
    """Leave the gradient of each batch of a run from scratch in net.grad, and yield the batch's loss.

    Raises ConfigError for a branch, a schedule, a perturbed start, several threads, or a compiled network.
    """
    require(config.start == 0, "start", config.start, "this method begins at the initialization")
    require(config.schedule == "constant", "schedule", config.schedule, "this method sets the learning rate")
    require(config.perturbation == 0, "perturbation", config.perturbation, "this method starts unperturbed")
    require(config.threads == 1, "threads", config.threads, "this method uses one for each run")
    require(not config.compile, "compile", config.compile, "this method does not compile the network")
    net.module.train()
    for step, x, y in loop.batches(config, dataset):
        yield float(loop.backward(net, step, x, y, config))


def watch(
    config: RunConfig, dataset: Dataset, net: FlatModel, monitor: Monitor, factor: float, averages: Averages
) -> Watched:
    """Train from the network's weights on the batches of `config`, multiplying the learning rate at every alarm.

    With `factor` = 1 this is the run of `config` at its constant learning rate, to the same bits under `train_all`.
    Raises ConfigError unless `config` starts from an unperturbed initialization and has a constant learning rate, and
    where the run diverges.
    """
    velocity, lr = torch.zeros_like(net.weights), config.lr
    log, windows = [], {}
    for step, loss in enumerate(_backward(config, dataset, net)):
        gradient = net.grad + config.weight_decay * net.weights  # the model is about all that the step descends
        if monitor.observe(gradient):
            lr *= factor
        if len(monitor.windows) > len(windows):
            windows[step] = monitor.windows[-1]
        averages.observe(net.weights, gradient)
        log.append((loss, lr, averages.best()[0], max(map(float, averages.gains))))
        loop.sgd_step(net, velocity, lr, config)
    ends = (vector.cpu().numpy().copy() for vector in (net.weights, averages.best()[1]))
    return Watched(config.seed, *ends, *np.array(log).T.copy(), windows)


def schedule_free(config: RunConfig, dataset: Dataset, net: FlatModel, lr: float, momentum: float) -> np.ndarray:
    """The averaged weights (P,) of schedule-free SGD (Defazio et al. 2024) on the batches of `config`.

    Raises ConfigError as `watch` does.
    """
    weights = nn.Parameter(net.weights)  # shares its memory, as the gradient does
    weights.grad = net.grad
    optimizer = schedulefree.SGDScheduleFree([weights], lr=lr, momentum=momentum, weight_decay=config.weight_decay)
    optimizer.train()
    for _ in _backward(config, dataset, net):
        optimizer.step()
    optimizer.eval()
    return net.weights.cpu().numpy().copy()


# --- methods -----------------------------------------------------------------------------------------------------


class Method(Protocol):
    """A way to train: a frozen dataclass whose fields are all the settings that decide it besides the config."""

    def train(self, config: RunConfig, dataset: Dataset, net: FlatModel) -> Arrays:
        """Train from the network's weights; return what is kept."""

    def result(self, seed: int, kept: Arrays) -> Any:
        """What callers get of it."""


@dataclass(frozen=True)
class Watching:
    """`watch` with a `Monitor` of this memory and rate of false alarms; ends with a `Watched`."""

    memory: float
    alpha: float
    factor: float

    def __post_init__(self) -> None:
        for name in ("memory", "alpha", "factor"):  # 1 and 1.0 are one setting, and one key
            object.__setattr__(self, name, float(getattr(self, name)))

    def train(self, config: RunConfig, dataset: Dataset, net: FlatModel) -> Arrays:
        """See `Method`."""
        monitor = Monitor(self.memory, self.alpha)
        return watch(config, dataset, net, monitor, self.factor, Averages()).to_arrays()

    def result(self, seed: int, kept: Arrays) -> Watched:
        """See `Method`."""
        return Watched.from_arrays(seed, kept)


@dataclass(frozen=True)
class ScheduleFree:
    """`schedule_free` with this learning rate and momentum; ends with weights (P,)."""

    lr: float
    momentum: float
    package: str = dataclasses.field(default=version("schedulefree"), init=False)  # it takes the steps

    def train(self, config: RunConfig, dataset: Dataset, net: FlatModel) -> Arrays:
        """See `Method`."""
        return {"weights": schedule_free(config, dataset, net, self.lr, self.momentum)}

    def result(self, seed: int, kept: Arrays) -> np.ndarray:
        """See `Method`."""
        return kept["weights"]


def train_all(
    methods: Mapping[str, Method],
    config: RunConfig,
    seeds: Sequence[int],
    dataset: Dataset,
    model: NetFactory | None = None,
) -> dict[str, list]:
    """What each method ends with, one per seed: loaded if it exists, else trained, all side by side, and kept.

    The random generators come back. Raises ConfigError as `watch` does.
    """
    jobs = [(method, config.replace(seed=seed)) for method in methods.values() for seed in seeds]
    paths = {job: path(*job, dataset, model) for job in jobs}
    kept = {job: cache.read_arrays(paths[job]) for job in jobs}
    missing = [job for job in paths if kept[job] is None]

    def obtain(job: tuple[Method, RunConfig], net: FlatModel) -> Arrays:
        method, c = job
        return cache.cached_arrays(paths[job], lambda: method.train(c, dataset, net))

    nets = [loop.initial_model(c, dataset, model) for _, c in missing]  # here: it seeds the global generator
    # A user's network may draw numbers, from a generator that threads would share.
    n_threads = files.cpus() if dataset.device.type == "cpu" and model is None else 1
    with forked_rng(dataset.device), exact_float32(dataset.device):
        kept |= zip(missing, _side_by_side(obtain, missing, nets, n_threads), strict=True)
    found = iter([method.result(c.seed, kept[method, c]) for method, c in jobs])
    return {name: [next(found) for _ in seeds] for name in methods}


def path(method: Method, config: RunConfig, dataset: Dataset, model: NetFactory | None = None) -> Path:
    """The file of what a method ends with, whether it exists or not."""
    name = type(method).__name__.lower()
    identity = {"method": name, "settings": dataclasses.asdict(method), "method code": CODE}
    folder = runs.run_folder(config, dataset, model, **identity)
    return folder.with_name(f"{folder.name}-{name}.npz")


def _side_by_side(
    obtain: Callable[[Any, FlatModel], Arrays], jobs: Sequence, nets: Sequence[FlatModel], n_threads: int
) -> list[Arrays]:
    """obtain(job, its network) for every job, in threads that each use one core."""
    with ThreadPoolExecutor(n_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            return list(tqdm(pool.map(obtain, jobs, nets), total=len(jobs), desc="other methods", disable=not jobs))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # an interrupt waits for what runs, not for all that is left
            raise
