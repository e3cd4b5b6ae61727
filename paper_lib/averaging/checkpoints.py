"""A user's own checkpoint files: the average that emulates a cooldown between them, one file in memory at a time."""

from __future__ import annotations

import contextlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from tqdm import tqdm

from paper_lib.averaging.schedules import COOLDOWNS
from paper_lib.errors import ConfigError, check_names, require
from paper_lib.files import replacing
from paper_lib.training import batchnorm

SUFFIXES = (".pt", ".pth", ".safetensors")
CONTAINERS = ("state_dict", "model", "model_state_dict", "module")  # keys under which training loops keep the weights
STEP_NAMES = ("step", "iter(?:ation)?", "epoch", "(?<![a-z0-9])ep?")  # that a step number follows, the first that does
State = dict[str, Tensor]


def find(paths: Sequence[Path | str]) -> list[Path]:
    """Return checkpoint files in the order of their steps: those named, and of a folder those that have a number."""
    found = []
    for path in map(Path, paths):
        require(path.exists(), "checkpoint", str(path), "there is no such file or folder")
        inside = path.iterdir() if path.is_dir() else ()
        found += [p for p in inside if p.suffix in SUFFIXES and re.search(r"\d", p.stem) and p.name[0] != "."]
        found += [] if path.is_dir() else [path]
    require(bool(found), "checkpoints", " ".join(map(str, paths)), f"no {', '.join(SUFFIXES)} there is named by step")
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The step in a file's name, the number after one of STEP_NAMES or the only one; else in its folder's name.

    Raises ConfigError if neither has a number, or several of which none is named.
    """
    has = "no step number"
    for name in (path.stem, path.parent.name):
        named = [re.findall(rf"{word}[^\da-z]*(\d+)", name, re.I) for word in STEP_NAMES]
        numbers = next(filter(None, named), re.findall(r"\d+", name))
        if any(named) or len(numbers) == 1:
            return int(numbers[-1])
        if numbers:
            has = f"several numbers in {name!r}, none after step, iter or epoch"
            break
    raise ConfigError(f"{path} has {has}: name it like step-1200.pt, or give steps=")


def cooldown_weights(steps: Sequence[int], schedule: str) -> np.ndarray:
    """Weights (n,), sum 1, over checkpoints at n increasing steps of a run at a constant learning rate.

    The average emulates the named cooldown from the first to the last step (claim C6): it is `averaging.on_snapshots`
    of the schedule's tail-sum average in the limit of many steps between checkpoints, so the unit of steps is free.
    """
    check_names([schedule], list(COOLDOWNS), "schedule")
    steps = np.asarray(steps, dtype=np.float64)
    require(len(steps) > 1, "number of checkpoints", len(steps), "an average needs at least two")
    wrong = np.flatnonzero(np.diff(steps) <= 0)
    if wrong.size:
        pair = steps[wrong[0] : wrong[0] + 2].astype(int).tolist()
        raise ConfigError(f"step {pair[1]} comes after step {pair[0]}: steps must increase, each once")
    between = ((steps[1:] + steps[:-1]) / 2 - steps[0]) / (steps[-1] - steps[0])
    before = np.nextafter(between, 0)  # a step decay just halfway between two checkpoints goes to the later one
    return -np.diff(np.concatenate([[1], COOLDOWNS[schedule](before), [0]]))


def cooldown(paths: Sequence[Path | str], schedule: str = "linear", steps: Sequence[int] | None = None) -> State:
    """Return the state dict that a cooldown from the first to the last checkpoint would lead to, by averaging.

    `paths` are files or folders of state dicts (.pt, .pth or .safetensors), plain or under a key such as "model". Steps
    are read from the names and give the order, unless given for each file. Memory: the average and one checkpoint.
    Tensors keep the type they have in the first file; integer ones have the value of the last. ConfigError, naming the
    file, for what cannot be read or averaged. Warns of step decays. For BatchNorm, see `recompute_statistics`.
    """
    if schedule == "step":
        warnings.warn("averages do not emulate step decays well: see notebook 12", stacklevel=2)
    files = find(paths) if steps is None else list(map(Path, paths))
    steps = [step_of(path) for path in files] if steps is None else steps
    require(len(steps) == len(files), "number of steps", len(steps), f"there are {len(files)} checkpoints")
    return average(files, cooldown_weights(steps, schedule))


def average(files: Sequence[Path], weights: np.ndarray) -> State:
    """Average of checkpoints with weights (n,) of sum 1; those of no weight are not read, but for the last."""
    used = [i for i in range(len(files)) if weights[i] > 0 or i == len(files) - 1]
    mean, dtypes, total = {}, {}, 0.0
    for i in tqdm(used, desc="averaging", unit="file", disable=None):
        state, total = load(files[i])[0], total + weights[i]
        _require_finite(files[i], state)
        if i == used[0]:
            dtypes = {name: tensor.dtype for name, tensor in state.items()}
        else:
            _require_same(files[i], state, files[used[0]], mean)
        for name, tensor in state.items():
            _accumulate(mean, name, tensor, weights[i] / total)
        del state  # before the next one is read
    return {name: tensor.to(dtypes[name]) for name, tensor in mean.items()}


def _accumulate(mean: State, name: str, tensor: Tensor, share: float) -> None:
    """Move the mean so far towards a tensor by its share, in float32 or better; integers are replaced."""
    if not _is_averaged(tensor):
        mean[name] = tensor.clone()
        return
    tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    if name in mean:
        mean[name].lerp_(tensor.to(mean[name].dtype), share)
    else:
        mean[name] = tensor.clone(memory_format=torch.contiguous_format)


def _is_averaged(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _require_finite(path: Path, state: State) -> None:
    for name, tensor in state.items():
        if _is_averaged(tensor) and not tensor.isfinite().all():
            raise ConfigError(f"{path}: {name!r} holds NaN or infinity: leave this checkpoint out")


def _require_same(path: Path, state: State, first: Path, mean: State) -> None:
    """ConfigError unless `state` has the names, shapes and kinds of numbers of the first file."""
    for name in sorted(mean.keys() ^ state.keys()):
        has, lacks = (first, path) if name in mean else (path, first)
        raise ConfigError(f"{lacks} lacks {name!r}, which {has} has: not the same network")
    for name, tensor in state.items():
        if tensor.shape != mean[name].shape:
            shapes = f"{tuple(tensor.shape)}, but {tuple(mean[name].shape)} in {first}"
            raise ConfigError(f"{path}: {name!r} has shape {shapes}: not the same network")
        if _is_averaged(tensor) != _is_averaged(mean[name]):
            raise ConfigError(f"{path}: {name!r} is {tensor.dtype}, unlike in {first}: not the same network")


def load(path: Path) -> tuple[State, str | None]:
    """A file's state dict, mapped from disk where the format allows it, and the key it was found under, if any.

    ConfigError for other files, and for pickles of anything but tensors and plain values: these are not executed.
    """
    _require_suffix(path)
    try:
        if path.suffix == ".safetensors":
            found = safetensors.torch.load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ConfigError(f"{path} holds other objects than tensors: save model.state_dict() instead") from error
    except (RuntimeError, EOFError, safetensors.SafetensorError) as error:
        raise ConfigError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    if _is_state(found):
        return found, None
    keys = list(found) if isinstance(found, dict) else []
    inner = [key for key in keys if key in CONTAINERS and _is_state(found[key])]
    if len(inner) != 1:
        holds = f"a {type(found).__name__}" + (f" with {', '.join(map(str, keys))}" if keys else "")
        raise ConfigError(f"{path} holds {holds}: expected a state dict, or one under {' or '.join(CONTAINERS)}")
    return found[inner[0]], inner[0]


def _is_state(found: Any) -> bool:
    return isinstance(found, dict) and len(found) > 0 and all(isinstance(value, Tensor) for value in found.values())


def _require_suffix(path: Path) -> None:
    require(path.suffix in SUFFIXES, "checkpoint", str(path), f"its name must end in {', '.join(SUFFIXES)}")


def save(state: State, path: Path | str, key: str | None = None) -> None:
    """Write a state dict, under `key` if given, in the format of the path's suffix; whole or not at all."""
    path = Path(path)
    _require_suffix(path)
    with replacing(path) as temporary:
        if path.suffix == ".safetensors":
            safetensors.torch.save_file(state, temporary, metadata={"format": "pt"})
        else:
            torch.save(state if key is None else {key: state}, temporary)


