"""`make wheel`: build the wheel, audit it, and run the tests against it, installed beside each torch of a list.

usage: python tests/check_wheel.py [--cuda] [--cpu-only] [TORCH ...]      such as 2.10.0; "newest" is the newest that pip offers

A torch without a CPU wheel in reach comes as its CUDA build, of some gigabytes. --cpu-only installs none: such a wheel is fetched
and its libraries are only asked whether they define every symbol that ours need.

The wheel goes to dist/. It must be abi3, need no symbol of libtorch outside the stable C interface, none of Python's and no CUDA
library, and fit a manylinux tag, which `auditwheel repair` gives it (leaving torch's own libraries to torch). With --cuda
(`make wheel-cuda`) it holds the CUDA kernels too, goes to dist/cuda/, and is loaded beside each torch, not tested: it needs no GPU.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Undefined symbols that the library may have beside versioned ones of libc, libm, libstdc++ and libgcc: torch's C interface, the
# linker's own, and std:: ones that the linker found in libtorch first, without a version; libstdc++ has them too.
ALLOWED = re.compile(r"(aoti_torch_|torch_|_ITM_)\w+|__gmon_start__|_ZN[KRO]*St\w+")
TORCH_LIBRARIES = ("libc10.so", "libtorch.so", "libtorch_cpu.so")


def run(*command: object, **options) -> str:
    """Run a command, and return what it printed; stops with its output where it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def foreign_symbols(listing: str) -> list[str]:
    """Symbols in the output of `nm -D --undefined-only` that belong to no stable interface."""
    names = [line.split()[-1] for line in listing.splitlines() if line.strip()]
    # a version (name@GLIBC_2.14) comes from a library that promises to keep it
    return [name for name in names if "@" not in name and not ALLOWED.fullmatch(name)]


def audit(wheel: Path, cuda: bool = False) -> list[str]:
    """What is wrong with a wheel, in words; empty where nothing is. cuda: whether it should hold the CUDA kernels."""
    problems = [] if "-abi3-" in wheel.name else [f"{wheel.name} is not tagged abi3"]
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        libraries = sorted(Path(folder).rglob("*.so"))
        names = {library.name.split(".")[0] for library in libraries}
        for name, wanted in (("_C_cpu", True), ("_C_cuda", cuda)):
            if (name in names) != wanted:
                problems.append(f"the wheel holds {'no' if wanted else 'a'} {name}")
        for library in libraries:
            found = foreign_symbols(run("nm", "-D", "--undefined-only", library))
            problems += [f"{library.name} needs {name}, which is not in the stable interface" for name in found]
            needed = re.findall(r"NEEDED.*\[(.+)\]", run("readelf", "-d", library))
            problems += [f"{library.name} links {name}" for name in needed if "python" in name or "cuda" in name]
    return problems


def build(out: Path, cuda: bool = False) -> Path:
    """The repaired wheel in out."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"SPARSE_PRUNE_CPU": "1", "SPARSE_PRUNE_CUDA": "1" if cuda else "0"}
        pip = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation")
        run(*pip, "-w", folder, ROOT, env=environment)
        (wheel,) = Path(folder).glob("*.whl")
        exclude = [part for name in TORCH_LIBRARIES for part in ("--exclude", name)]
        out.mkdir(parents=True, exist_ok=True)
        before = set(out.glob("*.whl"))
        run(sys.executable, "-m", "auditwheel", "repair", *exclude, "-w", folder + "/repaired", wheel)
        (repaired,) = Path(folder, "repaired").glob("*.whl")
        for old in before:
            old.unlink()
        return Path(shutil.copy(repaired, out))


def needed_symbols(wheel: Path, folder: Path) -> set[str]:
    """The symbols of torch's C interface that the wheel's libraries want."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    listings = (run("nm", "-D", "--undefined-only", library) for library in folder.rglob("*.so"))
    names = {line.split()[-1] for listing in listings for line in listing.splitlines() if line.strip()}
    return {name for name in names if name.startswith(("aoti_torch_", "torch_"))}


