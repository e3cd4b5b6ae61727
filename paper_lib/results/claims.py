"""The paper's claims, and a notebook's ledger of them: criteria, controls, verdicts, one CSV."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from paper_lib.errors import check_names
from paper_lib.files import replacing

CLAIMS = {
    "C1": "The loss of one fixed mini-batch, followed along the SGD trajectory, looks convex.",
    "C2": "For ResNets that loss is close to a quadratic.",
    "C3": "One large step takes its own batch's loss very low; held-out batches look different.",
    "C4": "Per-batch quadratics with scattered minima explain how gradients align.",
    "C5": "In that model every average of iterates equals SGD under some schedule.",
    "C6": "Averages of real ResNet runs track runs under the equivalent schedule.",
    "C7": "At a fixed learning rate the weights soon move on an ellipsoid around the minimum.",
    "C8": "Two distant points averaged gain as much as half the learning rate; an EMA gains more.",
    "C9": "Runs that see the same batches from different starts approach each other.",
    "C10": "Open in the paper: full trajectories, and learning rates that depend on them.",
}
ROLES = {
    "claim": "what the claim says: one criterion for each clause",
    "limit": "where the claim should end, or how far it reaches",
    "control": "what must fail the claim's criterion, if that criterion means anything",
    "check": "of an estimate or a simulation",
}
CONFIDENCE = 0.95  # of the two-sided t interval over seeds that decides
Bound = float | tuple[float, float]
NUMBERS = "predicted measured spread seeds low high".split()
COLUMNS = ["claim", "role", "quantity", *NUMBERS]
COLUMNS += ["criterion", "verdict", "notebook", "network", "reason"]
VERDICTS = ["holds", "fails", "undecided"]


class LedgerError(ValueError):
    """Claims stated or measured in the wrong order, twice, or not at all, or a damaged file."""


# How each kind of criterion reads. The interval over seeds is that of the mean; of the difference
# to the prediction for within; of the ratio to it for rel.
KINDS = {
    "between": "{low:g} <= mean <= {high:g}",
    "below": "mean < {high:g}",
    "above": "mean > {low:g}",
    "within": "within {high:g} of predicted",
    "rel": "within {percent:g} % of predicted",
}
RELATIVE = ("within", "rel")  # to a prediction


@dataclass(eq=False)
class Criterion:
    """One thing stated of a claim before measuring, and its measurement over seeds."""

    claim: str
    role: str
    quantity: str
    kind: str
    low: float
    high: float
    predict: Callable[..., Any] | None
    _ledger: Ledger = field(repr=False)
    controls: list[Criterion] = field(default_factory=list, repr=False)
    measured: np.ndarray | None = None
    predicted: np.ndarray | None = None
    reason: str = ""

    def control(self, quantity: str) -> Criterion:
        """State what must fail this criterion: the same bounds, measured on something else.

        Where it does not fail, a criterion that holds proves nothing and is undecided.
        """
        other = replace(self, role="control", quantity=quantity, controls=[])
        self._ledger.add(other)
        self.controls.append(other)
        return other

    def measure(self, values: Any, *data: Any, reason: str = "") -> None:
        """Record one value per seed, and what the stated prediction says of `data`.

        `reason` is why the criterion fails, shown where it does: a sentence with the number that
        supports it. LedgerError for a reason without one, or a prediction that does not fit.
        """
        _require(self.measured is None, f"{self.quantity!r} is measured twice: give all seeds")
        measured = _values(values)
        if data:
            _require(self.predict, f"{self.quantity!r}: data, but no prediction was stated")
            predicted = _values(self.predict(*data))  # type: ignore[misc]
            sizes = f"{predicted.size} predictions for {measured.size} seeds"
            _require(predicted.size in (1, measured.size), f"{self.quantity!r}: {sizes}")
            self.predicted = predicted
        missing = f"{self.quantity!r}: pass the data of which its prediction is a function"
        _require(data or self.predict is None, missing)
        supported = not reason or re.search(r"\d", reason)
        _require(supported, f"{self.quantity!r}: the reason {reason!r} has no number: leave it out")
        self.measured, self.reason = measured, reason

    @property
    def sentence(self) -> str:
        """The criterion in words."""
        return KINDS[self.kind].format(low=self.low, high=self.high, percent=100 * self.high)

    @property
    def values(self) -> np.ndarray:
        """The measured values, (n,), none before they are measured."""
        return np.empty(0) if self.measured is None else self.measured

    def interval(self) -> tuple[float, float]:
        """The interval over seeds that is held against the bounds; NaN where there is none."""
        values = self.values
        if self.kind in RELATIVE and self.predicted is not None:
            away = np.subtract if self.kind == "within" else np.divide
            values = away(values, self.predicted)
        return t_interval(values)

    def own_verdict(self) -> str:
        """holds, fails or undecided, whatever its controls say."""
        relative = {"within": (-self.high, self.high), "rel": (1 - self.high, 1 + self.high)}
        low, high = relative.get(self.kind, (self.low, self.high))
        return judge(self.interval(), low, high, strict=self.kind in ("below", "above"))

    def verdict(self) -> tuple[str, str]:
        """The verdict and, where it does not hold, the reason."""
        verdict = self.own_verdict()
        passing = [other for other in self.controls if other.own_verdict() != "fails"]
        if not (self.values.size and np.isfinite(self.values).all()):
            return verdict, f"not measurable: values {self.values.tolist()}"
        if verdict == "holds" and passing:
            return "undecided", f"its control does not fail: {passing[0].quantity}"
        if verdict == "fails" and self.role != "control":
            return verdict, self.reason or "reason not known"
        return verdict, ""


def t_interval(values: np.ndarray) -> tuple[float, float]:
    """The two-sided 95 % t interval of the mean of values (n,); NaN for fewer than two."""
    if values.size < 2 or not np.isfinite(values).all():
        return math.nan, math.nan
    mean, spread = mean_and_spread(values)
    t = stats.t.ppf((1 + CONFIDENCE) / 2, values.size - 1)
    half = float(t * spread / math.sqrt(values.size))
    return mean - half, mean + half


def judge(interval: tuple[float, float], low: float, high: float, strict: bool = True) -> str:
    """holds if an interval lies within (low, high), fails if beyond, undecided if across.

    An interval that touches a bound, as that of equal values can, is within unless `strict`.
    """
    first, last = interval
    if math.isnan(first):
        return "undecided"
    if low < first and last < high or (not strict and low <= first and last <= high):
        return "holds"
    beyond = last <= low or first >= high if strict else last < low or first > high
    return "fails" if beyond else "undecided"


class Ledger:
    """Criteria, then measurements, then verdicts of one notebook.

    Every criterion is stated before the first measurement: none can follow from what was found.
    `verdict` writes <results>/claims/<notebook>.csv. `network` is False where no network is
    trained: such rows are counted apart. Misuse raises LedgerError.
    """

    def __init__(self, results: Path | str, notebook: str, network: bool = True) -> None:
        self.results, self.notebook, self.network = Path(results), notebook, network
        self._criteria: dict[str, Criterion] = {}

    def expect(
        self,
        claim: str,
        quantity: str,
        *,
        role: str = "claim",
        predicted: Callable[..., Any] | None = None,
        **criterion: Bound,
    ) -> Criterion:
        """State what `quantity`, averaged over seeds, must satisfy for claim "C<n>".

        between=(low, high), inclusive, below= and above= are bounds in the quantity's own units;
        within= (absolute) and rel= (a fraction) are tolerances around the prediction. `predicted`
        is a function of the data that `measure` is given, never a number. See ROLES for `role`;
        for controls see `Criterion.control`.
        """
        check_names([claim], CLAIMS, "claim")
        check_names([role], [name for name in ROLES if name != "control"], "role")
        given = f"{quantity!r} has criteria {list(criterion)}"
        exactly = f"{given}: give exactly one of {', '.join(KINDS)}"
        _require(len(criterion) == 1 and set(criterion) <= set(KINDS), exactly)
        ((kind, bounds),) = criterion.items()
        low, high = _bounds(kind, np.atleast_1d(bounds).astype(float).tolist())
        if predicted is not None:
            number = f"{quantity!r}: predicted = {predicted!r} must be a function of the data"
            _require(callable(predicted), number)
        _require(kind not in RELATIVE or predicted, f"{given}: state what is predicted, too")
        stated = Criterion(claim, role, quantity, kind, low, high, predicted, self)
        self.add(stated)
        return stated

    def add(self, criterion: Criterion) -> None:
        """Enter a criterion; LedgerError if its quantity is there, or something was measured."""
        quantity, entries = criterion.quantity, self._criteria
        _require(quantity not in entries, f"{quantity!r} is stated twice: one criterion each")
        late = f"{quantity!r} is stated after a measurement: state every criterion before measuring"
        _require(all(entry.measured is None for entry in entries.values()), late)
        entries[quantity] = criterion

    def verdict(self) -> Verdict:
        """Judge every criterion and write the rows; LedgerError if one was not measured."""
        entries = list(self._criteria.values())
        missing = [entry.quantity for entry in entries if entry.measured is None]
        _require(entries, "nothing was stated")
        _require(not missing, f"not measured: {missing}")
        rows = pd.DataFrame([self._row(entry) for entry in entries], columns=COLUMNS)
        with replacing(self.results / "claims" / f"{self.notebook}.csv") as temporary:
            rows.to_csv(temporary, index=False, float_format="%.6g", lineterminator="\n")
        return Verdict(rows)

    def _row(self, entry: Criterion) -> list:
        """All of COLUMNS."""
        mean, spread = mean_and_spread(entry.values)
        predicted = math.nan if entry.predicted is None else float(np.mean(entry.predicted))
        verdict, reason = entry.verdict()
        numbers = [predicted, mean, spread, entry.values.size, *entry.interval()]
        stated = [entry.claim, entry.role, entry.quantity]
        return [*stated, *numbers, entry.sentence, verdict, self.notebook, self.network, reason]

    def check(self) -> None:
        """Print what is stated and whether it was measured: text that depends on no number."""
        for entry in self._criteria.values():
            state = "not measured" if entry.measured is None else "measured"
            said = f"{entry.claim} {entry.role}: {entry.quantity}: {entry.sentence}"
            print(f"{said} [{state}]")


def _require(holds: object, message: str) -> None:
    if not holds:
        raise LedgerError(message)


def _bounds(kind: str, bounds: list[float]) -> tuple[float, float]:
    """The low and the high bound of a criterion; a tolerance is the high one."""
    n = 2 if kind == "between" else 1
    finite = len(bounds) == n and all(map(math.isfinite, bounds))
    _require(finite, f"{kind} = {bounds}: give {n} finite number(s)")
    _require(n == 1 or bounds[0] < bounds[1], f"between = {bounds}: the first must be the smaller")
    positive = kind not in RELATIVE or bounds[0] > 0
    _require(positive, f"{kind} = {bounds[0]}: a tolerance must be > 0")
    low = -math.inf if kind == "below" else bounds[0]
    high = math.inf if kind == "above" else bounds[-1]
    return low, high


def mean_and_spread(values: np.ndarray) -> tuple[float, float]:
    """Mean and sample standard deviation over seeds; NaN for what too few seeds have."""
    mean = float(np.mean(values)) if values.size else math.nan
    if values.size > 1 and np.ptp(values) == 0:
        return mean, 0.0  # not the dust of rounding
    with np.errstate(invalid="ignore"):  # infinite values have no spread
        return mean, float(np.std(values, ddof=1)) if values.size > 1 else math.nan


def _values(values: Any) -> np.ndarray:
    """One float or several as a float64 array, shape (n,)."""
    array = np.atleast_1d(np.asarray(values, dtype=np.float64))
    _require(array.ndim == 1, f"values of shape {array.shape}: give one number per seed")
    return array


# --- verdicts on claims -------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Verdict:
    """The judged rows of one notebook, which Jupyter shows as tables of whole sentences."""

    rows: pd.DataFrame

    def _repr_markdown_(self) -> str:
        said = [f"**{row.claim} {row.verdict}**: {row.counted}." for row in by_claim(self.rows)]
        return "\n\n".join([*said, markdown(self.rows)])


@dataclass(frozen=True)
class ClaimVerdict:
    """What the claim criteria of one claim say together."""

    claim: str
    verdict: str
    counted: str


def by_claim(rows: pd.DataFrame) -> list[ClaimVerdict]:
    """The verdict on each claim that rows judge: holds, fails, undecided, or holds in part.

    It holds if all its claim criteria hold, fails if all fail, holds in part if some hold and some
    fail, and is undecided else.
    """
    judged, found = rows[rows.role == "claim"], []
    network = judged.groupby("claim").network.any()
    for claim in sorted(judged.claim.unique(), key=lambda name: int(name[1:])):
        verdicts = judged[judged.claim == claim].verdict.tolist()
        counts = {name: verdicts.count(name) for name in VERDICTS}
        verdict = "holds in part" if counts["holds"] and counts["fails"] else "undecided"
        if len(set(verdicts)) == 1:
            verdict = verdicts[0]
        said = f"{counts['holds']} of {len(verdicts)} criteria hold"
        said += f", {counts['fails']} fail{'s' * (counts['fails'] == 1)}" * bool(counts["fails"])
        said += f", {counts['undecided']} undecided" * bool(counts["undecided"])
        said += ", of the model alone, without a network" * (not network[claim])
        found.append(ClaimVerdict(claim, verdict, said))
    return found


def read(content: bytes, path: Path) -> pd.DataFrame:
    """Return the claims that one notebook's file states; LedgerError where it is damaged."""
    types: dict[str, Any] = dict.fromkeys(COLUMNS, str) | dict.fromkeys(NUMBERS, float)
    types |= {"seeds": int, "network": bool}
    try:
        rows = pd.read_csv(io.BytesIO(content), dtype=types).fillna({"reason": ""})
        said = {"claim": CLAIMS, "role": ROLES, "verdict": VERDICTS, "notebook": [path.stem]}
        whole = list(rows) == COLUMNS and rows[["quantity", "criterion"]].notna().all(axis=None)
        whole = whole and all(rows[name].isin(known).all() for name, known in said.items())
    except ValueError:  # of this pandas has several kinds
        whole = False
    _require(whole, f"{path} is damaged: `make figures` makes it again")
    return rows


