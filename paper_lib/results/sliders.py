"""Puts a drawing under sliders, where somebody sits before the notebook to move them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from IPython import get_ipython
from ipywidgets import FloatSlider, IntSlider, SelectionSlider, interactive


def live() -> bool:
    """Whether somebody sits before the notebook.

    Such front ends allow input(); papermill and nbval do not.
    """
    kernel = getattr(get_ipython(), "kernel", None)
    return kernel is not None and kernel.get_parent()["content"].get("allow_stdin", False)


def sliders(draw: Callable[..., Any], **ranges: tuple | list) -> interactive | None:
    """draw(**values) under one slider for each name; None where nobody sees them.

    A range is (least, most, start), of integers or of real numbers, or a list of the values there
    are, of which the middle one comes first. So nothing of them enters an executed notebook, whose
    reader sees a figure drawn before. (Executing widgets without a front end is not harmless
    either: messages to their outputs have left papermill waiting for ever.)
    """
    if not live():
        return None
    return interactive(draw, **{name: _slider(name, given) for name, given in ranges.items()})


def _slider(name: str, given: tuple | list) -> Any:
    settings = {"description": name, "continuous_update": False}  # a redraw takes a while
    if isinstance(given, list):
        return SelectionSlider(options=given, value=given[len(given) // 2], **settings)
    least, most, start = given
    if all(isinstance(value, int) for value in given):
        return IntSlider(min=least, max=most, value=start, **settings)
    return FloatSlider(min=least, max=most, value=start, step=(most - least) / 100, **settings)
