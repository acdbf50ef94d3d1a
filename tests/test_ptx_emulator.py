"""The PTX emulator on itself: kernels that Triton compiled, against float64, and mistakes that it must report."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from pathlib import Path

import ptx_emulator
import pytest
import torch
from ptx_emulator import EmulationError, Program, TensorMap, emulate
from triton_problems import TRITON, needs_triton

pytestmark = pytest.mark.skipif(ptx_emulator.unavailable() is not None, reason=str(ptx_emulator.unavailable()))


def kernel(body: str, params: int = 2, registers: str = "", target: int = 80, shared: int = 0) -> str:
    """A kernel `k` of pointers p0, p1, ... around a body; %tid.x is in %r0, the pointers in %rd0, %rd1, ..."""
    loads = "\n".join(f"ld.param.u64 %rd{i}, [p{i}];" for i in range(params))
    declared = f".shared .align 1024 .b8 smem[{shared}];" if shared else ""
    return f"""
.version 8.8
.target sm_{target}{"a" if target == 90 else ""}
.address_size 64
.visible .entry k({", ".join(f".param .u64 p{i}" for i in range(params))})
{{
.reg .pred %p<16>; .reg .b16 %rs<64>; .reg .b32 %r<512>; .reg .b32 %f<256>; .reg .b64 %rd<64>; {registers} {declared}
{loads}
mov.u32 %r0, %tid.x;
{body}
ret;
}}
"""


# ---- whole kernels ----


POINTERS = {"a": "*{0}", "b": "*{0}", "c": "*{1}", "M": "i32", "N": "i32", "K": "i32"}
TYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "i8": torch.int8,
    "fp8e4nv": torch.float8_e4m3fn,
    "i32": torch.int32,
}


@functools.cache
def matmul_ptx(capability: int, operand: str, result: str, block: tuple[int, int, int], warps: int):
    import ptx_test_kernels as kernels

    signature = {name: kind.format(operand, result) for name, kind in POINTERS.items()}
    return kernels.compiled(
        kernels.matmul, signature, dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), block, strict=True)), capability, warps
    )


def numbers(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(-100, 100, shape).to(dtype) if dtype == torch.int8 else torch.randn(shape).to(dtype)


def run_matmul(made, capability, operand, result, block, warps, mode="late", shape=(112, 48, 192), **options):
    """c, what it should be, how far rounding may take it from there, and the counts."""
    ptx, shared = made
    m, n, k = shape
    a, b = numbers(m, k, dtype=TYPES[operand]), numbers(n, k, dtype=TYPES[operand])
    c = torch.full((m, n), 77).to(TYPES[result]) if result == "i32" else torch.full((m, n), torch.nan).to(TYPES[result])
    grid = -(-m // block[0]), -(-n // block[1])
    counts = emulate(ptx, "matmul", grid, 32 * warps, [a, b, c, m, n, k], shared_bytes=shared, mode=mode, **options)
    exact, size = a.double() @ b.double().T, a.double().abs() @ b.double().abs().T
    # Rounding to the result's type, and the sum in float32; tf32 operands are cut to eleven digits.
    digits = {"fp16": 11, "bf16": 8, "fp32": 24, "i32": 60}[result]
    allowed = exact.abs() * 2.0**-digits + size * {"i8": 0.0, "fp32": 2.0**-9}.get(operand, 2.0**-22)
    return c.double(), exact, allowed, counts


MATMULS = [  # capability, operands, result, block, warps, the tensor-core instruction that must run
    (80, "fp16", "fp16", (64, 32, 32), 4, "mma"),
    (80, "bf16", "bf16", (16, 64, 64), 4, "mma"),
    (80, "fp32", "fp32", (32, 32, 32), 4, "mma"),
    (80, "i8", "i32", (32, 64, 64), 4, "mma"),
    (90, "bf16", "bf16", (128, 128, 64), 8, "wgmma"),
    (90, "fp16", "fp32", (64, 64, 32), 4, "wgmma"),
    (90, "fp32", "fp32", (64, 32, 32), 4, "wgmma"),
    (90, "i8", "i32", (64, 64, 64), 4, "wgmma"),
    (90, "fp8e4nv", "fp32", (64, 64, 64), 4, "wgmma"),
    (90, "bf16", "bf16", (16, 64, 64), 4, "mma"),
    (120, "bf16", "bf16", (64, 64, 32), 4, "mma"),
    (120, "fp8e4nv", "fp32", (64, 64, 64), 4, "mma"),
]


@needs_triton
@pytest.mark.parametrize("mode", ptx_emulator.MODES)
@pytest.mark.parametrize("case", MATMULS, ids=lambda c: "-".join(map(str, c[:4])))
def test_triton_matmul_matches_float64(case, mode):
    *case, instruction = case
    got, exact, allowed, counts = run_matmul(matmul_ptx(*case), *case, mode=mode)
    assert ((got - exact).abs() <= allowed).all()
    assert counts.kinds[instruction] > 0
    block, (m, n, k) = case[3], (112, 48, 192)
    assert counts.tensor_fma == -(-m // block[0]) * block[0] * -(-n // block[1]) * block[1] * k


@functools.cache
def tma_ptx():
    import ptx_test_kernels as kernels

    described = {"a": "tensordesc<bf16[128,64]>", "b": "tensordesc<bf16[64,64]>", "c": "tensordesc<bf16[128,64]>"}
    signature = described | {"M": "i32", "N": "i32", "K": "i32"}
    return kernels.compiled(kernels.matmul_tma, signature, {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64}, 90)


def run_tma(made, mode="late", seed=0):
    """As run_matmul, for a problem whose edges no box meets."""
    ptx, shared = made
    m, n, k = 240, 112, 272
    a, b, c = (
        numbers(m, k, dtype=torch.bfloat16),
        numbers(n, k, dtype=torch.bfloat16),
        torch.full((m, n), torch.nan).bfloat16(),
    )
    args = []
    for x, box in (
        (a, (64, 128)),
        (b, (64, 64)),
        (c, (64, 128)),
    ):  # Triton passes a descriptor as map, shape and strides
        args += [TensorMap(x, box, swizzle=128), *x.shape, *x.stride()]
    counts = emulate(ptx, "matmul_tma", (2, 2), 128, [*args, m, n, k], shared_bytes=shared, mode=mode, seed=seed)
    exact = a.double() @ b.double().T
    return c.double(), exact, exact.abs() * 2.0**-8 + 2.0**-12, counts


@needs_triton
@pytest.mark.parametrize("mode", ptx_emulator.MODES)
def test_triton_matmul_through_tensor_maps(mode):
    got, exact, allowed, counts = run_tma(tma_ptx(), mode)
    assert ((got - exact).abs() <= allowed).all()
    assert (
        counts.kinds["wgmma"]
        and counts.kinds["copy_bulk"]
        and counts.kinds["mbarrier"]
        and not counts.kinds["copy_async"]
    )


@needs_triton
@pytest.mark.parametrize("mode", ptx_emulator.MODES)
@pytest.mark.parametrize("capability", [90, 120])
def test_triton_warp_specialised_matmul(capability, mode):
    """Producer and consumer warps, named barriers, mbarriers, setmaxnreg, tensor maps made on the device, tile after tile."""
    import ptx_test_kernels as kernels

    signature = {"a": "*bf16", "b": "*bf16", "c": "*bf16", "M": "i32", "N": "i32", "K": "i32"}
    constants = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64}
    ptx, shared = kernels.compiled(kernels.matmul_persistent, signature, constants, capability)
    m, n, k = 240, 112, 400
    a, b, c = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16(), torch.full((m, n), torch.nan).bfloat16()
    program, scratch = Program(ptx), torch.zeros(2048, dtype=torch.uint8)
    arguments = (2, program.required_threads, [a, b, c, m, n, k, scratch])
    if capability == 90 and TRITON < (
        3,
        8,
    ):  # it initialises mbarriers that it has not used yet again: PTX leaves that undefined
        with pytest.raises(EmulationError, match="is initialised again without mbarrier.inval"):
            program.launch(*arguments, shared_bytes=shared, mode=mode)
        return
    counts = program.launch(*arguments, shared_bytes=shared, mode=mode)
    exact = a.double() @ b.double().T
    assert ((c.double() - exact).abs() <= exact.abs() * 2.0**-8 + 2.0**-12).all()
    assert program.required_threads[0] > 128 and counts.kinds["copy_bulk"] and counts.kinds["mbarrier"]


@needs_triton
@pytest.mark.parametrize("mode", ptx_emulator.MODES)
@pytest.mark.parametrize("capability", [80, 90, 120])
def test_triton_reductions(capability, mode):
    import ptx_test_kernels as kernels

    ptx, shared = kernels.compiled(
        kernels.softmax_and_sums, {"x": "*fp32", "y": "*fp32", "sums": "*fp32", "N": "i32"}, {"BLOCK": 512}, capability
    )
    x, y, sums = torch.randn(3, 432), torch.full((3, 432), torch.nan), torch.zeros(432)
    emulate(ptx, "softmax_and_sums", 3, 128, [x, y, sums, 432], shared_bytes=shared, mode=mode)
    assert (y - x.softmax(1)).abs().max() < 1e-7 and (sums - x.softmax(1).sum(0)).abs().max() < 1e-6


@functools.cache
def nvcc_ptx(arch: str, *options: str) -> str:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    source = Path(__file__).with_name("ptx_test_kernels.cu")
    command = [nvcc, "-O3", "-std=c++17", f"-arch={arch}", *options, "-ptx", str(source), "-o", "-"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("mode", ptx_emulator.MODES)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_nvcc(arch, mode):
    ptx = nvcc_ptx(arch)
    x, sums, order = torch.randn(3, 300), torch.zeros(3), torch.zeros(4, dtype=torch.int32)
    emulate(ptx, "row_sums", 3, 128, [x, sums, order, 3, 300], mode=mode)
    assert (sums - x.sum(1)).abs().max() < 1e-4 and sorted(order[:3].tolist()) == [0, 1, 2] and order[3] == 3

    x, y = torch.randn(500).bfloat16(), torch.zeros(500).bfloat16()
    emulate(ptx, "functions_bf16", 2, 128, [x, y, 500], mode=mode)
    a, b = x.double().view(-1, 2).unbind(1)
    a = 0.5 * a * (1 + torch.erf(a * 0.5**0.5))
    expected = torch.stack([a, b * torch.tanh(b) + torch.exp(a) - torch.log(1 + a * a) + torch.sin(b)], 1).view(-1)
    assert ((y.double() - expected).abs() <= 2.0**-8 * expected.abs() + 1e-5).all()

    a, b, c = torch.randn(64, 64).half(), torch.randn(64, 64).half(), torch.full((64, 64), torch.nan)
    emulate(ptx, "matmul_tile", (4, 8), 32, [a, b, c, 64], mode=mode)
    assert (c.double() - a.double() @ b.double().T).abs().max() < 1e-4


@pytest.mark.parametrize("mode", ptx_emulator.MODES)
def test_lanes_of_a_warp_are_not_in_order_by_themselves(mode):
    """cp.async.wait_group orders a lane with its own copies only: what other lanes copied needs __syncwarp."""
    a = torch.randn(64, 64).half()
    with pytest.raises(
        EmulationError, match=r"ldmatrix.*race in shared memory: a read .* by warp 0, lane \d+ are not ordered"
    ):
        emulate(nvcc_ptx("sm_80", "-DNO_SYNC"), "matmul_tile", (4, 8), 32, [a, a, torch.zeros(64, 64), 64], mode=mode)


# ---- bugs planted in real kernels: an error, or a wrong result ----


def replaced(pattern: str, by, which: int | None = 0):
    """An edit of the text: match number `which` of the pattern (None: all) becomes `by`."""

    def edit(ptx: str) -> str:
        matches = list(re.finditer(pattern, ptx))
        assert matches, pattern
        for match in reversed(matches if which is None else [matches[which]]):
            ptx = ptx[: match.start()] + (by(match) if callable(by) else match.expand(by)) + ptx[match.end() :]
        return ptx

    return edit


def in_main_loop(pattern: str, by: str, around: str):
    """All matches in the loop that holds the first `around`."""

    def edit(ptx: str) -> str:
        middle = ptx.index(around)
        start = ptx.rindex("$L__BB", 0, middle)
        end = re.search(r"bra\s+\$L__BB0_2;", ptx[middle:]).end() + middle
        return ptx[:start] + re.sub(pattern, by, ptx[start:end]) + ptx[end:]

    return edit


def number(match: re.Match, change) -> str:
    at, end = match.start(1) - match.start(), match.end(1) - match.start()
    return match[0][:at] + str(change(int(match[1]))) + match[0][end:]


WRONG = None  # not an error, but a wrong result
AMPERE = (80, "fp16", "fp16", (64, 32, 32), 4)
WAIT_GROUP, RING = r"cp\.async\.wait_group\s+(\d+);", r"selp\.b32\s+(%r\d+), 0, (%r\d+), %p\d+;"
EXPECT, INIT = r"expect_tx\S* _, \[%r\d+\], (\d+);", r"mbarrier\.init\S* \[%r\d+\], 1;"
# Its last match: Triton before 3.9 has a barrier in front of the loop too.
REFILL = r"bar\.sync\s+0;(?=(?:(?!bar\.sync|ldmatrix)[\s\S])*cp\.async\.cg)"
ZERO_FILL = r"selp\.b32\s+(%r\d+), 16, 0, %p\d+;"
PLANTED_80 = {
    "wait_group one too weak": (
        replaced(WAIT_GROUP, lambda m: number(m, lambda n: n + 1), None),
        "may still be under way",
    ),
    "no barrier before reading": (
        replaced(r"(wait_group\s+\d+;[^;]*)bar\.sync\s+0;", r"\1"),
        r"ldmatrix.*a read .* (not ordered|may still be under way)",
    ),
    "no barrier before refilling a stage": (replaced(REFILL, "", -1), r"cp\.async.*race"),
    "commit dropped": (replaced(r"cp\.async\.commit_group;", "", 1), "may still be under way"),
    "reads one stage for ever": (replaced(RING, r"mov.b32 \1, \2;"), "race|outside"),
    "fills one stage for ever": (replaced(RING, r"mov.b32 \1, 0;", 1), "race"),
    "store without its predicate": (replaced(r"@%p\d+ (st\.global)", r"\1", None), r"st\.global.*in no tensor"),
    "load without zero fill": (replaced(ZERO_FILL, r"mov.b32 \1, 16;", None), r"cp\.async.*in no tensor"),
    "operands of mma exchanged": (replaced(r"(mma\.sync\.\S+ \{[^}]*\}, \{ )(%r\d+), (%r\d+)", r"\1\3, \2"), WRONG),
    "swizzle dropped": (replaced(r"xor\.b32\s+(%r\d+), (%r\d+), \d+;", r"mov.b32 \1, \2;"), WRONG),
}
LAST_BARRIER = r"bar\.sync\s+0;(?=(?:(?!bar\.sync)[\s\S])*bulk\.tensor\.2d\.global)"
LOAD = r"@%p\d+ (cp\.async\.bulk\.tensor\S*shared::cta\.global)"
PARITY = r"try_wait\S* complete, \[%r\d+\], (%r\d+);"
WGMMA_WAIT = r"wgmma\.wait_group\S*\s+(\d);"
PLANTED_90 = {
    "expect_tx halved": (replaced(EXPECT, lambda m: number(m, lambda n: n // 2), None), "deadlock|under way"),
    "expect_tx doubled": (replaced(EXPECT, lambda m: number(m, lambda n: 2 * n)), "deadlock"),
    "two arrivals for one": (replaced(INIT, lambda m: m[0].replace(", 1;", ", 2;")), "deadlock"),
    "wrong parity": (replaced(PARITY, lambda m: m[0].replace(m[1], "1")), "under way|deadlock"),
    "does not wait for a copy": (replaced(r"@!complete bra\.uni waitLoop;", ""), "under way|not ordered"),
    "no barrier before refilling a stage": (in_main_loop(r"bar\.sync\s+0;", "", "wgmma.mma_async"), "race"),
    "wgmma wait too weak": (replaced(WGMMA_WAIT, lambda m: number(m, lambda n: n + 1)), "may still be under way"),
    "result read too early": (replaced(r"wgmma\.wait_group\S*\s+0;", ""), "no wgmma.wait_group covers it"),
    "no wgmma.fence": (replaced(r"wgmma\.fence\S*;", ""), "no wgmma.fence"),
    "descriptor with another swizzle": (replaced("4611686293305294848", "9223372105574252544"), WRONG),
    "no fence.proxy.async": (replaced(r"fence\.proxy\.async\S*;", ""), "no fence.proxy.async lies between"),
    "no barrier before the store": (replaced(LAST_BARRIER, "", -1), "race"),
    "block ends before its store": (
        replaced(r"cp\.async\.bulk\.wait_group\S*\s+0;", ""),
        "no cp.async.bulk.wait_group",
    ),
    "every lane issues the copy": (replaced(LOAD, r"\1"), "race"),
}
HARMLESS = {("does not wait for a copy", "early")}  # there the first try_wait succeeds, and that is all it takes


def check_planted(run, message):
    if message is WRONG:
        got, exact, allowed, _ = run()
        assert not ((got - exact).abs() <= allowed).all()
    else:
        with pytest.raises(EmulationError, match=message):
            run()


@needs_triton
@pytest.mark.parametrize("mode", ptx_emulator.MODES)
@pytest.mark.parametrize("bug", PLANTED_80)
def test_planted_bug_sm_80(bug, mode):
    edit, message = PLANTED_80[bug]
    ptx, shared = matmul_ptx(*AMPERE)
    check_planted(lambda: run_matmul((edit(ptx), shared), *AMPERE, mode=mode), message)


@needs_triton
@pytest.mark.parametrize("mode", ptx_emulator.MODES)
@pytest.mark.parametrize("bug", PLANTED_90)
def test_planted_bug_sm_90(bug, mode):
    edit, message = PLANTED_90[bug]
    ptx, shared = tma_ptx()

    def run():
        for seed in range(8 if mode == "random" else 1):  # a copy that nobody waits for may be there in time by chance
            result = run_tma((edit(ptx), shared), mode, seed)
        return result

    if (bug, mode) in HARMLESS:
        run()
    else:
        check_planted(run, message)


# ---- mistakes ----


def test_out_of_bounds_read_names_line_and_argument():
    ptx = kernel("mad.wide.u32 %rd2, %r0, 4, %rd0;\nld.global.b32 %r1, [%rd2];\nst.global.b32 [%rd1], %r1;")
    line = line_of(ptx, "ld.global")
    with pytest.raises(
        EmulationError, match=rf"^line {line}: `ld\.global.*0 bytes after the end of args\[0\] \(124 bytes\).*lane 31\]"
    ):
        emulate(ptx, "k", 1, 32, [torch.zeros(31), torch.zeros(32)])


def test_bytes_between_rows_belong_to_nobody():
    x = torch.zeros(4, 16)[:, :8]
    ptx = kernel("mad.wide.u32 %rd2, %r0, 4, %rd0;\nld.global.b32 %r1, [%rd2];\nst.global.b32 [%rd1], %r1;")
    emulate(ptx, "k", 1, 8, [x, torch.zeros(8)])
    with pytest.raises(EmulationError, match="between the elements"):
        emulate(ptx, "k", 1, 9, [x, torch.zeros(8)])


def test_misaligned():
    with pytest.raises(EmulationError, match="no multiple of 8"):
        emulate(kernel("ld.global.v2.b32 {%r1, %r2}, [%rd0+4];"), "k", 1, 32, [torch.zeros(32), torch.zeros(32)])


def line_of(ptx: str, instruction: str) -> int:
    return next(k for k, text in enumerate(ptx.splitlines(), 1) if instruction in text)


def test_what_nobody_wrote_is_nan():
    """Registers, shared and local memory, as numbers of every width."""
    body = """mov.u32 %r1, smem; mad.lo.u32 %r1, %r0, 16, %r1; ld.shared.v4.b32 {%r3, %r4, %r5, %r6}, [%r1];
