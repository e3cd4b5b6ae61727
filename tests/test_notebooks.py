"""Notebooks: the form that all keep, and that nothing unfinished passes for a result."""

import ast
import base64
import builtins
import copy
import dataclasses
import io
import json
import os
import re
import symtable
from collections import Counter
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pytest
from helpers import SmallNet, small_data
from hypothesis import given
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from paper_lib import presets
from paper_lib.config import RunConfig, Study
from paper_lib.errors import ConfigError
from paper_lib.files import remove
from paper_lib.results import claims
from scripts import dependencies, notebooks, stamps
from scripts.notebooks import NotebookError

SOURCES = notebooks.sources()


# --- the form that every notebook keeps ---------------------------------------------------------


def parsed(cell):
    return ast.parse(dependencies.code(cell))


def names_in(cells):
    trees = [parsed(cell) for cell in cells]
    return {node.id for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Name)}


def defined_and_read(cell):
    """The names that a cell defines for others, and those that it reads, in functions too."""
    scopes = [symtable.symtable(dependencies.code(cell), "cell", "exec")]
    symbols = scopes[0].get_symbols()
    defined = {s.get_name() for s in symbols if s.is_assigned() or s.is_imported()}
    for scope in scopes:
        scopes += scope.get_children()
    read = {
        symbol.get_name()
        for scope in scopes
        for symbol in scope.get_symbols()
        if symbol.is_referenced() and (scope is scopes[0] or symbol.is_global())
    }
    return defined, read


def undefined(cells):
    """The names that cells read, and neither they nor cells before them define."""
    known, found = set(dir(builtins)), set()
    for defined, read in map(defined_and_read, cells):
        known |= defined
        found |= read - known
    return found


LEFT_OUT = ([], [notebooks.LIMITS], [notebooks.LIMITS, notebooks.MORE_RUNS])
TAGS = {"parameters", *LEFT_OUT[-1]}


