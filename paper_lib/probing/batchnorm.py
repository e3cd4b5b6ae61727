"""Normalizes several batches in one forward pass, each by its own statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from paper_lib.averaging.batchnorm import BatchNorm, layers


@contextmanager
def batchwise_statistics(module: nn.Module, n_batches: int) -> Iterator[None]:
    """Let a concatenation of n equal batches be normalized as if each went through alone.

    Concerns the BatchNorm layers that use batch statistics; running statistics are not updated.
    """
    found = [m for m in layers(module) if m.training or m.running_mean is None]
    for layer in found:
        layer.forward = _BatchwiseNorm(layer, n_batches)
    try:
        yield
    finally:
        for layer in found:
            del layer.forward


class _BatchwiseNorm:
    """Forward pass of one BatchNorm layer over a concatenation of batches."""

    def __init__(self, layer: BatchNorm, n_batches: int):
        self.layer, self.n_batches = layer, n_batches

    def __call__(self, x: Tensor) -> Tensor:
        last = x.movedim(1, -1)  # channels last: a view of memory that is laid out so
        flat = last.reshape(self.n_batches, -1, x.shape[1])
        centered = flat - flat.mean(1, keepdim=True)
        variance = centered.square().mean(1, keepdim=True)  # torch.var_mean: 5 times slower
        scale = (variance + self.layer.eps).rsqrt()
        if not self.layer.affine:
            return (centered * scale).view(last.shape).movedim(-1, 1)
        out = torch.addcmul(self.layer.bias, centered, scale * self.layer.weight)
        return out.view(last.shape).movedim(-1, 1)
