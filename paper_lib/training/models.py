"""Networks: residual networks of the CIFAR and ImageNet families, and `FlatModel`, any module as one weight vector."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paper_lib.validate import require


def normalization(norm: str, channels: int) -> nn.Module:
    """Return BatchNorm, GroupNorm (groups of at least 4 channels, at most 8 groups), or nothing."""
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "group":
        groups = max(g for g in range(1, 9) if channels % g == 0 and channels // g >= min(4, channels))
        return nn.GroupNorm(groups, channels)
    return nn.Identity()


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, projected where the shape changes (He et al. 2016)."""

    def __init__(self, c_in: int, c_out: int, stride: int, norm: str):
        super().__init__()
        bias = norm == "none"
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=bias)
        self.norm1 = normalization(norm, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=bias)
        self.norm2 = normalization(norm, c_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or c_in != c_out:
            projection = nn.Conv2d(c_in, c_out, 1, stride, bias=bias)
            self.shortcut = nn.Sequential(projection, normalization(norm, c_out))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        h = self.norm2(self.conv2(h))
        return F.relu(h + self.shortcut(x))


class ResNet(nn.Module):
    """A residual network with a 3x3 stem for small images; stage i has width * 2**i channels.

    Input (B, in_channels, H, W), output (B, n_classes). Without normalization each block starts as the identity
    (its second convolution at zero), without which training at useful learning rates diverges.
    """

    def __init__(self, blocks: tuple[int, ...], width: int, norm: str, in_channels: int, n_classes: int):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, 1, 1, bias=norm == "none"), normalization(norm, width), nn.ReLU()
        )
        layers, channels = [], width
        for stage, n_blocks in enumerate(blocks):
            for i in range(n_blocks):
                out = width * 2**stage
                layers.append(BasicBlock(channels, out, 2 if stage > 0 and i == 0 else 1, norm))
                channels = out
        self.blocks = nn.Sequential(*layers)
        self.head = nn.Linear(channels, n_classes)
        self._initialize(norm)

    def _initialize(self, norm: str) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if isinstance(module, BasicBlock) and norm == "none":
                nn.init.zeros_(module.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


TORCHVISION_MODELS = ("resnet18", "resnet34", "resnet50")


class Shift(nn.Module):
    """A bias per channel: what remains of a normalization layer without the normalization."""

    def __init__(self, channels: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias.view(-1, 1, 1)


def _torchvision(name: str, n_classes: int, norm: str) -> nn.Module:
    """One of torchvision's networks; without normalization each block starts as the identity, as in `ResNet`."""
    import torchvision  # slow to import, and only these networks need it

    layer = {"batch": None, "none": Shift}.get(norm, lambda channels: normalization(norm, channels))
    net = getattr(torchvision.models, name)(num_classes=n_classes, norm_layer=layer)
    if norm == "none":
        last = "conv2" if name in ("resnet18", "resnet34") else "conv3"  # of a basic block, of a bottleneck
        for block in (block for stage in (net.layer1, net.layer2, net.layer3, net.layer4) for block in stage):
            nn.init.zeros_(getattr(block, last).weight)
    return net


def build(name: str, in_channels: int, n_classes: int, width: int = 16, norm: str = "batch") -> nn.Module:
    """Return a network by name, initialized from torch's current random state.

    resnet<6n+2> (8, 14, 20, 32, 44, 56, 110): the CIFAR family, three stages of n blocks.
    resnet18_cifar: four stages of two blocks with a 3x3 stem (width 64 is the usual one).
    resnet18, resnet34, resnet50: torchvision's for ImageNet (3 channels, `width` ignored).
    Raises ConfigError for any other name, or a torchvision network with other than 3 channels.
    """
    if name == "resnet18_cifar":
        return ResNet((2, 2, 2, 2), width, norm, in_channels, n_classes)
    if name in TORCHVISION_MODELS:
        require(in_channels == 3, "in_channels", in_channels, f"{name} is torchvision's and needs 3")
        return _torchvision(name, n_classes, norm)
    match = re.fullmatch(r"resnet(\d+)", name)
    allowed = f"resnet8, resnet14, resnet20, ... (6n+2), resnet18_cifar, {', '.join(TORCHVISION_MODELS)}"
    depth = int(match.group(1)) if match else 0
    require(depth >= 8 and depth % 6 == 2, "model", name, allowed)
    return ResNet(((depth - 2) // 6,) * 3, width, norm, in_channels, n_classes)


def forked_rng(device: torch.device) -> contextlib.AbstractContextManager:
    """Give back the random states of the CPU and of this device afterwards, and touch those of no other GPU."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


@contextlib.contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """On a GPU: products and convolutions in IEEE float32, never TF32, and convolutions by repeatable algorithms."""
    cudnn, blas = torch.backends.cudnn, torch.backends.cuda.matmul
    wanted = [(cudnn.conv, "fp32_precision", "ieee"), (blas, "fp32_precision", "ieee")]
    wanted += [(cudnn, "benchmark", False), (cudnn, "deterministic", True)]
    if device.type != "cuda":  # nothing to set, and threads that probe side by side must not touch global flags
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


ModelFactory = Callable[[], nn.Module]  # a user's function or class that makes a network


class FlatModel:
    """A module whose parameters, gradients and float buffers are views into three vectors.

    SGD, averaging and interpolation are then single vector operations, and a snapshot is one copy. Convolution
    weights are stored in channels_last order whatever the device, so that vectors mean the same everywhere.

    weights: (P,) float32.  grad: (P,), filled by `backward`.  buffers: (Q,), e.g. BatchNorm's running statistics.
    Raises ConfigError for a module without trainable parameters, or a BatchNorm with momentum=None.
    """

    def __init__(self, module: nn.Module, device: torch.device | str = "cpu"):
        for name, sub in module.named_modules():
            if isinstance(sub, nn.modules.batchnorm._NormBase):
                what = f"momentum of the layer {name!r}, a {type(sub).__name__},"
                require(sub.momentum is not None, what, None, "give it one, such as torch's default 0.1")
                sub.num_batches_tracked = None  # an integer that only matters without a momentum
        self.module = module.to(device)
        self.device = torch.device(device)
        self.parameters = params = [p for p in module.parameters() if p.requires_grad]
        floats = [b for b in module.buffers() if b.is_floating_point()]
        require(bool(params), "module", type(module).__name__, "it needs at least one trainable parameter")
        self.weights, self.grad, self.buffers = _flatten(params), _flatten(params), _flatten(floats)
        self.grad.zero_()
        for p, value, grad in zip(params, _views(self.weights, params), _views(self.grad, params), strict=True):
            p.data, p.grad = value, grad
        for b, value in zip(floats, _views(self.buffers, floats), strict=True):
            b.data = value

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
        """Evaluate in train or eval mode at any weights; weights, gradient, buffers, modes and RNG come back."""
        modes = {sub: sub.training for sub in self.module.modules()}
        saved = [v.clone() for v in (self.weights, self.grad, self.buffers)]
        try:
            with forked_rng(self.device), exact_float32(self.device):
                self.module.train(train)
                yield self
        finally:
            for vector, value in zip((self.weights, self.grad, self.buffers), saved, strict=True):
                vector.copy_(value)
            for sub, mode in modes.items():
                sub.training = mode


def _flatten(tensors: list[Tensor]) -> Tensor:
    """Concatenate copies of tensors into one float32 vector, images-like 4-D ones in channels_last order."""
    if not tensors:
        return torch.zeros(0)
    parts = [(t.permute(0, 2, 3, 1) if t.ndim == 4 else t).detach().float().reshape(-1) for t in tensors]
    return torch.cat(parts).clone()


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
