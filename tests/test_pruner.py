"""Pruner: masks against plain definitions, exact zeros under every optimizer, resuming bit for bit, heads, scopes, and refusals."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import nn

from sparse_prune.criteria import CRITERIA, bisect_alpha, block_mask, element_saliency, find_alpha, threshold_mask
from sparse_prune.errors import SparsePruneError
from sparse_prune.heads import HeadGroup, find_heads
from sparse_prune.masks import block_mean, element_density, expand_mask
from sparse_prune.pruner import PruneConfig, Pruner

ONE_SHOT = {"schedule": "oneshot", "warmup": 0, "cooldown": 0, "total_steps": 1, "update_every": 1, "smoothing": 0.0}


def network(seed: int = 0) -> nn.Sequential:
    """Two linear layers of which 8x8 blocks cut neither side evenly."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(30, 44), nn.GELU(), nn.Linear(44, 20))


def train_step(model: nn.Module, seed: int) -> None:
    x = torch.randn(16, model[0].in_features, generator=torch.Generator().manual_seed(seed))
    (model(x) - x[:, : model[-1].out_features]).square().mean().backward()


def make_optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    if name == "nesterov":
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, amsgrad=True, fused=name == "adamw_fused")


def pruned_entries(pruner: Pruner, name: str) -> torch.Tensor:
    weight = pruner.model.get_submodule(name).weight
    return ~expand_mask(pruner.masks[name], pruner.blocksizes[name], weight.shape)


def assert_exact(pruner: Pruner) -> None:
    for name in pruner.masks:
        weight = pruner.model.get_submodule(name).weight
        assert (weight[pruned_entries(pruner, name)] == 0).all() and torch.isfinite(weight).all()


@pytest.mark.parametrize("granularity", ["element", "block", "row", "column"])
@pytest.mark.parametrize("criterion", sorted(CRITERIA))
def test_one_step_is_block_mask(criterion, granularity):
    model = network()
    config = PruneConfig(
        criterion, scope="local", density=0.3, blocksize=(8, 8), granularity=granularity, seed=7, **ONE_SHOT
    )
    pruner = Pruner(model, config)
    x = torch.randn(16, 30)
    hidden = model[1](model[0](x))
    model[2](hidden).square().sum().backward()
    inputs = {"0": x, "2": model[1](model[0](x)).detach()}
    if criterion == "wanda":  # the line above ran layer 0 again on the same inputs: a mean of squares does not mind
        assert {name: int(sums[-1]) for name, sums in pruner._seen.items()} == {"0": 32, "2": 16}
    generator = torch.Generator().manual_seed(7)
    expected = {}
    for name in ("0", "2"):
        weight = model.get_submodule(name).weight
        needs = CRITERIA[criterion].needs
        extra = {"grad": weight.grad} if "grad" in needs else {}
        if "activation_norm" in needs:
            extra["activation_norm"] = inputs[name].norm(dim=0)
        if "generator" in needs:
            extra["generator"] = generator
        expected[name] = block_mask(weight, pruner.blocksizes[name], 0.3, criterion, **extra)
    pruner.step()
    assert pruner.done and all(torch.equal(pruner.masks[name], expected[name]) for name in expected)
    assert_exact(pruner)


def test_saliency_is_a_running_mean():
    model = network()
    pruner = Pruner(model, PruneConfig("taylor", total_steps=100, blocksize=(8, 8), smoothing=0.75))
    expected = 0.0
    for step in range(5):
        train_step(model, step)
        element = element_saliency(model[0].weight, "taylor", grad=model[0].weight.grad)
        expected = 0.75 * expected + 0.25 * element[:8, :8].sum()
        pruner.step()
        model.zero_grad()
    torch.testing.assert_close(pruner.state_dict()["saliency"]["0"][0], expected)


