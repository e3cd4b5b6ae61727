"""Measure how well a parabola fits the loss of one batch on lines in weight space (claim C2).

`from_points` and `on_chords` record the lines; `fits`, `predicted_minima` and `secants` say how far
they are parabolas.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from torch import Tensor
from tqdm import tqdm

from paper_lib.errors import require
from paper_lib.experiments.one_step import minimum
from paper_lib.probing import derivatives, probe
from paper_lib.runs import Run
from paper_lib.training.flat import FlatModel

EVEN = np.linspace(0, 4, 21)
"""Positions on a line from a snapshot over the batch's best step; fits use a beginning of them."""
CLOSE = np.array([0.01, 0.03, 0.1])
"""Positions nearer to the snapshot, to see how the curvature changes with distance."""
CHORD = np.linspace(0, 1, 17)
LINE = ["point", "seed", "step", "batch", "line"]  # the columns that name a line

# --- recording lines ----------------------------------------------------------------------------


def from_points(
    runs: Sequence[Run],
    at: Sequence[int],
    n_batches: int = 1,
    batch_size: int | None = None,
    point: str = "",
) -> pd.DataFrame:
    """Walk from the snapshots `at` along the gradients of the n_batches batches that are used next.

    One row per seed, snapshot, batch, line and position: `loss` of the batch (nats), with `best`
    (its best step along the gradient), `slope` = |g|^2 and `curvature` = g^T H g / |g|^2 at the
    snapshot. Positions are in units of `best`. The line "gradient" has the positions EVEN, "close"
    the positions CLOSE in the same direction, and "random" is as long as "gradient" in a Gaussian
    direction. Batches have `batch_size` samples (default: the run's).
    Raises ConfigError for no snapshots, SnapshotError for one that was not kept.
    """
    require(len(at) > 0, "at", list(at), "name at least one snapshot to start from")

    def from_point(run: Run, net: FlatModel, step: int) -> pd.DataFrame:
        weights, tables = np.array(run.at(step)), []
        for batch in range(step, step + n_batches):
            rng = np.random.default_rng((run.config.seed, step, batch))
            stacked = run.batches([batch], batch_size)
            lines = _lines_from(net, weights, stacked, run.config.lr, rng)
            tables += [line.assign(batch=batch) for line in lines]
        return pd.concat(tables)

    progress = f"lines from points {point}".strip()
    return probe.per_run(runs, at, from_point, progress).assign(point=point)


def _lines_from(
    net: FlatModel,
    weights: np.ndarray,
    batch: tuple[Tensor, Tensor],
    lr: float,
    rng: np.random.Generator,
) -> Iterator[pd.DataFrame]:
    """The three lines of one snapshot and one batch."""
    gradient = derivatives.gradients(net, weights, *batch)[0]
    start = {
        "best": _best_step(net, weights, gradient, batch, lr),
        "slope": float(gradient @ gradient),
        "curvature": float(derivatives.curvature(net, weights, gradient, *batch)[0]),
    }
    random = rng.standard_normal(len(weights)).astype(np.float32)
    random *= np.linalg.norm(gradient) / np.linalg.norm(random)
    for line, direction, positions in (
        ("gradient", -gradient, EVEN),
        ("close", -gradient, CLOSE),
        ("random", random, EVEN),
    ):
        loss = probe.line(net, weights, direction, start["best"] * positions, *batch)[:, 0]
        yield pd.DataFrame({"position": positions, "loss": loss, **start, "line": line})


def _best_step(
    net: FlatModel,
    weights: np.ndarray,
    gradient: np.ndarray,
    batch: tuple[Tensor, Tensor],
    lr: float,
) -> float:
    """The step along -gradient of the batch's least loss, searched from lr / 64 to 64 lr."""
    steps = lr * np.geomspace(1 / 64, 64, 25)
    return minimum(steps, probe.line(net, weights, -gradient, steps, *batch)[:, 0])[0]


