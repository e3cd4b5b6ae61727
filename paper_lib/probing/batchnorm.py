"""Normalizes several batches in one forward pass, each by its own statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

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
        layer.forward = partial(_normalized, layer, n_batches)
    try:
        yield
    finally:
        for layer in found:
            del layer.forward


def _normalized(layer: BatchNorm, n_batches: int, x: Tensor) -> Tensor:
    """Forward pass of one BatchNorm layer over a concatenation of batches."""
    last = x.movedim(1, -1)  # channels last: a view of memory that is laid out so
    flat = last.reshape(n_batches, -1, x.shape[1])
    centered = flat - flat.mean(1, keepdim=True)
    variance = centered.square().mean(1, keepdim=True)  # torch.var_mean: 5 times slower
    scale = (variance + layer.eps).rsqrt()
    if layer.affine:
        out = torch.addcmul(layer.bias, centered, scale * layer.weight)
    else:
        out = centered * scale
    return out.view(last.shape).movedim(-1, 1)
