"""BatchNorm's statistics recomputed: plain means over batches, and no trace after an error."""

import pytest
import torch
from torch import nn

from paper_lib.averaging.batchnorm import recompute_statistics
from paper_lib.errors import ConfigError


class Twice(nn.Module):
    """One BatchNorm layer used twice in a forward pass, after dropout."""

    def __init__(self):
        super().__init__()
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(2)
        self.fixed = nn.BatchNorm1d(2, track_running_stats=False)

    def forward(self, x):
        return self.fixed(self.norm(3 * self.norm(self.drop(x)) + 1))


def test_a_ragged_last_batch_counts_for_what_it_is():
    x = 2 + 3 * torch.randn(100, 2, 3, generator=torch.Generator().manual_seed(0))
    layer = nn.BatchNorm1d(2, momentum=0.3)
    recompute_statistics(layer, x.split(32))  # the last batch has 4
    torch.testing.assert_close(layer.running_mean, x.mean((0, 2)))
    variances = torch.stack([b.var((0, 2)) for b in x.split(32)])
    expected = torch.tensor([0.32, 0.32, 0.32, 0.04]) @ variances
    torch.testing.assert_close(layer.running_var, expected)
    assert layer.momentum == 0.3 and layer.training and not layer._forward_pre_hooks


def test_statistics_of_a_layer_used_twice_and_the_modes_of_all():
    net = Twice()
    net.drop.eval()
    before = {m: m.training for m in net.modules()}
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(1))
    recompute_statistics(net, [(x[:40], None), (x[40:], None)])
    torch.testing.assert_close(net.norm.running_mean, (x.mean(0) + 1) / 2, atol=1e-5, rtol=0)
    assert {m: m.training for m in net.modules()} == before


def test_a_last_batch_of_one_value_is_not_counted_where_it_has_no_variance():
    x = torch.randn(97, 6, 4, generator=torch.Generator().manual_seed(0))
    flat, images = nn.BatchNorm1d(6), nn.BatchNorm1d(6)
    pooled = nn.Sequential(images, nn.AdaptiveAvgPool1d(1), nn.Flatten(), flat)
    recompute_statistics(pooled, x.split(32))  # images has 4 values of the last sample, flat one
    torch.testing.assert_close(images.running_mean, x.mean((0, 2)))
    expected = nn.BatchNorm1d(6)
    recompute_statistics(nn.Sequential(nn.BatchNorm1d(6), *pooled[1:3], expected), x[:96].split(32))
    torch.testing.assert_close(flat.running_mean, expected.running_mean)
    torch.testing.assert_close(flat.running_var, expected.running_var)
    assert flat.training and images.training


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "at least one batch"),
        ([torch.ones(4, 2), {"image": torch.zeros(4, 2)}], "batch = 'dict' is not allowed: inputs"),
        ([torch.ones(1, 2), torch.ones(4, 2)], r"batch 1 of shape \(1, 2\): .*no variance"),
        ([torch.ones(4, 2), torch.ones(1, 2)], r"batch 2 of shape \(1, 2\): Expected more"),
        ([torch.ones(4, 2), torch.ones(4, 3)], None),
        ([torch.ones(4, 2), torch.full((4, 2), float("nan"))], "leave out what is not finite"),
        ([3e38 * torch.ones(4, 2)], "leave out what is not finite, or too large"),
        ([torch.ones(2)], r"batch 1 of shape \(2,\)"),
        (torch.ones(4, 2), r"batch 1 of shape \(2,\)"),
    ],
)
def test_after_an_error_everything_is_as_before(batches, message):
    net = Twice()  # its untracked layer has only the batch, however often it was told otherwise
    net(torch.randn(8, 2, generator=torch.Generator().manual_seed(2)))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    modes = {m: (m.training, getattr(m, "momentum", None)) for m in net.modules()}
    with pytest.raises(ConfigError if message else RuntimeError, match=message):
        recompute_statistics(net, batches)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert {m: (m.training, getattr(m, "momentum", None)) for m in net.modules()} == modes
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_a_network_without_statistics_needs_no_batches():
    for net in (nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False)):
        recompute_statistics(net, [])


def test_a_layer_that_no_batch_reaches_keeps_its_statistics():
    used, idle = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    idle(1 + torch.randn(8, 2, generator=torch.Generator().manual_seed(3)))
    before = {name: value.clone() for name, value in idle.state_dict().items()}
    recompute_statistics(nn.ModuleList([used, idle]), [torch.ones(4, 2)], used)
    assert all(torch.equal(value, before[name]) for name, value in idle.state_dict().items())
    assert used.running_mean.tolist() == [1, 1]


def test_a_layer_may_be_called_by_keyword():
    layer = nn.BatchNorm1d(2)
    recompute_statistics(layer, [torch.ones(4, 2)], lambda x: layer(input=x))
    assert layer.running_mean.tolist() == [1, 1]


def test_a_lazy_network_is_refused_with_what_to_do():
    net = nn.Sequential(nn.Linear(2, 2), nn.LazyBatchNorm1d())
    with pytest.raises(ConfigError, match="'Sequential' .* lazy: run a batch through it first"):
        recompute_statistics(net, [torch.ones(4, 2)])
