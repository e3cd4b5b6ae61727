"""Measures averages of two iterates against their lag, and what predicts them (claim C8)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.optimize import least_squares
from tqdm import tqdm

from paper_lib.averaging import vectors
from paper_lib.errors import require
from paper_lib.experiments.tables import tabulated
from paper_lib.probing import derivatives, hessian, probe
from paper_lib.probing.evaluation import Evaluator
from paper_lib.runs import Run


def ends(run: Run, n: int = 9) -> list[int]:
    """Up to n steps at which averages end, evenly spaced from the middle of a run to its end.

    The end alone where the run kept no iterates, but averages that were accumulated.
    """
    first, last = run.config.start, run.config.steps
    if not run.config.record:
        return [last]
    return np.unique(np.linspace((first + last) // 2, last, n).astype(int)).tolist()


def average_at(run: Run, name: str, end: int) -> np.ndarray:
    """The average (P,) of this name (`vectors.named`) over a run's iterates up to step `end`."""
    a = vectors.named(name, end - run.config.start + 1)
    if end == run.config.steps:
        return run.average(a)
    return vectors.average(a, run.window(run.config.start, end))


@tabulated
def measure(
    runs: Sequence[Run],
    evaluate: Mapping[int, Evaluator],
    averages: Mapping[str, str],
    stale: bool = False,
) -> Iterator[dict]:
    """Evaluate averages of runs at `ends`: `averages` has their names (`vectors.named`) by label.

    BatchNorm statistics are recomputed at the weights or, if `stale`, the last iterate's own.
    Columns: method (the label), seed, end and those of `Evaluator`. SnapshotError for iterates
    that a run did not keep.
    """
    jobs = [(run, end, label) for run in runs for end in ends(run) for label in averages]
    for run, end, label in tqdm(jobs, desc="averages"):
        kept = np.array(run.buffers[run.rows(end)[0]]) if stale else None
        weights = average_at(run, averages[label], end)
        row = {"method": label, "seed": run.config.seed, "end": end}
        yield row | evaluate[run.config.seed](weights, kept)


@tabulated
def chords(
    runs: Sequence[Run], evaluate: Mapping[int, Evaluator], lags: Sequence[int], n_ends: int = 3
) -> Iterator[dict]:
    """What the middle of a chord d = x_t - x_(t-L) gains, and what its ends predict.

    `gain` = mean loss of the ends - loss of the middle (nats), with batch statistics, on the
    evaluators' training images. On a quadratic it is `predicted` = d . (g_t - g_(t-L)) / 8 with g
    the gradients there; in the model its mean is (1 - q^L) / 2 of the excess loss, mixed over all
    curvatures with the right weights. `squared` = |d|^2 mixes them with the wrong ones. One row per
    seed, end (n_ends of them, see `ends`) and lag.
    """
    for run in tqdm(runs, desc="chords"):
        seed = run.config.seed
        net, images = evaluate[seed].net, evaluate[seed].train
        for end in ends(run, n_ends):
            x = np.stack([run.at(end), *(run.at(end - lag) for lag in lags)])
            g = np.stack([derivatives.mean_gradient(net, row, *images) for row in x])
            points = np.concatenate([x, (x[:1] + x[1:]) / 2])
            loss = probe.losses(net, points, *images).mean(1)
            d = np.float64(x[:1]) - x[1:]
            yield {
                "seed": seed,
                "end": end,
                "lag": lags,
                "gain": (loss[0] + loss[1 : len(x)]) / 2 - loss[len(x) :],
                "predicted": np.einsum("lp,lp->l", d, g[:1] - g[1:]) / 8,
                "squared": np.square(d).sum(1),
            }


@tabulated
def steepest(runs: Sequence[Run], lags: Sequence[int], n_batches: int = 8) -> Iterator[dict]:
    """`gain` of chords along each run's steepest direction alone, over its curvature / 8.

    That is the mean over the run of (y_t - y_(t-L))^2, in squared weights: the direction is that of
    the Hessian on n_batches batches at the average of the run. Columns seed, lag, gain.
    """
    for run in tqdm(runs, desc="steepest directions"):
        X = run.window(run.config.start, run.config.steps)
        center = vectors.center(X)
        batches = probe.fixed_batches(run.dataset, n_batches, run.config.batch_size, 0)
        _, (direction,) = hessian.top_directions(run.network(), center, *batches, n=1)
        y = X @ direction - center @ direction
        gain = [np.mean((y[lag:] - y[:-lag]) ** 2) for lag in lags]
        yield {"seed": run.config.seed, "lag": lags, "gain": gain}


def one_rate(lags: np.ndarray, gains: np.ndarray) -> tuple[float, float]:
    """(G, r) of least squares for gains (n,) = G (1 - e^(-r L)), what one curvature gives.

    Lags L (n,) in steps, r > 0 per step: q = e^-r. ConfigError for fewer than two lags.
    """
    require(len(lags) > 1, "lags", list(lags), "two numbers are fitted: give two or more")
    size = np.max(np.abs(gains))

    def errors(logs: np.ndarray) -> np.ndarray:
        return np.exp(logs[0]) * -np.expm1(-np.exp(logs[1]) * lags) - gains / size

    starts = [(0.0, np.log(rate)) for rate in (0.003, 0.03, 0.3, 3)]
    fits = [least_squares(errors, start, bounds=(-12, 5)) for start in starts]
    level, rate = np.exp(min(fits, key=lambda fit: fit.cost).x)
    return float(level * size), float(rate)


def beyond_one_rate(table: pd.DataFrame) -> pd.Series:
    """Gain at the longest lag over what one rate, fitted to the shorter half of lags, says.

    One number a seed: 1 for a single curvature, more for several. `table` has the columns seed, lag
    and gain.
    """
    found = {}
    for seed, rows in table.groupby(["seed", "lag"]).gain.mean().groupby("seed"):
        lags, gains = rows.index.get_level_values("lag").to_numpy(float), rows.to_numpy()
        short = slice(max(2, (len(lags) + 1) // 2))
        level, rate = one_rate(lags[short], gains[short])
        found[seed] = gains[-1] / (level * -np.expm1(-rate * lags[-1]))
    return pd.Series(found, name="ratio").rename_axis("seed")
