"""Quantized weights: rounding, layers, whole models, files, and Hugging Face's loading. int8 products: test_int8_kernels.py."""

from __future__ import annotations

import copy
import dataclasses
import io
import json

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import sparse_prune as sp
from sparse_prune import backends, bsr, ops, reference, serialization
from sparse_prune.masks import expand_mask, grid_shape

E4M3 = torch.float8_e4m3fn
SCHEMES = {"int8": {}, "w8a16": {"weight_only": True}, "e4m3": {"dtype": E4M3}}  # arguments of quantize_
schemes = pytest.mark.parametrize("scheme", SCHEMES)


def packed_weight(shape=(48, 70), blocksize=(16, 32), dtype=torch.float32, density=0.5):
    mask = torch.rand(grid_shape(shape, blocksize)) < density
    return sp.BsrWeight.from_dense(torch.randn(shape, dtype=dtype), mask, blocksize)


@given(
    st.tuples(st.integers(1, 50), st.integers(1, 50)),
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.sampled_from([0.0, 1e-38, 1e-4, 1.0, 1e4]),
    st.integers(0, 2**31),
)
def test_each_weight_moves_by_at_most_half_its_scale(shape, blocksize, dtype, density, size, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(grid_shape(shape, blocksize), generator=generator) < density
    weight = (torch.randn(shape, generator=generator, dtype=torch.float64) * size).to(dtype)
    packed = sp.BsrWeight.from_dense(weight, mask, blocksize)
    quantized = packed.quantize().validate()
    assert quantized.values.dtype == torch.int8 and quantized.scales.dtype == torch.float32
    dense, exact = quantized.to_dense(), packed.to_dense().double()
    assert dense.dtype == torch.float32 and torch.equal(quantized.block_mask(), mask)
    limit = quantized.scales.double() * (0.5 + 1e-4)  # and the rounding of weight / scale itself
    assert ((dense.double() - exact).abs() <= limit[:, None]).all()
    assert not dense[~expand_mask(mask, blocksize, shape)].any()
    empty = exact.abs().amax(1) == 0
    assert (quantized.scales[empty] == 1).all()
    largest = (exact.abs().amax(1) > 1e-35) & ~empty
    rows = (dense / quantized.scales[:, None]).abs().amax(1)
    assert (rows[largest].round() == 127).all(), "the largest weight of a row is +-127"
    again = quantized.dequantize()
    assert torch.equal(again.to_dense(), dense) and again.scales is None


@given(
    st.integers(1, 40), st.sampled_from([torch.float32, torch.float64]), st.floats(1e-20, 1e20), st.integers(0, 2**31)
)
def test_e4m3_moves_a_weight_by_a_sixteenth_of_it_at_most(k, dtype, size, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn((9, k), generator=generator, dtype=torch.float64) * 10 ** torch.linspace(-6, 0, k) * size
    packed = sp.BsrWeight.from_dense(weight.to(dtype), torch.ones(3, -(-k // 4), dtype=torch.bool), (3, 4))
    quantized = packed.quantize(E4M3).validate()
    assert quantized.values.dtype == E4M3 and quantized.scales.dtype == torch.float32
    exact, scales = packed.to_dense().double(), quantized.scales.double()[:, None]
    error = (quantized.to_dense().double() - exact).abs()
    assert (error <= (1 + 1e-5) * torch.maximum(exact.abs() / 16, scales / 1024)).all()
    assert ((quantized.to_dense() / quantized.scales[:, None]).abs().amax(1).round() == 448).all()
    assert torch.equal(quantized.dequantize().to_dense(), quantized.to_dense())


def test_e4m3_rounds_half_to_even_and_knows_its_numbers():
    """Every number that the format has, by its definition: sign, 4 bits of exponent with bias 7, 3 of mantissa; no infinity."""
    bits = torch.arange(127, dtype=torch.uint8)  # the last one is NaN
    exponent, mantissa = (bits >> 3).double(), (bits & 7).double()
    numbers = torch.where(exponent > 0, (8 + mantissa) * 2 ** (exponent - 10), mantissa * 2.0**-9)
    assert numbers.max() == 448 and torch.equal(bits.view(E4M3).double(), numbers)
    halves = (numbers[1:] + numbers[:-1]) / 2
    even = torch.where(bits[1:] % 2 == 0, numbers[1:], numbers[:-1])
    for wanted, given_ in ((numbers, numbers), (even, halves), (torch.tensor([448.0] * 2), torch.tensor([460.0, 1e9]))):
        assert torch.equal(bsr.round_to(given_, E4M3).double(), wanted.double())
        assert torch.equal(bsr.round_to(-given_, E4M3).double(), -wanted.double())


def test_rounds_half_to_even():
    weight = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, 126.5]])
    packed = sp.BsrWeight.from_dense(weight, torch.ones(1, 1, dtype=torch.bool), (1, 8)).quantize()
    assert packed.scales.tolist() == [1.0]
    assert packed.values.flatten().tolist() == [127, 0, 2, 2, 0, -2, -126, 126]


def test_a_scale_per_output_over_all_its_blocks():
    weight = torch.tensor([[1.0, 0, 0, 2.0], [-8.0, 0, 0, 4.0], [0, 0, 0, 0]])
    packed = sp.BsrWeight.from_dense(weight, torch.ones(2, 2, dtype=torch.bool), (2, 2)).quantize()
    torch.testing.assert_close(packed.scales, torch.tensor([2 / 127, 8 / 127, 1.0]))
    assert packed.nbytes == packed.values.numel() + 3 * 4 + (3 + 4) * 4


def test_quantizing_twice_and_what_is_not_finite():
    packed = packed_weight()
    with pytest.raises(sp.SparsePruneError, match="values: expected floating-point values, got int8"):
        packed.quantize().quantize()
    packed.values[0, 0, 0] = torch.nan
    with pytest.raises(sp.SparsePruneError, match="values: expected finite numbers"):
        packed.quantize()


def test_what_does_not_go_together():
    packed = packed_weight()
    with pytest.raises(sp.SparsePruneError, match="dtype: expected torch.int8 or torch.float8_e4m3fn, got torch.int4"):
        packed.quantize(torch.int4)
    with pytest.raises(sp.SparsePruneError, match="weight_only: expected False beside float8_e4m3fn, got True"):
        packed.quantize(E4M3, weight_only=True)
    layer, x = make_layer(), torch.zeros(2, 64)
    with pytest.raises(
        sp.SparsePruneError, match="weight_only: expected False but beside int8 values, got torch.float32"
    ):
        layer.weight_only = True
    with pytest.raises(sp.SparsePruneError, match="weight_only: expected int8 values, got torch.float32"):
        sp.bsr_linear(x, dataclasses.replace(layer.packed, weight_only=True))
    with pytest.raises(sp.SparsePruneError, match="x_scale: expected None beside a weight_only weight, got 0.5"):
        sp.bsr_linear(x, layer.packed.quantize(weight_only=True), x_scale=0.5)
    for backend, reason in (("cuda", "."), ("dense", "beside a quantized weight")):
        with pytest.raises(sp.SparsePruneError, match=reason):
            sp.bsr_linear(x, layer.packed.quantize(weight_only=True), backend=backend)


@schemes
def test_to_moves_and_never_casts(scheme):
    quantized = packed_weight().quantize(**SCHEMES[scheme])
    for cast in (quantized.to(torch.bfloat16), quantized.to("cpu", torch.float16)):
        assert cast.values.dtype == quantized.values.dtype and cast.scales.dtype == torch.float32
        assert cast.weight_only == (scheme == "w8a16")
        assert torch.equal(cast.to_dense(), quantized.to_dense())


def test_torch_and_scipy_get_the_scaled_weight():
    quantized = packed_weight((48, 64)).quantize()
    assert torch.equal(quantized.to_torch().to_dense(), quantized.to_dense())
    scipy = pytest.importorskip("scipy")  # noqa: F841
    assert torch.equal(torch.from_numpy(quantized.to_scipy().toarray()), quantized.to_dense())


def _low(p):
    values = p.values.clone()
    values[0, 0, 0] = -128
    return {"values": values}


def _first_scale(value):
    return lambda p: {"scales": torch.cat([torch.tensor([value]), p.scales[1:]])}


BROKEN = {
    "scales missing": (lambda p: {"scales": None}, r"scales: expected float32 \[48\] beside int8 values, got none"),
    "scales of another dtype": (lambda p: {"scales": p.scales.double()}, "scales: expected float32, got torch.float64"),
    "scales too few": (
        lambda p: {"scales": p.scales[1:]},
        r"scales: expected shape \[48\], one per output, got \(47,\)",
    ),
    "scales not a vector": (lambda p: {"scales": p.scales[:, None]}, r"scales: expected shape \[48\]"),
    "scale of 0": (_first_scale(0.0), "scales: expected finite positive numbers"),
    "scale below 0": (_first_scale(-1.0), "scales: expected finite positive numbers"),
    "scale NaN": (_first_scale(torch.nan), "scales: expected finite positive numbers"),
    "scale infinite": (_first_scale(torch.inf), "scales: expected finite positive numbers"),
    "a value of -128": (_low, "values: expected int8 from -127 to 127, got -128"),
    "scales beside floats": (
        lambda p: {"values": p.values.float()},
        "scales: expected none beside torch.float32 values",
    ),
    "values of another integer": (lambda p: {"values": p.values.int()}, "values: expected float32, .*, int8 or float8"),
    "e4m3 weight only": (
        lambda p: {"values": p.values.to(E4M3), "weight_only": True},
        "weight_only: expected False but beside int8 values, got torch.float8_e4m3fn",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_validate_names_the_violation(case):
    change, message = BROKEN[case]
    quantized = packed_weight(density=2).quantize()
    with pytest.raises(sp.SparsePruneError, match=message):
        dataclasses.replace(quantized, **change(quantized)).validate()


NAMES = {"int8": "int8", "w8a16": "int8, weight_only", "e4m3": "float8_e4m3fn"}  # in repr


def make_layer(n=96, k=64, bias=True):
    mask = torch.rand(n // 32, k // 32) < 0.5
    mask[0, 0] = True
    return sp.SparseLinear.from_dense(nn.Linear(k, n, bias=bias), mask, (32, 32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@schemes
def test_layer_is_the_quantized_product_and_survives_casts(scheme, bias, dtype):
    layer = make_layer(bias=bias).eval()
    x = torch.randn(2, 5, 64)
    before = layer(x)
    assert layer.quantize_(**SCHEMES[scheme]) is layer and not layer.values.requires_grad
    scales, values = layer.scales.clone(), layer.values.float().clone()
    layer.to(dtype).half().to(dtype)
    assert layer.values.dtype == SCHEMES[scheme].get("dtype", torch.int8) and torch.equal(layer.values.float(), values)
    assert torch.equal(layer.scales, scales) and layer.scales.dtype == torch.float32
    assert not layer.values.requires_grad
    y = layer(x.to(dtype))
    weight_bias = None if layer.bias is None else layer.bias.detach()
    assert torch.equal(y, sp.bsr_linear(x.to(dtype), layer.packed, weight_bias)) and y.dtype == dtype
    assert (y.float() - before).norm() < {"int8": 0.02, "w8a16": 0.01, "e4m3": 0.06}[scheme] * before.norm()
    if scheme == "w8a16":
        exact = F.linear(
            x.to(dtype).double(), layer.weight.double(), None if weight_bias is None else weight_bias.double()
        )
        assert (y.double() - exact).abs().max() <= 8 * torch.finfo(dtype).eps * exact.abs().max(), "x was rounded"
        layer.weight_only = False
        assert not torch.equal(layer(x.to(dtype)), y), "x is rounded now"
        layer.weight_only = True
    with_kernels = sp.backend_for("cpu", torch.int8) if scheme == "int8" else "cpu:dequantized"
    assert layer.backend_for(10) == (with_kernels if backends.cpu_isas() else "reference")
    assert repr(layer).endswith(f"bias={bias}, {NAMES[scheme]})")
    dense = layer.to_dense()
    assert dense.weight.dtype == (dtype if bias else torch.float32)
    torch.testing.assert_close(dense.weight.float(), layer.weight, rtol=1e-2, atol=1e-6)


needs_kernels = pytest.mark.skipif(not backends.cpu_isas(), reason=backends._reason or "built")
dequantized = pytest.mark.parametrize("scheme", ["w8a16", "e4m3"])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@needs_kernels
@dequantized
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("m", "shape", "blocksize"),
    [
        (0, (64, 64), (32, 32)),
        (1, (100, 75), (16, 8)),
        (5, (33, 31), (1, 1)),
        (20, (96, 64), (32, 32)),
        (67, (70, 50), (7, 5)),
        (53, (250, 75), (16, 16)),
    ],
    ids=str,
)
def test_blocks_without_kernels_of_their_own_run_by_those_for_x(monkeypatch, scheme, dtype, m, shape, blocksize):
    """By no more than twice PyTorch's error on the weight (and x) as that dtype holds them, all against float64."""
    mask = torch.rand(grid_shape(shape, blocksize)) < 0.5
    mask[len(mask) // 2] = False
    packed = sp.BsrWeight.from_dense(torch.randn(shape), mask, blocksize).quantize(**SCHEMES[scheme])
    x = torch.full((m, shape[1] + 3), torch.nan, dtype=dtype)[:, :-3].copy_(torch.randn(m, shape[1]))
    bias, residual = torch.randn(shape[0]).to(dtype), torch.randn(m, shape[0]).to(dtype)
    weight, rounded = packed.values.double(), x.double()
    if scheme == "e4m3":
        q, x_scales = reference.quantize_rows(x, None, E4M3)
        rounded = q.double() * x_scales.double()[:, None]
    weight = bsr.dense_from_bsr(packed.crow_indices, packed.col_indices, weight, shape, packed.scales.double())
    for name in ("bsr_linear_w8a8", "bsr_linear_w8a16"):
        monkeypatch.setattr(reference, name, lambda *_: pytest.fail("plain PyTorch ran"))
    for backend in ("auto", "cpu"):
        assert sp.backend_for("cpu", packed.values.dtype, backend, weight_only=packed.weight_only) == "cpu:dequantized"
    for activation, b, r in (("none", None, None), ("gelu", bias, residual)):
        exact, theirs = (
            reference.ACTIVATIONS[activation](
                F.linear(rounded.to(to), weight.to(to), None if b is None else b.to(to))
            ).double()
            + (0 if r is None else r.double())
            for to in (torch.float64, dtype)
        )
        got = sp.bsr_linear(x, packed, b, activation, r)
        assert got.dtype == dtype and got.shape == exact.shape and not got.isnan().any()
        error, allowed = (got.double() - exact).norm(), (theirs.to(dtype).double() - exact).norm()
        assert error <= 2 * max(allowed, torch.finfo(dtype).eps / 4 * exact.norm())
        assert torch.equal(sp.bsr_linear(x, packed, b, activation, r, backend="cpu"), got)


@needs_kernels
@pytest.mark.parametrize("x_scale", [None, 0.02])
def test_e4m3_rows_with_nan_and_infinity_are_nan_also_where_no_block_reads_them(x_scale):
    mask = torch.tensor([[True, False], [False, False], [True, True]])
    packed = sp.BsrWeight.from_dense(torch.randn(96, 64), mask, (32, 32)).quantize(E4M3)
    x, plain = torch.randn(9, 64), torch.zeros(64)
    x[2, 50], x[5, 1], x[7] = torch.nan, torch.inf, plain
    got = sp.bsr_linear(x, packed, torch.ones(96), "relu", x_scale=x_scale)
    bad = torch.zeros(9, dtype=torch.bool)
    bad[[2, 5]] = True
    assert got[bad].isnan().all() and not got[~bad].isnan().any() and (got[7] == 1).all()
    expected = sp.bsr_linear(x, packed, torch.ones(96), "relu", backend="reference", x_scale=x_scale)
    torch.testing.assert_close(got, expected, equal_nan=True)


@needs_kernels
@dequantized
def test_blocks_are_dequantized_once_for_a_dtype_of_x(monkeypatch, scheme):
    made, make = [], ops._dequantized_layout
    monkeypatch.setattr(ops, "_dequantized_layout", lambda packed, dtype: made.append(dtype) or make(packed, dtype))
    layer = make_layer(bias=False).quantize_(**SCHEMES[scheme]).eval()
    packed, x = layer.packed, torch.randn(4, 64)
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32):
            assert torch.equal(layer(x.to(dtype)), sp.bsr_linear(x.to(dtype), packed))
        assert made == [torch.bfloat16] * 2 + [torch.float32] * 2, "once by the layer, once by the weight"
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x.bfloat16()), layer(x.bfloat16())) and made[4:] == [torch.bfloat16]
        layer.values.requires_grad_(False)
        before = layer(x)
        layer.scales.mul_(2)
        torch.testing.assert_close(layer(x), 2 * before)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), 2 * before)
    assert made[5:] == [torch.float32] * 2


@schemes
def test_layer_state_dict_deepcopy_and_pickle(scheme):
    layer = make_layer().quantize_(**SCHEMES[scheme])
    x = torch.randn(4, 64)
    assert set(layer.state_dict()) == {"crow_indices", "col_indices", "values", "scales", "bias"}
    blank = {name: torch.zeros_like(tensor) for name, tensor in layer.state_dict().items()}
    other = sp.SparseLinear(64, 96, **blank, weight_only=layer.weight_only)
    other.load_state_dict(layer.state_dict())
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for twin in (other, copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(x), layer(x))


@pytest.mark.parametrize("scheme", ["int8", "e4m3"])
def test_a_static_scale_stays_with_its_layer(scheme, monkeypatch):
    layer = make_layer().quantize_(**SCHEMES[scheme]).eval()
    x = torch.randn(3, 4, 64)
    with torch.no_grad():
        dynamic = layer(x)
        layer.x_scale = 0.005
        expected = sp.bsr_linear(x, layer.packed, layer.bias, backend="reference", x_scale=0.005)
        for _ in range(3):  # the long way once, then the short one
            torch.testing.assert_close(layer(x), expected, rtol=2e-4, atol=2e-4)
        assert (layer(x) - dynamic).abs().max() > 0.05, "which saturates"
        torch.testing.assert_close(sp.bsr_linear(x, layer.packed, layer.bias), expected, rtol=2e-4, atol=2e-4)
        torch._dynamo.reset()
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
        torch._dynamo.reset()
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        for twin in (copy.deepcopy(layer), torch.load(buffer, weights_only=False), copy.deepcopy(layer).to("cpu")):
            assert twin.x_scale == 0.005 and torch.equal(twin(x), layer(x))
        assert "x_scale=0.005" in repr(layer) and layer.packed.narrow(0, 0, 32).x_scale == 0.005
        joined = sp.SparseLinear.cat([layer, layer])
        assert joined.x_scale == 0.005 and torch.equal(joined(x), torch.cat([layer(x)] * 2, -1))
        layer.x_scale = None
        assert torch.equal(layer(x), dynamic) and "x_scale" not in repr(layer)
        with pytest.raises(sp.SparsePruneError, match="weights: expected x_scale=0.005, like the first, got None"):
            sp.SparseLinear.cat([joined, layer])


def test_gate_and_up_round_x_alike_or_apart():
    gate, up = (make_layer().quantize_().eval() for _ in range(2))
    x = torch.randn(5, 64)
    with torch.no_grad():
        for scales in ((None, None), (0.01, 0.01), (0.01, 0.005), (None, 0.005)):
            gate.x_scale, up.x_scale = scales
            for _ in range(3):
                torch.testing.assert_close(sp.fused_glu(gate, up, x), F.silu(gate(x)) * up(x))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), 1e-60])
