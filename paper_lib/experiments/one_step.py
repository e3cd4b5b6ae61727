"""Measure what a gradient step of any size does to its own batch and to held-out ones (claim C3).

`measure` walks along the gradients that a run follows, `summary` says what decides the claim, and
`predict_sizes` what batches of other sizes will do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from paper_lib.errors import require
from paper_lib.experiments.tables import tabulated
from paper_lib.probing import derivatives, probe
from paper_lib.runs import Run
from paper_lib.training.flat import FlatModel

MULTIPLES = np.array([0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4])
"""Probe steps over a full step, lr / (1 - momentum)."""

CURVES = ["own", "held", "first", "second"]


def measure(
    runs: Sequence[Run],
    at: Sequence[int],
    n_held: int = 8,
    batch_size: int | None = None,
    multiples: np.ndarray = MULTIPLES,
) -> pd.DataFrame:
    """Probe each run at the snapshots `at`, along the gradient of the batch that is used next.

    Returns one row per seed, snapshot and probe step: `probe` (one of `multiples`), and after the
    step the losses in nats of the batch, `own`, of n_held held-out batches, `held`, and of their
    `first` and `second` half. The batch g has `batch_size` samples (default: the run's), held-out
    ones those of the run. Derivatives at the snapshot, G being the gradient of the first half, H of
    the batch and K of the second half the Hessians: `slope_own` = g.g, `slope_held` = g.G,
    `bend_own` = g'Hg, `bend_held` = g'Kg and `bend_full` = G'Kg, unbiased each.
    ConfigError for fewer than 2 held-out batches, SnapshotError for a snapshot not kept.
    """
    require(n_held >= 2, "n_held", n_held, "halves of them are compared: 2 or more")

    def one(run: Run, net: FlatModel, step: int) -> pd.DataFrame:
        weights, own = np.array(run.at(step)), run.batches([step], batch_size)
        x, y = run.held(step, n_held)
        half = n_held // 2
        gradient = derivatives.gradients(net, weights, *own)[0]
        full = derivatives.mean_gradient(net, weights, x[:half], y[:half]).astype(np.float64)
        product = derivatives.mean_hessian_product(net, weights, gradient, x[half:], y[half:])
        squared = float(gradient @ gradient)
        curvature = float(derivatives.curvature(net, weights, gradient, *own)[0])
        steps = multiples * run.config.lr / (1 - run.config.momentum)
        held = probe.line(net, weights, -gradient, steps, x, y)
        return pd.DataFrame(
            {
                "probe": multiples,
                "own": probe.line(net, weights, -gradient, steps, *own)[:, 0],
                "held": held.mean(1),
                "first": held[:, :half].mean(1),
                "second": held[:, half:].mean(1),
                "slope_own": squared,
                "slope_held": float(gradient @ full),
                "bend_own": squared * curvature,
                "bend_held": float(gradient @ product),
                "bend_full": float(full @ product),
            }
        )

    size = batch_size or runs[0].config.batch_size
    return probe.per_run(runs, at, one, f"one step, batches of {size}").assign(size=size)


def along_own_step(
    runs: Sequence[Run],
    at: Sequence[int],
    n_held: int = 8,
    multiples: np.ndarray = MULTIPLES,
) -> pd.DataFrame:
    """Probe each run at the snapshots `at`, along the step that its optimizer took there.

    The step is d = x_{t+1} - x_t, whatever took it; `probe` are multiples of it. One row per seed,
    snapshot and probe step: losses of the step's batch, `own`, and of n_held held-out ones, `held`,
    and the parabola of the own batch's loss by its slope and curvature there, `parabola`.
    SnapshotError where x_t or x_{t+1} was not kept.
    """

    def one(run: Run, net: FlatModel, step: int) -> pd.DataFrame:
        x, later = (np.array(run.at(t)) for t in (step, step + 1))
        own, direction = run.batches([step]), later - x
        slope = float(derivatives.gradients(net, x, *own)[0] @ direction)
        bend = float(derivatives.curvature(net, x, direction, *own)[0] * (direction @ direction))
        losses = probe.line(net, x, direction, multiples, *own)[:, 0]
        held = probe.line(net, x, direction, multiples, *run.held(step, n_held)).mean(1)
        model = losses[0] + slope * multiples + bend * multiples**2 / 2
        return pd.DataFrame({"probe": multiples, "own": losses, "held": held, "parabola": model})

    return probe.per_run(runs, at, one, "the optimizer's own step")


def trained_loss(runs: Sequence[Run], n_batches: int) -> pd.Series:
    """Mean training loss (nats) at the end of each run, by seed.

    Over n_batches batches of the run's size, of a stream that no run uses.
    """
    losses = {}
    for run in runs:
        c = run.config
        batches = probe.fixed_batches(run.dataset, n_batches, c.batch_size, c.seed)
        losses[c.seed] = float(probe.losses(run.network(), run.at(c.steps), *batches).mean())
    return pd.Series(losses, name="trained").rename_axis("seed")


def curves(table: pd.DataFrame) -> pd.DataFrame:
    """Average the snapshots of each seed: rows (size, seed, probe), other columns are means."""
    means = table.groupby(["size", "seed", "probe"], sort=False).mean()
    return means.drop(columns="step").reset_index()


def minimum(probe_steps: np.ndarray, loss: np.ndarray) -> tuple[float, float]:
    """Place and value of a curve's minimum, from steps and losses (n,), steps ascending.

    It is that of the parabola through the lowest point and the two beside it; where that has none
    between them, the least value.
    """
    i = int(np.clip(np.argmin(loss), 1, len(loss) - 2))
    a, b, c = np.polyfit(probe_steps[i - 1 : i + 2], loss[i - 1 : i + 2], 2)
    if not (a > 0 and probe_steps[i - 1] <= -b / (2 * a) <= probe_steps[i + 1]):
        i = int(np.argmin(loss))  # the least value stands at an end of the curve
        return float(probe_steps[i]), float(loss[i])
    return float(-b / (2 * a)), float(c - b * b / (4 * a))


@tabulated
def summary(table: pd.DataFrame) -> Iterator[dict]:
    """What decides C3, one row per size and seed, from that seed's mean curves.

    start, own_min, held_min (losses in nats), own_best, held_best, first_best and second_best
    (probe steps over a full one), own_change and held_change (nats, at the own batch's best step);
    squared = |g|^2, full = |G|^2 and the curvatures h_own, h_held, along g, and h_full, along G.
    """
    for (size, seed), curve in curves(table).groupby(["size", "seed"], sort=False):
        x, start = curve.probe.to_numpy(), curve.iloc[0]
        least = {name: minimum(x, curve[name].to_numpy()) for name in CURVES}
        yield {
            "size": size,
            "seed": seed,
            "start": start.own,
            **{f"{name}_best": best for name, (best, _) in least.items()},
            "own_min": least["own"][1],
            "held_min": least["held"][1],
            "own_change": least["own"][1] - start.own,
            "held_change": np.interp(least["own"][0], x, curve.held) - start.held,
            "squared": start.slope_own,
            "full": start.slope_held,
            "h_own": start.bend_own / start.slope_own,
            "h_held": start.bend_held / start.slope_own,
            "h_full": start.bend_full / start.slope_held,
        }


@tabulated
def predict_sizes(seeds: pd.DataFrame, sizes: Sequence[float]) -> Iterator[dict]:
    """What batches of `sizes` do, from the rows of `summary` for one size: rows (size, seed).

    A batch of B has |g|^2 = |G|^2 + s / B, along it the mean curvature h_held = (|G|^2 h_full + s
    h_noise / B) / |g|^2, and its own h_own = h_held + kappa / B; s, h_noise and kappa follow from
    the rows. `own_min` = start - |g|^2 / (2 h_own), of the batch's own parabola.
    """
    size = np.asarray(sizes, dtype=np.float64)
    for row in seeds.itertuples():
        noise = row.size * (row.squared - row.full)  # s
        bend = row.size * (row.squared * row.h_held - row.full * row.h_full)  # s h_noise
        kappa = row.size * (row.h_own - row.h_held)
        squared = row.full + noise / size
        h_held = (row.full * row.h_full + bend / size) / squared
        h_own = h_held + kappa / size
        found = {"size": sizes, "seed": row.seed, "h_held": h_held, "h_own": h_own}
        yield found | {"own_min": row.start - squared / (2 * h_own)}


def boundary(sizes: Sequence[float], own_min: Sequence[float], trained: float) -> float:
    """Batch size from which on the own batch's least loss is above `trained`, NaN if none is.

    Between sizes, ascending, it is interpolated in their logarithm.
    """
    logs, above = np.log(np.asarray(sizes)), np.asarray(own_min) - trained
    if not above[0] < 0 <= above[-1]:
        return float("nan")
    i = int(np.argmax(above >= 0))
    share = -above[i - 1] / (above[i] - above[i - 1])
    return float(np.exp(logs[i - 1] + share * (logs[i] - logs[i - 1])))
