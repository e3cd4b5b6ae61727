"""The key of a run: the first 12 hex digits of a hash of everything that decides its bits.

That is: every setting (parents nested, so a default added later changes the key), the numbers that
settings yield (the learning rate of every step, the weight vectors of averages), the dataset's
fingerprint, what a user's own network says of itself, and the source of the folders data/ and
training/ (comments, docstrings and layout left out).
"""

from __future__ import annotations

import ast
import contextlib
import copyreg
import dis
import functools
import hashlib
import itertools
import json
import pickle
import random
import sys
import types
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from paper_lib.averaging import schedules, vectors
from paper_lib.config import RunConfig
from paper_lib.data import Dataset
from paper_lib.errors import ConfigError, brief, require
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
        "loss": of_network(dataset.loss),
        "network": None if net is None else of_factory(config, dataset, net),
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

NAMED = {"torch", "torchvision", "numpy", *sys.stdlib_module_names}
INSTALLED = {"site-packages", "dist-packages"}
# That everyone draws from: what they have come to says nothing of a network.
GENERATORS: dict[str, Any] = {"random": random._inst, "numpy.random": np.random.mtrand._rand}
WRAPPERS = property, staticmethod, classmethod, functools.cached_property, type(functools.cache(id))

Items = Iterable[tuple[str, Any]]  # what a value is made of, and what each adds to its path

_repeatable: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def of_network(net: Any) -> str:
    """Hash of a network as it begins, or a loss, in every process of one minor version of Python.

    It takes all that can be reached from the module: tensors, which of them are shared or trained,
    buffers of every kind, submodules and their training modes, hooks, attributes, and of classes
    and functions of the user's the bytecode, constants, defaults, closures, and global variables
    that they name. Comments and layout count nowhere. A class or function of an installed package
    counts by its name and file, one of Python, NumPy, torch and torchvision by its name.

    Not seen: what is imported inside a function, found by a computed name (`getattr`), reached
    through two modules (`a.b.c`), or read from files and the environment while training. A module
    of the user's own that a function names counts by its file.
    Raises ConfigError for what cannot be told from another of its kind, such as an open file.
    """
    return hashlib.sha256(repr([text for _, text in describe(net)]).encode()).hexdigest()


def of_factory(config: RunConfig, dataset: Dataset, net: NetFactory) -> str:
    """Hash of what a factory makes; ConfigError with the cause where two calls make two things."""
    one = initial_model(config, dataset, net).module
    if _repeatable.get(id(net)) is not net:
        _require_same(one, config, dataset, net)
        with contextlib.suppress(TypeError):  # one without weak references is tried each time
            _repeatable[id(net)] = net
    return of_network(one)


def _require_same(one: nn.Module, config: RunConfig, dataset: Dataset, net: NetFactory) -> None:
    """ConfigError with the cause unless a factory makes its first network `one` anew."""
    states = {name: pickle.dumps(generator) for name, generator in GENERATORS.items()}
    other = initial_model(config, dataset, net).module
    drawn = [
        name for name, generator in GENERATORS.items() if states[name] != pickle.dumps(generator)
    ]
    old = {id(tensor) for tensor in [*one.parameters(), *one.buffers()]}
    named = [*other.named_parameters(), *other.named_buffers()]
    shared = [name for name, tensor in named if id(tensor) in old][:3]
    allowed = f"two calls share {shared}: make new modules in each, by copy.deepcopy if need be"
    require(not shared, "net", net, allowed)
    pairs = itertools.zip_longest(describe(one), describe(other), fillvalue=("its size", ""))
    differing = next((a[0] for a, b in pairs if a[1] != b[1]), "")
    cause = " and ".join(drawn) or "something that torch.manual_seed does not seed"
    allowed = (
        f"two calls differ at {differing}, which depends on {cause}: draw by torch's generator"
    )
    require(not differing, "net", net, f"{allowed}, or seed the other inside the function")


def describe(
    value: Any, path: str = "", seen: dict[int, tuple[int, Any]] | None = None
) -> Iterator[tuple[str, str]]:
    """Yield what a network (or other value) is made of: the path of each part, and a text for it.

    `seen` numbers what came before, of which the number alone is said.
    """
    path, seen = path or type(value).__name__, {} if seen is None else seen
    plain = type(value) in (type(None), type(...), bool, int, float, complex, str, bytes)
    if text := repr(value) if plain else _name(value):
        yield path, text
    elif id(value) in seen:
        yield path, f"as {seen[id(value)][0]}"
    else:
        if type(value) not in (tuple, frozenset):  # equal constants may be one object, or two
            seen[id(value)] = len(seen), value  # kept alive, or another would get its number
        items = list(_items(value, path))
        yield path, f"{type(value).__qualname__} of {len(items)}"
        for name, item in items:
            yield from describe(item, path + name, seen)


def _name(value: Any) -> str:
    """Name of a module, or of a library's class or function; "" for other things."""
    if isinstance(value, types.ModuleType):
        return _module(value.__name__)
    if any(value is generator for generator in GENERATORS.values()):
        return type(value).__name__
    if isinstance(value, type):
        libraries = [_library(cls.__module__) for cls in value.__mro__]
        return f"{libraries[0]}.{value.__qualname__}" if all(libraries) else ""
    if isinstance(value, types.FunctionType):
        library = "" if value.__closure__ else _library(value.__globals__.get("__name__"))
        return f"{library}.{value.__qualname__}" if library else ""
    return ""


