"""Simulates the quadratic model and holds it against its closed forms and equivalences (claim C5).

The learning rate is 1 throughout, so that a direction's curvature is its eta, and batch minima have
variance 1, unless said otherwise. Runs begin in their stationary state unless they have a start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import pandas as pd

from paper_lib.averaging import equivalence, schedules, vectors
from paper_lib.experiments.tables import tabulated
from paper_lib.theory import quadratic, simulate

ETAS = (0.01, 0.05, 0.2, 1.0)  # directions from slow to one that forgets everything in a step
LENGTHS = (1, 3, 10, 30, 100, 200)  # lags, windows and horizons 1 / (1 - decay), in steps
FAR = 3.0  # where runs with a start begin, in standard deviations of the batch minima

# By name: weights from (n, length), and the predicted variance ratio from (eta, length).
AVERAGES = {
    "two-point": (vectors.two_point, quadratic.two_point_ratio),
    "EMA": (
        lambda n, horizon: vectors.ema(n, decay(horizon)),
        lambda eta, horizon: quadratic.ema_ratio(eta, decay(horizon)),
    ),
    "uniform": (vectors.uniform, quadratic.uniform_ratio),
}


def decay(horizon: float) -> float:
    """The decay r of an EMA that reaches back `horizon` = 1 / (1 - r) steps."""
    return 1 - 1 / horizon


def random_average(rng: np.random.Generator, n: int) -> np.ndarray:
    """Non-negative weights (n,) that sum to 1: a fifth of the iterates, weighed at random."""
    a = rng.exponential(size=n) * (rng.random(n) < 0.2)
    a[-1] += 1e-3  # never empty
    return a / a.sum()


@tabulated
def equivalent_schedules(
    etas: Sequence[float], lengths: Mapping[str, float], steps: int
) -> Iterator[dict]:
    """Schedules of `steps` steps that equal averages: rows (average, eta, back, factor).

    `lengths` name averages of AVERAGES; `back` counts steps before the end; eta = 0 stands for the
    limit of slow directions, the tail sums.
    """
    back = np.arange(steps)[::-1]
    for name, length in lengths.items():
        a = AVERAGES[name][0](steps + 1, length)
        for eta in (0.0, *etas):
            factor = equivalence.to_schedule(a, eta)
            yield {"average": name, "eta": eta, "back": back, "factor": factor}


@tabulated
def cooldown_weights(
    names: Sequence[str], etas: Sequence[float], horizon: int, steps: int
) -> Iterator[dict]:
    """Averages of a constant-lr run that emulate cooldowns over the last `horizon` of its steps.

    Rows (schedule, eta, back, weight), with eta and back as in `equivalent_schedules`.
    """
    back = np.arange(steps + 1)[::-1]
    for name in names:
        factors = schedules.cooldown(name, steps, horizon)
        for eta in (0.0, *etas):
            weight = equivalence.to_average(factors, eta)
            yield {"schedule": name, "eta": eta, "back": back, "weight": weight}


@tabulated
def equivalence_errors(
    seeds: Sequence[int],
    etas: np.ndarray,
    steps: int = 2000,
    momentum: float = 0.0,
    schedule: Callable[..., np.ndarray] = equivalence.to_schedule,
) -> Iterator[dict]:
    """How far SGD under the equivalent schedule ends from the average, on the same batches.

    `schedule` maps (average, eta, momentum) to factors. `error` is the distance over the root mean
    square of the averaged run's iterates: rounding, if the map is right. One row per seed, average
    and eta; both runs have the momentum. ConfigError as in equivalence.to_schedule.
    """
    column = np.asarray(etas)[:, None]
    for seed in seeds:
        rng = np.random.default_rng(seed)
        c = simulate.sample_minima(rng, np.ones(len(etas)), steps)[0]
        x = simulate.sgd(c, column, start=FAR, momentum=momentum)
        averages = {name: weights(steps + 1, 100) for name, (weights, _) in AVERAGES.items()}
        averages["random"] = random_average(rng, steps + 1)
        for name, a in averages.items():
            factors = schedule(a, column, momentum)
            end = simulate.sgd(c, column * factors, start=FAR, momentum=momentum)[:, -1]
            error = _relative(x @ a - end, x)
            yield {"seed": seed, "average": name, "eta": etas, "error": error}


@tabulated
def cooldown_errors(
    seeds: Sequence[int],
    etas: np.ndarray,
    steps: int = 2000,
    horizon: int = 500,
    average: Callable[..., np.ndarray] = equivalence.to_average,
) -> Iterator[dict]:
    """As equivalence_errors, of averages of a constant-lr run that stand for named cooldowns.

    `average` maps (factors, eta) to weights.
    """
    column = np.asarray(etas)[:, None]
    for seed in seeds:
        rng = np.random.default_rng(seed)
        c = simulate.sample_minima(rng, np.ones(len(etas)), steps)[0]
        x = simulate.sgd(c, column, start=FAR)
        for name in schedules.COOLDOWNS:
            factors = schedules.cooldown(name, steps, horizon)
            end = simulate.sgd(c, column * factors, start=FAR)[:, -1]
            error = _relative((x * average(factors, column)).sum(-1) - end, x)
            yield {"seed": seed, "schedule": name, "eta": etas, "error": error}


def worst_error(table: pd.DataFrame) -> pd.Series:
    """Per seed, the decimal logarithm of the largest error."""
    return np.log10(table.groupby("seed").error.max())


def negative_share(seeds: Sequence[int], eta: float, n: int = 200, steps: int = 100) -> pd.Series:
    """Per seed, the share of n random averages whose schedule needs a negative learning rate."""
    shares = {}
    for seed in seeds:
        rng = np.random.default_rng(seed)
        found = [equivalence.to_schedule(random_average(rng, steps), eta) for _ in range(n)]
        shares[seed] = np.mean([factors.min() < 0 for factors in found])
    return pd.Series(shares, name="share")


def _relative(distance: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Distances (d,) over the root mean square of iterates (d, steps + 1)."""
    return np.abs(distance) / np.sqrt((x**2).mean(-1))


