"""Claim C6: averages of a run against branches of it under the equivalent schedule, in loss and in weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

from paper_lib import runs
from paper_lib.averaging import vectors
from paper_lib.averaging.equivalence import to_average, to_schedule
from paper_lib.config import RunConfig, describe
from paper_lib.data import Dataset
from paper_lib.errors import check_names
from paper_lib.probing.evaluation import Evaluator
from paper_lib.results import figures
from paper_lib.runs import Run
from paper_lib.training.flat import NetFactory

EMA_BEGINS = 0.01  # weight of the iterate with which an EMA begins: it needs no longer branch
RECORDED = 24  # snapshots of a branch, evenly spaced in the logarithm of the steps since it began
POINTS = ("average", "schedule", "last")
AFTER = "steps since branching"


@dataclass(frozen=True)
class Emulation:
    """An average that ends at step `end` of a run, and the schedule that should end in the same place.

    `setting` is the decay of an "EMA", the window of a "uniform" average or the lag of "two points". `eta` is the
    lr x curvature that the schedule is exact for; 0 is the limit of slow directions, where it is the tail sums.
    """

    family: str
    setting: float
    end: int
    eta: float = 0.0

    def __post_init__(self) -> None:
        check_names([self.family], list(vectors.FAMILIES), "family of averages")

    @property
    def span(self) -> int:
        """Steps from the first iterate of the average to `end`: what a branch costs."""
        if self.family == "EMA":
            return math.ceil(math.log(EMA_BEGINS) / math.log(self.setting))
        return int(self.setting)

    @property
    def weights(self) -> np.ndarray:
        """The average over x_(end-span)..x_end, (span + 1,)."""
        return vectors.FAMILIES[self.family](self.span + 1, self.setting)

    @property
    def schedule(self) -> np.ndarray:
        """Factors (span,) of the equivalent schedule."""
        return to_schedule(self.weights, self.eta)

    def average(self, run: Run) -> np.ndarray:
        """The average of the run's iterates, (P,)."""
        return vectors.average(self.weights, run.window(self.end - self.span, self.end))

    def branch(self, run: RunConfig, **changes) -> RunConfig:
        """The run that leaves `run` where the average begins and follows the schedule, on the same batches."""
        return leave(run, self.end - self.span, self.span, schedule=tuple(self.schedule.tolist()), **changes)


def leave(run: RunConfig, at: int, n_steps: int, **changes) -> RunConfig:
    """A branch with its snapshots; at the first step of `run` it leaves the parent, which has kept its momentum."""
    steps = at + np.unique(np.geomspace(1, n_steps, RECORDED).round().astype(int))
    parent = run.parent if at == run.start and run.parent is not None else run
    settings = {"parent": parent, "record": describe(np.append(at, steps))}
    return run.branch(n_steps, at=at, **{**settings, **changes})


def sweep(family: str, settings: Sequence[float], run: RunConfig) -> list[Emulation]:
    """Averages of one family that end where `run` does, without those that reach back beyond its start."""
    every = [Emulation(family, setting, run.steps) for setting in settings]
    return [e for e in every if e.span <= run.steps - run.start]


def branches(
    emulations: Sequence[Emulation],
    trajectories: Sequence[Run],
    dataset: Dataset | None = None,
    model: NetFactory | None = None,
    **changes,
) -> list[list[Run]]:
    """Train what `measure` compares: for every trajectory, the branch of each emulation, with settings changed."""
    configs = [e.branch(run.config, **changes) for run in trajectories for e in emulations]
    found = runs.train_all(configs, dataset, model)
    n = len(emulations)
    return [found[i : i + n] for i in range(0, len(found), n)]