def problems_of_tags(notebook):
    """What is wrong with the cells that may be left out."""
    found, tags = [], [set(cell.metadata.get("tags", [])) for cell in notebook.cells]
    found += [f"unknown tags: {sorted(each - TAGS)}" for each in tags if each - TAGS]
    for cell, own in zip(notebook.cells, tags, strict=True):
        names = [node.value for node in ast.walk(parsed(cell)) if isinstance(node, ast.Constant)]
        if {"limit", "check"} & set(names) and notebooks.LIMITS not in own:
            found.append(f"a limit or check, not tagged {notebooks.LIMITS}: {cell.source[:60]!r}")
    for left_out in LEFT_OUT:
        names = undefined(notebooks.without(copy.deepcopy(notebook), left_out).cells)
        found += [f"not defined without {left_out}: {name}" for name in sorted(names)]
    return found


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
    names, used = names_in(parameters), names_in(c for c in cells if c not in parameters)
    found += [f"parameter {name} is never used" for name in sorted(names - used)]
    if not {"preset", "seeds"} <= names:
        found.append("parameters must include preset and seeds")
    checked = [cell for cell in cells if notebooks.CHECKED in cell.source]
    stored = [cell for cell in cells if cell.outputs and cell not in checked]
    found += [] if checked else ["no cell whose output is checked"]
    found += [f"no stored output to check: {cell.source!r}" for cell in checked if not cell.outputs]
    found += [f"stored output: {cell.source[:60]!r}" for cell in stored]
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        found.append("the kernel is not python3")
    return found + problems_of_tags(notebook)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_form(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert problems(notebook) == []


def test_no_function_is_defined_in_two_notebooks():
    defined = Counter()
    for path in SOURCES:
        trees = [parsed(cell) for cell in json.loads(path.read_text())["cells"]]
        nodes = [node for tree in trees for node in ast.walk(tree)]
        defined.update({node.name for node in nodes if isinstance(node, ast.FunctionDef)})
    assert [name for name, n in defined.items() if n > 1] == [], "what two need is in paper_lib"


STUDY = re.compile(r"^study = presets\.study\(.*\)$", flags=re.M)


@pytest.mark.parametrize(
    ("name", "left_out", "n_runs"),
    [("03_one_step", LEFT_OUT[1], 3), ("04_alignment", LEFT_OUT[2], 2)],
)
def test_a_notebook_reaches_its_verdict_without(name, left_out, n_runs, tmp_path, monkeypatch):
    for kind in ("RUNS", "RESULTS"):
        monkeypatch.setenv(f"PAPER_{kind}", str(tmp_path / kind.lower()))
    settings = {"lr": 0.1, "steps": 80, "seeds": [0, 1], "batch_size": 16}
    study = presets.own(small_data(600), SmallNet, **settings)
    notebook = nbformat.read(notebooks.SOURCES / f"{name}.ipynb", as_version=4)
    namespace = {"own": study}
    for cell in notebooks.without(notebook, left_out).cells:
        exec(STUDY.sub("study = own", dependencies.code(cell)), namespace)
    plt.close("all")
    assert set(claims.table(study.results).role) == {"claim", "control"}
    assert (study.results / "figures" / f"{name}.csv").exists()
    assert len(list((tmp_path / "runs").glob("[!.]*"))) == n_runs * len(study.seeds)


# --- a notebook of our own ----------------------------------------------------------------------


def small_notebook():
    literals = 'preset = "digits"\nseeds = None'
    parameters = new_code_cell(literals, metadata={"tags": ["parameters"]})
    work = new_code_cell("from paper_lib import claims\n\nprint(preset, seeds)")
    one = new_output("stream", name="stdout", text="1\n")
    check = new_code_cell(f"# {notebooks.CHECKED}\nprint(1)", outputs=[one])
    cells = [new_markdown_cell("# Small"), parameters, work, check]
    return new_notebook(cells=cells, metadata=notebooks.METADATA)


def test_the_small_notebook_has_no_problems():
    assert problems(small_notebook()) == []


TWO = "preset = 'digits'\nseeds = None\n"


def only_in(notebook, tag):
    """Leave a name that the checked cell uses to a cell with this tag."""
    notebook.cells[2].metadata["tags"] = [tag]
    notebook.cells[3].source = "def check():\n    return claims"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda nb: nb.cells[1].metadata.clear(), "0 cells tagged"),
        (lambda nb: nb.cells[1].update(source=f"{TWO}n = 2 * 3"), "not a literal"),
        (lambda nb: nb.cells[1].update(source=f"{TWO}n = 2"), "n is never used"),
        (lambda nb: nb.cells[1].update(source="preset = 'digits'"), "must include"),
        (lambda nb: nb.cells[3].update(outputs=[]), "no stored output"),
        (lambda nb: nb.cells[3].update(source="print(1)"), "no cell whose output is checked"),
        (lambda nb: nb.cells[2].update(outputs=nb.cells[3].outputs), "stored output"),
        (lambda nb: nb.metadata.clear(), "kernel"),
        (lambda nb: nb.cells[2].metadata.update(tags=["limit"]), "unknown tags: ['limit']"),
        (lambda nb: nb.cells[2].update(source="dict(role='limit')"), "not tagged limits"),
        (lambda nb: nb.cells[2].update(source="{'role': 'check'}"), "not tagged limits"),
        (lambda nb: nb.cells[2].update(source="[a for b in (1, 2)]"), "not defined without []: a"),
        (lambda nb: nb.cells[3].update(source="work = print\nwork(claims, n)"), "[]: n"),
        (lambda nb: only_in(nb, "limits"), "not defined without ['limits']: claims"),
        (lambda nb: only_in(nb, "more-runs"), "['limits', 'more-runs']: claims"),
    ],
)
def test_problems_are_found(spoil, message):
    notebook = small_notebook()
    spoil(notebook)
    assert any(message in problem for problem in problems(notebook))


