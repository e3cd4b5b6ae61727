"""Claim C10, on networks: methods that lower the learning rate or average by themselves, next to fixed schedules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from paper_lib import runs
from paper_lib.config import Study
from paper_lib.data import Dataset
from paper_lib.experiments.methods import Watched
from paper_lib.probing import evaluation
from paper_lib.results import figures
from paper_lib.runs import Run
from paper_lib.training import loop
from paper_lib.training.flat import NetFactory

# --- comparison --------------------------------------------------------------------------------------------------


def train_fixed(study: Study, step_at: float = 0.75, linear_at: float = 0.6) -> dict[str, list[Run]]:
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
    model: NetFactory | None = None,
) -> pd.DataFrame:
    """Evaluate the weights that methods end with, one vector per seed of the study; BatchNorm recomputed for all alike.

    One row per method and seed: method, seed, and the quantities of `Evaluator`.
    """
    tables = []
    for i, seed in enumerate(study.seeds):
        net = loop.initial_model(study.run, dataset, model)
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


def plot_rates(ax: Axes, schedules: Mapping[str, Sequence[Run]], watched: Sequence[Watched]) -> None:
    """Learning rate against the step: the fixed schedules, and every watched run."""
    for name, (run, *_) in schedules.items():
        ax.plot(run.config.start + np.arange(len(run.lr)), run.lr, label=name)
    for i, run in enumerate(watched):
        ax.plot(run.lr, color="black", linewidth=1.5, label=None if i else "watched: lowered")
    shown = np.concatenate([run.lr for run in watched])
    ax.set(yscale="log", xlabel="step", ylabel="learning rate", ylim=(shown.min() / 3, 1.5 * shown.max()))
    ax.legend(fontsize="small")