def test_global_scope_compares_layers_by_loss():
    model = network()
    pruner = Pruner(model, PruneConfig("taylor", density=0.25, floor=0.0, blocksize=(2, 2), **ONE_SHOT))
    train_step(model, 0)
    sums = []
    for layer in (model[0], model[2]):
        element = (layer.weight * layer.weight.grad).abs()
        n, k = element.shape
        sums.append(element.reshape(n // 2, 2, k // 2, 2).sum((1, 3)).detach())
    pruner.step()
    flat = torch.cat([s.flatten() for s in sums])
    limit = flat.sort(descending=True).values[round(0.25 * len(flat)) - 1]
    assert torch.equal(pruner.masks["0"], sums[0] >= limit) and torch.equal(pruner.masks["2"], sums[1] >= limit)
    assert pruner.masks["0"].float().mean() != pruner.masks["2"].float().mean()


def test_global_scope_takes_the_scale_of_a_layer_out_of_magnitude():
    masks = []
    for factor in (1.0, 64.0, 1 / 64):
        model = network()
        with torch.no_grad():
            model[0].weight.mul_(factor)
        pruner = Pruner(model, PruneConfig("magnitude", blocksize=(4, 4), density=0.4, **ONE_SHOT))
        pruner.step()
        masks.append(pruner.masks)
    assert all(torch.equal(masks[0][name], other[name]) for name in masks[0] for other in masks[1:])
    assert not torch.equal(masks[0]["0"].float().mean(), masks[0]["2"].float().mean())


def test_local_scope_gives_each_layer_the_density():
    model = network()
    pruner = Pruner(model, PruneConfig("magnitude", scope="local", blocksize=(2, 2), density=0.4, **ONE_SHOT))
    pruner.step()
    assert [int(mask.sum()) for mask in pruner.masks.values()] == [round(0.4 * 22 * 15), round(0.4 * 10 * 22)]


@pytest.mark.parametrize("floor", [0.0, 0.1, 0.2])
def test_floor(floor):
    """A layer whose saliency is nil keeps its floor, one block if that is 0, and the whole still has its density."""
    model = network()
    pruner = Pruner(model, PruneConfig("taylor", density=0.2, floor=floor, blocksize=(2, 2), **ONE_SHOT))
    for layer, value in ((model[0], 1.0), (model[2], 0.0)):
        layer.weight.grad = torch.full_like(layer.weight, value)
    pruner.step()
    blocks = {name: mask.numel() for name, mask in pruner.masks.items()}
    assert int(pruner.masks["2"].sum()) == max(1, round(floor * blocks["2"]))
    assert sum(int(mask.sum()) for mask in pruner.masks.values()) == round(0.2 * sum(blocks.values()))
    assert pruner.density() == pytest.approx(0.2, abs=0.001)


def test_each_layer_keeps_a_block_at_densities_that_have_none_for_it():
    model = network()
    pruner = Pruner(model, PruneConfig("magnitude", density=0.002, floor=0.0, blocksize=(2, 2), **ONE_SHOT))
    pruner.step()
    assert [int(mask.sum()) for mask in pruner.masks.values()] == [1, 1]


def test_global_density_counts_elements_where_rows_differ_in_length():
    model = nn.Sequential(nn.Linear(400, 50), nn.Linear(50, 400))
    pruner = Pruner(model, PruneConfig("random", granularity="row", density=0.3, **ONE_SHOT))
    pruner.step()
    assert pruner.density() == pytest.approx(0.3, abs=0.006)
    assert all(
        0.1 < mask.float().mean() < 0.5 for mask in pruner.masks.values()
    )  # neither long nor short rows win for their length
    kept = sum(
        element_density(m, pruner.blocksizes[n], (50, 400) if n == "0" else (400, 50)) for n, m in pruner.masks.items()
    )
    assert kept / 2 == pytest.approx(pruner.density())


def test_pruned_blocks_stay_pruned_and_the_density_follows_the_schedule():
    model = network()
    optimizer = make_optimizer("adamw", model)
    config = PruneConfig(
        density=0.25, total_steps=40, warmup=4, cooldown=10, update_every=3, blocksize=(2, 2), regrow=False
    )
    pruner, before = Pruner(model, config).attach(optimizer), None
    for step in range(1, 41):
        train_step(model, step)
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
        if before is not None:
            assert all((pruner.masks[name] <= before[name]).all() for name in before)
            if step % 3 and step < 30:
                assert all(torch.equal(pruner.masks[name], before[name]) for name in before)
        before = pruner.masks
        if step <= 4:
            assert pruner.density() == 1.0
        if step % 3 == 0 and step > 4 or step >= 30:
            assert pruner.density() == pytest.approx(config.timetable.density_at(step), abs=2 / 550)
        assert pruner.done == (step >= 30)


@pytest.mark.parametrize("scope", ["global", "local"])
def test_without_regrow_a_large_gradient_brings_nothing_back(scope):
    model = network()
    steps = {"total_steps": 6, "warmup": 0, "cooldown": 0, "update_every": 1, "smoothing": 0.0}
    pruner = Pruner(
        model, PruneConfig("gradient", "linear", scope, density=0.3, blocksize=(2, 2), regrow=False, **steps)
    )
    for _ in range(6):
        before = pruner.masks
        for name, mask in before.items():
            dropped = ~expand_mask(mask, (2, 2), model.get_submodule(name).weight.shape)
            model.get_submodule(name).weight.grad = torch.rand(dropped.shape) + 10.0 * dropped
        pruner.step()
        assert all((pruner.masks[name] <= before[name]).all() for name in before)
    assert pruner.density() == pytest.approx(0.3, abs=0.01)


def test_a_layer_without_gradient_this_step_counts_as_zero():
    model = network()
    pruner = Pruner(model, PruneConfig("taylor", blocksize=(2, 2), **ONE_SHOT))
    train_step(model, 0)
    model[2].weight.grad = None
    pruner.step()
    assert pruner.masks["2"].sum() == round(0.05 * 220) < pruner.masks["0"].sum()


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("regrow", [True, False])
@pytest.mark.parametrize("name", ["sgd", "nesterov", "adamw", "adamw_fused"])
def test_masks_stay_exact(name, regrow, attached):
    model = network()
    optimizer = make_optimizer(name, model)
    pruner = Pruner(model, PruneConfig(density=0.3, blocksize=(8, 8), total_steps=20, update_every=2, regrow=regrow))
    if attached:
        pruner.attach(optimizer)
    for step in range(30):  # ten steps longer than planned: the masks still hold
        train_step(model, step)
        optimizer.step()
        if attached:
            assert_exact(pruner)
        pruner.step()
        assert_exact(pruner)
        optimizer.zero_grad()
    assert 0.1 < pruner.density() < 0.5
    if attached:
        for layer_name in pruner.masks:
            moments = [v for v in optimizer.state[model.get_submodule(layer_name).weight].values() if v.dim() == 2]
            assert moments and all((v[pruned_entries(pruner, layer_name)] == 0).all() for v in moments)
            assert all((v[~pruned_entries(pruner, layer_name)] != 0).any() for v in moments)


def test_attached_masks_hold_when_step_is_no_longer_called():
    model = network()
    optimizer = make_optimizer("adamw", model)
    pruner = Pruner(model, PruneConfig("magnitude", blocksize=(8, 8), **ONE_SHOT)).attach(optimizer)
    train_step(model, 0)
    pruner.step()
    for step in range(5):
        train_step(model, step)
        optimizer.step()
        assert_exact(pruner)
    pruner.remove_hooks()
    train_step(model, 9)
    optimizer.step()
    assert any((model.get_submodule(n).weight[pruned_entries(pruner, n)] != 0).any() for n in pruner.masks)
    pruner.apply_()
    assert_exact(pruner)


def test_regrown_blocks_return_with_their_weights():
    model = network()
    steps = {"total_steps": 4, "warmup": 0, "cooldown": 0, "update_every": 1, "smoothing": 0.0}
    config = PruneConfig("taylor", "linear", scope="local", density=0.5, blocksize=(2, 2), regrow=True, **steps)
    pruner = Pruner(model, config)
    start = model[0].weight.detach().clone()
    returned = 0
    for step in range(4):
        assert bool(pruner.state_dict()["memory"]) == (step > 0)
        for layer in (model[0], model[2]):
            layer.weight.grad = torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(step))
        before = pruner.masks["0"]
        pruner.step()
        returned += int((pruner.masks["0"] & ~before).sum())
        kept = expand_mask(pruner.masks["0"], (2, 2), start.shape)
        assert torch.equal(model[0].weight, start * kept)
    assert returned > 0 and pruner.done and not pruner.state_dict()["memory"]


@pytest.mark.parametrize(
    "config",
    [
        PruneConfig("movement", density=0.3, blocksize=(8, 8), total_steps=24, update_every=3, regrow=False),
        PruneConfig(density=0.3, blocksize=(8, 8), total_steps=24, update_every=3),
        PruneConfig("magnitude", "iterative", density=0.3, blocksize=(8, 8), total_steps=24, update_every=2),
        PruneConfig("wanda", "linear", density=0.3, granularity="row", total_steps=24, update_every=2),
        PruneConfig("random", density=0.3, blocksize=(4, 4), total_steps=24, update_every=2, seed=3),
        PruneConfig("gradient", alpha=0.3, granularity="element", total_steps=24, update_every=4),
    ],
    ids=lambda c: f"{c.criterion}{'-regrow' * c.regrow}",
)
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_resuming_changes_no_bit(config, name):
    def go(model, optimizer, pruner, steps):
        for step in steps:
            train_step(model, step)
            optimizer.step()
            pruner.step()
            optimizer.zero_grad()

    model = network()
    optimizer = make_optimizer(name, model)
    pruner = Pruner(model, config).attach(optimizer)
    go(model, optimizer, pruner, range(11))
    buffer = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), pruner.state_dict()], buffer)
    go(model, optimizer, pruner, range(11, 26))

    buffer.seek(0)
    states = torch.load(buffer, weights_only=True)
    resumed = network(seed=5)
    resumed.load_state_dict(states[0])
    optimizer_resumed = make_optimizer(name, resumed)
    optimizer_resumed.load_state_dict(states[1])
    pruner_resumed = Pruner(resumed, config).attach(optimizer_resumed)
    pruner_resumed.load_state_dict(states[2])
    go(resumed, optimizer_resumed, pruner_resumed, range(11, 26))
    assert pruner.done and pruner_resumed.done and pruner.density() < 1
    for ours, theirs in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert all(torch.equal(mask, pruner_resumed.masks[layer]) for layer, mask in pruner.masks.items())
    for left, right in zip(optimizer.state.values(), optimizer_resumed.state.values(), strict=True):
        assert all(torch.equal(torch.as_tensor(left[k]), torch.as_tensor(right[k])) for k in left)


