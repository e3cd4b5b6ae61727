"""Converts averages to learning-rate schedules and back, exactly: they are one thing (claim C5).

On quadratics with minima c_i every SGD iterate, hence every average a @ x, is a weighted sum of x_0
and c_1, c_2, ... with weights w_0, w_1, ... On the same batches, SGD under
eta'_i = w_i / (w_0 + ... + w_i) ends at that very sum. For small eta this is
lr'_i / lr_i = sum_(t>=i) a_t, the tail sum of the weights, whatever the curvature.

A schedule is a float64 array (..., T) of factors: step i (0-based, from x_i to x_(i+1)) uses
eta'_i = eta_i * factors[i], eta_i = lr_i * curvature being the averaged run's own. Time is the last
axis; leading ones are directions. eta is a scalar, (T,), (d, 1) or (d, T). eta = 0, the default, is
the limit of slow directions, in which no curvature need be known.
"""

from __future__ import annotations

import numpy as np

from paper_lib.averaging.vectors import check_weights
from paper_lib.errors import ConfigError, require
from paper_lib.theory.quadratic import Values, check_decay, check_eta, check_steps


def batch_weights(a: np.ndarray, eta: Values, momentum: float = 0.0) -> np.ndarray:
    """Weights (..., T+1) of x_0 and of the batch minima c_1..c_T in the average a @ (x_0..x_T).

    w_i = sum_(t>=i) a_t eta_i prod_(i<j<=t) (1 - eta_j) without momentum; they sum to 1.
    """
    return _adjoint(a, eta, momentum)[1]


def to_schedule(a: np.ndarray, eta: Values = 0.0, momentum: float = 0.0) -> np.ndarray:
    """Factors (..., T) of the schedule that ends, on the same batches, where the average a lies.

    With momentum, both runs use it (and start at rest). At eta = 0: the tail sums of a. ConfigError
    where no learning rate does it (signed weights, or eta above 1, may need an infinite one).
    """
    g, _ = _adjoint(a, eta, momentum)
    # eta'_i = w_i / (w_0 + ... + w_i), with w_i = eta_i g_i, and w_0 + ... + w_i = g_i + weights of
    # the average up to x_(i-1): sums of like signs, where 1 - (later w) would cancel.
    total = np.cumsum(a)[:-1] + g
    idle = (g == 0) & (total == 0)  # steps that a later one forgets: any factor does
    schedule = np.divide(g, total, out=np.ones_like(g), where=~idle & (total != 0))
    infinite = np.argwhere((total == 0) & ~idle)
    if infinite.size:
        step = infinite[0, -1]
        raise ConfigError(f"no schedule reproduces this average: step {step} needs an infinite lr")
    return schedule


def _adjoint(a: np.ndarray, eta: Values, momentum: float) -> tuple[np.ndarray, np.ndarray]:
    """Derivatives of a @ x along the run: g (..., T) by x_1..x_T, w (..., T+1) by x_0, c_1..c_T.

    Backwards through v_t = m v_(t-1) + x_(t-1) - c_t, x_t = x_(t-1) - eta_t v_t:
    w_t = eta_t g_t + m w_(t+1), g_(t-1) = a_(t-1) + g_t - w_t.
    """
    a = check_weights(a)
    steps = a.size - 1
    eta = _per_step(eta, steps, momentum)
    g, w = np.empty(eta.shape), np.empty((*eta.shape[:-1], steps + 1))
    state, weight = np.full(eta.shape[:-1], a[-1]), np.zeros(eta.shape[:-1])
    for i in range(steps - 1, -1, -1):
        weight = eta[..., i] * state + momentum * weight
        g[..., i], w[..., i + 1] = state, weight
        state = a[i] + state - weight
    w[..., 0] = state
    return g, w


def _per_step(eta: Values, steps: int, momentum: float) -> np.ndarray:
    """Broadcast eta to (..., steps), having checked that it is zero or stable."""
    eta = np.asarray(eta, dtype=np.float64)
    check_eta(np.where(eta == 0, 1.0, eta), momentum)
    fits = eta.ndim == 0 or eta.shape[-1] in (1, steps)
    require(fits, "shape of eta", eta.shape, f"its last axis must be 1 or {steps}, the steps")
    return np.broadcast_to(eta, (*eta.shape[:-1], steps))


