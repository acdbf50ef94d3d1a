"""One sparse layer on this machine's GPU against cuBLAS, PyTorch's BSR kernel and 2:4 sparsity: `sparse-prune bench gpu`.

Every candidate is checked against float64, captured into a CUDA graph, and replayed in turns, with a swept L2 before each replay;
the median over the turns counts. Rows are kept as they are finished. A device gets one JSON file and one picture.
"""

from __future__ import annotations

import itertools
import json
import random
import statistics
import subprocess
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import __version__, ops
from .benchmark import DTYPES, each_row, linear_problems, random_mask
from .bsr import BsrWeight
from .errors import SparsePruneError
from .masks import expand_mask
from .planner import Row, slug
from .serialization import atomic_path, write_json

GRID: dict[str, Any] = {
    "shapes": ((768, 3072), (4096, 4096)),  # (K, N)
    "tokens": (1, 4, 16, 64, 256, 1024, 4096),
    "densities": (0.1, 0.2, 0.5),
    "blocksizes": ((16, 16), (32, 32), (64, 64), (128, 128), (64, 16), (128, 16)),
    "dtypes": ("bfloat16",),
}
QUICK = GRID | {"shapes": ((4096, 4096),), "tokens": (1, 64, 4096), "blocksizes": ((32, 32), (64, 64))}
PEERS = ("dense", "torch_bsr", "2:4")
OURS = ("triton", "cuda")  # backends of bsr_linear; one that cannot run here is told with its reason
TURNS = (5, 51)  # replays of each candidate, at least and at most
MIN_SWEEP = 256 << 20  # bytes written before each replay: several times the largest L2 there is

Candidates = dict[str, Callable[[], Tensor]]


def require_gpu(command: str = "bench gpu") -> None:
    """Raise SparsePruneError where no GPU can be measured, saying which of the possible reasons it is."""
    if torch.cuda.is_available():
        return
    if torch.version.cuda is None:
        reason, remedy = (
            f"PyTorch {torch.__version__}, built without CUDA",
            "install a CUDA build of PyTorch: make clean, make gpu",
        )
    else:
        reason, remedy = "PyTorch finds no GPU", "run it on a machine with an NVIDIA GPU and its driver (nvidia-smi)"
    raise SparsePruneError(command, "a CUDA device", reason, remedy)


def about() -> dict[str, Any]:
    """The device, its driver, and the versions that a number depends on."""
    import triton

    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader", "--id=0"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        driver = "unknown"
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "sms": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "driver, clock, power": driver,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "sparse_prune": __version__,
    }


