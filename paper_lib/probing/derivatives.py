"""Gradients and Hessian products of batch losses; arguments are as in `probe`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from paper_lib.probing import probe
from paper_lib.runs import Run
from paper_lib.training.flat import FlatModel

GRAM_BYTES = 2**30  # memory that gradients may take while their inner products are formed


def gradients(
    net: FlatModel, weights: np.ndarray, x: Tensor, y: Tensor, buffers: np.ndarray | None = None
) -> np.ndarray:
    """Gradient of each batch's loss at one weight vector, (K, P)."""
    return np.stack(list(each_gradient(net, weights, x, y, buffers)))


def each_gradient(
    net: FlatModel, weights: np.ndarray, x: Tensor, y: Tensor, buffers: np.ndarray | None = None
) -> Iterator[np.ndarray]:
    """Yield what `gradients` stacks, one batch at a time, where only sums or inner products are
    needed.
    """
    probe.check_batches(x, y)
    for xs, ys in zip(x, y, strict=True):
        with probe.probing(net, buffers):
            probe.load(net, weights, buffers)
            net.backward(F.cross_entropy(net.forward(xs).float(), ys))
            found = net.grad.cpu().numpy().copy()
        yield found


def mean_gradient(
    net: FlatModel, weights: np.ndarray, x: Tensor, y: Tensor, buffers: np.ndarray | None = None
) -> np.ndarray:
    """Mean of the batches' gradients at one weight vector, (P,): several batches to a pass."""

    def derivative(logits: Tensor, labels: Tensor) -> Tensor:
        net.backward(F.cross_entropy(logits, labels, reduction="sum"))
        return net.grad

    return (_sum_over_passes(net, weights, x, y, buffers, derivative) / y.numel()).cpu().numpy()


def gram(
    net: FlatModel, weights: np.ndarray, x: Tensor, y: Tensor, buffers: np.ndarray | None = None
) -> np.ndarray:
    """Inner products of all pairs of the batches' gradients at one weight vector, (K, K) float64.

    As many gradients as GRAM_BYTES holds are kept; the others are computed again for each such
    block.
    """
    probe.check_batches(x, y)
    n = len(x)
    block = max(1, GRAM_BYTES // (4 * net.weights.numel()))
    found = np.empty((n, n))
    for i in range(0, n, block):
        kept = gradients(net, weights, x[i : i + block], y[i : i + block], buffers)
        found[i : i + block, i : i + block] = kept @ kept.T
        if i + block < n:
            for j, g in enumerate(
                each_gradient(net, weights, x[i + block :], y[i + block :], buffers), i + block
            ):
                found[i : i + block, j] = found[j, i : i + block] = kept @ g
    return found


def curvature(
    net: FlatModel,
    weights: np.ndarray,
    direction: np.ndarray,
    x: Tensor,
    y: Tensor,
    buffers: np.ndarray | None = None,
) -> np.ndarray:
    """Second derivative d^T H_k d / |d|^2 of each batch's loss along a direction, (K,)."""
    products = hessian_vector_products(net, weights, direction, x, y, buffers)
    return products @ direction / np.dot(direction, direction)


def hessian_vector_products(
    net: FlatModel,
    weights: np.ndarray,
    direction: np.ndarray,
    x: Tensor,
    y: Tensor,
    buffers: np.ndarray | None = None,
) -> np.ndarray:
    """Exact products H_k d of each batch's Hessian with a direction, (K, P), by differentiating
    twice.
    """
    probe.check_batches(x, y)
    found = np.empty((len(x), len(direction)), np.float32)
    for k in range(len(x)):
        with probe.probing(net, buffers):
            probe.load(net, weights, buffers)
            loss = F.cross_entropy(net.forward(x[k]).float(), y[k])
            found[k] = net.hessian_product(loss, probe.tensor(direction)).cpu().numpy()
    return found


def mean_hessian_product(
    net: FlatModel,
    weights: np.ndarray,
    direction: np.ndarray,
    x: Tensor,
    y: Tensor,
    buffers: np.ndarray | None = None,
) -> np.ndarray:
    """Mean of what `hessian_vector_products` gives, (P,) float64: several batches to a pass."""
    vector = probe.tensor(direction)

    def derivative(logits: Tensor, labels: Tensor) -> np.ndarray:
        product = net.hessian_product(F.cross_entropy(logits, labels), vector).cpu().numpy()
        return (product * (len(labels) / y.numel())).astype(np.float64)

    return _sum_over_passes(net, weights, x, y, buffers, derivative)


def full_gradients(
    run: Run, steps: Sequence[int], n_batches: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield t, x_t (P,) and G_t (P,) for every t in `steps`; SnapshotError where x_t was not kept.

    G_t is the mean gradient of the step's n_batches held-out batches, with weight decay: an
    unbiased estimate of the expected gradient of a batch, independent of what the run saw.
    """
    net, c = run.network(), run.config
    for t in tqdm(steps, desc=f"full gradients, lr {c.lr:g}"):
        x = np.array(run.at(t))
        yield t, x, mean_gradient(net, x, *run.held(t, n_batches)) + c.weight_decay * x


def _sum_over_passes(
    net: FlatModel,
    weights: np.ndarray,
    x: Tensor,
    y: Tensor,
    buffers: np.ndarray | None,
    derivative: Callable[[Tensor, Tensor], Tensor | np.ndarray],
) -> Tensor | np.ndarray:
    """Sum of derivative(logits, labels) over passes at one weight vector, in the precision that it
    has.
    """
    probe.check_batches(x, y)
    with probe.probing(net, buffers):
        probe.load(net, weights, buffers)
        return sum(derivative(*piece) for piece in probe.passes(net, x, y))
