"""What stands for code: the same in every process and Python version, another wherever a number
could be another.
"""

import abc
import ast
import collections
import dataclasses
import enum
import functools
import importlib
import json
import logging
import math
import os
import random
import re
import subprocess
import sys
import textwrap
import threading
import typing

import cloudpickle
import numpy as np
import pytest
import torch
from helpers import SMALL, small_data
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from paper_lib import runs
from paper_lib.errors import ConfigError
from paper_lib.runs import identity


def of_source(folder, source):
    (folder / "module.py").write_text(source)
    return identity.of_source(folder)


def test_comments_and_docstrings_change_nothing_but_code_does(tmp_path):
    plain = of_source(tmp_path, "def f(): return 1  # why")
    assert plain == of_source(tmp_path, '"""Doc."""\ndef f():\n    "Doc."\n    return 1')
    others = [
        "def f(): return 2",
        "def f(): return None",
        "def f(): return",
        "def g(): return 1",
        "def f(x): return 1",
    ]
    assert len({plain, *(of_source(tmp_path, other) for other in others)}) == 6


@pytest.mark.parametrize("empty", [None, []])
def test_fields_that_other_python_versions_add_change_nothing(tmp_path, monkeypatch, empty):
    source = "def f(x: int = 0): return {**x, 'a': None}"
    before = of_source(tmp_path, source)
    monkeypatch.setattr(ast.FunctionDef, "_fields", (*ast.FunctionDef._fields, "added_later"))
    monkeypatch.setattr(ast.FunctionDef, "added_later", empty, raising=False)
    assert of_source(tmp_path, source) == before
    monkeypatch.setattr(ast.FunctionDef, "added_later", ["T"])
    assert of_source(tmp_path, source) != before


SOURCE = textwrap.dedent(
    """
    import torch
    from torch import nn

    FACTOR = 2
    mean = 1  # a name that forward uses for something else

    def doubled(x):
        return x * FACTOR

    def decorated(method):
        return torch.no_grad()(method)

    class Base(nn.Module):
        def shift(self, x):
            return [doubled(v) for v in [x]][0] + 1.0

    class Part(Base):
        scale = 3
        names = {"a", "b", "c"}

        def __init__(self, slope=0.1):
            super().__init__()
            self.slope, self.extra = slope, [torch.arange(3)]
            self.register_buffer("mask", torch.ones(2))

        def forward(self, x, power=2):
            values = [v * 5 for v in x] if "x" in {"x", "y", "z"} else x
            return self.shift(nn.functional.leaky_relu(self.scale * x, self.slope)) ** power

        @property
        def half(self):
            return 0.5

        @staticmethod
        def unit():
            return 7

        @decorated
        def frozen(self):
            return 11

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.part, self.head = Part(), nn.Linear(2, 2)

        def forward(self, x):
            return self.head(self.part(x)).mean(0)
    """
)


def of_network(source):
    """The hash of a network that was defined as in a notebook's cell, in no file."""
    namespace = {"__name__": "__main__"}
    exec(compile(source, "<cell>", "exec"), namespace)
    torch.manual_seed(0)
    return identity.of_network(namespace["Net"]())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("self.head(self.part(x))", "self.head(self.part(x) * 1)"),
        ("self.scale * x", "self.scale + x"),  # of a submodule
        ("+ 1.0", "+ 2.0"),  # of the class that a submodule extends
        ("v * 5", "v * 6"),
        ("leaky_relu", "elu"),
        ("power=2", "power=3"),
        ("scale = 3", "scale = 4"),
        ("slope=0.1", "slope=0.2"),
        ("torch.arange(3)", "torch.arange(3) + 1"),
        ("torch.ones(2)", "torch.zeros(2)"),
        ("return 0.5", "return 0.6"),
        ("return 7", "return 8"),
        ("return 11", "return 12"),
        ("torch.no_grad", "torch.enable_grad"),
        ("Linear(2, 2)", "Linear(2, 2, bias=False)"),
        ("FACTOR = 2", "FACTOR = 3"),  # a variable of a function that an inherited method calls
        ("x * FACTOR", "x + FACTOR"),
    ],
)
def test_whatever_changes_a_network_changes_its_hash(old, new):
    assert old in SOURCE
    assert of_network(SOURCE) != of_network(SOURCE.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("", ""),
        ("\nimport torch\n", "\n# a comment\n\nimport torch\n"),
        ("def shift(self, x):", "def shift(self, x):  # of its input"),
        ("mean = 1", "mean = 2"),
        ("self.part, ", "self.register_forward_hook(print)\n        self.part, "),
    ],
)
def test_a_network_that_is_defined_again_keeps_its_hash(old, new):
    assert old in SOURCE
    hooked = "hook" in new  # torch numbers hooks through the process
    assert of_network(SOURCE.replace(old, new)) == of_network(
        SOURCE.replace(old, new) if hooked else SOURCE
    )


