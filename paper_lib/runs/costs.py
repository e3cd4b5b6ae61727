"""What a preset takes: images, disk, memory and hours, counted before anything runs (`python -m paper_lib plan`)."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd
import torch

from paper_lib.config import RunConfig, Study
from paper_lib.runs import plan
from paper_lib.training import networks

CLASSES = {"digits": 10, "cifar10": 10, "cifar100": 100}
TREES = {
    64: 200,
    224: 1000,
}  # classes of Tiny ImageNet and ImageNet, by image size; of any other tree 10


def shared_runs(study: Study, averages: Iterable[str] = ()) -> dict[str, RunConfig]:
    """The runs of one seed that most notebooks read, by what they are; `averages` are those of the scoreboard."""
    averaged = study.averaged(averages)
    found = {"warm-up": study.run, "window": study.stationary(), "averages": averaged}
    found |= {"lr / 2": study.averaged((), lr=study.run.lr / 2), "decay": study.decayed()}
    return {name: c for name, c in found.items() if name == "window" or c != study.stationary()}


def table(
    study: Study, averages: Iterable[str] = (), images_per_second: float | None = None
) -> pd.DataFrame:
    """What the shared runs take, all seeds together: images, snapshots, GB on disk and on the device, and hours.

    The network's size is counted; of a tree of images the classes are assumed, see TREES. GB on the device are of one
    run and leave out activations. Hours need a rate, of all devices together, as the progress bar of `train` shows.
    """
    classes = CLASSES.get(study.run.data) or TREES.get(study.run.image_size, 10)
    with torch.device("meta"):
        channels = 1 if study.run.data == "digits" else 3
        net = networks.build(study.run.model, channels, classes, study.run.width, study.run.norm)
    n_weights = sum(p.numel() for p in net.parameters())
    n_buffers = sum(b.numel() for b in net.buffers() if b.is_floating_point())
    rows, seeds = [], len(study.seeds)
    for name, c in shared_runs(study, averages).items():
        images = seeds * (c.steps - c.start) * c.batch_size
        row = {
            "run": name,
            "seeds": seeds,
            "steps": c.steps - c.start,
            "million images": images / 1e6,
        }
        row |= {"snapshots": len(c.snapshot_steps), "averages": len(c.averages)}
        row |= {"GB on disk": seeds * plan.disk_bytes(c, n_weights, n_buffers) / 1e9}
        row |= {"GB on device": plan.memory_bytes(c, n_weights) / 1e9}
        if images_per_second is not None:
            row["hours"] = images / images_per_second / 3600
        rows.append(row)
    return pd.DataFrame(rows).assign(weights=n_weights)
