"""The monitor: decisions against plain ones, laws against simulation, NumPy against PyTorch."""

import functools

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.signal import lfilter

from paper_lib.averaging.monitor import (
    BLOCKS,
    Averages,
    Monitor,
    StationarityTest,
    block_length,
    gradient_vector,
)
from paper_lib.errors import ConfigError
from paper_lib.theory import simulate

ETA = np.geomspace(0.02, 1, 6)


def windows_of(values, **settings):
    test = StationarityTest(**settings)
    return [window for value in values if (window := test.add(value))]


def stationary_run(momentum, steps, seed=0):
    """Iterates (d, steps + 1) and gradients (d, steps) of SGD, lr 1, on curvatures ETA."""
    h = ETA[:, None]
    minima = simulate.sample_minima(np.random.default_rng(seed), np.ones(len(ETA)), steps)[0]
    x = simulate.sgd(minima, 1.0, h, momentum=momentum)
    return x, h * (x[:, :-1] - minima)


# --- the test ------------------------------------------------------------------------------------


def test_a_window_is_scipys_t_test_of_its_block_means():
    values = np.random.default_rng(0).normal(-0.3, 1, BLOCKS * 5)
    (window,) = windows_of(values, alpha=0.05, block=5)
    expected = stats.ttest_1samp(values.reshape(BLOCKS, 5).mean(1), 0, alternative="less")
    assert window.t == pytest.approx(expected.statistic)
    assert window.stationary == (expected.pvalue < 0.05)
    assert (window.end, window.steps, window.mean) == (40, 40, pytest.approx(values.mean()))


def test_only_an_undecided_window_is_followed_by_a_longer_one():
    # Blocks of both signs, and a mean just below zero.
    undecided = np.where(np.arange(16) % 4 < 2, 1.0, -1.01)
    negative, positive = -1 - 0.01 * np.arange(8.0), 1 + 0.01 * np.arange(8.0)
    values = [*undecided, *np.repeat(negative, 4), *np.repeat(positive, 2), *undecided]
    found = [(w.steps, w.stationary, w.mean >= 0) for w in windows_of(values, block=2)]
    plain = (16, False, False)
    assert found == [plain, (32, True, False), (16, False, True), plain]


def test_independent_values_without_a_mean_raise_alarms_at_the_nominal_rate():
    values = np.random.default_rng(1).standard_normal(160_000)
    alarms = [window.stationary for window in windows_of(values, alpha=0.1, block=2)]
    assert np.mean(alarms) == pytest.approx(0.1, abs=4 * np.sqrt(0.09 / len(alarms)))


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_values_without_information_raise_no_alarm(value):
    assert not any(window.stationary for window in windows_of([value] * 1000, block=5))


# --- the monitor ---------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_gradient_and_velocity_are_opposed_as_the_full_gradient_is_long(momentum):
    x, g = stationary_run(momentum, 20_000)
    v = x[:, :-1] - x[:, 1:]
    full = (ETA[:, None] * x[:, :-1])[:, 2000:]
    opposed = np.sum(g[:, 2001:] * v[:, 2000:-1], axis=0).mean()
    assert opposed == pytest.approx(-np.sum(full**2, axis=0).mean() / (1 + momentum), rel=0.05)


def test_a_stationary_run_raises_an_alarm_and_a_descending_one_does_not():
    _, g = stationary_run(0.0, 2000)
    slope = np.ones(6)
    stationary, descending = Monitor(), Monitor()
    assert any([stationary.observe(gradient) for gradient in g.T])
    assert not any([descending.observe(gradient + slope) for gradient in g.T])
    assert all(window.mean >= 0 for window in descending.windows)


@pytest.mark.parametrize(("directions", "most"), [(1, 3), (50, 2)])
def test_at_the_edge_of_descent_false_alarms_are_a_few_times_the_nominal_rate(directions, most):
    """One more direction descends for ever, just so steeply that E s_t = 0."""
    eta, memory, alpha, chains, steps = 0.1, 0.8, 0.05, 40, 3200
    rng = np.random.default_rng(directions)
    opposition = directions * eta / ((2 - eta) * (1 - memory * (1 - eta)))  # -E s_t without it
    slope, alarms = np.sqrt((1 - memory) * opposition), []
    for _ in range(chains):
        minima = simulate.sample_minima(rng, np.full(directions, eta**-2.0), steps + 500)[0]
        x = simulate.sgd(minima, 1.0, np.full((directions, 1), eta))
        g = (eta * (x[:, :-1] - minima))[:, 500:]
        g = np.concatenate([g, slope + rng.standard_normal((1, steps))])
        past = lfilter([1.0], [1.0, -memory], g, axis=-1)
        values = np.sum(g[:, 1:] * past[:, :-1], axis=0)
        found = windows_of(values, alpha=alpha, block=block_length(memory))
        alarms += [window.stationary for window in found]
    assert 0 < np.mean(alarms) < most * alpha


