"""What only a GPU can show, and skipped without one: the same bits again, no trace of TF32, company
on one device.

The network and the images are large enough for cuDNN to use tensor cores, so that TF32 would be
seen.
"""

import contextlib

import numpy as np
import pytest
import torch
from helpers import SMALL, SmallNet, interrupted, small_data

from benchmarks import profiling
from paper_lib import runs
from paper_lib.data.augment import FlipCrop
from paper_lib.data.dataset import TensorDataset
from paper_lib.presets import study
from paper_lib.probing import derivatives, probe
from paper_lib.training import flat, loop

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICE = torch.device("cuda")
CONFIG = SMALL.replace(width=16, momentum=0.5, averages=("EMA 0.9",), batch_size=32, lr=0.05)
matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
USERS = {
    "none": [],
    "tf32": [(matmul, "fp32_precision", "tf32"), (cudnn.conv, "fp32_precision", "tf32")],
    "legacy tf32": [(matmul, "allow_tf32", True), (cudnn, "allow_tf32", True)],
    "fastest": [(cudnn, "benchmark", True), (cudnn, "deterministic", False)],
}


@contextlib.contextmanager
def chosen(settings):
    """With settings as a user may have made them."""
    before = [getattr(owner, name) for owner, name, _ in settings]
    try:
        for owner, name, value in settings:
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name, _), value in zip(settings, before, strict=True):
            setattr(owner, name, value)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPER_RUNS", str(tmp_path / "runs"))


@pytest.fixture(scope="module")
def images():
    """Three classes of 16 x 16 noise of different brightness, as bytes on the CPU, cropped and
    flipped.
    """
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 512)
    x = torch.from_numpy(
        (rng.integers(0, 128, (512, 3, 16, 16)) + 16 * y[:, None, None, None]).astype(np.uint8)
    )
    splits = (
        {"train": x, "test": x[:40]},
        {"train": torch.from_numpy(y), "test": torch.from_numpy(y[:40])},
    )
    dataset = TensorDataset(
        "noise", *splits, 3, mean=(0.3,) * 3, std=(0.15,) * 3, augment=FlipCrop(2)
    )
    return dataset.hold_out(32)


def assert_same_run(one, other):
    for name in ("weights", "buffers", "loss"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    end, other_end = one.state(), other.state()
    assert all(np.array_equal(end[name], other_end[name]) for name in end)


def test_batches_and_initial_weights_are_those_of_the_cpu_bit_for_bit(images):
    there = images.to(DEVICE)
    pairs = [
        [d.batch(step, 32, 1, split) for d in (there, images)]
        for step in (0, 20)
        for split in ("train", "held")
    ]
    pairs += zip(there.evaluation("test", 16), images.evaluation("test", 16), strict=True)
    for found, expected in pairs:
        assert found[0].device.type == DEVICE.type
        assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))
    nets = [loop.initial_model(CONFIG, dataset) for dataset in (there, images)]
    assert torch.equal(nets[0].weights.cpu(), nets[1].weights)


@pytest.mark.parametrize("case", ["dropout", "float32", "bfloat16"])
def test_an_interrupted_run_goes_on_to_the_same_bits(case, images, monkeypatch, tmp_path):
    if case == "dropout":
        config, dataset, model = (
            SMALL.replace(momentum=0.5),
            small_data().to(DEVICE),
            lambda: SmallNet(0.5),
        )
    else:
        config, dataset, model = CONFIG.replace(precision=case), images.to(DEVICE), None
    whole = runs.obtain(config, dataset, model)
    monkeypatch.setenv("PAPER_RUNS", str(tmp_path / "interrupted"))
    resumed = interrupted(
        lambda report: runs.obtain(config, dataset, model, report), monkeypatch, at=20, chunk=5
    )
    assert_same_run(whole, resumed)
    assert (
        whole.status["device"] == torch.cuda.get_device_name()
        and whole.loss[-5:].mean() < whole.loss[0]
    )


