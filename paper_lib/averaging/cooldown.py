"""Averages a user's checkpoint files as a cooldown would, one file in memory at a time."""

from __future__ import annotations

import copy
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Sequence
from decimal import Decimal
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
# A whole number, such as 1200, 5e3 or 10k; no part of 0.95.
NUMBER = r"(?<!\d[.,])(?<!\d)\d+(?:e\+?0?\d(?![a-z\d])|k(?![a-z]))?(?![.,]?\d|e[+-]?\d)"
State = dict[str, Any]  # tensors, but for torch's own "..._extra_state"


def find(paths: Sequence[Path | str]) -> list[Path]:
    """Checkpoints by step: the files named, and of a folder those that have a number in their name.

    ConfigError for a path that is no such file, or a folder without any, or with one that is none.
    """
    found = []
    for path in map(Path, paths):
        if os.path.isdir(path):
            inside = (p for p in path.iterdir() if p.suffix in SUFFIXES and p.name[0] != ".")
            found += [p for p in inside if re.search(r"\d", p.stem)]
        else:
            found.append(path)
    allowed = f"no {', '.join(SUFFIXES)} there is named by step"
    require(bool(found), "checkpoints", " ".join(map(str, paths)), allowed)
    for path in found:
        _check_path(path)
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The number in a file's name after one of STEP_NAMES, or the only one; else in its folder's.

    ConfigError if neither has a whole number, or several of which none is named.
    """
    name = path.stem if re.search(r"\d", path.stem) else path.parent.name
    named = (re.findall(rf"{word}[^\da-z]*({NUMBER})", name, re.I)[-1:] for word in STEP_NAMES)
    found = next(filter(None, named), re.findall(rf"^\D*({NUMBER})\D*$", name, re.I))
    if not found:
        has = "no whole number, or several, none after step, iter or epoch"
        raise ConfigError(f"{path} has {has}: name it like step-1200.pt, or give steps=")
    return int(Decimal(found[0].lower().replace("k", "e3")))


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
    at = np.asarray(steps, dtype=np.float64)
    rise = np.diff(at)
    for i in np.flatnonzero(~((rise > 0) & (rise < np.inf))).tolist():  # NaN too
        raise ConfigError(f"step {steps[i + 1]} comes after step {steps[i]}: each must be later")
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
            where = f"{files[i]}: {brief(name)}"
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
    mean.lerp_(wide, share)
    if not mean.isfinite().all():
        raise ConfigError(f"{where} is finite, but not its mean with those before: leave them out")


def _require_same(path: Path, state: State, first: Path, mean: State) -> None:
    """ConfigError unless `state` has the names, shapes and kinds of values of the first file."""
    for name in sorted(mean.keys() ^ state.keys()):
        has, lacks = (first, path) if name in mean else (path, first)
        raise ConfigError(f"{lacks} lacks {brief(name)}, which {has} has: not the same network")
    for name, value in state.items():
        found, expected = _kind(value), _kind(mean[name])
        if found != expected:
            what = f"{brief(name)} is {found}, but {expected} in {first}"
            raise ConfigError(f"{path}: {what}: not the same network")


def _kind(value: Any) -> str:
    """What the values of a name must have in common in all checkpoints."""
    if not isinstance(value, Tensor):
        return "no tensor"
    kind = "complex" if value.is_complex() else "real" if _is_averaged(value) else "integer"
    return f"{kind} of shape {tuple(value.shape)}"


def load(path: Path) -> tuple[State, str | None]:
    """A file's state dict, mapped from disk where possible, and the key it was found under, if any.

    ConfigError for other files, and for pickles of anything but tensors and plain values: these are
    not executed.
    """
    _check_path(path)
    found: Any
    try:
        if path.suffix == ".safetensors":
            found = safetensors.torch.load_file(path)
        else:
            zipped = zipfile.is_zipfile(path)
            if damaged := zipped and zipfile.ZipFile(path).testzip():
                raise zipfile.BadZipFile(f"{damaged} does not match its checksum")
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        advice = "or is damaged: save model.state_dict() instead"
        raise ConfigError(f"{path} holds other objects than tensors, {advice}") from error
    except Exception as error:  # damaged bytes make these libraries raise anything
        raise ConfigError(f"{path} cannot be read: {brief(error)}") from error
    if _is_state(found):
        return found, None
    inner = [k for k in CONTAINERS if isinstance(found, dict) and _is_state(found.get(k))]
    if len(inner) != 1:
        holds = list(found) if isinstance(found, dict) else type(found).__name__
        allowed = f"a state dict of dense tensors, or one under {' or '.join(CONTAINERS)}"
        raise ConfigError(f"{path} holds {brief(holds)}: expected {allowed}")
    return found[inner[0]], inner[0]


def _is_state(found: Any) -> bool:
    """Whether these are tensors by name, and nothing else but what modules add as extra state."""
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        return False
    values = [value for name, value in found.items() if not name.endswith("_extra_state")]
    return bool(values) and all(map(_is_dense, values))


def _is_dense(value: Any) -> bool:
    """Whether this is a tensor with a number for each element, as averages need."""
    if not isinstance(value, Tensor) or value.dtype == torch.float4_e2m1fn_x2:
        return False
    return value.layout == torch.strided and not (value.is_quantized or value.is_meta)


def _check_path(path: Path, to_read: bool = True) -> None:
    allowed = "there is no such file or folder, or it is no plain file"  # a pipe would never end
    require(not to_read or os.path.isfile(path), "checkpoint", str(path), allowed)
    allowed = f"its name must end in {', '.join(SUFFIXES)}"
    require(path.suffix in SUFFIXES, "checkpoint", str(path), allowed)


def save(state: State, path: Path | str, key: str | None = None) -> None:
    """Write a state dict, under `key` if given, in the format of the suffix; whole or not at all.

    ConfigError for another suffix, a full disk, and what only torch's own formats hold.
    """
    path = Path(path)
    _check_path(path, to_read=False)
    with replacing(path) as temporary:
        try:
            if path.suffix == ".safetensors":
                safetensors.torch.save_file(state, temporary, metadata={"format": "pt"})
            else:
                torch.save(state if key is None else {key: state}, temporary)
        except Exception as error:  # of the two libraries
            advice = "is the disk full? what does not fit into .safetensors fits into .pt"
            raise ConfigError(f"{path} cannot be written: {brief(error)}; {advice}") from error


def emulate_files(paths: Sequence[str], schedule: str, output: str) -> None:
    """The command: print what each file counts, average them, and write `output`, none of them."""
    _check_path(Path(output), to_read=False)
    files = find(paths)
    is_new = os.path.realpath(output) not in map(os.path.realpath, files)
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