def on_chords(
    pairs: Sequence[tuple[Run, Run]], chords: Sequence[tuple[int, int]], line: str = ""
) -> pd.DataFrame:
    """Loss of batch s on the straight lines from x_s to x_t, for every pair (s, t) in `chords`.

    `pairs` has two runs per seed, the ones that kept x_s and x_t. Rows as in `from_points`, with
    positions from 0 at x_s to 1 at x_t, for the point "". Raises ConfigError for s = t.
    """
    tables = []
    jobs = [(first, second, int(s), int(t)) for first, second in pairs for s, t in chords]
    nets = {first: first.network() for first, _ in pairs}
    for first, second, s, t in tqdm(jobs, desc=f"chords, {line}"):
        require(s != t, "chord", (s, t), "its ends must differ")
        start = np.array(first.at(s))
        away = np.array(second.at(t)) - start
        loss = probe.line(nets[first], start, away, CHORD, *first.batches([s]))[:, 0]
        table = pd.DataFrame({"position": CHORD, "loss": loss})
        tables.append(table.assign(seed=first.config.seed, step=s, batch=s))
    return pd.concat(tables, ignore_index=True).assign(line=line, point="")


# --- how far they are parabolas -----------------------------------------------------------------


def fits(table: pd.DataFrame, upto: float = 2.0) -> pd.DataFrame:
    """Fit a parabola to each line up to a position: rows (point, seed, step, batch, line).

    `r2` is the fraction of the line's variance that the parabola explains, `worst` its largest
    residual as a fraction of the range of the line's losses. The line "close" is left out.
    """
    chosen = table[(table.position <= upto + 1e-9) & (table.line != "close")]
    rows = [
        (*name, *_fit(line.position.to_numpy(), line.loss.to_numpy(np.float64)))
        for name, line in chosen.groupby(LINE, sort=False)
    ]
    return pd.DataFrame(rows, columns=[*LINE, "r2", "worst"])


def _fit(position: np.ndarray, loss: np.ndarray) -> tuple[float, float]:
    """R2 and the worst residual relative to the range."""
    residual = loss - np.polyval(np.polyfit(position, loss, 2), position)
    return 1 - residual.var() / loss.var(), np.abs(residual).max() / np.ptp(loss)


def predicted_minima(table: pd.DataFrame) -> pd.DataFrame:
    """What value, slope and curvature at a snapshot say of the minimum on the gradient line.

    One row per line, beside the truth: `place` = predicted / actual best step, `drop` = predicted /
    actual decrease of the loss, from best = 1 / curvature and drop = slope / (2 curvature). NaN
    where the curvature is not positive.
    """
    rows = []
    for name, line in table.query("line == 'gradient'").groupby(LINE[:-1], sort=False):
        start = line.iloc[0]
        curvature = start.curvature if start.curvature > 0 else np.nan
        drop = start.loss - minimum(line.position.to_numpy(), line.loss.to_numpy())[1]
        place = 1 / (curvature * start.best)
        rows.append((*name, place, start.slope / (2 * curvature) / drop))
    return pd.DataFrame(rows, columns=[*LINE[:-1], "place", "drop"])


def secants(table: pd.DataFrame) -> pd.DataFrame:
    """Curvature over a distance relative to that at the snapshot: rows (point, seed, position).

    Over the distance s it is that of the parabola through l(0), l'(0) = -|g|^2 and l(s); `secant`
    is the ratio of its mean over lines to the mean of the curvature at the snapshot, both weighted
    by |g|^2.
    """
    lines = table[table.line.isin(["gradient", "close"])]
    start = lines.query("position == 0").set_index(LINE[:-1]).loss.rename("start")
    s = lines.join(start, on=LINE[:-1]).query("position > 0")
    distance = s.position * s.best
    s = s.assign(
        over=2 * (s.loss - s.start + distance * s.slope) / distance**2,  # |g|^2 times curvature
        at=s.slope * s.curvature,
    )
    sums = s.groupby(["point", "seed", "position"], sort=False)[["over", "at"]].sum().reset_index()
    return sums.assign(secant=sums.over / sums["at"]).sort_values("position")
