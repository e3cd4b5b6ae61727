"""Basin: which runs are compared, and distances, barriers and planes against what is known of them."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from paper_lib.averaging import vectors
from paper_lib.config import RunConfig
from paper_lib.errors import ConfigError
from paper_lib.experiments import basin
from paper_lib.theory.quadratic import different_batches_distance, same_batches_distance
from paper_lib.theory.simulate import sample_minima, sgd


@pytest.fixture
def branch():
    return RunConfig(steps=20, seed=1).branch(10, record="20-30")


def test_companions_share_what_they_say(branch):
    others = basin.companions(branch, (0, 1, 2), [0.01])
    batches, displaced, start = others.values()
    assert batches.parent == displaced.parent == branch.parent
    assert batches.stream != branch.stream
    assert displaced.stream == start.stream == branch.stream
    assert displaced.perturbation == 0.01
    assert (start.seed, start.parent.seed, start.parent.stream) == (2, 2, 2)
    assert list(basin.companions(branch.replace(seed=2), (0, 1, 2), []).values())[-1].seed == 0


def test_another_start_needs_another_seed(branch):
    with pytest.raises(ConfigError, match="another"):
        basin.other_start(branch, 1)


class Run:
    """What `distances` reads of a run."""

    def __init__(self, weights, start=0):
        self.weights, self.steps = np.asarray(weights), start + np.arange(len(weights))
        self.config = type("C", (), {"start": start, "lr": 0.5, "seed": 0, "record": ""})()

    def rows(self, steps):
        return np.searchsorted(self.steps, steps)


def pair(same):
    """Two runs of the model in 500 directions, eta = 0.3: same batches from apart, or other batches from one point."""
    rng, start = np.random.default_rng(0), np.zeros(500)
    first = sample_minima(rng, np.ones(500), 300)
    runs = [sgd(first, 0.3, start=start)[0].T]
    other = first if same else sample_minima(rng, np.ones(500), 300)
    runs.append(sgd(other, 0.3, start=start + same)[0].T)
    return [Run(r) for r in runs]


def test_same_batches_contract_as_the_model_says():
    table = basin.distances(*pair(same=True)).query("step <= 30")
    np.testing.assert_allclose(table.ratio, same_batches_distance(0.3, table.step), rtol=1e-6)


def test_other_batches_part_as_the_model_and_the_displacement_say():
    run, other = pair(same=False)
    table = basin.distances(run, other)
    assert table.ratio.isna().all()  # they begin at one point
    expected = 500 * different_batches_distance(0.3, table.step)
    np.testing.assert_allclose(table.distance[5:] ** 2, expected[5:], rtol=0.25)
    steps = np.arange(1, 20)
    window = vectors.gram(run.weights[50:])
    np.testing.assert_allclose(basin.parting(window, steps), expected[steps], rtol=0.1)


def test_runs_that_share_no_start_are_refused():
    run, other = pair(same=True)
    other.steps = other.steps + 5
    with pytest.raises(ConfigError, match="record"):
        basin.distances(run, other)


def test_barriers():
    p = basin.POSITIONS
    bump, bowl = 1 + p + np.sin(np.pi * p), 3 - 0.5 * np.sin(np.pi * p)
    parts = [pd.DataFrame({"seed": 0, "kind": k, "position": p, "loss": z}) for k, z in (("up", bump), ("down", bowl))]
    found = basin.barriers(pd.concat(parts)).set_index("kind")
    assert found.barrier["up"] == pytest.approx(1)
    assert found.barrier["down"] == pytest.approx(0)
    assert found.middle["down"] == pytest.approx(-0.5)


def test_plane_holds_its_corners():
    corners = np.random.default_rng(0).standard_normal((3, 40))
    origin, axes, at = basin.plane(corners)
    np.testing.assert_allclose(origin + at @ axes, corners, atol=1e-12)
    np.testing.assert_allclose(axes @ axes.T, np.eye(2), atol=1e-12)
    with pytest.raises(ConfigError, match="one line"):
        basin.plane([corners[0], 2 * corners[0], 3 * corners[0]])


def test_contours_between_measured_points_are_those_of_the_surface():
    u, w = (z.ravel() for z in np.meshgrid(np.linspace(-1, 1, 7), np.linspace(-1, 1, 9)))
    fig, ax = plt.subplots()
    basin.plot_surface(ax, pd.DataFrame({"u": u, "w": w, "loss": u**2 + w**2}), np.eye(3, 2), ["a", "b", "c"])
    filled, *_ = ax.collections
    for level, path in zip(filled.levels[1:5], filled.get_paths(), strict=False):  # closed inside the square
        outer = np.hypot(*path.vertices.T).max()
        assert outer == pytest.approx(np.sqrt(level), rel=1e-3), "a circle, not a polygon"
    plt.close(fig)
