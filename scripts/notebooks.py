"""Run notebooks, publish what they make, and say how far it is: what the Makefile calls.

make decides what is out of date, from what scripts/dependencies.py says of each notebook and from
stamps in .build, which nobody commits: a fresh clone runs everything.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import nbformat
import papermill
from nbformat import NotebookNode
from papermill import PapermillExecutionError

from paper_lib.config import Study
from paper_lib.errors import ConfigError, check_names, require
from paper_lib.files import cpus, folder, lock, remove, replacing
from paper_lib.presets import study
from paper_lib.results.palette import shrink
from scripts import ROOT, ResultError, dependencies, end_with_make, environment, git, stamps

SOURCES, BUILD = ROOT / "notebooks", ROOT / ".build"
CHECKED = "NBVAL_CHECK_OUTPUT"  # the comment that makes nbval compare an output with the stored one
LIMITS, MORE_RUNS = "limits", "more-runs"  # tags of cells without which a notebook runs, too
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
METADATA = {"kernelspec": KERNEL, "language_info": {"name": "python"}}


class NotebookError(ValueError):
    """A notebook that does not run to its end, or cannot have its data."""


def sources() -> list[Path]:
    """Return the notebooks in reading order."""
    return dependencies.sources(SOURCES)


class Progress:
    """Where a notebook's stderr goes: to a terminal as it comes, into a log a line a minute."""

    def __init__(self, name: str) -> None:
        self.name, self.next = name, 0.0

    def write(self, text: str) -> None:
        """Take a piece of it."""
        lines = [line.strip() for line in re.split(r"[\r\n]", text) if line.strip()]
        if sys.stderr.isatty():
            sys.stderr.write(text)
        elif lines and time.monotonic() >= self.next:
            print(f"{self.name}: {lines[-1]}", file=sys.stderr, flush=True)
            self.next = time.monotonic() + 60

    def flush(self) -> None:
        """Show what was taken."""
        sys.stderr.flush()


def without(notebook: NotebookNode, tags: Collection[str]) -> NotebookNode:
    """Leave out the cells that have one of `tags`: LIMITS, or MORE_RUNS too, where it stands.

    A notebook runs to its end without its limits and checks, and 01 to 04 also without cells that
    train runs beside the study's own: warm-up, stationary window and decay.
    """
    notebook.cells = [c for c in notebook.cells if not {*tags} & {*c.metadata.get("tags", [])}]
    return notebook


def not_run(chosen: Study) -> tuple[str, ...]:
    """Tags of the cells that a study does not run."""
    if chosen.finished:
        return LIMITS, MORE_RUNS
    return () if chosen.limits else (LIMITS,)


def execute(
    source: Path,
    output: Path,
    parameters: dict[str, Any],
    left_out: Collection[str] = (),
    **options: Any,
) -> NotebookNode:
    """Run a notebook in its own folder, without cells tagged `left_out`; what ran is in `output`.

    Raises NotebookError with the failing cell and its traceback.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(without(nbformat.read(source, as_version=4), left_out), output)
    options |= {"progress_bar": False, "kernel_name": "python3", "cwd": source.parent}
    options |= {"extra_arguments": ["--log-level=ERROR"], "stderr_file": Progress(source.stem)}
    try:
        return papermill.execute_notebook(output, output, parameters, **options)
    except PapermillExecutionError as error:
        raise NotebookError(f"{source.stem} failed, see {output}\n{error}") from error


def run(name: str, preset: str, seeds: Sequence[int], stamp: Path, after: Sequence[Path]) -> bool:
    """Execute a notebook and publish all it made; False if another process just did, after `after`.

    Nothing is taken for finished before it is: the notebook writes into a folder of its own, whose
    files then replace the published ones, and last of all comes the stamp, which says what they
    are. It is dated when the run began, since what changed meanwhile it may not have seen.
    """
    given = {"preset": preset, **({"seeds": list(seeds)} if seeds else {})}
    chosen = study(**given)  # of a file of one's own this may read all of its runs
    left_out, place = not_run(chosen), chosen.preset
    draft, results = BUILD / "drafts" / place / name, folder("results").resolve()
    with lock(draft):
        newest = max(path.stat().st_mtime_ns for path in after)
        if stamps.holds(stamp) and stamp.stat().st_mtime_ns >= newest:
            return False
        shutil.rmtree(draft, ignore_errors=True)
        began = time.time_ns()
        print(f"{name}: running on {preset}", flush=True)
        os.environ["PAPER_RESULTS"] = str(draft / "results")
        executed = execute(SOURCES / f"{name}.ipynb", draft / f"{name}.ipynb", given, left_out)
        published = draft / "results" / place / "notebooks" / f"{name}.ipynb"
        publish(executed, published, {str(draft / "results"): "results"})
        files = move(draft / "results", results)
        for old in set((results / place / "figures").glob(f"{name[:2]}_*")) - set(files):
            old.unlink()
        record(results / place, name, (time.time_ns() - began) / 1e9)
        stamps.write(stamp, files, began)
        shutil.rmtree(draft)
    return True


def move(source: Path, target: Path) -> list[Path]:
    """Copy a folder's files to where they belong, each in one step; return the new files."""
    found = {
        path: target / path.relative_to(source) for path in source.rglob("*") if path.is_file()
    }
    for path, place in found.items():
        with replacing(place) as temporary:
            shutil.copyfile(path, temporary)
    return sorted(found.values())


