"""Training and test loss and accuracy of any weights, averaged or not, all treated alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pandas as pd
from tqdm import tqdm

from paper_lib.data import Dataset
from paper_lib.probing import probe
from paper_lib.probing.probe import Array, Buffers
from paper_lib.runs import Run
from paper_lib.training.flat import FlatModel

CHUNK = 500  # images per forward pass, and per BatchNorm estimate


class Evaluator:
    """Evaluates weight vectors of one network on fixed images.

    BatchNorm statistics are recomputed at the given weights from CHUNK training images, for
    averages and for the iterates that they are compared with alike; then the loss is taken in
    evaluation mode, on n_images training images (augmented as in training, from a stream
    that no run uses) and up to n_images test images.
    """

    def __init__(self, net: FlatModel, dataset: Dataset, n_images: int = 2500, seed: int = 0):
        size = min(CHUNK, n_images, dataset.sizes["train"])
        n_train, n_stat = max(1, n_images // size), CHUNK // size
        x, y = probe.fixed_batches(dataset, n_train + n_stat, size, seed)
        self.net = net
        self.statistics_batches = x[:n_stat]
        self.train = x[n_stat:], y[n_stat:]
        self.test = list(dataset.evaluation("test", CHUNK, limit=n_images))

    def __call__(self, weights: Array, buffers: Buffers = None) -> dict[str, float]:
        """train_loss, train_accuracy, test_loss, test_accuracy at weights (P,).

        Given `buffers` (Q,), they are used as they are instead of recomputed ones.
        """
        if buffers is None:
            buffers = probe.statistics(self.net, weights, self.statistics_batches)
        found: dict[str, float] = {}
        for split, chunks in ("train", zip(*self.train, strict=True)), ("test", self.test):
            loss, accuracy = probe.evaluate(self.net, weights, buffers, chunks)
            found |= {f"{split}_loss": loss}
            found |= {f"{split}_accuracy": accuracy} if self.net.loss.counts else {}
        return found

    def table(
        self, rows: Iterable[Array], labels: pd.DataFrame, progress: str = ""
    ) -> pd.DataFrame:
        """The labels, one row per weight vector of rows (n, P), with what is found beside them."""
        bar = tqdm(rows, total=len(labels), desc=progress, disable=not progress)
        found = pd.DataFrame([self(row) for row in bar])
        return pd.concat([labels.reset_index(drop=True), found], axis=1)


def evaluators(runs: Sequence[Run], n_images: int = 2500) -> dict[int, Evaluator]:
    """One evaluator per seed, each on its own images."""
    return {
        run.config.seed: Evaluator(run.network(), run.dataset, n_images, seed=run.config.seed)
        for run in runs
    }
