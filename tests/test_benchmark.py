"""bench linear keeps its rows, measures again what another build measured, and refuses wrong results; timings are not judged."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cpu_isas import needs_kernels

import sparse_prune as sp
from sparse_prune import backends, benchmark, planner
from sparse_prune import peers as runtimes

GRID = {
    "shapes": [(64, 96)],
    "tokens": [1, 8],
    "densities": [0.5],
    "blocksizes": [(32, 32)],
    "dtypes": ["float32"],
    "threads": [1],
}


def test_rows_are_kept_and_a_run_goes_on(tmp_path, monkeypatch):
    keep, problems = tmp_path / "b" / "linear.jsonl", benchmark.linear_problems(**GRID)
    timed = []
    real = benchmark._time_linear
    monkeypatch.setattr(
        benchmark, "_time_linear", lambda problem, *rest: timed.append(problem["M"]) or real(problem, *rest)
    )
    first = benchmark.bench_linear(problems[:1], 0, keep)
    keep.write_text(keep.read_text() + '{"problem": {"K"')  # stopped while a row was being written
    rows = benchmark.bench_linear(problems, 0, keep)
    assert timed == [1, 8] and rows[0] == first[0]
    assert [json.loads(line)["row"]["M"] for line in keep.read_text().splitlines()] == [1, 8]
    monkeypatch.setattr(backends, "cpu_build", lambda: "another")
    benchmark.bench_linear(problems, 0, keep)
    assert timed == [1, 8, 1, 8], "rows of another build are not this one's"


def test_a_row_says_what_was_compared():
    (row,) = benchmark.bench_linear(benchmark.linear_problems(**GRID | {"tokens": [8]}), 0)
    assert {"sparse", "dense"} <= set(row["us"]) and row["build"] == backends.cpu_build() and row["threads"] == 1
    best = min(us for name, us in row["us"].items() if name in ("dense", "dense_prepacked"))
    assert row["speedup"] == pytest.approx(best / row["us"]["sparse"])
    assert row["share"] == pytest.approx(row["speedup"] * row["density"])
    if backends.cpu_isas():
        limit, moved = row["limits"], 3 * 32 * 32 * 4 + 4 * (4 + 3) + 4 * (8 * 64 + 8 * 96)
        bound = max(2 * 8 * 64 * 96 * 0.5 / limit["gflops"], moved / limit["cached_gbytes_per_s"]) / 1e3
        assert row["roofline"] == pytest.approx(bound / row["us"]["sparse"])


@pytest.mark.parametrize("dtype", benchmark.QUANTIZATIONS)
def test_quantized_is_compared_with_bfloat16(dtype):
    (row,) = benchmark.bench_linear(benchmark.linear_problems(**GRID | {"tokens": [8], "dtypes": [dtype]}), 0)
    assert {"sparse", "sparse_bf16", "dense"} <= set(row["us"]) and row["dtype"] == dtype
    assert 0.001 < row["error"] < benchmark.QUANTIZED_ERROR[dtype], "rounded, and no further"


@needs_kernels
def test_auto_is_timed_where_it_runs_dense():
    problems = benchmark.linear_problems(**GRID | {"tokens": [8]})
    plan = planner.Plan((), (planner.Choice(1, "plain", 2.0, "a test"),))
    for found, runs in ((plan, "dense: a test"), (None, f"cpu:{backends.cpu_isa(torch.float32)}")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(planner, "plan", lambda *_, found=found: found)
            (row,) = benchmark.bench_linear(problems, 0)
        assert row["auto"] == runs and ("auto" in row["us"]) == (found is not None)
        assert row["auto_speedup"] == pytest.approx(row["speedup"]) or found is not None


def test_a_wrong_result_is_refused(monkeypatch):
    real = sp.SparseLinear.forward
    monkeypatch.setattr(sp.SparseLinear, "forward", lambda self, x: real(self, x) * 1.001)
    with pytest.raises(ArithmeticError, match="sparse is wrong at M=1 K=64 N=96 float32"):
        benchmark.bench_linear(benchmark.linear_problems(**GRID), 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtypes": ["float8"]}, "dtypes: expected names among float32"),
        ({"densities": [1.5]}, "density: expected"),
        ({"tokens": [0]}, "grid: expected positive sizes"),
    ],
)
def test_a_wrong_grid_is_told(change, message):
    with pytest.raises(sp.SparsePruneError, match=message):
        benchmark.linear_problems(**GRID | change)


@needs_kernels
def test_limits_are_measured_for_every_instruction_set():
    for isa in backends.cpu_isas():
        assert backends.peak_flops(isa) > 0
    assert backends.peak_flops("unknown") == 0
    data = torch.zeros(1 << 16)
    assert backends.read_bytes_per_second(data) > 0
    both = backends.together(2, lambda: 1.5)
    assert both == 3.0


def test_medians_run_each_candidate_and_drop_what_has_no_hope():
    runs = []
    ticks = iter(range(10**6))

    def wait(name, ticks_needed):
        return lambda: runs.append(name) or [next(ticks) for _ in range(ticks_needed)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark.time, "perf_counter", lambda: float(next(ticks)))
        found = benchmark.interleaved_medians({"first": wait("first", 1), "slow": wait("slow", 50)}, 0.0, hopeless=8)
    assert runs.count("slow") == 2 and runs.count("first") == 7
    assert found == {"first": 2.0, "slow": 51.0}


@pytest.fixture
def peers(tmp_path):
    """A folder like that of `make peers`, with an engine that multiplies by numpy, and fails or dies when the dtype asks for it."""
    folder = tmp_path / "peers"
    (folder / "numpy" / "bin").mkdir(parents=True)
    (folder / "numpy" / ".installed").touch()
    python = folder / "numpy" / "bin" / "python"  # that runs the file below in the place of sparse_prune/peers.py
    python.write_text(f'#!/bin/sh\nshift\nexec "{sys.executable}" "{folder}/peers.py" "$@"\n')
    python.chmod(0o755)
    source = Path(runtimes.__file__).read_text()
    cut = source.index('if __name__ == "__main__":')
    engine = """
