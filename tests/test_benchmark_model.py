"""bench model: what it compares computes the same, and a peer that cannot run says why."""

from __future__ import annotations

import copy
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
}
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
    assert set(found) == {(name, dtype) for name in names for dtype in ("float32", "bfloat16")}
    assert all(c["ms"] > 0 for c in found.values())
    dense, sparse, shrunk = (found[name, "float32"]["parameters"] for name in ("dense", "sparse 0.5", "shrunk 0.5"))
    assert abs(sparse / shrunk - 1) < 0.1 and sparse < 0.6 * dense, "the rival has the size of the sparse model"


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
    assert {name for name, _ in found} == {"dense", "dense fused", "sparse"}, "the twin takes the place of densities"
    assert (found["sparse", "float32"] > 1e-5) == int8, "int8 rounds, float32 does not"


@pytest.mark.skipif(not backends.cpu_isas(), reason="nothing is fused where the C++ extension was not built")
def test_a_wrong_result_is_not_timed(monkeypatch):
    attend = fuse.FusedForward.attend
    monkeypatch.setattr(fuse.FusedForward, "attend", lambda *a, **k: 1.5 * attend(*a, **k))
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
