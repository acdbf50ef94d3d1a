"""fuse_encoder_: a transformer encoder's layers at inference speed, attention and LayerNorm by kernels of ours.

A model keeps its modules, parameters and state dict. The stack of layers gets a forward of its own, which runs each layer as
qkv product, attention read straight from it, output product + residual, LayerNorm, feed-forward product + activation, product +
residual, LayerNorm; and which hands over to the stack's own forward whenever the result could differ or a gradient is wanted.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import backends
from .layers import SparseLinear, fused_glu, fused_linear
from .masks import grid_shape
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
    Attention heads that contribute nothing (`live_heads`) are not computed: what is left of such a layer's projections is copied.
    Results equal the unfused ones to the dtype's rounding. Training, gradients, autocast, torch.compile, hooks inside the stack and
    requests for attentions take the model's own path, as if nothing had been fused. `sparsify_` and `load_packed` do this by
    themselves; `unfuse_encoder_` undoes it.
    """
    rows = []
    counts: dict[tuple[str, str], int] = {}
    for name, module in model.named_modules():
        named = type(module).__name__
        if named not in KINDS and named not in GATED or not _is_own_class(module):
            continue
        if named in KINDS:
            kind = KINDS[named]
            reason = kind.why_not(module)
            if not reason and not torch.cuda.is_available():
                reason = backends.cpu_unavailable(torch.device("cpu"), torch.float32) or ""
            if not reason:
                module.forward = FusedForward(module)
            rows.append(FusedStack(name, named, len(kind.layers(module)), reason))
        elif _gated_sparse(module):
            reason = _unknown_activation(_gated_activation(module))
            if not reason:
                module.forward = FusedGlu(module)
            counts[named, reason] = counts.get((named, reason), 0) + 1
    return FuseResult(rows + [FusedStack("", kind, count, reason) for (kind, reason), count in counts.items()])


def count_dead_heads(model: nn.Module) -> tuple[int, int]:
    """(dead, all): the attention heads of model's fused encoders that are left out (`live_heads`), and how many it has."""
    alive = [
        live_heads(projections, out, kind.head_size(module))
        for module in model.modules()
        if isinstance(vars(module).get("forward"), FusedForward)
        and (kind := KINDS.get(type(module).__name__)) is not None
        for projections, out, *_ in kind.linears(module)
    ]
    return sum(int((~live).sum()) for live in alive), sum(map(len, alive))


def feed_forwards(model: nn.Module) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """(layers in, layer out) of each feed-forward network of a known kind: out(act(in(x))), or out(act(gate(x)) * up(x)).

    Between them stand functions of single neurons alone, which give 0 for 0.
    """
    for module in model.modules():
        named = type(module).__name__
        if named in KINDS and _is_own_class(module) and not KINDS[named].why_not(module):
            for _, _, ffn_in, ffn_out in KINDS[named].linears(module):
                yield (ffn_in,), ffn_out
        elif named in GATED and _is_own_class(module) and not _unknown_activation(_gated_activation(module)):
            parts: Any = module
            yield (parts.gate_proj, parts.up_proj), parts.down_proj


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

    def heads(self, name: int, projections: tuple[Any, ...], out: Any, size: int) -> Heads:
        """The Heads of a layer by its projections to q, k, v and back; made again when their weights change."""
        found = self.derived.get(name)
        # Where nothing was copied an old answer is never wrong, and a Derived is new one call after values are.
        key = _key if found is None or found[1].copied else _derived
        return self.remember(name, tuple(map(key, (*projections, out))), lambda: _heads(projections, out, size))


@dataclass(frozen=True, eq=False)
class Heads:
    """The heads of one layer that its output depends on.

    projections   to q, k and v of these heads: one layer, or three; none where no head is left
    out           the projection back, which takes these heads alone; where none is left, zeros
    live          their numbers, int64; None: all
    copied        whether either holds copies of the model's weights
    """

    projections: tuple[Any, ...]
    out: Any
    live: Tensor | None
    copied: bool

    def of(self, mask: Tensor) -> Tensor:
        """What these heads take of a mask that broadcasts to [B, heads, T, T]."""
        return mask if self.live is None or mask.shape[1] == 1 else mask[:, self.live]

    def attend(self, x: Tensor, size: int, **masks: Any) -> Tensor:
        """Attention of x[B, T, H], masks being `of` these heads of `size`: [B, T, heads * size], what `out` takes."""
        batch, length, _ = x.shape
        if not self.projections:
            return x.new_zeros(batch, length, self.out.in_features)
        if len(self.projections) == 1:
            q, k, v = fused_linear(self.projections[0], x).view(batch, length, 3, -1, size).unbind(2)
        else:
            q, k, v = (fused_linear(p, x).view(batch, length, -1, size) for p in self.projections)
        return attention(q, k, v, **masks).view(batch, length, -1)


