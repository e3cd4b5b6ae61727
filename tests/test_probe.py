"""Probes: fast paths against readable references, exact derivatives, and no trace left behind."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.testing import assert_allclose, assert_array_equal
from torch import nn

from paper_lib import data, runs
from paper_lib.config import RunConfig
from paper_lib.errors import ConfigError
from paper_lib.probing import derivatives, probe
from paper_lib.training.flat import FlatModel, threads


class Net(nn.Module):
    """Convolution, BatchNorm, dropout: everything that a careless probe would disturb."""

    def __init__(self, norm: nn.Module | None = None, activation: nn.Module | None = None):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 6, 3),
            norm or nn.BatchNorm2d(6),
            activation or nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.5),
        )
        self.head = nn.Linear(6 * 4, 3)

    def forward(self, x):
        return self.head(self.body(x))


def make(seed: int = 0, **parts) -> FlatModel:
    torch.manual_seed(seed)
    return FlatModel(Net(**parts))


def batches(k: int = 5, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(k, size, 1, 4, 4, generator=generator)
    return x, torch.randint(3, (k, size), generator=generator)


def points(net: FlatModel, n: int = 3) -> np.ndarray:
    noise = np.random.default_rng(0).standard_normal((n, net.weights.numel()))
    return net.weights.numpy() + 0.3 * noise.astype(np.float32)


def prepared(**parts):
    """A network, three weight vectors, and batches."""
    net = make(**parts)
    return net, points(net), *batches()


def losses_reference(net, weights, x, y) -> np.ndarray:
    """What `probe.losses` computes with batch statistics, one batch to a forward pass."""
    found = np.empty((len(weights), len(x)), np.float32)
    with probe.probing(net, None), torch.no_grad():
        for i, row in enumerate(weights):
            probe.load(net, row, None)
            found[i] = [
                F.cross_entropy(net.forward(xs), ys).item() for xs, ys in zip(x, y, strict=True)
            ]
    return found


NORMS = {
    "batch": lambda: nn.BatchNorm2d(6),
    "no affine": lambda: nn.BatchNorm2d(6, affine=False),
    "untracked": lambda: nn.BatchNorm2d(6, track_running_stats=False),
    "group": lambda: nn.GroupNorm(2, 6),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("samples", [1, 20, 1000])  # one batch to a pass, two, all
def test_losses_agree_with_the_reference(norm, samples, monkeypatch):
    monkeypatch.setitem(probe.SAMPLES_AT_ONCE, "cpu", samples)
    net, weights, x, y = prepared(norm=NORMS[norm]())
    found = probe.losses(net, weights, x, y)
    assert_allclose(found, losses_reference(net, weights, x, y), rtol=2e-5)
    assert_array_equal(found[1], probe.losses(net, weights[1], x, y))


@pytest.mark.parametrize("frozen", [False, True])
def test_losses_are_the_same_on_any_number_of_threads(frozen):
    net, (x, y) = make(), batches()
    buffers = net.buffers.numpy().copy() if frozen else None
    found = []
    for n_threads in (1, 3):
        with threads(n_threads):
            found.append(probe.losses(net, points(net, 20), x, y, buffers))
            assert torch.get_num_threads() == n_threads
    assert_array_equal(*found)


def test_an_error_in_a_thread_is_the_callers():
    net, weights, x, y = prepared()
    with threads(2):
        with pytest.raises(RuntimeError):
            probe.losses(net, weights, x[:, :, :, :1], y)  # too small for the convolution
        assert torch.get_num_threads() == 2


def test_an_error_in_a_thread_ends_the_others(monkeypatch):
    net, (x, y), done = make(), batches(), []
    many = points(net, 400)

    def load(own, row, buffers):
        if np.array_equal(row, many[3]):
            raise KeyboardInterrupt
        done.append(row)
        time.sleep(0.01)  # else the other thread could finish before the caller learns of the error

    monkeypatch.setattr(probe, "load", load)
    with threads(2), pytest.raises(KeyboardInterrupt):
        probe.losses(net, many, x, y)
    assert len(done) < 200


@pytest.mark.parametrize("kept", [False, True])
def test_passes_on_a_gpu_are_bounded_by_pixels(kept):
    def images(batch, *shape):
        return batch * probe._batches_at_once("cuda", torch.Size([64, batch, *shape]), kept)

    assert images(16, 3, 32, 32) == (1024 if kept else 4096)
    assert images(16, 3, 224, 224) == (16 if kept else 80)
    assert images(256, 3, 224, 224) == 256  # a batch is never split
    assert images(16, 1, 8, 8) == images(16, 64) == 4096


def test_running_out_of_memory_says_what_to_lower(monkeypatch):
    def forward(x):
        raise torch.OutOfMemoryError("CUDA out of memory")

    net, (x, y) = make(), batches()
    monkeypatch.setattr(net.module, "forward", forward)
    with pytest.raises(MemoryError, match="lower `batch_size`"):
        derivatives.mean_gradient(net, points(net)[0], x, y)


def test_losses_with_buffers_do_not_depend_on_the_rest_of_the_batch():
    net, weights, x, y = prepared()
    buffers = np.stack([probe.statistics(net, row, x) for row in weights])
    each = probe.losses(net, weights, x, y, buffers)
    regrouped = probe.losses(net, weights, x.flatten(0, 1)[:, None], y.flatten()[:, None], buffers)
    assert_allclose(each, regrouped.reshape(3, 5, 8).mean(2), rtol=2e-5)
    assert_allclose(each[2], probe.losses(net, weights[2], x, y, buffers[2]), rtol=1e-6)
    batchwise = probe.losses(net, weights, x, y)
    assert np.abs(each - batchwise).max() > 1e-3  # another thing


def all_probes(net: FlatModel) -> None:
    x, y = batches()
    weights = points(net)[0]
    buffers = probe.statistics(net, weights, x)
    for chosen in (None, buffers):
        probe.losses(net, weights, x, y, chosen)
        probe.line(net, weights, weights, np.array([0.0, 0.1]), x, y, chosen)
        derivatives.gradients(net, weights, x, y, chosen)
        next(derivatives.each_gradient(net, weights, x, y, chosen))  # and leave it half way
        derivatives.mean_gradient(net, weights, x, y, chosen)
        derivatives.curvature(net, weights, weights, x, y, chosen)
    probe.evaluate(net, weights, buffers, zip(x, y, strict=True))
    with pytest.raises(ConfigError):
        probe.losses(net, weights[:-1], x, y)


@pytest.mark.parametrize("train", [True, False])
def test_probes_leave_no_trace(train):
    net = make()
    net.module.train(train)
    net.module.body[4].train(not train)
    net.grad.fill_(3.0)

    def state():
        vectors = net.weights, net.grad, net.buffers, torch.get_rng_state()
        modes = [(m.training, getattr(m, "momentum", None)) for m in net.module.modules()]
        return [v.tolist() for v in vectors], modes

    before = state()
    all_probes(net)
    assert state() == before
    assert not any("forward" in vars(m) for m in net.module.modules())


def test_training_gives_the_same_bits_with_and_without_probes():
    def train(probing: bool) -> torch.Tensor:
        net = make()
        net.module.train()
        for xs, ys in zip(*batches(4), strict=True):
            # dropout draws from the global generator
            net.backward(F.cross_entropy(net.forward(xs), ys))
            net.weights.add_(net.grad, alpha=-0.1)
            if probing:
                all_probes(net)
        return torch.cat([net.weights, net.buffers])

    assert torch.equal(train(False), train(True))


def test_a_recorded_run_has_the_same_bits_with_probes_between_its_batches(tmp_path, monkeypatch):
    x, y = (t.flatten(0, 1) for t in batches(20))
    dataset = data.from_tensors(x, y, x[:16], y[:16], device="cpu")
    config = RunConfig(data="tensors", batch_size=8, lr=0.1, steps=4, record="0-4", held_out=0)

    def weights(name: str) -> np.ndarray:
        monkeypatch.setenv("PAPER_RUNS", str(tmp_path / name))
        return np.array(runs.train_seeds(config, [0], dataset, Net, progress=False)[0].weights)

    plain, stream = weights("plain"), dataset.stream

    def probed(*args, **share):
        for batch in stream(*args, **share):
            all_probes(make())
            yield batch

    monkeypatch.setattr(dataset, "stream", probed)
    assert_array_equal(weights("probed"), plain)


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_slopes_of_losses(frozen):
    net, (weights, direction, _), x, y = prepared(activation=nn.Tanh())
    direction /= np.linalg.norm(direction)
    buffers = probe.statistics(net, weights, x) if frozen else None
    slopes = derivatives.gradients(net, weights, x, y, buffers) @ direction
    ahead, behind = probe.line(net, weights, direction, np.array([0.01, -0.01]), x, y, buffers)
    assert_allclose(slopes, (ahead - behind) / 0.02, atol=2e-4)


@pytest.mark.parametrize("samples", [1, 20, 1000])
def test_mean_gradients_agree_with_stored_ones(samples, monkeypatch):
    net, (weights, *_), x, y = prepared()
    stored = derivatives.gradients(net, weights, x, y)
    monkeypatch.setitem(probe.SAMPLES_AT_ONCE, "cpu", samples)
    mean = derivatives.mean_gradient(net, weights, x, y)
    assert_allclose(mean, stored.mean(0), atol=1e-6)


@pytest.mark.parametrize("frozen", [False, True])
def test_hessian_products_are_differences_of_gradients(frozen):
    net, (weights, direction, _), x, y = prepared(activation=nn.Tanh())
    buffers = probe.statistics(net, weights, x) if frozen else None
    exact = derivatives.hessian_vector_products(net, weights, direction, x, y, buffers)
    step = np.float32(2e-3)
    ahead = derivatives.gradients(net, weights + step * direction, x, y, buffers)
    behind = derivatives.gradients(net, weights - step * direction, x, y, buffers)
    assert_allclose(exact, (ahead - behind) / (2 * step), atol=0.01 * np.abs(exact).max())
    along = derivatives.curvature(net, weights, direction, x, y, buffers)
    assert_allclose(along, exact @ direction / (direction @ direction), rtol=1e-5)


def test_statistics_are_those_of_update_bn():
    net, (weights, *_), x, _ = prepared()
    found = probe.statistics(net, weights, x)
    plain = make()
    plain.weights.copy_(torch.from_numpy(weights))
    plain.module.body[1].num_batches_tracked = torch.tensor(0)  # update_bn counts with it
    torch.optim.swa_utils.update_bn(list(x), plain.module)
    assert_allclose(found, plain.buffers.numpy(), rtol=1e-5)


def test_evaluate_weighs_samples_not_chunks():
    net, (weights, *_), *stacked = prepared()
    x, y = (t.flatten(0, 1) for t in stacked)
    buffers = probe.statistics(net, weights, x[None])
    chunks = [(x[:33], y[:33]), (x[33:], y[33:])]
    loss, accuracy = probe.evaluate(net, weights, buffers, chunks)
    each = probe.losses(net, weights, x[:, None], y[:, None], buffers)
    assert loss == pytest.approx(each.mean(), rel=1e-5)
    assert accuracy * 40 == pytest.approx(round(accuracy * 40))
    with pytest.raises(ConfigError, match="at least one sample"):
        probe.evaluate(net, weights, buffers, [])


def test_networks_without_buffers_can_be_probed():
    net, (weights, *_), x, y = prepared(norm=nn.GroupNorm(2, 6))
    buffers = probe.statistics(net, weights, x)
    assert buffers.shape == (0,)
    found = [probe.losses(net, weights, x, y, chosen) for chosen in (None, buffers)]
    assert_array_equal(*found)


def test_fixed_batches_are_not_those_of_a_run():
    x, y = (t.flatten(0, 1) for t in batches(40))
    dataset = data.from_tensors(x, y, x, y, device="cpu")
    probing, labels = probe.fixed_batches(dataset, 2, 8, seed=0)
    assert probing.shape == (2, 8, 1, 4, 4) and labels.shape == (2, 8)
    assert not torch.equal(probing, dataset.batches(2, 8, 0)[0])
    assert torch.equal(probing, probe.fixed_batches(dataset, 2, 8, seed=0)[0])


@pytest.mark.parametrize(
    "probing", [probe.losses, derivatives.gradients, derivatives.mean_gradient]
)
def test_what_does_not_fit_is_refused(probing):
    net, (weights, *_), x, y = prepared()
    with pytest.raises(ConfigError, match="stacked as"):
        probing(net, weights, x[:0], y[:0])
    with pytest.raises(ConfigError, match=r"\(5, 8\)"):
        probing(net, weights, x, y.flatten())
    with pytest.raises(ConfigError, match="shape of weights"):
        probing(net, weights[:1], x, y)  # one number would be spread over all weights
    with pytest.raises(ConfigError, match="shape of buffers"):
        probing(net, weights, x, y, np.zeros(1, np.float32))
