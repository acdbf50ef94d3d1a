"""What a call costs beside its product: SparseLinear, the bare operator and nn.Linear on a small weight.

    python bench/call_overhead.py

Microseconds of one thread, medians of calls in turns: warm (twenty calls in a row), and cold, each call after 64 MiB of other data
went through the caches, which is how a layer of a large model finds the code that calls it. The last row is what the layer adds.
"""

from __future__ import annotations

import statistics
import time

import torch
from rich.console import Console
from rich.table import Table

import sparse_prune as sp
from sparse_prune import planner
from sparse_prune.benchmark import machine, thread_count

SIZE, ROUNDS, ROW = 64, 200, 20


def measure(layer: sp.SparseLinear, linear: torch.nn.Linear) -> dict[str, tuple[float, float]]:
    """Candidate -> (warm, cold) microseconds, under the gradient mode in force."""
    x, evict = torch.randn(1, SIZE), torch.zeros(64 << 20, dtype=torch.uint8)
    torch.testing.assert_close(layer(x), layer.to_dense()(x))
    arguments = layer.crow_indices, layer.col_indices, layer.values, sp.ops.prepack(layer.values, layer.crow_indices)
    operator = torch.ops.sparse_prune.bsr_linear
    candidates = {
        "SparseLinear": lambda: layer(x),
        "the operator": lambda: operator(x, *arguments, SIZE, layer.bias, "none", None),
        "nn.Linear": lambda: linear(x),
    }
    times = {name: ([], []) for name in candidates}
    for _ in range(ROUNDS):
        for name, call in candidates.items():
            start = time.perf_counter_ns()
            for _ in range(ROW):
                call()
            times[name][0].append((time.perf_counter_ns() - start) / ROW / 1e3)
    for _ in range(ROUNDS):
        for name, call in candidates.items():
            evict.add_(1)
            start = time.perf_counter_ns()
            call()
            times[name][1].append((time.perf_counter_ns() - start) / 1e3)
    return {name: (statistics.median(warm), statistics.median(cold)) for name, (warm, cold) in times.items()}


def main() -> None:
    """Print the table."""
    about = machine()
    table = Table("microseconds a call", "no_grad, warm", "cold", "inference_mode, warm", "cold")
    with thread_count(1), planner.using_table("off"):
        linear = torch.nn.Linear(SIZE, SIZE).requires_grad_(False)
        layer = sp.SparseLinear.from_dense(linear, torch.eye(2, dtype=torch.bool)).eval()
        with torch.no_grad():
            plain = measure(layer, linear)
        with torch.inference_mode():
            inference = measure(layer, linear)
    rows = {name: (*plain[name], *inference[name]) for name in plain}
    rows["SparseLinear - operator"] = [
        layer - bare for layer, bare in zip(rows["SparseLinear"], rows["the operator"], strict=True)
    ]
    for name, row in rows.items():
        table.add_row(name, *(f"{value:.1f}" for value in row))
    Console().print(f"{about['cpu']}, {about['isa']}, torch {about['torch']}, one thread", table, sep="\n")


if __name__ == "__main__":
    main()
