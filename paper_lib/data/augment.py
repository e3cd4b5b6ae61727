"""Flip and crop images by random numbers that are given, so that batches can be made again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels


@dataclass(frozen=True)
class FlipCrop:
    """Flip one half of a batch horizontally, and crop each image after padding it with zeros."""

    pad: int

    def draw(self, rng: np.random.Generator, size: int) -> np.ndarray:
        """Numbers for `size` images, (size, 3) int64: flip (0 or 1), row and column of the crop."""
        return rng.integers(0, [2, 2 * self.pad + 1, 2 * self.pad + 1], size=(size, 3))

    def apply(self, x: Tensor, draws: Tensor) -> Tensor:
        """Augment images (N, C, H, W) of any dtype, on their device, by `draws` (N, 3)."""
        n, c, h, w = x.shape
        flip, top, left = draws[:, :, None].unbind(1)
        rows = top + torch.arange(h, device=x.device)
        columns = torch.arange(w, device=x.device)
        columns = left + torch.where(flip.bool(), w - 1 - columns, columns)
        # One gather with flat indices: several times faster than indexing by row and column.
        index = (rows[:, :, None] * (w + 2 * self.pad) + columns[:, None, :]).view(n, 1, h * w)
        padded = F.pad(x, (self.pad,) * 4).view(n, c, -1)
        return padded.gather(2, index.expand(n, c, h * w)).view(n, c, h, w)


@dataclass(frozen=True)
class ResizedCrop:
    """Flip one half of the images and crop a random area and aspect ratio, one image at a time."""

    area: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    attempts: int = 10

    def draw(self, rng: np.random.Generator, size: int) -> np.ndarray:
        """Numbers in 0..1, (size, 1 + 4 * attempts): flip; area, ratio, left and top of each."""
        return rng.random((size, 1 + 4 * self.attempts))

    def flips(self, draws: np.ndarray) -> np.ndarray:
        """Which images are mirrored, (N,) bool, by draws (N, ...)."""
        return draws[:, 0] < 0.5

    def box(self, width: int, height: int, draw: np.ndarray) -> Box:
        """The crop of an image: the first attempt that fits in it, else the largest central one."""
        log_ratio = np.log(self.ratio)
        for area, ratio, left, top in draw[1:].reshape(-1, 4):
            target = width * height * (self.area[0] + area * (self.area[1] - self.area[0]))
            aspect = np.exp(log_ratio[0] + ratio * (log_ratio[1] - log_ratio[0]))
            w, h = round(np.sqrt(target * aspect)), round(np.sqrt(target / aspect))
            if 0 < w <= width and 0 < h <= height:
                x, y = int(left * (width - w + 1)), int(top * (height - h + 1))
                return x, y, x + w, y + h
        aspect = min(max(width / height, self.ratio[0]), self.ratio[1])
        return _central(width, height, min(width, height * aspect), min(height, width / aspect))


def central_square(width: int, height: int, part: float = 1.0) -> Box:
    """The square in the middle of an image, with `part` of the shorter side, in pixels."""
    side = part * min(width, height)
    return _central(width, height, side, side)


def _central(width: int, height: int, w: float, h: float) -> Box:
    x, y = (width - w) / 2, (height - h) / 2
    return x, y, x + w, y + h
