"""How figures look and where they go: one style; PNG, SVG and the CSV behind them in one call."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paper_lib.files import replacing
from paper_lib.results.palette import shrink

README_WIDTH, LEAST_TICKS = 830, 11
"""Pixels: the width at which GitHub shows a figure, and how high its tick labels must be there."""
PREDICTION = {"color": "black", "linestyle": "--", "linewidth": 2.0, "zorder": 5}
"""Line style of everything the model predicts; measurements are coloured and solid."""
ETA = "η = learning rate × curvature"


def style(font_scale: float = 1.15) -> None:
    """Set the style of every figure: colour-blind-safe, despined, legible from afar."""
    sns.set_theme(context="notebook", style="ticks", palette="colorblind", font_scale=font_scale)
    mpl.rcParams.update(
        {
            "figure.figsize": (7.0, 4.5),  # inches
            "figure.dpi": 100,
            "savefig.dpi": 160,
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": "medium",
            "legend.frameon": False,
            "lines.linewidth": 2.0,
        }
    )


def panels(columns: int = 2, rows: int = 1) -> tuple[Figure, Any]:
    """Return a figure of one or two columns of panels that can be read in the README: (fig, axes).

    `axes` is an Axes for one panel, an array of them for several.
    """
    return plt.subplots(rows, columns, figsize=(6.2 * columns, 4.6 * rows))


def save(fig: Figure, results: Path | str, name: str, data: pd.DataFrame) -> None:
    """Write <results>/figures/<name>.png, .svg and .csv.

    `data` holds the numbers that the figure shows, one row a point, kept to six significant digits.
    The same figure gives the same bytes. Raises ValueError for no data, a name that is not letters,
    digits, "-" and "_", or a figure too wide for its tick labels to be read in the README.
    """
    allowed = "use letters, digits, '-' and '_' only, without a suffix"
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"figure name {name!r}: {allowed}")
    if data.empty:
        raise ValueError(f"figure {name!r} has no data: pass the numbers that it shows")
    _require_legible(fig, name)
    _fit_title(fig)
    stem = Path(results) / "figures" / name
    # A fixed salt and no date make the SVG's ids and header reproducible; text can be searched.
    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        no_date = {".png": {"Software": None}, ".svg": {"Date": None, "Creator": None}}
        for suffix, metadata in no_date.items():
            with replacing(stem.with_name(name + suffix)) as temporary:
                fig.savefig(temporary, metadata=metadata)
                if suffix == ".png":
                    temporary.write_bytes(shrink(temporary.read_bytes()))
    with replacing(stem.with_name(name + ".csv")) as temporary:
        data.to_csv(temporary, index=False, float_format="%.6g", lineterminator="\n")


def _require_legible(fig: Figure, name: str) -> None:
    """Raise ValueError where tick labels would be too small at the README's width."""
    ticks = [label for ax in fig.axes for label in (*ax.get_xticklabels(), *ax.get_yticklabels())]
    smallest = min((float(label.get_fontsize()) for label in ticks), default=np.inf)
    height = smallest / 72 * README_WIDTH / fig.get_figwidth()
    if height < LEAST_TICKS:
        raise ValueError(
            f"figure {name!r}: its tick labels are {height:.1f} pixels high at {README_WIDTH} "
            f"pixels, {LEAST_TICKS} is the least: make it narrower, as figures.panels() does"
        )


def _fit_title(fig: Figure) -> None:
    """Make the title smaller where it would run over the edges, as a long label makes it do."""
    title = getattr(fig, "_suptitle", None)
    if title is not None:
        room = 0.98 * fig.bbox.width / max(1, title.get_window_extent().width)
        title.set_fontsize(title.get_fontsize() * min(1, room))


def summarize(data: pd.DataFrame, y: str, by: str | list[str]) -> pd.DataFrame:
    """Return mean, spread (sample standard deviation) and n of `y` over rows that share `by`."""
    return data.groupby(by, sort=True)[y].agg(mean="mean", spread="std", n="size").reset_index()


def band(
    ax: Axes,
    data: pd.DataFrame,
    x: str,
    y: str,
    hue: str | None = None,
    log: bool = False,
    **line: Any,
) -> pd.DataFrame:
    """Draw the mean of `y` against `x` in a band of one spread, a line per value of `hue`.

    `data` has one row per x, hue and seed. A single seed has a line and no band. With `log`, for
    logarithmic axes, mean and spread are those of the logarithm of what is positive: no band
    reaches below zero. Returns what was drawn: columns x, mean, spread, n (and hue), mean and
    spread of the logarithm with `log`.
    """
    shown = data[data[y] > 0] if log else data
    if log:
        shown = shown.assign(**{y: np.log(shown[y])})
    back = np.exp if log else np.asarray
    summary = summarize(shown, y, [x] if hue is None else [hue, x])
    single = [(line.pop("label", None), summary)]
    for label, group in single if hue is None else summary.groupby(hue, sort=False):
        at, mean, spread = (group[column].to_numpy() for column in (x, "mean", "spread"))
        (drawn,) = ax.plot(at, back(mean), label=label, **line)
        if np.isfinite(spread).any():
            edges = back(mean - spread), back(mean + spread)
            ax.fill_between(at, *edges, color=drawn.get_color(), alpha=0.25, linewidth=0)
    return summary


def predicted(
    ax: Axes, x: np.ndarray, y: np.ndarray, label: str | None = "model", **line: Any
) -> None:
    """Draw what the model predicts, y(x), in its own style (dashed black)."""
    ax.plot(x, y, **{**PREDICTION, "label": label, **line})


def dots(ax: Axes, data: pd.DataFrame, value: str, rows: str, hue: str | None = None) -> None:
    """Draw `value` as a dot a seed and a bar for the mean, one line per value of `rows`.

    A value of `hue` has a colour, and of several in one line each its own height.
    """
    names = list(dict.fromkeys(data[rows]))
    groups = [(None, data)] if hue is None else list(data.groupby(hue, sort=False))
    shared = data.groupby(rows)[hue].nunique().max() > 1 if hue else False
    for i, (label, group) in enumerate(groups):
        aside = 0.2 * (i - (len(groups) - 1) / 2) if shared else 0.0
        at = group[rows].map(names.index) + aside
        found = ax.scatter(group[value], at, color=f"C{i}", s=45, alpha=0.8, label=label)
        for height, mean in group.groupby(at)[value].mean().items():
            ends = [height - 0.12, height + 0.12]
            ax.plot([mean, mean], ends, color="black", zorder=found.zorder + 1)
    ax.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))


def annotate_n(ax: Axes, n: int, log: bool = False) -> None:
    """Say in the corner what bands are, over n seeds; `log` as for `band`."""
    said = f"mean ± s.d.{' of the logarithm' if log else ''}, n = {n} seeds"
    place = {"xycoords": "axes fraction", "xytext": (-4, 4), "textcoords": "offset points"}
    text = {"ha": "right", "va": "bottom", "fontsize": "small", "color": "0.35"}
    ax.annotate(said, (1, 0), **place, **text)
