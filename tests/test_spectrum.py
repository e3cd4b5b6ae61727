"""Directions of the spectrum against simulated runs, stationary and on the way; and Lanczos."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from strategies import etas, seeds

from paper_lib.averaging import schedules, vectors
from paper_lib.errors import ConfigError
from paper_lib.probing.hessian import spectral_measure
from paper_lib.theory import quadratic, simulate, spectrum
from paper_lib.theory.spectrum import Directions

LR, T = 0.5, 300
H, S2, START = np.array([0.02, 0.3, 2.2]), np.array([3.0, 1.0, 0.5]), np.array([2.0, -1.0, 0.5])
BURN, N, SEEDS = 600, 101, 1500


# --- stationary ----------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_levels_of_iterates_and_of_averages_are_those_of_simulated_runs(momentum):
    h, s2 = np.geomspace(0.02, 2, 5), np.linspace(3, 1, 5)
    directions = Directions(h, h**2 * s2)
    c = simulate.sample_minima(np.random.default_rng(0), s2, BURN + N - 1, SEEDS)
    x = simulate.sgd(c, LR, h[:, None], momentum=momentum)[..., BURN:]
    expected = {"variance": directions.variances(LR, momentum).sum()}
    samples = {"variance": (x[..., -1] ** 2).sum(1)}
    for name, a in {
        "iterate": vectors.last(N),
        "EMA": vectors.ema(N, 0.9),
        "uniform": vectors.uniform(N, 30),
        "two points": vectors.two_point(N, 50),
    }.items():
        expected[name] = directions.averaged_loss(a, LR, momentum)
        samples[name] = (h * (x @ a) ** 2 / 2).sum(1)
    for name, found in samples.items():
        assert abs(found.mean() - expected[name]) < 5 * found.std() / np.sqrt(SEEDS), name
    assert expected["iterate"] == pytest.approx(directions.excess(LR, momentum).sum())


def test_two_far_points_recover_half_the_loss_as_about_half_the_lr_does():
    far = vectors.two_point(10_001, 10_000)
    directions = Directions(H, H**2 * S2)
    half = directions.excess(LR).sum() / 2
    assert directions.averaged_loss(far, LR) == pytest.approx(half)
    slow = Directions([0.01, 0.02], [1e-4, 4e-4])
    assert slow.averaged_loss(far, LR) == pytest.approx(slow.excess(LR / 2).sum(), rel=0.01)


def test_displacement_levels_off_but_in_flat_directions():
    lags, v = np.array([0, 1, 40]), quadratic.stationary_variance(LR * H, 1 / H**2)
    rho = quadratic.autocorrelation(LR * H, 41)[:, lags]
    found = Directions(np.append(H, 0), np.ones(4)).displacement(LR, lags)
    assert_allclose(found, 2 * v @ (1 - rho) + LR**2 * lags, rtol=1e-5)


# --- on the way ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["constant", "cosine", "step"])
def test_losses_are_those_of_simulated_runs(name):
    lrs = LR * schedules.factors(name, T)
    c = simulate.sample_minima(np.random.default_rng(0), S2, T - 1, seeds=4000)
    x = simulate.sgd(c, lrs[:-1], H[:, None], start=START)
    loss = (H[:, None] * x**2 / 2).sum(1)
    found = Directions(H, H**2 * S2, H**2 * START**2).losses(lrs)
    z = (loss.mean(0) - loss[0, 0] - found)[1:] / (loss[:, 1:].std(0) / np.sqrt(len(x)))
    assert np.abs(z).max() < 5
    assert np.abs(z).mean() < 1.5


@given(etas((6,), low=0.02, high=1.9), seeds)
def test_a_stationary_state_stays_and_a_lower_rate_leads_to_its_own(eta, seed):
    e = np.random.default_rng(seed).exponential(size=6)
    state = spectrum.of_losses(eta / LR, e, 0 * e, LR)
    assert_allclose(state.losses(np.full(50, LR)), 0, atol=1e-10)
    s2 = state.noise / (eta / LR) ** 2
    assert_allclose(e, eta / LR * quadratic.stationary_variance(eta, s2) / 2)
    level = (eta / LR * quadratic.stationary_variance(eta / 2, s2) / 2 - e).sum()
    assert state.losses(np.full(500, LR / 2))[-1] == pytest.approx(level, rel=1e-3)


def test_settled_is_the_stationary_state_of_the_same_noise():
    start = Directions(np.append(H, 0), np.ones(4), np.ones(4))
    settled = start.settled(LR)
    v = quadratic.stationary_variance(LR * H, 1 / H**2)
    assert_allclose(start.excess(LR)[:3], H * v / 2)
    assert_allclose(settled.losses(np.full(100, LR))[1:], 0, atol=1e-12)
    assert_allclose(settled.gradient[:3], H**2 * v)
    assert settled.gradient[3] == 0
    assert Directions([2 / LR], [1.0]).excess(LR)[0] == np.inf


def test_without_noise_the_mean_is_all():
    lrs = LR * schedules.factors("linear", 40)
    state = spectrum.of_losses(H, np.zeros(3), np.ones(3), LR)
    kept = np.cumprod(1 - lrs[:-1, None] * H, axis=0) ** 2
    assert_allclose(state.losses(lrs)[1:], (kept - 1).sum(1), rtol=1e-12)


def test_a_flat_direction_falls_with_the_lr_and_is_the_limit_of_small_curvatures():
    lrs = LR * schedules.factors("linear", 40)
    flat = Directions([0.0], [1.0], [1.0]).losses(lrs)
    assert_allclose(flat, -np.append(0, np.cumsum(lrs[:-1])), rtol=1e-12)
    nearly = Directions([1e-9], [1.0], [1.0]).losses(lrs)
    assert_allclose(nearly, flat, rtol=1e-6)


# --- spectra found from curves -------------------------------------------------------------------


def test_a_curve_shows_its_spectrum_and_predicts_other_schedules():
    h = np.geomspace(0.001, 1, 5) / LR
    excess, drift = np.array([0, 0, 0.1, 0, 0.05]), np.array([0.1, 0, 0, 0, 0])
    truth = spectrum.of_losses(h, excess, drift, LR)
    lrs = LR * schedules.factors("step", 2 * T)
    found = spectrum.fit_response(truth.response(lrs, LR), lrs, LR, h)
    assert_allclose(found, (excess, drift), atol=0.01)
    other = LR * schedules.factors("cosine", T)
    predicted = spectrum.of_losses(h, *found, LR).response(other, LR)
    assert_allclose(predicted, truth.response(other, LR), atol=5e-4)


def test_directions_between_the_grids_are_predicted_too():
    truth = spectrum.of_losses([0.037 / LR, 0.21 / LR], np.array([0.1, 0.1]), np.zeros(2), LR)
    h, lrs = np.geomspace(0.01, 1, 9) / LR, LR * schedules.factors("step", 2 * T)
    noise = 0.02 * np.random.default_rng(0).standard_normal(len(lrs))
    fitted = spectrum.fit_response(truth.response(lrs, LR) + noise, lrs, LR, h)
    other = LR * schedules.factors("linear", T)
    expected = truth.response(other, LR)
    error = spectrum.of_losses(h, *fitted, LR).response(other, LR) - expected
    assert np.sqrt(np.mean(error**2)) < 0.03 * np.ptp(expected)


# --- Lanczos -------------------------------------------------------------------------------------


@given(seeds, st.integers(2, 8))
def test_spectral_measure_is_exact_for_polynomials(seed, n):
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((12, 12))
    A, vector = (A + A.T) / 5, rng.standard_normal(12)
    nodes, weights = spectral_measure(lambda v: A @ v, vector, n)
    assert weights.min() >= 0
    for degree in range(2 * n):
        expected = vector @ np.linalg.matrix_power(A, degree) @ vector
        scale = vector @ vector * np.linalg.norm(A, 2) ** degree
        assert weights @ nodes**degree == pytest.approx(expected, abs=1e-9 * scale)


def test_spectral_measure_stops_where_the_vector_has_no_more_directions():
    diagonal = np.arange(1.0, 6)
    nodes, weights = spectral_measure(lambda v: diagonal * v, np.array([3.0, 0, 4, 0, 0]), 5)
    assert_allclose(nodes, [1, 3], rtol=1e-12)
    assert_allclose(weights, [9, 16], rtol=1e-12)
    with pytest.raises(ConfigError, match="zero vector"):
        spectral_measure(lambda v: diagonal * v, np.zeros(5), 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Directions(np.ones(2), np.ones(3)), "vectors of one length"),
        (lambda: Directions(np.ones(2), np.ones(2), np.ones(3)), "vectors of one length"),
        (lambda: Directions(1.0, 1.0), "vectors of one length"),
        (lambda: Directions([-0.1], [1.0]), "^h = -0.1 .*as flat"),
        (lambda: Directions([1.0], [-1.0]), "^noise = -1.0"),
        (lambda: Directions([4.0], [1.0]).variances(0.5), r"curvature = \[2.0\]"),
        (lambda: Directions([0.0], [1.0]).variances(0.5), r"curvature = \[0.0\]"),
        (lambda: spectrum.of_losses([5.0], np.ones(1), np.ones(1), LR), r"curvature = \[2.5\]"),
        (lambda: spectrum.fit_response(np.zeros(3), np.ones(3), 1.0, H), "response = 0.0"),
    ],
)
def test_errors_name_the_value(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
