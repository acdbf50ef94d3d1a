"""Pruning inside Hugging Face's Trainer: a callback that steps the Pruner, and a Trainer that learns from a teacher too."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..distill import DistillConfig, distillation_loss, hidden_loss
from ..errors import SparsePruneError
from ..pruner import Pruner

__all__ = ["DistillationTrainer", "PruningCallback"]  # what a user needs; the rest serves sparse_prune.tasks
PRUNER_STATE_NAME = "pruner.pt"
# Tokens up to which attention in parts learns faster on a CPU in bf16 (`python bench/short_attention.py`, with AMX: 15 ms
# against 81 at 40 tokens, 30 against 58 at 128, but 50 against 38 at 256).
SHORT = 128


class PruningCallback(TrainerCallback):
    """Steps the pruner after each optimizer step (gradients still there), saves it in every checkpoint, and resumes it.

    pruner       a Pruner on the model that the Trainer trains
    resume_from  the checkpoint that trainer.train(resume_from_checkpoint=...) is given, if any
    """

    def __init__(self, pruner: Pruner, resume_from: str | Path | None = None) -> None:
        self.pruner, self.resume_from = pruner, resume_from

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_) -> None:
        """Resume masks and accumulated saliency; the Trainer has just loaded the weights.

        Raises SparsePruneError where the Trainer is to end with its best checkpoint: that may be one with other masks.
        """
        if args.load_best_model_at_end:
            remedy = "leave it out: the best checkpoint may be from before the last block went"
            raise SparsePruneError("load_best_model_at_end", "False while a Pruner prunes", True, remedy)
        if self.resume_from:
            path = Path(self.resume_from) / PRUNER_STATE_NAME
            self.pruner.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_) -> None:
        """After the optimizer has stepped and before gradients are zeroed."""
        self.pruner.step()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_) -> None:
        """Put the pruner's state beside the weights that the Trainer has just saved."""
        saved = self.pruner.state_dict()  # on every rank: sharded weights are gathered
        if not state.is_world_process_zero:
            return
        assert args.output_dir is not None  # TrainingArguments fills it in
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        temporary = folder / f".{PRUNER_STATE_NAME}"
        torch.save(saved, temporary)
        temporary.replace(folder / PRUNER_STATE_NAME)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict | None = None, **_
    ) -> None:
        """Add the density to what is logged."""
        if logs is not None:
            logs["density"] = state.log_history[-1]["density"] = self.pruner.density()


