"""Full trajectories: the model's own curves are predicted, a state is what products give."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import SMALL, small_data

from paper_lib import presets, runs
from paper_lib.averaging import equivalence, schedules
from paper_lib.errors import ConfigError
from paper_lib.experiments import full_trajectory
from paper_lib.probing import derivatives, probe
from paper_lib.theory import spectrum

LR, T = 0.5, 200
TRUTH = spectrum.of_losses(
    np.array([0.02, 0.2, 0.8]) / LR, np.array([0.05, 0.1, 0.05]), np.zeros(3), LR
)


def run(loss, lr, start=7, momentum=0.0, seed=0):
    """What `responses` reads of a run."""
    config = SimpleNamespace(start=start, seed=seed, momentum=momentum)
    return SimpleNamespace(config=config, loss=np.asarray(loss), lr=np.asarray(lr))


def curve(target, seed):
    """The model's own response under a named schedule, as `responses` gives it."""
    lrs = LR * schedules.factors(target, T)
    columns = {"target": target, "seed": seed, "step": np.arange(T), "lr": lrs}
    return pd.DataFrame(columns).assign(change=TRUTH.response(lrs, LR))


@pytest.fixture(scope="module")
def predicted():
    curves = [curve(target, seed) for target in ("step", "linear", "cosine") for seed in (0, 1)]
    table = pd.concat(curves, ignore_index=True)
    source, known = table[table.target == "step"], {0: TRUTH, 1: TRUTH}
    fitted = full_trajectory.response_spectra(source, LR)
    states = {"response": fitted, "settled": known}
    return full_trajectory.predict(table, source, states, LR)


def test_responses_join_the_parts_and_subtract_the_twin():
    parts = [run([3.0, 2.0], [0.1, 0.1]), run([5.0], [1.0], start=9)]
    twin = run([1.0, 1.0, 2.0, 9.0], np.ones(4))
    table = full_trajectory.responses("there and back", [twin], [parts])
    assert table.change.tolist() == [2.0, 1.0, 3.0]
    assert table.lr.tolist() == [0.1, 0.1, 1.0]
    assert table.step.tolist() == [0, 1, 2]


def test_momentum_counts_as_a_larger_learning_rate():
    heavy = run([1.0], [0.1], momentum=0.9)
    table = full_trajectory.responses("a", [heavy], [[heavy]])
    assert table.lr[0] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("other", "message"),
    [(run([1.0], [1.0], start=8), "start"), (run([1.0] * 3, [1.0] * 3), "steps")],
)
def test_runs_that_cannot_be_compared_are_refused(other, message):
    with pytest.raises(ConfigError, match=message):
        full_trajectory.responses("a", [run([1.0, 1.0], [1.0, 1.0])], [[other]])


def test_the_models_own_curves_are_predicted(predicted):
    averaged = full_trajectory.blocks(predicted)
    found = full_trajectory.errors(averaged).groupby("predictor").relative.max()
    assert found.response < 0.03  # its grid does not hold the true curvatures
    assert found.settled < 1e-12
    assert found.current > 0.05


def test_the_rule_to_beat_takes_settled_levels_and_draws_lines_between_them():
    change = [0, 0, 0, 0, 9, 9, -1, -3]
    source = pd.DataFrame({"seed": 0, "lr": np.repeat([1.0, 0.1], 4), "change": change})
    table = pd.DataFrame({"seed": 0, "lr": [0.1, 0.55, 1.0, 2.0]})
    np.testing.assert_allclose(full_trajectory.follow_current(table, source), [-2, -1, 0, 0])


def test_blocks_are_means():
    table = curve("linear", 0)
    means = table.change.to_numpy().reshape(10, -1).mean(1)
    np.testing.assert_allclose(full_trajectory.blocks(table, n=10).change, means)


