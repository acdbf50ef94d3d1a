"""What all tests share: one thread count, and tensors that start as NaN so that an unwritten output shows."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import built
import hypothesis
import pytest
import torch

os.environ["SPARSE_PRUNE_TUNING"] = "off"  # kernels are what tests test; tests of the planner choose a table
os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported: no test asks a hub
# Several test processes (`make test`) share the cores; what depends on threads sets their number itself.
torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))

# A busy machine makes any deadline a coin toss.
hypothesis.settings.register_profile("any-speed", deadline=None)
hypothesis.settings.load_profile("any-speed")


# Files with a few tests of minutes each. `make test` shares files between processes: one of these begun last would run on alone.
LONG = (
    "test_sanitizers.py",
    "test_cuda_extension.py",
    "test_distributed.py",
    "test_export.py",
    "test_task_training.py",
)


def pytest_collection_modifyitems(items):
    """LONG files first, in that order, then those with most tests; of all one in SPARSE_PRUNE_SAMPLE, always the same ones."""
    sample = int(os.environ.get("SPARSE_PRUNE_SAMPLE", "1"))
    items[:] = [item for item in items if zlib.crc32(item.name.encode()) % sample == 0]
    tests = Counter(item.path for item in items)
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: (places.get(item.path.name, len(LONG)), -tests[item.path]))


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


@pytest.fixture
def run(monkeypatch, capsys):
    """run(*arguments) -> (exit code, what was printed to stdout and stderr)."""

    from sparse_prune import cli

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["sparse-prune", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
            sys.exit(0)
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out + captured.err

    return call


@pytest.fixture(scope="session")
def harness():
    """The functions of amx_harness.cpp with kernels as setup.py compiles them ("native"), and with bf16's tiles "counted".

    What the processor lacks of AMX and AVX512-BF16 is carried out by trap.cpp ("trap").
    """
    from sparse_prune import backends

    if sys.platform != "linux" or "avx512" not in backends.cpu_isas():
        pytest.skip("the AMX and AVX512-BF16 kernels need AVX-512, and their traps Linux: not this processor or build")
    compiler = built.compiler()
    if not shutil.which(compiler[0]):
        pytest.skip("no C++ compiler")
    tests = Path(__file__).parent
    kernels = tests.parent / "csrc" / "cpu"
    shipped = ["-O3", "-fno-math-errno", "-ffp-contract=off"]
    # What takes longest first.
    common = ("avx512_bf16_int8", "avx512_bf16", "avx512", "amx_int8", "activation_tables", "scratch")
    jobs = [(name, kernels / f"{name}.cpp", shipped) for name in (*common, "amx_bf16")]
    jobs += [("counted", kernels / "amx_bf16.cpp", [*shipped, "-DSPARSE_PRUNE_COUNT_TILES"])]
    jobs += [("door", tests / "amx_harness.cpp", ["-O1"]), ("trap", tests / "trap.cpp", ["-O3", "-mavx2", "-mfma"])]
    libraries = {"trap": ["trap"], "native": ["door", *common, "amx_bf16"], "counted": ["door", *common, "counted"]}

    def make(folder):
        def compile_one(name, source, flags):
            command = [*compiler, "-std=c++20", "-w", "-fPIC", *flags, "-c", source, "-o", folder / f"{name}.o"]
            subprocess.run(command, check=True)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda job: compile_one(*job), jobs))
        for name, parts in libraries.items():
            objects = [folder / f"{part}.o" for part in parts]
            subprocess.run([*compiler, "-shared", "-o", folder / f"{name}.so", *objects], check=True)

    sources = [*sorted(kernels.iterdir()), *sorted(tests.glob("*.cpp")), repr((shipped, libraries))]
    folder = built.built("harness", sources, make)
    loaded = {"trap": ctypes.CDLL(str(folder / "trap.so"))}
    loaded["trap"].trap_install()
    return loaded | {name: ctypes.CDLL(str(folder / f"{name}.so")) for name in ("native", "counted")}
