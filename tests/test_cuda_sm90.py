"""The sm_90a kernel of csrc/cuda as nvcc compiles it, executed by the PTX emulator against float64."""

from __future__ import annotations

import re
import subprocess
from itertools import product
from pathlib import Path

import cuda_kernels
import ptx_emulator
import pytest
import torch
import torch.nn.functional as F
from cuda_kernels import BLOCKS, PAIRS
from ptx_emulator import EmulationError
from sparse_prune_kernels import config, cuda_sm90
from triton_problems import assert_as_good_as_torch, exact_and_dense, make_problem

import sparse_prune as sp
from sparse_prune import reference
from sparse_prune.masks import expand_mask

pytestmark = pytest.mark.skipif(cuda_kernels.unavailable() is not None, reason=str(cuda_kernels.unavailable()))
BF16, F16 = torch.bfloat16, torch.float16
ACTIVATIONS = list(reference.ACTIVATIONS)


def run(x, packed, bias=None, residual=None, activation="none", cluster=None, **options):
    """act(x @ W^T + bias) + residual by `clusters` clusters that stay until all is done; y, counts and the plan."""
    (n, k), (r, c) = packed.shape, packed.blocksize
    layout = cuda_sm90.make_layout(packed.crow_indices, packed.col_indices, k, r, c, cluster=cluster)
    plan = layout.plan
    weight = cuda_kernels.PackedSm90(r, c, plan.cluster, packed.nnzb, plan.groups, plan.lines)
    packed = layout.pack(packed.values)
    y, counts = cuda_kernels.linear_sm90(x, packed, weight, n, bias, activation, residual, **options)
    return y, counts, plan


def check(problem, dtype, activation="gelu", extras=(True, True), **options):
    packed, x, bias, residual = make_problem(*problem, dtype)
    x = cuda_kernels.aligned(x)
    bias, residual = (tensor if used else None for tensor, used in zip((bias, residual), extras, strict=True))
    y, counts, plan = run(x, packed, bias, residual, activation, **options)
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
def test_clusters(case):
    problem, tokens, cluster, clusters = case
    check(problem, BF16, tokens=tokens, cluster=cluster, clusters=clusters)


# (tokens, blocks that run one kernel): together all kernels.
GROUPS = [
    (tokens, [block for block in BLOCKS if (min(block[1], 64), block[0] >= 64) in kinds])
    for tokens in (128, 256)
    for kinds in ([(16, False)], [(16, True)], [(32, False), (32, True)], [(64, False), (64, True)])
]
CASES = cuda_kernels.rotation(GROUPS)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case):
    problem, tokens, dtype, mode, activation, extras = case
    check(problem, dtype, activation, extras, tokens=tokens, mode=mode)


def test_every_kernel_runs_with_every_dtype_in_every_mode_and_for_all_blocks():
    ran = set()
    for (m, n, _, r, c, _), tokens, dtype, mode, *_ in CASES:
        launch = cuda_kernels.launch_sm90(m, n, cuda_kernels.PackedSm90(r, c, 1, 1, 1, 1), tokens)[2]
        ran.add((cuda_kernels.entry_sm90(launch, dtype), mode))
    there = re.findall(r"\.entry (bsr_linear_sm90_\w+)\(", cuda_kernels.ptx("kernels_sm90.cu", "sm_90a"))
    assert ran == set(product(there, ptx_emulator.MODES)) and sorted(there) == sorted(KERNELS)
    for wanted in (128, 256):
        assert {problem[3:5] for problem, tokens, *_ in CASES if tokens == wanted} == set(BLOCKS)


