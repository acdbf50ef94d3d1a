"""Builds the optional compiled part; everything else about the package is in pyproject.toml.

SPARSE_PRUNE_CPU = auto (default): build the CPU kernels where torch and a C++ compiler are found, otherwise say so and go on;
1: fail when they cannot be built; 0: leave them out.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import setup

MODE = os.environ.get("SPARSE_PRUNE_CPU", "auto")
if MODE not in ("auto", "1", "0"):
    sys.exit(f"SPARSE_PRUNE_CPU: expected auto, 1 or 0, got {MODE!r}")
ROOT = Path(__file__).resolve().parent


def unavailable() -> str | None:
    """Why the CPU kernels cannot be built here, or None."""
    if MODE == "0":
        return "SPARSE_PRUNE_CPU=0"
    if sys.platform == "win32":
        return "they are written for GCC and Clang"
    try:
        import torch
    except ImportError:
        return "torch is not importable during the build: install it first and build with --no-build-isolation"
    if tuple(int(v) for v in torch.__version__.split("+")[0].split(".")[:2]) < (2, 10):
        return f"torch {torch.__version__} is older than 2.10, the first with the stable C++ interface"
    compiler = os.environ.get("CXX", "c++").split()
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / "probe.cpp"
        probe.write_text("#include <string>\nint main() { return std::string().size(); }\n")
        command = [*compiler, "-std=c++20", "-o", str(probe.with_suffix("")), str(probe)]
        try:
            result = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            return f"no C++ compiler: {error}"
    return None if result.returncode == 0 else f"{compiler[0]} cannot build a C++20 program"


def tell(reason: object) -> None:
    print(f"sparse-prune: the CPU kernels were not built ({reason}); plain PyTorch will run instead.", file=sys.stderr)


reason = unavailable()
if reason is None:
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class BuildKernels(BuildExtension):
        """Under SPARSE_PRUNE_CPU=auto, turns a failed build into one sentence."""

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                if MODE == "1":
                    raise
                tell(error)
                self.extensions.clear()

    kernels = CppExtension(
        "sparse_prune._C_cpu",
        [
            "csrc/cpu_ops.cpp",
            "csrc/encoder_ops.cpp",
            "csrc/operators.cpp",
            *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cpu/*.cpp")),
        ],
        depends=["csrc/checks.h", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cpu/*.h"))],
        # The oldest torch whose interface is used: one wheel then serves every later torch, and every Python from 3.10.
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
        extra_compile_args=[
            "-O3",
            "-std=c++20",
            "-fno-math-errno",
            "-fvisibility=hidden",
            "-Wno-maybe-uninitialized",
            "-g0",
        ],
        py_limited_api=True,
    )
    setup(
        ext_modules=[kernels],
        cmdclass={"build_ext": BuildKernels},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
else:
    if MODE == "1":
        sys.exit(f"SPARSE_PRUNE_CPU=1, but the CPU kernels cannot be built: {reason}")
    if MODE == "auto":
        tell(reason)
    setup()
