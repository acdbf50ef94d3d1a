"""Checks, allocation and launches.

Once a weight's plans are made, on its first call, no call here waits for the device: all of them can be captured into a CUDA graph.
Call once with each number of rows before a capture, too: a tiling that is new is compiled and loaded, and a new number of row tiles
gives programs that stay a new schedule, both of which a capture forbids.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TypeVar

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import tuned
from .config import (
    ROUND_BLOCK,
    ROUND_WARPS,
    SUM_BLOCK,
    SUM_WARPS,
    LinearConfig,
    SddConfig,
    gpu_of,
    linear_candidates,
    linear_config,
    merges,
    sdd_config,
)
from .kernels import (
    bsr_linear_kernel,
    bsr_linear_persistent_kernel,
    bsr_linear_skip_kernel,
    bsr_sdd_kernel,
    round_rows_kernel,
    sum_parts_kernel,
)
from .plan import Plan, Schedule, make_plans, once, schedule_of
from .support import E4M3_CAPABILITY, ArgumentError, check_device

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")
MAX_PROGRAMS = 2**31 - 1  # CUDA's limit on the first dimension of a grid
# Rows, inputs and outputs are numbered in int32, and a tile reaches past the last one by 511 at most; their products are int64.
MAX_SIZE = 2**31 - 512
MAX_SCHEDULED = 2**20  # tiles that the host hands out to programs that stay; more would take it a second
# In a loop over several tiles Triton 3.7 leaves out the fence between cp.async and wgmma, as the emulator found.
FENCES_LOOPS = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 9)
LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # the largest numbers of what rows are rounded to
INTERPRETED = not isinstance(
    bsr_linear_kernel, triton.JITFunction
)  # TRITON_INTERPRET=1 was set when Triton was imported

Arguments = dict[str, Tensor | TensorDescriptor | int | float | None]
Values = TypeVar("Values", Tensor, None)


@dataclass(frozen=True)
class Call:
    """One launch: arguments are what the device reads, in the kernel's order; constants are compiled in."""

    kernel: triton.JITFunction
    grid: tuple[int, int]
    arguments: Arguments
    constants: Mapping[str, object]
    num_warps: int
    num_stages: int = 1

    def run(self) -> None:
        """Launch on the current device and stream."""
        sizes = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        self.kernel[self.grid](**self.arguments, **self.constants, **sizes)


def bsr_linear(
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    config: LinearConfig | None = None,
) -> Tensor:
    """y[M, N] = act(x[M, K] @ W[N, K]^T + bias[N]) + residual[M, N], accumulated in float32; N = out_features.

    x              float16, bfloat16 or float32 [M, K] on a GPU; rows may lie apart and anywhere (in place, by narrower loads where
                   they are misaligned), columns that do not touch are copied
    crow_indices   int32 [ceil(N/R) + 1]
    col_indices    int32 [nnzb]
    values         [nnzb, R, C], R and C in {16, 32, 64, 128}; dtype of x, as bias and residual; copied where not contiguous
    config         None: chosen by linear_config

    float32 is multiplied exactly unless torch.backends.cuda.matmul.fp32_precision is "tf32".
    The indices are trusted. The first call with an index reads it on the host and keeps the plan that comes of it: make that call
    before a CUDA graph is captured. Raises ArgumentError, a ValueError, for dtypes, devices or shapes that do not agree or are too
    large, and for tensors that are on no GPU.
    """
    values = _checked("x", x, crow_indices, col_indices, values, bias=bias, residual=residual)
    _, r, c = values.shape
    plans = plans_of(crow_indices, col_indices, out_features, x.shape[1], r, c, x.element_size(), transposed=False)
    bias, residual = _checked_epilogue(x, out_features, activation, bias, residual)
    return _linear(x, plans, values, out_features, r, c, c, 1, bias, activation, residual, config)


def bsr_linear_glu(
    x: Tensor,
    gate: tuple[Tensor, Tensor, Tensor],
    up: tuple[Tensor, Tensor, Tensor],
    out_features: int,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    activation: str = "silu",
) -> Tensor:
    """y[M, N] = act(x[M, K] @ Wg[N, K]^T + gate_bias[N]) * (x @ Wu[N, K]^T + up_bias[N]).

    gate, up       crow_indices, col_indices and values of Wg and Wu, as in bsr_linear

    Two products: gate's multiplies by up's, rounded to the dtype of x, where it would add a residual. The rest as in bsr_linear.
    """
    u = bsr_linear(x, *up, out_features, up_bias)  # [M, N]
    crow, col, values = gate
    values = _checked("x", x, crow, col, values, bias=gate_bias)
    _, r, c = values.shape
    plans = plans_of(crow, col, out_features, x.shape[1], r, c, x.element_size(), transposed=False)
    bias, _ = _checked_epilogue(x, out_features, activation, gate_bias, None)
    return _linear(x, plans, values, out_features, r, c, c, 1, bias, activation, u, None, times=True)


