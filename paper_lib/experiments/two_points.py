"""Measures averages of two iterates against their lag, and what predicts them (claim C8)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from tqdm import tqdm

from paper_lib.averaging import vectors
from paper_lib.errors import check_names
from paper_lib.probing import derivatives, probe
from paper_lib.probing.evaluation import Evaluator
from paper_lib.runs import Run

STATISTICS = ("recomputed", "averaged", "stale")

# Where 1 - q^L reaches 3/4, over where it reaches 1/4, for one curvature: several of them spread
# the gain over more lags than that.
ONE_CURVATURE = math.log(4) / math.log(4 / 3)


def ends(run: Run) -> list[int]:
    """Three steps at which averages end: the middle, three quarters and the end of a run."""
    first, last = run.config.start, run.config.steps
    return [first + (last - first) * quarters // 4 for quarters in (2, 3, 4)]


def measure(
    runs: Sequence[Run],
    evaluate: Mapping[int, Evaluator],
    lags: Sequence[int],
    statistics: str = "recomputed",
) -> pd.DataFrame:
    """Evaluate averages of two iterates, at each lag for each of `ends`; lag 0 is the last itself.

    BatchNorm's `statistics` are recomputed at the weights, or those of the two iterates averaged,
    or left stale: the last iterate's. Columns: lr, seed, lag, end, statistics and those of
    `Evaluator`. ConfigError for other statistics, SnapshotError for an iterate that was not kept.
    """
    check_names([statistics], STATISTICS, "kind of statistics")
    rows = []
    jobs = [(run, end, lag) for run in runs for end in ends(run) for lag in lags]
    for run, end, lag in tqdm(jobs, desc="two points"):
        at = run.rows([end - lag, end])
        kinds = {
            "recomputed": None,
            "averaged": run.buffers[at].mean(0),
            "stale": np.array(run.buffers[at[1]]),
        }
        values = evaluate[run.config.seed](run.weights[at].mean(0), kinds[statistics])
        labels = {"lr": run.config.lr, "seed": run.config.seed, "lag": lag, "end": end}
        rows.append({**labels, "statistics": statistics, **values})
    return pd.DataFrame(rows)


def references(
    runs: Sequence[Run], evaluate: Mapping[int, Evaluator], decay: float, reach: int
) -> pd.DataFrame:
    """Evaluate the EMA of a decay and the uniform average over `reach` steps before `ends`.

    Columns: lr, seed, average ("EMA <decay>" or "uniform"), end and those of `Evaluator`.
    """
    n = reach + 1
    averages = {f"EMA {decay:g}": vectors.ema(n, decay), "uniform": vectors.uniform(n, n)}
    rows = []
    jobs = [(run, end, name) for run in runs for end in ends(run) for name in averages]
    for run, end, name in tqdm(jobs, desc="averages"):
        weights = vectors.average(averages[name], run.window(end - reach, end))
        labels = {"lr": run.config.lr, "seed": run.config.seed, "average": name, "end": end}
        rows.append(labels | evaluate[run.config.seed](weights))
    return pd.DataFrame(rows)


def chords(
    runs: Sequence[Run], evaluate: Mapping[int, Evaluator], lags: Sequence[int]
) -> pd.DataFrame:
    """What a quadratic predicts from the ends of each chord d = x_t - x_(t-L) alone.

    The mean of the ends' losses exceeds the midpoint's by `gain` = d . (g_t - g_(t-L)) / 8 with g
    the gradients of the training loss, on the evaluators' images; on average that is the model's
    (1 - q^L) / 2 of the excess loss, mixed over all curvatures with the right weights. `squared` =
    |d|^2 mixes them with the wrong ones. Columns: seed, lag, end, gain (nats), squared.
    """
    rows = []
    for run in tqdm(runs, desc="gradients at the ends of chords"):
        seed = run.config.seed
        net, images = evaluate[seed].net, evaluate[seed].train
        steps = {end - lag for end in ends(run) for lag in [0, *lags]}
        gradients = {t: derivatives.mean_gradient(net, run.at(t), *images) for t in sorted(steps)}
        for end in ends(run):
            for lag in lags:
                d = np.float64(run.at(end)) - run.at(end - lag)
                gain = float(d @ (gradients[end] - gradients[end - lag])) / 8
                row = {"seed": seed, "lag": lag, "end": end, "gain": gain, "squared": float(d @ d)}
                rows.append(row)
    return pd.DataFrame(rows)


def memory(runs: Sequence[Run], lags: Sequence[int], n_batches: int) -> pd.DataFrame:
    """How much lower a batch's loss is, L steps after the step that used it, than before: `dip`.

    In the model it is the sum of h v (2 - eta) q^L over directions: all but the autocorrelation,
    weighted by loss, that decides what two points gain. One row per seed and lag, averaged over
    n_batches batches spread over the run: seed, lag, dip (nats).
    """
    tables = []
    for run in tqdm(runs, desc="memory of batches"):
        net, config = run.network(), run.config
        batches = np.linspace(config.start, config.steps - max(lags) - 1, n_batches).astype(int)
        drops = np.zeros(len(lags))
        for t in batches:
            weights = run.weights[run.rows([t, *(t + 1 + np.asarray(lags))])]
            losses = probe.losses(net, weights, *run.batches([t]))[:, 0]
            drops += (losses[0] - losses[1:]) / n_batches
        tables.append(pd.DataFrame({"seed": config.seed, "lag": lags, "dip": drops}))
    return pd.concat(tables, ignore_index=True)


def spread_of_lags(gain: pd.DataFrame) -> pd.Series:
    """The lag at which 3/4 of the longest lag's gain is reached, over that of 1/4, by seed.

    `gain` has the columns seed, lag and gain. Lags are interpolated in their logarithm; a gain that
    exceeds 1/4 at the first lag counts as 1/4 there. See ONE_CURVATURE.
    """

    def ratio(of_seed: pd.DataFrame) -> float:
        share = np.maximum.accumulate(of_seed.gain.to_numpy() / of_seed.gain.iloc[-1])
        quarter, three = np.interp([0.25, 0.75], share, np.log(of_seed.lag))
        return float(np.exp(three - quarter))

    positive = gain.query("lag > 0").sort_values("lag")
    return pd.Series({seed: ratio(rows) for seed, rows in positive.groupby("seed")}, name="spread")
