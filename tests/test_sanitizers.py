"""The kernels under AddressSanitizer and UndefinedBehaviorSanitizer: their own tests, against a library built for that.

A fixed quarter of these runs, or all with SPARSE_PRUNE_SAMPLE=1. What a check finds ends the run with the sanitizer's report. torch
itself is not instrumented, but its allocations are, so that a kernel's access outside a tensor shows.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import built
import pytest
import torch

import sparse_prune
from sparse_prune import backends

ROOT = Path(__file__).resolve().parents[1]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-O1", "-g1", "-fno-omit-frame-pointer"]
OPTIONS = {
    # torch and Python free at exit, allocate in one library and free in another, and define some symbols twice
    "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0:detect_odr_violation=0:new_delete_type_mismatch=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


def runtime() -> str | None:
    """What to preload: AddressSanitizer, and libstdc++, whose exceptions it must find when it starts; None without either."""
    if sys.platform != "linux" or not shutil.which(built.compiler()[0]):
        return None
    names = ("libasan.so", "libstdc++.so.6")
    found = [run([*built.compiler(), f"-print-file-name={name}"]).stdout.strip() for name in names]
    return " ".join(found) if all(map(os.path.isabs, found)) else None


def library() -> Path:
    """The CPU extension with both sanitizers, compiled two files at a time."""
    setup, csrc, home = (ROOT / "setup.py").read_text(), ROOT / "csrc", Path(torch.__file__).parent
    (version,) = re.findall(r'"TORCH_TARGET_VERSION", "(\w+)"', setup)
    flags = [
        "-std=c++20",
        "-fPIC",
        "-fno-math-errno",
        "-ffp-contract=off",
        "-Wno-maybe-uninitialized",
        f"-DTORCH_TARGET_VERSION={version}",
    ]
    flags += [f"-I{home / 'include'}", f"-I{home / 'include/torch/csrc/api/include'}"]

    def make(folder: Path) -> None:
        def compile_one(source: Path) -> Path:
            compiled = folder / f"{source.stem}.o"
            run([*built.compiler(), *SANITIZE, *flags, "-c", source, "-o", compiled])
            return compiled

        with ThreadPoolExecutor(2) as pool:
            files = [*csrc.glob("*.cpp"), *csrc.glob("cpu/*.cpp")]
            # What takes longest first.
            files.sort(key=lambda file: -len(file.read_text()) if file.stem != "avx512" else -1e9)
            compiled = list(pool.map(compile_one, (f for f in files if f.name != "cuda_ops.cpp")))
        link = ["-shared", *compiled, "-o", folder / "_C_cpu.so", f"-L{home / 'lib'}", "-ltorch_cpu", "-lc10"]
        run([*built.compiler(), *SANITIZE, *link])

    sources = [*sorted(csrc.glob("*.*")), *sorted(csrc.glob("cpu/*")), torch.__version__, *SANITIZE, *flags]
    return built.built("sanitized", sources, make) / "_C_cpu.so"


def run(command: list, **options) -> subprocess.CompletedProcess:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory) -> dict[str, str]:
    """The environment of a Python that imports this package with sanitized kernels."""
    if not backends.cpu_isas():
        pytest.skip("the C++ extension was not built")
    preloaded = runtime()
    if preloaded is None:
        pytest.skip("the compiler has no AddressSanitizer library")
    folder = tmp_path_factory.mktemp("sanitized")
    package = Path(sparse_prune.__file__).parent
    shutil.copytree(package, folder / "sparse_prune", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(library(), folder / "sparse_prune")
    # Two threads, also where this test process has but a share of the cores.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    sample = {"SPARSE_PRUNE_SAMPLE": os.environ.get("SPARSE_PRUNE_SAMPLE", "4")}
    paths = {"LD_PRELOAD": preloaded, "PYTHONPATH": str(folder)}
    return {**alone, **OPTIONS, **sample, **paths, "OMP_NUM_THREADS": "2"}


@pytest.mark.slow
def test_kernels_touch_only_their_memory(sanitized):
    files = ("test_cpu_kernels.py", "test_int8_kernels.py", "test_encoder_ops.py")
    # tests that start compilers or Pythons of their own say nothing about the kernels here
    chosen = "not setup and not native and not variable and not opcheck and not environment"
    pytest_run = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "--import-mode=importlib",
        "-p",
        "no:cacheprovider",
        "--capture=sys",
    ]
    done = run(
        [*pytest_run, "-k", chosen, *(ROOT / "tests" / name for name in files)],
        env=sanitized,
        cwd=sanitized["PYTHONPATH"],
    )
    passed = int(re.search(r"(\d+) passed", done.stdout)[1])
    assert passed > 400, done.stdout[-2000:]


@pytest.mark.slow
def test_the_sanitizer_sees_what_a_kernel_reads(sanitized):
    """A kernel given an M that is larger than x is caught: the check that the other test can fail."""
    code = """
import ctypes, torch, sparse_prune
from sparse_prune import backends
print(backends._library._name)
x = torch.ones(4, 64)
ctypes.memset(x.data_ptr() + x.numel() * 4 + 8, 0, 1)
"""
    home = sanitized["PYTHONPATH"]
    done = subprocess.run([sys.executable, "-c", code], env=sanitized, cwd=home, capture_output=True, text=True)
    assert "sanitized" in done.stdout, done.stderr[-2000:]
    assert done.returncode != 0 and "AddressSanitizer: heap-buffer-overflow" in done.stderr