def test_a_static_scale_is_checked(value):
    layer = make_layer().quantize_()
    with pytest.raises(sp.SparsePruneError, match="x_scale: expected a finite positive number"):
        layer.x_scale = value
    for other in (make_layer(), make_layer().quantize_(weight_only=True)):
        with pytest.raises(sp.SparsePruneError, match="x_scale: expected None beside a weight"):
            other.x_scale = 0.1
    layer.x_scale = 0.1
    layer.weight_only = True
    assert layer.x_scale is None
    packed = dataclasses.replace(make_layer().quantize_().packed, x_scale=value)
    for run in (packed.validate, lambda: sp.bsr_linear(torch.zeros(1, 64), packed)):
        with pytest.raises(sp.SparsePruneError, match="x_scale: expected a finite positive number"):
            run()


@pytest.mark.parametrize("scheme", ["int8", "e4m3"])
def test_calibration_takes_the_largest_of_all_batches(model, tmp_path, scheme):
    sp.quantize_(model, **SCHEMES[scheme])
    batches = [torch.randn(7, 64) * size for size in (0.3, 2.0, 1.0)]
    with torch.no_grad(), sp.calibrate_(model):
        for batch in batches:
            model(batch)
    top = 127 if scheme == "int8" else 448
    assert model[0].x_scale == max(batch.abs().max().item() for batch in batches) / top
    assert model[2].x_scale is not None and not model[0]._forward_pre_hooks
    file = sp.save_packed(model, tmp_path / "m.safetensors")
    metadata = serialization.read_tensors(file)[1]
    assert metadata["sparse_prune"] == "4" and json.loads(metadata["layers"])["0"]["x_scale"] == model[0].x_scale
    with torch.device("meta"):
        empty = build()
    for loaded in (sp.load_packed(build(), file), sp.load_packed(empty, file)):
        assert loaded[0].x_scale == model[0].x_scale and torch.equal(loaded(batches[0]), model(batches[0]))


