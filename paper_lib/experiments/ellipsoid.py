"""Where a stationary run stays: loss levels, radius, angles and displacement of iterates, and what lies inside (C7)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from paper_lib import runs
from paper_lib.averaging import vectors
from paper_lib.data import Dataset
from paper_lib.errors import require
from paper_lib.probing import probe
from paper_lib.results import figures
from paper_lib.runs import Run
from paper_lib.training.flat import NetFactory

ALONG = np.linspace(0, 1, 9)  # positions on a segment between two iterates
OUTWARD = np.array([0, 0.25, 0.5, 0.75, 1, 1.25, 1.5])  # distances on a ray from the average, over the iterate's


def levels(reference: Run, changed: Sequence[Run], settle: int) -> pd.DataFrame:
    """Loss of successive runs beside that of the reference run on the same batches: one row per step.

    `changed` follow each other, and begin where the reference begins. Columns seed, step (from there), lr, loss,
    loss_reference, and `settled` (at least `settle` steps after the last change of the learning rate).
    """
    start, rows = reference.config.start, []
    for run in changed:
        step = np.arange(run.config.start, run.config.start + len(run.loss)) - start
        require(step[-1] < len(reference.loss), "changed", int(step[-1]), "the reference run ends before that step")
        columns = {"seed": run.config.seed, "step": step, "lr": run.config.lr, "loss": run.loss}
        settled = step - step[0] >= settle
        rows.append(pd.DataFrame(columns).assign(loss_reference=reference.loss[step], settled=settled))
    return pd.concat(rows, ignore_index=True)


def geometry(G: np.ndarray) -> dict[str, float]:
    """Radius and angles around the average, from the Gram matrix (n, n) around it.

    radius (root mean square), radius_spread (standard deviation / mean), far_cosine (mean over pairs of iterates at
    least half a window apart, without those of which one lies at the average), pair_ratio (squared radius of the
    average of such a pair over that of one iterate). ConfigError if the iterates are all equal.
    """
    n, radius = len(G), np.sqrt(np.diag(G))
    require(radius.any(), "radius", 0.0, "the iterates are all equal: there is nothing around their average")
    far = np.triu_indices(n, n // 2)
    square = np.diag(G)
    pairs = (square[far[0]] + square[far[1]] + 2 * G[far]) / 4
    return {
        "radius": np.sqrt(np.mean(square)),
        "radius_spread": radius.std() / radius.mean(),
        "far_cosine": np.nanmean(cosines(G)[far]),
        "pair_ratio": pairs.mean() / square.mean(),
    }


def cosines(G: np.ndarray) -> np.ndarray:
    """Cosines of the angles between iterates as seen from the Gram matrix's centre, (n, n).

    NaN for an iterate that lies at the centre: it is in no direction from there.
    """
    radius = np.sqrt(np.diag(G))
    lengths = np.outer(radius, radius)
    return np.divide(G, lengths, out=np.full_like(G, np.nan, dtype=float), where=lengths > 0)


def average_radii(G: np.ndarray, counts: Sequence[int], spacings: Sequence[int]) -> pd.DataFrame:
    """Squared radius of averages of `count` iterates, `spacing` steps apart, over that of one iterate.

    Around G's centre, averaged over up to ten places in the window. Averages that span more than half of the window
    are left out: they approach its centre because that is an average of the same iterates. Columns count, spacing,
    ratio, and `model`, the average of independent iterates, 1 / count.
    """
    rows, n = [], len(G)
    for spacing in spacings:
        for count in (c for c in counts if (c - 1) * spacing <= n // 2):
            ends = np.unique(np.linspace((count - 1) * spacing, n - 1, 10).astype(int))
            a = np.stack([vectors.checkpoints(n, end - spacing * np.arange(count)) for end in ends])
            ratio = vectors.squared_norm(a, G).mean() / np.trace(G) * n
            rows.append({"spacing": spacing, "count": count, "ratio": ratio, "model": 1 / count})
    return pd.DataFrame(rows)


def inside(
    run: Run, dataset: Dataset, n_batches: int = 8, n_pairs: int = 4, model: NetFactory | None = None
) -> pd.DataFrame:
    """Training loss on segments between iterates half a window apart, and on rays from the average through iterates.

    One row per `path` ("segment" or "ray"), pair and `position`: 0 and 1 are the two iterates of a segment, or the
    average and the iterate of a ray. Batches are normalized by their own statistics.
    """
    c, X = run.config, run.window(run.config.start, run.config.steps)
    net, batches = runs.network(run, dataset, model), probe.fixed_batches(dataset, n_batches, c.batch_size, c.seed)
    center, half = vectors.average(vectors.uniform(len(X), len(X)), X), len(X) // 2
    tables = []
    for pair, i in enumerate(np.linspace(0, len(X) - half - 1, n_pairs).astype(int)):
        for path, begin, end, positions in (
            ("segment", X[i], X[i + half], ALONG),
            ("ray", center, X[i], OUTWARD),
        ):
            loss = probe.line(net, begin, end - begin, positions, *batches).mean(1)
            columns = {"seed": c.seed, "path": path, "pair": pair, "position": positions, "loss": loss}
            tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)


def at(table: pd.DataFrame, path: str, position: float) -> pd.Series:
    """Mean loss of each seed at a position of `inside`'s segments or rays, indexed by seed."""
    found = table[(table.path == path) & np.isclose(table.position, position)]
    require(len(found) > 0, "position", position, f"measured are {sorted(set(table.position[table.path == path]))}")
    return found.groupby("seed").loss.mean()


