"""The claims table: criteria that are fixed before the measurement, verdicts, and the one writer of claims.csv."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from paper_lib.files import lock, replacing
from paper_lib.errors import check_names

COLUMNS = "claim quantity predicted measured spread seeds criterion holds notebook reason".split()


class LedgerError(ValueError):
    """Claims stated or measured in the wrong order, twice, or not at all."""


@dataclass(frozen=True)
class Criterion:
    """What the mean over seeds must satisfy; `kind` is between, below, above, within or rel."""

    kind: str
    bound: tuple[float, ...]

    def __post_init__(self) -> None:
        expected = 2 if self.kind == "between" else 1
        if len(self.bound) != expected or not all(map(math.isfinite, self.bound)):
            raise LedgerError(f"{self.kind} = {self.bound}: give {expected} finite number(s)")
        if self.kind == "between" and self.bound[0] >= self.bound[1]:
            raise LedgerError(f"between = {self.bound}: the first number must be the smaller one")
        if self.relative and self.bound[0] <= 0:
            raise LedgerError(f"{self.kind} = {self.bound[0]}: a tolerance must be > 0")

    @property
    def relative(self) -> bool:
        """Whether the criterion compares with a prediction."""
        return self.kind in ("within", "rel")

    def __str__(self) -> str:
        low, high = self.bound[0], self.bound[-1]
        return {
            "between": f"{low:g} <= mean <= {high:g}",
            "below": f"mean < {high:g}",
            "above": f"mean > {low:g}",
            "within": f"within {high:g} of predicted",
            "rel": f"within {100 * high:g} % of predicted",
        }[self.kind]

    def holds(self, mean: float, predicted: float) -> bool:
        """Judge the mean over seeds."""
        low, high = self.bound[0], self.bound[-1]
        return {
            "between": low <= mean <= high,
            "below": mean < high,
            "above": mean > low,
            "within": abs(mean - predicted) <= high,
            "rel": abs(mean - predicted) <= high * abs(predicted),
        }[self.kind]


@dataclass
class _Entry:
    """One expectation of a ledger, and its measurement once there is one (an array over seeds)."""

    claim: str
    quantity: str
    criterion: Criterion
    predicted: np.ndarray | None
    measured: np.ndarray | None = None
    reason: str = ""

    @property
    def finite(self) -> bool:
        return bool(self.measured.size and np.isfinite(self.measured).all())

    def row(self, notebook: str) -> dict:
        """The entry as a row of the table; `reason` is kept only where the criterion fails."""
        mean, spread = mean_and_spread(self.measured)
        predicted = math.nan if self.predicted is None else float(np.mean(self.predicted))
        holds = self.finite and self.criterion.holds(mean, predicted)
        reason = self.reason if self.finite else f"not measurable: values {self.measured.tolist()}"
        values = (self.claim, self.quantity, predicted, mean, spread, self.measured.size)
        return dict(zip(COLUMNS, (*values, str(self.criterion), holds, notebook, "" if holds else reason), strict=True))


def mean_and_spread(values: np.ndarray) -> tuple[float, float]:
    """Mean and sample standard deviation over seeds; the spread of a single seed, and both of none, are NaN."""
    mean = float(np.mean(values)) if values.size else math.nan
    if values.size > 1 and np.ptp(values) == 0:
        return mean, 0.0  # not the dust of rounding
    with np.errstate(invalid="ignore"):  # infinite values have no spread
        return mean, float(np.std(values, ddof=1)) if values.size > 1 else math.nan


class Ledger:
    """Expectations, then measurements, then verdicts of one notebook.

    Every `expect` comes before the first `measure`, so a criterion cannot follow from what was found. `verdict`
    replaces the notebook's own rows of <results>/claims.csv and claims.md. Misuse raises LedgerError.
    """

    def __init__(self, results: Path | str, notebook: str) -> None:
        self.results, self.notebook = Path(results), notebook
        self._entries: dict[str, _Entry] = {}

    def expect(
        self,
        claim: str,
        quantity: str,
        *,
        between: tuple[float, float] | None = None,
        below: float | None = None,
        above: float | None = None,
        within: float | None = None,
        rel: float | None = None,
        predicted: float | None = None,
    ) -> None:
        """State what `quantity`, averaged over seeds, must satisfy for claim "C<n>" to hold: exactly one criterion.

        between (inclusive), below and above are bounds in the quantity's own units; within (absolute) and rel
        (a fraction) are tolerances around the prediction, given here as `predicted` or later to `measure`.
        """
        given = {"between": between, "below": below, "above": above, "within": within, "rel": rel}
        given = {kind: bound for kind, bound in given.items() if bound is not None}
        if len(given) != 1:
            raise LedgerError(f"{quantity!r} has criteria {list(given)}: give exactly one of {', '.join(_KINDS)}")
        if not re.fullmatch(r"C[1-9]\d*", claim):
            raise LedgerError(f"claim {claim!r} is not a claim's name: write C1, C2, ...")
        if quantity in self._entries:
            raise LedgerError(f"{quantity!r} is expected twice: each quantity has one criterion")
        if any(entry.measured is not None for entry in self._entries.values()):
            raise LedgerError(f"{quantity!r} is expected after a measurement: state every criterion before measuring")
        ((kind, bound),) = given.items()
        criterion = Criterion(kind, tuple(np.atleast_1d(bound).astype(float).tolist()))
        self._entries[quantity] = _Entry(claim, quantity, criterion, _values(predicted))

    def measure(
        self,
        quantity: str,
        values: Sequence[float] | np.ndarray,
        predicted: float | Sequence[float] | np.ndarray | None = None,
        reason: str = "",
    ) -> None:
        """Record one value per seed; `predicted` is one number or one per seed, `reason` explains a failure."""
        check_names([quantity], list(self._entries), "quantity")
        entry, measured, predicted = self._entries[quantity], _values(values), _values(predicted)
        if entry.measured is not None:
            raise LedgerError(f"{quantity!r} is measured twice: give all seeds in one call")
        if predicted is not None and entry.predicted is not None:
            raise LedgerError(f"{quantity!r} already has a prediction, {entry.predicted[0]:g}: do not give another")
        if predicted is not None and predicted.size not in (1, measured.size):
            raise LedgerError(f"{quantity!r}: {predicted.size} predictions for {measured.size} seeds")
        entry.predicted = entry.predicted if predicted is None else predicted
        if entry.criterion.relative and entry.predicted is None:
            raise LedgerError(f"{quantity!r} must be {entry.criterion}, but has no prediction: pass predicted=")
        entry.measured, entry.reason = measured, reason

    def verdict(self) -> Verdict:
        """Judge every expectation and write the rows; LedgerError if one was not measured."""
        missing = [entry.quantity for entry in self._entries.values() if entry.measured is None]
        if missing or not self._entries:
            raise LedgerError(f"not measured: {missing}" if missing else "nothing was expected")
        rows = pd.DataFrame([entry.row(self.notebook) for entry in self._entries.values()], columns=COLUMNS)
        _write(self.results, rows, self.notebook)
        return Verdict(rows)

    def check(self) -> None:
        """Print what is expected and whether it was measured: text that depends on no preset and no number."""
        for e in self._entries.values():
            state = "not measured" if e.measured is None else "measured" if e.finite else "not finite"
            print(f"{e.claim}  {e.quantity}: {e.criterion} [{state}]")


@dataclass(frozen=True, eq=False)
class Verdict:
    """The judged rows of one notebook; Jupyter shows them as a table of sentences, not cut to columns."""

    rows: pd.DataFrame

    def _repr_markdown_(self) -> str:
        return f"{count(self.rows)}\n\n{markdown(self.rows)}"


def count(claims: pd.DataFrame) -> str:
    """How many criteria hold, as a sentence."""
    return f"{int(claims.holds.sum())} of {len(claims)} criteria hold."


def table(results: Path | str) -> pd.DataFrame:
    """Return a preset's claims by claim and notebook, as these state them; FileNotFoundError if there are none yet."""
    path = Path(results) / "claims.csv"
    if not path.exists():
        raise FileNotFoundError(f"no claims at {path}: `make figures` measures them")
    return pd.read_csv(path, dtype={"reason": str}).fillna({"reason": ""})


