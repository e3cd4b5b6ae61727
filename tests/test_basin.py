"""Basin: which runs are compared; distances and barriers against what is known of them."""

import functools
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from helpers import SMALL, SmallNet, small_data
from torch import nn

from paper_lib import runs as run_cache
from paper_lib.averaging import vectors
from paper_lib.config import RunConfig
from paper_lib.errors import ConfigError
from paper_lib.experiments import basin
from paper_lib.probing import derivatives, probe
from paper_lib.theory.quadratic import stationary_variance
from paper_lib.theory.simulate import sample_minima, sgd


@pytest.fixture
def branch():
    return RunConfig(steps=20, seed=1).branch(10, record="20-30")


def test_second_starts_see_the_batches_that_they_say(branch):
    parted, same, other = basin.second_starts(branch, every=4).values()
    assert (parted.start, parted.steps, parted.parent) == (20, 30, branch.parent)
    assert parted.stream == other.stream != branch.stream == same.stream
    assert same.parent == other.parent == parted
    assert (same.start, same.steps) == (other.start, other.steps) == (30, 40)
    assert parted.record == "20-30/4,30" and same.record == other.record == "30-40/4,40"


def test_another_start(branch):
    start = basin.other_start(branch, basin.following(1, (0, 1, 2)))
    assert (start.seed, start.parent.seed, start.parent.stream, start.stream) == (2, 2, 2, 1)
    assert basin.following(2, (0, 1, 2)) == 0 and basin.following(2, (2,)) == 3


def test_another_start_needs_another_seed(branch):
    with pytest.raises(ConfigError, match="another"):
        basin.other_start(branch, 1)


class Run:
    """What `distances` reads of a run."""

    def __init__(self, weights, start=0):
        self.weights, self.steps = np.asarray(weights), start + np.arange(len(weights))
        self.config = SimpleNamespace(start=start, seed=0, record="")

    def rows(self, steps):
        return np.searchsorted(self.steps, steps)


def pair(same):
    """Two runs of the model in 500 directions, eta = 0.3.

    On the same batches from starts apart, or on other batches from one start.
    """
    rng = np.random.default_rng(0)
    first = sample_minima(rng, np.ones(500), 300)
    other = first if same else sample_minima(rng, np.ones(500), 300)
    starts = np.zeros(500), np.full(500, float(same))
    found = [sgd(z, 0.3, start=x)[0].T for z, x in zip((first, other), starts, strict=True)]
    return [Run(weights) for weights in found]


def test_same_batches_contract_as_the_model_says():
    run, other = pair(same=True)
    table = basin.distances(run, other).query("step <= 30")
    np.testing.assert_allclose(table.ratio, 0.7**table.step, rtol=1e-6)
    later = Run(other.weights[10:], start=10)
    table = basin.distances(run, later).query("step <= 20")
    np.testing.assert_allclose(table.ratio, 0.7**table.step, rtol=1e-6)


def test_other_batches_part_as_the_model_and_the_displacement_say():
    run, other = pair(same=False)
    table = basin.distances(run, other)
    assert table.ratio.isna().all()  # they begin at one point
    expected = 500 * 2 * stationary_variance(0.3) * (1 - 0.7 ** (2 * table.step))
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
    losses = {"up": 1 + p + np.sin(np.pi * p), "down": 3 - 0.5 * np.sin(np.pi * p)}
    columns = {"seed": 0, "position": p}
    tables = [pd.DataFrame({**columns, "kind": kind, "loss": z}) for kind, z in losses.items()]
    found = basin.barriers(pd.concat(tables)).set_index("kind")
    assert found.barrier["up"] == pytest.approx(1)
    assert found.barrier["down"] == pytest.approx(0)
    assert found.middle["down"] == pytest.approx(-0.5)


SMOOTH = functools.partial(SmallNet, activation=nn.SiLU)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A run of a network of a user's own, and runs from a second start after 10 of its steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAPER_RUNS", str(tmp_path_factory.mktemp("runs")))
        config = SMALL.branch(20, record="40-60")
        (run,) = run_cache.train_seeds(config, [0], small_data(), SMOOTH, progress=False)
        yield run, basin.part([run], SMALL.branch(10), every=5)


def test_second_starts_of_a_network_of_ones_own(small):
    run, second = small
    assert list(second) == [(0, basin.PARTED), (0, basin.SAME), (0, basin.OTHER)]
    parted, same, other = second.values()
    assert other.dataset is run.dataset and other.net is SMOOTH
    np.testing.assert_array_equal(parted.at(40), run.at(40))
    for each in (same, other):
        np.testing.assert_array_equal(each.at(50), parted.at(50))
        assert basin.distances(run, each).step.tolist() == [0, 5, 10]
    taken = (same.at(55) - same.at(50)) - (other.at(55) - other.at(50))
    assert np.linalg.norm(taken) > 0, "on batches of their own"


def test_the_loss_feels_curvature_times_the_squared_distance(small):
    run, second = small
    x = np.array(run.at(50), np.float64)
    apart = 1e-2 * np.random.default_rng(0).standard_normal(len(x))
    near = SimpleNamespace(config=SimpleNamespace(start=50), at=lambda step: x + apart)
    table = basin.loss_weighted(run, {"near": near, "same": second[0, basin.SAME]}, [0], 4)
    batches = probe.fixed_batches(run.dataset, 4, SMALL.batch_size, seed=0)
    expected = derivatives.curvature(run.network(), x, apart, *batches).mean() * apart @ apart
    assert table.distance[0] == pytest.approx(expected, rel=0.05)
    assert table.ratio.tolist() == [1, 1]


def test_loss_between_runs_has_the_losses_of_its_ends(small):
    run, second = small
    ends = run.at(60), second[0, basin.OTHER].at(60)
    table = basin.between(run, {"parted": ends}, n_batches=2)
    batches = probe.fixed_batches(run.dataset, 2, SMALL.batch_size, seed=0)
    losses = probe.losses(run.network(), np.stack(ends), *batches).mean(1)
    assert table.loss.iloc[[0, -1]].tolist() == pytest.approx(losses, rel=1e-4)
