"""Simulates the model in two dimensions, to be looked at, and puts a drawing under sliders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from IPython import get_ipython
from ipywidgets import FloatLogSlider, FloatSlider, IntSlider, interactive

from paper_lib.averaging import vectors
from paper_lib.theory import quadratic, simulate

# Curvatures and variances of the batch minima, in eigendirections that lie at ANGLE to the axes.
H = np.array([1.0, 0.15])
S2 = np.array([0.5, 1.5])
ANGLE = 25  # degrees
STEPS = 600
LAGS = 200  # the longest lag of the sliders, in steps
KINDS = ("iterate", "two-point", "EMA")


def rotate(z: np.ndarray) -> np.ndarray:
    """From eigendirections to the axes of the picture, along the last axis (..., 2)."""
    cos, sin = np.cos(np.radians(ANGLE)), np.sin(np.radians(ANGLE))
    return z @ np.array([[cos, sin], [-sin, cos]])


def points(kind: str, z: np.ndarray) -> pd.DataFrame:
    """The rows (kind, x, y) of points z (n, 2), given in eigendirections."""
    x, y = rotate(z).T
    return pd.DataFrame({"kind": kind, "x": x, "y": y})


def path(lr: float, decay: float, seed: int, steps: int = 120) -> pd.DataFrame:
    """One run from afar, rows (kind, x, y) in time; `kind` is minimum, iterate or EMA."""
    c = simulate.sample_minima(np.random.default_rng(seed), S2, steps)[0]
    x = simulate.sgd(c, lr, H[:, None], start=[-2.5, 6.0]).T
    kinds = {"minimum": c.T, "iterate": x, "EMA": np.array(list(vectors.ema_rows(x, decay)))}
    return pd.concat([points(kind, z) for kind, z in kinds.items()], ignore_index=True)


def cloud(lr: float, decay: float, lag: int, seed: int, chains: int = 300) -> pd.DataFrame:
    """Ends of independent stationary runs, and their averages: rows (kind, x, y) by KINDS."""
    n = STEPS + 1
    averages = vectors.last(n), vectors.two_point(n, lag), vectors.ema(n, decay)
    c = simulate.sample_minima(np.random.default_rng(seed), S2, STEPS, chains)
    x = simulate.sgd(c, lr, H[:, None])
    tables = [points(kind, x @ a) for kind, a in zip(KINDS, averages, strict=True)]
    return pd.concat(tables, ignore_index=True)


def predicted_variances(lr: float, decay: float, lag: int) -> dict[str, np.ndarray]:
    """Variance in each eigendirection (2,) of what `cloud` shows, by the closed forms."""
    v, eta = quadratic.stationary_variance(lr * H, S2), lr * H
    ratios = (np.ones(2), quadratic.two_point_ratio(eta, lag), quadratic.ema_ratio(eta, decay))
    return {kind: v * ratio for kind, ratio in zip(KINDS, ratios, strict=True)}


def live() -> bool:
    """Whether somebody sits before the notebook.

    Such front ends allow input(); papermill and nbval do not.
    """
    kernel = getattr(get_ipython(), "kernel", None)
    return kernel is not None and kernel.get_parent()["content"].get("allow_stdin", False)


def sliders(draw: Callable[..., Any], **start: float) -> interactive | None:
    """draw(lr, decay, lag, seed) under sliders that begin at `start`; None where nobody sees them.

    So nothing of them enters an executed notebook, whose reader sees a figure drawn before.
    (Executing widgets without a front end is not harmless either: messages to their outputs have
    left papermill waiting for ever.)
    """
    if not live():
        return None
    settle = {"continuous_update": False}  # a redraw takes a while: only once the slider rests
    start = {"lr": 0.4, "decay": 0.95, "lag": 50, "seed": 0, **start}
    ranges = {
        "lr": FloatLogSlider(min=-2, max=0, step=0.02, **settle),
        "decay": FloatSlider(min=0.0, max=0.99, step=0.01, **settle),
        "lag": IntSlider(min=1, max=LAGS, **settle),
        "seed": IntSlider(min=0, max=9, **settle),
    }
    for name, slider in ranges.items():
        slider.value, slider.description = start[name], name
    return interactive(draw, **ranges)