def test_calibration_that_cannot_be_says_why(model):
    with (
        pytest.raises(sp.SparsePruneError, match="model: expected a layer that rounds its input"),
        sp.calibrate_(model),
    ):
        pass
    sp.quantize_(model)
    with torch.no_grad():
        with sp.calibrate_(model):
            model[0](torch.zeros(2, 64))
        assert model[0].x_scale is None and model[2].x_scale is None, "of zeros, and of a layer that did not run"
        with pytest.raises(sp.SparsePruneError, match="x of 0: expected finite numbers, got inf"), sp.calibrate_(model):
            model[0](torch.full((2, 64), torch.inf))
    assert not model[0]._forward_pre_hooks


@schemes
def test_layer_follows_writes(scheme):
    layer = make_layer(bias=False).quantize_(**SCHEMES[scheme])
    x = torch.randn(4, 64)
    with torch.no_grad():
        before = layer(x)
        layer.values.copy_(-layer.values.float())  # of float8 PyTorch has no neg_
        torch.testing.assert_close(layer(x), -before)
        layer.scales.mul_(2)
        torch.testing.assert_close(layer(x), -2 * before)


@schemes
def test_layer_under_autocast_compile_and_inference_mode(scheme):
    layer = make_layer().quantize_(**SCHEMES[scheme]).eval()
    x = torch.randn(4, 64)
    with torch.no_grad():
        expected = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16 and layer.values.dtype == SCHEMES[scheme].get("dtype", torch.int8)
        torch.testing.assert_close(y.float(), expected, atol=0.03, rtol=0.03)
        compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
        for batch in (4, 7):
            z = torch.randn(batch, 64)
            assert torch.equal(compiled(z), layer(z))
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)
    assert torch.equal(sp.fused_linear(layer, x, "gelu"), layer(x, "gelu"))


