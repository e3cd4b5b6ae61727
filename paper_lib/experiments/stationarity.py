"""Claim C10, where the truth is known: false alarms, power and delays of the stationarity test on quadratics.

The gradient noise has variance 1 in every direction, so that a stationary direction of eta = lr x curvature has
E g_t^2 = 2 / (2 - eta). A run that never stops descending has one more direction, in which the loss falls with a
constant slope; the edge of descent is the slope at which the statistic E s_t is zero (see `monitor`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from scipy.signal import lfilter

from paper_lib.averaging.monitor import BLOCKS, StationarityTest, Window, block_length
from paper_lib.results import figures
from paper_lib.theory import simulate

SPECTRA = {  # eta of every direction
    "1 direction, eta 0.1": np.full(1, 0.1),
    "10 directions, eta 0.1": np.full(10, 0.1),
    "10 directions, eta 0.01": np.full(10, 0.01),
    "50 directions, eta 0.001 to 1": np.geomspace(0.001, 1, 50),
}
ALPHAS = (0.01, 0.02, 0.05, 0.1, 0.2)


# --- closed forms ------------------------------------------------------------------------------------------------


def opposition(eta: np.ndarray, memory: float) -> float:
    """-E s_t at stationarity: eta / ((2 - eta) (1 - b q)), summed over the directions eta (d,)."""
    return float(np.sum(eta / ((2 - eta) * (1 - memory * (1 - eta)))))


def edge(eta: np.ndarray, memory: float) -> float:
    """The slope in one more direction, squared over 1 - b, that makes E s_t = 0."""
    return float(np.sqrt((1 - memory) * opposition(eta, memory)))


def signal(eta: np.ndarray, memory: float) -> float:
    """-E s_t over the standard deviation of s_t at stationarity, for normal gradients.

    With n2 = E g_t^2, the variance of u is n2 / ((1 + b) (1 - b q)). For many directions d of one eta the ratio tends
    to sqrt(d) (eta/2) sqrt((1 + b) / (1 - b q)): d = 1 has eta/2 at b = 0, sqrt(eta)/2 at b = q, sqrt(eta/2) at most.
    """
    n2, forgetting = 2 / (2 - eta), 1 - memory * (1 - eta)
    means = n2 * eta / 2 / forgetting
    return float(means.sum() / np.sqrt(np.sum(n2**2 / ((1 + memory) * forgetting) + means**2)))


# --- simulation --------------------------------------------------------------------------------------------------


def gradients(
    rng: np.random.Generator, eta: np.ndarray, steps: int, seeds: int, distance: float = 0.0, slope: float = 0.0
) -> np.ndarray:
    """Gradients used by plain SGD, (seeds, d + 1, steps); the last direction has a constant slope and curvature 0.

    Runs start stationary around a mean that is `distance` stationary standard deviations away in every direction.
    """
    curvature, s2 = eta[:, None], eta**-2.0  # lr = 1
    scatter = np.sqrt(s2 * eta / (2 - eta))
    minima = simulate.sample_minima(rng, s2, steps, seeds)
    start = scatter * (distance + rng.standard_normal((seeds, eta.size)))
    x = simulate.sgd(minima, 1.0, curvature, start)
    sloping = slope + rng.standard_normal((seeds, 1, steps))
    return np.concatenate([curvature * (x[..., :-1] - minima), sloping], axis=1)


def statistic(g: np.ndarray, memory: float) -> np.ndarray:
    """s_t = g_t . u_(t-1) for t = 1, 2, ... of gradients (..., d, T): (..., T - 1), what `Monitor` looks at."""
    past = lfilter([1.0], [1.0, -memory], g, axis=-1)
    return np.sum(g[..., 1:] * past[..., :-1], axis=-2)


def replay(values: np.ndarray, alpha: float, block: int) -> list[Window]:
    """All windows of a `StationarityTest` that is given the values (n,), whatever it decides."""
    test, found, begin = StationarityTest(alpha, block), [], 0
    while begin + test.window <= len(values):
        sums = values[begin : begin + test.window].reshape(BLOCKS, -1).sum(1)
        begin += test.window
        found.append(test.decide(sums))
    return found


def sign_test(values: np.ndarray, burn_in: int) -> np.ndarray:
    """Pflug's rule: the first step after `burn_in` at which the sum of values (..., n) is negative, n if never."""
    negative = np.cumsum(values, axis=-1) < 0
    negative[..., :burn_in] = False
    return np.where(negative.any(-1), negative.argmax(-1), values.shape[-1])


