"""`from_pretrained` and `save_pretrained` of packed checkpoints, as a Hugging Face quantization method of our own.

A packed directory's config.json carries `quantization_config` with `quant_method` = "sparse_prune" and each layer's shape, block
size and number of blocks, so that the dense weights never exist. transformers takes some 90 us for each tensor of a file, and a
sparse layer has four of them: in one process on a CPU they are read here, and transformers reads the rest. Where it has to place
them (device_map, names of its own), SparseLinear of the right sizes wait in the model for it. `import sparse_prune` imports this
module as soon as transformers' quantizers are there; importing it registers the method.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import safetensors
import torch
from torch import nn

# From the modules that define them: this runs while `transformers.modeling_utils` is still being imported.
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..bsr import check_finite, validate_bsr
from ..convert import after_conversion, swap_modules
from ..errors import SparsePruneError
from ..fuse import fuse_encoder_
from ..layers import SparseLinear
from ..masks import grid_shape
from ..serialization import (
    METHOD,
    VERSIONS,
    PackedLayer,
    check_version,
    describe_layers,
    fits_layer,
    layout_metadata,
    open_safetensors,
    parse_layers,
    version_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_REMEDY = "pack the model again"


@register_quantization_config(METHOD)
class SparsePruneConfig(QuantizationConfigMixin):
    """version of the layout, and layers: name -> {"shape": [N, K], "blocksize": [R, C], "nnzb": n}, if quantized also how."""

    quant_method: Any  # for theirs a member of an enumeration

    def __init__(self, version: str = VERSIONS[0], layers: Mapping[str, Any] | None = None, **_: object):
        check_version(version, "quantization_config.version")
        self.quant_method = METHOD
        self.version = version
        self.layers = dict(layers or {})
        parse_layers(self.layers, "quantization_config.layers")


@register_quantizer(METHOD)
class SparsePruneQuantizer(HfQuantizer):
    """Builds the SparseLinear layers that the weights are then read into, and checks what was read."""

    requires_calibration = True  # a dense checkpoint is pruned with a Pruner or sparsify_, never while it loads
    quantization_config: SparsePruneConfig

    def update_parallel_plan(self, model: PreTrainedModel, plan: dict[str, str]) -> None:
        """As in the base class, which goes through all parameters where there is no plan too."""
        if plan:
            super().update_parallel_plan(model, plan)

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        checkpoint_files: Sequence[str] | None = None,
        device_map: object = None,
        **_: object,
    ) -> None:
        described = parse_layers(self.quantization_config.layers, "config.json")
        stored = _stored(described, checkpoint_files or ())
        apart = torch.distributed.is_available() and torch.distributed.is_initialized()
        in_fp32 = getattr(model, "_keep_in_fp32_modules", None) or getattr(model, "_keep_in_fp32_modules_strict", None)
        plain = device_map is None and not apart and not in_fp32
        prefix = f"{model.base_model_prefix}."
        new: dict[nn.Module, nn.Module] = {}
        with_head = any(name.startswith(prefix) for name in described)
        for name, entry in described.items():
            linear = _find(model, name, prefix)
            if linear is None and with_head and not name.startswith(prefix):
                continue  # a layer of the head that was saved, which this model has not
            if not fits_layer(linear, entry.shape):
                n, k = entry.shape
                raise SparsePruneError(f"config.json: {name}", f"a linear layer of {k} -> {n}", linear, _REMEDY)
            parts = (*entry.parts, *(() if linear.bias is None else ("bias",)))
            files = {part: stored[f"{name}.{part}"] for part in parts if f"{name}.{part}" in stored}
            if plain and len(files) == len(parts):
                new[linear] = _Awaited(name, entry, linear.weight.dtype, files)
            else:
                new[linear] = _empty_layer(linear, entry)
            new[linear].train(linear.training)
        swap_modules(model, new)
        if hasattr(model, "all_tied_weights_keys"):
            replaced = (*new.values(),)
            tied = {
                target: source
                for target, source in model.all_tied_weights_keys.items()
                if model.get_submodule(target.rpartition(".")[0]) not in replaced
            }
            model.all_tied_weights_keys = tied
        shared = next(iter(_shared_tensors(model).items()), None)
        if shared is not None:  # transformers would fill the second name with new memory
            got = f"{shared[0]}, which is {shared[1]}"
            raise SparsePruneError(
                "device_map", "none where a sparse layer has several names", got, "leave it out, then model.to(...)"
            )
        names = {
            re.sub(r"\d+", r"\\d+", re.escape(layer.name.removeprefix(prefix)))
            for layer in new.values()
            if isinstance(layer, _Awaited)
        }
        # Told apart by their names without numbers: a few patterns, compiled once.
        ignored = {rf"(^|\.){name}\.(values|crow_indices|col_indices|scales|bias)$" for name in names}
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *ignored}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: object) -> None:
        modules = dict(model.named_modules())
        new: dict[nn.Module, nn.Module] = {m: m.read() for m in modules.values() if isinstance(m, _Awaited)}
        swap_modules(model, new)
        for name, module in modules.items():
            layer = new.get(module, module)
            if isinstance(layer, SparseLinear) and not layer.values.is_meta:  # meta: offloaded to disk
                # Views of the mapped file would keep all of it in memory where dtype has made copies of the values.
                layer.crow_indices, layer.col_indices = layer.crow_indices.clone(), layer.col_indices.clone()
                packed = layer.packed
                arrays = (packed.crow_indices, packed.col_indices, packed.values)
                validate_bsr(packed.shape, packed.blocksize, *arrays, name, packed.scales, packed.weight_only)
                check_finite(packed.values, f"{name}.values")
        self._describe(model)
        if not any("_hf_hook" in vars(module) for module in modules.values()):  # which brings weights in from elsewhere
            fuse_encoder_(model)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        """What save_pretrained writes beside the state dict: the same metadata as save_packed."""
        self._describe(model)
        return None, layout_metadata(model)

    def is_serializable(self) -> bool:
        """save_pretrained writes the packed layout again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The kept blocks train like any parameter."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """The Trainer asks this before it trains anything but adapters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """torch.compile takes a packed model whole."""
        return True

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        layers = [layer for layer in model.modules() if isinstance(layer, SparseLinear)]
        swap_modules(model, {layer: layer.to_dense().to(dtype) for layer in layers})
        return model

    def _describe(self, model: PreTrainedModel) -> None:
        """The layers as they are named in this model, which may be the base or another head of the one that was saved."""
        config = self.quantization_config
        config.layers = describe_layers(model)
        config.version = version_of(config.layers)
        _share(model)


