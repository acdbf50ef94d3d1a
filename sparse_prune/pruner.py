"""Pruner: lowers the density of a model's linear layers while it trains, and keeps what it pruned exactly zero."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .criteria import (
    CRITERIA,
    GRANULARITIES,
    at_least_float32,
    bisect_alpha,
    check_criterion,
    element_saliency,
    granularity_blocksize,
)
from .errors import SparsePruneError
from .heads import HeadGroup, find_heads
from .linears import as_matrix, check_there, is_conv1d, linear_modules, matrix_shape
from .masked import KeptBlocks, masked_linear, runs_masked
from .masks import (
    block_elements,
    block_sum,
    check_blocksize,
    check_density,
    element_density,
    expand_mask,
    grid_shape,
    top_mask,
)
from .schedules import Schedule

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class PruneConfig:
    """How a Pruner prunes.

    criterion     a name of CRITERIA
    schedule      "oneshot", "linear", "cubic" or "iterative"
    scope         "global": blocks of all layers compete; "local": each layer keeps the same share
    density       final kept fraction, in (0, 1]
    blocksize     (R, C), for granularity "block"
    granularity   "element", "block", "row", "column" or "head"
    floor         share of its blocks that each layer keeps at least under scope "global"; one block always stays. The article's
                  criteria, "threshold" and "gradient", know no floor
    total_steps   optimizer steps of the whole training
    warmup        steps before the first block goes: a count (int), or a share of total_steps (float below 1)
    cooldown      steps at the end with final masks: a count (int), or a share of total_steps (float below 1)
    rounds        how often schedule "iterative" prunes
    update_every  steps between two choices of masks
    smoothing     b in S <- b S + (1 - b) s, the running saliency, so that early and single noisy steps fade
    regrow        True: a pruned block keeps competing with the weights it had, and returns with them if it wins, until masks are
                  final; False: it stays pruned
    alpha         for criterion "threshold" (|w|) or "gradient" (|grad|), the article's rule with this alpha in place of a density:
                  prune where a block's mean is below alpha * max|r|; alpha grows along the schedule from 0
    relative_to   r of that rule: "grad", as in the article, or "weight"
    seed          of criterion "random"
    skip_pruned   True: on a CPU, layers that are down to half of their blocks or fewer skip the pruned ones in training too, where
                  blocks are 16x16 or larger; False: every product is dense to the end

    Raises SparsePruneError when a field is out of range or two contradict each other.
    """

    criterion: str = "taylor"
    schedule: str = "cubic"
    scope: str = "global"
    density: float = 0.2
    blocksize: tuple[int, int] = (32, 32)
    granularity: str = "block"
    floor: float = 0.05
    total_steps: int = 1000
    warmup: int | float = 0.1
    cooldown: int | float = 0.4
    rounds: int = 5
    update_every: int = 10
    smoothing: float = 0.98
    regrow: bool = True
    alpha: float | None = None
    relative_to: str = "grad"
    seed: int = 0
    skip_pruned: bool = True

    def __post_init__(self) -> None:
        check_criterion(self.criterion)
        check_density(self.density)
        object.__setattr__(self, "blocksize", check_blocksize(self.blocksize))
        for name, allowed in (
            ("scope", ("global", "local")),
            ("granularity", GRANULARITIES),
            ("relative_to", ("grad", "weight")),
        ):
            if getattr(self, name) not in allowed:
                remedy = "choose one of these"
                raise SparsePruneError(name, f"one of {', '.join(allowed)}", repr(getattr(self, name)), remedy)
        if not isinstance(self.update_every, int) or self.update_every < 1:
            raise SparsePruneError("update_every", "an integer of at least 1", self.update_every, "count it in steps")
        for name, remedy in (("floor", "pass for example 0.05"), ("smoothing", "pass 0 to use the last step only")):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and 0 <= value < 1):
                raise SparsePruneError(name, "a number in [0, 1)", value, remedy)
        kinds = (("regrow", bool, "True or False"), ("skip_pruned", bool, "True or False"), ("seed", int, "an integer"))
        for name, kind, expected in kinds:
            if not isinstance(getattr(self, name), kind):
                raise SparsePruneError(name, expected, repr(getattr(self, name)), "leave it out for the default")
        fits = isinstance(self.alpha, int | float) and self.alpha >= 0 and self.criterion in ("threshold", "gradient")
        if self.alpha is not None and not fits:
            raise SparsePruneError(
                "alpha",
                "a number of at least 0, with criterion 'threshold' or 'gradient'",
                f"{self.alpha} with criterion {self.criterion!r}",
                "leave alpha out to prune to a density",
            )
        _ = self.timetable  # a Schedule checks itself

    @property
    def timetable(self) -> Schedule:
        """The schedule with warm-up and cool-down in steps."""
        return Schedule(
            self.schedule,
            self.density,
            self.total_steps,
            self._steps("warmup"),
            self._steps("cooldown"),
            self.rounds,
        )

    def _steps(self, name: str) -> int:
        value = getattr(self, name)
        if isinstance(value, float):
            if not 0 <= value < 1:
                raise SparsePruneError(
                    name, "a count of steps (int) or a share in [0, 1) (float)", value, "pass an int for a count"
                )
            return int(value * self.total_steps)
        return value


@dataclass(frozen=True)
class _Member:
    """A weight inside a unit: its grid, flattened, is `repeats` copies of the unit's vector of decisions."""

    name: str
    blocksize: tuple[int, int]
    grid: tuple[int, int]
    repeats: int