class GraphTimer:
    """Microseconds of each candidate: CUDA graphs, replayed in turns for about `seconds`, L2 swept before each replay."""

    def __init__(self, seconds: float = 0.3, cuda: Any = torch.cuda, device: str = "cuda") -> None:
        self.seconds, self._cuda = seconds, cuda
        size = max(MIN_SWEEP, 4 * cuda.get_device_properties(0).L2_cache_size)
        self._sweep = torch.empty(size // 4, dtype=torch.int32, device=device)

    def __call__(self, candidates: Candidates) -> tuple[dict[str, list[float]], dict[str, str]]:
        """The times of each candidate, and why the others could not be captured."""
        graphs, failed = {}, {}
        for name, run in candidates.items():
            try:
                graphs[name] = self._capture(run)
            except RuntimeError as error:
                failed[name] = f"cannot be captured into a CUDA graph: {_first_line(error)}"
        times: dict[str, list[float]] = {name: [] for name in graphs}
        order = random.Random(0)

        def turn() -> float:
            start, events = time.perf_counter(), []
            for name in order.sample(list(graphs), len(graphs)):
                begin, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
                # The sweep takes longer than the host needs to queue what follows, so that nothing waits for the host.
                self._sweep.zero_()
                begin.record()
                graphs[name].replay()
                end.record()
                events.append((name, begin, end))
            self._cuda.synchronize()
            for name, begin, end in events:
                times[name].append(1000 * begin.elapsed_time(end))
            return time.perf_counter() - start

        turn()
        for values in times.values():
            values.clear()
        spent, count = 0.0, 0
        while count < TURNS[0] or (spent < self.seconds and count < TURNS[1]):
            spent, count = spent + turn(), count + 1
        return times, failed

    def _capture(self, run: Callable[[], Tensor]):
        side = self._cuda.Stream()
        side.wait_stream(self._cuda.current_stream())
        with self._cuda.stream(side):  # what is compiled, loaded or planned on a first call must not be captured
            for _ in range(3):
                run()
        self._cuda.current_stream().wait_stream(side)
        self._cuda.synchronize()
        graph = self._cuda.CUDAGraph()
        with self._cuda.graph(graph):
            run()
        return graph


def problems(
    shapes: Iterable[tuple[int, int]],
    tokens: Iterable[int],
    densities: Iterable[float],
    blocksizes: Iterable[tuple[int, int]],
    dtypes: Iterable[str],
) -> list[dict]:
    """Every combination of a grid such as GRID, as the fields that name a row; shapes are (K, N), tokens are M.

    Raises SparsePruneError as linear_problems, and for a quantized dtype.
    """
    found = linear_problems(shapes, tokens, densities, blocksizes, dtypes, (1,))
    unknown = next((problem["dtype"] for problem in found if problem["dtype"] not in DTYPES), None)
    if unknown is not None:
        raise SparsePruneError("dtypes", f"names among {', '.join(DTYPES)}", unknown, "choose some of these")
    return [{name: value for name, value in problem.items() if name != "threads"} for problem in found]


def bench_gpu(
    rows_of: Sequence[dict],
    timer: Callable[[Candidates], tuple[dict[str, list[float]], dict[str, str]]],
    machine: dict[str, Any],
    keep: Path | None = None,
    on_row: Callable[[dict], None] | None = None,
    device: str = "cuda",
    ours: Sequence[str] = OURS,
) -> list[dict]:
    """One row for each of `problems`, those in the file `keep` of the same machine and versions taken from there.

    A row holds the problem; median microseconds of each candidate ("us"), their quartiles, and how many replays; of the fastest of
    ours ("best") the speed-up over dense, `share` = speedup * density (the part of the ideal 1/density), useful and
    dense-equivalent TFLOP/s and GB/s; "absent": what did not run and why; "wrong": results that were
    not right, which are not timed.
    """

    def measure(problem: dict) -> dict:
        return machine | problem | _measure(problem, timer, device, ours)

    return each_row(rows_of, measure, keep, machine, on_row)


@torch.no_grad()
def _measure(problem: dict, timer: Callable, device: str, ours: Sequence[str]) -> dict:
    m, k, n, block, dtype = (problem[name] for name in ("M", "K", "N", "blocksize", "dtype"))
    generator = torch.Generator().manual_seed(zlib.crc32(json.dumps(problem).encode()))
    mask = random_mask((n, k), block, problem["density"], generator)
    weight = torch.randn(n, k, generator=generator).mul_(k**-0.5)  # [N, K]
    x = torch.randn(m, k, generator=generator).to(device, DTYPES[dtype])  # [M, K]
    packed = BsrWeight.from_dense((weight * expand_mask(mask, block, (n, k))).to(device, DTYPES[dtype]), mask, block)
    dense = packed.to_dense()
    paired = _two_of_four(weight).to(device, DTYPES[dtype])  # [N, K]
    makers: dict[str, Callable] = {"dense": lambda: lambda: F.linear(x, dense)}
    makers |= {name: partial(_ours, x, packed, name) for name in ours}
    makers |= {"torch_bsr": lambda: _torch_bsr(x, packed), "2:4": lambda: _semi_structured(x, paired)}
    exact = {"2:4": x.double() @ paired.double().T}
    exact |= dict.fromkeys(set(makers) - {"2:4"}, x.double() @ dense.double().T)
    candidates, absent, wrong, allowed = {}, {}, {}, 0.0
    for name, make in makers.items():
        try:
            run = make()
            y = run()
        except (
            RuntimeError,
            ValueError,
            NotImplementedError,
            AttributeError,
            ImportError,
            AssertionError,
            KeyError,
        ) as error:
            absent[name] = _first_line(error)
            continue
        off = float((y.double() - exact[name]).norm() / exact[name].norm())
        if name == "dense":
            allowed = 2 * max(off, torch.finfo(DTYPES[dtype]).eps / 4)
        # Another's rounding is not ours to judge.
        if off <= allowed * (1 if name in ours else 4):
            candidates[name] = run
        else:
            wrong[name] = f"error {off:.1e}, allowed {allowed:.1e}"
    spot = torch.zeros(1, device=device)
    times, failed = timer(candidates | {"floor": lambda: spot.zero_()})
    us = {name: statistics.median(values) for name, values in times.items()}
    row: dict[str, Any] = {
        "density": packed.density,
        "us": us,
        "quartiles": {name: statistics.quantiles(v, n=4)[::2] if len(v) > 1 else v * 2 for name, v in times.items()},
        "replays": len(times["floor"]),
        "absent": absent | failed,
        "wrong": wrong,
    }
    running = [name for name in ours if name in us]
    if running and "dense" in us:
        best = min(running, key=us.__getitem__)
        speedup, flops = us["dense"] / us[best], 2 * m * k * n
        moved = packed.nbytes + (m * k + m * n) * x.element_size()
        row |= {
            "best": best,
            "speedup": speedup,
            "share": speedup * packed.density,
            "useful_tflops": flops * packed.density / us[best] / 1e6,
            "dense_equivalent_tflops": flops / us[best] / 1e6,
            "gbytes_per_s": moved / us[best] / 1e3,
        }
    return row


def _ours(x: Tensor, packed: BsrWeight, backend: str) -> Callable[[], Tensor]:
    ops.backend_for(x.device, x.dtype, backend, packed.blocksize)  # raises with the reason
    return lambda: ops.bsr_linear(x, packed, backend=backend)


def _torch_bsr(x: Tensor, packed: BsrWeight) -> Callable[[], Tensor]:
    """y^T = W x^T by torch.sparse._triton_ops. It wants as many tokens as a block has rows: x is padded beforehand."""
    from torch.sparse._triton_ops import bsr_dense_addmm

    if x.device.type != "cuda":
        raise NotImplementedError("runs on CUDA devices only")
    m, rows = x.shape[0], max(16, packed.blocksize[0])
    padded = F.pad(x, (0, 0, 0, -m % rows))  # [M', K]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # BSR is a beta feature, and has no tuned tiles for most devices
        bsr = torch.sparse_bsr_tensor(packed.crow_indices, packed.col_indices, packed.values, packed.shape)
        out = x.new_empty(packed.shape[0], padded.shape[0])  # [N, M']

        def run() -> Tensor:
            return bsr_dense_addmm(out, bsr, padded.t(), beta=0, out=out)[:, :m].t()

        run()
    return run


def _semi_structured(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """x @ weight^T with two of four numbers kept, by cuSPARSELt or CUTLASS, whatever PyTorch takes; x padded to what it accepts."""
    if x.device.type != "cuda":
        raise NotImplementedError("runs on CUDA devices only")
    m = x.shape[0]
    padded = F.pad(x, (0, 0, 0, -m % 16))  # [M', K]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sparse = torch.sparse.to_sparse_semi_structured(weight)
    return lambda: F.linear(padded, sparse)[:m]


def _two_of_four(weight: Tensor) -> Tensor:
    """weight [N, K] with the two smallest of every four inputs zeroed."""
    fours = weight.unflatten(1, (-1, 4))  # [N, K/4, 4]
    smallest = fours.abs().argsort(2)[..., :2]
    return fours.scatter(2, smallest, 0.0).flatten(1)


def break_even(rows: Sequence[dict]) -> list[dict]:
    """For each weight, block, dtype and M the density below which the best of ours is faster than dense, on straight lines."""
    found = []
    key = ("K", "N", "blocksize", "dtype", "M")
    measured = [row for row in rows if "speedup" in row]
    for values, group in itertools.groupby(sorted(measured, key=_by(key)), key=_by(key)):
        by_density = sorted((row["density"], 1 / row["speedup"]) for row in group)
        if len(by_density) < 2:
            continue
        k, n, block, dtype, m = values
        densities, ratios = zip(*by_density, strict=True)
        line = Row("gpu", dtype, tuple(block), m, (n, k), "plain", densities, ratios)
        found.append(
            dict(zip(key, (k, n, list(block), dtype, m), strict=True)) | {"density": round(line.break_even, 4)}
        )
    return found


def _by(key: Sequence[str]) -> Callable[[dict], tuple]:
    return lambda row: tuple(tuple(row[name]) if isinstance(row[name], list) else row[name] for name in key)


def write_results(rows: Sequence[dict], machine: dict[str, Any], folder: str | Path) -> tuple[Path, Path | None]:
    """folder/GPU.json and, where matplotlib is installed, folder/GPU.png."""
    stem = slug(machine["gpu"])
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    own = [{name: value for name, value in row.items() if name not in machine} for row in rows]
    result = folder / f"{stem}.json"
    write_json(result, {"machine": machine, "rows": own, "break_even": break_even(rows)})
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return result, None
    picture = folder / f"{stem}.png"
    with atomic_path(picture) as temporary:
        plot(rows, machine, temporary)
    return result, picture


def plot(rows: Sequence[dict], machine: dict[str, Any], path: str | Path) -> None:
    """Speed-up over dense by M: a row of panels per weight, a column per block, then break-even density; needs matplotlib."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, NullFormatter

    shapes = list(dict.fromkeys((row["K"], row["N"]) for row in rows))
    blocks = list(dict.fromkeys(tuple(row["blocksize"]) for row in rows))
    # The density that was asked for; what a mask reaches differs in the third digit.
    wanted = sorted({round(row["density"], 2) for row in rows})
    colours = dict(zip(wanted, itertools.cycle(["#08306b", "#2f7cc8", "#9ecae1"]), strict=False))
    even = break_even(rows)
    figure = Figure(figsize=(2.6 * (len(blocks) + 1), 2.6 * len(shapes) + 0.8), layout="constrained")
    panels = figure.subplots(len(shapes), len(blocks) + 1, squeeze=False)
    for (k, n), line in zip(shapes, panels, strict=True):
        for block, axis in zip(blocks, line, strict=False):
            own = [row for row in rows if (row["K"], row["N"], *row["blocksize"]) == (k, n, *block)]
            for density in wanted:
                chosen = sorted((r for r in own if round(r["density"], 2) == density), key=lambda row: row["M"])
                curves = {"-": [(r["M"], r["speedup"]) for r in chosen if "speedup" in r]}
                curves["--"] = [
                    (r["M"], r["us"]["dense"] / r["us"]["torch_bsr"]) for r in chosen if "torch_bsr" in r["us"]
                ]
                for dash, points in curves.items():
                    if points:
                        name = f"density {density:g}" if dash == "-" else f"PyTorch BSR, {density:g}"
                        axis.plot(*zip(*points, strict=True), dash, color=colours[density], marker=".", label=name)
            pairs = sorted((r["M"], r["us"]["dense"] / r["us"]["2:4"]) for r in own if "2:4" in r["us"])
            if pairs:
                axis.plot(*zip(*pairs, strict=True), ":", color="0.4", label="2:4 (density 0.5)")
            axis.axhline(1, color="0.6", linewidth=0.8)
            low, high = axis.get_ylim()
            axis.set(xscale="log", yscale="log", title=f"{k} to {n}, {block[0]}x{block[1]}")
            axis.set_yticks([0.1, 0.2, 0.5, 1, 2, 5, 10, 20])
            axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
            axis.yaxis.set_minor_formatter(NullFormatter())
            axis.set_ylim(max(low, 0.05), high)
        for block in blocks:
            points = sorted((e["M"], e["density"]) for e in even if (e["K"], e["N"], *e["blocksize"]) == (k, n, *block))
            if points:
                line[-1].plot(*zip(*points, strict=True), marker=".", label=f"{block[0]}x{block[1]}")
        line[-1].set(xscale="log", ylim=(0, 1.05), title="break-even density")
        for axis in line:
            axis.spines[["top", "right"]].set_visible(False)
            axis.title.set_fontsize(8)
            axis.tick_params(labelsize=7)
        line[0].set_ylabel("times faster than cuBLAS", fontsize=8)
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=7, frameon=False, fontsize=8
    )
    if even:
        panels[0, -1].legend(frameon=False, fontsize=6)
    for axis in panels[-1]:
        axis.set_xlabel("M (tokens)", fontsize=8)
    versions = f"torch {machine['torch']}, sparse-prune {machine['sparse_prune']}"
    figure.suptitle(f"{machine['gpu']}, {rows[0]['dtype']}; {versions}", fontsize=9)
    figure.savefig(path, dpi=130, format="png")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
