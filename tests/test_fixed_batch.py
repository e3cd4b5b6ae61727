"""A fixed batch along the trajectory: the dip, an exact identity, convexity where it is known."""

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


# --- the window around a batch's own step -------------------------------------------------------


def test_prediction_is_exact_but_for_the_held_out_loss_where_batches_share_a_hessian(folder):
    trained = train(Prior)
    table = fixed_batch.around(trained, [10, 20], 5, 8, n_held=2)
    assert len(table) == 2 * 2 * 14
    for (seed, t), window in table.groupby(["seed", "batch"]):
        run = trained[seed]
        weights = run.window(t - 5, t + 8)
        losses = probe.losses(run.network(), weights, *run.held(t, 2)).mean(1)
        np.testing.assert_allclose(window.own - window.predicted, losses - losses[5], atol=2e-6)
    bends = table.query("offset == 0").groupby("seed")[["bend_own", "bend_held"]].mean()
    np.testing.assert_allclose(bends.bend_own / bends.bend_held, 1, rtol=0.01)


def test_own_loss_is_the_logged_one_at_offset_zero_and_falls_after_the_step(runs):
    table = fixed_batch.around(runs[:1], [3, 30], 0, 2).set_index(["batch", "offset"])
    np.testing.assert_allclose(table.own[3, 0], runs[0].loss[3], rtol=1e-5)
    assert table.own[3, 1] < table.own[3, 0] and table.own[30, 1] < table.own[30, 0]


def test_dip_is_relative_to_the_mean_before_and_the_prediction_to_the_start():
    columns = {"offset": [-1, 0, 1, 2], "own": [3.0, 1, 0.5, 1.5], "predicted": [0, 1, 0, 0.25]}
    found = fixed_batch.dip(pd.DataFrame({"seed": 0, "batch": 1, **columns}))
    assert found.dip.tolist() == [1.5, 0.5]
    assert found.predicted.tolist() == [1.0, 0.75]
    assert found.k.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("a", "b", "fast", "slow"),
    [(1.0, 1.0, 2.0, 50.0), (0.5, 2.0, 2.0, 48.0), (3.0, 0.5, 4.0, 80.0)],
)
def test_mixture_fit_recovers_two_decays(a, b, fast, slow):
    k = np.arange(200)
    dips = a * np.exp(-k / fast) + b * np.exp(-k / slow)
    amplitudes, q = fixed_batch.fit_mixture(dips, 2)
    np.testing.assert_allclose(q[None, :] ** k[:, None] @ amplitudes, dips, atol=0.03 * (a + b))
    np.testing.assert_allclose(
        -1 / np.log(q), [slow, fast], rtol=0.35
    )  # on a grid, a seventh apart
    (amplitude,), (rate,) = fixed_batch.fit_mixture(2 * 0.9**k, 1)
    assert amplitude == pytest.approx(2, rel=0.1)
    assert -1 / np.log(rate) == pytest.approx(-1 / np.log(0.9), rel=0.08)


def test_mixture_fit_of_no_dip_has_no_amplitude_and_finite_rates():
    amplitudes, q = fixed_batch.fit_mixture(-np.ones(20), 2)
    assert amplitudes.tolist() == [0, 0] and np.all((q > 0) & (q < 1))
    k = np.arange(20)
    amplitudes, q = fixed_batch.fit_mixture(0.9**k - 0.5 * 0.3**k, 2)  # one grows
    assert amplitudes.min() >= 0 and amplitudes.max() > 0.5


def test_history_agrees_with_probing_each_snapshot(runs):
    run = runs[0]
    table = fixed_batch.history([run], [2, 5], [0, 7])
    exact = probe.losses(run.network(), run.at(7), *run.batches([5]))[0]
    assert table.query("step == 7 and batch == 5").loss.item() == pytest.approx(exact, abs=1e-6)
    assert len(fixed_batch.history([run], [2])) == len(run.steps)


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
    found = fixed_batch.convexity(runs, paths, [0, 1], "held", path="start")
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


def test_bad_windows_say_what_to_do(folder):
    runs = train(SmallNet, record="0-10")
    with pytest.raises(ConfigError, match="window.*empty"):
        fixed_batch.around(runs, [3], 0, 0)
    with pytest.raises(ConfigError, match="at least one"):
        fixed_batch.around(runs, [], 1, 1)
    with pytest.raises(ConfigError, match="window.*empty"):
        fixed_batch.along(runs[0], 5, 5)
    with pytest.raises(SnapshotError, match="it has 0-10.*`record`"):
        fixed_batch.around(runs, [9], 1, 5)
