"""Claim C3: what one gradient step of any size does to the loss of its own batch and of held-out batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from torch import Tensor
from tqdm import tqdm

from paper_lib import runs
from paper_lib.data import Dataset
from paper_lib.probing import derivatives, probe
from paper_lib.results import figures
from paper_lib.runs import Run
from paper_lib.training.flat import FlatModel, NetFactory

MULTIPLES = np.array([0, 0.001, 0.005, 0.02, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0])
"""Probe steps in units of the run's learning rate: small ones show the slope, a dense middle both optima."""


def measure(
    trajectories: Sequence[Run],
    dataset: Dataset,
    at: Sequence[int],
    model: NetFactory | None = None,
    n_batches: int = 1,
    n_held: int = 4,
    batch_size: int | None = None,
    frozen: bool = False,
    multiples: np.ndarray = MULTIPLES,
    point: str = "",
) -> pd.DataFrame:
    """Probe each run at the snapshots `at`, along the gradients of the n_batches batches that the run uses from there.

    Returns one row per seed, snapshot, batch and probe step: `probe` (one of `multiples`, in units of lr), `own` and
    `held` (loss of the batch and mean loss of n_held held-out batches after the step), with `slope_own` = |g|^2,
    `slope_held` = g . (mean held-out gradient) and `curvature` = g^T H g / |g|^2 of the batch's own loss at the
    snapshot. The probe takes batches of `batch_size` (default: the run's); `frozen` evaluates with the snapshot's
    running statistics.
    """
    tables = []
    jobs = [(run, step, batch) for run in trajectories for step in at for batch in range(step, step + n_batches)]
    nets = {run: runs.network(run, dataset, model) for run in trajectories}
    for run, step, batch in tqdm(jobs, desc=f"one step {point}".strip()):
        own = dataset.batches([batch], batch_size or run.config.batch_size, run.config.stream)
        held = run.held(batch, n_held, batch_size)
        buffers = np.array(run.buffers[run.rows(step)[0]]) if frozen else None
        table = _probe_one(nets[run], np.array(run.at(step)), own, held, multiples * run.config.lr, buffers)
        tables.append(table.assign(probe=multiples, seed=run.config.seed, step=step, batch=batch))
    return pd.concat(tables, ignore_index=True).assign(point=point)


def _probe_one(
    net: FlatModel,
    weights: np.ndarray,
    own: tuple[Tensor, Tensor],
    held: tuple[Tensor, Tensor],
    steps: np.ndarray,
    buffers: np.ndarray | None,
) -> pd.DataFrame:
    """The table of one snapshot and one batch, without its column `probe`."""
    gradient = derivatives.gradients(net, weights, *own, buffers)[0]
    held_gradient = derivatives.mean_gradient(net, weights, *held, buffers)
    return pd.DataFrame(
        {
            "own": probe.line(net, weights, -gradient, steps, *own, buffers)[:, 0],
            "held": probe.line(net, weights, -gradient, steps, *held, buffers).mean(1),
            "slope_own": float(gradient @ gradient),
            "slope_held": float(gradient @ held_gradient),
            "curvature": float(derivatives.curvature(net, weights, gradient, *own, buffers)[0]),
        }
    )


def trained_loss(
    decayed: Sequence[Run],
    dataset: Dataset,
    n_batches: int,
    model: NetFactory | None = None,
    batch_size: int | None = None,
    frozen: bool = False,
) -> pd.Series:
    """Mean training loss at the end of each run, by seed, over n_batches batches of a stream that no run uses."""
    found = {}
    for run in decayed:
        end = run.state()
        batches = probe.fixed_batches(dataset, n_batches, batch_size or run.config.batch_size, run.config.seed)
        buffers = end["buffers"] if frozen else None
        losses = probe.losses(runs.network(run, dataset, model), end["weights"], *batches, buffers)
        found[run.config.seed] = float(losses.mean())
    return pd.Series(found, name="training loss of the fully trained network").rename_axis("seed")


def curves(table: pd.DataFrame) -> pd.DataFrame:
    """Average the snapshots of each seed: rows (point, seed, probe), all other columns are means."""
    return table.groupby(["point", "seed", "probe"], sort=False).mean().drop(columns=["step", "batch"]).reset_index()


def predict(table: pd.DataFrame, lr: float, momentum: float = 0.0) -> pd.DataFrame:
    """The quadratic model's curves at stationarity, from slopes at zero alone.

    On held-out data the loss must be back at its start after a full step lr / (1 - m), whatever the curvatures, so
    E[g^T H g] / 2 = slope_held / lr: held(s) = held(0) - slope_held s (1 - s / lr), own(s) = own(0) - slope_own s +
    slope_held s^2 / lr (theory: the rows "own-batch loss" and "held-out loss after a probe step").
    """
    start = table.query("probe == 0").groupby("seed")[["own", "held", "slope_own", "slope_held"]].mean().mean()
    s = np.unique(table.probe) * lr
    full = lr / (1 - momentum)
    return pd.DataFrame(
        {
            "probe": s / lr,
            "own": start.own - start.slope_own * s + start.slope_held * s**2 / full,
            "held": start.held - start.slope_held * s * (1 - s / full),
        }
    )


