"""Lower bounds on the time of GPU kernels from the work they do: `sparse-prune bench gpu-bounds`.

Our kernels, PyTorch's own for BSR weights and a dense product are compiled for GPUs that are not here, a sample of their programs
runs in the PTX emulator, its result is checked, and what was counted is divided by published peaks. A bound is not a time: nothing
waits for anything else in it.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import operator
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .benchmark import QUANTIZATIONS, random_mask
from .bsr import BsrWeight
from .errors import SparsePruneError
from .masks import expand_mask

PROBLEMS = ((16, 4096, 4096), (512, 768, 3072), (4096, 4096, 4096))  # (M, K, N)
BLOCKS = ((16, 16), (32, 32), (64, 64), (128, 128), (64, 16), (128, 16))
DENSITIES = (0.1, 0.2, 0.5)
CAPABILITIES = (80, 90)
NAMES = {80: "A100", 90: "H100"}
LATENCY = 500  # clocks from asking memory to having: between what microbenchmarks publish for L2 hits and for misses
SAMPLE = 3  # tiles of a weight that are run
COUNTING: dict[str, Any] = {"mode": "early", "races": False}  # how the emulator runs what is only counted
# Tiles of the dense product, warps and stages; the best one counts. The last two are for few rows.
DENSE_TILES = (
    ((128, 256, 64), 8, 3),
    ((128, 128, 64), 4, 3),
    ((64, 128, 64), 4, 4),
    ((16, 64, 128), 4, 5),
    ((16, 32, 128), 4, 5),
)


def gpu_bounds(
    report: Callable[[int, int, str], None] = lambda done, of, text: None, quick: bool = False
) -> list[dict[str, Any]]:
    """One row per GPU, problem, blocksize, density and kernel; quick leaves out all but density .2 and two blocksizes.

    Kernels are "cuda" (C++, where nvcc is on the path), "triton", "torch" and "dense". Rows hold clocks of each resource ("tensor",
    "issue", "shared", "L2", "DRAM", "latency"), the largest ("bound") and its name ("limit"), "e_bound" (the dense tensor-core
    ideal at that density over the bound), "speedup_bound" (an ideal dense kernel over the bound) and "bytes_ratio" (bytes that
    must move between memory and the GPU over those of x, kept blocks and y).
    Raises SparsePruneError where Triton or the emulator is missing.
    """
    emulator = _emulator()
    blocks, densities = (BLOCKS[1:3], (0.2,)) if quick else (BLOCKS, DENSITIES)
    grid = [(block, density) for block in blocks for density in densities]
    of = len(CAPABILITIES) * len(PROBLEMS) * len(grid)
    rows: list[dict[str, Any]] = []
    done = 0
    for capability in CAPABILITIES:
        for problem in PROBLEMS:
            candidates = (_dense(emulator, capability, *problem, *tiles) for tiles in _fitting(problem))
            rows.append(min(candidates, key=lambda row: row["bound"]))
            for block, density in grid:
                packed = weight_of(problem, block, density)
                if _cuda_kernels().unavailable() is None:
                    rows.append(cuda_row(capability, problem[0], packed))
                rows.append(triton_row(capability, problem[0], packed))
                rows.append(_torch(emulator, capability, problem[0], packed))
                done += 1
                report(done, of, f"{NAMES[capability]} M={problem[0]} {block[0]}x{block[1]} density {density}")
    return rows


def planner_rows(report: Callable[[int, int, str], None] = lambda done, of, text: None) -> list[dict[str, Any]]:
    """Rows of the planner's table for GPUs: bounds of our kernels over the bound of the best dense product.

    A bound flatters every kernel, a sparse one more than a dense one: the table tells kernels apart, and finds dense faster only
    where sparse cannot win.
    """
    emulator, rows = _emulator(), []
    problems = [(m, k, n) for k, n in ((768, 3072), (4096, 4096)) for m in (16, 64, 512, 4096)]
    steps = [(capability, problem, block) for capability in CAPABILITIES for problem in problems for block in BLOCKS]
    dense: dict[tuple, float] = {}
    for done, (capability, problem, block) in enumerate(steps, 1):
        (m, k, n), key = problem, (capability, problem)
        if key not in dense:
            dense[key] = min(_dense(emulator, capability, *problem, *tiles)["bound"] for tiles in _fitting(problem))
        # Triton's first: it wins a tie, for it needs no second copy.
        bounds: dict[str, list[float]] = {"triton": [], "cuda": []}
        for density in DENSITIES:
            packed = weight_of(problem, block, density)
            bounds["triton"].append(triton_row(capability, m, packed)["bound"])
            bounds["cuda"].append(cuda_row(capability, m, packed)["bound"])
        for kernel, found in bounds.items():
            row: dict[str, Any] = {
                "isa": f"sm_{capability}",
                "kernel": kernel,
                "dtype": "bfloat16",
                "block": list(block),
            }
            row |= {"M": m, "weight": [k, n], "dense": "plain"}
            rows.append(row | {"ratio": [float(f"{bound / dense[key]:.3g}") for bound in found]})
        report(done, len(steps), f"{NAMES[capability]} M={m} {block[0]}x{block[1]}")
    return rows


def _emulator():
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise SparsePruneError("triton", "an installed Triton", str(error), "pip install triton") from None
    if importlib.util.find_spec("ptx_emulator") is None:
        tests = Path(__file__).resolve().parent.parent / "tests"
        if not (tests / "ptx_emulator").is_dir():
            raise SparsePruneError(
                "gpu-bounds",
                "a checkout with tests/ptx_emulator",
                str(tests.parent),
                "run it from a clone, installed editable",
            )
        sys.path.insert(0, str(tests))
    emulator = importlib.import_module("ptx_emulator")
    reason = emulator.unavailable()
    if reason:
        raise SparsePruneError("gpu-bounds", "a machine that can build the PTX emulator", reason, "install a compiler")
    return emulator


def _cuda_kernels():
    return importlib.import_module("cuda_kernels")  # beside the emulator


def weight_of(problem: tuple[int, int, int], block: tuple[int, int], density: float) -> BsrWeight:
    """The weight [N, K] of a problem (M, K, N), with a random mask."""
    _, k, n = problem
    generator = torch.Generator().manual_seed(0)
    mask = random_mask((n, k), block, density, generator)
    weight = torch.randn(n, k, generator=generator).mul_(expand_mask(mask, block, (n, k))).bfloat16()
    return BsrWeight.from_dense(weight, mask, block)


def cuda_row(capability: int, m: int, packed: BsrWeight) -> dict[str, Any]:
    """The row of the CUDA C++ kernel and grid that csrc/cuda/config.cpp chooses for M rows. Needs nvcc and the emulator."""
    from sparse_prune_kernels import cuda
    from sparse_prune_kernels.config import gpu_of

    kernels, sms = _cuda_kernels(), gpu_of(capability).sms
    if m <= kernels.FEW_TOKENS:
        return _cuda_few_row(capability, m, packed)
    if capability == 90:
        return _cuda_sm90_row(m, packed)
    (n, k), (r, c), blocks = packed.shape, packed.blocksize, tuple(packed.values.shape)
    layout = cuda.make_layout(packed.crow_indices, packed.col_indices, -(-k // c), r, c)
    at, launch = kernels.linear_launch(m, n, blocks, sms, work=layout.work)
    heads = layout.tables[: layout.tiles * cuda.TILE_INTS].view(layout.tiles, -1)
    some, average = _average(layout.work)
    programs = len(some) * average
    served = heads[some, 4 : 4 + cuda.TILE_OUTPUTS // layout.row].flatten()
    outputs = (served[served >= 0][:, None] * layout.row + torch.arange(layout.row)).flatten()
    outputs = outputs[outputs < n]
    arch, weight, served = f"sm_{capability}", layout.pack(packed.values), packed.to_dense()[outputs]
    heights = Counter(tokens for _, _, tokens in launch.blocks_of(m, layout.tiles))  # in the order of the grid
    made, counted = _made(kernels, at, launch, arch), []
    for tokens in heights:
        x = _rows(min(m, tokens), k)
        emulated = {"tokens": tokens, "tiles": some, "arch": arch, "sms": sms, **COUNTING}
        y, counts = kernels.linear(x, weight, blocks, n, **emulated)
        _check(y[:, outputs], x, served, "CUDA")
        counted.append((counts, made, programs, launch.threads))
    bytes_moved = _compulsory(m, packed) + 4 * layout.tables.numel()
    scales = [number / programs for number in heights.values()]
    steps, stages = float(heads[:, 1].float().mean()), 4 if layout.row == 16 else 3
    row = _bound(counted, scales, capability, bytes_moved, steps, stages, together=True)
    tokens = "/".join(map(str, heights)) if len(heights) > 1 else next(iter(heights))
    row |= {"kernel": "cuda", "config": {"tokens": tokens, "threads": launch.threads}, "bytes_ratio": None}
    products, every = (
        sum(scale * number(kind[0]) for scale, kind in zip(scales, counted, strict=True))
        for number in (lambda counts: counts.kinds["mma"], lambda counts: counts.instructions)
    )
    row |= {"union": None, "tensor_share": products / every}
    return _headline(row, capability, m, packed)


def _cuda_few_row(capability: int, m: int, packed: BsrWeight) -> dict[str, Any]:
    """cuda_row of the kernel for few rows: they are cheap, so all programs are counted, and with them the bytes that must move.

    On 9.0 it reads the layout of the Hopper kernel, elsewhere that of the sm_80 family.
    """
    from sparse_prune_kernels import cuda
    from sparse_prune_kernels.config import gpu_of

    kernels, (n, k), (r, c) = _cuda_kernels(), packed.shape, packed.blocksize
    x, arch = _rows(m, k), f"sm_{capability}"
    if capability == 90:
        layout, weight = _packed_sm90(packed)
        at, launch, _ = kernels.launch_sm90(m, n, weight)
        y, counts = kernels.linear_sm90(x, layout.pack(packed.values), weight, n, few_arch=arch, **COUNTING)
    else:
        blocks, sms = tuple(packed.values.shape), gpu_of(capability).sms
        at, launch = kernels.linear_launch(m, n, blocks, sms)
        weights = cuda.make_layout(packed.crow_indices, packed.col_indices, -(-k // c), r, c).pack(packed.values)
        y, counts = kernels.linear(x, weights, blocks, n, arch=arch, sms=sms, **COUNTING)
    _check(y, x, packed.to_dense(), "CUDA")
    bytes_moved = 32 * (counts.dram_load_sectors + counts.dram_store_sectors)
    # rounds of loads: pieces of a warp, a batch of which are on their way together
    pieces = packed.nnzb * (r // at.row) * (c // cuda.UNIT)
    steps = pieces / at.rows / (launch.threads / 32) / (8 if launch.tokens == 16 else 2 / launch.units)
    counted = [(counts, _made(kernels, at, launch, arch), float(launch.blocks), launch.threads)]
    row = _bound(counted, [1.0], capability, bytes_moved, steps, stages=2)
    row |= {"kernel": "cuda", "config": {"tokens": launch.tokens, "threads": launch.threads}}
    row |= {"bytes_ratio": bytes_moved / _compulsory(m, packed)}
    row |= {"union": None, "tensor_share": counts.kinds["mma"] / counts.instructions}
    return _headline(row, capability, m, packed)


def _made(kernels, at, launch, arch: str) -> SimpleNamespace:
    """What a kernel of the sm_80 family takes of a multiprocessor, as ptxas made it for arch and as it is launched."""
    registers = kernels.registers("kernels_sm80.cu", arch, kernels.entry(at, launch, torch.bfloat16))
    return SimpleNamespace(registers=registers, shared=launch.shared_bytes)


def _packed_sm90(packed: BsrWeight):
    """The layout for Hopper, and what its launcher is told of it."""
    from sparse_prune_kernels import cuda_sm90

    (_, k), (r, c) = packed.shape, packed.blocksize
    layout = cuda_sm90.make_layout(packed.crow_indices, packed.col_indices, k, r, c)
    plan = layout.plan
    return layout, _cuda_kernels().PackedSm90(r, c, plan.cluster, packed.nnzb, plan.groups, plan.lines)


def _cuda_sm90_row(m: int, packed: BsrWeight) -> dict[str, Any]:
    """cuda_row of the Hopper kernel: its blocks stay, so a program is what one of them does for a tile."""
    from sparse_prune_kernels import cuda_sm90

    kernels, (n, k) = _cuda_kernels(), packed.shape
    layout, weight = _packed_sm90(packed)
    plan, launch = layout.plan, kernels.launch_sm90(m, n, weight)[2]
    x = _rows(min(m, launch.tokens), k)
    emulated = {"tokens": launch.tokens, "clusters": 1, **COUNTING}
    y, counts = kernels.linear_sm90(x, layout.pack(packed.values), weight, n, **emulated)
    _check(y, x, packed.to_dense(), "CUDA")
    programs, scale = plan.groups * plan.cluster, -(-m // launch.tokens)
    made = SimpleNamespace(registers=168, shared=launch.shared_bytes)  # as tests/test_cuda_sm90.py sees it
    bytes_moved = _compulsory(m, packed) + 4 * layout.tables.numel()
    stages = launch.shared_bytes // (2 * launch.line * launch.lines * (launch.tokens + cuda_sm90.ROWS))
    sms = plan.cluster * cuda_sm90.CLUSTERS[plan.cluster]
    counted = [(counts, made, programs, launch.threads)]
    row = _bound(counted, [scale], 90, bytes_moved, plan.lines / plan.groups / launch.lines, stages, sms)
    row |= {"kernel": "cuda", "config": {"tokens": launch.tokens, "cluster": plan.cluster}, "bytes_ratio": None}
    row |= {"union": plan.filled[2], "tensor_share": counts.kinds["wgmma"] / counts.instructions}
    return _headline(row, 90, m, packed)


def quantized_rows(
    report: Callable[[int, int, str], None] = lambda done, of, text: None, quick: bool = False
) -> list[dict[str, Any]]:
    """Triton's rows for bfloat16 weights and for each way to quantize them that the GPU has ("scheme"), at density .2.

    For the first and the last of PROBLEMS and three blocksizes; quick: for the first, and one.
    """
    rows: list[dict[str, Any]] = []
    grid = itertools.product(
        CAPABILITIES, PROBLEMS[:1] if quick else PROBLEMS[::2], BLOCKS[2:3] if quick else BLOCKS[1:4]
    )
    for done, (capability, problem, block) in enumerate(steps := list(grid), 1):
        packed = weight_of(problem, block, 0.2)
        for scheme, arguments in {"bfloat16": None, **QUANTIZATIONS}.items():
            if scheme == "e4m3" and capability < 89:
                continue
            weight = packed if arguments is None else packed.to(torch.float32).quantize(**arguments)
            rows.append(triton_row(capability, problem[0], weight) | {"scheme": scheme})
        report(done, len(steps), f"{NAMES[capability]} M={problem[0]} {block[0]}x{block[1]}")
    return rows


def quantized_markdown(rows: list[dict[str, Any]]) -> str:
    """quantized_rows as the table of docs/gpu-performance.md: the bound of bfloat16 over each other one, and its limit."""
    bounds = {(row["m"], row["block"], row["gpu"], row["scheme"]): row for row in rows}
    columns = [key for key in dict.fromkeys(key[2:] for key in bounds) if key[1] != "bfloat16"]
    lines = ["| | " + " | ".join(" ".join(column) for column in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for m, block in dict.fromkeys(key[:2] for key in bounds):
        cells = [f"M = {m}, {block}"]
        for gpu, scheme in columns:
            row = bounds[m, block, gpu, scheme]
            cells.append(f"{bounds[m, block, gpu, 'bfloat16']['bound'] / row['bound']:.2f} ({row['limit']})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def triton_row(capability: int, m: int, packed: BsrWeight) -> dict[str, Any]:
    """The row of our Triton kernel, with the tiling that ships for this problem."""
    emulator = _emulator()
    from sparse_prune_kernels import config, launch

    (n, k), (r, c) = packed.shape, packed.blocksize
    rounds = packed.scales is not None and not packed.weight_only
    sizes = (1 if rounds else 2, packed.values.element_size())  # of numbers as they are multiplied, and of the weight's
    plans = launch.plans_of(packed.crow_indices, packed.col_indices, n, k, r, c, sizes[0], transposed=False)
    unions = {merge: p.union for merge, p in plans.items()}
    tiles = config.linear_config(m, n, k, r, c, sizes[0], capability, packed.density, unions, value_size=sizes[1])
    whole = plans[tiles.merge]
    every = m <= config.SMALL_M  # few rows are cheap: count all programs, and so the bytes that must move
    some, average = (whole, 1.0) if every else _some_tiles(packed, whole, tiles.skip)
    rows = min(m, tiles.block_m)
    x, y = _rows(rows, k), torch.full((rows, n), torch.nan, dtype=torch.bfloat16)
    operand, before = x, []
    of_rows: tuple[Tensor, ...] = () if packed.scales is None else (packed.scales,)
    if rounds:  # a pass over x before the product
        operand = torch.zeros(rows, k, dtype=packed.values.dtype)
        of_rows = (*of_rows, torch.empty(rows))
        before = [launch.round_call(x, operand, of_rows[1], None)]
    schedule = launch.schedule_for(operand, some, packed.values, c, tiles, sms=1)
    calls = launch.linear_calls(
        operand, some, packed.values, None, None, y, r, c, c, 1, "none", tiles, "ieee", *of_rows, schedule=schedule
    )
    passes = [_run(emulator, call, capability) for call in before]
    counted = [_run(emulator, call, capability) for call in calls]
    if schedule is not None:  # programs that stay: what one of them does for a tile
        counts, made, _, threads = counted[0]
        counted[0] = counts, made, some.tiles, threads
    counted[0] = _worth(counted[0], average)
    launches = -(-m // tiles.block_m) * whole.tiles / (some.tiles * average)
    scales = [launches, 1.0]  # the second call adds all parts already
    served = some.table[: some.tiles, 1:].flatten()
    outputs = (served[served >= 0][:, None] * r + torch.arange(r)).flatten()
    if rounds:  # what is checked is the product, not the rounding
        x = operand.float() * of_rows[1][:, None]
    _check(y[:, outputs], x, packed.to_dense()[outputs], "Triton")
    bytes_moved = _compulsory(m, packed) + 4 * whole.table.numel()
    bytes_ratio = None
    if every:  # parts stay in L2, which holds all of them many times over
        product = counted[0][0]
        written = product.dram_store_sectors * 32 if len(calls) == 1 else y.numel() * 2
        bytes_moved = 32 * product.dram_load_sectors + written
        bytes_ratio = bytes_moved / _compulsory(m, packed)
    steps = whole.steps / whole.tiles / tiles.split * (c / tiles.block_k)
    scales = scales[: len(counted)] + [-(-m // rows)] * len(passes)
    row = _bound(counted + passes, scales, capability, bytes_moved, steps, tiles.num_stages, rate=3 - sizes[0])
    row |= {"kernel": "triton", "config": asdict(tiles), "union": whole.union, "bytes_ratio": bytes_ratio}
    return _headline(row, capability, m, packed)


def _some_tiles(packed: BsrWeight, whole, skip: bool):
    """A plan that holds only SAMPLE of the tiles of a whole one, and what each of them is worth, as _average says.

    Work is their steps, or with skip the blocks that they have.
    """
    from sparse_prune_kernels import plan

    begin, steps = whole.table[: whole.tiles + 1, 0].long(), whole.table[whole.tiles + 1 :, 1:]  # [T + 1], [U, merge]
    each = (steps >= 0).sum(1) if skip else torch.ones(len(steps), dtype=torch.int64)  # [U]
    ends = torch.cat([each.new_zeros(1), each.cumsum(0)])[begin]  # [T + 1]
    chosen, average = _average(ends.diff())
    slots = plan.places(packed.crow_indices, packed.col_indices, packed.shape[1] // packed.blocksize[1])
    return plan.plan_of(slots, whole.table[chosen, 1:].long(), whole.table.device), average


def _average(work: Tensor) -> tuple[Tensor, float]:
    """SAMPLE tiles that stand for all: those nearest to the mean of their work [tiles], and the work of each over that mean."""
    work = work.double()
    chosen = (work - work.mean()).abs().argsort(stable=True)[:SAMPLE]
    return chosen, float(work[chosen].mean() / work.mean())


def _torch(emulator, capability: int, m: int, packed: BsrWeight) -> dict[str, Any]:
    from sparse_prune_kernels import peers

    (n, k), (r, c) = packed.shape, packed.blocksize
    meta = peers.torch_meta(m, n, k, r, c, packed.density, capability)
    columns = m // meta["SPLIT_N"]
    block_rows = n // r
    chosen, average = _average(packed.crow_indices.diff())
    dense = packed.to_dense().view(block_rows, r, k)[chosen].reshape(-1, k)
    mask = packed.block_mask()[chosen]
    some = BsrWeight.from_dense(dense, mask, (r, c))
    x, y = _rows(columns, k), torch.full((columns, len(dense)), torch.nan, dtype=torch.bfloat16)
    call = peers.torch_call(x, some.crow_indices, some.col_indices, some.values, y, meta, columns)
    counted = _worth(_run(emulator, call, capability), average)
    _check(y, x, dense, "PyTorch")
    launches = block_rows / (len(chosen) * average) * meta["SPLIT_N"]
    steps = packed.nnzb / block_rows
    row = _bound([counted], [launches], capability, _compulsory(m, packed), steps, meta["num_stages"])
    row |= {
        "kernel": "torch",
        "config": {**meta, "BLOCKSIZE_COL": columns},
        "union": packed.density,
        "bytes_ratio": None,
    }
    return _headline(row, capability, m, packed)


def _fitting(problem: tuple[int, int, int]) -> Iterator[tuple]:
    m, k, n = problem
    for tiles, warps, stages in DENSE_TILES:
        if m % tiles[0] == n % tiles[1] == k % tiles[2] == 0 and (tiles[0] > 16) == (m > 16):
            yield tiles, warps, stages


def _dense(emulator, capability: int, m: int, k: int, n: int, tiles, warps: int, stages: int) -> dict[str, Any]:
    from sparse_prune_kernels import peers

    x, w = _rows(tiles[0], k), _rows(tiles[1], k, seed=1)
    y = torch.full((tiles[0], tiles[1]), torch.nan, dtype=torch.bfloat16)
    counted = _run(emulator, peers.dense_call(x, w, y, tiles, warps, stages), capability)
    _check(y, x, w, "dense")
    launches = m // tiles[0] * (n // tiles[1])
    row = _bound([counted], [launches], capability, 2 * (m * k + n * k + m * n), k / tiles[2], stages)
    row |= {
        "kernel": "dense",
        "config": {"tiles": tiles, "num_warps": warps, "num_stages": stages},
        "bytes_ratio": None,
    }
    row |= {"union": 1.0, "m": m, "k": k, "n": n, "block": "", "density": 1.0}
    return _ratios(row, capability)


def _run(emulator, call, capability: int):
    """What the emulator counted of one call, what it was compiled to, and its programs."""
    from sparse_prune_kernels import offline

    made = offline.compile_call(call, capability)
    arguments = made.read(call, emulator.TensorMap)
    name, threads = call.kernel.fn.__name__, 32 * call.num_warps
    counts = emulator.emulate(
        made.ptx, name, call.grid, threads, arguments, shared_bytes=made.shared, mode="early", races=False
    )
    return counts, made, call.grid[0] * call.grid[1], threads


def _worth(counted, average: float):
    """What _run gave, of programs each of which does the work of so many average ones."""
    counts, made, programs, threads = counted
    return counts, made, programs * average, threads


def _check(y: Tensor, x: Tensor, weight: Tensor, who: str) -> None:
    exact = x.double() @ weight.double().T
    error, allowed = (y.double() - exact).abs().max(), 2**-7 * exact.abs().max()
    assert error <= allowed, f"{who}: an error of {error:.3g}, {allowed:.3g} allowed"


def _rows(m: int, k: int, seed: int = 0) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).bfloat16()


def _compulsory(m: int, packed: BsrWeight) -> int:
    """Bytes of x, the kept blocks with their index, and y."""
    n, k = packed.shape
    return packed.nbytes + 2 * (m * k + m * n)


def _bound(
    counted,
    scales,
    capability: int,
    bytes_moved: float,
    steps: float,
    stages: int,
    sms: int | None = None,
    rate: int = 1,
    together: bool = False,
) -> dict[str, Any]:
    """Clocks that each resource of the GPU is busy at its peak, for calls that follow one another.

    sms: how many of the GPU's multiprocessors have something to do, all unless given; rate: how much faster than float16 the tensor
    cores multiply, 2 for numbers of 8 bits; together: counted are the kinds of programs of one call, in the order of its grid.
    """
    from sparse_prune_kernels.config import gpu_of

    gpu = gpu_of(capability)
    sms = sms or gpu.sms
    clocks = dict.fromkeys(("tensor", "issue", "shared", "L2"), 0.0) | {
        "DRAM": bytes_moved / gpu.dram_bytes,
        "latency": 0.0,
    }
    kinds = [
        (counts, made, programs, threads, round(programs * scale, 3))  # a whole number, but for what floats leave
        for (counts, made, programs, threads), scale in zip(counted, scales, strict=False)
    ]
    for place, call in enumerate([kinds] if together else [[kind] for kind in kinds]):
        busy = []  # clocks of a program of each kind
        for counts, _, programs, _, total in call:
            peak = rate * gpu.multiply_adds * (gpu.mma_sync if counts.kinds["wgmma"] == 0 else 1.0)
            each = {"tensor": counts.tensor_fma / peak, "issue": counts.instructions / gpu.issue}
            each["shared"] = counts.shared_wavefronts + counts.wgmma_shared_bytes / gpu.shared_bytes
            busy.append({resource: clock / programs for resource, clock in each.items()})
            sectors = counts.l2_load_sectors + counts.global_store_sectors
            clocks["L2"] += total / programs * 32 * sectors / gpu.l2_bytes
        loads = _loads([kind[-1] for kind in call], [max(each.values()) for each in busy], sms)
        for resource in ("tensor", "issue", "shared"):
            clocks[resource] += max(
                sum(number * each[resource] for number, each in zip(load, busy, strict=True)) for load in loads
            )
        _, made, _, threads, _ = call[0]
        resident = min(
            65536 // (made.registers * threads), (gpu.shared + 1024) // (made.shared + 1024), 2048 // threads
        )
        waves = -(-max(map(sum, loads)) // max(1, resident))
        # where to look, the index, then as many rounds as the pipeline's depth leaves, and the output
        rounds = 3 + (steps / max(1, stages - 1) if place == 0 else 0)
        clocks["latency"] += waves * rounds * LATENCY
    wavefronts, ideal = (
        sum(getattr(kind[0], name) for kind in kinds) for name in ("shared_wavefronts", "shared_ideal")
    )
    limit = max(clocks, key=clocks.__getitem__)
    conflicts = wavefronts / ideal if ideal else 1.0
    return {
        "gpu": NAMES[capability],
        "clocks": clocks,
        "bound": clocks[limit],
        "limit": limit,
        "wavefronts_per_ideal": conflicts,
    }


def _loads(totals: list[float], clocks: list[float], sms: int) -> set[tuple[int, ...]]:
    """How many programs of each kind multiprocessors run, of which each takes the next one as soon as it is done with one.

    totals [kinds], in the order of the grid; clocks [kinds] of one program.
    """
    done: Counter[tuple[int, ...]] = Counter({(0,) * len(totals): sms})  # multiprocessors by what they have run
    for kind, total in enumerate(totals):
        left = -(-total // 1)
        while left > 0:
            load = min(done, key=lambda load: sum(map(operator.mul, load, clocks)))
            number = int(min(left, done[load]))
            done -= Counter({load: number})
            more = (*load[:kind], load[kind] + 1, *load[kind + 1 :])
            done[more] += number
            left -= number
    return set(done)


def _headline(row: dict[str, Any], capability: int, m: int, packed: BsrWeight) -> dict[str, Any]:
    (n, k), (r, c) = packed.shape, packed.blocksize
    row |= {"m": m, "k": k, "n": n, "block": f"{r}x{c}", "density": round(packed.nnzb * r * c / (n * k), 4)}
    return _ratios(row, capability)


def _ratios(row: dict[str, Any], capability: int) -> dict[str, Any]:
    from sparse_prune_kernels.config import gpu_of

    gpu, (m, k, n) = gpu_of(capability), (row["m"], row["k"], row["n"])
    ideal = m * n * k / gpu.multiply_adds / gpu.sms
    row["e_bound"] = ideal * row["density"] / row["bound"]
    row["speedup_bound"] = max(ideal, 2 * (m * k + n * k + m * n) / gpu.dram_bytes) / row["bound"]
    return row


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as the tables of docs/gpu-bounds.md."""
    lines = []
    for gpu in dict.fromkeys(row["gpu"] for row in rows):
        for m, k, n in dict.fromkeys((row["m"], row["k"], row["n"]) for row in rows):
            own = [row for row in rows if (row["gpu"], row["m"], row["k"], row["n"]) == (gpu, m, k, n)]
            small = m <= 64
            dense = next(row for row in own if row["kernel"] == "dense")
            what = "speed-up bound over an ideal dense kernel" if small else "e_bound"
            value = "speedup_bound" if small else "e_bound"
            lines += ["", f"## {gpu}, M = {m}, {k} -> {n}: {what}", ""]
            lines += [f"A dense Triton product: {dense[value]:.2f} ({dense['limit']}).", ""]
            extra = "bytes/compulsory" if small else "CUDA's tokens, Triton's merge x BM"
            lines += [
                f"| block | density | CUDA | Triton | PyTorch | best/PyTorch | {extra} | wavefronts/ideal |",
                "|---|---|---|---|---|---|---|---|",
            ]
            for key in dict.fromkeys((row["block"], row["density"]) for row in own if row["kernel"] == "triton"):
                mine = {row["kernel"]: row for row in own if (row["block"], row["density"]) == key}
                bounds = {name: f"{row[value]:.2f} ({row['limit']})" for name, row in mine.items()}
                ours = [mine[name] for name in ("cuda", "triton") if name in mine]
                ratio = max(row[value] for row in ours) / mine["torch"][value]
                if small:
                    more = ", ".join(f"{row['bytes_ratio']:.2f}" for row in ours)
                else:
                    tiles = mine["triton"]["config"]
                    more = f"{tiles['merge']} x {tiles['block_m']}"
                    more = f"{mine['cuda']['config']['tokens']}, {more}" if "cuda" in mine else more
                waves = ", ".join(f"{row['wavefronts_per_ideal']:.2f}" for row in ours)
                lines.append(
                    f"| {key[0]} | {key[1]:.2g} | {bounds.get('cuda', '')} | {bounds['triton']} | {bounds['torch']} "
                    f"| {ratio:.1f} | {more} | {waves} |"
                )
    return "\n".join(lines) + "\n"
