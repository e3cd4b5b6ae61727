"""Watched runs: the same steps as recorded ones, alarms that lower, averages and laws against plain
references.
"""

import numpy as np
import pytest
import torch

from paper_lib import config, data, runs
from paper_lib.averaging.monitor import Averages, Monitor
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


def watch(dataset, settings=SETTINGS, monitor=None, factor=1.0, memories=(0.0, 0.9)):
    fresh = loop.initial_model(settings, dataset, net)
    return watching.watch(
        settings, dataset, fresh, monitor or Monitor(0.5), factor, Averages(memories)
    )


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
    assert not np.array_equal(watched.weights, watch(dataset).weights)


def test_the_average_is_the_best_of_the_averages_of_the_iterates(dataset, recorded):
    watched = watch(dataset, memories=(0.9,))
    assert np.all(watched.memory == 0.9)
    x = np.array(recorded[0].window(0, 149))
    expected = x[:10].mean(0) * 0.9**140
    expected = expected + 0.1 * np.tensordot(0.9 ** np.arange(139, -1, -1), x[10:], 1)
    assert watched.average == pytest.approx(expected, abs=1e-5)


def test_windows_carry_the_step_at_which_they_ended(dataset):
    watched = watch(dataset, monitor=Monitor(0.0, alpha=0.4))
    steps = np.array(list(watched.windows))
    lengths = np.array([w.steps for w in watched.windows.values()])
    fresh = np.array(
        [True, *(w.stationary for w in watched.windows.values())][:-1]
    )  # the first gradient is no value
    assert np.array_equal(np.diff([-1, *steps]), lengths + fresh)
    assert watched.alarms == [step for step, w in watched.windows.items() if w.stationary]


# --- tables ---------------------------------------------------------------------------------------


def test_loss_at_the_alarm_compares_windows_of_one_length(dataset):
    watched = watch(dataset, monitor=Monitor(0.0, alpha=0.4))
    at = watched.alarms[0]
    n = watched.windows[at].steps
    expected = watched.loss[at - n : at].mean() / watched.loss[-n:].mean()
    assert watched.loss_at_alarm() == pytest.approx(expected)
    never = watch(dataset, SETTINGS.replace(steps=5, record=""))
    assert np.isnan(never.loss_at_alarm())


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


def test_gradients_of_another_run_predict_nothing(recorded):
    table = watching.measure_gains(recorded, 20, [0.9], n_points=1, n_batches=2)
    assert (table.unrelated.abs() < 0.3 * table.predicted.abs()).all()
