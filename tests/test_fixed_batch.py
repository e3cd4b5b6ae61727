"""A fixed batch along the trajectory: the dip against an exact identity, convexity where it is known, bad windows."""

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import SMALL, SmallNet, small_data
from torch import nn

from paper_lib import runs
from paper_lib.experiments import convexity, fixed_batch
from paper_lib.probing import probe
from paper_lib.runs import SnapshotError
from paper_lib.training.flat import FlatModel


class Prior(nn.Module):
    """Logits that do not depend on the input: the Hessian of every batch is the same function of the weights."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.5, -0.2, 0.1]))

    def forward(self, x):
        return self.logits.expand(len(x), -1)


class Product(nn.Module):
    """Two weights whose product is the logit of class 0: convex on neither diagonal's opposite ends."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))

    def forward(self, x):
        return torch.stack([self.w.prod(), torch.zeros(())]).expand(len(x), -1)


@pytest.fixture
def trained(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPER_RUNS", str(tmp_path))

    def train(model, **changes):
        return runs.train_seeds(SMALL.replace(**changes), [0, 1], small_data(), model, progress=False)

    return train


def test_prediction_is_exact_up_to_the_held_out_loss_where_batches_share_a_hessian(trained):
    trajectories, dataset = trained(Prior), small_data()
    table = fixed_batch.around(trajectories, dataset, [10, 20], 5, 8, Prior, n_held=2)
    assert len(table) == 2 * 2 * 14
    for (seed, t), one in table.groupby(["seed", "batch"]):
        run = trajectories[seed]
        held = dataset.batches(range(2 * t, 2 * t + 2), 8, run.config.stream, "held")
        losses = probe.losses(runs.network(run, dataset, Prior), run.window(t - 5, t + 8), *held).mean(1)
        np.testing.assert_allclose(one.own - one.predicted, losses - losses[5], atol=2e-6)
    np.testing.assert_allclose(fixed_batch.bend_ratio(table), 1, rtol=0.01)


def test_own_loss_is_the_logged_one_at_offset_zero_and_falls_after_the_step(trained):
    (run, _), dataset = trained(SmallNet), small_data()
    table = fixed_batch.around([run], dataset, [3, 30], 0, 2, SmallNet).set_index(["batch", "offset"])
    np.testing.assert_allclose(table.own[3, 0], run.loss[3], rtol=1e-5)
    assert table.own[3, 1] < table.own[3, 0] and table.own[30, 1] < table.own[30, 0]


def test_dip_is_relative_to_the_mean_before_and_the_prediction_to_the_start():
    table = pd.DataFrame(
        {"seed": 0, "batch": 1, "offset": [-1, 0, 1, 2], "own": [3.0, 1, 0.5, 1.5], "predicted": [0, 1, 0, 0.25]}
    )
    found = fixed_batch.dip(table)
    assert found.dip.tolist() == [1.5, 0.5] and found.predicted.tolist() == [1.0, 0.75] and found.k.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("a", "b", "fast", "slow"), [(1.0, 1.0, 2.0, 50.0), (0.5, 2.0, 2.0, 48.0), (3.0, 0.5, 4.0, 80.0)]
)
def test_mixture_fit_recovers_two_decays(a, b, fast, slow):
    k = np.arange(200)
    dips = a * np.exp(-k / fast) + b * np.exp(-k / slow)
    amplitudes, q = fixed_batch.fit_mixture(dips, 2)
    np.testing.assert_allclose(q[None, :] ** k[:, None] @ amplitudes, dips, atol=0.03 * (a + b))
    np.testing.assert_allclose(-1 / np.log(q), [slow, fast], rtol=0.35)  # on a grid, a seventh apart
    (amplitude,), (rate,) = fixed_batch.fit_mixture(2 * 0.9**k, 1)
    assert amplitude == pytest.approx(2, rel=0.1) and -1 / np.log(rate) == pytest.approx(-1 / np.log(0.9), rel=0.08)


def test_mixture_fit_of_no_dip_has_no_amplitude_and_finite_rates():
    amplitudes, q = fixed_batch.fit_mixture(-np.ones(20), 2)
    assert amplitudes.tolist() == [0, 0] and np.all((q > 0) & (q < 1))
    amplitudes, q = fixed_batch.fit_mixture(0.9 ** np.arange(20) - 0.5 * 0.3 ** np.arange(20), 2)  # one grows
    assert amplitudes.min() >= 0 and amplitudes.max() > 0.5


