"""A notebook's ledger: criteria stated before the measurement, verdicts, one CSV of them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from paper_lib.errors import check_names
from paper_lib.files import replacing

Bound = float | tuple[float, float]
Values = float | Sequence[float] | np.ndarray
COLUMNS = "claim quantity predicted measured spread seeds criterion holds notebook reason".split()


class LedgerError(ValueError):
    """Claims stated or measured in the wrong order, twice, or not at all."""


# How each kind of criterion reads, and when mean m and prediction p satisfy it (bounds low, high).
KINDS: dict[str, tuple[str, Callable[[float, float, float, float], bool]]] = {
    "between": ("{low:g} <= mean <= {high:g}", lambda m, p, low, high: low <= m <= high),
    "below": ("mean < {high:g}", lambda m, p, low, high: m < high),
    "above": ("mean > {low:g}", lambda m, p, low, high: m > low),
    "within": ("within {high:g} of predicted", lambda m, p, low, high: abs(m - p) <= high),
    "rel": (
        "within {percent:g} % of predicted",
        lambda m, p, low, high: abs(m - p) <= high * abs(p),
    ),
}
RELATIVE = ("within", "rel")  # to a prediction


@dataclass
class _Entry:
    """One expectation (a kind of KINDS with its bounds) and its measurement over seeds."""

    claim: str
    quantity: str
    kind: str
    low: float
    high: float
    predicted: np.ndarray | None
    measured: np.ndarray | None = None
    reason: str = ""

    @property
    def criterion(self) -> str:
        words = KINDS[self.kind][0]
        return words.format(low=self.low, high=self.high, percent=100 * self.high)

    @property
    def state(self) -> str:
        if self.measured is None:
            return "not measured"
        return (
            "measured" if self.measured.size and np.isfinite(self.measured).all() else "not finite"
        )

    def row(self) -> list:
        """All of COLUMNS but the notebook; `reason` is kept only where the criterion fails."""
        values = np.empty(0) if self.measured is None else self.measured
        mean, spread = mean_and_spread(values)
        predicted = math.nan if self.predicted is None else float(np.mean(self.predicted))
        finite = self.state == "measured"
        holds = finite and KINDS[self.kind][1](mean, predicted, self.low, self.high)
        reason = self.reason if finite else f"not measurable: values {values.tolist()}"
        numbers = [predicted, mean, spread, values.size]
        return [self.claim, self.quantity, *numbers, self.criterion, holds, "" if holds else reason]


class Ledger:
    """Expectations, then measurements, then verdicts of one notebook.

    Every `expect` comes before the first `measure`: no criterion can follow from what was found.
    `verdict` writes <results>/claims/<notebook>.csv. Misuse raises LedgerError.
    """

    def __init__(self, results: Path | str, notebook: str) -> None:
        self.results, self.notebook = Path(results), notebook
        self._entries: dict[str, _Entry] = {}

    def expect(
        self, claim: str, quantity: str, *, predicted: float | None = None, **criterion: Bound
    ) -> None:
        """State what `quantity`, averaged over seeds, must satisfy for claim "C<n>": one criterion.

        between=(low, high), inclusive, below= and above= are bounds in the quantity's own units;
        within= (absolute) and rel= (a fraction) are tolerances around the prediction, given as
        `predicted` here or later to `measure`.
        """
        kinds = f"give exactly one of {', '.join(KINDS)}"
        given = f"{quantity!r} has criteria {list(criterion)}"
        _require(len(criterion) == 1 and set(criterion) <= set(KINDS), f"{given}: {kinds}")
        _require(re.fullmatch(r"C[1-9]\d*", claim), f"{claim!r} is no claim: write C1, C2, ...")
        _require(
            quantity not in self._entries, f"{quantity!r} is expected twice: one criterion each"
        )
        late = (
            f"{quantity!r} is expected after a measurement: state every criterion before measuring"
        )
        _require(all(entry.measured is None for entry in self._entries.values()), late)
        ((kind, bounds),) = criterion.items()
        stated = None if predicted is None else _values(predicted)
        low, high = _bounds(kind, np.atleast_1d(bounds).astype(float).tolist())
        self._entries[quantity] = _Entry(claim, quantity, kind, low, high, stated)

    def measure(
        self, quantity: str, values: Values, predicted: Values | None = None, reason: str = ""
    ) -> None:
        """Record a value per seed; `predicted` is one, or one per seed; `reason` is a failure's."""
        check_names([quantity], list(self._entries), "quantity")
        entry, measured = self._entries[quantity], _values(values)
        _require(entry.measured is None, f"{quantity!r} is measured twice: give all seeds at once")
        if predicted is not None:
            given = _values(predicted)
            _require(entry.predicted is None, f"{quantity!r} already has a prediction: give one")
            sizes = f"{given.size} predictions for {measured.size} seeds"
            _require(given.size in (1, measured.size), f"{quantity!r}: {sizes}")
            entry.predicted = given
        needed = entry.kind in RELATIVE and entry.predicted is None
        _require(not needed, f"{quantity!r} ({entry.criterion}) has no prediction: pass predicted=")
        entry.measured, entry.reason = measured, reason

    def verdict(self) -> Verdict:
        """Judge every expectation and write the rows; LedgerError if one was not measured."""
        entries = list(self._entries.values())
        missing = [entry.quantity for entry in entries if entry.measured is None]
        _require(entries, "nothing was expected")
        _require(not missing, f"not measured: {missing}")
        columns = [name for name in COLUMNS if name != "notebook"]
        rows = pd.DataFrame([entry.row() for entry in entries], columns=columns)
        rows = rows.assign(notebook=self.notebook)[COLUMNS]
        with replacing(self.results / "claims" / f"{self.notebook}.csv") as temporary:
            rows.to_csv(temporary, index=False, float_format="%.6g", lineterminator="\n")
        return Verdict(rows)

    def check(self) -> None:
        """Print what is expected and whether it was measured: text that depends on no number."""
        for entry in self._entries.values():
            print(f"{entry.claim}  {entry.quantity}: {entry.criterion} [{entry.state}]")


