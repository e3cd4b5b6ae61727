"""Runs: found by what they are, trained if they do not exist, and read."""

from paper_lib.runs.finished import Finished, Snapshots, from_checkpoints
from paper_lib.runs.identity import learning_rates, run_key
from paper_lib.runs.obtain import (
    branch_all,
    load_dataset,
    obtain,
    run_folder,
    train,
    train_all,
    train_seeds,
)
from paper_lib.runs.store import DivergedError, Run, SnapshotError

__all__ = [
    "DivergedError",
    "Finished",
    "Run",
    "SnapshotError",
    "Snapshots",
    "branch_all",
    "from_checkpoints",
    "learning_rates",
    "load_dataset",
    "obtain",
    "run_folder",
    "run_key",
    "train",
    "train_all",
    "train_seeds",
]
