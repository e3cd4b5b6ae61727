"""Gives cooldowns by name, as multiples of a run's learning rate."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from paper_lib.errors import check_names, require

# Factor against the fraction u of the cooldown that is already done, 0 <= u < 1.
COOLDOWNS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "constant": np.ones_like,
    "linear": lambda u: 1 - u,
    "cosine": lambda u: (1 + np.cos(np.pi * u)) / 2,
    "1-sqrt": lambda u: 1 - np.sqrt(u),
    "step": lambda u: np.select([u < 0.5, u < 0.75], [1.0, 0.1], 0.01),
    "polynomial": lambda u: (1 - u) ** 2,
}


def factors(name: str, steps: int) -> np.ndarray:
    """Factors (steps,) of a named cooldown: 1 at the first step, zero one step after the last.

    `constant` stays at 1; `step` divides by 10 at 1/2 and at 3/4; `polynomial` is (1 - u)^2.
    `linear` equals the tail sums of a uniform average of `steps` iterates.
    """
    check_names([name], COOLDOWNS, "schedule")
    require(steps >= 1, "steps of a schedule", steps, "it must be at least 1 step")
    return COOLDOWNS[name](np.arange(steps) / steps)


def cooldown(name: str, steps: int, horizon: int) -> np.ndarray:
    """Factors (steps,): constant, then the named cooldown over the last `horizon` steps."""
    require(1 <= horizon <= steps, "horizon", horizon, f"a cooldown lasts 1..{steps} steps")
    return np.concatenate([np.ones(steps - horizon), factors(name, horizon)])