def stationary(
    seed: int, etas: Sequence[float], steps: int, chains: int
) -> tuple[np.ndarray, np.ndarray]:
    """Iterates (chains, d, steps + 1) of independent runs, and their minima (chains, d, steps)."""
    rng, eta = np.random.default_rng(seed), np.asarray(etas)
    start = rng.standard_normal((chains, eta.size)) * np.sqrt(quadratic.stationary_variance(eta))
    c = simulate.sample_minima(rng, np.ones(eta.size), steps, chains)
    return simulate.sgd(c, eta[:, None], start=start), c


@tabulated
def variances(
    seeds: Sequence[int], etas: Sequence[float] = ETAS, chains: int = 1000
) -> Iterator[dict]:
    """Variance of averages over that of an iterate: `measured`, its standard `error`, `predicted`.

    One row per seed, average, length (lag, horizon or window) and eta.
    """
    steps = 10 * max(LENGTHS)  # an EMA of the largest horizon has forgotten its start
    cases = [(name, length) for name in AVERAGES for length in LENGTHS]
    weights = np.array([AVERAGES[name][0](steps + 1, length) for name, length in cases])
    for seed in seeds:
        x, _ = stationary(seed, etas, steps, chains)
        averages = vectors.average(weights, np.moveaxis(x, -1, 0).reshape(steps + 1, -1))
        squares = averages.reshape(len(cases), chains, -1) ** 2
        for (name, length), square in zip(cases, squares, strict=True):
            key = {"seed": seed, "average": name, "length": length, "eta": etas}
            found = _estimates(square / quadratic.stationary_variance(etas))
            yield {**key, **found, "predicted": AVERAGES[name][1](np.asarray(etas), length)}


def _estimates(samples: np.ndarray) -> dict[str, np.ndarray]:
    """Means (d,) of independent samples (n, d), `measured`, and their standard `error`."""
    error = samples.std(0, ddof=1) / np.sqrt(len(samples))
    return {"measured": samples.mean(0), "error": error}


