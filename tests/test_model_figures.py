"""What the figures of the model show: tables with closed-form values, clouds of the predicted size, live sliders."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
from jupyter_client.manager import start_new_kernel

from paper_lib.experiments import explorer, model_checks, model_figures, plane


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_equivalent_schedules_hold_the_limit_and_the_closed_values():
    table = model_figures.equivalent_schedules([0.1], length=20, steps=60)
    assert set(table.average) == set(model_checks.AVERAGES)
    end = table.query("back == 0").set_index(["average", "eta"]).factor
    for eta in (0.0, 0.1):
        assert end["two-point", eta] == pytest.approx(0.5)
        assert end["EMA", eta] == pytest.approx(1 / 20)
        assert end["uniform", eta] == pytest.approx(1 / 20)


def test_cooldown_weights_are_averages():
    table = model_figures.cooldown_weights(["linear"], [0.1], horizon=10, steps=20)
    np.testing.assert_allclose(table.groupby("eta").weight.sum(), 1)
    uniform = table.query("eta == 0 and back < 10").weight
    np.testing.assert_allclose(uniform, 0.1)


def test_every_plot_draws_its_table_and_the_model():
    seeds, (_, axes) = [0, 1], plt.subplots(2, 4)
    schedules = model_figures.equivalent_schedules([0.1], 20, 60)
    model_figures.plot_equivalent(axes[0, 0], schedules, "EMA")
    model_figures.plot_weights(axes[0, 1], model_figures.cooldown_weights(["linear"], [0.1], 10, 20), "linear", 10)
    model_figures.plot_variance(axes[0, 2], model_checks.variances(seeds, etas=(0.5,), chains=20), "uniform")
    losses = model_checks.probe_losses(seeds, np.array([0, 0.5, 1, 2]))
    model_figures.plot_probe(axes[0, 3], losses, eta=0.2)
    model_figures.plot_collapse(axes[1, 0], losses)
    scales = model_checks.timescales(seeds, [0.5], horizons=[1, 10], chains=20)
    model_figures.plot_timescales(axes[1, 1], scales, eta=0.5)
    varying = model_checks.varying_curvature(seeds, [0.2], dofs=[4, 32], chains=20)
    model_figures.plot_varying(axes[1, 2], axes[1, 3], varying)
    for ax in axes.flat[:-1]:
        dashed = [line for line in ax.lines if line.get_linestyle() == "--"]
        assert dashed, "no prediction"
        assert all(np.isfinite(line.get_ydata(orig=False)).all() for line in ax.lines)
        assert ax.get_xlabel() and ax.get_ylabel()


def test_schedules_are_drawn_to_the_end_that_they_share():
    _, ax = plt.subplots()
    model_figures.plot_schedules(ax, {"short": np.array([1.0, 0.5]), "long": np.array([1.0, 0.9, 0.4])})
    assert [line.get_xdata().tolist() for line in ax.lines] == [[1, 0], [2, 1, 0]]
    assert ax.get_xlim() == (3, 0), "time runs to the right, to the end"
    lightness = [sum(line.get_color()) for line in ax.lines]
    assert lightness[0] > lightness[1], "colours in the order of the schedules"


def test_a_cloud_has_the_predicted_covariance():
    ends = plane.cloud(lr=0.4, decay=0.9, lag=20, seed=0, chains=4000)
    for kind, variance in plane.predicted_variances(0.4, 0.9, 20).items():
        axes = plane.rotate(np.eye(2))  # the eigendirections, one a row
        measured = (ends.loc[ends.kind == kind, ["x", "y"]].to_numpy() @ axes.T).var(0)
        np.testing.assert_allclose(measured, variance, rtol=0.12)


def test_rotation_keeps_lengths_and_the_path_its_start():
    z = np.random.default_rng(0).standard_normal((5, 2))
    np.testing.assert_allclose((plane.rotate(z) ** 2).sum(1), (z**2).sum(1))
    run = plane.path(lr=0.4, decay=0.9, seed=0, steps=30)
    assert run.kind.value_counts().to_dict() == {"minimum": 30, "iterate": 31, "EMA": 31}
    first = run.groupby("kind", sort=False)[["x", "y"]].first()
    np.testing.assert_allclose(first.loc["iterate"], first.loc["EMA"])


def test_explorer_draws_any_setting_and_refuses_those_outside_the_model():
    for setting in ({}, {"lr": 0.01, "decay": 0.0, "lag": 1}, {"lr": 1.0, "decay": 0.99, "lag": explorer.LAGS}):
        fig = explorer.explore(**setting)
        assert [ax.get_title() != "" for ax in fig.axes] == [True] * 3
    with pytest.raises(ValueError, match=r"got values from 0.375 to 2.5"):
        explorer.explore(lr=2.5)
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\)"):
        explorer.explore(decay=1.0)


def test_a_moved_slider_redraws_the_figure(monkeypatch):
    drawn = []
    monkeypatch.setattr(explorer, "live", lambda: True)
    monkeypatch.setattr(explorer, "explore", lambda lr, decay, lag, seed: drawn.append((lr, decay, lag, seed)))
    sliders = explorer.sliders(lr=0.2, lag=7)
    _, decay, lag, _ = sliders.children[:4]
    lag.value = 9
    decay.value = 0.5
    assert drawn[-2:] == [(pytest.approx(0.2), 0.95, 9, 0), (pytest.approx(0.2), 0.5, 9, 0)]


def test_sliders_appear_only_where_somebody_can_move_them():
    assert explorer.sliders() is None  # no kernel at all
    manager, client = start_new_kernel()
    try:
        for asked, expected in ((True, "True"), (False, "False")):  # as JupyterLab asks, and as papermill does
            said = []
            code = "from paper_lib.experiments import explorer; print(explorer.live())"
            client.execute_interactive(code, allow_stdin=asked, output_hook=said.append, timeout=120)
            printed = [m["content"]["text"] for m in said if m["msg_type"] == "stream"]
            assert printed == [f"{expected}\n"]
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
