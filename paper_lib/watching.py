"""Claim C10, on networks: lower the learning rate, or average, when the gradients say that the run is stationary."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pandas as pd
import schedulefree
import seaborn as sns
import torch
from matplotlib.axes import Axes
from torch import nn
from tqdm import tqdm

from paper_lib import alignment, evaluation, figures, probe, runs, train
from paper_lib.config import RunConfig, Study
from paper_lib.data import Dataset
from paper_lib.models import FlatModel
from paper_lib.monitor import BLOCKS, Monitor, Window
from paper_lib.stationarity import replay
from paper_lib.train import ModelFactory
from paper_lib.trajectory import Trajectory


@dataclass(frozen=True, eq=False)
class Watched:
    """A run whose learning rate followed its gradients.

    weights (P,) at its end; average (P,) of the iterates since the test last found it descending, or its learning rate
    was lowered; loss and lr of every step, (n_steps,); windows by the number of steps after which they ended.
    """

    seed: int
    weights: np.ndarray
    average: np.ndarray
    loss: np.ndarray
    lr: np.ndarray
    windows: dict[int, Window]

    @property
    def alarms(self) -> list[int]:
        """Steps after which the run was found stationary."""
        return [step for step, window in self.windows.items() if window.stationary]


# --- training loops ----------------------------------------------------------------------------------------------


def _backward(config: RunConfig, dataset: Dataset, net: FlatModel) -> Iterator[float]:
    """Leave the gradient of each batch of a run from scratch in net.grad, and yield the batch's loss."""
    net.module.train()
    for x, y in dataset.stream(0, config.steps, config.batch_size, config.stream):
        loss = train.batch_loss(net, x, y, config)
        net.backward(loss)
        yield float(loss.detach())


def watch(config: RunConfig, dataset: Dataset, net: FlatModel, monitor: Monitor, factor: float) -> Watched:
    """Train from the network's weights on the batches of `config`, multiplying the learning rate at every alarm.

    With `factor` = 1 this is the run of `config` at its constant learning rate, to the same bits.
    """
    velocity, lr = torch.zeros_like(net.weights), config.lr
    average, n_averaged = net.weights.clone(), 0
    losses, rates, windows = [], [], {}
    for loss in _backward(config, dataset, net):
        train.sgd_step(net, velocity, lr, config)  # adds weight decay to net.grad: the model is about that sum
        losses.append(loss)
        rates.append(lr)
        n_averaged += 1
        average.lerp_(net.weights, 1 / n_averaged)
        alarm = monitor.observe(net.grad)
        if len(monitor.windows) > len(windows):
            windows[len(losses)] = window = monitor.windows[-1]
            if window.descending or (alarm and factor != 1):
                n_averaged = 0  # the next iterate replaces the average
        lr *= factor if alarm else 1
    ends = (vector.cpu().numpy().copy() for vector in (net.weights, average))
    return Watched(config.seed, *ends, np.array(losses), np.array(rates), windows)


def schedule_free(config: RunConfig, dataset: Dataset, net: FlatModel, lr: float, momentum: float) -> np.ndarray:
    """The averaged weights (P,) of schedule-free SGD (Defazio et al. 2024) on the batches of `config`."""
    weights = nn.Parameter(net.weights)  # shares its memory, as the gradient does
    weights.grad = net.grad
    optimizer = schedulefree.SGDScheduleFree([weights], lr=lr, momentum=momentum, weight_decay=config.weight_decay)
    optimizer.train()
    for _ in _backward(config, dataset, net):
        optimizer.step()
    optimizer.eval()
    return net.weights.cpu().numpy().copy()


