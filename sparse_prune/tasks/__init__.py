"""The main job on real text: train, prune, evaluate, compare. Needs the extra `nlp`."""

from __future__ import annotations

from .ablation import AblationArgs, ablation
from .data import builtin, export, load_examples, save_examples
from .demo import DemoArgs, demo
from .packing import PackResult, pack
from .training import PruneArgs, TrainArgs, evaluate, prune, train

__all__ = [
    "AblationArgs",
    "DemoArgs",
    "PackResult",
    "PruneArgs",
    "TrainArgs",
    "ablation",
    "builtin",
    "demo",
    "evaluate",
    "export",
    "load_examples",
    "pack",
    "prune",
    "save_examples",
    "train",
]
