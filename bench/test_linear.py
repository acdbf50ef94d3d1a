"""`make bench`: one sparse layer against dense and against peers. Rows go to runs/bench/linear.jsonl as they are finished,
the picture to runs/bench/linear.png; the same command after Ctrl-C goes on. SPARSE_PRUNE_BENCH=full takes the whole grid (hours).

`sparse-prune bench linear` is the same comparison with options and a table.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from sparse_prune.benchmark import DTYPES, GRIDS, bench_linear, linear_problems, plot_linear, random_mask
from sparse_prune.layers import SparseLinear

OUT = Path("runs/bench")


def test_grid(capsys):
    """The comparison itself: every row is checked against float64, then timed in turns with its peers."""

    def show(row):
        peers = ", ".join(f"{name} {us:.0f}" for name, us in row["us"].items())
        with capsys.disabled():
            print(
                f"\n{row['dtype']} {row['K']}->{row['N']} M={row['M']} {row['blocksize']} density {row['density']:.2f} "
                f"{row['threads']} thread(s): {row['speedup']:.2f}x dense, {row['share']:.2f} of 1/density, "
                f"{row['useful_gflops']:.0f} useful GFLOP/s, {row['gbytes_per_s']:.1f} GB/s [us: {peers}]",
                end="",
            )

    problems = linear_problems(**GRIDS[os.environ.get("SPARSE_PRUNE_BENCH", "small")])
    rows = bench_linear(problems, keep=OUT / "linear.jsonl", on_row=show)
    pytest.importorskip("matplotlib")
    plot_linear(rows, OUT / "linear.png")


@pytest.mark.parametrize("density", [0.2, 1.0])
@pytest.mark.parametrize("tokens", [1, 16, 512])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layer(benchmark, dtype, tokens, density):
    """pytest-benchmark's own statistics of the sparse layer, to compare two revisions with --benchmark-compare."""
    linear = torch.nn.Linear(768, 3072).to(DTYPES[dtype])
    mask = random_mask((3072, 768), (32, 32), density, torch.Generator().manual_seed(0))
    layer = SparseLinear.from_dense(linear, mask, (32, 32))
    x = torch.randn(tokens, 768).to(DTYPES[dtype])
    with torch.inference_mode():
        benchmark(layer, x)
