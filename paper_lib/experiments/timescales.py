"""Measure how fast a stationary run forgets along each steep direction, and how wide it is there.

The model predicts the rate 1 - lr h and the variance from curvature and noise (claims C7, C8).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from torch import Tensor

from paper_lib.averaging import vectors
from paper_lib.errors import require
from paper_lib.experiments.tables import tabulated
from paper_lib.probing import derivatives, hessian, probe
from paper_lib.runs import Run
from paper_lib.theory import quadratic
from paper_lib.theory.spectrum import Directions

FRESH = 4  # batches per iterate for the gradient noise there


@dataclass(frozen=True)
class Modes:
    """The steepest directions of one run at the average of its window, and what the model needs."""

    run: Run
    first: int  # step at which the window begins; it ends with the run
    directions: np.ndarray  # orthonormal, by curvature, (k, P)
    h: np.ndarray  # curvature on images that did not choose the directions, with weight decay, (k,)
    noise: np.ndarray  # variance of batch gradients at iterates, averaged over them, (k,)
    projected: np.ndarray  # iterates minus center along the directions, (n, k)

    @property
    def window(self) -> np.ndarray:
        """The iterates, (n, P)."""
        return self.run.window(self.first, self.run.config.steps)

    @property
    def stable(self) -> np.ndarray:
        """Directions with a stationary state, (k,) bool: 0 < lr h < 2 (1 + momentum)."""
        eta = self.run.config.lr * self.h
        return (eta > 0) & (eta < 2 * (1 + self.run.config.momentum))

    @property
    def spectrum(self) -> Directions:
        """The stable directions and the noise there."""
        return Directions(self.h[self.stable], self.noise[self.stable])


def modes(run: Run, n_directions: int = 12, n_batches: int = 16, settle: int = 0) -> Modes:
    """Find the steepest directions of a run's window, which begins `settle` steps after its start.

    The run recorded every iterate. Directions come from n_batches batches, curvature along them
    from as many others. ConfigError where the window would be empty.
    """
    c = run.config
    first, steps = c.start + settle, c.steps - c.start
    require(settle < steps, "settle", settle, f"the run has {steps} steps")
    net, X = run.network(), run.window(first, c.steps)
    center = vectors.center(X)
    x, y = probe.fixed_batches(run.dataset, 2 * n_batches, c.batch_size, c.seed)
    _, V = hessian.top_directions(net, center, x[:n_batches], y[:n_batches], n_directions)
    h = hessian.curvatures(net, center, V, x[n_batches:], y[n_batches:]) + c.weight_decay
    at = np.linspace(0, len(X) - 1, max(2, n_batches)).astype(int)
    each = [derivatives.each_gradient(net, X[i], *_fresh(run, j)) for j, i in enumerate(at)]
    noise = [np.var([V @ g for g in gradients], axis=0, ddof=1) for gradients in each]
    return Modes(run, first, V, h, np.mean(noise, 0), X @ V.T - center @ V.T)


def _fresh(run: Run, j: int) -> tuple[Tensor, Tensor]:
    """FRESH batches of a probing stream, others for every j."""
    stream = probe.PROBE_STREAM + run.config.seed
    numbers = range(1000 + j * FRESH, 1000 + (j + 1) * FRESH)
    return run.dataset.batches(numbers, run.config.batch_size, stream)


def curvatures_met(m: Modes, n_iterates: int = 3) -> np.ndarray:
    """Curvature along the directions at iterates, mean over them, with weight decay: (k,)."""
    net, X, c = m.run.network(), m.window, m.run.config
    at = np.linspace(0, len(X) - 1, n_iterates).astype(int)
    V = m.directions
    found = [hessian.curvatures(net, X[i], V, *_fresh(m.run, j)) for j, i in enumerate(at)]
    return np.mean(found, axis=0) + c.weight_decay


@tabulated
def measure(measured: Sequence[Modes], met: Sequence[np.ndarray]) -> Iterator[dict]:
    """The model's prediction and what the trajectory does, a row per run and stable direction.

    `met` are each run's curvatures at iterates. Columns seed, direction, curvature, curvature_met;
    rho (autocorrelation at lag 1), rho_model and rho_met, its predictions from these; v (variance,
    in squared weights), v_met, its prediction from the noise at iterates, and v_walk, that of a
    random walk of the same noise.
    """
    for m, h_met in zip(measured, met, strict=True):
        c, keep = m.run.config, m.stable
        inside = np.clip(c.lr * h_met[keep], 1e-9, 2 * (1 + c.momentum) - 1e-9)
        walk = (c.lr / (1 - c.momentum)) ** 2 * len(m.projected) / 6
        y = m.projected[:, keep]
        yield {
            "seed": c.seed,
            "direction": np.flatnonzero(keep),
            "curvature": m.h[keep],
            "curvature_met": h_met[keep],
            "rho_model": quadratic.autocorrelation(c.lr * m.h[keep], 2, c.momentum)[:, 1],
            "rho_met": quadratic.autocorrelation(inside, 2, c.momentum)[:, 1],
            "rho": autocorrelation(y, [1])[0],
            "v_met": m.spectrum.variances(c.lr, c.momentum),
            "v_walk": walk * m.noise[keep],
            "v": y.var(0),
        }


def autocorrelation(y: np.ndarray, lags: Sequence[int]) -> np.ndarray:
    """Autocorrelation of the columns of y (n, k) around their means, at each lag: (n_lags, k)."""
    n, z = len(y), y - y.mean(0)
    require(0 <= min(lags) and max(lags) < n, "lags", list(lags), f"they must lie in 0..{n - 1}")
    return np.stack([(z[: n - k] * z[k:]).mean(0) for k in lags]) / (z * z).mean(0)


@tabulated
def forgetting(m: Modes, chosen: Sequence[int], n_lags: int = 16) -> Iterator[dict]:
    """Autocorrelation functions along some of the stable directions, a row per direction and lag.

    Columns direction (its number among the stable ones), lag, rho, rho_model.
    """
    lags, eta = np.arange(n_lags), m.run.config.lr * m.h[m.stable]
    rho = autocorrelation(m.projected[:, m.stable], lags)
    model = quadratic.autocorrelation(eta, n_lags, m.run.config.momentum)
    for i in chosen:
        yield {"direction": i, "lag": lags, "rho": rho[:, i], "rho_model": model[i]}


def agreement(table: pd.DataFrame) -> pd.DataFrame:
    """How well prediction and measurement (`measure`) agree in one setting, one row per seed.

    Of the lag-1 autocorrelations: bias (measured - predicted) and rms of the difference with the
    curvature at the average; bias_met, rms_met with that at iterates; matched, rms_met over the
    same with directions paired at random (its root mean square), and reversed, with the steepest
    paired with the least steep. v_met_ratio, v_walk_ratio: geometric means over directions of
    measured / predicted variance.
    """
    rows = {}
    for seed, t in table.groupby("seed"):
        off, off_met = t.rho - t.rho_model, t.rho - t.rho_met
        rms = np.sqrt(np.mean(off_met**2))
        paired = np.sqrt(np.mean(np.subtract.outer(t.rho.to_numpy(), t.rho_met.to_numpy()) ** 2))
        turned = np.sort(t.rho_met)[::-1][np.argsort(np.argsort(t.rho_met))]
        rows[seed] = {
            "bias": off.mean(),
            "rms": np.sqrt(np.mean(off**2)),
            "bias_met": off_met.mean(),
            "rms_met": rms,
            "matched": rms / paired,
            "reversed": np.sqrt(np.mean((t.rho - turned) ** 2)) / paired,
            **{f"{v}_ratio": np.exp(np.log(t.v / t[v]).mean()) for v in ("v_met", "v_walk")},
        }
    return pd.DataFrame(rows).T


def two_point_fall(
    m: Modes, lags: Sequence[int], n_batches: int = 8, n_pairs: int = 6
) -> pd.DataFrame:
    """Fall of the training loss from an iterate to its average with an earlier one, a row per lag.

    Columns seed, lag, and in nats, means over n_pairs pairs: `full`, of the average itself;
    `steep`, when only the components along the measured directions are averaged; `random`, the same
    along as many random ones; `model`, predicted for steep: sum h v (1 - rho_lag) / 4. ConfigError
    for lags that the window does not hold.
    """
    c, X, V = m.run.config, m.window, m.directions[m.stable]
    allowed = f"they must lie in 1..{len(X) - 1}"
    require(0 < min(lags) and max(lags) < len(X), "lags", list(lags), allowed)
    ends = np.linspace(max(lags), len(X) - 1, n_pairs).astype(int)
    net, rng = m.run.network(), np.random.default_rng(c.seed)
    other = np.linalg.qr(rng.standard_normal(V.shape).T)[0].T.astype(np.float32)
    batches = probe.fixed_batches(m.run.dataset, n_batches, c.batch_size, c.seed)
    single = probe.losses(net, X[ends], *batches).mean()
    rows = []
    for lag in lags:
        back = (X[ends - lag] - X[ends]) / 2
        moves = {"full": back, "steep": back @ V.T @ V, "random": back @ other.T @ other}
        after = {name: probe.losses(net, X[ends] + d, *batches).mean() for name, d in moves.items()}
        rows.append({"seed": c.seed, "lag": lag, **{name: single - after[name] for name in after}})
    averages = [vectors.two_point(lag + 1, lag) for lag in lags]
    left = np.array([m.spectrum.averaged_loss(a, c.lr, c.momentum) for a in averages])
    return pd.DataFrame(rows).assign(model=m.spectrum.excess(c.lr, c.momentum).sum() - left)
