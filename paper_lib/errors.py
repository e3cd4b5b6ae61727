"""The error of settings that cannot work, and the checks that raise it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any


class ConfigError(ValueError):
    """A setting that cannot work; one line names the value, what is allowed, and what to do."""


def require(ok: bool, name: str, value: Any, allowed: str) -> None:
    """Raise ConfigError saying what is allowed, unless `ok`."""
    if not ok:
        raise ConfigError(f"{name} = {brief(value)} is not allowed: {allowed}")


def require_folder_name(name: str, value: str) -> None:
    """Raise ConfigError for a value that cannot name a folder, or would name one elsewhere."""
    plain = re.fullmatch(r"\w[\w .+-]{0,49}", str(value)) is not None
    allowed = "at most 50 letters, digits, spaces and _ . + -, beginning with a letter or digit"
    require(plain, name, value, allowed)


def check_names(given: Iterable[str], allowed: Iterable[str], what: str) -> None:
    """Raise ConfigError for a name that is not allowed, with the nearest one that is."""
    allowed = list(allowed)
    for name in given:
        if not isinstance(name, str) or name not in allowed:
            near = difflib.get_close_matches(str(name)[:100], allowed, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"unknown {what} {brief(name)}{hint} (allowed: {', '.join(allowed)})")


def brief(value: Any) -> str:
    """A value as Python writes it, on one line of at most 200 characters."""
    try:
        text = " ".join(repr(value).split())
    except (ValueError, RecursionError):  # thousands of digits, or of levels
        text = f"<{type(value).__name__} too long to show>"
    return text if len(text) <= 200 else f"{text[:197]}..."
