"""The training loop: SGD on a flat weight vector, recorded, resumable to the same bits."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from paper_lib.config import RunConfig
from paper_lib.data import Dataset
from paper_lib.errors import require
from paper_lib.training import distributed, networks
from paper_lib.training.flat import FlatModel, NetFactory, exact_float32, forked_rng, threads

CHUNK = 25  # steps between looks at the loss, each of which waits for a GPU
RESUME_EVERY_S = 10.0  # about this much work is lost when a run is killed,
RESUME_SHARE = 0.05  # or more, where saving takes long: at most this share of the time goes into it

# weights (P,), buffers (Q,), integers (R,) where they were kept, momentum (P,) or (0,)
State = dict[str, np.ndarray]
Report = Callable[
    [int, float, float], None
]  # steps done since the last report, loss, learning rate


class Recorder(Protocol):
    """What keeps a run while it is being trained.

    steps: those whose iterates are kept, ascending.  keep: steps whose full states are kept.
    resumed: the state that a killed run left, with step, wall_s and averages; None for a new run.
    """

    steps: np.ndarray
    keep: set[int]
    resumed: State | None

    def write_log(self, first: int, losses: np.ndarray, lrs: np.ndarray) -> None:
        """Note the losses and learning rates of the steps first, first + 1, ..."""

    def snapshot(self, step: int, weights: np.ndarray, buffers: np.ndarray) -> None:
        """Keep an iterate."""

    def save_state(self, step: int, state: State) -> None:
        """Keep a full state to branch from."""

    def save_resume(self, step: int, wall_s: float, state: State) -> None:
        """Make everything up to `step` durable: a killed run goes on from here."""


# --- one step -----------------------------------------------------------------------------------


def initial_model(config: RunConfig, dataset: Dataset, net: NetFactory | None = None) -> FlatModel:
    """The network with its initial weights, which are a function of config.seed alone."""
    with forked_rng(dataset.device):
        torch.manual_seed(config.seed)
        if net is None:
            shape = dataset.shape[0], dataset.n_classes
            module = networks.build(
                config.model, *shape, config.width, config.norm, config.activation
            )
        else:
            module = net()
    return FlatModel(module, dataset.device, dataset.loss)


def batches(
    config: RunConfig, dataset: Dataset, first: int = 0
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (step, x, y) from step `first` to the run's last: this process's part of each batch."""
    part = distributed.part(dataset)
    stream = part.stream(first, config.steps, config.batch_size, config.stream)
    for step, (x, y) in enumerate(stream, start=first):
        yield step, x, y


def backward(net: FlatModel, step: int, x: Tensor, y: Tensor, config: RunConfig) -> Tensor:
    """Leave the gradient of a batch's loss in net.grad; return the loss, a scalar."""
    _seed_step(net.device, step, config)
    loss = batch_loss(net, x, y, config)
    net.backward(loss)
    return loss.detach()


def sgd_step(net: FlatModel, velocity: Tensor, lr: float, config: RunConfig) -> None:
    """One step as torch.optim.SGD takes it: v <- m v + g + wd x, x <- x - lr v, on vectors."""
    update = net.grad
    if config.weight_decay:
        update.add_(net.weights, alpha=config.weight_decay)
    if config.momentum:
        update = velocity.mul_(config.momentum).add_(update)
    net.weights.add_(update, alpha=-lr)


def batch_loss(net: FlatModel, x: Tensor, y: Tensor, config: RunConfig) -> Tensor:
    """Mean loss of a batch under the run's precision, a scalar."""
    reduced = config.precision == "bfloat16"
    autocast = (
        torch.autocast(net.device.type, torch.bfloat16) if reduced else contextlib.nullcontext()
    )
    with autocast:
        output = net.forward(x)
    return net.loss(output, y)


def _seed_step(device: torch.device, step: int, config: RunConfig) -> None:
    """Make dropout a function of (stream, step), and of the process, which has a part of the batch.

    It seeds one device, because torch.manual_seed costs a tenth of a small network's step.
    """
    generator = torch.default_generator
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generator = torch.cuda.default_generators[index]
    generator.manual_seed(distributed.own_seed(step * 1_000_003 + config.stream))


