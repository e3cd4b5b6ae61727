"""Compare results with the committed ones: a notebook's claims, the CSV behind its figures.

| what                          | agrees if                                                    |
|-------------------------------|--------------------------------------------------------------|
| a claim's criterion           | equal                                                        |
| a claim's verdict             | equal, or one of the two is undecided                        |
| a claim's measured mean       | moved by at most 3 combined spreads, or 5 % if that is more  |
| a figure's rows and labels    | equal                                                        |
| a figure's column of numbers  | rms change at most 10 % of its rms or, if that is more, 3    |
|                               | typical spreads of a column "spread"; equal where not finite |
| a column "spread"             | infinite where it was; else not compared: that of three      |
|                               | seeds is uncertain by a half                                 |

Training is chaotic, so that another processor gives other last bits and then other weights: only
statistics agree. A notebook that agrees, and reads the same, keeps its committed files.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from paper_lib.files import replacing
from paper_lib.results import claims
from scripts import ROOT, ResultError, environment, git, read_figure

INJECTED = "injected-parameters"  # the cell that papermill puts in
SPREADS, MEAN_TOLERANCE, CURVE_TOLERANCE = 3.0, 0.05, 0.10


def compare_claims(old: pd.DataFrame, new: pd.DataFrame) -> list[str]:
    """Return a line for each claim that does not agree."""
    key = ["claim", "quantity"]
    both = old.merge(new, on=key, how="outer", suffixes=("", "_new"), indicator="side")
    lines = []
    for row in both.itertuples():
        name = f"{row.claim}, {row.quantity}"
        if row.side != "both":
            where = "committed" if row.side == "left_only" else "new"
            lines.append(f"{name}: only in the {where} results")
            continue
        for what in ("role", "criterion", "verdict"):
            before, after = getattr(row, what), getattr(row, f"{what}_new")
            if before != after and "undecided" not in (before, after):
                lines.append(f"{name}: {what} was {before}, is {after}")
        for what in ("predicted", "spread", "low", "high"):
            before, after = getattr(row, what), getattr(row, f"{what}_new")
            if np.isinf(before) != np.isinf(after):
                lines.append(f"{name}: {what} was {before:.4g}, is {after:.4g}")
        before, after = row.measured, row.measured_new
        spread = np.hypot(row.spread, row.spread_new)
        allowed = max(SPREADS * spread if spread < np.inf else 0.0, MEAN_TOLERANCE * abs(before))
        within = np.isfinite([before, after]).all() and abs(after - before) <= allowed
        if not within and not np.array_equal(before, after, equal_nan=True):
            lines.append(f"{name}: measured {before:.4g} -> {after:.4g}, allowed ±{allowed:.2g}")
    return lines


def compare_figure(old: pd.DataFrame, new: pd.DataFrame) -> list[str]:
    """Return a line for each column of a figure's data that does not agree."""
    if list(old.columns) != list(new.columns) or len(old) != len(new):
        before, after = (f"{len(data)} rows of {list(data.columns)}" for data in (old, new))
        return [f"{before} -> {after}"]
    spread = pd.to_numeric(old.get("spread", pd.Series(dtype=float)), errors="coerce")
    typical, lines = np.nan_to_num(spread[~np.isinf(spread)].median()), []
    for column in old.columns:
        if not all(pd.api.types.is_numeric_dtype(data[column]) for data in (old, new)):
            if not old[column].astype(str).equals(new[column].astype(str)):
                lines.append(f"{column}: labels differ")
            continue
        # A square of what float64 holds may be infinite in it, and equal to another.
        before, after = (data[column].to_numpy(np.longdouble) for data in (old, new))
        if column == "spread":
            before, after = (np.where(np.isinf(x), x, 0.0) for x in (before, after))
        finite = np.isfinite(before) & np.isfinite(after)
        if not np.array_equal(before[~finite], after[~finite], equal_nan=True):
            lines.append(f"{column}: other values are infinite or missing")
            continue
        moved, scale = _rms(after[finite] - before[finite]), _rms(before[finite])
        if not moved <= max(CURVE_TOLERANCE * scale, SPREADS * typical):
            lines.append(f"{column}: moved by {moved:.3g} (rms), its size is {scale:.3g}")
    return lines


def _rms(values: np.ndarray) -> np.floating | float:
    return np.sqrt(np.mean(values**2)) if values.size else 0.0


