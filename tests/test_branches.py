"""Averages against branches: equal in slow directions, of the model and of small networks."""

import functools
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from helpers import SMALL, SmallNet, small_data
from torch import nn

from paper_lib import runs
from paper_lib.config import Study
from paper_lib.errors import ConfigError
from paper_lib.experiments import branches
from paper_lib.experiments.branches import Emulation
from paper_lib.probing import evaluation
from paper_lib.theory import simulate
from paper_lib.theory.quadratic import stationary_variance


class ModelRun:
    """SGD on the quadratic model, with the parts of a Run that comparisons read."""

    def __init__(self, minima, factors=1.0, h=1.0, start=0.0, first=0, momentum=0.0, kept=None):
        factors = np.broadcast_to(factors, minima.shape[-1])
        x = simulate.sgd(minima, factors, h, start, momentum).T
        kept = np.arange(len(x)) if kept is None else np.asarray(kept)
        self.steps, self.weights, self.lr = first + kept, x[kept], factors
        settings = {"seed": 0, "lr": 1.0, "momentum": momentum}
        self.config = SimpleNamespace(start=first, steps=first + len(x) - 1, **settings)

    def rows(self, wanted):
        return np.searchsorted(self.steps, wanted)

    def at(self, step):
        return self.weights[self.rows(step)]

    def window(self, first, last):
        return self.weights[self.rows(first) : self.rows(last) + 1]


def average(e, run):
    return e.on_snapshots(run) @ run.weights


def run_and_branch(seed, e, h, steps=80):
    """A constant run of two directions and its branch."""
    minima = np.random.default_rng(seed).normal(size=(2, steps))
    run = ModelRun(minima, h=h)
    own = minima[:, e.begin : e.end]
    return run, ModelRun(own, e.schedule, h, run.at(e.begin), e.begin)


AVERAGES = [("EMA", 0.9), ("EMA", 0.5), ("uniform", 25), ("two points", 1), ("two points", 30)]
COOLDOWNS = [(name, 40) for name in ("linear", "cosine", "1-sqrt", "step", "polynomial")]


@pytest.mark.parametrize(("family", "setting"), [*AVERAGES, *COOLDOWNS])
def test_in_slow_directions_the_branch_ends_at_the_average(family, setting):
    e = Emulation(family, setting, end=70)
    run, branch = run_and_branch(1, e, 1e-5)
    gap, moved = (np.linalg.norm(average(e, run) - x) for x in (branch.at(70), run.at(e.begin)))
    assert gap < 1e-3 * moved


def test_tail_sums_are_right_in_slow_directions_only():
    e = Emulation("uniform", 40, end=70)
    run, branch = run_and_branch(2, e, np.array([[1e-5], [0.5]]))
    gap = np.abs(branch.at(70) - average(e, run)) / np.abs(average(e, run) - run.at(30))
    assert gap[0] < 1e-3 < 1e-2 < gap[1]


def test_spans_and_schedules():
    ema = Emulation("EMA", 0.9, 100)
    assert (ema.span, ema.begin) == (44, 56)  # 0.9^44 = 0.0097
    assert ema.weights()[0] == pytest.approx(0.9**44)
    np.testing.assert_allclose(Emulation("uniform", 4, 100).schedule, [1, 0.75, 0.5, 0.25])
    np.testing.assert_allclose(Emulation("two points", 3, 100).schedule, [0.5, 0.5, 0.5])
    np.testing.assert_allclose(Emulation("linear", 4, 100).weights(), [0, *[0.25] * 4])


def test_a_stride_counts_back_from_the_end():
    run = ModelRun(np.zeros((1, 20)))
    a = Emulation("linear", 10, 19, stride=4).on_snapshots(run)
    assert np.flatnonzero(a).tolist() == [11, 15, 19] and a.sum() == pytest.approx(1)
    thinned = ModelRun(np.zeros((1, 20)), kept=[0, 4, 11, 15, 19])
    on_fewer = Emulation("linear", 10, 19).on_snapshots(thinned)
    np.testing.assert_array_equal(on_fewer, [0, 0, *a[[11, 15, 19]]])


