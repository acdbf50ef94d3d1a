"""torch.compile, torch.export, AOTInductor and a C++ program: whole graphs, any batch and length, the same numbers."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import sparse_prune as sp
from sparse_prune import backends

transformers = pytest.importorskip("transformers")

EXAMPLE = Path(__file__).parents[1] / "examples" / "cpp"
needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None, reason="Inductor needs a C++ compiler, and there is no c++"
)


def garlic() -> nn.Module:
    from sparse_prune.models.garlic import GarlicForSequenceClassification
    from sparse_prune.models.garlic_config import GarlicConfig

    config = GarlicConfig(
        vocab_size=60,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=128,
        ngram_buckets=64,
    )
    return GarlicForSequenceClassification(config)


def of_transformers(model: str, config: str, **sizes: int):
    return lambda: getattr(transformers, model)(getattr(transformers, config)(vocab_size=60, **sizes))


SIZES = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128}
bert = of_transformers("BertForSequenceClassification", "BertConfig", **SIZES)
FAMILIES = {
    "garlic": garlic,
    "bert": bert,
    "roberta": of_transformers("RobertaForSequenceClassification", "RobertaConfig", **SIZES),
    "distilbert": of_transformers(
        "DistilBertForSequenceClassification", "DistilBertConfig", dim=64, hidden_dim=128, n_layers=1, n_heads=2
    ),
    "gpt2": of_transformers("GPT2LMHeadModel", "GPT2Config", n_embd=64, n_layer=1, n_head=2),
    "llama": of_transformers("LlamaForCausalLM", "LlamaConfig", num_key_value_heads=1, **SIZES),
}


def pack(model: nn.Module) -> nn.Module:
    sp.sparsify_(model.eval(), sp.BlockSparseConfig((16, 16), 0.4), lambda name, _: "layer" in name or ".h." in name)
    return model


@pytest.fixture
def counted():
    """counted(fn) -> (compiled fn, list that grows with each compilation): no graph breaks, symbolic sizes."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        compiled = torch._dynamo.backends.debugging.aot_eager(graph, inputs)  # which may have Dynamo begin anew
        graphs.append(graph)
        return compiled

    yield lambda fn: (torch.compile(fn, fullgraph=True, dynamic=True, backend=backend), graphs)
    torch._dynamo.reset()


def run(compiled, model: nn.Module, batch: int, length: int) -> None:
    """Compiled logits of a batch with padding are the model's own."""
    ids = torch.randint(5, 60, (batch, length))
    mask = (torch.arange(length) < torch.tensor([length - 3] + [length] * (batch - 1))[:, None]).long()
    logits = compiled(ids, mask)  # before any call outside: nothing has been derived yet
    torch.testing.assert_close(logits, model(input_ids=ids, attention_mask=mask).logits)


@pytest.mark.parametrize("family", [*FAMILIES, "dense bert"])
def test_a_packed_model_compiles_whole_and_once(family, counted):
    """Once more for batch 1, as a dense model: PyTorch makes a graph of its own of each size 1."""
    model = bert().eval() if family == "dense bert" else pack(FAMILIES[family]())
    compiled, graphs = counted(lambda ids, mask: model(input_ids=ids, attention_mask=mask).logits)
    with torch.no_grad():
        for batch, length in ((2, 9), (3, 9), (5, 17), (8, 30)):
            run(compiled, model, batch, length)
            assert len(graphs) == 1, "compiled again for another batch or length"
        for length in (9, 17):
            run(compiled, model, 1, length)
            assert len(graphs) == 2, "batch 1 takes one graph, for all lengths"
    calls = [node for node in graphs[-1].graph.nodes if "sparse_prune.bsr_linear" in str(node.target)]
    sparse = sum(isinstance(module, sp.SparseLinear) for module in model.modules())
    assert len(calls) == sparse and (sparse > 3 or family == "dense bert")
    if backends.cpu_isas():
        assert all(node.args[4] is not None for node in calls), "the weights are packed again in every call"


def test_training_compiles_whole(counted):
    model = pack(garlic()).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.config.token_dropout_prob = 0.0
    compiled, graphs = counted(lambda ids, labels: model(input_ids=ids, labels=labels).loss)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = 0
    for batch in (2, 4):
        ids, labels = torch.randint(5, 60, (batch, 9)), torch.arange(batch) % 2
        gradients = []
        for loss in (compiled, lambda ids, labels: model(input_ids=ids, labels=labels).loss):
            optimizer.zero_grad()
            loss(ids, labels).backward()
            gradients.append(model.garlic.encoder.layers[0].ffn_in.values.grad.clone())
        torch.testing.assert_close(*gradients)
        optimizer.step()
        first = first or len(graphs)
    assert len(graphs) == first > 0


