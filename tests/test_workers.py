"""Worker processes: what they are given and give back, and how they and their caller may end."""

import dataclasses
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future

import psutil
import pytest
import torch
from helpers import SMALL, SmallNet

from paper_lib import data, runs
from paper_lib.errors import ConfigError
from paper_lib.presets import study
from paper_lib.runs import parallel
from paper_lib.runs.parallel import WorkerError, side_by_side


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPER_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def meet(folder, report):
    """A job: its worker's number and GPU, once another worker is in the folder too."""
    (folder / str(os.getpid())).touch()
    deadline = time.monotonic() + 60
    while len(list(folder.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    return os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES")


def process_id(job, report):
    return os.getpid()


# --- how many -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "net", "n_runs", "visible", "expected"),
    [
        ("resnet18_cifar", None, 5, None, ["0", "1"]),
        ("resnet18_cifar", None, 1, None, ["0"]),
        ("resnet8", None, 5, None, ["0", "1", "0", "1", "0"]),
        ("resnet8", None, 2, "3,5", ["3", "5"]),
        ("resnet8", SmallNet, 5, None, ["0", "1"]),  # how large it is, no one knows
    ],
)
def test_runs_spread_over_the_gpus(model, net, n_runs, visible, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    configs = [SMALL.replace(model=model, seed=i) for i in range(n_runs)]
    assert parallel.slots(configs, net) == expected


def test_workers_take_the_processors_that_they_may_use(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5, 6}, raising=False)
    many = [SMALL.replace(seed=i) for i in range(20)]
    assert len(parallel.slots(many)) == 4
    assert len(parallel.slots([config.replace(threads=2) for config in many])) == 2


def test_each_worker_has_a_gpu_of_its_own_and_ends_with_the_call(tmp_path):
    side_by_side(process_id, [0, 1], ["", ""])  # workers of another call, without a GPU, wait
    found = side_by_side(meet, [tmp_path] * 2, ["3", "5"])
    assert sorted(gpu for _, gpu in found) == ["3", "5"]
    assert parallel._pool is None  # a worker would go on holding the memory of its GPU


# --- what goes there and comes back -------------------------------------------------------------


def test_workers_wait_for_the_next_call_and_take_on_its_surroundings(monkeypatch, tmp_path):
    first = [number for number, _ in side_by_side(meet, [tmp_path] * 2, ["", ""])]
    assert len(set(first)) == 2 and os.getpid() not in first
    monkeypatch.setenv("PAPER_RUNS", "elsewhere")
    monkeypatch.chdir(tmp_path)

    def surroundings(job, report):
        return os.getcwd(), os.environ["PAPER_RUNS"], os.environ["OMP_NUM_THREADS"], os.getpid()

    (found,) = side_by_side(surroundings, [0], [""])
    assert found == (str(tmp_path), "elsewhere", "1", found[-1]) and found[-1] in first


def test_reports_arrive_whole():
    def work(job, report):
        for _ in range(1000):
            time.sleep(0.001)
            report(2, float("nan"), 0.1 * (job + 1))
        return -job

    seen = []
    assert side_by_side(work, range(3), [""] * 2, lambda *m: seen.append(m)) == [0, -1, -2]
    assert len(seen) == 3000 and all(steps == 2 for steps, _, _ in seen)
    assert {lr for _, _, lr in seen} == {0.1, 0.2, 0.1 * 3}


ERRORS = [
    ConfigError("lr = 3"),
    data.DataError("unreadable image"),
    runs.DivergedError("diverged at step 3"),
    runs.SnapshotError("no step 3"),
    MemoryError("lower `batch_size`"),
    OSError(28, "No space left on device"),
]


def fail(i, report):
    raise ERRORS[i]


def test_the_error_of_a_job_arrives_without_a_workers_traceback():
    with pytest.raises(runs.DivergedError, match="diverged at step 3") as caught:
        side_by_side(fail, [2], [""])
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_whose_message_says_it_all_are_passed_on_as_they_are(error):
    done = Future()
    done.set_exception(pickle.loads(pickle.dumps(error)))
    done.exception().__cause__ = RuntimeError("a traceback from afar")
    with pytest.raises(type(error)) as caught:
        parallel._check(done)
    assert str(caught.value) == str(error) and caught.value.__cause__ is None


def test_other_errors_bring_the_traceback_and_need_not_be_picklable():
    class Strange(Exception):
        def __init__(self, a, b):
            super().__init__(f"{a} and {b}")

    def fail(job, report):
        raise (ValueError("shapes differ") if job else Strange("this", "that"))

    with pytest.raises(ValueError, match="shapes differ") as caught:
        side_by_side(fail, [1], [""])
    assert "in fail" in str(caught.value.__cause__)
    with pytest.raises(WorkerError, match="Strange: this and that"):
        side_by_side(fail, [0], [""])


def test_a_worker_may_write_megabytes():
    def shout(job, report):
        for file in (1, 2):
            os.write(file, b"x" * 3_000_000 + b"\n")
        print("x" * 3_000_000)
        os.system("echo a program speaks")
        return job

    assert side_by_side(shout, [0, 1], ["", ""]) == [0, 1]


def test_what_cannot_be_sent_is_refused():
    lock = threading.Lock()
    with pytest.raises(ConfigError, match="cannot be sent to another process .* without"):
        side_by_side(lambda job, report: lock, [0], [""])


def test_a_worker_with_other_code_or_data_refuses(monkeypatch):
    config = study("smoke", steps=2, record="").run
    module = sys.modules["paper_lib.runs.obtain"]
    found = module._run

    def elsewhere(*args):
        run = found(*args)
        return dataclasses.replace(run, folder=run.folder.with_name("other"))

    monkeypatch.setattr(module, "_run", elsewhere)
    with pytest.raises(WorkerError, match="changed since this session began: restart it"):
        runs.train_seeds(config, [0, 1], progress=False)


# --- how they end -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_worker_is_said_and_the_next_call_works(how):
    def die(job, report):
        os.kill(os.getpid(), how)

    with pytest.raises(WorkerError, match="was killed.*: the same call resumes"):
        side_by_side(die, [0, 1], ["", ""])
    (waiting,) = side_by_side(process_id, [0], [""])
    os.kill(waiting, how)
    time.sleep(1.0)
    assert side_by_side(process_id, [0], [""]) != [waiting]


SETUP = """
import os, time
import torch
from paper_lib import data, presets
from paper_lib.runs import train
print("the code runs", flush=True)

class Net(torch.nn.Module):
    width, pause = 3, 0.0

    def __init__(self):
        super().__init__()
        print("a network is made")
        os.system("echo a program speaks")
        self.inner, self.outer = torch.nn.Linear(5, self.width), torch.nn.Linear(3, 2)

    def forward(self, x):
        time.sleep(self.pause)
        return self.outer(torch.relu(self.inner(x)))

torch.manual_seed(0)
x, y = torch.randn(60, 5), torch.arange(60) % 2
dataset = data.from_tensors(x, y, x, y, held_out=10)
study = presets.own(dataset, Net, lr=0.5, steps=60, batch_size=10)
"""
"""A user's own dataset and network, which prints."""
SLOW = "Net.pause = 10.0; train(study, study.run)"
QUICK = "Net.pause = 0.0; print('trained:', len(train(study, study.run)), flush=True)"
SCRIPT = f"""{SETUP}
try:
    {SLOW}
except KeyboardInterrupt:
    {QUICK}
study = presets.own(dataset, Net, lr=0.1, steps=60, batch_size=10)
{SLOW}
"""
SURROUNDINGS = {"PYTHONPATH": os.pathsep.join(sys.path), "ONEDNN_VERBOSE": "1"}


def busy_workers(caller, folder):
    """The workers of a process, once one of them has begun to write a run into the folder."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if any(folder.glob("*.part")):
            children = psutil.Process(caller).children()
            return [child for child in children if "popen_loky" in "".join(child.cmdline())]
        time.sleep(0.1)
    raise AssertionError("no run has begun")


def ended(workers):
    """Whether processes end within a moment: training, they would go on for half an hour."""
    return not psutil.wait_procs(workers, timeout=30)[1]


def test_a_scripts_workers_end_by_an_interrupt_or_with_it_and_say_nothing(own_folder, tmp_path):
    """Nor does the script, which has no guard, run twice."""
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, **SURROUNDINGS}
    script = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
    workers = busy_workers(script.pid, own_folder)
    os.killpg(script.pid, signal.SIGINT)  # as a terminal does: to the workers as well
    assert len(workers) >= 2 and ended(workers)
    lines = iter(script.stdout.readline, "")
    assert "trained: 3\n" in lines
    for part in own_folder.glob("*.part"):
        shutil.rmtree(part)
    workers = busy_workers(script.pid, own_folder)
    script.terminate()
    out, err = script.communicate(timeout=30)
    assert ended(workers)
    assert "a program speaks" in err and "Traceback" not in err and "the code runs" not in err
    assert "the code runs" not in out


def test_a_notebook_trains_what_its_cells_define_and_can_be_interrupted(own_folder):
    client = pytest.importorskip("jupyter_client")
    environment = {**os.environ, **SURROUNDINGS}
    manager, kernel = client.manager.start_new_kernel(kernel_name="python3", env=environment)
    said = []
    try:
        kernel.execute_interactive(SETUP, timeout=240)
        kernel.execute(SLOW, stop_on_error=False)  # the next request is not to be aborted
        workers = busy_workers(manager.provisioner.pid, own_folder)
        manager.interrupt_kernel()
        assert kernel.get_shell_msg(timeout=30)["content"]["ename"] == "KeyboardInterrupt"
        assert ended(workers)
        hook = {"output_hook": lambda message: said.append(message["content"].get("text", ""))}
        kernel.execute_interactive(QUICK, timeout=240, **hook)
    finally:
        kernel.stop_channels()
        manager.shutdown_kernel(now=True)
    assert "trained: 3" in "".join(said)
