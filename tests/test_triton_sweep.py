"""The Triton kernels against float64: on the GPU where there is one, else in Triton's interpreter.

The interpreter has to be chosen before Triton is imported, so test_triton_kernels.py runs this file in a process of its own.
"""

from __future__ import annotations

import functools
import gc
import os

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not installed")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU and TRITON_INTERPRET is not 1: test_triton_kernels.py runs this file", allow_module_level=True)

from sparse_prune_kernels import launch, plan, support
from sparse_prune_kernels.config import LinearConfig
from triton_problems import ACTIVATIONS, DTYPES, PROBLEMS, SIDES, arrays, assert_as_good_as_torch, make_problem

from sparse_prune import reference

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
make = functools.partial(make_problem, device=DEVICE)


def check_linear(packed, x, bias, residual, activation, config=None):
    weight, act = packed.to_dense(), reference.ACTIVATIONS[activation]
    exact = act(F.linear(x.double(), weight.double(), None if bias is None else bias.double()))
    dense = act(F.linear(x, weight, bias))
    if residual is not None:
        exact, dense = exact + residual.double(), dense + residual
    got = launch.bsr_linear(x, *arrays(packed), packed.shape[0], bias, activation, residual, config)
    assert_as_good_as_torch(got, exact, dense)


def check_gradients(packed, x, dy):
    n, k = packed.shape
    weight = packed.to_dense()
    got = launch.bsr_linear_dx(dy, *arrays(packed), k)
    assert_as_good_as_torch(got, dy.double() @ weight.double(), dy @ weight)
    crow, col, values = arrays(packed)
    got = launch.bsr_sdd(dy, x, crow, col, *values.shape[1:])
    exact, dense = (
        reference.bsr_sdd(a, b, crow, col, *values.shape[1:]) for a, b in ((dy.double(), x.double()), (dy, x))
    )
    assert_as_good_as_torch(got, exact, dense)


def test_the_expected_kernels_run():
    assert (DEVICE == "cpu") is launch.INTERPRETED


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_forward_and_gradients(problem, dtype):
    packed, x, bias, residual = make(*problem, dtype)
    check_linear(packed, x, bias, residual, "gelu")
    check_linear(packed, x, None, None, "none")
    check_gradients(packed, x, residual)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogues(activation, dtype):
    packed, x, bias, residual = make(7, 45, 70, 16, 32, 0.5, dtype)
    for b, r in ((bias, residual), (bias, None), (None, residual), (None, None)):
        check_linear(packed, x, b, r, activation)
    check_linear(packed, 100 * x, bias, residual, activation)  # where exponentials overflow


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_x_of_any_stride(dtype):
    packed, x, bias, residual = make(24, 45, 70, 16, 32, 0.5, dtype)
    nan = torch.full_like(x, torch.nan)
    wide = torch.cat([nan[:, :3], x, nan], 1)[:, 3:73]  # misaligned rows with NaN on both sides
    for view in (wide, x.t().contiguous().t(), x[:1].expand(24, 70)):
        check_linear(packed, view, bias, residual, "silu")
        check_gradients(packed, view, residual)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_is_not_hidden(activation):
    packed, x, bias, _ = make(20, 64, 64, 32, 32, 1.0, torch.float32)
    x[3, 5] = torch.nan
    y = launch.bsr_linear(x, *arrays(packed), 64, bias, activation)
    assert y[3].isnan().all() and not y[4:].isnan().any() and not y[:3].isnan().any()


def test_registered_operators_run_the_kernels(monkeypatch):
    """What the CUDA dispatch key gets, called with the operators' own arguments; None of the fallbacks may run."""
    implementations = {}

    class Library:
        def impl(self, name, function, key):
            implementations[name] = function

    monkeypatch.setattr(support, "unavailable", lambda device, dtype, blocksize: None)
    support.register(Library(), {})
    packed, x, bias, residual = make(7, 45, 70, 16, 32, 0.5, torch.float32)
    crow, col, values = arrays(packed)
    y = implementations["bsr_linear"](x, crow, col, values, None, 45, bias, "relu", residual)
    torch.testing.assert_close(y, F.relu(F.linear(x, packed.to_dense(), bias)) + residual)
    dx = implementations["bsr_linear_dx"](residual, crow, col, values, 70)
    torch.testing.assert_close(dx, residual @ packed.to_dense())
    dvalues = implementations["bsr_sdd"](residual, x, crow, col, 16, 32)
    torch.testing.assert_close(dvalues, reference.bsr_sdd(residual, x, crow, col, 16, 32))


