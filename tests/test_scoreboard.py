"""The accuracy table: averages with weights of sum 1, order kept, and numbers where they belong."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from paper_lib.averaging import vectors
from paper_lib.experiments import scoreboard
from paper_lib.presets import study


@pytest.fixture
def table():
    """Seven methods and two seeds; test accuracy 0.70, 0.71, ... by method, plus 0.02 for the second seed."""
    averages = study("smoke", window=20).averages
    names = [*averages, "learning rate halved", *(f"{name} decay" for name in scoreboard.DECAYS)]
    table = pd.DataFrame([(name, seed, i) for seed in (0, 1) for i, name in enumerate(names)])
    table.columns = ["method", "seed", "train_loss"]
    return table.assign(
        test_accuracy=0.7 + table.train_loss / 100 + table.seed / 50, test_loss=1 - table.train_loss / 10
    )


@pytest.mark.parametrize("n_steps", [20, 800])
def test_every_average_is_one(n_steps):
    for name in study("smoke", window=n_steps).averages.values():
        vectors.check_weights(vectors.named(name, n_steps + 1), n_steps + 1)


def test_the_summary_keeps_the_order_and_gives_percent(table):
    summary = scoreboard.summarize(table)
    assert list(summary.method) == list(table.method[:8])
    np.testing.assert_allclose(summary.test_accuracy, 71 + np.arange(8))
    np.testing.assert_allclose(summary.test_accuracy_spread, np.sqrt(2))
    np.testing.assert_allclose(summary.test_loss_spread, 0, atol=1e-12)


def test_markdown_has_one_line_a_method(table, tmp_path):
    scoreboard.write_markdown(scoreboard.summarize(table), tmp_path)
    lines = (tmp_path / "scoreboard.md").read_text().splitlines()
    assert lines[2] == "| last iterate | 71.0 ± 1.4 | 1.000 ± 0.000 | 0.000 ± 0.000 |"
    assert lines[-1].endswith("over 2 seeds.") and len(lines) == 2 + 8 + 2


def test_values_per_seed_follow_the_seeds(table):
    (last,) = scoreboard.per_seed(table.sample(frac=1, random_state=0), "test_accuracy", ["last iterate"])
    np.testing.assert_allclose(last, [0.7, 0.72])


def test_the_figure_has_a_line_for_each_method(table):
    fig, ax = plt.subplots()
    scoreboard.plot(ax, table, "test_accuracy", "test accuracy (%)", 100)
    assert [label.get_text() for label in ax.get_yticklabels()] == list(table.method[:8])
    colors = [tuple(dots.get_facecolor()[0]) for dots in ax.collections]
    assert len(set(colors[:4])) == len(set(colors[4:])) == 1 and colors[0] != colors[4]
    plt.close(fig)
