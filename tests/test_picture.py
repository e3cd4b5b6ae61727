"""The README's picture comes from the CSVs of three figures, or is not drawn."""

import numpy as np
import pandas as pd

from scripts import picture


def write(results):
    """Small tables with the columns that the picture reads."""
    probe = np.linspace(0, 2, 5)
    step = {"panel": "step", "probe": probe, "own": (probe - 1) ** 2, "held": 1 + probe}
    losses = {"panel": "loss", "family": "EMA", "average_train_loss": probe}
    methods = ["last iterate", "two points, 1 step apart", "two points, 9 steps apart"]
    methods += ["EMA, decay 0.5", "EMA, decay 0.9", "half the learning rate", "linear decay"]
    board = {"panel": "scoreboard", "method": methods, "test_accuracy": np.linspace(0.5, 0.6, 7)}
    tables = [{**step, "trained": 0.5}, {**losses, "schedule_train_loss": probe}, board]
    for name, table in zip(picture.SOURCES, tables, strict=True):
        one = pd.concat([pd.DataFrame(table).assign(seed=seed) for seed in (0, 1)])
        one.to_csv(results / "figures" / f"{name}.csv", index=False)


def test_the_picture_is_drawn_from_three_tables(tmp_path):
    (tmp_path / "figures").mkdir()
    picture.draw(tmp_path)
    assert not list(tmp_path.rglob("picture*"))
    write(tmp_path)
    picture.draw(tmp_path)
    saved = pd.read_csv(tmp_path / "figures" / "picture.csv")
    assert (tmp_path / "figures" / "picture.png").exists() and set(saved.panel) >= {"step", "loss"}