def test_what_cannot_be_emulated_is_refused():
    with pytest.raises(ConfigError, match="uniform"):
        Emulation("unifrom", 4, 100)
    with pytest.raises(ConfigError, match="it leaves 1 snapshots in 10 steps"):
        Emulation("linear", 10, 19, stride=11).on_snapshots(ModelRun(np.zeros((1, 20))))
    heavy = ModelRun(np.zeros((1, 20)), momentum=0.9)
    with pytest.raises(ConfigError, match="momentum = 0.9 is not allowed: the prediction has none"):
        branches.follow([heavy], [heavy], predict=True)


def test_averages_that_do_not_fit_are_left_out():
    config = SMALL.branch(30, record="40-70")
    assert [e.setting for e in branches.sweep("uniform", [10, 30, 31], config)] == [10, 30]
    assert all(e.end == 70 for e in branches.sweep("EMA", [0.5, 0.8], config))


def test_a_branch_keeps_the_runs_settings_and_counts_on():
    config = SMALL.branch(30, record="40-70", lr=0.05, batch_seed=3)
    branch = Emulation("uniform", 10, 70).branch(config, batch_seed=4)
    settings = (branch.start, branch.steps, branch.lr, branch.stream, branch.parent)
    assert settings == (60, 70, 0.05, 4, config)
    assert branch.snapshot_steps[[0, -1]].tolist() == [60, 70]
    whole = Emulation("uniform", 30, 70).branch(config)
    assert whole.parent == SMALL, "the parent kept its momentum, the run did not"


def test_the_cooldown_over_a_whole_window_is_the_studys_decayed_run():
    study = Study(preset="mine", run=SMALL, window=30, decay=30)
    whole = Emulation("cosine", 30, 70).branch(study.stationary(), record="")
    assert whole == study.decayed(schedule="cosine")
    later = Emulation("cosine", 20, 70).branch(study.stationary(), record="", batch_seed=3)
    assert (later.start, later.steps, later.stream, later.parent) == (50, 70, 3, study.stationary())


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (range(0, 900), [(50, 100), (200, 100)]),
        (range(0, 4001, 25), [(200, 100)]),
        (range(0, 4001, 250), [(2000, 250)]),
        (range(0, 1001, 250), [(750, 250)]),
    ],
)
def test_early_cooldowns_span_enough_snapshots_or_all_there_are(steps, expected):
    plan = branches.early_cooldowns(np.array(steps), 100, [50, 200], least=9)
    assert [(e.span, e.begin, e.family, e.stride) for e in plan] == [
        (*each, "linear", 1) for each in expected
    ]


def test_early_cooldowns_without_snapshots_are_refused():
    with pytest.raises(ConfigError, match="snapshots from step 100 on = 1 is not allowed"):
        branches.early_cooldowns(np.array([0, 50, 120]), 100, [50])


def test_following_a_constant_branch_is_following_the_run():
    minima = np.random.default_rng(3).normal(size=(2, 50))
    run = ModelRun(minima, h=0.1)
    copy = ModelRun(minima[:, 10:], h=0.1, start=run.at(10), first=10)
    table = branches.follow([run], [copy])
    assert table.after.tolist() == list(range(1, 41))
    np.testing.assert_allclose(table.distance, 0, atol=1e-12)
    np.testing.assert_allclose(table.cosine, 1)
    disturbed = ModelRun(minima[:, 10:], h=0.1, start=run.at(10) + 1e-3, first=10)
    forgotten = branches.follow([run], [disturbed]).distance
    expected = 1e-3 * np.sqrt(2) * 0.9 ** np.arange(1, 41)
    np.testing.assert_allclose(forgotten, expected, rtol=1e-6)


