import contextlib
import functools
import io
import itertools
import os
import shutil
import socket
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps
from test_data import equal

from paper_lib import data
from paper_lib.data import images
from paper_lib.data.augment import ResizedCrop, central_square
from paper_lib.data.images import MEAN, STD, StreamedImages, decode, decode_all
from paper_lib.errors import ConfigError

SPLITS = ("train", "val")
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
    (cached,) = (tree / ".decoded").glob("16px-*.npy")
    changed = tree / "train" / "bee" / "00.jpg"
    os.utime(changed, (1, 1))  # the bytes are the same
    with monkeypatch.context() as patch:
        patch.setattr(images, "in_workers", lambda *_: pytest.fail("decoded again"))
        assert load(tree).fingerprint == first.fingerprint
    Image.new("RGB", (30, 30), "red").save(changed)
    again = load(tree)
    assert again.fingerprint != first.fingerprint
    assert not cached.exists() and len(list((tree / ".decoded").glob("16px-*.npy"))) == 1


def test_files_are_read_once(tree, monkeypatch):
    first = load(tree, streaming=True).fingerprint
    monkeypatch.setattr(images, "tqdm", lambda *_, **__: pytest.fail("read again"))
    assert load(tree, streaming=True).fingerprint == first


def flat(path, level):
    """A picture whose file is as long, and as old, as any other's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (level,) * 3).save(path)
    os.utime(path, (1, 1))


def overwritten(root):
    for i in range(4):
        flat(root / f"train/a/{i}.ppm", 100 + i)


def renamed_over(root):
    for i in range(4):
        flat(root / "new.ppm", 100 + i)
        (root / "new.ppm").replace(root / f"train/a/{i}.ppm")


def folders_exchanged(root):
    for old, new in (("a", "c"), ("b", "a"), ("c", "b")):
        (root / "train" / old).rename(root / "train" / new)


@pytest.mark.parametrize("replace", [overwritten, renamed_over, folders_exchanged])
@pytest.mark.parametrize("streaming", [False, True])
def test_images_replaced_by_others_of_the_same_size_and_time_are_other_data(
    tmp_path, replace, streaming
):
    for i in range(4):
        for j, name in enumerate(("train/a", "train/b", "val/a", "val/b")):
            flat(tmp_path / f"{name}/{i}.ppm", 20 + 4 * j + i)

    def seen():
        dataset = load(tmp_path, image_size=8, streaming=streaming)
        levels = [pixels(x)[:, 0, 4, 4].tolist() for x, _ in dataset.evaluation("train")]
        return dataset.fingerprint, levels

    before = seen()
    replace(tmp_path)
    after = seen()
    assert after[0] != before[0] and after[1] != before[1]


def test_a_damaged_cache_is_decoded_again(tree):
    expected = load(tree).batch(0, 8, 0)
    (cached,) = (tree / ".decoded").glob("16px-*.npy")
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
    assert not list(tree.glob(".decoded/16px-*.npy")) and not list(tree.glob(".decoded/*.tmp"))


# --- what a file holds, and what is seen of it ---------------------------------------------------

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOURS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)


def seen_in(path):
    return decode(path, 16, central_square).transpose(1, 2, 0)


def deep(levels, kind):
    return Image.fromarray((levels.astype(np.float64) * 257).astype(kind))


def with_alpha(mode, alpha):
    image = Image.fromarray(COLOURS).convert(mode)
    image.putalpha(alpha)
    return image


def palette(transparent):
    image = Image.fromarray(RAMP)
    return image.convert("P"), {"transparency": transparent}


GREY = np.dstack([RAMP] * 3)
LUMA = np.asarray(Image.fromarray(COLOURS).convert("L").convert("RGB"))
WHITE = np.full((16, 16, 3), 255, np.uint8)
HALF = np.asarray(Image.blend(Image.fromarray(WHITE), Image.fromarray(COLOURS), 128 / 255))
TENTH_IS_WHITE = np.where(RAMP[..., None] == 10, 255, GREY)
AS_SEEN = {  # image, how it is saved, what is to be seen
    "16 bits, png": (deep(RAMP, np.uint16), "png", {}, GREY),
    "16 bits, tif": (deep(RAMP, np.uint16), "tif", {}, GREY),
    "16 bits, big-endian tif": (deep(RAMP, ">u2"), "tif", {}, GREY),
    "1 bit": (Image.fromarray(RAMP > 127), "png", {}, np.where(GREY > 127, 255, 0)),
    "grey": (Image.fromarray(RAMP), "bmp", {}, GREY),
    "palette": (Image.fromarray(RAMP).convert("P"), "gif", {}, GREY),
    "colours": (Image.fromarray(COLOURS), "tiff", {}, COLOURS),
    "CMYK": (Image.fromarray(COLOURS).convert("CMYK"), "tif", {}, COLOURS),
    "transparent": (with_alpha("RGB", 0), "png", {}, WHITE),
    "transparent webp": (with_alpha("RGB", 0), "webp", {"lossless": True}, WHITE),
    "transparent grey": (with_alpha("L", 0), "png", {}, WHITE),
    "half transparent": (with_alpha("RGB", 128), "png", {}, HALF),
    "opaque": (with_alpha("RGB", 255), "png", {}, COLOURS),
    "opaque grey": (with_alpha("L", 255), "png", {}, LUMA),
    "transparent entry of a palette": (*palette(10)[:1], "png", palette(10)[1], TENTH_IS_WHITE),
    "transparent entry of a gif": (*palette(10)[:1], "gif", palette(10)[1], TENTH_IS_WHITE),
    "palette with alpha": (*palette(0)[:1], "png", {"transparency": bytes(256)}, WHITE),
    "transparent colour": (
        Image.fromarray(GREY),
        "png",
        {"transparency": (10, 10, 10)},
        TENTH_IS_WHITE,
    ),
    **{
        f"frames of a {kind}": (
            Image.fromarray(GREY),
            kind,
            {"save_all": True, "append_images": [Image.fromarray(WHITE)], **options},
            GREY,
        )
        for kind, options in (("gif", {}), ("tif", {}), ("webp", {"lossless": True}))
    },
}


@pytest.mark.parametrize("what", AS_SEEN)
def test_every_kind_of_picture_is_as_one_sees_it(tmp_path, what):
    image, kind, options, expected = AS_SEEN[what]
    path = tmp_path / f"x.{kind}"
    image.save(path, **options)
    assert np.abs(seen_in(path).astype(int) - expected).max() <= (what == "half transparent")


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif"])
def test_pictures_are_turned_as_their_exif_data_say(tmp_path, kind, orientation):
    """Whole, at a fraction of a JPEG's size, and where another part than the middle is cut out."""
    y, x = np.mgrid[0:160, 0:256] / 256
    image = Image.fromarray((255 * np.stack([x, y, x * y], axis=-1)).astype(np.uint8))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image.save(path := tmp_path / f"x.{kind}", exif=exif, quality=95)
    upright = ImageOps.exif_transpose(Image.open(path))
    asked = []

    def crop(width, height):
        asked.append((width, height))
        return 8, 16, width - 40, height - 24

    for size in (16, 128):
        box = crop(*upright.size)
        expected = upright.convert("RGB").resize((size, size), Image.Resampling.BILINEAR, box=box)
        found = decode(path, size, crop).transpose(1, 2, 0)
        assert np.abs(found.astype(int) - np.asarray(expected)).max() <= 3
    assert set(asked) == {upright.size} == {(256, 160)[:: -1 if orientation in (5, 6, 7, 8) else 1]}


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (8, 2000), (1200, 800)])
@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_pictures_of_any_size_are_whole(tmp_path, size, kind):
    Image.new("RGB", size, (40, 90, 200)).save(path := tmp_path / f"x.{kind}")
    (draw,) = ResizedCrop().draw(np.random.default_rng(0), 1)
    crops = [central_square, functools.partial(central_square, part=224 / 256)]
    for crop in (*crops, functools.partial(ResizedCrop().box, draw=draw)):
        for side in (8, 64):
            found = decode(path, side, crop).reshape(3, -1).T
            assert np.abs(found.astype(int) - (40, 90, 200)).max() <= 2


