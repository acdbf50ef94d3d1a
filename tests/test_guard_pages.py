"""Nothing outside of the operands is read: each lies against a page that the process may not touch, at its end or at its beginning.

The sanitizers (test_sanitizers.py) see the same of kernels that were built for them; here they are as shipped, tile loads included.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
from cpu_isas import ISA_PARAMS, needs_kernels

CODE = """
import ctypes, mmap, sys
import torch
from sparse_prune import backends, ops
from sparse_prune.bsr import BsrWeight

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
PAGE, sparse = mmap.PAGESIZE, torch.ops.sparse_prune

def guarded(t, at_end):
    if t is None or not t.numel():
        return t
    t = t.contiguous()
    size = (t.nbytes + PAGE - 1) // PAGE * PAGE
    start = libc.mmap(None, size + 2 * PAGE, 3, 0x22, -1, 0)
    for page in (start, start + PAGE + size):
        assert libc.mprotect(page, PAGE, 0) == 0
    place = start + PAGE + (size - t.nbytes if at_end else 0)
    ctypes.memmove(place, t.data_ptr(), t.nbytes)
    raw = (ctypes.c_char * t.nbytes).from_address(place)
    return torch.frombuffer(raw, dtype=t.dtype).view(t.shape)

isa, planted = sys.argv[1:]
problems = [(1, 100, 75, 16, 8), (9, 64, 96, 32, 32), (33, 70, 50, 7, 5), (40, 64, 64, 16, 16), (70, 130, 128, 64, 64)]
problems += [(50, 96, 100, 24, 40), (97, 100, 66, 8, 8), (64, 64, 256, 32, 128), (48, 96, 33, 1, 3)]
torch.manual_seed(0)
with backends.force_isa(isa):
    for at_end in (True, False):
        for m, n, k, r, c in problems:
            mask = torch.rand(-(-n // r), -(-k // c)) < 0.7
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                w = BsrWeight.from_dense(torch.randn(n, k).to(dtype), mask, (r, c))
                x, dy = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
                packed = sparse.cpu_prepack(w.values)
                operands = (x, w.crow_indices, w.col_indices, w.values, packed, torch.randn(n).to(dtype), dy)
                x, crow, col, values, packed, bias, dy = (guarded(t, at_end) for t in operands)
                sparse.bsr_linear(x, crow, col, values, packed, n, bias, "gelu", dy)
                sparse.bsr_linear(x, crow, col, values, None, n, bias, "none", None)
                sparse.bsr_linear(x, crow, col, values, packed, n, None, "none", None, torch.float32)
                sparse.bsr_linear_dx(dy, crow, col, values, k)
                sparse.bsr_sdd(dy, x, crow, col, r, c)
                q = BsrWeight.from_dense(torch.randn(n, k), mask, (r, c)).quantize()
                packed = sparse.cpu_prepack_int8(q.values, q.crow_indices)
                own = [guarded(t, at_end) for t in (q.values, q.scales, packed)]
                sparse.bsr_linear_int8(x, crow, col, *own, n, bias, "none", dy, None)
if planted == "read":
    t = guarded(torch.ones(5), True)
    ctypes.c_char.from_address(t.data_ptr() + t.nbytes).value
print("nothing else was touched")
"""


def run(isa: str, planted: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", CODE, isa, planted]
    return subprocess.run(command, capture_output=True, text=True)


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="mmap's numbers are Linux's")
@pytest.mark.parametrize("isa", ISA_PARAMS)
def test_kernels_read_only_their_operands(isa):
    done = run(isa, "")
    assert done.returncode == 0 and "nothing else was touched" in done.stdout, done.stderr[-2000:]


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="mmap's numbers are Linux's")
def test_a_guard_page_ends_the_process():
    done = run("portable", "read")
    assert done.returncode < 0 and "nothing else was touched" not in done.stdout
