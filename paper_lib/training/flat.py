"""Any module as one weight vector, and the settings of torch under which its numbers are exact."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from paper_lib.errors import require

NetFactory = Callable[[], nn.Module]  # a user's function or class that makes a network


def forked_rng(device: torch.device) -> contextlib.AbstractContextManager:
    """Give back the random states of the CPU and of this device afterwards; touch no other GPU."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


@contextlib.contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """On a GPU: IEEE float32, never TF32, and convolutions by repeatable algorithms."""
    cudnn: Any = torch.backends.cudnn
    wanted: list[tuple[Any, str, Any]] = [
        (cudnn.conv, "fp32_precision", "ieee"),
        (torch.backends.cuda.matmul, "fp32_precision", "ieee"),
        (cudnn, "benchmark", False),
        (cudnn, "deterministic", True),
    ]
    if device.type != "cuda":  # threads that probe side by side must not touch global flags
        wanted = []
    before = [getattr(owner, name) for owner, name, _ in wanted]
    try:
        for owner, name, value in wanted:
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name, _), value in zip(wanted, before, strict=True):
            setattr(owner, name, value)


@contextlib.contextmanager
def threads(n: int) -> Iterator[None]:
    """With n threads for torch's operators on the CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class FlatModel:
    """A module whose parameters, gradients and buffers are views into four vectors.

    SGD, averaging and interpolation are then single vector operations, and a snapshot is one copy.
    Convolution weights are stored in channels_last order whatever the device, so that vectors mean
    the same everywhere.

    integers: (R,) uint8, the bytes of all buffers that are not floating-point, e.g. counts.
    weights: (P,) float32.  grad: (P,), filled by `backward`.  buffers: (Q,), e.g. BatchNorm's
    running statistics. Raises ConfigError for a module without trainable parameters, or a BatchNorm
    with momentum=None.
    """

    def __init__(self, module: nn.Module, device: torch.device | str = "cpu"):
        for name, sub in module.named_modules():
            if isinstance(sub, nn.modules.batchnorm._NormBase):
                what = f"momentum of the layer {name!r}, a {type(sub).__name__},"
                require(
                    sub.momentum is not None, what, None, "give it one, such as torch's default 0.1"
                )
                sub.num_batches_tracked = None  # an integer that only matters without a momentum
        self.module = module.to(device)
        self.device = torch.device(device)
        self.parameters = params = [p for p in module.parameters() if p.requires_grad]
        floats = [b for b in module.buffers() if b.is_floating_point()]
        require(
            bool(params),
            "module",
            type(module).__name__,
            "it needs at least one trainable parameter",
        )
        self.weights, self.grad, self.buffers = _flatten(params), _flatten(params), _flatten(floats)
        self.grad.zero_()
        for p, value, grad in zip(
            params, _views(self.weights, params), _views(self.grad, params), strict=True
        ):
            p.data, p.grad = value, grad
        for b, value in zip(floats, _views(self.buffers, floats), strict=True):
            b.data = value
        self.integers = _pack([b for b in module.buffers() if not b.is_floating_point()])
        self._tensors = [*module.buffers()]

    def require_in_place(self) -> None:
        """ConfigError where the module has replaced a buffer, which then is no view any more."""
        pairs = zip_longest(self._tensors, self.module.named_buffers(), fillvalue=("(gone)", None))
        replaced = [name for before, (name, now) in pairs if now is not before]
        advice = (
            "write into it, as in self.x.copy_(...) or self.x += 1, and register it in __init__"
        )
        require(not replaced, "buffers replaced by forward", replaced, advice)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch x (B, ...), in channels_last layout where x is an image."""
        return self.module(x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x)

    def backward(self, loss: Tensor) -> None:
        """Replace `grad` by the gradient of `loss`."""
        self.grad.zero_()
        loss.backward()

    def hessian_product(self, loss: Tensor, direction: Tensor) -> Tensor:
        """Return the Hessian of `loss` times a direction, (P,); `grad` is left alone."""
        gradients = torch.autograd.grad(loss, self.parameters, create_graph=True)
        parts = _views(direction.to(self.device), self.parameters)
        slope = sum((g * d).sum() for g, d in zip(gradients, parts, strict=True))
        return _flatten(list(torch.autograd.grad(slope, self.parameters)))

    @contextlib.contextmanager
    def preserved(self, train: bool) -> Iterator[FlatModel]:
        """Evaluate in train or eval mode at any weights; whatever that changes comes back."""
        modes = {sub: sub.training for sub in self.module.modules()}
        vectors = self.weights, self.grad, self.buffers, self.integers
        saved = [v.clone() for v in vectors]
        try:
            with forked_rng(self.device), exact_float32(self.device):
                self.module.train(train)
                yield self
        finally:
            for vector, value in zip(vectors, saved, strict=True):
                vector.copy_(value)
            for sub, mode in modes.items():
                sub.training = mode


def _flatten(tensors: list[Tensor]) -> Tensor:
    """Concatenate copies of tensors into one float32 vector, 4-D ones in channels_last order."""
    if not tensors:
        return torch.zeros(0)
    parts = [
        (t.permute(0, 2, 3, 1) if t.ndim == 4 else t).detach().float().reshape(-1) for t in tensors
    ]
    return torch.cat(parts).clone()


def _pack(tensors: list[Tensor]) -> Tensor:
    """Move the bytes of tensors into one vector (R,) uint8, into which they become views."""
    if not tensors:
        return torch.zeros(0, dtype=torch.uint8)
    tensors = sorted(tensors, key=lambda t: -t.itemsize)  # each begins at a multiple of its size
    vector = torch.cat([t.reshape(-1).view(torch.uint8) for t in tensors])
    for part, t in zip(vector.split([t.nbytes for t in tensors]), tensors, strict=True):
        t.data = part.view(t.dtype).view(t.shape)
    return vector


def _views(vector: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Cut a vector into views with the shapes of `like` (inverse of `_flatten`)."""
    views = []
    for part, t in zip(vector.split([t.numel() for t in like]), like, strict=True):
        if t.ndim == 4:
            n, c, h, w = t.shape
            views.append(part.view(n, h, w, c).permute(0, 3, 1, 2))
        else:
            views.append(part.view(t.shape))
    return views
