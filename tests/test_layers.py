from __future__ import annotations

import copy
import io
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import sparse_prune as sp
from sparse_prune import backends, layers, ops, planner
from sparse_prune.masks import expand_mask, grid_shape


def make(n=96, k=64, blocksize=(32, 32), density=0.5, bias=True):
    linear = nn.Linear(k, n, bias=bias)
    mask = torch.rand(grid_shape((n, k), blocksize)) < density
    mask[0, 0] = True
    with torch.no_grad():
        linear.weight.mul_(expand_mask(mask, blocksize, (n, k)))
    return linear, sp.SparseLinear.from_dense(linear, mask, blocksize=blocksize), mask


@pytest.mark.parametrize("bias", [True, False])
def test_drop_in(bias):
    linear, layer, mask = make(bias=bias)
    x = torch.randn(2, 5, 64)
    torch.testing.assert_close(layer(x), linear(x))
    assert torch.equal(layer.weight, linear.weight)
    assert torch.equal(layer.to_dense().weight, linear.weight)
    torch.testing.assert_close(layer.to_dense()(x), linear(x))
    assert layer.to_dense().training and not layer.eval().to_dense().training
    assert (layer.in_features, layer.out_features) == (64, 96)
    assert layer.density == mask.float().mean()
    assert f"blocksize=32x32, density={layer.density:.3f}, bias={bias}" in repr(layer)


def test_trains_like_the_masked_dense_layer():
    linear, layer, mask = make()
    element_mask = expand_mask(mask, (32, 32), (96, 64))
    x, target = torch.randn(16, 64), torch.randn(16, 96)
    optimizers = [torch.optim.AdamW(module.parameters(), lr=0.01) for module in (linear, layer)]
    for _ in range(5):
        for module, optimizer in zip((linear, layer), optimizers, strict=True):
            optimizer.zero_grad()
            F.mse_loss(module(x), target).backward()
            if module is linear:
                linear.weight.grad.mul_(element_mask)
            optimizer.step()
    torch.testing.assert_close(layer.weight, linear.weight)
    torch.testing.assert_close(layer.bias, linear.bias)


@pytest.mark.parametrize("quantized", [False, True])
def test_values_are_packed_for_the_kernels_once(monkeypatch, quantized):
    made, make_layout = [], ops.prepack
    monkeypatch.setattr(ops, "prepack", lambda *a: made.append(1) or make_layout(*a))
    layer = make()[1].eval()
    layer = layer.quantize_() if quantized else layer
    x = torch.randn(5, 64)
    with torch.no_grad():
        for rows in (x, x, x[:1], x.repeat(9, 1)):
            layer(rows, "relu")
        assert len(made) == 1
        layer.values.copy_(layer.values.flip(0))
        layer(x)
        layer(x)
        assert len(made) == 2, "written to: once more"
        packed = layer.packed
        for rows in (x, x[:1], x):
            sp.bsr_linear(rows, packed)
    assert len(made) == 3, "once for a weight without a layer"


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "int8"])
def test_threads_that_meet_at_a_fresh_layer_agree(kind):
    dtype = torch.float32 if kind == "int8" else getattr(torch, kind)
    x = torch.randn(40, 64).to(dtype)
    for _ in range(10):
        fresh = make()[1].eval().to(dtype)
        fresh = fresh.quantize_() if kind == "int8" else fresh
        barrier = threading.Barrier(8)

        def call(_, layer=fresh, barrier=barrier):
            barrier.wait()
            with torch.no_grad():
                return [layer(x, "gelu") for _ in range(3)]

        with ThreadPoolExecutor(8) as pool:
            got = [y for ys in pool.map(call, range(8)) for y in ys]
        with torch.no_grad():
            expected = copy.deepcopy(fresh)(x, "gelu")
        assert all(torch.equal(y, expected) for y in got)