def test_a_network_is_what_was_imported_not_what_an_editor_has_saved_since(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "edited_later.py"
    path.write_text(SOURCE)
    net = importlib.import_module("edited_later").Net()
    before = identity.of_network(net)
    path.write_text("# moved\n" + SOURCE.replace("v * 5", "v * 6"))
    assert identity.of_network(net) == before


def test_other_initial_weights_are_another_network():
    torch.manual_seed(1)
    assert identity.of_network(nn.Linear(2, 2)) != identity.of_network(nn.Linear(2, 2))


# --- pairs of networks that differ in one thing --------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        return self.b(self.drop(self.norm(self.a(x))))


class Scale(nn.Module):
    def __init__(self, by):
        super().__init__()
        self.by = by

    def forward(self, x):
        return x * self.by


class Shift(Scale):
    def forward(self, x):
        return x + self.by


class Held:
    def __init__(self, value=1):
        self.value = value

    def get(self):
        return self.value


class Abstract(abc.ABC):
    @abc.abstractmethod
    def value(self): ...


class Concrete(Abstract):
    def value(self):
        return 1


class Slots:
    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


@dataclasses.dataclass
class Settings:
    width: int = 3
    inner: object = None


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    width: int = 3


class Mode(enum.Enum):
    ONE, TWO = 1, 2


class Sizes(typing.NamedTuple):
    width: int


def doubled(x):
    return x * 2


def tripled(x):
    return x * 3


def times(factor):
    return lambda x: x * factor


def network(change=lambda net: None):
    """The network after a change, if any."""
    torch.manual_seed(0)
    net = Net()
    change(net)
    return net


def unchanged(net):
    pass


def holding(*values):
    """Two changes: an attribute that holds the one value, or the other."""
    return [lambda net, value=value: setattr(net, "held", value) for value in values]


def buffer(value, dtype=None):
    return lambda net: net.register_buffer("counter", torch.tensor(value, dtype=dtype))


def parametrized(by):
    return lambda net: parametrize.register_parametrization(net.a, "weight", by)


def freeze(net):
    net.a.weight.requires_grad_(False)


def tie(net):
    net.b.weight = net.a.weight


def untie(net):
    net.b.weight = nn.Parameter(net.a.weight.detach().clone())


PAIRS = {
    "frozen": (unchanged, freeze),
    "hook": (unchanged, lambda net: net.a.register_forward_hook(lambda m, i, o: o * 2)),
    "another hook": [
        lambda net, f=f: net.a.register_forward_hook(f)
        for f in (lambda m, i, o: o * 2, lambda m, i, o: o * 3)
    ],
    "hook before": (unchanged, lambda net: net.register_forward_pre_hook(print)),
    "hook backward": (unchanged, lambda net: net.register_full_backward_hook(print)),
    "hook of a tensor": (unchanged, lambda net: net.a.weight.register_hook(doubled)),
    "hook after a gradient": (
        unchanged,
        lambda net: net.a.weight.register_post_accumulate_grad_hook(print),
    ),
    "integer buffer": (buffer(0), buffer(1)),
    "bool buffer": (buffer(False), buffer(True)),
    "buffer at all": (unchanged, buffer(0)),
    "type of a buffer": (buffer(0, torch.int32), buffer(0, torch.int64)),
    "evaluation mode": (unchanged, lambda net: net.norm.eval()),
    "dropout": (unchanged, lambda net: setattr(net.drop, "p", 0.5)),
    "momentum": (unchanged, lambda net: setattr(net.norm, "momentum", 0.5)),
    "tied": (untie, tie),
    "weight norm": (unchanged, lambda net: parametrizations.weight_norm(net.a)),
    "parametrization": (parametrized(Scale(2)), parametrized(Scale(3))),
    "kind of parametrization": (parametrized(Scale(2)), parametrized(Shift(2))),
    "forward of one": (unchanged, lambda net: setattr(net, "forward", doubled)),
    "number": holding(1, 2),
    "type of a number": holding(1, True),
    "function": holding(doubled, tripled),
    "function of torch": holding(torch.tanh, torch.sigmoid),
    "functional": holding(nn.functional.relu, nn.functional.gelu),
    "function with a switch": holding(nn.functional.max_pool1d, nn.functional.max_pool2d),
    "function of numpy": holding(np.tanh, np.sin),
    "class": holding(nn.ReLU, nn.GELU),
    "type": holding(torch.float32, torch.float64),
    "layout": holding(torch.channels_last, torch.contiguous_format),
    "partial": holding(functools.partial(doubled, 1), functools.partial(doubled, 2)),
    "lambda": holding(lambda x: x + 1, lambda x: x + 2),
    "closure": holding(times(2), times(3)),
    "decorator": holding(torch.no_grad()(doubled), doubled),
    "kind of decorator": holding(torch.no_grad()(doubled), torch.enable_grad()(doubled)),
    "method": holding(Held(1).get, Held(2).get),
    "object": holding(Held(Held(1)), Held(Held(2))),
    "class of an object": holding(Concrete(), Held()),
    "slots": holding(Slots(1), Slots(2)),
    "dataclass": holding(Settings(3), Settings(4)),
    "frozen dataclass": holding(Frozen(3), Frozen(4)),
    "object in a dataclass": holding(Settings(3, Held(1)), Settings(3, Held(2))),
    "enumeration": holding(Mode.ONE, Mode.TWO),
    "named tuple": holding(Sizes(1), Sizes(2)),
    "list of modules": holding([Scale(2)], [Scale(3)]),
    "kinds of modules": holding([Scale(2)], [Shift(2)]),
    "array": holding(np.arange(3), np.arange(3) + 1),
    "scalar": holding(np.float32(1), np.float32(2)),
    "tensor": holding(torch.zeros(2), torch.ones(2)),
    "sparse tensor": holding(torch.eye(2).to_sparse(), torch.zeros(2, 2).to_sparse()),
    "generator": [
        lambda net, seed=seed: setattr(net, "held", torch.Generator().manual_seed(seed))
        for seed in (0, 1)
    ],
    "generator of numpy": holding(np.random.default_rng(0), np.random.default_rng(1)),
    "generator of Python": holding(random.Random(0), random.Random(1)),
    "distribution": holding(*(torch.distributions.Normal(0.0, s) for s in (1.0, 2.0))),
    "loss": holding(nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.1)),
    "default": holding(collections.defaultdict(int, a=1), collections.defaultdict(float, a=1)),
    "deque": holding(collections.deque([1]), collections.deque([2])),
    "set": holding({"a", "b"}, {"a", "c"}),
    "set of functions": holding({doubled}, {tripled}),
    "pattern": holding(re.compile("a"), re.compile("b")),
    "range": holding(range(3), range(4)),
    "module": holding(math, np),
    "log": holding(logging.getLogger("a"), logging.getLogger("b")),
}


