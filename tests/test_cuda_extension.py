"""`_C_cuda`: that it builds without a GPU, what is in it, and backend="cuda" around the kernels."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import cuda_kernels
import pytest
import torch
import torch.nn.functional as F
from cuda_kernels import BLOCKS

import sparse_prune as sp
from sparse_prune import backends, ops, planner, reference
from sparse_prune.ops import backend_for

ROOT = Path(__file__).resolve().parent.parent
# What may be looked up in torch: the stable interface. The CUDA runtime is linked in; the rest is C and C++ libraries.
STABLE = re.compile(r"(aoti_|torch_)\w+$")
needs_nvcc = pytest.mark.skipif(cuda_kernels.unavailable() is not None, reason=str(cuda_kernels.unavailable()))


def tool(name: str) -> str:
    triton = pytest.importorskip("triton", reason="Triton, whose cuobjdump is used, is not installed")
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        pytest.skip(f"this Triton brings no {name}")
    return str(path)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The extension, built as an installation with SPARSE_PRUNE_CUDA=1 builds it, for the default architectures."""
    if shutil.which("nm") is None:
        pytest.skip("there is no nm (binutils)")
    folder = tmp_path_factory.mktemp("cuda")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", folder, "--build-temp", folder / "temp"]
    environment = os.environ | {"SPARSE_PRUNE_CUDA": "1", "SPARSE_PRUNE_CPU": "0"}
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (path,) = folder.glob("sparse_prune/_C_cuda*.so")
    return path


