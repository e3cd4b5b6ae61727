"""Recomputes BatchNorm's running statistics at a module's present weights, such as an average."""

from __future__ import annotations

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
    normalizes it by the statistics so far. Modes and momenta come back. ConfigError if there is no
    batch, one holds anything else, or the first has a single value per channel; whatever the error,
    the previous statistics come back too.
    """
    tracked = [layer for layer in layers(module) if layer.track_running_stats]
    if not tracked:
        return
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
    saved = [(b, b.clone()) for layer in tracked for b in layer.buffers(recurse=False)]
    seen = dict.fromkeys(tracked, 0)

    def weigh(layer: BatchNorm, inputs: tuple[Tensor, ...]) -> None:
        values = inputs[0].numel() // inputs[0].shape[1]
        layer.training = values > 1
        if not layer.training:
            advice = "has no variance: begin with a larger batch"
            require(seen[layer] > 0, "number of values per channel", values, advice)
            return
        seen[layer] += values
        layer.momentum = values / seen[layer]

    hooks = [layer.register_forward_pre_hook(weigh) for layer in tracked]
    module.eval()
    for layer in tracked:
        layer.get_buffer("running_mean").zero_()
        layer.get_buffer("running_var").fill_(1)
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.zero_()
    try:
        yield
    except BaseException:
        for buffer, before in saved:
            buffer.copy_(before)
        raise
    finally:
        for hook in hooks:
            hook.remove()
        for layer, rate in rates.items():
            layer.momentum = rate
        for m, mode in modes.items():
            m.training = mode