def test_each_batch_with_a_hessian_of_its_own_is_predicted_exactly():
    rng, lr, factors = np.random.default_rng(5), 0.2, Emulation("EMA", 0.9, 44).schedule
    roots = rng.normal(size=(44, 3, 3))
    H, c = roots @ roots.transpose(0, 2, 1) / 3, rng.normal(size=(44, 3))

    def descend(rates):
        x = [np.ones(3)]
        for t, rate in enumerate(rates):
            x.append(x[-1] - rate * H[t] @ (x[-1] - c[t]))
        return np.array(x)

    x, branch = descend(np.full(44, lr)), descend(lr * factors)
    own = np.array([y + e for y, e in branches.emulated(x, factors, lambda t, d: lr * H[t] @ d)])
    np.testing.assert_allclose(own, branch[1:], atol=1e-12)
    mean = [y + e for y, e in branches.emulated(x, factors, lambda t, d: lr * H.mean(0) @ d)]
    plain = [y for y, _ in branches.emulated(x, factors)]
    assert (
        np.abs(mean[-1] - branch[-1]).max() > 0.05 and np.abs(plain[-1] - branch[-1]).max() > 0.05
    )
    a = Emulation("EMA", 0.9, 44).weights()
    np.testing.assert_allclose(plain[-1], a @ x, atol=1e-12)


def test_following_ends_at_the_comparison():
    e = Emulation("EMA", 0.9, end=70)
    run, branch = run_and_branch(4, e, 0.05)
    last = branches.follow([run], [branch]).iloc[-1]
    expected = branches.geometry(run.at(e.begin), average(e, run), branch.at(70))
    assert {name: last[name] for name in expected} == pytest.approx(expected)


def test_geometry():
    right = branches.geometry(np.zeros(2), np.array([3.0, 0]), np.array([0, 4.0]))
    assert right == {"moved": 3, "distance": 5, "cosine": 0}
    assert np.isnan(branches.geometry(np.zeros(2), np.zeros(2), np.ones(2))["cosine"])


def comparison(average, schedule, last, seeds=0):
    """Training losses of several emulations, by hand."""
    losses = {"average_train_loss": average, "schedule_train_loss": schedule}
    return pd.DataFrame({"seed": seeds, "last_train_loss": last, **losses})


def test_mismatches():
    averages = np.array([[0.5, 0.6, 0.7], [0.5, 0.6, 0.9]])
    table = comparison(averages.ravel(), (averages + 0.01).ravel(), 0.9, np.repeat([0, 1], 3))
    table["setting"] = [1, 2, 3] * 2
    found = branches.mismatches(table)
    np.testing.assert_allclose(found.own, 0.01)
    np.testing.assert_allclose(found.away, [0.2, 0.4])
    np.testing.assert_allclose(found.one, [0.22 / 3 - 0.01 / 3, 0.42 / 3 - 0.01 / 3])
    np.testing.assert_allclose(found.seeds, [0.23 / 3, 0.21 / 3])
    alone = branches.mismatches(table.query("seed == 0"))
    assert np.isnan(alone.seeds[0]) and alone.away[0] == pytest.approx(0.2)


@pytest.mark.parametrize(("family", "setting", "sign"), [("EMA", 0.9, 1), ("two points", 20, -1)])
def test_schedules_leave_another_variance_in_steep_directions(family, setting, sign):
    e, h = Emulation(family, setting, 60), np.array([0.001, 0.3, 0.8])
    predicted = branches.variance_gap(e, h)
    assert abs(predicted[0]) < 0.01 and (sign * predicted[1:] > 0.02).all()
    rng = np.random.default_rng(0)
    start = rng.standard_normal((40_000, 3)) * np.sqrt(stationary_variance(h))
    minima = rng.standard_normal((40_000, 3, e.span))
    averages = simulate.sgd(minima, 1, h[:, None], start) @ e.weights()
    ends = simulate.sgd(minima, e.schedule, h[:, None], start)[..., -1]
    found = (ends.var(0) - averages.var(0)) / stationary_variance(h)
    np.testing.assert_allclose(found, predicted, atol=0.01)