def nvcc_that_knows(folder, *archs):
    """A toolkit at folder, whose nvcc can only tell what it compiles for."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\n" + "".join(f"echo compute_{arch}\n" for arch in archs))
    nvcc.chmod(0o755)
    return folder


@pytest.mark.parametrize(
    "known, archs",
    [((80, 90, 100, 120), "80 90 100 120+PTX"), ((80, 90, 100), "80 90 100+PTX"), ((80, 90), "80 90+PTX"), ((), "")],
)
def test_younger_gpus_get_ptx_of_the_youngest_architecture_that_nvcc_knows(tmp_path, monkeypatch, known, archs):
    monkeypatch.delenv("SPARSE_PRUNE_CUDA_ARCHS", raising=False)
    setup, home = cuda_kernels.setup_module(), nvcc_that_knows(tmp_path, *known)
    assert setup.architectures(home, "kernels_sm80.cu") == archs.split()
    assert setup.architectures(home, "kernels_e4m3.cu") == archs.replace("80", "89").split()
    assert setup.architectures(home, "kernels_sm90.cu") == ["90a"] * bool(known)
    if known:
        assert setup.nvcc_flags(home, "kernels_sm80.cu")[-1].endswith(f"code=[sm_{known[-1]},compute_{known[-1]}]")
    monkeypatch.setenv("SPARSE_PRUNE_CUDA_ARCHS", "80;86")
    assert setup.architectures(home, "kernels_sm80.cu") == ["80", "86"], "what was asked for, and no more"


@pytest.mark.parametrize(
    "mode, nvcc, told",
    [
        ("auto", None, "the CUDA kernels were not built (nvcc was not found: set CUDA_HOME, or install the extra"),
        ("auto", "/cuda", "the CUDA kernels were not built (this torch is built without CUDA; SPARSE_PRUNE_CUDA=1"),
        ("0", None, ""),
        ("1", None, "SPARSE_PRUNE_CUDA=1, but the CUDA kernels cannot be built: nvcc was not found"),
        ("2", None, "SPARSE_PRUNE_CUDA: expected auto, 1 or 0, got '2'"),
    ],
)
def test_setup_without_nvcc_or_a_torch_with_cuda(monkeypatch, capsys, mode, nvcc, told):
    """auto goes on and says why, 1 stops, 0 says nothing."""
    setup = cuda_kernels.setup_module()
    monkeypatch.setattr(setup, "cuda_home", lambda: nvcc and Path(nvcc))
    monkeypatch.setattr(setup, "no_extension", lambda: None)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setenv("SPARSE_PRUNE_CPU", "0")
    monkeypatch.setenv("SPARSE_PRUNE_CUDA", mode)
    if mode in "12":
        with pytest.raises(SystemExit, match=re.escape(told)):
            setup.extensions()
    else:
        assert setup.extensions() == {}
        shown = capsys.readouterr().err
        assert told in shown and ("CUDA" in shown) == (mode == "auto")


@pytest.mark.parametrize("where", ["CUDA_HOME", "the path", "a wheel"])
def test_nvcc_is_found_where_an_installation_puts_it(tmp_path, monkeypatch, where):
    """CUDA_HOME, the path, the wheels of the extra cuda-build: tests look where the build does."""
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)] if where == "a wheel" else [])
    monkeypatch.setattr(shutil, "which", lambda name: None)
    setup = cuda_kernels.setup_module()
    assert setup.cuda_home() is None
    home = nvcc_that_knows(tmp_path / "nvidia" / "cu13")
    setup.cuda_home.cache_clear()
    if where == "CUDA_HOME":
        monkeypatch.setenv("CUDA_HOME", str(home))
    elif where == "the path":
        (home / "bin" / "nvcc").write_text(f"#!/bin/sh\necho '#$ TOP={home}' >&2\n")
        monkeypatch.setattr(shutil, "which", lambda name: str(home / "bin" / name))
    assert setup.cuda_home() == home
    monkeypatch.setattr(cuda_kernels, "setup_module", lambda: setup)
    assert cuda_kernels.nvcc.__wrapped__() == str(home / "bin" / "nvcc")


@pytest.mark.slow
@needs_nvcc
def test_it_asks_torch_for_the_stable_interface_only(library):
    shown = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True).stdout
    names = {line.split()[-1] for line in shown.splitlines()}
    foreign = {
        n for n in names if "@" not in n and not n.startswith(("_ITM_", "__gmon", "_ZNKSt", "_ZNSt", "_ZSt", "_ZTVN"))
    }
    foreign = {n for n in foreign if not re.match(r"_Z(NK?R?|NO)St7__cxx11", n)}
    assert any(n.startswith("aoti_torch_") for n in foreign)
    assert {n for n in foreign if not STABLE.match(n)} == set()


def held(name: str, arch: str) -> tuple[int, int]:
    """Threads of a block of a kernel, and blocks that a multiprocessor holds: its __launch_bounds__, which the grid counts on."""
    if name.startswith("bsr_linear_sm90"):
        return 384, 1
    if name.startswith("bsr_linear_skinny"):
        return (512, 1) if name.endswith("_16_1") else (256, 2)
    if name.startswith("bsr_linear_sm80"):
        apart = "_e4m3_" in name and arch in ("sm_90", "sm_100")  # kTakenApart
        return 256, 1 if name.endswith("_256") or apart else 2
    return (128, 4) if name.startswith("quantize_rows") else (256, 2)


def wanted_instructions(name: str, arch: str) -> set[str]:
    """What the machine code of a kernel must have: tensor cores, and asynchronous copies or loads of 16 bytes past L1."""
    if name.startswith("bsr_linear_sm90"):
        return {"HGMMA", "UTMALDG", "UBLKCP"}
    if name.startswith(("quantize_rows", "sum_parts")):
        return set()
    apart = "_e4m3_" in name and arch in ("sm_90", "sm_100")
    if apart and name.endswith("_256"):  # empty
        return set()
    product = "IMMA" if "_int8_" in name else "QMMA" if "_e4m3_" in name and not apart else "HMMA"
    return {product, "LDG.E.NA.128" if "skinny" in name else "LDGSTS"}


def shared_of_launches() -> dict[str, int]:
    """The most dynamic shared memory that the launcher asks for, by kernel."""
    most: dict[str, int] = {}
    kinds = [(None, block) for block in BLOCKS]
    kinds += [(of, block) for of in cuda_kernels.KINDS for block in BLOCKS if block[1] >= 32]
    for (of, (r, c)), m, sms in product(kinds, (1, 17, 65, 4096), (1, 8, 108)):
        options = {"sms": sms, "most_row": 32 if of else 64}
        at, launch = cuda_kernels.linear_launch(m, 4096, (1, r, c // 2 if of else c), **options)
        for dtype in cuda_kernels.NAMES:
            name = cuda_kernels.entry(at, launch, dtype, of)
            most[name] = max(most.get(name, 0), launch.shared_bytes)
            sdd = cuda_kernels.sdd_launch(m, 8, (9, r, c), sms)
            most[f"bsr_sdd_{cuda_kernels.NAMES[dtype]}_{sdd.units}"] = sdd.shared_bytes
    for r, c, tokens in product((16, 64), (16, 32, 64), (128, 256)):
        launch = cuda_kernels.launch_sm90(1, 16, cuda_kernels.PackedSm90(r, c, 1, 0, 1, 1), tokens)[2]
        most |= {cuda_kernels.entry_sm90(launch, dtype): launch.shared_bytes for dtype in cuda_kernels.NAMES}
    return most


# KiB of shared memory of a multiprocessor; each block costs one more than it asks for. Code for 8.0 runs on 8.6 and 8.9 too.
SHARED = {"sm_80": 164, "sm_89": 100, "sm_90": 228, "sm_90a": 228, "sm_100": 228, "sm_120": 100}


@pytest.mark.slow
@needs_nvcc
def test_code_for_every_architecture(library):
    """Each kernel for each architecture: no spills, registers and shared memory as the launcher claims, tensor cores and copies."""
    usage = subprocess.run([tool("cuobjdump"), "--dump-resource-usage", library], capture_output=True, text=True).stdout
    arch, seen, launched = "", {}, shared_of_launches()
    for line in usage.splitlines():
        if line.startswith("arch = "):
            arch = line.split()[-1]
        elif match := re.match(r"\s*Function (\w+):", line):
            name = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, static, local = map(int, match.groups())
            assert stack == local == 0, f"{name} for {arch} keeps {stack + local} bytes of registers in memory"
            threads, blocks = held(name, arch)
            assert -(-registers // 8) * 8 * threads * blocks <= 65536, f"{name} for {arch}: {registers} registers"
            if name.startswith("bsr_linear_sm90"):
                assert registers == 168, name  # what setmaxnreg counts on
            shared = static + 1024 + (launched[name] if name.startswith("bsr_") else 0)
            many = blocks if SHARED[arch] > 100 else 1
            assert many * shared <= 1024 * SHARED[arch], f"{name} for {arch}: {many} blocks of {shared} bytes"
            assert arch in ("sm_90", "sm_90a", "sm_100") or shared <= 1024 * 100, f"{name}: {shared} bytes"
            if re.match(r"bsr_linear_sm80_.*(32|64)x\d+_128$", name):  # two of them run on 8.6, 8.9 and 12.0 as well
                assert 2 * shared <= 1024 * 100, name
            seen.setdefault(arch, set()).add(name)
    # 24 of products in 16 bits and 6 of gradients; 20 of int8; 20 of e4m3, which no older GPU than 8.9 multiplies
    assert {arch: len(names) for arch, names in seen.items()} == {
        "sm_80": 50,
        "sm_89": 20,
        "sm_90": 70,
        "sm_90a": 16,
        "sm_100": 70,
        "sm_120": 70,
    }
    for arch, names in seen.items():
        dumped = [tool("cuobjdump"), "-sass", "-arch", arch, library]
        code = subprocess.run(dumped, capture_output=True, text=True).stdout
        found = dict(part.partition("\n")[::2] for part in re.split(r"\s*Function : ", code)[1:])
        assert names <= set(found)  # that of sm_90 comes with sm_90a
        for name in names:
            lacks = {
                each
                for each in wanted_instructions(name, arch)
                if not re.search(rf"\b{re.escape(each)}\b", found[name])
            }
            assert not lacks, f"no {lacks} in {name} for {arch}"
    # In a process of its own: where the package has a library like it loaded, this one would define its operators again.
    program = (
        "import ctypes, sys, torch; told = ctypes.CDLL(sys.argv[1]).sparse_prune_cuda_contents;"
        "told.restype = ctypes.c_char_p; print(told().decode())"
    )
    done = subprocess.run([sys.executable, "-c", program, str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    contents = done.stdout
    assert set(re.findall(r"sm_\w+", contents)) == set(seen) and "sm_120 and PTX" in contents
    listed = subprocess.run([tool("cuobjdump"), "--list-ptx", library], capture_output=True, text=True).stdout
    assert "sm_120" in listed


@pytest.mark.slow
@needs_nvcc
def test_it_loads_beside_any_torch_and_says_why_it_cannot_run(library):
    program = (
        "import ctypes, sys, torch; torch.ops.load_library(sys.argv[1]);"
        "print(*(getattr(torch.ops.sparse_prune, name) for name in ('cuda_linear', 'cuda_linear_sm90', 'cuda_sdd')));"
        "library = ctypes.CDLL(sys.argv[1])\n"
        "for name in ('sparse_prune_cuda_problem', 'sparse_prune_cuda_problem_sm90'):\n"
        "    told = getattr(library, name); told.restype = ctypes.c_char_p; print(told())"
    )
    done = subprocess.run([sys.executable, "-c", program, str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if torch.version.cuda is None:
        assert done.stdout.count("this torch was built without CUDA") == 2
    elif not torch.cuda.is_available():
        assert "CUDA" in done.stdout and "None" not in done.stdout


def test_it_is_loaded_only_when_it_is_asked_for(tmp_path):
    """Importing the package and running on a CPU leaves it alone; asking for its kernels loads it, or says why not."""
    package = tmp_path / "sparse_prune"
    package.mkdir()
    for path in Path(sp.__file__).parent.iterdir():
        if not path.name.startswith("_C_cuda"):
            (package / path.name).symlink_to(path)
    (package / "_C_cuda.abi3.so").write_text("no library")
    program = (
        "import torch; load, loaded = torch.ops.load_library, [];"
        "torch.ops.load_library = lambda path: (loaded.append(path), load(path));"
        "import sparse_prune as sp; from sparse_prune import backends;"
        f"assert backends.__file__ == {str(package / 'backends.py')!r};"
        "packed = sp.BsrWeight.from_dense(torch.randn(64, 64), torch.eye(2) > 0, (32, 32));"
        "sp.bsr_linear(torch.randn(3, 64), packed);"
        "print(sum('_C_cuda' in path for path in loaded));"
        "print(backends.cuda_unavailable(torch.device('cuda'), torch.bfloat16, (32, 32)));"
        "print(sum('_C_cuda' in path for path in loaded))"
    )
    paths = os.pathsep.join([str(tmp_path), str(ROOT / "kernels")])
    run = [sys.executable, "-c", program]
    done = subprocess.run(run, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    before, reason, after = done.stdout.strip().splitlines()
    assert (before, after) == ("0", "1") and reason.startswith("the CUDA extension _C_cuda.abi3.so does not load: ")


def test_reasons():
    for device, dtype, block, reason in (
        ("cpu", torch.float16, (32, 32), "run on CUDA devices, not on cpu"),
        ("cuda", torch.float32, (32, 32), "take bfloat16, float16, int8 and float8_e4m3fn, not float32"),
        ("cuda", torch.int8, (32, 16), "take int8 blocks of 32, 64 or 128 inputs, not 32x16"),
        ("cuda", torch.float16, (32, 8), "take blocks with sides 16, 32, 64 or 128, not 32x8"),
    ):
        with pytest.raises(sp.SparsePruneError, match=f"got 'cuda'; the CUDA kernels {reason}"):
            backend_for(device, dtype, "cuda", block)
    if not torch.cuda.is_available():
        with pytest.raises(sp.SparsePruneError, match="was not built|finds no CUDA device|does not load"):
            backend_for("cuda", torch.float16, "cuda")


@pytest.fixture(params=["A100", "H100"])
def emulated(monkeypatch, request):
    """The operators of csrc/cuda_ops.cpp on CPU tensors, by the emulator, which runs what nvcc made of the kernels; their calls."""
    hopper = request.param == "H100"
    source = (ROOT / "csrc" / "cuda_ops.cpp").read_text()
    schemas = ["".join(re.findall(r'"([^"]*)"', d)) for d in re.findall(r'm\.def\(\s*((?:"[^"]*"\s*)+)\)', source)]
    calls = []

    def cuda_linear(x, packed, work, nnzb, block_rows, block_cols, out_features, bias, activation, residual):
        assert not hopper
        calls.append(("linear", packed.data_ptr()))
        blocks = (nnzb, block_rows, block_cols)
        extras = (bias, activation, residual)
        return cuda_kernels.linear(cuda_kernels.aligned(x), packed, blocks, out_features, *extras, work=work)[0]

    def cuda_linear_sm90(x, packed, nnzb, r, c, out_features, cluster, groups, lines, bias, activation, residual):
        assert hopper
        calls.append(("linear", packed.data_ptr()))
        weight = cuda_kernels.PackedSm90(r, c, cluster, nnzb, groups, lines)
        return cuda_kernels.linear_sm90(
            cuda_kernels.aligned(x), packed, weight, out_features, bias, activation, residual
        )[0]

    def linear_w8a8(of):
        def run(x, packed, scales, nnzb, r, c, out_features, bias, activation, residual, x_scale):
            calls.append((of, packed.data_ptr()))
            given = (cuda_kernels.aligned(x), packed, scales, (nnzb, r, c), out_features, bias, activation, residual)
            arch = "sm_80" if of == torch.int8 else "sm_89"
            return cuda_kernels.linear_w8a8(*given, x_scale, arch=arch, of=of)[0]

        return run

    def cuda_sdd(dy, x, jobs, nnzb, block_rows, block_cols):
        calls.append(("sdd", jobs.data_ptr()))
        dy, x = cuda_kernels.aligned(dy), cuda_kernels.aligned(x)
        return cuda_kernels.sdd(dy, x, jobs, (nnzb, block_rows, block_cols))[0]

    scope = torch.library.Library("sparse_prune", "FRAGMENT")
    played = {"cuda_linear": cuda_linear, "cuda_linear_sm90": cuda_linear_sm90}
    played |= {f"cuda_linear_{kind}": linear_w8a8(of) for of, kind in cuda_kernels.KINDS.items()}
    played["cuda_sdd"] = cuda_sdd
    assert sorted(schema.partition("(")[0] for schema in schemas) == sorted(played)
    for schema in schemas:
        name = schema.partition("(")[0]
        if not hasattr(torch.ops.sparse_prune, name):
            scope.define(schema)
        scope.impl(name, played[name], "CPU")
    monkeypatch.setattr(backends, "cuda_unavailable", lambda *_: None)
    monkeypatch.setattr(backends, "cuda_sm90_unavailable", lambda _: None if hopper else "no Hopper")
    monkeypatch.setattr(ops, "prepack", lambda *_: None)  # the CPU kernels' layout
    monkeypatch.setattr(ops, "runs_dequantized", lambda *_: False)  # as a CPU does
    yield calls
    scope._destroy()


def some_weight(dtype=torch.bfloat16):
    """70 x 100 in blocks of 32 x 32, and a generator."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(70, 100, generator=generator).to(dtype)
    mask = torch.rand(3, 4, generator=generator) < 0.6
    return sp.BsrWeight.from_dense(weight, mask, blocksize=(32, 32)), generator


