"""Gives closed forms of SGD on batch losses 1/2 (x - c_t)^T H (x - c_t) with scattered minima.

Everything is per eigendirection of H: eta = lr * curvature, q = 1 - eta, s2 = variance of the batch
minima c_t around the full minimum x* = 0, and v = variance of the stationary iterates. Heavy-ball
momentum m means v_t = m v_(t-1) + gradient, x_t = x_(t-1) - lr v_t (PyTorch's convention), which
makes x_t = (1 + m - eta) x_(t-1) - m x_(t-2) + eta c_t. Arguments broadcast; functions of a lag
take n and return lags 0..n-1 on a new last axis. All raise ConfigError for eta outside (0, 2 + 2m).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from paper_lib.errors import require

Values = float | np.ndarray  # one value, or an array of them that broadcasts with the others


def check_eta(eta: ArrayLike, momentum: float = 0.0) -> np.ndarray:
    """Return eta as float64; ConfigError unless SGD is stable: 0 <= m < 1, 0 < eta < 2 (1 + m)."""
    require(0 <= momentum < 1, "momentum", momentum, "it must lie in [0, 1)")
    eta, bound = np.asarray(eta, dtype=np.float64), 2 * (1 + momentum)
    bad = eta[~((eta > 0) & (eta < bound))]
    allowed = f"it must lie in (0, {bound:g}) at momentum {momentum:g}"
    require(bad.size == 0, "eta = lr * curvature", bad.tolist(), allowed)
    return eta


def check_decay(decay: Values, name: str = "decay") -> None:
    """ConfigError unless every decay lies in [0, 1)."""
    inside = (np.asarray(decay) >= 0) & (np.asarray(decay) < 1)
    require(bool(inside.all()), name, decay, "it must lie in [0, 1)")


def check_steps(name: str, steps: Values) -> None:
    """ConfigError unless every number of steps is at least 1."""
    require(bool(np.all(np.asarray(steps) >= 1)), name, steps, "it must be at least 1 step")


def stationary_variance(eta: Values, s2: Values = 1.0, momentum: float = 0.0) -> np.ndarray:
    """v = s2 eta / (2 - eta); with momentum s2 eta (1 + m) / ((1 - m) (2 + 2m - eta))."""
    eta, m = check_eta(eta, momentum), momentum
    return s2 * eta * (1 + m) / ((1 - m) * (2 * (1 + m) - eta))


def varying_curvature_variance(eta: Values, spread: Values, s2: Values = 1.0) -> np.ndarray:
    """v when each batch draws its own curvature, of mean h and relative deviation `spread`.

    v = s2 e / (2 - e) with e = eta (1 + spread^2): the noise of a larger learning rate, while the
    autocorrelation stays (1 - eta)^k. ConfigError once e reaches 2.
    """
    return stationary_variance(check_eta(eta) * (1 + np.square(spread)), s2)


def impulse_response(eta: Values, n: int, momentum: float = 0.0) -> np.ndarray:
    """d x_(t+k) / d c_t for k = 0..n-1: eta q^k; with momentum by its two-term recurrence."""
    eta = check_eta(eta, momentum)
    return _recurrence(eta, (1 + momentum - eta) * eta, eta, n, momentum)


def autocorrelation(eta: Values, n: int, momentum: float = 0.0) -> np.ndarray:
    """Correlation of x_t and x_(t+k), k = 0..n-1: q^k; with momentum it starts 1, 1 - eta/(1+m)."""
    eta = check_eta(eta, momentum)
    return _recurrence(np.ones_like(eta), 1 - eta / (1 + momentum), eta, n, momentum)


def _recurrence(
    first: np.ndarray, second: np.ndarray, eta: np.ndarray, n: int, m: float
) -> np.ndarray:
    """y_0 = first, y_1 = second, y_k = (1 + m - eta) y_(k-1) - m y_(k-2): shape (..., n)."""
    if m == 0:
        return first[..., None] * (1 - eta)[..., None] ** np.arange(n)
    y = np.empty((n, *eta.shape))
    y[:2] = np.stack([first, second])[:n]
    for k in range(2, n):
        y[k] = (1 + m - eta) * y[k - 1] - m * y[k - 2]
    return np.moveaxis(y, 0, -1)


def best_held_out_step(eta: Values, momentum: float = 0.0) -> np.ndarray:
    """Best held-out probe step over a full one, (1 - m) s*/lr = 1/2 / (1 + m eta / (1 - m^2)).

    A plain step of size p on one batch leaves the mean loss h/2 [(1 - p)^2 v + p^2 s2], which is
    least at p = v / (v + s2), and back at its start at twice that (claim C3). In many dimensions
    eta = lr G'HG / |G|^2 along the full gradient G. A test of stationarity alone: half a step for
    m = 0, whatever the curvatures.
    """
    eta, m = check_eta(eta, momentum), momentum
    return 0.5 / (1 + m * eta / (1 - m**2))


def gradient_cosine(eta: Values, n: int, momentum: float = 0.0) -> np.ndarray:
    """Cosine of the gradients used k = 0..n-1 steps apart (claim C4).

    -(eta/2) q^(k-1) for k >= 1; with momentum (v rho_k - s2 psi_(k-1)) / (v + s2), which may be
    positive: rho is the autocorrelation, psi the impulse response.
    """
    v = stationary_variance(eta, 1.0, momentum)[..., None]
    psi = impulse_response(eta, n, momentum)[..., :-1]
    cosine = np.ones((*v.shape[:-1], n))
    cosine[..., 1:] = (v * autocorrelation(eta, n, momentum)[..., 1:] - psi) / (v + 1)
    return cosine


def two_point_ratio(eta: Values, lag: Values) -> np.ndarray:
    """Variance of the two-point average over v: (1 + q^lag) / 2 (claim C8)."""
    check_steps("lag", lag)
    return (1 + (1 - check_eta(eta)) ** np.asarray(lag)) / 2


def ema_ratio(eta: Values, decay: Values) -> np.ndarray:
    """Variance of the EMA over v: (1-r)/(1+r) * (1+rq)/(1-rq) (claim C8)."""
    check_decay(decay)
    q, r = 1 - check_eta(eta), np.asarray(decay)
    return (1 - r) / (1 + r) * (1 + r * q) / (1 - r * q)


def uniform_ratio(eta: Values, window: Values) -> np.ndarray:
    """Variance of the mean of n iterates over v: [(1+q)/(1-q) - 2q(1-q^n) / (n (1-q)^2)] / n.

    The two terms cancel when eta n is small: the error is about 1e-16 / (eta n).
    """
    check_steps("window", window)
    eta, n = check_eta(eta), np.asarray(window)
    with np.errstate(invalid="ignore", divide="ignore"):  # the logarithm serves eta < 1/2 only
        forgotten = np.where(eta < 0.5, -np.expm1(n * np.log1p(-eta)), 1 - (1 - eta) ** n)
    return ((2 - eta) / eta - 2 * (1 - eta) * forgotten / (n * eta**2)) / n


def variance_ratio(a: np.ndarray, rho: np.ndarray) -> np.ndarray:
    """Variance of an average a (n,) over that of one iterate: sum_(s,t) a_s a_t rho_|s-t|.

    rho (..., >= n) is an autocorrelation at lags 0, 1, ..., of the model or measured.
    O(n log n): the weights' own autocorrelation, by FFT, against rho.
    """
    n, lags = len(a), rho.shape[-1]
    require(lags >= n, "number of lags", lags, f"an average of {n} iterates needs 0..{n - 1}")
    overlap = np.fft.irfft(np.abs(np.fft.rfft(a, 2 * n)) ** 2, 2 * n)[:n]
    overlap[1:] *= 2  # lags k and -k
    return rho[..., :n] @ overlap
