"""int8 products, every instruction set in turn, against float64: the sums must be exact; AMX on any processor with VNNI."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cpu_isas import ISA_PARAMS, ISAS, allocated, needs_kernels

import sparse_prune as sp
from sparse_prune import backends, ops, reference
from sparse_prune.benchmark import thread_count
from sparse_prune.bsr import INT8_MAX_INPUTS, dense_from_bsr

sparse = torch.ops.sparse_prune
each_path = pytest.mark.parametrize("path", ["reference", *ISA_PARAMS])
RUNS = {  # instruction set allowed -> the one that has int8 kernels
    "portable": "portable",
    "avx2": "avx2",
    "avx512": "avx2",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "amx_int8": "amx_int8",
    "amx_bf16": "amx_int8",
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = list(reference.ACTIVATIONS)
needs_vnni = pytest.mark.skipif("avx512_vnni" not in ISAS, reason="this processor or build has no VNNI")

# M, N, K, R, C, density of blocks: M of 0 and 1, cut edges, odd and rectangular blocks, no and all blocks, strips of 16 to 64.
PROBLEMS = [
    (0, 64, 64, 32, 32, 0.5),
    (1, 100, 75, 16, 8, 0.5),
    (2, 48, 97, 48, 33, 0.7),
    (1, 64, 1536, 32, 32, 1.0),
    (9, 64, 512, 64, 64, 1.0),
    (17, 128, 64, 64, 16, 0.5),
    (20, 33, 31, 1, 1, 0.3),
    (29, 96, 64, 32, 32, 1.0),
    (33, 70, 50, 7, 5, 0.4),
    (40, 64, 64, 32, 32, 0.0),
    (47, 80, 128, 16, 48, 0.5),
    (67, 100, 96, 80, 24, 0.6),
    (65, 200, 300, 128, 128, 0.5),
    (300, 160, 72, 128, 16, 0.5),
    (53, 250, 75, 16, 16, 0.9),  # from here on csrc/cpu/token_tile.h
    (97, 500, 333, 8, 8, 0.5),
    (40, 300, 128, 12, 8, 0.7),
]


class Problem:
    """Random operands of one product; x is a view into rows that end in NaN, and one block-row is empty."""

    def __init__(self, m, n, k, r, c, density, dtype=torch.float32):
        grid = -(-n // r), -(-k // c)
        mask = torch.rand(grid) < density
        if density < 1:
            mask[grid[0] // 2] = False
        self.packed = sp.BsrWeight.from_dense(torch.randn(n, k), mask, (r, c)).quantize()
        self.n = n
        self.bsr = self.packed.crow_indices, self.packed.col_indices, self.packed.values, self.packed.scales
        self.x = torch.full((m, k + 3), torch.nan, dtype=dtype)[:, :k]
        self.x.copy_(torch.randn(m, k) * torch.logspace(-3, 3, max(m, 1))[:m, None])
        self.bias = torch.randn(n).to(dtype)
        self.residual = torch.randn(m, n).to(dtype)

    def run(self, path, activation="none", x_scale=None, bias=True, residual=True):
        bias, residual = self.bias if bias else None, self.residual if residual else None
        if path == "reference":
            backend = "reference"
            return sp.bsr_linear(self.x, self.packed, bias, activation, residual, backend, x_scale)
        with backends.force_isa(path):
            assert sp.backend_for("cpu", torch.int8) == f"cpu:{RUNS[path]}"
            derived = sparse.cpu_prepack_int8(self.packed.values, self.packed.crow_indices)
            got = sparse.bsr_linear_int8(self.x, *self.bsr, derived, self.n, bias, activation, residual, x_scale)
            again = sparse.bsr_linear_int8(self.x, *self.bsr, None, self.n, bias, activation, residual, x_scale)
            torch.testing.assert_close(
                again, got, rtol=0, atol=0, equal_nan=True
            )  # packing on the fly gives the same bits
        return got

    def exact(self, activation="none", x_scale=None, bias=True, residual=True):
        """The product of the rounded operands in float64, and the sum of its terms' magnitudes, which bounds rounding."""
        q, x_scales = reference.quantize_rows(self.x, x_scale)
        crow, col, values, scales = self.bsr
        weight = dense_from_bsr(crow, col, values.double(), (self.n, q.shape[1]), scales.double())
        total = q.double() @ weight.T * x_scales.double()[:, None]
        bias = self.bias.double() if bias else torch.zeros(self.n, dtype=torch.float64)
        residual = self.residual.double() if residual else torch.zeros_like(total)
        y = reference.ACTIVATIONS[activation](total + bias) + residual
        return y, total.abs() + bias.abs() + residual.abs()


