"""Claim C2: how well a parabola fits the loss of one batch along a line in weight space, and where it does not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from torch import Tensor
from tqdm import tqdm

from paper_lib import runs
from paper_lib.config import RunConfig
from paper_lib.data import Dataset
from paper_lib.errors import require
from paper_lib.experiments import one_step
from paper_lib.probing import derivatives, probe
from paper_lib.results import figures
from paper_lib.runs import Run
from paper_lib.training.flat import FlatModel, NetFactory

EVEN = np.linspace(0, 4, 21)
"""Positions on a line from a snapshot, in units of the batch's best step; fits use a beginning of them."""
CLOSE = np.array([0.01, 0.03, 0.1])
"""Positions nearer to the snapshot, to see how the curvature changes with distance."""
CHORD = np.linspace(0, 1, 17)
LINE = ["point", "seed", "step", "batch", "line"]  # the columns that name a line
DEEPER = {"resnet8": "resnet14", "resnet14": "resnet20", "resnet18": "resnet34", "resnet34": "resnet50"}


# --- measuring --------------------------------------------------------------------------------------------------


def from_points(
    trajectories: Sequence[Run],
    dataset: Dataset,
    at: Sequence[int],
    model: NetFactory | None = None,
    n_batches: int = 1,
    batch_size: int | None = None,
    point: str = "",
) -> pd.DataFrame:
    """Walk from the snapshots `at` along the gradients of the n_batches batches that the run uses from there.

    One row per seed, snapshot, batch, line and position: `loss` of the batch, with `best` (its best step along the
    gradient), `slope` = |g|^2 and `curvature` = g^T H g / |g|^2 at the snapshot. Positions are in units of `best`.
    The line "gradient" has the positions EVEN, "close" the positions CLOSE in the same direction, and "random" is as
    long as "gradient" in a Gaussian direction. Batches have `batch_size` samples (default: the run's).
    """
    require(len(at) > 0, "at", list(at), "name at least one snapshot to start from")
    tables = []
    nets = {run: runs.network(run, dataset, model) for run in trajectories}
    jobs = [(run, step, batch) for run in trajectories for step in at for batch in range(step, step + n_batches)]
    for run, step, batch in tqdm(jobs, desc=f"lines from points {point}".strip()):
        stacked = dataset.batches([batch], batch_size or run.config.batch_size, run.config.stream)
        rng = np.random.default_rng((run.config.seed, step, batch))
        lines = _lines_from(nets[run], np.array(run.at(step)), stacked, run.config.lr, rng)
        tables += [one.assign(seed=run.config.seed, step=step, batch=batch) for one in lines]
    return pd.concat(tables, ignore_index=True).assign(point=point)


def _lines_from(
    net: FlatModel, weights: np.ndarray, batch: tuple[Tensor, Tensor], lr: float, rng: np.random.Generator
) -> Iterator[pd.DataFrame]:
    """The three lines of one snapshot and one batch."""
    gradient = derivatives.gradients(net, weights, *batch)[0]
    best = best_step(net, weights, gradient, batch, lr)
    slope, curvature = float(gradient @ gradient), float(derivatives.curvature(net, weights, gradient, *batch)[0])
    random = rng.standard_normal(len(weights)).astype(np.float32)
    random *= np.linalg.norm(gradient) / np.linalg.norm(random)
    for line, direction, positions in (
        ("gradient", -gradient, EVEN),
        ("close", -gradient, CLOSE),
        ("random", random, EVEN),
    ):
        loss = probe.line(net, weights, direction, best * positions, *batch)[:, 0]
        found = {"position": positions, "loss": loss, "best": best, "slope": slope, "curvature": curvature}
        yield pd.DataFrame(found).assign(line=line)


def best_step(
    net: FlatModel, weights: np.ndarray, gradient: np.ndarray, batch: tuple[Tensor, Tensor], lr: float
) -> float:
    """The step along -gradient that minimizes the batch's loss, searched from lr / 64 to 64 lr."""
    steps = lr * np.geomspace(1 / 64, 64, 25)
    return one_step.minimum(steps, probe.line(net, weights, -gradient, steps, *batch)[:, 0])[0]


