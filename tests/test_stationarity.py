"""The test on quadratics: closed forms against simulation, fast paths against step-by-step
references.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paper_lib.averaging.monitor import Monitor, StationarityTest
from paper_lib.experiments import stationarity
from paper_lib.theory import quadratic

SPECTRUM = np.array([0.05, 0.3, 1.2])


def simulated(memory, steps=4000, seeds=20, **changes):
    g = stationarity.gradients(np.random.default_rng(0), SPECTRUM, steps, seeds, **changes)
    return g, stationarity.statistic(g, memory)


# --- closed forms ---------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [0.0, 0.5, 0.9])
def test_opposition_sums_the_cosines_of_gradients_at_all_lags(memory):
    cosines = quadratic.gradient_cosine(SPECTRUM, 400)[:, 1:] * (2 / (2 - SPECTRUM))[:, None]
    expected = -np.sum(cosines * memory ** np.arange(399.0))
    assert stationarity.opposition(SPECTRUM, memory) == pytest.approx(expected)


@pytest.mark.parametrize("memory", [0.0, 0.8])
def test_at_the_edge_the_statistic_is_zero_and_without_a_slope_it_is_the_opposition(memory):
    at_edge, flat = (
        simulated(memory, slope=s)[1] for s in (stationarity.edge(SPECTRUM, memory), 0.0)
    )
    tolerance = 4 * at_edge[:, 50:].mean(1).std() / np.sqrt(20)
    assert at_edge[:, 50:].mean() == pytest.approx(0, abs=tolerance)
    assert flat[:, 50:].mean() == pytest.approx(
        -stationarity.opposition(SPECTRUM, memory), abs=tolerance
    )


@pytest.mark.parametrize("memory", [0.0, 0.5, 0.9])
def test_signal(memory):
    g, _ = simulated(memory)
    s = stationarity.statistic(g[:, :-1], memory)[:, 50:]
    assert -s.mean() / s.std() == pytest.approx(stationarity.signal(SPECTRUM, memory), rel=0.05)


def test_a_memory_of_q_raises_the_signal_from_eta_to_its_root():
    eta, many = 0.01, 10_000
    signals = [
        stationarity.signal(np.full(many, eta), memory) / np.sqrt(many)
        for memory in (0.0, 1 - eta, 0.999999)
    ]
    assert signals == pytest.approx([eta / 2, np.sqrt(eta) / 2, np.sqrt(eta / 2)], rel=0.01)


# --- simulation and replay ------------------------------------------------------------------------


def test_runs_start_stationary_at_their_distance():
    g, _ = simulated(0.0, steps=5, seeds=4000, distance=3.0)
    scatter = np.sqrt(SPECTRUM / (2 - SPECTRUM))
    means = 3 * scatter * (1 - SPECTRUM) ** np.arange(5)[:, None]
    assert g[:, :-1].mean(0).T == pytest.approx(means, abs=0.1)
    assert g[:, :-1].var(0).T == pytest.approx(np.tile(2 / (2 - SPECTRUM), (5, 1)), rel=0.1)


def test_the_statistic_is_what_the_monitor_looks_at():
    g, values = simulated(0.5, steps=200, seeds=1)
    monitor = Monitor(0.5, alpha=0.001)
    for gradient in g[0].T:
        monitor.observe(gradient)
    first = monitor.windows[0]
    assert first.mean == pytest.approx(values[0, : first.steps].mean())


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.floats(-0.5, 0.5), st.integers(2, 9), st.integers(0, 400))
def test_replay_is_the_test_step_by_step(seed, mean, block, n):
    values = np.random.default_rng(seed).normal(mean, 1, n)
    test = StationarityTest(0.1, block)
    expected = [window for value in values if (window := test.add(value))]
    found = stationarity.replay(values, 0.1, block)
    assert [(w.end, w.steps, w.stationary) for w in found] == [
        (w.end, w.steps, w.stationary) for w in expected
    ]
    assert [w.t for w in found] == pytest.approx([w.t for w in expected])


def test_first_stops():
    values = np.array([[1.0, -3, 1, 1, 5, -9], [1, 1, 1, 1, 1, 1]])
    assert stationarity.sign_test(values, burn_in=0).tolist() == [1, 6]
    assert stationarity.sign_test(values, burn_in=2).tolist() == [2, 6]
    falling = np.concatenate([np.ones(16), -1 - 0.01 * np.arange(16)])
    assert stationarity.first_alarm(np.stack([falling, np.ones(32)]), 0.05, 2).tolist() == [32, 32]
