from __future__ import annotations

import copy
import json
import subprocess
import sys
import threading

import pytest
import safetensors.torch
import torch

import sparse_prune as sp
from sparse_prune import serialization
from sparse_prune.heads import find_heads

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
TEXT = {"input_ids": torch.arange(12).view(2, 6)}
FAMILIES = {
    "bert": ("BertForSequenceClassification", "BertConfig", SMALL | {"vocab_size": 50, "num_labels": 3}),
    "minilm": (
        "BertModel",
        "BertConfig",
        SMALL | {"hidden_size": 96, "intermediate_size": 384, "num_attention_heads": 12, "vocab_size": 50},
    ),
    "roberta": ("RobertaForTokenClassification", "RobertaConfig", SMALL | {"vocab_size": 50}),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4, "vocab_size": 50},
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", SMALL | {"image_size": 32, "patch_size": 8, "num_labels": 4}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 50}),
    "llama": (
        "LlamaForCausalLM",
        "LlamaConfig",
        SMALL | {"num_key_value_heads": 2, "vocab_size": 50, "tie_word_embeddings": False},
    ),
}


def build(family: str) -> tuple[torch.nn.Module, dict]:
    model, config, settings = FAMILIES[family]
    model = getattr(transformers, model)(getattr(transformers, config)(**settings))
    return model, {"pixel_values": torch.randn(2, 3, 32, 32)} if family == "vit" else TEXT


def inside(name: str, _: object) -> bool:
    return "layer" in name or ".h." in name


def auto(model: torch.nn.Module) -> type:
    for name in ("SequenceClassification", "TokenClassification", "ImageClassification", "CausalLM"):
        if type(model).__name__.endswith(f"For{name}"):
            return getattr(transformers, f"AutoModelFor{name}")
    return transformers.AutoModelForCausalLM if "LMHead" in type(model).__name__ else transformers.AutoModel


def first(outputs) -> torch.Tensor:
    return outputs[0].detach()


def sparse_layers(model: torch.nn.Module) -> list[sp.SparseLinear]:
    return [module for module in model.modules() if isinstance(module, sp.SparseLinear)]


@pytest.fixture
def packed(tmp_path):
    model, _ = build("bert")
    sp.sparsify_(model.eval(), sp.BlockSparseConfig(blocksize=(16, 16), density=0.3), inside)
    sp.save_packed(model, tmp_path / "packed")
    return model, tmp_path / "packed"


def load(path, **kwargs):
    return transformers.AutoModelForSequenceClassification.from_pretrained(path, **kwargs).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_prunes_packs_saves_and_loads(family, tmp_path):
    model, inputs = build(family)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = sp.PruneConfig(
        "taylor", scope="local", density=0.4, blocksize=(16, 16), total_steps=3, warmup=0, update_every=1
    )
    pruner = sp.Pruner(model, config, inside).attach(optimizer)
    for _ in range(3):
        model(**inputs)[0].square().mean().backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
    assert pruner.density() == pytest.approx(0.4, abs=0.05)
    dense = copy.deepcopy(model).eval()
    result = sp.sparsify_(model.eval(), sp.BlockSparseConfig(blocksize=(16, 16)), inside, pruner.masks)
    assert len(result.converted) == len(sparse_layers(model)) >= 8
    assert result.density == pytest.approx(pruner.density())
    torch.testing.assert_close(first(model(**inputs)), first(dense(**inputs)))

    model.save_pretrained(tmp_path / "saved", max_shard_size="60KB")
    shards = list((tmp_path / "saved").glob("*.safetensors"))
    assert len(shards) > 1 and all("sparse_prune" in serialization.read_tensors(shard)[1] for shard in shards)
    loaded, info = auto(model).from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert type(loaded) is type(model) and not any(info[key] for key in ("missing_keys", "unexpected_keys"))
    assert len(sparse_layers(loaded)) == len(sparse_layers(model))
    assert torch.equal(first(loaded.eval()(**inputs)), first(model(**inputs)))


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_are_found(family):
    model, _ = build(family)
    heads = find_heads(model)
    assert len(heads) == 2 and {group.num_heads for group in heads} <= {2, 4, 12}
    settings = sp.PruneConfig(
        "magnitude", "oneshot", density=0.5, granularity="head", total_steps=1, warmup=0, cooldown=0
    )
    pruner = sp.Pruner(model, settings)
    pruner.step()
    assert pruner.density() == pytest.approx(0.5, abs=0.01)


