"""Where a run puts its results: an output directory that appears whole, and a work directory that an interrupted run resumes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__
from ..errors import SparsePruneError
from ..serialization import read_json, write_json

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

RUN_NAME = "run.json"


def fingerprint(
    kind: str, args: DataclassInstance, paths: Mapping[str, str | Path | None], without: Sequence[str] = ()
) -> str:
    """A digest of what decides a result: the kind of run, its arguments (but for `without`), and what `paths` hold.

    paths names the arguments that are files, model directories, or None.
    """
    values = {key: str(value) for key, value in asdict(args).items() if key not in without and key not in paths}
    contents = {
        name: None if path is None else _digest(Path(path)) or str(path) for name, path in sorted(paths.items())
    }
    text = json.dumps([kind, __version__, values, contents], sort_keys=True)  # ASCII, whatever bytes a path has
    return hashlib.sha256(text.encode()).hexdigest()


def _digest(path: Path) -> str | None:
    """Digest of a file, or of the weights and settings in a model directory; None where there is no such path (a hub name)."""
    if path.is_dir():
        names = sorted(
            p
            for p in path.iterdir()
            if p.suffix in (".json", ".safetensors", ".txt", ".bin", ".model") and p.name != RUN_NAME
        )
    elif path.is_file():
        names = [path]
    else:
        return None
    digest = hashlib.sha256()
    for name in names:
        digest.update(os.fsencode(name.name))
        with name.open("rb") as handle:
            while chunk := handle.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def finished(out: Path, mark: str) -> dict | None:
    """What an earlier run with the same fingerprint recorded in out, or None."""
    path = out / RUN_NAME
    if not path.is_file():
        return None
    record = read_json(path)
    return record["result"] if isinstance(record, dict) and record.get("fingerprint") == mark else None


def check_out(out: Path, source: str | Path | None = None) -> None:
    """Raise SparsePruneError unless out may be replaced: it is absent, empty, or has an earlier run, and is not source.

    Neither the working directory nor where a disk is mounted (a container's volume) can be replaced.
    """
    if source is not None and out.exists() and out.resolve() == Path(source).resolve():
        raise SparsePruneError(
            "out", "another directory than the model's, which it would replace", str(out), "choose another --out"
        )
    place = out.resolve()
    if out.is_dir() and (place == Path.cwd() or place.is_mount()):
        got = "a disk's mount point" if place.is_mount() else "the working directory"
        raise SparsePruneError("out", "a directory that can be replaced", f"{got}, {out}", "choose one inside it")
    if out.is_dir() and (not any(out.iterdir()) or (out / RUN_NAME).is_file()):
        return
    if out.exists():
        raise SparsePruneError(
            "out", "a new directory, or one that an earlier run made", str(out), "choose another --out"
        )


def record(directory: Path, mark: str, result: Mapping) -> None:
    """Say in directory which run made it; called last, when everything else is there."""
    write_json(directory / RUN_NAME, {"fingerprint": mark, "result": dict(result)})


def work_dir(out: Path, mark: str) -> Path:
    """The directory beside out where a run keeps its checkpoints; emptied first if they belong to another run."""
    work = out.parent / f".{out.name}.work"
    if work.is_dir() and not _belongs(work, mark):
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    write_json(work / RUN_NAME, {"fingerprint": mark})
    return work


def _belongs(work: Path, mark: str) -> bool:
    try:
        return read_json(work / RUN_NAME)["fingerprint"] == mark
    except (SparsePruneError, KeyError, TypeError):
        return False


def last_checkpoint(work: Path, needed: tuple[str, ...] = ()) -> Path | None:
    """The newest complete checkpoint-N in work; one whose writing was interrupted lacks a file of `needed` and does not count."""
    needed = ("trainer_state.json", "model.safetensors", *needed)
    complete = [p for p in work.glob("checkpoint-*") if all((p / name).is_file() for name in needed)]
    return max(complete, key=lambda p: int(p.name.rpartition("-")[2]), default=None)
