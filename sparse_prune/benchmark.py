"""Sparse against dense and against peers, side by side in one run: `sparse-prune bench linear`.

Every candidate is checked against float64 before it is timed, candidates take turns, and the median over the turns counts. Rows are
plain dicts that go to JSON; a ratio to dense is a ratio to the best dense PyTorch here, plain or with prepacked weights.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import platform
import random
import statistics
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import __version__, backends
from .bsr import BsrWeight
from .errors import SparsePruneError
from .layers import SparseLinear
from .masks import check_blocksize, check_density, expand_mask, grid_shape
from .peers import Peer, PeerError, installed, linear_onnx
from .serialization import atomic_path

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# bench_linear also takes quantized weights (quantize_'s arguments), x in bfloat16, against bfloat16 dense and our bfloat16.
QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "int8": {"dtype": torch.int8},
    "w8a16": {"dtype": torch.int8, "weight_only": True},
    "e4m3": {"dtype": torch.float8_e4m3fn},
}
LINEAR_DTYPES = DTYPES | dict.fromkeys(QUANTIZATIONS, torch.bfloat16)
# Both x and weights are rounded to 1/127 of their row's largest, each about 0.8% of a normal one's size, or to a sixteenth of
# themselves at most, about 2.6%.
QUANTIZED_ERROR = {"int8": 0.03, "w8a16": 0.03, "e4m3": 0.08}
DENSE = ("dense", "dense_prepacked")  # what a ratio to dense takes the faster of


def short(dtype: str) -> str:
    """A dtype as tables have room for it: "bfloat16" is bf16, "float32" fp32, others what they are."""
    return dtype.replace("bfloat", "bf").replace("float", "fp")


def machine() -> dict[str, str | int]:
    """CPU model, best instruction set, threads, and the versions that a number depends on."""
    isa = backends.cpu_isas()[0] if backends.cpu_isas() else "none (plain PyTorch)"
    return {
        "cpu": backends.cpu_name(),
        "isa": isa,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "sparse_prune": __version__,
        "build": backends.cpu_build(),
    }


def check_threads(threads: int | None) -> None:
    """Raise SparsePruneError for a count of threads below 1; None stands for as many as PyTorch uses now."""
    if threads is not None and threads < 1:
        raise SparsePruneError("threads", "a count of at least 1", threads, "leave it out for as many as PyTorch uses")


@contextlib.contextmanager
def thread_count(threads: int | None) -> Iterator[int]:
    """Run with that many PyTorch threads (None: as many as now), then put the old number back.

    Raises SparsePruneError for a count below 1.
    """
    check_threads(threads)
    before = torch.get_num_threads()
    torch.set_num_threads(before if threads is None else threads)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def interleaved_medians(
    candidates: Mapping[str, Callable[[], object]], seconds: float = 1.0, hopeless: float = float("inf")
) -> dict[str, float]:
    """Median seconds of each candidate; they run in turns, 5 to 51 times each, for about `seconds` after two warm-up turns.

    The order changes from turn to turn: what a neighbour leaves in the caches is worth microseconds. A candidate that takes more
    than `hopeless` times the first one's time in the warm-up is not run again, and that time is its result.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    order = random.Random(0)

    def turn(names: list[str]) -> float:
        begin = time.perf_counter()
        for name in order.sample(names, len(names)):
            start = time.perf_counter()
            candidates[name]()
            times[name].append(time.perf_counter() - start)
        return time.perf_counter() - begin

    for _ in range(2):
        turn(list(candidates))
    first = times[next(iter(candidates))][-1]
    running = [name for name in candidates if times[name][-1] <= hopeless * first]
    for name in candidates:
        del times[name][: 2 if name in running else 1]
    spent, count = 0.0, 0
    while count < 5 or (spent < seconds and count < 51):
        spent, count = spent + turn(running), count + 1
    return {name: statistics.median(values) for name, values in times.items()}


