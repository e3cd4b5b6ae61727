"""Training: the same steps as torch's SGD, branches, divergence, and the same bits after any
interruption.
"""

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import SMALL, SmallNet, small_data

from paper_lib import runs
from paper_lib.averaging import schedules
from paper_lib.runs import DivergedError, SnapshotError
from paper_lib.training.flat import FlatModel


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPER_RUNS", str(tmp_path / "runs"))


def obtain(config, model=SmallNet):
    return runs.obtain(config, small_data(), model)


def reference(config, model=SmallNet):
    """The run as anybody would write it: a module, torch.optim.SGD, one batch after the other."""
    dataset = small_data()
    torch.manual_seed(config.seed)
    net = model()
    optimizer = torch.optim.SGD(
        net.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay
    )
    losses = []
    for step, factor in enumerate(schedules.factors(config.schedule, config.steps)):
        optimizer.param_groups[0]["lr"] = config.lr * factor
        x, y = dataset.batch(step, config.batch_size, config.stream)
        loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return net, np.array(losses)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"momentum": 0.9, "weight_decay": 0.01, "lr": 0.02},
        {"schedule": "cosine", "seed": 3},
        {"schedule": "linear", "batch_seed": 7, "weight_decay": 0.0},
    ],
)
def test_training_takes_the_steps_that_torch_takes(changes):
    config = SMALL.replace(**changes)
    run, (net, losses) = obtain(config), reference(config)
    np.testing.assert_allclose(run.loss, losses, rtol=2e-4)
    expected = models_vector(net)
    np.testing.assert_allclose(run.at(40), expected, rtol=1e-3, atol=1e-5)
    statistics = torch.cat([net.features[1].running_mean, net.features[1].running_var])
    np.testing.assert_allclose(run.buffers[-1], statistics, rtol=1e-3, atol=1e-5)


def models_vector(net):
    return FlatModel(net).weights.numpy()


def test_the_record_is_what_was_asked_for():
    run = obtain(SMALL.replace(record="0-3,10-40/15", schedule="linear"))
    np.testing.assert_array_equal(run.steps, [0, 1, 2, 3, 10, 25, 40])
    every = obtain(SMALL.replace(schedule="linear"))
    np.testing.assert_array_equal(run.weights, every.weights[run.steps])
    np.testing.assert_allclose(run.lr, 0.1 * (1 - np.arange(40) / 40))
    assert run.loss.shape == (40,) and run.status["parameters"] == run.weights.shape[1]
    torch.manual_seed(0)
    np.testing.assert_array_equal(run.weights[0], models_vector(SmallNet()))


def test_missing_snapshots_say_which_exist_and_how_to_record_them():
    run = obtain(SMALL.replace(record="0-3,10-40/15"))
    with pytest.raises(
        SnapshotError, match=r"no snapshot of step 5; it has 0-3,10-40/15. Record it .* '5-5'"
    ):
        run.rows(5)
    with pytest.raises(SnapshotError, match=r"no snapshot of step 4-9"):
        run.window(3, 10)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_branch_without_changes_goes_on_with_the_same_bits(momentum):
    whole = obtain(SMALL.replace(momentum=momentum, checkpoints=(15,)))
    middle = obtain(whole.config.branch(25, at=15, record="15-40"))
    np.testing.assert_array_equal(middle.weights, whole.weights[15:])
    np.testing.assert_array_equal(middle.buffers, whole.buffers[15:])
    np.testing.assert_array_equal(middle.loss, whole.loss[15:])
    other = obtain(whole.config.branch(25, at=15, batch_seed=5))
    assert not np.array_equal(other.at(40), whole.at(40))


def test_with_momentum_a_branch_needs_the_momentum():
    whole = obtain(SMALL.replace(momentum=0.9))
    with pytest.raises(SnapshotError, match="no momentum was kept at step 15 .* `checkpoints`"):
        obtain(whole.config.branch(5, at=15))


def test_a_perturbed_start_lies_at_the_stated_distance():
    clean = obtain(SMALL.branch(10, record="40"))
    moved = obtain(SMALL.branch(10, record="40", perturbation=1e-2))
    distance = np.linalg.norm(moved.at(40) - clean.at(40))
    assert distance == pytest.approx(1e-2 * np.linalg.norm(clean.at(40)), rel=1e-4)


def test_dropout_is_a_function_of_the_step():
    def model():
        return SmallNet(dropout=0.5)

    whole = obtain(SMALL, model)
    assert np.array_equal(obtain(SMALL.branch(10, at=30), model).at(40), whole.at(40))


def test_a_diverged_run_keeps_what_it_had_and_says_so():
    config = SMALL.replace(lr=1e30, weight_decay=0.1)
    with pytest.warns(UserWarning, match=r"lr = 1e\+30\) diverged at step \d+"):
        (run,) = runs.train_seeds(config, [0], small_data(), SmallNet, progress=False)
    end = run.status["diverged_at"]
    assert run.diverged and len(run.loss) == end + 1
    assert np.isfinite(run.loss[:end]).all() and not np.isfinite(run.loss[end])
    np.testing.assert_array_equal(run.steps, np.arange(end + 1))
    with pytest.raises(DivergedError, match=r"diverged at step \d+ with lr = 1e\+30: lower"):
        obtain(config.branch(5))
    with pytest.raises(DivergedError, match=r"diverged at step"):
        run.window(0, 40)


def test_training_leaves_the_random_state_and_thread_count_alone():
    torch.manual_seed(5)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    obtain(SMALL.replace(threads=threads + 1))
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads


KILLED = textwrap.dedent(
    """
    import os, signal
    from helpers import SMALL, SmallNet, small_data
    from paper_lib import runs
    from paper_lib.training import loop
    loop.CHUNK, loop.RESUME_EVERY_S, loop.RESUME_SHARE = 5, 0.0, float("inf")
    def report(steps, loss, lr, seen=[0]):
        seen[0] += steps
        if seen[0] > 20:
            os.kill(os.getpid(), signal.SIGKILL)
    runs.obtain(SMALL.replace(momentum=0.5), small_data(), SmallNet, report)
    """
)


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    config = SMALL.replace(momentum=0.5)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", KILLED], env=environment, check=False)
    assert killed.returncode == -9
    folder = runs.run_folder(config, small_data(), SmallNet)
    assert not folder.exists() and folder.with_name(folder.name + ".part").exists()
    steps_done = []
    resumed = runs.obtain(
        config, small_data(), SmallNet, lambda steps, loss, lr: steps_done.append(steps)
    )
    assert steps_done[0] == 20 and sum(steps_done) == 40  # it did not start again
    monkeypatch.setenv("PAPER_RUNS", str(tmp_path / "uninterrupted"))
    whole = obtain(config)
    for name in ("weights", "buffers", "loss", "lr", "steps"):
        np.testing.assert_array_equal(getattr(resumed, name), getattr(whole, name))
    assert not list(folder.parent.glob("*.part"))
