"""sparsify_: every linear layer of a model that can gain from it becomes a SparseLinear; the rest stay, each with its reason."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from . import planner
from .bsr import QUANTIZED, check_quantization, dtype_name
from .criteria import block_mask
from .errors import SparsePruneError
from .fuse import FuseResult, count_dead_heads, feed_forwards, fuse_encoder_
from .layers import SparseLinear
from .linears import as_matrix, check_there, is_linear, linear_modules, matrix_shape
from .masks import block_sum, check_blocksize, check_density, element_density, grid_shape

# Called with each model that has just got sparse layers: how integrations, which stand above, mark a model as theirs.
after_conversion: list[Callable[[nn.Module], None]] = []


@dataclass(frozen=True)
class BlockSparseConfig:
    """How sparsify_ prunes and packs.

    blocksize     (R, C)
    density       kept fraction of each layer's blocks; used where no masks are given
    criterion     "magnitude" or "random", which need the weight alone; for the others prune with a Pruner and pass its masks
    max_density   layers that keep more than this stay dense, because a dense matmul is then as fast
    tokens        M of the calls to come (batch x length): layers that the planner expects to lose to dense at it, on this CPU, stay
                  dense. None: max_density alone decides, for the model may run elsewhere

    Raises SparsePruneError when a field is out of range.
    """

    blocksize: tuple[int, int] = (32, 32)
    density: float = 0.2
    criterion: str = "magnitude"
    max_density: float = 0.9
    tokens: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocksize", check_blocksize(self.blocksize))
        check_density(self.density)
        check_density(self.max_density, "max_density")
        if self.tokens is not None and not (isinstance(self.tokens, int) and self.tokens > 0):
            raise SparsePruneError(
                "tokens", "a positive integer or None", repr(self.tokens), "give batch size x length"
            )


@dataclass(frozen=True)
class LayerReport:
    """What happened to one linear layer: `reason` is empty where it became sparse. density counts elements, bytes the weight."""

    name: str
    shape: tuple[int, int]
    blocksize: tuple[int, int]
    density: float
    dense_bytes: int
    bytes: int
    reason: str


@dataclass(frozen=True)
class SparsifyResult:
    """One row per linear layer, in module order, what became of the encoder around them, and how many of its attention heads
    contribute nothing and are left out, of how many; print it for the table.
    """

    layers: list[LayerReport]
    encoder: FuseResult = field(default_factory=lambda: FuseResult([]))
    dead_heads: tuple[int, int] = (0, 0)

    @property
    def converted(self) -> list[str]:
        """Names of the layers that are sparse now."""
        return [row.name for row in self.layers if not row.reason]

    @property
    def kept_dense(self) -> dict[str, str]:
        """Name -> reason of the layers that stayed dense."""
        return {row.name: row.reason for row in self.layers if row.reason}

    @property
    def density(self) -> float:
        """Kept elements over all elements of the converted layers; 1.0 if there are none."""
        return _density([row for row in self.layers if not row.reason])

    def __str__(self) -> str:
        width = max((len(row.name) for row in self.layers), default=4)
        lines = [f"{'layer':<{width}}  {'shape':>13}  {'block':>8}  density  bytes"]
        for row in self.layers:
            shape, block = f"{row.shape[0]}x{row.shape[1]}", f"{row.blocksize[0]}x{row.blocksize[1]}"
            what = f"{row.dense_bytes} -> {row.bytes}" if not row.reason else f"dense: {row.reason}"
            lines.append(f"{row.name:<{width}}  {shape:>13}  {block:>8}  {row.density:7.3f}  {what}")
        lines.append(
            f"{len(self.converted)} of {len(self.layers)} linear layers are sparse, density {self.density:.3f}"
        )
        lines += map(str, self.encoder.stacks)
        dead, heads = self.dead_heads
        if dead:
            lines.append(f"{dead} of {heads} attention heads contribute nothing and are left out")
        return "\n".join(lines)


@dataclass(frozen=True)
class QuantizedLayer:
    """What happened to one SparseLinear: `reason` is empty where its blocks were rounded.

    Bytes count the weight before and after; error is the norm of the weight's change over the norm of the weight.
    """

    name: str
    shape: tuple[int, int]
    density: float
    bytes_before: int
    bytes: int
    error: float
    reason: str


@dataclass(frozen=True)
class QuantizeResult:
    """One row per SparseLinear, in module order; print it for the table. dtype is what blocks were rounded to."""

    layers: list[QuantizedLayer]
    dtype: torch.dtype = torch.int8

    @property
    def converted(self) -> list[str]:
        """Names of the layers whose blocks were rounded."""
        return [row.name for row in self.layers if not row.reason]

    @property
    def density(self) -> float:
        """Kept elements over all elements of the layers."""
        return _density(self.layers)

    def __str__(self) -> str:
        width = max((len(row.name) for row in self.layers), default=4)
        lines = [f"{'layer':<{width}}  {'shape':>13}  density  weight error  bytes"]
        for row in self.layers:
            shape = f"{row.shape[0]}x{row.shape[1]}"
            what = f"{row.bytes_before} -> {row.bytes}" if not row.reason else f"kept: {row.reason}"
            lines.append(f"{row.name:<{width}}  {shape:>13}  {row.density:7.3f}  {row.error:12.4f}  {what}")
        kind = dtype_name(self.dtype)
        lines.append(f"{len(self.converted)} of {len(self.layers)} sparse layers are {kind}")
        return "\n".join(lines)


def _density(rows: Sequence[LayerReport] | Sequence[QuantizedLayer]) -> float:
    total = sum(math.prod(row.shape) for row in rows)
    return sum(row.density * math.prod(row.shape) for row in rows) / total if total else 1.0


def quantize_(
    model: nn.Module,
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
    dtype: torch.dtype = torch.int8,
    weight_only: bool = False,
) -> QuantizeResult:
    """Round the blocks of model's SparseLinear modules to int8 or float8_e4m3fn (BsrWeight.quantize), in place; for inference.

    filter_fn     filter_fn(name, module) -> bool says which layers may change; default: all
    dtype         torch.int8 or torch.float8_e4m3fn, to which a call rounds its input too, row by row ("w8a8")
    weight_only   leave the input of a call as it is ("w8a16"); beside int8 only

    Raises SparsePruneError if model has no SparseLinear, and for another dtype or weight_only beside float8_e4m3fn.
    """
    check_quantization(dtype, weight_only)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}
    if not layers:
        raise SparsePruneError(
            "model", "at least one SparseLinear", type(model).__name__, "call sparsify_(model, ...) first"
        )
    rows = []
    for name, layer in layers.items():
        before, reason, error = layer.packed, "", 0.0
        if before.scales is not None:
            reason = f"it is {dtype_name(layer.values.dtype)} already"
        elif filter_fn is not None and not filter_fn(name, layer):
            reason = "left out by filter_fn"
        after = before
        if not reason:
            after = layer.quantize_(dtype, weight_only).packed
            weight = before.to_dense().detach().double()
            norm = weight.norm().item()
            error = (after.to_dense().double() - weight).norm().item() / norm if norm else 0.0
        rows.append(QuantizedLayer(name, before.shape, before.density, before.nbytes, after.nbytes, error, reason))
    if any(not row.reason for row in rows):
        announce(model)
    return QuantizeResult(rows, dtype)


@contextmanager
def calibrate_(model: nn.Module) -> Iterator[None]:
    """Give the quantized layers of model that round their input one scale for all its rows, from what they see in the with block.

        with sp.calibrate_(model):
            for batch in batches:
                model(batch)

    x_scale = max |x| over all rows / L, with L = 127 for int8 and 448 for float8_e4m3fn: no call then looks for the maximum of each
    row, and what lies beyond saturates. Inside the block each row has its own scale; layers that do not run, or see zeros alone,
    keep that. Padding counts like any token.

    Raises SparsePruneError if model has no such layer, and at the end where a layer has seen NaN or infinity; no scale is set then.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, SparseLinear) and module.values.dtype in QUANTIZED and not module.weight_only
    }
    if not layers:
        remedy = "call quantize_(model) first"
        raise SparsePruneError("model", "a layer that rounds its input", type(model).__name__, remedy)
    highest: dict[nn.Module, float] = {}

    def see(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].numel():
            most = inputs[0].detach().abs().max().item()
            highest[module] = most if math.isnan(most) else max(highest.get(module, 0.0), most)

    for layer in layers.values():
        layer.x_scale = None
    handles = [layer.register_forward_pre_hook(see) for layer in layers.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    for name, layer in layers.items():
        if not math.isfinite(highest.get(layer, 0.0)):
            raise SparsePruneError(f"x of {name}", "finite numbers", highest[layer], "check the calibration inputs")
    for layer in layers.values():
        if highest.get(layer, 0.0) > 0:
            layer.x_scale = highest[layer] / QUANTIZED[layer.values.dtype]


def sparsify_(
    model: nn.Module,
    config: BlockSparseConfig | None = None,
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
    masks: Mapping[str, Tensor] | None = None,
) -> SparsifyResult:
    """Replace the linear layers of model (nn.Linear, Conv1D) by SparseLinear, in place, and fuse an encoder around them
    (`fuse_encoder_`).

    filter_fn   filter_fn(name, module) -> bool says which layers may change; default: all
    masks       module name -> bool [ceil(N/R), ceil(K/C)], such as Pruner.masks; layers without one stay dense. Without masks each
                layer is pruned by config.criterion to config.density, but for those that the blocks do not fit, or that would grow
                because their blocks are cut by the edge: they stay dense.

    Raises SparsePruneError if model has no linear layer inside, the blocks fit none, a weight is on the meta device or sharded, or
    masks name a module that is not one.
    """
    config = config or BlockSparseConfig()
    if not isinstance(config, BlockSparseConfig):
        raise SparsePruneError(
            "config", "a BlockSparseConfig", repr(config)[:60], "pass for example BlockSparseConfig(density=0.2)"
        )
    if is_linear(model):
        raise SparsePruneError(
            "model", "a module with nn.Linear inside", "one itself", "use SparseLinear.from_dense(linear, mask)"
        )
    linears = linear_modules(model)
    if not linears:
        sparse = any(isinstance(module, SparseLinear) for module in model.modules())
        got, remedy = (
            ("one whose linear layers are sparse already", "call sparsify_ once")
            if sparse
            else (type(model).__name__, "pass the model itself")
        )
        raise SparsePruneError("model", "a module with nn.Linear inside", got, remedy)
    unknown = sorted(set(masks or ()) - set(linears))
    if unknown:
        raise SparsePruneError(
            "masks", "names of nn.Linear modules of the model", unknown[0], "use Pruner.masks of the same model"
        )
    for name, linear in linears.items():
        check_there(name, linear.weight)
        if hasattr(linear.weight, "placements"):
            remedy = "load accelerator.get_state_dict(model) into the same model, not prepared"
            raise SparsePruneError(f"{name}.weight", "a whole weight", "one sharded over processes", remedy)
    shared = _shared_weights(model)
    rows: list[LayerReport] = []
    new: dict[nn.Module, nn.Module] = {}
    for name, linear in linears.items():
        shape = matrix_shape(linear)
        reason, mask = _why_dense(model, name, linear, shared, filter_fn), None
        if not reason:
            mask, reason = _mask_of(name, linear, config, masks)
        density = 1.0 if mask is None else element_density(mask, config.blocksize, shape)
        packed_bytes = dense_bytes = linear.weight.nbytes
        if not reason and mask is not None:
            new[linear] = layer = SparseLinear.from_dense(linear, mask, config.blocksize)
            packed_bytes = layer.packed.nbytes
        rows.append(LayerReport(name, shape, config.blocksize, density, dense_bytes, packed_bytes, reason))
    if rows and all(row.reason.startswith(UNFIT) for row in rows):
        check_blocksize(config.blocksize, max((row.shape for row in rows), key=math.prod))
    swap_modules(model, new)
    result = SparsifyResult(rows, fuse_encoder_(model), count_dead_heads(model))
    if result.converted:
        announce(model)
    return result


def announce(model: nn.Module) -> None:
    """Tell the integrations that model has sparse layers now."""
    for hook in after_conversion:
        hook(model)


def swap_modules(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put new[old] in the place of each module old, under every name that the model has for it."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in new:
                setattr(parent, name, new[child])
    # In evaluation PyTorch's encoder layers would read the weights themselves, made dense on each call.
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and SparseLinear in map(type, module.children()):
            module.activation_relu_or_gelu = 0  # what keeps a layer off that path, by PyTorch's own rules
        elif isinstance(module, nn.TransformerEncoder) and any(
            SparseLinear in map(type, layer.children()) for layer in module.layers
        ):
            module.use_nested_tensor = False


def nonzero_masks(model: nn.Module, blocksize: Sequence[int]) -> dict[str, Tensor]:
    """Block masks of the zeros that a model which was pruned elsewhere already has: what sparsify_ takes as masks.

    Module name -> bool [ceil(N/R), ceil(K/C)], False where a whole block (R, C) of the weight [N, K] is zero, for each linear layer
    (nn.Linear, Conv1D) with such a block. `suggest_blocksize` finds the size that a weight's zeros form.

    Raises SparsePruneError for a block size that is not two positive integers, and for a model on the meta device.
    """
    blocksize, masks = check_blocksize(blocksize), {}
    for name, module in linear_modules(model).items():
        check_there(name, module.weight)
        mask = block_sum((as_matrix(module, module.weight.detach()) != 0).float(), blocksize) > 0
        if not mask.all():
            masks[name] = mask
    return masks


def gather_neurons_(model: nn.Module) -> tuple[int, int]:
    """Order the neurons of feed-forward networks so that dead ones come last, in place: (how many were moved, of how many).

    For a model whose neurons were pruned one by one elsewhere (nn_pruning): their zeros then lie together in blocks, which
    nonzero_masks finds. Outputs stay, but for the order of sums. A neuron is dead where all weights that read it are zero, or all
    that make it and their bias; all that it has becomes zero. It knows Garlic, the BERT family and gated MLPs (`fuse_encoder_`),
    and leaves a network as it is where other zeros too are in it, whose blocks another order would break.
    """
    dead_count = count = 0
    for layers, out in feed_forwards(model):
        if not all(is_linear(layer) for layer in (*layers, out)):
            continue
        made = [as_matrix(layer, layer.weight.detach()) for layer in layers]  # each [F, H]
        read = as_matrix(out, out.weight.detach())  # [H, F]
        dead = ~(read != 0).any(0)  # [F]
        for layer, weight in zip(layers, made, strict=True):
            bias = 0 if layer.bias is None else layer.bias.detach()
            dead |= (weight == 0).all(1) & torch.as_tensor(bias == 0, device=dead.device)
        count += len(dead)
        kept = [weight[~dead] != 0 for weight in made] + [read[:, ~dead] != 0]
        if not dead.any() or any(part.float().mean() < 0.95 for part in kept):
            continue
        dead_count += int(dead.sum())
        order = dead.int().argsort(stable=True)  # int64 [F]
        gone = dead[order]
        for layer, weight in zip(layers, made, strict=True):
            weight.copy_(weight[order].masked_fill(gone[:, None], 0))
            if layer.bias is not None:
                layer.bias.detach().copy_(layer.bias.detach()[order].masked_fill(gone, 0))
        read.copy_(read[:, order].masked_fill(gone, 0))
    return dead_count, count


def _shared_weights(model: nn.Module) -> set[int]:
    """ids of the parameters that more than one module holds."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared


def _why_dense(model, name, linear, shared, filter_fn) -> str:
    if filter_fn is not None and not filter_fn(name, linear):
        return "left out by filter_fn"
    if id(linear.weight) in shared:
        return "its weight is shared with another module"
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads the weight itself"
    return ""


def _mask_of(
    name: str, linear: nn.Linear, config: BlockSparseConfig, masks: Mapping[str, Tensor] | None
) -> tuple[Tensor | None, str]:
    """The mask of a layer that may change, if it has one, and why it stays dense all the same, or ""."""
    shape = matrix_shape(linear)
    if masks is not None:
        if name not in masks:
            return None, "no mask given for it"
        mask = masks[name]
    else:
        reason = _unfit(shape, config)
        if reason:
            return None, reason
        mask = block_mask(as_matrix(linear, linear.weight), config.blocksize, config.density, config.criterion)
    density = element_density(mask, config.blocksize, shape)
    if density > config.max_density:
        return mask, f"density {density:.3f} is above max_density {config.max_density}"
    return mask, _slower(linear, mask, config)


UNFIT = "blocks of"


def _unfit(shape: tuple[int, int], config: BlockSparseConfig) -> str:
    """Why blocks are no use for a weight of that shape, or ""."""
    (n, k), (r, c) = shape, config.blocksize
    rows, cols = grid_shape(shape, (r, c))
    if r >= n and c >= k and (r, c) != (n, k):
        return f"{UNFIT} {r}x{c} do not fit it"
    if max(1, round(config.density * rows * cols)) * r * c > n * k:
        return f"{UNFIT} {r}x{c}, cut by its edge, would store more than it has"
    return ""


def _slower(linear: nn.Linear, mask: Tensor, config: BlockSparseConfig) -> str:
    """Why the planner would run it dense at M = config.tokens, with its numbers; "" where sparse wins or nothing is known."""
    if config.tokens is None:
        return ""
    weight, density = linear.weight, mask.float().mean().item()
    plan = planner.plan(weight.device, weight.dtype, config.blocksize, density, matrix_shape(linear))
    choice = None if plan is None else plan.at(config.tokens)
    return choice.reason if choice is not None and choice.dense else ""
