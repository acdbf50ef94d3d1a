"""Tile sizes, chosen from the problem by rules whose reasons stand beside them.

The rules come from arithmetic and from what ptxas reports (registers, spills, shared memory); no GPU has timed them yet.
"""

from __future__ import annotations

from dataclasses import dataclass

GROUP_M = (
    8  # eight tiles of 128 rows and 4096 inputs are 8 MB in bfloat16, which stays in L2 (40 MB on A100) from row to row
)
SHARED_LIMIT = 99 * 1024  # bytes a program may have on sm_86, sm_89 and sm_120; sm_80 and sm_90 have more


@dataclass(frozen=True)
class LinearConfig:
    """Tiling of y = x @ W^T over a weight whose blocks span side_n outputs and side_k inputs.

    block_m      rows of x that a program covers
    block_k      inputs in one step of the loop; divides side_k
    group_m      row tiles that pass over a block-row one after another, so that its blocks come from L2
    num_warps    warps of a program
    num_stages   depth of the software pipeline: tiles on their way while one is multiplied
    """

    block_m: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class SddConfig:
    """Tiling of one stored block of dy^T @ x: block_m rows of dy and x in one step; warps and stages as in LinearConfig."""

    block_m: int
    num_warps: int
    num_stages: int


def linear_config(m: int, side_n: int, side_k: int, itemsize: int) -> LinearConfig:
    """Tiles for m rows; itemsize is 2 for float16 and bfloat16, 4 for float32."""
    # float32 is multiplied outside the tensor cores, with whole operand tiles in registers: 64 x 16 is what fits unspilled.
    tallest, widest = (128, 64) if itemsize == 2 else (64, 16)
    # The fewest wasted rows, from 16, the least that tensor cores take.
    block_m = min(max(16, 1 << (m - 1).bit_length()), tallest)
    # 64 two-byte inputs are one 128-byte line of x and of the block, and one swizzle of shared memory.
    block_k = min(side_k, widest)
    # Four warps of 32 x 128 accumulators take 128 registers a thread, which leaves too few of 255 for the operands of 128 x 128.
    # In float32 the operands take as many again: with four warps ptxas spilled at 64 x 32 and stood at 254 registers at 64 x 128.
    num_warps = 8 if block_m * side_n >= 128 * 128 or (itemsize == 4 and block_m == tallest) else 4
    return LinearConfig(block_m, block_k, GROUP_M, num_warps, _stages((block_m + side_n) * block_k * itemsize))


def sdd_config(r: int, c: int, itemsize: int) -> SddConfig:
    """Tiles for blocks of r x c."""
    block_m = 64 if itemsize == 2 else 16  # as block_k above: m is what this product sums over
    num_warps = 8 if r * c >= 128 * 128 else 4  # as above: 128 x 128 accumulators
    return SddConfig(block_m, num_warps, _stages((r + c) * block_m * itemsize))


def _stages(bytes_per_stage: int) -> int:
    """Four stages cover the latency of an indirect load (column, then tile); fewer where shared memory ends first."""
    return max(2, min(4, SHARED_LIMIT // bytes_per_stage))
