"""Follow the loss of one fixed batch along a trajectory (claim C1).

`convexity` tests the inequalities of a convex function between points of a path, `follow` and
`over_chords` the curve itself, and `dips` shows what the batch's own step leaves.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from torch import Tensor
from tqdm import tqdm

from paper_lib.errors import require
from paper_lib.experiments.tables import tabulated
from paper_lib.probing import derivatives, probe
from paper_lib.runs import Run
from paper_lib.training.flat import FlatModel

NOISE = 1e-5  # nats: float32 losses of order 1 are good to about 1e-6; less is no violation


def along(run: Run, first: int, last: int, n: int = 7) -> np.ndarray:
    """At most n iterates from x_first to x_last, (n, P), about equally far apart in time.

    Of those that were kept; ConfigError for an empty window, SnapshotError where an end was not.
    """
    allowed = "it is empty: the last step must come after the first"
    require(last > first, "window", (first, last), allowed)
    begin, end = run.rows([first, last])
    at = np.linspace(first, last, n).round()
    nearest = np.abs(run.steps[begin : end + 1, None] - at).argmin(0)
    return np.array(run.weights[begin + np.unique(nearest)])


def random_path(points: np.ndarray, seed: int = 0) -> np.ndarray:
    """A path with the start and the step lengths of `points`, (n, P), but random directions."""
    shape = len(points) - 1, points.shape[1]
    steps = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    lengths = np.linalg.norm(np.diff(points, axis=0), axis=1) / np.linalg.norm(steps, axis=1)
    return np.concatenate([points[:1], points[0] + np.cumsum(lengths[:, None] * steps, axis=0)])


def segment(start: np.ndarray, end: np.ndarray, n: int = 9) -> np.ndarray:
    """n points on the straight line between two weight vectors, both included, (n, P)."""
    return start + np.linspace(0, 1, n, dtype=np.float32)[:, None] * (end - start)


def middle(start: np.ndarray, end: np.ndarray, reach: float, n: int = 9) -> np.ndarray:
    """The n points in the middle of a `segment` that are less than `reach` apart, (n, P).

    The whole segment where it is so short that n points of it are.
    """
    part = min(1.0, 0.9 * (n - 1) * reach / float(np.linalg.norm(end - start)))
    at = 0.5 + part * (np.linspace(0, 1, n, dtype=np.float32) - 0.5)
    return start + at[:, None] * (end - start)


def lengths(points: np.ndarray) -> np.ndarray:
    """Length of the path from its first point to each, (n,), for points (n, P)."""
    steps = np.linalg.norm(np.diff(points, axis=0), axis=1, keepdims=True)
    return np.append(0, np.cumsum(steps, dtype=np.float64))


def equally_far(points: np.ndarray, n: int = 9) -> np.ndarray:
    """Those of `points`, (m, P), that lie about equally far apart along the path, at most n."""
    at = lengths(points)
    return points[np.unique(np.abs(at - np.linspace(0, at[-1], n)[:, None]).argmin(1))]


@tabulated
def convexity(
    runs: Sequence[Run], paths: Sequence[np.ndarray], batches: Sequence[int], path: str = ""
) -> Iterator[pd.DataFrame]:
    """`excesses` of each run's training batches on its own path, with columns seed and path.

    `paths` has one array (n, P) per run; batches are named by the steps that use them.
    """
    for run, points in zip(tqdm(runs, desc=f"convexity, {path}"), paths, strict=True):
        found = excesses(run.network(), points, *run.batches(batches))
        yield found.assign(seed=run.config.seed, path=path)


def excesses(net: FlatModel, points: np.ndarray, x: Tensor, y: Tensor) -> pd.DataFrame:
    """By how much each pair of points, (n, P), violates convexity of each batch's loss, if above 0.

    Rows (i, j), one a batch, with `midpoint` = l((x_i + x_j)/2) - (l(x_i) + l(x_j))/2 and
    `tangent`, the larger of l(x_i) + g(x_i) . (x_j - x_i) - l(x_j) and the same with i and j
    exchanged, in nats; `distance` = |x_i - x_j|.
    """
    n, n_batches = len(points), len(x)
    i, j = np.triu_indices(n, 1)
    at = probe.losses(net, points, x, y)
    slopes = np.empty((n, n, n_batches))  # g_k(x_i) . (x_j - x_i)
    for a in range(n):
        away = points - points[a]
        for k, gradient in enumerate(derivatives.each_gradient(net, points[a], x, y)):
            slopes[a, :, k] = away @ gradient
    pairs = zip(i, j, strict=True)
    middle = np.stack([probe.losses(net, (points[a] + points[b]) / 2, x, y) for a, b in pairs])
    tangent = np.maximum(at[i] + slopes[i, j] - at[j], at[j] + slopes[j, i] - at[i])
    return pd.DataFrame(
        {
            "i": np.repeat(i, n_batches),
            "j": np.repeat(j, n_batches),
            "distance": np.repeat(np.linalg.norm(points[i] - points[j], axis=1), n_batches),
            "midpoint": (middle - (at[i] + at[j]) / 2).ravel(),
            "tangent": tangent.ravel(),
        }
    )


@tabulated
def follow(
    runs: Sequence[Run], paths: Sequence[np.ndarray], batches: Sequence[int], path: str = ""
) -> Iterator[pd.DataFrame]:
    """Loss (nats) of each run's training batches at the points of its own path.

    Rows (seed, path, point, position, batch, loss): points are counted from 0, and position is the
    share of the path's length.
    """
    for run, points in zip(tqdm(runs, desc=f"losses, {path}"), paths, strict=True):
        at = lengths(points)
        losses = probe.losses(run.network(), points, *run.batches(batches))
        index = pd.MultiIndex.from_product([range(len(points)), batches], names=["point", "batch"])
        table = pd.DataFrame({"loss": losses.ravel()}, index=index).reset_index()
        position = (at / at[-1])[table.point]
        yield table.assign(position=position, seed=run.config.seed, path=path)


@tabulated
def over_chords(table: pd.DataFrame) -> Iterator[dict]:
    """How far the curve lies above the chord between any two of its points: not at all if convex.

    For the table of `follow` a row per seed, path and three positions: `excess` of the loss at the
    middle one over the chord (nats), a mean over batches, and its standard `error` over batches.
    """
    for (seed, path), losses in table.groupby(["seed", "path"], sort=False):
        wide = losses.pivot(index="position", columns="batch", values="loss").astype(np.float64)
        at, loss = wide.index.to_numpy(), wide.to_numpy()
        i, j, k = np.array(list(itertools.combinations(range(len(at)), 3))).T
        share = ((at[j] - at[i]) / (at[k] - at[i]))[:, None]
        excess = pd.DataFrame(loss[j] - (1 - share) * loss[i] - share * loss[k])
        found = {"excess": excess.mean(axis=1), "error": excess.sem(axis=1)}
        yield {"seed": seed, "path": path, **found}


def dips(
    runs: Sequence[Run], at: Sequence[int], offsets: Sequence[int], n_held: int = 4
) -> pd.DataFrame:
    """How far the batch of each step t in `at` lies below held-out ones at x_{t + offset}.

    Rows (seed, batch, offset), batches named by t. With d = x_{t+offset} - x_t, `dip` = held(t +
    offset) - held(t) - own(t + offset) + own(t) (nats), held being the mean over n_held held-out
    batches, and what derivatives at x_t alone predict: `shared` = (g_held - g_own) . d, if all
    batches share a Hessian, and `own` = shared + d' (H_held - H_own) d / 2, if each has its own.
    ConfigError for no batch or no offset, SnapshotError where the run kept no iterate.
    """
    require(len(at) > 0, "at", list(at), "name at least one step whose batch to follow")
    later = "they must come after the step: 1 or more"
    require(len(offsets) > 0 and min(offsets) >= 1, "offsets", list(offsets), later)

    def one_batch(run: Run, net: FlatModel, t: int) -> pd.DataFrame:
        own, held = run.batches([t]), run.held(t, n_held)
        points = np.array(run.weights[run.rows([t, *(t + k for k in offsets)])])
        start, away = points[0], points[1:] - points[0]
        slope = derivatives.mean_gradient(net, start, *held).astype(np.float64)
        slope -= derivatives.gradients(net, start, *own)[0]
        level = probe.losses(net, points, *held).mean(1, dtype=np.float64)
        level -= probe.losses(net, points, *own)[:, 0]
        shared = away @ slope
        bend = [
            d @ derivatives.mean_hessian_product(net, start, d, *held)
            - d @ derivatives.hessian_vector_products(net, start, d, *own)[0]
            for d in away
        ]
        found = {"dip": level[1:] - level[0], "shared": shared, "own": shared + np.array(bend) / 2}
        return pd.DataFrame({"offset": offsets, **found})

    table = probe.per_run(runs, at, one_batch, "dips after the own step")
    return table.rename(columns={"step": "batch"})
