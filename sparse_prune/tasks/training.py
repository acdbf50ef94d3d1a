"""train and prune: from examples to a dense model, and from that to its block-sparse twin.

Both run Hugging Face's Trainer with a checkpoint an epoch. Interrupted, they resume from the last one when called again with the
same arguments and data; finished, they return what they found. Results appear under `out` whole.
"""

from __future__ import annotations

import copy
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainingArguments, set_seed

from ..benchmark import interleaved_medians
from ..distill import DistillConfig
from ..errors import SparsePruneError
from ..integrations.trainer import (
    PRUNER_STATE_NAME,
    CurveCallback,
    DistillationTrainer,
    ProgressCallback,
    PruningCallback,
    history,
    seconds_spent,
)
from ..masks import check_blocksize
from ..pruner import PruneConfig, Pruner
from ..serialization import MASKS_NAME, WEIGHTS_NAME, atomic_dir, read_json, save_masks, save_packed, write_json
from .analysis import analyse, full_batch, measure_latency
from .data import Example, builtin, check_task, load_examples
from .encoding import Collator, LengthBatches, encode
from .evaluation import Score, label_names, predict, score
from .models import (
    GARLIC,
    check_dense,
    check_finite,
    check_ids,
    check_model_dir,
    encoder_filter,
    labels_of,
    load_model,
    max_length_of,
    native_bf16,
    new_garlic,
    quiet,
)
from .packing import pack_
from .store import RUN_NAME, check_out, fingerprint, finished, last_checkpoint, record, work_dir

Report = Callable[[str, int, int, str], None]  # report(phase, step, of, text)
METRICS_NAME, ANALYSIS_NAME, PACKED_NAME = "metrics.json", "analysis.json", "packed"
CURVE_DENSITIES = (0.75, 0.5, 0.35)  # measured on the way down
DEV_EXAMPLES = 600  # scored after each epoch, to show; nothing is chosen by it


@dataclass(frozen=True)
class Recipe:
    """What a run uses where the arguments leave it open; chosen on the dev part of the built-in data.

    epochs grow until there are least_steps optimizer steps: a small file needs more passes than a large one. embedding_rate is a
    factor on the learning rate for embedding tables, whose rows rarely see a gradient; garlic holds settings of a new GarlicConfig.
    """

    epochs: float
    learning_rate: float
    batch_size: int
    embedding_rate: float
    weight_decay: float
    garlic: dict = field(default_factory=dict)
    least_steps: int = 150

    def steps(self, epochs: float | None, batches: int) -> int:
        """Optimizer steps of a run over that many batches; epochs None takes the recipe's, or more where they are too few."""
        return max(1, int(epochs * batches)) if epochs else max(self.least_steps, int(self.epochs * batches), 1)


SENTIMENT = {  # some ten thousand texts: what is not held back is learnt by heart
    "embedding_dropout_prob": 0.4,
    "hidden_dropout_prob": 0.15,
    "token_dropout_prob": 0.2,
    "classifier_dropout": 0.3,
    "label_smoothing": 0.1,
}
NER = {"embedding_dropout_prob": 0.2, "classifier_dropout": 0.1}
TRAIN_RECIPES = {
    ("sentiment", False): Recipe(2, 7e-4, 64, 1.5, 0.05, SENTIMENT),
    ("sentiment", True): Recipe(4, 7e-4, 64, 1.5, 0.05, SENTIMENT),
    ("ner", False): Recipe(1, 1e-3, 16, 2.0, 0.02, NER),
    ("ner", True): Recipe(5, 1e-3, 16, 2.0, 0.02, NER),
}
PRUNE_RECIPES = {
    ("sentiment", False): Recipe(2, 5e-4, 64, 1.0, 0.01),
    ("sentiment", True): Recipe(5, 5e-4, 64, 1.0, 0.01),
    ("ner", False): Recipe(0.9, 7e-4, 32, 1.0, 0.01),
    ("ner", True): Recipe(4, 7e-4, 32, 1.0, 0.01),
}
# A model that comes trained: fine-tuned at the rate that BERT's authors suggest; pruned at a higher one, since most of it must be
# learnt anew from its dense self, and for longer. By `full`.
FINE_TUNE = Recipe(3, 5e-5, 32, 1.0, 0.01)
FINE_PRUNE = {full: Recipe(epochs, 5e-4, 32, 1.0, 0.01, least_steps=600) for full, epochs in ((False, 6), (True, 12))}
# What prune learns from the dense model. A student's dropout would set their hidden states apart too, so nn.Dropout is off while
# there is a teacher (Garlic goes on dropping tokens).
DISTILL = DistillConfig(hidden_weight=1.0)


