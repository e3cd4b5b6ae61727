"""Watched runs: the same side by side as alone, trained once, never half."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import SMALL, SmallNet, small_data

from paper_lib import presets, runs
from paper_lib.experiments.watching import Watching
from paper_lib.runs import identity, methods

SETTINGS = SMALL.replace(lr=0.3)
METHODS = {"lowered": Watching(0.0, 0.4, 0.5), "averaged": Watching(0.0, 0.4, 1)}


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPER_RUNS", str(tmp_path))
    return tmp_path


def train(chosen=METHODS, settings=SETTINGS, seeds=(0, 1), net=SmallNet, dataset=None):
    study = presets.own(dataset or small_data(), net, lr=0.1, steps=40, seeds=seeds)
    return runs.train_methods(study, settings, chosen)


def in_this_process(monkeypatch):
    """Let jobs run here, where they can be watched and interrupted."""

    def one_by_one(function, jobs, slots, report):
        return [function(job, report) for job in jobs]

    monkeypatch.setattr(methods.parallel, "side_by_side", one_by_one)


def assert_same(some, others):
    for one, other in zip(some, others, strict=True):
        ours, theirs = one.to_arrays(), other.to_arrays()
        assert ours.keys() == theirs.keys()
        assert one.windows == other.windows and one.seed == other.seed
        for name, array in ours.items():
            assert np.array_equal(array, theirs[name]) and array.dtype == theirs[name].dtype


def test_runs_train_side_by_side_as_they_do_alone(own_folder):
    together = train(seeds=[3, 1])
    for path in own_folder.glob("*.npz"):
        path.unlink()
    alone = [train(seeds=[seed]) for seed in (3, 1)]
    assert_same(together["lowered"], [one["lowered"][0] for one in alone])
    assert_same(together["averaged"], [one["averaged"][0] for one in alone])


def test_a_presets_methods_train_on_its_dataset():
    study = presets.study("smoke", seeds=[0, 1], steps=5)
    chosen = {"lowered": METHODS["lowered"]}
    first, second = (run.weights for run in runs.train_methods(study, study.run, chosen)["lowered"])
    assert first.shape == second.shape and not np.array_equal(first, second)


def test_watched_runs_with_dropout_draw_what_the_recorded_ones_drew():
    def dropping():
        return SmallNet(dropout=0.5)

    plain = runs.train_seeds(SETTINGS, [0, 1], small_data(), dropping, progress=False)
    before = torch.get_rng_state()
    watched = train({"constant": Watching(0.5, 0.05, 1.0)}, net=dropping)["constant"]
    for one, run in zip(watched, plain, strict=True):
        assert np.array_equal(one.weights, run.at(40))
    assert torch.equal(torch.get_rng_state(), before)


def test_what_has_been_trained_is_loaded_as_it_was(monkeypatch):
    first = train()
    assert any(run.windows for run in first["lowered"])
    monkeypatch.setattr(methods.parallel, "side_by_side", None)  # calling it would fail
    again = train()
    assert_same(again["lowered"], first["lowered"])
    assert_same(again["averaged"], first["averaged"])


def test_only_missing_runs_are_trained(monkeypatch):
    train(seeds=[0])
    in_this_process(monkeypatch)
    trained, train_one = [], Watching.train

    def note(method, config, *rest):
        trained.append((method.factor, config.seed))
        return train_one(method, config, *rest)

    monkeypatch.setattr(Watching, "train", note)
    train(seeds=[0, 5])
    assert trained == [(0.5, 5), (1.0, 5)]


def test_everything_that_decides_is_part_of_the_key(monkeypatch):
    dataset, method = small_data(), Watching(0.5, 0.05, 0.5)
    others = [Watching(0.6, 0.05, 0.5), Watching(0.5, 0.06, 0.5), Watching(0.5, 0.05, 0.6)]
    others.append(dataclasses.replace(method))
    object.__setattr__(others[-1], "source", "another")
    paths = [methods.path(m, SETTINGS, dataset, SmallNet) for m in (method, *others)]
    paths.append(methods.path(method, SETTINGS.replace(seed=1), dataset, SmallNet))
    paths.append(methods.path(method, SETTINGS, dataset, lambda: SmallNet(dropout=0.1)))
    paths.append(methods.path(method, SETTINGS, small_data(121), SmallNet))
    monkeypatch.setattr(identity, "SOURCE", "another")
    paths.append(methods.path(method, SETTINGS, dataset, SmallNet))
    assert len(set(paths)) == len(paths)


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[: len(raw) // 2], lambda raw: raw.replace(raw[200:208], b"\1" * 8)]
)
def test_a_damaged_file_is_made_anew(damage):
    first = train(seeds=[0])
    path = methods.path(METHODS["lowered"], SETTINGS, small_data(), SmallNet)
    path.write_bytes(damage(path.read_bytes()))
    assert methods._read(path) is None
    assert_same(train(seeds=[0])["lowered"], first["lowered"])
    assert methods._read(path) is not None


@pytest.mark.parametrize("where", ["train", "savez"])
def test_an_interrupt_leaves_nothing_that_is_taken_for_finished(monkeypatch, own_folder, where):
    def interrupt(target, *args, **kwargs):
        if where == "savez":
            target.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        in_this_process(patch)
        patch.setattr(np if where == "savez" else Watching, where, interrupt)
        with pytest.raises(KeyboardInterrupt):
            train({"lowered": METHODS["lowered"]}, seeds=[0])
    assert not list(own_folder.rglob("*.npz"))
    assert len(train({"lowered": METHODS["lowered"]}, seeds=[0])["lowered"][0].weights) > 1
