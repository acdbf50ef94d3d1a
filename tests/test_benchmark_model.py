"""bench model: what it compares computes the same, and a peer that cannot run says why."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import sys

import pytest
import torch

import sparse_prune as sp
from sparse_prune import SparsePruneError, backends, benchmark_model, fuse, peers

transformers = pytest.importorskip("transformers")
garlic = pytest.importorskip("sparse_prune.models.garlic")
from sparse_prune.tasks.models import encoder_filter  # noqa: E402

SIZES = {
    "vocab_size": 50,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
}
# Few positions: onnx's reference evaluator gathers, as BERT's embeddings do, from at most 31 (np.choose).
MAKERS = {
    "garlic": lambda: garlic.GarlicModel(garlic.GarlicConfig(**SIZES, ngram_buckets=64, ngram_size=8)),
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SIZES, max_position_embeddings=16)),
    "roberta": lambda: transformers.RobertaModel(transformers.RobertaConfig(**SIZES, max_position_embeddings=16)),
    "distilbert": lambda: transformers.DistilBertModel(
        transformers.DistilBertConfig(
            vocab_size=50, dim=64, hidden_dim=256, n_layers=2, n_heads=4, max_position_embeddings=16
        )
    ),
    "mpnet": lambda: transformers.MPNetModel(transformers.MPNetConfig(**SIZES, max_position_embeddings=16)),
    "gpt2": lambda: transformers.GPT2Model(
        transformers.GPT2Config(vocab_size=50, n_embd=64, n_layer=2, n_head=4, n_positions=16)
    ),
}
OTHERS = ("mpnet", "gpt2")  # whose layers neither fuse_encoder_ nor shrink_ knows
SMALL = {"densities": [0.5], "blocksize": (16, 16), "batches": [2], "lengths": [9], "seconds": 0.0}


def made(kind):
    torch.manual_seed(0)
    return MAKERS[kind]().eval()


@pytest.mark.parametrize("kind", MAKERS)
def test_candidates(kind):
    model = made(kind)
    rows = benchmark_model.bench_model(model, encoder_filter(model), **SMALL)
    found = {(c["name"], c["dtype"]): c for c in rows[0]["candidates"]}
    names = ("dense", "dense fused", "shrunk 0.5", "shrunk 0.5 fused", "sparse 0.5")
    if kind in OTHERS:
        names, absent = ("dense", "sparse 0.5"), rows[0]["absent"]
        assert "is none of the encoders that can be fused, GarlicEncoder, Bert" in absent["dense fused"]
        assert absent["shrunk"].startswith("which heads and FFN rows can go is known for GarlicEncoder, BertEncoder,")
    else:
        assert not rows[0]["absent"]
    assert set(found) == {(name, dtype) for name in names for dtype in ("float32", "bfloat16")}
    assert all(c["ms"] > 0 for c in found.values())
    sizes = {name: found[name, "float32"]["parameters"] for name in names}
    assert sizes["dense"] == 2 * (4 * 64 * 64 + 2 * 64 * 256 + 9 * 64 + 256), "of both layers, bias and LayerNorm too"
    assert 0.5 < sizes["sparse 0.5"] / sizes["dense"] < 0.55, "half of the matrices, and biases and norms"
    if kind not in OTHERS:
        assert abs(sizes["sparse 0.5"] / sizes["shrunk 0.5"] - 1) < 0.1, "the rival has the size of the sparse model"


@pytest.mark.parametrize("int8", (False, True))
@pytest.mark.parametrize("kind", MAKERS)
def test_a_packed_twin(kind, int8):
    model = made(kind)
    packed = copy.deepcopy(model)
    sp.sparsify_(packed, sp.BlockSparseConfig(blocksize=(16, 16), density=0.5), encoder_filter(packed))
    if int8:
        sp.quantize_(packed)
    rows = benchmark_model.bench_model(model, encoder_filter(model), **SMALL, packed=packed)
    found = {(c["name"], c["dtype"]): c["error"] for c in rows[0]["candidates"]}
    names = {"dense", "sparse"} if kind in OTHERS else {"dense", "dense fused", "sparse"}
    assert {name for name, _ in found} == names, "the twin takes the place of densities"
    assert set(rows[0]["absent"]) == {"dense", "dense fused", "sparse"} - names
    assert (found["sparse", "float32"] > 1e-5) == int8, "int8 rounds, float32 does not"


@pytest.mark.skipif(not backends.cpu_isas(), reason="nothing is fused where the C++ extension was not built")
def test_a_wrong_result_is_not_timed(monkeypatch):
    attend = fuse.Heads.attend
    monkeypatch.setattr(fuse.Heads, "attend", lambda *a, **k: 1.5 * attend(*a, **k))
    model = made("bert")
    with pytest.raises(ArithmeticError, match="dense fused in float32: error"):
        benchmark_model.bench_model(model, encoder_filter(model), **SMALL)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", MAKERS)
def test_the_export_computes_the_same(kind, tmp_path):
    evaluator = pytest.importorskip("onnx.reference").ReferenceEvaluator
    model = made(kind)
    exported = benchmark_model._Exported(model)
    file = exported.save(tmp_path / "model.onnx")
    ids = torch.randint(5, 50, (3, 7))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    inputs = {name: t.numpy() for name, t in exported.inputs(ids, mask).items()}
    got = torch.from_numpy(evaluator(str(file)).run(None, inputs)[0])
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(got[mask.bool()], wanted[mask.bool()], atol=1e-4, rtol=1e-4)


class Evaluator:
    """A peer in this process: onnx's own evaluator, with every output times `factor`."""

    version, factor = "1", 1.0

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def load(self, model, inputs, *_):
        self.session, self.inputs = importlib.import_module("onnx.reference").ReferenceEvaluator(str(model)), inputs

    def run(self):
        self.results = [self.factor * array for array in self.session.run(None, self.inputs)]
        return 0.001

    def outputs(self):
        return self.results


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("twin", (False, True))
def test_peers_run_the_same_pruned_weights(twin, monkeypatch):
    pytest.importorskip("onnx.reference")
    monkeypatch.setattr(peers, "Peer", Evaluator)
    model = made("bert")
    packed = copy.deepcopy(model)
    sp.sparsify_(packed, sp.BlockSparseConfig(blocksize=(16, 16), density=0.5), encoder_filter(packed))
    engines = dict.fromkeys(("openvino", "onnxruntime", "deepsparse"), sys.executable)
    arguments = SMALL | {"dtypes": ["float32"], "peers": engines, "packed": packed if twin else None}
    (row,) = benchmark_model.bench_model(model, encoder_filter(model), **arguments)
    errors = {c["name"]: c["error"] for c in row["candidates"] if c["name"].partition(" ")[0] in engines}
    pruned = "sparse" if twin else "0.5"
    assert set(errors) == {"openvino", "onnxruntime", *(f"{engine} {pruned}" for engine in engines)}
    assert max(errors.values()) < 1e-5, "against float64 with the weights of the candidate, dense or pruned"
    monkeypatch.setattr(Evaluator, "factor", 1.2)
    (row,) = benchmark_model.bench_model(model, encoder_filter(model), **arguments)
    assert len(row["failed"]) == 5 and all("wrong: error" in why for why in row["failed"].values())


