"""A training step of one sparse layer, forward and backward for x, weight and bias, against nn.Linear's.

    python bench/training_step.py [--inputs 768] [--outputs 3072] [--density 0.2]

Medians in turns, one thread, milliseconds; gradients are compared first.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from torch import Tensor, nn

import sparse_prune as sp
from sparse_prune.benchmark import DTYPES, interleaved_medians, machine, random_mask, thread_count


def main() -> None:
    """Print one line for each dtype and M."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=768)
    parser.add_argument("--outputs", type=int, default=3072)
    parser.add_argument("--density", type=float, default=0.2)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    about = machine()
    print(f"{about['cpu']}, {about['isa']}, torch {about['torch']}, one thread")
    with thread_count(1):
        for name in ("float32", "bfloat16"):
            linear = nn.Linear(options.inputs, options.outputs, dtype=DTYPES[name])
            mask = random_mask(tuple(linear.weight.shape), (32, 32), options.density, generator)
            sparse = sp.SparseLinear.from_dense(linear, mask)
            with torch.no_grad():
                linear.weight.copy_(sparse.packed.to_dense())
            for tokens in (512, 2048):
                x = torch.randn(tokens, options.inputs, dtype=DTYPES[name], requires_grad=True)
                dy = torch.randn(tokens, options.outputs, dtype=DTYPES[name])

                def step(layer: nn.Module, x=x, dy=dy) -> tuple[Tensor, ...]:
                    return torch.autograd.grad(layer(x), (x, *layer.parameters()), dy)

                of_x, of_weight, of_bias = step(linear)
                wanted = (of_x, sp.BsrWeight.from_dense(of_weight, mask).values, of_bias)
                for got, want in zip(step(sparse), wanted, strict=True):
                    allowed = 4 * torch.finfo(DTYPES[name]).eps * want.double().norm()
                    assert (got.double() - want.double()).norm() <= allowed
                times = interleaved_medians({"dense": partial(step, linear), "sparse": partial(step, sparse)}, 4)
                gain = times["dense"] / times["sparse"]
                shown = (f"{key} {value * 1e3:6.1f}" for key, value in times.items())
                print(f"{name:<8} M = {tokens:<4}", *shown, f"{gain:.1f}x")


if __name__ == "__main__":
    main()
