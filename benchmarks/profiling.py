"""Where the time of a training step goes, operator by operator: why it is above the floor."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from paper_lib.config import RunConfig
from paper_lib.data import Dataset
from paper_lib.training import loop
from paper_lib.training.flat import exact_float32, threads

STEPS = 10  # to warm up, to time, and to profile


@dataclass(frozen=True, eq=False)
class Profile:
    """One training step, averaged over several; times in milliseconds.

    wall: time of a step without the profiler.  busy: of it, time that the GPU works; on a CPU the
    time of all operators, profiled.  operators: operator, ms (self time: of its kernels on a GPU)
    and share of `busy`, the most expensive first.  kernels: launched on a GPU, None on a CPU.
    """

    wall: float
    busy: float
    operators: pd.DataFrame
    kernels: float | None

    def __str__(self) -> str:
        gpu = ""
        if self.kernels is not None:
            gpu = f", {self.kernels:.0f} kernels, which keep the GPU busy {self.busy:.2f} ms"
        formats = {"ms": "{:.3f}".format, "share": "{:.0%}".format}
        table = self.operators.to_string(index=False, formatters=formats)
        return f"{self.wall:.2f} ms a step{gpu}\n{table}"


def profile_step(config: RunConfig, dataset: Dataset, top: int = 8) -> Profile:
    """Profile the steps of a run from its initialization, batches included; nothing is recorded."""
    on_gpu = dataset.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with threads(config.threads), exact_float32(dataset.device):
        take = _stepper(config, dataset)
        take()
        wall = seconds(take) / STEPS * 1e3
        with profile(activities=activities) as profiler:
            seconds(take)
    events, unit = profiler.key_averages(), 1e3 * STEPS  # they are in microseconds
    if on_gpu:
        work = [e for e in events if e.device_type == DeviceType.CUDA]
        kernels = sum(e.count for e in work if not e.key.startswith(("Memcpy", "Memset"))) / STEPS
        # Of the rest, events of the CUDA runtime may be credited with kernels too.
        operators = [e for e in events if e.key.startswith("aten::")]
        times = {e.key: e.self_device_time_total / unit for e in operators}
        busy = sum(e.self_device_time_total for e in work) / unit
    else:
        kernels, times = None, {e.key: e.self_cpu_time_total / unit for e in events}
        busy = sum(times.values())
    table = pd.DataFrame({"operator": list(times), "ms": list(times.values())}).nlargest(top, "ms")
    return Profile(wall, busy, table.assign(share=table.ms / busy), kernels)


def _stepper(config: RunConfig, dataset: Dataset) -> Callable[[], None]:
    """A function that takes the next STEPS steps of a run, as `train` takes them, three times."""
    net = loop.initial_model(config, dataset)
    net.module.train()
    velocity = torch.zeros_like(net.weights)
    batches = dataset.stream(0, 3 * STEPS, config.batch_size, config.stream)

    def take() -> None:
        for x, y in itertools.islice(batches, STEPS):
            net.backward(loop.batch_loss(net, x, y, config))
            loop.sgd_step(net, velocity, config.lr, config)

    return take


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call, until a GPU has done it too."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start
