"""Emulated cooldowns: exact on the model where eta is known, and the tables made from networks."""

from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from helpers import SMALL, SmallNet, small_data
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

from paper_lib import runs
from paper_lib.averaging import schedules
from paper_lib.config import Study
from paper_lib.errors import ConfigError
from paper_lib.experiments import cooldown, emulation, timescales
from paper_lib.experiments.cooldown import Cooldown
from paper_lib.probing import evaluation
from paper_lib.theory import simulate

NAMES = ["linear", "cosine", "1-sqrt", "step", "polynomial"]


def model_run(minima, curvature, steps=None, momentum=0.0):
    """SGD at a constant learning rate on the model, with the parts of a Trajectory that averages read."""
    weights = simulate.sgd(minima, np.ones(minima.shape[-1]), curvature, 0.0, momentum).T
    steps = np.arange(len(weights)) if steps is None else np.asarray(steps)
    config = SimpleNamespace(lr=1.0, momentum=momentum, start=0, steps=len(weights) - 1)
    return SimpleNamespace(
        weights=weights[steps], steps=steps, config=config, rows=lambda wanted: np.searchsorted(steps, wanted)
    )


@given(seeds, st.sampled_from(NAMES), st.floats(0.005, 0.9))
def test_a_trained_cooldown_ends_at_its_average_where_eta_is_known(seed, name, eta):
    minima, c = np.random.default_rng(seed).normal(size=(2, 60)), Cooldown(name, 40, 55, eta)
    run = model_run(minima, eta)
    trained = simulate.sgd(minima[:, 15:55], schedules.factors(name, 40), eta, run.weights[15]).T[-1]
    np.testing.assert_allclose(c.weights(run) @ run.weights, trained, atol=1e-10)


@pytest.mark.parametrize(("momentum", "eta"), [(0.0, 0.0), (0.0, 0.2), (0.9, 0.0), (0.9, 0.002)])
@pytest.mark.parametrize("name", NAMES)
def test_a_correction_along_known_directions_makes_averages_exact(name, momentum, eta):
    rng = np.random.default_rng(1)
    h, V = np.array([0.05, 0.9, 1.4]), np.linalg.qr(rng.normal(size=(5, 3)))[0].T
    minima, c = rng.normal(size=(3, 90)), Cooldown(name, 60, 90, eta)
    along = model_run(minima, h[:, None], momentum=momentum)
    center = along.weights.mean(0)
    m = SimpleNamespace(
        run=along, first=0, h=h, stable=h < 2, directions=V.astype(np.float32), projected=along.weights - center
    )
    lrs = np.concatenate([np.ones(30), schedules.factors(name, 60)])  # the cooldown takes over the momentum
    exact = simulate.sgd(minima, lrs, h[:, None], 0.0, momentum).T[-1]
    plain = c.weights(along) @ along.weights
    assert np.abs(plain - exact).max() > 0.05
    np.testing.assert_allclose(plain + V @ cooldown.correction(m, c), exact, atol=1e-5)


def test_averages_of_fewer_iterates_are_not_corrected():
    with pytest.raises(ConfigError, match="stride = 4 is not allowed: only averages of every iterate"):
        cooldown.correction(None, Cooldown("linear", 60, 90, stride=4))


def test_a_stride_counts_back_from_the_end():
    run = model_run(np.zeros((1, 20)), 0.1)
    a = Cooldown("linear", 10, 19, stride=4).weights(run)
    assert np.flatnonzero(a).tolist() == [11, 15, 19] and a.sum() == pytest.approx(1)
    thinned = model_run(np.zeros((1, 20)), 0.1, [0, 4, 11, 15, 19])
    np.testing.assert_array_equal(Cooldown("linear", 10, 19).weights(thinned), [0, 0, *a[[11, 15, 19]]])


def test_a_stride_that_leaves_one_iterate_is_refused():
    with pytest.raises(ConfigError, match="stride = 11 is not allowed: it leaves 1 snapshots in 10 steps"):
        Cooldown("linear", 10, 19, stride=11).weights(model_run(np.zeros((1, 20)), 0.1))


def test_the_branch_over_a_whole_window_is_the_studys_decayed_run():
    study = Study(preset="mine", run=SMALL, window=30, decay=30)
    assert Cooldown("cosine", 30, 70).branch(study.stationary()) == study.decayed(schedule="cosine")
    later = Cooldown("cosine", 20, 70).branch(study.stationary(), batch_seed=3)
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
    plan = cooldown.early(np.array(steps), 100, [50, 200], least=9)
    assert [(c.length, c.begin, c.schedule, c.stride) for c in plan] == [(*each, "linear", 1) for each in expected]