def test_inference_sees_training_steps_loads_and_casts():
    linear, layer, _ = make()
    x = torch.randn(4, 64)
    with torch.no_grad():
        layer(x)
        layer.values.mul_(2)
        torch.testing.assert_close(layer(x), 2 * (linear(x) - linear.bias) + linear.bias)
        layer.load_state_dict(sp.SparseLinear.from_dense(linear, layer.packed.block_mask()).state_dict())
        torch.testing.assert_close(layer(x), linear(x))
        layer.values.data = layer.values.data * 3
        torch.testing.assert_close(layer(x), 3 * (linear(x) - linear.bias) + linear.bias)
        layer.values.data.div_(3)
        layer.refresh_()
        torch.testing.assert_close(layer(x), linear(x))
        layer.to(torch.bfloat16)
        torch.testing.assert_close(layer(x.bfloat16()).float(), linear(x), atol=0.03, rtol=0.03)
    with torch.inference_mode():
        torch.testing.assert_close(layer.float()(x), linear(x), atol=0.03, rtol=0.03)


def test_state_dict_deepcopy_and_file_without_pickle():
    _, layer, _ = make()
    x = torch.randn(4, 64)
    state = load(save(layer.state_dict()))
    other = sp.SparseLinear(
        64, 96, *(torch.zeros_like(state[name]) for name in ("crow_indices", "col_indices", "values", "bias"))
    )
    other.load_state_dict(state)
    for twin in (other, copy.deepcopy(layer)):
        assert torch.equal(twin(x), layer(x))
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True).keys() == layer.state_dict().keys()


def test_a_state_dict_that_does_not_fit_says_what_would():
    linear, layer, _ = make(density=1.0)
    other = nn.Sequential(sp.SparseLinear.from_dense(linear, torch.eye(3, 2).bool()))
    model = nn.Sequential(layer)
    with pytest.raises(RuntimeError, match=r"0\.: expected the 6 blocks of 32x32 .*load_packed\(model, file\)"):
        model.load_state_dict(other.state_dict())


def test_from_dense_keeps_mode_and_frozen_weights():
    linear = nn.Linear(64, 64).eval()
    linear.weight.requires_grad_(False)
    layer = sp.SparseLinear.from_dense(linear, torch.ones(2, 2, dtype=torch.bool))
    assert not layer.training and not layer.values.requires_grad and layer.bias.requires_grad


def test_autocast():
    linear, layer, _ = make()
    x = torch.randn(4, 64)
    with torch.autocast("cpu", torch.bfloat16):
        ours, dense = layer(x), linear(x)
        ours.sum().backward()
    assert ours.dtype == dense.dtype == torch.bfloat16
    torch.testing.assert_close(ours, dense, atol=0.03, rtol=0.03)
    assert layer.values.grad.dtype == torch.float32


def test_autocast_leaves_float64_alone():
    linear, layer, _ = make()
    linear.double(), layer.double()
    x = torch.randn(4, 64, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == linear(x).dtype == torch.float64


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {}], ids=str)
def test_inference_between_steps_sees_every_optimizer(options):
    """Fused ones write weights without raising their version."""
    _, layer, _ = make()
    x = torch.randn(4, 64)
    with planner.using_table("off"):
        for optimizer in (
            torch.optim.AdamW(layer.parameters(), 0.1, **options),
            torch.optim.SGD(layer.parameters(), 0.1, **options),
        ):
            for _ in range(2):
                layer(x).square().sum().backward()
                optimizer.step()
                for _ in range(2):  # derives, and calls the kernel by the layer's number
                    with torch.no_grad():
                        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


def test_what_inference_mode_derived_serves_gradients_of_x():
    _, layer, _ = make()
    layer.requires_grad_(False)
    x = torch.randn(4, 64)
    with torch.inference_mode():
        layer(x)
    layer(x.requires_grad_()).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(4, -1))
    packed, x.grad = layer.packed, None
    with torch.inference_mode():
        sp.bsr_linear(x, packed)
    sp.bsr_linear(x, packed).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(4, -1))


def test_gradients_of_gradients():
    """A gradient penalty, against the dense layer: nothing was said, and values got a wrong one."""
    _, layer, mask = make()
    dense, x = layer.to_dense(), torch.randn(4, 64, requires_grad=True)
    for module in (layer, dense):
        y = F.gelu(module(x)).sum()
        torch.autograd.grad(y, x, create_graph=True)[0].square().sum().backward()
    torch.testing.assert_close(layer.bias.grad, dense.bias.grad)
    blocks = sp.BsrWeight.from_dense(dense.weight.grad, mask, (32, 32)).values
    torch.testing.assert_close(layer.values.grad, blocks)