# --- running one: nothing unfinished passes for a result ----------------------------------------


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A repository of two notebooks, executed by `execute`, which tests may replace."""
    for name, place in (("SOURCES", "notebooks"), ("BUILD", ".build"), ("ROOT", ".")):
        monkeypatch.setattr(notebooks, name, tmp_path / place)
    monkeypatch.setattr(notebooks, "describe", lambda: {"commit": "abc"})
    monkeypatch.setattr(notebooks, "execute", execute)
    monkeypatch.setenv("PAPER_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("PAPER_DATA", str(tmp_path / "data"))
    (tmp_path / "notebooks").mkdir()
    for name in ("01_small", "02_more"):
        nbformat.write(small_notebook(), tmp_path / "notebooks" / f"{name}.ipynb")
    return tmp_path


def execute(source, draft, parameters, left_out=(), figure="01_a.csv"):
    """Act as a notebook that saves one figure and prints where."""
    figures = notebooks.folder("results") / parameters["preset"] / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    (figures / figure).write_text(str(parameters))
    notebook = notebooks.without(small_notebook(), left_out)
    printed = new_output("stream", name="stdout", text=f"saved in {figures}")
    notebook.cells[2].outputs = [printed]
    return notebook


def run(project, name="01_small", seeds=()):
    """Run a notebook; the stamp's folder is named by the settings, as make does it."""
    stamp = project / ".build" / str(seeds) / name
    places = os.environ["PAPER_RESULTS"]
    try:
        return notebooks.run(name, "smoke", seeds, stamp, [project / f"notebooks/{name}.ipynb"])
    finally:
        os.environ["PAPER_RESULTS"] = places


def stamp(project):
    return project / ".build" / "()" / "01_small"


def test_a_run_publishes_all_that_was_made_and_lists_it(project):
    assert run(project)
    results = project / "results" / "smoke"
    made = [results / "figures" / "01_a.csv", results / "notebooks" / "01_small.ipynb"]
    assert list(json.loads(stamp(project).read_text())) == [str(path) for path in made]
    text = nbformat.read(made[1], as_version=4).cells[2].outputs[0].text
    assert text == "saved in results/smoke/figures"
    assert json.loads((results / "environment.json").read_text())["notebooks"] == {
        "01_small": {"seconds": 0, "commit": "abc"}
    }
    run(project, "02_more")
    recorded = json.loads((results / "environment.json").read_text())
    assert list(recorded["notebooks"]) == ["01_small", "02_more"]


@pytest.mark.parametrize("file", ["figures/01_a.csv", "notebooks/01_small.ipynb"])
@pytest.mark.parametrize("done", ["deleted", "emptied", "changed", "a folder"])
def test_a_result_that_is_not_as_it_was_made_is_made_again(project, file, done):
    run(project)
    path = project / "results" / "smoke" / file
    made = path.read_bytes()
    path.unlink()
    if done == "a folder":
        path.mkdir()
        assert not stamps.holds(stamp(project))
        return
    if done != "deleted":
        path.write_bytes(b"" if done == "emptied" else made[::-1])
    assert not stamps.holds(stamp(project))
    assert run(project) and len(path.read_bytes()) == len(made)
    assert stamps.holds(stamp(project)) and not run(project)


@pytest.mark.parametrize("content", ["", "{}", "[]", "3", "null", "\0", "x: y", '{"a": 1}', None])
def test_a_damaged_stamp_stands_for_nothing_and_goes(project, content):
    run(project)
    damaged = stamp(project)
    remove(damaged)
    damaged.mkdir() if content is None else damaged.write_text(content)
    assert not stamps.holds(damaged)
    stamps.main(damaged.parent)
    assert not damaged.exists() and run(project)


@pytest.mark.parametrize(
    "content", ["", "[]", '{"notebooks": 3}', '{"notebooks": {"01_small": 3}}']
)
def test_a_damaged_environment_is_written_again(project, content):
    run(project)
    path = project / "results" / "smoke" / "environment.json"
    path.write_text(content)
    assert run(project)
    assert list(json.loads(path.read_text())["notebooks"]) == ["01_small"]


def test_what_git_restores_is_believed_and_other_settings_overwrite(project, monkeypatch):
    run(project)
    run(project, seeds=(1,))
    assert not stamps.holds(stamp(project))
    files = list(map(Path, json.loads(stamp(project).read_text())))
    restored = {path: stamps.digest(path) for path in files}
    monkeypatch.setattr(stamps, "committed", lambda: restored)
    assert stamps.holds(stamp(project))
    files[0].write_text("neither")
    assert not stamps.holds(stamp(project))