@pytest.mark.parametrize("name", ["linear", "1-sqrt", "step"])
def test_the_gap_of_an_average_is_what_simulation_gives(name):
    h, sigma, n = np.array([0.002, 0.05, 0.6]), 0.3, 60
    mean, noise = np.array([3.0, 2.0, 0.0]), np.full(3, sigma**2)
    v = spectrum.Directions(h, noise).variances(1.0)
    state = spectrum.Directions(h, noise, h**2 * (mean**2 + v))
    factors = schedules.factors(name, n)
    a = equivalence.to_average(factors)
    gap = full_trajectory.emulation_gap(state, a, factors, 1.0)
    rng, chains = np.random.default_rng(0), 20_000
    x = y = mean + rng.standard_normal((chains, 3)) * np.sqrt(v)
    average = a[0] * x
    for weight, f in zip(a[1:], factors, strict=True):
        noise = sigma * rng.standard_normal((chains, 3))
        x, y = x - (h * x + noise), y - f * (h * y + noise)
        average = average + weight * x
    difference = h / 2 * (average**2 - y**2)
    error = 4 * difference.std(0) / np.sqrt(chains) + 1e-9
    assert np.all(np.abs(difference.mean(0) - gap) < error)


def test_share_predicted_ends_where_the_model_strays():
    loss = np.linspace(1, 0, 100)
    for model, share in ((np.where(np.arange(100) < 60, loss + 0.1, loss + 0.5), 0.6), (loss, 1)):
        table = pd.DataFrame({"loss": loss, "model": model})
        assert full_trajectory.share_predicted(table) == pytest.approx(share)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A few steps under a weight decay that makes every curvature positive."""
    settings = {"steps": 6, "record": "0-6", "lr": 0.001, "weight_decay": 30.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAPER_RUNS", str(tmp_path_factory.mktemp("runs")))
        study = presets.study("smoke", seeds=[0], **settings)
        (found,) = runs.train(study, study.run, progress=False)
        return found


def test_state_holds_unbiased_squares_and_their_curvatures(recorded):
    sizes = {"n_gradients": 6, "n_products": 2, "n_nodes": 3}
    state = full_trajectory.hessian_states([recorded], 4, **sizes)[0]
    net, weights = recorded.network(), np.array(recorded.at(4))
    x, y = probe.fixed_batches(recorded.dataset, 8, 64, 0)
    halves = derivatives.gradients(net, weights, x[2:], y[2:]).reshape(2, 3, -1)
    a, b = halves.mean(1) + 30 * weights

    def product(d):
        return derivatives.mean_hessian_product(net, weights, d, x[:2], y[:2]) + 30 * d

    assert state.gradient.sum() == pytest.approx(a @ b, rel=1e-4)
    assert state.noise.sum() == pytest.approx(6 * np.sum((a - b) ** 2) / 4, rel=1e-4)
    expected = (a @ product(b) + b @ product(a)) / 2
    assert state.h @ state.gradient == pytest.approx(expected, rel=1e-3)


def test_onward_begins_at_the_snapshot(recorded):
    table = full_trajectory.onward(recorded, 2, TRUTH, 3)
    assert table.step.tolist() == [2, 3, 4]
    np.testing.assert_allclose(table.loss, recorded.loss[2:5])
    assert table.model[0] == pytest.approx(recorded.loss.mean(), abs=0.3)
    expected = TRUTH.losses(np.full(3, 0.001))
    np.testing.assert_allclose(table.model - table.model[0], expected, atol=1e-6)


def test_a_network_of_ones_own_without_batchnorm(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPER_RUNS", str(tmp_path))

    def net():
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))

    trained = runs.train_seeds(SMALL, [0, 1], small_data(), net, progress=False)
    states = full_trajectory.hessian_states(trained, 20, 8, 2, 3)
    assert sorted(states) == [0, 1]
    table = full_trajectory.onward(trained[1], 20, states[1], 30)
    assert len(table) == 20 and np.isfinite(table.model).all()
