"""Reduced precision belongs to training alone: bfloat16 trains as float32 does, and no probe is
moved by it.
"""

import numpy as np
import pytest
import torch
from helpers import SMALL, SmallNet, small_data

from paper_lib import runs
from paper_lib.probing import probe
from paper_lib.training import flat

SEEDS = (0, 1, 2)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPER_RUNS", str(tmp_path / "runs"))


@pytest.fixture
def pair():
    """Runs in float32 and in bfloat16, per seed."""
    return [
        runs.train_seeds(
            SMALL.replace(precision=precision, steps=80, record="80"), SEEDS, small_data(), SmallNet
        )
        for precision in ("float32", "bfloat16")
    ]


def test_bfloat16_trains_within_the_spread_of_the_seeds(pair):
    exact, reduced = (np.array([run.loss[-20:].mean() for run in runs_]) for runs_ in pair)
    assert not np.array_equal(exact, reduced)
    assert np.abs(exact - reduced).max() < exact.std(ddof=1)
    assert pair[1][0].weights.dtype == np.float32  # the master weights


def test_probes_do_not_know_how_a_run_was_trained(pair):
    dataset = small_data()
    x, y = probe.fixed_batches(dataset, 4, 8, seed=0)
    weights = pair[0][0].at(80)
    found = [probe.losses(r[0].network(), weights, x, y) for r in pair]
    np.testing.assert_array_equal(*found)
    net = SmallNet().double()
    copy = flat.FlatModel(SmallNet())
    copy.weights.copy_(torch.from_numpy(np.array(weights)))
    net.load_state_dict(
        {name: value.double() for name, value in copy.module.state_dict().items()}, strict=False
    )
    exact = [
        torch.nn.functional.cross_entropy(net(xs.double()), ys).item()
        for xs, ys in zip(x, y, strict=True)
    ]
    np.testing.assert_allclose(found[0], exact, rtol=1e-5)  # bfloat16 or TF32 would be off by 1e-3


FLAGS = [
    (torch.backends.cudnn.conv, "fp32_precision"),
    (torch.backends.cuda.matmul, "fp32_precision"),
    (torch.backends.cudnn, "benchmark"),
    (torch.backends.cudnn, "deterministic"),
]


def numerics(*values):
    """The settings that decide numerics on a GPU, after setting them if values are given."""
    for (owner, name), value in zip(FLAGS, values, strict=False):
        setattr(owner, name, value)
    return [getattr(owner, name) for owner, name in FLAGS]


@pytest.mark.parametrize("users", ["none", "tf32", "ieee"])
def test_on_a_gpu_float32_is_exact_and_repeatable_and_settings_come_back(users):
    original = numerics()
    try:
        mine = numerics(users, users, True, False)
        with flat.exact_float32(torch.device("cuda")):
            assert numerics() == ["ieee", "ieee", False, True]
        assert numerics() == mine
        with flat.exact_float32(torch.device("cpu")):
            assert numerics() == mine
    finally:
        numerics(*original)
