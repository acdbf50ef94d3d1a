"""Triton kernels that test_ptx_emulator.py runs: a pipelined matrix product, one through tensor maps, reductions."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def matmul(a, b, c, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """c[M, N] = a[M, K] @ b[N, K]^T for any M and N."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32 if a.dtype.element_ty == tl.int8 else tl.float32)
    for start in range(0, K, BLOCK_K):
        x = tl.load(a + m[:, None] * K + (start + k)[None, :], mask=m[:, None] < M)
        y = tl.load(b + n[None, :] * K + (start + k)[:, None], mask=n[None, :] < N)
        acc = tl.dot(x, y, acc, out_dtype=acc.dtype)
    tl.store(c + m[:, None] * N + n[None, :], acc.to(c.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit
def matmul_tma(a, b, c, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """The same through tensor descriptors."""
    m, n = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        acc = tl.dot(a.load([m, start]), b.load([n, start]).T, acc)
    c.store([m, n], acc.to(tl.bfloat16))


@triton.jit
def matmul_persistent(a, b, c, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """The same with descriptors made on the device, tiles one after another, and a warp that only loads."""
    x = tl.make_tensor_descriptor(a, [M, K], [K, 1], [BLOCK_M, BLOCK_K])
    y = tl.make_tensor_descriptor(b, [N, K], [K, 1], [BLOCK_N, BLOCK_K])
    z = tl.make_tensor_descriptor(c, [M, N], [N, 1], [BLOCK_M, BLOCK_N])
    tiles_n = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * tiles_n, tl.num_programs(0), flatten=False):
        m, n = tile // tiles_n * BLOCK_M, tile % tiles_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, tl.cdiv(K, BLOCK_K), warp_specialize=True):
            acc = tl.dot(x.load([m, k * BLOCK_K]), y.load([n, k * BLOCK_K]).T, acc)
        z.store([m, n], acc.to(tl.bfloat16))


@triton.jit
def softmax_and_sums(x, y, sums, N, BLOCK: tl.constexpr):
    """y[r] = softmax(x[r]) over N numbers; sums[n] += y[r, n]."""
    row, n = tl.program_id(0), tl.arange(0, BLOCK)
    v = tl.load(x + row * N + n, mask=n < N, other=-float("inf"))
    e = tl.exp(v - tl.max(v, 0))
    p = e / tl.sum(e, 0)
    tl.store(y + row * N + n, p, mask=n < N)
    tl.atomic_add(sums + n, p, mask=n < N)


def compiled(
    kernel, signature: dict[str, str], constants: dict[str, int], capability: int, warps: int = 4, stages: int = 3
):
    """The kernel for sm_`capability`, pointers and sizes multiples of 16: its PTX, and its metadata (shared)."""
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        signature={name: signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in signature},
    )
    made = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": stages}
    )
    return made.asm["ptx"], made.metadata.shared
