"""Pairs of runs that share batches or a start: do they meet, and is the loss flat between them (claim C9)?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from scipy.interpolate import RectBivariateSpline

from paper_lib import runs
from paper_lib.averaging import vectors
from paper_lib.config import RunConfig
from paper_lib.data import Dataset
from paper_lib.errors import require
from paper_lib.probing import probe
from paper_lib.results import figures
from paper_lib.runs import Run
from paper_lib.training.flat import NetFactory

OTHER_BATCHES = 1000  # is added to a run's stream for batches that it does not see
POSITIONS = np.linspace(0, 1, 11)  # on a segment
BELOW = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.15), "ncols": 2}  # a legend under its axes


def other_batches(config: RunConfig) -> RunConfig:
    """The same run on other batches."""
    return config.replace(batch_seed=config.stream + OTHER_BATCHES)


def other_start(config: RunConfig, seed: int) -> RunConfig:
    """The same batches from the weights that the parent reaches with another seed (and its own batches)."""
    require(seed != config.seed, "seed", seed, "another start needs another seed")
    return config.replace(seed=seed, batch_seed=config.stream)


def companions(config: RunConfig, seeds: Sequence[int], perturbations: Sequence[float]) -> dict[str, RunConfig]:
    """The runs to compare with a branch, by name: other batches, displaced starts, and the start of the next seed."""
    following = seeds[(list(seeds).index(config.seed) + 1) % len(seeds)] if len(seeds) > 1 else config.seed + 1
    displaced = {f"same batches, start {p:g} away": config.replace(perturbation=p) for p in perturbations}
    start = {"same batches, another seed's start": other_start(config, following)}
    return {"other batches, same start": other_batches(config), **displaced, **start}


def distances(run: Run, other: Run, kind: str = "") -> pd.DataFrame:
    """Distance of two runs at the steps that both recorded, a row each.

    Columns seed, lr, kind, step (after the start), distance |x - y|, ratio (to the distance at the start; NaN where
    that is zero), and cosine of the displacements from each run's own start.
    """
    start = run.config.start
    steps = np.intersect1d(run.steps, other.steps)
    require(start in steps and len(steps) > 1, "record", run.config.record, f"both must keep {start} and later steps")
    X, Y = (np.array(r.weights[r.rows(steps)], np.float64) for r in (run, other))
    distance = np.linalg.norm(X - Y, axis=1)
    X, Y = X - X[0], Y - Y[0]
    moved = np.linalg.norm(X, axis=1) * np.linalg.norm(Y, axis=1)
    columns = {
        "seed": run.config.seed, "lr": run.config.lr, "kind": kind, "step": steps - start, "distance": distance,
        "ratio": np.divide(distance, distance[0], out=np.full(len(steps), np.nan), where=distance[0] > 0),
        "cosine": np.divide((X * Y).sum(1), moved, out=np.full(len(steps), np.nan), where=moved > 0),
    }  # fmt: skip
    return pd.DataFrame(columns)


def parting(reference: np.ndarray, steps: Sequence[int]) -> np.ndarray:
    """Squared distance that the model predicts for two runs on different batches, from one run alone, (n_steps,).

    2 v (1 - q^(2t)) is the run's own mean squared displacement at lag 2t, whatever the spectrum is. `reference` is the
    Gram matrix of a stationary window longer than twice the last step.
    """
    return vectors.squared_displacement(reference, 2 * np.asarray(steps))


def between(
    run: Run,
    ends: dict[str, tuple[np.ndarray, np.ndarray]],
    dataset: Dataset,
    n_batches: int = 8,
    model: NetFactory | None = None,
) -> pd.DataFrame:
    """Training loss on the segment between each named pair of weight vectors: columns seed, kind, position, loss."""
    c, tables = run.config, []
    net, batches = runs.network(run, dataset, model), probe.fixed_batches(dataset, n_batches, c.batch_size, c.seed)
    for kind, (a, b) in ends.items():
        loss = probe.line(net, a, b - a, POSITIONS, *batches).mean(1)
        tables.append(pd.DataFrame({"seed": c.seed, "kind": kind, "position": POSITIONS, "loss": loss}))
    return pd.concat(tables, ignore_index=True)


def barriers(table: pd.DataFrame) -> pd.DataFrame:
    """Greatest rise of the loss over the line between its values at the ends, per kind and seed, in nats.

    At least 0; `middle` is the loss midway minus the mean of the ends, negative where averaging helps.
    """
    rows = []
    for (kind, seed), t in table.groupby(["kind", "seed"], sort=False):
        loss, p = t.loss.to_numpy(), t.position.to_numpy()
        rise = loss - (loss[0] + p * (loss[-1] - loss[0]))
        rows.append({"kind": kind, "seed": seed, "barrier": rise.max(), "middle": rise[len(rise) // 2]})
    return pd.DataFrame(rows)


def plane(corners: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An orthonormal frame of the plane through three weight vectors: origin (P,), axes (2, P), corners in it (3, 2).

    The origin is their mean. ConfigError if they lie on one line.
    """
    points = np.array(corners, np.float64)
    origin = points.mean(0)
    _, size, axes = np.linalg.svd(points - origin, full_matrices=False)
    require(size[1] > 1e-6 * size[0], "corners", size.tolist(), "three points on one line span no plane")
    return origin, axes[:2], (points - origin) @ axes[:2].T


