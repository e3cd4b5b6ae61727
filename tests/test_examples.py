"""The examples at reduced size: trained by their own loops, then looked at as notebooks do."""

import importlib.util
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from paper_lib import runs
from paper_lib.averaging import cooldown, vectors
from paper_lib.experiments import alignment, fixed_batch, one_step
from paper_lib.probing.evaluation import evaluators
from scripts import notebooks

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = {
    "diabetes": {"STEPS": 40, "RECORD": "0-4,20-36,40"},
    "language_model": {
        "STEPS": 24,
        "RECORD": "0-3,8-20,24",
        "BATCH": 4,
        "TRAIN": ("a", "b"),
        "TEST": ("r", "s"),
    },
    "resnet18": {"STEPS": 14, "RECORD": "0,4-14", "BATCH": 8},
}


@pytest.fixture
def example(request, tmp_path, monkeypatch):
    """The module of an example that has trained one seed of a few steps."""
    monkeypatch.setenv("PAPER_RUNS", str(tmp_path / "runs"))
    spec = importlib.util.spec_from_file_location(request.param, EXAMPLES / f"{request.param}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    changes = {"PLACE": tmp_path / "trained", "SEEDS": (0,), **SMALL[request.param]}
    for name, value in changes.items():
        monkeypatch.setattr(module, name, value)
    module.train(0)
    return module


@pytest.mark.parametrize("example", SMALL, indirect=True)
def test_its_figures_can_be_drawn(example):
    study = example.study()
    (window,) = runs.train(study, study.stationary())
    start, last = study.run.steps, study.run.steps + study.window
    along = one_step.along_own_step([window], [start], n_held=2).set_index("probe")
    assert along.own[1] != along.own[0] and np.isfinite(along.to_numpy()).all()
    assert np.isfinite(one_step.measure([window], [start], n_held=2).own).all()
    path = fixed_batch.along(window, start, last, 3)
    pairs = fixed_batch.convexity([window], [path], [start], "window")
    assert np.isfinite(pairs.midpoint).all()
    first = start + (window.config.momentum > 0)
    assert np.isfinite(alignment.measure_lags([window], first, 3, 2, 1).used).all()
    rows = [vectors.named("uniform 4", study.window + 1)]
    rows += [cooldown.step_weights(range(study.window + 1), "linear")]
    evaluate = evaluators([window], 32)[0]
    points = [vectors.average(a, window.window(start, last)) for a in rows]
    assert np.isfinite(evaluate.table(points, pd.DataFrame(index=range(2))).test_loss).all()


def test_a_notebook_of_make_draws_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPER_RUNS", str(tmp_path / "runs"))
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import diabetes

    changes = {"PLACE": tmp_path / "trained", "SEEDS": (0, 1), **SMALL["diabetes"]}
    for name, value in changes.items():
        monkeypatch.setattr(diabetes, name, value)
    for seed in diabetes.SEEDS:
        diabetes.train(seed)
    file = tmp_path / "mine.py"
    lines = ["import sys", "from pathlib import PosixPath, WindowsPath"]
    lines += [f"sys.path.insert(0, {str(EXAMPLES)!r})", "import diabetes"]
    lines += [f"diabetes.{name} = {value!r}" for name, value in changes.items()]
    file.write_text("\n".join([*lines, "study = diabetes.study", ""]))
    monkeypatch.setenv("PAPER_RESULTS", str(tmp_path / "results"))
    monkeypatch.setattr(notebooks, "BUILD", tmp_path / "build")
    stamp, source = tmp_path / "build" / "stamp", notebooks.SOURCES / "14_any_run.ipynb"
    assert notebooks.run("14_any_run", str(file), [], stamp, [source])
    made = tmp_path / "results" / "mine"
    assert {"figures/14_any_run.png", "notebooks/14_any_run.ipynb"} <= {
        path.relative_to(made).as_posix() for path in made.rglob("*.*")
    }
