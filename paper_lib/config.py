"""What a run and a study are: frozen dataclasses validated by pydantic; how snapshots are named."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Iterable
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal, dataclass_transform, get_type_hints

import numpy as np
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from paper_lib.averaging import schedules, vectors
from paper_lib.errors import ConfigError, brief, check_names, require, require_folder_name
from paper_lib.files import folder


def plain(value: Any) -> Any:
    """Python's own value for NumPy's."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value


def as_number(value: Any) -> Any:
    """Refuse a truth value; text and the rest are left to pydantic."""
    if isinstance(plain(value), bool):
        raise ValueError("it must be a number, not a truth value")
    return plain(value)


def as_items(value: Any) -> Any:
    """A list for an array, a single integer, or text such as "0 1" or "[0, 1]"; else `value`."""
    value = plain(value)
    if isinstance(value, str):
        return re.findall(r"[^,\s]+", value.strip("()[] "))
    return [value] if type(value) is int else value


def as_names(value: Any) -> Any:
    """A list of the names that text separates by commas; else `value`."""
    return re.split(r"\s*,\s*", value.strip()) if isinstance(value, str) and value else value


def unique(seeds: tuple[int, ...]) -> tuple[int, ...]:
    """Refuse seeds of which one stands twice."""
    if len(set(seeds)) < len(seeds):
        raise ValueError("each seed may stand only once")
    return seeds


LONGEST = 10_000_000  # steps of a run, whose log, schedule and averages are held in memory

Int = Annotated[int, BeforeValidator(as_number), Field(le=10**18)]
Natural = Annotated[Int, Field(ge=0)]
Positive = Annotated[Int, Field(ge=1)]
Float = Annotated[float, BeforeValidator(as_number)]
Naturals = Annotated[tuple[Natural, ...], BeforeValidator(as_items)]
Step = Annotated[Natural, Field(le=LONGEST)]
Steps = Annotated[Step, Field(ge=1)]
Factors = Annotated[tuple[Annotated[Float, Field(ge=0)], ...], BeforeValidator(as_items)]
Word = Annotated[str, Field(pattern=r"^\w+$")]  # it is part of a folder's name
Names = Annotated[tuple[str, ...], BeforeValidator(as_names)]
Seeds = Annotated[Naturals, Field(min_length=1), AfterValidator(unique)]
Norm = Literal["batch", "group", "none"]
Activation = Literal["relu", "silu", "gelu"]
Precision = Literal["float32", "bfloat16"]


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
def settings(cls: Any) -> Any:
    """Make a frozen dataclass that pydantic validates, and that raises ConfigError, of one line."""
    cls = dataclass(frozen=True, kw_only=True, config=ConfigDict(allow_inf_nan=False))(cls)
    validate, names = cls.__init__, [f.name for f in dataclasses.fields(cls)]

    @functools.wraps(validate)
    def __init__(self: Any, **values: Any) -> None:
        check_names(values, names, "setting")
        try:
            validate(self, **values)
        except ValidationError as error:
            raise _one_line(error) from None

    cls.__init__ = __init__
    return cls


def _one_line(error: ValidationError) -> ConfigError:
    fault = error.errors(include_url=False)[-1]  # of a union's alternatives the last one says most
    cause = fault.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return cause
    path = [part for part in fault["loc"] if str(part).isalnum() or str(part).isidentifier()]
    name, allowed = ".".join(map(str, path)), str(cause or fault["msg"])
    allowed = allowed.replace("Input should be", "it must be")
    allowed = allowed.replace("valid tuple", "list, such as [0, 1]")
    return ConfigError(f"{name} = {brief(fault['input'])} is not allowed: {allowed}")