@needs_nvcc
def test_backend_cuda_end_to_end(emulated):
    packed, generator = some_weight()
    bias = torch.randn(70, generator=generator).bfloat16()
    for tokens in (3, 50):
        x = torch.randn(2, tokens, 100, generator=generator).bfloat16()
        residual = torch.randn(2, tokens, 70, generator=generator).bfloat16()
        got = sp.bsr_linear(x, packed, bias, "relu", residual, backend="cuda")
        exact = F.relu(F.linear(x.double(), packed.to_dense().double(), bias.double())) + residual.double()
        torch.testing.assert_close(got.double(), exact, rtol=2**-7, atol=2**-7)
    assert len(emulated) == 2 and emulated[0] == emulated[1], "the layout was not kept"
    packed.values.mul_(2)
    twice = sp.bsr_linear(x, packed, backend="cuda")
    torch.testing.assert_close(twice.double(), F.linear(x.double(), packed.to_dense().double()), rtol=2**-7, atol=2**-6)


@needs_nvcc
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_backend_cuda_gradients(emulated, activation, frozen):
    """Of x, values, bias and residual against float64; dx and dvalues by the CUDA kernels, once each."""
    packed, generator = some_weight(torch.float16)
    packed.values.requires_grad_(not frozen)
    x, bias, residual = (
        torch.randn(*shape, generator=generator).half().requires_grad_() for shape in ((2, 40, 100), (70,), (2, 40, 70))
    )
    dy = torch.randn(2, 40, 70, generator=generator).half()
    y = sp.bsr_linear(x, packed, bias, activation, residual, backend="cuda")
    given = [tensor for tensor in (x, packed.values, bias, residual) if tensor.requires_grad]
    got = torch.autograd.grad(y, given, dy)
    forwards = 2 if activation == "gelu" else 1
    assert [name for name, _ in emulated] == ["linear"] * (forwards + 1) + ["sdd"] * (not frozen)

    exact = [
        tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in (x, packed.values, bias, residual)
    ]
    index = (packed.crow_indices, packed.col_indices, exact[1])
    z = reference.bsr_linear(exact[0].view(-1, 100), *index, 70, exact[2], activation, exact[3].view(-1, 70))
    wanted = torch.autograd.grad(z.view(y.shape), [tensor for tensor in exact if tensor.requires_grad], dy.double())
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.dtype == torch.float16 and ours.shape == theirs.shape
        torch.testing.assert_close(ours.double(), theirs, rtol=2**-8, atol=2**-9 * float(theirs.abs().max()) + 2**-10)


