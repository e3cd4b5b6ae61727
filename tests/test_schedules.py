"""Named cooldowns."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from paper_lib.averaging import schedules, vectors
from paper_lib.errors import ConfigError


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
    expected = {
        "constant": [1, 1, 1, 1],
        "linear": [1, 0.75, 0.5, 0.25],
        "cosine": [1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2],
        "1-sqrt": [1, 0.5, 1 - 0.5**0.5, 1 - 0.75**0.5],
        "step": [1, 1, 0.1, 0.01],
        "polynomial": [1, 0.5625, 0.25, 0.0625],
    }
    assert expected.keys() == schedules.COOLDOWNS.keys()
    for name, factors in expected.items():
        assert schedules.factors(name, 4) == pytest.approx(factors)


@given(st.integers(1, 200), st.integers(0, 50))
def test_linear_is_the_tail_sum_of_a_uniform_average(window, before):
    a = vectors.uniform(window + before + 1, window)
    expected = schedules.cooldown("linear", window + before, window)
    assert_allclose(a[::-1].cumsum()[::-1][1:], expected, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: schedules.factors("cosin", 10), "unknown schedule 'cosin'; did you mean 'cosine'"),
        (lambda: schedules.factors("cosine", 0), "= 0 is not allowed: .* at least 1 step"),
        (lambda: schedules.cooldown("cosine", 10, 11), r"horizon = 11 .*1\.\.10 steps"),
    ],
)
def test_errors_name_the_value_and_the_range(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
