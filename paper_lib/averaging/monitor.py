"""Tells, while SGD runs, whether it is stationary at its learning rate, and what averages save.

Every step gives s_t = g_t . u_(t-1): the gradient that the step uses, against a decaying sum of the
earlier ones, u_t = b u_(t-1) + g_t. While the run descends, gradients agree and E s_t > 0. In the
stationary model of claim C4, for plain SGD and in a direction of eta = lr x curvature, q = 1 - eta,

    E s_t = -E|g_t|^2 (eta/2) / (1 - b q) < 0,   for b = 0 minus the full gradient's squared norm,

and with momentum m and b = m, where u is the optimizer's own velocity, E s_t = -|full gradient|^2 /
(1 + m) whatever the curvatures are. (For b < m it can have either sign: keep b >= m.)

b = 0 is the statistic of Pflug (1990). Its mean is smaller than its noise by the factor eta/2, so
that the sign of its sum stops too early, or long too late (Pesme, Dieuleveut and Flammarion 2020).
A longer memory raises the signal per step from eta/2 to sqrt(eta)/2 at b = q, times the root of the
number of noisy directions (none gets beyond sqrt(eta/2)): stationarity shows within a number of
relaxation times 1/eta, not of their squares. And the means of blocks longer than the memory are
nearly independent, so that a t-test can be made of them.

Not used is the relation for E g_t . x_t of Yaida (2018) and Lang et al. (2019). Where the loss does
not depend on the scale of the weights, as under BatchNorm, the gradient is orthogonal to the
weights, and that relation only tests whether their norm is in balance with weight decay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from paper_lib.errors import require
from paper_lib.theory.quadratic import check_decay

# Optimizers whose weight decay goes beside the gradient's step.
DECOUPLED = (torch.optim.AdamW, torch.optim.Adafactor, torch.optim.Muon)
BLOCKS = 8  # block means in a window
BLOCK = 4  # steps of the shortest block, in memories 1 / (1 - b)
MEMORIES = (0.9, 0.97, 0.99, 0.997)  # b of the averages kept

Vector = np.ndarray | Tensor  # (P,), of NumPy or of PyTorch on any device


@dataclass(frozen=True)
class Window:
    """One test, over the last `steps` of the `end` values that were seen so far."""

    end: int
    steps: int
    mean: float  # of the values: not negative where the run descends
    t: float  # mean over its standard error, with BLOCKS - 1 degrees of freedom
    stationary: bool  # whether the mean is significantly negative


class StationarityTest:
    """A one-sided t-test for E s_t < 0 on consecutive, disjoint windows of values s_t.

    `alpha` is the nominal rate of false alarms of a window at the edge, E s_t = 0; it falls quickly
    where the run descends. The true rate is higher, up to three times with a single noisy
    direction, as sums of products are skewed. `block` is the length of the first blocks, in
    steps. A window that is negative but not significantly is followed by one of twice the length,
    any other by one of the first length. Values that are not finite never raise an alarm.
    """

    def __init__(self, alpha: float = 0.05, block: int = 40):
        require(0 < alpha < 0.5, "alpha", alpha, "a rate of false alarms lies in (0, 0.5)")
        require(block >= 1, "block", block, "it must be at least 1 step")
        self.threshold = float(stats.t.ppf(alpha, BLOCKS - 1))
        self._first = self._block = block
        self._end = self._count = 0
        self._sums: list[Any] = [0.0] * BLOCKS

    @property
    def window(self) -> int:
        """Steps of the current window."""
        return BLOCKS * self._block

    def add(self, value: float | Tensor) -> Window | None:
        """Take a value; return the test at the end of a window, before which no tensor is read."""
        index = self._count // self._block
        self._sums[index] = self._sums[index] + value
        self._count += 1
        if self._count < self.window:
            return None
        on_device = isinstance(value, Tensor)
        return self.decide(torch.stack(self._sums).tolist() if on_device else self._sums)

    def decide(self, sums: Sequence[float]) -> Window:
        """Test a whole window, given the sum of the values in each block, and begin the next."""
        means = np.array(sums) / self._block
        with np.errstate(invalid="ignore"):  # a diverged run has no deviation
            mean, error = means.mean(), means.std(ddof=1) / math.sqrt(BLOCKS)
        t = float(mean / error) if error > 0 else 0.0
        self._end += self.window
        decision = Window(self._end, self.window, float(mean), t, t < self.threshold)
        undecided = not (decision.stationary or decision.mean >= 0)  # or it is NaN
        self._block = 2 * self._block if undecided else self._first
        self._count, self._sums = 0, [0.0] * BLOCKS
        return decision


class Monitor:
    """Watches the gradients of a training loop.

    `memory` is b, not less than the optimizer's momentum: the run is tested for being stationary
    over about 1 / (1 - b) steps; `alpha` as in `StationarityTest`. It costs a vector, an inner
    product a step, and one read from the device a window. `windows` lists the tests so far.
    """

    def __init__(self, memory: float = 0.9, alpha: float = 0.05):
        self.memory = memory
        self.windows: list[Window] = []
        self._test = StationarityTest(alpha, block_length(memory))
        self._past: Vector | None = None

    def observe(self, gradient: Vector) -> bool:
        """Take the gradient (P,) of the step about to be made; True if the run is found stationary.

        After that the test begins from nothing, as it should when the learning rate has been
        lowered. ConfigError at the end of a window in which a gradient was not finite.
        """
        gradient = _widened(gradient)
        if self._past is None:
            self._past = gradient + 0
            return False
        product: Any = gradient @ self._past
        window = self._test.add(product)
        self._past *= self.memory
        self._past += gradient
        if window is None:
            return False
        advice = "some were not finite: skip such steps, as a gradient scaler does, or lower the lr"
        require(math.isfinite(window.mean), "mean product of gradients", window.mean, advice)
        self.windows.append(window)
        if window.stationary:
            self._past = None
        return window.stationary


class Averages:
    """Exponential averages of the weights with several memories, and the loss that each saves now.

    On a quadratic, for any stationary iterates (whatever curvatures, noise, momentum, optimizer),
    the average a_t = (1 - b) sum_j b^j x_(t-j) has a lower loss than the iterate, by exactly

        E [loss(x_t) - loss(a_t)] = E g_t . (x_t - a_t) / (1 + b),

    g_t being the gradient of the next batch at x_t. For plain SGD x_t - a_t = -lr b u_(t-1): a
    `Monitor` that finds s_t negative has found this average to be better than the iterate.

    `vectors` are the averages, in float32 or better: in bfloat16 they would stand still. `gains`
    are running means of the right-hand side over 1 / (1 - smoothing) steps. A memory costs a vector
    and an inner product a step. Until an average has lasted its memory, it is the uniform one.
    """

    def __init__(self, memories: Sequence[float] = MEMORIES, smoothing: float = 0.99):
        require(len(memories) > 0, "memories", memories, "give at least one")
        for memory in (*memories, smoothing):
            check_decay(memory, "memory")
        self.memories, self.smoothing = tuple(memories), smoothing
        self.gains: list[Any] = [0.0] * len(memories)
        self.vectors: list[Vector] = []
        self._steps = 0

    def observe(self, weights: Vector, gradient: Vector) -> None:
        """Take the weights (P,) before a step, and the gradient (P,) of its batch, in one order."""
        weights, gradient = _widened(weights), _widened(gradient)
        if not self.vectors:
            self.vectors = [weights + 0 for _ in self.memories]
        self._steps += 1
        for i, (memory, average) in enumerate(zip(self.memories, self.vectors, strict=True)):
            average += max(1 - memory, 1 / self._steps) * (weights - average)
            gain = gradient @ (weights - average) / (1 + memory)
            share = max(1 - self.smoothing, 1 / self._steps)
            self.gains[i] = self.gains[i] + share * (gain - self.gains[i])

    def best(self) -> tuple[float, Vector]:
        """The memory that saves most at this moment, and its average (P,)."""
        require(self._steps > 0, "steps", 0, "observe some first")
        i = max(range(len(self.memories)), key=lambda i: float(self.gains[i]))
        return self.memories[i], self.vectors[i]


def _widened(vector: Vector) -> Vector:
    """In float32 or better."""
    if isinstance(vector, Tensor):
        return vector.to(torch.promote_types(vector.dtype, torch.float32))
    return vector.astype(np.promote_types(vector.dtype, np.float32), copy=False)


def block_length(memory: float) -> int:
    """Steps of the shortest block for a memory b in [0, 1): two then share little of the past."""
    check_decay(memory, "memory")
    return max(2, round(BLOCK / (1 - memory)))


def gradient_vector(optimizer: torch.optim.Optimizer) -> Tensor:
    """The gradient (P,) of what the optimizer descends: the loss, and its decay if it is coupled.

    Decay that is decoupled, as in AdamW, is no part of it: a gain then refers to the loss without
    decay. Call it between backward() and step(). Parameters are in the optimizer's order, group by
    group, without those that have no gradient, which must be the same every time. ConfigError where
    none has one, the optimizer maximizes, or this is no optimizer.
    """
    is_optimizer = hasattr(optimizer, "param_groups")
    advice = "pass the optimizer, which knows the weight decay"
    require(is_optimizer, "optimizer", type(optimizer).__name__, advice)
    parts = []
    for group in optimizer.param_groups:
        require(not group.get("maximize"), "maximize", True, "minimize the negative instead")
        decoupled = isinstance(optimizer, DECOUPLED) or group.get("decoupled_weight_decay")
        decay = 0.0 if decoupled else group.get("weight_decay", 0.0)
        used = [p for p in group["params"] if p.grad is not None]
        parts += [(p.grad + decay * p.detach()).flatten() for p in used]
    require(bool(parts), "gradients", "none", "call this after backward() and before zero_grad()")
    return torch.cat(parts)
