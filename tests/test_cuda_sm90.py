"""The sm_90a kernel of csrc/cuda as nvcc compiles it, executed by the PTX emulator against float64."""

from __future__ import annotations

import ctypes
import functools
import re
import subprocess
import tempfile
from pathlib import Path

import cuda_kernels
import ptx_emulator
import pytest
import torch
from ptx_emulator import EmulationError, Program, TensorMap
from sparse_prune_kernels import config, cuda_sm90
from triton_problems import assert_as_good_as_torch, exact_and_dense, make_problem

from sparse_prune import reference

pytestmark = pytest.mark.skipif(cuda_kernels.unavailable() is not None, reason=str(cuda_kernels.unavailable()))
BF16, F16 = torch.bfloat16, torch.float16
ACTIVATIONS = list(reference.ACTIVATIONS)


def ptx() -> str:
    return cuda_kernels.ptx("kernels_sm90.cu", "sm_90a")


class XMap(ctypes.Structure):
    _fields_ = [
        ("global_dim", ctypes.c_uint64 * 2),
        ("global_stride", ctypes.c_uint64 * 1),
        ("box_dim", ctypes.c_uint32 * 2),
        ("swizzle", ctypes.c_uint32),
    ]


@functools.cache
def host() -> ctypes.CDLL:
    """The functions of bsr_linear_sm90.h that the launcher calls."""
    source = """#include "bsr_linear_sm90.h"
using namespace sparse_prune::sm90;
extern "C" TensorMapArguments x_map(int64_t m, int64_t k, int64_t row, int tokens, int step) {
  return x_map_arguments(m, k, row, tokens, step);
}
extern "C" int shared(int tokens, int step) { return shared_bytes(tokens, step); }
extern "C" int threads() { return THREADS; }
extern "C" const char* refusal(uint64_t address, int64_t k, int64_t row) { return x_map_refusal(address, k, row); }
"""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *ptx_emulator._compiler(),
            "-std=c++17",
            "-shared",
            "-fPIC",
            f"-I{cuda_kernels.CSRC}",
            "-x",
            "c++",
            "-",
        ]
        subprocess.run([*command, "-o", f"{folder}/host.so"], input=source, text=True, check=True)
        library = ctypes.CDLL(f"{folder}/host.so")
    library.x_map.restype, library.refusal.restype = XMap, ctypes.c_char_p
    library.refusal.argtypes = [ctypes.c_uint64, ctypes.c_int64, ctypes.c_int64]
    library.x_map.argtypes = [ctypes.c_int64] * 3 + [ctypes.c_int] * 2
    return library


@functools.cache
def program(dtype, tokens, step, edit=None) -> Program:
    text = ptx()
    name = f"bsr_linear_sm90_{cuda_kernels.NAMES[dtype]}_{tokens}_{step}"
    return Program(edit(text, name) if edit else text, name)


def product(
    x, packed, bias=None, residual=None, activation="none", tokens=256, cluster=None, clusters=2, edit=None, **options
):
    """act(x @ W^T + bias) + residual by `clusters` clusters that stay until all is done; y, counts and the plan."""
    (n, k), (r, c) = packed.shape, packed.blocksize
    cluster, step = cluster or cuda_sm90.cluster_of(n), cuda_sm90.step_of(c)
    plan = cuda_sm90.make_cluster_plan(packed.crow_indices, packed.col_indices, k, (r, c), cluster)
    values = cuda_sm90.fragment_order(packed.values)
    y = x.new_full((len(x), n), torch.nan)
    described = host().x_map(len(x), k, x.stride(0) * 2, tokens, step)
    x_map = TensorMap(x, described.box_dim, described.global_dim, described.global_stride, described.swizzle)
    arguments = [x_map, values, plan.table, 0 if bias is None else bias, 0 if residual is None else residual, y]
    arguments += [0 if residual is None else residual.stride(0), len(x), n, r, plan.groups, plan.steps, 2]
    arguments += [ACTIVATIONS.index(activation)]
    counts = program(x.dtype, tokens, step, edit).launch(
        clusters * cluster, host().threads(), arguments, host().shared(tokens, step), cluster=cluster, **options
    )
    return y, counts, plan


