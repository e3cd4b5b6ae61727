"""Simulates SGD on quadratics with scattered minima: the reference for every closed form.

Batch t has the loss 1/2 (x - c_t)^T H_t (x - c_t); its minimum c_t is drawn around x* = 0, and H_t
is the same for all batches or one for each.

Time is the last axis: minima are (..., T), iterates (..., T+1), and `x @ a` is an average of them.
Leading axes are seeds and directions in any number.
"""

from __future__ import annotations

import numpy as np

from paper_lib.errors import require
from paper_lib.theory.quadratic import Values


def sample_minima(rng: np.random.Generator, s2: Values, steps: int, seeds: int = 1) -> np.ndarray:
    """Gaussian batch minima around x* = 0 with variances s2 (d,): shape (seeds, d, steps)."""
    s2 = np.atleast_1d(np.asarray(s2, dtype=np.float64))
    require(bool(np.all(s2 >= 0)), "s2", s2.tolist(), "variances cannot be negative")
    return rng.standard_normal((seeds, s2.size, steps)) * np.sqrt(s2)[:, None]


def sgd(
    minima: np.ndarray, lr: Values, curvature: Values = 1, start: Values = 0, momentum: float = 0
) -> np.ndarray:
    """Iterates (..., T+1) of v_t = m v_(t-1) + h_t (x_(t-1) - c_t), x_t = x_(t-1) - lr_t v_t.

    lr and curvature broadcast to the minima (..., T): a scalar, a schedule (T,), one value per
    direction (d, 1), both (d, T), one per seed and batch (seeds, d, T). x_0 = start broadcasts too.
    """
    c = np.asarray(minima, dtype=np.float64)
    lr, h = np.broadcast_to(lr, c.shape), np.broadcast_to(curvature, c.shape)
    x = np.empty((c.shape[-1] + 1, *c.shape[:-1]))  # time first while it runs: contiguous steps
    x[0], velocity = start, 0.0
    for t in range(c.shape[-1]):
        velocity = momentum * velocity + h[..., t] * (x[t] - c[..., t])
        x[t + 1] = x[t] - lr[..., t] * velocity
    return np.moveaxis(x, 0, -1)