def minimum(probe_steps: np.ndarray, loss: np.ndarray) -> tuple[float, float]:
    """Place and value of a curve's minimum: the parabola through its lowest point and the two beside it."""
    i = int(np.clip(np.argmin(loss), 1, len(loss) - 2))
    a, b, c = np.polyfit(probe_steps[i - 1 : i + 2], loss[i - 1 : i + 2], 2)
    if not (a > 0 and probe_steps[i - 1] <= -b / (2 * a) <= probe_steps[i + 1]):
        i = int(np.argmin(loss))  # the least value stands at an end of the curve
        return float(probe_steps[i]), float(loss[i])
    return float(-b / (2 * a)), float(c - b * b / (4 * a))


def summary(table: pd.DataFrame, lr: float) -> pd.DataFrame:
    """What decides C3, one row per point and seed, from that seed's mean curves.

    own_start, own_min (losses), own_best, held_best (probe steps in units of lr), held_start, held_min, held_at_own
    (held-out loss at the own batch's best step), held_full (after a full step), `gain` = lr * slope_held (the decrease
    that the held-out slope alone would give), inverse_curvature = 1 / (lr E[g^T H g] / E|g|^2) in units of lr, `shared`
    = slope_held / slope_own, the cosine of two batches' gradients.
    """
    rows = []
    for (point, seed), curve in curves(table).groupby(["point", "seed"], sort=False):
        x, own, held = (curve[name].to_numpy() for name in ("probe", "own", "held"))
        (own_best, own_min), (held_best, held_min) = minimum(x, own), minimum(x, held)
        raw = table.query("point == @point and seed == @seed and probe == 0")
        curvature = np.average(raw.curvature, weights=raw.slope_own)
        rows.append(
            {
                "point": point, "seed": seed, "own_start": own[0], "own_min": own_min, "own_best": own_best,
                "held_start": held[0], "held_min": held_min, "held_best": held_best,
                "held_at_own": np.interp(own_best, x, held), "held_full": np.interp(1.0, x, held),
                "gain": lr * curve.slope_held.iloc[0], "inverse_curvature": 1 / (lr * curvature),
                "shared": curve.slope_held.iloc[0] / curve.slope_own.iloc[0],
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def plot(ax: Axes, table: pd.DataFrame, lr: float, momentum: float | None = None) -> None:
    """Own and held-out loss against the probe step on a logarithmic axis; with `momentum`, the model's curves too."""
    seeds, colors = curves(table).query("probe > 0"), sns.color_palette()
    figures.band(ax, seeds, "probe", "own", label="the step's own batch", color=colors[1])
    figures.band(ax, seeds, "probe", "held", label="held-out batches", color=colors[0])
    if momentum is not None:
        model = predict(table, lr, momentum).query("probe > 0")
        figures.predicted(ax, model.probe, model.held, label="model, from slopes at 0")
        figures.predicted(ax, model.probe, model.own, label=None)
    ax.set(xscale="log", xlabel="step size / learning rate", ylabel="loss (nats)")


def plot_held_out(ax: Axes, table: pd.DataFrame, lr: float, momentum: float = 0.0) -> None:
    """The change of the held-out loss on a linear axis, where the model puts its minimum and its return to zero."""
    near = curves(table).query("probe <= 1.5").copy()
    near["change"] = near.held - near.groupby("seed").held.transform("first")
    figures.band(ax, near, "probe", "change", label="held-out batches", color=sns.color_palette()[0])
    model, full = predict(table, lr, momentum).query("probe <= 1.5"), 1 / (1 - momentum)
    x = np.linspace(0, 1.5, 100)
    gain = np.polyfit(model.probe, model.held - model.held.iloc[0], 2)
    figures.predicted(ax, x, np.polyval(gain, x), label="model, from slopes at 0")
    for place, text in ((full / 2, "predicted best"), (full, "predicted return")):
        ax.axvline(place, color="0.6", linewidth=1.5, linestyle=":")
        at = {"xycoords": ("data", "axes fraction"), "va": "top", "ha": "right", "fontsize": "small", "rotation": 90}
        ax.annotate(f"{text}: {place:g}", (place, 0.99), **at)
    ax.axhline(0, color="0.6", linewidth=1)
    ax.set(
        xlabel="step size / learning rate", ylabel="change of the held-out loss (nats)", title="held-out, stationary"
    )
    ax.legend(loc="upper center", fontsize="small", bbox_to_anchor=(0.5, -0.1))
