"""BatchNorm over several batches in one forward pass, each by its own statistics; or over parts of one batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn


def layers(module: nn.Module) -> list[nn.Module]:
    """The BatchNorm layers of a network."""
    return [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@contextlib.contextmanager
def batchwise_statistics(module: nn.Module, n_batches: int) -> Iterator[None]:
    """Let a concatenation of n equal batches be normalized batch by batch, as if each went through alone.

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

    def __init__(self, layer: nn.Module, n_batches: int):
        self.layer, self.n_batches = layer, n_batches

    def __call__(self, x: Tensor) -> Tensor:
        last = x.movedim(1, -1)  # channels last: a view of memory that is laid out so
        flat = last.reshape(self.n_batches, -1, x.shape[1])
        centered = flat - flat.mean(1, keepdim=True)
        scale = (
            centered.square().mean(1, keepdim=True) + self.layer.eps
        ).rsqrt()  # torch.var_mean: 5 times slower
        if not self.layer.affine:
            return (centered * scale).view(last.shape).movedim(-1, 1)
        out = torch.addcmul(self.layer.bias, centered, scale * self.layer.weight)
        return out.view(last.shape).movedim(-1, 1)


def synchronize(module: nn.Module) -> None:
    """Let the BatchNorm layers in training mode normalize by statistics of the batches of all processes together."""
    for layer in layers(module):
        layer.forward = _SynchronizedNorm(layer)


class _Sum(torch.autograd.Function):
    """Sum over the processes, of gradients too."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradient)


class _SynchronizedNorm:
    """Forward pass of one BatchNorm layer over a batch of which every process holds an equal part."""

    def __init__(self, layer: nn.Module):
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        layer = self.layer
        if not (layer.training or layer.running_mean is None):
            return type(layer).forward(layer, x)
        others = [d for d in range(x.ndim) if d != 1]
        shape = [-1 if d == 1 else 1 for d in range(x.ndim)]
        n = dist.get_world_size() * x.numel() // x.shape[1]
        values = x.float()  # under autocast too, as in torch's
        mean = _Sum.apply(values.sum(others)) / n
        centered = values - mean.view(shape)
        variance = _Sum.apply(centered.square().sum(others)) / n
        if layer.running_mean is not None:
            with torch.no_grad():
                layer.running_mean.lerp_(mean, layer.momentum)
                layer.running_var.lerp_(variance * (n / (n - 1)), layer.momentum)
        out = centered * (variance + layer.eps).rsqrt().view(shape)
        if layer.affine:
            out = out * layer.weight.view(shape) + layer.bias.view(shape)
        return out.to(x.dtype)
