"""Packed checkpoints in vLLM: its model, loader and linear layers; all but attention, whose kernels in its wheel are for GPUs.

Skipped where vLLM cannot be imported: its wheel wants CUDA builds of torch, so the extra `test` leaves it out. docs/huggingface.md
says how to run this on a CPU.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

import sparse_prune as sp
from sparse_prune.serialization import describe_layers

DENSE = ("lm_head", "model.layers.0.self_attn.k_proj")


def test_vllm_finds_the_plugin():
    (found,) = (e for e in importlib.metadata.entry_points(group="vllm.general_plugins") if e.name == "sparse_prune")
    assert found.value == "sparse_prune.integrations.vllm:register"


@pytest.fixture(scope="module")
def vllm(tmp_path_factory):
    """vLLM on one CPU, with the plugin registered as vLLM itself does it."""
    os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")
    try:
        import vllm.model_executor.layers.linear  # noqa: F401
        from vllm import config, distributed, plugins
    except ImportError as error:
        pytest.skip(f"vLLM cannot be imported: {error}")
    with pytest.MonkeyPatch.context() as patch:
        # vLLM 0.33 is made for torch 2.14; 2.13 does not let a process without an accelerator empty one's cache.
        patch.setattr(torch.accelerator, "empty_cache", lambda: None)
        plugins.load_general_plugins()
        with config.set_current_vllm_config(config.VllmConfig(device_config=config.DeviceConfig("cpu"))):
            place = tmp_path_factory.mktemp("vllm") / "store"
            distributed.init_distributed_environment(1, 0, f"file://{place}", 0, backend="gloo")
            distributed.initialize_model_parallel(1)
            yield config
        distributed.destroy_model_parallel()
        distributed.destroy_distributed_environment()


@pytest.fixture(scope="module")
def llamas(vllm, tmp_path_factory):
    """(transformers' model, vLLM's from the packed checkpoint of it): one projection of a merged layer stayed dense."""
    transformers = pytest.importorskip("transformers")
    from vllm.model_executor.model_loader import get_model

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    ours = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval().requires_grad_(False)
    config = sp.BlockSparseConfig(blocksize=(16, 16), density=0.4)
    assert len(sp.sparsify_(ours, config, lambda name, _: name not in DENSE).converted) == 13
    folder = tmp_path_factory.mktemp("llama")
    ours.save_pretrained(folder)
    model = vllm.ModelConfig(model=str(folder), skip_tokenizer_init=True, dtype="float32", enforce_eager=True)
    assert model.quantization == "sparse_prune"
    # custom_ops none: PyTorch's LayerNorm, rotation and activation in the place of vLLM's C++, which is not in this wheel.
    plain = vllm.CompilationConfig(custom_ops=["none"])
    whole = vllm.VllmConfig(
        model_config=model,
        device_config=vllm.DeviceConfig("cpu"),
        compilation_config=plain,
        load_config=vllm.LoadConfig(),
    )
    with vllm.set_current_vllm_config(whole):
        return ours, get_model(vllm_config=whole).requires_grad_(False)


def test_merged_layers_hold_what_the_checkpoint_does(llamas):
    ours, theirs = llamas
    x = torch.randn(5, 64)
    for a, b in zip(ours.model.layers, theirs.model.layers, strict=True):
        for merged, names, block in (
            (b.self_attn.qkv_proj, ("q_proj", "k_proj", "v_proj"), a.self_attn),
            (b.self_attn.o_proj, ("o_proj",), a.self_attn),
            (b.mlp.gate_up_proj, ("gate_proj", "up_proj"), a.mlp),
        ):
            wanted = torch.cat([getattr(block, name)(x) for name in names], -1)
            torch.testing.assert_close(merged(x)[0], wanted, rtol=0, atol=0)
    kinds = [[type(piece) for piece in layer.self_attn.qkv_proj.pieces] for layer in theirs.model.layers]
    assert kinds == [[sp.SparseLinear, torch.nn.Linear, sp.SparseLinear], [sp.SparseLinear]]
    blocks = sum(m.values.numel() for m in theirs.modules() if isinstance(m, sp.SparseLinear))
    assert blocks == sum(m.values.numel() for m in ours.modules() if isinstance(m, sp.SparseLinear))
    assert not [name for name, _ in theirs.named_parameters() if name.endswith("_proj.values")], "kept twice"


def test_the_whole_model_computes_the_same_logits(llamas, monkeypatch):
    ours, theirs = llamas

    def attend(layer, q, k, v, *_, **__):
        """Causal attention by PyTorch: vLLM's own for a CPU is C++ that its wheel lacks."""
        heads = [t.view(len(t), -1, layer.head_size).transpose(0, 1) for t in (q, k, v)]
        y = F.scaled_dot_product_attention(
            *(t[None] for t in heads), is_causal=True, scale=layer.impl.scale, enable_gqa=True
        )
        return y[0].transpose(0, 1).flatten(1)

    monkeypatch.setattr(type(theirs.model.layers[0].self_attn.attn), "forward", attend)
    ids = torch.randint(0, 128, (11,))
    hidden = theirs(ids, torch.arange(11))
    torch.testing.assert_close(theirs.lm_head.weight[:128], ours.lm_head.weight)
    logits = F.linear(hidden, theirs.lm_head.weight[:128])
    torch.testing.assert_close(logits, ours(ids[None]).logits[0], rtol=1e-4, atol=1e-5)


