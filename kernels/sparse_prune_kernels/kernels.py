"""Device code. Launches and allocation are in launch.py, tile sizes in config.py.

Triton's interpreter multiplies the raw bits of bfloat16 and cuts float32 down to it instead of rounding. INTERPRETED, a constant
that launch.py sets, makes both right there and changes nothing in compiled code.

M is not specialised: it differs from call to call, and M = 1 would be compiled apart, with a number where code expects a tensor.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """act(z), elementwise in float32; NaN stays NaN."""
    if ACTIVATION == "relu":
        z = tl.where(z < 0, 0.0, z)
    elif ACTIVATION == "gelu":
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))  # 1 / sqrt(2)
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 = sigmoid(2 u) with u = sqrt(2 / pi) (z + 0.044715 z^3)
        z = z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    elif ACTIVATION == "silu":
        z = z * tl.sigmoid(z)
    return z


@triton.jit
def with_residual(acc, residual, RESIDUAL: tl.constexpr):
    """acc + residual or acc * residual, in float32, as RESIDUAL says."""
    residual = residual.to(tl.float32)
    return acc * residual if RESIDUAL == "times" else acc + residual


@triton.jit
def multiply(a, b, acc, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """acc + a @ b: in int32 of int8 numbers, else in float32. One operand of int8 alone becomes what the other one is."""
    if acc.dtype == tl.int32:
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
    else:
        if INTERPRETED:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        elif a.dtype == tl.int8:
            a = a.to(b.dtype)
        elif b.dtype == tl.int8:
            b = b.to(a.dtype)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def add_product(x_tile, w_tile, acc, SWAP: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """acc + x_tile @ w_tile, acc being [BLOCK_M, BLOCK_N]; or its transpose, acc being [BLOCK_N, BLOCK_M], if SWAP."""
    if SWAP:
        return multiply(tl.trans(w_tile), tl.trans(x_tile), acc, PRECISION, INTERPRETED)
    else:
        return multiply(x_tile, w_tile, acc, PRECISION, INTERPRETED)


@triton.jit
def round_to(value, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """float32 value as dtype, to nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        value = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def round_to_e4m3(v):
    """float32 v within +-448 to the nearest number of float8e4nv, ties to even, as float32.

    A cast does not: the interpreter's goes wrong, and Triton 3.7's for compute capability 8.9 goes through float16.
    """
    exponent = tl.maximum((v.to(tl.int32, bitcast=True) >> 23) & 255, 127 - 6)  # below 2^-6 steps stay 2^-9 wide
    # At 1.5 * 2^23 steps neighbouring floats lie a step apart: the addition rounds. A step is 2^(exponent - 127 - 3).
    anchor = (((exponent + 20) << 23) | 0x400000).to(tl.float32, bitcast=True)
    return (v + anchor) - anchor


@triton.jit
def place(M, tiles_n, BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr):
    """This program's row tile and tile of block-rows.

    Programs that start together share: GROUP_M row tiles take one tile of block-rows, then the next, and so on.
    """
    program = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    programs_in_group = GROUP_M * tiles_n
    first_tile = program // programs_in_group * GROUP_M
    tiles_in_group = tl.minimum(tiles_m - first_tile, GROUP_M)
    tile_m = first_tile + program % programs_in_group % tiles_in_group
    tile_n = program % programs_in_group // tiles_in_group
    return tile_m, tile_n


