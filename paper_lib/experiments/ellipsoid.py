"""Measure where a run at a constant learning rate stays, and what lies inside (claim C7).

Loss levels, radii and angles of its iterates, and the loss between them and around their average.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from paper_lib.averaging import vectors
from paper_lib.errors import require
from paper_lib.probing import probe
from paper_lib.runs import Run

ALONG = np.linspace(0, 1, 9)  # positions on a segment between two iterates
OUTWARD = np.array([0, 0.25, 0.5, 0.75, 1, 1.25, 1.5])
"""Distances on a ray from the average through an iterate, over that of the iterate."""


def levels(reference: Run, changed: Sequence[Run], settle: int) -> pd.DataFrame:
    """Loss of successive runs beside that of the reference run on the same batches: a row per step.

    `changed` follow each other, and begin where the reference begins. Columns seed, step (from
    there), lr, loss, loss_reference (nats), and `settled` (at least `settle` steps after the last
    change of the learning rate). Raises ConfigError where the reference is the shorter one.
    """
    start, rows = reference.config.start, []
    for run in changed:
        step = np.arange(run.config.start, run.config.start + len(run.loss)) - start
        allowed = "the reference run ends before that step"
        require(step[-1] < len(reference.loss), "changed", int(step[-1]), allowed)
        columns = {"seed": run.config.seed, "step": step, "lr": run.config.lr, "loss": run.loss}
        columns |= {"loss_reference": reference.loss[step], "settled": step - step[0] >= settle}
        rows.append(pd.DataFrame(columns))
    return pd.concat(rows, ignore_index=True)


def geometry(G: np.ndarray) -> dict[str, float]:
    """Radius and angles around the average, from the Gram matrix (n, n) around it.

    radius (root mean square), radius_spread (standard deviation / mean), far_cosine (mean over
    pairs of iterates at least half a window apart, without those of which one lies at the average),
    pair_ratio (squared radius of the average of such a pair over that of one iterate). Raises
    ConfigError if the iterates are all equal.
    """
    n, radius = len(G), np.sqrt(np.diag(G))
    allowed = "the iterates are all equal: there is nothing around their average"
    require(radius.any(), "radius", 0.0, allowed)
    far = np.triu_indices(n, n // 2)
    square = np.diag(G)
    pairs = (square[far[0]] + square[far[1]] + 2 * G[far]) / 4
    return {
        "radius": np.sqrt(np.mean(square)),
        "radius_spread": radius.std() / radius.mean(),
        "far_cosine": np.nanmean(cosines(G)[far]),
        "pair_ratio": pairs.mean() / square.mean(),
    }


def cosines(G: np.ndarray) -> np.ndarray:
    """Cosines of the angles between iterates as seen from the Gram matrix's centre, (n, n).

    NaN for an iterate that lies at the centre: it is in no direction from there.
    """
    radius = np.sqrt(np.diag(G))
    lengths = np.outer(radius, radius)
    return np.divide(G, lengths, out=np.full_like(G, np.nan, dtype=float), where=lengths > 0)


def average_radii(G: np.ndarray, counts: Sequence[int], spacings: Sequence[int]) -> pd.DataFrame:
    """Squared radius of averages of `count` iterates, `spacing` steps apart, over that of one.

    Around the centre of the Gram matrix (n, n), averaged over up to ten places in the window.
    Averages that span more than half of the window are left out: they approach its centre because
    that is an average of the same iterates. Columns spacing, count, ratio, and `model`, the average
    of independent iterates, 1 / count.
    """
    rows, n = [], len(G)
    for spacing in spacings:
        for count in (c for c in counts if (c - 1) * spacing <= n // 2):
            ends = np.unique(np.linspace((count - 1) * spacing, n - 1, 10).astype(int))
            a = np.stack([vectors.checkpoints(n, end - spacing * np.arange(count)) for end in ends])
            ratio = vectors.squared_norm(a, G).mean() / np.trace(G) * n
            rows.append({"spacing": spacing, "count": count, "ratio": ratio, "model": 1 / count})
    return pd.DataFrame(rows)


def inside(runs: Sequence[Run], n_batches: int = 8, n_pairs: int = 4) -> pd.DataFrame:
    """Training loss on segments between iterates and on rays from the average through iterates.

    The iterates of each of the n_pairs pairs are half a window apart. One row per seed, `path`
    ("segment" or "ray"), `pair` and `position`, with the `loss` in nats: 0 and 1 are the two
    iterates of a segment, or the average and the iterate of a ray. Batches are normalized by their
    own statistics. Raises SnapshotError unless each run kept all of its iterates.
    """
    tables = []
    for run in runs:
        c, net, X = run.config, run.network(), run.window(run.config.start, run.config.steps)
        batches = probe.fixed_batches(run.dataset, n_batches, c.batch_size, c.seed)
        center, half = vectors.average(vectors.uniform(len(X), len(X)), X), len(X) // 2
        for pair, i in enumerate(np.linspace(0, len(X) - half - 1, n_pairs).astype(int)):
            for path, begin, end, positions in (
                ("segment", X[i], X[i + half], ALONG),
                ("ray", center, X[i], OUTWARD),
            ):
                loss = probe.line(net, begin, end - begin, positions, *batches).mean(1)
                columns = {"path": path, "pair": pair, "position": positions, "loss": loss}
                tables.append(pd.DataFrame({"seed": c.seed, **columns}))
    return pd.concat(tables, ignore_index=True)


def radius_form(table: pd.DataFrame) -> pd.DataFrame:
    """How far the loss on rays is a quadratic form of the radius, a row per seed.

    Of the rays of `inside`. r2: share of the variance of the seed's mean ray that a + b r^2
    explains. exponent: p of the best a + b r^p.
    """
    rows = {}
    for seed, ray in table.query("path == 'ray'").groupby("seed"):
        mean = ray.groupby("position").loss.mean()
        r, loss = mean.index.to_numpy(), mean.to_numpy()
        powers = np.linspace(0.5, 4, 71)
        residuals = [_residual(r**p, loss) for p in powers]
        r2 = 1 - _residual(r**2, loss) / np.sum((loss - loss.mean()) ** 2)
        rows[seed] = {"r2": r2, "exponent": powers[np.argmin(residuals)]}
    return pd.DataFrame(rows).T


def _residual(x: np.ndarray, y: np.ndarray) -> float:
    """Sum of squares left by the best line through (x, y)."""
    return float(np.sum((y - np.polyval(np.polyfit(x, y, 1), x)) ** 2))