def mark_packed(model: nn.Module) -> None:
    """Let save_pretrained of a Hugging Face model write its sparse layers as a packed checkpoint; other modules stay as they are.

    sparsify_, quantize_ and load_packed call it.
    """
    from transformers.modeling_utils import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return
    layers = describe_layers(model)
    config = SparsePruneConfig(version_of(layers), layers)
    marked: Any = model  # with attributes that transformers looks for and declares nowhere
    marked.hf_quantizer = SparsePruneQuantizer(config)
    marked.config.quantization_config = config
    marked.is_quantized, marked.quantization_method = True, METHOD
    _share(model)


after_conversion.append(mark_packed)


class _File:
    """An open safetensors file, whose tensors come as views of the mapped file or as copies read apart from it."""

    def __init__(self, path: str) -> None:
        self.path, self.mapped = path, open_safetensors(path)

    @cached_property
    def apart(self) -> Any:
        return open_safetensors(self.path, mapped=False)


class _Awaited(nn.Module):
    """Holds the place of a SparseLinear while transformers reads the rest of a checkpoint; files: part -> the file that has it."""

    def __init__(self, name: str, entry: PackedLayer, dtype: torch.dtype, files: Mapping[str, _File]) -> None:
        super().__init__()
        self.name, self.entry, self.dtype, self.files = name, entry, dtype, files
        # Some models initialise what their children hold (GPT-2's c_proj.weight), unless it is marked so.
        self.weight = self.bias = torch.empty(0, device="cpu")
        self.weight._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers' mark

    def read(self) -> SparseLinear:
        """The layer, its values views of the mapped file, or where dtype is another a copy: then nothing is mapped that would stay.

        Raises SparsePruneError where the file does not hold what the config says.
        """
        got = {part: file.mapped.get_tensor(f"{self.name}.{part}") for part, file in self.files.items()}
        if self.entry.dtype is None and got["values"].dtype != self.dtype:
            got["values"] = self.files["values"].apart.get_tensor(f"{self.name}.values")
        for part in ("values", "bias") if self.entry.dtype is None else ("bias",):
            if part in got:
                got[part] = got[part].to(self.dtype)
        n, k = self.entry.shape
        self.entry.check_dtype(got["values"], f"{self.name}.values")
        if got["values"].shape[:1] != (self.entry.nnzb,):
            expected = f"{self.entry.nnzb} blocks, as config.json says"
            raise SparsePruneError(f"{self.name}.values", expected, tuple(got["values"].shape), _REMEDY)
        if "bias" in got and got["bias"].shape != (n,):
            raise SparsePruneError(f"{self.name}.bias", f"shape ({n},)", tuple(got["bias"].shape), _REMEDY)
        return SparseLinear(k, n, **got, weight_only=self.entry.weight_only).train(self.training)


