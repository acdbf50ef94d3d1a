"""BsrWeight: a weight whose kept blocks are stored one after another (block sparse row)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import SparsePruneError
from .masks import block_sum, check_blocksize, check_mask, grid_shape, pad_to_blocks, suggest_blocksize

VALUE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INT8_MAX = 127  # symmetric: -128 is never used
# What blocks may be rounded to, with a scale per output: each dtype's largest number.
QUANTIZED = {torch.int8: float(INT8_MAX), torch.float8_e4m3fn: 448.0}
# Products of int8 numbers are summed in int32: more inputs of extremes than this in one block-row would overflow it.
INT8_MAX_INPUTS = (2**31 - 1) // INT8_MAX**2
_REPACK = "the checkpoint is damaged or was not made by sparse-prune: pack the model again"


def dtype_name(dtype: torch.dtype) -> str:
    """The name that people and files use: "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def block_rows(crow_indices: Tensor, nnzb: int) -> Tensor:
    """Block-row of every stored block, int64 [nnzb], from crow_indices [N/R + 1]."""
    counts = crow_indices.diff()
    return torch.repeat_interleave(torch.arange(counts.numel(), device=counts.device), counts, output_size=nnzb)


def dense_from_bsr(
    crow_indices: Tensor, col_indices: Tensor, values: Tensor, shape: Sequence[int], scales: Tensor | None = None
) -> Tensor:
    """The dense [N, K] matrix that the BSR arrays stand for, times scales [N] where given; differentiable in values."""
    nnzb, r, c = values.shape
    rows, cols = grid_shape(shape, (r, c))
    if values.dtype == torch.float8_e4m3fn:  # which PyTorch can do little more with than convert
        values = values.float()
    grid = values.new_zeros(rows * cols, r, c)
    where = block_rows(crow_indices, nnzb) * cols + col_indices  # [nnzb]
    grid = grid.index_copy(0, where, values)
    dense = grid.view(rows, cols, r, c).transpose(1, 2).reshape(rows * r, cols * c)[: shape[0], : shape[1]]
    return dense if scales is None else dense * scales[:, None]


class Derived:
    """What was made from a weight's values for the kernels of this machine: kept beside the weight, never copied or saved with it.

    key         says which values it was made from; None: nothing yet
    ready       ops.Ready, where a CPU kernel runs a layer; else None
    prepacked   the values in the order that the CPU kernels read, in the dtype of the last x where they run dequantized; on a GPU
                values and index as the CUDA C++ kernels read them; or None
    plan        planner.Plan, or None where the sparse operator always runs
    dense       the dense weight by form (planner.DENSE_FORMS), made when the plan first asks for it: N * K elements of memory each
    """

    __slots__ = ("key", "prepacked", "plan", "dense", "ready")

    def __init__(self, key: object = None, prepacked: Tensor | None = None, plan: Any = None) -> None:
        self.key, self.prepacked, self.plan = key, prepacked, plan
        self.ready: Any = None
        self.dense: dict[str, Tensor] = {}

    def __reduce__(self):
        return Derived, ()


