"""`_C_cuda`: that it builds without a GPU, what is in it, and backend="cuda" around the kernels."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_kernels
import pytest
import torch
import torch.nn.functional as F

import sparse_prune as sp
from sparse_prune import backends
from sparse_prune.ops import backend_for

ROOT = Path(__file__).resolve().parent.parent
# What may be looked up in torch: the stable interface. The CUDA runtime is linked in; the rest is C and C++ libraries.
STABLE = re.compile(r"(aoti_|torch_)\w+$")
needs_nvcc = pytest.mark.skipif(cuda_kernels.unavailable() is not None, reason=str(cuda_kernels.unavailable()))


def tool(name: str) -> str:
    triton = pytest.importorskip("triton", reason="Triton, whose cuobjdump is used, is not installed")
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        pytest.skip(f"this Triton brings no {name}")
    return str(path)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The extension, built as an installation with SPARSE_PRUNE_CUDA=1 builds it, for the default architectures."""
    if shutil.which("nm") is None:
        pytest.skip("there is no nm (binutils)")
    folder = tmp_path_factory.mktemp("cuda")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", folder, "--build-temp", folder / "temp"]
    environment = os.environ | {"SPARSE_PRUNE_CUDA": "1", "SPARSE_PRUNE_CPU": "0"}
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (path,) = folder.glob("sparse_prune/_C_cuda*.so")
    return path


@pytest.mark.slow
@needs_nvcc
def test_it_asks_torch_for_the_stable_interface_only(library):
    shown = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True).stdout
    names = {line.split()[-1] for line in shown.splitlines()}
    foreign = {
        n for n in names if "@" not in n and not n.startswith(("_ITM_", "__gmon", "_ZNKSt", "_ZNSt", "_ZSt", "_ZTVN"))
    }
    foreign = {n for n in foreign if not re.match(r"_Z(NK?R?|NO)St7__cxx11", n)}
    assert any(n.startswith("aoti_torch_") for n in foreign)
    assert {n for n in foreign if not STABLE.match(n)} == set()


@pytest.mark.slow
@needs_nvcc
def test_code_for_every_architecture(library):
    """No kernel spills; they multiply on tensor cores and copy asynchronously; younger GPUs get PTX."""
    usage = subprocess.run([tool("cuobjdump"), "--dump-resource-usage", library], capture_output=True, text=True).stdout
    arch, seen = "", {}
    for line in usage.splitlines():
        if line.startswith("arch = "):
            arch = line.split()[-1]
        elif match := re.match(r"\s*Function (\w+):", line):
            name = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+)", line):
            assert int(match[2]) == 0, f"{name} for {arch} keeps {match[2]} bytes of registers in memory"
            seen.setdefault(arch, set()).add(name)
    assert {"sm_80", "sm_90", "sm_100", "sm_120"} <= set(seen)
    for arch, names in seen.items():
        assert len(names) >= 18 and all(re.match("bsr_linear_s(m80|kinny)_", name) for name in names), arch
        code = subprocess.run(
            [tool("cuobjdump"), "-sass", "-arch", arch, library], capture_output=True, text=True
        ).stdout
        assert re.search(r"\bHMMA\b", code) and re.search(r"\bLDGSTS\b", code)
    listed = subprocess.run([tool("cuobjdump"), "--list-ptx", library], capture_output=True, text=True).stdout
    assert "sm_120" in listed


@pytest.mark.slow
@needs_nvcc
def test_it_loads_beside_any_torch_and_says_why_it_cannot_run(library):
    program = (
        "import ctypes, sys, torch; torch.ops.load_library(sys.argv[1]); torch.ops.sparse_prune.cuda_linear;"
        "f = ctypes.CDLL(sys.argv[1]).sparse_prune_cuda_problem; f.restype = ctypes.c_char_p; print(f())"
    )
    done = subprocess.run([sys.executable, "-c", program, str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if torch.version.cuda is None:
        assert "this torch was built without CUDA" in done.stdout
    elif not torch.cuda.is_available():
        assert "CUDA" in done.stdout and "None" not in done.stdout


def test_reasons():
    for device, dtype, block, reason in (
        ("cpu", torch.float16, (32, 32), "run on CUDA devices, not on cpu"),
        ("cuda", torch.float32, (32, 32), "take bfloat16 and float16, not float32"),
        ("cuda", torch.float16, (32, 8), "take blocks with sides 16, 32, 64 or 128, not 32x8"),
    ):
        with pytest.raises(sp.SparsePruneError, match=f"got 'cuda'; the CUDA kernels {reason}"):
            backend_for(device, dtype, "cuda", block)
    if not torch.cuda.is_available():
        with pytest.raises(sp.SparsePruneError, match="was not built|finds no CUDA device|does not load"):
            backend_for("cuda", torch.float16, "cuda")


@needs_nvcc
def test_backend_cuda_end_to_end(monkeypatch):
    """sp.bsr_linear(backend="cuda") with the operator played by the emulator, which runs what nvcc made of the kernels."""
    schema = re.findall(r'm\.def\(\s*((?:"[^"]*"\s*)+)\)', (ROOT / "csrc" / "cuda_ops.cpp").read_text())
    name, _, rest = "".join(re.findall(r'"([^"]*)"', schema[0])).partition("(")
    assert name == "cuda_linear"
    calls = []

    def emulated(x, packed, nnzb, block_rows, block_cols, out_features, bias, activation, residual):
        calls.append(packed.data_ptr())
        blocks = (nnzb, block_rows, block_cols)
        return cuda_kernels.linear(cuda_kernels.aligned(x), packed, blocks, out_features, bias, activation, residual)[0]

    scope = torch.library.Library("sparse_prune", "FRAGMENT")
    try:
        if not hasattr(torch.ops.sparse_prune, "cuda_linear"):
            scope.define(f"cuda_linear({rest}")
        scope.impl("cuda_linear", emulated, "CPU")
        monkeypatch.setattr(backends, "cuda_unavailable", lambda *_: None)
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(70, 100, generator=generator).bfloat16()
        mask = torch.rand(3, 4, generator=generator) < 0.6
        packed = sp.BsrWeight.from_dense(weight, mask, blocksize=(32, 32))
        bias, residual = torch.randn(70).bfloat16(), torch.randn(2, 3, 70).bfloat16()
        for tokens in (3, 50):
            x = torch.randn(2, tokens, 100, generator=generator).bfloat16()
            residual = torch.randn(2, tokens, 70, generator=generator).bfloat16()
            got = sp.bsr_linear(x, packed, bias, "relu", residual, backend="cuda")
            exact = F.relu(F.linear(x.double(), packed.to_dense().double(), bias.double())) + residual.double()
            torch.testing.assert_close(got.double(), exact, rtol=2**-7, atol=2**-7)
        assert len(calls) == 2 and calls[0] == calls[1], "the layout was not kept"
        packed.values.mul_(2)
        twice = sp.bsr_linear(x, packed, backend="cuda")
        torch.testing.assert_close(
            twice.double(), F.linear(x.double(), packed.to_dense().double()), rtol=2**-7, atol=2**-6
        )
        with pytest.raises(sp.SparsePruneError, match="backend: .*gradients are owed.*'cuda', which is for inference"):
            sp.bsr_linear(x.requires_grad_(), packed, backend="cuda")
    finally:
        scope._destroy()