# --- states -------------------------------------------------------------------------------------


def set_state(net: FlatModel, state: State) -> Tensor:
    """Put weights and buffers into the network; return the momentum, (P,), or zeros."""
    vectors = {"weights": net.weights, "buffers": net.buffers, "integers": net.integers}
    for name in vectors.keys() & state.keys():
        vectors[name].copy_(torch.from_numpy(np.array(state[name])))
    if state["momentum"].size == 0:
        return torch.zeros_like(net.weights)
    return torch.from_numpy(state["momentum"]).to(net.device)


def get_state(net: FlatModel, momentum: Tensor | None) -> State:
    """Inverse of `set_state`, as NumPy copies; without momentum its vector is empty."""
    momentum = net.weights[:0] if momentum is None else momentum
    vectors = {"weights": net.weights, "buffers": net.buffers, "momentum": momentum}
    vectors["integers"] = net.integers
    return {name: vector.cpu().numpy().copy() for name, vector in vectors.items()}


def _perturbation(config: RunConfig, weights: Tensor) -> Tensor:
    """A Gaussian direction of norm config.perturbation * |weights|, (P,), by its seed."""
    generator = torch.Generator().manual_seed(config.seed)
    direction = torch.randn(weights.numel(), generator=generator).to(weights.device)
    return direction * (config.perturbation * weights.norm() / direction.norm())


# --- one run ------------------------------------------------------------------------------------


def train_run(
    config: RunConfig,
    dataset: Dataset,
    net: FlatModel,
    lrs: np.ndarray,
    averages: np.ndarray,
    recorder: Recorder,
    begin: State | None = None,
    report: Report = lambda steps, loss, lr: None,
) -> tuple[dict[str, Any], np.ndarray]:
    """Train from the network's weights, from `begin`, or from where a killed run stopped.

    lrs: the learning rate of each step, (n,).  averages: weight vectors over x_start..x_steps,
    (k, n + 1), accumulated on the way. Where torchrun started several processes, all of them call
    this: the recorder and `begin` of the first count.

    Returns the run's status and its averages, (k, P). A non-finite loss ends the run: status says
    at which step, `diverged_at`.
    """
    distributed.part_of_batch(config.batch_size)  # refuses one that cannot be shared
    with threads(config.threads), forked_rng(dataset.device), exact_float32(dataset.device):
        training = _Training(config, dataset, net, lrs, averages, recorder)
        first, spent = training.begin(begin)
        if first > config.start:
            report(first - config.start, float("nan"), config.lr)
        clock = time.monotonic() - spent
        if distributed.active():
            distributed.synchronize(net.module)
        diverged_at = training.take_steps(first, clock, report)
    status = {
        "diverged_at": diverged_at,
        "parameters": net.weights.numel(),
        "wall_s": round(time.monotonic() - clock, 2),
        "device": torch.cuda.get_device_name(net.device) if net.device.type == "cuda" else "cpu",
        **distributed.status(),
        "torch": torch.__version__,
    }
    return status, training.averages.sums.cpu().numpy()


class _Averages:
    """The run's averages so far: sums of iterates, weighed by each average's vector."""

    def __init__(self, vectors: np.ndarray, net: FlatModel):
        self.weighed: np.ndarray = vectors.any(0)
        self.vectors = torch.from_numpy(vectors.T.astype(np.float32)).to(net.device)
        self.sums = net.weights.new_zeros(len(vectors), net.weights.numel())

    def add(self, i: int, weights: Tensor) -> None:
        """Take in iterate i of the run, counted from its start."""
        if self.weighed[i]:
            self.sums.addr_(self.vectors[i], weights)


