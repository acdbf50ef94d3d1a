"""The PTX emulator on itself: kernels that Triton compiled, against float64, and mistakes that it must report."""

from __future__ import annotations

import importlib.util

import ptx_emulator
import pytest
import torch
from ptx_emulator import EmulationError, emulate

pytestmark = pytest.mark.skipif(ptx_emulator.unavailable() is not None, reason=str(ptx_emulator.unavailable()))
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def kernel(body: str, params: int = 2, registers: str = "", target: int = 80, shared: int = 0) -> str:
    """A kernel `k` of pointers p0, p1, ... around a body; %tid.x is in %r0, the pointers in %rd0, %rd1, ..."""
    loads = "\n".join(f"ld.param.u64 %rd{i}, [p{i}];" for i in range(params))
    declared = f".shared .align 1024 .b8 smem[{shared}];" if shared else ""
    return f"""
.version 8.8
.target sm_{target}{"a" if target == 90 else ""}
.address_size 64
.visible .entry k({", ".join(f".param .u64 p{i}" for i in range(params))})
{{
.reg .pred %p<16>; .reg .b16 %rs<64>; .reg .b32 %r<512>; .reg .b32 %f<256>; .reg .b64 %rd<64>; {registers} {declared}
{loads}
mov.u32 %r0, %tid.x;
{body}
ret;
}}
"""


# ---- whole kernels ----


def random_bsr(n: int, k: int, r: int, c: int, density: float, dtype: torch.dtype):
    """Dense W [n, k] and its crow_indices, col_indices, values; edge blocks padded with zeros."""
    mask = torch.rand(-(-n // r), -(-k // c)) < density
    mask[0] = False  # an empty block-row
    w = torch.randn(mask.shape[0] * r, mask.shape[1] * c) * mask.repeat_interleave(r, 0).repeat_interleave(c, 1)
    w[n:], w[:, k:] = 0, 0
    w = w.to(dtype)
    crow = torch.cat([torch.zeros(1, dtype=torch.long), mask.sum(1).cumsum(0)]).int()
    rows, cols = mask.nonzero(as_tuple=True)
    return (
        w[:n, :k],
        crow,
        cols.int(),
        w.view(mask.shape[0], r, mask.shape[1], c).transpose(1, 2)[rows, cols].contiguous(),
    )


ACTIVATIONS = {
    "none": lambda z: z,
    "gelu": torch.nn.functional.gelu,
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
    "gelu_tanh": lambda z: torch.nn.functional.gelu(z, approximate="tanh"),
}


@needs_triton
@pytest.mark.parametrize("mode", ptx_emulator.MODES)
@pytest.mark.parametrize(
    "capability, m, n, k, r, c, dtype, precision, activation",
    [
        (80, 48, 80, 112, 32, 32, "bfloat16", "ieee", "gelu"),
        (80, 208, 128, 256, 64, 64, "float16", "ieee", "gelu_tanh"),
        (80, 80, 96, 144, 32, 32, "float32", "tf32", "relu"),
        (80, 80, 96, 144, 32, 32, "float32", "ieee", "silu"),
        (120, 48, 80, 112, 32, 32, "bfloat16", "ieee", "gelu"),
    ],
)
def test_triton_forward_matches_float64(capability, m, n, k, r, c, dtype, precision, activation, mode):
    from sparse_prune_kernels import config, offline

    dtype_ = getattr(torch, dtype)
    tiles = config.linear_config(m, r, c, dtype_.itemsize)
    made = offline.compile_linear(tiles, r, c, dtype, capability, precision, activation, False, k % c == 0)
    w, crow, col, values = random_bsr(n, k, r, c, 0.4, dtype_)
    x, bias, residual = torch.randn(m, k).to(dtype_), torch.randn(n).to(dtype_), torch.randn(m, n).to(dtype_)
    y = torch.full((m, n), torch.nan, dtype=dtype_)
    counts = emulate(
        made.ptx,
        "bsr_linear_kernel",
        grid=-(-m // tiles.block_m) * -(-n // r),
        block_threads=32 * tiles.num_warps,
        args=[x, crow, col, values, bias, residual, y, m, n, k, k],
        shared_bytes=made.shared,
        mode=mode,
    )
    activate = ACTIVATIONS[activation]
    expected = activate(x.double() @ w.double().T + bias.double()) + residual.double()
    error = (y.double() - expected).abs().max()
    own = (activate((x @ w.T + bias).float()) + residual.float()).to(dtype_)
    allowed = 2 * (own.double() - expected).abs().max()
    if precision == "tf32":  # operands are cut to 11 digits
        allowed = 2**-10 * 2 * (x.double().abs() @ w.double().abs().T).max()
    assert error <= allowed, (error, allowed)
    if precision != "ieee" or dtype != "float32":
        blocks_m = -(-m // tiles.block_m)
        assert counts.tensor_fma == blocks_m * tiles.block_m * len(col) * r * c


# ---- mistakes ----


def test_out_of_bounds_read_names_line_and_argument():
    ptx = kernel("mad.wide.u32 %rd2, %r0, 4, %rd0;\nld.global.b32 %r1, [%rd2];\nst.global.b32 [%rd1], %r1;")
    line = next(k for k, text in enumerate(ptx.splitlines(), 1) if "ld.global" in text)
    with pytest.raises(
        EmulationError, match=rf"^line {line}: `ld\.global.*0 bytes after the end of args\[0\] \(124 bytes\).*lane 31\]"
    ):
        emulate(ptx, "k", 1, 32, [torch.zeros(31), torch.zeros(32)])


def test_bytes_between_rows_belong_to_nobody():
    x = torch.zeros(4, 16)[:, :8]
    ptx = kernel("mad.wide.u32 %rd2, %r0, 4, %rd0;\nld.global.b32 %r1, [%rd2];\nst.global.b32 [%rd1], %r1;")
    emulate(ptx, "k", 1, 8, [x, torch.zeros(8)])
    with pytest.raises(EmulationError, match="between the elements"):
        emulate(ptx, "k", 1, 9, [x, torch.zeros(8)])


def test_misaligned():
    with pytest.raises(EmulationError, match="no multiple of 8"):
        emulate(kernel("ld.global.v2.b32 {%r1, %r2}, [%rd0+4];"), "k", 1, 32, [torch.zeros(32), torch.zeros(32)])


def test_divergent_barrier():
    body = "setp.lt.u32 %p0, %r0, 7;\n@%p0 bra L;\nbar.sync 0;\nL:\nmov.u32 %r1, 0;"
    with pytest.raises(EmulationError, match=r"bar\.sync.*divergent"):
        emulate(kernel(body), "k", 1, 64, [torch.zeros(1), torch.zeros(1)])


def test_deadlock():
    body = "setp.lt.u32 %p0, %r0, 32;\n@%p0 bra L;\nbar.sync 0;\nL:\nmov.u32 %r1, 0;"
    with pytest.raises(EmulationError, match=r"deadlock.*warp 0 has exited; warp 1 waits at barrier 0"):
        emulate(kernel(body), "k", 1, 64, [torch.zeros(1), torch.zeros(1)])


def test_unknown_instruction():
    with pytest.raises(EmulationError, match=r"line \d+: unknown instruction: `frob\.b32"):
        emulate(kernel("frob.b32 %r1, %r2;"), "k", 1, 32, [torch.zeros(1), torch.zeros(1)])
    with pytest.raises(EmulationError, match="unknown modifier .wobble"):
        emulate(kernel("add.wobble.s32 %r1, %r2, %r3;"), "k", 1, 32, [torch.zeros(1), torch.zeros(1)])
