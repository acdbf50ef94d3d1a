"""pack of models that something else pruned: any class, any way to store it, any pattern of zeros."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sparse_prune as sp
from sparse_prune.linears import as_matrix
from sparse_prune.masks import expand_mask

transformers = pytest.importorskip("transformers")
from sparse_prune.tasks.models import encoder_filter  # noqa: E402

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60, "max_position_embeddings": 32}
BERT = SIZES | {"hidden_size": 128, "intermediate_size": 512}
FAMILIES = {
    "BertForQuestionAnswering": ("BertConfig", BERT),
    "BertModel": ("BertConfig", BERT),
    "BertForMaskedLM": ("BertConfig", BERT),  # its decoder is tied to the embeddings
    "DistilBertForMultipleChoice": (
        "DistilBertConfig",
        {"dim": 128, "hidden_dim": 512, "n_layers": 2, "n_heads": 4, "vocab_size": 60},
    ),
    "MPNetForMaskedLM": ("MPNetConfig", BERT),
    "DebertaV2ForQuestionAnswering": (
        "DebertaV2Config",
        BERT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True},
    ),
    "GPT2LMHeadModel": ("GPT2Config", {"n_embd": 128, "n_layer": 2, "n_head": 4, "vocab_size": 60}),
    "ViTForImageClassification": (
        "ViTConfig",
        {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"image_size": 32, "patch_size": 8},
    ),
    "BartForConditionalGeneration": (
        "BartConfig",
        {"d_model": 128, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 60, "max_position_embeddings": 32}
        | {"encoder_ffn_dim": 512, "decoder_ffn_dim": 512},
    ),
}


def made(family: str = "BertForQuestionAnswering") -> nn.Module:
    config, settings = FAMILIES[family]
    model = getattr(transformers, family)(getattr(transformers, config)(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))  # biases are zero otherwise, and hide mistakes
    return model


def zero_(model: nn.Module, mask) -> None:
    """Zero each matrix [N, K] of the encoder's layers where mask(name, its shape), a bool tensor [N, K], is False."""
    inside = encoder_filter(model)
    for name, module in model.named_modules():
        if inside(name, module):
            weight = as_matrix(module, module.weight.detach())
            weight.mul_(mask(name, weight.shape))


def blocks(r: int, c: int, density: float = 0.4):
    def mask(_: str, shape) -> Tensor:
        return expand_mask(torch.rand(shape[0] // r, shape[1] // c) < density, (r, c), shape)

    return mask


def as_nn_pruning_does(name: str, shape) -> Tensor:
    """Blocks of 32x32 in attention, one head gone, and in the feed-forward network neurons: whole rows, then columns."""
    if "attention" in name:
        mask = blocks(32, 32)(name, shape)
        mask[32:64] &= "output" in name
        return mask
    neurons = torch.arange(512) % 3 == 0
    return neurons[:, None].expand(shape) if "intermediate" in name else neurons.expand(shape)


def two_of_four(_: str, shape) -> Tensor:
    order = torch.rand(shape[0], shape[1] // 4, 4).argsort(-1)
    return (order < 2).view(*shape)


def store(model: nn.Module, path, form: str = "safetensors") -> None:
    model.save_pretrained(path, max_shard_size="200KB" if "shards" in form else "1GB")
    if form.startswith("bin"):
        files = sorted(path.glob("*.safetensors"))
        assert (len(files) > 1) == ("shards" in form)
        for file in files:
            name = file.name.replace("model", "pytorch_model").replace("safetensors", "bin")
            torch.save(load_file(file), path / name)
            file.unlink()
        if "shards" in form:
            index = (path / "model.safetensors.index.json").read_text()
            index = index.replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
            (path / "pytorch_model.bin.index.json").write_text(index)
            (path / "model.safetensors.index.json").unlink()


def output(model: nn.Module) -> Tensor:
    ids = torch.arange(5, 23).view(2, 9)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.main_input_name == "pixel_values":
        inputs = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)}
    elif type(model).__name__.endswith("MultipleChoice"):
        inputs = {name: tensor[None] for name, tensor in inputs.items()}
    with torch.inference_mode():
        return model(**inputs)[0]


def sparse_layers(model: nn.Module) -> dict[str, sp.SparseLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, sp.SparseLinear)}


def packed(run, folder, *options) -> tuple[dict, nn.Module]:
    """What `pack` says of the model in folder / "dense", and what from_pretrained makes of its output."""
    code, text = run("pack", folder / "dense", "--out", folder / "packed", "--json", folder / "told.json", *options)
    assert code == 0, text
    kind = getattr(transformers, json.loads((folder / "packed" / "config.json").read_text())["architectures"][0])
    return json.loads((folder / "told.json").read_text()), kind.from_pretrained(folder / "packed").eval()


