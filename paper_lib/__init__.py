"""Training trajectories, mini-batch losses and the curious role of the learning rate: the library.

    config, presets  what a run and a study are; the studies by name, and `presets.own` for yours
    data             datasets, whose batches are pure functions of (seed, step)
    training         the step loop, networks, any module as one vector, several processes
    runs             runs found by what they are, trained if they do not exist, and read
    probing          losses, gradients, curvature and accuracy at any weights, without a trace
    averaging        averages as weight vectors, as schedules, of checkpoint files, in your own loop
    theory           the quadratic model in closed form and simulated; never needs torch
    experiments      what the notebooks measure, one file a claim
    results          figures, verdicts, reports; how the notebooks are run
    files, errors    where things are kept; the error of settings that cannot work

Begin with notebooks/ and `presets.study`; then runs, probing and averaging, which these call.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.4.0"

PARTS = """averaging config data errors experiments files presets probing results runs theory
training""".split()


def __getattr__(name: str) -> Any:  # parts are imported when first used: torch takes seconds
    if name in PARTS:
        return import_module(f"paper_lib.{name}")
    raise AttributeError(f"module 'paper_lib' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *PARTS]
