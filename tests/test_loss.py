"""Losses by name and of the user's own: values, what they count, and what does not fit."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from paper_lib.data.loss import CROSS_ENTROPY, Loss, as_loss
from paper_lib.errors import ConfigError

LOGITS = torch.ones(2, 3, requires_grad=True)


def test_cross_entropy_is_torchs_for_samples_and_for_positions():
    logits, y = torch.randn(5, 7, requires_grad=True), torch.tensor([0, 6, 2, 3, 3])
    assert torch.equal(CROSS_ENTROPY(logits, y), F.cross_entropy(logits, y))
    tokens, labels = torch.randn(3, 4, 7, requires_grad=True), torch.randint(7, (3, 4))
    labels[0, 1:] = -100
    expected = F.cross_entropy(tokens.movedim(-1, 1), labels, ignore_index=-100)
    torch.testing.assert_close(CROSS_ENTROPY(tokens, labels), expected)
    assert CROSS_ENTROPY.counted(labels) == 9
    right = (tokens.argmax(-1) == labels)[labels != -100].sum()
    assert CROSS_ENTROPY.right(tokens, labels) == right


def test_squared_error_never_broadcasts():
    out, y = torch.randn(5, 1, requires_grad=True), torch.randn(5, 1)
    assert torch.equal(as_loss("mse")(out, y), F.mse_loss(out, y))
    with pytest.raises(ConfigError, match=r"targets have the shape \(5,\)"):
        as_loss("mse")(out, y[:, 0])


def test_a_function_and_a_module_of_ones_own():
    out, y = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    smooth = as_loss(nn.CrossEntropyLoss(label_smoothing=0.1))
    assert smooth(out, y) == F.cross_entropy(out, y, label_smoothing=0.1)
    assert not smooth.counts and smooth.unit == "units of the loss"

    def first(output, target):
        return (output["logits"][:, 0] - target).square().mean()

    loss = as_loss(first)
    assert loss({"logits": out}, y) == (out[:, 0] - y).square().mean()


@pytest.mark.parametrize("output", [("logits", {"logits": 1}), (1, (2, 1)), ("T", None)])
def test_a_part_of_the_output(output):
    which, container = output
    logits, y = torch.randn(5, 7, requires_grad=True), torch.arange(5)
    chosen = logits.T.clone() if container is None else logits
    if isinstance(container, dict):
        container = {"other": 0, "logits": chosen}
    elif isinstance(container, tuple):
        container = (None, chosen)
    else:
        container, chosen = logits[:, :5].T.contiguous(), logits[:, :5]
    assert Loss(output=which)(container, y) == F.cross_entropy(chosen, y)


@pytest.mark.parametrize(
    ("loss", "output", "y", "message"),
    [
        (Loss(), (LOGITS,), torch.ones(2).long(), "tuple of a tensor"),
        (Loss(), {"logits": LOGITS}, torch.ones(2).long(), "dict of logits"),
        (Loss(), LOGITS[:, 0], torch.ones(2).long(), r"\(2, 1 classes or more\)"),
        (Loss(), LOGITS[:, None], torch.ones(2).long(), r"\(2, 1 classes or more\)"),
        (Loss(output=3), (LOGITS,), torch.ones(2).long(), "output = 3 is not part of"),
        (Loss(output="a"), LOGITS, torch.ones(2).long(), "output = 'a' is not part of"),
        (as_loss(lambda a, b: a), LOGITS, torch.ones(2), "one number"),
        (as_loss(lambda a, b: 1.0), LOGITS, torch.ones(2), "one number"),
    ],
)
def test_what_does_not_fit_is_named(loss, output, y, message):
    with pytest.raises(ConfigError, match=message):
        loss(output, y)


@pytest.mark.parametrize("loss", ["crossentropy", 3, None])
def test_unknown_losses(loss):
    with pytest.raises(ConfigError, match="loss"):
        as_loss(loss)
