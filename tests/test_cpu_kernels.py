"""The C++ kernels, every instruction set in turn, against a float64 reference; the AMX kernel on any processor with AVX-512."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cpu_isas import ISAS, KERNELS, allocated, each_isa, each_kernel, needs_kernels

from sparse_prune import backends, ops, reference  # noqa: F401  (ops defines the schemas)
from sparse_prune.benchmark import thread_count
from sparse_prune.bsr import BsrWeight
from sparse_prune.errors import SparsePruneError

ROOT = Path(__file__).resolve().parent.parent
sparse = torch.ops.sparse_prune

# Low blocks and enough tokens for csrc/cpu/token_tile.h: cut edges, blocks of odd heights, long rows, the rows of two panels.
TOKENS = [
    (53, 250, 75, 16, 16, 0.9),
    (97, 500, 333, 8, 8, 0.5),
    (40, 300, 128, 12, 8, 0.7),
    (64, 256, 600, 16, 64, 1.0),
    (48, 512, 40, 1, 1, 0.5),
]
# M, N, K, R, C, density of blocks: M of 0 and 1, cut edges, odd and rectangular blocks, no and all blocks, strips of 16 to 64.
PROBLEMS = [
    (0, 64, 64, 32, 32, 0.5),
    (1, 100, 75, 16, 8, 0.5),
    (2, 48, 97, 48, 33, 0.7),
    (5, 64, 96, 32, 32, 0.4),
    (1, 64, 1536, 32, 32, 1.0),
    (9, 64, 1536, 32, 32, 1.0),
    (17, 128, 64, 64, 16, 0.5),
    (20, 33, 31, 1, 1, 0.3),
    (29, 96, 64, 32, 32, 1.0),
    (33, 70, 50, 7, 5, 0.4),
    (40, 64, 64, 32, 32, 0.0),
    (47, 80, 128, 16, 48, 0.5),
    (67, 100, 96, 80, 24, 0.6),
    (300, 160, 72, 128, 16, 0.5),
    (40, 128, 300, 32, 128, 0.6),
    (19, 300, 256, 128, 128, 0.6),
    *TOKENS,
]
ACTIVATIONS = list(reference.ACTIVATIONS)


class Problem:
    """Random operands of one product; x is a view into rows that end in NaN, and one block-row is empty."""

    def __init__(self, m, n, k, r, c, density, dtype):
        grid = -(-n // r), -(-k // c)
        mask = torch.rand(grid) < density
        if density < 1:
            mask[grid[0] // 2] = False
        packed = BsrWeight.from_dense((torch.randn(n, k) / k**0.5).to(dtype), mask, (r, c))
        self.n, self.k, self.packed, self.weight = n, k, packed, packed.to_dense()
        self.bsr = packed.crow_indices, packed.col_indices, packed.values
        self.x = torch.full((m, k + 3), torch.nan, dtype=dtype)[:, :k]
        self.x.copy_(torch.randn(m, k))
        self.dy = torch.randn(m, n).to(dtype)
        self.bias = torch.randn(n).to(dtype)
        self.residual = torch.randn(m, n).to(dtype)

    def linear(self, activation="none", prepacked=None, bias=True, residual=True):
        return sparse.bsr_linear(
            self.x,
            *self.bsr,
            prepacked,
            self.n,
            self.bias if bias else None,
            activation,
            self.residual if residual else None,
        )

    def dense_linear(self, activation="none", dtype=None, bias=True, residual=True):
        """By PyTorch, from a copy of x's rows: with AMX oneDNN reads on behind a row, and multiplies NaN there by 0."""
        x, weight, b, res = (t.to(dtype or t.dtype) for t in (self.x, self.weight, self.bias, self.residual))
        y = reference.ACTIVATIONS[activation](F.linear(x.contiguous(), weight, b if bias else None))
        return y + res if residual else y


