"""Which block-rows one program serves together, and in which order it meets their columns: derived from the index, on the host.

A tile of `merge` block-rows walks over the union of their columns and loads each x tile once for all of them. Rows are put together
so that unions are small. Nothing here depends on values, so a plan outlives every step of training; it is never saved.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .support import ArgumentError

Made = TypeVar("Made")

# What was made of an index, by its col_indices: it goes when those go, and is made again when the index is written to.
_made: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@dataclass(frozen=True)
class Plan:
    """The index of a weight, merged `merge` block-rows at a time.

    merge   block-rows of a tile
    tiles   T, number of tiles: ceil(block-rows / merge)
    steps   U, number of columns in all unions
    table   int32 [T + 1 + U, 1 + merge]
            rows t <= T: the first of tile t's steps (U at t = T), then the block-rows that it serves, -1 for none
            rows T + 1 + s: the block-column of step s, then the place in values of each block-row's block, -1 where it has none
    union   filled fraction of the grid of tiles and block-columns: u, at least the density and at most 1
    lists   for 2 or 4 block-rows, else None: the same in two lists a tile, for programs that skip what a block-row lacks
            int32 [2 T + 1 + U, 1 + merge]
            rows 2 t: the first of tile t's steps that several block-rows share (U at t = T), then the block-rows that it serves
            rows 2 t + 1: the first of its steps that one block-row has alone
            rows 2 T + 1 + s: as above where shared, else block-column, place in values, which of the block-rows it is
    schedules   those that were made of it, by the arguments of schedule_of
    """

    merge: int
    tiles: int
    steps: int
    table: Tensor
    union: float
    lists: Tensor | None = None
    schedules: dict[tuple[int, int, int, int], Schedule] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class Schedule:
    """Which tiles of y each of `programs` that stay makes, and in which order.

    table   int32 [programs + 2 + tiles of y, 4]
            rows p < programs: the first entry of program p, the steps of all its entries, two zeros
            rows programs + 1 + e: row tile, tile of block-rows, its first step and the one after its last, the same where it has no
            column: the program then takes one step
            row programs, and the last one, behind all entries: zeros
    """

    programs: int
    table: Tensor


def make_plans(
    crow_indices: Tensor, col_indices: Tensor, block_columns: int, merges: tuple[int, ...], transposed: bool = False
) -> dict[int, Plan]:
    """A plan for each number in merges, on the device of the indices; of W^T if transposed.

    crow_indices int32 [rows + 1], col_indices int32 [nnzb]. Reads the indices on the host, so a GPU is waited for.
    """
    slots = places(crow_indices, col_indices, block_columns)
    slots = slots.T.contiguous() if transposed else slots
    return {merge: plan_of(slots, row_order(slots >= 0, merge), crow_indices.device) for merge in merges}


def schedule_of(plan: Plan, row_tiles: int, group_m: int, programs: int, steps: int) -> Schedule:
    """The schedule of plan's tiles over row_tiles, for at most that many programs; a column is so many steps of the loop.

    Tiles come in the order of bsr_linear_kernel's programs, each to the program that has least to do so far, as the GPU hands them
    out: block-rows differ in length, and a fixed stride would leave a quarter of the time to the program with the long ones.
    Kept with the plan. Reads the plan on the host when it is new.
    """
    key = (row_tiles, group_m, programs, steps)
    if key not in plan.schedules:
        if plan.table.is_cuda and torch.cuda.is_current_stream_capturing():
            expected = "a number of rows that ran once before a CUDA graph is captured"
            raise ArgumentError("x", expected, f"a new one inside a capture ({row_tiles} tiles)", "call once before")
        plan.schedules[key] = _scheduled(plan, *key)
    return plan.schedules[key]


OUTPUT_COST = 2  # steps that storing a tile counts as, beside those of its products


def _scheduled(plan: Plan, row_tiles: int, group_m: int, programs: int, steps: int) -> Schedule:
    begins = (plan.table[: plan.tiles + 1, 0].cpu() * steps).tolist()
    last = max(begins[-1] - 1, 0)
    programs = min(programs, row_tiles * plan.tiles)
    given: list[list[tuple[int, int, int, int]]] = [[] for _ in range(programs)]
    busy = [(0, program) for program in range(programs)]  # a heap: the least busy, the first of equal ones
    for first_tile in range(0, row_tiles, group_m):
        group = range(first_tile, min(first_tile + group_m, row_tiles))
        for tile_n in range(plan.tiles):
            begin, end = begins[tile_n], begins[tile_n + 1]
            entry = (begin, end) if end > begin else (min(begin, last),) * 2
            for tile_m in group:
                work, program = busy[0]
                given[program].append((tile_m, tile_n, *entry))
                heapq.heapreplace(busy, (work + max(end - begin, 1) + OUTPUT_COST, program))
    heads: list[tuple[int, int, int, int]] = []
    entries: list[tuple[int, int, int, int]] = []
    for own in given:
        heads.append((len(entries), sum(max(end - begin, 1) for *_, begin, end in own), 0, 0))
        entries += own
    none = [(0, 0, 0, 0)]
    table = torch.tensor(heads + none + entries + none, dtype=torch.int32)  # [programs + 2 + tiles, 4]
    return Schedule(programs, table.to(plan.table.device))


def once(key: tuple, crow: Tensor, col: Tensor, make: Callable[[], Made]) -> Made:
    """What make() gives for key and an index: kept until the index goes or is written to."""
    # An in-place write to an inference tensor leaves no trace: such an index must not change.
    version = (crow.data_ptr(), *(-1 if index.is_inference() else index._version for index in (crow, col)))
    known = _made.setdefault(col, {})
    if key not in known or known[key][0] != version:
        if col.is_cuda and torch.cuda.is_current_stream_capturing():
            expected = "an index that ran once before a CUDA graph is captured"
            raise ArgumentError("col_indices", expected, "a new index inside a capture", "call once before")
        known[key] = (version, make())
    return known[key][1]


def places(crow_indices: Tensor, col_indices: Tensor, block_columns: int) -> Tensor:
    """int32 [rows, columns] on the host: where each block stands in values, -1 where there is none."""
    crow, col = crow_indices.cpu().long(), col_indices.cpu().long()
    slots = torch.full((crow.numel() - 1, block_columns), -1, dtype=torch.int32)
    slots[torch.repeat_interleave(crow.diff(), output_size=col.numel()), col] = torch.arange(
        col.numel(), dtype=torch.int32
    )
    return slots


def with_no_row(slots: Tensor) -> Tensor:
    """slots [rows, columns] with a row -1 behind them: the row that is not there, whose blocks are not there."""
    return torch.cat([slots, slots.new_full((1, slots.shape[1]), -1)])


def plan_of(slots: Tensor, order: Tensor, device: torch.device) -> Plan:
    """The plan of tiles that serve the block-rows order [T, merge] (-1 for none) of slots, as `places` gives them."""
    (tiles, merge), columns = order.shape, slots.shape[1]
    grouped = with_no_row(slots)[order]  # [T, merge, columns]
    tile, column = (grouped >= 0).any(1).nonzero(as_tuple=True)  # [U] each, by tile and then by column
    begin = torch.searchsorted(tile, torch.arange(tiles + 1))  # [T + 1]
    heads = torch.cat([begin[:, None], torch.cat([order, order.new_full((1, merge), -1)])], 1)  # [T + 1, 1 + merge]
    steps = torch.cat([column[:, None], grouped[tile, :, column]], 1)  # [U, 1 + merge]
    table = torch.cat([heads, steps]).to(torch.int32).to(device)
    lists = _lists(order, tile, steps).to(torch.int32).to(device) if merge in (2, 4) else None
    return Plan(merge, tiles, tile.numel(), table, tile.numel() / max(1, tiles * columns), lists)


def _lists(order: Tensor, tile: Tensor, steps: Tensor) -> Tensor:
    """Plan.lists from order [T, merge], the tile of each step [U], and steps [U, 1 + merge]."""
    tiles, merge = order.shape
    alone = (steps[:, 1:] >= 0).sum(1) == 1  # [U]
    place = 2 * tile + alone  # [U]
    by_list = place.argsort(stable=True)  # [U]
    which = (steps[:, 1:] >= 0).int().argmax(1)  # [U]
    slot = steps[:, 1:].gather(1, which[:, None])  # [U, 1]
    short = torch.cat([steps[:, :1], slot, which[:, None], steps.new_full((len(steps), merge - 2), -1)], 1)
    begin = torch.searchsorted(place[by_list], torch.arange(2 * tiles + 1))  # [2 T + 1]
    heads = torch.cat([begin[:, None], order.new_full((2 * tiles + 1, merge), -1)], 1)  # [2 T + 1, 1 + merge]
    heads[:-1:2, 1:] = order
    return torch.cat([heads, torch.where(alone[:, None], short, steps)[by_list]])


def row_order(mask: Tensor, merge: int) -> Tensor:
    """int64 [ceil(rows / merge), merge]: block-rows of mask (bool [rows, columns]) in tiles with small unions, -1 where rows end.

    Greedy: the fullest row left opens a tile and takes in, one after another, the row that shares the most columns with the tile
    so far; each shared column is one x tile fewer to load. Tiles with many columns come first, so that the last ones to run on a
    GPU are short. A random mask of density .2 leaves little to find; rows that a criterion made alike end up together.
    """
    left = mask.float()  # [rows, columns]; rows that are placed become zero
    counts = mask.sum(1).float()  # [rows]; -1 once placed
    tiles, unions = [], []
    for _ in range(-(-mask.shape[0] // merge)):
        first = int(counts.argmax())
        tile, union = [first], left[first].clone()
        counts[first] = -1
        while len(tile) < merge and bool((counts >= 0).any()):
            shared = torch.where(counts >= 0, left @ union, -1.0)  # [rows]
            best = int(shared.argmax())
            tile.append(best)
            union = torch.maximum(union, left[best])
            counts[best] = -1
        tiles.append(tile + [-1] * (merge - len(tile)))
        unions.append(int(union.sum()))
    by_length = sorted(range(len(tiles)), key=lambda place: -unions[place])  # stable: equal tiles keep their order
    return torch.tensor([tiles[place] for place in by_length]).view(-1, merge)
