"""Networks by name, and modules as one flat vector."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from paper_lib.errors import ConfigError
from paper_lib.training import flat, networks
from paper_lib.training.flat import FlatModel


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize(
    ("name", "width"), [("resnet8", 8), ("resnet20", 4), ("resnet18_cifar", 4)]
)
def test_networks_map_images_to_logits(name, width, norm):
    net = networks.build(name, 3, 7, width, norm)
    assert net(torch.randn(2, 3, 16, 16)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "width"), [("resnet8", 4), ("resnet18_cifar", 4), ("resnet18", 0)]
)
@pytest.mark.parametrize("activation", networks.ACTIVATIONS)
def test_every_activation_is_the_one_asked_for(name, width, activation):
    net = networks.build(name, 3, 10, width, activation=activation)
    kinds = tuple(networks.ACTIVATIONS.values())
    found = {type(module) for module in net.modules() if isinstance(module, kinds)}
    assert found == {networks.ACTIVATIONS[activation]}


def test_only_smooth_activations_bend_between_kinks():
    x = torch.tensor([0.5], requires_grad=True)
    bends = {}
    for name, activation in networks.ACTIVATIONS.items():
        (slope,) = torch.autograd.grad(activation()(x).sum(), x, create_graph=True)
        bends[name] = torch.autograd.grad(slope.sum(), x, allow_unused=True)[0]
    assert not bends["relu"] and bends["silu"] and bends["gelu"]


def test_sizes_are_the_published_ones():
    assert parameters(networks.build("resnet20", 3, 10, 16)) == pytest.approx(
        0.27e6, rel=0.02
    )  # He et al., table 6
    assert parameters(networks.build("resnet56", 3, 10, 16)) == pytest.approx(0.85e6, rel=0.02)
    assert parameters(networks.build("resnet18_cifar", 3, 10, 64)) == pytest.approx(
        11.17e6, rel=0.01
    )
    assert parameters(networks.build("resnet50", 3, 1000)) == pytest.approx(25.6e6, rel=0.01)


@pytest.mark.parametrize("name", ["resnet9", "resnet2", "vgg", "resnet"])
def test_unknown_networks_are_refused(name):
    with pytest.raises(ConfigError, match=f"model = '{name}' .* resnet8"):
        networks.build(name, 3, 10)


def test_running_statistics_without_a_momentum_are_refused():
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, momentum=None)
    )  # would need a count of batches
    with pytest.raises(
        ConfigError, match=r"momentum of the layer '1', a BatchNorm2d, = None .* such as torch's"
    ):
        FlatModel(net)


def test_torchvision_networks_say_what_they_need():
    with pytest.raises(ConfigError, match="in_channels = 1"):
        networks.build("resnet18", 1, 10)


@pytest.mark.parametrize(("name", "kept"), [("resnet18", 8), ("resnet50", 16)])
def test_torchvision_networks_without_normalization_start_with_blocks_that_do_nothing(name, kept):
    net = networks.build(name, 3, 10, norm="none")
    assert not [m for m in net.modules() if isinstance(m, nn.BatchNorm2d | nn.GroupNorm)]
    blocks = [
        block for stage in (net.layer1, net.layer2, net.layer3, net.layer4) for block in stage
    ]
    same = [block for block in blocks if block.downsample is None]
    x = torch.rand(1, same[0].conv1.in_channels, 4, 4)
    assert len(blocks) == kept and torch.equal(same[0](x), x)
    net(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


@pytest.fixture
def pair() -> tuple[nn.Module, FlatModel]:
    """A module and the flat version of its copy."""
    torch.manual_seed(0)
    module = networks.build("resnet8", 3, 5, 4)
    return module, FlatModel(copy.deepcopy(module))


def test_a_flat_model_computes_what_its_module_did(pair):
    module, net = pair
    x, y = torch.randn(6, 3, 8, 8), torch.randint(0, 5, (6,))
    torch.testing.assert_close(net.forward(x), module(x))
    F.cross_entropy(module(x), y).backward()
    net.backward(F.cross_entropy(net.forward(x), y))
    expected = flat._flatten([p.grad for p in module.parameters()])
    torch.testing.assert_close(net.grad, expected, rtol=1e-4, atol=1e-6)
    before = net.grad.clone()
    net.backward(F.cross_entropy(net.forward(x), y))  # replaced, not accumulated
    torch.testing.assert_close(net.grad, before, rtol=1e-4, atol=1e-6)


def test_vectors_are_the_modules_own_memory(pair):
    _, net = pair
    net.weights.fill_(0.5)
    net.buffers.fill_(2.0)
    assert all((p == 0.5).all() for p in net.module.parameters())
    assert all((b == 2.0).all() for b in net.module.buffers())
    assert net.weights.numel() == parameters(net.module)


def test_state_dicts_still_work(pair):
    module, net = pair
    weights = net.weights.clone()
    net.weights.zero_()
    net.module.load_state_dict(module.state_dict(), strict=False)
    torch.testing.assert_close(net.weights, weights, rtol=0, atol=0)


def test_preserved_gives_everything_back(pair):
    _, net = pair
    net.module.train()
    net.module.head.eval()
    saved = [v.clone() for v in (net.weights, net.grad, net.buffers)]
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), net.preserved(train=True):
        net.weights.normal_()
        net.backward(net.forward(torch.randn(4, 3, 8, 8)).sum())
        raise ZeroDivisionError
    for vector, before in zip((net.weights, net.grad, net.buffers), saved, strict=True):
        assert torch.equal(vector, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert net.module.training and not net.module.head.training


def test_hessian_product_of_a_quadratic_is_exact():
    hessian = torch.tensor([[2.0, 1.0], [1.0, 3.0]])

    class Quadratic(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(2))

        def forward(self, x):
            return 0.5 * self.w @ hessian @ self.w

    net = FlatModel(Quadratic())
    v = torch.tensor([1.0, -2.0])
    torch.testing.assert_close(net.hessian_product(net.module(torch.zeros(1)), v), hessian @ v)


def test_a_module_without_parameters_is_refused():
    with pytest.raises(ConfigError, match="module = 'ReLU'"):
        FlatModel(nn.ReLU())
