"""Timescales of a stationary run: the model's rate 1 - lr h and variance, direction by direction (claims C7, C8)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from torch import Tensor

from paper_lib import runs
from paper_lib.averaging import vectors
from paper_lib.data import Dataset
from paper_lib.errors import require
from paper_lib.probing import derivatives, hessian, probe
from paper_lib.results import figures
from paper_lib.runs import Run
from paper_lib.theory import quadratic
from paper_lib.theory.spectrum import Directions
from paper_lib.training.flat import FlatModel, NetFactory

FRESH = 4  # batches per iterate for the gradient noise there


@dataclass(frozen=True)
class Modes:
    """The steepest directions of one run at the average of its window, with all that the model needs there."""

    run: Run
    first: int  # step at which the window begins; it ends with the run
    center: np.ndarray  # average of the window's iterates, (P,)
    directions: np.ndarray  # orthonormal, by curvature, (k, P)
    h: np.ndarray  # curvature on images that did not choose the directions, weight decay included, (k,)
    noise: np.ndarray  # variance of batch gradients at the average, (k,)
    noise_met: np.ndarray  # the same at iterates, averaged over them, (k,)
    projected: np.ndarray  # iterates minus center along the directions, (n, k)

    @property
    def window(self) -> np.ndarray:
        """The iterates, (n, P)."""
        return self.run.window(self.first, self.run.config.steps)

    @property
    def stable(self) -> np.ndarray:
        """Directions for which the model has a stationary state, (k,) bool: 0 < lr h < 2 (1 + momentum)."""
        eta = self.run.config.lr * self.h
        return (eta > 0) & (eta < 2 * (1 + self.run.config.momentum))

    def spectrum(self, met: bool = True) -> Directions:
        """The stable directions as a spectrum, with the noise at iterates (`met`) or that at the average."""
        h = self.h[self.stable]
        return Directions(h, (self.noise_met if met else self.noise)[self.stable])


def modes(
    run: Run,
    dataset: Dataset,
    n_directions: int = 12,
    n_batches: int = 16,
    settle: int = 0,
    model: NetFactory | None = None,
) -> Modes:
    """Find the steepest directions of a run that recorded every iterate, `settle` steps after its start.

    The directions come from n_batches batches; curvature and noise along them from as many others.
    """
    first = run.config.start + settle
    require(first < run.config.steps, "settle", settle, f"the run has {run.config.steps - run.config.start} steps")
    net, X = runs.network(run, dataset, model), run.window(first, run.config.steps)
    center = vectors.average(vectors.uniform(len(X), len(X)), X)
    x, y = probe.fixed_batches(dataset, 2 * n_batches, run.config.batch_size, run.config.seed)
    _, V = hessian.top_directions(net, center, x[:n_batches], y[:n_batches], n_directions)
    x, y = x[n_batches:], y[n_batches:]
    h = hessian.curvatures(net, center, V, x, y) + run.config.weight_decay
    noise = _noise(net, center, V, x, y)
    at = np.linspace(0, len(X) - 1, max(2, n_batches)).astype(int)
    met = [_noise(net, X[i], V, *_fresh_batches(run, dataset, j)) for j, i in enumerate(at)]
    return Modes(run, first, center, V, h, noise, np.mean(met, 0), X @ V.T - center @ V.T)


def _fresh_batches(run: Run, dataset: Dataset, j: int) -> tuple[Tensor, Tensor]:
    """FRESH batches of a probing stream, others for every j."""
    stream = probe.PROBE_STREAM + run.config.seed
    return dataset.batches(range(1000 + j * FRESH, 1000 + (j + 1) * FRESH), run.config.batch_size, stream)


def _noise(net: FlatModel, weights: np.ndarray, V: np.ndarray, x: Tensor, y: Tensor) -> np.ndarray:
    """Variance over batches of their gradients along V (k, P): (k,)."""
    return np.var([V @ g for g in derivatives.each_gradient(net, weights, x, y)], axis=0, ddof=1)


def measure(found: Sequence[Modes]) -> pd.DataFrame:
    """One row per run and stable direction: the model's prediction and what the trajectory does.

    Columns lr, norm, seed, direction, curvature, rho_model and rho (autocorrelation at lag 1), v_model (noise at the
    average), v_met (noise at the iterates) and v (variance), in squared weights.
    """
    tables = []
    for m in found:
        c, keep = m.run.config, m.stable
        y = m.projected[:, keep]
        columns = {
            "lr": c.lr,
            "norm": c.norm,
            "seed": c.seed,
            "direction": np.flatnonzero(keep),
            "curvature": m.h[keep],
            "rho_model": quadratic.autocorrelation(c.lr * m.h[keep], 2, c.momentum)[:, 1],
            "rho": autocorrelation(y, [1])[0],
            "v_model": m.spectrum(met=False).variances(c.lr, c.momentum),
            "v_met": m.spectrum().variances(c.lr, c.momentum),
            "v": y.var(0),
        }
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)


def autocorrelation(y: np.ndarray, lags: Sequence[int]) -> np.ndarray:
    """Autocorrelation of the columns of y (n, k) around their means, at each lag: (n_lags, k)."""
    n, z = len(y), y - y.mean(0)
    require(0 <= min(lags) and max(lags) < n, "lags", list(lags), f"they must lie in 0..{n - 1}")
    return np.stack([(z[: n - k] * z[k:]).mean(0) for k in lags]) / (z * z).mean(0)


def agreement(table: pd.DataFrame) -> pd.DataFrame:
    """How well prediction and measurement agree, one row per seed.

    correlation and rms difference of the lag-1 autocorrelations; v_ratio and v_met_ratio, geometric means over
    directions of measured / predicted variance, with the noise at the average and at the iterates.
    """
    rows = {}
    for seed, t in table.groupby("seed"):
        rows[seed] = {
            "correlation": np.corrcoef(t.rho_model, t.rho)[0, 1],
            "rms": np.sqrt(np.mean((t.rho_model - t.rho) ** 2)),
            "v_ratio": np.exp(np.log(t.v / t.v_model).mean()),
            "v_met_ratio": np.exp(np.log(t.v / t.v_met).mean()),
        }
    return pd.DataFrame(rows).T


def rest(m: Modes) -> dict[str, float]:
    """What the steep directions leave: their share of the variance, and how the rest of the trajectory spreads.

    share, and the exponent of squared displacement against lag in all other directions (0: stationary, 1: random walk).
    """
    G = vectors.gram(m.window)
    z = m.projected - m.projected.mean(0)
    lags = vectors.spaced_lags(len(G))
    flat = vectors.squared_displacement(G - z @ z.T, lags)
    return {"share": float((z**2).sum() / np.trace(G)), "exponent": vectors.exponent(lags, flat)}


def two_point_fall(
    m: Modes,
    dataset: Dataset,
    lags: Sequence[int],
    n_batches: int = 8,
    n_pairs: int = 6,
    model: NetFactory | None = None,
) -> pd.DataFrame:
    """By how much the training loss of an average of two iterates lies below that of the later one, a row per lag.

    Means over n_pairs pairs: `full`, of the average itself; `steep`, when only the components along the measured
    directions are averaged; `model`, what their spectrum predicts for that: sum h v (1 - rho_lag) / 4.
    """
    c, X, V = m.run.config, m.window, m.directions[m.stable]
    require(0 < min(lags) and max(lags) < len(X), "lags", list(lags), f"they must lie in 1..{len(X) - 1}")
    ends = np.linspace(max(lags), len(X) - 1, n_pairs).astype(int)
    net, batches = runs.network(m.run, dataset, model), probe.fixed_batches(dataset, n_batches, c.batch_size, c.seed)
    single = probe.losses(net, X[ends], *batches).mean()
    rows = []
    for lag in lags:
        back = (X[ends - lag] - X[ends]) / 2
        steep = probe.losses(net, X[ends] + back @ V.T @ V, *batches).mean()
        full = probe.losses(net, X[ends] + back, *batches).mean()
        rows.append({"seed": c.seed, "lag": lag, "full": single - full, "steep": single - steep})
    spectrum = m.spectrum()
    averaged = [spectrum.averaged_loss(vectors.two_point(lag + 1, lag), c.lr, c.momentum) for lag in lags]
    return pd.DataFrame(rows).assign(model=spectrum.excess(c.lr, c.momentum).sum() - np.array(averaged))


def plot_rates(ax: Axes, table: pd.DataFrame) -> None:
    """Measured against predicted autocorrelation at lag 1, a point per direction and seed, a colour per setting."""
    _settings(ax, table, "rho_model", "rho")
    low, high = table[["rho_model", "rho"]].min().min() - 0.05, 1.0
    figures.predicted(ax, [low, high], [low, high], label="model: equal")
    ax.set(xlabel="predicted from curvature, 1 - η", ylabel="measured autocorrelation at lag 1")
    ax.legend(loc="upper left", fontsize="small")


def plot_variances(ax: Axes, table: pd.DataFrame) -> None:
    """Measured against predicted variance along each direction, logarithmic."""
    _settings(ax, table, "v_met", "v")
    ends = np.array([table[["v_met", "v"]].min().min() / 1.5, table[["v_met", "v"]].max().max() * 1.5])
    figures.predicted(ax, ends, ends, label="model: equal")
    ax.set(xscale="log", yscale="log", xlabel="predicted from curvature and noise", ylabel="measured variance")


def _settings(ax: Axes, table: pd.DataFrame, x: str, y: str) -> None:
    """Points of every (norm, lr) in a colour and marker of its own."""
    groups = table.groupby(["norm", "lr"], sort=False)
    for ((norm, lr), t), marker in zip(groups, "osD^v<>", strict=False):
        label = f"lr {lr:g}" + ("" if norm == "batch" else f", norm: {norm}")
        ax.scatter(t[x], t[y], s=45, alpha=0.75, marker=marker, edgecolor="white", linewidth=0.6, label=label)


def plot_forgetting(ax: Axes, m: Modes, chosen: Sequence[int], n_lags: int = 16) -> pd.DataFrame:
    """Whole autocorrelation functions along some directions (numbers into `stable` ones) with the model's on top."""
    lags, eta = np.arange(n_lags), m.run.config.lr * m.h[m.stable]
    found = autocorrelation(m.projected[:, m.stable], lags)
    model = quadratic.autocorrelation(eta, n_lags, m.run.config.momentum)
    for i, color in zip(chosen, sns.color_palette("viridis", len(chosen)), strict=True):
        ax.plot(lags, found[:, i], "o-", color=color, markersize=4, linewidth=1, label=f"η = {eta[i]:.2f}")
        figures.predicted(ax, lags, model[i], label="model" if i == chosen[-1] else None, linewidth=1.5)
    ax.axhline(0, color="0.6", linewidth=1)
    ax.set(xlabel="lag (steps)", ylabel="autocorrelation")
    ax.legend(fontsize="small")
    parts = [pd.DataFrame({"direction": i, "lag": lags, "rho": found[:, i], "rho_model": model[i]}) for i in chosen]
    return pd.concat(parts)


def plot_two_points(ax: Axes, table: pd.DataFrame) -> None:
    """The fall of the loss against lag: the whole average, only the steep directions, and the model of these."""
    figures.band(ax, table, "lag", "full", label="average of two iterates", marker="o", markersize=4)
    figures.band(ax, table, "lag", "steep", label="averaged along the steep directions only", marker="s", markersize=4)
    model = figures.summarize(table, "model", "lag")
    figures.predicted(ax, model.lag, model["mean"], label="model of the steep directions")
    ax.set(xscale="log", xlabel="lag (steps)", ylabel="fall of the training loss (nats)")
    ax.set_ylim(0, 1.5 * ax.get_ylim()[1])  # room for the legend
    ax.legend(fontsize="small", loc="upper left")