def compare_symbols(wheel: Path, torch: str) -> str:
    """Whether the libraries of a torch that is fetched, not installed, define what the wheel needs; stops where one is missing."""
    with tempfile.TemporaryDirectory() as folder:
        needed = needed_symbols(wheel, Path(folder, "ours"))
        wanted = "torch" if torch == "newest" else f"torch=={torch}"
        run(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, wanted)
        (fetched,) = Path(folder).glob("torch-*.whl")
        defined: set[str] = set()
        with zipfile.ZipFile(fetched) as archive:
            for name in TORCH_LIBRARIES:
                library = archive.extract(f"torch/lib/{name}", folder)
                listing = run("nm", "-D", "--defined-only", library)
                defined |= {line.split()[-1].partition("@")[0] for line in listing.splitlines() if line.strip()}
        missing = sorted(needed - defined)
        if missing or not needed:
            sys.exit(f"{fetched.name} does not define {', '.join(missing) or 'anything: the wheel needs no torch'}")
        version = fetched.name.split("-")[1]
        return f"torch {version}: defines all {len(needed)} symbols that the wheel needs; not installed, no test run"


def environment(folder: Path, torch: str, cpu_only: bool = False) -> Path | None:
    """The Python of a clean environment in folder that has that torch; None under cpu_only where pip offers no CPU wheel of it."""
    venv.create(folder / "env", with_pip=True)
    python = folder / "env/bin/python"
    pip = (python, "-m", "pip", "install", "-q")
    wanted = "torch" if torch == "newest" else f"torch=={torch}"
    light = subprocess.run([*map(str, pip), f"{wanted}+cpu"], capture_output=True) if torch != "newest" else None
    if light is None or light.returncode:
        if cpu_only:
            return None
        run(*pip, wanted)
    run(*pip, "setuptools>=77")  # for the tests of setup.py
    return python


def version_of(python: Path) -> str:
    return run(python, "-c", "import torch; print(torch.__version__)").strip()


def test_installed(wheel: Path, torch: str, cpu_only: bool) -> str:
    """Run the quick tests in a clean environment that has the wheel and that torch; returns pytest's last line.

    Under cpu_only symbols are compared where pip offers no CPU wheel.
    """
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        python = environment(home, torch, cpu_only)
        if python is None:
            return compare_symbols(wheel, torch)
        run(python, "-m", "pip", "install", "-q", f"sparse-prune[nlp,report,test] @ {wheel.as_uri()}")
        for name in run("git", "ls-files", cwd=ROOT).split():
            if not name.startswith(("sparse_prune/", "kernels/")):  # those come from the wheel
                (home / "work" / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, home / "work" / name)
        pytest = (python, "-m", "pytest", "-q", "-n", os.environ.get("MAX_JOBS", "2"), "--dist", "loadfile")
        tests = run(*pytest, "-m", "not slow", "-p", "no:cacheprovider", cwd=home / "work")
        return f"torch {version_of(python)}: {tests.strip().splitlines()[-1]}"


def load_installed(wheel: Path, torch: str, cpu_only: bool) -> str:
    """What sp.show_config() tells of the CUDA kernels in a clean environment that has the wheel and that torch.

    Under cpu_only symbols are compared where pip offers no CPU wheel.
    """
    with tempfile.TemporaryDirectory() as folder:
        python = environment(Path(folder), torch, cpu_only)
        if python is None:
            return compare_symbols(wheel, torch)
        run(python, "-m", "pip", "install", "-q", f"sparse-prune @ {wheel.as_uri()}")
        shown = run(python, "-c", "import sparse_prune as sp; sp.show_config()", cwd=folder)
        line = next(line for line in shown.splitlines() if line.startswith("cuda "))
        if "kernels_sm90 for sm_90a" not in line:
            sys.exit(f"torch {version_of(python)} does not load the CUDA kernels: {line}")
        return f"torch {version_of(python)}: {line}"


def main(arguments: list[str]) -> None:
    cuda, cpu_only = "--cuda" in arguments, "--cpu-only" in arguments
    wheel = build(ROOT / "dist" / "cuda" if cuda else ROOT / "dist", cuda)
    problems = audit(wheel, cuda)
    if problems:
        sys.exit("\n".join(problems))
    print(f"{wheel.relative_to(ROOT)}: abi3, stable ABI only, {wheel.stat().st_size / 1e6:.2f} MB", flush=True)
    for version in arguments:
        if version not in ("--cuda", "--cpu-only"):
            print((load_installed if cuda else test_installed)(wheel, version, cpu_only), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
