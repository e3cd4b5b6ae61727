"""The one-step measurement: curves of known minimum, batches of the model, and a short real run."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from paper_lib import presets
from paper_lib import runs as run_cache
from paper_lib.errors import ConfigError
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


def model(size=32):
    """What `measure` would find, on average, for batches of `size` of a run with batches of 32.

    Three curvatures at stationarity, all batches sharing them; two seeds.
    """
    p = U[:, None] * LR * H
    v, s2 = quadratic.stationary_variance(LR * H, S2), S2 * 32 / size
    own = ((H / 2) * (1 - p) ** 2 * (v + s2)).sum(1)
    held = ((H / 2) * ((1 - p) ** 2 * v + p**2 * s2)).sum(1) + (H * S2).sum() / 2
    table = pd.DataFrame(
        {
            "probe": U,
            **{"own": own, "held": held, "first": held, "second": held},
            "slope_own": H**2 @ (v + s2),
            "slope_held": H**2 @ v,
            "bend_own": H**3 @ (v + s2),
            "bend_held": H**3 @ (v + s2),
            "bend_full": H**3 @ v,
        }
    ).assign(step=9, size=size)
    return pd.concat([table.assign(seed=seed) for seed in (0, 1)], ignore_index=True)


def test_summary_finds_the_models_optima():
    found = one_step.summary(model())
    assert list(found.seed) == [0, 1] and list(found["size"]) == [32, 32]
    for held in ("held", "first", "second"):
        np.testing.assert_allclose(found[f"{held}_best"], quadratic.best_held_out_step(0.1))
    np.testing.assert_allclose(found.own_best, 1 / (LR * found.h_own))  # as in one parabola
    np.testing.assert_allclose(found.start + found.own_change, found.own_min)
    np.testing.assert_allclose(found.start - found.squared / 2 / found.h_own, found.own_min)
    assert (found.own_change < 0).all() and (found.held_change > 0).all()


@pytest.mark.parametrize("size", [8, 128, 10_000])
def test_other_sizes_are_predicted_exactly_where_batches_share_a_hessian(size):
    (row,) = one_step.predict_sizes(one_step.summary(model()).head(1), [size]).itertuples()
    exact = one_step.summary(model(size)).iloc[0]
    assert row.h_held == row.h_own == pytest.approx(exact.h_held)
    start = one_step.summary(model()).start[0]  # the loss itself does not depend on the size
    assert row.own_min == pytest.approx(start - exact.squared / (2 * exact.h_own))


def test_the_excess_of_the_own_curvature_falls_as_one_over_the_size():
    seeds = one_step.summary(model().assign(bend_own=lambda t: 3 * t.bend_held))
    found = one_step.predict_sizes(seeds, [32, 64, 320])
    excess = (found.h_own - found.h_held).to_numpy().reshape(2, 3)
    np.testing.assert_allclose(excess, 2 * seeds.h_held[0] / np.array([[1, 2, 10]] * 2))


def test_boundary_is_interpolated_in_the_logarithm_and_missing_where_there_is_none():
    assert one_step.boundary([16, 64, 256], [0.2, 0.4, 0.6], 0.5) == pytest.approx(128)
    for own_min in ([0.6, 0.7, 0.8], [0.1, 0.2, 0.3], [0.1, np.nan, np.nan]):
        assert np.isnan(one_step.boundary([16, 64, 256], own_min, 0.5))


# --- a short run --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = presets.study("smoke").run.replace(steps=20, record="0-20")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAPER_RUNS", str(tmp_path_factory.mktemp("runs")))
        return run_cache.train_seeds(config, [0], progress=False)[0]


def test_measure_probes_the_batch_that_the_run_uses_next(run):
    table = one_step.measure([run], [12], multiples=np.array([0, 0.001, 1]))
    at = table.set_index("probe")
    assert at.own[0] == pytest.approx(run.loss[12], rel=1e-4)
    assert len(table) == 3 and set(table["size"]) == {run.config.batch_size}
    lr, net, x = run.config.lr, run.network(), np.array(run.at(12))
    first_order = 0.001 * lr * at.slope_own[0.001]
    assert at.own[0] - at.own[0.001] == pytest.approx(first_order, rel=0.1)
    stepped = x - lr * derivatives.gradients(net, x, *run.batches([12]))[0]
    own = probe.losses(net, stepped, *run.batches([12]))
    assert at.own[1.0] == pytest.approx(own[0], rel=1e-4)
    np.testing.assert_allclose(table.held, (table["first"] + table.second) / 2, rtol=1e-6)


def test_derivatives_are_those_of_the_batches(run):
    start = one_step.measure([run], [12], n_held=2, batch_size=16).iloc[0]
    net, x = run.network(), np.array(run.at(12))
    gradient = derivatives.gradients(net, x, *run.batches([12], 16))[0]
    first, second = derivatives.gradients(net, x, *run.held(12, 2))
    assert start.slope_held == pytest.approx(gradient @ first, rel=1e-3)
    product = derivatives.hessian_vector_products(net, x, gradient, *run.held(12, 2))[1]
    assert start.bend_held == pytest.approx(gradient @ product, rel=1e-3)
    assert start.bend_full == pytest.approx(first @ product, rel=1e-3)
    with pytest.raises(ConfigError, match="n_held = 1 .*2 or more"):
        one_step.measure([run], [12], n_held=1)


def test_trained_loss_is_that_of_the_last_iterate(run):
    found = one_step.trained_loss([run], 4)
    batches = probe.fixed_batches(run.dataset, 4, run.config.batch_size, 0)
    exact = probe.losses(run.network(), np.array(run.at(20)), *batches).mean()
    assert found[0] == pytest.approx(exact)
