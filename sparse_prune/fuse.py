"""fuse_encoder_: a transformer encoder's layers at inference speed, attention and LayerNorm by kernels of ours.

A model keeps its modules, parameters and state dict. The stack of layers gets a forward of its own, which runs each layer as
qkv product, attention read straight from it, output product + residual, LayerNorm, feed-forward product + activation, product +
residual, LayerNorm; and which hands over to the stack's own forward whenever the result could differ or a gradient is wanted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import backends
from .layers import SparseLinear, fused_glu, fused_linear
from .ops import Activation, attention, layer_norm, values_key

# By Hugging Face's names.
ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


@dataclass(frozen=True)
class FusedStack:
    """One stack of encoder layers: `reason` is empty where it is fused."""

    name: str
    kind: str
    layers: int
    reason: str

    def __str__(self) -> str:
        how = f"not fused: {self.reason}" if self.reason else "fused for inference"
        return f"{self.name or 'model'}: {self.kind}, {self.layers} layers, {how}"


@dataclass(frozen=True)
class FuseResult:
    """One row per encoder stack that was found; print it for the table."""

    stacks: list[FusedStack]

    @property
    def fused(self) -> list[str]:
        """Names of the stacks that run fused now."""
        return [stack.name for stack in self.stacks if not stack.reason]

    def __str__(self) -> str:
        if not self.stacks:
            return f"no encoder of a known kind ({', '.join(KINDS)}): nothing fused"
        return "\n".join(map(str, self.stacks))


def fuse_encoder_(model: nn.Module) -> FuseResult:
    """Run the encoder of model fused where it is in evaluation, without gradients and on a CPU or a CUDA device, in place.

    Knows Garlic and the BERT family of Hugging Face (BERT and MiniLM, RoBERTa, XLM-RoBERTa, ELECTRA, DistilBERT), dense or sparse.
    In decoders (Llama, Mistral, Qwen 2 and 3, Gemma, SmolLM3, OLMo 2) gate and up of the MLPs run in one call if both are sparse.
    Results equal the unfused ones to the dtype's rounding. Training, gradients, autocast, torch.compile, hooks inside the stack and
    requests for attentions take the model's own path, as if nothing had been fused. `sparsify_` and `load_packed` do this by
    themselves; `unfuse_encoder_` undoes it.
    """
    rows = []
    for name, stack in model.named_modules():
        kind = KINDS.get(type(stack).__name__)
        if kind is None or not _is_own_class(stack):
            continue
        reason = kind.why_not(stack)
        if not reason and not torch.cuda.is_available():
            reason = backends.cpu_unavailable(torch.device("cpu"), torch.float32) or ""
        if not reason:
            stack.forward = FusedForward(stack)
        rows.append(FusedStack(name, type(stack).__name__, len(kind.layers(stack)), reason))
    counts: dict[tuple[str, str], int] = {}
    for module in model.modules():
        if type(module).__name__ not in GATED or not _is_own_class(module) or not _gated_sparse(module):
            continue
        reason = _unknown_activation(_gated_activation(module))
        if not reason:
            module.forward = FusedGlu(module)
        key = type(module).__name__, reason
        counts[key] = counts.get(key, 0) + 1
    return FuseResult(rows + [FusedStack("", kind, count, reason) for (kind, reason), count in counts.items()])


def unfuse_encoder_(model: nn.Module) -> None:
    """Give every stack that fuse_encoder_ changed its own forward back."""
    for stack in model.modules():
        if isinstance(vars(stack).get("forward"), FusedForward):
            del stack.forward


def _is_own_class(stack: nn.Module) -> bool:
    """Whether the class is the one meant, not another of the same name."""
    module = type(stack).__module__
    return module.startswith(("transformers.models.", "sparse_prune.models."))


class FusedForward:
    """The forward of a fused stack. It holds the stack, and what is derived from its weights, which copies and files leave out."""

    def __init__(self, stack: Any) -> None:
        self.stack = stack  # a module of another library's, whose attributes no type tells
        self.derived: dict[object, tuple[object, Any]] = {}

    def __getstate__(self) -> dict:
        return {"stack": self.stack, "derived": {}}

    def __call__(self, *args: Any, **options: Any) -> Any:
        stack = self.stack
        rest = dict(options)
        x, *more = args or (rest.pop("hidden_states"),)
        if self._may_run(x):
            output = KINDS[type(stack).__name__].run(self, stack, x, *more, **rest)
            if output is not None:
                return output
        return type(stack).forward(stack, *args, **options)

    def _may_run(self, x: Tensor) -> bool:
        stack = self.stack
        if (
            x.device.type not in ("cpu", "cuda")
            or stack.training
            or torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or torch.is_autocast_enabled(x.device.type)
        ):
            return False
        if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in stack.parameters())):
            return False
        return x.is_cuda or backends.cpu_unavailable(x.device, x.dtype) is None

    def remember(self, name: object, key: object, make: Callable[[], Any]) -> Any:
        """make(), again only after key has changed."""
        found = self.derived.get(name)
        if found is None or found[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                found = self.derived[name] = (key, make())
        return found[1]

    def attend(self, name: int, x: Tensor, projections: tuple[Any, ...], size: int, **masks: Any) -> Tensor:
        """Attention of x[B, T, H] by one qkv projection or by three: the heads of `size` side by side, [B, T, heads * size]."""
        batch, length, _ = x.shape
        if len(projections) == 3 and _joinable(projections):
            projections = (self.remember(name, tuple(map(_key, projections)), lambda: SparseLinear.cat(projections)),)
        if len(projections) == 1:
            q, k, v = fused_linear(projections[0], x).view(batch, length, 3, -1, size).unbind(2)
        else:
            q, k, v = (fused_linear(p, x).view(batch, length, -1, size) for p in projections)
        return attention(q, k, v, **masks).view(batch, length, -1)


class FusedGlu(FusedForward):
    """The forward of a gated MLP, down(act(gate(x)) * up(x)), with gate and up in one call."""

    def __call__(self, x: Tensor) -> Any:
        module = self.stack
        gate, up = module.gate_proj, module.up_proj
        if not (self._may_run(x) and _gated_sparse(module) and _plain((gate, up))):
            return type(module).forward(module, x)
        return module.down_proj(fused_glu(gate, up, x, ACTIVATIONS[_gated_activation(module)]))


def _gated_sparse(module: Any) -> bool:
    return type(module.gate_proj) is SparseLinear and type(module.up_proj) is SparseLinear


def _gated_activation(module: Any) -> str:
    return getattr(module.config, "hidden_activation", None) or module.config.hidden_act


def _key(linear: SparseLinear) -> object:
    """Changes whenever a tensor of linear does, and with refresh_(), which makes a new Derived."""
    bias, scales = linear.bias, linear._buffers.get("scales")
    quantized = None if scales is None else values_key(scales)
    return (
        linear._derived,
        values_key(linear.values),
        quantized,
        linear.weight_only,
        linear.x_scale,
        linear.col_indices.data_ptr(),
        None if bias is None else values_key(bias),
    )


def _joinable(layers: tuple[Any, ...]) -> bool:
    if not all(type(layer) is SparseLinear for layer in layers):
        return False
    kinds = {(layer.blocksize, layer.values.dtype, layer.weight_only, layer.x_scale) for layer in layers}
    alike = len(kinds) == 1
    return alike and all(layer.out_features % layer.blocksize[0] == 0 for layer in layers)


def _norm(module: nn.LayerNorm, x: Tensor, residual: Tensor | None = None) -> Tensor:
    parameters = module._parameters
    return layer_norm(x, parameters["weight"], parameters["bias"], module.eps, residual)


def _norm_after(linear: Any, module: nn.LayerNorm, y: Tensor, x: Tensor) -> Tensor:
    """LayerNorm(linear(y) + x): the sum where the kernel that comes last can take it along."""
    if type(linear) is SparseLinear:
        return _norm(module, linear(y, residual=x))
    return _norm(module, F.linear(y, linear.weight, linear.bias), x)


def _plain(modules: tuple[nn.Module, ...]) -> bool:
    """Whether modules are what they were made as, with no hook that wants to see them run."""
    return not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def _linears(modules: tuple[nn.Module, ...]) -> bool:
    return all(type(m) in (nn.Linear, SparseLinear) for m in modules)


class _Garlic:
    """Pre-norm layers with a bias by distance; see models/garlic.py."""

    @staticmethod
    def layers(stack: Any) -> nn.ModuleList:
        return stack.layers

    @staticmethod
    def why_not(stack: Any) -> str:
        return ""

    @staticmethod
    def parts(stack: Any) -> Iterator[tuple[Any, ...]]:
        for layer in stack._modules["layers"]:
            own = layer._modules
            inner = own["attention"]._modules
            names = ("attention_norm", "ffn_norm", "ffn_in", "ffn_out", "attention")
            yield (inner["qkv"], inner["out"], *(own[name] for name in names), layer)

    @classmethod
    def linears(cls, stack: Any) -> Iterator[tuple[tuple[Any, ...], Any, Any, Any]]:
        """Per layer: (the projections to q, k, v), the projection back, and both of the feed-forward network."""
        for qkv, out, _, _, ffn_in, ffn_out, *_ in cls.parts(stack):
            yield (qkv,), out, ffn_in, ffn_out

    @staticmethod
    def head_size(stack: Any) -> int:
        return stack.layers[0].attention.head_size

    @staticmethod
    def set_heads_(stack: Any, heads: int) -> None:
        """Tell the modules that they have that many heads now."""
        for layer in stack.layers:
            layer.attention.heads = heads
        stack.distances = nn.Embedding.from_pretrained(stack.distances.weight[:, :heads].detach().clone())

    @classmethod
    def run(cls, fused, stack, x, attention_mask, output_attentions, output_hidden_states):
        layers = list(cls.parts(stack))
        if output_attentions or not all(_plain(parts) and _linears((*parts[:2], *parts[4:6])) for parts in layers):
            return None
        weight, length = stack.distances.weight, x.shape[1]
        everywhere = torch.ones(1, length, device=x.device)
        bias = fused.remember(
            "bias", (length, values_key(weight)), lambda: stack.bias(everywhere).detach().to(x.dtype).contiguous()
        )  # [1, heads, T, T]
        masks = {"bias": bias, "keep": (attention_mask != 0)[:, None, None, :]}
        size = cls.head_size(stack)
        states = [x]
        for i, (qkv, out, attention_norm, ffn_norm, ffn_in, ffn_out, _, _) in enumerate(layers):
            context = fused.attend(i, _norm(attention_norm, x), (qkv,), size, **masks)  # [B, T, H]
            x = fused_linear(out, context, residual=x)  # [B, T, H]
            inner = fused_linear(ffn_in, _norm(ffn_norm, x), "gelu")  # [B, T, F]
            x = fused_linear(ffn_out, inner, residual=x)  # [B, T, H]
            states.append(x)
        x = states[-1] = _norm(stack.norm, x)
        output = sys.modules["transformers"].modeling_outputs.BaseModelOutput
        return output(last_hidden_state=x, hidden_states=tuple(states) if output_hidden_states else None)


class _Bert:
    """Post-norm layers of BERT and those that copied its module names."""

    @staticmethod
    def layers(stack: Any) -> nn.ModuleList:
        return stack.layer

    @staticmethod
    def why_not(stack: Any) -> str:
        config = stack.config
        if config.is_decoder or config.add_cross_attention:
            return "it is a decoder"
        return _unknown_activation(config.hidden_act)

    @staticmethod
    def config(stack: Any) -> Any:
        return stack.config

    @classmethod
    def activation(cls, stack: Any) -> str:
        return stack.config.hidden_act

    @staticmethod
    def parts(stack: Any) -> Iterator[tuple[Any, ...]]:
        for layer in stack._modules["layer"]:
            own = layer._modules
            attending, inner, output = own["attention"]._modules, own["intermediate"], own["output"]
            self_, merge = attending["self"], attending["output"]
            linears = (*(self_._modules[name] for name in ("query", "key", "value")), merge._modules["dense"])
            linears += (inner._modules["dense"], output._modules["dense"])
            norms = merge._modules["LayerNorm"], output._modules["LayerNorm"]
            yield (*linears, *norms, own["attention"], self_, merge, inner, output, layer)

    @classmethod
    def linears(cls, stack: Any) -> Iterator[tuple[tuple[Any, ...], Any, Any, Any]]:
        """Per layer: (the projections to q, k, v), the projection back, and both of the feed-forward network."""
        for query, key, value, merge, ffn_in, ffn_out, *_ in cls.parts(stack):
            yield (query, key, value), merge, ffn_in, ffn_out

    @staticmethod
    def head_size(stack: Any) -> int:
        return stack.layer[0].attention.self.attention_head_size

    @staticmethod
    def set_heads_(stack: Any, heads: int) -> None:
        """Nothing to tell: the modules take the number of heads from their linear layers."""

    @classmethod
    def run(cls, fused, stack, x, attention_mask=None, encoder_hidden_states=None, *args, **options):
        config = cls.config(stack)
        wanted = ("output_attentions", "output_hidden_states", "use_cache", "cache", "past_key_values")
        if args or encoder_hidden_states is not None or any(options.get(name) for name in wanted) or _captured():
            return None
        if config.output_attentions or config.output_hidden_states:
            return None
        masks = _as_masks(attention_mask, x)
        layers = list(cls.parts(stack))
        if masks is None or not all(_linears(parts[:6]) and _only_captures(parts) for parts in layers):
            return None
        activation, size = ACTIVATIONS[cls.activation(stack)], cls.head_size(stack)
        for i, (query, key, value, merge, ffn_in, ffn_out, attention_norm, ffn_norm, *_) in enumerate(layers):
            context = fused.attend(i, x, (query, key, value), size, **masks)  # [B, T, H]
            x = _norm_after(merge, attention_norm, context, x)  # [B, T, H]
            inner = fused_linear(ffn_in, x, activation)  # [B, T, F]
            x = _norm_after(ffn_out, ffn_norm, inner, x)  # [B, T, H]
        return cls.output(x)

    @staticmethod
    def output(x: Tensor) -> object:
        outputs = sys.modules["transformers"].modeling_outputs
        return outputs.BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=x)


class _DistilBert(_Bert):
    """The same computation under other names."""

    @staticmethod
    def config(stack: Any) -> Any:
        return stack.layer[0].attention.config

    @classmethod
    def why_not(cls, stack: Any) -> str:
        return _unknown_activation(cls.activation(stack))

    @classmethod
    def activation(cls, stack: Any) -> str:
        return cls.config(stack).activation

    @staticmethod
    def parts(stack: Any) -> Iterator[tuple[Any, ...]]:
        for layer in stack._modules["layer"]:
            own = layer._modules
            attending, ffn = own["attention"], own["ffn"]
            linears = *(attending._modules[name] for name in ("q_lin", "k_lin", "v_lin", "out_lin")), *_ffn(ffn)
            yield (*linears, own["sa_layer_norm"], own["output_layer_norm"], attending, ffn, layer)

    @staticmethod
    def head_size(stack: Any) -> int:
        return stack.layer[0].attention.attention_head_size

    @staticmethod
    def output(x: Tensor) -> object:
        return sys.modules["transformers"].modeling_outputs.BaseModelOutput(last_hidden_state=x)


def _ffn(module: nn.Module) -> tuple[Any, Any]:
    return module._modules["lin1"], module._modules["lin2"]


def _unknown_activation(name: object) -> str:
    return "" if name in ACTIVATIONS else f"activation {name!r} has no kernel"


def _captured() -> bool:
    """Whether Hugging Face is collecting hidden states or attentions from inside the stack during this call."""
    capturing = sys.modules.get("transformers.utils.output_capturing")
    return bool(capturing and capturing._active_collector.get())


def _only_captures(modules: tuple[nn.Module, ...]) -> bool:
    """Like _plain, but for Hugging Face's own hooks, which _captured tells are idle."""
    for module in modules:
        if module._forward_pre_hooks:
            return False
        if module._forward_hooks and any(
            hook.__module__ != "transformers.utils.output_capturing" for hook in module._forward_hooks.values()
        ):
            return False
    return True


def _as_masks(mask: Tensor | None, x: Tensor) -> dict[str, Tensor] | None:
    """A mask of Hugging Face's as keywords of `attention`; None for one of another form."""
    if mask is None:
        return {}
    if mask.dim() != 4:
        return None
    if mask.dtype == torch.bool:
        return {"keep": mask}
    return {"bias": mask.to(x.dtype)} if mask.is_floating_point() else None


# MLPs that compute down_proj(act(gate_proj(x)) * up_proj(x)) and nothing else.
GATED = (
    "LlamaMLP",
    "MistralMLP",
    "Qwen2MLP",
    "Qwen3MLP",
    "GemmaMLP",
    "Gemma2MLP",
    "Gemma3MLP",
    "SmolLM3MLP",
    "Olmo2MLP",
)

KINDS: dict[str, type[_Garlic] | type[_Bert]] = {
    "GarlicEncoder": _Garlic,
    "BertEncoder": _Bert,
    "RobertaEncoder": _Bert,
    "XLMRobertaEncoder": _Bert,
    "ElectraEncoder": _Bert,
    "Transformer": _DistilBert,
}
