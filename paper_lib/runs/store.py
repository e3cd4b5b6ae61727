"""A recorded run on disk: `Recorder` writes it while it is trained, `Run` reads it; without pickle.

A run's folder holds config.json, status.json, steps.npy (n,), weights.npy (n, P) float32,
buffers.npy (n, Q), log.npy (n_steps, 2) with the loss of batch t at x_t and the learning rate of
step t, averages.npy (k, P) float32 with the averages that were accumulated, and state-<step>.npz
(weights, buffers, momentum), and checksums.txt. While it is being trained the folder is called
<name>.part and holds resume-<step>.npz, what a killed run goes on from, and resume.txt, the
checksums of what was written until then.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from paper_lib import files
from paper_lib.averaging import vectors
from paper_lib.config import RunConfig, describe
from paper_lib.data import Dataset
from paper_lib.errors import require
from paper_lib.runs import budget, checksums
from paper_lib.runs.checksums import Sum
from paper_lib.training import loop
from paper_lib.training.flat import FlatModel, NetFactory
from paper_lib.training.loop import State


class SnapshotError(KeyError):
    """A step was asked for that the run did not keep."""

    def __str__(self) -> str:
        return str(self.args[0])


class DivergedError(RuntimeError):
    """A diverged run was used as if it had finished."""


@dataclass(frozen=True, eq=False)
class Run:
    """A finished (or diverged) run with its dataset and network. Arrays are mapped, read-only."""

    folder: Path
    dataset: Dataset = field(repr=False)
    net: NetFactory | None = field(default=None, repr=False)  # of the user; None: config.model

    # --- what it is -----------------------------------------------------------------------------

    @cached_property
    def config(self) -> RunConfig:
        """The run's settings."""
        return RunConfig(**json.loads((self.folder / "config.json").read_text()))

    @cached_property
    def status(self) -> dict[str, Any]:
        """`diverged_at` (a step, or None), wall_s, device, torch, parameters."""
        return json.loads((self.folder / "status.json").read_text())

    @property
    def diverged(self) -> bool:
        """Whether the loss became non-finite (at step status["diverged_at"])."""
        return self.status["diverged_at"] is not None

    def network(self) -> FlatModel:
        """A new network of the run's architecture, to probe with; its weights are arbitrary."""
        return loop.initial_model(self.config, self.dataset, self.net)

    # --- batches --------------------------------------------------------------------------------

    def batches(self, steps: int | Iterable[int], size: int | None = None) -> tuple[Tensor, Tensor]:
        """The training batches of these steps, (K, B, ...) and (K, B).

        B is `size`, by default the run's batch size.
        """
        return self.dataset.batches(steps, size or self.config.batch_size, self.config.stream)

    def held(self, t: int, n: int, size: int | None = None) -> tuple[Tensor, Tensor]:
        """n held-out batches for step t, (n, B, ...) and (n, B), that no other step shares."""
        steps, size = range(t * n, (t + 1) * n), size or self.config.batch_size
        return self.dataset.batches(steps, size, self.config.stream, "held")

    # --- what was recorded ----------------------------------------------------------------------

    @cached_property
    def steps(self) -> np.ndarray:
        """Steps of the snapshots, (n,), ascending."""
        return np.load(self.folder / "steps.npy")

    @cached_property
    def weights(self) -> np.ndarray:
        """The trajectory matrix X, (n, P) float32: row i is x at `steps[i]`."""
        return np.load(self.folder / "weights.npy", mmap_mode="r")[: len(self.steps)]

    @cached_property
    def buffers(self) -> np.ndarray:
        """Float buffers (BatchNorm's running statistics) of the snapshots, (n, Q)."""
        return np.load(self.folder / "buffers.npy", mmap_mode="r")[: len(self.steps)]

    @cached_property
    def loss(self) -> np.ndarray:
        """Loss of batch t at x_t for t = start, start + 1, ..., (n_steps,)."""
        return self._log[:, 0]

    @cached_property
    def lr(self) -> np.ndarray:
        """Learning rate of the step from x_t to x_{t+1}, (n_steps,)."""
        return self._log[:, 1]

    @cached_property
    def _log(self) -> np.ndarray:
        log = np.load(self.folder / "log.npy")
        return log[: self.status["diverged_at"] - self.config.start + 1] if self.diverged else log

    @cached_property
    def _averages(self) -> np.ndarray:
        return np.load(self.folder / "averages.npy", mmap_mode="r")

    def rows(self, steps: np.ndarray | list[int] | int) -> np.ndarray:
        """Row numbers of snapshots by step.

        Raises DivergedError for steps after a divergence, SnapshotError for others not recorded.
        """
        wanted = np.atleast_1d(np.asarray(steps, dtype=np.int64))
        if wanted.size:
            # x_t itself was recorded, its loss is not finite
            self._require_before_divergence(int(wanted.max()) - 1)
        rows = np.searchsorted(self.steps, wanted)
        found = rows < len(self.steps)
        found[found] = self.steps[rows[found]] == wanted[found]
        if not found.all():
            raise SnapshotError(self._missing(wanted[~found]))
        return rows

    def at(self, step: int) -> np.ndarray:
        """Weights x_step, (P,), from a snapshot or a kept state."""
        kept = self._has_state(step)
        return self.state(step)["weights"] if kept else self.weights[self.rows(step)[0]]

    def window(self, first: int, last: int) -> np.ndarray:
        """Every iterate x_first..x_last, (last - first + 1, P), without copying."""
        rows = self.rows(np.arange(first, last + 1))
        return self.weights[rows[0] : rows[-1] + 1]

    def gradients(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Gradients g and velocities v of the steps first..last, each (last - first + 1, P).

        Read off the iterates: g_t = v_t - m v_{t-1}, which includes weight decay; with momentum
        x_{first-1} is needed too. Raises SnapshotError where an iterate was not kept.
        """
        momentum, before = self.config.momentum, 1 if self.config.momentum else 0
        v = self.velocities(first - before, last)
        return v[before:] - momentum * v[: len(v) - before], v[before:]

    def velocities(self, first: int, last: int) -> np.ndarray:
        """v_t = (x_t - x_{t+1}) / lr_t of the steps first..last, (last - first + 1, P)."""
        begin, x = self.config.start, self.window(first, last + 1)
        lr = self.lr[first - begin : last + 1 - begin]
        return (x[:-1] - x[1:]) / lr[:, None].astype(np.float32)

    def average(self, a: np.ndarray) -> np.ndarray:
        """The average a @ X over all iterates x_start..x_steps, a (steps - start + 1,), (P,)
        float32.

        As it was accumulated during training where the run's settings name it, else from the
        snapshots. Raises SnapshotError where one that it weighs was not kept, DivergedError for a
        diverged run.
        """
        config, a = self.config, vectors.check_weights(a)
        n = config.steps - config.start + 1
        require(
            a.shape == (n,),
            "an average of shape",
            a.shape,
            f"the run {self.folder.name} has {n} iterates",
        )
        self._require_before_divergence(config.steps)
        for name, kept in zip(config.averages, self._averages, strict=True):
            if np.allclose(vectors.named(name, n), a, rtol=0, atol=1e-12):
                return kept
        weighed = np.flatnonzero(a)
        on_rows = np.zeros(len(self.steps))
        on_rows[self.rows(config.start + weighed)] = a[weighed]
        return vectors.average(on_rows, self.weights)

    def state(self, step: int | None = None) -> State:
        """Weights, buffers and momentum at a step (default: the last), to branch from.

        Raises DivergedError for the end of a diverged run, SnapshotError where it is not known.
        """
        step = self.config.steps if step is None else step
        self._require_before_divergence(step)
        if self._has_state(step):
            return _load(self.folder / f"state-{step}.npz")
        if self.config.momentum > 0 or self._counts:
            what = "momentum" if self.config.momentum > 0 else "integer buffer"
            raise SnapshotError(
                f"no {what} was kept at step {step} of {self.folder.name}: "
                f"add {step} to `checkpoints`"
            )
        row = self.rows(step)[0]
        none = np.zeros(0, np.float32)
        return {"weights": self.weights[row], "buffers": self.buffers[row], "momentum": none}

    def _has_state(self, step: int) -> bool:
        config = self.config
        return step > config.start and step in (*config.checkpoints, config.steps)

    @cached_property
    def _counts(self) -> bool:
        """Whether integer buffers of the network changed (perhaps, where their end is unknown)."""
        begin = self.network().integers.cpu().numpy()
        if not begin.size:
            return False
        return self.diverged or not np.array_equal(begin, self.state()["integers"])

    def _require_before_divergence(self, step: int) -> None:
        if self.diverged and step >= self.status["diverged_at"]:
            raise DivergedError(
                f"the run {self.folder.name} diverged at step {self.status['diverged_at']} with "
                f"lr = {self.config.lr}: lower the learning rate, or an earlier step than {step}"
            )

    def _missing(self, steps: np.ndarray) -> str:
        have = describe(self.steps) if len(self.steps) else "none"
        return (
            f"the run {self.folder.name} kept no snapshot of step {describe(steps)}; it has "
            f"{have}. Record it by adding e.g. '{steps[0]}-{steps[-1]}' to the run's `record` "
            "(an average over such steps can be named in its `averages` instead)"
        )


def _load(path: Path) -> State:
    with np.load(path, allow_pickle=False) as stored:
        return dict(stored)


class Recorder:
    """Writes a run into <folder>.part and moves it to <folder> when it is whole.

    A killed run finds its place again: see `loop.Recorder` for what is called when.
    """

    def __init__(self, folder: Path, config: RunConfig, n_weights: int, n_buffers: int):
        self.final, self.part = folder, folder.with_name(folder.name + ".part")
        self.config, self.steps = config, config.snapshot_steps
        self.keep = {*config.checkpoints, config.steps}
        shapes = {
            "weights": (len(self.steps), n_weights),
            "buffers": (len(self.steps), n_buffers),
            "averages": (len(config.averages), n_weights),
            "log": (config.steps - config.start, 2),
        }
        self.sums: dict[str, Sum] = {}  # of what was written, by file
        self.resumed = self._resume()
        if self.resumed is None:
            self._create(shapes)
        self.arrays = {name: np.load(self.part / f"{name}.npy", mmap_mode="r+") for name in shapes}

    def _resume(self) -> State | None:
        """The state that a killed run saved, if all that it wrote until then is what it was."""
        if not os.path.lexists(self.part):
            return None
        try:
            sums = checksums.verified(self.part, checksums.HALF)
        except checksums.DamagedError as error:
            files.say(f"{error}: the run starts again")
            return None
        for path in self.part.iterdir():  # what it wrote later, or had not yet finished
            if path.name not in {*sums, checksums.HALF}:
                files.remove(path)
        (name,) = (name for name in sums if name.startswith("resume-"))
        state = _load(self.part / name)
        files.say(f"going on from step {state['step']} of {self.config.steps}: {self.part}")
        self.sums = {file: one for file, one in sums.items() if file != name}
        return state

    def _create(self, shapes: dict[str, tuple[int, ...]]) -> None:
        files.remove(self.part)
        n_weights, n_buffers = shapes["weights"][1], shapes["buffers"][1]
        what = f"recording {len(self.steps)} snapshots of {n_weights:,} weights (4 bytes each)"
        needed = budget.disk_bytes(self.config, n_weights, n_buffers)
        files.require_space(self.part.parent, needed, what)
        self.part.mkdir(parents=True)
        for name, shape in shapes.items():
            dtype, path = "float64" if name == "log" else "float32", self.part / f"{name}.npy"
            header = files.allocate(path, shape, dtype).offset
            self.sums[path.name] = checksums.of(path, header)
        text = json.dumps(self.config.to_dict(), indent=1) + "\n"
        self._replace("config.json", lambda path: path.write_text(text))

    def _replace(self, name: str, write: Callable[[Path], Any]) -> None:
        with files.replacing(self.part / name) as path:
            write(path)
        self.sums[name] = checksums.of(self.part / name)

    def _write_rows(self, name: str, first: int, rows: np.ndarray) -> None:
        """Write rows (n, ...) that come right behind those written before."""
        array = self.arrays[name]
        array[first : first + len(rows)] = rows
        file, written = f"{name}.npy", np.ascontiguousarray(rows, array.dtype)
        self.sums[file] = self.sums[file].then(written)

    def write_log(self, first: int, losses: np.ndarray, lrs: np.ndarray) -> None:
        """Note losses and learning rates of the steps first, first + 1, ..."""
        self._write_rows("log", first - self.config.start, np.stack([losses, lrs], axis=1))

    def snapshot(self, step: int, weights: np.ndarray, buffers: np.ndarray) -> None:
        """Record x_step, which belongs to a window."""
        row = int(np.searchsorted(self.steps, step))
        self._write_rows("weights", row, weights[None])
        self._write_rows("buffers", row, buffers[None])

    def save_state(self, step: int, state: State) -> None:
        """Keep a full state to branch from."""
        self._replace(f"state-{step}.npz", lambda path: np.savez(path, **state))

    def _flush(self) -> None:
        for array in self.arrays.values():
            array.flush()

    def save_resume(self, step: int, wall_s: float, state: State) -> None:
        """Make everything up to `step` durable: a killed run goes on from here."""
        self._flush()
        name = f"resume-{step}.npz"
        self._replace(name, lambda path: np.savez(path, step=step, wall_s=wall_s, **state))
        checksums.write(self.part / checksums.HALF, self.final.name, self.sums)
        del self.sums[name]
        for path in self.part.glob("resume-*"):
            if path.name != name:
                path.unlink()

    def finish(self, status: dict[str, Any], averages: np.ndarray) -> None:
        """Describe the run, forget what a diverged one did not reach, and move it into place."""
        end = self.config.steps if status["diverged_at"] is None else status["diverged_at"]
        self.arrays["averages"][:] = averages
        self._flush()
        steps, text = self.steps[self.steps <= end], json.dumps(status, indent=1) + "\n"
        self._replace("steps.npy", lambda path: np.save(path, steps))
        self._replace("status.json", lambda path: path.write_text(text))
        for name, one in self.sums.items():
            if one.n != one.size:  # of all others it is known, from what was meant to be written
                self.sums[name] = checksums.of(self.part / name)
        checksums.write(self.part / checksums.FINISHED, self.final.name, self.sums)
        os.rename(self.part, self.final)  # the moment at which the run exists
        for path in self.final.glob("resume*"):
            path.unlink()
