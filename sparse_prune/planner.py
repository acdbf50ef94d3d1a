"""Sparse or dense, and on a GPU by which kernel: what is faster for a weight, read from a small table of measurements.

A row of the table says, for one instruction set (or GPU's architecture and kernel), dtype, block size, M and weight, how long a
sparse layer takes as a fraction of the best dense one, at a few densities. `sparse-prune tune` measures this machine, its CPU
(tuning.py) or GPU (gpu_tuning.py). What ships with the package serves where that has not been run: for CPUs a table measured by the
same command (bench/shipped_table.py), for GPUs, which nobody has timed, bounds by counted work (`bench gpu-bounds --table`).
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from . import backends
from .bsr import QUANTIZED
from .errors import SparsePruneError

VARIABLE = "SPARSE_PRUNE_TUNING"  # a file, or one of:
SHIPPED, OFF = "shipped", "off"
FORMAT = 1
DENSE_FORMS = ("plain", "prepacked")  # nn.Linear's own product, and oneDNN's with a reordered weight
GPU_KERNELS = ("cuda", "triton")
# Sparse runs where it is expected to take less than this part of dense's time: M, weight, block and threads are rarely those that
# were measured, and what the table says is then off by a tenth.
MARGIN = 0.9
_SHIPPED_FILE = Path(__file__).with_name("tuning.json")
_SHIPPED_GPU_FILE = Path(__file__).with_name("tuning_gpu.json")


@dataclass(frozen=True)
class Row:
    """One measurement: ratio[i] = time of the sparse layer / time of the best dense one (whose form is `dense`) at densities[i].

    isa is an instruction set, or a GPU's architecture such as "sm_80"; kernel is one of GPU_KERNELS there, else "".
    """

    isa: str
    dtype: str
    blocksize: tuple[int, int]
    tokens: int
    shape: tuple[int, int]  # (N, K)
    dense: str
    densities: tuple[float, ...]
    ratio: tuple[float, ...]
    kernel: str = ""

    def ratio_at(self, density: float) -> float:
        """The ratio between the measured densities, on a straight line; below the lowest on the line of the first two."""
        at = min(max(bisect_right(self.densities, density), 1), len(self.densities) - 1)
        d0, d1 = self.densities[at - 1 : at + 1]
        r0, r1 = self.ratio[at - 1 : at + 1]
        return max(0.0, r0 + (r1 - r0) * (density - d0) / (d1 - d0))

    @functools.cached_property
    def break_even(self) -> float:
        """The density from which dense is faster: where the ratio reaches 1; 0 or 1 where sparse always loses or always wins."""
        low, high = 0.0, 1.0
        if self.ratio_at(high) <= 1:
            return 1.0
        for _ in range(20):
            middle = (low + high) / 2
            low, high = (middle, high) if self.ratio_at(middle) <= 1 else (low, middle)
        return low


@dataclass(frozen=True)
class Forms:
    """One measurement of the two dense products: plain = time of nn.Linear's own / time of oneDNN's with a reordered weight."""

    isa: str
    dtype: str
    tokens: int
    shape: tuple[int, int]  # (N, K)
    plain: float


@dataclass(frozen=True)
class Table:
    """Measurements, where they come from, and on which machine they were made; machines[isa] is another one for that set."""

    source: str
    machine: dict[str, Any]
    rows: tuple[Row, ...]
    forms: tuple[Forms, ...] = ()
    machines: dict[str, dict[str, Any]] = field(default_factory=dict)

    def processor(self, isa: str) -> str:
        """The processor that measured the rows of an instruction set."""
        return str(self.machines.get(isa, self.machine).get("cpu", "an unnamed processor"))

    @functools.cached_property
    def by_kind(self) -> dict[tuple[str, str], list[Row]]:
        """The rows of an instruction set and dtype: a plan wants one such part of hundreds."""
        kinds: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            kinds.setdefault((row.isa, row.dtype), []).append(row)
        return kinds

    @functools.cached_property
    def plain_by_kind(self) -> dict[tuple[str, str], dict[int, list[tuple[float, float]]]]:
        """For each instruction set and dtype, and M: logarithms of a weight's size and of Forms.plain."""
        kinds: dict[tuple[str, str], dict[int, list[tuple[float, float]]]] = {}
        for found in self.forms:
            by_tokens = kinds.setdefault((found.isa, found.dtype), {})
            size = math.log(math.prod(found.shape))
            by_tokens.setdefault(found.tokens, []).append((size, math.log(found.plain)))
        return kinds