@pytest.mark.parametrize(
    ("average", "expected"),
    [(0.5, [0, 0]), ([0.48, 0.52, 0.5, 0.5], [0.1, 0]), (0.7, [1, 1])],  # misses do not cancel
)
def test_missed(average, expected):
    table = comparison(average, [0.5] * 4, 0.7, seeds=[0, 0, 1, 1])
    assert branches.missed(table).tolist() == pytest.approx(expected)


# --- a small network with BatchNorm at a small learning rate ------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAPER_RUNS", str(tmp_path_factory.mktemp("runs")))
        yield


@pytest.fixture(scope="module")
def stationary(folder):
    config = SMALL.branch(30, record="40-70", lr=0.01)
    return runs.train_seeds(config, [0, 1], small_data(), SmallNet)


@pytest.fixture(scope="module")
def measured(stationary):
    """Averages and cooldowns of a small network."""
    plan = branches.sweep("EMA", [0.7, 0.8], stationary[0].config) + [Emulation("uniform", 20, 70)]
    plan += [Emulation("linear", 30, 70), Emulation("cosine", 20, 70)]
    plan += [Emulation("cosine", 20, 70, stride=5)]
    plan += [Emulation("step", 20, 70)]
    trained, evaluate = branches.train(plan, stationary), evaluation.evaluators(stationary, 40)
    return branches.measure(plan, stationary, trained, evaluate)


def test_a_small_network_at_a_small_rate_ends_where_its_average_lies(measured):
    assert measured.seed.tolist() == [0] * 7 + [1] * 7
    gap = measured.average_train_loss - measured.schedule_train_loss
    assert (gap.abs() < 1e-3).all()
    dense = measured[measured.stride == 1]
    assert (dense.distance < 0.03 * dense.moved).all() and (dense.cosine > 0.999).all()


def test_points_are_those_they_name(measured, stationary):
    evaluate = evaluation.evaluators(stationary, 40)
    row = measured.query("seed == 1 and family == 'uniform'").iloc[0]
    assert row.last_test_loss == evaluate[1](stationary[1].at(70))["test_loss"]
    assert row.noise == pytest.approx(1 / 20)


def test_hessians_of_the_batches_predict_where_a_small_smooth_network_goes(folder):
    config = SMALL.branch(30, record="40-70", lr=0.05)
    smooth = functools.partial(SmallNet, activation=nn.SiLU)
    (run,) = runs.train_seeds(config, [0], small_data(), smooth)
    ((branch,),) = branches.train([Emulation("uniform", 30, 70)], [run])
    followed = branches.follow([run], [branch], predict=True)
    assert (followed.predicted_moved == followed.moved).all()
    later = followed.query("after > 2")  # at first both are at the run's own rate
    np.testing.assert_allclose(later.predicted_distance, later.distance, rtol=0.05)


def test_other_batches_lead_elsewhere(stationary):
    plan, evaluate = [Emulation("EMA", 0.7, 70)], evaluation.evaluators(stationary, 40)
    trained = branches.train(plan, stationary, batch_seed=9)
    other = branches.measure(plan, stationary, trained, evaluate)
    assert (other.distance > 0.2 * other.moved).all()


def test_momentum_goes_over_into_the_branch(folder):
    heavy = SMALL.replace(momentum=0.9, lr=0.01)
    (run,) = runs.train_seeds(heavy.branch(10, record="40-50"), [0], small_data(), SmallNet)
    (constant,) = runs.branch_all([run], [branches.leave(run.config, 40, 10)])
    np.testing.assert_array_equal(constant.at(50), run.at(50))