def cooldown_files(paths: Sequence[str], schedule: str, output: str) -> None:
    """The command: print how much each file counts, average them, and write `output`, which is none of them."""
    _require_suffix(Path(output))
    files = find(paths)
    is_new = Path(output).resolve() not in [path.resolve() for path in files]
    require(is_new, "output", output, "it is one of the checkpoints")
    steps = [step_of(path) for path in files]
    for path, step, weight in zip(files, steps, cooldown_weights(steps, schedule), strict=True):
        print(f"{weight:8.4f}  step {step}  {path}")
    state, key = cooldown(files, schedule), load(files[0])[1]
    save(state, output, key)
    print(f"wrote {output}" + (f", weights under {key!r} and nothing else" if key else ""))
    if any(name.endswith("running_var") for name in state):
        print("BatchNorm's statistics were averaged too: recompute them (checkpoints.recompute_statistics)")


def recompute_statistics(module: nn.Module, loader: Iterable) -> None:
    """Recompute BatchNorm's running statistics at the module's present weights, in place.

    `loader` yields inputs, or tuples that begin with them, on any device. Means and variances of batches are averaged
    with the number of values in each as weight, so a ragged last batch counts for what it is. All other layers are in
    evaluation mode meanwhile. ConfigError if the loader is empty or yields anything else.
    """
    layers = [layer for layer in batchnorm.layers(module) if layer.track_running_stats]
    if not layers:
        return
    n, device = 0, layers[0].running_mean.device
    with _running_means(module, layers), torch.no_grad():
        for batch in loader:
            x = batch[0] if isinstance(batch, list | tuple) and batch else batch
            require(isinstance(x, Tensor), "batch", type(batch).__name__, "inputs, or a tuple that begins with them")
            module(x.to(device))
            n += 1
    require(n > 0, "loader", "empty", "statistics need at least one batch")


@contextlib.contextmanager
def _running_means(module: nn.Module, layers: Sequence[nn.Module]) -> Iterator[None]:
    """Let running statistics be plain means over all values seen in the block."""
    modes, rates = {m: m.training for m in module.modules()}, {layer: layer.momentum for layer in layers}
    seen = dict.fromkeys(layers, 0)

    def weigh(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        values = inputs[0].numel() // inputs[0].shape[1]
        seen[layer] += values
        layer.momentum = values / seen[layer]

    hooks = [layer.register_forward_pre_hook(weigh) for layer in layers]
    module.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.train()
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer, rate in rates.items():
            layer.momentum = rate
        for m, mode in modes.items():
            m.training = mode
