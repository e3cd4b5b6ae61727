"""Any network, right or refused: what probes give for networks of a user's own, against plain
autograd batch by batch in float64; and what is refused, with its cause.
"""

import collections
import traceback

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import SMALL, SmallNet, small_data
from torch import nn

from paper_lib import runs
from paper_lib.averaging.batchnorm import layers
from paper_lib.errors import ConfigError
from paper_lib.probing import derivatives, probe
from paper_lib.runs import DivergedError
from paper_lib.training import flat
from paper_lib.training.flat import FlatModel

CLASSES = 4


class Net(nn.Module):
    """Modules by name, and what to do with them and a batch of images (B, 1, 8, 8)."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.own = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.own(self, x)


def head(width: int = 8) -> nn.Linear:
    return nn.Linear(width, CLASSES)


def rows(x):
    """Images as sequences of 8 rows of 8 pixels, (B, 8, 8)."""
    return x.squeeze(1)


def convolution(norm: nn.Module) -> nn.Module:
    stem = [nn.Conv2d(1, 8, 3), norm, nn.SiLU(inplace=True), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*stem, nn.Flatten(), nn.Dropout(0.5), head())


def perceptron(*parts: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), *parts, nn.Tanh(), head())


def two_views() -> nn.Module:
    def forward(self, x):
        one, other = self.features(torch.cat([x, 2 * x.flip(-1) + 1])).chunk(2)
        return one + other

    return Net(forward, features=convolution(nn.BatchNorm2d(8)))


def time_first() -> nn.Module:
    def forward(self, x):
        t = self.embed(rows(x).transpose(0, 1))
        return self.head(torch.tanh(self.norm(t.reshape(-1, 8)).view(t.shape)).mean(0))

    return Net(forward, embed=nn.Linear(8, 8), norm=nn.BatchNorm1d(8), head=head())


def recurrent(kind: type[nn.Module], batch_first: bool) -> nn.Module:
    """Over all steps of time BatchNorm gets (samples and steps, 8), in one order or the other."""

    def forward(self, x):
        x = rows(x) if batch_first else rows(x).transpose(0, 1)
        out, _ = self.net(x)
        out = self.norm(out.reshape(-1, 8)).view(out.shape)
        return self.head(out[:, -1] if batch_first else out[-1])

    net = kind(8, 8, batch_first=batch_first)
    return Net(forward, net=net, norm=nn.BatchNorm1d(8), head=head())


def encoder(batch_first: bool) -> nn.Module:
    def forward(self, x):
        x = rows(x) if batch_first else rows(x).transpose(0, 1)
        return self.head(self.net(x).mean(1 if batch_first else 0))

    layer = nn.TransformerEncoderLayer(8, 2, 16, activation=F.gelu, batch_first=batch_first)
    return Net(forward, net=layer, head=head())


def over_the_batch() -> nn.Module:
    """Attention among samples: no BatchNorm, yet a sample's output depends on its batch."""

    def forward(self, x):
        x = self.embed(x.flatten(1))[None]
        return self.head(self.attention(x, x, x)[0][0])

    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    return Net(forward, embed=nn.Linear(64, 8), attention=attention, head=head())


def centered(start: float) -> nn.Module:
    """Takes the mean of the batch off, as far as a weight that begins at `start` says."""

    def forward(self, x):
        x = self.embed(x.flatten(1))
        return self.head(torch.tanh(x - self.share * x.mean(0)))

    net = Net(forward, embed=nn.Linear(64, 8), head=head())
    net.share = nn.Parameter(torch.tensor(start))
    return net


def silent_branch() -> nn.Module:
    """A residual branch whose last layer begins at zero hides how it orders rows."""

    def forward(self, x):
        x = self.embed(x.flatten(1))
        return self.head(x + self.last(self.norm(x.T.reshape(-1, 8)).view(8, -1).T))

    parts = {"embed": nn.Linear(64, 8), "norm": nn.BatchNorm1d(8), "head": head()}
    net = Net(forward, last=nn.Linear(8, 8), **parts)
    for parameter in net.last.parameters():
        nn.init.zeros_(parameter)
    return net


class Ghost(nn.BatchNorm1d):
    """Normalizes groups of 8 samples, whatever the batch."""

    def forward(self, x):
        return torch.cat([super(Ghost, self).forward(part) for part in x.split(8)])


