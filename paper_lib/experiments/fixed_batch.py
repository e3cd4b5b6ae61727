"""Claim C1: the loss of one fixed batch along a trajectory, and the dip that its own step leaves."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from scipy.optimize import nnls
from tqdm import tqdm

from paper_lib import runs
from paper_lib.data import Dataset
from paper_lib.errors import require
from paper_lib.probing import derivatives, probe
from paper_lib.results import figures
from paper_lib.runs import Run
from paper_lib.training.flat import NetFactory

# --- the window around a batch's own step -----------------------------------------------------------------------


def around(
    trajectories: Sequence[Run],
    dataset: Dataset,
    at: Sequence[int],
    before: int,
    after: int,
    model: NetFactory | None = None,
    n_held: int = 4,
) -> pd.DataFrame:
    """Follow the batch of each step t in `at` from x_{t - before} to x_{t + after}.

    Returns one row per seed, batch (named by t) and offset s: `own`, the batch's loss at x_{t+s} (its own step leads
    from offset 0 to 1), and what the model predicts from gradients at x_t alone. If all batches share a Hessian, own
    and held-out loss differ by a linear function; if the held-out loss is stationary, then on average
    `predicted` = own(0) + (g_own - g_held) . (x_{t+s} - x_t), with g_held the mean over n_held held-out batches.
    `bend_own` and `bend_held` are what both losses gain over the own step beyond first order: equal in the model.
    Raises ValueError for an empty window, SnapshotError where the run did not keep it.
    """
    require(before >= 0 and after >= 1, "window", (-before, after), "it is empty: before >= 0 and after >= 1")
    require(len(at) > 0, "at", list(at), "name at least one step whose batch to follow")
    tables = []
    nets = {run: runs.network(run, dataset, model) for run in trajectories}
    for run, t in tqdm([(run, int(t)) for run in trajectories for t in at], desc="around the own step"):
        own = dataset.batches([t], run.config.batch_size, run.config.stream)
        held = run.held(t, n_held)
        window, start = run.window(t - before, t + after), np.array(run.at(t))
        g_own, g_held = (
            derivatives.gradients(nets[run], start, *own)[0],
            derivatives.mean_gradient(nets[run], start, *held),
        )
        away = [(row - start).astype(np.float64) for row in window]  # its products with a gradient nearly cancel
        loss = probe.losses(nets[run], window, *own)[:, 0].astype(np.float64)
        beside = probe.losses(nets[run], window[before : before + 2], *held).mean(1)
        columns = {
            "offset": np.arange(-before, after + 1),
            "own": loss,
            "predicted": loss[before] + np.array([np.dot(g_own - g_held, d) for d in away]),
            "bend_own": loss[before + 1] - loss[before] - np.dot(g_own, away[before + 1]),
            "bend_held": beside[1] - beside[0] - np.dot(g_held, away[before + 1]),
        }
        tables.append(pd.DataFrame(columns).assign(seed=run.config.seed, batch=t))
    return pd.concat(tables, ignore_index=True)


def dip(table: pd.DataFrame) -> pd.DataFrame:
    """How far a batch's loss lies below its level before its own step, one row per seed and offset s >= 1.

    Means over batches: `dip` measured and `predicted` (nats), `level` = mean own loss over offsets <= 0, `k` = s - 1.
    """
    level = table.query("offset <= 0").groupby("seed").own.mean().rename("level")
    means = table.query("offset >= 1").groupby(["seed", "offset"])[["own", "predicted"]].mean().reset_index()
    means = means.join(level, on="seed")
    start = table.query("offset == 0").groupby("seed").own.mean().rename("start")
    predicted = means.join(start, on="seed").start - means.predicted  # the prediction starts from the loss at x_t
    return means.assign(dip=means.level - means.own, predicted=predicted, k=means.offset - 1).drop(columns="own")


def bend_ratio(table: pd.DataFrame) -> pd.Series:
    """Curvature over the own step, own batch's relative to held-out batches', one value per seed; 1 in the model."""
    means = table.query("offset == 0").groupby("seed")[["bend_own", "bend_held"]].mean()
    return means.bend_own / means.bend_held


def fit_mixture(dips: np.ndarray, n_rates: int) -> tuple[np.ndarray, np.ndarray]:
    """Least-squares fit of dips[k] = sum_j a_j q_j^k with a_j >= 0: (a, q), each (n_rates,), q descending.

    The model's dip (theory: 2 eta s2 q^k in each direction) is such a mixture over curvatures, q = 1 - lr h.
    """
    require(len(dips) > 2 * n_rates, "dips", len(dips), f"{n_rates} rate(s) need more than {2 * n_rates} values")
    k, best = np.arange(len(dips)), (np.inf,)
    for taus in itertools.combinations(np.geomspace(3 * len(dips), 0.3, 60), n_rates):  # decay times in steps
        q = np.exp(-1 / np.array(taus))
        amplitudes, error = nnls(q[None, :] ** k[:, None], dips)
        if error < best[0]:
            best = (error, amplitudes, q)
    return best[1], best[2]


# --- the whole run ----------------------------------------------------------------------------------------------


def history(
    trajectories: Sequence[Run],
    dataset: Dataset,
    batches: Sequence[int],
    steps: Sequence[int] | None = None,
    split: str = "train",
    model: NetFactory | None = None,
) -> pd.DataFrame:
    """Loss of fixed batches at the snapshots `steps` (default: all): rows (seed, batch, step, loss)."""
    tables = []
    for run in trajectories:
        found = run.steps if steps is None else np.asarray(steps)
        stacked = dataset.batches(batches, run.config.batch_size, run.config.stream, split)
        losses = probe.losses(
            runs.network(run, dataset, model), run.weights[run.rows(found)], *stacked, progress=f"whole run, {split}"
        )
        index = pd.MultiIndex.from_product([found, batches], names=["step", "batch"])
        tables.append(pd.DataFrame({"loss": losses.ravel()}, index=index).reset_index().assign(seed=run.config.seed))
    return pd.concat(tables, ignore_index=True)


# --- figures ----------------------------------------------------------------------------------------------------


def plot_window(ax: Axes, table: pd.DataFrame) -> None:
    """Own loss against the offset from the batch's own step: mean and spread over seeds, and the prediction."""
    means = table.groupby(["seed", "offset"])[["own", "predicted"]].mean().reset_index()
    figures.band(ax, means, "offset", "own", label="measured", color=sns.color_palette()[1])
    after = means.query("offset >= 0").groupby("offset").predicted.mean()
    figures.predicted(ax, after.index, after, label="model, from gradients at 0")
    ax.axvline(0, color="0.6", linewidth=1.5, linestyle=":")
    ax.set(xlabel="steps since the batch's own step begins", ylabel="loss of the batch (nats)")
    ax.legend(loc="lower right", fontsize="small", bbox_to_anchor=(1, 0.06))


