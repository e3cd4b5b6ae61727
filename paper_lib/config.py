"""What a run and a study are: frozen dataclasses, their validation, and where things are kept."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from paper_lib.averaging import schedules, vectors
from paper_lib.validate import ConfigError, check_names, check_types, field_names, require

ROOT = Path(__file__).resolve().parent.parent


def folder(kind: str) -> Path:
    """Return where `kind` ("data", "results" or "runs") lives: $PAPER_<KIND>, else a folder of the repository."""
    return Path(os.environ.get(f"PAPER_{kind.upper()}") or ROOT / kind)


@dataclass(frozen=True)
class RunConfig:
    """Everything that determines one training run, and nothing else.

    A run takes the weights x_start (its initialization, or a state of `parent`) to x_steps; the step from x_t to
    x_{t+1} uses batch t of the stream `batch_seed` and the learning rate lr * factor_t of `schedule`, whose horizon
    is steps - start. Steps are absolute: a branch goes on counting, so by default it sees its parent's batches.
    """

    data: str = "digits"  # digits, cifar10, cifar100, imagefolder, or the name of a dataset of your own
    held_out: int = 8000  # training images that are never trained on; they serve as held-out batches
    image_size: int = 0  # pixels, for imagefolder alone, which needs it; 0: as the data are
    model: str = "resnet8"
    width: int = 8  # channels of the first stage
    norm: str = "batch"  # batch, group or none
    batch_size: int = 64
    lr: float = 1.0
    schedule: str | tuple[float, ...] = "constant"  # a name of schedules.py, or one multiple of lr per step
    momentum: float = 0.0
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    steps: int = 1500  # the step at which the run ends
    record: str = ""  # snapshots kept: "0-50,100-1500/25" is x_0..x_50 and every 25th from x_100 to x_1500
    checkpoints: tuple[int, ...] = ()  # steps at which momentum is kept too, to branch from (the end always is)
    averages: tuple[str, ...] = ()  # of x_start..x_steps, accumulated on the way: "EMA 0.99", "uniform 400", ...
    seed: int = 0  # initialization
    batch_seed: int | None = None  # batch stream; None: the same as seed
    precision: str = "float32"  # float32, or bfloat16 autocast on float32 weights
    compile: bool = False  # torch.compile the forward pass: other last bits
    threads: int = 1  # CPU threads of the run: other last bits
    parent: RunConfig | None = None
    start: int = 0
    perturbation: float = 0.0  # random displacement of the start, relative to the norm of its weights

    def __post_init__(self) -> None:
        check_types(self)
        check_run(self)

    @property
    def stream(self) -> int:
        """The seed of the batch stream."""
        return self.seed if self.batch_seed is None else self.batch_seed

    @property
    def snapshot_steps(self) -> np.ndarray:
        """Steps of the recorded snapshots, ascending, shape (n_snapshots,)."""
        return parse_record(self.record)

    def replace(self, **changes: Any) -> RunConfig:
        """Return a copy with some fields changed (a new seed also reaches the parents)."""
        check_names(changes, field_names(RunConfig), "run setting")
        if "seed" in changes and self.parent is not None and "parent" not in changes:
            changes["parent"] = self.parent.replace(seed=changes["seed"])
        return dataclasses.replace(self, **changes)

    def branch(self, n_steps: int, at: int | None = None, **changes: Any) -> RunConfig:
        """Return the run that leaves this one at step `at` (default: its end) and takes n_steps more.

        It inherits every setting but `schedule` ("constant") and `record`, `checkpoints`, `averages` and `perturbation`
        (none), unless changed.
        """
        at = self.steps if at is None else at
        base = {"schedule": "constant", "record": "", "checkpoints": (), "averages": (), "perturbation": 0.0}
        return self.replace(**{**base, "parent": self, "start": at, "steps": at + n_steps, **changes})

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON-ready values, parents nested."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunConfig:
        """Inverse of `to_dict`."""
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        if values.get("parent") is not None:
            values["parent"] = cls.from_dict(values["parent"])
        return cls(**values)


@dataclass(frozen=True)
class Study:
    """What the notebooks of one preset share: a warm-up to stationarity, windows after it, seeds and probe sizes."""

    preset: str
    run: RunConfig  # the warm-up: from initialization to the stationary state at a constant learning rate
    window: int = 800  # steps after the warm-up, every iterate recorded
    horizon: int = 0  # steps after the warm-up over which the scoreboard averages; 0: the window
    decay: int = 800  # steps in which a decayed run takes the learning rate to zero
    seeds: tuple[int, ...] = (0, 1, 2)
    probe_batches: int = 16  # snapshots, or batches, per seed in a probe
    eval_batches: int = 128  # batches in an estimate of the training loss
    eval_images: int = 2500  # training images, and test images, in an evaluation of weights
    label: str = field(default="", repr=False)  # how figures name the setting
    custom: str = field(default="", repr=False)  # six digits that stand for settings that differ from the preset's

    def __post_init__(self) -> None:
        check_types(self)
        check_study(self)

    @property
    def results(self) -> Path:
        """Folder of the results: that of the preset, unless settings were changed, whose results are others."""
        return folder("results") / (f"{self.preset}-{self.custom}" if self.custom else self.preset)

    @property
    def averaged_steps(self) -> int:
        """Steps over which the scoreboard averages."""
        return self.horizon or self.window

    def stationary(self, n_steps: int | None = None, **changes: Any) -> RunConfig:
        """The constant-learning-rate run after the warm-up, every iterate recorded (all of `window` by default)."""
        n_steps = self.window if n_steps is None else n_steps
        start = self.run.steps
        return self.run.branch(n_steps, **{"record": f"{start}-{start + n_steps}", **changes})

    def averaged(self, names: Iterable[str], **changes: Any) -> RunConfig:
        """The run whose averages the scoreboard shows: the window itself, or a longer run that keeps these alone."""
        if self.averaged_steps == self.window:
            return self.stationary(**changes)
        return self.stationary(self.averaged_steps, record="", averages=tuple(names), **changes)

    def decayed(self, **changes: Any) -> RunConfig:
        """The fully trained network: the warm-up followed by a linear decay of the learning rate to zero."""
        return self.run.branch(self.decay, **{"schedule": "linear", **changes})


def check_run(c: RunConfig) -> None:
    """Raise ConfigError where a run's settings cannot work."""
    for name in ("lr", "momentum", "weight_decay", "label_smoothing", "perturbation"):
        require(math.isfinite(getattr(c, name)), name, getattr(c, name), "it must be finite")
    require(c.lr > 0, "lr", c.lr, "the learning rate must be > 0")
    require(0 <= c.momentum < 1, "momentum", c.momentum, "it must lie in [0, 1)")
    for name in ("weight_decay", "perturbation"):
        require(getattr(c, name) >= 0, name, getattr(c, name), "it must be >= 0")
    require(0 <= c.label_smoothing < 1, "label_smoothing", c.label_smoothing, "it must lie in [0, 1)")
    for name in ("width", "batch_size", "threads"):
        require(getattr(c, name) >= 1, name, getattr(c, name), "it must be at least 1")
    for name in ("held_out", "image_size", "seed", "start"):
        require(getattr(c, name) >= 0, name, getattr(c, name), "it must be >= 0")
    require((c.batch_seed or 0) >= 0, "batch_seed", c.batch_seed, "it must be >= 0")
    needed = c.data == "imagefolder"
    require(c.image_size > 0 or not needed, "image_size", c.image_size, "a tree of images needs the size to load at")
    require(c.norm in ("batch", "group", "none"), "norm", c.norm, "batch, group or none")
    require(c.precision in ("float32", "bfloat16"), "precision", c.precision, "float32 or bfloat16")
    require(c.steps > c.start, "steps", c.steps, f"the run starts at step {c.start} and must take at least one")
    require(c.start == 0 or c.parent is not None, "start", c.start, "only a branch (see `branch`) starts later")
    if c.parent is not None:
        require(c.start <= c.parent.steps, "start", c.start, f"the parent run ends at step {c.parent.steps}")
    if isinstance(c.schedule, str):
        check_names([c.schedule], list(schedules.COOLDOWNS), "schedule")
    else:
        n, expected = len(c.schedule), c.steps - c.start
        require(n == expected, "schedule of length", n, f"it needs one factor for each of {expected} steps")
    for name in c.averages:
        try:
            vectors.named(name, c.steps - c.start + 1)
        except ValueError as error:
            raise ConfigError(f"averages = {c.averages!r} is not allowed: {error}") from None
    for name, kept in (("record", c.snapshot_steps), ("checkpoints", np.array(c.checkpoints, int))):
        outside = describe(kept[(kept < c.start) | (kept > c.steps)])
        allowed = f"step {outside} lies outside the run, which goes from {c.start} to {c.steps}"
        require(not outside, name, getattr(c, name), allowed)


