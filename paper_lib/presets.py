"""The presets, each a study by name, and `study`, which applies overrides to one."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

from paper_lib.config import RunConfig, Study, cut_record
from paper_lib.validate import check_names, field_names

RESNET18 = Study(
    preset="cifar10",
    label="CIFAR-10, ResNet-18",
    run=RunConfig(
        data="cifar10",
        held_out=5000,
        model="resnet18_cifar",
        width=64,
        batch_size=128,
        lr=0.5,
        steps=14_000,
        record="0-50,250-14000/250",
        precision="bfloat16",
    ),
    window=200,
    horizon=4000,
    decay=4000,
)
RESNET20 = RESNET18.run.replace(model="resnet20", width=16)
RESNET50 = Study(
    preset="imagenet",
    label="ImageNet, ResNet-50",
    run=RunConfig(  # the usual recipe, its lr 0.1 with momentum 0.9 as plain SGD, and constant
        data="imagefolder",
        held_out=10_000,
        image_size=224,
        model="resnet50",
        width=64,
        batch_size=256,
        lr=1.0,
        weight_decay=1e-4,
        steps=150_000,
        record="0-50,2500-150000/2500",
        precision="bfloat16",
    ),
    window=100,
    horizon=5000,
    decay=50_000,
)

PRESETS: dict[str, Study] = {
    "smoke": Study(
        preset="smoke",
        label="digits, smoke test",
        run=RunConfig(width=4, steps=120, record="0-120"),
        window=60,
        decay=40,
        probe_batches=6,
        eval_batches=8,
        eval_images=500,
    ),
    "digits": Study(
        preset="digits",
        label="digits, ResNet-8",
        run=RunConfig(steps=1500, record="0-50,75-1500/25"),
    ),
    "cifar10_small": Study(
        preset="cifar10_small",
        label="CIFAR-10 (JPEG) at 16 pixels, ResNet-8 of width 16",
        run=RunConfig(
            data="imagefolder",
            held_out=5000,
            image_size=16,
            model="resnet8",
            width=16,
            steps=4000,
            record="0-50,75-4000/25",
        ),
        window=400,
        decay=400,
        probe_batches=8,
        eval_batches=64,
        eval_images=2000,
    ),
    "cifar10": RESNET18,
    "cifar10_resnet20": replace(
        RESNET18, preset="cifar10_resnet20", label="CIFAR-10, ResNet-20", run=RESNET20, window=800
    ),
    "cifar10_jpeg": replace(
        RESNET18,
        preset="cifar10_jpeg",
        label="CIFAR-10 (JPEG), ResNet-18",
        run=RESNET18.run.replace(data="imagefolder", image_size=32),
    ),
    "cifar100": replace(
        RESNET18, preset="cifar100", label="CIFAR-100, ResNet-18", run=RESNET18.run.replace(data="cifar100")
    ),
    "images64": replace(  # Tiny ImageNet, or any tree of images, at 64 pixels
        RESNET18,
        preset="images64",
        label="images at 64 pixels, ResNet-18",
        run=RESNET18.run.replace(
            data="imagefolder", image_size=64, batch_size=256, steps=20_000, record="0-50,500-20000/500"
        ),
    ),
    "imagenet": RESNET50,
    "imagenet_resnet34": replace(
        RESNET50,
        preset="imagenet_resnet34",
        label="ImageNet, ResNet-34",
        run=RESNET50.run.replace(model="resnet34"),
    ),
}


RUN_SETTINGS = [
    name for name in field_names(RunConfig) if name not in ("parent", "start", "perturbation", "seed", "batch_seed")
]
STUDY_SETTINGS = [name for name in field_names(Study) if name not in ("preset", "run", "label", "custom")]


def study(preset: str, **overrides: Any) -> Study:
    """Return a preset with overrides, each by its name in `RunConfig` or `Study`.

    Empty `seeds` stand for the preset's own. A changed `steps` cuts the preset's windows to the shorter run, unless
    `record` is given too. Settings other than seeds that differ from the preset's are added to the label, and their
    results go to a folder of their own.
    Raises ConfigError for an unknown preset or setting (with the nearest match), a wrong type or a bad value.
    """
    check_names([preset], list(PRESETS), "preset")
    base = PRESETS[preset]
    if not overrides.get("seeds", True):
        del overrides["seeds"]
    check_names(overrides, [*RUN_SETTINGS, *STUDY_SETTINGS], "setting")
    changes = {name: value for name, value in overrides.items() if name in RUN_SETTINGS}
    if isinstance(changes.get("steps"), int):
        changes.setdefault("record", cut_record(base.run.record, changes["steps"]))
    changed = {name: value for name, value in overrides.items() if name in STUDY_SETTINGS}
    chosen = replace(base, run=base.run.replace(**changes), **changed)
    before, after = ({**vars(s.run), **vars(s)} for s in (base, chosen))
    differing = [f"{name} = {after[name]}" for name in overrides if name != "seeds" and after[name] != before[name]]
    custom = hashlib.sha256(repr(sorted(differing)).encode()).hexdigest()[:6] if differing else ""
    return replace(chosen, label=", ".join([base.label, *differing]), custom=custom)
