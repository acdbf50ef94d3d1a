"""`sparse-prune bench gpu` where no GPU is: everything but the device, which a fake stands for; and `bench gpu-bounds`."""

from __future__ import annotations

import heapq
import json
import re
from pathlib import Path
from types import SimpleNamespace

import cuda_kernels
import ptx_emulator
import pytest
import torch
from triton_problems import needs_triton

from sparse_prune import SparsePruneError, cli, gpu_bench, gpu_bounds, gpu_tuning, planner

MACHINE = {"gpu": "NVIDIA Imagined 100-80GB", "torch": "2.x", "sparse_prune": "0"}
TINY = {"shapes": ((64, 96),), "tokens": (1, 40), "densities": (0.25, 0.5), "blocksizes": ((16, 16), (32, 32))}


class FakeCuda:
    """torch.cuda as GraphTimer uses it: graphs that take a given time on a clock of their own."""

    def __init__(self, costs, sweep_us=100.0):
        self.costs, self.log, self.now, self.capturing = costs, [], 0.0, None
        fake = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = fake.now

            def elapsed_time(self, end):
                return (end.at - self.at) / 1000  # milliseconds, as CUDA's

        class Graph:
            def replay(self):
                fake.log.append(("replay", self.name))
                fake.now += fake.costs[self.name].pop(0)

        class Manager:
            def __init__(self, target):
                self.target = target

            def __enter__(self):
                if isinstance(self.target, Graph):
                    fake.capturing = self.target

            def __exit__(self, *error):
                fake.capturing = None

        self.Event, self.CUDAGraph, self.graph, self.stream = Event, Graph, Manager, Manager
        self.Stream = self.current_stream = lambda: SimpleNamespace(wait_stream=lambda other: None)
        self.synchronize = lambda: self.log.append("synchronize")
        self.get_device_properties = lambda index: SimpleNamespace(L2_cache_size=50 << 20)

    def kernel(self, name, breaks=False):
        def run():
            if self.capturing is not None:
                if breaks:
                    raise RuntimeError("operation not permitted when stream is capturing\nmore")
                self.capturing.name = name
            else:
                self.log.append(("warm", name))

        return run


@pytest.fixture
def small_sweep(monkeypatch):
    monkeypatch.setattr(gpu_bench, "MIN_SWEEP", 4096)


def test_timer_sweeps_captures_and_takes_turns(small_sweep, monkeypatch):
    cuda = FakeCuda({"a": [50.0] + [1.0, 2.0, 3.0, 4.0, 500.0] * 20, "b": [9.0] * 120})
    timer = gpu_bench.GraphTimer(seconds=0.0, cuda=cuda, device="cpu")
    assert timer._sweep.numel() * 4 >= 4 * (50 << 20)  # more than L2 holds

    class Sweep:
        def zero_(self):
            cuda.log.append("sweep")
            cuda.now += 100.0

    timer._sweep = Sweep()
    times, failed = timer({"a": cuda.kernel("a"), "b": cuda.kernel("b"), "c": cuda.kernel("c", breaks=True)})
    assert failed == {"c": "cannot be captured into a CUDA graph: operation not permitted when stream is capturing"}
    assert times == {
        "a": [pytest.approx(v) for v in (1, 2, 3, 4, 500)],
        "b": [pytest.approx(9.0)] * 5,
    }  # not the first turn
    replays = [entry for entry in cuda.log if entry == "sweep" or entry[0] == "replay"]
    assert replays[::2] == ["sweep"] * 12 and sorted(replays[1:4:2]) == [("replay", "a"), ("replay", "b")]
    assert [entry for entry in cuda.log if entry[0] == "warm"][:3] == [("warm", "a")] * 3


def timer_of(us):
    """Stands for GraphTimer: runs each candidate once, and says what `us` says."""

    def timer(candidates):
        for run in candidates.values():
            run()
        return {name: [us[name] - 1.0, us[name], us[name] + 5.0] for name in candidates}, {}

    return timer


def rows_of(us, grid=TINY, **options):
    rows_wanted = gpu_bench.problems(**grid, dtypes=("bfloat16",))
    return gpu_bench.bench_gpu(rows_wanted, timer_of(us), MACHINE, device="cpu", ours=("cpu", "reference"), **options)


def test_a_row_says_what_ran_and_how_fast():
    rows = rows_of({"dense": 30.0, "cpu": 10.0, "reference": 20.0, "floor": 2.0})
    assert len(rows) == 8
    row = rows[0]
    assert (row["M"], row["K"], row["N"], row["blocksize"]) == (1, 64, 96, [16, 16])
    assert (
        row["best"] in ("cpu", "reference") and row["us"]["dense"] == 30.0 and row["quartiles"]["dense"] == [29.0, 35.0]
    )
    best = row["us"][row["best"]]
    assert row["speedup"] == 30.0 / best and row["share"] == pytest.approx(30.0 / best * row["density"])
    assert row["dense_equivalent_tflops"] == pytest.approx(2 * 64 * 96 / best / 1e6)
    assert row["absent"]["2:4"] == row["absent"]["torch_bsr"] == "runs on CUDA devices only"
    assert row["wrong"] == {} and row["gpu"] == MACHINE["gpu"]


