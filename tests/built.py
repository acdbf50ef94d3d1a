"""What tests compile, kept in the user's cache by its content: built once, by whichever test process asks first."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from filelock import FileLock


def compiler() -> list[str]:
    """The command of the C++ compiler: CXX, else c++."""
    return (os.environ.get("CXX") or "c++").split()


@functools.cache
def _version(command: tuple[str, ...]) -> str:
    return subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout


def built(
    kind: str, sources: Iterable[str | bytes | Path], make: Callable[[Path], None], command: Iterable[str] | None = None
) -> Path:
    """The directory that make(directory) has filled, for the same sources once only; *.o are not kept, and nothing if make raises.

    sources: files (by their contents), flags and other text, all that the result depends on besides the compiler (command; None:
    compiler()) and the kind of machine.
    """
    key = hashlib.sha256(repr((_version(tuple(command or compiler())), platform.machine())).encode())
    for source in sources:
        part = (
            source.read_bytes()
            if isinstance(source, Path)
            else source
            if isinstance(source, bytes)
            else source.encode()
        )
        key.update(hashlib.sha256(part).digest())
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparse-prune" / kind
    root.mkdir(parents=True, exist_ok=True)
    directory = root / key.hexdigest()[:24]
    with FileLock(f"{directory}.lock"):
        if not directory.exists():
            with tempfile.TemporaryDirectory(dir=root) as made:
                whole = Path(made) / "whole"
                whole.mkdir()
                make(whole)
                for rest in whole.glob("*.o"):
                    rest.unlink()
                whole.rename(directory)
    return directory


def library(kind: str, sources: Iterable[Path], flags: Iterable[str], headers: Iterable[Path] = ()) -> ctypes.CDLL:
    """One library of C++ sources, which include headers (all files that it depends on), by compiler() with flags."""
    sources, flags = list(sources), [*flags, "-fPIC", "-shared"]

    def make(folder: Path) -> None:
        subprocess.run([*compiler(), *flags, *sources, "-o", folder / "library.so"], check=True)

    return ctypes.CDLL(str(built(kind, [*sources, *headers, *flags], make) / "library.so"))
