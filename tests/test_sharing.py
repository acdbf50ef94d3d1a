"""How the dispatcher of the CPU kernels shares a product between threads: by work, so by kept blocks and not by block-rows."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import built
import pytest
import torch

TESTS = Path(__file__).parent
R, C, K = 32, 32, 1024


@pytest.fixture(scope="module")
def share():
    """share(threads, M, blocks of each block-row) -> rows (task, m0, m1, i0, i1), int64 [calls, 5]."""
    if not shutil.which(built.compiler()[0]):
        pytest.skip("no C++ compiler")
    kernels = TESTS.parent / "csrc" / "cpu"
    sources = [TESTS / "sharing_harness.cpp", kernels / "dispatch.cpp", kernels / "scratch.cpp"]
    library = built.library("sharing", sources, ["-std=c++20", "-w", "-O1"], sorted(kernels.glob("*.h")))
    library.share.restype = ctypes.c_int64

    def run(threads: int, m: int, counts: torch.Tensor) -> torch.Tensor:
        crow = torch.zeros(len(counts) + 1, dtype=torch.int32)
        crow[1:] = counts.cumsum(0)
        calls = torch.zeros(4096, 5, dtype=torch.int64)
        sizes = [ctypes.c_int64(v) for v in (threads, m, len(counts) * R, K, R, C)]
        found = library.share(*sizes, ctypes.c_void_p(crow.data_ptr()), ctypes.c_void_p(calls.data_ptr()))
        return calls[:found]

    return run


@pytest.mark.parametrize("m", [100, 256, 700, 2048])
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_threads_get_equal_numbers_of_kept_blocks(share, threads, m):
    """Of 60 block-rows the first fifth holds nearly all blocks: equal numbers of block-rows would give one thread most of them."""
    counts = torch.ones(60, dtype=torch.int64)
    counts[:12] = 32
    calls = share(threads, m, counts)
    seen = torch.zeros(m, len(counts), dtype=torch.int64)
    work = torch.zeros(threads, dtype=torch.int64)
    for task, m0, m1, i0, i1 in calls.tolist():
        seen[m0:m1, i0:i1] += 1
        work[task] += (m1 - m0) * int(counts[i0:i1].sum())
    assert (seen == 1).all(), "every block-row of every row once"
    # A block-row of a pass belongs to one thread, and writing y counts like half a block.
    assert work.max() - work.min() <= 2 * 256 * 32 + 0.05 * work.sum() / threads
