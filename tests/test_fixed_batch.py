"""A fixed batch along the trajectory: convexity where it is known, the dip of exact quadratics."""

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import SMALL, SmallNet, small_data
from torch import nn

from paper_lib import runs as run_cache
from paper_lib.errors import ConfigError
from paper_lib.experiments import fixed_batch
from paper_lib.probing import probe
from paper_lib.runs import SnapshotError
from paper_lib.training.flat import FlatModel


class Prior(nn.Module):
    """Logits that do not depend on the input: every batch has the same Hessian."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.5, -0.2, 0.1]))

    def forward(self, x):
        return self.logits.expand(len(x), -1)


class Product(nn.Module):
    """Two weights whose product is the logit of class 0: convex on one diagonal alone."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))

    def forward(self, x):
        return torch.stack([self.w.prod(), torch.zeros(())]).expand(len(x), -1)


def train(net, **changes):
    return run_cache.train_seeds(
        SMALL.replace(**changes), [0, 1], small_data(), net, progress=False
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAPER_RUNS", str(tmp_path_factory.mktemp("runs")))
        yield


@pytest.fixture(scope="module")
def runs(folder):
    """Two runs of the small network, every iterate kept."""
    return train(SmallNet)


# --- convexity between points of a path ---------------------------------------------------------


def test_convex_losses_violate_nothing():
    net = FlatModel(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 4, generator=generator)
    y = torch.randint(3, (2, 6), generator=generator)
    points = np.random.default_rng(0).normal(size=(5, 15)).astype(np.float32)
    found = fixed_batch.excesses(net, points, x, y)
    assert len(found) == 10 * 2 and (found.midpoint < 0).all() and (found.tangent < 0).all()


def test_excesses_of_a_saddle_are_those_of_its_closed_form():
    points = np.array([[2, 2], [-2, -2]], np.float32)  # logit 4 at both, 0 between
    x, y = torch.zeros(1, 3, 1), torch.zeros(1, 3, dtype=torch.long)
    found = fixed_batch.excesses(FlatModel(Product()), points, x, y)
    end, slope = np.log1p(np.exp(-4)), -1 / (1 + np.exp(4))  # of the loss in the logit
    assert found.distance.item() == pytest.approx(np.sqrt(32))
    assert found.midpoint.item() == pytest.approx(np.log(2) - end, abs=1e-6)
    assert found.midpoint.item() > fixed_batch.NOISE
    assert found.tangent.item() == pytest.approx(slope * -16, abs=1e-5)  # as l(x_i) = l(x_j)


def test_convexity_names_path_and_seed(runs):
    paths = [fixed_batch.along(run, 0, 40, n=3) for run in runs]
    found = fixed_batch.convexity(runs, paths, [0, 1], path="start")
    assert sorted(found.seed.unique()) == [0, 1]
    assert set(found.path) == {"start"} and len(found) == 2 * 3 * 2


def test_random_path_keeps_start_and_step_lengths():
    points = np.random.default_rng(1).normal(size=(4, 50)).astype(np.float32)
    path = fixed_batch.random_path(points)
    np.testing.assert_array_equal(path[0], points[0])
    steps, others = np.diff(path, axis=0), np.diff(points, axis=0)
    lengths = [np.linalg.norm(taken, axis=1) for taken in (steps, others)]
    np.testing.assert_allclose(*lengths, rtol=1e-5)
    assert np.abs(np.corrcoef(steps, others)[:3, 3:]).max() < 0.5


def test_segment_is_straight_with_both_ends():
    path = fixed_batch.segment(np.zeros(2, np.float32), np.array([4, 8], np.float32), n=5)
    np.testing.assert_array_equal(path, [[0, 0], [1, 2], [2, 4], [3, 6], [4, 8]])


def test_points_equally_far_along_a_path():
    corner = np.array([[0, 0], [1, 0], [2, 0], [2, 2], [2, 3], [2, 4]], np.float32)
    np.testing.assert_allclose(fixed_batch.lengths(corner), [0, 1, 2, 4, 5, 6])
    np.testing.assert_array_equal(fixed_batch.equally_far(corner, 4), corner[[0, 2, 3, 5]])


# --- the curve itself ---------------------------------------------------------------------------


def test_follow_is_the_loss_at_each_point(runs):
    paths = [fixed_batch.along(run, 0, 40, n=5) for run in runs]
    table = fixed_batch.follow(runs, paths, [2, 5], "whole")
    assert len(table) == 2 * 5 * 2 and set(table.path) == {"whole"}
    last = table.query("seed == 1 and position == 1 and batch == 5").loss.item()
    exact = probe.losses(runs[1].network(), runs[1].at(40), *runs[1].batches([5]))[0]
    assert last == pytest.approx(exact, abs=1e-6)


def curve(loss):
    """A table of `follow`: two batches with the losses loss(position), one 3 nats higher."""
    at = np.array([0, 0.1, 0.3, 0.6, 1])
    tables = [pd.DataFrame({"position": at, "loss": loss(at) + 3 * i, "batch": i}) for i in (0, 1)]
    return pd.concat(tables, ignore_index=True).assign(seed=0, path="p")


def test_only_a_curve_that_is_not_convex_lies_above_its_chords():
    bowl = fixed_batch.over_chords(curve(lambda u: u**2))
    assert len(bowl) == 10 and (bowl.excess < 0).all()
    np.testing.assert_allclose(bowl.error, 0, atol=1e-12)
    line = fixed_batch.over_chords(curve(lambda u: 2 * u + 1))
    np.testing.assert_allclose(line.excess, 0, atol=1e-12)
    hill = fixed_batch.over_chords(curve(lambda u: u * (1 - u)))
    assert hill.excess.max() == pytest.approx(0.6 * 0.4)


# --- the dip that the own step leaves -----------------------------------------------------------


def test_batches_that_share_a_hessian_dip_as_one_hessian_predicts(folder):
    found = fixed_batch.dips(train(Prior), [10, 20], [1, 4, 15], n_held=2)
    assert len(found) == 2 * 2 * 3
    np.testing.assert_allclose(found.shared, found.dip, atol=2e-6)
    np.testing.assert_allclose(found.own, found.dip, atol=2e-6)


def test_the_own_hessian_predicts_short_dips_of_any_network(folder):
    large = train(SmallNet, lr=1.0)  # dips far above rounding
    found = fixed_batch.dips(large, [3, 20, 30], [1])
    assert found.dip.mean() > 0
    missed = [(found[name] - found.dip).abs().mean() for name in ("shared", "own")]
    assert missed[1] < 0.5 * missed[0]


def test_bad_windows_say_what_to_do(folder):
    runs = train(SmallNet, record="0-10")
    with pytest.raises(ConfigError, match="at least one"):
        fixed_batch.dips(runs, [], [1])
    with pytest.raises(ConfigError, match="offsets.*1 or more"):
        fixed_batch.dips(runs, [3], [0, 1])
    with pytest.raises(ConfigError, match="window.*empty"):
        fixed_batch.along(runs[0], 5, 5)
    with pytest.raises(SnapshotError, match="it has 0-10.*`record`"):
        fixed_batch.dips(runs, [9], [5])