def assert_exact(got, expected, dtype, activation="none", factor=1):
    """got is expected but for the roundings after an exact sum: a handful in float32, and one to the dtype of y.

    Where that is bfloat16, AVX-512's activations err before it by up to 7e-6, and 2e-3 of themselves (csrc/cpu/kernels.h).
    factor is what they are multiplied by.
    """
    exact, size = expected
    by_table = activation in ("gelu", "gelu_tanh", "silu") and dtype == torch.bfloat16
    short = (2e-3 * size).minimum(torch.as_tensor(7e-6 * factor)) if by_table else 0
    assert got.shape == exact.shape and got.dtype == dtype and got.is_contiguous()
    assert not got.isnan().any()
    single, out = torch.finfo(torch.float32).eps, torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 0
    out_small = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    allowed = 6 * single * size + 1.01 * out * exact.abs() + out_small + short
    assert ((got.double() - exact).abs() <= allowed).all()


@each_path
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_matches_the_float64_product_of_the_rounded_operands(path, dtype, problem):
    p = Problem(*problem, dtype)
    for activation in ACTIVATIONS:
        assert_exact(p.run(path, activation), p.exact(activation), dtype, activation)
    for bias, residual in ((False, False), (True, False), (False, True)):
        got = p.run(path, "none", None, bias, residual)
        assert_exact(got, p.exact("none", None, bias, residual), dtype)


@each_path
@pytest.mark.parametrize("problem", [q for q in PROBLEMS if q[0] in (0, 1, 33, 53)], ids=str)
@pytest.mark.parametrize(("dtype", "out"), itertools.permutations(DTYPES, 2), ids=str)
def test_y_of_another_dtype_than_x(path, dtype, out, problem):
    """As if x had been of the dtype of y, but that it is rounded to int8 from its own."""
    p = Problem(*problem, dtype)
    bias, residual = p.bias, p.residual.to(out)
    with backends.force_isa(path) if path != "reference" else contextlib.nullcontext():
        backend = "reference" if path == "reference" else "cpu"
        for activation in ("none", "gelu"):
            got = sp.bsr_linear(p.x, p.packed, bias, activation, residual, backend, out_dtype=out)
            p.bias, p.residual = bias.to(out), residual
            assert_exact(got, p.exact(activation), out, activation)
            p.bias = bias


@each_path
def test_static_scale_rounds_half_to_even_and_saturates(path):
    """A weight of 127 * I times x / scale shows each rounded x; the scale 0.5 makes ties exact."""
    x = torch.tensor([[0.25, 0.75, 1.25, -0.25, -0.75, 63.25, 63.5, 63.75, 1000.0, -63.75, -1000.0, 0.0]])
    packed = sp.BsrWeight.from_dense(torch.eye(12) * 127, torch.ones(1, 1, dtype=torch.bool), (12, 12)).quantize()
    assert torch.equal(packed.values[0], torch.eye(12, dtype=torch.int8) * 127)
    p = Problem(1, 12, 12, 12, 12, 1.0)
    p.packed, p.bsr, p.x = packed, (packed.crow_indices, packed.col_indices, packed.values, packed.scales), x
    got = p.run(path, "none", 0.5, False, False) / (0.5 * 127)
    assert got.tolist() == [[0, 2, 2, 0, -2, 126, 127, 127, 127, -127, -127, 0]]
    p = Problem(33, 70, 50, 7, 5, 0.4, torch.bfloat16)
    assert_exact(p.run(path, "gelu", 0.03), p.exact("gelu", 0.03), torch.bfloat16, "gelu")


@each_path
@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, -1)])
def test_longest_sums_of_extremes_do_not_overflow(path, signs):
    c = 128
    blocks = INT8_MAX_INPUTS // c
    values = torch.full((blocks, 16, c), 127 * signs[1], dtype=torch.int8)
    crow, col = torch.tensor([0, blocks], dtype=torch.int32), torch.arange(blocks, dtype=torch.int32)
    packed = sp.BsrWeight((16, blocks * c), (16, c), crow, col, values, torch.ones(16)).validate()
    p = Problem(17, 16, c, 16, c, 1.0)
    p.packed, p.bsr = packed, (crow, col, values, packed.scales)
    p.x = torch.full((17, blocks * c), 127.0 * signs[0])
    sums = p.run(path, "none", None, False, False)
    assert torch.equal(sums, torch.full((17, 16), float(127 * 127 * blocks * c * signs[0] * signs[1])))