def check(problem, dtype, activation="gelu", extras=(True, True), **options):
    packed, x, bias, residual = make_problem(*problem, dtype)
    x = cuda_kernels.aligned(x)
    bias, residual = (tensor if used else None for tensor, used in zip((bias, residual), extras, strict=True))
    y, counts, plan = product(x, packed, bias, residual, activation, **options)
    exact, dense = exact_and_dense(x, packed.to_dense(), bias, activation, residual)
    assert_as_good_as_torch(y, exact, dense)
    return packed, counts, plan


# (M, N, K, R, C, density), tokens of a tile, blocks of a cluster, clusters: all places of a group empty, one group and
# several, several tiles for each cluster, edges in every dimension.
PROBLEMS = [
    ((1, 96, 64, 32, 32, 0.5), 256, 1, 1),
    ((7, 45, 70, 16, 32, 0.5), 128, 1, 2),
    ((33, 64, 96, 64, 16, 0.3), 128, 1, 1),
    ((9, 64, 64, 32, 32, 0.0), 128, 1, 1),
    ((9, 64, 64, 32, 32, 1.0), 256, 1, 1),
    ((130, 128, 96, 16, 16, 0.2), 128, 1, 1),
    ((20, 100, 300, 128, 128, 0.7), 128, 1, 1),
    ((530, 40, 33, 32, 16, 0.5), 256, 1, 2),
    ((300, 300, 328, 64, 64, 0.4), 128, 2, 1),
    ((300, 530, 520, 64, 64, 0.3), 256, 4, 1),
    ((200, 1040, 320, 16, 16, 0.2), 256, 4, 1),
    ((300, 700, 416, 32, 32, 0.2), 256, 4, 2),
    ((70, 1025, 200, 128, 16, 0.4), 128, 4, 2),
    ((140, 600, 136, 16, 128, 0.4), 128, 4, 1),
]


@pytest.mark.parametrize("case", PROBLEMS, ids=str)
def test_forward(case):
    problem, tokens, cluster, clusters = case
    check(problem, BF16, tokens=tokens, cluster=cluster, clusters=clusters)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("n", [45, 48])  # outputs one by one, and four at a time
def test_epilogues(n, activation):
    for extras in ((True, False), (False, True)):
        check((70, n, 72, 16, 32, 0.5), F16, activation, extras, tokens=128)


@pytest.mark.parametrize("mode", ptx_emulator.MODES)
@pytest.mark.parametrize("block", [(16, 16), (32, 32), (64, 64), (128, 128)], ids=str)
def test_asynchronous_work_may_end_whenever_it_likes(mode, block):
    """More steps than stages, two tiles for each block of a cluster of four."""
    check((140, 520, 1088, *block, 0.25), BF16, tokens=128, cluster=4, clusters=1, mode=mode)


@pytest.mark.parametrize("block", [(16, 16), (32, 32), (128, 128)], ids=str)
def test_work_is_what_was_predicted(block):
    """Multiply-adds, bytes from L2 and bytes through shared memory, as predicted_clocks counts them, for a tile of a cluster."""
    m, n, k, tokens = 256, 512, 1024, 256
    packed, counts, plan = check(
        (m, n, k, *block, 0.2), BF16, "none", (False, False), cluster=4, clusters=1, mode="early"
    )
    gpu = config.gpu_of(90)
    nnz = packed.nnzb * block[0] * block[1]
    clocks = cuda_sm90.predicted_clocks(m, n, k, nnz, plan, tokens, gpu, clusters=1)
    blocks = plan.groups * plan.cluster
    assert counts.tensor_fma == pytest.approx(blocks * clocks["tensor"] * gpu.multiply_adds)
    l2 = 32 * (counts.l2_load_sectors + counts.global_store_sectors)
    index = 4 * plan.table.numel() + 1024  # each block reads its part, in sectors of 32 bytes
    assert clocks["L2"] * gpu.l2_bytes <= l2 <= clocks["L2"] * gpu.l2_bytes + blocks * index
    shared = 128 * counts.shared_wavefronts + counts.wgmma_shared_bytes
    words = 128 * 12 * blocks * plan.steps  # the word of a stage: written once, read by eight warps
    assert blocks * clocks["shared"] * 128 <= shared <= 1.001 * blocks * clocks["shared"] * 128 + words
    assert counts.shared_wavefronts == counts.shared_ideal  # no bank conflicts
    assert counts.kinds["store_global"] == m * n // 128  # 128 outputs an instruction: a sector of 16 for each of 8 rows


