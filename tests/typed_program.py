"""A user's program, for test_types.py to check: what the public names return, and mistakes that a type checker must see."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import sparse_prune as sp

model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64))
linear = nn.Linear(64, 96)

mask = sp.block_mask(linear.weight, blocksize=(32, 32), density=0.5)
assert_type(mask, Tensor)
packed = sp.BsrWeight.from_dense(linear.weight, mask, (32, 32))
assert_type(packed, sp.BsrWeight)
assert_type(packed.density, float)
assert_type(packed.shape, tuple[int, int])
assert_type(packed.to_dense(), Tensor)
assert_type(sp.bsr_linear(torch.randn(4, 64), packed, activation="gelu"), Tensor)
assert_type(sp.backend_for(torch.device("cpu"), torch.float32), str)

layer = sp.SparseLinear.from_dense(linear, mask)
assert_type(layer, sp.SparseLinear)
assert_type(layer.packed, sp.BsrWeight)
assert_type(layer.values, nn.Parameter)
assert_type(layer.bias, nn.Parameter | None)
assert_type(layer.blocksize, tuple[int, int])
assert_type(layer.to_dense(), nn.Linear)

optimizer = torch.optim.AdamW(model.parameters())
pruner = sp.Pruner(model, sp.PruneConfig(density=0.5, total_steps=2)).attach(optimizer)
assert_type(pruner, sp.Pruner)
assert_type(pruner.masks, dict[str, Tensor])
result = sp.sparsify_(model, sp.BlockSparseConfig(density=0.5, max_density=1.0))
assert_type(result, sp.SparsifyResult)
assert_type(result.converted, list[str])
assert_type(result.kept_dense, dict[str, str])
assert_type(sp.quantize_(model), sp.QuantizeResult)


def save_and_load(path: Path) -> None:
    assert_type(sp.save_packed(model, path), Path)
    assert_type(sp.load_packed(model, path), nn.Sequential)


def mistakes() -> None:
    sp.block_mask(linear.weight, density="0.5")  # type: ignore[arg-type]
    sp.bsr_linear(torch.randn(4, 64), packed, activation="tanh")  # type: ignore[arg-type]
    sp.BlockSparseConfig(blocksize=(32, 32, 32))  # type: ignore[arg-type]
    sp.SparseLinear.from_dense(nn.ReLU(), mask)  # type: ignore[arg-type]
    result.densities  # type: ignore[attr-defined]  # noqa: B018