def ghosts_outside() -> nn.Module:
    """Splits a batch into groups of 24 samples before BatchNorm: right for two batches at once."""

    def forward(self, x):
        x = self.embed(x.flatten(1))
        return self.head(torch.tanh(torch.cat([self.norm(part) for part in x.split(24)])))

    return Net(forward, embed=nn.Linear(64, 8), norm=nn.BatchNorm1d(8), head=head())


class FixedNorm(nn.Sequential):
    """BatchNorm stays in evaluation mode in training too."""

    def train(self, mode=True):
        super().train(mode)
        for layer in layers(self):
            layer.eval()
        return self


def frozen_layers() -> nn.Module:
    net = convolution(nn.BatchNorm2d(8))
    net[0].requires_grad_(False)
    net[1].bias.requires_grad_(False)
    return net


def tied() -> nn.Module:
    def forward(self, x):
        x = torch.tanh(self.one(x.flatten(1)[:, :8]))
        return self.head(torch.tanh(F.linear(self.two(x), self.one.weight)))

    net = Net(forward, one=nn.Linear(8, 8), two=nn.Linear(8, 8), head=head())
    net.two.weight = net.one.weight
    return net


def with_unused() -> nn.Module:
    return Net(lambda self, x: self.used(x), used=perceptron(), unused=nn.Conv2d(1, 2, 3))


def embedding(**options) -> nn.Module:
    def forward(self, x):
        words = (x.flatten(1) > 0.5).long() + torch.arange(64) % 5
        return self.head(torch.tanh(self.table(words).mean(1)))

    return Net(forward, table=nn.Embedding(7, 8, **options), head=head())


def by_name() -> nn.Module:
    """Calls BatchNorm with a named argument."""

    def forward(self, x):
        return self.rest(torch.tanh(self.norm(input=self.embed(x.flatten(1)))))

    return Net(forward, embed=nn.Linear(64, 8), norm=nn.BatchNorm1d(8), rest=head())


def lazy() -> nn.Module:
    net = nn.Sequential(
        nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(CLASSES)
    )
    net(torch.zeros(2, 1, 8, 8))
    return net


def fixed_size() -> nn.Module:
    """Takes batches of 12 alone: a table of positions over samples."""

    def forward(self, x):
        return self.head(torch.tanh(self.embed(x.flatten(1)) + self.table))

    net = Net(forward, embed=nn.Linear(64, 8), head=head())
    net.table = nn.Parameter(torch.randn(12, 8))
    return net


def once_shared() -> nn.Module:
    """One block twice, BatchNorm included."""
    block = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh())
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), block, block, head())


def old_weight_norm() -> nn.Module:
    net = perceptron()
    nn.utils.weight_norm(net[1])  # a tensor that cannot be copied once it was used
    return net


def weight_norm() -> nn.Module:
    net = perceptron(nn.BatchNorm1d(8))
    nn.utils.parametrizations.weight_norm(net[1])
    nn.utils.parametrizations.spectral_norm(net[4])
    return net


NETWORKS = {
    "perceptron": perceptron,
    "BatchNorm1d": lambda: perceptron(nn.BatchNorm1d(8)),
    "BatchNorm2d": lambda: convolution(nn.BatchNorm2d(8)),
    "no statistics kept": lambda: convolution(nn.BatchNorm2d(8, track_running_stats=False)),
    "GroupNorm": lambda: convolution(nn.GroupNorm(2, 8)),
    "LayerNorm": lambda: perceptron(nn.LayerNorm(8)),
    "InstanceNorm": lambda: convolution(nn.InstanceNorm2d(8, affine=True)),
    "InstanceNorm, kept": lambda: convolution(nn.InstanceNorm2d(8, track_running_stats=True)),
    "two views": two_views,
    "time first": time_first,
    "RNN": lambda: recurrent(nn.RNN, True),
    "LSTM, time first": lambda: recurrent(nn.LSTM, False),
    "GRU": lambda: recurrent(nn.GRU, True),
    "encoder": lambda: encoder(True),
    "encoder, time first": lambda: encoder(False),
    "attention over the batch": over_the_batch,
    "mean of the batch": lambda: centered(1.0),
    "mean of the batch, silent": lambda: centered(0.0),
    "silent branch": silent_branch,
    "BatchNorm of one's own": lambda: perceptron(Ghost(8)),
    "groups of 24": ghosts_outside,
    "BatchNorm that stays fixed": lambda: FixedNorm(*convolution(nn.BatchNorm2d(8))),
    "frozen layers": frozen_layers,
    "tied": tied,
    "unused parameters": with_unused,
    "embedding": embedding,
    "sparse embedding": lambda: embedding(sparse=True),
    "scaled embedding": lambda: embedding(scale_grad_by_freq=True),
    "called by name": by_name,
    "lazy, made": lazy,
    "one batch size": fixed_size,
    "one block twice": once_shared,
    "weight norm, old": old_weight_norm,
    "weight norm": weight_norm,
}