@settings
class RunConfig:
    """Everything that determines one training run, and nothing else.

    A run takes the weights x_start (its initialization, or a state of `parent`) to x_steps; the
    step from x_t to x_{t+1} uses batch t of the stream `batch_seed` and the learning rate lr *
    factor_t of `schedule`, whose horizon is steps - start. Steps are absolute: a branch goes on
    counting, so by default it sees its parent's batches.

    Values may be NumPy's, or text as a command line gives it. Raises ConfigError, of one line,
    for a setting that is unknown, of another type, or cannot work. The text beside a type is what
    the setting means.
    """

    data: Annotated[str, "digits, cifar10, cifar100, imagefolder, or your own"] = "digits"
    held_out: Annotated[Natural, "training images kept apart, for held-out batches"] = 8000
    image_size: Annotated[Natural, "pixels, for imagefolder alone, which needs it"] = 0
    model: Annotated[Word, "a network of training, such as resnet8 or resnet50"] = "resnet8"
    width: Annotated[Positive, Field(le=65_536), "channels of the network's first stage"] = 8
    norm: Annotated[Norm, "batch, group or none"] = "batch"
    activation: Annotated[Activation, "relu, silu or gelu"] = "relu"
    batch_size: Annotated[Positive, "images in a batch"] = 64
    lr: Annotated[Float, Field(gt=0), "learning rate"] = 1.0
    schedule: Annotated[str | Factors, "a name, or one factor of lr per step"] = "constant"
    momentum: Annotated[Float, Field(ge=0, lt=1), "momentum of SGD"] = 0.0
    weight_decay: Annotated[Float, Field(ge=0), "weight decay, added to the gradient"] = 5e-4
    steps: Annotated[Step, "step at which the run ends"] = 1500
    record: Annotated[str, "snapshots kept: 0-50,75-1500/25 is 0 to 50, then every 25th"] = ""
    checkpoints: Annotated[Naturals, "steps to branch from; the end always is one"] = ()
    averages: Annotated[Names, "averages kept of all iterates: EMA 0.99, uniform 400"] = ()
    seed: Annotated[Natural, "of the initialization"] = 0
    batch_seed: Annotated[Natural | None, "of the batches; None: the same as seed"] = None
    precision: Annotated[Precision, "float32, or bfloat16: autocast on float32 weights"] = "float32"
    compile: Annotated[bool, "torch.compile the forward pass: other last bits"] = False
    threads: Annotated[Positive, "CPU threads of a run: other last bits"] = 1
    parent: Annotated[RunConfig | None, "the run that this one leaves"] = None
    start: Annotated[Step, "the step of its parent at which this run begins"] = 0
    perturbation: Annotated[Float, Field(ge=0), "displacement of the start over its norm"] = 0.0

    def __post_init__(self) -> None:
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
        """Return a copy with some settings changed (a new seed also reaches the parents)."""
        if "seed" in changes and self.parent is not None and "parent" not in changes:
            changes["parent"] = self.parent.replace(seed=changes["seed"])
        return dataclasses.replace(self, **changes)

    def branch(self, n_steps: int, at: int | None = None, **changes: Any) -> RunConfig:
        """Return the run that leaves this one at step `at` (default: its end) for n_steps.

        It inherits every setting but `schedule` ("constant") and `record`, `checkpoints`,
        `averages` and `perturbation` (none), unless changed.
        """
        at = self.steps if at is None else at
        own = {"record": "", "checkpoints": (), "averages": (), "perturbation": 0.0}
        base = {"schedule": "constant", **own, "parent": self, "start": at, "steps": at + n_steps}
        return self.replace(**{**base, **changes})

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON-ready values, parents nested: RunConfig(**them) is this."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


@settings
class Study:
    """What the notebooks of a preset share: a warm-up, windows after it, seeds, sizes of probes.

    A user's own `dataset`, and `net`, a function without arguments that makes the network, go
    along; neither is compared or shown.
    """

    preset: str
    run: Annotated[RunConfig, "the warm-up to the stationary state, at a constant lr"]
    window: Annotated[Steps, "steps after the warm-up, every iterate recorded"] = 800
    horizon: Annotated[Step, "steps that the scoreboard averages; 0: the window"] = 0
    decay: Annotated[Steps, "steps in which a decayed run takes lr to zero"] = 800
    seeds: Annotated[Seeds, "seeds, as in --seeds '0 1 2'"] = (0, 1, 2)
    probe_batches: Annotated[Positive, "snapshots, or batches, per seed in a probe"] = 16
    eval_batches: Annotated[Positive, "batches in an estimate of the training loss"] = 128
    eval_images: Annotated[Positive, "images of a split in an evaluation of weights"] = 2500
    limits: Annotated[bool, "whether notebooks measure their limits and checks too"] = True
    label: str = field(default="", repr=False)  # how figures name the setting
    custom: str = field(default="", repr=False)  # digits for what differs from the preset
    dataset: Any = field(default=None, repr=False, compare=False)
    net: Any = field(default=None, repr=False, compare=False)
    finished: Any = field(default=(), repr=False, compare=False)  # runs that were trained elsewhere

    def __post_init__(self) -> None:
        require_folder_name("preset", self.preset)
        is_class = isinstance(self.net, type)
        makes = callable(self.net) and (is_class or not hasattr(self.net, "state_dict"))
        allowed = "pass the function that makes the network, such as its class, not the network"
        require(self.net is None or makes, "net", type(self.net).__name__, allowed)

    @property
    def results(self) -> Path:
        """Folder of the results: the preset's, or one of its own if settings were changed."""
        return folder("results") / (f"{self.preset}-{self.custom}" if self.custom else self.preset)

    @property
    def unit(self) -> str:
        """Unit of the loss, as labels say it."""
        return "nats" if self.dataset is None else self.dataset.loss.unit

    @property
    def averaged_steps(self) -> int:
        """Steps over which the scoreboard averages."""
        return self.horizon or self.window

    @property
    def averages(self) -> dict[str, str]:
        """The averages that the scoreboard compares, for `vectors.named`, by their label."""
        half = self.averaged_steps // 2
        return {
            "last iterate": "uniform 1",
            "two points, 1 step apart": "two points 1",
            f"two points, {half} steps apart": f"two points {half}",
            "EMA, decay 0.5": "EMA 0.5",
            "EMA, decay 0.99": "EMA 0.99",
            f"uniform average of {half}": f"uniform {half}",
        }

    def with_run(self, **changes: Any) -> Study:
        """The study of another warm-up: settings of `run` changed."""
        return dataclasses.replace(self, run=self.run.replace(**changes))

    def stationary(self, n_steps: int | None = None, **changes: Any) -> RunConfig:
        """The run after the warm-up at constant lr, every iterate recorded; by default `window`."""
        n_steps = self.window if n_steps is None else n_steps
        start = self.run.steps
        return self.run.branch(n_steps, **{"record": f"{start}-{start + n_steps}", **changes})

    def averaged(self, names: Iterable[str], **changes: Any) -> RunConfig:
        """The run that the scoreboard averages: the window, or a longer one with these alone."""
        if self.averaged_steps == self.window:
            return self.stationary(**changes)
        kept = {"record": "", "averages": tuple(names), **changes}
        return self.stationary(self.averaged_steps, **kept)

    def decayed(self, **changes: Any) -> RunConfig:
        """The fully trained network: after the warm-up a linear decay of lr to zero."""
        return self.run.branch(self.decay, **{"schedule": "linear", **changes})