def on_chords(
    trajectories: Sequence[tuple[Run, Run]],
    dataset: Dataset,
    chords: Sequence[tuple[int, int]],
    model: NetFactory | None = None,
    line: str = "",
    point: str = "",
) -> pd.DataFrame:
    """Loss of batch s on the straight lines from x_s to x_t, for every pair (s, t) in `chords`.

    `trajectories` has one pair of runs per seed, the ones that kept x_s and x_t. Rows as in `from_points`, with
    positions from 0 at x_s to 1 at x_t.
    """
    tables = []
    jobs = [(pair, int(s), int(t)) for pair in trajectories for s, t in chords]
    nets = {pair: runs.network(pair[0], dataset, model) for pair in trajectories}
    for (first, second), s, t in tqdm(jobs, desc=f"chords, {line}"):
        require(s != t, "chord", (s, t), "its ends must differ")
        start, config = np.array(first.at(s)), first.config
        batch = dataset.batches([s], config.batch_size, config.stream)
        loss = probe.line(nets[first, second], start, np.array(second.at(t)) - start, CHORD, *batch)[:, 0]
        tables.append(pd.DataFrame({"position": CHORD, "loss": loss}).assign(seed=config.seed, step=s, batch=s))
    return pd.concat(tables, ignore_index=True).assign(line=line, point=point)


def spread(run: Run, n: int = 6) -> list[int]:
    """At most n recorded steps, from the first to the last but one, evenly spread in log(1 + time)."""
    kept = run.steps[:-1]
    wanted = kept[0] + np.geomspace(1, kept[-1] - kept[0] + 1, n) - 1
    return np.unique(kept[np.abs(kept - wanted[:, None]).argmin(1)]).tolist()


def variants(run: RunConfig, steps: int) -> dict[str, RunConfig]:
    """Short runs that differ in one thing, by name: normalization (none: at a quarter of the learning rate), depth."""
    base = run.replace(steps=steps, record="", checkpoints=())
    found = {"as it is": base, "group norm": base.replace(norm="group")}
    found["no norm"] = base.replace(norm="none", lr=run.lr / 4)
    if run.model in DEEPER:
        found[DEEPER[run.model].replace("resnet", "ResNet-")] = base.replace(model=DEEPER[run.model])
    return found


# --- judging ----------------------------------------------------------------------------------------------------


def fits(table: pd.DataFrame, upto: float = 2.0) -> pd.DataFrame:
    """Fit a parabola to each line up to a position: rows (point, seed, step, batch, line).

    `r2` is the fraction of the line's variance that the parabola explains, `worst` its largest residual as a fraction
    of the range of the line's losses. The line "close" is left out.
    """
    chosen = table[(table.position <= upto + 1e-9) & (table.line != "close")]
    grouped = chosen.groupby(LINE, sort=False)
    found = [(*name, *_fit(one.position.to_numpy(), one.loss.to_numpy(np.float64))) for name, one in grouped]
    return pd.DataFrame(found, columns=[*LINE, "r2", "worst"])


def _fit(position: np.ndarray, loss: np.ndarray) -> tuple[float, float]:
    """R2 and the worst residual relative to the range."""
    residual = loss - np.polyval(np.polyfit(position, loss, 2), position)
    return 1 - residual.var() / loss.var(), np.abs(residual).max() / np.ptp(loss)


def by_seed(found: pd.DataFrame) -> pd.DataFrame:
    """Average the lines of each seed: rows (point, line, seed) with the means of r2 and worst."""
    return found.groupby(["point", "line", "seed"], sort=False)[["r2", "worst"]].mean().reset_index()


def predicted_minima(table: pd.DataFrame) -> pd.DataFrame:
    """What value, slope and curvature at a snapshot say about the minimum on the gradient line, beside the truth.

    One row per line: `place` = predicted / actual best step, `drop` = predicted / actual decrease of the loss, from
    best = 1 / curvature and drop = slope / (2 curvature). NaN where the curvature is not positive.
    """
    rows = []
    for name, one in table.query("line == 'gradient'").groupby(LINE[:-1], sort=False):
        start = one.iloc[0]
        curvature = start.curvature if start.curvature > 0 else np.nan
        drop = start.loss - one_step.minimum(one.position.to_numpy(), one.loss.to_numpy())[1]
        rows.append((*name, 1 / (curvature * start.best), start.slope / (2 * curvature) / drop))
    return pd.DataFrame(rows, columns=[*LINE[:-1], "place", "drop"])


def secants(table: pd.DataFrame) -> pd.DataFrame:
    """Curvature over a distance relative to that at the snapshot: rows (point, seed, position), means over lines.

    Over the distance s it is that of the parabola through l(0), l'(0) = -|g|^2 and l(s); `secant` is the ratio of
    its mean to the mean of the curvature at the snapshot, both weighted by |g|^2.
    """
    lines = table[table.line.isin(["gradient", "close"])]
    start = lines.query("position == 0").set_index(LINE[:-1]).loss.rename("start")
    s = lines.join(start, on=LINE[:-1]).query("position > 0").assign(step_size=lambda t: t.position * t.best)
    s["over"] = 2 * (s.loss - s.start + s.step_size * s.slope) / s.step_size**2  # |g|^2 times the curvature
    s["at"] = s.slope * s.curvature
    sums = s.groupby(["point", "seed", "position"], sort=False)[["over", "at"]].sum().reset_index()
    return sums.assign(secant=sums.over / sums["at"]).sort_values("position")


