"""Puts several batches through one forward pass, each normalized by its own statistics."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from paper_lib.averaging.batchnorm import BatchNorm, layers
from paper_lib.training.flat import FlatModel


def separable(net: FlatModel, x: Tensor, kept: bool) -> bool:
    """Whether each of the batches x (n, B, ...) comes out of one pass as it does alone.

    It does not where a network orders rows in another way than batch by batch, or where samples
    meet elsewhere than in BatchNorm. Tried once for each network, form of x and set of layers that
    use batch statistics, with gradients where activations are `kept` for them; in `probing`, which
    gives back the weights and buffers that it changes.
    """
    key = (kept, *x.shape, *(layer.training for layer in layers(net.module)))
    if key not in net.separable:
        net.separable[key] = _tried(net, x, kept)
    return net.separable[key]


def _tried(net: FlatModel, x: Tensor, kept: bool) -> bool:
    """Compare both ways where no part of the network is silent and batches are unlike.

    Noise wakes what begins at zero, such as the last layer of a block. The samples of x are sorted
    by their sum, so that one batch has the least and one the greatest.
    """
    samples = x.flatten(0, 1)
    order = samples.reshape(len(samples), -1).sum(1).argsort()
    unlike = samples[order].view_as(x)
    if torch.equal(unlike[0], unlike[-1]):
        return False  # nothing could be seen
    with torch.no_grad():
        for p in net.parameters:
            p.add_(_noise(p), alpha=0.3 / math.sqrt(max(1, math.prod(p.shape[1:]))))
    alone = _outputs(net, list(unlike), kept)
    try:
        with batchwise_statistics(net.module, len(x)):
            together = _outputs(net, [unlike.flatten(0, 1)], kept)
    except (RuntimeError, ValueError, LookupError, AssertionError):  # its batches have one size
        return False
    # Rounding is below 1e-5, but may take a ReLU past its kink: a step in gradients alone.
    floor, pairs = 1e-5 * torch.cat(alone[1:]).norm(), zip(alone, together, strict=True)
    (logits, others), *gradients = pairs
    same = bool((others - logits).abs().max() <= 1e-4 * logits.abs().max())
    return same and all(bool((a - b).norm() <= 0.03 * a.norm() + floor) for a, b in gradients)


def _outputs(net: FlatModel, batches: list[Tensor], kept: bool) -> list[Tensor]:
    """Logits and, if `kept`, the gradient of a random sum of them by each parameter, else zero."""
    with torch.set_grad_enabled(kept):
        logits = torch.cat([net.loss.chosen(net.forward(x)) for x in batches]).float()
        if not kept:
            return [logits, logits.new_zeros(1)]
        net.backward((logits * _noise(logits)).sum())
        return [logits.detach(), *net.grad.clone().split([p.numel() for p in net.parameters])]


def _noise(like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(0)).to(like.device)


@contextmanager
def batchwise_statistics(module: nn.Module, n_batches: int) -> Iterator[None]:
    """Let a concatenation of n equal batches be normalized as if each went through alone.

    Concerns torch's own BatchNorm layers that use batch statistics, where rows lie batch after
    batch (see `separable`); running statistics are not updated.
    """
    found = [m for m in layers(module) if m.training or m.running_mean is None]
    found = [m for m in found if getattr(m.forward, "__func__", None) is BatchNorm.forward]
    for layer in found:
        layer.forward = partial(_normalized, layer, n_batches)
    try:
        yield
    finally:
        for layer in found:
            del layer.forward


def _normalized(layer: BatchNorm, n_batches: int, input: Tensor) -> Tensor:
    """Forward pass of one BatchNorm layer over a concatenation of batches."""
    layer._check_input_dim(input)
    last = input.movedim(1, -1)  # channels last: a view of memory that is laid out so
    flat = last.reshape(n_batches, -1, input.shape[1])
    if flat.shape[1] == 1:
        raise ValueError("Expected more than 1 value per channel")  # as torch says it
    centered = flat - flat.mean(1, keepdim=True)
    variance = centered.square().mean(1, keepdim=True)  # torch.var_mean: 5 times slower
    scale = (variance + layer.eps).rsqrt()
    if layer.affine:
        out = torch.addcmul(layer.bias, centered, scale * layer.weight)
    else:
        out = centered * scale
    return out.view(last.shape).movedim(-1, 1)
