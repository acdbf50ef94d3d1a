"""Why this criterion, and why a teacher: the same short pruning run under each criterion, with and without distillation.

A long run mends what any choice of blocks broke, so the runs compared here are short and at a low density: what a criterion is
worth shows before the weights that stay have had time to make up for those that went.
"""

from __future__ import annotations

import shutil
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

from ..serialization import read_json, write_json
from .models import quiet
from .packing import pack_
from .store import fingerprint, work_dir
from .training import (
    ANALYSIS_NAME,
    PruneArgs,
    Report,
    RunArgs,
    check_prune_args,
    fit_pruned,
    load_parts,
    score_examples,
)

CRITERIA = ("random", "magnitude", "gradient", "taylor", "movement")
ABLATION_NAME = "ablation.json"


@dataclass(frozen=True, kw_only=True)
class AblationArgs(RunArgs):
    """Arguments of ablation: those of RunArgs, and

    model     directory of a trained model
    density   kept fraction of the encoder's blocks, in (0, 1]
    block     block size (rows, columns)
    criteria  what to compare
    runs      how often each is run, with seeds seed, seed + 1, ...
    """

    model: Path
    epochs: float = 0.1
    density: float = 0.1
    block: tuple[int, int] = (32, 32)
    criteria: tuple[str, ...] = CRITERIA
    runs: int = 3


@quiet()
def ablation(args: AblationArgs, report: Report | None = None, into: Path | None = None) -> list[dict]:
    """Prune args.model under each criterion, with and without a teacher, and score each on the same file.

    Everything else is equal, but for nn.Dropout, which prune turns off under a teacher.

    Returns [{"criterion", "distilled", "score", "error", "scores"}], the mean over args.runs runs, its standard error (None for one
    run; it covers what differs from run to run, not the choice of test examples, which all share) and the runs, and writes it to
    out/ablation.json; a directory `into` that prune made gets it in its analysis.json too. Interrupted, it goes on after the last
    finished run.
    """
    shared = {name: value for name, value in vars(args).items() if name not in ("criteria", "runs")}
    base = PruneArgs(**shared, curve=False)
    out, path = Path(args.out), Path(args.out) / ABLATION_NAME
    paths = {name: getattr(args, name) for name in ("model", "train", "eval", "dev")}
    mark = fingerprint("ablation", args, paths, ("out", "criteria", "runs"))
    known = read_json(path) if path.is_file() else {}
    done = known["done"] if known.get("fingerprint") == mark else {}
    parts = load_parts(base)
    parts.pop("dev", None)
    seeds = range(args.seed, args.seed + args.runs)
    pairs = [(criterion, distilled) for criterion in args.criteria for distilled in (False, True)]
    wanted = [(seed, *pair) for seed in seeds for pair in pairs]
    for number, (seed, criterion, distilled) in enumerate(wanted):
        name = f"{criterion}{' + teacher' if distilled else ''}, seed {seed}"
        if name in done:
            continue
        run = replace(
            base, criterion=criterion, distill=distilled, seed=seed, out=out / f"{criterion}-{distilled}-{seed}"
        )
        check_prune_args(run)

        def tell(_: str, step: int, of: int, __: str, name=name, number=number) -> None:
            assert report is not None
            report("ablation", of * number + step, of * len(wanted), name)

        pruned = fit_pruned(run, parts, mark, tell if report else None)
        pack_(pruned.model, pruned.masks, args.block)
        done[name] = score_examples(pruned.model, pruned.tokenizer, parts["eval"], pruned.length).value
        write_json(path, {"fingerprint": mark, "done": done})
        shutil.rmtree(work_dir(run.out, mark))
    rows = []
    for criterion, distilled in pairs:
        scores = [done[f"{criterion}{' + teacher' if distilled else ''}, seed {seed}"] for seed in seeds]
        error = statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else None
        row = {"criterion": criterion, "distilled": distilled, "score": statistics.mean(scores)}
        rows.append(row | {"error": error, "scores": scores})
    write_json(path, {"fingerprint": mark, "done": done, "density": args.density, "epochs": args.epochs, "rows": rows})
    if into is not None:
        analysis = read_json(into / ANALYSIS_NAME)
        write_json(into / ANALYSIS_NAME, analysis | {"ablation": rows, "ablation_density": args.density})
    return rows
