"""What test_distributed.py launches on two ranks: prints a line of JSON per check; any failure is an exception."""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.state import AcceleratorState
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, TrainingArguments
from transformers.pytorch_utils import Conv1D

import sparse_prune as sp
from sparse_prune.integrations.trainer import PRUNER_STATE_NAME, DistillationTrainer, PruningCallback
from sparse_prune.linears import as_matrix

BLOCK = (16, 16)
LOOPS = [("ddp", "wanda"), ("fsdp2", "taylor"), ("fsdp2", "wanda"), ("fsdp2", "magnitude"), ("fsdp2", "random")]


def agreed(value: object, what: str) -> None:
    """Raise unless value (of tensors, numbers, dicts) is the same on both ranks, bit for bit."""
    both = [None, None]
    dist.all_gather_object(both, value)
    assert equal(*both), f"{what} differs between the ranks"


def equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return a == b


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter in full."""
    found = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        found[name] = (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()
    return found


def check_zeros(model: nn.Module, pruner: sp.Pruner, optimizer: torch.optim.Optimizer) -> None:
    """Pruned blocks are exactly zero in the weights and in the optimizer's moments; kept ones are not all zero."""
    weights = whole(model)
    for name, mask in pruner.masks.items():
        moment = optimizer.state[model.get_submodule(name).weight]["exp_avg"]
        moment = moment.full_tensor() if hasattr(moment, "full_tensor") else moment
        assert not moment[weights[f"{name}.weight"] == 0].any(), f"{name}: momentum would revive pruned weights"
        weight = weights[f"{name}.weight"]
        weight = weight.t() if isinstance(model.get_submodule(name), Conv1D) else weight
        blocks = sp.BsrWeight.from_dense(weight, torch.ones_like(mask), BLOCK).values.abs().amax((1, 2))
        assert torch.equal(blocks.view(mask.shape) > 0, mask), name


class Texts(torch.utils.data.Dataset):
    """Sixteen rows of random tokens."""

    def __init__(self):
        self.ids = torch.randint(0, 50, (16, 8), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict:
        ids = self.ids[i]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.sum() % 2}


def trainer_with_ddp(out: Path) -> None:
    """Trainer, distilling, under DDP: masks agree, and a run resumed from its checkpoint ends where the whole one did."""

    def run(criterion: str, resume: Path | None) -> tuple[dict, dict]:
        torch.manual_seed(0)
        config = BertConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, vocab_size=50
        )
        model = BertForSequenceClassification(config)
        teacher = copy.deepcopy(model)
        settings = sp.PruneConfig(criterion, density=0.4, blocksize=BLOCK, total_steps=6, warmup=0, update_every=1)
        pruner = sp.Pruner(model, settings, lambda name, _: "encoder" in name)
        folder = out / criterion
        args = TrainingArguments(
            output_dir=str(folder), max_steps=6, save_steps=3, per_device_train_batch_size=2, learning_rate=1e-2,
            use_cpu=True, report_to="none", disable_tqdm=True, logging_steps=100, ddp_find_unused_parameters=False,
        )  # fmt: skip
        callback = PruningCallback(pruner, resume)
        trainer = DistillationTrainer(model, args, train_dataset=Texts(), callbacks=[callback], teacher=teacher)
        assert trainer.accelerator.num_processes == 2
        optimizer = trainer.create_optimizer()
        pruner.attach(optimizer)
        trainer.train(resume_from_checkpoint=resume and str(resume))
        pruner.apply_()
        check_zeros(model, pruner, optimizer)
        agreed(pruner.masks, f"masks by {criterion}")
        agreed(pruner.state_dict(), f"the pruner's state by {criterion}")
        agreed(whole(model), f"weights by {criterion}")
        assert abs(pruner.density() - 0.4) < 0.1
        mean = pruner.reduce_saliency({"layer": torch.tensor([float(trainer.accelerator.process_index), 3.0])})
        assert equal(mean, {"layer": torch.tensor([0.5, 3.0])}), "saliencies are not averaged over the ranks"
        return pruner.masks, whole(model)

    for criterion in ("movement", "wanda"):
        straight = run(criterion, None)
        resumed = run(criterion, out / criterion / "checkpoint-3")
        assert (out / criterion / "checkpoint-3" / PRUNER_STATE_NAME).is_file()
        assert equal(straight[0], resumed[0]) and equal(straight[1], resumed[1]), (
            f"{criterion}: resuming changed the run"
        )


def accelerator_of(kind: str) -> Accelerator:
    """An Accelerator whose prepare() wraps in DDP, or shards by FSDP2 as the flags of `accelerate launch` say."""
    os.environ["ACCELERATE_USE_FSDP"] = str(kind == "fsdp2")
    if kind == "fsdp2" and PartialState().distributed_type == DistributedType.MULTI_CPU:
        # AcceleratorState.__init__ heeds those flags for every kind of device but the CPU, where it would go on with DDP.
        PartialState().distributed_type = DistributedType.MULTI_GPU
        AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True)
    assert accelerator.is_fsdp2 == (kind == "fsdp2") and accelerator.device.type == "cpu"
    return accelerator


