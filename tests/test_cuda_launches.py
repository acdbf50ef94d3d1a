"""csrc/cuda_ops.cpp and the launchers of csrc/cuda on CPU tensors: what they launch is executed by the emulator, without a GPU."""

from __future__ import annotations

import cuda_kernels
import cuda_launches
import ptx_emulator
import pytest
import torch
from triton_problems import assert_as_good_as_torch, exact_and_dense, exact_and_reference_int8, make_problem

from sparse_prune import reference

pytestmark = pytest.mark.skipif(cuda_kernels.unavailable() is not None, reason=str(cuda_kernels.unavailable()))
BF16, F16 = torch.bfloat16, torch.float16
OPS = torch.ops.sparse_prune_launches


def linear(
    problem, dtype=BF16, extras=(True, True), given=lambda x: x, major=8, ops="sparse_prune_launches", **options
):
    """y of cuda_linear or cuda_linear_sm90 for x = given(x), checked against float64; what was launched."""
    from sparse_prune_kernels import cuda, cuda_sm90

    packed, x, bias, residual = make_problem(*problem, dtype)
    x = given(x)
    bias, residual = (tensor if used else None for tensor, used in zip((bias, residual), extras, strict=True))
    (n, k), (r, c) = packed.shape, packed.blocksize
    index = (packed.crow_indices, packed.col_indices)
    sizes: tuple = (packed.nnzb, r, c, n)
    if major == 9:
        layout = cuda_sm90.make_layout(*index, k, r, c)
        sizes += (layout.plan.cluster, layout.plan.groups, layout.plan.lines)
    else:
        layout = cuda.make_layout(*index, -(-k // c), r, c)
        sizes = (layout.work, *sizes)
    weight = layout.pack(packed.values)
    inputs = [tensor for tensor in (x, weight, bias, residual) if tensor is not None]
    with cuda_launches.recording(*inputs, major=major, **options) as recorder:
        run = OPS.cuda_linear_sm90 if major == 9 else OPS.cuda_linear
        y = run(x, weight, *sizes, bias, "gelu", residual)
    exact, dense = exact_and_dense(x, packed.to_dense(), bias, "gelu", residual)
    assert_as_good_as_torch(y, exact, dense)
    return y, x, recorder.launches


# (M, N, K, R, C, density), multiprocessors, and the kernel that such a GPU runs
WIDE = [
    ((130, 300, 504, 16, 16, 0.4), 108, "bsr_linear_sm80_bf16_16x16_128"),
    ((300, 300, 500, 32, 16, 0.4), 108, "bsr_linear_sm80_bf16_32x16_128"),
    ((130, 300, 512, 32, 32, 0.4), 108, "bsr_linear_sm80_bf16_32x32_128"),
    ((130, 100, 512, 64, 64, 0.4), 108, "bsr_linear_sm80_bf16_64x16_128"),
    ((256, 300, 200, 128, 64, 0.5), 1, "bsr_linear_sm80_bf16_64x32_256"),
    ((770, 300, 200, 32, 32, 0.5), 2, "bsr_linear_sm80_bf16_32x32_256"),  # tiles of two heights
    ((7, 300, 500, 32, 32, 0.4), 108, "bsr_linear_skinny_bf16_16_1"),
    ((40, 300, 500, 64, 16, 0.4), 108, "bsr_linear_skinny_bf16_64_2"),
    ((9, 64, 64, 32, 32, 0.0), 108, "bsr_linear_skinny_bf16_16_1"),
]


@pytest.mark.parametrize("case", WIDE, ids=str)
def test_products(case):
    problem, sms, kernel = case
    _, _, launches = linear(problem, sms=sms)
    assert [name for name, _ in launches] == [kernel]
    linear(problem, F16, (False, False), sms=sms)


@pytest.mark.parametrize("m", [1, 140])
@pytest.mark.parametrize("block", [(32, 32), (64, 16)], ids=str)
def test_products_on_hopper(block, m):
    for dtype, name in cuda_kernels.NAMES.items():
        _, _, launches = linear((m, 300, 504, *block, 0.4), dtype, major=9, sms=8)
        assert len(launches) == 1 and launches[0][0].startswith(f"bsr_linear_{'sm90' if m > 64 else 'skinny'}_{name}")


GIVEN = {
    "rows apart, in place": (lambda x: cuda_kernels.aligned(x, 16), True),
    "one column further, copied": (
        lambda x: torch.nn.functional.pad(x, (1, -(x.shape[1] + 1) % 8))[:, 1 : x.shape[1] + 1],
        False,
    ),
    "rows at odd places, copied": (lambda x: torch.nn.functional.pad(x, (0, 3))[:, :-3], False),
    "columns apart, copied": (lambda x: x.T.contiguous().T, False),
    "every row the same, copied": (lambda x: x[:1].expand(len(x), -1), False),
}


@pytest.mark.parametrize("which", GIVEN)
@pytest.mark.parametrize("major", [8, 9])
def test_x_anywhere(which, major):
    """x whose rows begin at multiples of 16 bytes is read where it lies, other x copied."""
    given, in_place = GIVEN[which]
    for m in (7, 140):
        _, x, launches = linear((m, 64, 104, 32, 32, 0.5), given=given, major=major)
        (_, arguments), first = launches[0], 1 if major == 9 and m > 64 else 0
        assert (arguments[first].data_ptr() == x.data_ptr()) == in_place


def test_no_tokens_launch_nothing():
    y, _, launches = linear((0, 64, 96, 32, 32, 0.5), extras=(True, False))
    assert y.shape == (0, 64) and launches == []


@pytest.mark.parametrize("of", cuda_kernels.KINDS, ids=str)
@pytest.mark.parametrize("m", [7, 140])
def test_weights_of_8_bits(of, m):
    from sparse_prune_kernels import cuda

    for dtype, x_scale in ((BF16, None), (F16, 0.02)):
        packed, x, bias, residual = make_problem(m, 100, 300, 32, 64, 0.5, dtype)
        packed = packed.to(torch.float32).quantize(of)
        index, (r, c) = (packed.crow_indices, packed.col_indices), packed.blocksize
        weight = cuda.make_layout(*index, -(-300 // c), r, c // 2, most_row=cuda.ROW_8).pack(
            packed.values.view(torch.int16)
        )
        kind = cuda_kernels.KINDS[of]
        run = getattr(OPS, f"cuda_linear_{kind}")
        with cuda_launches.recording(x, weight, packed.scales, bias, residual) as recorder:
            y = run(x, weight, packed.scales, packed.nnzb, r, c, 100, bias, "silu", residual, x_scale)
        assert_as_good_as_torch(y, *exact_and_reference_int8(x, packed, bias, "silu", residual, x_scale))
        names = [name for name, _ in recorder.launches]
        assert len(names) == 2 and names[0].startswith(f"quantize_rows_{kind}") and f"_{kind}_" in names[1]


def sdd(m, sms):
    from sparse_prune_kernels import cuda

    packed, x, _, dy = make_problem(m, 130, 200, 64, 16, 0.5, BF16)
    index, (r, c) = (packed.crow_indices, packed.col_indices), packed.blocksize
    jobs = cuda.make_jobs(*index, -(-200 // c), r, c)
    with cuda_launches.recording(dy, x, jobs, sms=sms) as recorder:
        dvalues = OPS.cuda_sdd(dy, x, jobs, packed.nnzb, r, c)
    exact = reference.bsr_sdd(dy.double(), x.double(), *index, r, c)
    assert_as_good_as_torch(dvalues, exact, reference.bsr_sdd(dy, x, *index, r, c))
    return [name for name, _ in recorder.launches]


def test_gradient_of_the_weights():
    assert (
        sdd(300, 1) == ["bsr_sdd_bf16_2"]
        and sdd(530, 108) == ["bsr_sdd_bf16_2", "sum_parts_bf16"]
        and sdd(0, 108) == []
    )


def test_errors_in_words():
    from sparse_prune_kernels import cuda

    packed, x, bias, _ = make_problem(20, 64, 96, 32, 32, 0.5, BF16)
    layout = cuda.make_layout(packed.crow_indices, packed.col_indices, 3, 32, 32)
    weight = layout.pack(packed.values)
    right = {"x": x, "packed": weight, "work": layout.work, "nnzb": packed.nnzb}
    right |= {"block_rows": 32, "block_cols": 32, "out_features": 64}
    right |= {"bias": bias, "activation": "none", "residual": None}
    wrong = {
        "x: expected dtype bfloat16 or float16, got Float": {"x": x.float(), "bias": None},
        "x: expected a matrix, got shape": {"x": x[0]},
        "block_rows, block_cols: expected 16, 32, 64 or 128, got 8 and 32": {"block_rows": 8},
        "packed: expected the layout of this weight, at least": {"packed": weight[:1024].clone()},
        r"work: expected int32 \[1\] on the CPU, got shape \[2\]": {"work": torch.zeros(2, dtype=torch.int32)},
        "work: expected int32": {"work": layout.work.long()},
        "packed: expected contiguous bytes": {"packed": weight.view(torch.int16)},
        "bias: expected dtype BFloat16 like x, got Half": {"bias": bias.half()},
        "bias: expected shape": {"bias": bias[1:]},
        "residual: expected shape": {"residual": x},
        "activation": {"activation": "tanh"},
    }
    with cuda_launches.recording(x, weight, bias) as recorder:
        for message, change in wrong.items():
            with pytest.raises(RuntimeError, match=message):
                OPS.cuda_linear(**(right | change))
    assert recorder.launches == []
    for error, words in ((719, "unspecified launch failure"), (1, "another error")):
        failed = pytest.raises(RuntimeError, match=f"cuda_linear: the launch failed: {words}")
        with cuda_launches.recording(x, weight, bias, error=error) as recorder, failed:
            OPS.cuda_linear(**right)
        assert len(recorder.launches) == 1


@pytest.mark.parametrize("bug", cuda_launches.BUGS)
def test_planted_bugs_are_caught(bug):
    with pytest.raises((AssertionError, ptx_emulator.EmulationError)):
        major = 9 if "sm90" in cuda_launches.BUGS[bug][0] else 8
        m, sms = (770, 2) if bug == "rows of tokens exchanged" else (130, 108)
        given = GIVEN["one column further, copied"][0]
        linear((m, 300, 500, 32, 32, 0.4), given=given, major=major, sms=sms, bug=bug)
