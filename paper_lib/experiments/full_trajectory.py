"""Predict whole loss curves of one schedule from a run under another (claim C10).

A state is what `theory.spectrum.Directions` holds of a run at one point: curvatures, noise and
gradient there. It says how the loss goes on under any schedule.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
from tqdm import tqdm

from paper_lib.errors import require
from paper_lib.experiments.tables import tabulated
from paper_lib.probing import probe
from paper_lib.probing.hessian import spectral_measure, split_gradients
from paper_lib.runs import Run
from paper_lib.theory import quadratic, spectrum
from paper_lib.theory.spectrum import Directions

N_CURVATURES = 13  # of the grid on which a response is resolved
LEVEL_BATCHES = 32  # for the loss at which a prediction begins
PREDICTORS = {  # column: what the prediction is made from
    "response": "spectrum fitted to the source",
    "settled": "spectrum from Hessian and noise",
    "current": "current learning rate only",
}


@tabulated
def responses(
    target: str, constant: Sequence[Run], changed: Sequence[Sequence[Run]]
) -> Iterator[dict]:
    """Loss under changing learning rates minus that of a twin at a constant one, a row per step.

    `changed` holds for each of the constant runs those that follow each other from where it begins.
    Both see the same batches, so that what is hard in a batch cancels. Columns target, seed, step
    (from there), lr (with momentum lr / (1 - m), its effect in slow directions) and change (nats).
    ConfigError where the two do not begin together, or the constant run is the shorter one.
    """
    for twin, parts in zip(constant, changed, strict=True):
        c, first = twin.config, parts[0].config.start
        require(first == c.start, "start", first, f"the constant run begins at step {c.start}")
        loss, lrs = (np.concatenate([getattr(p, name) for p in parts]) for name in ("loss", "lr"))
        allowed = f"the constant run takes only {len(twin.loss)} steps"
        require(len(loss) <= len(twin.loss), "steps", len(loss), allowed)
        columns = {"target": target, "seed": c.seed, "step": np.arange(len(loss))}
        yield columns | {"lr": lrs / (1 - c.momentum), "change": loss - twin.loss[: len(loss)]}


def hessian_states(
    runs: Sequence[Run], step: int, n_gradients: int = 128, n_products: int = 8, n_nodes: int = 12
) -> dict[int, Directions]:
    """States of runs at a snapshot, by seed, of squared gradient and noise; nothing is fitted.

    Lanczos quadrature (n_nodes) of the Hessian (n_products batches, weight decay included) seen
    from half the sum and half the difference of two mean gradients, each over half of n_gradients
    other batches: the difference is noise, the sum is gradient and as much noise. Negative
    curvatures count as flat: a quadratic would fall there without end.
    """
    half = max(1, n_gradients // 2)
    return {
        run.config.seed: _hessian_state(run, step, n_products, half, n_nodes)
        for run in tqdm(runs, desc=f"Hessian at step {step}")
    }


def _hessian_state(run: Run, step: int, n_products: int, half: int, n_nodes: int) -> Directions:
    """The state of one run; `half` is the number of batches in each of the two mean gradients."""
    weights, wd = np.array(run.at(step)), run.config.weight_decay
    undecayed, *means = split_gradients(run, weights, n_products, half)
    one, other = (mean + wd * weights for mean in means)

    def product(d: np.ndarray) -> np.ndarray:
        return undecayed(d) + wd * d

    h, both = spectral_measure(product, (one + other) / 2, n_nodes)
    h_noise, noise = spectral_measure(product, (one - other) / 2, n_nodes)
    curvatures, variance = np.append(h, h_noise), np.append(0 * both, 2 * half * noise)
    return Directions(np.maximum(curvatures, 0), variance, np.append(both, -noise))


def onward(run: Run, step: int, state: Directions, n: int) -> pd.DataFrame:
    """Losses of the n steps after a snapshot, and what its state predicts, a row per step.

    Columns seed, origin (the snapshot's step), step, lr, loss and model (nats), which begins at the
    loss of fixed batches at the snapshot. Fewer rows where the run ends before.
    """
    c, log = run.config, slice(step - run.config.start, step - run.config.start + n)
    batches = probe.fixed_batches(run.dataset, LEVEL_BATCHES, c.batch_size, c.seed)
    level = probe.losses(run.network(), np.array(run.at(step)), *batches).mean()
    lrs = run.lr[log] / (1 - c.momentum)
    columns = {"seed": c.seed, "origin": step, "step": step + np.arange(len(lrs)), "lr": c.lr}
    columns |= {"loss": run.loss[log], "model": level + state.losses(lrs)}
    return pd.DataFrame(columns)


def response_spectra(source: pd.DataFrame, lr: float) -> dict[int, Directions]:
    """The states that explain each seed's response (`responses` of one target), by seed.

    Timescales go from a single step to all steps of the source at the constant lr.
    """
    states = {}
    for seed, response in source.groupby("seed"):
        h = np.geomspace(1 / len(response), 1, N_CURVATURES) / lr
        change, lrs = response.change.to_numpy(), response.lr.to_numpy()
        states[seed] = spectrum.of_losses(h, *spectrum.fit_response(change, lrs, lr, h), lr)
    return states


def follow_current(table: pd.DataFrame, source: pd.DataFrame) -> np.ndarray:
    """The rule to beat: what the source settled at for each learning rate, linear between, (rows,).

    Settled: the mean over the later half of the steps that the source spends at a learning rate.
    """
    predicted = pd.Series(index=table.index, dtype=float)
    for seed, curve in table.groupby("seed"):
        by_lr = source[source.seed == seed].groupby("lr").change
        settled = by_lr.apply(lambda change: change.iloc[len(change) // 2 :].mean())
        predicted[curve.index] = np.interp(curve.lr, settled.index, settled)
    return predicted.to_numpy()


def predict(
    table: pd.DataFrame,
    source: pd.DataFrame,
    states: Mapping[str, Mapping[int, Directions]],
    lr: float,
) -> pd.DataFrame:
    """`responses` with a column for each of `states` (by name, then seed), and `follow_current`'s
    as `current`; `lr` is the constant learning rate.
    """
    predicted = table.assign(current=follow_current(table, source))
    for name, by_seed in states.items():
        for (_, seed), curve in table.groupby(["target", "seed"]):
            predicted.loc[curve.index, name] = by_seed[seed].response(curve.lr.to_numpy(), lr)
    return predicted


def blocks(table: pd.DataFrame, n: int = 20) -> pd.DataFrame:
    """Means over about n blocks of steps of each target and seed: single batches are noisy."""
    width = np.maximum(1, table.groupby(["target", "seed"]).step.transform("size") // n)
    numbered = table.assign(block=table.step // width)
    return numbered.groupby(["target", "seed", "block"], sort=False).mean().reset_index()


@tabulated
def errors(averaged: pd.DataFrame) -> Iterator[dict]:
    """Errors of every predictor by target and seed, from `blocks`.

    Columns target, seed, predictor, relative: root mean square over the measured curve's range.
    """
    for (target, seed), curve in averaged.groupby(["target", "seed"], sort=False):
        for predictor in averaged.columns.intersection(list(PREDICTORS), sort=False):
            rms = np.sqrt(np.mean((curve[predictor] - curve.change) ** 2))
            key = {"target": target, "seed": seed, "predictor": predictor}
            yield {**key, "relative": rms / np.ptp(curve.change)}


def share_predicted(table: pd.DataFrame, tolerance: float = 0.25, n: int = 20) -> float:
    """Share of the steps (`onward`, one seed and origin) before the model strays.

    That is where a mean over one of n blocks differs by more than `tolerance` times the fall.
    """
    block = (np.arange(len(table)) * n) // len(table)
    mean = table.groupby(block)[["loss", "model"]].mean()
    fall = abs(mean.loss.iloc[0] - mean.loss.iloc[-1])
    astray = np.abs(mean.model - mean.loss) > tolerance * fall
    return float(np.argmax(astray) / len(mean)) if astray.any() else 1.0


def emulation_gap(state: Directions, a: np.ndarray, lrs: np.ndarray, lr: float) -> np.ndarray:
    """Expected loss of an average minus that at the end of a schedule, by direction (d,), in nats.

    Both start in `state`, with h > 0: `a` (n + 1,) averages a run at the constant lr, the schedule
    takes lrs (n,). The mean of x decays by q = 1 - lr h a step, its scatter is stationary.
    """
    h, u = state.h, state.gradient / state.h**2
    v = state.variances(lr)
    kept = (1 - lr * h[:, None]) ** np.arange(len(a)) @ a
    ratio = quadratic.variance_ratio(a, quadratic.autocorrelation(lr * h, len(a)))
    average = v * ratio + (u - v) * kept**2
    for rate in lrs:
        u = (1 - rate * h) ** 2 * u + rate**2 * state.noise
    return h / 2 * (average - u)
