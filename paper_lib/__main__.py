"""The command line: `python -m paper_lib presets`, `train --preset digits --lr 0.5`, `cooldown` or `bench`."""

from __future__ import annotations

import argparse
import sys
import typing
from collections.abc import Sequence

from paper_lib.config import RunConfig, Study
from paper_lib.presets import PRESETS, RUN_SETTINGS, STUDY_SETTINGS, study
from paper_lib.schedules import COOLDOWNS
from paper_lib.validate import ConfigError, check_names, parse_value


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
    """Train a preset's warm-up, stationary window and decayed run for every seed."""
    chosen = study(preset, **overrides(words))
    from paper_lib import runs  # torch takes seconds to import: not before the settings are known to be good

    for name, config in (("stationary", chosen.stationary()), ("decayed", chosen.decayed())):
        for run in runs.train_seeds(config, chosen.seeds):
            end = f"diverged at step {run.status['diverged_at']}" if run.diverged else f"{run.config.steps} steps"
            print(f"{name:10s} seed {run.config.seed}: {end}, batch loss {run.loss[-100:].mean():.3f}, {run.folder}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code (2 for settings that cannot work)."""
    parser = argparse.ArgumentParser(prog="python -m paper_lib", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("presets", help="print the presets' names, one a line")
    commands.add_parser("bench", help="time training, probing and averaging against plain PyTorch")
    trainer = commands.add_parser(
        "train",
        help="train a preset's runs",
        allow_abbrev=False,
        epilog="Any field of RunConfig or Study may follow as --field value; see paper_lib/config.py.",
    )
    trainer.add_argument("--preset", default="digits", help="one of: " + ", ".join(PRESETS))
    cooler = commands.add_parser("cooldown", help="average your own checkpoints as a learning-rate cooldown would")
    cooler.add_argument("checkpoints", nargs="+", help="files, or a folder: .pt, .pth or .safetensors, named by step")
    cooler.add_argument("--schedule", default="linear", help="one of: " + ", ".join(COOLDOWNS))
    cooler.add_argument("--output", required=True, help="the averaged checkpoint")
    args, rest = parser.parse_known_args(argv)
    if rest and args.command != "train":
        parser.error(f"unknown words for {args.command}: {' '.join(rest)}")
    try:
        if args.command == "presets":
            print("\n".join(PRESETS))
        elif args.command == "bench":
            from paper_lib import bench

            bench.main()
        elif args.command == "cooldown":
            from paper_lib import checkpoints

            checkpoints.cooldown_files(args.checkpoints, args.schedule, args.output)
        else:
            train_command(args.preset, rest)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where this one stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
