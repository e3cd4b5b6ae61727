"""Damage of a run's files, finished or half-finished: it is never believed, and never stays."""

import errno
import functools
import os
import shutil
import threading

import numpy as np
import pytest
from helpers import SMALL, SmallNet, interrupt, small_data

from paper_lib import files, runs
from paper_lib.__main__ import main
from paper_lib.runs import checksums

AVERAGE = "EMA 0.5"
CONFIG = SMALL.replace(
    steps=20, record="0-20", momentum=0.5, averages=(AVERAGE,), checkpoints=(5, 15)
)
OTHER = CONFIG.replace(seed=1)  # its files are of the same sizes
DATA = small_data()


def obtain(config=CONFIG, report=lambda steps, loss, lr: None):
    return runs.obtain(config, DATA, SmallNet, report)


def numbers(run):
    """Everything that a run says, but for how long it took."""
    states = {f"{step} {k}": v for step in (5, 15, 20) for k, v in run.state(step).items()}
    names = ("steps", "weights", "buffers", "loss", "lr", "_averages")
    status = {k: v for k, v in run.status.items() if k != "wall_s"}
    return states | {k: getattr(run, k) for k in names} | {"config": run.config, "status": status}


def require_same(run, fresh):
    found = numbers(run)
    assert found.keys() == fresh.keys()
    for name, value in fresh.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    checksums.verified(run.folder)


@pytest.fixture(scope="module", autouse=True)
def no_waiting_for_disks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two runs, finished, and likewise half-finished; their folder's name; what the first says."""
    top = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAPER_RUNS", str(top / "half"))
        for config in (CONFIG, OTHER):
            interrupt(functools.partial(obtain, config), patch, 15, 5)
        patch.setenv("PAPER_RUNS", str(top / "whole"))
        fresh, _ = obtain(), obtain(OTHER)
    return top, fresh.folder.name, numbers(fresh)


@pytest.fixture
def damaged(made, tmp_path, monkeypatch):
    """damaged(kind, name, damage): a run whose file (None: whose folder) was damaged."""
    monkeypatch.setenv("PAPER_RUNS", str(tmp_path))

    def copy(kind, name, damage):
        shutil.copytree(made[0] / kind, tmp_path, dirs_exist_ok=True)
        mine, other = sorted(tmp_path.glob("tensors*"), key=lambda path: made[1] not in path.name)
        damage(*((mine, other) if name is None else (mine / name, other)))
        return mine

    return copy


# --- what may happen to a file --------------------------------------------------------------------


def flip(where):
    def flipped(path, other):
        content = bytearray(path.read_bytes())
        content[int(where * (len(content) - 1))] ^= 4
        path.write_bytes(content)

    return flipped


def cut(path, other):
    path.write_bytes(path.read_bytes()[:-5])


def grown(path, other):
    path.write_bytes(path.read_bytes() + bytes(5))


def half_zero(path, other):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))


def empty(path, other):
    path.write_bytes(b"")


def gone(path, other):
    path.unlink()


def of_another(path, other):
    if (other / path.name).exists():
        shutil.copy(other / path.name, path)


def folder_instead(path, other):
    path.unlink()
    path.mkdir()
    (path / "file").touch()


def dangling(path, other):
    path.unlink()
    path.symlink_to("nowhere")


def pipe(path, other):
    path.unlink()
    os.mkfifo(path)


DAMAGES = {
    "first bit": flip(0), "early bit": flip(0.1), "middle bit": flip(0.5), "last bit": flip(1),
    "cut": cut, "grown": grown, "half zero": half_zero, "empty": empty, "gone": gone,
    "another's": of_another, "folder": folder_instead, "dangling link": dangling, "pipe": pipe,
}  # fmt: skip


def folder_of_another(path, other):
    shutil.rmtree(path)
    shutil.copytree(other, path)


def file_instead(path, other):
    shutil.rmtree(path)
    path.touch()


def folder_gone_astray(path, other):
    shutil.rmtree(path)
    path.symlink_to("nowhere")


OF_FOLDERS = {"another's": folder_of_another, "file": file_instead, "link": folder_gone_astray}