@needs_kernels
def test_longer_sums_are_refused():
    c = 128
    blocks = INT8_MAX_INPUTS // c + 1
    values = torch.ones(blocks, 1, c, dtype=torch.int8)
    crow, col = torch.tensor([0, blocks], dtype=torch.int32), torch.arange(blocks, dtype=torch.int32)
    packed = sp.BsrWeight((1, blocks * c), (1, c), crow, col, values, torch.ones(1))
    message = "crow_indices: expected at most 1040 blocks of 128 inputs in a block-row"
    with pytest.raises(sp.SparsePruneError, match=message):
        packed.validate()
    with pytest.raises(sp.SparsePruneError, match=message):
        sp.BsrWeight((1, blocks * c), (1, c), crow, col, values.float()).quantize()
    with pytest.raises(RuntimeError, match=message):
        sp.bsr_linear(torch.ones(1, blocks * c), packed)


@each_path
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("x_scale", [None, 0.01])
def test_rows_of_zeros_nan_and_infinity(path, dtype, x_scale):
    p = Problem(37, 100, 96, 32, 32, 0.6, dtype)
    p.x[::4] = 0
    odd = {1: torch.nan, 2: torch.inf, 18: -torch.inf, 35: torch.nan}
    for i, (row, value) in enumerate(odd.items()):
        p.x[row, (0, 95, 40, 31)[i]] = value
    got = p.run(path, "relu", x_scale)
    bad = torch.zeros(37, dtype=torch.bool)
    bad[list(odd)] = True
    assert got[bad].isnan().all() and not got[~bad].isnan().any()
    plain = (p.bias.float().relu() + p.residual[::4].float()).to(dtype)
    torch.testing.assert_close(got[::4], plain, rtol=0, atol=0)


@each_path
def test_tiny_and_huge_rows(path):
    p = Problem(5, 32, 64, 32, 32, 1.0)
    p.x[:] = torch.randn(5, 64) * torch.tensor([1e-45, 1e-38, 1e-30, 1e30, 1e36])[:, None]
    assert_exact(p.run(path, "none", None, False, False), p.exact("none", None, False, False), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(768, 3072), (3072, 768)], ids=str)
