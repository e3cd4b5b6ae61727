"""The stationarity test on quadratics, where the truth is known: closed forms and simulation (C10).

The gradient noise has variance 1 in every direction, so that a stationary direction of eta = lr x
curvature has E g_t^2 = 2 / (2 - eta). A run that never stops descending has one more direction, in
which the loss falls with a constant slope; the edge of descent is the slope at which the statistic
E s_t is zero (see `monitor`).
"""

from __future__ import annotations

import numpy as np
from scipy.signal import lfilter

from paper_lib.averaging.monitor import BLOCKS, StationarityTest, Window, block_length
from paper_lib.theory import simulate


def lengths(memory: float) -> tuple[int, int]:
    """Steps of a block, and of a whole window, of the test with this memory."""
    block = block_length(memory)
    return block, BLOCKS * block


def threshold(alpha: float) -> float:
    """t below which a window is taken for stationary, at this rate of false alarms."""
    return StationarityTest(alpha).threshold


# --- closed forms ---------------------------------------------------------------------------------


def opposition(eta: np.ndarray, memory: float) -> float:
    """-E s_t at stationarity: eta / ((2 - eta) (1 - b q)), summed over the directions eta (d,)."""
    return float(np.sum(eta / ((2 - eta) * (1 - memory * (1 - eta)))))


def edge(eta: np.ndarray, memory: float) -> float:
    """The slope in one more direction, squared over 1 - b, that makes E s_t = 0."""
    return float(np.sqrt((1 - memory) * opposition(eta, memory)))


def signal(eta: np.ndarray, memory: float) -> float:
    """-E s_t over the standard deviation of s_t at stationarity, for normal gradients.

    With n2 = E g_t^2, the variance of u is n2 / ((1 + b) (1 - b q)). For many directions d of one
    eta the ratio tends to sqrt(d) (eta/2) sqrt((1 + b) / (1 - b q)): d = 1 has eta/2 at b = 0,
    sqrt(eta)/2 at b = q, sqrt(eta/2) at most.
    """
    n2, forgetting = 2 / (2 - eta), 1 - memory * (1 - eta)
    means = n2 * eta / 2 / forgetting
    return float(means.sum() / np.sqrt(np.sum(n2**2 / ((1 + memory) * forgetting) + means**2)))


# --- simulation -----------------------------------------------------------------------------------


def gradients(
    rng: np.random.Generator,
    eta: np.ndarray,
    steps: int,
    seeds: int,
    distance: float = 0.0,
    slope: float = 0.0,
) -> np.ndarray:
    """Gradients used by plain SGD, (seeds, d + 1, steps); the last direction has a constant slope
    and curvature 0.

    Runs start stationary around a mean that is `distance` stationary standard deviations away in
    every direction.
    """
    curvature, s2 = eta[:, None], eta**-2.0  # lr = 1
    scatter = np.sqrt(s2 * eta / (2 - eta))
    minima = simulate.sample_minima(rng, s2, steps, seeds)
    start = scatter * (distance + rng.standard_normal((seeds, eta.size)))
    x = simulate.sgd(minima, 1.0, curvature, start)
    sloping = slope + rng.standard_normal((seeds, 1, steps))
    return np.concatenate([curvature * (x[..., :-1] - minima), sloping], axis=1)


def statistic(g: np.ndarray, memory: float) -> np.ndarray:
    """s_t = g_t . u_(t-1) for t = 1, 2, ..., as `Monitor` has it: (..., d, T) to (..., T - 1)."""
    past = lfilter([1.0], [1.0, -memory], g, axis=-1)
    return np.sum(g[..., 1:] * past[..., :-1], axis=-2)


def replay(values: np.ndarray, alpha: float, block: int) -> list[Window]:
    """All windows of a `StationarityTest` that is given the values (n,), whatever it decides."""
    test, found, begin = StationarityTest(alpha, block), [], 0
    while begin + test.window <= len(values):
        sums = values[begin : begin + test.window].reshape(BLOCKS, -1).sum(1)
        begin += test.window
        found.append(test.decide(sums))
    return found


def sign_test(values: np.ndarray, burn_in: int) -> np.ndarray:
    """Pflug's rule: the first step after `burn_in` at which the sum of values (..., n) is negative,
    n if never.
    """
    negative = np.cumsum(values, axis=-1) < 0
    negative[..., :burn_in] = False
    return np.where(negative.any(-1), negative.argmax(-1), values.shape[-1])


def first_alarm(values: np.ndarray, alpha: float, block: int) -> np.ndarray:
    """Step of the test's first alarm for each row of values (seeds, n), n if there is none."""
    alarms = ([w.end for w in replay(row, alpha, block) if w.stationary] for row in values)
    return np.array([ends[0] if ends else values.shape[-1] for ends in alarms])
