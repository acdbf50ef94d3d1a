"""Layers that skip their pruned blocks in training: against dense products, in a whole run, and where they must stand aside."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparse_prune import backends, masked
from sparse_prune.masked import KeptBlocks, masked_linear
from sparse_prune.masks import expand_mask
from sparse_prune.pruner import PruneConfig, Pruner

needs_kernels = pytest.mark.skipif(not backends.cpu_isas(), reason="the C++ kernels are not built")


def masked_layer(
    shape: tuple[int, int], block: tuple[int, int], dtype: torch.dtype, keep: float = 0.4
) -> tuple[nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    layer = nn.Linear(shape[1], shape[0]).to(dtype)
    mask = torch.rand(shape[0] // block[0], shape[1] // block[1]) < keep
    with torch.no_grad():
        layer.weight.mul_(expand_mask(mask, block, shape))
    return layer, mask


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("keep", [0.4, 0.0, 1.0])
@pytest.mark.parametrize("block", [(16, 16), (16, 32), (64, 16)])
def test_equals_the_dense_layer(block, keep, whole):
    layer, mask = masked_layer((128, 96), block, torch.float64, keep)
    dense = copy.deepcopy(layer)
    x, other = (torch.randn(3, 5, 96, dtype=torch.float64).requires_grad_() for _ in range(2))
    other.data.copy_(x.data)
    y, want = masked_linear(layer, KeptBlocks.from_mask(mask, block), whole, x), dense(other)
    torch.testing.assert_close(y, want)
    weights = torch.randn_like(want)
    (y * weights).sum().backward()
    (want * weights).sum().backward()
    torch.testing.assert_close(x.grad, other.grad)
    torch.testing.assert_close(layer.bias.grad, dense.bias.grad)
    kept = True if whole else expand_mask(mask, block, layer.weight.shape)
    torch.testing.assert_close(layer.weight.grad, dense.weight.grad * kept)


@pytest.mark.parametrize("whole", [True, False])
def test_gradients_of_gradients(whole):
    block = (16, 16)
    layer, mask = masked_layer((32, 48), block, torch.float64)
    kept = KeptBlocks.from_mask(mask, block)
    inside = expand_mask(mask, block, layer.weight.shape)

    def run(x, weight, bias):
        return masked._Linear.apply(x, weight * inside, bias, kept, whole)

    inputs = (torch.randn(4, 48, dtype=torch.float64, requires_grad=True), layer.weight, layer.bias)
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@needs_kernels
def test_autocast_is_that_of_a_dense_layer():
    block = (16, 16)
    layer, mask = masked_layer((64, 64), block, torch.float32)
    x = torch.randn(8, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, want = (
            masked_linear(layer, KeptBlocks.from_mask(mask, block), True, x),
            F.linear(x, layer.weight, layer.bias),
        )
    assert y.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(y, want)
    y.float().sum().backward()
    assert layer.weight.grad.dtype == x.grad.dtype == torch.float32


def runs(monkeypatch) -> list[bool]:
    """Filled by each call of the sparse product with its `whole`."""
    seen: list[bool] = []
    apply = masked._Linear.apply
    monkeypatch.setattr(masked._Linear, "apply", lambda *given: (seen.append(given[-1]), apply(*given))[1])
    return seen


def train(skip: bool, criterion: str, regrow: bool, copy_at: int | None = None) -> tuple[Pruner, nn.Module | None]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
    config = PruneConfig(
        criterion, density=0.25, blocksize=(16, 16), total_steps=40, update_every=2, regrow=regrow, skip_pruned=skip
    )
    pruner = Pruner(model, config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    pruner.attach(optimizer)
    twin = None
    for step in range(40):
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(step))
        (model(x) - x.roll(1, 1)).square().mean().backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
        if step == copy_at:
            twin = copy.deepcopy(model)
    return pruner, twin


@needs_kernels
@pytest.mark.parametrize("regrow", [True, False])
@pytest.mark.parametrize("criterion", ["taylor", "magnitude"])
def test_a_pruning_run_is_that_of_dense_products(criterion, regrow, monkeypatch):
    dense, _ = train(False, criterion, regrow)
    seen = runs(monkeypatch)
    sparse, _ = train(True, criterion, regrow)
    assert len(seen) > 20, "the run never skipped a block"
    # While blocks may return by their gradient, dW is whole; in the end it never is.
    assert seen[0] == (regrow and criterion == "taylor") and not seen[-1]
    assert 0.2 < sparse.density() < 0.3
    for name, mask in dense.masks.items():
        assert torch.equal(mask, sparse.masks[name]), name
        torch.testing.assert_close(
            dense.model.get_submodule(name).weight, sparse.model.get_submodule(name).weight, atol=1e-4, rtol=1e-3
        )


@needs_kernels
@pytest.mark.parametrize("regrow", [True, False])
def test_the_articles_rule_sees_the_largest_gradient_of_all_weights(regrow, monkeypatch):
    """Its threshold is alpha * max|grad| over pruned weights too, though its criterion is |w|."""
    found = {}
    for skip in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128))
        config = PruneConfig(
            "threshold", alpha=1.0, blocksize=(16, 16), total_steps=4, warmup=0, regrow=regrow, skip_pruned=skip
        )
        pruner = Pruner(model, config)
        with torch.no_grad():
            pruner._choose({key: torch.arange(len(kept)) % 4 == 0 for key, kept in pruner._kept.items()})
            pruner.apply_()
        seen = runs(monkeypatch)
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
        model(x).square().sum().backward()
        assert seen == [True] * skip
        found[skip] = model[0].weight.grad
    torch.testing.assert_close(found[True], found[False])


@needs_kernels
def test_off_by_config_or_after_remove_hooks(monkeypatch):
    seen = runs(monkeypatch)
    train(False, "taylor", True)
    assert not seen
    pruner, _ = train(True, "taylor", True)
    assert seen and "forward" in pruner.model[0].__dict__
    pruner.remove_hooks()
    seen.clear()
    pruner.model(torch.randn(2, 64)).sum().backward()
    assert not seen and all("forward" not in module.__dict__ for module in pruner.model)


@needs_kernels
def test_dense_in_eval_mode_and_in_other_dtypes(monkeypatch):
    """A model whose weights were replaced is not evaluated by the masks of old ones."""
    pruner, _ = train(True, "taylor", True)
    model, seen = pruner.model, runs(monkeypatch)
    with torch.no_grad():
        model[0].weight.copy_(torch.randn_like(model[0].weight))
    x = torch.randn(4, 64)
    torch.testing.assert_close(model.eval()[0](x), F.linear(x, model[0].weight, model[0].bias))
    assert not seen
    with pytest.raises(RuntimeError, match="dtype"):
        model.train()(x.double())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(x[:, :32])


@needs_kernels
def test_a_copy_is_of_itself(monkeypatch):
    _, twin = train(True, "taylor", True, copy_at=38)
    assert twin is not None
    seen = runs(monkeypatch)
    with torch.no_grad():
        for module in (twin[0], twin[2]):
            module.weight.zero_()
            module.bias.zero_()
    assert twin(torch.randn(4, 64)).abs().max() == 0 and len(seen) == 2


@needs_kernels
def test_left_alone(monkeypatch):
    """What has a forward of its own, blocks too small or that do not divide the weight, and granularities other than blocks."""
    seen = runs(monkeypatch)

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    patched = nn.Linear(64, 64)
    patched.forward = lambda x: F.linear(x, patched.weight)
    given = [
        (Doubled(64, 64), (16, 16), "block"),
        (patched, (16, 16), "block"),
        (nn.Linear(64, 64), (8, 32), "block"),
        (nn.Linear(64, 72), (16, 16), "block"),
        (nn.Linear(64, 64), (16, 16), "row"),
    ]
    for layer, block, granularity in given:
        before = layer.__dict__.get("forward")
        pruner = Pruner(
            nn.Sequential(layer),
            PruneConfig(
                "magnitude", "oneshot", blocksize=block, granularity=granularity, total_steps=1, warmup=0, cooldown=0
            ),
        )
        pruner.step()
        pruner.model(torch.randn(2, 64)).sum().backward()
        assert layer.__dict__.get("forward") is before
    assert not seen


@needs_kernels
def test_torch_compile_and_torch_func_see_the_dense_product(monkeypatch):
    pruner, _ = train(True, "taylor", True)
    seen, x = runs(monkeypatch), torch.randn(4, 64)
    want = pruner.model(x)
    assert seen
    seen.clear()
    compiled = torch.compile(pruner.model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), want)
    torch.testing.assert_close(torch.func.vmap(pruner.model)(x), want)
    assert not seen