def check_seeds(seeds: Any) -> tuple[int, ...]:
    """Return seeds as a tuple; raise ConfigError if there are none, or one stands twice."""
    return Study(preset="any", run=RunConfig(), seeds=seeds).seeds


def meanings(cls: type) -> dict[str, str]:
    """What the settings of RunConfig or Study mean, by name."""
    hints = get_type_hints(cls, include_extras=True).items()
    return {name: hint.__metadata__[-1] for name, hint in hints if hasattr(hint, "__metadata__")}


def check_run(c: RunConfig) -> None:
    """Raise ConfigError where settings of a run, each good by itself, cannot work together."""
    sized = c.image_size > 0 or c.data != "imagefolder"
    require(sized, "image_size", c.image_size, "a tree of images needs the size to load at")
    allowed = f"the run starts at step {c.start} and must take at least one"
    require(c.steps > c.start, "steps", c.steps, allowed)
    first = c.start == 0 or c.parent is not None
    require(first, "start", c.start, "only a branch (see `branch`) starts later")
    if c.parent is not None:
        allowed = f"the parent run ends at step {c.parent.steps}"
        require(c.start <= c.parent.steps, "start", c.start, allowed)
        for name in ("model", "width", "norm"):
            before = getattr(c.parent, name)
            allowed = f"a branch keeps the network of its parent, {before!r}"
            require(getattr(c, name) == before, name, getattr(c, name), allowed)
    if isinstance(c.schedule, str):
        check_names([c.schedule], schedules.COOLDOWNS, "schedule")
    else:
        n, expected = len(c.schedule), c.steps - c.start
        allowed = f"it needs one factor for each of {expected} steps"
        require(n == expected, "schedule of length", n, allowed)
    for name in c.averages:
        try:
            vectors.named(name, c.steps - c.start + 1)
        except (ValueError, MemoryError) as error:
            raise ConfigError(f"averages = {brief(c.averages)} is not allowed: {error}") from None
    for name, kept in (("record", c.snapshot_steps), ("checkpoints", np.array(c.checkpoints, int))):
        outside = describe(kept[(kept < c.start) | (kept > c.steps)])
        allowed = f"step {outside} lies outside the run, which goes from {c.start} to {c.steps}"
        require(not outside, name, getattr(c, name), allowed)


def parse_record(record: str) -> np.ndarray:
    """Turn "0-50,100-1500/25" (both ends included) into ascending snapshot steps, shape (n,)."""
    windows = [np.arange(0)]
    for part in filter(None, record.replace(" ", "").split(",")):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9})(?:/(\d{1,9}))?)?", part)
        if match is None:
            allowed = f"write windows as first-last or first-last/stride, up to step {LONGEST}"
            raise ConfigError(f"record = {brief(record)} is not allowed: {allowed}")
        first, last, stride = int(match[1]), int(match[2] or match[1]), int(match[3] or 1)
        allowed = f"the window {part!r} is empty, or goes beyond step {LONGEST}"
        require(first <= last <= LONGEST and stride >= 1, "record", record, allowed)
        windows.append(np.arange(first, last + 1, stride))
    return np.unique(np.concatenate(windows))


def describe(steps: np.ndarray) -> str:
    """Write ascending steps as `record` does, "0-50,75-1500/25": inverse of `parse_record`."""
    parts, i = [], 0
    while i < len(steps):
        gaps = np.diff(steps[i:])
        same = int(np.argmin(np.append(gaps == gaps[0], False))) if gaps.size else 0
        n = same if same >= 2 or (same == 1 and gaps[0] == 1) else 0  # further steps in this window
        stride = f"/{gaps[0]}" if n and gaps[0] > 1 else ""
        parts.append(f"{steps[i]}-{steps[i + n]}{stride}" if n else f"{steps[i]}")
        i += n + 1
    return ",".join(parts)
