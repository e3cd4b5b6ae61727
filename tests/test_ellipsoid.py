"""The ellipsoid: displacement, angles and averages against closed forms on simulated paths."""

import numpy as np
import pandas as pd
import pytest
from helpers import SMALL, SmallNet, small_data

from paper_lib.averaging import vectors
from paper_lib.errors import ConfigError
from paper_lib.experiments import ellipsoid
from paper_lib.probing import derivatives, probe
from paper_lib.runs import train_seeds
from paper_lib.theory.quadratic import autocorrelation, stationary_variance
from paper_lib.theory.simulate import sample_minima, sgd
from paper_lib.theory.spectrum import Directions


@pytest.fixture(scope="module")
def stationary():
    """Iterates (600, 400) of the model, all directions alike with eta = 0.5."""
    minima = sample_minima(np.random.default_rng(0), np.ones(400), 700)
    return sgd(minima, 1.0, 0.5)[0, :, -600:].T


def test_displacement_of_the_model(stationary):
    lags = vectors.spaced_lags(600)
    found = vectors.squared_displacement(vectors.gram(stationary), lags)
    expected = 2 * 400 * stationary_variance(0.5) * (1 - autocorrelation(0.5, 301)[lags])
    np.testing.assert_allclose(found, expected, rtol=0.03)
    assert abs(vectors.exponent(lags, found)) < 0.02


def test_geometry_of_the_model_and_of_a_line(stationary):
    found = ellipsoid.geometry(vectors.gram(stationary))
    assert abs(found["exponent"]) < 0.02
    assert abs(found["far_cosine"]) < 0.02
    # drift: the ends lie opposite each other
    line = ellipsoid.geometry(vectors.gram(np.arange(101.0)[:, None]))
    assert line["exponent"] == pytest.approx(2)
    assert line["far_cosine"] < -0.9


def test_an_iterate_exactly_at_the_average_has_no_direction():
    # small whole numbers, eight of them: an average without rounding
    found = ellipsoid.geometry(vectors.gram(np.array([-3.0, -2, -1, 0, 0, 1, 2, 3])[:, None]))
    assert found["far_cosine"] == pytest.approx(-1)


def test_iterates_that_are_all_equal_are_refused():
    with pytest.raises(ConfigError, match="all equal"):
        ellipsoid.geometry(np.zeros((4, 4)))


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_a_finite_window_is_as_the_model_expects(momentum):
    """Directions from steep ones to one that relaxes in 5,000 steps, in a window of 300."""
    h, lr, each = np.array([2e-4, 5e-3, 0.3]), 1.0, 150
    s2 = np.repeat([3000.0, 10.0, 0.1], each)
    variance = stationary_variance(lr * np.repeat(h, each), s2, momentum)
    rng = np.random.default_rng(0)
    minima, start = sample_minima(rng, s2, 340), rng.standard_normal(3 * each) * np.sqrt(variance)
    settings = {"momentum": momentum, "start": start}
    X = sgd(minima, lr, np.repeat(h, each)[:, None], **settings)[0, :, 41::2].T
    directions = Directions(h, h**2 * np.array([3000.0, 10.0, 0.1]) * each)
    steps = np.arange(0, 300, 2)
    expected = ellipsoid.expected_gram(directions, lr, steps, momentum)
    G = vectors.gram(X)
    assert np.trace(G) == pytest.approx(np.trace(expected), rel=0.15)
    found, model = ellipsoid.geometry(G), ellipsoid.geometry(expected)
    for name, value in model.items():
        assert found[name] == pytest.approx(value, abs=0.1), name
    assert model["exponent"] > 0.3  # far from closed in so short a window
    curve = ellipsoid.displacements(expected, stride=2)
    squared = directions.displacement(lr, curve.lag.to_numpy(), momentum)
    np.testing.assert_allclose(curve.squared, squared)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAPER_RUNS", str(tmp_path_factory.mktemp("runs")))
        yield train_seeds(SMALL, [3], small_data(), SmallNet, progress=False)


def test_noise_spectrum_holds_the_variance_of_gradients_and_weight_decay(runs):
    found = ellipsoid.noise_spectrum(runs[0], 20, n_gradients=60, n_products=4, n_nodes=10)
    x, y = probe.fixed_batches(runs[0].dataset, 64, SMALL.batch_size, seed=3)
    net, weights = runs[0].network(), np.array(runs[0].at(20))
    halves = derivatives.gradients(net, weights, x[4:], y[4:]).reshape(2, 30, -1).mean(1)
    assert found.noise.sum() == pytest.approx(15 * np.sum((halves[0] - halves[1]) ** 2), rel=1e-4)
    assert found.h.min() >= SMALL.weight_decay
    assert SMALL.lr * found.h.max() < 2 * (1 + SMALL.momentum)


def test_ray_exponents():
    for power in (1, 2, 3):
        r = ellipsoid.OUTWARD
        columns = {"seed": 7, "path": "ray", "pair": 0, "position": r, "loss": 1 + 2 * r**power}
        assert ellipsoid.ray_exponents(pd.DataFrame(columns))[7] == pytest.approx(power)


def test_segments_and_rays_end_at_iterates(runs):
    table = ellipsoid.inside(runs, n_batches=2, n_pairs=2).set_index(["path", "pair", "position"])
    batches = probe.fixed_batches(runs[0].dataset, 2, SMALL.batch_size, seed=3)
    first, half = probe.losses(runs[0].network(), runs[0].weights[[0, 20]], *batches).mean(1)
    ends = {("segment", 0, 0): first, ("segment", 0, 1): half, ("ray", 0, 1): first}
    ends |= {("ray", 2, 1): half, ("aside", 0, 0): first}
    for place, loss in ends.items():
        assert table.loss[place] == pytest.approx(loss, rel=1e-5)
    center = table.loss.xs(("ray", 0), level=("path", "position"))
    assert center.nunique() == 1
    assert center[0] < first


class Log:
    """What `levels` reads of a run."""

    def __init__(self, start, lr, loss):
        self.config = type("C", (), {"start": start, "lr": lr, "seed": 7})()
        self.loss = np.asarray(loss, float)


def test_levels_pair_the_same_batches():
    reference = Log(100, 1.0, np.arange(10))
    changed = [Log(100, 0.1, [5, 5, 5]), Log(103, 1.0, [6, 6, 6])]
    table = ellipsoid.levels(reference, changed, settle=2)
    assert table.step.tolist() == [0, 1, 2, 3, 4, 5]
    assert table.loss_reference.tolist() == [0, 1, 2, 3, 4, 5]
    assert table.settled.tolist() == [False, False, True, False, False, True]
    with pytest.raises(ConfigError, match="ends before"):
        ellipsoid.levels(reference, [Log(105, 1.0, np.zeros(6))], settle=0)
