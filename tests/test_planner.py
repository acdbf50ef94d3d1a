"""Sparse or dense: which one runs, that the answer stays the same, and that tables are measured, kept and checked."""

from __future__ import annotations

import copy
import importlib.util
import json
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cpu_isas import needs_kernels
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import sparse_prune as sp
from sparse_prune import backends, gpu_tuning, ops, planner, tuning
from sparse_prune.masks import expand_mask, grid_shape

N, K = 96, 64


class Recorder(TorchDispatchMode):
    """Names of the operators that ran inside."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    @property
    def path(self) -> str:
        if any("sparse_prune.bsr_linear" in name for name in self.names):
            return "sparse"
        return "prepacked" if any("mkldnn._linear_pointwise" in name for name in self.names) else "plain"


def write_table(path, ratio, dense="plain", forms=(), **change):
    """A table whose one row per dtype says the same at every M, unless ratio is {M: ratios}.

    forms: (M, K, N, time of plain over that of prepacked) of dense alone.
    """
    by_tokens = ratio if isinstance(ratio, dict) else {1: ratio}
    rows = [
        {"isa": isa, "dtype": dtype, "block": [1, 1], "M": m, "weight": [K, N], "dense": dense, "ratio": list(ratios)}
        | change
        for isa in backends.ISAS
        for dtype in ("float32", "bfloat16")
        for m, ratios in by_tokens.items()
    ]
    alone = [
        {"isa": isa, "dtype": "float32", "M": m, "weight": [k, n], "plain": plain}
        for isa in backends.ISAS
        for m, k, n, plain in forms
    ]
    table = {"format": 1, "machine": {"cpu": "a test"}, "densities": [0.1, 1.0], "rows": rows, "forms": alone}
    path.write_text(json.dumps(table))
    return path


@pytest.fixture
def always_dense(tmp_path):
    with planner.using_table(write_table(tmp_path / "dense.json", (2.0, 3.0))):
        yield


def make(density=0.5, blocksize=(32, 32), dtype=torch.float32):
    linear = nn.Linear(K, N).to(dtype)
    mask = torch.rand(grid_shape((N, K), blocksize)) < density
    mask[0, 0] = True
    with torch.no_grad():
        linear.weight.mul_(expand_mask(mask, blocksize, (N, K)))
    return linear, sp.SparseLinear.from_dense(linear, mask, blocksize).eval()


def path_of(layer, *args, **kwargs):
    with torch.no_grad(), Recorder() as recorder:
        layer(*args, **kwargs)
    return recorder.path


@needs_kernels
@pytest.mark.parametrize("dense", planner.DENSE_FORMS)
@pytest.mark.parametrize("ratio", [0.5, 2.0])
def test_the_table_decides_and_the_answer_is_the_same(tmp_path, ratio, dense):
    linear, layer = make()
    x, residual = torch.randn(2, 5, K), torch.randn(2, 5, N)
    exact = F.gelu(linear(x)) + residual
    expected = "sparse" if ratio < 1 else dense
    if dense == "prepacked" and tuning.prepacked_linear(linear.requires_grad_(False), x) is None:
        pytest.skip("this build of PyTorch has no oneDNN product with reordered weights")
    with planner.using_table(write_table(tmp_path / "t.json", (ratio, ratio), dense)):
        assert path_of(layer, x, "gelu", residual) == expected
        packed = layer.packed
        with torch.no_grad():
            torch.testing.assert_close(layer(x, "gelu", residual), exact)
            with Recorder() as recorder:
                y = sp.bsr_linear(x, packed, layer.bias, "gelu", residual)
            torch.testing.assert_close(y, exact)
            assert recorder.path == expected
        told = layer.backend_for(10)
        assert (
            told.startswith("dense: sparse is expected to run 0.50x as fast") if ratio > 1 else told.startswith("cpu:")
        )
        asked = sp.backend_for("cpu", torch.float32, "auto", (32, 32), layer.density, 10, (N, K))
        assert asked == told
        assert sp.backend_for("cpu", torch.float32).startswith("cpu:")  # without a density: which kernel there is


@needs_kernels
def test_each_m_has_its_own_choice(tmp_path):
    _, layer = make()
    with planner.using_table(write_table(tmp_path / "t.json", {1: (2, 2), 64: (0.5, 0.5), 1024: (3, 3)})):
        chosen = {m: path_of(layer, torch.randn(m, K)) for m in (0, 1, 9, 21, 24, 89, 93, 300)}
    # On lines over log M the ratio is 1 at 16 and 0.75 at 32, 0.5 at 64 and 1.1 at 128, and a choice serves what is nearest.
    assert chosen == dict.fromkeys((0, 24, 89), "sparse") | dict.fromkeys((1, 9, 21, 93, 300), "plain")


@needs_kernels
def test_a_weight_between_measured_sizes_and_the_margin(tmp_path):
    path = write_table(tmp_path / "t.json", (0.5, 0.5))
    data = json.loads(path.read_text())
    data["rows"] += [row | {"weight": [4 * K, 4 * N], "ratio": [1.1, 1.1]} for row in data["rows"]]
    path.write_text(json.dumps(data))
    with planner.using_table(path):
        plans = [planner.plan(torch.device("cpu"), torch.float32, (8, 8), 0.5, (n * N, n * K)) for n in (1, 2, 4, 9)]
    ratios = [plan.at(1).ratio for plan in plans if plan]
    assert ratios == pytest.approx([0.5, 0.8, 1.1, 1.1])
    for ratio, runs in ((planner.MARGIN - 0.01, "cpu"), (planner.MARGIN + 0.01, "dense")):
        with planner.using_table(write_table(path, (ratio, ratio))):
            assert sp.backend_for("cpu", torch.float32, "auto", (8, 8), 0.5, 1, (N, K)).startswith(runs)


@needs_kernels
def test_named_backends_are_not_planned(always_dense, tmp_path):
    linear, layer = make()
    x = torch.randn(3, K)
    for backend, path in {"auto": "plain", "cpu": "sparse", "dense": "plain"}.items():
        with torch.no_grad(), Recorder() as recorder:
            torch.testing.assert_close(sp.bsr_linear(x, layer.packed, layer.bias, backend=backend), linear(x))
        assert recorder.path == path
    assert sp.backend_for("cpu", torch.float32, "dense") == "dense: asked for"
    with planner.using_table("off"):
        assert path_of(layer, x) == "sparse" and planner.table_in_force() is None
    assert path_of(layer, x) == "plain"


@needs_kernels
def test_training_runs_the_sparse_operator(always_dense):
    _, layer = make()
    x = torch.randn(3, K, requires_grad=True)
    with Recorder() as recorder:
        layer(x).sum().backward()
    assert recorder.path == "sparse" and layer.values.grad is not None
    layer.requires_grad_(False)
    with torch.inference_mode():
        layer(x)
    grad, x.grad = x.grad, None
    with Recorder() as recorder:  # the weight does not train, x does: after a call that had no gradients at all
        layer(x).sum().backward()
    assert recorder.path == "plain"
    torch.testing.assert_close(x.grad, grad)


@needs_kernels
def test_the_dense_weight_follows_writes_and_is_never_saved(always_dense):
    linear, layer = make()
    x = torch.randn(3, K)
    with torch.no_grad():
        before = set(layer.state_dict())
        layer(x)
        assert list(layer._derived.dense) == ["plain"]
        kept = layer._derived.dense["plain"]
        layer(x)
        assert layer._derived.dense["plain"] is kept, "derived once, not on each call"
        assert set(layer.state_dict()) == before
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert twin._derived.dense == {} and twin._derived.key is None
            torch.testing.assert_close(twin(x), linear(x))
        layer.values.mul_(2)
        torch.testing.assert_close(layer(x), 2 * (linear(x) - linear.bias) + linear.bias)
        layer.values.data.div_(2)
        torch.testing.assert_close(layer.refresh_()(x), linear(x))


@needs_kernels
def test_compiled_graphs_hold_the_sparse_operator(always_dense):
    linear, layer = make()
    x = torch.randn(3, K)
    with torch.no_grad():
        layer(x)
        compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), linear(x))
        exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("m")},), strict=False)
        assert any("bsr_linear" in str(node.target) for node in exported.graph.nodes)
        torch.testing.assert_close(exported.module()(torch.cat([x, x])), linear(torch.cat([x, x])))


@needs_kernels
def test_another_instruction_set_is_planned_anew(tmp_path):
    _, layer = make()
    path = write_table(tmp_path / "t.json", (2, 2))
    data = json.loads(path.read_text())
    data["rows"] = [row for row in data["rows"] if row["isa"] == "portable"]
    best = [dict(row, isa=backends.cpu_isa(torch.float32), ratio=[0.5, 0.5]) for row in data["rows"]]
    if best[0]["isa"] == "portable":
        pytest.skip("this processor has one instruction set only")
    path.write_text(json.dumps(data | {"rows": data["rows"] + best}))
    x = torch.randn(3, K)
    with planner.using_table(path):
        assert path_of(layer, x) == "sparse"
        with backends.force_isa("portable"):
            assert path_of(layer, x) == "plain"
        assert path_of(layer, x) == "sparse"


def test_without_kernels_the_weight_is_made_dense_once(monkeypatch):
    monkeypatch.setattr(backends, "_library", None)
    linear, layer = make()
    x = torch.randn(3, K)
    with planner.using_table("shipped"), torch.no_grad():
        torch.testing.assert_close(layer(x), linear(x))
        kept = layer._derived.dense["plain"]
        layer(x)
        assert layer._derived.dense["plain"] is kept
        assert layer.backend_for(3).startswith("dense: no sparse kernel runs here: ")


def test_wrong_arguments_are_told_on_the_dense_path_too(always_dense):
    _, layer = make()
    x = torch.randn(3, K)
    with torch.no_grad():
        with pytest.raises(sp.SparsePruneError, match="activation: expected one of none, relu"):
            layer(x, "swish")
        with pytest.raises(sp.SparsePruneError, match=r"residual: expected shape \(3, 96\), got \(1, 96\)"):
            layer(x, "none", torch.randn(1, N))


@needs_kernels
def test_sparsify_keeps_a_layer_dense_where_sparse_would_lose(tmp_path):
    with planner.using_table(write_table(tmp_path / "t.json", {1: (1.5, 2.5), 256: (0.2, 2.0)})):
        for tokens, kept in ((1, True), (256, False), (None, False)):
            model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
            result = sp.sparsify_(model, sp.BlockSparseConfig(density=0.25, tokens=tokens))
            assert (result.converted == []) == kept and (type(model[0]) is nn.Linear) == kept
            if kept:
                assert "0.60x as fast as dense near M = 1 at density 0.250" in result.kept_dense["0"]
                assert "t.json" in result.kept_dense["0"] and "float32" in result.kept_dense["0"]
    with pytest.raises(sp.SparsePruneError, match="tokens: expected a positive integer or None, got 0"):
        sp.BlockSparseConfig(tokens=0)


@needs_kernels
def test_the_form_of_dense_follows_m_and_the_size_of_the_weight(tmp_path):
    """On straight lines over logarithms: at M = 4 that of 64 x 64 is the root of 0.8, at M = 1 that of 120 x 120 0.83."""
    forms = [(1, 64, 64, 0.4), (1, 256, 256, 2.0), (16, 64, 64, 2.0), (16, 256, 256, 8.0)]
    path = write_table(tmp_path / "t.json", {1: (2, 2), 16: (2, 2)}, "prepacked", forms)
    with planner.using_table(path):

        def runs(dtype, side):
            plan = planner.plan(torch.device("cpu"), dtype, (32, 32), 0.5, (side, side))
            return {choice.tokens: choice.dense for choice in plan.choices}

        for side, plain in {32: (1, 2, 4), 64: (1, 2, 4), 120: (1,), 150: (), 1000: ()}.items():
            expected = {m: "plain" if m in plain else "prepacked" for m in (1, 2, 4, 8, 16)}
            assert runs(torch.float32, side) == expected
        assert set(runs(torch.bfloat16, 64).values()) == {"prepacked"}, "as the row says, where dense alone has none"
    with planner.using_table(write_table(path, {1: (0.5, 0.5)}, "prepacked", forms)):
        assert set(runs(torch.float32, 64).values()) == {""}


def row(**change):
    fields = {
        "isa": "avx2",
        "dtype": "float32",
        "blocksize": (32, 32),
        "tokens": 1,
        "shape": (64, 64),
        "dense": "plain",
    }
    return planner.Row(**fields | {"densities": (0.1, 0.5, 1.0), "ratio": (0.2, 0.6, 1.6)} | change)


def test_between_and_beyond_the_measured_densities():
    found = [row().ratio_at(density) for density in (0.01, 0.1, 0.3, 0.5, 0.75, 1.0)]
    assert found == pytest.approx([0.11, 0.2, 0.4, 0.6, 1.1, 1.6])
    assert row().break_even == pytest.approx(0.7, abs=1e-4)
    assert row(ratio=(0.1, 0.5, 0.9)).break_even == 1.0
    assert row(ratio=(1.2, 1.5, 1.9)).break_even == 0.0
    assert row(ratio=(0.9, 5.0, 9.0)).ratio_at(0.01) == 0.0


@pytest.mark.parametrize(
    ("asked", "found"),
    [((32, 32), (32, 32)), ((64, 16), (16, 16)), ((128, 128), (64, 64)), ((4, 8), (4, 4)), ((1, 4), (1, 1))],
)
def test_a_block_is_planned_as_the_largest_measured_one_inside(asked, found):
    assert planner._measured_block(set(tuning.BLOCKS), asked) == found
    assert planner._measured_block({(16, 16), (8, 8)}, (4, 4)) == (8, 8)


def test_the_shipped_table_is_whole_and_makes_sense():
    table = planner.load_table(planner._SHIPPED_FILE)
    measured = {(row.isa, row.dtype) for row in table.rows}
    assert {
        ("avx512", "float32"),
        ("avx2", "float32"),
        ("avx512_bf16", "bfloat16"),
        ("portable", "float16"),
    } <= measured
    for found in table.rows:
        assert found.blocksize in tuning.BLOCKS and found.tokens in tuning.TOKENS + tuning.FEW_TOKENS
        if found.blocksize == (32, 32) and found.tokens >= 128 and found.isa != "portable":
            assert found.ratio_at(0.1) < 0.7 < found.break_even, found
        if found.blocksize == (1, 1) and found.dtype == "float32":
            assert found.break_even < 0.3, found
        if found.tokens >= 16:  # below, a small layer is all overhead
            assert found.ratio[0] < 1.1 * found.ratio[-1], found


FORM = {"isa": "avx2", "dtype": "float32", "M": 1, "weight": [8, 8], "plain": 1}
DAMAGED = {
    "not there": (None, "No such file"),
    "no JSON": ("{", "Expecting property name"),
    "a list": ("[]", "no JSON object with format 1"),
    "another format": ('{"format": 2}', "no JSON object with format 1"),
    "no rows": ({"rows": []}, "one without rows"),
    "rows missing": ({"rows": None}, "a damaged one"),
    "a field missing": ({"rows": [{}]}, r"a damaged one \(KeyError: 'block'"),
    "M of zero": ({"M": 0}, "must be positive integers"),
    "M as text": ({"M": "1"}, "must be positive integers"),
    "a ratio missing": ({"ratio": [1.0]}, "ratio must hold 2 positive numbers"),
    "NaN": ({"ratio": [1.0, float("nan")]}, "ratio must hold 2 positive numbers"),
    "a form unknown": ({"dense": "quick"}, "dense must be one of plain, prepacked, not 'quick'"),
    "forms of M zero": ({"forms": [FORM | {"M": 0}]}, "M and weight must be positive integers"),
    "forms in no time": ({"forms": [FORM | {"plain": 0}]}, "plain must be a positive number"),
    "densities falling": ({"densities": [0.5, 0.1]}, r"densities must rise within \(0, 1\]"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_table_is_told(case, tmp_path, monkeypatch):
    change, message = DAMAGED[case]
    path = tmp_path / "t.json"
    if isinstance(change, str):
        path.write_text(change)
    elif change is not None:
        data = json.loads(write_table(path, (0.5, 2.0)).read_text())
        where = data if set(change) & set(data) else data["rows"][3]
        where.update(change)
        path.write_text(json.dumps(data))
    expected = (
        f"t.json: expected a table that `sparse-prune tune` wrote, got .*{message}.*; run `sparse-prune tune` again"
    )
    with pytest.raises(sp.SparsePruneError, match=expected):
        planner.use_table(path)
    assert planner.table_in_force() is None, "the table before stays"
    if backends.cpu_isas():
        monkeypatch.setenv(planner.VARIABLE, str(path))
        planner.refresh()
        with pytest.raises(sp.SparsePruneError, match=expected), torch.no_grad():
            make()[1](torch.randn(2, K))
        with pytest.raises(sp.SparsePruneError, match=expected):
            sp.show_config()


def test_where_tables_come_from(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(planner.VARIABLE)
    planner.refresh()
    try:
        assert planner.table_in_force().source == "shipped table"
        assert "`sparse-prune tune` measures this machine" in planner.describe()
        own = planner.cache_file()
        assert own.parent == tmp_path / "sparse-prune" and own.name.startswith("tuning-")
        own.parent.mkdir()
        write_table(own, (0.5, 0.5))
        planner.refresh()
        assert planner.table_in_force().source == f"table {own}"
        other = write_table(tmp_path / "other.json", (0.5, 0.5))
        monkeypatch.setenv(planner.VARIABLE, str(other))
        planner.refresh()
        assert planner.table_in_force().source == f"table {other}"
        with planner.using_table("shipped"):
            assert planner.table_in_force().source == "shipped table"
        assert planner.table_in_force().source == f"table {other}"
    finally:
        monkeypatch.undo()
        planner.refresh()


@needs_kernels
def test_the_processor_that_measured_the_rows_in_force_is_named(tmp_path):
    path, isa = write_table(tmp_path / "t.json", (0.5, 0.5)), backends.cpu_isa(torch.float32)
    with planner.using_table(path):
        assert "14 rows, measured on a test" in planner.describe(), "a table without machines, as tune writes it"
    data = json.loads(path.read_text())
    others = {other: {"cpu": f"a processor of {other}"} for other in backends.ISAS}
    path.write_text(json.dumps(data | {"machines": others}))
    here = {isa, backends.cpu_isa(torch.bfloat16)}
    with planner.using_table(path):
        described = planner.describe()
    by = described.partition("measured on ")[2].partition(";")[0].split(" and ")
    assert sorted(by) == sorted(f"a processor of {other}" for other in here), "and none whose rows do not run here"
    path.write_text(json.dumps(data | {"machines": {"avx2": 3}}))
    with pytest.raises(sp.SparsePruneError, match="a damaged one"):
        planner.use_table(path)


def test_the_shipped_table_keeps_what_another_machine_measured():
    path = Path(__file__).parents[1] / "bench" / "shipped_table.py"
    spec = importlib.util.spec_from_file_location("shipped_table", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def row(isa, name):
        return {"isa": isa, "name": name}

    old = {
        "machine": {"cpu": "big"},
        "rows": [row("avx512", 1), row("avx2", 2)],
        "forms": [row("avx2", 3), row("portable", 4)],
    }
    new = {"machine": {"cpu": "small"}, "rows": [row("avx2", 5)], "forms": []}
    about, rows, machines = module.merged(old, {"avx2": new})
    assert about == {"cpu": "big"} and machines == {"avx2": {"cpu": "small"}}
    assert [entry["name"] for entry in rows] == [1, 5, 4]
    again = {"machine": about, "machines": machines, "rows": rows, "forms": []}
    assert module.merged(again, {"portable": new | {"rows": [row("portable", 6)]}})[1:] == (
        [row("avx512", 1), row("avx2", 5), row("portable", 6)],
        {"avx2": {"cpu": "small"}, "portable": {"cpu": "small"}},
    )


@needs_kernels
def test_what_the_own_table_lacks_is_looked_up_in_the_shipped_one(tmp_path):
    with planner.using_table(write_table(tmp_path / "t.json", (2, 2))):
        asked = [planner.plan(torch.device("cpu"), dtype, (32, 32), 0.5) for dtype in (torch.float32, torch.float16)]
    assert ["t.json" in plan.choices[0].reason for plan in asked] == [True, False]
    assert "shipped table" in asked[1].choices[0].reason


@needs_kernels
def test_tune_measures_resumes_and_is_then_in_force(tmp_path, monkeypatch):
    for name, value in {"SHAPES": ((32, 64),), "FORM_SHAPES": ((32, 64),), "FORM_TOKENS": (1, 4)}.items():
        monkeypatch.setattr(tuning, name, value)
    out, steps, measured = tmp_path / "t.json", [], []
    arguments = dict(quick=True, dtypes=("float32",), seconds=0)

    def stop(phase, step, of, text):
        steps.append((step, of))
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tuning.tune(out, report=stop, **arguments)
    assert steps == [(1, 8), (2, 8), (3, 8)] and not out.exists()
    real = tuning._measure
    monkeypatch.setattr(tuning, "_measure", lambda *a: measured.append(a) or real(*a))
    table = tuning.tune(out, **arguments)
    assert len(measured) == 5, "the rows that were finished are kept"
    assert [path.name for path in tmp_path.iterdir()] == ["t.json"]
    assert len(table.rows) == 6 and {row.isa for row in table.rows} == {backends.cpu_isa(torch.float32)}
    assert {row.blocksize for row in table.rows} == set(tuning.QUICK_BLOCKS)
    assert all(row.ratio[0] > 0 for row in table.rows) and table.machine["cpu"] == backends.cpu_name()
    tuning.tune(out, **arguments)
    assert len(measured) == 11, "a finished table is measured again"
    compared = [(form.isa, form.dtype, form.tokens, form.shape) for form in table.forms]
    has_both = tuning.prepacked_linear(nn.Linear(32, 64), torch.zeros(1, 32)) is not None
    assert compared == [(table.rows[0].isa, "float32", m, (64, 32)) for m in (1, 4) if has_both]
    with pytest.raises(sp.SparsePruneError, match="dtypes: expected names among"):
        tuning.tune(out, dtypes=("float8",))
    with pytest.raises(sp.SparsePruneError, match="name: expected an instruction set of this machine"):
        tuning.tune(out, dtypes=("float32",), isas=("sse2",))


@needs_kernels
def test_a_row_is_the_worst_ratio_to_the_best_dense(monkeypatch):
    threads = []

    def medians(candidates, seconds, hopeless):
        threads.append(torch.get_num_threads())
        assert set(candidates) - set(planner.DENSE_FORMS) == {"sparse"}
        for run in candidates.values():
            assert run().shape == (4, 64)
        density = tuning.DENSITIES[(len(threads) - 1) % len(tuning.DENSITIES)]
        return {name: 9.0 for name in candidates} | {"plain": 2.0, "sparse": (1 + threads[-1]) * density}

    monkeypatch.setattr(tuning, "interleaved_medians", medians)
    isa = backends.cpu_isa(torch.float32)
    problem = {"isa": isa, "dtype": "float32", "block": [16, 16], "M": 4, "weight": [32, 64]}
    found = tuning._measure(problem, (1, 2), 0.0)
    assert threads == [1] * len(tuning.DENSITIES) + [2] * len(tuning.DENSITIES)
    assert found == {
        "dense": "plain",
        "ratio": pytest.approx([1.5 * density for density in tuning.DENSITIES], rel=0.01),
    }


@needs_kernels
def test_a_row_that_another_program_disturbed_is_measured_again(monkeypatch):
    straight = [0.3, 0.45, 0.7, 0.95, 1.2]
    results = iter([0.3, 9.0, 0.7, 0.95, 1.2, 0.3, 0.45, 0.7, 0.95, 0.4, *straight])
    assert tuning._stray(straight) < 1e-6 < tuning.STRAY < tuning._stray([0.3, 0.45, 0.7, 0.95, 0.4])
    monkeypatch.setattr(
        tuning, "interleaved_medians", lambda candidates, *_: dict.fromkeys(candidates, 1.0) | {"sparse": next(results)}
    )
    isa = backends.cpu_isa(torch.float32)
    problem = {"isa": isa, "dtype": "float32", "block": [16, 16], "M": 4, "weight": [32, 64]}
    assert tuning._measure(problem, (1,), 0.0)["ratio"] == straight
    assert next(results, None) is None
    results = iter([*straight[:-1], 0.4] * tuning.TRIES)
    assert tuning._measure(problem, (1,), 0.0)["ratio"][-1] == 0.4, "the best of a few tries, not a loop without end"


def test_dense_form_is_plain_where_gradients_are_on():
    plan = planner.Plan((), (planner.Choice(1, "prepacked", 2.0, "a test"),))
    derived = ops.Derived(None, None, plan)
    assert ops.dense_form(derived, 4) == "plain"
    with torch.no_grad():
        assert ops.dense_form(derived, 4) == "prepacked" and ops.dense_form(derived, 0) == ""


# ---- on a GPU: which kernel, or dense ----

GPU = torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """An A100 that runs both kinds of kernels and was never tuned; the function says otherwise."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(planner.VARIABLE, raising=False)
    monkeypatch.setattr(backends, "gpu_name", lambda: "NVIDIA Test 80GB")

    def has(capability=80, **reasons):
        monkeypatch.setattr(backends, "gpu_capability", lambda device: capability)
        monkeypatch.setattr(backends, "gpu_reasons", lambda *_: {"cuda": None, "triton": None} | reasons)
        planner.refresh()

    has()
    yield has
    monkeypatch.undo()
    planner.refresh()


