"""Averages against branches: exact on the model, in its limit on a small network, and the numbers made from both."""

from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from helpers import SMALL, SmallNet, small_data

from paper_lib import runs
from paper_lib.errors import ConfigError
from paper_lib.experiments import emulation
from paper_lib.experiments.emulation import Emulation
from paper_lib.probing import evaluation
from paper_lib.theory import simulate


class ModelRun:
    """SGD on the quadratic model, with the parts of a Trajectory that comparisons read."""

    def __init__(self, minima, factors, curvature, start=0.0, first=0):
        self.weights = simulate.sgd(minima, np.asarray(factors), curvature, start).T
        self.lr = np.broadcast_to(factors, minima.shape[-1])
        self.steps = first + np.arange(len(self.weights))
        self.config = SimpleNamespace(seed=0, lr=1.0, start=first, steps=int(self.steps[-1]))

    def at(self, step):
        return self.weights[step - self.config.start]

    def window(self, first, last):
        return self.weights[first - self.config.start : last + 1 - self.config.start]


def model(rng, emulation_, curvature, steps=80):
    """A constant run of two directions and its branch."""
    minima = rng.normal(size=(2, steps))
    run = ModelRun(minima, 1.0, curvature)
    begin = emulation_.end - emulation_.span
    branch = ModelRun(minima[:, begin : emulation_.end], emulation_.schedule, curvature, run.at(begin), begin)
    return run, branch


EVERY = [("EMA", 0.9), ("EMA", 0.5), ("uniform", 25), ("two points", 1), ("two points", 30)]


@pytest.mark.parametrize("family, setting", EVERY)
@pytest.mark.parametrize("curvature", [0.02, 0.3, 1.0])
def test_the_branch_ends_at_the_average_where_eta_is_known(family, setting, curvature):
    e = Emulation(family, setting, end=70, eta=curvature)
    run, branch = model(np.random.default_rng(1), e, curvature)
    np.testing.assert_allclose(branch.at(70), e.average(run), atol=1e-12)


def test_tail_sums_are_right_in_slow_directions_only():
    e = Emulation("uniform", 40, end=70)
    run, branch = model(np.random.default_rng(2), e, np.array([[1e-5], [0.5]]))
    gap = np.abs(branch.at(70) - e.average(run)) / np.abs(e.average(run) - run.at(30))
    assert gap[0] < 1e-3 < 1e-2 < gap[1]


def test_spans_and_schedules():
    assert Emulation("EMA", 0.9, 100).span == 44  # 0.9^44 = 0.0097
    assert Emulation("EMA", 0.9, 100).weights[0] == pytest.approx(0.9**44)
    np.testing.assert_allclose(Emulation("uniform", 4, 100).schedule, [1, 0.75, 0.5, 0.25])
    np.testing.assert_allclose(Emulation("two points", 3, 100).schedule, [0.5, 0.5, 0.5])


def test_an_unknown_family_is_refused():
    with pytest.raises(ConfigError, match="uniform"):
        Emulation("unifrom", 4, 100)


def test_averages_that_do_not_fit_are_left_out():
    config = SMALL.branch(30, record="40-70")
    assert [e.setting for e in emulation.sweep("uniform", [10, 30, 31], config)] == [10, 30]
    assert all(e.end == 70 for e in emulation.sweep("EMA", [0.5, 0.8], config))


def test_a_branch_keeps_the_runs_settings_and_counts_on():
    config = SMALL.branch(30, record="40-70", lr=0.05, batch_seed=3)
    branch = Emulation("uniform", 10, 70).branch(config, batch_seed=4)
    assert (branch.start, branch.steps, branch.lr, branch.stream, branch.parent) == (60, 70, 0.05, 4, config)
    assert branch.snapshot_steps[[0, -1]].tolist() == [60, 70]
    assert Emulation("uniform", 30, 70).branch(config).parent == SMALL, "the parent kept its momentum, the run did not"


def test_following_a_constant_branch_is_following_the_run():
    minima = np.random.default_rng(3).normal(size=(2, 50))
    run = ModelRun(minima, 1.0, 0.1)
    copy = ModelRun(minima[:, 10:], 1.0, 0.1, run.at(10), first=10)
    table = emulation.follow([run], [copy])
    assert table.after.tolist() == list(range(1, 41))
    np.testing.assert_allclose(table.distance, 0, atol=1e-12)
    np.testing.assert_allclose(table.cosine, 1)
    disturbed = ModelRun(minima[:, 10:], 1.0, 0.1, run.at(10) + 1e-3, first=10)
    forgotten = emulation.follow([run], [disturbed]).distance
    np.testing.assert_allclose(forgotten, 1e-3 * np.sqrt(2) * 0.9 ** np.arange(1, 41), rtol=1e-6)