@pytest.mark.parametrize("m", [9, 140])
@pytest.mark.parametrize("i", range(len(BLOCKS)), ids=[str(block) for block in BLOCKS])
def test_layout_of_the_transpose(i, m):
    """x @ W, as for dx: by both kernels that read the layout."""
    (r, c), (dtype, mode) = BLOCKS[i], PAIRS[i % len(PAIRS)]
    packed, *_ = make_problem(1, 300, 200, r, c, 0.4, dtype)
    x = cuda_kernels.aligned(torch.randn(m, 300).to(dtype))
    layout = cuda_sm90.make_layout(packed.crow_indices, packed.col_indices, 200, r, c, transposed=True)
    plan = layout.plan
    weight = cuda_kernels.PackedSm90(c, r, plan.cluster, packed.nnzb, plan.groups, plan.lines)
    y, counts = cuda_kernels.linear_sm90(x, layout.pack(packed.values), weight, 200, mode=mode)
    assert (counts.kinds["wgmma"] > 0) == (m > cuda_kernels.FEW_TOKENS)
    assert_as_good_as_torch(y, *exact_and_dense(x, packed.to_dense().T.contiguous(), None, "none", None))


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
        (m, n, k, *block, 0.2), BF16, "none", (False, False), tokens=tokens, cluster=4, clusters=1, mode="early"
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
    words = 128 * 12 * blocks * plan.lines  # the word of a stage: written once, read by eight warps
    assert blocks * clocks["shared"] * 128 <= shared <= 1.001 * blocks * clocks["shared"] * 128 + words
    assert counts.shared_wavefronts == counts.shared_ideal  # no bank conflicts
    assert counts.kinds["store_global"] == m * n // 128  # 128 outputs an instruction: a sector of 16 for each of 8 rows


def poisoned(block, value, dtype=BF16, **options):
    """y where x holds value at a block-column that block-row 0 lacks and row 1 has; what y should be; PyTorch's of zeros there."""
    generator = torch.Generator().manual_seed(0)
    r, c = block
    n, k = 2 * r - 5, 6 * c - 3
    mask = torch.rand(2, 6, generator=generator) < 0.6
    mask[0, 2], mask[1, 2] = False, True
    weight = torch.randn(n, k, generator=generator).to(dtype)
    packed = sp.BsrWeight.from_dense(weight, mask, block)
    x, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in ((140, k), (n,)))
    x[7, 2 * c + 1], x[130, 3 * c - 1] = value, -value
    x = cuda_kernels.aligned(x)
    y, *_ = run(x, packed, bias, tokens=128, clusters=1, **options)
    sees = expand_mask(mask, block, (n, k))[:, None] & ~x.isfinite()[None]  # [N, M, K]
    clean, dense = x.nan_to_num(0, 0, 0), packed.to_dense()
    exact = F.linear(clean.double(), dense.double(), bias.double())
    return y, torch.where(sees.any(2).T, torch.nan, exact), F.linear(clean, dense, bias)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "block, dtype", [((16, 16), BF16), ((32, 32), BF16), ((32, 32), F16), ((64, 64), BF16), ((16, 128), BF16)], ids=str
)
def test_what_is_not_finite_reaches_only_rows_that_keep_its_column(block, dtype, value):
    y, exact, dense = poisoned(block, value, dtype)
    assert exact[7, : block[0]].isfinite().all() and not exact[7].isfinite().all()
    assert torch.equal(y.isfinite(), exact.isfinite())
    assert_as_good_as_torch(*(part.nan_to_num(0, 0, 0) for part in (y, exact, dense)))


def test_what_the_kernel_cannot_run_is_refused_with_the_reason():
    def refusal(x=0x1000, m=64, n=64, k=64, row_bytes=128, groups=1, lines=1):
        return cuda_kernels.refusal_sm90(x, m, n, k, row_bytes, cuda_kernels.PackedSm90(32, 32, 4, 8, groups, lines))

    assert refusal() is None
    assert "begin at a multiple of 16 bytes" in refusal(x=0x1002)
    assert "multiple of 16 bytes apart" in refusal(k=33, row_bytes=66)
    assert "column" in refusal(k=0)
    for size in ({"m": 1 << 31}, {"n": 1 << 31}, {"k": 1 << 31}, {"m": 1 << 22, "groups": 1 << 17}, {"lines": 1 << 27}):
        assert refusal(**size) == "a size that int32 cannot number"


