"""The layout that the CUDA C++ kernels read on Hopper: block-rows in the order of a cluster's tiles, values as wgmma reads them.

One flat tensor of bytes, derived from the index and the values on the device of the weight; never saved. It serves the kernel for
sm_90a (csrc/cuda/bsr_linear_sm90.cuh) and, up to 64 tokens, the one of the sm_80 family that is for few (bsr_linear_skinny.cuh).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .config import Gpu
from .cuda import whole_vectors
from .plan import once, places, row_order, with_no_row

ROWS = 128  # outputs that a block of the grid makes: two warpgroups of 64
LINE = 64  # inputs of a line at most
CLUSTER = 4  # blocks that share x: more share more, but fewer clusters fit on the SMs of a GPU processing cluster
# How many run at once on an H100: its 132 SMs lie in processing clusters of 16 and 18, which no cluster of blocks crosses.
CLUSTERS = {1: 132, 2: 66, 4: 32}


@dataclass(frozen=True)
class ClusterPlan:
    """The index of a weight, merged for clusters of blocks.

    A block of the grid makes ROWS outputs: P = ROWS / R places for block-rows. A group is what a cluster of G blocks makes
    together; it walks over the union of its block-rows' columns in lines of LINE inputs at most, so a wide column is several.

    cluster   G
    groups    T, number of groups
    lines     U, of all groups; every group has at least one
    table     int32, flat:  [T + 1] first line of each group, U at the end
                            [T, G, P] block-row, -1 for none
                            [U, 2] first input; bit g: block g has something to multiply there
                            [U, G, P] place in the values, counted in chunks of R x LINE numbers, -1 for none
    filled    part of all columns that the groups, the blocks and the warpgroups have something to multiply at:
              what is loaded from L2, what is written to shared memory, and what is multiplied, per input
    """

    cluster: int
    groups: int
    lines: int
    table: Tensor
    filled: tuple[float, float, float]


@dataclass(frozen=True)
class Layout:
    """What a weight is packed with, for every set of values with this index.

    transposed  whether it is of W^T: whose outputs are the inputs of values
    plan     for clusters of blocks
    tables   int32, flat: plan.table; [rows + 1] where each row's pieces begin, a row being min(R, 64) outputs; struct Piece
             [nnzb * R * C / (16 * row)]: column of 16 inputs, first unit. Each of these begins at a multiple of 16 bytes.
    """

    transposed: bool
    plan: ClusterPlan
    tables: Tensor

    def pack(self, values: Tensor) -> Tensor:
        """uint8 [2 * nnzb * R * C + 4 * len(tables)]: weights, then tables. Queued on the device, which is not waited for."""
        size = 2 * values.numel()
        packed = torch.empty(size + 4 * len(self.tables), dtype=torch.uint8, device=values.device)
        ordered = fragment_order(values.mT if self.transposed else values)
        packed[:size].view(values.dtype).view(ordered.shape).copy_(ordered)
        packed[size:] = self.tables.view(torch.uint8)
        return packed


def layout_of(crow_indices: Tensor, col_indices: Tensor, k: int, r: int, c: int, transposed: bool) -> Layout:
    """make_layout's, made once for an index."""
    key = ("sm_90", k, r, c, transposed)
    return once(key, crow_indices, col_indices, lambda: make_layout(crow_indices, col_indices, *key[1:]))


