"""Kernels that ours are compared with: a dense product, and PyTorch's own for BSR weights."""

from __future__ import annotations

import importlib.util
from functools import cache
from types import ModuleType
from unittest import mock

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Arguments, Call


@triton.jit
def dense_linear_kernel(
    x,  # [M, K]
    w,  # [N, K]
    y,  # [M, N]
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """y = x @ w^T for sizes that the tiles divide. One program makes BLOCK_M x BLOCK_N outputs."""
    program = tl.program_id(0)
    programs_in_group = GROUP_M * (N // BLOCK_N)
    first_tile = program // programs_in_group * GROUP_M
    tiles_in_group = tl.minimum(M // BLOCK_M - first_tile, GROUP_M)
    tile_m = first_tile + program % programs_in_group % tiles_in_group
    tile_n = program % programs_in_group // tiles_in_group
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    k = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    x_tiles = x + m[:, None] * K + k[None, :]  # [BLOCK_M, BLOCK_K]
    w_tiles = w + n[None, :] * K + k[:, None]  # [BLOCK_K, BLOCK_N]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)  # [BLOCK_M, BLOCK_N]
    for start in range(0, K, BLOCK_K):
        acc = tl.dot(tl.load(x_tiles + start), tl.load(w_tiles + start), acc)  # [BLOCK_M, BLOCK_N]
    tl.store(y + m[:, None] * N + n[None, :], acc.to(y.dtype.element_ty))


def dense_call(x: Tensor, w: Tensor, y: Tensor, tiles: tuple[int, int, int], warps: int, stages: int) -> Call:
    """y[M, N] = x[M, K] @ w[N, K]^T by tiles of (BLOCK_M, BLOCK_N, BLOCK_K) that divide the sizes."""
    (m, k), n = x.shape, w.shape[0]
    grid = (m // tiles[0] * (n // tiles[1]), 1)
    constants = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), tiles, strict=True)) | {"GROUP_M": 8}
    return Call(dense_linear_kernel, grid, {"x": x, "w": w, "y": y, "M": m, "N": n, "K": k}, constants, warps, stages)


@cache
def _torch_kernels() -> ModuleType:
    """torch.sparse._triton_ops as it is where a GPU is: without one PyTorch defines no kernel in it."""
    spec = importlib.util.find_spec("torch.sparse._triton_ops")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch("torch.utils._triton.has_triton", lambda: True):
        spec.loader.exec_module(module)
    return module


def torch_meta(m: int, n: int, k: int, r: int, c: int, density: float, capability: int) -> dict[str, int]:
    """What PyTorch would launch with: its tuned table on A100, its defaults on every other GPU."""
    name = "NVIDIA A100-SXM4-80GB" if capability == 80 else f"compute capability {capability}"
    tables = importlib.import_module("torch.sparse._triton_ops_meta")
    module = _torch_kernels()
    with (
        mock.patch.object(tables, "_get_device_name", lambda: name),
        mock.patch.object(module, "_get_device_name", lambda: name, create=True),
        mock.patch.object(module, "warn_once", lambda *a: None),
    ):
        return module.bsr_dense_addmm_meta(n, k, m, r, c, 0, 1, sparsity=round(1 - density, 2), dtype=torch.bfloat16)


def torch_call(
    x: Tensor, crow: Tensor, col: Tensor, values: Tensor, y: Tensor, meta: dict[str, int], columns: int
) -> Call:
    """y[M, N] = x[M, K] @ W[N, K]^T by PyTorch's BSR kernel, tokens in tiles of `columns`."""
    (nnzb, r, c), (m, k), n = values.shape, x.shape, y.shape[1]
    # as torch.sparse._triton_ops.tile_to_blocksize: [batch, tiled row, tiled column, row, column]
    dense = x.t().unflatten(0, (k // c, c)).unflatten(2, (m // columns, columns)).transpose(1, 2)[None]
    out = y.t().unflatten(0, (n // r, r)).unflatten(2, (m // columns, columns)).transpose(1, 2)[None]
    names = ("batch", "tiled_row", "tiled_col", "row_block", "col_block")
    arguments: Arguments = {"values_ptr": values}
    strides = (values.stride(0) * nnzb, *values.stride())
    arguments |= dict(
        zip((f"values_{s}_stride" for s in ("batch", "nnz", "row_block", "col_block")), strides, strict=True)
    )
    for name, index in (("crow", crow), ("col", col)):
        arguments |= {f"{name}_indices_ptr": index, f"{name}_indices_batch_stride": 0, f"{name}_indices_stride": 1}
    for name, tensor in (("input", out), ("dense", dense), ("left_alpha", out), ("right_alpha", out), ("output", out)):
        unused = name.endswith("alpha")
        arguments[f"{name}_ptr"] = y if tensor is out else x
        arguments |= {
            f"{name}_{s}_stride": 0 if unused else stride for s, stride in zip(names, tensor.stride(), strict=True)
        }
    compiled = ("left_alpha_tiled_col", "left_alpha_col_block", "right_alpha_tiled_row", "right_alpha_row_block")
    constants: dict[str, object] = {f"{name}_stride": arguments.pop(f"{name}_stride") for name in compiled}
    arguments |= {"beta": 0, "alpha": 1}
    constants |= {
        "beta_is_one": False,
        "beta_is_nonzero": False,
        "alpha_is_one": True,
        "left_alpha_is_one": True,
        "right_alpha_is_one": True,
        "BLOCKSIZE_ROW": r,
        "BLOCKSIZE_INNER": c,
        "BLOCKSIZE_COL": columns,
        "acc_dtype": tl.float32,
        "allow_tf32": True,
        "GROUP_SIZE_ROW": meta["GROUP_SIZE_ROW"],
        "SPLIT_N": meta["SPLIT_N"],
    }
    kernel = _torch_kernels()._bsr_strided_addmm_kernel
    arguments = {name: arguments[name] for name in kernel.arg_names if name in arguments}
    return Call(kernel, (n // r, m // columns), arguments, constants, meta["num_warps"], meta["num_stages"])
