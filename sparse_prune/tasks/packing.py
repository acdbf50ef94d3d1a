"""pack: from a pruned model directory to a packed checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..convert import BlockSparseConfig, QuantizeResult, SparsifyResult, nonzero_masks, quantize_, sparsify_
from ..errors import SparsePruneError
from ..linears import linear_modules, matrix_shape
from ..masks import element_density, suggest_blocksize
from ..serialization import (
    MASKS_NAME,
    WEIGHTS_NAME,
    atomic_dir,
    is_packed,
    load_masks,
    read_json,
    save_packed,
)
from .data import TASKS
from .models import check_model_dir, encoder_filter, load_model, quiet, stored_weights, task_of
from .store import check_out, record


@dataclass(frozen=True)
class PackResult:
    """What packing did: per layer, and to the size of the weights file.

    layers is None where the source was packed already, rounded where its blocks were not rounded.
    """

    layers: SparsifyResult | None
    rounded: QuantizeResult | None
    dense_bytes: int
    packed_bytes: int

    @property
    def density(self) -> float:
        """Kept elements over all elements of the packed layers."""
        result = self.layers or self.rounded
        assert result is not None
        return result.density


@quiet()
def pack(
    model_dir: Path,
    out: Path,
    blocksize: tuple[int, int] | None = None,
    dtype: torch.dtype | None = None,
    weight_only: bool = False,
) -> PackResult:
    """Write the packed twin of a pruned model directory to out, with config and tokenizer; dtype rounds its blocks (quantize_).

    The masks are those in masks.safetensors; without that file, blocks that are zero throughout in the encoder's layers, of
    blocksize (None: the size that most of these layers' zeros form). What is not rounded keeps its dtype. Raises SparsePruneError
    where the directory is not a model, is packed already (unless to be rounded), or has nothing to pack.
    """
    source, out = Path(model_dir), Path(out)
    packed = is_packed(source)
    if packed and dtype is None:
        raise SparsePruneError(str(source), "a dense, pruned model", "a packed one", "use it as it is")
    check_out(out, source)
    model, tokenizer = load_model(source, _task_of(source), dtype="auto")
    before = sum(file.stat().st_size for file in stored_weights(source))
    layers = None if packed else _sparsified(model, source, blocksize)
    rounded = None if dtype is None else quantize_(model, dtype=dtype, weight_only=weight_only)
    if rounded is not None and not rounded.converted:
        got, remedy = "ones that are rounded already", "pack the pruned model that they come from"
        raise SparsePruneError(str(source), "blocks in floating point", got, remedy)
    with atomic_dir(out) as temporary:
        save_packed(model, temporary)
        tokenizer.save_pretrained(temporary)
        packed_bytes = (temporary / WEIGHTS_NAME).stat().st_size
        record(temporary, "pack", {})
    return PackResult(layers, rounded, before, packed_bytes)


def pack_(model: nn.Module, masks: Mapping[str, Tensor], blocksize: tuple[int, int]) -> SparsifyResult:
    """Replace the masked linear layers of model by packed ones, in place; a layer too full to gain stays dense, unless all are."""
    config, linears = BlockSparseConfig(blocksize=blocksize), linear_modules(model)
    densities = [
        element_density(mask, blocksize, matrix_shape(linears[n])) for n, mask in masks.items() if n in linears
    ]
    if all(density > config.max_density for density in densities):
        config = replace(config, max_density=1.0)
    return sparsify_(model, config, masks=masks)


def _sparsified(model: nn.Module, source: Path, blocksize: tuple[int, int] | None) -> SparsifyResult:
    """Pack the layers of model by the masks in its directory, or by its zeros."""
    if (source / MASKS_NAME).is_file():
        masks, found = load_masks(source / MASKS_NAME)
        if blocksize not in (None, found):
            raise SparsePruneError(
                "block", f"{found[0]}x{found[1]}, as in {MASKS_NAME}", "x".join(map(str, blocksize)), "leave it out"
            )
        blocksize = found
    else:
        inside = encoder_filter(model)
        blocksize = blocksize or _common_blocksize(model, inside)
        masks = {
            name: mask
            for name, mask in nonzero_masks(model, blocksize).items()
            if inside(name, model.get_submodule(name))
        }
    if not masks:
        got = f"no block of {blocksize[0]}x{blocksize[1]} zeros"
        raise SparsePruneError(str(source), "a pruned model", got, "prune it first with `sparse-prune prune`")
    return pack_(model, masks, blocksize)


def _common_blocksize(model: nn.Module, inside: Callable[[str, nn.Module], bool]) -> tuple[int, int]:
    """The block size that the zeros of most encoder layers form; 32x32 where they form none, for the error that follows."""
    linears = (m for name, m in model.named_modules() if isinstance(m, nn.Linear) and inside(name, m))
    found = Counter(fit.blocksize for fit in (suggest_blocksize(linear.weight) for linear in linears) if fit)
    return found.most_common(1)[0][0] if found else (32, 32)


def _task_of(model_dir: Path) -> str:
    check_model_dir(model_dir)
    path = model_dir / "config.json"
    architectures = read_json(path).get("architectures")
    task = task_of(architectures)
    if task is None:
        got = ", ".join(architectures or ()) or "no architecture"
        raise SparsePruneError(
            str(path), f"a model for {' or '.join(TASKS)}", got, "train it with `sparse-prune train`"
        )
    return task