def measure(
    emulations: Sequence[Emulation],
    trajectories: Sequence[Run],
    branched: Sequence[Sequence[Run]],
    evaluate: Mapping[int, Evaluator],
) -> pd.DataFrame:
    """Compare averages with the ends of the branches and with the run's own iterate there: no decay.

    One row per emulation and seed, with <point>_<quantity> for the points average, schedule and last and for the
    quantities of `Evaluator`, and the columns of `geometry`. Averages that differ in eta only are evaluated once.
    """
    rows, known = [], {}
    pairs = [
        (run, e, b)
        for run, ends in zip(trajectories, branched, strict=True)
        for e, b in zip(emulations, ends, strict=True)
    ]
    for run, e, branch in tqdm(pairs, desc="averages and schedules"):
        seed, average, end = run.config.seed, e.average(run), branch.at(e.end)
        points = {
            "average": ((run, e.family, e.setting, e.end), average),
            "schedule": (branch, end),
            "last": ((run, e.end), run.at(e.end)),
        }
        row = {"family": e.family, "setting": e.setting, "end": e.end, "span": e.span, "eta": e.eta, "seed": seed}
        for point, (key, weights) in points.items():
            if key not in known:
                known[key] = evaluate[seed](weights)
            row |= {f"{point}_{quantity}": value for quantity, value in known[key].items()}
        rows.append(row | geometry(run.at(e.end - e.span), average, end))
    return pd.DataFrame(rows)


def geometry(start: np.ndarray, average: np.ndarray, end: np.ndarray) -> dict[str, float]:
    """moved = |average - start|, distance = |end - average|, cosine of the two displacements from `start`."""
    a, b = (np.asarray(point, np.float64) - start for point in (average, end))
    moved, length = np.linalg.norm(a), np.linalg.norm(b)
    cosine = float(a @ b / (moved * length)) if moved * length else math.nan
    return {"moved": float(moved), "distance": float(np.linalg.norm(b - a)), "cosine": cosine}


def follow(trajectories: Sequence[Run], ends: Sequence[Run]) -> pd.DataFrame:
    """Distance of one branch of each run, at each of its snapshots, from the average that emulates its schedule so far.

    For a constant schedule that average is the run's own iterate. Columns: seed, `after` (steps since branching),
    and those of `geometry`.
    """
    rows = []
    for run, branch in zip(trajectories, ends, strict=True):
        first, factors = branch.config.start, branch.lr / run.config.lr
        start = np.array(run.at(first))
        for step in branch.steps[branch.steps > first]:
            n = int(step) - first
            average = vectors.average(to_average(factors[:n]), run.window(first, first + n))
            rows.append({"seed": run.config.seed, "after": n, **geometry(start, average, branch.at(int(step)))})
    return pd.DataFrame(rows)


def agreement(table: pd.DataFrame, quantity: str = "train_loss") -> pd.DataFrame:
    """How well the schedules of a sweep follow its averages, per seed, without a free parameter.

    `correlation`; `rms` difference; `spread` = the averages' range; `share` = the sum of |schedule - average| as a
    share of the sum of |last - average|: 0 for equivalence, 1 if the schedule did nothing.
    """
    rows = []
    for seed, one in table.groupby("seed"):
        average, schedule, last = (one[f"{point}_{quantity}"].to_numpy() for point in POINTS)
        gap = schedule - average
        rows.append(
            {
                "seed": seed,
                "correlation": np.corrcoef(average, schedule)[0, 1] if len(one) > 1 else math.nan,
                "rms": np.sqrt(np.mean(gap**2)),
                "spread": np.ptp(average),
                "share": np.abs(gap).sum() / np.abs(last - average).sum(),
            }
        )
    return pd.DataFrame(rows).set_index("seed")


