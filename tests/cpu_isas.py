"""Which instruction sets of the C++ kernels are here, and the marks of tests that need them, or run by each in turn."""

from __future__ import annotations

import pytest

from sparse_prune import backends

ISAS = backends.cpu_isas()
needs_kernels = pytest.mark.skipif(not ISAS, reason=backends._reason or "built")
ISA_PARAMS = [
    pytest.param(isa, marks=pytest.mark.skipif(isa not in ISAS, reason=f"this processor or build has no {isa}"))
    for isa in backends.ISAS
]
each_isa = pytest.mark.parametrize("isa", ISA_PARAMS)