def check_seconds(seconds: float) -> float:
    """Return seconds; raises SparsePruneError unless it is a finite number from 0 (the fewest turns) on."""
    if not 0 <= seconds < float("inf"):
        raise SparsePruneError("seconds", "a finite number from 0 on", seconds, "leave it at the default")
    return seconds


def check_block_fits(blocksize: Sequence[int], shape: Sequence[int]) -> None:
    """Raise SparsePruneError for a block (R, C) longer than the weight (N, K) in a direction: what is timed would be padding."""
    if any(block > size for block, size in zip(check_blocksize(blocksize), shape, strict=True)):
        text = "x".join(map(str, blocksize))
        raise SparsePruneError("block", f"at most the weight's {shape[0]}x{shape[1]}", text, "choose a smaller block")


def random_mask(shape: Sequence[int], blocksize: Sequence[int], density: float, generator: torch.Generator) -> Tensor:
    """bool block mask with exactly round(density * blocks) blocks, at least one, placed at random."""
    rows, cols = grid_shape(shape, blocksize)
    keep = max(1, round(check_density(density) * rows * cols))
    mask = torch.zeros(rows * cols, dtype=torch.bool)
    mask[torch.randperm(rows * cols, generator=generator)[:keep]] = True
    return mask.view(rows, cols)