def test_the_digest_is_gits(tmp_path):
    (tmp_path / "a").write_bytes(b"hello\n")
    assert stamps.digest(tmp_path / "a") == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_a_figure_that_is_no_longer_made_goes(project, monkeypatch):
    run(project)
    monkeypatch.setattr(notebooks, "execute", lambda *args: execute(*args, figure="01_b.csv"))
    (project / "results" / "smoke" / "figures" / "02_another.csv").touch()
    run(project, seeds=(1,))
    names = {path.name for path in (project / "results" / "smoke" / "figures").iterdir()}
    assert names == {"01_b.csv", "02_another.csv"}


def test_what_another_process_just_made_is_not_made_again(project, monkeypatch):
    run(project)
    monkeypatch.setattr(notebooks, "execute", None)  # calling it would fail
    assert not run(project)


def test_a_change_during_the_run_counts(project, monkeypatch):
    source = project / "notebooks" / "01_small.ipynb"

    def edited_meanwhile(*args):
        source.write_text(source.read_text() + "\n")
        return execute(*args)

    monkeypatch.setattr(notebooks, "execute", edited_meanwhile)
    run(project)
    assert stamp(project).stat().st_mtime_ns < source.stat().st_mtime_ns
    assert run(project)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_run_leaves_the_old_result_and_no_new_stamp(project, monkeypatch, error):
    run(project)
    results = project / "results" / "smoke"
    before = {path: path.read_bytes() for path in results.rglob("*.*") if path.is_file()}

    def interrupted(*args):
        execute(*args)
        raise error

    monkeypatch.setattr(notebooks, "execute", interrupted)
    with pytest.raises(error):
        run(project, seeds=(1,))
    assert {path: path.read_bytes() for path in before} == before
    assert not (project / ".build" / "(1,)" / "01_small").exists()


@pytest.mark.parametrize(("limits", "expected"), [(True, ()), (False, ("limits",))])
def test_a_study_without_limits_leaves_their_cells_out(project, monkeypatch, limits, expected):
    smoke, given = dataclasses.replace(presets.PRESETS["smoke"], limits=limits), []
    monkeypatch.setitem(presets.PRESETS, "smoke", smoke)
    monkeypatch.setattr(notebooks, "execute", lambda *args: given.append(args[3]) or execute(*args))
    run(project)
    assert given == [expected]
    chosen = presets.study("digits", json.dumps({"limits": limits}), seeds=[0])
    assert notebooks.not_run(chosen) == expected


# --- what is said -------------------------------------------------------------------------------


