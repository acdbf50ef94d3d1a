"""Each instruction family of the PTX emulator against a definition written from the PTX ISA document, in exact arithmetic."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import numpy as np
import ptx_emulator
import pytest
import torch
from ptx_emulator import EmulationError, TensorMap, emulate

pytestmark = pytest.mark.skipif(ptx_emulator.unavailable() is not None, reason=str(ptx_emulator.unavailable()))

MASK = {w: (1 << w) - 1 for w in (8, 16, 32, 64)}
NUMPY = {16: np.uint16, 32: np.uint32, 64: np.uint64}


def kernel(body: str, params: int, target: str = "90a", shared: int = 0) -> str:
    """A kernel `k` of pointers p0, p1, ... (in %rd0, %rd1, ...) around a body; %tid.x is in %r0."""
    loads = "\n".join(f"ld.param.u64 %rd{i}, [p{i}];" for i in range(params))
    declared = f".shared .align 1024 .b8 smem[{shared}];" if shared else ""
    return f"""
.version 8.8
.target sm_{target}
.address_size 64
.visible .entry k({", ".join(f".param .u64 p{i}" for i in range(params))})
{{
.reg .pred %p<16>; .reg .b16 %rs<64>; .reg .b32 %r<512>; .reg .b64 %rd<64>; {declared}
{loads}
mov.u32 %r0, %tid.x;
{body}
ret;
}}
"""


REGISTER = {16: "%rs", 32: "%r", 64: "%rd"}


def per_thread(instruction: str, sources: list[tuple[int, list[int]]], width: int, before: str = "") -> list[int]:
    """Runs one instruction, with $d, $a, $b, $c for its operands, in as many threads as there are values. Raw bits in and out."""
    n = len(sources[0][1])
    tensors = [torch.from_numpy(np.array(values, NUMPY[w]).view(NUMPY[w])).clone() for w, values in sources]
    out = torch.zeros(n, dtype={16: torch.uint16, 32: torch.uint32, 64: torch.uint64}[width])
    body, names = "", {}
    for k, (w, _) in enumerate(sources):
        name = f"{REGISTER[w]}{10 + k}"
        names["abc"[k]] = name
        body += f"mad.wide.u32 %rd{20 + k}, %r0, {w // 8}, %rd{k};\nld.global.b{w} {name}, [%rd{20 + k}];\n"
    names["d"] = f"{REGISTER[width]}30"
    text = instruction
    for key, name in names.items():
        text = text.replace("$" + key, name)
    body += f"{before}\n{text};\nmad.wide.u32 %rd40, %r0, {width // 8}, %rd{len(sources)};\n"
    body += f"st.global.b{width} [%rd40], {names['d']};"
    emulate(kernel(body, len(sources) + 1), "k", 1, n, [*tensors, out])
    return [int(v) for v in out.numpy()]


def signed(value: int, width: int) -> int:
    return value - (1 << width) if value >> (width - 1) else value


def samples(width: int, count: int = 64, seed: int = 0) -> list[int]:
    rng = random.Random(seed * 1000 + width)
    special = [0, 1, 2, 3, 31, 32, 33, 63, 64, MASK[width], MASK[width] >> 1, (MASK[width] >> 1) + 1, 0x80, 0xFF]
    values = [
        rng.choice(special) if rng.random() < 0.4 else rng.getrandbits(rng.randint(1, width)) for _ in range(count)
    ]
    return [v & MASK[width] for v in values]


# ---- integers ----


def bfe(a: int, b: int, c: int, width: int, is_signed: bool) -> int:
    msb, pos, length = width - 1, b & 0xFF, c & 0xFF
    sbit = 0 if not is_signed or length == 0 else a >> min(pos + length - 1, msb) & 1
    return sum((a >> (pos + i) & 1 if i < length and pos + i <= msb else sbit) << i for i in range(width))


def prmt(a: int, b: int, c: int) -> int:
    data, out = [(b << 32 | a) >> (8 * i) & 0xFF for i in range(8)], 0
    for i in range(4):
        selector = c >> (4 * i) & 0xF
        byte = data[selector & 7]
        out |= (0xFF if byte & 0x80 else 0) << 8 * i if selector & 8 else byte << 8 * i
    return out


def dp4a(a: int, b: int, c: int) -> int:
    return c + sum(signed(a >> s & 255, 8) * signed(b >> s & 255, 8) for s in (0, 8, 16, 24))


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def s(value: int, width: int = 32) -> int:
    return signed(value, width)


INTEGER = [  # instruction, widths of the sources, width of the result, definition on raw bits
    ("add.s32 $d, $a, $b", (32, 32), 32, lambda a, b: a + b),
    ("sub.s32 $d, $a, $b", (32, 32), 32, lambda a, b: a - b),
    ("add.s16 $d, $a, $b", (16, 16), 16, lambda a, b: a + b),
    ("add.s64 $d, $a, $b", (64, 64), 64, lambda a, b: a + b),
    ("mul.lo.s32 $d, $a, $b", (32, 32), 32, lambda a, b: a * b),
    ("mul.lo.s64 $d, $a, $b", (64, 64), 64, lambda a, b: a * b),
    ("mul.hi.s32 $d, $a, $b", (32, 32), 32, lambda a, b: s(a) * s(b) >> 32),
    ("mul.hi.u32 $d, $a, $b", (32, 32), 32, lambda a, b: a * b >> 32),
    ("mul.hi.u64 $d, $a, $b", (64, 64), 64, lambda a, b: a * b >> 64),
    ("mul.wide.s32 $d, $a, $b", (32, 32), 64, lambda a, b: s(a) * s(b)),
    ("mul.wide.u32 $d, $a, $b", (32, 32), 64, lambda a, b: a * b),
    ("mul.wide.u16 $d, $a, $b", (16, 16), 32, lambda a, b: a * b),
    ("mad.lo.s32 $d, $a, $b, $c", (32, 32, 32), 32, lambda a, b, c: a * b + c),
    ("mad.lo.s64 $d, $a, $b, $c", (64, 64, 64), 64, lambda a, b, c: a * b + c),
    ("mad.wide.s32 $d, $a, $b, $c", (32, 32, 64), 64, lambda a, b, c: s(a) * s(b) + c),
    ("mad.wide.u32 $d, $a, $b, $c", (32, 32, 64), 64, lambda a, b, c: a * b + c),
    ("div.s32 $d, $a, $b", (32, 32), 32, lambda a, b: truncated(s(a), s(b)) if b else None),
    ("div.u32 $d, $a, $b", (32, 32), 32, lambda a, b: a // b if b else None),
    ("rem.s32 $d, $a, $b", (32, 32), 32, lambda a, b: s(a) - s(b) * truncated(s(a), s(b)) if b else None),
    ("rem.u64 $d, $a, $b", (64, 64), 64, lambda a, b: a % b if b else None),
    ("min.s32 $d, $a, $b", (32, 32), 32, lambda a, b: min(s(a), s(b))),
    ("max.u32 $d, $a, $b", (32, 32), 32, lambda a, b: max(a, b)),
    ("neg.s32 $d, $a", (32,), 32, lambda a: -a),
    ("abs.s32 $d, $a", (32,), 32, lambda a: abs(s(a))),
    ("and.b32 $d, $a, $b", (32, 32), 32, lambda a, b: a & b),
    ("or.b64 $d, $a, $b", (64, 64), 64, lambda a, b: a | b),
    ("xor.b32 $d, $a, $b", (32, 32), 32, lambda a, b: a ^ b),
    ("not.b32 $d, $a", (32,), 32, lambda a: ~a),
    ("shl.b32 $d, $a, $b", (32, 32), 32, lambda a, b: a << min(b, 32)),
    ("shl.b64 $d, $a, $b", (64, 32), 64, lambda a, b: a << min(b, 64)),
    ("shr.u32 $d, $a, $b", (32, 32), 32, lambda a, b: a >> min(b, 32)),
    ("shr.s32 $d, $a, $b", (32, 32), 32, lambda a, b: s(a) >> min(b, 32)),
    ("shr.s64 $d, $a, $b", (64, 32), 64, lambda a, b: s(a, 64) >> min(b, 64)),
    ("shr.u16 $d, $a, $b", (16, 32), 16, lambda a, b: a >> min(b, 16)),
    ("shf.l.wrap.b32 $d, $a, $b, $c", (32, 32, 32), 32, lambda a, b, c: (b << 32 | a) << (c & 31) >> 32),
    ("shf.r.wrap.b32 $d, $a, $b, $c", (32, 32, 32), 32, lambda a, b, c: (b << 32 | a) >> (c & 31)),
    ("shf.l.clamp.b32 $d, $a, $b, $c", (32, 32, 32), 32, lambda a, b, c: (b << 32 | a) << min(c, 32) >> 32),
    ("shf.r.clamp.b32 $d, $a, $b, $c", (32, 32, 32), 32, lambda a, b, c: (b << 32 | a) >> min(c, 32)),
    ("bfe.u32 $d, $a, $b, $c", (32, 32, 32), 32, lambda a, b, c: bfe(a, b, c, 32, False)),
    ("bfe.s32 $d, $a, $b, $c", (32, 32, 32), 32, lambda a, b, c: bfe(a, b, c, 32, True)),
    ("bfe.u64 $d, $a, $b, $c", (64, 32, 32), 64, lambda a, b, c: bfe(a, b, c, 64, False)),
    ("popc.b32 $d, $a", (32,), 32, lambda a: bin(a).count("1")),
    ("clz.b64 $d, $a", (64,), 32, lambda a: 64 - a.bit_length()),
    ("bfind.shiftamt.u32 $d, $a", (32,), 32, lambda a: 32 - a.bit_length() if a else 0xFFFFFFFF),
    ("brev.b32 $d, $a", (32,), 32, lambda a: int(f"{a:032b}"[::-1], 2)),
    ("prmt.b32 $d, $a, $b, $c", (32, 32, 32), 32, prmt),
    ("lop3.b32 $d, $a, $b, $c, 0xCA", (32, 32, 32), 32, lambda a, b, c: (a & b) | (~a & c)),
    ("lop3.b32 $d, $a, $b, $c, 0x96", (32, 32, 32), 32, lambda a, b, c: a ^ b ^ c),
    ("dp4a.s32.s32 $d, $a, $b, $c", (32, 32, 32), 32, dp4a),
    ("cvt.s64.s32 $d, $a", (32,), 64, lambda a: s(a)),
    ("cvt.u64.u32 $d, $a", (32,), 64, lambda a: a),
    ("cvt.u32.u64 $d, $a", (64,), 32, lambda a: a),
    ("cvt.s32.s8 $d, $a", (32,), 32, lambda a: signed(a & 255, 8)),
    ("cvt.u32.u16 $d, $a", (16,), 32, lambda a: a),
    ("cvt.s16.s8 $d, $a", (16,), 16, lambda a: signed(a & 255, 8)),
    ("cvt.sat.s8.s32 $d, $a", (32,), 32, lambda a: max(-128, min(127, s(a)))),
]


@pytest.mark.parametrize("instruction, widths, width, definition", INTEGER, ids=[c[0].split()[0] for c in INTEGER])
def test_integer(instruction, widths, width, definition):
    sources = [(w, samples(w, seed=k)) for k, w in enumerate(widths)]
    got = per_thread(instruction, sources, width)
    for values, result in zip(zip(*(v for _, v in sources), strict=True), got, strict=True):
        expected = definition(*values)
        if expected is not None:
            assert result == expected & MASK[width], (instruction, [hex(v) for v in values])


@pytest.mark.parametrize("width", [32, 64])
def test_bfi(width):
    """Bits 0 to length - 1 of a, placed from `position` on into b; what would lie past the last bit is left out."""
    sources = [(width, samples(width)), (width, samples(width, seed=1)), (32, samples(32, seed=2))]
    got = per_thread(f"bfi.b{width} $d, $a, $b, $c, %r31", sources, width, before="shr.u32 %r31, %r12, 8;")
    for a, b, c, result in zip(*(values for _, values in sources), got, strict=True):
        expected, position, length = b, c & 255, c >> 8 & 255
        for i in range(length):
            if position + i < width:
                expected = expected & ~(1 << position + i) | (a >> i & 1) << position + i
        assert result == expected, (hex(a), hex(b), position, length)


def test_copysign():
    """The sign of a and the magnitude of b, also of zeros, infinity and NaN."""
    a, b = samples(32, seed=3), [*samples(32, count=60, seed=4), 0, 1 << 31, 0x7F800000, 0xFFC00000]
    got = per_thread("copysign.f32 $d, $a, $b", [(32, a), (32, b)], 32)
    assert got == [x & 0x80000000 | y & 0x7FFFFFFF for x, y in zip(a, b, strict=True)]


# ---- floating point: one exact result, rounded once ----

FORMATS = {
    "f32": (24, -126, 128),
    "f16": (11, -14, 16),
    "bf16": (8, -126, 128),
    "tf32": (11, -126, 128),
    "e4m3": (4, -6, 9),
    "e5m2": (3, -14, 16),
    "f64": (53, -1022, 1024),
}


def rounded(x: Fraction, form: str, mode: str = "rn") -> Fraction:
    """x in the format, of `digits` binary digits and a least exponent."""
    digits, least, _ = FORMATS[form]
    if x == 0:
        return x
    n, d = abs(x).numerator, abs(x).denominator
    e = n.bit_length() - d.bit_length()
    if Fraction(2) ** e > abs(x):
        e -= 1
    quantum = Fraction(2) ** (max(e, least) - digits + 1)
    q = x / quantum
    low = math.floor(q)
    rest = q - low
    if mode == "rn":
        low += rest > Fraction(1, 2) or (rest == Fraction(1, 2) and low % 2 == 1)
    elif mode == "rna":
        low += rest > Fraction(1, 2) or (rest == Fraction(1, 2) and x > 0)
    elif mode == "rz":
        low += x < 0 and rest > 0
    elif mode == "rp":
        low += rest > 0
    return low * quantum


def decode(bits: int, form: str) -> float:
    array = {
        "f16": lambda: torch.tensor([signed(bits, 16)], dtype=torch.int16).view(torch.float16),
        "bf16": lambda: torch.tensor([signed(bits, 16)], dtype=torch.int16).view(torch.bfloat16),
        "e4m3": lambda: torch.tensor([bits], dtype=torch.uint8).view(torch.float8_e4m3fn),
        "e5m2": lambda: torch.tensor([bits], dtype=torch.uint8).view(torch.float8_e5m2),
        "f32": lambda: torch.tensor([signed(bits, 32)], dtype=torch.int32).view(torch.float32),
        "tf32": lambda: torch.tensor([signed(bits, 32)], dtype=torch.int32).view(torch.float32),
        "f64": lambda: torch.tensor([signed(bits, 64)], dtype=torch.int64).view(torch.float64),
    }[form]
    return float(array().double()[0])


def floats(form: str, count: int = 96, seed: int = 0, spread: int = 6) -> list[int]:
    """Raw bits of numbers in the format, subnormals and ties of narrower formats included."""
    rng = random.Random(seed * 77 + len(form))
    width = {"f16": 16, "bf16": 16, "f32": 32, "f64": 64}[form]
    out = []
    for _ in range(count):
        x = (
            rng.choice((-1, 1))
            * rng.choice((rng.random(), 1 + rng.randint(0, 4095) / 4096, 2.0**-20))
            * 2.0 ** rng.randint(-spread, spread)
        )
        t = torch.tensor([x], dtype=torch.float64).to(
            {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64}[form]
        )
        out.append(int(t.view({16: torch.int16, 32: torch.int32, 64: torch.int64}[width])[0]) & MASK[width])
    return out


FLOAT = [(op, form) for op in ("add.{r}", "sub.{r}", "mul.{r}", "fma.rn.") for form in ("f32", "f16", "bf16", "f64")]
EXACT = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "fma": lambda a, b, c: a * b + c,
}


@pytest.mark.parametrize("op, form", FLOAT)
def test_float(op, form):
    name = op.split(".")[0]
    width = {"f16": 16, "bf16": 16, "f32": 32, "f64": 64}[form]
    arity = 3 if name == "fma" else 2
    sources = [(width, floats(form, seed=k)) for k in range(arity)]
    text = op.format(r="" if form in ("f16", "bf16") else "rn.") + form
    got = per_thread(f"{text} $d, {', '.join('$' + c for c in 'abc'[:arity])}", sources, width)
    for values, result in zip(zip(*(v for _, v in sources), strict=True), got, strict=True):
        exact = EXACT[name](*(Fraction(decode(v, form)) for v in values))
        assert decode(result, form) == float(rounded(exact, form)), (text, values)


@pytest.mark.parametrize("narrow", ["f16", "bf16"])
@pytest.mark.parametrize("name", ["add", "sub", "fma"])
def test_float_mixed(name, narrow):
    """What is multiplied, or the first summand, has 16 bits: the ISA's mixed-precision instructions of sm_100 and younger."""
    forms = [narrow] * (2 if name == "fma" else 1) + ["f32"]
    sources = [(32 if form == "f32" else 16, floats(form, seed=k)) for k, form in enumerate(forms)]
    got = per_thread(f"{name}.rn.f32.{narrow} $d, {', '.join('$' + c for c in 'abc'[: len(forms)])}", sources, 32)
    for values, result in zip(zip(*(v for _, v in sources), strict=True), got, strict=True):
        exact = EXACT[name](*(Fraction(decode(v, form)) for v, form in zip(values, forms, strict=True)))
        assert decode(result, "f32") == float(rounded(exact, "f32")), values


