"""The environment: one list of exact pins, and an interrupted build that is never taken for a finished one."""

import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from paper_lib.results import environment

TEXT = environment.PINS.read_text()


def test_pins_are_what_conda_reads():
    listed = next(item["pip"] for item in yaml.safe_load(TEXT)["dependencies"] if isinstance(item, dict))
    assert environment.pins(TEXT) == listed


def test_every_pin_is_exact():
    for pin in environment.pins(TEXT):
        if not pin.startswith("-"):
            (specifier,) = Requirement(pin).specifier
            assert specifier.operator == "==", pin


def test_pins_satisfy_the_bounds_of_the_package():
    project = tomllib.loads((environment.ROOT / "pyproject.toml").read_text())["project"]
    pinned = {Requirement(pin).name: Requirement(pin).specifier for pin in environment.direct_pins()}
    wanted = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    for requirement in map(Requirement, wanted):
        (pin,) = pinned[requirement.name]
        assert pin.version in requirement.specifier, requirement
    python = next(word for word in yaml.safe_load(TEXT)["dependencies"] if str(word).startswith("python="))
    assert python.split("=")[1] in SpecifierSet(project["requires-python"])


@pytest.fixture
def steps(tmp_path, monkeypatch):
    """A repository whose environment is built by a recorder of commands; returns the record."""
    record = []

    def run(*command, text=None):
        record.append([str(word) for word in command])
        (tmp_path / ".venv").mkdir(exist_ok=True)

    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setattr(environment, "PINS", tmp_path / "environment.yml")
    monkeypatch.setattr(environment, "_run", run)
    environment.PINS.write_text(TEXT)
    return record


def test_uv_from_the_path_is_used(steps, tmp_path, monkeypatch):
    monkeypatch.setattr(environment.shutil, "which", lambda name: "/bin/uv")
    environment.build(tmp_path / ".venv")
    assert [step[:3] for step in steps] == [["/bin/uv", "venv", "--quiet"], ["/bin/uv", "pip", "install"]]


def test_without_uv_the_pinned_one_is_installed_first(steps, tmp_path, monkeypatch):
    monkeypatch.setattr(environment.shutil, "which", lambda name: None)
    environment.build(tmp_path / ".venv")
    assert [Path(step[0]).name for step in steps][1:] == ["pip", "uv"]
    assert steps[1][-1] in environment.pins(TEXT)


def test_a_finished_environment_is_kept_until_the_pins_change(steps, tmp_path):
    environment.build(tmp_path / ".venv")
    n = len(steps)
    environment.build(tmp_path / ".venv")
    assert len(steps) == n
    environment.PINS.write_text(TEXT + "# changed\n")
    environment.build(tmp_path / ".venv")
    assert len(steps) == 2 * n


def test_an_interrupted_build_starts_afresh(steps, tmp_path, monkeypatch):
    run = environment._run

    def interrupted(*command, text=None):
        run(*command, text=text)
        if "install" in command:
            (tmp_path / ".venv" / "half").touch()
            raise KeyboardInterrupt

    monkeypatch.setattr(environment, "_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        environment.build(tmp_path / ".venv")
    monkeypatch.setattr(environment, "_run", run)
    environment.build(tmp_path / ".venv")
    assert not (tmp_path / ".venv" / "half").exists()
    assert (tmp_path / ".venv" / ".complete").exists()


def test_a_failing_step_stops_the_build_with_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="environment is incomplete: `false"):
        environment._run("false")


def test_lock_rewrites_the_transitive_pins_only(steps, monkeypatch):
    run = environment._run

    def compiled(*command, text=None):
        run(*command, text=text)
        assert text.splitlines() == environment.direct_pins()
        Path(command[command.index("-o") + 1]).write_text(
            "\n".join([*environment.direct_pins(), "new==1 ; os_name == 'nt'"])
        )

    monkeypatch.setattr(environment, "_run", compiled)
    direct = environment.direct_pins()
    environment.lock(Path("uv"))
    text = environment.PINS.read_text()
    assert environment.direct_pins() == direct
    assert environment.pins(text) == ["-e .", *direct, "new==1 ; os_name == 'nt'"]


def test_commit_marks_changes_outside_results(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    assert environment.commit() == "unknown"
    for words in (["init"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "--allow-empty", "-m", "x"]):
        environment.subprocess.run(["git", *words], cwd=tmp_path, check=True, capture_output=True)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "x").touch()
    clean = environment.commit()
    assert len(clean) == 12
    (tmp_path / "source.py").touch()
    assert environment.commit() == clean + "+"
