"""Block-sparse pruning for self-attention models, with the kernels that make it fast.

mask   = sp.block_mask(weight, blocksize=(32, 32), density=0.2)
packed = sp.BsrWeight.from_dense(weight, mask, blocksize=(32, 32))
y      = sp.bsr_linear(x, packed, bias, activation="gelu")
layer  = sp.SparseLinear.from_dense(linear, mask, blocksize=(32, 32))
result = sp.sparsify_(model, sp.BlockSparseConfig(blocksize=(32, 32), density=0.2))
result = sp.quantize_(model)                                # int8 blocks, for inference
"""

from __future__ import annotations

from .bsr import BsrWeight
from .convert import (
    BlockSparseConfig,
    QuantizeResult,
    SparsifyResult,
    calibrate_,
    gather_neurons_,
    nonzero_masks,
    quantize_,
    sparsify_,
)
from .criteria import AlphaSearch, block_mask, find_alpha, threshold_mask
from .errors import SparsePruneError
from .fuse import fuse_encoder_, unfuse_encoder_
from .integrations import watch
from .layers import SparseLinear, fused_glu, fused_linear
from .masks import suggest_blocksize
from .ops import backend_for, bsr_linear, bsr_linear_glu, show_config
from .pruner import PruneConfig, Pruner
from .serialization import load_packed, save_packed

__version__ = "0.1.0"
watch()
__all__ = [
    "AlphaSearch",
    "BlockSparseConfig",
    "BsrWeight",
    "PruneConfig",
    "Pruner",
    "QuantizeResult",
    "SparseLinear",
    "SparsePruneError",
    "SparsifyResult",
    "backend_for",
    "block_mask",
    "bsr_linear",
    "bsr_linear_glu",
    "calibrate_",
    "find_alpha",
    "fuse_encoder_",
    "fused_glu",
    "fused_linear",
    "load_packed",
    "gather_neurons_",
    "nonzero_masks",
    "quantize_",
    "save_packed",
    "show_config",
    "sparsify_",
    "threshold_mask",
    "unfuse_encoder_",
    "suggest_blocksize",
]
