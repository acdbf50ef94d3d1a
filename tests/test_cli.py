"""The command line as a person meets it: help, the whole path on a tiny file, and mistakes told in one sentence."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

pytest.importorskip("transformers")

import transformers

import sparse_prune as sp
from sparse_prune import cli, serialization
from sparse_prune.recipes import read_recipe

PRUNE_OPTIONS = {
    *(
        "model",
        "out",
        "task",
        "train",
        "eval",
        "density",
        "block",
        "criterion",
        "schedule",
        "scope",
        "alpha",
        "relative-to",
        "distill",
        "epochs",
    ),
    *("learning-rate", "batch-size", "max-length", "seed", "full"),
}
TRAIN_OPTIONS = PRUNE_OPTIONS - {"density", "block", "criterion", "schedule", "scope", "distill"}
TINY = ("--epochs", "1", "--batch-size", "16", "--max-length", "32")


@pytest.fixture(scope="module")
def reviews(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "reviews.tsv"
    lines = [f"{text}{i}\t{label}" for i in range(24) for text, label in (("房间很好", "good"), ("服务太差", "bad"))]
    path.write_text("text\tlabel\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def dense(reviews, tmp_path_factory) -> Path:
    from sparse_prune import tasks

    out = tmp_path_factory.mktemp("runs") / "dense"
    tasks.train(tasks.TrainArgs(out=out, train=reviews, eval=reviews, epochs=1, batch_size=16, max_length=32))
    return out


def test_json_goes_to_standard_output_and_words_to_standard_error(monkeypatch, capsys, dense, reviews):
    monkeypatch.setattr(sys, "argv", ["sparse-prune", "eval", str(dense), "--eval", str(reviews), "--json", "-"])
    with pytest.raises(SystemExit):
        cli.main()
    captured = capsys.readouterr()
    assert json.loads(captured.out)["examples"] == 48 and "accuracy" in captured.err
    assert not Path("-").exists()


def test_a_label_that_the_terminal_cannot_print_ends_no_run(dense, reviews, tmp_path):
    file = tmp_path / "中文.tsv"
    file.write_text(reviews.read_text(encoding="utf-8") + "很好\t好评\n", encoding="utf-8")
    where = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "sparse_prune", "eval", str(dense), "--eval", str(file)]
    done = subprocess.run(command, env=where, capture_output=True)
    assert done.returncode == 2 and rb"got '\u597d\u8bc4'" in done.stderr and b"Traceback" not in done.stderr


def test_a_full_disk_is_told_in_one_sentence(run, monkeypatch, reviews, tmp_path):
    from transformers import PreTrainedModel

    def full(*args, **options):  # as safetensors, which knows no errno
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    code, text = run("train", "--train", reviews, "--eval", reviews, "--out", tmp_path / "o", *TINY)
    assert code == 2 and "error: disk: expected room for the results, got a full one; free some" in text
    assert "Traceback" not in text and not (tmp_path / "o").exists()
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # a mistake of ours keeps its traceback
        run("train", "--train", reviews, "--eval", reviews, "--out", tmp_path / "o", *TINY)


def test_a_package_that_is_not_installed_is_told_with_its_extra(run, monkeypatch):
    assert cli._missing_package(ModuleNotFoundError(name="sparse_prune.tasks")) is None  # a mistake of ours
    monkeypatch.setitem(sys.modules, "yaml", None)
    code, text = run("train", "--recipe", "r.yaml", "--out", "o")
    assert (
        code == 2 and text == "error: yaml: expected an installed package, got none; pip install 'sparse-prune[nlp]'\n"
    )


def test_help_names_every_command(run):
    code, text = run("--help")
    assert code == 0
    for command in ("demo", "train", "prune", "pack", "eval", "bench", "report", "info", "doctor"):
        assert command in text
    for command, options in {
        "train": ("--model", "--epochs"),
        "prune": ("--density", "--alpha"),
        "eval": ("--eval",),
    }.items():
        code, text = run(command, "--help")
        shown = re.findall(r"^│ +\*? *(--[\w-]+)", text, re.M)
        assert code == 0 and {*options} <= {*shown}, command


def test_the_whole_path(run, reviews, dense, tmp_path):
    files = ("--train", reviews, "--eval", reviews)
    out = tmp_path / "sparse"
    code, text = run("prune", "--model", dense, *files, "--density", "0.3", *TINY, "--out", out)
    assert code == 0, text
    metrics = json.loads((out / "metrics.json").read_text())
    assert set(metrics) == {"task", "dense", "sparse", "seconds"}
    assert set(metrics["sparse"]) == {"accuracy", "latency_ms", "bytes", "density"}
    assert set(metrics["dense"]) == {"accuracy", "latency_ms", "bytes"}
    assert set(metrics["seconds"]) == {"train", "prune"}
    assert metrics["sparse"]["density"] == pytest.approx(0.3, abs=0.02)
    assert ("faster" in text or "slower" in text) and "0.3" in text

    packed = tmp_path / "packed [b]"  # which rich would take for a style
    code, text = run("pack", out, "--out", packed, "--json", tmp_path / "pack.json")
    assert code == 0 and serialization.is_packed(packed), text
    assert "linear layers are sparse" in text and str(packed) in text
    assert json.loads((tmp_path / "pack.json").read_text())["packed_bytes"] < metrics["dense"]["bytes"]

    scores = {}
    for directory in (out, out / "packed", packed):
        code, text = run("eval", directory, "--eval", reviews, "--json", tmp_path / "eval.json")
        assert code == 0 and "accuracy" in text, text
        scores[directory] = json.loads((tmp_path / "eval.json").read_text())["score"]["value"]
    assert len(set(scores.values())) == 1 and scores[out] == pytest.approx(metrics["sparse"]["accuracy"])

    code, text = run("report", out, "--picture", tmp_path / "picture.png")
    assert code == 0 and (out / "report.html").is_file() and (tmp_path / "picture.png").is_file(), text


def test_alpha_reaches_the_pruner(run, monkeypatch, tmp_path):
    from sparse_prune import tasks

    class Reached(Exception):
        pass

    def caught(args, report):
        raise Reached(tasks.training._prune_config(args))

    monkeypatch.setattr(tasks, "prune", caught)
    options = ("--criterion", "threshold", "--alpha", "0.25", "--relative-to", "weight")
    with pytest.raises(Reached) as stop:
        run("prune", "--model", "m", *options, "--out", tmp_path / "o")
    assert stop.value.args == (sp.PruneConfig("threshold", alpha=0.25, relative_to="weight"),)


FAMILIES = {  # tokenizer, model, and pieces, so few that words are made of several
    "bert": (transformers.BertTokenizer, transformers.BertConfig, 70),
    "distilbert": (transformers.DistilBertTokenizer, transformers.DistilBertConfig, 70),
    "roberta": (
        transformers.RobertaTokenizer,
        transformers.RobertaConfig,
        300,
    ),  # bytes; positions from behind the padding's
}
POSITIONS = 48
HEADS = {
    "sentiment": transformers.AutoModelForSequenceClassification,
    "ner": transformers.AutoModelForTokenClassification,
}


@pytest.fixture(scope="module")
def users_files(tmp_path_factory) -> dict[str, Path]:
    """English data of both tasks: words of several pieces, a text and a sentence that are longer than the models' positions."""
    folder = tmp_path_factory.mktemp("english")
    files = {"sentiment": folder / "rooms.tsv", "ner": folder / "visits.conll"}
    words = (("lovely", "good"), ("awful", "bad"))
    rows = [f"Room {i} of this house is {word}, I say\t{label}" for i in range(16) for word, label in words]
    files["sentiment"].write_text("text\tlabel\n" + "\n".join([*rows, f"An awful{' house' * 99}\tbad"]) + "\n")
    sentences = [
        f"{first}\tB-PER\nKowalska\tI-PER\nvisited\tO\n{place}\tB-LOC\n.\tO\n"
        for first in ("Anna", "Beatrix", "Charlotte", "Dorothea")
        for place in ("Utrecht", "Amersfoort", "Paris", "Oslo")
    ]
    files["ner"].write_text("\n".join([*sentences, "".join(sentences)]))
    return files