def test_following_ends_at_the_comparison():
    e = Emulation("EMA", 0.9, end=70)
    run, branch = model(np.random.default_rng(4), e, 0.05)
    found = emulation.follow([run], [branch]).iloc[-1]
    expected = emulation.geometry(run.at(e.end - e.span), e.average(run), branch.at(70))
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_geometry():
    found = emulation.geometry(np.zeros(2), np.array([3.0, 0]), np.array([0, 4.0]))
    assert found == {"moved": 3, "distance": 5, "cosine": 0}
    assert np.isnan(emulation.geometry(np.zeros(2), np.zeros(2), np.ones(2))["cosine"])


def comparison(schedule):
    """A sweep of three averages of one seed, by hand."""
    columns = {"average_train_loss": [0.5, 0.6, 0.7], "schedule_train_loss": schedule, "last_train_loss": [0.9] * 3}
    return pd.DataFrame({"family": "EMA", "seed": 0, "eta": [0, 0.1, 1], "end": [1, 2, 3], **columns})


def test_agreement():
    perfect = emulation.agreement(comparison([0.5, 0.6, 0.7])).loc[0]
    assert perfect.tolist() == pytest.approx([1, 0, 0.2, 0])
    idle = emulation.agreement(comparison([0.9, 0.9 + 1e-9, 0.9])).loc[0]
    assert idle.share == pytest.approx(1)
    off = emulation.agreement(comparison([0.53, 0.63, 0.67])).loc[0]
    assert (off.rms, off.share) == pytest.approx((0.03, 0.1))
    assert np.isnan(emulation.agreement(comparison([0.5, 0.6, 0.7])[:1]).loc[0].correlation)


def test_a_small_network_at_a_small_rate_ends_where_its_average_lies(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPER_RUNS", str(tmp_path))
    dataset = small_data()
    stationary = runs.train_seeds(SMALL.branch(30, record="40-70", lr=0.01), [0, 1], dataset, SmallNet)
    sweep = emulation.sweep("EMA", [0.7, 0.8], stationary[0].config) + [Emulation("uniform", 20, 70)]
    branches = emulation.branches(sweep, stationary, dataset, SmallNet)
    evaluate = evaluation.evaluators(stationary, 40)
    table = emulation.measure(sweep, stationary, branches, evaluate)
    assert len(table) == 6 and set(table.seed) == {0, 1}
    assert (table.distance < 0.02 * table.moved).all() and (table.cosine > 0.999).all()
    np.testing.assert_allclose(table.schedule_train_loss, table.average_train_loss, atol=1e-3)
    others = emulation.branches(sweep[:1], stationary, dataset, SmallNet, batch_seed=9)
    other = emulation.measure(sweep[:1], stationary, others, evaluate)
    assert (other.distance > 0.2 * other.moved).all(), "other batches lead elsewhere"


def test_momentum_goes_over_into_the_branch(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPER_RUNS", str(tmp_path))
    dataset = small_data()
    heavy = SMALL.replace(momentum=0.9, lr=0.01)
    (run,) = runs.train_seeds(heavy.branch(10, record="40-50"), [0], dataset, SmallNet)
    constant = runs.obtain(emulation.leave(run.config, 40, 10), dataset, SmallNet)
    np.testing.assert_array_equal(constant.at(50), run.at(50))


def test_every_plot_draws():
    table = comparison([0.5, 0.6, 0.7])
    fig, axes = plt.subplots(1, 5)
    emulation.plot_sweep(axes[0], table)
    emulation.plot_curves(axes[1], table)
    emulation.plot_eta(axes[2], table)
    minima = np.random.default_rng(3).normal(size=(2, 50))
    run = ModelRun(minima, 1.0, 0.1)
    follows = {"disturbed": emulation.follow([run], [ModelRun(minima, 1.0, 0.1, 0.1)])}
    emulation.plot_weights(fig, axes[3:], follows)
    assert len(fig.legends) == 1
    for ax in axes:
        assert ax.get_xlabel() and ax.lines
    plt.close("all")