def test_settings_and_data_are_checked_before_anything_runs(project, capsys):
    words = ["01_small", "--stamps", str(project / ".build"), "--jobs", "2"]
    for settings, message in (
        (["--preset", "smokey"], "did you mean 'smoke'"),
        (["--preset", "smoke", "--seeds", "1 1"], "seeds"),
        (["--preset", "smoke", "--seeds", "a"], 'SEEDS="0 1 2"'),
        (["--preset", "smoke", "--seeds", "²"], 'SEEDS="0 1 2"'),
        (["--preset", "smoke", "--seeds", "1" * 5000], 'SEEDS="0 1 2"'),
        (["--preset", "cifar10_small"], "no notebook can run on cifar10_small"),
    ):
        assert notebooks.main(["begin", *words, *settings]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    with pytest.raises(ConfigError):
        notebooks.run("01_small", "smokey", (), project / "stamp", [])


@pytest.mark.parametrize("command", ["begin", "run", "refresh"])
def test_an_unknown_notebook_is_one_line(project, capsys, command):
    words = [command, "99_nothing", "--preset", "smoke", "--stamps", str(project)]
    assert notebooks.main(words) == 2
    error = capsys.readouterr().err
    assert "unknown notebook '99_nothing'" in error and error.count("\n") == 1


@pytest.mark.parametrize("kind", ["RESULTS", "RUNS"])
def test_a_folder_that_nobody_can_write_into_is_one_line(project, capsys, monkeypatch, kind):
    (project / "file").touch()
    monkeypatch.setenv(f"PAPER_{kind}", str(project / "file" / "below"))
    words = ["begin", "01_small", "--preset", "smoke", "--stamps", str(project)]
    assert notebooks.main(words) == 2
    error = capsys.readouterr().err
    assert f"name another folder with {kind}=..." in error and error.count("\n") == 1


def test_how_many_are_done_and_the_minutes_that_others_take(project, capsys):
    todo = ["01_small", "02_more", "03_last"]
    (project / "a").mkdir()
    assert notebooks.remaining("digits", todo, project / "a", 2) == ""  # nothing is committed
    path = project / "results" / "digits" / "environment.json"
    path.parent.mkdir(parents=True)
    path.write_text(
        json.dumps({"notebooks": {name: {"seconds": 120, "commit": "a"} for name in todo}})
    )
    assert notebooks.remaining("digits", todo, project / "a", 2) == ", about 3 min left"
    (project / "a" / "01_small").touch()
    assert notebooks.remaining("digits", todo, project / "a", 2) == ", 1 of 3, about 2 min left"


def test_a_log_gets_a_line_a_minute_with_the_notebooks_name(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(notebooks.time, "monotonic", lambda: now[0])
    log = notebooks.Progress("01_small")
    for second in range(0, 130, 5):
        now[0] = float(second)
        log.write(f"\r train {second}\r")
    log.flush()
    expected = "01_small: train 0\n01_small: train 60\n01_small: train 120\n"
    assert capsys.readouterr().err == expected


# --- what of an execution is kept ---------------------------------------------------------------


def picture():
    """A PNG as matplotlib gives it, with an alpha channel."""
    image, raw = Image.linear_gradient("L").convert("RGBA"), io.BytesIO()
    image.save(raw, "png", compress_level=0)
    return base64.b64encode(raw.getvalue()).decode()


def executed_notebook():
    notebook = small_notebook()
    notebook.metadata["papermill"] = {"input_path": "/somewhere", "start_time": "now"}
    cell = notebook.cells[2]
    cell.metadata["execution"] = {"iopub.execute_input": "now"}
    cell.metadata["jupyter"] = {"source_hidden": True}
    widget = {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "bar"}
    cell.outputs = [
        new_output("stream", name="stderr", text="50 %"),
        new_output("display_data", data=widget),
        new_output("stream", name="stdout", text=f"{notebooks.ROOT}/results/x"),
        new_output("display_data", data={"image/png": picture()}),
    ]
    injected = new_code_cell("preset = 'smoke'", metadata={"tags": ["injected-parameters"]})
    notebook.cells.insert(2, injected)
    for count, code_cell in enumerate(notebook.cells[1:], start=1):
        code_cell.execution_count = count
    return notebook


def test_published_notebooks_hold_no_times_progress_or_machine_paths():
    kept = notebooks.publishable(executed_notebook(), {str(notebooks.ROOT): "."})
    nbformat.validate(kept)
    assert kept.metadata == notebooks.METADATA
    text, image = kept.cells[3].outputs
    assert text.text == "./results/x"
    assert len(image.data["image/png"]) < len(picture()) / 3
    assert kept.cells[3].metadata == {"jupyter": {"source_hidden": True}}
    assert kept.cells[1].metadata == {"tags": ["parameters"]}
    again = executed_notebook()  # papermill gives the cell that it injects another random id
    for cell, known in zip(again.cells, kept.cells, strict=True):
        if "injected-parameters" not in cell.metadata.get("tags", []):
            cell.id = known.id
    same = nbformat.writes(notebooks.publishable(again, {str(notebooks.ROOT): "."}))
    assert nbformat.writes(kept) == same and "/somewhere" not in same


PICTURE = '<img src="data:image/png;base64,/w/w+/w=\n/w">'


@pytest.mark.parametrize(
    ("text", "published"),
    [
        ("/w", "."),
        ("saved in /w/x.", "saved in ./x."),
        ("'/w/x', \"/w\": /w:3", "'./x', \".\": .:3"),
        ("(/w/a b)", "(./a b)"),
        ("/weights, /w2, /w-x, /w.x", "/weights, /w2, /w-x, /w.x"),
        ("/tmp/w/x ../w ~/w", "/tmp/w/x ../w ~/w"),
        ("https://x.org/w/y", "https://x.org/w/y"),
        (f"{PICTURE} /w", f"{PICTURE} ."),
        ("![](data:image/jpeg;base64,/w/AA)", "![](data:image/jpeg;base64,/w/AA)"),
    ],
)
def test_a_short_path_is_replaced_where_it_is_a_path(text, published):
    notebook = small_notebook()
    notebook.cells[0].source = text
    data = {"text/html": text, "text/plain": text}
    notebook.cells[2].outputs = [new_output("display_data", data=data)]
    kept = notebooks.publishable(notebook, {"/w": "."})
    assert kept.cells[0].source == published
    assert kept.cells[2].outputs[0].data == {"text/html": published, "text/plain": published}


@given(st.binary(max_size=600), st.sampled_from(["/p", "/w", "/a/b", "/9j"]))
def test_no_path_is_replaced_inside_pictures(content, path):
    encoded = base64.encodebytes(content).decode()
    data = {
        "image/jpeg": encoded,
        "image/svg+xml": f"<svg>{path}</svg>",
        "application/pdf": encoded,
        "text/html": f'<img src="data:image/png;base64,{encoded}">',
    }
    notebook = small_notebook()
    notebook.cells[2].outputs = [new_output("display_data", data=data)]
    (kept,) = notebooks.publishable(notebook, {path: "."}).cells[2].outputs
    assert kept.data == data


def test_refreshing_stores_the_outputs_of_checked_cells_only():
    executed, source = executed_notebook(), small_notebook()
    ran = [cell for cell in executed.cells if cell.source != "preset = 'smoke'"]
    for cell, known in zip(source.cells, ran, strict=True):
        cell.id = known.id
    source.cells[3].outputs = []
    stored = notebooks.with_checked_outputs(source, executed)
    assert [bool(cell.get("outputs")) for cell in stored.cells] == [False, False, False, True]
    assert problems(stored) == []


def test_a_real_execution_smoke_copies_and_a_failure(project, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(notebooks, "SOURCES", project / "notebooks")
    source = project / "notebooks" / "01_small.ipynb"
    notebooks.write_smoke(project / "copies")
    copy = nbformat.read(project / "copies" / source.name, as_version=4)
    assert 'preset = "smoke"' in copy.cells[2].source
    assert copy.cells[-1].outputs[0].text == "1\n"

    notebook = small_notebook()
    notebook.cells[2].source = "import sys\nprint('half', file=sys.stderr)\nprint(preset, seeds)"
    notebook.cells[3].source = "1 / 0"
    limit = new_code_cell("raise OSError('a limit')", metadata={"tags": ["limits"]})
    notebook.cells.insert(3, limit)
    nbformat.write(notebook, source)
    draft = project / "out" / "x.ipynb"
    with pytest.raises(
        NotebookError, match=r"(?s)01_small failed, see .*ZeroDivisionError"
    ) as error:
        notebooks.execute(source, draft, {"preset": "smoke", "seeds": [3]}, ["limits"])
    assert str(draft) in str(error.value)
    notebooks.publish(nbformat.read(draft, as_version=4), project / "published.ipynb", {})
    published = nbformat.read(project / "published.ipynb", as_version=4)
    cell = next(cell for cell in published.cells if "half" in cell.source)
    assert [output.text for output in cell.outputs] == ["smoke [3]\n"]


@pytest.mark.parametrize("name", ["../../x", "/x", "a/b", "..", ".hidden", "a\0b", "a\nb"])
def test_names_that_lead_out_of_a_folder_are_refused(name):
    with pytest.raises(ConfigError, match="preset = .* at most 50 letters"):
        Study(preset=name, run=RunConfig(steps=1))