@pytest.mark.parametrize("task", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_path_on_a_users_own_model(run, users_files, tmp_path, monkeypatch, family, task):
    monkeypatch.setattr(importlib.import_module("sparse_prune.tasks.analysis"), "TIMED_SECONDS", 0.1)
    make_tokenizer, make_config, pieces = FAMILIES[family]
    data = users_files[task]
    tokenizer = make_tokenizer().train_new_from_iterator([" ".join(data.read_text().split())], pieces)
    config = make_config(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, max_position_embeddings=POSITIONS
    )
    for name, size in {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}.items():
        setattr(config, name, size)
    setattr(config, "hidden_dim" if family == "distilbert" else "intermediate_size", 128)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path / "mine")
    tokenizer.save_pretrained(tmp_path / "mine")

    dense, out, packed = (tmp_path / name for name in ("dense", "sparse", "packed"))
    on_file = ("--task", task, "--eval", data)
    fit = (*on_file, "--train", data, "--epochs", "10", "--batch-size", "4", "--learning-rate", "2e-3")
    code, text = run("train", "--model", tmp_path / "mine", *fit, "--out", dense, "--json", tmp_path / "dense.json")
    assert code == 0, text
    code, text = run("prune", "--model", dense, *fit, "--density", "0.5", "--scope", "local", "--out", out)
    assert code == 0, text
    metrics = json.loads((out / "metrics.json").read_text())
    score = "f1" if task == "ner" else "accuracy"
    assert metrics["dense"][score] == json.loads((tmp_path / "dense.json").read_text())["score"]["value"] > 0.8
    assert metrics["sparse"][score] > 0.6 and metrics["sparse"]["density"] == pytest.approx(0.5, abs=0.02)
    assert metrics["sparse"]["bytes"] < metrics["dense"]["bytes"] and metrics["dense"]["latency_ms"] > 0

    code, text = run("pack", out, "--out", packed)
    assert code == 0 and "linear layers are sparse" in text, text
    for directory in (out, out / "packed", packed):
        code, text = run("eval", directory, *on_file, "--json", tmp_path / "eval.json")
        assert code == 0, text
        found = json.loads((tmp_path / "eval.json").read_text())
        assert found["score"]["name"] == score and found["score"]["value"] == metrics["sparse"][score]

    ids = transformers.AutoTokenizer.from_pretrained(packed)("Anna visited an awful house", return_tensors="pt")
    model = HEADS[task].from_pretrained(packed).eval()
    model.save_pretrained(tmp_path / "again")
    zeros, again = (HEADS[task].from_pretrained(path).eval() for path in (out, tmp_path / "again"))
    assert sum(isinstance(module, sp.SparseLinear) for module in model.modules()) == 12
    assert not any(isinstance(module, sp.SparseLinear) for module in zeros.modules())
    with torch.inference_mode():
        torch.testing.assert_close(again(**ids).logits, model(**ids).logits, atol=0, rtol=0)
        torch.testing.assert_close(model(**ids).logits, zeros(**ids).logits, atol=1e-5, rtol=1e-5)

    code, text = run("report", out)
    page = (out / "report.html").read_text()
    assert code == 0 and score in page.lower() and ("Kowalska" if task == "ner" else "awful") in page, text
    code, text = run(
        "bench", "model", dense, packed, "--batch", "1", "--length", "8", "--dtype", "float32", "--seconds", "0"
    )
    assert code == 0 and "sparse" in text, text

    unseen = tmp_path / f"unseen{data.suffix}"
    unseen.write_text(
        data.read_text().replace("B-LOC", "B-ORG") if task == "ner" else "text\tlabel\nAn awful house\tugly\n"
    )
    code, text = run("eval", packed, "--task", task, "--eval", unseen)
    assert code == 2 and f"line {4 if task == 'ner' else 2}: expected one of the labels" in text, text


