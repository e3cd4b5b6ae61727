"""Principal components of a trajectory, next to those of a random walk: cosines, whatever the loss is (claim C7)."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from paper_lib.averaging import vectors
from paper_lib.results import figures


def principal_components(X: np.ndarray, n: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Shares of variance (n,) and time courses (iterates, n), of unit norm, of a trajectory's principal components."""
    values, found = np.linalg.eigh(vectors.gram(X))
    return values[::-1][:n] / values.sum(), found[:, ::-1][:, :n]


def cosines(n_iterates: int, n: int = 3) -> np.ndarray:
    """The principal components of a random walk, (n_iterates, n): cosines of 1/2, 1, 3/2, ... periods, unit norm."""
    t = (np.arange(n_iterates) + 0.5) / n_iterates
    return np.cos(np.pi * np.arange(1, n + 1) * t[:, None]) * np.sqrt(2 / n_iterates)


def plot(ax: Axes, X: np.ndarray) -> pd.DataFrame:
    """Time courses of the first principal components of X (iterates, P), and the cosines that any wandering gives."""
    shares, found = principal_components(X)
    expected = cosines(len(found))
    expected *= np.sign((expected * found).sum(0))
    step = np.arange(len(found))
    for j, share in enumerate(shares):
        ax.plot(step, found[:, j], linewidth=1.5, label=f"component {j + 1}: {100 * share:.0f} %")
        figures.predicted(ax, step, expected[:, j], label="cosine" if j == 2 else None, linewidth=1.2)
    ax.set(xlabel="step in the window", ylabel="projection (unit norm)", ylim=np.array([-1.2, 4]) * expected.max())
    ax.legend(fontsize="small", loc="upper center", title="share of the variance", title_fontsize="small")
    return pd.DataFrame({"step": step, **{f"component{j + 1}": found[:, j] for j in range(len(shares))}})
