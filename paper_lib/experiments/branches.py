"""Holds averages of a run against trained branches of it: an average's schedule, or a cooldown.

Claim C6 goes from averages to schedules, claim C10 from cooldowns to averages that emulate them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from paper_lib.averaging import schedules, vectors
from paper_lib.averaging.equivalence import batch_weights, to_average, to_schedule
from paper_lib.config import RunConfig, describe
from paper_lib.errors import check_names, require
from paper_lib.experiments.tables import tabulated
from paper_lib.probing.derivatives import hessian_vector_products
from paper_lib.probing.evaluation import Evaluator
from paper_lib.runs import Run, branch_all
from paper_lib.theory.quadratic import stationary_variance

EMA_BEGINS = 0.01  # weight of the iterate with which an EMA begins: it needs no longer branch
RECORDED = 24  # snapshots of a branch, evenly spaced in the logarithm of the steps since it began
FIELDS = ("family", "setting", "end", "span", "stride")  # of an emulation, in a table
POINTS = ("average", "schedule", "last")


@dataclass(frozen=True)
class Emulation:
    """An average that ends at step `end` of a run, and the schedule that should end where it lies.

    `family` is that of the average, and `setting` the decay of an "EMA", the window of a "uniform"
    average or the lag of "two points": then the schedule, its tail sums, follows. Or it is the name
    of a cooldown of schedules.COOLDOWNS, and `setting` its length: then the average follows. Only
    every `stride`-th iterate, counted back from `end`, is averaged. ConfigError for another family.
    """

    family: str
    setting: float
    end: int
    stride: int = 1

    def __post_init__(self) -> None:
        allowed = [*vectors.FAMILIES, *schedules.COOLDOWNS]
        check_names([self.family], allowed, "family of averages, or cooldown")

    @property
    def is_cooldown(self) -> bool:
        """Whether the schedule is given, and the average follows from it."""
        return self.family in schedules.COOLDOWNS

    @property
    def span(self) -> int:
        """Steps from the first iterate of the average to `end`: what a branch costs."""
        if self.family == "EMA":
            return math.ceil(math.log(EMA_BEGINS) / math.log(self.setting))
        return int(self.setting)

    @property
    def begin(self) -> int:
        """The step at which the branch leaves the run."""
        return self.end - self.span

    @property
    def schedule(self) -> np.ndarray:
        """Factors (span,) of the learning rate."""
        if self.is_cooldown:
            return schedules.factors(self.family, self.span)
        return to_schedule(self.weights())

    def weights(self, momentum: float = 0.0) -> np.ndarray:
        """The average over x_begin..x_end, (span + 1,), of a run with this momentum."""
        if self.is_cooldown:
            return to_average(self.schedule, momentum=momentum)
        return vectors.FAMILIES[self.family](self.span + 1, self.setting)

    def on_snapshots(self, run: Run) -> np.ndarray:
        """The average over the run's snapshots, (n_snapshots,).

        SnapshotError unless the run kept step `end`; ConfigError unless it kept one before it.
        """
        back = self.end - run.steps
        kept = run.steps[(back >= 0) & (back <= self.span) & (back % self.stride == 0)]
        allowed = f"it leaves {len(kept)} snapshots in {self.span} steps"
        require(len(kept) > 1, "stride", self.stride, allowed)
        a = np.zeros(len(run.steps))
        weights = self.weights(run.config.momentum)
        a[run.rows([*kept[:-1], self.end])] = vectors.on_snapshots(weights, kept - self.begin)
        return a

    def branch(self, run: RunConfig, **changes: Any) -> RunConfig:
        """The run that leaves `run` at `begin` and follows the schedule, on the same batches."""
        schedule = self.family if self.is_cooldown else tuple(self.schedule.tolist())
        return leave(run, self.begin, self.span, **{"schedule": schedule, **changes})


def leave(run: RunConfig, at: int, n_steps: int, **changes: Any) -> RunConfig:
    """The branch of `run` from step `at` on, with RECORDED snapshots, and settings changed.

    At the first step of `run` it leaves the parent, which has kept its momentum.
    """
    steps = at + np.unique(np.geomspace(1, n_steps, RECORDED).round().astype(int))
    parent = run.parent if at == run.start and run.parent is not None else run
    settings = {"parent": parent, "record": describe(np.append(at, steps))}
    return run.branch(n_steps, at=at, **{**settings, **changes})


def sweep(family: str, settings: Sequence[float], run: RunConfig) -> list[Emulation]:
    """Averages of a family that end where `run` does, but those that begin before it does."""
    every = [Emulation(family, setting, run.steps) for setting in settings]
    return [e for e in every if e.begin >= run.start]


def early_cooldowns(
    steps: np.ndarray, begin: int, lengths: Sequence[int], least: int = 9
) -> list[Emulation]:
    """Linear cooldowns between recorded steps (n,), from the first at or after `begin`.

    They are at least as long as asked for, and span `least` snapshots or more; where the record
    ends before, all that are left. ConfigError for fewer than 2.
    """
    steps = steps[steps >= begin]
    name = f"number of snapshots from step {begin} on"
    require(len(steps) > 1, name, len(steps), "a cooldown needs at least two")
    ends = np.maximum(steps.searchsorted(np.add(steps[0], lengths)), least - 1)
    ends = steps[np.unique(ends.clip(max=len(steps) - 1))]
    return [Emulation("linear", int(end - steps[0]), int(end)) for end in ends]


def train(emulations: Sequence[Emulation], runs: Sequence[Run], **changes: Any) -> list[list[Run]]:
    """For every run, the branch of each emulation, with settings changed: what `measure` needs."""
    configs = [e.branch(run.config, **changes) for run in runs for e in emulations]
    branches, n = branch_all(runs, configs), len(emulations)
    return [branches[i : i + n] for i in range(0, len(branches), n)]


@tabulated
def measure(
    emulations: Sequence[Emulation],
    runs: Sequence[Run],
    branches: Sequence[Sequence[Run]],
    evaluate: Mapping[int, Evaluator],
) -> Iterator[dict]:
    """Compare averages of runs with the ends of their branches (see `train`), and the runs' own.

    One row per run and emulation: the fields and `span` of the emulation, seed, <point>_<quantity>
    for the quantities of `Evaluator` and POINTS (the run itself at `end` is "last"), `noise`, the
    sum of the squared weights: the share of the noise that is left of independent iterates, and the
    columns of `geometry`.
    """

    @functools.cache  # emulations share end points
    def evaluated(run: Run, step: int) -> dict[str, float]:
        return evaluate[run.config.seed](run.at(step))

    for i, run in enumerate(tqdm(runs, desc="averages and schedules")):
        seed = run.config.seed
        a = np.stack([e.on_snapshots(run) for e in emulations])
        averages = _averages(emulations, a, run)
        for e, weights, average, branch in zip(emulations, a, averages, branches[i], strict=True):
            row = {name: getattr(e, name) for name in FIELDS} | {"seed": seed}
            found = evaluate[seed](average), evaluated(branch, e.end), evaluated(run, e.end)
            for point, quantities in zip(POINTS, found, strict=True):
                row |= {f"{point}_{name}": value for name, value in quantities.items()}
            row["noise"] = weights @ weights
            yield row | geometry(run.at(e.begin), average, branch.at(e.end))


def _averages(emulations: Sequence[Emulation], a: np.ndarray, run: Run) -> np.ndarray:
    """Averages (k, P) with weights a (k, n): cooldowns, which share their end, in one pass."""
    if all(e.is_cooldown for e in emulations):
        return vectors.average(a, run.weights)
    return np.stack([vectors.average(weights, run.weights) for weights in a])


def geometry(start: np.ndarray, average: np.ndarray, end: np.ndarray) -> dict[str, float]:
    """How an average and a branch's end lie, seen from where they start, each (P,).

    moved = |average - start|, distance = |end - average|, cosine of the displacements from `start`
    (NaN where one did not move).
    """
    a, b = (np.asarray(point, np.float64) - start for point in (average, end))
    moved, length = np.linalg.norm(a), np.linalg.norm(b)
    cosine = float(a @ b / (moved * length)) if moved * length else math.nan
    return {"moved": float(moved), "distance": float(np.linalg.norm(b - a)), "cosine": cosine}


@tabulated
def follow(runs: Sequence[Run], branches: Sequence[Run], predict: bool = False) -> Iterator[dict]:
    """Where one branch of each run lies, against the average that emulates its schedule so far.

    One row per run and snapshot of its branch: seed, `after` (steps since branching), the columns
    of `geometry`, and with `predict` predicted_<column>: the same of where batches with a Hessian
    of their own take the branch (`emulated`, a Hessian product per step). ConfigError for that with
    momentum.
    """
    for run, branch in zip(runs, branches, strict=True):
        c, first, factors = run.config, branch.config.start, branch.lr / run.config.lr
        require(not (predict and c.momentum), "momentum", c.momentum, "the prediction has none")
        x, kept = run.window(first, branch.config.steps), set(branch.steps.tolist())
        product = batch_hessians(run, first) if predict else None
        for n, (average, gap) in enumerate(emulated(x, factors, product), start=1):
            if first + n not in kept:
                continue
            row = {"seed": c.seed, "after": n, **geometry(x[0], average, branch.at(first + n))}
            if predict:
                model = geometry(x[0], average, average + gap)
                row |= {f"predicted_{name}": value for name, value in model.items()}
            yield row


Product = Callable[[int, np.ndarray], np.ndarray]


def emulated(
    x: np.ndarray, factors: np.ndarray, product: Product | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Averages of a run that emulate the first t steps of a schedule, and what they miss.

    x (T + 1, P) are the iterates of plain SGD, `factors` (T,) the schedule's. Yields y_t (P,) and
    e_t (P,), t = 1..T, float64: y_t = x_0 + sum_(s<t) f_s (x_(s+1) - x_s) is the average, and the
    iterate of SGD under the schedule on the same batches is y_t + e_t with e_0 = 0,
    e_(t+1) = e_t - f_t lr H_t (e_t + y_t - x_t), exact where the batches' losses are quadratics,
    each with a Hessian of its own. `product(t, d)` is lr H_t d with weight decay; without, e_t = 0.
    """
    y, e = np.array(x[0], np.float64), np.zeros(x.shape[1])
    for t, f in enumerate(factors):
        if product is not None and t:  # at first both are zero
            e = e - f * product(t, e + y - x[t])
        y = y + f * (x[t + 1].astype(np.float64) - x[t])
        yield y, e


