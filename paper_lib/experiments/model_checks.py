"""Claim C5: the quadratic model simulated, and held against its closed forms and its equivalences.

Every table has one row per seed and setting. Learning rate 1 throughout, so that a direction's curvature is its eta,
and batch minima of variance 1, unless said otherwise. Runs begin in their stationary state unless they have a start.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from paper_lib.averaging import equivalence, schedules, vectors
from paper_lib.theory import quadratic, simulate

ETAS = (0.01, 0.05, 0.2, 1.0)
"""Directions from slow to one that forgets everything in a step."""

LENGTHS = (1, 3, 10, 30, 100, 200)
"""Lags, windows and horizons 1 / (1 - decay) of averages, in steps."""

AVERAGES = {
    "two-point": (vectors.two_point, quadratic.two_point_ratio),
    "EMA": (lambda n, horizon: vectors.ema(n, decay(horizon)), lambda eta, t: quadratic.ema_ratio(eta, decay(t))),
    "uniform": (vectors.uniform, quadratic.uniform_ratio),
}
"""By name: weights from (n, length), and the predicted variance ratio from (eta, length)."""

FAR = 3.0  # where runs with a start begin, in standard deviations of the batch minima


def decay(horizon: float) -> float:
    """The decay r of an EMA that reaches back `horizon` = 1 / (1 - r) steps."""
    return 1 - 1 / horizon


def random_average(rng: np.random.Generator, n: int) -> np.ndarray:
    """Non-negative weights (n,) that sum to 1: a fifth of the iterates, weighed exponentially at random."""
    a = rng.exponential(size=n) * (rng.random(n) < 0.2)
    a[-1] += 1e-3  # never empty
    return a / a.sum()


def equivalence_errors(
    seeds: Sequence[int], etas: np.ndarray, steps: int = 2000, momentum: float = 0.0
) -> pd.DataFrame:
    """How far SGD under the equivalent schedule ends from the average, on the same batches (average -> schedule).

    `error` is the distance over the root mean square of the averaged run's iterates: rounding, if the algebra is right.
    One row per seed, average and eta; both runs have the momentum. ValueError as in equivalence.to_schedule.
    """
    tables, column = [], np.asarray(etas)[:, None]
    for seed in seeds:
        rng = np.random.default_rng(seed)
        c = simulate.sample_minima(rng, np.ones(len(etas)), steps)[0]
        x = simulate.sgd(c, column, start=FAR, momentum=momentum)
        averages = {name: weights(steps + 1, 100) for name, (weights, _) in AVERAGES.items()}
        for name, a in {**averages, "random": random_average(rng, steps + 1)}.items():
            factors = equivalence.to_schedule(a, column, momentum)
            end = simulate.sgd(c, column * factors, start=FAR, momentum=momentum)[:, -1]
            error = np.abs(x @ a - end) / np.sqrt((x**2).mean(-1))
            tables.append(pd.DataFrame({"seed": seed, "average": name, "eta": etas, "error": error}))
    return pd.concat(tables, ignore_index=True)


def cooldown_errors(seeds: Sequence[int], etas: np.ndarray, steps: int = 2000, horizon: int = 500) -> pd.DataFrame:
    """As equivalence_errors in the other direction: an average of a constant-lr run in place of each named cooldown."""
    tables, column = [], np.asarray(etas)[:, None]
    for seed in seeds:
        c = simulate.sample_minima(np.random.default_rng(seed), np.ones(len(etas)), steps)[0]
        x = simulate.sgd(c, column, start=FAR)
        for name in schedules.COOLDOWNS:
            factors = schedules.cooldown(name, steps, horizon)
            end = simulate.sgd(c, column * factors, start=FAR)[:, -1]
            average = (x * equivalence.to_average(factors, column)).sum(-1)
            error = np.abs(average - end) / np.sqrt((x**2).mean(-1))
            tables.append(pd.DataFrame({"seed": seed, "schedule": name, "eta": etas, "error": error}))
    return pd.concat(tables, ignore_index=True)


def stationary(seed: int, etas: Sequence[float], steps: int, chains: int) -> tuple[np.ndarray, np.ndarray]:
    """Iterates (chains, d, steps + 1) of independent stationary runs, and their batch minima (chains, d, steps)."""
    rng, etas = np.random.default_rng(seed), np.asarray(etas)
    start = rng.standard_normal((chains, etas.size)) * np.sqrt(quadratic.stationary_variance(etas))
    c = simulate.sample_minima(rng, np.ones(etas.size), steps, chains)
    return simulate.sgd(c, etas[:, None], start=start), c


def variances(seeds: Sequence[int], etas: Sequence[float] = ETAS, chains: int = 1000) -> pd.DataFrame:
    """Variance of averages over that of an iterate: `measured` with its standard `error`, and `predicted`.

    One row per seed, average, length (lag, horizon or window) and eta.
    """
    tables, steps = [], 10 * max(LENGTHS)  # an EMA of the largest horizon has forgotten its start
    cases = [(name, length) for name in AVERAGES for length in LENGTHS]
    weights = np.array([AVERAGES[name][0](steps + 1, length) for name, length in cases])
    predicted = np.array([AVERAGES[name][1](np.asarray(etas), length) for name, length in cases])
    for seed in seeds:
        x, _ = stationary(seed, etas, steps, chains)
        averages = vectors.average(weights, np.moveaxis(x, -1, 0).reshape(steps + 1, -1))
        squares = averages.reshape(len(cases), chains, -1) ** 2 / quadratic.stationary_variance(etas)
        measured, error = squares.mean(1), squares.std(1, ddof=1) / np.sqrt(chains)
        for i, (name, length) in enumerate(cases):
            columns = {"eta": etas, "measured": measured[i], "error": error[i], "predicted": predicted[i]}
            tables.append(pd.DataFrame({"seed": seed, "average": name, "length": length, **columns}))
    return pd.concat(tables, ignore_index=True)


def probe_losses(seeds: Sequence[int], probes: np.ndarray, etas: Sequence[float] = ETAS) -> pd.DataFrame:
    """Expected loss after a step of `probe` learning rates on one batch, of that batch (`own`) and of all (`held`).

    Directions have equal shares in the held-out loss before the step, so that none hides the others: s2 is such that
    h v / 2 = 1 / d in each. One row per seed, probe and direction, `eta`; `decrease` is the first-order decrease of the
    held-out loss in a full step, lr times its slope. Averages over 200 steps of 500 runs.
    """
    tables, h = [], np.asarray(etas)[:, None]
    scale = 2 / (len(etas) * h[:, 0] * quadratic.stationary_variance(h[:, 0]))  # of the losses, by the choice of s2
    for seed in seeds:
        x, c = stationary(seed, etas, steps=200, chains=500)
        x = x[..., :-1]
        decrease = scale * (h * (x - c) * h * x).mean((0, 2))
        for p in probes:
            after = x - p * h * (x - c)
            own, held = (scale * (h * z**2 / 2).mean((0, 2)) for z in (after - c, after))
            columns = {"eta": etas, "own": own, "held": held, "decrease": decrease}
            tables.append(pd.DataFrame({"seed": seed, "probe": p, **columns}))
    return pd.concat(tables, ignore_index=True)


def best_probe(losses: pd.DataFrame) -> pd.DataFrame:
    """Per seed, from all directions together: `best` held-out probe step, and `full`, the change of the held-out loss
    after a full step over its first-order decrease. The loss is a parabola in the step, so three probes suffice.
    """
    total = losses.groupby(["seed", "probe"])[["held", "decrease"]].sum().reset_index()
    rows = []
    for seed, curve in total.groupby("seed"):
        a, b, c = np.polyfit(curve.probe, curve.held, 2)
        rows.append({"seed": seed, "best": -b / (2 * a), "full": (a + b) / curve.decrease.iloc[0]})
    return pd.DataFrame(rows).set_index("seed")


def timescales(seeds: Sequence[int], etas: Sequence[float], horizons: Sequence[int], chains: int = 500) -> pd.DataFrame:
    """Variance, over that of an iterate, of EMAs and of SGD under their tail-sum schedule, the same in all directions.

    One row per seed, horizon, eta and `kind` ("EMA", "tail-sum schedule"): `measured` with its standard `error`, and
    `predicted`: closed form, and sum w_i^2 over the scheduled run's own batch weights (equivalence.batch_weights).
    """
    tables, steps, v = [], 10 * max(horizons), quadratic.stationary_variance(etas)
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
                square = ends**2 / v
                columns = {"measured": square.mean(0), "error": square.std(0, ddof=1) / np.sqrt(chains)}
                key = {"seed": seed, "horizon": horizon, "kind": kind, "eta": etas}
                tables.append(pd.DataFrame({**key, **columns, "predicted": predicted[kind]}))
    return pd.concat(tables, ignore_index=True)


def slow_limit_error(seeds: Sequence[int], eta: float, horizon: int, chains: int = 200) -> pd.Series:
    """Distance from an EMA to SGD under its tail-sum schedule, over the distance from the EMA to the last iterate.

    Root mean squares over `chains` runs of one direction, per seed. Vanishes with eta times the horizon.
    """
    steps, errors = 10 * horizon, {}
    a = vectors.ema(steps + 1, decay(horizon))
    for seed in seeds:
        x, c = stationary(seed, [eta], steps, chains)
        scheduled = simulate.sgd(c, eta * equivalence.to_schedule(a), start=x[..., 0])[..., -1]
        apart, moved = (x @ a - end for end in (scheduled, x[..., -1]))
        errors[seed] = np.sqrt((apart**2).mean() / (moved**2).mean())
    return pd.Series(errors, name="distance")


def varying_curvature(
    seeds: Sequence[int], etas: Sequence[float], dofs: Sequence[int], chains: int = 1000
) -> pd.DataFrame:
    """What remains when each batch has its own curvature, h times chi^2 of `dof` degrees over dof (as Gauss-Newton's).

    One row per seed, dof and eta: `variation` sqrt(2 / dof), the curvature's relative standard deviation; `measured`,
    the variance of an iterate over that at equal curvatures, with its standard `error` and `predicted`
    (quadratic.varying_curvature_variance); `broken`, the distance from an EMA of horizon 30 to SGD under the schedule
    that would be equivalent, over that from the EMA to the last iterate (root mean squares).
    """
    steps, tables = 600, []
    column, a = np.asarray(etas)[:, None], vectors.ema(steps + 1, decay(30))
    factors = equivalence.to_schedule(a, column)
    for seed in seeds:
        for dof in dofs:
            rng, variation = np.random.default_rng([seed, dof]), np.sqrt(2 / dof)
            c = simulate.sample_minima(rng, np.ones(len(etas)), steps, chains)
            curvature = rng.chisquare(dof, c.shape) / dof
            x = simulate.sgd(c, column, curvature)
            scheduled = simulate.sgd(c, column * factors, curvature)[..., -1]
            square = (x[..., steps // 2 :] ** 2).mean(-1) / quadratic.stationary_variance(etas)
            predicted = quadratic.varying_curvature_variance(etas, variation) / quadratic.stationary_variance(etas)
            apart, moved = (((x @ a - end) ** 2).mean(0) for end in (scheduled, x[..., -1]))
            columns = {"measured": square.mean(0), "error": square.std(0, ddof=1) / np.sqrt(chains)}
            key = {"seed": seed, "dof": dof, "variation": variation, "eta": etas}
            tables.append(pd.DataFrame({**key, **columns, "predicted": predicted, "broken": np.sqrt(apart / moved)}))
    return pd.concat(tables, ignore_index=True)


def deviations(table: pd.DataFrame) -> pd.Series:
    """Per seed, the largest deviation of `measured` from `predicted`, in standard errors."""
    return ((table.measured - table.predicted).abs() / table.error).groupby(table.seed).max()
