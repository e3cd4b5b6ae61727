import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from paper_lib.data.augment import FlipCrop, ResizedCrop, central_square


def flip_crop_reference(x, draws, pad):
    """One image at a time, in the order crop, then flip."""
    out = []
    for image, (flip, top, left) in zip(x, draws.tolist(), strict=True):
        crop = F.pad(image, (pad,) * 4)[:, top : top + image.shape[1], left : left + image.shape[2]]
        out.append(crop.flip(-1) if flip else crop)
    return torch.stack(out)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_flip_crop_equals_the_readable_reference(dtype):
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.integers(0, 256, (64, 3, 6, 10))).to(dtype)
    augment = FlipCrop(pad=2)
    draws = torch.from_numpy(augment.draw(rng, 64))
    assert torch.equal(augment.apply(x, draws), flip_crop_reference(x, draws, 2))


def test_flip_crop_draws_every_flip_and_offset_alike():
    draws = FlipCrop(pad=4).draw(np.random.default_rng(0), 90_000)
    assert draws[:, 0].mean() == pytest.approx(0.5, abs=0.01)
    for offsets in draws[:, 1:].T:
        counts = np.bincount(offsets, minlength=9)
        assert len(counts) == 9
        np.testing.assert_allclose(counts, 10_000, rtol=0.05)


@given(width=st.integers(1, 2000), height=st.integers(1, 2000), seed=st.integers(0, 1000))
def test_resized_crop_stays_inside_the_image(width, height, seed):
    augment = ResizedCrop()
    (draw,) = augment.draw(np.random.default_rng(seed), 1)
    left, top, right, bottom = augment.box(width, height, draw)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_resized_crop_has_the_stated_areas_and_ratios():
    augment = ResizedCrop()
    draws = augment.draw(np.random.default_rng(0), 4000)
    boxes = np.array([augment.box(400, 400, draw) for draw in draws])
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area, ratio = w * h / 400**2, w / h
    assert area.min() > 0.075 and 0.95 < area.max() <= 1
    assert ratio.min() > 0.74 and ratio.max() < 1.35
    assert augment.flips(draws).mean() == pytest.approx(0.5, abs=0.03)
    assert abs(np.mean(boxes[:, 0] + w / 2) - 200) < 3  # centred on average


def test_resized_crop_falls_back_to_the_widest_central_crop():
    augment = ResizedCrop()
    draw = np.ones(41)  # the whole area, which never fits in so long an image
    assert augment.box(1000, 90, draw) == pytest.approx((440, 0, 560, 90))


def test_central_square():
    assert central_square(10, 6) == (2, 0, 8, 6)
    assert central_square(256, 512, part=224 / 256) == (16, 144, 240, 368)
