"""Averages and schedules are the same thing: held against simulated SGD on the same batches."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from strategies import averages, decays, etas, momenta, seeds

from paper_lib.averaging import equivalence, schedules, vectors
from paper_lib.averaging.equivalence import to_average, to_schedule
from paper_lib.errors import ConfigError
from paper_lib.theory import simulate


def stable(eta: np.ndarray, momentum: float) -> np.ndarray:
    """Scale eta to where momentum is overdamped, so that no equivalent lr is infinite."""
    return eta * (1 - np.sqrt(momentum)) ** 2


@given(averages(), seeds, momenta, st.sampled_from([(), (1,), (3, 1), "steps"]), st.data())
def test_sgd_under_the_schedule_ends_where_the_average_lies(a, seed, momentum, shape, data):
    steps = a.size - 1
    eta = stable(data.draw(etas((3, steps) if shape == "steps" else shape)), momentum)
    rng = np.random.default_rng(seed)
    c, start = rng.standard_normal((3, steps)), rng.standard_normal(3)
    averaged = simulate.sgd(c, eta, start=start, momentum=momentum) @ a
    schedule = eta * to_schedule(a, eta, momentum)
    scheduled = simulate.sgd(c, schedule, start=start, momentum=momentum)[..., -1]
    assert_allclose(scheduled, averaged, rtol=1e-10, atol=1e-10)


@given(st.integers(2, 60), seeds, st.data())
def test_signed_averages_and_large_eta_have_schedules_too(n, seed, data):
    rng = np.random.default_rng(seed)
    a = rng.uniform(-0.2, 1, n)
    a /= a.sum()
    eta = data.draw(etas((1,), 0.01, 1.9))
    c = rng.standard_normal((1, n - 1))
    factors = to_schedule(a, eta)
    # a step far beyond stability amplifies rounding: judge against the largest iterate on the way
    x = simulate.sgd(c, eta * factors, start=1.0)
    error = np.abs(x[..., -1] - simulate.sgd(c, eta, start=1.0) @ a)
    amplified = np.abs(1 - eta * factors)[..., ::-1].cumprod(-1).max() * np.abs(x).max()
    assert error <= 1e-10 * max(1, amplified)


def test_ten_thousand_steps_in_a_hundred_directions():
    rng, n = np.random.default_rng(0), 10_001
    ends = n - 100 * np.arange(50)  # an average of averages
    a = np.mean([np.pad(vectors.uniform(end, 20), (0, n - end)) for end in ends], axis=0)
    eta = np.geomspace(1e-4, 1, 100)[:, None]
    c = rng.standard_normal((100, n - 1))
    averaged = simulate.sgd(c, eta, start=1.0) @ a
    scheduled = simulate.sgd(c, eta * to_schedule(a, eta), start=1.0)[..., -1]
    assert_allclose(scheduled, averaged, rtol=1e-10, atol=1e-10)


@given(averages(), momenta, st.data())
def test_average_to_schedule_and_back(a, momentum, data):
    eta = stable(data.draw(etas((2, a.size - 1))), momentum)
    back = to_average(to_schedule(a, eta, momentum), eta, momentum)
    assert_allclose(back, np.broadcast_to(a, back.shape), atol=1e-12)
    limit = to_average(to_schedule(a))
    assert_allclose(limit, a, atol=1e-14)


NAMES = st.sampled_from(list(schedules.COOLDOWNS))


@given(NAMES, st.integers(1, 60), st.integers(0, 40), st.just(0.0) | st.floats(0.001, 0.5))
def test_every_cooldown_is_an_average(name, horizon, before, eta):
    factors = schedules.cooldown(name, horizon + before, horizon)
    a = to_average(factors, eta)
    assert a.min() >= 0
    assert a.sum() == pytest.approx(1, abs=1e-13)
    assert_allclose(to_schedule(a, eta), factors, atol=1e-12)


@given(averages(), momenta, seeds)
def test_batch_weights_are_the_average_as_a_sum_over_batches(a, momentum, seed):
    rng = np.random.default_rng(seed)
    c, eta = rng.standard_normal(a.size - 1), rng.uniform(0.01, 1.9, a.size - 1)
    w = equivalence.batch_weights(a, eta, momentum)
    x = simulate.sgd(c, eta, start=2.0, momentum=momentum)
    scale = np.abs(x).max()
    assert w @ np.append(2.0, c) == pytest.approx(x @ a, rel=1e-10, abs=1e-10 * scale)


@given(averages(), momenta)
def test_small_eta_tends_to_the_tail_sums(a, momentum):
    tail_sums = a[::-1].cumsum()[::-1][1:]
    assert_allclose(to_schedule(a), tail_sums, atol=1e-14)
    nearly = to_schedule(a, 1e-9, momentum)
    assert_allclose(nearly, tail_sums, atol=1e-5)


@pytest.mark.parametrize("eta", [0.02, 0.1, 0.3, 0.7, 1.0])
def test_closed_forms_of_the_equivalent_schedules(eta):
    steps = 3000
    k = np.arange(steps - 1, -1, -1)
    end = slice(steps - 200, None)  # 2800 steps are a long run even at eta = 0.02

    def exact_of(a):
        return eta * to_schedule(a, eta)

    for decay in (0.5, 0.9, 0.98):  # 0.9 and 0.98 meet r = q
        exact = exact_of(vectors.ema(steps + 1, decay))
        closed = equivalence.ema_equivalent(k, eta, decay)
        assert_allclose(closed[end], exact[end], rtol=1e-9)
        assert closed[-1] == pytest.approx(eta * (1 - decay))
        if abs(1 - eta - decay) > 0.1:  # far back, where powers have underflowed too
            assert_allclose(closed[:100], min(eta, 1 - decay))
    for n in (1, 10, 150):
        for closed, a in (
            (equivalence.uniform_equivalent(k, eta, n), vectors.uniform(steps + 1, n)),
            (equivalence.two_point_equivalent(k, eta, n), vectors.two_point(steps + 1, n)),
        ):
            assert_allclose(closed, exact_of(a), rtol=1e-9)


@pytest.mark.parametrize("off", [1e-16, 1e-12, 1e-9, 1e-7])
def test_an_ema_as_fast_as_its_run_but_for_rounding(off):
    k = np.arange(200)
    near, at = (equivalence.ema_equivalent(k, 0.1, 0.9 + d) for d in (off, 0))
    assert_allclose(near, at, rtol=1e-4)


@given(decays)
def test_forgotten_steps_do_not_spoil_a_schedule(decay):
    factors = to_schedule(vectors.ema(5001, decay), 0.999)  # q^5000 underflows
    assert np.all((factors >= 0) & (factors <= 1))
    assert_array_equal(to_schedule(vectors.last(5001), 1.0), 1.0)


def test_a_rising_schedule_has_no_average():
    with pytest.raises(ConfigError, match="weight of x_2 would be -0.3: .*do not rise"):
        to_average([1.0, 0.5, 0.8])
    with pytest.raises(ConfigError, match="weight of x_0 would be -0.5"):
        to_average([1.5, 1.5])


def test_at_finite_eta_a_schedule_may_rise_as_fast_as_two_points_need():
    a = vectors.two_point(101, 50)
    factors = to_schedule(a, 0.2)
    assert np.diff(factors).max() > 0.01  # it falls at the earlier point and climbs to 1/2
    assert_allclose(to_average(factors, 0.2), a, atol=1e-12)
    with pytest.raises(ConfigError, match="do not rise"):
        to_average(factors)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: to_schedule(a, 2.0), r"\[2.0\] .*\(0, 2\) at momentum 0"),
        (lambda a: to_schedule(a, [0.1] * 9 + [-0.1]), r"curvature = \[-0.1\]"),
        (lambda a: to_schedule(a, 0.1, momentum=1.0), "momentum = 1.0"),
        (lambda a: to_schedule(a, [0.1, 0.2, 0.3]), r"shape of eta = \(3,\) .*1 or 10"),
        (lambda a: to_schedule(0.9 * a, 0.1), "rescale"),
        (lambda a: to_schedule([-0.5, -0.5, 2.0], 0.5), "step 0 needs an infinite lr"),
        (lambda a: equivalence.two_point_equivalent(0, 0.1, 0), "lag = 0 .*at least 1 step"),
        (lambda a: equivalence.uniform_equivalent(0, 0.1, -2), "window = -2 .*at least 1 step"),
        (lambda a: to_average([1.0, np.inf]), "finite factors"),
        (lambda a: to_average(np.ones(10), 3.0), r"curvature = \[3.0\]"),
    ],
)
def test_errors_name_the_value_and_the_range(call, message):
    with pytest.raises(ConfigError, match=message):
        call(vectors.ema(11, 0.9))