def test_recipe_of_train(run, reviews, tmp_path):
    out, recipe = tmp_path / "dense", tmp_path / "mine.yaml"
    recipe.write_text(
        f"train: {reviews}\neval: {reviews}\nepochs: 1\nbatch-size: 16\nmax-length: 32\nlearning-rate: 1.0e-4\nseed: 1\n"
    )
    code, text = run("train", "--recipe", recipe, "--seed", "2", "--out", out, "--json", tmp_path / "first.json")
    assert code == 0, text
    saved = read_recipe(out / "recipe.yaml", TRAIN_OPTIONS)
    assert saved == {
        **read_recipe(recipe, TRAIN_OPTIONS),
        **{"seed": 2, "out": str(out), "model": "garlic", "task": "sentiment", "full": False},
    }
    assert json.loads((out / "config.json").read_text())["max_position_embeddings"] == 32
    code, text = run("train", "--recipe", out / "recipe.yaml", "--json", tmp_path / "again.json")
    assert code == 0 and (tmp_path / "again.json").read_text() == (tmp_path / "first.json").read_text(), "another run"


def test_recipe_of_prune(run, reviews, dense, tmp_path):
    out, recipe = tmp_path / "sparse", tmp_path / "mine.yaml"
    recipe.write_text(
        f"model: {dense}\ntrain: {reviews}\neval: {reviews}\ndensity: 0.5\nblock: 16x32\nepochs: 1\nbatch-size: 16\n"
        "max-length: 32\ndistill: false\n"
    )
    code, text = run("prune", "--recipe", recipe, "--density", "0.4", "--out", out)
    assert code == 0, text
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["sparse"]["density"] == pytest.approx(0.4, abs=0.03)
    saved = read_recipe(out / "recipe.yaml", PRUNE_OPTIONS)
    assert (saved["density"], saved["block"], saved["distill"], saved["batch-size"]) == (0.4, "16x32", False, 16)
    assert saved["out"] == str(out)
    code, text = run("prune", "--recipe", out / "recipe.yaml", "--json", tmp_path / "again.json")
    assert code == 0 and json.loads((tmp_path / "again.json").read_text()) == metrics, "it was not the same run"


def test_doctor(run, tmp_path):
    code, text = run("doctor", "--json", tmp_path / "doctor.json")
    assert code == 0 and "reference" in text
    assert importlib.util.find_spec("triton") is None or "kernels are tested with" in " ".join(text.split())
    names = [backend["name"] for backend in json.loads((tmp_path / "doctor.json").read_text())]
    assert names == ["cuda", "triton", "cpu", "reference"]