@pytest.mark.parametrize("m", [1, 9, 64])
@pytest.mark.parametrize("block", [(16, 16), (32, 32), (64, 64), (128, 16), (16, 128)], ids=str)
def test_few_tokens_run_the_other_kernel_on_the_same_weights(m, block):
    _, counts, _ = check((m, 300, 500, *block, 0.4), BF16, tokens=None)
    assert counts.kinds["wgmma"] == 0 and counts.kinds["mma"] > 0


@pytest.mark.parametrize("m", [9, 40])
def test_few_tokens_give_the_same_bits_every_time(m):
    packed, x, bias, _ = make_problem(m, 300, 500, 64, 32, 0.4, BF16)
    x, modes = cuda_kernels.aligned(x), ("late", *ptx_emulator.MODES)
    first, *others = (run(x, packed, bias, activation="gelu", tokens=None, mode=mode)[0] for mode in modes)
    assert first.isfinite().all() and all(torch.equal(first, y) for y in others)


def test_tiles_fill_the_gpu():
    """Tiles of 256 rows of x where they leave no multiprocessors idle, else of 128; no more clusters than tiles."""
    weight = cuda_kernels.PackedSm90(32, 32, 4, 0, 8, 8)  # 4096 outputs
    chosen = [cuda_kernels.launch_sm90(m, 4096, weight)[2] for m in (65, 256, 512, 1024, 4096)]
    assert [launch.tokens for launch in chosen] == [128, 128, 128, 256, 256]
    assert [launch.turns for launch in chosen] == [8, 16, 32, 32, 128]


# (M, K, N), blocksize, density, kind of bound, the least that the design promises: docs/gpu-performance.md.
PROMISED = [
    ((4096, 4096, 4096), (16, 16), 0.2, "e_bound", 0.35),
    ((4096, 4096, 4096), (32, 32), 0.2, "e_bound", 0.53),
    ((4096, 4096, 4096), (64, 64), 0.2, "e_bound", 0.76),
    ((4096, 4096, 4096), (128, 128), 0.2, "e_bound", 0.94),
    ((16, 4096, 4096), (32, 32), 0.1, "speedup_bound", 9.0),
]


@pytest.mark.parametrize("promised", PROMISED, ids=str)
def test_bounds_are_those_promised(promised, monkeypatch):
    """Of both kernels that read the layout for Hopper, and no other layout."""
    pytest.importorskip("triton", reason="Triton, which bench gpu-bounds compares with, is not installed")
    from sparse_prune_kernels import cuda

    from sparse_prune import gpu_bounds

    monkeypatch.delattr(cuda, "make_layout")
    problem, block, density, kind, least = promised
    row = gpu_bounds.cuda_row(90, problem[0], gpu_bounds.weight_of(problem, block, density))
    assert row[kind] >= least, row
    if problem[0] <= 64:
        assert row["bytes_ratio"] <= 1.05 and row["limit"] == "DRAM"


# ---- what ptxas makes of it ----

KERNELS = [
    f"bsr_linear_sm90_{dtype}_{tokens}_{step}"
    for dtype in ("bf16", "f16")
    for tokens in (128, 256)
    for step in ("16x1", "16x4", "32x1", "64x1")
]
QUICK = ("bsr_linear_sm90_bf16_128_16x4", "bsr_linear_sm90_f16_128_64x1")


