"""Runs trained elsewhere: `Snapshots` records one in any loop, `from_checkpoints` reads it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from paper_lib import files
from paper_lib.averaging import cooldown
from paper_lib.config import RunConfig, Study, describe, parse_record
from paper_lib.data import Dataset
from paper_lib.data.loader import stacked
from paper_lib.errors import ConfigError, require
from paper_lib.runs.identity import learning_rates, run_key
from paper_lib.runs.store import Recorder, Run, SnapshotError
from paper_lib.training.flat import FlatModel, NetFactory

# --- recording one ------------------------------------------------------------------------------


class Snapshots:
    """Saves a network at chosen steps of any training loop, and the batches that are used there.

    `record` names the steps as a run's setting does: "0-50,100-2000/50,2000-2200". One file a step,
    <folder>/step-<n>.safetensors, and <folder>/batches/step-<n>.pt; whole or not there at all.
    """

    def __init__(self, folder: Path | str, record: str):
        self.folder, self.steps = Path(folder), set(parse_record(record).tolist())

    def keep(self, step: int, net: nn.Module, batch: tuple[Any, Any] | None = None) -> None:
        """Save x_step, and the inputs and targets of the step from it, where they are recorded.

        Called before the optimizer takes the step, and once after the last one.
        """
        if step in self.steps:
            state = {name: t.detach().cpu().clone() for name, t in net.state_dict().items()}
            cooldown.save(state, self.folder / f"step-{step}.safetensors")
            if batch is not None:
                with files.replacing(_batch_file(self.folder, step)) as path:
                    torch.save(batch, path)


def _batch_file(folder: Path, step: int) -> Path:
    return folder / "batches" / f"step-{step}.pt"


# --- reading one --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Finished(Run):
    """A run that was trained elsewhere, by any optimizer; what it did not record it cannot say."""

    recorded: Path = Path()  # the folder of its checkpoints

    @property
    def optimizer(self) -> str:
        """The name of what took the steps."""
        return self.status["optimizer"]

    def batches(self, steps: int | Iterable[int], size: int | None = None) -> tuple[Any, Tensor]:
        """The batches that these steps used; of another size, or not recorded, others of the data.

        Inputs (K, B, ...) and targets (K, B, ...).
        """
        steps = list(range(steps) if isinstance(steps, int) else steps)
        paths = [_batch_file(self.recorded, step) for step in steps]
        if size not in (None, self.config.batch_size) or not all(map(Path.exists, paths)):
            return super().batches(steps, size)
        x, y = zip(*(torch.load(path, weights_only=True) for path in paths), strict=True)
        return torch.stack([stacked(each) for each in x]), torch.stack(y)

    def gradients(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Gradients g of the batches that steps first..last used, and velocities v, each (n, P).

        Of plain SGD, g is read off the iterates as well; of others it is the gradient in training
        mode, of batches that must have been recorded.
        """
        if self.optimizer == "SGD":
            return super().gradients(first, last)
        gradients = [self._gradient(step) for step in range(first, last + 1)]
        return np.stack(gradients), self.velocities(first, last)

    def _has_state(self, step: int) -> bool:
        return False  # snapshots are all that was recorded

    def _gradient(self, step: int) -> np.ndarray:
        if not _batch_file(self.recorded, step).exists():
            raise SnapshotError(f"the batch of step {step} was not recorded: give keep() batches")
        model = self.network()
        (x,), (y,) = self.batches([step])
        with model.preserved(train=True):
            model.weights.copy_(torch.from_numpy(np.array(self.at(step))))
            model.backward(model.loss(model.forward(x), y))
            return model.grad.cpu().numpy().copy()

    def part(self, config: RunConfig) -> Finished:
        """The stretch of the run that a config names by its start and end, as a run of its own."""
        first, last = np.searchsorted(self.steps, [config.start, config.steps + 1])
        cut = {"config": config.replace(seed=self.config.seed), "steps": self.steps[first:last]}
        cut |= {"weights": self.weights[first:last], "buffers": self.buffers[first:last]}
        cut |= {"_log": self._log[config.start : config.steps], "_averages": self._averages}
        one = dataclasses.replace(self)
        vars(one).update(cut)  # what a Run reads from its folder once and keeps
        return one


