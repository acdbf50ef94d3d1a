"""attention and layer_norm, every instruction set in turn, against a float64 reference."""

from __future__ import annotations

import pytest
import torch
from cpu_isas import each_kernel, needs_kernels
from test_cpu_kernels import assert_close

from sparse_prune import backends, ops, reference
from sparse_prune.benchmark import thread_count

sparse = torch.ops.sparse_prune
# B, T, heads, d: one token, odd lengths and sizes, a cut block of queries, more than one strip of keys, no rows at all.
SHAPES = [(1, 1, 1, 5), (3, 7, 2, 32), (2, 128, 2, 64), (2, 200, 3, 33), (1, 25, 1, 80), (0, 4, 2, 8), (2, 0, 2, 8)]


def operands(shape, dtype, mask):
    """q, k, v as views of one buffer whose gaps are NaN, and masks: per key, per query, or of one head."""
    batch, length, heads, size = shape
    buffer = torch.full((batch, length, 3, heads, size + 1), torch.nan, dtype=dtype)
    qkv = buffer[..., :size]
    qkv.copy_(torch.randn(qkv.shape))
    bias = torch.randn(1, heads, length, length).to(dtype) if "bias" in mask else None
    keep = None
    if "keys" in mask:
        keep = torch.rand(batch, 1, 1, length) > 0.4
    elif "queries" in mask:
        keep = torch.rand(1, heads, length, length) > 0.4
    if keep is not None and length:
        keep[..., 0] = True
    return (*qkv.unbind(2), size**-0.5, bias, keep)


def in_double(arguments):
    return [a.double() if torch.is_tensor(a) and a.is_floating_point() else a for a in arguments]


@needs_kernels
@each_kernel()
@pytest.mark.parametrize("mask", ["none", "bias", "keys", "bias queries"])
def test_attention_matches_float64(isa, dtype, mask):
    with backends.force_isa(isa):
        for shape in SHAPES:
            arguments = operands(shape, dtype, mask)
            exact, theirs = reference.attention(*in_double(arguments)), reference.attention(*arguments)
            assert_close(sparse.attention(*arguments), exact, theirs)


@needs_kernels
@each_kernel(torch.float32)
def test_attention_without_a_key_and_with_huge_scores(isa, dtype):
    q, k, v = torch.randn(3, 2, 9, 2, 16, dtype=dtype).unbind(0)
    keep = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    keep[1] = False
    with backends.force_isa(isa):
        got = ops.attention(q, k, v, keep=keep)
        torch.testing.assert_close(got[1], v[1].mean(0).expand(9, 2, 16), msg="no key: the mean of all")
        huge = ops.attention(1e4 * q, 1e4 * k, v)
        assert huge.isfinite().all()
        one = torch.softmax(1e8 * torch.einsum("bqhd,bkhd->bhqk", q, k) / 4, -1)
        torch.testing.assert_close(huge, torch.einsum("bhqk,bkhd->bqhd", one, v))
        assert ops.attention(q, k.masked_fill(k == k[0, 0, 0, 0], torch.nan), v)[0, :, 0].isnan().all()


@needs_kernels
@each_kernel()
@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm_matches_float64(isa, dtype, affine):
    with backends.force_isa(isa):
        for rows, width in ((1, 1), (5, 7), (3, 33), (130, 256), (0, 8), (4, 1024)):
            x = torch.full((rows, width + 3), torch.nan, dtype=dtype)[:, :width]
            x.copy_(5 + torch.randn(rows, width))  # [M, H], a mean that is not small
            weight, bias = (torch.randn(width).to(dtype) for _ in range(2)) if affine else (None, None)
            for residual in (None, torch.randn(rows, width).to(dtype)):
                arguments = (x, weight, bias, 1e-5, residual)
                exact = reference.layer_norm(*in_double(arguments))
                assert_close(sparse.layer_norm(*arguments), exact, reference.layer_norm(*arguments).contiguous())


@needs_kernels
def test_double_runs_too():
    arguments = operands((2, 17, 2, 9), torch.float64, "bias keys")
    torch.testing.assert_close(sparse.attention(*arguments), reference.attention(*arguments))


@needs_kernels
@each_kernel(torch.float32, torch.bfloat16)
def test_threads_do_not_change_a_bit(isa, dtype):
    arguments = operands((1, 200, 2, 64), dtype, "bias keys")
    x = torch.randn(300, 1024, dtype=dtype)
    with backends.force_isa(isa):
        results = []
        for threads in (1, 2, 3, 7):
            with thread_count(threads):
                results.append((sparse.attention(*arguments), sparse.layer_norm(x, None, None, 1e-5, None)))
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(results[0], result, strict=True))


def test_opcheck():
    arguments = operands((2, 5, 2, 8), torch.float32, "bias keys")
    torch.library.opcheck(sparse.attention.default, arguments)
    x = torch.randn(4, 6)
    torch.library.opcheck(sparse.layer_norm.default, (x, torch.randn(6), torch.randn(6), 1e-5, torch.randn(4, 6)))


def test_gradients_take_pytorch():
    q, k, v, _, bias, keep = operands((2, 5, 2, 8), torch.float64, "bias keys")
    q, k, v, bias = (t.clone().requires_grad_() for t in (q, k, v, bias))
    assert torch.autograd.gradcheck(lambda *args: ops.attention(*args, keep), (q, k, v, bias))
    x, weight = torch.randn(3, 2, 6).double().requires_grad_(), torch.randn(6).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: ops.layer_norm(x, w, residual=x * x), (x, weight))


@needs_kernels
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (1, 3, 2, 8)}, r"k: expected shape \[2, 5, 2, 8\]"),
        ({"bias": (2, 2, 5, 4)}, r"bias: expected a shape that broadcasts to \[2, 2, 5, 5\]"),
        ({"keep": (2, 1, 1, 5)}, "keep: expected a bool CPU tensor, got Float"),
    ],
    ids=str,
)
def test_a_wrong_operand_is_refused(change, message):
    values = dict(zip("qkv", torch.randn(3, 2, 5, 2, 8).unbind(0), strict=True)) | {
        "scale": 1.0,
        "bias": None,
        "keep": None,
    }
    values |= {name: torch.randn(shape) for name, shape in change.items()}
    with pytest.raises(RuntimeError, match=message):
        sparse.attention(*values.values())