@schemes
def test_layer_gives_no_gradient_and_names_bad_input(scheme):
    layer = make_layer().quantize_(**SCHEMES[scheme])
    with pytest.raises(sp.SparsePruneError, match="train before quantizing"):
        layer(torch.randn(2, 64)).sum().backward()
    for x, message in (
        (torch.zeros(4, 63), "x: expected a last dimension of 64"),
        (torch.zeros(4, 64, dtype=torch.float64), "x: expected float32, bfloat16 or float16 beside a quantized weight"),
        (torch.zeros(4, 64, dtype=torch.bfloat16), "bias: expected dtype torch.bfloat16 like x, got torch.float32"),
    ):
        with pytest.raises(sp.SparsePruneError, match=message):
            layer(x)


def build():
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 45), nn.LayerNorm(45), nn.Linear(45, 3)).eval()


@pytest.fixture
def model():
    model = build()
    sp.sparsify_(model, sp.BlockSparseConfig(blocksize=(16, 32), density=0.5), filter_fn=lambda name, _: name != "4")
    return model


def test_a_whole_model_and_its_table(model):
    x = torch.randn(20, 64)
    before, bytes_before = model(x), model[0].packed.nbytes
    result = sp.quantize_(model, filter_fn=lambda name, layer: name == "0")
    assert result.converted == ["0"] and isinstance(model[4], nn.Linear)
    assert model[0].values.dtype == torch.int8 and model[2].values.dtype == torch.float32
    first, second = result.layers
    assert (first.bytes_before, first.bytes) == (bytes_before, model[0].packed.nbytes)
    assert 0 < first.error < 0.01 and second.reason == "left out by filter_fn"
    assert sp.quantize_(model).layers[0].reason == "it is int8 already"
    table = str(result)
    assert "1 of 2 sparse layers are int8" in table and f"{bytes_before} -> {first.bytes}" in table
    assert (model(x) - before).norm() < 0.05 * before.norm()
    with pytest.raises(sp.SparsePruneError, match="model: expected at least one SparseLinear, got Linear"):
        sp.quantize_(nn.Linear(3, 3))


