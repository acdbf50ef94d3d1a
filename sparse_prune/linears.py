"""Linear layers as people spell them: nn.Linear holds W[N, K]; Hugging Face's Conv1D (GPT-2) does the same with W^T[K, N]."""

from __future__ import annotations

import sys
from typing import TypeGuard

from torch import Tensor, nn

from .errors import SparsePruneError


def is_conv1d(module: nn.Module) -> bool:
    """Whether module is transformers' Conv1D; imports nothing, since without transformers there is none."""
    home = sys.modules.get("transformers.pytorch_utils")
    return home is not None and isinstance(module, home.Conv1D)


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether module is an nn.Linear or a Conv1D, which type checkers take for one: only weight and bias are read of both."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def linear_modules(model: nn.Module) -> dict[str, nn.Linear]:
    """Name -> module of every linear layer in model, in module order."""
    return {name: module for name, module in model.named_modules() if is_linear(module)}


def as_matrix(module: nn.Module, tensor: Tensor) -> Tensor:
    """A tensor of the shape of module.weight (the weight, its gradient, optimizer state) as [N, K]: a view to read and write."""
    return tensor.t() if is_conv1d(module) else tensor


def matrix_shape(module: nn.Linear) -> tuple[int, int]:
    """(N, K): out_features, in_features."""
    rows, columns = module.weight.shape
    return (columns, rows) if is_conv1d(module) else (rows, columns)


def check_there(name: str, weight: Tensor) -> None:
    """Raise SparsePruneError where the weight of the layer of that name is on the meta device: there is nothing to prune."""
    if weight.is_meta:
        raise SparsePruneError(
            f"{name}.weight", "numbers", "none, on the meta device", "load the model's weights first"
        )
