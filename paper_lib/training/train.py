"""One training run: SGD on a flat weight vector, recorded, resumable to the same bits."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from paper_lib.averaging import vectors
from paper_lib.config import RunConfig
from paper_lib.data import Dataset
from paper_lib.runs import plan
from paper_lib.runs.plan import CHUNK
from paper_lib.runs.recorder import Follower, Recorder
from paper_lib.runs.trajectory import State, Trajectory
from paper_lib.training import parallel
from paper_lib.training.models import FlatModel, ModelFactory, exact_float32, forked_rng, threads
from paper_lib.training.sgd import (
    batch_loss,
    get_state,
    initial_model,
    learning_rates,
    perturbation,
    seed_step,
    set_state,
    sgd_step,
)
from paper_lib.validate import require

RESUME_EVERY_S = 10.0  # about this much work is lost when a run is killed,
RESUME_SHARE = 0.05  # or more, where saving it takes long: at most this share of the time goes into that

Report = Callable[[int, float, float], None]  # steps done since the last report, latest loss, learning rate


class _Averages:
    """The run's averages so far: sums of the iterates, weighed by each average's vector, on the device."""

    def __init__(self, config: RunConfig, net: FlatModel):
        n = config.steps - config.start + 1
        vectors = np.array([vectors.named(name, n) for name in config.averages]).reshape(-1, n)
        self.weighed = vectors.any(0)
        self.vectors = torch.from_numpy(vectors.T.astype(np.float32)).to(net.device)
        self.sums = net.weights.new_zeros(len(vectors), net.weights.numel())

    def add(self, i: int, weights: Tensor) -> None:
        """Take in iterate i of the run, counted from its start."""
        if self.weighed[i]:
            self.sums.addr_(self.vectors[i], weights)


class _Chunk:
    """Losses and snapshots of up to CHUNK steps from `first` on, kept on the device until they are written together."""

    def __init__(self, first: int) -> None:
        self.first, self.diverged_at = first, None
        self.losses: list[Tensor] = []
        self.snapshots: list[tuple[int, Tensor, Tensor]] = []

    def write(self, recorder: Recorder | Follower, lrs: np.ndarray) -> float:
        """Write everything; set `diverged_at` to the first step with a non-finite loss. Returns the last loss."""
        losses = parallel.mean(torch.stack(self.losses)).cpu().numpy()
        recorder.write_log(self.first, losses, lrs)
        for step, weights, buffers in self.snapshots:
            recorder.snapshot(step, weights.cpu().numpy(), buffers.cpu().numpy())
        bad = np.flatnonzero(~np.isfinite(losses))
        self.diverged_at = self.first + int(bad[0]) if bad.size else None
        return float(losses[-1])


class _Training:
    """A run in progress: the network, its momentum, its averages so far, and the recorder of it all."""

    def __init__(self, config: RunConfig, dataset: Dataset, net: FlatModel, recorder: Recorder | Follower):
        self.config, self.dataset, self.net, self.recorder = config, dataset, net, recorder
        self.velocity, self.averages = torch.zeros_like(net.weights), _Averages(config, net)
        self.lrs, self.wanted = learning_rates(config), set(recorder.steps.tolist())
        self.next_save = time.monotonic() + RESUME_EVERY_S

    def begin(self, state: State | None) -> tuple[int, float]:
        """Put the run where it was killed, else at `state`, else leave it at the initialization.

        Returns the first step to take and the seconds spent before.
        """
        resumed, done = self.recorder.resumed, (self.config.start, 0.0)
        if resumed is not None or state is not None:
            self.velocity = set_state(self.net, state if resumed is None else resumed)
        if resumed is None:
            self.net.weights.add_(perturbation(self.config, self.net.weights))
        else:
            self.averages.sums.copy_(torch.from_numpy(resumed["averages"]))
            done = int(resumed["step"]), float(resumed["wall_s"])
        parallel.share_(self.net.weights, self.net.buffers, self.velocity, self.averages.sums)
        parallel.distribute(self.net)
        return parallel.share(done)

    def take_steps(self, first: int, clock: float, report: Report) -> int | None:
        """Take the steps from `first` to the end; return the step of divergence, or None."""
        config = self.config
        if config.compile:
            self.net.module.compile()
        self.net.module.train()
        part = {"rank": parallel.rank(), "world": parallel.world()}
        batches = self.dataset.stream(first, config.steps, config.batch_size, config.stream, **part)
        chunk = _Chunk(first)
        for step, (x, y) in enumerate(batches, start=first):
            self._keep(step, chunk)
            chunk.losses.append(self._step(step, x, y))
            if len(chunk.losses) == CHUNK or step + 1 == config.steps:
                if step + 1 == config.steps:
                    self._keep(step + 1, chunk)
                loss = chunk.write(self.recorder, self.lrs[chunk.first - config.start : step + 1 - config.start])
                if chunk.diverged_at is not None:
                    return chunk.diverged_at
                report(len(chunk.losses), loss, self.lrs[step - config.start])
                chunk = _Chunk(step + 1)
                self._save(step + 1, clock)
        return None

    def _save(self, step: int, clock: float) -> None:
        """Save what a killed run goes on from at `step`, in the process that writes, where it is time for that."""
        now = time.monotonic()
        if now < self.next_save or parallel.rank() > 0:
            return
        state = self._state() | {"averages": self.averages.sums.cpu().numpy()}
        self.recorder.save_resume(step, now - clock, state)
        saved = time.monotonic()
        self.next_save = saved + max(RESUME_EVERY_S, (saved - now) / RESUME_SHARE)

    def _step(self, step: int, x: Tensor, y: Tensor) -> Tensor:
        """Take one step; return the loss of its batch before it."""
        seed_step(self.net.device, step, self.config)
        loss = batch_loss(self.net, x, y, self.config)
        self.net.backward(loss)
        sgd_step(self.net, self.velocity, self.lrs[step - self.config.start], self.config)
        return loss.detach()

    def _keep(self, step: int, chunk: _Chunk) -> None:
        """Keep of x_step what is wanted."""
        if step in self.wanted:
            chunk.snapshots.append((step, self.net.weights.clone(), self.net.buffers.clone()))
        self.averages.add(step - self.config.start, self.net.weights)
        if step in self.recorder.keep and step > self.config.start:
            self.recorder.save_state(step, self._state())

    def _state(self) -> State:
        return get_state(self.net, self.velocity if self.config.momentum else None)


def train_run(
    config: RunConfig,
    dataset: Dataset,
    recorder_for: Callable[[FlatModel], Recorder | Follower],
    begin: State | None = None,
    factory: ModelFactory | None = None,
    report: Report = lambda steps, loss, lr: None,
) -> Trajectory:
    """Train from the initialization, from `begin`, or from where a killed run stopped, and record it.

    Where torchrun started several processes, all of them call this: the recorder and `begin` of the first count. A
    non-finite loss ends the run: it is kept up to that step and marked as diverged. Raises MemoryError naming the
    settings to lower where the device has too little memory.
    """
    share = f"the {parallel.world()} processes that share it must divide it"
    require(config.batch_size % parallel.world() == 0, "batch_size", config.batch_size, share)
    with threads(config.threads), forked_rng(dataset.device), exact_float32(dataset.device):
        net = initial_model(config, dataset, factory)
        plan.require_memory(config, net.weights.numel(), net.device)
        training = _Training(config, dataset, net, recorder_for(net))
        first, spent = training.begin(begin)
        if first > config.start:
            report(first - config.start, float("nan"), config.lr)
        clock = time.monotonic() - spent
        try:
            diverged_at = training.take_steps(first, clock, report)
        except torch.OutOfMemoryError as error:
            raise MemoryError(_out_of_memory(config, net)) from error
    status = {
        "diverged_at": diverged_at,
        "parameters": net.weights.numel(),
        "wall_s": round(time.monotonic() - clock, 2),
        "device": torch.cuda.get_device_name(net.device) if net.device.type == "cuda" else "cpu",
        "processes": parallel.world(),
        "torch": torch.__version__,
    }
    return training.recorder.finish(status, training.averages.sums.cpu().numpy())


def _out_of_memory(config: RunConfig, net: FlatModel) -> str:
    vectors = plan.memory_bytes(config, net.weights.numel()) / 1e9
    return (
        f"{net.device} ran out of memory training {config.model} of width {config.width} with batches of "
        f"{config.batch_size // parallel.world()} in {config.precision} (vectors take {vectors:.2f} GB, activations "
        'the rest): lower `batch_size` or `width`, use precision = "bfloat16", or let torchrun share each batch'
    )
