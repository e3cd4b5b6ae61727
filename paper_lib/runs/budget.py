"""What runs take, told beforehand: images, disk, memory and hours of a run and of a study."""

from __future__ import annotations

import numpy as np
import pandas as pd
import psutil
import torch

from paper_lib.config import RunConfig, Study
from paper_lib.training import networks
from paper_lib.training.loop import CHUNK

CLASSES = {"digits": 10, "cifar10": 10, "cifar100": 100}
TREES = {64: 200, 224: 1000}  # classes of Tiny ImageNet and ImageNet, by size; of other trees 10


def disk_bytes(config: RunConfig, n_weights: int, n_buffers: int = 0) -> int:
    """Bytes on disk at most: snapshots, averages, states, log, what a killed run resumes from."""
    n, k = len(config.snapshot_steps), len(config.averages)
    state = (1 + (config.momentum > 0)) * n_weights + n_buffers  # momentum too
    n_states = len({*config.checkpoints, config.steps})
    resume = 2 * (state + k * n_weights)  # twice while it is being replaced
    floats = n * (n_weights + n_buffers) + k * n_weights + n_states * state + resume
    return 4 * floats + 16 * (config.steps - config.start)


def memory_bytes(config: RunConfig, n_weights: int) -> int:
    """Bytes on a run's device: weights, gradient, momentum, averages, pending snapshots.

    Activations come on top.
    """
    steps = config.snapshot_steps
    after = np.searchsorted(steps, steps + CHUNK, side="right")  # the last chunk adds the end
    pending = after - np.arange(len(steps))
    return 4 * n_weights * (3 + len(config.averages) + int(pending.max(initial=0)))


def require_memory(config: RunConfig, n_weights: int, device: torch.device) -> None:
    """Raise MemoryError with the arithmetic if a run's vectors do not fit into free memory."""
    needed, free = memory_bytes(config, n_weights), psutil.virtual_memory().available
    if device.type == "cuda":  # what PyTorch has reserved and does not use is free as well
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + unused
    if needed > free:
        raise MemoryError(
            f"weights, gradient, momentum, {len(config.averages)} averages and up to {CHUNK} "
            f"pending snapshots of {n_weights:,} weights (4 bytes each) need {needed / 1e9:.2f} "
            f"GB, but {device} has {free / 1e9:.2f} GB free: name fewer `averages`, `record` a "
            "larger stride, or narrow the network (`width`)"
        )


def shared_runs(study: Study) -> dict[str, RunConfig]:
    """The runs of one seed that most notebooks read, by what they are."""
    window = study.stationary()
    found = {
        "warm-up": study.run,
        "window": window,
        "averages": study.averaged(study.averages.values()),
        "lr / 2": study.averaged((), lr=study.run.lr / 2),
        "decay": study.decayed(),
    }
    return {name: run for name, run in found.items() if name == "window" or run != window}


def table(study: Study, images_per_second: float | None = None) -> pd.DataFrame:
    """What the shared runs take, all seeds together, one row a run.

    Columns: run, seeds, steps, million images, snapshots, averages, GB on disk, GB on device (of
    one run), hours, weights. Hours need a rate, of all devices together, as the progress bar of
    `train` shows. The classes of a tree of images are assumed, see TREES.
    """
    n_weights, n_buffers = size(study)
    rows, seeds = [], len(study.seeds)
    for name, run in shared_runs(study).items():
        steps = run.steps - run.start
        images = seeds * steps * run.batch_size
        row = {"run": name, "seeds": seeds, "steps": steps, "million images": images / 1e6}
        row |= {"snapshots": len(run.snapshot_steps), "averages": len(run.averages)}
        row |= {"GB on disk": seeds * disk_bytes(run, n_weights, n_buffers) / 1e9}
        row |= {"GB on device": memory_bytes(run, n_weights) / 1e9}
        if images_per_second is not None:
            row["hours"] = images / images_per_second / 3600
        rows.append(row)
    return pd.DataFrame(rows).assign(weights=n_weights)


def size(study: Study) -> tuple[int, int]:
    """Numbers of weights and of floating-point buffers of a study's network; takes no memory."""
    run, own = study.run, study.dataset
    channels = 1 if run.data == "digits" else 3
    classes = CLASSES.get(run.data) or TREES.get(run.image_size, 10)
    if own is not None:
        channels, classes = own.shape[0], own.n_classes
    with torch.device("meta"):
        if study.net is not None:
            net = study.net()
        else:
            net = networks.build(run.model, channels, classes, run.width, run.norm, run.activation)
    n_buffers = sum(b.numel() for b in net.buffers() if b.is_floating_point())
    return sum(p.numel() for p in net.parameters()), n_buffers
