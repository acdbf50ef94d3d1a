"""Compiles the kernels for a GPU that is not here, for tests and tools that read what the compiler made of them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .config import LinearConfig, SddConfig
from .kernels import bsr_linear_kernel, bsr_sdd_kernel

TYPE_NAMES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}  # PyTorch's names and Triton's
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"  # comes with Triton's wheel


@dataclass(frozen=True)
class Compiled:
    """What one kernel became: its PTX, registers per thread, stack bytes per thread (spills lie there), shared bytes."""

    ptx: str = field(repr=False)
    registers: int
    stack: int
    shared: int


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
) -> Compiled:
    """bsr_linear_kernel with bias and residual; dtype as in "bfloat16", capability as in 90, transposed as bsr_linear_dx has it."""
    pointer = "*" + TYPE_NAMES[dtype]
    types = dict.fromkeys(("x", "values", "bias", "residual", "y"), pointer)
    types |= {"crow_indices": "*i32", "col_indices": "*i32", "M": "i32", "N": "i32", "K": "i32", "stride_x": "i32"}
    constants = {
        "SIDE_N": side_n,
        "SIDE_K": side_k,
        "VALUE_STRIDE_N": 1 if transposed else side_k,
        "VALUE_STRIDE_K": side_n if transposed else 1,
        "BLOCK_M": config.block_m,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        "ACTIVATION": activation,
        "HAS_SLOTS": transposed,
        "HAS_BIAS": True,
        "HAS_RESIDUAL": True,
        "EVEN_K": even_k,
        "PRECISION": precision,
        "INTERPRETED": False,
    }
    if transposed:
        types["slots"] = "*i32"
    else:
        constants["slots"] = None
    return _compile(bsr_linear_kernel, types, constants, config, capability)


def compile_sdd(config: SddConfig, r: int, c: int, dtype: str, capability: int, precision: str = "ieee") -> Compiled:
    """bsr_sdd_kernel for blocks of r x c; dtype and capability as in compile_linear."""
    types = dict.fromkeys(("dy", "x", "dvalues"), "*" + TYPE_NAMES[dtype])
    types |= {"block_rows": "*i32", "col_indices": "*i32", "M": "i32", "N": "i32", "K": "i32"}
    types |= {"stride_dy": "i32", "stride_x": "i32"}
    constants = {"R": r, "C": c, "BLOCK_M": config.block_m, "PRECISION": precision, "INTERPRETED": False}
    return _compile(bsr_sdd_kernel, types, constants, config, capability)


def _compile(kernel, types: dict[str, str], constants: dict[str, object], config, capability: int) -> Compiled:
    """The kernel for addresses and sizes that are multiples of 16, as a launch on aligned tensors specialises it."""
    places = {name: (place,) for place, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        kernel,
        signature={name: types.get(name, "constexpr") for name in kernel.arg_names},
        constexprs={places[name]: value for name, value in constants.items()},
        attrs={places[name]: [["tt.divisibility", 16]] for name in types},
    )
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(made.asm["cubin"])
        cubin.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    return Compiled(made.asm["ptx"], registers, stack, made.metadata.shared)