@pytest.mark.parametrize("target", ["m.safetensors", "directory"])
@schemes
def test_file_round_trip_and_versions(model, tmp_path, target, scheme):
    x = torch.randn(5, 64)
    old = sp.save_packed(model, tmp_path / "old.safetensors")
    sp.quantize_(model, lambda name, _: name == "0", **SCHEMES[scheme])
    dtype = model[0].values.dtype
    file = sp.save_packed(model, tmp_path / target)
    metadata = serialization.read_tensors(file)[1]
    version = "2" if scheme == "int8" else "3"
    assert metadata["sparse_prune"] == version and serialization.read_tensors(old)[1]["sparse_prune"] == "1"
    layers = json.loads(metadata["layers"])
    assert layers["0"]["dtype"] == ("float8_e4m3fn" if scheme == "e4m3" else "int8") and "dtype" not in layers["2"]
    assert layers["0"].get("weight_only", False) == (scheme == "w8a16") and "weight_only" not in layers["2"]
    (row, _), found = (info := serialization.describe_file(file))["layers"], info["version"]
    assert (row["dtype"], found) == (layers["0"]["dtype"], version)
    with torch.device("meta"):
        empty = build()
    assert torch.equal(sp.load_packed(empty, file)(x), model(x)), "as views of the mapped file"
    loaded = sp.load_packed(build(), file)
    assert torch.equal(loaded(x), model(x)) and loaded[0].scales.dtype == torch.float32
    assert loaded[0].weight_only == (scheme == "w8a16")
    assert torch.equal(sp.load_packed(loaded, file)(x), model(x)), "into a model that is quantized already"
    assert sp.load_packed(loaded, old)[0].values.dtype == torch.float32, "and back"
    half = sp.load_packed(build().bfloat16(), file)
    assert half[0].values.dtype == dtype and half[0].bias.dtype == half[2].values.dtype == torch.bfloat16
    assert torch.equal(half[0].scales, model[0].scales)
    assert file.stat().st_size < old.stat().st_size


