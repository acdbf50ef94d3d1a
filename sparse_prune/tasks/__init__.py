"""The main job on real text: train, prune, evaluate, compare. Needs the extra `nlp`."""

from __future__ import annotations

from .ablation import AblationArgs, ablation
from .baseline import BaselineArgs, baseline
from .data import builtin, export, load_examples, save_examples
from .demo import DemoArgs, demo
from .packing import PackResult, pack
from .training import PruneArgs, TrainArgs, evaluate, prune, train

__all__ = [
    "AblationArgs",
    "BaselineArgs",
    "DemoArgs",
    "PackResult",
    "PruneArgs",
    "TrainArgs",
    "ablation",
    "baseline",
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