def first_alarm(values: np.ndarray, alpha: float, block: int) -> np.ndarray:
    """Step of the test's first alarm for each row of values (seeds, n), n if there is none."""
    alarms = ([w.end for w in replay(row, alpha, block) if w.stationary] for row in values)
    return np.array([ends[0] if ends else values.shape[-1] for ends in alarms])


# --- measurements ------------------------------------------------------------------------------------------------


def measure_false_alarms(
    memory: float, alphas: Sequence[float] = ALPHAS, steps: int = 3200, seeds: int = 60, repetitions: int = 3
) -> pd.DataFrame:
    """Share of the windows that raise an alarm in runs at the edge of descent.

    One row per spectrum, alpha and repetition: spectrum, directions, alpha, repetition, rate, `windows` (how many).
    """
    rows, block = [], block_length(memory)
    for index, (spectrum, eta) in enumerate(SPECTRA.items()):
        for repetition in range(repetitions):
            rng = np.random.default_rng([repetition, index])
            values = statistic(gradients(rng, eta, steps, seeds, slope=edge(eta, memory)), memory)
            for alpha in alphas:
                alarms = [w.stationary for row in values for w in replay(row, alpha, block)]
                rate = {"alpha": alpha, "rate": np.mean(alarms), "windows": len(alarms)}
                rows.append({"spectrum": spectrum, "directions": eta.size, "repetition": repetition, **rate})
    return pd.DataFrame(rows)


def measure_stopped(
    memory: float, alpha: float, n_windows: int = 20, seeds: int = 30, repetitions: int = 3
) -> pd.DataFrame:
    """Share of runs that descend on average, E s_t as positive as it is negative at stationarity, but are stopped.

    Each rule has its own slope for that, and the length of `n_windows` windows; the sign test starts after one.
    One row per spectrum, rule ("test", "sign test") and repetition, with the `share`.
    """
    rows, block = [], block_length(memory)
    steps = n_windows * BLOCKS * block
    for index, (spectrum, eta) in enumerate(SPECTRA.items()):
        for repetition in range(repetitions):
            rng = np.random.default_rng([repetition, index])
            slopes = {b: np.sqrt(2) * edge(eta, b) for b in (memory, 0.0)}
            values = {b: statistic(gradients(rng, eta, steps + 1, seeds, slope=s), b) for b, s in slopes.items()}
            stops = {
                "test": first_alarm(values[memory], alpha, block),
                "sign test": sign_test(values[0.0], BLOCKS * block),
            }
            for rule, at in stops.items():
                share = np.mean(at < steps)
                rows.append({"spectrum": spectrum, "rule": rule, "repetition": repetition, "share": share})
    return pd.DataFrame(rows)


def measure_signal(
    etas: Sequence[float],
    memories: Sequence[float],
    directions: int = 10,
    steps: int = 2000,
    seeds: int = 20,
    repetitions: int = 3,
) -> pd.DataFrame:
    """-mean over standard deviation of s_t at stationarity, beside its closed form.

    One row per eta, memory and repetition: directions, eta, memory, repetition, signal, predicted.
    """
    rows = []
    for eta in etas:
        spectrum = np.full(directions, eta)
        for repetition in range(repetitions):
            g = gradients(np.random.default_rng([repetition, directions]), spectrum, steps, seeds)[:, :-1]
            for memory in memories:
                s = statistic(g, memory)
                found = {"signal": -s.mean() / s.std(), "predicted": signal(spectrum, memory)}
                rows.append({"directions": directions, "eta": eta, "memory": memory, "repetition": repetition, **found})
    return pd.DataFrame(rows)


