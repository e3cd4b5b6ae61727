"""Measure what a gradient step of any size does to its own batch and to held-out ones (claim C3).

`measure` walks along the gradients that a run follows, `predict` and `summary` say what the
quadratic model makes of it, `both_halves` and `by_size` look for where the claim ends.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from torch import Tensor

from paper_lib.probing import derivatives, probe
from paper_lib.runs import Run
from paper_lib.training.flat import FlatModel

MULTIPLES = np.array(
    [0, 0.001, 0.005, 0.02, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0]
)
"""Probe steps over the learning rate: small ones show the slope, a dense middle both optima."""

# --- walking along gradients --------------------------------------------------------------------


def measure(
    runs: Sequence[Run],
    at: Sequence[int],
    n_batches: int = 1,
    n_held: int = 4,
    batch_size: int | None = None,
    frozen: bool = False,
    multiples: np.ndarray = MULTIPLES,
    point: str = "",
) -> pd.DataFrame:
    """Probe each run at the snapshots `at`, along the gradients of the n_batches batches used next.

    Returns one row per seed, snapshot, batch and probe step: `probe` (one of `multiples`, in units
    of lr), `own` and `held` (loss in nats of the batch, and mean loss of n_held held-out batches,
    after the step), with `slope_own` = |g|^2, `slope_held` = g . (mean held-out gradient) and
    `curvature` = g^T H g / |g|^2 of the batch's own loss at the snapshot. The probe takes batches
    of `batch_size` (default: the run's); `frozen` evaluates with the snapshot's running statistics.
    Raises SnapshotError for a snapshot that was not kept.
    """

    def along_batches(run: Run, net: FlatModel, step: int) -> pd.DataFrame:
        weights = np.array(run.at(step))
        buffers = np.array(run.buffers[run.rows(step)[0]]) if frozen else None
        tables = []
        for batch in range(step, step + n_batches):
            own, held = run.batches([batch], batch_size), run.held(batch, n_held, batch_size)
            table = _probe_one(net, weights, own, held, multiples * run.config.lr, buffers)
            tables.append(table.assign(probe=multiples, batch=batch))
        return pd.concat(tables)

    return probe.per_run(runs, at, along_batches, f"one step {point}".strip()).assign(point=point)


def _probe_one(
    net: FlatModel,
    weights: np.ndarray,
    own: tuple[Tensor, Tensor],
    held: tuple[Tensor, Tensor],
    steps: np.ndarray,
    buffers: np.ndarray | None,
) -> pd.DataFrame:
    """The table of one snapshot and one batch, a row for each of the probe steps."""
    gradient = derivatives.gradients(net, weights, *own, buffers)[0]
    held_gradient = derivatives.mean_gradient(net, weights, *held, buffers)
    return pd.DataFrame(
        {
            "own": probe.line(net, weights, -gradient, steps, *own, buffers)[:, 0],
            "held": probe.line(net, weights, -gradient, steps, *held, buffers).mean(1),
            "slope_own": float(gradient @ gradient),
            "slope_held": float(gradient @ held_gradient),
            "curvature": float(derivatives.curvature(net, weights, gradient, *own, buffers)[0]),
        }
    )


def trained_loss(
    runs: Sequence[Run], n_batches: int, batch_size: int | None = None, frozen: bool = False
) -> pd.Series:
    """Mean training loss (nats) at the end of each run, by seed.

    Over n_batches batches of a stream that no run uses; `batch_size` and `frozen` as in `measure`.
    """
    losses = {}
    for run in runs:
        end, c = run.state(), run.config
        batches = probe.fixed_batches(run.dataset, n_batches, batch_size or c.batch_size, c.seed)
        buffers = end["buffers"] if frozen else None
        losses[c.seed] = float(
            probe.losses(run.network(), end["weights"], *batches, buffers).mean()
        )
    name = "training loss of the fully trained network"
    return pd.Series(losses, name=name).rename_axis("seed")


# --- curves and what they say -------------------------------------------------------------------


def curves(table: pd.DataFrame) -> pd.DataFrame:
    """Average the snapshots of each seed: rows (point, seed, probe), other columns are means."""
    means = table.groupby(["point", "seed", "probe"], sort=False).mean()
    return means.drop(columns=["step", "batch"]).reset_index()


def predict(table: pd.DataFrame, lr: float, momentum: float = 0.0) -> pd.DataFrame:
    """The quadratic model's curves at stationarity, from slopes at zero alone: probe, own, held.

    On held-out data the loss must be back at its start after a full step lr / (1 - m), whatever
    the curvatures, so E[g^T H g] / 2 = slope_held / lr: held(s) = held(0) - slope_held s
    (1 - s / lr), own(s) = own(0) - slope_own s + slope_held s^2 / lr (theory: the rows "own-batch
    loss" and "held-out loss after a probe step").
    """
    columns = ["own", "held", "slope_own", "slope_held"]
    start = table.query("probe == 0").groupby("seed")[columns].mean().mean()
    s = np.unique(table.probe) * lr
    full = lr / (1 - momentum)
    return pd.DataFrame(
        {
            "probe": s / lr,
            "own": start.own - start.slope_own * s + start.slope_held * s**2 / full,
            "held": start.held - start.slope_held * s * (1 - s / full),
        }
    )


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


def summary(table: pd.DataFrame, lr: float) -> pd.DataFrame:
    """What decides C3, one row per point and seed, from that seed's mean curves.

    own_start, own_min, held_start, held_min (losses in nats), own_best, held_best (probe steps in
    units of lr), held_at_own (held-out loss at the own batch's best step), held_full (after a full
    step), `gain` = lr * slope_held (the decrease that the held-out slope alone would give),
    inverse_curvature = 1 / (lr E[g^T H g] / E|g|^2) in units of lr, `shared` = slope_held /
    slope_own, the cosine of two batches' gradients.
    """
    starts = dict(list(table.query("probe == 0").groupby(["point", "seed"])))
    rows = []
    for (point, seed), curve in curves(table).groupby(["point", "seed"], sort=False):
        x, own, held = (curve[name].to_numpy() for name in ("probe", "own", "held"))
        (own_best, own_min), (held_best, held_min) = minimum(x, own), minimum(x, held)
        start, slope_held = starts[point, seed], curve.slope_held.iloc[0]
        curvature = np.average(start.curvature, weights=start.slope_own)
        row = {"point": point, "seed": seed}
        row |= {"own_start": own[0], "own_min": own_min, "own_best": own_best}
        row |= {"held_start": held[0], "held_min": held_min, "held_best": held_best}
        row |= {"held_at_own": np.interp(own_best, x, held), "held_full": np.interp(1.0, x, held)}
        row |= {"gain": lr * slope_held, "inverse_curvature": 1 / (lr * curvature)}
        rows.append(row | {"shared": slope_held / curve.slope_own.iloc[0]})
    return pd.DataFrame(rows)


# --- where the claim ends -----------------------------------------------------------------------

FAR = np.array([0, *np.geomspace(0.06, 60, 13)])
"""Probe steps over a full step: from far below half of it to far beyond 1 / curvature."""
IMAGES = 256  # held-out images that a probe is judged by, unless its batch is larger
TRAINED_IMAGES = 2048  # images in an estimate of the fully trained network's loss


def both_halves(
    runs: Sequence[Run],
    decayed: Sequence[Run],
    at: Sequence[int],
    batch_size: int | None = None,
    frozen: bool = False,
    n_batches: int = 1,
    point: str = "",
) -> pd.DataFrame:
    """One row per seed: `summary` with both halves of the claim; arguments as in `measure`.

    `ratio` = own-batch minimum over the loss of the fully trained networks, the runs `decayed`,
    with the same batch `size` and `statistics`; `held_change` = change of the held-out loss (nats)
    at the own batch's best step. own_best and held_best are in units of a full step lr / (1 - m).
    """
    config = runs[0].config
    size, full = batch_size or config.batch_size, 1 / (1 - config.momentum)
    n_held, n_trained = max(1, IMAGES // size), max(1, TRAINED_IMAGES // size)
    table = measure(runs, at, n_batches, n_held, size, frozen, FAR * full, point)
    trained = trained_loss(decayed, n_trained, size, frozen)
    seeds = summary(table, config.lr)
    return seeds.assign(
        size=size,
        statistics="running" if frozen else "batch",
        ratio=seeds.own_min / seeds.seed.map(trained),
        held_change=seeds.held_at_own - seeds.held_start,
        held_best=seeds.held_best / full,
        own_best=seeds.own_best / full,
    )


def by_size(
    runs: Sequence[Run], decayed: Sequence[Run], at: Sequence[int], sizes: Sequence[int]
) -> pd.DataFrame:
    """`both_halves` for probe batches of each size, with batch and with running statistics.

    The larger the batch, the less it scatters and the fewer of the snapshots `at` are probed.
    """
    tables = []
    for size in sizes:
        n = int(np.clip(2 * IMAGES // size, 1, len(at)))
        steps = [at[i] for i in np.linspace(0, len(at) - 1, n).astype(int)]
        for frozen in (False, True):
            point = f"{size}, {'running' if frozen else 'batch'} statistics"
            tables.append(both_halves(runs, decayed, steps, size, frozen, point=point))
    return pd.concat(tables, ignore_index=True)


def predicted_best(size: np.ndarray, reference: int, shared: float) -> np.ndarray:
    """Best held-out step over lr for probe batches of `size`, in a run with batches of `reference`.

    With one curvature, the stationary variance v stays and the scatter of minima is s2 reference /
    size, so the best step v / (v + s2 reference / size) is 1/2 lr / (c + (1 - c) reference / size),
    where c = v / (v + s2) is `shared`, the cosine of two batches' gradients at the reference size:
    1/2 at that size, 1 / curvature for large batches.
    """
    return 0.5 / (shared + (1 - shared) * reference / np.asarray(size))