def _set(name, change):
    return lambda tensors: tensors | {name: change(tensors[name])}


BROKEN_FILES = {
    "scales missing": (
        lambda t: {k: v for k, v in t.items() if k != "0.scales"},
        "0.scales: expected a tensor, got none",
    ),
    "scales too few": (_set("0.scales", lambda t: t[1:].clone()), r"0.scales: expected shape \[96\]"),
    "scales of another dtype": (_set("0.scales", lambda t: t.bfloat16()), "0.scales: expected float32"),
    "a scale of 0": (_set("0.scales", lambda t: t * 0), "0.scales: expected finite positive numbers"),
    "NaN scales": (_set("0.scales", lambda t: t * torch.nan), "0.scales: expected finite positive numbers"),
    "float values": (_set("0.values", lambda t: t.float()), "0.scales: expected none beside torch.float32 values"),
    "value -128": (_set("0.values", lambda t: torch.full_like(t, -128)), "0.values: expected int8 from -127"),
    "stray scales": (lambda t: t | {"2.scales": torch.ones(45)}, "2.scales: expected no such tensor"),
    "e4m3 where int8 is described": (
        _set("0.values", lambda t: t.to(E4M3)),
        "0.values: expected dtype torch.int8, as the file says, got",
    ),
    "int8 where floats are described": (_set("2.values", lambda t: t.to(torch.int8)), "2.scales: expected float32"),
}


