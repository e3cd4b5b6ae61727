"""Named cooldowns."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paper_lib.averaging import schedules, vectors


@pytest.mark.parametrize("name", schedules.COOLDOWNS)
@pytest.mark.parametrize("steps", [1, 2, 7, 400])
def test_cooldowns_start_at_one_never_rise_and_stay_positive(name, steps):
    f = schedules.factors(name, steps)
    assert f.shape == (steps,)
    assert f.dtype == np.float64
    assert f[0] == 1
    assert np.all(np.diff(f) <= 0)
    assert f[-1] > 0


def test_cooldowns_have_the_values_their_names_promise():
    assert schedules.factors("linear", 4) == pytest.approx([1, 0.75, 0.5, 0.25])
    assert schedules.factors("cosine", 4) == pytest.approx(
        [1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2]
    )
    assert schedules.factors("1-sqrt", 4) == pytest.approx([1, 0.5, 1 - 0.5**0.5, 1 - 0.75**0.5])
    assert schedules.factors("step", 8) == pytest.approx([1] * 4 + [0.1] * 2 + [0.01] * 2)
    assert schedules.factors("polynomial", 4) == pytest.approx([1, 0.5625, 0.25, 0.0625])
    assert schedules.factors("constant", 4) == pytest.approx(1)


@given(st.integers(1, 200), st.integers(0, 50))
def test_linear_is_the_tail_sum_of_a_uniform_average(window, before):
    a = vectors.uniform(window + before + 1, window)
    tail_sums = a[::-1].cumsum()[::-1][1:]
    expected = schedules.cooldown("linear", window + before, window)
    np.testing.assert_allclose(tail_sums, expected, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: schedules.factors("cosin", 10),
            "unknown schedule 'cosin': choose one of constant, linear",
        ),
        (lambda: schedules.factors("cosine", 0), "at least 1 step, got 0"),
        (lambda: schedules.cooldown("cosine", 10, 11), r"1\.\.10 steps, got 11"),
    ],
)
def test_errors_name_the_value_and_the_range(call, message):
    with pytest.raises(ValueError, match=message):
        call()
