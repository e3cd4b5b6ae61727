"""Measure whether runs that share batches or a start meet, and the loss between them (claim C9)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from paper_lib.averaging import vectors
from paper_lib.config import RunConfig
from paper_lib.errors import require
from paper_lib.probing import probe
from paper_lib.runs import Run, branch_all

OTHER_BATCHES = 1000  # is added to a run's stream for batches that it does not see
POSITIONS = np.linspace(0, 1, 11)  # on a segment


def other_batches(config: RunConfig) -> RunConfig:
    """The same run on other batches."""
    return config.replace(batch_seed=config.stream + OTHER_BATCHES)


def other_start(config: RunConfig, seed: int) -> RunConfig:
    """The same batches from the weights that the parent reaches with another seed and its batches.

    Raises ConfigError for the run's own seed.
    """
    require(seed != config.seed, "seed", seed, "another start needs another seed")
    return config.replace(seed=seed, batch_seed=config.stream)


def companions(
    config: RunConfig, seeds: Sequence[int], perturbations: Sequence[float]
) -> dict[str, RunConfig]:
    """The runs to compare with a branch, by kind.

    On other batches; on its own from starts at these distances (relative to the norm of the
    weights); and on its own from the start of the next of the seeds.
    """
    following = config.seed + 1
    if len(seeds) > 1:
        following = seeds[(list(seeds).index(config.seed) + 1) % len(seeds)]
    kinds = {"other batches, same start": other_batches(config)}
    for size in perturbations:
        kinds[f"same batches, start {size:g} away"] = config.replace(perturbation=size)
    return {**kinds, "same batches, another seed's start": other_start(config, following)}


def train_companions(
    runs: Sequence[Run], seeds: Sequence[int], perturbations: Sequence[float], config: RunConfig
) -> dict[tuple[int, str], Run]:
    """The `companions` of runs, one per run and kind, by (seed, kind).

    They are trained on the runs' own data and network. `config` is the settings of the companions
    but for seed and batches: those of the runs, with what is to be recorded.
    """
    configs: dict[tuple[int, str], RunConfig] = {}
    for run in runs:
        kinds = companions(config.replace(seed=run.config.seed), seeds, perturbations)
        configs |= {(run.config.seed, kind): changed for kind, changed in kinds.items()}
    return dict(zip(configs, branch_all(runs, list(configs.values())), strict=True))


def distances(run: Run, other: Run, kind: str = "") -> pd.DataFrame:
    """Distance of two runs at the steps that both recorded, a row each.

    Columns seed, lr, kind, step (after the start), distance |x - y|, ratio (to the distance at the
    start; NaN where that is zero), and cosine of the displacements from each run's own start (NaN
    where one is zero). Raises ConfigError unless both recorded their start and a later step.
    """
    start = run.config.start
    steps = np.intersect1d(run.steps, other.steps)
    allowed = f"both must keep {start} and later steps"
    require(start in steps and len(steps) > 1, "record", run.config.record, allowed)
    X, Y = (np.array(r.weights[r.rows(steps)], np.float64) for r in (run, other))
    distance = np.linalg.norm(X - Y, axis=1)
    X, Y = X - X[0], Y - Y[0]
    moved = np.linalg.norm(X, axis=1) * np.linalg.norm(Y, axis=1)
    columns = {
        "seed": run.config.seed,
        "lr": run.config.lr,
        "kind": kind,
        "step": steps - start,
        "distance": distance,
        "ratio": _quotient(distance, np.full(len(steps), distance[0])),
        "cosine": _quotient((X * Y).sum(1), moved),
    }
    return pd.DataFrame(columns)


def _quotient(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below, NaN where `below` is zero."""
    return np.divide(above, below, out=np.full(len(above), np.nan), where=below > 0)


def parting(reference: np.ndarray, steps: Sequence[int]) -> np.ndarray:
    """Squared distance that the model predicts for two runs on different batches, (n_steps,).

    2 v (1 - q^(2t)) is a run's own mean squared displacement at lag 2t, whatever the spectrum is.
    `reference` is the Gram matrix of a stationary window longer than twice the last step.
    """
    return vectors.squared_displacement(reference, 2 * np.asarray(steps))


def between(
    run: Run, ends: Mapping[str, tuple[np.ndarray, np.ndarray]], n_batches: int = 8
) -> pd.DataFrame:
    """Training loss in nats on the segment between each pair of weight vectors, by kind.

    Columns seed, kind, position, loss. Batches are normalized by their own statistics.
    """
    c, net, tables = run.config, run.network(), []
    batches = probe.fixed_batches(run.dataset, n_batches, c.batch_size, c.seed)
    for kind, (a, b) in ends.items():
        loss = probe.line(net, a, b - a, POSITIONS, *batches).mean(1)
        columns = {"seed": c.seed, "kind": kind, "position": POSITIONS, "loss": loss}
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)


def barriers(table: pd.DataFrame) -> pd.DataFrame:
    """How far the loss (`between`) rises over the line through its values at the ends, in nats.

    A row per kind and seed: `barrier`, the greatest rise, at least 0, and `middle`, the loss midway
    minus the mean of the ends, negative where averaging helps.
    """
    rows = []
    for (kind, seed), segment in table.groupby(["kind", "seed"], sort=False):
        loss, p = segment.loss.to_numpy(), segment.position.to_numpy()
        rise = loss - (loss[0] + p * (loss[-1] - loss[0]))
        middle = rise[len(rise) // 2]
        rows.append({"kind": kind, "seed": seed, "barrier": rise.max(), "middle": middle})
    return pd.DataFrame(rows)


def plane(corners: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An orthonormal frame of the plane through three weight vectors (P,).

    The origin (P,), which is their mean, axes (2, P), and the corners in this frame, (3, 2). Raises
    ConfigError if they lie on one line.
    """
    points = np.array(corners, np.float64)
    origin = points.mean(0)
    _, size, axes = np.linalg.svd(points - origin, full_matrices=False)
    allowed = "three points on one line span no plane"
    require(size[1] > 1e-6 * size[0], "corners", size.tolist(), allowed)
    return origin, axes[:2], (points - origin) @ axes[:2].T


def surface(
    run: Run,
    corners: Sequence[np.ndarray],
    n: int = 13,
    n_batches: int = 8,
    margin: float = 0.3,
) -> tuple[pd.DataFrame, np.ndarray]:
    """Training loss in nats on a grid (n x n) of the plane through three weight vectors.

    Columns u, w, loss; and the corners in these coordinates, (3, 2). The grid reaches `margin`
    times its own size beyond the corners. Raises ConfigError as `plane` does.
    """
    c, (origin, axes, at) = run.config, plane(corners)
    least, most = at.min(0), at.max(0)
    beyond = margin * np.ptp(at, axis=0)
    u, w = np.linspace(least - beyond, most + beyond, n).T
    grid = np.stack([z.ravel() for z in np.meshgrid(u, w)], axis=1)
    points = (origin + grid @ axes).astype(np.float32)
    batches = probe.fixed_batches(run.dataset, n_batches, c.batch_size, c.seed)
    loss = probe.losses(run.network(), points, *batches, progress="plane").mean(1)
    return pd.DataFrame({"u": grid[:, 0], "w": grid[:, 1], "loss": loss}), at
