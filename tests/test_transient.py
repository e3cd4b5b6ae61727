"""The transient model: closed forms against simulated runs, its stationary limit, and spectra found from curves."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import etas, seeds

from paper_lib.averaging import schedules
from paper_lib.theory import quadratic, simulate, transient
from paper_lib.theory.transient import Transient

LR, T = 0.5, 300
H, S2, START = np.array([0.02, 0.3, 2.2]), np.array([3.0, 1.0, 0.5]), np.array([2.0, -1.0, 0.5])


@pytest.mark.parametrize("name", ["constant", "cosine", "step"])
def test_losses_are_those_of_simulated_runs(name):
    lrs = LR * schedules.factors(name, T)
    c = simulate.sample_minima(np.random.default_rng(0), S2, T - 1, seeds=4000)
    x = simulate.sgd(c, lrs[:-1], H[:, None], start=START)
    loss = (H[:, None] * x**2 / 2).sum(1)
    found = Transient(H, H**2 * START**2, H**2 * S2).losses(lrs)
    z = (loss.mean(0) - loss[0, 0] - found)[1:] / (loss[:, 1:].std(0) / np.sqrt(len(x)))
    assert np.abs(z).max() < 5
    assert np.abs(z).mean() < 1.5


@given(etas((6,), low=0.02, high=1.9), seeds)
def test_a_stationary_state_stays_and_a_lower_rate_leads_to_its_own(eta, seed):
    e = np.random.default_rng(seed).exponential(size=6)
    state = transient.of_losses(eta / LR, e, 0 * e, LR)
    np.testing.assert_allclose(state.losses(np.full(50, LR)), 0, atol=1e-10)
    s2 = state.noise2 / (eta / LR) ** 2
    np.testing.assert_allclose(e, eta / LR * quadratic.stationary_variance(eta, s2) / 2)
    level = (eta / LR * quadratic.stationary_variance(eta / 2, s2) / 2 - e).sum()
    assert state.losses(np.full(500, LR / 2))[-1] == pytest.approx(level, rel=1e-3)


def test_settled_is_the_stationary_state_of_the_same_noise():
    start = Transient(np.append(H, 0), np.ones(4), np.ones(4))
    settled = start.settled(LR)
    v = quadratic.stationary_variance(LR * H, 1 / H**2)
    np.testing.assert_allclose(start.excess(LR)[:3], H * v / 2)
    np.testing.assert_allclose(settled.losses(np.full(100, LR))[1:], 0, atol=1e-12)
    np.testing.assert_allclose(settled.gradient2[:3], H**2 * v)
    assert settled.gradient2[3] == 0
    assert start.gradient_share(below=0.1) == pytest.approx(0.5)
    assert Transient(np.full(1, 2 / LR), np.ones(1), np.ones(1)).excess(LR)[0] == np.inf


def test_without_noise_the_mean_is_all():
    lrs = LR * schedules.factors("linear", 40)
    state = transient.of_losses(H, np.zeros(3), np.ones(3), LR)
    kept = np.cumprod(1 - lrs[:-1, None] * H, axis=0) ** 2
    np.testing.assert_allclose(state.losses(lrs)[1:], (kept - 1).sum(1), rtol=1e-12)


def test_a_flat_direction_falls_with_the_learning_rate_and_is_the_limit_of_small_curvatures():
    lrs = LR * schedules.factors("linear", 40)
    flat = Transient(np.zeros(1), np.ones(1), np.ones(1)).losses(lrs)
    np.testing.assert_allclose(flat, -np.append(0, np.cumsum(lrs[:-1])), rtol=1e-12)
    np.testing.assert_allclose(Transient(np.full(1, 1e-9), np.ones(1), np.ones(1)).losses(lrs), flat, rtol=1e-6)


def test_a_curve_shows_its_spectrum_and_predicts_other_schedules():
    h = np.geomspace(0.001, 1, 5) / LR
    excess, drift = np.array([0, 0, 0.1, 0, 0.05]), np.array([0.1, 0, 0, 0, 0])
    truth = transient.of_losses(h, excess, drift, LR)
    lrs = LR * schedules.factors("step", 2 * T)
    found = transient.fit_response(truth.response(lrs, LR), lrs, LR, h)
    np.testing.assert_allclose(found, (excess, drift), atol=0.01)
    other = LR * schedules.factors("cosine", T)
    np.testing.assert_allclose(
        transient.of_losses(h, *found, LR).response(other, LR), truth.response(other, LR), atol=5e-4
    )


def test_directions_between_the_grids_are_predicted_too():
    truth = transient.of_losses([0.037 / LR, 0.21 / LR], np.array([0.1, 0.1]), np.zeros(2), LR)
    h, lrs = np.geomspace(0.01, 1, 9) / LR, LR * schedules.factors("step", 2 * T)
    noisy = truth.response(lrs, LR) + 0.02 * np.random.default_rng(0).standard_normal(len(lrs))
    found = transient.of_losses(h, *transient.fit_response(noisy, lrs, LR, h), LR)
    other = LR * schedules.factors("linear", T)
    error = found.response(other, LR) - truth.response(other, LR)
    assert np.sqrt(np.mean(error**2)) < 0.03 * np.ptp(truth.response(other, LR))


@given(seeds, st.integers(2, 8))
def test_spectral_measure_is_exact_for_polynomials(seed, n):
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((12, 12))
    A, vector = (A + A.T) / 5, rng.standard_normal(12)
    nodes, weights = transient.spectral_measure(lambda v: A @ v, vector, n)
    assert weights.min() >= 0
    for degree in range(2 * n):
        expected = vector @ np.linalg.matrix_power(A, degree) @ vector
        scale = vector @ vector * np.linalg.norm(A, 2) ** degree
        assert weights @ nodes**degree == pytest.approx(expected, abs=1e-9 * scale)


def test_spectral_measure_stops_where_the_vector_has_no_more_directions():
    nodes, weights = transient.spectral_measure(lambda v: np.arange(1.0, 6) * v, np.array([3.0, 0, 4, 0, 0]), 5)
    np.testing.assert_allclose(nodes, [1, 3], rtol=1e-12)
    np.testing.assert_allclose(weights, [9, 16], rtol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Transient(np.ones(2), np.ones(2), np.ones(3)), "vectors of one length"),
        (lambda: Transient(np.array([-0.1]), np.ones(1), np.ones(1)), "got -0.1"),
        (lambda: transient.of_losses([5.0], np.ones(1), np.ones(1), LR), "eta = lr"),
    ],
)
def test_errors_name_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()
