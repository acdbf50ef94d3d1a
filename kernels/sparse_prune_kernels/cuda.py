"""What the CUDA C++ kernels read (csrc/cuda/bsr_linear_sm80.cuh, bsr_sdd_sm80.cuh), derived from a weight's index and values.

For a product one flat tensor of bytes: first the weights, in the order in which tiles of merged block-rows use them and within
each 16 x 16 unit in the order of the tensor cores' fragments; then the tables that say which blocks there are. dx = dy @ W is the
product with the layout of W^T. For the gradient of the weights a table of jobs. All of it is made on the device of the weight, kept
beside it, and never saved.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .plan import once, places, row_order, with_no_row

TILE_OUTPUTS = 128  # outputs of a tile
ROW, ROW_8 = 64, 32  # outputs of a row at most (weights of 8 bits): a block-row of 128 is two rows
GROUPS = 2  # groups of rows in a tile, each for its own warps
UNIT = 16  # outputs and inputs of a unit
SPARE_UNITS = 4  # of weights, behind the last one: a kernel reads that far ahead
TILE_INTS, STEP_INTS = 12, 16  # of struct Tile, and of the four struct Step of a step
SPARE_STEPS = 4  # behind the last one, likewise
JOB_COLUMNS, JOB_UNITS, WARPS = 24, 64, 8  # of struct SddJob: columns and units at most, and who makes them
JOB_INTS = 8 + JOB_COLUMNS + 2 * JOB_UNITS


@dataclass(frozen=True)
class Layout:
    """Where the units of a weight go, for every set of values with this index.

    row      outputs of a row: 16, 32 or 64
    transposed  whether it is of W^T: whose outputs are the inputs of values
    tiles    number of tiles
    units    int64 [nnzb * R * C / 256], place of each unit in the natural order of `fragments`
    rows     number of rows
    tables   int32, flat: struct Tile [tiles]; [rows + 1] where each row's pieces begin; struct Piece [nnzb * R * C / (16 * row)],
             by row and column; struct Step [steps + SPARE_STEPS, GROUPS, 2]. Each of these begins at a multiple of 16 bytes.
    work     int32 [tiles], on the host: units of each tile, by which the launcher cuts the tokens
    """

    row: int
    transposed: bool
    rows: int
    tiles: int
    units: Tensor
    tables: Tensor
    work: Tensor

    def sections(self) -> tuple[int, int, int]:
        """Where starts, pieces and steps begin in tables, in int32; csrc/cuda/config.cpp computes the same of sizes."""
        starts = self.tiles * TILE_INTS
        pieces = starts + (self.rows + 1 + 3) // 4 * 4
        return starts, pieces, pieces + (len(self.units) // (self.row // UNIT) * 2 + 3) // 4 * 4

    def pack(self, values: Tensor) -> Tensor:
        """uint8 [2 * (nnzb * R * C + 256 * SPARE_UNITS) + 4 * len(tables)]: weights, zeros, tables. Queued on the device, which is
        not waited for."""
        size, spare = 2 * values.numel(), 2 * SPARE_UNITS * UNIT * UNIT
        packed = torch.empty(size + spare + 4 * len(self.tables), dtype=torch.uint8, device=values.device)
        weights = packed[:size].view(values.dtype).view(-1, UNIT * UNIT)  # [units, 256]
        torch.index_select(fragments(values.mT if self.transposed else values, self.row), 0, self.units, out=weights)
        packed[size : size + spare] = 0
        packed[size + spare :] = self.tables.view(torch.uint8)
        return packed


def layout_of(
    crow_indices: Tensor,
    col_indices: Tensor,
    block_columns: int,
    r: int,
    c: int,
    transposed: bool = False,
    most_row: int = ROW,
) -> Layout:
    """make_layout's, made once for an index."""
    key = ("layout", block_columns, r, c, transposed, most_row)
    return once(key, crow_indices, col_indices, lambda: make_layout(crow_indices, col_indices, *key[1:]))


def jobs_of(crow_indices: Tensor, col_indices: Tensor, block_columns: int, r: int, c: int) -> Tensor:
    """make_jobs', made once for an index."""
    key = ("jobs", block_columns, r, c)
    return once(key, crow_indices, col_indices, lambda: make_jobs(crow_indices, col_indices, *key[1:]))


