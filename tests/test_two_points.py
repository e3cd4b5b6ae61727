"""Two-point averages: the chord's identity on an exact quadratic, and what follows from tables."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from helpers import SMALL, SmallNet, small_data

from paper_lib import runs
from paper_lib.errors import ConfigError
from paper_lib.experiments import two_points
from paper_lib.probing import evaluation, probe


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Two short runs of a small network, and their evaluators."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAPER_RUNS", str(tmp_path_factory.mktemp("runs")))
        config = SMALL.branch(20, record="40-60")
        trained = runs.train_seeds(config, [0, 1], small_data(), SmallNet)
        return trained, evaluation.evaluators(trained, 40)


def test_averages_end_in_the_later_half():
    run = SimpleNamespace(config=SimpleNamespace(start=100, steps=140))
    assert two_points.ends(run) == [120, 130, 140]


def test_rows_are_the_averages_they_name(measured):
    trained, evaluate = measured
    table = two_points.measure(trained, evaluate, [0, 4])
    assert len(table) == 2 * 3 * 2
    row = table.query("seed == 1 and end == 60 and lag == 4").iloc[0]
    expected = evaluate[1]((trained[1].at(60) + trained[1].at(56)) / 2)
    assert row[list(expected)].to_dict() == pytest.approx(expected, rel=1e-5)
    stale = two_points.measure(trained, evaluate, [0], "stale").query("seed == 0 and end == 60")
    as_trained = evaluate[0](trained[0].at(60), np.array(trained[0].buffers[-1]))
    assert stale.iloc[0].train_loss == pytest.approx(as_trained["train_loss"])
    with pytest.raises(ConfigError, match="stale"):
        two_points.measure(trained, evaluate, [1], "stail")


def test_references_reach_back_as_far_as_they_say(measured):
    trained, evaluate = measured
    table = two_points.references(trained, evaluate, decay=0.9, reach=10)
    expected = evaluate[0](trained[0].window(50, 60).mean(0))
    row = table.query("seed == 0 and end == 60 and average == 'uniform'").iloc[0]
    assert row.train_loss == pytest.approx(expected["train_loss"], rel=1e-5)
    assert set(table.average) == {"EMA 0.9", "uniform"}


def test_the_ends_of_a_short_chord_predict_its_middle(measured):
    """Over small distances a loss is quadratic: gradients at the ends give the middle's gain."""
    trained, evaluate = measured
    chord = two_points.chords(trained[:1], evaluate, [8]).query("end == 60").iloc[0]
    first, last = (trained[0].at(step) for step in (52, 60))
    rows = np.stack([first, (first + last) / 2, last]).astype(np.float64)
    at_first, middle, at_last = probe.losses(evaluate[0].net, rows, *evaluate[0].train).mean(1)
    assert chord.gain == pytest.approx((at_first + at_last) / 2 - middle, rel=0.3, abs=2e-6)
    assert chord.squared == pytest.approx(np.sum((last - first) ** 2), rel=1e-4)


def test_a_batch_remembers_its_own_step_most_right_after_it(measured):
    trained, _ = measured
    table = two_points.memory(trained, [0, 1, 2, 4, 8], n_batches=8)
    assert len(table) == 2 * 5
    assert (table.query("lag == 0").dip > 0).all()


@pytest.mark.parametrize("q", [0.9, 0.99])
def test_one_curvature_spreads_over_few_lags_and_two_over_more(q):
    lags = np.unique(np.geomspace(1, 5000, 60).round())
    one = (1 - q**lags) / 2
    two = (2 - q**lags - (1 - (1 - q) / 50) ** lags) / 4
    tables = [pd.DataFrame({"seed": 0, "lag": lags, "gain": gain}) for gain in (one, two)]
    spread = [two_points.spread_of_lags(table)[0] for table in tables]
    assert spread[0] == pytest.approx(two_points.ONE_CURVATURE, rel=0.05)
    assert spread[1] > 2 * two_points.ONE_CURVATURE
