"""What stands for code in a run's key: the syntax of our modules, and everything that a user's network is made of."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
from collections.abc import Iterable
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

LIBRARIES = ("builtins", "torch", "torchvision")  # whose classes count by their name alone


def of_modules(names: Iterable[str], folder: Path = Path(__file__).parents[1]) -> str:
    """Hash of the syntax trees of modules of this package, without docstrings; the same in every Python version."""
    digest = hashlib.sha256()
    for name in names:
        tree = ast.parse((folder / f"{name}.py").read_text())
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and _is_text(body[0]):
                del body[0]
        digest.update(repr(_syntax(tree)).encode())
    return digest.hexdigest()[:16]


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _syntax(value: Any) -> Any:
    """A syntax tree as nested lists, without empty fields: which of those there are depends on the Python version."""
    if isinstance(value, ast.AST):
        fields = [(name, _syntax(field)) for name, field in ast.iter_fields(value) if field not in (None, [])]
        return [type(value).__name__, *fields]
    return [_syntax(item) for item in value] if isinstance(value, list) else repr(value)


def of_network(net: nn.Module) -> str:
    """Hash of a network as it begins: its tensors, and each submodule's attributes and class, the same every time.

    Of a class it takes its constants and the bytecode of its methods, and those of the classes that it extends, up to
    torch's: another Python version gives another hash. Not seen are functions and variables outside the classes that
    their methods use, and attributes other than numbers, strings, tensors, functions, and collections of those.
    """
    ours = vars(nn.Module()).keys()  # torch's own bookkeeping, some of which counts what happened in this process
    parts = [_plain(dict(net.named_parameters())), _plain(dict(net.named_buffers()))]
    for name, module in net.named_modules():
        own = {key: value for key, value in vars(module).items() if key not in ours}
        parts.append([name, _plain(own), [_class(cls) for cls in type(module).__mro__]])
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _class(cls: type) -> list:
    """Name, methods and constants of a class; of a library's, the name."""
    if cls.__module__.partition(".")[0] in LIBRARIES:
        return [cls.__qualname__]
    # Python's own attributes, such as the number of a class's first line, say nothing about what it does.
    own = {k: v for k, v in vars(cls).items() if not k.startswith("__") or isinstance(v, FunctionType)}
    return [cls.__qualname__, _plain(own)]


def _plain(value: Any) -> Any:
    """A value as nested lists of text without addresses, the same in every process; of other objects, the type."""
    match value:
        case Tensor():
            data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            return [str(value.dtype), list(value.shape), hashlib.sha256(data).hexdigest()]
        case CodeType():
            return [value.co_code.hex(), list(value.co_names), _plain(value.co_consts)]
        case FunctionType():
            function = inspect.unwrap(value)  # what a decorator such as torch.no_grad() wraps
            if not isinstance(function, FunctionType):
                return _plain(function)
            return [_plain(part) for part in (function.__code__, function.__defaults__, function.__kwdefaults__)]
        case BuiltinFunctionType() | type():  # torch.tanh, a class
            return [value.__module__, value.__qualname__]
        case MethodType():
            return _plain(value.__func__)
        case functools.partial():
            return [_plain(part) for part in (value.func, value.args, value.keywords)]
        case functools.cached_property():
            return _plain(value.func)
        case torch.dtype() | torch.device():
            return repr(value)
        case staticmethod() | classmethod():
            return _plain(value.__func__)
        case property():
            return [_plain(value.fget), _plain(value.fset)]
        case dict():
            return [[_plain(key), _plain(item)] for key, item in value.items()]
        case list() | tuple():
            return [_plain(item) for item in value]
        case set() | frozenset():
            return sorted((_plain(item) for item in value), key=repr)
        case None | bool() | int() | float() | complex() | str() | bytes():
            return repr(value)
    return _plain(value.__wrapped__) if hasattr(value, "__wrapped__") else type(value).__qualname__
