"""Averages as weight vectors, against the recurrences that define them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from strategies import averages, decays, seeds

from paper_lib.averaging import vectors
from paper_lib.errors import ConfigError


def trajectory(seed: int, n: int, p: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, p)).cumsum(0)


@given(n=st.integers(2, 300), decay=decays, data=st.data())
def test_every_average_sums_to_one_and_is_non_negative(n, decay, data):
    window, lag = data.draw(st.integers(1, n)), data.draw(st.integers(1, n - 1))
    built = (vectors.last(n), vectors.uniform(n, window), vectors.ema(n, decay))
    for a in (*built, vectors.two_point(n, lag)):
        assert (a.shape, a.dtype) == ((n,), np.float64)
        assert a.min() >= 0
        assert a.sum() == pytest.approx(1, abs=1e-14)


@given(seeds, st.integers(1, 60), decays)
def test_ema_follows_its_recurrence(seed, n, decay):
    x = trajectory(seed, n)
    expected = x[0]
    for row in x[1:]:
        expected = decay * expected + (1 - decay) * row
    assert_allclose(vectors.ema(n, decay) @ x, expected, rtol=1e-12, atol=1e-12)


def test_windows_hold_the_iterates_they_name():
    x = np.arange(10.0)
    assert vectors.uniform(10, 3) @ x == pytest.approx((9 + 8 + 7) / 3)
    assert vectors.two_point(10, 9) @ x == pytest.approx(4.5)
    assert vectors.checkpoints(10, [2, 2, 5]) @ x == pytest.approx(3)


@given(averages(min_n=12, max_n=60), st.integers(1, 6))
def test_snapshots_take_the_weight_of_the_iterates_nearest_to_them(a, stride):
    steps = np.arange(0, a.size, stride)
    recorded = vectors.on_snapshots(a, steps)
    expected = np.zeros(len(steps))
    for t, weight in enumerate(a):
        distances = np.abs(steps - t)
        expected[np.flatnonzero(distances == distances.min())[-1]] += weight
    assert_allclose(recorded, expected, atol=1e-15)
    assert recorded.sum() == pytest.approx(1, abs=1e-13)
    if stride == 1:
        assert_array_equal(recorded, a)


def test_several_averages_go_onto_snapshots_together():
    both = np.stack([vectors.ema(21, 0.9), vectors.two_point(21, 10)])
    rows = vectors.on_snapshots(both, [0, 10, 20])
    assert_allclose(rows[0], vectors.on_snapshots(both[0], [0, 10, 20]))
    assert_allclose(rows[1], [0, 0.5, 0.5])


@pytest.mark.parametrize(("rows", "n_bytes"), [(1, 1), (7, 700), (64, 2**25)])
def test_blocks_change_neither_averages_nor_the_gram_matrix(monkeypatch, rows, n_bytes):
    monkeypatch.setattr(vectors, "BLOCK_ROWS", rows)
    monkeypatch.setattr(vectors, "BLOCK_BYTES", n_bytes)
    x = trajectory(1, 40)
    many = np.stack([vectors.named(name, 40) for name in ("EMA 0.8", "uniform 3", "two points 11")])
    for a in (many, many[2]):
        assert_allclose(vectors.average(a, x), a @ x, rtol=1e-13, atol=1e-13)
    centred = x - x.mean(0)
    assert_allclose(vectors.gram(x), centred @ centred.T, atol=1e-11)


def test_an_average_reads_only_the_rows_it_weighs_from_a_memory_map(tmp_path):
    x = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (1000, 50))
    x[:] = np.nan
    x[[989, 999]] = [[1.0], [3.0]]
    got = vectors.average(vectors.two_point(1000, 10), x)
    assert got.dtype == np.float32
    assert_array_equal(got, np.full(50, 2.0, np.float32))


def test_float32_trajectories_average_to_float32_accuracy():
    rng = np.random.default_rng(0)
    x = (1 + 1e-3 * rng.standard_normal((4000, 300))).astype(np.float32)
    a = vectors.uniform(4000, 4000)
    assert_allclose(vectors.average(a, x), a @ x.astype(np.float64), rtol=2e-7)


# --- Gram matrices -------------------------------------------------------------------------------


def test_gram_keeps_small_distances_far_from_the_origin_in_float32():
    x = (100 + 1e-2 * np.random.default_rng(0).standard_normal((2, 5000))).astype(np.float32)
    exact = ((x[0].astype(float) - x[1].astype(float)) ** 2).sum()
    assert vectors.squared_displacement(vectors.gram(x), [1])[0] == pytest.approx(exact, rel=1e-4)


@given(seeds, st.integers(2, 40))
def test_displacement_is_that_of_the_iterates_whatever_the_centre(seed, n):
    x = trajectory(seed, n)
    lags = [*vectors.spaced_lags(n), n - 1]
    expected = [((x[k:] - x[: n - k]) ** 2).sum(1).mean() for k in lags]
    for G in (vectors.gram(x), (x + 3) @ (x + 3).T):
        found = vectors.squared_displacement(G, lags)
        assert_allclose(found, expected, atol=1e-8, rtol=1e-8)


def test_lags_reach_from_one_to_half_and_a_power_has_its_exponent():
    lags = vectors.spaced_lags(600)
    assert (lags[0], lags[-1]) == (1, 300)
    assert vectors.exponent(lags, 3.0 * lags**0.7) == pytest.approx(0.7)


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: vectors.ema(10, 1.0), r"decay = 1.0 .*\[0, 1\)"),
        (lambda: vectors.ema(10, -0.1), "decay = -0.1"),
        (lambda: vectors.two_point(10, 10), r"lag = 10 .*1\.\.9"),
        (lambda: vectors.two_point(10, 0), "lag = 0"),
        (lambda: vectors.uniform(10, 11), r"window = 11 .*1\.\.10"),
        (lambda: vectors.uniform(10, 0), "window = 0"),
        (lambda: vectors.named("EMA", 10), "unknown average 'EMA': write EMA and a decay"),
        (lambda: vectors.named("uniform 2.5", 10), "'uniform 2.5': .* whole number"),
        (lambda: vectors.checkpoints(10, [3, 10]), r"= \[3, 10\] .*0\.\.9"),
        (lambda: vectors.squared_displacement(np.eye(5), [5]), r"lags = \[5\] .*0\.\.4"),
        (lambda: vectors.exponent(np.arange(1, 5), np.zeros(4)), "displacement = 0.0 .*at rest"),
        (lambda: vectors.check_weights([0.5, np.nan]), "finite"),
        (lambda: vectors.check_weights([[1.0, 0.0], [0.4, 0.5]]), "weights = 0.9 .*rescale"),
        (lambda: vectors.average(np.ones(1), np.zeros((2, 3))), "= 1 .*has 2 iterates"),
        (lambda: vectors.on_snapshots(vectors.last(10), [0, 5, 10]), r"within 0\.\.9"),
        (lambda: vectors.on_snapshots(vectors.last(10), [5, 5]), "must increase"),
    ],
)
def test_errors_name_the_value_and_the_range(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
