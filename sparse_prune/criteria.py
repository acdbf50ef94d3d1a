"""What makes a weight worth keeping: saliency per element, and the masks that follow from it.

Every criterion gives one number per element of W[N, K]; a block is worth the sum over its elements, and under the article's two
criteria, threshold and gradient, their mean. A granularity is a block size:
element (1, 1), block (R, C), row (1, K), column (N, 1), the rows of a head (head_dim, K); see `granularity_blocksize`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import SparsePruneError
from .masks import block_mean, block_sum, check_blocksize, check_density, top_mask

GRANULARITIES = ("element", "block", "row", "column", "head")


def magnitude(weight: Tensor) -> Tensor:
    """|w|. Han et al. 2015, Learning both Weights and Connections."""
    return weight.abs()


def gradient(grad: Tensor) -> Tensor:
    """|dL/dw|, the article's gradient-based pruning."""
    return grad.abs()


def taylor(weight: Tensor, grad: Tensor) -> Tensor:
    """|w * dL/dw|, the change of the loss to first order when w becomes 0. Molchanov et al. 2017 and 2019."""
    return (weight * grad).abs()


def movement(weight: Tensor, grad: Tensor) -> Tensor:
    """-w * dL/dw, positive where a step of gradient descent moves w away from 0. Sanh et al. 2020, Movement Pruning."""
    return -weight * grad


def fisher(weight: Tensor, grad: Tensor) -> Tensor:
    """(w * dL/dw)^2 / 2: the loss's second-order change with the diagonal of the empirical Fisher matrix as the Hessian.

    grad is the gradient of the batch's mean loss, so averaged over steps this is the batch form of the Fisher matrix, E[g_batch^2],
    not the mean over single examples. LeCun et al. 1990 (Optimal Brain Damage), Theis et al. 2018.
    """
    return (weight * grad).square() / 2


def wanda(weight: Tensor, activation_norm: Tensor) -> Tensor:
    """|w[n, k]| * ||x[:, k]||_2, activation_norm[K] being the norm of each input over tokens. Sun et al. 2024, Wanda."""
    return weight.abs() * activation_norm


