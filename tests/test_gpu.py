"""The public surface on this machine's GPU, backend by backend (`make gpu`); without one the same run on the CPU's kernels."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from triton_problems import (
    ACTIVATIONS,
    DTYPES,
    PROBLEMS,
    assert_as_good_as_torch,
    exact_and_dense,
    exact_and_reference_int8,
    make_problem,
)

import sparse_prune as sp
from sparse_prune import SparsePruneError, reference
from sparse_prune.ops import backend_for

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("triton", "cuda") if DEVICE == "cuda" else ("cpu",)


def need(backend, dtype, blocksize):
    """Skip with the reason where a backend does not take that; the reason is one of the package's own."""
    try:
        name = backend_for(DEVICE, dtype, backend, blocksize)
    except SparsePruneError as error:
        pytest.skip(str(error))
    assert name.partition(":")[0] == backend


def check(backend, problem, dtype, activation, extras=(True, True)):
    need(backend, dtype, problem[3:5])
    packed, x, bias, residual = make_problem(*problem, dtype, DEVICE)
    bias, residual = (tensor if used else None for tensor, used in zip((bias, residual), extras, strict=True))
    exact, dense = exact_and_dense(x, packed.to_dense(), bias, activation, residual)
    got = sp.bsr_linear(x, packed, bias, activation, residual, backend)
    assert_as_good_as_torch(got, exact, dense)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_forward(problem, dtype, backend):
    check(backend, problem, dtype, "gelu")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("m", [1, 16, 64, 300])
@pytest.mark.parametrize("block", [(16, 16), (32, 32), (64, 64), (128, 128), (64, 16), (128, 16)], ids=str)
def test_sizes_of_models(block, m, backend):
    """Several steps of every pipeline, several tiles of every kind."""
    check(backend, (m, 768, 768, *block, 0.3), torch.bfloat16, "none", (True, False))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("extras", [(True, False), (False, True), (False, False)], ids=str)
def test_epilogues(extras, activation, backend):
    for m in (7, 130):
        check(backend, (m, 96, 128, 32, 32, 0.5), torch.bfloat16, activation, extras)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_gradients(problem, dtype):
    """dx, dvalues and db of what "auto" runs, against float64."""
    packed, x, bias, residual = make_problem(*problem, dtype, DEVICE)
    dy = torch.randn_like(residual)

    def gradients(kind):
        values, inputs = (
            packed.values.to(kind).requires_grad_(),
            [t.to(kind).requires_grad_() for t in (x, bias, residual)],
        )
        weight = sp.BsrWeight(packed.shape, packed.blocksize, packed.crow_indices, packed.col_indices, values)
        if kind is dtype:
            y = sp.bsr_linear(inputs[0], weight, inputs[1], "silu", inputs[2])
        else:
            y = reference.bsr_linear(inputs[0], *packed_arrays(weight), packed.shape[0], inputs[1], "silu", inputs[2])
        return torch.autograd.grad(y, (inputs[0], values, inputs[1], inputs[2]), dy.to(kind))

    for got, exact in zip(gradients(dtype), gradients(torch.float64), strict=True):
        assert not got.isnan().any() and got.dtype == dtype
        if got.numel():
            # z is rounded to dtype on the way to act'(z): four roundings of the largest number
            assert (got.double() - exact).abs().max() <= 8 * torch.finfo(dtype).eps * exact.abs().max().clamp(min=1)


def packed_arrays(packed):
    return packed.crow_indices, packed.col_indices, packed.values


def test_a_layer_trains_as_its_masked_twin():
    mask = torch.rand(4, 6) < 0.5
    linear = nn.Linear(192, 128).to(DEVICE)
    with torch.no_grad():
        linear.weight.mul_(mask.repeat_interleave(32, 0).repeat_interleave(32, 1).to(DEVICE))
    layer = sp.SparseLinear.from_dense(linear, mask, (32, 32))
    twin, x = copy.deepcopy(linear), torch.randn(50, 192, device=DEVICE)
    for _ in range(3):
        for module in (layer, twin):
            module.zero_grad()
            F.gelu(module(x)).square().mean().backward()
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter -= 0.1 * parameter.grad
        with torch.no_grad():
            twin.weight.mul_(mask.repeat_interleave(32, 0).repeat_interleave(32, 1).to(DEVICE))
    torch.testing.assert_close(layer.weight, twin.weight, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(layer.bias, twin.bias, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("problem", [*PROBLEMS, (16, 768, 768, 32, 32, 0.3), (300, 768, 768, 64, 16, 0.3)], ids=str)
def test_int8(problem, backend):
    need(backend, torch.int8, problem[3:5])
    for dtype, x_scale in ((torch.bfloat16, None), (torch.float16, 0.03), (torch.float32, None)):
        packed, x, bias, residual = make_problem(*problem, dtype, DEVICE)
        packed = packed.to(torch.float32).quantize()
        got = sp.bsr_linear(x, packed, bias, "gelu", residual, backend, x_scale)
        assert_as_good_as_torch(got, *exact_and_reference_int8(x, packed, bias, "gelu", residual, x_scale))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 70])
