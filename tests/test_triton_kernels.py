"""The Triton kernels where no GPU is: run in Triton's interpreter, and compiled for GPUs that are not here."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from sparse_prune_kernels import support, unavailable
from torch.utils._python_dispatch import TorchDispatchMode
from triton_problems import arrays, make_problem, needs_triton

from sparse_prune import ops
from sparse_prune.errors import SparsePruneError
from sparse_prune.ops import backend_for

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def _forget_answers():
    """What is available differs from test to test here."""
    yield
    support.unavailable.cache_clear()
    support.triton_problem.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """A PyTorch that says it has a GPU; returns a function that sets its compute capability."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def with_capability(major: int, minor: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))

    with_capability(9, 0)
    return with_capability


class Library:
    """Stands in for torch.library.Library and keeps what is registered."""

    def __init__(self):
        self.implementations = {}

    def impl(self, name, function, key):
        self.implementations[name, key] = function


def run_sweep(expression: str) -> str:
    """Run test_triton_sweep.py in Triton's interpreter and return pytest's last line."""
    sweep = Path(__file__).with_name("test_triton_sweep.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", expression, str(sweep)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip().splitlines()[-1]


@needs_triton
def test_interpreted_kernels_match_float64():
    last = run_sweep("not slow")
    assert int(re.search(r"(\d+) passed", last)[1]) >= 50 and "skipped" not in last, last


@needs_triton
@pytest.mark.slow
def test_interpreted_kernels_match_float64_for_every_blocksize():
    last = run_sweep("slow")
    assert int(re.search(r"(\d+) passed", last)[1]) == 48 and "skipped" not in last, last


# (side_n, side_k, m, dtype, capability, precision, transposed): each data type and each kind of tensor-core instruction once.
LINEAR_GATES = [
    (32, 32, 16, "bfloat16", 80, "ieee", False),
    (32, 32, 4096, "bfloat16", 80, "ieee", False),
    (16, 16, 4096, "float16", 80, "ieee", True),
    (32, 128, 512, "bfloat16", 86, "ieee", False),
    (128, 128, 4096, "bfloat16", 80, "ieee", True),
    (16, 16, 4096, "bfloat16", 90, "ieee", False),
    (32, 32, 16, "bfloat16", 90, "ieee", False),
    (128, 128, 4096, "bfloat16", 90, "ieee", False),
    (64, 64, 4096, "bfloat16", 120, "ieee", False),
    (32, 32, 4096, "float32", 80, "ieee", False),
    (128, 128, 4096, "float32", 90, "ieee", False),
    (32, 32, 4096, "float32", 80, "tf32", False),
    (32, 128, 4096, "int8", 80, "ieee", False),
    (64, 64, 16, "int8", 90, "ieee", False),
    (64, 64, 4096, "int8", 90, "ieee", False),
    (16, 16, 512, "int8", 120, "ieee", False),
    (32, 128, 4096, "e4m3", 89, "ieee", False),
    (64, 64, 16, "e4m3", 90, "ieee", False),
    (128, 128, 4096, "e4m3", 90, "ieee", False),
    (16, 16, 512, "e4m3", 120, "ieee", False),
    (32, 32, 16, "w8a16", 80, "ieee", False),
    (16, 16, 4096, "w8a16", 80, "ieee", False),
    (32, 32, 512, "w8a16", 90, "ieee", False),
    (128, 128, 4096, "w8a16", 120, "ieee", False),
]
SIDES = (16, 32, 64, 128)
UNIONS = {1: 0.2, 2: 0.34, 4: 0.53, 8: 0.76}  # of a random mask of density .2
ALL_LINEAR_GATES = (
    [(r, c, 4096, "bfloat16", capability, "ieee", r > c) for capability in (80, 90) for r in SIDES for c in SIDES]
    + [(r, r, m, "bfloat16", capability, "ieee", False) for capability in (80, 90) for r in SIDES for m in (1, 64, 512)]
    + [(r, r, 4096, "float16", capability, "ieee", False) for capability in (86, 89, 100, 120) for r in SIDES]
    + [(r, c, 4096, "float32", 80, "ieee", r > c) for r in SIDES for c in SIDES]
    + [(r, c, 4096, "int8", 80, "ieee", False) for r in SIDES for c in SIDES]
    + [
        (r, r, m, "int8", capability, "ieee", False)
        for capability in (86, 89, 90, 100, 120)
        for r in SIDES
        for m in (16, 512)
    ]
    + [(16, 128, m, "int8", capability, "ieee", False) for capability in (86, 90, 100, 120) for m in (512, 4096)]
    + [
        (r, r, m, "e4m3", c, "ieee", False)
        for r, c, m in ((64, 89, 512), (32, 90, 4096), (16, 100, 512), (64, 120, 4096))
    ]
    + [
        (r, r, m, "w8a16", c, "ieee", False)
        for r, c, m in ((128, 80, 4096), (64, 90, 4096), (32, 100, 512), (64, 86, 16))
    ]
)
SDD_GATES = [
    (32, 32, "bfloat16", 80, "ieee"),
    (128, 128, "bfloat16", 90, "ieee"),
    (64, 16, "float16", 120, "ieee"),
    (32, 32, "float32", 80, "ieee"),
    (32, 32, "float32", 80, "tf32"),
    (16, 128, "bfloat16", 86, "ieee"),
    (64, 64, "float16", 89, "ieee"),
    (128, 32, "bfloat16", 100, "ieee"),
]
ALL_SDD_GATES = (
    [(r, c, "bfloat16", capability, "ieee") for capability in (80, 86, 89, 90, 100, 120) for r in SIDES for c in SIDES]
    + [(r, c, "float32", capability, "ieee") for capability in (80, 90, 120) for r in SIDES for c in SIDES]
    + [(r, r, "float32", capability, "tf32") for capability in (86, 90, 100, 120) for r in SIDES]
)


def tiling(m, side_n, side_k, itemsize, capability, value_size=0):
    from sparse_prune_kernels import config

    unions = {merge: UNIONS[merge] for merge in config.merges(side_n, itemsize)}
    problem = (m, 4096, 4096, side_n, side_k, itemsize, capability, 0.2, unions)
    return config.linear_config(*problem, value_size=value_size)


PRODUCTS = {"bfloat16": "bf16", "float16": "f16", "float32": "tf32", "int8": "s8", "w8a16": "bf16"}  # as PTX names them


def check_gates(made, dtype, capability, precision, instruction, bytes_per_stage, num_stages):
    """No spills, shared memory within the GPU's limit, a pipeline as deep as asked, the right multiplications."""
    from sparse_prune_kernels.config import gpu_of

    # Triton 3.7, which torch 2.13 pins, lacks up to 14 registers where a thread has 128 accumulators; 3.8 does not.
    allowed = 56 if version("triton").startswith("3.7.") and made.registers == 255 else 0
    assert made.stack <= allowed, f"spills: {made.stack} bytes of stack with {made.registers} registers"
    assert 0 < made.registers <= 255
    # Triton keeps one tile of each operand fewer than stages, or as many. The pipeline falls to one tile where an address depends
    # on a load.
    assert (num_stages - 1) * bytes_per_stage <= made.shared <= gpu_of(capability).shared
    assert "cp.async" in made.ptx
    products = set(re.findall(r"\b(mma\.sync|wgmma\.mma_async)\S*?\.[fs]32\.(\w+)\.\w+", made.ptx))
    if dtype == "float32" and precision == "ieee":
        assert not products and "tf32" not in made.ptx and "fma.rn.f32" in made.ptx
    elif instruction == "tcgen05.mma":
        assert instruction in made.ptx and not products
    else:
        assert products == {(instruction, PRODUCTS.get(dtype, dtype))}


def sizes_of(dtype):
    """Bytes of a number as it is multiplied, and of a stored weight's."""
    from sparse_prune_kernels import offline

    return (kind.itemsize for kind in offline.QUANTIZED.get(dtype) or (getattr(torch, dtype),) * 2)


def check_linear_gates(side_n, side_k, m, dtype, capability, precision, transposed, even_k):
    from sparse_prune_kernels import config, offline

    itemsize, value_size = sizes_of(dtype)
    tiles = tiling(m, side_n, side_k, itemsize, capability, value_size)
    made, *then = offline.compile_linear(
        tiles, side_n, side_k, dtype, capability, precision, transposed=transposed, even_k=even_k
    )
    # the 64 rows that a warp group's instruction takes, and the 128 of Blackwell's
    rows = tiles.merge * side_n if tiles.swap else tiles.block_m
    wgmma = capability == 90 and rows >= 64 and tiles.num_warps % 4 == 0
    instruction = "wgmma.mma_async" if wgmma else "mma.sync"
    if capability == 100 and (dtype != "float32" or precision != "ieee"):
        instruction = next(name for name in ("tcgen05.mma", "mma.sync") if name in made.ptx)
    bytes_per_stage = (tiles.block_m * itemsize + tiles.merge * side_n * value_size) * tiles.block_k
    if dtype == "e4m3" and capability == 90 and instruction == "mma.sync":
        dtype = "float16"  # mma.sync has e4m3 from 8.9 on, but not for Hopper: Triton makes it float16, exactly
    check_gates(made, dtype, capability, precision, instruction, bytes_per_stage, tiles.num_stages)
    # What config.py counts on: one program of eight warps on an SM, two of four, three of the small ones.
    programs = 3 if m <= config.SMALL_M and itemsize <= 2 else 1 if tiles.num_warps == 8 else 2
    assert programs * 32 * tiles.num_warps * made.registers <= 65536
    # The system takes 1 KiB of an SM's shared memory for each program, beside the most that one program may have.
    assert programs * (made.shared + 1024) <= config.gpu_of(capability).shared + 1024
    assert len(then) == (tiles.split > 1) and all(kernel.stack == 0 for kernel in then)


@needs_triton
@pytest.mark.parametrize(
    "gate, even_k",
    [(gate, even) for gate in LINEAR_GATES for even in (True, False) if not even or gate[3] not in ("e4m3", "w8a16")],
    ids=str,
)
def test_compiled_linear(gate, even_k):
    check_linear_gates(*gate, even_k)


@needs_triton
@pytest.mark.parametrize("capability", [80, 90, 120])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_compiled_rounding_of_rows(dtype, capability):
    """No spills, and rows of whole lines are read and written 8 bytes at a time at least."""
    from sparse_prune_kernels import launch, offline

    x, q = (torch.empty(4096, 4096, dtype=d, device="meta") for d in (getattr(torch, dtype), torch.int8))
    made = offline.compile_call(launch.round_call(x, q, x.new_empty(4096, dtype=torch.float32), None), capability)
    assert made.stack == 0 and made.registers <= 128
    assert re.search(r"ld\.global\S*\.v4\.b32", made.ptx) and re.search(r"st\.global\S*\.v[24]\.b32", made.ptx)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("gate", ALL_LINEAR_GATES, ids=str)
def test_compiled_linear_for_every_blocksize(gate):
    check_linear_gates(*gate, even_k=False)


def check_amd_gates(made, capability):
    from sparse_prune_kernels.config import gpu_of

    assert made.stack == 0, f"spills: {made.stack} bytes of scratch with {made.registers} registers"
    assert 0 < made.registers <= 512 and made.shared <= gpu_of(capability).shared


# (side_n, side_k, m, dtype, capability, transposed)
AMD_GATES = [
    (32, 32, 4096, "bfloat16", 942, False),
    (64, 64, 16, "float16", 942, False),
    (128, 128, 4096, "bfloat16", 950, True),
    (16, 16, 512, "bfloat16", 950, False),
    (32, 32, 4096, "int8", 942, False),
    (64, 64, 512, "w8a16", 950, False),
]
ALL_AMD_GATES = [
    (r, c, m, dtype, capability, r > c and dtype not in ("int8", "w8a16"))
    for capability in (942, 950)
    for r in SIDES
    for c in SIDES
    for m, dtype in ((4096, "bfloat16"), (16, "float16"), (512, "float32"), (4096, "int8"), (16, "w8a16"))
    if r == c or m == 4096
]


def check_amd(side_n, side_k, m, dtype, capability, transposed):
    """They compile for AMD without spills and within local memory, and multiply by matrix instructions."""
    from sparse_prune_kernels import offline

    itemsize, value_size = sizes_of(dtype)
    tiles = tiling(m, side_n, side_k, itemsize, capability, value_size)
    product, *then = offline.compile_linear(tiles, side_n, side_k, dtype, capability, transposed=transposed)
    for made in (product, *then):
        check_amd_gates(made, capability)
    kind = {"float32": "f32", "int8": "i8"}.get(dtype, PRODUCTS[dtype])
    assert re.search(rf"v_mfma_[fi]32_\w+{kind}", product.ptx)


@needs_triton
@pytest.mark.parametrize("gate", AMD_GATES, ids=str)
def test_compiled_for_amd(gate):
    check_amd(*gate)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("gate", ALL_AMD_GATES, ids=str)
def test_compiled_for_amd_for_every_blocksize(gate):
    check_amd(*gate)


@needs_triton
@pytest.mark.parametrize("capability", [942, 950])
def test_compiled_sdd_for_amd(capability):
    from sparse_prune_kernels import config, offline

    check_amd_gates(
        offline.compile_sdd(config.sdd_config(64, 32, 2, capability), 64, 32, "bfloat16", capability), capability
    )


def check_sdd_gates(r, c, dtype, capability, precision):
    from sparse_prune_kernels import config, offline

    itemsize = 4 if dtype == "float32" else 2
    tiles = config.sdd_config(r, c, itemsize, capability)
    made = offline.compile_sdd(tiles, r, c, dtype, capability, precision)
    instruction = "wgmma.mma_async" if capability == 90 and r >= 64 else "mma.sync"
    if capability == 100 and (dtype != "float32" or precision != "ieee"):
        instruction = next(name for name in ("tcgen05.mma", "mma.sync") if name in made.ptx)
    check_gates(made, dtype, capability, precision, instruction, (r + c) * tiles.block_m * itemsize, tiles.num_stages)


@needs_triton
@pytest.mark.parametrize("gate", SDD_GATES, ids=str)
def test_compiled_sdd(gate):
    check_sdd_gates(*gate)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("gate", ALL_SDD_GATES, ids=str)
def test_compiled_sdd_for_every_blocksize(gate):
    check_sdd_gates(*gate)


def test_linear_config_fits_its_problem():
    small = [tiling(m, 32, 32, 2, 80) for m in (1, 16, 17, 64)]
    assert [(t.block_m, t.swap) for t in small] == [(16, True), (16, True), (32, True), (64, True)]
    assert all(t.split > 1 and t.merge * 32 >= t.block_m for t in small)
    assert [tiling(4096, 32, c, 2, 90).block_k for c in SIDES] == [16, 32, 64, 64]
    assert [tiling(64, 32, c, 4, 80).block_k for c in SIDES] == [16, 16, 16, 16]
    # Where L2 is the wall small blocks are merged; where tensor cores are it, zeros cost more than bytes.
    assert [tiling(4096, side, side, 2, 90).merge for side in SIDES] == [8, 4, 2, 1]
    assert not any(tiling(4096, side, side, 2, 90).skip for side in SIDES)
    assert [(t.merge, t.skip) for t in (tiling(4096, side, side, 2, 80) for side in SIDES)] == [
        (4, True),
        (2, True),
        (1, False),
        (1, False),
    ]


def test_where_programs_stay():
    """On 9.0, where each makes several tiles, but not in short steps of merged block-rows; elsewhere for measuring alone."""
    from sparse_prune_kernels import config

    blocks = [(128, 128), (64, 64), (32, 32), (128, 16), (64, 16), (16, 16)]
    assert [tiling(4096, *block, 2, 90).persistent for block in blocks] == [True, True, True, True, False, False]
    assert not any(tiling(m, 128, 128, 2, 90).persistent for m in (16, 512)), "as many programs as tiles"
    assert not any(
        tiling(4096, 128, 128, size, capability).persistent for size, capability in ((1, 90), (4, 90), (2, 80))
    )
    assert not any(tiling(4096, 128, 128, 2, capability).persistent for capability in (100, 120))
    problem = (4096, 4096, 4096, 128, 128, 2)
    for capability, both in ((80, False), (90, True), (100, True), (120, True)):
        found = config.linear_candidates(*problem, capability, 0.2, {1: 0.2})
        assert ({tiles.persistent for tiles in found} == {False, True}) == both


def plan_of_lengths(*lengths):
    """A plan of tiles with so many columns each."""
    from sparse_prune_kernels.plan import Plan

    begins = torch.tensor([0, *lengths]).cumsum(0)[:, None]
    table = torch.cat([begins, torch.zeros_like(begins)], 1).int()
    return Plan(1, len(lengths), int(begins[-1]), torch.cat([table, table.new_zeros(int(begins[-1]), 2)]), 1.0)


@pytest.mark.parametrize("lengths", [(9, 7, 7, 4, 2, 1, 0), (5,), (0, 0, 3)], ids=str)
@pytest.mark.parametrize("row_tiles, programs", [(1, 2), (5, 3), (9, 4), (2, 100)])
def test_schedules(lengths, row_tiles, programs):
    """Each tile once, in the order of the kernel whose programs leave; nobody gets more than a tile above the others."""
    from sparse_prune_kernels.plan import OUTPUT_COST, schedule_of

    plan, steps = plan_of_lengths(*lengths), 2
    schedule = schedule_of(plan, row_tiles, 4, programs, steps)
    assert schedule_of(plan, row_tiles, 4, programs, steps) is schedule
    tiles = row_tiles * len(lengths)
    count, table = schedule.programs, schedule.table.tolist()
    assert count == min(programs, tiles) and len(table) == count + 2 + tiles
    assert table[count] == table[-1] == [0] * 4
    heads, entries = table[:count], table[count + 1 : -1]
    assert {tuple(entry[:2]) for entry in entries} == {(m, n) for m in range(row_tiles) for n in range(len(lengths))}
    begins = torch.tensor([0, *lengths]).cumsum(0).tolist()
    for _, tile_n, begin, end in entries:
        assert end - begin == steps * lengths[tile_n] and 0 <= begin < max(1, steps * begins[-1])
        assert begin == end or begin == steps * begins[tile_n]
    work = []
    for (first, all_steps, *_), (last, *_) in zip(heads, heads[1:] + [[tiles]], strict=True):
        own = [max(1, end - begin) for *_, begin, end in entries[first:last]]
        assert own and all_steps == sum(own)
        work.append(all_steps + OUTPUT_COST * len(own))
        groups = [(m // 4, n) for m, n, *_ in entries[first:last]]
        assert groups == sorted(groups)
    assert max(work) - min(work) <= steps * max(*lengths, 1) + OUTPUT_COST


def test_a_new_schedule_inside_a_capture(monkeypatch):
    from types import SimpleNamespace

    from sparse_prune_kernels.plan import schedule_of

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    known = object()
    plan = SimpleNamespace(table=SimpleNamespace(is_cuda=True), schedules={(2, 8, 132, 1): known})
    assert schedule_of(plan, 2, 8, 132, 1) is known
    with pytest.raises(support.ArgumentError, match="x: expected a number of rows that ran once before a CUDA graph"):
        schedule_of(plan, 3, 8, 132, 1)


# Those that no default chooses are candidates for measuring.
@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability, dtype", [(90, "float16"), (100, "bfloat16"), (120, "bfloat16")])
@pytest.mark.parametrize("side_n, side_k", [(128, 128), (64, 16)], ids=str)
def test_compiled_programs_that_stay(side_n, side_k, capability, dtype):
    """No spills, shared memory within the limit, x by tensor maps and unmerged blocks too."""
    from dataclasses import replace

    from sparse_prune_kernels import config, offline

    tiles = replace(tiling(4096, side_n, side_k, 2, capability), persistent=True)
    (made,) = offline.compile_linear(tiles, side_n, side_k, dtype, capability)
    assert made.stack == 0 and made.shared <= config.gpu_of(capability).shared
    assert "cp.async.bulk.tensor" in made.ptx and len(made.boxes) == 1 + (tiles.merge == 1)
    assert (tiles.merge > 1) == bool(re.search(r"cp\.async\.c[ag]", made.ptx))


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
@pytest.mark.parametrize("itemsize", [1, 2, 4])
def test_candidates_for_tuning(itemsize, capability):
    """The arithmetic's first, then others that the kernels can run, no two alike."""
    from sparse_prune_kernels import config

    for m, side_n, side_k in ((1, 16, 16), (64, 32, 32), (300, 64, 16), (4096, 128, 128)):
        unions = {merge: UNIONS[merge] for merge in config.merges(side_n, itemsize)}
        problem = (m, 4096, 4096, side_n, side_k, itemsize, capability, 0.2, unions)
        found = config.linear_candidates(*problem)
        assert found[0] == config.linear_config(*problem) and len(set(found)) == len(found) <= 12
        assert len(found) >= 3 and {tiles.merge for tiles in found} <= set(unions)
        for tiles in found:
            assert (
                tiles.num_warps in (1, 2, 4, 8)
                and tiles.num_stages >= 2
                and tiles.block_m in (16, 32, 64, 128, 256, 512)
            )
            assert side_k % tiles.block_k == 0 or (tiles.block_k == 32 and itemsize == 1)


def measured(**change):
    tiling = dict(merge=2, block_m=64, block_k=32, group_m=8, split=1, swap=False, num_warps=4, num_stages=3)
    row = {"dtype": "bfloat16", "blocksize": [32, 32], "M": 256, "K": 768, "N": 3072, "density": 0.2}
    of_tiling = {name: v for name, v in change.items() if name in (*tiling, "skip", "persistent")}
    return row | {"tiling": tiling | of_tiling} | {name: v for name, v in change.items() if name not in of_tiling}


def written(path, *rows):
    path.write_text(json.dumps({"format": 1, "machine": {"gpu": "none"}, "rows": rows}))
    return path


def test_the_nearest_measurement_counts(tmp_path):
    from sparse_prune_kernels import tuned

    from sparse_prune import tiles

    try:
        rows = [measured(M=m, merge=merge, density=d) for m, d, merge in ((256, 0.2, 1), (512, 0.2, 2), (512, 0.1, 4))]
        table = tiles.load(written(tmp_path / "t.json", *rows))
        tuned.use(lambda device: table if device == "here" else ())
        ask = functools.partial(tuned.nearest, "here", 2, (32, 32))
        assert [ask(m, 3072, 768, 0.2).merge for m in (128, 300, 400, 1000)] == [1, 1, 2, 2]
        assert ask(512, 3072, 768, 0.11).merge == 4 and ask(512, 4000, 1000, 0.25).merge == 2
        assert ask(100, 3072, 768, 0.2) is ask(256, 9000, 768, 0.2) is ask(256, 3072, 768, 0.9) is None
        assert tuned.nearest("there", 2, (32, 32), 256, 3072, 768, 0.2) is None
        assert tuned.nearest("here", 1, (32, 32), 256, 3072, 768, 0.2) is None
        assert tuned.nearest("here", 2, (32, 64), 256, 3072, 768, 0.2) is None
    finally:
        tiles.install()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(merge=3), "no kernel has the tiling"),
        (dict(merge=8, blocksize=[32, 32]), "no kernel has the tiling"),
        (dict(swap=1), "no kernel has the tiling"),
        (dict(persistent=1), "no kernel has the tiling"),
        (dict(persistent=True, split=2), "no kernel has the tiling"),
        (dict(persistent=True, skip=True), "no kernel has the tiling"),
        (dict(persistent=True, dtype="int8"), "no kernel has the tiling"),
        (dict(block_m=96), "block_m must be a power of two, not 96"),
        (dict(num_stages=0), "num_stages must be an integer from 1 to 16, not 0"),
        (dict(num_warps=True), "num_warps must be an integer"),
        (dict(block_k=64), "block_k must divide blocks of 32 inputs, not be 64"),
        (dict(density=0), "must be positive numbers"),
        (dict(dtype="float64"), "KeyError: 'float64'"),
    ],
)
def test_tilings_that_no_kernel_has(change, message, tmp_path):
    from sparse_prune import tiles

    tiles.load(written(tmp_path / "t.json", measured()))
    with pytest.raises(SparsePruneError, match=message) as error:
        tiles.load(written(tmp_path / "t.json", measured(**change)))
    assert "t.json: expected tilings that `sparse-prune tune` wrote" in str(error.value)


