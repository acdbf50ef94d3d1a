"""Gate and up of a gated MLP in one call against two calls and a multiply, of the same sparse layers.

    python bench/glu.py [--hidden 768] [--inner 3072] [--density 0.2]

Medians in turns, one thread, microseconds; results are compared first.
"""

from __future__ import annotations

import argparse

import torch
from torch.nn import functional as F

import sparse_prune as sp
from sparse_prune import planner
from sparse_prune.benchmark import LINEAR_DTYPES, interleaved_medians, machine, random_mask, thread_count


def main() -> None:
    """Print one line for each dtype and M."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--inner", type=int, default=3072)
    parser.add_argument("--density", type=float, default=0.2)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    about = machine()
    print(f"{about['cpu']}, {about['isa']}, torch {about['torch']}, one thread")
    with thread_count(1), planner.using_table("off"), torch.inference_mode():
        for name in ("float32", "bfloat16", "int8"):  # of int8 blocks x and y are bfloat16
            dtype, layers = LINEAR_DTYPES[name], []
            for _ in range(2):
                with torch.inference_mode(False):
                    linear = torch.nn.Linear(options.hidden, options.inner, dtype=dtype)
                    mask = random_mask(tuple(linear.weight.shape), (32, 32), options.density, generator)
                    layer = sp.SparseLinear.from_dense(linear, mask).requires_grad_(False)
                    layers.append(layer.quantize_() if name == "int8" else layer)
            gate, up = layers
            for tokens in (1, 16, 128, 512):
                x = torch.randn(tokens, options.hidden, dtype=dtype)

                def separate(x=x, gate=gate, up=up):
                    return gate(x, "silu") * up(x)

                def one_call(x=x, gate=gate, up=up):
                    return sp.fused_glu(gate, up, x)

                def plain(x=x, gate=gate, up=up):
                    return F.silu(gate(x)) * up(x)

                torch.testing.assert_close(one_call(), separate())
                times = interleaved_medians({"plain": plain, "separate": separate, "one call": one_call}, 2)
                print(f"{name:<8} M = {tokens:<4}", *(f"{key} {value * 1e6:7.0f}" for key, value in times.items()))


if __name__ == "__main__":
    main()