def table(results: Path | str) -> pd.DataFrame:
    """Return a preset's claims by number and notebook; FileNotFoundError if there are none yet."""
    files = sorted(Path(results).glob("claims/*.csv"))
    if not files:
        raise FileNotFoundError(f"no claims in {results}: `make figures` measures them")
    rows = pd.concat([read(file.read_bytes(), file) for file in files], ignore_index=True)
    numbers = rows.claim.str[1:].astype(int)
    return rows.iloc[numbers.argsort(kind="stable")].reset_index(drop=True)


def role_of(rows: pd.DataFrame) -> pd.Series:
    """The role of each row; a control has that of the criterion stated before it."""
    return rows.role.where(rows.role != "control").ffill()


def markdown(rows: pd.DataFrame) -> str:
    """Return criteria as a GitHub table, the claim's own first, each with its control beneath."""
    head = ["claim", "role", "quantity", "predicted", "measured", "criterion", "verdict"]
    lines = [head, ["---"] * len(head)]
    order = role_of(rows).map(list(ROLES).index)
    for row in rows.iloc[order.argsort(kind="stable")].itertuples():
        predicted = "" if math.isnan(row.predicted) else f"{row.predicted:.3g}"
        measured = f"{with_spread(row.measured, row.spread)} (n = {row.seeds})"
        criterion = re.sub(r"\d+\.\d{4,}", lambda n: f"{float(n[0]):.3g}", row.criterion)
        right = {"fails": "fails, as it must"} if row.role == "control" else {"holds": "holds"}
        verdict = right.get(row.verdict, f"**{row.verdict}**")
        verdict += f": {row.reason}" if row.reason else ""
        lines.append([row.claim, row.role, row.quantity, predicted, measured, criterion, verdict])
    return pipes(lines)


def pipes(lines: Sequence[Sequence[str]]) -> str:
    """Write a Markdown table without padding, which long sentences would spread to all rows."""
    escaped = ([plain(str(cell)).replace("|", "\\|") for cell in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)


def plain(text: str) -> str:
    """A text on one line of Markdown, in which nothing is HTML; "0 < a" stays as it is."""
    one_line = " ".join(text.split())
    return re.sub(r"<(?=[\w/!?])|&(?=[\w#])", lambda sign: html.escape(sign[0]), one_line)


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
