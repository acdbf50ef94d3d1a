"""Packed checkpoints in vLLM, which calls `register` in each of its processes: the entry point `vllm.general_plugins` names it.

A packed directory's config.json says "sparse_prune" where vLLM looks for a quantization method, and describes the sparse layers.
vLLM builds its own model, in which q, k and v are one layer, and so are gate and up; each asks SparsePruneVllmConfig for a method,
and gets one that reads NAME.values and the index of every part and joins them (BsrWeight.cat). Layers that stayed dense take
vLLM's own method. Under tensor parallelism each rank reads a layer whole and keeps its rows or columns of blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from ..bsr import BsrWeight, check_finite, validate_bsr
from ..errors import SparsePruneError
from ..layers import SparseLinear
from ..serialization import METHOD, PackedLayer, check_version, parse_layers

_REMEDY = "pack the model again"


class SparsePruneVllmConfig(QuantizationConfig):
    """layers: name in the checkpoint -> what it says of it; packed_modules_mapping names vLLM's modules by theirs."""

    def __init__(self, layers: Mapping[str, Any]) -> None:
        super().__init__()
        self.layers = parse_layers(layers, "quantization_config.layers")

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SparsePruneVllmConfig:
        """The `quantization_config` of a packed config.json; raises SparsePruneError for one of a later version, or damaged."""
        check_version(config.get("version"), "quantization_config.version")
        return cls(config.get("layers", {}))

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80  # of the Triton kernels

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # config.json says it all

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the layers as vLLM's model names its modules."""
        self.layers = hf_to_vllm_mapper.apply_dict(self.layers)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        """The method of a linear layer: ours if any of its parts is sparse in the checkpoint. Raises SparsePruneError for another
        kind of layer that is sparse there, such as an output embedding."""
        parts = [prefix] if prefix in self.layers else self._parts(prefix)
        sparse = [name for name in parts if name in self.layers]
        if not isinstance(layer, LinearBase):
            if sparse:
                got = f"{type(layer).__name__} {prefix}"
                raise SparsePruneError("quantization_config.layers", "linear layers of vLLM's", got, "keep it dense")
            return None
        return (
            SparseLinearMethod([(name, self.layers.get(name)) for name in parts])
            if sparse
            else UnquantizedLinearMethod()
        )

    def _parts(self, prefix: str) -> list[str]:
        """The names in the checkpoint of what vLLM merges into the module of that name."""
        parent, _, own = prefix.rpartition(".")
        names = self.packed_modules_mapping.get(own, [own])
        parts = [f"{parent}.{name}".lstrip(".") for name in names]
        if len(names) > 1 and not any(name in self.layers for name in parts):
            # vLLM's BERT calls attention.self.query and its like attention.output.qkv_proj: the one sibling that has such parts.
            above = parent.rpartition(".")[0] + "."
            homes = {
                name.rpartition(".")[0]
                for name in self.layers
                if name.startswith(above) and name.split(".")[-1] in names
            }
            homes = {home for home in homes if home.count(".") == parent.count(".")}
            if len(homes) == 1:
                (home,) = homes
                parts = [f"{home}.{name}" for name in names]
        return parts


