"""The shape of the package: imports point down only, and importing it stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sparse_prune

PACKAGE = Path(sparse_prune.__file__).parent
LAYERS = [
    ("cli", "__main__"),
    ("tasks", "models", "integrations"),
    ("convert", "serialization", "report", "charts", "benchmark"),
    ("layers", "pruner", "distill"),
    ("ops",),
    ("backends",),
    ("reference", "criteria", "bsr", "heads"),
    ("masks", "schedules"),
    ("errors",),
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def _imports(path: Path, root: Path = PACKAGE) -> set[str]:
    """Top-level sparse_prune modules that a file of the package at root imports."""
    found = set()
    package = (root.name, *path.relative_to(root).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            targets = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            parts = target.split(".")
            if parts[0] == "sparse_prune" and len(parts) > 1 and parts[1] in LEVEL:
                found.add(parts[1])
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    top = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if top == "__init__":
        return
    assert top in LEVEL, f"{top} has no place in DESIGN.md's order"
    for imported in _imports(path):
        same = imported == top or LEVEL[imported] >= LEVEL[top]
        assert same, f"{top} imports {imported}, which stands above it"


def test_kernels_import_nothing_of_ours():
    root = PACKAGE.parent / "kernels" / "sparse_prune_kernels"
    paths = list(root.rglob("*.py"))
    assert paths
    for path in paths:
        assert not _imports(path, root) and "sparse_prune." not in path.read_text().replace("sparse_prune_kernels", "")


def test_import_is_light():
    heavy = {"transformers", "triton", "matplotlib", "jinja2", "rich", "typer", "tokenizers", "snownlp"}
    code = "import torch, sys; before = set(sys.modules); import sparse_prune; print(*set(sys.modules) - before)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not heavy & {name.partition(".")[0] for name in loaded}