@dataclass(frozen=True, kw_only=True)
class RunArgs:
    """What train, prune and ablation have in common.

    out            directory to write
    task           "sentiment" or "ner"
    train          training file (TSV, CSV, JSONL; CoNLL for ner); None: the built-in train part
    eval           file whose score is reported at the end; None: the built-in test part
    dev            file scored after each epoch, to watch; None: the built-in dev part where train is built in
    epochs         passes over the training file; None: the task's recipe, as for learning_rate and batch_size
    learning_rate  peak learning rate
    batch_size     examples a step
    max_length     tokens a row at most
    seed           seed of everything random
    full           the longer recipe
    """

    out: Path
    task: str = "sentiment"
    train: Path | None = None
    eval: Path | None = None
    dev: Path | None = None
    epochs: float | None = None
    learning_rate: float | None = None
    batch_size: int | None = None
    max_length: int = 128
    seed: int = 0
    full: bool = False

    def __post_init__(self) -> None:
        check_task(self.task)
        for name in ("epochs", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise SparsePruneError(name, "a number above 0", value, "leave it out for the task's recipe")
        for name, least, most in (("batch_size", 1, None), ("max_length", 3, None), ("seed", 0, 2**32 - 1)):
            value = getattr(self, name)
            if value is not None and (value < least or (most is not None and value > most)):
                expected = f"a whole number of at least {least}" + (f" and at most {most}" if most else "")
                raise SparsePruneError(name, expected, value, "pass such a number or leave it out")


@dataclass(frozen=True, kw_only=True)
class TrainArgs(RunArgs):
    """Arguments of train: those of RunArgs, and

    model  garlic, a model directory, or a name on the Hugging Face hub
    """

    model: str = GARLIC


@dataclass(frozen=True, kw_only=True)
class PruneArgs(RunArgs):
    """Arguments of prune: those of RunArgs, and

    model        directory of a trained model
    density      kept fraction of the encoder's blocks, in (0, 1]
    block        block size (rows, columns)
    criterion    what makes a block worth keeping
    schedule     how the density falls
    scope        "global": blocks of all layers compete; "local": within their layer
    alpha        of the article's rule, which then takes the place of density; see PruneConfig, as for relative_to
    relative_to  what alpha is relative to, "grad" or "weight"
    distill      learn from the dense model too
    curve        measure score and latency on the way down
    """

    model: Path
    density: float = 0.2
    block: tuple[int, int] = (32, 32)
    criterion: str = "taylor"
    schedule: str = "cubic"
    scope: str = "global"
    alpha: float | None = None
    relative_to: str = "grad"
    distill: bool = True
    curve: bool = True


@quiet()
def train(args: TrainArgs, report: Report | None = None) -> dict:
    """Train a dense model for the task and write a Hugging Face directory.

    Returns {"task", "score": {"name", "value", "per_class"}, "seconds", "history", "out"}. Raises SparsePruneError for bad
    arguments, files or models.
    """
    if args.model != GARLIC:
        check_dense(args.model)
    parts = load_parts(args)
    out = Path(args.out)
    mark = _mark("train", args)
    earlier = finished(out, mark)
    if earlier:
        return earlier
    check_out(out, None if args.model == GARLIC else args.model)
    set_seed(args.seed)
    if args.model == GARLIC:
        recipe = TRAIN_RECIPES[args.task, args.full]
        model, tokenizer = new_garlic(args.task, parts["train"], args.max_length, recipe.garlic)
    else:
        recipe = FINE_TUNE
        model, tokenizer = load_model(args.model, args.task, labels_of(parts["train"]))
    _check_labels(args, parts, label_names(model))
    fitted = _fit("train", args, recipe, model, tokenizer, parts, mark, report)
    scored = score_examples(model, tokenizer, parts["eval"], args.max_length)
    result = {
        "task": args.task,
        "score": _plain(scored),
        "seconds": fitted.seconds,
        "history": fitted.history,
        "out": str(out),
    }
    with atomic_dir(out) as temporary:
        _save_dense(model, tokenizer, temporary)
        record(temporary, mark, result)
    shutil.rmtree(work_dir(out, mark))
    return result


@quiet()
def prune(args: PruneArgs, report: Report | None = None) -> dict:
    """Prune a trained model to args.density, learning from its dense self, and write the pruned model with its measurements.

    out gets the dense layout with exact zeros, masks.safetensors, packed/, metrics.json and analysis.json. Returns the content of
    metrics.json. Raises SparsePruneError for bad arguments, files or models.
    """
    check_prune_args(args)
    parts, out = load_parts(args), Path(args.out)
    mark = _mark("prune", args)
    earlier = finished(out, mark)
    if earlier:
        return earlier
    check_out(out, args.model)
    pruned = fit_pruned(args, parts, mark, report)
    teacher, model, tokenizer, masks = pruned.teacher, pruned.model, pruned.tokenizer, pruned.masks
    packed = copy.deepcopy(model)
    rows = pack_(packed, masks, args.block).layers
    tell = report or (lambda *_: None)
    tell("measure", 0, 4, "scoring the dense model")
    dense_score = score_examples(teacher, tokenizer, parts["eval"], args.max_length)
    tell("measure", 1, 4, "scoring the packed model")
    sparse_score = score_examples(packed, tokenizer, parts["eval"], args.max_length)
    tell("measure", 2, 4, "timing both")
    latency = measure_latency(teacher, packed, tokenizer, parts["eval"], pruned.length)
    tell("measure", 3, 4, "looking inside")
    before = _trained(args.model)
    with atomic_dir(out) as temporary:
        _save_dense(model, tokenizer, temporary)
        save_masks(masks, args.block, temporary / MASKS_NAME)
        save_packed(packed, temporary / PACKED_NAME)
        tokenizer.save_pretrained(temporary / PACKED_NAME)
        files = {"dense_file": temporary / WEIGHTS_NAME, "packed_file": temporary / PACKED_NAME / WEIGHTS_NAME}
        sizes = {name: path.stat().st_size for name, path in files.items()}
        metrics = {
            "task": args.task,
            "dense": {
                dense_score.name: dense_score.value,
                "latency_ms": latency[0]["dense_ms"],
                "bytes": sizes["dense_file"],
            },
            "sparse": {
                sparse_score.name: sparse_score.value,
                "latency_ms": latency[0]["sparse_ms"],
                "bytes": sizes["packed_file"],
                "density": pruned.density,
            },
            "seconds": {"train": _seconds(before), "prune": pruned.seconds},
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
            history=[*before.get("history", []), *pruned.history],
            curve=pruned.curve,
            latency=latency,
            bytes_of=sizes,
            rows=rows,
            max_length=pruned.length,
        )
        write_json(temporary / METRICS_NAME, metrics)
        write_json(temporary / ANALYSIS_NAME, analysis)
        record(temporary, mark, metrics)
    shutil.rmtree(work_dir(out, mark))
    tell("measure", 4, 4, "done")
    return metrics


@dataclass(frozen=True)
class Pruned:
    """A model pruned in the dense layout (exact zeros), the dense one it came from, and how the run went."""

    teacher: PreTrainedModel
    model: PreTrainedModel
    tokenizer: Any
    masks: dict[str, torch.Tensor]
    density: float
    history: list[dict]
    curve: list[dict]
    seconds: float
    length: int


def check_prune_args(args: PruneArgs) -> None:
    """Raise SparsePruneError for arguments that cannot be, before anything is written."""
    _prune_config(args)
    check_model_dir(args.model)
    check_dense(args.model)


def _prune_config(args: PruneArgs, **more: Any) -> PruneConfig:
    """args as a Pruner takes them."""
    names = ("criterion", "schedule", "scope", "density", "alpha", "relative_to")
    return PruneConfig(**{name: getattr(args, name) for name in names}, blocksize=args.block, **more)


def fit_pruned(args: PruneArgs, parts: dict[str, list[Example]], mark: str, report: Report | None) -> Pruned:
    """The training part of prune: load args.model twice, prune one while it learns from the other."""
    set_seed(args.seed)
    teacher, tokenizer = load_model(args.model, args.task)
    teacher.eval()
    model = copy.deepcopy(teacher)
    _check_labels(args, parts, label_names(model))
    filter_fn = encoder_filter(model)
    for name, module in model.named_modules():
        if filter_fn(name, module):
            check_blocksize(args.block, module.weight.shape)
    recipe = PRUNE_RECIPES[args.task, args.full] if model.config.model_type == "garlic" else FINE_PRUNE[args.full]
    fitted = _fit("prune", args, recipe, model, tokenizer, parts, mark, report, teacher=teacher)
    assert fitted.pruner is not None
    fitted.pruner.apply_()
    masks, density = {name: mask.cpu() for name, mask in fitted.pruner.masks.items()}, fitted.pruner.density()
    model.cpu().eval()
    teacher.cpu()
    length = max_length_of(model, tokenizer, args.max_length)
    return Pruned(teacher, model, tokenizer, masks, density, fitted.history, fitted.curve, fitted.seconds, length)


@quiet()
def evaluate(
    model_dir: Path,
    task: str,
    file: Path | None = None,
    max_length: int = 128,
    seed: int = 0,
    report: Report | None = None,
) -> dict:
    """Score a dense or packed model directory on a file (none: the built-in test part).

    Returns {"task", "score": {"name", "value", "per_class"}, "examples", "seconds"}.
    """
    RunArgs(out=Path(model_dir), task=task, max_length=max_length, seed=seed)  # checks them
    check_model_dir(model_dir)
    examples = builtin(task, seed).test if file is None else load_examples(task, file)
    model, tokenizer = load_model(model_dir, task)
    if file is not None:
        examples = load_examples(task, file, label_names(model))
    started = time.perf_counter()
    tell = (lambda done, of: report("eval", done, of, "batches")) if report else None
    scored = score_examples(model, tokenizer, examples, max_length, tell)
    return {
        "task": task,
        "score": _plain(scored),
        "examples": len(examples),
        "seconds": time.perf_counter() - started,
    }


@dataclass(frozen=True)
class Fitted:
    """What a run of the Trainer leaves beside the weights: the pruner (if it pruned), the log, and the seconds it took."""

    pruner: Pruner | None
    history: list[dict]
    curve: list[dict]
    seconds: float


def _fit(
    phase: str,
    args: RunArgs,
    recipe: Recipe,
    model: PreTrainedModel,
    tokenizer,
    parts: dict[str, list[Example]],
    mark: str,
    report: Report | None,
    teacher: PreTrainedModel | None = None,
) -> Fitted:
    """Run the Trainer over parts["train"], resuming where an interrupted run left a checkpoint."""
    labels = label_names(model)
    length = max_length_of(model, tokenizer, args.max_length)
    data = encode(tokenizer, parts["train"], labels, length)
    check_ids(model, data.rows, tokenizer.pad_token_id)
    batch_size = args.batch_size or recipe.batch_size
    batches = LengthBatches(data.lengths, batch_size, args.seed)
    steps = recipe.steps(args.epochs, len(batches))
    pruner: Pruner | None = None
    if isinstance(args, PruneArgs):
        config = _prune_config(args, total_steps=steps, seed=args.seed)
        pruner = Pruner(model, config, encoder_filter(model))
        if args.distill:
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
    work = work_dir(Path(args.out), mark)
    resume = last_checkpoint(work, (PRUNER_STATE_NAME,) if pruner is not None else ())
    settings = _settings(args, recipe, batch_size, steps, work)
    watch = _Watch(tokenizer, parts.get("dev", parts["eval"])[:DEV_EXAMPLES], length, settings.bf16)
    point: Callable[[PreTrainedModel], dict[str, float]] | None = None
    callbacks: list[TrainerCallback] = []
    if pruner is not None:
        callbacks.append(PruningCallback(pruner, resume))
    if isinstance(args, PruneArgs) and args.curve:
        assert teacher is not None and pruner is not None
        point = partial(watch.point, teacher, pruner)
        levels = [density for density in CURVE_DENSITIES if density > args.density]
        callbacks.append(CurveCallback(pruner, levels, partial(point, model)))
    step_report = partial(report, phase) if report else None
    callbacks.append(ProgressCallback(step_report, partial(watch.score, model) if "dev" in parts else None))
    trainer = DistillationTrainer(
        model=model,
        args=settings,
        train_dataset=data,
        data_collator=Collator(tokenizer.pad_token_id),
        processing_class=tokenizer,
        callbacks=callbacks,
        batches=batches,
        embedding_rate=recipe.embedding_rate,
        teacher=teacher if isinstance(args, PruneArgs) and args.distill else None,
        distill=DISTILL,
    )
    trainer.remove_callback(PrinterCallback)
    if pruner is not None:
        pruner.attach(trainer.create_optimizer())
    try:
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        if not all(map(math.isfinite, losses)):
            raise SparsePruneError("loss", "a finite number", "NaN or infinity", "lower the learning rate")
        check_finite("trained model", model)
    except SparsePruneError:  # such as a loss that is not finite: the same run would end the same way
        shutil.rmtree(work)
        raise
    # The Trainer has put an autocast around model.forward, which copies of the model would share; take it off.
    trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    model.__dict__.pop("forward", None)
    if pruner is not None:
        pruner.remove_hooks()
    log: list[dict[str, Any]] = trainer.state.log_history
    curve = [row["curve"] for row in log if "curve" in row]
    if point is not None and teacher is not None and pruner is not None:
        ends = {"density": 1.0, **point(teacher)}, {"density": pruner.density(), **point(model)}
        curve = [ends[0], *curve, ends[1]]
    return Fitted(pruner, history(phase, log), curve, seconds_spent(log))


def _settings(args: RunArgs, recipe: Recipe, batch_size: int, steps: int, work: Path) -> TrainingArguments:
    cpu = not torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(work),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=args.learning_rate or recipe.learning_rate,
        weight_decay=recipe.weight_decay,
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
        logging_nan_inf_filter=False,
        dataloader_pin_memory=not cpu,
        remove_unused_columns=False,
    )