class _Chunk:
    """Losses and snapshots of up to CHUNK steps from `first` on, on the device until written."""

    def __init__(self, first: int) -> None:
        self.first = first
        self.diverged_at: int | None = None
        self.losses: list[Tensor] = []
        self.snapshots: list[tuple[int, Tensor, Tensor]] = []

    def write(self, recorder: Recorder, lrs: np.ndarray) -> float:
        """Write everything; note the first bad loss in `diverged_at`; return the last loss."""
        losses = distributed.mean(torch.stack(self.losses)).cpu().numpy()
        recorder.write_log(self.first, losses, lrs)
        for step, weights, buffers in self.snapshots:
            recorder.snapshot(step, weights.cpu().numpy(), buffers.cpu().numpy())
        bad = np.flatnonzero(~np.isfinite(losses))
        self.diverged_at = self.first + int(bad[0]) if bad.size else None
        return float(losses[-1])


class _Training:
    """A run in progress: the network, its momentum, its averages so far, and its recorder."""

    def __init__(
        self,
        config: RunConfig,
        dataset: Dataset,
        net: FlatModel,
        lrs: np.ndarray,
        averages: np.ndarray,
        recorder: Recorder,
    ):
        self.config, self.dataset, self.net, self.recorder = config, dataset, net, recorder
        self.velocity, self.averages = torch.zeros_like(net.weights), _Averages(averages, net)
        self.lrs, self.wanted = lrs, set(map(int, recorder.steps))
        self.next_save = time.monotonic() + RESUME_EVERY_S

    def begin(self, state: State | None) -> tuple[int, float]:
        """Put the run where it was killed, else at `state`, else leave it at the initialization.

        Returns the first step to take and the seconds spent before.
        """
        resumed, done = self.recorder.resumed, (self.config.start, 0.0)
        if resumed is not None or state is not None:
            self.velocity = set_state(self.net, state if resumed is None else resumed)
        if resumed is None:
            self.net.weights.add_(_perturbation(self.config, self.net.weights))
        else:
            self.averages.sums.copy_(torch.from_numpy(resumed["averages"]))
            done = int(resumed["step"]), float(resumed["wall_s"])
        vectors = self.net.weights, self.net.buffers, self.net.integers
        distributed.share_(*vectors, self.velocity, self.averages.sums)
        return distributed.share(done)

    def take_steps(self, first: int, clock: float, report: Report) -> int | None:
        """Take the steps from `first` to the end; return the step of divergence, or None."""
        config, start = self.config, self.config.start
        if config.compile:
            self.net.module.compile()
        self.net.module.train()
        chunk = _Chunk(first)
        for step, x, y in batches(config, self.dataset, first):
            self._keep(step, chunk)
            chunk.losses.append(backward(self.net, step, x, y, config))
            distributed.mean(self.net.grad)
            sgd_step(self.net, self.velocity, self.lrs[step - start], config)
            if len(chunk.losses) == CHUNK or step + 1 == config.steps:
                self.net.require_in_place()
                if step + 1 == config.steps:
                    self._keep(step + 1, chunk)
                loss = chunk.write(self.recorder, self.lrs[chunk.first - start : step + 1 - start])
                if chunk.diverged_at is not None:
                    advice = "look for NaN in inputs and initial weights, and for log and sqrt"
                    require(chunk.diverged_at > 0, "loss before any step", loss, advice)
                    return chunk.diverged_at
                report(len(chunk.losses), loss, self.lrs[step - start])
                chunk = _Chunk(step + 1)
                self._save(step + 1, clock)
        return None

    def _save(self, step: int, clock: float) -> None:
        """Save what a killed run goes on from, in the process that writes, where it is time."""
        now = time.monotonic()
        if now < self.next_save or not distributed.first():
            return
        state = self._state() | {"averages": self.averages.sums.cpu().numpy()}
        self.recorder.save_resume(step, now - clock, state)
        saved = time.monotonic()
        self.next_save = saved + max(RESUME_EVERY_S, (saved - now) / RESUME_SHARE)

    def _keep(self, step: int, chunk: _Chunk) -> None:
        """Keep of x_step what is wanted."""
        if step in self.wanted:
            chunk.snapshots.append((step, self.net.weights.clone(), self.net.buffers.clone()))
        self.averages.add(step - self.config.start, self.net.weights)
        if step in self.recorder.keep and step > self.config.start:
            self.recorder.save_state(step, self._state())

    def _state(self) -> State:
        return get_state(self.net, self.velocity if self.config.momentum else None)