def check_study(s: Study) -> None:
    """Raise ConfigError where a study's settings cannot work."""
    for name in ("window", "decay", "probe_batches", "eval_batches", "eval_images"):
        require(getattr(s, name) >= 1, name, getattr(s, name), "it must be at least 1")
    require(s.horizon >= 0, "horizon", s.horizon, "it must be >= 0; 0 stands for the window")
    check_seeds(s.seeds)


def check_seeds(seeds: Sequence[int]) -> None:
    """Raise ConfigError unless these are seeds: one or more integers >= 0 that do not repeat."""
    is_sequence = isinstance(seeds, Sequence | np.ndarray)
    integers = is_sequence and all(isinstance(seed, int | np.integer) for seed in seeds)
    require(integers, "seeds", seeds, "give a sequence of integers, such as [0, 1, 2]")
    require(len(seeds) > 0, "seeds", seeds, "name at least one")
    require(len(set(seeds)) == len(seeds), "seeds", seeds, "each seed may stand only once")
    require(min(seeds) >= 0, "seeds", seeds, "they must be >= 0")


def parse_record(record: str) -> np.ndarray:
    """Turn "0-50,100-1500/25" (both ends included) into ascending snapshot steps, shape (n,)."""
    steps: set[int] = set()
    for part in filter(None, record.replace(" ", "").split(",")):
        match = re.fullmatch(r"(\d+)(?:-(\d+)(?:/(\d+))?)?", part)
        require(match is not None, "record", record, "write windows as first-last or first-last/stride")
        first, last, stride = (int(g) if g else None for g in match.groups())
        last, stride = first if last is None else last, 1 if stride is None else stride
        require(last >= first and stride >= 1, "record", record, f"the window {part!r} is empty")
        steps.update(range(first, last + 1, stride))
    return np.array(sorted(steps), dtype=np.int64)


def cut_record(record: str, last: int) -> str:
    """Drop the snapshots after step `last`."""
    kept = parse_record(record)
    return describe(kept[kept <= last])


def describe(steps: np.ndarray) -> str:
    """Write ascending steps in the notation of `record` (inverse of `parse_record`): "0-50,75-1500/25"."""
    parts, i = [], 0
    while i < len(steps):
        gaps = np.diff(steps[i:])
        same = int(np.argmin(np.append(gaps == gaps[0], False))) if gaps.size else 0
        n = same if same >= 2 or (same == 1 and gaps[0] == 1) else 0  # further steps in this window
        stride = f"/{gaps[0]}" if n and gaps[0] > 1 else ""
        parts.append(f"{steps[i]}-{steps[i + n]}{stride}" if n else f"{steps[i]}")
        i += n + 1
    return ",".join(parts)