def hashes():
    """Hashes of both networks of each pair."""
    return {
        name: [identity.of_network(network(change)) for change in pair]
        for name, pair in PAIRS.items()
    }


@pytest.mark.parametrize("name", PAIRS)
def test_networks_that_differ_in_one_thing_have_different_hashes(name):
    one, other = (identity.of_network(network(change)) for change in PAIRS[name])
    assert one != other
    assert [one, other] == [identity.of_network(network(change)) for change in PAIRS[name]]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (functools.lru_cache(doubled), functools.lru_cache(tripled)),
        (functools.cached_property(doubled), functools.cached_property(tripled)),
    ],
)
def test_what_wraps_a_function_is_looked_into(one, other):
    found = [list(identity.describe(held)) for held in (one, other)]
    assert found[0] != found[1]


def test_another_process_that_is_sent_the_code_finds_the_same_hashes():
    """Sets are in another order there, and classes made again from what was sent."""
    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)
    try:
        sent = cloudpickle.dumps(hashes)
    finally:
        cloudpickle.unregister_pickle_by_value(module)
    code = "import json, pickle, sys; print(json.dumps(pickle.load(sys.stdin.buffer)()))"
    path = [os.path.dirname(__file__), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONHASHSEED": "1"}
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, env=environment, input=sent, capture_output=True, check=True)
    assert json.loads(found.stdout) == hashes()


@pytest.mark.parametrize(
    "held",
    [threading.Lock(), (i for i in range(3)), sys.stdout.buffer],
    ids=["lock", "loop", "file"],
)
def test_what_cannot_be_told_from_another_is_refused_by_name(held):
    net = network()
    net.part = Scale(Held({"of it": held}))
    with pytest.raises(ConfigError, match=r"Net\.part\.by\.value\['of it'\] = .* inside `forward`"):
        identity.of_network(net)


# --- functions that make networks ----------------------------------------------------------------


MADE, PART, CALLS = Net(), nn.Linear(3, 3), []


def counting():
    net = Net()
    net.b.held = CALLS.append(0) or len(CALLS)
    return net


def drawing(draw):
    def make():
        net = Net()
        nn.init.constant_(net.a.bias, draw())
        return net

    return make


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda: MADE, r"two calls share \['a.weight', .* copy.deepcopy"),
        (lambda: nn.Sequential(Net(), PART), r"two calls share \['1.weight', '1.bias'\]"),
        (
            drawing(lambda: np.random.rand()),  # noqa: NPY002
            r"differ at Net.a.bias, which depends on numpy.random: draw",
        ),
        (drawing(lambda: random.random()), r"differ at Net.a.bias, which depends on random: draw"),
        (
            drawing(lambda: np.random.default_rng().random()),
            r"on something that torch.manual_seed does not",
        ),
        (counting, r"two calls differ at Net.b.held"),
    ],
)
def test_a_function_that_does_not_make_the_same_network_anew_is_refused(factory, message):
    with pytest.raises(ConfigError, match=f"^net = .*{message}"):
        runs.run_key(SMALL, small_data(), factory)


def test_a_function_may_draw_and_be_given_what_it_copies():
    def make():
        np.random.seed(0)  # noqa: NPY002
        net = Net()
        net.a.weight.data *= float(np.random.rand()) * torch.rand(())  # noqa: NPY002
        return net

    config, dataset = SMALL.replace(model="own"), small_data()
    keys = {runs.run_key(config, dataset, make) for _ in range(2)}
    assert len(keys) == 1 and keys != {runs.run_key(config.replace(seed=1), dataset, make)}