def make_layout(
    crow_indices: Tensor,
    col_indices: Tensor,
    k: int,
    r: int,
    c: int,
    transposed: bool = False,
    cluster: int | None = None,
) -> Layout:
    """The layout of a weight of k inputs in blocks r x c, sides in {16, 32, 64, 128}, or of its transpose, for clusters of as many
    blocks as it fills unless given. Reads the index on the host, so a GPU is waited for.
    """
    slots = places(crow_indices, col_indices, -(-k // c))  # [block-rows, block-columns]
    if transposed:
        slots, k, r, c = slots.T, len(slots) * r, c, r
    plan = make_cluster_plan(slots, k, (r, c), cluster or cluster_of(len(slots) * r))
    row = min(r, 64)
    parts, units = r // row, c // 16  # rows of a block-row, columns of 16 inputs of a block
    rows, columns = (slots >= 0).nonzero(as_tuple=True)  # [nnzb] each, by row
    column = columns[:, None] * units + torch.arange(units)  # [nnzb, units]
    first = (slots[rows, columns, None].long() * units + torch.arange(units)) * (r // 16)  # [nnzb, units]
    part = torch.arange(parts)[:, None, None]
    owner = ((rows * parts)[:, None] + part).expand(parts, *first.shape).flatten()  # [parts * nnzb * units]
    pieces = torch.stack([column.expand(parts, *first.shape), first + part * (row // 16)], 3).view(-1, 2)
    order = owner.argsort(stable=True)
    starts = torch.searchsorted(owner[order], torch.arange(len(slots) * parts + 1))
    sections = (whole_vectors(plan.table), whole_vectors(starts), pieces[order].flatten())
    tables = torch.cat([section.to(torch.int32) for section in sections])
    return Layout(transposed, plan, tables.to(crow_indices.device))


def line_of(c: int) -> int:
    return min(c, LINE)


def cluster_of(n: int) -> int:
    """As many blocks as a weight of n outputs fills, up to CLUSTER."""
    blocks = -(-n // ROWS)
    return next(size for size in (CLUSTER, 2, 1) if size <= max(1, blocks))


def fragment_order(values: Tensor) -> Tensor:
    """values [nnzb, R, C], two bytes each -> [nnzb, C / 16, R / 16, 32, 8]: 16 x 16 as the warp's lanes hold it, 16 bytes each.

    Registers of the A fragment of m16n8k16 (PTX ISA), rows permuted so that the sums of a lane, transposed in the epilogue, are
    four adjacent outputs: output 4 q + 2 h + e is row 2 q + e of half h.
    """
    b, r, c = values.shape
    split = values.unflatten(2, (c // 16, 2, 4, 2)).unflatten(
        1, (r // 16, 4, 2, 2)
    )  # R/16, q, h, e, C/16, half of k, t, pair
    return split.permute(0, 5, 1, 2, 4, 7, 6, 3, 8).flatten(6).flatten(3, 5)


def make_cluster_plan(slots: Tensor, k: int, blocksize: tuple[int, int], cluster: int) -> ClusterPlan:
    """slots int32 [rows, columns] on the host: the place in values of each block, -1 where there is none; k inputs."""
    (rows, columns), (r, c) = slots.shape, blocksize
    slots, p = with_no_row(slots), ROWS // r  # [rows + 1, columns]
    warpgroups = _merged(torch.arange(rows)[:, None], slots, max(1, p // 2))  # [., P / 2] what 64 outputs are
    blocks = _merged(warpgroups, slots, min(2, p))  # [., P]
    units = _merged(blocks, slots, cluster).view(-1, cluster, p)  # [T, G, P]

    halves, line = -(-c // LINE), line_of(c)
    filled = slots[units] >= 0  # [T, G, P, columns]
    union = filled.flatten(1, 2).any(1)  # [T, columns]
    union[:, 0] |= ~union.any(1)  # a line to begin and end with, where a group has no block at all
    group, column = union.nonzero(as_tuple=True)  # [columns in all groups]
    group, column = group.repeat_interleave(halves), column.repeat_interleave(halves)
    half = torch.arange(halves).repeat(len(column) // halves)
    inside = (column * c + half * line < k) | (half == 0)
    group, column, half = group[inside], column[inside], half[inside]  # [U]
    begin = torch.searchsorted(group, torch.arange(len(units) + 1))  # [T + 1]
    place = slots[units].permute(0, 3, 1, 2)[group, column]  # [U, G, P]
    chunk = torch.where(place < 0, -1, place * halves + half[:, None, None])
    flags = ((place >= 0).any(2).long() << torch.arange(cluster)).sum(1)  # [U]
    heads = torch.stack([column * c + half * line, flags], 1)  # [U, 2]
    table = torch.cat([part.flatten() for part in (begin, torch.where(units == rows, -1, units), heads, chunk)])
    of_warpgroups = filled.view(len(units), cluster, min(2, p), -1, columns).any(3).float().mean()
    of_blocks = filled.any(2).float().mean()
    return ClusterPlan(
        cluster,
        len(units),
        len(group),
        table.to(torch.int32),
        (union.float().mean().item(), of_blocks.item(), of_warpgroups.item()),
    )


def predicted_clocks(
    m: int, n: int, k: int, nnz: int, plan: ClusterPlan, tokens: int, gpu: Gpu, clusters: int
) -> dict[str, float]:
    """Clocks that each resource is busy, at its peak, for m rows of x, nnz stored weights and tiles of `tokens` rows.

    clusters   that run at once; `tensor`, `shared` and `port` (what comes to one SM, at half of what its shared memory takes)
               count whole tiles of the busiest one
    """
    token_tiles = -(-m // tokens)
    of_groups, of_blocks, of_warpgroups = plan.filled
    line = 2 * k * tokens  # bytes of x that a tile has in all
    w = 2 * nnz / (plan.groups * plan.cluster)  # bytes of W for a block and tile
    turns = -(-token_tiles * plan.groups // clusters)
    moved = token_tiles * (plan.groups * of_groups * line + 2 * nnz) + 2 * m * n
    return {
        "tensor": turns * 2 * of_warpgroups * k * 64 * tokens / gpu.multiply_adds,
        # x is written once and read by each warpgroup; fragments are written and read once
        "shared": turns * ((of_blocks + 2 * of_warpgroups) * line + 2 * w) / gpu.shared_bytes,
        "port": turns * (of_blocks * line + w) / (gpu.shared_bytes / 2),
        "L2": moved / gpu.l2_bytes,
        "DRAM": 2 * (m * k + nnz + m * n) / gpu.dram_bytes,
    }


def _merged(units: Tensor, slots: Tensor, merge: int) -> Tensor:
    """units [n, rows of a unit] put together `merge` at a time, so that unions are small: [ceil(n / merge), merge * rows]."""
    none = len(slots) - 1
    mask = (slots[units] >= 0).any(1)  # [n, columns]
    order = row_order(mask, merge)  # [., merge], -1 where units end
    padded = torch.cat([units, units.new_full((1, units.shape[1]), none)])
    return padded[order].flatten(1)
