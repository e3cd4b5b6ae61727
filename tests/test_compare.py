"""Comparing with the committed results: each tolerance from both sides, and what is kept."""

import json
import shutil
import subprocess

import nbformat
import numpy as np
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

import scripts as package
from paper_lib.results import claims
from scripts import compare, picture, report


def claim(
    measured, spread=0.0, verdict="holds", criterion="mean < 1", quantity="q", notebook="01_one"
):
    numbers = [np.nan, measured, spread, 3, measured, measured]
    row = ["C1", "claim", quantity, *numbers, criterion, verdict, notebook, True, ""]
    return pd.DataFrame([row], columns=claims.COLUMNS)


@pytest.mark.parametrize(
    ("old", "new", "agrees"),
    [
        (claim(1.0), claim(1.049), True),
        (claim(1.0), claim(1.051), False),
        (claim(1.0, 0.3), claim(2.49, 0.4), True),  # 3 * hypot(.3, .4) = 1.5
        (claim(1.0, 0.3), claim(2.51, 0.4), False),
        (claim(1.0), claim(1.0, verdict="fails"), False),
        (claim(1.0), claim(1.0, verdict="undecided"), True),
        (claim(1.0), claim(1.0, criterion="mean < 2"), False),
        (claim(1.0), claim(np.nan), False),
        (claim(np.nan), claim(np.nan), True),
        (claim(1.0), claim(np.inf, np.inf), False),
        (claim(np.inf), claim(np.inf), True),
        (claim(np.inf), claim(-np.inf), False),
        (claim(1.0, np.nan), claim(1.01, np.nan), True),  # a single seed has no spread
        (claim(1.0), claim(1.0, quantity="another"), False),
        (claim(1.0), claim(1.0, np.inf), False),
        (claim(1.0), claim(1.0).assign(predicted=np.inf), False),
        (claim(1.0), claim(1.0).assign(low=-np.inf), False),
    ],
)
def test_claims(old, new, agrees):
    assert (compare.compare_claims(old, new) == []) is agrees


def curve(scale=1.0, label="a", **columns):
    numbers = scale * np.array([1.0, -2.0, 2.0])
    return pd.DataFrame({"x": [1, 2, 3], "mean": numbers, "kind": label, **columns})


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
        (curve(), curve(np.inf), False),
        (curve(np.inf), curve(np.inf), True),
        (curve(np.inf), curve(-np.inf), False),
        (curve(spread=0.1), curve(spread=np.inf), False),
        (curve(spread=np.inf), curve(9.0, spread=np.inf), False),  # allows not everything
        (curve(spread=np.nan), curve(spread=0.1), True),
        (curve(1e200), curve(1.09e200), True),  # whose square is infinite
        (curve(1e200), curve(5e200), False),
        (curve(8e307), curve(-8e307), False),
    ],
)
def test_figures(old, new, agrees):
    assert (compare.compare_figure(old, new) == []) is agrees


def executed(number, source="work()"):
    shown = new_output("stream", name="stdout", text=f"{number}")
    return new_notebook(cells=[new_code_cell(source, id="work", outputs=[shown])])


