"""The Triton kernels against float64: on the GPU where there is one, else in Triton's interpreter.

The interpreter has to be chosen before Triton is imported, so test_triton_kernels.py runs this file in a process of its own.
"""

from __future__ import annotations

import functools
import gc
import os

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not installed")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU and TRITON_INTERPRET is not 1: test_triton_kernels.py runs this file", allow_module_level=True)

from sparse_prune_kernels import launch, plan, support
from sparse_prune_kernels.config import LinearConfig
from triton_problems import (
    ACTIVATIONS,
    DTYPES,
    PROBLEMS,
    SIDES,
    arrays,
    assert_as_good_as_torch,
    exact_and_dense,
    exact_and_reference_int8,
    make_problem,
)

import sparse_prune as sp
from sparse_prune import reference

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
make = functools.partial(make_problem, device=DEVICE)


def check_linear(packed, x, bias, residual, activation, config=None):
    exact, dense = exact_and_dense(x, packed.to_dense(), bias, activation, residual)
    got = launch.bsr_linear(x, *arrays(packed), packed.shape[0], bias, activation, residual, config)
    assert_as_good_as_torch(got, exact, dense)


def check_gradients(packed, x, dy):
    n, k = packed.shape
    weight = packed.to_dense()
    got = launch.bsr_linear_dx(dy, *arrays(packed), k)
    assert_as_good_as_torch(got, dy.double() @ weight.double(), dy @ weight)
    crow, col, values = arrays(packed)
    got = launch.bsr_sdd(dy, x, crow, col, *values.shape[1:])
    exact, dense = (
        reference.bsr_sdd(a, b, crow, col, *values.shape[1:]) for a, b in ((dy.double(), x.double()), (dy, x))
    )
    assert_as_good_as_torch(got, exact, dense)


def test_the_expected_kernels_run():
    assert (DEVICE == "cpu") is launch.INTERPRETED


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_forward_and_gradients(problem, dtype):
    packed, x, bias, residual = make(*problem, dtype)
    check_linear(packed, x, bias, residual, "gelu")
    check_linear(packed, x, None, None, "none")
    check_gradients(packed, x, residual)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "problem", [(0, 64, 64, 32, 32, 0.5), (7, 45, 600, 16, 32, 0.7), (130, 128, 96, 16, 16, 0.2)], ids=str
)
def test_gate_times_up(problem, dtype):
    """Split inputs too; blocks of up may have another size."""
    gate, x, gate_bias, _ = make(*problem, dtype)
    up, _, up_bias, _ = make(*problem[:3], 32, 16, 0.6, dtype)
    for activation, biases in (("silu", (gate_bias, up_bias)), ("gelu", (None, up_bias)), ("none", (None, None))):
        got = launch.bsr_linear_glu(x, arrays(gate), arrays(up), problem[1], *biases, activation)
        sides = [
            exact_and_dense(x, weight.to_dense(), bias, act, None)
            for weight, bias, act in zip((gate, up), biases, (activation, "none"), strict=True)
        ]
        exact, dense = (g * u for g, u in zip(*sides, strict=True))
        assert_as_good_as_torch(got, exact, dense)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogues(activation, dtype):
    packed, x, bias, residual = make(7, 45, 70, 16, 32, 0.5, dtype)
    for b, r in ((bias, residual), (bias, None), (None, residual), (None, None)):
        check_linear(packed, x, b, r, activation)
    check_linear(packed, 100 * x, bias, residual, activation)  # where exponentials overflow


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_x_of_any_stride(dtype):
    packed, x, bias, residual = make(24, 45, 70, 16, 32, 0.5, dtype)
    nan = torch.full_like(x, torch.nan)
    wide = torch.cat([nan[:, :3], x, nan], 1)[:, 3:73]  # misaligned rows with NaN on both sides
    for view in (wide, x.t().contiguous().t(), x[:1].expand(24, 70)):
        check_linear(packed, view, bias, residual, "silu")
        check_gradients(packed, view, residual)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_is_not_hidden(activation):
    packed, x, bias, _ = make(20, 64, 64, 32, 32, 1.0, torch.float32)
    x[3, 5] = torch.nan
    y = launch.bsr_linear(x, *arrays(packed), 64, bias, activation)
    assert y[3].isnan().all() and not y[4:].isnan().any() and not y[:3].isnan().any()


