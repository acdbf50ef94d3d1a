"""Block masks: a boolean grid over a weight, True where a block is kept.

A weight W[N, K] cut into blocks of (R, C) has a grid of ceil(N/R) x ceil(K/C) blocks; blocks at the lower and right edge may be
cut short. Every granularity is a block size: an element is (1, 1), a row (1, K), a column (N, 1), the rows of one attention head
(head_dim, K).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import SparsePruneError


def check_blocksize(blocksize: Sequence[int], shape: Sequence[int] | None = None) -> tuple[int, int]:
    """Return blocksize as (R, C).

    Raises SparsePruneError when it is not two positive integers, or, where the shape (N, K) of a weight is given, when a block is
    larger than the weight in both directions, so that there would be nothing to choose between.
    """
    try:
        block_rows, block_cols = blocksize
        valid = int(block_rows) == block_rows >= 1 and int(block_cols) == block_cols >= 1
    except (TypeError, ValueError, OverflowError):
        valid = False
    if not valid:
        raise SparsePruneError(
            "blocksize", "two positive integers (R, C)", blocksize, "pass for example blocksize=(32, 32)"
        )
    block_rows, block_cols = int(block_rows), int(block_cols)
    if (
        shape is not None
        and block_rows >= shape[0]
        and block_cols >= shape[1]
        and (block_rows, block_cols) != tuple(shape)
    ):
        raise SparsePruneError(
            "blocksize",
            f"a block that fits a weight of shape {tuple(shape)}",
            (block_rows, block_cols),
            "choose smaller blocks",
        )
    return block_rows, block_cols


def check_density(density: float, argument: str = "density") -> float:
    """Return density as a float; raises SparsePruneError, which names the argument, unless 0 < density <= 1."""
    try:
        value = float(density)
    except (TypeError, ValueError):
        value = math.nan
    if not 0.0 < value <= 1.0:
        raise SparsePruneError(argument, "a kept fraction in (0, 1]", density, "pass for example 0.2 to keep a fifth")
    return value


def grid_shape(shape: Sequence[int], blocksize: Sequence[int]) -> tuple[int, int]:
    """Blocks per direction, (ceil(N/R), ceil(K/C)), of a weight of shape (N, K)."""
    (n, k), (r, c) = shape, blocksize
    return -(-n // r), -(-k // c)


def pad_to_blocks(matrix: Tensor, blocksize: Sequence[int]) -> Tensor:
    """matrix[N, K] zero-padded on the right and at the bottom to whole blocks, as [N/R, R, K/C, C]; a view where it fits."""
    rows, cols = grid_shape(matrix.shape, blocksize)
    r, c = blocksize
    missing = (0, cols * c - matrix.shape[1], 0, rows * r - matrix.shape[0])
    if any(missing):  # pad copies even where it adds nothing
        matrix = torch.nn.functional.pad(matrix, missing)
    return matrix.reshape(rows, r, cols, c)


def block_sum(matrix: Tensor, blocksize: Sequence[int]) -> Tensor:
    """Sum of matrix[N, K] over each block, [ceil(N/R), ceil(K/C)]; a cut block sums what it has."""
    return pad_to_blocks(matrix, blocksize).sum((1, 3))


def block_elements(shape: Sequence[int], blocksize: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Elements of each block of a weight of shape (N, K), float64 [ceil(N/R), ceil(K/C)]: fewer where an edge cuts it."""
    sides = []
    for size, step, count in zip(shape, blocksize, grid_shape(shape, blocksize), strict=True):
        side = torch.full((count,), step, dtype=torch.float64, device=device)
        side[-1] = size - (count - 1) * step
        sides.append(side)
    return torch.outer(*sides)


def block_mean(matrix: Tensor, blocksize: Sequence[int]) -> Tensor:
    """Mean of matrix[N, K] over each block, [ceil(N/R), ceil(K/C)], of the elements that a cut block has."""
    return block_sum(matrix, blocksize) / block_elements(matrix.shape, blocksize, matrix.device).to(matrix.dtype)


def check_mask(block_mask: Tensor, shape: Sequence[int], blocksize: Sequence[int]) -> Tensor:
    """Return block_mask; raises SparsePruneError unless it is a bool tensor of grid_shape(shape, blocksize)."""
    expected = grid_shape(shape, blocksize)
    if not isinstance(block_mask, Tensor) or block_mask.dtype != torch.bool or tuple(block_mask.shape) != expected:
        got = (
            f"{block_mask.dtype} {tuple(block_mask.shape)}"
            if isinstance(block_mask, Tensor)
            else type(block_mask).__name__
        )
        raise SparsePruneError(
            "block_mask",
            f"a bool tensor of shape {expected} for a weight of shape {tuple(shape)} in {blocksize[0]}x{blocksize[1]} blocks",
            got,
            "make it with sparse_prune.block_mask(weight, blocksize, density)",
        )
    return block_mask