@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_fused_linear_is_the_same_for_both_kinds(activation):
    linear, layer, _ = make()
    x, residual = torch.randn(3, 7, 64), torch.randn(3, 7, 96)
    expected = sp.fused_linear(linear, x, activation, residual)
    torch.testing.assert_close(sp.fused_linear(layer, x, activation, residual), expected)


def test_compiles_without_graph_breaks():
    linear, layer, _ = make()
    layer.eval()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for batch in (3, 5):
            x = torch.randn(batch, 64)
            torch.testing.assert_close(compiled(x), linear(x))
    x = torch.randn(4, 64, requires_grad=True)
    compiled(x).sum().backward()
    torch.testing.assert_close(x.grad, linear.weight.sum(0).expand(4, -1))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(4, 63), r"x: expected a last dimension of 64 \(in_features\), got \(4, 63\)"),
        (torch.zeros(4, 64, dtype=torch.float64), "x: expected dtype torch.float32 like the weight, got torch.float64"),
        (torch.zeros(4, 64, device="meta"), "x: expected device cpu like the weight, got meta"),
    ],
)
def test_bad_input_is_named(x, message):
    _, layer, _ = make()
    with pytest.raises(sp.SparsePruneError, match=message):
        layer(x)


@pytest.mark.parametrize("called", [True, False], ids=["ready", "fresh"])
def test_what_follows_the_product_is_checked_in_words(called):
    linear, layer, _ = make()
    x, quantized = torch.zeros(4, 64), make()[1].quantize_()
    with torch.no_grad():
        for module in (linear, layer, quantized):
            for _ in range(2 * called):
                sp.fused_linear(module, x)
            with pytest.raises(sp.SparsePruneError, match="activation: expected one of none, relu, .*, got 'tanh'"):
                sp.fused_linear(module, x, "tanh")
        for module in (layer, quantized):
            with pytest.raises(sp.SparsePruneError, match=r"residual: expected shape \(4, 96\), got \(96,\)"):
                module(x, residual=torch.zeros(96))


def test_from_dense_wants_a_linear():
    with pytest.raises(sp.SparsePruneError, match="linear: expected an nn.Linear, got Conv1d"):
        sp.SparseLinear.from_dense(nn.Conv1d(4, 4, 1), torch.ones(1, 1, dtype=torch.bool))


@pytest.fixture
def short_calls(monkeypatch):
    """Counts the calls of layers that went past autograd."""
    if backends.cpu_unavailable(torch.device("cpu"), torch.float32):
        pytest.skip("the C++ kernels were not built")
    calls = []
    run = layers.run_ready

    def counted(*arguments):
        y = run(*arguments)
        if y is not None:
            calls.append(1)
        return y

    monkeypatch.setattr(layers, "run_ready", counted)
    with planner.using_table("off"):
        yield calls


def test_calls_that_owe_no_gradient_go_past_autograd(short_calls):
    _, layer, _ = make()
    layer.requires_grad_(False)
    x, residual = torch.randn(2, 3, 64), torch.randn(2, 3, 96)
    expected = F.gelu(F.linear(x, layer.weight, layer.bias)) + residual
    for _ in range(2):
        torch.testing.assert_close(layer(x, "gelu", residual), expected)
    assert len(short_calls) == 2
    with torch.inference_mode():
        torch.testing.assert_close(layer(x[0, 0], "gelu", residual[0, 0]), expected[0, 0])
    assert len(short_calls) == 3
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with pytest.raises(sp.SparsePruneError, match="x: expected a last dimension of 64"):
        layer(x[..., :32])
    with pytest.raises(sp.SparsePruneError, match="x: expected a last dimension of 64"):
        layer(x[0, 0, 0])
    with pytest.raises(sp.SparsePruneError, match="x: expected dtype torch.float32"):
        layer(x.double())
    with pytest.raises(sp.SparsePruneError, match="x: expected device cpu"):
        layer(x.to("meta"))
    assert len(short_calls) == 3


