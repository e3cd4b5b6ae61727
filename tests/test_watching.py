"""Watched runs: the same steps as recorded ones, alarms that lower, gains against references."""

import numpy as np
import pytest
import torch

from paper_lib import config, data, presets, runs
from paper_lib.averaging.monitor import Monitor
from paper_lib.errors import ConfigError
from paper_lib.experiments import watching
from paper_lib.training import loop

SETTINGS = config.RunConfig(
    data="mine", lr=0.3, batch_size=16, steps=150, record="0-150", weight_decay=0.01
)


def net():
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))


@pytest.fixture(scope="module")
def dataset():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 6, generator=generator)
    y = (x[:, :3] + torch.randn(600, 3, generator=generator)).argmax(1)
    return data.from_tensors(x[:500], y[:500], x[500:], y[500:], held_out=100, device="cpu")


@pytest.fixture(scope="module")
def recorded(dataset, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAPER_RUNS", str(tmp_path_factory.mktemp("runs")))
        yield runs.train_seeds(SETTINGS, [0, 1], dataset, net, progress=False)


def watch(dataset, settings=SETTINGS, monitor=None, factor=1.0):
    fresh = loop.initial_model(settings, dataset, net)
    return watching.watch(settings, dataset, fresh, monitor or Monitor(0.5), factor)


# --- loops ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_watching_changes_nothing(dataset, momentum, tmp_path, monkeypatch):
    monkeypatch.setenv("PAPER_RUNS", str(tmp_path))
    settings = SETTINGS.replace(momentum=momentum, steps=60, record="60")
    (plain,) = runs.train_seeds(settings, [0], dataset, net, progress=False)
    watched = watch(dataset, settings, Monitor(momentum))
    assert np.array_equal(watched.weights, plain.at(60))
    assert watched.loss == pytest.approx(plain.loss)
    assert np.all(watched.lr == 0.3)


@pytest.mark.parametrize(
    "change", [{"schedule": "cosine"}, {"schedule": (1.0,) * 150}, {"perturbation": 0.1}]
)
def test_only_plain_runs_at_a_constant_learning_rate_are_watched(dataset, change):
    settings = SETTINGS.replace(**change)
    with pytest.raises(ConfigError, match=next(iter(change))):
        watch(dataset, settings)


def test_a_branch_is_not_watched(dataset):
    with pytest.raises(ConfigError, match="start"):
        watch(dataset, SETTINGS.branch(10))


class AlarmAt(Monitor):
    """Says so at the given observations."""

    def __init__(self, *at):
        super().__init__()
        self.at, self.count = at, -1

    def observe(self, gradient):
        self.count += 1
        return self.count in self.at


def test_an_alarm_lowers_the_learning_rate_of_the_step_that_it_precedes(dataset):
    watched = watch(dataset, monitor=AlarmAt(50, 100), factor=0.1)
    assert watched.lr == pytest.approx(np.repeat([0.3, 0.03, 0.003], 50))
    assert watched.alarms == [50, 100]
    assert not np.array_equal(watched.weights, watch(dataset).weights)


# --- laws -----------------------------------------------------------------------------------------


def test_measured_gains_are_those_of_averages_made_by_hand(dataset, recorded):
    table = watching.measure_gains(recorded, 100, [0.9], n_points=1, n_batches=2)
    assert table.seed.tolist() == [0, 1]
    x = np.array(recorded[0].window(100, 125), np.float64)  # the one point: half of the way
    average = x[:10].mean(0)
    for row in x[10:]:
        average = 0.9 * average + 0.1 * row
    fresh = loop.initial_model(SETTINGS, dataset, net)
    losses = []
    for weights in (x[-1], average):
        fresh.weights.copy_(torch.from_numpy(weights))
        batches = dataset.batches(2, 16, 0, "held")
        loss = np.mean(
            [loop.batch_loss(fresh, *pair, SETTINGS).item() for pair in zip(*batches, strict=True)]
        )
        losses.append(loss + 0.005 * weights @ weights)
    assert table.measured[0] == pytest.approx(losses[0] - losses[1], abs=1e-5)


def test_averages_of_a_recorded_run_end_before_its_last_iterate(recorded):
    averages = watching.observed(recorded[0], [0.9])
    x = np.array(recorded[0].window(0, 149), np.float64)
    expected = x[:10].mean(0) * 0.9**140
    expected = expected + 0.1 * np.tensordot(0.9 ** np.arange(139, -1, -1), x[10:], 1)
    memory, average = averages.best()
    assert memory == 0.9 and average == pytest.approx(expected, abs=1e-5)


def test_a_study_is_watched_seed_by_seed(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("PAPER_RUNS", str(tmp_path))
    settings = {"seeds": (1, 4), "batch_size": 16, "record": "0-10"}
    study = presets.own(dataset, net, lr=0.05, steps=10, **settings)
    plain = runs.train(study, study.run, progress=False)
    watched = watching.watch_all(study, 0.5, factor=1.0)
    for ours, theirs in zip(watched, plain, strict=True):
        assert np.array_equal(ours.weights, theirs.at(10))
