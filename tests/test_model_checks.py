"""The simulated model against its closed forms: that the checks agree where they should, and can fail."""

import numpy as np
import pandas as pd
import pytest

from paper_lib.averaging import equivalence, schedules, vectors
from paper_lib.experiments import model_checks
from paper_lib.theory import quadratic, simulate

SEEDS = [3, 4]


def test_equivalences_hold_to_rounding():
    etas = np.array([1e-3, 0.1, 1.0])
    errors = model_checks.equivalence_errors(SEEDS, etas, steps=300)
    assert len(errors) == len(SEEDS) * 4 * len(etas)
    assert errors.error.max() < 1e-12
    assert model_checks.equivalence_errors(SEEDS, 0.002 * etas, steps=300, momentum=0.9).error.max() < 1e-12
    cooldowns = model_checks.cooldown_errors(SEEDS, etas / 2, steps=100, horizon=50)
    assert set(cooldowns.schedule) == set(schedules.COOLDOWNS)
    assert cooldowns.error.max() < 1e-12


def test_a_wrong_schedule_is_far_from_its_average(monkeypatch):
    right = equivalence.to_schedule
    monkeypatch.setattr(equivalence, "to_schedule", lambda a, *given: 1.001 * right(a, *given))
    assert model_checks.equivalence_errors([0], np.array([0.1]), steps=300).error.min() > 1e-6


def test_random_averages_are_averages():
    for seed in range(5):
        a = model_checks.random_average(np.random.default_rng(seed), 3)
        vectors.check_weights(a, 3)
        assert a.min() >= 0


def test_stationary_runs_are_stationary():
    x, c = model_checks.stationary(0, [0.1, 1.5], steps=5, chains=20_000)
    assert (x.shape, c.shape) == ((20_000, 2, 6), (20_000, 2, 5))
    expected = quadratic.stationary_variance(np.array([0.1, 1.5]))
    np.testing.assert_allclose(x.var(0), np.tile(expected[:, None], 6), rtol=0.06)


def test_variances_agree_with_the_closed_forms_and_the_check_can_fail():
    table = model_checks.variances(SEEDS, etas=(0.1, 1.0), chains=400)
    assert len(table) == len(SEEDS) * 2 * len(model_checks.AVERAGES) * len(model_checks.LENGTHS)
    assert model_checks.deviations(table).max() < 5
    wrong = table.assign(predicted=0.7 * table.predicted)
    assert model_checks.deviations(wrong).min() > 4


def test_the_largest_deviation_is_taken_within_each_seed():
    table = pd.DataFrame({"seed": [0, 0, 1], "measured": [1.0, 2, 3], "predicted": [1, 1, 5], "error": [1, 0.5, 1]})
    assert model_checks.deviations(table).to_dict() == {0: 2.0, 1: 2.0}


def test_probe_losses_have_the_predicted_values_and_optimum():
    etas = np.array([0.1, 0.5])
    table = model_checks.probe_losses(SEEDS, probes=np.array([0.0, 0.5, 1.0]), etas=etas)
    start = table.query("probe == 0")
    np.testing.assert_allclose(start.held, 0.5, rtol=0.1)  # equal shares of a loss of 1
    for p, rows in table.groupby("probe"):
        ratio = rows.held.to_numpy() / start.held.to_numpy()
        predicted = quadratic.held_out_loss(p * etas, etas) / quadratic.held_out_loss(0, etas)
        np.testing.assert_allclose(ratio.reshape(-1, 2), np.tile(predicted, (2, 1)), rtol=0.02)
        own = rows.own.to_numpy() / start.own.to_numpy()
        np.testing.assert_allclose(own.reshape(-1, 2), np.tile((1 - p * etas) ** 2, (2, 1)), rtol=1e-9)
    best = model_checks.best_probe(table)
    np.testing.assert_allclose(best.best, 0.5, atol=0.01)
    np.testing.assert_allclose(best.full, 0, atol=0.02)


def test_best_probe_of_a_known_parabola():
    probe = np.array([0.0, 1.0, 2.0])
    losses = pd.DataFrame({"seed": 7, "probe": probe, "held": 3 + (probe - 0.25) ** 2, "decrease": 0.5})
    assert model_checks.best_probe(losses).loc[7].to_dict() == pytest.approx({"best": 0.25, "full": 1.0})


def test_tail_sums_serve_slow_directions_only():
    table = model_checks.timescales(SEEDS, [0.01, 0.5], horizons=[1, 20], chains=300)
    assert model_checks.deviations(table).max() < 5
    last = table.query("horizon == 1")
    np.testing.assert_allclose(last.predicted, 1)  # an EMA that forgets at once: the last iterate
    ratio = table.query("horizon == 20").groupby(["kind", "eta"]).predicted.mean().unstack("kind")
    ratio = ratio["tail-sum schedule"] / ratio["EMA"]
    assert ratio[0.01] == pytest.approx(1, abs=0.05)
    assert ratio[0.5] > 2
    errors = [model_checks.slow_limit_error([0], eta, horizon=20)[0] for eta in (1e-2, 1e-4)]
    assert errors[1] < 0.1 * errors[0] < 0.1


def test_varying_curvature_breaks_the_equivalence_less_and_less():
    table = model_checks.varying_curvature(SEEDS, etas=[0.2], dofs=[4, 1000], chains=300)
    assert model_checks.deviations(table).max() < 5
    broken = table.groupby("dof").broken.mean()
    assert broken[1000] < 0.2 * broken[4]
    c = simulate.sample_minima(np.random.default_rng(0), 1.0, 5)
    np.testing.assert_array_equal(simulate.sgd(c, 0.2, np.ones(c.shape)), simulate.sgd(c, 0.2))
