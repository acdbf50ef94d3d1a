"""The example with the article's network: it trains, both methods prune it, and the table says so."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sparse_prune

ROOT = Path(sparse_prune.__file__).parents[1]
EXAMPLE = Path(__file__).parents[1] / "examples" / "article_net.py"


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, EXAMPLE, *arguments], capture_output=True, text=True, env=environment)


def test_article_network():
    pytest.importorskip("snownlp")
    done = run("--density", "0.1")
    assert done.returncode == 0, done.stderr
    untrained = float(re.search(r"accuracy ([0-9.]+)", done.stdout)[1])
    rows = {
        name: [float(number) for number in re.findall(r"\d+\.\d+|\d+", line.partition("│")[2].partition("│")[2])]
        for line in done.stdout.splitlines()
        for name in ("dense", "threshold", "gradient-based")
        if f"│ {name}" in line
    }
    full, dense = rows["dense"]
    assert full == 1.0 and dense > 0.75 > 0.6 > untrained
    for name in ("threshold", "gradient-based"):
        alpha, density, pruned, tuned = rows[name]
        assert alpha > 0 and density == pytest.approx(0.1, abs=0.001)
        assert 0.4 < pruned <= 1 and tuned > dense - 0.04


def test_bad_density():
    pytest.importorskip("snownlp")
    done = run("--density", "0")
    assert done.returncode == 2 and done.stderr.startswith("density: expected") and "Traceback" not in done.stderr
