"""The accuracy table: one constant-learning-rate run and its averages against runs that lower the learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from paper_lib import runs
from paper_lib.averaging import vectors
from paper_lib.config import Study
from paper_lib.data import Dataset
from paper_lib.files import replacing
from paper_lib.probing import evaluation
from paper_lib.runs import Run

DECAYS = ("linear", "cosine", "step")
LOWERED = ("learning rate halved", *(f"{name} decay" for name in DECAYS))


def measure(study: Study, dataset: Dataset) -> pd.DataFrame:
    """Evaluate averages of the stationary window, the end of a run at lr / 2, and the ends of decayed runs.

    Returns one row per method and seed: method, seed, train_loss, train_accuracy, test_loss, test_accuracy. BatchNorm
    statistics are recomputed for every network alike.
    """
    methods = study.averages
    constant = runs.train_seeds(study.averaged(methods.values()), study.seeds)
    halved = study.averaged((), lr=study.run.lr / 2)
    others = dict(zip(LOWERED, [halved, *(study.decayed(schedule=name) for name in DECAYS)], strict=True))
    ends = {name: runs.train_seeds(config, study.seeds) for name, config in others.items()}
    tables = []
    for i, (seed, evaluator) in enumerate(evaluation.evaluators(constant, study.eval_images).items()):
        rows = [constant[i].average(vectors.named(name, study.averaged_steps + 1)) for name in methods.values()]
        rows += [_end(trained[i]) for trained in ends.values()]
        labels = pd.DataFrame({"method": [*methods, *ends], "seed": seed})
        tables.append(evaluator.table(rows, labels, progress=f"scoreboard, seed {seed}"))
    return pd.concat(tables, ignore_index=True)


def _end(run: Run) -> np.ndarray:
    return run.state()["weights"]


def summarize(table: pd.DataFrame) -> pd.DataFrame:
    """Mean and spread over seeds of test accuracy (%) and losses (nats), in the order of the methods."""
    grouped = table.groupby("method", sort=False)
    columns = {"method": list(grouped.groups), "seeds": grouped.size().to_numpy()}
    scales = {"test_accuracy": 100, "test_loss": 1, "train_loss": 1}
    for name, scale in scales.items():
        columns[name] = scale * grouped[name].mean().to_numpy()
        columns[f"{name}_spread"] = scale * grouped[name].std().to_numpy()
    return pd.DataFrame(columns)


def write_markdown(summary: pd.DataFrame, results: Path) -> None:
    """Write results/<preset>/scoreboard.md, the table that the README shows."""
    lines = ["| method | test accuracy (%) | test loss | training loss |", "|---|---|---|---|"]
    for row in summary.itertuples():
        cells = (
            f"{row.test_accuracy:.1f} ± {row.test_accuracy_spread:.1f}",
            f"{row.test_loss:.3f} ± {row.test_loss_spread:.3f}",
            f"{row.train_loss:.3f} ± {row.train_loss_spread:.3f}",
        )
        lines.append(f"| {row.method} | " + " | ".join(cells) + " |")
    lines.append(f"\nMean ± sample standard deviation over {summary.seeds.min()} seeds.")
    with replacing(results / "scoreboard.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n")


def plot(
    ax: Axes,
    table: pd.DataFrame,
    column: str,
    label: str,
    scale: float = 1.0,
    highlighted: Sequence[str] = LOWERED,
) -> None:
    """One point per seed and a bar for the mean, one line per method; `column` times `scale`.

    The methods that are `highlighted` (by default the runs that lower the learning rate) have another colour.
    """
    palette, methods = sns.color_palette(), list(dict.fromkeys(table.method))
    for i, method in enumerate(methods):
        values = scale * table.loc[table.method == method, column]
        ax.scatter(values, np.full(len(values), i), color=palette[method in highlighted], s=45, alpha=0.8)
        ax.plot([values.mean()] * 2, [i - 0.3, i + 0.3], color="black", linewidth=2)
    ax.set(yticks=range(len(methods)), yticklabels=methods, xlabel=label, ylim=(len(methods) - 0.5, -0.5))


def per_seed(table: pd.DataFrame, column: str, methods: Sequence[str]) -> list[np.ndarray]:
    """Values of one column per method, (n_seeds,) each, in the order of the seeds."""
    wide = table.pivot(index="seed", columns="method", values=column)
    return [wide[method].to_numpy() for method in methods]
