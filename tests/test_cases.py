"""Known faults, as strict expected failures: whoever mends one is told to make its test a plain
one.
"""

import numpy as np
import pytest
import torch
from helpers import small_data
from torch import nn

from paper_lib import runs
from paper_lib.config import RunConfig
from paper_lib.errors import ConfigError
from paper_lib.probing import derivatives, probe
from paper_lib.training.flat import FlatModel


class Attention(nn.Module):
    """One encoder layer: second derivatives of torch's fused attention do not exist."""

    def __init__(self):
        super().__init__()
        self.patch, self.head = nn.Conv2d(1, 16, 2, 2), nn.Linear(16, 4)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    def forward(self, x):
        return self.head(self.encoder(self.patch(x).flatten(2).transpose(1, 2)).mean(1))


class Views(nn.Module):
    """Two views of every image in one batch: BatchNorm sees rows in another order than batches."""

    def __init__(self):
        super().__init__()
        stem = [nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2)]
        self.features = nn.Sequential(*stem, nn.Flatten(), nn.Linear(24, 4))

    def forward(self, x):
        one, other = self.features(torch.cat([x, 2 * x.flip(-1) + 1])).chunk(2)
        return one + other


class TimeFirst(nn.Module):
    """Time before samples: BatchNorm sees the rows of all batches mixed."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x):
        t = self.embed(x.squeeze(1).transpose(0, 1))
        return self.head(torch.tanh(self.norm(t.reshape(-1, 8)).view(t.shape)).mean(0))


class Auxiliary(nn.Module):
    """Two outputs in training, as networks with auxiliary logits have."""

    def __init__(self):
        super().__init__()
        self.main, self.other = nn.Linear(16, 3), nn.Linear(16, 3)

    def forward(self, x):
        x = x.flatten(1)
        return (self.main(x), self.other(x)) if self.training else self.main(x)


def batches() -> tuple[torch.Tensor, torch.Tensor]:
    """Four batches of 16 images with different means, so that mixing them shows."""
    torch.manual_seed(0)
    x = torch.randn(4, 16, 1, 8, 8) + torch.arange(4.0).view(4, 1, 1, 1, 1)
    return x, torch.randint(4, (4, 16))


@pytest.mark.xfail(
    strict=True, raises=RuntimeError, reason="fused attention has no second derivative"
)
def test_curvature_of_a_network_with_attention():
    x, y = batches()
    net = FlatModel(Attention())
    direction = np.ones(net.weights.numel(), np.float32)
    assert np.isfinite(
        derivatives.curvature(net, net.weights.numpy().copy(), direction, x, y)
    ).all()


@pytest.mark.xfail(strict=True, reason="BatchNorm's rows are taken to lie batch after batch")
@pytest.mark.parametrize("make", [Views, TimeFirst])
@pytest.mark.parametrize("quantity", ["losses", "gradient", "hessian"])
def test_batches_together_are_what_each_is_alone(make, quantity):
    x, y = batches()
    net = FlatModel(make())
    w = net.weights.numpy().copy()
    d = np.random.default_rng(0).standard_normal(w.size).astype(np.float32)
    if quantity == "losses":
        found = probe.losses(net, w, x, y)
        alone = [probe.losses(net, w, x[i : i + 1], y[i : i + 1])[0] for i in range(4)]
    elif quantity == "gradient":
        found = derivatives.mean_gradient(net, w, x, y)
        alone = derivatives.gradients(net, w, x, y).mean(0)
    else:
        found = derivatives.mean_hessian_product(net, w, d, x, y)
        alone = derivatives.hessian_vector_products(net, w, d, x, y).mean(0)
    np.testing.assert_allclose(found, alone, atol=1e-3 * np.abs(alone).max())


@pytest.mark.xfail(
    strict=True, raises=AttributeError, reason="an output that is no tensor is not named"
)
def test_a_network_with_two_outputs_works_or_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPER_RUNS", str(tmp_path))
    settings = RunConfig(data="tensors", lr=0.1, batch_size=8, steps=5, record="0-5")
    try:
        runs.train_seeds(settings, [0], small_data(), Auxiliary, progress=False)
    except ConfigError:
        return
