"""Measure whether runs that share batches or a start meet, and the loss between them (claim C9)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd

from paper_lib.averaging import vectors
from paper_lib.config import RunConfig
from paper_lib.errors import require
from paper_lib.experiments.tables import tabulated
from paper_lib.probing import probe
from paper_lib.probing.derivatives import mean_gradient
from paper_lib.runs import Run, branch_all

OTHER_BATCHES = 1000  # is added to a run's stream for batches that it does not see
POSITIONS = np.linspace(0, 1, 11)  # on a segment
PARTED, SAME, OTHER = "parted", "same batches", "other batches"


def other_start(config: RunConfig, seed: int) -> RunConfig:
    """The same batches from where the parent gets with another seed; ConfigError for its own."""
    require(seed != config.seed, "seed", seed, "another start needs another seed")
    return config.replace(seed=seed, batch_seed=config.stream)


def following(seed: int, seeds: Sequence[int]) -> int:
    """The next of the seeds, the first after the last; beside a single one the next number."""
    return seeds[(list(seeds).index(seed) + 1) % len(seeds)] if len(seeds) > 1 else seed + 1


def second_starts(config: RunConfig, every: int) -> dict[str, RunConfig]:
    """Runs to hold against one that goes on after `config`, by kind.

    PARTED leaves where `config` does and sees other batches for as many steps; from its end, the
    second start, SAME sees the batches that come after those of `config`, and OTHER goes on with
    its own, for as many steps again. Every `every`-th step is recorded, and the last.
    """
    n = config.steps - config.start

    def record(first: int) -> str:
        return f"{first}-{first + n}/{every},{first + n}"

    batches = config.stream + OTHER_BATCHES
    parted = config.replace(batch_seed=batches, record=record(config.start))
    other = parted.branch(n, record=record(config.steps))
    return {PARTED: parted, SAME: other.replace(batch_seed=config.stream), OTHER: other}


def part(runs: Sequence[Run], config: RunConfig, every: int) -> dict[tuple[int, str], Run]:
    """The `second_starts` of `config` with the seed of each run, on its data, by (seed, kind)."""
    configs: dict[tuple[int, str], RunConfig] = {}
    for seed in (run.config.seed for run in runs):
        starts = second_starts(config.replace(seed=seed), every)
        configs |= {(seed, kind): start for kind, start in starts.items()}
    return dict(zip(configs, branch_all(runs, list(configs.values())), strict=True))


def distances(run: Run, other: Run, kind: str = "") -> pd.DataFrame:
    """Distance of two runs at the steps that both recorded, a row each, since `other` began.

    Columns seed, kind, step (after that start), distance |x - y| and ratio (to that at the start;
    NaN where it is zero). ConfigError unless both recorded the start and a later step.
    """
    start = other.config.start
    steps = np.intersect1d(run.steps, other.steps)
    allowed = f"both must keep {start} and later steps"
    require(start in steps and steps[-1] > start, "record", run.config.record, allowed)
    steps = steps[steps >= start]
    X, Y = (np.array(r.weights[r.rows(steps)], np.float64) for r in (run, other))
    distance = np.linalg.norm(X - Y, axis=1)
    ratio = distance / (distance[0] or np.nan)
    columns = {"kind": kind, "step": steps - start, "distance": distance, "ratio": ratio}
    return pd.DataFrame({"seed": run.config.seed, **columns})


def loss_weighted(
    run: Run, others: Mapping[str, Run], after: Sequence[int], n_batches: int = 24
) -> pd.DataFrame:
    """What the training loss feels of the distance of a run x from others y, by kind.

    Columns seed, kind, step, distance = (x - y).(G(x) - G(y)) in nats and ratio to the first, a row
    for each step in `after` the start of the others. G is the gradient of the mean loss of
    n_batches training batches: unlike |x - y|, this does not count directions that are flat.
    """
    c, net, start = run.config, run.network(), next(iter(others.values())).config.start
    batches = probe.fixed_batches(run.dataset, n_batches, c.batch_size, c.seed)

    def at(one: Run, step: int) -> tuple[np.ndarray, np.ndarray]:
        point = np.array(one.at(start + step), np.float64)
        return point, mean_gradient(net, point, *batches)

    rows = []
    for step in after:
        x, g = at(run, step)
        for kind, one in others.items():
            y, h = at(one, step)
            rows.append((c.seed, kind, step, float((x - y) @ (g - h))))
    table = pd.DataFrame(rows, columns=["seed", "kind", "step", "distance"])
    return table.assign(ratio=table.distance / table.groupby("kind").distance.transform("first"))


def parting(reference: np.ndarray, steps: Sequence[int]) -> np.ndarray:
    """Squared distance that the model predicts for two runs on different batches, (n_steps,).

    2 v (1 - q^(2t)) is a run's own mean squared displacement at lag 2t, whatever the spectrum is.
    `reference` is the Gram matrix of a stationary window longer than twice the last step.
    """
    return vectors.squared_displacement(reference, 2 * np.asarray(steps))


@tabulated
def between(
    run: Run, ends: Mapping[str, tuple[np.ndarray, np.ndarray]], n_batches: int = 8
) -> Iterator[dict]:
    """Training loss in nats on the segment between each pair of weight vectors, by kind.

    Columns seed, kind, position, loss. Batches are normalized by their own statistics.
    """
    c, net = run.config, run.network()
    batches = probe.fixed_batches(run.dataset, n_batches, c.batch_size, c.seed)
    for kind, (a, b) in ends.items():
        loss = probe.line(net, a, b - a, POSITIONS, *batches).mean(1)
        yield {"seed": c.seed, "kind": kind, "position": POSITIONS, "loss": loss}


@tabulated
def barriers(table: pd.DataFrame) -> Iterator[dict]:
    """How far the loss (`between`) rises over the line through its values at the ends, in nats.

    A row per kind and seed: `barrier`, the greatest rise, at least 0, and `middle`, the loss midway
    minus the mean of the ends, negative where averaging helps.
    """
    for (kind, seed), segment in table.groupby(["kind", "seed"], sort=False):
        loss, p = segment.loss.to_numpy(), segment.position.to_numpy()
        rise = loss - (loss[0] + p * (loss[-1] - loss[0]))
        middle = rise[len(rise) // 2]
        yield {"kind": kind, "seed": seed, "barrier": rise.max(), "middle": middle}
