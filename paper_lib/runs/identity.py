"""The key of a run: the first 12 hex digits of a hash of everything that decides its bits.

That is: every setting (parents nested, so a default added later changes the key), the numbers that
settings yield (the learning rate of every step, the weight vectors of averages), the dataset's
fingerprint, what a user's own network says of itself, and the source of the folders data/ and
training/ (comments, docstrings and layout left out).
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from paper_lib.averaging import schedules, vectors
from paper_lib.config import RunConfig
from paper_lib.data import Dataset
from paper_lib.errors import ConfigError
from paper_lib.training.flat import NetFactory
from paper_lib.training.loop import initial_model

PACKAGE = Path(__file__).parents[1]
FORMAT = 3  # of the files in a run's folder


def run_key(config: RunConfig, dataset: Dataset, net: NetFactory | None) -> str:
    """The 12 hex digits that identify a run (see the head of this module)."""
    identity = {
        "config": config.to_dict(),
        "numbers": [
            _hash(numbers) for numbers in (learning_rates(config), average_vectors(config))
        ],
        "data": dataset.fingerprint,
        "network": None if net is None else of_network(initial_model(config, dataset, net).module),
        "source": SOURCE,
        "format": FORMAT,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


# --- numbers ------------------------------------------------------------------------------------


def learning_rates(config: RunConfig) -> np.ndarray:
    """Learning rate of each step of the run, (steps - start,)."""
    n_steps = config.steps - config.start
    named = isinstance(config.schedule, str)
    factors = schedules.factors(config.schedule, n_steps) if named else np.array(config.schedule)
    return config.lr * factors


def average_vectors(config: RunConfig) -> np.ndarray:
    """Weight vectors of the run's averages over x_start..x_steps, (k, steps - start + 1)."""
    n = config.steps - config.start + 1
    return np.array([vectors.named(name, n) for name in config.averages]).reshape(-1, n)


def _hash(numbers: np.ndarray) -> str:
    """Hash of numbers to nine digits: processors differ in the last bits of a cosine."""
    return hashlib.sha256(" ".join(f"{v:.9g}" for v in numbers.ravel()).encode()).hexdigest()


# --- source -------------------------------------------------------------------------------------


def of_source(*paths: Path) -> str:
    """Hash of the syntax of Python files, and of those in folders, the same in every Python."""
    digest = hashlib.sha256()
    files = [file for path in paths for file in (sorted(path.glob("*.py")) or [path])]
    for file in files:
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and _is_text(body[0]):
                del body[0]
        digest.update(repr((file.name, _syntax(tree))).encode())
    return digest.hexdigest()[:16]


def _is_text(node: ast.stmt) -> bool:
    value = node.value if isinstance(node, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def _syntax(value: Any) -> Any:
    """A syntax tree as nested lists, without empty fields: which there are differs by version."""
    if isinstance(value, ast.AST):
        fields = ast.iter_fields(value)
        kept = [(name, _syntax(field)) for name, field in fields if field not in (None, [])]
        return [type(value).__name__, *kept]
    return [_syntax(item) for item in value] if isinstance(value, list) else repr(value)


# Of what was imported, not of what an editor has saved since.
SOURCE = of_source(PACKAGE / "data", PACKAGE / "training")


# --- a user's own network -----------------------------------------------------------------------


def of_network(net: nn.Module) -> str:
    """Hash of a network as it begins, the same every time.

    It takes the network's text form, the values of its tensors and which of them are trained, and
    of each module of the user's: the source of its class, its hooks, and plain attributes. Not
    seen are functions and variables outside the classes that their methods use.
    """
    tensors = [*net.named_parameters(), *net.named_buffers()]
    parts = [repr(net), [(name, t.requires_grad, _of_tensor(t)) for name, t in tensors]]
    parts += [(name, _of_module(module)) for name, module in net.named_modules()]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _of_module(module: nn.Module) -> list[Any]:
    """Sources of its class and hooks, and its own attributes (of torch's, the latter two)."""
    bookkeeping = vars(nn.Module())  # some of it counts what happened in this process
    own = {k: _plain(v) for k, v in vars(module).items() if k not in bookkeeping}
    hooks = [
        _plain(list(hooks.values()))
        for name, hooks in vars(module).items()
        if name.endswith("_hooks") and hooks
    ]
    return [[_of_class(cls) for cls in type(module).__mro__], own, hooks]


def _of_class(cls: type) -> list[Any]:
    """Name of a class and, unless it is a library's, its methods and constants."""
    name = f"{cls.__module__}.{cls.__qualname__}"
    if _of_library(cls):
        return [name]
    # Python's own attributes, such as the number of a class's first line, say nothing of what it
    # does. Sorted, as a class is that was sent to another process.
    own = sorted(vars(cls).items())
    kept = {k: v for k, v in own if inspect.isfunction(v) or not k.startswith("__")}
    return [cls.__qualname__, _plain(kept)]


def _of_library(thing: Any) -> bool:
    module = getattr(thing, "__module__", None) or "builtins"
    return module.partition(".")[0] in ("builtins", "torch", "torchvision")


def _source(function: Any) -> str:
    """Source of a function; ConfigError where Python does not know it."""
    try:
        return inspect.getsource(function)
    except (OSError, TypeError) as error:
        raise ConfigError(
            f"the source of {function.__qualname__} is not known, and a run is found again by it: "
            "define it in a file or in a notebook's cell"
        ) from error


def _of_tensor(tensor: Tensor) -> tuple[str, list[int], str]:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return str(tensor.dtype), list(tensor.shape), hashlib.sha256(data).hexdigest()


def _plain(value: Any) -> Any:
    """A value as text without addresses; of objects that it cannot look into, the type."""
    if isinstance(value, Tensor):
        return _of_tensor(value)
    if isinstance(value, Mapping):
        return [(_plain(key), _plain(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((_plain(item) for item in value), key=repr)
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return repr(value)
    if isinstance(value, torch.dtype | torch.device):
        return repr(value)
    if isinstance(value, functools.partial):
        return [_plain(part) for part in (value.func, value.args, value.keywords)]
    if isinstance(value, property):
        return [_plain(value.fget), _plain(value.fset)]
    value = inspect.unwrap(getattr(value, "__func__", value))  # what a decorator or a method wraps
    if inspect.isbuiltin(value) or isinstance(value, type) or _of_library(value):
        return f"{value.__module__}.{value.__qualname__}"
    if not inspect.isfunction(value):
        return type(value).__qualname__
    # Two lambdas may share a line, and with it their source.
    code = value.__code__
    apart = [code.co_names, [c for c in code.co_consts if isinstance(c, int | float | str)]]
    return [_source(value), apart] if value.__name__ == "<lambda>" else _source(value)