def gpu_rows(path, **ratios):
    """A table for sm_80 whose kernels have these ratios at densities .1 and 1."""
    rows = [
        {
            "isa": "sm_80",
            "kernel": k,
            "dtype": "bfloat16",
            "block": [16, 16],
            "M": 16,
            "weight": [K, N],
            "dense": "plain",
        }
        | {"ratio": list(ratio)}
        for k, ratio in ratios.items()
    ]
    path.write_text(json.dumps({"format": 1, "machine": {"gpu": "a test"}, "densities": [0.1, 1.0], "rows": rows}))
    return path


def test_shipped_bounds_choose_between_the_kernels_of_a_gpu(gpu):
    ask = dict(dtype=torch.bfloat16, density=0.2, shape=(4096, 4096))
    for dtype in (torch.bfloat16, torch.float16):  # the same kernels
        choice = planner.plan(GPU, dtype, (16, 16), 0.2, (4096, 4096)).at(4096)
        assert (choice.kernel, choice.dense) == ("cuda", "") and choice.ratio < 0.5
        assert "shipped bounds, counted and not timed" in choice.reason and "sm_80" in choice.reason
    gpu(cuda="not built")
    assert planner.plan(GPU, blocksize=(16, 16), **ask).at(4096).kernel == "triton"


@pytest.mark.parametrize("capability, rows", [(80, 80), (86, 80), (89, 80), (90, 90), (100, 80), (120, 80)])
def test_rows_of_the_kernel_that_a_gpu_runs(gpu, capability, rows):
    """The kernel for 9.0 runs on no other GPU: a younger one has the kernel for 8.0, and no rows of another."""
    gpu(capability)
    found = planner.plan(GPU, torch.bfloat16, (128, 32), 0.2, (4096, 4096))
    assert all(f"(sm_{rows}, " in choice.reason for choice in found.choices)


