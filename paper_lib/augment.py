"""Augmentation from given random numbers: what is drawn for a batch, and how it is applied."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class FlipCrop:
    """Horizontal flip (one half of the images) and a random crop after padding with zeros, in batch."""

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