def test_x_that_no_tensor_map_describes_is_refused_with_the_reason():
    assert host().refusal(0x1000, 64, 128) is None
    assert b"multiple of 16 bytes" in host().refusal(0x1002, 64, 128)
    assert b"multiple of 16 bytes apart" in host().refusal(0x1000, 33, 66)
    assert b"column" in host().refusal(0x1000, 0, 16)


# ---- what ptxas makes of it ----

KERNELS = [
    f"bsr_linear_sm90_{t}_{tokens}_{step}" for t in ("bf16", "f16") for tokens in (128, 256) for step in (16, 32, 64)
]
QUICK = ("bsr_linear_sm90_bf16_128_16", "bsr_linear_sm90_f16_128_64")


@pytest.mark.parametrize("name", [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in KERNELS])
def test_cubin(name, tmp_path):
    """No spills, two warpgroups' registers, and in the machine code what the design asks for."""
    tools = pytest.importorskip("triton.backends.nvidia.compiler").__file__
    tokens, step = (int(part) for part in name.split("_")[-2:])
    text, cubin = tmp_path / "kernel.ptx", tmp_path / "kernel.cubin"
    text.write_text(ptx())
    ptxas = ["nvcc", "-arch=sm_90a", "-cubin", f"-Xptxas=-v,-e,{name}", str(text), "-o", str(cubin)]
    done = subprocess.run(ptxas, capture_output=True, text=True)
    report = done.stdout + done.stderr
    assert done.returncode == 0, report
    assert re.search(rf"Compiling entry function '{name}'", report)
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report
    assert "C7510" not in report and "serialized" not in report, report
    # Of 65536: 168 for each of 384 threads when they start; then 56 for those that load and 224 for those that multiply.
    assert int(re.search(r"Used (\d+) registers", report)[1]) == 168 and 128 * 56 + 256 * 224 <= 65536
    assert host().shared(tokens, step) <= 227 * 1024
    disassemble = [str(Path(tools).with_name("bin") / "cuobjdump"), "-sass", "-fun", name, str(cubin)]
    sass = subprocess.run(disassemble, capture_output=True, text=True, check=True).stdout
    products = re.findall(rf"HGMMA\.64x{tokens}x16\.F32(?:\.BF16)? (R\d+), (R\d+), gdesc\[\w+\], R\d+(, gsb0)?", sass)
    depth = step // 16
    assert len(products) == 2 * depth  # two steps in turn, with fragments of their own ...
    assert len({a for _, a, _ in products}) == 2 * depth and len({d for d, _, _ in products}) == 1
    assert [bool(g) for *_, g in products] == (
        [False] * (depth - 1) + [True]
    ) * 2  # ... and nothing waits between products of a step
    assert "UTMALDG.2D.MULTICAST" in sass and "UBLKCP" in sass and "USETMAXREG" in sass and "MOVM" in sass
    assert not re.search(r"\b(STL|LDL|HMMA)\b", sass)


# ---- bugs planted in the compiled kernel: an error, or a wrong result ----

WRONG = None
LOADS, MULTIPLIES = "setmaxnreg.dec", "setmaxnreg.inc"
WAITS = r"@!done bra again;"
DESCRIPTOR = r"(or\.b64\s+%rd\d+, %rd\d+), -9223371899415756800;"  # swizzle of 64 bytes, eight rows every 512


def replaced(pattern, by, part="", which=slice(None)):
    """Matches number `which` of the pattern become `by`, after the first `part` (producer first, then consumers)."""

    def edit(body: str) -> str:
        start = body.index(part)
        end = body.index(MULTIPLIES) if part == LOADS else len(body)
        matches = [m for m in re.finditer(pattern, body) if start <= m.start() < end][which]
        assert matches, pattern
        for match in reversed(matches):
            body = body[: match.start()] + match.expand(by) + body[match.end() :]
        return body

    return edit


