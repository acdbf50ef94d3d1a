"""`from_pretrained` and `save_pretrained` of packed checkpoints, as a Hugging Face quantization method of our own.

A packed directory's config.json carries `quantization_config` with `quant_method` = "sparse_prune" and each layer's shape, block
size and number of blocks, so that a model is built with SparseLinear of the right sizes before any weight is read: the dense
weights never exist. Importing this module registers the method.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..bsr import check_finite, validate_bsr
from ..convert import set_module
from ..errors import SparsePruneError
from ..fuse import fuse_encoder_
from ..layers import SparseLinear
from ..masks import grid_shape
from ..serialization import METHOD, VERSION, layout_metadata, parse_layers


@register_quantization_config(METHOD)
class SparsePruneConfig(QuantizationConfigMixin):
    """version of the layout, and layers: name -> {"shape": [N, K], "blocksize": [R, C], "nnzb": n}."""

    def __init__(self, version: str = VERSION, layers: Mapping[str, Any] | None = None, **_: object):
        if version != VERSION:
            raise SparsePruneError("quantization_config.version", VERSION, version, "update sparse-prune")
        self.quant_method = METHOD
        self.version = version
        self.layers = dict(layers or {})
        parse_layers(self.layers, "quantization_config.layers")


@register_quantizer(METHOD)
class SparsePruneQuantizer(HfQuantizer):
    """Builds the SparseLinear layers that the weights are then read into, and checks their indices."""

    requires_calibration = True  # a dense checkpoint is pruned with a Pruner or sparsify_, never while it loads
    quantization_config: SparsePruneConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: object) -> None:
        for name, ((n, k), (r, c), nnzb) in parse_layers(self.quantization_config.layers, "config.json").items():
            try:
                linear = model.get_submodule(name)
            except AttributeError:
                linear = None
            if (getattr(linear, "out_features", None), getattr(linear, "in_features", None)) != (n, k):
                raise SparsePruneError(
                    f"config.json: {name}", f"a linear layer of {k} -> {n}", linear, "pack the model again"
                )
            rows, _ = grid_shape((n, k), (r, c))
            like = {"dtype": linear.weight.dtype, "device": linear.weight.device}
            index = {"dtype": torch.int32, "device": linear.weight.device}
            layer = SparseLinear(
                k,
                n,
                torch.empty(rows + 1, **index),
                torch.empty(nnzb, **index),
                torch.empty(nnzb, r, c, **like),
                None if linear.bias is None else torch.empty(n, **like),
            )
            set_module(model, name, layer.train(linear.training))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: object) -> None:
        for name in self.quantization_config.layers:
            layer = model.get_submodule(name)
            packed = layer.packed
            validate_bsr(packed.shape, packed.blocksize, packed.crow_indices, packed.col_indices, packed.values, name)
            check_finite(packed.values, f"{name}.values")
        fuse_encoder_(model)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        """What save_pretrained writes beside the state dict: the same metadata as save_packed."""
        return None, layout_metadata(model)

    def is_serializable(self) -> bool:
        """save_pretrained writes the packed layout again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The kept blocks train like any parameter."""
        return True

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        for name in self.quantization_config.layers:
            set_module(model, name, model.get_submodule(name).to_dense().to(dtype))
        return model
