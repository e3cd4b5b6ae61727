"""The command line: `python -m paper_lib` presets, plan, train, jpegs, cooldown or bench."""

from __future__ import annotations

import argparse
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from paper_lib.averaging.schedules import COOLDOWNS
from paper_lib.config import RunConfig, Study, folder
from paper_lib.presets import PRESETS, RUN_SETTINGS, STUDY_SETTINGS, study
from paper_lib.validate import ConfigError, check_names, parse_value, require

if TYPE_CHECKING:
    from paper_lib.runs import Run


def overrides(words: Sequence[str]) -> dict[str, typing.Any]:
    """Turn `--field value` pairs into keyword overrides of the right types."""
    hints = {**typing.get_type_hints(RunConfig), **typing.get_type_hints(Study)}
    if len(words) % 2:
        raise ConfigError(f"expected pairs of --setting value, got {' '.join(words)!r}")
    found = {}
    for flag, text in zip(words[::2], words[1::2], strict=True):
        if not flag.startswith("--"):
            raise ConfigError(f"unexpected word {flag!r}: settings are given as --setting value")
        name = flag[2:].replace("-", "_")
        check_names([name], [*RUN_SETTINGS, *STUDY_SETTINGS], "setting")
        found[name] = parse_value(text, hints[name])
    return found


def train_command(preset: str, words: Sequence[str]) -> None:
    """Train the runs that a preset's notebooks share, for every seed; torchrun's processes train each together."""
    chosen = study(preset, **overrides(words))
    # torch takes seconds to import: not before the settings are known to be good
    from paper_lib import runs
    from paper_lib.data import dataset
    from paper_lib.experiments import scoreboard
    from paper_lib.runs import costs, workers
    from paper_lib.training import parallel

    averages = scoreboard.averages(chosen.averaged_steps).values()
    try:
        with parallel.processes():
            for name, config in costs.shared_runs(chosen, averages).items():
                for run in runs.train_seeds(config, chosen.seeds):
                    if parallel.rank() == 0:
                        print(f"{name:8s} seed {run.config.seed}: {_end(run)}, {run.folder}", flush=True)
    except (dataset.DataError, runs.DivergedError, runs.SnapshotError, workers.WorkerError) as error:
        raise ConfigError(str(error)) from error


def plan_command(preset: str, rate: float | None, words: Sequence[str]) -> None:
    """Print what the runs that a preset's notebooks share will take."""
    chosen = study(preset, **overrides(words))
    from paper_lib.experiments import scoreboard
    from paper_lib.runs import costs

    require(rate is None or rate > 0, "images-per-second", rate, "it must be > 0")
    table = costs.table(chosen, scoreboard.averages(chosen.averaged_steps).values(), rate)
    print(f"{chosen.label}: {table.weights[0]:,} weights; a notebook may train more")
    print(table.drop(columns="weights").to_string(index=False, float_format=lambda v: f"{v:,.2f}"))
    sums = [f"{table[name].sum():,.2f} {name}" for name in ("million images", "GB on disk", "hours") if name in table]
    print("together: " + ", ".join(sums))


def _end(run: Run) -> str:
    end = f"diverged at step {run.status['diverged_at']}" if run.diverged else f"{run.config.steps} steps"
    return f"{end}, batch loss {run.loss[-100:].mean():.3f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m paper_lib", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("presets", help="print the presets' names, one a line")
    commands.add_parser("bench", help="time training, probing and averaging against plain PyTorch")
    settings = "Settings of RunConfig and Study may follow, as in --lr 0.5; see paper_lib/config.py."
    trainer = commands.add_parser("train", help="train a preset's runs", allow_abbrev=False, epilog=settings)
    planner = commands.add_parser("plan", help="print what these runs will take", allow_abbrev=False, epilog=settings)
    for command in (trainer, planner):
        command.add_argument("--preset", default="digits", help="one of: " + ", ".join(PRESETS))
    planner.add_argument("--images-per-second", type=float, help="of all devices, as the progress bar of train shows")
    writer = commands.add_parser("jpegs", help="write CIFAR as a tree of JPEG files")
    writer.add_argument("dataset", help="cifar10 or cifar100")
    writer.add_argument("folder", type=Path)
    cooler = commands.add_parser("cooldown", help="average your own checkpoints as a learning-rate cooldown would")
    cooler.add_argument("checkpoints", nargs="+", help="files, or a folder: .pt, .pth or .safetensors, named by step")
    cooler.add_argument("--schedule", default="linear", help="one of: " + ", ".join(COOLDOWNS))
    cooler.add_argument("--output", required=True, help="the averaged checkpoint")
    return parser


def _carry_out(args: argparse.Namespace, words: Sequence[str]) -> None:
    """Run one command; what it needs is imported here, because torch takes seconds."""
    if args.command == "presets":
        print("\n".join(PRESETS))
    elif args.command == "bench":
        from benchmarks import bench

        bench.main()
    elif args.command == "jpegs":
        from paper_lib.data import cifar

        cifar.write_jpegs(args.dataset, folder("data"), args.folder)
    elif args.command == "cooldown":
        from paper_lib.averaging import checkpoints

        checkpoints.cooldown_files(args.checkpoints, args.schedule, args.output)
    elif args.command == "plan":
        plan_command(args.preset, args.images_per_second, words)
    else:
        train_command(args.preset, words)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code (2 for settings that cannot work)."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and args.command not in ("train", "plan"):
        parser.error(f"unknown words for {args.command}: {' '.join(rest)}")
    try:
        _carry_out(args, rest)
    except (ConfigError, OSError, MemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where this one stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
