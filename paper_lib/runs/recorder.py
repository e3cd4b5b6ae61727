"""Writing a run: its folder while it is being trained, what a killed run resumes from, and the end of it.

The files are described in `trajectory`, which reads them.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from paper_lib import files
from paper_lib.config import RunConfig
from paper_lib.runs import plan
from paper_lib.runs.trajectory import State, Trajectory


class Recorder:
    """Writes a run into <folder>.part and moves it to <folder> when it is whole; a killed run finds its place again."""

    def __init__(self, folder: Path, config: RunConfig, n_weights: int, n_buffers: int):
        self.final, self.part, self.config = folder, folder.with_name(folder.name + ".part"), config
        self.steps = config.snapshot_steps
        self.keep = {*config.checkpoints, config.steps}
        shapes = {
            "weights": (len(self.steps), n_weights),
            "buffers": (len(self.steps), n_buffers),
            "averages": (len(config.averages), n_weights),
            "log": (config.steps - config.start, 2),
        }
        self.resumed = self._resume(shapes)
        if self.resumed is None:
            self._create(shapes)
        self.weights, self.buffers, self.averages, self.log = (self._map(name) for name in shapes)

    def _map(self, name: str, mode: str = "r+") -> np.ndarray:
        return np.load(self.part / f"{name}.npy", mmap_mode=mode)

    def _resume(self, shapes: dict[str, tuple[int, ...]]) -> State | None:
        """The state that a killed run saved, if all that it left can be read."""
        try:
            with np.load(self.part / "resume.npz", allow_pickle=False) as stored:
                state = dict(stored)
            # Read-only: mapped to be written, a file that was cut short would be filled up with zeros.
            whole = all(self._map(name, "r").shape == shape for name, shape in shapes.items())
            return state if whole else None
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            return None

    def _create(self, shapes: dict[str, tuple[int, ...]]) -> None:
        shutil.rmtree(self.part, ignore_errors=True)
        n_weights, n_buffers = shapes["weights"][1], shapes["buffers"][1]
        what = f"recording {len(self.steps)} snapshots of {n_weights:,} weights (4 bytes each)"
        files.require_space(self.part.parent, plan.disk_bytes(self.config, n_weights, n_buffers), what)
        self.part.mkdir(parents=True)
        for name, shape in shapes.items():
            files.allocate(self.part / f"{name}.npy", shape, "float64" if name == "log" else "float32")

    def write_log(self, first: int, losses: np.ndarray, lrs: np.ndarray) -> None:
        """Note losses and learning rates of the steps first, first + 1, ..."""
        begin = first - self.config.start
        self.log[begin : begin + len(losses)] = np.stack([losses, lrs], axis=1)

    def snapshot(self, step: int, weights: np.ndarray, buffers: np.ndarray) -> None:
        """Record x_step, which belongs to a window."""
        row = np.searchsorted(self.steps, step)
        self.weights[row], self.buffers[row] = weights, buffers

    def save_state(self, step: int, state: State) -> None:
        """Keep a full state to branch from."""
        with files.replacing(self.part / f"state-{step}.npz") as path:
            np.savez(path, **state)

    def save_resume(self, step: int, wall_s: float, state: State) -> None:
        """Make everything up to `step` durable: a killed run goes on from here."""
        for array in (self.weights, self.buffers, self.log):
            array.flush()
        with files.replacing(self.part / "resume.npz") as path:
            np.savez(path, step=step, wall_s=wall_s, **state)

    def finish(self, status: dict[str, Any], averages: np.ndarray) -> Trajectory:
        """Describe the run, forget what a diverged one did not reach, and move the folder into place."""
        end = self.config.steps if status["diverged_at"] is None else status["diverged_at"]
        self.averages[:] = averages
        for array in (self.weights, self.buffers, self.averages, self.log):
            array.flush()
        with files.replacing(self.part / "steps.npy") as path:
            np.save(path, self.steps[self.steps <= end])
        for name, values in (("config", self.config.to_dict()), ("status", status)):
            with files.replacing(self.part / f"{name}.json") as path:
                path.write_text(json.dumps(values, indent=1) + "\n")
        os.rename(self.part, self.final)  # the moment at which the run exists
        (self.final / "resume.npz").unlink(missing_ok=True)
        return Trajectory(self.final)


class Follower:
    """Stands in for the Recorder in processes that help to train a run and write nothing."""

    resumed = None

    def __init__(self, folder: Path):
        self.final, self.steps, self.keep = folder, np.zeros(0, np.int64), set()

    def write_log(self, first: int, losses: np.ndarray, lrs: np.ndarray) -> None:
        """Nothing."""

    def finish(self, status: dict[str, Any], averages: np.ndarray) -> Trajectory:
        """The run, which the Recorder's process finishes."""
        return Trajectory(self.final)
