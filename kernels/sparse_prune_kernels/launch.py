"""Checks, allocation and launches. No call here waits for the device, so all of them can be captured into a CUDA graph."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .config import linear_config, sdd_config
from .kernels import bsr_linear_kernel, bsr_sdd_kernel

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")
MAX_PROGRAMS = 2**31 - 1  # CUDA's limit on the first dimension of a grid
INTERPRETED = not isinstance(
    bsr_linear_kernel, triton.JITFunction
)  # TRITON_INTERPRET=1 was set when Triton was imported


def bsr_linear(
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """y[M, N] = act(x[M, K] @ W[N, K]^T + bias[N]) + residual[M, N], accumulated in float32; N = out_features.

    x              float16, bfloat16 or float32 [M, K]; rows may lie apart
    crow_indices   int32 [ceil(N/R) + 1]
    col_indices    int32 [nnzb]
    values         [nnzb, R, C], R and C in {16, 32, 64, 128}; dtype of x, as bias and residual

    float32 is multiplied exactly unless torch.backends.cuda.matmul.fp32_precision is "tf32".
    The indices are trusted. Raises ValueError for dtypes, devices or shapes that do not agree.
    """
    _check_same("x", x, values=values, bias=bias, residual=residual)
    _check("activation", activation in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}", repr(activation))
    _, r, c = values.shape
    return _linear(x, crow_indices, col_indices, None, values, out_features, r, c, c, 1, bias, activation, residual)


def bsr_linear_dx(dy: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, in_features: int) -> Tensor:
    """dx[M, K] = dy[M, N] @ W[N, K]; K = in_features, the rest as in bsr_linear.

    The same kernel, over the index of W^T: blocks stay where they are in values and are read with their strides exchanged.
    """
    _check_same("dy", dy, values=values)
    _, r, c = values.shape
    transposed = transposed_index(crow_indices, col_indices, triton.cdiv(in_features, c))
    return _linear(dy, *transposed, values, in_features, c, r, 1, c, None, "none", None)


def bsr_sdd(
    dy: Tensor, x: Tensor, crow_indices: Tensor, col_indices: Tensor, block_rows: int, block_cols: int
) -> Tensor:
    """dvalues[nnzb, R, C]: the stored blocks of dy[M, N]^T @ x[M, K]; R = block_rows, C = block_cols."""
    _check_same("dy", dy, x=x)
    _check("x", x.shape[0] == dy.shape[0], f"{dy.shape[0]} rows like dy", x.shape[0])
    dy, x = _with_adjacent_columns(dy), _with_adjacent_columns(x)
    (m, n), k, nnzb = dy.shape, x.shape[1], col_indices.numel()
    dvalues = dy.new_empty(nnzb, block_rows, block_cols)  # [nnzb, R, C]
    if nnzb == 0:
        return dvalues
    config = sdd_config(block_rows, block_cols, dy.element_size())
    with torch.cuda.device_of(dy):
        bsr_sdd_kernel[(nnzb,)](
            dy,
            x,
            row_of_blocks(crow_indices, nnzb),
            col_indices,
            dvalues,
            m,
            n,
            k,
            dy.stride(0),
            x.stride(0),
            R=block_rows,
            C=block_cols,
            BLOCK_M=config.block_m,
            PRECISION=_precision(),
            INTERPRETED=INTERPRETED,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return dvalues


def row_of_blocks(crow_indices: Tensor, nnzb: int) -> Tensor:
    """Block-row of each stored block, int32 [nnzb]."""
    blocks = torch.arange(nnzb, dtype=torch.int32, device=crow_indices.device)  # [nnzb]
    return torch.searchsorted(crow_indices, blocks, right=True, out_int32=True) - 1


def transposed_index(crow_indices: Tensor, col_indices: Tensor, block_columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """The BSR index of W^T: crow int32 [block_columns + 1], col int32 [nnzb]; and each block's place in values, int32 [nnzb]."""
    rows = row_of_blocks(crow_indices, col_indices.numel())  # [nnzb]
    sorted_columns, order = torch.sort(col_indices, stable=True)  # stable: rows ascend within a column
    edges = torch.arange(block_columns + 1, dtype=torch.int32, device=col_indices.device)  # [block_columns + 1]
    crow = torch.searchsorted(sorted_columns, edges, out_int32=True)  # [block_columns + 1]
    return crow, rows[order], order.to(torch.int32)


def _linear(x, crow, col, slots, values, n, side_n, side_k, stride_n, stride_k, bias, activation, residual) -> Tensor:
    """y[M, n] for blocks that span side_n outputs and side_k inputs, stride_n and stride_k elements apart."""
    _check(
        "crow_indices",
        crow.shape == (triton.cdiv(n, side_n) + 1,),
        f"{triton.cdiv(n, side_n) + 1} entries",
        tuple(crow.shape),
    )
    x = _with_adjacent_columns(x)
    m, k = x.shape
    y = x.new_empty(m, n)  # [M, N]
    if y.numel() == 0:
        return y
    config = linear_config(m, side_n, side_k, x.element_size())
    programs = triton.cdiv(m, config.block_m) * triton.cdiv(n, side_n)
    _check("x", programs <= MAX_PROGRAMS, f"at most {MAX_PROGRAMS} tiles", programs)
    with torch.cuda.device_of(x):
        bsr_linear_kernel[(programs,)](
            x,
            crow,
            col,
            slots,
            values,
            bias,
            residual,
            y,
            m,
            n,
            k,
            x.stride(0),
            SIDE_N=side_n,
            SIDE_K=side_k,
            VALUE_STRIDE_N=stride_n,
            VALUE_STRIDE_K=stride_k,
            BLOCK_M=config.block_m,
            BLOCK_K=config.block_k,
            GROUP_M=config.group_m,
            ACTIVATION=activation,
            HAS_SLOTS=slots is not None,
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
            EVEN_K=k % side_k == 0,
            PRECISION=_precision(),
            INTERPRETED=INTERPRETED,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return y


def _precision() -> str:
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _with_adjacent_columns(matrix: Tensor) -> Tensor:
    """matrix itself where its columns are adjacent in memory, else a contiguous copy."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _check_same(name: str, tensor: Tensor, **others: Tensor | None) -> None:
    for other_name, other in others.items():
        if other is not None:
            _check(other_name, other.dtype == tensor.dtype, f"{tensor.dtype} like {name}", other.dtype)
            _check(other_name, other.device == tensor.device, f"{tensor.device} like {name}", other.device)


def _check(argument: str, ok: bool, expected: str, got: object) -> None:
    if not ok:
        raise ValueError(f"{argument}: expected {expected}, got {got}")
