"""Settings: what is refused, how, overrides, branches, studies of your own, notation, folders."""

import json
import types
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import SmallNet, small_data
from hypothesis import given
from hypothesis import strategies as st

from paper_lib import files
from paper_lib.config import RunConfig, check_seeds, describe, parse_record
from paper_lib.errors import ConfigError
from paper_lib.presets import PRESETS, STUDY_SETTINGS, own, study

INTEGER = "it must be a valid integer"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, r"lr = 0.0 is not allowed: it must be greater than 0"),
        ({"lr": "-1"}, r"lr = '-1' is not allowed: it must be greater than 0"),
        ({"lr": float("nan")}, r"lr = nan .* finite"),
        ({"lr": np.inf}, r"lr = inf .* finite"),
        ({"lr": "fast"}, r"lr = 'fast' is not allowed: it must be a valid number"),
        ({"lr": True}, r"lr = True .* not a truth value"),
        ({"lr": None}, r"lr = None .* a valid number"),
        ({"batch_size": 6.5}, rf"batch_size = 6.5 is not allowed: {INTEGER}"),
        ({"batch_size": "6.5"}, rf"batch_size = '6.5' is not allowed: {INTEGER}"),
        ({"batch_size": 0}, r"batch_size = 0 .*: it must be greater than or equal to 1"),
        ({"steps": True}, r"steps = True .* not a truth value"),
        ({"steps": np.zeros((99, 99))}, rf"steps = \[\[0.*\.\.\. is not allowed: {INTEGER}"),
        ({"momentum": 1.0}, r"momentum = 1.0 .* less than 1"),
        ({"momentum": -0.1}, r"momentum = -0.1 .* greater than or equal to 0"),
        ({"norm": "layer"}, r"norm = 'layer' .* 'batch', 'group' or 'none'"),
        ({"weight_decay": -1e-4}, r"weight_decay = -0.0001"),
        ({"compile": "maybe"}, r"compile = 'maybe' .* a valid boolean"),
        ({"steps": 100, "record": "90-101"}, r"record = '90-101' .* step 101 .* from 0 to 100"),
        ({"steps": 100, "record": "9-1"}, r"window '9-1' is empty"),
        ({"steps": 100, "record": "ten"}, r"record = 'ten' .* first-last"),
        ({"steps": 100, "checkpoints": (200,)}, r"checkpoints = \(200,\)"),
        ({"checkpoints": [1, "two"]}, rf"checkpoints.1 = 'two' is not allowed: {INTEGER}"),
        ({"steps": 3, "schedule": (1.0, 0.5)}, r"length = 2 .* 3 steps"),
        ({"start": 5}, r"start = 5 .* branch"),
        ({"steps": 0}, r"steps = 0"),
        ({"schedule": "linaer"}, r"unknown schedule 'linaer'; did you mean 'linear'"),
        ({"batch_seed": -1}, r"batch_seed = -1 .* equal to 0"),
        ({"data": "imagefolder"}, r"image_size = 0 .* size to load at"),
        ({"momentun": 0.9}, r"unknown setting 'momentun'; did you mean 'momentum'"),
        ({"parent": {"width": 0}, "start": 1}, r"parent.width = 0 .* equal to 1"),
        ({"steps": 2, "schedule": (1, float("nan"))}, r"schedule.1 = nan .* finite"),
        ({"steps": 2, "schedule": (-0.5, 1)}, r"schedule.0 = -0.5 .* equal to 0"),
        ({"steps": 2**63}, r"steps = 9223372036854775808 .* equal to 10"),
        ({"steps": 10**5000}, r"steps = <int too long to show> is not allowed"),
        ({"width": 10**6}, r"width = 1000000 .* equal to 65536"),
        ({"seed": 2**64}, r"seed = 18446744073709551616 .* equal to 1000000000000000000"),
        ({"model": "../x"}, r"model = '../x' is not allowed"),
        ({"record": "0-9999999999"}, r"record = '0-9999999999' .* up to step 10000000"),
        ({"record": "0-999999999"}, r"the window '0-999999999' is empty, or goes beyond step"),
        ({"record": "9" * 5000}, r"record = '9{196}\.\.\. is not allowed: write windows"),
        ({"schedule": "x" * 5000}, r"unknown schedule 'x{196}\.\.\. \(allowed"),
        ({"averages": "x" * 5000}, r"unknown average 'x{196}\.\.\.: write EMA"),
    ],
)
def test_a_run_that_cannot_work_is_refused_by_name_and_value(settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        RunConfig(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: study("cifar"), r"'cifar'; did you mean 'cifar10'\? .*digits, smoke"),
        (lambda: study("digits", learning_rate=1), r"setting 'learning_rate'.*allowed: .*lr"),
        (lambda: study("digits", momentun=0.9), r"did you mean 'momentum'"),
        (lambda: study("digits", seeds=(0, 1, 0)), r"seeds = \(0, 1, 0\) .* only once"),
        (lambda: study("digits", seeds=False), r"seeds = False"),
        (lambda: study("digits", seeds="one"), r"seeds.0 = 'one'"),
        (lambda: study("digits", seeds=-1), r"seeds.0 = -1"),
        (lambda: study("digits", window=0), r"window = 0"),
        (lambda: study("digits", window=10**9), r"window = 1000000000 .* equal to 10000000"),
        (lambda: study("digits", seeds=2**63), r"seeds.0 = 9223372036854775808"),
        (lambda: study(np.array(["digits", "smoke"])), r"unknown preset array"),
        (lambda: study(["digits"]), r"unknown preset \['digits'\]"),
        (lambda: study("digits", {1: 2}), r"unknown setting 1"),
        (lambda: study("digits", "[" * 10**5), r"overrides = '\[{196}\.\.\. is not allowed"),
        (lambda: study("digits", steps="1500.5"), r"steps = '1500.5'"),
        (lambda: study("digits", "{lr: 0.5}"), r"overrides = '{lr: 0.5}' .* write them as"),
        (lambda: study("digits", "[1]"), r"overrides"),
        (lambda: check_seeds([]), r"at least 1 item"),
        (lambda: check_seeds(None), r"seeds = None .* must be a list, such as"),
        (lambda: own(small_data(), SmallNet(), lr=1, steps=9), r"net = 'SmallNet' .* the function"),
        (lambda: own(small_data(), "SmallNet", lr=1, steps=9), r"net = 'str' .* the function"),
        (lambda: own(np.zeros(3), SmallNet, lr=1, steps=9), r"dataset = 'ndarray' .*from_tensors"),
        (lambda: own(small_data(), SmallNet, lr=1, steps=9, width=2), r"unknown .* 'width'"),
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


@pytest.mark.parametrize("seeds", [[], (), "", " ", None, np.array([], int)])
def test_no_seeds_are_the_presets_own(seeds):
    assert study("smoke", seeds=seeds).seeds == PRESETS["smoke"].seeds


@pytest.mark.parametrize(
    "seeds", [0, "0", [0], np.int64(0), np.array(0), np.array([0]), range(1), pd.Series([0])]
)
def test_zero_is_a_seed(seeds):
    """As `papermill -p seeds 0` passes it, or an array: not the preset's own."""
    assert study("smoke", seeds=seeds).seeds == check_seeds(seeds) == (0,)


def test_text_and_numpy_values_are_those_of_python():
    text = study("digits", '{"lr": "5e-1", "steps": "100"}', checkpoints="3, 5", compile="true")
    array = study("digits", lr=np.float32(0.5), steps=np.int64(100), checkpoints=np.array([3, 5]))
    assert text.run == array.run.replace(compile=True) and text.run.record == "0-50,75,100"
    assert {type(v) for v in vars(array.run).values()} <= {str, int, float, bool, tuple, type(None)}
    averages = RunConfig(averages="EMA 0.99, uniform 4").averages
    assert averages == ("EMA 0.99", "uniform 4")


def test_changed_settings_are_named_and_keep_away_from_the_presets_results(monkeypatch):
    monkeypatch.setenv("PAPER_RESULTS", "/results")
    changed = study("digits", lr=0.5, window=16, seeds=[7])
    assert changed.label == "digits, ResNet-8, lr = 0.5, window = 16"
    assert (changed.preset, changed.results.name) == ("digits", "digits-" + changed.custom)
    for settings in ({}, {"seeds": [7]}, {"lr": 1, "seeds": (0, 1, 2)}):
        same = study("digits", **settings)
        assert (same.label, same.results.name) == ("digits, ResNet-8", "digits")


def test_a_study_of_your_own_is_sized_by_steps_and_data():
    s, other = (own(small_data(), SmallNet, lr=lr, steps=400) for lr in (0.3, 0.2))
    assert (s.run.data, s.run.model, s.run.held_out, s.run.batch_size) == ("tensors", "own", 16, 13)
    assert (s.window, s.decay, s.probe_batches, s.eval_images) == (200, 200, 8, 104)
    assert s.run.record == "0-50,54-396/6,400" and s.label == "your network"
    assert s.dataset.sizes["train"] == 104 and s.net is SmallNet
    assert s.results.name.startswith("own-") and s.results != other.results
    assert s == own(small_data(), lambda: SmallNet(), lr="0.3", steps="400") and hash(s)
    given = own(small_data(), lr=0.3, steps=400, window=5, seeds=4, model="resnet14", batch_size=8)
    assert (given.window, given.seeds, given.run.model, given.net) == (5, (4,), "resnet14", None)
    assert "SmallNet" not in repr(s) and given.run.batch_size == 8


def test_windows_of_a_study():
    s = study("digits", steps=100, window=30, decay=20)
    assert (s.stationary().start, s.stationary().steps) == (100, 130)
    np.testing.assert_array_equal(s.stationary().snapshot_steps, np.arange(100, 131))
    assert (s.decayed().start, s.decayed().steps, s.decayed().schedule) == (100, 120, "linear")


def test_a_branch_inherits_settings_but_not_the_schedule_or_the_windows():
    run = RunConfig(lr=0.3, schedule="cosine", steps=50, record="0-50", perturbation=0.1)
    branch = run.replace(checkpoints=(7,)).branch(10, at=20, momentum=0.5)
    assert (branch.parent.checkpoints, branch.start, branch.steps) == ((7,), 20, 30)
    assert (branch.lr, branch.momentum, branch.schedule) == (0.3, 0.5, "constant")
    assert (branch.record, branch.checkpoints, branch.perturbation) == ("", (), 0.0)
    with pytest.raises(ConfigError, match="start = 60 .* ends at step 50"):
        run.branch(10, at=60)


def test_a_new_seed_reaches_the_ancestors_and_their_batches():
    branch = RunConfig(steps=50).branch(10).branch(5).replace(seed=3)
    assert branch.parent.parent.seed == branch.parent.seed == branch.seed == branch.stream == 3
    assert branch.replace(batch_seed=8).stream == 8


runs = st.builds(
    RunConfig,
    lr=st.floats(1e-6, 1e6),
    momentum=st.floats(0, 0.99),
    steps=st.just(3),
    schedule=st.sampled_from(["constant", "1-sqrt"]) | st.tuples(*[st.floats(0, 9)] * 3),
    record=st.sampled_from(["", "0-3", "0-2/2"]),
    checkpoints=st.lists(st.integers(0, 3), max_size=3),
    averages=st.sampled_from([(), ("EMA 0.9",), ("uniform 2", "two points 1")]),
    seed=st.integers(0, 10**18),
    batch_seed=st.none() | st.integers(0, 9),
    norm=st.sampled_from(["batch", "group", "none"]),
)
branches = st.builds(
    lambda run, n, at: run.branch(n, at=at), runs, st.integers(1, 9), st.integers(0, 3)
)


@given(runs | branches | branches.map(lambda run: run.branch(2)))
def test_json_keeps_everything(run):
    again = RunConfig(**json.loads(json.dumps(run.to_dict())))
    assert again == run and hash(again) == hash(run) and again.to_dict() == run.to_dict()


values = [np.float32(2), np.int8(-1), np.zeros(2), np.array("x"), "0-3", "EMA 2", 1j, {}, int]
values += [10**5000, 2**63, 2**64, -0.0, pd.Series([0]), range(3), b"1", "\ud800", "0-99999999"]
values += [{1, 2}, np.array([[1]]), np.array(False), Decimal("1e400"), (i for i in "1"), "uniform"]
anything = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
anything |= st.binary(max_size=2) | st.sampled_from(values)
fields = st.sampled_from([*RunConfig(steps=5).to_dict(), *STUDY_SETTINGS, "lrr"])


@given(st.dictionaries(fields, anything | st.lists(anything, max_size=3), max_size=4))
def test_any_settings_make_a_study_or_an_error_of_one_line(settings):
    for make in (lambda **s: study("smoke", **s), RunConfig):
        try:
            json.dumps(getattr(make(**settings), "run", RunConfig()).to_dict(), allow_nan=False)
        except ConfigError as error:
            assert len(str(error).splitlines()) == 1


@given(st.sets(st.integers(0, 200), max_size=40))
def test_describe_is_the_inverse_of_parse(steps):
    ordered = np.array(sorted(steps), dtype=np.int64)
    np.testing.assert_array_equal(parse_record(describe(ordered)), ordered)


@pytest.mark.parametrize("record", ["0-50,75-1500/25", "3", "0,7-8", ""])
def test_describe_writes_windows_as_people_do(record):
    assert describe(parse_record(record)) == record


def test_windows_may_overlap():
    assert parse_record("5-9,0-20/10,7").tolist() == [0, 5, 6, 7, 8, 9, 10, 20]


CHECKOUT = Path(__file__).resolve().parents[1]


def test_things_are_kept_in_the_working_directory_or_its_checkout(tmp_path, monkeypatch):
    for kind in ("data", "results", "runs"):
        monkeypatch.delenv(f"PAPER_{kind.upper()}", raising=False)
    other, mine = tmp_path / "clone", tmp_path / "mine"
    for folder in (other / "notebooks", mine):
        folder.mkdir(parents=True)
    (other / "pyproject.toml").write_text((CHECKOUT / "pyproject.toml").read_text())
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "other"\n')
    tops = {CHECKOUT / "notebooks": CHECKOUT, other / "notebooks": other}
    for here, top in {**tops, mine: mine, tmp_path: tmp_path}.items():
        monkeypatch.chdir(here)
        assert files.folder("runs") == top / "runs"
    monkeypatch.setenv("PAPER_RUNS", "/elsewhere")
    assert files.folder("runs") == Path("/elsewhere")
    monkeypatch.setenv("PAPER_RUNS", "/dev/null")
    with pytest.raises(ConfigError, match="PAPER_RUNS = '/dev/null' .* must name a folder"):
        files.folder("runs")


def test_a_study_needs_no_torch_and_takes_any_function_as_a_network():
    facts = {"name": "x", "sizes": {"train": 9, "held": 1}, "batch": None, "shape": (2,)}
    stand_in = types.SimpleNamespace(**facts)
    assert own(stand_in, len, lr=1, steps=2).window == 60
