"""Averages of iterates as weight vectors: building, composing and applying them to a trajectory.

An average over the iterates x_0..x_T is a float64 vector `a` of length n = T + 1 with sum 1;
a trajectory is a matrix X of shape (n, P), one row per iterate, and the average is a @ X. Distances
and angles of averages follow from the Gram matrix of the iterates alone: |a @ X|^2 = a @ (X X^T) @ a.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

BLOCK_ROWS = 64  # summed in the precision of the trajectory; float64 beyond
BLOCK_BYTES = 2**25  # of a trajectory held centred at a time


def check_weights(a: np.ndarray, n: int | None = None) -> np.ndarray:
    """Return `a` as float64; ValueError unless it is finite, sums to 1 and has n entries."""
    a = np.asarray(a, dtype=np.float64)
    if a.ndim == 0 or not np.isfinite(a).all():
        raise ValueError(f"an average is a vector of finite weights, got {a!r}")
    worst = np.atleast_1d(a.sum(-1)).ravel()
    worst = worst[np.abs(worst - 1).argmax()]
    if abs(worst - 1) > 1e-8:
        raise ValueError(f"the weights of an average must sum to 1, got a sum of {worst}: rescale")
    if n is not None and a.shape[-1] != n:
        raise ValueError(f"the average weighs {a.shape[-1]} iterates, the trajectory has {n}")
    return a


def check_decay(decay: float) -> None:
    """ValueError unless every decay lies in [0, 1)."""
    if not np.all((np.asarray(decay) >= 0) & (np.asarray(decay) < 1)):
        raise ValueError(f"decay must lie in [0, 1), got {decay}")


def check_length(name: str, length: int) -> None:
    """ValueError unless every length, in steps, is at least 1; `name` says of what."""
    if np.any(np.asarray(length) < 1):
        raise ValueError(f"{name} must be at least 1 step, got {length}")


def checkpoints(n: int, indices: Sequence[int], weights: Sequence[float] | None = None) -> np.ndarray:
    """Weights (n,) on chosen iterates, equal unless `weights` are given; they must sum to 1."""
    indices = np.asarray(indices)
    if indices.size == 0 or indices.min() < 0 or indices.max() >= n:
        raise ValueError(f"checkpoints must lie in 0..{n - 1}, got {indices.tolist()}")
    if weights is None:
        weights = np.full(indices.size, 1 / indices.size)
    a = np.zeros(n)
    np.add.at(a, indices, np.asarray(weights, dtype=np.float64))
    return check_weights(a)


def last(n: int) -> np.ndarray:
    """The last of n iterates: the average that does nothing."""
    return checkpoints(n, [n - 1])


def uniform(n: int, window: int, period: int = 1) -> np.ndarray:
    """Mean of `window` iterates, `period` steps apart, the last included (SWA)."""
    if window < 1 or period < 1:
        raise ValueError(f"window and period must be at least 1, got {window} and {period}")
    if (window - 1) * period >= n:
        raise ValueError(
            f"a window of {window} iterates every {period} steps reaches back "
            f"{(window - 1) * period} steps, but the run has {n - 1}"
        )
    return checkpoints(n, n - 1 - period * np.arange(window))


def two_point(n: int, lag: int) -> np.ndarray:
    """Half the last iterate and half the one `lag` steps before it (claim C8)."""
    if not 1 <= lag < n:
        raise ValueError(f"lag must lie in 1..{n - 1} for a run of {n - 1} steps, got {lag}")
    return checkpoints(n, [n - 1 - lag, n - 1])


def ema(n: int, decay: float, start: int = 0, debias: bool = False) -> np.ndarray:
    """Exponential moving average m_t = decay m_(t-1) + (1 - decay) x_t begun at iterate `start`.

    It begins at m_start = x_start, so that iterate keeps the weight decay^(n-1-start). With
    `debias` it begins at zero and the result is divided by 1 - decay^(n-start), as Adam does.
    """
    check_decay(decay)
    if not 0 <= start < n:
        raise ValueError(f"start must lie in 0..{n - 1}, got {start}")
    a = np.zeros(n)
    a[start:] = (1 - decay) * decay ** np.arange(n - 1 - start, -1, -1.0)
    if not debias:
        a[start] = decay ** (n - 1.0 - start)
    return a / a.sum()  # 1 but for rounding, or the division by 1 - decay^(n-start)


FAMILIES = {"EMA": ema, "uniform": uniform, "two points": two_point}


def named(name: str, n: int) -> np.ndarray:
    """Weights (n,) of an average written as family and setting: "EMA 0.99", "uniform 400" or "two points 100".

    Raises ValueError for any other name, and for a setting that does not fit n iterates.
    """
    family, _, setting = name.rpartition(" ")
    if family not in FAMILIES:
        raise ValueError(f"unknown average {name!r}: write a decay, window or lag after {', '.join(FAMILIES)}")
    kind, what = (float, "decay") if family == "EMA" else (int, "whole number")
    try:
        value = kind(setting)
    except ValueError:
        raise ValueError(f"average {name!r}: {setting!r} is no {what}") from None
    return FAMILIES[family](n, value)


def along(inner: Callable[[int], np.ndarray], n: int, times: Sequence[int]) -> np.ndarray:
    """One average seen at several times: row j holds inner(times[j] + 1), shape (len(times), n).

    `inner` maps a number of iterates to an average of them, e.g. `lambda n: ema(n, 0.99)`.
    """
    rows = np.zeros((len(times), n))
    for row, t in zip(rows, times, strict=True):
        row[: t + 1] = inner(t + 1)
    return rows


def compose(outer: np.ndarray, inner: Callable[[int], np.ndarray]) -> np.ndarray:
    """Weights (n,) of the average `outer` taken over the curve of another, e.g. an EMA of an EMA.

    Only the times that `outer` weighs are asked of `inner`, so windows may outlast the first ones.
    """
    outer = check_weights(outer)
    a = np.zeros(outer.size)
    for t in np.flatnonzero(outer):
        a[: t + 1] += outer[t] * inner(t + 1)
    return a


def on_snapshots(a: np.ndarray, steps: Sequence[int]) -> np.ndarray:
    """Carry an average over all iterates to those recorded at `steps`: shape (..., len(steps)).

    Each iterate's weight moves to the nearest recorded one (the later of two equally near). With a
    stride s the schedule thereby emulated is the exact one, held constant over s steps.
    """
    a, steps = check_weights(a), np.asarray(steps)
    n = a.shape[-1]
    if steps.size == 0 or np.any(np.diff(steps) <= 0) or steps[0] < 0 or steps[-1] >= n:
        raise ValueError(f"recorded steps must increase within 0..{n - 1}, got {steps.tolist()}")
    nearest = np.searchsorted((steps[1:] + steps[:-1]) / 2, np.arange(n), side="right")
    recorded = np.zeros((*a.shape[:-1], steps.size))
    np.add.at(recorded, (..., nearest), a)
    return recorded


def average(a: np.ndarray, X: np.ndarray) -> np.ndarray:
    """a @ X in one pass: a (n,) or (k, n), X (n, P) -> (P,) or (k, P) of X's type.

    Rows are read in order, those of no weight never, so X may be a memory map. Blocks are multiplied
    in X's precision and summed in float64, so the error does not grow with n.
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