def _library(module: str | None) -> str:
    """What stands for a module of Python's or an installed one; "" for those of the user."""
    known = module is None or module.partition(".")[0] in NAMED
    file = Path(getattr(sys.modules.get(str(module)), "__file__", None) or "")
    installed = module != "__main__" and INSTALLED.intersection(file.parts)
    return _module(str(module)) if known or installed else ""


@functools.cache  # as it was imported, not as it is after an edit
def _module(name: str) -> str:
    """Name of a module and, but for Python's, NumPy's and torch's, a hash of its file."""
    file = Path(getattr(sys.modules.get(name), "__file__", None) or "")
    known = name.partition(".")[0] in NAMED or not file.is_file()
    return name if known else f"{name} {hashlib.sha256(file.read_bytes()).hexdigest()}"


def _items(value: Any, path: str) -> Items:
    """What a value is made of; ConfigError where only its address tells it from another."""
    if isinstance(value, nn.Module):
        return _of_module(value)
    if isinstance(value, Tensor):
        return _of_tensor(value)
    if isinstance(value, type):
        return _of_class(value)
    if isinstance(value, types.FunctionType):
        return _of_function(value)
    if isinstance(value, types.CodeType):
        return _of_code(value)
    if type(value) is dict:
        return [pair for k, v in value.items() for pair in ((" key", k), (f"[{k!r}]", v))]
    if type(value) in (list, tuple):
        return [(f"[{i}]", item) for i, item in enumerate(value)]
    if type(value) in (set, frozenset):
        return [("", text) for text in sorted(repr([*describe(item)]) for item in value)]
    if isinstance(value, WRAPPERS):
        names = ("fget", "fset", "func", "__wrapped__")
        return [(f".{name}", getattr(value, name, None)) for name in names]
    return _of_object(value, path)


def _of_module(module: nn.Module) -> Items:
    yield "", type(module)
    usual = vars(nn.Module())  # empty unless used, and another torch may have more
    for name, value in vars(module).items():
        if name not in usual:
            yield f".{name}", value
        elif value and "_hooks" in name:  # whose keys count the hooks of this process
            yield f".{name}", list(value.values())
        elif value:
            yield from ((f".{key}", held) for key, held in _pairs(value))


def _of_tensor(tensor: Tensor) -> Items:
    dense = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
    data = dense.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    yield "", f"{tensor.dtype} {list(tensor.shape)} {tensor.requires_grad}"
    yield "", hashlib.sha256(data).hexdigest()
    for hooks in (tensor._backward_hooks, tensor._post_accumulate_grad_hooks):
        yield " hooks", list((hooks or {}).values())


def _of_class(cls: type) -> Items:
    """Bases and, unless it is a library's, methods and constants."""
    yield from ((" base", base) for base in cls.__bases__)
    # Sorted, as a class is that was sent to another process. Of Python's own attributes, most say
    # nothing of what it does, such as the number of its first line.
    for name, value in sorted(vars(cls).items() if not _library(cls.__module__) else ()):
        special = name.startswith("__") and not isinstance(value, types.FunctionType | classmethod)
        slot = isinstance(value, types.MemberDescriptorType)
        if not (special or slot or name == "_abc_impl"):
            yield f".{name}", value


def _of_function(function: types.FunctionType) -> Items:
    """Code, defaults, closure, global variables and own attributes of a function."""
    library = _library(function.__globals__.get("__name__"))
    yield "", f"{library}.{function.__qualname__}" if library else function.__code__
    names = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    for name, cell in names:
        with contextlib.suppress(ValueError):  # one that is still empty
            yield f" {name}", cell.cell_contents
    if library:
        return
    yield " defaults", (function.__defaults__, function.__kwdefaults__, vars(function))
    for name in sorted(_global_names(function.__code__) & set(function.__globals__)):
        yield f" {name}", function.__globals__[name]


def _global_names(code: types.CodeType) -> set[str]:
    loads = ("LOAD_GLOBAL", "LOAD_NAME")
    names = {one.argval for one in dis.get_instructions(code) if one.opname in loads}
    inner = [const for const in code.co_consts if isinstance(const, types.CodeType)]
    return names.union(*map(_global_names, inner))


def _of_code(code: types.CodeType) -> Items:
    counts = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags
    names = code.co_names, code.co_varnames, code.co_cellvars, code.co_freevars
    yield "", repr((code.co_code, code.co_exceptiontable, counts, names))
    yield " constants", code.co_consts


def _of_object(value: Any, path: str) -> Items:
    """What pickle would keep of an object."""
    try:
        reduce = copyreg.dispatch_table.get(type(value))
        reduced = reduce(value) if reduce else value.__reduce_ex__(4)
    except Exception as error:  # of the object's own
        allowed = "nothing tells it from another: make it inside `forward`, or leave it out"
        raise ConfigError(f"{path} = {brief(value)} is not allowed: {allowed} ({error})") from error
    if isinstance(reduced, str):
        return [("", f"{type(value).__qualname__} {reduced}")]
    function, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
    if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):
        state = {**(state[0] or {}), **state[1]}  # of attributes and slots, which workers mix
    state = [(f".{k}", v) for k, v in _pairs(state)]
    return [("", (function, arguments)), *state, ("", [*(items or ())]), ("", [*(pairs or ())])]


def _pairs(value: Any) -> Items:
    """The items of a dictionary with text as keys, or any other value under no name."""
    named = isinstance(value, dict) and all(isinstance(key, str) for key in value)
    return list(value.items()) if named else [("", value)]
