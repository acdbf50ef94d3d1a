"""`sparse-prune tune` on a GPU: which tilings of the Triton kernels are fastest there (tiles.py keeps and reads them), and then
when these, the CUDA C++ kernels or dense are (for planner.py).

For each problem the tiling that arithmetic chooses and a dozen others make the same product; results are compared with float64, and
those that are right are timed as `bench gpu` times: CUDA graphs, in turns, L2 swept. A tiling counts as better only where its
median lies below the lower quartile of the arithmetic's, so that noise changes nothing. Rows are kept as they are finished.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import statistics
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import backends, gpu_bench, planner, tiles
from .benchmark import DTYPES, random_mask
from .bsr import BsrWeight
from .errors import SparsePruneError
from .masks import expand_mask
from .ops import bsr_linear
from .serialization import write_json
from .tuning import make_table, measure_each

SHAPES = ((768, 3072), (4096, 4096))  # (K, N)
BLOCKS = ((16, 16), (32, 32), (64, 64), (128, 128), (64, 16), (128, 16))
TOKENS = (1, 16, 64, 256, 1024, 4096)  # kernels.tuned takes a row for M from half to twice its own
TRAINING_TOKENS = 256  # from here on the product of the gradient of x is measured too
DENSITIES = (0.1, 0.3)
PLANNED_DENSITIES = (0.1, 0.2, 0.5, 1.0)
QUICK_BLOCKS, QUICK_TOKENS, QUICK_DENSITIES = ((32, 32), (64, 64)), (16, 256, 4096), (0.2,)

Timer = Callable[[gpu_bench.Candidates], tuple[dict[str, list[float]], dict[str, str]]]


def problems(quick: bool, dtypes: Iterable[str], shapes: Iterable[tuple[int, int]] = SHAPES) -> list[dict[str, Any]]:
    """What is measured, largest M last; int8 weights are multiplied with x in bfloat16, "gradient" is dx = dy @ W."""
    names = (*DTYPES, "int8")
    dtypes = tuple(dtypes)
    unknown = [name for name in dtypes if name not in names]
    if unknown:
        raise SparsePruneError("dtypes", f"names among {', '.join(names)}", unknown[0], "choose some of these")
    blocks = QUICK_BLOCKS if quick else BLOCKS
    tokens, densities = (QUICK_TOKENS, QUICK_DENSITIES) if quick else (TOKENS, DENSITIES)
    every = itertools.product(dtypes, tokens, blocks, shapes, densities)
    return [
        {"dtype": dtype, "blocksize": list(block), "M": m, "K": k, "N": n, "density": density} | gradient
        for dtype, m, block, (k, n), density in every
        for gradient in ({}, {"gradient": True})
        if not gradient or (m >= TRAINING_TOKENS and dtype != "int8")
    ]


def tune(
    of: list[dict[str, Any]],
    out: str | Path | None = None,
    seconds: float = 0.1,
    report: Callable[[str, int, int, str], None] = lambda *_: None,
    timer: Timer | None = None,
    device: str = "cuda",
) -> list[dict[str, Any]]:
    """Measure `problems`, write the fastest tilings to `out` (None: where the kernels look, then in force), and return the rows.

    timer(candidates) gives their times as gpu_bench.GraphTimer(seconds) does, which is the default; report(phase, step, of, text)
    is called after each problem. Raises SparsePruneError where there is no GPU, or where the kernels do not run on it.
    """
    from sparse_prune_kernels import launch

    machine = {"gpu": launch.device_name(torch.device(device))}
    if device == "cuda":
        gpu_bench.require_gpu("tune")
        machine |= gpu_bench.about()
    timer = timer or gpu_bench.GraphTimer(seconds)
    out = Path(out) if out is not None else tiles.cache_file(machine["gpu"])

    def measure(problem: dict[str, Any]) -> dict[str, Any]:
        return problem | _measure(problem, timer, device)

    def tell(problem: dict[str, Any], row: dict[str, Any]) -> str:
        block = "x".join(map(str, row["blocksize"]))
        gain = row["arithmetic_us"] / row["us"]
        what = f"{row['dtype']} {block} M={row['M']}{', gradient' if row.get('gradient') else ''}"
        return f"{what}: {gain:.2f}x the arithmetic's tiling"

    def write(rows: list[dict[str, Any]]) -> None:
        write_json(out, {"format": tiles.FORMAT, "machine": machine, "rows": rows})

    rows = measure_each(of, measure, out, machine, write, tell, report)
    tiles.install()
    return rows


@torch.no_grad()
def _measure(problem: dict[str, Any], timer: Timer, device: str) -> dict[str, Any]:
    """{"tiling": the fastest's fields, "us" and "arithmetic_us": its median and the arithmetic's, "absent": what does not run}."""
    from sparse_prune_kernels import launch

    m, k, n, block = (problem[name] for name in ("M", "K", "N", "blocksize"))
    quantized, gradient = problem["dtype"] == "int8", problem.get("gradient", False)
    dtype = torch.bfloat16 if quantized else DTYPES[problem["dtype"]]
    _require_triton(device, torch.int8 if quantized else dtype, block)
    generator = torch.Generator().manual_seed(zlib.crc32(json.dumps(problem).encode()))
    mask = random_mask((n, k), block, problem["density"], generator)
    weight = torch.randn(n, k, generator=generator).mul_(k**-0.5) * expand_mask(mask, block, (n, k))  # [N, K]
    x = torch.randn(m, n if gradient else k, generator=generator).to(device, dtype)  # [M, K]; dy [M, N]
    packed = BsrWeight.from_dense(weight.to(device, torch.float32 if quantized else dtype), mask, block)
    packed = packed.quantize() if quantized else packed
    index = (packed.crow_indices, packed.col_indices, packed.values)
    dense = packed.to_dense().double()
    exact = x.double() @ (dense if gradient else dense.T)  # [M, N]; [M, K]

    def product(config: Any) -> Tensor:
        if packed.scales is not None:
            return launch.bsr_linear_w8a8(x, *index, packed.scales, n, config=config)
        if gradient:
            return launch.bsr_linear_dx(x, *index, k, config=config)
        return launch.bsr_linear(x, *index, n, config=config)

    # int8 rounds x, which is not the tiling's doing.
    allowed = (0.02 if quantized else 2 * torch.finfo(dtype).eps) * float(exact.norm())
    configs = launch.candidates(x, *index, k if gradient else n, gradient)
    running: gpu_bench.Candidates = {}
    absent: dict[str, str] = {}
    for place, config in enumerate(configs):
        name = json.dumps(dataclasses.asdict(config))
        try:
            error = float((product(config).double() - exact).norm())
        except Exception as reason:  # whatever a compiler or driver raises about a tiling that does not fit this GPU
            if place == 0:
                raise
            absent[name] = f"{type(reason).__name__}: {reason}".splitlines()[0][:200]
            continue
        if error <= allowed:
            running[name] = functools.partial(product, config)
        elif place == 0:
            raise ArithmeticError(f"{problem}: the kernel errs by {error:.2e}, {allowed:.2e} allowed")
        else:
            absent[name] = f"an error of {error:.2e}, {allowed:.2e} allowed"
    times, failed = timer(running)
    own = json.dumps(dataclasses.asdict(configs[0]))
    if own not in times:
        raise SparsePruneError("tune", "a timing of the kernel as it is", failed.get(own, "none"), "see `make gpu`")
    best = min(times, key=lambda name: statistics.median(times[name]))
    lower = statistics.quantiles(times[own], n=4)[0] if len(times[own]) > 1 else times[own][0]
    if statistics.median(times[best]) >= lower:
        best = own
    return {
        "tiling": json.loads(best),
        "us": statistics.median(times[best]),
        "arithmetic_us": statistics.median(times[own]),
        "absent": absent | failed,
    }


def _require_triton(device: str, dtype: torch.dtype, block: list[int]) -> None:
    reason = None
    if device == "cuda":
        reason = backends.triton_unavailable(torch.device(device), dtype, (block[0], block[1]))
    if reason is not None:
        raise SparsePruneError("tune", "a GPU that runs the Triton kernels", "none", reason)


def tune_kernels(
    out: str | Path | None = None,
    quick: bool = False,
    dtypes: Iterable[str] = ("bfloat16",),
    report: Callable[[str, int, int, str], None] = lambda *_: None,
    seconds: float = 0.1,
    timer: Timer | None = None,
    device: str = "cuda",
) -> planner.Table:
    """Time each kernel that runs on the GPU and the dense product, and write the planner's table to `out`.

    None: planner.cache_file(backends.gpu_name()), where the planner looks. float16 is planned by bfloat16's rows; int8 is not
    planned. A kernel whose result is not dense's, or that cannot be timed, has no row. The rest is as in tune.
    """
    on = torch.device(device)
    machine = gpu_bench.about() if device == "cuda" else {"gpu": backends.gpu_name()}
    timer = timer or gpu_bench.GraphTimer(seconds)
    out = Path(out) if out is not None else planner.cache_file(backends.gpu_name())
    dtypes = [name for name in dtypes if name not in ("float16", "int8")] or ["bfloat16"]
    every = itertools.product(dtypes, QUICK_BLOCKS if quick else BLOCKS, SHAPES, QUICK_TOKENS if quick else TOKENS)
    isa = f"sm_{backends.gpu_capability(on)}"
    wanted = [
        {"isa": isa, "dtype": dtype, "block": list(block), "M": m, "weight": [k, n]}
        for dtype, block, (k, n), m in every
    ]

    @torch.no_grad()
    def measure(problem: dict[str, Any]) -> list[dict[str, Any]]:
        (k, n), m, dtype, block = problem["weight"], problem["M"], DTYPES[problem["dtype"]], tuple(problem["block"])
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(m, k, generator=generator).to(device, dtype)  # [M, K]
        weight = torch.randn(n, k, generator=generator).to(device, dtype)  # [N, K]
        candidates: gpu_bench.Candidates = {"plain": lambda: F.linear(x, weight)}
        runs = [name for name, reason in backends.gpu_reasons(on, dtype, block).items() if reason is None]
        for density in PLANNED_DENSITIES:
            packed = BsrWeight.from_dense(weight, random_mask((n, k), block, density, generator).to(device), block)
            dense = F.linear(x, packed.to_dense()).double()  # [M, N]
            for kernel in runs:
                run = functools.partial(bsr_linear, x, packed, backend=kernel)
                if (run().double() - dense).norm() <= 4 * torch.finfo(dtype).eps * dense.norm():
                    candidates[f"{kernel} {density}"] = run
        times, _ = timer(candidates)
        us = {name: statistics.median(found) for name, found in times.items()}
        rows = []
        for kernel in runs:
            if all(f"{kernel} {density}" in us for density in PLANNED_DENSITIES):
                ratio = [float(f"{us[f'{kernel} {density}'] / us['plain']:.3g}") for density in PLANNED_DENSITIES]
                rows.append(problem | {"kernel": kernel, "dense": "plain", "ratio": ratio})
        return rows

    return make_table(out, machine, PLANNED_DENSITIES, wanted, measure, report)


def gains(rows: list[dict[str, Any]]) -> Iterator[tuple[str, str, dict[int, float]]]:
    """(dtype and perhaps "gradient", block, {M: how much faster than the arithmetic's tiling, as geometric mean over the rest})."""

    def key(row: dict[str, Any]) -> tuple[str, tuple[int, ...]]:
        return row["dtype"] + " gradient" * row.get("gradient", False), tuple(row["blocksize"])

    for (dtype, block), group in itertools.groupby(sorted(rows, key=key), key=key):
        by_m: dict[int, list[float]] = {}
        for row in group:
            by_m.setdefault(row["M"], []).append(row["arithmetic_us"] / row["us"])
        means = {m: statistics.geometric_mean(found) for m, found in sorted(by_m.items())}
        yield dtype, "x".join(map(str, block)), means
