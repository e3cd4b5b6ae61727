import numpy as np
import pytest
import torch

from paper_lib import data
from paper_lib.data import digits


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def pool(root):
    return data.load("digits", root, held_out=8000)


def saved(root):
    return next((root / "digits").glob("images-*.npy"))


def test_sizes_and_scale(pool):
    assert pool.sizes == {"train": 121_700, "held": 8_000, "test": 5_000}
    assert (pool.name, pool.shape, pool.n_classes) == ("digits", (1, 8, 8), 10)
    x, y = pool.batch(0, 64, 0)
    assert x.shape == (64, 1, 8, 8) and x.dtype == torch.float32 and y.shape == (64,)
    x = pool._images["train"]
    assert abs(x.mean()) < 0.03 and abs(x.std() - 1) < 0.03


def test_the_split_is_stratified_and_every_variant_differs(pool):
    share = {split: torch.bincount(y).double() / len(y) for split, y in pool._labels.items()}
    torch.testing.assert_close(share["train"], share["test"], atol=0.003, rtol=0)
    assert len(torch.unique(pool._images["train"][:1000].flatten(1), dim=0)) == 1000


def test_without_distortion_the_originals_come_back(monkeypatch):
    still = dict.fromkeys(["rotation_degrees", "shear", "scale", "shift_pixels", "noise"], 0.0)
    monkeypatch.setattr(
        digits, "RECIPE", digits.RECIPE | still | {"train_variants": 2, "test_variants": 1}
    )
    out = np.empty((2 * 1297 + 500, 1, 8, 8), np.float32)
    digits._generate(out, seed=0)
    originals = digits._originals(0)[0]
    expected = (np.concatenate([originals[:1297].repeat(2, axis=0), originals[1297:]]) - 0.28) / 0.4
    np.testing.assert_allclose(out[:, 0], expected, atol=1e-5)


def test_training_and_test_originals_are_different_images():
    assert len(np.unique(digits._originals(0)[0], axis=0)) == len(digits._originals(0)[1]) == 1797


def test_the_affine_maps_are_as_stated():
    maps = digits._affine(np.random.default_rng(0), 20_000).astype(np.float64)
    scale = 1 / np.sqrt(np.linalg.det(maps[:, :, :2]))
    angle = np.rad2deg(np.arctan2(maps[:, 1, 0], maps[:, 0, 0]))
    shift = maps[:, :, 2] * 4
    for values, bound, middle in [(scale, 0.2, 1), (angle, 20, 0), (shift, 1.2, 0)]:
        assert np.abs(values - middle).max() == pytest.approx(bound, rel=0.01)


def test_a_second_load_reads_what_the_first_made(root, pool, monkeypatch):
    monkeypatch.setattr(digits, "_generate", lambda out, seed: pytest.fail("generated again"))
    again = data.load("digits", root, held_out=8000)
    assert torch.equal(again.batch(5, 64, 0)[0], pool.batch(5, 64, 0)[0])
    assert again.fingerprint == pool.fingerprint


def test_damaged_files_are_made_again_with_the_same_bits(root, pool):
    expected = pool.batch(5, 64, 0)[0].clone()
    path = saved(root)
    content = path.read_bytes()
    middle = len(content) // 2
    altered = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    for damaged in (content[:-1000], altered, b"", b"not an array"):
        path.unlink()  # the fixture still maps the old file
        path.write_bytes(damaged)
        again = data.load("digits", root, held_out=8000)
        assert torch.equal(again.batch(5, 64, 0)[0], expected)
        assert saved(root).read_bytes() == content


def test_an_interrupted_generation_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(out, seed):
        raise KeyboardInterrupt

    monkeypatch.setattr(digits, "_generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.load("digits", tmp_path)
    assert [path.suffix for path in (tmp_path / "digits").iterdir()] in ([], [".lock"])


def test_another_seed_is_another_split(root, pool):
    other = data.load("digits", root, held_out=8000, seed=1)
    assert other.fingerprint != pool.fingerprint
    assert not torch.equal(other._labels["test"], pool._labels["test"])
