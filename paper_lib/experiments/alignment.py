"""Measure how gradients used along a run align with later ones and with the full one (claim C4).

"Full gradient" means the expected gradient of a batch. Its inner products are estimated from
batches that the run did not see, so that no batch's noise meets itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from paper_lib.errors import require
from paper_lib.probing import derivatives
from paper_lib.probing.derivatives import full_gradients
from paper_lib.runs import Run
from paper_lib.theory import quadratic
from paper_lib.theory.spectrum import Directions


def measure_lags(
    runs: Sequence[Run], first: int, n_lags: int = 21, n_points: int = 100, n_batches: int = 4
) -> pd.DataFrame:
    """Inner products of gradients k = 0..n_lags-1 steps apart, from step `first` to each run's end.

    One row per seed and lag: means over n_points steps t, in units of E|g|^2, of `used` =
    g_t . g_{t+k}, `full` = G_t . g_{t+k}, where G_t is a full gradient estimated from n_batches
    held-out batches (so that this has the expectation of G_t . G_{t+k}), `predicted`, what the
    model makes of G_t for `used` (see `model_product`), and `plain`, the same but for momentum.
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
        sums = np.zeros((4, n_lags))
        for t, _, full in full_gradients(run, steps, n_batches):
            g, v = run.gradients(t, t + n_lags - 1)
            products = g @ full, v @ full
            laws = model_product(*products, c.momentum), model_product(products[0], products[0])
            sums += [g @ g[0], products[0], *laws]
        names = ("used", "full", "predicted", "plain")
        columns = dict(zip(names, sums / sums[0, 0], strict=True))
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


def slopes(table: pd.DataFrame, y: str, x: str, last: int = 10) -> pd.Series:
    """Slope of columns y against x of `measure_lags`, through the origin, by seed.

    Over lags 1..last. 1 where x predicts y; unlike in a mean of ratios, lags at which both vanish
    weigh nothing.
    """
    chosen = table[table.lag.between(1, last)]
    sums = pd.DataFrame({"xy": chosen[x] * chosen[y], "xx": chosen[x] ** 2})
    sums = sums.groupby(chosen.seed).sum()
    return sums.xy / sums.xx


def lag_law(directions: Directions, lr: float, n: int, momentum: float = 0.0) -> np.ndarray:
    """What a spectrum makes of `used` in `measure_lags`, lags 0..n-1: nothing of it is a product.

    `quadratic.gradient_cosine` of each direction, weighted by its share of E|g|^2 = h^2 v + g2.
    """
    norm2 = directions.h**2 * directions.variances(lr, momentum) + directions.noise
    return norm2 @ quadratic.gradient_cosine(lr * directions.h, n, momentum) / norm2.sum()


def finite_work(directions: Directions, lr: float, windows: Sequence[int]) -> np.ndarray:
    """What the model makes of `work` in `measure_displacement`, with windows as short, (n,).

    In a direction E G . (x_t - x_s) is h/2 times the squared displacement at lag |t - s|; it is in
    units of lr E|g|^2 / 2, where E|g|^2 = sum h^2 v + g2.
    """
    h, noise = directions.h, directions.noise
    weighted = Directions(h, h * noise)
    norm2 = np.sum(h**2 * directions.variances(lr) + noise)
    lags = [np.abs(np.arange(-(w // 2), w // 2 + 1)) for w in windows]
    return np.array([weighted.displacement(lr, k).mean() for k in lags]) / (lr * norm2)


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