def test_conv1d_is_its_linear(tmp_path):
    from transformers.pytorch_utils import Conv1D

    conv = Conv1D(48, 32)
    linear = torch.nn.Linear(32, 48)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.t())
        linear.bias.copy_(conv.bias)
    x, results = torch.randn(5, 32), []
    for module in (conv, linear):
        model = torch.nn.Sequential(module)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        config = sp.PruneConfig("movement", density=0.5, blocksize=(16, 8), total_steps=4, warmup=0, update_every=1)
        pruner = sp.Pruner(model, config).attach(optimizer)
        for _ in range(4):
            model(x).square().sum().backward()
            optimizer.step()
            pruner.step()
            optimizer.zero_grad()
        assert pruner.masks["0"].shape == (3, 4)
        sp.sparsify_(model, sp.BlockSparseConfig(blocksize=(16, 8)), masks=pruner.masks)
        results.append((pruner.masks["0"], model[0].weight.detach()))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


def test_round_trip_through_from_pretrained(packed, tmp_path):
    model, path = packed
    loaded = load(path)
    assert isinstance(loaded.bert.encoder.layer[0].attention.self.query, sp.SparseLinear)
    assert torch.equal(loaded(**TEXT).logits, model(**TEXT).logits)
    loaded.save_pretrained(tmp_path / "again")
    assert serialization.is_packed(tmp_path / "again")
    assert torch.equal(load(tmp_path / "again")(**TEXT).logits, model(**TEXT).logits)
    fresh = transformers.BertForSequenceClassification(model.config).eval()
    assert torch.equal(sp.load_packed(fresh, tmp_path / "again")(**TEXT).logits, model(**TEXT).logits)


def test_a_head_comes_off_and_another_goes_on(packed, tmp_path):
    model, path = packed
    base = transformers.AutoModel.from_pretrained(path).eval()
    assert len(sparse_layers(base)) == len(sparse_layers(model))
    assert torch.equal(base(**TEXT)[0], model.bert(**TEXT)[0])
    base.save_pretrained(tmp_path / "base")
    tagger = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "base").eval()
    assert torch.equal(tagger.bert(**TEXT)[0], model.bert(**TEXT)[0])