@dataclass(frozen=True)
class Choice:
    """What to run from one measured M to the next: dense is "" for the sparse kernel, else one of DENSE_FORMS.

    kernel is the sparse kernel to take on a GPU, where dense is not taken; "" on a CPU.
    """

    tokens: int
    dense: str
    ratio: float | None
    reason: str
    kernel: str = ""


@dataclass(frozen=True)
class Plan:
    """Choices for one weight by M: choices[i] serves M below bounds[i], the last one all above."""

    bounds: tuple[float, ...]
    choices: tuple[Choice, ...]

    def at(self, tokens: int) -> Choice:
        """The choice for M = tokens; well under a microsecond, for it is asked on every call."""
        return self.choices[bisect_right(self.bounds, tokens)]


def plan(
    device: torch.device,
    dtype: torch.dtype,
    blocksize: Sequence[int],
    density: float,
    shape: Sequence[int] | None = None,
) -> Plan | None:
    """The plan for a weight [N, K] (shape None: a large one) that keeps `density` of its blocks, for x of that dtype.

    None where there is nothing to choose: off CPUs and GPUs, for quantized weights (whose results no product of PyTorch gives),
    with the planner off, or where nothing was measured; the sparse operator runs then. Without a kernel for the weight every choice
    is dense: plain PyTorch would make the weight dense on each call.
    Raises SparsePruneError for a table in force that cannot be read.
    """
    if device.type not in ("cpu", "cuda") or dtype in QUANTIZED or setting() == OFF:
        return None
    (r, c), (n, k) = blocksize, shape or (4096, 4096)
    if device.type == "cuda":
        return _gpu_plan(setting(), backends.epoch, device, dtype, (r, c), density, (n, k))
    missing = backends.cpu_unavailable(device, dtype)
    if missing is not None:
        return Plan((), (Choice(1, "plain", None, f"no sparse kernel runs here: {missing}"),))
    # Where an instruction set was not measured the next lower one is asked: what it calls too slow is too slow here as well,
    # for dense gains more from better instructions.
    isas = backends.ISAS[backends.ISAS.index(backends.cpu_isa(dtype)) :]
    return _plan(_tables(setting()), isas, _name(dtype), ("",), (r, c), density, (n, k))


def gpu_kernel(
    device: torch.device,
    dtype: torch.dtype,
    blocksize: tuple[int, int],
    density: float,
    shape: tuple[int, int],
    tokens: int,
) -> str:
    """The sparse kernel to take for M = tokens on a GPU, one of GPU_KERNELS; "" where none runs."""
    found = plan(device, dtype, blocksize, density, shape)
    if found is not None:
        return found.at(tokens).kernel
    runs = _gpu_runs(device, dtype, blocksize)
    return (
        "triton" if "triton" in runs else runs[0] if runs else ""
    )  # nothing measured: the one that takes most problems


@functools.lru_cache(maxsize=4096)
def _gpu_plan(
    setting: str,
    epoch: int,
    device: torch.device,
    dtype: torch.dtype,
    blocksize: tuple[int, int],
    density: float,
    shape: tuple[int, int],
) -> Plan | None:
    """setting and epoch are there to plan again where they changed."""
    runs = _gpu_runs(device, dtype, blocksize)
    if not runs:
        reasons = "; ".join(
            f"{name}: {reason}" for name, reason in backends.gpu_reasons(device, dtype, blocksize).items()
        )
        return Plan((), (Choice(1, "plain", None, f"no sparse kernel runs here: {reasons}"),))
    tables, own = _gpu_tables(setting), backends.gpu_capability(device)
    measured = {int(row.isa[3:]) for table in tables for row in table.rows if row.kernel}
    # wgmma is 9.x's alone: younger GPUs run the kernel for 8.0, whose rows they then take, all by the same dense product.
    isas = tuple(
        f"sm_{arch}" for arch in sorted(measured, reverse=True) if arch <= own and arch // 10 in (8, own // 10)
    )
    name = "bfloat16" if dtype == torch.float16 else _name(dtype)  # the same kernels, as fast
    return _plan(tables, isas, name, runs, blocksize, density, shape)