def ema_rows(X: np.ndarray, decay: float) -> Iterator[np.ndarray]:
    """The EMA after each row of X, by its recurrence: n float64 arrays of shape (P,).

    The t-th equals average(ema(t + 1, decay), X[: t + 1]); memory O(P), whatever n is.
    """
    check_decay(decay)
    mean = None
    for row in X:
        row = np.asarray(row, dtype=np.float64)
        mean = row if mean is None else decay * mean + (1 - decay) * row
        yield mean


def gram(X: np.ndarray) -> np.ndarray:
    """Gram matrix (n, n), float64, of the rows of X (n, P) around their mean.

    Centring precedes the products: differences of raw float32 products would lose distances that
    are small beside the norm of the weights.
    """
    center = average(uniform(len(X), len(X)), X)
    G = np.zeros((len(X), len(X)))
    width = max(1, BLOCK_BYTES // (len(X) * X.itemsize))
    for first in range(0, X.shape[1], width):
        columns = slice(first, first + width)
        Z = X[:, columns] - center[columns]
        G += Z @ Z.T
    return G


def recenter(G: np.ndarray, a: np.ndarray) -> np.ndarray:
    """The Gram matrix of x_i - a @ X, from that of x_i around any other point."""
    shift = G @ check_weights(a, len(G))
    return G - shift[:, None] - shift + a @ shift


def squared_norm(a: np.ndarray, G: np.ndarray) -> np.ndarray:
    """Squared distance of the averages a (..., n) from the point around which G is taken."""
    a = check_weights(a, len(G))
    return ((a @ G) * a).sum(-1)


def squared_distance(a: np.ndarray, b: np.ndarray, G: np.ndarray) -> np.ndarray:
    """Squared distance between averages a and b (..., n), the same for any centre of G."""
    d = check_weights(a, len(G)) - check_weights(b, len(G))
    return ((d @ G) * d).sum(-1)
