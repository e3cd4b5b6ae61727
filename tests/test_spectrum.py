"""Predictions from a spectrum, against simulated runs in many directions at once."""

import numpy as np
import pytest

from paper_lib.averaging import vectors
from paper_lib.theory import quadratic, simulate
from paper_lib.theory.spectrum import Spectrum

LR, BURN, N, SEEDS = 0.5, 600, 101, 1500


@pytest.fixture(scope="module")
def spectrum():
    return Spectrum(h=np.geomspace(0.02, 2, 5), s2=np.linspace(3, 1, 5))


@pytest.fixture(scope="module", params=[0.0, 0.5])
def run(request, spectrum):
    """Momentum and N stationary iterates: (SEEDS, 5, N)."""
    c = simulate.sample_minima(np.random.default_rng(0), spectrum.s2, BURN + N - 1, SEEDS)
    x = simulate.sgd(c, LR, spectrum.h[:, None], momentum=request.param)
    return request.param, x[..., BURN:]


def assert_mean(samples, expected):
    assert abs(samples.mean() - expected) < 5 * samples.std() / np.sqrt(len(samples))


def test_loss_radius_and_displacement(spectrum, run):
    momentum, x = run
    loss = (spectrum.h[:, None] * x**2 / 2).sum(1)
    assert_mean(loss[:, -1], spectrum.excess_loss(LR, momentum))
    radius = spectrum.shell_radius(LR, momentum)
    assert_mean((x[..., -1] ** 2).sum(1), radius**2)
    rho = spectrum.autocorrelation(LR, N, momentum)
    for lag in (1, 10, 100):
        moved = ((x[..., -1] - x[..., -1 - lag]) ** 2).sum(1)
        assert_mean(moved, 2 * radius**2 * (1 - rho[lag]))


def test_loss_of_averages(spectrum, run):
    momentum, x = run
    for a in (vectors.ema(N, 0.9), vectors.uniform(N, 30), vectors.two_point(N, 50)):
        loss = (spectrum.h * (x @ a) ** 2 / 2).sum(1)
        assert_mean(loss, spectrum.averaged_loss(a, LR, momentum))


def test_curves_are_the_losses_of_their_averages(spectrum):
    n, lags, decays, windows = 1000, [1, 10, 100], [0.0, 0.5, 0.95], [1, 5, 50]
    for curve, settings, average in (
        (spectrum.two_point_losses, lags, vectors.two_point),
        (spectrum.ema_losses, decays, vectors.ema),
        (spectrum.uniform_losses, windows, vectors.uniform),
    ):
        expected = [spectrum.averaged_loss(average(n, s), LR) for s in settings]
        np.testing.assert_allclose(curve(LR, settings), expected, rtol=1e-9)


def test_two_far_points_recover_half_the_loss_as_about_half_the_lr_does(spectrum):
    (loss,) = spectrum.two_point_losses(LR, [10_000])
    assert loss == pytest.approx(spectrum.excess_loss(LR) / 2)
    slow = Spectrum(h=[0.01, 0.02], s2=[1.0, 1.0])
    (loss,) = slow.two_point_losses(LR, [10_000])
    assert slow.effective_lr(loss) == pytest.approx(LR / 2, rel=0.01)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_effective_lr_inverts_the_loss(spectrum, momentum):
    for lr in (1e-6, 0.1, 0.95 * (1 + momentum)):  # stable below 1 + m, as the largest h is 2
        assert spectrum.effective_lr(spectrum.excess_loss(lr, momentum), momentum) == pytest.approx(lr)
    single = Spectrum(h=0.3, s2=2.0)
    variance = 2 * single.excess_loss(0.4) / 0.3 * 0.6
    expected = quadratic.effective_eta(variance, 2.0) / 0.3
    assert single.effective_lr(0.3 * variance / 2) == pytest.approx(float(expected))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Spectrum([1.0, 0.0], [1.0, 1.0]), "leave out directions"),
        (lambda: Spectrum([1.0], [-1.0]), "got minima 1 and -1"),
        (lambda: Spectrum([1.0], [1.0, 2.0]), "one length"),
        (lambda: Spectrum([4.0], [1.0]).excess_loss(0.5), r"got values from 2 to 2"),
        (lambda: Spectrum([1.0], [1.0]).effective_lr(0.0), "must be positive, got 0.0"),
    ],
)
def test_errors_name_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()