def test_a_layer_errs_by_about_a_percent(shape, dtype):
    k, n = shape
    mask = torch.rand(n // 32, k // 32) < 0.2
    packed = sp.BsrWeight.from_dense(torch.randn(n, k) / k**0.5, mask, (32, 32))
    x = torch.randn(64, k).to(dtype)
    exact = x.double() @ packed.to_dense().double().T
    error = (sp.bsr_linear(x, packed.quantize()).double() - exact).norm() / exact.norm()
    assert error < 0.02


@needs_kernels
@pytest.mark.parametrize("isa", [isa for isa in backends.ISAS if isa in ISAS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_gate_and_up_in_one_call(isa, dtype, problem):
    """act(gate) * up of the same rounded x: up is rounded to the dtype of y before it multiplies."""
    gate, up = (Problem(*problem, dtype) for _ in range(2))
    up.x = gate.x.copy_(torch.randn(gate.x.shape))
    numbers = []
    for p in (gate, up):
        derived = sparse.cpu_prepack_int8(p.packed.values, p.packed.crow_indices)
        n, k = p.packed.shape
        numbers.append(sparse.cpu_ready(*p.bsr[:3], derived, p.packed.scales, p.bias, n, k))
    with backends.force_isa(isa), torch.no_grad():
        for activation in ACTIVATIONS:
            got = sparse.cpu_glu_ready(gate.x, *numbers, ACTIVATIONS.index(activation))
            second = up.run(isa, "none", None, True, False)
            first, size = gate.exact(activation, None, True, False)
            expected = first * second.double(), size * second.double().abs()
            assert_exact(got, expected, dtype, activation, second.double().abs())
    for number in numbers:
        backends.drop_ready(number)


@needs_kernels
@pytest.mark.parametrize("isa", [isa for isa in backends.ISAS if isa in ISAS])
@pytest.mark.parametrize(("block", "density"), [(32, 0.5), (16, 0.2)])
def test_threads_do_not_change_the_bits(isa, block, density):
    # Over 9 million multiply-adds: enough work for 3 threads. In blocks of 16 lanes are tokens for one thread, outputs for three.
    p = Problem(300, 640, 256, block, block, density, torch.bfloat16)
    results = []
    for threads in (1, 2, 3):
        with thread_count(threads):
            results.append(p.run(isa, "gelu"))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@needs_kernels
def test_rows_beyond_the_scratch_are_rounded_in_parts():
    """x as int8 is more than the 4 MiB that are rounded at a time, in whole passes and a rest; no tensor beside y is made."""
    p = Problem(4300, 96, 1200, 32, 32, 0.5)
    p.x = torch.randn(4300, 1200)
    derived = sparse.cpu_prepack_int8(p.packed.values, p.packed.crow_indices)
    call = lambda x, r: sparse.bsr_linear_int8(x, *p.bsr, derived, p.n, p.bias, "silu", r, None)  # noqa: E731
    whole = call(p.x, p.residual)
    parts = zip(p.x.split(700), p.residual.split(700), strict=True)
    assert torch.equal(whole, torch.cat([call(x, r) for x, r in parts]))
    assert allocated(lambda: call(p.x, p.residual)) == 4 * whole.numel()


def test_concurrent_calls_agree():
    problems = [Problem(m, 192, 160, 32, 32, 0.5) for m in (3, 40, 130)]
    want = [sp.bsr_linear(p.x, p.packed, p.bias, "silu") for p in problems]
    with ThreadPoolExecutor(8) as pool:
        calls = pool.map(
            lambda i: (i, sp.bsr_linear(problems[i].x, problems[i].packed, problems[i].bias, "silu")), [0, 1, 2] * 60
        )
        for i, got in calls:
            assert torch.equal(got, want[i])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    p = Problem(6, 40, 48, 16, 16, 0.5, dtype)
    derived = ops.prepack(p.packed.values, p.packed.crow_indices)
    for epilogue in ((None, "none", None, None), (p.bias, "gelu", p.residual, 0.02)):
        torch.library.opcheck(sparse.bsr_linear_int8.default, (p.x, *p.bsr, derived, 40, *epilogue))


def test_gradients_are_refused_in_words():
    p = Problem(4, 64, 64, 32, 32, 0.5)
    x = p.x.clone().requires_grad_()
    with pytest.raises(
        sp.SparsePruneError, match="expected a floating-point weight, got a quantized weight; train before"
    ):
        sp.bsr_linear(x, p.packed).sum().backward()
    with pytest.raises(RuntimeError, match="floating point"):
        p.packed.values.requires_grad_()


def _bad_calls():
    torch.manual_seed(0)
    p = Problem(4, 64, 96, 32, 32, 0.5)
    crow, col, values, scales = p.bsr
    low = values.clone()
    low[0, 0, 0] = -128
    good = dict(
        x=p.x, crow=crow, col=col, values=values, scales=scales, packed=None, bias=p.bias, residual=p.residual, s=None
    )
    cases = {
        "x: expected dtype float32, bfloat16 or float16 beside int8 values, got Double": dict(x=p.x.double()),
        "x: expected a matrix": dict(x=p.x[0]),
        "values: expected dtype int8, got Float": dict(values=values.float()),
        "values: expected int8 from -127 to 127, got -128": dict(values=low),
        "col_indices: expected entries in": dict(col=col + 3),
        "crow_indices: expected entries that rise": dict(crow=crow * 2),
        r"scales: expected shape \[64\], got \[63\]": dict(scales=scales[1:]),
        "scales: expected dtype float32, got Double": dict(scales=scales.double()),
        r"prepacked: expected shape \[\d+\], got \[7\]": dict(packed=values.new_zeros(7)),
        "bias: expected dtype Float like x, got BFloat16": dict(bias=p.bias.bfloat16()),
        r"residual: expected shape \[4, 64\], got \[3, 64\]": dict(residual=p.residual[1:]),
        "x_scale: expected a finite positive number, got 0": dict(s=0.0),
        "x_scale: expected a finite positive number, got -1": dict(s=-1.0),
        "x_scale: expected a finite positive number, got inf": dict(s=float("inf")),
    }
    return [pytest.param(message, {**good, **change}, id=message) for message, change in cases.items()]


@needs_kernels
@pytest.mark.parametrize(("message", "a"), _bad_calls())
def test_bad_calls_name_argument_expected_and_got(message, a):
    with pytest.raises(RuntimeError, match=message):
        sparse.bsr_linear_int8(
            a["x"],
            a["crow"],
            a["col"],
            a["values"],
            a["scales"],
            a["packed"],
            64,
            a["bias"],
            "none",
            a["residual"],
            a["s"],
        )


@needs_kernels
def test_prepacking_checks_its_index():
    p = Problem(4, 64, 96, 32, 32, 0.5)
    crow, _, values, _ = p.bsr
    for bad, message in (
        (crow * 2, "rise from 0"),
        (crow.long(), "dtype int32"),
        (crow[:0], "at least one entry"),
        (crow - 1, "rise"),
    ):
        with pytest.raises(RuntimeError, match=f"crow_indices: expected .*{message}"):
            sparse.cpu_prepack_int8(values, bad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.zeros(4, 95)), "x: expected a last dimension of 96"),
        (
            dict(x=torch.zeros(4, 96, dtype=torch.float64)),
            "x: expected float32, bfloat16 or float16 beside a quantized weight",
        ),
        (
            dict(bias=torch.zeros(64, dtype=torch.bfloat16)),
            "bias: expected dtype torch.float32 like x, got torch.bfloat16",
        ),
        (dict(x_scale=0.0), "x_scale: expected a finite positive number, got 0.0"),
        (dict(x_scale=float("nan")), "x_scale: expected a finite positive number, got nan"),
    ],
)
def test_public_call_names_the_argument(change, message):
    p = Problem(4, 64, 96, 32, 32, 0.5)
    with pytest.raises(sp.SparsePruneError, match=message):
        sp.bsr_linear(**{"x": p.x, "packed": p.packed} | change)
    with pytest.raises(sp.SparsePruneError, match="x_scale: expected None beside a weight of torch.float32, got 0.1"):
        sp.bsr_linear(p.x, p.packed.dequantize(), x_scale=0.1)


