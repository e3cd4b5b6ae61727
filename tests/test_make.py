"""The Makefile: its tasks, what is out of date, where results go, and errors in one line."""

import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import nbformat
import psutil
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from packaging.requirements import Requirement

from scripts import ROOT, dependencies
from scripts.notebooks import METADATA

PRINT_SETTINGS = """#!/bin/sh
case "$*" in *dependencies.py*) exec "$REAL_PYTHON" "$@";; esac
echo "$@"
echo "$PAPER_DATA $PAPER_RESULTS $PAPER_RUNS"
"""


def fresh_shell():
    """The environment that make would have in a fresh shell, not under another make."""
    ours = ("MAKE", "MFLAGS", "PAPER", "CONFIG", "OWN", "SEEDS", "PYTHONUNBUFFERED")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    return {**inherited, "REAL_PYTHON": sys.executable}


def run_make(folder, *words, **variables):
    """Run make with what it would have in a fresh shell."""
    command = ["make", *words, *(f"{key}={value}" for key, value in variables.items())]
    return subprocess.run(
        command, cwd=folder, env=fresh_shell(), capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def make(tmp_path):
    """Run make in the repository with an interpreter that prints what it is asked, or with PY."""
    stub = tmp_path / "python"
    stub.write_text(PRINT_SETTINGS)
    stub.chmod(0o755)
    return lambda *words, **variables: run_make(ROOT, *words, **{"PY": stub, **variables})


def test_help_is_the_default_and_names_every_task(make):
    shown = make()
    assert shown.returncode == 0
    assert shown.stdout == make("help").stdout
    phony = re.search(r"^\.PHONY: (help .*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    for target in phony.replace("$(NOTEBOOKS)", "").split():
        assert re.search(rf"^  make {target} +\S", shown.stdout, flags=re.MULTILINE), target


def test_settings_and_absolute_folders_reach_python_as_they_are(make, tmp_path):
    there = tmp_path / "touched"
    seeds = f"3 4; touch {there}"
    done = make("train", CONFIG="smoke", SEEDS=seeds, DATA="d", RESULTS="/r", RUNS="s p")
    asked, folders = done.stdout.splitlines()[-2:]
    assert asked == f"-m paper_lib train --preset smoke --seeds {seeds}"
    assert folders == f"{ROOT}/d /r {ROOT}/s p"
    make("figures", CONFIG=f"$$(touch {there})`touch {there}`", SEEDS=f"'; touch {there}; '")
    assert not there.exists()


def test_a_file_of_ones_own_stands_for_a_preset_and_names_its_results(make, tmp_path):
    (tmp_path / "mine.py").write_text("")
    for given, place in ((f"{tmp_path}/mine.py", tmp_path), ("examples/diabetes.py", ROOT)):
        done = make("train", OWN=given)
        path = place / given
        asked, folders = done.stdout.splitlines()[-2:]
        assert asked == f"-m paper_lib train --preset {path}"
        assert folders.split()[1] == f"{ROOT}/results"  # whatever is not committed here
    wanted = make("-n", "figures", OWN="examples/diabetes.py", JOBS="").stdout
    assert "5 notebooks are up to date" in wanted and '"$PAPER_RESULTS/$CONFIG"' in wanted
    refused = make("train", OWN="my run.py")
    assert refused.returncode == 2 and "OWN: a Python file without spaces" in refused.stderr


ODD = {
    **{
        value: None
        for value in ("x y", "a'b", 'a"b', "#", "%", "ünï 日本", "-x", "--eval=x", "a=b", "*")
    },
    **{value: None for value in ("a,b", "a)b", "x /y", "&", "$x", "\\", "$(error bad)")},
    **{
        value: "touch"
        for value in ("$({})", "`{}`", "$(shell {})", "; {};", "'; {}; '", '"; {}; "')
    },
}


@pytest.mark.parametrize("value", ODD)
def test_settings_are_text_to_make_and_the_shell(make, tmp_path, value):
    value = value.format(f"touch {tmp_path / 'touched'}") if ODD[value] else value
    odd = tmp_path / value.replace("/", "_")
    shutil.copy(tmp_path / "python", odd)
    done = make("train", SEEDS=value, DATA=value, RUNS=value, FRESH=value, PYTHON=value, PY=odd)
    assert done.returncode == 0 and not (tmp_path / "touched").exists()
    asked, folders = done.stdout.splitlines()[-2:]
    assert asked == f"-m paper_lib train --preset digits --seeds {value}"
    assert folders.startswith(f"{ROOT}/{value} ") and folders.endswith(f" {ROOT}/{value}")


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        (
            "CONFIG",
            ["../x", "..", "/x", "", "-x", "x y", "$(touch {})", "`touch {}`"],
            "name of a preset",
        ),
        (
            "JOBS",
            ["0", "a", "-1", "1 2", "²", "1)); touch {}; ((1", "$(touch {})"],
            "a number from 1",
        ),
        ("SEEDS", ["1\ntouch {}", "1'\ntouch {} #"], "have one line each"),
    ],
)
def test_settings_that_cannot_work_are_one_line(make, tmp_path, name, values, said):
    for value in values:
        done = make("train", **{name: value.format(tmp_path / "touched")})
        assert done.returncode == 2 and not done.stdout
        (line,) = done.stderr.splitlines()
        assert said in line and not (tmp_path / "touched").exists()