# Modules that stay on the CPU, and one that goes to disk.
OFFLOADED = {
    "bert": (("bert.embeddings", "bert.pooler", "classifier"), "bert.encoder"),
    "gpt2": (("transformer.wte", "transformer.wpe", "transformer.ln_f", "lm_head"), "transformer.h"),
    "llama": (("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "model.layers"),
}


@pytest.mark.parametrize("options", [{}, {"device_map": {"": "cpu"}}], ids=["read here", "by transformers"])
@pytest.mark.parametrize("family", OFFLOADED)
def test_dtype_and_dequantize(tmp_path, family, options):
    model, inputs = build(family)
    sp.sparsify_(model.eval(), sp.BlockSparseConfig(blocksize=(16, 16), density=0.3), inside)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    half = auto(model).from_pretrained(tmp_path, dtype=torch.bfloat16, **options).eval()
    assert half.dtype == torch.bfloat16
    for layer in sparse_layers(half):
        assert layer.values.dtype == torch.bfloat16 and layer.crow_indices.dtype == torch.int32
    torch.testing.assert_close(first(half(**inputs)).float(), first(model(**inputs)), atol=0.05, rtol=0.05)
    dense = auto(model).from_pretrained(tmp_path, **options).eval().dequantize()
    assert not sparse_layers(dense)
    torch.testing.assert_close(first(dense(**inputs)), first(model(**inputs)))


def test_a_half_precision_model_says_so(packed, tmp_path):
    model, _ = packed
    sp.save_packed(model.to(torch.bfloat16), tmp_path / "half")
    loaded = load(tmp_path / "half", dtype="auto")
    assert loaded.dtype == torch.bfloat16 and torch.equal(loaded(**TEXT).logits, model(**TEXT).logits)


@pytest.mark.parametrize("quantized", [None, "int8", "float8_e4m3fn"])
def test_half_and_float_cast_what_a_dense_model_casts(packed, tmp_path, quantized):
    model, _ = packed
    if quantized:
        sp.quantize_(model, dtype=getattr(torch, quantized))
    model.save_pretrained(tmp_path / "saved")
    for cast in (model, load(tmp_path / "saved")):
        expected = cast(**TEXT).logits
        assert cast.half().dtype == torch.float16 and cast(**TEXT).logits.dtype == torch.float16
        assert {layer.values.dtype for layer in sparse_layers(cast)} == {getattr(torch, quantized or "float16")}
        cast.save_pretrained(tmp_path / "half")
        assert torch.equal(load(tmp_path / "half", dtype="auto")(**TEXT).logits, cast(**TEXT).logits)
        assert cast.float().dtype == torch.float32
        torch.testing.assert_close(cast(**TEXT).logits, expected, atol=0.01, rtol=0.01)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}, "disk"])
@pytest.mark.parametrize(("family", "shard"), [("bert", "1GB"), ("bert", "60KB"), ("gpt2", "60KB"), ("llama", "60KB")])
def test_device_map(tmp_path, family, shard, device_map):
    pytest.importorskip("accelerate")
    model, inputs = build(family)
    sp.sparsify_(model.eval(), sp.BlockSparseConfig(blocksize=(16, 16), density=0.3), inside)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len([*tmp_path.glob("*.safetensors")]) > 1) == (shard == "60KB")
    if device_map == "disk":
        here, there = OFFLOADED[family]
        device_map = dict.fromkeys(here, "cpu") | {there: "disk"}
    folder = str(tmp_path / "offload")
    loaded = auto(model).from_pretrained(tmp_path, device_map=device_map, offload_folder=folder).eval()
    assert len(sparse_layers(loaded)) == len(sparse_layers(model))
    exact = {} if loaded.device.type == "cuda" else {"rtol": 0, "atol": 0}
    inputs_there = {name: tensor.to(loaded.device) for name, tensor in inputs.items()}
    for _ in range(2):
        torch.testing.assert_close(first(loaded(**inputs_there)).cpu(), first(model(**inputs)), **exact)
    with torch.no_grad():
        torch.testing.assert_close(first(loaded(**inputs_there)).cpu(), first(model(**inputs)))


