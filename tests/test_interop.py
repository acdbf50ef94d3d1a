"""Weights from and to torch's and scipy's sparse matrices, and from dense matrices that were pruned elsewhere."""

from __future__ import annotations

import pytest
import torch

import sparse_prune as sp
from sparse_prune import masks

scipy_sparse = pytest.importorskip("scipy.sparse")


def pruned(shape, blocksize, density, seed=0):
    """A matrix whose zeros are whole blocks, and its mask."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(masks.grid_shape(shape, blocksize), generator=generator) < density
    weight = torch.randn(shape, generator=generator).abs() + 0.1
    return weight * masks.expand_mask(mask, blocksize, shape), mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_torch_bsr_round_trip(dtype):
    weight, mask = pruned((96, 64), (32, 16), 0.4)
    packed = sp.BsrWeight.from_dense(weight.to(dtype), mask, (32, 16))
    bsr = packed.to_torch()
    assert bsr.layout is torch.sparse_bsr and torch.equal(bsr.to_dense(), packed.to_dense())
    back = sp.BsrWeight.from_torch(bsr)
    for name in ("crow_indices", "col_indices", "values"):
        assert torch.equal(getattr(back, name), getattr(packed, name)), name
    bsr.values().zero_()
    assert packed.values.abs().sum() > 0, "the torch tensor must be a copy"


def test_unsorted_bsr_is_put_in_order():
    values = torch.arange(3 * 4.0).view(3, 2, 2) + 1
    bsr = torch.sparse_bsr_tensor(
        torch.tensor([0, 2, 3]), torch.tensor([1, 0, 1]), values, (4, 4), check_invariants=False
    )
    packed = sp.BsrWeight.from_torch(bsr)
    assert packed.col_indices.tolist() == [0, 1, 1]
    assert torch.equal(packed.values, values[[1, 0, 2]])


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
def test_other_torch_layouts_find_their_blocks(layout):
    weight, mask = pruned((128, 96), (32, 32), 0.3)
    packed = sp.BsrWeight.from_torch(weight.to_sparse(layout=layout))
    assert packed.blocksize == (32, 32) and torch.equal(packed.to_dense(), weight)
    given = sp.BsrWeight.from_torch(weight.to_sparse(layout=layout), (16, 16))
    assert given.blocksize == (16, 16) and torch.equal(given.to_dense(), weight)


def test_csr_out_serves_cut_blocks():
    weight, mask = pruned((50, 70), (32, 32), 0.6)
    packed = sp.BsrWeight.from_dense(weight, mask, (32, 32))
    assert torch.equal(packed.to_torch(torch.sparse_csr).to_dense(), weight)
    with pytest.raises(sp.SparsePruneError, match="where blocks divide the shape.*use torch.sparse_csr"):
        packed.to_torch()


@pytest.mark.parametrize("kind", ["bsr_matrix", "bsr_array", "csr_matrix", "coo_array"])
def test_scipy_round_trip(kind):
    weight, mask = pruned((96, 64), (16, 16), 0.4)
    make = getattr(scipy_sparse, kind)
    matrix = make(weight.numpy(), blocksize=(16, 16)) if kind.startswith("bsr") else make(weight.numpy())
    packed = sp.BsrWeight.from_scipy(matrix)
    assert packed.blocksize == (16, 16) and torch.equal(packed.to_dense(), weight)
    again = packed.to_scipy()
    assert again.format == "bsr" and (again.toarray() == weight.numpy()).all()


def test_scipy_has_no_bfloat16():
    weight, mask = pruned((64, 64), (32, 32), 0.5)
    with pytest.raises(sp.SparsePruneError, match="one that NumPy has, got torch.bfloat16"):
        sp.BsrWeight.from_dense(weight.bfloat16(), mask, (32, 32)).to_scipy()


@pytest.mark.parametrize("blocksize", [(64, 64), (32, 32), (64, 16), (16, 64), (8, 8)])
def test_block_size_is_found(blocksize):
    weight, mask = pruned((512, 256), blocksize, 0.3)
    found = sp.suggest_blocksize(weight)
    assert found.blocksize == blocksize and found.fill == 1.0
    assert found.density == pytest.approx(float(mask.float().mean()))


def test_a_few_zeros_inside_blocks_are_forgiven():
    weight, _ = pruned((256, 256), (32, 32), 0.3)
    kept = weight.nonzero()
    chosen = kept[torch.randperm(len(kept), generator=torch.Generator().manual_seed(1))[: len(kept) // 50]]
    weight[chosen[:, 0], chosen[:, 1]] = 0
    assert sp.suggest_blocksize(weight).blocksize == (32, 32)


def test_scattered_zeros_have_no_block_size():
    scattered = torch.randn(256, 256) * (torch.rand(256, 256) < 0.1)
    two_of_four = torch.randn(256, 64, 4) * torch.tensor([1.0, 0.0, 1.0, 0.0])
    small, _ = pruned((256, 256), (4, 4), 0.3)  # blocks of 4x4 gain too little
    for weight in (scattered, two_of_four.view(256, 256), torch.randn(256, 256), small):
        assert sp.suggest_blocksize(weight) is None
        with pytest.raises(sp.SparsePruneError, match="expected blocks of zeros in the weight, got scattered zeros"):
            sp.BsrWeight.from_zeros(weight)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sp.BsrWeight.from_torch(torch.ones(4, 4)), "expected a sparse torch matrix, got torch.strided"),
        (lambda: sp.BsrWeight.from_scipy(torch.ones(4, 4)), "expected a scipy.sparse matrix, got Tensor"),
        (lambda: sp.suggest_blocksize(torch.ones(4)), r"expected a matrix \[N, K\], got \(4,\)"),
        (
            lambda: sp.BsrWeight.from_torch(torch.eye(4).to_sparse_bsr((2, 2)), (4, 4)),
            r"expected \(2, 2\), the BSR tensor's, got \(4, 4\)",
        ),
        (
            lambda: sp.BsrWeight.from_torch(torch.full((4, 4), torch.inf).to_sparse_bsr((2, 2))),
            "expected finite numbers, got NaN or infinity",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(sp.SparsePruneError, match=message):
        call()
