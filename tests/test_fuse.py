"""fuse_encoder_: the same results as the model's own path, and every reason to leave that to it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from cpu_isas import needs_kernels
from torch._subclasses.fake_tensor import FakeTensorMode

import sparse_prune as sp
from sparse_prune import backends, convert, fuse, layers, planner

transformers = pytest.importorskip("transformers")
garlic = pytest.importorskip("sparse_prune.models.garlic")

SIZES = {
    "vocab_size": 50,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
}


def sizes(heads):
    return SIZES | {"num_attention_heads": heads}


MAKERS = {
    "garlic": lambda heads=2: garlic.GarlicModel(
        garlic.GarlicConfig(**sizes(heads), max_distance=4, ngram_buckets=64, ngram_size=8)
    ),
    "bert": lambda heads=2: transformers.BertModel(transformers.BertConfig(**sizes(heads))),
    "bert eager": lambda heads=2: transformers.BertModel(
        transformers.BertConfig(**sizes(heads), attn_implementation="eager")
    ),
    "roberta": lambda heads=2: transformers.RobertaModel(
        transformers.RobertaConfig(**sizes(heads), hidden_act="gelu_new")
    ),
    "electra": lambda heads=2: transformers.ElectraModel(transformers.ElectraConfig(**sizes(heads), embedding_size=32)),
    "distilbert": lambda heads=2: transformers.DistilBertModel(
        transformers.DistilBertConfig(vocab_size=50, dim=64, n_layers=2, n_heads=heads, hidden_dim=128)
    ),
}
each_model = pytest.mark.parametrize("kind", MAKERS)


def made(kind, sparse=True):
    """A model in evaluation whose weights differ from their initial values, fused; half of its blocks pruned."""
    torch.manual_seed(0)
    model = MAKERS[kind]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    if sparse:
        inside = lambda name, _: ".layer" in name  # noqa: E731
        result = sp.sparsify_(model, sp.BlockSparseConfig(blocksize=(16, 16), density=0.5), inside)
        assert len(result.converted) >= 8
    return model


def tokens(batch, length, padded):
    ids = torch.randint(5, 50, (batch, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        for row in range(batch):
            mask[row, length - row * length // (batch + 1) :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def is_fused(model):
    return any(isinstance(vars(m).get("forward"), fuse.FusedForward) for m in model.modules())


@pytest.fixture
def fused_calls(monkeypatch):
    """How often an encoder ran fused."""
    calls = []
    attend = fuse.Heads.attend
    monkeypatch.setattr(fuse.Heads, "attend", lambda self, *a, **k: calls.append(1) or attend(self, *a, **k))
    return calls


@needs_kernels
@each_model
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_as_exact_as_unfused(kind, sparse, dtype, fused_calls):
    model = made(kind, sparse)
    assert sp.fuse_encoder_(model).fused == [name for name, m in model.named_modules() if is_fused_module(m)]
    plain, exact = copy.deepcopy(model), copy.deepcopy(model)
    sp.unfuse_encoder_(plain)
    sp.unfuse_encoder_(exact)
    model.to(dtype), plain.to(dtype), exact.to(dtype).double()
    for batch, length, padded in ((1, 1, False), (3, 7, True), (2, 128, True), (4, 200, False)):
        inputs = tokens(batch, length, padded)
        kept = inputs["attention_mask"].bool()
        with torch.inference_mode():
            fused_calls.clear()
            ours = model(**inputs).last_hidden_state[kept]
            assert len(fused_calls) == 2, "both layers ran fused"
            theirs, best = plain(**inputs).last_hidden_state[kept], exact(**inputs).last_hidden_state[kept]
            assert len(fused_calls) == 2
        assert ours.dtype == dtype and not ours.isnan().any()
        error, allowed = (ours.double() - best).norm(), (theirs.double() - best).norm()
        assert error <= 2 * max(allowed, torch.finfo(dtype).eps / 4 * best.norm())


def is_fused_module(module):
    return isinstance(vars(module).get("forward"), fuse.FusedForward)


@needs_kernels
@each_model
def test_the_models_own_path_where_it_is_needed(kind, fused_calls):
    model, inputs = made(kind), tokens(2, 9, True)
    with torch.no_grad():
        model(**inputs)
        assert fused_calls, "runs fused at all"
        fused_calls.clear()
        attentions = model(**inputs, output_attentions=True).attentions
        assert len(attentions) == (2 if kind in ("garlic", "bert eager") else 0) and not fused_calls
        states = model(**inputs, output_hidden_states=True).hidden_states
        assert len(states) == 3 and all(s.shape == (2, 9, 64) for s in states)
        model(**inputs)
        assert fused_calls, "fused again after that"
        fused_calls.clear()
        seen = []
        linear = next(m for m in model.modules() if isinstance(m, sp.SparseLinear))
        hook = linear.register_forward_hook(lambda *_: seen.append(1))
        model(**inputs)
        hook.remove()
        assert seen and not fused_calls, "a hook sees its module run"
        with torch.autocast("cpu", torch.bfloat16):
            model(**inputs)
        assert not fused_calls
    model(**inputs).last_hidden_state.sum().backward()
    assert linear.values.grad is not None and not fused_calls
    model.train()
    with torch.no_grad():
        model(**inputs)
    assert not fused_calls


@needs_kernels
@each_model
def test_copies_files_and_changed_weights(kind, tmp_path, fused_calls):
    model, inputs = made(kind), tokens(2, 9, True)
    names = set(model.state_dict())
    with torch.no_grad():
        before = model(**inputs).last_hidden_state
        twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        assert is_fused(twin) and torch.equal(twin(**inputs).last_hidden_state, before)
        assert set(model.state_dict()) == names
        for linear in (m for m in twin.modules() if isinstance(m, sp.SparseLinear)):
            linear.values.mul_(1.5)
        twin(**inputs)
        for linear in (m for m in twin.modules() if isinstance(m, sp.SparseLinear)):
            linear.values.data.mul_(0.9)
            linear.refresh_()
        changed = twin(**inputs).last_hidden_state
        assert torch.equal(model(**inputs).last_hidden_state, before), "a copy shares nothing"
        sp.unfuse_encoder_(twin)
        assert not is_fused(twin)
        torch.testing.assert_close(changed, twin(**inputs).last_hidden_state)
        assert not torch.allclose(changed, before, atol=1e-2), "what was derived from the old weights is gone"
        sp.save_packed(model, tmp_path / "model.safetensors")
        loaded = sp.load_packed(MAKERS[kind]().eval(), tmp_path / "model.safetensors")
        fused_calls.clear()
        assert torch.equal(loaded(**inputs).last_hidden_state, before) and fused_calls


@needs_kernels
def test_what_is_loaded_under_inference_mode_is_seen(fused_calls):
    with torch.inference_mode():
        model, inputs = made("bert"), tokens(2, 9, True)
        before = model(**inputs).last_hidden_state
        state = model.state_dict()
        model.load_state_dict(state | {name: 1.5 * state[name] for name in state if name.endswith("value.values")})
        fused = model(**inputs).last_hidden_state
        assert fused_calls and not torch.allclose(fused, before, atol=1e-2)
        sp.unfuse_encoder_(model)
        torch.testing.assert_close(fused, model(**inputs).last_hidden_state)


def attention_layers(model):
    """Per layer: the projections to q, k, v, the one back, and the layer that makes v with the row where v begins."""
    stack = next(m for m in model.modules() if type(m).__name__ in fuse.KINDS)
    for projections, out, *_ in fuse.KINDS[type(stack).__name__].linears(stack):
        yield projections, out, projections[-1], projections[-1].out_features - out.in_features


def with_dead_heads(kind, dead, by="out", block=16):
    """A fused model of two layers of four heads of 16. dead: per layer the heads that `out` has no blocks for, or, by "v", whose
    values are zero.
    """
    torch.manual_seed(0)
    model = MAKERS[kind](heads=4).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    inside = {m: name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layer" in name}
    masks = {inside[m]: torch.rand([size // block for size in m.weight.shape]) < 0.7 for m in inside}
    for mask in masks.values():
        mask[0] = mask[:, 0] = True  # of the others none dies by chance
    for heads, (_, out, value, start) in zip(dead, attention_layers(model), strict=True):
        for head in heads:
            if by == "out":
                masks[inside[out]][:, 16 * head // block] = False
            else:
                masks[inside[value]][(start + 16 * head) // block] = False
                value.bias.data[start + 16 * head :][:16] = 0
    result = sp.sparsify_(model, sp.BlockSparseConfig((block, block), max_density=1.0), masks=masks)
    assert result.dead_heads == (sum(map(len, dead)), 8)
    assert f"{result.dead_heads[0]} of 8 attention heads contribute nothing and are left out" in str(result)
    return model


@pytest.fixture
def attended(monkeypatch):
    """How many heads each attention ran on."""
    counts, attention = [], fuse.attention
    monkeypatch.setattr(fuse, "attention", lambda q, *a, **k: counts.append(q.shape[2]) or attention(q, *a, **k))
    return counts


@needs_kernels
@each_model
@pytest.mark.parametrize(
    ("by", "dead"), [("out", ((0, 2), (1, 2, 3))), ("v", ((0, 1, 2), ())), ("v", ((0, 2), (0, 1, 2, 3)))]
)
def test_dead_heads_are_left_out(kind, by, dead, attended):
    model = with_dead_heads(kind, dead, by)
    plain, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    sp.unfuse_encoder_(plain)
    for batch, length in ((1, 1), (3, 20), (2, 40)):
        inputs = tokens(batch, length, True)
        kept = inputs["attention_mask"].bool()
        with torch.inference_mode():
            for _ in range(3):  # derives, settles, and runs
                attended.clear()
                ours = model(**inputs).last_hidden_state[kept]
                assert attended == [4 - len(heads) for heads in dead if len(heads) < 4]
            theirs, best = plain(**inputs).last_hidden_state[kept], exact(**inputs).last_hidden_state[kept]
        error, allowed = (ours - best).norm(), (theirs - best).norm()
        assert error <= 2 * max(allowed, torch.finfo(torch.float32).eps / 4 * best.norm())


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["garlic", "bert"])
def test_what_lives_is_the_same_bit_for_bit(kind, dtype, attended, monkeypatch):
    model, inputs = with_dead_heads(kind, ((0, 2), (0, 1, 2, 3))).to(dtype), tokens(2, 20, True)
    with planner.using_table("off"), torch.inference_mode():
        fewer = model(**inputs).last_hidden_state
        monkeypatch.setattr(fuse, "live_heads", lambda *_: torch.ones(4, dtype=torch.bool))
        whole = copy.deepcopy(model)(**inputs).last_hidden_state
    assert attended == [2, 4, 4] and torch.equal(fewer, whole)


@needs_kernels
@pytest.mark.parametrize("kind", ["garlic", "bert"])
def test_heads_die_and_live_again_with_their_weights(kind, attended):
    model, inputs = with_dead_heads(kind, ((1,), (2,)), "v"), tokens(2, 9, True)
    plain = copy.deepcopy(model)
    sp.unfuse_encoder_(plain)

    def check(*heads):
        model(**inputs)  # where nothing was left out a change is seen one call later
        attended.clear()
        torch.testing.assert_close(model(**inputs).last_hidden_state, plain(**inputs).last_hidden_state)
        assert attended == list(heads)

    with torch.no_grad():
        check(3, 3)
        for m in (model, plain):
            (_, _, value, start), (_, out, _, _) = attention_layers(m)
            value.bias[start + 16 :][:16] = 0.5  # a constant is no zero
            out.values[out.col_indices == 3] = 0  # kept blocks of zeros
        check(4, 2)
        for m in (model, plain):
            (_, first, _, _), (_, out, _, _) = attention_layers(m)
            first.values[first.col_indices > 0] = 0
            out.values[out.col_indices == 3] = 0.1
        check(1, 3)
    dense = next(attention_layers(with_dead_heads(kind, ((1,), (2,)))))
    back = dense[1].to_dense()
    assert fuse.live_heads(dense[0], back, 16).all(), "only layers that are sparse tell when they change"


@needs_kernels
@pytest.mark.parametrize("kind", ["garlic", "bert"])
def test_heads_that_share_a_block_go_together(kind, attended):
    model, inputs = with_dead_heads(kind, ((2, 3), ()), block=32), tokens(2, 9, True)
    with torch.no_grad():
        _, (_, out, _, _) = attention_layers(model)
        out.values[:, :, :16] = 0  # one head of two
        ours = model(**inputs).last_hidden_state
        assert attended == [2, 4]
        sp.unfuse_encoder_(model)
        torch.testing.assert_close(ours, model(**inputs).last_hidden_state)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_dead_heads_of_quantized_layers(dtype, attended):
    """A row of x is rounded by the largest of what is left of it: no more coarsely than before."""
    model, inputs = with_dead_heads("bert", ((0, 2), (0, 1, 2, 3))), tokens(2, 20, True)
    sp.quantize_(model, dtype=dtype)
    plain, exact = copy.deepcopy(model), copy.deepcopy(model)
    sp.unfuse_encoder_(plain)
    layers = [m for m in exact.modules() if isinstance(m, sp.SparseLinear)]
    convert.swap_modules(exact, {layer: layer.to_dense() for layer in layers})
    with torch.inference_mode():
        ours, theirs, best = (m(**inputs).last_hidden_state for m in (model, plain, exact))
    assert attended[:1] == [2]
    assert (ours - best).norm() <= 1.1 * (theirs - best).norm()


def test_a_model_of_which_nothing_is_gone_says_nothing():
    model = MAKERS["bert"]()
    result = sp.sparsify_(model, sp.BlockSparseConfig((16, 16), density=0.9), lambda name, _: ".layer" in name)
    assert result.dead_heads[0] == 0 and "heads" not in str(result)


def test_what_is_not_fused_says_why():
    decoder = transformers.BertModel(transformers.BertConfig(**SIZES, is_decoder=True))
    odd = transformers.BertModel(transformers.BertConfig(**SIZES, hidden_act="mish"))
    assert str(sp.fuse_encoder_(decoder)) == "encoder: BertEncoder, 2 layers, not fused: it is a decoder"
    assert "activation 'mish' has no kernel" in str(sp.fuse_encoder_(odd))
    assert not is_fused(decoder) and not is_fused(odd)
    nothing = sp.fuse_encoder_(torch.nn.Linear(4, 4))
    assert nothing.fused == [] and "no encoder of a known kind (GarlicEncoder, BertEncoder" in str(nothing)


def test_without_the_extension_nothing_is_fused(monkeypatch):
    monkeypatch.setattr(backends, "_library", None)
    monkeypatch.setattr(backends, "_reason", "the C++ extension was not built")
    model = MAKERS["bert"]().eval()
    assert str(sp.fuse_encoder_(model)).endswith("not fused: the C++ extension was not built")
    assert not is_fused(model)
    cpu = next(status for status in backends.status() if status.name == "cpu")
    assert cpu.reason == "the C++ extension was not built; encoders run unfused"


def test_joined_weights():
    weights = [sp.BsrWeight.from_dense(torch.randn(n, 24), torch.rand(n // 8, 3) > 0.5, (8, 8)) for n in (8, 16, 24)]
    joined = sp.BsrWeight.cat(weights).validate()
    assert torch.equal(joined.to_dense(), torch.cat([w.to_dense() for w in weights]))
    with pytest.raises(sp.SparsePruneError, match="24 inputs in blocks"):
        sp.BsrWeight.cat([weights[0], sp.BsrWeight.from_dense(torch.randn(8, 16), torch.ones(1, 2).bool(), (8, 8))])
    with pytest.raises(sp.SparsePruneError, match="multiples of 8"):
        sp.BsrWeight.cat([sp.BsrWeight.from_dense(torch.randn(9, 24), torch.ones(2, 3).bool(), (8, 8)), weights[0]])


GATED = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, mlp_bias=True)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=32)
    ),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=32)
    ),
}


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", GATED)
def test_gated_mlps_run_gate_and_up_in_one_call(kind, dtype, monkeypatch):
    torch.manual_seed(0)
    model = GATED[kind]().eval().to(dtype)
    only = lambda name, _: "mlp" in name  # noqa: E731
    result = sp.sparsify_(model, sp.BlockSparseConfig(blocksize=(16, 16), density=0.5), only)
    assert [(s.kind[-3:], s.layers, s.reason) for s in result.encoder.stacks] == [("MLP", 2, "")]
    calls, run = [], layers.run_glu_ready
    monkeypatch.setattr(layers, "run_glu_ready", lambda *arguments: calls.append(1) or run(*arguments))
    ids = torch.randint(5, 50, (2, 7))
    with planner.using_table("off"), torch.no_grad():
        model(ids)  # derives
        fused = model(ids).logits
        assert len(calls) == 2
        plain = copy.deepcopy(model)
        fuse.unfuse_encoder_(plain)
        expected = plain(ids).logits
        assert len(calls) == 2, "the model's own path again"
    tolerance = {"rtol": 1.6e-2, "atol": 1e-2} if dtype is torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(fused, expected, **tolerance)
    model(ids).logits.float().sum().backward()  # gradients take the model's own path
    assert model.model.layers[0].mlp.gate_proj.values.grad.abs().sum() > 0 and len(calls) == 2
    again = copy.deepcopy(model)
    with planner.using_table("off"), torch.no_grad():
        again.model.layers[0].mlp.gate_proj.values.zero_()
        changed = again(ids).logits
    assert not torch.equal(changed, fused) and torch.equal(model(ids).logits, model(ids).logits)
    seen = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        model(ids)
    assert seen, "a hook inside is called"


def on_cuda(*shape):
    """A tensor that says it lies on a CUDA device; nothing in it is read."""
    with FakeTensorMode():
        return torch.empty(*shape, device="cuda")


def test_runs_fused_on_a_cuda_device(monkeypatch):
    """Without gradients or the device's autocast, whatever the CPU has. test_gpu.py tests what runs there."""
    fused, x = made("bert").encoder.forward, on_cuda(2, 9, 64)
    monkeypatch.setattr(backends, "cpu_unavailable", lambda device, dtype: "no kernels")
    assert isinstance(fused, fuse.FusedForward) and not fused._may_run(x)  # parameters may want gradients
    with torch.no_grad():
        assert fused._may_run(x) and not fused._may_run(x.to("meta")) and not fused._may_run(torch.empty(2, 9, 64))
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
        assert not fused._may_run(x)


def test_gate_and_up_in_one_call_on_a_cuda_device(monkeypatch):
    linears = [torch.nn.Linear(64, 128) for _ in range(2)]
    gate, up = (sp.SparseLinear.from_dense(linear, torch.rand(4, 2) < 0.7, (32, 32)).eval() for linear in linears)
    x, calls = on_cuda(5, 64), []
    monkeypatch.setattr(layers.ops, "bsr_linear_glu", lambda *arguments: calls.append(arguments))
    with torch.no_grad():
        sp.fused_glu(gate, up, x, "gelu")
        ((given, *weights, gate_bias, up_bias, activation),) = calls
        assert given is x and gate_bias is gate.bias and up_bias is up.bias and activation == "gelu"
        assert [packed.values for packed in weights] == [gate.values, up.values]
        assert [packed.derived for packed in weights] == [gate._derived, up._derived]  # made once, not in each call
        assert weights[0].derived.key is not None
