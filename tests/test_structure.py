"""The shape of the package: imports point down only, and importing it stays light."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import sparse_prune

PACKAGE = Path(sparse_prune.__file__).parent
LAYERS = [
    ("cli", "__main__"),
    ("tasks", "models", "integrations"),
    ("recipes",),
    ("gpu_tuning",),
    ("gpu_bounds", "gpu_bench"),
    ("convert", "serialization", "report", "charts", "benchmark", "benchmark_model", "peers", "tuning"),
    ("fuse",),
    ("layers", "pruner", "distill"),
    ("masked",),
    ("ops",),
    ("tiles",),
    ("planner",),
    ("backends",),
    ("reference", "criteria", "bsr", "heads", "refit", "linears"),
    ("masks", "schedules"),
    ("errors",),
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def _imports(path: Path) -> set[str]:
    """Top-level sparse_prune modules that a file imports."""
    found = set()
    package = ("sparse_prune", *path.relative_to(PACKAGE).parent.parts)
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
    package = Path(importlib.util.find_spec("sparse_prune_kernels").origin).parent
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert "sparse_prune" not in {name.partition(".")[0] for name in names}, path


def test_import_is_light():
    heavy = {
        "transformers",
        "triton",
        "matplotlib",
        "jinja2",
        "rich",
        "typer",
        "tokenizers",
        "snownlp",
        "accelerate",
        "peft",
    }
    code = "import torch, sys; before = set(sys.modules); import sparse_prune; print(*set(sys.modules) - before)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not heavy & {name.partition(".")[0] for name in loaded}
    assert "torch._dynamo" not in loaded, "which takes a second"


def test_the_cpp_takes_no_macro_that_torch_2_10_lacks():
    """Headers of a younger torch, which CI compiles with, let it pass (`make wheel` compiles beside the oldest)."""
    sources = [path for path in (Path(__file__).parents[1] / "csrc").rglob("*") if path.suffix in (".cpp", ".h", ".cu")]
    assert sources and not [path for path in sources if "STABLE_TORCH_ERROR_CODE_CHECK" in path.read_text()]
