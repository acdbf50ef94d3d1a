"""Triton kernels for block-sparse linear layers on NVIDIA GPUs.

`register(library, fallbacks)` gives `sparse_prune::bsr_linear`, `bsr_linear_dx`, `bsr_sdd` and those of quantized weights their
CUDA implementations; `unavailable(device, dtype, blocksize)` says why a problem does not run here, and `refused` why it would not
on any GPU. Neither importing this package nor registering imports Triton: the first call on a GPU does.

support.py     which problems run, and the registration
plan.py        which block-rows one program serves together
config.py      tile sizes, and the arithmetic that chooses them
tuned.py       tile sizes that were measured on a GPU
launch.py      checks, allocation and launches
offline.py     compilation for a GPU that is not here
kernels.py     device code
peers.py       kernels that ours are compared with
"""

from __future__ import annotations

from .support import CUDA_DTYPES, refused, register, triton_version, unavailable

__all__ = ["CUDA_DTYPES", "refused", "register", "triton_version", "unavailable"]