MISTAKES = {
    "missing file": (("train", "--train", "nowhere.tsv", "--eval", "nowhere.tsv", "--out", "o"), "nowhere.tsv"),
    "unknown task": (("train", "--task", "poetry", "--out", "o"), "task: expected"),
    "density": (("prune", "--model", "DENSE", "--density", "0", "--out", "o"), "density: expected a kept fraction"),
    "density above one": (("prune", "--model", "DENSE", "--density", "1.5", "--out", "o"), "density: expected"),
    "block text": (("prune", "--model", "DENSE", "--block", "a x b", "--out", "o"), "--block: expected ROWSxCOLUMNS"),
    "block zero": (("prune", "--model", "DENSE", "--block", "0x32", "--out", "o"), "blocksize: expected two positive"),
    "block too large": (
        ("prune", "--model", "DENSE", "--block", "4096x4096", "--out", "o"),
        "blocksize: expected a block",
    ),
    "criterion": (("prune", "--model", "DENSE", "--criterion", "luck", "--out", "o"), "criterion: expected one of"),
    "alpha of another criterion": (
        ("prune", "--model", "DENSE", "--alpha", "0.5", "--out", "o"),
        "alpha: expected a number of at least 0, with criterion 'threshold' or 'gradient', got 0.5 with criterion 'taylor'",
    ),
    "alpha relative to nothing": (
        ("prune", "--model", "DENSE", "--relative-to", "loss", "--out", "o"),
        "relative_to: expected one of grad, weight, got 'loss'",
    ),
    "recipe": (("train", "--recipe", "nowhere.yaml", "--out", "o"), "--recipe: expected a YAML file, got nothing"),
    "recipe option": (("train", "--recipe", "RECIPE", "--out", "o"), "options out of batch-size, epochs, "),
    "recipe value": (("prune", "--recipe", "LIST", "--model", "DENSE", "--out", "o"), "density: expected one value"),
    "recipe of yes": (
        ("prune", "--recipe", "YES", "--model", "DENSE", "--out", "o"),
        "density: expected a value, got True",
    ),
    "recipe of maybe": (("train", "--recipe", "MAYBE", "--out", "o"), "full: expected true or false, got 'maybe'"),
    "the working directory": (("train", "--out", "."), "got the working directory"),
    "no time to tune": (
        ("tune", "--seconds", "-1", "--out", "o"),
        "seconds: expected a finite number from 0 on, got -1",
    ),
    "model": (("prune", "--model", "nowhere", "--out", "o"), "nowhere: expected a model directory"),
    "pack a dense model": (
        ("pack", "DENSE", "--out", "o"),
        "expected a model pruned in blocks, got no block of 32x32 zeros; prune",
    ),
    "pack nothing": (("pack", "nowhere", "--out", "o"), "expected a model directory"),
    "eval nothing": (("eval", "nowhere"), "nowhere: expected a model directory"),
    "report nothing": (("report", "nowhere"), "metrics.json"),
    "label unknown to the model": (("eval", "DENSE", "--eval", "OTHER"), "line 2"),
    "no epochs": (("prune", "--model", "DENSE", "--epochs", "0", "--out", "o"), "epochs: expected a number above 0"),
    "epochs that are no number": (("train", "--epochs", "nan", "--out", "o"), "epochs: expected a number above 0"),
    "rate": (("train", "--learning-rate", "-1", "--out", "o"), "learning_rate: expected a number above 0"),
    "batch": (("train", "--batch-size", "0", "--out", "o"), "batch_size: expected a whole number of at least 1"),
    "length": (("train", "--max-length", "2", "--out", "o"), "max_length: expected a whole number of at least 3"),
    "seed": (("train", "--seed", "-1", "--out", "o"), "seed: expected a whole number of at least 0"),
    "diverging": (
        ("prune", "--model", "DENSE", "--batch-size", "16", "--learning-rate", "1e30", "--out", "o"),
        "finite number",
    ),
    "NaN weights, pruned": (("prune", "--model", "NAN", "--out", "o"), "ffn_in.weight: expected finite numbers"),
    "NaN weights, scored": (("eval", "NAN"), "ffn_in.weight: expected finite numbers"),
    "NaN weights, packed": (("pack", "NAN", "--out", "o"), "ffn_in.weight: expected finite numbers"),
    "prune a packed model": (("prune", "--model", "PACKED", "--out", "o"), "expected a dense model, got a packed one"),
    "train a packed model": (("train", "--model", "PACKED", "--out", "o"), "expected a dense model, got a packed one"),
    "masks of another model": (("pack", "MASKS", "--out", "o"), "block_mask: expected a bool tensor of shape"),
    "blocks beside masks": (("pack", "MASKS", "--block", "8", "--out", "o"), "block: expected 32x32"),
    "settings that are none": (("eval", "SETTINGS"), "model: expected garlic, a model directory"),
    "no layers": (("prune", "--model", "EMPTY", "--out", "o"), "model: expected a stack of layers with nn.Linear"),
    "bench of nothing": (("bench", "linear", "--tokens", "0"), "option: expected whole numbers above 0"),
    "bench of padding": (("bench", "linear", "--block", "999999x2"), "block: expected at most the weight's 3072x768"),
    "bench of no time": (("bench", "linear", "--seconds", "-1"), "seconds: expected a finite number from 0 on, got -1"),
    "bench by nobody": (
        ("bench", "model", "DENSE", "--length", "16", "--threads", "0"),
        "threads: expected a count of at least 1, got 0",
    ),
    "bench of a model for no time": (
        ("bench", "model", "DENSE", "--length", "16", "--seconds", "nan"),
        "seconds: expected a finite number",
    ),
    "bench of a padded model": (
        ("bench", "model", "DENSE", "--length", "16", "--block", "9999x2"),
        "block: expected at most the weight's",
    ),
    "bench of a model beyond its positions": (
        ("bench", "model", "DENSE", "--length", "64"),
        "--length: expected at most 32 tokens, as the model, got 64",
    ),
    "bench of a packed model as the dense one": (("bench", "model", "PACKED"), "expected a dense model, got a packed"),
    "length to score at": (("eval", "DENSE", "--max-length", "0"), "max_length: expected a whole number of at least 3"),
    "a file where a directory should be": (
        ("train", "--out", "OTHER/x"),
        "expected a path that can be used, got Not a",
    ),
    "a dtype that is none": (
        ("bench", "linear", "--dtype", "float99"),
        "dtypes: expected names among float32, bfloat16,",
    ),
    "a dtype that weights cannot have": (
        ("bench", "linear", "--dtype", "int32"),
        "dtypes: expected names among float32, bfloat16,",
    ),
    "a dtype that no model has": (
        ("bench", "model", "DENSE", "--length", "16", "--dtype", "float99"),
        "dtypes: expected names among float32,",
    ),
    "SnowNLP's lines": (("baseline", "--task", "poetry", "--out", "o"), "task: expected one of"),
}