def test_a_merged_layer_compiles_whole(llamas):
    _, theirs = llamas
    for layer in theirs.model.layers:
        compiled = torch.compile(layer.self_attn.qkv_proj, fullgraph=True, dynamic=True, backend="aot_eager")
        for tokens in (1, 5):
            x = torch.randn(tokens, 64)
            torch.testing.assert_close(compiled(x)[0], layer.self_attn.qkv_proj(x)[0], rtol=0, atol=0)


def _made(layer: str, bias: bool = True, **options):
    """A ReplicatedLinear of vLLM's for the packed layer `layer`, filled from its tensors as vLLM's loaders do it."""
    from vllm.model_executor.layers.linear import ReplicatedLinear

    torch.manual_seed(1)
    linear = torch.nn.Linear(48, 80, bias=bias)
    sparse = sp.SparseLinear.from_dense(linear, sp.block_mask(linear.weight, (32, 16), density=0.5), (32, 16))
    if layer == "int8":
        sparse.quantize_()
    model = torch.nn.ModuleDict({layer: sparse})
    from sparse_prune.integrations.vllm import SparsePruneVllmConfig

    config = SparsePruneVllmConfig.from_config(
        {
            "version": "1" if layer == "plain" else "2",
            "layers": {name: str(entry) for name, entry in describe_layers(model).items()},
        }
    )
    theirs = ReplicatedLinear(48, options.pop("rows", 80), bias=bias, quant_config=config, prefix=layer, **options)
    return sparse, theirs


def _fill(theirs, sparse, without: str = "") -> None:
    for name, tensor in sparse.state_dict().items():
        if name != without:
            parameter = getattr(theirs, name)
            parameter.weight_loader(parameter, tensor)
    theirs.quant_method.process_weights_after_loading(theirs)


@pytest.mark.parametrize("kind", ["plain", "int8"])
@pytest.mark.parametrize(
    "options", [{}, {"skip_bias_add": True}, {"bias": False}], ids=["bias", "skip_bias_add", "no bias"]
)
def test_one_layer(vllm, kind, options):
    sparse, theirs = _made(kind, **options)
    _fill(theirs, sparse)
    x = torch.randn(3, 48)
    y, bias = theirs(x)
    if options.get("skip_bias_add"):
        y = y + bias
    torch.testing.assert_close(y, sparse(x), rtol=1e-6, atol=1e-6)


def test_dtype_is_vllms(vllm):
    sparse, theirs = _made("plain", params_dtype=torch.bfloat16)
    _fill(theirs, sparse)
    x = torch.randn(3, 48).bfloat16()
    torch.testing.assert_close(theirs(x)[0], sparse.bfloat16()(x), rtol=0, atol=0)


