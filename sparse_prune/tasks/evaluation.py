"""Predictions and scores: accuracy for texts, strict entity F1 (seqeval, IOB2) for sentences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from ..distill import IGNORED_LABEL
from .data import Example, TagExample, TextExample, bio_problem, by_kind
from .encoding import Collator, EncodedSet, LengthBatches, encode
from .models import check_ids


@dataclass(frozen=True)
class Score:
    """How good predictions are.

    name       "accuracy" or "f1"
    value      in [0, 1]
    per_class  class or entity type -> (support, score): recall of a class, F1 of an entity type
    """

    name: str
    value: float
    per_class: dict[str, tuple[int, float]]


def predict(
    model: PreTrainedModel,
    tokenizer,
    examples: Sequence[Example],
    max_length: int,
    batch_size: int = 64,
    *,
    autocast: bool = False,
    report: Callable[[int, int], None] | None = None,
) -> list[str] | list[list[str]]:
    """A label per text, or a BIO tag per token; the labels of examples are not read. autocast runs the model in bf16.

    report(done, of) is told after each batch.
    """
    labels = label_names(model)
    texts, sentences = by_kind(examples)
    blank: list[Example] = [TextExample(e.text, labels[0]) for e in texts]
    blank += [TagExample(e.tokens, (labels[0],) * len(e.tokens)) for e in sentences]
    data = encode(tokenizer, blank, labels, max_length)
    check_ids(model, data.rows, tokenizer.pad_token_id)
    rows = predict_rows(model, data, tokenizer.pad_token_id, batch_size, autocast=autocast, report=report)
    if texts:
        return [labels[row] for row in rows]
    tags = [["O"] * len(e.tokens) for e in sentences]
    for source, places, row in zip(data.sources, data.places, rows, strict=True):
        for place, label in zip(places, row, strict=True):
            tags[source][place] = labels[label]
    return tags


def predict_rows(
    model: PreTrainedModel,
    data: EncodedSet,
    pad_token_id: int,
    batch_size: int = 64,
    *,
    autocast: bool = False,
    report: Callable[[int, int], None] | None = None,
) -> list:
    """The label id of each row, or the label ids at each row's labelled positions, in the order of data.

    Tags are decoded together: the likeliest sequence among those that are BIO, taking tokens as independent otherwise.
    """
    batches = LengthBatches(data.lengths, batch_size, None)
    loader = DataLoader(data, batch_sampler=batches, collate_fn=Collator(pad_token_id))
    device = next(model.parameters()).device
    results: list = [None] * len(data)
    allowed = allowed_transitions(label_names(model))
    training = model.training
    model.eval()
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        for number, (indices, batch) in enumerate(zip(batches, loader, strict=True), 1):
            inputs = {key: batch[key].to(device) for key in ("input_ids", "attention_mask")}
            logits = model(**inputs).logits.float().cpu()
            if report:
                report(number, len(batches))
            if logits.dim() == 2:
                for i, label in zip(indices, logits.argmax(-1).tolist(), strict=True):
                    results[i] = label
                continue
            rows = [row[wanted != IGNORED_LABEL] for row, wanted in zip(logits, batch["labels"], strict=True)]
            for i, best in zip(indices, decode_bio(rows, allowed), strict=True):
                results[i] = best
    model.train(training)
    return results


def allowed_transitions(labels: Sequence[str]) -> Tensor:
    """bool [labels + 1, labels]: whether BIO lets a tag follow a tag; the last row is the start of a window."""
    previous = [*labels, "O"]
    return torch.tensor([[bio_problem(before, tag) is None for tag in labels] for before in previous])


def decode_bio(rows: Sequence[Tensor], allowed: Tensor) -> list[list[int]]:
    """The likeliest allowed label ids for each row of logits [T, labels], by Viterbi over all rows at once."""
    lengths = [len(row) for row in rows]
    if not max(lengths, default=0):
        return [[] for _ in rows]
    scores = torch.nn.utils.rnn.pad_sequence([row.log_softmax(-1) for row in rows], batch_first=True)  # [B, T, labels]
    penalty = torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)
    best = scores[:, 0] + penalty[-1]  # [B, labels]
    came_from, finals = [], [best]
    for t in range(1, scores.shape[1]):
        value, source = (best[:, :, None] + penalty[None, :-1]).max(1)  # [B, labels]: over the tag before
        best = value + scores[:, t]
        came_from.append(source)
        finals.append(best)
    paths: list[list[int]] = []
    for b, length in enumerate(lengths):
        if not length:
            paths.append([])
            continue
        label = int(finals[length - 1][b].argmax())
        path = [label]
        for t in range(length - 2, -1, -1):
            label = int(came_from[t][b, label])
            path.append(label)
        paths.append(path[::-1])
    return paths


def score(examples: Sequence[Example], predictions: Sequence) -> Score:
    """Compare predictions (as predict returns them) with the labels of examples."""
    texts, sentences = by_kind(examples)
    if sentences:
        return score_entities([list(e.tags) for e in sentences], predictions)
    right: dict[str, list[bool]] = {}
    for example, prediction in zip(texts, predictions, strict=True):
        right.setdefault(example.label, []).append(example.label == prediction)
    per_class = {label: (len(hits), sum(hits) / len(hits)) for label, hits in sorted(right.items())}
    return Score("accuracy", sum(map(sum, right.values())) / len(examples), per_class)


def score_entities(truth: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]]) -> Score:
    """Strict entity F1, micro-averaged: an entity counts where type and both ends agree (seqeval, mode strict, scheme IOB2)."""
    from seqeval.metrics import classification_report
    from seqeval.scheme import IOB2

    if not any(tag != "O" for tags in truth for tag in tags) and not any(
        t != "O" for tags in predictions for t in tags
    ):
        return Score("f1", 0.0, {})
    report = classification_report(
        [list(t) for t in truth],
        [list(p) for p in predictions],
        mode="strict",
        scheme=IOB2,
        output_dict=True,
        zero_division=0,
    )
    per_class = {
        name: (int(row["support"]), float(row["f1-score"])) for name, row in report.items() if not name.endswith(" avg")
    }
    return Score("f1", float(report["micro avg"]["f1-score"]), per_class)


def label_names(model: PreTrainedModel) -> list[str]:
    """The model's labels in the order of its logits."""
    names: dict[Any, str] = model.config.id2label or {}
    return [names[i] for i in range(len(names))]
