"""Losses and gradients of chosen batches at chosen weights, without a trace on the network or the random state.

Batches are stacked: x (K, B, ...) and y (K, B) are K batches of B samples. Weights are rows of a matrix, (n, P), or one
vector, (P,). Everything comes back as NumPy arrays. All losses are mean cross-entropies in nats, in float32, without
label smoothing or weight decay.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from paper_lib.data import Dataset
from paper_lib.models import FlatModel
from paper_lib.validate import require

IMAGES_AT_ONCE = 256  # forward passes are cut into pieces of about this many samples


def losses(
    net: FlatModel,
    weights: np.ndarray,
    x: Tensor,
    y: Tensor,
    buffers: np.ndarray | None = None,
    progress: str = "",
) -> np.ndarray:
    """Loss of each batch at each of the weights, (n, K), or (K,) for one vector.

    Without `buffers` each batch is normalized by its own statistics, as in training. With buffers, (Q,) or (n, Q),
    the network is in evaluation mode with those running statistics.
    """
    rows = np.atleast_2d(weights)
    _check_batches(x, y)
    found = np.empty((len(rows), len(x)), np.float32)
    with net.preserved(train=buffers is None), torch.no_grad():
        for i, row in enumerate(tqdm(rows, desc=progress, disable=not progress)):
            net.weights.copy_(_tensor(row))
            if buffers is not None:
                net.buffers.copy_(_tensor(buffers if buffers.ndim == 1 else buffers[i]))
            found[i] = _stacked_losses(net, x, y, separate=buffers is None)
    return found if np.ndim(weights) == 2 else found[0]


def _stacked_losses(net: FlatModel, x: Tensor, y: Tensor, separate: bool) -> np.ndarray:
    """Losses of K batches at the current weights, (K,): many batches in one forward pass."""
    at_once = max(1, IMAGES_AT_ONCE // x.shape[1])
    parts = []
    for xs, ys in zip(x.split(at_once), y.split(at_once), strict=True):
        with batchwise_statistics(net.module, len(xs)) if separate else contextlib.nullcontext():
            logits = net.forward(xs.flatten(0, 1))
        each = F.cross_entropy(logits.float(), ys.flatten(), reduction="none")
        parts.append(each.view(len(xs), -1).mean(1))
    return torch.cat(parts).cpu().numpy()


def losses_reference(net: FlatModel, weights: np.ndarray, x: Tensor, y: Tensor) -> np.ndarray:
    """What `losses` computes with batch statistics, one batch and one forward pass at a time: slow and plain."""
    found = np.empty((len(weights), len(x)), np.float32)
    with net.preserved(train=True), torch.no_grad():
        for i, row in enumerate(weights):
            net.weights.copy_(_tensor(row))
            found[i] = [F.cross_entropy(net.forward(xs), ys).item() for xs, ys in zip(x, y, strict=True)]
    return found


@contextlib.contextmanager
def batchwise_statistics(module: nn.Module, n_batches: int) -> Iterator[None]:
    """Let a concatenation of n equal batches be normalized batch by batch, as if each went through alone.

    Concerns BatchNorm layers in train mode; running statistics are not updated.
    """
    layers = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    for layer in layers:
        layer.forward = _BatchwiseNorm(layer, n_batches)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


class _BatchwiseNorm:
    """Forward pass of one BatchNorm layer over a concatenation of batches."""

    def __init__(self, layer: nn.Module, n_batches: int):
        self.layer, self.n_batches = layer, n_batches

    def __call__(self, x: Tensor) -> Tensor:
        last = x.movedim(1, -1)  # channels last: a view of memory that is laid out so
        flat = last.reshape(self.n_batches, -1, x.shape[1])
        centered = flat - flat.mean(1, keepdim=True)
        scale = (centered.square().mean(1, keepdim=True) + self.layer.eps).rsqrt()  # torch.var_mean: 5 times slower
        if not self.layer.affine:
            return (centered * scale).view(last.shape).movedim(-1, 1)
        out = torch.addcmul(self.layer.bias, centered, scale * self.layer.weight)
        return out.view(last.shape).movedim(-1, 1)


def line(
    net: FlatModel,
    weights: np.ndarray,
    direction: np.ndarray,
    positions: np.ndarray,
    x: Tensor,
    y: Tensor,
    buffers: np.ndarray | None = None,
) -> np.ndarray:
    """Losses at weights + t * direction for every t in `positions`, (n_positions, K)."""
    points = weights[None] + np.asarray(positions, np.float32)[:, None] * direction[None]
    return losses(net, points, x, y, buffers)


def gradients(
    net: FlatModel, weights: np.ndarray, x: Tensor, y: Tensor, buffers: np.ndarray | None = None
) -> np.ndarray:
    """Gradient of each batch's loss at one weight vector, (K, P); statistics as in `losses`."""
    return np.stack(list(each_gradient(net, weights, x, y, buffers)))


