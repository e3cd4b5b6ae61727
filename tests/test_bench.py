"""The benchmark: FLOPs counted by hand, positive rates, rows that appear at once, a profile."""

import pytest
import torch

from benchmarks import bench, profiling
from paper_lib import runs
from paper_lib.presets import study


def test_the_flops_of_a_step_are_those_of_its_convolutions():
    """ResNet-8 at 8 x 8: twice the multiplications forward; as many backward for either input."""
    w, batch = 4, 16
    config = study("smoke", width=w, batch_size=batch).run
    stem = 64 * 9 * 1 * w  # multiplications per image: pixels x kernel x channels in x channels out
    stages = 2 * 64 * 9 * w * w
    for side, c in ((4, 2 * w), (2, 4 * w)):
        stages += side**2 * (9 * (c // 2) * c + 9 * c * c + (c // 2) * c)
    head = 4 * w * 10
    expected = 2 * batch * (2 * stem + 3 * (stages + head))  # the images need no gradient
    assert bench.step_flops(config, runs.load_dataset(config)) == expected


def test_the_matrix_rate_is_a_rate():
    assert 1e8 < bench.matrix_rate(torch.device("cpu"), torch.float32) < 1e14


def test_a_row_is_printed_before_the_next_is_measured(capsys):
    def rows():
        capsys.readouterr()  # the head of the table
        for i in range(3):
            yield bench.row(f"row {i}", 2000.0 * i, 1000.0, "images/s", "another")
            shown = capsys.readouterr().out.split()
            assert shown == [
                "row",
                str(i),
                f"{2000.0 * i:,.2f}",
                "1,000.00",
                f"{2 * i}.00",
                "images/s",
                "another",
            ]

    bench.print_rows(rows())


def test_a_profile_names_the_operators_of_a_step_and_their_share(monkeypatch):
    monkeypatch.setattr(profiling, "STEPS", 2)
    config = study("smoke").run
    found = profiling.profile_step(config, runs.load_dataset(config), top=1000)
    assert (
        found.operators.share.sum() == pytest.approx(1)
        and found.operators.ms.is_monotonic_decreasing
    )
    assert found.operators.ms.sum() == pytest.approx(found.busy)
    names = set(found.operators.operator)
    assert any("convolution" in name for name in names) and any(
        "NllLossBackward" in name for name in names
    )
    assert {"aten::add_", "aten::index_select"} <= names  # the SGD step, and the batch
    head, *lines = str(found).splitlines()
    assert head == f"{found.wall:.2f} ms a step" and len(lines) == 1 + len(found.operators)