def test_backends_that_cannot_run_say_why():
    wanted = gpu_bench.problems(**TINY | {"tokens": (1,), "densities": (0.5,)}, dtypes=("bfloat16",))
    row = gpu_bench.bench_gpu(wanted, timer_of({"dense": 1.0, "floor": 1.0}), MACHINE, device="cpu")[0]
    assert "run on CUDA devices, not on cpu" in row["absent"]["triton"] and "speedup" not in row
    assert "cuda" in row["absent"] or "cuda" in row["us"]


def test_wrong_results_are_not_timed(monkeypatch):
    real = gpu_bench.ops.bsr_linear
    monkeypatch.setattr(
        gpu_bench.ops, "bsr_linear", lambda x, packed, backend: real(x, packed, backend=backend) * 1.049
    )
    row = rows_of({"dense": 30.0, "floor": 1.0})[0]
    assert set(row["us"]) == {"dense", "floor"} and set(row["wrong"]) >= {"reference"} and "speedup" not in row
    assert row["wrong"]["reference"].startswith("error 4.9e-02, allowed")


def test_two_of_four():
    kept = gpu_bench._two_of_four(torch.tensor([[1.0, -3.0, 2.0, 0.5, 4.0, 4.5, -5.0, 0.0]]))
    assert kept.tolist() == [[0, -3, 2, 0, 0, 4.5, -5, 0]]


def test_break_even_lies_where_the_line_crosses_one():
    row = {"K": 8, "N": 8, "blocksize": [16, 16], "dtype": "bfloat16", "M": 1}
    rows = [row | {"density": d, "speedup": s} for d, s in ((0.5, 0.5), (0.1, 5.0), (0.25, 2.0))]
    # times over dense: .2, .5, 2 at densities .1, .25, .5: 1 lies a third of the way from .25 to .5
    assert gpu_bench.break_even(rows) == [row | {"density": pytest.approx(0.25 + 0.25 / 3, abs=1e-3)}]
    assert gpu_bench.break_even(rows[:1]) == []


def test_rows_are_kept_and_results_written(tmp_path):
    keep, us = tmp_path / "rows.jsonl", {"dense": 30.0, "cpu": 10.0, "reference": 20.0, "floor": 2.0}
    rows = rows_of(us, keep=keep)
    again = rows_of({}, keep=keep)  # a timer that knows no candidate would fail
    assert again == rows
    result, picture = gpu_bench.write_results(rows, MACHINE, tmp_path / "results")
    assert result.name == "nvidia-imagined-100-80gb.json"
    written = json.loads(result.read_text())
    assert written["machine"] == MACHINE and len(written["rows"]) == 8 and "gpu" not in written["rows"][0]
    assert {(e["M"], *e["blocksize"]) for e in written["break_even"]} == {(m, b, b) for m in (1, 40) for b in (16, 32)}
    if picture is not None:
        assert picture.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("arguments", [(), ("--check",)], ids=str)
