"""A recorded run on disk: the matrix of snapshots, buffers, per-step log and states to branch from, without pickle.

A run's folder holds config.json, status.json, steps.npy (n,), weights.npy (n, P) float32, buffers.npy (n, Q),
log.npy (n_steps, 2) with the loss of batch t at x_t and the learning rate of step t, averages.npy (k, P) float32 with
the averages that were accumulated, and state-<step>.npz (weights, buffers, momentum). While it is being trained the
folder is called <name>.part and also holds resume.npz (`recorder`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from paper_lib.averaging import vectors
from paper_lib.config import RunConfig, describe
from paper_lib.validate import require

State = dict[str, np.ndarray]  # weights (P,), buffers (Q,), momentum (P,) or (0,); averages (k, P) to resume from


class SnapshotError(KeyError):
    """A step was asked for that the run did not keep."""

    def __str__(self) -> str:
        return str(self.args[0])


class DivergedError(RuntimeError):
    """A diverged run was used as if it had finished."""


@dataclass(frozen=True, eq=False)
class Trajectory:
    """A finished (or diverged) run. Arrays are mapped from disk, read-only."""

    folder: Path

    @cached_property
    def config(self) -> RunConfig:
        """The run's settings."""
        return RunConfig.from_dict(json.loads((self.folder / "config.json").read_text()))

    @cached_property
    def status(self) -> dict[str, Any]:
        """`diverged_at` (a step, or None), wall_s, device, torch, parameters."""
        return json.loads((self.folder / "status.json").read_text())

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

    @property
    def diverged(self) -> bool:
        """Whether the loss became non-finite (at step status["diverged_at"])."""
        return self.status["diverged_at"] is not None

    def rows(self, steps: np.ndarray | list[int] | int) -> np.ndarray:
        """Row numbers of snapshots by step.

        Raises DivergedError for steps after a divergence, SnapshotError for others that were not recorded.
        """
        wanted = np.atleast_1d(np.asarray(steps, dtype=np.int64))
        if wanted.size:
            self._require_before_divergence(int(wanted.max()) - 1)  # x_t itself was recorded, its loss is not finite
        rows = np.searchsorted(self.steps, wanted)
        found = rows < len(self.steps)
        found[found] = self.steps[rows[found]] == wanted[found]
        if not found.all():
            raise SnapshotError(self._missing(wanted[~found]))
        return rows

    def at(self, step: int) -> np.ndarray:
        """Weights x_step, (P,), from a snapshot or a kept state."""
        path = self.folder / f"state-{step}.npz"
        return self.state(step)["weights"] if path.exists() else self.weights[self.rows(step)[0]]

    def window(self, first: int, last: int) -> np.ndarray:
        """Every iterate x_first..x_last, (last - first + 1, P), without copying."""
        rows = self.rows(np.arange(first, last + 1))
        return self.weights[rows[0] : rows[-1] + 1]

    def average(self, a: np.ndarray) -> np.ndarray:
        """The average a @ X over all iterates x_start..x_steps, a (steps - start + 1,), as float32 (P,).

        As it was accumulated during training where the run's settings name it, else from the snapshots. Raises
        SnapshotError where one that it weighs was not kept, DivergedError for a diverged run.
        """
        config, a = self.config, vectors.check_weights(a)
        n = config.steps - config.start + 1
        require(a.shape == (n,), "an average of shape", a.shape, f"the run {self.folder.name} has {n} iterates")
        self._require_before_divergence(config.steps)
        for name, kept in zip(config.averages, self._averages, strict=True):
            if np.allclose(vectors.named(name, n), a, rtol=0, atol=1e-12):
                return kept
        weighted = np.flatnonzero(a)
        on_rows = np.zeros(len(self.steps))
        on_rows[self.rows(config.start + weighted)] = a[weighted]
        return vectors.average(on_rows, self.weights)

    @cached_property
    def _averages(self) -> np.ndarray:
        return np.load(self.folder / "averages.npy", mmap_mode="r")

    def state(self, step: int | None = None) -> State:
        """Weights, buffers and momentum at a step (default: the last), to branch from.

        Raises DivergedError for the end of a diverged run, SnapshotError where the state is not known.
        """
        step = self.config.steps if step is None else step
        self._require_before_divergence(step)
        path = self.folder / f"state-{step}.npz"
        if path.exists():
            with np.load(path, allow_pickle=False) as stored:
                return dict(stored)
        if self.config.momentum > 0:
            raise SnapshotError(
                f"no momentum was kept at step {step} of {self.folder.name}: add {step} to `checkpoints`"
            )
        row = self.rows(step)[0]
        return {"weights": self.weights[row], "buffers": self.buffers[row], "momentum": np.zeros(0, np.float32)}

    def _require_before_divergence(self, step: int) -> None:
        if self.diverged and step >= self.status["diverged_at"]:
            raise DivergedError(
                f"the run {self.folder.name} diverged at step {self.status['diverged_at']} with "
                f"lr = {self.config.lr}: lower the learning rate, or use an earlier step than {step}"
            )

    def _missing(self, steps: np.ndarray) -> str:
        have = f"{describe(self.steps)}" if len(self.steps) else "none"
        return (
            f"the run {self.folder.name} kept no snapshot of step {describe(steps)}; it has {have}. "
            f"Record it by adding e.g. '{steps[0]}-{steps[-1]}' to the run's `record` (an average over such "
            "steps can be named in its `averages` instead)"
        )
