"""Measures one constant-learning-rate run and its averages against runs that lower the rate."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from paper_lib.averaging import vectors
from paper_lib.config import Study
from paper_lib.files import replacing
from paper_lib.probing import evaluation
from paper_lib.runs import train

DECAYS = ("linear", "cosine", "step")
LOWERED = ("learning rate halved", *(f"{name} decay" for name in DECAYS))


def measure(study: Study) -> pd.DataFrame:
    """Evaluate averages of the stationary window, the end of a run at lr / 2, and ends of decays.

    Returns one row per method and seed: method, seed, train_loss, train_accuracy, test_loss,
    test_accuracy. BatchNorm statistics are recomputed for every network alike.
    """
    averages = study.averages
    constant = train(study, study.averaged(averages.values()))
    configs = [study.averaged((), lr=study.run.lr / 2)]
    configs += [study.decayed(schedule=name) for name in DECAYS]
    lowered = [train(study, config) for config in configs]
    tables = []
    evaluate = evaluation.evaluators(constant, study.eval_images)
    for i, (seed, evaluator) in enumerate(evaluate.items()):
        n = study.averaged_steps + 1
        rows = [constant[i].average(vectors.named(name, n)) for name in averages.values()]
        rows += [runs[i].state()["weights"] for runs in lowered]
        labels = pd.DataFrame({"method": [*averages, *LOWERED], "seed": seed})
        tables.append(evaluator.table(rows, labels, progress=f"scoreboard, seed {seed}"))
    return pd.concat(tables, ignore_index=True)


def summarize(table: pd.DataFrame) -> pd.DataFrame:
    """Mean and spread over seeds of test accuracy (%) and losses (nats), in the methods' order.

    Columns: method, seeds (their number), and for each of test_accuracy, test_loss and train_loss
    its mean and its sample standard deviation, <name>_spread.
    """
    grouped = table.groupby("method", sort=False)
    columns = {"method": list(grouped.groups), "seeds": grouped.size().to_numpy()}
    for name, scale in {"test_accuracy": 100, "test_loss": 1, "train_loss": 1}.items():
        columns[name] = scale * grouped[name].mean().to_numpy()
        columns[f"{name}_spread"] = scale * grouped[name].std().to_numpy()
    return pd.DataFrame(columns)


def write_markdown(summary: pd.DataFrame, results: Path) -> None:
    """Write the table of `summarize` to <results>/scoreboard.md."""
    digits = {"test_accuracy": 1, "test_loss": 3, "train_loss": 3}
    lines = ["| method | test accuracy (%) | test loss | training loss |", "|---|---|---|---|"]
    for row in summary.to_dict("records"):
        cells = [f"{row[name]:.{n}f} ± {row[f'{name}_spread']:.{n}f}" for name, n in digits.items()]
        lines.append(f"| {row['method']} | " + " | ".join(cells) + " |")
    seeds = summary.seeds.min()
    lines += ["", f"Mean ± sample standard deviation over {seeds} seeds."]
    with replacing(results / "scoreboard.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n")
