"""Steep directions of the mean training loss, and the spectrum that a vector sees, by Lanczos."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.linalg import eigh_tridiagonal
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from paper_lib.errors import require
from paper_lib.probing import probe
from paper_lib.probing.derivatives import mean_gradient, mean_hessian_product
from paper_lib.probing.probe import Array
from paper_lib.runs import Run
from paper_lib.training.flat import FlatModel


def top_directions(
    net: FlatModel, weights: Array, x: Tensor, y: Tensor, n: int = 12, tolerance: float = 0.05
) -> tuple[Array, Array]:
    """The n greatest eigenvalues (n,), descending, and their eigenvectors (n, P), float32.

    `tolerance` is the relative error allowed to an eigenvalue: far below its variation from images
    to images. The eigenvalues are the greatest on *these* images, hence too large for others: see
    `curvatures`.
    """
    size = len(weights)
    allowed = f"Lanczos finds 1 to {size - 2} eigenvectors of {size} weights"
    require(1 <= n < size - 1, "n", n, allowed)

    def product(d: Array) -> Array:
        return mean_hessian_product(net, weights, d.ravel(), x, y)

    operator = LinearOperator((size, size), product, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(size)
    values, vectors = eigsh(operator, k=n, which="LA", tol=tolerance, v0=start)
    return values[::-1], vectors.T[::-1].astype(np.float32)


def curvatures(net: FlatModel, weights: Array, directions: Array, x: Tensor, y: Tensor) -> Array:
    """Curvatures d^T H d along unit directions (k, P): unbiased on images that did not choose them.

    Of the mean loss of all batches: (k,).
    """
    return np.array([d @ mean_hessian_product(net, weights, d, x, y) for d in directions])


def split_gradients(
    run: Run, weights: Array, n_products: int, half: int
) -> tuple[Callable[[Array], Array], Array, Array]:
    """What a spectrum is measured with at weights (P,), without weight decay, unbiased each.

    The product with the Hessian of n_products fixed batches, and two mean gradients (P,), each over
    `half` other batches: half their difference is the noise of a mean over all of those.
    """
    c, net = run.config, run.network()
    x, y = probe.fixed_batches(run.dataset, n_products + 2 * half, c.batch_size, c.seed)

    def product(d: Array) -> Array:
        return mean_hessian_product(net, weights, d, x[:n_products], y[:n_products])

    def gradient(first: int) -> Array:
        part = slice(first, first + half)
        return mean_gradient(net, weights, x[part], y[part])

    return product, gradient(n_products), gradient(n_products + half)


def spectral_measure(
    product: Callable[[Array], Array], vector: Array, n: int
) -> tuple[Array, Array]:
    """Nodes and weights, at most n each, with vector^T f(A) vector = sum weights f(nodes).

    Lanczos quadrature, exact for polynomials f of degree up to 2n - 1. `product` multiplies a
    vector (P,) with the symmetric matrix A. ConfigError for a zero vector, which sees nothing.
    """
    length = np.linalg.norm(vector)
    require(length > 0, "vector", 0.0, "a zero vector has no direction to begin from")
    basis, diagonal, off = [vector / length], [], []
    for _ in range(n):
        w = np.asarray(product(basis[-1]), dtype=np.float64)
        diagonal.append(w @ basis[-1])
        for _ in range(2):  # twice: once leaves rounding that breeds copies of eigenvalues
            w = w - np.array(basis).T @ (np.array(basis) @ w)
        size = np.linalg.norm(w)
        if size < 1e-10 * max(np.abs(diagonal)) or len(diagonal) == n:
            break
        basis.append(w / size)
        off.append(size)
    nodes, vectors = eigh_tridiagonal(diagonal, off)
    return nodes, vectors[0] ** 2 * (vector @ vector)
