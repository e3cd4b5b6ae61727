"""Claim C10: whole loss curves predicted under one schedule from a run under another, and where that ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from paper_lib import figures, probe, runs, transient
from paper_lib.data import Dataset
from paper_lib.train import ModelFactory
from paper_lib.trajectory import Trajectory
from paper_lib.transient import Transient
from paper_lib.validate import require

N_CURVATURES = 13  # of the grid on which a response is resolved
PREDICTORS = {
    "response": "spectrum from the source's response",
    "hessian": "spectrum from Hessian and gradients",
    "current": "loss follows the current learning rate",
}


def responses(target: str, constant: Sequence[Trajectory], changed: Sequence[Sequence[Trajectory]]) -> pd.DataFrame:
    """Loss under changing learning rates minus that of a twin at a constant one, on the same batches: a row per step.

    `changed` holds for each of the constant runs those that follow each other from where it begins. Columns target,
    seed, step (from there), lr and response (nats): batches that are hard for one are hard for the other and cancel.
    """
    tables = []
    for twin, parts in zip(constant, changed, strict=True):
        loss, lrs = (np.concatenate([getattr(part, name) for part in parts]) for name in ("loss", "lr"))
        require(parts[0].config.start == twin.config.start, "start", parts[0].config.start, f"{twin.config.start}")
        require(len(loss) <= len(twin.loss), "steps", len(loss), f"the constant run takes only {len(twin.loss)}")
        columns = {"target": target, "seed": twin.config.seed, "step": np.arange(len(loss)), "lr": lrs}
        tables.append(pd.DataFrame(columns).assign(response=loss - twin.loss[: len(loss)]))
    return pd.concat(tables, ignore_index=True)


def response_spectra(source: pd.DataFrame, lr: float) -> dict[int, Transient]:
    """The spectrum, excess and drift that explain each seed's response (`responses` of one target), by seed.

    Timescales go from a single step to all steps of the source at the constant lr.
    """
    found = {}
    for seed, one in source.groupby("seed"):
        h = np.geomspace(1 / len(one), 1, N_CURVATURES) / lr
        fitted = transient.fit_response(one.response.to_numpy(), one.lr.to_numpy(), lr, h)
        found[seed] = transient.of_losses(h, *fitted, lr)
    return found


def hessian_state(
    run: Trajectory,
    step: int,
    dataset: Dataset,
    n_gradients: int = 128,
    n_products: int = 8,
    n_nodes: int = 10,
    model: ModelFactory | None = None,
) -> Transient:
    """Where a run stands at one of its snapshots: squared gradient and gradient noise by curvature, nothing fitted.

    Lanczos quadrature of the Hessian (n_products batches, weight decay included) seen from half the sum and half the
    difference of two mean gradients, each over half of n_gradients other batches: the difference is noise, the sum is
    gradient and as much noise. Negative curvatures, along which a quadratic falls without end, count as flat.
    """
    c, net = run.config, runs.network(run, dataset, model)
    weights, half = np.array(run.at(step)), n_gradients // 2
    x, y = probe.fixed_batches(dataset, n_products + 2 * half, c.batch_size, c.seed)
    x_products, y_products, x, y = x[:n_products], y[:n_products], x[n_products:], y[n_products:]

    def product(d: np.ndarray) -> np.ndarray:
        return probe.mean_hessian_product(net, weights, d, x_products, y_products) + c.weight_decay * d

    one, other = (
        probe.mean_gradient(net, weights, x[part], y[part]) + c.weight_decay * weights
        for part in (slice(half), slice(half, None))
    )
    h, both = transient.spectral_measure(product, (one + other) / 2.0, n_nodes)
    h_noise, noise = transient.spectral_measure(product, (one - other) / 2.0, n_nodes)
    gradient2 = np.append(both, -noise)
    noise2 = np.append(0 * both, 2 * half * noise)
    return Transient(np.maximum(np.append(h, h_noise), 0), gradient2, noise2)


def follow_current(table: pd.DataFrame, source: pd.DataFrame) -> np.ndarray:
    """The rule to beat: the response that the source settled at for each learning rate, linear in between, (rows,).

    Settled: the mean over the later half of the steps that the source spends at a learning rate.
    """
    predicted = pd.Series(index=table.index, dtype=float)
    for seed, one in table.groupby("seed"):
        known = source[source.seed == seed].groupby("lr").response.apply(lambda r: r.iloc[len(r) // 2 :].mean())
        predicted[one.index] = np.interp(one.lr, known.index, known)
    return predicted.to_numpy()


def predict(
    table: pd.DataFrame, source: pd.DataFrame, spectra: Mapping[str, Mapping[int, Transient]], lr: float
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