def saved(image, **options):
    return lambda path: image.save(path, **options)


def cut_short(path):
    Image.fromarray(COLOURS).resize((64, 64)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def bomb(path):
    Image.new("1", (8, 8)).save(path)
    claimed = np.int32([20_000, 20_000]).tobytes()
    path.write_bytes(path.read_bytes()[:18] + claimed + path.read_bytes()[26:])


UNUSABLE = {  # file -> what is written there, and the reason given
    "long.tif": (saved(deep(RAMP, np.int32)), "mode I has 32 bits: save it as 0 to 255"),
    "float.tif": (saved(deep(RAMP, np.float32)), "mode F has 32 bits: save it as 0 to 255"),
    "empty.jpg": (lambda path: path.touch(), "cannot identify image file"),
    "text.png": (lambda path: path.write_text("<html>404</html>"), "cannot identify image file"),
    "bomb.bmp": (bomb, "400000000 pixels. exceeds limit"),
    **{f"cut.{kind}": (cut_short, "") for kind in "jpg png gif bmp ppm tif webp".split()},
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_picture_that_cannot_be_seen_is_refused(tmp_path, name):
    write, reason = UNUSABLE[name]
    write(path := tmp_path / name)
    with pytest.raises(data.DataError, match=rf"unusable image {path} .*{reason}.*: repair or"):
        seen_in(path)


# --- what a tree holds ---------------------------------------------------------------------------


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


def link(name, to):
    return lambda root: (root / name).symlink_to(to)


def socket_at(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))  # a name of at most 107 bytes


def two_links(root):
    """Each leads to where the other is."""
    for one, other in (("a", "b"), ("b", "a")):
        (root / one).mkdir()
        (root / one / "link").symlink_to(root / other)
    (root / "train/ant/link").symlink_to(root / "a")


SPOILED = {
    "train is missing": remove("train"),
    "val/<class>/ or test/<class>/: .*test is missing": remove("val"),
    "train has 0 class folders: two": remove("train/ant", "train/bee", "train/cat"),
    "train has 1 class folders: two": remove(*(f"{x}/{y}" for x in SPLITS for y in ("ant", "cat"))),
    "train/dog has no images": make("train/dog", "val/dog"),
    r"only one of .*train and .*val has \['dog'\]": make("train/dog"),
    r"only one of .*train and .*val has \['ant'\]": remove("train/ant"),
    "cannot read or keep .*[.]decoded.*: .*links": lambda root: (root / ".decoded").write_text(""),
    "cat/x.png is no file.*: remove it": link("val/cat/x.png", "gone"),
    "Too many levels.*val/cat/y.png.*: repair or remove": link("val/cat/y.png", "y.png"),
    "Too many levels.*train/cat/z.png.*: repair or rem": link("train/cat/z.png", "z.png"),
    "ant/pipe.jpg is no file": lambda root: os.mkfifo(root / "val/ant/pipe.jpg"),
    "ant/plug.gif is no file": lambda root: socket_at(root / "train/ant/plug.gif"),
    "ant/null.jpg is no file": link("train/ant/null.jpg", "/dev/null"),
    "bee/up is a link to a folder of its own class": link("train/bee/up", "."),
    "bee/top/bee is a link to a folder of its own": link("train/bee/top", ".."),
    "link is a link to a folder of its own class": two_links,
    r"train/dog\\nred has no images": make("train/dog\nred", "val/dog\nred"),
    r"train/dog\\udcff has no images": make("train/dog\udcff", "val/dog\udcff"),
}


@pytest.mark.parametrize("message", SPOILED)
def test_a_tree_that_cannot_be_used_says_why(tree, message):
    SPOILED[message](tree)
    with pytest.raises(data.DataError, match=message) as caught:
        load(tree, streaming=True)
    assert str(caught.value).isprintable()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["train/ant", "val/cat/00.jpg", "train", "."])