def plot_forgetting(ax: Axes, table: pd.DataFrame) -> None:
    """The dip against steps since the own step on logarithmic axes, with fitted mixtures of one and two rates."""
    found = dip(table)
    figures.band(ax, found, "offset", "dip", label="measured", color=sns.color_palette()[1])
    mean = found.groupby("offset")[["dip", "predicted"]].mean()
    figures.predicted(ax, mean.index, mean.predicted, label="model, from gradients at 0")
    for n_rates, color in ((1, "0.6"), (2, sns.color_palette()[2])):
        amplitudes, q = fit_mixture(mean.dip.to_numpy(), n_rates)
        curve = (q[None, :] ** np.arange(len(mean))[:, None]) @ amplitudes
        times = " and ".join(f"{-1 / np.log(rate):.0f}" for rate in q[::-1])
        ax.plot(mean.index, curve, color=color, label=f"fit: decay time {times} steps")
    ax.set(xscale="log", xlabel="steps since the batch's own step", ylabel="dip below the earlier level (nats)")
    ax.legend(loc="upper right", fontsize="small")


def plot_history(ax: Axes, means: pd.DataFrame, examples: pd.DataFrame) -> None:
    """Losses over the whole run: mean over batches and seeds (`history`), and single batches, own steps marked."""
    by_seed = means.groupby(["seed", "step"]).loss.mean().reset_index()
    for (batch, one), color in zip(examples.groupby("batch"), sns.color_palette()[1:], strict=False):
        one = one.sort_values("step")
        ax.plot(one.step, one.loss, color=color, linewidth=0.9, label=f"batch of step {batch}")
        own = one.query("step == @batch + 1")
        ax.plot(own.step, own.loss, "v", color=color, markersize=8, markeredgecolor="white")
    figures.band(ax, by_seed, "step", "loss", label="mean over batches", color="black")
    ax.set(xlabel="step of the run", ylabel="loss of the batch (nats)", ylim=(0, None))
    ax.legend(loc="upper right", fontsize="small")
