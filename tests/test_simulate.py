"""The simulator, against steps written out by hand and against PyTorch's SGD."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from paper_lib.errors import ConfigError
from paper_lib.theory import simulate


def test_sgd_is_an_exponential_average_of_batch_minima():
    c = np.array([1.0, -2.0, 4.0])
    expected, x = [5.0], 5.0
    for minimum in c:
        x = 0.75 * x + 0.25 * minimum
        expected.append(x)
    assert_allclose(simulate.sgd(c, 0.25, start=5.0), expected)
    assert_allclose(simulate.sgd(c, 0.05, curvature=5.0, start=5.0), expected)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_steps_as_torch_does_under_a_schedule(momentum):
    rng = np.random.default_rng(0)
    c, h = rng.standard_normal((2, 30)), np.array([0.3, 1.5])
    lrs = np.geomspace(0.5, 0.01, 30)
    x = torch.tensor([1.0, -1.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=1.0, momentum=momentum)
    for t in range(30):
        optimizer.param_groups[0]["lr"] = lrs[t]
        optimizer.zero_grad()
        (torch.tensor(h) * (x - torch.tensor(c[:, t])) ** 2 / 2).sum().backward()
        optimizer.step()
    got = simulate.sgd(c, lrs, curvature=h[:, None], start=[1.0, -1.0], momentum=momentum)
    assert_allclose(got[:, -1], x.detach().numpy(), rtol=1e-12)


def test_sampled_minima_have_their_stated_moments():
    c = simulate.sample_minima(np.random.default_rng(3), [1.0, 9.0], steps=200, seeds=300)
    assert c.shape == (300, 2, 200)
    assert_allclose(c.var(axis=(0, 2)), [1.0, 9.0], rtol=0.03)


def test_a_negative_variance_is_named():
    with pytest.raises(ConfigError, match="s2 = .*-1.0.*cannot be negative"):
        simulate.sample_minima(np.random.default_rng(0), [1.0, -1.0], 5)