@pytest.fixture(scope="module")
def places(dense, tmp_path_factory) -> dict[str, Path]:
    """Directories that something is wrong with, beside the good one."""
    from safetensors.torch import load_file, save_file

    from sparse_prune.tasks.models import encoder_filter, load_model

    found = {"DENSE": dense}
    for name in ("NAN", "PACKED", "MASKS", "SETTINGS", "EMPTY"):
        found[name] = tmp_path_factory.mktemp("damaged") / name.lower()
        shutil.copytree(dense, found[name])
    weights = load_file(dense / "model.safetensors")
    next(value for name, value in weights.items() if name.endswith("ffn_in.weight"))[0, 0] = float("nan")
    save_file(weights, found["NAN"] / "model.safetensors", metadata={"format": "pt"})
    model, _ = load_model(dense, "sentiment")
    masks = {"garlic.encoder.layers.0.ffn_in": torch.ones(3, 3, dtype=torch.bool)}
    serialization.save_masks(masks, (32, 32), found["MASKS"] / "masks.safetensors")
    sp.sparsify_(model, sp.BlockSparseConfig(density=0.2), encoder_filter(model))
    sp.save_packed(model, found["PACKED"])
    (found["SETTINGS"] / "config.json").write_text("[]")
    settings = json.loads((dense / "config.json").read_text()) | {"num_hidden_layers": 0}
    (found["EMPTY"] / "config.json").write_text(json.dumps(settings))
    return found


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_sentence_and_exit_code_2(case, run, reviews, places, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "other.tsv"
    other.write_text("text\tlabel\n房间很好\tso-so\n", encoding="utf-8")
    arguments, message = MISTAKES[case]
    recipe, listing = tmp_path / "recipe.yaml", tmp_path / "list.yaml"
    recipe.write_text("density: 0.2\n")  # which train has not
    listing.write_text("density: [0.1, 0.2]\n")
    yes, maybe = tmp_path / "yes.yaml", tmp_path / "maybe.yaml"
    yes.write_text("density: yes\n")
    maybe.write_text("full: maybe\n")
    here = {**places, "OTHER": other, "RECIPE": recipe, "LIST": listing, "YES": yes, "MAYBE": maybe}
    arguments = [str(other / "x") if argument == "OTHER/x" else here.get(argument, argument) for argument in arguments]
    if arguments[0] in ("train", "prune") and "--train" not in arguments:
        arguments += ["--train", reviews, "--eval", reviews]
    if arguments[0] == "eval" and "--eval" not in arguments:
        arguments += ["--eval", reviews]
    code, text = run(*arguments)
    assert code == 2, text
    assert message in text and "Traceback" not in text
    assert [path.name for path in tmp_path.iterdir() if path not in here.values()] == [], "something was left behind"


def test_a_damaged_packed_model(run, reviews, dense, tmp_path):
    from sparse_prune import tasks
    from sparse_prune.tasks.models import encoder_filter, load_model

    model, tokenizer = load_model(dense, "sentiment")
    sp.sparsify_(model, sp.BlockSparseConfig(density=0.2), encoder_filter(model))
    sp.save_packed(model, tmp_path / "packed")
    tokenizer.save_pretrained(tmp_path / "packed")
    assert tasks.evaluate(tmp_path / "packed", "sentiment", reviews)["examples"] == 48
    file = tmp_path / "packed" / "model.safetensors"
    tensors, metadata = serialization.read_tensors(file)
    name = "garlic.encoder.layers.0.ffn_in"
    for part, wrong in (
        ("col_indices", lambda x: x.flip(0)),
        ("col_indices", lambda x: x - x.max() - 1),  # negative
        ("col_indices", lambda x: x + 1000),  # out of range
        ("crow_indices", lambda x: x[:-1]),
        ("values", lambda x: x[:-1]),
        ("values", lambda x: x.int()),  # a dtype that no packed layer has
    ):
        changed = tensors | {f"{name}.{part}": wrong(tensors[f"{name}.{part}"]).contiguous()}
        safetensors.torch.save_file(changed, file, metadata)
        code, text = run("eval", tmp_path / "packed", "--eval", reviews)
        assert code == 2 and f"model.safetensors: {name}" in text and "Traceback" not in text, text
    safetensors.torch.save_file(tensors, file, metadata)
    file.write_bytes(file.read_bytes()[:-100])
    code, text = run("eval", tmp_path / "packed", "--eval", reviews)
    assert code == 2 and "model.safetensors" in text and "Traceback" not in text


DAMAGES = {
    "a weight missing": "all weights of a GarlicForSequenceClassification, got 1 missing, such as garlic.encoder.layers.0.ffn_in",
    "a head missing": "all weights of a GarlicForSequenceClassification, got 2 missing, such as classifier.bias;",
    "integers": "garlic.encoder.layers.0.ffn_in.weight: expected floating point, got I8",
    "integers in a .bin": "garlic.encoder.layers.0.ffn_in.weight: expected floating point, got torch.int8",
    "no heads": "by zero)",
    "an empty .bin": "damaged (EOFError)",
    "a foreign pickle": "damaged (Weights only load failed.",
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_dense_model_is_one_sentence(case, run, reviews, dense, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(dense, damaged)
    file, binary = damaged / "model.safetensors", damaged / "pytorch_model.bin"
    tensors, metadata = serialization.read_tensors(file)
    name = "garlic.encoder.layers.0.ffn_in.weight"
    if case == "a weight missing":
        del tensors[name]
    elif case == "a head missing":
        tensors = {key: value for key, value in tensors.items() if key.startswith("garlic.")}
    elif case.startswith("integers"):
        tensors[name] = (100 * tensors[name]).to(torch.int8)
    safetensors.torch.save_file(tensors, file, metadata)
    if case == "no heads":
        settings = json.loads((damaged / "config.json").read_text()) | {"num_attention_heads": 0}
        (damaged / "config.json").write_text(json.dumps(settings))
    if "bin" in case or case == "a foreign pickle":
        file.unlink()
        torch.save(tensors, binary)
    if case == "an empty .bin":
        binary.write_bytes(b"")
    elif case == "a foreign pickle":
        binary.write_bytes(pickle.dumps(tmp_path))
    for command in (("eval", damaged, "--eval", reviews), ("pack", damaged, "--out", tmp_path / "o")):
        code, text = run(*command)
        assert code == 2 and DAMAGES[case] in text and "Traceback" not in text, text
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_a_new_head_may_be_missing_but_no_weight_of_the_encoder(dense, tmp_path):
    from sparse_prune.tasks.models import load_model

    damaged = tmp_path / "damaged"
    shutil.copytree(dense, damaged)
    tensors, metadata = serialization.read_tensors(damaged / "model.safetensors")
    encoder = {key: value for key, value in tensors.items() if key.startswith("garlic.")}
    safetensors.torch.save_file(encoder, damaged / "model.safetensors", metadata)
    assert load_model(damaged, "sentiment", ["bad", "good", "so-so"])[0].config.num_labels == 3
    del encoder["garlic.encoder.layers.0.ffn_in.weight"]
    safetensors.torch.save_file(encoder, damaged / "model.safetensors", metadata)
    with pytest.raises(sp.SparsePruneError, match="got 1 missing, such as garlic.encoder.layers.0.ffn_in.weight;"):
        load_model(damaged, "sentiment", ["bad", "good", "so-so"])


BAD_FILES = {  # name: (file, content, what is told after its path)
    "no header": ("a.tsv", "好\tgood\n", ", line 1: expected a header with the columns text and label"),
    "three columns": (
        "a.tsv",
        "text\tlabel\n好\tgood\n好\t很\tgood\n",
        ", line 3: expected 2 columns as in the header, got 3",
    ),
    "no text": ("a.tsv", "text\tlabel\n好\tgood\n \tbad\n", ", line 3: expected a text, got an empty one"),
    "no label": ("a.csv", "text,label\n好,good\n坏,\n", ", line 3: expected a label, got an empty one"),
    "a quote left open": ("a.csv", 'text,label\n好,good\n"坏,bad\n', ", line 3: expected a CSV row"),
    "no JSON": ("a.jsonl", '{"text": "好", "label": "good"}\n{"text"\n', ", line 2: expected a JSON object"),
    "JSON of another kind": ("a.jsonl", '{"text": "好"}\n', ", line 1: expected an object with text and label"),
    "another ending": ("a.xml", "<text/>", ": expected a file ending in .tsv, .csv or .jsonl"),
    "GB18030": ("a.tsv", "text\tlabel\n好\tgood\n".encode("gb18030"), ", line 2: expected UTF-8 text"),
    "empty": ("a.tsv", "", ": expected at least one example, got none"),
    "a header alone": ("a.csv", "text,label\n", ": expected at least one example, got none"),
    "empty CoNLL": ("a.conll", "\n\n", ": expected at least one example, got none"),
    "a token alone": ("a.conll", "王\tB-PER\n明\n", ", line 2: expected `token TAB tag`"),
    "an entity without a beginning": ("a.conll", "王\tO\n明\tI-PER\n", ", line 2: expected a BIO tag"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_told_with_its_line(case, run, tmp_path):
    name, content, message = BAD_FILES[case]
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    task = "ner" if name.endswith(".conll") else "sentiment"
    code, text = run("train", "--task", task, "--train", file, "--eval", file, "--out", tmp_path / "o")
    assert code == 2 and f"error: {file}{message}" in text and "Traceback" not in text, text
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_interrupt_says_how_to_go_on(run, monkeypatch, reviews, tmp_path):
    from sparse_prune import tasks

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tasks, "train", stopped)
    code, text = run("train", "--train", reviews, "--eval", reviews, "--out", tmp_path / "o")
    assert code == 130 and "goes on from the last finished epoch" in text


def test_ctrl_c_loses_at_most_the_running_epoch(reviews, tmp_path):
    """A real SIGINT to a real process; the same command then goes on to the weights of a run that nobody stopped."""
    from transformers import BertConfig, BertForSequenceClassification

    from sparse_prune.models.garlic import train_tokenizer

    tokenizer = train_tokenizer([reviews.read_text(encoding="utf-8")], max_length=32)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForSequenceClassification(BertConfig(**size, vocab_size=len(tokenizer))).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    files = ("--model", tmp_path / "tiny", "--train", reviews, "--eval", reviews)

    def start(out: str) -> subprocess.Popen:
        command = [
            sys.executable,
            "-m",
            "sparse_prune",
            "train",
            *files,
            "--epochs",
            "10",
            "--batch-size",
            "16",
            "--out",
            out,
        ]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": tmp_path}
        pipes["env"] = os.environ | {"OMP_NUM_THREADS": "1"}
        # A shell's background job ignores SIGINT, and its children with it.
        return subprocess.Popen(command, **pipes, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))

    def steps(text: str) -> list[int]:
        return [int(step) for step in re.findall(r"^train +(\d+)/30 ", text, re.M)]

    whole, stopped = start("whole"), start("parts")
    work = tmp_path / ".parts.work"
    while not any(work.glob("checkpoint-*/trainer_state.json")):
        assert stopped.poll() is None, stopped.communicate()[0]
        time.sleep(0.01)
    stopped.send_signal(signal.SIGINT)
    text, _ = stopped.communicate()
    assert stopped.returncode == 130 and "stopped; the same command goes on from the last finished epoch" in text, text
    assert "Traceback" not in text and not (tmp_path / "parts").exists() and steps(text)[-1] < 30
    resumed = start("parts")
    text, _ = resumed.communicate()
    assert resumed.returncode == 0 and steps(text)[0] > 3 and steps(text)[-1] == 30, text
    text, _ = whole.communicate()
    assert whole.returncode == 0 and steps(text)[0] == 1, text
    whole, parts = (safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "tiny", "whole"]


def test_eval_and_pack_show_how_far_they_are(run, dense, reviews, tmp_path):
    from sparse_prune.tasks.data import load_sentiment
    from sparse_prune.tasks.evaluation import predict
    from sparse_prune.tasks.models import load_model

    code, text = run("eval", dense, "--eval", reviews)
    assert code == 0 and re.search(r"^eval +1/1 batches$", text, re.M), text
    told = []
    predict(*load_model(dense, "sentiment"), load_sentiment(reviews), 32, 16, report=lambda *step: told.append(step))
    assert told == [(1, 3), (2, 3), (3, 3)]
    zeroed = tmp_path / "zeroed"
    shutil.copytree(dense, zeroed)
    tensors, metadata = serialization.read_tensors(zeroed / "model.safetensors")
    tensors["garlic.encoder.layers.0.ffn_in.weight"][:64] = 0
    safetensors.torch.save_file(tensors, zeroed / "model.safetensors", metadata)
    code, text = run("pack", zeroed, "--block", "32", "--int8", "--out", tmp_path / "packed")
    assert code == 0 and re.findall(r"^pack +(\d/4) (.*)$", text, re.M) == [
        *(("0/4", "reading the model"), ("1/4", "packing its blocks"), ("2/4", "rounding"), ("3/4", "writing")),
        ("4/4", "done"),
    ], text


def test_block_text():
    assert (
        cli.parse_block("32x32") == (32, 32) and cli.parse_block("64X16") == (64, 16) and cli.parse_block("8") == (8, 8)
    )
    assert torch.tensor(cli.parse_block("128x16")).tolist() == [128, 16]


def test_bench(run, dense, tmp_path):
    grid = ("--shapes", "64:96", "--tokens", "1,8", "--density", "0.5", "--dtype", "float32", "--seconds", "0")
    code, text = run("bench", "linear", *grid, "--out", tmp_path / "b", "--json", tmp_path / "linear.json")
    assert code == 0 and "64->96" in text and (tmp_path / "b" / "linear.png").is_file(), text
    assert [row["M"] for row in json.loads((tmp_path / "linear.json").read_text())] == [1, 8]
    code, text = run("bench", "linear", "--grid", "huge")
    assert code == 2 and "--grid: expected one of small, full, got huge" in text
    code, text = run("bench", "linear", "--tokens", "many")
    assert code == 2 and "expected whole numbers above 0, separated by commas, got many" in text
    code, text = run("bench", "model", dense, dense, "--batch", "1", "--length", "8", "--dtype", "float32")
    assert code == 0 and "machine" in text, text


def test_info_tells_blocks_and_zeros(run, dense, tmp_path):
    code, text = run("info", dense, "--json", tmp_path / "info.json")
    assert code == 0 and "dense checkpoint" in text and "no blocks of zeros" in text
    zeroed = tmp_path / "zeroed"
    shutil.copytree(dense, zeroed)
    tensors = safetensors.torch.load_file(zeroed / "model.safetensors")
    for name, tensor in tensors.items():
        if ".layers." in name and tensor.ndim == 2:
            tensor.view(tensor.shape[0] // 64, 64, -1)[::2, :, : tensor.shape[1] // 2] = 0
    safetensors.torch.save_file(tensors, zeroed / "model.safetensors", {"format": "pt"})
    code, text = run("info", zeroed)
    assert code == 0 and "hold whole blocks of zeros" in text
    code, text = run("pack", zeroed, "--out", tmp_path / "packed", "--json", tmp_path / "pack.json")
    assert code == 0, text
    assert json.loads((tmp_path / "pack.json").read_text())["density"] == pytest.approx(0.75)
    code, text = run("info", tmp_path / "packed", "--json", tmp_path / "info.json")
    assert code == 0 and "packed checkpoint, version 1" in " ".join(text.split())
    # the largest blocks that fit: 64 rows, and columns as wide as the list of sizes has them
    assert {tuple(row["blocksize"]) for row in json.loads((tmp_path / "info.json").read_text())["layers"]} == {
        (64, 128)
    }
    code, text = run("info", tmp_path / "nothing.safetensors")
    assert code == 2 and "expected a safetensors file" in text


def test_int8_from_a_pruned_and_from_a_packed_model(run, reviews, dense, tmp_path):
    from sparse_prune import tasks

    model, tokenizer = tasks.models.load_model(dense, "sentiment")
    result = sp.sparsify_(model, sp.BlockSparseConfig(density=0.5), lambda name, _: "encoder" in name)
    sp.save_packed(model, tmp_path / "packed")
    tokenizer.save_pretrained(tmp_path / "packed")
    out = tmp_path / "int8"
    code, text = run("pack", tmp_path / "packed", "--int8", "--out", out, "--json", tmp_path / "pack.json")
    assert code == 0, text
    assert f"{len(result.converted)} of {len(result.converted)} sparse layers are int8" in text
    sizes = json.loads((tmp_path / "pack.json").read_text())
    assert sizes["packed_bytes"] < sizes["dense_bytes"] and sizes["density"] == pytest.approx(0.5)
    code, text = run("eval", out, "--eval", reviews)
    assert code == 0 and "accuracy" in text, text
    code, text = run("info", out)
    assert code == 0 and "packed checkpoint, version 2" in " ".join(text.split()) and "int8" in text
    code, text = run("bench", "model", dense, out, "--batch", "1", "--length", "8", "--dtype", "float32,bfloat16")
    assert code == 0 and "sparse" in text and "bf16" in text, text
    code, text = run("pack", out, "--out", tmp_path / "again")
    assert code == 2 and "expected a dense, pruned model, got a packed one" in " ".join(text.split())
    for name, options, shown in (("e4m3", ["--e4m3"], "float8_e4m3fn"), ("w8a16", ["--int8", "--weight-only"], "int8")):
        code, text = run("pack", tmp_path / "packed", *options, "--out", tmp_path / name)
        assert code == 0 and f"sparse layers are {shown}" in text, text
        code, text = run("info", tmp_path / name)
        assert code == 0 and "packed checkpoint, version 3" in " ".join(text.split()) and shown in text
        code, text = run("eval", tmp_path / name, "--eval", reviews)
        assert code == 0 and "accuracy" in text, text
    code, text = run("pack", out, "--e4m3", "--out", tmp_path / "never")
    assert code == 2 and "expected blocks in floating point, got ones that are rounded" in " ".join(text.split()), text
    for options, message in (
        (["--int8", "--e4m3"], "expected one of --int8 and"),
        (["--weight-only"], "--int8 beside it"),
    ):
        code, text = run("pack", tmp_path / "packed", *options, "--out", tmp_path / "never")
        assert code == 2 and message in " ".join(text.split())


def test_home_is_known_where_no_shell_tells_it(run, reviews, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    shutil.copy(reviews, tmp_path / "home" / "reviews.tsv")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text("train: ~/reviews.tsv\neval: ~/reviews.tsv\n")
    code, text = run("train", "--recipe=r.yaml", "--out=~/dense", *TINY)
    assert code == 0, text
    assert (tmp_path / "home" / "dense" / "config.json").is_file() and not (tmp_path / "~").exists()


def test_version(run):
    assert run("--version") == (0, f"sparse-prune {sp.__version__}\n")


def test_a_baseline_that_cannot_be_kept_is_told_before_the_work(run, reviews, tmp_path, monkeypatch):
    module = importlib.import_module("sparse_prune.tasks.baseline")  # a function of that name hides it
    monkeypatch.setattr(module, "load_examples", lambda *_: pytest.fail("at work"))
    (tmp_path / "file").touch()
    code, text = run("baseline", "--train", reviews, "--eval", reviews, "--out", tmp_path / "file")
    assert code == 2 and "file: expected a path that can be used" in text
