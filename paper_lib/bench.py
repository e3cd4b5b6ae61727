"""`make bench`: what this library costs against what a user would otherwise write, both timed in the same run."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from paper_lib import averaging, models, probe, runs
from paper_lib.config import RunConfig
from paper_lib.data import Dataset
from paper_lib.presets import study

STEPS = 600
SEEDS = (0, 1, 2)


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


@contextlib.contextmanager
def empty_run_cache() -> Iterator[None]:
    """Train into a temporary folder, so that nothing is found finished."""
    before = os.environ.get("PAPER_RUNS")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PAPER_RUNS"] = folder
        try:
            yield
        finally:
            os.environ.pop("PAPER_RUNS")
            if before is not None:
                os.environ["PAPER_RUNS"] = before


def plain_loop(config: RunConfig, dataset: Dataset) -> None:
    """Train as a tutorial would: DataLoader, torch.optim.SGD, one module, default threads, nothing recorded."""
    torch.manual_seed(config.seed)
    net = models.build(config.model, dataset.shape[0], dataset.n_classes, config.width, config.norm).to(dataset.device)
    optimizer = torch.optim.SGD(net.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay)
    x, y = dataset.batch(0, dataset.sizes["train"], 0)
    loader = DataLoader(TensorDataset(x.cpu(), y.cpu()), config.batch_size, shuffle=True)
    for _, (x, y) in zip(range(config.steps), loader, strict=False):
        loss = F.cross_entropy(net(x.to(dataset.device)), y.to(dataset.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def training() -> list[dict]:
    """train_seeds against one plain loop per seed, and the cost of keeping every iterate."""
    config = study("digits", steps=STEPS, record="").run
    every = config.replace(record=f"0-{STEPS}")
    dataset = runs.load_dataset(config)
    plain = sum(seconds(lambda seed=seed: plain_loop(config.replace(seed=seed), dataset)) for seed in SEEDS)
    with empty_run_cache():
        ours = seconds(lambda: runs.train_seeds(config, SEEDS))
        recorded = seconds(lambda: runs.train_seeds(every, SEEDS))
    n = STEPS * len(SEEDS)
    return [
        row(f"train {len(SEEDS)} seeds, {STEPS} steps", n / ours, n / plain, "steps/s", "plain DataLoader + SGD loops"),
        row("the same, every iterate recorded", n / recorded, n / ours, "steps/s", "training without recording"),
    ]


def naive_losses(config: RunConfig, dataset: Dataset, states: list[dict], x: torch.Tensor, y: torch.Tensor) -> None:
    """One load_state_dict per snapshot, one forward pass per batch."""
    net = models.build(config.model, dataset.shape[0], dataset.n_classes, config.width, config.norm).train()
    with torch.no_grad():
        for state in states:
            net.load_state_dict(state, strict=False)  # flat models drop BatchNorm's batch counters
            for xs, ys in zip(x, y, strict=True):
                F.cross_entropy(net(xs), ys).item()


def probing(n_snapshots: int = 40, n_batches: int = 32) -> list[dict]:
    """probe.losses against one load_state_dict and one small-batch loop per snapshot."""
    config = study("digits", steps=n_snapshots, record=f"1-{n_snapshots}").run
    dataset = runs.load_dataset(config)
    with empty_run_cache():
        run = runs.obtain(config)
        net = runs.network(run, dataset)
        x, y = probe.fixed_batches(dataset, n_batches, config.batch_size, 0)
        states = []
        for weights in run.weights:
            net.weights.copy_(torch.from_numpy(np.array(weights)))
            states.append({name: value.clone() for name, value in net.module.state_dict().items()})
        naive = seconds(lambda: naive_losses(config, dataset, states, x, y))
        ours = seconds(lambda: probe.losses(net, run.weights, x, y))
    n = n_snapshots * n_batches
    what = f"losses of {n_batches} batches at {n_snapshots} snapshots"
    return [row(what, n / ours, n / naive, "batches/s", "load_state_dict and a loop over batches")]


def averages(n_snapshots: int = 1000, width: int = 16) -> list[dict]:
    """averaging.average of a whole window against a copy of it, and against AveragedModel.update_parameters."""
    net = models.build("resnet8", 1, 10, width)
    n_weights = sum(p.numel() for p in net.parameters())
    trajectory = np.random.default_rng(0).normal(size=(n_snapshots, n_weights)).astype(np.float32)
    target, weights = np.empty_like(trajectory), averaging.ema(n_snapshots, 0.99)
    target[:] = 0  # touch the pages before the clock runs
    copied = min(seconds(lambda: np.copyto(target, trajectory)) for _ in range(3))
    ours = min(seconds(lambda: averaging.average(weights, trajectory)) for _ in range(3))
    updated = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    update = seconds(lambda: [updated.update_parameters(net) for _ in range(n_snapshots)])
    size = trajectory.nbytes / 1e9
    what = f"EMA of {n_snapshots} snapshots of {n_weights:,} weights"
    return [
        row(what, size / ours, size / copied, "GB/s", "a copy of the snapshots"),
        row(what, n_snapshots / ours, n_snapshots / update, "snapshots/s", "torch.optim.swa_utils.AveragedModel"),
    ]


def row(what: str, ours: float, other: float, unit: str, against: str) -> dict:
    """One line of the table."""
    return {"what": what, "ours": ours, "other": other, "unit": unit, "against": against, "ratio": ours / other}


def main() -> None:
    """Run all benchmarks and print the table."""
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, {runs.train.default_device()}")
    table = pd.DataFrame([*training(), *probing(), *averages()])
    print(table.to_string(index=False, float_format=lambda v: f"{v:,.2f}"))