def test_nothing_measured_and_nothing_that_runs_on_a_gpu(gpu):
    assert planner.plan(GPU, torch.float32, (32, 32), 0.2) is None
    assert planner.gpu_kernel(GPU, torch.float32, (32, 32), 0.2, (96, 64), 5) == "triton"
    gpu(triton="no Triton")
    assert planner.gpu_kernel(GPU, torch.float32, (32, 32), 0.2, (96, 64), 5) == "cuda"
    gpu(cuda="not built", triton="no Triton")
    choice = planner.plan(GPU, torch.bfloat16, (32, 32), 0.2).at(5)
    assert choice.dense == "plain" and "cuda: not built; triton: no Triton" in choice.reason
    assert ops.backend_for(GPU, torch.bfloat16, "auto", (32, 32), 0.2, 5).startswith(
        "dense: no sparse kernel runs here"
    )
    assert planner.plan(GPU, torch.int8, (32, 32), 0.2) is None


@pytest.mark.parametrize(
    ("ratios", "runs"),
    [
        ({"cuda": (0.5, 2.0), "triton": (0.3, 2.0)}, "triton"),
        ({"cuda": (0.3, 2.0), "triton": (0.5, 2.0)}, "cuda"),
        ({"cuda": (1.3, 2.0), "triton": (1.5, 2.0)}, "dense: cuda is expected to run 0.7"),
    ],
)
def test_an_own_table_overrides_the_bounds(gpu, tmp_path, ratios, runs):
    with planner.using_table(gpu_rows(tmp_path / "t.json", **ratios)):
        found = ops.backend_for(GPU, torch.bfloat16, "auto", (32, 32), 0.1, 16, (N, K))
        assert found.startswith(runs) and "t.json" in planner.describe_gpu()
        if runs[:5] == "dense":  # what runs in training, which dense does not serve
            assert planner.gpu_kernel(GPU, torch.bfloat16, (32, 32), 0.1, (N, K), 16) == "cuda"
    with planner.using_table(planner.OFF):
        assert planner.plan(GPU, torch.bfloat16, (32, 32), 0.1) is None and "off" in planner.describe_gpu()


