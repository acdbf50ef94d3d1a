"""Sparse against dense and against peers, side by side in one run: `sparse-prune bench linear` and `bench model`.

Every candidate is checked against float64 before it is timed, candidates take turns, and the median over the turns counts. Rows are
plain dicts that go to JSON; a ratio to dense is a ratio to the best dense PyTorch here, plain or with prepacked weights.
"""

from __future__ import annotations

import contextlib
import copy
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import __version__, backends
from .bsr import BsrWeight
from .errors import SparsePruneError
from .layers import SparseLinear
from .masks import check_density, expand_mask, grid_shape

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def machine() -> dict[str, str | int]:
    """CPU model, best instruction set, threads, and the versions that a number depends on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    isa = backends.cpu_isas()[0] if backends.cpu_isas() else "none (plain PyTorch)"
    return {
        "cpu": cpu,
        "isa": isa,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "sparse_prune": __version__,
    }


@contextlib.contextmanager
def thread_count(threads: int | None) -> Iterator[int]:
    """Run with that many PyTorch threads (None: as many as now), then put the old number back."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def interleaved_medians(candidates: dict[str, Callable[[], object]], seconds: float = 1.0) -> dict[str, float]:
    """Median seconds of each candidate; they run in turn, 5 to 51 times each, for about `seconds` after two warm-up turns."""
    for _ in range(2):
        start = time.perf_counter()
        for run in candidates.values():
            run()
        turn = time.perf_counter() - start
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(min(51, max(5, round(seconds / turn)))):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def random_mask(shape: Sequence[int], blocksize: Sequence[int], density: float, generator: torch.Generator) -> Tensor:
    """bool block mask with exactly round(density * blocks) blocks, at least one, placed at random."""
    rows, cols = grid_shape(shape, blocksize)
    keep = max(1, round(check_density(density) * rows * cols))
    mask = torch.zeros(rows * cols, dtype=torch.bool)
    mask[torch.randperm(rows * cols, generator=generator)[:keep]] = True
    return mask.view(rows, cols)


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


@torch.no_grad()
def bench_linear(
    shapes: Iterable[tuple[int, int]] = ((768, 3072),),
    tokens: Iterable[int] = (1, 16, 128, 512),
    densities: Iterable[float] = (0.1, 0.2, 0.5, 1.0),
    blocksizes: Iterable[tuple[int, int]] = ((32, 32),),
    dtypes: Iterable[str] = ("float32", "bfloat16"),
    threads: Iterable[int | None] = (1,),
    seconds: float = 1.0,
    on_row: Callable[[dict], None] | None = None,
) -> list[dict]:
    """Time y[M, N] = x[M, K] @ W[N, K]^T + b for every combination, one row each.

    shapes are (K, N), tokens are M, seconds is spent on each row, on_row is called with each row as it is finished. A row holds the
    problem, the thread count, `machine()`, median microseconds of every candidate ("us"), and for the sparse layer: useful and
    dense-equivalent GFLOP/s, GB/s of x, y, blocks and indices, `speedup` over the best dense, and `share` = speedup * density,
    the part of the ideal 1/density that is reached.

    Raises SparsePruneError for an unknown dtype or a density outside (0, 1], ArithmeticError if the sparse result is wrong.
    """
    unknown = [name for name in dtypes if name not in DTYPES]
    if unknown:
        raise SparsePruneError("dtypes", f"names among {', '.join(DTYPES)}", unknown[0], "choose some of these")
    generator = torch.Generator().manual_seed(0)
    grid = [
        (k, n, m, density, blocksize, dtype, thread)
        for k, n in shapes
        for dtype in dtypes
        for blocksize in blocksizes
        for thread in threads
        for m in tokens
        for density in densities
    ]
    about, rows = machine(), []
    for k, n, m, density, blocksize, dtype_name, thread in grid:
        dtype = DTYPES[dtype_name]
        mask = random_mask((n, k), blocksize, density, generator)
        x = torch.randn(m, k, generator=generator).to(dtype)
        linear = nn.Linear(k, n).eval()
        linear.weight.mul_(expand_mask(mask, blocksize, (n, k)))
        linear = linear.to(dtype).requires_grad_(False)
        layer = SparseLinear.from_dense(linear, mask, blocksize)
        exact = F.linear(x.double(), linear.weight.double(), linear.bias.double())
        error, dense_error = (
            _relative_error(layer(x), exact),
            _relative_error(F.linear(x, linear.weight, linear.bias), exact),
        )
        if not error <= 2 * max(dense_error, torch.finfo(dtype).eps / 4):
            raise ArithmeticError(
                f"sparse result for M={m} K={k} N={n} {dtype_name}: error {error:.1e}, dense {dense_error:.1e}"
            )
        with thread_count(thread) as used:
            candidates = {"sparse": lambda layer=layer, x=x: layer(x), **_peers(x, linear, layer.packed)}
            medians = interleaved_medians(candidates, seconds)
        sparse = medians["sparse"]
        best_dense = min(medians[name] for name in ("dense", "dense_prepacked") if name in medians)
        moved = layer.packed.nbytes + (x.numel() + m * n) * x.element_size()
        rows.append(
            {
                "kind": "linear",
                **about,
                **{"M": m, "K": k, "N": n, "blocksize": list(blocksize), "density": layer.density, "dtype": dtype_name},
                "threads": used,
                "us": {name: seconds * 1e6 for name, seconds in medians.items()},
                "useful_gflops": 2 * m * k * n * layer.density / sparse / 1e9,
                "dense_equivalent_gflops": 2 * m * k * n / sparse / 1e9,
                "gbytes_per_s": moved / sparse / 1e9,
                "speedup": best_dense / sparse,
                "share": best_dense / sparse * layer.density,
                "error": error,
                "dense_error": dense_error,
            }
        )
        if on_row is not None:
            on_row(rows[-1])
    return rows