def plot_sweep(ax: Axes, table: pd.DataFrame, quantity: str = "train_loss") -> None:
    """The schedule's result against the average's, one dot a seed, on the line of equality."""
    families = table.groupby("family", sort=False)
    for (family, one), color in zip(families, sns.color_palette(), strict=False):
        x, y = one[f"average_{quantity}"], one[f"schedule_{quantity}"]
        ax.scatter(x, y, color=color, label=family, s=45, alpha=0.8, edgecolor="white", linewidth=0.5)
    both = table[[f"average_{quantity}", f"schedule_{quantity}"]].to_numpy()
    ends = np.array([both.min(), both.max()])
    figures.predicted(ax, ends, ends, label="equality")
    r, rms = np.corrcoef(both.T)[0, 1], np.sqrt(np.mean(np.diff(both) ** 2))
    ax.set(xlabel="average of the run (nats)", ylabel="branch with its schedule (nats)")
    ax.annotate(
        f"r = {r:.2f}, rms difference {rms:.3f}\n{len(both)} dots, no free parameter",
        (0.98, 0.04), xycoords="axes fraction", ha="right", fontsize="small",
    )  # fmt: skip
    ax.legend(loc="upper left", fontsize="small")


def plot_curves(ax: Axes, table: pd.DataFrame, quantity: str = "train_loss") -> None:
    """Average, branch and the run itself, against the step at which all three end."""
    labels = {"last": "no decay: the run itself", "average": "average of the run", "schedule": "branches that end here"}
    for (point, label), color in zip(labels.items(), ("0.6", *sns.color_palette()[:2]), strict=True):
        style = {"linestyle": "none", "marker": "o"} if point == "schedule" else {"marker": "."}
        figures.band(ax, table, "end", f"{point}_{quantity}", label=label, color=color, **style)
    ax.set(xlabel="step")


def plot_eta(ax: Axes, table: pd.DataFrame, quantity: str = "train_loss") -> None:
    """Schedule minus average, and no decay minus average, against the eta that the schedule assumes."""
    gaps = table.assign(
        schedule=table[f"schedule_{quantity}"] - table[f"average_{quantity}"],
        last=table[f"last_{quantity}"] - table[f"average_{quantity}"],
    )
    figures.band(ax, gaps, "eta", "last", label="no decay", color="0.6")
    figures.band(ax, gaps, "eta", "schedule", label="schedule for this η", color=sns.color_palette()[1], marker="o")
    figures.predicted(ax, np.unique(table.eta), np.zeros(table.eta.nunique()), label="equivalence")
    smallest = table.eta[table.eta > 0].min()
    ax.set_xscale("symlog", linthresh=smallest, linscale=0.5)
    ax.set(xlim=(0, None), xlabel=f"assumed {figures.ETA} (0: tail sums)")


def plot_weights(fig: Figure, axes: Sequence[Axes], follows: Mapping[str, pd.DataFrame]) -> None:
    """What `follow` found, by name: distances on the first of two axes, cosines on the second, one legend beside."""
    _plot_divergence(axes[0], follows)
    _plot_cosine(axes[1], follows)
    entries = {name: line for ax in axes for line, name in zip(*ax.get_legend_handles_labels(), strict=True)}
    fig.legend(entries.values(), entries.keys(), loc="outside right center", fontsize="small")


def _plot_divergence(ax: Axes, follows: Mapping[str, pd.DataFrame]) -> None:
    """Distance from the emulating average against the steps since branching; dotted: how far the average moved."""
    for label, table in follows.items():
        figures.band(ax, table, "after", "distance", log=True, label=label)
    moved = next(iter(follows.values())).groupby("after").moved.mean()
    ax.plot(moved.index, moved, color="0.4", linestyle=":", label="the average's own displacement")
    ax.set(xscale="log", yscale="log", xlabel=AFTER, ylabel="distance in weights")


def _plot_cosine(ax: Axes, follows: Mapping[str, pd.DataFrame]) -> None:
    """Cosine between the displacements of a branch and of the emulating average since they shared their start."""
    for label, table in follows.items():
        figures.band(ax, table, "after", "cosine", label=label)
    figures.predicted(ax, np.array(ax.get_xlim()), np.ones(2), label="equivalence")
    ax.set(xscale="log", ylim=(None, 1.05), xlabel=AFTER, ylabel="cosine of displacements")