def test_notebooks_opened_by_hand_write_into_a_scratch_folder(make):
    _, asked, folders = make("lab").stdout.splitlines()
    assert asked == "-m jupyterlab notebooks"
    assert folders.split()[1] == f"{ROOT}/.build/lab"


@pytest.mark.parametrize("target", ["figures", "train"])
def test_unknown_preset_is_one_line_that_names_them(make, target):
    done = make(target, CONFIG="digitz", PY=sys.executable)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert "did you mean 'digits'? (allowed: digits, smoke, cifar10_small," in line


@pytest.mark.parametrize("task", ["01_one_steps", "99_nothing", "tests", "$(exit 3)'`exit 4`"])
def test_an_unknown_task_is_one_line(make, task):
    done = make(task)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.splitlines()[0] == f"no such task: {task}; see make help"


def test_continuous_integration_runs_make_test():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == "make test"
    workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text()
    assert all(f"make {part}" in workflow for part in ("lint", "unit", "nbval"))


def test_actions_are_pinned_by_hash():
    workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text()
    used = re.findall(r"uses: (.*)", workflow)
    assert used and all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v[\d.]+", use) for use in used)


# --- the environment ----------------------------------------------------------------------------


def pins(name):
    return [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]


def test_every_pin_is_exact_and_the_lock_holds_the_direct_ones():
    locked = {Requirement(line).name: Requirement(line) for line in pins("requirements.txt")}
    for line in [*pins("requirements.in"), *pins("requirements.txt")]:
        (specifier,) = Requirement(line).specifier
        assert specifier.operator == "==", line
    for line in pins("requirements.in"):
        assert locked[Requirement(line).name].specifier == Requirement(line).specifier
    assert "uv" in locked  # which installs the others where there is none
    text = (ROOT / "requirements.txt").read_text()
    assert "://" not in text and "--" not in text  # no index, no machine


def test_pins_satisfy_the_bounds_of_the_package_and_conda_reads_them():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {Requirement(pin).name: Requirement(pin).specifier for pin in pins("requirements.in")}
    wanted = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    for requirement in map(Requirement, wanted):
        (pin,) = pinned[requirement.name]
        assert pin.version in requirement.specifier, requirement
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert {"pip": ["-r requirements.txt", "-e ."]} in conda and "python=3.11" in conda


@pytest.fixture
def place(tmp_path):
    """A folder with what builds an environment, and a python whose venv and uv are recorders."""
    (tmp_path / "scripts").mkdir()
    for name in ("Makefile", "environment.yml", "requirements.txt", "scripts/environment.sh"):
        shutil.copy(ROOT / name, tmp_path / name)
    record = f'echo "$(basename "$0") $*" >> {tmp_path}/record; test ! -e {tmp_path}/fail'
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\nif [ "$1" = -c ]; then exec {sys.executable} "$@"; fi\n{record} || exit 1\n'
        f"mkdir -p .venv/bin; for tool in pip uv; do cp {tmp_path}/tool .venv/bin/$tool; done\n"
    )
    (tmp_path / "tool").write_text(f"#!/bin/sh\n{record}\n")
    for path in (python, tmp_path / "tool"):
        path.chmod(0o755)
    return tmp_path


def build(place, **variables):
    """Make the environment without any uv on the PATH; return what was asked for."""
    (place / "record").unlink(missing_ok=True)
    variables = {"PYTHON": place / "python", **variables}
    done = run_make(place, "env", **variables, PATH="/usr/bin:/bin")
    record = place / "record"
    return done, record.read_text().splitlines() if record.exists() else []


