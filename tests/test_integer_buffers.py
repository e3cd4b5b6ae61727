"""Buffers that are not floating-point: part of what a killed run goes on from, and of branches."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import SMALL, SmallNet, small_data

from paper_lib import runs
from paper_lib.errors import ConfigError
from paper_lib.training import loop
from paper_lib.training.flat import FlatModel

CONFIG = SMALL.replace(steps=30, record="0-30", checkpoints=(20,), model="own")


class Counting(SmallNet):
    """Goes another way after step 20, and wherever its counters say something else."""

    def __init__(self):
        super().__init__()
        self.register_buffer("flags", torch.zeros(3, dtype=torch.bool))  # not a multiple of 8 bytes
        self.register_buffer("table", torch.arange(3).expand(2, 3))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("short", torch.zeros(2, dtype=torch.int16), persistent=False)

    def forward(self, x):
        if self.training:
            self.count += 1
            self.short.add_(1)
            self.flags[self.count % 3] = self.count > 20
        power = self.flags.sum() + self.short[0] / 50
        return super().forward(x) * (1 + power) + self.table[0] * 0


class Replacing(Counting):
    def forward(self, x):
        self.count = self.count + 1
        return super().forward(x)


class Fixed(SmallNet):
    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.arange(3))


JOB = """
import os, signal
from helpers import small_data
from paper_lib import runs
from paper_lib.training import loop
from test_integer_buffers import CONFIG, Counting
loop.CHUNK, loop.RESUME_EVERY_S, loop.RESUME_SHARE = 5, 0.0, float("inf")
seen = []
def report(steps, loss, lr):
    seen.append(steps)
    if sum(seen) == 25:
        os.kill(os.getpid(), signal.SIGKILL)
runs.obtain(CONFIG, small_data(), Counting, report)
"""


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPER_RUNS", str(tmp_path / "runs"))


def test_a_killed_run_goes_on_with_its_counters_to_the_same_bits(tmp_path, monkeypatch):
    whole = runs.obtain(CONFIG, small_data(), Counting)
    monkeypatch.setenv("PAPER_RUNS", str(tmp_path / "killed"))
    here = os.path.dirname(__file__)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([here, *sys.path])}
    killed = subprocess.run([sys.executable, "-c", JOB], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    done = []
    resumed = runs.obtain(CONFIG, small_data(), Counting, lambda steps, *_: done.append(steps))
    assert resumed.folder != whole.folder and done[0] in (20, 25)  # it did not start again
    for name in ("weights", "buffers", "loss"):
        np.testing.assert_array_equal(getattr(resumed, name), getattr(whole, name))
    assert resumed.state()["integers"].any()
    np.testing.assert_array_equal(resumed.state()["integers"], whole.state()["integers"])


def test_a_branch_goes_on_with_its_parents_counters(monkeypatch):
    whole = runs.obtain(CONFIG, small_data(), Counting)
    branch = runs.obtain(CONFIG.branch(10, at=20, record="30"), small_data(), Counting)
    np.testing.assert_array_equal(branch.at(30), whole.at(30))
    with pytest.raises(
        runs.SnapshotError, match="no integer buffer was kept at step 10 .*: add 10"
    ):
        whole.state(10)
    fixed = runs.obtain(CONFIG, small_data(), Fixed)
    assert fixed.state(10)["weights"].size  # what does not change need not be kept


def test_buffers_are_views_into_one_vector_and_probing_leaves_them_alone():
    net = FlatModel(Counting())
    assert net.integers.shape == (8 + 2 * 3 * 8 + 2 * 2 + 3,)
    with net.preserved(train=True):
        net.forward(torch.zeros(4, 1, 4, 4))
        assert net.module.count == 1 and net.module.short.tolist() == [1, 1]
    assert net.module.count == 0 and not net.integers[:-3].view(torch.int16)[-2:].any()
    net.forward(torch.zeros(4, 1, 4, 4))
    state = loop.get_state(net, None)
    loop.set_state(other := FlatModel(Counting()), state)
    assert other.module.count == 1 and other.module.table.tolist() == [[0, 1, 2]] * 2


def test_a_buffer_that_forward_replaces_is_refused():
    with pytest.raises(ConfigError, match=r"replaced by forward = \['count'\] .* self.x.copy_"):
        runs.obtain(CONFIG, small_data(), Replacing)
