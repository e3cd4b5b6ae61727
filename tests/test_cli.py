"""The command line: exit codes, one-line errors, help and version."""

import contextlib
import io
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
        (["--lr", "-1"], "lr = '-1' is not allowed: it must be greater than 0"),
        (["--lr", "much"], "lr = 'much' is not allowed: it must be a valid number"),
        (["--steps", "1.5"], "steps = '1.5' is not allowed: it must be a valid integer"),
        (["--seeds", "0 0"], "seeds = '0 0' is not allowed"),
        (["--compile", "maybe"], "compile = 'maybe' is not allowed: it must be a valid boolean"),
        (["--record", "1490-1600"], "record = '1490-1600' is not allowed: step 1501-1600 lies"),
        (["--lr"], "argument --lr: expected one argument"),
        (["lr", "1"], "unexpected words lr 1"),
        (["--parent", "x"], "unknown setting 'parent'"),
        (["--batch-sice", "1"], "did you mean 'batch_size'?"),
        (["--seeds", str(2**64)], "seeds.0 = '18446744073709551616' is not allowed"),
        (["--seeds", "0;1"], "seeds.0 = '0;1' is not allowed: it must be a valid integer"),
        (["--width", str(10**30)], "width = '1000000000000000000000000000000' is not allowed"),
        (["--lr", "1e400"], "lr = '1e400' is not allowed: it must be a finite number"),
        (["--model", "../x"], "model = '../x' is not allowed"),
        (["--record", "0-9999999999"], "record = '0-9999999999' is not allowed: write windows"),
        (["--record", "0-999999999"], "is empty, or goes beyond step 10000000"),
        (["--window", "999999999"], "window = '999999999' is not allowed"),
        (["--preset", "a\nb"], r"unknown preset 'a\nb'"),
        (["a\nb"], "unexpected words a b"),
        (["--images-per-second", "1"], "unknown setting 'images_per_second'"),
    ],
)
def test_settings_that_cannot_work_end_with_code_2_and_one_line(words, message, capsys):
    assert main(["train", *words]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and not printed.out


LINES = ["", "trian", "cooldown a --steps 3", "jpegs x", "cooldown / --output a.pt"]
LINES += [f"plan --images-per-second {rate}" for rate in ("0", "-1", "nan", "many")]
LINES += [f"plan --model {name}" for name in ("resnet9", "resnet80000000", "resnet" + "9" * 5000)]


@pytest.mark.parametrize("words", LINES)
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
    """A tree of two classes whose files hold `image`, or without files."""
    for folder in ("train/cat", "train/dog", "val/cat", "val/dog"):
        (root / folder).mkdir(parents=True)
        if image is not None:
            (root / folder / "1.png").write_bytes(image)


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


@pytest.mark.parametrize("kind", ["RUNS", "DATA"])
def test_a_variable_that_names_a_file_ends_with_code_2_and_one_line(kind, monkeypatch, capsys):
    runs.load_dataset(study("smoke").run)  # its progress is printed before
    capsys.readouterr()
    monkeypatch.setenv(f"PAPER_{kind}", "/dev/null")
    assert main(["train", "--preset", "smoke"]) == 2
    error = f"error: PAPER_{kind} = '/dev/null' is not allowed: it must name a folder\n"
    assert capsys.readouterr().err == error


def test_training_what_no_memory_holds_is_refused_before_it_is_built(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PAPER_RUNS", str(tmp_path))
    runs.load_dataset(study("smoke").run)  # its progress is printed before
    capsys.readouterr()
    assert main(["train", "--preset", "smoke", "--seeds", "0", "--width", "65536"]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: weights, gradient, momentum, ") and "(`width`)" in message


def test_a_name_that_the_terminal_cannot_show_is_escaped(saved, monkeypatch):
    for step in (0, 10):
        (saved / f"step{step}.pt").rename(saved / f"\u00fc-{step}.pt")
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "ascii"))
    assert main(["cooldown", str(saved), "--output", str(saved / "averaged.pt")]) == 0
    assert rb"\xfc-10.pt" in shown.getvalue()


def test_a_name_that_is_not_unicode_ends_with_code_2_and_one_line(saved, monkeypatch):
    (saved / "step10.pt").rename(os.fsdecode(os.fsencode(saved) + b"/\xff-10.pt"))
    shown = io.BytesIO()
    stderr = io.TextIOWrapper(shown, errors="backslashreplace")  # as Python makes it
    monkeypatch.setattr(sys, "stderr", stderr)
    assert main(["cooldown", str(saved), "--output", str(saved / "averaged.pt")]) == 2
    stderr.flush()
    assert rb"\udcff-10.pt cannot be read: UnicodeEncodeError" in shown.getvalue()
    assert shown.getvalue().count(b"\n") == 1


def test_a_reader_that_has_had_enough_is_no_error(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", open(writer, "w"))
    assert main(["plan", "--preset", "smoke"]) == 1
    sys.stdout.close()  # as at exit, when the rest is written
    assert capsys.readouterr().err == ""


def test_stdout_may_be_closed(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["plan", "--preset", "smoke"]) == 0


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


# --- anything ------------------------------------------------------------------------------------


NUMBERS = ["0", "-1", "1", "3", "1e3", "1e400", "nan", "-inf", str(2**63), str(2**64), str(10**30)]
WORDS = [
    "",
    " ",
    "true",
    "None",
    "[1, 2]",
    "{}",
    "0-9999999999",
    "a\nb",
    "\u0661",
    "\udcff",
    "../x",
]
values = st.sampled_from([*NUMBERS, *WORDS]) | st.text(max_size=4)
flags = st.sampled_from([*RUN_SETTINGS, *STUDY_SETTINGS, "preset", "images-per-second", "x", ""])
options = st.builds(lambda flag, value: f"--{flag.replace('_', '-')}={value}", flags, values)
planned = st.lists(options | values, max_size=3).map(
    lambda words: ["plan", "--preset=smoke", *words]
)
cooled = st.lists(values | st.just("/dev/zero"), max_size=3).map(lambda words: ["cooldown", *words])
cooled |= st.builds(lambda words, out: [*words, f"--output={out}"], cooled, values)
others = st.lists(values | st.sampled_from(["jpegs", "plan", "--version"]), max_size=3)


@settings(max_examples=50)
@given(planned | cooled | others)
def test_any_words_end_with_an_exit_code_and_at_most_one_line_on_stderr(words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(words)
        except SystemExit as end:  # --help and --version
            code = end.code
    assert code in (0, 2) and err.getvalue().count("\n") == (code == 2), err.getvalue()