class Committed:
    """The results of one preset as committed at HEAD; without git there are none."""

    def __init__(self, preset: str) -> None:
        self.name = f"results/{preset}"
        self.folder = ROOT / self.name
        listed = git("ls-tree", "-rz", "--name-only", "HEAD", f"{self.name}/").decode()
        self.files = {Path(name).relative_to(self.name) for name in listed.split("\0") if name}

    def read(self, file: Path) -> bytes:
        """Return the content of a file."""
        return git("show", f"HEAD:{self.name}/{file.as_posix()}")

    def of(self, notebook: str) -> set[Path]:
        """Return the files of a notebook."""
        return {file for file in self.files if belongs(file, notebook)}


def belongs(file: Path, notebook: str) -> bool:
    """Whether a file of a preset's results is a notebook's: figures by number, others by name."""
    if file.parent.name == "figures":
        return file.name.startswith(f"{notebook[:2]}_")
    return file.stem in (notebook, notebook[3:])


def compare_notebook(notebook: str, results: Path, committed: Committed) -> list[str]:
    """Return a line for each file of a notebook that is gone, and each column that differs."""
    there = {path.relative_to(results) for path in results.glob("*/*") if path.is_file()}
    lines = []
    for file in sorted(file for file in there | committed.files if belongs(file, notebook)):
        if file not in there:
            lines.append(f"{file}: gone")
        elif file.suffix == ".csv" and file not in committed.files:
            lines.append(f"{file}: not committed")
        elif file.suffix == ".csv":
            contents = committed.read(file), (results / file).read_bytes()
            lines += [f"{file}: {line}" for line in compare_file(file, *contents)]
    return lines


def compare_file(file: Path, old: bytes, new: bytes) -> list[str]:
    """Return a line for each claim, or column, that does not agree, or one for a damaged file."""
    is_claims = file.parent.name == "claims"
    read, agreement = (claims.read, compare_claims) if is_claims else (read_figure, compare_figure)
    try:
        return agreement(read(old, file), read(new, file))
    except (ResultError, claims.LedgerError) as error:
        return [str(error)]


def keep_committed(agreeing: Sequence[str], committed: Committed) -> None:
    """Restore the files of notebooks that agree, where their text and code are as committed too."""
    kept = [name for name in agreeing if _says_the_same(name, committed)]
    for file in sorted(file for name in kept for file in committed.of(name)):
        with replacing(committed.folder / file) as temporary:
            temporary.write_bytes(committed.read(file))
    made = committed.folder / "environment.json"
    if kept and Path(made.name) in committed.files:
        old, new = environment(committed.read(Path(made.name))), environment(committed.folder)
        new["notebooks"] |= {
            name: old["notebooks"][name] for name in set(kept) & set(old["notebooks"])
        }
        same = new["notebooks"] == old["notebooks"]
        with replacing(made) as temporary:
            temporary.write_text(json.dumps(old if same else new, indent=2) + "\n")


def _says_the_same(notebook: str, committed: Committed) -> bool:
    """Whether the cells of an executed notebook, but what papermill puts in, are as committed."""
    file = Path("notebooks") / f"{notebook}.ipynb"
    if file not in committed.files:
        return False
    old, new = (
        [cell["source"] for cell in json.loads(text)["cells"] if cell["id"] != INJECTED]
        for text in (committed.read(file), (committed.folder / file).read_bytes())
    )
    return old == new


def main(argv: Sequence[str] | None = None) -> int:
    """Print what does not agree with HEAD; 0 if everything does, 1 if not, 2 without results."""
    parser = argparse.ArgumentParser(prog="make compare", description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--keep", action="store_true", help="restore the files of what agrees")
    args = parser.parse_args(argv)
    results, committed = args.results.resolve(), Committed(args.results.name)
    there = {path.relative_to(results) for path in results.glob("claims/*.csv")}
    if not there or not committed.files:
        missing = f"no results in {results}: `make figures` makes them" if not there else ""
        print(missing or f"nothing committed to compare {results.name} with", file=sys.stderr)
        return 0 if there else 2
    claims = {file for file in there | committed.files if file.parent.name == "claims"}
    names = sorted(file.stem for file in claims)
    found = {name: compare_notebook(name, results, committed) for name in names}
    for name in (name for name in names if found[name]):
        print("\n  ".join([f"{name} differs from the committed results:", *found[name]]))
    agreeing = [name for name in names if not found[name]]
    print(f"{len(agreeing)} of {len(names)} notebooks agree with the committed results")
    if args.keep and results == committed.folder:
        keep_committed(agreeing, committed)
    return int(len(agreeing) < len(names))


if __name__ == "__main__":
    sys.exit(main())
