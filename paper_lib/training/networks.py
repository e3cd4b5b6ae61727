"""Residual networks of the CIFAR and ImageNet families, by name."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from paper_lib.errors import require

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU}
"""ReLU has a kink, which autograd's Hessian does not see; the others are smooth."""


def normalization(norm: str, channels: int) -> nn.Module:
    """Return BatchNorm, GroupNorm (groups of at least 4 channels, at most 8 groups), or nothing."""
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "group":
        groups = max(
            g for g in range(1, 9) if channels % g == 0 and channels // g >= min(4, channels)
        )
        return nn.GroupNorm(groups, channels)
    return nn.Identity()


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, projected where the shape changes (He et al. 2016)."""

    def __init__(self, c_in: int, c_out: int, stride: int, norm: str, activation: str):
        super().__init__()
        bias = norm == "none"
        self.activation = ACTIVATIONS[activation]()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=bias)
        self.norm1 = normalization(norm, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=bias)
        self.norm2 = normalization(norm, c_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or c_in != c_out:
            projection = nn.Conv2d(c_in, c_out, 1, stride, bias=bias)
            self.shortcut = nn.Sequential(projection, normalization(norm, c_out))

    def forward(self, x: Tensor) -> Tensor:
        h = self.activation(self.norm1(self.conv1(x)))
        h = self.norm2(self.conv2(h))
        return self.activation(h + self.shortcut(x))


class ResNet(nn.Module):
    """A residual network with a 3x3 stem for small images; stage i has width * 2**i channels.

    Input (B, in_channels, H, W), output (B, n_classes). Without normalization each block starts as
    the identity (its second convolution at zero), without which training at useful learning rates
    diverges.
    """

    def __init__(
        self,
        blocks: tuple[int, ...],
        width: int,
        norm: str,
        activation: str,
        in_channels: int,
        n_classes: int,
    ):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, 1, 1, bias=norm == "none"),
            normalization(norm, width),
            ACTIVATIONS[activation](),
        )
        layers, channels = [], width
        for stage, n_blocks in enumerate(blocks):
            for i in range(n_blocks):
                out = width * 2**stage
                stride = 2 if stage > 0 and i == 0 else 1
                layers.append(BasicBlock(channels, out, stride, norm, activation))
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


def _torchvision(name: str, n_classes: int, norm: str, activation: str) -> nn.Module:
    """One of torchvision's networks; without normalization its blocks start as in `ResNet`."""
    import torchvision  # slow to import, and only these networks need it

    layer = {"batch": None, "none": Shift}.get(norm, lambda channels: normalization(norm, channels))
    net = getattr(torchvision.models, name)(num_classes=n_classes, norm_layer=layer)
    for module in [m for m in net.modules() if hasattr(m, "relu")]:
        module.relu = ACTIVATIONS[activation]()
    if norm == "none":
        last = (
            "conv2" if name in ("resnet18", "resnet34") else "conv3"
        )  # of a basic block, of a bottleneck
        for block in (
            block for stage in (net.layer1, net.layer2, net.layer3, net.layer4) for block in stage
        ):
            nn.init.zeros_(getattr(block, last).weight)
    return net


def build(
    name: str,
    in_channels: int,
    n_classes: int,
    width: int = 16,
    norm: str = "batch",
    activation: str = "relu",
) -> nn.Module:
    """Return a network by name, initialized from torch's current random state.

    resnet<6n+2> (8, 14, 20, 32, 44, 56, 110): the CIFAR family, three stages of n blocks.
    resnet18_cifar: four stages of two blocks with a 3x3 stem (width 64 is the usual one).
    resnet18, resnet34, resnet50: torchvision's for ImageNet (3 channels, `width` ignored).
    Raises ConfigError for any other name, or a torchvision network with other than 3 channels.
    """
    if name == "resnet18_cifar":
        return ResNet((2, 2, 2, 2), width, norm, activation, in_channels, n_classes)
    if name in TORCHVISION_MODELS:
        require(
            in_channels == 3, "in_channels", in_channels, f"{name} is torchvision's and needs 3"
        )
        return _torchvision(name, n_classes, norm, activation)
    match = re.fullmatch(r"resnet(\d{1,4})", name)
    allowed = (
        f"resnet8, resnet14, resnet20, ... (6n+2), resnet18_cifar, {', '.join(TORCHVISION_MODELS)}"
    )
    depth = int(match.group(1)) if match else 0
    require(depth >= 8 and depth % 6 == 2, "model", name, allowed)
    return ResNet(((depth - 2) // 6,) * 3, width, norm, activation, in_channels, n_classes)
