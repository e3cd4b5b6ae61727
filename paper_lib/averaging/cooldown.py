"""Averages a user's checkpoint files as a cooldown would, one file in memory at a time."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm

from paper_lib.averaging.schedules import COOLDOWNS
from paper_lib.errors import ConfigError, brief, check_names, require
from paper_lib.files import replacing

SUFFIXES = (".pt", ".pth", ".safetensors")
CONTAINERS = ("state_dict", "model", "model_state_dict", "module")  # keys that hold the weights
STEP_NAMES = ("step", "iter(?:ation)?", "epoch", "(?<![a-z0-9])ep?")  # the first that has a number
State = dict[str, Any]  # tensors, but for torch's own "..._extra_state"


def find(paths: Sequence[Path | str]) -> list[Path]:
    """Checkpoints by step: the files named, and of a folder those that have a number in their name.

    ConfigError for a path that does not exist, or where there is no such file.
    """
    found = []
    for path in map(Path, paths):
        require(path.exists(), "checkpoint", str(path), "there is no such file or folder")
        if path.is_dir():
            inside = (p for p in path.iterdir() if p.suffix in SUFFIXES and p.name[0] != ".")
            found += [p for p in inside if re.search(r"\d", p.stem)]
        else:
            found.append(path)
    allowed = f"no {', '.join(SUFFIXES)} there is named by step"
    require(bool(found), "checkpoints", " ".join(map(str, paths)), allowed)
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The number in a file's name after one of STEP_NAMES, or the only one; else in its folder's.

    ConfigError if neither has a number, or several of which none is named.
    """
    name = path.stem if re.search(r"\d", path.stem) else path.parent.name
    for word in STEP_NAMES:
        if named := re.findall(rf"{word}[^\da-z]*(\d+)", name, re.I):
            return int(named[-1])
    numbers = re.findall(r"\d+", name)
    if len(numbers) != 1:
        has = "several numbers, none after step, iter or epoch" if numbers else "no step number"
        raise ConfigError(f"{path} has {has}: name it like step-1200.pt, or give steps=")
    return int(numbers[0])


def step_weights(steps: Sequence[int], schedule: str) -> np.ndarray:
    """Weights (n,), sum 1, over checkpoints at n increasing steps of a run at a constant lr.

    The average emulates the named cooldown from the first to the last step (claim C6): it is
    `vectors.on_snapshots` of the schedule's tail-sum average in the limit of many steps between
    checkpoints, so the unit of steps is free. Warns of step decays. ConfigError for fewer than two
    or other steps.
    """
    check_names([schedule], COOLDOWNS, "schedule")
    if schedule == "step":
        warnings.warn("averages do not emulate step decays well: see notebook 11", stacklevel=3)
    require(len(steps) > 1, "number of checkpoints", len(steps), "an average needs at least two")
    for before, after in zip(steps, steps[1:], strict=False):
        if after <= before:
            raise ConfigError(f"step {after} comes after step {before}: each must be later")
    at = np.asarray(steps, dtype=np.float64)
    between = ((at[1:] + at[:-1]) / 2 - at[0]) / (at[-1] - at[0])
    # A step decay just halfway between two checkpoints goes to the later one.
    factors = COOLDOWNS[schedule](np.nextafter(between, 0))
    return -np.diff(np.concatenate([[1], factors, [0]]))


def emulate(
    paths: Sequence[Path | str], schedule: str = "linear", steps: Sequence[int] | None = None
) -> State:
    """The state dict that a cooldown from the first to the last checkpoint would about lead to.

    `paths` are files or folders of state dicts (.pt, .pth or .safetensors), plain or under a key
    such as "model"; steps are read from the names and give the order, unless given for each file.
    For BatchNorm, see `batchnorm.recompute_statistics`. Errors: see `step_weights`, `average`.
    """
    files = find(paths) if steps is None else list(map(Path, paths))
    steps = [step_of(path) for path in files] if steps is None else steps
    allowed = f"there are {len(files)} checkpoints"
    require(len(steps) == len(files), "number of steps", len(steps), allowed)
    return average(files, step_weights(steps, schedule))


def average(files: Sequence[Path], weights: np.ndarray) -> State:
    """Average of checkpoints by weights (n,) of sum 1; those of no weight, but the last, unread.

    Tensors keep the type that they have in the first file; integers, and what is no tensor, are the
    last's. Memory: the average and one checkpoint. ConfigError, naming the file, for what cannot be
    read or averaged.
    """
    used = [i for i in range(len(files)) if weights[i] > 0 or i == len(files) - 1]
    mean: State = {}
    dtypes, total = {}, 0.0
    for i in tqdm(used, desc="averaging", unit="file", disable=None):
        state, total = load(files[i])[0], total + weights[i]
        if mean:
            _require_same(files[i], state, files[used[0]], mean)
        for name, value in state.items():
            where = f"{files[i]}: {name!r}"
            if not _is_averaged(value):
                mean[name] = copy.deepcopy(value)  # it may be mapped from the file
            elif name not in mean:
                dtypes[name] = value.dtype
                mean[name] = _widened(value).clone(memory_format=torch.contiguous_format)
                if mean[name].isnan().any():
                    raise ConfigError(f"{where} holds NaN: leave this checkpoint out")
            else:
                _move(mean[name], value, weights[i] / total, where)
        del state  # before the next one is read
    return {name: v.to(dtypes[name]) if name in dtypes else v for name, v in mean.items()}