def harness_linear(library, p, dtype, activation="none", into=None, pair=0, tiles=1):
    """The product by AMX, or with tiles = 0 by AVX512-BF16; into: y, which is the residual too; pair: of csrc/cpu/kernels.h."""
    m, n, (k, (r, c)) = len(p.x), p.n, (p.packed.shape[1], p.packed.blocksize)
    derived = sparse.cpu_prepack_int8(p.packed.values, p.packed.crow_indices)
    ldx = ((-(-k // c) * c + 3 + 63) // 64 | 1) * 64
    q = torch.zeros(m, ldx, dtype=torch.uint8)
    x_scales = torch.empty(m)
    offsets = -(-(p.packed.nnzb * r * (-(-c // 4) * 4) + 128) // 64) * 64
    got = torch.full((m, n), torch.nan, dtype=dtype) if into is None else into
    residual = p.residual if into is None else into
    crow, col, x, w, w_scales, rounded, scales, bias, res, y = (
        ctypes.c_void_p(None if t is None else t.data_ptr())
        for t in (*p.bsr[:2], p.x, derived, p.packed.scales, q, x_scales, p.bias, residual, got)
    )
    sizes = [ctypes.c_int64(v) for v in (m, n, k, r, c, p.x.stride(0), ldx, offsets)]
    number = ACTIVATIONS.index(activation)
    numbers = tiles, DTYPES.index(dtype)
    library.int8_linear(*numbers, *sizes, crow, col, x, w, w_scales, rounded, scales, bias, number, res, y, pair)
    return got


@needs_vnni
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "problem",
    [
        *PROBLEMS,
        (4, 64, 64, 32, 32, 0.5),
        (16, 64, 128, 32, 64, 0.7),
        (31, 96, 128, 48, 32, 0.7),
        (65, 96, 100, 96, 20, 0.5),
        (70, 50, 80, 16, 16, 0.6),
        (140, 96, 128, 16, 32, 0.5),
    ],
    ids=str,
)
def test_native_amx_matches_float64(harness, problem, dtype):
    p = Problem(*problem, dtype)
    for activation in ACTIVATIONS:
        assert_exact(harness_linear(harness["native"], p, dtype, activation), p.exact(activation), dtype, activation)
    up = Problem(*problem, dtype)
    up.x = p.x.copy_(torch.randn(p.x.shape))
    up.residual.zero_()
    second = harness_linear(harness["native"], up, dtype, pair=1)
    first, size = p.exact("silu", None, True, False)
    expected, factor = (first * second.double(), size * second.double().abs()), second.double().abs()
    assert_exact(harness_linear(harness["native"], p, dtype, "silu", second, 2), expected, dtype, "silu", factor)
