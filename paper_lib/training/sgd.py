"""The parts of a training step: initial weights, state, the batch's loss, SGD as torch takes it, and its schedule."""

from __future__ import annotations

import contextlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from paper_lib.averaging import schedules
from paper_lib.config import RunConfig
from paper_lib.data import Dataset
from paper_lib.runs.trajectory import State
from paper_lib.training import models, parallel
from paper_lib.training.models import FlatModel, ModelFactory, forked_rng


def initial_model(config: RunConfig, dataset: Dataset, factory: ModelFactory | None = None) -> FlatModel:
    """Return the network with its initial weights, which are a function of config.seed alone."""
    with forked_rng(dataset.device):
        torch.manual_seed(config.seed)
        if factory is None:
            module = models.build(config.model, dataset.shape[0], dataset.n_classes, config.width, config.norm)
        else:
            module = factory()
    return FlatModel(module, dataset.device)


def set_state(net: FlatModel, state: State) -> Tensor:
    """Put weights and buffers into the network; return the momentum vector, (P,), zero if the state has none."""
    net.weights.copy_(torch.from_numpy(np.array(state["weights"])))
    net.buffers.copy_(torch.from_numpy(np.array(state["buffers"])))
    if state["momentum"].size == 0:
        return torch.zeros_like(net.weights)
    return torch.from_numpy(state["momentum"]).to(net.device)


def get_state(net: FlatModel, momentum: Tensor | None) -> State:
    """Inverse of `set_state`, as NumPy copies; without momentum its vector is empty."""
    momentum = net.weights[:0] if momentum is None else momentum
    vectors = {"weights": net.weights, "buffers": net.buffers, "momentum": momentum}
    return {name: vector.cpu().numpy().copy() for name, vector in vectors.items()}


def perturbation(config: RunConfig, weights: Tensor) -> Tensor:
    """A Gaussian direction of norm config.perturbation * |weights|, (P,), a function of config.seed."""
    generator = torch.Generator().manual_seed(config.seed)
    direction = torch.randn(weights.numel(), generator=generator).to(weights.device)
    return direction * (config.perturbation * weights.norm() / direction.norm())


def learning_rates(config: RunConfig) -> np.ndarray:
    """Learning rate of each step of the run, (steps - start,)."""
    n_steps = config.steps - config.start
    named = isinstance(config.schedule, str)
    factors = schedules.factors(config.schedule, n_steps) if named else np.array(config.schedule)
    return config.lr * factors


def sgd_step(net: FlatModel, velocity: Tensor, lr: float, config: RunConfig) -> None:
    """One step as torch.optim.SGD takes it: v <- m v + g + wd x, x <- x - lr v, on whole vectors."""
    update = net.grad
    if config.weight_decay:
        update.add_(net.weights, alpha=config.weight_decay)
    if config.momentum:
        update = velocity.mul_(config.momentum).add_(update)
    net.weights.add_(update, alpha=-lr)


def batch_loss(net: FlatModel, x: Tensor, y: Tensor, config: RunConfig) -> Tensor:
    """Mean cross-entropy of a batch under the run's precision and label smoothing, a scalar."""
    reduced = config.precision == "bfloat16"
    autocast = torch.autocast(net.device.type, torch.bfloat16) if reduced else contextlib.nullcontext()
    with autocast:
        logits = net.forward(x)
    return F.cross_entropy(logits.float(), y, label_smoothing=config.label_smoothing)


def seed_step(device: torch.device, step: int, config: RunConfig) -> None:
    """Make dropout a function of (stream, step), and of the process: each draws for its own part of the batch.

    It seeds one device, because torch.manual_seed costs a tenth of a small network's step.
    """
    generator = torch.default_generator
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generator = torch.cuda.default_generators[index]
    generator.manual_seed((step * 1_000_003 + config.stream) * parallel.world() + parallel.rank())
