"""What Triton compiles for GPUs that are not here, executed by the PTX emulator against float64."""

from __future__ import annotations

import dataclasses
import math
import mmap

import ptx_emulator
import pytest
import torch
from triton_problems import (
    PROBLEMS,
    arrays,
    assert_as_good_as_torch,
    exact_and_dense,
    exact_and_reference_int8,
    make_problem,
    needs_triton,
)

from sparse_prune import reference

pytestmark = [
    pytest.mark.skipif(ptx_emulator.unavailable() is not None, reason=str(ptx_emulator.unavailable())),
    needs_triton,
]
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def run(calls, capability, mode="late", count=True):
    """Compile each call as its launch would and execute it; returns what the emulator counted."""
    from sparse_prune_kernels import offline

    counts = []
    for call in calls:
        made = offline.compile_call(call, capability)
        arguments = [call.arguments[name] for name in made.parameters]
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


def product(
    x, packed, bias, residual, activation, capability, precision="ieee", transposed=False, config=None, mode="late"
):
    """act(x @ W^T + bias) + residual, or x @ W if transposed, by the compiled kernels that a launch would choose; and counts."""
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
    calls = launch.linear_calls(x, plan, values, bias, residual, y, r, c, *strides, activation, config, precision)
    return y, run(calls, capability, mode)


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


# sm_80: mma.sync with cp.async. sm_90: wgmma. sm_120: mma.sync again, by a younger compiler.
@pytest.mark.parametrize("capability", [80, 90, 120])
@pytest.mark.parametrize("problem", PROBLEMS[1:], ids=str)
def test_forward(problem, capability):
    check_forward(problem, BF16, capability)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    "dtype, precision, problem",
    [
        (F16, "ieee", (70, 128, 192, 64, 64, 0.4)),
        (F32, "ieee", (33, 45, 70, 16, 32, 0.5)),
        (F32, "tf32", (33, 64, 96, 32, 32, 0.5)),
    ],
    ids=str,
)
def test_other_dtypes(dtype, precision, problem, capability):
    check_forward(problem, dtype, capability, precision=precision)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("m", [5, 70])
def test_epilogues(m, activation, capability):
    """Within the kernel, and (small m) in the one that adds the parts."""
    for extras in ((True, False), (False, True)):
        check_forward((m, 45, 70, 16, 32, 0.5), BF16, capability, activation, extras)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("mode", ptx_emulator.MODES)
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


@pytest.mark.parametrize("mode", ptx_emulator.MODES)
@pytest.mark.parametrize("merge, side", [(2, 32), (4, 16), (2, 16)])
def test_skipping_what_a_block_row_lacks(merge, side, mode):
    """As they ship for A100, with K and N that no block divides, in both directions."""
    from sparse_prune_kernels.config import LinearConfig

    config = LinearConfig(merge, 256, side, 8, 1, False, 4, 3, skip=True)
    check_forward((300, 9 * side - 5, 9 * side + 5, side, side, 0.4), BF16, 80, config=config, mode=mode)
    packed, _, _, dy = make_problem(40, 5 * side - 3, 7 * side, side, side, 0.4, F16)
    weight, config = packed.to_dense(), LinearConfig(merge, 128, side, 8, 1, False, 4, 3, skip=True)
    dx, _ = product(dy, packed, None, None, "none", 120, transposed=True, config=config, mode=mode)
    assert_as_good_as_torch(dx, dy.double() @ weight.double(), dy @ weight)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    "problem", [(7, 45, 70, 16, 32, 0.5), (130, 96, 128, 32, 64, 0.4), (33, 64, 96, 64, 16, 0.3)], ids=str
)
def test_gradients(problem, capability):
    from sparse_prune_kernels import launch
    from sparse_prune_kernels.config import sdd_config

    packed, x, _, dy = make_problem(*problem, BF16)
    weight, (r, c) = packed.to_dense(), packed.blocksize
    dx, _ = product(dy, packed, None, None, "none", capability, transposed=True)
    assert_as_good_as_torch(dx, dy.double() @ weight.double(), dy @ weight)
    crow, col, values = arrays(packed)
    dvalues = torch.full_like(values, torch.nan)
    config = sdd_config(r, c, 2, capability)
    run([launch.sdd_call(dy, x, launch.row_of_blocks(crow, len(col)), col, dvalues, config, "ieee")], capability)
    exact, dense = (reference.bsr_sdd(a, b, crow, col, r, c) for a, b in ((dy.double(), x.double()), (dy, x)))
    assert_as_good_as_torch(dvalues, exact, dense)


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
    from sparse_prune_kernels.config import sdd_config

    packed, x, _, dy = make_problem(m, 9 * 32, 5 * 32, 32, 32, 0.4, dtype)
    crow, col, values = arrays(packed)
    row_of, size = launch.row_of_blocks(crow, len(col)), x.element_size()
    row, column = int(row_of[0]), int(col[0])

    def gradients(dy, x, weight):
        dvalues = torch.full_like(values, torch.nan)
        run([launch.sdd_call(dy, x, row_of, col, dvalues, sdd_config(32, 32, size, capability), "ieee")], capability)
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
    calls = launch.linear_calls(
        operand, plan, values, bias, residual, y, r, c, c, 1, activation, config, "ieee", *scales
    )
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
@pytest.mark.parametrize("capability", [80, 90, 120])
@pytest.mark.parametrize("problem", QUANTIZED_PROBLEMS, ids=str)
def test_int8(problem, capability):
    dtype, x_scale = {80: (BF16, None), 90: (F16, 0.03), 120: (F32, None)}[capability]
    check_quantized("int8", problem, dtype, capability, x_scale=x_scale)


# mma.sync's e4m3 on sm_89 and sm_120; on sm_90 wgmma's, or float16's by mma.sync.
@pytest.mark.parametrize("capability", [89, 90, 120])
@pytest.mark.parametrize("problem", QUANTIZED_PROBLEMS, ids=str)
def test_e4m3(problem, capability):
    dtype, x_scale = {89: (F32, 0.01), 90: (BF16, None), 120: (F16, None)}[capability]
    check_quantized("e4m3", problem, dtype, capability, x_scale=x_scale)


# int8 becomes bfloat16 or float16 in registers, and on sm_90 goes from there into wgmma. sm_80 and sm_120 skip at 32x32.
@pytest.mark.parametrize("capability", [80, 90, 120])
@pytest.mark.parametrize("problem", [*QUANTIZED_PROBLEMS, (130, 140, 96, 32, 32, 0.4)], ids=str)
def test_w8a16(problem, capability):
    check_quantized("w8a16", problem, F16 if capability == 120 else BF16, capability)


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