def surface(
    run: Run,
    corners: Sequence[np.ndarray],
    dataset: Dataset,
    n: int = 13,
    n_batches: int = 8,
    margin: float = 0.3,
    model: NetFactory | None = None,
) -> tuple[pd.DataFrame, np.ndarray]:
    """Training loss on a grid (n x n) of the plane through three weight vectors: columns u, w, loss; and the corners.

    The grid reaches `margin` times its own size beyond the corners.
    """
    origin, axes, at = plane(corners)
    extent = np.ptp(at, axis=0)
    u, w = (np.linspace(at[:, i].min() - margin * extent[i], at[:, i].max() + margin * extent[i], n) for i in (0, 1))
    grid = np.stack([z.ravel() for z in np.meshgrid(u, w)], axis=1)
    net = runs.network(run, dataset, model)
    batches = probe.fixed_batches(dataset, n_batches, run.config.batch_size, run.config.seed)
    loss = probe.losses(net, (origin + grid @ axes).astype(np.float32), *batches, progress="plane").mean(1)
    return pd.DataFrame({"u": grid[:, 0], "w": grid[:, 1], "loss": loss}), at


def plot_distances(ax: Axes, table: pd.DataFrame) -> None:
    """Distance against step for each kind of pair; `table` is of one learning rate."""
    figures.band(ax, table, "step", "distance", hue="kind", log=True)
    ax.set(yscale="log", xlabel="steps after the start", ylabel="distance of the two runs")


def plot_cosines(ax: Axes, table: pd.DataFrame) -> None:
    """Cosine of the displacements against step for each kind of pair."""
    figures.band(ax, table.dropna(subset="cosine"), "step", "cosine", hue="kind")
    ax.set(xlabel="steps after the start", ylabel="cosine of the displacements", ylim=(None, 1.05))


def plot_between(ax: Axes, table: pd.DataFrame) -> None:
    """Loss along the segments, a line per kind."""
    figures.band(ax, table, "position", "loss", hue="kind")
    ax.set(xlabel="position between the two runs", ylabel="training loss (nats)")
    ax.legend(fontsize="small", **BELOW)


def plot_surface(ax: Axes, table: pd.DataFrame, corners: np.ndarray, labels: Sequence[str]) -> None:
    """Contours of the loss on the plane, with the three corners and their mean marked.

    The grid is interpolated by cubic splines through its points, so that contours are no polygons.
    """
    u, w = np.unique(table.u), np.unique(table.w)
    measured = RectBivariateSpline(w, u, table.loss.to_numpy().reshape(len(w), len(u)))
    u, w = (np.linspace(axis[0], axis[-1], 200) for axis in (u, w))
    loss = measured(w, u)
    filled = ax.contourf(u, w, loss, levels=14, cmap="viridis_r")
    ax.contour(u, w, loss, levels=14, colors="white", linewidths=0.5)
    ax.figure.colorbar(filled, ax=ax, label="training loss (nats)")
    for point, label, color in zip(corners, labels, sns.color_palette("bright"), strict=False):
        ax.plot(*point, "o", color=color, markeredgecolor="white", markersize=11, label=label)
    ax.plot(0, 0, "*", color="white", markeredgecolor="black", markersize=16, label="their mean")
    ax.set(xlabel="weights, first axis", ylabel="weights, second axis", aspect="equal")
    ax.legend(fontsize="small", **BELOW)
