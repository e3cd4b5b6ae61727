"""The ledger: criteria before measurements, controls, verdicts by intervals over seeds."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from paper_lib.results import claims
from paper_lib.results.claims import LedgerError
from scripts import ROOT

TIGHT = [-1e-3, 0.0, 1e-3]


@pytest.fixture
def ledger(tmp_path):
    return claims.Ledger(tmp_path, "01_test")


def judged(tmp_path, values, *data, **stated):
    ledger = claims.Ledger(tmp_path, "01_test")
    ledger.expect("C1", "q", **stated).measure(values, *data)
    return ledger.verdict().rows.iloc[0]


def around(mean, half=0.1):
    """Three values whose 95 % t interval is mean ± half."""
    t = stats.t.ppf(0.975, 2)
    return mean + half * np.sqrt(3) / t * np.array([-1.0, 0.0, 1.0])


def itself(value):
    return value


@pytest.mark.parametrize(
    ("stated", "values", "data", "verdict"),
    [
        ({"below": 1}, around(0.89), (), "holds"),
        ({"below": 1}, around(0.91), (), "undecided"),
        ({"below": 1}, around(1.09), (), "undecided"),
        ({"below": 1}, around(1.11), (), "fails"),
        ({"above": 0}, around(0.11), (), "holds"),
        ({"above": 0}, around(0.09), (), "undecided"),
        ({"above": 0}, around(-0.11), (), "fails"),
        ({"between": (0.4, 0.7)}, around(0.55), (), "holds"),
        ({"between": (0.4, 0.5)}, around(0.45), (), "undecided"),
        ({"between": (0.4, 0.5)}, around(0.61), (), "fails"),
        ({"between": (0.4, 0.5)}, around(0.29), (), "fails"),
        ({"within": 0.2, "predicted": itself}, around(2.05), (2.0,), "holds"),
        ({"within": 0.2, "predicted": itself}, around(2.15), (2.0,), "undecided"),
        ({"within": 0.2, "predicted": itself}, around(1.6), (2.0,), "fails"),
        ({"rel": 0.2, "predicted": itself}, around(-4.0), (-4.0,), "holds"),
        ({"rel": 0.2, "predicted": itself}, around(-4.75), (-4.0,), "undecided"),
        ({"rel": 0.2, "predicted": itself}, around(4.0), (-4.0,), "fails"),
        ({"between": (0, 1)}, [1.0, 1.0], (), "holds"),  # inclusive
        ({"below": 1}, [1.0, 1.0], (), "fails"),  # strict
        ({"above": 0}, [np.inf, 1], (), "undecided"),
        ({"below": 0}, [np.nan, -1], (), "undecided"),
        ({"below": 0}, [-1.0], (), "undecided"),  # one seed has no interval
        ({"below": 0}, [], (), "undecided"),
    ],
)
def test_the_interval_over_seeds_decides(tmp_path, stated, values, data, verdict):
    assert judged(tmp_path, values, *data, **stated).verdict == verdict


def test_predictions_and_values_are_compared_seed_by_seed(tmp_path):
    values = np.array([1.0, 10.0, 100.0])
    row = judged(tmp_path, 1.01 * values, values, predicted=itself, rel=0.1)
    assert row.verdict == "holds"
    assert row.predicted == pytest.approx(37) and row.measured == pytest.approx(37.37)
    assert (row.low, row.high) == pytest.approx((1.01, 1.01))


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=8))
def test_the_interval_is_that_of_a_t_test(values):
    low, high = claims.t_interval(np.array(values))
    if np.ptp(values) == 0:
        assert low == high
    else:
        interval = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        assert (low, high) == pytest.approx((interval.low, interval.high), rel=1e-6, abs=1e-9)


def test_row_has_mean_sample_spread_seeds_and_interval(tmp_path):
    row = judged(tmp_path, [1.0, 2.0, 3.0], below=9)
    assert (row.measured, row.spread, row.seeds) == (2.0, 1.0, 3)
    assert row.high == pytest.approx(2 + 4.302653 / np.sqrt(3))
    assert (row.criterion, row.role, row.claim, row.network) == ("mean < 9", "claim", "C1", True)
    assert list(row.index) == claims.COLUMNS


def test_reasons_stand_beside_failures_and_carry_a_number(ledger):
    reasons = {"good": "at 3 nats", "bad": "at 3 nats", "unknown": ""}
    stated = {name: ledger.expect("C1", name, below=2 * (name == "good")) for name in reasons}
    for name, reason in reasons.items():
        stated[name].measure([1.0, 1.0], reason=reason)
    found = ledger.verdict().rows.set_index("quantity").reason.to_dict()
    assert found == {"good": "", "bad": "at 3 nats", "unknown": "reason not known"}


def test_reasons_without_a_number_are_refused(ledger):
    stated = ledger.expect("C1", "q", below=0)
    with pytest.raises(LedgerError, match="has no number"):
        stated.measure([1.0], reason="batches too large")


def test_what_is_not_finite_is_undecided_and_says_so(tmp_path):
    row = judged(tmp_path, [np.nan, 1.0], below=5)
    assert row.verdict == "undecided" and "nan" in row.reason


@pytest.mark.parametrize(
    ("values", "verdict", "said"),
    [
        ([2.0, 2.0], "holds", ""),
        ([1.0, 3.0], "undecided", "control does not fail: other batches"),
        ([0.5, 0.5], "undecided", "control does not fail: other batches"),
        ([np.nan, 2.0], "undecided", "control does not fail: other batches"),
    ],
)
def test_a_criterion_holds_only_where_its_control_fails(ledger, values, verdict, said):
    closer = ledger.expect("C9", "same batches", below=1)
    apart = closer.control("other batches")
    closer.measure([0.5, 0.5])
    apart.measure(values)
    row = ledger.verdict().rows.set_index("quantity").loc["same batches"]
    assert row.verdict == verdict and said in row.reason


def test_a_control_has_the_bounds_and_the_prediction_of_its_criterion(ledger):
    twice = ledger.expect("C4", "matched", predicted=lambda x: 2 * x, rel=0.1)
    other = twice.control("mismatched")
    twice.measure([2.0, 2.0], 1.0)
    other.measure([2.0, 2.0], 3.0)
    rows = ledger.verdict().rows.set_index("quantity")
    assert rows.criterion.tolist() == ["within 10 % of predicted"] * 2
    assert rows.role.tolist() == ["claim", "control"]
    assert rows.predicted.tolist() == [2.0, 6.0]
    assert rows.verdict.tolist() == ["holds", "fails"] and rows.reason.tolist() == ["", ""]


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({}, "exactly one of between, below"),
        ({"below": 1, "above": 0}, "exactly one of between, below"),
        ({"beneath": 1}, "exactly one of between, below"),
        ({"between": (2, 1)}, "the first must be the smaller"),
        ({"between": 1}, r"give 2 finite number"),
        ({"above": (1, 2)}, r"give 1 finite number"),
        ({"below": np.nan}, r"give 1 finite number"),
        ({"within": 0, "predicted": itself}, "a tolerance must be > 0"),
        ({"rel": -1, "predicted": itself}, "a tolerance must be > 0"),
        ({"rel": 0.1}, "state what is predicted"),
        ({"rel": 0.1, "predicted": 0.5}, "must be a function of the data"),
        ({"below": 1, "role": "contrl"}, "contrl"),
        ({"below": 1, "role": "control"}, "control"),  # of which criterion?
    ],
)
def test_criteria_that_make_no_sense(ledger, stated, message):
    with pytest.raises(ValueError, match=message):
        ledger.expect("C1", "q", **stated)


def test_order_is_enforced(ledger):
    with pytest.raises(LedgerError, match="nothing was stated"):
        ledger.verdict()
    with pytest.raises(ValueError, match="claim 3"):
        ledger.expect("claim 3", "q", below=1)
    best = ledger.expect("C1", "held-out best step", below=1)
    with pytest.raises(LedgerError, match="stated twice"):
        ledger.expect("C1", "held-out best step", below=2)
    with pytest.raises(LedgerError, match="stated twice"):
        best.control("held-out best step")
    with pytest.raises(LedgerError, match="not measured"):
        ledger.verdict()
    with pytest.raises(LedgerError, match="shape"):
        best.measure(np.ones((2, 2)))
    best.measure([0.5])
    with pytest.raises(LedgerError, match="measured twice"):
        best.measure([0.4])
    for late in (lambda: ledger.expect("C1", "late", below=1), lambda: best.control("late")):
        with pytest.raises(LedgerError, match="after a measurement"):
            late()


def test_predictions_are_functions_of_data_given_once(ledger):
    plain = ledger.expect("C1", "plain", below=1)
    relative = ledger.expect("C1", "relative", rel=0.1, predicted=itself)
    with pytest.raises(LedgerError, match="no prediction was stated"):
        plain.measure([0.5], 0.6)
    with pytest.raises(LedgerError, match="pass the data"):
        relative.measure([0.5])
    with pytest.raises(LedgerError, match="2 predictions for 3 seeds"):
        relative.measure([1, 2, 3], [1, 2])


def test_check_prints_text_that_depends_on_no_number(tmp_path, capsys):
    printed = []
    for values in ([0.1, 0.2], [7.0]):
        ledger = claims.Ledger(tmp_path, "01_test")
        ledger.expect("C3", "best step", between=(0.4, 0.6)).measure(values)
        ledger.check()
        printed.append(capsys.readouterr().out)
    assert printed == ["C3 claim: best step: 0.4 <= mean <= 0.6 [measured]\n"] * 2


def test_check_shows_what_is_missing(ledger, capsys):
    ledger.expect("C3", "a", below=1)
    ledger.expect("C3", "b", below=1).measure([np.nan])
    ledger.check()
    out = capsys.readouterr().out
    assert "a: mean < 1 [not measured]" in out and "b: mean < 1 [measured]" in out


@pytest.mark.parametrize(
    ("verdicts", "together"),
    [
        (["holds", "holds"], "holds"),
        (["fails", "fails"], "fails"),
        (["holds", "undecided"], "undecided"),
        (["undecided", "undecided"], "undecided"),
        (["holds", "fails"], "holds in part"),
        (["undecided", "fails"], "undecided"),
        (["holds", "undecided", "fails"], "holds in part"),
    ],
)
def test_what_the_criteria_of_a_claim_say_together(verdicts, together):
    roles = ["limit", "control"]
    others = pd.DataFrame({"claim": "C2", "role": roles, "verdict": "fails", "network": True})
    rows = pd.DataFrame({"claim": "C2", "role": "claim", "verdict": verdicts, "network": True})
    (found,) = claims.by_claim(pd.concat([others, rows]))
    assert (found.claim, found.verdict) == ("C2", together)
    assert found.counted.startswith(f"{verdicts.count('holds')} of {len(verdicts)} criteria hold")


def test_rows_without_a_network_are_counted_apart(tmp_path):
    ledger = claims.Ledger(tmp_path, "05_model", network=False)
    ledger.expect("C5", "q", below=1).measure([0.0, 0.0])
    (found,) = claims.by_claim(ledger.verdict().rows)
    assert found.counted == "1 of 1 criteria hold, of the model alone, without a network"


def write(results, notebook, claim, quantities, value=0.5):
    ledger = claims.Ledger(results, notebook)
    stated = [ledger.expect(claim, quantity, below=1) for quantity in quantities]
    for criterion in stated:
        criterion.measure([value, value])
    ledger.verdict()


def test_a_rerun_replaces_its_own_file_and_rows_go_by_claim_then_as_stated(tmp_path):
    write(tmp_path, "01_late", "C10", ["z"], value=1 / 3)
    write(tmp_path, "02_early", "C2", ["b", "a"])
    before = (tmp_path / "claims" / "01_late.csv").read_bytes()
    write(tmp_path, "02_early", "C2", ["c", "b"], value=2.0)
    df = claims.table(tmp_path)
    said = list(zip(df.claim, df.quantity, df.verdict, strict=True))
    assert said == [("C2", "c", "fails"), ("C2", "b", "fails"), ("C10", "z", "holds")]
    assert list(df.columns) == claims.COLUMNS
    write(tmp_path, "01_late", "C10", ["z"], value=1 / 3)
    assert (tmp_path / "claims" / "01_late.csv").read_bytes() == before


def test_table_without_claims(tmp_path):
    with pytest.raises(FileNotFoundError, match="make figures"):
        claims.table(tmp_path)


def test_markdown_has_claims_first_and_says_what_a_control_must_do(ledger):
    limit = ledger.expect("C1", "limit", role="limit", above=1)
    slope = ledger.expect("C1", "|slope|", below=1)
    control = slope.control("random path")
    limit.measure([2.0, 2.0])
    slope.measure(around(0.5))
    control.measure([2.0, 2.0])
    lines = claims.markdown(ledger.verdict().rows).splitlines()
    assert lines[2].startswith("| C1 | claim | \\|slope\\| |  | 0.500 ± 0.040 (n = 3) | mean < 1 |")
    assert lines[3].endswith("| mean < 1 | fails, as it must |")
    assert "| limit | limit |" in lines[4]


@pytest.mark.parametrize(
    ("mean", "spread", "text"),
    [
        (1.00237, 0.00199, "1.0024 ± 0.0020"),
        (12437.0, 342.0, "12440 ± 340"),
        (4.88e-05, 0.0003, "0.00005 ± 0.00030"),
        (-0.001, 0.5, "0.00 ± 0.50"),
        (0.001, 0.0999, "0.00 ± 0.10"),
        (5.0, 9.96, "5 ± 10"),
        (0.0, 0.0, "0 ± 0"),
        (3e-13, 1.2e-14, "3e-13 ± 1.2e-14"),
        (2.0, np.nan, "2"),
        (np.nan, np.nan, "nan"),
        (np.inf, np.inf, "inf ± inf"),
    ],
)
def test_mean_and_spread_have_the_same_last_digit(mean, spread, text):
    assert claims.with_spread(mean, spread) == text


def test_jupyter_shows_whole_sentences(ledger):
    quantity, reason = "a quantity " * 10, "because 1 " * 30
    ledger.expect("C1", quantity, below=0).measure([1.0, 1.0], reason=reason)
    shown = ledger.verdict()._repr_markdown_()
    assert shown.startswith("**C1 fails**: 0 of 1 criteria hold, 1 fails.\n\n| claim |")
    assert quantity in shown and reason in shown


def stated() -> str:
    """What all notebooks' ledgers state, as the last cell of each prints it."""
    texts = []
    for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        outputs = json.loads(path.read_text())["cells"][-1]["outputs"]
        texts += ["".join(output["text"]) for output in outputs]
    return "".join(texts)


@pytest.mark.parametrize("claim", claims.CLAIMS)
def test_every_claim_has_few_criteria_and_a_control(claim):
    lines = [line for line in stated().splitlines() if line.startswith(f"{claim} ")]
    assert (
        3 <= sum(line.startswith(f"{claim} claim:") for line in lines) <= 6 + 12 * (claim == "C10")
    )
    assert any(line.startswith(f"{claim} control:") for line in lines)
