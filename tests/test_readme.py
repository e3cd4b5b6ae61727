"""The examples for a reader's own network and training loop run as they are printed."""

import os
import re
import subprocess
import sys

from paper_lib.results import claims
from scripts import ROOT, readme_example, report


def example(heading: str) -> str:
    """The one fenced block of Python under a heading of docs/your-own.md."""
    return readme_example.example((ROOT / "docs" / "your-own.md").read_text(), heading)


def run(code, folder):
    """Run an example in a folder of its own; return what it prints."""
    places = {
        "PAPER_RUNS": str(folder / "runs"),
        "MPLBACKEND": "agg",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | places,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_probe_your_own_network_makes_its_figure_in_at_most_15_lines(tmp_path):
    code = example("Probe your own network")
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 15
    run(code, tmp_path)
    assert (tmp_path / "own_network.png").stat().st_size > 10_000
    assert len([p for p in (tmp_path / "runs").iterdir() if p.is_dir()]) == 3


def test_a_cooldown_from_your_own_checkpoints_beats_the_last_one(tmp_path):
    printed = run(
        "import torch; torch.manual_seed(0)\n" + example("A cooldown from your own checkpoints"),
        tmp_path,
    )
    last, cooled = (float(number) for number in re.findall(r"0\.\d+", printed))
    assert cooled > last
    assert len(list((tmp_path / "checkpoints").iterdir())) == 20


def test_the_monitor_watches_a_training_loop(tmp_path):
    printed = run(example("Let the gradients say when to average, or to slow down"), tmp_path)
    assert re.search(r"step \d+: stationary, lr 0\.05, t = -\d", printed)
    assert float(re.search(r"a loss lower by (\S+)", printed)[1]) > 0


def test_the_readme_is_short_and_its_tables_hold_few_words():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150 and len(text.split()) <= 1200
    rows = [line for line in text.splitlines() if line.startswith("|")]
    cells = [cell for row in rows for cell in row.strip("|").split("|")]
    assert max(len(cell.split()) for cell in cells) <= 25


def test_what_was_found_is_a_sentence_of_at_most_15_words_a_claim():
    results = ROOT / "results" / "digits"
    said = report.found(results, claims.table(results))
    assert list(said) == list(claims.CLAIMS)
    for claim, (sentence, _) in said.items():
        assert len(sentence.split()) <= 15, claim
