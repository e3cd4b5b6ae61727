"""Averages of checkpoint files: weights, types, streaming, and refusals that name the file."""

import os
import pickle
import weakref
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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
    with pytest.raises(ConfigError, match="scaled._extra_state.*does not fit .* fits into .pt"):
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
    "step5e3.pt": 5000,
    "step-1E+04.pt": 10000,
    "2e4.pt": 20000,
    "ckpt_10k.pt": 10000,
    "model.step.1200.pt": 1200,
    f"step{10**40 + 1}.pt": 10**40 + 1,
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
        (
            "single",
            torch.ones(2, 3),
            r"step300.pt: 'single' is real of shape \(2, 3\), but real of",
        ),
        (
            "single",
            torch.ones(3, 2, dtype=int),
            r"step300.pt: 'single' is integer of shape \(3, 2\)",
        ),
        ("single", torch.ones(3, 2, dtype=torch.complex64), "step300.pt: 'single' is complex of"),
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
    [("nan", "step100.pt: 'w' holds NaN"), ("inf", "step250.pt: 'w' is finite, but not its mean")],
)
def test_a_first_checkpoint_without_numbers_is_refused(tmp_path, value, message):
    paths = write(tmp_path, [{"w": torch.full((2,), float(v))} for v in (value, 1, 1, 1)])
    with pytest.raises(ConfigError, match=message):
        cooldown.emulate(paths)


