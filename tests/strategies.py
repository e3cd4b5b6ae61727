"""Hypothesis strategies for the algebra of averages: weights, curvatures, schedules."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

seeds = st.integers(0, 2**32 - 1)
momenta = st.sampled_from([0.0, 0.5, 0.9])
decays = st.floats(0.0, 0.99)


@st.composite
def averages(draw, min_n: int = 2, max_n: int = 60) -> np.ndarray:
    """Random non-negative weights (n,), some of them zero, that sum to 1."""
    n, rng = draw(st.integers(min_n, max_n)), np.random.default_rng(draw(seeds))
    kept = rng.random(n) < draw(st.floats(0.1, 1.0))
    a = kept * rng.exponential(size=n) ** draw(st.floats(0.5, 4.0))
    a[rng.integers(n)] += 0.1
    return a / a.sum()


def etas(
    shape: tuple[int, ...], low: float = 0.01, high: float = 1.0
) -> st.SearchStrategy[np.ndarray]:
    """Random eta, uniform in its logarithm."""
    return seeds.map(
        lambda s: np.exp(np.random.default_rng(s).uniform(np.log(low), np.log(high), shape))
    )