def write(results, name, number, source="work()"):
    """The results of one notebook, all of whose numbers are proportional to `number`."""
    for folder in ("claims", "figures", "notebooks"):
        (results / folder).mkdir(parents=True, exist_ok=True)
    claim(number, notebook=name).to_csv(results / "claims" / f"{name}.csv", index=False)
    curve(number).to_csv(results / "figures" / f"{name[:2]}_curve.csv", index=False)
    (results / "figures" / f"{name[:2]}_curve.png").write_text(f"picture of {number}")
    nbformat.write(executed(number, source), results / "notebooks" / f"{name}.ipynb")
    path = results / "environment.json"
    made = json.loads(path.read_text()) if path.exists() else {"notebooks": {}}
    made |= {"python": f"{number}", "packages": {}, "cores": 1}
    made |= {key: "x" for key in ("platform", "processor", "device")}
    made["notebooks"][name] = {"seconds": number, "commit": f"{number}"}
    path.write_text(json.dumps(made, indent=2) + "\n")


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with results of two notebooks; returns its preset's folder and a caller of git."""

    def git(*words):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        command = ["git", *identity, *words]
        return subprocess.run(
            command, cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    for module in (package, compare, report):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    results = tmp_path / "results" / "digits"
    write(results, "01_one", 1.0)
    write(results, "02_two", 2.0)
    git("init")
    git("add", ".")
    git("commit", "-m", "results")
    return results, git


def test_what_agrees_is_kept_as_committed_and_the_clone_stays_clean(checkout, capsys):
    results, git = checkout
    write(results, "01_one", 1.01)
    write(results, "02_two", 2.02)
    assert len(git("status", "--porcelain").splitlines()) == 9
    assert compare.main([str(results), "--keep"]) == 0
    assert "2 of 2 notebooks agree" in capsys.readouterr().out
    assert git("status", "--porcelain") == ""


def test_what_differs_is_printed_and_stays(checkout, capsys):
    results, git = checkout
    write(results, "01_one", 1.01)
    write(results, "02_two", 20.0)
    (results / "figures" / "01_new.csv").write_text("x\n1\n")
    assert compare.main([str(results), "--keep"]) == 1
    out = capsys.readouterr().out
    assert "claims/02_two.csv: C1, q: measured 2 -> 20" in out
    assert "figures/01_new.csv: not committed" in out
    assert "0 of 2 notebooks agree" in out
    (results / "figures" / "01_new.csv").unlink()
    compare.main([str(results), "--keep"])
    changed = git("status", "--porcelain")
    assert "02_two" in changed and "01_" not in changed
    made = json.loads((results / "environment.json").read_text())
    assert {name: entry["commit"] for name, entry in made["notebooks"].items()} == {
        "01_one": "1.0",
        "02_two": "20.0",
    }


def test_a_notebook_that_reads_otherwise_is_new(checkout):
    results, git = checkout
    write(results, "01_one", 1.01, source="work(better=True)")
    assert compare.main([str(results), "--keep"]) == 0
    assert "01_one.ipynb" in git("status", "--porcelain")


def test_without_keep_nothing_changes(checkout):
    results, git = checkout
    write(results, "01_one", 1.01)
    before = git("status", "--porcelain")
    assert compare.main([str(results)]) == 0
    assert git("status", "--porcelain") == before


FILES = [
    "figures/01_curve.csv",
    "figures/01_curve.png",
    "claims/01_one.csv",
    "notebooks/01_one.ipynb",
]


@pytest.mark.parametrize("name", FILES)
def test_a_deleted_file_is_noticed(checkout, capsys, name):
    results, _ = checkout
    (results / name).unlink()
    assert compare.main([str(results)]) == 1
    assert f"{name}: gone" in capsys.readouterr().out


DAMAGES = [
    b"",
    b"\0" * 50,
    b"hello",
    b"\xff\xfe",
    b"[1, 2]",
    b'{"notebooks": 3}',
    b'a,"b\n',
    b"a,b\n1,2,3\n",
]


@pytest.mark.parametrize("content", DAMAGES)
@pytest.mark.parametrize("name", ["claims/01_one.csv", "figures/01_curve.csv", "environment.json"])
def test_damaged_files_are_named(checkout, capsys, monkeypatch, name, content):
    monkeypatch.setattr(report, "notebook_title", lambda name: "One step")
    results, _ = checkout
    (results / name).write_bytes(content)
    is_table = name.endswith(".csv")
    assert compare.main([str(results)]) == is_table
    assert (f"{name}: " in capsys.readouterr().out) is is_table
    if not name.startswith("figures"):
        assert report.main([str(results)]) == 2
        error = capsys.readouterr().err
        assert name in error and "make figures" in error and error.count("\n") == 1


@pytest.mark.parametrize("column", ["claim", "role", "measured", "seeds", "verdict", "notebook"])
def test_a_damaged_claim_is_named(tmp_path, capsys, column):
    write(tmp_path / "digits", "01_one", 1.0)
    path = tmp_path / "digits" / "claims" / "01_one.csv"
    pd.read_csv(path, dtype=str).assign(**{column: "../x"}).to_csv(path, index=False)
    assert report.main([str(tmp_path / "digits")]) == 2
    assert f"{path} is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("name", picture.SOURCES)
@pytest.mark.parametrize("content", [*DAMAGES, None])
def test_a_damaged_figure_makes_no_picture(tmp_path, name, content):
    figures = tmp_path / "digits" / "figures"
    shutil.copytree(package.ROOT / "results" / "digits" / "figures", figures)
    path = figures / f"{name}.csv"
    path.write_bytes(path.read_bytes().split(b"\n")[0] if content is None else content)
    with pytest.raises(package.ResultError, match="make figures makes it again"):
        picture.draw(tmp_path / "digits")


@pytest.mark.parametrize(
    "text", ["{{ measured('q' }}", "{{ nothing }}", "{% for %}", "{{ ''.__class__.mro() }}"]
)
def test_what_is_no_template_is_named(tmp_path, text):
    write(tmp_path / "digits", "01_one", 1.0)
    (tmp_path / "digits" / "found.md").write_text(f"## C1\n\n{text}\n\nMore.\n")
    with pytest.raises(package.ResultError, match="found.md cannot be read"):
        report.found(tmp_path / "digits", claims.table(tmp_path / "digits"))


def test_nothing_on_a_page_is_html(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "notebook_title", lambda name: "One step")
    results = tmp_path / "digits"
    write(results, "01_one", 1.0)
    quantity = "<b>|q|</b>\n0 < a &lt;"
    claim(1.0, quantity=quantity).to_csv(results / "claims/01_one.csv", index=False)
    (results / "figures" / "01_<i>.png").touch()
    (results / "found.md").touch()
    made = json.loads((results / "environment.json").read_text())
    (results / "environment.json").write_text(json.dumps({**made, "processor": "<script>"}))
    page = report.page(results)
    assert "| &lt;b>\\|q\\|&lt;/b> 0 < a &amp;lt; |" in page
    assert "[&lt;i>](figures/01_%3Ci%3E.png)" in page and "&lt;script>" in page
    assert "<" not in page.replace("0 < a", "").replace("mean < 1", "")


def test_results_elsewhere_are_compared_with_the_committed_ones(checkout, tmp_path, capsys):
    write(tmp_path / "scratch" / "digits", "01_one", 3.0)
    assert compare.main([str(tmp_path / "scratch" / "digits"), "--keep"]) == 1
    assert "measured 1 -> 3" in capsys.readouterr().out


def test_nothing_to_compare(tmp_path, monkeypatch, capsys):
    for module in (package, compare):
        monkeypatch.setattr(module, "ROOT", tmp_path)  # without git
    assert compare.main([str(tmp_path / "digits")]) == 2
    assert "make figures" in capsys.readouterr().err
    write(tmp_path / "digits", "01_one", 1.0)
    assert compare.main([str(tmp_path / "digits")]) == 0
    assert "nothing committed" in capsys.readouterr().err


def test_the_committed_pages_are_those_of_the_committed_results():
    for results in (package.ROOT / "results").glob("*/environment.json"):
        ignored = subprocess.run(["git", "check-ignore", "-q", results], check=False).returncode
        if ignored:  # 0: smoke, which is not committed
            page = (results.parent / "README.md").read_text()
            assert page == report.page(results.parent), "run `make readme`"
    table = report.readme_table(package.ROOT / "results/digits")
    readme = (package.ROOT / "README.md").read_text()
    assert table.join(report.MARKS) in readme, "run `make readme`"


def test_a_page_has_every_verdict_every_figure_and_what_made_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "notebook_title", lambda name: "One step")
    results = tmp_path / "digits"
    assert report.main([str(results)]) == 2
    assert "make figures" in capsys.readouterr().err
    write(results, "01_one", 1.0)
    (results / "figures" / "01_one.png").write_text("the figure of the claim")
    said = 'It is {{ measured("q") }}.\n\nA paragraph.\n'
    (results / "found.md").write_text(f"## C1\n\n{said}\n## C2\n\nNothing.\n\nYet.\n")
    assert report.main([str(results)]) == 0
    page = (results / "README.md").read_text()
    assert page.startswith("# What was found: digits, ResNet-8\n")
    assert "| holds, 1 of 1 | It is 1 ± 0. | [figure](figures/01_one.png), [notebook](" in page
    assert "**holds**: 1 of 1 criteria hold. It is 1 ± 0. A paragraph.\n\n![01_one](" in page
    assert "- [01_one](notebooks/01_one.ipynb), One step: [curve](figures/01_curve.png)" in page
    assert claims.markdown(claims.table(results)).strip() in page
    assert "Python 1.0 on x, x, x, 1 cores" in page
    assert "- commit 1.0: 01 (1.0 s)" in page


def test_what_was_written_of_results_names_measured_quantities_only(tmp_path):
    results = tmp_path / "digits"
    write(results, "01_one", 1.0)
    (results / "found.md").write_text('## C1\n\n{{ measured("qq") }}\n\nMore.\n')
    with pytest.raises(ValueError, match="unknown quantity 'qq'"):
        report.found(results, claims.table(results))


def test_the_readme_has_the_table_of_the_committed_results(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "notebook_title", lambda name: "One step")
    results = tmp_path / "results" / "digits"
    write(results, "01_one", 1.0)
    (tmp_path / "README.md").write_text("before\n" + "old table\n".join(report.MARKS) + "\nafter\n")
    assert report.main([str(results)]) == 0
    table = report.readme_table(results)
    assert table.startswith("Of 1 claims 1 hold.\n\n| claim | verdict |")
    assert (tmp_path / "README.md").read_text() == f"before\n{table.join(report.MARKS)}\nafter\n"