def publish(executed: NotebookNode, target: Path, places: dict[str, str]) -> None:
    """Write an executed notebook as it is committed; `places` as for `publishable`."""
    with replacing(target) as temporary:
        nbformat.write(publishable(executed, {**places, str(ROOT): "."}), temporary)


ENCODED = r"data:[^,\s]*;base64,[\w+/=\s]*"  # a picture within HTML or Markdown
KEPT = ("tags", "jupyter")  # of a cell's metadata; "jupyter" says that its source is folded


def publishable(notebook: NotebookNode, places: dict[str, str]) -> NotebookNode:
    """Return a notebook without what changes from run to run or from machine to machine.

    Removed: times, progress (stderr and widgets), papermill's paths and random cell id; what is
    folded stays so. In texts the paths of `places` become its names, but for those inside other
    paths, addresses or encoded data. Pictures get a palette, a third of the bytes; they stay
    inside, since GitHub and nbviewer show no output that links to a file.
    """
    notebook = nbformat.from_dict({**notebook, "metadata": METADATA})
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        kept = {name: cell.metadata[name] for name in KEPT if cell.metadata.get(name)}
        cell.metadata = NotebookNode(kept)
        cell.id = "injected-parameters" if "injected-parameters" in tags else cell.id
        cell.source = _published(cell.source, "", places)
        if cell.cell_type == "code":
            shown = [output for output in cell.outputs if not _is_progress(output)]
            cell.outputs = _published(shown, "outputs", places)
    return notebook


def _published(value: Any, key: str, places: dict[str, str]) -> Any:
    """A text or an output with paths replaced, except in pictures, which become smaller."""
    if isinstance(value, dict):
        return NotebookNode({name: _published(part, name, places) for name, part in value.items()})
    if isinstance(value, list):
        return [_published(part, key, places) for part in value]
    if key == "image/png":
        return base64.b64encode(shrink(base64.b64decode(value))).decode()
    if isinstance(value, str) and ("/" not in key or key.startswith("text/")):
        for path, name in places.items():
            whole = rf"(?<![\w.~+/=%-]){re.escape(path)}(?![\w+=%-]|\.\w)"
            found = re.compile(rf"({ENCODED})|{whole}")
            value = found.sub(lambda part, name=name: part[1] or name, value)
    return value


def _is_progress(output: NotebookNode) -> bool:
    data = output.get("data", {})
    return output.get("name") == "stderr" or "application/vnd.jupyter.widget-view+json" in data


def record(results: Path, name: str, seconds: float) -> None:
    """Write environment.json: what the latest run was made with, each notebook's time."""
    path = results / "environment.json"
    with lock(path):
        notebooks = environment(results)["notebooks"]
        described = describe()
        notebooks[name] = {"seconds": round(seconds), "commit": described["commit"]}
        there = {source.stem for source in sources()} | {name}
        kept = {each: made for each, made in notebooks.items() if each in there}
        described["notebooks"] = dict(sorted(kept.items()))
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(described, indent=2) + "\n")