def gpt2(seed: int) -> GPT2LMHeadModel:
    """40 wide, so that two ranks cut blocks of 16."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 50, "n_embd": 40, "n_layer": 1, "n_head": 2, "n_positions": 16}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropout, tie_word_embeddings=False)).train()


def settings(criterion: str) -> sp.PruneConfig:
    return sp.PruneConfig(criterion, density=0.5, blocksize=BLOCK, total_steps=6, warmup=0, update_every=1)


def tokens() -> torch.Tensor:
    """For each of 6 steps and 2 ranks, 4 rows of 8 tokens."""
    return torch.randint(0, 50, (6, 2, 4, 8), generator=torch.Generator().manual_seed(2))


def loop(out: Path, kind: str, criterion: str, resume: bool) -> None:
    """A plain loop over nn.Linear and Conv1D as docs/huggingface.md has it, its checkpoint after half of the steps.

    It leaves its end in a file; the resumed one, in other processes and from other weights, must come to the same, bit for bit.
    """
    folder, end = out / f"{kind}-{criterion}", out / f"{kind}-{criterion}.pt"
    accelerator = accelerator_of(kind)
    model = gpt2(seed=int(resume))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    early = criterion == "random"  # the Pruner is made before prepare(), which replaces the parameters
    if early:
        pruner = sp.Pruner(model, settings(criterion)).attach(optimizer)
    model, optimizer = accelerator.prepare(model, optimizer)
    bare = accelerator.unwrap_model(model)
    if not early:
        pruner = sp.Pruner(bare, settings(criterion)).attach(optimizer)
    accelerator.register_for_checkpointing(pruner)
    if resume:
        accelerator.load_state(str(folder))
        assert pruner.steps == 3
    for step in range(pruner.steps, 6):
        ids = tokens()[step, accelerator.process_index]
        accelerator.backward(model(input_ids=ids, labels=ids).loss)
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
        if step == 2 and not resume:
            accelerator.save_state(str(folder))

    assert all(hasattr(weight, "placements") == (kind == "fsdp2") for weight in bare.parameters())
    check_zeros(bare, pruner, optimizer)
    reached = {"weights": whole(bare), "pruner": pruner.state_dict()}
    agreed(reached, f"where {kind} by {criterion} ends")
    if resume:
        assert equal(reached, torch.load(end, weights_only=True)), f"{kind} by {criterion}: resuming changed the run"
        return
    check_against_one_process(criterion, pruner)
    check_packed(accelerator, model, pruner)
    if accelerator.is_main_process:
        torch.save(reached, end)


def check_against_one_process(criterion: str, pruner: sp.Pruner) -> None:
    """The masks are those of one process that has the rows of both ranks in one batch, but for ties within rounding."""
    model = gpt2(seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    alone = sp.Pruner(model, settings(criterion)).attach(optimizer)
    alone.reduce_saliency = lambda saliency: saliency
    for ids in tokens().flatten(1, 2):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        alone.step()
        optimizer.zero_grad()
    if criterion in ("magnitude", "random"):
        assert equal(pruner.masks, alone.masks), f"{criterion}: two processes changed the masks"
    same = [(a == b).float().mean() for a, b in zip(pruner.masks.values(), alone.masks.values(), strict=True)]
    assert min(same) > 0.8, f"{criterion}: {same}"


def check_packed(accelerator: Accelerator, model: nn.Module, pruner: sp.Pruner) -> None:
    """The whole weights, which rank 0 gets, pack by the masks without loss; a sharded model is refused."""
    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        packed = gpt2(seed=1)
        packed.load_state_dict(weights)
        sp.sparsify_(packed, sp.BlockSparseConfig(BLOCK, max_density=1.0), masks=pruner.masks)
        for name in pruner.masks:
            weight = as_matrix(pruner.model.get_submodule(name), weights[f"{name}.weight"])
            assert torch.equal(packed.get_submodule(name).packed.to_dense(), weight), name
    if accelerator.is_fsdp2:
        with pytest.raises(sp.SparsePruneError, match="expected a whole weight, got one sharded .*get_state_dict"):
            sp.sparsify_(model, sp.BlockSparseConfig(BLOCK), masks=pruner.masks)


if __name__ == "__main__":
    torch.set_num_threads(1)
    part, out = sys.argv[1], Path(sys.argv[2])
    if part == "run":
        trainer_with_ddp(out)
    for kind, criterion in LOOPS:
        loop(out, kind, criterion, resume=part == "resume")
    PartialState().print(f"{part} passed")
    dist.destroy_process_group()