def _gpu_runs(device: torch.device, dtype: torch.dtype, blocksize: tuple[int, int]) -> tuple[str, ...]:
    return tuple(name for name, reason in backends.gpu_reasons(device, dtype, blocksize).items() if reason is None)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _plan(
    tables: tuple[Table, ...],
    isas: Sequence[str],
    dtype: str,
    kernels: tuple[str, ...],
    blocksize: tuple[int, int],
    density: float,
    shape: tuple[int, int],
) -> Plan | None:
    """The plan by the first table, and in it the first of isas, that has rows of that dtype and one of these kernels."""
    rows: list[Row] = []
    for table in tables:
        for name in isas:
            rows = rows or [row for row in table.by_kind.get((name, dtype), ()) if row.kernel in kernels]
        if rows:
            break
    if not rows:
        return None
    block = _measured_block({row.blocksize for row in rows}, blocksize)
    rows = [row for row in rows if row.blocksize == block]
    measured = {kernel: _by_tokens([row for row in rows if row.kernel == kernel], density, shape) for kernel in kernels}
    forms = _forms_of(table, rows[0], shape)
    choices = []
    for tokens in _between(sorted({row.tokens for row in rows})):
        expected = [_expected(lines, tokens) for lines in measured.values()]
        ratio, row = min((found for found in expected if found is not None), key=lambda found: found[0])
        reason = (
            f"{row.kernel or 'sparse'} is expected to run {1 / max(ratio, 1e-3):.2f}x as fast as dense near M = {tokens} "
            f"at density {density:.3f} ({row.isa}, {dtype}, {block[0]}x{block[1]} blocks; "
            f"break-even {row.break_even:.2f} near M = {row.tokens}; {table.source})"
        )
        dense = row.dense
        if forms:  # small weights at M = 1 are faster plain
            dense = "plain" if _on_line(forms, math.log(tokens)) <= 0 else "prepacked"
        choices.append(Choice(tokens, dense if ratio > MARGIN else "", ratio, reason, row.kernel))
    bounds = tuple(math.sqrt(a.tokens * b.tokens) for a, b in zip(choices, choices[1:], strict=False))
    return Plan(bounds, tuple(choices))


def _between(measured: list[int]) -> list[int]:
    """The measured M, and powers of 2 between them."""
    powers = {1 << exponent for exponent in range(measured[0].bit_length(), measured[-1].bit_length())}
    return sorted(power for power in powers | set(measured) if measured[0] <= power <= measured[-1])


def _by_tokens(rows: list[Row], density: float, shape: tuple[int, int]) -> list[tuple[int, float, Row]]:
    """For each measured M, rising: M, the ratio for that weight, and the row of the nearest one.

    Between the measured sizes of weights the ratio is taken on straight lines over their logarithms; beyond them it is that of the
    nearest.
    """
    size = math.log(shape[0] * shape[1])
    groups: dict[int, list[tuple[float, Row]]] = {}
    for row in rows:
        groups.setdefault(row.tokens, []).append((math.log(row.shape[0] * row.shape[1]), row))
    return [
        (
            tokens,
            _on_line([(at, row.ratio_at(density)) for at, row in group], size),
            min(group, key=lambda sized: abs(sized[0] - size))[1],
        )
        for tokens, group in sorted(groups.items(), key=lambda item: item[0])
    ]


def _expected(lines: list[tuple[int, float, Row]], tokens: int) -> tuple[float, Row] | None:
    """The ratio for M = tokens, on a straight line over the logarithm of M, and the row of the nearest; None outside them."""
    above = bisect_left(lines, tokens, key=lambda line: line[0])
    if above == len(lines) or (above == 0 and tokens < lines[0][0]):
        return None
    high = lines[above]
    if high[0] == tokens:
        return high[1:]
    low = lines[above - 1]
    part = math.log(tokens / low[0]) / math.log(high[0] / low[0])
    return low[1] + (high[1] - low[1]) * part, (low if part <= 0.5 else high)[2]


def _forms_of(table: Table, row: Row, shape: tuple[int, int]) -> list[tuple[float, float]]:
    """For each M at which the forms were compared: its logarithm, and that of Forms.plain on a line between sizes of weights."""
    size = math.log(math.prod(shape))
    measured = table.plain_by_kind.get((row.isa, row.dtype), {})
    return [(math.log(tokens), _on_line(points, size)) for tokens, points in measured.items()]


