"""How often `auto` is slower than dense: python bench/auto.py [--points 60] [--threads 1,2] [--seconds 0.4] [--seed 0]

Each point is a layer drawn at random: M, K, N, block, density, dtype and threads. Three layers then run in turns, in an order drawn
anew for each turn: the faster of nn.Linear and oneDNN's product with a reordered weight, a copy of it with a weight of its own, and
SparseLinear, which lets the planner choose. What the copy loses to its twin is what this machine's clock cannot tell apart; auto
should miss no more often. Results are compared before they are timed.
"""

from __future__ import annotations

import argparse
import copy
import random
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from sparse_prune import SparseLinear
from sparse_prune.benchmark import DTYPES, interleaved_medians, machine, random_mask, thread_count
from sparse_prune.tuning import prepacked_linear

TOKENS = (1, 2, 5, 8, 16, 33, 64, 128, 200, 512, 1000)
WIDTHS = (256, 384, 512, 768, 1024, 1536, 2304, 3072)
BLOCKS = ((4, 4), (8, 8), (16, 16), (32, 32), (64, 64), (64, 16), (16, 32))
LIMIT = 1.02


def draw(seed: int, threads: list[int]) -> dict:
    """A problem; equal seeds give equal problems."""
    pick = random.Random(seed)
    return {
        "M": pick.choice(TOKENS),
        "K": pick.choice(WIDTHS),
        "N": pick.choice(WIDTHS),
        "block": pick.choice(BLOCKS),
        "density": round(pick.uniform(0.05, 1), 2),
        "dtype": pick.choice(("float32", "bfloat16")),
        "threads": pick.choice(threads),
    }


class Prepacked(nn.Module):
    """A linear layer by oneDNN's product with a reordered weight, called like the other two."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.reordered, self.bias = torch.ops.mkldnn._reorder_linear_weight(linear.weight), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x [M, K] -> [M, N]."""
        return torch.ops.mkldnn._linear_pointwise(x, self.reordered, self.bias, "none", [], "")


def dense_form(linear: nn.Linear, x: Tensor, form: str) -> Callable[[], Tensor]:
    """linear(x) in that form, on a weight of its own."""
    own = copy.deepcopy(linear)
    return partial(Prepacked(own) if form == "prepacked" else own, x)


def measure(problem: dict, seed: int, seconds: float) -> dict:
    """{"form": the faster dense one, "runs": what auto runs, "noise" and "auto": times of copy and SparseLinear over dense}."""
    generator = torch.Generator().manual_seed(seed)
    k, n, block = problem["K"], problem["N"], problem["block"]
    linear = nn.Linear(k, n).requires_grad_(False)
    layer = SparseLinear.from_dense(linear, random_mask((n, k), block, problem["density"], generator), block)
    layer, linear = layer.to(DTYPES[problem["dtype"]]).eval(), layer.to_dense().to(DTYPES[problem["dtype"]]).eval()
    x = torch.randn(problem["M"], k, generator=generator).to(DTYPES[problem["dtype"]])
    with thread_count(problem["threads"]), torch.inference_mode():
        exact = linear.double()(x.double())
        linear = linear.to(x.dtype)
        assert (layer(x).double() - exact).norm() <= 1e-2 * exact.norm(), f"wrong result at {problem}"
        forms = ["plain", "prepacked"] if prepacked_linear(linear, x) else ["plain"]
        tried = interleaved_medians({form: dense_form(linear, x, form) for form in forms}, seconds / 4)
        form = min(tried, key=tried.__getitem__)
        candidates = {
            "dense": dense_form(linear, x, form),
            "copy": dense_form(linear, x, form),
            "auto": partial(layer, x),
        }
        turns = [interleaved_medians(candidates, seconds / 3) for _ in range(3)]
    times = {name: sorted(turn[name] for turn in turns)[1] for name in candidates}
    runs = layer.backend_for(problem["M"]).partition(":")[0]
    return {"form": form, "runs": runs, "us": times["dense"] * 1e6} | {
        key: times[name] / times["dense"] for key, name in (("noise", "copy"), ("auto", "auto"))
    }


def main() -> None:
    """Print each point that auto loses, and the shares of points lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=60)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--seconds", type=float, default=0.4, help="for each point")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--all", action="store_true", help="print every point")
    options = parser.parse_args()
    about = machine()
    print(f"{about['cpu']}, {about['isa']}, torch {about['torch']}, seed {options.seed}, {options.points} points")
    threads = [int(count) for count in options.threads.split(",")]
    found = []
    for seed in range(options.seed, options.seed + options.points):
        problem = draw(seed, threads)
        result = measure(problem, seed, options.seconds)
        found.append(result)
        if options.all or result["auto"] > LIMIT:
            fields = " ".join(f"{key}={value}" for key, value in problem.items())
            print(
                f"{fields}: auto {result['auto']:.3f} of {result['form']} ({result['us']:.0f} us), copy "
                f"{result['noise']:.3f}, runs {result['runs']}",
                flush=True,
            )
    for name in ("auto", "noise"):
        ratios = sorted(result[name] for result in found)
        missed = sum(ratio > LIMIT for ratio in ratios)
        print(
            f"{name}: {missed} of {len(ratios)} over {LIMIT}, median {ratios[len(ratios) // 2]:.3f}, worst {ratios[-1]:.3f}"
        )


if __name__ == "__main__":
    main()
