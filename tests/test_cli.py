"""The command line: exit codes, one-line errors, help and version."""

import subprocess
import sys

import pytest
import torch

import paper_lib
from paper_lib import runs
from paper_lib.__main__ import main
from paper_lib.config import RunConfig, Study, meanings
from paper_lib.presets import DIGITS, RUN_SETTINGS, STUDY_SETTINGS, study
from paper_lib.runs import parallel


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--preset", "digts"], "unknown preset 'digts'; did you mean 'digits'?"),
        (["--lrr", "1"], "unknown setting 'lrr'; did you mean 'lr'?"),
        (["--lr", "-1"], "lr = -1.0 is not allowed: the learning rate must be > 0"),
        (["--lr", "much"], "lr = 'much' is not allowed: it must be a valid number"),
        (["--steps", "1.5"], "steps = '1.5' is not allowed: it must be a valid integer"),
        (["--seeds", "0 0"], "seeds = '0 0' is not allowed"),
        (["--compile", "maybe"], "compile = 'maybe' is not allowed: it must be a valid boolean"),
        (["--record", "1490-1600"], "record = '1490-1600' is not allowed: step 1501-1600 lies"),
        (["--lr"], "argument --lr: expected one argument"),
        (["lr", "1"], "unexpected words lr 1"),
        (["--parent", "x"], "unknown setting 'parent'"),
        (["--batch-sice", "1"], "did you mean 'batch_size'?"),
    ],
)
def test_settings_that_cannot_work_end_with_code_2_and_one_line(words, message, capsys):
    assert main(["train", *words]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and not printed.out


@pytest.mark.parametrize("words", ["", "trian", "cooldown a --steps 3", "jpegs x"])
def test_commands_that_cannot_work_end_with_code_2_and_one_line(words, capsys):
    assert main(words.split()) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_help_lists_every_setting_with_its_meaning_and_default(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    text = " ".join(" ".join(lines).split())
    of_run, of_study = (RunConfig, RUN_SETTINGS, DIGITS.run), (Study, STUDY_SETTINGS, DIGITS)
    for cls, names, base in (of_run, of_study):
        for name in names:
            flag, meaning = name.replace("_", "-"), meanings(cls)[name]
            assert f"--{flag} X {meaning} [{getattr(base, name)}]" in text


def test_the_version_and_the_parts_are_told_without_torch():
    code = """
import sys, paper_lib
from paper_lib.__main__ import main
assert "averaging" in paper_lib.__doc__ and paper_lib.files.folder and "runs" in dir(paper_lib)
assert main(["train", "--lr", "0"]) == 2
assert "torch" not in sys.modules
main(["--version"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"paper-lib {paper_lib.__version__}\n"
    with pytest.raises(AttributeError, match="no attribute 'model'"):
        _ = paper_lib.model


def tree(root, image):
    """A tree of one class whose two files hold `image`, or no files."""
    for split in ("train", "val"):
        (root / split / "class").mkdir(parents=True)
        if image is not None:
            (root / split / "class" / "1.png").write_bytes(image)


@pytest.mark.parametrize(
    ("make_data", "message"),
    [
        (lambda root: None, "train is missing"),
        (lambda root: tree(root, None), "has no images"),
        (lambda root: tree(root, b"no image"), "unusable image"),
    ],
)
def test_data_that_cannot_be_read_end_with_code_2_and_the_remedy(
    make_data, message, tmp_path, monkeypatch, capsys
):
    make_data(tmp_path)
    monkeypatch.setenv("PAPER_DATA", str(tmp_path))
    assert main(["train", "--preset", "cifar10_small", "--held-out", "0"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]  # after any progress of decoding
    assert line.startswith("error: ") and message in line
    assert "DATA=... (make) or PAPER_DATA" in line


def test_too_few_images_to_hold_out_end_with_code_2_and_one_line(capsys):
    runs.load_dataset(study("smoke").run)  # its progress is printed before
    capsys.readouterr()
    assert main(["train", "--preset", "smoke", "--held-out", "1000000"]) == 2
    printed = capsys.readouterr().err
    assert "error: held_out = 1000000 is not allowed: it must be at least 0" in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [runs.DivergedError("diverged"), runs.SnapshotError("no step"), parallel.WorkerError("died")],
)
def test_runs_that_fail_end_with_code_2_and_one_line(error, monkeypatch, capsys):
    def fail(*args):
        raise error

    monkeypatch.setattr(runs, "train", fail)
    assert main(["train", "--preset", "smoke"]) == 2
    assert capsys.readouterr().err == f"error: {error}\n"


def test_training_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PAPER_RUNS", str(tmp_path))
    words = "train --preset smoke --steps 10 --window 5 --decay 5 --seeds 4 --lr 0.5"
    assert main(words.split()) == 0
    names = [line.split(" seed 4: ")[0].strip() for line in capsys.readouterr().out.splitlines()]
    assert names == ["warm-up", "window", "lr / 2", "decay"]
    assert len(list(tmp_path.glob("digits-resnet8-*"))) == 4


@pytest.fixture
def saved(tmp_path):
    """A folder with three checkpoints of a network, as a training loop writes them."""
    for step in (0, 10, 20):
        content = {"model": {"w": torch.full((2,), float(step))}, "epoch": 1}
        torch.save(content, tmp_path / f"step{step}.pt")
    return tmp_path


def test_an_average_of_checkpoints_from_the_command_line(saved, capsys):
    assert main(["cooldown", str(saved), "--output", str(saved / "averaged.pt")]) == 0
    printed = capsys.readouterr().out.splitlines()
    expected = ["0.2500 step 0", "0.5000 step 10", "0.2500 step 20"]
    assert [" ".join(line.split()[:3]) for line in printed[:3]] == expected
    assert printed[3].endswith("weights under 'model' and nothing else")
    averaged = torch.load(saved / "averaged.pt", weights_only=True)
    assert averaged.keys() == {"model"} and averaged["model"]["w"].tolist() == [10, 10]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("step0.pt --output a.pt", "number of checkpoints = 1 is not allowed"),
        ("step0.pt step10.pt --output step10.pt", "it is one of the checkpoints"),
        ("step0.pt step10.pt --output a.onnx", "its name must end in .pt"),
        ("step0.pt step30.pt --output a.pt", "step30.pt"),
        ("nothere --output a.pt", "checkpoint = 'nothere' is not allowed: there is no such file"),
        ("step0.pt nothere/e1.pt --output a.pt", "checkpoint = 'nothere/e1.pt' is not allowed"),
        (". --output a.pt --schedule linaer", "did you mean 'linear'?"),
    ],
)
def test_checkpoints_that_cannot_be_averaged_end_with_code_2_and_one_line(
    saved, monkeypatch, words, message, capsys
):
    monkeypatch.chdir(saved)
    assert main(["cooldown", *words.split()]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and not printed.out
    assert sorted(path.name for path in saved.iterdir()) == ["step0.pt", "step10.pt", "step20.pt"]


def test_a_folder_without_checkpoints_is_refused_by_name(tmp_path, capsys):
    (tmp_path / "log5.txt").touch()
    assert main(["cooldown", str(tmp_path), "--output", "a.pt"]) == 2
    refusal = f"checkpoints = '{tmp_path}' is not allowed: no .pt, .pth, .safetensors"
    assert refusal in capsys.readouterr().err


def test_the_command_says_that_statistics_must_be_recomputed(tmp_path, capsys):
    for step in (1, 2):
        torch.save(torch.nn.BatchNorm1d(2).state_dict(), tmp_path / f"step{step}.pt")
    assert main(["cooldown", str(tmp_path), "--output", str(tmp_path / "averaged.pt")]) == 0
    assert "batchnorm.recompute_statistics" in capsys.readouterr().out
