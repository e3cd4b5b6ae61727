"""Where claim C3 ends: the one-step measurement over batch sizes, statistics, networks and training time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from paper_lib.data import Dataset
from paper_lib.experiments import one_step
from paper_lib.results import figures
from paper_lib.runs import Run
from paper_lib.training.flat import NetFactory

STEPS = np.array([0, *np.geomspace(0.06, 60, 13)])
"""Probe steps in units of the learning rate: from far below half of it to far beyond 1 / curvature."""

IMAGES = 256  # held-out images that a probe is judged by, unless its batch is larger
TRAINED_IMAGES = 2048  # images in an estimate of the fully trained network's loss


def judge(
    trajectories: Sequence[Run],
    decayed: Sequence[Run],
    dataset: Dataset,
    at: Sequence[int],
    batch_size: int | None = None,
    frozen: bool = False,
    model: NetFactory | None = None,
    n_batches: int = 1,
    point: str = "",
) -> pd.DataFrame:
    """One row per seed: `one_step.summary` with both halves of the claim.

    `ratio` = own-batch minimum over the loss of the fully trained network, with the same batch size and statistics;
    `held_change` = change of the held-out loss at the own batch's best step. Steps are in units of lr / (1 - m).
    """
    config = trajectories[0].config
    size, full = batch_size or config.batch_size, 1 / (1 - config.momentum)
    table = one_step.measure(
        trajectories, dataset, at, model, n_batches, max(1, IMAGES // size), size, frozen, STEPS * full, point
    )
    trained = one_step.trained_loss(decayed, dataset, max(1, TRAINED_IMAGES // size), model, size, frozen)
    found = one_step.summary(table, config.lr)
    return found.assign(
        size=size,
        statistics="running" if frozen else "batch",
        ratio=found.own_min / found.seed.map(trained),
        held_change=found.held_at_own - found.held_start,
        held_best=found.held_best / full,
        own_best=found.own_best / full,
    )


def by_size(
    trajectories: Sequence[Run],
    decayed: Sequence[Run],
    dataset: Dataset,
    at: Sequence[int],
    sizes: Sequence[int],
    model: NetFactory | None = None,
) -> pd.DataFrame:
    """`judge` for probe batches of each size, with batch and with running statistics.

    The larger the batch, the less it scatters and the fewer of the snapshots `at` are probed.
    """
    tables = []
    for size in sizes:
        n = int(np.clip(2 * IMAGES // size, 1, len(at)))
        steps = [at[i] for i in np.linspace(0, len(at) - 1, n).astype(int)]
        for frozen in (False, True):
            point = f"{size}, {'running' if frozen else 'batch'} statistics"
            tables.append(judge(trajectories, decayed, dataset, steps, size, frozen, model, point=point))
    return pd.concat(tables, ignore_index=True)


def predicted_best(size: np.ndarray, reference: int, shared: float) -> np.ndarray:
    """Best held-out step over lr for probe batches of `size`, in a run that trains with batches of `reference`.

    With one curvature, the stationary variance v stays and the scatter of minima is s2 reference / size, so the best
    step v / (v + s2 reference / size) is 1/2 lr / (c + (1 - c) reference / size), where c = v / (v + s2) is `shared`,
    the cosine of two batches' gradients at the reference size: 1/2 at that size, 1 / curvature for large batches.
    """
    return 0.5 / (shared + (1 - shared) * reference / np.asarray(size))


def plot_ratio(ax: Axes, table: pd.DataFrame, x: str, **options) -> None:
    """Own-batch minimum over the fully trained loss: claim C3 ends where it crosses 1."""
    figures.band(ax, table, x, "ratio", marker="o", **options)
    ax.axhline(1, color="0.6", linewidth=1.5, linestyle=":")
    ax.set(ylabel="own minimum / fully trained loss", ylim=(0, max(1.3, 1.2 * table.ratio.max(), ax.get_ylim()[1])))


def plot_sizes(ratio: Axes, best: Axes, table: pd.DataFrame, reference: int) -> None:
    """Both halves of the claim against the size of the probe's batch, for both kinds of statistics."""
    for (name, one), color in zip(table.groupby("statistics", sort=False), sns.color_palette(), strict=False):
        plot_ratio(ratio, one, "size", label=f"{name} statistics", color=color)
        figures.band(best, one, "size", "held_best", label=f"{name} statistics", color=color, marker="o")
    shared = table.query("size == @reference and statistics == 'batch'").shared.mean()
    sizes = np.unique(table["size"])
    figures.predicted(best, sizes, predicted_best(sizes, reference, shared))
    best.set(yscale="log", ylabel="best held-out step / lr")
    for ax in (ratio, best):
        ax.set(xscale="log", xlabel="batch size of the probe")
        ax.set_xticks(sizes, sizes)
        ax.minorticks_off()
        ax.legend(fontsize="small")


def plot_settings(ratio: Axes, best: Axes, table: pd.DataFrame) -> None:
    """Both halves of the claim for networks trained in other ways, one dot per seed."""
    for ax, y, label in (
        (ratio, "ratio", "own minimum / fully trained loss"),
        (best, "held_best", "best held-out step × (1 − m) / lr"),
    ):
        sns.stripplot(table, x="point", y=y, hue="point", ax=ax, size=8, jitter=False, legend=False)
        ax.axhline(1 if ax is ratio else 0.5, color="0.6", linewidth=1.5, linestyle=":")
        ax.set(xlabel="", ylabel=label, ylim=(0, None))
