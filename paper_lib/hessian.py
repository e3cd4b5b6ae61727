"""Directions of greatest curvature of the mean training loss, by Lanczos on exact Hessian-vector products."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from paper_lib import batchnorm, probe
from paper_lib.models import FlatModel
from paper_lib.validate import require


def product(net: FlatModel, weights: np.ndarray, direction: np.ndarray, x: Tensor, y: Tensor) -> np.ndarray:
    """Hessian of the mean loss of the batches x (K, B, ...), y (K, B) times a direction, (P,), float64.

    Each batch is normalized by its own statistics, as in training; many batches share one pass, which makes this a
    fast way to the mean of `probe.hessian_vector_products`.
    """
    at_once = max(1, probe.SAMPLES_AT_ONCE[net.device.type] // y.shape[1])
    vector = torch.from_numpy(np.array(direction, np.float32).ravel())
    total = np.zeros(vector.numel())
    with net.preserved(train=False):
        for layer in batchnorm.layers(net.module):
            layer.training = True
        net.weights.copy_(torch.from_numpy(np.array(weights, np.float32)))
        for xs, ys in zip(x.split(at_once), y.split(at_once), strict=True):
            with batchnorm.batchwise_statistics(net.module, len(xs)):
                loss = F.cross_entropy(net.forward(xs.flatten(0, 1)).float(), ys.flatten())
            total += net.hessian_product(loss, vector).cpu().numpy() * (len(xs) / len(x))
    return total


def top_directions(
    net: FlatModel, weights: np.ndarray, x: Tensor, y: Tensor, n: int = 12, tolerance: float = 0.05
) -> tuple[np.ndarray, np.ndarray]:
    """The n greatest eigenvalues (n,), descending, and their orthonormal eigenvectors (n, P), float32.

    `tolerance` is the relative error allowed to an eigenvalue: far below its variation from images to images. The
    eigenvalues are the greatest on *these* images, hence too large for others: see `curvatures`.
    """
    size = len(weights)
    require(1 <= n < size - 1, "n", n, f"Lanczos finds 1 to {size - 2} eigenvectors of {size} weights")
    operator = LinearOperator((size, size), lambda d: product(net, weights, d, x, y), dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(size)
    values, vectors = eigsh(operator, k=n, which="LA", tol=tolerance, v0=start)
    return values[::-1], vectors.T[::-1].astype(np.float32)


def curvatures(net: FlatModel, weights: np.ndarray, directions: np.ndarray, x: Tensor, y: Tensor) -> np.ndarray:
    """Second derivatives d^T H d along unit directions (k, P), (k,): unbiased on images that did not choose them."""
    return np.array([d @ product(net, weights, d, x, y) for d in directions])
