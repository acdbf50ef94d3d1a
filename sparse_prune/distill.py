"""Losses that let a pruned model learn from the dense one it came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import SparsePruneError

__all__ = ["DistillConfig", "distillation_loss", "hidden_loss"]
IGNORED_LABEL = -100  # of a token that no loss counts, as in torch and transformers


@dataclass(frozen=True)
class DistillConfig:
    """loss = (1 - logits_weight) * task loss + logits_weight * distillation_loss + hidden_weight * hidden_loss.

    Hidden states need time. `sparse-prune prune` takes hidden_weight 1, with nn.Dropout off in the student, and gains by the
    two over its runs (docs/prune-your-model.md). In a tenth of an epoch they harm: Garlic for entities, pruned by magnitude,
    has 79.4 (F1) with labels only, 79.3 with the defaults and dropout, and 70.9 so.

    temperature    T > 0; higher shows the student more of the teacher's second choices
    logits_weight  in [0, 1]
    hidden_weight  at least 0; 0 needs no hidden states
    """

    temperature: float = 1.0
    logits_weight: float = 0.5
    hidden_weight: float = 0.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise SparsePruneError("temperature", "a number above 0", self.temperature, "pass for example 1.0")
        if not 0 <= self.logits_weight <= 1:
            raise SparsePruneError("logits_weight", "a number in [0, 1]", self.logits_weight, "pass for example 0.5")
        if not self.hidden_weight >= 0:
            raise SparsePruneError(
                "hidden_weight", "a number of at least 0", self.hidden_weight, "pass 0 to leave it out"
            )


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 2.0,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)), mean over rows; a float32 scalar. Hinton et al. 2015.

    student_logits, teacher_logits  [..., classes]; no gradient flows into the teacher
    mask    [...], True or nonzero where a row counts, such as an attention mask
    labels  [...], rows with label -100 do not count

    Without a row that counts the loss is 0. Raises SparsePruneError where shapes differ.
    """
    _same_shape("teacher_logits", teacher_logits, student_logits)
    if not temperature > 0:
        raise SparsePruneError("temperature", "a number above 0", temperature, "pass for example 2.0")
    shape = student_logits.shape[:-1]
    counted = torch.ones(shape, dtype=torch.bool, device=student_logits.device)
    for name, condition in (("mask", mask), ("labels", labels)):
        if condition is not None:
            if condition.shape != shape:
                raise SparsePruneError(
                    name, f"shape {tuple(shape)}, one entry a row", tuple(condition.shape), "match the logits"
                )
            counted = counted & (condition.bool() if name == "mask" else condition != IGNORED_LABEL)
    student = F.log_softmax(student_logits[counted].float() / temperature, -1)  # [rows, classes]
    teacher = F.log_softmax(teacher_logits.detach()[counted].float() / temperature, -1)  # [rows, classes]
    total = F.kl_div(student, teacher, reduction="sum", log_target=True)
    return temperature**2 * total / max(1, student.shape[0])


def hidden_loss(
    student_hiddens: Sequence[Tensor], teacher_hiddens: Sequence[Tensor], attention_mask: Tensor | None = None
) -> Tensor:
    """Mean over layers of ||s - t||^2 / ||t||^2, squared errors over the counted tokens relative to the teacher's size; a scalar.

    student_hiddens, teacher_hiddens  as many [B, T, H] each, such as output_hidden_states gives
    attention_mask                    [B, T], nonzero at tokens that count

    It is the mean squared error with each layer's scale taken out (1 = as wrong as a student of zeros), so that one weight suits
    every model and layer. Raises SparsePruneError where shapes or the number of layers differ.
    """
    if len(student_hiddens) != len(teacher_hiddens) or not student_hiddens:
        raise SparsePruneError(
            "teacher_hiddens",
            f"as many layers as the student's {len(student_hiddens)}, at least one",
            len(teacher_hiddens),
            "distil from the dense model that the student came from",
        )
    tokens = student_hiddens[0].shape[:-1]
    if attention_mask is not None and attention_mask.shape != tokens:
        raise SparsePruneError(
            "attention_mask", f"shape {tuple(tokens)}", tuple(attention_mask.shape), "match the hidden states"
        )
    counted = slice(None) if attention_mask is None else attention_mask.bool()
    total = student_hiddens[0].new_zeros((), dtype=torch.float32)
    for student, teacher in zip(student_hiddens, teacher_hiddens, strict=True):
        _same_shape("teacher_hiddens", teacher, student)
        student, teacher = student[counted].float(), teacher.detach()[counted].float()
        total = total + (student - teacher).square().sum() / teacher.square().sum().clamp_min(1e-12)
    return total / len(student_hiddens)


def _same_shape(argument: str, got: Tensor, like: Tensor) -> None:
    if got.shape != like.shape:
        raise SparsePruneError(
            argument,
            f"shape {tuple(like.shape)}, the student's",
            tuple(got.shape),
            "use the same batch and classes for both",
        )
