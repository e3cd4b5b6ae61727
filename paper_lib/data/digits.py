"""Load scikit-learn's 8x8 handwritten digits under strong affine distortion and pixel noise.

The distortion is strong on purpose: the training set must not be interpolated, because the
gradient noise that is left at the minimum is what the paper is about.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from paper_lib.data.dataset import TensorDataset
from paper_lib.files import cached_array

# Everything the images depend on; `version` counts changes of the code below.
RECIPE: dict[str, Any] = {
    "version": 1,
    "train_originals": 1297,
    "test_originals": 500,
    "train_variants": 100,
    "test_variants": 10,
    "rotation_degrees": 20.0,
    "shear": 0.25,
    "scale": 0.2,
    "shift_pixels": 1.2,
    "noise": 0.25,
    "mean": 0.28,
    "std": 0.4,
    "chunk": 10_000,  # images distorted at a time, which bounds the memory
}


def load(name: str, root: Path, seed: int, progress: bool) -> TensorDataset:
    """Digits (1, 8, 8): 1,297 originals x 100 variants to train on, 500 x 10 to test.

    All 134,700 (34 MB) are generated in seconds and kept under root/digits. `seed` fixes the
    stratified split of the originals and the distortions; `progress` is not used.
    """
    key = hashlib.blake2b(json.dumps(RECIPE | {"seed": seed}).encode(), digest_size=8).hexdigest()
    cut = RECIPE["train_originals"] * RECIPE["train_variants"]
    total = cut + RECIPE["test_originals"] * RECIPE["test_variants"]
    cached = partial(cached_array, root / name)
    pool = (
        cached(f"images-{key}", (total, 1, 8, 8), "float32", partial(_generate, seed=seed)),
        cached(f"labels-{key}", (total,), "int64", partial(_label, seed=seed)),
    )
    images, labels = ({"train": x[:cut], "test": x[cut:]} for x in map(torch.from_numpy, pool))
    return TensorDataset(name, images, labels, n_classes=10, content=key)


@lru_cache(maxsize=1)
def _originals(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (1797, 8, 8) in 0..1 and labels (1797,), the originals to train on first."""
    # Imported here because it takes seconds, and only the first use of the data needs it.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    split = train_test_split(
        np.arange(len(labels)),
        train_size=RECIPE["train_originals"],
        test_size=RECIPE["test_originals"],
        random_state=seed,
        stratify=labels,
    )
    order = np.concatenate(split)
    return (pixels[order] / 16).reshape(-1, 8, 8).astype(np.float32), labels[order]


def _variants() -> np.ndarray:
    """Which original each image of the pool comes from."""
    train, test = RECIPE["train_originals"], RECIPE["test_originals"]
    copies = [RECIPE["train_variants"]] * train + [RECIPE["test_variants"]] * test
    return np.arange(train + test).repeat(copies)


def _label(out: np.ndarray, seed: int) -> None:
    out[:] = _originals(seed)[1][_variants()]


def _generate(out: np.ndarray, seed: int) -> None:
    """Write the distorted, noisy and normalized variants into out (N, 1, 8, 8)."""
    rng = np.random.default_rng((seed, 8))
    originals, source = _originals(seed)[0], _variants()
    for start in range(0, len(out), RECIPE["chunk"]):
        x = torch.from_numpy(originals[source[start : start + RECIPE["chunk"]]])[:, None]
        maps = torch.from_numpy(_affine(rng, len(x)))
        grid = F.affine_grid(maps, list(x.shape), align_corners=False)
        moved = F.grid_sample(x, grid, align_corners=False).numpy()  # bilinear, zeros outside
        moved += RECIPE["noise"] * rng.standard_normal(moved.shape, dtype=np.float32)
        out[start : start + len(x)] = (moved - RECIPE["mean"]) / RECIPE["std"]


def _affine(rng: np.random.Generator, n: int) -> np.ndarray:
    """Random maps (n, 2, 3), float32, from output to input coordinates, which run from -1 to 1."""

    def uniform(bound: float) -> np.ndarray:
        return rng.uniform(-bound, bound, n)

    angle, shear = np.deg2rad(uniform(RECIPE["rotation_degrees"])), uniform(RECIPE["shear"])
    scale = 1 + uniform(RECIPE["scale"])
    cos, sin = np.cos(angle), np.sin(angle)
    pixel = 2 / 8
    shift = [uniform(RECIPE["shift_pixels"]) * pixel, uniform(RECIPE["shift_pixels"]) * pixel]
    # Rotation times shear along x, over the scale: what is larger is sampled more finely.
    rows = (
        [cos / scale, (shear * cos - sin) / scale, shift[0]],
        [sin / scale, (shear * sin + cos) / scale, shift[1]],
    )
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=1).astype(np.float32)
