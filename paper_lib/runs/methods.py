"""Ways to train that no RunConfig describes: trained side by side, kept among the runs, found
again.

What a method ends with is <run>-<method>.npz, arrays without pickle. The key of <run> is that of
its config (`identity`) with the method's settings and source.
"""

from __future__ import annotations

import functools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from paper_lib import files
from paper_lib.config import RunConfig, Study
from paper_lib.data import Dataset
from paper_lib.runs import parallel
from paper_lib.runs.obtain import carried, load_dataset, run_folder
from paper_lib.training.flat import FlatModel, NetFactory, exact_float32, forked_rng, threads
from paper_lib.training.loop import Report, initial_model

Arrays = dict[str, np.ndarray]


class Method(Protocol):
    """A way to train: a frozen dataclass whose fields are all the settings that decide it."""

    source: str  # hash of the code that decides it, besides data/ and training/

    def train(self, config: RunConfig, dataset: Dataset, net: FlatModel) -> Arrays:
        """Train from the network's weights; return what is kept."""

    def result(self, seed: int, kept: Arrays) -> Any:
        """What callers get of it."""


def train_methods(
    study: Study, config: RunConfig, methods: Mapping[str, Method]
) -> dict[str, list[Any]]:
    """What each method ends with, one per seed of the study, on its data and network.

    Loaded where it exists, else trained. Raises what the methods raise.
    """
    jobs = [(m, config.replace(seed=seed)) for m in methods.values() for seed in study.seeds]
    paths = {job: path(*job, study.dataset, study.net) for job in jobs}
    kept = {job: _read(place) for job, place in paths.items()}
    missing = [job for job in paths if kept[job] is None]
    if missing:
        configs = [c for _, c in missing]
        train = functools.partial(_train, *carried(study.dataset, configs), study.net)
        placed = [(*job, paths[job]) for job in missing]
        with tqdm(total=sum(c.steps for c in configs), desc="other methods", unit="step") as bar:
            slots = parallel.slots(configs, study.net)
            parallel.side_by_side(train, placed, slots, lambda steps, loss, lr: bar.update(steps))
    kept |= {job: _read(paths[job]) for job in missing}
    found = iter([method.result(c.seed, kept[method, c]) for method, c in jobs])
    return {name: [next(found) for _ in study.seeds] for name in methods}


def path(
    method: Method, config: RunConfig, dataset: Dataset | None, net: NetFactory | None
) -> Path:
    """The file of what a method ends with, whether it exists or not."""
    name = type(method).__name__.lower()
    folder = run_folder(config, dataset, net, method=name, settings=vars(method))
    return folder.with_name(f"{folder.name}-{name}.npz")


def _train(
    dataset: Dataset | None,
    device: str,
    net: NetFactory | None,
    job: tuple[Method, RunConfig, Path],
    report: Report,
) -> None:
    """Train by one method, unless another process just did, and keep what it ends with."""
    method, config, place = job
    dataset = load_dataset(config) if dataset is None else dataset.to(device)
    with files.lock(place):
        if _read(place) is not None:
            return
        model = initial_model(config, dataset, net)
        with threads(1), forked_rng(dataset.device), exact_float32(dataset.device):
            kept = method.train(config, dataset, model)
        with files.replacing(place) as temporary:
            np.savez(temporary, **kept)
    report(config.steps, float("nan"), config.lr)


def _read(place: Path) -> Arrays | None:
    """The arrays of a file; None where it is absent, cut short or altered: it has checksums."""
    try:
        with np.load(place, allow_pickle=False) as stored:
            return dict(stored)
    # RuntimeError: flags of the format
    except (ValueError, OSError, EOFError, RuntimeError, zipfile.BadZipFile):
        return None