@needs_nvcc
def test_backend_cuda_trains(emulated):
    """A step changes values, and the next call sees it: nothing made of the old ones is kept."""
    packed, generator = some_weight()
    packed.values.requires_grad_()
    x, target = (
        torch.randn(33, 100, generator=generator).bfloat16(),
        torch.randn(33, 70, generator=generator).bfloat16(),
    )
    optimizer, losses = torch.optim.SGD([packed.values], lr=0.02), []
    for _ in range(4):
        loss = F.mse_loss(sp.bsr_linear(x, packed, backend="cuda").float(), target.float(), reduction="sum") / 33
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.9 * losses[0]


@needs_nvcc
def test_opcheck(emulated):
    packed, generator = some_weight()
    x, dy = torch.randn(20, 100, generator=generator).bfloat16(), torch.randn(20, 70, generator=generator).bfloat16()
    index, values = (packed.crow_indices, packed.col_indices), packed.values.detach().requires_grad_()
    sparse, residual = torch.ops.sparse_prune, torch.zeros_like(dy)
    arguments = (x.requires_grad_(), *index, values, None, 70, dy[0].clone().requires_grad_(), "silu", residual)
    torch.library.opcheck(sparse.bsr_linear_cuda.default, arguments)
    torch.library.opcheck(sparse.bsr_linear_dx_cuda.default, (dy, *index, packed.values, 100))
    torch.library.opcheck(sparse.bsr_sdd_cuda.default, (dy, x.detach(), *index, 32, 32))