def test_registered_operators_run_the_kernels(monkeypatch):
    """What the CUDA dispatch key gets, called with the operators' own arguments; None of the fallbacks may run."""
    implementations = {}

    class Library:
        def impl(self, name, function, key):
            implementations[name] = function

    monkeypatch.setattr(support, "unavailable", lambda device, dtype, blocksize: None)
    support.register(Library(), {})
    packed, x, bias, residual = make(7, 45, 70, 16, 32, 0.5, torch.float32)
    crow, col, values = arrays(packed)
    y = implementations["bsr_linear"](x, crow, col, values, None, 45, bias, "relu", residual)
    weight = packed.to_dense()
    torch.testing.assert_close(y, F.relu(F.linear(x, weight, bias)) + residual)
    for name, how in (("int8", {}), ("e4m3", {"dtype": E4M3}), ("w8a16", {"weight_only": True})):
        if name not in SCHEMES:
            continue
        quantized, own = packed.quantize(**how), () if name == "w8a16" else (None,)
        bsr = (crow, col, quantized.values, quantized.scales)
        y = implementations[f"bsr_linear_{name}"](x, *bsr, None, 45, bias, "relu", residual, *own)
        torch.testing.assert_close(y, exact_and_reference_int8(x, quantized, bias, "relu", residual)[0].float())
    dx = implementations["bsr_linear_dx"](residual, crow, col, values, 70)
    torch.testing.assert_close(dx, residual @ weight)
    dvalues = implementations["bsr_sdd"](residual, x, crow, col, 16, 32)
    torch.testing.assert_close(dvalues, reference.bsr_sdd(residual, x, crow, col, 16, 32))


def check_quantized(packed, x, bias, residual, activation, x_scale=None, config=None):
    x_scale = None if packed.weight_only else x_scale
    exact, rounded = exact_and_reference_int8(x, packed, bias, activation, residual, x_scale)
    weight, epilogue = (*arrays(packed), packed.scales, packed.shape[0]), (bias, activation, residual)
    if packed.weight_only:
        got = launch.bsr_linear_w8a16(x, *weight, *epilogue, config)
    else:
        got = launch.bsr_linear_w8a8(x, *weight, *epilogue, x_scale, config)
    if packed.values.dtype == E4M3 and x.dtype == torch.float32 and DEVICE == "cuda":
        # Hopper's tensor cores keep some 14 bits of a sum of float8: less than float32 shows.
        assert not got.isnan().any() and (got - exact).abs().max() <= 2**-11 * exact.abs().max()
        return
    assert_as_good_as_torch(got, exact, rounded)


E4M3 = torch.float8_e4m3fn
SCHEMES = {"int8": {}, "e4m3": {"dtype": E4M3}, "w8a16": {"weight_only": True}}
if DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9):
    del SCHEMES["e4m3"]


