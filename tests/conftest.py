"""What all tests share: one thread count, and tensors that start as NaN so that an unwritten output shows."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import hypothesis
import pytest
import torch

os.environ["SPARSE_PRUNE_TUNING"] = "off"  # kernels are what tests test; tests of the planner choose a table
os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported: no test asks a hub

# A busy machine makes any deadline a coin toss.
hypothesis.settings.register_profile("any-speed", deadline=None)
hypothesis.settings.load_profile("any-speed")


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """torch.empty gives NaN: deterministic mode fills it, and only warns where an op has no deterministic form."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def amx(tmp_path_factory):
    """The AMX kernels with their tiles emulated in plain C++: the functions of amx_harness.cpp."""
    from sparse_prune import backends

    if "avx512_bf16" not in backends.cpu_isas():
        pytest.skip("the AMX kernels leave few rows to avx512_bf16, which this processor or build lacks")
    compiler = (os.environ.get("CXX") or "c++").split()
    if not shutil.which(compiler[0]):
        pytest.skip("no C++ compiler")
    tests = Path(__file__).parent
    library = tmp_path_factory.mktemp("amx") / "amx.so"
    names = ("activation_tables", "amx_bf16", "amx_int8", "avx512_bf16", "avx512_bf16_int8", "scratch")
    sources = [tests / "amx_harness.cpp", *(tests.parent / "csrc" / "cpu" / f"{name}.cpp" for name in names)]
    flags = ["-std=c++20", "-O1", "-w", "-ffp-contract=off", "-fPIC", "-shared", "-DSPARSE_PRUNE_EMULATE_AMX"]
    subprocess.run([*compiler, *flags, "-o", library, *sources], check=True)
    return ctypes.CDLL(str(library))
