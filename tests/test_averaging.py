"""Averages as weight vectors, against the recurrences that define them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import averages, decays, seeds

from paper_lib.averaging import vectors


def trajectory(seed: int, n: int, p: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, p)).cumsum(0)


@given(n=st.integers(1, 300), data=st.data())
def test_every_average_sums_to_one_and_is_non_negative(n, data):
    window = data.draw(st.integers(1, n))
    period = data.draw(st.integers(1, max(1, (n - 1) // max(1, window - 1))))
    start = data.draw(st.integers(0, n - 1))
    built = [
        vectors.last(n),
        vectors.uniform(n, window, period),
        vectors.ema(n, data.draw(decays), start),
        vectors.ema(n, data.draw(decays), start, debias=True),
    ]
    if n > 1:
        built.append(vectors.two_point(n, data.draw(st.integers(1, n - 1))))
    for a in built:
        assert a.shape == (n,)
        assert a.dtype == np.float64
        assert a.min() >= 0
        assert a.sum() == pytest.approx(1, abs=1e-14)


@given(seeds, st.integers(1, 60), decays, st.data())
def test_ema_follows_its_recurrence(seed, n, decay, data):
    x = trajectory(seed, n)
    start = data.draw(st.integers(0, n - 1))
    expected, from_zero = x[start], (1 - decay) * x[start]
    for row in x[start + 1 :]:
        expected = decay * expected + (1 - decay) * row
        from_zero = decay * from_zero + (1 - decay) * row
    np.testing.assert_allclose(vectors.ema(n, decay, start) @ x, expected, rtol=1e-12, atol=1e-12)
    debiased = vectors.ema(n, decay, start, debias=True) @ x
    np.testing.assert_allclose(debiased, from_zero / (1 - decay ** (n - start)), rtol=1e-10, atol=1e-12)


def test_windows_hold_the_iterates_they_name():
    x = np.arange(10.0)
    assert vectors.uniform(10, 3) @ x == pytest.approx((9 + 8 + 7) / 3)
    assert vectors.uniform(10, 3, period=4) @ x == pytest.approx((9 + 5 + 1) / 3)
    assert vectors.two_point(10, 9) @ x == pytest.approx(4.5)
    assert vectors.checkpoints(10, [2, 2, 4], [0.25, 0.25, 0.5]) @ x == pytest.approx(3)


@given(averages(), decays)
def test_composition_is_the_average_of_the_inner_curve(outer, decay):
    x = trajectory(0, outer.size)
    curve = np.array(list(vectors.ema_rows(x, decay)))
    composed = vectors.compose(outer, lambda n: vectors.ema(n, decay))
    np.testing.assert_allclose(composed @ x, outer @ curve, rtol=1e-12, atol=1e-12)


@given(decays, decays, st.integers(1, 50))
def test_an_ema_of_an_ema_does_not_depend_on_their_order(r, s, n):
    both = vectors.compose(vectors.ema(n, r), lambda m: vectors.ema(m, s))
    swapped = vectors.compose(vectors.ema(n, s), lambda m: vectors.ema(m, r))
    np.testing.assert_allclose(both[1:], swapped[1:], atol=1e-13)  # the start differs for none but x_0
    assert both.sum() == pytest.approx(1, abs=1e-13)


def test_composition_asks_only_for_the_times_that_count():
    windowed = vectors.compose(vectors.two_point(20, 5), lambda n: vectors.uniform(n, 10))
    expected = (vectors.uniform(20, 10) + np.append(vectors.uniform(15, 10), np.zeros(5))) / 2
    np.testing.assert_allclose(windowed, expected)


@given(seeds, decays)
def test_an_average_along_a_run_matches_the_recurrence(seed, decay):
    x = trajectory(seed, 25)
    times = [0, 3, 24]
    rows = vectors.average(vectors.along(lambda n: vectors.ema(n, decay), 25, times), x)
    curve = np.array(list(vectors.ema_rows(x, decay)))
    np.testing.assert_allclose(rows, curve[times], rtol=1e-12, atol=1e-12)


@given(averages(min_n=12, max_n=60), st.integers(1, 6))
def test_snapshots_take_the_weight_of_the_iterates_nearest_to_them(a, stride):
    steps = np.arange(0, a.size, stride)
    recorded = vectors.on_snapshots(a, steps)
    expected = np.zeros(len(steps))
    for t, weight in enumerate(a):
        distances = np.abs(steps - t)
        expected[np.flatnonzero(distances == distances.min())[-1]] += weight
    np.testing.assert_allclose(recorded, expected, atol=1e-15)
    assert recorded.sum() == pytest.approx(1, abs=1e-13)
    if stride == 1:
        np.testing.assert_array_equal(recorded, a)


def test_several_averages_go_onto_snapshots_together():
    both = np.stack([vectors.ema(21, 0.9), vectors.two_point(21, 10)])
    rows = vectors.on_snapshots(both, [0, 10, 20])
    np.testing.assert_allclose(rows[0], vectors.on_snapshots(both[0], [0, 10, 20]))
    np.testing.assert_allclose(rows[1], [0, 0.5, 0.5])


@pytest.mark.parametrize(("rows", "n_bytes"), [(1, 1), (7, 700), (64, 2**25)])
def test_blocks_change_neither_averages_nor_the_gram_matrix(monkeypatch, rows, n_bytes):
    monkeypatch.setattr(vectors, "BLOCK_ROWS", rows)
    monkeypatch.setattr(vectors, "BLOCK_BYTES", n_bytes)
    x = trajectory(1, 40)
    many = np.stack([vectors.ema(40, 0.8), vectors.uniform(40, 5, 7), vectors.two_point(40, 11)])
    np.testing.assert_allclose(vectors.average(many, x), many @ x, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(vectors.average(many[1], x), many[1] @ x, rtol=1e-13, atol=1e-13)
    centred = x - x.mean(0)
    np.testing.assert_allclose(vectors.gram(x), centred @ centred.T, atol=1e-11)


def test_an_average_reads_only_the_rows_it_weighs_from_a_memory_map(tmp_path):
    x = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (1000, 50))
    x[:] = np.nan
    x[[989, 999]] = [[1.0], [3.0]]
    got = vectors.average(vectors.two_point(1000, 10), x)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, np.full(50, 2.0, np.float32))


def test_float32_trajectories_average_to_float32_accuracy():
    rng = np.random.default_rng(0)
    x = (1 + 1e-3 * rng.standard_normal((4000, 300))).astype(np.float32)
    a = vectors.uniform(4000, 4000)
    np.testing.assert_allclose(vectors.average(a, x), a @ x.astype(np.float64), rtol=2e-7)


@given(seeds, averages(min_n=20, max_n=20), averages(min_n=20, max_n=20))
def test_distances_of_averages_from_the_gram_matrix(seed, a, b):
    x = 1000 + trajectory(seed, 20)
    G = vectors.gram(x)
    apart = ((a @ x - b @ x) ** 2).sum()
    assert vectors.squared_distance(a, b, G) == pytest.approx(apart, rel=1e-8, abs=1e-8)
    assert vectors.squared_norm(a, vectors.recenter(G, b)) == pytest.approx(apart, rel=1e-8, abs=1e-8)
    from_mean = ((a @ x - x.mean(0)) ** 2).sum()
    assert vectors.squared_norm(np.stack([a, b]), G)[0] == pytest.approx(from_mean, rel=1e-8, abs=1e-8)


def test_gram_keeps_small_distances_far_from_the_origin_in_float32():
    x = (100 + 1e-2 * np.random.default_rng(0).standard_normal((10, 5000))).astype(np.float32)
    exact = ((x[0].astype(float) - x[1].astype(float)) ** 2).sum()
    a, b = vectors.checkpoints(10, [0]), vectors.checkpoints(10, [1])
    assert vectors.squared_distance(a, b, vectors.gram(x)) == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: vectors.ema(10, 1.0), r"decay must lie in \[0, 1\), got 1.0"),
        (lambda: vectors.ema(10, -0.1), r"\[0, 1\)"),
        (lambda: vectors.ema(10, 0.9, start=10), r"0\.\.9, got 10"),
        (lambda: vectors.two_point(10, 10), r"1\.\.9 for a run of 9 steps, got 10"),
        (lambda: vectors.two_point(10, 0), r"got 0"),
        (lambda: vectors.uniform(10, 6, period=2), r"reaches back 10 steps, but the run has 9"),
        (lambda: vectors.uniform(10, 0), r"at least 1"),
        (lambda: vectors.checkpoints(10, [3, 10]), r"0\.\.9, got \[3, 10\]"),
        (lambda: vectors.checkpoints(10, [3, 4], [0.5, 0.6]), r"sum to 1, got a sum of 1.1"),
        (lambda: vectors.check_weights(np.array([0.5, np.nan])), r"finite"),
        (lambda: vectors.check_weights(np.array([[1.0, 0.0], [0.4, 0.5]])), r"sum of 0.9"),
        (lambda: vectors.average(np.ones(1), np.zeros((2, 3))), r"weighs 1 iterates, the trajectory has 2"),
        (lambda: vectors.on_snapshots(vectors.last(10), [0, 5, 10]), r"within 0\.\.9"),
        (lambda: vectors.on_snapshots(vectors.last(10), [5, 5]), r"must increase"),
    ],
)
def test_errors_name_the_value_and_the_range(call, message):
    with pytest.raises(ValueError, match=message):
        call()
