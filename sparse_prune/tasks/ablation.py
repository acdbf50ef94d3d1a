"""Why this criterion, and why a teacher: the same short pruning run under each criterion, with and without distillation."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from ..serialization import read_json, write_json
from .models import quiet
from .store import fingerprint, work_dir
from .training import ANALYSIS_NAME, PruneArgs, Report, _arg, check_prune_args, fit_pruned, load_parts, score_examples

CRITERIA = ("random", "magnitude", "gradient", "taylor", "movement")
ABLATION_NAME = "ablation.json"


@dataclass(frozen=True)
class AblationArgs:
    """Arguments of ablation: those of prune that matter, and what to compare."""

    model: Path = _arg("directory of a trained model")
    out: Path = _arg("directory for ablation.json")
    task: str = _arg("sentiment or ner", "sentiment")
    train: Path | None = _arg("training file; none: the built-in train part")
    eval: Path | None = _arg("file that is scored; none: the built-in test part")
    density: float = _arg("kept fraction of the encoder's blocks", 0.2)
    block: tuple[int, int] = _arg("block size (rows, columns)", (32, 32))
    criteria: tuple[str, ...] = _arg("criteria to compare", CRITERIA)
    epochs: float = _arg("passes over the training file, for each run", 0.5)
    max_length: int = _arg("tokens a row at most", 128)
    seed: int = _arg("seed of everything random", 0)


@quiet()
def ablation(args: AblationArgs, report: Report | None = None, into: Path | None = None) -> list[dict]:
    """Prune args.model once per criterion, with and without a teacher, everything else equal, and score each on the same file.

    Returns [{"criterion", "distilled", "score"}] and writes it to out/ablation.json; a directory `into` that prune made gets it in
    its analysis.json too. Interrupted, it goes on after the last finished run.
    """
    base = PruneArgs(
        model=args.model,
        out=args.out,
        task=args.task,
        train=args.train,
        eval=args.eval,
        density=args.density,
        block=args.block,
        epochs=args.epochs,
        max_length=args.max_length,
        seed=args.seed,
        curve=False,
    )
    out, path = Path(args.out), Path(args.out) / ABLATION_NAME
    paths = {name: getattr(args, name) for name in ("model", "train", "eval")}
    mark = fingerprint("ablation", args, paths, ("out", "criteria"))
    known = read_json(path) if path.is_file() else {}
    rows = known["rows"] if known.get("fingerprint") == mark else []
    parts = load_parts(base)
    parts.pop("dev", None)
    wanted = [(criterion, distilled) for criterion in args.criteria for distilled in (False, True)]
    for criterion, distilled in wanted:
        if any((row["criterion"], row["distilled"]) == (criterion, distilled) for row in rows):
            continue
        run = replace(base, criterion=criterion, distill=distilled, out=out / f"{criterion}-{distilled}")
        check_prune_args(run)

        def tell(_: str, step: int, of: int, text: str, criterion=criterion, distilled=distilled) -> None:
            report(f"{criterion}{' + teacher' if distilled else ''}", step, of, text)

        pruned = fit_pruned(run, parts, mark, tell if report else None)
        value = score_examples(pruned.model, pruned.tokenizer, parts["eval"], pruned.length).value
        rows.append({"criterion": criterion, "distilled": distilled, "score": value})
        write_json(path, {"fingerprint": mark, "rows": rows})
        shutil.rmtree(work_dir(run.out, mark))
    chosen = [row for row in rows if row["criterion"] in args.criteria]
    if into is not None:
        analysis = read_json(into / ANALYSIS_NAME)
        write_json(into / ANALYSIS_NAME, analysis | {"ablation": chosen})
    return chosen