def test_what_does_not_fit_is_said(vllm):
    from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    sparse, theirs = _made("plain")
    with pytest.raises(sp.SparsePruneError, match=r"plain.values: expected a tensor in the checkpoint, got none"):
        _fill(theirs, sparse, without="values")
    sparse, theirs = _made("plain")
    sparse.col_indices[0] = 99
    with pytest.raises(sp.SparsePruneError, match=r"plain.col_indices"):
        _fill(theirs, sparse)
    with pytest.raises(sp.SparsePruneError, match=r"expected shape \(64, 48\), as in vLLM's model, got \(80, 48\)"):
        _made("plain", rows=64)
    config = theirs.quant_config
    with pytest.raises(sp.SparsePruneError, match="tensor_parallel_size: expected shares in multiples of 32.*got 40"):
        ColumnParallelLinear(48, 80, quant_config=config, prefix="plain", tp_rank=0, tp_size=2)
    with pytest.raises(sp.SparsePruneError, match="ParallelLMHead plain"):
        ParallelLMHead(80, 48, quant_config=config, prefix="plain")
    with pytest.raises(sp.SparsePruneError, match="quantization_config.version: expected a packed .* got 9;.*update"):
        type(config).from_config({"version": "9", "layers": {}})
    with pytest.raises(sp.SparsePruneError, match="a description of the packed layers"):
        type(config).from_config({"version": "1", "layers": {"plain": {"shape": "none"}}})
    assert (
        RowParallelLinear(48, 80, quant_config=config, prefix="dense").quant_method.__class__.__name__
        == "UnquantizedLinearMethod"
    )


BERT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}


@pytest.mark.parametrize("dense", ["layer.0.attention.self.key", "pooler"], ids=["one part dense", "encoder"])
def test_bert_finds_its_attention_layers(vllm, tmp_path, monkeypatch, dense):
    """vLLM's BERT names attention.self.query and its like attention.output.qkv_proj."""
    transformers = pytest.importorskip("transformers")
    from vllm.model_executor.model_loader import get_model

    torch.manual_seed(0)
    config = transformers.BertConfig(**BERT, num_labels=3)
    ours = transformers.BertForSequenceClassification(config).eval().requires_grad_(False)
    chosen = sp.BlockSparseConfig(blocksize=(16, 16), density=0.4)
    sp.sparsify_(ours, chosen, lambda name, _: "encoder" in name and dense not in name)
    ours.save_pretrained(tmp_path)
    model = vllm.ModelConfig(model=str(tmp_path), skip_tokenizer_init=True, dtype="float32", enforce_eager=True)
    plain = vllm.CompilationConfig(custom_ops=["none"])
    device = vllm.DeviceConfig("cpu")
    whole = vllm.VllmConfig(
        model_config=model, device_config=device, compilation_config=plain, load_config=vllm.LoadConfig()
    )
    with vllm.set_current_vllm_config(whole):
        theirs = get_model(vllm_config=whole).requires_grad_(False)
    merged = [layer.attention.self.qkv_proj for layer in theirs.bert.encoder.layer]
    assert all(isinstance(piece, sp.SparseLinear) for piece in merged[1].pieces)
    assert len(merged[0].pieces) == (3 if "key" in dense else 1) and len(merged[1].pieces) == 1

    def attend(layer, q, k, v, *_, **__):
        heads = [t.view(len(t), -1, layer.head_size).transpose(0, 1)[None] for t in (q, k, v)]
        y = F.scaled_dot_product_attention(*heads, scale=layer.impl.scale)
        return y[0].transpose(0, 1).flatten(1)

    monkeypatch.setattr(type(theirs.bert.encoder.layer[0].attention.self.attn), "forward", attend)
    ids = torch.randint(0, 128, (11,))
    hidden = theirs(ids.clone(), torch.arange(11))
    torch.testing.assert_close(hidden, ours.bert(ids[None])[0][0], rtol=1e-4, atol=1e-5)


