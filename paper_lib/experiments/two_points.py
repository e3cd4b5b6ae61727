"""Claim C8: the average of two iterates against their lag, what it is compared with, and what predicts it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from tqdm import tqdm

from paper_lib import runs
from paper_lib.averaging import vectors
from paper_lib.data import Dataset
from paper_lib.errors import check_names
from paper_lib.probing import derivatives, probe
from paper_lib.probing.evaluation import Evaluator
from paper_lib.results import figures
from paper_lib.runs import Run
from paper_lib.training.flat import NetFactory

STATISTICS = ("recomputed", "averaged", "stale")
ONE_CURVATURE = math.log(4) / math.log(4 / 3)
"""Where 1 - q^L reaches 3/4, over where it reaches 1/4: several curvatures spread the gain over more lags than that."""


def ends(run: Run) -> np.ndarray:
    """Three steps at which averages end: the middle, three quarters and the end of a run that began at its start."""
    first, last = run.config.start, run.config.steps
    return first + (last - first) * np.array([2, 3, 4]) // 4


def measure(
    trajectories: Sequence[Run],
    evaluate: Mapping[int, Evaluator],
    lags: Sequence[int],
    statistics: str = "recomputed",
) -> pd.DataFrame:
    """Evaluate averages of two iterates, at each lag for each of `ends`; lag 0 is the last iterate itself.

    `statistics` of BatchNorm are recomputed at the weights, or those of the two iterates averaged, or left stale: the
    last iterate's. Columns: lr, seed, lag, end, statistics and those of `Evaluator`.
    """
    check_names([statistics], STATISTICS, "kind of statistics")
    rows = []
    jobs = [(run, int(end), lag) for run in trajectories for end in ends(run) for lag in lags]
    for run, end, lag in tqdm(jobs, desc="two points"):
        at = run.rows([end - lag, end])
        used = {"recomputed": None, "averaged": run.buffers[at].mean(0), "stale": np.array(run.buffers[at[1]])}
        found = evaluate[run.config.seed](run.weights[at].mean(0), used[statistics])
        labels = {"lr": run.config.lr, "seed": run.config.seed, "lag": lag, "end": end, "statistics": statistics}
        rows.append(labels | found)
    return pd.DataFrame(rows)


def references(
    trajectories: Sequence[Run],
    evaluate: Mapping[int, Evaluator],
    averages: Mapping[str, Callable[[int], np.ndarray]],
    reach: int,
) -> pd.DataFrame:
    """Evaluate averages of many iterates by name (functions of their number), each over `reach` steps before `ends`."""
    rows = []
    jobs = [(run, int(end), name) for run in trajectories for end in ends(run) for name in averages]
    for run, end, name in tqdm(jobs, desc="averages"):
        weights = vectors.average(averages[name](reach + 1), run.window(end - reach, end))
        labels = {"lr": run.config.lr, "seed": run.config.seed, "average": name, "end": end}
        rows.append(labels | evaluate[run.config.seed](weights))
    return pd.DataFrame(rows)


def chords(trajectories: Sequence[Run], evaluate: Mapping[int, Evaluator], lags: Sequence[int]) -> pd.DataFrame:
    """What a quadratic predicts from the ends of each chord d = x_t - x_(t-L) alone, on the evaluators' images.

    The mean of the ends' losses exceeds the midpoint's by `gain` = d . (g_t - g_(t-L)) / 8 with g the gradients of
    the training loss; on average that is the model's (1 - q^L) / 2 of the excess loss, mixed over all curvatures with
    the right weights. `squared` = |d|^2 mixes them with the wrong ones. Columns also: seed, lag, end.
    """
    rows = []
    for run in tqdm(trajectories, desc="gradients at the ends of chords"):
        yardstick, known = evaluate[run.config.seed], {}

        def gradient(step: int, run=run, yardstick=yardstick, known=known) -> np.ndarray:
            if step not in known:
                known[step] = derivatives.mean_gradient(yardstick.net, run.at(step), *yardstick.train)
            return known[step]

        for end in ends(run):
            for lag in lags:
                d = np.float64(run.at(end)) - run.at(end - lag)
                gain = float(d @ (gradient(end) - gradient(end - lag))) / 8
                rows.append({"seed": run.config.seed, "lag": lag, "end": end, "gain": gain, "squared": float(d @ d)})
    return pd.DataFrame(rows)


def memory(
    trajectories: Sequence[Run],
    dataset: Dataset,
    lags: Sequence[int],
    n_batches: int,
    model: NetFactory | None = None,
) -> pd.DataFrame:
    """How much lower a batch's loss is, L steps after the step that used it, than before that step: `dip`.

    In the model it is the sum of h v (2 - eta) q^L over directions: all but the autocorrelation, weighted by loss,
    that decides what two points gain. Rows: seed, lag, averaged over n_batches batches spread over the run.
    """
    tables = []
    for run in tqdm(trajectories, desc="memory of batches"):
        net, config = runs.network(run, dataset, model), run.config
        batches = np.linspace(config.start, config.steps - max(lags) - 1, n_batches).astype(int)
        drops = np.zeros(len(lags))
        for t in batches:
            x, y = dataset.batches([t], config.batch_size, config.stream)
            losses = probe.losses(net, run.weights[run.rows([t, *(t + 1 + np.asarray(lags))])], x, y)[:, 0]
            drops += (losses[0] - losses[1:]) / n_batches
        tables.append(pd.DataFrame({"seed": config.seed, "lag": lags, "dip": drops}))
    return pd.concat(tables, ignore_index=True)


def gains(table: pd.DataFrame, best: pd.Series, quantity: str = "train_loss") -> pd.DataFrame:
    """Mean over `ends` by seed and lag, and what it recovers of the last iterate's excess over `best` (by seed).

    Columns: seed, lag, <quantity>, gain (last iterate's - this), excess (last iterate's - best), recovered.
    """
    means = table.groupby(["seed", "lag"])[quantity].mean().reset_index()
    last = means.query("lag == 0").set_index("seed")[quantity]
    seeds = means.seed
    means["gain"] = seeds.map(last) - means[quantity]
    means["excess"] = seeds.map(last - best)
    return means.assign(recovered=means.gain / means.excess)


def mixture(correlation: np.ndarray) -> np.ndarray:
    """Share of the excess loss that two points recover at an autocorrelation: (1 - rho) / 2."""
    return (1 - np.asarray(correlation)) / 2


def spread_of_lags(gain: pd.DataFrame) -> pd.Series:
    """By seed: the lag at which 3/4 of the longest lag's gain is reached, over that of 1/4 (see ONE_CURVATURE).

    Lags are interpolated in their logarithm; a gain that exceeds 1/4 at the first lag counts as 1/4 there.
    """

    def ratio(one: pd.DataFrame) -> float:
        share = np.maximum.accumulate(one.gain.to_numpy() / one.gain.iloc[-1])
        quarter, three = np.interp([0.25, 0.75], share, np.log(one.lag))
        return float(np.exp(three - quarter))

    positive = gain.query("lag > 0").sort_values("lag")
    return pd.Series({seed: ratio(one) for seed, one in positive.groupby("seed")}, name="spread")


def plot_lags(ax: Axes, table: pd.DataFrame, quantity: str, **line) -> None:
    """Mean over `ends` and spread over seeds of a quantity against the lag (from 1)."""
    seeds = table.query("lag > 0").groupby(["seed", "lag"])[quantity].mean().reset_index()
    figures.band(ax, seeds, "lag", quantity, **{"marker": "o", **line})
    ax.set(xscale="log", xlabel="lag between the two iterates (steps)")


def plot_levels(ax: Axes, levels: Mapping[str, float]) -> None:
    """Dotted lines with their names in the legend, for what has no lag; the palette's first colours are left out."""
    for (name, value), color in zip(levels.items(), sns.color_palette()[2:], strict=False):
        ax.axhline(value, color=color, linewidth=1.5, linestyle=":", label=name)
