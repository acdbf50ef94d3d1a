"""Tile sizes, chosen by counting what a tiling costs each resource of the GPU; no GPU has timed them yet.

One step of the loop brings an x tile of block_m rows and the blocks of `merge` block-rows in that column. With u the filled part of
the merged rows' union and d the density, a tile of block_m x (merge * side_n) outputs takes, per input,

    tensor cores   block_m * merge * side_n * u      multiply-adds: a block that a row lacks is multiplied as zeros
    L2             (block_m * u + merge * side_n * d) elements: a block that a row lacks is not loaded
    shared memory  every loaded element written once, zeros too; x tile and blocks read once by each warp that multiplies them

so merging pays where L2 is the wall (small blocks, Hopper) until the zeros make the tensor cores the wall. With mma.sync a program
may instead keep accumulators for each of its block-rows and skip what one lacks (`skip`): u for x, d for the rest. wgmma takes
blocks of 16 and 32 only merged.

On 9.0, where a program makes several tiles, programs stay (`persistent`): the same tiles, loads and products, so the same wall,
with x and unmerged blocks by tensor maps, and the loads of a tile's first steps under way while the tile before is stored.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

# Eight tiles of 128 rows and 4096 inputs are 8 MB in bfloat16, which stays in L2 (40 MB on A100) from row to row.
GROUP_M = 8
# Outputs of a tile at most: with 256 rows that is 128 accumulators a thread in eight warps, of 255 registers.
MERGED_SIDE = 128
SMALL_M = 64  # up to this many rows the bytes of the weight are the wall: swap operands and split the inputs
SUM_BLOCK, SUM_WARPS = 512, 4  # outputs that a program of sum_parts_kernel adds up: 4 a thread, 16 bytes of each part
ROUND_BLOCK, ROUND_WARPS = (
    4096,
    8,
)  # inputs that a program of round_rows_kernel holds: 16 a thread, two loads of 16 bytes
SPLIT_LIMIT = 16  # parts of a tile's inputs at most: each writes and reads M * N float32 again


@dataclass(frozen=True)
class Gpu:
    """Published peaks, per SM and clock where not said otherwise.

    sms              streaming multiprocessors of the model named in GPUS
    shared           bytes of shared memory a program may have
    multiply_adds    of the tensor cores in float16, dense, by the best instruction that Triton uses; twice as many in int8
    l2_bytes         from L2 to all SMs together
    dram_bytes       from memory to all SMs together, per clock
    mma_sync         the part of multiply_adds that mma.sync reaches
    shared_bytes     to or from shared memory
    issue            warp instructions
    warpgroup        whether products of 64 rows go through wgmma
    tensor_memory    whether sums lie outside the registers (tcgen05)
    tensor_maps      whether it copies boxes that tensor maps describe (TMA)
    amd              whether it is AMD's: warps of 64, 512 vector registers a thread
    """

    sms: int
    shared: int
    multiply_adds: int
    l2_bytes: int = 5120
    dram_bytes: float = 0.0
    mma_sync: float = 1.0
    shared_bytes: int = 128
    issue: int = 4
    warpgroup: bool = False
    tensor_memory: bool = False
    tensor_maps: bool = False
    amd: bool = False


# By compute capability. 8.6, 8.9 and 12.0 multiply half as fast per SM as 8.0; their L2 figures are not published: A100's per SM.
# AMD's by the number of their gfx name: those are compiled and gated in CI, but `unavailable` keeps them out: none has run them.
GPUS = {
    80: Gpu(sms=108, shared=163 * 1024, multiply_adds=1024, dram_bytes=2.04e12 / 1.41e9),  # A100
    86: Gpu(sms=84, shared=99 * 1024, multiply_adds=512, l2_bytes=3982, dram_bytes=936e9 / 1.70e9),  # RTX 3090
    89: Gpu(sms=128, shared=99 * 1024, multiply_adds=512, l2_bytes=6068, dram_bytes=1.008e12 / 2.52e9),  # RTX 4090
    90: Gpu(  # H100; its L2 is assumed to be A100's
        sms=132,
        shared=227 * 1024,
        multiply_adds=2048,
        dram_bytes=3.35e12 / 1.83e9,
        mma_sync=0.62,
        warpgroup=True,
        tensor_maps=True,
    ),
    100: Gpu(  # B200; L2 again A100's
        sms=148,
        shared=227 * 1024,
        multiply_adds=4096,
        dram_bytes=8e12 / 1.85e9,
        tensor_memory=True,
        tensor_maps=True,
    ),
    120: Gpu(  # RTX 5090
        sms=170, shared=99 * 1024, multiply_adds=512, l2_bytes=8059, dram_bytes=1.792e12 / 2.41e9, tensor_maps=True
    ),
    942: Gpu(
        sms=304, shared=64 * 1024, multiply_adds=1024, l2_bytes=16384, dram_bytes=5.3e12 / 2.1e9, amd=True
    ),  # MI300X
    950: Gpu(
        sms=256, shared=160 * 1024, multiply_adds=2048, l2_bytes=16384, dram_bytes=8e12 / 2.4e9, amd=True
    ),  # MI355X
}


def gpu_of(capability: int) -> Gpu:
    """The entry of GPUS for a compute capability such as 90; the nearest older one where there is none."""
    return GPUS[max((known for known in GPUS if known <= capability), default=80)]


@dataclass(frozen=True)
class LinearConfig:
    """Tiling of y = x @ W^T over a weight whose blocks span side_n outputs and side_k inputs.

    merge        block-rows that a program serves over the union of their columns
    block_m      rows of x that a program covers
    block_k      inputs in one step of the loop; divides side_k, or exceeds it: the rest are then zeros
    group_m      row tiles that pass over a tile of block-rows one after another, so that its blocks come from L2
    split        programs that share the inputs of a tile
    swap         whether y^T = W x^T is computed
    num_warps    warps of a program
    num_stages   depth of the software pipeline: tiles on their way while one is multiplied
    skip         whether a block-row has accumulators of its own and skips what it lacks; merge is then 2 or 4, split 1, swap False
    persistent   whether programs stay, make one tile after another and load by tensor maps; split is then 1, and block_k divides
                 side_k. x or weights that no map can describe go through the same tiling without (schedule_for in launch.py)
    """

    merge: int
    block_m: int
    block_k: int
    group_m: int
    split: int
    swap: bool
    num_warps: int
    num_stages: int
    skip: bool = False
    persistent: bool = False

    def narrow(self, side_n: int) -> int:
        """Columns of the accumulators that the kernel finishes at a time.

        32 accumulators a thread, or offsets and residual would not fit beside 128; never fewer than 16 outputs, one sector of y.
        """
        block_n = side_n if self.skip else self.merge * side_n
        columns = self.block_m if self.swap else block_n
        accumulators = self.block_m * block_n // (32 * self.num_warps)  # of a thread
        full = self.merge * side_n * self.block_m // (32 * self.num_warps) >= 128
        return max(16, columns * 32 // accumulators) if full and accumulators > 32 else columns


@dataclass(frozen=True)
class SddConfig:
    """Tiling of one stored block of dy^T @ x: block_m rows of dy and x in one step; warps and stages as in LinearConfig."""

    block_m: int
    num_warps: int
    num_stages: int


def merges(side_n: int, itemsize: int) -> tuple[int, ...]:
    """The numbers of block-rows worth merging; one for float32, whose products, not bytes, are the wall."""
    return tuple(g for g in (1, 2, 4, 8) if g == 1 or (itemsize <= 2 and g * side_n <= MERGED_SIDE))


def linear_config(
    m: int,
    n: int,
    k: int,
    side_n: int,
    side_k: int,
    itemsize: int,
    capability: int,
    density: float,
    unions: Mapping[int, float],
    sms: int | None = None,
    value_size: int = 0,
) -> LinearConfig:
    """The cheapest tiling for m rows, n outputs and k inputs.

    itemsize is 1 for int8 and e4m3, 2 for float16 and bfloat16, 4 for float32, as they are multiplied; value_size the same of the
    stored weight where it is narrower; density of blocks; unions maps each possible merge to the filled part of its unions; sms of
    the device, those of the model in GPUS unless given.
    """
    return linear_candidates(m, n, k, side_n, side_k, itemsize, capability, density, unions, sms, 1, value_size)[0]


def linear_candidates(
    m: int,
    n: int,
    k: int,
    side_n: int,
    side_k: int,
    itemsize: int,
    capability: int,
    density: float,
    unions: Mapping[int, float],
    sms: int | None = None,
    most: int = 12,
    value_size: int = 0,
) -> list[LinearConfig]:
    """What linear_config chooses, then up to most - 1 others, those first that the same arithmetic finds cheapest.

    Some of the others may lack registers or shared memory: for measuring, where that shows.
    """
    gpu = gpu_of(capability)
    sms, value_size = sms or gpu.sms, value_size or itemsize
    if itemsize == 4:
        found = _float32_configs(m, side_n, side_k, gpu)
    elif m <= SMALL_M:
        found = _small_configs(m, n, k, side_n, side_k, itemsize, value_size, unions, gpu, sms)
    else:
        found = _large_configs(m, n, side_n, side_k, itemsize, value_size, density, unions, gpu, sms)
    return list(dict.fromkeys(itertools.islice(found, most)))


def _large_configs(
    m, n, side_n, side_k, itemsize, value_size, density, unions, gpu: Gpu, sms: int
) -> Iterator[LinearConfig]:
    def cost(tile: tuple[int, int, bool]) -> tuple[float, int]:
        merge, block_m, skip = tile
        warps, union = _warps(block_m, merge * side_n, itemsize, gpu), unions[merge]
        problem = (side_n, side_k, itemsize, value_size, density, union, gpu, sms)
        resources = _resources(m, n, merge, block_m, warps, *problem, skip)
        # the wall first; among equal walls the tiling that leaves more to spare
        return max(resources.values()) + sum(resources.values()) / 16, merge

    # 512 rows only where a block-row alone is 32 outputs or fewer: 512 x 32 has the accumulators of 128 x 128.
    roomy = _is_roomy(itemsize, gpu)
    limit = (256 if roomy else 128) * MERGED_SIDE
    tiles = [(g, b, False) for g in unions for b in (64, 128, 256, 512) if b * g * side_n <= limit and b < 2 * m]
    tiles = [(g, b, skip) for g, b, skip in tiles if b < 512 or (g * side_n <= 32 and roomy)]
    if itemsize == 2 and not (gpu.warpgroup or gpu.tensor_memory or gpu.amd):
        # From 16 rows a warp on: 128 accumulators a thread are 64 outputs of 256 rows in four warps, of 512 in eight.
        tiles += [
            (g, b, True) for g in unions if g in (2, 4) and g * side_n <= 64 for b in (128, 256, 512) if b < 2 * m
        ]
    tiles = sorted(tiles, key=cost)
    for merge, block_m, skip in tiles:
        num_warps = _warps(block_m, merge * side_n, itemsize, gpu)
        # 128 bytes are one line of x and of the block, and one swizzle of shared memory. Four warps with 128 accumulators a
        # thread have registers for the operands of 64 bytes.
        full = skip or (num_warps == 4 and block_m * merge * side_n == 128 * 128)
        # Where int8 becomes bfloat16 on its way to mma.sync, eight warps have no registers for more either.
        full = full or (value_size < itemsize and not gpu.warpgroup and block_m * merge * side_n == 256 * 128)
        block_k = _block_k(side_k, itemsize, 64 if full or not roomy else 128)
        # As the left operand, W's 64 rows meet x of 256 in one wgmma: fewer reads of shared memory than x's 64 rows and W's 128.
        # Not where int8 becomes bfloat16: wgmma could take it from registers, but Triton 3.7 then writes the next ones too early.
        swap = gpu.warpgroup and merge * side_n == 2 * 64 and num_warps == 8 and value_size == itemsize
        room = gpu.shared // (1 if num_warps == 8 else 2)
        # Both loops of a program that skips fill a pipeline, with zeros beyond their end: three stages cost less of that than four.
        # Steps of 16 inputs are so short that latency needs the fourth.
        deepest = 3 if skip and block_k > 16 else 4
        stage = (block_m * itemsize + merge * side_n * value_size) * block_k
        stages = _stages(stage, room, gpu, deepest, skip)
        chosen = LinearConfig(merge, block_m, block_k, GROUP_M, 1, swap, num_warps, stages, skip)
        # Where a program makes several tiles. In steps of 16 inputs it takes 1.4 times the instructions: with merged block-rows,
        # whose weights no map describes, nearly all that the wall leaves room for. Counted for these; others are for measuring.
        several = -(-m // block_m) * -(-n // (merge * side_n)) > sms and num_warps == 8
        stays = gpu.warpgroup and itemsize == value_size == 2 and several and (merge == 1 or block_k > 16)
        chosen = replace(chosen, persistent=stays)
        yield chosen
        if (merge, block_m, skip) in tiles[:2]:  # what the arithmetic does not see
            yield replace(chosen, num_stages=stages - 1 if stages > 2 else 3)
            yield replace(chosen, num_warps=12 - num_warps)
            if gpu.tensor_maps and itemsize == value_size == 2:
                yield replace(chosen, persistent=not stays)
            if gpu.warpgroup and merge * side_n >= 64 and value_size == itemsize:
                yield replace(chosen, swap=not swap)


def predicted_cycles(
    config: LinearConfig,
    m: int,
    n: int,
    side_n: int,
    side_k: int,
    density: float,
    union: float,
    capability: int,
    itemsize: int = 2,
) -> dict[str, float]:
    """Clocks per input that each resource of the GPU is busy, at its peak, as the module's text counts them."""
    gpu = gpu_of(capability)
    tile = (config.merge, config.block_m, config.num_warps)
    return _resources(m, n, *tile, side_n, side_k, itemsize, itemsize, density, union, gpu, gpu.sms, config.skip)