def _require(holds: object, message: str) -> None:
    if not holds:
        raise LedgerError(message)


def _bounds(kind: str, bounds: list[float]) -> tuple[float, float]:
    """The low and the high bound of a criterion, which are the same but for between."""
    n = 2 if kind == "between" else 1
    finite = len(bounds) == n and all(map(math.isfinite, bounds))
    _require(finite, f"{kind} = {bounds}: give {n} finite number(s)")
    _require(n == 1 or bounds[0] < bounds[1], f"between = {bounds}: the first must be the smaller")
    _require(
        kind not in RELATIVE or bounds[0] > 0, f"{kind} = {bounds[0]}: a tolerance must be > 0"
    )
    return bounds[0], bounds[-1]


def mean_and_spread(values: np.ndarray) -> tuple[float, float]:
    """Mean and sample standard deviation over seeds; NaN for what too few seeds have."""
    mean = float(np.mean(values)) if values.size else math.nan
    if values.size > 1 and np.ptp(values) == 0:
        return mean, 0.0  # not the dust of rounding
    with np.errstate(invalid="ignore"):  # infinite values have no spread
        return mean, float(np.std(values, ddof=1)) if values.size > 1 else math.nan


@dataclass(frozen=True, eq=False)
class Verdict:
    """The judged rows of one notebook, which Jupyter shows as a table of whole sentences."""

    rows: pd.DataFrame

    def _repr_markdown_(self) -> str:
        return f"{count(self.rows)}\n\n{markdown(self.rows)}"


def count(claims: pd.DataFrame) -> str:
    """How many criteria hold, as a sentence."""
    return f"{int(claims.holds.sum())} of {len(claims)} criteria hold."


def read(path: Path) -> pd.DataFrame:
    """Return the claims of one notebook's file, as it states them."""
    return pd.read_csv(path, dtype={"reason": str}).fillna({"reason": ""})


def table(results: Path | str) -> pd.DataFrame:
    """Return a preset's claims by number and notebook; FileNotFoundError if there are none yet."""
    files = sorted(Path(results).glob("claims/*.csv"))
    if not files:
        raise FileNotFoundError(f"no claims in {results}: `make figures` measures them")
    rows = pd.concat(map(read, files), ignore_index=True)
    numbers = rows.claim.str[1:].astype(int)
    return rows.iloc[numbers.argsort(kind="stable")].reset_index(drop=True)


def markdown(claims: pd.DataFrame) -> str:
    """Return the claims as a GitHub table, one line a claim, failures with their reason."""
    head = ["claim", "quantity", "predicted", "measured", "criterion", "holds"]
    lines = [head, ["---"] * len(head)]
    for row in claims.itertuples():
        predicted = "" if math.isnan(row.predicted) else f"{row.predicted:.3g}"
        verdict = "yes" if row.holds else "**no**" + (f": {row.reason}" if row.reason else "")
        measured = f"{with_spread(row.measured, row.spread)} (n = {row.seeds})"
        criterion = re.sub(r"\d+\.\d{4,}", lambda n: f"{float(n[0]):.3g}", row.criterion)
        lines.append([row.claim, row.quantity, predicted, measured, criterion, verdict])
    return pipes(lines)


def pipes(lines: Sequence[Sequence[str]]) -> str:
    """Write a Markdown table without padding, which long sentences would spread to all rows."""
    escaped = ([str(cell).replace("|", "\\|") for cell in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)


def with_spread(mean: float, spread: float) -> str:
    """Write mean ± spread, both to the second digit of the spread: "1.0024 ± 0.0020"."""
    if math.isnan(spread):
        return f"{mean:.3g}"
    if not 1e-5 <= spread < 1e5:
        return f"{mean:.3g} ± {spread:.2g}"
    written = float(f"{spread:.1e}")  # 0.0999 is 0.10
    decimals = 1 - math.floor(math.log10(written))
    rounded = [round(value, decimals) + 0.0 for value in (mean, spread)]  # + 0: never -0
    return " ± ".join(f"{value:.{max(decimals, 0)}f}" for value in rounded)


def _values(values: Values) -> np.ndarray:
    """One float or several as a float64 array, shape (n,)."""
    array = np.atleast_1d(np.asarray(values, dtype=np.float64))
    _require(array.ndim == 1, f"values of shape {array.shape}: give one number per seed")
    return array
