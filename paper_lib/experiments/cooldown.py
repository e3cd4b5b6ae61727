"""One run, many schedules: cooldowns emulated by averages of a constant run, against trained ones (claim C10)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from tqdm import tqdm

from paper_lib.averaging import schedules, vectors
from paper_lib.averaging.equivalence import to_average
from paper_lib.config import RunConfig
from paper_lib.errors import require
from paper_lib.experiments import emulation
from paper_lib.experiments.timescales import Modes
from paper_lib.probing.evaluation import Evaluator
from paper_lib.results import figures
from paper_lib.runs import Run


@dataclass(frozen=True)
class Cooldown:
    """A named cooldown of the last `length` steps before step `end` of a run, and the average that emulates it.

    `eta` is the lr x curvature for which the average is exact; 0 is the limit of slow directions, in which the schedule
    is its tail sums. Only every `stride`-th iterate, counted back from `end`, is used.
    """

    schedule: str
    length: int
    end: int
    eta: float = 0.0
    stride: int = 1

    @property
    def begin(self) -> int:
        """The step at which the cooldown leaves the run."""
        return self.end - self.length

    def weights(self, run: Run) -> np.ndarray:
        """The average over the run's snapshots, (n_snapshots,); SnapshotError unless it kept `end` and one more."""
        a = to_average(schedules.factors(self.schedule, self.length), self.eta, run.config.momentum)
        back = self.end - run.steps
        kept = run.steps[(back >= 0) & (back <= self.length) & (back % self.stride == 0)]
        require(len(kept) > 1, "stride", self.stride, f"it leaves {len(kept)} snapshots in {self.length} steps")
        on_run = np.zeros(len(run.steps))
        on_run[run.rows([*kept[:-1], self.end])] = vectors.on_snapshots(a, kept - self.begin)
        return on_run

    def branch(self, run: RunConfig, **changes) -> RunConfig:
        """The run that leaves `run` where the cooldown begins and trains it, on the same batches."""
        return emulation.leave(run, self.begin, self.length, **{"schedule": self.schedule, "record": "", **changes})


def early(steps: np.ndarray, begin: int, lengths: Sequence[int], least: int = 9) -> list[Cooldown]:
    """Linear cooldowns between recorded steps (n,), from the first at or after `begin`, at least as long as asked for.

    Each spans `least` snapshots or more; where the record ends before, all that are left. ConfigError for fewer than 2.
    """
    steps = steps[steps >= begin]
    require(len(steps) > 1, f"number of snapshots from step {begin} on", len(steps), "a cooldown needs at least two")
    ends = np.maximum(steps.searchsorted(np.add(steps[0], lengths)), least - 1)
    ends = steps[np.unique(ends.clip(max=len(steps) - 1))]
    return [Cooldown("linear", int(end - steps[0]), int(end)) for end in ends]


def measure(
    cooldowns: Sequence[Cooldown],
    trajectories: Sequence[Run],
    trained: Sequence[Sequence[Run]],
    evaluate: Mapping[int, Evaluator],
    modes: Sequence[Modes] | None = None,
) -> pd.DataFrame:
    """Hold averages against the ends of trained cooldowns (`emulation.branches`) and the run's own iterates.

    One row per cooldown and seed: its fields and `begin`; <point>_<quantity> for the quantities of `Evaluator` at the
    points emulated, trained, last (the run at `end`) and start (the run at `begin`); `noise`, the sum of the squared
    weights: the share of the noise that is left of independent iterates; and the columns of `emulation.geometry`. With
    `modes`, one per trajectory, averages are corrected along these directions, and `steep` is the distance from the
    trained network along them, `steep_plain` without correction.
    """
    rows = []
    for i, run in enumerate(tqdm(trajectories, desc="cooldowns")):
        a = np.stack([c.weights(run) for c in cooldowns])
        averages, known = vectors.average(a, run.weights), {}
        for c, weights, average, branch in zip(cooldowns, a, averages, trained[i], strict=True):
            end, row = branch.at(c.end), {**vars(c), "begin": c.begin, "seed": run.config.seed}
            if modes is not None:
                V, plain = modes[i].directions, average
                average = plain + correction(modes[i], c)
                row |= {"steep": np.linalg.norm(V @ (average - end)), "steep_plain": np.linalg.norm(V @ (plain - end))}
            points = {
                "emulated": (c, average),
                "trained": (branch.folder, end),
                "last": (c.end, run.at(c.end)),
                "start": (c.begin, run.at(c.begin)),
            }
            for point, (key, at) in points.items():
                if key not in known:
                    known[key] = evaluate[run.config.seed](at)
                row |= {f"{point}_{quantity}": value for quantity, value in known[key].items()}
            rows.append(row | {"noise": weights @ weights} | emulation.geometry(run.at(c.begin), average, end))
    return pd.DataFrame(rows)


