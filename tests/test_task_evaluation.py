"""Windows, batches, decoding and scores."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers")
from transformers import RobertaTokenizer

from sparse_prune.distill import IGNORED_LABEL
from sparse_prune.tasks.data import TagExample, TextExample, bio_problem
from sparse_prune.tasks.encoding import Collator, LengthBatches, cut_windows, encode
from sparse_prune.tasks.evaluation import allowed_transitions, decode_bio, score, score_entities

TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


@given(st.lists(st.sampled_from("中国，。x"), max_size=60), st.integers(1, 12), st.integers(1, 3))
def test_windows_cover_every_token_once_within_budget(tokens, budget, pieces):
    spans = list(cut_windows(tokens, [pieces] * len(tokens), budget))
    assert [i for start, stop in spans for i in range(start, stop)] == list(range(len(tokens)))
    assert all((stop - start) * pieces <= budget or stop - start == 1 for start, stop in spans)


def test_windows_end_after_a_sentence_where_one_fits():
    assert list(cut_windows("甲乙丙。丁戊，己庚", [1] * 9, 8)) == [(0, 4), (4, 9)]


def test_batches_hold_every_row_once_and_follow_from_seed_and_epoch():
    batches = LengthBatches([i % 17 + 1 for i in range(200)], 8, seed=3)
    first = list(batches)
    assert len(first) == len(batches) and sorted(itertools.chain(*first)) == list(range(200))
    assert first == list(batches)
    batches.set_epoch(1)
    assert list(batches) != first


def test_padding_is_masked_and_ignored():
    rows = [
        {"input_ids": [2, 9, 3], "labels": [IGNORED_LABEL, 1, IGNORED_LABEL]},
        {"input_ids": [2], "labels": [IGNORED_LABEL]},
    ]
    batch = Collator(0)(rows)
    assert batch["input_ids"].tolist() == [[2, 9, 3], [2, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED_LABEL, 1, IGNORED_LABEL], [IGNORED_LABEL] * 3]


def test_words_of_several_pieces_are_labelled_on_the_first():
    from sparse_prune.models.garlic import train_tokenizer

    tokenizer = train_tokenizer(["abc 中国"], min_count=1)
    data = encode(tokenizer, [TagExample(("abc", " ", "中国"), ("B-PER", "O", "B-LOC"))], TAGS, 32)
    assert data.rows[0]["labels"] == [IGNORED_LABEL, 1, IGNORED_LABEL, IGNORED_LABEL, 3, IGNORED_LABEL, IGNORED_LABEL]
    assert data.places == [[0, 2]]  # the tokenizer drops the white space


def test_words_keep_their_spaces_where_a_tokenizer_takes_these_for_part_of_the_word():
    tokenizer = RobertaTokenizer().train_new_from_iterator(["Anna Kowalska saw Paris ."], 300)
    tokens = ("Anna", "Kowalska", "saw", "中", "国", ".")
    row = encode(tokenizer, [TagExample(tokens, ("B-PER", "I-PER", "O", "B-LOC", "I-LOC", "O"))], TAGS, 64).rows[0]
    assert row["input_ids"] == tokenizer("Anna Kowalska saw中国.")["input_ids"]
    assert [label for label in row["labels"] if label != IGNORED_LABEL] == [1, 2, 0, 3, 4, 0]
    short = encode(tokenizer, [TagExample(("Anna",) * 18, ("O",) * 18)], TAGS, 9)  # counted with their spaces
    assert max(short.lengths) <= 9 and [place for window in short.places for place in window] == list(range(18))


@given(st.lists(st.lists(st.floats(-4, 4, width=32), min_size=5, max_size=5), min_size=1, max_size=4))
def test_decoding_finds_the_likeliest_bio_sequence(logits):
    rows = torch.tensor(logits)
    (found,) = decode_bio([rows], allowed_transitions(TAGS))

    def valid(path):
        return all(bio_problem(a, b) is None for a, b in itertools.pairwise(["O", *(TAGS[i] for i in path)]))

    def value(path):
        return sum(float(rows[t, i]) for t, i in enumerate(path))

    best = max((p for p in itertools.product(range(5), repeat=len(logits)) if valid(p)), key=value)
    assert valid(found) and value(found) == pytest.approx(value(best), abs=1e-3)


def test_rows_of_any_length_are_decoded_together():
    allowed = allowed_transitions(TAGS)
    rows = [torch.randn(n, 5, generator=torch.Generator().manual_seed(n)) for n in (3, 0, 7, 1)]
    assert decode_bio(rows, allowed) == [decode_bio([row], allowed)[0] for row in rows]


def test_entity_scores_are_strict():
    truth = [["B-PER", "I-PER", "O", "B-LOC"]]
    assert score_entities(truth, truth).value == 1.0
    found = score_entities(truth, [["B-PER", "O", "O", "B-LOC"]])  # one end is wrong: the person does not count
    assert found.value == pytest.approx(0.5) and found.per_class == {"LOC": (1, 1.0), "PER": (1, 0.0)}
    assert score_entities([["O"]], [["O"]]).value == 0.0


def test_accuracy_and_recall_of_each_class():
    examples = [TextExample("x", label) for label in "aabb"]
    found = score(examples, ["a", "b", "b", "b"])
    assert found.value == 0.75 and found.per_class == {"a": (2, 0.5), "b": (2, 1.0)}
