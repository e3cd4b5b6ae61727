"""Measure how near to a parabola the loss of one batch is on lines in weight space (claim C2).

`from_points` and `on_chords` record lines, `shapes` and `from_one_point` judge them; `synthetic`
puts another function on the same lines, which must be told from a parabola.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar
from tqdm import tqdm

from paper_lib.errors import require
from paper_lib.experiments.one_step import minimum
from paper_lib.experiments.tables import tabulated
from paper_lib.probing import derivatives, probe
from paper_lib.runs import Run
from paper_lib.training.flat import FlatModel

STEP = np.linspace(0, 1, 9)
"""Positions from a snapshot along -gradient, over the learning rate: where the run moves."""
BEYOND = np.linspace(0, 2, 17)
"""Positions over the batch's best step, to draw."""
CHORD = np.linspace(-0.5, 1.5, 33)
"""Positions on a chord, 0 and 1 at its ends; beyond them its minimum is sought."""
LINE = ["line", "seed", "batch"]  # the columns that name a line
EXPONENTS = np.linspace(0.25, 8, 32)  # where the search for one begins


def from_points(
    runs: Sequence[Run], at: Sequence[int], line: str, batch_size: int | None = None
) -> pd.DataFrame:
    """Walk from the snapshots `at` along the gradient of the batch that is used next.

    One row per seed, batch (named by its step) and position, in units of lr: `loss` of the batch
    (nats), with `star` (the position of its minimum) and `slope` and `bend`, what -dl/dposition and
    its second derivative are at the snapshot (nats). Rows with `fit` are the positions STEP, the
    others BEYOND times star. Batches have `batch_size` samples (default: the run's).
    ConfigError for no snapshots, SnapshotError for one that was not kept.
    """
    require(len(at) > 0, "at", list(at), "name at least one snapshot to start from")

    def from_point(run: Run, net: FlatModel, step: int) -> pd.DataFrame:
        weights, batch = np.array(run.at(step)), run.batches([step], batch_size)
        gradient = derivatives.gradients(net, weights, *batch)[0]
        lr, squared = run.config.lr, float(gradient @ gradient)
        curvature = float(derivatives.curvature(net, weights, gradient, *batch)[0])
        sought = np.geomspace(1 / 32, 32, 21)
        loss = probe.line(net, weights, -lr * gradient, sought, *batch)[:, 0]
        star = minimum(sought, loss)[0]
        position = np.concatenate([STEP, star * BEYOND])
        loss = probe.line(net, weights, -lr * gradient, position, *batch)[:, 0]
        fit = np.arange(len(position)) < len(STEP)
        table = pd.DataFrame({"position": position, "loss": loss, "fit": fit})
        return table.assign(star=star, slope=lr * squared, bend=lr**2 * squared * curvature)

    table = probe.per_run(runs, at, from_point, f"lines, {line}")
    return table.rename(columns={"step": "batch"}).assign(line=line)


@tabulated
def on_chords(
    pairs: Sequence[tuple[Run, Run]], chords: Sequence[tuple[int, int]], line: str
) -> Iterator[pd.DataFrame]:
    """Loss of batch s on the straight lines from x_s to x_t, for every pair (s, t) in `chords`.

    `pairs` has two runs per seed, the ones that kept x_s and x_t. Rows as in `from_points`, without
    derivatives: positions CHORD, of which those with `fit` lie between the ends, 0 and 1.
    ConfigError for s = t.
    """
    jobs = [(first, second, int(s), int(t)) for first, second in pairs for s, t in chords]
    nets = {first: first.network() for first, _ in pairs}
    for first, second, s, t in tqdm(jobs, desc=f"chords, {line}"):
        require(s != t, "chord", (s, t), "its ends must differ")
        start = np.array(first.at(s))
        away = np.array(second.at(t)) - start
        loss = probe.line(nets[first], start, away, CHORD, *first.batches([s]))[:, 0]
        found = {"position": CHORD, "loss": loss, "fit": (CHORD >= 0) & (CHORD <= 1)}
        table = pd.DataFrame(found).assign(star=minimum(CHORD, loss)[0])
        yield table.assign(seed=first.config.seed, batch=s, line=line)