def make_quantized(scheme, *problem_and_dtype):
    packed, *tensors = make(*problem_and_dtype)
    return packed.to(torch.float32).quantize(**SCHEMES[scheme]), *tensors


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_quantized(problem, scheme):
    pairs = ((torch.bfloat16, None), (torch.float16, 0.03))
    for dtype, x_scale in {"int8": pairs, "e4m3": pairs[1:], "w8a16": pairs[:1]}[scheme]:
        packed, x, bias, residual = make_quantized(scheme, *problem, dtype)
        check_quantized(packed, x, bias, residual, "gelu", x_scale)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_quantized_epilogues(activation, scheme):
    packed, x, bias, residual = make_quantized(scheme, 7, 45, 70, 16, 32, 0.5, torch.bfloat16)
    for b, r in ((bias, None), (None, residual), (None, None)):
        check_quantized(packed, x, b, r, activation)
    check_quantized(packed, 100 * x[:, :70].t().contiguous().t(), bias, residual, activation)  # columns that lie apart
    packed, x, bias, residual = make_quantized(scheme, 20, 45, 70, 16, 32, 0.5, torch.float32)
    check_quantized(packed, x, bias, residual, activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("x_scale", [None, 0.5])
@pytest.mark.parametrize("kind", [torch.int8, *(how["dtype"] for how in SCHEMES.values() if "dtype" in how)], ids=str)
def test_rounding_of_rows(kind, x_scale, dtype):
    """Bit for bit as the reference: halves to even, saturation, zeros, the smallest numbers, and rows that are not finite."""
    largest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    if dtype is torch.bfloat16 and DEVICE == "cpu":
        smallest *= 2**10  # the interpreter is wrong about bfloat16 below the normal numbers
    x = torch.cat(
        [
            (torch.arange(-128, 128) / 2).view(1, -1),  # halves: of the static scale these are whole quarters
            torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 63.5, 127.0, -126.5]]).repeat(1, 32),
            torch.zeros(1, 256),
            torch.randn(4, 256) * torch.tensor([[1.0], [smallest], [largest / 8], [1e-3]]),
            torch.randn(3, 256),
        ]
    ).to(DEVICE, dtype)
    for row, bad in enumerate((torch.nan, torch.inf, -torch.inf)):
        x[-1 - row, 200 + row] = bad
    for width in (256, 288):
        q = torch.full((len(x), width), 99, dtype=torch.int8, device=DEVICE).to(kind)
        scales = torch.full((len(x),), torch.nan, device=DEVICE)
        launch.round_call(x, q, scales, x_scale).run()
        expected, of_rows = reference.quantize_rows(x, x_scale, kind)
        q, expected = q.float(), expected.float()
        assert torch.equal(q[:, :256], expected) and not q[:, 256:].any()
        torch.testing.assert_close(scales, of_rows, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name != "w8a16"])
def test_quantized_rows_that_are_not_finite(scheme):
    packed, x, bias, _ = make_quantized(scheme, 20, 64, 64, 32, 32, 1.0, torch.float32)
    x[3, 5], x[8, 0] = torch.nan, torch.inf
    y = launch.bsr_linear_w8a8(x, *arrays(packed), packed.scales, 64, bias, "relu")
    bad = torch.zeros(20, dtype=torch.bool, device=DEVICE).index_fill(0, torch.tensor([3, 8], device=DEVICE), True)
    assert y[bad].isnan().all() and not y[~bad].isnan().any()


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(x=torch.zeros(7, 70, dtype=torch.float64)),
            "x: expected float16, bfloat16 or float32 beside quantized values",
        ),
        (dict(scales=torch.ones(44)), "scales: expected shape (45,), got (44,)"),
        (dict(scales=torch.ones(45, dtype=torch.float16)), "scales: expected float32, got torch.float16"),
        (dict(values=torch.zeros(3, 16, 32)), "values: expected int8 or float8_e4m3fn, got torch.float32"),
        (dict(bias=torch.zeros(45, dtype=torch.bfloat16)), "bias: expected torch.float32 like x, got torch.bfloat16"),
        (dict(values=torch.zeros(1, 16, 32, dtype=torch.int8)), "blocks, one for each of col_indices, got (1, 16, 32)"),
    ],
)
def test_quantized_arguments_that_disagree(change, message):
    packed, x, bias, _ = make_quantized("int8", 7, 45, 70, 16, 32, 1.0, torch.float32)
    crow, col, values = arrays(packed)
    arguments = dict(x=x, crow_indices=crow, col_indices=col, values=values, scales=packed.scales, out_features=45)
    change = {name: v.to(DEVICE) for name, v in change.items()}
    with pytest.raises(support.ArgumentError) as error:
        launch.bsr_linear_w8a8(**(arguments | {"bias": bias} | change))
    assert message in str(error.value)
    if "values: expected int8 or" not in message:
        with pytest.raises(support.ArgumentError) as error:
            launch.bsr_linear_w8a16(**(arguments | {"bias": bias} | change))
        assert message in str(error.value)


