"""The ledger: criteria before measurements, verdicts as stated, one file a notebook."""

import numpy as np
import pandas as pd
import pytest

from paper_lib.results import claims
from paper_lib.results.claims import LedgerError


@pytest.fixture
def ledger(tmp_path):
    return claims.Ledger(tmp_path, "01_test")


def judged(tmp_path, values, predicted=None, stated=None, **criterion):
    ledger = claims.Ledger(tmp_path, "01_test")
    ledger.expect("C1", "q", predicted=stated, **criterion)
    ledger.measure("q", values, predicted)
    return ledger.verdict().rows.iloc[0]


@pytest.mark.parametrize(
    ("criterion", "values", "predicted", "holds"),
    [
        ({"between": (0.4, 0.6)}, [0.3, 0.5], None, True),  # the mean, 0.4, lies on the bound
        ({"between": (0.4, 0.6)}, [0.3, 0.49], None, False),
        ({"below": 1}, [0.9, 1.1], None, False),  # strict
        ({"below": 1}, [0.9, 1.0], None, True),
        ({"above": 0}, [-1, 1], None, False),
        ({"above": 0}, [-1, 1.1], None, True),
        ({"within": 0.25}, [1.0, 2.0], 1.75, True),
        ({"within": 0.24}, [1.0, 2.0], 1.75, False),
        ({"rel": 0.1}, [-1.05, -1.14], -1.0, True),
        ({"rel": 0.1}, [-1.05, -1.17], -1.0, False),
        ({"within": 0.1}, [1.0, 5.0], [2.0, 4.0], True),  # one prediction per seed: means count
        ({"above": 0}, [np.inf, 1], None, False),
        ({"below": 0}, [np.nan, -1], None, False),
        ({"below": 0}, [], None, False),
    ],
)
def test_criterion_is_judged_on_the_mean_over_seeds(tmp_path, criterion, values, predicted, holds):
    assert bool(judged(tmp_path, values, predicted, **criterion)["holds"]) is holds


def test_row_has_mean_sample_spread_seeds_and_prediction(tmp_path):
    row = judged(tmp_path, [1.0, 2.0, 3.0], stated=2.5, within=1)
    assert (row.measured, row.spread, row.seeds, row.predicted) == (2.0, 1.0, 3, 2.5)
    assert row.criterion == "within 1 of predicted"
    assert list(row.index) == claims.COLUMNS


def test_reason_stands_only_beside_a_failure(ledger):
    for quantity, bound in (("good", 2), ("bad", 0)):
        ledger.expect("C1", quantity, below=bound)
    for quantity in ("good", "bad"):
        ledger.measure(quantity, [1.0], reason="batches too large")
    reasons = ledger.verdict().rows.set_index("quantity").reason.to_dict()
    assert reasons == {"good": "", "bad": "batches too large"}


def test_what_is_not_finite_fails_and_says_so(tmp_path):
    row = judged(tmp_path, [np.nan, 1.0], below=5)
    assert not row["holds"] and "nan" in row.reason


@pytest.mark.parametrize("criterion", [{}, {"below": 1, "above": 0}, {"beneath": 1}])
def test_exactly_one_criterion(ledger, criterion):
    with pytest.raises(LedgerError, match="exactly one of between, below"):
        ledger.expect("C1", "q", **criterion)


@pytest.mark.parametrize(
    "criterion",
    [
        {"between": (2, 1)},
        {"between": 1},
        {"within": 0},
        {"rel": -1},
        {"below": np.nan},
        {"above": (1, 2)},
    ],
)
def test_criteria_that_make_no_sense(ledger, criterion):
    with pytest.raises(LedgerError):
        ledger.expect("C1", "q", **criterion)


def test_order_is_enforced(ledger):
    with pytest.raises(LedgerError, match="nothing was expected"):
        ledger.verdict()
    with pytest.raises(LedgerError, match="write C1, C2"):
        ledger.expect("claim 3", "q", below=1)
    ledger.expect("C1", "held-out best step", below=1)
    with pytest.raises(LedgerError, match="expected twice"):
        ledger.expect("C1", "held-out best step", below=2)
    with pytest.raises(ValueError, match="did you mean 'held-out best step'"):
        ledger.measure("heldout best step", [0.5])
    with pytest.raises(LedgerError, match="not measured"):
        ledger.verdict()
    with pytest.raises(LedgerError, match="shape"):
        ledger.measure("held-out best step", np.ones((2, 2)))
    ledger.measure("held-out best step", [0.5])
    with pytest.raises(LedgerError, match="measured twice"):
        ledger.measure("held-out best step", [0.4])
    with pytest.raises(LedgerError, match="after a measurement"):
        ledger.expect("C1", "an afterthought", below=1)