def test_what_is_made_of_an_index_is_made_once():
    from sparse_prune_kernels import cuda

    packed, _ = some_weight()
    crow, col = packed.crow_indices.clone(), packed.col_indices.clone()
    layout = cuda.layout_of(crow, col, 4, 32, 32, False)
    assert cuda.layout_of(crow, col, 4, 32, 32, False) is layout
    assert cuda.layout_of(crow, col, 4, 32, 32, True) is not layout
    jobs = cuda.jobs_of(crow, col, 4, 32, 32)
    assert cuda.jobs_of(crow, col, 4, 32, 32) is jobs
    col[0] = col[0].clone()
    assert cuda.jobs_of(crow, col, 4, 32, 32) is not jobs
    assert cuda.layout_of(crow, col, 4, 32, 32, False) is not layout


@needs_nvcc
@pytest.mark.parametrize("of", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_backend_cuda_on_weights_of_8_bits(emulated, of):
    packed, generator = some_weight(torch.float32)
    packed = packed.quantize(of)
    for dtype, x_scale in ((torch.bfloat16, None), (torch.float16, 0.03)):
        x, residual = (torch.randn(2, 20, size, generator=generator).to(dtype) for size in (100, 70))
        bias = torch.randn(70, generator=generator).to(dtype)
        got = sp.bsr_linear(x, packed, bias, "gelu", residual, backend="cuda", x_scale=x_scale)
        wanted = sp.bsr_linear(x, packed, bias, "gelu", residual, backend="reference", x_scale=x_scale)
        torch.testing.assert_close(got, wanted)
    assert [name for name, _ in emulated] == [of] * 2 and emulated[0] == emulated[1], "the layout was not kept"
    index = (packed.crow_indices, packed.col_indices, packed.values, packed.scales)
    rows = x.view(-1, 100)
    arguments = (rows, *index, None, 70, bias, "none", None, None)
    operator = getattr(torch.ops.sparse_prune, f"bsr_linear_{cuda_kernels.KINDS[of]}_cuda")
    # torch cannot compare float8_e4m3fn before and after, as the test of the schema does
    tests = {} if of == torch.int8 else {"test_utils": ("test_faketensor", "test_aot_dispatch_dynamic")}
    torch.library.opcheck(operator.default, arguments, **tests)
    with pytest.raises(sp.SparsePruneError, match="x: expected bfloat16 or float16 beside a quantized weight"):
        sp.bsr_linear(x.float(), packed, backend="cuda")


@needs_nvcc
@pytest.mark.parametrize("kernel", ["cuda", "triton"])
def test_what_auto_runs_on_a_gpu(emulated, monkeypatch, kernel):
    """Forward, dx and dW by the kernel that the planner names, which is asked about this weight and M."""
    packed, generator = some_weight()
    x, dy = torch.randn(20, 100, generator=generator).bfloat16(), torch.randn(20, 70, generator=generator).bfloat16()
    index, asked = (packed.crow_indices, packed.col_indices), []

    def gpu_kernel(*arguments):
        asked.append(arguments)
        return kernel

    monkeypatch.setattr(planner, "gpu_kernel", gpu_kernel)
    calls = {
        "bsr_linear": (x, *index, packed.values, None, 70, None, "none", None),
        "bsr_linear_dx": (dy, *index, packed.values, 100),
        "bsr_sdd": (dy, x, *index, 32, 32),
    }
    for name, arguments in calls.items():
        got = ops.picking(name, lambda *given: ("triton", given))(*arguments)
        if kernel == "triton":
            assert got == ("triton", arguments)
        else:
            exact = getattr(torch.ops.sparse_prune, name)(*arguments)
            torch.testing.assert_close(got, exact, rtol=2**-6, atol=2**-5)
    assert asked == [(x.device, torch.bfloat16, (32, 32), packed.nnzb / 12, (70, 100), 20)] * 3
    assert len(emulated) == (3 if kernel == "cuda" else 0)
