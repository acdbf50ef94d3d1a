"""The CUDA C++ kernels as tests run them: compiled by nvcc to PTX, executed by the emulator on CPU tensors."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import built
import ptx_emulator
import torch
from torch import Tensor

CSRC = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
FLAGS = ("-O3", "-std=c++17", "-DNDEBUG")
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")
FEW_TOKENS = 64  # kSkinnyTokens of csrc/cuda/config.h
NAMES = {torch.bfloat16: "bf16", torch.float16: "f16"}
KINDS = {torch.int8: "int8", torch.float8_e4m3fn: "e4m3"}
# What a kernel is run with by `rotation`: every dtype in every timing mode.
PAIRS = [(dtype, mode) for mode in ptx_emulator.MODES for dtype in NAMES]
BLOCKS = [(r, c) for r in (16, 32, 64, 128) for c in (16, 32, 64, 128)]


def unavailable() -> str | None:
    """Why these kernels cannot be tested here, or None."""
    if nvcc() is None:
        return "nvcc was not found: CUDA_HOME, the path and the wheels of the extra cuda-build have none"
    return ptx_emulator.unavailable()


def setup_module() -> ModuleType:
    """setup.py, which finds nvcc and chooses architectures; a new one at each call."""
    spec = importlib.util.spec_from_file_location("sparse_prune_setup", CSRC.parent.parent / "setup.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


@functools.cache
def nvcc() -> str | None:
    """The nvcc that setup.py would build with, or None."""
    home = setup_module().cuda_home()
    return None if home is None else str(home / "bin" / "nvcc")


@functools.cache
def ptx(source: str, arch: str, patch: tuple[tuple[str, str, str], ...] = ()) -> str:
    """PTX of csrc/cuda/`source` for arch such as "sm_80"; kept in the user's cache, by content.

    patch: (file, text, text in its place), to plant bugs. Raises LookupError where that text is not there once, and RuntimeError
    where nvcc fails: neither is what a test takes for a bug that was caught.
    """
    files = {path.name: path.read_text() for path in sorted(CSRC.iterdir())}
    for file, old, new in patch:
        if files[file].count(old) != 1:
            raise LookupError(f"{file} has {files[file].count(old)} times {old!r}")
        files[file] = files[file].replace(old, new)
    command = [nvcc(), *FLAGS, f"-arch={arch}", "-ptx", source, "-o", "out.ptx"]

    def make(folder: Path) -> None:
        for name, text in files.items():
            (folder / name).write_text(text)
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)

    texts = [*command[1:], repr(sorted(files.items()))]
    return (built.built("cuda_tests", texts, make, command[:1]) / "out.ptx").read_text()


@functools.cache
def registers(source: str, arch: str, kernel: str) -> int:
    """Registers of a thread of a kernel of csrc/cuda/`source`, as ptxas gives them; an error if it spills any."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernels.ptx").write_text(ptx(source, arch))
        command = [nvcc(), f"-arch={arch}", "-cubin", f"-Xptxas=-v,-e,{kernel}", "kernels.ptx", "-o", "kernels.cubin"]
        told = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    text = told.stdout + told.stderr
    assert set(re.findall(r"(\d+) bytes spill", text)) == {"0"}, text
    return int(re.search(rf"entry function '{kernel}'.*?Used (\d+) reg", text, re.DOTALL)[1])


@functools.cache
def program(text: str, entry: str) -> ptx_emulator.Program:
    return ptx_emulator.Program(text, entry)