def measure_delays(
    memory: float,
    alpha: float,
    distances: Sequence[float],
    eta: float = 0.1,
    directions: int = 10,
    steps: int = 8000,
    seeds: int = 10,
    repetitions: int = 3,
) -> pd.DataFrame:
    """Steps from where E s_t becomes negative to the stop, for runs that start `distance` standard deviations away.

    One row per distance, rule and repetition, means over seeds: delay (steps), and for the sign test `predicted`:
    the sum of E s_t, which the transient has raised to d v h^2 r^2 q / (1 - q^2), has to fall back to zero.
    """
    spectrum, block, q = np.full(directions, eta), block_length(memory), 1 - eta
    rows = []
    for distance in distances:
        mean = distance * np.sqrt(eta / (2 - eta)) * q ** np.arange(steps)  # gradients of the mean
        crossing = {
            b: np.argmax(directions * statistic(mean[None], b) < opposition(spectrum, b)) for b in (memory, 0.0)
        }
        for repetition in range(repetitions):
            g = gradients(np.random.default_rng([repetition, directions]), spectrum, steps, seeds, distance)[:, :-1]
            test = first_alarm(statistic(g, memory), alpha, block) - crossing[memory]
            sign = sign_test(statistic(g, 0.0), BLOCKS * block) - crossing[0.0]
            row = {"distance": distance, "repetition": repetition}
            rows.append({**row, "rule": "test", "delay": test.mean(), "predicted": np.nan})
            predicted = distance**2 * q / (1 - q**2) - crossing[0.0]
            rows.append({**row, "rule": "sign test", "delay": sign.mean(), "predicted": predicted})
    return pd.DataFrame(rows)


# --- figures -----------------------------------------------------------------------------------------------------


def plot_false_alarms(ax: Axes, table: pd.DataFrame) -> None:
    """False alarms per window against their nominal rate, one line per spectrum."""
    figures.band(ax, table, "alpha", "rate", hue="spectrum", marker="o")
    alphas = np.unique(table.alpha)
    figures.predicted(ax, alphas, alphas, label="nominal")
    ax.set(xscale="log", yscale="log", xlabel="nominal rate, alpha", ylabel="false alarms per window")
    ax.set_xticks(alphas, [f"{a:g}" for a in alphas])
    ax.minorticks_off()
    ax.legend(fontsize="small", loc="upper left")


def plot_signal(ax: Axes, table: pd.DataFrame) -> None:
    """Signal over noise per step against eta, one line per memory, with the closed form of each."""
    fine = np.geomspace(table.eta.min(), table.eta.max(), 100)
    (directions,) = table.directions.unique()
    for (memory, one), color in zip(table.groupby("memory"), sns.color_palette(), strict=False):
        label = "b = 0 (Pflug)" if memory == 0 else f"b = {memory:g}"
        figures.band(ax, one, "eta", "signal", label=label, color=color, marker="o", linestyle="none")
        figures.predicted(ax, fine, [signal(np.full(directions, e), memory) for e in fine], label=None, color=color)
    ax.set(xscale="log", yscale="log", xlabel=figures.ETA, ylabel="|mean| / standard deviation, a step")
    ax.legend(fontsize="small")


def plot_delays(ax: Axes, table: pd.DataFrame, window: int) -> None:
    """Steps from the truth to the stop, against the distance of the start; dotted: two windows of the test."""
    labels = {"test": "test", "sign test": "sign of the sum (Pflug)"}
    for (rule, label), color in zip(labels.items(), sns.color_palette(), strict=False):
        figures.band(ax, table[table.rule == rule], "distance", "delay", label=label, color=color, marker="o")
    model = table[table.rule == "sign test"].groupby("distance").predicted.first().loc[lambda p: p > window]
    figures.predicted(ax, model.index, model, label="model: the transient's sum has to be undone")
    ax.axhline(2 * window, color="0.5", linestyle=":", label="two windows of the test")
    ax.set(xscale="log", yscale="log", xlabel="distance of the start (stationary standard deviations)")
    ax.set_ylabel("delay (steps)")
    ax.legend(fontsize="small")
