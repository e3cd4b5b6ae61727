"""The simulator, against steps written out by hand and against PyTorch's SGD."""

import numpy as np
import pytest
import torch

from paper_lib import simulate


def test_sgd_is_an_exponential_average_of_batch_minima():
    c = np.array([1.0, -2.0, 4.0])
    expected, x = [5.0], 5.0
    for minimum in c:
        x = 0.75 * x + 0.25 * minimum
        expected.append(x)
    np.testing.assert_allclose(simulate.sgd(c, 0.25, start=5.0), expected)
    np.testing.assert_allclose(simulate.sgd(c, 0.05, curvature=5.0, start=5.0), expected)


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
    np.testing.assert_allclose(got[:, -1], x.detach().numpy(), rtol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_coupled_directions_are_separate_ones_rotated(momentum):
    rng = np.random.default_rng(1)
    rotation, _ = np.linalg.qr(rng.standard_normal((3, 3)))
    h, lrs = np.array([0.1, 0.5, 1.0]), np.linspace(0.5, 0.1, 20)
    c = simulate.sample_minima(rng, [1.0, 2.0, 0.0], steps=20, seeds=4)
    separate = simulate.sgd(c, lrs, curvature=h[:, None], start=1.0, momentum=momentum)
    H = rotation @ np.diag(h) @ rotation.T
    for hessians in (H, np.broadcast_to(H, (20, 3, 3))):
        coupled = simulate.sgd_matrix(rotation @ c, hessians, lrs, rotation @ np.ones(3), momentum)
        np.testing.assert_allclose(coupled, rotation @ separate, atol=1e-13)


def test_each_batch_may_have_its_own_hessian():
    rng = np.random.default_rng(2)
    hessians = simulate.wishart_hessians(rng, [0.2, 0.6], dof=5, steps=10)
    c = rng.standard_normal((2, 10))
    x = np.zeros(2)
    for t in range(10):
        x = x - 0.1 * hessians[t] @ (x - c[:, t])
    np.testing.assert_allclose(simulate.sgd_matrix(c, hessians, 0.1)[:, -1], x, atol=1e-14)


def test_sampled_hessians_and_minima_have_their_stated_moments():
    rng = np.random.default_rng(3)
    hessians = simulate.wishart_hessians(rng, [0.5, 2.0], dof=8, steps=40_000)
    np.testing.assert_allclose(hessians.mean(0), np.diag([0.5, 2.0]), atol=0.02)
    spread = hessians[:, [0, 1], [0, 1]].std(0) / [0.5, 2.0]
    np.testing.assert_allclose(spread, np.sqrt(2 / 8), rtol=0.03)
    assert np.linalg.eigvalsh(hessians).min() >= 0
    c = simulate.sample_minima(rng, [1.0, 9.0], steps=200, seeds=300)
    assert c.shape == (300, 2, 200)
    np.testing.assert_allclose(c.var(axis=(0, 2)), [1.0, 9.0], rtol=0.03)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda rng: simulate.sample_minima(rng, [1.0, -1.0], 5), "cannot be negative, got -1"),
        (lambda rng: simulate.wishart_hessians(rng, [1.0], 0, 5), "got dof 0"),
        (lambda rng: simulate.wishart_hessians(rng, [-1.0], 2, 5), r"h \[-1.0\]"),
    ],
)
def test_errors_name_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.random.default_rng(0))
