"""The run cache: identity, sharing between processes, and every way in which a run can be left half
done.
"""

import dataclasses
import errno
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from helpers import SMALL, SmallNet, small_data

from paper_lib import data, files, runs
from paper_lib.config import RunConfig
from paper_lib.errors import ConfigError
from paper_lib.presets import study
from paper_lib.probing import derivatives, probe
from paper_lib.runs import Run, identity, store
from paper_lib.training import loop


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPER_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


CHANGES = {
    "data": "other", "held_out": 9, "image_size": 32, "model": "resnet14", "width": 9,
    "norm": "group",
    "activation": "silu", "batch_size": 9, "lr": 0.9, "schedule": "linear", "momentum": 0.5,
    "weight_decay": 0.1, "steps": 41, "record": "3", "checkpoints": (4,),
    "averages": ("EMA 0.5",), "seed": 4, "batch_seed": 4, "precision": "bfloat16",
    "compile": True, "threads": 2, "parent": SMALL, "perturbation": 0.1,
}  # fmt: skip


def test_every_setting_is_part_of_the_key():
    assert set(CHANGES) | {"start"} == {f.name for f in dataclasses.fields(RunConfig)}
    dataset = small_data()
    keys = {
        name: runs.run_key(SMALL.replace(**{name: value}), dataset, None)
        for name, value in CHANGES.items()
    }
    keys["start"] = runs.run_key(SMALL.replace(parent=SMALL, start=2, record="40"), dataset, None)
    keys["nothing"] = runs.run_key(SMALL, dataset, None)
    assert len(set(keys.values())) == len(keys)
    assert runs.run_key(SMALL, small_data(), None) == keys["nothing"]


def test_data_model_and_code_are_part_of_the_key(monkeypatch):
    dataset, key = small_data(), runs.run_key(SMALL, small_data(), SmallNet)
    assert key != runs.run_key(SMALL, small_data(121), SmallNet)
    assert key != runs.run_key(SMALL, dataset, lambda: SmallNet(dropout=0.1))
    assert key != runs.run_key(SMALL, dataset, None)
    monkeypatch.setattr(identity, "SOURCE", "another")
    assert key != runs.run_key(SMALL, dataset, SmallNet)


def test_a_finished_run_is_loaded_and_not_trained(monkeypatch):
    first = runs.obtain(SMALL, small_data(), SmallNet)
    monkeypatch.setattr(loop, "train_run", None)  # calling it would fail
    again = runs.obtain(SMALL, small_data(), SmallNet)
    np.testing.assert_array_equal(first.weights, again.weights)
    assert again.config == SMALL


def test_a_child_needs_no_parent_once_it_is_there(monkeypatch):
    branch = SMALL.branch(5)
    runs.train_all([branch], small_data(), SmallNet, progress=False)
    parent = runs.run_folder(SMALL, small_data(), SmallNet)
    assert parent.exists()
    parent.rename(parent.with_name("gone"))
    runs.train_all([branch], small_data(), SmallNet, progress=False)
    assert not parent.exists()


def test_seeds_side_by_side_are_the_same_bits_as_alone(tmp_path, monkeypatch):
    chosen = study("smoke", steps=30, record="0-30")
    together = runs.train_seeds(chosen.run.branch(5), [0, 1, 2], progress=False)
    monkeypatch.setenv("PAPER_RUNS", str(tmp_path / "alone"))
    for seed, run in enumerate(together):
        alone = runs.obtain(chosen.run.branch(5).replace(seed=seed))
        np.testing.assert_array_equal(run.at(35), alone.at(35))
    assert not np.array_equal(together[0].at(35), together[1].at(35))


def test_seeds_that_repeat_are_refused():
    with pytest.raises(ConfigError, match=r"seeds = \[1, 1\]"):
        runs.train_seeds(SMALL, [1, 1], small_data(), SmallNet)


COUNTED = textwrap.dedent(
    """
    import sys
    from helpers import SMALL, SmallNet, small_data
    from paper_lib import runs
    from paper_lib.training import loop
    original = loop.train_run
    def counted(*args, **kwargs):
        print("trained", flush=True)
        return original(*args, **kwargs)
    loop.train_run = counted
    print(runs.obtain(SMALL.replace(steps=400, record=""), small_data(), SmallNet).folder)
    """
)


def test_two_processes_train_a_run_once():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", COUNTED], env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    outputs = [process.communicate()[0].split() for process in both]
    assert sum(words.count("trained") for words in outputs) == 1
    assert outputs[0][-1] == outputs[1][-1]