ld.local.b32 %r7, [depot]; mad.wide.u32 %rd10, %r0, 32, %rd0;
st.global.v4.b32 [%rd10], {%r3, %r4, %r5, %r6}; st.global.v4.b32 [%rd10+16], {%r100, %f3, %r7, %r7};"""
    x = torch.zeros(32, 8)
    emulate(kernel(body, 1, ".local .align 4 .b8 depot[4];", shared=512), "k", 1, 32, [x])
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2):
        assert x.view(dtype).isnan().all()


@pytest.mark.parametrize(
    "access, message",
    [
        (
            "ld.shared.b32 %r2, [%r1+388];",
            r"shared access of 4 bytes at 512, outside the 512 bytes from 0 on.*lane 31\]",
        ),
        ("st.shared.v2.b32 [%r1+400], {%r2, %r3};", r"shared address 404 is no multiple of 8.*lane 1\]"),
        ("atom.shared.add.u32 %r2, [%r1+400], 1;", r"shared access of 4 bytes at 512, outside"),
        ("cp.async.ca.shared.global [%r1+508], [%rd0], 8;", r"shared access of 8 bytes at 508, outside"),
        ("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r2}, [%r1+512];", r"shared access of 16 bytes at 512, outside"),
        ("ld.shared.v4.b32 {%r2, %r3, %r4, %r5}, [%r1+8];", r"shared address 8 is no multiple of 16.*lane 0\]"),
        ("st.shared.b32 [%r1+2], %r2;", r"shared address 2 is no multiple of 4"),
        ("red.shared.add.u64 [%r1], %rd3;", r"shared address 4 is no multiple of 8.*lane 1\]"),
        ("cp.async.ca.shared.global [%r1], [%rd0], 8;", r"shared address 4 is no multiple of 8.*lane 1\]"),
    ],
)
def test_shared_memory_out_of_bounds_or_misaligned(access, message):
    """Lane l is 4 l bytes into 512: the error names the line, its text, and the lane that goes wrong first."""
    ptx = kernel(
        f"mov.u32 %r1, smem; mad.lo.u32 %r1, %r0, 4, %r1; mov.u64 %rd3, 1; mov.u32 %r2, 0;\n{access}", shared=512
    )
    with pytest.raises(EmulationError, match=rf"^line {line_of(ptx, access)}: `{re.escape(access[:-1])}`: {message}"):
        emulate(ptx, "k", 1, 32, [torch.zeros(32), torch.zeros(32)])


POOL = """setp.lt.u32 %p0, %r0, 128; @%p0 bra A;
setmaxnreg.inc.sync.aligned.u32 {more}; bra E;
A: setmaxnreg.dec.sync.aligned.u32 {less};
E: mov.u32 %r1, 0;"""


@pytest.mark.parametrize("mode", ptx_emulator.MODES)
@pytest.mark.parametrize(
    "bounds, less, more, message",
    [
        (".maxntid 384, 1, 1 .minnctapersm 1", 24, 240, None),  # 168 a thread: 128 threads leave 144, 256 take 72 each
        (".maxntid 384 .minnctapersm 1", 32, 240, r"deadlock: no warp can go on.*is at line"),
        (".reqntid 384 .maxnreg 128", 24, 184, r"deadlock"),  # 104 left, 2 x 56 wanted
        (".reqntid 384 .maxnreg 128", 24, 176, None),
        (".maxntid 192, 2 .minnctapersm 2", 24, 104, None),  # 80 a thread
        (".maxntid 192, 2 .minnctapersm 2", 24, 112, r"deadlock"),
        (".maxntid 384", 176, 240, r"setmaxnreg\.dec.*a thread has 168 registers already"),
        (".maxntid 384", 24, 160, r"setmaxnreg\.inc.*a thread has 168 registers already"),
        ("", 24, 240, r"setmaxnreg.*neither .maxnreg nor .maxntid"),
    ],
)
def test_pool_of_registers(bounds, less, more, message, mode):
    """One warp group gives registers back, two take what it left; who asks for more waits for ever."""
    ptx = kernel(POOL.format(less=less, more=more), target=90).replace("\n{\n", f"\n{bounds}\n{{\n")
    if message is None:
        emulate(ptx, "k", 1, 384, [torch.zeros(1), torch.zeros(1)], mode=mode)
    else:
        with pytest.raises(EmulationError, match=message):
            emulate(ptx, "k", 1, 384, [torch.zeros(1), torch.zeros(1)], mode=mode)


def test_divergent_barrier():
    body = "setp.lt.u32 %p0, %r0, 7;\n@%p0 bra L;\nbar.sync 0;\nL:\nmov.u32 %r1, 0;"
    with pytest.raises(EmulationError, match=r"bar\.sync.*divergent"):
        emulate(kernel(body), "k", 1, 64, [torch.zeros(1), torch.zeros(1)])


def test_deadlock():
    body = "setp.lt.u32 %p0, %r0, 32;\n@%p0 bra L;\nbar.sync 0;\nL:\nmov.u32 %r1, 0;"
    with pytest.raises(EmulationError, match=r"deadlock.*warp 0 has exited; warp 1 waits at barrier 0"):
        emulate(kernel(body), "k", 1, 64, [torch.zeros(1), torch.zeros(1)])


def test_unknown_instruction():
    with pytest.raises(EmulationError, match=r"line \d+: unknown instruction: `frob\.b32"):
        emulate(kernel("frob.b32 %r1, %r2;"), "k", 1, 32, [torch.zeros(1), torch.zeros(1)])
    with pytest.raises(EmulationError, match="unknown modifier .wobble"):
        emulate(kernel("add.wobble.s32 %r1, %r2, %r3;"), "k", 1, 32, [torch.zeros(1), torch.zeros(1)])