def test_after_an_alarm_everything_begins_again():
    _, g = stationary_run(0.0, 3000)
    monitor = Monitor(0.5)
    at = next(i for i, gradient in enumerate(g.T) if monitor.observe(gradient))
    fresh = Monitor(0.5)
    later = [monitor.observe(gradient) for gradient in g.T[at + 1 :]]
    assert later == [fresh.observe(gradient) for gradient in g.T[at + 1 :]]
    since = [w.t for w in monitor.windows[-len(fresh.windows) :]]
    assert since == pytest.approx([w.t for w in fresh.windows])


def test_tensors_and_arrays_are_watched_alike_and_left_alone():
    _, g = stationary_run(0.0, 1000)
    before = g.copy()
    some, others = Monitor(), Monitor()
    alarms = [some.observe(gradient) for gradient in g.T]
    assert alarms == [others.observe(gradient) for gradient in torch.from_numpy(g.T.copy())]
    assert [w.t for w in some.windows] == pytest.approx([w.t for w in others.windows])
    assert np.array_equal(g, before)


def test_a_window_is_read_from_the_device_once(monkeypatch):
    reads, real = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(len(self)) or real(self))
    alone = "a tensor was read by itself"
    monkeypatch.setattr(torch.Tensor, "__float__", lambda self: pytest.fail(alone))
    monitor = Monitor(0.5)
    for gradient in torch.randn(200, 3, generator=torch.Generator().manual_seed(0)):
        monitor.observe(gradient)
    assert reads == [BLOCKS] * len(monitor.windows) and reads


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_gradients_that_are_not_finite_are_refused_at_the_end_of_their_window(kind):
    monitor, bad = Monitor(0.5), kind([1.0, float("nan")])
    with pytest.raises(ConfigError, match="gradients = nan is not allowed: some were not finite"):
        for _ in range(1 + BLOCKS * block_length(0.5)):
            monitor.observe(bad)


