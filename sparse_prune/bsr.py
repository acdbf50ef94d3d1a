"""BsrWeight: a weight whose kept blocks are stored one after another (block sparse row)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .errors import SparsePruneError
from .masks import check_blocksize, check_mask, element_density, grid_shape, pad_to_blocks

VALUE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_REPACK = "the checkpoint is damaged or was not made by sparse-prune: pack the model again"


def block_rows(crow_indices: Tensor, nnzb: int) -> Tensor:
    """Block-row of every stored block, int64 [nnzb], from crow_indices [N/R + 1]."""
    counts = crow_indices.diff()
    return torch.repeat_interleave(torch.arange(counts.numel(), device=counts.device), counts, output_size=nnzb)


def dense_from_bsr(crow_indices: Tensor, col_indices: Tensor, values: Tensor, shape: Sequence[int]) -> Tensor:
    """The dense [N, K] matrix that the BSR arrays stand for; differentiable in values."""
    nnzb, r, c = values.shape
    rows, cols = grid_shape(shape, (r, c))
    grid = values.new_zeros(rows * cols, r, c)
    where = block_rows(crow_indices, nnzb) * cols + col_indices  # [nnzb]
    grid = grid.index_copy(0, where, values)
    return grid.view(rows, cols, r, c).transpose(1, 2).reshape(rows * r, cols * c)[: shape[0], : shape[1]]


@dataclass(eq=False)
class BsrWeight:
    """W[N, K] in block sparse row form, the layout that state dicts and files hold and every backend accepts.

    shape          (N, K): out_features, in_features
    blocksize      (R, C)
    crow_indices   int32 [ceil(N/R) + 1]; block-row i owns the blocks crow[i] .. crow[i+1] - 1
    col_indices    int32 [nnzb]; block-column of each block, ascending within a block-row
    values         [nnzb, R, C]; float32, bfloat16, float16 or float64. Blocks cut by the edge are zero-padded.
    """

    shape: tuple[int, int]
    blocksize: tuple[int, int]
    crow_indices: Tensor
    col_indices: Tensor
    values: Tensor
    _prepacked: tuple[object, Tensor] | None = field(default=None, init=False, repr=False)

    @classmethod
    def from_dense(cls, weight: Tensor, mask: Tensor, blocksize: Sequence[int] = (32, 32)) -> BsrWeight:
        """Keep the blocks of weight[N, K] where mask (bool [ceil(N/R), ceil(K/C)]) is True.

        Raises SparsePruneError for a weight that is not a finite floating-point matrix or a mask of another shape.
        """
        if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.dtype not in VALUE_DTYPES or 0 in weight.shape:
            got = f"{weight.dtype} {tuple(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
            raise SparsePruneError("weight", "a floating-point matrix [N, K]", got, "pass layer.weight of an nn.Linear")
        blocksize = check_blocksize(blocksize)
        mask = check_mask(mask, weight.shape, blocksize).to(weight.device)
        values = pad_to_blocks(weight.detach(), blocksize).transpose(1, 2)[mask].contiguous()  # [nnzb, R, C]
        counts = mask.sum(1)
        crow_indices = torch.zeros(mask.shape[0] + 1, dtype=torch.int32, device=weight.device)
        crow_indices[1:] = counts.cumsum(0)
        col_indices = mask.nonzero()[:, 1].to(torch.int32)
        check_finite(values, "weight")
        return cls(tuple(weight.shape), blocksize, crow_indices, col_indices, values)

    def to_dense(self) -> Tensor:
        """The weight as [N, K], zeros where blocks were pruned."""
        return dense_from_bsr(self.crow_indices, self.col_indices, self.values, self.shape)

    def block_mask(self) -> Tensor:
        """bool [ceil(N/R), ceil(K/C)], True where a block is stored."""
        mask = torch.zeros(grid_shape(self.shape, self.blocksize), dtype=torch.bool, device=self.values.device)
        mask[block_rows(self.crow_indices, self.nnzb), self.col_indices.long()] = True
        return mask

    @property
    def nnzb(self) -> int:
        """Number of stored blocks."""
        return self.values.shape[0]

    @property
    def density(self) -> float:
        """Kept elements over N * K."""
        return element_density(self.block_mask(), self.blocksize, self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of values and indices, what a file holds of this weight."""
        return sum(t.numel() * t.element_size() for t in (self.crow_indices, self.col_indices, self.values))

    def to(self, *args, **kwargs) -> BsrWeight:
        """Like Tensor.to for the values (dtype and device); the indices follow the device."""
        values = self.values.to(*args, **kwargs)
        return BsrWeight(
            self.shape, self.blocksize, self.crow_indices.to(values.device), self.col_indices.to(values.device), values
        )

    def validate(self) -> BsrWeight:
        """Check everything a kernel relies on and return self; raises SparsePruneError with the first violation.

        Files are untrusted: an index out of range would make a kernel read outside its arrays.
        """
        validate_bsr(self.shape, self.blocksize, self.crow_indices, self.col_indices, self.values)
        return self


def check_finite(values: Tensor, argument: str) -> None:
    """Raise SparsePruneError if values hold NaN or infinity."""
    if not torch.isfinite(values).all():
        raise SparsePruneError(
            argument, "finite numbers", "NaN or infinity", "look for a diverged training run before packing"
        )


def validate_bsr(
    shape: Sequence[int],
    blocksize: Sequence[int],
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    name: str = "",
) -> None:
    """Raise SparsePruneError unless the arrays are a canonical BSR weight of that shape and blocksize; name says which layer."""
    prefix = f"{name}." if name else ""

    def require(ok: bool, argument: str, expected: str, got: object) -> None:
        if not ok:
            raise SparsePruneError(prefix + argument, expected, got, _REPACK)

    require(
        len(shape) == 2 and all(isinstance(v, int) and v > 0 for v in shape),
        "shape",
        "two positive integers (N, K)",
        shape,
    )
    r, c = check_blocksize(blocksize)
    rows, cols = grid_shape(shape, (r, c))
    nnzb = values.shape[0] if values.ndim == 3 else -1
    require(tuple(values.shape[1:]) == (r, c), "values", f"shape [nnzb, {r}, {c}]", tuple(values.shape))
    require(values.dtype in VALUE_DTYPES, "values", "float32, bfloat16, float16 or float64", values.dtype)
    for argument, index, length in (("crow_indices", crow_indices, rows + 1), ("col_indices", col_indices, nnzb)):
        require(index.dtype == torch.int32, argument, "int32", index.dtype)
        require(tuple(index.shape) == (length,), argument, f"shape [{length}]", tuple(index.shape))
        require(index.device == values.device, argument, f"device {values.device}", index.device)
    crow, col = crow_indices.cpu().long(), col_indices.cpu().long()
    require(int(crow[0]) == 0, "crow_indices", "a first entry of 0", int(crow[0]))
    require(int(crow[-1]) == nnzb, "crow_indices", f"a last entry of {nnzb}, the number of blocks", int(crow[-1]))
    require(bool((crow.diff() >= 0).all()), "crow_indices", "entries that never decrease", "a decreasing entry")
    if nnzb == 0:
        return
    require(int(col.min()) >= 0, "col_indices", "entries from 0", int(col.min()))
    require(int(col.max()) < cols, "col_indices", f"entries below {cols}, the number of block-columns", int(col.max()))
    ascending = (col.diff() > 0) | (block_rows(crow, nnzb).diff() > 0)
    require(
        bool(ascending.all()),
        "col_indices",
        "ascending, unique columns in each block-row",
        "unsorted or repeated columns",
    )
