"""Builds averages of iterates as weight vectors, and applies them to a trajectory.

An average over the iterates x_0..x_T is a float64 vector `a` of length n = T + 1 with sum 1;
a trajectory is a matrix X of shape (n, P), one row per iterate, and the average is a @ X. Distances
and angles of averages follow from the Gram matrix of the iterates alone:
|a @ X|^2 = a @ (X X^T) @ a. Whatever cannot be an average raises ConfigError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike

from paper_lib.errors import ConfigError, brief, require
from paper_lib.theory.quadratic import check_decay

BLOCK_ROWS = 64  # summed in the precision of the trajectory; float64 beyond
BLOCK_BYTES = 2**25  # of a trajectory held centred at a time


def check_weights(a: ArrayLike, n: int | None = None) -> np.ndarray:
    """Return averages a (..., n) as float64; ConfigError unless finite, of sum 1 and n entries."""
    a = np.asarray(a, dtype=np.float64)
    vector = a.ndim > 0 and bool(np.isfinite(a).all())
    require(vector, "average", a, "it is a vector of finite weights")
    sums = np.ravel(a.sum(-1))
    worst = float(sums[np.abs(sums - 1).argmax()])
    require(abs(worst - 1) <= 1e-8, "sum of an average's weights", worst, "rescale them to sum 1")
    fits = n in (None, a.shape[-1])
    require(fits, "length of an average", a.shape[-1], f"the trajectory has {n} iterates")
    return a


def checkpoints(n: int, indices: ArrayLike) -> np.ndarray:
    """Weights (n,) of the mean of chosen iterates; one that is named twice counts twice."""
    chosen = np.asarray(indices)
    inside = chosen.size > 0 and 0 <= chosen.min() <= chosen.max() < n
    require(inside, "checkpoints", chosen.tolist(), f"they must lie in 0..{n - 1}")
    a = np.zeros(n)
    np.add.at(a, chosen, 1 / chosen.size)
    return a


def last(n: int) -> np.ndarray:
    """The last of n iterates: the average that does nothing."""
    return checkpoints(n, [n - 1])


def uniform(n: int, window: int) -> np.ndarray:
    """Mean of the last `window` iterates (SWA)."""
    require(1 <= window <= n, "window", window, f"of {n} iterates it averages 1..{n}")
    return checkpoints(n, n - 1 - np.arange(window))


def two_point(n: int, lag: int) -> np.ndarray:
    """Half the last iterate and half the one `lag` steps before it (claim C8)."""
    require(1 <= lag < n, "lag", lag, f"in a run of {n - 1} steps it is 1..{n - 1}")
    return checkpoints(n, [n - 1 - lag, n - 1])


def ema(n: int, decay: float) -> np.ndarray:
    """Exponential moving average m_t = decay m_(t-1) + (1 - decay) x_t, which begins at m_0 = x_0.

    So the first iterate keeps the weight decay^(n-1).
    """
    check_decay(decay)
    a = (1 - decay) * decay ** np.arange(n - 1, -1, -1.0)
    a[0] = decay ** (n - 1.0)
    return a / a.sum()  # 1 but for rounding


FAMILIES: dict[str, Callable] = {"EMA": ema, "uniform": uniform, "two points": two_point}


def named(name: str, n: int) -> np.ndarray:
    """Weights (n,) of an average by family and setting: "EMA 0.99", "uniform 9", "two points 9"."""
    family, _, setting = name.rpartition(" ")
    try:
        build, value = FAMILIES[family], float(setting) if family == "EMA" else int(setting)
    except (KeyError, ValueError):
        allowed = "write EMA and a decay, or uniform or two points and a whole number of steps"
        raise ConfigError(f"unknown average {brief(name)}: {allowed}") from None
    return build(n, value)


def on_snapshots(a: np.ndarray, steps: ArrayLike) -> np.ndarray:
    """Carry an average over all iterates to those recorded at `steps`: shape (..., len(steps)).

    Each iterate's weight moves to the nearest recorded one (the later of two equally near). With a
    stride s the schedule thereby emulated is the exact one, held constant over s steps.
    """
    a, at = check_weights(a), np.asarray(steps)
    n = a.shape[-1]
    increase = at.size > 0 and 0 <= at[0] and bool(np.all(np.diff(at) > 0)) and at[-1] < n
    require(increase, "recorded steps", at.tolist(), f"they must increase within 0..{n - 1}")
    nearest = np.searchsorted((at[1:] + at[:-1]) / 2, np.arange(n), side="right")
    recorded = np.zeros((*a.shape[:-1], at.size))
    np.add.at(recorded, (..., nearest), a)
    return recorded


def average(a: np.ndarray, X: np.ndarray) -> np.ndarray:
    """a @ X in one pass: a (n,) or (k, n), X (n, P) -> (P,) or (k, P) of X's type.

    Rows are read in order, those of no weight never, so X may be a memory map. Blocks are
    multiplied in X's precision and summed in float64, so the error does not grow with n.
    """
    a = check_weights(a, len(X))
    out = np.zeros((*a.shape[:-1], X.shape[1]))
    for rows in _weighted_blocks(a):
        out += a[..., rows].astype(X.dtype) @ X[rows]
    return out.astype(X.dtype)


def _weighted_blocks(a: np.ndarray) -> Iterator[slice]:
    """Slices of at most BLOCK_ROWS rows that together are the rows of nonzero weight."""
    weighted = np.flatnonzero(a.reshape(-1, a.shape[-1]).any(0))
    for run in np.split(weighted, np.flatnonzero(np.diff(weighted) > 1) + 1):
        for first in range(run[0], run[-1] + 1, BLOCK_ROWS):
            yield slice(first, min(first + BLOCK_ROWS, run[-1] + 1))


def center(X: np.ndarray) -> np.ndarray:
    """The uniform average (P,) of all rows of X (n, P)."""
    return average(uniform(len(X), len(X)), X)


def gram(X: np.ndarray) -> np.ndarray:
    """Gram matrix (n, n), float64, of the rows of X (n, P) around their mean.

    Centring precedes the products: differences of raw float32 products would lose distances that
    are small beside the norm of the weights.
    """
    middle = center(X)
    G = np.zeros((len(X), len(X)))
    width = max(1, BLOCK_BYTES // (len(X) * X.itemsize))
    for first in range(0, X.shape[1], width):
        columns = slice(first, first + width)
        Z = X[:, columns] - middle[columns]
        G += Z @ Z.T
    return G


def spaced_lags(n: int, count: int = 16) -> np.ndarray:
    """About `count` lags from 1 to half of n, evenly spaced on a logarithmic axis."""
    return np.unique(np.geomspace(1, n // 2, count).astype(int))


def squared_displacement(G: np.ndarray, lags: Sequence[int]) -> np.ndarray:
    """Mean over t of |x_(t+k) - x_t|^2 at each lag k, from a Gram matrix (n, n) with any centre."""
    square, n = np.diag(G), len(G)
    inside = 0 <= min(lags) <= max(lags) < n
    require(inside, "lags", list(lags), f"they must lie in 0..{n - 1}")
    return np.array([np.mean(square[k:] + square[: n - k] - 2 * np.diag(G, k)) for k in lags])


def exponent(lags: np.ndarray, displacement: np.ndarray) -> float:
    """Slope of log displacement against log lag over the longer half of the lags' log range.

    0 where the run is stationary, 1 for a random walk, between them for a wandering that slows
    down. ConfigError where iterates do not move.
    """
    far = lags >= np.sqrt(lags[0] * lags[-1])
    least = float(displacement[far].min())
    require(least > 0, "squared displacement", least, "a run at rest has no exponent")
    return float(np.polyfit(np.log(lags[far]), np.log(displacement[far]), 1)[0])
