"""The floor of a training step: FLOPs counted by hand, and a rate that is positive."""

import torch

from paper_lib import bench, runs
from paper_lib.presets import study


def test_the_flops_of_a_step_are_those_of_its_convolutions():
    """ResNet-8 at 8 x 8: twice the multiplications forward; backward as many again for weights and for inputs."""
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
