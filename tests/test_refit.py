"""refit against torch's least squares, row by row, and what it is for: a smaller output error."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sparse_prune.criteria import block_mask
from sparse_prune.errors import SparsePruneError
from sparse_prune.masks import expand_mask
from sparse_prune.refit import input_grams, refit, refit_


def correlated(samples: int, features: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(features // 2, features, generator=generator, dtype=torch.float64)
    noise = torch.randn(samples, features, generator=generator, dtype=torch.float64)
    return torch.randn(samples, features // 2, generator=generator, dtype=torch.float64) @ mix + 0.3 * noise


@pytest.mark.parametrize("blocksize", [(1, 1), (4, 3), (1, 22), (18, 1), (5, 8)])
def test_is_least_squares(blocksize):
    x, weight = correlated(200, 22), torch.randn(18, 22, dtype=torch.float64)
    mask = block_mask(weight, blocksize, 0.4)
    mask[0] = False  # a block-row with nothing left
    fitted = refit(weight, mask, blocksize, x.T @ x / 200, damping=0.0)
    elements = expand_mask(mask, blocksize, weight.shape)
    assert (fitted[~elements] == 0).all()
    for row in range(18):
        kept = elements[row]
        if kept.any():
            expected = torch.linalg.lstsq(x[:, kept], x @ weight[row][:, None]).solution[:, 0]
            torch.testing.assert_close(fitted[row, kept], expected)


def test_damping_is_a_penalty_on_the_change():
    x, weight = correlated(50, 12), torch.randn(6, 12, dtype=torch.float64)
    gram = x.T @ x / 50
    mask = block_mask(weight, (3, 4), 0.5)
    elements = expand_mask(mask, (3, 4), weight.shape)
    free = torch.where(elements, weight, 0.0).requires_grad_()
    penalty = 0.1 * gram.diagonal().mean()
    with torch.no_grad():
        free.copy_(refit(weight, mask, (3, 4), gram, damping=0.1))
    change = free - weight
    ((change @ gram * change).sum() + penalty * change.square().sum()).backward()
    assert free.grad[elements].abs().max() < 1e-9


def test_keeps_all_and_nothing():
    weight, gram = torch.randn(8, 8), torch.eye(8)
    torch.testing.assert_close(refit(weight, torch.ones(2, 2, dtype=torch.bool), (4, 4), gram), weight)
    assert (refit(weight, torch.zeros(2, 2, dtype=torch.bool), (4, 4), gram) == 0).all()


def test_independent_inputs_leave_the_weights():
    weight, mask = torch.randn(8, 8), torch.tensor([[True, False], [False, True]])
    expected = weight * expand_mask(mask, (4, 4), weight.shape)
    torch.testing.assert_close(refit(weight, mask, (4, 4), 3 * torch.eye(8)), expected)


def test_a_model_comes_closer_to_its_dense_self():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32))
    x = correlated(600, 64).float()
    dense = model(x).detach()
    masks = {name: block_mask(model.get_submodule(name).weight, (8, 8), 0.5) for name in ("0", "2")}
    with input_grams(model, masks) as grams:
        model(x[:200].view(10, 20, 64))
        model(x[200:400])
    torch.testing.assert_close(grams["0"], x[:400].T @ x[:400] / 400)
    assert not model[0]._forward_pre_hooks
    plain = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32))
    plain.load_state_dict(model.state_dict())
    for name, mask in masks.items():
        layer = plain.get_submodule(name)
        layer.weight.data *= expand_mask(mask, (8, 8), layer.weight.shape)
    refit_(model, masks, (8, 8), grams)
    held_out = slice(400, 600)
    errors = [(m(x[held_out]) - dense[held_out]).norm().item() for m in (model, plain)]
    assert errors[0] < 0.7 * errors[1]


def test_low_precision_weights_keep_their_dtype():
    weight = torch.randn(8, 8).bfloat16()
    assert refit(weight, torch.ones(2, 2, dtype=torch.bool), (4, 4), torch.eye(8)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gram": torch.eye(7)}, r"^gram: expected shape \(8, 8\)"),
        ({"gram": torch.full((8, 8), math.nan)}, "^gram: expected finite"),
        ({"gram": torch.ones(8, 8), "damping": 0.0}, "^gram: expected a positive definite matrix"),
        ({"damping": -1.0}, "^damping"),
        ({"mask": torch.ones(2, 3, dtype=torch.bool)}, "^block_mask"),
    ],
)
def test_refuses(change, message):
    given = {"mask": torch.ones(2, 2, dtype=torch.bool), "blocksize": (4, 4), "gram": torch.eye(8)} | change
    with pytest.raises(SparsePruneError, match=message):
        refit(torch.randn(8, 8), **given)


def test_a_missing_gram():
    with pytest.raises(SparsePruneError, match="^grams: expected the gram of 0"):
        refit_(nn.Sequential(nn.Linear(4, 4)), {"0": torch.ones(2, 2, dtype=torch.bool)}, (2, 2), {})