def assert_close(got, exact, dense):
    """The norm of got's error is at most twice that of PyTorch's dense result in the same dtype, both against exact (float64).

    The single worst element scatters more than a norm (the portable code also rounds twice where an FMA rounds once), so it gets
    twice that room: a wrong or missing element is off by far more.
    """
    assert got.shape == exact.shape and got.dtype == dense.dtype and got.is_contiguous()
    assert not got.isnan().any()
    if got.numel() == 0:
        return
    ours, theirs = got.double() - exact, dense.double() - exact
    eps = torch.finfo(got.dtype).eps
    assert ours.norm() <= 2 * max(theirs.norm(), eps / 4 * exact.norm())
    assert ours.abs().max() <= 4 * max(theirs.abs().max(), eps / 2 * exact.abs().max())


@needs_kernels
@each_isa
def test_the_best_kernels_that_are_allowed_run(isa):
    with backends.force_isa(isa):
        for dtype, sets in KERNELS.items():
            assert backends.cpu_isa(dtype) == next(i for i in backends.ISAS[backends.ISAS.index(isa) :] if i in sets)


@needs_kernels
@each_kernel()
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_linear_matches_float64(isa, dtype, problem):
    p = Problem(*problem, dtype)
    with backends.force_isa(isa):
        assert backends.cpu_isa(dtype) == isa
        prepacked = sparse.cpu_prepack(p.packed.values)
        for activation in ACTIVATIONS:
            got = p.linear(activation, prepacked)
            assert_close(got, p.dense_linear(activation, torch.float64), p.dense_linear(activation))
            assert torch.equal(got, p.linear(activation)), "packing on the fly gives the same bits"
        for bias, residual in ((False, False), (True, False), (False, True)):
            got = p.linear("none", prepacked, bias, residual)
            assert_close(
                got, p.dense_linear("none", torch.float64, bias, residual), p.dense_linear("none", None, bias, residual)
            )