def made(factory) -> FlatModel:
    torch.manual_seed(0)
    return FlatModel(factory())


def oracle(net: FlatModel, weights, direction, x, y) -> dict[str, np.ndarray]:
    """Losses, gradients and Hessian products batch by batch, by plain autograd in float64."""
    net.weights.copy_(torch.from_numpy(weights))
    module = net.module.double().train()
    for layer in module.modules():
        if not isinstance(layer, FixedNorm | nn.modules.batchnorm._BatchNorm):
            layer.training = False
    trained = [p for p in module.parameters() if p.requires_grad]
    parts = flat._views(torch.from_numpy(direction).double(), trained)
    found = {"losses": [], "gradients": [], "products": []}
    options = {"materialize_grads": True, "create_graph": True}
    for xs, ys in zip(x.double(), y, strict=True):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            loss = F.cross_entropy(module(xs), ys)
        slopes = torch.autograd.grad(loss, trained, **options)
        along = sum((g.to_dense() * d).sum() for g, d in zip(slopes, parts, strict=True))
        found["losses"].append(loss.item())
        found["gradients"].append(flat._flatten(list(slopes)).numpy())
        products = torch.autograd.grad(along, trained, materialize_grads=True)
        found["products"].append(flat._flatten(list(products)).numpy())
    return {name: np.array(values) for name, values in found.items()}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_batch_is_what_it_would_be_alone(name, monkeypatch):
    monkeypatch.setitem(probe.SAMPLES_AT_ONCE, "cpu", 36)  # three batches, then two
    net, again = (made(NETWORKS[name]) for _ in range(2))
    x = torch.rand(5, 12, 1, 8, 8) + torch.arange(5).view(5, 1, 1, 1, 1) / 2
    y, rng = torch.randint(CLASSES, (5, 12)), np.random.default_rng(0)
    noise, direction = rng.standard_normal((2, net.weights.numel())).astype(np.float32)
    weights = net.weights.numpy() + 0.1 * noise
    found = {
        "losses": probe.losses(net, np.stack([weights] * 2), x, y)[1],
        "gradients": derivatives.gradients(net, weights, x, y),
        "mean gradient": derivatives.mean_gradient(net, weights, x, y),
        "curvature": derivatives.curvature(net, weights, direction, x, y),
        "products": derivatives.hessian_vector_products(net, weights, direction, x, y),
        "mean product": derivatives.mean_hessian_product(net, weights, direction, x, y),
    }
    expected = oracle(again, weights, direction, x, y)
    expected["mean gradient"] = expected["gradients"].mean(0)
    expected["mean product"] = expected["products"].mean(0)
    expected["curvature"] = expected["products"] @ direction / (direction @ direction)
    for quantity, values in found.items():
        bound = 1e-4 * np.abs(expected[quantity]).max()
        np.testing.assert_allclose(values, expected[quantity], rtol=0, atol=bound, err_msg=quantity)


def test_a_network_that_is_random_draws_for_each_batch_what_it_draws_alone():
    net = made(lambda: Net(lambda self, x: F.dropout(self.net(x)), net=perceptron()))
    x, y = torch.rand(3, 8, 1, 8, 8), torch.randint(CLASSES, (3, 8))
    weights = net.weights.numpy().copy()
    alone = [probe.losses(net, weights, x[k : k + 1], y[k : k + 1])[0] for k in range(3)]
    np.testing.assert_array_equal(probe.losses(net, weights, x, y), alone)
    slopes = derivatives.gradients(net, weights, x, y).mean(0)
    found = derivatives.mean_gradient(net, weights, x, y)
    np.testing.assert_allclose(found, slopes, atol=1e-6)


def test_a_network_that_cannot_be_copied_is_probed_in_one_thread():
    net = made(old_weight_norm)
    x, y = torch.rand(2, 8, 1, 8, 8), torch.randint(CLASSES, (2, 8))
    points = np.stack([net.weights.numpy() * k for k in (1, 2, 3)])
    alone = probe.losses(net, points, x, y)
    net.forward(x[0])
    with flat.threads(2):
        np.testing.assert_array_equal(probe.losses(net, points, x, y), alone)


# --- what is refused ------------------------------------------------------------------------------


