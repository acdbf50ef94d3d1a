"""Which kernels work on this machine, and why the others do not.

The CPU kernels are a library beside this file (`_C_cpu*.so`, built by setup.py) that registers itself with PyTorch when loaded; the
CUDA kernels are another (`_C_cuda*.so`), loaded only when they are asked for.
They hold one path per instruction set and choose at run time; SPARSE_PRUNE_ISA, or `force_isa`, holds them to a lower one.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from .bsr import dtype_name
from .errors import SparsePruneError

ISAS = ("amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni", "avx512", "avx2", "portable")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 4}  # numbered as in csrc/cpu_ops.cpp


@dataclass(frozen=True)
class BackendStatus:
    """One line of `sp.show_config()`: a backend, whether it can run here, and if not why; detail names what it would use."""

    name: str
    available: bool
    reason: str
    detail: str


def _load() -> tuple[ctypes.CDLL | None, str]:
    """The loaded extension and "", or None and the reason: importing the package works without it.

    Raises SparsePruneError where SPARSE_PRUNE_ISA asks for what the processor does not have.
    """
    files = sorted(Path(__file__).parent.glob("_C_cpu*.so"))
    if not files:
        how = "a C++20 compiler at install time, SPARSE_PRUNE_CPU=1 to see why it fails"
        return None, f"the C++ extension was not built ({how})"
    try:
        torch.ops.load_library(str(files[0]))
        library = ctypes.CDLL(str(files[0]))
        library.sparse_prune_cpu_isas.restype = ctypes.c_char_p
        library.sparse_prune_cpu_isa.restype = ctypes.c_char_p
        library.sparse_prune_drop_ready.argtypes = (ctypes.c_int64,)
        library.sparse_prune_drop_ready.restype = None
        library.sparse_prune_peak_flops.restype = ctypes.c_double
        library.sparse_prune_read_bytes_per_second.restype = ctypes.c_double
        library.sparse_prune_read_bytes_per_second.argtypes = (ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64)
    except (OSError, AttributeError) as error:
        return None, f"the C++ extension {files[0].name} does not load: {error}"
    wanted = os.environ.get("SPARSE_PRUNE_ISA", "")
    if not library.sparse_prune_force_isa(wanted.encode()):
        offered = library.sparse_prune_cpu_isas().decode().replace(",", ", ")
        raise SparsePruneError(
            "SPARSE_PRUNE_ISA", f"an instruction set of this processor ({offered})", wanted, "unset it for the best one"
        )
    return library, ""


_kernels: ModuleType | None
try:
    import sparse_prune_kernels as _kernels
except ModuleNotFoundError:
    _kernels = None
NO_KERNELS = "the package sparse_prune_kernels is not installed beside sparse_prune"
_library, _reason = _load()
_forced: list[str] = [os.environ.get("SPARSE_PRUNE_ISA", "")]
# Changes whenever another kernel may be chosen than before, so that what layers derived for one is made again.
epoch = 0
optimizer_steps = 0  # taken in this process


def _count_step(*_: object) -> None:
    """Fused optimizers write weights, and FSDP2 gathers them, without raising the version that PyTorch counts for a tensor."""
    global optimizer_steps
    if not torch.compiler.is_compiling():  # what a compiled step writes, AOTAutograd counts
        optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)


def cpu_unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """None where the C++ kernels run for tensors of that device and dtype, else the reason in words."""
    if device.type != "cpu":
        return f"the C++ kernels run on the CPU, not on {device.type}"
    if dtype not in _DTYPES:
        return f"the C++ kernels are made for float32, bfloat16, float16 and int8, not {dtype_name(dtype)}"
    return None if _library is not None else _reason


def triton_unavailable(device: torch.device, dtype: torch.dtype, blocksize: tuple[int, int]) -> str | None:
    """None where the Triton kernels run a weight of that dtype and blocksize on that device, else the reason in words."""
    if _kernels is None:
        return NO_KERNELS
    return _kernels.unavailable(device, dtype, blocksize)


def cuda_unavailable(device: torch.device, dtype: torch.dtype, blocksize: tuple[int, int]) -> str | None:
    """None where the CUDA C++ kernels run a weight of that dtype and blocksize on that device, else the reason in words."""
    if _kernels is None:
        return NO_KERNELS
    refused = _kernels.refused("CUDA", _kernels.CUDA_DTYPES, device, dtype, blocksize)
    if refused is not None:
        return refused
    if dtype.itemsize == 1 and blocksize[1] < 32:
        return f"the CUDA kernels take {dtype_name(dtype)} blocks of 32, 64 or 128 inputs, not {blocksize[0]}x{blocksize[1]}"
    library, reason = _load_cuda()
    if library is None:
        return reason
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    from sparse_prune_kernels.support import E4M3_CAPABILITY

    if dtype == torch.float8_e4m3fn and gpu_capability(device) < E4M3_CAPABILITY:
        return f"compute capability {gpu_capability(device) / 10} is older than 8.9, the first that multiplies float8_e4m3fn"
    with torch.cuda.device(device):
        problem = library.sparse_prune_cuda_problem()
    return None if problem is None else problem.decode()


def gpu_reasons(device: torch.device, dtype: torch.dtype, blocksize: tuple[int, int]) -> dict[str, str | None]:
    """For each kind of kernel that runs on GPUs why it does not take that problem there, or None where it does."""
    return {
        "cuda": cuda_unavailable(device, dtype, blocksize),
        "triton": triton_unavailable(device, dtype, blocksize),
    }


def gpu_capability(device: torch.device) -> int:
    """A GPU's compute capability as its architecture is numbered: 80, 90, 120."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def gpu_name() -> str:
    """The model of this machine's GPU; "" without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


_CUDA_OPERATORS = ("cuda_linear", "cuda_linear_sm90", "cuda_linear_int8", "cuda_linear_e4m3", "cuda_sdd")


@functools.cache
def _load_cuda() -> tuple[ctypes.CDLL | None, str]:
    """The loaded CUDA extension and "", or None and the reason."""
    files = sorted(Path(__file__).parent.glob("_C_cuda*.so"))
    if not files:
        return None, "the CUDA extension was not built (nvcc at install time, SPARSE_PRUNE_CUDA=1 to see why it fails)"
    try:
        torch.ops.load_library(str(files[0]))
        library = ctypes.CDLL(str(files[0]))
        for told in ("sparse_prune_cuda_problem", "sparse_prune_cuda_problem_sm90", "sparse_prune_cuda_contents"):
            getattr(library, told).restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:
        return None, f"the CUDA extension {files[0].name} does not load: {error}"
    missing = [name for name in _CUDA_OPERATORS if not hasattr(torch.ops.sparse_prune, name)]
    if missing:
        what = f"is of another version (it has no {missing[0]}): build it again"
        return None, f"the CUDA extension {files[0].name} {what}"

    @torch.library.register_fake("sparse_prune::cuda_linear")
    def _(x, packed, work, nnzb, block_rows, block_cols, out_features, bias, activation, residual):
        return x.new_empty(x.shape[0], out_features)

    @torch.library.register_fake("sparse_prune::cuda_linear_sm90")
    def _(x, packed, nnzb, block_rows, block_cols, out_features, *others):
        return x.new_empty(x.shape[0], out_features)

    for name in ("cuda_linear_int8", "cuda_linear_e4m3"):

        @torch.library.register_fake(f"sparse_prune::{name}")
        def _(x, packed, scales, nnzb, block_rows, block_cols, out_features, *others):
            return x.new_empty(x.shape[0], out_features)

    @torch.library.register_fake("sparse_prune::cuda_sdd")
    def _(dy, x, jobs, nnzb, block_rows, block_cols):
        return dy.new_empty(nnzb, block_rows, block_cols)

    return library, ""


def cuda_contents() -> str:
    """By which compiler, and for which architectures, the CUDA extension was built; "" without one."""
    library, _ = _load_cuda()
    return "" if library is None else f"built by {library.sparse_prune_cuda_contents().decode()}"


@functools.cache
def cuda_sm90_unavailable(device: torch.device) -> str | None:
    """None where products on that device run by the kernel for Hopper and its layout, else the reason in words."""
    library, reason = _load_cuda()
    if library is None:
        return reason
    if device.type != "cuda":
        return f"the kernel for Hopper runs on CUDA devices, not on {device.type}"
    with torch.cuda.device(device):
        problem = library.sparse_prune_cuda_problem_sm90()
    return None if problem is None else problem.decode()


def cuda_layout(
    crow: torch.Tensor, col: torch.Tensor, values: torch.Tensor, in_features: int, transposed: bool = False
) -> torch.Tensor:
    """values[nnzb, R, C] and their index in one uint8 tensor, as `cuda_linear` reads them on their device: W, or W^T for dx.

    Waits for the GPU where the index is new.
    """
    from sparse_prune_kernels import cuda, cuda_sm90

    r, c = values.shape[1:]
    with _in_our_words():
        if values.dtype.itemsize == 1:  # two of them count as one number
            return cuda.layout_of(crow, col, -(-in_features // c), r, c // 2, most_row=cuda.ROW_8).pack(
                values.contiguous().view(torch.int16)
            )
        if cuda_sm90_unavailable(values.device) is None:
            return cuda_sm90.layout_of(crow, col, in_features, r, c, transposed).pack(values)
        return cuda.layout_of(crow, col, -(-in_features // c), r, c, transposed).pack(values)


@contextlib.contextmanager
def _in_our_words() -> Iterator[None]:
    """Errors of the kernels' package as SparsePruneError."""
    from sparse_prune_kernels.support import ArgumentError

    try:
        yield
    except ArgumentError as mistake:
        raise SparsePruneError(*mistake.problem) from None


