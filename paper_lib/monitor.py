"""Tells, while SGD runs, whether it has become stationary at its learning rate: one inner product a step.

Every step gives s_t = g_t . u_(t-1): the gradient that the step uses, against a decaying sum of the earlier ones,
u_t = b u_(t-1) + g_t. While the run descends, gradients agree and E s_t > 0. In the stationary model of claim C4,
for plain SGD and in a direction of eta = lr x curvature, q = 1 - eta,

    E s_t = -E|g_t|^2 (eta/2) / (1 - b q) < 0,   with b = 0 equal to minus the squared norm of the full gradient,

and with momentum m and b = m, where u is the optimizer's own velocity, E s_t = -|full gradient|^2 / (1 + m) whatever
the curvatures are. (b < m can have either sign: keep b >= m.)

b = 0 is the statistic of Pflug (1990). Its mean is smaller than its noise by the factor eta/2, so the sign of its sum
stops too early, or long too late (Pesme, Dieuleveut and Flammarion 2020). Two things help. Remembering more than one
gradient: the noise of s_t is white, so b = q is its matched filter and raises the signal per step from (eta/2) to
sqrt(eta/(2-eta))/2, times the root of the number of noisy directions: a stationary run is recognized after a number of
relaxation times, not after its square. And knowing the noise: means over blocks longer than the memory of u are
nearly independent, so a t-test over a window of blocks has a known rate of false alarms.

Not used: E g_t . x_t (Yaida 2018, Lang et al. 2019). Where the loss does not depend on the scale of the weights, as
under BatchNorm, a gradient is orthogonal to its weights, and that relation only tests the norm against weight decay.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from paper_lib.validate import require

BLOCKS = 8  # block means in a test
MEMORIES = 2  # length of the shortest block, in memories 1 / (1 - b) of the sum of gradients


@dataclass(frozen=True)
class Window:
    """One test: `end` counts the values that the test has seen so far, the window's `steps` last ones included.

    `t` is the mean of the window over its standard error, BLOCKS - 1 degrees of freedom; `stationary` whether that is
    significantly negative.
    """

    end: int
    steps: int
    mean: float
    t: float
    stationary: bool

    @property
    def descending(self) -> bool:
        """Whether the gradients still agreed on the whole."""
        return self.mean >= 0


class StationarityTest:
    """A one-sided t-test for E s_t < 0 on consecutive windows of values s_t; no value belongs to two windows.

    `alpha` is the rate of false alarms of a window in which E s_t = 0, and bounds it where E s_t > 0. A window that is
    negative but not significantly is followed by one twice as long, any other by one of the first length.
    """

    def __init__(self, alpha: float = 0.05, block: int = 20):
        require(0 < alpha < 0.5, "alpha", alpha, "a rate of false alarms lies in (0, 0.5)")
        require(block >= 1, "block", block, "it must be at least 1 step")
        self.threshold = float(stats.t.ppf(alpha, BLOCKS - 1))
        self._first, self._seen = block, 0
        self._begin(block)

    def _begin(self, block: int) -> None:
        self._block, self._count, self._sums = block, 0, [0.0]

    def add(self, value: float | Tensor) -> Window | None:
        """Take the next value; at the end of a window return its test. A tensor is not read before that."""
        self._sums[-1] = self._sums[-1] + value
        self._count += 1
        self._seen += 1
        if self._count == BLOCKS * self._block:
            return self._decide()
        if self._count % self._block == 0:
            self._sums.append(0.0)
        return None

    def _decide(self) -> Window:
        means = np.array([float(total) for total in self._sums]) / self._block
        mean, error = means.mean(), means.std(ddof=1) / math.sqrt(BLOCKS)
        t = float(mean / error) if error > 0 else 0.0
        window = Window(self._seen, self._count, float(mean), t, t < self.threshold)
        undecided = not (window.stationary or window.descending)
        self._begin(2 * self._block if undecided else self._first)
        return window


class Monitor:
    """Watches the gradients of a training loop, as flat vectors (P,), NumPy's or PyTorch's on any device.

    `memory` is b: the run is tested for stationarity over about 1 / (1 - b) steps and faster; it must not be less than
    the optimizer's momentum. `alpha` is the rate of false alarms per window (see `StationarityTest`). Costs one vector,
    and a read from the device per window. `windows` lists the tests so far.
    """

    def __init__(self, memory: float = 0.9, alpha: float = 0.05):
        require(0 <= memory < 1, "memory", memory, "it must lie in [0, 1)")
        self.memory, self.windows = memory, []
        self._test = StationarityTest(alpha, block_length(memory))
        self._direction = None

    def observe(self, gradient: np.ndarray | Tensor) -> bool:
        """Take the gradient of the step that is about to be made; True if the run has been found stationary.

        After that a new test begins from nothing, as it should when the learning rate has been lowered.
        """
        if self._direction is None:
            self._direction = gradient + 0
            return False
        window = self._test.add(gradient @ self._direction)
        self._direction *= self.memory
        self._direction += gradient
        if window is None:
            return False
        self.windows.append(window)
        if window.stationary:
            self._direction = None
        return window.stationary


def block_length(memory: float) -> int:
    """Steps of the shortest block: long enough that what two blocks share of the sum of gradients is small."""
    return max(2, round(MEMORIES / (1 - memory)))


def gradient_vector(optimizer: torch.optim.Optimizer) -> Tensor:
    """What the optimizer's next step descends, (P,): every gradient plus weight decay times its parameter.

    Call it between backward() and step(). Parameters without a gradient are left out, so it must always be the same.
    """
    parts = []
    for group in optimizer.param_groups:
        decay = group.get("weight_decay", 0.0)
        parts += [(p.grad + decay * p.detach()).flatten() for p in group["params"] if p.grad is not None]
    require(bool(parts), "gradients", "none", "call this after backward() and before zero_grad()")
    return torch.cat(parts)
