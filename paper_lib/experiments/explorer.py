"""The model under sliders: one figure of learning rate, decay and lag, drawn once or redrawn as sliders move."""

from __future__ import annotations

import matplotlib.pyplot as plt
from IPython import get_ipython
from ipywidgets import FloatLogSlider, FloatSlider, IntSlider, interactive
from matplotlib.figure import Figure

from paper_lib.experiments import model_figures, plane

LAGS = 200  # the longest, in steps


def explore(lr: float = 0.4, decay: float = 0.95, lag: int = 50, seed: int = 0) -> Figure:
    """Where iterates and averages lie, the equivalent schedules, and the variance ratios, in the plane of plane.H.

    ValueError outside 0 < lr < 2, 0 <= decay < 1, 1 <= lag <= LAGS, and above lr = 1, where the steep direction
    overshoots, for an average that no schedule reproduces.
    """
    fig, (where, schedule, ratio) = plt.subplots(1, 3, figsize=(16, 5.5))
    etas = sorted(lr * plane.H)
    plane.plot_cloud(where, plane.cloud(lr, decay, lag, seed), lr, decay, lag)
    where.set(title="stationary iterates and their averages", xlim=(-2, 2), ylim=(-1.6, 1.6))  # one scale for all
    where.set_aspect("equal", adjustable="box")
    model_figures.plot_both_schedules(schedule, etas, lag, decay, LAGS + 20)
    schedule.set(title="equivalent schedules")
    model_figures.plot_ratios(ratio, etas, lag, decay, LAGS)
    ratio.set(title="variance of averages")
    for ax in (where, schedule, ratio):
        ax.legend(fontsize="small", ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    fig.suptitle(f"learning rate {lr:.2g}, decay {decay:.2g}, lag {lag} steps")
    return fig


def live() -> bool:
    """Whether somebody sits before the notebook: such front ends allow input(), papermill and nbval do not."""
    kernel = getattr(get_ipython(), "kernel", None)
    return kernel is not None and kernel.get_parent()["content"].get("allow_stdin", False)


def sliders(**start) -> interactive | None:
    """`explore` under sliders for lr, decay, lag and seed, which begin at `start`; None where nobody could move them.

    So nothing of them enters an executed notebook, whose reader sees the figure drawn before. (Executing widgets
    without a front end is not harmless either: messages to their outputs have left papermill waiting for ever.)
    """
    if not live():
        return None
    settle = {"continuous_update": False}  # a redraw takes a fraction of a second: only once the slider rests
    start = {"lr": 0.4, "decay": 0.95, "lag": 50, "seed": 0, **start}
    return interactive(
        explore,
        lr=FloatLogSlider(value=start["lr"], min=-2, max=0, step=0.02, description="lr", **settle),
        decay=FloatSlider(value=start["decay"], min=0.0, max=0.99, step=0.01, description="decay", **settle),
        lag=IntSlider(value=start["lag"], min=1, max=LAGS, description="lag", **settle),
        seed=IntSlider(value=start["seed"], min=0, max=9, description="seed", **settle),
    )