def _on_line(points: list[tuple[float, float]], at: float) -> float:
    """The value at `at` on straight lines between points (place, value); beyond them that of the last."""
    points = sorted(points)
    for (low, left), (high, right) in pairwise(points):
        if low <= at <= high and low < high:
            return left + (right - left) * (at - low) / (high - low)
    return min(points, key=lambda point: abs(point[0] - at))[1]


def _measured_block(measured: set[tuple[int, int]], blocksize: tuple[int, int]) -> tuple[int, int]:
    """The largest measured block that fits inside blocksize, for smaller blocks are slower; the smallest one if none does."""
    fitting = [block for block in measured if block[0] <= blocksize[0] and block[1] <= blocksize[1]]
    return max(fitting, key=math.prod) if fitting else min(measured, key=math.prod)


def use_table(choice: str | Path | None) -> None:
    """Plan with a table file, the shipped table ("shipped") or not at all ("off"); None: as the environment and the cache say.

    Layers plan again at their next call. Raises SparsePruneError if the file cannot be read.
    """
    global _chosen
    if choice is not None and str(choice) not in (SHIPPED, OFF):
        load_table(choice)
    _chosen = None if choice is None else str(choice)
    refresh()


@contextmanager
def using_table(choice: str | Path | None) -> Iterator[None]:
    """use_table inside the block, then what was in force before."""
    global _chosen
    before = _chosen
    use_table(choice)
    try:
        yield
    finally:
        _chosen = before
        refresh()


def refresh() -> None:
    """Forget the tables that were read: files may have changed."""
    _tables.cache_clear()
    _gpu_tables.cache_clear()
    backends.epoch += 1


def table_in_force() -> Table | None:
    """The table that plans here, None with the planner off; raises SparsePruneError if it cannot be read."""
    return None if setting() == OFF else _tables(setting())[0]


def describe() -> str:
    """One sentence: the table in force, where it was measured, and how to measure this machine."""
    table = table_in_force()
    if table is None:
        return f"off ({VARIABLE}={OFF}): the sparse kernels always run"
    measured = {(row.isa, row.dtype) for row in table.rows}
    names = [name for name in ("float32", "bfloat16", "float16") if backends.cpu_isas()]
    runs = {name: backends.cpu_isa(getattr(torch, name)) for name in names}
    # What runs here and has rows: others' rows may come from another processor.
    isas = {isa for name, isa in runs.items() if (isa, name) in measured}
    by = sorted({table.processor(isa) for isa in isas or {isa for isa, _ in measured}})
    text = f"{table.source}, {len(table.rows)} rows, "
    text += f"those for {', '.join(sorted(isas))} " if table.machines and isas else ""
    text += f"measured on {' and '.join(by)}"
    lacks = [name for name, isa in runs.items() if (isa, name) not in measured]
    if lacks:
        text += f"; not measured for {', '.join(lacks)} on this instruction set"
    return text if table.source != "shipped table" else text + "; `sparse-prune tune` measures this machine"


def describe_gpu() -> str:
    """One sentence: the table that chooses between kernels and dense on a GPU, where it comes from, and how to measure this one."""
    if setting() == OFF:
        return f"off ({VARIABLE}={OFF}): the sparse kernels always run"
    table = _gpu_tables(setting())[0]
    isas = ", ".join(sorted({row.isa for row in table.rows if row.kernel}))
    text = f"{table.source}, for {isas}"
    return text + "; `sparse-prune tune` measures this GPU" if "bounds" in table.source else text


def cache_file(processor: str = "", kind: str = "tuning") -> Path:
    """Where `sparse-prune tune` keeps what it measured: one file per model of processor (a GPU's name; "" is this machine's CPU)
    and kind ("tuning": the table of this module; "tiles": see tiles.py) under the user's cache directory.
    """
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(root) / "sparse-prune" / f"{kind}-{slug(processor or backends.cpu_name())}.json"