CONVERT = [
    (f"cvt.{mode}.{to}.f32", to, mode)
    for to, modes in {"f16": ("rn", "rz"), "bf16": ("rn", "rz"), "tf32": ("rna",)}.items()
    for mode in modes
]


@pytest.mark.parametrize("instruction, to, mode", CONVERT)
def test_convert_from_f32(instruction, to, mode):
    values = floats("f32", spread=16 if to == "f16" else 30)
    width = 32 if to == "tf32" else 16
    for bits, result in zip(values, per_thread(f"{instruction} $d, $a", [(32, values)], width), strict=True):
        expected = float(rounded(Fraction(decode(bits, "f32")), to, mode))
        if abs(expected) >= 2.0 ** FORMATS[to][2]:
            expected = math.copysign(math.inf if mode == "rn" else 65504.0, expected)
        assert decode(result, to) == expected, (instruction, hex(bits))


def test_convert_pairs_put_the_first_source_into_the_upper_half():
    a, b = floats("f32", seed=1), floats("f32", seed=2)
    for to in ("f16", "bf16"):
        got = per_thread(f"cvt.rn.{to}x2.f32 $d, $a, $b", [(32, a), (32, b)], 32)
        for high, low, result in zip(a, b, got, strict=True):
            assert decode(result >> 16, to) == float(rounded(Fraction(decode(high, "f32")), to))
            assert decode(result & 0xFFFF, to) == float(rounded(Fraction(decode(low, "f32")), to))


