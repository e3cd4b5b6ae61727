"""The model in two dimensions, to be looked at: scattered batch minima, SGD among them, and its averages inside."""

from __future__ import annotations

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.patches import Ellipse

from paper_lib.averaging import vectors
from paper_lib.theory import quadratic, simulate

H = np.array([1.0, 0.15])
S2 = np.array([0.5, 1.5])
"""Curvatures and variances of the batch minima, in eigendirections that lie at ANGLE to the axes."""
ANGLE = 25  # degrees
STEPS = 600
EXAMPLE = np.array([[-1.5, -0.9], [1.6, -0.7], [-1.0, 1.7], [1.1, 2.0]])  # minima of four batches, easily told apart
INSIDE = 0.9  # part of a Gaussian cloud within the ellipses drawn

COLORS = {kind: sns.color_palette("colorblind")[i] for i, kind in enumerate(["iterate", "two-point", "EMA"])}


def rotate(z: np.ndarray) -> np.ndarray:
    """From eigendirections to the axes of the picture, along the last axis (..., 2)."""
    cos, sin = np.cos(np.radians(ANGLE)), np.sin(np.radians(ANGLE))
    return z @ np.array([[cos, sin], [-sin, cos]])


def points(kind: str, z: np.ndarray) -> pd.DataFrame:
    """The rows (kind, x, y) of points z (n, 2), given in eigendirections."""
    x, y = rotate(z).T
    return pd.DataFrame({"kind": kind, "x": x, "y": y})


def path(lr: float, decay: float, seed: int, steps: int = 120) -> pd.DataFrame:
    """One run from afar, row by row in time: `kind` is minimum, iterate or EMA."""
    c = simulate.sample_minima(np.random.default_rng(seed), S2, steps)[0]
    x = simulate.sgd(c, lr, H[:, None], start=[-2.5, 6.0]).T
    kinds = {"minimum": c.T, "iterate": x, "EMA": np.array(list(vectors.ema_rows(x, decay)))}
    return pd.concat([points(kind, z) for kind, z in kinds.items()], ignore_index=True)


def averages(decay: float, lag: int) -> dict[str, np.ndarray]:
    """The weight vectors that the picture compares."""
    n = STEPS + 1
    two, ema = vectors.two_point(n, lag), vectors.ema(n, decay)
    return dict(zip(COLORS, (vectors.last(n), two, ema), strict=True))


def cloud(lr: float, decay: float, lag: int, seed: int, chains: int = 300) -> pd.DataFrame:
    """Ends of independent stationary runs, and their averages: rows (kind, x, y)."""
    c = simulate.sample_minima(np.random.default_rng(seed), S2, STEPS, chains)
    x = simulate.sgd(c, lr, H[:, None])
    return pd.concat([points(kind, x @ a) for kind, a in averages(decay, lag).items()], ignore_index=True)


def predicted_variances(lr: float, decay: float, lag: int) -> dict[str, np.ndarray]:
    """Variance in each eigendirection (2,) of what `cloud` shows, by the closed forms."""
    v, eta = quadratic.stationary_variance(lr * H, S2), lr * H
    ratios = (np.ones(2), quadratic.two_point_ratio(eta, lag), quadratic.ema_ratio(eta, decay))
    return {kind: v * ratio for kind, ratio in zip(COLORS, ratios, strict=True)}


def _ellipse(ax: Axes, center: np.ndarray, radii: np.ndarray, **style) -> None:
    """An ellipse with semi-axes `radii` along the eigendirections."""
    ax.add_patch(Ellipse(center, *(2 * radii), angle=ANGLE, fill=False, **style))


def plot_batches(ax: Axes, lr: float) -> None:
    """From one point, the step on each batch of EXAMPLE, and the contour of that batch's loss through the point."""
    x, palette = np.array([0.1, 0.5]), sns.color_palette("colorblind")
    for c, color in zip(EXAMPLE, (palette[i] for i in (3, 4, 5, 9)), strict=True):
        away = x - c
        _ellipse(ax, rotate(c), np.sqrt(H @ away**2 / H), color=color, alpha=0.5, linewidth=1.5)
        ax.plot(*rotate(c), "o", color=color, markersize=9)
        arrow = {"arrowstyle": "-|>", "color": color, "linewidth": 3, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 18}
        ax.annotate("", rotate(x - lr * H * away), rotate(x), arrowprops=arrow)
    ax.plot([], [], "o", color="0.6", markersize=9, label="minimum of a batch")
    ax.plot([], [], color="0.6", linewidth=1.5, label="level of its loss")
    ax.plot(*rotate(x), "o", color="black", markersize=9, label="iterate and its steps")
    _finish(ax)
    ax.set(xlim=(-2.7, 2.7), ylim=(-2.5, 2.9))
    ax.set_aspect("equal", adjustable="box")


def plot_path(ax: Axes, run: pd.DataFrame) -> None:
    """A run of `path`: batch minima as dots, the iterates and their EMA as lines."""
    groups = dict(iter(run.groupby("kind")))
    ax.plot(groups["minimum"].x, groups["minimum"].y, ".", color="0.7", label="batch minima", zorder=0)
    ax.plot(groups["iterate"].x, groups["iterate"].y, color=COLORS["iterate"], linewidth=1.2, label="SGD")
    ax.plot(groups["EMA"].x, groups["EMA"].y, color=COLORS["EMA"], linewidth=2.5, label="its EMA")
    _finish(ax)


def plot_cloud(ax: Axes, ends: pd.DataFrame, lr: float, decay: float, lag: int) -> None:
    """The points of `cloud`, and the ellipses that should hold nine tenths of each kind."""
    for kind, variance in predicted_variances(lr, decay, lag).items():
        at = ends.query("kind == @kind")
        ax.plot(at.x, at.y, "o", color=COLORS[kind], markersize=3.5, alpha=0.6, markeredgewidth=0, label=kind)
        radii = np.sqrt(-2 * np.log(1 - INSIDE) * variance)
        _ellipse(ax, np.zeros(2), radii, color=COLORS[kind], linestyle="--", linewidth=2.5, zorder=5)
    ax.plot([], [], "--", color="0.4", label=f"dashed: model, {INSIDE:.0%}")
    _finish(ax)


def _finish(ax: Axes) -> None:
    """Equal axes, the full minimum marked, no ticks: the unit is arbitrary."""
    ax.plot(0, 0, "*", color="black", markersize=13, linestyle="none", zorder=6, label="minimum of all batches")
    ax.set(xticks=[], yticks=[])
    ax.set_aspect("equal", adjustable="datalim")
