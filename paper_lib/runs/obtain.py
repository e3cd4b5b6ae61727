"""The run cache: a run is a pure function of its config; asking for one that exists loads it, others are trained.

A run's folder is <data>-<model>-<key>, where key = the first 12 hex digits of the SHA-256 of the canonical JSON of
every setting (parents nested, so a default added later changes the key), the dataset's fingerprint, the identity of a
user's own model, and the syntax tree of the modules that decide the numbers (comments and docstrings left out).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from paper_lib import config as config_module
from paper_lib import data, files
from paper_lib.config import RunConfig, check_seeds
from paper_lib.data import Dataset
from paper_lib.runs import fingerprint, workers
from paper_lib.runs.recorder import Follower, Recorder
from paper_lib.runs.trajectory import State, Trajectory
from paper_lib.training import parallel, sgd, train
from paper_lib.training.models import FlatModel, ModelFactory
from paper_lib.validate import ConfigError, require

DECISIVE = """averaging/vectors averaging/schedules data/augment data/dataset data/decode data/digits data/imagefolder
data/loading data/streaming data/vision training/batchnorm training/models training/parallel training/sgd
training/train""".split()
FORMAT = 1  # of the files in a run's folder


def train_seeds(
    config: RunConfig,
    seeds: Sequence[int],
    dataset: Dataset | None = None,
    model: ModelFactory | None = None,
    progress: bool = True,
) -> list[Trajectory]:
    """Return the runs of a config for several seeds, training those that do not exist yet, side by side.

    `dataset` and `model` (a function or class without arguments that makes an nn.Module) bring a user's own.
    """
    check_seeds(seeds)
    return train_all([config.replace(seed=seed) for seed in seeds], dataset, model, progress)


def train_all(
    configs: Sequence[RunConfig],
    dataset: Dataset | None = None,
    model: ModelFactory | None = None,
    progress: bool = True,
) -> list[Trajectory]:
    """Return the runs of several configs, in order; parents are trained first, missing runs side by side.

    Side by side means in worker processes, on every GPU there is; processes that torchrun started share each run.
    """
    own = dataset is not None or model is not None

    def absent(some: Sequence[RunConfig]) -> list[RunConfig]:
        return parallel.share([c for c in some if not run_folder(c, dataset, model).exists()])

    for generation in _generations(absent(configs)):
        missing = absent(generation)
        if not missing:
            continue
        with _progress(missing, model is not None, progress and parallel.rank() == 0) as report:
            if own or len(missing) == 1 or parallel.active():
                for c in missing:
                    obtain(c, dataset, model, report)
            else:
                for c in missing:
                    _begin(c)  # a parent that diverged or kept too little: say so here, not in a worker
                workers.train_parallel([(c, run_folder(c)) for c in missing], report)
    found = [Trajectory(run_folder(c, dataset, model)) for c in configs]
    for run in found:
        if parallel.rank() == 0 and run.diverged:
            step = run.status["diverged_at"]
            warnings.warn(f"the run {run.folder.name} (lr = {run.config.lr}) diverged at step {step}", stacklevel=2)
    return found


def obtain(
    config: RunConfig,
    dataset: Dataset | None = None,
    model: ModelFactory | None = None,
    report: train.Report = lambda steps, loss, lr: None,
) -> Trajectory:
    """Load one run, or train it in this process (and its parents first) while other processes wait for it.

    Processes that torchrun started train it together; the first one looks for the run, waits for others, and writes.
    """
    folder, first = run_folder(config, dataset, model), parallel.rank() == 0
    if parallel.share(folder.exists()):
        return Trajectory(folder)
    with files.lock(folder) if first else contextlib.nullcontext():
        if parallel.share(folder.exists()):
            return Trajectory(folder)
        begin = _begin(config, dataset, model)

        def recorder(net: FlatModel) -> Recorder | Follower:
            return Recorder(folder, config, net.weights.numel(), net.buffers.numel()) if first else Follower(folder)

        run = train.train_run(config, dataset or load_dataset(config), recorder, begin, model, report)
        parallel.share(None)  # the others go on when it is there
        return run


def _begin(config: RunConfig, dataset: Dataset | None = None, model: ModelFactory | None = None) -> State | None:
    """The state of the parent that a run starts from, if it has one; read by the process that writes."""
    if config.parent is None:
        return None
    parent = obtain(config.parent, dataset, model)
    return parent.state(config.start) if parallel.rank() == 0 else None


# --- identity ---------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def _load(name: str, held_out: int, image_size: int, root: Path, device: str) -> Dataset:
    return data.load(name, root, held_out=held_out, image_size=image_size or None, device=device)


def load_dataset(config: RunConfig) -> Dataset:
    """Return the dataset that a config names, on the device that trains; loaded once per process.

    Raises ConfigError where its files are missing or bad, or too few to hold so many out.
    """
    root = config_module.folder("data")
    try:
        return _load(config.data, config.held_out, config.image_size, root, str(data.default_device()))
    except data.DataError as error:
        remedy = "name the folder of the data with DATA=... (make) or PAPER_DATA; see README, 'Presets and settings'"
        raise ConfigError(f"{error}; {remedy}") from error
    except ValueError as error:
        raise ConfigError(str(error)) from error


def network(run: Trajectory, dataset: Dataset, model: ModelFactory | None = None) -> FlatModel:
    """Return a network of the run's architecture on the dataset's device, to probe with; its weights are arbitrary."""
    _check_model(dataset, model)
    return sgd.initial_model(run.config, dataset, model)


def _check_model(dataset: Dataset, model: ModelFactory | None) -> None:
    """Raise ConfigError for a network in place of the function that makes it, or none where the data need one."""
    if model is None:
        allowed = "the networks of paper_lib take (channels, height, width): give your own as model="
        require(len(dataset.shape) == 3, "shape of an image", dataset.shape, allowed)
        return
    is_factory = callable(model) and not isinstance(model, nn.Module)
    allowed = "pass the function that makes the network, not the network"
    require(is_factory, "model", type(model).__name__, allowed)


def run_folder(
    config: RunConfig, dataset: Dataset | None = None, model: ModelFactory | None = None, **method: Any
) -> Path:
    """Return the folder of a run, whether it exists or not; for `method` see `run_key`."""
    dataset = dataset or load_dataset(config)
    _check_model(dataset, model)
    name = "own" if model is not None else config.model
    return config_module.folder("runs") / f"{dataset.name}-{name}-{run_key(config, dataset, model, **method)}"


def run_key(config: RunConfig, dataset: Dataset, model: ModelFactory | None = None, **method: Any) -> str:
    """Return the 12 hex digits that identify a run (see the head of this module).

    `method` is what decides besides, as JSON can hold it, where a config is not trained by SGD alone (`methods`).
    """
    identity = {
        "config": config.to_dict(),
        "data": dataset.fingerprint,
        "model": _model_identity(config, dataset, model),
        "code": CODE,
        "format": FORMAT,
        **method,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def _model_identity(config: RunConfig, dataset: Dataset, model: ModelFactory | None) -> str:
    if model is None:
        return config.model
    return fingerprint.of_network(sgd.initial_model(config, dataset, model).module)


CODE = fingerprint.of_modules(DECISIVE)  # of what was imported, not of what an editor has saved since


# --- several runs -----------------------------------------------------------------------------------------------


def _generations(configs: Sequence[RunConfig]) -> list[list[RunConfig]]:
    """Group configs and all their ancestors by depth, without repeats, parents first."""
    depths: dict[RunConfig, int] = {}

    def depth(c: RunConfig) -> int:
        if c not in depths:
            depths[c] = 0 if c.parent is None else depth(c.parent) + 1
        return depths[c]

    for c in configs:
        depth(c)
    return [[c for c in depths if depths[c] == d] for d in range(max(depths.values(), default=-1) + 1)]


@contextlib.contextmanager
def _progress(configs: Sequence[RunConfig], own_model: bool, show: bool) -> Iterator[train.Report]:
    total = sum(c.steps - c.start for c in configs)
    images = configs[0].batch_size
    title = (
        f"training {len(configs)} run{'s' * (len(configs) > 1)} of {'your network' if own_model else configs[0].model}"
    )
    with tqdm(total=total, desc=title, unit="step", disable=not show, mininterval=0.5) as bar:

        def report(steps: int, loss: float, lr: float) -> None:
            bar.update(steps)
            rate = bar.format_dict["rate"]
            speed = f", {rate * images:,.0f} images/s" if rate else ""  # not known at first
            bar.set_postfix_str(f"loss {loss:.3f}, lr {lr:.3g}{speed}", refresh=False)

        yield report
