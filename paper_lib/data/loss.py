"""The loss of a batch, given what a network returns and the targets: by name, or a user's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from paper_lib.errors import ConfigError, check_names, require

Function = Callable[[Any, Any], Tensor]  # of a network's output and the targets: a scalar
IGNORED = -100  # the label of a position that cross-entropy leaves out, as in torch


@dataclass(frozen=True)
class Loss:
    """A loss by `name` ("cross_entropy", "mse"), or a user's `function` of output and targets.

    The function returns the mean over a batch, a scalar. `unit` names what it is measured in.
    `output` says which part of a network's output counts, where that is no tensor: a number for a
    tuple, a name for a dictionary or an object. `n_classes`: outputs that labels need, at least.
    """

    name: str = "cross_entropy"
    output: int | str | None = None
    function: Function | None = None
    n_classes: int = 1

    def __post_init__(self) -> None:
        if self.function is None:
            check_names([self.name], UNITS, "loss")

    @property
    def unit(self) -> str:
        """What the loss is measured in, for labels."""
        return UNITS.get(self.name, "units of the loss")

    @property
    def counts(self) -> bool:
        """Whether answers are right or wrong, so that there is an accuracy."""
        return self.function is None and self.name == "cross_entropy"

    def __call__(self, output: Any, y: Any) -> Tensor:
        """Mean loss of a batch, a scalar in float32, from what the network returned.

        Raises ConfigError for what does not fit together.
        """
        return self.of(self.chosen(output), y)

    def chosen(self, output: Any) -> Any:
        """The part of a network's output that counts: a tensor, unless the loss is the user's."""
        if self.output is not None:
            output = _part(output, self.output)
        if self.function is None:
            usable = isinstance(output, Tensor) and output.is_floating_point()
            advice = "it must be a float tensor, or say which part is: loss=Loss(output='logits')"
            require(usable, "output of the network", kind(output), advice)
            learns = output.requires_grad or not torch.is_grad_enabled()
            advice = "it must depend on trainable parameters: leave out detach() and no_grad()"
            require(learns, "output of the network", kind(output), advice)
        return output

    def of(self, chosen: Any, y: Any) -> Tensor:
        """Mean loss of a batch from the part of the output that counts."""
        if self.function is not None:
            loss = self.function(chosen, y)
            is_scalar = isinstance(loss, Tensor) and loss.numel() == 1
            allowed = "your loss must return a tensor of one number, the mean over the batch"
            require(is_scalar, "loss", kind(loss), allowed)
            return loss.float().reshape(())
        if self.name == "mse":
            allowed = f"the targets have the shape {tuple(y.shape)}, and it must have the same"
            require(chosen.shape == y.shape, "shape of the output", tuple(chosen.shape), allowed)
            return F.mse_loss(chosen.float(), y.float())
        _check_logits(chosen, y, self.n_classes)
        return F.cross_entropy(chosen.float().flatten(0, -2), y.flatten(), ignore_index=IGNORED)

    def counted(self, y: Any) -> int:
        """Over how many samples or positions of a batch the loss is a mean."""
        return int((y != IGNORED).sum()) if self.counts else len(y)

    def right(self, output: Any, y: Tensor) -> int:
        """How many answers are right, where `counts`."""
        return int((self.chosen(output).argmax(-1) == y).sum())


UNITS = {"cross_entropy": "nats", "mse": "squared error"}

CROSS_ENTROPY = Loss()


def as_loss(loss: str | Loss | Function) -> Loss:
    """A `Loss` from its name, or from a function of a network's output and the targets."""
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, str):
        return Loss(loss)
    require(callable(loss), "loss", loss, f"name one of {', '.join(UNITS)}, or give a function")
    return Loss(getattr(loss, "__name__", type(loss).__name__), function=loss)


def _check_logits(logits: Tensor, y: Tensor, n_classes: int) -> None:
    """ConfigError unless there is a row of logits for every label, and a logit for each class."""
    shape = ", ".join(map(str, y.shape))
    allowed = f"it must be ({shape}, {n_classes} classes or more) for labels ({shape})"
    fits = logits.shape[:-1] == y.shape and logits.shape[-1] >= n_classes
    require(logits.ndim > 1 and fits, "output of the network", kind(logits), allowed)
    require(y.dtype == torch.int64, "type of labels", y.dtype, "they are classes, torch.int64")
    if y.device.type == "cpu":  # a look at a GPU's would wait for it
        labels = y[y != IGNORED]
        for label in (int(labels.min()), int(labels.max())) if len(labels) else ():
            allowed = f"the network has {logits.shape[-1]} outputs"
            require(0 <= label < logits.shape[-1], "label", label, allowed)


def _part(output: Any, which: int | str) -> Any:
    """Part of what a network returned, by number, key or attribute."""
    try:
        if isinstance(which, str) and not isinstance(output, Mapping):
            return getattr(output, which)
        return output[which]
    except (AttributeError, IndexError, KeyError, TypeError):
        raise ConfigError(f"output = {which!r} is not part of {kind(output)}") from None


def kind(value: Any) -> str:
    """What came out of a network, in words."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    if isinstance(value, Mapping):
        return f"{type(value).__name__} of {', '.join(map(str, value))}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} of {', '.join(map(kind, value))}"
    return type(value).__name__
