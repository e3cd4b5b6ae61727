"""Closed forms of the quadratic model, each against simulation and against one another.

A simulated mean must lie within 5 standard errors of its closed form (fixed seeds, many independent
runs, burnt in until the start is forgotten).
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from strategies import averages, decays, momenta

from paper_lib.averaging import vectors
from paper_lib.errors import ConfigError
from paper_lib.theory import quadratic, simulate

SEEDS, WINDOW, S2, H = 4000, 41, 2.0, 0.7
CASES = [(0.05, 0.0), (0.3, 0.0), (1.0, 0.0), (1.6, 0.0), (0.05, 0.5), (0.4, 0.9), (2.5, 0.5)]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"eta{case[0]}-m{case[1]}")
def run(request):
    """Stationary iterates x (SEEDS, WINDOW + 1) and the batch minima c (SEEDS, WINDOW) between."""
    eta, momentum = request.param
    c = simulate.sample_minima(np.random.default_rng(0), S2, 300 + WINDOW, SEEDS)[:, 0]
    x = simulate.sgd(c, eta / H, curvature=H, momentum=momentum)
    return eta, momentum, x[:, 300:], c[:, 300:]


def assert_mean(samples, expected):
    """The mean over the first axis, seeds, lies within 5 standard errors of expected."""
    error = samples.std(0, ddof=1) / np.sqrt(len(samples))
    np.testing.assert_array_less(np.abs(samples.mean(0) - expected), 5 * error + 1e-12)


def cosines(f, g):
    """Per-seed samples whose mean is E[f g] relative to the root mean squares of both."""
    return f * g / np.sqrt((f**2).mean() * (g**2).mean())


def test_stationary_variance_and_autocorrelation(run):
    eta, m, x, _ = run
    v = quadratic.stationary_variance(eta, S2, m)
    assert_mean(x**2, v)
    assert_mean(x[:, :1] * x, v * quadratic.autocorrelation(eta, WINDOW + 1, m))


def test_best_held_out_step(run):
    eta, m, x, c = run
    start, own = x[:, 0], x[:, 0] - c[:, 0]
    best = (1 - m) / eta * np.mean(start * own, 0) / np.mean(own**2, 0)  # (x - p own)^2 is least
    assert_allclose(best, quadratic.best_held_out_step(eta, m), rtol=0.1)
    v = quadratic.stationary_variance(eta, S2, m)
    p = quadratic.best_held_out_step(eta, m) * eta / (1 - m)
    assert_allclose(p, v / (v + S2))
    for size in (0 * p, p, 2 * p):
        held = (1 - size) ** 2 * v + size**2 * S2
        assert_mean((start - size * own) ** 2, held)


def test_gradient_alignment(run):
    eta, m, x, c = run
    at_start, own = x[:, 0], x[:, :-1] - c
    v = quadratic.stationary_variance(eta, S2, m)
    assert_mean(cosines(own[:, 0], at_start), np.sqrt(v / (v + S2)))
    assert_mean(cosines(own[:, 0], at_start - c[:, 20]), v / (v + S2))
    assert_mean(cosines(own[:, :1], own), quadratic.gradient_cosine(eta, WINDOW, m))


def test_averages_of_iterates(run):
    eta, m, x, _ = run
    v, n = quadratic.stationary_variance(eta, S2, m), WINDOW + 1
    rho = quadratic.autocorrelation(eta, n, m)
    for a in (vectors.ema(n, 0.9), vectors.uniform(n, 20), vectors.two_point(n, 7)):
        assert_mean((x @ a) ** 2, v * quadratic.variance_ratio(a, rho))


@pytest.mark.parametrize(("eta", "dof"), [(0.1, 2), (0.5, 4), (0.5, 50)])
def test_curvature_that_varies_from_batch_to_batch(eta, dof):
    rng = np.random.default_rng(2)
    c = simulate.sample_minima(rng, S2, 200, SEEDS)[:, 0]
    curvature = rng.chisquare(dof, c.shape) / dof
    x = simulate.sgd(c, eta, curvature)
    v = quadratic.varying_curvature_variance(eta, np.sqrt(2 / dof), S2)
    assert_mean(x[:, -1] ** 2, v)
    assert_mean(x[:, -11] * x[:, -1], v * (1 - eta) ** 10)


@given(st.floats(0.01, 1.99), st.floats(0, 0.95), st.integers(1, 60))
def test_named_averages_agree_with_the_general_form(eta, decay, k):
    n = 1200
    rho = quadratic.autocorrelation(eta, n)
    exact = {
        quadratic.ema_ratio(eta, decay): vectors.ema(n, decay),
        quadratic.uniform_ratio(eta, k): vectors.uniform(n, k),
        quadratic.two_point_ratio(eta, k): vectors.two_point(n, k),
    }
    for closed_form, a in exact.items():
        assert quadratic.variance_ratio(a, rho) == pytest.approx(closed_form, rel=1e-9, abs=1e-13)


@given(averages(), st.floats(0.01, 1.9), momenta)
def test_variance_ratio_is_the_double_sum(a, eta, momentum):
    rho = quadratic.autocorrelation([eta, eta / 2], a.size, momentum)
    t = np.arange(a.size)
    expected = a @ rho[:, np.abs(t[:, None] - t)] @ a
    assert_allclose(quadratic.variance_ratio(a, rho), expected, rtol=1e-10, atol=1e-14)


@given(st.floats(0.001, 1.99), st.integers(1, 300))
def test_recurrences_reduce_to_powers_without_momentum(eta, n):
    q = (1 - eta) ** np.arange(n)
    for m in (0.0, 1e-300):  # the fast path and the recurrence
        assert_allclose(quadratic.autocorrelation(eta, n, m), q, atol=1e-13)
        assert_allclose(quadratic.impulse_response(eta, n, m), eta * q, atol=1e-13)
    cosine = quadratic.gradient_cosine(eta, n)
    assert_allclose(cosine[1:], -eta / 2 * q[:-1], atol=1e-13)
    assert quadratic.stationary_variance(eta) == pytest.approx(eta / (2 - eta))


@given(st.floats(1e-4, 0.19), st.floats(0, 0.9))
def test_momentum_is_a_larger_lr_in_slow_directions(eta, momentum):
    plain = quadratic.stationary_variance(eta / (1 - momentum))
    exact = quadratic.stationary_variance(eta, 1.0, momentum)
    error = 2 * momentum * eta / ((1 + momentum) * (2 * (1 - momentum) - eta))  # first order in eta
    assert plain / exact - 1 == pytest.approx(error, rel=1e-6, abs=1e-12)


def test_uniform_ratio_of_slow_directions_does_not_cancel():
    expected = 1 - 1e-5 * (100**2 - 1) / 300
    assert quadratic.uniform_ratio(1e-5, 100) == pytest.approx(expected, abs=1e-6)
    assert_allclose(quadratic.uniform_ratio([1e-4, 1.5], 1), 1)


@given(decays)
def test_forms_broadcast_over_directions_and_settings(decay):
    eta = np.array([0.1, 0.2, 1.2])
    assert quadratic.ema_ratio(eta, np.array([[decay], [0.5]])).shape == (2, 3)
    assert quadratic.gradient_cosine(eta[:, None], 5, 0.9).shape == (3, 1, 5)


@pytest.mark.parametrize("eta", [0.0, -0.1, 2.0, np.nan, [0.5, 2.5]])
def test_eta_outside_its_range_is_refused_everywhere(eta):
    after_eta = {
        quadratic.stationary_variance: (),
        quadratic.best_held_out_step: (),
        quadratic.varying_curvature_variance: (0.1,),
        quadratic.autocorrelation: (5,),
        quadratic.gradient_cosine: (5,),
        quadratic.two_point_ratio: (5,),
        quadratic.ema_ratio: (0.9,),
        quadratic.uniform_ratio: (5,),
    }
    for function, rest in after_eta.items():
        with pytest.raises(ConfigError, match=r"must lie in \(0, 2\)"):
            function(eta, *rest)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quadratic.stationary_variance(3.9, 1.0, 0.9), r"\(0, 3.8\) at momentum 0.9"),
        (lambda: quadratic.stationary_variance(0.1, 1.0, 1.0), r"momentum = 1.0 .*\[0, 1\)"),
        (lambda: quadratic.varying_curvature_variance(1.5, 1.0), r"curvature = \[3.0\]"),
        (lambda: quadratic.ema_ratio(0.1, 1.0), r"decay = 1.0 .*\[0, 1\)"),
        (lambda: quadratic.uniform_ratio(0.1, 0), "window = 0 .*at least 1 step"),
        (lambda: quadratic.two_point_ratio(0.1, -5), "lag = -5 .*at least 1 step"),
        (lambda: quadratic.variance_ratio(vectors.last(5), np.ones(4)), r"= 4 .*0\.\.4"),
    ],
)
def test_errors_name_the_value_and_the_range(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