@pytest.mark.parametrize("options", [{}, {"device_map": {"": "cpu"}}], ids=["read here", "by transformers"])
def test_who_reads_the_sparse_layers(packed, monkeypatch, options):
    from sparse_prune.integrations import hf

    model, path = packed
    waited, made = [], []
    read, empty = hf._read, hf._empty_layer
    monkeypatch.setattr(hf, "_read", lambda awaited, *values: waited.extend(awaited) or read(awaited, *values))
    monkeypatch.setattr(hf, "_empty_layer", lambda *arguments: made.append(arguments) or empty(*arguments))
    auto = transformers.AutoModelForSequenceClassification
    loaded, told = auto.from_pretrained(path, output_loading_info=True, **options)
    assert (len(waited), len(made)) == ((0, 12) if options else (12, 0))
    assert not any(told[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not loaded.training and all(layer.values.requires_grad for layer in sparse_layers(loaded))
    assert {type(layer) for layer in sparse_layers(loaded)} == {sp.SparseLinear}
    assert loaded.config.quantization_config.layers == model.config.quantization_config.layers
    torch.testing.assert_close(first(loaded(**TEXT)), first(model(**TEXT)), rtol=0, atol=0)


def test_what_is_read_here_must_be_what_the_config_says(packed):
    _, path = packed
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    name = next(key for key in tensors if key.endswith("query.values"))
    tensors[name] = tensors[name][:-1]
    safetensors.torch.save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(sp.SparsePruneError, match=r"query.values: expected \d+ blocks, as config.json says"):
        load(path)


@pytest.mark.parametrize(
    ("part", "change", "match"),
    [
        ("values", lambda t: t.to(torch.int32), "query.values: expected float32"),
        ("values", lambda t: t.transpose(1, 2).reshape(len(t), 8, 32).contiguous(), r"query.values: expected shape"),
        ("col_indices", lambda t: t[:-1].clone(), "query.col_indices: expected shape"),
        ("col_indices", lambda t: t.float(), "query.col_indices: expected int32"),
        ("crow_indices", lambda t: t.flip(0), "query.crow_indices: expected a first entry of 0"),
        ("bias", lambda t: t[:-1].clone(), r"query.bias: expected shape \(64,\)"),
        ("bias", lambda t: t.int(), r"query.bias: expected shape \(64,\) in floating point"),
    ],
)
def test_each_tensor_that_is_read_here_is_checked(packed, part, change, match):
    _, path = packed
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    name = next(key for key in tensors if key.endswith(f"query.{part}"))
    tensors[name] = change(tensors[name])
    safetensors.torch.save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(sp.SparsePruneError, match=match):
        load(path)


def test_int8_layers_are_read_and_checked(packed, tmp_path):
    model, _ = packed
    sp.quantize_(model, lambda name, _: name.endswith("query"))
    model.save_pretrained(tmp_path / "int8")
    loaded = load(tmp_path / "int8", dtype=torch.float32)
    assert loaded.config.quantization_config.version == "2"
    assert torch.equal(loaded(**TEXT).logits, model(**TEXT).logits)
    tensors = safetensors.torch.load_file(tmp_path / "int8" / "model.safetensors")
    next(tensors[key] for key in tensors if key.endswith("query.scales"))[1] = 0
    safetensors.torch.save_file(tensors, tmp_path / "int8" / "model.safetensors", {"format": "pt"})
    with pytest.raises(sp.SparsePruneError, match="query.scales: expected finite positive numbers"):
        load(tmp_path / "int8")


def test_hooks_and_names_stay_where_a_layer_becomes_sparse():
    linear = torch.nn.Linear(32, 48)
    model, seen = torch.nn.ModuleDict({"a": linear, "b": linear}), []
    linear.register_forward_hook(lambda *_: seen.append(1))
    packed = sp.BsrWeight.from_dense(linear.weight, torch.ones(3, 2, dtype=torch.bool), (16, 16))
    bias, x = linear.bias.detach(), torch.randn(2, 32)
    expected = linear(x)
    index = (packed.crow_indices, packed.col_indices)
    layer = sp.SparseLinear.become(linear, 32, 48, *index, packed.values.detach(), bias)
    assert layer is linear and layer is model["b"] and dict(layer.named_parameters()).keys() == {"values", "bias"}
    torch.testing.assert_close(model["a"](x), expected)
    assert seen == [1, 1]


class Twice(transformers.PreTrainedModel):
    """A model with one linear layer under two names, as models with shared layers have it."""

    config_class = transformers.BertConfig
    _tied_weights_keys = {"again.weight": "once.weight", "again.bias": "once.bias"}

    def __init__(self, config):
        super().__init__(config)
        self.once = torch.nn.Linear(64, 64)
        self.again = self.once
        self.norm = torch.nn.LayerNorm(64)
        self.post_init()

    def forward(self, x):
        return self.again(self.norm(self.once(x)))


def test_a_layer_under_two_names(tmp_path):
    model, x = Twice(transformers.BertConfig()).eval(), torch.randn(3, 64)
    assert sp.sparsify_(model, sp.BlockSparseConfig((16, 16), 0.5)).converted == ["once"]
    model.save_pretrained(tmp_path)
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert sum(key.endswith(".values") for key in stored) == 1
    loaded = Twice.from_pretrained(tmp_path)
    assert isinstance(loaded.once, sp.SparseLinear) and loaded.again is loaded.once
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)
    loaded.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(Twice.from_pretrained(tmp_path / "again")(x), model(x), rtol=0, atol=0)
    with pytest.raises(
        sp.SparsePruneError, match=r"device_map: expected none .* got again.\w+, which is once.\w+; leave it out"
    ):
        Twice.from_pretrained(tmp_path, device_map={"": "cpu"})


def test_pipeline(packed):
    model, path = packed
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    tokenizer = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    tokenizer.save_pretrained(path)
    found = transformers.pipeline("text-classification", model=str(path), device="cpu")("a b c d", top_k=None)
    expected = model(**tokenizer("a b c d", return_tensors="pt")).logits.softmax(-1)[0]
    scores = {entry["label"]: entry["score"] for entry in found}
    torch.testing.assert_close(torch.tensor([scores[f"LABEL_{i}"] for i in range(3)]), expected.detach())


def test_the_kept_blocks_train(packed):
    _, path = packed
    model = load(path).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = model.bert.encoder.layer[0].output.dense.values.detach().clone()
    model(**TEXT, labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    assert not torch.equal(model.bert.encoder.layer[0].output.dense.values, before)


def test_trainer_takes_a_packed_model(packed, tmp_path):
    pytest.importorskip("accelerate")
    _, path = packed
    model = load(path)
    pattern = model.bert.encoder.layer[0].output.dense.packed.block_mask()
    rows = [{"input_ids": torch.arange(6) + i, "labels": torch.tensor(i % 3)} for i in range(8)]
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path / "tuned"), max_steps=3, save_steps=3, per_device_train_batch_size=4, learning_rate=1e-3,
        use_cpu=True, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    transformers.Trainer(model, args, train_dataset=rows).train()
    tuned = load(tmp_path / "tuned" / "checkpoint-3")
    assert torch.equal(tuned(**TEXT).logits, model.eval()(**TEXT).logits)
    assert torch.equal(tuned.bert.encoder.layer[0].output.dense.packed.block_mask(), pattern)
    assert not torch.equal(tuned(**TEXT).logits, load(path)(**TEXT).logits)


def test_lora_beside_sparse_layers(packed, tmp_path):
    peft = pytest.importorskip("peft")
    model, path = packed
    base = load(path)
    tuned = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["query", "value"], lora_dropout=0.0))
    trained = {name.split(".")[-3] for name, p in tuned.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B"}
    assert torch.equal(tuned(**TEXT).logits, model(**TEXT).logits)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        tuned(**TEXT, labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tuned.eval().save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 40_000
    again = peft.PeftModel.from_pretrained(load(path), tmp_path / "adapter").eval()
    assert torch.equal(again(**TEXT).logits, tuned(**TEXT).logits)
    assert not torch.equal(tuned(**TEXT).logits, model(**TEXT).logits)
    with pytest.raises(sp.SparsePruneError, match="merge: expected an adapter on a dense layer"):
        tuned.merge_and_unload()


def test_damaged_indices_are_refused(packed):
    _, path = packed
    file = path / serialization.WEIGHTS_NAME
    tensors, metadata = serialization.read_tensors(file)
    name = "bert.encoder.layer.0.output.dense.col_indices"
    safetensors.torch.save_file(tensors | {name: tensors[name] + 99}, file, metadata)
    with pytest.raises(sp.SparsePruneError, match="col_indices: expected entries below 8"):
        load(path)


@pytest.mark.parametrize("part", ["crow_indices", "values", "bias"])
def test_missing_tensors_are_refused(packed, part):
    _, path = packed
    file = path / serialization.WEIGHTS_NAME
    tensors, metadata = serialization.read_tensors(file)
    del tensors[f"bert.encoder.layer.0.output.dense.{part}"]
    safetensors.torch.save_file(tensors, file, metadata)
    with pytest.raises(sp.SparsePruneError, match=f"output.dense.{part}: expected a tensor, got none"):
        load(path)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_values_that_are_not_finite_are_refused(packed, value):
    _, path = packed
    file = path / serialization.WEIGHTS_NAME
    tensors, metadata = serialization.read_tensors(file)
    tensors["bert.encoder.layer.0.output.dense.values"][3, 2, 1] = value
    safetensors.torch.save_file(tensors, file, metadata)
    with pytest.raises(sp.SparsePruneError, match="output.dense.values: expected finite numbers"):
        load(path)


def test_finite_values_of_any_size_load(packed):
    _, path = packed
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    name = next(key for key in tensors if key.endswith("output.dense.values"))
    tensors[name][0, 0, 0] = 1e38  # whose square is no number
    safetensors.torch.save_file(tensors, path / "model.safetensors", {"format": "pt"})
    assert dict(load(path).named_parameters())[name].max() == torch.tensor(1e38)
    with pytest.raises(sp.SparsePruneError, match="output.dense.values: expected finite numbers"):
        load(path, dtype=torch.float16)


def test_values_are_read_beside_what_transformers_reads(packed, monkeypatch):
    from sparse_prune.integrations import hf

    _, path = packed
    threads, read = [], hf._read_values
    monkeypatch.setattr(hf, "_read_values", lambda awaited: threads.append(threading.current_thread()) or read(awaited))
    load(path)
    assert len(threads) == 1 and threads[0] is not threading.current_thread()


def test_damaged_config_is_refused(packed):
    _, path = packed
    config = json.loads((path / "config.json").read_text())
    layers = config["quantization_config"]["layers"]
    name = "bert.encoder.layer.0.output.dense"
    assert layers[name] == "64x128, 10 blocks of 16x16"
    for entry, match in (
        ("64x64, 10 blocks of 16x16", "expected a linear layer of 64 -> 64"),
        ("64x128, ten blocks of 16x16", f"a description of the packed layers, got {name}: "),
        (7, f"a description of the packed layers, got {name}: "),
        ({"shape": [64, 64], "blocksize": [16, 16], "nnzb": 10}, "expected a linear layer of 64 -> 64"),
    ):
        layers[name] = entry
        (path / "config.json").write_text(json.dumps(config))
        with pytest.raises(sp.SparsePruneError, match=match):
            load(path)
    layers[name] = {"shape": [64, 128], "blocksize": [16, 16], "nnzb": 10}
    (path / "config.json").write_text(json.dumps(config))
    load(path)
    # What transformers would fill with noise, and warn.
    layers["head"] = layers.pop(name)
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(sp.SparsePruneError, match="config.json: head: expected a linear layer of 128 -> 64"):
        load(path)
    del layers["head"]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(sp.SparsePruneError, match="expected the 12 sparse layers that the files hold, got 11"):
        load(path)


SPARSE_PRUNE_FIRST = """
import sys, torch
import sparse_prune as sp
assert not {"transformers", "triton", "matplotlib", "peft", "accelerate"} & set(sys.modules)
from transformers import AutoConfig
assert AutoConfig.from_pretrained(sys.argv[1]).model_type == "garlic" and "sparse_prune.models.garlic" not in sys.modules
from transformers import AutoModelForTokenClassification as Auto
"""
TRANSFORMERS_FIRST = """
import sys, torch
from transformers import AutoModelForTokenClassification as Auto, PreTrainedModel, Trainer
import sparse_prune as sp
"""
LOADS = """
loaded = Auto.from_pretrained(sys.argv[1])
assert type(loaded).__name__ == "GarlicForTokenClassification"
assert any(isinstance(module, sp.SparseLinear) for module in loaded.modules())
torch.save(loaded(torch.arange(5, 17).view(2, 6)).logits, sys.argv[2])
"""


@pytest.mark.parametrize("head", [SPARSE_PRUNE_FIRST, TRANSFORMERS_FIRST], ids=["first", "after transformers"])
def test_import_sparse_prune_is_all_it_takes(head, tmp_path):
    """In a fresh process, whichever is imported first: Garlic and packed checkpoints load."""
    from sparse_prune.models.garlic import GarlicForTokenClassification
    from sparse_prune.models.garlic_config import GarlicConfig

    sizes = {"vocab_size": 50, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "ngram_buckets": 16}
    model = GarlicForTokenClassification(GarlicConfig(**sizes)).eval()
    sp.sparsify_(model, sp.BlockSparseConfig((16, 16), 0.3), lambda name, _: "encoder" in name)
    model.save_pretrained(tmp_path / "garlic")
    arguments = [str(tmp_path / "garlic"), str(tmp_path / "logits.pt")]
    result = subprocess.run(
        [sys.executable, "-c", head + LOADS, *arguments], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Warning: sparse_prune" not in result.stderr
    logits = torch.load(tmp_path / "logits.pt")
    torch.testing.assert_close(logits, model(torch.arange(5, 17).view(2, 6)).logits.detach())


LOADS_LARGE = """
import sys, torch, transformers, sparse_prune
def kilobytes(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
options = {"device_map": {"": "cpu"}} if sys.argv[2:] else {}
load = transformers.AutoModelForTokenClassification.from_pretrained
model = load(sys.argv[1], **options)  # what Python keeps of a first time is no part of it
for dtype in (torch.float32, torch.bfloat16):
    model = None
    open("/proc/self/clear_refs", "w").write("5")  # forgets the peak so far
    before = kilobytes("VmRSS")
    model = load(sys.argv[1], dtype=dtype, **options)
    print(1024 * (kilobytes("VmHWM") - before))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A packed model whose dense weights would be five times what loading it may take."""
    try:
        open("/proc/self/clear_refs", "w").close()
    except OSError as error:
        pytest.skip(f"the peak of memory cannot be measured: {error}")
    path = tmp_path_factory.mktemp("large")
    config = transformers.BertConfig(
        hidden_size=768, num_hidden_layers=4, num_attention_heads=12, intermediate_size=3072, vocab_size=50
    )
    with torch.device("meta"):
        large = transformers.BertForTokenClassification(config)
    large.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in large.parameters():
            parameter.fill_(0.5)
    dense = sum(parameter.numel() * 4 for parameter in large.parameters())
    sp.sparsify_(large, sp.BlockSparseConfig((32, 32), 0.2), lambda name, _: "encoder" in name)
    sp.save_packed(large, path)
    size = (path / "model.safetensors").stat().st_size
    assert size < dense / 4
    return path, size


@pytest.mark.parametrize("placed", [False, True], ids=["read here", "by transformers"])
def test_never_the_dense_weight_in_between(large, placed):
    path, size = large
    if placed:
        pytest.importorskip("accelerate")
    arguments = [str(path), *(["placed"] if placed else [])]
    result = subprocess.run(
        [sys.executable, "-c", LOADS_LARGE, *arguments], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    float32, bfloat16 = map(int, result.stdout.split())
    python = 2**21  # for objects of its own
    assert float32 < 1.2 * size + python, f"loading {size} bytes took {float32}"
    # Half of the file and a layer of it. transformers keeps the whole file mapped beside copies of another dtype.
    most = 1.6 if placed else 0.8
    assert bfloat16 < most * size + python, f"loading {size} bytes as bfloat16 took {bfloat16}"
