"""Averages of checkpoint files: the right weights, streamed, of every type, and refusals that name the file."""

import weakref
from collections import OrderedDict

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from paper_lib.averaging import checkpoints, schedules, vectors
from paper_lib.averaging.equivalence import to_average
from paper_lib.errors import ConfigError

STEPS = [100, 250, 300, 1000]


def states(n=4):
    """State dicts of several types: fractions of every width, a counter, a mask."""
    rng = np.random.default_rng(0)
    found = []
    for i in range(n):
        half, single, double = (torch.from_numpy(rng.normal(size=(3, 2))) for _ in range(3))
        row = {"half": half.bfloat16(), "single": single.float(), "double": double}
        found.append(row | {"bn.num_batches_tracked": torch.tensor(i), "mask": torch.tensor([True, i > 1])})
    return found


def write(folder, found, steps=STEPS, suffix=".pt", wrap=lambda state: state):
    """One file a state, named by step; returns the paths."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"net-step{step}{suffix}" for step in steps]
    for path, state in zip(paths, found, strict=True):
        checkpoints.save(state, path) if suffix == ".safetensors" else torch.save(wrap(state), path)
    return paths


# --- weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", schedules.COOLDOWNS)
@pytest.mark.parametrize("steps", [[0, 1], STEPS, [7, 8, 30, 31, 90]])
def test_weights_are_those_of_the_tail_sums_carried_to_the_checkpoints(schedule, steps):
    fine = (np.array(steps) - steps[0]) * (4000 // (steps[-1] - steps[0]))  # many steps between checkpoints
    expected = vectors.on_snapshots(to_average(schedules.factors(schedule, fine[-1])), fine)
    found = checkpoints.cooldown_weights(steps, schedule)
    assert found.sum() == pytest.approx(1, abs=1e-12) and found.min() >= 0
    np.testing.assert_allclose(found, expected, atol=3e-3)


def test_weights_by_hand():
    np.testing.assert_allclose(checkpoints.cooldown_weights([0, 10, 20], "linear"), [0.25, 0.5, 0.25])
    np.testing.assert_allclose(checkpoints.cooldown_weights([0, 10, 40], "linear"), [0.125, 0.5, 0.375])
    np.testing.assert_allclose(checkpoints.cooldown_weights([3, 5, 9], "constant"), [0, 0, 1])


# --- averages ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_an_average_of_all_types(tmp_path, suffix):
    found = states()
    write(tmp_path / "run", found, suffix=suffix)
    mean, weights = checkpoints.cooldown([tmp_path / "run"]), checkpoints.cooldown_weights(STEPS, "linear")
    for name, tolerance in (("half", 1e-2), ("single", 1e-6), ("double", 1e-14)):
        expected = sum(w * state[name].double() for w, state in zip(weights, found, strict=True))
        assert mean[name].dtype == found[0][name].dtype
        torch.testing.assert_close(mean[name].double(), expected, atol=tolerance, rtol=0)
    assert mean["bn.num_batches_tracked"] == 3 and mean["mask"].tolist() == [True, True], "those of the last"
    assert mean["mask"].dtype == torch.bool


def test_narrow_numbers_are_summed_in_wide_ones(tmp_path):
    write(
        tmp_path / "run", [{"w": torch.full((1,), 1 + i / 128, dtype=torch.bfloat16)} for i in range(101)], range(101)
    )
    mean = checkpoints.cooldown([tmp_path / "run"])
    assert mean["w"].item() == pytest.approx(1 + 50 / 128, abs=2**-8)


def test_an_average_of_equal_checkpoints_is_exact(tmp_path):
    write(tmp_path / "run", [states(1)[0]] * 4)
    for name, tensor in checkpoints.cooldown([tmp_path / "run"], "cosine").items():
        assert torch.equal(tensor, states(1)[0][name])


def test_shared_and_strided_tensors(tmp_path):
    weight = torch.arange(6.0).reshape(2, 3).T
    write(tmp_path / "run", [{"in": weight, "out": weight}] * 2, STEPS[:2])
    mean = checkpoints.cooldown([tmp_path / "run"])
    checkpoints.save(mean, tmp_path / "averaged.safetensors")
    assert torch.equal(safetensors.torch.load_file(tmp_path / "averaged.safetensors")["out"], weight)


def test_only_one_checkpoint_is_held_at_a_time_and_idle_ones_are_not_read(tmp_path, monkeypatch):
    write(tmp_path / "run", states(6), [0, 10, 20, 30, 40, 60])
    read, alive, load = [], [], checkpoints.load

    def watched(path):
        assert not any(ref() is not None for ref in alive), "an earlier checkpoint is still held"
        state = OrderedDict(load(path)[0])  # an ordinary dict cannot be watched
        read.append(path.stem)
        alive.append(weakref.ref(state))
        return state, None

    monkeypatch.setattr(checkpoints, "load", watched)
    with pytest.warns(UserWarning, match="step decays"):
        checkpoints.cooldown([tmp_path / "run"], "step")
    assert read == ["net-step30", "net-step40", "net-step60"], "the learning rate falls there"


# --- files -------------------------------------------------------------------------------------------------------


def test_files_are_ordered_by_their_number(tmp_path):
    write(tmp_path / "run", states(3), [900, 1000, 20])
    (tmp_path / "run" / "best.pt").touch()
    (tmp_path / "run" / ".net-step5.pt").touch()
    (tmp_path / "run" / "log5.txt").touch()
    steps = [checkpoints.step_of(path) for path in checkpoints.find([tmp_path / "run"])]
    assert steps == [20, 900, 1000]
    named = sorted((tmp_path / "run").glob("net*"))  # as a shell would
    assert checkpoints.find(named) == checkpoints.find([tmp_path / "run"])


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("ckpt_00120.pt", 120),
        ("resnet18-step-40-v2.pt", 40),
        ("epoch=3-step=1200.pt", 1200),
        ("resnet18_e7.pth", 7),
        ("checkpoint-500/model.safetensors", 500),
        ("epoch1_acc0.95.pt", 1),
        ("epoch2_acc0.91.pt", 2),
        ("Epoch-12-loss0.3.pt", 12),
        ("iter_4000_lr0.1.pt", 4000),
        ("iteration 300 v2.pt", 300),
        ("resnet18_ep05_0.88.pt", 5),
        ("model2_global_step1200.pt", 1200),
        ("E07-1e-3.pt", 7),
        ("epoch3_iter20.pt", 20),
        ("pkg5_best.pt", 5),
        ("1200steps.pt", 1200),
    ],
)
def test_the_step_of_a_file(tmp_path, name, step):
    assert checkpoints.step_of(tmp_path / "run" / name) == step


def test_steps_may_be_given(tmp_path):
    paths = write(tmp_path / "run", states(), suffix=".pth")
    expected = checkpoints.average(paths, checkpoints.cooldown_weights([1, 2, 3, 4], "linear"))
    assert torch.equal(checkpoints.cooldown(paths, steps=[1, 2, 3, 4])["single"], expected["single"])
    with pytest.raises(ConfigError, match="there are 4 checkpoints"):
        checkpoints.cooldown(paths, steps=[1, 2])


@pytest.mark.parametrize("key", checkpoints.CONTAINERS)
def test_a_state_dict_in_a_container_is_found(tmp_path, key):
    paths = write(tmp_path / "run", states(2), STEPS[:2], wrap=lambda s: {key: s, "epoch": 3, "optimizer": {"lr": 0.1}})
    state, found = checkpoints.load(paths[0])
    assert found == key and torch.equal(state["single"], states(1)[0]["single"])


def test_the_older_format_of_torch_is_read(tmp_path):
    torch.save(states(1)[0], tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert checkpoints.load(tmp_path / "old.pt")[0].keys() == states(1)[0].keys()


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s.pop("half"), "step300.pt lacks 'half', which .*step100.pt has"),
        (lambda s: s.update(more=torch.ones(1)), "step100.pt lacks 'more', which .*step300.pt has"),
        (lambda s: s.update(single=torch.ones(2, 3)), r"step300.pt: 'single' has shape \(2, 3\), but \(3, 2\) in"),
        (lambda s: s.update(single=torch.ones(3, 2, dtype=int)), "step300.pt: 'single' is torch.int64"),
        (lambda s: s["double"].fill_(float("inf")), "step300.pt: 'double' holds NaN or infinity"),
        (lambda s: s["half"][0].fill_(float("nan")), "step300.pt: 'half' holds NaN or infinity"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(tmp_path, spoil, message):
    found = states()
    spoil(found[2])
    write(tmp_path / "run", found)
    with pytest.raises(ConfigError, match=message):
        checkpoints.cooldown([tmp_path / "run"])


def test_files_that_cannot_be_read_are_refused_by_name(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    torch.save({"epoch": 3, "net": {}}, tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("cut.safetensors", "cut.pt", "notes.txt"):
        (tmp_path / name).write_bytes(b"not a checkpoint")
    whole = tmp_path / "half.pt"
    torch.save(states(1)[0], whole)
    whole.write_bytes(whole.read_bytes()[:-100])
    expected = {
        "module.pt": "other objects than tensors",
        "other.pt": "holds a dict with epoch, net: expected a state dict",
        "list.pt": "holds a list: expected",
        "cut.safetensors": "cannot be read",
        "cut.pt": "cannot be read|other objects",
        "half.pt": "cannot be read|other objects",
        "notes.txt": "its name must end in",
    }
    for name, message in expected.items():
        with pytest.raises(ConfigError, match=f"{name}.*({message})"):
            checkpoints.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        checkpoints.load(tmp_path / "absent.pt")


@pytest.mark.parametrize(
    ("steps", "message"),
    [([], "= 0 is not allowed"), ([5], "= 1 is not allowed"), ([1, 2, 2], "step 2 comes after step 2")],
)
def test_steps_that_make_no_cooldown_are_refused(steps, message):
    with pytest.raises(ConfigError, match=message):
        checkpoints.cooldown_weights(steps, "linear")


def test_unknown_schedules_and_names_without_steps_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'cosine'"):
        checkpoints.cooldown_weights([1, 2], "cosin")
    with pytest.raises(ConfigError, match="best.pt has no step number"):
        checkpoints.step_of(tmp_path.parent / "run" / "best.pt")


@pytest.mark.parametrize("name", ["resnet18_00120.pt", "acc0.95.pt", "lr1e-3_v2.pt", "time5_7.pt", "run2-v1/best.pt"])
def test_several_numbers_of_which_none_is_called_a_step_are_refused(tmp_path, name):
    with pytest.raises(ConfigError, match=f"{name} .*name it like step-1200.pt, or give steps="):
        checkpoints.step_of(tmp_path / "run" / name)


# --- BatchNorm ---------------------------------------------------------------------------------------------------


class Twice(nn.Module):
    """One BatchNorm layer used twice in a forward pass, after dropout."""

    def __init__(self):
        super().__init__()
        self.drop, self.norm, self.fixed = (
            nn.Dropout(0.5),
            nn.BatchNorm1d(2),
            nn.BatchNorm1d(2, track_running_stats=False),
        )

    def forward(self, x):
        return self.fixed(self.norm(3 * self.norm(self.drop(x)) + 1))


def test_a_ragged_last_batch_counts_for_what_it_is():
    x = torch.randn(100, 2, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 5.0])[:, None] + 2
    layer = nn.BatchNorm1d(2, momentum=0.3)
    checkpoints.recompute_statistics(layer, x.split(32))  # the last batch has 4
    torch.testing.assert_close(layer.running_mean, x.mean((0, 2)))
    variances = torch.stack([b.var((0, 2)) for b in x.split(32)])
    torch.testing.assert_close(layer.running_var, torch.tensor([0.32, 0.32, 0.32, 0.04]) @ variances)
    assert layer.momentum == 0.3 and layer.training and not layer._forward_pre_hooks


def test_statistics_of_a_layer_used_twice_and_the_modes_of_all():
    net = Twice()
    net.drop.eval()
    before = {m: m.training for m in net.modules()}
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(1))
    checkpoints.recompute_statistics(net, [(x[:40], None), (x[40:], None)])
    torch.testing.assert_close(net.norm.running_mean, (x.mean(0) + 1) / 2, atol=1e-5, rtol=0)
    assert {m: m.training for m in net.modules()} == before


def test_a_loader_without_batches_is_refused_and_a_network_without_batchnorm_needs_none():
    checkpoints.recompute_statistics(nn.Linear(2, 2), [])
    with pytest.raises(ConfigError, match="at least one batch"):
        checkpoints.recompute_statistics(Twice(), [])


def test_batches_that_are_not_inputs_first_are_refused():
    with pytest.raises(ConfigError, match="batch = 'dict' is not allowed: inputs, or a tuple that begins with them"):
        checkpoints.recompute_statistics(Twice(), [{"image": torch.zeros(4, 2)}])
