"""Criteria and masks against plain definitions, and the article's rule."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_prune.criteria import (
    CRITERIA,
    AlphaSearch,
    block_mask,
    element_saliency,
    find_alpha,
    granularity_blocksize,
    threshold_mask,
)
from sparse_prune.errors import SparsePruneError

N, K, HEAD = 12, 10, 4


def tensors(seed: int = 0, n: int = N, k: int = K) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator, dtype=torch.float64)
    grad = torch.randn(n, k, generator=generator, dtype=torch.float64)
    return {"weight": weight, "grad": grad, "activation_norm": torch.rand(k, generator=generator, dtype=torch.float64)}


def plain_saliency(name: str, t: dict[str, torch.Tensor]) -> list[list[float]]:
    """Every criterion once more, one number at a time."""
    formulas = {
        "magnitude": lambda w, g, x: abs(w),
        "threshold": lambda w, g, x: abs(w),
        "gradient": lambda w, g, x: abs(g),
        "taylor": lambda w, g, x: abs(w * g),
        "movement": lambda w, g, x: -w * g,
        "fisher": lambda w, g, x: 0.5 * g * g * w * w,
        "wanda": lambda w, g, x: abs(w) * x,
    }
    n, k = t["weight"].shape
    w, g, x = t["weight"].tolist(), t["grad"].tolist(), t["activation_norm"].tolist()
    return [[formulas[name](w[i][j], g[i][j], x[j]) for j in range(k)] for i in range(n)]


def plain_mask(
    saliency: list[list[float]], blocksize: tuple[int, int], density: float, by_mean: bool = False
) -> torch.Tensor:
    """Blocks by sum or mean, best first, with Python's sort."""
    n, k = len(saliency), len(saliency[0])
    rows, cols = math.ceil(n / blocksize[0]), math.ceil(k / blocksize[1])
    blocks: dict[tuple[int, int], list[float]] = {}
    for i in range(n):
        for j in range(k):
            blocks.setdefault((i // blocksize[0], j // blocksize[1]), []).append(saliency[i][j])
    order = sorted((-sum(block) / (len(block) if by_mean else 1), *place) for place, block in blocks.items())
    mask = torch.zeros(rows, cols, dtype=torch.bool)
    for _, r, c in order[: max(1, round(density * rows * cols))]:
        mask[r, c] = True
    return mask


@pytest.mark.parametrize("criterion", sorted(set(CRITERIA) - {"random"}))
def test_every_criterion_element_by_element(criterion):
    t = tensors()
    given = {name: t[name] for name in ("grad", "activation_norm") if name in CRITERIA[criterion].needs}
    expected = torch.tensor(plain_saliency(criterion, t), dtype=torch.float64)
    torch.testing.assert_close(element_saliency(t["weight"], criterion, **given), expected)


@pytest.mark.parametrize("granularity", ["element", "block", "row", "column", "head"])
@pytest.mark.parametrize("criterion", sorted(set(CRITERIA) - {"random"}))
@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
def test_every_criterion_at_every_granularity(criterion, granularity, density):
    t = tensors()
    blocksize = granularity_blocksize(granularity, (N, K), (5, 3), HEAD)
    given = {name: t[name] for name in ("grad", "activation_norm") if name in CRITERIA[criterion].needs}
    mask = block_mask(t["weight"], blocksize, density, criterion, **given)
    article = criterion in ("threshold", "gradient")
    assert torch.equal(mask, plain_mask(plain_saliency(criterion, t), blocksize, density, by_mean=article))
    if article:  # the same blocks, cut ones among them, as by the alpha that bisection finds
        rule = {"on": "weight" if criterion == "threshold" else "grad", "blocksize": blocksize}
        alpha = find_alpha(t["weight"], t["grad"], density, **rule).alpha
        assert torch.equal(mask, threshold_mask(t["weight"], t["grad"], alpha, **rule))


def test_granularities_are_block_sizes():
    shape = (64, 48)
    sizes = {g: granularity_blocksize(g, shape, (32, 16), 8) for g in ("element", "block", "row", "column", "head")}
    assert sizes == {"element": (1, 1), "block": (32, 16), "row": (1, 48), "column": (64, 1), "head": (8, 48)}


@pytest.mark.parametrize(("granularity", "head_dim"), [("heads", 4), ("head", None), ("head", 5)])
def test_bad_granularity(granularity, head_dim):
    with pytest.raises(SparsePruneError, match="granularity|head_dim"):
        granularity_blocksize(granularity, (8, 8), (2, 2), head_dim)


def test_random_is_seeded_and_even():
    weight = torch.ones(64, 64)
    masks = [block_mask(weight, (1, 1), 0.25, "random", generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert all(mask.sum() == 1024 for mask in masks)
    assert 0.15 < masks[0][:32].float().mean() < 0.35


@pytest.mark.parametrize(
    ("criterion", "missing"),
    [("gradient", "grad"), ("taylor", "grad"), ("movement", "grad"), ("fisher", "grad"), ("wanda", "activation_norm")],
)
def test_missing_tensors_are_named(criterion, missing):
    with pytest.raises(
        SparsePruneError, match=f"^{missing}: expected a tensor, which criterion '{criterion}' needs, got None; "
    ):
        block_mask(torch.ones(4, 4), (2, 2), 0.5, criterion)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"criterion": "best"}, "^criterion: .*'best'"),
        ({"density": 0.0}, "^density"),
        ({"density": 1.5}, "^density"),
        ({"blocksize": (0, 2)}, "^blocksize"),
        ({"blocksize": (64, 64)}, "^blocksize.*fits"),
        ({"weight": torch.ones(4)}, r"^weight: expected a matrix \[N, K\]"),
        ({"weight": torch.full((4, 4), math.nan)}, "^weight: expected finite numbers"),
        ({"criterion": "taylor", "grad": torch.full((4, 4), math.inf)}, "^weight or grad: expected finite"),
        ({"criterion": "taylor", "grad": torch.ones(4, 3)}, r"^grad: expected shape \(4, 4\)"),
        ({"criterion": "wanda", "activation_norm": torch.ones(3)}, r"^activation_norm: expected shape \(4,\)"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"weight": torch.ones(4, 4), "blocksize": (2, 2), "density": 0.5, "criterion": "magnitude"} | change
    with pytest.raises(SparsePruneError, match=message):
        block_mask(arguments.pop("weight"), **arguments)


def test_low_precision_sums_in_float32():
    weight = torch.full((64, 64), 1.0, dtype=torch.bfloat16)
    assert element_saliency(weight, "taylor", grad=weight).dtype == torch.float32
    weight[0, 0] = 1.0078125  # one part in 128, lost if 1024 of them were summed in bf16
    assert block_mask(weight, (32, 32), 0.25)[0, 0]


@pytest.mark.parametrize("on", ["weight", "grad"])
@pytest.mark.parametrize("relative_to", ["weight", "grad"])
@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 1.0, 3.0])
def test_articles_rule(on, relative_to, alpha):
    t = tensors(3)
    threshold = alpha * max(abs(v) for row in t[relative_to].tolist() for v in row)
    expected = [[abs(v) >= threshold for v in row] for row in t[on].tolist()]
    assert threshold_mask(t["weight"], t["grad"], alpha, on, relative_to).tolist() == expected


