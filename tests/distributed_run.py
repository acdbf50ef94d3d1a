"""What test_distributed.py launches on two ranks: prints a line of JSON per check; any failure is an exception."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, TrainingArguments
from transformers.pytorch_utils import Conv1D

import sparse_prune as sp
from sparse_prune.integrations.trainer import PRUNER_STATE_NAME, DistillationTrainer, PruningCallback

BLOCK = (16, 16)


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


def loop_with_fsdp2(accelerator: Accelerator) -> None:
    """A plain loop over nn.Linear and Conv1D sharded by FSDP2 so that blocks are cut: as unsharded, and bit-exact when resumed."""
    torch.manual_seed(0)
    rank = accelerator.process_index
    config = GPT2Config(
        vocab_size=50,
        n_embd=40,
        n_layer=1,
        n_head=2,
        n_positions=16,
        tie_word_embeddings=False,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    start = GPT2LMHeadModel(config).train()
    data = torch.randint(0, 50, (6, 2, 4, 8), generator=torch.Generator().manual_seed(2))  # step, rank, row, token

    def make(criterion: str, sharded: bool) -> tuple:
        model = copy.deepcopy(start)
        settings = sp.PruneConfig(criterion, density=0.5, blocksize=BLOCK, total_steps=6, warmup=0, update_every=1)
        if sharded:
            fully_shard(model.transformer.h[0])
            fully_shard(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return model, optimizer, sp.Pruner(model, settings).attach(optimizer)

    def steps(model, optimizer, pruner, span: range, rows) -> None:
        for step in span:
            ids = rows(step)
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            pruner.step()
            optimizer.zero_grad()

    for criterion in ("taylor", "wanda", "magnitude", "random"):
        run = make(criterion, sharded=True)
        assert hasattr(run[0].lm_head.weight, "placements")
        steps(*run, range(3), lambda step: data[step, rank])
        model, optimizer, pruner = run
        weights = {name: p.detach().to_local().clone() for name, p in model.named_parameters()}
        saved = copy.deepcopy((optimizer.state_dict(), pruner.state_dict()))
        agreed(saved[1], f"the pruner's state by {criterion}")
        steps(*run, range(3, 6), lambda step: data[step, rank])
        check_zeros(model, pruner, optimizer)
        agreed(pruner.masks, f"masks by {criterion}")

        other = make(criterion, sharded=True)
        with torch.no_grad():
            for name, parameter in other[0].named_parameters():
                parameter.to_local().copy_(weights[name])
        other[1].load_state_dict(saved[0])
        other[2].load_state_dict(saved[1])
        steps(*other, range(3, 6), lambda step: data[step, rank])
        assert equal(pruner.masks, other[2].masks) and equal(whole(model), whole(other[0])), f"{criterion}: resuming"

        alone = make(criterion, sharded=False)
        alone[2].reduce_saliency = lambda saliency: saliency
        steps(*alone, range(6), lambda step: data[step].flatten(0, 1))  # the rows of both ranks in one batch
        if criterion in ("magnitude", "random"):
            assert equal(pruner.masks, alone[2].masks), f"{criterion}: sharding changed the masks"
        same = [(a == b).float().mean() for a, b in zip(pruner.masks.values(), alone[2].masks.values(), strict=True)]
        assert min(same) > 0.8, f"{criterion}: {same}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    parts = {"ddp": lambda: trainer_with_ddp(Path(sys.argv[2])), "fsdp2": lambda: loop_with_fsdp2(accelerator)}
    for name in sys.argv[1].split(","):
        parts[name]()
        accelerator.print(f"{name} passed")
    dist.destroy_process_group()