def test_gated(m, dtype):
    gate, x, gate_bias, _ = make_problem(m, 128, 640, 32, 32, 0.4, dtype, DEVICE)
    up, _, up_bias, _ = make_problem(m, 128, 640, 32, 32, 0.4, dtype, DEVICE)
    sides = [
        exact_and_dense(x, weight.to_dense(), bias, act, None)
        for weight, bias, act in ((gate, gate_bias, "silu"), (up, up_bias, "none"))
    ]
    got = sp.bsr_linear_glu(x, gate, up, gate_bias, up_bias)
    assert got.dtype == dtype and not got.isnan().any()
    # twice PyTorch's error, or two roundings, in each factor
    (g, _), (u, _) = sides
    errors = [torch.maximum((a - b.double()).abs().max(), torch.finfo(dtype).eps * a.abs().max()) for a, b in sides]
    assert (got.double() - g * u).abs().max() <= 2 * (errors[0] * u.abs().max() + errors[1] * g.abs().max())


def test_fused_encoder():
    """Of Hugging Face's BERT: one product for q, k and v, PyTorch's attention on a GPU, the model's own result."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=50, **sizes)).eval()
    sp.sparsify_(model, sp.BlockSparseConfig(blocksize=(32, 32), density=0.5), lambda name, _: ".layer" in name)
    model, ids = model.to(DEVICE), torch.randint(5, 50, (3, 40), device=DEVICE)
    back = model.encoder.layer[0].attention.output.dense
    with torch.no_grad():
        back.values[back.col_indices == 1] = 0  # a head that is left out
    mask = torch.arange(40, device=DEVICE) < torch.tensor([[40], [23], [7]], device=DEVICE)
    with torch.no_grad():
        fused = model(ids, mask.long()).last_hidden_state
        sp.unfuse_encoder_(model)
        own = model(ids, mask.long()).last_hidden_state
    torch.testing.assert_close(fused[mask], own[mask], atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU: graphs are CUDA's")
@pytest.mark.parametrize("m", [1, 64, 512])
def test_layers_in_a_cuda_graph(m):
    layer = sp.SparseLinear.from_dense(nn.Linear(768, 768), torch.rand(24, 24) < 0.3).to("cuda", torch.bfloat16).eval()
    x = torch.randn(m, 768, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        for _ in range(3):
            layer(x, "gelu")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x, "gelu")
        x.normal_()
        graph.replay()
        assert torch.equal(y, layer(x, "gelu"))


@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU: graphs are CUDA's")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("m", [1, 64, 512])
def test_products_in_a_cuda_graph(m, backend):
    """Of every backend, with the gradient of x: a replay reads what x and dy hold then."""
    need(backend, torch.bfloat16, (32, 32))
    packed, x, bias, dy = make_problem(m, 768, 768, 32, 32, 0.3, torch.bfloat16, DEVICE)
    x.requires_grad_()

    def both():
        y = sp.bsr_linear(x, packed, bias, "gelu", backend=backend)
        return y, *torch.autograd.grad(y, x, dy)

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            both()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    with torch.no_grad():
        x.normal_()
        dy.normal_()
    graph.replay()
    assert all(torch.equal(ours, wanted) for ours, wanted in zip(captured, both(), strict=True))


@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU: compiled layers have tests of their own on the CPU")
def test_compiled_layer():
    layer = sp.SparseLinear.from_dense(nn.Linear(256, 256), torch.rand(8, 8) < 0.3).to("cuda", torch.bfloat16).eval()
    x = torch.randn(40, 256, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x))
