"""The accuracy table: averages with weights of sum 1, order kept, and numbers where they belong."""

import numpy as np
import pandas as pd
import pytest
from helpers import SMALL, SmallNet, small_data

from paper_lib import presets
from paper_lib.averaging import vectors
from paper_lib.experiments import scoreboard

METHODS = ["last iterate", "two points", "EMA", "uniform", *scoreboard.LOWERED]


@pytest.fixture
def table():
    """Two seeds; test accuracy 0.70, 0.71, ... by method, plus 0.02 for the second seed."""
    rows = [(name, seed, i) for seed in (0, 1) for i, name in enumerate(METHODS)]
    table = pd.DataFrame(rows, columns=["method", "seed", "train_loss"])
    accuracy = 0.7 + table.train_loss / 100 + table.seed / 50
    return table.assign(test_accuracy=accuracy, test_loss=1 - table.train_loss / 10)


def test_the_summary_keeps_the_order_and_gives_percent(table):
    summary = scoreboard.summarize(table)
    assert list(summary.method) == METHODS
    np.testing.assert_allclose(summary.test_accuracy, 71 + np.arange(8))
    np.testing.assert_allclose(summary.test_accuracy_spread, np.sqrt(2))
    np.testing.assert_allclose(summary.test_loss_spread, 0, atol=1e-12)


def test_markdown_has_one_line_a_method(table, tmp_path):
    scoreboard.write_markdown(scoreboard.summarize(table), tmp_path)
    lines = (tmp_path / "scoreboard.md").read_text().splitlines()
    assert lines[2] == "| last iterate | 71.0 ± 1.4 | 1.000 ± 0.000 | 0.000 ± 0.000 |"
    assert lines[-1].endswith("over 2 seeds.") and len(lines) == 2 + 8 + 2


def test_your_own_network_and_data_are_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPER_RUNS", str(tmp_path))
    sizes = {"batch_size": SMALL.batch_size, "window": 8, "decay": 8, "eval_images": 40}
    study = presets.own(small_data(), SmallNet, lr=0.1, steps=20, seeds=[0, 1], **sizes)
    table = scoreboard.measure(study)
    assert list(table.method[:8]) == [*study.averages, *scoreboard.LOWERED]
    assert table.seed.tolist() == [0] * 8 + [1] * 8
    assert np.isfinite(table.test_loss).all() and table.test_loss.nunique() == 16


@pytest.mark.parametrize("window", [20, 800])
def test_every_average_is_one(window):
    for name in presets.study("digits", window=window).averages.values():
        vectors.check_weights(vectors.named(name, window + 1), window + 1)
