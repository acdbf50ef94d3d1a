"""Every op in plain PyTorch: the definition that backends are tested against, and the path where no kernel was built."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .bsr import block_rows, dense_from_bsr
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
) -> Tensor:
    """y[M, N] = act(x[M, K] @ W[N, K]^T + b[N]) + residual[M, N] by making W dense; differentiable by autograd."""
    weight = dense_from_bsr(crow_indices, col_indices, values, (out_features, x.shape[1]))  # [N, K]
    y = ACTIVATIONS[activation](F.linear(x, weight, bias))  # [M, N]
    return y if residual is None else y + residual


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


def bsr_linear_dx(dy: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, in_features: int) -> Tensor:
    """dx[M, K] = dy[M, N] @ W[N, K]."""
    return dy @ dense_from_bsr(crow_indices, col_indices, values, (dy.shape[1], in_features))


def bsr_sdd(
    dy: Tensor, x: Tensor, crow_indices: Tensor, col_indices: Tensor, block_rows_: int, block_cols: int
) -> Tensor:
    """dvalues[nnzb, R, C]: the blocks of dW[N, K] = dy[M, N]^T @ x[M, K] that the pattern stores."""
    grid = pad_to_blocks(dy.T @ x, (block_rows_, block_cols)).transpose(1, 2)  # [N/R, K/C, R, C]
    return grid[block_rows(crow_indices, col_indices.numel()), col_indices.long()]