def test_articles_rule_by_hand():
    weight, grad = torch.tensor([[0.5, -0.3], [0.1, -1.0]]), torch.tensor([[0.2, -0.8], [0.4, 0.1]])
    assert threshold_mask(weight, grad, 0.5).tolist() == [[True, False], [False, True]]  # |w| >= .4
    assert threshold_mask(weight, grad, 0.5, on="grad").tolist() == [[False, True], [True, False]]  # |g| >= .4
    assert threshold_mask(weight, None, 0.4, relative_to="weight").tolist() == [[True, False], [False, True]]
    assert threshold_mask(weight, grad, 0.5, blocksize=(1, 2)).tolist() == [[True], [True]]  # means .4 and .55
    assert threshold_mask(weight, grad, 0.5, reference=1.2).tolist() == [[False, False], [False, True]]  # |w| >= .6


def test_blocks_of_the_articles_rule_compare_means_also_at_the_edge():
    weight = torch.ones(3, 3)
    weight[2, 2] = 0.5
    assert threshold_mask(weight, None, 0.6, relative_to="weight", blocksize=(2, 2)).tolist() == [
        [True, True],
        [True, False],
    ]


@pytest.mark.parametrize("alpha", [-1.0, math.nan])
def test_bad_alpha(alpha):
    with pytest.raises(SparsePruneError, match="^alpha"):
        threshold_mask(torch.ones(2, 2), torch.ones(2, 2), alpha)