def limits(dtype: torch.dtype, threads: int) -> dict[str, float] | None:
    """This machine's roofline for weights of a dtype: GFLOP/s of multiply-adds on registers, GB/s of reading, by `threads`.

    float16 by AMX's tiles has a quarter of bfloat16's, for it takes four products. int8 without VNNI or AMX has no probe: None.
    Reading is measured over 8 MiB a thread, which a last-level cache holds, and over 256 MiB, which it does not.
    """
    isa, element = backends.cpu_isa(dtype), torch.tensor([], dtype=dtype).element_size()
    if dtype is torch.int8 and isa not in ("avx512_vnni", "amx_int8"):
        return None
    # Where a dtype has no instructions of its own the kernels compute in float32.
    probe = isa if dtype is torch.int8 or isa.endswith("bf16") else backends.cpu_isa(torch.float32)
    products = 4 if dtype is torch.float16 and isa == "amx_bf16" else 1
    flops = backends.together(threads, lambda: backends.peak_flops(probe)) / products
    limit = {"gflops": flops / 1e9}
    for name, size in (("cached", 8 << 20), ("memory", 256 << 20)):
        data = [torch.zeros(size // element, dtype=dtype) for _ in range(threads)]
        limit[f"{name}_gbytes_per_s"] = backends.together(threads, partial(_read_one, data)) / 1e9
    return limit


def _read_one(data: list[Tensor]) -> float:
    return backends.read_bytes_per_second(data.pop())


def _bound_seconds(limit: dict, flops: float, moved: int) -> float:
    """The least time for that work under the roofline: the products or the bytes, whichever takes longer."""
    read = limit["cached_gbytes_per_s" if moved <= 8 << 20 else "memory_gbytes_per_s"]
    return max(flops / limit["gflops"], moved / read) / 1e9


def _peers(x: Tensor, linear: nn.Linear, packed: BsrWeight) -> dict[str, Callable[[], object]]:
    """What else computes x @ W^T + b here, by name; one that cannot run for this dtype or machine is absent."""
    weight, bias = linear.weight, linear.bias
    peers: dict[str, Callable[[], object]] = {"dense": lambda: F.linear(x, weight, bias)}

    def add(name: str, make: Callable[[], Callable[[], object]]) -> None:
        try:
            run = make()
            run()
        except (RuntimeError, NotImplementedError, AttributeError, ImportError, TypeError):
            return
        peers[name] = run

    def prepacked():
        reordered = torch.ops.mkldnn._reorder_linear_weight(weight, x.shape[0])
        return lambda: torch.ops.mkldnn._linear_pointwise(x, reordered, bias, "none", [], "")

    def torch_bsr():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # BSR is a beta feature, which is beside the point here
            sparse = torch.sparse_bsr_tensor(packed.crow_indices, packed.col_indices, packed.values, packed.shape)
        return lambda: F.linear(x, sparse, bias)

    def scipy_bsr():
        from scipy.sparse import bsr_matrix

        arrays = packed.values.numpy(), packed.col_indices.numpy(), packed.crow_indices.numpy()
        rows, cols = grid_shape(packed.shape, packed.blocksize)
        sparse = bsr_matrix(arrays, shape=(rows * packed.blocksize[0], cols * packed.blocksize[1]))
        if sparse.shape != packed.shape:
            raise NotImplementedError("scipy wants whole blocks")
        columns, add_bias = x.numpy().T, bias.numpy()
        return lambda: (sparse @ columns).T + add_bias

    add("dense_prepacked", prepacked)
    if x.dtype is torch.float32:
        add("torch_bsr", torch_bsr)
        add("scipy_bsr", scipy_bsr)
    return peers


def _relative_error(got: object, exact: Tensor) -> float:
    return float((torch.as_tensor(got).double() - exact).norm() / exact.norm())


@contextlib.contextmanager
def engines(folder: str | Path | None) -> Iterator[list[Peer]]:
    """The engines that `make peers` has installed under folder (None: none), running inside the block.

    Raises SparsePruneError for one that does not start, and without onnx, which hands them the layers.
    """
    with contextlib.ExitStack() as opened:
        found: list[Peer] = []
        for name, python in installed(folder).items():
            require_onnx()
            try:
                found.append(opened.enter_context(Peer(name, python)))
            except (PeerError, OSError) as error:
                expected = f"an engine that starts under {folder}"
                raise SparsePruneError("peers", expected, f"{name}: {error}", "make peers") from None
        yield found


def require_onnx() -> None:
    """Raise SparsePruneError where the package onnx is not installed."""
    if importlib.util.find_spec("onnx") is None:
        raise SparsePruneError("peers", "the package onnx, which hands them the model", "none", "pip install onnx")


GRIDS: dict[str, dict[str, Any]] = {
    "small": {
        "shapes": ((768, 3072),),
        "tokens": (1, 16, 128, 512),
        "densities": (0.05, 0.2, 0.5, 0.8, 1.0),
        "blocksizes": ((32, 32),),
        "dtypes": ("float32", "bfloat16", "int8"),
        "threads": (1,),
    },
    "full": {
        "shapes": ((384, 1536), (768, 768), (768, 3072), (3072, 768), (4096, 4096)),
        "tokens": (1, 16, 128, 512, 2048),
        "densities": (0.05, 0.1, 0.2, 0.5, 0.8, 1.0),
        "blocksizes": ((16, 16), (32, 32), (64, 64), (64, 16), (128, 16)),
        "dtypes": ("float32", "bfloat16", "int8"),
        "threads": (1, 2),
    },
}


def linear_problems(
    shapes: Iterable[tuple[int, int]],
    tokens: Iterable[int],
    densities: Iterable[float],
    blocksizes: Iterable[tuple[int, int]],
    dtypes: Iterable[str],
    threads: Iterable[int],
) -> list[dict]:
    """Every combination of a grid (see GRIDS), as the fields that name a row of bench_linear; shapes are (K, N), tokens are M.

    Raises SparsePruneError for an unknown dtype, a density outside (0, 1], a number that is not positive or a block larger than a
    weight.
    """
    problems = []
    for (k, n), dtype, block, thread, m, density in itertools.product(
        shapes, dtypes, blocksizes, threads, tokens, densities
    ):
        if dtype not in LINEAR_DTYPES:
            raise SparsePruneError("dtypes", f"names among {', '.join(LINEAR_DTYPES)}", dtype, "choose some of these")
        check_density(density)
        if min(k, n, m, thread) < 1:
            raise SparsePruneError(
                "grid", "positive sizes, M and thread counts", (k, n, m, thread), "leave it at the default"
            )
        check_block_fits(block, (n, k))
        fields = {"K": k, "N": n, "M": m, "blocksize": list(block), "density": density}
        problems.append(fields | {"dtype": dtype, "threads": thread})
    return problems


def bench_linear(
    problems: Sequence[dict],
    seconds: float = 1.0,
    keep: str | Path | None = None,
    on_row: Callable[[dict], None] | None = None,
    peers: Sequence[Peer] = (),
) -> list[dict]:
    """Time y[M, N] = x[M, K] @ W[N, K]^T + b for each of linear_problems, one row each.

    seconds is spent on each row; keep is a file of JSON lines to which rows are added as they are finished and from which rows of
    the same machine, versions and build are taken in place of measuring them again; on_row is called with each row; peers are
    timed too, each in its own process right after, and compared with the sparse kernel run by itself ("sparse_alone").

    A row holds the problem, `machine()`, median microseconds of every candidate ("us"), and for the sparse kernel: useful and
    dense-equivalent GFLOP/s, GB/s of x, y, blocks and indices, `speedup` over the best dense, `share` = speedup * density, the part
    of the ideal 1/density that is reached, and `roofline`, the part of what `limits` allow. `auto` says what SparseLinear runs
    here by itself and `auto_speedup` how fast.

    Raises SparsePruneError for seconds below 0, ArithmeticError if the result of any candidate is wrong.
    """
    check_seconds(seconds)
    about = machine() | {"engines": {engine.runtime: engine.version for engine in peers}}
    roofs: dict[tuple, dict | None] = {}

    def measure(problem: dict) -> dict:
        roof = (problem["dtype"], problem["threads"])
        by_kernel = backends.cpu_isas() and roof[0] not in ("w8a16", "e4m3")  # no kernels of their own
        if by_kernel and roof not in roofs:
            roofs[roof] = limits(getattr(torch, roof[0]), roof[1])
        return {"kind": "linear", **about, **problem, **_time_linear(problem, seconds, roofs.get(roof), peers)}

    return each_row(problems, measure, keep, about, on_row)


def each_row(
    problems: Sequence[dict],
    measure: Callable[[dict], dict],
    keep: str | Path | None,
    about: dict,
    on_row: Callable[[dict], None] | None,
) -> list[dict]:
    """measure(problem) of each, or what the file `keep` has of it from the machine and versions that about names.

    Rows are added to keep (None: nowhere) as they are finished; on_row is called with each.
    """
    kept, rows = {} if keep is None else _kept_rows(Path(keep), about), []
    for problem in problems:
        row = kept.get(json.dumps(problem))
        if row is None:
            row = measure(problem)
            if keep is not None:
                with open(keep, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"problem": problem, "row": row}) + "\n")
        rows.append(row)
        if on_row is not None:
            on_row(row)
    return rows


