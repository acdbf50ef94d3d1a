"""`sparse-prune tune`: measure when a sparse layer is faster than a dense one on this machine, for the planner (planner.py).

Every row times one block size, dtype, M and weight: SparseLinear at a few densities and nn.Linear, plain and with oneDNN's
reordered weight, in turns. Rows are kept as they are finished, so that a run that was stopped goes on; the table appears whole at
the end.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import backends, planner
from .benchmark import DTYPES, check_seconds, interleaved_medians, machine, random_mask, thread_count
from .errors import SparsePruneError
from .layers import SparseLinear
from .serialization import atomic_path

DENSITIES = (0.1, 0.25, 0.5, 0.75, 1.0)
SHAPES = ((384, 384), (768, 3072))  # (K, N): one that caches hold, one that they do not in float32
BLOCKS = ((1, 1), (4, 4), (8, 8), (16, 16), (32, 32), (64, 64))
TOKENS = (1, 16, 128, 512)
# Beside them for low blocks: from 4 to 7 tokens on AVX-512 fills vectors with these (csrc/cpu/token_tile.h).
LOW, FEW_TOKENS = 8, (2, 4, 8)
QUICK_BLOCKS, QUICK_TOKENS = ((4, 4), (16, 16), (32, 32)), (1, 128)
# Where the two forms of dense are compared: at few tokens the faster one changes with the size of the weight.
FORM_SHAPES = ((256, 256), (384, 384), (512, 512), (768, 768), (1024, 1024), (768, 3072))
FORM_TOKENS = (1, 2, 4, 8, 16, 128, 512)
# A row that strays further than this from a straight line is measured again, and the best of so many tries counts.
STRAY, TRIES = 0.1, 4
# A candidate that takes this many times the dense one's time is not run again: its exact time decides nothing.
HOPELESS = 8


def tune(
    out: str | Path | None = None,
    quick: bool = False,
    dtypes: Iterable[str] = ("float32", "bfloat16", "float16"),
    isas: Iterable[str] | None = None,
    threads: Iterable[int] = (),
    seconds: float = 0.5,
    report: Callable[[str, int, int, str], None] = lambda *_: None,
) -> planner.Table:
    """Measure, write the table to `out` (None: planner.cache_file(), where the planner looks), and return it.

    quick takes fewer block sizes and M; isas are the instruction sets to measure (None: the one that runs for each dtype here);
    threads the thread counts (none: PyTorch's present one), of which the worst ratio counts; seconds is spent on each row;
    report(phase, step, of, text) is called after each row.

    Raises SparsePruneError where no CPU kernel runs, for an unknown dtype or instruction set, and for seconds below 0.
    """
    check_seconds(seconds)
    if not backends.cpu_isas():
        reason = backends.cpu_unavailable(torch.device("cpu"), torch.float32)
        raise SparsePruneError("tune", "the C++ kernels, to measure them", "none", str(reason))
    unknown = [name for name in dtypes if name not in DTYPES]
    if unknown:
        raise SparsePruneError("dtypes", f"names among {', '.join(DTYPES)}", unknown[0], "choose some of these")
    out = Path(out) if out is not None else planner.cache_file()
    threads = tuple(threads) or (torch.get_num_threads(),)
    about = {key: value for key, value in machine().items() if key != "threads"} | {"threads": list(threads)}
    problems = list(_problems(quick, tuple(dtypes), isas))

    def measure(problem: dict) -> list[dict]:
        if "block" in problem:
            return [problem | _measure(problem, threads, seconds)]
        plain = _measure_forms(problem, seconds / 4)
        return [] if plain is None else [problem | {"plain": float(f"{plain:.3g}")}]

    return make_table(out, about, DENSITIES, problems, measure, report)


def make_table(
    out: Path,
    about: dict,
    densities: tuple[float, ...],
    problems: list[dict],
    measure: Callable[[dict], list[dict]],
    report: Callable[[str, int, int, str], None],
) -> planner.Table:
    """The table at out of the rows that measure() gives of each problem, those of a run that was stopped taken from there."""

    def tell(problem: dict, rows: list[dict]) -> str:
        if "block" not in problem:
            plain = f"plain takes {rows[0]['plain']:.2f} of reordered" if rows else "plain alone"
            return f"{problem['isa']} {problem['dtype']} dense M={problem['M']}: {plain}"
        block = "x".join(map(str, problem["block"]))
        ratios = ", ".join(f"{row.get('kernel', '')} {row['ratio'][0]:.2f}".strip() for row in rows) or "nothing runs"
        return f"{problem['isa']} {problem['dtype']} {block} M={problem['M']}: {ratios} of dense"

    def write(found: list[list[dict]]) -> None:
        write_table(out, about, [row for rows in found for row in rows], densities)

    with planner.using_table(planner.OFF):
        measure_each(problems, measure, out, about, write, tell, report)
    planner.refresh()
    return planner.load_table(out)


def measure_each(
    problems: list[dict],
    measure: Callable[[dict], Any],
    out: Path,
    about: dict,
    write: Callable[[list], None],
    tell: Callable[[dict, Any], str],
    report: Callable[[str, int, int, str], None],
) -> list:
    """measure(problem) of each, as write() gets them in the end, to make out of them.

    Until then they lie beside out, and a run that was stopped loses none: what an earlier one of the same machine, versions and
    threads left is not measured again. report("tune", step, of, tell(problem, result)) is called after each.
    """
    partial = out.with_name(out.name + ".partial.jsonl")
    done = _resume(partial, about)
    for step, problem in enumerate(problems, 1):
        key = json.dumps(problem)
        if key not in done:
            done[key] = measure(problem)
            with partial.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"problem": key, "row": done[key]}) + "\n")
        report("tune", step, len(problems), tell(problem, done[key]))
    found = [done[json.dumps(problem)] for problem in problems]
    write(found)
    partial.unlink(missing_ok=True)
    return found


def write_table(
    out: Path,
    about: dict,
    rows: list[dict],
    densities: tuple[float, ...] = DENSITIES,
    machines: dict[str, dict] | None = None,
) -> None:
    """The file that planner.load_table reads, one row a line; those of dense alone have no block.

    machines: those of instruction sets that another machine than `about` measured.
    """
    origin = {"machine": about} | ({"machines": machines} if machines else {})
    head = json.dumps({"format": planner.FORMAT} | origin | {"densities": list(densities)})
    with atomic_path(out) as temporary:
        rows_of_blocks, forms = (
            ",\n".join(json.dumps(row) for row in rows if ("block" in row) == of_blocks) for of_blocks in (True, False)
        )
        temporary.write_text(
            f'{head[:-1]}, "rows": [\n{rows_of_blocks}\n], "forms": [\n{forms}\n]}}\n', encoding="utf-8"
        )


def _problems(quick: bool, dtypes: tuple[str, ...], isas: Iterable[str] | None) -> Iterator[dict]:
    wanted = None if isas is None else tuple(isas)
    for dtype in dtypes:
        for isa in wanted or (backends.cpu_isa(DTYPES[dtype]),):
            with backends.force_isa(isa):
                if backends.cpu_isa(DTYPES[dtype]) != isa:
                    continue  # this dtype stops at a lower instruction set, which has rows of its own
            for k, n in FORM_SHAPES:
                for m in FORM_TOKENS:
                    yield {"isa": isa, "dtype": dtype, "M": m, "weight": [k, n]}
            for block in QUICK_BLOCKS if quick else BLOCKS:
                for k, n in SHAPES:
                    few = FEW_TOKENS if max(block) <= LOW else ()
                    for m in QUICK_TOKENS if quick else sorted(TOKENS + few):
                        if max(block) < 8 and m > 128:
                            continue  # slow to measure, and decided long before
                        yield {"isa": isa, "dtype": dtype, "block": list(block), "M": m, "weight": [k, n]}


def _resume(partial: Path, about: dict) -> dict[str, Any]:
    """Rows that an earlier run of the same machine, versions and threads left; else an empty start."""
    try:
        lines = [json.loads(line) for line in partial.read_text(encoding="utf-8").splitlines()]
        if lines and lines[0] == about:
            return {line["problem"]: line["row"] for line in lines[1:]}
    except (OSError, ValueError, KeyError, TypeError):
        pass  # nothing there, or cut in the middle of a line: measuring again is safe
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(json.dumps(about) + "\n", encoding="utf-8")
    return {}


def _measure(problem: dict, threads: tuple[int, ...], seconds: float) -> dict:
    """{"dense": the faster form, "ratio": sparse over dense at each of DENSITIES}, the worst over thread counts."""
    (k, n), m, dtype = problem["weight"], problem["M"], DTYPES[problem["dtype"]]
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(k, n).to(dtype).eval().requires_grad_(False)
    x = torch.randn(m, k, generator=generator).to(dtype)  # [M, K]
    dense: dict[str, Callable[[], Tensor]] = {"plain": lambda: F.linear(x, linear.weight, linear.bias)}
    prepacked = prepacked_linear(linear, x)
    if prepacked is not None:
        dense["prepacked"] = prepacked
    layers = {}
    for density in DENSITIES:
        mask = random_mask((n, k), problem["block"], density, generator)
        layers[density] = SparseLinear.from_dense(linear, mask, problem["block"])
    worst: list[float] = []
    with backends.force_isa(problem["isa"]), torch.inference_mode():
        for count in threads:
            with thread_count(count):
                tries: list[tuple[float, str, list[float]]] = []
                while not tries or (tries[-1][0] > STRAY and len(tries) < TRIES):
                    ratio, spent = [], dict.fromkeys(dense, 0.0)
                    for layer in layers.values():
                        # One sparse layer at a time beside the dense one: more would leave its weight colder than it is beside one.
                        candidates = dense | {"sparse": partial(layer, x)}
                        times = interleaved_medians(candidates, seconds / len(layers), HOPELESS)
                        ratio.append(times["sparse"] / min(times[form] for form in dense))
                        spent = {form: spent[form] + times[form] for form in dense}
                    tries.append((_stray(ratio), min(spent, key=spent.__getitem__), ratio))
            _, form, ratio = min(tries)
            worst = [max(pair) for pair in zip(worst or ratio, ratio, strict=True)]
    return {"dense": form, "ratio": [float(f"{value:.3g}") for value in worst]}


def _measure_forms(problem: dict, seconds: float) -> float | None:
    """Time of the plain dense product over that with a reordered weight, None without the latter.

    The mean of one and two threads, for a plan serves any number: with two the plain one is the slower from smaller weights on.
    """
    (k, n), dtype = problem["weight"], DTYPES[problem["dtype"]]
    x = torch.randn(problem["M"], k).to(dtype)  # [M, K]
    candidates: dict[str, Callable[[], Tensor]] = {}
    for layer in ("first", "second"):  # two, since a model has others, whose weights come between two calls of one
        linear = nn.Linear(k, n).to(dtype).eval().requires_grad_(False)
        prepacked = prepacked_linear(linear, x)
        if prepacked is None:
            return None
        candidates |= {f"{layer} plain": partial(linear, x), f"{layer} prepacked": prepacked}
    ratios = []
    with torch.inference_mode():
        for count in (1, 2):
            with thread_count(count):
                times = interleaved_medians(candidates, seconds)
                ratios += [times[f"{layer} plain"] / times[f"{layer} prepacked"] for layer in ("first", "second")]
    return float(np.exp(np.log(ratios).mean()))


def _stray(ratio: list[float]) -> float:
    """How far the ratios lie from a straight line over the densities, the largest distance as a fraction of the line.

    The time of a kernel is a constant and a part for each block: what lies off the line was measured beside another program.
    """
    line = np.polyval(np.polyfit(DENSITIES, ratio, 1, w=1 / np.array(ratio)), DENSITIES)
    return float(np.abs(np.array(ratio) / np.maximum(line, 1e-9) - 1).max())


def prepacked_linear(linear: nn.Linear, x: Tensor) -> Callable[[], Tensor] | None:
    """x -> linear(x) by oneDNN with the weight reordered beforehand, or None where this build or dtype has no such product."""
    try:
        reordered = torch.ops.mkldnn._reorder_linear_weight(linear.weight)

        def run() -> Tensor:
            return torch.ops.mkldnn._linear_pointwise(x, reordered, linear.bias, "none", [], "")

        run()
    except (RuntimeError, NotImplementedError, AttributeError):
        return None
    return run