def correction(m: Modes, c: Cooldown) -> np.ndarray:
    """What moves the average of `c` to the one with the right eta along each stable direction of `m`, (P,).

    ConfigError for a stride: the weights of every iterate are known, not those of some.
    """
    require(c.stride == 1, "stride", c.stride, "only averages of every iterate can be corrected")
    config, factors = m.run.config, schedules.factors(c.schedule, c.length)
    eta = config.lr * m.h[m.stable, None]
    exact = to_average(factors, eta, config.momentum, signed=True)
    iterates = m.projected[c.begin - m.first : c.end + 1 - m.first, m.stable]
    shift = ((exact - to_average(factors, c.eta, config.momentum)) * iterates.T).sum(1)
    return shift.astype(np.float32) @ m.directions[m.stable]


def missed(table: pd.DataFrame, quantity: str = "train_loss") -> pd.Series:
    """Share of the trained cooldowns' gain over no cooldown that the averages miss or overshoot, per seed.

    Sum of |emulated - trained| over that of |last - trained|: 0 for equivalence, 1 if averaging did nothing.
    """
    trained = table[f"trained_{quantity}"]
    gap = (table[f"emulated_{quantity}"] - trained).abs().groupby(table.seed).sum()
    return gap / (table[f"last_{quantity}"] - trained).abs().groupby(table.seed).sum()


def given_up(sparse: pd.DataFrame, dense: pd.DataFrame, quantity: str = "train_loss") -> pd.Series:
    """Share of the gain of averaging all iterates that averaging fewer of them gives up, per seed.

    The same cooldowns must stand in both tables.
    """
    few, every = (t.groupby("seed")[f"emulated_{quantity}"].mean() for t in (sparse, dense))
    return (few - every) / (dense.groupby("seed")[f"last_{quantity}"].mean() - every)


def plot_lengths(ax: Axes, table: pd.DataFrame, quantity: str = "train_loss") -> None:
    """A quantity against the length of the cooldown, a colour a schedule: averages hollow, trained networks filled.

    Bars are one spread either side; grey: no cooldown.
    """
    lengths, names = sorted(table.length.unique()), list(dict.fromkeys(table.schedule))
    for i, (name, color) in enumerate(zip(names, sns.color_palette(), strict=False)):
        one, aside = table[table.schedule == name], 1.07 ** (i - (len(names) - 1) / 2)
        for point, style in (("emulated", {"fmt": "s-", "mfc": "white", "linewidth": 1}), ("trained", {"fmt": "o"})):
            seeds = figures.summarize(one, f"{point}_{quantity}", "length")
            label = name if point == "trained" else None
            ax.errorbar(seeds.length * aside, seeds["mean"], seeds.spread, color=color, label=label, **style)
    last = table.groupby("seed")[f"last_{quantity}"].mean()
    ax.axhspan(last.mean() - last.std(), last.mean() + last.std(), color="0.85", linewidth=0, zorder=0)
    ax.plot([], [], "s-", color="0.4", mfc="white", linewidth=1, label="average of the run")
    ax.plot([], [], "o", color="0.4", label="trained cooldown")
    ax.axhline(last.mean(), color="0.6", zorder=0, label="no cooldown")
    ax.set(xscale="log", xlabel="length of the cooldown (steps)", xticks=lengths, xticklabels=lengths)
    ax.minorticks_off()


def plot_pairs(ax: Axes, table: pd.DataFrame, quantity: str = "train_loss") -> None:
    """The trained network's result against the average's, one dot per cooldown and seed, on the line of equality."""
    for (schedule, one), color in zip(table.groupby("schedule", sort=False), sns.color_palette(), strict=False):
        x, y = one[f"emulated_{quantity}"], one[f"trained_{quantity}"]
        ax.scatter(x, y, color=color, label=schedule, s=45, alpha=0.8, edgecolor="white", linewidth=0.5)
    ends = table[[f"emulated_{quantity}", f"trained_{quantity}"]].to_numpy()
    figures.predicted(ax, [ends.min(), ends.max()], [ends.min(), ends.max()], label="equality")
    ax.set(xlabel="average of the run (nats)", ylabel="trained cooldown (nats)")
    ax.legend(fontsize="small")


