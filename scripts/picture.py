"""Draw results/<preset>/figures/picture: three findings side by side, for the README.

Every number comes from the CSVs behind the figures of claims C3, C6 and C8.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from paper_lib.results import figures
from scripts import damaged, read_figure

SOURCES = {  # and the columns that are drawn: numbers, words
    "03_one_step": ("probe own held trained", "panel"),
    "06_equivalent_schedules": ("average_train_loss schedule_train_loss", "panel family"),
    "08_two_points": ("test_accuracy", "panel method"),
}
FONT_SCALE = 1.7  # of figures.style: the three panels are shown at half their width
METHODS = {  # of the scoreboard, by how they begin: what the picture calls the best of them
    "last iterate": "last iterate",
    "two points": "two far points",
    "half": "half the lr",
    "EMA": "EMA",
    "linear": "linear decay",
}


def one_step(ax: Axes, table: pd.DataFrame) -> None:
    """The loss of a batch after its own step of any size, and that of held-out batches."""
    steps = table[table.panel == "step"]
    trained = steps.trained.mean()
    figures.band(ax, steps, "probe", "own", color="C1")
    figures.band(ax, steps, "probe", "held", color="C0")
    ax.axhline(trained, color="0.5", linestyle=":")
    own, held = (steps.groupby("probe")[name].mean() for name in ("own", "held"))
    right = {"ha": "right", "va": "bottom"}
    ax.annotate("held-out batches", (own.index[-1], held.iloc[-1]), color="C0", **right)
    ax.annotate("its own batch", (own.index[-1], own.iloc[-1]), color="C1", **right)
    ax.annotate("fully trained", (own.index[-1], trained), color="0.35", **right)
    ax.set(xlabel="step / learning rate", ylabel="loss (nats)", ylim=(0, 1.15 * held.max()))
    ax.set_title(f"One step takes its own\nbatch to {own.min():.2f}, others to {held.min():.2f}")


def schedules(ax: Axes, table: pd.DataFrame) -> None:
    """Averages of one run against runs that were trained under the equivalent schedule."""
    shown = table[table.panel == "loss"].dropna(subset=["schedule_train_loss"])
    for (family, rows), marker in zip(shown.groupby("family", sort=False), "osD", strict=False):
        style = {"s": 55, "alpha": 0.8, "edgecolor": "white", "marker": marker}
        ax.scatter(rows.average_train_loss, rows.schedule_train_loss, label=family, **style)
    ends = [shown.average_train_loss.min(), shown.average_train_loss.max()]
    figures.predicted(ax, ends, ends, label=None)  # type: ignore[arg-type]
    away = (shown.average_train_loss - shown.schedule_train_loss).abs().mean()
    ax.set(xlabel="average of one run (nats)", ylabel="trained schedule (nats)")
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.legend(fontsize="small", loc="upper left", handletextpad=0.1)
    ax.set_title(f"Losses of averages and their\nschedules: {away:.3f} nats apart")


def averaging(ax: Axes, table: pd.DataFrame) -> None:
    """Test accuracy of averages beside a lower and a decaying learning rate."""
    board = table[table.panel == "scoreboard"]
    best = board.groupby("method").test_accuracy.mean().sort_values()
    chosen = {  # the longest lag and memory, not the short ones beside them
        best.index[best.index.str.startswith(begin)][-1]: name for begin, name in METHODS.items()
    }
    board = board.assign(name=board.method.map(chosen), accuracy=100 * board.test_accuracy)
    board = board.dropna(subset=["name"])
    figures.dots(ax, board, "accuracy", "name")
    mean = board.groupby("name").accuracy.mean()
    gain = {name: mean[name] - mean["last iterate"] for name in ("two far points", "EMA")}
    ax.set(xlabel="test accuracy (%)")
    ax.set_title(f"Two points gain {gain['two far points']:.1f} points,\nan EMA {gain['EMA']:.1f}")


def draw(results: Path) -> None:
    """Write the picture of a preset, unless one of the three figures is not there.

    Raises ResultError where one is damaged.
    """
    paths = [results / "figures" / f"{name}.csv" for name in SOURCES]
    if not all(path.exists() for path in paths):
        return
    columns = SOURCES.values()
    tables = [read_figure(p.read_bytes(), p, *c) for p, c in zip(paths, columns, strict=True)]
    with plt.rc_context():
        figures.style(FONT_SCALE)
        fig, axes = plt.subplots(1, 3, figsize=(16, 5.2))
        panels = (one_step, schedules, averaging)
        for ax, panel, table, path in zip(axes, panels, tables, paths, strict=True):
            try:
                panel(ax, table)
            except IndexError as error:
                raise damaged(path, "it lacks rows") from error
        figures.save(fig, results, "picture", pd.concat(tables, keys=SOURCES, names=["figure"]))
    plt.close(fig)