def markdown(claims: pd.DataFrame) -> str:
    """Return the claims as a GitHub table, one line a claim, failures with their reason."""
    lines = ["| claim | quantity | predicted | measured | criterion | holds |", "|---|---|---|---|---|---|"]
    for row in claims.itertuples():
        predicted = "" if math.isnan(row.predicted) else f"{row.predicted:.3g}"
        verdict = "yes" if row.holds else "**no**" + (f": {row.reason}" if row.reason else "")
        measured = f"{with_spread(row.measured, row.spread)} (n = {row.seeds})"
        criterion = re.sub(r"\d+\.\d{4,}", lambda number: f"{float(number[0]):.3g}", row.criterion)
        cells = (row.claim, row.quantity, predicted, measured, criterion, verdict)
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def with_spread(mean: float, spread: float) -> str:
    """Write mean ± spread, both to the second digit of the spread: "1.0024 ± 0.0020"."""
    if math.isnan(spread):
        return f"{mean:.3g}"
    if not 1e-5 <= spread < 1e5:
        return f"{mean:.3g} ± {spread:.2g}"
    decimals = 1 - math.floor(math.log10(float(f"{spread:.1e}")))  # of what is written: 0.0999 is 0.10
    return " ± ".join(f"{round(value, decimals) + 0.0:.{max(decimals, 0)}f}" for value in (mean, spread))  # never -0


_KINDS = ("between", "below", "above", "within", "rel")


def _values(values: float | Sequence[float] | np.ndarray | None) -> np.ndarray | None:
    """One float or several as a float64 array, shape (n,)."""
    if values is None:
        return None
    array = np.atleast_1d(np.asarray(values, dtype=np.float64))
    if array.ndim != 1:
        raise LedgerError(f"values of shape {array.shape}: give one number per seed")
    return array


def _write(results: Path, rows: pd.DataFrame, notebook: str) -> None:
    """Put `rows` in the place of the notebook's earlier ones, under a lock, each file in one atomic step.

    claims.md says the same as claims.csv to people.
    """
    path = results / "claims.csv"
    with lock(path):
        if path.exists():
            kept = table(results).query("notebook != @notebook")
            rows = pd.concat([kept, rows]) if len(kept) else rows
        order = rows.assign(number=rows.claim.str[1:].astype(int)).sort_values(["number", "notebook"], kind="stable")
        with replacing(path) as temporary:
            order[COLUMNS].to_csv(temporary, index=False, float_format="%.6g", lineterminator="\n")
        with replacing(path.with_suffix(".md")) as temporary:
            temporary.write_text(f"# Every criterion\n\n{count(order)}\n\n{markdown(order)}")
