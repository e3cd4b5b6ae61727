"""Notebooks: the form that all of them keep, what a result depends on, and that nothing unfinished passes for done."""

import ast
import json
import os
import re
from collections import Counter

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from paper_lib.errors import ConfigError
from paper_lib.results import environment, execution, notebooks

SOURCES = notebooks.sources()


# --- the form that every notebook keeps --------------------------------------------------------------------------


def parsed(cell):
    return ast.parse(notebooks.code(cell))


def problems(notebook):
    """What is wrong with the form of a source notebook, one line each."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    parameters = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    if len(parameters) != 1:
        return [f"{len(parameters)} cells tagged 'parameters', not one"]
    found = []
    for statement in parsed(parameters[0]).body:
        try:
            ast.literal_eval(statement.value)
        except (AttributeError, ValueError):
            found.append(f"not a literal parameter: {ast.unparse(statement)}")
    names = {node.id for node in ast.walk(parsed(parameters[0])) if isinstance(node, ast.Name)}
    used = {
        node.id
        for cell in cells
        if cell not in parameters
        for node in ast.walk(parsed(cell))
        if isinstance(node, ast.Name)
    }
    found += [f"parameter {name} is never used" for name in sorted(names - used)]
    if not {"preset", "seeds"} <= names:
        found.append("parameters must include preset and seeds")
    checked = [cell for cell in cells if execution.CHECKED in cell.source]
    found += [] if checked else ["no cell whose output is checked"]
    found += [f"no stored output to check: {cell.source!r}" for cell in checked if not cell.outputs]
    found += [f"stored output: {cell.source[:60]!r}" for cell in cells if cell.outputs and cell not in checked]
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        found.append("the kernel is not python3")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_form(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert problems(notebook) == []


def test_no_function_is_defined_in_two_notebooks():
    defined = Counter()
    for path in SOURCES:
        trees = [parsed(cell) for cell in json.loads(path.read_text())["cells"]]
        functions = (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
        defined.update({function.name for function in functions})
    assert [name for name, count in defined.items() if count > 1] == [], "move it to paper_lib"


# --- a notebook of our own ---------------------------------------------------------------------------------------


def small_notebook():
    parameters = new_code_cell('preset = "digits"\nseeds = None', metadata={"tags": ["parameters"]})
    work = new_code_cell("from paper_lib import claims\n\nprint(preset, seeds)")
    check = new_code_cell(f"# {execution.CHECKED}\nprint(1)", outputs=[new_output("stream", name="stdout", text="1\n")])
    cells = [new_markdown_cell("# Small"), parameters, work, check]
    return new_notebook(cells=cells, metadata=execution.METADATA)


def test_the_small_notebook_has_no_problems():
    assert problems(small_notebook()) == []


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda nb: nb.cells[1].metadata.clear(), "0 cells tagged"),
        (lambda nb: nb.cells[1].update(source="preset = 'digits'\nseeds = None\nn = 2 * 3"), "not a literal"),
        (lambda nb: nb.cells[1].update(source="preset = 'digits'\nseeds = None\nn = 2"), "n is never used"),
        (lambda nb: nb.cells[1].update(source="preset = 'digits'"), "must include"),
        (lambda nb: nb.cells[3].update(outputs=[]), "no stored output"),
        (lambda nb: nb.cells[3].update(source="print(1)"), "no cell whose output is checked"),
        (lambda nb: nb.cells[2].update(outputs=nb.cells[3].outputs), "stored output"),
        (lambda nb: nb.metadata.clear(), "kernel"),
    ],
)
def test_problems_are_found(spoil, message):
    notebook = small_notebook()
    spoil(notebook)
    assert any(message in problem for problem in problems(notebook))


# --- what a result depends on ------------------------------------------------------------------------------------


def test_imports_are_found_in_every_form():
    lines = (
        "import paper_lib.claims, numpy",
        "from paper_lib import figures, errors",
        "from paper_lib.files import lock",
    )
    source = "\n".join(lines)
    assert {path.stem for path in notebooks.imported_modules(source)} == {"claims", "figures", "errors", "files"}


def test_magics_are_not_python():
    cell = {"cell_type": "code", "source": ["%matplotlib inline\n", "x = 1\n", "!ls"]}
    assert notebooks.code(cell) == "x = 1"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A repository of one notebook, whose execution is replaced by a function that tests may replace in turn."""
    monkeypatch.setattr(notebooks, "SOURCES", tmp_path / "notebooks")
    monkeypatch.setattr(notebooks, "BUILD", tmp_path / ".build")
    monkeypatch.setattr(environment, "describe", lambda: {"commit": "abc"})
    monkeypatch.setattr(execution, "execute", lambda source, draft, parameters: small_notebook())
    monkeypatch.setenv("PAPER_RESULTS", str(tmp_path / "results"))
    (tmp_path / "notebooks").mkdir()
    nbformat.write(small_notebook(), tmp_path / "notebooks" / "01_small.ipynb")
    return tmp_path


