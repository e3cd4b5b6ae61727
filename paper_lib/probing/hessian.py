"""Directions of greatest curvature of the mean training loss, by Lanczos on exact Hessian-vector products."""

from __future__ import annotations

import numpy as np
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from paper_lib.errors import require
from paper_lib.probing.derivatives import mean_hessian_product
from paper_lib.training.flat import FlatModel


def top_directions(
    net: FlatModel, weights: np.ndarray, x: Tensor, y: Tensor, n: int = 12, tolerance: float = 0.05
) -> tuple[np.ndarray, np.ndarray]:
    """The n greatest eigenvalues (n,), descending, and their orthonormal eigenvectors (n, P), float32.

    `tolerance` is the relative error allowed to an eigenvalue: far below its variation from images to images. The
    eigenvalues are the greatest on *these* images, hence too large for others: see `curvatures`.
    """
    size = len(weights)
    require(1 <= n < size - 1, "n", n, f"Lanczos finds 1 to {size - 2} eigenvectors of {size} weights")
    operator = LinearOperator(
        (size, size), lambda d: mean_hessian_product(net, weights, d.ravel(), x, y), dtype=np.float64
    )
    start = np.random.default_rng(0).standard_normal(size)
    values, vectors = eigsh(operator, k=n, which="LA", tol=tolerance, v0=start)
    return values[::-1], vectors.T[::-1].astype(np.float32)


def curvatures(net: FlatModel, weights: np.ndarray, directions: np.ndarray, x: Tensor, y: Tensor) -> np.ndarray:
    """Second derivatives d^T H d along unit directions (k, P), (k,): unbiased on images that did not choose them."""
    return np.array([d @ mean_hessian_product(net, weights, d, x, y) for d in directions])