def synthetic(table: pd.DataFrame, power: float) -> pd.DataFrame:
    """The same lines with the loss |position - star|^power: a V for 1, a parabola for 2."""
    away, star = (table.position - table.star).abs(), table.star.abs()
    first, second = power * star ** (power - 1), power * (power - 1) * star ** (power - 2)
    return table.assign(loss=away**power, slope=first, bend=second)


@tabulated
def shapes(table: pd.DataFrame) -> Iterator[dict]:
    """What functions fit each line where it has `fit`: a row per line.

    `exponent` is the p of the best a + b |position - star|^p, 2 for a parabola. `r2` is the share
    of the line's variance that a parabola explains. `cubic` is the third-order over the quadratic
    term of a cubic at an end of the line, both about its middle; NaN for a straight line.
    """
    for name, line in table[table.fit].groupby(LINE, sort=False):
        at, loss = line.position.to_numpy(), line.loss.to_numpy(np.float64)
        residual = loss - np.polyval(np.polyfit(at, loss, 2), at)
        half = np.ptp(at) / 2
        third, second = np.polyfit(at - at.mean(), loss, 3)[:2]
        second = second if abs(second) > 1e-9 * np.ptp(loss) else np.nan  # a straight line
        fitted = {"exponent": exponent(at, loss, line.star.iloc[0])}
        fitted |= {"r2": 1 - residual.var() / loss.var(), "cubic": half * third / second}
        yield dict(zip(LINE, name, strict=True)) | fitted


def exponent(position: np.ndarray, loss: np.ndarray, star: float) -> float:
    """The p, 0.25 to 8, of the least-squares fit a + b |position - star|^p to a line (n,)."""

    def missed(p: float) -> float:
        power = np.abs(position - star) ** p
        terms = np.stack([np.ones_like(power), power], axis=1)
        terms /= np.linalg.norm(terms, axis=0)
        return float(np.square(loss - terms @ np.linalg.lstsq(terms, loss)[0]).sum())

    i = int(np.argmin([missed(p) for p in EXPONENTS]))
    around = EXPONENTS[max(i - 1, 0)], EXPONENTS[min(i + 1, len(EXPONENTS) - 1)]
    return float(minimize_scalar(missed, bounds=around, method="bounded").x)


@tabulated
def from_one_point(table: pd.DataFrame) -> Iterator[dict]:
    """What value, slope and bend at a snapshot say of its gradient line: a row per line.

    `decrease` = predicted / actual decrease of the loss at position 1, a step of lr: slope - bend /
    2. `best` = predicted / actual place of the minimum, slope / bend, NaN where the bend is not
    positive. `later` = the bend about the minimum, a quarter of its distance to either side, over
    the bend at 0.
    """
    for name, line in table.groupby(LINE, sort=False):
        at, loss = line.position.to_numpy(), line.loss.to_numpy(np.float64)
        star, slope, bend = line[["star", "slope", "bend"]].iloc[0]
        bend = bend if bend > 0 else np.nan
        wanted = (1.0, 0.75 * star, star, 1.25 * star)
        end, before, least, after = (loss[np.abs(at - place).argmin()] for place in wanted)
        found = {"decrease": (slope - bend / 2) / (loss[0] - end), "best": slope / bend / star}
        found["later"] = (before - 2 * least + after) / (star / 4) ** 2 / bend
        yield dict(zip(LINE, name, strict=True)) | found


def scaled(table: pd.DataFrame) -> pd.DataFrame:
    """Each line as a parabola would be (1 - u)^2: rows (line, seed, u, height), means over lines.

    u = position / star on the grid BEYOND, and height = (loss - least) / (loss at 0 - least). Left
    out are lines whose minimum does not lie beyond 0, and where a line does not reach.
    """
    rows = []
    for (line, seed, _), one in table.groupby(LINE, sort=False):
        if one.star.iloc[0] > 0 and one.loss.to_numpy()[one.position.argmax()] > one.loss.min():
            one = one.sort_values("position")
            u, loss = one.position / one.star, one.loss.to_numpy(np.float64)
            at_zero, least = np.interp(0, u, loss), loss.min()
            height = (np.interp(BEYOND, u, loss, right=np.nan) - least) / (at_zero - least)
            rows.append(pd.DataFrame({"line": line, "seed": seed, "u": BEYOND, "height": height}))
    means = pd.concat(rows).groupby(["line", "seed", "u"], sort=False).height.mean()
    return means.dropna().reset_index()
