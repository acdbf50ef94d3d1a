from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_prune import BsrWeight, SparsePruneError
from sparse_prune.bsr import check_finite, sound_indices, validate_bsr
from sparse_prune.masks import expand_mask, grid_shape

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def packed_weight(shape=(48, 70), blocksize=(16, 32), dtype=torch.float32, density=0.5):
    mask = torch.rand(grid_shape(shape, blocksize)) < density
    return BsrWeight.from_dense(torch.randn(shape, dtype=dtype), mask, blocksize)


@given(
    st.tuples(st.integers(1, 50), st.integers(1, 50)),
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.sampled_from(DTYPES),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.integers(0, 2**31),
)
def test_round_trip_is_exact(shape, blocksize, dtype, density, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(grid_shape(shape, blocksize), generator=generator) < density
    weight = torch.randn(shape, generator=generator).to(dtype)
    packed = BsrWeight.from_dense(weight, mask, blocksize).validate()
    expected = torch.where(expand_mask(mask, blocksize, shape), weight, torch.zeros((), dtype=dtype))
    assert torch.equal(packed.to_dense(), expected)
    assert torch.equal(packed.block_mask(), mask)
    assert packed.nnzb == mask.sum()
    assert packed.density == pytest.approx(expand_mask(mask, blocksize, shape).double().mean().item())
    again = BsrWeight.from_dense(packed.to_dense(), mask, blocksize)
    assert torch.equal(again.values, packed.values)


def test_agrees_with_torch_bsr():
    mask = torch.rand(4, 3) < 0.5
    weight = torch.randn(64, 96)
    packed = BsrWeight.from_dense(weight, mask, (16, 32))
    theirs = torch.where(expand_mask(mask, (16, 32), (64, 96)), weight, 0.0).to_sparse_bsr((16, 32))
    assert torch.equal(packed.crow_indices, theirs.crow_indices().int())
    assert torch.equal(packed.col_indices, theirs.col_indices().int())
    assert torch.equal(packed.values, theirs.values())


def test_bytes_count_values_and_indices():
    packed = packed_weight((64, 64), (32, 32), torch.bfloat16, density=2)
    assert packed.nbytes == 64 * 64 * 2 + (3 + 4) * 4


def test_weights_too_small_for_a_scale_round_to_zero():
    packed = BsrWeight.from_dense(torch.full((4, 4), 1e-50, dtype=torch.float64), torch.ones(1, 1).bool(), (4, 4))
    assert not packed.quantize().to_dense().any()


def test_to_casts_values_only():
    packed = packed_weight().to(torch.bfloat16)
    assert packed.values.dtype == torch.bfloat16 and packed.crow_indices.dtype == torch.int32


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(bad):
    weight = torch.zeros(32, 32)
    weight[3, 4] = bad
    with pytest.raises(SparsePruneError, match="weight: expected finite numbers, got NaN or infinity"):
        BsrWeight.from_dense(weight, torch.ones(1, 1, dtype=torch.bool), (32, 32))


@pytest.mark.parametrize("weight", [torch.zeros(4), torch.zeros(4, 4, dtype=torch.int8), torch.zeros(0, 4), "w"])
def test_weights_of_another_kind(weight):
    with pytest.raises(SparsePruneError, match=r"weight: expected a floating-point matrix \[N, K\]"):
        BsrWeight.from_dense(weight, torch.ones(1, 1, dtype=torch.bool), (4, 4))


def _first_row_swapped(packed):
    col = packed.col_indices.clone()
    col[0], col[1] = packed.col_indices[1], packed.col_indices[0]
    return col


BROKEN = {
    "crow does not start at 0": (
        lambda p: {"crow_indices": p.crow_indices + 1},
        "crow_indices: expected a first entry of 0",
    ),
    "crow does not end at nnzb": (
        lambda p: {"crow_indices": torch.cat([p.crow_indices[:-1], p.crow_indices[-1:] + 1])},
        "crow_indices: expected a last entry of",
    ),
    "crow decreases": (
        lambda p: {"crow_indices": torch.stack([p.crow_indices[0], p.crow_indices[2] + 1, *p.crow_indices[2:]])},
        "crow_indices: expected entries that never decrease",
    ),
    "crow too short": (lambda p: {"crow_indices": p.crow_indices[:-1]}, r"crow_indices: expected shape \[4\]"),
    "crow int64": (lambda p: {"crow_indices": p.crow_indices.long()}, "crow_indices: expected int32"),
    "col negative": (lambda p: {"col_indices": p.col_indices - 1}, "col_indices: expected entries from 0"),
    "col out of range": (lambda p: {"col_indices": p.col_indices + 1}, "col_indices: expected entries below 3"),
    "col unsorted": (
        lambda p: {"col_indices": _first_row_swapped(p)},
        "col_indices: expected ascending, unique columns",
    ),
    "col repeated": (lambda p: {"col_indices": torch.zeros_like(p.col_indices)}, "col_indices: expected ascending"),
    "values of another block": (lambda p: {"values": p.values[:, :8]}, r"values: expected shape \[nnzb, 16, 32\]"),
    "values int8": (
        lambda p: {"values": p.values.to(torch.int8)},
        r"scales: expected float32 \[48\] beside int8 values",
    ),
    "values missing": (lambda p: {"values": p.values[1:]}, "col_indices: expected shape"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_validate_names_the_first_violation(case):
    change, message = BROKEN[case]
    packed = packed_weight(density=2)
    with pytest.raises(SparsePruneError, match=message):
        dataclasses.replace(packed, **change(packed)).validate()


def test_all_zero_mask():
    packed = packed_weight(density=-1).validate()
    assert packed.nnzb == 0 and packed.density == 0 and not packed.to_dense().any()


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_indices_of_many_weights_are_sound_where_each_is(data):
    grids, crows, cols = [], [], []
    for _ in range(data.draw(st.integers(1, 3))):
        mask = np.array(data.draw(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=3)))
        grids.append(mask.shape)
        crows.append(np.concatenate([[0], mask.sum(1).cumsum()]).astype(np.int32))
        cols.append(np.nonzero(mask)[1].astype(np.int32))
    which = data.draw(st.sampled_from(["nothing", "crow", "col", "shorter"]))
    i = data.draw(st.integers(0, len(grids) - 1))
    if which == "shorter":
        cols[i] = cols[i][:-1]
    elif which != "nothing":
        array = (crows if which == "crow" else cols)[i]
        if array.size:
            array[data.draw(st.integers(0, array.size - 1))] = data.draw(st.integers(-2, 5))
    sound = True
    for (rows, columns), crow, col in zip(grids, crows, cols, strict=True):
        try:
            values = torch.zeros(len(col), 4, 4)
            validate_bsr((4 * rows, 4 * columns), (4, 4), torch.from_numpy(crow), torch.from_numpy(col), values)
        except SparsePruneError:
            sound = False
    assert sound_indices(grids, crows, cols) == sound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_what_is_finite_is_told_from_what_sums_to_infinity(dtype):
    values = torch.full((3, 50), torch.finfo(dtype).max, dtype=dtype)
    check_finite(values, "values")
    check_finite(values[:0], "values")
    for wrong in (float("nan"), float("inf"), -float("inf")):
        values[1, 7] = wrong
        with pytest.raises(SparsePruneError, match="values: expected finite numbers"):
            check_finite(values, "values")
    values[0, 0], values[1, 7] = float("inf"), -float("inf")
    with pytest.raises(SparsePruneError, match="values: expected finite numbers"):
        check_finite(values, "values")


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize(
    ("dim", "start", "length"), [(0, 16, 32), (0, 32, 16), (0, 0, 48), (1, 0, 32), (1, 32, 38), (1, 64, 6)]
)
def test_narrow_is_that_of_the_dense_weight(dim, start, length, quantize):
    for density in (0.5, 0.0, 1.0):
        packed = packed_weight(density=density)
        packed = packed.quantize() if quantize else packed
        part = packed.narrow(dim, start, length).validate()
        assert torch.equal(part.to_dense(), packed.to_dense().narrow(dim, start, length))
    for wrong in ((dim, 8, 16), (dim, 0, 8), (2, 0, 16), (0, 48, 16), (1, -32, 32), (0, 0, 0)):
        with pytest.raises(SparsePruneError, match="start, length: expected"):
            packed.narrow(*wrong)


@pytest.mark.parametrize("dtype", [None, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize(("dim", "blocks"), [(0, [0, 2]), (0, []), (1, [0, 2]), (1, [1])])
def test_selected_blocks_and_what_is_not_zero(dim, blocks, dtype):
    packed = packed_weight()
    packed.values[packed.col_indices == 1] = 0  # stored, and zero
    packed.values[:, 3] = 0
    packed = packed.quantize(dtype) if dtype else packed
    dense, size = packed.to_dense(), packed.blocksize[dim]
    elements = [e for b in blocks for e in range(b * size, min((b + 1) * size, dense.shape[dim]))]
    part = packed.select(dim, torch.tensor(blocks, dtype=torch.int64))
    assert part.shape[dim] == len(elements)
    if blocks:
        part.validate()
    assert torch.equal(part.to_dense(), dense.index_select(dim, torch.tensor(elements, dtype=torch.int64)))
    assert torch.equal(packed.nonzero(dim), (dense != 0).any(1 - dim))
