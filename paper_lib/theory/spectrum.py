"""Predicts losses of a network whose curvatures, gradients and gradient noise have been measured.

Directions are independent. In one of curvature h, plain SGD with gradient noise of variance g2
moves the second moment u of x (moving mean and scatter alike) by

    u_(t+1) = (1 - lr_t h)^2 u_t + lr_t^2 g2,        loss = sum of h u / 2 over directions,

which at a constant lr becomes stationary at the variance v of `quadratic`, with s2 = g2 / h^2. A
curvature may be zero: such a direction falls at the rate lr (squared gradient), and its noise costs
nothing. Steep directions weigh more in losses than in distances, so that one run shows different
timescales in the two.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import nnls

from paper_lib.errors import require
from paper_lib.theory import quadratic

FLAT = 1e-8  # lr h at which a direction is one without curvature, but for rounding


class Directions:
    """Directions of curvature h (d,), the noise of batch gradients there, and where a run stands.

    noise (d,): variance g2 of batch gradients. gradient (d,): squared full gradient h^2 u at the
    start, 0 at the minimum. All may be densities, where directions are nodes of a quadrature, and
    unbiased estimates of the gradient may be negative. ConfigError unless h and noise are not, and
    all have one length.
    """

    def __init__(self, h: ArrayLike, noise: ArrayLike, gradient: ArrayLike | None = None):
        given = (h, noise, np.zeros(np.shape(h)) if gradient is None else gradient)
        self.h, self.noise, self.gradient = (np.asarray(z, dtype=np.float64) for z in given)
        shapes = [z.shape for z in (self.h, self.noise, self.gradient)]
        same = len(set(shapes)) == 1 and self.h.ndim == 1
        require(same, "shapes of h, noise and gradient", shapes, "give vectors of one length")
        for name, least in ("h", self.h.min()), ("noise", self.noise.min()):
            require(least >= 0, name, float(least), "count negative curvatures as flat, h = 0")

    # --- at a constant learning rate, once stationary: ConfigError unless 0 < lr h < 2 (1 + m) ---

    def variances(self, lr: float, momentum: float = 0.0) -> np.ndarray:
        """Stationary variance (d,) of the iterates in each direction."""
        eta = quadratic.check_eta(lr * self.h, momentum)  # before h divides
        return quadratic.stationary_variance(eta, self.noise / self.h**2, momentum)

    def displacement(self, lr: float, lags: ArrayLike, momentum: float = 0.0) -> np.ndarray:
        """Stationary E|x_(t+k) - x_t|^2 at each lag k, summed over directions: 2 v (1 - rho_k).

        Flat directions have the limit of small curvatures, a random walk: lr^2 g2 k.
        """
        k = np.asarray(lags)
        h = np.maximum(self.h, FLAT / lr)
        v = Directions(h, self.noise).variances(lr, momentum)
        rho = quadratic.autocorrelation(lr * h, int(k.max()) + 1, momentum)
        return 2 * v @ (1 - rho[:, k])

    def averaged_loss(self, a: np.ndarray, lr: float, momentum: float = 0.0) -> float:
        """Expected loss, above the minimum's, of the average a (n,) of stationary iterates (C8)."""
        rho = quadratic.autocorrelation(lr * self.h, len(a), momentum)
        return float(quadratic.variance_ratio(a, rho) @ self.excess(lr, momentum))

    def excess(self, lr: float, momentum: float = 0.0) -> np.ndarray:
        """Loss h v / 2 = lr g2 / (2 (2 - lr h)) that noise keeps up in each direction, (d,).

        A flat direction has the limit of small curvatures, an unstable one infinity.
        """
        m, room = momentum, 2 * (1 + momentum) - lr * self.h
        level = lr * self.noise * (1 + m) / ((1 - m) * 2 * np.where(room > 0, room, 1))
        return np.where(room > 0, level, np.inf)

    def settled(self, lr: float) -> Directions:
        """The stationary state of the same noise at a constant lr."""
        return Directions(self.h, self.noise, 2 * self.h * self.excess(lr))

    # --- on the way, with plain SGD ---

    def losses(self, lrs: np.ndarray) -> np.ndarray:
        """Expected loss at x_t minus that at x_0 when step t takes lrs[t], (T,), as runs log it."""
        h, d = self.h, self.h.size
        fall, rise = np.zeros((2, len(lrs), d))  # by a squared gradient, and a noise, of 1
        kept, variance = np.ones(d), np.zeros(d)
        for t, lr in enumerate(lrs[:-1]):
            # (1 - kept) / 2h, but finite at h = 0
            fall[t + 1] = fall[t] + lr * (1 - lr * h / 2) * kept
            kept, variance = (1 - lr * h) ** 2 * kept, (1 - lr * h) ** 2 * variance + lr**2
            rise[t + 1] = h * variance / 2
        return rise @ self.noise - fall @ self.gradient

    def response(self, lrs: np.ndarray, lr: float) -> np.ndarray:
        """Expected loss under a schedule minus that at a constant lr from the same start, (T,)."""
        return self.losses(lrs) - self.losses(np.full(len(lrs), lr))


def of_losses(h: ArrayLike, excess: np.ndarray, drift: np.ndarray, lr: float) -> Directions:
    """Directions that keep up an excess loss h v / 2 at lr, and have h m^2 / 2 of drift to lose.

    All (d,), losses in nats. ConfigError unless 0 < lr h < 2: else nothing is stationary.
    """
    h = quadratic.check_eta(lr * np.asarray(h)) / lr
    noise = 2 * np.asarray(excess) * (2 - lr * h) / lr
    return Directions(h, noise, 2 * h * (excess + drift))


def fit_response(
    response: np.ndarray, lrs: np.ndarray, lr: float, h: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Non-negative excess and drift (d,), see `of_losses`, that explain a response (T,) by ridge.

    `response` is a run's loss under the schedule lrs (T,) minus that of its twin at the constant
    lr. Slow directions that gain and lose alike would cancel at any size: none is expected to
    exceed the response itself, and the noise of single steps (from their differences) says how
    strongly to expect it. ConfigError for a response that is zero throughout.
    """
    size = np.sqrt(np.mean(response**2))
    require(size > 0, "response", 0.0, "the schedule must leave the constant learning rate")
    parts = np.eye(2 * len(h)).reshape(-1, 2, len(h))  # excess first, then drift
    columns = [of_losses(h, e, drift, lr).response(lrs, lr) for e, drift in parts]
    # The median passes over sudden falls; .95 is what it is of Gaussian noise.
    noise = np.median(np.abs(np.diff(response[lrs != lr]))) / 0.95
    rows = np.concatenate([np.stack(columns, axis=1), noise / size * np.eye(2 * len(h))])
    found, _ = nnls(rows, np.append(response, np.zeros(2 * len(h))))
    return found[: len(h)], found[len(h) :]
