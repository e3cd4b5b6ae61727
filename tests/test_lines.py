"""Parabolas on lines: exact ones are recognized, others not; lines lie where they should."""

import numpy as np
import pandas as pd
import pytest
from helpers import SMALL, SmallNet, small_data
from hypothesis import given
from hypothesis import strategies as st

from paper_lib import runs as run_cache
from paper_lib.errors import ConfigError
from paper_lib.experiments import lines
from paper_lib.probing import derivatives, probe

# --- losses in closed form ----------------------------------------------------------------------


def table_of(loss, slope, curvature, best):
    """A table of `from_points`: one snapshot whose loss along the gradient is loss(step size)."""
    tables = [
        pd.DataFrame({"position": u, "loss": loss(u * best), "line": line})
        for line, u in (("gradient", lines.EVEN), ("close", lines.CLOSE))
    ]
    name = {"point": "p", "seed": 0, "step": 3, "batch": 3}
    start = {"best": best, "slope": slope, "curvature": curvature}
    return pd.concat(tables, ignore_index=True).assign(**name, **start)


@given(st.floats(0.1, 10), st.floats(0.1, 10))
def test_exact_parabolas_are_recognized_and_one_point_predicts_them(slope, curvature):
    def loss(s):
        return 3 - slope * s + slope * curvature * s**2 / 2

    table = table_of(loss, slope, curvature, 1 / curvature)
    fit = lines.fits(table, upto=4)
    assert len(fit) == 1
    assert fit.r2.item() == pytest.approx(1)
    assert fit.worst.item() == pytest.approx(0, abs=1e-9)
    minimum = lines.predicted_minima(table)
    assert minimum.place.item() == pytest.approx(1)
    assert minimum["drop"].item() == pytest.approx(1)
    np.testing.assert_allclose(lines.secants(table).secant, 1, rtol=1e-6)


def test_r2_and_worst_residual_of_a_cubic():
    table = table_of(lambda s: s**3, 1, 1, 1.0)
    s = lines.EVEN[lines.EVEN <= 2]
    residual = s**3 - np.polyval(np.polyfit(s, s**3, 2), s)
    fit = lines.fits(table)
    assert fit.r2.item() == pytest.approx(1 - residual.var() / (s**3).var())
    assert fit.r2.item() < 0.999
    assert fit.worst.item() == pytest.approx(np.abs(residual).max() / 8)
    assert lines.fits(table, upto=1).r2.item() != fit.r2.item()


def test_secant_curvature_of_a_cubic_falls_linearly_with_distance():
    table = table_of(lambda s: 1 - s + s**2 / 2 - s**3 / 6, slope=1, curvature=1, best=0.5)
    found = lines.secants(table)
    np.testing.assert_allclose(found.secant, 1 - found.position * 0.5 / 3, rtol=1e-6)
    assert found.position.is_monotonic_increasing


def test_no_minimum_is_predicted_from_negative_curvature():
    minimum = lines.predicted_minima(table_of(lambda s: (s - 1) ** 2, 2, -1, 1.0))
    assert minimum[["place", "drop"]].isna().to_numpy().all()


# --- real runs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAPER_RUNS", str(tmp_path_factory.mktemp("runs")))
        return run_cache.train_seeds(SMALL, [0, 1], small_data(), SmallNet, progress=False)


def test_lines_from_points_start_at_the_snapshot_and_have_their_minimum_at_one(runs):
    table = lines.from_points(runs, [20], n_batches=2, batch_size=16, point="p")
    assert table.groupby(lines.LINE).ngroups == 2 * 2 * 3
    run, net = runs[1], runs[1].network()
    x, y = run.batches([21], 16)
    mine = table.query("seed == 1 and batch == 21")
    gradient = derivatives.gradients(net, run.at(20), x, y)[0]
    for line in ("gradient", "close"):
        part = mine[mine.line == line]
        expected = probe.line(net, run.at(20), -gradient, part.position * part.best, x, y)[:, 0]
        np.testing.assert_allclose(part.loss, expected, atol=1e-6)
    assert mine.slope.iloc[0] == pytest.approx(gradient @ gradient)
    along = mine.query("line == 'gradient'")
    assert along.position.iloc[along.loss.argmin()] == pytest.approx(1, abs=0.4)


def test_random_lines_are_as_long_as_the_gradient_and_repeatable(runs):
    again = [lines.from_points(runs[:1], [20]) for _ in range(2)]
    pd.testing.assert_frame_equal(*again)
    random, gradient = (again[0].query("line == @line") for line in ("random", "gradient"))
    assert random.loss.iloc[0] == pytest.approx(gradient.loss.iloc[0], abs=1e-6)
    assert np.ptp(random.loss) < np.ptp(gradient.loss)


def test_chords_join_the_two_snapshots(runs):
    pairs = list(zip(runs, runs, strict=True))
    table = lines.on_chords(pairs, [(5, 30)], "near")
    run, weights = runs[0], np.stack([runs[0].at(5), runs[0].at(30)])
    ends = probe.losses(run.network(), weights, *run.batches([5]))[:, 0]
    np.testing.assert_allclose(table.query("seed == 0").loss.iloc[[0, -1]], ends, atol=1e-6)
    assert set(lines.fits(table).columns) == {*lines.LINE, "r2", "worst"}


def test_bad_input_is_named(runs):
    with pytest.raises(ConfigError, match="name at least one"):
        lines.from_points(runs, [])
    with pytest.raises(ConfigError, match="ends must differ"):
        lines.on_chords([(runs[0], runs[0])], [(5, 5)])
    with pytest.raises(ValueError, match="batch size = 1000"):
        lines.from_points(runs, [5], batch_size=1000)
