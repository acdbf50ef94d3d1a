"""The AVX512-BF16 kernels on any processor with AVX-512, and trap.cpp, which carries out what it lacks of that and of AMX."""

from __future__ import annotations

import ctypes
import struct
import subprocess
import sys

import pytest
import test_int8_kernels as int8
import torch
from cpu_isas import ISAS
from test_cpu_kernels import ACTIVATIONS, Problem, assert_close, harness_linear

from sparse_prune import reference

# As PROBLEMS of test_cpu_kernels.py, but few products; in the last three lanes are tokens.
PROBLEMS = [
    (1, 100, 75, 16, 8, 0.5),
    (2, 48, 97, 48, 33, 0.7),
    (9, 70, 50, 7, 5, 0.4),
    (17, 128, 64, 64, 16, 0.5),
    (20, 33, 31, 1, 1, 0.3),
    (23, 80, 128, 16, 48, 0.5),
    (53, 130, 75, 16, 16, 0.9),
    (37, 72, 33, 8, 8, 0.5),
    (40, 60, 32, 12, 8, 0.7),
]


def pointer(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


def sizes(*values):
    return [ctypes.c_int64(value) for value in values]


def test_what_the_processor_lacks_is_trapped(harness):
    trapped = (ctypes.c_int64 * 2).in_dll(harness["trap"], "trapped")
    p = Problem(33, 64, 64, 32, 32, 1.0, torch.bfloat16)
    before = list(trapped)
    harness_linear(harness["native"], p)
    tiles, vectors = (now - then for now, then in zip(trapped, before, strict=True))
    assert (tiles > 0) == ("amx_bf16" not in ISAS)
    assert (vectors > 0) == ("avx512_bf16" not in ISAS)


def test_every_form_of_an_operand(harness):
    """Of vdpbf16ps: a register, memory with a displacement of one byte and of four, one pair for all lanes, memory by RIP."""
    x, w = torch.randn(32, dtype=torch.bfloat16), torch.randn(64, dtype=torch.bfloat16)
    start = torch.randn(5, 16)
    got = start.clone()
    harness["native"].dot_in_every_form(pointer(x), pointer(w), pointer(got))
    one = torch.zeros(32, dtype=torch.bfloat16)
    one[:2] = 1
    operands = torch.stack([w[:32], w[32:], w[18:50], w[4:6].repeat(16), one])  # [5, 16 * 2]
    products = (x.double() * operands.double()).view(5, 16, 2)
    exact, size = start + products.sum(-1), start.abs() + products.abs().sum(-1)
    assert ((got - exact).abs() <= 2 * torch.finfo(torch.float32).eps * size).all()


@pytest.mark.parametrize(("x", "w"), [(2.0**-130, 2.0**100), (2.0**-100, 2.0**-40)])
def test_denormals_are_zero(harness, x, w):
    """As factors and as sums."""
    operands = torch.full((32,), x, dtype=torch.bfloat16), torch.full((64,), w, dtype=torch.bfloat16)
    got = torch.zeros(5, 16)
    harness["native"].dot_in_every_form(*map(pointer, (*operands, got)))
    assert (got[:4] == 0).all()


def test_floats_become_bfloat16_by_nearest_even(harness):
    """Every bfloat16, and between it and the next what is just below, at and just above the middle."""
    high = torch.arange(1 << 16, dtype=torch.int32)[:, None] << 16
    x = (high + torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)).view(torch.float32)
    x = x.flatten()[torch.randperm(x.numel())[: 16 * 4000]].view(-1, 16)
    got = torch.empty_like(x, dtype=torch.bfloat16)
    for i in range(len(x)):
        harness["native"].round_to_bf16(pointer(x[i]), pointer(got[i]))
    want = torch.where(x.abs() < torch.finfo(torch.float32).tiny, 0 * x, x).to(torch.bfloat16)
    assert torch.equal(got.isnan(), x.isnan())
    assert torch.equal(got.view(torch.int16)[~x.isnan()], want.view(torch.int16)[~x.isnan()])


def configuration(palette=1, start_row=0, reserved=0, rows=(16, 16, 16), row_bytes=(64, 64, 64)):
    """64 bytes for ldtilecfg that shape tiles 0 (sums), 4 and 6 (factors)."""
    all_rows, all_bytes = [0] * 16, [0] * 16
    for tile, r, b in zip((0, 4, 6), rows, row_bytes, strict=True):
        all_rows[tile], all_bytes[tile] = r, b
    return struct.pack("<14B2B16H16B", palette, start_row, *[0] * 12, 0, reserved, *all_bytes, *all_rows)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({}, None),
        ({"rows": (9, 9, 16)}, None),
        ({"rows": (16, 16, 7), "row_bytes": (64, 28, 64)}, None),
        ({"palette": 2}, "palette"),
        ({"palette": 0}, "not configured"),
        ({"reserved": 1}, "reserved"),
        pytest.param(
            {"start_row": 1},
            "start_row",
            marks=pytest.mark.skipif("amx_bf16" in ISAS, reason="processors take a start_row, the trap does not"),
        ),
        ({"rows": (17, 16, 16)}, "more than 16 rows"),
        ({"row_bytes": (64, 65, 64)}, "64 bytes in a row"),
        ({"rows": (0, 16, 16)}, "bytes without rows"),
        ({"row_bytes": (64, 62, 64)}, "whole groups"),
        ({"rows": (9, 16, 16)}, "differ in rows"),
        ({"row_bytes": (32, 64, 64)}, "differ in bytes"),
        ({"row_bytes": (64, 32, 64)}, "are not the second's rows"),
    ],
    ids=str,
)
def test_a_product_that_processors_refuse_ends_the_process(harness, change, why):
    code = f"""
import ctypes
ctypes.CDLL({harness["trap"]._name!r}).trap_install()
ctypes.CDLL({harness["native"]._name!r}).tile_product({configuration(**change)!r})
"""
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True)
    assert (done.returncode < 0) == (why is not None), done.stderr
    if why and "amx_bf16" not in ISAS:
        assert why in done.stderr


