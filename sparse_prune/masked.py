"""Training a linear layer that is pruned already: its weight stays dense, and its products skip the blocks that are zero.

What a Pruner masks is an nn.Linear whose pruned blocks hold zeros, and dense products multiply them all. From some density on the
block-sparse kernels are faster, at the price of copying the kept blocks out of the weight on each call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import backends, ops

# Of a layer's blocks. For 4096 rows and 256 to 1024, y and dx of 32x32 blocks on two threads with AVX2 took a third of dense's time
# at density .2, two thirds at .5, five sixths at .7; small blocks and other machines gain less.
MOST_DENSITY = 0.5
LEAST_BLOCK = 16  # inputs and outputs: the kernels of lower and narrower blocks break even at a lower density


@dataclass(frozen=True)
class KeptBlocks:
    """Where the kept blocks of a weight [N, K] lie: the indices of BsrWeight, and each block's row beside its column."""

    blocksize: tuple[int, int]
    crow_indices: Tensor  # int32 [N/R + 1]
    col_indices: Tensor  # int32 [nnzb]
    rows: Tensor  # int64 [nnzb]
    cols: Tensor  # int64 [nnzb]

    @classmethod
    def from_mask(cls, mask: Tensor, blocksize: tuple[int, int]) -> KeptBlocks:
        """mask: bool [N/R, K/C], True = kept."""
        rows, cols = mask.nonzero(as_tuple=True)
        crow = F.pad(mask.sum(1).cumsum(0), (1, 0)).int()
        return cls(blocksize, crow, cols.int(), rows, cols)

    def grid(self, weight: Tensor) -> Tensor:
        """weight [N, K] seen as [N/R, R, K/C, C]."""
        return weight.unflatten(1, (-1, self.blocksize[1])).unflatten(0, (-1, self.blocksize[0]))

    def of(self, weight: Tensor) -> Tensor:
        """The kept blocks, [nnzb, R, C]."""
        return self.grid(weight)[self.rows, :, self.cols]


class _Linear(torch.autograd.Function):
    """y = x @ W^T + b; whole says that dW is wanted of every block, also of those that are pruned."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, kept: KeptBlocks, whole: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.kept, ctx.whole = kept, whole
        index, values = (kept.crow_indices, kept.col_indices), kept.of(weight).to(x.dtype)  # [nnzb, R, C]
        return torch.ops.sparse_prune.bsr_linear(x, *index, values, None, weight.shape[0], bias, "none", None)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple:
        (x, weight), kept = ctx.saved_tensors, ctx.kept
        dy = grads[0].contiguous()  # [M, N]
        index = (kept.crow_indices, kept.col_indices)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dx = dweight = None
        if needs_x:
            # The blocks are copied once more: kept from forward, gradients of gradients would not reach the weight.
            values = kept.of(weight).to(x.dtype)  # [nnzb, R, C]
            dx = torch.ops.sparse_prune.bsr_linear_dx(dy, *index, values, weight.shape[1])
        if needs_weight and ctx.whole:
            dweight = (dy.t() @ x).to(weight.dtype)  # [N, K]
        elif needs_weight:
            blocks = torch.ops.sparse_prune.bsr_sdd(dy, x, *index, *kept.blocksize)  # [nnzb, R, C]
            dweight = dy.new_zeros(weight.shape, dtype=weight.dtype)
            kept.grid(dweight)[kept.rows, :, kept.cols] = blocks.to(weight.dtype)
        return dx, dweight, dy.sum(0) if needs_bias else None, None, None


def runs_masked(module: nn.Module, mask: Tensor, blocksize: tuple[int, int]) -> bool:
    """Whether skipping what the mask drops is expected to pay for this layer here, and its forward is its own."""
    weight = module.weight
    return (
        type(module) is nn.Linear
        and type(weight) is nn.Parameter
        and weight.device.type == "cpu"
        and backends.cpu_unavailable(weight.device, weight.dtype) is None
        and min(blocksize) >= LEAST_BLOCK
        and weight.shape[0] % blocksize[0] == 0
        and weight.shape[1] % blocksize[1] == 0
        and float(mask.float().mean()) <= MOST_DENSITY
    )


def masked_linear(module: nn.Linear, kept: KeptBlocks, whole: bool, x: Tensor) -> Tensor:
    """module(x) for x [..., K] -> [..., N], where every block of its weight but the kept ones is zero.

    Only in training on a CPU: elsewhere, under torch.compile and torch.func the dense product runs.
    """
    weight, bias = module.weight, module.bias
    dense = (
        not module.training
        or not x.is_cpu
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
    )
    dtype = x.dtype
    # As for nn.Linear, float64 is not cast.
    if torch.is_autocast_enabled("cpu") and torch.float64 not in (x.dtype, weight.dtype):
        dtype = torch.get_autocast_dtype("cpu")
    elif x.dtype != weight.dtype:
        dense = True  # which says what is wrong
    if dense or x.shape[-1:] != (module.in_features,):
        return F.linear(x, weight, bias)
    rows = ops.flatten_rows(x.to(dtype))  # [M, K]
    y = _Linear.apply(rows, weight, None if bias is None else bias.to(dtype), kept, whole)
    return y.view(*x.shape[:-1], module.out_features)