def test_articles_rule_needs_a_gradient():
    with pytest.raises(SparsePruneError, match="^grad: expected a tensor"):
        threshold_mask(torch.ones(2, 2), None, 0.5)
    with pytest.raises(SparsePruneError, match='^on: expected "weight" or "grad"'):
        threshold_mask(torch.ones(2, 2), torch.ones(2, 2), 0.5, on="loss")
    with pytest.raises(SparsePruneError, match="^grad: expected a nonzero entry"):
        find_alpha(torch.ones(2, 2), torch.zeros(2, 2), 0.5)


@pytest.mark.parametrize("on", ["weight", "grad"])
@pytest.mark.parametrize("relative_to", ["weight", "grad"])
@pytest.mark.parametrize("blocksize", [(1, 1), (5, 3)])
@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 0.99, 1.0])
def test_bisection_hits_the_density(on, relative_to, blocksize, density):
    t = tensors(5, 40, 30)
    found = find_alpha(t["weight"], t["grad"], density, on, relative_to, blocksize)
    mask = threshold_mask(t["weight"], t["grad"], found.alpha, on, relative_to, blocksize)
    assert mask.double().mean().item() == pytest.approx(found.density)
    assert mask.sum().item() in {
        max(1, math.floor(density * mask.numel() + 0.5)),
        max(1, round(density * mask.numel())),
    }
    assert (
        found.reachable[0] <= density + 1e-9
        and found.reachable[1] >= density - 1e-9
        or found.density * mask.numel() == 1
    )


def test_bisection_tells_what_ties_allow():
    weight = torch.tensor([[1.0, 1.0, 1.0, 2.0, 2.0, 3.0, 0.0, 0.0]])
    found = find_alpha(weight, None, 0.5, relative_to="weight")
    assert (found.density, found.reachable) == (0.375, (0.375, 0.75))
    assert threshold_mask(weight, None, found.alpha, relative_to="weight").sum() == 3
    exact = find_alpha(weight, None, 0.75, relative_to="weight")
    assert (exact.density, exact.reachable) == (0.75, (0.75, 0.75))
    assert find_alpha(torch.ones(4, 4), None, 0.3, relative_to="weight") == AlphaSearch(
        pytest.approx(1.0), 1.0, (0.0, 1.0)
    )


@given(st.lists(st.integers(-4, 4), min_size=2, max_size=24), st.floats(0.01, 1.0))
def test_bisection_finds_the_nearest_reachable_density(values, density):
    if not any(values):
        return
    weight = torch.tensor([values], dtype=torch.float64)
    found = find_alpha(weight, None, density, relative_to="weight")
    reachable = {sum(abs(v) >= level for v in values) / len(values) for level in {abs(v) for v in values} | {0}}
    nearest = min(abs(d - density) for d in reachable)
    assert found.density in reachable and abs(found.density - density) <= nearest + 1e-12
    assert threshold_mask(weight, None, found.alpha, relative_to="weight").double().mean().item() == pytest.approx(
        found.density
    )


@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(1, 4), st.floats(0.01, 1.0), st.integers(0, 5)
)
def test_masks_of_integers_with_ties(n, k, r, c, density, seed):
    if r >= n and c >= k:
        r, c = n, k
    weight = torch.randint(-2, 3, (n, k), generator=torch.Generator().manual_seed(seed)).float()
    expected = plain_mask([[abs(v) for v in row] for row in weight.tolist()], (r, c), density)
    assert torch.equal(block_mask(weight, (r, c), density), expected)
