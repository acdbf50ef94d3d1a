"""The main job on real text: train, prune, evaluate, compare. Needs the extra `nlp`."""

from __future__ import annotations

from .data import builtin, export, load_examples, save_examples
from .training import PruneArgs, TrainArgs, evaluate, prune, train

__all__ = [
    "PruneArgs",
    "TrainArgs",
    "builtin",
    "evaluate",
    "export",
    "load_examples",
    "prune",
    "save_examples",
    "train",
]
