"""What Triton compiles for GPUs that are not here, executed by the PTX emulator against float64."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import mmap
import re

import ptx_emulator
import pytest
import torch
from ptx_emulator import EmulationError
from test_ptx_emulator import EXPECT, REFILL, RING, WAIT_GROUP, WGMMA_WAIT, WRONG, ZERO_FILL, replaced
from test_ptx_emulator import number as with_number
from triton_problems import (
    PROBLEMS,
    TRITON,
    arrays,
    assert_as_good_as_torch,
    exact_and_dense,
    exact_and_reference_int8,
    make_problem,
    needs_triton,
)

import sparse_prune as sp
from sparse_prune import reference

pytestmark = [
    pytest.mark.skipif(ptx_emulator.unavailable() is not None, reason=str(ptx_emulator.unavailable())),
    needs_triton,
]
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
MODES = ptx_emulator.MODES
CAPABILITIES = (80, 90, 120)  # mma.sync with cp.async, wgmma, mma.sync again by a younger compiler


def rotated(problems, dtypes=(BF16, F16, F32)):
    """(problem, dtype, capability, mode): each problem on every GPU, there in another dtype and mode: two Latin squares."""
    return [
        (problem, dtypes[(i + j) % 3], capability, MODES[(i + 2 * j) % 3])
        for i, problem in enumerate(problems)
        for j, capability in enumerate(CAPABILITIES)
    ]


ROTATED = rotated(PROBLEMS[1:])
EPILOGUES = [
    (m, activation, extras, capability, MODES[(i + j + k) % 3])
    for m in (5, 70)
    for i, activation in enumerate(reference.ACTIVATIONS)
    for j, extras in enumerate(((True, False), (False, True)))
    for k, capability in enumerate(CAPABILITIES)
]
SKIPPING = [(merge, side, mode) for merge, side in ((2, 32), (4, 16), (2, 16)) for mode in MODES]


def run(calls, capability, mode="late", count=True):
    """Compile each call as its launch would and execute it; returns what the emulator counted."""
    from sparse_prune_kernels import offline

    counts = []
    for call in calls:
        made = offline.compile_call(call, capability)
        arguments = made.read(call, ptx_emulator.TensorMap)
        name = call.kernel.fn.__name__
        counts.append(
            ptx_emulator.emulate(
                made.ptx,
                name,
                call.grid,
                32 * call.num_warps,
                arguments,
                shared_bytes=made.shared,
                mode=mode,
                count=count,
            )
        )
    return counts


def calls_of(
    x,
    packed,
    bias,
    residual,
    activation,
    capability,
    precision="ieee",
    transposed=False,
    config=None,
    times=False,
    sms=2,
):
    """act(x @ W^T + bias) + residual, or x @ W if transposed: what it becomes, and the calls that a launch would choose.

    sms: so few that a program that stays makes several tiles.
    """
    from sparse_prune_kernels import launch
    from sparse_prune_kernels.config import linear_config

    (n, k), (r, c) = packed.shape, packed.blocksize
    crow, col, values = arrays(packed)
    plans = launch.plans_of(crow, col, n, k, r, c, x.element_size(), transposed)
    if transposed:
        (n, k), (r, c) = (k, n), (c, r)
    unions = {merge: plan.union for merge, plan in plans.items()}
    config = config or linear_config(len(x), n, k, r, c, x.element_size(), capability, packed.density, unions)
    y = x.new_full((len(x), n), torch.nan)
    strides = (1, r) if transposed else (c, 1)
    plan = plans[config.merge]
    extras = (activation, config, precision)
    schedule = launch.schedule_for(x, plan, values, c, config, sms)
    return y, launch.linear_calls(
        x, plan, values, bias, residual, y, r, c, *strides, *extras, times=times, schedule=schedule
    )


def product(x, packed, bias, residual, activation, capability, *options, mode="late", **more):
    """As calls_of, by the compiled kernels; and what was counted."""
    y, calls = calls_of(x, packed, bias, residual, activation, capability, *options, **more)
    return y, run(calls, capability, mode)


def blocks_of_product(dy, x, packed, capability):
    """The stored blocks of dy^T @ x: what they become, and the calls that make them."""
    from sparse_prune_kernels import launch
    from sparse_prune_kernels.config import sdd_config

    crow, col, values = arrays(packed)
    dvalues = torch.full_like(values, torch.nan)
    config = sdd_config(*packed.blocksize, x.element_size(), capability)
    calls = [launch.sdd_call(dy, x, launch.row_of_blocks(crow, len(col)), col, dvalues, config, "ieee")]
    return dvalues, calls if len(col) else []


def check_forward(
    problem, dtype, capability, activation="gelu", extras=(True, True), precision="ieee", config=None, mode="late"
):
    packed, x, bias, residual = make_problem(*problem, dtype)
    bias, residual = (tensor if used else None for tensor, used in zip((bias, residual), extras, strict=True))
    y, counts = product(x, packed, bias, residual, activation, capability, precision, config=config, mode=mode)
    weight = packed.to_dense()
    exact, dense = exact_and_dense(x, weight, bias, activation, residual)
    if precision == "tf32":  # operands are cut to 11 digits
        assert not y.isnan().any() and (y.double() - exact).abs().max() <= 2**-10 * (x.abs() @ weight.abs().T).max()
    else:
        assert_as_good_as_torch(y, exact, dense)
    return packed, counts


@pytest.mark.parametrize("problem, dtype, capability, mode", ROTATED, ids=str)
def test_forward(problem, dtype, capability, mode):
    check_forward(problem, dtype, capability, mode=mode)


@pytest.mark.parametrize("capability, mode", list(zip(CAPABILITIES, MODES, strict=True)))
@pytest.mark.parametrize("problem", [(33, 64, 96, 32, 32, 0.5), (7, 45, 70, 16, 32, 0.5)], ids=str)
def test_tf32(problem, capability, mode):
    check_forward(problem, F32, capability, precision="tf32", mode=mode)


@pytest.mark.parametrize("m, activation, extras, capability, mode", EPILOGUES, ids=str)
def test_epilogues(m, activation, extras, capability, mode):
    """Within the kernel, and (small m) in the one that adds the parts."""
    k, density = (600, 0.7) if m == 5 else (70, 0.5)  # enough steps to share
    _, counts = check_forward((m, 45, k, 16, 32, density), BF16, capability, activation, extras, mode=mode)
    assert len(counts) == (2 if m == 5 else 1)


@pytest.mark.parametrize("place, capability", list(enumerate(CAPABILITIES)))
@pytest.mark.parametrize("kind, m, k", [("parts", 5, 600), ("whole", 70, 70), ("skip", 130, 96)])
def test_what_is_stored_times_another_matrix(kind, m, k, place, capability):
    """A gated MLP's gate, whose kernel multiplies by up's product, in each kernel that stores y."""
    from sparse_prune_kernels.config import LinearConfig

    skips = kind == "skip" and capability != 90
    config = LinearConfig(2, 128, 16, 8, 1, False, 4, 3, skip=True) if skips else None
    packed, x, bias, up = make_problem(m, 45, k, 16, 32, 0.7, BF16)
    y, counts = product(x, packed, bias, up, "silu", capability, config=config, times=True, mode=MODES[place])
    assert len(counts) == (2 if kind == "parts" else 1)
    exact, dense = exact_and_dense(x, packed.to_dense(), bias, "silu", None)
    assert_as_good_as_torch(y, exact * up.double(), dense * up)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("mode", MODES)
def test_asynchronous_copies_may_end_whenever_they_like(mode, capability):
    check_forward((260, 128, 640, 32, 32, 0.4), BF16, capability, mode=mode)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    "tiling", [(8, 256, 1, False), (4, 64, 2, True), (2, 512, 1, False), (8, 128, 1, True)], ids=str
)
def test_merged_rows(tiling, capability):
    from sparse_prune_kernels.config import LinearConfig

    merge, block_m, split, swap = tiling
    config = LinearConfig(merge, block_m, 16, 8, split, swap, 8 if block_m * merge * 16 >= 128 * 128 else 4, 3)
    packed, counts = check_forward((130, 9 * 16 - 5, 90, 16, 16, 0.4), F16, capability, config=config)


@pytest.mark.parametrize("merge, side, mode", SKIPPING)
def test_skipping_what_a_block_row_lacks(merge, side, mode):
    """As they ship for A100, with K and N that no block divides, in both directions."""
    from sparse_prune_kernels.config import LinearConfig

    config = LinearConfig(merge, 256, side, 8, 1, False, 4, 3, skip=True)
    check_forward((300, 9 * side - 5, 9 * side + 5, side, side, 0.4), BF16, 80, config=config, mode=mode)
    packed, _, _, dy = make_problem(40, 5 * side - 3, 7 * side, side, side, 0.4, F16)
    weight, config = packed.to_dense(), LinearConfig(merge, 128, side, 8, 1, False, 4, 3, skip=True)
    dx, _ = product(dy, packed, None, None, "none", 120, transposed=True, config=config, mode=mode)
    assert_as_good_as_torch(dx, dy.double() @ weight.double(), dy @ weight)


def staying(merge, block_m, block_k, num_warps, swap=False, stages=3):
    from sparse_prune_kernels.config import LinearConfig

    return LinearConfig(merge, block_m, block_k, 2, 1, swap, num_warps, stages, persistent=True)


# (problem, tiling, dtype, capability): tails of rows, outputs and inputs; what ships for H100 (128x128, 64x64, 128x16, 32x32),
# several steps a block, a block-row without blocks, all blocks kept, one row; mma.sync under maps. Rows are whole 16 bytes apart.
STAYING = [
    ((300, 300, 504, 128, 128, 0.6), (1, 256, 64, 8, True, 4), BF16, 90),
    ((600, 312, 328, 64, 64, 0.5), (2, 256, 64, 8, True, 4), F16, 90),
    ((300, 300, 104, 128, 16, 0.5), (1, 256, 16, 8, True, 4), F16, 90),
    ((300, 300, 200, 32, 32, 0.5), (4, 256, 32, 8, True, 4), BF16, 90),
    ((1, 45, 72, 64, 64, 1.0), (1, 64, 64, 4), BF16, 90),
    ((1100, 40, 40, 32, 16, 0.5), (1, 64, 16, 4), F16, 90),
    ((300, 300, 200, 128, 128, 0.6), (1, 128, 64, 8), BF16, 120),
    ((130, 140, 104, 16, 16, 0.5), (8, 128, 16, 4), F16, 120),
]


def skip_where_none_stays(merge):
    if merge > 1 and TRITON < (3, 9):
        pytest.skip("before Triton 3.9 programs of merged block-rows make one tile each")


def only_what_stays(counts, *others):
    """One kernel ran, and it copied by tensor maps."""
    assert not others and counts.kinds["copy_bulk"] > 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("problem, tiling, dtype, capability", STAYING, ids=str)
def test_programs_that_stay(problem, tiling, dtype, capability, mode):
    skip_where_none_stays(tiling[0])
    _, counts = check_forward(problem, dtype, capability, config=staying(*tiling), mode=mode)
    only_what_stays(*counts)


@pytest.mark.parametrize("extras", [(True, False), (False, True)], ids=str)
@pytest.mark.parametrize("place, activation", list(enumerate(reference.ACTIVATIONS)))
def test_epilogues_of_programs_that_stay(place, activation, extras):
    problem, mode = (70, 45, 72, 16, 32, 0.6), MODES[(place + extras[0]) % 3]
    config, capability = staying(1, 64, 32, 4, swap=place % 2 == 1), (90, 120)[place % 2]
    _, counts = check_forward(problem, BF16, capability, activation, extras, config=config, mode=mode)
    only_what_stays(*counts)


def test_programs_that_stay_multiply_by_another_matrix():
    packed, x, bias, up = make_problem(130, 45, 96, 16, 32, 0.7, BF16)
    y, counts = product(x, packed, bias, up, "silu", 90, config=staying(1, 64, 32, 4), times=True)
    only_what_stays(*counts)
    exact, dense = exact_and_dense(x, packed.to_dense(), bias, "silu", None)
    assert_as_good_as_torch(y, exact * up.double(), dense * up)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("merge, r, c, capability", [(1, 128, 128, 90), (2, 64, 64, 90), (1, 16, 32, 120)], ids=str)
def test_gradients_by_programs_that_stay(merge, r, c, capability, mode):
    skip_where_none_stays(merge)
    packed, _, _, dy = make_problem(300, 3 * r - 8, 3 * c, r, c, 0.9, BF16)
    config = staying(merge, 256, min(r, 64), 8, merge * c == 128, 4)
    dx, counts = product(dy, packed, None, None, "none", capability, transposed=True, config=config, mode=mode)
    only_what_stays(*counts)
    weight = packed.to_dense()
    assert_as_good_as_torch(dx, dy.double() @ weight.double(), dy @ weight)


@pytest.mark.parametrize(
    "what", ["rows apart", "rows apart by other than 16 bytes", "a first row off 16 bytes", "no block"]
)
def test_what_no_tensor_map_describes_goes_without(what):
    """The same tiling, by the kernel whose programs make one tile each."""
    packed, x, *_ = make_problem(130, 64, 72, 32, 32, 0.0 if what == "no block" else 0.7, BF16)
    wide = torch.full((130, 88 if what == "rows apart" else 81), torch.nan, dtype=BF16)
    wide = wide if "other" in what or what == "rows apart" else torch.full((130, 96), torch.nan, dtype=BF16)
    view = wide[:, 1:73] if "first" in what else wide[:, 8:80]
    view.copy_(x)
    y, (counts,) = product(view, packed, None, None, "none", 90, config=staying(1, 64, 32, 4))
    assert (counts.kinds["copy_bulk"] > 0) == (what == "rows apart")
    assert_as_good_as_torch(y, x.double() @ packed.to_dense().double().T, x @ packed.to_dense().T)


def test_a_tile_without_blocks_sees_no_number_of_others():
    """It takes a step over the numbers of another tile, NaN here, and leaves zeros."""
    packed, x, *_ = make_problem(130, 64, 64, 32, 32, 1.0, BF16)
    mask = torch.tensor([[True, True], [False, False]])
    packed = sp.BsrWeight.from_dense(packed.to_dense(), mask, (32, 32))
    x[:], packed.values[:] = torch.nan, torch.nan
    y, _ = product(x, packed, None, None, "none", 90, config=staying(1, 64, 32, 4))
    assert y[:, :32].isnan().all() and not y[:, 32:].any()


@pytest.mark.parametrize("scheme", ["int8", "e4m3"])
def test_quantized_by_programs_that_stay(scheme):
    _, _, _, counts = check_quantized(scheme, (130, 128, 256, 64, 64, 0.6), BF16, 90, config=staying(1, 64, 64, 4))
    only_what_stays(*counts)


@pytest.mark.parametrize("problem, dtype, capability, mode", ROTATED, ids=str)
def test_gradients(problem, dtype, capability, mode):
    packed, x, _, dy = make_problem(*problem, dtype)
    weight, (r, c) = packed.to_dense(), packed.blocksize
    dx, _ = product(dy, packed, None, None, "none", capability, transposed=True, mode=mode)
    assert_as_good_as_torch(dx, dy.double() @ weight.double(), dy @ weight)
    dvalues, calls = blocks_of_product(dy, x, packed, capability)
    run(calls, capability, mode)
    crow, col, _ = arrays(packed)
    exact, dense = (reference.bsr_sdd(a, b, crow, col, r, c) for a, b in ((dy.double(), x.double()), (dy, x)))
    if (
        dtype is F32
    ):  # added row after row, as the kernel does: PyTorch's order on this CPU errs less, from some hundred rows on
        rows_added = torch.zeros_like(weight)
        for row_of_dy, row_of_x in zip(dy, x, strict=True):
            rows_added.addr_(row_of_dy, row_of_x)
        dense = sp.BsrWeight.from_dense(rows_added, packed.block_mask(), (r, c)).values
    assert_as_good_as_torch(dvalues, exact, dense)


def test_every_kernel_runs_in_every_mode_on_every_gpu():
    """What test_forward, test_gradients, test_epilogues and test_skipping... launch, and (the first three) in every dtype."""
    seen = {("skip", capability, mode) for capability in (80, 120) for _, _, mode in SKIPPING}
    seen |= {("sum_parts", capability, mode) for m, _, _, capability, mode in EPILOGUES if m == 5}
    dtypes = set()
    for problem, dtype, capability, mode in ROTATED:
        for kind in ("forward", "dx", "sdd")[: 3 if problem[-1] else 2]:  # without a block there is no sdd
            seen.add((kind, capability, mode))
            dtypes.add((kind, capability, dtype))
    wanted = set(itertools.product(("forward", "dx", "sdd", "sum_parts", "skip"), CAPABILITIES, MODES))
    wanted -= {("skip", 90, mode) for mode in MODES}  # wgmma takes no condition
    assert not wanted - seen
    assert not set(itertools.product(("forward", "dx", "sdd"), CAPABILITIES, (BF16, F16, F32))) - dtypes


# Few rows and many, merged block-rows on wgmma and mma.sync, and (sm_80, 32x32, M = 300) the kernel that skips.
@pytest.mark.parametrize(
    "m, side, capability, dtype",
    [
        (5, 32, 80, BF16),
        (33, 32, 90, BF16),
        (300, 32, 80, BF16),
        (300, 16, 90, BF16),
        (300, 64, 90, BF16),
        (300, 32, 80, F16),
        (33, 32, 90, F16),
        (33, 32, 80, F32),
    ],
    ids=str,
)
def test_nan_and_infinity_stay_with_their_token_or_their_output(m, side, capability, dtype):
    """In x they reach the outputs that read them and perhaps others of their token, in W only their output."""
    packed, x, bias, residual = make_problem(m, 9 * side - 5, 5 * side, side, side, 0.4, dtype)
    extras = (bias, residual, "relu", capability)
    clean, _ = product(x, packed, *extras)
    for number in (torch.nan, torch.inf):
        column = int(packed.col_indices[0])
        dirty = x.clone()
        dirty[3, column * side + 7] = number
        y, _ = product(dirty, packed, *extras)
        others = torch.arange(m) != 3
        assert torch.equal(y[others], clean[others])
        reads = packed.block_mask()[:, column].repeat_interleave(side)[: y.shape[1]]
        exact = (dirty.double() @ packed.to_dense().double().T)[3]  # dense: the whole row
        assert exact.isnan().all() if number != number else not exact.isfinite().any()
        assert not (y[3].isfinite() & (y[3] != residual[3]))[reads].any(), (
            "relu makes of minus infinity what the residual is"
        )
        if number != number:
            assert y[3][reads].isnan().all()
        values = packed.values.clone()
        values[0, 5, 7] = number
        row = int(packed.block_mask()[:, column].nonzero()[0]) * side + 5
        y, _ = product(x, dataclasses.replace(packed, values=values), *extras)
        others = torch.arange(y.shape[1]) != row
        assert torch.equal(y[:, others], clean[:, others])
        assert not (y[:, row].isfinite() & (y[:, row] != residual[:, row])).any()


@pytest.mark.parametrize("m, capability, dtype", [(33, 80, F32), (300, 80, F16), (300, 90, BF16)], ids=str)
def test_nan_and_infinity_in_gradients(m, capability, dtype):
    """In dy they reach dx of their token and dW of their output, in x dW of their input, in W dx of theirs."""
    from sparse_prune_kernels import launch

    packed, x, _, dy = make_problem(m, 9 * 32, 5 * 32, 32, 32, 0.4, dtype)
    crow, col, values = arrays(packed)
    row_of = launch.row_of_blocks(crow, len(col))
    row, column = int(row_of[0]), int(col[0])

    def gradients(dy, x, weight):
        dvalues, calls = blocks_of_product(dy, x, packed, capability)
        run(calls, capability)
        return product(dy, weight, None, None, "none", capability, transposed=True)[0], dvalues

    clean = gradients(dy, x, packed)
    for number in (torch.nan, torch.inf):
        bad_dy, bad_x, bad_values = dy.clone(), x.clone(), values.clone()
        bad_dy[3, 32 * row + 5] = bad_x[3, 32 * column + 7] = bad_values[0, 5, 7] = number
        dx, dvalues = gradients(bad_dy, x, packed)
        reads, others = packed.block_mask()[row].repeat_interleave(32), torch.arange(m) != 3
        assert not dx[3][reads].isfinite().any() and torch.equal(dx[others], clean[0][others])
        of_row, output = row_of == row, torch.arange(32) == 5
        assert not dvalues[of_row][:, output].isfinite().any() and torch.equal(dvalues[~of_row], clean[1][~of_row])
        assert torch.equal(dvalues[:, ~output], clean[1][:, ~output])
        _, dvalues = gradients(dy, bad_x, packed)
        of_column, inputs = col == column, torch.arange(32) == 7
        assert not dvalues[of_column][..., inputs].isfinite().any()
        assert torch.equal(dvalues[~of_column], clean[1][~of_column])
        assert torch.equal(dvalues[..., ~inputs], clean[1][..., ~inputs])
        dx, _ = gradients(dy, x, dataclasses.replace(packed, values=bad_values))
        others = torch.arange(dx.shape[1]) != 32 * column + 7
        assert not dx[:, ~others].isfinite().any() and torch.equal(dx[:, others], clean[0][:, others])


@pytest.mark.parametrize("capability", [80, 90, 120])
def test_rows_that_lie_apart(capability):
    """Read in place, by narrower copies where rows are misaligned; what lies between them is nobody's."""
    packed, x, *_ = make_problem(24, 64, 70, 16, 32, 0.5, BF16)
    wide = torch.full((24, 81), torch.nan, dtype=BF16)
    view = wide[:, 3:73]
    view.copy_(x)
    y, _ = product(view, packed, None, None, "none", capability)
    assert_as_good_as_torch(y, x.double() @ packed.to_dense().double().T, x @ packed.to_dense().T)


