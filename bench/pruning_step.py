"""A training step of a model that is pruned already, with dense products and with products that skip what is pruned.

    python bench/pruning_step.py [--hidden 256] [--rows 64] [--length 64] [--threads 2] [--bf16] [--seconds 10]

Garlic, forward, backward, AdamW and Pruner.step(), 32x32 blocks: "returning" while pruned blocks may still return, for which the
whole dW is needed, and "final" with masks that stay. Medians in turns, milliseconds; losses and gradients are compared first.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

import sparse_prune as sp
from sparse_prune.benchmark import interleaved_medians, machine, thread_count
from sparse_prune.models.garlic import GarlicConfig, GarlicForSequenceClassification

DENSITIES = (0.5, 0.35, 0.2)


def pruned(model: nn.Module, density: float, **config) -> tuple[nn.Module, sp.Pruner]:
    """A copy of model whose encoder keeps that share of its blocks, with the Pruner that goes on with it."""
    model = copy.deepcopy(model).train()
    options = sp.PruneConfig(
        "taylor", "oneshot", density=density, warmup=0, total_steps=1 << 30, smoothing=0.5, **config
    )
    pruner = sp.Pruner(model, options, lambda name, module: "encoder" in name)
    for module in pruner._modules.values():
        module.weight.grad = module.weight.detach().clone()  # for a choice of blocks by |w|^2
    for _ in range(options.update_every):
        pruner.step()
    return model, pruner


def main() -> None:
    """Print one line for each density."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 256), ("rows", 64), ("length", 64), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument(
        "--bf16", action="store_true", help="autocast to bfloat16, as prune does where the processor has it"
    )
    options = parser.parse_args()
    torch.manual_seed(0)
    config = GarlicConfig(vocab_size=4000, hidden_size=options.hidden, intermediate_size=4 * options.hidden)
    base = GarlicForSequenceClassification(config)
    ids = torch.randint(10, 4000, (options.rows, options.length))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}
    about = machine()
    dtype = "bfloat16" if options.bf16 else "float32"
    print(f"{about['cpu']}, {about['isa']}, torch {about['torch']}, {options.threads} threads, {dtype}")

    def step_of(model: nn.Module, pruner: sp.Pruner) -> Callable[[], Tensor]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)
        pruner.attach(optimizer)

        def step() -> Tensor:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
                loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            pruner.step()
            return loss.detach()

        return step

    with thread_count(options.threads):
        for density in DENSITIES:
            last = (1 << 30) - 1
            runs = {
                "dense": pruned(base, density, cooldown=last, skip_pruned=False),
                "returning": pruned(base, density, cooldown=0),
                "final": pruned(base, density, cooldown=last),
            }
            steps = {name: step_of(*run) for name, run in runs.items()}
            losses = {}
            for name, step in steps.items():
                torch.manual_seed(0)  # the same dropout
                losses[name] = step()
            wanted = dict(runs["dense"][0].named_parameters())
            allowed = 3e-2 if options.bf16 else 1e-4
            for name, (model, pruner) in runs.items():
                assert abs(losses[name] - losses["dense"]) <= allowed, (name, losses)
                assert name == "dense" or pruner._skipping, f"{name} skips nothing here"
                for key, parameter in model.named_parameters():
                    want = wanted[key].grad
                    got = parameter.grad
                    if name == "final":  # zero where the weight is pruned
                        want, got = want * (parameter != 0), got * (parameter != 0)
                    assert (got - want).norm() <= 10 * allowed * (want.norm() + 1e-3), (name, key)
            times = interleaved_medians(steps, options.seconds)
            gains = (f"{times['dense'] / times[name]:.2f}x" for name in ("returning", "final"))
            print(
                f"density {density}",
                *(f"{name} {1e3 * value:.0f}" for name, value in times.items()),
                *gains,
                flush=True,
            )


if __name__ == "__main__":
    main()
