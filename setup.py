"""Builds the optional compiled parts; everything else about the package is in pyproject.toml.

SPARSE_PRUNE_CPU = auto (default): build the CPU kernels where torch and a C++ compiler are found, otherwise say so and go on;
1: fail when they cannot be built; 0: leave them out.

SPARSE_PRUNE_CUDA, the same for the CUDA kernels. They need nvcc (CUDA_HOME, or on the path), neither a GPU nor a CUDA build of
torch; but auto leaves them out beside a torch without CUDA, which has no tensors that they could read.
SPARSE_PRUNE_CUDA_ARCHS: architectures, "80;90;100;120+PTX" by default (those that nvcc knows, the last of them with +PTX); code for
80 also runs on 86 and 89, 90 brings the kernel for sm_90a, and +PTX lets younger GPUs compile for themselves.
MAX_JOBS: compilers side by side.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent
# Stable ABI: the oldest torch whose interface is used; one wheel then serves every later torch, and every Python from 3.10.
MACROS = [("TORCH_TARGET_VERSION", "0x020a000000000000")]
FLAGS = [
    "-O3",
    "-std=c++20",
    "-fno-math-errno",
    "-ffp-contract=off",  # what is multiplied and added is rounded alike wherever the compiler puts it
    "-falign-loops=64",
    "-fvisibility=hidden",
    "-Wno-maybe-uninitialized",
    "-g0",
]
ARCHS = "80;90;100;120"
CUDA_SOURCES = (
    "csrc/cuda/kernels_sm80.cu",
    "csrc/cuda/kernels_int8.cu",
    "csrc/cuda/kernels_e4m3.cu",
    "csrc/cuda/kernels_sdd.cu",
    "csrc/cuda/kernels_sm90.cu",
)
COMPILER_BYTES = 3 << 30  # memory that one nvcc may take: cicc and ptxas stay below 1 GB here


def mode(variable: str) -> str:
    value = os.environ.get(variable, "auto")
    if value not in ("auto", "1", "0"):
        sys.exit(f"{variable}: expected auto, 1 or 0, got {value!r}")
    return value


def no_extension() -> str | None:
    """Why nothing can be compiled here, or None."""
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


@cache
def cuda_home() -> Path | None:
    """The folder of the CUDA toolkit: CUDA_HOME, that of nvcc on the path, that of the wheels of the extra cuda-build, or None."""
    candidates = [Path(os.environ["CUDA_HOME"])] if os.environ.get("CUDA_HOME") else []
    nvcc = shutil.which("nvcc")
    if nvcc:
        shown = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
        candidates += [Path(found) for found in re.findall(r"#\$ TOP=(.+)", shown)]
    candidates += [Path(folder, "nvidia", "cu13") for folder in sys.path]
    return next((home.resolve() for home in candidates if (home / "bin" / "nvcc").exists()), None)


def no_cuda() -> str | None:
    """Why the CUDA kernels cannot be built here, or are not worth it under auto, or None."""
    import torch

    if cuda_home() is None:
        return "nvcc was not found: set CUDA_HOME, or install the extra cuda-build"
    if mode("SPARSE_PRUNE_CUDA") == "auto" and torch.version.cuda is None:
        return "this torch is built without CUDA; SPARSE_PRUNE_CUDA=1 builds them all the same"
    return None


def architectures(home: Path, source: str) -> list[str]:
    """What of SPARSE_PRUNE_CUDA_ARCHS, or of those of ARCHS that nvcc knows, a source is compiled for: "80", "120+PTX".

    kernels_sm90.cu uses instructions that one GPU alone has: it is compiled for "90a" where 90 is asked for, else for nothing.
    kernels_e4m3.cu needs 8.9: it is compiled for "89" in place of what is older.
    """
    asked = os.environ.get("SPARSE_PRUNE_CUDA_ARCHS", "")
    known = subprocess.run([home / "bin" / "nvcc", "--list-gpu-arch"], capture_output=True, text=True).stdout
    names = asked.split(";") if asked else [name for name in ARCHS.split(";") if f"compute_{name}" in known.split()]
    if names and not asked:
        names[-1] += "+PTX"
    if source.endswith("kernels_sm90.cu"):
        return ["90a"] * any(name.startswith("90") for name in names)
    if source.endswith("kernels_e4m3.cu"):
        names = ["89" if int(re.match(r"\d+", name)[0]) < 89 else name for name in names]
        return list(dict.fromkeys(names))
    return names


def nvcc_flags(home: Path, source: str) -> list[str]:
    """nvcc's flags for the architectures of a source."""
    flags = []
    for name in architectures(home, source):
        arch = name.removesuffix("+PTX")
        codes = [f"sm_{arch}", *([f"compute_{arch}"] if name.endswith("+PTX") else [])]
        flags.append(f"-gencode=arch=compute_{arch},code=[{','.join(codes)}]")
    return flags or ["-DSPARSE_PRUNE_WITHOUT_SM90A"]  # its launcher alone, which then says so


