"""Claim C4: how the gradients of batches align with each other, with the full gradient, and along the trajectory.

"Full gradient" means the expected gradient of a batch. Its squared norm and its inner products are estimated from
different batches, so that no batch's noise meets itself and nothing has to be corrected.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator
from tqdm import tqdm

from paper_lib import runs
from paper_lib.data import Dataset
from paper_lib.errors import require
from paper_lib.probing import derivatives, probe
from paper_lib.probing.derivatives import full_gradients
from paper_lib.results import figures
from paper_lib.runs import Run
from paper_lib.training.flat import NetFactory

# --- several batches at one point --------------------------------------------------------------------------------


def measure_points(
    trajectories: Sequence[Run],
    dataset: Dataset,
    at: Sequence[int],
    sizes: Sequence[int] | None = None,
    n_images: int = 2048,
    model: NetFactory | None = None,
) -> pd.DataFrame:
    """Norms and cosines of the gradients of K fresh batches at each run's snapshots `at`, for batches of each size.

    K is n_images / size, between 8 and 64. One row per seed, step and size, with the columns of `alignment`.
    Default for `sizes`: the run's own batch size.
    """
    tables = []
    jobs = [(run, step, size) for run in trajectories for step in at for size in sizes or [run.config.batch_size]]
    nets = {run: runs.network(run, dataset, model) for run in trajectories}
    for run, step, size in tqdm(jobs, desc="gradients of fresh batches"):
        k = int(np.clip(n_images // size, 8, 64))
        batches = probe.fixed_batches(dataset, k, size, seed=step + run.config.seed)
        gram = derivatives.gram(nets[run], np.array(run.at(step)), *batches)
        tables.append({"seed": run.config.seed, "step": step, "size": size, **alignment(gram)})
    return pd.DataFrame(tables)


def alignment(gram: np.ndarray) -> dict[str, float]:
    """What the Gram matrix (K, K) of K batch gradients g_k says about alignment; ConfigError for K < 3.

    `norm2` = E|g|^2; `full2` = |E g|^2, from pairs; `noise2` = their difference; `batch_batch` = mean cosine of two
    batches; `batch_full` = mean cosine of a batch and the mean of the K - 1 others; `batch_full_predicted` = the same
    from batch_batch = c: c / sqrt(c + (1 - c) / (K - 1)), which tends to sqrt(c) for many batches.
    """
    k = len(gram)
    require(k >= 3, "number of batches", k, "alignment needs at least 3")
    norms, pairs = np.sqrt(np.diag(gram)), ~np.eye(k, dtype=bool)
    norm2, full2 = np.mean(norms**2), gram[pairs].mean()
    c = (gram / np.outer(norms, norms))[pairs].mean()
    with_others = gram.sum(1) - norms**2  # g_k . sum of the others
    others_norm = np.sqrt(gram.sum() - 2 * with_others - norms**2)
    rest = max(c, 0) + (1 - c) / (k - 1)
    return {
        "norm2": norm2,
        "full2": full2,
        "noise2": norm2 - full2,
        "batch_batch": c,
        "batch_full": np.mean(with_others / (norms * others_norm)),
        "batch_full_predicted": c / np.sqrt(rest),
    }


# --- gradients used along the trajectory ---------------------------------------------------------------------------


def measure_lags(
    trajectories: Sequence[Run],
    dataset: Dataset,
    first: int,
    n_lags: int = 21,
    n_points: int = 100,
    n_batches: int = 4,
    model: NetFactory | None = None,
) -> pd.DataFrame:
    """Inner products of gradients k = 0..n_lags-1 steps apart, from step `first` to the end of each recorded run.

    One row per seed and lag: means over n_points steps t, in units of E|g|^2, of `used` = g_t . g_{t+k}, `full` =
    G_t . g_{t+k}, where G_t is a full gradient estimated from n_batches held-out batches (so that this has the
    expectation of G_t . G_{t+k}), and `predicted`, what the model makes of G_t for `used` (see `model_product`).
    """
    tables = []
    for run in trajectories:
        c = run.config
        last = c.steps - n_lags
        require(last >= first, "window", (first, c.steps), f"{n_lags} lags need as many steps after the first")
        steps = np.unique(np.linspace(first, last, n_points).astype(int))
        sums = np.zeros((3, n_lags))
        for t, _, full in full_gradients(run, steps, n_batches):
            g, v = run.gradients(t, t + n_lags - 1)
            sums += [g @ g[0], g @ full, model_product(g @ full, v @ full, c.momentum)]
        columns = dict(zip(("used", "full", "predicted"), sums / sums[0, 0], strict=True))
        tables.append(pd.DataFrame({"seed": c.seed, "lag": np.arange(n_lags), **columns}))
    return pd.concat(tables, ignore_index=True)


def model_product(full_g: np.ndarray, full_v: np.ndarray, momentum: float = 0.0) -> np.ndarray:
    """What the stationary model predicts for E g_t . g_{t+k}, whatever the curvatures are; (n,), NaN at lag 0.

    From full_g = E G_t . g_{t+k} and full_v = E G_t . v_{t+k}, (n,) each, it is

        full_g[k] - (1 - m) (full_v[k] + full_v[k-1]),    which for m = 0, where v = g, is -full_g[k-1]:

    the gradients used at t and t + k are as opposed as the full gradients at t and t + k - 1 are aligned. It is
    `quadratic.gradient_cosine` summed over directions (claim C4).
    """
    return np.append(np.nan, full_g[1:] - (1 - momentum) * (full_v[1:] + full_v[:-1]))


def ratio(lags: pd.DataFrame, first: int, last: int) -> pd.Series:
    """`used` over `predicted` of `measure_lags` by seed, each summed over the lags first..last."""
    sums = lags[lags.lag.between(first, last)].groupby("seed")[["used", "predicted"]].sum()
    return sums.used / sums.predicted


def measure_displacement(
    trajectories: Sequence[Run],
    dataset: Dataset,
    first: int,
    windows: Sequence[int],
    n_points: int = 40,
    n_batches: int = 4,
    model: NetFactory | None = None,
) -> pd.DataFrame:
    """Full gradient G_t against the displacement of x_t from the mean of the iterates within window / 2 steps of it.

    Windows are even: the mean has as many iterates before t as after it, window + 1 in all. One row per seed and
    window, means over n_points steps t: `work` = G_t . (x_t - mean) in units of lr E|g_t|^2 / 2, where the model has it
    once the mean is the minimum, i.e. the window longer than every timescale; `cosine` of the displacement and the
    expectation of G_t, whose squared norm is E G_t . g_t.
    """
    half, rows = max(windows) // 2, []
    for run in trajectories:
        c = run.config
        steps = np.arange(first + half, c.steps - half)
        require(len(steps) > 0, "windows", tuple(windows), f"the run has {c.steps - first} steps after the first")
        steps = np.unique(np.linspace(steps[0], steps[-1], n_points).astype(int))
        for t, x, full in full_gradients(run, steps, n_batches):
            g = run.gradients(t, t)[0][0]
            for w in windows:
                away = x - run.window(t - w // 2, t + w // 2).mean(0)
                rows.append((c.seed, w, full @ away, c.lr * (g @ g) / 2, full @ g, away @ away))
    columns = ["seed", "window", "product", "scale", "full2", "away2"]
    means = pd.DataFrame(rows, columns=columns).groupby(["seed", "window"]).mean()
    cosine = means["product"] / np.sqrt(means.full2.clip(lower=0) * means.away2)
    return pd.DataFrame({"work": means["product"] / means.scale, "cosine": cosine}).reset_index()


def measure_eta(
    trajectories: Sequence[Run],
    dataset: Dataset,
    first: int,
    n_points: int = 12,
    n_batches: int = 4,
    model: NetFactory | None = None,
) -> pd.Series:
    """lr E[g^T H g] / E|g|^2 by seed: the mean eta over the directions of batch gradients g.

    H is the Hessian of n_batches held-out batches at the same point; the model has cos(batch, batch) at half of this.
    """
    found = {}
    for run in trajectories:
        net, c = runs.network(run, dataset, model), run.config
        products = np.zeros(2)
        for t in np.linspace(first, c.steps - 1, n_points).astype(int):
            g = run.gradients(t, t)[0][0]
            held = run.held(t, n_batches)
            curvature = derivatives.curvature(net, np.array(run.at(t)), g, *held).mean() + c.weight_decay
            products += [curvature * (g @ g), g @ g]
        found[c.seed] = c.lr * products[0] / products[1]
    return pd.Series(found, name="eta").rename_axis("seed")


# --- figures -------------------------------------------------------------------------------------------------------


def plot_lags(ax: Axes, table: pd.DataFrame) -> None:
    """Products of the gradients used k steps apart, of full and later gradients, and the model's prediction."""
    apart, colors = table.query("lag > 0"), sns.color_palette()
    figures.band(ax, apart, "lag", "full", label="full gradient · later gradient", color=colors[0], marker="o")
    figures.band(ax, apart, "lag", "used", label="gradient used · later one used", color=colors[1], marker="o")
    model = apart.groupby("lag").predicted.mean()
    figures.predicted(ax, model.index, model, label="model, for the gradients used")
    ax.axhline(0, color="0.6", linewidth=1)
    ax.set(xlabel="steps between the two gradients", ylabel="inner product / E|g|²")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def plot_sizes(ax: Axes, table: pd.DataFrame, reference: int) -> None:
    """Squared norms against batch size; the model: constant full gradient, noise ~ 1 / size from the reference's."""
    colors = sns.color_palette()
    figures.band(ax, table, "size", "norm2", label="batch gradient", color=colors[1], marker="o")
    figures.band(ax, table, "size", "full2", label="full gradient (from pairs)", color=colors[0], marker="o")
    at, sizes = table.query("size == @reference")[["full2", "noise2"]].mean(), np.unique(table["size"])
    figures.predicted(ax, sizes, at.full2 + at.noise2 * reference / sizes, label=f"model, from batches of {reference}")
    figures.predicted(ax, sizes, np.full(len(sizes), at.full2), label=None)
    ax.set(xscale="log", yscale="log", xlabel="batch size", ylabel="squared norm")
    ax.set_xticks(sizes, sizes)
    ax.minorticks_off()
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")