def rotation(groups: list[tuple[int, list[tuple[int, int]]]]) -> list[tuple]:
    """Cases (problem, tokens, dtype, mode, activation, extras) for groups (tokens, blocks that share a kernel).

    Each group has all of its blocks and all PAIRS, and goes round sizes and epilogues. tokens are the most of a block; those of a
    case are None up to 64, where the kernel for few runs.
    """
    sizes = {16: (1, 7, 9, 16), 64: (17, 33, 40, 64), 128: (70, 130), 256: (200, 260)}
    weights = ((300, 500), (296, 520), (45, 600), (130, 328), (168, 264))  # N, K
    extras = [(bias, residual) for bias in (True, False) for residual in (True, False)]
    cases = []
    for tokens, blocks in groups:
        for i in range(max(len(blocks), len(PAIRS))):
            m = sizes[tokens][(i + i // len(sizes[tokens])) % len(sizes[tokens])]
            problem = (m, *weights[i % len(weights)], *blocks[i % len(blocks)], 0.4)
            turn = len(cases)
            epilogue = ACTIVATIONS[turn % len(ACTIVATIONS)], extras[turn % len(extras)]
            cases.append((problem, None if tokens <= FEW_TOKENS else tokens, *PAIRS[i % len(PAIRS)], *epilogue))
    return cases


def aligned(x: Tensor, apart: int = 0) -> Tensor:
    """x [M, K] as the launchers pass it: rows begin at multiples of 16 bytes, K % 8 and `apart` numbers of NaN between them."""
    m, k = x.shape
    wide = x.new_full((m, (k + 7) // 8 * 8 + apart), torch.nan)
    wide[:, :k] = x
    return wide[:, :k]


class Layout(ctypes.Structure):
    """As in csrc/cuda/config.h."""

    _fields_ = [(name, ctypes.c_int) for name in ("row", "order", "block_cols")] + [
        (name, ctypes.c_int64)
        for name in ("rows", "tiles", "pieces", "tables", "starts", "piece_table", "steps", "least_bytes")
    ]


class LinearLaunch(ctypes.Structure):
    """As in csrc/cuda/config.h."""

    _fields_ = [
        (name, ctypes.c_int)
        for name in ("skinny", "tokens", "units", "inputs", "threads", "shared_bytes", "tall", "whole")
    ] + [("blocks", ctypes.c_int64)]

    def blocks_of(self, m: int, tiles: int) -> list[tuple[int, int, int]]:
        """(tile, first token, tokens) of each block of the kernel for many tokens."""

        def rows(tiles: range, m0: int, tokens: int, count: int) -> list[tuple[int, int, int]]:
            sets = [range(count)[at : at + 2048 // self.tokens] for at in range(0, count, 2048 // self.tokens)]
            return [(tile, m0 + tokens * row, tokens) for rows in sets for tile in tiles for row in rows]

        at, swapped = self.tall * self.tokens, 768 if self.whole else 0
        blocks = rows(range(tiles), 0, self.tokens, self.tall)
        if self.whole:
            most = tiles - self.whole
            blocks += rows(range(most, tiles), at, 256, 3) + rows(range(most), at, 192, 4)
        return blocks + rows(range(tiles), at + swapped, 192, -(-max(0, m - at - swapped) // 192))


class SddLaunch(ctypes.Structure):
    """As in csrc/cuda/config.h."""

    _fields_ = [(name, ctypes.c_int) for name in ("units", "splits", "threads", "shared_bytes")] + [
        (name, ctypes.c_int64) for name in ("blocks", "sum_blocks")
    ]


class PackedSm90(ctypes.Structure):
    """sm90::Packed of csrc/cuda/bsr_linear_sm90.h."""

    _fields_ = [(name, ctypes.c_int) for name in ("block_rows", "block_columns", "cluster")] + [
        (name, ctypes.c_int64) for name in ("nnzb", "groups", "lines")
    ]


class LaunchSm90(ctypes.Structure):
    """sm90::Launch of csrc/cuda/bsr_linear_sm90.h."""

    _fields_ = [
        (name, ctypes.c_int) for name in ("tokens", "line", "lines", "threads", "shared_bytes", "group_tokens")
    ] + [("turns", ctypes.c_int64)]


class TensorMapArguments(ctypes.Structure):
    """As in csrc/cuda/bsr_linear_sm90.h."""

    _fields_ = [
        ("global_dim", ctypes.c_uint64 * 2),
        ("global_stride", ctypes.c_uint64 * 1),
        ("box_dim", ctypes.c_uint32 * 2),
        ("swizzle", ctypes.c_uint32),
    ]


@functools.cache
def _config() -> ctypes.CDLL:
    """csrc/cuda/config.cpp."""
    headers = [CSRC / name for name in ("config.h", "problem.h", "bsr_linear_sm90.h")]
    library = built.library("cuda_tests", [CSRC / "config.cpp"], ["-std=c++17", "-O1"], headers)
    library.sparse_prune_packed_bytes_sm90.restype = ctypes.c_int64
    library.sparse_prune_x_map_arguments.restype = TensorMapArguments
    library.sparse_prune_refusal_sm90.restype = ctypes.c_char_p
    return library


def linear_launch(
    m: int, n: int, blocks: tuple[int, int, int], sms: int = 108, most_row: int = 64, work: Tensor | None = None
) -> tuple[Layout, LinearLaunch]:
    """What csrc/cuda/config.cpp chooses for a weight of n outputs, and its layout; blocks are (nnzb, R, C).

    work: cuda.Layout's; tiles have one height without it.
    """
    layout, launch = Layout(), LinearLaunch()
    call = _config().sparse_prune_linear_launch
    call.argtypes = (ctypes.c_int64,) * 3 + (ctypes.c_int,) * 4 + (ctypes.c_void_p,) * 3
    call(
        m, n, *blocks, most_row, sms, 0 if work is None else work.data_ptr(), ctypes.byref(layout), ctypes.byref(launch)
    )
    return layout, launch


def wide_launch(at: Layout, m: int, tokens: int | tuple[int, int], tiles: int | None = None) -> LinearLaunch:
    """The launch of the kernel for many tokens, in blocks of 128, 192 or 256, or as (tall, whole) say, not as the launcher would.

    tiles: how many, where not all.
    """
    most = 128 if tokens == 128 else 256
    inputs = 16 if at.row == 16 or at.block_cols == 16 or (at.row, most) == (64, 128) else 32
    shared = 4 * (most + 128) * 64 if at.row == 16 else 3 * most * 128
    tall, whole = tokens if isinstance(tokens, tuple) else (0 if tokens == 192 else -(-m // tokens), 0)
    launch = LinearLaunch(0, most, 0, inputs, 256, shared, tall, whole)
    launch.blocks = len(launch.blocks_of(m, at.tiles if tiles is None else tiles))
    return launch


def launch_of(
    m: int, n: int, blocks: tuple[int, int, int], tokens: int | tuple[int, int] | None, **options
) -> tuple[Layout, LinearLaunch]:
    """linear_launch; with tokens: the kernel for many tokens, in blocks of so many."""
    at, launch = linear_launch(m, n, blocks, **options)
    return at, launch if tokens is None else wide_launch(at, m, tokens)


def ragged(at: Layout, k: int) -> int:
    """How many steps may have inputs past the end, as launch_linear passes it."""
    return -(-at.block_cols // (32 if at.row == 16 else 64)) if k % at.block_cols else 0


def entry(layout: Layout, launch: LinearLaunch, dtype: torch.dtype, of: torch.dtype | None = None) -> str:
    """The name of the kernel that launch_linear runs; of: the dtype of weights of 8 bits."""
    name = f"{KINDS[of]}_{NAMES[dtype]}" if of else NAMES[dtype]
    if launch.skinny:
        return f"bsr_linear_skinny_{name}_{launch.tokens}_{launch.units}"
    return f"bsr_linear_sm80_{name}_{layout.row}x{launch.inputs}_{launch.tokens}"


def kernel_of(
    problem: tuple, tokens: int | tuple[int, int] | None, dtype: torch.dtype, of: torch.dtype | None = None
) -> str:
    """The name of the kernel for a problem (M, N, K, R, C, density)."""
    m, n, _, r, c, _ = problem
    at, launch = launch_of(m, n, (1, r, c // 2 if of else c), tokens, most_row=32 if of else 64)
    return entry(at, launch, dtype, of)


def linear(
    x: Tensor,
    packed: Tensor,
    blocks: tuple[int, int, int],
    n: int,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    tokens: int | tuple[int, int] | None = None,
    tiles: Tensor | None = None,
    arch: str = "sm_80",
    patch: tuple[tuple[str, str, str], ...] = (),
    sms: int = 108,
    work: Tensor | None = None,
    **options,
) -> tuple[Tensor, ptx_emulator.Counts]:
    """y[M, n] of the kernel that launch_linear would run (with tokens: the one for many tokens, in blocks of so many), and counts.

    packed is cuda.Layout.pack's, work the layout's; blocks are (nnzb, R, C); tiles are the numbers of its tiles to run, all
    unless given; the rest of y stays NaN.
    """
    m, k = x.shape
    assert x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0, "the launcher copies other x"
    at, launch = launch_of(m, n, blocks, tokens, sms=sms, work=work)
    y = x.new_full((m, n), torch.nan)  # [M, N]
    assert len(packed) >= at.least_bytes
    weights, heads, starts, pieces, steps = packed.tensor_split((at.tables, at.starts, at.piece_table, at.steps))
    count = at.tiles
    if tiles is not None:
        heads, count = heads.view(at.tiles, -1)[tiles].contiguous(), len(tiles)
        launch = wide_launch(at, m, tokens, count)
    vector = n % 8 == 0 and all(t is None or t.data_ptr() % 16 == 0 for t in (y, bias, residual))
    tables, last = (heads, steps), [count, launch.tall, launch.whole, ragged(at, k)]
    if launch.skinny:
        tables, last = (starts, pieces), [at.row // 16, at.order]
    code = program(ptx("kernels_sm80.cu", arch, patch), entry(at, launch, x.dtype))
    arguments = [x, weights, *tables, *(0 if t is None else t for t in (bias, residual)), y]
    arguments += [m, n, k, x.stride(0), *last, ACTIVATIONS.index(activation), int(vector)]
    counts = code.launch(launch.blocks, launch.threads, arguments, shared_bytes=launch.shared_bytes, **options)
    return y, counts


def quantize(
    x: Tensor,
    x_scale: float | None,
    arch: str,
    patch: tuple[tuple[str, str, str], ...] = (),
    of: torch.dtype = torch.int8,
    **options,
) -> tuple[Tensor, Tensor]:
    """`of` [M, K and zeros up to a multiple of 32] and float32 [M] of the kernel that launch_quantize would run."""
    (m, k), wide = x.shape, -(-x.shape[1] // 32) * 32
    q, scales = torch.full((m, wide), -128, dtype=torch.int8).view(of), torch.full((m,), -1.0)
    code = program(ptx(f"kernels_{KINDS[of]}.cu", arch, patch), f"quantize_rows_{KINDS[of]}_{NAMES[x.dtype]}")
    code.launch(m, 128, [x, q, scales, k, x.stride(0), wide, x_scale or 0.0], shared_bytes=0, **options)
    return q, scales


def linear_w8a8(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    blocks: tuple[int, int, int],
    n: int,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    x_scale: float | None = None,
    tokens: int | None = None,
    arch: str = "sm_80",
    patch: tuple[tuple[str, str, str], ...] = (),
    of: torch.dtype = torch.int8,
    **options,
) -> tuple[Tensor, ptx_emulator.Counts]:
    """As linear, by the kernels for weights of 8 bits, `blocks` (nnzb, R, C) of dtype `of`; counts of the product."""
    q, x_scales = quantize(x, x_scale, arch, patch, of, **options)
    pairs, (nnzb, r, c) = q.view(torch.int16), blocks
    at, launch = launch_of(len(x), n, (nnzb, r, c // 2), tokens, most_row=32)
    y = x.new_full((len(x), n), torch.nan)  # [M, N]
    assert len(packed) >= at.least_bytes
    weights, heads, starts, pieces, steps = packed.tensor_split((at.tables, at.starts, at.piece_table, at.steps))
    tables, last = (
        ((starts, pieces), [at.row // 16, at.order])
        if launch.skinny
        else ((heads, steps), [at.tiles, launch.tall, launch.whole, ragged(at, pairs.shape[1])])
    )
    vector = n % 8 == 0 and all(t is None or t.data_ptr() % 16 == 0 for t in (y, bias, residual))
    arguments = [pairs, weights, *tables, *(0 if t is None else t for t in (bias, residual)), y]
    arguments += [*y.shape, pairs.shape[1], pairs.stride(0), *last, ACTIVATIONS.index(activation), int(vector)]
    code = program(ptx(f"kernels_{KINDS[of]}.cu", arch, patch), entry(at, launch, x.dtype, of))
    given = [*arguments, x_scales, scales]
    return y, code.launch(launch.blocks, launch.threads, given, shared_bytes=launch.shared_bytes, **options)


def sdd_launch(m: int, jobs: int, blocks: tuple[int, int, int], sms: int = 108) -> SddLaunch:
    """What csrc/cuda/config.cpp chooses for the gradient of `blocks` (nnzb, R, C) in so many jobs."""
    launch, call = SddLaunch(), _config().sparse_prune_sdd_launch
    call.argtypes = (ctypes.c_int64,) * 3 + (ctypes.c_int,) * 3 + (ctypes.c_void_p,)
    call(m, jobs, *blocks, sms, ctypes.byref(launch))
    return launch


def sdd(
    dy: Tensor,
    x: Tensor,
    jobs: Tensor,
    blocks: tuple[int, int, int],
    sms: int = 108,
    arch: str = "sm_80",
    patch: tuple[tuple[str, str, str], ...] = (),
    **options,
) -> tuple[Tensor, list[ptx_emulator.Counts]]:
    """dvalues of the kernels that launch_sdd would run for `blocks` (nnzb, R, C), and counts of each; jobs are cuda.make_jobs'."""
    for rows in (dy, x):
        assert rows.stride(1) == 1 and rows.stride(0) % 8 == 0 and rows.data_ptr() % 16 == 0, (
            "the launcher copies others"
        )
    (m, n), k, name = dy.shape, x.shape[1], NAMES[x.dtype]
    launch = sdd_launch(m, len(jobs), blocks, sms)
    dvalues = x.new_full(blocks, torch.nan)  # [nnzb, R, C]
    parts = x.new_full((launch.splits, *blocks), torch.nan, dtype=torch.float32) if launch.splits > 1 else 0
    text = ptx("kernels_sdd.cu", arch, patch)
    arguments = [dy, x, jobs, dvalues, parts, m, n, k, dy.stride(0), x.stride(0), blocks[2], len(jobs), launch.splits]
    product = program(text, f"bsr_sdd_{name}_{launch.units}")
    arguments.append(dvalues.numel())
    counts = [product.launch(launch.blocks, launch.threads, arguments, shared_bytes=launch.shared_bytes, **options)]
    if launch.splits > 1:
        arguments = [parts, dvalues, dvalues.numel(), launch.splits]
        counts.append(
            program(text, f"sum_parts_{name}").launch(launch.sum_blocks, launch.threads, arguments, **options)
        )
    return dvalues, counts


def refusal_sm90(x: int, m: int, n: int, k: int, row_bytes: int, weight: PackedSm90) -> str | None:
    """Why the kernel for Hopper cannot run, as the launcher finds it; x is an address."""
    numbers = [ctypes.c_int64(number) for number in (x, m, n, k, row_bytes)]
    reason = _config().sparse_prune_refusal_sm90(*numbers, ctypes.byref(weight))
    return None if reason is None else reason.decode()


def launch_sm90(
    m: int, n: int, weight: PackedSm90, tokens: int | None = None, sms: int = 132
) -> tuple[Layout, LinearLaunch, LaunchSm90]:
    """What csrc/cuda chooses for m rows on a Hopper: the layout for few tokens and its launch, and that of the kernel for many."""
    made = Layout(), LinearLaunch(), LaunchSm90()
    sizes = ctypes.c_int64(m), ctypes.c_int64(n), ctypes.byref(weight), sms, tokens or 0
    _config().sparse_prune_linear_launch_sm90(*sizes, *(ctypes.byref(part) for part in made))
    return made


def entry_sm90(launch: LaunchSm90, dtype: torch.dtype) -> str:
    """The name of the kernel that launch_linear_sm90 runs."""
    return f"bsr_linear_sm90_{NAMES[dtype]}_{launch.tokens}_{launch.line}x{launch.lines}"


def linear_sm90(
    x: Tensor,
    packed: Tensor,
    weight: PackedSm90,
    n: int,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    tokens: int | None = None,
    clusters: int = 2,
    few_arch: str = "sm_80",
    edit: Callable[[str, str], str] | None = None,
    patch: tuple[tuple[str, str, str], ...] = (),
    **options,
) -> tuple[Tensor, ptx_emulator.Counts]:
    """y[M, n] of the kernel that csrc/cuda launches on Hopper for a weight that cuda_sm90.Layout.pack packed, and counts.

    tokens: the kernel for many tokens, in tiles of so many. clusters: how many of them a GPU runs at once. edit changes its PTX.
    few_arch: what the kernel for few tokens is compiled for.
    """
    m, k = x.shape
    refused = refusal_sm90(x.data_ptr(), m, n, k, 2 * x.stride(0), weight)
    assert x.stride(1) == 1 and refused is None, refused
    assert len(packed) == _config().sparse_prune_packed_bytes_sm90(ctypes.c_int64(n), ctypes.byref(weight))
    few, few_launch, launch = launch_sm90(m, n, weight, tokens)
    y = x.new_full((m, n), torch.nan)  # [M, N]
    table = 2 * weight.nnzb * weight.block_rows * weight.block_columns
    weights, table, starts, pieces = packed.tensor_split((table, few.starts, few.piece_table))
    values = weights if len(weights) else 0
    extras = [0 if t is None else t for t in (bias, residual)]
    if few_launch.skinny and tokens is None:
        vector = n % 8 == 0 and all(t is None or t.data_ptr() % 16 == 0 for t in (y, bias, residual))
        arguments = [x, values, starts, pieces, *extras, y, m, n, k, x.stride(0), few.row // 16, few.order]
        arguments += [ACTIVATIONS.index(activation), int(vector)]
        code = program(ptx("kernels_sm80.cu", few_arch, patch), entry(few, few_launch, x.dtype))
        size = {"shared_bytes": few_launch.shared_bytes}
        return y, code.launch(few_launch.blocks, few_launch.threads, arguments, **size, **options)
    name = entry_sm90(launch, x.dtype)
    text = ptx("kernels_sm90.cu", "sm_90a", patch)
    code = program(edit(text, name) if edit else text, name)
    described = _config().sparse_prune_x_map_arguments(
        *(ctypes.c_int64(size) for size in (m, k, 2 * x.stride(0))), launch.tokens, launch.line
    )
    x_map = ptx_emulator.TensorMap(
        x, described.box_dim, described.global_dim, described.global_stride, described.swizzle
    )
    arguments = [x_map, x, values, table, *extras, y, x.stride(0), n, m, n, k, weight.block_rows, weight.groups]
    arguments += [weight.lines, launch.group_tokens, ACTIVATIONS.index(activation)]
    blocks = min(clusters, launch.turns) * weight.cluster
    options |= {"shared_bytes": launch.shared_bytes, "cluster": weight.cluster}
    return y, code.launch(blocks, launch.threads, arguments, **options)
