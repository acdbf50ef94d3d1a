"""What SnowNLP itself scores: its Bayes classifier, segmenter and tagger, trained on the same part and tested on the same part.

The tagger and segmenter that SnowNLP ships were trained on the whole corpus that the built-in test part comes from, so their score
there is one of memory (`shipped`); retrained on the train part alone they are a fair rival.
"""

from __future__ import annotations

from collections.abc import Sequence

from .data import TagExample, TextExample, identity, peoples_daily_words, tagged_words_to_bio
from .evaluation import Score, score


def snownlp_sentiment(train: Sequence[TextExample], test: Sequence[TextExample]) -> Score:
    """Accuracy on test of snownlp.sentiment.Sentiment trained on train; labels are "positive" and "negative"."""
    from snownlp.sentiment import Sentiment

    texts = {label: [e.text for e in train if e.label == label] for label in ("negative", "positive")}
    classifier = Sentiment()
    classifier.train(texts["negative"], texts["positive"])
    predictions = ["positive" if classifier.classify(e.text) > 0.5 else "negative" for e in test]
    return score(test, predictions)


def snownlp_entities(train: Sequence[TagExample], test: Sequence[TagExample], *, shipped: bool = False) -> Score:
    """Strict entity F1 on test of SnowNLP's segmenter and tagger: trained on the lines of train, or as they are shipped.

    train and test are parts of the built-in data; nr, ns and nt words become entities as in its truth.
    """
    from snownlp.seg import segger as shipped_segmenter
    from snownlp.seg.seg import Seg
    from snownlp.tag import tagger as shipped_tagger
    from snownlp.utils.tnt import TnT

    segmenter, tagger = shipped_segmenter, shipped_tagger
    if not shipped:
        keys = {identity(example) for example in train}
        lines = [words for words in peoples_daily_words() if identity(tagged_words_to_bio(words)) in keys]
        segmenter, tagger = Seg(), TnT()
        segmenter.segger.train([_positions(words) for words in lines])
        tagger.train(lines)
    predictions = []
    for example in test:
        words = list(segmenter.seg("".join(example.tokens)))
        tags = [tag for _, tag in tagger.tag(words)]
        predictions.append(list(tagged_words_to_bio(list(zip(words, tags, strict=True))).tags))
    return score(test, predictions)


def _positions(words: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Characters with their place in the word as SnowNLP's segmenter learns it: b, m, e, or s for a word of one."""
    pairs = []
    for word, _ in words:
        places = "s" if len(word) == 1 else "b" + "m" * (len(word) - 2) + "e"
        pairs += zip(word, places, strict=True)
    return pairs
