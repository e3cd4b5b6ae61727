"""Configs: what is refused and how, overrides, branches, and the notation of snapshot windows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paper_lib.config import RunConfig, check_seeds, cut_record, describe, parse_record
from paper_lib.presets import PRESETS, study
from paper_lib.validate import ConfigError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, r"lr = 0.0 .* > 0"),
        ({"lr": float("nan")}, r"lr = nan .* finite"),
        ({"lr": "fast"}, r"lr = 'fast' has the wrong type: expected float"),
        ({"batch_size": 6.5}, r"batch_size = 6.5 has the wrong type: expected int"),
        ({"steps": True}, r"steps = True has the wrong type"),
        ({"momentum": 1.0}, r"momentum = 1.0 .* \[0, 1\)"),
        ({"momentum": -0.1}, r"momentum = -0.1"),
        ({"norm": "layer"}, r"norm = 'layer' .* batch, group or none"),
        ({"weight_decay": -1e-4}, r"weight_decay = -0.0001"),
        ({"steps": 100, "record": "90-101"}, r"record = '90-101' .* step 101 .* from 0 to 100"),
        ({"steps": 100, "record": "9-1"}, r"window '9-1' is empty"),
        ({"steps": 100, "record": "ten"}, r"record = 'ten' .* first-last"),
        ({"steps": 100, "checkpoints": (200,)}, r"checkpoints = \(200,\)"),
        ({"steps": 3, "schedule": (1.0, 0.5)}, r"length = 2 .* 3 steps"),
        ({"start": 5}, r"start = 5 .* branch"),
        ({"steps": 0}, r"steps = 0"),
        ({"schedule": "linaer"}, r"unknown schedule 'linaer'; did you mean 'linear'"),
        ({"batch_seed": -1}, r"batch_seed = -1 .* >= 0"),
        ({"data": "imagefolder"}, r"image_size = 0 .* size to load at"),
    ],
)
def test_a_run_that_cannot_work_is_refused_by_name_and_value(settings, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig(**settings)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: study("cifar"), r"unknown preset 'cifar'; did you mean 'cifar10'\? .*smoke, digits"),
        (lambda: study("digits", learning_rate=1), r"unknown setting 'learning_rate'.*\(allowed: .*lr"),
        (lambda: study("digits", momentun=0.9), r"did you mean 'momentum'"),
        (lambda: study("digits", seeds=(0, 1, 0)), r"seeds = \(0, 1, 0\) .* only once"),
        (lambda: study("digits", window=0), r"window = 0"),
        (lambda: study("digits", steps="1500"), r"steps = '1500' has the wrong type"),
        (lambda: check_seeds([]), r"at least one"),
        (lambda: check_seeds([-1]), r">= 0"),
        (lambda: check_seeds(3), r"seeds = 3 .* a sequence of integers"),
        (lambda: check_seeds([0.5]), r"seeds = \[0.5\] .* a sequence of integers"),
    ],
)
def test_a_study_that_cannot_work_is_refused(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


@pytest.mark.parametrize("preset", PRESETS)
def test_overrides_reach_the_run_and_the_study(preset):
    s = study(preset, lr=0.25, window=7, seeds=[5, 6])
    assert (s.run.lr, s.window, s.seeds) == (0.25, 7, (5, 6))
    assert s.stationary().lr == s.decayed().lr == 0.25
    assert study(preset, seeds=[]).seeds == PRESETS[preset].seeds


def test_changed_settings_are_named_and_keep_away_from_the_presets_results(monkeypatch):
    monkeypatch.setenv("PAPER_RESULTS", "/results")
    changed = study("digits", lr=0.5, window=16, seeds=[7])
    assert changed.label == "digits, ResNet-8, lr = 0.5, window = 16"
    assert (changed.preset, changed.results.name) == ("digits", f"digits-{changed.custom}")
    for same in (study("digits"), study("digits", seeds=[7]), study("digits", lr=1, seeds=(0, 1, 2))):
        assert (same.label, same.results.name) == ("digits, ResNet-8", "digits")


def test_a_shortened_warm_up_loses_only_the_snapshots_after_its_end():
    assert study("digits", steps=100).run.record == "0-50,75,100"


def test_windows_of_a_study():
    s = study("digits", steps=100, window=30, decay=20)
    assert (s.stationary().start, s.stationary().steps) == (100, 130)
    np.testing.assert_array_equal(s.stationary().snapshot_steps, np.arange(100, 131))
    assert (s.decayed().start, s.decayed().steps, s.decayed().schedule) == (100, 120, "linear")


def test_a_branch_inherits_settings_but_not_the_schedule_or_the_windows():
    run = RunConfig(lr=0.3, schedule="cosine", steps=50, record="0-50", checkpoints=(7,), perturbation=0.1)
    branch = run.branch(10, at=20, momentum=0.5)
    assert (branch.parent, branch.start, branch.steps) == (run, 20, 30)
    assert (branch.lr, branch.momentum, branch.schedule) == (0.3, 0.5, "constant")
    assert (branch.record, branch.checkpoints, branch.perturbation) == ("", (), 0.0)
    with pytest.raises(ConfigError, match="start = 60 .* ends at step 50"):
        run.branch(10, at=60)


def test_a_new_seed_reaches_the_ancestors_and_their_batches():
    branch = RunConfig(steps=50).branch(10).branch(5).replace(seed=3)
    assert branch.parent.parent.seed == branch.parent.seed == branch.seed == branch.stream == 3
    assert branch.replace(batch_seed=8).stream == 8


def test_dicts_keep_everything():
    run = RunConfig(steps=3, schedule=(1.0, 0.5, 0.1), checkpoints=(2,)).branch(4, batch_seed=1, momentum=0.9)
    assert RunConfig.from_dict(run.to_dict()) == run


@given(st.sets(st.integers(0, 200), max_size=40))
def test_describe_is_the_inverse_of_parse(steps):
    ordered = np.array(sorted(steps), dtype=np.int64)
    np.testing.assert_array_equal(parse_record(describe(ordered)), ordered)


@pytest.mark.parametrize("record", ["0-50,75-1500/25", "3", "0,7-8", ""])
def test_describe_writes_windows_as_people_do(record):
    assert describe(parse_record(record)) == record
    assert cut_record(record, 10**6) == record
