"""One training run: SGD on a flat weight vector, recorded, resumable to the same bits."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paper_lib import models, schedules
from paper_lib.config import RunConfig
from paper_lib.data import Dataset
from paper_lib.models import FlatModel
from paper_lib.trajectory import Recorder, State, Trajectory

CHUNK = 25  # steps between looks at the loss: on a GPU each look waits for the device
RESUME_EVERY_S = 10.0  # at most this much work is lost when a run is killed

Report = Callable[[int, float, float], None]  # steps done since the last report, latest loss, learning rate
ModelFactory = Callable[[], nn.Module]


def default_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def initial_model(config: RunConfig, dataset: Dataset, factory: ModelFactory | None = None) -> FlatModel:
    """Return the network with its initial weights, which are a function of config.seed alone."""
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        if factory is None:
            module = models.build(config.model, dataset.shape[0], dataset.n_classes, config.width, config.norm)
        else:
            module = factory()
    return FlatModel(module, dataset.device)


def set_state(net: FlatModel, state: State) -> Tensor:
    """Put weights and buffers into the network; return the momentum vector, (P,), zero if the state has none."""
    net.weights.copy_(torch.from_numpy(np.array(state["weights"])))
    net.buffers.copy_(torch.from_numpy(np.array(state["buffers"])))
    if state["momentum"].size == 0:
        return torch.zeros_like(net.weights)
    return torch.from_numpy(state["momentum"]).to(net.device)


def get_state(net: FlatModel, momentum: Tensor) -> State:
    """Inverse of `set_state`, as NumPy copies."""
    vectors = {"weights": net.weights, "buffers": net.buffers, "momentum": momentum}
    return {name: vector.cpu().numpy().copy() for name, vector in vectors.items()}


def perturbation(config: RunConfig, weights: Tensor) -> Tensor:
    """A Gaussian direction of norm config.perturbation * |weights|, (P,), a function of config.seed."""
    generator = torch.Generator().manual_seed(config.seed)
    direction = torch.randn(weights.numel(), generator=generator).to(weights.device)
    return direction * (config.perturbation * weights.norm() / direction.norm())


def learning_rates(config: RunConfig) -> np.ndarray:
    """Learning rate of each step of the run, (steps - start,)."""
    n_steps = config.steps - config.start
    named = isinstance(config.schedule, str)
    factors = schedules.factors(config.schedule, n_steps) if named else np.array(config.schedule)
    return config.lr * factors


def sgd_step(net: FlatModel, velocity: Tensor, lr: float, config: RunConfig) -> None:
    """One step as torch.optim.SGD takes it: v <- m v + g + wd x, x <- x - lr v, on whole vectors."""
    update = net.grad
    if config.weight_decay:
        update.add_(net.weights, alpha=config.weight_decay)
    if config.momentum:
        update = velocity.mul_(config.momentum).add_(update)
    net.weights.add_(update, alpha=-lr)


def batch_loss(net: FlatModel, x: Tensor, y: Tensor, config: RunConfig) -> Tensor:
    """Mean cross-entropy of a batch under the run's precision and label smoothing, a scalar."""
    reduced = config.precision == "bfloat16"
    autocast = torch.autocast(net.device.type, torch.bfloat16) if reduced else contextlib.nullcontext()
    with autocast:
        logits = net.forward(x)
    return F.cross_entropy(logits.float(), y, label_smoothing=config.label_smoothing)


