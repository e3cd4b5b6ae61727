"""The run cache: a run is a pure function of its config; one that exists is loaded, others trained.

A run's folder is <data>-<model>-<key> among the runs; `identity` says what the key stands for.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from paper_lib import data, files
from paper_lib.config import RunConfig, Study, check_seeds
from paper_lib.data import Dataset
from paper_lib.errors import ConfigError, require
from paper_lib.runs import budget, checksums, parallel
from paper_lib.runs.finished import parts
from paper_lib.runs.identity import average_vectors, learning_rates, run_key
from paper_lib.runs.store import Recorder, Run
from paper_lib.training import distributed, loop
from paper_lib.training.flat import FlatModel, NetFactory
from paper_lib.training.loop import Report, State


def train(study: Study, config: RunConfig, progress: bool = True) -> list[Run]:
    """The runs of a config for every seed of a study, on its own data and network if any.

    Of a study of finished runs they are stretches of these; ConfigError where that is not in them.
    """
    if study.finished:
        return parts(study, config)
    return train_seeds(config, study.seeds, study.dataset, study.net, progress)


def train_seeds(
    config: RunConfig,
    seeds: Sequence[int],
    dataset: Dataset | None = None,
    net: NetFactory | None = None,
    progress: bool = True,
) -> list[Run]:
    """The runs of a config for several seeds: those that do not exist yet are trained side by side.

    `dataset` and `net` (a function or class without arguments that makes an nn.Module) bring a
    user's own.
    """
    return train_all(
        [config.replace(seed=seed) for seed in check_seeds(seeds)], dataset, net, progress
    )


def train_all(
    configs: Sequence[RunConfig],
    dataset: Dataset | None = None,
    net: NetFactory | None = None,
    progress: bool = True,
) -> list[Run]:
    """The runs of several configs, in order; parents are trained first, missing runs side by side.

    Side by side means in worker processes, on every GPU there is; processes that torchrun started
    share each run.
    """

    @functools.cache  # a key costs building the network and hashing it
    def run(config: RunConfig) -> Run:
        return _run(config, dataset, net)

    def absent(some: Sequence[RunConfig]) -> list[RunConfig]:
        return [c for c in some if not _is_there(run(c))]

    for generation in _generations(absent(configs)):
        missing = absent(generation)
        if not missing:
            continue
        with _progress(missing, net is not None, progress and distributed.first()) as report:
            if len(missing) == 1 or distributed.active():
                for c in missing:
                    obtain(c, dataset, net, report)
            else:
                jobs = [(c, run(c).folder) for c in missing]
                _train_side_by_side(jobs, dataset, net, report)
    found = [run(c) for c in configs]
    for one in found:
        if distributed.first() and one.diverged:
            at = f"(lr = {one.config.lr}) diverged at step {one.status['diverged_at']}"
            warnings.warn(f"the run {one.folder.name} {at}", stacklevel=2)
    return found


def _train_side_by_side(
    jobs: Sequence[tuple[RunConfig, Path]],
    dataset: Dataset | None,
    net: NetFactory | None,
    report: Report,
) -> None:
    """Train runs in worker processes, which load a registered dataset and are sent any other."""
    configs = [config for config, _ in jobs]
    for c in configs:
        _begin(c, dataset, net)  # a parent that kept too little: say so here
    function = functools.partial(_obtain_in_worker, *carried(dataset, configs), net)
    parallel.side_by_side(function, jobs, parallel.slots(configs, net), report)


def carried(dataset: Dataset | None, configs: Sequence[RunConfig]) -> tuple[Dataset | None, str]:
    """What a worker is sent of a dataset, None for one that it can load, and the device to use."""
    if dataset is None or _is_registered(dataset, configs):
        return None, "cpu"
    return dataset.to("cpu"), dataset.device.type


def _obtain_in_worker(
    dataset: Dataset | None,
    device: str,
    net: NetFactory | None,
    job: tuple[RunConfig, Path],
    report: Report,
) -> None:
    """Train a run whose folder is the one that the caller expects."""
    config, folder = job
    dataset = None if dataset is None else dataset.to(device)
    if run_folder(config, dataset, net) != folder:
        raise parallel.WorkerError(
            "the code or data changed since this session began: restart it (or its kernel)"
        )
    obtain(config, dataset, net, report)


def branch_all(parents: Sequence[Run], configs: Sequence[RunConfig]) -> list[Run]:
    """The runs of configs on the dataset and network of other runs, as `train_all` has them."""
    return train_all(configs, parents[0].dataset, parents[0].net)


def obtain(
    config: RunConfig,
    dataset: Dataset | None = None,
    net: NetFactory | None = None,
    report: Report = lambda steps, loss, lr: None,
) -> Run:
    """Load one run, or train it in this process (its parents first) while others wait for it.

    Its files are held against their checksums when a process first asks for it. A run that is
    damaged is moved to <folder>.damaged and trained again.

    Processes that torchrun started train it together; the first one looks for the run, waits for
    others, and writes. Raises MemoryError with what to lower where memory does not suffice.
    """
    run = _run(config, dataset, net)
    if _is_there(run):
        return run
    with files.lock(run.folder) if distributed.first() else contextlib.nullcontext():
        if _is_there(run, set_aside=True):
            return run
        _train(run, config, _begin(config, dataset, net), report)
        distributed.share(None)  # the others go on when it is there
    return run


def _is_there(run: Run, set_aside: bool = False) -> bool:
    """Whether a run is there and undamaged; the first process looks.

    `set_aside`: move a damaged one out of the way, which takes the run's lock.
    """
    there = distributed.first() and os.path.lexists(run.folder)
    try:
        if there:
            checksums.check(run.folder)
    except checksums.DamagedError as error:
        there = False
        if set_aside:
            aside = run.folder.with_name(f"{run.folder.name}.damaged")
            files.remove(aside)  # an earlier one
            os.rename(run.folder, aside)
            files.say(f"{error}: the run is now {aside.name}, and is trained again")
    return distributed.share(there)


def _train(run: Run, config: RunConfig, begin: State | None, report: Report) -> None:
    """Train a run and record it, in the process that writes."""
    if run.net is None:  # before it is built, which may take too much as well
        n_weights, _ = budget.size(Study(preset="any", run=config, dataset=run.dataset))
        budget.require_memory(config, n_weights, run.dataset.device)
    model = loop.initial_model(config, run.dataset, run.net)
    budget.require_memory(config, model.weights.numel(), model.device)
    sizes = model.weights.numel(), model.buffers.numel()
    recorder = distributed.recorder(lambda: Recorder(run.folder, config, *sizes))
    numbers = learning_rates(config), average_vectors(config)
    try:
        end = loop.train_run(config, run.dataset, model, *numbers, recorder, begin, report)
    except torch.OutOfMemoryError as error:
        raise MemoryError(_out_of_memory(config, model)) from error
    recorder.finish(*end)


def _out_of_memory(config: RunConfig, net: FlatModel) -> str:
    vectors = budget.memory_bytes(config, net.weights.numel()) / 1e9
    batch = distributed.part_of_batch(config.batch_size)
    return (
        f"{net.device} ran out of memory training {config.model} of width {config.width} with "
        f"batches of {batch} in {config.precision} (vectors take {vectors:.2f} GB, activations the "
        f"rest): lower `batch_size` or `width`, use precision = "
        '"bfloat16", or let torchrun share each batch'
    )


def _begin(config: RunConfig, dataset: Dataset | None, net: NetFactory | None) -> State | None:
    """The state of the parent that a run starts from, if any; read by the process that writes."""
    if config.parent is None:
        return None
    parent = obtain(config.parent, dataset, net)
    return parent.state(config.start) if distributed.first() else None


# --- where a run is ----------------------------------------------------------------------------


def run_folder(
    config: RunConfig, dataset: Dataset | None = None, net: NetFactory | None = None
) -> Path:
    """The folder of a run, whether it exists or not."""
    return _run(config, dataset, net).folder


def _run(config: RunConfig, dataset: Dataset | None, net: NetFactory | None) -> Run:
    """A run by its settings, whether it exists or not."""
    dataset = dataset or load_dataset(config)
    _check_network(dataset, net)
    name, key = config.model if net is None else "own", run_key(config, dataset, net)
    return Run(files.folder("runs") / f"{dataset.name}-{name}-{key}", dataset, net)


def _check_network(dataset: Dataset, net: NetFactory | None) -> None:
    """ConfigError for a network in place of what makes it, or none where one is needed."""
    if net is None:
        allowed = "the networks of paper_lib take (channels, height, width): give your own as net="
        require(len(dataset.shape) == 3, "shape of an image", dataset.shape, allowed)
        return
    is_factory = callable(net) and not isinstance(net, nn.Module)
    allowed = "pass the function that makes the network, not the network"
    require(is_factory, "net", type(net).__name__, allowed)


def load_dataset(config: RunConfig) -> Dataset:
    """The dataset that a config names, on the device that trains; loaded once per process.

    Raises ConfigError where its files are missing or bad, or too few to hold so many out.
    """
    root, device = files.folder("data"), str(data.default_device())
    try:
        return _load(config.data, config.held_out, config.image_size, root, device)
    except data.DataError as error:
        remedy = "name the folder of the data with DATA=... (make) or PAPER_DATA; see the README"
        raise ConfigError(f"{error}; {remedy}") from error


def _is_registered(dataset: Dataset, configs: Sequence[RunConfig]) -> bool:
    """Whether this is the very dataset that all configs name, so that any process can load it."""
    try:
        return all(load_dataset(c) is dataset for c in configs)
    except ConfigError:  # a name of the user's own
        return False


@functools.lru_cache(maxsize=4)
def _load(name: str, held_out: int, image_size: int, root: Path, device: str) -> Dataset:
    options = {"held_out": held_out, "image_size": image_size or None, "device": device}
    return data.load(name, root, **options)


# --- several runs -------------------------------------------------------------------------------


def _generations(configs: Sequence[RunConfig]) -> list[list[RunConfig]]:
    """Configs and all their ancestors by depth, without repeats, parents first."""
    depths: dict[RunConfig, int] = {}

    def depth(c: RunConfig) -> int:
        if c not in depths:
            depths[c] = 0 if c.parent is None else depth(c.parent) + 1
        return depths[c]

    for c in configs:
        depth(c)
    deepest = max(depths.values(), default=-1)
    return [[c for c in depths if depths[c] == d] for d in range(deepest + 1)]


@contextlib.contextmanager
def _progress(configs: Sequence[RunConfig], own_net: bool, show: bool) -> Iterator[Report]:
    """Yield what shows the progress of runs: steps, loss, learning rate, images per second."""
    total = sum(c.steps - c.start for c in configs)
    images = configs[0].batch_size
    network = "your network" if own_net else configs[0].model
    title = f"training {len(configs)} run{'s' * (len(configs) > 1)} of {network}"
    with tqdm(total=total, desc=title, unit="step", disable=not show, mininterval=0.5) as bar:

        def report(steps: int, loss: float, lr: float) -> None:
            bar.update(steps)
            rate = bar.format_dict["rate"]
            speed = f", {rate * images:,.0f} images/s" if rate else ""  # not known at first
            bar.set_postfix_str(f"loss {loss:.3f}, lr {lr:.3g}{speed}", refresh=False)

        yield report