def test_other_instructions_end_the_process(harness):
    """ud2 is nobody's; the traps give it back."""
    code = f"""
import ctypes, mmap
ctypes.CDLL({harness["trap"]._name!r}).trap_install()
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(b"\\x0f\\x0b")
ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
"""
    assert subprocess.run([sys.executable, "-S", "-c", code], capture_output=True).returncode == -4  # SIGILL


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_linear_matches_float64(harness, problem):
    p = Problem(*problem, torch.bfloat16)
    for activation in ("none", "gelu"):
        got = harness_linear(harness["native"], p, activation, tiles=0)
        assert_close(got, p.dense_linear(activation, torch.float64), p.dense_linear(activation))
    without = [p.dense_linear("silu", to, residual=False) for to in (torch.float64, None)]
    p.residual = None
    assert_close(harness_linear(harness["native"], p, "silu", tiles=0), *without)


@pytest.mark.parametrize(
    ("tiles", "problem"),
    [*((0, problem) for problem in PROBLEMS), (1, (37, 64, 80, 32, 16, 0.6)), (1, (1030, 80, 64, 16, 32, 0.4))],
    ids=str,
)
def test_sampled_products_match_float64(harness, tiles, problem):
    p = Problem(*problem, torch.bfloat16)
    (m, k), n, (r, c) = p.x.shape, p.n, p.packed.blocksize
    panels = [
        torch.full((-(-width // block) * block * (m + 1) + 128,), torch.nan, dtype=torch.bfloat16)
        for width, block in ((n, r), (k, c))
    ]
    dense_x, got = p.x.contiguous(), torch.full_like(p.packed.values, torch.nan)
    operands = map(pointer, (*p.bsr[:2], p.dy, dense_x, *panels, got))
    harness["native"].bf16_sdd(tiles, *sizes(m, n, k, r, c), *operands)
    exact = reference.bsr_sdd(p.dy.double(), p.x.double(), *p.bsr[:2], r, c)
    assert_close(got, exact, reference.bsr_sdd(p.dy, p.x, *p.bsr[:2], r, c))


@int8.needs_vnni
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_int8_matches_float64(harness, problem):
    p = int8.Problem(*problem, torch.bfloat16)
    for activation in ACTIVATIONS:
        got = int8.harness_linear(harness["native"], p, torch.bfloat16, activation, tiles=0)
        int8.assert_exact(got, p.exact(activation), torch.bfloat16, activation)
    without = p.exact("none", residual=False)
    p.residual = None
    got = int8.harness_linear(harness["native"], p, torch.bfloat16, tiles=0)
    int8.assert_exact(got, without, torch.bfloat16)


@pytest.mark.parametrize("tiles", [0, 1])
@pytest.mark.parametrize("shape", [(1, 1, 1, 5), (2, 37, 2, 32), (1, 50, 1, 33), (1, 25, 1, 80)], ids=str)
def test_attention_matches_float64(harness, shape, tiles):
    """Shapes are B, T, heads, d."""
    batch, length, heads, size = shape
    q, k, v = torch.randn(3, batch, length, heads, size, dtype=torch.bfloat16)
    got = torch.full_like(q, torch.nan)
    scale = ctypes.c_double(size**-0.5)
    harness["native"].bf16_attention(tiles, *sizes(*shape), *map(pointer, (q, k, v)), scale, pointer(got))
    exact = reference.attention(q.double(), k.double(), v.double(), size**-0.5, None, None)
    assert_close(got, exact, reference.attention(q, k, v, size**-0.5, None, None))


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (3, 33), (13, 256)], ids=str)
def test_layer_norm_matches_float64(harness, shape):
    x, residual = 5 + torch.randn(2, *shape).to(torch.bfloat16)
    weight, bias = torch.randn(2, shape[1]).to(torch.bfloat16)
    got = torch.full_like(x, torch.nan)
    harness["native"].bf16_layer_norm(*sizes(*shape), *map(pointer, (x, residual, weight, bias, got)))
    exact = reference.layer_norm(x.double(), weight.double(), bias.double(), 1e-5, residual.double())
    assert_close(got, exact, reference.layer_norm(x, weight, bias, 1e-5, residual))