class SparseLinearMethod(LinearMethodBase):
    """Weights of one layer of vLLM's, from parts (name, PackedLayer, or None for one that stayed dense) side by side."""

    def __init__(self, parts: Sequence[tuple[str, PackedLayer | None]]) -> None:
        self.parts = list(parts)
        self.loaded: list[dict[str, Tensor]] = [{} for _ in parts]

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Parameters without elements that take in what the checkpoint holds under their names.

        Raises SparsePruneError where the checkpoint's shapes are not the model's, or a rank's share cuts a block.
        """
        ranks, rank = getattr(layer, "tp_size", 1), getattr(layer, "tp_rank", 0)
        by_rows, by_columns = sum(output_partition_sizes) != output_size, input_size_per_partition != input_size
        sizes = output_partition_sizes if len(self.parts) > 1 or by_rows else [output_size]
        if len(sizes) != len(self.parts):
            got = f"{len(sizes)} for {', '.join(name for name, _ in self.parts)}"
            raise SparsePruneError("packed_modules_mapping", "a name for each part of the layer", got, "keep it dense")
        self.shares: list[tuple[slice, slice]] = []
        for i, ((name, entry), rows) in enumerate(zip(self.parts, sizes, strict=True)):
            # Where there are fewer heads of k and v than ranks, several hold the same.
            copies = getattr(layer, "num_kv_head_replicas", 1) if i else 1
            at = rank // copies * rows if by_rows else 0
            columns = rank * input_size_per_partition if by_columns else 0
            share = slice(at, at + rows), slice(columns, columns + input_size_per_partition)
            self.shares.append(share)
            if entry is None:
                continue
            whole = (rows * (ranks // copies) if by_rows else rows, input_size)
            if entry.shape != whole:
                expected = f"shape {whole}, as in vLLM's model"
                raise SparsePruneError(f"quantization_config.layers: {name}", expected, entry.shape, _REMEDY)
            for cut, size, block in zip(share, whole, entry.blocksize, strict=True):
                if cut.start % block or (cut.stop % block and cut.stop != size):
                    expected = f"shares in multiples of {block}, the block size of {name}"
                    raise SparsePruneError("tensor_parallel_size", expected, cut.stop - cut.start, "use fewer ranks")
        self.dtype, self.adds_up = params_dtype, by_columns  # over the ranks, of which the first adds the bias
        kinds = {"weight": params_dtype} if any(entry is None for _, entry in self.parts) else {}
        for _name, entry in self.parts:
            for part in entry.parts if entry is not None else ():
                values = params_dtype if entry is None or entry.dtype is None else entry.dtype
                kinds[part] = {"values": values, "scales": torch.float32}.get(part, torch.int32)
        for kind, dtype in kinds.items():
            parameter = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            parameter.weight_loader = partial(self._take, kind)  # type: ignore[attr-defined]  # where vLLM looks for it
            layer.register_parameter(kind, parameter)
        self.kinds = tuple(kinds)

    def _take(self, kind: str, parameter: nn.Parameter, loaded: Tensor, shard_id: str | int | None = None) -> None:
        """Keep a tensor of the part that shard_id names: "q", "k", "v", a number, or None for the only one."""
        index = 0 if shard_id is None else "qkv".index(shard_id) if isinstance(shard_id, str) else shard_id
        if not isinstance(index, int) or index >= len(self.parts) or (shard_id is None and len(self.parts) > 1):
            raise SparsePruneError("shard_id", f"one of {len(self.parts)} parts", repr(shard_id), _REMEDY)
        self.loaded[index][kind] = loaded.to(parameter.device, copy=True)  # a view would keep the mapped file in memory

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check what was read, join neighbours of one block size, and give the layer the modules that `apply` runs.

        Raises SparsePruneError where the checkpoint lacks a tensor, or holds indices that are not sound.
        """
        rest = zip(self.loaded, self.shares, strict=True)
        made = [self._part(*part, *of_it) for part, of_it in zip(self.parts, rest, strict=True)]
        pieces: list[nn.Module] = []
        for _, group in groupby(made, key=_kind):
            alike = list(group)
            packed = [piece for piece in alike if isinstance(piece, BsrWeight)]
            pieces += [SparseLinear.from_bsr(BsrWeight.cat(packed))] if packed else [_dense(piece) for piece in alike]
        for kind in self.kinds:
            delattr(layer, kind)
        self.loaded.clear()
        alone = getattr(layer, "tp_rank", 0) == 0 or not self.adds_up
        added_here = alone and not getattr(layer, "skip_bias_add", False)
        if len(pieces) == 1 and isinstance(pieces[0], SparseLinear) and added_here:
            pieces[0].bias = getattr(layer, "bias", None)  # added by the kernel
        layer.pieces = nn.ModuleList(pieces).requires_grad_(False).eval()

    def _part(
        self, name: str, entry: PackedLayer | None, loaded: Mapping[str, Tensor], share: tuple[slice, slice]
    ) -> BsrWeight | Tensor:
        for kind in ("weight",) if entry is None else entry.parts:
            if kind not in loaded:
                raise SparsePruneError(f"{name}.{kind}", "a tensor in the checkpoint", "none", _REMEDY)
        if entry is None:
            return loaded["weight"][share].to(self.dtype)
        crow, col, values = (loaded[kind] for kind in ("crow_indices", "col_indices", "values"))
        weight = (entry.shape, entry.blocksize, crow, col, values)
        validate_bsr(*weight, name, loaded.get("scales"), entry.weight_only)
        packed = BsrWeight(*weight, loaded.get("scales"), entry.weight_only, entry.x_scale)
        if entry.dtype is None:
            check_finite(packed.values, f"{name}.values")
            packed = packed.to(self.dtype)
        for dim, (cut, size) in enumerate(zip(share, entry.shape, strict=True)):
            if cut.stop - cut.start != size:
                packed = packed.narrow(dim, cut.start, cut.stop - cut.start)
        return packed

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] -> x @ W^T + bias, [..., N]."""
        pieces: Any = layer.pieces
        if len(pieces) == 1 and pieces[0].bias is bias:
            return pieces[0](x)
        y = torch.cat([piece(x) for piece in pieces], -1) if len(pieces) > 1 else pieces[0](x)
        return y if bias is None else y + bias


def _kind(piece: BsrWeight | Tensor) -> tuple:
    """What neighbours must share to be joined; a part that ends inside a block-row is joined to nothing."""
    if isinstance(piece, Tensor):
        return (id(piece),)
    whole = piece.shape[0] % piece.blocksize[0] == 0
    return (piece.blocksize, piece.values.dtype, piece.weight_only, piece.x_scale, None if whole else id(piece))


def _dense(weight: Any) -> nn.Linear:
    linear = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def register() -> None:
    """Make packed checkpoints a quantization method of vLLM's."""
    register_quantization_config(METHOD)(SparsePruneVllmConfig)
