"""Distillation losses against torch's definitions and numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from sparse_prune.distill import DistillConfig, distillation_loss, hidden_loss
from sparse_prune.errors import SparsePruneError


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_logits_against_torch(temperature):
    student, teacher = torch.randn(7, 5), torch.randn(7, 5)
    expected = temperature**2 * F.kl_div(
        F.log_softmax(student / temperature, -1), F.softmax(teacher / temperature, -1), reduction="batchmean"
    )
    torch.testing.assert_close(distillation_loss(student, teacher, temperature), expected)


def test_logits_by_hand():
    # Teacher (3/4, 1/4) at T = 2, student (1/2, 1/2): KL = 3/4 ln(3/2) + 1/4 ln(1/2), times T^2 = 4.
    teacher = torch.tensor([[2 * math.log(3.0), 0.0]])
    expected = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert distillation_loss(torch.zeros(1, 2), teacher, 2.0).item() == pytest.approx(expected, rel=1e-6)
    assert distillation_loss(teacher, teacher, 2.0).item() == pytest.approx(0.0, abs=1e-7)


def test_tokens_that_do_not_count():
    student, teacher = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    attention = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    labels = torch.tensor([[-100, 2, 1, -100], [0, -100, -100, 1]])
    rows = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    for kept, given in ((rows, {"mask": attention}), ([(0, 1), (0, 2), (1, 0)], {"mask": attention, "labels": labels})):
        picked = [torch.stack([logits[i] for i in kept]) for logits in (student, teacher)]
        torch.testing.assert_close(distillation_loss(student, teacher, 2.0, **given), distillation_loss(*picked, 2.0))


def test_padding_may_hold_anything():
    student = torch.randn(2, 3, requires_grad=True)
    teacher = torch.tensor([[1.0, 2.0, 3.0], [math.nan] * 3])
    distillation_loss(student, teacher, mask=torch.tensor([True, False])).backward()
    assert torch.isfinite(student.grad).all() and (student.grad[1] == 0).all()


def test_nothing_counts():
    assert distillation_loss(torch.randn(2, 3), torch.randn(2, 3), labels=torch.tensor([-100, -100])).item() == 0.0


def test_teacher_gets_no_gradient():
    student, teacher = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    hidden = [torch.randn(2, 3, 4, requires_grad=True) for _ in range(2)]
    (distillation_loss(student, teacher) + hidden_loss(hidden[:1], hidden[1:])).backward()
    assert (
        teacher.grad is None
        and hidden[1].grad is None
        and student.grad.abs().sum() > 0
        and hidden[0].grad.abs().sum() > 0
    )


def test_hidden_against_torch():
    student, teacher = ([torch.randn(2, 5, 8) * (layer + 1) for layer in range(3)] for _ in range(2))
    expected = sum(F.mse_loss(s, t) / t.square().mean() for s, t in zip(student, teacher, strict=True)) / 3
    torch.testing.assert_close(hidden_loss(student, teacher), expected)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
    kept = mask.bool()
    expected = (
        sum(F.mse_loss(s[kept], t[kept]) / t[kept].square().mean() for s, t in zip(student, teacher, strict=True)) / 3
    )
    torch.testing.assert_close(hidden_loss(student, teacher, mask), expected)


def test_hidden_by_hand():
    teacher = torch.tensor([[[3.0, 4.0]]])
    assert hidden_loss([torch.zeros(1, 1, 2)], [teacher]).item() == pytest.approx(1.0)
    assert hidden_loss([torch.tensor([[[3.0, 3.0]]])], [teacher]).item() == pytest.approx(1 / 25)
    assert hidden_loss([teacher], [teacher]).item() == 0.0
    assert hidden_loss([torch.zeros(1, 1, 2)], [torch.zeros(1, 1, 2)]).item() == 0.0


def test_bfloat16_is_computed_in_float32():
    student, teacher = torch.randn(4, 3).bfloat16(), torch.randn(4, 3).bfloat16()
    loss = distillation_loss(student, teacher)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, distillation_loss(student.float(), teacher.float()))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: distillation_loss(torch.ones(2, 3), torch.ones(2, 4)), "^teacher_logits: expected shape"),
        (lambda: distillation_loss(torch.ones(2, 3), torch.ones(2, 3), 0.0), "^temperature"),
        (lambda: distillation_loss(torch.ones(2, 3), torch.ones(2, 3), mask=torch.ones(3)), "^mask: expected shape"),
        (
            lambda: distillation_loss(torch.ones(2, 3), torch.ones(2, 3), labels=torch.ones(3)),
            "^labels: expected shape",
        ),
        (lambda: hidden_loss([torch.ones(1, 2, 3)], []), "^teacher_hiddens: expected as many layers"),
        (lambda: hidden_loss([], []), "^teacher_hiddens"),
        (lambda: hidden_loss([torch.ones(1, 2, 3)], [torch.ones(1, 2, 4)]), "^teacher_hiddens: expected shape"),
        (lambda: hidden_loss([torch.ones(1, 2, 3)], [torch.ones(1, 2, 3)], torch.ones(1, 3)), "^attention_mask"),
        (lambda: DistillConfig(temperature=0), "^temperature"),
        (lambda: DistillConfig(logits_weight=1.1), "^logits_weight"),
        (lambda: DistillConfig(hidden_weight=-1), "^hidden_weight"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(SparsePruneError, match=message):
        call()