# Every way through the kernel, whatever linear_config would choose here.
TILINGS = [
    (merge, block_m, split, swap)
    for merge, block_m, split in ((1, 16, 1), (2, 64, 1), (4, 16, 3), (8, 32, 2), (8, 256, 1), (2, 512, 1))
    for swap in (False, True)
]


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_every_tiling(tiling):
    merge, block_m, split, swap = tiling
    packed, x, bias, residual = make(37, 9 * 16 - 5, 150, 16, 32, 0.4, torch.bfloat16)
    config = LinearConfig(merge, block_m, 32, 8, split, swap, 4, 2)
    check_linear(packed, x, bias, residual, "silu", config)
    check_linear(packed, x, None, None, "none", config)
    dx = launch.bsr_linear_dx(
        residual, *arrays(packed), 150, LinearConfig(merge // 2 or 1, block_m, 16, 8, split, swap, 4, 2)
    )
    weight = packed.to_dense()
    assert_as_good_as_torch(dx, residual.double() @ weight.double(), residual @ weight)


def test_split_inputs_add_up_in_one_order():
    packed, x, *_ = make(5, 64, 640, 32, 32, 0.7, torch.float16)
    config = LinearConfig(2, 16, 32, 1, 4, True, 4, 2)
    first, second = (launch.bsr_linear(x, *arrays(packed), 64, config=config) for _ in range(2))
    assert torch.equal(first, second)


def test_plans_are_kept_until_the_index_changes(monkeypatch):
    made = []
    monkeypatch.setattr(launch, "make_plans", lambda *a: (made.append(None), plan.make_plans(*a))[1])
    packed, x, *_ = make(3, 64, 64, 32, 32, 1.0, torch.float32)
    for _ in range(2):
        launch.bsr_linear(x, *arrays(packed), 64)
    assert len(made) == 1
    launch.bsr_linear_dx(x, *arrays(packed), 64)
    assert len(made) == 2
    packed.col_indices.copy_(packed.col_indices.clone())
    launch.bsr_linear(x, *arrays(packed), 64)
    assert len(made) == 3
    kept = len(launch._plans)
    del packed
    gc.collect()
    assert len(launch._plans) < kept


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(bias=torch.zeros(45, dtype=torch.float64)), "bias: expected torch.float32 like x, got torch.float64"),
        (dict(activation="tanh"), "activation: expected one of none, relu, gelu, gelu_tanh, silu, got 'tanh'"),
        (dict(out_features=99), "crow_indices: expected 8 entries, got (4,)"),
        (dict(values=torch.zeros(1, 16, 32, device="meta")), "values: expected cpu like x, got meta"),
    ],
)
def test_arguments_that_disagree(change, message):
    packed, x, bias, _ = make(7, 45, 70, 16, 32, 0.5, torch.float32)
    crow, col, values = (t.cpu() for t in arrays(packed))
    arguments = dict(x=x.cpu(), crow_indices=crow, col_indices=col, values=values, out_features=45, bias=bias.cpu())
    with pytest.raises(ValueError) as error:
        launch.bsr_linear(**(arguments | change))
    assert message in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("c", SIDES)
@pytest.mark.parametrize("r", SIDES)
def test_every_blocksize(r, c, dtype):
    for m in (1, 17, 65):
        packed, x, bias, residual = make(m, 2 * r + 5, 3 * c - 3, r, c, 0.6, dtype)
        check_linear(packed, x, bias, residual, "gelu_tanh")
        check_gradients(packed, x, residual)
