"""Runs: found by what they are, trained if they do not exist, and read."""

from paper_lib.runs.obtain import load_dataset, network, obtain, run_folder, run_key, train_all, train_seeds

__all__ = ["load_dataset", "network", "obtain", "run_folder", "run_key", "train_all", "train_seeds"]
