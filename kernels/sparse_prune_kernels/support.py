"""Which problems the Triton kernels take, and how they become the CUDA implementation of the operators."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Mapping
from functools import cache, partial
from types import ModuleType

import torch
from torch import Tensor

BLOCK_SIDES = (
    16,
    32,
    64,
    128,
)  # 16 is the shortest side that tensor cores take; beyond 128 an accumulator leaves the registers
# Of weights; x beside the last two is one of the others.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.float8_e4m3fn)
CUDA_DTYPES = (torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn)  # of weights, of the CUDA C++ kernels
E4M3_CAPABILITY = 89  # the oldest whose tensor cores multiply float8_e4m3fn
MIN_CAPABILITY = (
    8,
    0,
)  # the oldest that has bfloat16 tensor cores and cp.async, and the oldest these kernels are compiled for
TESTED_TRITON = (
    "3.7",
    "3.9",
)  # what CUDA builds of torch 2.13 pin, and what a CPU install gets: gates and emulator ran with both
MIN_TRITON = (
    3,
    7,
)  # for sm_90, 3.6 (beside torch 2.10) leaves out a fence between ordinary stores and wgmma, the emulator finds


class ArgumentError(ValueError):
    """A tensor or option that the kernels cannot take: which, what was expected, what came, what to do."""

    def __init__(self, argument: str, expected: str, got: object, remedy: str) -> None:
        self.problem = (argument, expected, got, remedy)
        super().__init__(f"{argument}: expected {expected}, got {got}; {remedy}")


@cache
def unavailable(device: torch.device, dtype: torch.dtype, blocksize: tuple[int, int]) -> str | None:
    """None where the kernels run a weight of that dtype and blocksize (R, C) on that device, else the reason in words.

    Imports Triton only for a CUDA device, a dtype and a blocksize that the kernels take.
    """
    reason = refused("Triton", DTYPES, device, dtype, blocksize)
    if reason is not None:
        return reason
    if torch.version.hip is not None:
        return "the Triton kernels are compiled and tested for NVIDIA GPUs only"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return (
            f"compute capability {capability[0]}.{capability[1]} is older than {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}"
        )
    if dtype is torch.float8_e4m3fn and 10 * capability[0] + capability[1] < E4M3_CAPABILITY:
        return f"float8_e4m3fn needs compute capability 8.9, and this GPU has {capability[0]}.{capability[1]}"
    return triton_problem()


def refused(
    kernels: str, dtypes: tuple[torch.dtype, ...], device: torch.device, dtype: torch.dtype, blocksize: tuple[int, int]
) -> str | None:
    """Why kernels of that name, for these dtypes, do not take such a problem on any GPU, or None."""
    if device.type != "cuda":
        return f"the {kernels} kernels run on CUDA devices, not on {device.type}"
    if dtype not in dtypes:
        names = [str(taken).removeprefix("torch.") for taken in (*dtypes, dtype)]
        return f"the {kernels} kernels take {', '.join(names[:-2])} and {names[-2]}, not {names[-1]}"
    if not set(blocksize) <= set(BLOCK_SIDES):
        return f"the {kernels} kernels take blocks with sides 16, 32, 64 or 128, not {blocksize[0]}x{blocksize[1]}"
    return None


@cache
def triton_problem() -> str | None:
    """None where a Triton that the kernels work with can be imported, else what is wrong with it."""
    try:
        version = importlib.import_module("triton").__version__
    except Exception as error:  # a broken installation raises whatever its first line raises: the reason is what counts
        return f"Triton cannot be imported ({type(error).__name__}: {error})"
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_TRITON:
        return f"Triton {version} is older than {MIN_TRITON[0]}.{MIN_TRITON[1]}"
    return None


def triton_version() -> str:
    """The installed Triton and whether the kernels' tests ran with it, in words; imports nothing."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "no Triton"
    tested = " and ".join(TESTED_TRITON)
    if ".".join(version.split(".")[:2]) in TESTED_TRITON:
        return f"Triton {version}, one of those that the kernels are tested with ({tested})"
    return f"Triton {version}, while the kernels are tested with {tested}"


