"""Basin: which runs are compared; distances, barriers and planes against what is known of them."""

import numpy as np
import pandas as pd
import pytest
from helpers import SMALL, SmallNet, small_data

from paper_lib import runs as run_cache
from paper_lib.averaging import vectors
from paper_lib.config import RunConfig
from paper_lib.errors import ConfigError
from paper_lib.experiments import basin
from paper_lib.probing import probe
from paper_lib.theory.quadratic import different_batches_distance, same_batches_distance
from paper_lib.theory.simulate import sample_minima, sgd


@pytest.fixture
def branch():
    return RunConfig(steps=20, seed=1).branch(10, record="20-30")


def test_companions_share_what_they_say(branch):
    batches, displaced, start = basin.companions(branch, (0, 1, 2), [0.01]).values()
    assert batches.parent == displaced.parent == branch.parent
    assert batches.stream != branch.stream
    assert displaced.stream == start.stream == branch.stream
    assert displaced.perturbation == 0.01
    assert (start.seed, start.parent.seed, start.parent.stream) == (2, 2, 2)
    *_, around = basin.companions(branch.replace(seed=2), (0, 1, 2), []).values()
    assert around.seed == 0
    *_, alone = basin.companions(branch, (1,), []).values()
    assert alone.seed == 2


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
    losses = {"up": 1 + p + np.sin(np.pi * p), "down": 3 - 0.5 * np.sin(np.pi * p)}
    columns = {"seed": 0, "position": p}
    tables = [pd.DataFrame({**columns, "kind": kind, "loss": z}) for kind, z in losses.items()]
    found = basin.barriers(pd.concat(tables)).set_index("kind")
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


def test_loss_between_runs_and_on_a_plane_of_a_network_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPER_RUNS", str(tmp_path))
    (warmup,) = run_cache.train_seeds(SMALL, [0], small_data(), SmallNet, progress=False)
    config = SMALL.branch(20, record="40-60")
    (run,) = run_cache.branch_all([warmup], [config])
    others = basin.train_companions([run], [0], [0.01], config)
    assert list(others) == [(0, kind) for kind in basin.companions(config, [0], [0.01])]
    other, displaced, _ = others.values()
    assert other.dataset is run.dataset and other.net is SmallNet
    moved = basin.distances(run, displaced, "displaced")
    assert moved.distance[0] == pytest.approx(0.01 * np.linalg.norm(run.at(40)), rel=0.01)

    batches = probe.fixed_batches(run.dataset, 2, SMALL.batch_size, seed=0)
    corners = [run.at(40), run.at(60), other.at(60)]
    losses = probe.losses(run.network(), np.stack(corners), *batches).mean(1)
    table = basin.between(run, {"parted": (corners[1], corners[2])}, n_batches=2)
    assert table.loss.iloc[[0, -1]].tolist() == pytest.approx(losses[1:], rel=1e-4)
    table, at = basin.surface(run, corners, n=3, n_batches=2, margin=0)
    for i, axis in enumerate("uw"):  # the grid ends at the corners
        assert (table[axis].min(), table[axis].max()) == pytest.approx(
            (at[:, i].min(), at[:, i].max())
        )
    left = table.u.idxmin()
    origin, axes, _ = basin.plane(corners)
    point = origin + table.loc[left, ["u", "w"]].to_numpy(float) @ axes
    expected = probe.losses(run.network(), point, *batches).mean()
    assert table.loss[left] == pytest.approx(expected, rel=1e-4)