def test_predictions_are_given_once_and_where_needed(ledger):
    ledger.expect("C1", "fixed", below=1, predicted=0.5)
    ledger.expect("C1", "relative", rel=0.1)
    with pytest.raises(LedgerError, match="already has a prediction"):
        ledger.measure("fixed", [0.5], predicted=0.6)
    with pytest.raises(LedgerError, match="no prediction"):
        ledger.measure("relative", [0.5])
    with pytest.raises(LedgerError, match="2 predictions for 3 seeds"):
        ledger.measure("relative", [1, 2, 3], predicted=[1, 2])


def test_check_prints_text_that_depends_on_no_number(tmp_path, capsys):
    printed = []
    for values in ([0.1, 0.2], [7.0]):
        ledger = claims.Ledger(tmp_path, "01_test")
        ledger.expect("C3", "best step", between=(0.4, 0.6))
        ledger.measure("best step", values)
        ledger.check()
        printed.append(capsys.readouterr().out)
    assert printed == ["C3  best step: 0.4 <= mean <= 0.6 [measured]\n"] * 2


def test_check_shows_what_is_missing_or_not_finite(ledger, capsys):
    ledger.expect("C3", "a", below=1)
    ledger.expect("C3", "b", below=1)
    ledger.measure("b", [np.nan])
    ledger.check()
    out = capsys.readouterr().out
    assert "a: mean < 1 [not measured]" in out and "b: mean < 1 [not finite]" in out


def write(results, notebook, claim, quantities, value=0.5):
    ledger = claims.Ledger(results, notebook)
    for quantity in quantities:
        ledger.expect(claim, quantity, below=1)
    for quantity in quantities:
        ledger.measure(quantity, [value, value])
    ledger.verdict()


def test_a_rerun_replaces_its_own_file_and_rows_go_by_claim_then_as_stated(tmp_path):
    write(tmp_path, "01_late", "C10", ["z"], value=1 / 3)
    write(tmp_path, "02_early", "C2", ["b", "a"])
    before = (tmp_path / "claims" / "01_late.csv").read_bytes()
    write(tmp_path, "02_early", "C2", ["c", "b"], value=2.0)
    df = claims.table(tmp_path)
    assert list(zip(df.claim, df.quantity, strict=True)) == [
        ("C2", "c"),
        ("C2", "b"),
        ("C10", "z"),
    ]
    assert df.holds.tolist() == [False, False, True]
    assert list(df.columns) == claims.COLUMNS
    write(tmp_path, "01_late", "C10", ["z"], value=1 / 3)
    assert (tmp_path / "claims" / "01_late.csv").read_bytes() == before


def test_table_without_claims(tmp_path):
    with pytest.raises(FileNotFoundError, match="make figures"):
        claims.table(tmp_path)


def test_markdown():
    rows = [
        ["C1", "|slope|", 0.5, 0.48, 0.01, 3, "mean < 1", True, "01", ""],
        ["C2", "ratio", np.nan, 2.0, np.nan, 1, "mean < 1", False, "02", "batch too large"],
    ]
    lines = claims.markdown(pd.DataFrame(rows, columns=claims.COLUMNS)).splitlines()
    assert lines[2] == "| C1 | \\|slope\\| | 0.5 | 0.480 ± 0.010 (n = 3) | mean < 1 | yes |"
    assert lines[3] == "| C2 | ratio |  | 2 (n = 1) | mean < 1 | **no**: batch too large |"


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
    quantity, reason = "a quantity " * 10, "because " * 30
    ledger.expect("C1", quantity, below=0)
    ledger.measure(quantity, [1.0], reason=reason)
    shown = ledger.verdict()._repr_markdown_()
    assert shown.startswith("0 of 1 criteria hold.\n\n| claim |")
    assert quantity in shown and reason in shown