def test_compiled_inference_sees_new_weights(counted):
    """After training, loading and casting, whatever was derived from the old values."""
    layer = sp.SparseLinear.from_dense(nn.Linear(32, 48), torch.ones(3, 2, dtype=torch.bool), (16, 16)).eval()
    x = torch.randn(4, 32)
    compiled, _ = counted(lambda x: layer(x))

    def same() -> None:
        with torch.no_grad():
            expected = x.to(layer.values.dtype) @ layer.weight.t() + layer.bias
            torch.testing.assert_close(compiled(x.to(layer.values.dtype)), expected, atol=1e-2, rtol=1e-2)

    with torch.no_grad():
        layer(x)  # derives the kernels' layout
    same()
    layer.train()
    optimizer = torch.optim.SGD(layer.parameters(), lr=10.0)
    layer(x).square().mean().backward()
    with torch.no_grad():
        layer(x)  # as a score in the middle of training would
    optimizer.step()
    layer.eval()
    same()
    with torch.no_grad():
        layer(x)
    state = layer.state_dict()
    layer.load_state_dict(state | {"values": state["values"] * 2})
    same()
    layer.to(torch.bfloat16)
    same()


@pytest.mark.parametrize("make", [garlic, bert])
def test_export_keeps_batch_and_length_free(make):
    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = pack(make())

        def forward(self, ids, mask):
            return self.model(input_ids=ids, attention_mask=mask).logits

    model = Logits().eval()
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with torch.no_grad():
        inputs = torch.randint(5, 60, (2, 9)), torch.ones(2, 9, dtype=torch.long)
        program = torch.export.export(model, inputs, dynamic_shapes=(free, free)).module()
        for batch, length in ((3, 9), (4, 21)):
            ids, mask = torch.randint(5, 60, (batch, length)), torch.ones(batch, length, dtype=torch.long)
            torch.testing.assert_close(program(ids, mask), model(ids, mask))


@pytest.mark.parametrize("called_before", [False, True])
@pytest.mark.parametrize("learns", [False, True])
def test_jit_trace_holds_the_operator(tmp_path, called_before, learns):
    """Not a number by which C++ knows the layer, which no other process does."""
    layer = sp.SparseLinear.from_dense(nn.Linear(64, 96), torch.eye(3, 2).bool(), blocksize=(32, 32)).eval()
    with torch.set_grad_enabled(learns):
        for _ in range(3 if called_before else 0):
            layer(torch.randn(4, 64))
        traced = torch.jit.trace(layer, torch.randn(4, 64))
    assert "sparse_prune::bsr_linear" in str(traced.graph) and "ready" not in str(traced.graph)
    traced.save(tmp_path / "layer.pt")
    x = torch.randn(7, 64)
    assert torch.equal(torch.jit.load(tmp_path / "layer.pt")(x), layer(x))


def test_jit_trace_of_a_fused_model():
    model = pack(bert())
    model.config.return_dict = False
    sp.fuse_encoder_(model)
    inputs = torch.randint(5, 60, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    with torch.no_grad():
        traced = torch.jit.trace(model, inputs)
        others = torch.randint(5, 60, (3, 9)), torch.ones(3, 9, dtype=torch.long)
        torch.testing.assert_close(traced(*others)[0], model(*others)[0])


@needs_compiler
def test_ahead_of_time_package_in_python_and_in_cpp(tmp_path):
    """examples/cpp as its docstring says; the program compares with PyTorch's logits itself."""
    if not backends.cpu_isas():
        pytest.skip("the C++ extension was not built")
    pack(garlic()).save_pretrained(tmp_path / "packed")
    spec = importlib.util.spec_from_file_location("export_example", EXAMPLE / "export.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    out = tmp_path / "compiled"
    example.export(tmp_path / "packed", out)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "packed")
    package = torch._inductor.aoti_load_package(str(out / "model.pt2"))
    for shape in ((1, 12), (4, 33)):
        ids = torch.randint(5, 60, shape)
        torch.testing.assert_close(package(ids), model(ids).logits.detach())
    # That of the extra `test`, whose folder is on PATH only in a shell that activated the environment.
    cmake = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")
    if cmake is None:
        pytest.skip("the package ran in Python; there is no cmake to build the C++ program: install the extra test")
    build = tmp_path / "build"
    configure = [cmake, "-S", str(EXAMPLE), "-B", str(build), f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"]
    for command in (configure, [cmake, "--build", str(build)]):
        result = subprocess.run(command, capture_output=True, text=True)
        if torch.version.cuda and "cannot find the CUDA" in " ".join(result.stderr.split()):
            pytest.skip("the package ran in Python; a CUDA build of PyTorch wants a CUDA toolkit for its C++ programs")
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    result = subprocess.run([str(build / "run_model"), str(out)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "batch 1 x 16: 2 logits" in result.stdout and "batch 3 x 40: 6 logits" in result.stdout
    (out / "logits1.bin").write_bytes(torch.zeros(6).numpy().tobytes())
    wrong = subprocess.run([str(build / "run_model"), str(out)], capture_output=True, text=True)
    assert wrong.returncode == 1 and "largest difference" in wrong.stdout
