"""Problems that the interpreted, the compiled and the real kernels are tested on, and when a result is right."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import pytest
import torch
import torch.nn.functional as F

import sparse_prune as sp
from sparse_prune import reference
from sparse_prune.bsr import dense_from_bsr
from sparse_prune.masks import expand_mask, grid_shape

TRITON = (
    tuple(map(int, importlib.metadata.version("triton").split(".")[:2])) if importlib.util.find_spec("triton") else ()
)
needs_triton = pytest.mark.skipif(
    TRITON < (3, 7), reason="Triton 3.7 or later, which the kernels want, is not installed"
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = ["none", "relu", "gelu", "gelu_tanh", "silu"]
# (M, N, K, R, C, density): M of 0 and 1, odd tails, empty block-rows, all zero, all kept, rectangular blocks both ways, several
# row tiles (and with 1100 rows more than one group of them), blocks that take several steps.
PROBLEMS = [
    (0, 64, 64, 32, 32, 0.5),
    (1, 96, 64, 32, 32, 0.5),
    (7, 45, 70, 16, 32, 0.5),
    (33, 64, 96, 64, 16, 0.3),
    (9, 64, 64, 32, 32, 0.0),
    (9, 64, 64, 32, 32, 1.0),
    (130, 128, 96, 16, 16, 0.2),
    (20, 100, 300, 128, 128, 0.7),
    (1100, 40, 33, 32, 16, 0.5),
]
SIDES = (16, 32, 64, 128)


def make_problem(m, n, k, r, c, density, dtype, device="cpu"):
    """A packed weight, x [m, k], bias [n] and residual [m, n]; one empty block-row wherever there are two."""
    mask = torch.rand(grid_shape((n, k), (r, c))) < density
    if 0 < density < 1 and mask.shape[0] > 1:
        mask[1] = False  # an empty block-row
    weight = torch.randn(n, k) * expand_mask(mask, (r, c), (n, k))
    packed = sp.BsrWeight.from_dense(weight.to(device, dtype), mask, (r, c))
    x, bias, residual = (torch.randn(shape).to(device, dtype) for shape in ((m, k), (n,), (m, n)))
    return packed, x, bias, residual


def exact_and_dense(x, weight, bias, activation, residual):
    """act(x @ weight^T + bias) + residual in float64, and as PyTorch computes it in the dtype of x, from a copy of x's rows.

    With AMX oneDNN reads on behind a row, and multiplies NaN there by 0.
    """
    act = reference.ACTIVATIONS[activation]
    exact = act(F.linear(x.double(), weight.double(), None if bias is None else bias.double()))
    dense = act(F.linear(x.contiguous(), weight, bias))
    return (exact, dense) if residual is None else (exact + residual.double(), dense + residual)


def exact_and_reference_int8(x, packed, bias, activation, residual, x_scale=None):
    """act(q @ W^T * scales * x_scales + bias) + residual, packed quantized and x rounded to q, in float64 and by the reference.

    Where packed.weight_only, q is x as it is and x_scales are 1.
    """
    numbers = dense_from_bsr(*arrays(packed)[:2], packed.values.double(), packed.shape)
    q, x_scales = (
        (x, torch.ones_like(x[:, 0]))
        if packed.weight_only
        else reference.quantize_rows(x, x_scale, packed.values.dtype)
    )
    z = (q.double() @ numbers.T) * packed.scales.double() * x_scales.double()[:, None]
    exact = reference.ACTIVATIONS[activation](z if bias is None else z + bias.double())
    exact = exact if residual is None else exact + residual.double()
    index = (packed.crow_indices, packed.col_indices, packed.values, packed.scales, packed.shape[0])
    if packed.weight_only:
        return exact, reference.bsr_linear_w8a16(x, *index, bias, activation, residual)
    return exact, reference.bsr_linear_w8a8(x, *index, bias, activation, residual, x_scale)


def arrays(packed):
    return packed.crow_indices, packed.col_indices, packed.values


def assert_as_good_as_torch(got, exact, dense):
    """At most twice the error of PyTorch in the same dtype, and never less than two roundings of the largest output."""
    assert got.dtype == dense.dtype and got.shape == exact.shape and got.is_contiguous()
    assert not got.isnan().any()
    if got.numel():
        rounding = torch.finfo(dense.dtype).eps * exact.abs().max()
        allowed = 2 * torch.maximum((exact - dense.double()).abs().max(), rounding)
        assert (exact - got.double()).abs().max() <= allowed