def register(
    library: torch.library.Library,
    fallbacks: Mapping[str, Callable[..., Tensor]],
    error: Callable[[str, str, object, str], Exception] = ArgumentError,
    wrap: Callable[[str, Callable[..., Tensor]], Callable[..., Tensor]] = lambda name, function: function,
) -> None:
    """Make the kernels the CUDA implementation of bsr_linear, bsr_linear_glu, bsr_linear_int8, bsr_linear_e4m3, bsr_linear_w8a16,
    bsr_linear_dx and bsr_sdd in library's namespace.

    fallbacks maps each of these names to the function that runs where `unavailable` gives a reason (blocks of 4x8, say); it
    takes the operator's own arguments. error makes the exception that a caller sees of (argument, expected, got, remedy). What is
    registered is wrap(name, the function of the kernel).
    """

    def linear(x, crow_indices, col_indices, values, prepacked, out_features, bias, activation, residual):
        check_device(
            "x",
            x,
            crow_indices=crow_indices,
            col_indices=col_indices,
            values=values,
            bias=bias,
            residual=residual,
        )
        arguments = (x, crow_indices, col_indices, values, prepacked, out_features, bias, activation, residual)
        if unavailable(x.device, x.dtype, tuple(values.shape[1:])) is not None:
            return fallbacks["bsr_linear"](*arguments)
        return _launch().bsr_linear(x, crow_indices, col_indices, values, out_features, bias, activation, residual)

    def linear_glu(
        x,
        gate_crow,
        gate_col,
        gate_values,
        gate_prepacked,
        up_crow,
        up_col,
        up_values,
        up_prepacked,
        out_features,
        gate_bias,
        up_bias,
        activation,
    ):
        gate, up = (gate_crow, gate_col, gate_values), (up_crow, up_col, up_values)
        check_device("x", x, gate_values=gate_values, up_values=up_values, gate_bias=gate_bias, up_bias=up_bias)
        if any(unavailable(x.device, x.dtype, tuple(values.shape[1:])) is not None for *_, values in (gate, up)):
            weights = (*gate, gate_prepacked, *up, up_prepacked)
            return fallbacks["bsr_linear_glu"](x, *weights, out_features, gate_bias, up_bias, activation)
        return _launch().bsr_linear_glu(x, gate, up, out_features, gate_bias, up_bias, activation)

    def linear_quantized(
        name, x, crow, col, values, scales, prepacked, out_features, bias, activation, residual, *x_scale
    ):
        check_device(
            "x", x, crow_indices=crow, col_indices=col, values=values, scales=scales, bias=bias, residual=residual
        )
        weight, epilogue = (crow, col, values, scales), (bias, activation, residual, *x_scale)
        if unavailable(x.device, values.dtype, tuple(values.shape[1:])) is not None:
            return fallbacks[name](x, *weight, prepacked, out_features, *epilogue)
        linear = _launch().bsr_linear_w8a8 if x_scale else _launch().bsr_linear_w8a16
        return linear(x, *weight, out_features, *epilogue)

    def linear_dx(dy, crow_indices, col_indices, values, in_features):
        check_device("dy", dy, crow_indices=crow_indices, col_indices=col_indices, values=values)
        runs = unavailable(dy.device, dy.dtype, tuple(values.shape[1:])) is None
        function = _launch().bsr_linear_dx if runs else fallbacks["bsr_linear_dx"]
        return function(dy, crow_indices, col_indices, values, in_features)

    def sdd(dy, x, crow_indices, col_indices, block_rows, block_cols):
        check_device("dy", dy, x=x, crow_indices=crow_indices, col_indices=col_indices)
        runs = unavailable(dy.device, dy.dtype, (block_rows, block_cols)) is None
        function = _launch().bsr_sdd if runs else fallbacks["bsr_sdd"]
        return function(dy, x, crow_indices, col_indices, block_rows, block_cols)

    def told(function):
        def run(*arguments):
            try:
                return function(*arguments)
            except ArgumentError as mistake:
                raise error(*mistake.problem) from None

        return run

    functions: dict[str, Callable[..., Tensor]]
    functions = {"bsr_linear": linear, "bsr_linear_glu": linear_glu, "bsr_linear_dx": linear_dx, "bsr_sdd": sdd}
    for name in ("bsr_linear_int8", "bsr_linear_e4m3", "bsr_linear_w8a16"):
        functions[name] = partial(linear_quantized, name)
    for name, function in functions.items():
        library.impl(name, wrap(name, told(function)), "CUDA")


def check_device(name: str, tensor: Tensor, **others: Tensor | None) -> None:
    """Raise ArgumentError where one of others is on another device than tensor."""
    for other_name, other in others.items():
        if other is not None and other.device != tensor.device:
            raise ArgumentError(
                other_name, f"{tensor.device} like {name}", other.device, f"{other_name}.to({name}.device)"
            )


def _launch() -> ModuleType:
    return importlib.import_module(".launch", __package__)