# --- figures ----------------------------------------------------------------------------------------------------


def plot_gradient_lines(ax: Axes, table: pd.DataFrame) -> None:
    """Loss along the gradient (mean over lines), its parabola, and the one from value, slope and curvature at 0."""
    lines = table.query("line == 'gradient'")
    means = lines.groupby(["seed", "position"]).loss.mean().reset_index()
    figures.band(ax, means, "position", "loss", label="measured", color=sns.color_palette()[1])
    mean = means.groupby("position").loss.mean()
    near = mean[mean.index <= 2]
    fitted = np.polyval(np.polyfit(near.index, near, 2), near.index)
    ax.plot(near.index, fitted, color=sns.color_palette()[0], label="parabola fitted to [0, 2]")
    first = lines.query("position == 0")
    s = EVEN[EVEN <= 2][:, None] * first.best.to_numpy()
    local = first.loss.to_numpy() - s * first.slope.to_numpy() + s**2 / 2 * (first.slope * first.curvature).to_numpy()
    figures.predicted(ax, EVEN[EVEN <= 2], local.mean(1), label="from value, slope, curvature at 0")
    ax.set(xlabel="position / best step", ylabel="loss of the batch (nats)", ylim=(0, 1.3 * mean.max()))
    ax.legend(loc="upper center", fontsize="small")


def plot_chords(ax: Axes, table: pd.DataFrame) -> None:
    """Loss along chords, mean over lines, each with the parabola fitted to the mean."""
    for (line, one), color in zip(table.groupby("line", sort=False), sns.color_palette(), strict=False):
        means = one.groupby(["seed", "position"]).loss.mean().reset_index()
        figures.band(ax, means, "position", "loss", label=line, color=color)
        mean = means.groupby("position").loss.mean()
        figures.predicted(ax, mean.index, np.polyval(np.polyfit(mean.index, mean, 2), mean.index), label=None)
    ax.set(xlabel="position on the chord", ylabel="loss of the batch (nats)")
    ax.legend(fontsize="small", title="dashed: fitted parabola")


def plot_unexplained(ax: Axes, found: pd.DataFrame, by: str, bound: float) -> None:
    """What parabolas leave unexplained, 1 - R2, per value of `by`: boxes over lines, on a logarithmic axis."""
    shown = found.assign(unexplained=100 * (1 - found.r2))
    sns.boxplot(shown, x="unexplained", y=by, hue=by, legend=False, whis=(5, 95), fliersize=2, width=0.6, ax=ax)
    ax.axvline(100 * (1 - bound), **{**figures.PREDICTION, "linewidth": 1.5})
    ax.set(xscale="log", xlabel="unexplained by a parabola: 1 - R² (%)", ylabel="")


def plot_over_time(ax: Axes, found: pd.DataFrame, bound: float) -> None:
    """1 - R2 against training time, one line per kind of line: median and range over seeds of their means."""
    means = found.groupby(["line", "seed", "step"], sort=False).r2.mean().reset_index()
    shown = means.assign(unexplained=100 * (1 - means.r2))
    sns.lineplot(
        shown, x="step", y="unexplained", hue="line", marker="o", estimator="median", errorbar=("pi", 100), ax=ax
    )
    ax.axhline(100 * (1 - bound), **{**figures.PREDICTION, "linewidth": 1.5})
    ax.set(yscale="log", xlabel="step of the run", ylabel="unexplained: 1 - R² (%)")
    ax.set_xscale("symlog", linthresh=1)
    ax.set_xlim(-0.2, 1.3 * found.step.max())
    ax.legend(fontsize="small")


def plot_secants(ax: Axes, table: pd.DataFrame) -> None:
    """Curvature over a distance along the gradient, relative to the curvature at its start."""
    found = secants(table)
    for (point, one), color in zip(found.groupby("point", sort=False), sns.color_palette(), strict=False):
        figures.band(ax, one, "position", "secant", label=point, color=color, marker="o", markersize=4)
    figures.predicted(ax, [found.position.min(), 4], [1, 1], label="a parabola")
    top = min(4.0, ax.get_ylim()[1])  # where the curvature at the start is small, ratios are huge
    ax.set(xscale="log", ylim=(0, top), xlabel="distance / best step")
    ax.set_ylabel("mean curvature up to there / at the start")
    ax.legend(fontsize="small")