def test_history_agrees_with_probing_each_snapshot(trained):
    (run, _), dataset = trained(SmallNet), small_data()
    table = fixed_batch.history([run], dataset, [2, 5], [0, 7], "held", SmallNet)
    net = runs.network(run, dataset, SmallNet)
    one = table.query("step == 7 and batch == 5").loss.item()
    assert one == pytest.approx(probe.losses(net, run.at(7), *dataset.batches([5], 8, 0, "held"))[0], abs=1e-6)
    assert len(fixed_batch.history([run], dataset, [2], model=SmallNet)) == len(run.steps)


def test_convex_losses_violate_nothing():
    net = FlatModel(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)))
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 6, 4, generator=generator), torch.randint(3, (2, 6), generator=generator)
    points = np.random.default_rng(0).normal(size=(5, 15)).astype(np.float32)
    found = convexity.excesses(net, points, x, y).assign(seed=0, path="p")
    assert len(found) == 10 * 2 and (found.midpoint < 0).all() and (found.tangent < 0).all()
    assert convexity.violations(found)[["midpoint", "tangent"]].to_numpy().tolist() == [[0, 0]]


def test_excesses_of_a_saddle_are_those_of_its_closed_form():
    points = np.array([[2, 2], [-2, -2]], np.float32)  # logit 4 at both, 0 between
    found = convexity.excesses(FlatModel(Product()), points, torch.zeros(1, 3, 1), torch.zeros(1, 3, dtype=torch.long))
    end, slope = np.log1p(np.exp(-4)), -1 / (1 + np.exp(4))  # of the loss in the logit
    assert found.distance.item() == pytest.approx(np.sqrt(32))
    assert found.midpoint.item() == pytest.approx(np.log(2) - end, abs=1e-6)
    assert found.tangent.item() == pytest.approx(slope * (2 * -4 + 2 * -4), abs=1e-5)  # l(x_i) = l(x_j)
    assert convexity.violations(found.assign(seed=0, path="p")).midpoint.item() == 1


def test_convexity_names_path_and_seed(trained):
    trajectories = trained(SmallNet)
    paths = [convexity.along(run, 0, 40, n=3) for run in trajectories]
    found = convexity.measure(trajectories, small_data(), paths, [0, 1], "held", SmallNet, path="start")
    assert sorted(found.seed.unique()) == [0, 1] and set(found.path) == {"start"} and len(found) == 2 * 3 * 2


def test_random_path_keeps_start_and_step_lengths():
    points = np.random.default_rng(1).normal(size=(4, 50)).astype(np.float32)
    path = convexity.random_path(points)
    np.testing.assert_array_equal(path[0], points[0])
    lengths = [np.linalg.norm(np.diff(p, axis=0), axis=1) for p in (path, points)]
    np.testing.assert_allclose(*lengths, rtol=1e-5)
    assert np.abs(np.corrcoef(np.diff(path, axis=0), np.diff(points, axis=0))[:3, 3:]).max() < 0.5


def test_segment_is_straight_with_both_ends():
    path = convexity.segment(np.zeros(2, np.float32), np.array([4, 8], np.float32), n=5)
    np.testing.assert_array_equal(path, [[0, 0], [1, 2], [2, 4], [3, 6], [4, 8]])


def test_bad_windows_say_what_to_do(trained):
    trajectories, dataset = trained(SmallNet, record="0-10"), small_data()
    with pytest.raises(ValueError, match="window.*empty"):
        fixed_batch.around(trajectories, dataset, [3], 0, 0, SmallNet)
    with pytest.raises(ValueError, match="at least one"):
        fixed_batch.around(trajectories, dataset, [], 1, 1, SmallNet)
    with pytest.raises(ValueError, match="window.*empty"):
        convexity.along(trajectories[0], 5, 5)
    with pytest.raises(SnapshotError, match="it has 0-10.*`record`"):
        fixed_batch.around(trajectories, dataset, [9], 1, 5, SmallNet)
    with pytest.raises(ValueError, match="batch size 500"):
        small_data().batches([0], 500, 0)
