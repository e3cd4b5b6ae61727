"""CIFAR as a tree of files: every image under its class, readable by the loader of trees, never half written."""

import pytest
from test_vision import archive  # noqa: F401

from paper_lib import data, jpegs
from paper_lib.__main__ import main


def test_the_tree_holds_every_image_and_trains(archive, tmp_path):  # noqa: F811
    path, images = archive
    jpegs.write("cifar10", path.parent, tmp_path / "tree")
    dataset = data.load("imagefolder", tmp_path / "tree", image_size=32, held_out=4, progress=False)
    assert dataset.sizes == {"train": 36, "held": 4, "test": 6}
    assert sorted(p.name for p in (tmp_path / "tree" / "train").iterdir()) == [f"class {i}" for i in range(8)]
    with pytest.raises(ValueError, match="train/ is there already"):
        jpegs.write("cifar10", path.parent, tmp_path / "tree")


def test_other_datasets_are_refused(tmp_path, capsys):
    assert main(["jpegs", "mnist", str(tmp_path)]) == 2
    assert "dataset = 'mnist' is not allowed: cifar10 or cifar100" in capsys.readouterr().err
