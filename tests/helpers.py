"""What tests of training and probing share: small data, a small network, runs in a folder of their
own.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from paper_lib import data
from paper_lib.config import RunConfig
from paper_lib.training import loop


class SmallNet(nn.Module):
    """A network of a user's own: convolution, BatchNorm, dropout, linear; one channel."""

    def __init__(self, dropout: float = 0.0, activation: type[nn.Module] = nn.ReLU):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), activation(), nn.Dropout(dropout)
        )
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


def small_data(n: int = 120) -> data.Dataset:
    """Three classes of 4 x 4 noise with different means; 16 training images held out."""
    rng = np.random.default_rng(0)
    y = torch.from_numpy(rng.integers(0, 3, 2 * n))
    x = (
        torch.from_numpy(rng.normal(size=(2 * n, 1, 4, 4)).astype(np.float32))
        + y.view(-1, 1, 1, 1) / 2
    )
    return data.from_tensors(x[:n], y[:n], x[n:], y[n:], held_out=16, device="cpu")


SMALL = RunConfig(data="tensors", batch_size=8, lr=0.1, steps=40, record="0-40")


def torchrun(*words: str, n: int = 2) -> subprocess.CompletedProcess:
    """Run a script, or `-m module`, in n processes that find the tests' modules."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={n}",
        *words,
    ]
    here = os.path.dirname(__file__)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([here, *sys.path]),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def interrupt(obtain, monkeypatch, at: int, chunk: int) -> None:
    """Interrupt obtain(report) at step `at`; progress is saved every `chunk` steps, the last time
    one chunk before.
    """
    monkeypatch.setattr(loop, "CHUNK", chunk)
    monkeypatch.setattr(loop, "RESUME_EVERY_S", 0.0)
    monkeypatch.setattr(loop, "RESUME_SHARE", float("inf"))
    done = []

    def report(steps, loss, lr):
        done.append(steps)
        if sum(done) == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        obtain(report)


def interrupted(obtain, monkeypatch, at: int, chunk: int):
    """What obtain(report) returns after a first call was interrupted as above; the second must not
    start again.
    """
    interrupt(obtain, monkeypatch, at, chunk)
    done = []
    run = obtain(lambda steps, loss, lr: done.append(steps))
    assert done[0] == at - chunk
    return run
