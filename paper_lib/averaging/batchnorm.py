"""Recomputes BatchNorm's running statistics at a module's present weights, such as an average."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from paper_lib.errors import ConfigError, require

BatchNorm = nn.modules.batchnorm._BatchNorm


def recompute_statistics(
    module: nn.Module, batches: Iterable, forward: Callable[[Tensor], Any] | None = None
) -> None:
    """Make running statistics the means over these batches, in place, with dropout and such off.

    `batches` yields inputs, or tuples that begin with them, on any device; `forward` takes the
    inputs if they do not go through the module as they are. Means and variances of batches are
    averaged with the number of values in each as weight, so a ragged last batch counts for what it
    is. One value per channel has no variance: a layer that is given no more does not count it and
    normalizes it by the statistics so far. A layer that no batch reaches keeps its statistics.
    Modes and momenta come back. ConfigError if there is no batch, one holds anything else, NaN or
    infinity, the first has a single value per channel, or the module is lazy; whatever the error,
    the previous statistics come back too.
    """
    tracked = [m for m in layers(module) if m.track_running_stats and m.running_mean is not None]
    if not tracked:
        return
    lazy = any(map(nn.parameter.is_lazy, module.buffers()))
    require(not lazy, "module", type(module).__name__, "it is lazy: run a batch through it first")
    n, device = 0, tracked[0].get_buffer("running_mean").device
    with _running_means(module, tracked), torch.no_grad():
        for n, batch in enumerate(batches, start=1):
            x = batch[0] if isinstance(batch, list | tuple) and batch else batch
            allowed = "inputs, or a tuple that begins with them"
            require(isinstance(x, Tensor), "batch", type(batch).__name__, allowed)
            try:
                (forward or module)(x.to(device))
            except ValueError as error:  # torch names neither the batch nor what to do
                raise ConfigError(f"batch {n} of shape {tuple(x.shape)}: {error}") from error
        require(n > 0, "batches", "none", "statistics need at least one batch")


def layers(module: nn.Module) -> list[BatchNorm]:
    """The BatchNorm layers of a network."""
    return [m for m in module.modules() if isinstance(m, BatchNorm)]


@contextmanager
def _running_means(module: nn.Module, tracked: Sequence[BatchNorm]) -> Iterator[None]:
    """Let running statistics be plain means over all values that pass in the block."""
    modes = {m: m.training for m in module.modules()}
    rates = {layer: layer.momentum for layer in tracked}
    saved = {layer: [(b, b.clone()) for b in layer.buffers(recurse=False)] for layer in tracked}
    seen, restored = dict.fromkeys(tracked, 0), tracked

    def weigh(layer: BatchNorm, inputs: tuple, named: dict[str, Tensor]) -> None:
        x = [*inputs, *named.values()][0]
        values = x.numel() // layer.num_features
        layer.training = values > 1
        if not layer.training:
            advice = "has no variance: begin with a larger batch"
            require(seen[layer] > 0, "number of values per channel", values, advice)
            return
        seen[layer] += values
        layer.momentum = values / seen[layer]

    hooks = [layer.register_forward_pre_hook(weigh, with_kwargs=True) for layer in tracked]
    module.eval()
    for layer in tracked:
        layer.get_buffer("running_mean").zero_()
        layer.get_buffer("running_var").fill_(1)
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.zero_()
    try:
        yield
        finite = all(bool(m.get_buffer("running_var").isfinite().all()) for m in tracked)
        require(finite, "batches", "NaN or infinity", "leave out what is not finite, or too large")
        restored = [layer for layer in tracked if not seen[layer]]
    finally:
        for buffer, before in itertools.chain(*map(saved.get, restored)):
            buffer.copy_(before)
        for hook in hooks:
            hook.remove()
        for layer, rate in rates.items():
            layer.momentum = rate
        for m, mode in modes.items():
            m.training = mode