@pytest.mark.parametrize("form", ["safetensors", "shards", "bin", "bin shards"])
def test_a_question_answerer_of_nn_pruning(run, tmp_path, form):
    model = made()
    zero_(model, as_nn_pruning_does)
    store(model, tmp_path / "dense", form)
    told, loaded = packed(run, tmp_path)
    layers = sparse_layers(loaded)
    assert len(layers) == 12 and {layer.blocksize for layer in layers.values()} == {(32, 32)}
    assert {layer.density for name, layer in layers.items() if "attention" not in name} == {6 / 16}, (
        "171 of 512 neurons"
    )
    assert told["packed_bytes"] < 0.6 * told["dense_bytes"] and 0.2 < told["density"] < 0.5
    torch.testing.assert_close(output(loaded), output(model))


def test_what_pack_says_of_a_model_of_nn_pruning(run, tmp_path):
    model = made()
    zero_(model, as_nn_pruning_does)
    store(model, tmp_path / "dense")
    code, text = run("pack", tmp_path / "dense", "--out", tmp_path / "packed")
    text = " ".join(text.split())
    assert code == 0 and "682 of 1,024 feed-forward neurons are dead: put last" in text
    assert "dense: outside of the encoder's layers" in text and "no mask given" not in text
    zero_(model, lambda name, shape: blocks(32, 32)(name, shape) if "attention" in name else torch.ones(shape))
    mixed = model.bert.encoder.layer[0].intermediate.dense
    with torch.no_grad():
        mixed.weight[:, ::3] = 0
    before = mixed.weight.clone()
    assert sp.gather_neurons_(model) == (341, 1024), "other zeros are in the first layer's"
    assert torch.equal(mixed.weight, before)
    store(model, tmp_path / "mixed" / "dense")
    code, text = run("pack", tmp_path / "mixed" / "dense", "--out", tmp_path / "mixed" / "packed")
    assert code == 0 and "dense: no block of 32x32 zeros in it" in " ".join(text.split())


@pytest.mark.parametrize("family", FAMILIES)
def test_any_class_of_transformers(run, tmp_path, family):
    model = made(family)
    zero_(model, blocks(32, 16))
    store(model, tmp_path / "dense")
    told, loaded = packed(run, tmp_path)
    assert type(loaded) is type(model) and len(sparse_layers(loaded)) >= 8
    assert {layer.blocksize for layer in sparse_layers(loaded).values()} == {(32, 16)}, "found by the zeros alone"
    assert told["density"] == pytest.approx(0.4, abs=0.05) and told["packed_bytes"] < 0.8 * told["dense_bytes"]
    torch.testing.assert_close(output(loaded), output(model))


def test_the_dtype_stays_and_packed_models_of_any_class_are_rounded(run, tmp_path):
    model = made().bfloat16()
    zero_(model, blocks(32, 32))
    store(model, tmp_path / "dense")
    _, loaded = packed(run, tmp_path)
    assert loaded.dtype == torch.bfloat16
    torch.testing.assert_close(output(loaded), output(model), atol=0.05, rtol=0.05)
    (tmp_path / "again").mkdir()
    shutil.move(tmp_path / "packed", tmp_path / "again" / "dense")
    _, rounded = packed(run, tmp_path / "again", "--int8")
    assert {layer.values.dtype for layer in sparse_layers(rounded).values()} == {torch.int8}
    torch.testing.assert_close(output(rounded), output(model), atol=0.1, rtol=0.1)


@pytest.mark.parametrize("family", ["BertForQuestionAnswering", "MPNetForMaskedLM", "GPT2LMHeadModel"])
def test_bench_takes_the_model_and_its_twin(run, tmp_path, family):
    model = made(family)
    zero_(model, blocks(32, 32))
    store(model, tmp_path / "dense")
    packed(run, tmp_path)
    short = ("--batch", "1", "--length", "8", "--dtype", "float32", "--seconds", "0", "--json", tmp_path / "rows.json")
    code, text = run("bench", "model", tmp_path / "dense", tmp_path / "packed", *short)
    assert code == 0 and ("absent      dense fused: " in text) == (family != "BertForQuestionAnswering"), text
    rows = json.loads((tmp_path / "rows.json").read_text())
    sizes = {candidate["name"]: candidate["parameters"] for candidate in rows[0]["candidates"]}
    assert 0.3 < sizes["sparse"] / sizes["dense"] < 0.5
    code, text = run("bench", "model", tmp_path / "dense", "--density", "0.5", *short)
    assert code == 0 and ("shrunk 0.5" in text) == (family == "BertForQuestionAnswering"), text


