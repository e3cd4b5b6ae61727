"""Makes functions return tables that they yield part by part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeAlias

import numpy as np
import pandas as pd

Given = ParamSpec("Given")
Part: TypeAlias = pd.DataFrame | Mapping[str, Any]


def tabulated(parts: Callable[Given, Iterator[Part]]) -> Callable[Given, pd.DataFrame]:
    """Let a generator of rows (dicts of scalars), or of several at once, return one table."""

    @wraps(parts)
    def table(*args: Given.args, **kwargs: Given.kwargs) -> pd.DataFrame:
        return pd.concat(map(_frame, parts(*args, **kwargs)), ignore_index=True)

    return table


def _frame(part: Part) -> pd.DataFrame:
    is_row = isinstance(part, Mapping) and not any(map(np.ndim, part.values()))
    return pd.DataFrame([part] if is_row else part)
