"""The simulated model: its checks agree with closed forms and can fail; the plane."""

import numpy as np
import pytest

from paper_lib.averaging import equivalence, schedules, vectors
from paper_lib.experiments import model, model_plane
from paper_lib.theory import quadratic, simulate

SEEDS = [3, 4]


def deviations(table):
    """Per seed, the largest deviation of `measured` from `predicted`, in standard errors."""
    return ((table.measured - table.predicted).abs() / table.error).groupby(table.seed).max()


def test_equivalences_hold_to_rounding():
    etas = np.array([1e-3, 0.1, 1.0])
    errors = model.equivalence_errors(SEEDS, etas, steps=300)
    assert len(errors) == len(SEEDS) * 4 * len(etas)
    assert errors.error.max() < 1e-12
    heavy = model.equivalence_errors(SEEDS, 0.002 * etas, steps=300, momentum=0.9)
    assert heavy.error.max() < 1e-12
    cooldowns = model.cooldown_errors(SEEDS, etas / 2, steps=100, horizon=50)
    assert set(cooldowns.schedule) == set(schedules.COOLDOWNS)
    assert cooldowns.error.max() < 1e-12


def test_a_wrong_map_is_far_from_its_average():
    def wrong(a, eta, momentum):
        return equivalence.to_schedule(a, 1.001 * eta, momentum)

    etas = np.array([0.1])
    assert model.worst_error(model.equivalence_errors([0], etas, 300, schedule=wrong))[0] > -6
    tail_sums = model.cooldown_errors(
        [0], etas, 100, 50, average=lambda f, _: equivalence.to_average(f)
    )
    assert model.worst_error(tail_sums)[0] > -2


def test_only_steep_directions_need_negative_learning_rates():
    assert model.negative_share([0], eta=0.9)[0] == 0
    assert model.negative_share([0], eta=1.5)[0] > 0.5


def test_random_averages_are_averages():
    for seed in range(5):
        a = model.random_average(np.random.default_rng(seed), 3)
        vectors.check_weights(a, 3)
        assert a.min() >= 0


def test_closed_schedules_and_weights():
    table = model.equivalent_schedules([0.1], dict.fromkeys(model.AVERAGES, 20), steps=60)
    end = table.query("back == 0").set_index(["average", "eta"]).factor
    for eta in (0.0, 0.1):
        expected = {"two-point": 1 / 2, "EMA": 1 / 20, "uniform": 1 / 20}
        assert {name: end[name, eta] for name in expected} == pytest.approx(expected)
    weights = model.cooldown_weights(["linear"], [0.1], horizon=10, steps=20)
    np.testing.assert_allclose(weights.groupby("eta").weight.sum(), 1)
    np.testing.assert_allclose(weights.query("eta == 0 and back < 10").weight, 0.1)


def test_stationary_runs_are_stationary():
    x, c = model.stationary(0, [0.1, 1.5], steps=5, chains=20_000)
    assert (x.shape, c.shape) == ((20_000, 2, 6), (20_000, 2, 5))
    expected = quadratic.stationary_variance(np.array([0.1, 1.5]))
    np.testing.assert_allclose(x.var(0), np.tile(expected[:, None], 6), rtol=0.06)


def test_variances_agree_with_the_closed_forms_and_the_check_can_fail():
    table = model.variances(SEEDS, etas=(0.1, 1.0), chains=400)
    assert len(table) == len(SEEDS) * 2 * len(model.AVERAGES) * len(model.LENGTHS)
    assert deviations(table).max() < 5
    assert deviations(table.assign(predicted=0.7 * table.predicted)).min() > 4


def test_tail_sums_serve_slow_directions_only():
    table = model.timescales(SEEDS, [0.01, 0.5], horizons=[1, 20], chains=300)
    assert deviations(table).max() < 5
    last = table.query("horizon == 1")
    np.testing.assert_allclose(last.predicted, 1)  # an EMA that forgets at once: the last iterate
    means = table.query("horizon == 20").groupby(["kind", "eta"]).predicted.mean()
    ratio = means["tail-sum schedule"] / means["EMA"]
    assert ratio[0.01] == pytest.approx(1, abs=0.05)
    assert ratio[0.5] > 2
    errors = [model.slow_limit_error([0], eta, horizon=20)[0] for eta in (1e-2, 1e-4)]
    assert errors[1] < 0.1 * errors[0] < 0.1


def test_varying_curvature_breaks_the_equivalence_less_and_less():
    table = model.varying_curvature(SEEDS, etas=[0.2], dofs=[4, 1000], chains=300)
    assert deviations(table).max() < 5
    broken = table.groupby("dof").broken.mean()
    assert broken[1000] < 0.2 * broken[4]
    c = simulate.sample_minima(np.random.default_rng(0), 1.0, 5)
    np.testing.assert_array_equal(simulate.sgd(c, 0.2, np.ones(c.shape)), simulate.sgd(c, 0.2))


# --- the plane ----------------------------------------------------------------------------------


def test_a_cloud_has_the_predicted_covariance():
    ends = model_plane.cloud(lr=0.4, decay=0.9, lag=20, seed=0, chains=4000)
    axes = model_plane.rotate(np.eye(2))  # the eigendirections, one a row
    for kind, variance in model_plane.predicted_variances(0.4, 0.9, 20).items():
        measured = (ends.loc[ends.kind == kind, ["x", "y"]].to_numpy() @ axes.T).var(0)
        np.testing.assert_allclose(measured, variance, rtol=0.12)


def test_rotation_keeps_lengths():
    z = np.random.default_rng(0).standard_normal((5, 2))
    np.testing.assert_allclose((model_plane.rotate(z) ** 2).sum(1), (z**2).sum(1))
