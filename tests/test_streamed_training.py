"""ImageNet's path on a small tree of images: streamed, resumed amid an epoch, shared by two."""

import functools
import textwrap

import numpy as np
import pytest
from helpers import interrupted, torchrun
from test_images import write_tree

from paper_lib import data, runs
from paper_lib.config import RunConfig
from paper_lib.runs import Run

# 30 training images of 36, 6 to a batch: an epoch is 5 steps.
SETTINGS = {"held_out": 6, "image_size": 32}
NETWORK = {"model": "resnet8", "width": 4, "lr": 0.005}
CONFIG = RunConfig(data="imagefolder", batch_size=6, steps=13, record="0-13", **SETTINGS, **NETWORK)


def load(root):
    return data.load("imagefolder", root, progress=False, streaming=True, **SETTINGS)


@pytest.fixture
def tree(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPER_RUNS", str(tmp_path / "runs"))
    return write_tree(tmp_path / "tree")


def test_a_run_stopped_amid_an_epoch_goes_on_to_the_same_bits(tree, tmp_path, monkeypatch):
    whole = runs.obtain(CONFIG, load(tree))
    monkeypatch.setenv("PAPER_RUNS", str(tmp_path / "interrupted"))
    # Saved at step 6, in the second epoch.
    obtain = functools.partial(runs.obtain, CONFIG, load(tree))
    resumed = interrupted(lambda report: obtain(report=report), monkeypatch, 8, chunk=2)
    for name in ("weights", "buffers", "loss"):
        np.testing.assert_array_equal(getattr(resumed, name), getattr(whole, name))


def test_two_processes_stream_the_global_batches_of_one(tree, tmp_path, monkeypatch):
    alone = runs.obtain(CONFIG, load(tree))
    job = """
        import sys
        from paper_lib import runs
        from paper_lib.training import distributed
        from test_streamed_training import CONFIG, load
        with distributed.processes():
            runs.obtain(CONFIG, load(sys.argv[1]))
    """
    (tmp_path / "job.py").write_text(textwrap.dedent(job))
    monkeypatch.setenv("PAPER_RUNS", str(tmp_path / "two"))
    done = torchrun(str(tmp_path / "job.py"), str(tree))
    assert done.returncode == 0, done.stderr
    together = Run(tmp_path / "two" / alone.folder.name, alone.dataset)
    for name in ("weights", "buffers", "loss"):
        expected = getattr(alone, name)
        np.testing.assert_allclose(getattr(together, name), expected, rtol=1e-3, atol=1e-4)
    moved = np.linalg.norm(alone.at(13) - alone.at(0))
    assert np.linalg.norm(together.at(13) - alone.at(13)) < 1e-2 * moved
