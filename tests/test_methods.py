"""Watched runs: the same side by side as alone, trained once, and never taken for finished when they are not."""

import numpy as np
import pytest
import torch
from helpers import SMALL, SmallNet, small_data

from paper_lib import runs
from paper_lib.experiments import methods
from paper_lib.experiments.methods import ScheduleFree, Watching
from paper_lib.runs import identity

SETTINGS = SMALL.replace(lr=0.3)
METHODS = {"lowered": Watching(0.0, 0.4, 0.5), "free": ScheduleFree(0.5, 0.9)}


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPER_RUNS", str(tmp_path))
    return tmp_path


@pytest.fixture
def three_cores(monkeypatch):
    monkeypatch.setattr(methods.files, "cpus", lambda: 3)


def train(chosen=METHODS, settings=SETTINGS, seeds=(0, 1), model=SmallNet):
    return methods.train_all(chosen, settings, seeds, small_data(), model)


def forbid_training(monkeypatch):
    monkeypatch.setattr(methods, "_backward", None)  # calling it would fail


def assert_same(some, others):
    for one, other in zip(some, others, strict=True):
        ours, theirs = one.to_arrays(), other.to_arrays()
        assert ours.keys() == theirs.keys() and one.windows == other.windows and one.seed == other.seed
        assert all(np.array_equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)


# --- side by side ------------------------------------------------------------------------------------------------


def test_runs_train_side_by_side_as_they_do_alone(three_cores):
    settings = SETTINGS.replace(width=1, steps=12, record="")
    together = train(settings=settings, seeds=[3, 1], model=None)
    for path in methods.path(METHODS["free"], settings, small_data()).parent.glob("*.npz"):
        path.unlink()
    alone = [train(settings=settings, seeds=[seed], model=None) for seed in (3, 1)]
    assert_same(together["lowered"], [one["lowered"][0] for one in alone])
    assert all(map(np.array_equal, together["free"], [one["free"][0] for one in alone]))


def test_watched_runs_with_dropout_draw_what_the_recorded_ones_drew(three_cores):
    def dropping():
        return SmallNet(dropout=0.5)

    plain = runs.train_seeds(SETTINGS, [0, 1], small_data(), dropping, progress=False)
    before = torch.get_rng_state()
    watched = train({"constant": Watching(0.5, 0.05, 1.0)}, model=dropping)["constant"]
    assert all(np.array_equal(some.weights, run.at(40)) for some, run in zip(watched, plain, strict=True))
    assert torch.equal(torch.get_rng_state(), before)


# --- kept --------------------------------------------------------------------------------------------------------


def test_what_has_been_trained_is_loaded_as_it_was(monkeypatch):
    first = train()
    assert any(run.windows for run in first["lowered"])
    forbid_training(monkeypatch)
    again = train()
    assert_same(again["lowered"], first["lowered"])
    assert all(map(np.array_equal, again["free"], first["free"]))


def test_only_missing_runs_are_trained(monkeypatch):
    train(seeds=[0])
    trained = []
    monkeypatch.setattr(methods, "schedule_free", lambda config, *rest: trained.append(config.seed) or np.zeros(1))
    train({"free": METHODS["free"]}, seeds=[0, 5])
    assert trained == [5]


def test_everything_that_decides_is_part_of_the_key(monkeypatch):
    dataset = small_data()
    keys = [
        methods.path(*of, dataset, SmallNet)
        for of in (
            (Watching(0.5, 0.05, 0.5), SETTINGS),
            (Watching(0.6, 0.05, 0.5), SETTINGS),
            (Watching(0.5, 0.06, 0.5), SETTINGS),
            (Watching(0.5, 0.05, 0.6), SETTINGS),
            (ScheduleFree(0.5, 0.9), SETTINGS),
            (ScheduleFree(0.6, 0.9), SETTINGS),
            (ScheduleFree(0.5, 0.8), SETTINGS),
            (ScheduleFree(0.5, 0.9), SETTINGS.replace(seed=1)),
        )
    ]
    assert len(set(keys)) == len(keys)
    method = ScheduleFree(0.5, 0.9)
    assert methods.path(method, SETTINGS, dataset, lambda: SmallNet(dropout=0.1)) not in keys
    assert methods.path(method, SETTINGS, small_data(121), SmallNet) not in keys
    upgraded = ScheduleFree(0.5, 0.9)
    object.__setattr__(upgraded, "package", "another")
    assert methods.path(upgraded, SETTINGS, dataset, SmallNet) not in keys
    for module, name in ((methods, "CODE"), (identity, "SOURCE")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, "another")
            assert methods.path(method, SETTINGS, dataset, SmallNet) not in keys


@pytest.mark.parametrize("damage", [lambda raw: raw[: len(raw) // 2], lambda raw: raw.replace(raw[200:208], b"\1" * 8)])
def test_a_damaged_file_is_made_anew(damage):
    first = train(seeds=[0])
    path = methods.path(METHODS["lowered"], SETTINGS, small_data(), SmallNet)
    path.write_bytes(damage(path.read_bytes()))
    assert methods.cache.read_arrays(path) is None
    assert_same(train(seeds=[0])["lowered"], first["lowered"])
    assert methods.cache.read_arrays(path) is not None


@pytest.mark.parametrize("name", ["schedule_free", "savez"])
def test_an_interrupt_leaves_nothing_that_is_taken_for_finished(monkeypatch, own_folder, name):
    def interrupt(target, *args, **kwargs):
        if name == "savez":
            target.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np if name == "savez" else methods, name, interrupt)
        with pytest.raises(KeyboardInterrupt):
            train({"free": METHODS["free"]}, seeds=[0])
    assert not list(own_folder.rglob("*.npz"))
    assert len(train({"free": METHODS["free"]}, seeds=[0])["free"][0]) > 1
