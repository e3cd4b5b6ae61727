"""Gradients and Hessian products of batch losses; arguments and errors are those of `probe`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from paper_lib.probing import probe
from paper_lib.probing.probe import Array, Buffers
from paper_lib.runs import Run
from paper_lib.training.flat import FlatModel


def gradients(
    net: FlatModel, weights: Array, x: Tensor, y: Tensor, buffers: Buffers = None
) -> Array:
    """Gradient of each batch's loss, (K, P)."""
    return np.stack(list(each_gradient(net, weights, x, y, buffers)))


def each_gradient(
    net: FlatModel, weights: Array, x: Tensor, y: Tensor, buffers: Buffers = None
) -> Iterator[Array]:
    """Yield what `gradients` stacks, where only sums or inner products are needed."""
    return _each_batch(net, weights, x, y, buffers, partial(_gradient, net))


def mean_gradient(
    net: FlatModel, weights: Array, x: Tensor, y: Tensor, buffers: Buffers = None
) -> Array:
    """Mean of the batches' gradients, (P,): several batches to a pass."""

    def derivative(losses: Tensor) -> Tensor:
        return _gradient(net, losses.sum())

    return (_sum_over_passes(net, weights, x, y, buffers, derivative) / len(x)).cpu().numpy()


def curvature(
    net: FlatModel, weights: Array, direction: Array, x: Tensor, y: Tensor, buffers: Buffers = None
) -> Array:
    """Second derivative d^T H_k d / |d|^2 of each batch's loss along a direction, (K,)."""
    products = hessian_vector_products(net, weights, direction, x, y, buffers)
    return products @ direction / np.dot(direction, direction)


def hessian_vector_products(
    net: FlatModel, weights: Array, direction: Array, x: Tensor, y: Tensor, buffers: Buffers = None
) -> Array:
    """Exact products H_k d of each batch's Hessian with a direction, (K, P)."""
    product = partial(net.hessian_product, direction=probe.tensor(direction))
    return np.stack(list(_each_batch(net, weights, x, y, buffers, product)))


def mean_hessian_product(
    net: FlatModel, weights: Array, direction: Array, x: Tensor, y: Tensor, buffers: Buffers = None
) -> Array:
    """Mean of what `hessian_vector_products` gives, (P,) float64: several batches to a pass."""
    vector = probe.tensor(direction)

    def derivative(losses: Tensor) -> Array:
        product = net.hessian_product(losses.mean(), vector).cpu().numpy()
        return (product * (len(losses) / len(x))).astype(np.float64)

    return _sum_over_passes(net, weights, x, y, buffers, derivative)


def full_gradients(
    run: Run, steps: Sequence[int], n_batches: int
) -> Iterator[tuple[int, Array, Array]]:
    """Yield t, x_t (P,) and G_t (P,) for every t in `steps`; SnapshotError where x_t was not kept.

    G_t is the mean gradient of the step's n_batches held-out batches, with weight decay: an
    unbiased estimate of the expected gradient of a batch, independent of what the run saw.
    """
    net, c = run.network(), run.config
    for t in tqdm(steps, desc=f"full gradients, lr {c.lr:g}"):
        x = np.array(run.at(t))
        yield t, x, mean_gradient(net, x, *run.held(t, n_batches)) + c.weight_decay * x


def _gradient(net: FlatModel, loss: Tensor) -> Tensor:
    net.backward(loss)
    return net.grad


def _each_batch(
    net: FlatModel,
    weights: Array,
    x: Tensor,
    y: Tensor,
    buffers: Buffers,
    derivative: Callable[[Tensor], Tensor],
) -> Iterator[Array]:
    """Yield derivative(loss) of each batch; between two the network is as it was.

    Fused attention has no second derivative, plain kernels have.
    """
    probe.check_batches(x, y)
    for xs, ys in zip(x, y, strict=True):
        with sdpa_kernel(SDPBackend.MATH), probe.probing_at(net, weights, buffers):
            found = derivative(net.loss(net.forward(xs), ys)).cpu().numpy().copy()
        yield found


def _sum_over_passes(
    net: FlatModel,
    weights: Array,
    x: Tensor,
    y: Tensor,
    buffers: Buffers,
    derivative: Callable[[Tensor], Any],
) -> Any:
    """Sum over passes of derivative(losses of its batches), in the precision that it has."""
    probe.check_batches(x, y)
    with sdpa_kernel(SDPBackend.MATH):
        at_once = probe.batches_at_once(net, x, buffers, kept=True)
        with probe.probing_at(net, weights, buffers):
            return sum(map(derivative, probe.passes(net, x, y, at_once)))
