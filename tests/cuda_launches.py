"""The host code of csrc/cuda, csrc/cuda_ops.cpp included, run on CPU tensors: what it launches is what the PTX emulator executes.

It is compiled by the C++ compiler with the device code left out and tests/cuda_launches.cpp in place of the CUDA runtime. Operators
are in torch.ops.sparse_prune_launches.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import built
import cuda_kernels
import ptx_emulator
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent / "csrc"
SOURCES = ("kernels_sm80.cu", "kernels_int8.cu", "kernels_e4m3.cu", "kernels_sdd.cu", "kernels_sm90.cu", "config.cpp")
MAP_TYPES = {False: 6, True: 9}  # CU_TENSOR_MAP_DATA_TYPE_FLOAT16 and _BFLOAT16 of cuda.h
STREAM = 0x57  # recorded_stream of cuda_launches.cpp
# Device code that the launchers name, without its bodies.
BODIES = """#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>
#include "problem.h"
#include "bsr_linear_sm90.h"
namespace sparse_prune::device {
using Step = int4;
using Piece = int2;
struct Tile;
struct SddJob;
struct Int8Pair { int8_t low, high; };
struct E4m3Pair { uint8_t low, high; };
template <class T> constexpr bool kTakenApart = false;
template <class T> struct Epilogue { const T *bias, *residual; T* y; int M, N, activation; bool vector; };
template <class T> struct ScaledEpilogue { Epilogue<T> epilogue; const float *x_scales, *scales; };
template <class T, int, int, int, class... A> void bsr_linear_sm80(A&&...) {}
template <class T, int, int, class... A> void bsr_linear_skinny(A&&...) {}
template <class P, class... A> void quantize_rows(A&&...) {}
template <class T, int, class... A> void bsr_sdd_sm80(A&&...) {}
template <class... A> void sum_parts(A&&...) {}
}
"""
# Bugs of the host code, by number: off unless a test plants them.
BUGS = {
    "arguments exchanged": (
        "cuda/kernels_sm80.cu",
        "&y, &M, &N, &K, &ldx, &tile_count",
        "&y, BUG ? &N : &M, &N, &K, &ldx, &tile_count",
    ),
    "rows of tokens exchanged": (
        "cuda/kernels_sm80.cu",
        "&tall, &whole, &ragged",
        "BUG ? &whole : &tall, BUG ? &tall : &whole, &ragged",
    ),
    "a block too few": ("cuda/kernels_sm80.cu", "dim3(launch.blocks), dim3", "dim3(launch.blocks - BUG), dim3"),
    "tables elsewhere": ("cuda/kernels_sm80.cu", "+ p.layout.steps", "+ (BUG ? p.layout.starts : p.layout.steps)"),
    "misaligned x is not copied": ("cuda_ops.cpp", ") % 16 == 0) return x;", ") % (BUG ? 2 : 16) == 0) return x;"),
    "K is always whole blocks": (
        "cuda/kernels_sm80.cu",
        "p.K % p.layout.block_cols != 0",
        "!BUG && p.K % p.layout.block_cols != 0",
    ),
    "another stream": (
        "cuda/kernels_sm80.cu",
        "launch.shared_bytes,\n                             static_cast<cudaStream_t>(stream)",
        "launch.shared_bytes,\n                             BUG ? nullptr : static_cast<cudaStream_t>(stream)",
    ),
    "a tensor map of the other data type": (
        "cuda/kernels_sm90.cu",
        "encoder(map, bfloat16 ?",
        "encoder(map, bfloat16 != BUG ?",
    ),
    "no device guard": ("cuda_ops.cpp", "guard(device);\n  Tensor y", "guard(BUG ? -2 : device);\n  Tensor y"),
}
OPS_PATCH = (
    ("t.is_cuda()", "t.is_cpu()"),
    ("return library ? reinterpret_cast<CurrentStream>(dlsym(library", "return &recorded_stream; (void)(dlsym(library"),
    ('"aoti_torch_get_current_cuda_stream")) : nullptr;', '"")), library;'),
    ("sparse_prune, m", "sparse_prune_launches, m"),
    ("sparse_prune, CUDA, m", "sparse_prune_launches, CPU, m"),
)
OPS_PRELUDE = """#include "checks.h"
#include <torch/csrc/stable/accelerator.h>
struct RecordedGuard { explicit RecordedGuard(int32_t); ~RecordedGuard(); int32_t before; };
int32_t recorded_stream(int32_t, void**);
void recorded_memory(void*, int64_t);
inline Tensor recorded_empty(const Tensor& like, std::initializer_list<int64_t> sizes,
                             std::optional<ScalarType> dtype = std::nullopt) {
  Tensor t = torch::stable::new_empty(like, {sizes.begin(), sizes.size()}, dtype);
  recorded_memory(t.mutable_data_ptr(), t.numel() * t.element_size());
  return t;
}
"""


class Launch(ctypes.Structure):
    """As in cuda_launches.cpp."""

    _fields_ = [
        ("kernel", ctypes.c_char_p),
        *((name, ctypes.c_uint32) for name in ("blocks", "threads", "shared_bytes", "cluster")),
        ("device", ctypes.c_int32),
        ("stream", ctypes.c_uint64),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
    ]


def host_files() -> dict[str, str]:
    """The host code by file, as it is compiled here."""
    files = {f"cuda/{name}": (CSRC / "cuda" / name).read_text() for name in SOURCES}
    files |= {f"cuda/{path.name}": path.read_text() for path in (CSRC / "cuda").glob("*.h")}
    files |= {f"cpu/{path.name}": path.read_text() for path in (CSRC / "cpu").glob("*.h")}
    files["checks.h"], files["cuda_ops.cpp"] = (CSRC / "checks.h").read_text(), (CSRC / "cuda_ops.cpp").read_text()
    files["cuda/w8a8.cuh"] = (CSRC / "cuda" / "w8a8.cuh").read_text()
    files["planted.h"] = 'extern "C" int planted_bug;\n'
    for number, (file, old, new) in enumerate(BUGS.values(), 1):
        assert files[file].count(old) == 1, f"{file} has {files[file].count(old)} times {old!r}"
        files[file] = files[file].replace(old, new.replace("BUG", f"(planted_bug == {number})"))
    ops = files["cuda_ops.cpp"]
    for old, new in OPS_PATCH:
        assert old in ops, old
        ops = ops.replace(old, new)
    ops = ops.replace("torch::stable::new_empty", "recorded_empty")
    files["cuda_ops.cpp"] = OPS_PRELUDE + ops.replace("torch::stable::accelerator::DeviceGuard", "RecordedGuard")
    macros = re.search(
        r"#define SPARSE_PRUNE_SM90_PARAMETERS.*?\n\n", (CSRC / "cuda" / "bsr_linear_sm90.cuh").read_text(), re.DOTALL
    )
    kept = re.sub(
        r"namespace sparse_prune::device \{.*?\n\}  // namespace[^\n]*\n", "", files["cuda/w8a8.cuh"], flags=re.DOTALL
    )
    files["cuda/w8a8.cuh"] = kept
    for name in ("bsr_linear_sm80.cuh", "bsr_linear_skinny.cuh", "bsr_sdd_sm80.cuh"):
        files[f"cuda/{name}"] = f"#pragma once\n#ifndef BODIES\n#define BODIES\n{BODIES}#endif\n"
    hopper = "struct Arguments { const void *x, *values; const int* table; const void *bias, *residual; void* y;"
    hopper += " long long x_row, residual_row; int m, n, k, block_rows, groups, lines, group_tokens, activation; };"
    hopper += " template <class T, int, int, int> void bsr_linear(const CUtensorMap*, Arguments) {}"
    files["cuda/bsr_linear_sm90.cuh"] = (
        f"#pragma once\n{BODIES}namespace sparse_prune::sm90 {{\n{macros[0]}{hopper}\n}}\n"
    )
    return files


@functools.cache
def library() -> ctypes.CDLL:
    """The host code with its fake runtime, compiled once; its operators are registered as it is loaded."""
    files = host_files()
    files["cuda_launches.cpp"] = (HERE / "cuda_launches.cpp").read_text()
    shown = subprocess.run(
        [cuda_kernels.nvcc(), "-x", "cu", "--dryrun", "-c", "/dev/null"], capture_output=True, text=True
    ).stderr
    includes = re.search(r'INCLUDES="(.*?)"', shown)[1].split()
    torch_include = Path(torch.__file__).parent / "include"
    flags = [
        "-std=c++20",
        "-O1",
        "-fPIC",
        "-w",
        "-Icuda",
        f"-I{torch_include}",
        f"-I{torch_include}/torch/csrc/api/include",
        *includes,
    ]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", '-DSPARSE_PRUNE_CUDA_CONTENTS="fake"', "-x", "c++"]
    flags += ["-D__launch_bounds__(...)=", "-D__grid_constant__=", "-include", "planted.h"]
    common = [(name, text) for name, text in sorted(files.items()) if not name.endswith((".cpp", ".cu"))]

    def run(command: list[str], folder: Path) -> None:
        done = subprocess.run([*built.compiler(), *command], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:3000]

    def compiled(name: str) -> Path:
        def make(folder: Path) -> None:
            for each, text in files.items():
                (folder / each).parent.mkdir(exist_ok=True)
                (folder / each).write_text(text)
            run([*flags, "-c", name, "-o", "compiled"], folder)

        texts = [*flags, torch.__version__, repr(common), name, files[name]]
        return built.built("cuda_launches", texts, make) / "compiled"

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, [name for name in files if name.endswith((".cpp", ".cu"))]))
    # Symbolic: a CUDA build of torch has loaded the true runtime, whose functions would be found before those of the fake one.
    link = ["-shared", "-Wl,-Bsymbolic", *map(str, objects), f"-L{Path(torch.__file__).parent / 'lib'}"]
    link += ["-ltorch", "-ltorch_cpu", "-ldl"]
    path = built.built("cuda_launches", link, lambda folder: run([*link, "-o", "library.so"], folder)) / "library.so"
    torch.ops.load_library(str(path))
    return ctypes.CDLL(str(path))


class Recorder:
    """What the host code launched: names, grids and arguments, in order; each was executed by the emulator, unless `error`."""

    def __init__(self, inputs: tuple[Tensor, ...], mode: str, major: int, error: int):
        self.launches: list[tuple[str, list]] = []
        self.inputs, self.mode, self.arch, self.error = inputs, mode, "sm_80" if major == 8 else "sm_90", error
        self.made: list[Tensor] = []  # memory that the host code allocated, as bytes
        self.failed: BaseException | None = None

    def on_memory(self, address: int, size: int) -> None:
        if size:
            self.made.append(torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8))

    def at(self, address: int) -> Tensor | int:
        """The tensor that a kernel's pointer is to; the number itself where it is none."""
        for tensor in self.inputs:
            if address == tensor.data_ptr() and tensor.numel():
                return tensor
        for tensor in (
            *reversed(self.made),
            *(t.view(torch.uint8) for t in self.inputs if t.is_contiguous() and t.numel()),
        ):
            if tensor.data_ptr() <= address < tensor.data_ptr() + len(tensor.flatten()):
                return tensor.flatten()[address - tensor.data_ptr() :]
        return address

    def on_launch(self, launch: ctypes._Pointer) -> int:
        try:
            return self.emulate(launch.contents)
        except BaseException as error:  # ctypes would print it and go on
            self.failed = error
            return 719

    def emulate(self, launch: Launch) -> int:
        kernel = launch.kernel.decode()
        assert launch.stream == STREAM and launch.device == 0, "another stream than torch's, or no device guard"
        kind = next((kind for kind in cuda_kernels.KINDS.values() if f"_{kind}_" in kernel), None)
        hopper = kernel.startswith("bsr_linear_sm90")
        sdd = kernel.startswith(("bsr_sdd", "sum_parts"))
        file = f"kernels_{kind or ('sm90' if hopper else 'sdd' if sdd else 'sm80')}.cu"
        arch = "sm_90a" if hopper else "sm_89" if kind == "e4m3" else "sm_80"
        program = cuda_kernels.program(cuda_kernels.ptx(file, arch), kernel)
        arguments = []
        for place, (_, size) in enumerate(program.params):
            data = ctypes.string_at(launch.arguments[place], size)
            if size == 128:
                address, columns, rows, stride, *box, swizzle, kind = (
                    int.from_bytes(data[i : i + 8], "little") for i in range(0, 64, 8)
                )
                assert kind == MAP_TYPES["_bf16_" in kernel], f"a tensor map of data type {kind} for {kernel}"
                x = self.at(address)
                x = x if x.element_size() == 2 else x.view(torch.int16)
                arguments.append(ptx_emulator.TensorMap(x, box, (columns, rows), (stride,), swizzle))
            else:
                number = int.from_bytes(data, "little")
                arguments.append(self.at(number) if size == 8 and number > 1 << 32 else number)
        self.launches.append((kernel, arguments))
        if self.error:
            return self.error
        options = {"shared_bytes": launch.shared_bytes, "cluster": launch.cluster, "mode": self.mode}
        program.launch(launch.blocks, launch.threads, arguments, **options)
        return 0


@contextlib.contextmanager
def recording(
    *inputs: Tensor,
    mode: str = "late",
    major: int = 8,
    sms: int = 108,
    error: int = 0,
    bug: str | None = None,
) -> Iterator[Recorder]:
    """Launches of operators in torch.ops.sparse_prune_launches on these tensors, on a GPU of that compute capability and size.

    error: what launching gives in place of running anything. bug: one of BUGS.
    """
    recorder, host = Recorder(inputs, mode, major, error), library()
    ctypes.c_int.in_dll(host, "planted_bug").value = [None, *BUGS].index(bug)
    on_launch = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(Launch))(recorder.on_launch)
    on_memory = ctypes.CFUNCTYPE(None, ctypes.c_uint64, ctypes.c_uint64)(recorder.on_memory)
    host.fake_cuda(on_launch, on_memory, major, sms, 2)
    try:
        yield recorder
    except RuntimeError:
        if recorder.failed is not None:
            raise recorder.failed from None
        raise