@pytest.mark.skipif("e4m3" not in SCHEMES, reason="this GPU has no float8_e4m3fn")
def test_float8_beside_x_as_it_is():
    packed, x, *_ = make_quantized("e4m3", 7, 45, 70, 16, 32, 1.0, torch.float32)
    with pytest.raises(support.ArgumentError, match="values: expected int8, got torch.float8_e4m3fn"):
        launch.bsr_linear_w8a16(x, *arrays(packed), packed.scales, 45)


# Every way through the kernel, whatever linear_config would choose here.
TILINGS = [
    (merge, block_m, split, swap)
    for merge, block_m, split in ((1, 16, 1), (2, 64, 1), (4, 16, 3), (8, 32, 2), (8, 256, 1), (2, 512, 1))
    for swap in (False, True)
]


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_every_tiling(tiling):
    merge, block_m, split, swap = tiling
    packed, x, bias, residual = make(37, 9 * 16 - 5, 150, 16, 32, 0.4, torch.bfloat16)
    config = LinearConfig(merge, block_m, 32, 8, split, swap, 4, 2)
    check_linear(packed, x, bias, residual, "silu", config)
    check_linear(packed, x, None, None, "none", config)
    dx = launch.bsr_linear_dx(
        residual, *arrays(packed), 150, LinearConfig(merge // 2 or 1, block_m, 16, 8, split, swap, 4, 2)
    )
    weight = packed.to_dense()
    assert_as_good_as_torch(dx, residual.double() @ weight.double(), residual @ weight)
    for scheme in {"int8", "e4m3" if swap else "w8a16"} & set(SCHEMES):
        check_quantized(packed.to(torch.float32).quantize(**SCHEMES[scheme]), x, bias, residual, "silu", None, config)


@pytest.mark.parametrize("density", [0.1, 0.6])
@pytest.mark.parametrize("merge, swap", [(1, True), (2, False), (4, True)])
def test_programs_that_stay(merge, swap, density, monkeypatch):
    """Each makes several tiles, in both directions; block-rows without blocks are among them."""
    packed, x, bias, residual = make(70, 9 * 16 - 8, 88, 16, 32, density, torch.bfloat16)
    config = LinearConfig(merge, 32, 16, 2, 1, swap, 4, 2, persistent=True)
    ran, real = [], launch.linear_calls
    monkeypatch.setattr(launch, "_device", lambda device: (90, 2))
    monkeypatch.setattr(launch, "linear_calls", lambda *a, **b: ran.extend(real(*a, **b)) or ran[-1:])
    check_linear(packed, x, bias, residual, "silu", config)
    dx = launch.bsr_linear_dx(residual, *arrays(packed), 88, config)
    weight = packed.to_dense()
    assert_as_good_as_torch(dx, residual.double() @ weight.double(), residual @ weight)
    stays = merge == 1 or launch.FENCES_LOOPS
    assert {call.kernel.fn.__name__ == "bsr_linear_persistent_kernel" for call in ran} == {stays}
    assert not stays or max(call.grid[0] for call in ran) == 4


@pytest.mark.parametrize("density", [0.0, 0.1, 0.4, 1.0])
@pytest.mark.parametrize("merge", [2, 4])
def test_skipping_what_a_block_row_lacks(merge, density):
    """Shared columns, columns of one block-row alone, tiles without either, and block-rows that are not there."""
    packed, x, bias, residual = make(37, 9 * 16 - 5, 150, 16, 32, density, torch.bfloat16)
    config = LinearConfig(merge, 32, 16, 8, 1, False, 4, 2, skip=True)
    check_linear(packed, x, bias, residual, "silu", config)
    check_quantized(packed.to(torch.float32).quantize(weight_only=True), x, bias, residual, "silu", None, config)
    weight = packed.to_dense()
    dx = launch.bsr_linear_dx(residual, *arrays(packed), 150, LinearConfig(merge, 16, 16, 8, 1, False, 4, 2, skip=True))
    assert_as_good_as_torch(dx, residual.double() @ weight.double(), residual @ weight)


@pytest.mark.parametrize("place", range(4))
def test_skipping_with_the_first_block_in_every_place(place):
    """Block 0 is the first number that means a block (-1: none); here it stands in a column that another row of its tile lacks."""
    columns = [range(5), range(1, 5), range(2, 5), (0, 4)]  # by the place in a tile that a block-row gets
    mask = torch.zeros(4, 5, dtype=torch.bool)
    for at, row in enumerate([place, *(other for other in range(4) if other != place)]):
        mask[at, list(columns[row])] = True
    assert plan.row_order(mask, 4).tolist()[0].index(0) == place
    weight, x = torch.randn(64, 160).bfloat16(), torch.randn(20, 160).bfloat16()
    packed = sp.BsrWeight.from_dense(weight.to(DEVICE), mask.to(DEVICE), (16, 32))
    check_linear(packed, x.to(DEVICE), None, None, "none", LinearConfig(4, 32, 16, 8, 1, False, 4, 2, skip=True))


@pytest.mark.parametrize("merge", [2, 4])
def test_nan_stays_with_the_block_rows_that_read_it(merge):
    packed, x, *_ = make(20, 9 * 16, 160, 16, 32, 0.4, torch.float16)
    config = LinearConfig(merge, 32, 16, 8, 1, False, 4, 2, skip=True)
    clean = launch.bsr_linear(x, *arrays(packed), 144, config=config)
    for column in range(5):
        spoilt = x.clone()
        spoilt[:, 32 * column : 32 * (column + 1)] = torch.nan
        y = launch.bsr_linear(spoilt, *arrays(packed), 144, config=config)
        reads = packed.block_mask()[:, column].repeat_interleave(16)
        assert y[:, reads].isnan().all() and torch.equal(y[:, ~reads], clean[:, ~reads])


def test_split_inputs_add_up_in_one_order():
    packed, x, *_ = make(5, 64, 640, 32, 32, 0.7, torch.float16)
    config = LinearConfig(2, 16, 32, 1, 4, True, 4, 2)
    first, second = (launch.bsr_linear(x, *arrays(packed), 64, config=config) for _ in range(2))
    assert torch.equal(first, second)


def test_plans_are_kept_until_the_index_changes(monkeypatch):
    made = []
    monkeypatch.setattr(launch, "make_plans", lambda *a: (made.append(None), plan.make_plans(*a))[1])
    packed, x, *_ = make(3, 64, 64, 32, 32, 1.0, torch.float32)
    for _ in range(2):
        launch.bsr_linear(x, *arrays(packed), 64)
    assert len(made) == 1
    launch.bsr_linear_dx(x, *arrays(packed), 64)
    assert len(made) == 2
    packed.col_indices.copy_(packed.col_indices.clone())
    launch.bsr_linear(x, *arrays(packed), 64)
    assert len(made) == 3
    kept = len(plan._made)
    del packed
    gc.collect()
    assert len(plan._made) < kept


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(bias=torch.zeros(45, dtype=torch.float64)), "bias: expected torch.float32 like x, got torch.float64"),
        (dict(bias=torch.zeros(44)), "bias: expected shape (45,), got (44,)"),
        (dict(residual=torch.zeros(7, 44)), "residual: expected shape (7, 45), got (7, 44)"),
        (dict(x=torch.zeros(7, 70, dtype=torch.float16)), "values: expected torch.float16 like x, got torch.float32"),
        (dict(x=torch.zeros(70)), "x: expected two dimensions, got (70,)"),
        (dict(x=torch.zeros(7, 32)), "col_indices: expected block-columns below 1, for K = 32, got one beyond"),
        (dict(activation="tanh"), "activation: expected one of none, relu, gelu, gelu_tanh, silu, got 'tanh'"),
        (dict(out_features=99), "crow_indices: expected 8 entries, got (4,)"),
        (dict(values=torch.zeros(1, 16, 32)), "blocks, one for each of col_indices, got (1, 16, 32)"),
        (
            dict(col_indices=torch.zeros(5, dtype=torch.int64)),
            "col_indices: expected int32, one dimension, got torch.int64",
        ),
    ],
)
def test_arguments_that_disagree(change, message):
    packed, x, bias, _ = make(7, 45, 70, 16, 32, 0.5, torch.float32)
    crow, col, values = arrays(packed)
    arguments = dict(x=x, crow_indices=crow, col_indices=col, values=values, out_features=45, bias=bias)
    change = {name: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for name, v in change.items()}
    with pytest.raises(support.ArgumentError) as error:
        launch.bsr_linear(**(arguments | change))
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["values", "crow_indices", "col_indices", "bias", "residual"])
def test_another_device(name):
    packed, x, bias, residual = make(7, 45, 70, 16, 32, 0.5, torch.float32)
    crow, col, values = arrays(packed)
    arguments = dict(
        x=x, crow_indices=crow, col_indices=col, values=values, out_features=45, bias=bias, residual=residual
    )
    with pytest.raises(support.ArgumentError, match=rf"{name}: expected {x.device} like x, got meta"):
        launch.bsr_linear(**(arguments | {name: arguments[name].to("meta")}))