def slug(processor: str) -> str:
    """The name of a processor as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", processor.lower()).strip("-")


def load_table(path: str | Path) -> Table:
    """Read and check a table file; raises SparsePruneError that names the file and what is wrong in it."""

    def wrong(got: object) -> SparsePruneError:
        remedy = f"run `sparse-prune tune` again, or unset {VARIABLE} and delete the file"
        return SparsePruneError(str(path), "a table that `sparse-prune tune` wrote", got, remedy)

    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise wrong(error) from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise wrong(f"no JSON object with format {FORMAT}")
    try:
        densities = tuple(float(value) for value in data["densities"])
        rows = tuple(_row(entry, densities) for entry in data["rows"])
        forms = tuple(_forms(entry) for entry in data.get("forms", ()))
        machine = dict(data["machine"])
        machines = {isa: dict(about) for isa, about in dict(data.get("machines", {})).items()}
    except (KeyError, TypeError, ValueError) as error:
        raise wrong(f"a damaged one ({type(error).__name__}: {error})") from None
    if not rows:
        raise wrong("one without rows")
    shipped = {_SHIPPED_FILE: "shipped table", _SHIPPED_GPU_FILE: "shipped bounds, counted and not timed"}
    source = shipped.get(Path(path), f"table {path}")
    return Table(source, machine, rows, forms, machines)


def _forms(entry: dict) -> Forms:
    k, n = entry["weight"]
    numbers = (entry["M"], n, k)
    if not all(type(number) is int and number > 0 for number in numbers):
        raise ValueError(f"M and weight must be positive integers, not {numbers}")
    plain = float(entry["plain"])
    if not (math.isfinite(plain) and plain > 0):
        raise ValueError(f"plain must be a positive number, not {plain}")
    return Forms(entry["isa"], entry["dtype"], entry["M"], (n, k), plain)


def _row(entry: dict, densities: tuple[float, ...]) -> Row:
    (r, c), (k, n) = entry["block"], entry["weight"]
    ratio = tuple(float(value) for value in entry["ratio"])
    kernel = entry.get("kernel", "")
    row = Row(entry["isa"], entry["dtype"], (r, c), entry["M"], (n, k), entry["dense"], densities, ratio, kernel)
    numbers = (*row.blocksize, row.tokens, *row.shape)
    if not all(type(number) is int and number > 0 for number in numbers):
        raise ValueError(f"block, M and weight must be positive integers, not {numbers}")
    if len(ratio) != len(densities) or len(ratio) < 2 or not all(math.isfinite(v) and v > 0 for v in ratio):
        raise ValueError(f"ratio must hold {len(densities)} positive numbers, one per density, not {entry['ratio']}")
    if list(densities) != sorted(set(densities)) or not (densities[0] > 0 and densities[-1] <= 1):
        raise ValueError(f"densities must rise within (0, 1], not {densities}")
    if kernel not in ("", *GPU_KERNELS) or (kernel and not re.fullmatch(r"sm_\d+", row.isa)):
        raise ValueError(
            f"kernel must be one of {', '.join(GPU_KERNELS)}, for an isa such as sm_80, not {kernel!r} for {row.isa}"
        )
    if row.dense not in DENSE_FORMS:
        raise ValueError(f"dense must be one of {', '.join(DENSE_FORMS)}, not {row.dense!r}")
    return row


_chosen: str | None = None


def setting() -> str:
    return _chosen or os.environ.get(VARIABLE, "")


@functools.lru_cache(maxsize=4)
def _tables(setting: str) -> tuple[Table, ...]:
    """The tables to look in, first to last: an instruction set or dtype that the first lacks is looked up in the shipped one."""
    shipped = load_table(_SHIPPED_FILE)
    own = "" if setting == SHIPPED else setting or (str(cache_file()) if cache_file().exists() else "")
    return (load_table(own), shipped) if own else (shipped,)


@functools.lru_cache(maxsize=4)
def _gpu_tables(setting: str) -> tuple[Table, ...]:
    """Likewise for a GPU: a file that was asked for if it has rows of one, what `sparse-prune tune` left, the shipped bounds."""
    own = [] if setting in ("", SHIPPED) else [load_table(setting)]
    tuned = cache_file(backends.gpu_name()) if backends.gpu_name() else None
    if setting == "" and tuned is not None and tuned.exists():
        own.append(load_table(tuned))
    return (*(table for table in own if any(row.kernel for row in table.rows)), load_table(_SHIPPED_GPU_FILE))
