"""Timescales: a quadratic network's known curvatures are found, with their rates and variances."""

import numpy as np
import pytest
import torch
from torch import nn

from paper_lib import data
from paper_lib.config import RunConfig
from paper_lib.errors import ConfigError
from paper_lib.experiments import timescales
from paper_lib.probing import derivatives, hessian
from paper_lib.theory.quadratic import autocorrelation, stationary_variance
from paper_lib.theory.simulate import sample_minima, sgd
from paper_lib.training.flat import FlatModel


class Bowl(nn.Module):
    """Logits (0, z): cross-entropy with label 0 has the Hessian E[x x^T] / 4 at zero weights."""

    def __init__(self, size):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(size))

    def forward(self, x):
        z = x @ self.w
        return torch.stack([torch.zeros_like(z), z], dim=1)


def bowl_images(n):
    """Inputs (n, 10) of a bowl, that scatter less from axis to axis."""
    x = np.random.default_rng(0).standard_normal((n, 10)) * np.linspace(2, 0.2, 10)
    return torch.from_numpy(x).float()


@pytest.fixture
def bowl():
    """A network, its weights, batches (4, 32, 10) and its mean Hessian there."""
    x = bowl_images(128).view(4, 32, 10)
    y = torch.zeros(4, 32, dtype=torch.int64)
    flat = x.flatten(0, 1).double().numpy()
    return FlatModel(Bowl(10)), np.zeros(10, np.float32), x, y, flat.T @ flat / len(flat) / 4


def test_product_is_that_of_the_mean_hessian(bowl):
    net, weights, x, y, H = bowl
    d = np.random.default_rng(1).standard_normal(10)
    product = derivatives.mean_hessian_product(net, weights, d, x, y)
    np.testing.assert_allclose(product, H @ d, rtol=1e-5)


def test_top_directions_are_the_steepest_and_orthonormal(bowl):
    net, weights, x, y, H = bowl
    h, V = hessian.top_directions(net, weights, x, y, n=3, tolerance=1e-6)
    expected, vectors = np.linalg.eigh(H)
    np.testing.assert_allclose(h, expected[::-1][:3], rtol=1e-5)
    np.testing.assert_allclose(np.abs(V @ vectors[:, ::-1][:, :3]), np.eye(3), atol=1e-3)
    np.testing.assert_allclose(hessian.curvatures(net, weights, V, x, y), h, rtol=1e-5)


def test_more_directions_than_weights_are_refused(bowl):
    net, weights, x, y, _ = bowl
    with pytest.raises(ConfigError, match="Lanczos"):
        hessian.top_directions(net, weights, x, y, n=10)


def test_batch_statistics_are_those_of_each_batch():
    torch.manual_seed(0)
    net = FlatModel(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)))
    weights, before = net.weights.numpy().copy(), net.buffers.clone()
    d = np.random.default_rng(0).standard_normal(len(weights))

    def product(x, y):
        return derivatives.mean_hessian_product(net, weights, d, x, y)

    x, y = torch.randn(3, 8, 5), torch.randint(3, (3, 8))
    singly = [product(x[k : k + 1], y[k : k + 1]) for k in range(3)]
    np.testing.assert_allclose(product(x, y), np.mean(singly, 0), rtol=1e-4, atol=1e-6)
    assert torch.equal(net.buffers, before)


def simulated(eta, steps, s2=1.0, momentum=0.0):
    """Stationary iterates of the model, (steps, k), by directions of eta."""
    minima = sample_minima(np.random.default_rng(0), np.full(len(eta), s2), steps + 200)
    return sgd(minima, 1.0, np.array(eta)[:, None], momentum=momentum)[0, :, -steps:].T


def test_autocorrelation_against_the_model():
    eta = [0.2, 0.9, 1.4]
    rho = timescales.autocorrelation(simulated(eta, 40_000), [0, 1, 3])
    expected = autocorrelation(np.array(eta), 4)[:, [0, 1, 3]]
    np.testing.assert_allclose(rho.T, expected, atol=0.03)
    with pytest.raises(ConfigError, match="lags"):
        timescales.autocorrelation(np.zeros((5, 1)), [5])


class Run:
    """What is read of a run; its network is a bowl."""

    def __init__(self, weights, lr, momentum=0.0, batch_size=8, dataset=None):
        self.weights, self.dataset = weights, dataset
        settings = {"lr": lr, "momentum": momentum, "batch_size": batch_size}
        steps = len(weights) - 1
        self.config = RunConfig(**settings, steps=steps, norm="none", weight_decay=0.01)

    def window(self, first, last):
        return self.weights[first : last + 1]

    def network(self):
        return FlatModel(Bowl(10))


@pytest.fixture(scope="module")
def model():
    """Modes of the model itself: three directions, and an unstable one that must be left out."""
    eta, s2, lr = np.array([1.2, 0.6, 0.25]), 2.0, 0.5
    X = np.pad(simulated(eta, 20_000, s2), ((0, 0), (0, 1)))
    h = np.append(eta, -0.1) / lr
    noise = h**2 * s2
    return timescales.Modes(Run(X, lr), 0, np.eye(4), h, noise, X - X.mean(0))


