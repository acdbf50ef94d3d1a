"""The CUDA C++ kernels of the sm_80 family, as nvcc compiles them, executed by the PTX emulator against float64."""

from __future__ import annotations

import heapq
import re
import subprocess
from collections import Counter, defaultdict
from functools import partial
from itertools import product
from pathlib import Path

import cuda_kernels
import ptx_emulator
import pytest
import torch
from cuda_kernels import BLOCKS, PAIRS
from triton_problems import (
    ACTIVATIONS,
    PROBLEMS,
    assert_as_good_as_torch,
    exact_and_dense,
    exact_and_reference_int8,
    make_problem,
)

import sparse_prune as sp
from sparse_prune import reference
from sparse_prune.benchmark import random_mask

pytestmark = pytest.mark.skipif(cuda_kernels.unavailable() is not None, reason=str(cuda_kernels.unavailable()))
BF16, F16 = torch.bfloat16, torch.float16


def layout_of(packed):
    from sparse_prune_kernels.cuda import make_layout

    (_, k), (r, c) = packed.shape, packed.blocksize
    return make_layout(packed.crow_indices, packed.col_indices, -(-k // c), r, c)


def steps_of(layout):
    """int32 [steps, groups, halves of a pair of columns, struct Step], without those to spare."""
    from sparse_prune_kernels import cuda

    return layout.tables[layout.sections()[2] :].view(-1, cuda.GROUPS, 2, 4)[: -cuda.SPARE_STEPS]


def rows_of_pairs(layout):
    """[pairs, steps, groups]: bits of the rows that each of a step's two pairs of columns has."""
    rows, present = 64 // layout.row, steps_of(layout)[:, :, 0, 2]
    return torch.stack([present >> (1 + 2 * rows * pair) & ((1 << rows) - 1) for pair in range(2)])


def check(problem, dtype=BF16, activation="none", extras=(True, True), **options):
    packed, x, bias, residual = make_problem(*problem, dtype)
    bias, residual = (tensor if used else None for tensor, used in zip((bias, residual), extras, strict=True))
    layout, blocks = layout_of(packed), tuple(packed.values.shape)
    at, _ = cuda_kernels.linear_launch(problem[0], packed.shape[0], blocks)
    assert (at.row, at.rows, at.tiles) == (layout.row, layout.rows, layout.tiles)
    y, counts = cuda_kernels.linear(
        cuda_kernels.aligned(x, 16),
        layout.pack(packed.values),
        blocks,
        packed.shape[0],
        bias,
        activation,
        residual,
        **options,
    )
    exact, dense = exact_and_dense(x, packed.to_dense(), bias, activation, residual)
    assert_as_good_as_torch(y, exact, dense)
    return packed, counts


def check_dx(problem, dtype=BF16, **options):
    """dx = dy @ W, by the same kernels over the layout of W^T."""
    from sparse_prune_kernels.cuda import make_layout

    packed, x, _, dy = make_problem(*problem, dtype)
    (_, k), (r, c) = packed.shape, packed.blocksize
    layout = make_layout(packed.crow_indices, packed.col_indices, -(-k // c), r, c, transposed=True)
    blocks = (packed.nnzb, c, r)
    at, _ = cuda_kernels.linear_launch(problem[0], k, blocks)
    assert (at.row, at.rows, at.tiles) == (layout.row, layout.rows, layout.tiles)
    dx, _ = cuda_kernels.linear(cuda_kernels.aligned(dy), layout.pack(packed.values), blocks, k, **options)
    weight = packed.to_dense()
    assert_as_good_as_torch(dx, dy.double() @ weight.double(), dy @ weight)


def check_sdd(problem, dtype=BF16, apart=8, **options):
    """dvalues = the stored blocks of dy^T @ x."""
    from sparse_prune_kernels.cuda import make_jobs

    packed, x, _, dy = make_problem(*problem, dtype)
    (_, k), (r, c) = packed.shape, packed.blocksize
    jobs = make_jobs(packed.crow_indices, packed.col_indices, -(-k // c), r, c)
    index = (packed.crow_indices, packed.col_indices)
    exact = reference.bsr_sdd(dy.double(), x.double(), *index, r, c)
    if packed.nnzb == 0:
        assert len(jobs) == 0
        return packed, None, jobs
    dy_rows, x_rows = cuda_kernels.aligned(dy, apart), cuda_kernels.aligned(x, 16)
    dvalues, counts = cuda_kernels.sdd(dy_rows, x_rows, jobs, tuple(packed.values.shape), **options)
    assert_as_good_as_torch(dvalues, exact, reference.bsr_sdd(dy, x, *index, r, c))
    return packed, counts, jobs


# (tokens, blocks that run one kernel): together all kernels; up to 64 tokens rows of 16 in units of one, longer ones of two.
GROUPS = [
    (16, BLOCKS),
    (64, [block for block in BLOCKS if block[0] == 16]),
    (64, [block for block in BLOCKS if block[0] > 16]),
    (128, [block for block in BLOCKS if block[0] >= 64]),
    (256, [block for block in BLOCKS if block[0] >= 64 and block[1] == 16]),
    (256, [block for block in BLOCKS if block[0] >= 64 and block[1] > 16]),
]
for most in (128, 256):
    GROUPS.append((most, [block for block in BLOCKS if block[0] == 16]))
    GROUPS += [(most, [(32, 16)]), (most, [block for block in BLOCKS if block[0] == 32 and block[1] > 16])]
CASES = cuda_kernels.rotation(GROUPS)
# Small and odd problems, which go round the same.
ODD = [(problem, tokens, *PAIRS[i % 6]) for i, (problem, tokens) in enumerate(product(PROBLEMS[1:], (None, 128, 256)))]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case):
    problem, tokens, dtype, mode, activation, extras = case
    check(problem, dtype, activation, extras, tokens=tokens, mode=mode)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_dx(case):
    """By the kernel that runs the forward product of a weight whose blocks lie across."""
    (m, n, k, r, c, density), tokens, dtype, mode, *_ = case
    check_dx((m, k, n, c, r, density), dtype, tokens=tokens, mode=mode)


@pytest.mark.parametrize("case", ODD, ids=str)
def test_small_and_odd_problems(case):
    problem, tokens, dtype, mode = case
    check(problem, dtype, "gelu", tokens=tokens, mode=mode)
    check_dx(problem, dtype, tokens=tokens, mode=mode)


def test_every_kernel_runs_with_every_dtype_in_every_mode_and_for_all_blocks():
    """Forward and dx: test_forward and test_dx run all that kernels_sm80.cu has."""
    ran = {(cuda_kernels.kernel_of(problem, tokens, dtype), mode) for problem, tokens, dtype, mode, *_ in CASES}
    there = kernels_of_weights(cuda_kernels.ptx("kernels_sm80.cu", "sm_80"))
    assert ran == set(product(there, ptx_emulator.MODES)) and len(there) == 24
    for few in (True, False):
        assert {problem[3:5] for problem, tokens, *_ in CASES if (tokens is None) == few} == set(BLOCKS)
    assert {case[4:] for case in CASES} == set(product(ACTIVATIONS, product((True, False), repeat=2)))


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("problem", PROBLEMS[1:], ids=str)
def test_sdd(problem, dtype):
    check_sdd(problem, dtype)


@pytest.mark.parametrize("mode", ptx_emulator.MODES)
@pytest.mark.parametrize("sms", [1, 108], ids=["whole", "parts"])
@pytest.mark.parametrize("block", [(16, 16), (32, 32), (64, 64), (128, 128), (64, 16), (16, 128), (128, 16)], ids=str)
def test_sdd_of_several_jobs_and_copies_that_end_whenever_they_like(block, sms, mode):
    dtype = F16 if block[1] == 128 else BF16  # both with units of 16 and of 32 outputs
    _, counts, jobs = check_sdd((530, 300, 500, *block, 0.4), dtype, sms=sms, mode=mode)
    assert len(jobs) > 2 and len(counts) == (1 if sms == 1 else 2)


@pytest.mark.parametrize("m", [9, 64])
@pytest.mark.parametrize("block", [(16, 16), (64, 32)], ids=str)
def test_few_tokens_give_the_same_bits_every_time(block, m):
    """Warps share a row and add their sums in one order, however their loads arrive."""
    packed, x, bias, _ = make_problem(m, 300, 500, *block, 0.4, BF16)
    given = (
        cuda_kernels.aligned(x),
        layout_of(packed).pack(packed.values),
        tuple(packed.values.shape),
        300,
        bias,
        "gelu",
    )
    first, *others = (
        cuda_kernels.linear(*given, mode=mode, seed=seed)[0]
        for mode, seed in (("late", 0), ("late", 0), ("early", 0), ("random", 1), ("random", 2))
    )
    assert first.isfinite().all() and all(torch.equal(first, y) for y in others)


@pytest.mark.parametrize("mode", ptx_emulator.MODES)
@pytest.mark.parametrize("block", [(16, 16), (32, 32), (64, 64), (128, 128), (64, 16), (16, 128), (128, 16)], ids=str)
def test_blocks_and_copies_that_end_whenever_they_like(block, mode):
    """Turns of all stages and the steps behind them, with inputs past the end and without; a residual that no vector holds."""
    for k in (2028, 2048):
        packed, _ = check((260, 300, k, *block, 0.4), mode=mode)
        layout = layout_of(packed)
        assert layout.tables[: 12 * layout.tiles].view(-1, 12)[:, 1].max() >= 8


# Blocks for which each of the kernels of 256 tokens runs: they make tiles of 192 too.
TALL = [(16, 16), (32, 16), (32, 32), (64, 16), (128, 64)]


def check_two_heights(m, cut, block, dtype=BF16, mode="late", **options):
    """Every output as of tiles of one height, bit for bit, and written once. The layout, and counts of both."""
    n, k = 144, 192
    packed, x, bias, residual = make_problem(m, n, k, *block, 0.6, dtype)
    layout = layout_of(packed)
    given = (
        cuda_kernels.aligned(x, 8),
        layout.pack(packed.values),
        tuple(packed.values.shape),
        n,
        bias,
        "gelu",
        residual,
    )
    y, counts = cuda_kernels.linear(*given, tokens=cut, mode=mode, **options)
    exact, dense = exact_and_dense(x, packed.to_dense(), bias, "gelu", residual)
    assert_as_good_as_torch(y, exact, dense)
    plain, of_plain = cuda_kernels.linear(*given, tokens=256, mode=mode, **options)
    assert torch.equal(y, plain) and 16 * counts.global_store_sectors == m * n
    return layout, counts, of_plain


# Rows of tokens of two tiles of outputs, as LinearLaunch has them, and how many times 64 tokens they hold: one of each height; four
# low ones beside three tall ones; both.
CUTS = [((1, 0), 7), ((0, 1), 12), ((1, 1), 19)]


@pytest.mark.parametrize("which", range(len(TALL)))
def test_tiles_of_two_heights(which):
    """Every number of tokens beyond whole units of 64."""
    for rest in range(which, 64, len(TALL)):
        cut, units = CUTS[rest % len(CUTS)]
        check_two_heights(64 * units - rest, cut, TALL[which], *PAIRS[rest // 2 % len(PAIRS)])


@pytest.mark.parametrize("block", [(16, 16), (32, 32), (64, 64), (128, 16)], ids=str)
def test_each_token_is_in_one_tile_and_the_last_multiprocessor_is_done_no_later(block):
    """As csrc/cuda/config.cpp cuts them, for GPUs of every size; tall tiles come first."""
    kinds = Counter()
    for sms, n in product((1, 3, 84, 108, 170), (128, 768, 4096)):
        for m in (*range(65, 1300, 59), 2048, 4096, 4160, 16384):
            at, launch = cuda_kernels.linear_launch(m, n, (1, *block), sms, work=equal(n))
            blocks = launch.blocks_of(m, at.tiles)
            assert len(blocks) == launch.blocks
            covered = defaultdict(list)
            for tile, first, tokens in blocks:
                covered[tile].append((first, tokens))
            assert sorted(covered) == list(range(at.tiles))
            for rows in covered.values():
                firsts, ends = zip(*((first, first + tokens) for first, tokens in sorted(rows)), strict=True)
                assert (0, *ends[:-1]) == firsts and firsts[-1] < m <= ends[-1]
            tall = [tokens for *_, tokens in blocks]
            assert tall == sorted(tall, reverse=True)
            kinds[len(set(tall)), launch.whole > 0] += 1
            if launch.tokens == 256:
                cost = {256: 400, 192: 3 * (103 if at.row == 64 else 113)}
                assert span([cost[tokens] for tokens in tall], sms) <= 400 * -(-(-(-m // 256) * at.tiles) // sms)
    assert min(kinds[2, True], kinds[2, False]) > 10, kinds


def equal(n):
    """The work of equal tiles for n outputs."""
    return torch.ones(-(-n // 128), dtype=torch.int32)


def check_work_of_low_tiles(block, **options):
    """Four of them do what three tall ones do, and read once more the weights (of which L2 gives a few more) and where they are."""
    layout, low, tall = check_two_heights(768, 192, block, **options)
    weights = 512 * len(layout.units)  # bytes
    assert low.tensor_fma == tall.tensor_fma
    assert weights <= 32 * (low.l2_load_sectors - tall.l2_load_sectors) <= 1.5 * weights
    staged = weights // 128 if layout.row == 16 else 0  # wavefronts to shared memory; from there four warps read them
    assert low.shared_wavefronts - tall.shared_wavefronts == 5 * staged


@pytest.mark.parametrize("block", TALL, ids=str)
def test_work_of_low_tiles(block):
    check_work_of_low_tiles(block)


def span(costs, sms):
    """When the last of sms multiprocessors is done, each of which takes the next cost as soon as it is done with one."""
    done = [0] * sms
    for cost in costs:
        heapq.heapreplace(done, done[0] + cost)
    return max(done)


def test_a_last_turn_of_low_tiles():
    """512 tall tiles on 108 multiprocessors are 4.74 turns; four turns of tall ones and one of low ones do as much."""
    at, launch = cuda_kernels.linear_launch(4096, 4096, (1, 64, 64), 108, work=equal(4096))
    tokens = [tokens for *_, tokens in launch.blocks_of(4096, at.tiles)]
    assert (launch.tall, launch.whole, tokens.count(256), tokens.count(192)) == (13, 5, 431, 108)
    assert span(tokens, 108) == 4 * 256 + 192


def test_a_cut_is_kept_for_the_work_it_was_chosen_by():
    """Where one tile has ten times the work of the others, two heights gain nothing."""
    even, uneven = equal(4096), equal(4096)
    uneven[0] *= 10
    found = [cuda_kernels.linear_launch(4096, 4096, (1, 64, 64), 108, work=work)[1].tall for work in (even, uneven) * 2]
    assert found == [13, 16, 13, 16]


@pytest.mark.parametrize("block", [(64, 64), (128, 128), (64, 16), (128, 16)], ids=str)
def test_tiles_of_a_random_mask_keep_the_multiprocessors_busy(block):
    """Tiles are as long as their blocks, not equal: docs/gpu-performance.md."""
    generator = torch.Generator().manual_seed(0)
    mask = random_mask((4096, 4096), block, 0.2, generator)
    layout = layout_of(sp.BsrWeight.from_dense(torch.ones(4096, 4096, dtype=BF16), mask, block))
    begin = layout.tables[: 12 * layout.tiles].view(-1, 12)[:, 2]  # units before each tile
    assert torch.equal(layout.work, torch.cat([begin[1:], begin.new_tensor([len(layout.units)])]) - begin)
    cut, plain = (
        4096 * int(layout.work.sum()) / 108 / own_span(4096, 4096, block, 108, layout.work, given)
        for given in (layout.work, None)
    )
    assert cut > 0.96 and plain < 0.94


def own_span(m, n, block, sms, work, given):
    """span of the blocks that the launcher makes of what it is given of the tiles' work, counted by their own."""
    at, launch = cuda_kernels.linear_launch(m, n, (1, *block), sms, work=given)
    assert launch.tokens > 0 and at.tiles == len(work)
    each = work.tolist()
    return span([each[tile] * tokens for tile, _, tokens in launch.blocks_of(m, at.tiles)], sms)


@pytest.mark.parametrize("shape", [(4096, 4096), (3072, 768), (768, 3072), (2048, 2048)], ids=str)
def test_two_heights_are_never_worse_than_one(shape):
    """By the tiles' own work, for random masks of rows that are alike or not; most of what is cut ends sooner by far."""
    from sparse_prune_kernels.plan import row_order

    (n, k), generator = shape, torch.Generator().manual_seed(0)
    gains = []
    for (r, c), density, skew in product([(32, 32), (64, 64), (128, 128), (64, 16)], (0.1, 0.2, 0.5), (0.0, 0.5)):
        score = torch.rand(n // r, k // c, generator=generator)
        score *= (skew * torch.randn(n // r, 1, generator=generator)).exp()
        mask = score >= score.quantile(1 - density)
        work = mask.sum(1)[row_order(mask, 128 // r)].sum(1).to(torch.int32)
        for sms, m in product((84, 108), (1024, 2048, 3000, 4096, 6000)):
            spans = [own_span(m, n, (r, c), sms, work, given) for given in (None, work)]
            gains.append(spans[0] / spans[1])
    assert min(gains) >= 1 and sum(gain > 1.02 for gain in gains) > 5, sorted(gains)[:5]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("extras", [(True, False), (False, True), (False, False)], ids=str)
def test_epilogues(activation, extras):
    check((70, 96, 64, 32, 32, 0.5), F16, activation, extras)
    check((5, 45, 70, 16, 32, 0.5), BF16, activation, extras)


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "dx"])
@pytest.mark.parametrize("tokens", [None, 128, 256])
@pytest.mark.parametrize("side, dtype", [(16, F16), (32, BF16), (32, F16), (64, BF16)], ids=str)
def test_what_is_not_finite_stays_with_who_reads_it(side, dtype, tokens, transposed):
    """In x (or dy) it reaches the outputs of its token whose block-row keeps its column, in W its output; nothing else changes."""
    from sparse_prune_kernels.cuda import make_layout

    packed, x, _, dy = make_problem(20, 7 * side - 3, 9 * side, side, side, 0.5, dtype)
    rows, mask, (n, k) = (
        (dy, packed.block_mask().T, packed.shape[::-1]) if transposed else (x, packed.block_mask(), packed.shape)
    )
    layout = make_layout(packed.crow_indices, packed.col_indices, 9, side, side, transposed=transposed)

    def times(rows, values):
        return cuda_kernels.linear(
            cuda_kernels.aligned(rows), layout.pack(values), tuple(values.shape), n, tokens=tokens
        )[0]

    clean, block = times(rows, packed.values), int(packed.col_indices[0])
    first = int(packed.block_mask()[:, block].nonzero()[0])  # block 0 is block-row first, block-column block
    out, at = (block * side + 7, first * side + 5) if transposed else (first * side + 5, block * side + 7)
    for number in (torch.nan, torch.inf):
        spoilt, values = rows.clone(), packed.values.clone()
        spoilt[3, at], values[0, 5, 7] = number, number
        reached = torch.zeros(20, n, dtype=torch.bool)
        reached[3] = mask[:, at // side].repeat_interleave(side)[:n]
        in_w = torch.zeros(20, n, dtype=torch.bool)
        in_w[:, out] = True
        for y, where in ((times(spoilt, packed.values), reached), (times(rows, values), in_w)):
            assert not y[where].isfinite().any() and torch.equal(y[~where], clean[~where])


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("side", [16, 32])
def test_what_is_not_finite_stays_with_its_output_or_input_in_dw(side, dtype):
    from sparse_prune_kernels.cuda import make_jobs

    packed, x, _, dy = make_problem(20, 7 * side, 9 * side, side, side, 0.5, dtype)
    jobs = make_jobs(packed.crow_indices, packed.col_indices, 9, side, side)

    def gradient(dy, x):
        return cuda_kernels.sdd(
            cuda_kernels.aligned(dy, 8), cuda_kernels.aligned(x, 16), jobs, tuple(packed.values.shape)
        )[0]

    clean, block = gradient(dy, x), int(packed.col_indices[0])
    first = int(packed.block_mask()[:, block].nonzero()[0])
    of_row = torch.repeat_interleave(torch.arange(7), packed.crow_indices.diff().long()) == first  # [nnzb]
    for number in (torch.nan, torch.inf):
        spoilt_dy, spoilt_x = dy.clone(), x.clone()
        spoilt_dy[3, first * side + 5], spoilt_x[3, block * side + 7] = number, number
        outputs, inputs = torch.zeros_like(clean, dtype=torch.bool), torch.zeros_like(clean, dtype=torch.bool)
        outputs[of_row, 5] = True
        inputs[packed.col_indices == block, :, 7] = True
        for dvalues, where in ((gradient(spoilt_dy, x), outputs), (gradient(dy, spoilt_x), inputs)):
            assert not dvalues[where].isfinite().any() and torch.equal(dvalues[~where], clean[~where])


@pytest.mark.parametrize("block", [(16, 16), (32, 32), (64, 64), (128, 128)], ids=str)
def test_tiles_with_most_steps_come_first(block):
    """The grid runs them in this order: its last blocks are short."""
    mask = torch.rand(1024 // block[0], 1024 // block[1]) < torch.rand(1024 // block[0], 1)  # rows of every density
    layout = layout_of(sp.BsrWeight.from_dense(torch.ones(1024, 1024, dtype=BF16), mask, block))
    steps = layout.tables[: 12 * layout.tiles].view(-1, 12)[:, 1]
    assert (steps.diff() <= 0).all() and steps[0] > steps[-1]


@pytest.mark.parametrize("k", [1024, 1000])
@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_a_group_has_or_lacks_the_pairs_of_a_step_together(density, k):
    """In all but the last two steps of a tile, which are never part of a turn; the last block's columns are its last."""
    packed = make_problem(1, 700, k, 32, 32, density, BF16)[0]
    layout = layout_of(packed)
    some, columns = (
        rows_of_pairs(layout) > 0,
        steps_of(layout)[:, 0, :, :2],
    )  # [pairs, steps, groups], [steps, halves, pairs]
    for first, count in layout.tables[: 12 * layout.tiles].view(-1, 12)[:, :2].tolist():
        pairs = some[:, first : first + count]
        assert torch.equal(pairs[0, :-2], pairs[1, :-2])
        used = columns[first : first + count].mT.reshape(-1, 2)[pairs.any(2).mT.flatten()][
            :, 0
        ]  # [pairs that there are]
        assert len(set(used.tolist())) == len(used) and set(used[:-1].tolist()).isdisjoint({62})


# What the tests below need of kernels_sm80.cu: nvcc takes a second for each kernel.
FEW = (
    (
        "kernels_sm80.cu",
        "LINEARS(bf16, __nv_bfloat16)\nLINEARS(f16, __half)\nSKINNIES(bf16, __nv_bfloat16)\nSKINNIES(f16, __half)\n",
        "LINEAR(bf16, __nv_bfloat16, 16, 16, 128) LINEAR(bf16, __nv_bfloat16, 32, 16, 128)"
        "LINEAR(bf16, __nv_bfloat16, 32, 32, 128) SKINNY(bf16, __nv_bfloat16, 16, 1)\n",
    ),
    ("kernels_sm80.cu", "{ENTRIES(bf16, true) ENTRIES(f16, false)}", "{SKINNY_ENTRY(bf16, true, 16, 1)}"),
)


@pytest.mark.parametrize("arch", ["sm_90", "sm_120"])
def test_younger_architectures(arch):
    check((130, 128, 320, 32, 32, 0.4), tokens=128, arch=arch, patch=FEW)


BUGS = {
    "one group too few is awaited": (
        "bsr_linear_sm80.cuh",
        "copies_wait<Shape::kStages - 2>()",
        "copies_wait<Shape::kStages - 1>()",
    ),
    "no barrier": ("bsr_linear_sm80.cuh", "__syncthreads();  //", "//"),
    "a stage is filled while it is read": (
        "bsr_linear_sm80.cuh",
        ": stage - 1;",
        ": stage;",
    ),
    "a swizzle of the copies alone": (
        "bsr_linear_sm80.cuh",
        "((pair * 4 + piece) ^ exchange(token)) * 16",
        "((pair * 4 + piece) ^ exchange(quad)) * 16",
    ),
    "tokens past the end are read": (
        "bsr_linear_sm80.cuh",
        "min(m0 + token + 64 * i, M - 1)",
        "(m0 + token + 64 * i)",
    ),
    "inputs past the end are read": ("bsr_linear_sm80.cuh", "if constexpr (!to_end)", "if constexpr (true)"),
    "inputs past the end are read within turns": (
        "bsr_linear_sm80.cuh",
        "kStages + kAhead + ragged",
        "kStages + kAhead",
    ),
    "a turn with less to copy": ("bsr_linear_sm80.cuh", "kStages + kAhead + ragged", "kStages + ragged"),
    "the last step is left out": ("bsr_linear_sm80.cuh", "rows >= kFollowing)", "rows >= 2 * kFollowing)"),
    "columns that are not alike": ("bsr_linear_sm80.cuh", "kTogether == 2 && kGroupRows == 2;", "kGroupRows == 2;"),
    "the same turn's steps again": (
        "bsr_linear_sm80.cuh",
        "step = behind<Shape::kStages * kStepThreads>(step, one);",
        "",
    ),
    "rows of a turn's first step": ("bsr_linear_sm80.cuh", "kShared ? 8 * stage + 1 : 1", "1"),
    "rows of a turn too late": ("bsr_linear_sm80.cuh", "stage == Shape::kStages - kAhead", "stage == 2"),
    "a row that is not there": ("bsr_linear_sm80.cuh", "if (!has(1)) continue;", ""),
    "tokens past the end are written": ("epilogue.cuh", "m >= M || n >= N", "n >= N"),
    "outputs past the end are written": ("epilogue.cuh", "if (n + i < N) y", "y"),
    "group 1 reads group 0's weights": (
        "bsr_linear_sm80.cuh",
        "if (group) b += __popc(rows >> 16 & 0x1ff) * (kUnits * 512);",
        "",
    ),
    "sums are added before all are there": ("bsr_linear_skinny.cuh", "__syncthreads();\n", "\n"),
    "few tokens, one past the end is read": (
        "bsr_linear_skinny.cuh",
        "min(lane / 4 + 8 * i, M - 1)",
        "(lane / 4 + 8 * i)",
    ),
    "few tokens, inputs past the end are read": ("bsr_linear_skinny.cuh", "K - k >= 16", "true"),
    "two warps take the same share": ("bsr_linear_skinny.cuh", "begin + warp * share", "begin + warp / 2 * share"),
    "a piece is left out": ("bsr_linear_skinny.cuh", "some < to; some += 32", "some < to - 1; some += 32"),
    "the next step's rows": ("bsr_linear_sm80.cuh", "next = here[kStepThreads].z;", "next = here[0].z;"),
    "a unit too far ahead": ("bsr_linear_sm80.cuh", "w_from + (unit + kHeld) * 32", "w_from + (unit + kHeld + 1) * 32"),
    "weights are not gone past": ("bsr_linear_sm80.cuh", "w_from = behind<kPiece * 32>(w_from, one);", ""),
}


def turns_red(*runs):
    """Whether one of these checks fails, as one must where a bug is planted."""
    for run in runs:
        try:
            run()
        except (AssertionError, ptx_emulator.EmulationError):
            return True
    return False


def checks(few_tokens, patch):
    """What a bug in the kernel for few tokens, or for many, turns red."""
    first = (13, 300, 500, 32, 16, 0.4) if few_tokens else (260, 300, 500, 32, 16, 0.9)
    problems = (first, (7, 165, 70, 16, 32, 0.5), (130, 128, 1024, 32, 16, 0.4))
    options = {"tokens": None if few_tokens else 128, "patch": patch}
    return [partial(check, problem, mode=mode, **options) for problem in problems for mode in ("late", "early")]


@pytest.mark.parametrize("few_tokens", [False, True])
def test_without_a_bug_all_is_green(few_tokens):
    assert not turns_red(*checks(few_tokens, FEW))


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(bug):
    assert turns_red(*checks("skinny" in BUGS[bug][0], (*FEW, BUGS[bug])))


# The same of tiles of two heights, in one kernel of 256 tokens.
FEW_TALL = ((*FEW[0][:2], "LINEAR(bf16, __nv_bfloat16, 64, 32, 256)\n"), (*FEW[1][:2], "{{}}"))
TALL_BUGS = {
    "low tiles copy as many tokens": ("if (!has_tokens(i)) continue;\n        const", "const"),
    "low tiles read as many tokens": ("if (has_tokens(i)) load_matrix", "load_matrix"),
    "low tiles multiply as many tokens": ("if (!has_tokens(i)) continue;\n            multiply", "multiply"),
    "low tiles write as many tokens": ("i < kTokenTiles && has_tokens(i)", "i < kTokenTiles"),
    "low tiles lack half of their tokens": ("i < kLowTokens / 64", "i < kLowTokens / 96"),
    "low rows as far apart as tall ones": ("(low ? kLowTokens : kBlockM)", "kBlockM"),
    "three tall rows more of the first tiles": ("rows = 3, first = tiles - whole;", "rows = 3;"),
    "low rows in place of tall ones once more": ("number -= swapped,", "number -= 0,"),
    "the rest begins where the first low rows do": ("m0 += whole > 0 ? kSwapTokens : 0;", "m0 += 0;"),
}


@pytest.mark.slow
@pytest.mark.parametrize("bug", [None, *TALL_BUGS])
def test_planted_bugs_in_tiles_of_two_heights_are_caught(bug):
    patch = FEW_TALL if bug is None else (*FEW_TALL, ("bsr_linear_sm80.cuh", *TALL_BUGS[bug]))
    cut = partial(check_two_heights, 1205, (1, 1), (64, 64), patch=patch)
    assert turns_red(cut, partial(check_work_of_low_tiles, (64, 64), patch=patch)) == (bug is not None)


SDD_BUGS = {
    "one group too few is awaited": ("copies_wait<kStages - 2>()", "copies_wait<kStages - 1>()"),
    "no barrier": ("__syncthreads();  //", "//"),
    "a stage is filled while it is read": (
        "const int fill = stage == 0 ? kStages - 1 : stage - 1;",
        "const int fill = stage;",
    ),
    "a swizzle of the copies alone": ("(lane % 2 ^ (lane / 8 % 2))", "(lane % 2)"),
    "tokens past the end are read": ("m < M && bytes[i] > 0", "bytes[i] > 0"),
    "outputs and inputs past the end are read": ("max(0, min(16, ((i == 0 ? N : K) - at) * 2))", "16"),
    "the same rows for all slots": ("rows != slots[j] % 256", "rows < 0"),
    "operands are not transposed back": ("b[0], b[2]", "b[0], b[1]"),
    "every part starts at the first token": ("first = part * share * 16", "first = 0"),
    "parts overwrite each other": ("parts + part * size + at) = ", "parts + at) = "),
    "the last part is left out": ("part < splits; ++part", "part < splits - 1; ++part"),
    "a lane's rows are exchanged": ("below * 8 + lane / 4", "(1 - below) * 8 + lane / 4"),
}


@pytest.mark.slow
@pytest.mark.parametrize("bug", [None, *SDD_BUGS])
def test_planted_bugs_in_sdd_are_caught(bug):
    patch = () if bug is None else (("bsr_sdd_sm80.cuh", *SDD_BUGS[bug]),)
    problems = ((530, 300, 500, 16, 32, 0.4), (300, 130, 200, 64, 16, 0.5))
    runs = (partial(check_sdd, problem, mode=mode, patch=patch) for problem in problems for mode in ("late", "early"))
    assert turns_red(*runs) == (bug is not None)


# As GROUPS: blocks of 8-bit weights have 32 inputs or more, and rows 32 outputs at most.
BLOCKS_8 = [block for block in BLOCKS if block[1] >= 32]
GROUPS_8 = [(16, BLOCKS_8)]
GROUPS_8 += [(64, [block for block in BLOCKS_8 if (block[0] == 16) == low]) for low in (True, False)]
for most in (128, 256):
    GROUPS_8.append((most, [block for block in BLOCKS_8 if block[0] == 16]))
    GROUPS_8 += [(most, [b for b in BLOCKS_8 if b[0] > 16 and (b[1] == 32) == narrow]) for narrow in (True, False)]
CASES_8 = cuda_kernels.rotation(GROUPS_8)
# Small and odd ones: no blocks at all, one row and column of blocks with a tail.
ODD_8 = [(1, 96, 64, 32, 32, 0.5), (9, 64, 64, 32, 32, 0.0), (1100, 40, 33, 32, 32, 0.5)]


def check_w8a8(problem, dtype=BF16, activation="gelu", extras=(True, True), x_scale=None, of=torch.int8, **options):
    from sparse_prune_kernels.cuda import ROW_8, make_layout

    packed, x, bias, residual = make_problem(*problem, dtype)
    packed = packed.to(torch.float32).quantize(of)
    bias, residual = (tensor if used else None for tensor, used in zip((bias, residual), extras, strict=True))
    (_, k), (r, c) = packed.shape, packed.blocksize
    index = (packed.crow_indices, packed.col_indices, -(-k // c))
    weight = make_layout(*index, r, c // 2, most_row=ROW_8).pack(packed.values.view(torch.int16))
    given = (cuda_kernels.aligned(x, 8), weight, packed.scales, tuple(packed.values.shape), packed.shape[0])
    y, counts = cuda_kernels.linear_w8a8(*given, bias, activation, residual, x_scale, of=of, **options)
    assert_as_good_as_torch(y, *exact_and_reference_int8(x, packed, bias, activation, residual, x_scale))
    return packed, counts


E4M3 = torch.float8_e4m3fn


def few_of_8_bits(kind, shape):
    """A patch that leaves one kernel of that shape, and what rounds x, for bfloat16: they compile sooner."""
    file, pair = f"kernels_{kind}.cu", f"{kind.capitalize()}Pair"
    one = f"LINEAR({kind}, {pair}, bf16, __nv_bfloat16, {shape}) QUANTIZE({kind}, {pair}, bf16, __nv_bfloat16)"
    return (
        (file, f"ALL({kind}, {pair}, bf16, __nv_bfloat16)\nALL({kind}, {pair}, f16, __half)", one),
        (
            file,
            f"{{ENTRIES({kind}, bf16, true) ENTRIES({kind}, f16, false)}}",
            f"{{QUANTIZE_ENTRY({kind}, bf16, true)}}",
        ),
    )


ARCHS_8 = {torch.int8: "sm_80", E4M3: "sm_89"}


@pytest.mark.parametrize("of", ARCHS_8, ids=str)
@pytest.mark.parametrize("case", CASES_8, ids=str)
def test_weights_of_8_bits(case, of):
    """Every third with a scale given for x, by which some of it saturates."""
    problem, tokens, dtype, mode, activation, extras = case
    x_scale = (0.02 if of == torch.int8 else 0.004) if CASES_8.index(case) % 3 == 0 else None
    check_w8a8(problem, dtype, activation, extras, x_scale, of, tokens=tokens, arch=ARCHS_8[of], mode=mode)


@pytest.mark.parametrize("of", ARCHS_8, ids=str)
@pytest.mark.parametrize("tokens", [None, 128, 256])
@pytest.mark.parametrize("problem", ODD_8, ids=str)
def test_small_and_odd_problems_of_8_bits(problem, tokens, of):
    check_w8a8(problem, tokens=tokens, of=of, arch=ARCHS_8[of])


@pytest.mark.parametrize("of", ARCHS_8, ids=str)
def test_every_kernel_of_8_bits_runs_with_every_dtype_in_every_mode(of):
    ran = {(cuda_kernels.kernel_of(problem, tokens, dtype, of), mode) for problem, tokens, dtype, mode, *_ in CASES_8}
    there = kernels_of_weights(cuda_kernels.ptx(f"kernels_{cuda_kernels.KINDS[of]}.cu", ARCHS_8[of]))
    assert ran == set(product(there, ptx_emulator.MODES)) and len(there) == 18
    for few in (True, False):
        assert {problem[3:5] for problem, tokens, *_ in CASES_8 if (tokens is None) == few} == set(BLOCKS_8)


E4M3_BUGS = {
    "pairs turned round": ("w8a8.cuh", ': "f"(high), "f"(low));', ': "f"(low), "f"(high));'),
    "the scale of int8": ("w8a8.cuh", "{ return 448.0f; }", "{ return 127.0f; }"),
    "operands of mma exchanged": (
        "bsr_linear_sm80.cuh",
        "[0], a[c % kLoaded][i], v.x, v.y",
        "[0], a[c % kLoaded][i], v.y, v.x",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("bug", [None, *E4M3_BUGS])
def test_planted_bugs_in_e4m3_are_caught(bug):
    patch = (*few_of_8_bits("e4m3", "32, 32, 128"), *([] if bug is None else [E4M3_BUGS[bug]]))
    options = {"of": E4M3, "arch": "sm_89", "patch": patch}
    rounding = partial(check_rounding, BF16, None, **options)
    product = partial(check_w8a8, (130, 128, 320, 32, 64, 0.4), tokens=128, **options)
    assert turns_red(rounding, product) == (bug is not None)


@pytest.mark.parametrize("arch", ["sm_90", "sm_120"])
def test_e4m3_on_younger_architectures(arch):
    check_w8a8((130, 128, 320, 32, 64, 0.4), tokens=128, of=E4M3, arch=arch, patch=few_of_8_bits("e4m3", "32, 32, 128"))


def check_rounding(dtype, x_scale, of=torch.int8, arch="sm_80", **options):
    """Bit for bit as the reference, NaN and infinity included, and zeros behind the last input."""
    x = torch.randn(9, 1203, dtype=torch.float64).mul_(torch.logspace(-6, 4, 9, dtype=torch.float64)[:, None]).to(dtype)
    x[1], x[3, 1202], x[4, 0], x[5, 700] = 0.0, torch.nan, torch.inf, -torch.inf
    for k in (1203, 1200, 5):
        q, scales = cuda_kernels.quantize(cuda_kernels.aligned(x[:, :k]), x_scale, arch, of=of, **options)
        wanted, wanted_scales = reference.quantize_rows(x[:, :k], x_scale, of)
        assert torch.equal(q[:, :k].view(torch.int8), wanted.view(torch.int8)) and not q[:, k:].view(torch.int8).any()
        torch.testing.assert_close(scales, wanted_scales, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("x_scale", [None, 0.013], ids=str)
def test_rows_are_rounded_as_the_reference_does(dtype, x_scale):
    check_rounding(dtype, x_scale)
    check_rounding(dtype, x_scale, E4M3, "sm_89")


INT8_BUGS = {
    "scales of other outputs": ("epilogue.cuh", "scales[n + i] * x_scale", "scales[n] * x_scale"),
    "no scale of the token": ("epilogue.cuh", "scales[n + i] * x_scale", "scales[n + i]"),
    "scales past the end are read": ("epilogue.cuh", "n + i < epilogue.N ? sums", "true ? sums"),
    "the padding of x is left as it was": ("w8a8.cuh", "k < ldq;", "k < K;"),
    "rounded towards zero": ("w8a8.cuh", "(__float2int_rn(low)", "(__float2int_rz(low)"),
    "the last inputs do not count for the scale": (
        "w8a8.cuh",
        "for (int k = threadIdx.x * 8; k < K;",
        "for (int k = threadIdx.x * 8; k + 8 <= K;",
    ),
    "one warp's highest alone": ("w8a8.cuh", "highest = max(highest, highest_of[warp]);", ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("bug", [None, *INT8_BUGS])
def test_planted_bugs_in_int8_are_caught(bug):
    patch = (*few_of_8_bits("int8", "16, 16, 128"), *([] if bug is None else [INT8_BUGS[bug]]))
    problems = ((130, 45, 1111, 16, 32, 0.5), (65, 96, 64, 16, 32, 0.5))
    products = (partial(check_w8a8, problem, tokens=128, patch=patch) for problem in problems)
    assert turns_red(partial(check_rounding, BF16, None, patch=patch), *products) == (bug is not None)


@pytest.mark.parametrize("arch", ["sm_90", "sm_120"])
def test_sdd_on_younger_architectures(arch):
    check_sdd((260, 128, 320, 32, 32, 0.4), arch=arch)


@pytest.mark.parametrize("block", [(16, 16), (32, 32), (64, 64), (128, 128)], ids=str)
def test_work_of_sdd(block):
    """Only blocks that exist are multiplied; dy comes once for each job, x once for each of its columns; no bank conflicts."""
    packed, (counts,), jobs = check_sdd((256, 512, 1024, *block, 0.2), apart=16, sms=1)
    assert counts.tensor_fma == 256 * packed.values.numel()
    pieces = int((jobs[:, :32] >= 0).sum())
    loaded = 2 * 256 * 16 * pieces
    assert loaded <= 32 * counts.l2_load_sectors <= 1.02 * loaded + 2 * 4 * jobs.numel()
    assert counts.shared_wavefronts == counts.shared_ideal
    assert 32 * counts.global_store_sectors == 2 * 2 * packed.values.numel()  # halves of sectors, as a fragment lies


@pytest.mark.parametrize("block", [(16, 16), (32, 32), (64, 64), (128, 128)], ids=str)
def test_work_is_what_the_documentation_counts(block):
    """Only blocks that exist are multiplied and loaded; x comes once for each column of a tile's union; no bank conflicts."""
    r, c = block
    packed, counts = check((512, 512, 1024, r, c, 0.2), extras=(False, False), tokens=256)
    layout = layout_of(packed)
    assert counts.tensor_fma == 512 * packed.nnzb * r * c
    at = steps_of(layout)[:, 0, :, : 1 if r == 16 else 2]  # [steps, halves, pairs]
    columns = int((at[:, 0] != at[:, 1]).sum()) + at[:, 0].numel()
    loaded = 2 * 512 * 16 * columns + 2 * 2 * packed.values.numel()
    assert loaded <= 32 * counts.l2_load_sectors <= 1.02 * loaded + 2 * 4 * layout.tables.numel() + 4096
    assert counts.shared_wavefronts <= 1.01 * counts.shared_ideal


# (M, K, N), blocksize, density, kind of bound, the least that the design promises: docs/gpu-performance.md.
PROMISED = [
    ((16, 4096, 4096), (16, 16), 0.1, "speedup_bound", 8.0),
    ((16, 4096, 4096), (64, 64), 0.1, "speedup_bound", 8.0),
    ((512, 768, 3072), (16, 16), 0.2, "e_bound", 0.5),  # Triton: 0.42
    ((4096, 4096, 4096), (16, 16), 0.2, "e_bound", 0.6),
    ((4096, 4096, 4096), (32, 32), 0.2, "e_bound", 0.85),
    (
        (4096, 4096, 4096),
        (64, 64),
        0.2,
        "e_bound",
        0.99,
    ),  # in tiles of one height .948: 512 are 4.74 of 5 turns of 108 SMs
    ((4096, 4096, 4096), (128, 128), 0.2, "e_bound", 0.99),
]


@pytest.mark.parametrize("promised", PROMISED, ids=str)
def test_bounds_are_those_promised(promised):
    pytest.importorskip("triton", reason="Triton, which bench gpu-bounds compares with, is not installed")
    from sparse_prune import gpu_bounds

    problem, block, density, kind, least = promised
    packed = gpu_bounds.weight_of(problem, block, density)
    row = gpu_bounds.cuda_row(80, problem[0], packed)
    assert row[kind] >= least, row
    if problem[0] <= 64:
        assert row["bytes_ratio"] <= 1.05 and row["limit"] == "DRAM"


def main_loop(kernel, folder):
    """The machine code of the loop of a kernel for sm_80, in lists of instructions that run together."""
    tools = pytest.importorskip("triton.backends.nvidia.compiler").__file__
    text, cubin = folder / "kernel.ptx", folder / "kernel.cubin"
    text.write_text(cuda_kernels.ptx("kernels_sm80.cu", "sm_80"))
    command = [cuda_kernels.nvcc(), "-arch=sm_80", "-cubin", f"-Xptxas=-e,{kernel}", text, "-o", cubin]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    disassemble = [Path(tools).with_name("bin") / "cuobjdump", "-sass", "-fun", kernel, cubin]
    sass = subprocess.run(list(map(str, disassemble)), check=True, capture_output=True, text=True).stdout
    code = [(int(at, 16), line) for at, line in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", sass, re.MULTILINE)]
    jumps = {at: int(m[1], 16) for at, line in code if (m := re.search(r"BRA.* 0x([0-9a-f]+)$", line))}
    loops = [
        [(at, line) for at, line in code if to <= at <= end]
        for end, to in jumps.items()
        if to < end and any(to <= at <= end and "HMMA" in line for at, line in code)
    ]
    runs = [[]]
    for at, line in max(loops, key=len):  # the shorter one is of a tile's last steps
        if at in jumps.values():
            runs.append([])
        runs[-1].append(line)
        if at in jumps:
            runs.append([])
    return [run for run in runs if run]


# Kernel, blocks, density, the part of the main loop's instructions that are mma; docs/gpu-performance.md has what else there is.
SHARES = [
    ("32x32_256", (32, 32), 0.2, 0.5),
    ("32x32_256", (32, 32), 0.1, 0.48),
    ("64x32_256", (64, 64), 0.2, 0.6),
    ("64x32_256", (128, 128), 0.2, 0.65),
    ("64x16_256", (64, 16), 0.2, 0.56),
    ("64x16_256", (128, 16), 0.2, 0.63),
    ("32x32_128", (32, 32), 0.2, 0.4),
    ("64x16_128", (64, 64), 0.2, 0.47),
    ("64x16_128", (128, 128), 0.2, 0.53),
]


@pytest.mark.parametrize("case", SHARES, ids=str)
def test_instructions_of_the_main_loop(case, tmp_path):
    """Counted in machine code, each run of instructions as often as the steps of a weight run it; nothing spilled."""
    (kernel, block, density, least), generator = case, torch.Generator().manual_seed(0)
    packed = sp.BsrWeight.from_dense(
        torch.ones(4096, 4096, dtype=BF16), random_mask((4096, 4096), block, density, generator), block
    )
    layout = layout_of(packed)
    rows = 64 // layout.row
    pairs = rows_of_pairs(layout)  # [pairs, steps, groups]
    some, each = (pairs > 0).double().mean(), sum(pairs >> row & 1 for row in range(rows)).double().mean() / rows
    runs = main_loop(f"bsr_linear_sm80_bf16_{kernel}", tmp_path)
    assert not re.search(r"\b(STL|LDL|BSSY)\b|ZFILL", str(runs)) and "LDG.E.128.CONSTANT" in str(runs)
    products = every = 0.0
    for run in runs:
        kinds = str(run)
        often = each if "HMMA" in kinds else some if "LDSM" in kinds else 1.0
        products += often * kinds.count("HMMA")
        every += often * len(run)
    print(f"{kernel}, blocks of {block} at {density}: {products / every:.3f} of {every / 3:.0f} instructions a step")
    assert products / every >= least


def narrow_loads_of_weights(text, kernel):
    """How many loads of a kernel's second parameter, the weights, its PTX has, and those of them that are not of 16 bytes."""
    start = text.index(f".entry {kernel}(")
    body = text[start : text.find(".entry", start + 10) if text.find(".entry", start + 10) > 0 else len(text)]
    known, loads = set(), []
    for line in body.splitlines():
        if f"[{kernel}_param_1]" in line:
            known.add(re.search(r"(%rd\d+), \[", line)[1])
        elif match := re.match(r"\s*(?:@%p\d+ )?(ld\.global\S*|cp\.async\.c[ag]\S*)\s+(.*);", line):
            if known & set(re.findall(r"%rd\d+", match[2].rpartition("[")[2])):
                loads.append((match[1], match[2]))
        elif (match := re.match(r"\s*(?:add|mad|mov|cvta|selp)\S*\s+(%rd\d+), (.*);", line)) and known & set(
            re.findall(r"%rd\d+", match[2])
        ):
            known.add(match[1])
    wide = ("v4.b32", "v4.u32")
    return len(loads), [load for load in loads if not (load[0].endswith(wide) or load[1].endswith(", 16"))]


def kernels_of_weights(text):
    return re.findall(r"\.entry (bsr_linear_s\w+)\(", text)


def test_every_load_of_weights_is_of_16_bytes():
    """In every kernel, whatever reads the pointer to the weights; and halves of 8 bytes would be found."""
    text = cuda_kernels.ptx("kernels_sm80.cu", "sm_80")
    assert len(kernels_of_weights(text)) == 24
    for kernel in kernels_of_weights(text):
        count, narrow = narrow_loads_of_weights(text, kernel)
        assert count > 0 and narrow == [], (kernel, narrow)
    halves = (
        "ptx.cuh",
        'asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"',
    )
    halved = 'asm volatile("ld.global.nc.v2.b32 {%0, %1}, [%4]; ld.global.nc.v2.b32 {%2, %3}, [%4+8];"'
    text = cuda_kernels.ptx("kernels_sm80.cu", "sm_80", (*FEW, (*halves, halved)))
    assert narrow_loads_of_weights(text, "bsr_linear_skinny_bf16_16_1")[1]
