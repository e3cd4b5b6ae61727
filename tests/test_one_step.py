"""The one-step measurement: curves of known minimum, the model's curves, and a short real run."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from paper_lib import presets, runs
from paper_lib.experiments import boundary, one_step
from paper_lib.probing import derivatives, probe
from paper_lib.theory import quadratic


@pytest.mark.parametrize("place", [0.3, 1.2, 2.2])
def test_minimum_of_a_parabola_is_exact(place):
    x = one_step.MULTIPLES
    found = one_step.minimum(x, 3 * (x - place) ** 2 + 0.5)
    assert found == pytest.approx((place, 0.5))


@pytest.mark.parametrize("loss, place", [(lambda x: x, 0.0), (lambda x: -x, 4.0), (lambda x: -((x - 1) ** 2), 4.0)])
def test_minimum_at_an_end_of_the_curve(loss, place):
    x = one_step.MULTIPLES
    assert one_step.minimum(x, loss(x)) == (place, loss(place))


H, S2, LR = np.array([0.2, 0.7, 1.1]), np.array([3.0, 1.0, 0.5]), 0.6


def model_table(momentum: float = 0.0, seeds=(0, 1)) -> pd.DataFrame:
    """What `measure` would find, on average, for three curvatures at stationarity."""
    steps = one_step.MULTIPLES * LR
    v = quadratic.stationary_variance(LR * H, S2, momentum)
    p = steps[:, None] * H
    table = pd.DataFrame(
        {
            "probe": one_step.MULTIPLES,
            "own": quadratic.own_batch_loss(p, LR * H, H, S2, momentum).sum(1),
            "held": quadratic.held_out_loss(p, LR * H, H, S2, momentum).sum(1) + (H * S2).sum() / 2,
            "slope_own": H**2 @ (v + S2),
            "slope_held": H**2 @ v,
            "curvature": H**3 @ (v + S2) / (H**2 @ (v + S2)),
        }
    )
    return pd.concat([table.assign(seed=seed, step=9, batch=9, point="p") for seed in seeds], ignore_index=True)


def test_predicted_curves_are_the_models_for_a_mixture_of_curvatures():
    table = model_table()
    found, exact = one_step.predict(table, LR), table.query("seed == 0")
    np.testing.assert_allclose(found.held, exact.held, rtol=1e-9)
    np.testing.assert_allclose(found.own, exact.own, rtol=1e-9)


def test_summary_finds_the_models_optima():
    found = one_step.summary(model_table(), LR)
    assert list(found.seed) == [0, 1]
    np.testing.assert_allclose(found.held_best, 0.5)
    np.testing.assert_allclose(found.held_full, found.held_start)
    np.testing.assert_allclose(found.own_best, found.inverse_curvature)  # one parabola: no curvature but this
    np.testing.assert_allclose(found.held_start - found.held_min, found.gain / 4)
    assert (found.own_min < found.own_start).all() and (found.held_at_own > found.held_start).all()


@pytest.mark.parametrize("size", [8, 32, 128, 10_000])
def test_best_step_of_other_batch_sizes_is_the_models(size):
    eta = 0.3
    v = quadratic.stationary_variance(eta)
    p = np.linspace(0, 1, 100_001)
    held = (1 - p) ** 2 * v + p**2 * 32 / size  # s2 = 1 at the size that trains, 32
    exact = p[np.argmin(held)] / eta
    found = boundary.predicted_best(size, 32, eta / 2)  # the cosine of two gradients
    assert found == pytest.approx(exact, abs=1e-3)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    config = presets.study("smoke").run.replace(steps=20, record="0-20")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAPER_RUNS", str(tmp_path_factory.mktemp("runs")))
        return runs.train_seeds(config, [0], progress=False), runs.load_dataset(config)


def test_measure_probes_the_batch_that_the_run_uses_next(recorded):
    (run,), dataset = recorded
    table = one_step.measure([run], dataset, [12], point="here")
    at = table.set_index("probe")
    assert at.own[0] == pytest.approx(run.loss[12], rel=1e-4)
    assert len(table) == len(one_step.MULTIPLES) and set(table.point) == {"here"}
    small = table[table.probe == 0.001].iloc[0]
    lr = run.config.lr
    assert at.own[0] - small.own == pytest.approx(0.001 * lr * small.slope_own, rel=0.1)
    x = (
        np.array(run.at(12))
        - lr * derivatives.gradients(runs.network(run, dataset), np.array(run.at(12)), *dataset.batches([12], 64, 0))[0]
    )
    own = probe.losses(runs.network(run, dataset), x, *dataset.batches([12], 64, 0))
    assert at.own[1.0] == pytest.approx(own[0], rel=1e-4)


def test_frozen_statistics_are_the_snapshots(recorded):
    (run,), dataset = recorded
    table = one_step.measure([run], dataset, [12], frozen=True, multiples=np.array([0.0, 0.5, 1.0]))
    buffers = np.array(run.buffers[run.rows(12)[0]])
    own = probe.losses(runs.network(run, dataset), np.array(run.at(12)), *dataset.batches([12], 64, 0), buffers)
    assert table.own[0] == pytest.approx(own[0], rel=1e-5)
    assert table.own[0] != pytest.approx(run.loss[12], rel=1e-3)


def test_boundary_tables(recorded):
    trained, dataset = recorded
    found = boundary.by_size(trained, trained, dataset, [10], [16, 128])
    assert list(found["size"]) == [16, 16, 128, 128] and list(found.statistics[:2]) == ["batch", "running"]
    loss = one_step.trained_loss(trained, dataset, boundary.TRAINED_IMAGES // 128, batch_size=128)
    assert found.ratio[2] == pytest.approx(found.own_min[2] / loss[0])
    fig, axes = plt.subplots(2, 2)
    boundary.plot_sizes(*axes[0], found, reference=16)
    boundary.plot_settings(*axes[1], found.assign(point="a"))
    plt.close(fig)


def test_plots_draw_measurement_and_model():
    fig, (ax, near) = plt.subplots(1, 2)
    one_step.plot(ax, model_table(), LR, momentum=0.0)
    one_step.plot_held_out(near, model_table(), LR)
    drawn = [line.get_ydata() for line in near.lines]
    x = drawn[0]
    assert x[0] == 0 and min(x) < 0
    assert len(ax.lines) == 4 and ax.get_xscale() == "log"
    plt.close(fig)
