"""Claim C1: whether the loss of a batch is convex between points of a path: midpoints and tangents of all pairs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from torch import Tensor
from tqdm import tqdm

from paper_lib import runs
from paper_lib.data import Dataset
from paper_lib.errors import require
from paper_lib.probing import derivatives, probe
from paper_lib.runs import Run
from paper_lib.training.flat import FlatModel, NetFactory

NOISE = 1e-5  # nats: float32 losses of order 1 are good to about 1e-6; less than this is no violation


def along(run: Run, first: int, last: int, n: int = 9) -> np.ndarray:
    """n iterates from x_first to x_last, (n, P), about equally far apart in time; SnapshotError for those not kept."""
    require(last > first, "window", (first, last), "it is empty: the last step must come after the first")
    return np.array(run.weights[run.rows(np.unique(np.linspace(first, last, n).round().astype(int)))])


def random_path(points: np.ndarray, seed: int = 0) -> np.ndarray:
    """A path with the start and the step lengths of `points`, (n, P), but random directions."""
    steps = np.random.default_rng(seed).standard_normal((len(points) - 1, points.shape[1])).astype(np.float32)
    lengths = np.linalg.norm(np.diff(points, axis=0), axis=1) / np.linalg.norm(steps, axis=1)
    return np.concatenate([points[:1], points[0] + np.cumsum(lengths[:, None] * steps, axis=0)])


def segment(start: np.ndarray, end: np.ndarray, n: int = 9) -> np.ndarray:
    """n points on the straight line between two weight vectors, both included, (n, P)."""
    return start + np.linspace(0, 1, n, dtype=np.float32)[:, None] * (end - start)


def measure(
    trajectories: Sequence[Run],
    dataset: Dataset,
    paths: Sequence[np.ndarray],
    batches: Sequence[int],
    split: str = "train",
    model: NetFactory | None = None,
    path: str = "",
) -> pd.DataFrame:
    """`excesses` of each run's batches on its own path (one array (n, P) per run): adds columns seed and path."""
    tables = []
    for run, points in zip(tqdm(trajectories, desc=f"convexity, {path}"), paths, strict=True):
        stacked = dataset.batches(batches, run.config.batch_size, run.config.stream, split)
        found = excesses(runs.network(run, dataset, model), points, *stacked)
        tables.append(found.assign(seed=run.config.seed, path=path))
    return pd.concat(tables, ignore_index=True)


def excesses(net: FlatModel, points: np.ndarray, x: Tensor, y: Tensor) -> pd.DataFrame:
    """By how much each pair of points, (n, P), violates convexity of each batch's loss; negative where it does not.

    Rows (i, j, batch) with `midpoint` = l((x_i + x_j)/2) - (l(x_i) + l(x_j))/2 and `tangent`, the larger of
    l(x_i) + g(x_i) . (x_j - x_i) - l(x_j) and the same with i and j exchanged, in nats; `distance` = |x_i - x_j|.
    """
    n, n_batches = len(points), len(x)
    i, j = np.triu_indices(n, 1)
    at = probe.losses(net, points, x, y)
    slopes = np.empty((n, n, n_batches))  # g_k(x_i) . (x_j - x_i)
    for a in range(n):
        away = points - points[a]
        for k, gradient in enumerate(derivatives.each_gradient(net, points[a], x, y)):
            slopes[a, :, k] = away @ gradient
    middle = np.stack([probe.losses(net, (points[a] + points[b]) / 2, x, y) for a, b in zip(i, j, strict=True)])
    tangent = np.maximum(at[i] + slopes[i, j] - at[j], at[j] + slopes[j, i] - at[i])
    return pd.DataFrame(
        {
            "i": np.repeat(i, n_batches),
            "j": np.repeat(j, n_batches),
            "batch": np.tile(np.arange(n_batches), len(i)),
            "distance": np.repeat(np.linalg.norm(points[i] - points[j], axis=1), n_batches),
            "midpoint": (middle - (at[i] + at[j]) / 2).ravel(),
            "tangent": tangent.ravel(),
        }
    )


def violations(table: pd.DataFrame) -> pd.DataFrame:
    """Fraction of the inequalities of `measure` that fail by more than NOISE: rows (path, seed), both kinds."""
    failed = table[["midpoint", "tangent"]] > NOISE
    return failed.groupby([table.path, table.seed], sort=False).mean().reset_index()


def plot(ax: Axes, found: pd.DataFrame) -> None:
    """Fractions of violated inequalities per path: bars are means over seeds, points single seeds."""
    tall = found.melt(["path", "seed"], ["midpoint", "tangent"], "inequality", "fraction")
    tall["percent"] = 100 * tall.fraction
    kwargs = {"data": tall, "y": "path", "x": "percent", "hue": "inequality", "ax": ax}
    sns.barplot(**kwargs, errorbar=None, alpha=0.6)
    sns.stripplot(**kwargs, dodge=True, jitter=False, size=5, legend=False, edgecolor="white", linewidth=0.5)
    ax.set(xlabel="violated inequalities (%)", ylabel="", xlim=(0, max(5, 1.1 * tall.percent.max())))
    ax.legend(loc="upper right", fontsize="small", bbox_to_anchor=(1, 0.6))