def random(weight: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Uniform in [0, 1), the control: what a criterion must beat. Drawn on the CPU, so that a seed means the same everywhere."""
    return torch.rand(weight.shape, generator=generator).to(weight.device)


@dataclass(frozen=True)
class Criterion:
    """A saliency function and what it takes.

    saliency     function of the tensors in `needs`, in that order, to [N, K]
    needs        names out of "weight", "grad", "activation_norm", "generator"
    loss_units   True where saliency estimates a change of the loss, so that layers compare as they are
    article      True for the article's two methods: blocks compare by the mean over their elements, with one threshold
    """

    saliency: Callable[..., Tensor]
    needs: tuple[str, ...]
    loss_units: bool = False
    article: bool = False


CRITERIA: dict[str, Criterion] = {
    "magnitude": Criterion(magnitude, ("weight",)),
    "threshold": Criterion(magnitude, ("weight",), article=True),
    "gradient": Criterion(gradient, ("grad",), article=True),
    "taylor": Criterion(taylor, ("weight", "grad"), loss_units=True),
    "movement": Criterion(movement, ("weight", "grad"), loss_units=True),
    "fisher": Criterion(fisher, ("weight", "grad"), loss_units=True),
    "wanda": Criterion(wanda, ("weight", "activation_norm")),
    "random": Criterion(random, ("weight", "generator")),
}

_REMEDY = {
    "grad": "run a backward pass and pass grad=weight.grad, or use a Pruner, which collects it in training",
    "activation_norm": "pass activation_norm=x.norm(dim=0) for inputs x[M, K], or use a Pruner, which collects it by hooks",
}


def check_criterion(name: str) -> Criterion:
    """The criterion of that name; raises SparsePruneError if there is none."""
    if name not in CRITERIA:
        raise SparsePruneError("criterion", f"one of {', '.join(CRITERIA)}", repr(name), "choose one of these")
    return CRITERIA[name]


def at_least_float32(tensor: Tensor) -> Tensor:
    """tensor detached, in float32 where it had less precision."""
    tensor = tensor.detach()
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def element_saliency(
    weight: Tensor,
    criterion: str = "magnitude",
    *,
    grad: Tensor | None = None,
    activation_norm: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Saliency [N, K] (float32, float64 for a float64 weight) of weight[N, K] under a criterion of CRITERIA.

    grad             [N, K], dL/dW; needed by gradient, taylor, movement, fisher
    activation_norm  [K], norm of each input feature over tokens; needed by wanda
    generator        a CPU generator, for random; None draws from torch's own

    Raises SparsePruneError for an unknown criterion, a missing or misshapen tensor, and NaN or infinite saliency.
    """
    chosen = check_criterion(criterion)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        got = f"a tensor of shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
        raise SparsePruneError("weight", "a matrix [N, K]", got, "pass linear.weight")
    given = {"weight": weight, "grad": grad, "activation_norm": activation_norm}
    shapes = {"grad": tuple(weight.shape), "activation_norm": (weight.shape[1],)}
    arguments: list[Tensor | torch.Generator | None] = []
    for name in chosen.needs:
        if name == "generator":
            arguments.append(generator)
            continue
        tensor = given[name]
        if tensor is None:
            raise SparsePruneError(name, f"a tensor, which criterion {criterion!r} needs", "None", _REMEDY[name])
        if name in shapes and tuple(tensor.shape) != shapes[name]:
            raise SparsePruneError(name, f"shape {shapes[name]}", tuple(tensor.shape), _REMEDY[name])
        arguments.append(at_least_float32(tensor))
    saliency = chosen.saliency(*arguments)
    if saliency.numel() and not torch.isfinite(torch.stack(torch.aminmax(saliency))).all():
        sources = " or ".join(name for name in chosen.needs if name != "generator")
        raise SparsePruneError(
            sources, "finite numbers", "NaN or infinity", "find where training diverged, or lower the learning rate"
        )
    return saliency


def block_mask(
    weight: Tensor,
    blocksize: Sequence[int] = (32, 32),
    density: float = 0.2,
    criterion: str = "magnitude",
    *,
    grad: Tensor | None = None,
    activation_norm: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Keep the blocks of weight[N, K] with the highest saliency: bool [ceil(N/R), ceil(K/C)], True = kept.

    max(1, round(density * blocks)) blocks stay; ties go to the lower index, so equal arguments give equal masks.

    criterion        "magnitude", "threshold", "gradient", "taylor", "movement", "fisher", "wanda" or "random"; see CRITERIA
    grad             [N, K], needed by gradient, taylor, movement and fisher
    activation_norm  [K], needed by wanda
    generator        seeds random

    A block's saliency is the sum over its elements. Under "threshold" and "gradient" it is their mean, so that the same blocks stay
    as by `threshold_mask`, the article's rule, with the alpha that `find_alpha` bisects for this density (which keeps or drops ties
    together). The two differ only where an edge cuts blocks.

    Raises SparsePruneError for a density outside (0, 1], a block that cannot fit, a missing tensor, or NaN.
    """
    check_density(density)
    saliency = element_saliency(weight, criterion, grad=grad, activation_norm=activation_norm, generator=generator)
    of_block = block_mean if CRITERIA[criterion].article else block_sum
    return top_mask(of_block(saliency, check_blocksize(blocksize, weight.shape)), density)


def granularity_blocksize(
    granularity: str, shape: Sequence[int], blocksize: Sequence[int] = (32, 32), head_dim: int | None = None
) -> tuple[int, int]:
    """Block size of a granularity for a weight of shape (N, K): (1, 1), blocksize, (1, K), (N, 1), or (head_dim, K) for "head".

    Raises SparsePruneError for another name, and for "head" without a head_dim that divides N.
    """
    n, k = shape
    if granularity == "head":
        if not head_dim or n % head_dim:
            raise SparsePruneError("head_dim", f"a divisor of {n} rows", head_dim, "pass the size of one head")
        return head_dim, k
    r, c = blocksize
    sizes = {"element": (1, 1), "block": (r, c), "row": (1, k), "column": (n, 1)}
    if granularity not in sizes:
        raise SparsePruneError("granularity", f"one of {', '.join(GRANULARITIES)}", granularity, "choose one of these")
    return sizes[granularity]


def _article_terms(
    weight: Tensor, grad: Tensor | None, on: str, relative_to: str, blocksize: Sequence[int], reference: float | None
) -> tuple[Tensor, float]:
    """Mean over each block of what is compared, and the maximum that alpha multiplies."""
    for name, value in (("on", on), ("relative_to", relative_to)):
        if value not in ("weight", "grad"):
            raise SparsePruneError(name, '"weight" or "grad"', repr(value), "choose one of the two")
    criterion = {"weight": "threshold", "grad": "gradient"}
    saliency = element_saliency(weight, criterion[on], grad=grad)
    values = block_mean(saliency, check_blocksize(blocksize, weight.shape))
    if reference is None:
        reference = float(element_saliency(weight, criterion[relative_to], grad=grad).max())
    return values, reference


def threshold_mask(
    weight: Tensor,
    grad: Tensor | None,
    alpha: float,
    on: str = "weight",
    relative_to: str = "grad",
    blocksize: Sequence[int] = (1, 1),
    reference: float | None = None,
) -> Tensor:
    """The article's rule: keep where |v| >= alpha * max|r|, as bool [ceil(N/R), ceil(K/C)].

    on="weight"          threshold pruning, v = W
    on="grad"            gradient-based pruning, v = dL/dW
    relative_to="grad"   r = dL/dW, the article's threshold alpha * max|grad L|
    relative_to="weight" r = W, the same rule on the weights' own scale
    blocksize            blocks are compared by the mean of |v| over their elements; (1, 1) is the article's own case
    reference            max|r|, where it is taken over more than this weight, such as the whole model

    With alpha = 0 all is kept. With a large alpha nothing may be left; a packed layer then gives only its bias.
    Raises SparsePruneError for a negative alpha, a missing gradient, or NaN.
    """
    if not alpha >= 0:
        raise SparsePruneError("alpha", "a number of at least 0", alpha, "use find_alpha to get it from a density")
    values, reference = _article_terms(weight, grad, on, relative_to, blocksize, reference)
    return values >= alpha * reference


@dataclass(frozen=True)
class AlphaSearch:
    """What find_alpha found: alpha, the density it gives, and the reachable densities next to the wanted one.

    reachable is (at most wanted, at least wanted); the two differ from it where values tie or are too few.
    """

    alpha: float
    density: float
    reachable: tuple[float, float]


def find_alpha(
    weight: Tensor,
    grad: Tensor | None,
    density: float,
    on: str = "weight",
    relative_to: str = "grad",
    blocksize: Sequence[int] = (1, 1),
    reference: float | None = None,
) -> AlphaSearch:
    """Bisect alpha until threshold_mask keeps `density` of the blocks, or the reachable density nearest to it.

    The density falls in steps as alpha grows, and tied values fall together, so some densities do not exist; `reachable` gives the
    neighbours. At least one block is always kept. Arguments as in threshold_mask; raises SparsePruneError also when max|r| is 0.
    """
    values, reference = _article_terms(weight, grad, on, relative_to, blocksize, reference)
    if reference <= 0:
        raise SparsePruneError(
            relative_to,
            "a nonzero entry",
            "all zeros",
            "a threshold relative to 0 prunes nothing: check the backward pass",
        )

    return bisect_alpha(values, reference, density)


def bisect_alpha(values: Tensor, reference: float, density: float, elements: Tensor | None = None) -> AlphaSearch:
    """find_alpha on block means, of one weight or of many: values >= alpha * reference keeps `density` of the blocks.

    elements  float64, as many as values: how much each block counts; None: all alike
    """
    check_density(density)
    sizes = torch.ones_like(values, dtype=torch.float64) if elements is None else elements

    def kept(alpha: float) -> float:
        return float(sizes[values >= alpha * reference].sum() / sizes.sum())

    low, high = 0.0, float(values.max()) / reference * 2 + 1.0  # everything, and nothing, is kept
    while kept(low) > density:
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if kept(middle) >= density:
            low = middle
        else:
            high = middle
    above, below = kept(low), kept(high)
    if below == 0.0 or above - density <= density - below:
        return AlphaSearch(low, above, (above if above == density else below, above))
    return AlphaSearch(high, below, (below, above))
