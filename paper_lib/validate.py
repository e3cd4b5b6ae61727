"""Generic checks of settings: names, types and values, with errors that say what is allowed."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from typing import Any

import numpy as np


class ConfigError(ValueError):
    """A setting that cannot work; the message names the value, what is allowed, and what to do."""


def field_names(cls: type) -> list[str]:
    """Names of a dataclass's fields."""
    return [f.name for f in dataclasses.fields(cls)]


def check_names(given: Any, allowed: list[str], what: str) -> None:
    """Raise ConfigError for a name that is not allowed, with the nearest one that is."""
    for name in given:
        if name not in allowed:
            near = difflib.get_close_matches(str(name), allowed, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"unknown {what} {name!r}{hint} (allowed: {', '.join(allowed)})")


def check_types(config: Any) -> None:
    """Coerce what is harmless (int to float, list to tuple) and raise ConfigError for any other wrong type."""
    hints = typing.get_type_hints(type(config))
    for name, hint in hints.items():
        value = getattr(config, name)
        fixed = _coerce(value, hint)
        if fixed is None and value is not None:
            raise ConfigError(f"{name} = {value!r} has the wrong type: expected {_type_name(hint)}")
        object.__setattr__(config, name, fixed)


def _coerce(value: Any, hint: Any) -> Any:
    """Return value as `hint` asks, or None if it is of another type."""
    if isinstance(hint, types.UnionType):
        options = (_coerce(value, option) for option in typing.get_args(hint))
        return next((v for v in options if v is not None), None)
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)[0]
        if not isinstance(value, list | tuple | np.ndarray):
            return None
        items = tuple(_coerce(item, inner) for item in value)
        return None if None in items else items
    if isinstance(value, np.generic):
        value = value.item()
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, bool) and hint is not bool:
        return None
    return value if isinstance(value, hint) else None


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def parse_value(text: str, hint: Any) -> Any:
    """Turn a command-line word into the type of a field: "0,1,2" for tuples, "none" where None is allowed."""
    if isinstance(hint, types.UnionType):
        options = typing.get_args(hint)
        if type(None) in options and text.lower() == "none":
            return None
        return text if str in options else parse_value(text, options[0])
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)[0]
        return tuple(parse_value(word, inner) for word in re.split(r"[,\s]+", text.strip()) if word)
    if hint is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        return hint(text)
    except ValueError:
        return text  # check_types says what was expected


def require(ok: bool, name: str, value: Any, allowed: str) -> None:
    """Raise ConfigError saying what is allowed, unless `ok`."""
    if not ok:
        raise ConfigError(f"{name} = {value!r} is not allowed: {allowed}")
