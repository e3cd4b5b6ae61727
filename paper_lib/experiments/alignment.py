"""Measure how gradients of batches align: with each other, the full one, and later ones (claim C4).

"Full gradient" means the expected gradient of a batch. Its squared norm and its inner products are
estimated from different batches, so that no batch's noise meets itself and nothing has to be
corrected.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from paper_lib.errors import require
from paper_lib.probing import derivatives, probe
from paper_lib.probing.derivatives import full_gradients
from paper_lib.runs import Run
from paper_lib.training.flat import FlatModel

# --- several batches at one point ---------------------------------------------------------------


def measure_points(
    runs: Sequence[Run], at: Sequence[int], sizes: Sequence[int] | None = None, n_images: int = 2048
) -> pd.DataFrame:
    """Norms and cosines of the gradients of K fresh batches at the snapshots `at`, for each size.

    K is n_images / size, between 8 and 64. One row per seed, step and size, with the columns of
    `alignment`. Default for `sizes`: the run's own batch size.
    Raises SnapshotError for a snapshot that was not kept.
    """

    def at_point(run: Run, net: FlatModel, step: int) -> pd.DataFrame:
        rows = []
        for size in sizes or [run.config.batch_size]:
            k = int(np.clip(n_images // size, 8, 64))
            batches = probe.fixed_batches(run.dataset, k, size, seed=step + run.config.seed)
            gram = derivatives.gram(net, np.array(run.at(step)), *batches)
            rows.append({"size": size, **alignment(gram)})
        return pd.DataFrame(rows)

    table = probe.per_run(runs, at, at_point, "gradients of fresh batches")
    return table.set_index(["seed", "step", "size"]).reset_index()


def alignment(gram: np.ndarray) -> dict[str, float]:
    """What the Gram matrix (K, K) of K batch gradients g_k says about alignment.

    `norm2` = E|g|^2; `full2` = |E g|^2, from pairs; `noise2` = their difference; `batch_batch` =
    mean cosine of two batches; `batch_full` = mean cosine of a batch and the mean of the K - 1
    others; `batch_full_predicted` = the same from batch_batch = c: c / sqrt(c + (1 - c) / (K - 1)),
    which tends to sqrt(c) for many batches. Raises ConfigError for K < 3.
    """
    k = len(gram)
    require(k >= 3, "number of batches", k, "alignment needs at least 3")
    norms, pairs = np.sqrt(np.diag(gram)), ~np.eye(k, dtype=bool)
    norm2, full2 = np.mean(norms**2), gram[pairs].mean()
    c = (gram / np.outer(norms, norms))[pairs].mean()
    with_others = gram.sum(1) - norms**2  # g_k . sum of the others
    others_norm = np.sqrt(gram.sum() - 2 * with_others - norms**2)
    rest = max(c, 0) + (1 - c) / (k - 1)
    return {
        "norm2": norm2,
        "full2": full2,
        "noise2": norm2 - full2,
        "batch_batch": c,
        "batch_full": np.mean(with_others / (norms * others_norm)),
        "batch_full_predicted": c / np.sqrt(rest),
    }


# --- gradients used along the trajectory --------------------------------------------------------


def measure_lags(
    runs: Sequence[Run], first: int, n_lags: int = 21, n_points: int = 100, n_batches: int = 4
) -> pd.DataFrame:
    """Inner products of gradients k = 0..n_lags-1 steps apart, from step `first` to each run's end.

    One row per seed and lag: means over n_points steps t, in units of E|g|^2, of `used` =
    g_t . g_{t+k}, `full` = G_t . g_{t+k}, where G_t is a full gradient estimated from n_batches
    held-out batches (so that this has the expectation of G_t . G_{t+k}), and `predicted`, what the
    model makes of G_t for `used` (see `model_product`).
    Raises ConfigError where fewer steps than lags follow the first, SnapshotError for steps of
    which the iterates were not kept.
    """
    tables = []
    for run in runs:
        c = run.config
        last = c.steps - n_lags
        allowed = f"{n_lags} lags need as many steps after the first"
        require(last >= first, "window", (first, c.steps), allowed)
        steps = np.unique(np.linspace(first, last, n_points).astype(int))
        sums = np.zeros((3, n_lags))
        for t, _, full in full_gradients(run, steps, n_batches):
            g, v = run.gradients(t, t + n_lags - 1)
            sums += [g @ g[0], g @ full, model_product(g @ full, v @ full, c.momentum)]
        columns = dict(zip(("used", "full", "predicted"), sums / sums[0, 0], strict=True))
        tables.append(pd.DataFrame({"seed": c.seed, "lag": np.arange(n_lags), **columns}))
    return pd.concat(tables, ignore_index=True)


def model_product(full_g: np.ndarray, full_v: np.ndarray, momentum: float = 0.0) -> np.ndarray:
    """What the stationary model predicts for E g_t . g_{t+k}, whatever the curvatures are.

    From full_g = E G_t . g_{t+k} and full_v = E G_t . v_{t+k}, (n,) each; (n,), NaN at lag 0. It is

        full_g[k] - (1 - m) (full_v[k] + full_v[k-1]),

    which for m = 0, where v = g, is -full_g[k-1]: the gradients used at t and t + k are as opposed
    as the full gradients at t and t + k - 1 are aligned. It is `quadratic.gradient_cosine` summed
    over directions (claim C4).
    """
    return np.append(np.nan, full_g[1:] - (1 - momentum) * (full_v[1:] + full_v[:-1]))


def measure_displacement(
    runs: Sequence[Run],
    first: int,
    windows: Sequence[int],
    n_points: int = 40,
    n_batches: int = 4,
) -> pd.DataFrame:
    """Full gradient G_t against the displacement of x_t from the mean of iterates around it.

    The mean is over the iterates within window / 2 steps of t: windows are even, and it has as many
    before t as after it, window + 1 in all. One row per seed and window, means over n_points steps
    t: `work` = G_t . (x_t - mean) in units of lr E|g_t|^2 / 2, where the model has it once the mean
    is the minimum, i.e. the window longer than every timescale; `cosine` of the displacement and
    the expectation of G_t, whose squared norm is E G_t . g_t.
    Raises ConfigError for windows longer than the run after the first step.
    """
    half, rows = max(windows) // 2, []
    for run in runs:
        c = run.config
        steps = np.arange(first + half, c.steps - half)
        allowed = f"the run has {c.steps - first} steps after the first"
        require(len(steps) > 0, "windows", tuple(windows), allowed)
        steps = np.unique(np.linspace(steps[0], steps[-1], n_points).astype(int))
        for t, x, full in full_gradients(run, steps, n_batches):
            g = run.gradients(t, t)[0][0]
            for w in windows:
                away = x - run.window(t - w // 2, t + w // 2).mean(0)
                rows.append((c.seed, w, full @ away, c.lr * (g @ g) / 2, full @ g, away @ away))
    columns = ["seed", "window", "product", "scale", "full2", "away2"]
    means = pd.DataFrame(rows, columns=columns).groupby(["seed", "window"]).mean()
    cosine = means["product"] / np.sqrt(means.full2.clip(lower=0) * means.away2)
    work = means["product"] / means.scale
    return pd.DataFrame({"work": work, "cosine": cosine}).reset_index()


def measure_eta(
    runs: Sequence[Run], first: int, n_points: int = 12, n_batches: int = 4
) -> pd.Series:
    """lr E[g^T H g] / E|g|^2 by seed: the mean eta over the directions of batch gradients g.

    Means over n_points steps from `first` on. H is the Hessian of n_batches held-out batches at the
    same point; the model has cos(batch, batch) at half of this.
    """
    etas = {}
    for run in runs:
        net, c = run.network(), run.config
        products = np.zeros(2)
        for t in np.linspace(first, c.steps - 1, n_points).astype(int):
            g = run.gradients(t, t)[0][0]
            held = run.held(t, n_batches)
            curvatures = derivatives.curvature(net, np.array(run.at(t)), g, *held)
            products += [(curvatures.mean() + c.weight_decay) * (g @ g), g @ g]
        etas[c.seed] = c.lr * products[0] / products[1]
    return pd.Series(etas, name="eta").rename_axis("seed")