@needs_kernels
@each_kernel(torch.float32, torch.bfloat16)
@pytest.mark.parametrize("r", [16, 32, 64])
def test_output_larger_than_a_cache(isa, dtype, r):
    """16 MiB of y and more are written past the caches, where every row of a block begins a cache line: the bits of its halves."""
    m = (16 << 20) // (4096 * dtype.itemsize) + 52
    p = Problem(m, 4096, 64, r, 32, 0.4, dtype)
    halves = zip(p.x.split(m // 2), p.residual.split(m // 2), strict=True)
    with backends.force_isa(isa):
        got = [p.linear("none", residual=False), p.linear("relu")]
        for half, rows in zip(halves, torch.arange(m).split(m // 2), strict=True):
            p.x, p.residual = half
            assert torch.equal(p.linear("none", residual=False), got[0][rows])
            assert torch.equal(p.linear("relu"), got[1][rows])


@needs_kernels
@each_kernel()
@pytest.mark.parametrize("problem", [*PROBLEMS, (1300, 64, 64, 32, 32, 0.5)], ids=str)
def test_gradient_products_match_float64(isa, dtype, problem):
    p = Problem(*problem, dtype)
    r, c = p.packed.blocksize
    with backends.force_isa(isa):
        dx = sparse.bsr_linear_dx(p.dy, *p.bsr, p.k)
        dvalues = sparse.bsr_sdd(p.dy, p.x, *p.bsr[:2], r, c)
    assert_close(dx, p.dy.double() @ p.weight.double(), p.dy @ p.weight)
    exact = reference.bsr_sdd(p.dy.double(), p.x.double(), *p.bsr[:2], r, c)
    assert_close(dvalues, exact, reference.bsr_sdd(p.dy, p.x, *p.bsr[:2], r, c))


@needs_kernels
@each_kernel()
@pytest.mark.parametrize("block", [(32, 32), (16, 48), (7, 5)], ids=str)
def test_dx_reads_the_values_where_they_are(isa, dtype, block):
    """No tensor beside dx is made, for the transposed index either."""
    p = Problem(40, 640, 512, *block, 0.5, dtype)
    with backends.force_isa(isa):
        assert allocated(lambda: sparse.bsr_linear_dx(p.dy, *p.bsr, p.k)) == 40 * p.k * dtype.itemsize


@needs_kernels
@each_kernel()
@pytest.mark.parametrize("block", [(32, 32), (16, 16), (3, 5)], ids=str)
def test_dx_in_several_groups_and_passes(isa, dtype, block):
    """Over 1 MiB of kept blocks and over 512 rows, of a dy with more inputs than a pass of 256 rows takes."""
    n, k = (1600, 768) if block[0] > 3 else (600, 90)
    p = Problem(1100, n, k, *block, 0.6, dtype)
    with backends.force_isa(isa):
        dx = sparse.bsr_linear_dx(p.dy, *p.bsr, p.k)
    assert_close(dx, p.dy.double() @ p.weight.double(), p.dy @ p.weight)


OUT_DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@needs_kernels
@each_kernel()
@pytest.mark.parametrize("problem", [q for q in PROBLEMS if q[0] in (0, 1, 17, 33, 53, 67, 300)], ids=str)
def test_y_of_another_dtype_is_rounded_once(isa, dtype, problem):
    p = Problem(*problem, dtype)
    for out in OUT_DTYPES:
        if out == dtype:
            continue
        eps = torch.finfo(out).eps / 2
        bias, residual = p.bias.to(out), p.residual.to(out)
        for activation in ACTIVATIONS:
            for b, r in ((bias, residual), (None, None)):
                with backends.force_isa(isa):
                    got = sparse.bsr_linear(p.x, *p.bsr, None, p.n, b, activation, r, out)
                z = p.x.double() @ p.weight.double().t() + (0 if b is None else b.double())
                y = reference.ACTIVATIONS[activation](z) + (0 if r is None else r.double())
                size = p.x.double().abs() @ p.weight.double().abs().t() + 1
                if r is not None:
                    size = size + r.double().abs()
                assert got.dtype == out and got.is_contiguous() and got.shape == y.shape
                # Sums in float32, bf16's activations by their table, and one rounding.
                table = 8e-6 if out == torch.bfloat16 else 0
                assert ((got.double() - y).abs() <= 1.01 * eps * y.abs() + 2e-6 * size + table).all()


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_y_in_float32_keeps_what_16_bits_would_round(dtype):
    p = Problem(64, 128, 128, 32, 32, 1.0, dtype)
    exact = p.x.double() @ p.weight.double().t()
    wide = sparse.bsr_linear(p.x, *p.bsr, None, p.n, None, "none", None, torch.float32)
    narrow = p.linear(bias=False, residual=False)
    assert (wide.double() - exact).norm() < 1e-3 * (narrow.double() - exact).norm()


@needs_kernels
@each_kernel(torch.bfloat16)
def test_an_infinite_gradient_stays_in_its_token(isa, dtype):
    """Tokens 0 to 31 are one product of the AMX kernel, and what is left of them must not meet the padding of the next."""
    p = Problem(40, 32, 32, 32, 32, 1.0, dtype)
    p.dy[20, 5] = torch.inf
    p.x[20] = 1
    with backends.force_isa(isa):
        dvalues = sparse.bsr_sdd(p.dy, p.x, *p.bsr[:2], 32, 32)
    assert dvalues[0, 5].isposinf().all()
    assert dvalues.isfinite().sum() == 31 * 32


@needs_kernels
@each_kernel(torch.float16)
def test_float16_that_is_not_finite(isa, dtype):
    """AMX has pieces of finite numbers only: NaN and infinity reach the outputs that IEEE says, and no others."""
    p = Problem(70, 320, 192, 32, 32, 0.5, dtype)
    got = []
    for weight_too in (False, True):
        p.x[9, 50], p.x[40, 100] = torch.inf, torch.nan
        if weight_too:
            p.bsr[2][3, 5, 7] = -torch.inf
        p.weight = p.packed.to_dense()
        kept = p.packed.block_mask().repeat_interleave(32, 0).repeat_interleave(32, 1)
        for threads in (1, 2, 3):
            with backends.force_isa(isa), thread_count(threads):
                got.append(p.linear())
        assert torch.equal(got[-1].view(torch.int16), got[-2].view(torch.int16))
        assert torch.equal(got[-1].view(torch.int16), got[-3].view(torch.int16))
        x, w = p.x.double(), p.weight.double()
        # what is pruned is not multiplied: one row of x at a time, where it is 0
        dense = torch.stack([torch.where(kept, row * w, 0.0).sum(1) for row in x]) + p.bias + p.residual
        finite = dense.isfinite()
        assert finite.any(1)[9] and not finite[9].all() and torch.equal(finite, got[-1].isfinite())
        assert torch.equal(dense.isnan(), got[-1].isnan())
        assert (got[-1].double() - dense)[finite].abs().max() < 4e-3


@needs_kernels
def test_float64_products_are_exact_to_rounding():
    p = Problem(33, 70, 50, 7, 5, 0.4, torch.float64)
    for activation in ACTIVATIONS:
        assert torch.allclose(p.linear(activation), p.dense_linear(activation), rtol=1e-12, atol=1e-13)
    assert torch.allclose(sparse.bsr_linear_dx(p.dy, *p.bsr, p.k), p.dy @ p.weight, rtol=1e-12, atol=1e-13)
    got = sparse.bsr_sdd(p.dy, p.x, *p.bsr[:2], 7, 5)
    assert torch.allclose(got, reference.bsr_sdd(p.dy, p.x, *p.bsr[:2], 7, 5), rtol=1e-12, atol=1e-13)


@needs_kernels
@each_kernel(torch.float32)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_is_as_accurate_as_pytorch(isa, dtype, activation):
    """A 1x1 weight of 1 leaves act(x); the floats tried are dense near 0 and reach past where exp over- and underflows."""
    x = torch.cat([torch.linspace(-12, 12, 60_001), torch.logspace(-30, 38, 2001), -torch.logspace(-30, 38, 2001)])
    x = x[:, None].to(dtype)
    one = BsrWeight.from_dense(torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool), (1, 1))
    exact = reference.ACTIVATIONS[activation](x.double())
    with backends.force_isa(isa):
        got = sparse.bsr_linear(x, one.crow_indices, one.col_indices, one.values, None, 1, None, activation, None)
        odd = torch.tensor([[torch.nan], [torch.inf], [0.0]])
        special = sparse.bsr_linear(odd, one.crow_indices, one.col_indices, one.values, None, 1, None, activation, None)
    theirs = reference.ACTIVATIONS[activation](x)
    assert_close(got, exact, theirs)
    ordinary = x.abs() <= 12
    assert_close(got[ordinary], exact[ordinary], theirs[ordinary])
    if activation == "gelu":
        # PyTorch's own error depends on the processor: with AVX2 it is 2% below that of our AVX2 kernel.
        assert (got - exact)[ordinary].abs().max() <= 2 * (theirs - exact)[ordinary].abs().max()
    assert special[0].isnan() and special[1] == torch.inf and special[2] == 0


@needs_kernels
@each_kernel(torch.bfloat16, torch.float16)
def test_16_bit_results_are_rounded_to_nearest_even(isa, dtype):
    """Every normal 16-bit number times 1.25 is exact in float32, so one rounding decides each bit of y."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)[:, None]
    x = x[(x.abs() >= torch.finfo(dtype).tiny) & x.isfinite()][:, None]
    w = BsrWeight.from_dense(torch.full((1, 1), 1.25, dtype=dtype), torch.ones(1, 1, dtype=torch.bool), (1, 1))
    with backends.force_isa(isa):
        got = sparse.bsr_linear(x, w.crow_indices, w.col_indices, w.values, None, 1, None, "none", None)
    assert torch.equal(got, (x.float() * 1.25).to(dtype))


@needs_kernels
@each_kernel(torch.bfloat16)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_activation_to_bf16_is_rounded_right_but_for_a_unit(isa, dtype, activation):
    """Every bfloat16 is tried: 2 of 100 may be a unit off, none more, and what lies below 5e-7 may be 0."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)[:, None]
    w = BsrWeight.from_dense(torch.ones(1, 1, dtype=x.dtype), torch.ones(1, 1, dtype=torch.bool), (1, 1))
    with backends.force_isa(isa):
        got = sparse.bsr_linear(x, w.crow_indices, w.col_indices, w.values, None, 1, None, activation, None)
    exact = reference.ACTIVATIONS[activation](x.double())
    large = exact.isfinite() & (exact.abs() >= 5e-7)
    off = (got.view(torch.int16).int() - exact.to(x.dtype).view(torch.int16).int())[large].abs()
    assert off.max() <= 1 and off.sum() <= 0.02 * large.sum()
    small = exact.isfinite() & (exact.abs() < 5e-7)
    assert (got.double() - exact)[small].abs().max() < 5e-7
    assert got[x.isnan()].isnan().all() and got[x == torch.inf] == torch.inf


@needs_kernels
@each_kernel()
@pytest.mark.parametrize(("block", "density"), [(32, 0.5), (16, 0.2)])
def test_threads_do_not_change_the_bits(isa, dtype, block, density):
    # Over 9 million multiply-adds: enough work for 3 threads. In blocks of 16 lanes are tokens for one thread, outputs for three.
    p = Problem(300, 640, 256, block, block, density, dtype)
    results = []
    for threads in (1, 2, 3):
        with backends.force_isa(isa), thread_count(threads):
            dvalues = sparse.bsr_sdd(p.dy, p.x, *p.bsr[:2], block, block)
            results.append((p.linear("gelu"), sparse.bsr_linear_dx(p.dy, *p.bsr, p.k), dvalues))
    for other in results[1:]:
        for one, many in zip(results[0], other, strict=True):
            assert torch.equal(one, many)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_concurrent_calls_agree(dtype):
    problems = [Problem(m, 192, 160, 32, 32, 0.5, dtype) for m in (3, 40, 130)]
    want = [p.linear("silu") for p in problems]

    def call(i):
        return i, problems[i].linear("silu")

    with ThreadPoolExecutor(8) as pool:
        for i, got in pool.map(call, [n % 3 for n in range(240)]):
            assert torch.equal(got, want[i])


GLU_PROBLEMS = [problem for problem in PROBLEMS if problem[0] in (0, 1, 5, 17, 33, 47)] + [(300, 640, 72, 128, 16, 0.5)]


def _glu(problem, dtype):
    """Arguments of bsr_linear_glu but for the activation, and the two problems; the up weight's blocks have another width."""
    m, n, k, r, c, density = problem
    gate, up = Problem(m, n, k, r, c, density, dtype), Problem(m, n, k, r, c + 3, 0.8, dtype)
    prepacked = [sparse.cpu_prepack(p.packed.values) for p in (gate, up)]
    up.x = gate.x
    return (gate.x, *gate.bsr, prepacked[0], *up.bsr, prepacked[1], n, gate.bias, up.bias), gate, up


def _glu_dense(gate, up, activation, bias=True):
    """act(gate) * up in float64, and the same as far off as PyTorch is in this dtype.

    A few large elements make up the norm of a product, and that PyTorch errs little in one is luck: its error counts as the root
    mean square of all at least.
    """
    y = act_y, up_y = [
        p.dense_linear(act, torch.float64, bias, residual=False) for p, act in ((gate, activation), (up, "none"))
    ]
    errors = [
        (p.dense_linear(act, None, bias, residual=False).double() - exact).abs()
        for p, act, exact in zip((gate, up), (activation, "none"), y, strict=True)
    ]
    act_error, up_error = (error.maximum(error.square().mean().sqrt()) for error in errors)
    exact = act_y * up_y
    return exact, (exact + act_error * up_y.abs() + up_error * act_y.abs()).to(gate.x.dtype)


@needs_kernels
@each_kernel()
@pytest.mark.parametrize("problem", GLU_PROBLEMS, ids=str)
def test_glu_matches_float64(isa, dtype, problem):
    arguments, gate, up = _glu(problem, dtype)
    with backends.force_isa(isa):
        for activation in ("silu", "gelu_tanh", "none"):
            got = sparse.bsr_linear_glu(*arguments, activation)
            assert_close(got, *_glu_dense(gate, up, activation))
            packed_now = list(arguments)
            packed_now[4] = packed_now[8] = None
            assert torch.equal(got, sparse.bsr_linear_glu(*packed_now, activation)), (
                "packing on the fly gives the same bits"
            )
        without = list(arguments)
        without[-2:] = None, None
        assert_close(sparse.bsr_linear_glu(*without, "silu"), *_glu_dense(gate, up, "silu", bias=False))


@needs_kernels
def test_full_and_sparse_block_rows_do_not_make_bits_depend_on_threads():
    """Half of the block-rows are full: what each thread sees differs, and with AMX its kind of tile must not follow from that."""
    mask = torch.zeros(16, 32, dtype=torch.bool)
    mask[:8] = True
    mask[8:, :2] = True
    packed = BsrWeight.from_dense(torch.randn(1024, 1024, dtype=torch.bfloat16), mask, (64, 32))
    x, got = torch.randn(16, 1024, dtype=torch.bfloat16), []
    for threads in (1, 2, 3):
        with thread_count(threads):
            bsr = packed.crow_indices, packed.col_indices, packed.values
            got.append(sparse.bsr_linear(x, *bsr, None, 1024, None, "none", None))
    assert torch.equal(got[0], got[1]) and torch.equal(got[0], got[2])


@needs_kernels
def test_glu_does_not_depend_on_threads():
    arguments, _, _ = _glu((300, 640, 256, 32, 32, 0.5), torch.float32)
    got = []
    for threads in (1, 2, 3):
        with thread_count(threads):
            got.append(sparse.bsr_linear_glu(*arguments, "silu"))
    assert torch.equal(got[0], got[1]) and torch.equal(got[0], got[2])


@needs_kernels
@pytest.mark.parametrize(
    ("message", "place", "change"),
    [
        ("gate_col_indices: expected entries in", 2, lambda t: t + 9),
        ("up_col_indices: expected entries in", 6, lambda t: t - 9),
        ("up_crow_indices: expected entries that rise", 5, lambda t: t.flip(0)),
        ("up_values: expected blocks of 32 outputs like gate_values, got 16", 7, lambda t: t[:, :16]),
        ("up_values: expected dtype Float like gate_values, got Double", 7, lambda t: t.double()),
        (r"up_prepacked: expected shape \[\d+\], got \[1\]", 8, lambda t: t[:1]),
        (r"gate_bias: expected shape \[64\], got \[63\]", 10, lambda t: t[1:]),
    ],
)
def test_glu_names_what_is_wrong(message, place, change):
    arguments = list(_glu((4, 64, 96, 32, 32, 0.8), torch.float32)[0])
    arguments[place] = change(arguments[place])
    with pytest.raises(RuntimeError, match=message):
        sparse.bsr_linear_glu(*arguments, "silu")


def _bad_calls():
    torch.manual_seed(0)  # pytest collects before any fixture seeds: an unlucky mask would have no block to spoil
    p = Problem(4, 64, 96, 32, 32, 0.5, torch.float32)
    crow, col, values = p.bsr
    beyond, negative, falling, wrapping = col.clone(), col.clone(), crow.clone(), crow.clone()
    beyond[0], negative[0], falling[1] = 3, -1, 99
    lowest, highest = torch.full_like(col, -(2**31)), torch.full_like(col, 2**31 - 1)
    wrapping[1] = -(2**31)
    good = dict(
        x=p.x, crow=crow, col=col, values=values, packed=None, n=64, bias=p.bias, act="none", residual=p.residual
    )
    cases = {
        "x: expected a matrix": dict(x=p.x[0]),
        "x: expected dtype Float like values, got BFloat16": dict(x=p.x.bfloat16()),
        "x: expected dtype Float like values, got Int": dict(x=p.x.int()),
        r"crow_indices: expected shape \[4\], got \[3\]": dict(n=65, bias=None, residual=None),
        "crow_indices: expected dtype int32, got Long": dict(crow=crow.long()),
        "crow_indices: expected entries that rise from 0": dict(crow=falling),
        r"col_indices: expected entries in \[0, 3\), got one outside": dict(col=beyond),
        r"col_indices: expected entries in \[0, 3\)": dict(col=negative),
        r"col_indices: expected entries in \[0, 3\), got one": dict(col=lowest),
        r"col_indices: expected entries in \[0, 3\), got": dict(col=highest),
        "crow_indices: expected entries that rise from 0 to": dict(crow=wrapping),
        r"values: expected shape \[nnzb, R, C\]": dict(values=values.flatten()),
        r"values: expected shape \[\d+, 32, 32\], got \[\d+, 32, 32\]": dict(values=values[:-1]),
        r"prepacked: expected shape \[\d+\], got \[7\]": dict(packed=values.new_zeros(7)),
        r"bias: expected shape \[64\], got \[63\]": dict(bias=p.bias[1:]),
        "bias: expected dtype Float like values, got Double": dict(bias=p.bias.double()),
        r"residual: expected shape \[4, 64\], got \[3, 64\]": dict(residual=p.residual[1:]),
        "activation: expected none, relu, gelu, gelu_tanh or silu, got tanh": dict(act="tanh"),
    }
    return [pytest.param(message, {**good, **change}, id=message) for message, change in cases.items()]


@needs_kernels
@pytest.mark.parametrize(("message", "a"), _bad_calls() if ISAS else [])
def test_bad_calls_name_argument_expected_and_got(message, a):
    with pytest.raises(RuntimeError, match=message):
        sparse.bsr_linear(
            a["x"], a["crow"], a["col"], a["values"], a["packed"], a["n"], a["bias"], a["act"], a["residual"]
        )


@needs_kernels
def test_force_isa_is_undone_and_refuses_the_unknown():
    best = backends.cpu_isa(torch.bfloat16)
    with backends.force_isa("portable"):
        assert backends.cpu_isa(torch.bfloat16) == backends.cpu_isa(torch.float32) == "portable"
        with backends.force_isa(ISAS[0]):
            assert backends.cpu_isa(torch.bfloat16) == best
        assert backends.cpu_isa(torch.bfloat16) == "portable"
    assert backends.cpu_isa(torch.bfloat16) == best
    for name in ("sse9", ""):
        with (
            pytest.raises(SparsePruneError, match="name: expected an instruction set of this machine"),
            backends.force_isa(name),
        ):
            pass


@needs_kernels
@pytest.mark.parametrize(
    ("value", "says"),
    [("portable", "cpu:portable"), ("sse9", "SPARSE_PRUNE_ISA: expected an instruction set of this processor (")],
)
def test_isa_from_the_environment(value, says):
    code = "import torch\nfrom sparse_prune import ops\nprint(ops.backend_for('cpu', torch.bfloat16))"
    env = {**os.environ, "SPARSE_PRUNE_ISA": value, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert says in result.stdout + result.stderr


@pytest.mark.parametrize(("mode", "code"), [("auto", 0), ("1", 1)])
def test_setup_without_a_compiler(mode, code):
    env = {**os.environ, "SPARSE_PRUNE_CPU": mode, "CXX": "no-such-compiler"}
    result = subprocess.run([sys.executable, "setup.py", "--name"], cwd=ROOT, capture_output=True, text=True, env=env)
    assert result.returncode == code, result.stderr
    assert "no C++ compiler" in result.stderr


# Heights of one and of two tiles, of shared last rows and of two panels; strips of one and of two tiles; steps of 16 to 64 bytes.
# What tiles do not take goes to AVX512-BF16, where a trap (trap.cpp) may cost 10 us for every vector of products: only small ones.
AMX_PROBLEMS = [
    *(problem for problem in PROBLEMS if problem[0] < 300 and problem not in TOKENS),
    (3, 64, 64, 32, 32, 0.5),
    (4, 64, 64, 32, 32, 0.5),
    (8, 96, 128, 16, 16, 0.5),
    (16, 64, 128, 32, 32, 0.7),
    (24, 64, 128, 64, 64, 0.5),
    (31, 96, 128, 48, 32, 0.7),
    (65, 96, 100, 96, 20, 0.5),
    (70, 50, 80, 16, 16, 0.6),
    (81, 64, 64, 32, 32, 0.5),
    (113, 96, 64, 48, 16, 0.5),
    (140, 96, 128, 16, 16, 0.5),
    # Four columns: one low tile; a cut edge and shared rows; two strips.
    (8, 192, 128, 64, 16, 0.5),
    (37, 150, 96, 64, 32, 0.6),
    (50, 256, 64, 128, 16, 0.5),
]


def harness_linear(library, p, activation="none", into=None, pair=0, tiles=1):
    """The product by AMX, or with tiles = 0 by AVX512-BF16; into: y, which is the residual too; pair: of csrc/cpu/kernels.h."""
    m, k = p.x.shape
    got = torch.full((m, p.n), torch.nan, dtype=p.x.dtype) if into is None else into
    residual, prepacked = p.residual if into is None else into, sparse.cpu_prepack(p.packed.values)
    crow, col, x, w, bias, res, y = (
        ctypes.c_void_p(None if t is None else t.data_ptr())
        for t in (*p.bsr[:2], p.x, prepacked, p.bias, residual, got)
    )
    sizes = [ctypes.c_int64(v) for v in (m, p.n, k, *p.packed.blocksize)]
    number = ACTIVATIONS.index(activation)
    dtype = [torch.float32, torch.bfloat16, torch.float16].index(p.x.dtype)
    library.linear(tiles, dtype, *sizes, crow, col, x, ctypes.c_int64(p.x.stride(0)), w, bias, number, res, y, pair)
    return got


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("problem", AMX_PROBLEMS, ids=str)
def test_native_amx_matches_float64(harness, problem, dtype):
    p = Problem(*problem, dtype)
    for activation in ACTIVATIONS:
        assert_close(
            harness_linear(harness["native"], p, activation),
            p.dense_linear(activation, torch.float64),
            p.dense_linear(activation),
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("problem", AMX_PROBLEMS, ids=str)
def test_native_amx_multiplies_each_row_of_a_pair_once(harness, problem, dtype):
    """Tiles share rows where their number asks for it; in a pair's second product y is what it multiplies."""
    gate, up = (Problem(*problem, dtype) for _ in range(2))
    up.x = gate.x
    up.residual.zero_()
    got = harness_linear(harness["native"], gate, "silu", harness_linear(harness["native"], up, pair=1), pair=2)
    exact, dense = (
        gate.dense_linear("silu", to, residual=False) * up.dense_linear("none", to, residual=False)
        for to in (torch.float64, None)
    )
    assert_close(got, exact, dense)


@pytest.mark.parametrize(
    ("n", "k", "block"), [(64, 2016, (32, 32)), (1024, 2016, (32, 32)), (64, 1056, (32, 64)), (48, 1008, (16, 16))]
)
def test_native_amx_takes_rows_a_page_apart(harness, n, k, block):
    """Such rows are copied where many blocks use them (n = 1024), and read in place where few do; nothing behind them is."""
    p = Problem(70, n, k, *block, 1.0, torch.bfloat16)
    apart = torch.full((70, 2048), torch.nan, dtype=torch.bfloat16)[:, :k]
    p.x = apart.copy_(p.x)
    assert_close(harness_linear(harness["native"], p), p.dense_linear("none", torch.float64), p.dense_linear())


@pytest.mark.parametrize(
    ("dtype", "block", "m", "loads", "products", "stores"),
    [
        (
            torch.bfloat16,
            (32, 32),
            128,
            4 * 5,
            4 * 4,
            4 * 4,
        ),  # four times 32 rows, each 2 x 2 tiles: one of weights is loaded twice
        (torch.bfloat16, (64, 64), 128, 8 * 2 * 5, 8 * 2 * 4, 8 * 4),  # 16 rows by four columns: x once for 64 outputs
        (torch.bfloat16, (16, 16), 128, 8 * 2 / 2, 8 / 2, 8),  # two blocks side by side in one product
        (torch.bfloat16, (32, 32), 16, 3, 2, 2),
        (torch.bfloat16, (32, 32), 24, 5, 4, 4),
        (torch.float16, (32, 32), 128, 4 * 10, 4 * 16, 4 * 4),  # four products in the place of one
        (torch.float16, (64, 64), 24, 2 * 2 * 10, 2 * 2 * 16, 2 * 4),
    ],
    ids=str,
)
def test_native_amx_counts(harness, dtype, block, m, loads, products, stores):
    """What docs/performance.md derives its bound from: tile instructions per block, and stores per block-row."""
    p = Problem(m, 4 * block[0], 4 * block[1], *block, 1.0, dtype)
    counts = (ctypes.c_int64 * 3).in_dll(harness["counted"], "tile_counts")
    before = list(counts)
    harness_linear(harness["counted"], p)
    assert [now - then for now, then in zip(counts, before, strict=True)] == [16 * loads, 16 * products, 4 * stores]
