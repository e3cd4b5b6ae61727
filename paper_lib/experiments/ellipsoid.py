"""Measure where a run at a constant learning rate stays, and what lies inside (claim C7).

Loss levels, displacement and angles of its iterates beside those that the model has in the same
finite window, and the loss between iterates and around their average.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from paper_lib.averaging import vectors
from paper_lib.errors import require
from paper_lib.experiments.tables import tabulated
from paper_lib.probing import probe
from paper_lib.probing.hessian import spectral_measure, split_gradients
from paper_lib.runs import Run
from paper_lib.theory.spectrum import Directions

ALONG = np.linspace(0, 1, 5)  # positions on a segment between two iterates
OUTWARD = np.append(np.linspace(0, 1, 9), [1.25, 1.5])
"""Distances on a ray from the average through an iterate, over that of the iterate."""
POWERS = np.linspace(0.5, 4, 141)  # tried by `ray_exponents`


@tabulated
def levels(reference: Run, changed: Sequence[Run], settle: int) -> Iterator[dict]:
    """Loss of successive runs beside that of the reference run on the same batches: a row per step.

    `changed` follow each other, and begin where the reference begins. Columns seed, step (from
    there), lr, loss, loss_reference (nats), and `settled` (at least `settle` steps after the last
    change of the learning rate). ConfigError where the reference is the shorter one.
    """
    start = reference.config.start
    for run in changed:
        step = np.arange(run.config.start, run.config.start + len(run.loss)) - start
        allowed = "the reference run ends before that step"
        require(step[-1] < len(reference.loss), "changed", int(step[-1]), allowed)
        columns = {"seed": run.config.seed, "step": step, "lr": run.config.lr, "loss": run.loss}
        columns |= {"loss_reference": reference.loss[step]}
        yield columns | {"settled": step - step[0] >= settle}


def noise_spectrum(
    run: Run, step: int, n_gradients: int = 64, n_products: int = 16, n_nodes: int = 24
) -> Directions:
    """Curvatures that the noise of batch gradients sees at x_step, with its variance.

    Nothing is fitted: Lanczos quadrature (n_nodes) of the Hessian of n_products batches from half
    the difference of two mean gradients, each over half of n_gradients other batches. Negative
    curvatures count as flat, then weight decay is added. Directions without a stationary state,
    lr h >= 2 (1 + momentum), are left out. SnapshotError if the run did not keep the step.
    """
    c, half = run.config, max(1, n_gradients // 2)
    product, one, other = split_gradients(run, np.array(run.at(step)), n_products, half)
    noise = (one - other) / 2
    h, squared = spectral_measure(product, noise, n_nodes)
    h = np.maximum(h, 0) + c.weight_decay
    stable = c.lr * h < 2 * (1 + c.momentum)
    return Directions(h[stable], 2 * half * squared[stable])


def expected_gram(
    directions: Directions, lr: float, steps: np.ndarray, momentum: float = 0.0
) -> np.ndarray:
    """What the model expects of the Gram matrix (n, n) around the mean of x at evenly spaced steps.

    From its squared displacement D alone, -J D J / 2 where J takes means off: so the window is as
    short for the model as for the run.
    """
    lag = np.arange(len(steps))
    squared = directions.displacement(lr, steps - steps[0], momentum)
    D = squared[np.abs(lag[:, None] - lag)]
    mean = D.mean(0)
    return (mean + mean[:, None] - D - mean.mean()) / 2


def displacements(G: np.ndarray, stride: int = 1) -> pd.DataFrame:
    """Squared displacement of iterates `stride` steps apart, from their Gram matrix, by lag."""
    lags = vectors.spaced_lags(len(G))
    return pd.DataFrame({"lag": stride * lags, "squared": vectors.squared_displacement(G, lags)})


def geometry(G: np.ndarray) -> dict[str, float]:
    """Displacement and angles around the average, from the Gram matrix (n, n) around it.

    exponent (growth of squared displacement with the lag; 0: stationary, 1: random walk) and
    far_cosine (mean over pairs of iterates at least half a window apart, without those of which one
    lies at the average). ConfigError if all are equal.
    """
    radius, far = np.sqrt(np.diag(G)), np.triu_indices(len(G), len(G) // 2)
    allowed = "the iterates are all equal: there is nothing around their average"
    require(radius.any(), "radius", 0.0, allowed)
    lengths = np.outer(radius, radius)[far]
    curve = displacements(G)
    exponent = vectors.exponent(curve.lag.to_numpy(), curve.squared.to_numpy())
    cosines = G[far][lengths > 0] / lengths[lengths > 0]
    return {"exponent": exponent, "far_cosine": cosines.mean()}


@tabulated
def inside(runs: Sequence[Run], n_batches: int = 8, n_pairs: int = 6) -> Iterator[dict]:
    """Training loss on segments between iterates, and on rays from the average through iterates.

    The iterates of each of the n_pairs pairs are half a window apart. One row per seed, `path`,
    `pair` and `position`, with the `loss` in nats: 0 and 1 are the two iterates of a "segment", the
    average and an iterate of a "ray" (`pair` counts on for the second of a pair), and on "aside" an
    iterate and a point as far from it as the average is, in a random direction. Batches are
    normalized by their own statistics. SnapshotError unless each run kept all of its iterates.
    """
    for run in runs:
        c, net, X = run.config, run.network(), run.window(run.config.start, run.config.steps)
        batches = probe.fixed_batches(run.dataset, n_batches, c.batch_size, c.seed)
        center, half = vectors.center(X), len(X) // 2
        rng = np.random.default_rng(c.seed)
        for pair, i in enumerate(np.linspace(0, len(X) - half - 1, n_pairs).astype(int)):
            away = rng.standard_normal(len(center)).astype(np.float32)
            away *= np.linalg.norm(X[i] - center) / np.linalg.norm(away)
            for path, number, begin, direction, positions in (
                ("segment", pair, X[i], X[i + half] - X[i], ALONG),
                ("ray", pair, center, X[i] - center, OUTWARD),
                ("ray", pair + n_pairs, center, X[i + half] - center, OUTWARD),
                ("aside", pair, X[i], away, ALONG[[0, -1]]),
            ):
                loss = probe.line(net, begin, direction, positions, *batches).mean(1)
                key = {"seed": c.seed, "path": path, "pair": number}
                yield {**key, "position": positions, "loss": loss}


def ray_exponents(table: pd.DataFrame) -> pd.Series:
    """p of the best a + b r^p for the mean ray of `inside`, up to the iterate, by seed."""
    rays = table[(table.path == "ray") & (table.position <= 1)]
    means = rays.groupby(["seed", "position"]).loss.mean().unstack()
    r = means.columns.to_numpy()

    def residual(loss: np.ndarray, p: float) -> float:
        return float(np.sum((loss - np.polyval(np.polyfit(r**p, loss, 1), r**p)) ** 2))

    best = [np.argmin([residual(loss, p) for p in POWERS]) for loss in means.to_numpy()]
    return pd.Series(POWERS[best], index=means.index)