@dataclass(frozen=True)
class _Unit:
    """What is decided together: a layer's blocks, or the heads of one attention; `size` decisions of `cost` elements each."""

    members: tuple[_Member, ...]
    size: int
    cost: int


class Pruner:
    """Prunes the linear layers of a model in training.

        pruner = Pruner(model, PruneConfig(density=0.2, total_steps=len(loader) * epochs))
        pruner.attach(optimizer)
        for batch in loader:
            loss(model, batch).backward()
            optimizer.step()
            pruner.step()
            optimizer.zero_grad()

    model      any nn.Module
    config     a PruneConfig
    filter_fn  filter_fn(name, module) -> bool says which linear layers (nn.Linear, Conv1D) are pruned; default: all, a head
               whose weight is an embedding's too among them
    heads      for granularity "head", the HeadGroups; default: find_heads(model)

    A pruned weight is exactly 0 after step(), and with attach() also straight after optimizer.step(): neither momentum nor weight
    decay revives it. Saliency accumulates over steps as a running mean (config.smoothing).

    With config.regrow a pruned block keeps competing with the weights it had when it went (as in Sanh et al. 2020), at the price of
    a copy of the weights, and returns with them and without momentum if it wins, until the masks are final. Without it a pruned
    block stays pruned: its weights are 0, and so is every saliency that has the weight as a factor. On a 3-layer text classifier
    (density 0.2 in 32x32 blocks, distilled, three seeds) regrowing raised accuracy by .3, .6 and .8 points.

    With config.skip_pruned the products of training cost less as the density falls: y and dx of a layer come from its kept blocks
    alone, and once nothing can return, its dW too, which is then 0 where the weight is pruned. After remove_hooks() all is dense.

    Under scope "global" the blocks of highest saliency per element stay, whatever layer they are in. Criteria that estimate a
    change of the loss (taylor, movement, fisher) compare as they are; the others are divided by their layer's mean when pruning
    begins.

    Under torch.distributed, saliencies are averaged over ranks before they are compared, so that all ranks choose the same masks;
    override reduce_saliency for another layout. With DDP every rank has the whole weights; with FSDP2 (fully_shard) each holds some
    rows of every weight, scores and masks those, and only sums over blocks are gathered. Every rank must then call step() and
    state_dict() together; the state is the same on all ranks and does not depend on their number.

    Raises SparsePruneError where nothing is left to prune, blocks do not fit, weights or gradients are not finite, a weight is no
    parameter (weight_norm and other parametrizations), or a layer is frozen whose gradient the criterion needs.
    """

    def __init__(
        self,
        model: nn.Module,
        config: PruneConfig | None = None,
        filter_fn: Callable[[str, nn.Module], bool] | None = None,
        heads: Sequence[HeadGroup] | None = None,
    ) -> None:
        self.model, self.config = model, config or PruneConfig()
        if not isinstance(self.config, PruneConfig):
            remedy = "pass for example PruneConfig(density=0.2)"
            raise SparsePruneError("config", "a PruneConfig", repr(config)[:60], remedy)
        self.steps, self.done = 0, False
        self._timetable = self.config.timetable
        self._criterion = CRITERIA[self.config.criterion]
        self._modules = _linear_modules(model, filter_fn)
        self._units = self._make_units(heads)
        names = [member.name for unit in self._units.values() for member in unit.members]
        self._modules = {name: self._modules[name] for name in names}
        if "grad" in self._criterion.needs:
            self._check_trained()
        self._kept = {key: self._new(unit, True, torch.bool) for key, unit in self._units.items()}
        self._saliency = {key: self._new(unit, 0.0, torch.float32) for key, unit in self._units.items()}
        self._scale: dict[str, float] = {}
        self._memory: dict[str, Tensor] = {}
        self._dropped: dict[str, Tensor] = {}
        # Per layer [K + 1]: squares of each input feature and, last, rows: since the start, and of this rank since the last step.
        self._square_sum: dict[str, Tensor] = {}
        self._seen: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._optimizer_handles: list[RemovableHandle] = []
        self._skipping: set[str] = set()  # layers whose forward is masked_linear
        if self.config.criterion == "random":
            self._saliency = self._unit_saliency(torch.Generator().manual_seed(self.config.seed))
        if "activation_norm" in self._criterion.needs:
            for name, module in self._modules.items():
                size, device = matrix_shape(module)[1] + 1, module.weight.device
                self._square_sum[name] = torch.zeros(size, dtype=torch.float64, device=device)
                self._seen[name] = torch.zeros_like(self._square_sum[name])
                self._handles.append(module.register_forward_pre_hook(self._norm_hook(name)))

    @torch.no_grad()
    def step(self) -> None:
        """Count one optimizer step: take up the gradients, choose new masks when due, and put pruned weights back to 0.

        Call it after optimizer.step() and before zero_grad(); where a GradScaler skips an optimizer step, skip this too. Saliency
        uses the weights after the optimizer's step. Raises SparsePruneError for missing gradients, NaN and infinity.
        """
        self._follow()
        self.steps += 1
        if not self.done:
            density = self._timetable.density_at(self.steps)
            last = self.steps >= self._timetable.end
            due = last or (density < 1.0 and self.steps % self.config.update_every == 0)
            if self.config.alpha is None:
                self._accumulate(due)
                if due and density < 1.0:
                    self._choose(self._select(self.reduce_saliency(dict(self._saliency)), density))
            elif due:
                self._choose(self._above_threshold(self.config.alpha * self._timetable.progress_at(self.steps)))
            if last:
                self.done = True
                self._memory.clear()
                self._remove(self._handles)
                self._skip_pruned()
        self.apply_()

    def attach(self, optimizer: torch.optim.Optimizer) -> Pruner:
        """Re-apply the masks to weights and momentum at the end of every optimizer.step(); returns self.

        The optimizer may be one that Accelerate prepared. Where several optimizers share the model, call it once for each.
        """

        def after_step(stepped: torch.optim.Optimizer, args: object, kwargs: object) -> None:
            self.apply_()
            for name, dropped in self._dropped.items():
                state = stepped.state.get(self._modules[name].weight, {})
                for value in state.values():
                    if isinstance(value, Tensor) and value.shape == self._modules[name].weight.shape:
                        self._own(name, value).masked_fill_(dropped, 0)

        stepping = getattr(optimizer, "optimizer", optimizer)  # Accelerate's wrapper keeps no hooks itself
        self._optimizer_handles.append(stepping.register_step_post_hook(after_step))
        return self

    @torch.no_grad()
    def apply_(self) -> None:
        """Set every pruned weight to exactly 0."""
        self._follow()
        for name, dropped in self._dropped.items():
            self._own(name, self._modules[name].weight).masked_fill_(dropped, 0)

    @property
    def masks(self) -> dict[str, Tensor]:
        """Module name -> bool block mask, True = kept, on the grid of blocksizes[name]."""
        return {
            member.name: self._kept[key].repeat(member.repeats).view(member.grid)
            for key, unit in self._units.items()
            for member in unit.members
        }

    @property
    def blocksizes(self) -> dict[str, tuple[int, int]]:
        """Module name -> (R, C) of its mask."""
        return {member.name: member.blocksize for unit in self._units.values() for member in unit.members}

    def block_masks(self, blocksize: Sequence[int]) -> dict[str, Tensor]:
        """The masks on the grid of another block size, such as the one to pack with: a block stays if any element in it does."""
        blocksize, found = check_blocksize(blocksize), {}
        for name, mask in self.masks.items():
            elements = expand_mask(mask, self.blocksizes[name], matrix_shape(self._modules[name]))
            found[name] = block_sum(elements.float(), blocksize) > 0
        return found

    def density(self) -> float:
        """Kept elements over all elements of the pruned layers."""
        sizes = {name: module.weight.numel() for name, module in self._modules.items()}
        kept = sum(
            element_density(mask, self.blocksizes[name], matrix_shape(self._modules[name])) * sizes[name]
            for name, mask in self.masks.items()
        )
        return kept / sum(sizes.values())

    def state_dict(self) -> dict:
        """Everything that a resumed run needs beside weights and optimizer, as tensors and numbers in plain dicts."""
        return {
            "steps": self.steps,
            "done": self.done,
            "kept": {key: value.clone() for key, value in self._kept.items()},
            "saliency": {key: value.clone() for key, value in self._saliency.items()},
            "scale": dict(self._scale),
            "memory": {name: self._whole(name, value).clone() for name, value in self._memory.items()},
            "square_sum": {key: value.clone() for key, value in self._square_sum.items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Go on from a state_dict of a Pruner with the same model and config; raises SparsePruneError where they do not fit."""
        self._follow()
        expected = {key: tuple(value.shape) for key, value in self._kept.items()}
        try:
            got = {key: tuple(value.shape) for key, value in state["kept"].items()}
            parts = {name: state[name] for name in ("steps", "done", "saliency", "scale", "memory", "square_sum")}
        except (KeyError, AttributeError, TypeError) as error:
            raise SparsePruneError(
                "state", "a Pruner.state_dict()", repr(error), "save it with pruner.state_dict()"
            ) from None
        if got != expected:
            differing = sorted(set(got.items()) ^ set(expected.items()))[0]
            raise SparsePruneError(
                "state",
                "masks of this model's layers in these blocks",
                f"a difference at {differing}",
                "resume with the model, filter and config of the run that saved it",
            )
        for key in self._units:
            device = self._kept[key].device
            self._kept[key] = state["kept"][key].to(device, copy=True)
            self._saliency[key] = parts["saliency"][key].to(device, copy=True)
        self.steps, self.done = parts["steps"], parts["done"]
        self._scale = dict(parts["scale"])
        for own, name in ((self._memory, "memory"), (self._square_sum, "square_sum")):
            own.clear()
            for key, value in parts[name].items():
                own[key] = value.to(self._modules[key].weight.device, copy=True)
        self._memory = {name: self._part(name, value) for name, value in self._memory.items()}
        self._refresh_dropped()
        self.apply_()
        if self.done:
            self._remove(self._handles)

    def _follow(self) -> None:
        """Bring what is kept here to where the model is now: Hugging Face's Trainer moves a model to the GPU that it is given."""
        for key, unit in self._units.items():
            device = self._modules[unit.members[0].name].weight.device
            self._kept[key], self._saliency[key] = self._kept[key].to(device), self._saliency[key].to(device)
        for tensors in (self._memory, self._dropped, self._square_sum, self._seen):
            for name, tensor in tensors.items():
                tensors[name] = tensor.to(self._modules[name].weight.device)

    def reduce_saliency(self, saliency: dict[str, Tensor]) -> dict[str, Tensor]:
        """Mean over the ranks of torch.distributed, where that is initialised; the one place to override for another layout."""
        if not _distributed():
            return saliency
        return {key: value / torch.distributed.get_world_size() for key, value in _summed(saliency).items()}

    def remove_hooks(self) -> None:
        """Take everything off the model and the attached optimizers, which from then on are as if there had been no Pruner."""
        self._remove(self._handles)
        self._remove(self._optimizer_handles)
        for name in self._skipping:
            self._modules[name].__dict__.pop("forward", None)
        self._skipping.clear()

    @staticmethod
    def _remove(handles: list[RemovableHandle]) -> None:
        for handle in handles:
            handle.remove()
        handles.clear()

    def _skip_pruned(self) -> None:
        """Have the layers for which that pays skip what is pruned, by the masks as they are."""
        if not self.config.skip_pruned or self.config.granularity != "block":
            return
        # What may still return is scored by its gradient, where the criterion asks for one; the article's rule takes the largest.
        scored = self.config.regrow and "grad" in self._criterion.needs
        whole = not self.done and (scored or self.config.alpha is not None)
        sizes = self.blocksizes
        for name, mask in self.masks.items():
            module = self._modules[name]
            if "forward" in module.__dict__ and name not in self._skipping:
                continue  # somebody else's
            if runs_masked(module, mask, sizes[name]):
                kept = KeptBlocks.from_mask(mask, sizes[name])
                module.__dict__["forward"] = partial(masked_linear, module, kept, whole)
                self._skipping.add(name)
            elif name in self._skipping:
                del module.__dict__["forward"]
                self._skipping.remove(name)

    def _accumulate(self, due: bool) -> None:
        """Fold this step's saliency into the running one; criteria without gradients are only computed when due, random never."""
        needs = self._criterion.needs
        if "activation_norm" in needs:
            for name, seen in _summed(self._seen).items():
                self._square_sum[name] += seen
                self._seen[name].zero_()
        if "grad" in needs:
            self._check_grads()
            self._saliency = {
                key: self._saliency[key] * self.config.smoothing + new * (1 - self.config.smoothing)
                for key, new in self._unit_saliency().items()
            }
        elif due and "generator" not in needs:
            self._saliency = self._unit_saliency()

    def _unit_saliency(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Summed saliency of each decision, [size] per unit; generator draws a random one, alike on every rank."""
        found: dict[str, Any] = {}
        for key, unit in self._units.items():
            total: Tensor | float = 0.0
            for member in unit.members:
                sums = self._drawn(member, generator) if generator is not None else self._scored(member)
                total = total + sums.view(member.repeats, unit.size).sum(0)
            found[key] = total
        return found

    def _drawn(self, member: _Member, generator: torch.Generator) -> Tensor:
        module = self._modules[member.name]
        whole = torch.zeros(matrix_shape(module), device=module.weight.device)  # [N, K], never in parts
        return block_sum(element_saliency(whole, self.config.criterion, generator=generator), member.blocksize)

    def _scored(self, member: _Member) -> Tensor:
        """Saliency summed over blocks, [ceil(N/R), ceil(K/C)], of a member's weight and what else the criterion needs."""
        name, given = member.name, {"grad": self._grad, "activation_norm": self._norm}
        try:
            extras: dict[str, Any] = {need: given[need](name) for need in self._criterion.needs if need in given}
            element = element_saliency(self._competing_weight(name), self.config.criterion, **extras)
        except SparsePruneError as error:
            raise SparsePruneError(f"{name}: {error.argument}", error.expected, error.got, error.remedy) from None
        return self._block_sum(member, element)

    def _block_sum(self, member: _Member, element: Tensor) -> Tensor:
        """Sums of this rank's [n, k] over whole blocks, [ceil(N/R), ceil(K/C)] on every rank.

        A shard's border may cut blocks, so only the direction that is not sharded is summed before the parts are gathered.
        """
        module, (r, c) = self._modules[member.name], member.blocksize
        if not _sharded(module.weight):
            return block_sum(element, (r, c))
        if is_conv1d(module):
            return block_sum(self._whole(member.name, block_sum(element, (r, 1))), (1, c))
        return block_sum(self._whole(member.name, block_sum(element, (1, c))), (r, 1))

    def _own(self, name: str, tensor: Tensor) -> Tensor:
        """What this rank holds of a tensor laid out like the weight, as a matrix to read and write: [N, K], or a shard of it."""
        return as_matrix(self._modules[name], tensor.to_local() if _sharded(tensor) else tensor)

    def _part(self, name: str, whole: Tensor) -> Tensor:
        """This rank's share of a matrix [N, K] that every rank has."""
        module = self._modules[name]
        if not _sharded(module.weight):
            return whole
        from torch.distributed.tensor import distribute_tensor

        layout = as_matrix(module, whole).contiguous()
        spread = distribute_tensor(layout, module.weight.device_mesh, module.weight.placements, src_data_rank=None)
        return as_matrix(module, spread.to_local())

    def _whole(self, name: str, part: Tensor) -> Tensor:
        """The matrix that the ranks' shares (rows of an nn.Linear, columns of a Conv1D) make up, on every rank."""
        module = self._modules[name]
        if not _sharded(module.weight):
            return part
        from torch.distributed.tensor import DTensor

        layout = as_matrix(module, part).contiguous()
        shape = (module.weight.shape[0], layout.shape[1])
        spread = (module.weight.device_mesh, module.weight.placements)
        whole = DTensor.from_local(layout, *spread, shape=torch.Size(shape), stride=(shape[1], 1)).full_tensor()
        return as_matrix(module, whole)

    def _competing_weight(self, name: str) -> Tensor:
        """The weight, with what pruned blocks remember in their place."""
        weight = self._own(name, self._modules[name].weight.detach())
        if name in self._memory and name in self._dropped:
            return torch.where(self._dropped[name], self._memory[name], weight)
        return weight

    def _check_trained(self) -> None:
        """A frozen layer has no gradient, so that its blocks would be the first to go."""
        for name, module in self._modules.items():
            if not module.weight.requires_grad:
                raise SparsePruneError(
                    f"{name}.weight",
                    f"a weight that is trained, since criterion {self.config.criterion!r} needs its gradient",
                    "a frozen one",
                    "leave it out by filter_fn, call requires_grad_() on it, or choose magnitude",
                )

    def _check_grads(self) -> None:
        if all(module.weight.grad is None for module in self._modules.values()):
            raise SparsePruneError(
                "grad",
                f"gradients, which criterion {self.config.criterion!r} needs",
                "None in every pruned layer",
                "call step() after backward() and before zero_grad()",
            )

    def _grad(self, name: str) -> Tensor:
        """The gradient; zeros for a layer that took no part in this step."""
        weight = self._modules[name].weight
        return self._own(name, torch.zeros_like(weight) if weight.grad is None else weight.grad)

    def _norm_hook(self, name: str) -> Callable:
        def collect(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if module.training:
                rows = at_least_float32(inputs[0]).reshape(-1, inputs[0].shape[-1])  # [M, K]
                self._seen[name] = self._seen[name].to(rows.device)
                self._seen[name][:-1] += rows.square().sum(0)
                self._seen[name][-1] += rows.shape[0]

        return collect

    def _norm(self, name: str) -> Tensor:
        """Root mean square of each input feature since training began: the L2 norm without the number of tokens."""
        squares, rows = self._square_sum[name][:-1], self._square_sum[name][-1]
        if not rows:
            raise SparsePruneError(
                "activations", "a forward pass in training mode", "none", "run the model before step()"
            )
        norm = (squares / rows).sqrt().float()  # [K]
        module = self._modules[name]
        return self._part(name, norm.expand(matrix_shape(module)))[0] if is_conv1d(module) else norm

    def _select(self, saliency: dict[str, Tensor], density: float) -> dict[str, Tensor]:
        """What to keep at this density, by config.scope."""
        if not self.config.regrow:
            saliency = {key: value.masked_fill(~self._kept[key], -torch.inf) for key, value in saliency.items()}
        if self._criterion.article:
            return self._above_bisected(saliency, density)
        if self.config.scope == "local":
            return {key: top_mask(value, density) for key, value in saliency.items()}
        scores, costs = [], []
        for key, unit in self._units.items():
            if key not in self._scale:
                mean = float(saliency[key].mean()) / unit.cost
                self._scale[key] = 1.0 if self._criterion.loss_units or mean <= 0 else mean
            score = saliency[key] / (unit.cost * self._scale[key])
            floor = min(self.config.floor, density)
            least = top_mask(score, max(floor, 1 / unit.size))
            scores.append(score.masked_fill(least, torch.inf))
            costs.append(torch.full((unit.size,), unit.cost, dtype=torch.float64, device=score.device))
        score, cost = torch.cat(scores), torch.cat(costs)
        order = torch.sort(score, descending=True, stable=True).indices
        spent = cost[order].cumsum(0)
        kept = torch.zeros_like(score, dtype=torch.bool)
        kept[order] = spent - cost[order] / 2 <= density * spent[-1]
        kept |= torch.isposinf(score)
        parts = kept.split([unit.size for unit in self._units.values()])
        return dict(zip(self._units, parts, strict=True))

    def _means(self, sums: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Sums over decisions as means over the elements that each has, and these elements, float64: fewer in a cut block."""
        means, elements = {}, {}
        for key, total in sums.items():
            unit = self._units[key]
            elements[key] = self._new(unit, 0.0, torch.float64)
            for member in unit.members:
                of_block = block_elements(matrix_shape(self._modules[member.name]), member.blocksize, total.device)
                elements[key] += of_block.view(member.repeats, unit.size).sum(0)
            means[key] = total / elements[key].to(total.dtype)
        return means, elements

    def _above_bisected(self, sums: dict[str, Tensor], density: float) -> dict[str, Tensor]:
        """The article's rule with the threshold that leaves this density: one for the model, or for each layer under scope "local".

        The threshold is alpha * max|r| for some alpha whatever r is, so it is bisected on the means' own scale.
        """

        def threshold(values: Tensor, elements: Tensor | None = None) -> float:
            scale = float(values.max()) or 1.0
            return bisect_alpha(values, scale, density, elements).alpha * scale

        means, elements = self._means(sums)
        if self.config.scope == "local":
            return {key: values >= threshold(values) for key, values in means.items()}
        least = threshold(torch.cat(list(means.values())), torch.cat(list(elements.values())))
        return {key: values >= least for key, values in means.items()}

    def _above_threshold(self, alpha: float) -> dict[str, Tensor]:
        """The article's rule on this step's weights and gradients: mean |v| of a block >= alpha * max|r|."""
        if "grad" in (self.config.relative_to, *self._criterion.needs):
            self._check_grads()
        means = self.reduce_saliency(self._means(self._unit_saliency())[0])
        tensors = {"weight": self._competing_weight, "grad": self._grad}[self.config.relative_to]
        largest = {
            key: max(
                float(at_least_float32(self._whole(member.name, tensors(member.name))).abs().max())
                for member in unit.members
            )
            for key, unit in self._units.items()
        }
        if self.config.scope == "global":
            largest = dict.fromkeys(largest, max(largest.values()))
        kept = {key: means[key] >= alpha * largest[key] for key in self._units}
        return kept if self.config.regrow else {key: self._kept[key] & kept[key] for key in kept}

    def _choose(self, kept: dict[str, Tensor]) -> None:
        """Make these the masks; with regrow, remember what goes and put back what returns."""
        if self.config.regrow:
            for name in self._modules:
                self._memory[name] = self._competing_weight(name).clone()
        self._kept = kept
        self._refresh_dropped()
        for name, memory in self._memory.items():
            self._own(name, self._modules[name].weight).copy_(memory)

    def _refresh_dropped(self) -> None:
        sizes = self.blocksizes
        self._dropped = {
            name: self._part(name, ~expand_mask(mask, sizes[name], matrix_shape(self._modules[name])))
            for name, mask in self.masks.items()
            if not mask.all()
        }
        self._skip_pruned()

    def _make_units(self, heads: Sequence[HeadGroup] | None) -> dict[str, _Unit]:
        granularity = self.config.granularity
        if granularity == "head":
            return self._head_units(find_heads(self.model) if heads is None else heads)
        if heads is not None:
            raise SparsePruneError("heads", "None unless granularity is 'head'", granularity, "set granularity='head'")
        units = {}
        for name, module in self._modules.items():
            shape = matrix_shape(module)
            blocksize = granularity_blocksize(granularity, shape, self.config.blocksize)
            check_blocksize(blocksize, shape)
            grid = grid_shape(shape, blocksize)
            cost = min(blocksize[0], shape[0]) * min(blocksize[1], shape[1])
            units[name] = _Unit((_Member(name, blocksize, grid, 1),), grid[0] * grid[1], cost)
        return units

    def _head_units(self, groups: Sequence[HeadGroup]) -> dict[str, _Unit]:
        units = {}
        for group in groups:
            members = []
            for name, repeats, axis in group.parts():
                if name not in self._modules:
                    continue
                shape = matrix_shape(self._modules[name])
                pieces = group.num_heads * repeats
                if shape[axis] % pieces:
                    raise SparsePruneError(
                        "heads",
                        f"a number of heads that divides the {shape[axis]} {('rows', 'columns')[axis]} of {name}",
                        group.num_heads,
                        "pass HeadGroups with the model's number of heads",
                    )
                size = shape[axis] // pieces
                blocksize = (size, shape[1]) if axis == 0 else (shape[0], size)
                members.append(_Member(name, blocksize, grid_shape(shape, blocksize), repeats))
            if members:
                elements = sum(self._modules[member.name].weight.numel() for member in members)
                units[members[0].name] = _Unit(tuple(members), group.num_heads, elements // group.num_heads)
        if not units:
            raise SparsePruneError(
                "heads",
                "at least one attention module whose linear layers are pruned",
                "none found",
                "pass heads=[HeadGroup(num_heads, rows=(...), columns=(...))]",
            )
        return units

    def _new(self, unit: _Unit, value: float, dtype: torch.dtype) -> Tensor:
        device = self._modules[unit.members[0].name].weight.device
        return torch.full((unit.size,), value, dtype=dtype, device=device)


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _summed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Vectors summed over the ranks, in one message."""
    if not _distributed() or not tensors:
        return tensors
    flat = torch.cat(list(tensors.values()))
    torch.distributed.all_reduce(flat)
    return dict(zip(tensors, flat.split([value.numel() for value in tensors.values()]), strict=True))


def _sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether tensor is one of FSDP2's, of which each rank has a part; raises SparsePruneError for other layouts than by rows."""
    if not (torch.distributed.is_available() and hasattr(tensor, "placements")):
        return False
    for placement in tensor.placements:
        if not (placement.is_replicate() or placement.is_shard(0)):
            raise SparsePruneError(
                "model", "weights that are whole or sharded along dimension 0", placement, "use fully_shard as it comes"
            )
    return True


def _linear_modules(model: nn.Module, filter_fn: Callable[[str, nn.Module], bool] | None) -> dict[str, nn.Linear]:
    """The linear layers that the filter lets through, each weight once; NaN weights are refused here."""
    linears = linear_modules(model)
    if not linears:
        raise SparsePruneError("model", "a module with nn.Linear inside", type(model).__name__, "pass the model itself")
    chosen: dict[int, tuple[str, nn.Linear]] = {}
    for name, module in linears.items():
        if filter_fn is None or filter_fn(name, module):
            chosen.setdefault(id(module.weight), (name, module))
    if not chosen:
        raise SparsePruneError(
            "filter_fn", f"at least one of {len(linears)} nn.Linear modules to pass", "none", "loosen the filter"
        )
    for name, module in chosen.values():
        if "weight" not in module._parameters:  # what is written there is gone at the next call
            got, remedy = (
                "one that is computed on each call",
                "take off weight_norm, prune or the like first, or leave it out by filter_fn",
            )
            raise SparsePruneError(f"{name}.weight", "a parameter", got, remedy)
        weight = module.weight.detach()
        check_there(name, weight)
        if not torch.isfinite(weight.to_local() if _sharded(weight) else weight).all():
            raise SparsePruneError(
                f"{name}.weight", "finite numbers", "NaN or infinity", "load or train the model again"
            )
    return dict(chosen.values())
