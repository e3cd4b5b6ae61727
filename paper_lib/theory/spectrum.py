"""What the model predicts for a network whose curvatures and gradient noise have been measured.

Directions are independent and each has its own eta = lr h. Losses are sums of h v / 2 over them, squared
radii sums of v, and an average keeps a part of each v that depends on its eta. Steep directions weigh
more in losses than in distances, so that one run shows different timescales in the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from paper_lib.theory import quadratic


@dataclass(frozen=True)
class Spectrum:
    """Directions of curvature h (d,) in which batch minima scatter with variance s2 (d,).

    A gradient-noise variance g2 in a direction of curvature h gives s2 = g2 / h^2. Losses are above
    the minimum's, summed over directions. ValueError unless every h > 0 and s2 >= 0.
    """

    h: np.ndarray
    s2: np.ndarray

    def __post_init__(self):
        h, s2 = (np.atleast_1d(np.asarray(z, dtype=np.float64)) for z in (self.h, self.s2))
        if h.ndim != 1 or h.shape != s2.shape:
            raise ValueError(f"h and s2 must be vectors of one length, got {h.shape}, {s2.shape}")
        if not (np.all(h > 0) and np.all(s2 >= 0)):
            raise ValueError(
                f"need h > 0 and s2 >= 0, got minima {h.min():g} and {s2.min():g}: "
                "leave out directions of no or negative curvature, which have no stationary state"
            )
        object.__setattr__(self, "h", h)
        object.__setattr__(self, "s2", s2)

    def variances(self, lr: float, momentum: float = 0.0) -> np.ndarray:
        """Stationary variance (d,) of the iterates in each direction."""
        return quadratic.stationary_variance(lr * self.h, self.s2, momentum)

    def shell_radius(self, lr: float, momentum: float = 0.0) -> float:
        """Root mean squared distance of the iterates from the minimum (claim C7)."""
        return float(np.sqrt(self.variances(lr, momentum).sum()))

    def excess_loss(self, lr: float, momentum: float = 0.0) -> float:
        """Expected loss of a stationary iterate: sum of h v / 2."""
        return float(self.h @ self.variances(lr, momentum) / 2)

    def autocorrelation(self, lr: float, n: int, momentum: float = 0.0) -> np.ndarray:
        """sum v rho_k / sum v at lags k = 0..n-1: E|x_(t+k) - x_t|^2 = 2 radius^2 (1 - this)."""
        v = self.variances(lr, momentum)
        return v @ quadratic.autocorrelation(lr * self.h, n, momentum) / v.sum()

    def averaged_loss(self, a: np.ndarray, lr: float, momentum: float = 0.0) -> float:
        """Expected loss of the average a (n,) of n stationary iterates (claim C8)."""
        rho = quadratic.autocorrelation(lr * self.h, len(a), momentum)
        return self._loss_share(quadratic.variance_ratio(a, rho), lr, momentum)

    def two_point_losses(self, lr: float, lags: Sequence[int]) -> np.ndarray:
        """Expected loss of the two-point average at each lag (plain SGD, as the next two)."""
        return self._curve(quadratic.two_point_ratio, lr, lags)

    def ema_losses(self, lr: float, decays: Sequence[float]) -> np.ndarray:
        """Expected loss of the EMA at each decay."""
        return self._curve(quadratic.ema_ratio, lr, decays)

    def uniform_losses(self, lr: float, windows: Sequence[int]) -> np.ndarray:
        """Expected loss of the mean of the last iterates, for each window."""
        return self._curve(quadratic.uniform_ratio, lr, windows)

    def _curve(self, ratio, lr: float, settings: Sequence[float]) -> np.ndarray:
        return self._loss_share(ratio(lr * self.h, np.asarray(settings)[:, None]), lr, 0.0)

    def _loss_share(self, ratio: np.ndarray, lr: float, momentum: float) -> np.ndarray:
        """Loss when each direction keeps a part ratio (..., d) of its stationary variance."""
        return ratio @ (self.h * self.variances(lr, momentum)) / 2

    def effective_lr(self, loss: float, momentum: float = 0.0) -> float:
        """The lr at which a stationary iterate has this expected loss, e.g. an average's.

        By bisection to rounding, since the loss rises from 0 at lr = 0 to infinity at the edge of
        stability. Per direction, quadratic.effective_eta gives a different one for each curvature.
        """
        if not 0 < loss < np.inf:
            raise ValueError(f"the loss above the minimum's must be positive, got {loss}")
        low, high = 0.0, 2 * (1 + momentum) / self.h.max()
        while low < (middle := (low + high) / 2) < high:
            if self.excess_loss(middle, momentum) < loss:
                low = middle
            else:
                high = middle
        return low
