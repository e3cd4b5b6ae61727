"""The command line, `paper-lib` or `python -m paper_lib`: train, plan, verify, jpegs, cooldown."""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from paper_lib import __version__
from paper_lib.averaging.schedules import COOLDOWNS
from paper_lib.config import RunConfig, Study, meanings
from paper_lib.errors import ConfigError, check_names, require
from paper_lib.files import folder
from paper_lib.presets import DIGITS, PRESETS, RUN_SETTINGS, STUDY_SETTINGS, study

# Commands import what they need themselves: torch takes seconds, --help should not.


def train(preset: str, **settings: str) -> None:
    """Train the runs that a preset's notebooks share; torchrun's processes train each together."""
    chosen = study(preset, settings)
    from paper_lib import data, runs
    from paper_lib.runs import budget, parallel
    from paper_lib.training import distributed

    failures = data.DataError, runs.DivergedError, runs.SnapshotError, parallel.WorkerError
    try:
        with distributed.processes():
            for name, config in budget.shared_runs(chosen).items():
                for run in runs.train(chosen, config):
                    if distributed.first():
                        print(f"{name:8s} seed {run.config.seed}: {_end(run)}", flush=True)
    except failures as error:
        raise ConfigError(str(error)) from error


def _end(run: Any) -> str:
    """How a run ended, and where it is."""
    steps = f"{run.config.steps} steps"
    end = f"diverged at step {run.status['diverged_at']}" if run.diverged else steps
    return f"{end}, batch loss {run.loss[-100:].mean():.3f}, {run.folder}"


def plan(preset: str, rate: float | None, **settings: str) -> None:
    """Print what the runs that a preset's notebooks share will take."""
    chosen = study(preset, settings)
    require(rate is None or rate > 0, "images-per-second", rate, "it must be > 0")
    from paper_lib.runs import budget

    table = budget.table(chosen, rate)
    print(f"{chosen.label}: {table.weights[0]:,} weights; a notebook may train more")
    shown = table.drop(columns="weights")
    print(shown.to_string(index=False, float_format=lambda value: f"{value:,.2f}"))
    columns = [name for name in ("million images", "GB on disk", "hours") if name in table]
    print("together: " + ", ".join(f"{table[name].sum():,.2f} {name}" for name in columns))


def verify(runs: Path | None) -> int:
    """Check every file of all runs; the exit code is 1 where one is damaged. Changes nothing."""
    top = (runs or folder("runs")).absolute()
    require(top.is_dir(), "folder", str(top), "it must be one of runs")
    from paper_lib.runs import checksums

    of_run = re.compile("-[0-9a-f]{12}$").search
    found = [top] if of_run(top.name) else sorted(p for p in top.iterdir() if of_run(p.name))
    damaged = size = 0
    for path in tqdm(found, desc="checking", unit="run"):
        try:
            size += sum(one.size for one in checksums.verified(path).values())
        except OSError as error:
            damaged += 1
            tqdm.write(str(error))
    print(f"{len(found) - damaged} of {len(found)} runs are what was written: {size / 1e9:.2f} GB")
    if damaged:
        print(f"{damaged} damaged: each is set aside and trained again by whatever needs it next")
    return int(damaged > 0)


def jpegs(dataset: str, target: Path) -> None:
    """Write CIFAR as a tree of JPEG files."""
    from paper_lib.data import cifar

    cifar.write_jpegs(dataset, folder("data"), target)


def cooldown(checkpoints: list[str], schedule: str, output: str) -> None:
    """Average your own checkpoints as a learning-rate cooldown would."""
    from paper_lib.averaging.cooldown import emulate_files

    emulate_files(checkpoints, schedule, output)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as all errors of settings."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """One option for every setting; pydantic turns the text into values."""
    parser.add_argument("--preset", default="digits", help="one of: " + ", ".join(PRESETS))
    of_run, of_study = (RunConfig, RUN_SETTINGS, DIGITS.run), (Study, STUDY_SETTINGS, DIGITS)
    for cls, names, base in (of_run, of_study):
        title = f"settings of the {'run' if cls is RunConfig else 'study'}"
        group = parser.add_argument_group(title, "with the values of the preset digits")
        for name in names:
            flag, meaning = "--" + name.replace("_", "-"), meanings(cls)[name]
            about = f"{meaning} [{getattr(base, name)}]"
            group.add_argument(flag, default=argparse.SUPPRESS, metavar="X", help=about)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="paper-lib", description=__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"paper-lib {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)

    def command(carry_out: Callable) -> argparse.ArgumentParser:
        style = partial(argparse.HelpFormatter, width=100, max_help_position=24)
        name, about = carry_out.__name__, carry_out.__doc__
        added = commands.add_parser(
            name, help=about, description=about, allow_abbrev=False, formatter_class=style
        )
        added.set_defaults(carry_out=carry_out)
        return added

    _add_settings(command(train))
    planner, checker = command(plan), command(verify)
    writer, cooler = command(jpegs), command(cooldown)
    _add_settings(planner)
    about = "of all devices, as train shows it"
    planner.add_argument("--images-per-second", dest="rate", type=float, help=about)
    about = "where the runs are, by default where they are kept"
    checker.add_argument("runs", type=Path, nargs="?", metavar="folder", help=about)
    writer.add_argument("dataset", help="cifar10 or cifar100")
    writer.add_argument("target", type=Path, metavar="folder")
    about = "files, or a folder: .pt, .pth, .safetensors, named by step"
    cooler.add_argument("checkpoints", nargs="+", help=about)
    cooler.add_argument("--schedule", default="linear", help="one of: " + ", ".join(COOLDOWNS))
    cooler.add_argument("--output", required=True, help="the averaged checkpoint")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code (2 for settings that cannot work)."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # show any name, and notice a closed pipe at once
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    words = sys.argv[1:] if argv is None else argv
    words = [re.sub(r"^--\w+", lambda flag: flag[0].replace("_", "-"), word) for word in words]
    try:
        known, unknown = _parser().parse_known_args(words)
        flags = [word[2:].replace("-", "_") for word in unknown if word.startswith("--")]
        if "preset" in known:
            check_names(flags, [*RUN_SETTINGS, *STUDY_SETTINGS], "setting")
        require(not unknown, "command", " ".join(words), f"unexpected words {' '.join(unknown)}")
        return known.carry_out(**{n: v for n, v in vars(known).items() if n != "carry_out"}) or 0
    except BrokenPipeError:  # the reader, such as head, has enough; Python writes again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ConfigError, OSError, MemoryError) as error:
        print("error:", *(str(error) or "out of memory").splitlines(), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where this one stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