@pytest.mark.parametrize("form, most", [("e4m3", 448), ("e5m2", 57344)])
def test_convert_8_bit_floats(form, most):
    a, b = floats("f32", seed=1, spread=8), floats("f32", seed=2, spread=18)

    def expected(bits):
        return float(max(Fraction(-most), min(Fraction(most), rounded(Fraction(decode(bits, "f32")), form))))

    got = per_thread(f"cvt.rn.satfinite.{form}x2.f32 $d, $a, $b", [(32, a), (32, b)], 16)
    for high, low, result in zip(a, b, got, strict=True):
        assert (decode(result >> 8, form), decode(result & 255, form)) == (expected(high), expected(low))
    every = list(range(0, 1 << 16, 0x101))
    for bits, result in zip(every, per_thread(f"cvt.rn.f16x2.{form}x2 $d, $a", [(16, every)], 32), strict=True):
        for half, byte in ((result >> 16, bits >> 8), (result & 0xFFFF, bits & 255)):
            x, y = decode(half, "f16"), decode(byte, form)
            assert x == y or (math.isnan(x) and math.isnan(y))


@pytest.mark.parametrize(
    "mode, to_integer", [("rzi", math.trunc), ("rmi", math.floor), ("rpi", math.ceil), ("rni", round)]
)
def test_convert_float_to_integer(mode, to_integer):
    values = [*floats("f32", count=60, spread=34), 0x3F000000, 0x3FC00000, 0xBF000000, 0x7F800000]
    for kind, low, high in (("s32", -(1 << 31), (1 << 31) - 1), ("u32", 0, (1 << 32) - 1)):
        got = per_thread(f"cvt.{mode}.{kind}.f32 $d, $a", [(32, values)], 32)
        for bits, result in zip(values, got, strict=True):
            x = decode(bits, "f32")
            expected = high if math.isinf(x) else max(low, min(high, to_integer(Fraction(x))))
            assert result == expected & MASK[32], (mode, kind, x)


@pytest.mark.parametrize("kind, width", [("s32", 32), ("u32", 32), ("u64", 64), ("s64", 64)])
@pytest.mark.parametrize("to", ["f32", "f16"])
def test_convert_integer_to_float(kind, width, to):
    values = samples(width) if to == "f32" else [v % 4000 for v in samples(width)]
    got = per_thread(f"cvt.rn.{to}.{kind} $d, $a", [(width, values)], 32 if to == "f32" else 16)
    for bits, result in zip(values, got, strict=True):
        x = signed(bits, width) if kind[0] == "s" else bits
        assert decode(result, to) == float(rounded(Fraction(x), to)), (kind, x)


def test_flush_to_zero_and_saturation():
    tiny, one = 0x00000001, 0x3F800000
    assert per_thread("add.f32 $d, $a, $b", [(32, [tiny]), (32, [tiny])], 32) == [2]
    assert per_thread("add.ftz.f32 $d, $a, $b", [(32, [tiny]), (32, [tiny])], 32) == [0]
    assert per_thread("mul.ftz.f32 $d, $a, $b", [(32, [0x80800000]), (32, [0x3F000000])], 32) == [0x80000000]
    assert per_thread("add.sat.f32 $d, $a, $b", [(32, [one, 0xBF800000, 0x7FC00000])] * 2, 32) == [one, 0, 0]


def test_min_max_prefer_numbers_to_nan():
    nan, one = 0x7FC00000, 0x3F800000
    assert per_thread("max.f32 $d, $a, $b", [(32, [nan, one, nan]), (32, [one, nan, nan])], 32)[:2] == [one, one]
    assert per_thread("min.NaN.f32 $d, $a, $b", [(32, [nan]), (32, [one])], 32) == [0x7FC00000]


def test_min_max_of_magnitudes():
    """.xorsign.abs clamps to +-b: the sign is the exclusive or of both, NaN stays NaN."""
    nan, one, two, minus = 0x7FC00000, 0x3F800000, 0x40000000, 0x80000000
    a, b = [two, two | minus, one | minus, one | minus, nan | minus], [one, one, two, two | minus, one]
    arguments = [(32, a), (32, b)]
    assert per_thread("min.xorsign.abs.f32 $d, $a, $b", arguments, 32) == [
        one,
        one | minus,
        one | minus,
        one,
        one | minus,
    ]
    assert per_thread("max.xorsign.abs.f32 $d, $a, $b", arguments, 32)[:4] == [two, two | minus, two | minus, two]
    assert per_thread("max.NaN.xorsign.abs.f32 $d, $a, $b", [(32, [nan]), (32, [one])], 32) == [0x7FC00000]


@pytest.mark.parametrize(
    "name, definition, error",
    [
        ("ex2.approx.f32", lambda x: 2.0**x, 2.0**-22),
        ("lg2.approx.f32", lambda x: math.log2(abs(x)), 2.0**-22),
        ("rcp.approx.f32", lambda x: 1 / x, 2.0**-22),
        ("sqrt.rn.f32", lambda x: math.sqrt(abs(x)), 2.0**-23),
        ("rsqrt.approx.f32", lambda x: 1 / math.sqrt(abs(x)), 2.0**-22),
        ("tanh.approx.f32", math.tanh, 2.0**-10),
    ],
)
def test_functions(name, definition, error):
    values = floats("f32", spread=3)
    if name[:2] in ("lg", "sq", "rs"):
        values = [v & 0x7FFFFFFF for v in values]
    for bits, result in zip(values, per_thread(f"{name} $d, $a", [(32, values)], 32), strict=True):
        expected = definition(decode(bits, "f32"))
        assert abs(decode(result, "f32") - expected) <= error * max(abs(expected), 2.0**-100) + 2.0**-30


COMPARE = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a < b or a > b,
    "lt": lambda a, b: a < b,
    "ge": lambda a, b: a >= b,
    "ltu": lambda a, b: a < b or a != a or b != b,
    "neu": lambda a, b: a != b,
    "num": lambda a, b: a == a and b == b,
    "nan": lambda a, b: a != a or b != b,
}


@pytest.mark.parametrize("comparison", COMPARE)
def test_setp_float(comparison):
    numbers = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 3.5]
    bits = [int(np.float32(x).view(np.uint32)) for x in numbers]
    a, b = [x for x in bits for _ in bits], bits * len(bits)
    got = per_thread("selp.b32 $d, 1, 0, %p1", [(32, a), (32, b)], 32, before=f"setp.{comparison}.f32 %p1, %r10, %r11;")
    pairs = [(x, y) for x in numbers for y in numbers]
    assert got == [int(COMPARE[comparison](x, y)) for x, y in pairs]


def test_setp_combines_and_complements():
    a, b = samples(32, seed=3), samples(32, seed=4)
    before = "setp.ne.b32 %p2, %r11, 0;\nsetp.lt.and.s32 %p1|%p3, %r10, %r11, %p2;\n"
    before += "selp.b32 %r31, 2, 0, %p3;\nselp.b32 %r32, 1, 0, %p1;"
    got = per_thread("or.b32 $d, %r31, %r32", [(32, a), (32, b)], 32, before=before)
    for x, y, result in zip(a, b, got, strict=True):
        less, other = s(x) < s(y), y != 0
        assert result == (less and other) + 2 * (not less and other)


# ---- lanes ----


