"""CIFAR as a tree of files: every image under its class, readable by the loader of trees, never half written."""

import shutil

import pytest
from PIL import Image
from test_vision import archive  # noqa: F401

from paper_lib import data
from paper_lib.__main__ import main
from paper_lib.data import jpegs


def test_the_tree_holds_every_image_under_its_class(archive, tmp_path):  # noqa: F811
    path, images = archive
    tree = tmp_path / "tree"
    jpegs.write("cifar10", path.parent, tree)
    assert len(list(tree.glob("train/*/*.jpg"))) == 40 and len(list(tree.glob("test/*/*.jpg"))) == 6
    assert sorted(p.name for p in (tree / "train").iterdir()) == [f"class {i}" for i in range(8)]
    for name in ("class 6", "class 7"):  # of which the small archive has no test images
        shutil.rmtree(tree / "train" / name)
    dataset = data.load("imagefolder", tree, image_size=32, held_out=4, progress=False)
    assert dataset.sizes == {"train": 26, "held": 4, "test": 6}
    with pytest.raises(ValueError, match="train/ is there already"):
        jpegs.write("cifar10", path.parent, tree)


def test_a_tree_that_was_interrupted_is_written_anew(archive, tmp_path, monkeypatch):  # noqa: F811
    path, _ = archive
    save, saved = Image.Image.save, []

    def interrupted(image, file, **options):
        saved.append(file)
        if len(saved) == 10:
            raise KeyboardInterrupt
        save(image, file, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Image.Image, "save", interrupted)
        jpegs.write("cifar10", path.parent, tmp_path / "tree")
    assert not (tmp_path / "tree" / "train").exists()
    jpegs.write("cifar10", path.parent, tmp_path / "tree")
    assert len(list((tmp_path / "tree").glob("train/*/*.jpg"))) == 40


def test_other_datasets_are_refused(tmp_path, capsys):
    assert main(["jpegs", "mnist", str(tmp_path)]) == 2
    assert "dataset = 'mnist' is not allowed: cifar10 or cifar100" in capsys.readouterr().err
