"""Claim C5: figures of the quadratic model, from the tables of model_checks, with its closed forms drawn on top."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from paper_lib.averaging import equivalence, schedules, vectors
from paper_lib.experiments.model_checks import AVERAGES, LENGTHS
from paper_lib.results import figures
from paper_lib.theory import quadratic

BACK = "steps before the end"
LENGTH_NAMES = {"two-point": "lag", "EMA": "horizon", "uniform": "window"}  # horizon: 1 / (1 - decay)


def colors(keys: Collection[Hashable]) -> dict[Hashable, tuple]:
    """A colour for each key, from light to dark: for etas in ascending order from slow to fast."""
    return dict(zip(keys, sns.color_palette("flare", len(keys)), strict=True))


def equivalent_schedules(etas: Sequence[float], length: int, steps: int) -> pd.DataFrame:
    """Schedules equivalent to the averages of AVERAGES of one length: rows (average, eta, back, factor).

    `back` counts steps before the end; eta = 0 stands for the limit of slow directions, the tail sums.
    """
    back, tables = np.arange(steps)[::-1], []
    for name, (weights, _) in AVERAGES.items():
        for eta in (0.0, *etas):
            factor = equivalence.to_schedule(weights(steps + 1, length), eta)
            tables.append(pd.DataFrame({"average": name, "eta": eta, "back": back, "factor": factor}))
    return pd.concat(tables, ignore_index=True)


def plot_equivalent(ax: Axes, table: pd.DataFrame, average: str) -> None:
    """The schedules of `equivalent_schedules` for one average, the limit in the model's style."""
    rows = table.query("average == @average")
    for eta, color in colors(np.unique(rows.eta)[1:]).items():
        one = rows.query("eta == @eta")
        ax.step(one.back, one.factor, where="mid", color=color, label=f"η = {eta:g}")
    limit = rows.query("eta == 0")
    figures.predicted(ax, limit.back, limit.factor, label="tail sums (η → 0)")
    ax.set(xlim=(rows.back.max(), 0), ylim=(-0.02, 1.08), xlabel=BACK, ylabel="learning rate / constant")


def plot_schedules(ax: Axes, schedules: Mapping[str, np.ndarray]) -> None:
    """Factors (steps,) of schedules that end together, by label, against `back`; from light to dark as given."""
    for (label, factors), color in zip(schedules.items(), colors(schedules).values(), strict=True):
        ax.plot(np.arange(len(factors))[::-1], factors, color=color, label=label)
    longest = max(map(len, schedules.values()))
    ax.set(xlim=(longest, 0), ylim=(0, 1.02), xlabel=BACK, ylabel="learning rate / run's")
    ax.legend(fontsize="small")


def cooldown_weights(names: Sequence[str], etas: Sequence[float], horizon: int, steps: int) -> pd.DataFrame:
    """Averages of a constant-lr run that emulate cooldowns over `horizon` steps: rows (schedule, eta, back, weight)."""
    back, tables = np.arange(steps + 1)[::-1], []
    for name in names:
        for eta in (0.0, *etas):
            weight = equivalence.to_average(schedules.cooldown(name, steps, horizon), eta)
            tables.append(pd.DataFrame({"schedule": name, "eta": eta, "back": back, "weight": weight}))
    return pd.concat(tables, ignore_index=True)


def plot_weights(ax: Axes, table: pd.DataFrame, schedule: str, horizon: int) -> None:
    """The weights of `cooldown_weights` for one schedule, in units of 1 / horizon; the last iterate's is at 0 back."""
    rows = table.query("schedule == @schedule")
    for eta, color in colors(np.unique(rows.eta)[1:]).items():
        one = rows.query("eta == @eta")
        ax.plot(one.back, horizon * one.weight, color=color, label=f"η = {eta:g}")
    limit = rows.query("eta == 0")
    figures.predicted(ax, limit.back, horizon * limit.weight, label="η → 0")
    ax.set(xlim=(rows.back.max(), -2), ylim=(0, 5), xlabel=BACK, ylabel=f"weight of the iterate x {horizon}")


def plot_variance(ax: Axes, table: pd.DataFrame, average: str) -> None:
    """Variance of one average against its length: simulation as points, seeds pooled, closed forms as lines."""
    rows = table.query("average == @average")
    lengths, ratio = np.unique(np.geomspace(1, max(LENGTHS), 200).round()), AVERAGES[average][1]
    for i, (eta, color) in enumerate(colors(np.unique(rows.eta)).items()):
        _points(ax, rows.query("eta == @eta"), "length", color, f"η = {eta:g}")
        figures.predicted(ax, lengths, ratio(eta, lengths), label=None if i else "model", linewidth=1.3)
    ax.set(xscale="log", ylim=(0, 1.15), xlabel=f"{LENGTH_NAMES[average]} (steps)", ylabel="variance / iterate's")


def _points(ax: Axes, rows: pd.DataFrame, x: str, color: tuple, label: str, marker: str = "o") -> None:
    """Means over seeds of `measured`, with 95 % intervals from the standard errors within each."""
    pooled = rows.groupby(x).agg(measured=("measured", "mean"), error=("error", _pool))
    style = {"fmt": marker, "color": color, "markersize": 6, "elinewidth": 1.5, "label": label}
    ax.errorbar(pooled.index, pooled.measured, 1.96 * pooled.error, **style)


