"""The model away from stationarity: expected losses under any learning-rate schedule, and the spectrum behind a curve.

In a direction of curvature h the second moment u of x (moving mean and scatter alike) follows, with plain SGD and
gradient noise of variance g2 = h^2 s2,

    u_(t+1) = (1 - lr_t h)^2 u_t + lr_t^2 g2,        loss = sum of h u / 2 over directions.

Curvatures may be zero: such a direction falls at the rate lr (squared gradient) and its noise costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.linalg import eigh_tridiagonal
from scipy.optimize import nnls

from paper_lib.theory.quadratic import check_eta


@dataclass(frozen=True)
class Transient:
    """Where a run stands in directions of curvature h (d,), which is all that its expected loss depends on.

    gradient2 (d,): squared full gradient h^2 u at the start; noise2 (d,): variance g2 of batch gradients. Both are
    densities where directions are nodes of a quadrature, and unbiased estimates may be negative. ValueError unless
    h >= 0 and all have one length.
    """

    h: np.ndarray
    gradient2: np.ndarray
    noise2: np.ndarray

    def __post_init__(self):
        shapes = [np.shape(z) for z in (self.h, self.gradient2, self.noise2)]
        if len(set(shapes)) != 1 or len(shapes[0]) != 1:
            raise ValueError(f"h, gradient2 and noise2 must be vectors of one length, got {shapes}")
        if np.min(self.h) < 0:
            raise ValueError(f"need h >= 0, got {np.min(self.h):g}: count negative curvatures as flat, h = 0")

    def losses(self, lrs: np.ndarray) -> np.ndarray:
        """Expected loss at x_t minus that at x_0 when step t takes lrs[t], (T,): t = 0..T-1, as a run logs it."""
        fall, rise = unit_losses(self.h, lrs)
        return rise @ self.noise2 - fall @ self.gradient2

    def excess(self, lr: float) -> np.ndarray:
        """Stationary loss h v / 2 = lr g2 / (2 (2 - lr h)) that noise keeps up in each direction at constant lr, (d,).

        A flat direction has the limit of small curvatures, an unstable one (lr h >= 2) infinity.
        """
        room = 2 - lr * self.h
        return np.where(room > 0, lr * self.noise2 / (2 * np.where(room > 0, room, 1)), np.inf)

    def gradient_share(self, below: float) -> float:
        """Share of the squared gradient in directions of curvature below a bound."""
        return float(self.gradient2[self.h < below].sum() / self.gradient2.sum())

    def settled(self, lr: float) -> Transient:
        """The stationary state of the same noise at a constant lr."""
        return Transient(self.h, 2 * self.h * self.excess(lr), self.noise2)

    def response(self, lrs: np.ndarray, lr: float) -> np.ndarray:
        """Expected loss under a schedule minus that at a constant lr from the same start, (T,)."""
        return self.losses(lrs) - self.losses(np.full(len(lrs), lr))


def unit_losses(h: np.ndarray, lrs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What a squared gradient of 1 has lost, and what noise of variance 1 has added, at x_0..x_(T-1): (T, d) each."""
    h = np.asarray(h, dtype=np.float64)
    fall, rise = np.zeros((2, len(lrs), h.size))
    kept, variance = np.ones(h.size), np.zeros(h.size)
    for t, lr in enumerate(lrs[:-1]):
        fall[t + 1] = fall[t] + lr * (1 - lr * h / 2) * kept  # = (1 - kept) / 2h afterwards, finite at h = 0
        kept, variance = (1 - lr * h) ** 2 * kept, (1 - lr * h) ** 2 * variance + lr**2
        rise[t + 1] = h * variance / 2
    return fall, rise


def of_losses(h: np.ndarray, excess: np.ndarray, drift: np.ndarray, lr: float) -> Transient:
    """Directions with a stationary excess loss h v / 2 (d,) at lr, and a mean h m^2 / 2 (d,) still to be lost (nats).

    ValueError unless 0 < lr h < 2, without which there is no stationary state.
    """
    h = check_eta(lr * np.asarray(h)) / lr
    return Transient(h, 2 * h * (excess + drift), 2 * np.asarray(excess) * (2 - lr * h) / lr)


def fit_response(response: np.ndarray, lrs: np.ndarray, lr: float, h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Non-negative excess and drift (d,), see `of_losses`, that explain a response (T,) by ridge regression.

    `response` is a run's loss under the schedule `lrs` minus that of its twin at the constant lr. Slow directions that
    gain and lose alike would cancel at any size: none is expected to exceed the response itself, and the noise of
    single steps (from their differences) says how strongly to expect it.
    """
    one = np.eye(len(h))
    columns = [of_losses(h, e, 0 * e, lr).response(lrs, lr) for e in one]
    columns += [of_losses(h, 0 * e, e, lr).response(lrs, lr) for e in one]
    noise = np.median(np.abs(np.diff(response[lrs != lr]))) / 0.95  # for Gaussian noise; passes over sudden falls
    size = np.sqrt(np.mean(response**2))
    rows = np.concatenate([np.stack(columns, axis=1), noise / size * np.eye(2 * len(h))])
    found, _ = nnls(rows, np.append(response, np.zeros(2 * len(h))))
    return found[: len(h)], found[len(h) :]


def spectral_measure(
    product: Callable[[np.ndarray], np.ndarray], vector: np.ndarray, n: int
) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights, at most n each, with vector^T f(A) vector = sum weights f(nodes): Lanczos quadrature.

    `product` multiplies a vector (P,) with the symmetric matrix A. Exact for polynomials f of degree up to 2n - 1.
    """
    basis, diagonal, off = [vector / np.linalg.norm(vector)], [], []
    for _ in range(n):
        w = np.asarray(product(basis[-1]), dtype=np.float64)
        diagonal.append(w @ basis[-1])
        for _ in range(2):  # twice: once leaves rounding that breeds copies of eigenvalues
            w = w - np.array(basis).T @ (np.array(basis) @ w)
        size = np.linalg.norm(w)
        if size < 1e-10 * max(np.abs(diagonal)) or len(diagonal) == n:
            break
        basis.append(w / size)
        off.append(size)
    nodes, vectors = eigh_tridiagonal(diagonal, off)
    return nodes, vectors[0] ** 2 * (vector @ vector)
