"""Several processes under torchrun: the trajectory of one process, also after a kill."""

import socket
import textwrap
from datetime import timedelta

import numpy as np
import pytest
import torch
from helpers import SMALL, SmallNet, small_data, torchrun

from paper_lib import runs
from paper_lib.__main__ import main
from paper_lib.errors import ConfigError
from paper_lib.runs import Run
from paper_lib.training import distributed

CONFIG = SMALL.replace(
    lr=0.05, momentum=0.5, averages=("EMA 0.9", "uniform 10"), steps=30, record="0-30"
)


class Unused(SmallNet):
    """With parameters that no loss depends on."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Linear(2, 2)


# A parent, its branch, and one run in which the second process dies at step 15 when it is told to.
JOB = textwrap.dedent(
    """
    import os, pathlib, signal, sys
    from helpers import SmallNet, small_data
    from paper_lib import files, runs
    from paper_lib.training import distributed, loop
    from test_distributed import CONFIG, Unused
    loop.CHUNK, loop.RESUME_EVERY_S, loop.RESUME_SHARE = 5, 0.0, float("inf")
    def report(steps, loss, lr, seen=[0]):
        seen[0] += steps
        if sys.argv[1] == "die" and seen[0] == 15 and not distributed.first():
            os.kill(os.getpid(), signal.SIGKILL)
        if sys.argv[1] == "resume" and distributed.first():
            print("report", steps, flush=True)
    def full(*args):
        raise OSError("no space on the disk of the first process")
    if sys.argv[1] == "full":
        files.require_space = full
    with distributed.processes():
        assert distributed.active()
        run = runs.obtain(CONFIG, small_data(), SmallNet, report)
        if sys.argv[1] == "resume":
            runs.obtain(CONFIG.branch(5, record="35"), small_data(), SmallNet)
            bad = CONFIG.replace(lr=1e30, weight_decay=0.1)
            assert runs.obtain(bad, small_data(), SmallNet).diverged
            runs.obtain(CONFIG, small_data(), Unused)
        assert run.status["processes"] == 2  # it is there for every process
    # A thread of gloo that outlives its group can end the process by SIGABRT.
    tasks = pathlib.Path("/proc/self/task").glob("*/comm")
    assert not [name for name in (task.read_text() for task in tasks) if "gloo" in name]
    """
)


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPER_RUNS", str(tmp_path / "one"))
    return tmp_path


def test_two_processes_take_the_path_of_one_and_resume_when_one_is_killed(own_folder, monkeypatch):
    alone = runs.obtain(CONFIG, small_data(), SmallNet)
    branch = runs.obtain(CONFIG.branch(5, record="35"), small_data(), SmallNet)
    monkeypatch.setenv("PAPER_RUNS", str(own_folder / "two"))
    (own_folder / "job.py").write_text(JOB)
    killed = torchrun(str(own_folder / "job.py"), "die")
    folder = own_folder / "two" / alone.folder.name
    assert (
        killed.returncode != 0
        and not folder.exists()
        and folder.with_name(folder.name + ".part").exists()
    )
    resumed = torchrun(str(own_folder / "job.py"), "resume")
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.split()[:2] in (
        ["report", "10"],
        ["report", "15"],
    )  # it did not start again
    together = Run(folder, small_data(), SmallNet)
    assert together.status["processes"] == 2
    for name in (
        "weights",
        "buffers",
        "loss",
    ):  # BatchNorm included: its statistics are those of the global batch
        np.testing.assert_allclose(
            getattr(together, name), getattr(alone, name), rtol=1e-4, atol=2e-6
        )
    n = CONFIG.steps + 1
    np.testing.assert_allclose(
        together.average(np.ones(n) / n), alone.average(np.ones(n) / n), rtol=1e-4, atol=2e-6
    )
    np.testing.assert_allclose(together._averages, alone._averages, rtol=1e-4, atol=2e-6)
    other = Run(folder.with_name(branch.folder.name), small_data(), SmallNet)
    np.testing.assert_allclose(other.at(35), branch.at(35), rtol=1e-4, atol=2e-6)


def test_a_process_that_fails_ends_them_all(own_folder):
    (own_folder / "job.py").write_text(JOB)
    failed = torchrun(str(own_folder / "job.py"), "full")
    assert failed.returncode != 0 and "no space on the disk of the first process" in failed.stderr
    assert "terminate called" not in failed.stderr


def test_a_preset_trains_under_torchrun(own_folder, capsys):
    words = [
        "--preset",
        "smoke",
        "--steps",
        "6",
        "--window",
        "3",
        "--horizon",
        "4",
        "--decay",
        "3",
        "--seeds",
        "0",
    ]
    done = torchrun("-m", "paper_lib", "train", *words)
    assert done.returncode == 0, done.stderr
    kinds = [line.split(" seed 0: ")[0].strip() for line in done.stdout.splitlines()]
    assert kinds == [
        "warm-up",
        "window",
        "averages",
        "lr / 2",
        "decay",
    ]  # said once, by the first process
    found = {path.name for path in (own_folder / "one").glob("digits-*")}
    assert main(["train", *words]) == 0  # one process finds what two have trained
    assert {path.name for path in (own_folder / "one").glob("digits-*")} == found and len(
        found
    ) == 5


def test_a_batch_that_cannot_be_shared_is_refused(own_folder, monkeypatch):
    monkeypatch.setattr(distributed, "_world", lambda: 3)
    with pytest.raises(ValueError, match="batch_size = 8 is not allowed: the 3 processes"):
        runs.obtain(CONFIG, small_data(), SmallNet)


def test_alone_nothing_is_shared():
    values = torch.tensor([1.0, 2.0])
    assert distributed.first() and not distributed.active() and distributed.share("x") == "x"
    assert distributed.mean(values) is values


def test_synchronized_statistics_are_torchs_in_one_process(tmp_path):
    """Forward, backward and running statistics, with and without affine parameters, also in
    evaluation mode.
    """
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        for affine, shape in ((True, (6, 3, 4, 4)), (False, (6, 3))):
            kind = torch.nn.BatchNorm2d if len(shape) == 4 else torch.nn.BatchNorm1d
            ours, theirs = kind(3, affine=affine), kind(3, affine=affine)
            distributed.synchronize(ours)
            for train in (True, True, False):
                ours.train(train)
                theirs.train(train)
                x = torch.randn(shape).requires_grad_()
                gradients = []
                for layer in (ours, theirs):
                    out = layer(x)
                    gradients.append(torch.autograd.grad(out.pow(3).sum(), x)[0])
                torch.testing.assert_close(ours(x), theirs(x))
                torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(ours.running_var, theirs.running_var)
                torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    finally:
        torch.distributed.destroy_process_group()


TORCHRUN = {
    "LOCAL_RANK": "0",
    "RANK": "0",
    "WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        *[(name, None, "= None .* by torchrun") for name in TORCHRUN if name != "LOCAL_RANK"],
        *[(name, "x", "= 'x' .* unset LOCAL_RANK") for name in TORCHRUN if name != "MASTER_ADDR"],
        ("LOCAL_RANK", "", "= '' .* by torchrun"),
        ("LOCAL_RANK", "-1", "= '-1' .* by torchrun"),
        ("LOCAL_RANK", "2", "= 2 .* has 2 GPUs: start at most as many"),
        ("RANK", "2", "= 2 .* less than WORLD_SIZE = 2"),
        ("WORLD_SIZE", "0", "less than WORLD_SIZE = 0"),
        ("WORLD_SIZE", "1.5", "= '1.5' .* by torchrun"),
        ("MASTER_PORT", "0", "= 0 .* from 1 to 65535"),
        ("MASTER_PORT", "99999", "= 99999 .* from 1 to 65535"),
        ("RANK", "1", "= 127.0.0.1, .* failed: not all processes came"),  # where no one listens
    ],
)
def test_variables_that_torchrun_would_not_set_are_refused(name, text, message, monkeypatch):
    for variable, value in (TORCHRUN | {name: text}).items():
        if value is not None:
            monkeypatch.setenv(variable, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(distributed, "MEETING", timedelta(seconds=1))
    with pytest.raises(ConfigError, match=message), distributed.processes():
        pass


def test_a_process_that_no_other_joins_does_not_wait_for_ever(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    for variable, value in (TORCHRUN | {"MASTER_PORT": port}).items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(distributed, "MEETING", timedelta(seconds=1))
    with pytest.raises(ConfigError, match="not all processes came"), distributed.processes():
        pass
