"""Several runs at once: one-thread worker processes, because a small network cannot use two; on GPUs, some to each.

A worker is `python -m paper_lib.runs.workers`: it reads one run per line, {"config", "folder"}, trains it through the
run cache, and writes its progress as lines of JSON. (Plain subprocesses, not multiprocessing: that would import the
caller's script again.) On CPUs workers wait for the next call, because starting one takes as long as some hundred
steps of a small network; they end with the caller, and until then each holds torch and its data in memory.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import torch

from paper_lib.config import RunConfig
from paper_lib.files import cpus
from paper_lib.training.loop import Report

RUNS_PER_GPU = 3  # of small networks, whose steps are too short to keep a GPU busy
SMALL = ("resnet8", "resnet14", "resnet20")

_waiting: dict[
    subprocess.Popen, dict[str, str]
] = {}  # workers between calls: the environment and folder of each


class WorkerError(RuntimeError):
    """A worker process that failed; the message is the worker's."""


def train_parallel(jobs: Sequence[tuple[RunConfig, Path]], report: Report) -> None:
    """Train (config, folder) jobs in worker processes; raise WorkerError with a worker's message if one fails.

    Leaving early, by an error or an interrupt, ends the workers; what they saved is where they go on next time.
    """
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    for config, folder in jobs:
        waiting.put(json.dumps({"config": config.to_dict(), "folder": str(folder)}))
    messages: queue.SimpleQueue = queue.SimpleQueue()
    with _workers(slots([config for config, _ in jobs])) as workers:
        for worker in workers:
            threading.Thread(target=_serve, args=(worker, waiting, messages), daemon=True).start()
        finished = 0
        while finished < len(jobs):
            message = messages.get()
            if "error" in message:
                raise WorkerError(message["error"])
            finished += "done" in message
            if "steps" in message:
                report(message["steps"], message["loss"], message["lr"])


@contextlib.contextmanager
def _workers(chosen: Sequence[dict[str, str]]) -> Iterator[list[subprocess.Popen]]:
    """Yield a worker for each of the slots, one that waits or a new one; after an error they end, else they wait.

    Those of another environment end at once, as do all that have used a GPU: they hold its memory.
    """
    environment = {**os.environ, "": os.getcwd()}
    usable = [
        worker
        for worker, known in _waiting.items()
        if known == environment and worker.poll() is None
    ]
    _end([worker for worker in _waiting if worker not in usable])
    workers: list[subprocess.Popen] = []
    try:
        for variables in chosen:
            workers.append(usable.pop() if usable else _start(variables))
            _waiting.pop(workers[-1], None)
        yield workers
    except BaseException:
        _end(workers)
        raise
    if torch.cuda.is_available():
        _end(workers)
    else:
        _waiting.update(dict.fromkeys(workers, environment))


def _end(workers: Sequence[subprocess.Popen]) -> None:
    for worker in workers:
        worker.terminate()
    for worker in workers:
        worker.wait()
        _waiting.pop(worker, None)


atexit.register(lambda: _end(list(_waiting)))


def slots(configs: Sequence[RunConfig]) -> list[dict[str, str]]:
    """Environment variables of each worker process that may train one of `configs` at a time."""
    n_gpus = torch.cuda.device_count()
    if not n_gpus:
        cores = max(1, cpus() // max(config.threads for config in configs))
        # 3 runs on 2 cores: share them rather than queue
        return [{}] * (len(configs) if len(configs) <= 2 * cores else cores)
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = named.split(",") if named else [str(i) for i in range(n_gpus)]
    side_by_side = RUNS_PER_GPU if all(config.model in SMALL for config in configs) else 1
    return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus * side_by_side][: len(configs)]


def _start(variables: dict[str, str]) -> subprocess.Popen:
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-m", "paper_lib.runs.workers"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **variables, "PYTHONPATH": path},
        text=True,
    )


def _serve(
    worker: subprocess.Popen, waiting: queue.SimpleQueue, messages: queue.SimpleQueue
) -> None:
    """Hand jobs to one worker until none is left, passing on what it says."""
    while not waiting.empty():
        try:
            job = waiting.get_nowait()
            worker.stdin.write(job + "\n")
            worker.stdin.flush()
        except queue.Empty:
            return
        except OSError:
            messages.put({"error": f"a training process died (exit code {worker.wait()})"})
            return
        for line in worker.stdout:
            message = json.loads(line)
            messages.put(message)
            if "done" in message:
                break
        else:
            messages.put(
                {
                    "error": f"a training process died (exit code {worker.wait()}); the same call resumes"
                }
            )
            return


def work(jobs: IO[str], out: IO[str]) -> None:
    """Train the runs named on `jobs`, one a line; write progress, and "done" or "error" for each, to `out`."""
    from paper_lib import runs

    def say(**message: Any) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    for line in jobs:
        job = json.loads(line)
        config = RunConfig.from_dict(job["config"])
        try:
            if runs.run_folder(config) != Path(job["folder"]):
                raise RuntimeError(
                    "the code or data changed since this session began: restart it (or its kernel)"
                )
            runs.obtain(config, report=lambda steps, loss, lr: say(steps=steps, loss=loss, lr=lr))
        except Exception as error:
            say(error=f"{type(error).__name__}: {error}")
            if isinstance(error, ValueError | OSError | MemoryError):  # the message says it all
                return
            raise
        say(done=True)


if __name__ == "__main__":
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # an interrupt is the caller's, which then ends its workers
    protocol, sys.stdout = (
        sys.stdout,
        sys.stderr,
    )  # anything that prints must not disturb the protocol
    work(sys.stdin, protocol)