def expand_mask(block_mask: Tensor, blocksize: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Element mask bool[N, K] of a block mask bool[ceil(N/R), ceil(K/C)]."""
    check_mask(block_mask, shape, blocksize)
    (n, k), (r, c) = shape, blocksize
    return block_mask.repeat_interleave(r, 0)[:n].repeat_interleave(c, 1)[:, :k]


def element_density(block_mask: Tensor, blocksize: Sequence[int], shape: Sequence[int]) -> float:
    """Kept elements over all elements of a weight of shape (N, K); not the density of blocks where edge blocks are cut."""
    check_mask(block_mask, shape, blocksize)
    elements = block_elements(shape, blocksize, block_mask.device)
    return float((elements * block_mask).sum() / elements.sum())


def block_density(nnzb: int, shape: Sequence[int], blocksize: Sequence[int]) -> float:
    """Kept blocks over all blocks of a weight of shape (N, K): what the planner goes by."""
    rows, cols = grid_shape(shape, blocksize)
    return nnzb / (rows * cols)


def top_mask(saliency: Tensor, density: float) -> Tensor:
    """Keep the max(1, round(density * numel)) entries of highest saliency; ties go to the lower index.

    Raises SparsePruneError on NaN saliency: a mask chosen by NaN is arbitrary.
    """
    density = check_density(density)
    if torch.isnan(saliency).any():
        raise SparsePruneError("saliency", "numbers", "NaN", "check the weights and gradients for NaN before pruning")
    keep = max(1, round(density * saliency.numel()))
    order = torch.sort(saliency.flatten(), descending=True, stable=True).indices
    mask = torch.zeros(saliency.numel(), dtype=torch.bool, device=saliency.device)
    mask[order[:keep]] = True
    return mask.view(saliency.shape)


@dataclass(frozen=True)
class BlockFill:
    """How blocks of one size would cover the nonzeros of a matrix.

    blocksize   (R, C)
    density     fraction of blocks that hold a nonzero: what BSR storage and time are proportional to
    fill        nonzeros over elements of those blocks; 1 means that nothing but nonzeros would be stored
    """

    blocksize: tuple[int, int]
    density: float
    fill: float


# Sizes that the kernels run well, largest area first: of two that store the same elements, the larger runs faster.
DETECTED_SIZES = (
    *((128, 128), (128, 64), (64, 128), (64, 64), (64, 32), (32, 64), (32, 32), (128, 16), (64, 16), (16, 64)),
    *((32, 16), (16, 32), (16, 16), (32, 8), (8, 32), (16, 8), (8, 16), (8, 8), (4, 4)),
)


def block_fills(weight: Tensor) -> list[BlockFill]:
    """BlockFill of a matrix [N, K] for each size in DETECTED_SIZES that is no larger than the matrix, in that order."""
    if not isinstance(weight, Tensor) or weight.ndim != 2 or 0 in weight.shape:
        got = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise SparsePruneError("weight", "a matrix [N, K]", got, "pass layer.weight of an nn.Linear")
    nonzero = (weight.detach() != 0).float()
    total, fills = float(nonzero.sum()), []
    for r, c in DETECTED_SIZES:
        if r <= weight.shape[0] and c <= weight.shape[1]:
            held = block_sum(nonzero, (r, c)) > 0
            stored = element_density(held, (r, c), weight.shape) * weight.numel()
            fills.append(BlockFill((r, c), float(held.float().mean()), total / stored if stored else 1.0))
    return fills


def suggest_blocksize(weight: Tensor, min_fill: float = 0.95) -> BlockFill | None:
    """The largest block size whose kept blocks hold at least min_fill nonzeros, for a matrix that was pruned elsewhere.

    None where no size from 8x8 up leaves out blocks and is that full: the zeros are then scattered (unstructured or 2:4 pruning)
    and packing them in blocks would store them. Raises SparsePruneError for anything but a matrix.
    """
    for found in block_fills(weight):
        if found.fill >= min_fill and found.density < 1 and found.blocksize[0] * found.blocksize[1] >= 64:
            return found
    return None
