"""Two-point averages: the chord's identity on an exact quadratic, and what follows from tables."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from helpers import SMALL, SmallNet, small_data

from paper_lib import presets, runs
from paper_lib.averaging import vectors
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
    run = SimpleNamespace(config=SimpleNamespace(start=100, steps=140, record="100-140"))
    assert two_points.ends(run, 3) == [120, 130, 140]
    run.config.record = ""
    assert two_points.ends(run) == [140]


def test_rows_are_the_averages_they_name(measured):
    trained, evaluate = measured
    names = {"last": "uniform 1", "pair": "two points 4", "SWA": "uniform 10"}
    table = two_points.measure(trained, evaluate, names).set_index(["seed", "method", "end"])
    assert len(table) == 2 * 3 * len(two_points.ends(trained[0]))
    pair = (trained[1].at(55) + trained[1].at(51)) / 2
    swa = trained[1].window(51, 60).mean(0)
    for key, weights in ((1, "pair", 55), pair), ((1, "SWA", 60), swa):
        expected = evaluate[1](weights)
        assert table.loc[key, list(expected)].to_dict() == pytest.approx(expected, rel=1e-4)
    stale = two_points.measure(trained[:1], evaluate, {"last": "uniform 1"}, stale=True)
    as_trained = evaluate[0](trained[0].at(60), np.array(trained[0].buffers[-1]))
    assert stale.train_loss.iloc[-1] == pytest.approx(as_trained["train_loss"])


def test_the_ends_of_a_short_chord_predict_its_middle(measured):
    """Over small distances a loss is quadratic: gradients at the ends give the middle's gain."""
    trained, evaluate = measured
    chord = two_points.chords(trained[:1], evaluate, [4, 8], 2).query("end == 60 and lag == 8")
    first, last = (trained[0].at(step) for step in (52, 60))
    rows = np.stack([first, (first + last) / 2, last]).astype(np.float64)
    at_first, middle, at_last = probe.losses(evaluate[0].net, rows, *evaluate[0].train).mean(1)
    assert chord.gain.item() == pytest.approx((at_first + at_last) / 2 - middle, abs=2e-6)
    assert chord.predicted.item() == pytest.approx(chord.gain.item(), rel=0.3, abs=2e-6)
    assert chord.squared.item() == pytest.approx(np.sum((last - first) ** 2), rel=1e-4)


def test_the_steepest_direction_is_one_number_a_lag(measured):
    trained, _ = measured
    table = two_points.steepest(trained, [1, 2, 10], n_batches=2)
    assert len(table) == 2 * 3 and (table.gain > 0).all()


@pytest.mark.parametrize("q", [0.2, 0.9, 0.99])
def test_one_curvature_is_fitted_exactly_and_two_are_not(q):
    lags = np.array([1, 2, 5, 10, 20, 50, 100, 200, 400])
    level, rate = two_points.one_rate(lags, 0.03 * (1 - q**lags))
    assert (level, np.exp(-rate)) == pytest.approx((0.03, q), rel=1e-3)
    one, slow = (1 - q**lags) / 2, (1 - 0.995**lags) / 2
    for gain, low, high in (one, 0.999, 1.001), ((one + slow) / 2, 1.03, 3):
        table = pd.DataFrame({"seed": 4, "lag": lags, "gain": gain})
        assert low < two_points.beyond_one_rate(table)[4] < high
    with pytest.raises(ConfigError, match="two or more"):
        two_points.one_rate(lags[:1], lags[:1])


@pytest.mark.parametrize("window", [20, 800])
def test_every_average_of_a_study_is_one(window):
    for name in presets.study("digits", window=window).averages.values():
        vectors.check_weights(vectors.named(name, window + 1), window + 1)
