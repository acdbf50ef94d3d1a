"""From examples to batches: tokens, windows of long sentences, and batches of similar length."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from ..distill import IGNORED_LABEL
from .data import Example, by_kind

SENTENCE_ENDS, PAUSES = frozenset("。！？；!?;"), frozenset("，、：,:)）》」”")


@dataclass
class EncodedSet(torch.utils.data.Dataset):
    """Tokenized examples.

    rows     one dict a window: input_ids (list of int), labels (int for a text, list of int for a sentence, IGNORED_LABEL where
             nothing is predicted)
    sources  for each window, the index of its example
    places   for each window of a sentence, the index of the token that each labelled position stands for; a token that the
             tokenizer drops (white space, a control character) has none
    """

    rows: list[dict] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    places: list[list[int]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.rows[index]

    @property
    def lengths(self) -> list[int]:
        """Tokens in each window."""
        return [len(row["input_ids"]) for row in self.rows]


def encode(tokenizer, examples: Sequence[Example], labels: Sequence[str], max_length: int) -> EncodedSet:
    """Token ids and label ids of examples, at most max_length tokens a row.

    A text is cut at max_length. A sentence is cut into windows, after the last sentence end that fits (else the last pause, else
    where the window is full), so that every token gets a prediction; the label sits on a token's first piece. Where a
    space is part of the word behind it (RoBERTa, GPT-2), the tokenizer gets the tokens as a text would write them.
    """
    index = {label: i for i, label in enumerate(labels)}
    texts, sentences = by_kind(examples)
    if texts:
        ids = tokenizer([e.text for e in texts], truncation=True, max_length=max_length)["input_ids"]
        rows = [{"input_ids": row, "labels": index[e.label]} for row, e in zip(ids, texts, strict=True)]
        return EncodedSet(rows, list(range(len(rows))))
    budget = max_length - tokenizer.num_special_tokens_to_add()
    encoded, windows, tags, starts = EncodedSet(), [], [], []
    write = spaced if _wants_spaces(tokenizer) else list
    written = [write(e.tokens) for e in sentences]
    counts = _piece_counts(tokenizer, written)
    for source, (example, words, pieces) in enumerate(zip(sentences, written, counts, strict=True)):
        for start, stop in cut_windows(example.tokens, pieces, budget):
            windows.append(words[start:stop])
            tags.append(example.tags[start:stop])
            encoded.sources.append(source)
            starts.append(start)
    batch = tokenizer(windows, is_split_into_words=True, truncation=True, max_length=max_length)
    for i, window_tags in enumerate(tags):
        row, places, previous = [], [], None
        for word in batch.word_ids(i):
            if word is None or word == previous:
                row.append(IGNORED_LABEL)
            else:
                row.append(index[window_tags[word]])
                places.append(starts[i] + word)
            previous = word
        encoded.rows.append({"input_ids": batch["input_ids"][i], "labels": row})
        encoded.places.append(places)
    return encoded


def cut_windows(tokens: Sequence[str], pieces: Sequence[int], budget: int) -> Iterator[tuple[int, int]]:
    """Spans (start, stop) that cover tokens in order, each of at most `budget` pieces (or one token that has more)."""
    start = 0
    while start < len(tokens):
        stop, used = start, 0
        while stop < len(tokens) and (used + pieces[stop] <= budget or stop == start):
            used += pieces[stop]
            stop += 1
        if stop < len(tokens):
            least = start + (stop - start) // 3
            for ends in (SENTENCE_ENDS, PAUSES):
                cut = next((i + 1 for i in range(stop - 1, least, -1) if tokens[i] in ends), None)
                if cut:
                    stop = cut
                    break
        yield start, stop
        start = stop


def spaced(tokens: Sequence[str]) -> list[str]:
    """Tokens with the space that a reader writes before them: words with one, single characters without, as in Chinese corpora."""
    parts = [*tokens[:1]]
    for before, token in pairwise(tokens):
        wide = any(unicodedata.east_asian_width(character) in "WF" for character in (before[-1], token[0]))
        parts.append(token if wide or len(before) == len(token) == 1 else f" {token}")
    return parts


def _wants_spaces(tokenizer) -> bool:
    """Whether a space is part of the word behind it, as for RoBERTa and GPT-2, so that words given without run together."""

    def ids(text: str | list[str]) -> list[int]:
        return tokenizer(text, is_split_into_words=isinstance(text, list), add_special_tokens=False)["input_ids"]

    return ids(["a", "b"]) != ids("a b") == ids(["a", " b"])


def _piece_counts(tokenizer, sentences: Sequence[Sequence[str]]) -> Iterator[list[int]]:
    """Pieces that each token of each sentence becomes."""
    distinct = sorted({token for tokens in sentences for token in tokens})
    ids = tokenizer(
        [[token] for token in distinct], is_split_into_words=True, add_special_tokens=False, truncation=False
    )["input_ids"]
    counts = {token: len(pieces) for token, pieces in zip(distinct, ids, strict=True)}
    for tokens in sentences:
        yield [counts[token] for token in tokens]


@dataclass
class Collator:
    """Rows padded to the longest of their batch: input_ids, attention_mask and labels, int64 [B, T] (labels of texts: [B])."""

    pad_token_id: int

    def __call__(self, rows: Sequence[dict]) -> dict[str, Tensor]:
        length = max(len(row["input_ids"]) for row in rows)

        def padded(key: str, value: int) -> Tensor:
            return torch.tensor([row[key] + [value] * (length - len(row[key])) for row in rows])

        sizes = torch.tensor([len(row["input_ids"]) for row in rows])
        mask = (torch.arange(length)[None, :] < sizes[:, None]).long()
        whole = isinstance(rows[0]["labels"], int)
        labels = torch.tensor([row["labels"] for row in rows]) if whole else padded("labels", IGNORED_LABEL)
        return {"input_ids": padded("input_ids", self.pad_token_id), "attention_mask": mask, "labels": labels}


class LengthBatches(torch.utils.data.Sampler[list[int]]):
    """Batches of rows of similar length, a new order each epoch: pools of some batches are sorted by length, batches are shuffled.

    The order follows from seed and epoch alone, so a resumed run sees what the interrupted one would have seen.
    """

    POOL = 25  # batches sorted together: little padding, and still new company every epoch

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int | None) -> None:
        """seed None keeps the order by length, longest first: for prediction."""
        self.lengths, self.batch_size, self.seed, self.epoch = list(lengths), batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order, size = list(range(len(self.lengths))), self.batch_size
        if self.seed is None:
            order.sort(key=lambda i: -self.lengths[i])
            yield from (order[i : i + size] for i in range(0, len(order), size))
            return
        generator = random.Random(f"{self.seed}/{self.epoch}")
        generator.shuffle(order)
        batches = []
        for start in range(0, len(order), size * self.POOL):
            pool = sorted(order[start : start + size * self.POOL], key=lambda i: self.lengths[i])
            batches += [pool[i : i + size] for i in range(0, len(pool), size)]
        generator.shuffle(batches)
        yield from batches
