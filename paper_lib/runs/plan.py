"""What a run takes on disk and on its device, told before it starts."""

from __future__ import annotations

import numpy as np
import psutil
import torch

from paper_lib.config import RunConfig
from paper_lib.training.loop import CHUNK


def disk_bytes(config: RunConfig, n_weights: int, n_buffers: int = 0) -> int:
    """What a run takes on disk at most, in bytes: snapshots, averages, states, log, what a killed run resumes from."""
    n, k = len(config.snapshot_steps), len(config.averages)
    state = (1 + (config.momentum > 0)) * n_weights + n_buffers  # momentum too
    n_states = len({*config.checkpoints, config.steps})
    resume = 2 * (state + k * n_weights)  # twice while it is being replaced
    floats = n * (n_weights + n_buffers) + k * n_weights + n_states * state + resume
    return 4 * floats + 16 * (config.steps - config.start)


def memory_bytes(config: RunConfig, n_weights: int) -> int:
    """What a run's vectors take on its device, in bytes: weights, gradient, momentum, averages, pending snapshots.

    Activations come on top; they depend on the network and the batch size.
    """
    steps = config.snapshot_steps
    pending = np.searchsorted(steps, steps + CHUNK, side="right") - np.arange(
        len(steps)
    )  # the last chunk adds the end
    return 4 * n_weights * (3 + len(config.averages) + int(pending.max(initial=0)))


def require_memory(config: RunConfig, n_weights: int, device: torch.device) -> None:
    """Raise MemoryError with the arithmetic if a run's vectors do not fit into what is free on its device."""
    needed, free = memory_bytes(config, n_weights), psutil.virtual_memory().available
    if device.type == "cuda":  # what PyTorch has reserved and does not use is free as well
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + unused
    if needed > free:
        raise MemoryError(
            f"weights, gradient, momentum, {len(config.averages)} averages and up to {CHUNK} pending snapshots of "
            f"{n_weights:,} weights (4 bytes each) need {needed / 1e9:.2f} GB, but {device} has {free / 1e9:.2f} GB "
            "free: name fewer `averages`, `record` a larger stride, or narrow the network (`width`)"
        )