class _Watch(NamedTuple):
    """Examples that a model is measured on while it learns, in autocast where it learns in that."""

    tokenizer: Any
    examples: Sequence[Example]
    length: int
    autocast: bool

    def score(self, model: PreTrainedModel) -> float:
        predictions = predict(model, self.tokenizer, self.examples, self.length, autocast=self.autocast)
        return score(self.examples, predictions).value

    def point(self, teacher: PreTrainedModel, pruner: Pruner, model: PreTrainedModel) -> dict[str, float]:
        """Score and latency of model, the teacher itself or else packed by the masks as they are, in turns with the teacher."""
        nets = {"dense": teacher.base_model}
        if model is not teacher:
            packed = copy.deepcopy(model).eval()
            pack_(packed, pruner.masks, pruner.config.blocksize)
            nets["packed"] = packed.base_model
        device = next(model.parameters()).device
        inputs = {
            key: value.to(device) for key, value in full_batch(self.tokenizer, self.examples, 16, self.length).items()
        }

        def call(net: nn.Module) -> None:
            net(**inputs)
            if device.type == "cuda":
                torch.cuda.synchronize()

        calls = {name: partial(call, net) for name, net in nets.items()}
        with torch.inference_mode():
            times = {name: 1e3 * seconds for name, seconds in interleaved_medians(calls, seconds=0.5).items()}
        dense = times["dense"]
        return {"score": self.score(model), "latency_ms": times.get("packed", dense), "dense_ms": dense}