@pytest.mark.parametrize("case", BROKEN_FILES)
def test_broken_files_never_reach_the_model(model, tmp_path, case):
    change, message = BROKEN_FILES[case]
    sp.quantize_(model, filter_fn=lambda name, _: name == "0")
    file = sp.save_packed(model, tmp_path / "m.safetensors")
    tensors, metadata = serialization.read_tensors(file)
    safetensors.torch.save_file(change(tensors), file, metadata)
    target = build()
    with pytest.raises(sp.SparsePruneError, match=message):
        sp.load_packed(target, file)
    assert isinstance(target[0], nn.Linear)


def test_unknown_dtype_in_the_metadata(model, tmp_path):
    file = sp.save_packed(model, tmp_path / "m.safetensors")
    tensors, metadata = serialization.read_tensors(file)
    metadata["layers"] = metadata["layers"].replace('"nnzb"', '"dtype": "int4", "nnzb"', 1)
    safetensors.torch.save_file(tensors, file, metadata)
    with pytest.raises(sp.SparsePruneError, match="dtype 'int4' is not known"):
        sp.load_packed(build(), file)
    for wrong, message in (
        ('"weight_only": true', "True beside dtype None"),
        ('"dtype": "int8", "weight_only": 1', "is 1 beside"),
    ):
        again = {**metadata, "layers": metadata["layers"].replace('"dtype": "int4"', wrong, 1)}
        safetensors.torch.save_file(tensors, file, again)
        with pytest.raises(sp.SparsePruneError, match=f"weight_only is {message}".replace("is is", "is")):
            sp.load_packed(build(), file)


def test_e4m3_that_is_not_a_number_never_reaches_the_model(model, tmp_path):
    sp.quantize_(model, dtype=E4M3)
    for bits in (0x7F, 0xFF):
        file = sp.save_packed(model, tmp_path / "m.safetensors")
        tensors, metadata = serialization.read_tensors(file)
        tensors["2.values"].view(torch.uint8)[0, 3, 5] = bits
        safetensors.torch.save_file(tensors, file, metadata)
        with pytest.raises(sp.SparsePruneError, match="2.values: expected finite numbers"):
            sp.load_packed(build(), file)


@pytest.fixture
def bert(tmp_path, request):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("sparse_prune.integrations.hf")
    config = transformers.BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, vocab_size=50, num_labels=3
    )
    model = transformers.BertForSequenceClassification(config).eval()
    sp.sparsify_(model, sp.BlockSparseConfig(blocksize=(16, 16), density=0.3), lambda name, _: "encoder" in name)
    sp.quantize_(model, **SCHEMES[getattr(request, "param", "int8")])
    sp.save_packed(model, tmp_path / "packed")
    return model, tmp_path / "packed", transformers.AutoModelForSequenceClassification.from_pretrained


