import hashlib
import io
import pickle
import shutil
import tarfile
import urllib.error

import numpy as np
import pytest
import torch
from PIL import Image
from test_images import pixels
from torchvision import datasets
from torchvision.datasets import utils

from paper_lib import data
from paper_lib.__main__ import main
from paper_lib.data import cifar


def offline(*args, **kwargs):
    raise urllib.error.URLError("no network")


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A CIFAR-10 archive of 5 x 8 and 6 images, and these; torchvision expects it, offline."""
    rng = np.random.default_rng(0)
    sizes = {f"data_batch_{i}": 8 for i in range(1, 6)} | {"test_batch": 6}
    images = {name: rng.integers(0, 256, (n, 3072), dtype=np.uint8) for name, n in sizes.items()}
    files = {name: {"data": x, "labels": list(range(len(x)))} for name, x in images.items()}
    files["batches.meta"] = {"label_names": [f"class {i}" for i in range(10)]}
    path, sums = tmp_path / "cifar-10-python.tar.gz", {}
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            packed = pickle.dumps(content)
            sums[name] = hashlib.md5(packed).hexdigest()
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(packed)
            tar.addfile(member, io.BytesIO(packed))
    listed = [[name, sums[name]] for name in sizes]
    expected = {
        "tgz_md5": hashlib.md5(path.read_bytes()).hexdigest(),
        "train_list": listed[:5],
        "test_list": listed[5:],
        "meta": {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]},
    }
    for name, value in expected.items():
        monkeypatch.setattr(datasets.CIFAR10, name, value)
    monkeypatch.setattr(utils.urllib.request, "urlopen", offline)
    return path, images


def test_an_archive_that_lies_there_is_used(archive):
    path, images = archive
    dataset = data.load("cifar10", path.parent, held_out=10)
    assert dataset.sizes == {"train": 30, "held": 10, "test": 6}
    assert (dataset.shape, dataset.n_classes) == ((3, 32, 32), 10)
    (x, _), *_ = dataset.evaluation("test", size=6)
    shown = pixels(x, cifar.MEAN["cifar10"], cifar.STD["cifar10"])
    assert sorted(shown.flatten(1).tolist()) == sorted(images["test_batch"].tolist())


def test_training_batches_are_augmented_and_test_batches_are_not(archive):
    dataset = data.load("cifar10", archive[0].parent)
    x, y = dataset.batch(0, 8, 0)
    assert x.shape == (8, 3, 32, 32) and x.dtype == torch.float32 and y.dtype == torch.int64
    stored = {row.numpy().tobytes() for chunk, _ in dataset.evaluation("train") for row in chunk}
    assert sum(row.numpy().tobytes() in stored for row in x) <= 1
    stored = {row.numpy().tobytes() for chunk, _ in dataset.evaluation("test") for row in chunk}
    assert all(row.numpy().tobytes() in stored for row in dataset.batch(0, 6, 0, split="test")[0])


@pytest.mark.parametrize("content", [None, b"cut short"])
def test_offline_says_which_file_and_where(archive, content):
    path, _ = archive
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    remedy = rf"no network.* put the archive {path.name} \(MD5 [0-9a-f]{{32}}\) into {path.parent} "
    with pytest.raises(data.DataError, match=remedy):
        data.load("cifar10", path.parent)


def test_unpacked_files_that_are_damaged_are_unpacked_again(archive):
    path, _ = archive
    first = data.load("cifar10", path.parent)
    damaged = path.parent / "cifar-10-batches-py" / "data_batch_3"
    damaged.write_bytes(damaged.read_bytes()[:-10])
    assert data.load("cifar10", path.parent).fingerprint == first.fingerprint


def test_the_tree_holds_every_image_under_its_class(archive, tmp_path):
    root, tree = archive[0].parent, tmp_path / "tree"
    cifar.write_jpegs("cifar10", root, tree)
    assert len(list(tree.glob("train/*/*.jpg"))) == 40 and len(list(tree.glob("test/*/*.jpg"))) == 6
    assert sorted(p.name for p in (tree / "train").iterdir()) == [f"class {i}" for i in range(8)]
    for name in ("class 6", "class 7"):  # of which the small archive has no test images
        shutil.rmtree(tree / "train" / name)
    dataset = data.load("imagefolder", tree, image_size=32, held_out=4, progress=False)
    assert dataset.sizes == {"train": 26, "held": 4, "test": 6}
    with pytest.raises(ValueError, match="train/ is there already"):
        cifar.write_jpegs("cifar10", root, tree)


def test_a_tree_that_was_interrupted_is_written_anew(archive, tmp_path, monkeypatch):
    root, tree, save = archive[0].parent, tmp_path / "tree", Image.Image.save

    def interrupted(image, file, **options):
        if file.name == "00010.jpg":
            raise KeyboardInterrupt
        save(image, file, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Image.Image, "save", interrupted)
        cifar.write_jpegs("cifar10", root, tree)
    assert len(list(tree.rglob("*.jpg"))) == 10 and not (tree / "train").exists()
    cifar.write_jpegs("cifar10", root, tree)
    assert len(list(tree.glob("train/*/*.jpg"))) == 40


def test_other_datasets_are_refused(tmp_path, capsys):
    assert main(["jpegs", "mnist", str(tmp_path)]) == 2
    assert "dataset = 'mnist' is not allowed: cifar10 or cifar100" in capsys.readouterr().err