def test_an_environment_is_built_once_by_the_pinned_uv_until_the_pins_change(place):
    done, asked = build(place)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in asked] == ["python", "pip", "uv"]
    assert re.search(r" uv==[\d.]+$", asked[1])
    assert asked[2].endswith("-r requirements.txt -e .")
    assert build(place)[1] == []
    stamp = place / ".venv" / ".complete"
    os.utime(place / "requirements.txt", ns=(stamp.stat().st_mtime_ns + 10**9,) * 2)
    os.utime(stamp)  # not newer than that
    assert len(build(place)[1]) == 3


def test_an_interrupted_build_starts_afresh_and_says_so(place):
    (place / "fail").touch()
    done, asked = build(place)
    assert done.returncode != 0 and "make env starts again" in done.stderr
    (place / "fail").unlink()
    (place / ".venv").mkdir(exist_ok=True)
    (place / ".venv" / "half").touch()
    assert build(place)[0].returncode == 0
    assert not (place / ".venv" / "half").exists()


def test_another_python_rebuilds_and_an_old_one_is_refused(place):
    build(place)
    shutil.copy(place / "python", place / "python3.13")
    assert len(build(place, PYTHON=place / "python3.13")[1]) == 3
    (place / "old").write_text("#!/bin/sh\nexit 1\n")
    (place / "old").chmod(0o755)
    done, _ = build(place, PYTHON=place / "old")
    assert done.returncode == 2
    assert done.stderr.splitlines()[0].startswith("Python 3.11 or newer is needed")


# --- what is out of date ------------------------------------------------------------------------


