"""Measure how gradients of batches align with the full one and with later ones (claim C4).

"Full gradient" means the expected gradient of a batch. Its squared norm and its inner products are
estimated from different batches, so that no batch's noise meets itself and nothing has to be
corrected.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from paper_lib.errors import require
from paper_lib.experiments.tables import tabulated
from paper_lib.probing.derivatives import full_gradients
from paper_lib.runs import Run


@tabulated
def measure_lags(
    runs: Sequence[Run], first: int, n_lags: int = 21, n_points: int = 100, n_batches: int = 4
) -> Iterator[dict]:
    """Inner products of gradients k = 0..n_lags-1 steps apart, from step `first` to each run's end.

    One row per seed and lag: means over n_points steps t, in units of E|g|^2, of `used` =
    g_t . g_{t+k}, `full` = G_t . g_{t+k} with G_t from n_batches held-out batches, `predicted`,
    what the model makes of G_t for `used` (see `model_product`), and two controls: `plain`, the
    same without momentum, and `unrelated`, `used` with the later gradient of the next run.
    ConfigError where fewer steps than lags follow the first, SnapshotError for iterates not kept.
    """
    for run, other in zip(runs, [*runs[1:], runs[0]], strict=True):
        c = run.config
        last = c.steps - n_lags
        allowed = f"{n_lags} lags need as many steps after the first"
        require(last >= first, "window", (first, c.steps), allowed)
        steps = np.unique(np.linspace(first, last, n_points).astype(int))
        sums = np.zeros((5, n_lags))
        for t, _, full in full_gradients(run, steps, n_batches):
            g, v = run.gradients(t, t + n_lags - 1)
            later = other.gradients(t, t + n_lags - 1)[0]
            predicted = model_product(g @ full, v @ full, c.momentum)
            plain = np.append(np.nan, -(g @ full)[:-1])
            sums += [g @ g[0], g @ full, predicted, plain, later @ g[0]]
        names = ("used", "full", "predicted", "plain", "unrelated")
        columns = dict(zip(names, sums / sums[0, 0], strict=True))
        yield {"seed": c.seed, "lag": np.arange(n_lags), **columns}


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
    runs: Sequence[Run], first: int, windows: Sequence[int], n_points: int = 40, n_batches: int = 4
) -> pd.DataFrame:
    """Full gradient G_t against the displacement of x_t from the mean of iterates around it.

    The mean is over the iterates within window / 2 steps of t, for even windows. One row per seed
    and window, means over n_points steps t: `work` = G_t . (x_t - mean) in units of lr E|g_t|^2 /
    2, where the model has it once the window is longer than every timescale; `cosine` of the
    displacement and the expectation of G_t, whose squared norm is E G_t . g_t.
    ConfigError for windows longer than the run after the first step.
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
