"""Averages of checkpoint files: weights, types, streaming, and refusals that name the file."""

import weakref
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from paper_lib.averaging import cooldown, schedules, vectors
from paper_lib.averaging.equivalence import to_average
from paper_lib.errors import ConfigError

STEPS = [100, 250, 300, 1000]


def states(n=4):
    """State dicts of several types: fractions of every width, a counter, a mask."""
    rng = np.random.default_rng(0)
    found = []
    for i in range(n):
        half, single, double = (torch.from_numpy(rng.normal(size=(3, 2))) for _ in range(3))
        fractions = {"half": half.bfloat16(), "single": single.float(), "double": double}
        counter, mask = torch.tensor(i), torch.tensor([True, i > 1])
        found.append(fractions | {"bn.num_batches_tracked": counter, "mask": mask})
    return found


def write(folder, found, steps=STEPS, suffix=".pt"):
    """One file a state, named by step; returns the paths."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"net-step{step}{suffix}" for step in steps]
    for path, state in zip(paths, found, strict=True):
        cooldown.save(state, path) if suffix == ".safetensors" else torch.save(state, path)
    return paths


# --- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", schedules.COOLDOWNS)
@pytest.mark.parametrize("steps", [[0, 1], STEPS, [7, 8, 30, 31, 90]])
def test_weights_are_those_of_the_tail_sums_carried_to_the_checkpoints(schedule, steps):
    many = 4000 // (steps[-1] - steps[0])  # steps of the run to one of these
    fine = (np.array(steps) - steps[0]) * many
    expected = vectors.on_snapshots(to_average(schedules.factors(schedule, fine[-1])), fine)
    found = cooldown.step_weights(steps, schedule)
    assert found.sum() == pytest.approx(1, abs=1e-12) and found.min() >= 0
    np.testing.assert_allclose(found, expected, atol=3e-3)


def test_weights_by_hand():
    np.testing.assert_allclose(cooldown.step_weights([0, 10, 20], "linear"), [0.25, 0.5, 0.25])
    np.testing.assert_allclose(cooldown.step_weights([0, 10, 40], "linear"), [0.125, 0.5, 0.375])
    np.testing.assert_allclose(cooldown.step_weights([3, 5, 9], "constant"), [0, 0, 1])


# --- averages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_an_average_of_all_types(tmp_path, suffix):
    found, weights = states(), cooldown.step_weights(STEPS, "linear")
    mean = cooldown.emulate(write(tmp_path, found, suffix=suffix))
    for name, tolerance in (("half", 1e-2), ("single", 1e-6), ("double", 1e-14)):
        expected = sum(w * state[name].double() for w, state in zip(weights, found, strict=True))
        assert mean[name].dtype == found[0][name].dtype
        torch.testing.assert_close(mean[name].double(), expected, atol=tolerance, rtol=0)
    for name in ("bn.num_batches_tracked", "mask"):
        torch.testing.assert_close(mean[name], found[-1][name])


def test_narrow_numbers_are_summed_in_wide_ones(tmp_path):
    found = [{"w": torch.full((1,), 1 + i / 128, dtype=torch.bfloat16)} for i in range(101)]
    mean = cooldown.emulate(write(tmp_path, found, range(101)))
    assert mean["w"].item() == pytest.approx(1 + 50 / 128, abs=2**-8)


def test_an_average_of_equal_checkpoints_is_exact(tmp_path):
    paths = write(tmp_path, [states(1)[0]] * 4)
    for name, tensor in cooldown.emulate(paths, "cosine").items():
        assert torch.equal(tensor, states(1)[0][name])


def test_shared_and_strided_tensors(tmp_path):
    weight = torch.arange(6.0).reshape(2, 3).T
    mean = cooldown.emulate(write(tmp_path, [{"in": weight, "out": weight}] * 2, STEPS[:2]))
    cooldown.save(mean, tmp_path / "averaged.safetensors")
    saved = safetensors.torch.load_file(tmp_path / "averaged.safetensors")
    assert torch.equal(saved["in"], weight) and torch.equal(saved["out"], weight)


def test_only_one_checkpoint_is_held_at_a_time_and_idle_ones_are_not_read(tmp_path, monkeypatch):
    write(tmp_path / "run", states(6), [0, 10, 20, 30, 40, 60])
    read, alive, load = [], [], cooldown.load

    def watched(path):
        assert not any(ref() is not None for ref in alive), "an earlier checkpoint is still held"
        state = OrderedDict(load(path)[0])  # an ordinary dict cannot be watched
        read.append(path.stem)
        alive.append(weakref.ref(state))
        return state, None

    monkeypatch.setattr(cooldown, "load", watched)
    with pytest.warns(UserWarning, match="step decays"):
        cooldown.emulate([tmp_path / "run"], "step")
    assert read == ["net-step30", "net-step40", "net-step60"], "the learning rate falls there"


def test_what_torch_itself_puts_into_state_dicts(tmp_path):
    class Scaled(nn.Linear):
        def get_extra_state(self):
            return {"amax": float(self.weight.detach().amax())}

        def set_extra_state(self, state):
            self.amax = state["amax"]

    nets = [nn.ModuleDict({"scaled": Scaled(2, 2)}) for _ in range(3)]
    for net in nets:
        net.register_buffer("mask", torch.full((4, 4), float("-inf")).triu(1))
        net.register_buffer("narrow", torch.ones(4).to(torch.float8_e4m3fn))
    mean = cooldown.emulate(write(tmp_path, [net.state_dict() for net in nets], [1, 2, 3]))
    nets[0].load_state_dict(mean)
    assert torch.equal(nets[0].mask, nets[1].mask), "a constant, infinite or not, stays"
    assert nets[0].narrow.dtype == torch.float8_e4m3fn
    assert nets[0]["scaled"].amax == float(nets[2]["scaled"].weight.detach().amax())
    cooldown.save(mean, tmp_path / "whole.pt")
    assert cooldown.load(tmp_path / "whole.pt")[0].keys() == mean.keys()
    with pytest.raises(ConfigError, match="scaled._extra_state.*fit into .pt and .pth only"):
        cooldown.save(mean, tmp_path / "whole.safetensors")
    assert not (tmp_path / "whole.safetensors").exists()


# --- files ---------------------------------------------------------------------------------------


def test_files_are_ordered_by_their_number(tmp_path):
    write(tmp_path / "run", states(3), [900, 1000, 20])
    (tmp_path / "run" / "best.pt").touch()
    (tmp_path / "run" / ".net-step5.pt").touch()
    (tmp_path / "run" / "log5.txt").touch()
    steps = [cooldown.step_of(path) for path in cooldown.find([tmp_path / "run"])]
    assert steps == [20, 900, 1000]
    named = sorted((tmp_path / "run").glob("net*"))  # as a shell would
    assert cooldown.find(named) == cooldown.find([tmp_path / "run"])


STEP_OF = {
    "ckpt_00120.pt": 120,
    "resnet18-step-40-v2.pt": 40,
    "epoch=3-step=1200.pt": 1200,
    "resnet18_e7.pth": 7,
    "checkpoint-500/model.safetensors": 500,
    "epoch1_acc0.95.pt": 1,
    "Epoch-12-loss0.3.pt": 12,
    "iter_4000_lr0.1.pt": 4000,
    "iteration 300 v2.pt": 300,
    "resnet18_ep05_0.88.pt": 5,
    "model2_global_step1200.pt": 1200,
    "E07-1e-3.pt": 7,
    "epoch3_iter20.pt": 20,
    "pkg5_best.pt": 5,
    "1200steps.pt": 1200,
}


@pytest.mark.parametrize("name", STEP_OF)
def test_the_step_of_a_file(name):
    assert cooldown.step_of(Path("run") / name) == STEP_OF[name]


def test_steps_may_be_given(tmp_path):
    paths = write(tmp_path / "run", states(), suffix=".pth")
    expected = cooldown.average(paths, cooldown.step_weights([1, 2, 3, 4], "linear"))
    assert torch.equal(cooldown.emulate(paths, steps=[1, 2, 3, 4])["single"], expected["single"])
    with pytest.raises(ConfigError, match="there are 4 checkpoints"):
        cooldown.emulate(paths, steps=[1, 2])


@pytest.mark.parametrize("key", cooldown.CONTAINERS)
def test_a_state_dict_in_a_container_is_found(tmp_path, key):
    path = tmp_path / "step1.pt"
    torch.save({key: states(1)[0], "epoch": 3, "optimizer": {"lr": 0.1}}, path)
    state, found = cooldown.load(path)
    assert found == key and torch.equal(state["single"], states(1)[0]["single"])


def test_the_older_format_of_torch_is_read(tmp_path):
    torch.save(states(1)[0], tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert cooldown.load(tmp_path / "old.pt")[0].keys() == states(1)[0].keys()


# --- refusals ------------------------------------------------------------------------------------


FLOAT8 = torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("half", None, "step300.pt lacks 'half', which .*step100.pt has"),
        ("more", torch.ones(1), "step100.pt lacks 'more', which .*step300.pt has"),
        ("single", torch.ones(2, 3), r"step300.pt: 'single' has shape \(2, 3\), but \(3, 2\) in"),
        ("single", torch.ones(3, 2, dtype=int), "step300.pt: 'single' is torch.int64"),
        ("double", torch.full((3, 2), float("inf")), "step300.pt: 'double' holds NaN or infinity"),
        ("half", torch.full((3, 2), float("nan")), "step300.pt: 'half' holds NaN or infinity"),
        ("q", torch.ones(4).to(FLOAT8), "step300.pt: 'q' is torch.float8_e4m3fn, too narrow"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(tmp_path, name, value, message):
    found = [{**state, "q": torch.zeros(4).to(FLOAT8)} for state in states()]
    found[2].pop(name, None)
    found[2] |= {} if value is None else {name: value}
    with pytest.raises(ConfigError, match=message):
        cooldown.emulate(write(tmp_path, found))


@pytest.mark.parametrize(
    ("value", "message"),
    [("nan", "step100.pt: 'w' holds NaN"), ("inf", "step250.pt: 'w' is finite, but not in")],
)
def test_a_first_checkpoint_without_numbers_is_refused(tmp_path, value, message):
    paths = write(tmp_path, [{"w": torch.full((2,), float(v))} for v in (value, 1, 1, 1)])
    with pytest.raises(ConfigError, match=message):
        cooldown.emulate(paths)


def test_files_that_cannot_be_read_are_refused_by_name(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    torch.save({"epoch": 3, "net": {}}, tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("cut.safetensors", "cut.pt", "notes.txt"):
        (tmp_path / name).write_bytes(b"not a checkpoint")
    half = tmp_path / "half.pt"
    torch.save(states(1)[0], half)
    half.write_bytes(half.read_bytes()[:-100])
    expected = {
        "module.pt": "other objects than tensors",
        "other.pt": r"holds \['epoch', 'net'\]: expected a state dict",
        "list.pt": "holds 'list': expected",
        "cut.safetensors": "cannot be read",
        "cut.pt": "cannot be read|other objects",
        "half.pt": "cannot be read|other objects",
        "notes.txt": "its name must end in",
    }
    for name, message in expected.items():
        with pytest.raises(ConfigError, match=f"{name}.*({message})"):
            cooldown.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        cooldown.load(tmp_path / "absent.pt")


@pytest.mark.parametrize(
    ("steps", "schedule", "message"),
    [
        ([], "linear", "= 0 is not allowed"),
        ([5], "linear", "= 1 is not allowed"),
        ([1, 2, 2], "linear", "step 2 comes after step 2"),
        ([1, 2], "cosin", "did you mean 'cosine'"),
    ],
)
def test_what_makes_no_cooldown_is_refused(steps, schedule, message):
    with pytest.raises(ConfigError, match=message):
        cooldown.step_weights(steps, schedule)


NO_STEP = "best.pt resnet18_00120.pt acc0.95.pt lr1e-3_v2.pt time5_7.pt run2-v1/best.pt"


@pytest.mark.parametrize("name", NO_STEP.split())
def test_names_without_a_step_or_with_several_numbers_are_refused(name):
    advice = "name it like step-1200.pt, or give steps="
    with pytest.raises(ConfigError, match=f"{name} has (no|several) .*{advice}"):
        cooldown.step_of(Path("run") / name)
