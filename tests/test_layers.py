from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import nn

import sparse_prune as sp
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


def test_from_dense_wants_a_linear():
    with pytest.raises(sp.SparsePruneError, match="linear: expected an nn.Linear, got Conv1d"):
        sp.SparseLinear.from_dense(nn.Conv1d(4, 4, 1), torch.ones(1, 1, dtype=torch.bool))