def plot_cosines(ax: Axes, table: pd.DataFrame, x: str) -> None:
    """Cosines of batch with batch and batch with the mean of the others against column `x`, and the model's."""
    colors = sns.color_palette()
    figures.band(ax, table, x, "batch_full", label="batch, mean of the others", color=colors[0], marker="o")
    figures.band(ax, table, x, "batch_batch", label="batch, batch", color=colors[1], marker="o")
    model = table.groupby(x).batch_full_predicted.mean()
    figures.predicted(ax, model.index, model, label="predicted from batch, batch")
    ax.set(ylabel="cosine", ylim=(0, None))


def plot_displacement(ax: Axes, table: pd.DataFrame) -> None:
    """What the full gradient says about the way back to the mean of windows of growing length."""
    colors = sns.color_palette()
    figures.band(ax, table, "window", "work", label="G · (x − mean) / (lr E|g|² / 2)", color=colors[0], marker="o")
    figures.band(ax, table, "window", "cosine", label="cosine of G and x − mean", color=colors[2], marker="o")
    figures.predicted(ax, table.window.unique(), np.ones(table.window.nunique()), label="model, long windows")
    ax.set(xscale="log", xlabel="iterates in the mean", ylabel="ratio, cosine", ylim=(0, None))
    ax.set_title("full gradient and displacement")
    ax.set_xticks(table.window.unique(), table.window.unique())
    ax.minorticks_off()
    ax.legend(fontsize="small")