def returns(output, training_only: bool = False, **parts):
    """A network of three classes for 4 x 4 images that returns output(logits)."""

    def forward(self, x):
        logits = self.body(x)
        return logits if training_only and not self.training else output(logits)

    def make():
        return Net(forward, body=nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), **parts)

    return make


def spoilt(value: float):
    def make():
        net = SmallNet()
        nn.init.constant_(net.head.bias, value)
        return net

    return make


def with_buffer(tensor):
    def make():
        net = SmallNet()
        net.register_buffer("extra", tensor())
        return net

    return make


def tied_by_data():
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3))
    net[2].weight.data = net[1].weight.data
    return net


def with_tensor(tensor: torch.Tensor, **options):
    def make():
        net = SmallNet()
        net.extra = nn.Parameter(tensor, **options)
        return net

    return make


Output = collections.namedtuple("Output", "logits")
LOGITS = r"output of the network = .* is not allowed: it must (be a float|be \(8, 3 cl|depend on)"

REFUSED = {
    "tuple": (returns(lambda o: (o, o)), LOGITS.replace(".*", "'tuple of a tensor.*", 1)),
    "tuple in training": (returns(lambda o: (o, o), training_only=True), LOGITS),
    "named tuple": (returns(Output), LOGITS),
    "dictionary": (returns(lambda o: {"logits": o}), LOGITS),
    "nothing": (returns(lambda o: None), LOGITS),
    "one number": (returns(torch.sum), LOGITS),
    "one number a sample": (returns(lambda o: o[:, 0]), LOGITS),
    "maps": (returns(lambda o: o[:, :, None, None]), LOGITS),
    "transposed": (returns(lambda o: o.T), LOGITS),
    "fewer samples": (returns(lambda o: o[1:]), LOGITS),
    "classes": (returns(lambda o: o.argmax(1, keepdim=True)), LOGITS),
    "complex": (returns(lambda o: o + 0j), LOGITS),
    "too few outputs": (returns(lambda o: o[:, :2]), LOGITS),
    "detached": (returns(lambda o: o.detach()), LOGITS),
    "no module": (lambda: 3, "network = 'int' .* torch.nn.Module"),
    "no parameters": (nn.ReLU, "at least one trainable parameter"),
    "nothing to train": (lambda: SmallNet().requires_grad_(False), "one trainable parameter"),
    "lazy": (lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), "'1.weight' = 'no values yet'"),
    "meta": (lambda: SmallNet().to("meta"), "no values yet"),
    "bfloat16": (lambda: SmallNet().bfloat16(), r"torch.bfloat16 .* call .float\(\)"),
    "float64": (lambda: SmallNet().double(), r"torch.float64 .* call .float\(\)"),
    "complex weights": (
        with_tensor(torch.zeros(2, dtype=torch.complex64)),
        "'extra' = torch.complex64",
    ),
    "sparse weights": (with_tensor(torch.eye(3).to_sparse()), "'extra' .* dense"),
    "sparse integers": (
        with_buffer(lambda: torch.eye(3, dtype=torch.int64).to_sparse()),
        "'extra' = torch.int64 .* dense",
    ),
    "quantized": (
        with_buffer(lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)),
        "'extra' = torch.qint8 .* dense",
    ),
    "tied by their data": (tied_by_data, "parameters share memory: make them one"),
    "no momentum": (lambda: nn.Sequential(nn.BatchNorm2d(1, momentum=None)), "momentum .* '0'"),
    "SyncBatchNorm": (
        lambda: nn.SyncBatchNorm.convert_sync_batchnorm(SmallNet()),
        "the layer 'features.1', a SyncBatchNorm, .* give it plain",
    ),
    "DataParallel": (lambda: nn.DataParallel(SmallNet()), "a DataParallel, .* give it plain"),
    # As torch.compile wraps a network; importing it takes seconds.
    "compiled": (lambda: nn.Sequential(returns(None, _orig_mod=SmallNet())()), "give it plain; th"),
    "scripted": (lambda: torch.jit.script(perceptron()), "give it plain"),
    "NaN at the start": (spoilt(float("nan")), "loss before any step = nan .* NaN in inputs"),
}


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPER_RUNS", str(tmp_path))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_is_refused_with_its_cause(name, own_folder):
    factory, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message) as caught:
        runs.obtain(SMALL.replace(steps=5, record=""), small_data(), factory)
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


class Once(torch.autograd.Function):
    """Three times its input, with a derivative that has none."""

    @staticmethod
    def forward(ctx, x):
        return 3 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 3 * gradient