def _heads(projections: tuple[Any, ...], out: Any, size: int) -> Heads:
    live, given = live_heads(projections, out, size), projections
    every = bool(live.all())
    if not every:
        unit = _unit(projections, out, size)
        units = live.view(-1, unit // size)[:, 0].nonzero()[:, 0]  # int64
        projections = tuple(_of_units(p, 0, units, unit, 3 // len(given)) for p in given if len(units))
        out = _of_units(out, 1, units if len(units) else units.new_zeros(1), unit)
    if len(projections) == 3 and _joinable(projections):
        projections = (SparseLinear.cat(projections),)
    return Heads(projections, out, None if every else live.nonzero()[:, 0], projections is not given)


def live_heads(projections: tuple[Any, ...], out: Any, size: int) -> Tensor:
    """bool [heads]: False for the heads of `size` that can be left out of a layer, by its projections to q, k, v and back.

    A head is dead where all weights that read it in `out` are zero, or where its values are: their weights and biases. Where blocks
    span several heads, these go only together. Layers that are not all sparse keep all heads.
    """
    every, value = torch.ones(out.in_features // size, dtype=torch.bool), projections[-1]
    if not all(type(layer) is SparseLinear for layer in (*projections, out)) or (_full(out, 1) and _full(value, 0)):
        return every
    read, made = (
        out.packed.nonzero(1),
        value.packed.nonzero(0)[-out.in_features :],
    )  # of one layer for q, k, v the end is v
    if value.bias is not None:
        made = made | (value.bias[-len(made) :] != 0)
    live = read.view(-1, size).any(1) & made.view(-1, size).any(1)
    unit = _unit(projections, out, size)
    if len(read) % unit:
        return every
    return live.view(-1, unit // size).any(1).repeat_interleave(unit // size)


def _full(layer: SparseLinear, dim: int) -> bool:
    """Whether a glance finds weights in every block-row (dim 0) or block-column (dim 1): blocks whose first one is not zero."""
    # By NumPy: ten small operations of PyTorch, in each layer of a first call, would take a twentieth of that call's time.
    seen = layer.values.detach()[:, 0, 0].float().cpu().numpy() != 0  # [nnzb]
    if dim == 1:
        at = layer.col_indices.cpu().numpy()
    else:
        counts = np.diff(layer.crow_indices.cpu().numpy())
        at = np.repeat(np.arange(len(counts)), counts)
    blocks = grid_shape((layer.out_features, layer.in_features), layer.blocksize)[dim]
    return bool(np.bincount(at[seen], minlength=blocks).all())


def _unit(projections: tuple[Any, ...], out: Any, size: int) -> int:
    """Features of the fewest heads that are whole blocks of all layers."""
    return math.lcm(size, out.blocksize[1], *(p.blocksize[0] for p in projections))


def _of_units(layer: SparseLinear, dim: int, units: Tensor, unit: int, parts: int = 1) -> SparseLinear:
    """layer with some units of its outputs (dim 0, of each of `parts` alike) or inputs (dim 1), for inference."""
    size = layer.out_features if dim == 0 else layer.in_features
    chosen = (torch.arange(parts, device=units.device)[:, None] * (size // unit // parts) + units).flatten()
    per = unit // layer.blocksize[dim]
    blocks = (chosen[:, None] * per + torch.arange(per, device=units.device)).flatten()
    bias = None if layer.bias is None else layer.bias.detach()
    if bias is not None and dim == 0:
        bias = bias.view(-1, unit)[chosen].flatten()
    part = SparseLinear.from_bsr(layer.packed.select(dim, blocks), bias).requires_grad_(False).eval()
    part.planned = layer.planned
    return part


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


def _key(linear: Any) -> object:
    """Changes whenever a tensor of a SparseLinear does, and with refresh_(), which makes a new Derived; others are not copied."""
    if type(linear) is not SparseLinear:
        return linear
    # Straight to the dicts: nn.Module's attribute lookup costs more than all the rest.
    parameters: Any = linear._parameters
    buffers: Any = linear._buffers
    values, bias, scales = parameters["values"], parameters["bias"], buffers.get("scales")
    return (
        linear._derived,
        values_key(values),
        None if scales is None else values_key(scales),
        linear._weight_only,
        linear._x_scale,
        buffers["col_indices"].data_ptr(),
        None if bias is None else values_key(bias),
    )


def _derived(linear: Any) -> object:
    return vars(linear).get("_derived", linear)


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
        everywhere, key = torch.ones(1, length, device=x.device), (length, values_key(weight))
        whole = fused.remember(
            "bias", key, lambda: stack.bias(everywhere).detach().to(x.dtype).contiguous()
        )  # [1, heads, T, T]
        keep = (attention_mask != 0)[:, None, None, :]
        size = cls.head_size(stack)
        states = [x]
        for i, (qkv, out, attention_norm, ffn_norm, ffn_in, ffn_out, _, _) in enumerate(layers):
            heads, bias = fused.heads(i, (qkv,), out, size), whole
            if heads.live is not None:
                bias = fused.remember(("bias", i), (key, heads), lambda heads=heads: heads.of(whole))
            context = heads.attend(_norm(attention_norm, x), size, bias=bias, keep=keep)  # [B, T, live heads * size]
            x = fused_linear(heads.out, context, residual=x)  # [B, T, H]
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
            heads = fused.heads(i, (query, key, value), merge, size)
            of_heads = {name: heads.of(mask) for name, mask in masks.items()}
            context = heads.attend(x, size, **of_heads)  # [B, T, live heads * size]
            x = _norm_after(heads.out, attention_norm, context, x)  # [B, T, H]
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
