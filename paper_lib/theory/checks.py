"""Checks what formulas are given: eta, momentum, decays, lengths and weight vectors."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

Values = float | np.ndarray  # one value, or an array of them that broadcasts with the others


def check_eta(eta: ArrayLike, momentum: float = 0.0) -> np.ndarray:
    """Return eta as float64; ValueError unless SGD is stable: 0 <= m < 1, 0 < eta < 2 (1 + m)."""
    eta = np.asarray(eta, dtype=np.float64)
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must lie in [0, 1), got {momentum}")
    if not np.all((eta > 0) & (eta < 2 * (1 + momentum))):
        raise ValueError(
            f"eta = lr * curvature must lie in (0, {2 * (1 + momentum):g}) at momentum "
            f"{momentum:g}, got values from {eta.min():g} to {eta.max():g}"
        )
    return eta


def check_decay(decay: Values) -> None:
    """ValueError unless every decay lies in [0, 1)."""
    if not np.all((np.asarray(decay) >= 0) & (np.asarray(decay) < 1)):
        raise ValueError(f"decay must lie in [0, 1), got {decay}")


def check_length(name: str, length: Values) -> None:
    """ValueError unless every length, in steps, is at least 1; `name` says of what."""
    if np.any(np.asarray(length) < 1):
        raise ValueError(f"{name} must be at least 1 step, got {length}")


def check_weights(a: ArrayLike, n: int | None = None) -> np.ndarray:
    """Return averages a (..., n) as float64; ValueError unless finite, of sum 1 and n entries."""
    a = np.asarray(a, dtype=np.float64)
    if a.ndim == 0 or not np.isfinite(a).all():
        raise ValueError(f"an average is a vector of finite weights, got {a!r}")
    sums = np.atleast_1d(a.sum(-1)).ravel()
    worst = sums[np.abs(sums - 1).argmax()]
    if abs(worst - 1) > 1e-8:
        raise ValueError(f"the weights of an average must sum to 1, got a sum of {worst}: rescale")
    if n is not None and a.shape[-1] != n:
        raise ValueError(f"the average weighs {a.shape[-1]} iterates, the trajectory has {n}")
    return a
