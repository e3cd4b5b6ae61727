"""Calls a function side by side in worker processes, each of one thread or with a GPU of its own.

Workers are loky's: they never import the caller's script again, and cloudpickle brings them what a
notebook's cell defines. They wait for the next call, since starting one takes as long as some
hundred steps of a small network, and end when idle, with the caller, or once they held a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any

import cloudpickle
import torch
from filelock import FileLock, Timeout
from joblib.externals.loky.process_executor import BrokenProcessPool, ProcessPoolExecutor

from paper_lib.config import RunConfig
from paper_lib.errors import ConfigError
from paper_lib.files import cpus
from paper_lib.training.flat import NetFactory
from paper_lib.training.loop import Report

RUNS_PER_GPU = 3  # of small networks, whose steps are too short to keep a GPU busy
SMALL = ("resnet8", "resnet14", "resnet20")
IDLE_S = 600.0  # after which a worker ends
LOOK_S = 0.25  # between looks at what workers report

_OWN = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")  # variables that a worker has for itself
_pool: ProcessPoolExecutor | None = None  # between calls
_size = 0


class WorkerError(RuntimeError):
    """A worker process that was killed, or runs other code or data than its caller."""


def slots(configs: Sequence[RunConfig], net: NetFactory | None = None) -> list[str]:
    """The GPU of each worker that may train one of `configs` at a time; "" is a CPU's."""
    n_gpus = torch.cuda.device_count()
    if not n_gpus:
        cores = max(1, cpus() // max(config.threads for config in configs))
        # 3 runs on 2 cores: share them rather than queue
        return [""] * (len(configs) if len(configs) <= 2 * cores else cores)
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = named.split(",") if named else [str(i) for i in range(n_gpus)]
    small = net is None and all(config.model in SMALL for config in configs)
    together = RUNS_PER_GPU if small else 1
    return (gpus * together)[: len(configs)]


def side_by_side(
    function: Callable[[Any, Report], Any],
    jobs: Sequence[Any],
    gpus: Sequence[str],
    report: Report = lambda steps, loss, lr: None,
) -> list[Any]:
    """[function(job, report) for job in jobs], in a worker for each of `gpus` (see `slots`).

    The function reaches a worker once, with all that it holds; it and the jobs may be of the
    caller's own making. What it reports arrives a few times a second. An error of a job is raised
    here, WorkerError where a worker was killed; on that, or an interrupt, all workers end at once.
    """
    with tempfile.TemporaryDirectory(prefix="paper-lib-") as folder, _workers(gpus) as pool:
        call, log = Path(folder, "call"), Path(folder, "log")
        _carry(function, call)
        log.touch()
        with _without_interrupts():
            futures = [pool.submit(_work, call, job, log) for job in jobs]
        _follow(futures, log, report)
        return [future.result() for future in futures]


# --- the caller ---------------------------------------------------------------------------------


@contextlib.contextmanager
def _workers(gpus: Sequence[str]) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool with at least a worker for each slot; after an error its workers end."""
    global _pool, _size
    # Broken: one that waited was killed. Those that wait have no GPU.
    if _pool is None or _pool._flags.broken or _size < len(gpus) or any(gpus):
        end_workers()
        # A worker that has come to need far more memory than at first is replaced; no one minds.
        warnings.filterwarnings("ignore", "A worker stopped while some jobs were given")
        _pool, _size = _start(gpus), len(gpus)
    try:
        yield _pool
    except BaseException:
        end_workers()
        raise
    if any(gpus):  # they hold its memory
        end_workers()


def _start(gpus: Sequence[str]) -> ProcessPoolExecutor:
    locks = tempfile.mkdtemp(prefix="paper-lib-gpus-") if any(gpus) else ""
    return ProcessPoolExecutor(
        len(gpus),
        timeout=IDLE_S,
        initializer=_begin,
        initargs=(os.getpid(), tuple(gpus), locks),
        env={"OMP_NUM_THREADS": "1"},
    )


def end_workers() -> None:
    """End all workers at once; what they saved is where they go on in the next call."""
    global _pool
    pool, _pool = _pool, None  # at first: a second interrupt may come
    if pool is not None:
        pool.shutdown(kill_workers=True)


def _carry(function: Callable, path: Path) -> None:
    """Write what workers need of the caller: the function, and where it was defined."""
    try:
        carried = cloudpickle.dumps(function)
    except Exception as error:
        raise ConfigError(
            f"the network or dataset cannot be sent to another process ({error}): define it "
            "without open files, locks and the like, or train one seed at a time"
        ) from error
    with path.open("wb") as file:
        pickle.dump((os.getcwd(), dict(os.environ), sys.path), file)
        file.write(carried)


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Hold back SIGINT; workers and threads that are started meanwhile never see one."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _follow(futures: Sequence[Future], log: Path, report: Report) -> None:
    """Wait for all results, handing on what workers write into the log; raise the first error."""
    left, rest = set(futures), ""
    with log.open() as written:
        while left:
            done, left = wait(left, timeout=LOOK_S, return_when=FIRST_COMPLETED)
            *lines, rest = (rest + written.read()).split("\n")
            for steps, loss, lr in map(str.split, lines):
                report(int(steps), float(loss), float(lr))
            for future in done:
                _check(future)


def _check(future: Future) -> None:
    """Raise a job's error, without the worker's traceback where its message says it all."""
    error: Any = future.exception()
    if isinstance(error, BrokenProcessPool):
        raise WorkerError(
            "a training process was killed, perhaps for lack of memory: the same call resumes"
        ) from None
    if isinstance(error, OSError | MemoryError) or type(error).__module__.startswith("paper_lib."):
        raise error from None
    if error is not None:
        raise error


# --- a worker -----------------------------------------------------------------------------------


def _begin(caller: int, gpus: Sequence[str], locks: str) -> None:
    """Make a process a worker: silent on stdout, deaf to interrupts, ended by its caller's end."""
    os.dup2(2, 1)  # what anything prints must not end up among the caller's output
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is the caller's, which then ends its workers
    threading.Thread(target=_end_after, args=(caller,), daemon=True).start()
    torch.set_num_threads(1)
    if locks:
        os.environ["CUDA_VISIBLE_DEVICES"] = _free(gpus, locks)


def _end_after(caller: int) -> None:
    while os.getppid() == caller:
        time.sleep(1.0)
    os._exit(1)


def _free(gpus: Sequence[str], locks: str) -> str:
    """The GPU of a slot that no living worker has; this one has it until it ends."""
    while True:
        for i, gpu in enumerate(gpus):
            with contextlib.suppress(Timeout):
                _held.append(FileLock(Path(locks, str(i))))
                _held[-1].acquire(timeout=0)
                return gpu
        time.sleep(0.1)


_held: list[FileLock] = []  # a lock that is collected is released


def _work(call: Path, job: Any, log: Path) -> Any:
    """Carry out one job, as the caller would; it can be sent back, as can an error."""
    try:
        with log.open("a", buffering=1) as lines:
            return _received(call)(job, lambda *report: print(*report, file=lines))
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            raise WorkerError(f"{type(error).__name__}: {error}") from error
        raise


@functools.lru_cache(maxsize=1)
def _received(call: Path) -> Callable[[Any, Report], Any]:
    """The function of a call, after taking on its caller's folder, variables and sources."""
    with call.open("rb") as file:
        folder, variables, sys.path[:] = pickle.load(file)
        os.chdir(folder)
        for name in {*os.environ, *variables}.difference(_OWN):
            os.environ.pop(name, None)
            if name in variables:
                os.environ[name] = variables[name]
        return pickle.load(file)