class Command:
    """A pickle of a command, as an attacker would send it."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def raw(content):
    return lambda path: path.write_bytes(content)


def saved(content, **settings):
    return lambda path: torch.save(content, path, **settings)


def cut(path, kept=-100):
    torch.save(states(1)[0], path)
    path.write_bytes(path.read_bytes()[:kept])


def flipped(path):
    """One bit of one weight: the file has the same length, and another number."""
    torch.save({"w": torch.zeros(1000)}, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def link(target):
    return lambda path: path.symlink_to(target)


BROKEN = {
    "a module": ("step1.pt", saved(nn.Linear(2, 2)), "other objects than tensors"),
    "a command": ("step1.pt", saved({"w": torch.ones(2), "x": Command()}), "other objects than"),
    "a plain pickle": ("step1.pt", raw(pickle.dumps(Command())), "other objects than tensors"),
    "an old pickle": ("step1.pt", saved(Command(), _use_new_zipfile_serialization=False), "other"),
    "a list": ("step1.pt", saved([1, 2]), "holds 'list': expected a state dict"),
    "a tensor": ("step1.pt", saved(torch.ones(2)), "holds 'Tensor': expected"),
    "other keys": (
        "step1.pt",
        saved({"epoch": 3, "net": {}}),
        r"holds \['epoch', 'net'\]: expected",
    ),
    "two states": ("step1.pt", saved({k: states(1)[0] for k in ("model", "module")}), "holds"),
    "numbers as names": ("step1.pt", saved({3: torch.ones(2)}), r"holds \[3\]: expected"),
    "a number": ("step1.pt", saved({"w": torch.ones(2), "lr": 0.1}), "expected a state dict"),
    "empty": ("step1.pt", raw(b""), "cannot be read"),
    "text": ("step1.pt", raw(b"hello"), "cannot be read"),
    "a dot": ("step1.pt", raw(b"."), "cannot be read"),
    "zeros": ("step1.pt", raw(b"\0" * 999), "cannot be read"),
    "an empty zip": ("step1.pt", raw(b"PK\5\6" + b"\0" * 18), "cannot be read"),
    "cut": ("step1.pt", cut, "cannot be read"),
    "cut early": ("step1.pt", lambda path: cut(path, 300), "cannot be read|or is damaged"),
    "a flipped bit": ("step1.pt", flipped, "cannot be read: .*does not match its checksum"),
    "text as safetensors": ("step1.safetensors", raw(b"not a checkpoint"), "cannot be read"),
    "empty safetensors": ("step1.safetensors", raw(b""), "cannot be read"),
    "torch's format": ("step1.safetensors", cut, "cannot be read"),
    "a folder": ("step1.pt", Path.mkdir, "it is no plain file"),
    "a pipe": ("step1.pt", os.mkfifo, "it is no plain file"),
    "a device": ("step1.pt", link("/dev/zero"), "it is no plain file"),
    "a broken link": ("step1.pt", link("absent"), "there is no such file"),
    "a link to itself": ("step1.pt", link("step1.pt"), "there is no such file"),
    "another suffix": ("step1.txt", raw(b"x"), "its name must end in"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_cannot_be_read_is_refused_by_name_and_never_executed(
    case, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    name, make, message = BROKEN[case]
    make(tmp_path / name)
    torch.save({"w": torch.ones(2)}, tmp_path / "step9.pt")
    with pytest.raises(ConfigError, match=f"{name}.*({message})") as caught:
        cooldown.load(tmp_path / name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    with pytest.raises(ConfigError, match=f"{name}.*({message})"):
        cooldown.emulate([tmp_path / name, tmp_path / "step9.pt"], steps=[1, 9])
    assert not Path("executed").exists()


ODD = {
    "sparse": lambda: torch.eye(2).to_sparse(),
    "compressed": lambda: torch.eye(2).to_sparse_csr(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8),
    "meta": lambda: torch.empty(2, device="meta"),
    "packed": lambda: torch.ones(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
}


@pytest.mark.filterwarnings("ignore")  # torch's own, of such tensors
@pytest.mark.parametrize("kind", ODD)
def test_tensors_that_hold_no_plain_numbers_are_refused(kind, tmp_path):
    paths = write(tmp_path, [{"w": torch.ones(2), "odd": ODD[kind]()}] * 2, [1, 2])
    with pytest.raises(ConfigError, match=r"step1.pt holds \['w', 'odd'\]: expected .* of dense"):
        cooldown.emulate(paths)


@pytest.mark.parametrize(
    "value",
    [torch.tensor(2.0), torch.ones(0, 3), torch.ones(1).expand(3, 4), torch.ones(2).cfloat()],
)
def test_tensors_of_any_shape_and_stride_are_averaged(value, tmp_path):
    mean = cooldown.emulate(write(tmp_path, [{"w": i * value} for i in range(4)]))
    weights = cooldown.step_weights(STEPS, "linear")
    torch.testing.assert_close(mean["w"], value * sum(i * w for i, w in enumerate(weights)))


def test_numbers_too_large_to_be_averaged_are_refused_even_at_the_end(tmp_path):
    paths = write(tmp_path, [{"w": torch.tensor([3e38 * (-1) ** i])} for i in range(2)], [1, 2])
    with pytest.raises(ConfigError, match="step2.pt: 'w' is finite, but not its mean"):
        cooldown.emulate(paths)


def test_a_folder_among_checkpoints_is_refused_where_it_would_have_no_weight(tmp_path):
    write(tmp_path, states())
    (tmp_path / "net-step9.pt").mkdir()
    with pytest.raises(ConfigError, match="net-step9.pt' is not allowed: .* no plain file"):
        cooldown.emulate([tmp_path], "constant")


@pytest.mark.parametrize(
    ("state", "suffix"),
    [
        ({"w": torch.ones(2, dtype=torch.complex128)}, ".safetensors"),
        ({"w\ud800": torch.ones(2)}, ".safetensors"),
        ({"w": lambda: None}, ".pt"),
    ],
)
def test_what_cannot_be_written_leaves_no_file(state, suffix, tmp_path):
    with pytest.raises(ConfigError, match=f"averaged{suffix} cannot be written: .* disk full"):
        cooldown.save(state, tmp_path / f"averaged{suffix}")
    assert not list(tmp_path.iterdir())


damage = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=4)


@settings(max_examples=60)
@given(st.sampled_from([*cooldown.SUFFIXES, ".old.pt"]), damage, st.integers(0, 3000) | st.none())
def test_whatever_happens_to_a_file_it_is_read_or_refused(tmp_path_factory, suffix, bytes_, length):
    path = tmp_path_factory.mktemp("damage") / f"step1{suffix}"
    state = {"w": torch.zeros(20), "n": torch.tensor(1)}
    new = suffix != ".old.pt"
    cooldown.save(state, path) if new else saved(state, _use_new_zipfile_serialization=False)(path)
    content = bytearray(path.read_bytes())
    for at, value in bytes_:
        content[at % len(content)] = value
    path.write_bytes(content[:length])
    try:
        found = cooldown.load(path)[0]
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert suffix not in (".pt", ".pth") or torch.equal(found["w"], state["w"])


shapes = st.lists(st.integers(0, 3), max_size=2)
types = st.sampled_from(
    [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, FLOAT8]
)
tensors = st.builds(
    lambda shape, value, dtype: torch.full(shape, value).to(dtype),
    shapes,
    st.floats(width=32),
    types | st.just(torch.complex64),
)
plain = st.none() | st.integers() | st.text(max_size=2) | st.lists(st.integers(), max_size=2)
names = st.sampled_from(["w", "b", "x._extra_state"]) | st.text(max_size=2) | st.integers(0, 2)
dicts = st.dictionaries(names, tensors, max_size=2) | st.dictionaries(
    names, tensors | plain, max_size=2
)


@settings(max_examples=60)
@given(st.lists(dicts | st.dictionaries(st.sampled_from(cooldown.CONTAINERS), dicts), max_size=3))
def test_any_states_make_an_average_or_an_error_of_one_line(tmp_path_factory, found):
    folder = tmp_path_factory.mktemp("states")
    for step, state in enumerate(found):
        torch.save(state, folder / f"step{step}.pt")
    try:
        mean = cooldown.emulate([folder])
        cooldown.save(mean, folder / "mean.safetensors")
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1
    else:
        averaged = [
            v for v in mean.values() if isinstance(v, torch.Tensor) and v.is_floating_point()
        ]
        assert not any(value.float().isnan().any() for value in averaged)


@pytest.mark.parametrize(
    ("steps", "schedule", "message"),
    [
        ([], "linear", "= 0 is not allowed"),
        ([5], "linear", "= 1 is not allowed"),
        ([1, 2, 2], "linear", "step 2 comes after step 2"),
        ([3, 2, 5], "linear", "step 2 comes after step 3"),
        ([1, float("nan"), 3], "linear", "step nan comes after step 1"),
        ([float("nan"), 1], "linear", "step 1 comes after step nan"),
        ([1, 2, float("inf")], "linear", "step inf comes after step 2"),
        ([2**60, 2**60 + 1], "linear", "each must be later"),
        ([1, 2], "cosin", "did you mean 'cosine'"),
    ],
)
def test_what_makes_no_cooldown_is_refused(steps, schedule, message):
    with pytest.raises(ConfigError, match=message):
        cooldown.step_weights(steps, schedule)


NO_STEP = """best.pt resnet18_00120.pt acc0.95.pt lr1e-3_v2.pt time5_7.pt run2-v1/best.pt step1.5.pt
epoch2,5.pt step1,000.pt ckpt_4e3a.pt"""


@pytest.mark.parametrize("name", NO_STEP.split())
def test_names_without_a_step_or_with_several_numbers_are_refused(name):
    advice = "name it like step-1200.pt, or give steps="
    with pytest.raises(ConfigError, match=f"{name} has (no|several) .*{advice}"):
        cooldown.step_of(Path("run") / name)
