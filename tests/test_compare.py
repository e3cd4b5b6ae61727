"""Comparing with the committed results: each tolerance from both sides, and the files that take part."""

import subprocess

import numpy as np
import pandas as pd
import pytest

from paper_lib.results import claims, compare


def claim(measured, spread=0.0, holds=True, criterion="mean < 1", quantity="q"):
    row = ["C1", quantity, np.nan, measured, spread, 3, criterion, holds, "01_one", ""]
    return pd.DataFrame([row], columns=claims.COLUMNS)


@pytest.mark.parametrize(
    ("old", "new", "agrees"),
    [
        (claim(1.0), claim(1.049), True),
        (claim(1.0), claim(1.051), False),
        (claim(1.0, 0.3), claim(2.49, 0.4), True),  # 3 * hypot(.3, .4) = 1.5
        (claim(1.0, 0.3), claim(2.51, 0.4), False),
        (claim(1.0), claim(1.0, holds=False), False),
        (claim(1.0), claim(1.0, criterion="mean < 2"), False),
        (claim(1.0), claim(np.nan), False),
        (claim(np.nan), claim(np.nan), True),
        (claim(1.0, np.nan), claim(1.01, np.nan), True),  # a single seed has no spread
    ],
)
def test_claims(old, new, agrees):
    assert (compare.compare_claims(old, new) == []) is agrees


def test_claims_that_came_or_went_are_named():
    lines = compare.compare_claims(claim(1.0, quantity="gone"), claim(1.0, quantity="new"))
    assert sorted(lines) == [
        "01_one, C1, gone: only in the committed results",
        "01_one, C1, new: only in the new results",
    ]


def curve(scale=1.0, label="a", **columns):
    return pd.DataFrame({"x": [1, 2, 3], "mean": scale * np.array([1.0, -2.0, 2.0]), "kind": label, **columns})


@pytest.mark.parametrize(
    ("old", "new", "agrees"),
    [
        (curve(), curve(1.09), True),
        (curve(), curve(1.11), False),
        (curve(spread=0.2), curve(1.3, spread=0.7), True),  # moves by .52 rms, 3 spreads are .6
        (curve(spread=0.1), curve(1.3, spread=0.7), False),
        (curve(), curve(label="b"), False),
        (curve(), curve().iloc[:2], False),
        (curve(), curve(extra=1), False),
        (curve(), curve(np.nan), False),
        (curve(np.nan), curve(np.nan), True),
    ],
)
def test_figures(old, new, agrees):
    assert (compare.compare_figure(old, new) == []) is agrees


@pytest.fixture
def repository(tmp_path):
    def git(*words):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    results = tmp_path / "results"
    (results / "figures").mkdir(parents=True)
    claim(1.0).to_csv(results / "claims.csv", index=False)
    curve().to_csv(results / "figures" / "one.csv", index=False)
    git("init")
    git("add", ".")
    git("commit", "-m", "results")
    return results


def test_unchanged_results_agree(repository, capsys):
    assert compare.compare(repository) == 0
    assert "2 of 2 files agree" in capsys.readouterr().out


def test_what_moved_is_printed(repository, capsys):
    claim(2.0).to_csv(repository / "claims.csv", index=False)
    curve().to_csv(repository / "figures" / "two.csv", index=False)
    assert compare.compare(repository) == 1
    out = capsys.readouterr().out
    assert "01_one, C1, q: measured 1 -> 2" in out
    assert "figures/two.csv: DIFFERS\n  not committed" in out
    assert "1 of 3 files agree" in out


def test_no_results(tmp_path, capsys):
    assert compare.compare(tmp_path) == 2
    assert "make figures" in capsys.readouterr().err