def test_imports_are_found_in_every_form(monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = (
        "import paper_lib.results.claims, numpy",
        "from paper_lib import presets, training",
        "from paper_lib.files import lock",
    )
    found = dependencies.imported("\n".join(lines), Path("notebooks"))
    names = {"", "results/", "training/"}
    packages = {f"paper_lib/{name}__init__.py" for name in names}
    modules = {f"paper_lib/{name}.py" for name in ("results/claims", "presets", "files")}
    assert set(map(str, found)) == packages | modules


def test_prerequisites_follow_imports_and_names_of_datasets(monkeypatch):
    monkeypatch.chdir(ROOT)
    names = {str(path) for path in dependencies.prerequisites(Path("notebooks/03_one_step.ipynb"))}
    assert {"requirements.txt", "notebooks/03_one_step.ipynb", "paper_lib/files.py"} <= names
    assert {f"paper_lib/data/{name}.py" for name in ("digits", "cifar", "images")} <= names
    assert not {"paper_lib/__main__.py", "paper_lib/results/notebooks.py"} & names


@pytest.mark.parametrize(
    "content",
    ["", "[]", "hello", '{"cells": 3}', '{"cells": [{"cell_type": "code", "source": "x ="}]}'],
)
def test_a_damaged_notebook_is_named(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "01_one.ipynb").write_text(content)
    with pytest.raises(SystemExit, match=r"error: notebooks/01_one.ipynb, .*, cannot be read: .*"):
        dependencies.main()


def test_copies_under_odd_names_are_no_notebooks(tmp_path):
    for name in ("02_two", "01_one", "01_one (copy)", "03_$x", "notes"):
        (tmp_path / f"{name}.ipynb").touch()
    assert [path.stem for path in dependencies.sources(tmp_path)] == ["01_one", "02_two"]


def test_magics_are_not_python():
    cell = {"cell_type": "code", "source": ["%matplotlib inline\n", "x = 1\n", "!ls"]}
    assert dependencies.code(cell) == "x = 1"


NOTEBOOK = """from paper_lib.presets import study
from paper_lib.results import claims
from pathlib import Path
if Path("../runs/wait").exists():
    Path("../runs/waits").touch()
    __import__("time").sleep(600)
ledger = claims.Ledger(study(preset, seeds=seeds or (0, 1)).results, "{name}")
ledger.expect("C1", "q", below=2).measure([float(Path("../runs/number").read_text())] * 2)
ledger.verdict()"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A committed copy of the repository with two notebooks of a second each."""
    top = tmp_path_factory.mktemp("a clone")
    for name in (
        "Makefile",
        "environment.yml",
        "requirements.in",
        "requirements.txt",
        ".gitignore",
    ):
        shutil.copy(ROOT / name, top / name)
    for name in ("paper_lib", "scripts"):
        shutil.copytree(ROOT / name, top / name, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in ("notebooks", "runs"):
        (top / folder).mkdir()
    (top / "runs" / "number").write_text("1.0")
    literals = 'preset = "digits"\nseeds = None'
    for name in ("01_one", "02_two"):
        parameters = new_code_cell(literals, metadata={"tags": ["parameters"]})
        cells = [new_markdown_cell("# One"), parameters, new_code_cell(NOTEBOOK.format(name=name))]
        nbformat.write(
            new_notebook(cells=cells, metadata=METADATA), top / "notebooks" / f"{name}.ipynb"
        )
    git(top, "init")
    commit(top)
    return top


def git(top, *words):
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words]
    return subprocess.run(command, cwd=top, check=True, capture_output=True, text=True).stdout


def commit(top):
    git(top, "add", ".")
    git(top, "commit", "-m", "x")


def figures(top, *words, **variables):
    """Run make figures; return what ran and all output."""
    variables = {"PY": sys.executable, "CONFIG": "digits", "DATA": ROOT / "data", **variables}
    done = run_make(top, *(words or ["figures"]), **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return re.findall(r"^(\w+): running", done.stdout, re.MULTILINE), done.stdout


def test_a_clone_in_which_everything_agrees_stays_clean(clone):
    ran, out = figures(clone)
    assert sorted(ran) == ["01_one", "02_two"]
    assert "2 notebooks to run" in out and ", 2 of 2\n" in out
    assert (clone / "results" / "digits" / "README.md").exists()
    commit(clone)
    assert figures(clone)[0] == []
    settings = {"PY": sys.executable, "DATA": ROOT / "data", "SEEDS": "0"}
    planned = run_make(clone, "-n", "01_one", **settings).stdout
    assert "notebooks run 01_one" in planned  # other settings, another result

    claims = clone / "results" / "digits" / "claims" / "01_one.csv"
    (clone / "runs" / "number").write_text("1.01")
    claims.write_text("")  # a result that was overwritten is made again, alone
    ran, out = figures(clone)
    assert ran == ["01_one"] and "2 of 2 notebooks agree" in out
    assert git(clone, "status", "--porcelain") == "" and ",1," in claims.read_text()

    (clone / "results" / "digits" / "README.md").unlink()
    assert figures(clone)[0] == [] and git(clone, "status", "--porcelain") == ""

    (clone / "paper_lib" / "presets.py").touch()
    two = [in_background(clone, "01_one") for _ in range(2)]
    outs = [process.communicate(timeout=300)[0] for process in two]
    assert sum("01_one: running" in out for out in outs) == 1
    git(clone, "checkout", ".")


def test_what_make_began_ends_with_it(clone):
    (clone / "runs" / "wait").touch()
    (clone / "paper_lib" / "presets.py").touch()
    process = in_background(clone, "figures")
    try:
        until(lambda: (clone / "runs" / "waits").exists() or process.poll() is not None)
        began = psutil.Process(process.pid).children(recursive=True)
        kernels = [one for one in began if "ipykernel_launcher" in one.cmdline()]
        process.terminate()
        process.wait(timeout=60)
        _, left = psutil.wait_procs(began, timeout=60)
    finally:
        (clone / "runs" / "wait").unlink()
    assert kernels and left == []


def until(happens, seconds=120.0):
    """Wait until something happens, a tenth of a second at a time."""
    end = time.monotonic() + seconds
    while not happens() and time.monotonic() < end:
        time.sleep(0.1)


def test_uncommitted_changes_write_elsewhere_and_a_copy_without_git_works(clone):
    (clone / "README.md").touch()
    ran, out = figures(clone, "01_one")
    assert ran == ["01_one"] and "results go to .build/dirty" in out
    assert (clone / ".build" / "dirty" / "digits" / "claims" / "01_one.csv").exists()
    assert git(clone, "status", "--porcelain") == "?? README.md\n"
    shutil.rmtree(clone / ".git")
    (clone / "paper_lib" / "presets.py").touch()
    assert figures(clone, "01_one")[0] == ["01_one"]
    made = (clone / "results" / "digits" / "environment.json").read_text()
    assert '"commit": "unknown"' in made


def in_background(folder, *words):
    command = ["make", *words, "CONFIG=digits", f"PY={sys.executable}", f"DATA={ROOT}/data"]
    return subprocess.Popen(
        command, cwd=folder, env=fresh_shell(), stdout=subprocess.PIPE, text=True
    )