def test_a_state_is_a_copy():
    model = network()
    pruner = Pruner(model, PruneConfig("magnitude", blocksize=(8, 8), **ONE_SHOT))
    state = pruner.state_dict()
    pruner.step()
    assert state["steps"] == 0 and all(value.all() for value in state["kept"].values())
    pruner.load_state_dict(state)
    assert pruner.density() == 1.0 and not pruner.done


def test_a_state_of_another_model_is_refused():
    pruner = Pruner(network(), PruneConfig(blocksize=(8, 8)))
    with pytest.raises(SparsePruneError, match="^state: expected masks of this model's layers"):
        pruner.load_state_dict(Pruner(network(), PruneConfig(blocksize=(4, 4))).state_dict())
    with pytest.raises(SparsePruneError, match="^state: expected a Pruner.state_dict"):
        pruner.load_state_dict({"steps": 1})


def test_equal_runs_are_equal():
    results = []
    for _ in range(2):
        model = network()
        optimizer = make_optimizer("adamw", model)
        pruner = Pruner(model, PruneConfig(blocksize=(4, 4), total_steps=20)).attach(optimizer)
        for step in range(20):
            train_step(model, step)
            optimizer.step()
            pruner.step()
            optimizer.zero_grad()
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("relative_to", ["grad", "weight"])
@pytest.mark.parametrize("criterion", ["threshold", "gradient"])
def test_alpha_is_the_articles_rule(criterion, relative_to):
    model = network()
    config = PruneConfig(
        criterion, alpha=0.2, relative_to=relative_to, granularity="element", scope="local", **ONE_SHOT
    )
    pruner = Pruner(model, config)
    train_step(model, 0)
    on = "weight" if criterion == "threshold" else "grad"
    expected = {
        n: threshold_mask(m.weight, m.weight.grad, 0.2, on, relative_to) for n, m in (("0", model[0]), ("2", model[2]))
    }
    pruner.step()
    assert all(torch.equal(pruner.masks[name], expected[name]) for name in expected)
    assert 0 < pruner.density() < 1


