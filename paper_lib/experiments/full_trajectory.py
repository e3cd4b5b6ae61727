"""Claim C10: whole loss curves predicted under one schedule from a run under another, and where that ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from tqdm import tqdm

from paper_lib import runs
from paper_lib.data import Dataset
from paper_lib.errors import require
from paper_lib.probing import derivatives, probe
from paper_lib.probing.hessian import spectral_measure
from paper_lib.results import figures
from paper_lib.runs import Run
from paper_lib.theory import spectrum
from paper_lib.theory.spectrum import Directions
from paper_lib.training.flat import FlatModel, NetFactory

N_CURVATURES = 13  # of the grid on which a response is resolved
PREDICTORS = {  # column: what the prediction is made from
    "response": "spectrum fitted to the source",
    "settled": "spectrum from Hessian and noise",
    "start": "Hessian, noise and gradient at the start",
    "current": "current learning rate only",
}


def responses(target: str, constant: Sequence[Run], changed: Sequence[Sequence[Run]]) -> pd.DataFrame:
    """Loss under changing learning rates minus that of a twin at a constant one, on the same batches: a row per step.

    `changed` holds for each of the constant runs those that follow each other from where it begins. Columns target,
    seed, step (from there), lr (with momentum lr / (1 - m), its effect in slow directions) and change (nats): batches
    that are hard for one are hard for the other and cancel.
    """
    tables = []
    for twin, parts in zip(constant, changed, strict=True):
        loss, lrs = (np.concatenate([getattr(part, name) for part in parts]) for name in ("loss", "lr"))
        first = parts[0].config.start
        require(first == twin.config.start, "start", first, f"the constant run begins at step {twin.config.start}")
        require(len(loss) <= len(twin.loss), "steps", len(loss), f"the constant run takes only {len(twin.loss)} steps")
        lrs = lrs / (1 - twin.config.momentum)
        columns = {"target": target, "seed": twin.config.seed, "step": np.arange(len(loss)), "lr": lrs}
        tables.append(pd.DataFrame(columns).assign(change=loss - twin.loss[: len(loss)]))
    return pd.concat(tables, ignore_index=True)


def response_spectra(source: pd.DataFrame, lr: float) -> dict[int, Directions]:
    """The spectrum, excess and drift that explain each seed's response (`responses` of one target), by seed.

    Timescales go from a single step to all steps of the source at the constant lr.
    """
    found = {}
    for seed, one in source.groupby("seed"):
        h = np.geomspace(1 / len(one), 1, N_CURVATURES) / lr
        fitted = spectrum.fit_response(one.change.to_numpy(), one.lr.to_numpy(), lr, h)
        found[seed] = spectrum.of_losses(h, *fitted, lr)
    return found


def hessian_states(
    trajectories: Sequence[Run],
    step: int,
    dataset: Dataset,
    n_gradients: int = 128,
    n_products: int = 8,
    n_nodes: int = 12,
    model: NetFactory | None = None,
) -> dict[int, Directions]:
    """Where runs stand at a snapshot, by seed: squared gradient and gradient noise by curvature, nothing fitted.

    Lanczos quadrature (n_nodes) of the Hessian (n_products batches, weight decay included) seen from half the sum and
    half the difference of two mean gradients, each over half of n_gradients other batches: the difference is noise,
    the sum is gradient and as much noise. Negative curvatures count as flat: a quadratic would fall there without end.
    """
    sizes = (n_products, max(1, n_gradients // 2), n_nodes)
    return {
        run.config.seed: _hessian_state(run, step, dataset, runs.network(run, dataset, model), *sizes)
        for run in tqdm(trajectories, desc=f"Hessian at step {step}")
    }


def _hessian_state(
    run: Run, step: int, dataset: Dataset, net: FlatModel, n_products: int, half: int, n_nodes: int
) -> Directions:
    """The state of one run; `half` is the number of batches in each of the two mean gradients."""
    c, weights = run.config, np.array(run.at(step))
    x, y = probe.fixed_batches(dataset, n_products + 2 * half, c.batch_size, c.seed)

    def product(d: np.ndarray) -> np.ndarray:
        return derivatives.mean_hessian_product(net, weights, d, x[:n_products], y[:n_products]) + c.weight_decay * d

    def gradient(first: int) -> np.ndarray:
        part = slice(first, first + half)
        return derivatives.mean_gradient(net, weights, x[part], y[part]) + c.weight_decay * weights

    one, other = gradient(n_products), gradient(n_products + half)
    h, both = spectral_measure(product, (one + other) / 2, n_nodes)
    h_noise, noise = spectral_measure(product, (one - other) / 2, n_nodes)
    squared, variance = np.append(both, -noise), np.append(0 * both, 2 * half * noise)
    return Directions(np.maximum(np.append(h, h_noise), 0), variance, squared)


def follow_current(table: pd.DataFrame, source: pd.DataFrame) -> np.ndarray:
    """The rule to beat: the response that the source settled at for each learning rate, linear in between, (rows,).

    Settled: the mean over the later half of the steps that the source spends at a learning rate.
    """
    predicted = pd.Series(index=table.index, dtype=float)
    for seed, one in table.groupby("seed"):
        known = source[source.seed == seed].groupby("lr").change.apply(lambda r: r.iloc[len(r) // 2 :].mean())
        predicted[one.index] = np.interp(one.lr, known.index, known)
    return predicted.to_numpy()


def predict(
    table: pd.DataFrame, source: pd.DataFrame, spectra: Mapping[str, Mapping[int, Directions]], lr: float
) -> pd.DataFrame:
    """`responses` with one more column for each of `spectra` (by name, then seed), and `current`: `follow_current`."""
    predicted = table.assign(current=follow_current(table, source))
    for name, by_seed in spectra.items():
        for (_, seed), one in table.groupby(["target", "seed"]):
            predicted.loc[one.index, name] = by_seed[seed].response(one.lr.to_numpy(), lr)
    return predicted


def blocks(table: pd.DataFrame, n: int = 20) -> pd.DataFrame:
    """Means over about n blocks of steps of each target and seed: the noise of single batches is averaged."""
    width = np.maximum(1, table.groupby(["target", "seed"]).step.transform("size") // n)
    grouped = table.assign(block=table.step // width).groupby(["target", "seed", "block"], sort=False)
    return grouped.mean().reset_index()


def errors(averaged: pd.DataFrame) -> pd.DataFrame:
    """Errors of every predictor by target and seed, from `blocks`: target, seed, predictor, rms, relative.

    rms in nats; relative: over the range of the measured curve.
    """
    rows = []
    for (target, seed), one in averaged.groupby(["target", "seed"], sort=False):
        for predictor in PREDICTORS:
            rms = np.sqrt(np.mean((one[predictor] - one.change) ** 2))
            rows.append((target, seed, predictor, rms, rms / np.ptp(one.change)))
    return pd.DataFrame(rows, columns=["target", "seed", "predictor", "rms", "relative"])


def correlations(averaged: pd.DataFrame, predictor: str = "response") -> pd.Series:
    """Correlation of predicted and measured changes over the blocks of all targets, by seed."""
    return averaged.groupby("seed")[[predictor, "change"]].apply(lambda one: one.corr().iloc[0, 1])


def final_fall(averaged: pd.DataFrame, predictor: str = "response", last: int = 2) -> pd.Series:
    """Measured over predicted change of the loss in the last blocks of one target, by seed."""
    end = averaged.groupby("seed")[["change", predictor]].apply(lambda one: one.tail(last).mean())
    return end.change / end[predictor]


def summary(states: Mapping[int, Directions], lr: float) -> pd.DataFrame:
    """By seed: the steepest curvature, noise (sum of variances) and the excess loss that it keeps up at lr (nats)."""
    rows = {
        seed: {"steepest": state.h.max(), "noise": state.noise.sum(), "excess": state.excess(lr).sum()}
        for seed, state in states.items()
    }
    return pd.DataFrame(rows).T.rename_axis("seed")


def tabulate(spectra: Mapping[str, Mapping[int, Directions]], lr: float) -> pd.DataFrame:
    """Spectra by name and seed as a table: predictor, seed, h (ascending), and the excess loss kept up there at lr."""
    return pd.concat(
        pd.DataFrame({"predictor": name, "seed": seed, "h": state.h, "excess": state.excess(lr)}).sort_values("h")
        for name, by_seed in spectra.items()
        for seed, state in by_seed.items()
    )


def onward(
    run: Run, step: int, state: Directions, n: int, dataset: Dataset, model: NetFactory | None = None
) -> pd.DataFrame:
    """Losses of the n steps after a snapshot and what its state predicts: seed, origin (step), step, lr, loss, model.

    The prediction begins at the loss of fixed batches at the snapshot.
    """
    c, log = run.config, slice(step - run.config.start, step - run.config.start + n)
    batches = probe.fixed_batches(dataset, 32, c.batch_size, c.seed)
    level = probe.losses(runs.network(run, dataset, model), np.array(run.at(step)), *batches).mean()
    lrs = run.lr[log] / (1 - c.momentum)
    columns = {"seed": c.seed, "origin": step, "step": step + np.arange(len(lrs)), "lr": c.lr, "loss": run.loss[log]}
    return pd.DataFrame(columns).assign(model=level + state.losses(lrs))


def share_predicted(table: pd.DataFrame, tolerance: float = 0.25, n: int = 20) -> float:
    """Share of the steps (`onward`, one seed) before a block mean strays from the model by tolerance x the fall."""
    block = (np.arange(len(table)) * n) // len(table)
    mean = table.groupby(block)[["loss", "model"]].mean()
    astray = np.abs(mean.model - mean.loss) > tolerance * abs(mean.loss.iloc[0] - mean.loss.iloc[-1])
    return float(np.argmax(astray) / len(mean)) if astray.any() else 1.0


LINES = {"response": {}, "settled": {"linestyle": ":"}, "current": {"linestyle": "-.", "color": "0.6", "zorder": 1}}


def plot_curves(ax: Axes, averaged: pd.DataFrame, targets: Sequence[str], key: bool = False) -> None:
    """Measured changes of the loss under schedules (`blocks`) and three predictions of each, named if `key`."""
    for target in targets:
        one = averaged[averaged.target == target]
        figures.band(ax, one, "step", "change", label=target)
        for name, line in LINES.items():
            mean = one.groupby("step")[name].mean()
            figures.predicted(ax, mean.index, mean, PREDICTORS[name] if key else None, linewidth=1.8, **line)
    ax.set(xlabel="steps since the common start", ylabel="loss - loss at constant lr (nats)")
    ax.legend(fontsize="small", loc="lower left" if key else "upper right")


def plot_errors(ax: Axes, found: pd.DataFrame, tolerance: float, most: float = 100) -> None:
    """Relative errors, a row per target, a colour per predictor, a point per seed; any above `most` lie there."""
    targets = list(dict.fromkeys(found.target))
    for i, (name, label) in enumerate(PREDICTORS.items()):
        one = found[found.predictor == name]
        rows = one.target.map(targets.index) + 0.17 * (i - 1.5)
        at = np.minimum(one.relative, most)
        ax.scatter(at, rows, s=40, alpha=0.8, marker="osD^"[i], edgecolor="white", linewidth=0.5, label=label)
    ax.axvline(tolerance, color="0.6", linewidth=1.5, linestyle=":", zorder=0)
    ax.set(xscale="log", xlim=(None, 1.5 * most), yticks=range(len(targets)), yticklabels=targets)
    ax.set(xlabel=f"rms error / range of the curve (edge: {most:g}+)", ylim=(len(targets) - 0.5, -2.4))
    ax.legend(fontsize="small", loc="upper right")


def plot_spectra(ax: Axes, table: pd.DataFrame, lr: float, least: float = 1e-3) -> None:
    """Excess loss up to a curvature, against eta (all below `least` stand there); a line per predictor and seed."""
    for (name, one), color in zip(table.groupby("predictor", sort=False), ("C0", "C1"), strict=False):
        for i, (_, seed) in enumerate(one.groupby("seed")):
            eta, label = np.maximum(lr * seed.h, least), None if i else PREDICTORS[name]
            ax.step(eta, seed.excess.cumsum(), where="post", color=color, linewidth=1.5, label=label)
    ax.set(xscale="log", xlabel=figures.ETA, ylabel="excess loss up to there (nats)", ylim=(0, None))
    ax.legend(fontsize="small", loc="upper left")


def plot_onward(ax: Axes, table: pd.DataFrame, n: int = 20) -> None:
    """Losses of `onward` against the step, logarithmic, means over seeds and blocks, and the model from each origin."""
    label = "model, from its origin"
    for (rate, one), color in zip(table.groupby("lr", sort=False), ("C0", "C1"), strict=False):
        for origin, part in one.groupby("origin"):
            edges = np.unique(np.geomspace(origin + 1, part.step.max() + 1, n).astype(int))
            mean = part.assign(step=edges[edges.searchsorted(part.step + 1)]).groupby("step")[["loss", "model"]].mean()
            ax.plot(mean.index, mean.loss, color=color, label=None if origin else f"lr {rate:g}")
            figures.predicted(ax, mean.index, mean.model, label)
            label = None
    ax.set(xscale="log", xlabel="training step", ylabel="training loss (nats)", ylim=(0, 1.1 * table.loss.max()))
    ax.legend(fontsize="small", loc="lower left")