def batch_hessians(run: Run, first: int) -> Product:
    """lr (H_t + weight decay) d of the batch of step first + t, at the run's own iterate."""
    net, c = run.network(), run.config

    def product(t: int, d: np.ndarray) -> np.ndarray:
        batch = run.batches([first + t])
        (found,) = hessian_vector_products(net, run.at(first + t), d, *batch)
        return c.lr * (found + c.weight_decay * d)

    return product


def mismatches(table: pd.DataFrame, away: int = 2) -> pd.DataFrame:
    """Mean training loss (nats) between averages of a family and schedules, per seed.

    |schedule - average| for their `own` schedules; for those `away` settings off, on either side;
    for `one`, the middle setting's; for their own with other `seeds` (NaN if there are none).
    """
    losses = table.pivot(index="setting", columns="seed")
    a, s = (losses[f"{point}_train_loss"].to_numpy() for point in ("average", "schedule"))
    n, seeds = a.shape
    apart = np.abs(a[:, None] - s)  # by setting of the average, of the schedule, and seed
    settings = np.abs(np.subtract.outer(range(n), range(n)))
    others = [np.abs(np.delete(s, k, axis=1) - a[:, [k]]) for k in range(seeds)]
    columns = {
        "own": np.abs(a - s).mean(0),
        "away": apart[settings == min(away, n - 1)].mean(0),
        "one": apart[:, n // 2].mean(0),
        "seeds": [each.mean() if each.size else np.nan for each in others],
    }
    return pd.DataFrame(columns, index=losses["average_train_loss"].columns)


def variance_gap(e: Emulation, eta: np.ndarray) -> np.ndarray:
    """Variance under e's schedule minus that of its average, over an iterate's, by eta (n,).

    Both of a stationary run of the quadratic model; zero in the limit of eta = 0.
    """
    column, v = np.asarray(eta)[:, None], stationary_variance(eta)
    average = batch_weights(e.weights(), column) ** 2
    scheduled = batch_weights(vectors.last(e.span + 1), column * e.schedule) ** 2
    more = scheduled - average  # of the start, and of the minima, whose variance is 1
    return more[:, 1:].sum(1) / v + more[:, 0]


def missed(table: pd.DataFrame) -> pd.Series:
    """Share of trained cooldowns' gain in training loss that averages miss or overshoot, per seed.

    Sum of |average - schedule| over that of |last - schedule|: 0 for equivalence, 1 if averaging
    did nothing.
    """
    points = table[["average_train_loss", "last_train_loss"]]
    gaps = points.sub(table.schedule_train_loss, axis=0).abs().groupby(table.seed).sum()
    return gaps.average_train_loss / gaps.last_train_loss
