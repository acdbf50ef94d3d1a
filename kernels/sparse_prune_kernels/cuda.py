"""The layout that the CUDA C++ kernels read (csrc/cuda/bsr_linear_sm80.cuh), derived from the index and the values of a weight.

One flat tensor of bytes: first the weights, in the order in which tiles of merged block-rows use them and within each 16 x 16 unit
in the order of the tensor cores' fragments; then the tables that say which blocks there are. It is made on the device of the
weight, kept beside it, and never saved.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .plan import places, row_order, with_no_row

TILE_OUTPUTS = 128  # outputs of a tile
ROW = 64  # outputs of a row at most: a block-row of 128 is two rows
GROUPS = 2  # groups of rows in a tile, each for its own warps
UNIT = 16  # outputs and inputs of a unit
TILE_INTS, STEP_INTS = 12, 4  # of struct Tile and Step
SPARE_STEPS = 4  # behind the last one: a kernel looks that far ahead


@dataclass(frozen=True)
class Layout:
    """Where the units of a weight go, for every set of values with this index.

    row      outputs of a row: 16, 32 or 64
    tiles    number of tiles
    units    int64 [nnzb * R * C / 256], place of each unit in the natural order of `fragments`
    rows     number of rows
    tables   int32, flat: struct Tile [tiles]; [rows + 1] where each row's pieces begin; struct Piece [nnzb * R * C / (16 * row)],
             by row and column; struct Step [steps + SPARE_STEPS]. Each of these begins at a multiple of 16 bytes.
    """

    row: int
    rows: int
    tiles: int
    units: Tensor
    tables: Tensor

    def sections(self) -> tuple[int, int, int]:
        """Where starts, pieces and steps begin in tables, in int32; csrc/cuda/config.cpp computes the same of sizes."""
        starts = self.tiles * TILE_INTS
        pieces = starts + (self.rows + 1 + 3) // 4 * 4
        return starts, pieces, pieces + (len(self.units) // (self.row // UNIT) * 2 + 3) // 4 * 4

    def pack(self, values: Tensor) -> Tensor:
        """uint8 [2 * nnzb * R * C + 4 * len(tables)]: weights, then tables."""
        weights = fragments(values, self.row)[self.units]  # [units, 256]
        return torch.cat([weights.view(torch.uint8).flatten(), self.tables.view(torch.uint8)])


def make_layout(crow_indices: Tensor, col_indices: Tensor, block_columns: int, r: int, c: int) -> Layout:
    """The layout of a weight of blocks r x c, sides in {16, 32, 64, 128}. Reads the index on the host, so a GPU is waited for."""
    rows, row = crow_indices.numel() - 1, min(r, ROW)
    slots = with_no_row(places(crow_indices, col_indices, block_columns)).long()  # [rows + 1, columns]
    order = row_order(slots[:-1] >= 0, TILE_OUTPUTS // r)  # [T, merged block-rows]
    parts = r // row  # rows of a block-row
    part = torch.arange(parts).repeat(order.shape[1])  # [rows of a tile]
    numbers = order.repeat_interleave(parts, 1)  # [T, rows of a tile], block-rows
    blocks = slots[numbers].repeat_interleave(c // UNIT, 2)  # [T, rows of a tile, columns of 16 inputs]
    tile, column = (blocks >= 0).any(1).nonzero(as_tuple=True)  # [E] each: the columns of all unions
    per_tile = torch.bincount(tile, minlength=len(order))  # [T]
    place = torch.arange(len(tile)) - (per_tile.cumsum(0) - per_tile)[tile]  # [E], within the tile
    steps = (per_tile + 1) // 2  # [T]
    first = steps.cumsum(0) - steps  # [T]
    step, half = first[tile] + place // 2, place % 2  # [E]

    mine = blocks[tile, :, column]  # [E, rows of a tile]
    entry, which = (mine >= 0).nonzero(as_tuple=True)  # [P]: the pieces row x 16 inputs that exist
    group = which // (numbers.shape[1] // GROUPS)
    used = ((step[entry] * GROUPS + group) * 2 + half[entry]) * 8 + which
    entry, which = entry[used.argsort()], which[used.argsort()]
    per_row = torch.arange(row // UNIT)
    unit = (mine[entry, which] * parts + part[which])[:, None] * len(per_row) + per_row  # [P, units of a row]
    units = (unit * (c // UNIT) + (column[entry] % (c // UNIT))[:, None]).flatten()

    table = torch.zeros(int(steps.sum()) + SPARE_STEPS, STEP_INTS, dtype=torch.int64)
    table[:, :2] = -1
    table[step, half] = column
    table[:, 2].index_put_((step[entry],), 1 << (which + 8 * half[entry]), accumulate=True)
    table[1:, 3] = torch.bincount(step[entry], minlength=len(table))[:-1].cumsum(0) * len(per_row)
    heads = torch.full((len(order), TILE_INTS), -1)
    heads[:, 0], heads[:, 1] = first, steps
    heads[:, 4 : 4 + numbers.shape[1]] = torch.where(numbers < 0, -1, numbers * parts + part)
    owner = (numbers * parts + part)[tile[entry], which]  # [P]
    by_row = (owner * (block_columns * c // UNIT) + column[entry]).argsort()  # [P]
    pieces = torch.stack([column[entry], torch.arange(len(entry)) * len(per_row)], 1)[by_row]  # [P, 2]
    starts = torch.searchsorted(owner[by_row], torch.arange(rows * parts + 1))  # [rows + 1]
    sections = [_whole_vectors(section.flatten()) for section in (heads, starts, pieces, table)]
    tables, device = torch.cat(sections).to(torch.int32), crow_indices.device
    return Layout(row, rows * parts, len(order), units.to(device), tables.to(device))


def _whole_vectors(numbers: Tensor) -> Tensor:
    """numbers with zeros to a multiple of 16 bytes of int32."""
    return torch.nn.functional.pad(numbers, (0, -len(numbers) % 4))


def fragments(values: Tensor, row: int) -> Tensor:
    """values[nnzb, R, C] as [units, 256] in the order of fragments; units by block, 16 outputs, 16 inputs.

    A lane (g = lane / 4, t = lane % 4) holds for each of the unit's two mma the inputs 2t, 2t + 1, 2t + 8, 2t + 9 of its column g
    of 8. Columns are outputs in an order that gives a lane adjacent ones: its sums are those of columns 2t and 2t + 1.
    """
    nnzb, r, c = values.shape
    inputs = (c // UNIT, 2, 4, 2)  # units, half of the unit, t, one of a pair
    if row == 16:
        split = values.reshape(nnzb, r // 16, 4, 2, 2, *inputs)  # output = 4 * (g / 2) + 2 * mma + g % 2
        return split.permute(0, 1, 5, 2, 4, 7, 3, 6, 8).reshape(-1, 256)
    split = values.reshape(nnzb, r // 32, 4, 2, 2, 2, *inputs)  # output = 8 * (g / 2) + 4 * unit + 2 * mma + g % 2
    return split.permute(0, 1, 3, 6, 2, 5, 8, 4, 7, 9).reshape(-1, 256)