def test_predictions_hold_for_the_model(model):
    table = timescales.measure([model], [model.h])
    assert table.direction.tolist() == [0, 1, 2]
    np.testing.assert_allclose(table.rho, table.rho_model, atol=0.03)
    np.testing.assert_allclose(table.v, table.v_met, rtol=0.05)
    np.testing.assert_allclose(table.v_met, stationary_variance([1.2, 0.6, 0.25], 2.0))
    np.testing.assert_allclose(table.rho_met, table.rho_model)
    found = timescales.agreement(table).loc[0]
    assert found.rms == found.rms_met < 0.03
    assert abs(found.bias) < 0.02
    assert found.matched < 0.1
    assert found.reversed > 1.2
    assert abs(found.v_met_ratio - 1) < 0.05
    assert found.v_walk_ratio < 0.01
    curves = timescales.forgetting(model, [2, 0], n_lags=5)
    assert curves.direction.tolist() == [2] * 5 + [0] * 5
    assert curves.lag.tolist() == [0, 1, 2, 3, 4] * 2
    np.testing.assert_allclose(curves.rho, curves.rho_model, atol=0.05)


def test_modes_measure_curvature_and_noise_where_they_say():
    images, labels = bowl_images(4096), torch.arange(4096) // 4095  # one of 1, the rest of 0
    dataset = data.from_tensors(images, labels, images[:1], labels[:1])
    away = np.random.default_rng(2).standard_normal(10).astype(np.float32)
    X = np.stack([away, -away] * 40)  # their average is zero
    found = timescales.modes(Run(X, lr=0.1, dataset=dataset), 3, n_batches=80)
    np.testing.assert_allclose(found.projected, X @ found.directions.T, atol=1e-5)
    x = images.double().numpy()
    logits = x @ np.stack([0 * away, away, -away]).T
    slope = 1 / (1 + np.exp(-logits))  # of an image's loss in its logit
    noise = [np.var(s[:, None] * x @ found.directions.T, axis=0) / 8 for s in slope.T]
    H = x.T @ x / len(x) / 4
    curvatures = np.diag(found.directions @ H @ found.directions.T)
    np.testing.assert_allclose(found.h, curvatures + 0.01, rtol=0.15)
    np.testing.assert_allclose(found.noise, (noise[1] + noise[2]) / 2, rtol=0.3)
    assert np.all(noise[1] + noise[2] > 3 * noise[0])  # the two noises are far from each other
    met = timescales.curvatures_met(found, n_iterates=2)
    weight = np.mean(slope[:, 1:] * (1 - slope[:, 1:]), axis=1)
    H = x.T @ (x * weight[:, None]) / len(x)
    expected = np.diag(found.directions @ H @ found.directions.T) + 0.01
    np.testing.assert_allclose(met, expected, rtol=0.5)
    assert np.all(met < found.h)  # a logistic loss is steepest at the minimum
    with pytest.raises(ConfigError, match="settle"):
        timescales.modes(Run(X, lr=0.1, dataset=dataset), 3, settle=79)


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_two_point_fall_is_that_of_the_model(momentum):
    half = bowl_images(64)
    images, labels = torch.cat([half, half]), torch.arange(128) // 64
    # Each image comes with both labels: the minimum is at zero.
    dataset = data.from_tensors(images, labels, images[:1], labels[:1])
    h, V = np.linalg.eigh((half.T @ half).double().numpy() / 64 / 4)
    h, V = h[[-1, -4, -7]], V.T[[-1, -4, -7]]
    lr = 0.9 / h[0]
    s2 = 0.004 / h / stationary_variance(lr * h, 1.0, momentum)  # a loss of 0.002 in each
    z = simulated(lr * h, 20_000, s2, momentum)
    run, noise = Run(z @ V, lr, momentum, 128, dataset), (h**2 * s2)[:2]
    m = timescales.Modes(run, 0, V[:2], h[:2], noise, z[:, :2])
    found = timescales.two_point_fall(m, [1, 3, 40], n_batches=1, n_pairs=30)

    def falls(ends, directions):
        pairs = [(z[ends], (z[ends] + z[ends - lag]) / 2) for lag in (1, 3, 40)]
        return [((later**2 - middle**2) @ (h * directions) / 2).mean() for later, middle in pairs]

    ends = np.linspace(40, 19_999, 30).astype(int)
    np.testing.assert_allclose(found.steep, falls(ends, [1, 1, 0]), rtol=0.03)
    np.testing.assert_allclose(found.full, falls(ends, [1, 1, 1]), rtol=0.03)
    np.testing.assert_allclose(found.model, falls(np.arange(40, 20_000), [1, 1, 0]), rtol=0.05)
    with pytest.raises(ConfigError, match="lags"):
        timescales.two_point_fall(m, [20_000])