def sdd_config(r: int, c: int, itemsize: int, capability: int) -> SddConfig:
    """Tiles for blocks of r x c."""
    gpu = gpu_of(capability)
    block_m = 64 if itemsize == 2 else 16  # as block_k above: m is what this product sums over
    # As above: 128 x 128 accumulators. In float32, beside whole operand tiles, eight warps spilled two registers on 8.0.
    num_warps = 4 if r * c < 128 * 128 else 8 if itemsize == 2 else 16
    return SddConfig(block_m, num_warps, _stages((r + c) * block_m * itemsize, gpu.shared, gpu))


def _small_configs(m, n, k, side_n, side_k, itemsize, value_size, unions, gpu: Gpu, sms: int) -> Iterator[LinearConfig]:
    """Bytes of the weight are the wall: each block is read once, and many programs keep many bytes on their way."""
    block_m = max(16, 1 << (m - 1).bit_length())  # the fewest wasted columns of y^T, from 16
    # Enough rows that the x tile, which comes from L2 again for each tile of block-rows, is no larger than what it meets.
    enough = next((merge for merge in sorted(unions) if merge * side_n >= block_m), max(unions))
    block_k = _block_k(side_k, itemsize, 128)
    for merge in sorted(unions, key=lambda merge: (abs(merge - enough), merge)):
        # Two programs on each SM hide the latency of each other's loads. A second kernel adds the parts in a fixed order.
        tiles, columns = -(-n // (merge * side_n)), int(unions[merge] * k / side_k)
        fitting = max(1, min(SPLIT_LIMIT, columns // 2))
        split = min(fitting, max(1, -(-2 * sms // tiles)))
        # A warp copies 512 bytes at once; more warps than the blocks of a step have to copy would only repeat its instructions.
        # As in _large_configs: two warps cannot use wgmma, which bytes leave idle anyway.
        most = 2 if value_size < itemsize and (gpu.warpgroup or gpu.tensor_memory) else 4
        num_warps = max(1, min(most, merge * side_n * block_k * value_size // 512))
        stage = (block_m * itemsize + merge * side_n * value_size) * block_k
        stages = _stages(stage, gpu.shared // 3, gpu, deepest=8)
        for parts in dict.fromkeys((split, min(fitting, 2 * split), max(1, split // 2), 1)):
            yield LinearConfig(merge, block_m, block_k, 1, parts, True, num_warps, stages)


def _float32_configs(m: int, side_n: int, side_k: int, gpu: Gpu) -> Iterator[LinearConfig]:
    """float32 is multiplied outside the tensor cores, with whole operand tiles in registers: 64 x 16 is what fits unspilled."""
    # The fewest wasted rows, from 16, the least that tensor cores take (tf32 runs through here too).
    # 64 x 64 spilled under Triton 3.7.
    least = min(max(16, 1 << (m - 1).bit_length()), 32 if side_n == 64 else 64)
    block_k = min(side_k, 16)
    for block_m in sorted((16, 32, 64), key=lambda rows: abs(rows - least)):
        # The operands take as many registers as the accumulators: with four warps ptxas spilled at 64 x 32 and stood at 254
        # registers at 64 x 128.
        num_warps = 8 if block_m * side_n >= 128 * 128 or block_m == 64 else 4
        stages = _stages((block_m + side_n) * block_k * 4, gpu.shared, gpu)
        yield LinearConfig(1, block_m, block_k, GROUP_M, 1, False, num_warps, stages)


def _block_k(side_k: int, itemsize: int, most: int) -> int:
    """The inputs of a step: those of a block up to `most` bytes; of int8 at least the 32 that Triton multiplies at once."""
    return max(32 if itemsize == 1 else 16, min(side_k, most // itemsize))


def _is_roomy(itemsize: int, gpu: Gpu) -> bool:
    """Whether registers hold 128 accumulators a thread, or 512 rows: not beside int8 operands of mma.sync, whose bytes Triton 3.9
    takes apart."""
    return itemsize > 1 or gpu.warpgroup or gpu.tensor_memory


def _warps(block_m: int, block_n: int, itemsize: int, gpu: Gpu) -> int:
    """Four up to 128 accumulators a thread, since fewer warps read fewer operands twice; else eight.

    Eight also for 512 x 32, whose 512 rows of x leave four warps no registers, and for wgmma, which needs two warp groups: one
    multiplies while the other waits.
    """
    outputs = block_m * block_n
    alone = block_n <= 32 or gpu.warpgroup or not _is_roomy(itemsize, gpu)
    return 8 if outputs > 128 * 128 or (outputs == 128 * 128 and alone) else 4


def _resources(
    m, n, merge, block_m, warps, side_n, side_k, itemsize, value_size, density, union, gpu, sms, skip=False
) -> dict[str, float]:
    block_n = merge * side_n
    tiles = -(-m // block_m) * -(-n // block_n)
    busiest = -(-tiles // sms)  # tiles that the busiest SM makes: the last wave is seldom full
    loaded = block_m * union * itemsize + block_n * density * value_size  # bytes
    # bytes of an input past L2, zeros behind it included
    width = max(itemsize, _block_k(side_k, itemsize, 128) // side_k)
    # Of the zeros: 4 block-rows that skip still bring in those of the columns that some share, about half of what they lack.
    filled = union if not skip else density if merge == 2 else (union + density) / 2
    of_values = width * value_size / itemsize
    if gpu.warpgroup:  # a warp group's 64 rows read the blocks once, and x tiles straight from shared memory
        read = block_m * union * width + block_n * union * max(1, block_m // 64) * of_values
    else:
        across = min(warps, max(1, block_m // 32))  # warps along m: each reads all blocks; those along n all of x
        read = block_m * union * (warps // across) * width + block_n * filled * across * of_values
    return {
        "tensor": busiest * block_m * block_n * (density if skip else union) * width / (2 * gpu.multiply_adds),
        "L2": tiles * loaded / gpu.l2_bytes,
        "shared": busiest * (block_m * union * width + block_n * filled * of_values + read) / gpu.shared_bytes,
    }


def _stages(bytes_per_stage: int, limit: int, gpu: Gpu, deepest: int = 4, conditional: bool = False) -> int:
    """Four stages cover the latency of an indirect load (column, then tile); fewer where shared memory ends first.

    Triton keeps as many tiles of each operand as stages for wgmma, tcgen05, AMD's loads past the registers and products under a
    condition, and one fewer for mma.sync, whose operands go to registers.
    """
    tiles = (limit - 1024) // bytes_per_stage  # 1024: scratch and alignment
    return max(2, min(deepest, tiles + (0 if gpu.warpgroup or gpu.tensor_memory or gpu.amd or conditional else 1)))
