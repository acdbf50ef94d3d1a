"""`from_pretrained` and `save_pretrained` of packed checkpoints, as a Hugging Face quantization method of our own.

A packed directory's config.json carries `quantization_config` with `quant_method` = "sparse_prune" and each layer's shape, block
size and number of blocks, so that the dense weights never exist. transformers takes some 90 us for each tensor of a file, and a
sparse layer has four of them: in one process on a CPU they are read here, and transformers reads the rest. Where it has to place
them (device_map, names of its own), SparseLinear of the right sizes wait in the model for it. `import sparse_prune` imports this
module as soon as transformers' quantizers are there; importing it registers the method.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

# From the modules that define them: this runs while `transformers.modeling_utils` is still being imported.
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..bsr import VALUE_DTYPES, check_finite, sound_indices, validate_bsr
from ..convert import after_conversion, swap_modules
from ..errors import SparsePruneError
from ..fuse import fuse_encoder_
from ..layers import SparseLinear
from ..masks import grid_shape
from ..serialization import (
    METHOD,
    VERSIONS,
    MappedFile,
    PackedLayer,
    check_bias,
    check_version,
    fits_layer,
    layout_config,
    layout_metadata,
    parse_layers,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_REMEDY = "pack the model again"
_INDICES = ("crow_indices", "col_indices")


@register_quantization_config(METHOD)
class SparsePruneConfig(QuantizationConfigMixin):
    """version of the layout, and layers: name -> what a PackedLayer says of itself."""

    quant_method: Any  # for theirs a member of an enumeration

    def __init__(self, version: str = VERSIONS[0], layers: Mapping[str, Any] | None = None, **_: object):
        check_version(version, "quantization_config.version")
        self.quant_method = METHOD
        self.version = version
        parsed = parse_layers(layers or {}, "quantization_config.layers")
        self.layers = {name: str(entry) for name, entry in parsed.items()}


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
        stored = _stored(checkpoint_files or ())
        _check_stored(described, stored)
        apart = torch.distributed.is_available() and torch.distributed.is_initialized()
        in_fp32 = getattr(model, "_keep_in_fp32_modules", None) or getattr(model, "_keep_in_fp32_modules_strict", None)
        plain = device_map is None and not apart and not in_fp32
        modules, prefix = dict(model.named_modules(remove_duplicate=False)), f"{model.base_model_prefix}."
        with_head = any(name.startswith(prefix) for name in described)
        self.awaited: list[_Awaited] = []
        new: dict[nn.Module, nn.Module] = {}
        for name, entry in described.items():
            own = _own_name(modules, name, prefix)
            keys = {part: f"{name}.{part}" for part in (*entry.parts, "bias")}
            files = {part: stored[key] for part, key in keys.items() if key in stored}
            if own is None and with_head and not name.startswith(prefix) and (files or not stored):
                continue  # a layer of the head that was saved, which this model has not
            linear = None if own is None else modules[own]
            if own is None or not fits_layer(linear, entry.shape):
                n, k = entry.shape
                raise SparsePruneError(f"config.json: {name}", f"a linear layer of {k} -> {n}", linear, _REMEDY)
            wrong = files.keys() ^ keys.keys() - ({"bias"} if linear.bias is None else set())
            if files and wrong:
                part = next(part for part in keys if part in wrong)
                expected, got = ("no tensor", "one") if part in files else ("a tensor", "none")
                raise SparsePruneError(f"the checkpoint: {name}.{part}", expected, got, _REMEDY)
            if files and plain:
                self.awaited.append(_Awaited(linear, own, name, entry, linear.weight.dtype, files))
            else:
                new[linear] = _empty_layer(linear, entry).train(linear.training)
        self.values = _in_background(_read_values, self.awaited)
        for waiting in self.awaited:
            _Nothing.become(waiting.module)
        if new:
            swap_modules(model, new)
        self.only_awaited = not new
        if hasattr(model, "all_tied_weights_keys"):
            sparse = {*new.values(), *(waiting.module for waiting in self.awaited)}
            for target in [*model.all_tied_weights_keys]:
                if model.get_submodule(target.rpartition(".")[0]) in sparse:
                    del model.all_tied_weights_keys[target]
        shared = next(iter(_shared_tensors(model).items()), None) if new else None
        if shared is not None:  # transformers would fill the second name with new memory
            got = f"{shared[0]}, which is {shared[1]}"
            raise SparsePruneError(
                "device_map", "none where a sparse layer has several names", got, "leave it out, then model.to(...)"
            )
        ignored = _patterns_of([waiting.name.removeprefix(prefix) for waiting in self.awaited])
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *ignored}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: object) -> None:
        model.is_quantized = False  # transformers would refuse half(), float() and training; a sparse model takes them
        awaited, values, self.awaited = self.awaited, self.values, []
        del self.values
        _read(awaited, *values.result())
        if self.only_awaited:
            self.quantization_config.layers = {waiting.own: str(waiting.entry) for waiting in awaited}
            fuse_encoder_(model)
            return
        modules = dict(model.named_modules())
        for name, layer in modules.items():
            if not isinstance(layer, _Empty):
                continue
            layer.__class__ = SparseLinear  # type: ignore[assignment]  # its base, which it was but for `weight`
            if not layer.values.is_meta:  # meta: offloaded to disk
                # Views of the mapped file would keep all of it in memory where dtype has made copies of the values.
                layer.crow_indices, layer.col_indices = layer.crow_indices.clone(), layer.col_indices.clone()
                packed = layer.packed
                arrays = (packed.crow_indices, packed.col_indices, packed.values)
                validate_bsr(packed.shape, packed.blocksize, *arrays, name, packed.scales, packed.weight_only)
                check_finite(packed.values, f"{name}.values")
                check_bias(layer.bias, None if layer.bias is None else layer.out_features, f"{name}.bias")
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
    def is_compileable(self) -> bool:
        """torch.compile takes a packed model whole."""
        return True

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        layers = [layer for layer in model.modules() if isinstance(layer, SparseLinear)]
        swap_modules(model, {layer: layer.to_dense().to(dtype) for layer in layers})
        return model

    def _describe(self, model: PreTrainedModel) -> None:
        """The layers as they are named in this model, which may be the base or another head of the one that was saved."""
        config, layout = self.quantization_config, layout_config(model)
        config.version, config.layers = layout["version"], layout["layers"]
        _share(model)


def mark_packed(model: nn.Module) -> None:
    """Let save_pretrained of a Hugging Face model write its sparse layers as a packed checkpoint; other modules stay as they are.

    sparsify_, quantize_ and load_packed call it.
    """
    from transformers.modeling_utils import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return
    config = SparsePruneConfig(**layout_config(model))
    marked: Any = model  # with attributes that transformers looks for and declares nowhere
    marked.hf_quantizer = SparsePruneQuantizer(config)
    marked.config.quantization_config = config
    marked.quantization_method = METHOD
    _share(model)


after_conversion.append(mark_packed)


class _Awaited(NamedTuple):
    """A layer that is read here: its module and that module's name in the model, its name in the checkpoint, and part -> file."""

    module: nn.Module
    own: str
    name: str
    entry: PackedLayer
    dtype: torch.dtype
    files: Mapping[str, MappedFile]


