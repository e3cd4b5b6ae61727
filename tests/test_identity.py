"""What stands for code: the same in every process and Python version, another wherever a number
could be another.
"""

import ast
import functools
import linecache
import os
import subprocess
import sys
import textwrap
import zlib

import pytest
import torch
from torch import nn

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

    def decorated(method):
        return torch.no_grad()(method)

    class Base(nn.Module):
        def shift(self, x):
            return x + 1.0

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
            return self.head(self.part(x))
    """
)


def of_network(source):
    """The hash of a network that was defined as in a notebook's cell: in no file, but Python knows
    its lines.
    """
    namespace, name = {"__name__": "__main__"}, f"<cell {zlib.crc32(source.encode())}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    exec(compile(source, name, "exec"), namespace)
    torch.manual_seed(0)
    return identity.of_network(namespace["Net"]())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("self.head(self.part(x))", "self.head(self.part(x) * 1)"),
        ("self.scale * x", "self.scale + x"),  # of a submodule
        ("x + 1.0", "x + 2.0"),  # of the class that a submodule extends
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
        ("Linear(2, 2)", "Linear(2, 2, bias=False)"),
    ],
)
def test_whatever_changes_a_network_changes_its_hash(old, new):
    assert old in SOURCE
    assert of_network(SOURCE) != of_network(SOURCE.replace(old, new))


def test_a_network_that_is_defined_again_keeps_its_hash():
    assert of_network(SOURCE) == of_network("\n# a comment\n" + SOURCE)
    hooked = SOURCE.replace("self.part, ", "self.register_forward_hook(print)\n        self.part, ")
    assert of_network(hooked) == of_network(
        hooked
    )  # though torch numbers hooks through the process


def test_another_process_finds_the_same_hash():
    code = "import test_identity as t; print(t.of_network(t.SOURCE))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "1"}
    command = [sys.executable, "-c", code]
    found = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert found.strip() == of_network(SOURCE)


def test_other_initial_weights_are_another_network():
    torch.manual_seed(1)
    assert identity.of_network(nn.Linear(2, 2)) != identity.of_network(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.tanh, torch.sigmoid),
        (torch.float32, torch.float64),
        (nn.ReLU, nn.GELU),
        (functools.partial(nn.functional.leaky_relu, negative_slope=0.1), nn.functional.leaky_relu),
        (lambda x: x + 1, lambda x: x + 2),
        (functools.lru_cache(lambda x: x + 1), functools.lru_cache(lambda x: x + 2)),
    ],
)
def test_what_a_network_holds_is_part_of_it(one, other):
    found = []
    for held in (one, other):
        net = nn.Linear(2, 2)
        nn.init.zeros_(net.weight), nn.init.zeros_(net.bias)
        net.held = held
        found.append(identity.of_network(net))
    assert found[0] != found[1]