def load_parts(args: RunArgs) -> dict[str, list[Example]]:
    """The examples of "train", "eval" and (perhaps) "dev": files where given, else the built-in parts."""
    # builtin remembers what it has read.
    parts = {
        "train": builtin(args.task).train if args.train is None else load_examples(args.task, args.train),
        "eval": builtin(args.task).test if args.eval is None else load_examples(args.task, args.eval),
    }
    if args.dev is not None:
        parts["dev"] = load_examples(args.task, args.dev)
    elif args.train is None:
        parts["dev"] = builtin(args.task).dev
    return parts


def _check_labels(args: RunArgs, parts: dict[str, list[Example]], labels: Sequence[str]) -> None:
    """Raise SparsePruneError, with file and line, for a label that the model has no class for."""
    for part, path in (("train", args.train), ("eval", args.eval), ("dev", args.dev)):
        if path is not None:
            parts[part] = load_examples(args.task, path, labels)


def _mark(kind: str, args: RunArgs) -> str:
    """The fingerprint of a run: every argument but `out`, and what is in the files and directories they name."""
    return fingerprint(kind, args, {name: getattr(args, name) for name in ("train", "eval", "dev", "model")}, ("out",))


def score_examples(
    model: PreTrainedModel,
    tokenizer,
    examples: Sequence[Example],
    max_length: int,
    report: Callable[[int, int], None] | None = None,
) -> Score:
    length = max_length_of(model, tokenizer, max_length)
    return score(examples, predict(model, tokenizer, examples, length, report=report))


def _plain(scored: Score) -> dict:
    classes = {name: {"support": support, "score": value} for name, (support, value) in scored.per_class.items()}
    return {"name": scored.name, "value": scored.value, "per_class": classes}


def _save_dense(model: PreTrainedModel, tokenizer, directory: Path) -> None:
    model.eval().save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _seconds(result: dict) -> float | None:
    """What a recorded run took; of a pruning run, whose result is its metrics, with the training before it. None: not known."""
    seconds = result.get("seconds")
    return sum(filter(None, seconds.values())) if isinstance(seconds, dict) else seconds


def _trained(model_dir: str | Path) -> dict:
    """What train recorded in a model directory; empty where another tool made it."""
    path = Path(model_dir, RUN_NAME)
    return read_json(path)["result"] if path.is_file() else {}