def cuda_linear(
    x: torch.Tensor,
    crow: torch.Tensor,
    col: torch.Tensor,
    values: torch.Tensor,
    shape: tuple[int, int],
    packed: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    residual: torch.Tensor | None = None,
    transposed: bool = False,
) -> torch.Tensor:
    """act(x @ W^T + bias) + residual by the CUDA C++ kernels; packed is cuda_layout's. transposed: x @ W.

    W[N, K] of that shape: values[nnzb, R, C] with their index.
    """
    from sparse_prune_kernels import cuda, cuda_sm90

    nnzb, r, c = values.shape
    sides = (nnzb, c, r, shape[1]) if transposed else (nnzb, r, c, shape[0])
    extras = (bias, activation, residual)
    if cuda_sm90_unavailable(x.device) is not None:
        work = cuda.layout_of(crow, col, -(-shape[1] // c), r, c, transposed).work
        return torch.ops.sparse_prune.cuda_linear(x, packed, work, *sides, *extras)
    plan = cuda_sm90.layout_of(crow, col, shape[1], r, c, transposed).plan
    sizes = (plan.cluster, plan.groups, plan.lines)
    return torch.ops.sparse_prune.cuda_linear_sm90(x, packed, *sides, *sizes, *extras)


def cuda_jobs(crow: torch.Tensor, col: torch.Tensor, in_features: int, r: int, c: int) -> torch.Tensor:
    """The table that the operator cuda_sdd reads for the gradient of values[nnzb, R, C]. A new index makes it wait for the GPU."""
    from sparse_prune_kernels import cuda

    with _in_our_words():
        return cuda.jobs_of(crow, col, -(-in_features // c), r, c)


def register_triton(
    library: torch.library.Library, fallbacks: dict[str, Callable], wrap: Callable[[str, Callable], Callable]
) -> None:
    """Make wrap(name, Triton's kernel) the CUDA implementation of the operators, where they are installed; imports no Triton."""
    if _kernels is not None:
        _kernels.register(library, fallbacks, SparsePruneError, wrap)


def cpu_isas() -> tuple[str, ...]:
    """The instruction sets that the kernels can use on this machine, best first; empty without the extension."""
    return () if _library is None else tuple(_library.sparse_prune_cpu_isas().decode().split(","))


def cpu_isa(dtype: torch.dtype) -> str:
    """The instruction set that runs for weights of dtype: of those that are allowed the best one that has kernels for it.

    float32 has its up to avx512, float16 also amx_bf16, bfloat16 that and avx512_bf16, int8 all but avx512
    and amx_bf16.

    Raises SparsePruneError where the kernels cannot run, with the reason.
    """
    reason = cpu_unavailable(torch.device("cpu"), dtype)
    if reason is not None or _library is None:
        raise SparsePruneError("dtype", "one that the CPU kernels run", dtype, reason or _reason)
    return _library.sparse_prune_cpu_isa(_DTYPES[dtype]).decode()


def drop_ready(number: int) -> None:
    """Forget the layer that the operator cpu_ready gave that number."""
    if _library is not None:
        _library.sparse_prune_drop_ready(number)


def cpu_name() -> str:
    """Processor model, as the operating system names it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cpu_build() -> str:
    """Names the build of the C++ kernels, so that numbers of another build are not taken for this one's; "" without them."""
    if _library is None:
        return ""
    return hashlib.sha256(Path(_library._name).read_bytes()).hexdigest()[:12]


def peak_flops(isa: str) -> float:
    """FLOP/s of one thread doing multiply-adds on registers alone, by a set of cpu_isas(); 0 for another name."""
    assert _library is not None
    return _library.sparse_prune_peak_flops(isa.encode())


def read_bytes_per_second(data: torch.Tensor) -> float:
    """Bytes/s of one thread that reads a contiguous CPU tensor in order, again and again."""
    assert _library is not None
    size = data.numel() * data.element_size()
    return _library.sparse_prune_read_bytes_per_second(cpu_isas()[0].encode(), ctypes.c_void_p(data.data_ptr()), size)


def together(threads: int, probe: Callable[[], float]) -> float:
    """The sum of what probe() gives in that many threads at once."""
    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(lambda _: probe(), range(threads)))


@contextlib.contextmanager
def force_isa(name: str) -> Iterator[None]:
    """Use no instruction set above `name` inside the block, in every thread of the process.

    Raises SparsePruneError for a name that is not in cpu_isas().
    """
    global epoch
    if _library is None or not name or not _library.sparse_prune_force_isa(name.encode()):
        offered = ", ".join(cpu_isas()) or f"none here: {_reason}"
        raise SparsePruneError("name", f"an instruction set of this machine ({offered})", repr(name), "see cpu_isas()")
    _forced.append(name)
    epoch += 1
    try:
        yield
    finally:
        _forced.pop()
        epoch += 1
        _library.sparse_prune_force_isa(_forced[-1].encode())


def _status(name: str, reason: str | None, works: str, version: str = "") -> BackendStatus:
    """reason: why it does not run, or None; works: what then does; version stands beside either."""
    told = "; ".join(part for part in (works if reason is None else reason, version) if part)
    return BackendStatus(name, reason is None, "" if reason is None else told, told if reason is None else "")


def status() -> list[BackendStatus]:
    """Every backend, best first, with the reason where one cannot run."""
    on_gpu = gpu_reasons(torch.device("cuda"), torch.float16, (32, 32))
    triton = "" if _kernels is None else _kernels.triton_version()
    no_cpu = None if _library is not None else f"{_reason}; encoders run unfused"
    isas = f"instruction sets {', '.join(cpu_isas())}; {torch.get_num_threads()} threads; encoders run fused"
    return [
        _status("cuda", on_gpu["cuda"], "C++ kernels; bfloat16, float16, and weights of 8 bits", cuda_contents()),
        _status("triton", on_gpu["triton"], gpu_name(), triton),
        _status("cpu", no_cpu, isas),
        _status("reference", None, f"plain PyTorch {torch.__version__}, any device"),
    ]