def contents(home: Path) -> str:
    """What is compiled for what, for `sparse-prune doctor`: one line for each source."""
    lines = []
    for source in CUDA_SOURCES:
        names = [f"sm_{name.replace('+', ' and ')}" for name in architectures(home, source)]
        lines.append(f"{Path(source).stem} for {', '.join(names) or 'nothing'}")
    version = re.search(
        r"V([\d.]+)", subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True).stdout
    )
    return f"nvcc {version[1] if version else 'of unknown version'}; {'; '.join(lines)}"


def jobs() -> int:
    """Compilers side by side: as many as MAX_JOBS, processors and memory allow."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    asked = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    return max(1, min(asked, memory // COMPILER_BYTES))


def tell(what: str, reason: object, instead: str) -> None:
    print(f"sparse-prune: the {what} kernels were not built ({reason}); {instead}", file=sys.stderr)


def extensions() -> dict:
    """Arguments of setup() for what can be built; says what cannot, or stops where it was asked for."""
    wanted, reason = {}, no_extension()
    for what, variable, instead, why in (
        ("CPU", "SPARSE_PRUNE_CPU", "plain PyTorch will run instead.", lambda: None),
        ("CUDA", "SPARSE_PRUNE_CUDA", "on a GPU Triton's will run instead.", no_cuda),
    ):
        missing = reason or (why() if mode(variable) != "0" else None)
        if mode(variable) == "1" and missing:
            sys.exit(f"{variable}=1, but the {what} kernels cannot be built: {missing}")
        if mode(variable) == "0" or missing:
            if mode(variable) == "0" and what == "CPU" or mode(variable) == "auto":
                tell(what, missing or f"{variable}=0", instead)
            continue
        wanted[what] = (variable, instead)
    if not wanted:
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    modules = {}
    if "CPU" in wanted:
        modules["CPU"] = CppExtension(
            "sparse_prune._C_cpu",
            ["csrc/cpu_ops.cpp", "csrc/encoder_ops.cpp", "csrc/operators.cpp", *found("csrc/cpu/*.cpp")],
            depends=["csrc/checks.h", *found("csrc/cpu/*.h")],
            define_macros=MACROS,
            extra_compile_args=FLAGS,
            py_limited_api=True,
        )
    if "CUDA" in wanted:
        modules["CUDA"] = CppExtension(
            "sparse_prune._C_cuda",
            ["csrc/cuda_ops.cpp", *found("csrc/cuda/*.cpp")],
            depends=["csrc/checks.h", *found("csrc/cuda/*")],
            define_macros=[*MACROS, ("SPARSE_PRUNE_CUDA_CONTENTS", f'"{contents(cuda_home())}"')],
            extra_compile_args=FLAGS,
            # The runtime goes in: what is left to find at run time is the driver, and torch.
            extra_link_args=[
                *(f"-L{cuda_home() / lib}" for lib in ("lib64", "lib")),
                "-lcudart_static",
                "-ldl",
                "-lrt",
                "-lpthread",
            ],
            py_limited_api=True,
        )

    class BuildKernels(BuildExtension):
        """Compiles .cu files, which know nothing of torch, by nvcc; under auto a failed build becomes one sentence."""

        def build_extensions(self) -> None:
            every = list(self.extensions)
            for what, module in modules.items():
                variable, instead = wanted[what]
                self.extensions = [module]
                try:
                    if what == "CUDA":
                        module.extra_objects = compile_cuda(ROOT / "build" / "cuda")
                    super().build_extensions()
                except Exception as error:
                    if mode(variable) == "1":
                        raise
                    tell(what, error, instead)
                    every.remove(module)
                    if self.inplace or getattr(
                        self, "editable_mode", False
                    ):  # what an earlier build left is not these sources
                        (ROOT / self.get_ext_filename(module.name)).unlink(missing_ok=True)
            self.extensions = every

    return {
        "ext_modules": list(modules.values()),
        "cmdclass": {"build_ext": BuildKernels},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def found(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


def compile_cuda(folder: Path) -> list[str]:
    """Objects of CUDA_SOURCES in folder; those that are younger than every source stay."""
    home = cuda_home()
    folder.mkdir(parents=True, exist_ok=True)
    newest = max(path.stat().st_mtime for path in [*ROOT.glob("csrc/cuda/*"), ROOT / "setup.py"])
    flags = ["-O3", "-std=c++17", "-lineinfo", "-DNDEBUG", "-Xcompiler=-fPIC,-fvisibility=hidden"]

    def build(source: Path) -> str:
        made = folder / f"{source.stem}.o"
        command = [home / "bin" / "nvcc", *flags, *nvcc_flags(home, str(source)), "-c", source, "-o", made]
        written = made.with_suffix(".command")
        text = " ".join(map(str, command))
        current = made.exists() and made.stat().st_mtime > newest and written.exists() and written.read_text() == text
        if not current:
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{text}\n{done.stderr[-4000:]}")
            written.write_text(text)
        return str(made)

    with ThreadPoolExecutor(jobs()) as pool:
        return list(pool.map(build, (ROOT / source for source in CUDA_SOURCES)))


if __name__ == "__main__":  # tests ask for the functions
    from setuptools import setup

    setup(**extensions())
