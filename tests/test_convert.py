from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sparse_prune as sp
from sparse_prune import fuse


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(64, 64)
        self.body = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
        self.head = nn.Linear(64, 64, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.body(self.embedding(ids)))


def test_converts_and_says_what_stayed_dense_and_why():
    model = Tied().eval()
    dense_bytes = model.body[0].weight.numel() * 4
    result = sp.sparsify_(model, sp.BlockSparseConfig(density=0.5), filter_fn=lambda name, module: name != "body.2")
    assert result.converted == ["body.0"]
    assert isinstance(model.body[0], sp.SparseLinear) and type(model.body[2]) is nn.Linear
    assert result.kept_dense == {"body.2": "left out by filter_fn", "head": "its weight is shared with another module"}
    assert result.density == 0.5
    row = result.layers[0]
    assert (row.dense_bytes, row.bytes) == (dense_bytes, model.body[0].packed.nbytes)
    table = str(result)
    assert "body.0" in table and "left out by filter_fn" in table and "1 of 3 linear layers are sparse" in table
    assert model(torch.arange(4)).shape == (4, 64)


def test_a_layer_under_two_names_becomes_one_sparse_layer_under_both():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Sequential(nn.Linear(64, 64)))
    model[2][0] = model.again = model[0]
    x = torch.randn(3, 64)
    result = sp.sparsify_(model, sp.BlockSparseConfig(density=0.5))
    assert [row.name for row in result.layers] == ["0"]
    assert isinstance(model[0], sp.SparseLinear) and model[2][0] is model[0] and model.again is model[0]
    weight, bias = model[0].weight, model[0].bias
    hidden = F.linear(F.linear(x, weight, bias).relu(), weight, bias)
    torch.testing.assert_close(model(x), F.linear(hidden, weight, bias))


def test_masks_decide_where_given():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    dense = torch.ones(2, 2, dtype=torch.bool)
    masks = {"0": torch.eye(2, dtype=torch.bool), "1": dense}
    result = sp.sparsify_(model, masks=masks)
    assert result.converted == ["0"]
    assert result.kept_dense == {"1": "density 1.000 is above max_density 0.9", "2": "no mask given for it"}
    assert torch.equal(model[0].packed.block_mask(), masks["0"])


def test_output_is_that_of_the_masked_model():
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32))
    masks = {
        name: torch.rand(3, 2) < 0.5 if name == "0" else torch.tensor([[True, False, True]]) for name in ("0", "2")
    }
    with torch.no_grad():
        for name, mask in masks.items():
            weight = model.get_submodule(name).weight
            weight.mul_(sp.masks.expand_mask(mask, (32, 32), tuple(weight.shape)))
    x = torch.randn(5, 64)
    expected = model(x)
    sp.sparsify_(model, sp.BlockSparseConfig(max_density=1), masks=masks)
    torch.testing.assert_close(model(x), expected)


def test_multihead_attention_keeps_its_projection():
    model = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
    x = torch.randn(2, 5, 64)
    result = sp.sparsify_(model, sp.BlockSparseConfig(blocksize=(16, 16), density=0.5))
    assert result.kept_dense == {"self_attn.out_proj": "nn.MultiheadAttention reads the weight itself"}
    with torch.no_grad():
        fast = model(x)
    torch.testing.assert_close(fast, model(x))


def test_zeros_already_there():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.no_grad():
        model[1].weight[:32, 32:] = 0
    masks = sp.nonzero_masks(model, (32, 32))
    assert list(masks) == ["1"] and masks["1"].tolist() == [[True, False], [True, True]]
    with pytest.raises(sp.SparsePruneError, match="blocksize: expected two positive integers"):
        sp.nonzero_masks(model, (0, 32))


def test_a_model_with_no_linear():
    with pytest.raises(sp.SparsePruneError, match="model: expected a module with nn.Linear inside, got ReLU"):
        sp.sparsify_(nn.ReLU())


def test_layers_that_blocks_do_not_suit_stay_dense():
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 2), nn.Linear(16, 2))
    result = sp.sparsify_(model)
    assert result.converted == ["0"]
    assert result.kept_dense == {
        "1": "blocks of 32x32, cut by its edge, would store more than it has",
        "2": "blocks of 32x32 do not fit it",
    }
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 2))
    with pytest.raises(sp.SparsePruneError, match=r"blocksize: expected a block that fits .* \(10, 10\)"):
        sp.sparsify_(model)


