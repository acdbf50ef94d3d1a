"""The types that py.typed promises, as a user's type checker sees them; `make test` checks the package itself."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import sparse_prune

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = Path(__file__).with_name("typed_program.py")


def _mypy(program: Path) -> list[str]:
    """What mypy says of a program that imports the installed package, with the settings and the cache that `make test` uses."""
    pytest.importorskip("mypy", reason="mypy, of the extra test, is not installed")
    package = Path(sparse_prune.__file__).parent
    # Where the package is installed editable, its finder tells Python where it lies, but not mypy.
    path = {"MYPYPATH": str(package.parent)} if package.parent == ROOT else {}
    cache = ("--cache-dir", str(ROOT / ".mypy_cache"), "--config-file", str(ROOT / "pyproject.toml"))
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *cache, str(program)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | path,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return [
        line for line in done.stdout.splitlines() if program.name in line
    ]  # what `make test` finds in the package is its own


def test_a_users_program_checks_and_runs():
    assert _mypy(PROGRAM) == []
    runpy.run_path(str(PROGRAM))


def test_the_program_can_fail(tmp_path):
    wrong = PROGRAM.read_text().replace("assert_type(packed.density, float)", "assert_type(packed.density, int)")
    wrong = wrong.replace('density="0.5")', "density=0.5)")
    (tmp_path / "wrong.py").write_text(wrong)
    first, second = _mypy(tmp_path / "wrong.py")
    assert 'Expression is of type "float", not "int"' in first
    assert 'Unused "type: ignore" comment' in second