def to_average(schedule: np.ndarray, eta: Values = 0.0, momentum: float = 0.0) -> np.ndarray:
    """Weights (..., T+1) over a run at eta whose average ends where SGD under `schedule` does.

    The inverse of to_schedule: a_t = W (f_t - f_(t+1)) + w_(t+1) (1 - f_t) with f_0 = 1, where w
    are the scheduled run's batch weights and W their sum up to t+1; at eta = 0, f_t - f_(t+1).
    ConfigError where a weight would be negative: the schedule rises.
    """
    f = np.asarray(schedule, dtype=np.float64)
    finite = f.ndim > 0 and bool(np.isfinite(f).all())
    require(finite, "schedule", f, "it is an array of finite factors")
    steps = f.shape[-1]
    eta, f = np.broadcast_arrays(_per_step(eta, steps, momentum), f)
    f = np.concatenate([np.ones((*f.shape[:-1], 1)), f], axis=-1)  # f_0 = 1, then the schedule
    a = np.empty(f.shape)
    a[..., steps] = f[..., -1]
    total, weight = np.ones(f.shape[:-1]), np.zeros(f.shape[:-1])
    for i in range(steps - 1, -1, -1):
        before, factor = f[..., i], f[..., i + 1]
        weight = eta[..., i] * factor * total + momentum * weight
        a[..., i] = total * (before - factor) + weight * (1 - before)
        total = total - weight
    if a.min() < -1e-12:
        step = int(np.unravel_index(a.argmin(), a.shape)[-1])
        advice = "averages emulate schedules that do not rise"
        raise ConfigError(f"the weight of x_{step} would be {a.min():g}: {advice}")
    return a


def ema_equivalent(k: Values, eta: Values, decay: Values) -> np.ndarray:
    """eta'_k equivalent to the EMA, k = 0, 1, ... steps back from the end of a long run.

    eta (1-r) [r^(k+1) - q^(k+1)] / [eta r^(k+1) - (1-r) q^(k+1)]: ends at eta (1-r), tends to
    min(eta, 1-r) far back. Where r and q agree but for rounding, the quotient's limit is taken.
    """
    check_decay(decay)
    eta = check_eta(eta)
    q, r, k = 1 - eta, np.asarray(decay, dtype=np.float64), np.asarray(k)
    near, middle = np.abs(r - q) < 1e-8, (r + q) / 2
    apart = np.where(near, 1.0, r - q)
    powers = np.where(near, (k + 1) * middle**k, (r ** (k + 1) - q ** (k + 1)) / apart)
    total = r ** (k + 1) + (1 - r) * powers
    far = np.broadcast_to(np.minimum(eta, 1 - r), np.shape(total)).copy()  # where powers underflow
    return np.divide(eta * (1 - r) * powers, total, out=far, where=total != 0)


def two_point_equivalent(k: Values, eta: Values, lag: Values) -> np.ndarray:
    """eta'_k equivalent to the two-point average: eta q^k / (1 + q^k) for k < lag, else eta."""
    check_steps("lag", lag)
    eta, k = check_eta(eta), np.asarray(k)
    power = (1 - eta) ** np.minimum(k, lag)  # no further: q^k may underflow
    return np.where(k < lag, eta * power / (1 + power), eta)


def uniform_equivalent(k: Values, eta: Values, window: Values) -> np.ndarray:
    """eta'_k equivalent to the mean of n iterates: about 1/(n-k) for 1/eta << k < n, eta before.

    (1 - q^(k+1)) / [n - 1 - k + (1 - q^(k+1)) / eta] for k < n.
    """
    check_steps("window", window)
    eta, k = check_eta(eta), np.asarray(k)
    taken = 1 - (1 - eta) ** (np.minimum(k, window) + 1)
    return np.where(k < window, taken / (np.maximum(window - 1 - k, 0) + taken / eta), eta)
