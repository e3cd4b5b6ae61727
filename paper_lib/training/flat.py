"""Any module as one weight vector, and the settings of torch under which its numbers are exact."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel

from paper_lib.data.loss import CROSS_ENTROPY, Loss
from paper_lib.errors import ConfigError, brief, require

NetFactory = Callable[[], nn.Module]  # a user's function or class that makes a network


def forked_rng(device: torch.device) -> contextlib.AbstractContextManager:
    """Give back the random states of the CPU and of this device afterwards; touch no other GPU."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


@contextlib.contextmanager
def exact_float32(device: torch.device, recurrent: bool = False) -> Iterator[None]:
    """On a GPU: IEEE float32, never TF32, and convolutions by repeatable algorithms.

    `recurrent`: without cuDNN, which differentiates recurrent layers in training mode alone.
    """
    cudnn: Any = torch.backends.cudnn
    wanted: list[tuple[Any, str, Any]] = [
        (cudnn.conv, "fp32_precision", "ieee"),
        (torch.backends.cuda.matmul, "fp32_precision", "ieee"),
        (cudnn, "benchmark", False),
        (cudnn, "deterministic", True),
    ]
    if recurrent:
        wanted.append((cudnn, "enabled", False))
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
    running statistics.  loss: what a batch is judged by. Raises ConfigError for a module that
    cannot be trained and probed so: lazy, compiled, scripted or wrapped, in another precision than
    float32, without trainable parameters, or a BatchNorm with momentum=None.
    """

    def __init__(
        self, module: nn.Module, device: torch.device | str = "cpu", loss: Loss = CROSS_ENTROPY
    ):
        _check(module)
        for sub in module.modules():
            if isinstance(sub, _NormBase):
                sub.num_batches_tracked = None  # an integer that only matters without a momentum
        self.module, self.loss = module.to(device), loss
        self.separable: dict[tuple, bool] = {}  # what probing has found out about it
        self.device = torch.device(device)
        self.parameters = params = [p for p in module.parameters() if p.requires_grad]
        floats = [b for b in module.buffers() if b.is_floating_point()]
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

    def forward(self, x: Any) -> Any:
        """Return the output for a batch x (B, ...), in channels_last layout if images.

        Several inputs, a TensorDict, go to the module by name, or in order if they have none.
        ConfigError where BatchNorm is left a single value to normalize. Any other error is the
        network's own, and notes which batch it was given.
        """
        is_image = isinstance(x, Tensor) and x.ndim == 4
        given = x.contiguous(memory_format=torch.channels_last) if is_image else x
        try:
            return self._call(given)
        except Exception as error:
            note = f"the network, on {self.device}, was given {_describe(x)} on {x.device}"
            if "more than 1 value per channel" in str(error):
                advice = "BatchNorm cannot normalize a single value; take larger batches"
                raise ConfigError(f"{note}: {advice}") from error
            error.add_note(note)
            raise

    def _call(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            return self.module(x)
        named = dict(x.items())
        in_order = all(name.isdigit() for name in named)
        return self.module(*named.values()) if in_order else self.module(**named)

    def backward(self, loss: Tensor) -> None:
        """Replace `grad` by the gradient of `loss`."""
        self.grad.zero_()
        loss.backward()

    def hessian_product(self, loss: Tensor, direction: Tensor) -> Tensor:
        """Return the Hessian of `loss` times a direction, (P,); `grad` is left alone.

        ConfigError where a part of the network cannot be differentiated twice.
        """
        parts, saved = _views(direction.to(self.device), self.parameters), self.grad.clone()
        try:
            slopes = torch.autograd.grad(
                loss, self.parameters, create_graph=True, materialize_grads=True
            )
            # Through all of the graph: `grad` passes by what is differentiable once, with zeros.
            self.backward(sum((g * d).sum() for g, d in zip(slopes, parts, strict=True)))
            return self.grad.clone()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ConfigError(f"the network has no second derivative: {brief(error)}") from error
        finally:
            self.grad.copy_(saved)

    @contextlib.contextmanager
    def preserved(self, train: bool) -> Iterator[FlatModel]:
        """Evaluate in train or eval mode at any weights; whatever that changes comes back."""
        modes = {sub: sub.training for sub in self.module.modules()}
        vectors = self.weights, self.grad, self.buffers, self.integers
        saved = [v.clone() for v in vectors]
        recurrent = any(isinstance(sub, nn.RNNBase) for sub in modes)
        try:
            with forked_rng(self.device), exact_float32(self.device, recurrent):
                self.module.train(train)
                yield self
        finally:
            for vector, value in zip(vectors, saved, strict=True):
                vector.copy_(value)
            for sub, mode in modes.items():
                sub.training = mode


def _describe(value: Any) -> str:
    plain = isinstance(value, Tensor)
    return f"{tuple(value.shape)} of {value.dtype}" if plain else type(value).__name__


_WRAPPED = nn.DataParallel, DistributedDataParallel, torch.jit.ScriptModule, nn.SyncBatchNorm


def _check(module: nn.Module) -> None:
    """Raise ConfigError, with a name and what to do, for what `FlatModel` cannot take."""
    kind = type(module).__name__
    require(isinstance(module, nn.Module), "network", kind, "it must be a torch.nn.Module")
    for name, sub in module.named_modules():
        what = f"the layer {name!r}, a {type(sub).__name__},"
        wrapped = isinstance(sub, _WRAPPED) or "_orig_mod" in sub._modules
        advice = "give it plain; the setting compile, and torchrun, do the work of wrappers"
        require(not (wrapped or sub._compiled_call_impl), what, "a wrapper", advice)
        if isinstance(sub, _NormBase):
            advice = "give it one, such as torch's default 0.1"
            require(sub.momentum is not None, f"momentum of {what}", None, advice)
    trained = any(p.requires_grad for p in module.parameters())
    require(trained, "module", kind, "it needs at least one trainable parameter")
    for name, t in (*module.named_parameters(), *module.named_buffers()):
        empty = nn.parameter.is_lazy(t) or t.is_meta
        dense = not empty and t.layout == torch.strided and not t.is_quantized
        free = not (t.requires_grad or t.is_floating_point())  # to be of any other type
        fits = dense and (free or t.dtype == torch.float32)
        advice = "make it dense float32: call .float(), and put a batch through lazy layers"
        require(fits, f"tensor {name!r}", "no values yet" if empty else t.dtype, advice)
    memory = [p.data_ptr() for p in module.parameters() if p.numel()]
    advice = "parameters share memory: make them one, as in a.weight = b.weight"
    require(len(set(memory)) == len(memory), "module", kind, advice)


def _flatten(tensors: list[Tensor]) -> Tensor:
    """Concatenate copies of tensors into one float32 vector, 4-D ones in channels_last order."""
    if not tensors:
        return torch.zeros(0)
    dense = [t.detach().to_dense() for t in tensors]  # an embedding's gradient may be sparse
    parts = [(t.permute(0, 2, 3, 1) if t.ndim == 4 else t).float().reshape(-1) for t in dense]
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
