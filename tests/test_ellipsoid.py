"""The ellipsoid: displacement, angles and averages against closed forms on simulated paths."""

import numpy as np
import pandas as pd
import pytest
from helpers import SMALL, SmallNet, small_data

from paper_lib.averaging import vectors
from paper_lib.errors import ConfigError
from paper_lib.experiments import ellipsoid
from paper_lib.probing import probe
from paper_lib.runs import train_seeds
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
    # drift: the ends lie opposite each other
    line = ellipsoid.geometry(vectors.gram(np.arange(101.0)[:, None]))
    assert line["far_cosine"] < -0.9
    assert line["pair_ratio"] < 0.2


def test_an_iterate_exactly_at_the_average_has_no_direction():
    # whole numbers: the same bits on every machine
    G = vectors.gram(np.array([[-1.0], [0.0], [1.0]]))
    found = ellipsoid.geometry(G)
    assert found["far_cosine"] == -1
    assert found["pair_ratio"] == pytest.approx((0.25 + 0 + 0.25) / 3 / (2 / 3))
    at_average = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], bool)
    np.testing.assert_array_equal(np.isnan(ellipsoid.cosines(G)), at_average)


def test_iterates_that_are_all_equal_are_refused():
    with pytest.raises(ConfigError, match="all equal"):
        ellipsoid.geometry(np.zeros((4, 4)))


def test_radii_of_averages(stationary):
    table = ellipsoid.average_radii(vectors.gram(stationary), (1, 4, 16), (1, 20, 100))
    far = table.query("spacing >= 20 and count > 1")
    np.testing.assert_allclose(far.ratio, far.model, rtol=0.15)
    neighbours = table.query("spacing == 1 and count == 4")  # which are not independent
    assert (neighbours.ratio > 0.4).all()
    assert not len(table.query("spacing == 100 and count == 16"))


def ray_table(power):
    r = ellipsoid.OUTWARD
    loss = 1 + 2 * r**power
    return pd.DataFrame({"seed": 0, "path": "ray", "pair": 0, "position": r, "loss": loss})


def test_radius_form():
    found = ellipsoid.radius_form(ray_table(2)).loc[0]
    assert (found.r2, found.exponent) == (pytest.approx(1), pytest.approx(2))
    assert ellipsoid.radius_form(ray_table(1)).loc[0].exponent == pytest.approx(1)
    assert ellipsoid.radius_form(ray_table(1)).loc[0].r2 < 0.95


def test_segments_and_rays_end_at_iterates(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPER_RUNS", str(tmp_path))
    runs = train_seeds(SMALL, [3], small_data(), SmallNet, progress=False)
    table = ellipsoid.inside(runs, n_batches=2, n_pairs=2).set_index(["path", "pair", "position"])
    batches = probe.fixed_batches(runs[0].dataset, 2, SMALL.batch_size, seed=3)
    first, half = probe.losses(runs[0].network(), runs[0].weights[[0, 20]], *batches).mean(1)
    assert table.loss["segment", 0, 0] == pytest.approx(first, rel=1e-5)
    assert table.loss["segment", 0, 1] == pytest.approx(half, rel=1e-5)
    assert table.loss["ray", 0, 1] == pytest.approx(first, rel=1e-5)
    center = table.loss.xs(("ray", 0), level=("path", "position"))
    assert center[0] == center[1] < first


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
