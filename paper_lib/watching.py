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

from paper_lib import evaluation, figures, runs, sgd
from paper_lib.config import RunConfig, Study
from paper_lib.data import Dataset
from paper_lib.models import FlatModel, ModelFactory, exact_float32, forked_rng
from paper_lib.monitor import Averages, Monitor, Window
from paper_lib.trajectory import Trajectory
from paper_lib.validate import require


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


# --- training loops ----------------------------------------------------------------------------------------------


def _backward(config: RunConfig, dataset: Dataset, net: FlatModel) -> Iterator[float]:
    """Leave the gradient of each batch of a run from scratch in net.grad, and yield the batch's loss.

    Raises ConfigError for a branch, a schedule, or a perturbed start.
    """
    require(config.start == 0, "start", config.start, "a watched run begins at its initialization")
    require(config.schedule == "constant", "schedule", config.schedule, "the watching method lowers the learning rate")
    require(config.perturbation == 0, "perturbation", config.perturbation, "a watched run starts unperturbed")
    net.module.train()
    for step, (x, y) in enumerate(dataset.stream(0, config.steps, config.batch_size, config.stream)):
        sgd.seed_step(net.device, step, config)
        loss = sgd.batch_loss(net, x, y, config)
        net.backward(loss)
        yield float(loss.detach())


def watch(
    config: RunConfig, dataset: Dataset, net: FlatModel, monitor: Monitor, factor: float, averages: Averages
) -> Watched:
    """Train from the network's weights on the batches of `config`, multiplying the learning rate at every alarm.

    With `factor` = 1 this is the run of `config` at its constant learning rate, to the same bits under `each_seed`.
    Raises ConfigError unless `config` starts from an unperturbed initialization and has a constant learning rate.
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
        sgd.sgd_step(net, velocity, lr, config)
    ends = (vector.cpu().numpy().copy() for vector in (net.weights, averages.best()[1]))
    return Watched(config.seed, *ends, *np.array(log).T, windows)


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


def each_seed(
    train_one: Callable[[RunConfig, FlatModel], object],
    config: RunConfig,
    seeds: Sequence[int],
    dataset: Dataset,
    model: ModelFactory | None = None,
    progress: str = "",
) -> list:
    """train_one(config, initial network) for every seed, with exact float32; the random generators come back.

    On a CPU they run side by side in as many threads as torch may use, but one after the other with layers of dropout,
    as threads share a generator.
    """
    configs = [config.replace(seed=seed) for seed in seeds]
    nets = [sgd.initial_model(c, dataset, model) for c in configs]  # here: it seeds the global generator
    device = dataset.device
    draws = any(isinstance(sub, nn.modules.dropout._DropoutNd) for net in nets for sub in net.module.modules())
    n_threads = torch.get_num_threads() if device.type == "cpu" and not draws else 1
    with (
        forked_rng(device),
        exact_float32(device),
        ThreadPoolExecutor(n_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        return list(tqdm(pool.map(train_one, configs, nets), total=len(configs), desc=progress))


# --- comparison --------------------------------------------------------------------------------------------------


def train_fixed(study: Study, step_at: float = 0.75, linear_at: float = 0.6) -> dict[str, list[Trajectory]]:
    """Runs of as many steps as the study's warm-up under schedules that know the end, one per seed.

    "step" divides the learning rate by 10, "linear" begins to lower it to zero, at the last snapshot of the warm-up
    that lies in the given fraction of its steps. With momentum, the warm-up keeps the states that they start from.
    """
    run = study.run
    snapshots = run.snapshot_steps
    step, linear = (int(snapshots[snapshots <= part * run.steps].max()) for part in (step_at, linear_at))
    if run.momentum:
        run = run.replace(checkpoints=tuple(sorted({*run.checkpoints, step, linear})))
    configs = {
        "constant": run,
        "step": run.branch(run.steps - step, at=step, schedule=(0.1,) * (run.steps - step)),
        "linear": run.branch(run.steps - linear, at=linear, schedule="linear"),
        "cosine": run.replace(schedule="cosine", record="", checkpoints=()),
    }
    trained = iter(runs.train_all([c.replace(seed=seed) for c in configs.values() for seed in study.seeds]))
    return {name: [next(trained) for _ in study.seeds] for name in configs}


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
        net = sgd.initial_model(study.run, dataset, model)
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


# --- figures -----------------------------------------------------------------------------------------------------


def windows_table(watched: Sequence[Watched]) -> pd.DataFrame:
    """One row per window: seed, step (at its end), steps, t, stationary."""
    rows = [
        {"seed": run.seed, "step": step, "steps": w.steps, "t": w.t, "stationary": w.stationary}
        for run in watched
        for step, w in run.windows.items()
    ]
    return pd.DataFrame(rows, columns=["seed", "step", "steps", "t", "stationary"])


def steps_table(watched: Sequence[Watched], n_points: int = 150) -> pd.DataFrame:
    """seed, step, lr, memory, `horizon` (1 / (1 - memory), steps) and gain at n_points steps after the first few."""
    tables = []
    for run in watched:
        at = np.linspace(len(run.lr) // 20, len(run.lr) - 1, n_points).astype(int)
        columns = {"step": at, "lr": run.lr[at], "memory": run.memory[at], "gain": run.gain[at]}
        tables.append(pd.DataFrame({"seed": run.seed, "horizon": 1 / (1 - run.memory[at]), **columns}))
    return pd.concat(tables, ignore_index=True)


def plot_windows(ax: Axes, table: pd.DataFrame, threshold: float) -> None:
    """t of every window at the step where it ended, one line a seed; below the dashed line the test is alarmed."""
    for (seed, one), color in zip(table.groupby("seed"), sns.color_palette(), strict=False):
        ax.plot(one.step, one.t, color=color, marker="o", label=f"seed {seed}")
    ax.axhline(0, color="0.7", linewidth=1)
    ax.axhline(threshold, label="stationary below", **figures.PREDICTION)
    ax.set(xlabel="step", ylabel="t of the window")
    ax.legend(fontsize="small")


def plot_rates(ax: Axes, schedules: Mapping[str, Sequence[Trajectory]], watched: Sequence[Watched]) -> None:
    """Learning rate against the step: the fixed schedules, and every watched run."""
    for name, (run, *_) in schedules.items():
        ax.plot(run.config.start + np.arange(len(run.lr)), run.lr, label=name)
    for i, run in enumerate(watched):
        ax.plot(run.lr, color="black", linewidth=1.5, label=None if i else "watched: lowered")
    shown = np.concatenate([run.lr for run in watched])
    ax.set(yscale="log", xlabel="step", ylabel="learning rate", ylim=(shown.min() / 3, 1.5 * shown.max()))
    ax.legend(fontsize="small")