RANK = """
import sys, torch, vllm.model_executor.layers.linear as layers
import sparse_prune as sp
from sparse_prune.integrations.vllm import SparsePruneVllmConfig
from sparse_prune.serialization import describe_layers
from vllm import config, distributed
rank, place = int(sys.argv[1]), sys.argv[2]
torch.accelerator.empty_cache = lambda: None
torch.manual_seed(0)
with config.set_current_vllm_config(config.VllmConfig(device_config=config.DeviceConfig("cpu"))):
    distributed.init_distributed_environment(2, rank, f"file://{place}", rank, backend="gloo")
    distributed.initialize_model_parallel(2)
    def sparse(k, n, quantize=False):
        linear = torch.nn.Linear(k, n)
        layer = sp.SparseLinear.from_dense(linear, sp.block_mask(linear.weight, (16, 8), density=0.5), (16, 8))
        return layer.quantize_() if quantize else layer.requires_grad_(False)
    names = {"column": (64, 96), "row": (96, 64), "gate": (64, 96), "up": (64, 96), "q": (64, 64), "k": (64, 32), "v": (64, 32)}
    whole = torch.nn.ModuleDict({name: sparse(*size) for name, size in names.items()} | {"row8": sparse(96, 64, True)})
    described = {name: str(entry) for name, entry in describe_layers(whole).items() if name != "up"}
    whole["up"] = whole["up"].to_dense()  # one part of a merged layer that stayed dense
    quant = SparsePruneVllmConfig.from_config({"version": "2", "layers": described})
    quant.packed_modules_mapping = {"gate_up": ["gate", "up"], "qkv": ["q", "k", "v"], "qkv1": ["q", "k1", "v1"]}
    def fill(layer, parts):
        for shard, name in parts.items():
            for kind, tensor in whole[name].state_dict().items():
                parameter = getattr(layer, kind)
                own = shard if shard is not None else ()
                parameter.weight_loader(parameter, tensor, *([own] if shard is not None else []))
        layer.quant_method.process_weights_after_loading(layer)
        return layer
    def cut(y, sizes):
        parts = y.split(sizes, -1)
        return torch.cat([part.chunk(2, -1)[rank] for part in parts], -1)
    x = torch.randn(5, 64)
    column = fill(layers.ColumnParallelLinear(64, 96, quant_config=quant, prefix="column"), {None: "column"})
    torch.testing.assert_close(column(x)[0], cut(whole["column"](x), [96]))
    wide = torch.randn(5, 96)
    for name, close in (("row", {}), ("row8", {"rtol": 0.05, "atol": 0.05})):
        row = fill(layers.RowParallelLinear(96, 64, quant_config=quant, prefix=name), {None: name})
        torch.testing.assert_close(row(wide.chunk(2, -1)[rank])[0], whole[name](wide), **close)
    gate_up = fill(layers.MergedColumnParallelLinear(64, [96, 96], quant_config=quant, prefix="gate_up"), {0: "gate", 1: "up"})
    both = torch.cat([whole["gate"](x), whole["up"](x)], -1)
    torch.testing.assert_close(gate_up(x)[0], cut(both, [96, 96]))
    qkv = fill(layers.QKVParallelLinear(64, 16, 4, 2, quant_config=quant, prefix="qkv"), {"q": "q", "k": "k", "v": "v"})
    all_three = torch.cat([whole[name](x) for name in "qkv"], -1)
    torch.testing.assert_close(qkv(x)[0], cut(all_three, [64, 32, 32]))
    # One head of k and v for two ranks: both hold it.
    for name in ("k", "v"):
        whole[name + "1"] = sparse(64, 16)
        quant.layers[name + "1"] = describe_layers(whole)[name + "1"]
    qkv = fill(layers.QKVParallelLinear(64, 16, 4, 1, quant_config=quant, prefix="qkv1"), {"q": "q", "k": "k1", "v": "v1"})
    torch.testing.assert_close(qkv(x)[0], torch.cat([cut(whole["q"](x), [64]), whole["k1"](x), whole["v1"](x)], -1))
    distributed.destroy_model_parallel()
    distributed.destroy_distributed_environment()
print("equal")
"""


def test_two_ranks_hold_a_layer_between_them(vllm, tmp_path):
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"VLLM_TARGET_DEVICE": "cpu"},
        )
        for rank in range(2)
    ]
    for rank in ranks:
        output, _ = rank.communicate(timeout=300)
        assert rank.returncode == 0 and output.strip().endswith("equal"), output[-4000:]
