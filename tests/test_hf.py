"""Packed checkpoints through Hugging Face's own loading and saving."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch

import sparse_prune as sp
from sparse_prune import serialization

transformers = pytest.importorskip("transformers")
pytest.importorskip("sparse_prune.integrations.hf")


@pytest.fixture
def packed(tmp_path):
    config = transformers.BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, vocab_size=50, num_labels=3
    )
    model = transformers.BertForSequenceClassification(config).eval()
    sp.sparsify_(model, sp.BlockSparseConfig(blocksize=(16, 16), density=0.3), lambda name, _: "encoder" in name)
    sp.save_packed(model, tmp_path / "packed")
    return model, tmp_path / "packed"


def load(path, **kwargs):
    return transformers.AutoModelForSequenceClassification.from_pretrained(path, **kwargs).eval()


def test_round_trip_through_from_pretrained(packed, tmp_path):
    model, path = packed
    ids = torch.arange(12).view(2, 6)
    loaded = load(path)
    assert isinstance(loaded.bert.encoder.layer[0].attention.self.query, sp.SparseLinear)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    loaded.save_pretrained(tmp_path / "again")
    assert serialization.is_packed(tmp_path / "again")
    assert torch.equal(load(tmp_path / "again")(ids).logits, model(ids).logits)
    fresh = transformers.BertForSequenceClassification(model.config).eval()
    assert torch.equal(sp.load_packed(fresh, tmp_path / "again")(ids).logits, model(ids).logits)


def test_dtype_and_dequantize(packed):
    model, path = packed
    ids = torch.arange(12).view(2, 6)
    half = load(path, dtype=torch.bfloat16)
    layer = half.bert.encoder.layer[1].output.dense
    assert layer.values.dtype == torch.bfloat16 and layer.crow_indices.dtype == torch.int32
    torch.testing.assert_close(half(ids).logits.float(), model(ids).logits, atol=0.05, rtol=0.05)
    dense = load(path).dequantize()
    assert not any(isinstance(module, sp.SparseLinear) for module in dense.modules())
    torch.testing.assert_close(dense(ids).logits, model(ids).logits)


def test_the_kept_blocks_train(packed):
    _, path = packed
    model = load(path).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = model.bert.encoder.layer[0].output.dense.values.detach().clone()
    model(torch.arange(12).view(2, 6), labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    assert not torch.equal(model.bert.encoder.layer[0].output.dense.values, before)


def test_damaged_indices_are_refused(packed):
    _, path = packed
    file = path / serialization.WEIGHTS_NAME
    tensors, metadata = serialization.read_tensors(file)
    name = "bert.encoder.layer.0.output.dense.col_indices"
    safetensors.torch.save_file(tensors | {name: tensors[name] + 99}, file, metadata)
    with pytest.raises(sp.SparsePruneError, match="col_indices: expected entries below 8"):
        load(path)


def test_damaged_config_is_refused(packed):
    _, path = packed
    config = json.loads((path / "config.json").read_text())
    layers = config["quantization_config"]["layers"]
    layers["bert.encoder.layer.0.output.dense"]["shape"] = [64, 64]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(sp.SparsePruneError, match="expected a linear layer of 64 -> 64"):
        load(path)
