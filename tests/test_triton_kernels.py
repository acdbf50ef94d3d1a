"""The Triton kernels where no GPU is: run in Triton's interpreter, and compiled for GPUs that are not here."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from sparse_prune_kernels import support, unavailable

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def _forget_answers():
    """What is available differs from test to test here."""
    yield
    support.unavailable.cache_clear()
    support.triton_problem.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """A PyTorch that says it has a GPU; returns a function that sets its compute capability."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def with_capability(major: int, minor: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))

    with_capability(9, 0)
    return with_capability


class Library:
    """Stands in for torch.library.Library and keeps what is registered."""

    def __init__(self):
        self.implementations = {}

    def impl(self, name, function, key):
        self.implementations[name, key] = function


def run_sweep(expression: str) -> str:
    """Run test_triton_sweep.py in Triton's interpreter and return pytest's last line."""
    if version("triton").startswith("3.6.") and tuple(map(int, version("numpy").split(".")[:2])) >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 fails on loops with NumPy 2.4")
    sweep = Path(__file__).with_name("test_triton_sweep.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", expression, str(sweep)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip().splitlines()[-1]


@needs_triton
def test_interpreted_kernels_match_float64():
    last = run_sweep("not slow")
    assert int(re.search(r"(\d+) passed", last)[1]) >= 50 and "skipped" not in last, last


@needs_triton
@pytest.mark.slow
def test_interpreted_kernels_match_float64_for_every_blocksize():
    last = run_sweep("slow")
    assert int(re.search(r"(\d+) passed", last)[1]) == 48 and "skipped" not in last, last


# (side_n, side_k, m, dtype, capability, precision, transposed): each data type and each kind of tensor-core instruction once.
LINEAR_GATES = [
    (32, 32, 16, "bfloat16", 80, "ieee", False),
    (32, 32, 4096, "bfloat16", 80, "ieee", False),
    (128, 128, 4096, "bfloat16", 80, "ieee", True),
    (64, 64, 4096, "float16", 80, "ieee", False),
    (32, 32, 16, "bfloat16", 90, "ieee", False),
    (32, 32, 4096, "bfloat16", 90, "ieee", True),
    (128, 128, 4096, "bfloat16", 90, "ieee", False),
    (64, 64, 4096, "bfloat16", 120, "ieee", False),
    (32, 32, 4096, "float32", 80, "ieee", False),
    (128, 128, 4096, "float32", 90, "ieee", False),
    (32, 32, 4096, "float32", 80, "tf32", False),
]
SIDES = (16, 32, 64, 128)
ALL_LINEAR_GATES = [
    (side_n, side_k, m, dtype, capability, "ieee", m > 16 and side_n > side_k)
    for dtype, capability in (("bfloat16", 80), ("bfloat16", 90), ("float32", 80))
    for side_n in SIDES
    for side_k in SIDES
    for m in ((16, 4096) if side_n == side_k else (4096,))
]
SDD_GATES = [
    (32, 32, "bfloat16", 80, "ieee"),
    (128, 128, "bfloat16", 90, "ieee"),
    (64, 16, "float16", 120, "ieee"),
    (32, 32, "float32", 80, "ieee"),
    (32, 32, "float32", 80, "tf32"),
]


def check_gates(made, dtype, capability, precision, wgmma, bytes_per_stage, num_stages):
    """No spills, shared memory within the smallest GPU's limit, a pipeline as deep as asked, the right multiplications."""
    from sparse_prune_kernels.config import SHARED_LIMIT

    assert made.stack == 0, f"spills: {made.stack} bytes of stack with {made.registers} registers"
    assert 0 < made.registers <= 255
    # Triton keeps one tile of each operand fewer than stages. The pipeline falls to one tile where an address depends on a load.
    assert (num_stages - 1) * bytes_per_stage <= made.shared <= SHARED_LIMIT
    assert "cp.async" in made.ptx
    tensor_cores = set(re.findall(r"\b(mma\.sync|wgmma\.mma_async)\S*?\.f32\.(\w+)\.\w+", made.ptx))
    if dtype == "float32" and precision == "ieee":
        assert not tensor_cores and "tf32" not in made.ptx and "fma.rn.f32" in made.ptx
    else:
        operand = {"bfloat16": "bf16", "float16": "f16", "float32": "tf32"}[dtype]
        assert tensor_cores == {("wgmma.mma_async" if wgmma else "mma.sync", operand)}


def check_linear_gates(side_n, side_k, m, dtype, capability, precision, transposed, even_k):
    from sparse_prune_kernels import config, offline

    itemsize = 4 if dtype == "float32" else 2
    tiles = config.linear_config(m, side_n, side_k, itemsize)
    made = offline.compile_linear(
        tiles, side_n, side_k, dtype, capability, precision, transposed=transposed, even_k=even_k
    )
    wgmma = capability == 90 and tiles.block_m >= 64  # the 64 rows that a warp group's instruction takes
    bytes_per_stage = (tiles.block_m + side_n) * tiles.block_k * itemsize
    check_gates(made, dtype, capability, precision, wgmma, bytes_per_stage, tiles.num_stages)


@needs_triton
@pytest.mark.parametrize("even_k", [True, False])
@pytest.mark.parametrize("gate", LINEAR_GATES, ids=str)
def test_compiled_linear(gate, even_k):
    check_linear_gates(*gate, even_k)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("gate", ALL_LINEAR_GATES, ids=str)
def test_compiled_linear_for_every_blocksize(gate):
    check_linear_gates(*gate, even_k=False)


@needs_triton
@pytest.mark.parametrize("gate", SDD_GATES, ids=str)
def test_compiled_sdd(gate):
    from sparse_prune_kernels import config, offline

    r, c, dtype, capability, precision = gate
    itemsize = 4 if dtype == "float32" else 2
    tiles = config.sdd_config(r, c, itemsize)
    made = offline.compile_sdd(tiles, r, c, dtype, capability, precision)
    wgmma = capability == 90 and r >= 64
    check_gates(made, dtype, capability, precision, wgmma, (r + c) * tiles.block_m * itemsize, tiles.num_stages)


def test_linear_config_fits_its_problem():
    from sparse_prune_kernels.config import linear_config

    assert [linear_config(m, 32, 32, 2).block_m for m in (1, 16, 17, 33, 64, 65, 5000)] == [
        16,
        16,
        32,
        64,
        64,
        128,
        128,
    ]
    assert [linear_config(64, 32, c, 2).block_k for c in SIDES] == [16, 32, 64, 64]
    assert [linear_config(64, 32, c, 4).block_k for c in SIDES] == [16, 16, 16, 16]


@pytest.mark.parametrize(
    "device, dtype, blocksize, reason",
    [
        (torch.device("cpu"), torch.float32, (32, 32), "run on CUDA devices, not on cpu"),
        (CUDA, torch.float64, (32, 32), "take float16, bfloat16 and float32, not float64"),
        (CUDA, torch.float32, (4, 8), "take blocks with sides 16, 32, 64 or 128, not 4x8"),
        (CUDA, torch.float32, (32, 256), "not 32x256"),
    ],
)
def test_reasons_that_need_no_gpu(device, dtype, blocksize, reason):
    assert reason in unavailable(device, dtype, blocksize)


def test_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert unavailable(CUDA, torch.float32, (32, 32)) == "PyTorch finds no CUDA device"


def test_amd_gpu(gpu, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "NVIDIA GPUs only" in unavailable(CUDA, torch.float32, (32, 32))


def test_old_gpu(gpu):
    gpu(7, 5)
    assert unavailable(CUDA, torch.float32, (32, 32)) == "compute capability 7.5 is older than 8.0"


def test_triton_missing(gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "Triton cannot be imported (ModuleNotFoundError" in unavailable(CUDA, torch.float32, (32, 32))


@pytest.mark.parametrize(
    "number, reason", [("3.5.1", "Triton 3.5.1 is older than 3.6"), ("3.6.0", None), ("4.0.0+git1", None)]
)
def test_triton_version(gpu, monkeypatch, number, reason):
    fake = type(sys)("triton")
    fake.__version__ = number
    monkeypatch.setitem(sys.modules, "triton", fake)
    assert unavailable(CUDA, torch.bfloat16, (16, 128)) == reason


def test_registered_operators_fall_back_where_a_reason_stands():
    library, called = Library(), []
    names = ("bsr_linear", "bsr_linear_dx", "bsr_sdd")
    fallbacks = {name: lambda *arguments, name=name: called.append((name, len(arguments))) for name in names}
    support.register(library, fallbacks)
    assert set(library.implementations) == {(name, "CUDA") for name in names}
    x, values, index = torch.zeros(4, 8), torch.zeros(1, 4, 8), torch.zeros(2, dtype=torch.int32)
    library.implementations["bsr_linear", "CUDA"](x, index, index, values, None, 4, None, "none", None)
    library.implementations["bsr_linear_dx", "CUDA"](x, index, index, values, 8)
    library.implementations["bsr_sdd", "CUDA"](x, x, index, index, 4, 8)
    assert called == [("bsr_linear", 9), ("bsr_linear_dx", 5), ("bsr_sdd", 6)]


def test_registering_imports_no_triton():
    code = (
        "import sys, torch; before = set(sys.modules); import sparse_prune_kernels as k;"
        "k.register(type('L', (), {'impl': lambda *a: None})(), {});"
        "k.unavailable(torch.device('cpu'), torch.float32, (32, 32));"
        "print('triton' in set(sys.modules) - before)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