SCHEMES = {"int8": {}, "e4m3": {"dtype": torch.float8_e4m3fn}, "w8a16": {"weight_only": True}}


def check_quantized(scheme, problem, dtype, capability, activation="silu", x_scale=None, config=None, mode="late"):
    """Rounding of x, bit for bit, and the product, by what a launch would run; returns its counts."""
    from sparse_prune_kernels import launch
    from sparse_prune_kernels.config import linear_config

    packed, x, bias, residual = make_problem(*problem, dtype)
    packed = packed.to(torch.float32).quantize(**SCHEMES[scheme])
    (n, k), (r, c) = packed.shape, packed.blocksize
    crow, col, values = arrays(packed)
    itemsize = x.element_size() if packed.weight_only else 1
    plans = launch.plans_of(crow, col, n, k, r, c, itemsize, transposed=False)
    unions = {merge: plan.union for merge, plan in plans.items()}
    sizes = (len(x), n, k, r, c, itemsize, capability, packed.density, unions)
    config = config or linear_config(*sizes, value_size=1)
    y, operand, scales = x.new_full((len(x), n), torch.nan), x, (packed.scales,)
    if not packed.weight_only:
        operand = torch.full((len(x), -(-k // c) * c), 99, dtype=torch.int8).to(values.dtype)
        x_scales = torch.full((len(x),), torch.nan)
        run([launch.round_call(x, operand, x_scales, x_scale)], capability, mode)
        expected, of_rows = reference.quantize_rows(x, x_scale, values.dtype)
        assert torch.equal(operand[:, :k].float(), expected.float()) and not operand[:, k:].float().any()
        assert torch.equal(x_scales, of_rows)
        scales = (packed.scales, x_scales)
    plan = plans[config.merge]
    schedule = launch.schedule_for(operand, plan, values, c, config, 2)
    extras = (activation, config, "ieee", *scales)
    calls = launch.linear_calls(operand, plan, values, bias, residual, y, r, c, c, 1, *extras, schedule=schedule)
    counts = run(calls, capability, mode)
    assert_as_good_as_torch(y, *exact_and_reference_int8(x, packed, bias, activation, residual, x_scale))
    return packed, plan, config, counts


QUANTIZED_PROBLEMS = [
    (5, 45, 200, 16, 32, 0.5),
    (130, 70, 96, 16, 16, 0.4),
    (33, 128, 640, 64, 64, 0.4),
    (300, 200, 300, 128, 128, 0.7),
]


# mma.sync's and wgmma's int8, and on sm_120 what a younger compiler makes of it; M = 5 and 33 go through sum_parts_kernel.
@pytest.mark.parametrize("problem, dtype, capability, mode", rotated(QUANTIZED_PROBLEMS), ids=str)
def test_int8(problem, dtype, capability, mode):
    check_quantized("int8", problem, dtype, capability, x_scale=0.03 if capability == 90 else None, mode=mode)


# mma.sync's e4m3 on sm_89 and sm_120; on sm_90 wgmma's, or float16's by mma.sync.
@pytest.mark.parametrize("problem, dtype, capability, mode", rotated(QUANTIZED_PROBLEMS, (F32, BF16, F16)), ids=str)
def test_e4m3(problem, dtype, capability, mode):
    of_all = 0.01 if capability == 80 else None
    check_quantized("e4m3", problem, dtype, max(capability, 89), x_scale=of_all, mode=mode)


# int8 becomes bfloat16 or float16 in registers, and on sm_90 goes from there into wgmma. sm_80 and sm_120 skip at 32x32.
@pytest.mark.parametrize(
    "problem, dtype, capability, mode",
    rotated([*QUANTIZED_PROBLEMS, (130, 140, 96, 32, 32, 0.4)], (BF16, F16, BF16)),
    ids=str,
)
def test_w8a16(problem, dtype, capability, mode):
    check_quantized("w8a16", problem, dtype, capability, mode=mode)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("mode", ["early", "random"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantized_whenever_copies_end(scheme, mode, capability):
    if scheme == "e4m3" and capability == 80:
        capability = 120
    check_quantized(scheme, (260, 128, 640, 32, 32, 0.4), BF16, capability, mode=mode)


def test_int8_rounds_the_smallest_numbers_too():
    """bfloat16 below its normal numbers, which Triton's interpreter gets wrong."""
    from sparse_prune_kernels import launch

    x = (torch.randn(3, 64) * torch.tensor([[1e-38], [1e-39], [1e-36]])).bfloat16()
    q, scales = torch.empty(3, 64, dtype=torch.int8), torch.empty(3)
    run([launch.round_call(x, q, scales, None)], 80)
    expected, of_rows = reference.quantize_rows(x)
    assert torch.equal(q, expected) and torch.equal(scales, of_rows)


def test_work_of_int8_is_what_config_counts():
    from sparse_prune_kernels.config import LinearConfig

    config = LinearConfig(2, 256, 32, 8, 1, False, 8, 3)
    packed, plan, _, (counts,) = check_quantized("int8", (512, 256, 1024, 32, 32, 0.2), BF16, 80, config=config)
    assert counts.tensor_fma == 512 * 2 * 32 * plan.steps * 32
    loaded = (
        32 * (512 * plan.steps + 2 * 32 * packed.nnzb) + 2 * 512 * 256 + 2 * 4 * 256
    )  # residual, bias and scales too
    assert loaded <= 32 * counts.l2_load_sectors <= 1.05 * loaded + 64 * 4 * plan.table.numel()
    assert counts.shared_wavefronts <= 1.1 * counts.shared_ideal


# ---- bugs planted in the kernels that ship: an error, or a wrong result ----


@functools.cache
def shipped(kernel, capability):
    """One launch of a kernel: its compiled text, where its result goes, what that should be and what PyTorch makes of it."""
    from sparse_prune_kernels import offline
    from sparse_prune_kernels.config import LinearConfig

    torch.manual_seed(0)
    packed, x, _, dy = make_problem(200, 5 * 32 - 3, 10 * 32, 32, 32, 0.5, BF16)
    if kernel == "bsr_sdd_kernel":
        dy = torch.randn(200, 5 * 32).bfloat16()[:, : 5 * 32 - 3]  # rows apart, so that copies are wide
        result, (call,) = blocks_of_product(dy, x, packed, capability)
        index = (packed.crow_indices, packed.col_indices, 32, 32)
        exact, dense = (reference.bsr_sdd(a, b, *index) for a, b in ((dy.double(), x.double()), (dy, x)))
    else:
        config = LinearConfig(2, 64, 32, 8, 1, False, 4, 3, skip="skip" in kernel)
        config = staying(1, 64, 32, 4) if kernel == STAY else config
        result, (call,) = calls_of(x, packed, None, None, "none", capability, config=config)
        exact, dense = exact_and_dense(x, packed.to_dense(), None, "none", None)
    assert call.kernel.fn.__name__ == kernel
    return call, offline.compile_call(call, capability), result, exact, dense


def emulate_shipped(kernel, capability, edit, mode, seed=0):
    """The edited text's result, checked: EmulationError, AssertionError, or neither."""
    call, made, result, exact, dense = shipped(kernel, capability)
    ptx, arguments = edit(made.ptx), made.read(call, ptx_emulator.TensorMap)
    assert ptx != made.ptx
    result.fill_(torch.nan)
    threads = 32 * call.num_warps
    options = {"shared_bytes": made.shared, "mode": mode, "seed": seed, "limit": 1 << 20}
    ptx_emulator.emulate(ptx, kernel, call.grid, threads, arguments, **options)
    assert_as_good_as_torch(result, exact, dense)


LINEAR, SKIP, SDD = "bsr_linear_kernel", "bsr_linear_skip_kernel", "bsr_sdd_kernel"
STAY = "bsr_linear_persistent_kernel"
COORDINATES = r"(cp\.async\.bulk\.tensor\.2d\S* \[%r\d+\], \[%rd\d+, \{)(%r\d+), (%r\d+)\}"
BEFORE_READING = r"(cp\.async\.wait_group\s+\d+;[^;]*)bar\.sync\s+0;"


def without_barriers_before_refill(ptx):
    """The text without any barrier between the last copies into a ring and those before them: one of two may be one too many."""
    *_, last = re.finditer(REFILL, ptx)
    start = ptx.rindex("cp.async.cg", 0, last.start())
    return ptx[:start] + re.sub(r"bar\.sync\s+0;", "", ptx[start : last.end()]) + ptx[last.end() :]


PLANTED = {
    "wait_group one too weak": (
        ((LINEAR, 80), (SKIP, 80), (SDD, 80), (LINEAR, 90)),
        replaced(WAIT_GROUP, lambda m: with_number(m, lambda n: n + 1), None),
        "may still be under way",
    ),
    "no barrier before reading": (
        ((LINEAR, 80), (SKIP, 80), (SDD, 80), (LINEAR, 90)),
        replaced(BEFORE_READING, r"\1", None),
        "not ordered|may still be under way",
    ),
    "no barrier before refilling a stage": (((LINEAR, 80), (SKIP, 80)), without_barriers_before_refill, "race"),
    "commit dropped": (
        ((LINEAR, 80), (SKIP, 80), (SDD, 80), (LINEAR, 90)),
        replaced(r"cp\.async\.commit_group;", "", -1),
        "may still be under way",
    ),
    "one stage for ever": (
        ((LINEAR, 80), (SKIP, 80), (SDD, 80), (LINEAR, 90)),
        replaced(RING, r"mov.b32 \1, 0;"),
        "race",
    ),
    "load without zero fill": (
        ((LINEAR, 80), (SKIP, 80), (SDD, 80), (LINEAR, 90)),
        replaced(ZERO_FILL, r"mov.b32 \1, 16;", None),
        r"cp\.async.*in no tensor",
    ),
    "store without its predicate": (
        ((LINEAR, 80), (SKIP, 80), (LINEAR, 90), (STAY, 90)),
        replaced(r"@%p\d+ (st\.global)", r"\1", None),
        r"st\.global.*in no tensor",
    ),
    "swizzle dropped": (
        ((LINEAR, 80), (SKIP, 80), (SDD, 80), (LINEAR, 90)),
        replaced(r"xor\.b32\s+(%r\d+), (%r\d+), \S+;", r"mov.b32 \1, \2;"),
        WRONG,
    ),
    "fragments not transposed": (((SDD, 80),), replaced(r"(ldmatrix\S*)\.trans", r"\1", None), WRONG),
    "blocks from one place on": (
        ((LINEAR, 80), (SKIP, 80), (LINEAR, 90)),
        replaced(r"(m\w+\.wide\.s32\s+%rd\d+, %r\d+), 2048", r"\1, 0", None),  # bytes of a block
        WRONG,
    ),
    "no fence.proxy.async": (
        ((LINEAR, 90),),
        replaced(r"fence\.proxy\.async\S*;", "", None),
        "no fence.proxy.async lies between",
    ),
    "result read too early": (
        ((LINEAR, 90), (STAY, 90)),
        replaced(WGMMA_WAIT, lambda m: with_number(m, lambda n: n + 1), None),
        "no wgmma.wait_group covers it|may still be under way",
    ),
    "no wgmma.fence": (((LINEAR, 90),), replaced(r"wgmma\.fence\S*;", "", None), "no wgmma.fence"),
    "sum not waited for before it is stored": (
        ((STAY, 90),),
        replaced(r"wgmma\.wait_group\.sync\.aligned 0;", ""),
        "no wgmma.wait_group covers it|may still be under way",
    ),
    "no wait for a box": (
        ((STAY, 90),),
        replaced(r"@!complete bra\.uni waitLoop;", "", None),
        "race|may still be under way",
    ),
    "a box expected to have half its bytes": (
        ((STAY, 90),),
        replaced(EXPECT, lambda m: with_number(m, lambda n: n // 2), None),
        "may still be under way|deadlock",
    ),
    "coordinates of boxes exchanged": (((STAY, 90),), replaced(COORDINATES, r"\1\3, \2}", None), WRONG),
}
PLANTED_IN = [(*kernel, bug) for bug, (kernels, _, _) in PLANTED.items() for kernel in kernels]
HIDDEN = ("no wait for a box", "early")  # what has come at once need not be waited for


@pytest.mark.parametrize("kernel, capability", [(LINEAR, 80), (SKIP, 80), (SDD, 80), (LINEAR, 90), (STAY, 90)])
@pytest.mark.parametrize("mode", MODES)
def test_text_as_it_ships(kernel, capability, mode):
    emulate_shipped(kernel, capability, lambda ptx: ptx + "\n", mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kernel, capability, bug", PLANTED_IN)
def test_planted_bug(kernel, capability, bug, mode):
    if (bug, mode) == HIDDEN:
        return
    _, edit, message = PLANTED[bug]
    text = edit(shipped(kernel, capability)[1].ptx)
    expected = (AssertionError, None) if message is WRONG else (EmulationError, message)
    with pytest.raises(expected[0], match=expected[1]):
        for seed in range(8 if mode == "random" else 1):  # a copy that nobody waits for may be there in time by chance
            emulate_shipped(kernel, capability, lambda ptx: text, mode, seed)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bug", ["a tile too few", "entries off by one", "box of other rows", "box without swizzle"])
def test_planted_bug_in_what_a_launch_hands_over(bug, mode):
    call, made, result, exact, dense = shipped(STAY, 90)
    table, boxes = call.arguments["schedule"].clone(), list(made.boxes)
    if bug == "a tile too few":
        last = table[call.grid[0] + table[1, 0]]  # of the first program's entries
        table[0, 1] -= max(1, last[3] - last[2])
    elif bug == "entries off by one":
        table[:2, 0] += 1
    else:
        (rows, columns), swizzle = boxes[0]
        boxes[0] = ((rows // 2, columns), swizzle) if "rows" in bug else ((rows, columns), 0)
    call = dataclasses.replace(call, arguments=call.arguments | {"schedule": table})
    arguments = dataclasses.replace(made, boxes=tuple(boxes)).read(call, ptx_emulator.TensorMap)
    result.fill_(torch.nan)
    with pytest.raises((AssertionError, EmulationError)):
        ptx_emulator.emulate(
            made.ptx, STAY, call.grid, 128, arguments, shared_bytes=made.shared, mode=mode, limit=1 << 20
        )
        assert_as_good_as_torch(result, exact, dense)


def lazy(*shape):
    """A bfloat16 tensor of zeros whose memory exists only where it is written."""
    size = 2 * math.prod(shape)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0))
    memory.madvise(mmap.MADV_NOHUGEPAGE)  # or a number would bring two megabytes of zeros with it
    return torch.frombuffer(memory, dtype=BF16).view(shape)


def test_offsets_beyond_int32():
    """x, values, residual and y of more than 2^31 elements each, used at both ends."""
    from sparse_prune_kernels import launch
    from sparse_prune_kernels.config import LinearConfig, sdd_config
    from sparse_prune_kernels.plan import Plan

    m, wide, last = 2100, 1 << 20, (1 << 16) - 1  # rows, inputs and outputs, last block of 16 columns
    columns, slots = [0, 3, last], [0, 5, (1 << 23) + 1]
    x, residual, y, values = lazy(m, wide), lazy(m, wide), lazy(m, wide), lazy((1 << 23) + 2, 16, 16)
    assert min(t.numel() for t in (x, values)) > 2**31
    inputs = torch.cat([torch.arange(16) + 16 * column for column in columns])
    x[:, inputs] = torch.randn(m, 48).to(BF16)
    values[slots] = torch.randn(3, 16, 16).to(BF16)
    residual[:, -16:] = torch.randn(m, 16).to(BF16)
    table = torch.tensor([[0, last], [3, -1], *zip(columns, slots, strict=True)], dtype=torch.int32)
    config = LinearConfig(1, 128, 16, 8, 1, False, 4, 3)
    calls = launch.linear_calls(
        x, Plan(1, 1, 3, table, 1.0), values, None, residual, y, 16, 16, 16, 1, "none", config, "ieee"
    )
    run(calls, 80, count=False)
    weight = torch.cat(list(values[slots]), 1)  # [16, 48]
    exact = x[:, inputs].double() @ weight.double().T + residual[:, -16:].double()
    assert_as_good_as_torch(y[:, -16:].contiguous(), exact, x[:, inputs] @ weight.T + residual[:, -16:])
    index, dvalues = torch.tensor([0, last], dtype=torch.int32), torch.full((2, 16, 16), torch.nan, dtype=BF16)
    run([launch.sdd_call(residual, x, index, index, dvalues, sdd_config(16, 16, 2, 80), "ieee")], 80, count=False)
    exact = residual[:, -16:].double().T @ x[:, -16:].double()
    assert_as_good_as_torch(dvalues[1], exact, residual[:, -16:].T @ x[:, -16:])
    assert not dvalues[0].any()


@pytest.mark.parametrize("capability, merge, skip", [(80, 1, False), (80, 2, False), (90, 4, False), (80, 2, True)])
def test_work_is_what_config_counts(capability, merge, skip):
    """Multiplications, zeros included, and bytes, zeros not: the arithmetic that tilings are chosen by."""
    from sparse_prune_kernels import launch
    from sparse_prune_kernels.config import LinearConfig

    config = LinearConfig(merge, 256, 32, 8, 1, False, 8, 3, skip)
    packed, (counts,) = check_forward(
        (512, 256, 1024, 32, 32, 0.2), BF16, capability, "none", (False, False), config=config
    )
    plan = launch.plans_of(*arrays(packed)[:2], 256, 1024, 32, 32, 2, False)[merge]
    assert counts.tensor_fma == 512 * 32 * 32 * (packed.nnzb if skip else merge * plan.steps)
    loaded = 2 * 32 * (512 * plan.steps + 2 * 32 * packed.nnzb)  # x once per step, blocks once per row tile
    index = 4 * plan.table.numel()
    assert loaded <= 32 * counts.l2_load_sectors <= 1.02 * loaded + 64 * index
    assert counts.shared_wavefronts <= 1.1 * counts.shared_ideal


# Capability, (M, K, N), blocksize, density, kind of bound, the least that it may be: docs/gpu-performance.md and gpu-bounds.md.
PROMISED = [
    (80, (16, 4096, 4096), (128, 128), 0.1, "speedup_bound", 7.5),
    (90, (16, 4096, 4096), (128, 128), 0.1, "speedup_bound", 7.2),
    (90, (512, 768, 3072), (32, 32), 0.2, "e_bound", 0.23),
    (80, (4096, 4096, 4096), (32, 32), 0.2, "e_bound", 0.775 if TRITON >= (3, 9) else 0.773),  # the kernel that skips
    (80, (4096, 4096, 4096), (64, 64), 0.2, "e_bound", 0.945),
    (90, (4096, 4096, 4096), (128, 128), 0.2, "e_bound", 0.725),
]


@pytest.mark.parametrize("promised", PROMISED, ids=str)
def test_bounds_are_those_promised(promised):
    from sparse_prune import gpu_bounds

    capability, problem, block, density, kind, least = promised
    row = gpu_bounds.triton_row(capability, problem[0], gpu_bounds.weight_of(problem, block, density))
    assert row[kind] >= least, row
    assert row["wavefronts_per_ideal"] <= 1.03
    assert problem[0] > 64 or row["bytes_ratio"] <= 1.02
