"""`make bench`: what this library costs against what a user would otherwise write, both timed in the same run."""

from __future__ import annotations

import contextlib
import itertools
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
from torch.utils.flop_counter import FlopCounterMode

from paper_lib import averaging, data, models, probe, runs, sgd
from paper_lib import dataset as dataset_module
from paper_lib.augment import FlipCrop
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
    for x, y in itertools.islice(itertools.chain.from_iterable(itertools.repeat(loader)), config.steps):
        with torch.autocast(dataset.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
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
        *one_run(config, dataset),
        row(f"train {len(SEEDS)} seeds, {STEPS} steps", n / ours, n / plain, "steps/s", "plain DataLoader + SGD loops"),
        row("the same, every iterate recorded", n / recorded, n / ours, "steps/s", "training without recording"),
    ]


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product: what the device can do with numbers of this type."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device).to(dtype)
    return 2 * n**3 / min(seconds(lambda: a @ a) for _ in range(5))


def step_flops(config: RunConfig, dataset: Dataset) -> int:
    """FLOPs of the matrix products and convolutions of one training step, forward and backward."""
    net, (x, y) = sgd.initial_model(config, dataset), dataset.batch(0, config.batch_size, 0)
    with FlopCounterMode(display=False) as counter:
        net.backward(F.cross_entropy(net.forward(x), y))
    return counter.get_total_flops()


def one_run(config: RunConfig, dataset: Dataset) -> list[dict]:
    """One run alone, in images/s, against its floor (its FLOPs at the measured matrix rate) and a plain loop."""
    dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
    before = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    floor = config.batch_size * matrix_rate(dataset.device, dtype) / step_flops(config, dataset)
    torch.set_num_threads(before)
    images = config.steps * config.batch_size
    plain = images / seconds(lambda: plain_loop(config, dataset))
    with empty_run_cache():
        ours = images / runs.obtain(config, dataset).status["wall_s"]
    what = f"train {config.model}, width {config.width}, batch {config.batch_size}, {config.precision}"
    return [
        row(what, ours, floor, "images/s", "its FLOPs at the matrix rate (floor)"),
        row(what, ours, plain, "images/s", "plain DataLoader + SGD loop, all threads"),
    ]


def large_run() -> list[dict]:
    """The preset cifar10's network on a GPU, on random images of CIFAR's shape; nothing where there is no GPU."""
    device = data.default_device()
    if device.type != "cuda":
        return []
    config = study("cifar10", steps=STEPS, record="").run
    x, y = torch.randint(256, (50_000, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (50_000,))
    images, labels = {"train": x, "test": x[:100]}, {"train": y, "test": y[:100]}
    dataset = dataset_module.TensorDataset("random", images, labels, 10, augment=FlipCrop(4), content="random").to(
        device
    )
    return one_run(config, dataset)


def naive_losses(config: RunConfig, dataset: Dataset, states: list[dict], x: torch.Tensor, y: torch.Tensor) -> None:
    """One load_state_dict per snapshot, one forward pass per batch."""
    net = models.build(config.model, dataset.shape[0], dataset.n_classes, config.width, config.norm)
    net.to(dataset.device).train()
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
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, {data.default_device()}")
    table = pd.DataFrame([*training(), *large_run(), *probing(), *averages()])
    print(table.to_string(index=False, float_format=lambda v: f"{v:,.2f}"))