def _share(model: PreTrainedModel) -> None:
    """Let save_pretrained write once what model holds under several names."""
    shared, known = _shared_tensors(model), model._tied_weights_keys or {}
    if shared:
        model._tied_weights_keys = {**known, **shared}


def _shared_tensors(model: nn.Module) -> dict[str, str]:
    """Tensors of the sparse layers that model holds under several names: each further name -> the first one."""
    first: dict[nn.Module, str] = {}
    return {
        f"{name}.{part}": f"{first[layer]}.{part}"
        for name, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, SparseLinear) and first.setdefault(layer, name) != name
        for part in layer.state_dict()
    }


def _empty_layer(linear: nn.Linear | SparseLinear, entry: PackedLayer) -> SparseLinear:
    """A SparseLinear in the place of linear, on its device and of its dtype, with memory for what the file says of it."""
    (n, k), dtype, device = entry.shape, linear.weight.dtype, linear.weight.device
    rows, _columns = grid_shape(entry.shape, entry.blocksize)
    return SparseLinear(
        k,
        n,
        torch.empty(rows + 1, dtype=torch.int32, device=device),
        torch.empty(entry.nnzb, dtype=torch.int32, device=device),
        torch.empty(entry.nnzb, *entry.blocksize, dtype=entry.dtype or dtype, device=device),
        None if linear.bias is None else torch.empty(n, dtype=dtype, device=device),
        torch.empty(n, dtype=torch.float32, device=device) if entry.dtype else None,
        entry.weight_only,
    )


def _find(model: PreTrainedModel, name: str, prefix: str) -> nn.Module | None:
    """What stands in this model at the place of a saved layer.

    A checkpoint of a model with a head loads into the base model, and the other way round, as dense ones do: names then differ by
    the base model's prefix.
    """
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        try:
            return model.get_submodule(candidate)
        except AttributeError:
            continue
    return None


def _stored(described: Mapping[str, Any], files: Sequence[str]) -> dict[str, _File]:
    """Name of each tensor -> the file that has it; empty where files are of another kind.

    Raises SparsePruneError for a described layer that the files lack: transformers would only warn, and go on with noise.
    """
    stored: dict[str, _File] = {}
    if not files or not all(str(file).endswith(".safetensors") for file in files):
        return stored
    for file in files:
        try:
            opened = _File(file)
            stored |= dict.fromkeys(opened.mapped.keys(), opened)
        except (safetensors.SafetensorError, OSError) as error:
            raise SparsePruneError(
                str(file), "a safetensors file", f"{type(error).__name__}: {error}", _REMEDY
            ) from None
    # By number, since for some models transformers stores weights under older names than the modules have now.
    for part in ("crow_indices", "col_indices", "values", "scales"):
        wanted = [name for name, entry in described.items() if part in entry.parts]
        if sum(key.endswith(f".{part}") for key in stored) < len(wanted):
            missing = next((name for name in wanted if f"{name}.{part}" not in stored), "a layer")
            raise SparsePruneError(f"{files[0]}: {missing}.{part}", "a tensor", "none", _REMEDY)
    return stored
