"""`make bench`: what this library costs against what a user would otherwise write, in one run."""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
from collections.abc import Iterable, Iterator
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.profiling import profile_step, seconds
from paper_lib import data, runs
from paper_lib.averaging import vectors
from paper_lib.config import RunConfig
from paper_lib.data import Dataset
from paper_lib.data import dataset as dataset_module
from paper_lib.data.augment import FlipCrop
from paper_lib.presets import study
from paper_lib.probing import probe
from paper_lib.training import loop, networks
from paper_lib.training.flat import threads

STEPS = 600
SEEDS = (0, 1, 2)


@contextlib.contextmanager
def empty_run_cache() -> Iterator[None]:
    """Train into a temporary folder, so that nothing is found finished."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, PAPER_RUNS=folder):
        yield


def plain_network(config: RunConfig, dataset: Dataset) -> torch.nn.Module:
    """The network of a run as a plain module, freshly initialized."""
    shape = (dataset.shape[0], dataset.n_classes)
    net = networks.build(config.model, *shape, config.width, config.norm, config.activation)
    return net.to(dataset.device)


def plain_loop(config: RunConfig, dataset: Dataset) -> None:
    """Train as a tutorial would: DataLoader, torch.optim.SGD, default threads, nothing recorded."""
    torch.manual_seed(config.seed)
    net, decay = plain_network(config, dataset), config.weight_decay
    optimizer = torch.optim.SGD(net.parameters(), config.lr, config.momentum, weight_decay=decay)
    bfloat16 = config.precision == "bfloat16"
    x, y = dataset.batch(0, dataset.sizes["train"], 0)
    loader = DataLoader(TensorDataset(x.cpu(), y.cpu()), config.batch_size, shuffle=True)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    for x, y in itertools.islice(batches, config.steps):
        with torch.autocast(dataset.device.type, torch.bfloat16, enabled=bfloat16):
            loss = F.cross_entropy(net(x.to(dataset.device)), y.to(dataset.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def single_runs() -> Iterator[tuple[RunConfig, Dataset]]:
    """Runs that are timed alone: one on the digits; on a GPU, one as cifar10 on random images."""
    config = study("digits", steps=STEPS, record="").run
    yield config, runs.load_dataset(config)
    device = data.default_device()
    if device.type == "cuda":
        x = torch.randint(256, (50_000, 3, 32, 32), dtype=torch.uint8)
        y = torch.randint(10, (50_000,))
        images, labels = {"train": x, "test": x[:100]}, {"train": y, "test": y[:100]}
        options = {"augment": FlipCrop(4), "content": "random"}
        random = dataset_module.TensorDataset("random", images, labels, 10, **options)
        yield study("cifar10", steps=STEPS, record="").run, random.to(device)


def training() -> Iterator[dict]:
    """train_seeds against one plain loop per seed, and the cost of keeping every iterate."""
    config = study("digits", steps=STEPS, record="").run
    dataset, n = runs.load_dataset(config), STEPS * len(SEEDS)
    plain = seconds(lambda: [plain_loop(config.replace(seed=seed), dataset) for seed in SEEDS])
    with empty_run_cache():
        ours = seconds(lambda: runs.train_seeds(config, SEEDS))
        what = f"train {len(SEEDS)} seeds, {STEPS} steps"
        yield row(what, n / ours, n / plain, "steps/s", "plain DataLoader + SGD loops")
        recorded = seconds(lambda: runs.train_seeds(config.replace(record=f"0-{STEPS}"), SEEDS))
    what = "the same, every iterate recorded"
    yield row(what, n / recorded, n / ours, "steps/s", "training without recording")


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product: what the device can do with numbers of this type."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device).to(dtype)
    return 2 * n**3 / min(seconds(lambda: a @ a) for _ in range(5))


def step_flops(config: RunConfig, dataset: Dataset) -> int:
    """FLOPs of the matrix products and convolutions of one training step, forward and backward."""
    net, (x, y) = loop.initial_model(config, dataset), dataset.batch(0, config.batch_size, 0)
    with FlopCounterMode(display=False) as counter:
        net.backward(F.cross_entropy(net.forward(x), y))
    return counter.get_total_flops()


def one_run(config: RunConfig, dataset: Dataset) -> Iterator[dict]:
    """One run alone, in images/s, against its floor (FLOPs at the matrix rate) and a plain loop."""
    dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
    with threads(config.threads):
        floor = config.batch_size * matrix_rate(dataset.device, dtype) / step_flops(config, dataset)
    images = config.steps * config.batch_size
    with empty_run_cache():
        ours = images / runs.obtain(config, dataset).status["wall_s"]
    yield row(title(config), ours, floor, "images/s", "its FLOPs at the matrix rate (floor)")
    plain = images / seconds(lambda: plain_loop(config, dataset))
    yield row(title(config), ours, plain, "images/s", "plain DataLoader + SGD loop, all threads")


def title(config: RunConfig) -> str:
    """What a row says of a run."""
    c = config
    return f"train {c.model}, width {c.width}, batch {c.batch_size}, {c.precision}"


def naive_losses(
    net: torch.nn.Module, states: list[dict], x: torch.Tensor, y: torch.Tensor
) -> None:
    """One load_state_dict per snapshot, one forward pass per batch."""
    net.train()
    with torch.no_grad():
        for state in states:
            net.load_state_dict(state, strict=False)  # flat models drop BatchNorm's batch counters
            for xs, ys in zip(x, y, strict=True):
                F.cross_entropy(net(xs), ys).item()


def probing(n_snapshots: int = 40, n_batches: int = 32) -> Iterator[dict]:
    """probe.losses against one load_state_dict and one small-batch loop per snapshot."""
    config = study("digits", steps=n_snapshots, record=f"1-{n_snapshots}").run
    dataset = runs.load_dataset(config)
    with empty_run_cache():
        run = runs.obtain(config)
        net = run.network()
        x, y = probe.fixed_batches(dataset, n_batches, config.batch_size, 0)
        states = []
        for weights in run.weights:
            net.weights.copy_(torch.from_numpy(np.array(weights)))
            states.append({name: value.clone() for name, value in net.module.state_dict().items()})
        plain = plain_network(config, dataset)
        naive = seconds(lambda: naive_losses(plain, states, x, y))
        ours = seconds(lambda: probe.losses(net, run.weights, x, y))
    n = n_snapshots * n_batches
    what = f"losses of {n_batches} batches at {n_snapshots} snapshots"
    yield row(what, n / ours, n / naive, "batches/s", "load_state_dict and a loop over batches")


def averages(n_snapshots: int = 1000, width: int = 16) -> Iterator[dict]:
    """vectors.average of a whole window against a copy of it, and against torch's AveragedModel."""
    net = networks.build("resnet8", 1, 10, width)
    n_weights = sum(p.numel() for p in net.parameters())
    trajectory = np.random.default_rng(0).normal(size=(n_snapshots, n_weights)).astype(np.float32)
    target, weights = np.empty_like(trajectory), vectors.ema(n_snapshots, 0.99)
    target[:] = 0  # touch the pages before the clock runs
    copied = min(seconds(lambda: np.copyto(target, trajectory)) for _ in range(3))
    ours = min(seconds(lambda: vectors.average(weights, trajectory)) for _ in range(3))
    updated = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    update = seconds(lambda: [updated.update_parameters(net) for _ in range(n_snapshots)])
    size = trajectory.nbytes / 1e9
    what = f"EMA of {n_snapshots} snapshots of {n_weights:,} weights"
    yield row(what, size / ours, size / copied, "GB/s", "a copy of the snapshots")
    other = "torch.optim.swa_utils.AveragedModel"
    yield row(what, n_snapshots / ours, n_snapshots / update, "snapshots/s", other)


def row(what: str, ours: float, other: float, unit: str, against: str) -> dict:
    """One line of the table."""
    rates = {"ours": ours, "other": other, "ratio": ours / other}
    return {"what": what, "unit": unit, "against": against, **rates}


def print_rows(rows: Iterable[dict]) -> None:
    """Print the table, each row when it has been measured."""
    line = "{what:<51} {ours:>12} {other:>12} {ratio:>8}  {unit:<11}  {against}"
    head = {name: name for name in ("ours", "other", "ratio")}
    print(line.format(what="", unit="", against="other is", **head))
    for one in rows:
        numbers = {name: f"{one[name]:,.2f}" for name in ("ours", "other", "ratio")}
        print(line.format(**one | numbers), flush=True)


def main() -> None:
    """Run all benchmarks; print the table, and where the steps of single runs spend their time."""
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, {data.default_device()}")
    alone = list(single_runs())
    others = training(), probing(), averages()
    print_rows(itertools.chain(*itertools.starmap(one_run, alone), *others))
    for config, dataset in alone:
        print(f"\n{title(config)}: {profile_step(config, dataset)}")


if __name__ == "__main__":
    main()