def test_what_may_not_be_read_is_named(tree, name):
    (tree / name).chmod(0)
    try:
        with pytest.raises(data.DataError, match=f"{tree / name}.*: repair or remove it"):
            load(tree)
    finally:
        (tree / name).chmod(0o755)


def test_what_is_no_picture_by_its_name_is_left_out_and_folders_may_be_deep(tree):
    before = load(tree, streaming=True)
    for clutter in ("train/x.jpg", "train/ant/Thumbs.db", "train/ant/.DS_Store", "val/.DS_Store"):
        (tree / clutter).write_bytes(b"?")
    assert load(tree, streaming=True).fingerprint == before.fingerprint
    deep = tree / "train/ant/x.jpg" / "/".join("d" * 150)  # a folder named as a picture
    deep.mkdir(parents=True)
    os.mkfifo(deep / "pipe")
    Image.new("RGB", (8, 8)).save(deep / b"\xff\n.png".decode(errors="surrogateescape"))
    assert load(tree, streaming=True).sizes["train"] == before.sizes["train"] + 1


IMAGE_BYTES = {
    kind: (lambda file: (Image.fromarray(COLOURS).save(file, kind), file.getvalue())[1])(
        io.BytesIO()
    )
    for kind in ("JPEG", "PNG", "GIF", "TIFF", "WEBP")
}
CONTENT = st.one_of(
    st.sampled_from([*IMAGE_BYTES.values()]),
    st.binary(max_size=40),
    st.builds(
        lambda whole, at, junk: whole[:at] + junk + whole[at + len(junk) :],
        st.sampled_from([*IMAGE_BYTES.values()]),
        st.integers(0, 900),
        st.binary(max_size=9),
    ),
)
NAME = st.builds(
    lambda name, end: os.fsdecode(name.replace(b"/", b"").replace(b"\0", b"")[:60] or b"a") + end,
    st.one_of(
        st.binary(max_size=20), st.text(max_size=20).map(lambda s: s.encode(errors="replace"))
    ),
    st.sampled_from([".jpg", ".PNG", ".gif", ".tif", ".webp", ".txt", ""]),
).filter(lambda name: name not in (".", ".."))
CLASS = st.one_of(st.sampled_from(["a", "b", "c"]), NAME)
ENTRY = st.tuples(
    st.sampled_from(["train", "train", "val", "test"]),
    CLASS,
    st.lists(NAME, max_size=3),  # folders in the class, and the file
    st.one_of(CONTENT, st.sampled_from(["pipe", "folder", "link", "up", "loop"])),
)