def parts(study: Study, config: RunConfig) -> list[Run]:
    """The stretches of a study's finished runs that a config names, a run for each seed.

    ConfigError for a run that was not trained: with other settings, or beyond their end.
    """
    there = study.run, study.stationary(), study.decayed()
    asked = (
        f"{config.steps - config.start} steps at lr = {config.lr:g}, momentum {config.momentum:g}"
    )
    allowed = "a finished run is only read: leave out what needs others, as make does"
    require(config in there, "training", asked, allowed)
    return [run.part(config) for run in study.finished if run.config.seed in study.seeds]


def from_checkpoints(
    folder: Path | str,
    dataset: Dataset,
    net: NetFactory,
    *,
    lr: float | Sequence[float],
    batch_size: int,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    optimizer: str = "SGD",
    seed: int = 0,
) -> Finished:
    """A finished run from a folder of checkpoints, of any form that `cooldown` reads.

    `lr` is one number, or that of every step; `optimizer` names what took the steps; the others
    are what the training used. The iterates are copied into a run's folder once, and found there
    again. Raises ConfigError for what cannot be read, or is not of the network that `net` makes.
    """
    found = cooldown.find([folder])
    steps = np.array([cooldown.step_of(path) for path in found])
    allowed = "each must be later than the one before, and the last at least 1"
    require(steps[-1] > 0 and (np.diff(steps) > 0).all(), "steps", steps.tolist(), allowed)
    rates = np.broadcast_to(np.asarray(lr, np.float64), steps[-1:])
    config = RunConfig(
        data=dataset.name,
        held_out=dataset.sizes["held"],
        model="own",
        batch_size=batch_size,
        lr=rates.max(),
        schedule=(rates / rates.max()).tolist(),
        momentum=momentum,
        weight_decay=weight_decay,
        steps=steps[-1],
        record=describe(steps),
        seed=seed,
    )
    loaded = functools.partial(_loaded, net, found[-1])
    place = _place(config, found, dataset, loaded)
    with files.lock(place):
        if not place.exists():
            _copy(place, config, net, found, optimizer)
    return Finished(place, dataset, loaded, Path(folder))


def _loaded(net: NetFactory, path: Path) -> nn.Module:
    """The user's network with the state of a checkpoint: what is frozen has its values from there.

    ConfigError where the file is not this network's.
    """
    module = net()
    try:
        module.load_state_dict(cooldown.load(path)[0])
    except RuntimeError as error:
        fault = " ".join(str(error).split())[:200]
        raise ConfigError(f"{path} is not of the network that net makes: {fault}") from error
    return module


def _place(config: RunConfig, found: list[Path], dataset: Dataset, net: NetFactory) -> Path:
    """The run's folder: named by the settings, the data, the network and every file's content."""
    digest = hashlib.sha256(run_key(config, dataset, net).encode())
    batches = (_batch_file(path.parent, cooldown.step_of(path)) for path in found)
    for path in [*found, *filter(Path.exists, batches)]:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    return files.folder("runs") / f"{dataset.name}-finished-{digest.hexdigest()[:12]}"


def _copy(
    place: Path, config: RunConfig, net: NetFactory, found: list[Path], optimizer: str
) -> None:
    """Write the iterates of checkpoints into a run's folder."""
    first = FlatModel(_loaded(net, found[0]))
    frozen = {n: p for n, p in first.module.named_parameters() if not p.requires_grad}
    n_weights = first.weights.numel()
    recorder = Recorder(place, config, n_weights, first.buffers.numel())
    for step, path in zip(config.snapshot_steps, tqdm(found, desc="checkpoints"), strict=True):
        model = FlatModel(_loaded(net, path))
        now = dict(model.module.named_parameters())
        changed = [name for name in frozen if not torch.equal(now[name], frozen[name])]
        allowed = f"net freezes them, but they have changed in {path}: let net leave them trainable"
        require(not changed, "parameters", changed, allowed)
        recorder.snapshot(step, model.weights.numpy(), model.buffers.numpy())
    recorder.write_log(0, np.full(config.steps, np.nan), learning_rates(config))
    status = {"diverged_at": None, "parameters": n_weights, "optimizer": optimizer}
    recorder.finish(status, np.zeros((0, n_weights), np.float32))