# --- finished runs --------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_of_every_file_of_a_run_is_seen(damage, made, tmp_path):
    top, name, _ = made
    whole, mine = top / "whole" / name, tmp_path / name
    (other,) = (path for path in (top / "whole").glob("tensors*") if path.name != name)
    shutil.copytree(whole, mine)
    for file in [path.name for path in whole.iterdir()]:
        DAMAGES[damage](mine / file, other)
        if not ((mine / file).is_file() and same_bytes(mine / file, whole / file)):
            with pytest.raises(OSError, match=file):
                checksums.check(mine)
        files.remove(mine / file)
        shutil.copy(whole / file, mine)
        checksums.verified(mine)


def same_bytes(a, b):
    return a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("weights.npy", "middle bit"),
        ("config.json", "another's"),
        ("status.json", "half zero"),
        ("state-20.npz", "gone"),
        ("steps.npy", "folder"),
        ("log.npy", "pipe"),
        ("checksums.txt", "first bit"),
        *((None, damage) for damage in OF_FOLDERS),
    ],
)
def test_a_damaged_run_is_named_set_aside_and_trained_again(name, damage, made, damaged, capfd):
    folder = damaged("whole", name, (OF_FOLDERS if name is None else DAMAGES)[damage])
    for _ in range(2):
        require_same(obtain(), made[2])
    said, aside = capfd.readouterr().err, folder.with_name(folder.name + ".damaged")
    assert os.path.lexists(aside) and said.count("\n") == 1
    assert name is None or str(folder / name) in said
    assert f"the run is now {aside.name}, and is trained again" in said


def test_a_run_damaged_twice_leaves_one_folder_aside(made, damaged):
    folder = damaged("whole", "log.npy", cut)
    obtain()
    cut(folder / "log.npy", None)
    require_same(obtain(), made[2])
    assert len(list(folder.parent.glob("*.damaged*"))) == 1


def test_of_several_runs_only_the_damaged_one_is_trained_again(made, damaged, monkeypatch):
    folder = damaged("whole", "buffers.npy", flip(0.5))
    trained = []
    module = __import__("sys").modules["paper_lib.runs.obtain"]
    original = module._train
    monkeypatch.setattr(module, "_train", lambda run, *a: (trained.append(run), original(run, *a)))
    first, _ = runs.train_all([CONFIG, OTHER], DATA, SmallNet, progress=False)
    assert [run.folder for run in trained] == [folder]
    require_same(first, made[2])


def test_files_are_read_once_by_a_process_and_again_when_they_change(damaged, monkeypatch):
    folder, read, of = damaged("whole", "log.npy", lambda *paths: None), [], checksums.of
    monkeypatch.setattr(checksums, "of", lambda *args: (read.append(1), of(*args))[1])
    for _ in range(3):
        obtain()
    once = len(read)
    assert once == len(list(folder.iterdir())) - 1
    os.utime(folder / "log.npy")
    obtain()
    assert len(read) == 2 * once


@pytest.mark.parametrize("kind", ["whole", "half"])
@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENOMEM, errno.EACCES, errno.ESTALE])
def test_what_cannot_be_read_just_now_is_not_taken_for_damaged(kind, code, damaged, monkeypatch):
    folder, blocks = damaged(kind, None, lambda *paths: None), checksums._blocks

    def read(path, n):
        if path.suffix == ".npy":
            raise OSError(code, "not now", str(path))
        return blocks(path, n)

    before = sorted(folder.iterdir())
    monkeypatch.setattr(checksums, "_blocks", read)
    with pytest.raises(OSError, match="not now"):
        obtain()
    assert sorted(folder.iterdir()) == before


def test_what_a_run_does_not_list_is_not_taken_for_its_own(made, damaged):
    def junk(path, other):
        shutil.copy(other / "state-15.npz", path / "state-7.npz")
        (path / ".DS_Store").touch()

    folder = damaged("whole", None, junk)
    run = obtain()
    np.testing.assert_array_equal(run.at(7), run.weights[7])
    assert (folder / ".DS_Store").exists()


def test_a_diverged_run_is_checked_as_any_other(damaged, tmp_path, monkeypatch):
    monkeypatch.setenv("PAPER_RUNS", str(tmp_path))
    run = obtain(CONFIG.replace(lr=1e30, weight_decay=0.1))
    assert run.diverged
    checksums.verified(run.folder)


