"""Which kernels work on this machine, and why the others do not."""

from __future__ import annotations

import torch


def cpu_unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """None where the C++ kernels can run, else the reason in words."""
    return "the C++ extension was not built"


def cpu_isa(dtype: torch.dtype) -> str:
    """Instruction set that the C++ kernels use for dtype."""
    return "portable"
