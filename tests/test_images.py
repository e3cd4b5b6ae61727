import functools
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import equal

from paper_lib import data
from paper_lib.data import images
from paper_lib.data.augment import ResizedCrop, central_square
from paper_lib.data.images import MEAN, STD, StreamedImages, decode, decode_all

KINDS = (("jpg", "RGB"), ("JPEG", "L"), ("png", "RGBA"), ("png", "P"))


def write_tree(root):
    """3 classes x (12 to train on, 5 to test) images of noise in many kinds, and clutter."""
    rng = np.random.default_rng(0)
    for split, n in (("train", 12), ("val", 5)):
        for name in ("ant", "bee", "cat"):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                kind, mode = KINDS[i % len(KINDS)]
                pixels = rng.integers(0, 256, (20 + 3 * i, 50 - 2 * i, 3), dtype=np.uint8)
                Image.fromarray(pixels).convert(mode).save(root / split / name / f"{i:02}.{kind}")
            (root / split / name / ".hidden.jpg").write_bytes(b"not an image")
            (root / split / name / "notes.txt").write_text("not an image")
        (root / split / ".cache").mkdir()
    return root


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path / "tree")


def load(root, **options):
    return data.load("imagefolder", root, **{"image_size": 16, "progress": False} | options)


def pixels(x, mean=MEAN, std=STD):
    """Normalized images as bytes again."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    return ((x * std + mean) * 255).round().to(torch.uint8)


@pytest.mark.parametrize("streaming", [False, True])
def test_sizes_shapes_and_labels(tree, streaming):
    dataset = load(tree, held_out=6, streaming=streaming)
    assert dataset.sizes == {"train": 30, "held": 6, "test": 15}
    assert (dataset.shape, dataset.n_classes) == ((3, 16, 16), 3)
    x, y = dataset.batch(0, 8, 0)
    assert x.shape == (8, 3, 16, 16) and x.dtype == torch.float32 and y.dtype == torch.int64
    labels = torch.cat([y for _, y in dataset.evaluation("test", size=4)])
    assert torch.bincount(labels).tolist() == [5, 5, 5]


@pytest.mark.parametrize("streaming", [False, True])
def test_batches_are_pure_functions_of_seed_and_step(tree, streaming):
    dataset = load(tree, streaming=streaming)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    streamed = list(dataset.stream(2, 12, 8, seed=3))  # crosses epochs of 4 steps
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])  # noqa: NPY002
    resumed = load(tree, streaming=streaming)
    for step in (11, 2, 5):
        assert equal(resumed.batch(step, 8, 3), streamed[step - 2])
    for i in (0, 1):
        for half, (x, y) in zip(dataset.part(i, 2).stream(4, 6, 8, 3), streamed[2:4], strict=True):
            assert equal(half, (x[i::2], y[i::2]))


def test_streamed_evaluation_is_the_resized_center(tree):
    dataset = load(tree, streaming=True)
    found = images.scan(tree)
    center = functools.partial(central_square, part=224 / 256)
    expected = [decode(file, 16, center).tobytes() for file in found.files["test"]]
    labels = dict(zip(expected, found.labels["test"].tolist(), strict=True))
    for x, y in dataset.evaluation("test", size=4):
        assert [labels[image.numpy().tobytes()] for image in pixels(x)] == y.tolist()


def test_streamed_training_images_are_resized_crops_of_which_half_are_mirrored(tree):
    dataset = load(tree, streaming=True)
    _, rows, draws = dataset._plan(3, 32, 0, "train")
    x, _ = dataset.batch(3, 32, 0)
    files = images.scan(tree).files["train"]
    for image, row, draw in zip(pixels(x), rows, draws, strict=True):
        expected = decode(files[row], 16, functools.partial(ResizedCrop().box, draw=draw))
        assert np.array_equal(image, expected[:, :, ::-1] if draw[0] < 0.5 else expected)
    assert 0 < (draws[:, 0] < 0.5).sum() < 32


def test_the_memory_limit_chooses(tree, monkeypatch):
    for limit, streamed in ((51 * 3 * 16 * 16, False), (51 * 3 * 16 * 16 - 1, True)):
        monkeypatch.setattr(images, "IN_MEMORY_LIMIT", limit)
        assert isinstance(load(tree), StreamedImages) == streamed


def test_images_of_the_right_size_keep_their_pixels(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    path = tmp_path / "x.png"
    Image.fromarray(noise).save(path)
    assert np.array_equal(decode(path, 16, central_square), noise.transpose(2, 0, 1))


def test_a_jpeg_decoded_at_a_fraction_is_nearly_the_same(tmp_path):
    """Against a crop and a resize of the whole image, on smooth content."""
    y, x = np.mgrid[0:256, 0:320] / 50
    smooth = 127 + 120 * np.stack([np.sin(x), np.cos(y), np.sin(x + y)], axis=-1)
    path = tmp_path / "x.jpg"
    Image.fromarray(smooth.astype(np.uint8)).save(path, quality=95)
    box = (40, 16, 296, 240)
    whole = Image.open(path).crop(box).resize((32, 32), Image.Resampling.BILINEAR)
    fast = decode(str(path), 32, lambda w, h: box).transpose(1, 2, 0)
    assert np.abs(fast.astype(int) - np.asarray(whole)).max() <= 8


def test_threads_change_nothing(tree, monkeypatch):
    paths, decoded = images.scan(tree).files["train"], []
    for n in (1, 4):
        monkeypatch.setattr(images, "cpus", lambda n=n: n)
        decoded.append(decode_all(paths, 16, [central_square] * len(paths)))
    assert np.array_equal(*decoded)


def test_decoding_happens_once_and_again_when_the_tree_changes(tree, monkeypatch):
    first = load(tree)
    (cached,) = (tree / ".decoded").glob("*.npy")
    with monkeypatch.context() as patch:
        patch.setattr(images, "in_workers", lambda *_: pytest.fail("decoded again"))
        assert load(tree).fingerprint == first.fingerprint
    changed = tree / "train" / "bee" / "00.jpg"
    Image.new("RGB", (30, 30), "red").save(changed)
    again = load(tree)
    assert again.fingerprint != first.fingerprint
    assert not cached.exists() and len(list((tree / ".decoded").glob("*.npy"))) == 1
    os.utime(changed, (1, 1))  # an edit that keeps the size shows in the time alone
    monkeypatch.setattr(images, "in_workers", lambda *_: pytest.fail("decoded again"))
    with pytest.raises(pytest.fail.Exception, match="decoded again"):
        load(tree)


def test_a_damaged_cache_is_decoded_again(tree):
    expected = load(tree).batch(0, 8, 0)
    (cached,) = (tree / ".decoded").glob("*.npy")
    content = cached.read_bytes()
    cached.unlink()
    cached.write_bytes(content[:-5] + b"12345")
    assert equal(load(tree).batch(0, 8, 0), expected)
    assert cached.read_bytes() == content


def test_a_copy_of_the_tree_has_the_same_fingerprint(tree, tmp_path):
    copy = shutil.copytree(tree, tmp_path / "copy", copy_function=shutil.copyfile)  # other times
    assert load(copy, streaming=True).fingerprint == load(tree, streaming=True).fingerprint
    assert load(copy).fingerprint == load(tree).fingerprint != load(tree, image_size=24).fingerprint


@pytest.mark.parametrize("streaming", [False, True])
def test_an_unreadable_image_is_named(tree, streaming):
    bad = tree / "train" / "cat" / "03.png"
    bad.write_bytes(bad.read_bytes()[:100])
    with pytest.raises(data.DataError, match=f"^unusable image {bad} "):
        for _ in load(tree, streaming=streaming).stream(0, 3, 12, 0):
            pass
    assert not list(tree.glob(".decoded/*.npy")) and not list(tree.glob(".decoded/*.tmp"))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_images_of_more_than_8_bits_are_refused_not_clipped(tree, dtype):
    path = tree / "val" / "bee" / "deep.tif"
    Image.fromarray(np.linspace(0, 1000, 256, dtype=dtype).reshape(16, 16)).save(path)
    message = f"^unusable image {path} .mode [IF].* more than 8 bits: save it as"
    with pytest.raises(data.DataError, match=message):
        load(tree)


def test_files_are_listed_in_the_order_of_their_paths_within_each_class(tmp_path):
    """The order decides batches. Nested folders and upper-case names count; test/ does for val/."""
    names = "B.JPG a-b/x.png a/z.gif a/é.tif b.webp".split()
    folders = [tmp_path / split / name for split in ("train", "test") for name in ("-b", "b")]
    paths = [folder / name for folder in folders for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    found = images.scan(tmp_path)
    listed = [*found.files["train"], *found.files["test"]]
    assert listed == [str(path).encode() for path in paths]
    assert found.labels["train"].tolist() == found.labels["test"].tolist() == [0] * 5 + [1] * 5


def remove(*names):
    return lambda root: [shutil.rmtree(root / name) for name in names]


def make(*names):
    return lambda root: [(root / name).mkdir() for name in names]


SPOILED = {
    "train is missing": remove("train"),
    "val/<class>/ or test/<class>/: .*test is missing": remove("val"),
    "train has no class folders": remove("train/ant", "train/bee", "train/cat"),
    "train/dog has no images": make("train/dog", "val/dog"),
    r"only one of .*train and .*val has \['dog'\]": make("train/dog"),
    r"only one of .*train and .*val has \['ant'\]": remove("train/ant"),
    "cannot keep .*links to the tree's train": lambda root: (root / ".decoded").write_text(""),
    "cannot list .*x.png .No such file": lambda root: (root / "val/ant/x.png").symlink_to("gone"),
}


@pytest.mark.parametrize("message", SPOILED)
def test_a_tree_that_cannot_be_used_says_why(tree, message):
    SPOILED[message](tree)
    with pytest.raises(data.DataError, match=message):
        load(tree)


def test_links_to_the_folders_of_a_read_only_tree_are_as_good(tree, tmp_path):
    (tmp_path / "links").mkdir()
    for split in ("train", "val"):
        (tmp_path / "links" / split).symlink_to(tree / split, target_is_directory=True)
    assert load(tmp_path / "links").fingerprint == load(tree).fingerprint
    (tree / ".decoded").rename(tree / "gone")
    load(tmp_path / "links")
    assert not (tree / ".decoded").exists()


def test_a_tiny_image_size_is_refused(tree):
    with pytest.raises(ValueError, match="image_size = 4"):
        load(tree, image_size=4)
