"""Every op in plain PyTorch: the definition that backends are tested against, and the path where no kernel was built."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .bsr import QUANTIZED, block_rows, dense_from_bsr, round_to
from .masks import pad_to_blocks

ACTIVATIONS = {
    "none": lambda z: z,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
}


def activation_grad(grad: Tensor, z: Tensor, activation: str) -> Tensor:
    """grad * act'(z), elementwise, for z of the shape of grad."""
    aten = torch.ops.aten
    if activation == "relu":
        return aten.threshold_backward(grad, z, 0)
    if activation in ("gelu", "gelu_tanh"):
        return aten.gelu_backward(grad, z, approximate="tanh" if activation == "gelu_tanh" else "none")
    if activation == "silu" and torch.is_grad_enabled():  # for gradients of gradients, which silu_backward lacks
        s = torch.sigmoid(z)
        return grad * s * (1 + z * (1 - s))
    if activation == "silu":
        return aten.silu_backward(grad, z)
    return grad


def bsr_linear(
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """y[M, N] = act(x[M, K] @ W[N, K]^T + b[N]) + residual[M, N] by making W dense; differentiable by autograd.

    With an out_dtype other than that of x, which bias and residual have too, in float32 and rounded to it once.
    """
    weight = dense_from_bsr(crow_indices, col_indices, values, (out_features, x.shape[1]))  # [N, K]
    if out_dtype not in (None, x.dtype):
        return _finished(F.linear(x.float(), weight.float()), bias, activation, residual, out_dtype)
    y = ACTIVATIONS[activation](F.linear(x, weight, bias))  # [M, N]
    return y if residual is None else y + residual


def bsr_linear_glu(
    x: Tensor,
    gate_crow_indices: Tensor,
    gate_col_indices: Tensor,
    gate_values: Tensor,
    up_crow_indices: Tensor,
    up_col_indices: Tensor,
    up_values: Tensor,
    out_features: int,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    activation: str = "silu",
) -> Tensor:
    """y[M, N] = act(x[M, K] @ Wg[N, K]^T + bg[N]) * (x @ Wu[N, K]^T + bu[N]); differentiable by autograd."""
    gate = bsr_linear(x, gate_crow_indices, gate_col_indices, gate_values, out_features, gate_bias, activation)
    return gate * bsr_linear(x, up_crow_indices, up_col_indices, up_values, out_features, up_bias)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, keep: Tensor | None) -> Tensor:
    """softmax(scale * q k^T + bias, lowest where not keep) v for q, k, v[B, T, heads, d]; bias, keep broadcast to [B, heads, T, T].

    A query that keeps no key averages all of them.
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, heads, T, d]
    if keep is not None:
        bias = q.new_zeros(()) if bias is None else bias
        bias = torch.where(keep, bias, torch.finfo(q.dtype).min)
    context = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)  # [B, heads, T, d]
    return context.transpose(1, 2).contiguous()  # [B, T, heads, d]


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, residual: Tensor | None) -> Tensor:
    """LayerNorm of x[M, H] + residual[M, H] over its rows."""
    return F.layer_norm(x if residual is None else x + residual, x.shape[-1:], weight, bias, eps)


def quantize_rows(x: Tensor, x_scale: float | None = None, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """q[M, K] of dtype int8 or float8_e4m3fn and float32 scales[M] with x[m, k] ~ scales[m] * q[m, k], rounded half to even.

    scales[m] = max |x[m, :]| / L with L the dtype's largest number, 127 or 448, or x_scale for every row; what lies beyond
    +-L x_scale saturates. A row with NaN or infinity gets the scale NaN, so that all of its products are NaN.
    """
    x = x.float()
    tiny = torch.finfo(torch.float32).tiny  # its reciprocal is finite, and a row of zeros stays zeros
    highest = x.abs().amax(1) if x.shape[1] else x.new_zeros(x.shape[0])  # [M]
    scales = (highest / QUANTIZED[dtype]).clamp(min=tiny) if x_scale is None else torch.full_like(highest, x_scale)
    finite = torch.isfinite(highest)
    q = round_to(torch.where(finite[:, None], x * scales.reciprocal()[:, None], 0.0), dtype)  # [M, K]
    return q, torch.where(finite, scales, torch.nan)


def bsr_linear_w8a8(
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    scales: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    x_scale: float | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """y[M, N] = act(sum_k q[m, k] w[n, k] * scales[n] * x_scales[m] + b[N]) + residual[M, N]; q, x_scales = quantize_rows(x).

    values, and so q, are int8 or float8_e4m3fn. The sum is exact (of float8_e4m3fn: in float64); what follows it is computed in
    float32 and rounded once, to out_dtype or without one to the dtype of x.
    """
    q, x_scales = quantize_rows(x, x_scale, values.dtype)
    weight = dense_from_bsr(crow_indices, col_indices, values.double(), (out_features, x.shape[1]))  # [N, K]
    total = F.linear(q.double(), weight).float()  # [M, N]; of int8 every partial sum is an integer below 2^53
    return _finished(total * scales * x_scales[:, None], bias, activation, residual, out_dtype or x.dtype)


def bsr_linear_w8a16(
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    scales: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """y[M, N] = act(sum_k x[m, k] w[n, k] * scales[n] + b[N]) + residual[M, N] with int8 values w and x as it is.

    The sum and what follows it are computed in float32 and rounded once, to out_dtype or without one to the dtype of x.
    """
    weight = dense_from_bsr(crow_indices, col_indices, values.float(), (out_features, x.shape[1]))  # [N, K]
    return _finished(F.linear(x.float(), weight) * scales, bias, activation, residual, out_dtype or x.dtype)


def _finished(z: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    """act(z + bias) + residual in float32, rounded once to dtype."""
    y = ACTIVATIONS[activation](z if bias is None else z + bias.float())
    return (y if residual is None else y + residual.float()).to(dtype)


def bsr_linear_dx(dy: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, in_features: int) -> Tensor:
    """dx[M, K] = dy[M, N] @ W[N, K]."""
    return dy @ dense_from_bsr(crow_indices, col_indices, values, (dy.shape[1], in_features))


def bsr_sdd(
    dy: Tensor, x: Tensor, crow_indices: Tensor, col_indices: Tensor, block_rows_: int, block_cols: int
) -> Tensor:
    """dvalues[nnzb, R, C]: the blocks of dW[N, K] = dy[M, N]^T @ x[M, K] that the pattern stores."""
    grid = pad_to_blocks(dy.T @ x, (block_rows_, block_cols)).transpose(1, 2)  # [N/R, K/C, R, C]
    return grid[block_rows(crow_indices, col_indices.numel()), col_indices.long()]
