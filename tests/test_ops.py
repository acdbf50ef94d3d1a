"""bsr_linear against a float64 definition: forward, every gradient, and the promises an operator makes to torch."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

import sparse_prune as sp
from sparse_prune import ops, planner, reference
from sparse_prune.masks import expand_mask, grid_shape

ACTIVATIONS = list(ops.ACTIVATIONS)
# (M, N, K, R, C, density): M of 0 and 1, odd tails, empty block-rows, all zero, all kept, rectangular blocks both ways.
PROBLEMS = [
    (0, 64, 64, 32, 32, 0.5),
    (1, 96, 64, 32, 32, 0.5),
    (7, 45, 70, 16, 32, 0.5),
    (33, 64, 96, 64, 16, 0.3),
    (5, 31, 17, 4, 8, 0.6),
    (9, 64, 64, 32, 32, 0.0),
    (9, 64, 64, 32, 32, 1.0),
    (130, 128, 96, 16, 16, 0.2),
]


def make(m, n, k, r, c, density, dtype=torch.float32):
    mask = torch.rand(grid_shape((n, k), (r, c))) < density
    weight = torch.randn(n, k, dtype=torch.float64) * expand_mask(mask, (r, c), (n, k))
    packed = sp.BsrWeight.from_dense(weight.to(dtype), mask, (r, c))
    x, bias, residual = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype), torch.randn(m, n).to(dtype)
    return packed, x, bias, residual


def tolerance(dense64: torch.Tensor, dense: torch.Tensor, dtype: torch.dtype) -> float:
    """At most twice the error of PyTorch's dense op in the same dtype, and never less than two roundings of the largest output.

    In float64 the reference rounds as often as the kernel does, so a few more are granted.
    """
    if not dense.numel():
        return 0.0
    roundings = 16 if dtype == torch.float64 else 2
    rounding = roundings * torch.finfo(dtype).eps * dense64.abs().max().item()
    return max(2 * (dense64 - dense.double()).abs().max().item(), rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_forward_matches_float64(problem, backend, dtype):
    packed, x, bias, residual = make(*problem, dtype)
    weight = packed.to_dense()
    for activation in ACTIVATIONS:
        y = sp.bsr_linear(x, packed, bias, activation, residual, backend=backend)
        act = reference.ACTIVATIONS[activation]
        exact = act(F.linear(x.double(), weight.double(), bias.double())) + residual.double()
        dense = act(F.linear(x, weight, bias)) + residual
        assert y.dtype == dtype and y.shape == exact.shape and y.is_contiguous()
        assert not y.isnan().any()
        assert (y.double() - exact).abs().max().item() <= tolerance(exact, dense, dtype) if y.numel() else True


def test_x_of_any_shape_and_stride():
    packed, x, bias, _ = make(24, 45, 70, 16, 32, 0.5)
    expected = F.linear(x, packed.to_dense(), bias)
    for view in (x.view(2, 3, 4, 70), x.t().contiguous().t().view(24, 70), torch.cat([x, x], 1)[:, :70]):
        y = sp.bsr_linear(view, packed, bias)
        assert y.shape == (*view.shape[:-1], 45)
        torch.testing.assert_close(y.reshape(24, 45), expected)
    torch.testing.assert_close(sp.bsr_linear(x[3], packed, bias), expected[3])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("problem", [(5, 31, 17, 4, 8, 0.6), (3, 12, 16, 4, 4, 0.5), (1, 8, 8, 4, 2, 1.0)], ids=str)
def test_gradcheck(problem, activation):
    packed, x, bias, residual = make(*problem, torch.float64)
    values = packed.values.clone().requires_grad_()
    inputs = (x.requires_grad_(), values, bias.requires_grad_(), residual.requires_grad_())

    def run(x, values, bias, residual):
        arrays = (packed.crow_indices, packed.col_indices, values)
        return torch.ops.sparse_prune.bsr_linear(x, *arrays, None, bias.shape[0], bias, activation, residual)

    assert torch.autograd.gradcheck(run, inputs)
    if problem[0] == 3:
        assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_gradients_match_the_masked_dense_layer(problem, activation, dtype):
    packed, x, bias, residual = make(*problem, dtype)
    packed.values.requires_grad_()
    weight = packed.to_dense().detach()
    upstream = torch.randn(x.shape[0], bias.shape[0], dtype=dtype)
    leaves = [t.clone().requires_grad_() for t in (x, bias, residual)]
    y = sp.bsr_linear(leaves[0], packed, leaves[1], activation, leaves[2])
    ours = torch.autograd.grad(y, [*leaves, packed.values], upstream)

    def dense_grads(dtype):
        tensors = [t.detach().to(dtype).requires_grad_() for t in (x, bias, residual, weight)]
        act = reference.ACTIVATIONS[activation]
        out = act(F.linear(tensors[0], tensors[3], tensors[1])) + tensors[2]
        dx, db, dres, dw = torch.autograd.grad(out, tensors, upstream.to(dtype))
        blocks = sp.BsrWeight.from_dense(dw, packed.block_mask(), packed.blocksize).values
        return dx, db, dres, blocks

    for got, exact, dense in zip(ours, dense_grads(torch.float64), dense_grads(dtype), strict=True):
        assert got.shape == exact.shape and not got.isnan().any()
        if got.numel():
            # The derivative of the activation is taken at a rounded z: one more rounding than the forward has.
            limit = 2 * tolerance(exact, dense, dtype)
            assert (got.double() - exact).abs().max().item() <= limit


@pytest.mark.parametrize("with_epilogue", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype, with_epilogue):
    packed, x, bias, residual = make(6, 40, 48, 16, 16, 0.5, dtype)
    arrays = (packed.crow_indices, packed.col_indices)
    values = packed.values.clone().requires_grad_()
    x.requires_grad_()
    epilogue = (bias.requires_grad_(), "gelu", residual.requires_grad_()) if with_epilogue else (None, "none", None)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        torch.ops.sparse_prune.bsr_linear.default, (x, *arrays, values, None, 40, *epilogue), test_utils=tests
    )
    out = torch.bfloat16 if dtype == torch.float32 else torch.float32
    converted = [t.detach().to(out).requires_grad_() if isinstance(t, torch.Tensor) else t for t in epilogue]
    torch.library.opcheck(
        torch.ops.sparse_prune.bsr_linear.default, (x, *arrays, values, None, 40, *converted, out), test_utils=tests
    )
    dy = torch.randn(6, 40, dtype=dtype)
    with torch.no_grad():
        torch.library.opcheck(torch.ops.sparse_prune.bsr_linear_dx.default, (dy, *arrays, values.detach(), 48))
        torch.library.opcheck(torch.ops.sparse_prune.bsr_sdd.default, (dy, x.detach(), *arrays, 16, 16))


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("backend", ["auto", "dense", "reference"])
def test_gradients_through_an_out_dtype(activation, backend):
    packed, x, bias, residual = make(6, 40, 48, 16, 16, 0.5, torch.bfloat16)
    values, residual = packed.values.clone().requires_grad_(), residual.float()
    packed = dataclasses.replace(packed, values=values)
    inputs = [t.requires_grad_() for t in (x, bias, residual)]
    y = sp.bsr_linear(x, packed, bias, activation, residual, backend, out_dtype=torch.float32)
    assert y.dtype == torch.float32
    grad = torch.randn_like(y)
    got = torch.autograd.grad(y, (*inputs, values), grad)
    exact = [t.detach().double().requires_grad_() for t in (*inputs, values)]
    wide = dataclasses.replace(packed, values=exact[3])
    z = sp.bsr_linear(exact[0], wide, exact[1], activation, exact[2])
    assert (y.double() - z).abs().max() < 1e-5
    for ours, theirs, like in zip(got, torch.autograd.grad(z, exact, grad.double()), (*inputs, values), strict=True):
        assert ours.dtype == like.dtype
        assert (ours.double() - theirs).norm() <= 0.01 * theirs.norm()


def test_an_out_dtype_is_checked():
    packed, x, bias, residual = make(6, 40, 48, 16, 16, 0.5, torch.float32)
    assert sp.bsr_linear(x, packed, bias, residual=residual, out_dtype=torch.float32).dtype == torch.float32
    for out in (torch.float64, torch.int8):
        with pytest.raises(sp.SparsePruneError, match="out_dtype: expected None or torch.float32"):
            sp.bsr_linear(x, packed, out_dtype=out)
    with pytest.raises(sp.SparsePruneError, match="residual: expected dtype torch.bfloat16 like out_dtype"):
        sp.bsr_linear(x, packed, residual=residual, out_dtype=torch.bfloat16)
    with pytest.raises(sp.SparsePruneError, match="out_dtype: expected None or torch.float64"):
        sp.bsr_linear(x.double(), packed.to(torch.float64), out_dtype=torch.float32)
    assert sp.backend_for("cuda", torch.float32, converts=True) == "reference"


@pytest.mark.parametrize("name", ["int8", "e4m3", "w8a16"])
@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_quantized_products_have_an_out_dtype(name, out):
    packed, x, bias, residual = make(6, 40, 48, 16, 16, 0.5, torch.bfloat16)
    packed = packed.quantize(torch.float8_e4m3fn if name == "e4m3" else torch.int8, name == "w8a16")
    residual = residual.to(out)
    y, z = (sp.bsr_linear(x, packed, bias, "relu", residual, b, out_dtype=out) for b in ("auto", "reference"))
    assert y.dtype == z.dtype == out
    loose = 0.06 if name != "int8" else 2 * torch.finfo(out).eps  # blocks with their scales are rounded to bfloat16
    torch.testing.assert_close(y.float(), z.float(), atol=loose, rtol=loose)
    scales, rest = (packed.scales,), () if name == "w8a16" else (None,)
    arrays = (packed.crow_indices, packed.col_indices, packed.values, *scales, None, 40, bias.to(out), "none", residual)
    operator = getattr(torch.ops.sparse_prune, f"bsr_linear_{name}").default
    tests = (
        ("test_faketensor",) if name == "e4m3" else ("test_schema", "test_faketensor")
    )  # which cannot count in float8
    with torch.no_grad():
        torch.library.opcheck(operator, (x, *arrays, *rest, out), test_utils=tests)


def make_glu(m, n, k, r, c, density, dtype=torch.float32):
    gate, x, gate_bias, _ = make(m, n, k, r, c, density, dtype)
    up, _, up_bias, _ = make(m, n, k, r, c, max(density, 0.5), dtype)
    return x, gate, up, gate_bias, up_bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["auto", "reference", "dense"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_glu_matches_float64(problem, backend, dtype):
    x, gate, up, gate_bias, up_bias = make_glu(*problem, dtype)

    def dense(to):
        z = F.linear(x.to(to), gate.to_dense().to(to), gate_bias.to(to))
        return F.silu(z) * F.linear(x.to(to), up.to_dense().to(to), up_bias.to(to))

    y = sp.bsr_linear_glu(x[None], gate, up, gate_bias, up_bias, backend=backend)[0]
    exact, direct = dense(torch.float64), dense(dtype)
    assert y.dtype == dtype and y.shape == exact.shape
    assert (y.double() - exact).abs().max().item() <= tolerance(exact, direct, dtype) if y.numel() else True
    arrays = (w for packed in (gate, up) for w in (packed.crow_indices, packed.col_indices, packed.values))
    twin = reference.bsr_linear_glu(x, *arrays, gate.shape[0], gate_bias, up_bias)
    assert (twin.double() - exact).abs().max().item() <= tolerance(exact, direct, dtype) if y.numel() else True


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_glu_gradcheck(activation):
    x, gate, up, gate_bias, up_bias = make_glu(5, 31, 17, 4, 8, 0.6, torch.float64)
    leaves = [t.clone().requires_grad_() for t in (x, gate.values, up.values, gate_bias, up_bias)]

    def run(x, gate_values, up_values, gate_bias, up_bias):
        arrays = (
            gate.crow_indices,
            gate.col_indices,
            gate_values,
            None,
            up.crow_indices,
            up.col_indices,
            up_values,
            None,
        )
        return torch.ops.sparse_prune.bsr_linear_glu(x, *arrays, 31, gate_bias, up_bias, activation)

    assert torch.autograd.gradcheck(run, leaves)
    for wanted in range(5):  # each gradient alone
        leaves = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(leaves)]
        assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_glu_opcheck(dtype):
    x, gate, up, gate_bias, up_bias = make_glu(6, 40, 48, 16, 16, 0.5, dtype)
    arrays = (gate.crow_indices, gate.col_indices, gate.values.requires_grad_(), None)
    arrays += (up.crow_indices, up.col_indices, up.values, None)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    operator = torch.ops.sparse_prune.bsr_linear_glu.default
    for biases in ((None, None), (gate_bias.requires_grad_(), up_bias)):
        arguments = (x.detach().requires_grad_(), *arrays, 40, *biases, "silu")
        torch.library.opcheck(operator, arguments, test_utils=tests)


def test_glu_takes_weights_that_one_kernel_cannot():
    x, gate, up, gate_bias, up_bias = make_glu(9, 64, 64, 32, 32, 0.5)
    other = sp.BsrWeight.from_dense(up.to_dense(), torch.ones(4, 2, dtype=torch.bool), (16, 32))
    expected = sp.bsr_linear_glu(x, gate, up, gate_bias, up_bias)
    torch.testing.assert_close(sp.bsr_linear_glu(x, gate, other, gate_bias, up_bias), expected)
    int8 = sp.bsr_linear_glu(x, gate.quantize(), up.quantize(), gate_bias, up_bias)
    assert 0 < (int8 - expected).norm() < 0.03 * expected.norm()
    with pytest.raises(sp.SparsePruneError, match=r"up: expected a weight \(64, 64\) like gate, got \(32, 64\)"):
        sp.bsr_linear_glu(x, gate, sp.BsrWeight.from_zeros(torch.ones(32, 64), (32, 32)))
    with pytest.raises(sp.SparsePruneError, match=r"bias: expected shape \(64,\)"):
        sp.bsr_linear_glu(x, gate, up, gate_bias, up_bias[1:])
    with pytest.raises(sp.SparsePruneError, match="backend: expected a backend that can run here, got 'triton'"):
        sp.bsr_linear_glu(x, gate, up, backend="triton")


def test_prepacked_values_follow_writes():
    packed, x, *_ = make(8, 64, 64, 32, 32, 0.5)
    before = sp.bsr_linear(x, packed)
    packed.values.mul_(2)
    torch.testing.assert_close(sp.bsr_linear(x, packed), 2 * before)


BAD_CALLS = {
    "x of another width": (dict(x=torch.zeros(4, 63)), r"x: expected a last dimension of 64"),
    "x of another dtype": (dict(x=torch.zeros(4, 64, dtype=torch.bfloat16)), r"x: expected dtype torch.float32"),
    "x on another device": (dict(x=torch.zeros(4, 64, device="meta")), r"x: expected device cpu"),
    "bias shape": (dict(bias=torch.zeros(63)), r"bias: expected shape \(96,\)"),
    "residual shape": (dict(residual=torch.zeros(4, 95)), r"residual: expected shape \(4, 96\)"),
    "activation": (
        dict(activation="swish"),
        r"activation: expected one of none, relu, gelu, gelu_tanh, silu, got 'swish'",
    ),
    "backend": (dict(backend="tpu"), r"backend: expected one of auto, cpu, triton, cuda, dense, reference, got 'tpu'"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_name_the_argument(case):
    change, message = BAD_CALLS[case]
    packed, x, *_ = make(4, 96, 64, 32, 32, 0.5)
    with pytest.raises(sp.SparsePruneError, match=message):
        sp.bsr_linear(**{"x": x, "packed": packed} | change)


def test_backend_that_cannot_run_says_why():
    assert sp.backend_for("meta", torch.float32) == "reference"
    for name in ("cpu", "triton"):
        with pytest.raises(sp.SparsePruneError, match=f"backend: expected a backend that can run here, got '{name}'"):
            sp.backend_for("meta", torch.float32, backend=name)


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("form", ["plain", "prepacked", ""])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_forward_mode_gives_tangents(activation, form, grad, monkeypatch):
    """torch.func.jvp and dual tensors, cold and warm, where torch.library would give zeros or none."""
    linear = nn.Linear(64, 96).requires_grad_(False)
    layer = sp.SparseLinear.from_dense(linear, sp.block_mask(linear.weight, (32, 32), density=0.5)).eval()
    plan = planner.Plan((), (planner.Choice(1, form, 2.0, "for this test"),))
    monkeypatch.setattr(planner, "plan", lambda *_: plan)
    dense, act = layer.to_dense(), reference.ACTIVATIONS[activation]
    x, tangent, residual = torch.randn(5, 64), torch.randn(5, 64), torch.randn(5, 96)
    expected = torch.func.jvp(lambda x: act(dense(x)) + residual, (x,), (tangent,))
    bsr = (layer.crow_indices, layer.col_indices, layer.values, None, 96, layer.bias)
    functions = {
        "layer": lambda x: layer(x, activation, residual),
        "bsr_linear": lambda x: sp.bsr_linear(x, layer.packed, layer.bias, activation, residual),
        "operator": lambda x: torch.ops.sparse_prune.bsr_linear(x, *bsr, activation, residual),
    }
    with torch.set_grad_enabled(grad):
        for name, function in functions.items():
            for _ in range(2):  # the second call of a layer is the short one
                torch.testing.assert_close(torch.func.jvp(function, (x,), (tangent,)), expected, msg=name)
                with forward_ad.dual_level():
                    dual = forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent)))
                    torch.testing.assert_close(tuple(dual), expected, msg=name)
                function(x)


def _in_blocks(dense: torch.Tensor, like: sp.BsrWeight) -> torch.Tensor:
    """The blocks [nnzb, R, C] of a dense [N, K] that like stores, differentiable."""
    r, c = like.blocksize
    grid = dense.unflatten(1, (-1, c)).unflatten(0, (-1, r)).transpose(1, 2)  # [N/R, K/C, R, C]
    return grid[like.block_mask()]


def test_forward_mode_of_the_other_operators():
    packed, x, tangent = make(5, 96, 64, 32, 32, 0.5)[0], torch.randn(5, 64), torch.randn(5, 64)
    gate, up = nn.Linear(64, 96, bias=False), nn.Linear(64, 96, bias=False)
    layers = [sp.SparseLinear.from_dense(p, torch.ones(3, 2, dtype=torch.bool)).eval() for p in (gate, up)]
    q, norm = torch.randn(2, 5, 3, 8), torch.randn(64)
    weight, quantized, dy = packed.to_dense(), packed.quantize(), torch.randn(5, 96)
    own, index = torch.ops.sparse_prune, (packed.crow_indices, packed.col_indices)
    pairs = [
        (lambda x: sp.fused_glu(*layers, x), lambda x: F.silu(gate(x)) * up(x)),
        (lambda x: sp.bsr_linear_glu(x, layers[0].packed, layers[1].packed), lambda x: F.silu(gate(x)) * up(x)),
        (lambda x: ops.layer_norm(x, norm), lambda x: F.layer_norm(x, (64,), norm)),
        (lambda x: own.bsr_linear_dx(x @ weight.t(), *index, packed.values, 64), lambda x: x @ weight.t() @ weight),
        (
            lambda x: own.bsr_sdd(dy, x, *index, 32, 32).sum((1, 2)),
            lambda x: _in_blocks(dy.t() @ x, packed).sum((1, 2)),
        ),
    ]
    with torch.no_grad():
        for ours, theirs in pairs:
            torch.testing.assert_close(
                torch.func.jvp(ours, (x,), (tangent,)), torch.func.jvp(theirs, (x,), (tangent,)), rtol=1e-4, atol=1e-4
            )
    # PyTorch's own attention has no forward mode on a CPU: told, not passed over.
    with torch.no_grad(), pytest.raises(NotImplementedError, match="forward AD"):
        torch.func.jvp(lambda x: ops.attention(q + x.sum(), q, q), (x,), (tangent,))
    with pytest.raises(sp.SparsePruneError, match="a floating-point weight under forward-mode AD"):
        torch.func.jvp(lambda x: sp.bsr_linear(x, quantized), (x,), (tangent,))