@pytest.mark.parametrize("part", ["once", "bag"])
def test_a_network_without_second_derivative_is_refused(part):
    bag = nn.EmbeddingBag(2, CLASSES)
    forwards = {
        "once": lambda self, x: Once.apply(self.body(x)),
        "bag": lambda self, x: self.body(x) + self.bag((x.flatten(1) > 0).long()),
    }
    net = made(lambda: Net(forwards[part], body=perceptron(), bag=bag if part == "bag" else None))
    x, y = torch.rand(2, 8, 1, 8, 8), torch.zeros(2, 8, dtype=torch.int64)
    weights = net.weights.numpy().copy()
    assert np.isfinite(derivatives.mean_gradient(net, weights, x, y)).all()
    for product in (derivatives.curvature, derivatives.mean_hessian_product):
        with pytest.raises(ConfigError, match="no second derivative"):
            product(net, weights, weights, x, y)


def test_one_sample_is_too_few_for_batch_norm(own_folder):
    def net():
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.BatchNorm1d(3))

    cause = "a single value; take larger batches"
    with pytest.raises(ConfigError, match=cause):
        runs.obtain(SMALL.replace(batch_size=1), small_data(), net)
    model = made(net)
    weights, x = model.weights.numpy().copy(), torch.rand(3, 1, 1, 4, 4)
    y = torch.zeros(3, 1, dtype=torch.int64)
    for probing in (probe.losses, derivatives.gradients, derivatives.mean_gradient):
        for n in (1, 3):
            with pytest.raises(ConfigError, match=cause):
                probing(model, weights, x[:n], y[:n])
    buffers = model.buffers.numpy().copy()
    assert np.isfinite(probe.losses(model, weights, x, y, buffers)).all()
    chunks = [(x.flatten(0, 1)[:2], y[:2, 0]), (x[2], y[2])]  # the last of one
    assert np.isfinite(probe.evaluate(model, weights, buffers, chunks)).all()
    untracked = made(lambda: nn.Sequential(*net()[:2], nn.BatchNorm1d(3, track_running_stats=0)))
    with pytest.raises(ConfigError, match=cause):
        probe.evaluate(untracked, weights, np.zeros(0), chunks)


class Own(Exception):
    """An error of the user's."""


def test_an_error_of_the_networks_own_is_shown_as_it_is(own_folder):
    def forward(self, x):
        raise Own("my mistake")

    def factory():
        return Net(forward, body=SmallNet())

    weights, x = np.zeros(8), torch.rand(2, 8, 1, 4, 4)
    calls = [
        lambda: runs.obtain(SMALL, small_data(), factory),
        lambda: probe.losses(made(factory), weights, x, torch.zeros(2, 8, dtype=torch.int64)),
    ]
    for call in calls:
        with pytest.raises(Own, match="my mistake") as caught:
            call()
        text = "".join(traceback.format_exception(caught.value))
        assert 'raise Own("my mistake")' in text  # the user's line
        assert "was given (8, 1, 4, 4) of torch.float32 on cpu" in text


@pytest.mark.parametrize("label", [-1, 3, 10**9])
def test_labels_beyond_the_outputs_are_refused(label):
    net = made(SmallNet)
    x, y = torch.rand(2, 8, 1, 4, 4), torch.zeros(2, 8, dtype=torch.int64)
    y[1, 3] = label
    weights, buffers = net.weights.numpy().copy(), net.buffers.numpy().copy()
    message = f"label = {label} is not allowed: the network has 3 outputs"
    for probing in (probe.losses, derivatives.gradients, derivatives.mean_gradient):
        with pytest.raises(ConfigError, match=message):
            probing(net, weights, x, y)
        with pytest.raises(ConfigError, match=r"type of labels = torch.float32"):
            probing(net, weights, x, y.float())
    with pytest.raises(ConfigError, match=message):
        probe.evaluate(net, weights, buffers, [(x[1], y[1])])


@pytest.mark.parametrize("change", [{"width": 4}, {"model": "resnet14"}, {"norm": "group"}])
def test_a_branch_keeps_the_network_of_its_parent(change):
    (name,) = change
    with pytest.raises(ConfigError, match=f"{name} = .* keeps the network of its parent"):
        SMALL.branch(5, **change)


def test_a_run_that_diverges_later_is_no_error_of_the_networks(own_folder):
    config = SMALL.replace(lr=1e30, weight_decay=0.1)
    run = runs.obtain(config, small_data(), SmallNet)
    assert run.status["diverged_at"] > 0
    with pytest.raises(DivergedError, match="lower"):
        runs.obtain(config.branch(5), small_data(), SmallNet)