def _pool(errors: pd.Series) -> float:
    """Standard error of the mean of independent estimates."""
    return float(np.sqrt((errors**2).sum()) / len(errors))


def plot_probe(ax: Axes, losses: pd.DataFrame, eta: float) -> None:
    """Own-batch and held-out loss of one direction against the step, over their values before it."""
    rows, x = losses.query("eta == @eta"), np.geomspace(0.05, losses.probe.max(), 200)
    model = {"own": quadratic.own_batch_loss, "held": quadratic.held_out_loss}
    labels = {"own": "the step's own batch", "held": "held-out batches"}
    for kind, form in model.items():
        curve = rows.groupby("probe")[kind].mean()
        color = sns.color_palette()[kind == "own"]
        ax.plot(curve.index[1:], curve.iloc[1:] / curve.iloc[0], "o", color=color, label=labels[kind])
        label = "model" if kind == "held" else None
        figures.predicted(ax, x, form(x * eta, eta) / form(0, eta), label=label, linewidth=1.5)
    ax.set(xscale="log", ylim=(0, 2), xlabel="step size / learning rate", ylabel="loss / loss before the step")


def plot_collapse(ax: Axes, losses: pd.DataFrame) -> None:
    """The held-out loss's change over its first-order decrease: the parabola -s (1 - s), whatever the curvature."""
    start = losses.groupby(["seed", "eta"]).held.transform("first")
    near = losses.assign(change=(losses.held - start) / losses.decrease).query("probe <= 1.5")
    for marker, (eta, color) in zip("osDv", colors(np.unique(near.eta)).items(), strict=True):
        curve = near.query("eta == @eta").groupby("probe").change.mean()
        ax.plot(curve.index, curve, marker, color=color, label=f"η = {eta:g}", alpha=0.8)
    s = np.linspace(0, near.probe.max(), 100)
    figures.predicted(ax, s, -s * (1 - s), label="model, any η", linewidth=1.5)
    ax.axhline(0, color="0.6", linewidth=1)
    ax.set(xlabel="step size / learning rate", ylabel="change / first-order decrease")


def plot_timescales(ax: Axes, table: pd.DataFrame, eta: float) -> None:
    """One direction of model_checks.timescales: the EMA's variance and its tail-sum schedule's, against the horizon."""
    rows, kinds = table.query("eta == @eta"), {"EMA": "o", "tail-sum schedule": "s"}
    for i, (kind, marker) in enumerate(kinds.items()):
        one = rows.query("kind == @kind")
        _points(ax, one, "horizon", sns.color_palette()[2 * i], kind, marker)
        model = one.groupby("horizon").predicted.mean()
        figures.predicted(ax, model.index, model, label=None if i else "model", linewidth=1.3)
    ax.set(xscale="log", yscale="log", xlabel="horizon of the EMA (steps)", ylabel="variance / iterate's")


def plot_varying(variance: Axes, broken: Axes, table: pd.DataFrame) -> None:
    """model_checks.varying_curvature: variance of an iterate, and how far the equivalence breaks."""
    spread = np.linspace(0, table.variation.max(), 100)
    for i, (eta, color) in enumerate(colors(np.unique(table.eta)).items()):
        rows = table.query("eta == @eta")
        _points(variance, rows, "variation", color, f"η = {eta:g}")
        ratio = quadratic.varying_curvature_variance(eta, spread) / quadratic.stationary_variance(eta)
        figures.predicted(variance, spread, ratio, label=None if i else "model", linewidth=1.3)
        figures.band(broken, rows, "variation", "broken", color=color, marker="o", label=f"η = {eta:g}")
    variance.set(ylabel="variance / that at equal curvatures", xlabel="relative spread of the batches' curvatures")
    broken.set(ylabel="distance / distance to the last iterate", xlabel="relative spread of the batches' curvatures")


def plot_ratios(ax: Axes, etas: Sequence[float], lag: int, decay: float, n: int) -> None:
    """Closed forms against the lag of a two-point average, one line per eta; the EMA's ratio as a level beside it."""
    lags = np.unique(np.geomspace(1, n, 150).round())
    for eta, color in colors(etas).items():
        ax.plot(lags, quadratic.two_point_ratio(eta, lags), color=color, label=f"two points, η = {eta:.2g}")
        ax.plot(lag, quadratic.two_point_ratio(eta, lag), "o", color=color)
        ax.axhline(quadratic.ema_ratio(eta, decay), color=color, linestyle=":", label=f"EMA, η = {eta:.2g}")
    ax.set(xscale="log", ylim=(0, 1.05), xlabel="lag of the two points (steps)", ylabel="variance / iterate's")


def plot_both_schedules(ax: Axes, etas: Sequence[float], lag: int, decay: float, steps: int) -> None:
    """Schedules equivalent to an EMA (solid) and to a two-point average (dotted), one colour per eta."""
    back = np.arange(steps)[::-1]
    for eta, color in colors(etas).items():
        for a, line in ((vectors.ema(steps + 1, decay), "-"), (vectors.two_point(steps + 1, lag), ":")):
            label = f"{'EMA' if line == '-' else 'two points'}, η = {eta:.2g}"
            ax.plot(back, equivalence.to_schedule(a, eta), line, color=color, label=label)
    ax.set(xlim=(steps, 0), ylim=(-0.02, 1.08), xlabel=BACK, ylabel="learning rate / constant")
