"""Runs trained elsewhere: recorded by any loop, read back, looked at, and refused beyond that."""

import time

import numpy as np
import pytest
import torch
from helpers import SmallNet, small_data
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from paper_lib import data, presets, runs
from paper_lib.errors import ConfigError
from paper_lib.experiments import alignment, one_step
from paper_lib.probing import derivatives, probe
from paper_lib.runs.store import SnapshotError

RECORD = "0-5,10-30"


def net():
    torch.manual_seed(3)
    return SmallNet()


@pytest.fixture(autouse=True)
def _runs(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPER_RUNS", str(tmp_path / "runs"))


def trained(folder, optimizer=torch.optim.SGD, batches=True, **options):
    """A loop of 30 steps as a user's; the iterates."""
    dataset, network, path = small_data(), net(), []
    steps, snapshots = (
        optimizer(network.parameters(), lr=0.1, **options),
        runs.Snapshots(folder, RECORD),
    )
    network.train()
    for step in range(30):
        x, y = dataset.batch(step, 8, 0)
        snapshots.keep(step, network, (x, y) if batches else None)
        path.append({name: t.clone() for name, t in network.state_dict().items()})
        loss = nn.functional.cross_entropy(network(x), y)
        steps.zero_grad()
        loss.backward()
        steps.step()
    snapshots.keep(30, network)
    return dataset, path


def finished(folder, dataset, **options):
    return runs.from_checkpoints(folder, dataset, net, lr=0.1, batch_size=8, **options)


def test_iterates_batches_and_gradients_are_those_of_the_loop(tmp_path):
    dataset, path = trained(tmp_path / "a")
    run = finished(tmp_path / "a", dataset)
    assert run.steps.tolist() == [*range(6), *range(10, 31)]
    model = run.network()
    for step in (0, 5, 10, 29):
        probe.load(model, run.at(step), run.buffers[run.rows(step)[0]])
        for name, tensor in path[step].items():
            if "num_batches" not in name:
                assert torch.equal(model.module.state_dict()[name], tensor), name
    assert torch.equal(run.batches([12])[0][0], dataset.batch(12, 8, 0)[0])
    g, v = run.gradients(10, 28)
    np.testing.assert_allclose(g, v)
    expected = derivatives.gradients(model, run.at(12), *run.batches([12]))[0]
    np.testing.assert_allclose(g[2], expected, atol=1e-5)


def test_found_again_and_another_where_a_file_changed(tmp_path):
    dataset, _ = trained(tmp_path / "a")
    first = finished(tmp_path / "a", dataset)
    assert finished(tmp_path / "a", dataset).folder == first.folder
    trained(tmp_path / "a", weight_decay=0.1)
    assert finished(tmp_path / "a", dataset).folder != first.folder


def test_gradients_of_another_optimizer_come_from_recorded_batches(tmp_path):
    dataset, _ = trained(tmp_path / "a", torch.optim.AdamW)
    run = finished(tmp_path / "a", dataset, optimizer="AdamW")
    g, v = run.gradients(10, 12)
    expected = derivatives.gradients(run.network(), run.at(11), *run.batches([11]))[0]
    np.testing.assert_allclose(g[1], expected, atol=1e-6)
    np.testing.assert_allclose(v[1], (run.at(11) - run.at(12)) / np.float32(0.1), rtol=1e-6)
    study = presets.finished([run], "mine")
    (part,) = runs.train(study, study.stationary())
    np.testing.assert_array_equal(part.gradients(10, 12), (g, v))
    trained(tmp_path / "b", torch.optim.AdamW, batches=False)
    without = finished(tmp_path / "b", dataset, optimizer="AdamW")
    with pytest.raises(SnapshotError, match="batch of step 10 was not recorded"):
        without.gradients(10, 12)


def test_a_study_of_it_reads_stretches_and_trains_nothing(tmp_path):
    dataset, _ = trained(tmp_path / "a")
    study = presets.finished([finished(tmp_path / "a", dataset)], "mine", eval_images=50)
    assert (study.run.steps, study.window, study.decay) == (10, 20, 20)
    (window,) = runs.train(study, study.stationary())
    assert (window.config.start, window.config.steps) == (10, 30)
    assert np.array_equal(window.window(10, 30), window.weights)
    (warmup,) = runs.train(study, study.run)
    assert warmup.steps.tolist() == [*range(6), 10]
    assert len(one_step.measure([window], [12, 20], n_held=2)) == 2 * len(one_step.MULTIPLES)
    along = one_step.along_own_step([window], [12], n_held=2).set_index("probe")
    x, y = window.batches([12])
    after = probe.losses(window.network(), window.at(13), x, y)[0]
    assert along.own[1] == pytest.approx(after, rel=1e-5)
    assert len(alignment.measure_lags([window], 10, 3, 4)) == 3
    with pytest.raises(ConfigError, match="a finished run is only read"):
        runs.train(study, study.stationary(lr=0.2))


def test_what_cannot_be_a_study_is_refused(tmp_path):
    dataset, _ = trained(tmp_path / "a")
    run = finished(tmp_path / "a", dataset)
    with pytest.raises(ConfigError, match="setting of a study of finished runs"):
        presets.finished([run], "mine", window=3)
    for step in range(11, 31, 2):
        (tmp_path / "a" / f"step-{step}.safetensors").unlink()
    with pytest.raises(ConfigError, match="record consecutive iterates"):
        presets.finished([finished(tmp_path / "a", dataset)], "mine")


def test_another_network_or_a_frozen_parameter_that_moved_is_named(tmp_path):
    dataset, _ = trained(tmp_path / "a")
    with pytest.raises(ConfigError, match="not of the network that net makes"):
        runs.from_checkpoints(tmp_path / "a", dataset, lambda: nn.Linear(4, 3), lr=1, batch_size=8)

    def frozen():
        network = net()
        network.head.requires_grad_(False)
        return network

    with pytest.raises(ConfigError, match=r"head.weight.*have changed in .*step-1\."):
        runs.from_checkpoints(tmp_path / "a", dataset, frozen, lr=0.1, batch_size=8)


def test_frozen_parameters_have_the_checkpoints_values(tmp_path):
    network = net()
    nn.init.constant_(network.head.weight, 7.0)
    snapshots = runs.Snapshots(tmp_path / "a", "0-2")
    for step in range(3):
        snapshots.keep(step, network)

    def frozen():
        network = net()
        network.head.requires_grad_(False)
        return network

    run = runs.from_checkpoints(tmp_path / "a", small_data(), frozen, lr=0.1, batch_size=8)
    assert (run.network().module.head.weight == 7).all()


FILE = """
from pathlib import Path
from helpers import small_data
from test_finished import net
from paper_lib import presets, runs
def study():
    here = Path(__file__).parent / "a"
    run = runs.from_checkpoints(here, small_data(), net, lr=0.1, batch_size=8)
    return presets.finished([run], "mine")
"""


def test_a_python_file_stands_for_its_study(tmp_path):
    trained(tmp_path / "a")
    (tmp_path / "my_run.py").write_text(FILE)
    study = presets.study(str(tmp_path / "my_run.py"), {"probe_batches": 3})
    assert study.preset == "my_run" and study.window == 20 and study.probe_batches == 3
    (tmp_path / "nothing_here.py").write_text("study = 3")
    with pytest.raises(ConfigError, match="must make one by"):
        presets.study(str(tmp_path / "nothing_here.py"))
    with pytest.raises(ConfigError, match="no such file"):
        presets.study("absent.py")


def test_a_probe_keeps_within_the_minutes_allowed(tmp_path, monkeypatch, capsys):
    dataset, _ = trained(tmp_path / "a")
    run = finished(tmp_path / "a", dataset)

    def slow(run, net, step):
        time.sleep(0.02)
        return {"value": step}

    monkeypatch.setenv("PAPER_MINUTES", "0.002")  # 0.12 s
    few = probe.per_run([run, run], range(10, 30), slow, "slow")
    assert 2 <= few.step.nunique() <= 3 and few.step.min() == 10 and few.step.max() == 29
    assert (
        f"slow: {few.step.nunique()} of 20 steps within PAPER_MINUTES=0.002"
        in capsys.readouterr().err
    )
    monkeypatch.delenv("PAPER_MINUTES")
    assert probe.per_run([run], range(10, 30), slow, "slow").step.tolist() == [*range(10, 30)]
    monkeypatch.setenv("PAPER_MINUTES", "five")
    with pytest.raises(ConfigError, match="PAPER_MINUTES = 'five'"):
        probe.per_run([run], [10], slow, "slow")


# --- data as loops have them --------------------------------------------------------------------


def loader(n=24, x=None, **options):
    x = torch.arange(n * 4.0).view(n, 4) if x is None else x
    return DataLoader(TensorDataset(x, torch.arange(n) % 3), 6, **options)


def test_loaders_serve_batches_by_seed_and_step():
    dataset = data.from_loaders(loader(shuffle=True), loader(6), held_out=4)
    assert dataset.sizes == {"train": 20, "held": 4, "test": 6}
    x, y = dataset.batch(3, 5, seed=1)
    again, _ = dataset.batch(3, 5, seed=1)
    assert torch.equal(x, again) and x.shape == (5, 4)
    assert torch.equal(y, (x[:, 0] / 4).long() % 3)
    rows = torch.cat([dataset.batch(i, 5, seed=1)[0][:, 0] for i in range(4)])
    assert len(rows.unique()) == 20  # an epoch has each once
    assert dataset.fingerprint != data.from_loaders(loader(), loader(9), held_out=4).fingerprint


class Noisy(torch.utils.data.Dataset):
    """Augmentation by the global generator."""

    def __len__(self):
        return 12

    def __getitem__(self, i):
        return torch.full((2,), float(i)) + torch.rand(2), i % 2


def test_augmentation_is_a_function_of_seed_and_step_and_leaves_no_trace():
    dataset = data.from_loaders(DataLoader(Noisy(), 4, shuffle=True), DataLoader(Noisy(), 4))
    before = torch.get_rng_state()
    x, _ = dataset.batch(0, 4, seed=0)
    assert torch.equal(x, dataset.batch(0, 4, seed=0)[0])
    assert torch.equal(before, torch.get_rng_state())
    later = dataset.batch(3, 4, seed=0)[0]  # the second epoch: the same images, other noise
    assert not set(x.flatten().tolist()) & set(later.flatten().tolist())


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(2, 3)

    def forward(self, left, right):
        return self.a(left) + self.b(right)


@pytest.mark.parametrize("named", [True, False])
def test_several_inputs_go_to_the_network_by_name_or_in_order(named):
    class Two(torch.utils.data.Dataset):
        def __len__(self):
            return 12

        def __getitem__(self, i):
            left, right = torch.full((4,), i / 10), torch.full((2,), -i / 10)
            return ({"right": right, "left": left} if named else (left, right)), i % 3

    dataset = data.from_loaders(DataLoader(Two(), 4), DataLoader(Two(), 4), held_out=4)
    from paper_lib.data.loss import CROSS_ENTROPY
    from paper_lib.training.flat import FlatModel

    torch.manual_seed(0)
    module = Pair()
    model, (x, y) = FlatModel(module), dataset.batches(2, 4, 0)
    weights = model.weights.numpy().copy()
    found = derivatives.mean_gradient(model, weights, x, y)
    by_hand = torch.zeros_like(model.grad)
    for each in range(2):
        loss = CROSS_ENTROPY(
            module(x[each]["left" if named else "0"], x[each]["right" if named else "1"]), y[each]
        )
        model.backward(loss / 2)
        by_hand += model.grad
    np.testing.assert_allclose(found, by_hand.numpy(), rtol=1e-5, atol=1e-7)


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter([])


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (DataLoader(Stream(), 4), "a dataset with a length"),
        (loader(sampler=WeightedRandomSampler([1.0] * 24, 24)), "leave sampler= out"),
    ],
)
def test_loaders_that_cannot_be_drawn_from(train, message):
    with pytest.raises(ConfigError, match=message):
        data.from_loaders(train, loader(6))
