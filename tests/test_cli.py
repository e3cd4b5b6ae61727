"""The command line: exit codes and one-line errors."""

import pytest

from paper_lib.__main__ import main
from paper_lib.presets import PRESETS


def test_presets_are_listed_one_a_line(capsys):
    assert main(["presets"]) == 0
    assert capsys.readouterr().out.split() == list(PRESETS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--preset", "digts"], "unknown preset 'digts'; did you mean 'digits'?"),
        (["--lrr", "1"], "unknown setting 'lrr'; did you mean 'lr'?"),
        (["--lr", "-1"], "lr = -1.0 is not allowed: the learning rate must be > 0"),
        (["--lr", "much"], "lr = 'much' has the wrong type: expected float"),
        (["--steps", "1.5"], "steps = '1.5' has the wrong type: expected int"),
        (["--seeds", "0 0"], "seeds = (0, 0) is not allowed"),
        (["--compile", "maybe"], "compile = 'maybe' has the wrong type: expected bool"),
        (["--record", "1490-1600"], "record = '1490-1600' is not allowed: step 1501-1600 lies outside"),
        (["--lr"], "expected pairs of --setting value"),
        (["lr", "1"], "unexpected word 'lr'"),
        (["--parent", "x"], "unknown setting 'parent'"),
    ],
)
def test_settings_that_cannot_work_end_with_code_2_and_one_line(words, message, capsys):
    assert main(["train", *words]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and not printed.out


def test_training_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PAPER_RUNS", str(tmp_path))
    words = ["--preset", "smoke", "--steps", "10", "--window", "5", "--decay", "5", "--seeds", "4", "--lr", "0.5"]
    assert main(["train", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" seed 4: ")[0].strip() for line in lines] == ["warm-up", "window", "lr / 2", "decay"]
    assert len(list(tmp_path.glob("digits-resnet8-*"))) == 4
