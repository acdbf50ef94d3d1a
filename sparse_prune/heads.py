"""Which linear layers make up an attention head, so that a head is kept or pruned as one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from .errors import SparsePruneError
from .linears import is_linear


@dataclass(frozen=True)
class HeadGroup:
    """The linear layers of one attention module, by name.

    num_heads  decisions to make: the heads, or the key-value heads where several queries share one
    rows       layers [heads * d, K] whose rows belong to heads in order: query, key, value
    fused      layers [3 * heads * d, K]: query, key and value rows one after the other
    columns    layers [N, heads * d] whose columns belong to heads in order: the output projection
    """

    num_heads: int
    rows: tuple[str, ...] = ()
    fused: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.num_heads, int) or self.num_heads < 1:
            raise SparsePruneError("num_heads", "a positive integer", self.num_heads, "pass the number of heads")

    def parts(self) -> Iterator[tuple[str, int, int]]:
        """(name, how many copies of the heads it stacks, the dimension they lie along) of each layer."""
        yield from ((name, 1, 0) for name in self.rows)
        yield from ((name, 3, 0) for name in self.fused)
        yield from ((name, 1, 1) for name in self.columns)


# (query, key, value, output) as children of one module, seen in BERT-like, DistilBERT, BART and CLIP, LLaMA, T5.
SEPARATE = (
    ("query", "key", "value", "out"),
    ("q_lin", "k_lin", "v_lin", "out_lin"),
    ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q", "k", "v", "o"),
)
FUSED = (("qkv", "out"), ("qkv", "proj"), ("qkv", "out_proj"), ("c_attn", "c_proj"))
# Fewer key-value heads come first: a head of keys decides for all queries that read it.
COUNTS = ("num_key_value_heads", "num_kv_heads", "num_attention_heads", "num_heads", "n_heads", "n_head", "heads")


def find_heads(model: nn.Module) -> list[HeadGroup]:
    """The attention modules of a model that follow a common naming, each as a HeadGroup.

    Separate projections: query, key, value with the sibling output.dense (BERT, RoBERTa, ViT), q_lin.., q_proj.. with out_proj or
    o_proj, T5's q, k, v, o. Fused ones: qkv with out, proj or out_proj, GPT-2's c_attn with c_proj. The number of heads comes from
    the module, its config, or the model's config. Raises SparsePruneError where a module is recognised but no number is found.
    """
    modules = dict(model.named_modules())
    found = []
    for name, module in modules.items():
        prefix = f"{name}." if name else ""
        parent = f"{name.rpartition('.')[0]}." if "." in name else ""

        def linear(child: str) -> bool:
            return child in modules and is_linear(modules[child])

        for query, key, value, out in SEPARATE:
            rows = tuple(prefix + child for child in (query, key, value))
            out_name = prefix + out
            if query == "query" and not linear(out_name):
                out_name = f"{parent}output.dense"
            if all(map(linear, (*rows, out_name))):
                found.append(HeadGroup(_count(model, module, name), rows=rows, columns=(out_name,)))
        for qkv, out in FUSED:
            if linear(prefix + qkv) and linear(prefix + out):
                found.append(HeadGroup(_count(model, module, name), fused=(prefix + qkv,), columns=(prefix + out,)))
    return found


def _count(model: nn.Module, module: nn.Module, name: str) -> int:
    for owner in (module, getattr(module, "config", None), getattr(model, "config", None)):
        for count in COUNTS:
            value = getattr(owner, count, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    raise SparsePruneError(
        f"{name}.num_heads", "a number of heads on the module or its config", "none", "pass heads=[HeadGroup(...)]"
    )