def test_a_layer_made_under_inference_mode_is_as_quick_and_loads_as_well(short_calls):
    with torch.inference_mode():
        _, layer, _ = make()
        x = torch.randn(3, 64)
        for _ in range(3):
            torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
        assert len(short_calls) == 3 and layer._derived.ready is not None
        layer.load_state_dict({name: tensor.clone() for name, tensor in make()[1].state_dict().items()})
        layer.load_state_dict(layer.state_dict() | {"values": layer.values * 3})
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
        layer.values.mul_(2)
        layer.eval()
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    assert len(short_calls) == 5
    layer.requires_grad_(False)
    torch.testing.assert_close(layer(x.clone()), F.linear(x.clone(), layer.weight, layer.bias))


@pytest.mark.parametrize("wants", ["x", "values", "bias", "residual"])
def test_each_wish_for_a_gradient_is_met_after_short_calls(short_calls, wants):
    _, layer, _ = make()
    layer.requires_grad_(False)
    x, residual = torch.randn(3, 64), torch.randn(3, 96)
    for _ in range(2):
        layer(x, "none", residual)
    wanted = {"x": x, "values": layer.values, "bias": layer.bias, "residual": residual}[wants].requires_grad_()
    layer(x, "silu", residual).square().sum().backward()
    got, wanted.grad = wanted.grad, None
    (F.silu(F.linear(x, layer.weight, layer.bias)) + residual).square().sum().backward()
    torch.testing.assert_close(got, wanted.grad)
    assert len(short_calls) == 2


def test_function_transforms_see_the_layer_as_they_see_a_dense_one(short_calls):
    linear, layer, _ = make()
    layer.requires_grad_(False)
    x = torch.randn(3, 64)
    for _ in range(2):
        layer(x)
    func = torch.func
    with torch.no_grad():
        torch.testing.assert_close(
            func.grad(lambda x: layer(x, "silu").sum())(x), func.grad(lambda x: F.silu(linear(x)).sum())(x)
        )
        torch.testing.assert_close(func.vmap(layer)(x[:, None]), linear(x)[:, None])
        torch.testing.assert_close(func.jvp(layer, (x,), (x,))[1], F.linear(x, linear.weight))
    assert len(short_calls) == 2

    def loss(parameters, row):
        return func.functional_call(layer, parameters, (row,)).square().sum()

    each = func.vmap(func.grad(loss), (None, 0))(dict(layer.named_parameters()), x)
    layer.requires_grad_()
    layer(x[1]).square().sum().backward()
    torch.testing.assert_close(each["values"][1], layer.values.grad)
    torch.testing.assert_close(each["bias"][1], layer.bias.grad)


def test_short_calls_see_every_change_of_the_weight(short_calls):
    _, layer, _ = make()
    layer.requires_grad_(False)
    x = torch.randn(3, 64)

    def check():
        with torch.no_grad():  # under which nothing but the short way's own look at its tensors tells
            for _ in range(2):
                torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))

    check()
    layer.values.mul_(2)
    check()
    layer.values.data = layer.values.data * 3
    check()
    layer.values = nn.Parameter(layer.values + 1, requires_grad=False)
    check()
    layer.col_indices = 1 - layer.col_indices
    check()
    layer.bias = nn.Parameter(layer.bias + 1, requires_grad=False)
    check()
    layer.bias.sub_(3)
    layer.col_indices.copy_(1 - layer.col_indices)
    check()
    layer.crow_indices = layer.crow_indices.clone()
    layer.crow_indices[1] = 0
    check()
    with backends.force_isa("portable"):
        assert layer._ready() is None, "other kernels may run"
        check()
    assert len(short_calls) == 3 * 9