def bsr_linear_w8a8(
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    scales: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    x_scale: float | None = None,
    config: LinearConfig | None = None,
) -> Tensor:
    """y[M, N] = act(sum_k q[m, k] w[n, k] * scales[n] * x_scales[m] + bias[N]) + residual[M, N]; q, x_scales = round_rows(x).

    values         int8 or float8_e4m3fn [nnzb, R, C], R and C in {16, 32, 64, 128}. int8 is summed in int32, so at most
                   2^31 / 127^2 inputs; float8_e4m3fn in float32, on a GPU of compute capability 8.9 at least. The tensor cores of
                   9.0 keep some 14 bits of a sum, as they do for torch._scaled_mm with use_fast_accum
    scales         float32 [N]
    x_scale        None: each row of x has its own, max |x[m, :]| / 127 or 448

    The rest as in bsr_linear; what follows the sum is computed in float32 and rounded once to the dtype of x.
    """
    _check("values", values.dtype in LIMITS, "int8 or float8_e4m3fn", values.dtype, "BsrWeight.quantize()")
    _check_quantized(x, crow_indices, col_indices, values, scales, out_features, bias, residual)
    old = values.dtype is torch.float8_e4m3fn and not INTERPRETED and _device(x.device)[0] < E4M3_CAPABILITY
    _check("values", not old, "int8 on this GPU", values.dtype, "float8_e4m3fn needs compute capability 8.9")
    _, r, c = values.shape
    plans = plans_of(crow_indices, col_indices, out_features, x.shape[1], r, c, values.element_size(), transposed=False)
    bias, residual = _checked_epilogue(x, out_features, activation, bias, residual)
    x = _with_adjacent_columns(x)
    _check_sizes(M=x.shape[0], K=x.shape[1] + c)
    y = x.new_empty(x.shape[0], out_features)  # [M, N]
    if y.numel() == 0:
        return y
    width = triton.cdiv(x.shape[1], c) * c  # whole blocks
    q = torch.empty(x.shape[0], width, dtype=values.dtype, device=x.device)  # [M, width]
    x_scales = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)  # [M]
    with torch.cuda.device_of(x):
        round_call(x, q, x_scales, x_scale).run()
    quantized = (scales.contiguous(), x_scales)
    return _linear(
        q, plans, values.contiguous(), out_features, r, c, c, 1, bias, activation, residual, config, y, quantized
    )


def bsr_linear_w8a16(
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    scales: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    config: LinearConfig | None = None,
) -> Tensor:
    """y[M, N] = act(sum_k x[m, k] w[n, k] * scales[n] + bias[N]) + residual[M, N]; values w int8 [nnzb, R, C], scales float32 [N].

    int8 becomes the dtype of x in registers, exactly; one scale a row needs no product until the sum is done. The rest as in
    bsr_linear.
    """
    _check("values", values.dtype is torch.int8, "int8", values.dtype, "BsrWeight.quantize()")
    _check_quantized(x, crow_indices, col_indices, values, scales, out_features, bias, residual)
    _, r, c = values.shape
    plans = plans_of(crow_indices, col_indices, out_features, x.shape[1], r, c, x.element_size(), transposed=False)
    bias, residual = _checked_epilogue(x, out_features, activation, bias, residual)
    quantized = (scales.contiguous(),)
    values = values.contiguous()
    return _linear(x, plans, values, out_features, r, c, c, 1, bias, activation, residual, config, quantized=quantized)


def _check_quantized(x, crow_indices, col_indices, values, scales, out_features, bias, residual) -> None:
    """Raise ArgumentError unless x and a quantized weight agree."""
    floating = x.dtype.is_floating_point and 2 <= x.dtype.itemsize <= 4
    _check("x", floating, "float16, bfloat16 or float32 beside quantized values", x.dtype, "x.to(torch.bfloat16)")
    _checked("x", x, crow_indices, col_indices, None, bias=bias, residual=residual)
    check_device("x", x, values=values, scales=scales)
    _check_blocks(values, col_indices)
    _check("scales", scales.dtype is torch.float32, "float32", scales.dtype)
    _check("scales", scales.shape == (out_features,), f"shape ({out_features},)", tuple(scales.shape))