def describe() -> dict[str, Any]:
    """Return what a result was made with: commit, Python, packages, platform, processor, device."""
    import torch

    pinned = re.findall(r"^([\w-]+)==", (ROOT / "requirements.in").read_text(), re.MULTILINE)
    found = {package.name.lower(): package.version for package in metadata.distributions()}
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    processor = re.search(r"^model name\s*: (.+)$", info, re.MULTILINE)
    return {
        "commit": commit(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": processor[1] if processor else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "packages": {name: found[name] for name in pinned if name in found},
    }


def commit() -> str:
    """Return the commit, "+" where files outside results/ differ; "unknown" without git."""
    head = git("rev-parse", "HEAD").decode()[:12]
    changed = git("status", "--porcelain", "--", ".", ":!results")
    return head + "+" * bool(changed) if head else "unknown"


def begin(preset: str, seeds: Sequence[int], todo: Sequence[str], stamped: Path, jobs: int) -> None:
    """Check settings, folders, data before anything runs, forget old stamps, say how long it takes.

    Raises ConfigError for settings that cannot work, ResultError for folders that nobody can write
    into and NotebookError for data that are missing.
    """
    chosen = study(preset, seeds=list(seeds))
    config, results = chosen.run, folder("results") / chosen.preset
    for kind, place in (("RESULTS", results), ("RUNS", folder("runs"))):
        require_writable(place, kind)
    from paper_lib.data import load

    options = {"held_out": config.held_out, "image_size": config.image_size or None}
    try:
        if chosen.dataset is None:
            load(config.data, folder("data"), **options)
    except (ValueError, OSError) as error:
        raise NotebookError(f"no notebook can run on {preset}: {error}") from error
    for name in todo:
        remove(stamped / name)
    left = remaining(preset, todo, stamped, jobs)
    print(f"{len(todo)} notebooks to run, into {results}{left}", flush=True)


def require_writable(place: Path, setting: str) -> None:
    """Raise ResultError unless files can be written into a folder, which is made if need be."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        remedy = f"name another folder with {setting}=..."
        raise ResultError(f"{place} cannot be written ({error.strerror}): {remedy}") from error


def remaining(preset: str, todo: Sequence[str], stamped: Path, jobs: int) -> str:
    """How many are done, and the minutes that others take by the times of the committed results."""
    left = [name for name in todo if not (stamped / name).exists()]
    done = f", {len(todo) - len(left)} of {len(todo)}" if len(left) < len(todo) else ""
    times = environment(ROOT / "results" / Path(preset).stem)["notebooks"]
    if not left or not set(left) <= set(times):
        return done
    minutes = sum(times[name]["seconds"] for name in left) / min(jobs, len(left)) / 60
    return f"{done}, about {max(1, round(minutes))} min left"


def write_smoke(into: Path) -> None:
    """Write copies on the smoke preset with their stored outputs kept, for nbval to check."""
    into.mkdir(parents=True, exist_ok=True)
    for source in sources():
        execute(source, into / source.name, {"preset": "smoke"}, prepare_only=True)


def refresh(source: Path) -> None:
    """Run a notebook on the smoke preset and store the outputs of its checked cells, no others."""
    executed = execute(source, BUILD / "refresh" / source.name, {"preset": "smoke"})
    stored = with_checked_outputs(nbformat.read(source, as_version=4), executed)
    publish(stored, source, {})


def with_checked_outputs(source: NotebookNode, executed: NotebookNode) -> NotebookNode:
    """Return `source` with the outputs that its checked cells had when they ran, no others."""
    ran = {cell.id: cell for cell in executed.cells}
    for cell in (cell for cell in source.cells if cell.cell_type == "code"):
        checked = CHECKED in cell.source
        cell.outputs = ran[cell.id].outputs if checked else []
        cell.execution_count = ran[cell.id].execution_count if checked else None  # nbval wants it
    return source


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return 2 for what cannot work and for a notebook that fails."""
    parser = argparse.ArgumentParser(prog="make", description=__doc__)
    parser.add_argument("command", choices=["begin", "run", "smoke", "refresh"])
    parser.add_argument("names", nargs="*")
    for option in ("--preset", "--seeds", "--jobs", "--todo"):
        parser.add_argument(option, default="")
    parser.add_argument("--stamps", type=Path)
    parser.add_argument("--after", type=Path, nargs="*")
    args = parser.parse_args(argv)
    end_with_make()
    try:
        carry_out(args)
    except (ConfigError, NotebookError, ResultError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing unfinished is taken for a result", file=sys.stderr)
        return 130
    return 0


def carry_out(args: argparse.Namespace) -> None:
    """Run one command."""
    words, jobs = args.seeds.replace(",", " ").split(), int(args.jobs or cpus())
    numbers = all(re.fullmatch("[0-9]{1,19}", word) for word in words)
    require(numbers, "SEEDS", args.seeds, 'write numbers, as in SEEDS="0 1 2"')
    seeds = [int(word) for word in words]
    # Notebooks side by side share the cores; a small network cannot use two threads anyway.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cpus() // jobs)))
    if args.command != "smoke":
        check_names(args.names, [source.stem for source in sources()], "notebook")
    if args.command == "begin":
        begin(args.preset, seeds, args.names, args.stamps, jobs)
    for name in args.names if args.command == "run" else []:
        began = time.monotonic()
        if run(name, args.preset, seeds, args.stamps / name, args.after):
            left = remaining(args.preset, args.todo.split(), args.stamps, jobs)
            print(f"{name}: done in {time.monotonic() - began:.0f} s{left}", flush=True)
    if args.command == "smoke":
        write_smoke(Path(args.names[0]))
    if args.command == "refresh":
        for source in sources():
            if not args.names or source.stem in args.names:
                refresh(source)


if __name__ == "__main__":
    sys.exit(main())