def plot_checkpoints(ax: Axes, table: pd.DataFrame, quantity: str = "train_loss") -> None:
    """Loss of averages against the number of checkpoints that they use, and the model for independent checkpoints.

    With weights a it leaves the share sum(a^2) of the gain of averaging every iterate.
    """
    table = table.assign(checkpoints=table.length // table.stride + 1)
    for (schedule, one), color in zip(table.groupby("schedule", sort=False), sns.color_palette(), strict=False):
        figures.band(ax, one, "checkpoints", f"emulated_{quantity}", color=color, label=schedule, marker="o")
        mean = one.groupby("checkpoints")[[f"emulated_{quantity}", f"last_{quantity}", "noise"]].mean()
        dense = mean[f"emulated_{quantity}"].iloc[-1]
        model = dense + mean.noise * (mean[f"last_{quantity}"] - dense)
        figures.predicted(ax, mean.index, model, label=None, color=color, linewidth=1.5)
    counts = sorted(table.checkpoints.unique())
    ax.set(xscale="log", xlabel="checkpoints in the cooldown", xticks=counts, xticklabels=counts)
    ax.minorticks_off()
    ax.legend(fontsize="small", title="dashed: independent checkpoints", title_fontsize="small")


def plot_eta(ax: Axes, table: pd.DataFrame, quantity: str = "train_loss") -> None:
    """Average minus trained against the eta for which the average is exact, a colour a schedule; 0: tail sums."""
    table = table.assign(gap=table[f"emulated_{quantity}"] - table[f"trained_{quantity}"])
    for (schedule, one), color in zip(table.groupby("schedule", sort=False), sns.color_palette(), strict=False):
        figures.band(ax, one, "eta", "gap", color=color, label=schedule, marker="o")
    etas = np.unique(table.eta)
    figures.predicted(ax, etas, np.zeros(len(etas)), label="equivalence")
    ax.set_xscale("symlog", linthresh=etas[1], linscale=0.5)
    ax.set(xlim=(0, None), xlabel=f"assumed {figures.ETA} (0: tail sums)")
    ax.legend(fontsize="small")


def plot_maps(ax: Axes, maps: Mapping[str, pd.DataFrame], quantity: str = "train_loss") -> None:
    """Average minus trained by schedule, a marker a seed and a bar for the mean, for several ways to average."""
    names = list(dict.fromkeys(next(iter(maps.values())).schedule))
    for j, ((label, table), color) in enumerate(zip(maps.items(), sns.color_palette(), strict=False)):
        gap = table[f"emulated_{quantity}"] - table[f"trained_{quantity}"]
        at = table.schedule.map(names.index) + 0.25 * (j - (len(maps) - 1) / 2)
        ax.scatter(at, gap, color=color, s=40, alpha=0.8, label=label)
        for x, mean in gap.groupby(at).mean().items():
            ax.plot([x - 0.1, x + 0.1], [mean] * 2, color=color)
    figures.predicted(ax, [-0.5, len(names) - 0.5], [0, 0], label="equivalence")
    ax.set(xticks=range(len(names)), xticklabels=names)
    ax.legend(fontsize="small")


def plot_falling(ax: Axes, tables: Mapping[str, pd.DataFrame], quantity: str = "train_loss") -> None:
    """Average minus trained against the fall of the run's own loss meanwhile, one dot per cooldown and seed."""
    for (label, table), color in zip(tables.items(), sns.color_palette(), strict=False):
        fall = table[f"start_{quantity}"] - table[f"last_{quantity}"]
        gap = table[f"emulated_{quantity}"] - table[f"trained_{quantity}"]
        ax.scatter(fall, gap, color=color, s=45, alpha=0.8, edgecolor="white", linewidth=0.5, label=label)
    figures.predicted(ax, np.array(ax.get_xlim()), np.zeros(2), label="equivalence")
    ax.set(xlabel="fall of the run's own loss meanwhile (nats)")
    ax.legend(fontsize="small")


def plot_weights(ax: Axes, tables: Mapping[str, pd.DataFrame]) -> None:
    """Distance of average and trained network over the average's displacement, against the length of the cooldown."""
    for label, table in tables.items():
        relative = table.assign(relative=table.distance / table.moved)
        figures.band(ax, relative, "length", "relative", label=label, marker="o")
    lengths = sorted(relative.length.unique())
    figures.predicted(ax, lengths, np.zeros(len(lengths)), label="equivalence")
    ax.set(xscale="log", xlabel="length of the cooldown (steps)", xticks=lengths, xticklabels=lengths)
    ax.set(ylabel="distance / displacement", ylim=(-0.08, None))
    ax.minorticks_off()
    ax.legend(fontsize="small")