def test_a_model_that_onnx_cannot_hold_is_timed_without_the_peers_that_read_it(monkeypatch):
    pytest.importorskip("onnx")

    def fail(*_):
        raise RuntimeError("no such operator")

    monkeypatch.setattr(benchmark_model._Exported, "save", fail)
    model = made("bert")
    rows = benchmark_model.bench_model(model, encoder_filter(model), **SMALL, peers={"openvino": sys.executable})
    assert rows[0]["absent"] == {"openvino": "BertModel cannot be exported to ONNX: no such operator"}
    assert len(rows[0]["candidates"]) == 10 and not rows[0]["failed"]


def test_a_model_that_reads_no_tokens_is_refused():
    settings = {key: SIZES[key] for key in SIZES if key != "vocab_size"}
    model = transformers.ViTModel(transformers.ViTConfig(**settings, image_size=32, patch_size=8))
    with pytest.raises(
        SparsePruneError, match="model: expected one that reads tokens, got one that reads pixel_values"
    ):
        benchmark_model.bench_model(model, encoder_filter(model), **SMALL)


def test_peers_need_onnx(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "onnx" else find(name, *a))
    model = made("bert")
    with pytest.raises(SparsePruneError, match="onnx"):
        benchmark_model.bench_model(model, encoder_filter(model), **SMALL, peers={"openvino": sys.executable})


def test_a_peer_that_is_not_there_says_why():
    with pytest.raises(peers.PeerError, match="PackageNotFoundError: .*deepsparse"):
        peers.Peer("deepsparse", sys.executable)
    assert peers.installed("nowhere") == {}