def each_gradient(
    net: FlatModel, weights: np.ndarray, x: Tensor, y: Tensor, buffers: np.ndarray | None = None
) -> Iterator[np.ndarray]:
    """Yield what `gradients` stacks, one batch at a time, where only sums or inner products are needed."""
    _check_batches(x, y)
    for xs, ys in zip(x, y, strict=True):
        with net.preserved(train=buffers is None):
            net.weights.copy_(_tensor(weights))
            if buffers is not None:
                net.buffers.copy_(_tensor(buffers))
            net.backward(F.cross_entropy(net.forward(xs).float(), ys))
            found = net.grad.cpu().numpy().copy()
        yield found


def curvature(net: FlatModel, weights: np.ndarray, direction: np.ndarray, x: Tensor, y: Tensor) -> np.ndarray:
    """Second derivative d^T H_k d / |d|^2 of each batch's loss along a direction, (K,), batch statistics."""
    products = hessian_vector_products(net, weights, direction, x, y)
    return products @ direction / np.dot(direction, direction)


def hessian_vector_products(
    net: FlatModel, weights: np.ndarray, direction: np.ndarray, x: Tensor, y: Tensor
) -> np.ndarray:
    """Exact products H_k d of each batch's Hessian with a direction, (K, P), by differentiating twice."""
    _check_batches(x, y)
    found = np.empty((len(x), len(direction)), np.float32)
    for k in range(len(x)):
        with net.preserved(train=True):
            net.weights.copy_(_tensor(weights))
            found[k] = net.hessian_product(F.cross_entropy(net.forward(x[k]).float(), y[k]), _tensor(direction))
    return found


def statistics(net: FlatModel, weights: np.ndarray, x: Tensor) -> np.ndarray:
    """Buffers recomputed at the given weights: BatchNorm's means and variances averaged over batches x (K, B, ...).

    An averaged network needs this, and so does every network that it is compared with. (Q,)
    """
    layers = [m for m in net.module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    rates = [layer.momentum for layer in layers]
    with net.preserved(train=True), torch.no_grad():
        net.weights.copy_(_tensor(weights))
        try:
            for i, batch in enumerate(x):
                for layer in layers:
                    layer.momentum = 1 / (i + 1)  # a running mean over the batches
                net.forward(batch)
        finally:
            for layer, rate in zip(layers, rates, strict=True):
                layer.momentum = rate
        return net.buffers.cpu().numpy().copy()


def evaluate(
    net: FlatModel, weights: np.ndarray, buffers: np.ndarray, chunks: Iterable[tuple[Tensor, Tensor]]
) -> tuple[float, float]:
    """Mean loss and accuracy over chunks (x, y) of samples, in evaluation mode with the given buffers."""
    loss, correct, n = 0.0, 0, 0
    with net.preserved(train=False), torch.no_grad():
        net.weights.copy_(_tensor(weights))
        net.buffers.copy_(_tensor(buffers))
        for x, y in chunks:
            logits = net.forward(x).float()
            loss += F.cross_entropy(logits, y, reduction="sum").item()
            correct += int((logits.argmax(1) == y).sum())
            n += len(y)
    require(n > 0, "chunks", "none", "an evaluation needs at least one sample")
    return loss / n, correct / n


def fixed_batches(dataset: Dataset, n: int, size: int, seed: int, split: str = "train") -> tuple[Tensor, Tensor]:
    """n batches for probing, (n, size, ...) and (n, size), from a stream that no run trains on."""
    return dataset.batches(n, size, PROBE_STREAM + seed, split)


PROBE_STREAM = 1_000_000  # seeds of probing streams start here; runs use small seeds


def _tensor(row: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(row, np.float32))  # a copy: rows of a mapped trajectory are read-only


def _check_batches(x: Tensor, y: Tensor) -> None:
    require(x.ndim >= 2 and len(x) > 0, "x", tuple(x.shape), "batches are stacked as (K, B, ...), K at least 1")
    require(tuple(y.shape) == tuple(x.shape[:2]), "y", tuple(y.shape), f"labels must be (K, B) = {tuple(x.shape[:2])}")
