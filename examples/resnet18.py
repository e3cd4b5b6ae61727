"""torchvision's ResNet-18, trained on some digits and fine-tuned on others with frozen layers.

python examples/resnet18.py                      trains three seeds and keeps snapshots, 1 GB each
make 03_one_step OWN=examples/resnet18.py        looks at them; so do others, see docs/your-own.md

A network that was trained on ImageNet would be downloaded: weights="DEFAULT" in place of `begun`.
"""

import functools

import torch
from sklearn.datasets import load_digits
from torch import nn
from torchvision.models import resnet18
from tqdm import tqdm

from paper_lib import data, presets, runs
from paper_lib.files import folder

PLACE = folder("runs") / "examples" / "resnet18"
SEEDS, STEPS, RECORD = (0, 1, 2), 400, "0-10,20-50/10,100-400/50,300-320"
BATCH, LR, MOMENTUM, DECAY = 32, 0.02, 0.9, 1e-4


def digits(first: int, last: int):
    """Images (N, 3, 32, 32) of the digits first..last, and labels from 0 up."""
    x, y = map(torch.tensor, load_digits(return_X_y=True))
    chosen = (first <= y) & (y <= last)
    images = (x[chosen].float() / 16).view(-1, 1, 8, 8)
    images = nn.functional.interpolate(images, scale_factor=4, mode="bilinear")
    return images.expand(-1, 3, -1, -1).contiguous(), y[chosen] - first


def take_steps(network, optimizer, x, y, steps, keep=lambda *step: None):
    for step in tqdm(range(steps)):
        chosen = torch.randint(len(x), (BATCH,))
        batch = x[chosen], y[chosen]
        keep(step, network, batch)
        loss = nn.functional.cross_entropy(network(batch[0]), batch[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    keep(steps, network)


def net():
    """ResNet-18 of which the last block and the classifier are trained."""
    network = resnet18(num_classes=5)
    for name, parameter in network.named_parameters():
        parameter.requires_grad = name.startswith(("layer4.1", "fc"))
    return network


@functools.cache
def begun():
    """The state after training all layers on the digits 0 to 4."""
    network = resnet18(num_classes=5)
    optimizer = torch.optim.SGD(network.parameters(), lr=LR, momentum=MOMENTUM)
    take_steps(network, optimizer, *digits(0, 4), STEPS // 2)
    return network.state_dict()


def train(seed: int) -> None:
    torch.manual_seed(0)
    state = begun()
    torch.manual_seed(seed)
    network, (x, y) = net(), digits(5, 9)
    network.load_state_dict(state)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
    snapshots = runs.Snapshots(PLACE / f"seed{seed}", RECORD)
    take_steps(network, optimizer, x[:-200], y[:-200], STEPS, snapshots.keep)


def study():
    """What the notebooks look at: a run for each seed."""
    x, y = digits(5, 9)
    split = x[:-200], y[:-200], x[-200:], y[-200:]
    dataset = data.from_tensors(*split, held_out=200, name="digits 5 to 9")
    settings = {"lr": LR, "batch_size": BATCH, "momentum": MOMENTUM, "weight_decay": DECAY}
    finished = [
        runs.from_checkpoints(PLACE / f"seed{seed}", dataset, net, seed=seed, **settings)
        for seed in SEEDS
    ]
    return presets.finished(finished, label="ResNet-18, fine-tuned")


if __name__ == "__main__":
    for seed in SEEDS:
        train(seed)