@pytest.mark.parametrize("name", [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in KERNELS])
def test_cubin(name, tmp_path):
    """No spills, two warpgroups' registers, and in the machine code what the design asks for."""
    tools = pytest.importorskip("triton.backends.nvidia.compiler").__file__
    tokens, line, lines = (int(part) for part in re.split("[_x]", name)[-3:])
    text, cubin = tmp_path / "kernel.ptx", tmp_path / "kernel.cubin"
    text.write_text(cuda_kernels.ptx("kernels_sm90.cu", "sm_90a"))
    ptxas = [cuda_kernels.nvcc(), "-arch=sm_90a", "-cubin", f"-Xptxas=-v,-e,{name}", str(text), "-o", str(cubin)]
    done = subprocess.run(ptxas, capture_output=True, text=True)
    report = done.stdout + done.stderr
    assert done.returncode == 0, report
    assert re.search(rf"Compiling entry function '{name}'", report)
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report
    assert "C7510" not in report and "serialized" not in report, report
    # Of 65536: 168 for each of 384 threads when they start; then 72 for those that load and 216 for those that multiply.
    assert int(re.search(r"Used (\d+) registers", report)[1]) == 168 and 128 * 72 + 256 * 216 <= 384 * 168
    weight = cuda_kernels.PackedSm90(64 if lines > 1 else 16, line, 4, 0, 1, 1)
    launch = cuda_kernels.launch_sm90(1, 16, weight, tokens)[2]
    assert (launch.line, launch.lines, launch.threads) == (line, lines, 384) and launch.shared_bytes <= 227 * 1024
    disassemble = [str(Path(tools).with_name("bin") / "cuobjdump"), "-sass", "-fun", name, str(cubin)]
    sass = subprocess.run(disassemble, capture_output=True, text=True, check=True).stdout
    products = re.findall(rf"HGMMA\.64x{tokens}x16\.F32(?:\.BF16)? (R\d+), (R\d+), gdesc\[\w+\], R\d+(, gsb0)?", sass)
    # Two steps in turn, with fragments of their own; as many lines as have a block. Nothing waits between products of a step.
    depth = line * lines // 16
    groups = range(1, 5) if lines > 1 else [depth]
    assert [bool(waits) for *_, waits in products] == [place == of - 1 for of in groups for place in range(of)] * 2
    assert len({a for _, a, _ in products}) == 2 * depth and len({d for d, _, _ in products}) == 1
    assert "UTMALDG.2D.MULTICAST" in sass and "UBLKCP" in sass and "USETMAXREG" in sass and "MOVM" in sass
    assert not re.search(r"\b(STL|LDL)\b", sass)
    assert len(re.findall(r"\bHMMA\b", sass)) == 1  # of sums that are made again


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
        if not matches:  # no AssertionError, which a test may take for the bug
            raise LookupError(pattern)
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


# ---- bugs planted in the source ----

ONE = (
    (
        "kernels_sm90.cu",
        "KERNELS(bf16, __nv_bfloat16)\nKERNELS(f16, __half)\n",
        "KERNEL(bf16, __nv_bfloat16, 128, 32, 1)\n",
    ),
    ("kernels_sm90.cu", "{ENTRIES(bf16, true) ENTRIES(f16, false)}", "{ENTRY(bf16, true, 128, 32, 1)}"),
)


def test_rows_beyond_the_last_one_of_x_would_be_written():
    problem = (140, 264, 640, 32, 32, 0.3)
    check(problem, BF16, tokens=128, patch=ONE)
    bug = (
        "bsr_linear_sm90.cuh",
        "const bool inside = token + int(threadIdx.x) % 32 / 4 < a.m;",
        "const bool inside = true;",
    )
    with pytest.raises(EmulationError, match="in no tensor"):
        check(problem, BF16, tokens=128, patch=(*ONE, bug))


def test_without_the_second_sums_what_is_not_finite_would_spread():
    y, exact, _ = poisoned(
        (32, 32), torch.nan, patch=(*ONE, ("bsr_linear_sm90.cuh", "if (a.block_rows < 64) {", "if (false) {"))
    )
    assert not torch.equal(y.isfinite(), exact.isfinite())
