"""Simulates the model in two dimensions, to be looked at."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from paper_lib.averaging import vectors
from paper_lib.experiments.tables import tabulated
from paper_lib.theory import quadratic, simulate

# Curvatures and variances of the batch minima, in eigendirections that lie at ANGLE to the axes.
H = np.array([1.0, 0.15])
S2 = np.array([0.5, 1.5])
ANGLE = 25  # degrees
STEPS = 600
KINDS = ("iterate", "two-point", "EMA")


def rotate(z: np.ndarray) -> np.ndarray:
    """From eigendirections to the axes of the picture, along the last axis (..., 2)."""
    cos, sin = np.cos(np.radians(ANGLE)), np.sin(np.radians(ANGLE))
    return z @ np.array([[cos, sin], [-sin, cos]])


@tabulated
def cloud(lr: float, decay: float, lag: int, seed: int, chains: int = 300) -> Iterator[dict]:
    """Ends of independent stationary runs, and their averages: rows (kind, x, y) by KINDS."""
    n = STEPS + 1
    averages = vectors.last(n), vectors.two_point(n, lag), vectors.ema(n, decay)
    c = simulate.sample_minima(np.random.default_rng(seed), S2, STEPS, chains)
    iterates = simulate.sgd(c, lr, H[:, None])
    for kind, a in zip(KINDS, averages, strict=True):
        x, y = rotate(iterates @ a).T
        yield {"kind": kind, "x": x, "y": y}


def predicted_variances(lr: float, decay: float, lag: int) -> dict[str, np.ndarray]:
    """Variance in each eigendirection (2,) of what `cloud` shows, by the closed forms."""
    v, eta = quadratic.stationary_variance(lr * H, S2), lr * H
    ratios = (np.ones(2), quadratic.two_point_ratio(eta, lag), quadratic.ema_ratio(eta, decay))
    return {kind: v * ratio for kind, ratio in zip(KINDS, ratios, strict=True)}