def test_a_table_with_an_unknown_kernel_is_refused(tmp_path):
    with pytest.raises(sp.SparsePruneError, match="kernel must be one of cuda, triton"):
        planner.load_table(gpu_rows(tmp_path / "t.json", cutlass=(0.5, 1.0)))


def test_tune_on_a_gpu_is_kept_and_then_in_force(gpu, tmp_path, monkeypatch):
    """With the CPU in the GPU's place, and a timer that says what each candidate takes."""
    monkeypatch.setattr(gpu_tuning, "SHAPES", ((32, 64),))
    ran, wrong = [], ""

    def linear(x, packed, backend):
        ran.append(backend)
        y = F.linear(x, packed.to_dense())
        return y + 1 if backend == wrong else y

    def timer(candidates):
        for run in candidates.values():
            assert run().shape[1] == 64
        times = {name: [9.0, 10 * float(name.split()[1]), 0.1] for name in candidates if name != "plain"}
        failed = {name: times.pop(name) and "no graph" for name in list(times) if name == "triton 0.5"}
        return times | {"plain": [5.0]}, failed

    monkeypatch.setattr(gpu_tuning, "bsr_linear", linear)
    table = gpu_tuning.tune_kernels(quick=True, timer=timer, device="cpu")
    assert set(ran) == {"cuda", "triton"}
    assert [path.name for path in (tmp_path / "sparse-prune").iterdir()] == ["tuning-nvidia-test-80gb.json"]
    assert {row.kernel for row in table.rows} == {"cuda"}, "a kernel that failed at one density has no row"
    assert all(row.ratio == (0.2, 0.4, 1.0, 1.8) and row.isa == "sm_80" for row in table.rows)
    assert "tuning-nvidia-test-80gb.json" in planner.plan(GPU, torch.bfloat16, (32, 32), 0.2).choices[0].reason
    assert "tuning-nvidia-test-80gb.json" in planner.describe_gpu()
    wrong = "cuda"
    with pytest.raises(sp.SparsePruneError, match="one without rows"):
        gpu_tuning.tune_kernels(tmp_path / "wrong.json", quick=True, timer=timer, device="cpu")