def test_what_sparsify_cannot_replace_is_refused():
    with pytest.raises(sp.SparsePruneError, match="got one itself; use SparseLinear.from_dense"):
        sp.sparsify_(nn.Linear(64, 64))  # which nothing holds: it would stay as it is
    model = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(sp.SparsePruneError, match="config: expected a BlockSparseConfig, got 0.2"):
        sp.sparsify_(model, 0.2)
    sp.sparsify_(model)
    with pytest.raises(sp.SparsePruneError, match="got one whose linear layers are sparse already"):
        sp.sparsify_(model)


def test_masks_for_a_module_that_is_not_there():
    with pytest.raises(sp.SparsePruneError, match="masks: expected names of nn.Linear modules of the model, got 9"):
        sp.sparsify_(nn.Sequential(nn.Linear(64, 64)), masks={"9": torch.ones(2, 2, dtype=torch.bool)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"density": 0}, "density"),
        ({"max_density": 2}, "max_density"),
        ({"tokens": 0}, "tokens"),
        ({"blocksize": (0, 1)}, "blocksize"),
    ],
)
def test_bad_config(change, message):
    with pytest.raises(sp.SparsePruneError, match=f"^{message}: expected"):
        sp.BlockSparseConfig(**change)


@pytest.mark.parametrize("how", ["sparsify_", "load_packed"])
def test_pytorchs_own_encoder_runs_its_sparse_layers_in_evaluation(how, tmp_path, monkeypatch):
    def build() -> nn.Module:
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 2).eval()

    model = build()
    sp.sparsify_(model, sp.BlockSparseConfig(blocksize=(16, 16), density=0.5))
    if how == "load_packed":
        model = sp.load_packed(build(), sp.save_packed(model, tmp_path / "m.safetensors"))
    layers = [module for module in model.modules() if isinstance(module, sp.SparseLinear)]
    x, padding = torch.randn(2, 9, 64), torch.zeros(2, 9, dtype=torch.bool)
    padding[1, 6:] = True
    calls = []
    for layer in layers:
        layer.register_forward_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(sp.SparseLinear, "weight", property(lambda layer: pytest.fail("made dense")))
    for mask in (None, padding):
        with torch.inference_mode():
            model(x, src_key_padding_mask=mask)
        assert len(calls) == len(layers) == 4
        calls.clear()


def test_a_model_on_the_meta_device_has_nothing_to_prune():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(sp.SparsePruneError, match="0.weight: expected numbers, got none, on the meta device"):
        sp.sparsify_(model, sp.BlockSparseConfig((16, 16)))
    with pytest.raises(sp.SparsePruneError, match="0.weight: expected numbers, got none, on the meta device"):
        sp.Pruner(model, sp.PruneConfig(blocksize=(16, 16)))
    with pytest.raises(sp.SparsePruneError, match="0.weight: expected numbers, got none, on the meta device"):
        sp.nonzero_masks(model, (16, 16))


def feed_forward_models():
    transformers = pytest.importorskip("transformers")
    garlic = pytest.importorskip("sparse_prune.models.garlic")
    sizes = {"vocab_size": 50, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    llama = transformers.LlamaConfig(**sizes, intermediate_size=96, mlp_bias=True)
    yield transformers.BertModel(transformers.BertConfig(**sizes, intermediate_size=96))
    yield transformers.DistilBertModel(
        transformers.DistilBertConfig(vocab_size=50, dim=64, n_layers=2, n_heads=2, hidden_dim=96)
    )
    yield garlic.GarlicModel(
        garlic.GarlicConfig(**sizes, intermediate_size=96, max_distance=4, ngram_buckets=64, ngram_size=8)
    )
    yield transformers.LlamaModel(llama)


@pytest.mark.parametrize("which", range(4), ids=["bert", "distilbert", "garlic", "llama"])
def test_dead_neurons_are_put_last(which):
    model, ids = list(feed_forward_models())[which].double().eval(), torch.arange(5, 21).view(2, 8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for layers, out in fuse.feed_forwards(model):
            out.weight[:, 1::3] = 0  # 32 that nothing reads
            layers[-1].weight[::3] = 0  # 32, of which the first is made by its bias
            layers[-1].bias[3::3] = 0
        before = model(ids, torch.ones_like(ids))[0]
        assert sp.gather_neurons_(model) == (2 * 63, 2 * 96)
        torch.testing.assert_close(model(ids, torch.ones_like(ids))[0], before, rtol=1e-12, atol=1e-12)
        for layers, out in fuse.feed_forwards(model):
            for layer in layers:
                assert not layer.weight[33:].any() and not layer.bias[33:].any() and layer.bias[:33].all()
            assert not out.weight[:, 33:].any() and out.weight[:, :33].all()
        assert sp.gather_neurons_(model) == (2 * 63, 2 * 96), "as it is"
        torch.testing.assert_close(model(ids, torch.ones_like(ids))[0], before, rtol=1e-12, atol=1e-12)