@pytest.mark.parametrize("shape", [(7, 2**31), (2**31, 70)])
def test_sizes_beyond_int32(shape):
    """A view of one element, so large that its rows or columns could not be numbered."""
    packed, x, *_ = make(7, 45, 70, 16, 32, 0.5, torch.float32)
    huge = x[:1, :1].expand(shape)
    with pytest.raises(
        support.ArgumentError, match=r"expected at most 2147483136 rows or columns, got 2147483648; split"
    ):
        launch.bsr_sdd(x.new_zeros(1, 45).expand(shape[0], 45), huge, *arrays(packed)[:2], 16, 32)


def test_views_of_weights_are_copied():
    packed, x, bias, residual = make(9, 64, 96, 32, 32, 0.6, torch.float16)
    crow, col, values = arrays(packed)
    y = launch.bsr_linear(x, crow, col, values, 64, bias, "silu", residual)
    twisted = values.transpose(1, 2).contiguous().transpose(1, 2)
    spread = torch.stack([bias, bias], 1)[:, 0], residual.T.contiguous().T
    assert torch.equal(y, launch.bsr_linear(x, crow, col, twisted, 64, spread[0], "silu", spread[1]))
    assert torch.equal(
        launch.bsr_linear_dx(residual, crow, col, values, 96), launch.bsr_linear_dx(spread[1], crow, col, twisted, 96)
    )


