"""The README's tables are those of the committed results, and a preset's page holds everything it shows."""

import html
import re
import subprocess

import pandas as pd
import pytest

from paper_lib.results import report
from paper_lib.results.environment import ROOT


def test_the_readmes_tables_are_current():
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "results"], cwd=ROOT, check=False).returncode == 1
    if changed:
        pytest.skip("results were regenerated and not committed: `make readme` brings the README up to date")
    text = report.README.read_text()
    assert len(report.BLOCK.findall(text)) >= 3
    assert report.updated(text) == text, "run `make readme`"


@pytest.fixture
def results(tmp_path):
    """Results of two notebooks, the second claim failing."""
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "01_one_step.png").write_bytes(b"picture")
    (tmp_path / "environment.json").write_text('{"notebooks": {"01_one_step": {"seconds": 12.3}}}')
    columns = "claim,quantity,predicted,measured,spread,seeds,criterion,holds,notebook,reason".split(",")
    rows = [
        ["C3", "a", 0.5, 0.51, 0.02, 3, "0.4 to 0.6", True, "01_one_step", ""],
        ["C3", "b < c", 1.0, 2.0, 0.1, 3, "below 1", False, "01_one_step", "too <large>"],
    ]
    pd.DataFrame(rows, columns=columns).to_csv(tmp_path / "claims.csv", index=False)
    return tmp_path


def test_claims_say_how_many_hold_and_why_others_fail(results, monkeypatch):
    monkeypatch.setattr(report, "ROOT", results.parent)
    table = report.claims_table(results)
    assert table.startswith(f"1 of 2 criteria hold. [Every criterion]({results.name}/claims.md)")
    assert f"| C3 | [01_one_step]({results.name}/notebooks/01_one_step.ipynb) | 1 of 2 | too <large> |" in table


def test_a_page_needs_no_other_file(results):
    text = report.page(results, "digits & more")
    assert "digits &amp; more" in text and "too &lt;large&gt;" in text
    assert 'src="data:image/png;base64,cGljdHVyZQ=="' in text
    assert not re.search(r'src="(?!data:)', text)
    assert html.escape(report.notebook_title("01_one_step")) in text


def test_unknown_presets_and_missing_results_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PAPER_RESULTS", str(tmp_path))
    for preset, message in (("digts", "did you mean 'digits'"), ("digits", "no claims at")):
        assert report.main(["page", preset, str(tmp_path / "page.html")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_only_marked_blocks_change():
    text = "before\n<!-- begin claims digits -->\nold\n<!-- end claims digits -->\nafter\n"
    if (ROOT / "results" / "digits" / "claims.csv").exists():
        new = report.updated(text)
        assert new.startswith("before\n") and new.endswith("after\n") and "\nold\n" not in new and "| claim |" in new
