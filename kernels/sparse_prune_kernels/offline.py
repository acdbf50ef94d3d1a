"""Compiles the kernels for a GPU that is not here, for tests and tools that read what the compiler made of them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from .config import LinearConfig, SddConfig, gpu_of
from .launch import Call, linear_calls, sdd_call
from .plan import Plan, Schedule

TYPES = {  # PyTorch's types and Triton's names of them
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.float8_e4m3fn: "fp8e4nv",
}
# Ways to quantize, by name: dtypes of x as it is multiplied, and of the weight.
QUANTIZED = {
    "int8": (torch.int8, torch.int8),
    "e4m3": (torch.float8_e4m3fn, torch.float8_e4m3fn),
    "w8a16": (torch.bfloat16, torch.int8),
}
SWIZZLES = (0, 32, 64, 128)  # bytes, by Triton's number
AMD_USAGE = (
    "vgpr_count",
    "private_segment_fixed_size",
)  # vector registers, accumulation registers included, and scratch
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"  # comes with Triton's wheel


@dataclass(frozen=True)
class Compiled:
    """What one kernel became.

    ptx         its text; for an AMD GPU its assembly
    registers   of a thread
    stack       bytes of a thread, or for an AMD GPU of a work-item; spills lie there
    shared      bytes of shared memory of a program
    parameters  names of the arguments that the device reads, in order
    boxes       of each descriptor among them: shape of the boxes that it is copied in, and bytes of their swizzle
    """

    ptx: str = field(repr=False)
    registers: int
    stack: int
    shared: int
    parameters: tuple[str, ...]
    boxes: tuple[tuple[tuple[int, ...], int], ...] = ()

    def read(self, call: Call, tensor_map: Callable[..., object]) -> list[object]:
        """What the device reads of call's arguments, in order: of a descriptor a map, sizes and strides.

        tensor_map(tensor, box, swizzle) makes a map that copies boxes of that shape, of the tensor's dimensions in reverse order.
        """
        found: list[object] = []
        boxes = iter(self.boxes)
        for value in (call.arguments[name] for name in self.parameters):
            if isinstance(value, TensorDescriptor):
                box, swizzle = next(boxes)
                found += [tensor_map(value.base, box[::-1], swizzle=swizzle), *value.shape, *value.strides]
            else:
                found.append(value)
        return found


def compile_linear(
    config: LinearConfig,
    side_n: int,
    side_k: int,
    dtype: str,
    capability: int,
    precision: str = "ieee",
    activation: str = "gelu",
    transposed: bool = False,
    even_k: bool = True,
) -> list[Compiled]:
    """What a launch with bias, residual and config would run on large, aligned tensors: one kernel, or two if config.split > 1.

    dtype as in "bfloat16", or as in QUANTIZED (bias, residual and y are then bfloat16), capability as in 90 (942 for AMD's gfx942),
    transposed as bsr_linear_dx has it.
    """
    kind, of_values = QUANTIZED.get(dtype) or (getattr(torch, dtype),) * 2
    quantized = dtype in QUANTIZED
    k = 4096 if even_k else 4096 + 16 * (1 if side_k > 16 else 0)
    x, values = _imagined(kind, 4096, k), _imagined(of_values, 8, side_n, side_k)
    bias, y = (_imagined(torch.bfloat16 if quantized else kind, *shape) for shape in ((4096,), (4096, 4096)))
    scales = (_imagined(torch.float32, 4096),) * (1 + (kind == of_values)) if quantized else ()
    tiles = 4096 // (config.merge * side_n)
    table, lists = (_imagined(torch.int32, rows, 1 + config.merge) for rows in (tiles + 2, 2 * tiles + 2))
    plan = Plan(config.merge, tiles, 1, table, 1.0, lists)
    stride_n, stride_k = (1, side_n) if transposed else (side_k, 1)
    values = values.view(-1, side_k, side_n) if transposed else values
    sizes = (side_n, side_k, stride_n, stride_k)
    schedule = Schedule(1, _imagined(torch.int32, 4, 4)) if config.persistent else None
    calls = linear_calls(x, plan, values, bias, y, y, *sizes, activation, config, precision, *scales, schedule=schedule)
    return [compile_call(call, capability) for call in calls]


def compile_sdd(config: SddConfig, r: int, c: int, dtype: str, capability: int, precision: str = "ieee") -> Compiled:
    """bsr_sdd_kernel for blocks of r x c on large, aligned tensors; dtype and capability as in compile_linear."""
    kind = getattr(torch, dtype)
    dy, x, dvalues = (_imagined(kind, *shape) for shape in ((4096, 4096), (4096, 4096), (16, r, c)))
    index = _imagined(torch.int32, 16)
    return compile_call(sdd_call(dy, x, index, index, dvalues, config, precision), capability)


def compile_call(call: Call, capability: int) -> Compiled:
    """The kernel that this call would run on a GPU of that compute capability, specialised by its arguments as a launch does it."""
    read, constants, aligned = {}, dict(call.constants), set()
    general = {parameter.name for parameter in call.kernel.params if parameter.do_not_specialize}
    for name, value in call.arguments.items():
        if value is None or (isinstance(value, int) and value == 1 and name not in general):
            constants[name] = value
            continue
        if isinstance(value, float):
            read[name] = "fp32"
            continue
        if isinstance(value, TensorDescriptor):
            read[name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
            continue
        if isinstance(value, Tensor):
            read[name], place = f"*{TYPES[value.dtype]}", value.data_ptr()
        else:
            read[name], place = "i32" if abs(value) < 2**31 else "i64", value
        if name not in general and place % 16 == 0:
            aligned.add(name)
    names = call.kernel.arg_names
    source = ASTSource(
        call.kernel,
        signature={name: read.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": call.num_warps, "num_stages": call.num_stages}
    if gpu_of(capability).amd:
        made = triton.compile(source, target=GPUTarget("hip", f"gfx{capability}", 64), options=options)
        text = made.asm["amdgcn"]
        registers, stack = (_number(rf"\.{name}:\s*(\d+)", text) for name in AMD_USAGE)
        return Compiled(text, registers, stack, made.metadata.shared, tuple(read))
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(made.asm["cubin"])
        cubin.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (_number(rf"{name}:(\d+)", usage) for name in ("REG", "STACK"))
    boxes = tuple((tuple(box["block_size"]), SWIZZLES[box["swizzle"]]) for box in made.metadata.tensordesc_meta or ())
    # Of a descriptor that the compiler turned into pointers nothing is a map: none of that is executed here.
    return Compiled(made.asm["ptx"], registers, stack, made.metadata.shared, tuple(read), boxes)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, f"no {pattern} in {text[:200]}"
    return int(found[1])


def _imagined(dtype: torch.dtype, *shape: int) -> Tensor:
    """A tensor without memory, aligned."""
    return torch.empty(shape, dtype=dtype, device="meta")
