"""Averages and schedules are the same thing: held against simulated SGD on the same batches."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import averages, decays, etas, momenta, seeds

from paper_lib.averaging import equivalence, schedules, vectors
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
    schedule = eta * equivalence.to_schedule(a, eta, momentum)
    scheduled = simulate.sgd(c, schedule, start=start, momentum=momentum)[..., -1]
    np.testing.assert_allclose(scheduled, averaged, rtol=1e-10, atol=1e-10)


@given(st.integers(2, 60), seeds, st.data())
def test_signed_averages_and_large_eta_have_schedules_too(n, seed, data):
    rng = np.random.default_rng(seed)
    a = rng.uniform(-0.2, 1, n)
    a /= a.sum()
    eta = data.draw(etas((1,), 0.01, 1.9))
    c = rng.standard_normal((1, n - 1))
    factors = equivalence.to_schedule(a, eta)
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
    scheduled = simulate.sgd(c, eta * equivalence.to_schedule(a, eta), start=1.0)[..., -1]
    np.testing.assert_allclose(scheduled, averaged, rtol=1e-10, atol=1e-10)


@given(averages(), momenta, st.data())
def test_average_to_schedule_and_back(a, momentum, data):
    eta = stable(data.draw(etas((2, a.size - 1))), momentum)
    back = equivalence.to_average(equivalence.to_schedule(a, eta, momentum), eta, momentum)
    np.testing.assert_allclose(back, np.broadcast_to(a, back.shape), atol=1e-12)
    limit = equivalence.to_average(equivalence.to_schedule(a))
    np.testing.assert_allclose(limit, a, atol=1e-14)


@given(
    st.sampled_from(list(schedules.COOLDOWNS)), st.integers(1, 60), st.integers(0, 40), st.data()
)
def test_every_cooldown_is_an_average(name, horizon, before, data):
    factors = schedules.cooldown(name, horizon + before, horizon)
    for eta in (0.0, data.draw(etas((2, 1), 0.001, 0.5))):
        a = equivalence.to_average(factors, eta)
        assert a.min() >= 0
        np.testing.assert_allclose(a.sum(-1), 1, atol=1e-13)
        np.testing.assert_allclose(
            equivalence.to_schedule(np.atleast_2d(a)[0], np.atleast_1d(eta)[0]), factors, atol=1e-12
        )


@given(averages(), st.data())
def test_schedule_is_each_weight_over_those_up_to_it(a, data):
    eta = data.draw(etas((a.size - 1,), 0.05, 0.9))
    w = equivalence.batch_weights(a, eta)
    direct = [
        sum(a[t] * (eta[i - 1] if i else 1) * np.prod(1 - eta[i:t]) for t in range(i, a.size))
        for i in range(a.size)
    ]
    np.testing.assert_allclose(w, direct, atol=1e-14)
    np.testing.assert_allclose(
        eta * equivalence.to_schedule(a, eta), (w / w.cumsum())[1:], rtol=1e-10
    )


@given(averages(), momenta, seeds)
def test_batch_weights_are_the_average_as_a_sum_over_batches(a, momentum, seed):
    rng = np.random.default_rng(seed)
    c, eta = rng.standard_normal((1, a.size - 1)), rng.uniform(0.01, 1.9, (1, a.size - 1))
    w = equivalence.batch_weights(a, eta, momentum)
    x = simulate.sgd(c, eta, start=2.0, momentum=momentum)
    assert w[0] @ np.append(2.0, c[0]) == pytest.approx(
        x[0] @ a, rel=1e-10, abs=1e-10 * np.abs(x).max()
    )


@given(averages(), momenta)
def test_small_eta_tends_to_the_tail_sums(a, momentum):
    tail_sums = a[::-1].cumsum()[::-1][1:]
    np.testing.assert_allclose(equivalence.to_schedule(a), tail_sums, atol=1e-14)
    nearly = equivalence.to_schedule(a, 1e-9, momentum)
    np.testing.assert_allclose(nearly, tail_sums, atol=1e-5)


@pytest.mark.parametrize("eta", [0.02, 0.1, 0.3, 0.7, 1.0])
def test_closed_forms_of_the_equivalent_schedules(eta):
    steps = 3000
    k = np.arange(steps - 1, -1, -1)
    end = slice(steps - 200, None)  # 2800 steps are a long run even at eta = 0.02
    for decay in (0.5, 0.9, 0.98):  # 0.9 and 0.98 meet r = q
        exact = eta * equivalence.to_schedule(vectors.ema(steps + 1, decay), eta)
        closed = equivalence.ema_equivalent(k, eta, decay)
        np.testing.assert_allclose(closed[end], exact[end], rtol=1e-9)
        assert closed[-1] == pytest.approx(eta * (1 - decay))
        if abs(1 - eta - decay) > 0.1:  # far back, where powers have underflowed too
            np.testing.assert_allclose(closed[:100], min(eta, 1 - decay))
    for window in (1, 7, 150):
        exact = eta * equivalence.to_schedule(vectors.uniform(steps + 1, window), eta)
        np.testing.assert_allclose(equivalence.uniform_equivalent(k, eta, window), exact, rtol=1e-9)
    for lag in (1, 10, 150):
        exact = eta * equivalence.to_schedule(vectors.two_point(steps + 1, lag), eta)
        np.testing.assert_allclose(equivalence.two_point_equivalent(k, eta, lag), exact, rtol=1e-9)


@pytest.mark.parametrize("off", [1e-16, 1e-12, 1e-9, 1e-7])
def test_an_ema_as_fast_as_its_run_but_for_rounding(off):
    k = np.arange(200)
    near, at = (equivalence.ema_equivalent(k, 0.1, 0.9 + d) for d in (off, 0))
    np.testing.assert_allclose(near, at, rtol=1e-4)


@given(decays)
def test_forgotten_steps_do_not_spoil_a_schedule(decay):
    factors = equivalence.to_schedule(vectors.ema(5001, decay), 0.999)  # q^5000 underflows
    assert np.all((factors >= 0) & (factors <= 1))
    np.testing.assert_array_equal(equivalence.to_schedule(vectors.last(5001), 1.0), 1.0)


def test_a_rising_schedule_has_only_signed_weights():
    rising = np.array([1.0, 0.5, 0.8])
    with pytest.raises(ValueError, match=r"from 0.5 to 0.8 times the run's lr at step 2"):
        equivalence.to_average(rising)
    with pytest.raises(ValueError, match=r"from 1 to 1.5 times the run's lr at step 0"):
        equivalence.to_average([1.5, 1.5])
    a = equivalence.to_average(rising, eta=0.3, signed=True)
    assert a.min() < 0
    c = np.array([0.3, -1.0, 2.0])
    averaged = simulate.sgd(c, 0.3, start=1.0) @ a
    assert averaged == pytest.approx(simulate.sgd(c, 0.3 * rising, start=1.0)[-1], abs=1e-12)


def test_at_finite_eta_a_schedule_may_rise_as_fast_as_two_points_need():
    factors = equivalence.to_schedule(vectors.two_point(101, 50), 0.2)
    assert np.diff(factors).max() > 0.01  # it falls at the earlier point and climbs to 1/2
    np.testing.assert_allclose(
        equivalence.to_average(factors, 0.2), vectors.two_point(101, 50), atol=1e-12
    )
    with pytest.raises(ValueError, match="signed=True"):
        equivalence.to_average(factors)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda a: equivalence.to_schedule(a, 2.0),
            r"\(0, 2\) at momentum 0, got values from 2 to 2",
        ),
        (lambda a: equivalence.to_schedule(a, [0.1] * 9 + [-0.1]), r"from -0.1 to 0.1"),
        (
            lambda a: equivalence.to_schedule(a, 0.1, momentum=1.0),
            r"momentum must lie in \[0, 1\), got 1.0",
        ),
        (
            lambda a: equivalence.to_schedule(a, [0.1, 0.2, 0.3]),
            r"shape \(3,\) does not fit 10 steps",
        ),
        (lambda a: equivalence.to_schedule(0.9 * a, 0.1), r"sum to 1"),
        (lambda a: equivalence.to_schedule([-0.5, -0.5, 2.0], 0.5), r"step 0 needs an infinite lr"),
        (
            lambda a: equivalence.two_point_equivalent(0, 0.1, 0),
            r"lag must be at least 1 step, got 0",
        ),
        (
            lambda a: equivalence.uniform_equivalent(0, 0.1, -2),
            r"window must be at least 1 step, got -2",
        ),
        (lambda a: equivalence.to_average([1.0, np.inf]), r"finite factors"),
        (lambda a: equivalence.to_average(np.ones(10), 3.0), r"got values from 3 to 3"),
    ],
)
def test_errors_name_the_value_and_the_range(call, message):
    with pytest.raises(ValueError, match=message):
        call(vectors.ema(11, 0.9))
