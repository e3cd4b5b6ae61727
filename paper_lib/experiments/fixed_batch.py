"""Follow the loss of one fixed batch along a trajectory (claim C1).

`around` and `dip` show the dip that the batch's own step leaves, `history` the whole run, and
`convexity` tests the inequalities of a convex function between points of a path.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.optimize import nnls
from torch import Tensor
from tqdm import tqdm

from paper_lib.errors import require
from paper_lib.probing import derivatives, probe
from paper_lib.runs import Run
from paper_lib.training.flat import FlatModel

# --- the window around a batch's own step -------------------------------------------------------


def around(
    runs: Sequence[Run], at: Sequence[int], before: int, after: int, n_held: int = 4
) -> pd.DataFrame:
    """Follow the batch of each step t in `at` from x_{t - before} to x_{t + after}.

    Returns one row per seed, batch (named by t) and offset s: `own`, the batch's loss at x_{t+s}
    (its own step leads from offset 0 to 1), and what the model predicts from gradients at x_t
    alone. If all batches share a Hessian, own and held-out loss differ by a linear function; if the
    held-out loss is stationary, then on average `predicted` = own(0) + (g_own - g_held) . (x_{t+s}
    - x_t), with g_held the mean over n_held held-out batches. `bend_own` and `bend_held` are what
    both losses gain over the own step beyond first order: equal in the model. All are in nats.
    Raises ConfigError for an empty window, SnapshotError where the run did not keep it.
    """
    allowed = "it is empty: before >= 0 and after >= 1"
    require(before >= 0 and after >= 1, "window", (-before, after), allowed)
    require(len(at) > 0, "at", list(at), "name at least one step whose batch to follow")

    def follow(run: Run, net: FlatModel, t: int) -> pd.DataFrame:
        own, held = run.batches([t]), run.held(t, n_held)
        window, start = run.window(t - before, t + after), np.array(run.at(t))
        g_own = derivatives.gradients(net, start, *own)[0]
        g_held = derivatives.mean_gradient(net, start, *held)
        # in float64, as their products with a gradient nearly cancel
        away = [(row - start).astype(np.float64) for row in window]
        loss = probe.losses(net, window, *own)[:, 0].astype(np.float64)
        beside = probe.losses(net, window[before : before + 2], *held).mean(1)
        columns = {
            "offset": np.arange(-before, after + 1),
            "own": loss,
            "predicted": loss[before] + np.array([np.dot(g_own - g_held, d) for d in away]),
            "bend_own": loss[before + 1] - loss[before] - np.dot(g_own, away[before + 1]),
            "bend_held": beside[1] - beside[0] - np.dot(g_held, away[before + 1]),
        }
        return pd.DataFrame(columns)

    table = probe.per_run(runs, at, follow, "around the own step")
    return table.rename(columns={"step": "batch"})


def dip(table: pd.DataFrame) -> pd.DataFrame:
    """How far a batch's loss lies below its level before its own step: a row per seed, offset >= 1.

    Means over batches: `dip` measured and `predicted` (nats), `level` = mean own loss over offsets
    <= 0, `k` = offset - 1.
    """
    level = table.query("offset <= 0").groupby("seed").own.mean().rename("level")
    start = table.query("offset == 0").groupby("seed").own.mean().rename("start")
    after = table.query("offset >= 1").groupby(["seed", "offset"])[["own", "predicted"]].mean()
    means = after.reset_index().join(level, on="seed")
    # the prediction starts from the loss at x_t
    predicted = means.join(start, on="seed").start - means.predicted
    found = means.assign(dip=means.level - means.own, predicted=predicted, k=means.offset - 1)
    return found.drop(columns="own")


def fit_mixture(dips: np.ndarray, n_rates: int) -> tuple[np.ndarray, np.ndarray]:
    """Least-squares fit of dips[k] = sum_j a_j q_j^k, a_j >= 0: (a, q), each (n_rates,), q falling.

    The model's dip (theory: 2 eta s2 q^k in each direction) is such a mixture over curvatures,
    q = 1 - lr h. Raises ConfigError for fewer than 2 n_rates + 1 dips.
    """
    allowed = f"{n_rates} rate(s) need more than {2 * n_rates} values"
    require(len(dips) > 2 * n_rates, "dips", len(dips), allowed)
    k, least = np.arange(len(dips)), np.inf
    decay_times = np.geomspace(3 * len(dips), 0.3, 60)  # in steps
    for taus in itertools.combinations(decay_times, n_rates):
        q = np.exp(-1 / np.array(taus))
        amplitudes, error = nnls(q[None, :] ** k[:, None], dips)
        if error < least:
            least, best = error, (amplitudes, q)
    return best


# --- the whole run ------------------------------------------------------------------------------


def history(
    runs: Sequence[Run], batches: Sequence[int], steps: Sequence[int] | None = None
) -> pd.DataFrame:
    """Loss of fixed batches at the snapshots `steps` (default: all), in nats.

    Rows (step, batch, loss, seed); batches are named by the steps that use them.
    Raises SnapshotError for snapshots that were not kept.
    """
    tables = []
    for run in runs:
        kept = run.steps if steps is None else np.asarray(steps)
        weights = run.weights[run.rows(kept)]
        losses = probe.losses(run.network(), weights, *run.batches(batches), progress="whole run")
        index = pd.MultiIndex.from_product([kept, batches], names=["step", "batch"])
        table = pd.DataFrame({"loss": losses.ravel()}, index=index).reset_index()
        tables.append(table.assign(seed=run.config.seed))
    return pd.concat(tables, ignore_index=True)


# --- convexity between points of a path ---------------------------------------------------------

NOISE = 1e-5  # nats: float32 losses of order 1 are good to about 1e-6; less is no violation


def along(run: Run, first: int, last: int, n: int = 9) -> np.ndarray:
    """n iterates from x_first to x_last, (n, P), about equally far apart in time.

    Raises ConfigError for an empty window, SnapshotError for iterates that were not kept.
    """
    allowed = "it is empty: the last step must come after the first"
    require(last > first, "window", (first, last), allowed)
    steps = np.unique(np.linspace(first, last, n).round().astype(int))
    return np.array(run.weights[run.rows(steps)])


def random_path(points: np.ndarray, seed: int = 0) -> np.ndarray:
    """A path with the start and the step lengths of `points`, (n, P), but random directions."""
    shape = len(points) - 1, points.shape[1]
    steps = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    lengths = np.linalg.norm(np.diff(points, axis=0), axis=1) / np.linalg.norm(steps, axis=1)
    return np.concatenate([points[:1], points[0] + np.cumsum(lengths[:, None] * steps, axis=0)])


def segment(start: np.ndarray, end: np.ndarray, n: int = 9) -> np.ndarray:
    """n points on the straight line between two weight vectors, both included, (n, P)."""
    return start + np.linspace(0, 1, n, dtype=np.float32)[:, None] * (end - start)


def convexity(
    runs: Sequence[Run],
    paths: Sequence[np.ndarray],
    batches: Sequence[int],
    split: str = "train",
    path: str = "",
) -> pd.DataFrame:
    """`excesses` of each run's batches on its own path, with columns seed and path.

    `paths` has one array (n, P) per run; `split` "train" or "held" says whose batches.
    """
    tables = []
    for run, points in zip(tqdm(runs, desc=f"convexity, {path}"), paths, strict=True):
        c = run.config
        stacked = run.dataset.batches(batches, c.batch_size, c.stream, split)
        tables.append(excesses(run.network(), points, *stacked).assign(seed=c.seed, path=path))
    return pd.concat(tables, ignore_index=True)


def excesses(net: FlatModel, points: np.ndarray, x: Tensor, y: Tensor) -> pd.DataFrame:
    """By how much each pair of points, (n, P), violates convexity of each batch's loss, if above 0.

    Rows (i, j, batch) with `midpoint` = l((x_i + x_j)/2) - (l(x_i) + l(x_j))/2 and `tangent`, the
    larger of l(x_i) + g(x_i) . (x_j - x_i) - l(x_j) and the same with i and j exchanged, in nats;
    `distance` = |x_i - x_j|.
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
            "batch": np.tile(np.arange(n_batches), len(i)),
            "distance": np.repeat(np.linalg.norm(points[i] - points[j], axis=1), n_batches),
            "midpoint": (middle - (at[i] + at[j]) / 2).ravel(),
            "tangent": tangent.ravel(),
        }
    )
