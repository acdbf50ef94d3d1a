"""What keeps a sparse layer from 1/density on this machine: its ceilings beside what it reaches.

    python bench/ceilings.py [--shapes 768:3072] [--tokens 128,512] [--density 0.05,0.1,0.2,0.5] [--block 32x32] [--dtype bfloat16]

Microseconds, one thread, medians in turns, so that each finds the caches as another product leaves them:

    dense      the faster of plain and prepacked oneDNN
    sparse     the layer, whose result is checked first
    empty      the same layer without a block: its tiles begin and end, y is bias, rounded and written
    fill       y by `fill_`, the least that writing it takes
    products   the layer's multiply-adds at the rate of registers (`benchmark.limits`)
    read       x and the blocks at the rate of the cache

Shares are dense / time * density, 1 being the ideal 1/density: "share" of the layer; "apart" of products and fill one after the
other, which a kernel that hides nothing of its writing could reach; "hidden" of the longest of products, fill and read, which none
passes.
"""

from __future__ import annotations

import argparse

import torch
from auto import dense_form
from torch import nn

from sparse_prune import SparseLinear, cli
from sparse_prune.benchmark import (
    DTYPES,
    interleaved_medians,
    limits,
    linear_problems,
    machine,
    random_mask,
    thread_count,
)
from sparse_prune.tuning import prepacked_linear


def measure(problem: dict, limit: dict, seconds: float) -> dict[str, float]:
    """Microseconds by name, and the three shares."""
    k, n, m, block, dtype = (problem[name] for name in ("K", "N", "M", "blocksize", "dtype"))
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(k, n).requires_grad_(False)
    mask = random_mask((n, k), block, problem["density"], generator)
    sparse, empty = (SparseLinear.from_dense(linear, kept, block) for kept in (mask, torch.zeros_like(mask)))
    linear = sparse.to_dense().to(DTYPES[dtype])
    x = torch.randn(m, k, generator=generator).to(DTYPES[dtype])
    for layer in (sparse, empty):
        layer.to(DTYPES[dtype]).planned = False
    exact = linear.double()(x.double())
    linear = linear.to(x.dtype)
    assert (sparse(x).double() - exact).norm() <= 4 * torch.finfo(x.dtype).eps * exact.norm(), f"wrong at {problem}"
    forms = ["plain", "prepacked"] if prepacked_linear(linear, x) else ["plain"]
    candidates = {form: dense_form(linear, x, form) for form in forms}
    candidates |= {"sparse": lambda: sparse(x), "empty": lambda: empty(x), "fill": lambda: x.new_empty(m, n).fill_(1)}
    times = {name: seconds * 1e6 for name, seconds in interleaved_medians(candidates, seconds).items()}
    times["dense"] = min(times.pop(form) for form in forms)
    times["products"] = 2 * m * k * n * sparse.density / limit["gflops"] / 1e3
    times["read"] = (sparse.packed.nbytes + x.nbytes) / limit["cached_gbytes_per_s"] / 1e3
    ceilings = {
        "share": times["sparse"],
        "apart": times["products"] + times["fill"],
        "hidden": max(times["products"], times["fill"], times["read"]),
    }
    return times | {name: times["dense"] / time * sparse.density for name, time in ceilings.items()}


def main() -> None:
    """Print one line for each problem."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="768:3072", help="K:N")
    parser.add_argument("--tokens", default="128,512")
    parser.add_argument("--density", default="0.05,0.1,0.2,0.5")
    parser.add_argument("--block", default="32x32")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each point")
    options = parser.parse_args()
    problems = linear_problems(
        [cli.parse_pair(text) for text in options.shapes.split(",")],
        [int(text) for text in options.tokens.split(",")],
        [float(text) for text in options.density.split(",")],
        [cli.parse_block(text) for text in options.block.split(",")],
        options.dtype.split(","),
        [1],
    )
    about = machine()
    print(f"{about['cpu']}, {about['isa']}, torch {about['torch']}, one thread")
    columns = ("dense", "sparse", "empty", "fill", "products", "read", "share", "apart", "hidden")
    print(f"{'':44}", *(f"{name:>8}" for name in columns))
    with thread_count(1), torch.inference_mode():
        for problem in problems:
            limit = limits(DTYPES[problem["dtype"]], 1)
            assert limit is not None
            found = measure(problem, limit, options.seconds)
            block = "x".join(map(str, problem["blocksize"]))
            what = (
                f"{problem['dtype']} {problem['K']} to {problem['N']} {block} M={problem['M']} d={problem['density']}"
            )
            cells = (f"{found[name]:8.2f}" if found[name] < 10 else f"{found[name]:8.0f}" for name in columns)
            print(f"{what:44}", *cells, flush=True)


if __name__ == "__main__":
    main()