def test_without_a_gpu_the_command_says_so(arguments, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["sparse-prune", "bench", "gpu", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert "bench gpu: expected a CUDA device, got PyTorch" in " ".join(capsys.readouterr().err.split())


def test_reasons_for_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for cuda, reason in ((None, "built without CUDA"), ("13.0", "PyTorch finds no GPU")):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        with pytest.raises(SparsePruneError, match=reason):
            gpu_bench.require_gpu()


def test_what_may_pass_as_a_peers_rounding_is_wrong_of_ours(monkeypatch):
    ours = gpu_bench._ours
    monkeypatch.setattr(gpu_bench, "_ours", lambda *a: (lambda run: lambda: 1.012 * run().double())(ours(*a)))
    for row in rows_of({"dense": 30.0, "floor": 2.0}):
        assert set(row["wrong"]) == {"cpu", "reference"} and "best" not in row


def test_the_whole_command_on_a_fake_gpu(tmp_path, monkeypatch, capsys):
    us = {"dense": 30.0, "cpu": 10.0, "reference": 20.0, "floor": 2.0}
    monkeypatch.setattr(gpu_bench, "require_gpu", lambda: None)
    monkeypatch.setattr(gpu_bench, "about", lambda: MACHINE)
    monkeypatch.setattr(gpu_bench, "GraphTimer", lambda seconds: timer_of(us))
    real = gpu_bench.bench_gpu
    on_cpu = {"device": "cpu", "ours": ("cpu", "reference")}
    monkeypatch.setattr(gpu_bench, "bench_gpu", lambda *a, **b: real(*a, **b, **on_cpu))
    options = [
        "--shapes",
        "64:96",
        "--tokens",
        "1,40",
        "--density",
        "0.25,0.5",
        "--block",
        "32x32",
        "--out",
        str(tmp_path),
    ]
    monkeypatch.setattr("sys.argv", ["sparse-prune", "bench", "gpu", *options])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    shown = capsys.readouterr().out
    assert stopped.value.code == 0, shown
    assert "NVIDIA Imagined" in shown and "64->96" in shown
    assert {path.suffix for path in tmp_path.iterdir()} <= {".json", ".png"}  # finished: no rows left lying about
    us["cpu"] = us["reference"] = 1e9
    real_ours = gpu_bench._ours
    monkeypatch.setattr(gpu_bench, "_ours", lambda *a: (lambda run: lambda: run() + 1)(real_ours(*a)))
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1 and "wrong" in capsys.readouterr().out


def test_tune_shows_products_and_gradients(tmp_path, monkeypatch, capsys):
    row = {"dtype": "bfloat16", "blocksize": [32, 32], "M": 256, "us": 1.0, "arithmetic_us": 2.0}
    of_kernel = planner.Row("sm_80", "bfloat16", (32, 32), 256, (3072, 768), "plain", (0.1, 1.0), (0.5, 2.0), "triton")

    def tune(problems, out, *_):
        out.write_text("{}")
        return [row, row | {"us": 0.8, "gradient": True}]

    def tune_kernels(out, *_):
        out.write_text("{}")
        return planner.Table(str(out), {}, (of_kernel,))

    monkeypatch.setattr(gpu_bench, "require_gpu", lambda command: None)
    monkeypatch.setattr(gpu_tuning, "tune", tune)
    monkeypatch.setattr(gpu_tuning, "tune_kernels", tune_kernels)
    monkeypatch.setattr("sys.argv", ["sparse-prune", "tune", "--device", "cuda", "--out", str(tmp_path / "t.json")])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    shown = capsys.readouterr().out
    assert stopped.value.code == 0, shown
    assert re.search(r"bf16\s.* 2\.00", shown) and re.search(r"bf16 gradient\s.* 2\.50", shown)
    assert re.search(r"sm_80 triton\s.* bf16\s.* 0\.40", shown), "the break-even density"


@needs_triton
@pytest.mark.skipif(ptx_emulator.unavailable() is not None, reason=str(ptx_emulator.unavailable()))
@pytest.mark.parametrize("quantized", [False, True])
def test_bounds_are_counted_without_a_gpu(quantized, tmp_path, monkeypatch, capsys):
    """The command's tables of a small problem say what its rows hold."""
    monkeypatch.setattr(gpu_bounds, "PROBLEMS", ((16, 256, 128),))
    options = ["--quick", "--json", str(tmp_path / "rows.json"), "--markdown", str(tmp_path / "tables.md")]
    monkeypatch.setattr("sys.argv", ["sparse-prune", "bench", "gpu-bounds", *options, *["--quantized"] * quantized])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    shown, text = capsys.readouterr().out, (tmp_path / "tables.md").read_text()
    assert stopped.value.code == 0 and text.strip() in shown, shown
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert all(row["bound"] == row["clocks"][row["limit"]] == max(row["clocks"].values()) > 0 for row in rows)
    assert {row["gpu"] for row in rows} == {"A100", "H100"}
    if not quantized:
        kernels = {"dense", "triton", "torch"} | ({"cuda"} if cuda_kernels.unavailable() is None else set())
        assert {row["kernel"] for row in rows} == kernels and "## H100, M = 16, 256 -> 128: speed-up bound" in text
        assert text.count("| 32x32 |") == text.count("| 64x64 |") == 2
        return
    head, _, line = text.splitlines()
    assert head == "| | A100 int8 | A100 w8a16 | H100 int8 | H100 w8a16 | H100 e4m3 |"
    bounds = {f"{row['gpu']} {row['scheme']}": row["bound"] for row in rows}
    for name, cell in zip(head.split(" | ")[1:], line.strip("| ").split(" | ")[1:], strict=True):
        name = name.strip("| ")
        assert cell.startswith(f"{bounds[name.split()[0] + ' bfloat16'] / bounds[name]:.2f} ("), name


def test_tiles_near_the_mean_stand_for_all():
    chosen, average = gpu_bounds._average(torch.tensor([9, 4, 1, 5, 21]))
    assert chosen.tolist() == [0, 3, 1] and average == pytest.approx(6 / 8)


def test_multiprocessors_take_programs_of_two_kinds_as_they_get_idle():
    """What each has run in the end, as if one after the other had been asked."""
    for totals, clocks, sms in (
        ((431, 108), (4.0, 3.0), 108),
        ((7, 5), (2.0, 3.0), 3),
        ((0, 4), (1.0, 1.0), 8),
        ((9,), (1.0,), 4),
    ):
        idle = [(0.0, sm) for sm in range(sms)]
        ran = torch.zeros(sms, len(totals), dtype=torch.int64)
        for kind in (kind for kind, total in enumerate(totals) for _ in range(total)):
            done, sm = heapq.heappop(idle)
            ran[sm, kind] += 1
            heapq.heappush(idle, (done + clocks[kind], sm))
        assert gpu_bounds._loads(list(totals), list(clocks), sms) == {tuple(row) for row in ran.tolist()}


def test_the_tables_of_the_documentation_are_made_of_the_rows_beside_them():
    docs = Path(__file__).resolve().parent.parent / "docs"
    rows = json.loads((docs / "gpu-bounds.json").read_text())
    assert gpu_bounds.markdown(rows) == (docs / "gpu-bounds.md").read_text()