@triton.jit
def finish(
    acc,  # float32 [BLOCK_M, L], int32 of int8 x; [BLOCK_N, L] if SWAP
    START: tl.constexpr,  # place of acc's first column within the tile
    NARROW: tl.constexpr,  # columns to work on at a time; a wider acc is halved, which moves nothing between warps
    head,  # the tile's row of the plan
    first_m,  # int64, the tile's first row of y
    x_scales,
    scales,
    bias,
    residual,
    y,
    M,
    N,
    SIDE_N: tl.constexpr,
    SWAP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SCALED: tl.constexpr,
    X_SCALED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,  # "none", "add" or "times": what is done with residual
    WHOLE: tl.constexpr,  # acc is the whole product: what follows it is done here
    INTERPRETED: tl.constexpr,
):
    """Store act(acc * scales * x_scales + bias) + residual (or * residual), or acc, where the plan says that its outputs belong."""
    HEIGHT: tl.constexpr = acc.shape[0]
    LENGTH: tl.constexpr = acc.shape[1]
    HALF: tl.constexpr = LENGTH // 2
    if LENGTH > NARROW:
        left, right = tl.split(tl.permute(tl.reshape(acc, (HEIGHT, 2, HALF)), (0, 2, 1)))  # [HEIGHT, HALF] each
        finish(
            left, START, NARROW, head, first_m, x_scales, scales, bias, residual, y, M, N,
            SIDE_N, SWAP, ACTIVATION, SCALED, X_SCALED, HAS_BIAS, RESIDUAL, WHOLE, INTERPRETED,
        )  # fmt: skip
        finish(
            right, START + HALF, NARROW, head, first_m, x_scales, scales, bias, residual, y, M, N,
            SIDE_N, SWAP, ACTIVATION, SCALED, X_SCALED, HAS_BIAS, RESIDUAL, WHOLE, INTERPRETED,
        )  # fmt: skip
        return
    m_axis: tl.constexpr = 1 if SWAP else 0
    n_axis: tl.constexpr = 1 - m_axis
    n = tl.arange(0, HEIGHT) if SWAP else START + tl.arange(0, LENGTH)  # [HEIGHT] or [LENGTH]
    m = first_m + (START + tl.arange(0, LENGTH) if SWAP else tl.arange(0, HEIGHT))  # [LENGTH] or [HEIGHT]
    # -1 where the last tile has fewer block-rows; one block-row for each SIDE_N outputs, so that stores are wide
    block_row = tl.max_constancy(tl.load(head + 1 + n // SIDE_N), SIDE_N)  # as n
    n_out = block_row * SIDE_N + n % SIDE_N  # as n
    n_mask = (block_row >= 0) & (n_out < N)  # as n
    offsets = tl.expand_dims(m, n_axis) * N + tl.expand_dims(n_out, m_axis)  # as acc
    mask = tl.expand_dims(m < M, n_axis) & tl.expand_dims(n_mask, m_axis)  # as acc
    if WHOLE:
        if SCALED:
            of_n = tl.load(scales + n_out, mask=n_mask, other=0.0)  # as n
            acc = acc.to(tl.float32) * tl.expand_dims(of_n, m_axis)
        if X_SCALED:
            of_m = tl.load(x_scales + m, mask=m < M, other=0.0)  # as m
            acc *= tl.expand_dims(of_m, n_axis)
        if HAS_BIAS:
            acc += tl.expand_dims(tl.load(bias + n_out, mask=n_mask, other=0.0).to(tl.float32), m_axis)
        acc = activate(acc, ACTIVATION)
        if RESIDUAL != "none":
            acc = with_residual(acc, tl.load(residual + offsets, mask=mask, other=0.0), RESIDUAL)
    tl.store(y + offsets, round_to(acc, y.dtype.element_ty, INTERPRETED), mask=mask)


@triton.jit
def find(steps, step_slots, row, WIDTH: tl.constexpr, ALIKE: tl.constexpr):
    """Of a row of the plan's steps: the block-column, and the places of the blocks there, ALIKE neighbours of which are one."""
    column = tl.load(steps + row * WIDTH)
    slot = tl.load(step_slots + row * WIDTH)  # as step_slots
    if ALIKE > 1:  # that a whole block has one slot tells the compiler which loads it may widen
        slot = tl.max_constancy(slot, ALIKE)
    return column, slot


@triton.jit
def load_blocks(values, in_block, slot, offset, mask, BLOCK: tl.constexpr):
    """Numbers in_block [BLOCK_K, BLOCK_N], behind offset, of the blocks in places slot: [BLOCK_K, BLOCK_N], zeros where masked."""
    w_blocks = values + slot.to(tl.int64) * BLOCK + offset  # as slot
    return tl.load(w_blocks[None, :] + in_block, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["M"])
def bsr_linear_kernel(
    x,  # [M, K], rows stride_x apart
    plan,  # int32 [tiles_n + 1 + U, 1 + MERGE], as Plan.table in plan.py
    values,  # [nnzb, ...], blocks of SIDE_N * SIDE_K elements
    x_scales,  # float32 [M], read if X_SCALED: x and values are then int8 or float8e4nv
    scales,  # float32 [N], read if SCALED: values are then int8 or float8e4nv, and x of that type too or bfloat16 and the like
    bias,  # [N], read if HAS_BIAS
    residual,  # [M, N], read unless RESIDUAL is "none"
    y,  # [M, N]; [SPLIT, M, N] of acc's dtype if SPLIT > 1: sums over a part of the inputs, without what follows the product
    M,
    N,
    K,
    stride_x,
    tiles_n,
    SIDE_N: tl.constexpr,
    SIDE_K: tl.constexpr,
    VALUE_STRIDE_N: tl.constexpr,  # within a block of values, from one output feature to the next
    VALUE_STRIDE_K: tl.constexpr,  # ... from one input feature to the next
    MERGE: tl.constexpr,  # block-rows that share the x tiles of a program
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,  # divides SIDE_K, or is larger: the inputs past the block are then multiplied as zeros
    GROUP_M: tl.constexpr,
    SPLIT: tl.constexpr,  # programs that share the steps of a tile
    SWAP: tl.constexpr,  # compute y^T = W x^T, which wastes no tensor-core rows on a small M
    NARROW: tl.constexpr,  # columns of the accumulators that are finished at a time
    ACTIVATION: tl.constexpr,
    SCALED: tl.constexpr,
    X_SCALED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    EVEN_K: tl.constexpr,  # K is a multiple of SIDE_K: no block reaches past x
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """y = act(x @ W^T * scales * x_scales + bias) + residual. One program makes BLOCK_M rows of the outputs of MERGE block-rows."""
    tile_m, tile_n = place(M, tiles_n, BLOCK_M, GROUP_M)
    part = tl.program_id(1)

    BLOCK_N: tl.constexpr = MERGE * SIDE_N
    WIDTH: tl.constexpr = 1 + MERGE  # of the plan
    # Row offsets are 64-bit: M * K and M * N may pass 2^31.
    first_m = tile_m.to(tl.int64) * BLOCK_M
    m = first_m + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    n = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    k = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    x_rows = x + m[:, None] * stride_x  # [BLOCK_M, 1]
    in_block = k[:, None] * VALUE_STRIDE_K + (n % SIDE_N)[None, :] * VALUE_STRIDE_N  # [BLOCK_K, BLOCK_N]

    STEPS: tl.constexpr = SIDE_K // BLOCK_K if SIDE_K > BLOCK_K else 1
    head = plan + tile_n * WIDTH
    begin = tl.load(head)
    columns_of_tile = tl.load(head + WIDTH) - begin
    end = begin + columns_of_tile * (part + 1) // SPLIT
    begin += columns_of_tile * part // SPLIT
    steps = plan + (tiles_n + 1) * WIDTH
    ALIKE: tl.constexpr = 1 if MERGE == 1 else SIDE_N  # places that are one
    # One for all outputs where there is one: Triton would pass 128 of them from layout to layout in every step.
    step_slots = steps + 1 + (tl.arange(0, 1) if MERGE == 1 else n // SIDE_N)  # [1] or [BLOCK_N], as slot
    kind: tl.constexpr = tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), kind)
    last = end - 1  # of an empty tile: a row of the plan all the same, the heads' last one at worst
    first = tl.minimum(begin, last)
    column, slot = find(steps, step_slots, first, WIDTH, ALIKE)
    # Columns and the steps within them are one loop, so that the pipeline never drains between blocks. Where the next tiles lie
    # is read one step ahead: tiles whose address is loaded in the same step would get half of the pipeline's stages.
    for step in range(begin * STEPS, end * STEPS):
        inner = step % STEPS * BLOCK_K
        columns = column * SIDE_K + inner + k  # [BLOCK_K]
        x_mask = m[:, None] < M  # [BLOCK_M, 1]
        if not EVEN_K:
            x_mask = x_mask & (columns[None, :] < K)  # [BLOCK_M, BLOCK_K]
        w_mask = slot[None, :] >= 0  # [1, BLOCK_N] or [1, 1]
        if BLOCK_K > SIDE_K:
            x_mask = x_mask & (k[None, :] < SIDE_K)  # [BLOCK_M, BLOCK_K]
            w_mask = w_mask & (k[:, None] < SIDE_K)  # [BLOCK_K, BLOCK_N]
        x_tile = tl.load(x_rows + columns[None, :], mask=x_mask, other=0.0)  # [BLOCK_M, BLOCK_K]
        # A block-row without this column gets zeros, which cost tensor-core time and no bytes.
        offset = inner * VALUE_STRIDE_K
        w_tile = load_blocks(values, in_block, slot, offset, w_mask, SIDE_N * SIDE_K)  # [BLOCK_K, BLOCK_N]
        acc = add_product(x_tile, w_tile, acc, SWAP, PRECISION, INTERPRETED)  # [BLOCK_M, BLOCK_N] or its transpose
        column, slot = find(steps, step_slots, tl.minimum((step + 1) // STEPS, last), WIDTH, ALIKE)

    if SPLIT > 1:
        y += part.to(tl.int64) * M * N
    finish(
        acc, 0, NARROW, head, first_m, x_scales, scales, bias, residual, y, M, N,
        SIDE_N, SWAP, ACTIVATION, SCALED, X_SCALED, HAS_BIAS, RESIDUAL, SPLIT == 1, INTERPRETED,
    )  # fmt: skip


@triton.jit
def read_tile(entry):
    """Of an entry of a schedule: row tile, tile of block-rows, its first step and the one after its last."""
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)


@triton.jit(do_not_specialize=["M"])
def bsr_linear_persistent_kernel(
    x,  # descriptor of [M, K], boxes of [BLOCK_M, BLOCK_K]
    plan,  # int32 [tiles_n + 1 + U, 1 + MERGE], as Plan.table in plan.py
    schedule,  # int32 [programs + 2 + tiles, 4], as Schedule.table in plan.py
    values,  # [nnzb, ...] as in bsr_linear_kernel if MERGE > 1; else a descriptor of all rows of blocks, boxes of what a step reads
    x_scales,
    scales,
    bias,
    residual,
    y,
    M,
    N,
    tiles_n,
    SIDE_N: tl.constexpr,
    SIDE_K: tl.constexpr,
    VALUE_STRIDE_N: tl.constexpr,
    VALUE_STRIDE_K: tl.constexpr,
    MERGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,  # divides SIDE_K
    SWAP: tl.constexpr,
    NARROW: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SCALED: tl.constexpr,
    X_SCALED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """As bsr_linear_kernel, by programs that stay: each makes the tiles that the schedule gives it, in one loop over their steps.

    So the first steps of a tile are on their way while the outputs of the tile before are stored. Boxes end where x does: what lies
    past M or K comes as zeros.
    """
    BLOCK_N: tl.constexpr = MERGE * SIDE_N
    WIDTH: tl.constexpr = 1 + MERGE  # of the plan
    STEPS: tl.constexpr = SIDE_K // BLOCK_K
    ALIKE: tl.constexpr = 1 if MERGE == 1 else SIDE_N  # as in bsr_linear_kernel
    n = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    k = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    in_block = k[:, None] * VALUE_STRIDE_K + (n % SIDE_N)[None, :] * VALUE_STRIDE_N  # [BLOCK_K, BLOCK_N]
    steps = plan + (tiles_n + 1) * WIDTH
    step_slots = steps + 1 + (0 if MERGE == 1 else n // SIDE_N)  # one, or [BLOCK_N], as slot

    own = schedule + tl.program_id(0) * 4
    entry = schedule + (tl.num_programs(0) + 1 + tl.load(own)) * 4
    tile_m, tile_n, step, end = read_tile(entry)
    column, slot = find(steps, step_slots, step // STEPS, WIDTH, ALIKE)
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.int32 if x.dtype == tl.int8 else tl.float32)
    for _ in range(tl.load(own + 1)):
        inner = step % STEPS * BLOCK_K
        x_tile = x.load([tile_m * BLOCK_M, column * SIDE_K + inner])  # [BLOCK_M, BLOCK_K]
        if MERGE > 1:
            offset, there = inner * VALUE_STRIDE_K, slot[None, :] >= 0
            w_tile = load_blocks(values, in_block, slot, offset, there, SIDE_N * SIDE_K)  # [BLOCK_K, BLOCK_N]
        elif VALUE_STRIDE_K == 1:
            w_tile = tl.trans(values.load([slot * SIDE_N, inner]))  # [BLOCK_K, BLOCK_N]
        else:
            w_tile = values.load([slot * SIDE_K + inner, 0])  # [BLOCK_K, BLOCK_N]
        acc = add_product(x_tile, w_tile, acc, SWAP, PRECISION, INTERPRETED)  # [BLOCK_M, BLOCK_N] or its transpose

        # Where the next step lies comes first, apart from what is stored: the pipeline needs it some steps ahead of that.
        made_m = tile_m
        made_n = tile_n
        step += 1
        done = step >= end
        empty = step > end  # a tile without a column takes a step all the same, over whatever lies there
        if done:
            entry += 4
            tile_m, tile_n, step, end = read_tile(entry)
        column, slot = find(steps, step_slots, step // STEPS, WIDTH, ALIKE)
        if done:
            finish(
                tl.where(empty, 0, acc), 0, NARROW, plan + made_n * WIDTH, made_m.to(tl.int64) * BLOCK_M,
                x_scales, scales, bias, residual, y, M, N,
                SIDE_N, SWAP, ACTIVATION, SCALED, X_SCALED, HAS_BIAS, RESIDUAL, True, INTERPRETED,
            )  # fmt: skip
            acc = tl.zeros_like(acc)


@triton.jit
def load_x(x_rows, columns, m, M, K, EVEN_K: tl.constexpr):
    """x[m, columns], zeros outside [M, K]: [BLOCK_M, BLOCK_K]."""
    mask = m[:, None] < M  # [BLOCK_M, 1]
    if not EVEN_K:
        mask = mask & (columns[None, :] < K)  # [BLOCK_M, BLOCK_K]
    return tl.load(x_rows + columns[None, :], mask=mask, other=0.0)


@triton.jit
def load_block(w, slot, BLOCK: tl.constexpr):
    """What w points at in the block in that place of the values, zeros where slot is -1: as w."""
    nothing = tl.zeros((1, 1), tl.int32)  # [1, 1]; the interpreter takes no mask that is not a tensor
    return tl.load(w + slot.to(tl.int64) * BLOCK, mask=slot + nothing >= 0, other=0.0)


@triton.jit(do_not_specialize=["M"])
def bsr_linear_skip_kernel(
    x,  # [M, K], rows stride_x apart
    lists,  # int32 [2 tiles_n + 1 + U, 1 + MERGE], as Plan.lists in plan.py
    values,  # [nnzb, ...], blocks of SIDE_N * SIDE_K elements
    scales,  # float32 [N], read if SCALED: values are then int8
    bias,  # [N], read if HAS_BIAS
    residual,  # [M, N], read unless RESIDUAL is "none"
    y,  # [M, N]
    M,
    N,
    K,
    stride_x,
    tiles_n,
    SIDE_N: tl.constexpr,
    SIDE_K: tl.constexpr,
    VALUE_STRIDE_N: tl.constexpr,
    VALUE_STRIDE_K: tl.constexpr,
    MERGE: tl.constexpr,  # 2 or 4
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    STAGES: tl.constexpr,
    NARROW: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """As bsr_linear_kernel, each block-row with accumulators of its own, so that what it lacks is not multiplied."""
    tile_m, tile_n = place(M, tiles_n, BLOCK_M, GROUP_M)
    WIDTH: tl.constexpr = 1 + MERGE  # of the lists
    BLOCK: tl.constexpr = SIDE_N * SIDE_K
    STEPS: tl.constexpr = SIDE_K // BLOCK_K
    first_m = tile_m.to(tl.int64) * BLOCK_M
    m = first_m + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    k = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    x_rows = x + m[:, None] * stride_x  # [BLOCK_M, 1]
    w = values + k[:, None] * VALUE_STRIDE_K + tl.arange(0, SIDE_N)[None, :] * VALUE_STRIDE_N  # [BLOCK_K, SIDE_N]

    head = lists + 2 * tile_n * WIDTH
    begin = tl.load(head)
    middle = tl.load(head + WIDTH)
    end = tl.load(head + 2 * WIDTH)
    steps = lists + (2 * tiles_n + 1) * WIDTH
    last = end - 1  # of an empty tile: a row of the lists all the same, the heads' last one at worst
    acc0 = tl.zeros((BLOCK_M, SIDE_N), tl.float32)  # [BLOCK_M, SIDE_N], as all four
    acc1 = tl.zeros((BLOCK_M, SIDE_N), tl.float32)
    acc2 = acc0
    acc3 = acc0
    # Columns that several block-rows have. The next step's places are read one step ahead, as in bsr_linear_kernel. num_stages on
    # the loop itself lets the compiler pipeline loads whose products stand under a condition.
    at = steps + tl.minimum(begin, last) * WIDTH
    column = tl.load(at)
    slot0 = tl.load(at + 1)
    slot1 = tl.load(at + 2)
    slot2 = tl.load(at + 3) if MERGE == 4 else slot0
    slot3 = tl.load(at + 4) if MERGE == 4 else slot0
    for step in tl.range(begin * STEPS, middle * STEPS, num_stages=STAGES):
        inner = step % STEPS * BLOCK_K
        columns = column * SIDE_K + inner + k  # [BLOCK_K]
        x_tile = load_x(x_rows, columns, m, M, K, EVEN_K)  # [BLOCK_M, BLOCK_K]
        w_inner = w + inner * VALUE_STRIDE_K  # [BLOCK_K, SIDE_N]
        if MERGE == 2:
            w0 = tl.load(w_inner + slot0.to(tl.int64) * BLOCK)  # [BLOCK_K, SIDE_N]
            w1 = tl.load(w_inner + slot1.to(tl.int64) * BLOCK)  # [BLOCK_K, SIDE_N]
            acc0 = multiply(x_tile, w0, acc0, PRECISION, INTERPRETED)
            acc1 = multiply(x_tile, w1, acc1, PRECISION, INTERPRETED)
        else:
            w0 = load_block(w_inner, slot0, BLOCK)  # [BLOCK_K, SIDE_N]
            w1 = load_block(w_inner, slot1, BLOCK)  # [BLOCK_K, SIDE_N]
            w2 = load_block(w_inner, slot2, BLOCK)  # [BLOCK_K, SIDE_N]
            w3 = load_block(w_inner, slot3, BLOCK)  # [BLOCK_K, SIDE_N]
            if slot0 >= 0:
                acc0 = multiply(x_tile, w0, acc0, PRECISION, INTERPRETED)
            if slot1 >= 0:
                acc1 = multiply(x_tile, w1, acc1, PRECISION, INTERPRETED)
            if slot2 >= 0:
                acc2 = multiply(x_tile, w2, acc2, PRECISION, INTERPRETED)
            if slot3 >= 0:
                acc3 = multiply(x_tile, w3, acc3, PRECISION, INTERPRETED)
        at = steps + tl.minimum((step + 1) // STEPS, last) * WIDTH
        column = tl.load(at)
        slot0 = tl.load(at + 1)
        slot1 = tl.load(at + 2)
        if MERGE == 4:
            slot2 = tl.load(at + 3)
            slot3 = tl.load(at + 4)

    # Columns that one block-row has alone.
    at = steps + tl.minimum(middle, last) * WIDTH
    column = tl.load(at)
    slot = tl.load(at + 1)
    which = tl.load(at + 2)
    for step in tl.range(middle * STEPS, end * STEPS, num_stages=STAGES):
        inner = step % STEPS * BLOCK_K
        columns = column * SIDE_K + inner + k  # [BLOCK_K]
        x_tile = load_x(x_rows, columns, m, M, K, EVEN_K)  # [BLOCK_M, BLOCK_K]
        w_tile = tl.load(w + inner * VALUE_STRIDE_K + slot.to(tl.int64) * BLOCK)  # [BLOCK_K, SIDE_N]
        if which == 0:
            acc0 = multiply(x_tile, w_tile, acc0, PRECISION, INTERPRETED)
        elif MERGE == 2 or which == 1:
            acc1 = multiply(x_tile, w_tile, acc1, PRECISION, INTERPRETED)
        elif which == 2:
            acc2 = multiply(x_tile, w_tile, acc2, PRECISION, INTERPRETED)
        else:
            acc3 = multiply(x_tile, w_tile, acc3, PRECISION, INTERPRETED)
        at = steps + tl.minimum((step + 1) // STEPS, last) * WIDTH
        column = tl.load(at)
        slot = tl.load(at + 1)
        which = tl.load(at + 2)

    finish(
        acc0, 0, NARROW, head, first_m, None, scales, bias, residual, y, M, N,
        SIDE_N, False, ACTIVATION, SCALED, False, HAS_BIAS, RESIDUAL, True, INTERPRETED,
    )  # fmt: skip
    finish(
        acc1, 0, NARROW, head + 1, first_m, None, scales, bias, residual, y, M, N,
        SIDE_N, False, ACTIVATION, SCALED, False, HAS_BIAS, RESIDUAL, True, INTERPRETED,
    )  # fmt: skip
    if MERGE == 4:
        finish(
            acc2, 0, NARROW, head + 2, first_m, None, scales, bias, residual, y, M, N,
            SIDE_N, False, ACTIVATION, SCALED, False, HAS_BIAS, RESIDUAL, True, INTERPRETED,
        )  # fmt: skip
        finish(
            acc3, 0, NARROW, head + 3, first_m, None, scales, bias, residual, y, M, N,
            SIDE_N, False, ACTIVATION, SCALED, False, HAS_BIAS, RESIDUAL, True, INTERPRETED,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def sum_parts_kernel(
    parts,  # float32 or int32 [SPLIT, M, N]
    x_scales,  # float32 [M], read if X_SCALED
    scales,  # float32 [N], read if SCALED
    bias,  # [N], read if HAS_BIAS
    residual,  # [M, N], read unless RESIDUAL is "none"
    y,  # [M, N]
    M,
    N,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SCALED: tl.constexpr,
    X_SCALED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """y = act(sum of parts * scales * x_scales + bias) + residual, always added in the same order; BLOCK elements a program."""
    size = M.to(tl.int64) * N
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = offsets < size  # [BLOCK]
    acc = tl.zeros((BLOCK,), parts.dtype.element_ty)  # [BLOCK]
    for part in tl.static_range(SPLIT):
        acc += tl.load(parts + part * size + offsets, mask=mask, other=0)  # [BLOCK]
    if SCALED:
        acc = acc.to(tl.float32) * tl.load(scales + offsets % N, mask=mask, other=0.0)  # [BLOCK]
    if X_SCALED:
        acc *= tl.load(x_scales + offsets // N, mask=mask, other=0.0)  # [BLOCK]
    if HAS_BIAS:
        acc += tl.load(bias + offsets % N, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
    acc = activate(acc, ACTIVATION)  # [BLOCK]
    if RESIDUAL != "none":
        acc = with_residual(acc, tl.load(residual + offsets, mask=mask, other=0.0), RESIDUAL)  # [BLOCK]
    tl.store(y + offsets, round_to(acc, y.dtype.element_ty, INTERPRETED), mask=mask)


@triton.jit
def load_row_part(x_rows, m, k, M, K, EVEN: tl.constexpr):
    """x[m, k] in float32, zeros outside [M, K]: [ROWS, BLOCK]."""
    mask = m[:, None] < M  # [ROWS, 1]
    if not EVEN:
        mask = mask & (k[None, :] < K)  # [ROWS, BLOCK]
    return tl.load(x_rows + k[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_rounded(q, v, inverse, whole, m, k, M, WIDTH, LIMIT: tl.constexpr, EVEN: tl.constexpr):
    """q[m, k] = v * inverse rounded half to even, 0 in rows that are not whole; v [ROWS, BLOCK], inverse and whole [ROWS]."""
    v = tl.where(whole[:, None], v * inverse[:, None], 0.0)  # [ROWS, BLOCK]
    # Rows with scales of their own are within it already, but this also keeps the product and the sum below from being fused.
    v = tl.clamp(v, -LIMIT, LIMIT)  # [ROWS, BLOCK]
    if q.dtype.element_ty == tl.int8:
        # At 1.5 * 2^23 neighbouring floats lie 1 apart: the addition rounds, half to even, and its low byte is the number.
        rounded = (v + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)  # [ROWS, BLOCK]
    else:
        rounded = round_to_e4m3(v).to(q.dtype.element_ty)  # [ROWS, BLOCK]
    mask = m[:, None] < M  # [ROWS, 1]
    if not EVEN:
        mask = mask & (k[None, :] < WIDTH)  # [ROWS, BLOCK]
    tl.store(q + m[:, None] * WIDTH + k[None, :], rounded, mask=mask)


@triton.jit(do_not_specialize=["M"])
def round_rows_kernel(
    x,  # [M, K], rows stride_x apart
    q,  # int8 or float8e4nv [M, WIDTH]
    x_scales,  # float32 [M]
    x_scale,  # of every row, if STATIC
    M,
    K,
    WIDTH,  # at least K: zeros fill the rest
    stride_x,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STATIC: tl.constexpr,
    LIMIT: tl.constexpr,  # 127.0 of int8, 448.0 of float8e4nv
    ONCE: tl.constexpr,  # BLOCK is at least WIDTH: a row is read once
    EVEN: tl.constexpr,  # K is WIDTH and a multiple of BLOCK
):
    """q = x / x_scales rounded half to even, no further than +-LIMIT, where x_scales = max |row| / LIMIT. A program takes ROWS.

    A row that is not all finite becomes zeros, and its scale NaN.
    """
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    k = tl.arange(0, BLOCK)  # [BLOCK]
    x_rows = x + m[:, None] * stride_x  # [ROWS, 1]
    # As bits, sizes are in the order of the numbers; infinity comes after all of these, and NaN after it.
    highest = tl.zeros((ROWS, BLOCK), tl.int32)  # [ROWS, BLOCK]
    for start in range(0, BLOCK if ONCE else K, BLOCK):
        v = load_row_part(x_rows, m, start + k, M, K, EVEN)  # [ROWS, BLOCK]
        highest = tl.maximum(highest, v.to(tl.int32, bitcast=True) & 0x7FFFFFFF)  # [ROWS, BLOCK]
    largest = tl.max(highest, 1)  # [ROWS]
    whole = largest < 0x7F800000  # [ROWS]
    # The least normal number has a finite reciprocal, and a row of zeros stays zeros.
    own = tl.maximum(tl.div_rn(largest.to(tl.float32, bitcast=True), LIMIT), 1.1754943508222875e-38)  # [ROWS]
    scale = tl.full((ROWS,), x_scale, tl.float32) if STATIC else own  # [ROWS]
    inverse = tl.div_rn(1.0, scale)  # [ROWS]
    if ONCE:
        v = load_row_part(x_rows, m, k, M, K, EVEN)  # [ROWS, BLOCK]; the compiler takes it from above
        store_rounded(q, v, inverse, whole, m, k, M, WIDTH, LIMIT, EVEN)
    else:
        for start in range(0, WIDTH, BLOCK):
            v = load_row_part(x_rows, m, start + k, M, K, EVEN)  # [ROWS, BLOCK]
            store_rounded(q, v, inverse, whole, m, start + k, M, WIDTH, LIMIT, EVEN)
    tl.store(x_scales + m, tl.where(whole, scale, float("nan")), mask=m < M)


@triton.jit(do_not_specialize=["M"])
def bsr_sdd_kernel(
    dy,  # [M, N], rows stride_dy apart
    x,  # [M, K], rows stride_x apart
    block_rows,  # int32 [nnzb]
    col_indices,  # int32 [nnzb]
    dvalues,  # [nnzb, R, C]
    M,
    N,
    K,
    stride_dy,
    stride_x,
    R: tl.constexpr,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """dvalues[b] = dy[:, rows of b]^T @ x[:, columns of b]. One program makes one block, summing over M in steps of BLOCK_M."""
    block = tl.program_id(0)
    rows = tl.load(block_rows + block) * R + tl.arange(0, R)  # [R]
    columns = tl.load(col_indices + block) * C + tl.arange(0, C)  # [C]
    acc = tl.zeros((R, C), tl.float32)  # [R, C]
    for start in range(0, M, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        wide_m = m.to(tl.int64)  # [BLOCK_M], since M * K may pass 2^31
        dy_mask = (rows[:, None] < N) & (m[None, :] < M)  # [R, BLOCK_M]
        dy_tile = tl.load(dy + wide_m[None, :] * stride_dy + rows[:, None], mask=dy_mask, other=0.0)  # [R, BLOCK_M]
        x_mask = (m[:, None] < M) & (columns[None, :] < K)  # [BLOCK_M, C]
        x_tile = tl.load(x + wide_m[:, None] * stride_x + columns[None, :], mask=x_mask, other=0.0)  # [BLOCK_M, C]
        acc = multiply(dy_tile, x_tile, acc, PRECISION, INTERPRETED)  # [R, C]
    in_block = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]  # [R, C]
    dvalues_block = dvalues + block.to(tl.int64) * (R * C)
    tl.store(dvalues_block + in_block, round_to(acc, dvalues.dtype.element_ty, INTERPRETED))
