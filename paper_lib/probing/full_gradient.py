"""The held-out batches that belong to a step, and the full gradient there that they estimate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor
from tqdm import tqdm

from paper_lib import runs
from paper_lib.config import RunConfig
from paper_lib.data import Dataset
from paper_lib.probing import derivatives
from paper_lib.runs import Run
from paper_lib.training.flat import NetFactory


def held_batches(dataset: Dataset, config: RunConfig, t: int, n: int, size: int | None = None) -> tuple[Tensor, Tensor]:
    """n held-out batches for step t of a run, (n, B, ...) and (n, B), that no other step shares.

    B is `size`, by default the run's batch size.
    """
    return dataset.batches(range(t * n, (t + 1) * n), size or config.batch_size, config.stream, "held")


def full_gradients(
    run: Run, dataset: Dataset, steps: Sequence[int], n_batches: int, model: NetFactory | None = None
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield t, x_t (P,) and G_t (P,) for every t in `steps`; SnapshotError where the run did not keep x_t.

    G_t is the mean gradient of the step's n_batches held-out batches, with weight decay: an unbiased estimate of the
    expected gradient of a batch, independent of what the run saw.
    """
    net, c = runs.network(run, dataset, model), run.config
    for t in tqdm(steps, desc=f"full gradients, lr {c.lr:g}"):
        x = np.array(run.at(t))
        yield t, x, derivatives.mean_gradient(net, x, *held_batches(dataset, c, t, n_batches)) + c.weight_decay * x
