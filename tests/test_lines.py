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


def table_of(power, star=1.6, line="gradient"):
    """A table of `from_points`: one line with the loss |position - star|^power."""
    position = np.concatenate([lines.STEP, star * lines.BEYOND])
    fit = np.arange(len(position)) < len(lines.STEP)
    table = pd.DataFrame({"position": position, "fit": fit, "star": star, "loss": 0.0})
    return lines.synthetic(table.assign(line=line, seed=0, batch=3), power)


@given(st.floats(1, 5), st.floats(0.3, 3))
def test_the_exponent_is_that_of_the_loss(power, star):
    found = lines.shapes(table_of(power, star))
    assert found.exponent.item() == pytest.approx(power, abs=0.01)


@given(st.floats(0.2, 5), st.floats(-3, 3), st.floats(0.1, 3))
def test_exact_parabolas_are_recognized_and_one_point_predicts_them(scale, shift, star):
    table = table_of(2, star)
    table = table.assign(loss=scale * table.loss + shift, slope=scale * table.slope)
    table["bend"] = scale * table.bend
    shape, point = lines.shapes(table), lines.from_one_point(table)
    assert shape.exponent.item() == pytest.approx(2, abs=1e-3)
    assert shape.r2.item() == pytest.approx(1) and shape.cubic.item() == pytest.approx(0, abs=1e-6)
    assert point[["best", "later"]].to_numpy() == pytest.approx(1)
    if abs(star - 0.5) > 0.05:  # else a whole step gains nothing
        assert point["decrease"].item() == pytest.approx(1, rel=1e-6)


def test_a_v_and_a_quartic_are_told_from_a_parabola_where_r2_cannot():
    v, quartic = (lines.shapes(table_of(power)) for power in (1, 4))
    assert v.r2.item() > 0.99 and quartic.r2.item() > 0.99
    assert v.exponent.item() == pytest.approx(1, abs=0.01)
    assert quartic.exponent.item() == pytest.approx(4, abs=0.01)
    assert np.isnan(v.cubic.item()) and quartic.cubic.item() < -0.2
    local = lines.from_one_point(table_of(4))
    assert local["decrease"].item() < 0.75 and local.best.item() == pytest.approx(1 / 3)
    assert local.later.item() < 0.1


def test_the_cubic_term_is_measured_about_the_middle():
    table = table_of(2)
    u = table.position - 0.5
    found = lines.shapes(table.assign(loss=3 * u**2 - 0.6 * u**3))
    assert found.cubic.item() == pytest.approx(0.5 * -0.6 / 3)


def test_no_minimum_is_predicted_from_negative_curvature():
    found = lines.from_one_point(table_of(2).assign(bend=-1.0))
    assert np.isnan(found.best.item()) and np.isnan(found.later.item())


def test_scaled_lines_are_their_powers_and_those_without_a_minimum_left_out():
    found = lines.scaled(pd.concat([table_of(2), table_of(4, 0.7, "other")]))
    for line, power in (("gradient", 2), ("other", 4)):
        one = found[found.line == line]
        np.testing.assert_allclose(one.height, np.abs(1 - one.u) ** power, atol=0.05)
    falling = table_of(2, line="falling").query("position < 1.6")
    assert set(lines.scaled(pd.concat([table_of(2), falling])).line) == {"gradient"}


# --- real runs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAPER_RUNS", str(tmp_path_factory.mktemp("runs")))
        return run_cache.train_seeds(SMALL, [0, 1], small_data(), SmallNet, progress=False)


def test_lines_from_points_start_at_the_snapshot_with_its_derivatives(runs):
    table = lines.from_points(runs, [20, 30], "along", batch_size=16)
    assert table.groupby(lines.LINE).ngroups == 2 * 2
    run, net, lr = runs[1], runs[1].network(), runs[1].config.lr
    x, y = run.batches([20], 16)
    mine = table.query("seed == 1 and batch == 20")
    gradient = derivatives.gradients(net, run.at(20), x, y)[0]
    expected = probe.line(net, run.at(20), -lr * gradient, mine.position, x, y)[:, 0]
    np.testing.assert_allclose(mine.loss, expected, atol=1e-6)
    assert mine.slope.iloc[0] == pytest.approx(lr * gradient @ gradient)
    start, second = mine.iloc[0], mine.iloc[1]
    bent = start.loss - second.position * start.slope + second.position**2 * start.bend / 2
    assert second.loss == pytest.approx(bent, abs=1e-5)
    assert mine.loss.min() == pytest.approx(mine.loss[mine.position == start.star].min(), abs=1e-3)


def test_chords_join_the_two_snapshots(runs):
    pairs = list(zip(runs, runs, strict=True))
    table = lines.on_chords(pairs, [(5, 30)], "near")
    run, weights = runs[0], np.stack([runs[0].at(5), runs[0].at(30)])
    ends = probe.losses(run.network(), weights, *run.batches([5]))[:, 0]
    between = table.query("seed == 0 and fit")
    np.testing.assert_allclose(between.loss.iloc[[0, -1]], ends, atol=1e-6)
    assert between.position.min() == 0 and between.position.max() == 1
    assert set(lines.shapes(table).columns) == {*lines.LINE, "exponent", "r2", "cubic"}


def test_bad_input_is_named(runs):
    with pytest.raises(ConfigError, match="name at least one"):
        lines.from_points(runs, [], "none")
    with pytest.raises(ConfigError, match="ends must differ"):
        lines.on_chords([(runs[0], runs[0])], [(5, 5)], "none")
    with pytest.raises(ValueError, match="batch size = 1000"):
        lines.from_points(runs, [5], "large", batch_size=1000)
