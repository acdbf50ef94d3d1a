"""pack: from a pruned model directory to a packed checkpoint."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..convert import (
    BlockSparseConfig,
    QuantizeResult,
    SparsifyResult,
    gather_neurons_,
    nonzero_masks,
    quantize_,
    sparsify_,
)
from ..errors import SparsePruneError
from ..linears import as_matrix, linear_modules, matrix_shape
from ..masks import element_density, suggest_blocksize
from ..serialization import (
    MASKS_NAME,
    WEIGHTS_NAME,
    atomic_dir,
    is_packed,
    load_masks,
    save_packed,
)
from .models import check_all_there, class_of, encoder_filter, load_dir, quiet, stored_weights
from .store import check_out, record

# What stands beside weights and config.json in a model's directory: for texts, images or sound, and for generating.
COMPANIONS = (
    *("*token*.json", "chat_template.*", "vocab.*", "merges.txt", "*.model", "bpe.codes"),
    *("*processor_config.json", "generation_config.json"),
)


@dataclass(frozen=True)
class PackResult:
    """What packing did: per layer, and to the size of the weights file.

    layers is None where the source was packed already, rounded where its blocks were not rounded. neurons: how many of the
    feed-forward networks were dead and put last (gather_neurons_), of how many.
    """

    layers: SparsifyResult | None
    rounded: QuantizeResult | None
    dense_bytes: int
    packed_bytes: int
    neurons: tuple[int, int] = (0, 0)

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
    report: Callable[[str, int, int, str], None] | None = None,
) -> PackResult:
    """Write the packed twin of a pruned model directory to out, with config and tokenizer; dtype rounds its blocks (quantize_).

    The model may be of any class of transformers. The masks are those in masks.safetensors; without that file, blocks that are zero
    throughout in the encoder's layers, of blocksize (None: the size that most of these layers' zeros form), after neurons that were
    pruned one by one were put together (gather_neurons_). What is not rounded keeps its dtype.

    Raises SparsePruneError where the directory is not a model, lacks some of its weights, is packed already (unless to be
    rounded), or has nothing to pack.
    """
    source, out = Path(model_dir), Path(out)
    packed = is_packed(source)
    if packed and dtype is None:
        raise SparsePruneError(str(source), "a dense, pruned model", "a packed one", "use it as it is")
    check_out(out, source)
    kind = class_of(source)
    if kind is None:
        remedy = 'name it, such as "architectures": ["BertModel"]'
        raise SparsePruneError(str(source / "config.json"), "the model's class under architectures", "none", remedy)
    tell = report or (lambda *_: None)
    tell("pack", 0, 4, "reading the model")
    model, missing = load_dir(source, kind)
    check_all_there(source, model, missing)
    before = sum(file.stat().st_size for file in stored_weights(source))
    tell("pack", 1, 4, "packing its blocks")
    neurons = (0, 0) if packed or (source / MASKS_NAME).is_file() else gather_neurons_(model)
    layers = None if packed else _sparsified(model, source, blocksize)
    tell("pack", 2, 4, "rounding" if dtype else "packed")
    rounded = None if dtype is None else quantize_(model, dtype=dtype, weight_only=weight_only)
    if rounded is not None and not rounded.converted:
        got, remedy = "ones that are rounded already", "pack the pruned model that they come from"
        raise SparsePruneError(str(source), "blocks in floating point", got, remedy)
    tell("pack", 3, 4, "writing")
    with atomic_dir(out) as temporary:
        save_packed(model, temporary)
        for file in {file for pattern in COMPANIONS for file in source.glob(pattern) if file.is_file()}:
            shutil.copy(file, temporary)
        packed_bytes = (temporary / WEIGHTS_NAME).stat().st_size
        record(temporary, "pack", {})
    tell("pack", 4, 4, "done")
    return PackResult(layers, rounded, before, packed_bytes, neurons)


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
        linears = {name: module for name, module in linear_modules(model).items() if inside(name, module)}
        weights = [as_matrix(module, module.weight.detach()) for module in linears.values()]
        blocksize = blocksize or _common_blocksize(weights)
        masks = {name: mask for name, mask in nonzero_masks(model, blocksize).items() if name in linears}
        if not masks:
            raise SparsePruneError(str(source), "a model pruned in blocks", *_why_none(weights, blocksize))
        result, (r, c) = pack_(model, masks, blocksize), blocksize
        full, outside = f"no block of {r}x{c} zeros in it", "outside of the encoder's layers"
        whys = {row.name: full if row.name in linears else outside for row in result.layers if row.name not in masks}
        return replace(result, layers=[replace(row, reason=whys.get(row.name, row.reason)) for row in result.layers])
    return pack_(model, masks, blocksize)


def _common_blocksize(weights: Iterable[Tensor]) -> tuple[int, int]:
    """The block size that the zeros of most of weights form; 32x32 where they form none, for the error that follows."""
    found = Counter(fit.blocksize for fit in map(suggest_blocksize, weights) if fit)
    return found.most_common(1)[0][0] if found else (32, 32)


def _why_none(weights: Iterable[Tensor], blocksize: tuple[int, int]) -> tuple[str, str]:
    """What weights, none of which has a block of blocksize that is zero, have instead, and what to do."""
    fours = torch.zeros(5, dtype=torch.int64)  # of the groups of four weights in a row, how many hold 0, 1, .. 4 zeros
    for weight in weights:
        zeros = F.pad(weight == 0, (0, -weight.shape[1] % 4)).unflatten(1, (-1, 4)).sum(2)
        if zeros.sum() > 0.01 * weight.numel():  # fewer are no pruning
            fours += torch.bincount(zeros.flatten(), minlength=5)
    got, remedy = f"no block of {blocksize[0]}x{blocksize[1]} zeros", "with `sparse-prune prune` or a Pruner"
    zeros, groups = int(fours @ torch.arange(5)), int(fours.sum())
    if not groups:
        return got, f"prune it first {remedy}"
    remedy = f"prune it in blocks {remedy}"
    if fours[2] > 0.95 * groups:
        return "two zeros in every four weights (2:4), which only GPUs' sparse tensor cores gain from", remedy
    got = f"{zeros / groups / 4:.0%} zeros and {got}"
    if 4 * fours[4] > 0.95 * zeros:
        return f"{got}, but runs of four", f"{remedy}, or store the runs, for size alone, with --block 1x4"
    return f"{got}: they are scattered", remedy
