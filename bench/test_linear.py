"""`make bench`: one sparse layer against dense and against peers. Results go to runs/bench/linear.json and linear.png.

SPARSE_PRUNE_BENCH=full takes the whole grid of shapes, blocks, densities and thread counts (an hour or more); the default, minutes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from sparse_prune.benchmark import DTYPES, bench_linear, plot_linear, random_mask
from sparse_prune.layers import SparseLinear

FULL = os.environ.get("SPARSE_PRUNE_BENCH") == "full"
SHAPES = [(384, 1536), (768, 768), (768, 3072), (3072, 768), (4096, 4096)] if FULL else [(768, 3072)]
BLOCKS = [(16, 16), (32, 32), (64, 64), (64, 16), (128, 16)] if FULL else [(32, 32), (64, 64)]
TOKENS = [1, 16, 128, 512, 2048] if FULL else [1, 16, 128, 512]
DENSITIES = [0.05, 0.1, 0.2, 0.5, 0.8, 1.0] if FULL else [0.05, 0.2, 0.5, 1.0]
THREADS = [1, 2] if FULL else [1]


def test_grid(capsys):
    """The comparison itself: every row is checked against float64, then timed in turns with its peers."""
    out = Path("runs/bench")
    out.mkdir(parents=True, exist_ok=True)

    def show(row):
        peers = ", ".join(f"{name} {us:.0f}" for name, us in row["us"].items())
        with capsys.disabled():
            print(
                f"\n{row['dtype']} {row['K']}->{row['N']} M={row['M']} {row['blocksize']} density {row['density']:.2f} "
                f"{row['threads']} thread(s): {row['speedup']:.2f}x dense, {row['share']:.2f} of 1/density, "
                f"{row['useful_gflops']:.0f} useful GFLOP/s, {row['gbytes_per_s']:.1f} GB/s [us: {peers}]",
                end="",
            )

    rows = bench_linear(SHAPES, TOKENS, DENSITIES, BLOCKS, ("float32", "bfloat16"), THREADS, on_row=show)
    (out / "linear.json").write_text(json.dumps(rows, indent=1))
    pytest.importorskip("matplotlib")
    plot_linear([r for r in rows if (r["K"], r["N"]) == (768, 3072) and r["threads"] == 1], out / "linear.png")


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
