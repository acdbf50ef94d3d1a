"""Executes PTX on CPU tensors, so that GPU code is tested where no GPU is.

    counts = emulate(ptx, "kernel", grid=(8,), block_threads=128, args=[x, y, 32], shared_bytes=4096)

Tensors are read and written in place. Whatever the program does that hardware leaves undefined (an access outside the tensors
passed, a barrier that not all lanes reach, ...) raises EmulationError with the line of the PTX. docs/gpu-verification.md says
what is checked and what is not, and how to add an instruction; state.h is where to start reading.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from built import built

HERE = Path(__file__).parent
# No contraction: PTX says itself where a product and a sum are one operation.
FLAGS = (
    "-std=c++20",
    "-O3",
    "-march=native",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fno-math-errno",
    "-fPIC",
    "-pthread",
)
MODES = ("late", "early", "random")
FIRST_ADDRESS = 0x7F0000000000
GAP = 1 << 24  # between tensors: an address off by less than this is reported by name, not taken for another tensor

KINDS = (  # as in state.h
    *("integer", "float", "convert", "move", "predicate", "control", "barrier", "shuffle"),
    *("load_global", "store_global", "load_shared", "store_shared", "load_param", "local", "atomic", "copy_async"),
    *("copy_bulk", "mbarrier", "ldmatrix", "stmatrix", "mma", "wgmma", "fence", "special"),
)


class EmulationError(RuntimeError):
    """The program does what hardware forbids or leaves undefined; the message begins with the line of the PTX."""


@dataclass
class Counts:
    """What a grid did. Wavefronts, sectors and bytes as Nsight Compute defines them; a sector is 32 bytes, a wavefront 128.

    kinds                 warp instructions by kind (KINDS)
    instructions          warp instructions; thread_instructions: the same, times active lanes
    tensor_fma            multiply-adds of mma and wgmma
    shared_wavefronts     cycles of shared memory; shared_ideal: those that the distinct words would take without bank conflicts
    global_*_sectors      per warp instruction: sectors touched; bytes: what the lanes asked for
    l2_load_sectors       loads that reach L2 if L1 holds all that its block has loaded; cp.async.cg and the like always do
    dram_*_sectors        distinct sectors in the whole grid: the least that memory must move
    wgmma_shared_bytes    what wgmma reads from shared memory
    """

    kinds: dict[str, int] = field(default_factory=dict)
    instructions: int = 0
    thread_instructions: int = 0
    tensor_fma: int = 0
    shared_wavefronts: int = 0
    shared_ideal: int = 0
    shared_read_bytes: int = 0
    shared_write_bytes: int = 0
    global_requests: int = 0
    global_load_sectors: int = 0
    global_store_sectors: int = 0
    global_load_bytes: int = 0
    global_store_bytes: int = 0
    l2_load_sectors: int = 0
    dram_load_sectors: int = 0
    dram_store_sectors: int = 0
    wgmma_shared_bytes: int = 0
    local_bytes: int = 0


def unavailable() -> str | None:
    """Why the emulator cannot run here, or None."""
    if _compiler() is None:
        return "the PTX emulator needs a C++20 compiler (CXX, g++ or clang++)"
    return None


@dataclass
class TensorMap:
    """A tensor map, for a kernel argument of 128 bytes: what cuTensorMapEncodeTiled makes of the same arguments, with its checks.

    Sizes run from the innermost dimension outwards, as there: for row-major [rows, columns], global_dim is (columns, rows).

    tensor           CPU tensor that holds the data
    box_dim          elements of a box, per dimension: 1 to 256
    global_dim       elements of the tensor, per dimension; the tensor's own shape by default
    global_strides   bytes from one index to the next, per dimension but the innermost; multiples of 16; the tensor's own by default
    swizzle          0, 32, 64 or 128: bytes of the row within which 16-byte pieces change places
    """

    tensor: torch.Tensor
    box_dim: Sequence[int]
    global_dim: Sequence[int] | None = None
    global_strides: Sequence[int] | None = None
    swizzle: int = 0

    def __post_init__(self):
        t, size = self.tensor, self.tensor.element_size()
        self.global_dim = tuple(t.shape[::-1] if self.global_dim is None else self.global_dim)
        self.global_strides = tuple(
            (s * size for s in t.stride()[-2::-1]) if self.global_strides is None else self.global_strides
        )
        self.box_dim, rank, inner = tuple(self.box_dim), len(self.global_dim), self.box_dim[0] * size

        def check(ok: bool, name: str, expected: str) -> None:
            if not ok:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name, None)}")

        check(1 <= rank <= 5, "global_dim", "one to five dimensions")
        check(all(1 <= d <= 1 << 32 for d in self.global_dim), "global_dim", "1 to 2^32")
        check(len(self.global_strides) == rank - 1, "global_strides", f"{rank - 1} strides")
        check(
            all(s % 16 == 0 and 0 < s < 1 << 40 for s in self.global_strides),
            "global_strides",
            "multiples of 16 below 2^40",
        )
        check(
            len(self.box_dim) == rank and all(1 <= b <= 256 for b in self.box_dim),
            "box_dim",
            f"{rank} sizes from 1 to 256",
        )
        check(inner % 16 == 0, "box_dim", "an innermost size of a multiple of 16 bytes")
        check(self.swizzle in (0, 32, 64, 128), "swizzle", "0, 32, 64 or 128")
        check(not self.swizzle or inner <= self.swizzle, "box_dim", f"at most {self.swizzle} bytes innermost (swizzle)")
        if self.swizzle and inner != self.swizzle:
            raise NotImplementedError(f"boxes whose rows are shorter than the swizzle: {inner} of {self.swizzle} bytes")

    def pack(self, address: int) -> bytes:
        if address % 16:
            raise ValueError(f"tensor: expected an address that is a multiple of 16, got {address:#x}")
        pad = lambda values, n: [*values, *[0] * (n - len(values))]  # noqa: E731
        return struct.pack(
            "<2Q4Q5I5I3I7I",
            *(
                0x70616D726F736E74,
                address,
                *pad(self.global_strides, 4),
                *pad(self.global_dim, 5),
                *pad(self.box_dim, 5),
            ),
            *(len(self.global_dim), self.tensor.element_size(), self.swizzle, *[0] * 7),
        )


class Program:
    """A kernel, parsed once. `launch` runs it; see emulate."""

    def __init__(self, ptx: str, entry: str = ""):
        self._library = _library()
        handle, error = ctypes.c_void_p(), ctypes.create_string_buffer(4096)
        if self._library.ptx_parse(ptx.encode(), entry.encode(), ctypes.byref(handle), error, 4096):
            raise EmulationError(error.value.decode())
        self._handle = handle
        info = (ctypes.c_uint32 * 11)()
        self._library.ptx_info(handle, info)
        self.target, self.static_shared_bytes, self.param_bytes, self.instructions = info[:4]
        self.required_threads, self.required_cluster = tuple(info[5:8]), tuple(info[8:11])
        self.params = []  # (offset, bytes)
        for k in range(self._library.ptx_param_count(handle)):
            at, size = ctypes.c_uint32(), ctypes.c_uint32()
            self._library.ptx_param(handle, k, ctypes.byref(at), ctypes.byref(size))
            self.params.append((at.value, size.value))

    def __del__(self):
        if getattr(self, "_handle", None):
            self._library.ptx_free(self._handle)

    def launch(
        self,
        grid: int | Sequence[int],
        block_threads: int | Sequence[int],
        args: Sequence,
        shared_bytes: int = 0,
        cluster: Sequence[int] | None = None,
        mode: str = "late",
        seed: int = 0,
        count: bool = True,
        races: bool = True,
        threads: int | None = None,
        limit: int = 1 << 32,
    ) -> Counts:
        """Run a grid to its end; arguments as in emulate."""
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
        block = _three(block_threads)
        if any(self.required_threads) and block != self.required_threads:
            raise ValueError(f"block_threads: expected {self.required_threads} (.reqntid), got {block}")
        required = self.required_cluster if any(self.required_cluster) else (1, 1, 1)
        memory = _Memory(args)
        packed = self._pack(args, memory)
        base, size, host, legal = memory.arrays()
        a = _RunArguments(
            (ctypes.c_uint32 * 3)(*_three(grid)),
            (ctypes.c_uint32 * 3)(*block),
            (ctypes.c_uint32 * 3)(*(_three(cluster) if cluster is not None else required)),
            shared_bytes,
            len(packed),
            len(memory.regions),
            MODES.index(mode),
            count,
            races,
            threads or min(2, os.cpu_count() or 1),
            seed,
            limit,
            packed,
            base,
            size,
            host,
            legal,
        )
        names = [f.name for f in fields(Counts) if f.name != "kinds"]
        out, error = (ctypes.c_uint64 * (len(KINDS) + len(names)))(), ctypes.create_string_buffer(8192)
        if self._library.ptx_run(self._handle, ctypes.byref(a), out, error, 8192):
            raise EmulationError(memory.explain(error.value.decode(errors="replace")))
        return Counts(
            dict(zip(KINDS, out[: len(KINDS)], strict=True)), **dict(zip(names, out[len(KINDS) :], strict=True))
        )

    def _pack(self, args: Sequence, memory: _Memory) -> bytes:
        """The parameter space. Trailing pointers may be left out: they are null (Triton's scratch pointers)."""
        missing = self.params[len(args) :]
        if len(args) > len(self.params) or any(size != 8 for _, size in missing):
            raise ValueError(
                f"args: expected {len(self.params)} arguments of {[s for _, s in self.params]} bytes, got {len(args)}"
            )
        packed = bytearray(self.param_bytes)
        for place, ((at, size), value) in enumerate(zip(self.params, args, strict=False)):
            if isinstance(value, torch.Tensor):
                value = memory.address(value)
            if isinstance(value, TensorMap):
                value = value.pack(memory.address(value.tensor))
            if isinstance(value, float):
                data = struct.pack("<f" if size == 4 else "<d", value)
            elif isinstance(value, bytes):
                data = value
            elif isinstance(value, int):
                data = (int(value) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
            else:
                raise TypeError(f"args[{place}]: expected a tensor, int, float or bytes, got {type(value).__name__}")
            if len(data) != size:
                raise ValueError(f"args[{place}]: expected {size} bytes, got {len(data)}")
            packed[at : at + size] = data
        return bytes(packed)


def emulate(
    ptx: str, entry: str, grid: int | Sequence[int], block_threads: int | Sequence[int], args: Sequence = (), **options
) -> Counts:
    """Run kernel `entry` of the PTX text on CPU tensors and count what it does.

    grid, block_threads   blocks and threads, one to three numbers
    args                  in the kernel's order: CPU tensors (pointers), TensorMaps, ints, floats, bytes; trailing pointers may be
                          missing
    shared_bytes          dynamic shared memory, what the text declares itself not included (Triton: all of metadata.shared)
    cluster               blocks of a cluster; .reqnctapercluster by default
    mode                  when asynchronous work completes: "late" as the program allows, "early" at once, "random" by `seed`
    count, races          whether to count, and whether to look for races in shared memory
    threads               host threads that work on blocks side by side
    limit                 warp instructions of one block after which it counts as hung

    Raises EmulationError for anything that hardware leaves undefined, naming the line of the PTX, block, warp and lane.
    """
    return Program(ptx, entry).launch(grid, block_threads, args, **options)


def _three(sizes: int | Sequence[int]) -> tuple[int, int, int]:
    sizes = (sizes,) if isinstance(sizes, int) else tuple(sizes)
    return sizes + (1,) * (3 - len(sizes))


class _Memory:
    """Device addresses for the tensors passed. Those that share storage share a region; bytes that no tensor covers are illegal."""

    def __init__(self, args: Sequence):
        tensors = [(k, a.tensor if isinstance(a, TensorMap) else a) for k, a in enumerate(args)]
        tensors = [(k, a) for k, a in tensors if isinstance(a, torch.Tensor)]
        self.regions = []  # [first device address, bytes, host address, flag per byte or None, arguments]
        self._where = {}  # storage -> region, and the host address that the device address stands for
        self._keep = []
        shared: dict[int, list] = {}
        for k, tensor in tensors:
            if tensor.device.type != "cpu":
                raise ValueError(f"args[{k}]: expected a CPU tensor, got one on {tensor.device}")
            if tensor.numel():
                shared.setdefault(tensor.untyped_storage().data_ptr(), []).append((k, tensor))
        base = FIRST_ADDRESS
        for storage, group in shared.items():
            spans = [_span(tensor) for _, tensor in group]
            low, high = min(s[0] for s in spans), max(s[1] for s in spans)
            legal = None
            if not any(
                tensor.is_contiguous() and span == (low, high) for (_, tensor), span in zip(group, spans, strict=True)
            ):
                legal = torch.zeros(high - low, dtype=torch.uint8)
                for _, tensor in group:
                    size = tensor.element_size()
                    strides = [s * size for s in tensor.stride()] + [1]
                    legal.as_strided([*tensor.shape, size], strides, tensor.data_ptr() - low).fill_(1)
            # Device memory is aligned to 512 bytes at the start of a storage, as PyTorch's allocator does.
            first = base + low - storage
            self._where[storage] = (base, storage)
            self.regions.append([first, high - low, low, legal, [k for k, _ in group]])
            base += (high - storage + 2 * GAP - 1) // GAP * GAP

    def address(self, tensor: torch.Tensor) -> int:
        if not tensor.numel():
            return FIRST_ADDRESS - GAP
        base, storage = self._where[tensor.untyped_storage().data_ptr()]
        return base + tensor.data_ptr() - storage

    def arrays(self):
        n = max(len(self.regions), 1)
        base, size = (
            (ctypes.c_uint64 * n)(*(r[0] for r in self.regions)),
            (ctypes.c_uint64 * n)(*(r[1] for r in self.regions)),
        )
        host = (ctypes.c_void_p * n)(*(r[2] for r in self.regions))
        legal = (ctypes.c_void_p * n)(*(None if r[3] is None else r[3].data_ptr() for r in self.regions))
        return base, size, host, legal

    def explain(self, message: str) -> str:
        """Storages by the arguments that lie in them."""
        for k in reversed(range(len(self.regions))):
            names = ", ".join(f"args[{a}]" for a in self.regions[k][4])
            message = message.replace(f"storage {k}", names)
        return message


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Host addresses of the first byte and of the one after the last."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


class _RunArguments(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("cluster", ctypes.c_uint32 * 3),
        ("shared_dynamic", ctypes.c_uint32),
        ("params_bytes", ctypes.c_uint32),
        ("regions", ctypes.c_uint32),
        ("mode", ctypes.c_uint32),
        ("count", ctypes.c_uint32),
        ("races", ctypes.c_uint32),
        ("threads", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("limit", ctypes.c_uint64),
        ("params", ctypes.c_char_p),
        ("region_base", ctypes.POINTER(ctypes.c_uint64)),
        ("region_bytes", ctypes.POINTER(ctypes.c_uint64)),
        ("region_host", ctypes.POINTER(ctypes.c_void_p)),
        ("region_legal", ctypes.POINTER(ctypes.c_void_p)),
    ]


@functools.cache
def _compiler() -> tuple[str, ...] | None:
    """The command of a compiler that builds a C++20 program: CXX where it is set, else g++ or clang++."""
    for command in [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]:
        words = tuple(command.split())
        with tempfile.TemporaryDirectory() as folder:
            probe = Path(folder) / "probe.cpp"
            probe.write_text("#include <bit>\nint main() { return std::countl_zero(1u) - 31; }\n")
            build = [*words, "-std=c++20", str(probe), "-o", f"{folder}/probe"]
            if shutil.which(words[0]) and subprocess.run(build, capture_output=True).returncode == 0:
                return words
    return None


@functools.cache
def _library() -> ctypes.CDLL:
    """Compiles the emulator once per source and machine, into a cache directory of the user."""
    compiler = _compiler()
    if compiler is None:
        raise EmulationError(unavailable())
    sources = sorted(HERE.glob("*.cpp"))

    def make(folder: Path) -> None:
        objects = [folder / f"{source.stem}.o" for source in sources]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda s, o: _run([*compiler, *FLAGS, "-c", str(s), "-o", str(o)]), sources, objects))
        _run([*compiler, *FLAGS, "-shared", *map(str, objects), "-o", str(folder / "emulator.so")])

    texts = [*sources, *sorted(HERE.glob("*.h")), *FLAGS, _cpu()]
    return _load(built("ptx_emulator", texts, make, compiler) / "emulator.so")


def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.ptx_free.argtypes = library.ptx_param_count.argtypes = [ctypes.c_void_p]
    library.ptx_param_count.restype = ctypes.c_uint32
    library.ptx_param.argtypes = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_void_p]
    library.ptx_info.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    library.ptx_parse.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint32]
    library.ptx_run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint32]
    return library


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise EmulationError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")


def _cpu() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