class _Nothing(nn.Module):
    """What a linear layer is while transformers reads the rest of a checkpoint: without anything to read or to initialise."""

    # Some models initialise what their children hold (GPT-2's c_proj.weight), unless it is marked so.
    weight: Any = torch.empty(0)
    bias: Any = weight
    weight._is_hf_initialized = True

    @classmethod
    def become(cls, module: nn.Module) -> None:
        """Turn module into one, in its place."""
        vars(module).update(_parameters={}, _buffers={})
        object.__setattr__(module, "__class__", cls)


class _Empty(SparseLinear):
    """A sparse layer while transformers reads its tensors: without a dense weight, which some models would initialise."""

    weight: Any = _Nothing.weight


def _patterns_of(names: Sequence[str]) -> set[str]:
    """What matches the tensors of those layers in a checkpoint: a pattern for all names that differ in numbers alone."""
    kinds = [re.escape(name) for name in {*re.sub(r"\d+", "0", "\n".join(names)).split("\n")} if name]
    parts = "values|crow_indices|col_indices|scales|bias"
    return {rf"(^|\.){name}\.({parts})$".replace("0", r"\d+") for name in kinds}


def _in_background(work: Callable, *arguments: Any) -> Future:
    """What work(*arguments) gives, from a thread of its own."""
    worker = ThreadPoolExecutor(1)
    future = worker.submit(work, *arguments)
    worker.shutdown(wait=False)
    return future


def _read_values(awaited: Sequence[_Awaited]) -> tuple[list[Tensor], bool]:
    """Values of the layers, and whether those in floating point are finite for sure.

    They are views of the mapped file, or where dtype is another copies: then nothing is mapped that would stay. All are read, by
    one call, which leaves the interpreter to other threads.
    """
    values = []
    for it in awaited:
        name, file = f"{it.name}.values", it.files["values"]
        own = file.tensor(name)
        cast = it.entry.dtype is None and own.dtype in VALUE_DTYPES and own.dtype != it.dtype
        values.append(file.tensor(name, apart=True).to(it.dtype) if cast else own)
    floating = [own for own in values if own.dtype in VALUE_DTYPES]
    return values, math.isfinite(torch.nn.utils.get_total_norm(floating, foreach=True))