def test_alpha_under_global_scope_takes_the_models_largest_gradient():
    model = network()
    train_step(model, 0)
    alpha = float(model[0].weight.detach().abs().mean() / model[2].weight.grad.abs().max())
    pruner = Pruner(model, PruneConfig("threshold", alpha=alpha, blocksize=(4, 4), **ONE_SHOT))
    largest = max(float(model[i].weight.grad.abs().max()) for i in (0, 2))
    assert model[0].weight.grad.abs().max() < 0.9 * model[2].weight.grad.abs().max()  # so that layer 0 sees the other's
    rule = {"relative_to": "weight", "blocksize": (4, 4), "reference": largest}
    expected = {name: threshold_mask(model.get_submodule(name).weight, None, alpha, **rule) for name in ("0", "2")}
    pruner.step()
    assert all(torch.equal(pruner.masks[name], expected[name]) for name in expected)
    assert 0.1 < pruner.masks["0"].float().mean() < 0.9


def test_alpha_grows_along_the_schedule():
    model = network()
    steps = {"total_steps": 4, "warmup": 0, "cooldown": 0, "update_every": 1}
    config = PruneConfig("threshold", "linear", alpha=0.4, granularity="element", relative_to="weight", **steps)
    pruner = Pruner(model, config, filter_fn=lambda name, module: name == "0")
    start = model[0].weight.detach().clone()
    for step in range(1, 5):
        train_step(model, step)
        pruner.step()
        assert torch.equal(pruner.masks["0"], start.abs() >= 0.1 * step * start.abs().max())


@pytest.mark.parametrize("regrow", [True, False])
def test_weights_pass_a_threshold_that_falls_again_only_with_regrow(regrow):
    model = nn.Sequential(nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.5, 1.0]]))
    steps = {"total_steps": 9, "warmup": 0, "cooldown": 0, "update_every": 1}
    config = PruneConfig("threshold", "oneshot", alpha=1.0, granularity="element", regrow=regrow, **steps)
    pruner = Pruner(model, config)
    for largest, expected in ((0.7, [0.0, 1.0]), (0.3, [0.5 * regrow, 1.0])):
        model[0].weight.grad = torch.tensor([[largest, 0.0]])
        pruner.step()
        assert model[0].weight.tolist() == [expected]