def make_layout(
    crow_indices: Tensor,
    col_indices: Tensor,
    block_columns: int,
    r: int,
    c: int,
    transposed: bool = False,
    most_row: int = ROW,
) -> Layout:
    """The layout of a weight of blocks r x c, sides in {16, 32, 64, 128}, or of its transpose. Reads the index on the host, so a
    GPU is waited for. Two numbers of 8 bits count as one: such a weight is packed as int16 in blocks of r x c / 2, most_row ROW_8.
    """
    slots = places(crow_indices, col_indices, block_columns)  # [block-rows, block-columns]
    if transposed:
        slots, r, c = slots.T, c, r
    (rows, block_columns), row = slots.shape, min(r, most_row)
    slots = with_no_row(slots).long()  # [rows + 1, columns]
    order = row_order(slots[:-1] >= 0, TILE_OUTPUTS // r)  # [T, merged block-rows]
    parts = r // row  # rows of a block-row
    part = torch.arange(parts).repeat(order.shape[1])  # [rows of a tile]
    numbers = order.repeat_interleave(parts, 1)  # [T, rows of a tile], block-rows
    blocks = slots[numbers].repeat_interleave(c // UNIT, 2)  # [T, rows of a tile, columns of 16 inputs]
    tile, column = (blocks >= 0).any(1).nonzero(as_tuple=True)  # [E] each: the columns of all unions
    if row == c == 2 * UNIT:
        tile, column = alike(tile, column, blocks)
    per_tile = torch.bincount(tile, minlength=len(order))  # [T]
    place = torch.arange(len(tile)) - (per_tile.cumsum(0) - per_tile)[tile]  # [E], within the tile
    wide = row == UNIT and 2 or 4  # columns of a step
    together = 1 if row == UNIT or c == UNIT else 2  # columns whose units lie together
    steps = (per_tile + wide - 1) // wide  # [T]
    first = steps.cumsum(0) - steps  # [T]
    step, at = first[tile] + place // wide, place % wide  # [E]

    mine = blocks[tile, :, column]  # [E, rows of a tile]
    entry, which = (mine >= 0).nonzero(as_tuple=True)  # [P]: the pieces row x 16 inputs that exist
    group_rows = numbers.shape[1] // GROUPS
    group = which // group_rows  # [P]
    if row == UNIT:  # by step, group, column, row
        used = ((step[entry] * GROUPS + group) * wide + at[entry]) * group_rows + which % group_rows
    else:  # by tile, group, columns together, row, column
        used = (tile[entry] * GROUPS + group) * (2 * blocks.shape[2]) + place[entry] // together
        used = (used * group_rows + which % group_rows) * together + place[entry] % together
    by_use = used.argsort()
    entry, which, group = entry[by_use], which[by_use], group[by_use]
    per_row = torch.arange(row // UNIT)
    unit = (mine[entry, which] * parts + part[which])[:, None] * len(per_row) + per_row  # [P, units of a row]
    units = (unit * (c // UNIT) + (column[entry] % (c // UNIT))[:, None]).flatten()

    columns = torch.zeros(int(steps.sum()) + SPARE_STEPS, wide, dtype=torch.int64)  # [steps, columns]
    columns[step[at == 0]] = column[at == 0][:, None]  # where there is no more: the first one
    columns[step, at] = column
    rows_of = torch.zeros(len(columns), GROUPS, dtype=torch.int64)
    bit = 1 << (group_rows * at[entry] + which % group_rows)
    rows_of.index_put_((step[entry], group), bit, accumulate=True)
    table = torch.zeros(len(columns), GROUPS, 2, 4, dtype=torch.int64)  # [steps, groups, halves of a pair, struct Step]
    table[..., : wide // 2] = columns.view(-1, 1, wide // 2, 2).mT
    if row == UNIT:
        rows_of += rows_of.flip(1) << 16
        before = torch.bincount(step[entry], minlength=len(columns)).cumsum(0)  # [steps]
        table[1:, :, :, 3] = before[:-1, None, None]
    else:
        rows_of[:-2] += (rows_of[1:-1] << 8) + (rows_of[2:] << 16)
        table[..., 3] = 1
    following = (first + steps - 1).repeat_interleave(steps) - torch.arange(len(columns) - SPARE_STEPS)  # [steps]
    table[..., 2] = 2 * rows_of[:, :, None]
    table[:-SPARE_STEPS, ..., 2] += following.clamp(max=63)[:, None, None] << 25
    begin = torch.bincount(tile[entry] * GROUPS + group, minlength=GROUPS * len(order)).cumsum(0) * len(per_row)
    heads = torch.full((len(order), TILE_INTS), -1)
    heads[:, 0], heads[:, 1] = first, steps
    heads[:, 2 : 2 + GROUPS] = torch.cat([begin.new_zeros(1), begin[:-1]]).view(-1, GROUPS)
    heads[:, 4 : 4 + numbers.shape[1]] = torch.where(numbers < 0, -1, numbers * parts + part)
    owner = (numbers * parts + part)[tile[entry], which]  # [P]
    by_row = (owner * (block_columns * c // UNIT) + column[entry]).argsort()  # [P]
    pieces = torch.stack([column[entry], torch.arange(len(entry)) * len(per_row)], 1)[by_row]  # [P, 2]
    starts = torch.searchsorted(owner[by_row], torch.arange(rows * parts + 1))  # [rows + 1]
    sections = [whole_vectors(section.flatten()) for section in (heads, starts, pieces, table)]
    tables, device = torch.cat(sections).to(torch.int32), crow_indices.device
    work = (torch.bincount(tile[entry], minlength=len(order)) * len(per_row)).to(torch.int32)  # [T]
    return Layout(row, transposed, rows * parts, len(order), units.to(device), tables.to(device), work)


def alike(tile: Tensor, column: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """[E] each: the columns of all unions, two of a block each, in an order in which a group has or lacks a step's four together.

    Those that are left over come last, in two steps at most, and behind them the last block's, which may end beyond K.
    """
    group = (blocks[tile, :, column] >= 0).unflatten(1, (GROUPS, -1)).any(2).long()  # [E, groups]
    kind = group[:, 0] + 2 * group[:, 1]  # [E]
    kind[column >= blocks.shape[2] - 2] = 4
    key = 5 * tile + kind
    counts = torch.bincount(key, minlength=5 * len(blocks))
    by_kind = key.argsort(stable=True)
    rank = torch.empty_like(key)
    rank[by_kind] = torch.arange(len(key)) - (counts.cumsum(0) - counts)[key[by_kind]]
    kind[rank >= counts[key] // 4 * 4] = 4
    order = (5 * tile + kind).argsort(stable=True)
    return tile[order], column[order]


def make_jobs(crow_indices: Tensor, col_indices: Tensor, block_columns: int, r: int, c: int) -> Tensor:
    """int32 [jobs, JOB_INTS]: struct SddJob for the gradient of a weight of blocks r x c. Reads the index on the host.

    Each tile of merged block-rows is cut across its columns into as few jobs as JOB_COLUMNS and JOB_UNITS allow, equal in units.
    """
    slots = places(crow_indices, col_indices, block_columns)
    high = 2 if r > UNIT else 1  # units of a slot, one below the other
    parts = r // (high * UNIT)
    order = row_order(slots >= 0, TILE_OUTPUTS // r)  # [T, merged block-rows]
    tables = []
    for rows, blocks in zip(order, with_no_row(slots).long()[order], strict=True):
        wide = blocks.repeat_interleave(c // UNIT, 1)  # [merged, columns of 16 inputs]
        columns = (wide >= 0).any(0).nonzero()[:, 0]  # [E]
        ends = (wide[:, columns] >= 0).sum(0).cumsum(0) * (r // UNIT)  # [E] units up to each column
        units = int(ends[-1]) if len(ends) else 0
        count, cuts = max(-(-units // JOB_UNITS), -(-len(columns) // JOB_COLUMNS)), torch.zeros(1, dtype=torch.int64)
        while count:
            last = torch.searchsorted(ends, (torch.arange(1, count + 1) * units + count - 1) // count)  # [count]
            cuts = torch.cat([cuts[:1], last + 1])  # [count + 1]
            if cuts.diff().max() <= JOB_COLUMNS and ends[last].diff(prepend=cuts[:1]).max() <= JOB_UNITS:
                break
            count += 1
        numbers = torch.where(rows < 0, -1, rows * (r // UNIT))[:, None]  # [merged, 1]
        numbers = torch.where(numbers < 0, -1, numbers + torch.arange(r // UNIT)).flatten()  # [units of a tile]
        for mine in columns.tensor_split(cuts[1:-1]) if count else ():  # [at most JOB_COLUMNS]
            if len(mine) == 0:
                continue
            row, column = (wide[:, mine].repeat_interleave(parts, 0) >= 0).nonzero(as_tuple=True)  # [P] each, by row
            block, at = wide[row // parts, mine[column]], mine[column] % (c // UNIT)  # [P] each
            table = torch.full((JOB_INTS,), -1)
            table[: len(numbers)] = numbers
            table[8 : 8 + len(mine)] = mine
            dealt = torch.arange(len(row))
            warp = dealt * WARPS // len(row)
            place = dealt - torch.searchsorted(warp, warp)  # within the warp
            slot = table[8 + JOB_COLUMNS :][: 2 * JOB_UNITS // high].view(WARPS, -1, 2)
            slot[warp, place, 0] = row * high + 256 * column
            slot[warp, place, 1] = block * (r * c // UNIT) + row % parts * (high * c) + at
            tables.append(table)
    jobs = torch.stack(tables) if tables else torch.zeros(0, JOB_INTS)
    return jobs.to(torch.int32).to(crow_indices.device)


def whole_vectors(numbers: Tensor) -> Tensor:
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
