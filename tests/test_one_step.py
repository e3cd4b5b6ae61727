"""The one-step measurement: curves of known minimum, the model's curves, and a short real run."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from paper_lib import presets
from paper_lib import runs as run_cache
from paper_lib.experiments import one_step
from paper_lib.probing import derivatives, probe
from paper_lib.theory import quadratic

# --- curves in closed form ----------------------------------------------------------------------

U = one_step.MULTIPLES


@pytest.mark.parametrize(
    ("loss", "place", "least"),
    [
        (lambda x: 3 * (x - 0.3) ** 2 + 0.5, 0.3, 0.5),
        (lambda x: 3 * (x - 1.2) ** 2 + 0.5, 1.2, 0.5),
        (lambda x: 3 * (x - 2.2) ** 2 + 0.5, 2.2, 0.5),
        (lambda x: x, 0, 0),  # at the ends of the curve
        (lambda x: -x, 4, -4),
        (lambda x: -((x - 1) ** 2), 4, -9),
    ],
)
def test_minimum_of_a_parabola_is_exact(loss, place, least):
    assert one_step.minimum(U, loss(U)) == pytest.approx((place, least))


H, S2, LR = np.array([0.2, 0.7, 1.1]), np.array([3.0, 1.0, 0.5]), 0.6


@pytest.fixture(scope="module")
def model():
    """What `measure` would find, on average, for three curvatures at stationarity; two seeds."""
    p = U[:, None] * LR * H
    v = quadratic.stationary_variance(LR * H, S2)
    held = quadratic.held_out_loss(p, LR * H, H, S2).sum(1) + (H * S2).sum() / 2
    table = pd.DataFrame(
        {
            "probe": U,
            "own": quadratic.own_batch_loss(p, LR * H, H, S2).sum(1),
            "held": held,
            "slope_own": H**2 @ (v + S2),
            "slope_held": H**2 @ v,
            "curvature": H**3 @ (v + S2) / (H**2 @ (v + S2)),
        }
    )
    table = table.assign(step=9, batch=9, point="p")
    return pd.concat([table.assign(seed=seed) for seed in (0, 1)], ignore_index=True)


def test_predicted_curves_are_the_models_for_a_mixture_of_curvatures(model):
    predicted, exact = one_step.predict(model, LR), model.query("seed == 0")
    np.testing.assert_allclose(predicted.held, exact.held, rtol=1e-9)
    np.testing.assert_allclose(predicted.own, exact.own, rtol=1e-9)


def test_summary_finds_the_models_optima(model):
    found = one_step.summary(model, LR)
    assert list(found.seed) == [0, 1]
    np.testing.assert_allclose(found.held_best, 0.5)
    np.testing.assert_allclose(found.held_full, found.held_start)
    np.testing.assert_allclose(found.own_best, found.inverse_curvature)  # as in one parabola
    np.testing.assert_allclose(found.held_start - found.held_min, found.gain / 4)
    assert (found.own_min < found.own_start).all()
    assert (found.held_at_own > found.held_start).all()


@pytest.mark.parametrize("size", [8, 32, 128, 10_000])
def test_best_step_of_other_batch_sizes_is_the_models(size):
    eta = 0.3
    v = quadratic.stationary_variance(eta)
    p = np.linspace(0, 1, 100_001)
    held = (1 - p) ** 2 * v + p**2 * 32 / size  # s2 = 1 at the size that trains, 32
    exact = p[np.argmin(held)] / eta
    cosine = eta / 2  # of two batches of 32
    found = one_step.predicted_best(size, 32, cosine)
    assert found == pytest.approx(exact, abs=1e-3)


# --- a short run --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = presets.study("smoke").run.replace(steps=20, record="0-20")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAPER_RUNS", str(tmp_path_factory.mktemp("runs")))
        return run_cache.train_seeds(config, [0], progress=False)[0]


def test_measure_probes_the_batch_that_the_run_uses_next(run):
    table = one_step.measure([run], [12], point="here")
    at = table.set_index("probe")
    assert at.own[0] == pytest.approx(run.loss[12], rel=1e-4)
    assert len(table) == len(U) and set(table.point) == {"here"}
    lr, net, x = run.config.lr, run.network(), np.array(run.at(12))
    first_order = 0.001 * lr * at.slope_own[0.001]
    assert at.own[0] - at.own[0.001] == pytest.approx(first_order, rel=0.1)
    stepped = x - lr * derivatives.gradients(net, x, *run.batches([12]))[0]
    own = probe.losses(net, stepped, *run.batches([12]))
    assert at.own[1.0] == pytest.approx(own[0], rel=1e-4)


def test_frozen_statistics_are_the_snapshots(run):
    table = one_step.measure([run], [12], frozen=True, multiples=np.array([0.0, 0.5, 1.0]))
    buffers = np.array(run.buffers[run.rows(12)[0]])
    own = probe.losses(run.network(), np.array(run.at(12)), *run.batches([12]), buffers)
    assert table.own[0] == pytest.approx(own[0], rel=1e-5)
    assert table.own[0] != pytest.approx(run.loss[12], rel=1e-3)


def test_both_halves_by_size_compare_with_the_loss_at_the_same_size(run):
    found = one_step.by_size([run], [run], [10], [16, 128])
    assert list(found["size"]) == [16, 16, 128, 128]
    assert list(found.statistics) == ["batch", "running"] * 2
    loss = one_step.trained_loss([run], one_step.TRAINED_IMAGES // 128, batch_size=128)
    assert found.ratio[2] == pytest.approx(found.own_min[2] / loss[0])