def round_call(x: Tensor, q: Tensor, x_scales: Tensor, x_scale: float | None) -> Call:
    """What makes q[M, K or more], int8 or float8_e4m3fn, and x_scales[M] of x[M, K], whose columns are adjacent."""
    (m, k), width = x.shape, q.shape[1]
    arguments: Arguments = {"x": x, "q": q, "x_scales": x_scales, "x_scale": float(x_scale or 0.0)}
    arguments |= {"M": m, "K": k, "WIDTH": width, "stride_x": x.stride(0)}
    block = min(ROUND_BLOCK, triton.next_power_of_2(width))
    constants: dict[str, object] = {"ROWS": ROUND_BLOCK // block, "BLOCK": block, "STATIC": x_scale is not None}
    constants |= {"LIMIT": LIMITS[q.dtype], "ONCE": block >= width, "EVEN": k == width and k % block == 0}
    return Call(round_rows_kernel, (triton.cdiv(m, ROUND_BLOCK // block), 1), arguments, constants, ROUND_WARPS)


def bsr_linear_dx(
    dy: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    in_features: int,
    config: LinearConfig | None = None,
) -> Tensor:
    """dx[M, K] = dy[M, N] @ W[N, K]; K = in_features, the rest as in bsr_linear.

    The same kernel, over the plan of W^T: blocks stay where they are in values and are read with their strides exchanged.
    """
    values = _checked("dy", dy, crow_indices, col_indices, values)
    _, r, c = values.shape
    plans = plans_of(crow_indices, col_indices, dy.shape[1], in_features, r, c, dy.element_size(), transposed=True)
    return _linear(dy, plans, values, in_features, c, r, 1, c, None, "none", None, config)


def bsr_sdd(
    dy: Tensor, x: Tensor, crow_indices: Tensor, col_indices: Tensor, block_rows: int, block_cols: int
) -> Tensor:
    """dvalues[nnzb, R, C]: the stored blocks of dy[M, N]^T @ x[M, K]; R = block_rows, C = block_cols."""
    _checked("dy", dy, crow_indices, col_indices, None, x=x)
    _check("x", x.shape[0] == dy.shape[0], f"{dy.shape[0]} rows like dy", x.shape[0])
    rows = triton.cdiv(dy.shape[1], block_rows)
    _check("crow_indices", crow_indices.shape == (rows + 1,), f"{rows + 1} entries", tuple(crow_indices.shape))
    _check_sizes(M=dy.shape[0], N=dy.shape[1], K=x.shape[1])
    dy, x, col_indices = _with_adjacent_columns(dy), _with_adjacent_columns(x), col_indices.contiguous()
    nnzb = col_indices.numel()
    dvalues = dy.new_empty(nnzb, block_rows, block_cols)  # [nnzb, R, C]
    if nnzb == 0:
        return dvalues
    config = sdd_config(block_rows, block_cols, dy.element_size(), _device(dy.device)[0])
    with torch.cuda.device_of(dy):
        sdd_call(dy, x, row_of_blocks(crow_indices, nnzb), col_indices, dvalues, config, _precision()).run()
    return dvalues


def row_of_blocks(crow_indices: Tensor, nnzb: int) -> Tensor:
    """Block-row of each stored block, int32 [nnzb]."""
    blocks = torch.arange(nnzb, dtype=torch.int32, device=crow_indices.device)  # [nnzb]
    return torch.searchsorted(crow_indices, blocks, right=True, out_int32=True) - 1


def plans_of(
    crow: Tensor, col: Tensor, n: int, k: int, r: int, c: int, itemsize: int, transposed: bool
) -> dict[int, Plan]:
    """The plans of W[N, K], or of its transpose, for every number of merged block-rows: from the cache, else made now."""
    rows = triton.cdiv(n, r)
    _check("crow_indices", crow.shape == (rows + 1,), f"{rows + 1} entries", tuple(crow.shape))
    numbers = merges(c if transposed else r, itemsize)

    def make() -> dict[int, Plan]:
        try:
            return make_plans(crow, col, triton.cdiv(k, c), numbers, transposed)
        except IndexError:
            raise ArgumentError(
                "col_indices",
                f"block-columns below {triton.cdiv(k, c)}, for K = {k}",
                "one beyond",
                "give x all K columns",
            ) from None

    return once(("plans", transposed, numbers, n, k, r, c), crow, col, make)


@cache
def _device(device: torch.device) -> tuple[int, int]:
    """Compute capability and SMs; in the interpreter, A100's."""
    if device.type != "cuda":
        return 80, gpu_of(80).sms
    properties = torch.cuda.get_device_properties(device)
    return properties.major * 10 + properties.minor, properties.multi_processor_count


@lru_cache(maxsize=4096)
def _config(device, dtype, value_size, m, n, k, side_n, side_k, density, unions, transposed, epoch) -> LinearConfig:
    """The tiling measured near this problem, else the one that arithmetic finds; epoch is that of the measurements."""
    found = None
    if value_size == dtype.itemsize:
        sides = (side_n, side_k)
        found = tuned.nearest(device_name(device), dtype.itemsize, sides, m, n, k, density, transposed)
    capability, sms = _device(device)
    sizes = (m, n, k, side_n, side_k, dtype.itemsize, capability, density, dict(unions), sms)
    return found or linear_config(*sizes, value_size)


@cache
def device_name(device: torch.device) -> str:
    """What measurements of a device go by."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


def candidates(
    x: Tensor, crow: Tensor, col: Tensor, values: Tensor, out_features: int, transposed: bool = False
) -> list[LinearConfig]:
    """Tilings worth measuring of bsr_linear, or for quantized values of bsr_linear_w8a8, the one that arithmetic finds first.

    transposed: of bsr_linear_dx, where x is dy[M, N] and out_features K.
    """
    (m, inputs), (nnzb, r, c), size = x.shape, values.shape, values.element_size()
    n, k = (inputs, out_features) if transposed else (out_features, inputs)
    plans = plans_of(crow, col, n, k, r, c, size, transposed)
    unions = {merge: plan.union for merge, plan in plans.items()}
    density = nnzb / (triton.cdiv(n, r) * triton.cdiv(k, c))
    capability, sms = _device(x.device)
    sides = (c, r) if transposed else (r, c)
    return linear_candidates(m, out_features, inputs, *sides, size, capability, density, unions, sms)


def _linear(
    x,
    plans,
    values,
    n,
    side_n,
    side_k,
    stride_n,
    stride_k,
    bias,
    activation,
    residual,
    config,
    y=None,
    quantized=(),
    times=False,
) -> Tensor:
    """y[M, n] for blocks that span side_n outputs and side_k inputs, stride_n and stride_k elements apart.

    quantized: the scales of W[n], and those of x[M] where x is quantized too; y has then another dtype. times as in linear_calls.
    """
    x = _with_adjacent_columns(x)
    m, k = x.shape
    _check_sizes(M=m, N=n, K=k)
    y = x.new_empty(m, n) if y is None else y  # [M, N]
    if y.numel() == 0:
        return y
    if config is None:
        density = values.shape[0] / (triton.cdiv(n, side_n) * triton.cdiv(k, side_k))
        unions = tuple((merge, plan.union) for merge, plan in plans.items())
        transposed = stride_k != 1
        dtypes = (x.dtype, values.element_size())
        config = _config(x.device, *dtypes, m, n, k, side_n, side_k, density, unions, transposed, tuned.epoch)
    plan = plans[config.merge]
    # Places in the plan and steps of the loop are int32.
    places = max(plan.table.numel(), plan.steps * (side_k // config.block_k))
    _check("col_indices", places < 2**31, f"a plan of fewer than {2**31} entries", places, "larger blocks")
    programs = triton.cdiv(m, config.block_m) * plan.tiles
    _check("x", programs <= MAX_PROGRAMS, f"at most {MAX_PROGRAMS} tiles", programs, "fewer rows at a time")
    schedule = schedule_for(x, plan, values, side_k, config, _device(x.device)[1])
    with torch.cuda.device_of(x):
        sides = (side_n, side_k, stride_n, stride_k)
        extras = (activation, config, _precision(), *quantized)
        for call in linear_calls(x, plan, values, bias, residual, y, *sides, *extras, times=times, schedule=schedule):
            call.run()
    return y


def schedule_for(x: Tensor, plan: Plan, values: Tensor, side_k: int, config: LinearConfig, sms: int) -> Schedule | None:
    """Which tiles each program makes where programs stay, on a GPU with so many SMs; None where they do not.

    They do not where config does not ask for it, where tensor maps cannot describe x or values (a map takes addresses and distances
    of rows that are multiples of 16 bytes, and at least one element), and where Triton is older than 3.9 and merged block-rows do
    not go by maps.
    """
    if not config.persistent or not (config.merge == 1 or FENCES_LOOPS):
        return None
    row_tiles = triton.cdiv(x.shape[0], config.block_m)
    if row_tiles * plan.tiles > MAX_SCHEDULED or not (_has_map(x) and _has_map(values.flatten(0, 1))):
        return None
    resident = 1 if config.num_warps >= 8 else 2  # programs that an SM holds: as config.py counts
    return schedule_of(plan, row_tiles, config.group_m, resident * sms, side_k // config.block_k)


def _has_map(matrix: Tensor) -> bool:
    """Whether a tensor map can describe a matrix whose columns are adjacent."""
    return matrix.numel() > 0 and matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.element_size() % 16 == 0


def linear_calls(
    x: Tensor,
    plan: Plan,
    values: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    side_n: int,
    side_k: int,
    stride_n: int,
    stride_k: int,
    activation: str,
    config: LinearConfig,
    precision: str,
    scales: Tensor | None = None,
    x_scales: Tensor | None = None,
    *,
    times: bool = False,
    schedule: Schedule | None = None,
) -> list[Call]:
    """What makes y[M, N] of x[M, K], whose columns are adjacent: one call, or two where config splits the inputs.

    scales [N] where values are quantized, x_scales [M] where x is too. times: y is act(...) * residual. schedule: that of
    schedule_for, where programs stay.
    """
    (m, k), n = x.shape, y.shape[1]
    whole = config.split == 1
    # sums of each part of the inputs, [split, M, N]
    kind = torch.int32 if x.dtype is torch.int8 else torch.float32
    parts = y if whole else torch.empty(config.split, m, n, dtype=kind, device=x.device)
    epilogue: dict[str, object] = {
        "ACTIVATION": activation,
        "SCALED": scales is not None,
        "X_SCALED": x_scales is not None,
        "HAS_BIAS": bias is not None,
        "RESIDUAL": "none" if residual is None else "times" if times else "add",
        "INTERPRETED": INTERPRETED,
    }
    after: Arguments = {"x_scales": x_scales, "scales": scales, "bias": bias, "residual": residual}
    arguments: Arguments = {"x": x, "plan": plan.table, "values": values, **after, "y": parts}
    arguments |= {"M": m, "N": n, "K": k, "stride_x": x.stride(0), "tiles_n": plan.tiles}
    constants: dict[str, object] = {
        "SIDE_N": side_n,
        "SIDE_K": side_k,
        "VALUE_STRIDE_N": stride_n,
        "VALUE_STRIDE_K": stride_k,
        "MERGE": config.merge,
        "BLOCK_M": config.block_m,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        "SPLIT": config.split,
        "SWAP": config.swap,
        "NARROW": config.narrow(side_n),
        "EVEN_K": k % side_k == 0,
        "PRECISION": precision,
    }
    if config.skip:
        arguments = {"x": x, "lists": plan.lists, "values": values, "scales": scales}
        arguments |= {"bias": bias, "residual": residual, "y": y}
        arguments |= {"M": m, "N": n, "K": k, "stride_x": x.stride(0), "tiles_n": plan.tiles}
        constants = {name: value for name, value in constants.items() if name not in ("SPLIT", "SWAP")}
        constants |= {name: value for name, value in epilogue.items() if name != "X_SCALED"}
        constants["STAGES"] = config.num_stages
        grid = (triton.cdiv(m, config.block_m) * plan.tiles, 1)
        return [Call(bsr_linear_skip_kernel, grid, arguments, constants, config.num_warps, config.num_stages)]
    if schedule is not None:
        box = [side_n, config.block_k] if stride_k == 1 else [config.block_k, side_n]
        arguments = {
            "x": TensorDescriptor.from_tensor(x, [config.block_m, config.block_k]),
            "plan": plan.table,
            "schedule": schedule.table,
            "values": values if config.merge > 1 else TensorDescriptor.from_tensor(values.flatten(0, 1), box),
        }
        arguments |= {**after, "y": y, "M": m, "N": n, "tiles_n": plan.tiles}
        left_out = ("GROUP_M", "SPLIT", "EVEN_K")
        constants = {name: value for name, value in constants.items() if name not in left_out} | epilogue
        grid = (schedule.programs, 1)
        return [Call(bsr_linear_persistent_kernel, grid, arguments, constants, config.num_warps, config.num_stages)]
    grid = (triton.cdiv(m, config.block_m) * plan.tiles, config.split)
    product = Call(bsr_linear_kernel, grid, arguments, constants | epilogue, config.num_warps, config.num_stages)
    if whole:
        return [product]
    arguments = {"parts": parts, **after, "y": y, "M": m, "N": n}
    constants = {"SPLIT": config.split, "BLOCK": SUM_BLOCK}
    return [
        product,
        Call(sum_parts_kernel, (triton.cdiv(m * n, SUM_BLOCK), 1), arguments, constants | epilogue, SUM_WARPS),
    ]


def sdd_call(
    dy: Tensor, x: Tensor, block_rows: Tensor, col_indices: Tensor, dvalues: Tensor, config: SddConfig, precision: str
) -> Call:
    """What makes dvalues[nnzb, R, C] of dy[M, N] and x[M, K], whose columns are adjacent."""
    nnzb, r, c = dvalues.shape
    (m, n), k = dy.shape, x.shape[1]
    arguments: Arguments = {"dy": dy, "x": x, "block_rows": block_rows, "col_indices": col_indices, "dvalues": dvalues}
    arguments |= {"M": m, "N": n, "K": k, "stride_dy": dy.stride(0), "stride_x": x.stride(0)}
    constants = {"R": r, "C": c, "BLOCK_M": config.block_m, "PRECISION": precision, "INTERPRETED": INTERPRETED}
    return Call(bsr_sdd_kernel, (nnzb, 1), arguments, constants, config.num_warps, config.num_stages)


def _precision() -> str:
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _with_adjacent_columns(matrix: Tensor) -> Tensor:
    """matrix itself where its columns are adjacent in memory, else a contiguous copy."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _checked(name: str, tensor: Tensor, crow: Tensor, col: Tensor, values: Values, **others: Tensor | None) -> Values:
    """values, contiguous, once all of them are what the kernels read: on one GPU, matrices of one dtype, and an int32 index."""
    _check(
        name, tensor.is_cuda or INTERPRETED, "a tensor on a CUDA device", f"one on {tensor.device}", "move it to a GPU"
    )
    check_device(name, tensor, crow_indices=crow, col_indices=col, values=values, **others)
    _check(name, tensor.ndim == 2, "two dimensions", tuple(tensor.shape))
    for other_name, other in {"values": values, **others}.items():
        if other is not None and other.dtype != tensor.dtype:
            _check(other_name, False, f"{tensor.dtype} like {name}", other.dtype, f"{other_name}.to({name}.dtype)")
    for other_name, other in (("crow_indices", crow), ("col_indices", col)):
        _check(other_name, other.dtype is torch.int32 and other.ndim == 1, "int32, one dimension", other.dtype)
    if values is None:
        return None
    _check(name, tensor.dtype.is_floating_point, "a floating-point tensor", tensor.dtype)
    _check_blocks(values, col)
    return values.contiguous()


def _check_blocks(values: Tensor, col: Tensor) -> None:
    agree = values.ndim == 3 and values.shape[0] == col.shape[0]
    _check("values", agree, f"{col.shape[0]} blocks, one for each of col_indices", tuple(values.shape))


def _checked_epilogue(x, n, activation, bias, residual) -> tuple[Tensor | None, Tensor | None]:
    """bias and residual, contiguous, once they have the shapes that y[M, n] takes and the activation is known."""
    _check("activation", activation in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}", repr(activation))
    for name, tensor, shape in (("bias", bias, (n,)), ("residual", residual, (x.shape[0], n))):
        _check(
            name,
            tensor is None or tensor.shape == shape,
            f"shape {shape}",
            () if tensor is None else tuple(tensor.shape),
        )
    return None if bias is None else bias.contiguous(), None if residual is None else residual.contiguous()


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        _check(name, size <= MAX_SIZE, f"at most {MAX_SIZE} rows or columns", size, "split the problem")


def _check(argument: str, ok: bool, expected: str, got: object, remedy: str = "see bsr_linear's documentation") -> None:
    if not ok:
        raise ArgumentError(argument, expected, got, remedy)