def radius_form(table: pd.DataFrame) -> pd.DataFrame:
    """How far the loss on rays is a quadratic form of the radius, a row per seed.

    r2: share of the variance of the seed's mean ray that a + b r^2 explains. exponent: p of the best a + b r^p.
    """
    rows = {}
    for seed, ray in table.query("path == 'ray'").groupby("seed"):
        mean = ray.groupby("position").loss.mean()
        r, loss = mean.index.to_numpy(), mean.to_numpy()
        powers = np.linspace(0.5, 4, 71)
        residuals = [_residual(r**p, loss) for p in powers]
        r2 = 1 - _residual(r**2, loss) / np.sum((loss - loss.mean()) ** 2)
        rows[seed] = {"r2": r2, "exponent": powers[np.argmin(residuals)]}
    return pd.DataFrame(rows).T


def _residual(x: np.ndarray, y: np.ndarray) -> float:
    """Sum of squares left by the best line through (x, y)."""
    return float(np.sum((y - np.polyval(np.polyfit(x, y, 1), x)) ** 2))


def plot_levels(ax: Axes, groups: dict[str, pd.DataFrame], every: int) -> None:
    """Loss of runs with changed learning rates against step, in means over `every` steps; the reference dashed."""
    for label, table in groups.items():
        binned = _binned(table, "loss", every)
        figures.band(ax, binned, "step", "loss", label=label)
    reference = _binned(table, "loss_reference", every).groupby("step").loss_reference.mean()
    ax.plot(reference.index, reference, color="0.35", linestyle=":", label="learning rate unchanged")
    ax.set(xlabel="steps after the first change", ylabel="training loss (nats)")
    ax.legend(fontsize="small")


def _binned(table: pd.DataFrame, column: str, every: int) -> pd.DataFrame:
    """Means of a column over groups of `every` steps, at their middle, a row per seed and group."""
    step = table.step // every * every + every / 2
    return table.assign(step=step).groupby(["seed", "step"])[column].mean().reset_index()


def plot_displacement(ax: Axes, table: pd.DataFrame) -> None:
    """Squared displacement against lag, a line per learning rate; a stationary run would level off."""
    labelled = table.assign(label="lr " + table.lr.map("{:g}".format))
    last = figures.band(ax, labelled, "lag", "displacement", hue="label").groupby("label", sort=False).tail(1)
    for end in last.itertuples():
        lags = np.array([end.lag / 30, end.lag])
        for power, style in ((0, "--"), (1, ":")):
            ax.plot(lags, end.mean * (lags / end.lag) ** power, color="0.5", linestyle=style, linewidth=1.5)
    ax.plot([], [], color="0.5", linestyle="--", label="stationary: level")
    ax.plot([], [], color="0.5", linestyle=":", label="random walk: slope 1")
    ax.set(xscale="log", yscale="log", xlabel="lag (steps)", ylabel="mean squared displacement")
    ax.legend(fontsize="small", loc="upper left")


def plot_cosines(ax: Axes, G: np.ndarray) -> None:
    """The matrix of cosines between iterates, as a picture."""
    picture = ax.imshow(cosines(G), cmap="RdBu_r", vmin=-1, vmax=1, origin="lower", interpolation="nearest")
    ax.figure.colorbar(picture, ax=ax, shrink=0.85, label="cosine")
    ax.set(xlabel="step in the window", ylabel="step in the window")


def plot_radii(ax: Axes, table: pd.DataFrame) -> None:
    """Squared radius of averages against the number of points, a line per spacing, with 1/count."""
    for (spacing, t), color in zip(table.groupby("spacing"), sns.color_palette("viridis", 4), strict=False):
        label = f"{spacing} step{'' if spacing == 1 else 's'} apart"
        figures.band(ax, t, "count", "ratio", label=label, marker="o", markersize=4, color=color)
    count = np.unique(table["count"])
    figures.predicted(ax, count, 1 / count, label="independent points")
    ax.set(xscale="log", yscale="log", xlabel="number of points", ylabel="squared radius / that of one iterate")
    ax.legend(fontsize="small")


def plot_inside(ax: Axes, table: pd.DataFrame, path: str) -> None:
    """Mean loss along segments or rays; on rays with the quadratic form through the average and the iterate."""
    mean = table.query("path == @path").groupby(["seed", "position"]).loss.mean().reset_index()
    figures.band(ax, mean, "position", "loss", label="measured", marker="o", markersize=4)
    if path == "ray":
        center, iterate = at(table, path, 0).mean(), at(table, path, 1).mean()
        figures.predicted(ax, OUTWARD, center + (iterate - center) * OUTWARD**2, label="quadratic in radius")
        ax.set(xlabel="distance from the average / the iterate's")
        ax.legend(fontsize="small")
    else:
        ax.set(xlabel="position between two iterates")
    ax.set(ylabel="training loss (nats)")