class DistillationTrainer(Trainer):
    """Trainer whose loss is (1 - a) * task loss + a * T^2 KL(teacher || student) + b * hidden_loss.

    teacher          the dense model, frozen; None trains on labels alone
    distill          temperature T, logits_weight a, hidden_weight b
    batches          a batch sampler for training; None leaves the Trainer's own
    embedding_rate   factor on the learning rate of nn.Embedding weights, whose rows rarely see a gradient
    """

    optimizer: torch.optim.Optimizer | None  # Trainer's

    def __init__(
        self,
        *args,
        teacher: nn.Module | None = None,
        distill: DistillConfig | None = None,
        batches: torch.utils.data.Sampler | None = None,
        embedding_rate: float = 1.0,
        **kwargs,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.distill, self.batches, self.embedding_rate = distill or DistillConfig(), batches, embedding_rate
        self.teacher = teacher
        if teacher is not None:
            teacher.to(self.args.device).eval().requires_grad_(False)

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """The training batches, in the order of `batches` where that was given."""
        if self.batches is None:
            return super().get_train_dataloader()
        loader: torch.utils.data.DataLoader = torch.utils.data.DataLoader(
            cast(torch.utils.data.Dataset, self.train_dataset),
            batch_sampler=self.batches,
            collate_fn=self.data_collator,
        )
        return self.accelerator.prepare(loader)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW: no decay on vectors and embeddings, a higher rate for embeddings."""
        if self.optimizer is None:
            assert self.model is not None
            embeddings = {id(m.weight) for m in self.model.modules() if isinstance(m, nn.Embedding)}
            rate, decay = self.args.learning_rate, self.args.weight_decay
            matrices: list[nn.Parameter] = []
            vectors: list[nn.Parameter] = []
            tables: list[nn.Parameter] = []
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    kind = tables if id(parameter) in embeddings else matrices if parameter.dim() > 1 else vectors
                    kind.append(parameter)
            groups = [
                {"params": matrices, "lr": rate, "weight_decay": decay},
                {"params": vectors, "lr": rate, "weight_decay": 0.0},
                {"params": tables, "lr": rate * self.embedding_rate, "weight_decay": 0.0},
            ]
            betas = (self.args.adam_beta1, self.args.adam_beta2)
            self.optimizer = torch.optim.AdamW(
                [g for g in groups if g["params"]], betas=betas, eps=self.args.adam_epsilon, fused=True
            )
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss above for one batch (with a teacher), or the model's own loss (without)."""
        weights = self.distill
        if self.teacher is None or not model.training:
            with self._attention(inputs):
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        hidden = weights.hidden_weight > 0
        with self._attention(inputs):
            outputs = model(**inputs, output_hidden_states=hidden)
        seen = {key: value for key, value in inputs.items() if key != "labels"}
        with torch.no_grad(), self.compute_loss_context_manager():
            taught = self.teacher(**seen, output_hidden_states=hidden)
        labels = inputs["labels"]
        of_tokens = labels if labels.dim() == 2 else None
        loss = (1 - weights.logits_weight) * outputs.loss
        if weights.logits_weight:
            soft = distillation_loss(outputs.logits, taught.logits, weights.temperature, labels=of_tokens)
            loss = loss + weights.logits_weight * soft
        if hidden:
            apart = hidden_loss(outputs.hidden_states, taught.hidden_states, inputs["attention_mask"])
            loss = loss + weights.hidden_weight * apart
        return (loss, outputs) if return_outputs else loss

    def _attention(self, inputs: dict[str, Any]) -> contextlib.AbstractContextManager:
        """SDPA by its parts where its one kernel has the slower backward (`SHORT`); else as PyTorch chooses."""
        tokens = inputs.get("input_ids")
        learns = torch.is_grad_enabled() and self.args.bf16
        short = learns and tokens is not None and tokens.device.type == "cpu" and tokens.shape[-1] <= SHORT
        return sdpa_kernel(SDPBackend.MATH) if short else contextlib.nullcontext()


class ProgressCallback(TrainerCallback):
    """Tells a function about every step, and after each epoch scores the weights and notes the time.

    report   report(step, of, text), or None
    score    score() -> float, or None

    Score and time go into the Trainer's log_history, so checkpoints carry them.
    """

    def __init__(self, report: Callable[[int, int, str], None] | None, score: Callable[[], float] | None) -> None:
        self.report, self.score, self.told = report, score, ""
        self.started = time.perf_counter()
        self.before = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_) -> None:
        """Start the clock where an interrupted run stopped it."""
        self.started, self.before = time.perf_counter(), seconds_spent(state.log_history)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_) -> None:
        """One step further."""
        if self.report:
            self.report(state.global_step, state.max_steps, self.told)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict | None = None, **_
    ) -> None:
        """Keep the last loss to show beside the steps."""
        if logs and "loss" in logs:
            density = f", density {logs['density']:.2f}" if "density" in logs else ""
            self.told = f"loss {float(logs['loss']):.3f}{density}"

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_) -> None:
        """Score the epoch's weights."""
        row = {"step": state.global_step, "epoch": state.epoch}
        if self.score:
            row["score"] = self.score()
        state.log_history.append(row | {"seconds": self.before + time.perf_counter() - self.started})


class CurveCallback(TrainerCallback):
    """Measures the model on its way down: when the density first falls to each of `levels`, what measure() says is logged.

    measure() -> dict of numbers; it is kept in the Trainer's log_history under "curve", with the density.
    """

    def __init__(self, pruner: Pruner, levels: Sequence[float], measure: Callable[[], dict[str, float]]) -> None:
        self.pruner, self.levels, self.measure = pruner, sorted(levels, reverse=True), measure

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_) -> None:
        """Measure where a level has been reached since the last step."""
        density = self.pruner.density()
        reached = [level for level in self.levels if density <= level]
        if reached:
            self.levels = [level for level in self.levels if density > level]
            log: list[dict[str, Any]] = state.log_history
            if any(row["curve"]["density"] <= reached[-1] for row in log if "curve" in row):
                return  # measured before the run was interrupted
            log.append({"step": state.global_step, "curve": {"density": density, **self.measure()}})


def seconds_spent(log_history: list[dict]) -> float:
    """Seconds that training took up to the last epoch's end, interrupted runs together."""
    return next((row["seconds"] for row in reversed(log_history) if "seconds" in row), 0.0)


def history(phase: str, log_history: list[dict]) -> list[dict]:
    """Losses, densities and scores that a Trainer logged, as entries of phase, step, loss, density and score."""
    entries: list[dict] = []
    for row in log_history:
        if "loss" in row:
            density = row.get("density", 1.0)
            entries.append(
                {"phase": phase, "step": row["step"], "loss": float(row["loss"]), "density": density, "score": None}
            )
        elif "score" in row and entries:
            entries[-1]["score"] = row["score"]
    return entries