def test_alpha_found_for_a_density_gives_that_density():
    model = network()
    train_step(model, 0)
    alpha = find_alpha(model[0].weight, model[0].weight.grad, 0.3).alpha
    config = PruneConfig("threshold", alpha=alpha, granularity="element", **ONE_SHOT)
    pruner = Pruner(model, config, filter_fn=lambda name, module: name == "0")
    pruner.step()
    assert pruner.density() == pytest.approx(0.3, abs=1e-3) and list(pruner.masks) == ["0"]


class Attention(nn.Module):
    """Fused attention with the names of Garlic."""

    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.ffn = nn.Linear(hidden, hidden)

    def forward(self, x):
        batch, length, hidden = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, hidden)
        return self.ffn(self.out(mixed))


class Separate(nn.Module):
    """Attention with projections of their own, of which keys and values serve `share` queries each."""

    def __init__(self, hidden: int, heads: int, share: int = 1, out: str = "out_proj"):
        super().__init__()
        self.num_heads = heads
        if share > 1:
            self.num_key_value_heads = heads // share
        self.q_proj = nn.Linear(hidden, hidden)
        self.k_proj, self.v_proj = nn.Linear(hidden, hidden // share), nn.Linear(hidden, hidden // share)
        setattr(self, out, nn.Linear(hidden, hidden))


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
def test_fused_heads_are_decided_as_one(criterion):
    model = Attention(24, 6)
    pruner = Pruner(model, PruneConfig(criterion, granularity="head", density=0.5, seed=7, **ONE_SHOT))
    x = torch.randn(3, 5, 24)
    model(x).square().sum().backward()
    qkv, out = model.qkv.weight, model.out.weight
    sums = {name: seen[:-1].float() for name, seen in pruner._seen.items()}
    saliency, generator = torch.zeros(6), torch.Generator().manual_seed(7)
    for name, weight in (("qkv", qkv), ("out", out)):
        needs = CRITERIA[criterion].needs
        extra = {"grad": weight.grad} if "grad" in needs else {"generator": generator} if "generator" in needs else {}
        if "activation_norm" in needs:
            extra = {"activation_norm": (sums[name] / 15).sqrt()}
        element = element_saliency(weight, criterion, **extra)
        saliency += element.view(3, 6, -1).sum((0, 2)) if name == "qkv" else element.view(24, 6, 4).sum((0, 2))
    best = set(saliency.topk(3).indices.tolist())
    pruner.step()
    for head in range(6):
        kept = head in best
        assert pruner.masks["qkv"][[head, 6 + head, 12 + head], 0].tolist() == [kept] * 3
        assert pruner.masks["out"][0, head].item() == kept
        assert (qkv[head * 4 : head * 4 + 4] != 0).any() == kept == (out[:, head * 4 : head * 4 + 4] != 0).any()
    assert pruner.density() == 0.5 and "ffn" not in pruner.masks
    assert pruner.blocksizes == {"qkv": (4, 24), "out": (24, 4)}


@pytest.mark.parametrize("granularity", ["element", "block", "row", "column", "head"])
@pytest.mark.parametrize("criterion", ["threshold", "gradient"])
def test_a_density_is_the_articles_rule_with_the_alpha_found_for_it(criterion, granularity):
    """One max|r| and one threshold for all layers, though the second half's weights are ten times those of the first."""
    model = nn.Sequential(Attention(24, 6), Attention(24, 6))
    with torch.no_grad():
        for parameter in model[1].parameters():
            parameter *= 10
    given = copy.deepcopy(model)
    x = torch.randn(3, 5, 24)
    for net in (model, given):
        net(x).square().mean().backward()
    weights = {name: module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    values = {name: (w if criterion == "threshold" else w.grad).detach().abs() for name, w in weights.items()}
    config = {"granularity": granularity, "blocksize": (8, 8), **ONE_SHOT}
    found = Pruner(model, PruneConfig(criterion, density=0.5, **config))
    sizes = found.blocksizes
    if granularity == "head":
        means = {}
        for i in "01":
            qkv, out = values[f"{i}.qkv"].view(3, 6, 4, 24), values[f"{i}.out"].view(24, 6, 4)
            parts = [part.transpose(0, 1).reshape(6, -1) for part in (qkv, out)]
            mean = torch.cat(parts, 1).mean(1)  # [heads]
            means |= {f"{i}.qkv": mean.repeat(3)[:, None], f"{i}.out": mean[None]}
    else:
        means = {name: block_mean(value, sizes[name]) for name, value in values.items()}
    counts = torch.cat(
        [torch.full((mean.numel(),), math.prod(sizes[name]), dtype=torch.float64) for name, mean in means.items()]
    )
    largest = max(float(weights[name].grad.abs().max()) for name in means)
    alpha = bisect_alpha(torch.cat([mean.flatten() for mean in means.values()]), largest, 0.5, counts).alpha
    given = Pruner(given, PruneConfig(criterion, alpha=alpha, **config))
    found.step(), given.step()
    for name, mean in means.items():
        assert torch.equal(found.masks[name], mean >= alpha * largest)
        assert torch.equal(found.masks[name], given.masks[name])
    halves = [torch.cat([mask.flatten() for name, mask in found.masks.items() if name[0] == i]) for i in "01"]
    first, second = (float(half.float().mean()) for half in halves)
    assert abs(first - second) > 0.2  # each layer against its own mean would keep half of both
    assert found.density() == pytest.approx(0.5, abs=0.05)


def test_cut_blocks_under_the_articles_rule_compare_by_their_mean():
    model = nn.Sequential(nn.Linear(10, 8), nn.Linear(8, 10))  # in 8x8 blocks: a whole one each, and one of 16 elements
    with torch.no_grad():
        model[0].weight[:, :8], model[0].weight[:, 8:] = 0.2, 0.4
        model[1].weight[:8], model[1].weight[8:] = 0.3, 0.1
    pruner = Pruner(model, PruneConfig("threshold", density=0.5, blocksize=(8, 8), **ONE_SHOT))
    pruner.step()  # no gradients: which blocks a density leaves does not depend on max|r|
    assert pruner.masks["0"].tolist() == [[False, True]] and pruner.masks["1"].tolist() == [[True], [False]]
    assert pruner.density() == 0.5  # of elements: 64 + 16 of 160


def test_separate_heads_and_shared_keys():
    model = nn.ModuleList([Separate(16, 4), Separate(16, 4, share=2, out="o_proj")])
    pruner = Pruner(model, PruneConfig("magnitude", granularity="head", density=0.5, scope="local", **ONE_SHOT))
    pruner.step()
    assert pruner.blocksizes["0.q_proj"] == (4, 16) and pruner.blocksizes["0.out_proj"] == (16, 4)
    assert pruner.blocksizes["1.q_proj"] == (8, 16) and pruner.blocksizes["1.k_proj"] == (4, 16)
    for layer, out in (("0", "out_proj"), ("1", "o_proj")):
        masks = [pruner.masks[f"{layer}.{part}"].flatten() for part in ("q_proj", "k_proj", "v_proj", out)]
        assert all(torch.equal(mask, masks[0]) for mask in masks) and masks[0].float().mean() == 0.5


def test_heads_of_common_models_are_found():
    transformers = pytest.importorskip("transformers")
    size = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 8,
        "vocab_size": 10,
    }
    bert = find_heads(transformers.BertModel(transformers.BertConfig(**size)))
    assert len(bert) == 2 and bert[0] == HeadGroup(
        4,
        rows=tuple(f"encoder.layer.0.attention.self.{part}" for part in ("query", "key", "value")),
        columns=("encoder.layer.0.attention.output.dense",),
    )
    distil = transformers.DistilBertModel(
        transformers.DistilBertConfig(vocab_size=10, dim=16, n_heads=4, n_layers=1, hidden_dim=8)
    )
    assert [(g.num_heads, g.columns) for g in find_heads(distil)] == [(4, ("transformer.layer.0.attention.out_lin",))]
    llama = transformers.LlamaModel(transformers.LlamaConfig(**size, num_key_value_heads=2))
    assert [(g.num_heads, g.columns[0][-6:]) for g in find_heads(llama)] == [(2, "o_proj")] * 2


def test_given_heads_and_a_filter():
    model = Attention(24, 6)
    pruner = Pruner(
        model,
        PruneConfig("magnitude", granularity="head", density=0.5, **ONE_SHOT),
        heads=[HeadGroup(3, columns=("out",))],
    )
    pruner.step()
    assert pruner.masks["out"].shape == (1, 3) and list(pruner.masks) == ["out"]


def test_masks_on_another_grid():
    model = Attention(24, 6)
    pruner = Pruner(model, PruneConfig("magnitude", granularity="head", density=0.5, **ONE_SHOT))
    pruner.step()
    for name, mask in pruner.block_masks((2, 4)).items():
        weight = model.get_submodule(name).weight
        assert torch.equal(mask, torch.nn.functional.max_pool2d((weight != 0).float()[None], (2, 4))[0] > 0)


def _rank(rank: int, file: str, results) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    model = network()
    pruner = Pruner(model, PruneConfig("taylor", blocksize=(2, 2), density=0.3, **ONE_SHOT))
    train_step(model, 100 + rank)  # other data on each rank, and no reduced gradients
    pruner.step()
    results[rank] = {name: mask.tolist() for name, mask in pruner.masks.items()}
    torch.distributed.destroy_process_group()


@pytest.fixture
def lone_rank(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_saliency_is_the_mean_over_ranks(lone_rank, monkeypatch):
    """What all_reduce adds up is divided by the number of ranks, layer by layer."""
    seen = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flat: seen.append(flat.clone()) or flat.mul_(4))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    given = {"a": torch.rand(4), "b": torch.rand(3)}
    reduced = Pruner(network(), PruneConfig(blocksize=(8, 8))).reduce_saliency(given)
    assert len(seen) == 1 and all(torch.equal(reduced[name], 2 * given[name]) for name in given)


def test_reduce_saliency_is_where_masks_come_from():
    class Reversed(Pruner):
        def reduce_saliency(self, saliency):
            return {name: -value for name, value in saliency.items()}

    config = PruneConfig("magnitude", scope="local", density=0.5, granularity="column", **ONE_SHOT)
    best, worst = Pruner(network(), config), Reversed(network(), config)
    best.step(), worst.step()
    assert all(torch.equal(best.masks[name], ~worst.masks[name]) for name in best.masks)


@pytest.mark.slow
def test_ranks_agree(tmp_path):
    results = torch.multiprocessing.get_context("spawn").Manager().dict()
    torch.multiprocessing.spawn(_rank, (str(tmp_path / "rendezvous"), results), nprocs=2)
    assert results[0] == results[1]
    alone = network()
    pruner = Pruner(alone, PruneConfig("taylor", blocksize=(2, 2), density=0.3, **ONE_SHOT))
    train_step(alone, 100)
    pruner.step()
    assert {name: mask.tolist() for name, mask in pruner.masks.items()} != results[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"criterion": "best"}, "^criterion: expected one of magnitude,"),
        ({"schedule": "slow"}, "^schedule"),
        ({"scope": "layer"}, "^scope: expected one of global, local, got 'layer'"),
        ({"granularity": "tile"}, "^granularity"),
        ({"density": 0.0}, "^density"),
        ({"density": 1.01}, "^density"),
        ({"blocksize": (32,)}, "^blocksize"),
        ({"floor": 1.0}, "^floor"),
        ({"total_steps": 0}, "^total_steps"),
        ({"warmup": 1.5}, "^warmup: expected a count of steps"),
        ({"cooldown": -0.5}, "^cooldown"),
        ({"warmup": 0.6, "cooldown": 0.4}, r"^warmup \+ cooldown"),
        ({"update_every": 0}, "^update_every"),
        ({"smoothing": 1.0}, "^smoothing"),
        ({"rounds": 0}, "^rounds"),
        ({"alpha": 0.1}, "^alpha: .*got 0.1 with criterion 'taylor'"),
        ({"alpha": -0.1, "criterion": "threshold"}, "^alpha"),
        ({"relative_to": "loss"}, "^relative_to"),
    ],
)
def test_config_refuses(change, message):
    with pytest.raises(SparsePruneError, match=message):
        PruneConfig(**change)


