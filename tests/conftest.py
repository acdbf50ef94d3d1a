"""What all tests share: one thread count, and tensors that start as NaN so that an unwritten output shows."""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch

os.environ["SPARSE_PRUNE_TUNING"] = "off"  # kernels are what tests test; tests of the planner choose a table
os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported: no test asks a hub

# A busy machine makes any deadline a coin toss.
hypothesis.settings.register_profile("any-speed", deadline=None)
hypothesis.settings.load_profile("any-speed")


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """torch.empty gives NaN: deterministic mode fills it, and only warns where an op has no deterministic form."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
