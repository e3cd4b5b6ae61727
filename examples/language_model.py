"""A small transformer language model on Python's own sources: AdamW, a cosine schedule.

python examples/language_model.py          trains three seeds, plain PyTorch, and keeps snapshots
make 03_one_step OWN=examples/language_model.py    looks at them; so do others, see docs/your-own.md
"""

import math
import sysconfig
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from paper_lib import data, presets, runs
from paper_lib.files import folder

PLACE = folder("runs") / "examples" / "language_model"
SEEDS, STEPS, RECORD = (0, 1, 2), 1000, "0-50,100-1000/25,600-700"
LENGTH, BATCH, PEAK, DECAY = 64, 16, 2e-3, 0.1
TRAIN, TEST = ("a", "r"), ("r", "z")  # files by name


class Sources(Dataset):
    """Stretches of bytes of the standard library's files, each with the bytes that follow them."""

    def __init__(self, first: str, last: str):
        library = Path(sysconfig.get_path("stdlib"))
        chosen = sorted(p for p in library.glob("*.py") if first <= p.name < last)
        text = b"".join(path.read_bytes() for path in chosen)
        self.bytes = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()

    def __len__(self):
        return (len(self.bytes) - 1) // LENGTH

    def __getitem__(self, i):
        piece = self.bytes[i * LENGTH : (i + 1) * LENGTH + 1]
        return piece[:-1], piece[1:]


class LanguageModel(nn.Module):
    """Two layers of causal attention over bytes."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.byte, self.place = nn.Embedding(256, width), nn.Embedding(LENGTH, width)
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 256)

    def forward(self, tokens):
        x = self.byte(tokens) + self.place.weight[: tokens.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], tokens.device)
        return self.head(self.layers(x, mask=mask, is_causal=True))


def loaders():
    train, test = Sources(*TRAIN), Sources(*TEST)
    return DataLoader(train, BATCH, shuffle=True, drop_last=True), DataLoader(test, BATCH)


def rate(step: int) -> float:
    """A short warm-up, then a cosine to zero."""
    return PEAK * min(1, (step + 1) / 50) * (1 + math.cos(math.pi * step / STEPS)) / 2


def train(seed: int) -> None:
    """A training loop as anybody's, with the two lines that keep snapshots."""
    torch.manual_seed(seed)
    net, (loader, _) = LanguageModel(), loaders()
    optimizer = torch.optim.AdamW(net.parameters(), lr=PEAK, weight_decay=DECAY)
    snapshots = runs.Snapshots(PLACE / f"seed{seed}", RECORD)
    batches = iter(loader)
    for step in tqdm(range(STEPS), desc=f"seed {seed}"):
        batch = next(batches, None)
        if batch is None:
            batches = iter(loader)
            batch = next(batches)
        snapshots.keep(step, net, batch)
        optimizer.param_groups[0]["lr"] = rate(step)
        loss = nn.functional.cross_entropy(net(batch[0]).flatten(0, 1), batch[1].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    snapshots.keep(STEPS, net)


def study():
    """What the notebooks look at: a run for each seed."""
    dataset = data.from_loaders(*loaders(), held_out=2000, name="sources")
    settings = {"lr": [rate(step) for step in range(STEPS)], "batch_size": BATCH}
    finished = [
        runs.from_checkpoints(
            PLACE / f"seed{seed}", dataset, LanguageModel, seed=seed, optimizer="AdamW", **settings
        )
        for seed in SEEDS
    ]
    return presets.finished(finished, label="a language model, AdamW")


if __name__ == "__main__":
    for seed in SEEDS:
        train(seed)
