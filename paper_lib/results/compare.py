"""Whether results in the working tree reproduce those committed: claims.csv and the CSV behind each figure.

| what                         | agrees if                                                                    |
|------------------------------|------------------------------------------------------------------------------|
| a claim's criterion, verdict | equal                                                                        |
| a claim's measured mean      | it moved by at most 3 combined spreads, or 5 % if that is more               |
| a figure's rows and labels   | equal                                                                        |
| a figure's column of numbers | root mean square change at most 10 % of the column's root mean square, or 3  |
|                              | typical spreads if it has a column "spread" and that is more                 |
| a column "spread"            | not compared: a standard deviation of three seeds is uncertain by a half     |

Training is chaotic, so that another processor gives other last bits and then other weights: only statistics agree.
"""

from __future__ import annotations

import io
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd

SPREADS, MEAN_TOLERANCE, CURVE_TOLERANCE = 3.0, 0.05, 0.10


def committed(path: Path) -> pd.DataFrame | None:
    """Return a CSV as committed at HEAD, or None if it is not."""
    command = ["git", "show", f"HEAD:./{path.name}"]
    done = subprocess.run(command, cwd=path.parent, capture_output=True, text=True)
    return pd.read_csv(io.StringIO(done.stdout)) if done.returncode == 0 else None


def compare_claims(old: pd.DataFrame, new: pd.DataFrame) -> list[str]:
    """Return a line for each claim that does not agree."""
    key = ["notebook", "claim", "quantity"]
    lines = []
    for row in old.merge(new, on=key, how="outer", suffixes=("", "_new"), indicator="side").itertuples():
        name = f"{row.notebook}, {row.claim}, {row.quantity}"
        if row.side != "both":
            lines.append(f"{name}: only in the {'committed' if row.side == 'left_only' else 'new'} results")
            continue
        if row.criterion != row.criterion_new:
            lines.append(f"{name}: criterion was {row.criterion!r}, is {row.criterion_new!r}")
        if row.holds != row.holds_new:
            lines.append(f"{name}: holds was {row.holds}, is {row.holds_new}")
        spread = np.nan_to_num(math.hypot(row.spread, row.spread_new))
        allowed = max(SPREADS * spread, MEAN_TOLERANCE * abs(row.measured))
        if not (abs(row.measured_new - row.measured) <= allowed or np.isnan([row.measured, row.measured_new]).all()):
            lines.append(f"{name}: measured {row.measured:.4g} -> {row.measured_new:.4g}, allowed ±{allowed:.2g}")
    return lines


def compare_figure(old: pd.DataFrame, new: pd.DataFrame) -> list[str]:
    """Return a line for each column of a figure's data that does not agree."""
    if list(old.columns) != list(new.columns) or len(old) != len(new):
        return [f"shape {old.shape} with columns {list(old.columns)} -> {new.shape} with {list(new.columns)}"]
    typical = np.nan_to_num(old["spread"].median()) if "spread" in old else 0.0
    lines = []
    for column in old.columns.drop("spread", errors="ignore"):
        if not (pd.api.types.is_numeric_dtype(old[column]) and pd.api.types.is_numeric_dtype(new[column])):
            if not old[column].astype(str).equals(new[column].astype(str)):
                lines.append(f"{column}: labels differ")
            continue
        before, after = old[column].to_numpy(float), new[column].to_numpy(float)
        moved, scale = _rms(after - before), _rms(before)
        if (np.isnan(before) != np.isnan(after)).any() or moved > max(CURVE_TOLERANCE * scale, SPREADS * typical):
            lines.append(f"{column}: moved by {moved:.3g} (rms), its size is {scale:.3g}")
    return lines


def _rms(values: np.ndarray) -> float:
    """Root mean square of the finite values."""
    values = values[np.isfinite(values)]
    return float(np.sqrt(np.mean(values**2))) if values.size else 0.0


def compare(results: Path) -> int:
    """Print what does not agree with HEAD; return 0 if everything does, 1 if not, 2 if there is nothing to compare."""
    paths = [path for path in (results / "claims.csv", *sorted(results.glob("figures/*.csv"))) if path.exists()]
    if not paths:
        print(f"no results in {results}: `make figures` makes them", file=sys.stderr)
        return 2
    failures = 0
    for path in paths:
        old, new = committed(path), pd.read_csv(path)
        if old is None:
            lines = ["not committed"]
        else:
            lines = (compare_claims if path.name == "claims.csv" else compare_figure)(old, new)
        failures += bool(lines)
        print(f"{path.relative_to(results)}: {'agrees' if not lines else 'DIFFERS'}")
        print("".join(f"  {line}\n" for line in lines), end="")
    print(f"{len(paths) - failures} of {len(paths)} files agree with the committed results")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(compare(Path(sys.argv[1])))
