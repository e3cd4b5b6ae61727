"""Two-point averages: the chord's identity on an exact quadratic, and what is derived from the measurements."""

from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from helpers import SMALL, SmallNet, small_data

from paper_lib import runs
from paper_lib.averaging import vectors
from paper_lib.errors import ConfigError
from paper_lib.experiments import two_points
from paper_lib.probing import evaluation, probe

LAGS = [1, 2, 4, 8]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Two short runs of a small network, its data and evaluators."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAPER_RUNS", str(tmp_path_factory.mktemp("runs")))
        dataset = small_data()
        found = runs.train_seeds(SMALL.branch(20, record="40-60"), [0, 1], dataset, SmallNet)
        return found, dataset, evaluation.evaluators(found, 40)


def test_averages_end_in_the_later_half():
    run = SimpleNamespace(config=SimpleNamespace(start=100, steps=140))
    assert two_points.ends(run).tolist() == [120, 130, 140]


def test_rows_are_the_averages_they_name(measured):
    found, _, evaluate = measured
    table = two_points.measure(found, evaluate, [0, 4])
    assert len(table) == 2 * 3 * 2
    row = table.query("seed == 1 and end == 60 and lag == 4").iloc[0]
    expected = evaluate[1]((found[1].at(60) + found[1].at(56)) / 2)
    assert row[list(expected)].to_dict() == pytest.approx(expected, rel=1e-5)
    stale = two_points.measure(found, evaluate, [0], "stale").query("seed == 0 and end == 60").iloc[0]
    assert stale.train_loss == pytest.approx(evaluate[0](found[0].at(60), np.array(found[0].buffers[-1]))["train_loss"])


def test_statistics_are_named(measured):
    found, _, evaluate = measured
    with pytest.raises(ConfigError, match="stale"):
        two_points.measure(found, evaluate, [1], "stail")


def test_references_reach_back_as_far_as_they_say(measured):
    found, _, evaluate = measured
    table = two_points.references(found, evaluate, {"all": lambda n: vectors.uniform(n, n)}, reach=10)
    expected = evaluate[0](found[0].window(50, 60).mean(0))
    row = table.query("seed == 0 and end == 60").iloc[0]
    assert row.train_loss == pytest.approx(expected["train_loss"], rel=1e-5)


def test_the_ends_of_a_short_chord_predict_its_middle(measured):
    """Over small distances a loss is quadratic: gradients at the ends give what the middle gains."""
    found, _, evaluate = measured
    chords = two_points.chords(found[:1], evaluate, [8]).query("end == 60").iloc[0]
    net, (x, y) = evaluate[0].net, evaluate[0].train
    rows = np.stack([found[0].at(52), (found[0].at(52) + found[0].at(60)) / 2, found[0].at(60)])
    first, middle, last = probe.losses(net, rows.astype(np.float64), x, y).mean(1)
    assert chords.gain == pytest.approx((first + last) / 2 - middle, rel=0.3, abs=2e-6)
    assert chords.squared == pytest.approx(np.sum((rows[2] - rows[0]) ** 2), rel=1e-4)


def test_a_batch_remembers_its_own_step_most_right_after_it(measured):
    found, dataset, _ = measured
    table = two_points.memory(found, dataset, [0, *LAGS], n_batches=8, model=SmallNet)
    assert len(table) == 2 * 5
    assert (table.query("lag == 0").dip > 0).all()


def curve(gain, lags=LAGS):
    """Losses at lags 0 and up of one seed, 1 at lag 0."""
    return pd.DataFrame({"seed": 0, "lag": [0, *lags], "train_loss": [1, *(1 - np.asarray(gain))]})


def test_gains_are_shares_of_the_excess():
    found = two_points.gains(curve([0.1, 0.2, 0.25, 0.3]), best=pd.Series({0: 0.4}))
    assert found.excess.unique() == pytest.approx([0.6])
    assert found.recovered.tolist() == pytest.approx([0, 1 / 6, 1 / 3, 5 / 12, 0.5])


@pytest.mark.parametrize("q", [0.9, 0.99])
def test_one_curvature_spreads_over_few_lags_and_two_over_more(q):
    lags = np.unique(np.geomspace(1, 5000, 60).round())
    one = (1 - q**lags) / 2
    two = (2 - q**lags - (1 - (1 - q) / 50) ** lags) / 4
    spread = [two_points.spread_of_lags(two_points.gains(curve(g, lags), pd.Series({0: 0.5})))[0] for g in (one, two)]
    assert spread[0] == pytest.approx(two_points.ONE_CURVATURE, rel=0.05)
    assert spread[1] > 2 * two_points.ONE_CURVATURE


def test_mixture():
    assert two_points.mixture(np.array([1, 0, -1])).tolist() == [0, 0.5, 1]


def test_plots_draw():
    _, ax = plt.subplots()
    two_points.plot_lags(ax, curve([0.1, 0.2, 0.25, 0.3]), "train_loss", label="two points")
    two_points.plot_levels(ax, {"EMA": 0.5})
    assert [text.get_text() for text in ax.legend().get_texts()] == ["two points", "EMA"]
    plt.close("all")