@tabulated
def timescales(
    seeds: Sequence[int], etas: Sequence[float], horizons: Sequence[int], chains: int = 500
) -> Iterator[dict]:
    """Variance, over an iterate's, of EMAs and of SGD under their tail-sum schedule.

    The schedule is the same in all directions. One row per seed, horizon, eta and `kind` ("EMA",
    "tail-sum schedule"): `measured` with its standard `error`, and `predicted`: the closed form,
    and sum w_i^2 over the scheduled run's own batch weights (equivalence.batch_weights).
    """
    steps, v = 10 * max(horizons), quadratic.stationary_variance(etas)
    runs = {seed: stationary(seed, etas, steps, chains) for seed in seeds}
    column = np.asarray(etas)[:, None]
    for horizon in horizons:
        a = vectors.ema(steps + 1, decay(horizon))
        factors = equivalence.to_schedule(a)
        w = equivalence.batch_weights(vectors.last(steps + 1), column * factors)
        predicted = {
            "EMA": quadratic.ema_ratio(etas, decay(horizon)),
            "tail-sum schedule": (w[:, 1:] ** 2).sum(-1) / v + w[:, 0] ** 2,
        }
        for seed, (x, c) in runs.items():
            scheduled = simulate.sgd(c, column * factors, start=x[..., 0])[..., -1]
            for kind, ends in {"EMA": x @ a, "tail-sum schedule": scheduled}.items():
                key = {"seed": seed, "horizon": horizon, "kind": kind, "eta": etas}
                yield {**key, **_estimates(ends**2 / v), "predicted": predicted[kind]}


def slow_limit_error(
    seeds: Sequence[int], eta: float, horizon: int, chains: int = 200
) -> pd.Series:
    """Distance from an EMA to SGD under its tail-sum schedule, over that to the last iterate.

    Root mean squares over `chains` runs of one direction, per seed.
    """
    steps, errors = 10 * horizon, {}
    a = vectors.ema(steps + 1, decay(horizon))
    for seed in seeds:
        x, c = stationary(seed, [eta], steps, chains)
        scheduled = simulate.sgd(c, eta * equivalence.to_schedule(a), start=x[..., 0])[..., -1]
        apart, moved = (x @ a - end for end in (scheduled, x[..., -1]))
        errors[seed] = np.sqrt((apart**2).mean() / (moved**2).mean())
    return pd.Series(errors, name="distance")


@tabulated
def varying_curvature(
    seeds: Sequence[int], etas: Sequence[float], dofs: Sequence[int], chains: int = 1000
) -> Iterator[dict]:
    """What remains when each batch has its own curvature, h times chi^2 of `dof` degrees over dof.

    (As Gauss-Newton's.) One row per seed, dof and eta: `variation` sqrt(2 / dof), the curvature's
    relative standard deviation; `measured`, the variance of an iterate over that at equal
    curvatures, with its standard `error` and `predicted` (quadratic.varying_curvature_variance);
    `broken`, the distance from an EMA of horizon 30 to SGD under the schedule that would be
    equivalent, over that from the EMA to the last iterate (root mean squares).
    """
    steps = 600
    column, a = np.asarray(etas)[:, None], vectors.ema(steps + 1, decay(30))
    factors, v = equivalence.to_schedule(a, column), quadratic.stationary_variance(etas)
    for seed in seeds:
        for dof in dofs:
            rng, variation = np.random.default_rng([seed, dof]), np.sqrt(2 / dof)
            c = simulate.sample_minima(rng, np.ones(len(etas)), steps, chains)
            curvature = rng.chisquare(dof, c.shape) / dof
            x = simulate.sgd(c, column, curvature)
            scheduled = simulate.sgd(c, column * factors, curvature)[..., -1]
            apart, moved = (((x @ a - end) ** 2).mean(0) for end in (scheduled, x[..., -1]))
            columns = _estimates((x[..., steps // 2 :] ** 2).mean(-1) / v)
            columns["predicted"] = quadratic.varying_curvature_variance(etas, variation) / v
            columns["broken"] = np.sqrt(apart / moved)
            yield {"seed": seed, "dof": dof, "variation": variation, "eta": etas, **columns}