def test_early_cooldowns_without_snapshots_are_refused():
    with pytest.raises(ConfigError, match="snapshots from step 100 on = 1 is not allowed"):
        cooldown.early(np.array([0, 50, 120]), 100, [50])


def table(emulated):
    """Two cooldowns of two seeds, by hand."""
    columns = {"trained_train_loss": 0.5, "last_train_loss": 0.7, "start_train_loss": 0.8, "noise": 0.1}
    fields = {"schedule": ["linear", "step"] * 2, "length": 10, "stride": 1, "eta": 0.0, "seed": [0, 0, 1, 1]}
    return pd.DataFrame({**fields, **columns, "emulated_train_loss": emulated})


def test_missed_and_given_up():
    perfect, mixed, idle = table(0.5), table([0.48, 0.52, 0.5, 0.5]), table(0.7)
    assert cooldown.missed(perfect).tolist() == [0, 0]
    assert cooldown.missed(mixed).tolist() == pytest.approx([0.1, 0]), "misses do not cancel"
    assert cooldown.missed(idle).tolist() == pytest.approx([1, 1])
    assert cooldown.given_up(table(0.55), perfect).tolist() == pytest.approx([0.25, 0.25])


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A small network with BatchNorm at a small learning rate."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAPER_RUNS", str(tmp_path_factory.mktemp("runs")))
        dataset = small_data()
        stationary = runs.train_seeds(SMALL.branch(30, record="40-70", lr=0.01), [0, 1], dataset, SmallNet)
        plan = [Cooldown("linear", 30, 70), Cooldown("cosine", 20, 70), Cooldown("cosine", 20, 70, stride=5)]
        plan += [Cooldown("step", 20, 70), Cooldown("step", 20, 70, eta=0.3)]
        trained = emulation.branches(plan, stationary, dataset, SmallNet)
        evaluate = evaluation.evaluators(stationary, 40)
        plain = cooldown.measure(plan, stationary, trained, evaluate)
        modes = [timescales.modes(run, dataset, 3, 4, model=SmallNet) for run in stationary]
        return plain, cooldown.measure(plan[:2], stationary, [ends[:2] for ends in trained], evaluate, modes)


def test_a_small_network_at_a_small_rate_ends_where_its_average_lies(measured):
    plain, _ = measured
    assert len(plain) == 10 and set(plain.seed) == {0, 1}
    close = plain[plain.eta == 0]
    dense = close[close.stride == 1]
    assert (dense.distance < 0.03 * dense.moved).all() and (dense.cosine > 0.999).all()
    np.testing.assert_allclose(close.emulated_train_loss, close.trained_train_loss, atol=1e-3)
    step = plain[plain.schedule == "step"].pivot(index="seed", columns="eta", values="distance")
    assert (step[0.3] > 10 * step[0.0]).all(), "the network's own eta is far below 0.3"


def test_corrected_averages_keep_what_is_not_corrected(measured):
    plain, corrected = measured
    assert len(corrected) == 4
    same = plain[(plain.eta == 0) & (plain.stride == 1) & (plain.schedule != "step")]
    np.testing.assert_array_equal(same.trained_train_loss, corrected.trained_train_loss)
    elsewhere = [same.distance**2 - corrected.steep_plain.to_numpy() ** 2, corrected.distance**2 - corrected.steep**2]
    np.testing.assert_allclose(*elsewhere, rtol=0.02)
    assert (np.abs(corrected.steep / corrected.steep_plain - 1) > 0.1).all(), "along the directions they move"


def test_every_plot_draws(measured):
    plain, corrected = measured
    full = plain[(plain.eta == 0) & (plain.stride == 1)]
    fig, axes = plt.subplots(1, 7)
    cooldown.plot_lengths(axes[0], full)
    cooldown.plot_pairs(axes[1], full)
    cooldown.plot_checkpoints(axes[2], plain[plain.schedule == "cosine"])
    cooldown.plot_eta(axes[3], plain[plain.schedule == "step"])
    cooldown.plot_maps(axes[4], {"tail sums": full, "spectrum-aware": corrected})
    cooldown.plot_falling(axes[5], {"stationary": full})
    cooldown.plot_weights(axes[6], {"linear": full})
    for ax in axes:
        assert ax.lines and ax.get_legend_handles_labels()[1]
    plt.close(fig)