# --- half-finished runs ---------------------------------------------------------------------------


@pytest.mark.parametrize("damage", DAMAGES)
def test_no_damage_of_a_half_finished_run_changes_a_number(damage, made, damaged):
    part = damaged("half", None, lambda *paths: None)
    for file in sorted(path.name for path in part.iterdir()):
        damaged("half", file, DAMAGES[damage])
        try:
            checksums.verified(part, checksums.HALF)
        except OSError:
            files.remove(part)  # it starts again: see below
            continue
        require_same(obtain(), made[2])
        files.remove(part.with_suffix(""))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("weights.npy", "early bit"),
        ("averages.npy", "cut"),
        ("log.npy", "gone"),
        ("resume-10.npz", "another's"),
        ("resume-10.npz", "empty"),
        ("resume.txt", "half zero"),
        ("state-5.npz", "pipe"),
        ("buffers.npy", "folder"),
        *((None, damage) for damage in OF_FOLDERS),
    ],
)
def test_a_damaged_half_finished_run_starts_again_and_says_so(name, damage, made, damaged, capfd):
    part = damaged("half", name, (OF_FOLDERS if name is None else DAMAGES)[damage])
    capfd.readouterr()
    require_same(obtain(), made[2])
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and said.endswith(": the run starts again\n")
    assert str(part if name is None else part / name) in said


def test_a_run_killed_before_anything_was_saved_starts_again(made, damaged, capfd):
    part = damaged("half", "resume.txt", gone)
    (part / "resume-10.npz").unlink()
    capfd.readouterr()
    require_same(obtain(), made[2])
    said = capfd.readouterr().err
    assert said == f"{part / 'resume.txt'} is missing: the run starts again\n"


def test_a_restart_says_where_it_goes_on_and_leaves_nothing_of_the_killed_process(
    made, damaged, capfd
):
    def junk(path, other):
        for name in (".weights.123.npy", ".resume-15.99.npz", "state-12.npz", "resume-5.npz"):
            shutil.copy(path / "state-5.npz", path / name)
        (path / "folder").mkdir()

    part = damaged("half", None, junk)
    capfd.readouterr()
    run = obtain()
    require_same(run, made[2])
    assert capfd.readouterr().err == f"going on from step 10 of 20: {part}\n"
    whole = made[0] / "whole" / made[1]
    assert sorted(os.listdir(run.folder)) == sorted(os.listdir(whole))


def test_a_process_that_waits_says_for_what(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(files, "LOCK_S", 0.1)
    held, ready = threading.Event(), threading.Event()

    def hold():
        with files.lock(tmp_path / "run"):
            ready.set()
            held.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    ready.wait(30)
    threading.Timer(0.5, held.set).start()
    with files.lock(tmp_path / "run"):
        assert held.is_set()
    holder.join()
    line = f"waiting for another process, which is making {tmp_path / 'run'}\n"
    assert capfd.readouterr().err == line


# --- paper-lib verify -----------------------------------------------------------------------------


def test_verify_names_every_damaged_run_and_changes_nothing(damaged, tmp_path, capsys):
    folder = damaged("whole", "log.npy", lambda *paths: None)
    shutil.copytree(folder, folder.with_name(folder.name + ".damaged"))
    assert main(["verify"]) == 0
    assert capsys.readouterr().out == "2 of 2 runs are what was written: 0.00 GB\n"
    flip(0.5)(folder / "log.npy", None)
    before = sorted(tmp_path.rglob("*"))
    assert main(["verify", str(tmp_path)]) == 1 == main(["verify", str(folder)])
    out = capsys.readouterr().out
    assert out.count(f"{folder / 'log.npy'} is not what was written\n") == 2
    assert "1 of 2 runs are what" in out and "1 damaged: each is set aside and trained again" in out
    assert sorted(tmp_path.rglob("*")) == before


def test_verify_refuses_what_is_no_folder(tmp_path, capsys):
    assert main(["verify", str(tmp_path / "nowhere")]) == 2
    assert "it must be one of runs" in capsys.readouterr().err
