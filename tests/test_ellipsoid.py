"""The ellipsoid: displacement, angles and averages against closed forms on simulated paths."""

import numpy as np
import pandas as pd
import pytest

from paper_lib.averaging import vectors
from paper_lib.errors import ConfigError
from paper_lib.experiments import ellipsoid
from paper_lib.theory.quadratic import autocorrelation, stationary_variance
from paper_lib.theory.simulate import sample_minima, sgd


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
    assert found["radius"] ** 2 == pytest.approx(400 * stationary_variance(0.5), rel=0.02)
    assert found["radius_spread"] < 0.1
    assert abs(found["far_cosine"]) < 0.02
    assert found["pair_ratio"] == pytest.approx(0.5, abs=0.02)
    line = ellipsoid.geometry(vectors.gram(np.arange(101.0)[:, None]))  # drift: the ends lie opposite each other
    assert line["far_cosine"] < -0.9
    assert line["pair_ratio"] < 0.2


def test_an_iterate_exactly_at_the_average_has_no_direction():
    G = vectors.gram(np.array([[-1.0], [0.0], [1.0]]))  # whole numbers: the same bits on every machine
    found = ellipsoid.geometry(G)
    assert found["far_cosine"] == -1
    assert found["pair_ratio"] == pytest.approx((0.25 + 0 + 0.25) / 3 / (2 / 3))
    assert np.isnan(ellipsoid.cosines(G)).tolist() == [[i == 1 or j == 1 for j in range(3)] for i in range(3)]


def test_iterates_that_are_all_equal_are_refused():
    with pytest.raises(ConfigError, match="all equal"):
        ellipsoid.geometry(np.zeros((4, 4)))


def test_radii_of_averages(stationary):
    table = ellipsoid.average_radii(vectors.gram(stationary), (1, 4, 16), (1, 20, 100))
    far = table.query("spacing >= 20 and count > 1")
    np.testing.assert_allclose(far.ratio, far.model, rtol=0.15)
    assert (table.query("spacing == 1 and count == 4").ratio > 0.4).all()  # neighbours are not independent
    assert not len(table.query("spacing == 100 and count == 16"))


def ray_table(power):
    r = ellipsoid.OUTWARD
    return pd.DataFrame({"seed": 0, "path": "ray", "pair": 0, "position": r, "loss": 1 + 2 * r**power})


def test_radius_form():
    found = ellipsoid.radius_form(ray_table(2)).loc[0]
    assert (found.r2, found.exponent) == (pytest.approx(1), pytest.approx(2))
    assert ellipsoid.radius_form(ray_table(1)).loc[0].exponent == pytest.approx(1)
    assert ellipsoid.radius_form(ray_table(1)).loc[0].r2 < 0.95


def test_at_names_the_positions_it_has():
    assert ellipsoid.at(ray_table(2), "ray", 0.5).loc[0] == pytest.approx(1.5)
    with pytest.raises(ConfigError, match="0.25"):
        ellipsoid.at(ray_table(2), "ray", 0.3)


class Log:
    """What `levels` reads of a run."""

    def __init__(self, start, lr, loss):
        self.config = type("C", (), {"start": start, "lr": lr, "seed": 7})()
        self.loss = np.asarray(loss, float)


def test_levels_pair_the_same_batches():
    reference = Log(100, 1.0, np.arange(10))
    table = ellipsoid.levels(reference, [Log(100, 0.1, [5, 5, 5]), Log(103, 1.0, [6, 6, 6])], settle=2)
    assert table.step.tolist() == [0, 1, 2, 3, 4, 5]
    assert table.loss_reference.tolist() == [0, 1, 2, 3, 4, 5]
    assert table.settled.tolist() == [False, False, True, False, False, True]
    with pytest.raises(ConfigError, match="ends before"):
        ellipsoid.levels(reference, [Log(105, 1.0, np.zeros(6))], settle=0)
