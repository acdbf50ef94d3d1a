"""Bounds of the CUDA C++ kernels of the sm_80 family on an A100, counted as `sparse-prune bench gpu-bounds` counts Triton's.

    python bench/cuda_bounds.py [--quick]

Needs nvcc and a C++ compiler, no GPU. Prints Markdown: e_bound from 65 rows on, else the speed-up bound over an ideal dense kernel,
each with its limit, beside the bound of our Triton kernel.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from sparse_prune import gpu_bounds
from sparse_prune.bsr import BsrWeight

SMS = 108


def cuda_row(m: int, packed: BsrWeight) -> dict:
    """A row as gpu_bounds makes them, of the kernel and grid that csrc/cuda/config.cpp chooses."""
    import cuda_kernels
    from sparse_prune_kernels import cuda

    (n, k), (r, c) = packed.shape, packed.blocksize
    layout = cuda.make_layout(packed.crow_indices, packed.col_indices, -(-k // c), r, c)
    blocks = tuple(packed.values.shape)
    _, launch = cuda_kernels.linear_launch(m, n, blocks, SMS)
    heads = layout.tables[: layout.tiles * cuda.TILE_INTS].view(layout.tiles, -1)
    bytes_moved = gpu_bounds._compulsory(m, packed)
    rows, some, outputs, bytes_ratio = min(m, launch.tokens), None, torch.arange(n), None
    if not launch.skinny:
        by_length = heads[:, 1].argsort(descending=True)
        sample = min(gpu_bounds.SAMPLE, layout.tiles)
        some = by_length[[int((place + 0.5) * layout.tiles / sample) for place in range(sample)]]
        served = heads[some, 4 : 4 + cuda.TILE_OUTPUTS // layout.row].flatten()
        outputs = (served[served >= 0][:, None] * layout.row + torch.arange(layout.row)).flatten()
        outputs = outputs[outputs < n]
    x = gpu_bounds._rows(rows, k)
    tokens = None if launch.skinny else launch.tokens
    y, counts = cuda_kernels.linear(
        x, layout.pack(packed.values), blocks, n, tokens=tokens, tiles=some, mode="early", races=False
    )
    gpu_bounds._check(y[:, outputs], x, packed.to_dense()[outputs], "CUDA")
    if launch.skinny:
        programs, scale, stages = launch.blocks, 1.0, 2
        per_warp = packed.nnzb * r * c / 16 / layout.row / layout.rows / (launch.threads / 32)
        steps = per_warp / (8 if launch.tokens == 16 else 2 / launch.units)
        bytes_moved = 32 * (counts.dram_load_sectors + counts.dram_store_sectors)
        bytes_ratio = bytes_moved / gpu_bounds._compulsory(m, packed)
    else:
        programs = len(some)
        scale, stages = -(-m // launch.tokens) * layout.tiles / programs, 4 if launch.tokens == 256 else 3
        steps = float(heads[:, 1].float().mean())
    # Registers as __launch_bounds__ allows; tests/test_cuda_extension.py sees that none is spilled.
    alone = launch.tokens == 256 or (launch.skinny and launch.tokens == 16)
    made = SimpleNamespace(registers=65536 // launch.threads // (1 if alone else 2), shared=launch.shared_bytes)
    row = gpu_bounds._bound([(counts, made, programs, launch.threads)], [scale], 80, bytes_moved, steps, stages)
    row |= {"kernel": "cuda", "config": {"tokens": launch.tokens}, "union": None, "bytes_ratio": bytes_ratio}
    row["tensor_share"] = counts.kinds["mma"] / counts.instructions
    return gpu_bounds._headline(row, 80, m, packed)


def line(problem: tuple[int, int, int], block: tuple[int, int], density: float) -> str:
    """One row of the table: CUDA and Triton side by side."""
    emulator, m = gpu_bounds._emulator(), problem[0]
    packed = gpu_bounds._weight(problem, block, density)
    value = "speedup_bound" if m <= 64 else "e_bound"
    ours, triton = cuda_row(m, packed), gpu_bounds._ours(emulator, 80, m, packed)
    cells = [f"{row[value]:.2f} ({row['limit']})" for row in (ours, triton)]
    ratio = f"{ours['bytes_ratio']:.2f}" if ours["bytes_ratio"] else ""
    shape = f"{m}, {problem[1]} to {problem[2]}"
    return (
        f"| {shape} | {block[0]}x{block[1]} | {density} | {cells[0]} | {cells[1]} | {ours['wavefronts_per_ideal']:.2f} "
        f"| {ours['tensor_share']:.2f} | {ratio} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="density .2 only, and .1 for few rows")
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    print("| M, K to N | block | density | CUDA | Triton | wavefronts/ideal | mma/instructions | bytes/compulsory |")
    print("|---|---|---|---|---|---|---|---|")
    for problem in reversed(gpu_bounds.PROBLEMS):
        quick = (0.1, 0.2) if problem[0] <= 64 else (0.2,)
        for density in quick if options.quick else gpu_bounds.DENSITIES:
            for block in gpu_bounds.BLOCKS:
                print(line(problem, block, density), flush=True)


if __name__ == "__main__":
    main()
