"""Alignment of gradients: Gram matrices of known expectation, closed forms, a real run."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import momenta

from paper_lib import presets
from paper_lib import runs as run_cache
from paper_lib.errors import ConfigError
from paper_lib.experiments import alignment
from paper_lib.probing import derivatives
from paper_lib.runs import SnapshotError
from paper_lib.theory import quadratic, simulate
from paper_lib.theory.spectrum import Directions

directions = st.tuples(st.floats(0.01, 1.5), st.floats(0.1, 2.0))


@given(st.lists(directions, min_size=1, max_size=5), momenta)
def test_the_prediction_is_the_models_for_every_mixture_of_curvatures(directions, momentum):
    eta, s2 = np.array(directions).T
    n = 12
    v = quadratic.stationary_variance(eta, s2, momentum)[:, None]
    rho = quadratic.autocorrelation(eta, n + 1, momentum)
    h2 = (eta**2)[:, None]  # in units of 1 / lr^2
    full_g = (h2 * v * rho[:, :-1]).sum(0)
    full_v = (h2 * v * (rho[:, :-1] - rho[:, 1:]) / eta[:, None]).sum(
        0
    )  # v_t = (x_t - x_{t+1}) / lr
    exact = (h2 * (v + s2[:, None]) * quadratic.gradient_cosine(eta, n, momentum)).sum(0)
    found = alignment.model_product(full_g, full_v, momentum)
    np.testing.assert_allclose(found[1:], exact[1:], atol=1e-8 * exact[0])
    assert np.isnan(found[0])
    if momentum == 0:
        np.testing.assert_allclose(found[1:], -full_g[:-1], atol=1e-12 * exact[0])


@pytest.fixture(scope="module", params=[0.0, 0.9])
def run(request, tmp_path_factory):
    """A short run with every iterate recorded, plain and with momentum."""
    changes = {"steps": 24, "record": "0-24", "momentum": request.param, "lr": 0.2}
    config = presets.study("smoke").run.replace(**changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAPER_RUNS", str(tmp_path_factory.mktemp("runs")))
        return run_cache.train_seeds(config, [0], progress=False)[0]


def test_used_gradients_are_those_of_the_batches(run):
    net, c = run.network(), run.config
    found, velocity = run.gradients(10, 12)
    for t, g in zip(range(10, 13), found, strict=True):
        x = np.array(run.at(t))
        exact = derivatives.gradients(net, x, *run.batches([t]))[0] + c.weight_decay * x
        np.testing.assert_allclose(g, exact, atol=1e-4 * np.linalg.norm(exact))
    np.testing.assert_allclose(velocity[1], c.momentum * velocity[0] + found[1], atol=1e-5)
    with pytest.raises(SnapshotError):
        run.gradients(20, 24)


def test_measurements_along_a_run(run):
    lags = alignment.measure_lags([run], first=5, n_lags=4, n_points=6, n_batches=2)
    assert lags.used[0] == 1 and np.isfinite(lags[["used", "full"]]).all(axis=None)
    assert 0 < lags.full[0] < 1
    if run.config.momentum == 0:
        np.testing.assert_allclose(lags.predicted[1:], -lags.full[:-1], rtol=1e-6)
        np.testing.assert_allclose(lags.plain[1:], lags.predicted[1:], rtol=1e-6)
    away = alignment.measure_displacement([run], 5, windows=[2, 10], n_points=3, n_batches=2)
    assert list(away.window) == [2, 10]
    assert (away.cosine.abs() <= 1.5).all()  # |G|^2 is an estimate
    assert alignment.measure_eta([run], 5, n_points=2, n_batches=2)[0] > 0


def test_windows_that_do_not_fit_are_refused(run):
    with pytest.raises(ConfigError, match="30 lags"):
        alignment.measure_lags([run], first=5, n_lags=30)
    with pytest.raises(ConfigError, match="windows"):
        alignment.measure_displacement([run], 5, windows=[40])


def simulated(momentum):
    """A model of known spectrum, and 4,000 runs of it: iterates and minima, (runs, 2, steps)."""
    h, lr = np.array([0.1, 1.2]), 0.5
    s2 = np.array([3.0, 1.0])
    c = simulate.sample_minima(np.random.default_rng(0), s2, 300, 4000)
    x = simulate.sgd(c, lr, h[:, None], momentum=momentum)
    return Directions(h, h**2 * s2), lr, x, c


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_lag_law_of_a_spectrum_is_that_of_simulated_runs(momentum):
    spectrum, lr, x, c = simulated(momentum)
    g = spectrum.h[:, None] * (x[..., :-1] - c)
    starts = range(120, 280, 10)
    used = sum((g[..., t : t + 12] * g[..., t : t + 1]).sum(1).mean(0) for t in starts)
    expected = alignment.lag_law(spectrum, lr, 12, momentum)
    np.testing.assert_allclose(used / used[0], expected, atol=0.03)
    lags = pd.DataFrame({"seed": 5, "lag": np.arange(12), "used": expected, "model": 2 * expected})
    assert alignment.slopes(lags, "used", "model")[5] == pytest.approx(0.5)


def test_work_in_a_finite_window_is_that_of_simulated_runs():
    spectrum, lr, x, _ = simulated(0.0)
    windows = [2, 20, 60]
    norm2 = np.sum(spectrum.h**2 * spectrum.variances(lr) + spectrum.noise)
    middle = spectrum.h * x[..., 250]
    away = [x[..., 250] - x[..., 250 - w // 2 : 251 + w // 2].mean(-1) for w in windows]
    work = [(middle * z).sum(1).mean() / (lr * norm2 / 2) for z in away]
    found = alignment.finite_work(spectrum, lr, windows)
    np.testing.assert_allclose(found, work, rtol=0.05)
    assert found[0] < found[1] < found[2] < 1