def each_seed(
    train_one: Callable[[RunConfig, FlatModel], object],
    config: RunConfig,
    seeds: Sequence[int],
    dataset: Dataset,
    model: ModelFactory | None = None,
    progress: str = "",
) -> list:
    """train_one(config, initial network) for every seed, on a CPU side by side in as many threads as torch may use."""
    configs = [config.replace(seed=seed) for seed in seeds]
    nets = [train.initial_model(c, dataset, model) for c in configs]  # here: it seeds the global generator
    n_threads = torch.get_num_threads() if dataset.device.type == "cpu" else 1
    with ThreadPoolExecutor(n_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(tqdm(pool.map(train_one, configs, nets), total=len(configs), desc=progress))


# --- comparison --------------------------------------------------------------------------------------------------


def fixed(study: Study, late: float = 0.6, drop: float = 0.1) -> dict[str, RunConfig]:
    """Runs of as many steps as the study's warm-up under schedules that know the end.

    "step" multiplies the learning rate by `drop`, "linear" lowers it to zero, from the snapshot of the warm-up that is
    the last one in the fraction `late` of its steps.
    """
    run = study.run
    at = int(max(step for step in run.snapshot_steps if step <= late * run.steps))
    rest = run.steps - at
    return {
        "constant": run,
        "step": run.branch(rest, at=at, schedule=(drop,) * rest),
        "linear": run.branch(rest, at=at, schedule="linear"),
        "cosine": run.replace(schedule="cosine", record=""),
    }


def compare(
    study: Study,
    dataset: Dataset,
    ends: Mapping[str, Sequence[np.ndarray]],
    model: ModelFactory | None = None,
) -> pd.DataFrame:
    """Evaluate the weights that methods end with, one vector per seed of the study; BatchNorm recomputed for all alike.

    One row per method and seed: method, seed, and the quantities of `Evaluator`.
    """
    tables = []
    for i, seed in enumerate(study.seeds):
        net = train.initial_model(study.run, dataset, model)
        evaluator = evaluation.Evaluator(net, dataset, study.eval_images, seed=seed)
        labels = pd.DataFrame({"method": list(ends), "seed": seed})
        tables.append(evaluator.table([weights[i] for weights in ends.values()], labels, f"evaluation, seed {seed}"))
    return pd.concat(tables, ignore_index=True)


def difference(table: pd.DataFrame, column: str, method: str, other: str) -> np.ndarray:
    """`column` of a method minus that of another, (n_seeds,)."""
    wide = table.pivot(index="seed", columns="method", values=column)
    return (wide[method] - wide[other]).to_numpy()


def loss_at_alarm(run: Watched) -> float:
    """Mean training loss over the window of the first alarm, over that of as many last steps; NaN without an alarm."""
    if not run.alarms:
        return float("nan")
    at = run.alarms[0]
    n = run.windows[at].steps
    return float(run.loss[at - n : at].mean() / run.loss[-n:].mean())


# --- the model's two laws on recorded runs -----------------------------------------------------------------------


def measure_velocity(
    trajectories: Sequence[Trajectory],
    dataset: Dataset,
    first: int,
    n_points: int = 100,
    n_batches: int = 4,
    model: ModelFactory | None = None,
) -> pd.DataFrame:
    """E g_t . v_(t-1) along recorded runs, and what the model makes of it from full gradients, -|E g|^2 / (1 + m).

    One row per seed: seed; `used`, over all steps from first + 1 (first + 2 with momentum) to the end; `predicted`,
    from the product of g_t with the mean gradient G_t of n_batches held-out batches at n_points of these steps.
    """
    rows = []
    for run in trajectories:
        c, net = run.config, runs.network(run, dataset, model)
        begin = first + (1 if c.momentum else 0)
        g, v = alignment.used_gradients(run, begin, c.steps - 1)
        products = []
        for t in tqdm(np.linspace(begin, c.steps - 1, n_points).astype(int), desc="full gradients"):
            held = dataset.batches(range(t * n_batches, (t + 1) * n_batches), c.batch_size, c.stream, "held")
            x = np.array(run.at(t))
            products.append(g[t - begin] @ (probe.mean_gradient(net, x, *held) + c.weight_decay * x))
        used = np.einsum("tp,tp->t", g[1:], v[:-1]).mean()
        rows.append({"seed": c.seed, "used": used, "predicted": -np.mean(products) / (1 + c.momentum)})
    return pd.DataFrame(rows)


def t_of_run(run: Trajectory, first: int, memory: float, alpha: float) -> float:
    """t of the test when the steps of a recorded plain SGD run from `first` to its end are one window."""
    g, _ = alignment.used_gradients(run, first, run.config.steps - 1)
    past, values = g[0].copy(), []
    for gradient in g[1:]:
        values.append(gradient @ past)
        past = memory * past + gradient
    return replay(np.array(values), alpha, len(values) // BLOCKS)[0].t


# --- figures -----------------------------------------------------------------------------------------------------


def windows_table(watched: Sequence[Watched]) -> pd.DataFrame:
    """One row per window: seed, step (at its end), steps, t, stationary."""
    rows = [
        {"seed": run.seed, "step": step, "steps": w.steps, "t": w.t, "stationary": w.stationary}
        for run in watched
        for step, w in run.windows.items()
    ]
    return pd.DataFrame(rows, columns=["seed", "step", "steps", "t", "stationary"])