class FakeTimer:
    """Runs each candidate and says how long it took: `fast` for the one at that place, 10 to 12 us for the others."""

    def __init__(self, place, fast):
        self.place, self.fast = place, fast

    def __call__(self, candidates):
        for run in candidates.values():
            run()
        return {n: [self.fast] * 4 if i == self.place else [10, 11, 11, 12] for i, n in enumerate(candidates)}, {}


@pytest.fixture
def tuning(tmp_path, monkeypatch):
    """gpu_tuning with a cache directory of its own; what it measured is forgotten afterwards."""
    from sparse_prune import gpu_tuning, tiles

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("SPARSE_PRUNE_TUNING", raising=False)
    yield gpu_tuning
    monkeypatch.undo()
    tiles.install()


def chosen(monkeypatch, packed, x, gradient=False):
    """The tiling that a call runs with."""
    seen = []
    with monkeypatch.context() as patch:
        real = launch.linear_calls
        patch.setattr(launch, "linear_calls", lambda *a, **b: (seen.append(a[11]), real(*a, **b))[1])
        if gradient:
            launch.bsr_linear_dx(x.new_zeros(len(x), packed.shape[0]), *arrays(packed), packed.shape[1])
        elif packed.scales is None:
            launch.bsr_linear(x, *arrays(packed), packed.shape[0])
        else:
            launch.bsr_linear_w8a8(x, *arrays(packed), packed.scales, packed.shape[0])
    return seen[0]