class _Chunk:
    """Losses and snapshots of up to CHUNK steps, kept on the device until they are written together."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.snapshots: list[tuple[int, Tensor, Tensor]] = []

    def keep_snapshot(self, step: int, net: FlatModel) -> None:
        self.snapshots.append((step, net.weights.clone(), net.buffers.clone()))

    def write(self, recorder: Recorder, first: int, lrs: np.ndarray) -> int | None:
        """Write the chunk whose steps begin at `first`; return the first step with a non-finite loss, if any."""
        losses = torch.stack(self.losses).cpu().numpy()
        begin = first - recorder.config.start
        recorder.log[begin : begin + len(losses), 0] = losses
        recorder.log[begin : begin + len(losses), 1] = lrs[begin : begin + len(losses)]
        for step, weights, buffers in self.snapshots:
            recorder.snapshot(step, weights.cpu().numpy(), buffers.cpu().numpy())
        bad = np.flatnonzero(~np.isfinite(losses))
        return first + int(bad[0]) if bad.size else None


@contextlib.contextmanager
def _fixed_threads(n_threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _seed(device: torch.device, seed: int) -> None:
    """torch.manual_seed for one device: the general one costs a tenth of a small network's step."""
    generator = torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator
    generator.manual_seed(seed)


def train_run(
    config: RunConfig,
    dataset: Dataset,
    recorder_for: Callable[[FlatModel], Recorder],
    begin: State | None = None,
    factory: ModelFactory | None = None,
    report: Report = lambda steps, loss, lr: None,
) -> Trajectory:
    """Train from the initialization, from `begin`, or from where a killed run stopped, and record it.

    A non-finite loss ends the run: it is kept up to that step and marked as diverged.
    """
    with _fixed_threads(config.threads), torch.random.fork_rng():
        net = initial_model(config, dataset, factory)
        recorder = recorder_for(net)
        resumed = recorder.resumed
        velocity = torch.zeros_like(net.weights)
        if resumed is not None or begin is not None:
            velocity = set_state(net, resumed if resumed is not None else begin)
        if resumed is None:
            net.weights.add_(perturbation(config, net.weights))
        first = config.start if resumed is None else int(resumed["step"])
        spent = 0.0 if resumed is None else float(resumed["wall_s"])
        if first > config.start:
            report(first - config.start, float("nan"), config.lr)
        clock = time.monotonic() - spent
        diverged_at = _steps(config, dataset, net, velocity, recorder, first, clock, report)
    status = {
        "diverged_at": diverged_at,
        "parameters": net.weights.numel(),
        "wall_s": round(time.monotonic() - clock, 2),
        "device": torch.cuda.get_device_name() if net.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    return recorder.finish(status)


def _steps(
    config: RunConfig,
    dataset: Dataset,
    net: FlatModel,
    velocity: Tensor,
    recorder: Recorder,
    first: int,
    clock: float,
    report: Report,
) -> int | None:
    """Take the steps first..config.steps; return the step of divergence, or None."""
    lrs, wanted = learning_rates(config), set(recorder.steps.tolist())
    chunk, chunk_start, last_save = _Chunk(), first, time.monotonic()
    if config.compile:
        net.module.compile()
    net.module.train()
    batches = dataset.stream(first, config.steps, config.batch_size, config.stream)
    for step, (x, y) in enumerate(batches, start=first):
        if step in wanted:
            chunk.keep_snapshot(step, net)
        if step in recorder.keep and step > config.start:
            recorder.save_state(step, get_state(net, velocity))
        _seed(net.device, step * 1_000_003 + config.stream)  # dropout: a function of (stream, step)
        loss = batch_loss(net, x, y, config)
        net.backward(loss)
        sgd_step(net, velocity, lrs[step - config.start], config)
        chunk.losses.append(loss.detach())
        if len(chunk.losses) == CHUNK or step + 1 == config.steps:
            if step + 1 == config.steps and config.steps in wanted:
                chunk.keep_snapshot(config.steps, net)
            diverged_at = chunk.write(recorder, chunk_start, lrs)
            if diverged_at is not None:
                return diverged_at
            report(len(chunk.losses), float(chunk.losses[-1]), lrs[step - config.start])
            chunk, chunk_start = _Chunk(), step + 1
            if time.monotonic() - last_save > RESUME_EVERY_S:
                recorder.save_resume(step + 1, time.monotonic() - clock, get_state(net, velocity))
                last_save = time.monotonic()
    recorder.save_state(config.steps, get_state(net, velocity))
    return None