def task(**changes):
    return notebooks.Task(**{"name": "01_small", "preset": "smoke", **changes})


def touch(path):
    later = path.stat().st_mtime_ns + 10**12
    os.utime(path, ns=(later, later))


def test_prerequisites_follow_imports(project):
    names = {path.name for path in notebooks.prerequisites(task().source)}
    assert {"01_small.ipynb", "environment.yml", "claims.py", "files.py", "errors.py"} <= names
    assert "notebooks.py" not in names


def test_prerequisites_follow_the_names_of_datasets():
    names = {path.name for path in notebooks.prerequisites(notebooks.SOURCES / "01_one_step.ipynb")}
    assert {"digits.py", "images.py", "cifar.py", "augment.py", "files.py"} <= names


def test_a_result_is_current_until_something_changes(project):
    assert not task().is_current()
    notebooks.run(task())
    assert task().is_current()
    assert not task(seeds=(0, 1)).is_current()
    assert not task(preset="digits").is_current()
    task().target.unlink()
    assert not task().is_current()


def test_a_newer_notebook_is_out_of_date(project):
    notebooks.run(task())
    touch(task().source)
    assert not task().is_current()


def test_a_newer_module_is_out_of_date(project, monkeypatch):
    module = project / "module.py"
    module.touch()
    monkeypatch.setattr(notebooks, "prerequisites", lambda notebook: {notebook, module})
    notebooks.run(task())
    assert task().is_current()
    touch(module)
    assert not task().is_current()


def test_a_change_during_the_run_counts(project, monkeypatch):
    def edited_meanwhile(source, draft, parameters):
        source.write_text(source.read_text() + "\n")
        return small_notebook()

    monkeypatch.setattr(execution, "execute", edited_meanwhile)
    os.utime(task().source, (0, 0))
    notebooks.run(task())
    assert not task().is_current()


def test_going_back_to_earlier_seeds_reruns(project):
    notebooks.run(task(seeds=(0,)))
    notebooks.run(task(seeds=(0, 1)))
    assert not task(seeds=(0,)).is_current()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_run_leaves_the_old_result_and_stays_out_of_date(project, monkeypatch, error):
    notebooks.run(task())
    before = task().target.read_bytes()
    touch(task().source)

    def interrupted(source, draft, parameters):
        raise error

    monkeypatch.setattr(execution, "execute", interrupted)
    with pytest.raises(error):
        notebooks.run(task())
    assert task().target.read_bytes() == before
    assert not task().is_current()


def test_a_current_result_is_not_run_again(project, monkeypatch):
    notebooks.run(task())
    monkeypatch.setattr(execution, "execute", None)  # calling it would fail
    notebooks.run(task())


def test_environment_json_keeps_each_notebooks_time(project):
    nbformat.write(small_notebook(), project / "notebooks" / "02_more.ipynb")
    notebooks.run(task(name="02_more"))
    notebooks.run(task())
    recorded = json.loads((project / "results" / "smoke" / "environment.json").read_text())
    assert list(recorded["notebooks"]) == ["01_small", "02_more"]
    assert recorded["notebooks"]["01_small"] == {"seconds": 0, "commit": "abc"}


def test_what_cannot_work_is_said_before_anything_runs():
    with pytest.raises(ConfigError, match="did you mean 'smoke'"):
        task(preset="smokey")
    with pytest.raises(ConfigError, match="seeds"):
        task(seeds=(1, 1))