def test_tuned_gradients_serve_gradients_alone(tuning, monkeypatch):
    problem = {
        "dtype": "bfloat16",
        "blocksize": [16, 32],
        "M": 24,
        "K": 96,
        "N": 128,
        "density": 0.5,
        "gradient": True,
    }
    assert problem in [
        row | {"K": 96, "N": 128, "M": 24, "density": 0.5, "blocksize": [16, 32]}
        for row in tuning.problems(True, ["bfloat16"])
    ]
    near = make(20, 128, 96, 16, 32, 0.5, torch.bfloat16)[:2]
    before = [chosen(monkeypatch, *near, gradient) for gradient in (True, False)]
    (row,) = tuning.tune([problem], timer=FakeTimer(2, 5), device=DEVICE)
    tiling = LinearConfig(**row["tiling"])
    assert row["us"] == 5 and tiling != before[0] and not row["absent"]
    assert [chosen(monkeypatch, *near, gradient) for gradient in (True, False)] == [tiling, before[1]]
    assert list(tuning.gains([row])) == [("bfloat16 gradient", "16x32", {24: 2.2})]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8"])
def test_tuning_measures_and_its_tilings_run(dtype, tuning, monkeypatch):
    """The fastest tiling serves problems near the one that was measured, and no others."""
    problem = {"dtype": dtype, "blocksize": [16, 32], "M": 24, "K": 96, "N": 128, "density": 0.5}
    kind = torch.bfloat16 if dtype == "int8" else getattr(torch, dtype)
    weights = functools.partial(make_quantized, "int8") if dtype == "int8" else make
    near, far = ((weights(m, 128, 96, 16, 32, 0.5, kind))[:2] for m in (20, 90))
    before = [chosen(monkeypatch, *call) for call in (near, far)]
    (row,) = tuning.tune([problem], timer=FakeTimer(2, 5), device=DEVICE)
    assert (row["us"], row["arithmetic_us"]) == (5, 11) and not row["absent"]
    tiling = LinearConfig(**row["tiling"])
    assert tiling != before[0]
    assert [chosen(monkeypatch, *call) for call in (near, far)] == [tiling, before[1]]
    monkeypatch.setenv("SPARSE_PRUNE_TUNING", "off")
    launch.tuned.use(launch.tuned._source)
    assert chosen(monkeypatch, *near) == before[0]


def test_tuning_ignores_noise_and_what_is_wrong(tuning, monkeypatch):
    problem = {"dtype": "float16", "blocksize": [16, 16], "M": 5, "K": 96, "N": 64, "density": 0.5}
    (row,) = tuning.tune([problem], timer=FakeTimer(1, 10.5), device=DEVICE)
    assert row["us"] == row["arithmetic_us"] == 11, "a median above the arithmetic's lower quartile is noise"
    real = launch.bsr_linear

    def broken(*arguments, config):
        if config.split == 1 and config.merge == 2:
            raise RuntimeError("out of resources\nand more")
        y = real(*arguments, config=config)
        return y.zero_() if config.merge == 4 else y

    monkeypatch.setattr(launch, "bsr_linear", broken)
    (row,) = tuning.tune([problem], timer=FakeTimer(0, 10), device=DEVICE)
    told = set(row["absent"].values())
    assert "RuntimeError: out of resources" in told and any("allowed" in reason for reason in told)
    monkeypatch.setattr(launch, "bsr_linear", lambda *a, config: real(*a, config=config).zero_())
    with pytest.raises(ArithmeticError, match="the kernel errs by"):
        tuning.tune([problem], timer=FakeTimer(0, 10), device=DEVICE)