def test_nothing_to_prune():
    with pytest.raises(SparsePruneError, match="^model: expected a module with nn.Linear inside, got Sequential"):
        Pruner(nn.Sequential(nn.Conv1d(1, 1, 1)))
    with pytest.raises(SparsePruneError, match="^filter_fn: expected at least one of 2"):
        Pruner(network(), filter_fn=lambda name, module: False)
    with pytest.raises(SparsePruneError, match="^heads: expected at least one attention module"):
        Pruner(network(), PruneConfig(granularity="head"))
    with pytest.raises(SparsePruneError, match="^heads: expected None unless granularity is 'head'"):
        Pruner(network(), PruneConfig(blocksize=(8, 8)), heads=[])
    with pytest.raises(SparsePruneError, match="^heads: expected a number of heads that divides the 72 rows of qkv"):
        Pruner(Attention(24, 6), PruneConfig(granularity="head"), heads=[HeadGroup(7, fused=("qkv",))])
    with pytest.raises(SparsePruneError, match="^blocksize: expected a block that fits"):
        Pruner(network(), PruneConfig(blocksize=(64, 64)))


@pytest.mark.parametrize("where", ["start", "weight", "grad"])
def test_nan(where):
    model = network()
    if where == "start":
        model[2].weight.data[0, 0] = math.nan
        with pytest.raises(SparsePruneError, match="^2.weight: expected finite numbers, got NaN"):
            Pruner(model, PruneConfig(blocksize=(8, 8)))
        return
    pruner = Pruner(model, PruneConfig("taylor", blocksize=(8, 8)))
    train_step(model, 0)
    (model[2].weight if where == "weight" else model[2].weight.grad).data[0, 0] = math.nan
    with pytest.raises(SparsePruneError, match="^2: weight or grad: expected finite numbers"):
        pruner.step()