def token_inputs(model: nn.Module) -> Callable[[int, int], dict[str, Tensor]]:
    """(batch, length) -> random input_ids and a full attention_mask for a Hugging Face encoder."""
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if vocabulary is None:
        raise SparsePruneError(
            "inputs", "a function (batch, length) -> keyword arguments", "none", "model has no vocab_size"
        )
    generator = torch.Generator().manual_seed(0)

    def make(batch: int, length: int) -> dict[str, Tensor]:
        ids = torch.randint(vocabulary, (batch, length), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return make


@torch.no_grad()
def bench_model(
    dense_model: nn.Module,
    sparse_model: nn.Module,
    inputs: Callable[[int, int], dict[str, Tensor]] | None = None,
    batches: Iterable[int] = (1, 16),
    lengths: Iterable[int] = (64, 128),
    dtypes: Iterable[str] = ("float32", "bfloat16"),
    threads: int | None = None,
    seconds: float = 3.0,
    on_row: Callable[[dict], None] | None = None,
) -> list[dict]:
    """Latency and throughput of a whole model, dense and sparse, one row per batch, length and dtype.

    inputs(batch, length) gives the keyword arguments of a forward call; the default serves Hugging Face models with token inputs.
    Both models are copied, set to eval and converted to the dtype. A row holds median milliseconds of each, sequences per second,
    their ratio as `speedup`, and `machine()`.

    Raises SparsePruneError for an unknown dtype or unknown inputs, ArithmeticError for an output that is not finite.
    """
    inputs = inputs or token_inputs(dense_model)
    about, rows = machine(), []
    for dtype_name in dtypes:
        if dtype_name not in DTYPES:
            raise SparsePruneError("dtypes", f"names among {', '.join(DTYPES)}", dtype_name, "choose some of these")
        dense, sparse = (copy.deepcopy(model).eval().to(DTYPES[dtype_name]) for model in (dense_model, sparse_model))
        for batch in batches:
            for length in lengths:
                arguments = inputs(batch, length)
                for name, model in (("dense", dense), ("sparse", sparse)):
                    if not all(torch.isfinite(t).all() for t in _tensors(model(**arguments)) if t.is_floating_point()):
                        raise ArithmeticError(
                            f"the {name} model's output at batch {batch}, length {length} is not finite"
                        )
                with thread_count(threads) as used, torch.inference_mode():
                    medians = interleaved_medians(
                        {
                            "dense": lambda dense=dense, arguments=arguments: dense(**arguments),
                            "sparse": lambda sparse=sparse, arguments=arguments: sparse(**arguments),
                        },
                        seconds,
                    )
                rows.append(
                    {
                        "kind": "model",
                        **about,
                        **{"batch": batch, "length": length, "dtype": dtype_name, "threads": used},
                        "dense_ms": medians["dense"] * 1e3,
                        "sparse_ms": medians["sparse"] * 1e3,
                        "dense_per_s": batch / medians["dense"],
                        "sparse_per_s": batch / medians["sparse"],
                        "speedup": medians["dense"] / medians["sparse"],
                    }
                )
                if on_row is not None:
                    on_row(rows[-1])
    return rows


def _tensors(output: object) -> Iterator[Tensor]:
    """The tensors in a model's output: a tensor, a sequence, or a mapping such as Hugging Face's ModelOutput."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (list, tuple)):
        for item in output:
            yield from _tensors(item)
    elif hasattr(output, "values"):
        for item in output.values():
            yield from _tensors(item)


def plot_linear(rows: Sequence[dict], path: str | Path) -> None:
    """Draw speedup over density, one panel per dtype, one line per M and blocksize, with the 1/density ideal; needs matplotlib."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, NullFormatter

    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure = Figure(figsize=(5.2 * len(dtypes), 4.2), layout="constrained")
    for axes, dtype in zip(figure.subplots(1, len(dtypes), squeeze=False)[0], dtypes, strict=True):
        chosen = [row for row in rows if row["dtype"] == dtype]
        densities = sorted({row["density"] for row in chosen})
        axes.plot(densities, [1 / d for d in densities], "--", color="0.6", label="ideal, 1/density")
        for m, block in dict.fromkeys((row["M"], tuple(row["blocksize"])) for row in chosen):
            line = sorted((r["density"], r["speedup"]) for r in chosen if (r["M"], tuple(r["blocksize"])) == (m, block))
            axes.plot(*zip(*line, strict=True), marker="o", markersize=3.5, label=f"M = {m}, {block[0]}x{block[1]}")
        axes.axhline(1, color="0.85", linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel="density of blocks", title=dtype)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FormatStrFormatter("%g"))
            axis.set_minor_formatter(NullFormatter())
        axes.set_xticks(densities)
        axes.set_yticks([1, 2, 4, 8, 16])
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.axes[0].set_ylabel("times faster than the best dense PyTorch")
    first = rows[0]
    figure.suptitle(
        f"{first['K']} to {first['N']}, {first['threads']} thread(s), {first['cpu']}, {first['isa']}", fontsize=9
    )
    figure.savefig(path, dpi=150)
