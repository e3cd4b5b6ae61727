"""Shares one run among the processes that torchrun started: their parts of batches, one gradient.

Only this module knows of ranks. Process 0 is the first: it decides, and it alone writes. A process
on its own is the first, has the whole batch, and sharing does nothing.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from paper_lib.data import Dataset
from paper_lib.errors import ConfigError, require

T = TypeVar("T")

MEETING = timedelta(minutes=5)  # in which all processes must have started
PATIENCE = timedelta(days=7)  # while the first process waits for a lock, or writes

# On the CPU, for decisions; tensors go through the default group.
_control: Any = None


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Join the processes that torchrun started, if it did; each takes the GPU of its local rank.

    They part together. One that fails ends at once, and torchrun then ends the others. Raises
    ConfigError for variables that torchrun would not set, or where not all processes come.
    """
    if "LOCAL_RANK" not in os.environ:
        yield
        return
    _join()
    try:
        yield
    except BaseException:
        for group in (_control, dist.group.WORLD):
            if group is not None:
                group.abort()  # nothing may wait for the others any more
        raise
    _part()


def _join() -> None:
    global _control
    # torch.compile imports it, and where a group exists its functions' defaults hold it.
    importlib.import_module("torch.distributed.nn.functional")
    local_rank, place = _variables()
    n_gpus = torch.cuda.device_count()
    if n_gpus:
        allowed = f"this machine has {n_gpus} GPUs: start at most as many processes on it"
        require(local_rank < n_gpus, "LOCAL_RANK", local_rank, allowed)
        torch.cuda.set_device(local_rank)
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=MEETING))
    except dist.DistError as error:
        allowed = f"not all processes came there within {MEETING}, or another program uses it"
        raise ConfigError(f"MASTER_ADDR, MASTER_PORT = {place} failed: {allowed}") from error
    group = {"store": store, "rank": rank, "world_size": world, "timeout": PATIENCE}
    dist.init_process_group("nccl" if n_gpus else "gloo", **group)
    _control = dist.new_group(backend="gloo", timeout=PATIENCE)


def _variables() -> tuple[int, str]:
    """Local rank, and where processes meet; ConfigError for variables that cannot be torchrun's."""
    names = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR")
    texts = {name: os.environ.get(name) for name in names}
    for name, text in texts.items():
        usable = bool(text) and (name == "MASTER_ADDR" or str(text).isdecimal())
        allowed = "start processes by torchrun, which sets it, or unset LOCAL_RANK"
        require(usable, name, text, allowed)
    local_rank, rank, world, port = (int(str(texts[name])) for name in names[:4])
    require(rank < world, "RANK", rank, f"it must be less than WORLD_SIZE = {world}")
    require(0 < port < 2**16, "MASTER_PORT", port, "it must be from 1 to 65535")
    return local_rank, f"{texts['MASTER_ADDR']}, {port}"


def _part() -> None:
    """End the groups and, with the last reference to each, gloo's threads.

    A thread of gloo that lives on may drop a tensor while Python is being finalized. It then wants
    the interpreter's lock, and Python before 3.14 ends such a thread inside a C++ destructor: the
    process dies by SIGABRT, "terminate called without an active exception".
    """
    global _control
    dist.barrier(_control)
    _control = None
    dist.destroy_process_group()


# --- who is who ---------------------------------------------------------------------------------


def active() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def first() -> bool:
    """Whether this process is the one that decides and writes."""
    return _rank() == 0


def _rank() -> int:
    return dist.get_rank() if active() else 0


def _world() -> int:
    return dist.get_world_size() if active() else 1


def status() -> dict[str, int]:
    """What a run's status says of the processes that trained it."""
    return {"processes": _world()}


# --- what belongs to one process ----------------------------------------------------------------


def part(dataset: Dataset) -> Dataset:
    """The dataset of which every batch is this process's part."""
    return dataset.part(_rank(), _world())


def part_of_batch(batch_size: int) -> int:
    """How many samples of a batch this process takes. ConfigError where it cannot be divided."""
    allowed = f"the {_world()} processes that share it must divide it"
    require(batch_size % _world() == 0, "batch_size", batch_size, allowed)
    return batch_size // _world()


def own_seed(seed: int) -> int:
    """A seed for what each process draws for its own part of a batch; alone, the seed itself."""
    return seed * _world() + _rank()


class _Silent:
    """Stands in for a recorder where another process writes: nothing to keep, nothing happens."""

    resumed, steps = None, ()
    keep: frozenset[int] = frozenset()

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *values: None


def recorder(make: Callable[[], T]) -> T | Any:
    """The recorder that the first process makes; others get one that keeps nothing."""
    return make() if first() else _Silent()


# --- sharing ------------------------------------------------------------------------------------


def share(value: T) -> T:
    """What the first process gives (anything picklable): decisions are taken once."""
    if not active():
        return value
    box = [value]
    dist.broadcast_object_list(box, group=_control)
    return box[0]


def share_(*tensors: Tensor) -> None:
    """Overwrite tensors by those of the first process."""
    for tensor in tensors if active() else ():
        if tensor.numel():
            dist.broadcast(tensor, 0)


def mean(tensor: Tensor) -> Tensor:
    """Mean over the processes."""
    if active():
        dist.all_reduce(tensor)
        tensor /= _world()
    return tensor


# --- BatchNorm ----------------------------------------------------------------------------------


def synchronize(module: nn.Module) -> None:
    """Let BatchNorm in training mode normalize by statistics of the parts of all processes.

    torch's SyncBatchNorm does so on GPUs only; this serves, and is tested on, every device.
    """
    for layer in module.modules():
        if isinstance(layer, _BatchNorm):
            layer.forward = partial(_normalized, layer)


class _Sum(torch.autograd.Function):
    """Sum over the processes, of gradients too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradient)


def _normalized(layer: _BatchNorm, x: Tensor) -> Tensor:
    """Forward pass of one BatchNorm layer over a batch of which every process has an equal part."""
    if not (layer.training or layer.running_mean is None):
        return type(layer).forward(layer, x)
    others = [d for d in range(x.ndim) if d != 1]
    shape = [-1 if d == 1 else 1 for d in range(x.ndim)]
    n = dist.get_world_size() * x.numel() // x.shape[1]
    values = x.float()  # under autocast too, as in torch's
    mean = _Sum.apply(values.sum(others)) / n
    centered = values - mean.view(shape)
    variance = _Sum.apply(centered.square().sum(others)) / n
    if layer.running_mean is not None and layer.running_var is not None:
        with torch.no_grad():
            layer.running_mean.lerp_(mean, layer.momentum)
            layer.running_var.lerp_(variance * (n / (n - 1)), layer.momentum)
    out = centered * (variance + layer.eps).rsqrt().view(shape)
    if layer.affine:
        out = out * layer.weight.view(shape) + layer.bias.view(shape)
    return out.to(x.dtype)
