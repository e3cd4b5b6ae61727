"""The Makefile: its own list of tasks, what it tells the library, and errors without tracebacks."""

import os
import re
import subprocess
import sys

import pytest

from paper_lib.results.environment import ROOT

PRINT_SETTINGS = """#!/bin/sh
case "$*" in *outdated*) exit 0;; esac
echo "$@"
echo "$PAPER_DATA $PAPER_RESULTS $PAPER_RUNS"
"""


@pytest.fixture
def make(tmp_path):
    """Run make in the repository with an interpreter that prints what it is asked, or the one given as PY."""
    stub = tmp_path / "python"
    stub.write_text(PRINT_SETTINGS)
    stub.chmod(0o755)

    def run(*words, **variables):
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS", "PAPER"))}
        variables = [f"{key}={value}" for key, value in {"PY": stub, **variables}.items()]
        return subprocess.run(
            ["make", *words, *variables], cwd=ROOT, env=inherited, capture_output=True, text=True, timeout=120
        )

    return run


def test_help_is_the_default_and_names_every_task(make):
    shown = make()
    assert shown.returncode == 0
    assert shown.stdout == make("help").stdout
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[1]
    for target in phony.replace("$(NOTEBOOKS)", "").split():
        assert re.search(rf"^  make {target} +\S", shown.stdout, flags=re.MULTILINE), target


def test_train_is_told_preset_seeds_and_absolute_folders(make):
    done = make("train", CONFIG="smoke", SEEDS="3 4", DATA="d", RESULTS="/r", RUNS="s")
    asked, folders = done.stdout.splitlines()[-2:]
    assert asked == "-m paper_lib train --preset smoke --seeds 3 4"
    assert folders == f"{ROOT}/d /r {ROOT}/s"


def test_figures_with_nothing_out_of_date(make):
    done = make("figures", CONFIG="smoke", JOBS="2")
    assert done.returncode == 0
    assert "up to date in results/smoke" in done.stdout


@pytest.mark.parametrize("target", ["figures", "train"])
def test_unknown_preset_is_one_line_that_names_them(make, target):
    done = make(target, CONFIG="digitz", PY=sys.executable)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert "did you mean 'digits'? (allowed: smoke, digits, cifar10_small," in line


@pytest.mark.parametrize("task", ["01_one_steps", "tests"])
def test_an_unknown_task_is_one_line(make, task):
    done = make(task)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.splitlines()[0] == f"no such task: {task}; see make help"


def test_continuous_integration_runs_make_test():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == "make test"
    assert ".ci/run" in (ROOT / ".github" / "workflows" / "test.yml").read_text()