def _is_averaged(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _widened(tensor: Tensor) -> Tensor:
    """In float32 or better; torch promotes no float8."""
    narrow = tensor.dtype.itemsize == 1
    return tensor.float() if narrow else tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _move(mean: Tensor, tensor: Tensor, share: float, where: str) -> None:
    """Move the mean by its share towards a tensor, unless they are equal: a mask of -inf stays."""
    wide = _widened(tensor).to(mean.dtype)
    if torch.equal(mean, wide):
        return
    if tensor.dtype.itemsize == 1:
        raise ConfigError(f"{where} is {tensor.dtype}, too narrow to be averaged: convert it first")
    if not wide.isfinite().all():
        raise ConfigError(f"{where} holds NaN or infinity: leave this checkpoint out")
    if not mean.isfinite().all():
        raise ConfigError(f"{where} is finite, but not in checkpoints before it: leave those out")
    mean.lerp_(wide, share)


def _require_same(path: Path, state: State, first: Path, mean: State) -> None:
    """ConfigError unless `state` has the names, shapes and kinds of numbers of the first file."""
    for name in sorted(mean.keys() ^ state.keys()):
        has, lacks = (first, path) if name in mean else (path, first)
        raise ConfigError(f"{lacks} lacks {name!r}, which {has} has: not the same network")
    for name, value in state.items():
        shape, expected = (tuple(getattr(v, "shape", ())) for v in (value, mean[name]))
        if shape != expected:
            what = f"has shape {shape}, but {expected} in {first}"
        elif _is_averaged(value) != _is_averaged(mean[name]):
            what = f"is {getattr(value, 'dtype', type(value).__name__)}, unlike in {first}"
        else:
            continue
        raise ConfigError(f"{path}: {name!r} {what}: not the same network")


def load(path: Path) -> tuple[State, str | None]:
    """A file's state dict, mapped from disk where possible, and the key it was found under, if any.

    ConfigError for other files, and for pickles of anything but tensors and plain values: these are
    not executed.
    """
    _require_suffix(path)
    found: Any
    try:
        if path.suffix == ".safetensors":
            found = safetensors.torch.load_file(path)
        else:
            mapped = zipfile.is_zipfile(path)
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        advice = "save model.state_dict() instead"
        raise ConfigError(f"{path} holds other objects than tensors: {advice}") from error
    except (RuntimeError, EOFError, safetensors.SafetensorError) as error:
        raise ConfigError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    if _is_state(found):
        return found, None
    inner = [k for k in CONTAINERS if isinstance(found, dict) and _is_state(found.get(k))]
    if len(inner) != 1:
        holds = list(found) if isinstance(found, dict) else type(found).__name__
        allowed = f"a state dict, or one under {' or '.join(CONTAINERS)}"
        raise ConfigError(f"{path} holds {brief(holds)}: expected {allowed}")
    return found[inner[0]], inner[0]


def _is_state(found: Any) -> bool:
    """Whether these are tensors by name, and nothing else but what modules add as extra state."""
    if not isinstance(found, dict):
        return False
    values = [value for name, value in found.items() if not str(name).endswith("_extra_state")]
    return bool(values) and all(isinstance(value, Tensor) for value in values)


def _require_suffix(path: Path) -> None:
    allowed = f"its name must end in {', '.join(SUFFIXES)}"
    require(path.suffix in SUFFIXES, "checkpoint", str(path), allowed)


def save(state: State, path: Path | str, key: str | None = None) -> None:
    """Write a state dict, under `key` if given, in the format of the suffix; whole or not at all.

    ConfigError for another suffix, and for extra state, which only torch's own formats hold.
    """
    path = Path(path)
    _require_suffix(path)
    with replacing(path) as temporary:
        if path.suffix == ".safetensors":
            extra = [name for name, value in state.items() if not isinstance(value, Tensor)]
            require(not extra, "output", str(path), f"{extra} fit into .pt and .pth only")
            safetensors.torch.save_file(state, temporary, metadata={"format": "pt"})
        else:
            torch.save(state if key is None else {key: state}, temporary)


def emulate_files(paths: Sequence[str], schedule: str, output: str) -> None:
    """The command: print what each file counts, average them, and write `output`, none of them."""
    _require_suffix(Path(output))
    files = find(paths)
    is_new = Path(output).resolve() not in [path.resolve() for path in files]
    require(is_new, "output", output, "it is one of the checkpoints")
    steps = [step_of(path) for path in files]
    weights = step_weights(steps, schedule)
    for path, step, weight in zip(files, steps, weights, strict=True):
        print(f"{weight:8.4f}  step {step}  {path}")
    state, key = average(files, weights), load(files[0])[1]
    save(state, output, key)
    print(f"wrote {output}" + (f", weights under {key!r} and nothing else" if key else ""))
    if any(name.endswith("running_var") for name in state):
        print("BatchNorm's statistics were averaged too: see batchnorm.recompute_statistics")