def test_gradients_and_activations_must_be_there():
    with pytest.raises(SparsePruneError, match="^grad: .*criterion 'taylor' needs.*before zero_grad"):
        Pruner(network(), PruneConfig(blocksize=(8, 8))).step()
    with pytest.raises(SparsePruneError, match="^0: activations: expected a forward pass in training mode"):
        Pruner(network(), PruneConfig("wanda", blocksize=(8, 8), **ONE_SHOT)).step()


def test_a_shared_weight_is_pruned_once():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = model[0].weight
    assert list(Pruner(model, PruneConfig(blocksize=(4, 4))).masks) == ["0"]


def test_hooks_leave_the_model():
    model = network()
    pruner = Pruner(model, PruneConfig("wanda", blocksize=(8, 8), **ONE_SHOT))
    assert model[0]._forward_pre_hooks
    model.eval()(torch.randn(7, 30))
    assert [int(seen[-1]) for seen in pruner._seen.values()] == [0, 0]  # scoring is not training
    train_step(model.train(), 0)
    assert [int(seen[-1]) for seen in pruner._seen.values()] == [16, 16]
    pruner.step()
    assert not model[0]._forward_pre_hooks


def test_a_frozen_layer_is_refused_where_its_gradient_is_needed():
    """It has none, so that its blocks went first: a frozen layer lost all but its floor."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight.requires_grad_(False)
    with pytest.raises(SparsePruneError, match=r"1\.weight: expected a weight that is trained, .* got a frozen one"):
        Pruner(model, PruneConfig(criterion="taylor"))
    Pruner(model, PruneConfig(criterion="taylor"), lambda name, module: name == "0")
    Pruner(model, PruneConfig(criterion="magnitude"))


@pytest.mark.parametrize("change", [{"floor": "x"}, {"smoothing": None}, {"regrow": "no"}, {"seed": 0.5}], ids=str)
def test_fields_of_another_type_are_named(change):
    with pytest.raises(SparsePruneError, match=f"^{next(iter(change))}: expected"):
        PruneConfig(**change)


@pytest.mark.parametrize("how", ["weight_norm", "the hook of before", "prune"])
def test_a_weight_that_is_computed_is_refused(how):
    import torch.nn.utils as utils
    from torch.nn.utils import prune

    wrap = {
        "weight_norm": utils.parametrizations.weight_norm,
        "the hook of before": lambda layer: utils.spectral_norm(layer),
        "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    }[how]
    model = nn.Sequential(wrap(nn.Linear(32, 32)), nn.Linear(32, 32))
    with pytest.raises(SparsePruneError, match="0.weight: expected a parameter, got one that is computed on each call"):
        Pruner(model, PruneConfig(criterion="magnitude", blocksize=(8, 8)))
    Pruner(model, PruneConfig(criterion="magnitude", blocksize=(8, 8)), lambda name, _: name == "1")


@pytest.mark.parametrize("criterion", ["magnitude", "wanda"])
def test_a_model_may_be_moved_after_its_pruner_was_made(criterion):
    """As the Trainer does where there is a GPU. The meta device stands for it: what is left on the CPU cannot meet its tensors."""
    model, x = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), torch.randn(4, 32)
    config = PruneConfig(criterion=criterion, blocksize=(8, 8), total_steps=4, warmup=0, cooldown=2, update_every=1)
    pruner = Pruner(model, config)
    model(x)
    pruner.step()
    assert pruner.density() < 1 and pruner._memory
    model.to("meta")
    model(x.to("meta"))
    pruner.apply_()
    kept = [pruner._kept, pruner._saliency, pruner._memory, pruner._dropped, pruner._square_sum, pruner._seen]
    assert {tensor.device.type for tensors in kept for tensor in tensors.values()} == {"meta"}
    assert (
        {mask.device.type for mask in pruner.masks.values()} == {"meta"} == {p.device.type for p in model.parameters()}
    )


def test_hooks_come_off_every_optimizer():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    pruner = Pruner(model, PruneConfig(criterion="magnitude", blocksize=(8, 8)))
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in model]
    for optimizer in optimizers:
        pruner.attach(optimizer)
    assert [len(optimizer._optimizer_step_post_hooks) for optimizer in optimizers] == [1, 1]
    pruner.remove_hooks()
    assert [len(optimizer._optimizer_step_post_hooks) for optimizer in optimizers] == [0, 0]


def test_another_kind_of_config_is_named():
    with pytest.raises(SparsePruneError, match="config: expected a PruneConfig, got .*density"):
        Pruner(nn.Sequential(nn.Linear(32, 32)), {"density": 0.2})
