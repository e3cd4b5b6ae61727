"""Claim C10, on recorded runs: what the next gradient says about the last step, and about what an average saves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from paper_lib import runs
from paper_lib.averaging.monitor import BLOCKS, Averages
from paper_lib.data import Dataset
from paper_lib.experiments.stationarity import replay
from paper_lib.probing import probe
from paper_lib.probing.derivatives import full_gradients
from paper_lib.results import figures
from paper_lib.runs import Run
from paper_lib.training.flat import NetFactory


def measure_velocity(
    trajectories: Sequence[Run],
    dataset: Dataset,
    first: int,
    n_points: int = 100,
    n_batches: int = 4,
    model: NetFactory | None = None,
) -> pd.DataFrame:
    """E g_t . v_(t-1) along recorded runs, and what the model makes of it from full gradients, -|E g|^2 / (1 + m).

    One row per seed: seed; `used`, over all steps from first + 1 (first + 2 with momentum) to the end; `predicted`,
    from the product of g_t with the mean gradient G_t of n_batches held-out batches at n_points of these steps.
    """
    rows = []
    for run in trajectories:
        c = run.config
        begin = first + (1 if c.momentum else 0)
        g, v = run.gradients(begin, c.steps - 1)
        steps = np.linspace(begin, c.steps - 1, n_points).astype(int)
        products = [g[t - begin] @ full for t, _, full in full_gradients(run, steps, n_batches)]
        used = np.einsum("tp,tp->t", g[1:], v[:-1]).mean()
        rows.append({"seed": c.seed, "used": used, "predicted": -np.mean(products) / (1 + c.momentum)})
    return pd.DataFrame(rows)


def measure_gains(
    trajectories: Sequence[Run],
    dataset: Dataset,
    first: int,
    memories: Sequence[float],
    n_points: int = 8,
    n_batches: int = 8,
    model: NetFactory | None = None,
) -> pd.DataFrame:
    """What exponential averages save, predicted from the gradients that a run used and measured on held-out batches.

    Averages begin at step `first` of a recorded run; its second half from there counts. One row per seed and memory:
    seed; memory; `predicted`, the mean of g_t . (x_t - a_t) / (1 + b) (see `Averages`); `measured`, the mean of the
    loss at x_t minus that at a_t over n_points steps, with batch statistics and weight decay, as the gradients have it.
    """
    tables = []
    for run in trajectories:
        c = run.config
        predicted, points = _averages(run, first, memories, n_points)
        held = dataset.batches(n_batches, c.batch_size, c.stream, "held")
        losses = probe.losses(runs.network(run, dataset, model), points, *held).mean(1)
        losses = losses + c.weight_decay / 2 * np.square(points).sum(1)
        losses = losses.reshape(n_points, 1 + len(memories))
        measured = (losses[:, :1] - losses[:, 1:]).mean(0)
        found = {"memory": memories, "predicted": predicted, "measured": measured}
        tables.append(pd.DataFrame({"seed": c.seed, **found}))
    return pd.concat(tables, ignore_index=True)


def _averages(run: Run, first: int, memories: Sequence[float], n_points: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean predicted gain of each memory over the second half from `first`, (K,), and x_t and averages at n_points
    steps of it, (n_points * (1 + K), P)."""
    begin = first + (1 if run.config.momentum else 0)
    x, (g, _) = run.window(begin, run.config.steps), run.gradients(begin, run.config.steps - 1)
    averages, products, points = Averages(memories, smoothing=0), [], []
    at = np.linspace(len(g) // 2, len(g) - 1, n_points).astype(int)
    for i, gradient in enumerate(g):
        averages.observe(np.asarray(x[i]), gradient)
        products.append(averages.gains.copy())
        if i in at:
            points += [x[i], *(vector.copy() for vector in averages.vectors)]
    return np.mean(products[len(g) // 2 :], axis=0), np.stack(points)


def t_of_run(run: Run, first: int, memory: float, alpha: float) -> float:
    """t of the test when the steps of a recorded plain SGD run from `first` to its end are one window."""
    g, _ = run.gradients(first, run.config.steps - 1)
    past, values = g[0].copy(), []
    for gradient in g[1:]:
        values.append(gradient @ past)
        past = memory * past + gradient
    return replay(np.array(values), alpha, len(values) // BLOCKS)[0].t


def plot_gains(ax: Axes, tables: Mapping[str, pd.DataFrame]) -> None:
    """What `measure_gains` found, by name, against the averages' horizon: measured (bands), predicted (dashed)."""
    for (name, table), color in zip(tables.items(), sns.color_palette(), strict=False):
        table = table.assign(horizon=1 / (1 - table.memory))
        figures.band(ax, table, "horizon", "measured", label=name, color=color, marker="o")
        model = table.groupby("horizon").predicted.mean()
        figures.predicted(ax, model.index, model, label=None)
    ax.plot([], [], **figures.PREDICTION, label="read off the gradients")
    ax.set(xscale="log", xlabel="horizon of the average, 1 / (1 - b) (steps)", ylabel="loss saved (nats)")
    ax.legend(fontsize="small")
