from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_prune import SparsePruneError, masks

SIZES = st.tuples(st.integers(1, 40), st.integers(1, 40))
BLOCKS = st.tuples(st.integers(1, 17), st.integers(1, 17))


@given(SIZES, BLOCKS, st.integers(0, 2**31))
def test_expand_and_sum_agree_with_loops(shape, blocksize, seed):
    generator = torch.Generator().manual_seed(seed)
    (n, k), (r, c) = shape, blocksize
    grid = masks.grid_shape(shape, blocksize)
    mask = torch.rand(grid, generator=generator) < 0.5
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    expanded = masks.expand_mask(mask, blocksize, shape)
    sums, means = masks.block_sum(weight, blocksize), masks.block_mean(weight, blocksize)
    assert expanded.shape == shape and sums.shape == grid
    for i in range(grid[0]):
        for j in range(grid[1]):
            block = slice(i * r, min(n, (i + 1) * r)), slice(j * c, min(k, (j + 1) * c))
            assert (expanded[block] == mask[i, j]).all()
            assert sums[i, j] == pytest.approx(weight[block].sum().item(), abs=1e-12)
            assert means[i, j] == pytest.approx(weight[block].mean().item(), abs=1e-12)
    assert masks.element_density(mask, blocksize, shape) == pytest.approx(expanded.double().mean().item())


def test_top_mask_keeps_the_highest_and_breaks_ties_by_index():
    assert masks.top_mask(torch.tensor([3.0, 1.0, 2.0, 2.0]), 0.5).tolist() == [True, False, True, False]
    assert masks.top_mask(torch.zeros(2, 3), 1 / 3).tolist() == [[True, True, False], [False] * 3]
    assert masks.top_mask(torch.rand(5), 1e-9).sum() == 1
    assert masks.top_mask(torch.rand(5), 1).all()


@pytest.mark.parametrize("density", [0, -0.1, 1.1, float("nan"), "much", None])
def test_density_outside_its_range(density):
    with pytest.raises(SparsePruneError, match=r"density: expected a kept fraction in \(0, 1\]"):
        masks.top_mask(torch.rand(4), density)


def test_nan_saliency():
    with pytest.raises(SparsePruneError, match="saliency: expected numbers, got NaN"):
        masks.top_mask(torch.tensor([1.0, float("nan")]), 0.5)


@pytest.mark.parametrize("blocksize", [(0, 4), (4,), 32, (2.5, 4), (-1, 1), None, "ab"])
def test_bad_blocksize(blocksize):
    with pytest.raises(SparsePruneError, match="blocksize: expected two positive integers"):
        masks.check_blocksize(blocksize)


def test_block_that_cannot_fit():
    assert masks.check_blocksize((8, 8), (8, 8)) == (8, 8)
    assert masks.check_blocksize((64, 8), (32, 32)) == (64, 8)
    for too_large in ((16, 16), (16, 8), (8, 16)):
        with pytest.raises(SparsePruneError, match=r"fits a weight of shape \(8, 8\)"):
            masks.check_blocksize(too_large, (8, 8))


@pytest.mark.parametrize("mask", [torch.ones(2, 2), torch.ones(3, 2, dtype=torch.bool), [[True]]])
def test_mask_of_another_kind(mask):
    with pytest.raises(SparsePruneError, match=r"block_mask: expected a bool tensor of shape \(2, 2\)"):
        masks.expand_mask(mask, (32, 32), (64, 64))