def test_short_calls_see_what_surrounds_them(short_calls):
    """Dispatch modes, traces and transforms are shown the operator that anyone may know."""
    _, layer, _ = make()
    layer.requires_grad_(False)
    x = torch.randn(3, 64)
    expected = layer(x)

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            names.append(str(function))
            return function(*arguments, **(named or {}))

    names = []
    with torch.no_grad():
        with Seen():
            torch.testing.assert_close(layer(x), expected)
        torch.testing.assert_close(torch.vmap(layer)(x), expected)
        graph = str(torch.jit.trace(layer, x, check_trace=False).graph)
        names += [str(node.target) for node in make_fx(layer)(x).graph.nodes]
    assert names.count("sparse_prune.bsr_linear.default") == 2 and not any("ready" in name for name in names)
    assert "sparse_prune::bsr_linear" in graph and "ready" not in graph


def test_numbers_of_layers_are_given_back_and_never_stand_for_another(short_calls):
    _, layer, _ = make()
    layer.requires_grad_(False)
    x = torch.randn(3, 64)
    expected = layer(x)
    number = layer._derived.ready.number
    with torch.no_grad():
        torch.testing.assert_close(ops.run_ready(x, number), expected)
        for made_up in (-1, number + 1, number + (1 << 32), 1 << 62):
            assert ops.run_ready(x, made_up) is None
        twin = copy.deepcopy(layer)
        assert twin._derived.ready is None
        twin(x)
        del layer
        assert ops.run_ready(x, number) is None, "given back with the layer"
        other = make()[1].requires_grad_(False)
        other(x)
        assert other._derived.ready.number != number and ops.run_ready(x, number) is None
        torch.testing.assert_close(twin(x), expected)


def test_an_index_that_was_spoilt_in_place_is_told(short_calls):
    _, layer, _ = make()
    layer.requires_grad_(False)
    x = torch.randn(3, 64)
    layer(x)
    layer.col_indices.fill_(9)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"col_indices: expected entries in \[0, 2\)"):
        layer(x)


def test_cat_gives_the_outputs_side_by_side():
    parts = [make(n=n, bias=bias)[1] for n, bias in ((64, True), (96, False), (45, True))]
    x = torch.randn(5, 64)
    joined = sp.SparseLinear.cat(parts)
    assert joined.planned
    parts[0].planned = False
    assert not sp.SparseLinear.cat(parts).planned
    torch.testing.assert_close(joined(x), torch.cat([layer(x) for layer in parts], 1))
    assert not joined.training and not any(p.requires_grad for p in joined.parameters())
    assert sp.SparseLinear.cat([make(bias=False)[1]] * 2).bias is None
    with pytest.raises(sp.SparsePruneError, match="weights: expected outputs in multiples of 32"):
        sp.SparseLinear.cat(parts[::-1])


@pytest.mark.parametrize("tuning", ["off", "shipped"])
def test_fused_glu_is_the_product_of_both_layers(monkeypatch, tuning):
    (dense, gate, _), (_, up, _), (_, other, _) = make(n=96), make(n=96, bias=False), make(n=96, blocksize=(16, 32))
    x, calls, run = torch.randn(2, 5, 64), [], layers.run_glu_ready

    def counted(*arguments):
        y = run(*arguments)
        calls.append(y is not None)
        return y

    monkeypatch.setattr(layers, "run_glu_ready", counted)
    with planner.using_table(tuning):
        for first, second in ((gate, up), (gate, other), (dense, up), (gate, copy.deepcopy(gate).quantize_())):
            expected = F.gelu(first(x)) * second(x)
            torch.testing.assert_close(sp.fused_glu(first, second, x, "gelu"), expected)
            with torch.no_grad():
                for _ in range(2):
                    torch.testing.assert_close(sp.fused_glu(first, second, x, "gelu"), expected, rtol=1e-4, atol=1e-5)
        parameters = [gate.values, gate.bias, up.values]
        got = torch.autograd.grad(sp.fused_glu(gate, up, x).square().sum(), parameters)
        expected = torch.autograd.grad((F.silu(gate(x)) * up(x)).square().sum(), parameters)
        torch.testing.assert_close(got, expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert sp.fused_glu(gate, up, x).dtype == torch.bfloat16
        with pytest.raises(sp.SparsePruneError, match="x: expected a last dimension of 64"):
            sp.fused_glu(gate, up, x[..., :32])
    if tuning == "off" and backends.cpu_isas():
        assert calls.count(True) == 1, "blocks of one height, no gradients, derived by the call before"