def test_command_line(project, capsys):
    assert notebooks.main(["outdated", "--preset", "smoke"]) == 0
    assert capsys.readouterr().out == "01_small\n"
    assert notebooks.main(["run", "--preset", "smoke", "--seeds", "0", "1"]) == 0
    assert task(seeds=(0, 1)).is_current()
    assert notebooks.main(["outdated", "--preset", "digitz"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search("digitz.*smoke, digits, cifar10", error)


# --- what of an execution is kept --------------------------------------------------------------------------------


def executed_notebook():
    notebook = small_notebook()
    notebook.metadata["papermill"] = {"input_path": "/somewhere", "start_time": "now"}
    cell = notebook.cells[2]
    cell.metadata["execution"] = {"iopub.execute_input": "now"}
    widget = {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "bar"}
    cell.outputs = [
        new_output("stream", name="stderr", text="50 %"),
        new_output("display_data", data=widget),
        new_output("stream", name="stdout", text=f"{notebooks.ROOT}/results/x"),
    ]
    notebook.cells.insert(2, new_code_cell("preset = 'smoke'", metadata={"tags": ["injected-parameters"]}))
    for count, code_cell in enumerate(notebook.cells[1:], start=1):
        code_cell.execution_count = count
    return notebook


def test_published_notebooks_hold_no_times_progress_or_machine_paths():
    kept = execution.publishable(executed_notebook())
    nbformat.validate(kept)
    assert kept.metadata == execution.METADATA
    assert [output.get("text") for output in kept.cells[3].outputs] == ["./results/x"]
    assert kept.cells[3].metadata == {}
    assert kept.cells[1].metadata == {"tags": ["parameters"]}
    text = nbformat.writes(kept)
    assert "/somewhere" not in text
    assert text == nbformat.writes(execution.publishable(executed_notebook_with_ids_of(kept)))


def executed_notebook_with_ids_of(other):
    """The same execution again: papermill gives the cell that it injects another random id every time."""
    notebook = executed_notebook()
    for cell, known in zip(notebook.cells, other.cells, strict=True):
        if "injected-parameters" not in cell.metadata.get("tags", []):
            cell.id = known.id
    return notebook


def test_refreshing_stores_the_outputs_of_checked_cells_only():
    executed = executed_notebook()
    source = small_notebook()
    for cell, ran in zip(source.cells, [cell for i, cell in enumerate(executed.cells) if i != 2], strict=True):
        cell.id = ran.id
    source.cells[3].outputs = []
    stored = execution.with_checked_outputs(source, executed)
    assert [bool(cell.get("outputs")) for cell in stored.cells] == [False, False, False, True]
    assert problems(stored) == []


def test_smoke_copies_keep_stored_outputs(tmp_path):
    source = tmp_path / "01_small.ipynb"
    nbformat.write(small_notebook(), source)
    execution.write_smoke(source, tmp_path / "copies")
    copy = nbformat.read(tmp_path / "copies" / source.name, as_version=4)
    assert 'preset = "smoke"' in copy.cells[2].source
    assert copy.cells[-1].outputs[0].text == "1\n"


def test_a_real_execution_with_papermill(tmp_path):
    source = tmp_path / "01_small.ipynb"
    notebook = small_notebook()
    notebook.cells[2].source = "import sys\n\nprint('half way', file=sys.stderr)\nprint(preset, seeds)"
    nbformat.write(notebook, source)
    executed = execution.execute(source, tmp_path / "out" / "x.ipynb", {"preset": "smoke", "seeds": [3]})
    execution.publish(executed, tmp_path / "published.ipynb")
    published = nbformat.read(tmp_path / "published.ipynb", as_version=4)
    assert [output.text for output in published.cells[3].outputs] == ["smoke [3]\n"]


def test_a_failing_notebook_names_its_error(tmp_path):
    source = tmp_path / "01_small.ipynb"
    notebook = small_notebook()
    notebook.cells[2].source = "1 / 0"
    nbformat.write(notebook, source)
    with pytest.raises(execution.ExecutionError, match="ZeroDivisionError"):
        execution.execute(source, tmp_path / "x.ipynb", {})
