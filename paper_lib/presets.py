"""The presets, each a study by name; `study` changes settings, `own` takes your data and net."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from paper_lib.config import RunConfig, Study, as_items, describe
from paper_lib.errors import check_names, require

NOT_SET = (
    "parent start perturbation seed batch_seed preset run label custom dataset net finished".split()
)
RUN_SETTINGS = [f.name for f in dataclasses.fields(RunConfig) if f.name not in NOT_SET]
STUDY_SETTINGS = [f.name for f in dataclasses.fields(Study) if f.name not in NOT_SET]


def _changed(base: Study, settings: Mapping[str, Any], **others: Any) -> Study:
    """`base` with settings of its run and its own by name; empty `seeds` stand for its seeds."""
    run = {name: value for name, value in settings.items() if name in RUN_SETTINGS}
    others |= {name: value for name, value in settings.items() if name in STUDY_SETTINGS}
    seeds = as_items(others.get("seeds"))
    if seeds is None or (isinstance(seeds, list | tuple) and not seeds):
        others.pop("seeds", None)
    return dataclasses.replace(base, run=base.run.replace(**run), **others)


DIGITS_RUN = RunConfig(steps=1500, record="0-50,75-1500/25")
DIGITS = Study(preset="digits", label="digits, ResNet-8", run=DIGITS_RUN)
# Seeds 0 to 2 are what criteria were developed on; the digits are judged on others.
PRESETS = {"digits": dataclasses.replace(DIGITS, seeds=(10, 11, 12, 13, 14))}


def _add(base: Study, preset: str, label: str, **settings: Any) -> Study:
    """Add a preset that differs from `base` in these settings, and return it."""
    PRESETS[preset] = _changed(base, settings, preset=preset, label=label)
    return PRESETS[preset]


SMALL_PROBES = {"probe_batches": 6, "eval_batches": 8, "eval_images": 500}
SMALL = {"width": 4, "steps": 120, "record": "0-120", "window": 60, "decay": 40}
_add(DIGITS, "smoke", "digits, smoke test", **SMALL, **SMALL_PROBES)
_add(
    DIGITS,
    "cifar10_small",
    "CIFAR-10 (JPEG) at 16 pixels, ResNet-8 of width 16",
    data="imagefolder",
    held_out=5000,
    image_size=16,
    width=16,
    steps=4000,
    record="0-50,75-4000/25",
    window=400,
    decay=400,
    probe_batches=8,
    eval_batches=64,
    eval_images=2000,
)
CIFAR10 = _add(
    DIGITS,
    "cifar10",
    "CIFAR-10, ResNet-18",
    data="cifar10",
    held_out=5000,
    model="resnet18_cifar",
    width=64,
    batch_size=128,
    lr=0.5,
    steps=14_000,
    record="0-50,250-14000/250",
    precision="bfloat16",
    window=200,
    horizon=4000,
    decay=4000,
)
_add(CIFAR10, "cifar100", "CIFAR-100, ResNet-18", data="cifar100")
_add(  # the usual recipe, its lr 0.1 with momentum 0.9 as plain SGD, and constant
    CIFAR10,
    "imagenet",
    "ImageNet, ResNet-50",
    data="imagefolder",
    held_out=10_000,
    image_size=224,
    model="resnet50",
    batch_size=256,
    lr=1.0,
    weight_decay=1e-4,
    steps=150_000,
    record="0-50,2500-150000/2500",
    window=100,
    horizon=5000,
    decay=50_000,
)


def study(preset: str, settings: Mapping[str, Any] | str = "{}", **overrides: Any) -> Study:
    """Return a preset with settings changed, each by its name in `RunConfig` or `Study`.

    A path to a Python file, my_run.py, stands for the `study` that it makes: its own preset.

    `settings` may also be JSON, as papermill's -p passes it. Empty `seeds` stand for the preset's
    own. A changed `steps` cuts the preset's windows to the shorter run, unless `record` is given
    too. Settings other than seeds that differ from the preset's are added to the label, and their
    results go to a folder of their own.
    Raises ConfigError for an unknown preset or setting (with the nearest match) or a bad value.
    """
    is_file = str(preset).endswith(".py")
    if not is_file:
        check_names([preset], PRESETS, "preset")
    base = from_file(preset) if is_file else PRESETS[preset]
    given = {**_by_name(settings), **overrides}
    check_names(given, [*RUN_SETTINGS, *STUDY_SETTINGS], "setting")
    changes = dict(given)
    if "steps" in given:
        kept = base.run.snapshot_steps
        kept = kept[kept <= RunConfig(steps=given["steps"]).steps]
        changes.setdefault("record", describe(kept))
    chosen = _changed(base, changes)
    before, after = ({**vars(s.run), **vars(s)} for s in (base, chosen))
    names = [name for name in given if name != "seeds" and after[name] != before[name]]
    differing = [f"{name} = {after[name]}" for name in names]
    custom = _digits(sorted(differing)) if differing else ""
    return dataclasses.replace(chosen, label=", ".join([base.label, *differing]), custom=custom)


def from_file(path: str) -> Study:
    """The study that a Python file makes, under the file's name.

    There `study` is the study, or a function that makes it. ConfigError where it is neither.
    """
    file = Path(path).resolve()
    require(file.is_file(), "preset", path, "there is no such file")
    if str(file.parent) not in sys.path:  # where workers find the file's classes, too
        sys.path.insert(0, str(file.parent))
    module = importlib.import_module(file.stem)
    same = Path(module.__file__ or "").resolve() == file
    require(same, "preset", path, f"another module is called {file.stem}: rename the file")
    made: Any = getattr(module, "study", None)
    made = made() if callable(made) else made
    allowed = "it must make one by presets.own(...) or presets.finished(...)"
    require(isinstance(made, Study), "study", f"{type(made).__name__} in {path}", allowed)
    return dataclasses.replace(made, preset=file.stem, custom="")


def own(dataset: Any, net: Any = None, *, lr: float, steps: int, **settings: Any) -> Study:
    """Return a study of your own dataset (see `paper_lib.data`) and network, for any notebook.

    `net` is a class or function without arguments that makes an nn.Module; without it the settings
    `model`, `width`, `norm` and `activation` choose a ResNet. A warm-up of `steps` at the constant
    learning rate `lr` should reach the stationary state. What is not given follows from `steps` and
    the dataset: `window` and `decay` are half of `steps`, within 60 to 400.
    Raises ConfigError for a network instead of the function that makes it, or a bad setting.
    """
    usable = all(hasattr(dataset, name) for name in ("batch", "sizes", "name"))
    require(usable, "dataset", type(dataset).__name__, "make one by data.from_tensors or data.load")
    fixed = ["data", "held_out"]
    fixed += [] if net is None else ["model", "norm", "width", "activation"]
    allowed = [name for name in [*RUN_SETTINGS, *STUDY_SETTINGS] if name not in fixed]
    check_names(settings, allowed, "setting of a study of your own")
    steps, images = RunConfig(steps=steps).steps, dataset.sizes["train"]
    window = min(400, max(60, steps // 2))
    defaults = {
        "data": dataset.name,
        "held_out": dataset.sizes["held"],
        "image_size": dataset.shape[-1] if dataset.name == "imagefolder" else 0,
        "model": DIGITS.run.model if net is None else "own",
        "batch_size": min(64, max(1, images // 8)),
        "record": _spread(steps),
        "window": window,
        "decay": window,
        **_probe_sizes(window, images),
    }
    given = {**defaults, "lr": lr, "steps": steps, **settings}
    base = Study(preset="own", run=RunConfig(), label="your network", dataset=dataset, net=net)
    found = _changed(base, given)
    measured = [getattr(found, name) for name in STUDY_SETTINGS if name != "seeds"]
    return dataclasses.replace(found, custom=_digits([found.run.to_dict(), measured]))


def finished(runs: Sequence[Any], label: str, **settings: Any) -> Study:
    """Return a study of runs that were trained elsewhere (`runs.from_checkpoints`), to look at.

    Its window is the longest stretch of consecutive iterates that all of them recorded; what comes
    after it counts as the decay to a fully trained network. Settings are those of `Study`.
    Raises ConfigError for runs of one seed, of several networks' data, or without such a stretch.
    """
    allowed = [name for name in STUDY_SETTINGS if name not in ("seeds", "window", "decay")]
    check_names(settings, allowed, "setting of a study of finished runs")
    base, dataset = runs[0].config, runs[0].dataset
    kept = functools.reduce(np.intersect1d, [run.steps for run in runs])
    breaks = np.flatnonzero(np.diff(kept[kept > 0]) != 1) + 1
    stretch = max(np.split(kept[kept > 0], breaks), key=len)
    advice = "record consecutive iterates, as in Snapshots(folder, '0-50,100-1000/50,1000-1100')"
    require(len(stretch) > 8, "longest stretch of iterates", len(stretch), advice)
    start, last, lrs = int(stretch[0]), int(stretch[-1]), runs[0].lr
    run = base.replace(
        steps=start,
        lr=float(lrs[start]),
        schedule=tuple((lrs[:start] / lrs[start]).tolist()),
        record=describe(kept[kept <= start]),
    )
    window = last - start
    return Study(
        preset="finished",
        run=run,
        window=window,
        decay=base.steps - start,
        seeds=tuple(one.config.seed for one in runs),
        label=label,
        custom=_digits([one.folder.name for one in runs]),
        dataset=dataset,
        net=runs[0].net,
        finished=tuple(runs),
        **{**_probe_sizes(window, dataset.sizes["train"]), **settings},
    )


def _probe_sizes(window: int, images: int) -> dict[str, int]:
    """Sizes of probes that suit a window of so many steps, on so many training images."""
    return {
        "probe_batches": min(16, max(6, window // 25)),
        "eval_batches": min(128, max(8, images // 64)),
        "eval_images": min(2500, images),
    }


def _by_name(settings: Any) -> dict[str, Any]:
    with suppress(ValueError, RecursionError):
        settings = json.loads(settings) if isinstance(settings, str) else settings
    require(isinstance(settings, Mapping), "overrides", settings, 'write them as {"lr": 0.5}')
    return dict(settings)


def _spread(steps: int) -> str:
    """As `record`: the first 50 steps, and about 60 more up to the end."""
    sparse = range(0, steps, max(1, steps // 60))
    return describe(np.unique([*range(min(51, steps)), *sparse, steps]))


def _digits(value: Any) -> str:
    """Six digits that stand for a value, by what Python writes for it."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:6]
