"""The main job from end to end: the data as files, a dense model, its block-sparse twin, the packed checkpoint, the numbers."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..serialization import atomic_dir, read_json, write_json
from .ablation import AblationArgs, ablation
from .data import check_task, export
from .training import ANALYSIS_NAME, METRICS_NAME, PACKED_NAME, PruneArgs, Report, TrainArgs, prune, train


@dataclass(frozen=True)
class DemoArgs:
    """Arguments of demo.

    out       directory for everything the demo makes
    density   kept fraction of the encoder's blocks, in (0, 1]
    block     block size (rows, columns)
    full      the longer recipe: more accurate, several times the time
    ablation  also compare the criteria, with and without distillation, in short runs at a lower density
    """

    out: Path = Path("runs/demo")
    task: str = "sentiment"
    density: float = 0.2
    block: tuple[int, int] = (32, 32)
    seed: int = 0
    full: bool = False
    ablation: bool = False


def demo(args: DemoArgs, report: Report | None = None) -> dict:
    """Run the whole path on the built-in data of the task; a rerun goes on where an interrupted one stopped.

    out gets data/ (the parts as files), dense-TASK/, pruned-TASK/, and for the task run last metrics.json, analysis.json and
    packed/. Returns the content of metrics.json.
    """
    out, task = Path(args.out), check_task(args.task)
    if report:
        report("data", 0, 1, "reading the corpora")
    files = {name: out / "data" / f"{task}-{name}" for name in ("train", "dev", "test")}
    files = {name: path.with_suffix(".tsv" if task == "sentiment" else ".conll") for name, path in files.items()}
    if not all(path.is_file() for path in files.values()):
        files = export(task, out / "data")
    common: dict[str, Any] = {
        "task": task,
        "train": files["train"],
        "dev": files["dev"],
        "eval": files["test"],
        "seed": args.seed,
    }
    train(TrainArgs(out=out / f"dense-{task}", full=args.full, **common), report)
    pruned = out / f"pruned-{task}"
    metrics = prune(
        PruneArgs(
            model=out / f"dense-{task}", out=pruned, density=args.density, block=args.block, full=args.full, **common
        ),
        report,
    )
    if args.ablation:
        compared = AblationArgs(
            model=out / f"dense-{task}",
            out=out / f"ablation-{task}",
            task=task,
            train=files["train"],
            eval=files["test"],
            block=args.block,
            seed=args.seed,
        )
        ablation(compared, report, into=pruned)
    for name in (METRICS_NAME, ANALYSIS_NAME):
        write_json(out / name, read_json(pruned / name))
    with atomic_dir(out / PACKED_NAME) as temporary:
        shutil.copytree(pruned / PACKED_NAME, temporary, dirs_exist_ok=True)
    return metrics