def shfl(mode: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    """The source lane and the predicate, from the pseudo-code of shfl.sync."""
    bval, cval, mask = b & 0x1F, c & 0x1F, c >> 8 & 0x1F
    most, least = (lane & mask) | (cval & ~mask), lane & mask
    if mode == "up":
        j = lane - bval
        p = j >= most
    elif mode == "down":
        j = lane + bval
        p = j <= most
    elif mode == "bfly":
        j = lane ^ bval
        p = j <= most
    else:
        j = least | (bval & ~mask)
        p = j <= most
    return (j if p else lane), p


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shfl(mode):
    values = [random.Random(5).getrandbits(32) ^ k for k in range(32)]
    for b, c in ((1, 31), (5, 31), (3, 0x1C03), (2, 0x1807), (1, 0), (17, 0)):
        before = f"shfl.sync.{mode}.b32 %r20|%p1, %r10, {b}, {c}, -1;\nselp.b32 %r21, 1, 0, %p1;\nand.b32 %r20, %r20, 0xfffffffe;"
        got = per_thread("or.b32 $d, %r20, %r21", [(32, values)], 32, before=before)
        for lane, result in enumerate(got):
            source, p = shfl(mode, lane, b, c)
            assert result == (values[source] & ~1) | p, (mode, b, c, lane)


def test_votes_and_reductions():
    values = [0, 3] * 8 + [7, 0xFFFFFFF0] * 8
    before = "setp.ne.b32 %p1, %r10, 0;\n"
    assert (
        per_thread("vote.sync.ballot.b32 $d, %p1, -1", [(32, values)], 32, before)
        == [sum((v != 0) << k for k, v in enumerate(values))] * 32
    )
    for kind, expected in (("any", (0, 1, 1)), ("all", (0, 0, 1)), ("uni", (1, 0, 1))):
        for true, of_all in zip(([], [3, 17], range(32)), expected, strict=True):
            lanes = [int(lane in true) for lane in range(32)]
            voted = f"setp.ne.b32 %p1, %r10, 0; vote.sync.{kind}.pred %p2, %p1, -1;"
            assert per_thread("selp.b32 $d, 1, 0, %p2", [(32, lanes)], 32, voted) == [of_all] * 32, (kind, true)
    voted = "mov.b32 $d, 7; setp.eq.u32 %p3, %r10, 0; setp.lt.u32 %p1, %r0, 4; @%p1 bra N;\n"
    voted += "vote.sync.all.pred %p2, %p3, 0xfffffff0; selp.b32 $d, 1, 0, %p2; N: mov.b32 $d, $d"  # of members only
    assert per_thread(voted, [(32, [1] * 4 + [0] * 28)], 32) == [7] * 4 + [1] * 28
    for op, expected in (
        ("add.s32", sum(values) & MASK[32]),
        ("max.s32", 7),
        ("max.u32", 0xFFFFFFF0),
        ("or.b32", 0xFFFFFFF7),
        ("min.u32", 0),
    ):
        assert per_thread(f"redux.sync.{op} $d, $a, -1", [(32, values)], 32) == [expected] * 32
    before = "elect.sync %r20|%p1, -1;"
    assert per_thread("selp.b32 $d, 1, 0, %p1", [(32, values)], 32, before) == [1] + [0] * 31


def test_lanes_of_divergent_paths_meet_again():
    # Every lane loops as often as its number says; then all take part in one shuffle.
    body = """mov.u32 %r1, 0;
L: setp.ge.u32 %p0, %r1, %r10; @%p0 bra D; add.u32 %r1, %r1, 1; bra L;
D: activemask.b32 %r2; shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1;"""
    values = list(range(32))
    assert per_thread("mov.b32 $d, %r3", [(32, values)], 32, body) == [k ^ 1 for k in values]


# ---- matrices ----

BYTES = {"f16": 2, "bf16": 2, "tf32": 4, "s8": 1, "u8": 1, "e4m3": 1, "e5m2": 1}
FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def operand(rows: int, columns: int, form: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random numbers of the format: as float64, and as raw little-endian storage [rows, columns]."""
    g = torch.Generator().manual_seed(seed)
    if form in ("s8", "u8"):
        raw = torch.randint(-128 if form == "s8" else 0, 128, (rows, columns), generator=g).to(
            torch.int8 if form == "s8" else torch.uint8
        )
        return raw.double(), raw
    x = torch.randn(rows, columns, generator=g)
    if form == "tf32":
        x = ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
        return x.double(), x
    raw = x.to({"f16": torch.float16, "bf16": torch.bfloat16, **FLOAT8}[form])
    return raw.double(), raw


def a_place(shape: str, i: int, lane: int) -> tuple[int, int]:
    """Row and column of element i of A, as each figure's text in the PTX ISA gives it."""
    group, t = lane >> 2, lane % 4
    if shape in ("m16n8k4",):  # tf32
        return group + 8 * i, t
    if shape == "m16n8k8.tf32":
        return group + 8 * (i in (1, 3)), t + 4 * (i in (2, 3))
    if shape == "m16n8k8":
        return group + 8 * (i >= 2), 2 * t + (i & 1)
    if shape == "m16n8k16":
        return group + (0 if 0 <= i < 2 or 4 <= i < 6 else 8), 2 * t + (i & 1) + (8 if i >= 4 else 0)
    if shape == "m16n8k16.8bit":
        return group + (0 if i < 4 else 8), 4 * t + (i & 3)
    assert shape == "m16n8k32"
    return group + (0 if 0 <= i < 4 or 8 <= i < 12 else 8), 4 * t + (i & 3) + (16 if i >= 8 else 0)


def b_place(shape: str, i: int, lane: int) -> tuple[int, int]:
    group, t = lane >> 2, lane % 4
    if shape == "m16n8k4":
        return t, group
    if shape == "m16n8k8.tf32":
        return t + 4 * i, group
    if shape == "m16n8k8":
        return 2 * t + i, group
    if shape == "m16n8k16":
        return 2 * t + (i & 1) + (8 if i >= 2 else 0), group
    if shape == "m16n8k16.8bit":
        return 4 * t + i, group
    return 4 * t + (i & 3) + (16 if i >= 4 else 0), group


MMA = [
    ("m16n8k16", "f16", "f32"),
    ("m16n8k16", "f16", "f16"),
    ("m16n8k16", "bf16", "f32"),
    ("m16n8k8", "f16", "f32"),
    ("m16n8k8", "bf16", "f32"),
    ("m16n8k8.tf32", "tf32", "f32"),
    ("m16n8k4", "tf32", "f32"),
    ("m16n8k32", "s8", "s32"),
    ("m16n8k32", "u8", "s32"),
    ("m16n8k16.8bit", "s8", "s32"),
    ("m16n8k32", "e4m3", "f32"),
    ("m16n8k32", "e5m2", "f32"),
]


def words(raw: torch.Tensor, places: list[list[tuple[int, int]]]) -> torch.Tensor:
    """Per lane the elements at its places, packed into 32-bit registers: uint32 [registers, 32]."""
    rows = torch.stack([torch.stack([raw[p] for p in lane]) for lane in places])  # [32, elements]
    return rows.contiguous().view(torch.uint8).view(torch.uint32).reshape(32, -1).T.contiguous()


@pytest.mark.parametrize("shape, form, result", MMA)
def test_mma(shape, form, result):
    name, k = shape.split(".")[0], int(shape.split(".")[0].split("k")[1])
    a, raw_a = operand(16, k, form, 1)
    b, raw_b = operand(k, 8, form, 2)
    per_register = 4 // BYTES[form]
    count_a, count_b = 16 * k // 32, 8 * k // 32
    fragment_a = words(raw_a, [[a_place(shape, i, lane) for i in range(count_a)] for lane in range(32)])
    fragment_b = words(raw_b, [[b_place(shape, i, lane) for i in range(count_b)] for lane in range(32)])
    c_places = [[((lane >> 2) + 8 * (i >= 2), 2 * (lane % 4) + (i & 1)) for i in range(4)] for lane in range(32)]
    dtype = {"f32": torch.float32, "f16": torch.float16, "s32": torch.int32}[result]
    c = (torch.randn(16, 8) * 4).to(dtype)
    fragment_c = words(c, c_places)
    d = torch.zeros(len(fragment_c), 32, dtype=torch.uint32)
    body, names = "", []
    for p, (fragment, base) in enumerate(((fragment_a, 100), (fragment_b, 120), (fragment_c, 140))):
        body += f"mad.wide.u32 %rd10, %r0, 4, %rd{p};\n"
        names.append([f"%r{base + r}" for r in range(len(fragment))])
        body += "".join(f"ld.global.b32 {n}, [%rd10+{128 * r}];\n" for r, n in enumerate(names[-1]))
    out = [f"%r{160 + r}" for r in range(len(d))]
    vector = lambda registers: "{" + ", ".join(registers) + "}"  # noqa: E731
    body += f"mma.sync.aligned.{name}.row.col.{result}.{form}.{form}.{result} {vector(out)}, {', '.join(map(vector, names))};\n"
    body += "mad.wide.u32 %rd10, %r0, 4, %rd3;\n" + "".join(
        f"st.global.b32 [%rd10+{128 * r}], {n};\n" for r, n in enumerate(out)
    )
    counts = emulate(kernel(body, 4), "k", 1, 32, [fragment_a, fragment_b, fragment_c, d])
    assert len(fragment_a) == count_a // per_register and counts.tensor_fma == 16 * 8 * k
    elements = d.T.contiguous().view(torch.uint8).view(dtype).reshape(32, 4)
    got = torch.zeros(16, 8, dtype=torch.float64)
    for lane in range(32):
        for i in range(4):
            got[c_places[lane][i]] = elements[lane, i].double()
    expected = a @ b + c.double()
    allowed = {"s32": 0, "f32": 2.0**-22, "f16": 2.0**-10}[result] * (a.abs() @ b.abs() + c.double().abs()).max()
    assert (got - expected).abs().max() <= allowed


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix_and_stmatrix(count, trans):
    x = torch.randint(0, 1 << 15, (32, 8), dtype=torch.int16)  # row 8 j + r: row r of matrix j
    out, back = torch.zeros(count, 32, dtype=torch.uint32), torch.zeros(32, 8, dtype=torch.int16)
    registers = ", ".join(f"%r{20 + j}" for j in range(count))
    # Rows are stored at permuted places, so that the addresses of all lanes count.
    body = f"""mov.u32 %r1, smem; xor.b32 %r2, %r0, 5; mad.lo.u32 %r3, %r2, 16, %r1; mad.wide.u32 %rd10, %r0, 16, %rd0;
ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%rd10]; st.shared.v4.b32 [%r3], {{%r4, %r5, %r6, %r7}}; bar.sync 0;
ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{registers}}}, [%r3];
mad.wide.u32 %rd11, %r0, 4, %rd1;
""" + "".join(f"st.global.b32 [%rd11+{128 * j}], %r{20 + j};\n" for j in range(count))
    body += f"""stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r3+1024], {{{registers}}}; bar.sync 0;
setp.lt.u32 %p0, %r0, {8 * count}; @%p0 ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%r3+1024];
mad.wide.u32 %rd12, %r0, 16, %rd2; @%p0 st.global.v4.b32 [%rd12], {{%r4, %r5, %r6, %r7}};"""
    emulate(kernel(body, 3, shared=2048), "k", 1, 32, [x, out, back])
    got = out.view(torch.uint8).view(torch.int16).reshape(count, 32, 2)
    for j in range(count):
        matrix = x[8 * j : 8 * j + 8]
        for lane in range(32):
            row, column = lane // 4, 2 * (lane % 4)
            expected = matrix[column : column + 2, row] if trans else matrix[row, column : column + 2]
            assert torch.equal(got[j, lane], expected)
    assert torch.equal(back[: 8 * count], x[: 8 * count])


def test_movmatrix():
    x, out = torch.randint(0, 1 << 15, (8, 8), dtype=torch.int16), torch.zeros(8, 8, dtype=torch.int16)
    body = """mad.wide.u32 %rd10, %r0, 4, %rd0; ld.global.b32 %r1, [%rd10];
movmatrix.sync.aligned.m8n8.trans.b16 %r2, %r1; mad.wide.u32 %rd11, %r0, 4, %rd1; st.global.b32 [%rd11], %r2;"""
    emulate(kernel(body, 2), "k", 1, 32, [x, out])
    assert torch.equal(out, x.T)


# ---- wgmma ----


def cute(shape, stride, index: tuple[int, int]) -> int:
    """Offset of (row, column) in a layout of two modes, each a tuple of extents and strides, leftmost fastest."""
    offset = 0
    for extents, strides, i in zip(shape, stride, index, strict=True):
        for extent, step in zip(extents[:-1], strides[:-1], strict=True):
            offset += i % extent * step
            i //= extent
        offset += i * strides[-1]
    return offset


def swizzle(byte: int, bits: int) -> int:
    """Swizzle<bits, 4, 3> on byte addresses: bits 7.. are added to bits 4.. without carry."""
    return byte ^ ((byte >> 7) & ((1 << bits) - 1)) << 4


def canonical(mn_major: bool, span: int, form: str, rows: int, k: int, sbo: int, lbo: int):
    """Byte offset of each element of a [rows, k] operand: the table of canonical layouts, in 128-bit units of T elements."""
    size = BYTES[form]
    t, bits = 16 // size, {0: 0, 32: 1, 64: 2, 128: 3}[span]
    sb, lb, w = sbo // size, lbo // size, span // 16
    if mn_major:
        shape, stride = (
            ((t, w or 1, 1 << 20), (8, 1 << 20)),
            ((1, t, sb if not w else lb), ((t, lb) if not w else (w * t, sb))),
        )
    else:
        shape, stride = ((8, 1 << 20), (t, 1 << 20)), (((w or 1) * t, sb), (1, t if w else lb))
    return {(r, c): swizzle(cute(shape, stride, (r, c)) * size, bits) for r in range(rows) for c in range(k)}


def descriptor(at: str, span: int, sbo: int, lbo: int, register: str) -> str:
    constant = {0: 0, 128: 1, 64: 2, 32: 3}[span] << 62 | (sbo >> 4) << 32 | (lbo >> 4) << 16
    constant -= 1 << 64 if constant >> 63 else 0
    return f"shr.u32 %r9, {at}, 4; cvt.u64.u32 {register}, %r9; or.b64 {register}, {register}, {constant};\n"


WGMMA = [
    *(
        ("bf16", n, span, major_a, major_b)
        for n, span, major_a, major_b in ((64, 128, 0, 0), (128, 128, 1, 1), (32, 64, 0, 1), (64, 64, 1, 0))
    ),
    *(
        ("f16", n, span, major_a, major_b)
        for n, span, major_a, major_b in ((16, 32, 0, 0), (48, 32, 1, 1), (40, 0, 0, 0), (16, 0, 1, 1))
    ),
    *(("tf32", n, span, 0, 0) for n, span in ((24, 128), (8, 32), (16, 0))),
    *((form, 32, span, 0, 0) for form in ("e4m3", "e5m2", "s8") for span in (128, 0)),
    ("bf16", 64, 128, "registers", 0),
    ("s8", 16, 32, "registers", 0),
]


def wgmma_program(
    form: str,
    n: int,
    span: int,
    major_a,
    major_b,
    *,
    fence="fence.proxy.async;",
    wait="wgmma.wait_group.sync.aligned 0;",
    wfence="wgmma.fence.sync.aligned;",
):
    """PTX for D = A B + 1 B (two chained wgmma), operands in canonical layouts; and the arguments."""
    k, size = 32 // BYTES[form], BYTES[form]
    a, raw_a = operand(64, k, form, 3)
    b, raw_b = operand(n, k, form, 4)  # B^T: N x K
    shared = torch.zeros(64 * 1024, dtype=torch.uint8)
    places = []
    for rows, raw, mn_major, base in ((64, raw_a, major_a, 0), (n, raw_b, major_b, 32 * 1024)):
        if mn_major == "registers":
            places.append((0, 0))
            continue
        if mn_major:
            # pieces along the rows first, then along k (LBO and SBO as in the table)
            step = 16 * 8 if not span else span * 8
            across = -(-rows // (max(span, 16) // size))
            lbo, sbo = (across * step, step) if not span else (step, across * step)
        else:
            sbo = 8 * (span or 16)
            lbo = 0 if span else -(-rows // 8) * sbo
        offsets = canonical(bool(mn_major), span, form, rows, k, sbo, lbo)
        bytes_ = raw.contiguous().view(torch.uint8).reshape(rows, k, size)
        for (r, c), offset in offsets.items():
            shared[base + offset : base + offset + size] = bytes_[r, c]
        places.append((sbo, lbo))
    integer = form == "s8"
    kind = "s32" if integer else "f32"
    out = torch.zeros(64, n, dtype=torch.int32 if integer else torch.float32)
    body = "mov.u32 %r1, smem; mad.wide.u32 %rd10, %r0, 16, %rd0; mad.lo.u32 %r2, %r0, 16, %r1;\n"
    for offset in range(0, 64 * 1024, 2048):
        vector = "{%r3, %r4, %r5, %r6}"
        body += f"ld.global.v4.b32 {vector}, [%rd10+{offset}]; st.shared.v4.b32 [%r2+{offset}], {vector};\n"
    body += f"{fence}\nbar.sync 0;\nadd.u32 %r7, %r1, {32 * 1024};\n"
    body += descriptor("%r1", span, *places[0], "%rd11") + descriptor("%r7", span, *places[1], "%rd12")
    source = "%rd11"
    arguments = [shared, out]
    if major_a == "registers":
        e = 4 // size
        fragments = torch.stack(
            [
                words(
                    raw_a,
                    [
                        [
                            ((lane >> 2) + 8 * (r % 2) + 16 * warp, 4 * e * (r // 2) + e * (lane % 4) + x)
                            for r in range(4)
                            for x in range(e)
                        ]
                        for lane in range(32)
                    ],
                )
                for warp in range(4)
            ]
        )  # [warp, register, lane]
        arguments.append(fragments.contiguous())
        body += "shr.u32 %r8, %r0, 5; and.b32 %r9, %r0, 31; mad.lo.u32 %r8, %r8, 128, %r9; mad.wide.u32 %rd13, %r8, 4, %rd2;\n"
        body += "".join(f"ld.global.b32 %r{10 + r}, [%rd13+{128 * r}];\n" for r in range(4))
        source = "{%r10, %r11, %r12, %r13}"
    d = [f"%r{100 + i}" for i in range(n // 2)]
    body += "".join(f"mov.b32 {r}, 0;\n" for r in d) + wfence + "\n"
    scales = "" if integer else ", 1, 1"
    trans = (
        "" if size != 2 else (f", {int(major_b)}" if major_a == "registers" else f", {int(major_a)}, {int(major_b)}")
    )
    text = f"wgmma.mma_async.sync.aligned.m64n{n}k{k}.{kind}.{form}.{form} {{{', '.join(d)}}}, {source}, %rd12, "
    body += f"{text}0{scales}{trans};\n{text}1{scales}{trans};\nwgmma.commit_group.sync.aligned;\n{wait}\n"
    # d[i] of lane l in warp w: row 16 w + l / 4 + 8 (i / 2 % 2), column 8 (i / 4) + 2 (l % 4) + i % 2
    body += "shr.u32 %r20, %r0, 5; and.b32 %r21, %r0, 31; shr.u32 %r22, %r21, 2; mad.lo.u32 %r22, %r20, 16, %r22;\n"
    body += "and.b32 %r23, %r21, 3; shl.b32 %r23, %r23, 1;\n"
    body += f"mad.lo.u32 %r24, %r22, {n}, %r23; mad.wide.u32 %rd14, %r24, 4, %rd1;\n"
    for i, r in enumerate(d):
        body += f"st.global.b32 [%rd14+{4 * (8 * (i // 2 % 2) * n + 8 * (i // 4) + i % 2)}], {r};\n"
    expected = 2 * (a @ b.T)
    return kernel(body, len(arguments), shared=64 * 1024), arguments, out, expected, a.abs() @ b.abs().T


@pytest.mark.parametrize("mode", ptx_emulator.MODES)
@pytest.mark.parametrize("case", WGMMA, ids=str)
def test_wgmma(case, mode):
    ptx, arguments, out, expected, scale = wgmma_program(*case)
    emulate(ptx, "k", 1, 128, arguments, mode=mode)
    assert (out.double() - expected).abs().max() <= (0 if case[0] == "s8" else 2.0**-21) * scale.max()


WRITES_EARLY = "setp.eq.u32 %p5, %r0, 0; @%p5 st.shared.b32 [%r1], %r2; wgmma.wait_group.sync.aligned 0;"


@pytest.mark.parametrize("mode", ptx_emulator.MODES)
@pytest.mark.parametrize(
    "change, message",
    [
        ({"fence": ""}, "no fence.proxy.async lies between"),
        ({"wait": ""}, "no wgmma.wait_group covers it yet"),
        ({"wait": "wgmma.wait_group.sync.aligned 1;"}, "no wgmma.wait_group covers it yet"),
        ({"wfence": ""}, "no wgmma.fence before the first wgmma"),
        ({"wfence": "wgmma.fence.sync.aligned; mov.b32 %r100, 0;"}, "accessed since the last wgmma.fence"),
        ({"wait": WRITES_EARLY}, "race in shared memory.*may still be under way"),
    ],
)
def test_wgmma_mistakes(change, message, mode):
    ptx, arguments, *_ = wgmma_program("bf16", 64, 128, 0, 0, **change)
    with pytest.raises(EmulationError, match=message):
        emulate(ptx, "k", 1, 128, arguments, mode=mode)


# ---- bulk and tensor copies ----


def tma_box(x: torch.Tensor, corner: list[int], box: list[int], span: int) -> torch.Tensor:
    """Shared memory after a tile copy: the box, innermost dimension first, zero outside the tensor, its 16-byte pieces swizzled."""
    rank = x.dim()
    out = torch.zeros(math.prod(box), dtype=x.dtype)
    for n in range(math.prod(box)):
        rest, index = n, []
        for d in range(rank):
            index.append(corner[d] + rest % box[d])
            rest //= box[d]
        if all(0 <= i < e for i, e in zip(index, reversed(x.shape), strict=True)):
            out[n] = x[tuple(reversed(index))]
    raw, bits = out.view(torch.uint8), {0: 0, 32: 1, 64: 2, 128: 3}[span]
    placed = torch.zeros_like(raw)
    for byte in range(0, len(raw), 16):
        to = swizzle(byte, bits)
        placed[to : to + 16] = raw[byte : byte + 16]
    return placed


TMA = [
    ([300], [64], [40], 0, torch.int32),
    ([50, 96], [32, 8], [80, 46], 64, torch.bfloat16),
    ([50, 96], [64, 16], [-7, -3], 128, torch.float16),
    ([20, 30, 32], [8, 5, 3], [28, 27, 18], 32, torch.float32),
    ([3, 4, 6, 16], [16, 3, 2, 2], [0, 4, 3, -1], 0, torch.uint8),
    ([2, 3, 2, 5, 64], [64, 2, 1, 2, 2], [3, 4, 1, 2, 1], 128, torch.float16),
]


def tma_program(rank: int, bytes_: int, corner: list[int], *, expect: int | None = None, waits: bool = True) -> str:
    coordinates = ", ".join(map(str, corner))
    wait = "W: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2], 0;\n@!%p2 bra W;" if waits else ""
    return (
        kernel(
            f"""mov.u32 %r1, smem; mov.u32 %r2, bar; setp.eq.u32 %p1, %r0, 0;
@%p1 mbarrier.init.shared::cta.b64 [%r2], 1; fence.mbarrier_init.release.cluster; bar.sync 0;
@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], {bytes_ if expect is None else expect};
@%p1 cp.async.bulk.tensor.{rank}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r1], [%rd0, {{{coordinates}}}], [%r2];
{wait}
mov.u32 %r3, %r0;
C: setp.ge.u32 %p3, %r3, {bytes_ // 4}; @%p3 bra E; shl.b32 %r4, %r3, 2; add.u32 %r5, %r1, %r4; ld.shared.b32 %r6, [%r5];
mad.wide.u32 %rd10, %r3, 4, %rd1; st.global.b32 [%rd10], %r6; add.u32 %r3, %r3, 64; bra C;
E: bar.sync 0;""",
            2,
            shared=16384,
        )
        .replace(".shared .align 1024 .b8 smem", ".shared .align 8 .b64 bar; .shared .align 1024 .b8 smem")
        .replace(".param .u64 p0,", ".param .align 64 .b8 p0[128],")
        .replace("ld.param.u64 %rd0, [p0];", "mov.b64 %rd0, p0; cvta.param.u64 %rd0, %rd0;")
    )


@pytest.mark.parametrize("mode", ptx_emulator.MODES)
@pytest.mark.parametrize("shape, box, corner, span, dtype", TMA)
def test_tensor_copy(shape, box, corner, span, dtype, mode):
    x = torch.randint(-100, 100, shape).to(dtype)
    expected = tma_box(x, corner, box, span)
    out = torch.zeros(len(expected), dtype=torch.uint8)
    emulate(
        tma_program(len(shape), len(expected), corner), "k", 1, 64, [TensorMap(x, box, swizzle=span), out], mode=mode
    )
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    "change, message, mode",
    [
        ({"waits": False}, "race in shared memory", "late"),
        ({"waits": False}, "race in shared memory", "early"),
        ({"expect": 2048}, "deadlock", "late"),
        ({"expect": 2048}, "deadlock", "early"),
    ],
)
def test_tensor_copy_mistakes(change, message, mode):
    x, out = torch.zeros(50, 96, dtype=torch.float16), torch.zeros(1024, dtype=torch.uint8)
    with pytest.raises(EmulationError, match=message):
        emulate(tma_program(2, 1024, [0, 0], **change), "k", 1, 64, [TensorMap(x, [32, 16]), out], mode=mode)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"box_dim": (300, 1)}, "box_dim: expected 2 sizes from 1 to 256"),
        ({"box_dim": (7, 1)}, "multiple of 16 bytes"),
        ({"box_dim": (64, 1), "swizzle": 64}, "at most 64 bytes innermost"),
        ({"box_dim": (8, 1), "global_strides": (40,)}, "global_strides: expected multiples of 16"),
    ],
)
def test_tensor_map_rejects_what_cuda_rejects(options, message):
    with pytest.raises(ValueError, match=message):
        TensorMap(torch.zeros(4, 64, dtype=torch.float16), **options)


# ---- nvcc's dialect is in test_ptx_emulator.py; memory ----


def test_atomics():
    x = torch.arange(64, dtype=torch.int32)
    total, seen, most = torch.zeros(1, dtype=torch.int32), torch.zeros(64, dtype=torch.int32), torch.zeros(1)
    body = """mad.wide.u32 %rd10, %r0, 4, %rd0; ld.global.b32 %r1, [%rd10]; atom.global.add.s32 %r2, [%rd1], %r1;
mad.wide.u32 %rd11, %r0, 4, %rd2; red.global.add.s32 [%rd11], %r2; cvt.rn.f32.s32 %r3, %r1; red.global.add.f32 [%rd3], %r3;"""
    emulate(kernel(body, 4), "k", 1, 64, [x, total, seen, most])
    assert total == x.sum() and most == x.sum().float()
    assert sorted(seen.tolist()) == [k * (k - 1) // 2 for k in range(64)]


ATOMICS = [  # instruction, width, where all lanes meet at first, each lane's operand, definition
    ("add.u64", 64, 1 << 40, lambda k: (1 << 33) + k, lambda old, b: old + b),
    ("min.s32", 32, 5, lambda k: 16 - k, lambda old, b: min(s(old), s(b))),
    ("min.u32", 32, 5, lambda k: 16 - k, min),
    ("max.s32", 32, 5, lambda k: 16 - k, lambda old, b: max(s(old), s(b))),
    ("max.u32", 32, 5, lambda k: 16 - k, max),
    ("max.u64", 64, 5, lambda k: k << 40, max),
    ("and.b32", 32, MASK[32], lambda k: ~(1 << k), lambda old, b: old & b),
    ("or.b32", 32, 0, lambda k: 1 << k, lambda old, b: old | b),
    ("xor.b32", 32, 0x1234, lambda k: 0x5A5A << k, lambda old, b: old ^ b),
    ("exch.b32", 32, 99, lambda k: k, lambda old, b: b),
    ("inc.u32", 32, 3, lambda k: 9, lambda old, b: 0 if old >= b else old + 1),
    ("dec.u32", 32, 3, lambda k: 9, lambda old, b: b if old == 0 or old > b else old - 1),
]


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("operation, width, start, operand, definition", ATOMICS, ids=[c[0] for c in ATOMICS])
def test_atomics_of_every_kind(operation, width, start, operand, definition, space):
    """What lanes saw is one order of theirs, each doing what the definition says; what red leaves is where atom ends."""
    operands = [operand(k) & MASK[width] for k in range(32)]
    kind = {32: torch.uint32, 64: torch.uint64}[width]
    b, ends = torch.tensor(operands, dtype=kind), torch.tensor([start, start], dtype=kind)
    seen, size, r = torch.zeros(32, dtype=kind), width // 8, REGISTER[width]
    at = "%rd1" if space == "global" else "%r1"
    body = f"mov.u32 %r1, smem; mad.wide.u32 %rd10, %r0, {size}, %rd0; ld.global.b{width} {r}20, [%rd10];\n"
    body += f"ld.global.v2.b{width} {{{r}21, {r}22}}, [%rd1]; setp.eq.u32 %p1, %r0, 0;\n"
    body += f"@%p1 st.shared.v2.b{width} [%r1], {{{r}21, {r}22}}; bar.sync 0;\n"
    body += f"atom.{space}.{operation} {r}23, [{at}], {r}20;\n"
    body += f"mad.wide.u32 %rd11, %r0, {size}, %rd2; st.global.b{width} [%rd11], {r}23;\n"
    reduces = "exch" not in operation  # red has no exch
    body += f"red.{space}.{operation} [{at}+{size}], {r}20;\n" if reduces else ""
    if space == "shared":
        body += f"bar.sync 0; @%p1 ld.shared.v2.b{width} {{{r}21, {r}22}}, [%r1];\n"
        body += f"@%p1 st.global.v2.b{width} [%rd1], {{{r}21, {r}22}};"
    emulate(kernel(body, 3, shared=64), "k", 1, 32, [b, ends, seen])
    steps = list(zip(seen.tolist(), operands, strict=True))
    state = start
    while steps:
        now = next(step for step in steps if step[0] == state)
        steps.remove(now)
        state = definition(*now) & MASK[width]
    assert ends[0] == state and (ends[1] == state or not reduces)


@pytest.mark.parametrize("space", ["global", "shared"])
def test_atomic_compare_and_swap(space):
    """Lane k turns 31 - k into 32 - k: lane 31 must come first, so who finds another number has to leave it alone."""
    at = "%rd0" if space == "global" else "%r1"
    body = f"""mov.u32 %r1, smem; setp.eq.u32 %p1, %r0, 0; mov.u32 %r2, 0; @%p1 st.shared.b32 [%r1], %r2; bar.sync 0;
sub.u32 %r5, 31, %r0; add.u32 %r3, %r5, 1;
L: atom.{space}.cas.b32 %r4, [{at}], %r5, %r3; setp.ne.u32 %p2, %r4, %r5; @%p2 bra L;
bar.sync 0; atom.{space}.add.u32 %r6, [{at}], 0; mad.wide.u32 %rd10, %r0, 4, %rd1; st.global.b32 [%rd10], %r6;"""
    cell, out = torch.zeros(1, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    emulate(kernel(body, 2, shared=16), "k", 1, 32, [cell, out])
    assert out.tolist() == [32] * 32 and cell == (32 if space == "global" else 0)


@pytest.mark.parametrize("form, dtype", [("f16x2", torch.float16), ("bf16x2", torch.bfloat16)])
def test_atomic_addition_of_pairs(form, dtype):
    x, total = torch.randint(-8, 8, (32, 2)).to(dtype), torch.zeros(2, dtype=dtype)
    body = f"""mad.wide.u32 %rd10, %r0, 4, %rd0; ld.global.b32 %r1, [%rd10]; red.global.add.noftz.{form} [%rd1], %r1;"""
    emulate(kernel(body, 2), "k", 1, 32, [x, total])
    assert torch.equal(total, x.sum(0))


# ---- copies and barriers by hand ----

COPIED = "mad.wide.u32 %rd10, %r0, 16, %rd0; mov.u32 %r1, smem; mad.lo.u32 %r1, %r0, 16, %r1;\n"
GIVEN = """{wait}
ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%r1+{at}];
mad.wide.u32 %rd11, %r0, 16, %rd1; st.global.v4.b32 [%rd11], {{%r4, %r5, %r6, %r7}};"""


@pytest.mark.parametrize("mode", ptx_emulator.MODES)
@pytest.mark.parametrize("size", [4, 8, 16])
def test_cp_async_fills_with_zeros(size, mode):
    """Lane l takes l % (size + 1) bytes; a true ignore-src takes none, and reads nothing: its address lies nowhere."""
    x, out = torch.randint(1, 100, (32, 16), dtype=torch.uint8), torch.ones(2, 32, 16, dtype=torch.uint8)
    body = f"""{COPIED} st.shared.v4.b32 [%r1], {{%r0, %r0, %r0, %r0}}; st.shared.v4.b32 [%r1+512], {{%r0, %r0, %r0, %r0}};
rem.u32 %r2, %r0, {size + 1}; cp.async.ca.shared.global [%r1], [%rd10], {size}, %r2;
and.b32 %r3, %r0, 1; setp.eq.u32 %p1, %r3, 1; mov.u64 %rd12, 16; selp.b64 %rd12, %rd12, %rd10, %p1;
cp.async.ca.shared.global [%r1+512], [%rd12], {size}, %p1; cp.async.wait_all;
{GIVEN.format(wait="", at=0)} {GIVEN.format(wait="", at=512).replace("[%rd11]", "[%rd11+512]")}"""
    emulate(kernel(body, 2, shared=1024), "k", 1, 32, [x, out], mode=mode)
    for lane in range(32):
        valid = lane % (size + 1)
        assert out[0, lane, :size].tolist() == x[lane, :valid].tolist() + [0] * (size - valid)
        assert out[1, lane, :size].tolist() == ([0] * size if lane % 2 else x[lane, :size].tolist())
        assert out[:, lane, size:].tolist() == [[lane, 0, 0, 0] * ((16 - size) // 4)] * 2  # not touched


@pytest.mark.parametrize("mode", ptx_emulator.MODES)
@pytest.mark.parametrize(
    "pending, read, ready", [(0, 2, True), (1, 1, True), (1, 2, False), (2, 0, True), (2, 1, False), (3, 0, False)]
)
def test_cp_async_groups(pending, read, ready, mode):
    """Of three groups wait_group n leaves the n youngest under way; a commit may close an empty one."""
    x, out = torch.randint(1, 100, (32, 16), dtype=torch.uint8), torch.zeros(32, 16, dtype=torch.uint8)
    body = COPIED + "".join(
        f"cp.async.cg.shared.global [%r1+{512 * k}], [%rd10], 16; cp.async.commit_group;\n" for k in range(3)
    )
    body += GIVEN.format(wait=f"cp.async.wait_group {pending};", at=512 * read) + " cp.async.wait_all;"
    ptx = kernel(body, 2, shared=1536)
    if ready:
        emulate(ptx, "k", 1, 32, [x, out], mode=mode)
        assert torch.equal(out, x)
    else:
        with pytest.raises(EmulationError, match="ld.shared.*may still be under way"):
            emulate(ptx, "k", 1, 32, [x, out], mode=mode)


def bulk_program(
    size: int, wait: str, fence: str = "fence.proxy.async;", group: str = "@%p1 cp.async.bulk.commit_group;"
) -> str:
    """Through shared memory by plain bulk copies, doubled on the way: in by an mbarrier, out by a bulk group."""
    return kernel(
        f"""mov.u32 %r1, smem; mov.u32 %r2, bar; setp.eq.u32 %p1, %r0, 0;
@%p1 mbarrier.init.shared::cta.b64 [%r2], 1; fence.mbarrier_init.release.cluster; bar.sync 0;
@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], {size};
@%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd0], {size}, [%r2];
W: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2], 0; @!%p2 bra W;
setp.lt.u32 %p3, %r0, {size // 4}; mad.lo.u32 %r3, %r0, 4, %r1; @%p3 ld.shared.b32 %r4, [%r3]; add.u32 %r4, %r4, %r4;
@%p3 st.shared.b32 [%r3], %r4; {fence} bar.sync 0;
@%p1 cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r1], {size}; {group} {wait}""",
        2,
        shared=1024,
    ).replace(".shared .align 1024 .b8 smem", ".shared .align 8 .b64 bar; .shared .align 1024 .b8 smem")


@pytest.mark.parametrize("mode", ptx_emulator.MODES)
@pytest.mark.parametrize("size", [16, 48, 256])
def test_bulk_copies(size, mode):
    x, out = torch.randint(0, 1 << 20, (64,), dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    counts = emulate(bulk_program(size, "cp.async.bulk.wait_group 0;"), "k", 1, 64, [x, out], mode=mode)
    assert torch.equal(out[: size // 4], 2 * x[: size // 4]) and not out[size // 4 :].any()
    assert counts.global_load_bytes == counts.global_store_bytes == size


@pytest.mark.parametrize("mode", ptx_emulator.MODES)
@pytest.mark.parametrize(
    "change, message",
    [
        ({"wait": ""}, "no cp.async.bulk.wait_group covers this copy, and the block ends"),
        ({"wait": "cp.async.bulk.wait_group 1;"}, "no cp.async.bulk.wait_group covers this copy"),
        ({"group": ""}, "no cp.async.bulk.wait_group covers this copy"),
        ({"fence": ""}, "no fence.proxy.async lies between"),
        (
            {"wait": "mov.u32 %r4, 7; @%p3 st.shared.b32 [%r3], %r4; cp.async.bulk.wait_group 0;"},
            "race.*may still be under way",
        ),
        ({"size": 24}, "a bulk copy needs addresses and sizes that are multiples of 16"),
        ({"size": 272}, "in no tensor"),
    ],
)
def test_bulk_copy_mistakes(change, message, mode):
    x, out = torch.zeros(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    program = bulk_program(**({"size": 64, "wait": "cp.async.bulk.wait_group 0;"} | change))
    with pytest.raises(EmulationError, match=message):
        emulate(program, "k", 1, 64, [x, out], mode=mode)


def named(full: str = "bar.arrive 1, 96;", awaited: str = "bar.sync 1, 96;", free: str = "bar.sync 2, 96;") -> str:
    """Warp 0 fills shared memory twice and only arrives; warps 1 and 2 wait for it, and tell when it may go on."""
    return kernel(
        f"""mov.u32 %r1, smem; and.b32 %r2, %r0, 31; shr.u32 %r3, %r0, 5; mad.lo.u32 %r4, %r2, 4, %r1; mov.u32 %r5, 0;
setp.ne.u32 %p1, %r3, 0; @%p1 bra C;
P: mad.lo.u32 %r6, %r5, 100, %r2; st.shared.b32 [%r4], %r6; {full} {free}
add.u32 %r5, %r5, 1; setp.lt.u32 %p2, %r5, 2; @%p2 bra P; bra E;
C: {awaited} ld.shared.b32 %r6, [%r4]; bar.arrive 2, 96;
mad.lo.u32 %r7, %r5, 64, %r0; mad.wide.u32 %rd10, %r7, 4, %rd0; st.global.b32 [%rd10+-128], %r6;
add.u32 %r5, %r5, 1; setp.lt.u32 %p2, %r5, 2; @%p2 bra C;
E: mov.u32 %r8, 0;""",
        1,
        shared=128,
    )


@pytest.mark.parametrize("mode", ptx_emulator.MODES)
def test_named_barriers(mode):
    out = torch.zeros(2, 2, 32, dtype=torch.int32)
    emulate(named(), "k", 1, 96, [out], mode=mode)
    lanes = torch.arange(32, dtype=torch.int32)
    assert torch.equal(out, torch.stack([lanes, lanes + 100])[:, None].expand(2, 2, 32))


@pytest.mark.parametrize("mode", ptx_emulator.MODES)
@pytest.mark.parametrize(
    "change, message",
    [
        ({"full": ""}, "deadlock|race"),
        ({"awaited": ""}, "race in shared memory"),
        ({"free": ""}, "race in shared memory|more than 96 threads arrive at barrier 1|deadlock"),
        ({"full": "bar.arrive 1, 64;"}, "barrier 1 is awaited by|deadlock"),
        ({"full": "bar.arrive 3, 96;"}, "deadlock"),
        ({"full": "bar.arrive 1, 96; st.shared.b32 [%r4], %r3;"}, "race in shared memory"),  # after it arrived
        ({"full": "bar.arrive 1, 100;"}, "a barrier of 100 threads, no multiple of the warp's"),
        ({"full": "bar.arrive 16, 96;"}, "barrier 16, of 16"),
    ],
)
def test_named_barrier_mistakes(change, message, mode):
    with pytest.raises(EmulationError, match=message):
        emulate(named(**change), "k", 1, 96, [torch.zeros(2, 2, 32, dtype=torch.int32)], mode=mode)


def test_generic_addresses_and_vectors():
    x, out = torch.randn(128), torch.zeros(128)
    body = """mov.u32 %r1, smem; cvt.u64.u32 %rd10, %r1; cvta.shared.u64 %rd11, %rd10; mad.wide.u32 %rd12, %r0, 16, %rd11;
mad.wide.u32 %rd13, %r0, 16, %rd0; ld.v4.b32 {%r2, %r3, %r4, %r5}, [%rd13]; st.v4.b32 [%rd12], {%r2, %r3, %r4, %r5}; bar.sync 0;
cvta.to.shared.u64 %rd14, %rd12; ld.shared.v2.b32 {%r6, %r7}, [%rd14+8]; mad.wide.u32 %rd15, %r0, 16, %rd1;
st.global.v2.b32 [%rd15], {%r2, %r3}; st.global.v2.b32 [%rd15+8], {%r6, %r7};"""
    emulate(kernel(body, 2, shared=512), "k", 1, 32, [x, out])
    assert torch.equal(x, out)


# ---- clusters ----


def exchange(
    arrive: str = "barrier.cluster.arrive.release.aligned;", wait: str = "barrier.cluster.wait.acquire.aligned;"
) -> str:
    """Each block of a cluster writes to the next one's shared memory, and after the cluster barrier everyone stores what it got."""
    return kernel(
        f"""mov.u32 %r1, smem; mov.u32 %r2, %cluster_ctarank; mov.u32 %r3, %cluster_nctarank;
add.u32 %r4, %r2, 1; rem.u32 %r4, %r4, %r3;
mapa.shared::cluster.u32 %r5, %r1, %r4; mad.lo.u32 %r6, %r0, 4, %r5;
mov.u32 %r7, %ctaid.x; mad.lo.u32 %r8, %r7, 64, %r0;
st.shared::cluster.b32 [%r6], %r8; {arrive} {wait}
mad.lo.u32 %r9, %r0, 4, %r1; ld.shared.b32 %r10, [%r9];
mad.wide.u32 %rd10, %r8, 4, %rd0; st.global.b32 [%rd10], %r10;""",
        1,
        shared=256,
    )


@pytest.mark.parametrize("mode", ptx_emulator.MODES)
def test_distributed_shared_memory(mode):
    out = torch.zeros(8, 64, dtype=torch.int32)
    emulate(exchange(), "k", 8, 64, [out], cluster=(4,), mode=mode)
    block = torch.arange(8)
    before = block // 4 * 4 + (block + 3) % 4
    assert torch.equal(out, (before[:, None] * 64 + torch.arange(64)).int())


@pytest.mark.parametrize("mode", ptx_emulator.MODES)
@pytest.mark.parametrize(
    "change, message",
    [
        ({"arrive": "", "wait": ""}, r"race in shared memory.*of the cluster"),
        ({"arrive": "barrier.cluster.arrive.relaxed.aligned;"}, r"race in shared memory.*of the cluster"),
        ({"arrive": "bar.sync 0;", "wait": "bar.sync 0;"}, r"race in shared memory.*of the cluster"),
        ({"arrive": ""}, "barrier.cluster.wait without an arrive"),
    ],
)
def test_distributed_shared_memory_mistakes(change, message, mode):
    with pytest.raises(EmulationError, match=message):
        emulate(exchange(**change), "k", 4, 64, [torch.zeros(4, 64, dtype=torch.int32)], cluster=(2,), mode=mode)


def multicast(
    mask: int = 3, expect: int = 2048, ready: str = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
) -> str:
    """Each of two blocks loads its half of a tile and multicasts it to both."""
    copy = "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
    return (
        kernel(
            f"""mov.u32 %r1, smem; mov.u32 %r2, bar; setp.eq.u32 %p1, %r0, 0;
mov.u32 %r3, %cluster_ctarank; shl.b32 %r4, %r3, 4; mov.u16 %rs1, {mask};
@%p1 mbarrier.init.shared::cta.b64 [%r2], 1; fence.mbarrier_init.release.cluster; bar.sync 0; {ready}
@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], {expect}; mad.lo.u32 %r5, %r3, 1024, %r1;
@%p1 {copy} [%r5], [%rd0, {{0, %r4}}], [%r2], %rs1;
W: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2], 0; @!%p2 bra W;
mov.u32 %r6, %ctaid.x; mad.lo.u32 %r6, %r6, 128, %r0; mad.lo.u32 %r7, %r0, 16, %r1;
ld.shared.v4.b32 {{%r8, %r9, %r10, %r11}}, [%r7];
mad.wide.u32 %rd10, %r6, 16, %rd1; st.global.v4.b32 [%rd10], {{%r8, %r9, %r10, %r11}}; bar.sync 0;""",
            2,
            shared=2048,
        )
        .replace(".shared .align 1024 .b8 smem", ".shared .align 8 .b64 bar; .shared .align 1024 .b8 smem")
        .replace(".param .u64 p0,", ".param .align 64 .b8 p0[128],")
        .replace("ld.param.u64 %rd0, [p0];", "mov.b64 %rd0, p0; cvta.param.u64 %rd0, %rd0;")
    )


@pytest.mark.parametrize("mode", ptx_emulator.MODES)
def test_multicast(mode):
    x, out = torch.randn(32, 32).half(), torch.zeros(2, 32, 32).half()
    counts = emulate(multicast(), "k", 2, 128, [TensorMap(x, [32, 16]), out], cluster=(2,), mode=mode)
    assert torch.equal(out[0], x) and torch.equal(out[1], x)
    assert counts.l2_load_sectors == 32 * 32 * 2 // 32  # each half is asked for once ...
    assert counts.shared_write_bytes == 2 * 32 * 32 * 2  # ... and written in both blocks


@pytest.mark.parametrize("mode", ptx_emulator.MODES)
@pytest.mark.parametrize(
    "change, message",
    [
        ({"mask": 1}, "deadlock|race"),
        ({"mask": 5}, "multicast mask 0x5 for a cluster of 2 blocks"),
        ({"expect": 1024}, "race|nobody has waited"),
        ({"ready": ""}, "there is no mbarrier|a use at"),
    ],
)
def test_multicast_mistakes(change, message, mode):
    x, out = torch.randn(32, 32).half(), torch.zeros(2, 32, 32).half()
    with pytest.raises(EmulationError, match=message):
        emulate(multicast(**change), "k", 2, 128, [TensorMap(x, [32, 16]), out], cluster=(2,), mode=mode)


# ---- counters ----


@pytest.mark.parametrize(
    "stride, vector, wavefronts, ideal",
    [
        *((4, 1, 1, 1), (8, 1, 2, 1), (16, 1, 4, 1), (128, 1, 32, 1), (132, 1, 1, 1), (0, 1, 1, 1)),
        *((8, 2, 2, 2), (16, 4, 4, 4), (128, 4, 32, 4)),
    ],
)
def test_shared_wavefronts(stride, vector, wavefronts, ideal):
    registers = "{" + ", ".join(f"%r{4 + k}" for k in range(vector)) + "}"
    suffix = f".v{vector}" if vector > 1 else ""
    body = f"mov.u32 %r1, smem; mad.lo.u32 %r2, %r0, {stride}, %r1; ld.shared{suffix}.b32 {registers}, [%r2];"
    counts = emulate(kernel(body, 1, shared=8192), "k", 1, 32, [torch.zeros(1)])
    assert (counts.shared_wavefronts, counts.shared_ideal) == (wavefronts, ideal)
    assert counts.shared_read_bytes == 32 * 4 * vector and counts.kinds["load_shared"] == 1


@pytest.mark.parametrize("stride, sectors", [(4, 4), (8, 8), (32, 32), (128, 32), (0, 1)])
def test_global_sectors(stride, sectors):
    x = torch.zeros(2048)
    load = f"mad.wide.u32 %rd10, %r0, {stride}, %rd0; ld.global.b32 %r1, [%rd10]; ld.global.b32 %r2, [%rd10];"
    counts = emulate(kernel(load, 1), "k", 3, 32, [x], threads=1)
    assert counts.global_load_sectors == 3 * 2 * sectors and counts.global_load_bytes == 3 * 2 * 128
    assert (
        counts.l2_load_sectors == 3 * sectors and counts.dram_load_sectors == sectors
    )  # L1 holds what a block has read
    past_l1 = emulate(kernel(load.replace("ld.global", "ld.global.cg"), 1), "k", 3, 32, [x], threads=1)
    assert past_l1.l2_load_sectors == 3 * 2 * sectors
