"""Datasets whose batches are pure functions of (seed, step): by name, or from a user's own tensors."""

from paper_lib.data.loading import LOADERS, SPLITS, DataError, Dataset, default_device, from_tensors, load

__all__ = ["LOADERS", "SPLITS", "DataError", "Dataset", "default_device", "from_tensors", "load"]