def _numpy(options, inputs):
    import onnx, onnx.numpy_helper
    if options["dtype"] == "float16":
        raise ValueError("no float16 here")
    if options["dtype"] == "bfloat16":
        os._exit(3)
    held = onnx.load(options["model"]).graph.initializer
    w, b = (onnx.numpy_helper.to_array(tensor) for tensor in held)
    print("a greeting on stdout")
    return lambda: [inputs["x"] @ w + b * options["threads"]]


"""
    (folder / "peers.py").write_text(source[:cut] + engine + source[cut:])
    return folder


def test_an_engine_in_its_own_process_is_checked_and_timed(peers, monkeypatch):
    problems = benchmark.linear_problems(**GRID)
    with benchmark.engines(peers) as found:
        assert [engine.runtime for engine in found] == ["numpy"] and found[0].version == np.__version__
        rows = benchmark.bench_linear(problems, 0, None, peers=found)
        assert all(row["us"]["numpy"] > 0 and row["engines"] == {"numpy": found[0].version} for row in rows)
        with monkeypatch.context() as patch, pytest.raises(ArithmeticError, match="numpy is wrong at"):
            patch.setattr(runtimes.Peer, "time", lambda *_: pytest.fail("timed before it was checked"))
            benchmark.bench_linear(benchmark.linear_problems(**GRID | {"threads": [2]}), 0, None, peers=found)
        with pytest.raises(runtimes.PeerError, match="No such file"):
            found[0].load("nowhere.onnx", {"x": np.ones((2, 4), np.float32)}, "float32", 1)
        (row,) = benchmark.bench_linear(
            benchmark.linear_problems(**GRID | {"dtypes": ["float16"]})[:1], 0, None, peers=found
        )
        assert "numpy" not in row["us"] and "no float16 here" in row["failed"]["numpy"]
        rows = benchmark.bench_linear(
            benchmark.linear_problems(**GRID | {"dtypes": ["bfloat16"]}), 0, None, peers=found
        )
        assert all("numpy" not in row["us"] and "ended with code 3" in row["failed"]["numpy"] for row in rows)
    with benchmark.engines(None) as found:
        assert found == []


def test_an_engine_that_does_not_start_is_told(peers):
    (peers / "peers.py").write_text("raise SystemExit(5)")
    with (
        pytest.raises(sp.SparsePruneError, match="peers: expected an engine that starts.*code 5; make peers"),
        benchmark.engines(peers),
    ):
        pass


def test_a_picture_gets_the_directory_that_it_is_to_lie_in(tmp_path):
    pytest.importorskip("matplotlib")
    problems = benchmark.linear_problems([(64, 64)], [4], [0.5], [(16, 16)], ["float32"], [1])
    benchmark.plot_linear(benchmark.bench_linear(problems, 0), tmp_path / "a" / "b.png")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.png"]
