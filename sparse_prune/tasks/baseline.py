"""What SnowNLP itself scores on the same parts: its Bayes classifier trained on the same texts, its tagger on the same lines."""

from __future__ import annotations

from collections.abc import Sequence

from .data import TagExample, TextExample, tagged_words_to_bio
from .evaluation import Score, score


def snownlp_sentiment(train: Sequence[TextExample], test: Sequence[TextExample]) -> Score:
    """Accuracy on test of snownlp.sentiment.Sentiment trained on train; labels are "positive" and "negative"."""
    from snownlp.sentiment import Sentiment

    texts = {label: [e.text for e in train if e.label == label] for label in ("negative", "positive")}
    classifier = Sentiment()
    classifier.train(texts["negative"], texts["positive"])
    predictions = ["positive" if classifier.classify(e.text) > 0.5 else "negative" for e in test]
    return score(test, predictions)


def snownlp_entities(test: Sequence[TagExample]) -> Score:
    """Strict entity F1 on test of SnowNLP's segmenter and tagger as they come (nr, ns, nt; names joined as in the truth)."""
    from snownlp import seg, tag

    predictions = []
    for example in test:
        words = seg.seg("".join(example.tokens))
        predictions.append(list(tagged_words_to_bio(list(zip(words, tag.tag(words), strict=True))).tags))
    return score(test, predictions)