def _read(awaited: Sequence[_Awaited], values: Sequence[Tensor], finite: bool) -> None:
    """Turn the modules into SparseLinear of these values, finite if that is known already. Indices are copied, so that what was
    checked is what the kernels get.

    Raises SparsePruneError where a file does not hold what the config says, or a layer that is not sound.
    """
    read = [
        {part: file.tensor(f"{it.name}.{part}") for part, file in it.files.items() if part != "values"}
        for it in awaited
    ]
    sound = bool(awaited) and all(got[kind].dtype == torch.int32 for got in read for kind in _INDICES)
    if sound:
        copies = _copies([got[kind] for kind in _INDICES for got in read])
        crows, cols = copies[: len(read)], copies[len(read) :]
        grids = [grid_shape(it.entry.shape, it.entry.blocksize) for it in awaited]
        sound = sound_indices(grids, crows, cols)
        for got, crow, col in zip(read, crows, cols, strict=True):
            got["crow_indices"], got["col_indices"] = torch.from_numpy(crow), torch.from_numpy(col)
    for it, got, blocks in zip(awaited, read, values, strict=True):
        (n, k), blocksize, nnzb = it.entry.shape, it.entry.blocksize, it.entry.nnzb
        quantized = it.entry.dtype is not None
        bias, scales = got.pop("bias", None), got.get("scales")
        it.entry.check_dtype(blocks, f"{it.name}.values")
        if blocks.shape[:1] != (nnzb,):
            expected = f"{nnzb} blocks, as config.json says"
            raise SparsePruneError(f"{it.name}.values", expected, tuple(blocks.shape), _REMEDY)
        as_said = blocks.shape == (nnzb, *blocksize) and len(got["col_indices"]) == nnzb
        floating = blocks.dtype in VALUE_DTYPES
        if not (sound and as_said and floating and not quantized):
            validate_bsr((n, k), blocksize, values=blocks, **got, name=it.name, weight_only=it.entry.weight_only)
        check_bias(bias, None if bias is None else n, f"{it.name}.bias")
        if not (finite and floating):
            check_finite(blocks, f"{it.name}.values")
        bias = None if bias is None else bias.to(it.dtype)
        index = (got["crow_indices"], got["col_indices"])
        SparseLinear.become(it.module, k, n, *index, blocks, bias, scales, it.entry.weight_only, it.entry.x_scale)


def _copies(indices: Sequence[Tensor]) -> list[np.ndarray]:
    """int32 tensors, copied into one piece of memory."""
    whole = np.concatenate([index.numpy() for index in indices], axis=None)
    ends = accumulate(index.numel() for index in indices)
    return [whole[end - index.numel() : end] for end, index in zip(ends, indices, strict=True)]


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
    return _Empty(
        k,
        n,
        torch.empty(rows + 1, dtype=torch.int32, device=device),
        torch.empty(entry.nnzb, dtype=torch.int32, device=device),
        torch.empty(entry.nnzb, *entry.blocksize, dtype=entry.dtype or dtype, device=device),
        None if linear.bias is None else torch.empty(n, dtype=dtype, device=device),
        torch.empty(n, dtype=torch.float32, device=device) if entry.dtype else None,
        entry.weight_only,
        entry.x_scale,
    )


def _own_name(modules: Mapping[str, nn.Module], name: str, prefix: str) -> str | None:
    """The name that a saved layer has in the model of these modules, if it has one.

    A checkpoint of a model with a head loads into the base model, and the other way round, as dense ones do: names then differ by
    the base model's prefix.
    """
    candidates = (name, name.removeprefix(prefix), prefix + name)
    return next((candidate for candidate in candidates if candidate in modules), None)


def _stored(files: Sequence[str]) -> dict[str, MappedFile]:
    """Name of each tensor -> the file that has it; empty where files are of another kind."""
    stored: dict[str, MappedFile] = {}
    if all(str(file).endswith(".safetensors") for file in files):
        for file in map(MappedFile, files):
            stored |= dict.fromkeys(file.header, file)
    return stored


def _check_stored(described: Mapping[str, PackedLayer], stored: Mapping[str, MappedFile]) -> None:
    """Raise SparsePruneError where files lack described layers or hold others: transformers would only warn, and go on with noise.

    By number, since for some models transformers stores weights under older names than the modules have now.
    """
    ends = Counter(key.rpartition(".")[2] for key in stored)
    scaled = sum(entry.dtype is not None for entry in described.values())
    for part in ("crow_indices", "col_indices", "values", "scales"):
        wanted, held = scaled if part == "scales" else len(described), ends[part]
        if stored and held < wanted:
            keys = (f"{name}.{part}" for name, entry in described.items() if part in entry.parts)
            missing = next((key for key in keys if key not in stored), "a layer")
            raise SparsePruneError(f"the checkpoint: {missing}", "a tensor", "none", _REMEDY)
        if part == "crow_indices" and held > wanted:
            expected = f"the {held} sparse layers that the files hold"
            raise SparsePruneError("quantization_config.layers", expected, wanted, _REMEDY)
