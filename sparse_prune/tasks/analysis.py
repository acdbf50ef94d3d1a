"""What pruning did, as analysis.json: masks, heads, classes, attention, speed and size; report.py draws it."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..benchmark import interleaved_medians, machine
from ..bsr import dtype_name
from ..convert import LayerReport
from ..fuse import fuse_encoder_
from ..report import collect_heads, collect_layers
from .data import Example, TagExample, TextExample, by_kind
from .encoding import encode, spaced
from .evaluation import Score, label_names, predict
from .models import native_bf16

TITLES = {"sentiment": "Sentiment analysis", "ner": "Named entities"}
SHOWN_EXAMPLES = 8
TIMED_SECONDS = 3.0  # for each batch and dtype


def analyse(
    *,
    task: str,
    teacher: PreTrainedModel,
    model: PreTrainedModel,
    packed: PreTrainedModel,
    tokenizer,
    masks: dict[str, Tensor],
    blocksize: tuple[int, int],
    examples: Sequence[Example],
    scores: tuple[Score, Score],
    history: list[dict],
    curve: list[dict],
    latency: list[dict],
    bytes_of: dict[str, int],
    rows: Sequence[LayerReport],
    max_length: int,
) -> dict:
    """The content of analysis.json for one pruned model.

    teacher is the dense model, model its pruned twin in the dense layout, packed the same as SparseLinear; rows says how each layer
    was packed; scores are (dense, sparse) over examples.
    """
    dense_score, sparse_score = scores
    encoder = [row for row in rows if row.name in masks]
    classes = [
        {"name": name, "support": support, "dense": value, "sparse": sparse_score.per_class.get(name, (0, 0.0))[1]}
        for name, (support, value) in dense_score.per_class.items()
    ]
    analysis = {
        "task": task,
        "title": TITLES[task],
        "classes": label_names(model),
        "layers": collect_layers(model, masks, blocksize),
        "per_class": classes,
        "heads": collect_heads(model, masks, blocksize),
        "attention": attention_example(teacher, model, tokenizer, examples, max_length),
        "history": history,
        "curve": curve,
        "examples": _examples(teacher, packed, tokenizer, examples, max_length),
        "machine": machine(),
        "model": {
            "parameters": sum(p.numel() for p in teacher.parameters()),
            "encoder_parameters": sum(math.prod(row.shape) for row in encoder),
            "layers": model.config.num_hidden_layers,
            "hidden": model.config.hidden_size,
        },
        "bytes": {
            "dense_encoder": sum(row.dense_bytes for row in encoder),
            "packed_encoder": sum(row.bytes for row in encoder),
            **bytes_of,
        },
        "throughput": throughput(teacher, packed, tokenizer, examples, max_length),
        "latency": latency,
    }
    return {key: value for key, value in analysis.items() if value not in (None, [], {})}


def attention_example(
    teacher: PreTrainedModel, model: PreTrainedModel, tokenizer, examples: Sequence[Example], max_length: int
) -> list[dict]:
    """Attention weights of the last layer, averaged over heads, on one short example before and after; empty if not on offer."""
    example = next((e for e in examples if 12 <= _length(e) <= 28), min(examples, key=_length))
    if isinstance(example, TagExample):
        _, sentences = by_kind(examples)
        several = (e for e in sentences if 12 <= _length(e) <= 28 and sum(tag[0] == "B" for tag in e.tags) >= 2)
        example = next(several, example)
        label = _told(list(example.tags), example)
    else:
        label = example.label
    ids = torch.tensor([encode(tokenizer, [example], label_names(model), max_length).rows[0]["input_ids"]])
    maps = []
    for net in (teacher, model):
        weights = _attention(net, ids)
        if weights is None:
            return []
        maps.append([[round(value, 4) for value in row] for row in weights.tolist()])
    predictions = [_told(predict(net, tokenizer, [example], max_length)[0], example) for net in (teacher, model)]
    return [
        {
            "tokens": tokenizer.convert_ids_to_tokens(ids[0].tolist()),
            "layer": model.config.num_hidden_layers - 1,
            "head": "mean",
            "dense": maps[0],
            "sparse": maps[1],
            "label": label,
            "dense_prediction": predictions[0],
            "sparse_prediction": predictions[1],
        }
    ]


def _attention(model: PreTrainedModel, ids: Tensor) -> Tensor | None:
    """Weights [T, T] of the last layer, mean over heads, for one row; None where the model gives none."""
    before = model.config._attn_implementation
    model.eval()
    try:
        model.config._attn_implementation = "eager"
        with torch.inference_mode():
            attentions = model(ids, attention_mask=torch.ones_like(ids), output_attentions=True).attentions
    except (AttributeError, NotImplementedError, ValueError, TypeError):
        return None
    finally:
        model.config._attn_implementation = before
    return attentions[-1][0].float().mean(0) if attentions and attentions[-1] is not None else None


def _length(example: Example) -> int:
    return len(example.tokens) if isinstance(example, TagExample) else len(example.text)


def _told(prediction: str | list[str], example: Example) -> str:
    """A class as it is, or the entities of a sentence as `江泽民 PER, 中国 LOC`."""
    if isinstance(prediction, str):
        return prediction
    assert isinstance(example, TagExample)
    entities: list[tuple[list[str], str]] = []
    for token, tag in zip(example.tokens, prediction, strict=True):
        if tag == "O":
            entities.append(([], ""))
        elif tag[0] == "B" or not entities or entities[-1][1] != tag[2:]:
            entities.append(([token], tag[2:]))
        else:
            entities[-1][0].append(token)
    return ", ".join(f"{running_text(tokens)} {kind}" for tokens, kind in entities if kind) or "none"


def running_text(tokens: Sequence[str]) -> str:
    """Tokens as a reader writes them."""
    return "".join(spaced(tokens))


def _examples(
    dense: PreTrainedModel, sparse: PreTrainedModel, tokenizer, examples: Sequence[Example], max_length: int
) -> list[dict]:
    """Some examples with both predictions, those on which the two differ first."""
    some = list(examples[:400])
    pairs = zip(some, *(predict(net, tokenizer, some, max_length) for net in (dense, sparse)), strict=True)
    rows = [
        {
            "text": example.text if isinstance(example, TextExample) else running_text(example.tokens),
            "label": example.label if isinstance(example, TextExample) else _told(list(example.tags), example),
            "dense": _told(before, example),
            "sparse": _told(after, example),
        }
        for example, before, after in pairs
        if _length(example) <= 80
    ]
    differing = [row for row in rows if row["dense"] != row["sparse"]][: SHOWN_EXAMPLES // 2]
    agreeing = [row for row in rows if row["dense"] == row["sparse"] and row["label"] != "none"]
    return differing + agreeing[: SHOWN_EXAMPLES - len(differing)]


def measure_latency(
    dense: PreTrainedModel, sparse: PreTrainedModel, tokenizer, examples: Sequence[Example], max_length: int
) -> list[dict]:
    """Median milliseconds of the model without its head on real text at batch 16 and 1, in turns; fp32 first.

    dense is the model as PyTorch runs it; dense_fused has attention and LayerNorm by our kernels (`fuse_encoder_`), as the sparse
    model has: it tells what sparsity alone gives.
    """
    rows = []
    for dtype in (torch.float32, torch.bfloat16) if native_bf16() else (torch.float32,):
        pair = {"dense": dense, "sparse": sparse}
        nets: dict[str, nn.Module] = {
            name: copy.deepcopy(net).eval().to(dtype).base_model for name, net in pair.items()
        }
        fused = copy.deepcopy(nets["dense"])
        if fuse_encoder_(fused).fused:
            nets["dense_fused"] = fused
        for batch in (16, 1):
            inputs = full_batch(tokenizer, examples, batch, max_length)
            calls = {name: partial(net, **inputs) for name, net in nets.items()}
            with torch.inference_mode():
                times = interleaved_medians(calls, TIMED_SECONDS)
            rows.append(
                {
                    "batch": batch,
                    "length": max_length,
                    "dtype": dtype_name(dtype),
                    **{f"{name}_ms": 1e3 * seconds for name, seconds in times.items()},
                }
            )
    return rows


def full_batch(tokenizer, examples: Sequence[Example], batch: int, length: int) -> dict[str, Tensor]:
    """input_ids and attention_mask [batch, length] of running text without padding, made of examples end to end."""
    stream: list[int] = []
    while len(stream) < batch * length:
        for example in examples:
            text = example.text if isinstance(example, TextExample) else running_text(example.tokens)
            stream += tokenizer(text, truncation=True, max_length=length)["input_ids"]
            if len(stream) >= batch * length:
                break
    ids = torch.tensor(stream[: batch * length]).view(batch, length)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def throughput(
    dense: PreTrainedModel, sparse: PreTrainedModel, tokenizer, examples: Sequence[Example], max_length: int
) -> dict[str, float]:
    """Examples per second, from text to label, batch 64 by length, fp32; the better of two turns each."""
    some = list(examples[:512])
    best = [float("inf"), float("inf")]
    for _ in range(2):
        for i, net in enumerate((dense, sparse)):
            started = time.perf_counter()
            predict(net, tokenizer, some, max_length)
            best[i] = min(best[i], time.perf_counter() - started)
    return {"dense_per_s": len(some) / best[0], "sparse_per_s": len(some) / best[1]}