def test_triton_version_in_words(monkeypatch):
    for number, words in (("3.9.1", "one of those"), ("3.8.0", "while the kernels are tested with 3.7 and 3.9")):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, number=number: number)
        assert support.triton_version().startswith(f"Triton {number}") and words in support.triton_version()


def test_the_guide_names_the_triton_that_is_wanted_and_those_tested():
    page = (Path(__file__).parents[1] / "docs/gpu-performance.md").read_text()
    assert f"Triton {'.'.join(map(str, support.MIN_TRITON))} or younger" in page
    first, last = support.TESTED_TRITON
    assert f"Triton {first} (what CUDA builds of torch 2.13 pin) and {last} are tested" in page


def test_prediction_is_what_the_text_counts():
    from sparse_prune_kernels.config import GPUS, predicted_cycles

    tiles = tiling(4096, 64, 64, 2, 90)
    assert (tiles.merge, tiles.block_m) == (2, 256)
    cycles = predicted_cycles(tiles, 4096, 4096, 64, 64, 0.2, 0.34, 90)
    assert cycles["L2"] == pytest.approx(16 * 32 * 2 * (256 * 0.34 + 128 * 0.2) / 5120)
    assert cycles["tensor"] == pytest.approx(-(-16 * 32 // GPUS[90].sms) * 256 * 128 * 0.34 / 2048)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("merge", [1, 2, 4, 8])
@pytest.mark.parametrize("rows, columns, density", [(13, 9, 0.4), (8, 5, 0.0), (3, 7, 1.0), (1, 1, 1.0)])
def test_plan_holds_every_block_once(rows, columns, density, merge, transposed):
    from sparse_prune_kernels.plan import make_plans

    mask = torch.rand(rows, columns) < density
    crow = torch.cat([torch.zeros(1), mask.sum(1).cumsum(0)]).int()
    col = mask.nonzero()[:, 1].int()
    made = make_plans(crow, col, columns, (merge,), transposed)[merge]
    heads, steps = made.table[: made.tiles + 1], made.table[made.tiles + 1 :]
    served = heads[:-1, 1:].flatten()
    assert sorted(served[served >= 0].tolist()) == list(range(columns if transposed else rows))
    assert heads[-1, 0] == made.steps == len(steps) and (heads[:, 0].diff() >= 0).all()
    found = {}
    for tile in range(made.tiles):
        own = steps[heads[tile, 0] : heads[tile + 1, 0]]
        assert (own[:, 0].diff() > 0).all() and (own[:, 1:] >= 0).any(1).all()
        for column, *slots in own.tolist():
            for row, slot in zip(heads[tile, 1:].tolist(), slots, strict=True):
                if slot >= 0:
                    found[(column, row) if transposed else (row, column)] = slot
    expected = {(r, c): slot for slot, (r, c) in enumerate(mask.nonzero().tolist())}
    assert found == expected
    assert (made.lists is not None) is (merge in (2, 4))
    if made.lists is not None:
        check_lists(made, heads, expected, transposed)


def check_lists(made, heads, expected, transposed):
    """Every block once, those of a column that a block-row has alone in the second list of its tile."""
    served, begin = made.lists[: 2 * made.tiles + 1], made.lists[: 2 * made.tiles + 1, 0]
    steps, found = made.lists[2 * made.tiles + 1 :], {}
    assert torch.equal(served[:-1:2, 1:], heads[:-1, 1:]) and len(steps) == made.steps == begin[-1]
    for tile in range(made.tiles):
        rows = served[2 * tile, 1:].tolist()
        for column, *slots in steps[begin[2 * tile] : begin[2 * tile + 1]].tolist():
            assert sum(slot >= 0 for slot in slots) > 1
            found |= {(row, column): slot for row, slot in zip(rows, slots, strict=True) if slot >= 0}
        for column, slot, which, *_ in steps[begin[2 * tile + 1] : begin[2 * tile + 2]].tolist():
            assert (rows[which], column) not in found
            found[rows[which], column] = slot
    assert {(c, r) if transposed else (r, c): slot for (r, c), slot in found.items()} == expected


def test_rows_that_share_columns_share_a_tile():
    from sparse_prune_kernels.plan import row_order

    patterns = torch.rand(8, 64) < 0.2
    mask = patterns.repeat_interleave(4, 0)[torch.randperm(32)]
    order = row_order(mask, 4)
    assert all((mask[tile] == mask[tile[0]]).all() for tile in order)  # as if blocks were four times as tall
    counts = mask[order].any(1).sum(1)
    assert (counts.diff() <= 0).all()  # the longest first
    scattered = torch.rand(128, 128) < 0.2
    assert scattered[row_order(scattered, 4)].any(1).float().mean() < 0.55  # in the order they come: .59


@pytest.mark.parametrize(
    "device, dtype, blocksize, reason",
    [
        (torch.device("cpu"), torch.float32, (32, 32), "run on CUDA devices, not on cpu"),
        (CUDA, torch.float64, (32, 32), "take float16, bfloat16, float32, int8 and float8_e4m3fn, not float64"),
        (CUDA, torch.float32, (4, 8), "take blocks with sides 16, 32, 64 or 128, not 4x8"),
        (CUDA, torch.float32, (32, 256), "not 32x256"),
    ],
)
def test_reasons_that_need_no_gpu(device, dtype, blocksize, reason):
    assert reason in unavailable(device, dtype, blocksize)


def test_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert unavailable(CUDA, torch.float32, (32, 32)) == "PyTorch finds no CUDA device"


def test_amd_gpu(gpu, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "NVIDIA GPUs only" in unavailable(CUDA, torch.float32, (32, 32))


def test_old_gpu(gpu):
    gpu(7, 5)
    assert unavailable(CUDA, torch.float32, (32, 32)) == "compute capability 7.5 is older than 8.0"


@needs_triton
@pytest.mark.parametrize("capability, runs", [((8, 0), False), ((8, 6), False), ((8, 9), True), ((12, 0), True)])
def test_gpus_without_float8(capability, runs, gpu):
    gpu(*capability)
    reason = unavailable(CUDA, torch.float8_e4m3fn, (32, 32))
    assert (reason is None) == runs and unavailable(CUDA, torch.int8, (32, 32)) is None
    assert backend_for(CUDA, torch.float8_e4m3fn) == ("triton" if runs else "reference")
    if not runs:
        with pytest.raises(SparsePruneError, match=f"8.9, and this GPU has 8.{capability[1]}"):
            backend_for(CUDA, torch.float8_e4m3fn, "triton")


def test_triton_missing(gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "Triton cannot be imported (ModuleNotFoundError" in unavailable(CUDA, torch.float32, (32, 32))


@pytest.mark.parametrize(
    "number, reason", [("3.6.0", "Triton 3.6.0 is older than 3.7"), ("3.7.0", None), ("4.0.0+git1", None)]
)
def test_triton_version(gpu, monkeypatch, number, reason):
    fake = type(sys)("triton")
    fake.__version__ = number
    monkeypatch.setitem(sys.modules, "triton", fake)
    assert unavailable(CUDA, torch.bfloat16, (16, 128)) == reason


def test_registered_operators_fall_back_where_a_reason_stands():
    library, called = Library(), []
    names = (
        "bsr_linear",
        "bsr_linear_glu",
        "bsr_linear_int8",
        "bsr_linear_e4m3",
        "bsr_linear_w8a16",
        "bsr_linear_dx",
        "bsr_sdd",
    )
    fallbacks = {name: lambda *arguments, name=name: called.append((name, len(arguments))) for name in names}
    support.register(library, fallbacks)
    assert set(library.implementations) == {(name, "CUDA") for name in names}
    x, values, index = torch.zeros(4, 8), torch.zeros(1, 4, 8), torch.zeros(2, dtype=torch.int32)
    library.implementations["bsr_linear", "CUDA"](x, index, index, values, None, 4, None, "none", None)
    weight = (index, index, values, None)
    library.implementations["bsr_linear_glu", "CUDA"](x, *weight, *weight, 4, None, None, "silu")
    scaled = (values.char(), torch.ones(4))
    library.implementations["bsr_linear_int8", "CUDA"](x, index, index, *scaled, None, 4, None, "none", None, None)
    library.implementations["bsr_linear_w8a16", "CUDA"](x, index, index, *scaled, None, 4, None, "none", None)
    library.implementations["bsr_linear_dx", "CUDA"](x, index, index, values, 8)
    library.implementations["bsr_sdd", "CUDA"](x, x, index, index, 4, 8)
    counts = {
        "bsr_linear": 9,
        "bsr_linear_glu": 13,
        "bsr_linear_int8": 11,
        "bsr_linear_w8a16": 10,
        "bsr_linear_dx": 5,
        "bsr_sdd": 6,
    }
    assert called == list(counts.items())


def registered(monkeypatch, fallbacks=None):
    """The operators as CUDA tensors reach them, on a machine that says it has a GPU."""
    library = Library()
    monkeypatch.setattr(support, "unavailable", lambda device, dtype, blocksize: None)
    support.register(library, fallbacks or {}, SparsePruneError)
    return {name: function for (name, _), function in library.implementations.items()}


@needs_triton
def test_tensors_on_the_cpu(monkeypatch):
    operators = registered(monkeypatch)
    packed, x, bias, residual = make_problem(7, 45, 70, 16, 32, 0.5, torch.bfloat16)
    crow, col, values = arrays(packed)
    calls = {
        "bsr_linear": (x, crow, col, values, None, 45, bias, "gelu", residual),
        "bsr_linear_glu": (x, crow, col, values, None, crow, col, values, None, 45, bias, bias, "silu"),
        "bsr_linear_int8": (x, crow, col, values.char(), bias.float(), None, 45, bias, "gelu", residual, None),
        "bsr_linear_w8a16": (x, crow, col, values.char(), bias.float(), None, 45, bias, "gelu", residual),
        "bsr_linear_dx": (residual, crow, col, values, 70),
        "bsr_sdd": (residual, x, crow, col, 16, 32),
    }
    for name, arguments in calls.items():
        with pytest.raises(
            SparsePruneError, match="expected a tensor on a CUDA device, got one on cpu; move it to a GPU"
        ):
            operators[name](*arguments)


@pytest.mark.parametrize(
    "place, name", [(1, "crow_indices"), (2, "col_indices"), (3, "values"), (6, "bias"), (8, "residual")]
)
def test_mixed_devices(place, name, monkeypatch):
    """Told before a fallback of another device would run."""
    packed, x, bias, residual = make_problem(7, 45, 70, 16, 32, 0.5, torch.bfloat16)
    arguments = [x, *arrays(packed), None, 45, bias, "gelu", residual]
    arguments[place] = arguments[place].to("meta")
    with pytest.raises(SparsePruneError, match=f"{name}: expected cpu like x, got meta; {name}.to\\(x.device\\)"):
        registered(monkeypatch)["bsr_linear"](*arguments)


def linear_on_paper(monkeypatch, m=64, n=64, k=128, steps=1, tiles=1, table=4, block_m=16):
    """launch._linear for tensors without memory, as far as the launches; 16 inputs of a block's 128 a step."""
    from sparse_prune_kernels import launch
    from sparse_prune_kernels.config import LinearConfig
    from sparse_prune_kernels.plan import Plan

    monkeypatch.setattr(launch, "linear_calls", lambda *arguments, **options: [])
    x, values = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((m, k), (1, 16, 128)))
    plan = Plan(1, tiles, steps, torch.empty(table, dtype=torch.int32, device="meta"), 1.0)
    config = LinearConfig(1, block_m, 16, 8, 1, False, 4, 3)
    return launch._linear(x, {1: plan}, values, n, 16, 128, 128, 1, None, "none", None, config)


SIZE, INT32 = 2**31 - 512, 2**31  # the largest of sizes; the first number that int32 lacks


@needs_triton
@pytest.mark.parametrize(
    "fits, grows, argument, expected, remedy",
    [
        ({"m": SIZE}, {"m": SIZE + 1}, "M", f"at most {SIZE} rows or columns", "split the problem"),
        ({"n": SIZE}, {"n": SIZE + 1}, "N", f"at most {SIZE} rows or columns", "split the problem"),
        ({"k": SIZE}, {"k": SIZE + 1}, "K", f"at most {SIZE} rows or columns", "split the problem"),
        (
            {"steps": INT32 // 8 - 1},
            {"steps": INT32 // 8},
            "col_indices",
            f"a plan of fewer than {INT32}",
            "larger blocks",
        ),
        ({"table": INT32 - 1}, {"table": INT32}, "col_indices", f"a plan of fewer than {INT32}", "larger blocks"),
        ({"tiles": INT32 // 4 - 1}, {"tiles": INT32 // 4}, "x", f"at most {INT32 - 1} tiles", "fewer rows at a time"),
        ({"m": SIZE, "tiles": 15}, {"m": SIZE, "tiles": 17}, "x", f"at most {INT32 - 1} tiles", "fewer rows at a time"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_numbers_beyond_int32(fits, grows, argument, expected, remedy, monkeypatch):
    """Rows, columns, places in the plan, steps of the loop and programs: the last that int32 numbers runs, the next is told."""
    sizes = {"m": 64, "n": 64} | fits
    assert linear_on_paper(monkeypatch, **fits).shape == (sizes["m"], sizes["n"])
    with pytest.raises(support.ArgumentError, match=rf"^{argument}: expected {expected}.*, got \d+; {remedy}$"):
        linear_on_paper(monkeypatch, **grows)


@pytest.mark.parametrize("picked, runs", [("triton", ["glu"]), ("cuda", ["bsr_linear", "bsr_linear"])])
def test_gate_and_up_by_the_kernel_that_the_planner_takes(picked, runs, monkeypatch):
    """Triton's in one call; where CUDA C++ takes either, each product by what it takes."""
    ran = []
    monkeypatch.setattr(ops.planner, "gpu_kernel", lambda device, dtype, block, density, shape, m: picked)
    linear = torch.ops.sparse_prune.bsr_linear

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            ran.extend(["bsr_linear"] if function == linear.default else [])
            return function(*arguments, **(options or {}))

    packed, x, bias, _ = make_problem(7, 45, 70, 16, 32, 0.5, torch.float32)
    weight, operator = (*arrays(packed), None), ops.picking_glu(lambda *arguments: ran.append("glu"))
    with Seen():
        operator(x, *weight, *weight, 45, bias, bias, "silu")
    assert ran == runs


@pytest.mark.parametrize(
    "capability, triton, reason", [((7, 5), ..., "7.5 is older than 8.0"), ((9, 0), None, "cannot be imported")]
)
def test_backend_where_the_kernels_cannot_run(capability, triton, reason, gpu, monkeypatch):
    """Plain PyTorch under auto, and the reason for who asks for the kernels."""
    gpu(*capability)
    if triton is None:
        monkeypatch.setitem(sys.modules, "triton", None)
    assert backend_for(CUDA, torch.bfloat16) == "reference"
    with pytest.raises(SparsePruneError, match=reason):
        backend_for(CUDA, torch.bfloat16, "triton")


def test_registering_imports_no_triton():
    code = (
        "import sys, torch; before = set(sys.modules); import sparse_prune_kernels as k;"
        "k.register(type('L', (), {'impl': lambda *a: None})(), {});"
        "k.unavailable(torch.device('cpu'), torch.float32, (32, 32));"
        "print('triton' in set(sys.modules) - before)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