def refused(run, folder, *options) -> str:
    code, text = run("pack", folder / "dense", "--out", folder / "packed", *options)
    assert code == 2 and "error: " in text and not (folder / "packed").exists(), text
    return " ".join(text.split())


PATTERNS = {
    "2:4": (
        two_of_four,
        "got two zeros in every four weights (2:4), which only GPUs' sparse tensor cores gain from; prune",
    ),
    "unstructured": (
        lambda _, shape: torch.rand(shape) < 0.2,
        "got 80% zeros and no block of 32x32 zeros: they are scattered",
    ),
    "none": (lambda _, shape: torch.ones(shape), "got no block of 32x32 zeros; prune it first"),
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("family", ["BertForQuestionAnswering", "GPT2LMHeadModel"])
def test_zeros_that_form_no_blocks_are_told(run, tmp_path, family, pattern):
    mask, message = PATTERNS[pattern]
    model = made(family)
    zero_(model, mask)
    store(model, tmp_path / "dense")
    assert f"expected a model pruned in blocks, {message}" in refused(run, tmp_path)


def test_runs_of_four_of_sparseml_are_told_and_stored_on_request(run, tmp_path):
    model = made("BertForMaskedLM")
    zero_(model, blocks(1, 4, 0.2))
    store(model, tmp_path / "dense", "bin")
    assert "80% zeros and no block of 32x32 zeros, but runs of four;" in (text := refused(run, tmp_path))
    assert "or store the runs, for size alone, with --block 1x4" in text
    told, loaded = packed(run, tmp_path, "--block", "1x4")
    assert told["density"] == pytest.approx(0.2, abs=0.02) and told["packed_bytes"] < 0.5 * told["dense_bytes"]
    torch.testing.assert_close(output(loaded), output(model))


def test_what_belongs_to_the_model_comes_along_and_nothing_else(run, tmp_path):
    model = made("GPT2LMHeadModel")
    zero_(model, blocks(32, 32))
    store(model, tmp_path / "dense")
    along = (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "vocab.txt",
        "merges.txt",
        "spiece.model",
    )
    along += ("preprocessor_config.json", "generation_config.json")
    for name in (*along, "optimizer.pt", "tokenization_mine.py", "trainer_state.json"):
        (tmp_path / "dense" / name).write_text("{}")
    packed(run, tmp_path)
    assert {file.name for file in (tmp_path / "packed").iterdir()} == {
        *along,
        "config.json",
        "model.safetensors",
        "run.json",
    }


class Touch:
    """Pickled, it would make a file where it is read."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_runs_no_code(run, tmp_path):
    store(made(), tmp_path / "dense", "bin")
    torch.save(
        {"bert.embeddings.word_embeddings.weight": Touch(tmp_path / "ran")}, tmp_path / "dense" / "pytorch_model.bin"
    )
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    del config["dtype"]  # so that transformers looks into the file for it too
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config))
    assert "expected the weights of a BertForQuestionAnswering" in refused(run, tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("how", ["left out", "under the names that SparseML gives quantized layers"])
def test_a_weight_that_is_not_there_is_not_made_up(run, tmp_path, how):
    model = made()
    zero_(model, blocks(32, 32))
    store(model, tmp_path / "dense")
    file = tmp_path / "dense" / "model.safetensors"
    tensors = load_file(file)
    moved = tensors.pop("bert.encoder.layer.1.output.dense.weight")
    save_file(tensors | ({} if how == "left out" else {"bert.encoder.layer.1.output.dense.module.weight": moved}), file)
    expected = (
        "expected all weights of a BertForQuestionAnswering, got 1 missing, such as bert.encoder.layer.1.output.dense.w"
    )
    assert expected in refused(run, tmp_path)


@pytest.mark.parametrize(
    ("architectures", "message"),
    [
        (None, "config.json: expected the model's class under architectures, got none; name it"),
        (["MyBertModel"], "config.json: architectures: expected a model class of transformers, got MyBertModel"),
        (
            ["PreTrainedModel"],
            "config.json: architectures: expected a model class of transformers, got PreTrainedModel",
        ),
        (["AutoConfig"], "config.json: architectures: expected a model class of transformers, got AutoConfig"),
        ([7], "config.json: architectures: expected a model class of transformers, got 7"),
    ],
)
def test_a_class_that_is_not_transformers(run, tmp_path, architectures, message):
    store(made(), tmp_path / "dense")
    file = tmp_path / "dense" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": architectures}))
    assert message in refused(run, tmp_path)
