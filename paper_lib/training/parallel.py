"""Several processes that train one run, as torchrun starts them: same global batches, one gradient, rank 0 writes.

In a process of its own its rank is 0, the world's size 1, and sharing does nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from paper_lib.files import cpus as cpus
from paper_lib.training import batchnorm
from paper_lib.training.flat import FlatModel

T = TypeVar("T")


PATIENCE = timedelta(
    days=7
)  # of processes that wait while the first one waits for a lock, or writes

_control: dist.ProcessGroup | None = (
    None  # on the CPU, for decisions; tensors go through the default group
)


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Join the processes that torchrun started, if it did; each takes the GPU of its local rank.

    A process that fails simply ends, and torchrun then ends the others: an orderly farewell would wait for them.
    """
    global _control
    if "LOCAL_RANK" not in os.environ:
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
    _control = dist.new_group(backend="gloo", timeout=PATIENCE)
    yield
    dist.destroy_process_group()


def active() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """The number of this process; number 0 decides and writes."""
    return dist.get_rank() if active() else 0


def world() -> int:
    """How many processes train one run."""
    return dist.get_world_size() if active() else 1


def share(value: T) -> T:
    """Return what process 0 gives (anything picklable): decisions are taken once."""
    if not active():
        return value
    box = [value]
    dist.broadcast_object_list(box, group=_control)
    return box[0]


def share_(*tensors: Tensor) -> None:
    """Overwrite tensors by those of process 0."""
    for tensor in tensors if active() else ():
        if tensor.numel():
            dist.broadcast(tensor, 0)


def mean(tensor: Tensor) -> Tensor:
    """Mean over the processes."""
    if active():
        dist.all_reduce(tensor)
        tensor /= world()
    return tensor


def distribute(net: FlatModel) -> None:
    """Average gradients over the processes, and let BatchNorm normalize the global batch, as one process would.

    torch's SyncBatchNorm does the same on GPUs only; here one code path serves, and is tested on, every device.
    """
    if active():
        batchnorm.synchronize(net.module)
        device = [torch.cuda.current_device()] if net.device.type == "cuda" else None
        net.module = DistributedDataParallel(net.module, device_ids=device, broadcast_buffers=False)