def test_tuning_goes_on_where_it_stopped(tuning, tmp_path):
    problems = [
        {"dtype": "float16", "blocksize": [16, 16], "M": m, "K": 64, "N": 64, "density": 0.5} for m in (3, 5, 9)
    ]

    def stop(phase, step, of, text):
        if step == 2:
            raise KeyboardInterrupt

    out, timer = tmp_path / "t.json", FakeTimer(1, 5)
    with pytest.raises(KeyboardInterrupt):
        tuning.tune(problems, out, report=stop, timer=timer, device=DEVICE)
    assert not out.exists()
    calls = []
    rows = tuning.tune(problems, out, timer=lambda c: (calls.append(c), timer(c))[1], device=DEVICE)
    assert len(calls) == 1 and len(rows) == 3 and [path.name for path in tmp_path.iterdir()] == ["t.json"]
    assert list(tuning.gains(rows)) == [("float16", "16x16", {3: 2.2, 5: 2.2, 9: 2.2})]


def every_product(packed, x, bias, residual):
    crow, col, values = arrays(packed)
    launch.bsr_linear(x, crow, col, values, packed.shape[0], bias, "gelu", residual)
    launch.bsr_linear_dx(residual, crow, col, values, packed.shape[1])
    launch.bsr_sdd(residual, x, crow, col, *packed.blocksize)
    quantized = (crow, col, values.char(), bias.float(), packed.shape[0], bias, "gelu", residual)
    launch.bsr_linear_w8a8(x, *quantized)
    launch.bsr_linear_w8a16(x, *quantized)


def test_nothing_waits_for_the_gpu_after_the_first_call(monkeypatch):
    """No tensor is read on the host, so that calls run ahead of the GPU and can be captured into a CUDA graph."""
    problems = [make(m, 45, 70, 16, 32, 0.5, torch.bfloat16) for m in (7, 100)]
    monkeypatch.setattr(launch.Call, "run", lambda call: None)
    read = []
    for name in (
        "cpu",
        "cuda",
        "to",
        "item",
        "tolist",
        "numpy",
        "nonzero",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
    ):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda *a, real=real, name=name, **b: (read.append(name), real(*a, **b))[1]
        )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *a: read.append("synchronize"))
    for problem in problems:
        every_product(*problem)
    assert "cpu" in read  # the index, once
    read.clear()
    for problem in problems:
        every_product(*problem)
    assert read == []


if DEVICE == "cuda":

    @pytest.mark.parametrize("m", [7, 300])
    def test_cuda_graph(m):
        """Forward and backward, captured and replayed on other numbers in the same memory."""
        packed, x, bias, residual = make(m, 96, 128, 32, 32, 0.5, torch.bfloat16)
        crow, col, values = arrays(packed)
        every_product(packed, x, bias, residual)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = launch.bsr_linear(x, crow, col, values, 96, bias, "gelu", residual)
            dx = launch.bsr_linear_dx(residual, crow, col, values, 128)
            dvalues = launch.bsr_sdd(residual, x, crow, col, 32, 32)
        for tensor in (x, bias, residual):
            tensor.normal_()
        graph.replay()
        assert torch.equal(y, launch.bsr_linear(x, crow, col, values, 96, bias, "gelu", residual))
        assert torch.equal(dx, launch.bsr_linear_dx(residual, crow, col, values, 128))
        assert torch.equal(dvalues, launch.bsr_sdd(residual, x, crow, col, 32, 32))

    def test_a_new_index_inside_a_capture_is_an_error():
        packed, x, *_ = make(7, 64, 64, 32, 32, 1.0, torch.bfloat16)
        with pytest.raises(support.ArgumentError, match="ran once before"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            launch.bsr_linear(x, *arrays(packed), 64)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("c", SIDES)
@pytest.mark.parametrize("r", SIDES)
def test_every_blocksize(r, c, dtype):
    for m in (1, 17, 65):
        packed, x, bias, residual = make(m, 2 * r + 5, 3 * c - 3, r, c, 0.6, dtype)
        check_linear(packed, x, bias, residual, "gelu_tanh")
        check_gradients(packed, x, residual)
        how = SCHEMES.get({torch.float16: "e4m3", torch.bfloat16: "w8a16"}.get(dtype, "int8"), {})
        check_quantized(packed.to(torch.float32).quantize(**how), x, bias, residual, "gelu_tanh")
