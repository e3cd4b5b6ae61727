"""Parabolas on lines: exact ones are recognized, cubic ones are not; lines and chords are where they are said to be."""

import numpy as np
import pandas as pd
import pytest
from helpers import SMALL, SmallNet, small_data
from hypothesis import given
from hypothesis import strategies as st

from paper_lib import presets, runs
from paper_lib.experiments import parabola
from paper_lib.probing import derivatives, probe


def lines(loss, slope, curvature, best):
    """A table of `from_points` for one snapshot whose loss along the gradient is loss(step size)."""
    name = {"point": "p", "seed": 0, "step": 3, "batch": 3, "best": best, "slope": slope, "curvature": curvature}
    parts = {"gradient": parabola.EVEN, "close": parabola.CLOSE}
    tables = [pd.DataFrame({"position": u, "loss": loss(u * best), "line": line}) for line, u in parts.items()]
    return pd.concat(tables, ignore_index=True).assign(**name)


@given(st.floats(0.1, 10), st.floats(0.1, 10))
def test_exact_parabolas_are_recognized_and_one_point_predicts_them(slope, curvature):
    best = 1 / curvature
    table = lines(lambda s: 3 - slope * s + slope * curvature * s**2 / 2, slope, curvature, best)
    fit = parabola.fits(table, upto=4)
    assert len(fit) == 1 and fit.r2.item() == pytest.approx(1) and fit.worst.item() == pytest.approx(0, abs=1e-9)
    minimum = parabola.predicted_minima(table)
    assert minimum.place.item() == pytest.approx(1) and minimum["drop"].item() == pytest.approx(1)
    np.testing.assert_allclose(parabola.secants(table).secant, 1, rtol=1e-6)


def test_r2_and_worst_residual_of_a_cubic():
    table = lines(lambda s: s**3, 1, 1, 1.0)
    s = parabola.EVEN[parabola.EVEN <= 2]
    residual = s**3 - np.polyval(np.polyfit(s, s**3, 2), s)
    fit = parabola.fits(table)
    assert fit.r2.item() == pytest.approx(1 - residual.var() / (s**3).var()) and fit.r2.item() < 0.999
    assert fit.worst.item() == pytest.approx(np.abs(residual).max() / 8)
    assert parabola.fits(table, upto=1).r2.item() != fit.r2.item()
    assert parabola.by_seed(pd.concat([fit, fit.assign(step=9, r2=0.0)])).r2.item() == pytest.approx(fit.r2.item() / 2)


def test_secant_curvature_of_a_cubic_falls_linearly_with_distance():
    table = lines(lambda s: 1 - s + s**2 / 2 - s**3 / 6, slope=1, curvature=1, best=0.5)
    found = parabola.secants(table)
    np.testing.assert_allclose(found.secant, 1 - found.position * 0.5 / 3, rtol=1e-6)
    assert found.position.is_monotonic_increasing


def test_no_minimum_is_predicted_from_negative_curvature():
    minimum = parabola.predicted_minima(lines(lambda s: (s - 1) ** 2, 2, -1, 1.0))
    assert minimum[["place", "drop"]].isna().to_numpy().all()


@pytest.fixture
def trained(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPER_RUNS", str(tmp_path))
    return runs.train_seeds(SMALL, [0, 1], small_data(), SmallNet, progress=False)


def test_lines_from_points_start_at_the_snapshot_and_have_their_minimum_at_one(trained):
    table = parabola.from_points(trained, small_data(), [20], SmallNet, n_batches=2, batch_size=16, point="p")
    assert table.groupby(parabola.LINE).ngroups == 2 * 2 * 3
    run, net = trained[1], runs.network(trained[1], small_data(), SmallNet)
    x, y = small_data().batches([21], 16, run.config.stream)
    one = table.query("seed == 1 and batch == 21")
    gradient = derivatives.gradients(net, run.at(20), x, y)[0]
    for line in ("gradient", "close"):
        part = one[one.line == line]
        expected = probe.line(net, run.at(20), -gradient, part.position * part.best, x, y)[:, 0]
        np.testing.assert_allclose(part.loss, expected, atol=1e-6)
    assert one.slope.iloc[0] == pytest.approx(gradient @ gradient)
    along = one.query("line == 'gradient'")
    assert along.position.iloc[along.loss.argmin()] == pytest.approx(1, abs=0.4)


def test_random_lines_are_as_long_as_the_gradient_and_repeatable(trained):
    again = [parabola.from_points(trained[:1], small_data(), [20], SmallNet) for _ in range(2)]
    pd.testing.assert_frame_equal(*again)
    random, gradient = (again[0].query("line == @line") for line in ("random", "gradient"))
    assert random.loss.iloc[0] == pytest.approx(gradient.loss.iloc[0], abs=1e-6)
    assert np.ptp(random.loss) < np.ptp(gradient.loss)


def test_chords_join_the_two_snapshots(trained):
    pairs = list(zip(trained, trained, strict=True))
    table = parabola.on_chords(pairs, small_data(), [(5, 30)], SmallNet, line="near")
    run, net = trained[0], runs.network(trained[0], small_data(), SmallNet)
    ends = probe.losses(net, np.stack([run.at(5), run.at(30)]), *small_data().batches([5], 8, 0))[:, 0]
    np.testing.assert_allclose(table.query("seed == 0").loss.iloc[[0, -1]], ends, atol=1e-6)
    assert set(parabola.fits(table).columns) == {*parabola.LINE, "r2", "worst"}


def test_bad_input_is_named(trained):
    with pytest.raises(ValueError, match="at least|at most|name"):
        parabola.from_points(trained, small_data(), [], SmallNet)
    with pytest.raises(ValueError, match="ends must differ"):
        parabola.on_chords([(trained[0], trained[0])], small_data(), [(5, 5)], SmallNet)
    with pytest.raises(ValueError, match="batch size 1000"):
        parabola.from_points(trained, small_data(), [5], SmallNet, batch_size=1000)


def test_spread_chooses_recorded_steps_from_the_first(trained):
    steps = parabola.spread(trained[0], 5)
    assert steps[0] == 0 and steps == sorted(set(steps)) and len(steps) == 5 and steps[-1] == 39


def test_variants_change_one_thing_and_fit_the_family():
    small = presets.study("smoke").run
    found = parabola.variants(small, 20)
    assert list(found) == ["as it is", "group norm", "no norm", "ResNet-14"]
    assert found["ResNet-14"] == found["as it is"].replace(model="resnet14") and found["as it is"].steps == 20
    imagenet = parabola.variants(presets.study("imagenet").run, 20)
    assert list(imagenet) == ["as it is", "group norm", "no norm"]  # no deeper one