IDS = torch.arange(12).view(2, 6)


@pytest.mark.parametrize("bert", SCHEMES, indirect=True)
def test_hugging_face_round_trip(bert, tmp_path):
    model, path, load = bert
    loaded = load(path).eval()
    layer = loaded.bert.encoder.layer[0].attention.self.query
    saved = model.bert.encoder.layer[0].attention.self.query
    assert layer.values.dtype == saved.values.dtype and layer.scales.dtype == torch.float32
    assert layer.weight_only == saved.weight_only
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    loaded.save_pretrained(tmp_path / "again")
    kept = ["sparse_prune", "layers"]
    old, new = (serialization.read_tensors(at / serialization.WEIGHTS_NAME)[1] for at in (path, tmp_path / "again"))
    assert [new[key] for key in kept] == [old[key] for key in kept]
    assert torch.equal(load(tmp_path / "again").eval()(IDS).logits, model(IDS).logits)


def test_hugging_face_keeps_static_scales(bert, tmp_path):
    model, _, load = bert
    with torch.no_grad(), sp.calibrate_(model):
        model(IDS)
    sp.save_packed(model, tmp_path / "static")
    loaded = load(tmp_path / "static").eval()
    name = "bert.encoder.layer.0.attention.self.query"
    assert loaded.get_submodule(name).x_scale == model.get_submodule(name).x_scale
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bert", ["int8", "e4m3"], indirect=True)
def test_hugging_face_dtype_casts_neither_values_nor_scales(bert, dtype):
    model, path, load = bert
    name = "bert.encoder.layer.1.output.dense"
    for loaded in (load(path, dtype=dtype), load(path).to(dtype)):
        layer = loaded.eval().get_submodule(name)
        assert layer.values.dtype == model.get_submodule(name).values.dtype and layer.bias.dtype == dtype
        assert torch.equal(layer.scales, model.get_submodule(name).scales) and layer.scales.dtype == torch.float32
        torch.testing.assert_close(loaded(IDS).logits.float(), model(IDS).logits, atol=0.05, rtol=0.05)
    dense = load(path).dequantize()
    torch.testing.assert_close(
        dense.get_submodule(name).weight.float(), model.get_submodule(name).weight, atol=1e-6, rtol=1e-2
    )


def test_hugging_face_refuses_wrong_scales(bert):
    _, path, load = bert
    file = path / serialization.WEIGHTS_NAME
    tensors, metadata = serialization.read_tensors(file)
    name = "bert.encoder.layer.0.output.dense.scales"
    safetensors.torch.save_file(tensors | {name: -tensors[name]}, file, metadata)
    with pytest.raises(sp.SparsePruneError, match="scales: expected finite positive numbers"):
        load(path)


def test_accuracy_of_a_layer_beside_the_float_one():
    layer = make_layer(384, 64, bias=True).eval()
    x = torch.randn(200, 64)
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    error = (layer.quantize_()(x).double() - exact).norm() / exact.norm()
    assert error < 0.015


def test_a_fused_encoder_runs_the_same_int8_products(bert):
    model = bert[0]
    with torch.no_grad():
        fused = model(IDS).logits
        queries = model.bert.encoder.layer[0].attention.self.query
        queries.scales.mul_(1.5)
        changed = model(IDS).logits
        queries.scales.div_(1.5)
        sp.unfuse_encoder_(model)
        torch.testing.assert_close(fused, model(IDS).logits, atol=2e-2, rtol=0)
    assert not torch.equal(changed, fused), "scales that were written to count"


def test_joining_int8_weights():
    weights = [packed_weight((48, 70), density=d) for d in (0.5, 0.3)]
    for how in SCHEMES.values():
        first, second = (weight.quantize(**how) for weight in weights)
        joined = sp.BsrWeight.cat([first, second]).validate()
        assert torch.equal(joined.to_dense(), torch.cat([first.to_dense(), second.to_dense()]))
        assert joined.weight_only == first.weight_only
    first, second = (weight.quantize() for weight in weights)
    with pytest.raises(sp.SparsePruneError, match="weights: expected weight_only=False, like the first, got True"):
        sp.BsrWeight.cat([first, dataclasses.replace(second, weight_only=True)])
    with pytest.raises(sp.SparsePruneError, match="weights: expected values of torch.int8, like the first"):
        sp.BsrWeight.cat([first, first.dequantize()])
