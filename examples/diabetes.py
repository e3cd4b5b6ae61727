"""A small regression network on scikit-learn's diabetes data: mean squared error, SGD.

python examples/diabetes.py                      trains three seeds and keeps snapshots
make 03_one_step OWN=examples/diabetes.py        looks at them; so do others, see docs/your-own.md
"""

import torch
from sklearn.datasets import load_diabetes
from torch import nn
from tqdm import tqdm

from paper_lib import data, presets, runs
from paper_lib.files import folder

PLACE = folder("runs") / "examples" / "diabetes"
SEEDS, STEPS, RECORD = (0, 1, 2), 3000, "0-50,100-3000/50,2000-2200"
BATCH, LR, DECAY = 32, 0.05, 1e-3


def net():
    return nn.Sequential(
        nn.Linear(10, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)
    )


def samples():
    """Inputs (442, 10) and the disease's progression a year later (442, 1), standardized."""
    x, y = (torch.tensor(array).float() for array in load_diabetes(return_X_y=True))
    x, y = x / x.std(0), (y - y.mean()) / y.std()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order], y[order, None]


def train(seed: int) -> None:
    torch.manual_seed(seed)
    network, (x, y) = net(), samples()
    x, y = x[:-100], y[:-100]  # the last 100 are for testing
    optimizer = torch.optim.SGD(network.parameters(), lr=LR, weight_decay=DECAY)
    snapshots = runs.Snapshots(PLACE / f"seed{seed}", RECORD)
    for step in tqdm(range(STEPS), desc=f"seed {seed}"):
        chosen = torch.randint(len(x), (BATCH,))
        snapshots.keep(step, network, (x[chosen], y[chosen]))
        loss = nn.functional.mse_loss(network(x[chosen]), y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    snapshots.keep(STEPS, network)


def study():
    """What the notebooks look at: a run for each seed."""
    x, y = samples()
    split = x[:-100], y[:-100], x[-100:], y[-100:]
    dataset = data.from_tensors(*split, held_out=100, name="diabetes", loss="mse")
    settings = {"lr": LR, "batch_size": BATCH, "weight_decay": DECAY}
    finished = [
        runs.from_checkpoints(PLACE / f"seed{seed}", dataset, net, seed=seed, **settings)
        for seed in SEEDS
    ]
    return presets.finished(finished, label="diabetes, a regression")


if __name__ == "__main__":
    for seed in SEEDS:
        train(seed)