def _kept_rows(path: Path, about: dict) -> dict[str, dict]:
    found: dict[str, dict] = {}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # a line that was being written when the run was stopped
        row = entry["row"]
        if all(row.get(name) == value for name, value in about.items() if name != "threads"):
            found[json.dumps(entry["problem"])] = row
    if text and not text.endswith("\n"):
        with atomic_path(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in text.splitlines()[:-1]), encoding="utf-8")
    return found


@torch.no_grad()
def _time_linear(problem: dict, seconds: float, limit: dict | None, engines: Sequence[Peer]) -> dict:
    k, n, m, blocksize = (problem[name] for name in ("K", "N", "M", "blocksize"))
    dtype = LINEAR_DTYPES[problem["dtype"]]
    generator = torch.Generator().manual_seed(zlib.crc32(json.dumps(problem).encode()))
    mask = random_mask((n, k), blocksize, problem["density"], generator)
    x = torch.randn(m, k, generator=generator).to(dtype)
    linear = nn.Linear(k, n).eval()
    for parameter, bound in ((linear.weight, k**-0.5), (linear.bias, k**-0.5)):
        parameter.uniform_(-bound, bound, generator=generator)
    linear.weight.mul_(expand_mask(mask, blocksize, (n, k)))
    linear = linear.to(dtype).requires_grad_(False)
    kernel = SparseLinear.from_dense(linear, mask, blocksize)
    kernel.planned = False
    quantized = QUANTIZATIONS.get(problem["dtype"])
    if quantized:
        kernel.quantize_(**quantized)
    peers = _peers(x, linear, kernel.packed.dequantize(dtype))
    candidates = {"sparse": lambda: kernel(x)} | {name: peers.pop(name) for name in DENSE if name in peers}
    auto = SparseLinear.from_dense(linear, mask, blocksize)
    if quantized:
        unquantized = SparseLinear.from_dense(linear, mask, blocksize)
        unquantized.planned = False
        candidates["sparse_bf16"] = lambda: unquantized(x)
        auto.quantize_(**quantized)
    runs = auto.backend_for(m)
    if runs.startswith("dense"):
        candidates["auto"] = lambda: auto(x)
    exact = F.linear(x.double(), linear.weight.double(), linear.bias.double())
    errors = {name: _relative_error(run(), exact) for name, run in (candidates | peers).items()}
    allowed = 2 * max(errors["dense"], torch.finfo(dtype).eps / 4)
    for name, error in errors.items():
        limit_here = allowed if name in candidates else 4 * allowed  # another's rounding is not ours to judge
        if quantized and name in ("sparse", "auto"):
            limit_here = QUANTIZED_ERROR[problem["dtype"]]
        if not error <= limit_here:
            text = (
                f"{name} is wrong at M={m} K={k} N={n} {problem['dtype']}: error {error:.1e}, allowed {limit_here:.1e}"
            )
            raise ArithmeticError(text)
    with thread_count(problem["threads"]):
        medians = interleaved_medians(candidates, seconds)
        if peers:
            # Apart: a peer that sweeps the caches with its temporaries would be timed in the numbers of those that come after it.
            medians = interleaved_medians({"sparse": candidates["sparse"], **peers}, seconds / 4, hopeless=50) | medians
        if engines:
            # As an engine runs in its process: nothing between two calls that would sweep the caches.
            medians["sparse_alone"] = interleaved_medians({"sparse": candidates["sparse"]}, seconds / 2)["sparse"]
    timed, failed = _time_engines(engines, problem, linear, x, exact, 4 * allowed, seconds / 2)
    medians |= timed
    best_dense = min(medians[name] for name in DENSE if name in medians)
    sparse, density = medians["sparse"], kernel.density
    moved = kernel.packed.nbytes + (x.numel() + m * n) * x.element_size()
    row = {
        "density": density,
        "us": {name: value * 1e6 for name, value in medians.items()},
        "useful_gflops": 2 * m * k * n * density / sparse / 1e9,
        "dense_equivalent_gflops": 2 * m * k * n / sparse / 1e9,
        "gbytes_per_s": moved / sparse / 1e9,
        "speedup": best_dense / sparse,
        "share": best_dense / sparse * density,
        "auto": runs,
        "auto_speedup": best_dense / medians.get("auto", sparse),
        "error": errors["sparse"],
        "dense_error": errors["dense"],
    }
    if failed:
        row["failed"] = failed
    if limit is not None:
        row |= {"limits": limit, "roofline": _bound_seconds(limit, 2 * m * k * n * density, moved) / sparse}
    return row


