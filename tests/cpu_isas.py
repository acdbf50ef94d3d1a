"""Which instruction sets of the C++ kernels are here, and the marks of tests that need them, or run by each in turn."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sparse_prune import backends

ISAS = backends.cpu_isas()
needs_kernels = pytest.mark.skipif(not ISAS, reason=backends._reason or "built")
# The sets that have kernels of their own for weights of a dtype; under any other the next of these runs, with the same code.
KERNELS = {
    torch.float32: ("avx512", "avx2", "portable"),
    torch.bfloat16: ("amx_bf16", "avx512_bf16", "avx512", "avx2", "portable"),
    torch.float16: ("amx_bf16", "avx512", "avx2", "portable"),
}


def _param(isa: str, *values: object):
    return pytest.param(
        isa, *values, marks=pytest.mark.skipif(isa not in ISAS, reason=f"this processor or build has no {isa}")
    )


ISA_PARAMS = [_param(isa) for isa in backends.ISAS]
each_isa = pytest.mark.parametrize("isa", ISA_PARAMS)


def allocated(call: Callable[[], object]) -> int:
    """Bytes of all memory that PyTorch hands out for tensors while call runs, also of what it has given back at the end."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    return sum(max(0, event.nbytes()) for event in events if event.name() == "[memory]")


def each_kernel(*dtypes: torch.dtype):
    """Parameters isa and dtype: every set of instructions with kernels of its own for a dtype, of dtypes or of all three."""
    pairs = [(isa, dtype) for dtype in dtypes or KERNELS for isa in KERNELS[dtype]]
    return pytest.mark.parametrize(("isa", "dtype"), [_param(*pair) for pair in pairs], ids=str)