@pytest.mark.parametrize(("memory", "steps"), [(0.0, 4), (0.8, 20), (0.9, 40)])
def test_blocks_are_longer_than_the_memory(memory, steps):
    assert block_length(memory) == steps


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Monitor(memory=1.0), "memory = 1.0"),
        (lambda: Monitor(memory=-0.1), "memory = -0.1"),
        (lambda: Monitor(alpha=0.0), "alpha = 0.0"),
        (lambda: Monitor(alpha=0.5), "alpha = 0.5"),
        (lambda: Averages(()), "memories"),
        (lambda: Averages((1.0,)), "memory = 1.0"),
        (lambda: Averages().best(), "observe"),
    ],
)
def test_bad_settings_are_refused(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


# --- averages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_gradients_tell_what_an_average_saves_whatever_the_curvatures_and_momentum(momentum):
    x, g = stationary_run(momentum, 20_000)
    averages, predicted, saved = Averages((0.5, 0.9, 0.99), smoothing=0), [], []
    for iterate, gradient in zip(x.T, g.T, strict=False):
        averages.observe(iterate, gradient)
        predicted.append(averages.gains.copy())
        saved.append([ETA @ (iterate**2 - average**2) / 2 for average in averages.vectors])
    expected = np.mean(saved[1000:], axis=0)
    assert np.mean(predicted[1000:], axis=0) == pytest.approx(expected, rel=0.05)


def test_an_average_is_uniform_first_and_exponential_then():
    x = np.random.default_rng(0).standard_normal((60, 3))
    averages = Averages((0.9,))
    for n, row in enumerate(x, start=1):
        averages.observe(row, row)
        if n == 10:
            assert averages.vectors[0] == pytest.approx(x[:10].mean(0))
    weights = 0.1 * 0.9 ** np.arange(49, -1, -1.0)
    assert averages.vectors[0] == pytest.approx(0.9**50 * x[:10].mean(0) + weights @ x[10:])


def test_the_best_average_is_short_far_from_the_minimum_and_long_near_it():
    averages = Averages((0.0, 0.9))
    for value in np.linspace(1000.0, 0, 300):  # a steady descent: any average lags behind
        averages.observe(np.array([value]), np.array([1.0]))
    assert averages.best() == (0.0, pytest.approx(np.array([0.0])))
    x, g = stationary_run(0.0, 2000)
    averages = Averages((0.0, 0.9))
    for iterate, gradient in zip(x.T, g.T, strict=False):
        averages.observe(iterate, gradient)
    assert averages.best()[0] == 0.9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_averages_of_narrow_weights_do_not_stand_still(dtype):
    averages, weights = Averages((0.997,)), torch.ones(10, dtype=dtype)
    for t in range(3000):
        averages.observe(weights * (1 + (t >= 500) / 64), torch.zeros(10, dtype=dtype))
    exact = 1 + (1 - 0.997**2500) / 64
    assert averages.vectors[0].tolist() == pytest.approx([exact] * 10, rel=1e-4)


@pytest.mark.xfail(strict=True, reason="observe cannot know that the two vectors differ in order")
def test_gains_do_not_depend_on_parameter_groups():
    torch.manual_seed(0)
    found = []
    for grouped in (False, True):
        p, q = (torch.nn.Parameter(torch.tensor(w)) for w in ([1.0, 2.0], [-3.0, 5.0]))
        groups = [{"params": [q]}, {"params": [p]}] if grouped else [{"params": [p, q]}]
        optimizer, averages = torch.optim.SGD(groups, lr=0.1), Averages((0.9,))
        for _ in range(5):
            optimizer.zero_grad()
            (p.square().sum() + 0.1 * q.square().sum()).backward()
            flat = torch.nn.utils.parameters_to_vector([p, q]).detach()
            averages.observe(flat, gradient_vector(optimizer))
            optimizer.step()
        found.append(float(averages.gains[0]))
    assert found[1] == pytest.approx(found[0])


# --- an optimizer's gradient ---------------------------------------------------------------------


def test_the_gradient_vector_is_what_sgd_descends():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    groups = [{"params": net[0].parameters(), "weight_decay": 0.1}, {"params": net[1].parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.5)
    net(torch.randn(5, 3)).square().sum().backward()
    before = torch.nn.utils.parameters_to_vector(net.parameters()).detach().clone()
    gradient = gradient_vector(optimizer)
    optimizer.step()
    after = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
    torch.testing.assert_close(before - after, 0.5 * gradient)
    assert not gradient.requires_grad
    optimizer.zero_grad()
    with pytest.raises(ConfigError, match="backward"):
        gradient_vector(optimizer)


def quadratic(weights):
    """A parameter and its gradient under the loss |p|^2 / 2 + sum p, as `backward` leaves it."""
    p = torch.nn.Parameter(torch.tensor(weights))
    (p.square().sum() / 2 + p.sum()).backward()
    return p


@pytest.mark.parametrize(
    ("make", "coupled"),
    [
        (torch.optim.SGD, True),
        (torch.optim.Adam, True),
        (functools.partial(torch.optim.Adam, decoupled_weight_decay=True), False),
        (torch.optim.AdamW, False),
        (torch.optim.Adafactor, False),
    ],
)
def test_decay_belongs_to_the_gradient_where_it_is_coupled(make, coupled):
    p = quadratic([1.0, -3.0])
    optimizer = make([p], lr=0.1, weight_decay=0.5)
    gradient = gradient_vector(optimizer)
    torch.testing.assert_close(gradient, torch.tensor([2.0, -2.0]) + coupled * 0.5 * p.detach())
    optimizer.step()
    if "exp_avg" in optimizer.state[p]:  # what Adam averages
        torch.testing.assert_close(optimizer.state[p]["exp_avg"], 0.1 * gradient)


def test_what_does_not_minimize_is_refused():
    with pytest.raises(ConfigError, match="maximize"):
        gradient_vector(torch.optim.SGD([quadratic([1.0])], lr=0.1, maximize=True))
    with pytest.raises(ConfigError, match="optimizer = 'Linear' .*: pass the optimizer"):
        gradient_vector(torch.nn.Linear(2, 2))