def _time_engines(
    engines: Sequence[Peer],
    problem: dict,
    linear: nn.Linear,
    x: Tensor,
    exact: Tensor,
    allowed: float,
    seconds: float,
) -> tuple[dict[str, float], dict[str, str]]:
    """Median seconds of each engine that can run the layer, and why the others cannot; their weights and inputs are float32,
    whatever they compute in."""
    found: dict[str, float] = {}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "linear.onnx"
        if engines:
            linear_onnx(linear.weight.float().numpy(), linear.bias.float().numpy(), len(x), model)
        for engine in engines:
            try:
                engine.load(model, {"x": x.float().numpy()}, problem["dtype"], problem["threads"])
                engine.run()
                error = _relative_error(engine.outputs()[0], exact)
                if not error <= allowed:
                    name = engine.runtime
                    raise ArithmeticError(f"{name} is wrong at {problem}: error {error:.1e}, allowed {allowed:.1e}")
                found[engine.runtime] = engine.time(seconds)
            except PeerError as reason:
                failed[engine.runtime] = str(reason)
    return found, failed


def plot_linear(rows: Sequence[dict], path: str | Path) -> None:
    """Draw speed-up and share of the roofline over density, one column per dtype; needs matplotlib.

    The rows of the first weight and thread count are drawn, a line per M (colour) and block size (dashes), and the 1/density ideal.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, NullFormatter, NullLocator

    first = rows[0]
    rows = [row for row in rows if all(row[name] == first[name] for name in ("K", "N", "threads"))]
    dtypes = sorted({row["dtype"] for row in rows}, key=list(LINEAR_DTYPES).index)
    tokens, densities = (sorted({row[name] for row in rows}) for name in ("M", "density"))
    blocks = sorted({tuple(row["blocksize"]) for row in rows})
    colours = ["#c6dbef", "#9ecae1", "#6baed6", "#2f7cc8", "#08306b"][-len(tokens) :]  # darker: more tokens
    dashes = ["-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1))]
    figure = Figure(figsize=(1.2 + 4.4 * len(dtypes), 7.4), layout="constrained")
    axes = figure.subplots(2, len(dtypes), squeeze=False, sharex=True, sharey="row")
    for column, dtype in enumerate(dtypes):
        above, below = axes[:, column]
        ticks = [0.05, 0.1, 0.2, 0.5, 0.8, 1.0] if len(densities) > 1 else densities
        line = [densities[0] * (densities[-1] / densities[0]) ** (step / 50) for step in range(51)]
        above.plot(line, [1 / density for density in line], color="0.6", linewidth=1, label="ideal, 1/density")
        for axis in (above, below):
            axis.axhline(1, color="0.6", linewidth=0.8)
        for m, colour in zip(tokens, colours, strict=True):
            for block, dash in zip(blocks, itertools.cycle(dashes), strict=False):
                chosen = [r for r in rows if (r["dtype"], r["M"], tuple(r["blocksize"])) == (dtype, m, block)]
                chosen.sort(key=lambda row: row["density"])
                style = {"color": colour, "linestyle": dash, "marker": "o", "markersize": 3.5}
                name = f"M = {m}" + (f", {block[0]}x{block[1]}" if len(blocks) > 1 else "")
                above.plot([r["density"] for r in chosen], [r["speedup"] for r in chosen], label=name, **style)
                roof = [(r["density"], r["roofline"]) for r in chosen if "roofline" in r]
                if roof:
                    below.plot(*zip(*roof, strict=True), **style)
        above.set(xscale="log", yscale="log", title=dtype)
        above.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        above.yaxis.set_minor_formatter(NullFormatter())
        above.set_yticks([0.5, 1, 2, 5, 10, 20])
        above.set_ylim(0.6, 24)
        below.set(xlabel="density of blocks", ylim=(0, 1.1))
        below.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        below.xaxis.set_minor_locator(NullLocator())
        below.set_xticks([tick for tick in ticks if densities[0] * 0.99 <= tick <= densities[-1] * 1.01] or densities)
        for axis in (above, below):
            axis.spines[["top", "right"]].set_visible(False)
    axes[0, -1].legend(frameon=False, fontsize=8)
    axes[0, 0].set_ylabel("times faster than the best dense PyTorch")
    axes[1, 0].set_ylabel("share of the roofline")
    versions = f"torch {first['torch']}, sparse-prune {first['sparse_prune']}"
    size = "" if len(blocks) > 1 else f", {blocks[0][0]}x{blocks[0][1]} blocks"
    title = (
        f"{first['K']} to {first['N']}{size}, {first['threads']} thread(s); {first['cpu']}, {first['isa']}; {versions}"
    )
    figure.suptitle(title, fontsize=9)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format=Path(path).suffix.removeprefix(".") or "png")
