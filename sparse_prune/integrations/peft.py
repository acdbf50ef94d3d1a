"""LoRA on a packed model: peft adds its low-rank layers beside SparseLinear as it does beside nn.Linear.

`import sparse_prune` imports this module when peft's LoRA is there; then get_peft_model and PeftModel.from_pretrained take packed
models. The kept blocks stay frozen, as base weights do, and the adapter is saved alone.
"""

from __future__ import annotations

import warnings
from typing import Any, NoReturn

from peft.tuners.lora import layer as lora_layer
from peft.tuners.lora import model as lora_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..errors import SparsePruneError
from ..layers import SparseLinear


class LoraSparseLinear(lora_layer.Linear):
    """y = SparseLinear(x) + scaling * B(A(x)), the adapter dense and low-rank."""

    def __init__(self, *args: Any, **options: Any) -> None:
        with warnings.catch_warnings():
            # It has in_features and out_features: all that is asked.
            warnings.filterwarnings("ignore", "Unsupported layer type")
            super().__init__(*args, **options)

    def merge(self, *_: object, **__: object) -> NoReturn:
        """Always raises SparsePruneError: a low-rank matrix has no zero blocks, so the sum of both would be dense."""
        raise SparsePruneError(
            "merge",
            "an adapter on a dense layer",
            "one on a SparseLinear",
            "keep the adapter apart, or dequantize() first",
        )


def _dispatch(target: nn.Module, adapter_name: str, **options: Any) -> nn.Module | None:
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if isinstance(base, SparseLinear):
        options.pop("parameter_name", None)
        return LoraSparseLinear(target, adapter_name, **options)
    return _default(target, adapter_name, **options)


# peft's own list of custom layers belongs to one LoraConfig and is not saved with it; this one also serves from_pretrained.
_default = lora_model.dispatch_default
lora_model.dispatch_default = _dispatch
