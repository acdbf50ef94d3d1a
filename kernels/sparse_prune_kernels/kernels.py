"""Device code. Launches and allocation are in launch.py, tile sizes in config.py.

Triton's interpreter multiplies the raw bits of bfloat16 and cuts float32 down to it instead of rounding. INTERPRETED, a constant
that launch.py sets, makes both right there and changes nothing in compiled code.
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
def multiply(a, b, acc, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """acc + a @ b in float32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def round_to(value, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """float32 value as dtype, to nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        value = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def bsr_linear_kernel(
    x,  # [M, K], rows stride_x apart
    crow_indices,  # int32 [ceil(N/SIDE_N) + 1]
    col_indices,  # int32 [nnzb]
    slots,  # int32 [nnzb], which block of values each index stands for; read if HAS_SLOTS
    values,  # [nnzb, ...], blocks of SIDE_N * SIDE_K elements
    bias,  # [N], read if HAS_BIAS
    residual,  # [M, N], read if HAS_RESIDUAL
    y,  # [M, N]
    M,
    N,
    K,
    stride_x,
    SIDE_N: tl.constexpr,
    SIDE_K: tl.constexpr,
    VALUE_STRIDE_N: tl.constexpr,  # within a block of values, from one output feature to the next
    VALUE_STRIDE_K: tl.constexpr,  # ... from one input feature to the next
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    EVEN_K: tl.constexpr,  # K is a multiple of SIDE_K: no block reaches past x
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """y = act(x @ W^T + bias) + residual. One program makes BLOCK_M rows of one block-row's SIDE_N outputs."""
    # Programs that start together share: GROUP_M row tiles take one block-row, then the next block-row, and so on.
    program = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    programs_in_group = GROUP_M * tl.cdiv(N, SIDE_N)
    first_tile = program // programs_in_group * GROUP_M
    tiles_in_group = tl.minimum(tiles_m - first_tile, GROUP_M)
    tile_m = first_tile + program % programs_in_group % tiles_in_group
    block_row = program % programs_in_group // tiles_in_group

    # Row offsets are 64-bit: M * K and M * N may pass 2^31.
    m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    n = block_row * SIDE_N + tl.arange(0, SIDE_N)  # [SIDE_N]
    k = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    x_rows = x + m[:, None] * stride_x  # [BLOCK_M, 1]
    in_block = k[:, None] * VALUE_STRIDE_K + tl.arange(0, SIDE_N)[None, :] * VALUE_STRIDE_N  # [BLOCK_K, SIDE_N]

    STEPS: tl.constexpr = SIDE_K // BLOCK_K
    begin = tl.load(crow_indices + block_row)
    end = tl.load(crow_indices + block_row + 1)
    acc = tl.zeros((BLOCK_M, SIDE_N), tl.float32)  # [BLOCK_M, SIDE_N]
    column = tl.load(col_indices + begin, mask=begin < end, other=0)
    slot = tl.load(slots + begin, mask=begin < end, other=0) if HAS_SLOTS else begin
    # Blocks and the steps within them are one loop, so that the pipeline never drains between blocks. Where the next tiles lie
    # is read one step ahead: tiles whose address is loaded in the same step would get half of the pipeline's stages.
    for step in range(begin * STEPS, end * STEPS):
        inner = step % STEPS * BLOCK_K
        columns = column * SIDE_K + inner + k  # [BLOCK_K]
        x_mask = m[:, None] < M  # [BLOCK_M, 1]
        if not EVEN_K:
            x_mask = x_mask & (columns[None, :] < K)  # [BLOCK_M, BLOCK_K]
        x_tile = tl.load(x_rows + columns[None, :], mask=x_mask, other=0.0)  # [BLOCK_M, BLOCK_K]
        w_block = values + slot.to(tl.int64) * (SIDE_N * SIDE_K) + inner * VALUE_STRIDE_K
        w_tile = tl.load(w_block + in_block)  # [BLOCK_K, SIDE_N]
        acc = multiply(x_tile, w_tile, acc, PRECISION, INTERPRETED)  # [BLOCK_M, SIDE_N]
        block = (step + 1) // STEPS
        column = tl.load(col_indices + block, mask=block < end, other=0)
        slot = tl.load(slots + block, mask=block < end, other=0) if HAS_SLOTS else block

    if HAS_BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]  # [BLOCK_M, SIDE_N]
    acc = activate(acc, ACTIVATION)  # [BLOCK_M, SIDE_N]
    y_offsets = m[:, None] * N + n[None, :]  # [BLOCK_M, SIDE_N]
    y_mask = (m[:, None] < M) & (n[None, :] < N)  # [BLOCK_M, SIDE_N]
    if HAS_RESIDUAL:
        acc += tl.load(residual + y_offsets, mask=y_mask, other=0.0).to(tl.float32)  # [BLOCK_M, SIDE_N]
    tl.store(y + y_offsets, round_to(acc, y.dtype.element_ty, INTERPRETED), mask=y_mask)


@triton.jit
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
