"""What runs take is told beforehand: disk as written, memory as allocated, refusals."""

import functools
import types

import numpy as np
import pytest
import torch
from helpers import SMALL, SmallNet, interrupted, small_data

from paper_lib import presets, runs
from paper_lib.__main__ import main
from paper_lib.averaging import vectors
from paper_lib.runs import SnapshotError, budget
from paper_lib.training.flat import FlatModel

AVERAGES = ("EMA 0.9", "uniform 10", "two points 30", "uniform 1")


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPER_RUNS", str(tmp_path / "runs"))


def obtain(config):
    return runs.obtain(config, small_data(), SmallNet)


def test_disk_is_counted_as_it_is_written():
    config = SMALL.replace(checkpoints=(10,), averages=AVERAGES, momentum=0.5)
    run = obtain(config)
    written = sum(path.stat().st_size for path in run.folder.iterdir())
    n_weights, n_buffers = run.weights.shape[1], run.buffers.shape[1]
    resume = 8 * ((2 + len(AVERAGES)) * n_weights + n_buffers)  # gone when the run is finished
    counted = budget.disk_bytes(config, n_weights, n_buffers) - resume
    overhead = 1024 * len(list(run.folder.iterdir()))  # names and shapes
    assert counted <= written <= counted + overhead + 2048


def test_averages_of_a_run_that_keeps_no_snapshots_are_those_of_one_that_does():
    every = obtain(SMALL.branch(30, record="40-70"))
    bounded = obtain(SMALL.branch(30, averages=AVERAGES))
    assert len(bounded.steps) == 0
    for name in AVERAGES:
        a = vectors.named(name, 31)
        np.testing.assert_allclose(bounded.average(a), every.average(a), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(every.average(a), vectors.average(a, every.weights), rtol=1e-6)
    with pytest.raises(SnapshotError, match="named in its `averages`"):
        bounded.average(vectors.named("EMA 0.8", 31))
    with pytest.raises(ValueError, match="has 31 iterates"):
        bounded.average(vectors.named("EMA 0.9", 30))


def test_sparse_snapshots_serve_the_averages_that_weigh_them_alone():
    run = obtain(SMALL.replace(record="20-40/10"))
    average = run.average(vectors.two_point(41, 20))
    np.testing.assert_array_equal(average, (run.at(20) + run.at(40)) / 2)


def test_an_interrupted_run_accumulates_the_same_averages(tmp_path, monkeypatch):
    config = SMALL.replace(record="", averages=AVERAGES)
    whole = obtain(config)
    monkeypatch.setenv("PAPER_RUNS", str(tmp_path / "interrupted"))
    again = functools.partial(runs.obtain, config, small_data(), SmallNet)
    resumed = interrupted(again, monkeypatch, 25, chunk=5)
    np.testing.assert_array_equal(resumed._averages, whole._averages)


@pytest.mark.parametrize("name", ["EMA 1.5", "uniform 99", "median 3", "EMA", "two points x"])
def test_averages_that_cannot_be_are_refused(name):
    with pytest.raises(ValueError, match="averages = .* is not allowed"):
        SMALL.replace(averages=(name,))


def test_memory_counts_what_pends():
    assert budget.memory_bytes(SMALL.replace(record=""), 100) == 4 * 100 * 3
    assert budget.memory_bytes(SMALL.replace(record="0-40/10"), 100) == 4 * 100 * (3 + 3)
    pending = 3 + 4 + budget.CHUNK + 1
    assert budget.memory_bytes(SMALL.replace(averages=AVERAGES), 100) == 4 * 100 * pending


def test_too_little_memory_is_said_before_training(monkeypatch):
    little = types.SimpleNamespace(available=1000)
    monkeypatch.setattr(budget.psutil, "virtual_memory", lambda: little)
    message = "4 averages .* need 0.00 GB, but cpu has 0.00 GB free: name fewer `averages`"
    with pytest.raises(MemoryError, match=message):
        obtain(SMALL.replace(averages=AVERAGES))


def test_running_out_of_memory_says_what_to_lower(monkeypatch):
    def full(net, x):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(FlatModel, "forward", full)
    message = "of width 8 with batches of 8 in float32 .*: lower `batch_size` or `width`"
    with pytest.raises(MemoryError, match=message):
        obtain(SMALL)


@pytest.mark.parametrize("preset", presets.PRESETS)
def test_every_preset_can_be_planned(preset, capsys):
    assert main(["plan", "--preset", preset, "--images-per-second", "1000"]) == 0
    out = capsys.readouterr().out
    assert "warm-up" in out and "GB on disk" in out and "hours" in out


def test_hours_follow_the_rate_and_disk_the_snapshots():
    study = presets.study("cifar10")
    slow, fast = (budget.table(study, rate) for rate in (100, 1000))
    np.testing.assert_allclose(slow.hours, 10 * fast.hours)
    kept = slow.set_index("run")["GB on disk"]
    assert kept["window"] > 3 * study.window * 4 * slow.weights[0] / 1e9 > kept["averages"]
    assert main(["plan", "--images-per-second", "-1"]) == 2


def test_the_widest_network_is_counted_without_being_built(capsys):
    assert main(["plan", "--preset", "smoke", "--width", "65536"]) == 0
    assert "1,279,906,217,994 weights" in capsys.readouterr().out


def test_a_network_of_your_own_is_counted():
    chosen = presets.own(small_data(), SmallNet, lr=0.1, steps=100)
    built = FlatModel(SmallNet())
    assert set(budget.table(chosen).weights) == {built.weights.numel()}
    resnet = budget.table(presets.own(small_data(), lr=0.1, steps=100, width=4))
    assert set(resnet.weights) != {built.weights.numel()}