def plant(root, entry):
    """One entry of a tree, unless something is in its way."""
    split, name, rest, what = entry
    path = root.joinpath(split, name, *rest)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(what, bytes):
            path.write_bytes(what) if not path.exists() else None
        elif what == "folder":
            path.mkdir()
        elif what == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to({"link": root / "train", "up": "..", "loop": path.name}[what])


@settings(max_examples=60)
@given(st.lists(ENTRY, max_size=12), st.booleans())
def test_any_tree_gives_batches_or_says_what_is_wrong(entries, sound):
    """Half of the trees have what a tree needs, so that what else is there decides."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for split, name in itertools.product(("train", "val"), "ab") if sound else ():
            flat(root / split / name / "0.ppm", 90)
        for entry in entries:
            plant(root, entry)
        try:
            dataset = load(root, image_size=8, streaming=True)
            x, _ = dataset.batch(0, dataset.sizes["train"], 0)
            assert x.isfinite().all() and len(dataset.fingerprint) == 16
        except ConfigError as error:
            assert str(error).isprintable() and len(str(error)) < 1000


def test_links_to_the_folders_of_a_read_only_tree_are_as_good(tree, tmp_path):
    (tmp_path / "links").mkdir()
    for split in ("train", "val"):
        (tmp_path / "links" / split).symlink_to(tree / split, target_is_directory=True)
    assert load(tmp_path / "links").fingerprint == load(tree).fingerprint
    (tree / ".decoded").rename(tree / "gone")
    load(tmp_path / "links")
    assert not (tree / ".decoded").exists()


@pytest.mark.parametrize("size", [4, 5000, 32.0, "32", None, -8])
def test_an_image_size_that_cannot_be_is_refused(tree, size):
    with pytest.raises(ConfigError, match="image_size = .* from 8 to 4096 pixels"):
        load(tree, image_size=size)