@dataclass(eq=False)
class BsrWeight:
    """W[N, K] in block sparse row form, the layout that state dicts and files hold and every backend accepts.

    shape          (N, K): out_features, in_features
    blocksize      (R, C)
    crow_indices   int32 [ceil(N/R) + 1]; block-row i owns the blocks crow[i] .. crow[i+1] - 1
    col_indices    int32 [nnzb]; block-column of each block, ascending within a block-row
    values         [nnzb, R, C]; float32, bfloat16, float16 or float64, or as quantize rounds them: int8 in [-127, 127] or
                   float8_e4m3fn. Blocks cut by the edge are zero-padded.
    scales         float32 [N] where values are int8 or float8_e4m3fn: W[n, k] = scales[n] * value; else None
    weight_only    how int8 values meet x: False, x is rounded to int8 too ("w8a8"); True, x stays as it is ("w8a16")
    x_scale        where x is rounded too, the one scale of all its rows; None: each row of x by its own
    """

    shape: tuple[int, int]
    blocksize: tuple[int, int]
    crow_indices: Tensor
    col_indices: Tensor
    values: Tensor
    scales: Tensor | None = None
    weight_only: bool = False
    x_scale: float | None = None
    derived: Derived = field(default_factory=Derived, init=False, repr=False)

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
        return cls((weight.shape[0], weight.shape[1]), blocksize, crow_indices, col_indices, values)

    @classmethod
    def from_zeros(cls, weight: Tensor, blocksize: Sequence[int] | None = None) -> BsrWeight:
        """Keep the blocks of weight[N, K] that hold a nonzero: for a dense matrix that was pruned elsewhere.

        blocksize None takes what `suggest_blocksize` finds. Raises SparsePruneError where it finds none.
        """
        if blocksize is None:
            found = suggest_blocksize(weight)
            if found is None:
                raise SparsePruneError(
                    "blocksize",
                    "blocks of zeros in the weight",
                    "scattered zeros or none",
                    "pass a blocksize, or prune",
                )
            blocksize = found.blocksize
        blocksize = check_blocksize(blocksize)
        return cls.from_dense(weight, block_sum((weight.detach() != 0).float(), blocksize) > 0, blocksize)

    @classmethod
    def from_torch(cls, matrix: Tensor, blocksize: Sequence[int] | None = None) -> BsrWeight:
        """The weight that a torch sparse matrix [N, K] holds, of any sparse layout.

        A BSR tensor keeps its own blocks, explicit zeros included; of the other layouts the nonzeros are cut into `blocksize`
        (None: see from_zeros). Raises SparsePruneError for a dense tensor, or a blocksize that is not the BSR tensor's.
        """
        if not isinstance(matrix, Tensor) or matrix.layout is torch.strided or matrix.ndim != 2:
            got = f"{matrix.layout} {tuple(matrix.shape)}" if isinstance(matrix, Tensor) else type(matrix).__name__
            raise SparsePruneError(
                "matrix", "a sparse torch matrix", got, "use from_dense or from_zeros for a dense one"
            )
        if matrix.layout is not torch.sparse_bsr:
            return cls.from_zeros(matrix.detach().to_dense(), blocksize)
        values = matrix.values().detach()
        own = values.shape[1], values.shape[2]
        if blocksize is not None and check_blocksize(blocksize) != own:
            raise SparsePruneError("blocksize", f"{own}, the BSR tensor's", blocksize, "leave it out")
        crow_indices, col_indices = (t.to(torch.int32) for t in (matrix.crow_indices(), matrix.col_indices()))
        rows = block_rows(crow_indices, values.shape[0])
        order = torch.argsort(rows * grid_shape(matrix.shape, own)[1] + col_indices, stable=True)
        shape = matrix.shape[0], matrix.shape[1]
        packed = cls(shape, own, crow_indices, col_indices[order], values[order].contiguous())
        check_finite(packed.values, "matrix")
        return packed.validate()

    @classmethod
    def from_scipy(cls, matrix: Any, blocksize: Sequence[int] | None = None) -> BsrWeight:
        """The weight that a scipy.sparse matrix or array [N, K] holds, like from_torch: BSR keeps its blocks."""
        if not hasattr(matrix, "tocsr"):
            raise SparsePruneError(
                "matrix", "a scipy.sparse matrix", type(matrix).__name__, "use from_dense for a NumPy array's tensor"
            )
        if matrix.format != "bsr":
            return cls.from_zeros(torch.from_numpy(matrix.toarray()), blocksize)
        matrix = matrix.copy()
        matrix.sum_duplicates()
        crow, col, values = (torch.from_numpy(part.copy()) for part in (matrix.indptr, matrix.indices, matrix.data))
        return cls.from_torch(
            torch.sparse_bsr_tensor(crow, col, values, matrix.shape, check_invariants=True), blocksize
        )

    def to_torch(self, layout: torch.layout = torch.sparse_bsr) -> Tensor:
        """A torch sparse tensor [N, K] of layout torch.sparse_bsr (a copy of the blocks) or torch.sparse_csr (of the nonzeros).

        A quantized weight becomes float32. Raises SparsePruneError for another layout, and for BSR where the blocks do not divide
        the shape, which torch cannot hold.
        """
        if layout is torch.sparse_csr:
            return self.to_dense().to_sparse_csr()
        divides = all(size % block == 0 for size, block in zip(self.shape, self.blocksize, strict=True))
        if layout is not torch.sparse_bsr or not divides:
            raise SparsePruneError(
                "layout",
                "torch.sparse_csr, or torch.sparse_bsr where blocks divide the shape",
                f"{layout} for {self.shape} in {self.blocksize}",
                "use torch.sparse_csr",
            )
        parts = (self.crow_indices.clone(), self.col_indices.clone(), self.dequantize().values.clone())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls BSR beta once per process, which the caller asked for
            return torch.sparse_bsr_tensor(*parts, self.shape, check_invariants=True)

    def to_scipy(self) -> Any:
        """A scipy.sparse.bsr_matrix of shape (N, K).

        Raises SparsePruneError for bfloat16, which NumPy lacks, and where the blocks do not divide the shape.
        """
        from scipy.sparse import bsr_matrix

        bsr = self.to_torch().cpu()
        if self.values.dtype is torch.bfloat16:
            raise SparsePruneError(
                "dtype", "one that NumPy has", self.values.dtype, "use packed.to(torch.float32) first"
            )
        parts = (bsr.values().numpy(), bsr.col_indices().numpy(), bsr.crow_indices().numpy())
        return bsr_matrix(parts, shape=self.shape)

    @classmethod
    def cat(cls, weights: Sequence[BsrWeight]) -> BsrWeight:
        """The weight whose outputs are those of weights, one after another: [sum of N, K], as torch.cat does for dense ones.

        Raises SparsePruneError unless they share K, blocksize and dtype, and all but the last are whole block-rows high.
        """
        weights = list(weights)
        if not weights:
            raise SparsePruneError("weights", "at least one BsrWeight", "none", "pass the weights of one input")
        first = weights[0]
        for weight in weights:
            if (weight.shape[1], weight.blocksize) != (first.shape[1], first.blocksize):
                expected = f"{first.shape[1]} inputs in blocks {first.blocksize}, like the first"
                got = f"{weight.shape[1]} in {weight.blocksize}"
                raise SparsePruneError("weights", expected, got, "join weights of one input and one blocksize")
            if weight.values.dtype != first.values.dtype:
                expected = f"values of {first.values.dtype}, like the first"
                raise SparsePruneError("weights", expected, weight.values.dtype, "join weights of one dtype")
            if weight.weight_only != first.weight_only:
                expected = f"weight_only={first.weight_only}, like the first"
                raise SparsePruneError("weights", expected, weight.weight_only, "join weights that meet x alike")
            if weight.x_scale != first.x_scale:
                expected = f"x_scale={first.x_scale}, like the first"
                raise SparsePruneError("weights", expected, weight.x_scale, "join weights that round x alike")
        if any(weight.shape[0] % first.blocksize[0] for weight in weights[:-1]):
            heights = [weight.shape[0] for weight in weights]
            expected = f"outputs in multiples of {first.blocksize[0]}"
            raise SparsePruneError("weights", expected, heights, "choose a blocksize that divides them")
        crow, stored = [first.crow_indices[:1]], 0
        for weight in weights:
            crow.append(weight.crow_indices[1:] + stored)
            stored += weight.nnzb
        return cls(
            (sum(weight.shape[0] for weight in weights), first.shape[1]),
            first.blocksize,
            torch.cat(crow),
            torch.cat([weight.col_indices for weight in weights]),
            torch.cat([weight.values.detach() for weight in weights]),
            None if first.scales is None else torch.cat([w.scales for w in weights if w.scales is not None]),
            first.weight_only,
            first.x_scale,
        )

    def narrow(self, dim: int, start: int, length: int) -> BsrWeight:
        """The weight of `length` outputs (dim 0) or inputs (dim 1) from `start` on, as Tensor.narrow does for dense ones; copied.

        Raises SparsePruneError for a range outside the weight, and for one that cuts a block.
        """
        if dim not in (0, 1) or start < 0 or length < 1 or start + length > self.shape[dim]:
            expected = f"a range inside {self.shape}"
            raise SparsePruneError("dim, start, length", expected, (dim, start, length), "dim is 0 or 1")
        block, end = self.blocksize[dim], start + length
        if start % block or (end % block and end != self.shape[dim]):
            expected = f"multiples of {block}, which cut no block"
            raise SparsePruneError("start, length", expected, (start, length), "choose another range")
        return self.select(dim, torch.arange(start // block, -(-end // block), device=self.values.device))

    def select(self, dim: int, blocks: Tensor) -> BsrWeight:
        """The weight of the block-rows (dim 0) or block-columns (dim 1) that blocks, int64 and ascending, names; copied."""
        size, whole = self.blocksize[dim], grid_shape(self.shape, self.blocksize)[dim]
        elements = (blocks[:, None] * size + torch.arange(size, device=blocks.device)).flatten()
        elements = elements[elements < self.shape[dim]]  # the last block may be cut by the edge
        rows = block_rows(self.crow_indices, self.nnzb)  # [nnzb]
        places = blocks.new_full((whole,), -1)
        places[blocks] = torch.arange(len(blocks), device=blocks.device)
        at = places[rows if dim == 0 else self.col_indices.long()]  # [nnzb]
        keep = at >= 0
        shape = (len(elements), self.shape[1]) if dim == 0 else (self.shape[0], len(elements))
        crow = torch.zeros(grid_shape(shape, self.blocksize)[0] + 1, dtype=torch.int32, device=keep.device)
        crow[1:] = torch.bincount((at if dim == 0 else rows)[keep], minlength=len(crow) - 1).cumsum(0)
        col = self.col_indices[keep] if dim == 0 else at[keep].to(torch.int32)
        scales = self.scales if dim == 1 or self.scales is None else self.scales[elements]
        how = (self.weight_only, self.x_scale)
        return BsrWeight(shape, self.blocksize, crow, col, self.values.detach()[keep], scales, *how)

    def nonzero(self, dim: int) -> Tensor:
        """bool [N] (dim 0) or [K] (dim 1): True for the outputs, or inputs, to which any weight other than zero belongs."""
        values = self.values.detach()
        if values.dtype == torch.float8_e4m3fn:  # which PyTorch can do little more with than convert
            values = values.float()
        at = block_rows(self.crow_indices, self.nnzb) if dim == 0 else self.col_indices  # [nnzb]
        # By the largest number, which takes a tenth of the time of any().
        found = values.abs().amax(2 - dim) != 0  # bool [nnzb, R or C]
        count = at.new_zeros(grid_shape(self.shape, self.blocksize)[dim], self.blocksize[dim])
        return count.index_add_(0, at, found.to(count.dtype)).flatten()[: self.shape[dim]] > 0

    def to_dense(self) -> Tensor:
        """The weight as [N, K], zeros where blocks were pruned; float32 if values have scales."""
        return dense_from_bsr(self.crow_indices, self.col_indices, self.values, self.shape, self.scales)

    def quantize(self, dtype: torch.dtype = torch.int8, weight_only: bool = False) -> BsrWeight:
        """The same blocks in int8 or float8_e4m3fn: value = round(W[n, k] / scales[n]), half to even, where scales[n] is
        max |W[n, :]| over the dtype's largest number, 127 or 448.

        In int8 each weight moves by at most scales[n] / 2; in float8_e4m3fn, which has three bits behind the leading one, by at
        most a sixteenth of itself, or scales[n] / 1024 where that is more. A row without weights, or with zeros alone, has scale 1;
        no scale is smaller than the smallest normal float32.

        weight_only   see BsrWeight; for int8, whose numbers bfloat16 and float16 hold exactly

        Raises SparsePruneError for another dtype, values that are quantized already or not finite, weight_only beside
        float8_e4m3fn, and in int8 for more inputs in a block-row than int32 sums can hold.
        """
        check_quantization(dtype, weight_only)
        if self.scales is not None:
            raise SparsePruneError(
                "values", "floating-point values", dtype_name(self.values.dtype), "quantize a weight once"
            )
        check_finite(self.values, "values")
        r, _ = self.blocksize
        values = self.values.detach()
        values = values if values.dtype == torch.float64 else values.float()  # [nnzb, R, C]
        highest = values.new_zeros(self.crow_indices.numel() - 1, r)  # [N/R, R]
        rows = block_rows(self.crow_indices, self.nnzb)  # [nnzb]
        highest = highest.scatter_reduce(0, rows[:, None].expand(-1, r), values.abs().amax(2), "amax")
        scales = (highest / QUANTIZED[dtype]).float().clamp(min=torch.finfo(torch.float32).tiny)
        scales = torch.where(highest > 0, scales, 1.0)
        rounded = round_to(values / scales[rows][:, :, None], dtype)
        scales = scales.flatten()[: self.shape[0]].clone()  # [N]
        index = (self.crow_indices, self.col_indices)
        return BsrWeight(self.shape, self.blocksize, *index, rounded, scales, weight_only).validate()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> BsrWeight:
        """The weight in floating point: quantized values times their scales, computed in float32; self where there are none."""
        if self.scales is None:
            return self
        r, _ = self.blocksize
        scales = self.scales.new_ones((self.crow_indices.numel() - 1) * r)
        scales[: self.shape[0]] = self.scales
        scales = scales.view(-1, r)[block_rows(self.crow_indices, self.nnzb)]  # [nnzb, R]
        values = (self.values.float() * scales[:, :, None]).to(dtype)
        return BsrWeight(self.shape, self.blocksize, self.crow_indices, self.col_indices, values)

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
        (n, k), (r, c) = self.shape, self.blocksize
        heights = (n - block_rows(self.crow_indices, self.nnzb) * r).clamp(max=r)  # [nnzb]
        widths = (k - self.col_indices.long() * c).clamp(max=c)  # [nnzb]
        return float((heights * widths).sum()) / (n * k)

    @property
    def nbytes(self) -> int:
        """Bytes of values, scales and indices, what a file holds of this weight."""
        tensors = (self.crow_indices, self.col_indices, self.values, self.scales)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def to(self, *args: Any, **kwargs: Any) -> BsrWeight:
        """Like Tensor.to for the values (dtype and device); the indices follow the device.

        Quantized values and their scales keep their dtype and only move.
        """
        cast, scales = (self.values if self.scales is None else self.scales).to(*args, **kwargs), None
        values = cast
        if self.scales is not None:
            values, scales = self.values.to(cast.device), self.scales.to(cast.device)
        crow_indices, col_indices = self.crow_indices.to(cast.device), self.col_indices.to(cast.device)
        how = (self.weight_only, self.x_scale)
        return BsrWeight(self.shape, self.blocksize, crow_indices, col_indices, values, scales, *how)

    def validate(self) -> BsrWeight:
        """Check everything a kernel relies on and return self; raises SparsePruneError with the first violation.

        Files are untrusted: an index out of range would make a kernel read outside its arrays.
        """
        arrays = (self.crow_indices, self.col_indices, self.values)
        validate_bsr(self.shape, self.blocksize, *arrays, scales=self.scales, weight_only=self.weight_only)
        check_x_scale(self.x_scale, self.values.dtype, self.weight_only)
        return self


def check_quantization(dtype: torch.dtype, weight_only: bool) -> None:
    """Raise SparsePruneError unless blocks can be rounded to dtype and then multiplied so."""
    if dtype not in QUANTIZED:
        raise SparsePruneError("dtype", "torch.int8 or torch.float8_e4m3fn", dtype, "choose one of these")
    if weight_only and dtype != torch.int8:
        raise SparsePruneError(
            "weight_only", "False beside float8_e4m3fn", weight_only, "use torch.int8, which keeps more"
        )


def check_x_scale(x_scale: float | None, dtype: torch.dtype, weight_only: bool) -> None:
    """Raise SparsePruneError unless all rows of x can be rounded by x_scale, beside values of dtype; None: each by its own."""
    if x_scale is None:
        return
    kind = "a weight_only weight" if weight_only else f"a weight of {dtype}"
    if dtype not in QUANTIZED or weight_only:
        raise SparsePruneError("x_scale", f"None beside {kind}", x_scale, "leave it out")
    lowest, highest = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    if not lowest <= x_scale <= highest:
        raise SparsePruneError("x_scale", "a finite positive number", x_scale, "leave it out")


def round_to(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Floating-point values as one of QUANTIZED: half to even, what lies beyond its largest number becomes that."""
    values = values.clamp(-QUANTIZED[dtype], QUANTIZED[dtype])
    return (values.round() if dtype == torch.int8 else values).to(dtype)


def check_finite(values: Tensor, argument: str) -> None:
    """Raise SparsePruneError if values hold NaN or infinity."""
    values = values.detach()
    if values.dtype == torch.float8_e4m3fn:  # without infinity, or a sum in PyTorch; all bits set but the sign are NaN
        values = torch.where(values.view(torch.uint8) & 0x7F == 0x7F, torch.nan, 0.0)
    # A sum that is finite has only finite terms; one that is not may have overflowed. Neither makes a copy as large as values, as
    # isfinite does: the least and the greatest are finite if all are.
    if not math.isfinite(values.sum()) and not torch.isfinite(torch.stack(torch.aminmax(values))).all():
        raise SparsePruneError(
            argument, "finite numbers", "NaN or infinity", "look for a diverged training run before packing"
        )


def sound_indices(grids: Sequence[tuple[int, int]], crows: Sequence[np.ndarray], cols: Sequence[np.ndarray]) -> bool:
    """Whether the indices of several weights, int32 [rows + 1] and [nnzb] for each grid (rows, columns) of blocks, are canonical.

    In one pass over all, which for a model of many small layers takes a tenth of the time of validate_bsr for each. That says what
    is wrong.
    """
    heights, widths = np.array(grids).T
    lengths = np.array([col.size for col in cols])
    if any(crow.dtype != np.int32 or crow.shape != (rows + 1,) for crow, rows in zip(crows, heights, strict=True)):
        return False
    if any(col.dtype != np.int32 or col.ndim != 1 for col in cols):
        return False
    crow, col = np.concatenate(crows).astype(np.int64), np.concatenate(cols)
    last = np.cumsum(heights + 1)
    stored = np.cumsum(lengths)
    if crow[last - heights - 1].any() or (crow[last - 1] != lengths).any():
        return False
    crow += np.repeat(stored - lengths, heights + 1)
    if (crow[1:] < crow[:-1]).any() or (col < 0).any() or (col >= np.repeat(widths, lengths)).any():
        return False
    first = np.zeros(col.size + 1, dtype=bool)  # of its block-row
    first[crow] = True
    return bool(((col[1:] > col[:-1]) | first[1:-1]).all())


def validate_bsr(
    shape: Sequence[int],
    blocksize: Sequence[int],
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    name: str = "",
    scales: Tensor | None = None,
    weight_only: bool = False,
) -> None:
    """Raise SparsePruneError unless the arrays are a canonical BSR weight of that shape and blocksize; name says which layer.

    Values are either floating-point without scales or quantized with them; their finiteness is check_finite's.
    """
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
    dtypes = (*VALUE_DTYPES, *QUANTIZED)
    expected = "float32, bfloat16, float16, float64, int8 or float8_e4m3fn"
    require(values.dtype in dtypes, "values", expected, values.dtype)
    require(not weight_only or values.dtype == torch.int8, "weight_only", "False but beside int8 values", values.dtype)
    if values.dtype in QUANTIZED:
        if scales is None:
            expected = f"float32 [{shape[0]}] beside {dtype_name(values.dtype)} values"
            raise SparsePruneError(f"{prefix}scales", expected, "none", _REPACK)
        require(scales.dtype == torch.float32, "scales", "float32", scales.dtype)
        require(
            tuple(scales.shape) == (shape[0],), "scales", f"shape [{shape[0]}], one per output", tuple(scales.shape)
        )
        require(scales.device == values.device, "scales", f"device {values.device}", scales.device)
        positive = bool((scales > 0).all()) and bool(torch.isfinite(scales).all())
        require(positive, "scales", "finite positive numbers", "zero, a negative number, NaN or infinity")
        low = int(values.min()) if values.numel() and values.dtype == torch.int8 else 0
        require(low >= -INT8_MAX, "values", f"int8 from -{INT8_MAX} to {INT8_MAX}", low)
    else:
        require(scales is None, "scales", f"none beside {values.dtype} values", "a tensor")
    for argument, index, length in (("crow_indices", crow_indices, rows + 1), ("col_indices", col_indices, nnzb)):
        require(index.dtype == torch.int32, argument, "int32", index.dtype)
        require(tuple(index.shape) == (length,), argument, f"shape [{length}]", tuple(index.shape))
        require(index.device == values.device, argument, f"device {values.device}", index.device)
    # By NumPy, whose calls cost a third of PyTorch's: a file may list hundreds of layers.
    crow, col = crow_indices.cpu().numpy(), col_indices.cpu().numpy()
    require(int(crow[0]) == 0, "crow_indices", "a first entry of 0", int(crow[0]))
    require(int(crow[-1]) == nnzb, "crow_indices", f"a last entry of {nnzb}, the number of blocks", int(crow[-1]))
    require(bool((crow[1:] >= crow[:-1]).all()), "crow_indices", "entries that never decrease", "a decreasing entry")
    if nnzb == 0:
        return
    if values.dtype == torch.int8:
        most = int((crow[1:] - crow[:-1]).max())
        limit = f"at most {INT8_MAX_INPUTS // c} blocks of {c} inputs in a block-row, since sums are int32"
        require(most * c <= INT8_MAX_INPUTS, "crow_indices", limit, most)
    require(int(col.min()) >= 0, "col_indices", "entries from 0", int(col.min()))
    require(int(col.max()) < cols, "col_indices", f"entries below {cols}, the number of block-columns", int(col.max()))
    first = np.zeros(nnzb + 1, dtype=bool)  # of its block-row
    first[crow] = True
    require(
        bool(((col[1:] > col[:-1]) | first[1:nnzb]).all()),
        "col_indices",
        "ascending, unique columns in each block-row",
        "unsorted or repeated columns",
    )
