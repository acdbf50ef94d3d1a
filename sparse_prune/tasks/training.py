"""train and prune: from examples to a dense model, and from that to its block-sparse twin.

Both run Hugging Face's Trainer with a checkpoint an epoch. Interrupted, they resume from the last one when called again with the
same arguments and data; finished, they return what they found. Results appear under `out` whole.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import TrainingArguments, set_seed

from ..convert import BlockSparseConfig, SparsifyResult, sparsify_
from ..distill import DistillConfig
from ..errors import SparsePruneError
from ..integrations.trainer import (
    PRUNER_STATE_NAME,
    DistillationTrainer,
    ProgressCallback,
    PruningCallback,
    history,
)
from ..masks import check_blocksize, check_density, element_density
from ..pruner import PruneConfig, Pruner
from ..serialization import MASKS_NAME, WEIGHTS_NAME, atomic_dir, save_masks, save_packed, write_json
from .analysis import analyse, measure_latency
from .data import Example, builtin, check_task, load_examples
from .encoding import Collator, LengthBatches, encode
from .evaluation import Score, label_names, predict, score
from .models import GARLIC, encoder_filter, labels_of, load_model, max_length_of, native_bf16, new_garlic
from .store import check_out, finished, fingerprint, last_checkpoint, record, work_dir

Report = Callable[[str, int, int, str], None]  # report(phase, step, of, text)
METRICS_NAME, ANALYSIS_NAME, PACKED_NAME = "metrics.json", "analysis.json", "packed"
DEV_EXAMPLES = 1000  # scored after each epoch, to show; nothing is chosen by it


@dataclass(frozen=True)
class Recipe:
    """What training from scratch uses where the arguments leave it open; chosen on the dev part of the built-in data."""

    epochs: float
    learning_rate: float
    batch_size: int
    garlic: dict = field(default_factory=dict)


TRAIN_RECIPES = {
    ("sentiment", False): Recipe(3, 1e-3, 64, {"label_smoothing": 0.05}),
    ("sentiment", True): Recipe(8, 1e-3, 64, {"label_smoothing": 0.05}),
    ("ner", False): Recipe(2, 1e-3, 32),
    ("ner", True): Recipe(6, 1e-3, 32),
}
PRUNE_RECIPES = {
    ("sentiment", False): Recipe(2, 5e-4, 64),
    ("sentiment", True): Recipe(5, 5e-4, 64),
    ("ner", False): Recipe(2, 5e-4, 32),
    ("ner", True): Recipe(4, 5e-4, 32),
}
FINE_TUNE = Recipe(3, 5e-5, 32)  # a model that comes trained: the rate that BERT's authors suggest
EMBEDDING_RATE = 3.0  # on top of the learning rate for tables whose rows rarely see a gradient; new models only


def _arg(help_text: str, default=None):
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True)
class TrainArgs:
    """Arguments of train."""

    out: Path = _arg("directory for the trained model")
    model: str = _arg("garlic, a model directory, or a name on the Hugging Face hub", GARLIC)
    task: str = _arg("sentiment or ner", "sentiment")
    train: Path | None = _arg("training file (TSV, CSV, JSONL; CoNLL for ner); none: the built-in train part")
    eval: Path | None = _arg("file whose score is reported at the end; none: the built-in test part")
    dev: Path | None = _arg("file scored after each epoch, to watch; none: the built-in dev part where --train is built in")
    epochs: float | None = _arg("passes over the training file; none: the task's recipe")
    learning_rate: float | None = _arg("peak learning rate; none: the task's recipe")
    batch_size: int | None = _arg("examples a step; none: the task's recipe")
    max_length: int = _arg("tokens a row at most", 128)
    seed: int = _arg("seed of everything random", 0)
    full: bool = _arg("the longer recipe", False)


@dataclass(frozen=True)
class PruneArgs:
    """Arguments of prune."""

    model: Path = _arg("directory of a trained model")
    out: Path = _arg("directory for the pruned model")
    task: str = _arg("sentiment or ner", "sentiment")
    train: Path | None = _arg("training file; none: the built-in train part")
    eval: Path | None = _arg("file whose score is reported at the end; none: the built-in test part")
    dev: Path | None = _arg("file scored after each epoch, to watch; none: the built-in dev part where --train is built in")
    density: float = _arg("kept fraction of the encoder's blocks, in (0, 1]", 0.2)
    block: tuple[int, int] = _arg("block size (rows, columns)", (32, 32))
    criterion: str = _arg("what makes a block worth keeping", "movement")
    schedule: str = _arg("how the density falls", "cubic")
    scope: str = _arg("global: blocks of all layers compete; local: within their layer", "global")
    distill: bool = _arg("learn from the dense model too", True)
    epochs: float | None = _arg("passes over the training file; none: the task's recipe")
    learning_rate: float | None = _arg("peak learning rate; none: the task's recipe")
    batch_size: int | None = _arg("examples a step; none: the task's recipe")
    max_length: int = _arg("tokens a row at most", 128)
    seed: int = _arg("seed of everything random", 0)
    full: bool = _arg("the longer recipe", False)


def train(args: TrainArgs, report: Report | None = None) -> dict:
    """Train a dense model for the task and write a Hugging Face directory.

    Returns {"task", "score": {"name", "value", "per_class"}, "seconds", "history", "out"}. Raises SparsePruneError for bad arguments,
    files or models.
    """
    check_task(args.task)
    parts = _load_parts(args)
    out = Path(args.out)
    mark = fingerprint("train", args, _files(args, model=args.model) | {"out": None})
    earlier = finished(out, mark)
    if earlier:
        return earlier
    check_out(out)
    set_seed(args.seed)
    if args.model == GARLIC:
        recipe = TRAIN_RECIPES[args.task, args.full]
        model, tokenizer = new_garlic(args.task, parts["train"], args.max_length, recipe.garlic)
    else:
        recipe = FINE_TUNE
        model, tokenizer = load_model(args.model, args.task, labels_of(parts["train"]))
    _check_labels(args, parts, label_names(model))
    trainer, seconds = _fit("train", args, recipe, model, tokenizer, parts, mark, report, fresh=args.model == GARLIC)
    scored = _score(model, tokenizer, parts["eval"], args.max_length)
    result = {
        "task": args.task,
        "score": _plain(scored),
        "seconds": seconds,
        "history": history("train", trainer.state.log_history),
        "out": str(out),
    }
    with atomic_dir(out) as temporary:
        _save_dense(model, tokenizer, temporary)
        record(temporary, mark, result)
    shutil.rmtree(work_dir(out, mark))
    return result


def prune(args: PruneArgs, report: Report | None = None) -> dict:
    """Prune a trained model to args.density, learning from its dense self, and write the pruned model with its measurements.

    out gets the dense layout with exact zeros, masks.safetensors, packed/, metrics.json and analysis.json. Returns the content of
    metrics.json. Raises SparsePruneError for bad arguments, files or models.
    """
    check_task(args.task)
    check_density(args.density)
    check_blocksize(args.block)
    out = Path(args.out)
    mark = fingerprint("prune", args, _files(args, model=args.model) | {"out": None})
    parts = _load_parts(args)
    earlier = finished(out, mark)
    if earlier:
        return earlier
    check_out(out)
    set_seed(args.seed)
    teacher, tokenizer = load_model(args.model, args.task)
    model, _ = load_model(args.model, args.task)
    _check_labels(args, parts, label_names(model))
    filter_fn = encoder_filter(model)
    for name, module in model.named_modules():
        if filter_fn(name, module):
            check_blocksize(args.block, module.weight.shape)
    recipe = PRUNE_RECIPES[args.task, args.full] if model.config.model_type == "garlic" else FINE_TUNE
    trainer, seconds = _fit(
        "prune", args, recipe, model, tokenizer, parts, mark, report, teacher=teacher, fresh=model.config.model_type == "garlic"
    )
    pruner = trainer.pruner
    pruner.apply_()
    masks = {name: mask.cpu() for name, mask in pruner.masks.items()}
    if report:
        report("measure", 0, 3, "scoring the dense model")
    dense_score = _score(teacher, tokenizer, parts["eval"], args.max_length)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.pack") as folder:
        _save_dense(model, tokenizer, Path(folder, "dense"))
        packed, _ = load_model(Path(folder, "dense"), args.task)
    packed_layers = pack_(packed, masks, args.block)
    if report:
        report("measure", 1, 3, "scoring the packed model")
    sparse_score = _score(packed, tokenizer, parts["eval"], args.max_length)
    if report:
        report("measure", 2, 3, "timing both")
    latency = measure_latency(teacher, packed, tokenizer, parts["eval"], args.max_length)
    earlier_train = _trained(args.model)
    with atomic_dir(out) as temporary:
        _save_dense(model, tokenizer, temporary)
        save_masks(masks, args.block, temporary / MASKS_NAME)
        save_packed(packed, temporary / PACKED_NAME)
        tokenizer.save_pretrained(temporary / PACKED_NAME)
        size = {"dense": _size(temporary / WEIGHTS_NAME), "packed": _size(temporary / PACKED_NAME / WEIGHTS_NAME)}
        main = latency[0]
        metrics = {
            "task": args.task,
            "dense": {dense_score.name: dense_score.value, "latency_ms": main["dense_ms"], "bytes": size["dense"]},
            "sparse": {
                sparse_score.name: sparse_score.value,
                "latency_ms": main["sparse_ms"],
                "bytes": size["packed"],
                "density": overall_density(model, masks, args.block),
            },
            "seconds": {"train": earlier_train.get("seconds"), "prune": seconds},
        }
        analysis = analyse(
            task=args.task,
            teacher=teacher,
            model=model,
            packed=packed,
            tokenizer=tokenizer,
            masks=masks,
            blocksize=args.block,
            examples=parts["eval"],
            scores=(dense_score, sparse_score),
            history=[*earlier_train.get("history", []), *history("prune", trainer.state.log_history)],
            latency=latency,
            bytes_of={"dense_file": size["dense"], "packed_file": size["packed"]},
            rows=packed_layers.layers,
            max_length=args.max_length,
        )
        write_json(temporary / METRICS_NAME, metrics)
        write_json(temporary / ANALYSIS_NAME, analysis)
        record(temporary, mark, metrics)
    shutil.rmtree(work_dir(out, mark))
    return metrics


def evaluate(model_dir: Path, task: str, file: Path | None = None, max_length: int = 128, seed: int = 0) -> dict:
    """Score a dense or packed model directory on a file (none: the built-in test part).

    Returns {"task", "score": {"name", "value", "per_class"}, "examples", "seconds"}.
    """
    check_task(task)
    examples = builtin(task, seed).test if file is None else load_examples(task, file)
    model, tokenizer = load_model(model_dir, task)
    if file is not None:
        examples = load_examples(task, file, label_names(model))
    started = time.perf_counter()
    scored = _score(model, tokenizer, examples, max_length)
    return {
        "task": task,
        "score": _plain(scored),
        "examples": len(examples),
        "seconds": time.perf_counter() - started,
    }


def pack_(model: nn.Module, masks: dict[str, torch.Tensor], blocksize: tuple[int, int]) -> SparsifyResult:
    """Replace the masked linear layers of model by packed ones, in place; a layer too full to gain stays dense."""
    return sparsify_(model, BlockSparseConfig(blocksize=tuple(blocksize)), masks=masks)


def overall_density(model: nn.Module, masks: dict[str, torch.Tensor], blocksize: tuple[int, int]) -> float:
    """Kept elements over all elements of the masked layers."""
    sizes = {name: model.get_submodule(name).weight.shape for name in masks}
    kept = sum(element_density(mask, blocksize, sizes[name]) * sizes[name].numel() for name, mask in masks.items())
    return kept / sum(shape.numel() for shape in sizes.values())


def _fit(
    phase: str,
    args: TrainArgs | PruneArgs,
    recipe: Recipe,
    model: nn.Module,
    tokenizer,
    parts: dict[str, list[Example]],
    mark: str,
    report: Report | None,
    teacher: nn.Module | None = None,
    fresh: bool = False,
) -> tuple[DistillationTrainer, float]:
    """Run the Trainer over parts["train"], resuming where an interrupted run left a checkpoint; returns it and the seconds spent."""
    labels = label_names(model)
    length = max_length_of(model, tokenizer, args.max_length)
    data = encode(tokenizer, parts["train"], labels, length)
    batch_size = args.batch_size or recipe.batch_size
    batches = LengthBatches(data.lengths, batch_size, args.seed)
    epochs = args.epochs or recipe.epochs
    steps = max(1, int(epochs * len(batches)))
    pruning = isinstance(args, PruneArgs)
    work = work_dir(Path(args.out), mark)
    resume = last_checkpoint(work, (PRUNER_STATE_NAME,) if pruning else ())
    cpu = not torch.cuda.is_available()
    settings = TrainingArguments(
        output_dir=str(work),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=args.learning_rate or recipe.learning_rate,
        weight_decay=0.01,
        adam_beta2=0.98,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 10),
        bf16=native_bf16() if cpu else torch.cuda.is_bf16_supported(),
        use_cpu=cpu,
        logging_steps=max(1, min(20, steps // 10)),
        save_strategy="epoch",
        save_total_limit=2,
        seed=args.seed,
        data_seed=args.seed,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=not cpu,
        remove_unused_columns=False,
    )
    pruner, callbacks = None, []
    if pruning:
        config = PruneConfig(
            criterion=args.criterion,
            schedule=args.schedule,
            scope=args.scope,
            density=args.density,
            blocksize=tuple(args.block),
            total_steps=steps,
        )
        pruner = Pruner(model, config, encoder_filter(model))
        callbacks.append(PruningCallback(pruner, resume))

    def dev_score() -> float:
        dev = parts["dev"][:DEV_EXAMPLES]
        return score(dev, predict(model, tokenizer, dev, length, autocast=settings.bf16)).value

    def step_report(step: int, of: int, text: str) -> None:
        report(phase, step, of, text)

    progress = ProgressCallback(step_report if report else None, dev_score if parts.get("dev") else None)
    callbacks.append(progress)
    with _quiet_trainer():
        trainer = DistillationTrainer(
            model=model,
            args=settings,
            train_dataset=data,
            data_collator=Collator(tokenizer.pad_token_id),
            processing_class=tokenizer,
            callbacks=callbacks,
            batches=batches,
            embedding_rate=EMBEDDING_RATE if fresh else 1.0,
            teacher=teacher if pruning and args.distill else None,
        )
        for callback in list(trainer.callback_handler.callbacks):
            if type(callback).__name__ == "PrinterCallback":
                trainer.remove_callback(type(callback))
        trainer.pruner = pruner
        if pruner is not None:
            pruner.attach(trainer.create_optimizer())
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer, progress.seconds