PLANTED = {
    "W refilled before it is spent": (replaced(WAITS, "", LOADS, slice(0, None, 2)), "race|more arrivals|under way"),
    "x refilled before it is free": (replaced(WAITS, "", LOADS, slice(1, None, 2)), "race|more arrivals|under way"),
    "a stage read before it is ready": (replaced(WAITS, "", MULTIPLIES), "under way|not ordered"),
    "expect_tx halved": (
        replaced(
            r"mbarrier\.arrive\.expect_tx(\S+) _, (\[%r\d+\]), (%r\d+);",
            r"{.reg .b32 h; shr.u32 h, \3, 1; mbarrier.arrive.expect_tx\1 _, \2, h;}",
        ),
        "under way|race|deadlock",
    ),
    "expect_tx too high": (
        replaced(
            r"mbarrier\.arrive\.expect_tx(\S+) _, (\[%r\d+\]), (%r\d+);",
            r"{.reg .b32 h; add.u32 h, \3, 16; mbarrier.arrive.expect_tx\1 _, \2, h;}",
        ),
        "deadlock",
    ),
    "wgmma wait too weak": (replaced(r"(wgmma\.wait_group\S*\s+)1;", r"\g<1>2;"), "use by a wgmma|race|wait_group"),
    "sums read too early": (replaced(r"wgmma\.wait_group\S*\s+0;", "", MULTIPLIES, slice(-1, None)), "wait_group"),
    "no wgmma.fence": (replaced(r"wgmma\.fence\S*;", ""), "no wgmma.fence"),
    "another swizzle in the descriptor": (replaced(DESCRIPTOR, r"\1, -4611685880988368896;"), WRONG),
    "rows of the descriptor elsewhere": (replaced(DESCRIPTOR, r"\1, -9223371762007834624;"), "race|under way"),
    "no barrier once the mbarriers are made": (
        replaced(r"barrier\.cluster\.(arrive|wait)\S*;", "", "", slice(0, 2)),
        "no mbarrier|a use at",
    ),
    "stores beyond the last row of x": (
        replaced(
            r"and\.pred\s+(%p\d+), (%p\d+), %p\d+;(?=(?:(?!and\.pred)[\s\S])*?st\.global\.v2)", r"mov.pred \1, \2;"
        ),
        "in no tensor",
    ),
    "stores beyond the last output": (
        replaced(r"@%p\d+ bra\s+\S+;(?=\s+(?:shr\.u32[^;]+;\s+)?st\.global\.u16)", ""),
        "in no tensor|between",
    ),
    "reported to the wrong block": (
        replaced(r"(mapa\.shared::cluster\.u32 there, %r\d+), %r\d+;", r"\1, 0;", MULTIPLIES),
        "deadlock|no mbarrier|more arrivals|race",
    ),
    "the leader's word does not reach all": (
        replaced(r"(mapa\.shared::cluster\.u32 there, %r\d+), %r\d+;", r"\1, 0;", LOADS),
        "deadlock|more arrivals|race",
    ),
    "lanes released unseen": (replaced(r"bar\.warp\.sync\s+\S+;", "", MULTIPLIES), "race"),
    "fragments exchanged": (
        replaced(r"(\{%r\d+), (%r\d+), (%r\d+), (%r\d+)\}, (%rd\d+, add)", r"\1, \3, \2, \4}, \5"),
        WRONG,
    ),
}
# Where a product ends when it begins, its stage is read before the stage before it is released, and that everybody awaits.
HARMLESS = {("x refilled before it is free", "early")}


def in_body(edit):
    def whole(text: str, name: str) -> str:
        start = text.index(f".entry {name}(")
        end = text.find(".entry", start + 10)
        end = len(text) if end < 0 else end
        return text[:start] + edit(text[start:end]) + text[end:]

    return whole


@pytest.mark.parametrize("mode", ptx_emulator.MODES)
@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bug(bug, mode):
    edit, message = PLANTED[bug]
    options = {"tokens": 128, "cluster": 2, "clusters": 1, "mode": mode, "edit": in_body(edit), "limit": 1 << 20}
    problem = (140, 263 if "output" in bug else 264, 640, 32, 32, 0.3)
    if (bug, mode) in HARMLESS:
        check(problem, BF16, "none", (False, False), **options)
    elif message is WRONG:
        with pytest.raises(AssertionError):
            check(problem, BF16, "none", (False, False), **options)
    else:
        with pytest.raises(EmulationError, match=message):
            check(problem, BF16, "none", (False, False), **options)
