"""Attention that learns: PyTorch's one CPU kernel for it against its parts, by length, in bf16 and float32.

    python bench/short_attention.py [--heads 12] [--head-dim 32] [--tokens 1280] [--lengths 16,40,64,128,256,512] [--threads N]

Forward and backward of scaled_dot_product_attention with a padding mask, some --tokens tokens in texts of each length. Medians in
turns, milliseconds; gradients are compared first. `integrations.trainer.SHORT` follows from it.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from sparse_prune.benchmark import interleaved_medians, machine, thread_count

WAYS = {"one kernel": SDPBackend.FLASH_ATTENTION, "parts": SDPBackend.MATH}


def gradients(way: str, inputs: tuple[Tensor, ...], mask: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """Those of q, k and v; each [B, heads, T, d]."""
    with sdpa_kernel(WAYS[way]):
        y = scaled_dot_product_attention(*inputs, attn_mask=mask)
    return torch.autograd.grad(y, inputs, dy)


def main() -> None:
    """Print one line for each dtype and length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=1280)
    parser.add_argument("--lengths", default="16,40,64,128,256,512")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    about = machine()
    print(f"{about['cpu']}, {about['isa']}, torch {about['torch']}, threads: {options.threads}")
    with thread_count(options.threads):
        for dtype in (torch.bfloat16, torch.float32):
            for length in map(int, options.lengths.split(",")):
                rows = max(1, options.tokens // length)
                shape = (rows, length, options.heads, options.head_dim)
                q, k, v, dy = (torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for _ in range(4))
                inputs = tuple(tensor.requires_grad_() for tensor in (q, k, v))
                mask = torch.arange(length) < torch.randint(1, length + 1, (rows, 1, 1, 1), generator=generator)
                calls = {way: partial(gradients, way, inputs, mask, dy) for way in WAYS}
                for one, parts in zip(*(call() for call in calls.values()), strict=True):
                    torch.testing.assert_close(
                        one.float(), parts.float(), rtol=0, atol=2**-5 * float(parts.abs().max())
                    )
                times = interleaved_medians(calls, 2)
                told = "  ".join(f"{way} {1e3 * seconds:6.1f}" for way, seconds in times.items())
                print(f"{dtype!s:<15} {rows:>3} x {length:<4} {told}", flush=True)


if __name__ == "__main__":
    main()
