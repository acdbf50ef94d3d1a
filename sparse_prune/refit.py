"""Refit: move the surviving weights of a pruned layer so that its outputs stay as close as they can to the dense layer's.

For one-shot pruning, where no training follows to make up for what is gone:

    with input_grams(model, masks) as grams:
        for batch in calibration:
            model(batch)
    refit_(model, masks, (32, 32), grams)          # the model's weights are still the dense ones here
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .errors import SparsePruneError
from .linears import as_matrix
from .masks import check_blocksize, check_mask

__all__ = ["input_grams", "refit", "refit_"]


@torch.no_grad()
def refit(weight: Tensor, mask: Tensor, blocksize: Sequence[int], gram: Tensor, damping: float = 0.01) -> Tensor:
    """The weights with zeros at pruned blocks whose outputs are nearest to those of weight[N, K], in weight's dtype.

    Each block-row with kept columns P gets the least-squares solution

        W'[:, P] = W H[:, P] (H[P, P])^-1,    H = gram + damping * mean(diag(gram)) * I

    which minimises the mean of ||W' x - W x||^2 over the inputs x[K] behind gram, plus the damping's share of ||W' - W||^2. Solved
    in float64. This is exact for a given mask; Optimal Brain Surgeon (Hassibi & Stork 1993) removes one weight at a time.

    mask     bool [ceil(N/R), ceil(K/C)], True = kept
    gram     [K, K], mean of x x^T, such as input_grams gives
    damping  at least 0; keeps the solution near W in directions that the inputs hardly show

    Raises SparsePruneError where shapes do not fit, gram is not finite, or H[P, P] is singular.
    """
    blocksize = check_blocksize(blocksize)
    check_mask(mask, weight.shape, blocksize)
    columns = weight.shape[1]
    if tuple(gram.shape) != (columns, columns):
        raise SparsePruneError("gram", f"shape {(columns, columns)}", tuple(gram.shape), "pass x.T @ x / len(x)")
    if not torch.isfinite(gram).all():
        raise SparsePruneError("gram", "finite numbers", "NaN or infinity", "check the calibration inputs")
    if not damping >= 0:
        raise SparsePruneError("damping", "a number of at least 0", damping, "pass for example 0.01")
    hessian = gram.double()  # [K, K]
    hessian = hessian + damping * hessian.diagonal().mean() * torch.eye(
        columns, device=gram.device, dtype=torch.float64
    )
    target = weight.double() @ hessian  # [N, K]
    fitted = torch.zeros_like(weight)
    for row, kept in enumerate(mask):
        kept_columns = kept.repeat_interleave(blocksize[1])[:columns].nonzero().flatten()  # P
        if not len(kept_columns):
            continue
        rows = slice(row * blocksize[0], (row + 1) * blocksize[0])
        factor, failed = torch.linalg.cholesky_ex(hessian[kept_columns][:, kept_columns])  # [P, P]
        if failed:
            raise SparsePruneError(
                "gram", "a positive definite matrix", "a singular one", "use more inputs or more damping"
            )
        solved = torch.cholesky_solve(target[rows, kept_columns].T, factor).T  # [R, P]
        fitted[rows, kept_columns] = solved.to(weight.dtype)
    return fitted


@torch.no_grad()
def refit_(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    blocksize: Sequence[int],
    grams: Mapping[str, Tensor],
    damping: float = 0.01,
) -> None:
    """Prune the named linear layers of a dense model by masks, in place, each refitted with its gram.

    Raises SparsePruneError where a gram is missing or does not fit.
    """
    for name, mask in masks.items():
        if name not in grams:
            raise SparsePruneError(
                "grams", f"the gram of {name}", "none", "collect them with input_grams(model, masks)"
            )
        module = model.get_submodule(name)
        assert isinstance(module.weight, Tensor)
        weight = as_matrix(module, module.weight)
        weight.copy_(refit(weight, mask, blocksize, grams[name], damping))


@contextmanager
def input_grams(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Collect X^T X / M, [K, K] in float32, of the inputs X[M, K] that the named modules see inside the with block.

    The dict is complete after the block; modules that did not run are not in it. Padding counts like any token: leave it out of the
    calibration batches, or use batches of one length.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def collector(name: str):
        def collect(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].detach().float().reshape(-1, inputs[0].shape[-1])  # [M, K]
            sums[name] = sums.get(name, 0) + rows.T @ rows
            counts[name] = counts.get(name, 0) + len(rows)

        return collect

    handles = [model.get_submodule(name).register_forward_pre_hook(collector(name)) for name in names]
    grams: dict[str, Tensor] = {}
    try:
        yield grams
    finally:
        for handle in handles:
            handle.remove()
        grams.update({name: total / max(1, counts[name]) for name, total in sums.items()})