def every_probe(net, dataset, weights):
    """What each kind of probe finds, as arrays."""
    x, y = probe.fixed_batches(dataset, 4, 32, seed=0)
    direction = np.random.default_rng(1).standard_normal(len(weights)).astype(np.float32)
    buffers = probe.statistics(net, weights, x)
    return [
        buffers,
        probe.losses(net, weights, x, y),
        probe.losses(net, weights, x, y, buffers),
        derivatives.gradients(net, weights, x, y),
        derivatives.mean_gradient(net, weights, x, y, buffers),
        derivatives.hessian_vector_products(net, weights, direction, x, y),
        derivatives.mean_hessian_product(net, weights, direction, x, y),
        np.array(probe.evaluate(net, weights, buffers, dataset.evaluation("test", 16))),
    ]


def test_probes_find_what_they_find_on_the_cpu(images):
    there = images.to(DEVICE)
    net, on_cpu = loop.initial_model(CONFIG, there), loop.initial_model(CONFIG, images)
    weights = on_cpu.weights.numpy().copy()
    for found, exact in zip(
        every_probe(net, there, weights), every_probe(on_cpu, images, weights), strict=True
    ):
        assert np.linalg.norm(found - exact) < 1e-4 * np.linalg.norm(
            exact
        )  # TF32 would be off by 1e-3


@pytest.mark.parametrize("users", USERS)
def test_neither_probing_nor_settings_of_the_user_move_a_run_or_a_probe(
    users, images, monkeypatch, tmp_path
):
    monkeypatch.setattr(loop, "CHUNK", 10)
    there = images.to(DEVICE)
    net, run = loop.initial_model(CONFIG, there), runs.obtain(CONFIG, there)
    expected = every_probe(net, there, run.weights[-1])
    monkeypatch.setenv("PAPER_RUNS", str(tmp_path / "probed"))
    found = []
    with chosen(USERS[users]):
        probed = runs.obtain(
            CONFIG, there, report=lambda *_: found.append(every_probe(net, there, run.weights[-1]))
        )
    assert_same_run(probed, run)
    assert len(found) == 4 and all(
        np.array_equal(*pair) for one in found for pair in zip(one, expected, strict=True)
    )


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0), reason="needs TF32"
)
def test_tf32_would_be_seen(images):
    there = images.to(DEVICE)
    net, (x, _) = loop.initial_model(CONFIG, there), there.batch(0, 32, 0)
    with torch.no_grad(), chosen(USERS["tf32"]):
        rough = net.forward(x)
        with flat.exact_float32(DEVICE):
            assert not torch.equal(rough, net.forward(x))


def test_bfloat16_trains_within_the_spread_of_the_seeds(images):
    there, ends = images.to(DEVICE), []
    for precision in ("float32", "bfloat16"):
        config = CONFIG.replace(precision=precision, record="")
        ends.append(
            [
                run.loss[-10:].mean()
                for run in runs.train_seeds(config, (0, 1, 2, 3), there, progress=False)
            ]
        )
    exact, reduced = np.array(ends)
    assert not np.array_equal(exact, reduced)
    assert abs(exact.mean() - reduced.mean()) < exact.std(ddof=1)


def test_a_compiled_run_has_the_losses_of_an_eager_one():
    there, config = small_data().to(DEVICE), SMALL.replace(steps=20, record="20")
    eager, compiled = (
        runs.obtain(config.replace(compile=c), there, SmallNet) for c in (False, True)
    )
    np.testing.assert_allclose(compiled.loss, eager.loss, rtol=1e-3)


def test_runs_side_by_side_have_the_bits_of_one_alone(monkeypatch, tmp_path):
    config = study("smoke", steps=30, record="30").run
    together = runs.train_seeds(config, (0, 1, 2), progress=False)
    monkeypatch.setenv("PAPER_RUNS", str(tmp_path / "alone"))
    for run in together:
        assert run.status["device"] == torch.cuda.get_device_name()
        assert_same_run(runs.obtain(run.config), run)


def test_out_of_memory_names_the_settings_to_lower(images):
    there = images.to(DEVICE)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**27) / total)
    try:
        with pytest.raises(
            MemoryError, match="of width 64 with batches of 448 in float32 .*: lower `batch_size`"
        ):
            runs.obtain(CONFIG.replace(width=64, batch_size=448), there)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_profile_counts_the_kernels_of_a_step(images):
    found = profiling.profile_step(CONFIG, images.to(DEVICE), top=1000)
    assert (
        found.kernels > 50 and 0.5 < found.operators.share.sum() < 1.01
    )  # the rest: kernels that no operator names