def test_a_disk_without_room_is_said_before_training(monkeypatch):
    usage = files.shutil.disk_usage("/")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(
        OSError, match=r"recording 41 snapshots of \d+ weights \(4 bytes each\) needs 0.00 GB, but"
    ):
        runs.obtain(SMALL, small_data(), SmallNet)


def test_a_disk_that_fills_up_leaves_nothing_that_looks_finished(monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            runs.obtain(SMALL, small_data(), SmallNet)
    folder = runs.run_folder(SMALL, small_data(), SmallNet)
    assert not folder.exists()
    assert runs.obtain(SMALL, small_data(), SmallNet).at(40).size  # with room again, it is trained


def test_a_run_killed_while_it_was_being_finished_is_finished(monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store.os, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            runs.obtain(SMALL, small_data(), SmallNet)
    whole = runs.obtain(SMALL, small_data(), SmallNet)
    assert whole.loss.shape == (40,) and np.isfinite(whole.loss).all()


def test_runs_need_no_pickle(own_folder, monkeypatch):
    run = runs.obtain(SMALL.replace(momentum=0.9), small_data(), SmallNet)
    load = np.load
    monkeypatch.setattr(
        np, "load", lambda *args, **kwargs: load(*args, **{**kwargs, "allow_pickle": False})
    )
    fresh = Run(run.folder, run.dataset)
    assert fresh.state()["momentum"].size == fresh.weights.shape[1] and fresh.buffers.shape[0] == 41


def test_a_users_module_instance_and_tensors_are_enough():
    x, y = torch.randn(60, 5), torch.arange(60) % 2
    dataset = data.from_tensors(x, y, x, y)
    config = RunConfig(batch_size=10, lr=0.5, steps=60, record="60")
    (run,) = runs.train_seeds(config, [0], dataset, lambda: torch.nn.Linear(5, 2), progress=False)
    assert run.weights.shape == (1, 12) and run.buffers.shape == (1, 0)
    assert run.folder.name.startswith("tensors-own-")


IMAGES, VECTORS = (
    small_data(),
    data.from_tensors(torch.randn(60, 5), torch.arange(60) % 2, torch.randn(9, 5), [0] * 9),
)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: runs.train_seeds(SMALL, [0], IMAGES, SmallNet()),
            "net = 'SmallNet' .* the function that makes",
        ),
        (
            lambda: runs.train_seeds(SMALL, [0], VECTORS),
            r"shape of an image = \(5,\) .* your own as net=",
        ),
        (
            lambda: runs.train_seeds(SMALL, None, IMAGES, SmallNet),
            "seeds = None .* a list, such as",
        ),
    ],
)
def test_a_network_or_seeds_of_the_wrong_kind_are_refused(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def test_a_run_knows_its_batches_and_its_network():
    (run,) = runs.train_seeds(SMALL, [0], IMAGES, SmallNet, progress=False)
    x, y = run.batches([20, 21])
    held, _ = run.held(20, 3, size=4)
    assert torch.equal(x[1], IMAGES.batch(21, SMALL.batch_size, 0)[0])
    assert torch.equal(held[2], IMAGES.batch(62, 4, 0, "held")[0])
    net = run.network()
    assert torch.equal(net.weights, torch.from_numpy(np.array(run.at(0))))
    loss = probe.losses(net, run.at(20), x[:1], y[:1])[0]
    assert loss == pytest.approx(run.loss[20], rel=1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_gradients_are_read_off_the_iterates(momentum):
    config = SMALL.replace(momentum=momentum, weight_decay=0.1)
    (run,) = runs.train_seeds(config, [0], IMAGES, SmallNet, progress=False)
    g, v = run.gradients(5, 7)
    taken = derivatives.gradients(run.network(), run.at(6), *run.batches([6]))[0]
    np.testing.assert_allclose(g[1], taken + 0.1 * run.at(6), atol=1e-4)
    np.testing.assert_allclose(v[1], g[1] + momentum * v[0], atol=1e-5)


@pytest.mark.parametrize(
    ("model", "title"), [(SmallNet, "1 run of your network"), (None, "1 run of resnet8")]
)
def test_progress_names_the_network_and_no_rate_before_it_is_known(model, title, capsys):
    runs.train_seeds(SMALL.replace(width=1, steps=1, record=""), [0], IMAGES, model)
    printed = capsys.readouterr().err
    assert f"training {title}" in printed and " 0 images/s" not in printed
