"""The operators `sparse_prune::bsr_linear`, `bsr_linear_dx` and `bsr_sdd`, those of quantized weights (`bsr_linear_int8`,
`bsr_linear_e4m3`, `bsr_linear_w8a16`), and the function people call.

The schema, shape rule and gradient live here once. Devices get their kernels by dispatch key: the C++ extension registers CPU,
on a GPU the planner picks Triton's or the CUDA C++ ones by M, and plain PyTorch (reference.py) serves every device and dtype that
has no kernel. `bsr_linear_cuda` and `bsr_linear_triton` are the same by one kind of GPU kernels, and so are their gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from . import backends, planner, reference, tiles
from .bsr import QUANTIZED, BsrWeight, Derived, check_x_scale
from .errors import SparsePruneError
from .masks import block_density, grid_shape

Activation = Literal["none", "relu", "gelu", "gelu_tanh", "silu"]
ACTIVATIONS = tuple(reference.ACTIVATIONS)
QUANTIZED_INPUTS = (torch.float32, torch.bfloat16, torch.float16)  # dtypes of x beside a quantized weight
CUDA_QUANTIZED_INPUTS = (torch.bfloat16, torch.float16)  # of these by the CUDA C++ kernels
BACKENDS = ("auto", "cpu", "triton", "cuda", "dense", "reference")

_LINEAR = (
    "(Tensor x, Tensor crow_indices, Tensor col_indices, Tensor values, Tensor? prepacked, int out_features, Tensor? bias, "
    "str activation, Tensor? residual) -> Tensor"
)
_W8A16 = (
    "(Tensor x, Tensor crow_indices, Tensor col_indices, Tensor values, Tensor scales, Tensor? prepacked, int out_features, "
    "Tensor? bias, str activation, Tensor? residual) -> Tensor"
)
_W8A8 = _W8A16.replace("residual)", "residual, float? x_scale)")
_WITH_OUT_DTYPE = (") -> Tensor", ", ScalarType? out_dtype=None) -> Tensor")
_GLU = (
    "(Tensor x, Tensor gate_crow_indices, Tensor gate_col_indices, Tensor gate_values, Tensor? gate_prepacked, "
    "Tensor up_crow_indices, Tensor up_col_indices, Tensor up_values, Tensor? up_prepacked, int out_features, "
    "Tensor? gate_bias, Tensor? up_bias, str activation) -> Tensor"
)
_DX = "(Tensor dy, Tensor crow_indices, Tensor col_indices, Tensor values, int in_features) -> Tensor"
_SDD = "(Tensor dy, Tensor x, Tensor crow_indices, Tensor col_indices, int block_rows, int block_cols) -> Tensor"

_ATTENTION = "(Tensor q, Tensor k, Tensor v, float scale, Tensor? bias, Tensor? keep) -> Tensor"
_LAYER_NORM = "(Tensor x, Tensor? weight, Tensor? bias, float eps, Tensor? residual) -> Tensor"


def forward_mode() -> bool:
    """Whether forward-mode AD is on: torch.func.jvp, or a dual_level of torch.autograd.forward_ad."""
    return forward_ad._current_level >= 0


class _Library(torch.library.Library):
    """A library whose operators know forward-mode AD: the kernels of torch.library.register_autograd drop tangents in silence."""

    def impl(self, op_name, fn, dispatch_key="", **options):
        if dispatch_key == "Autograd":
            fn = _seeing_tangents(functools.reduce(str.removesuffix, _FORCED, op_name), fn)
        super().impl(op_name, fn, dispatch_key, **options)


def _seeing_tangents(name: str, kernel: Callable) -> Callable:
    """An operator's autograd kernel, in whose place plain PyTorch runs where an argument has a tangent, and gives one too."""

    def run(keyset, *arguments):
        if forward_mode() and any(
            isinstance(a, Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in arguments
        ):
            if name in QUANTIZED_OPERATORS:
                expected = "a floating-point weight under forward-mode AD"
                raise SparsePruneError("weight", expected, "a quantized one", "differentiate before quantizing")
            return _REFERENCE[name](*arguments)
        return kernel(keyset, *arguments)

    return run


_library = _Library("sparse_prune", "FRAGMENT")
_SCHEMAS = {
    "bsr_linear": _LINEAR,
    "bsr_linear_int8": _W8A8,
    "bsr_linear_e4m3": _W8A8,
    "bsr_linear_w8a16": _W8A16,
    "bsr_linear_glu": _GLU,
    "bsr_linear_dx": _DX,
    "bsr_sdd": _SDD,
    "attention": _ATTENTION,
    "layer_norm": _LAYER_NORM,
}
QUANTIZED_OPERATORS = ("bsr_linear_int8", "bsr_linear_e4m3", "bsr_linear_w8a16")
# What names end with: the planner's choice, or one kernel.
_FORCED = ("", *(f"_{kernel}" for kernel in planner.GPU_KERNELS))
_SCHEMAS |= {
    name + kernel: _SCHEMAS[name]
    for kernel in _FORCED[1:]
    for name in ("bsr_linear", *QUANTIZED_OPERATORS, "bsr_linear_dx", "bsr_sdd")
}
# Of these y may have another dtype than x; the kernels of a GPU store that of x.
_OUT_DTYPE = ("bsr_linear", *QUANTIZED_OPERATORS)
_SCHEMAS |= {name: _SCHEMAS[name].replace(*_WITH_OUT_DTYPE) for name in _OUT_DTYPE}
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


def _reference_linear(
    x, crow_indices, col_indices, values, prepacked, out_features, bias, activation, residual, out_dtype=None
):
    return reference.bsr_linear(
        x, crow_indices, col_indices, values, out_features, bias, activation, residual, out_dtype
    ).contiguous()


def _reference_w8a8(
    x,
    crow_indices,
    col_indices,
    values,
    scales,
    prepacked,
    out_features,
    bias,
    activation,
    residual,
    x_scale,
    out_dtype=None,
):
    index, epilogue = (crow_indices, col_indices), (bias, activation, residual)
    y = reference.bsr_linear_w8a8(x, *index, values, scales, out_features, *epilogue, x_scale, out_dtype)
    return y.contiguous()


def _reference_w8a16(
    x, crow_indices, col_indices, values, scales, prepacked, out_features, bias, activation, residual, out_dtype=None
):
    index, epilogue = (crow_indices, col_indices), (bias, activation, residual)
    y = reference.bsr_linear_w8a16(x, *index, values, scales, out_features, *epilogue, out_dtype)
    return y.contiguous()


def _dequantized_linear(
    x, crow_indices, col_indices, values, scales, prepacked, out_features, bias, activation, residual, out_dtype=None
):
    """On a CPU, quantized blocks that have no kernel of their own: by that of the dtype of x, which prepacked has too."""
    if prepacked is None or prepacked.dtype != x.dtype:
        shape, blocksize = (out_features, x.shape[1]), (values.shape[1], values.shape[2])
        prepacked = _dequantized_layout(BsrWeight(shape, blocksize, crow_indices, col_indices, values, scales), x.dtype)
    index, rest = (crow_indices, col_indices), (bias, activation, residual, out_dtype)
    return torch.ops.sparse_prune.bsr_linear(x, *index, _blocks_of(prepacked, values), prepacked, out_features, *rest)


def _dequantized_w8a8(x, crow_indices, col_indices, values, scales, *rest):
    """The same where x is rounded too; rest: prepacked, out_features, bias, activation, residual, x_scale[, out_dtype]."""
    rest, (x_scale, *out_dtype) = rest[:5], rest[5:]
    q, x_scales = reference.quantize_rows(x, x_scale, values.dtype)
    x = _e4m3_times(q, x_scales, x.dtype)  # [M, K]
    y = _dequantized_linear(x, crow_indices, col_indices, values, scales, *rest, *out_dtype)
    return y.masked_fill_(x_scales.isnan()[:, None], torch.nan)  # also where no block reads what is not finite


def _e4m3_times(q: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """q[M, K] of float8_e4m3fn times scales[M] in that dtype.

    By q's bits, for PyTorch converts float8 one by one: moved to where float16 has exponent and mantissa they are a 256th of it.
    """
    bits = q.view(torch.int8).short()  # the sign spread over the upper byte
    half = bits.bitwise_and(0x7F).bitwise_left_shift_(7).bitwise_or_(bits & -0x8000).view(torch.float16)
    return half.float().mul_((scales * 256)[:, None]).to(dtype)


def _dequantized_layout(packed: BsrWeight, dtype: torch.dtype) -> Tensor:
    """Quantized blocks as the CPU kernels of that dtype read them."""
    return torch.ops.sparse_prune.cpu_prepack(packed.dequantize(dtype).values)


def _blocks_of(prepacked: Tensor, values: Tensor) -> Tensor:
    """Where prepacked was made from quantized values: what has the shape that the kernels check, and no memory of its own."""
    return prepacked.new_zeros(()).expand(values.shape)


def _cuda_linear(x, crow_indices, col_indices, values, prepacked, out_features, bias, activation, residual):
    if prepacked is None:
        prepacked = backends.cuda_layout(crow_indices, col_indices, values, x.shape[1])
    bsr, shape = (crow_indices, col_indices, values), (out_features, x.shape[1])
    return backends.cuda_linear(x, *bsr, shape, prepacked, bias, activation, residual)


def _cuda_linear_dx(dy, crow_indices, col_indices, values, in_features):
    transposed = backends.cuda_layout(crow_indices, col_indices, values, in_features, transposed=True)
    bsr, shape = (crow_indices, col_indices, values), (dy.shape[1], in_features)
    return backends.cuda_linear(dy, *bsr, shape, transposed, transposed=True)


def _cuda_w8a8(
    x, crow_indices, col_indices, values, scales, prepacked, out_features, bias, activation, residual, x_scale
):
    expected = "bfloat16 or float16 beside a quantized weight on backend 'cuda'"
    _require(x.dtype in CUDA_QUANTIZED_INPUTS, "x", expected, x.dtype, "cast x, or leave backend at 'auto'")
    if prepacked is None:
        prepacked = backends.cuda_layout(crow_indices, col_indices, values, x.shape[1])
    extras = (bias, activation, residual, x_scale)
    kernels = torch.ops.sparse_prune
    run = kernels.cuda_linear_int8 if values.dtype == torch.int8 else kernels.cuda_linear_e4m3
    return run(x, prepacked, scales, *values.shape, out_features, *extras)


def _cuda_sdd(dy, x, crow_indices, col_indices, block_rows, block_cols):
    jobs = backends.cuda_jobs(crow_indices, col_indices, x.shape[1], block_rows, block_cols)
    return torch.ops.sparse_prune.cuda_sdd(dy, x, jobs, col_indices.shape[0], block_rows, block_cols)


_CUDA: dict[str, Callable] = {
    "bsr_linear": _cuda_linear,
    "bsr_linear_int8": _cuda_w8a8,
    "bsr_linear_e4m3": _cuda_w8a8,
    "bsr_linear_dx": _cuda_linear_dx,
    "bsr_sdd": _cuda_sdd,
}
for _name, _function in _CUDA.items():
    _library.impl(f"{_name}_cuda", _function, "CompositeExplicitAutograd")


def problem_of(name: str, arguments: tuple) -> tuple[tuple[int, int], int, tuple[int, int], int]:
    """Blocksize, number of blocks, (N, K) and M of a call of one of _CUDA's operators, by its arguments."""
    first, m = arguments[0], arguments[0].shape[0]
    if name in ("bsr_linear", *QUANTIZED_OPERATORS):  # x, crow, col, values, [scales,] prepacked, out_features
        outputs = arguments[5 if name == "bsr_linear" else 6]
        return tuple(arguments[3].shape[1:]), arguments[3].shape[0], (outputs, first.shape[1]), m
    if name == "bsr_linear_dx":  # dy, ..., values, in_features
        return tuple(arguments[3].shape[1:]), arguments[3].shape[0], (first.shape[1], arguments[4]), m
    return arguments[4:6], arguments[3].shape[0], (first.shape[1], arguments[1].shape[1]), m  # dy, x, crow, col, R, C


def _on_gpu(name: str, triton: Callable) -> Callable:
    """What runs under that name on CUDA tensors, Triton's kernel given."""
    if f"{name}_triton" in _SCHEMAS:
        _library.impl(f"{name}_triton", triton, "CUDA")
    if name == "bsr_linear_glu":
        return picking_glu(triton)
    kernel = picking(name, triton) if name in _CUDA else triton
    return _storing_dtype_of_x(name, kernel) if name in _OUT_DTYPE else kernel


def _storing_dtype_of_x(name: str, kernel: Callable) -> Callable:
    """That kernel, and plain PyTorch where y has another dtype than x."""
    inputs = len(getattr(torch.ops.sparse_prune, name).default._schema.arguments) - 1

    def run(*arguments):
        out_dtype = arguments[inputs:]  # without it, where it is None
        return _REFERENCE[name](*arguments) if out_dtype not in ((), (None,)) else kernel(*arguments[:inputs])

    return run


def picking(name: str, triton: Callable) -> Callable:
    """The CUDA C++ kernel where the planner takes it, else Triton's."""
    cuda = _CUDA[name]

    def run(*arguments):
        blocksize, nnzb, shape, m = problem_of(name, arguments)
        first = arguments[0]
        quantized = name in QUANTIZED_OPERATORS
        dtype = arguments[3].dtype if quantized else first.dtype
        kernel = planner.gpu_kernel(first.device, dtype, blocksize, block_density(nnzb, shape, blocksize), shape, m)
        takes = not quantized or first.dtype in CUDA_QUANTIZED_INPUTS
        return (cuda if kernel == "cuda" and takes else triton)(*arguments)

    return run


def picking_glu(triton: Callable) -> Callable:
    """Triton's kernel where the planner takes it for both weights, else each by what the planner takes."""

    def run(*arguments):
        x, n = arguments[0], arguments[9]
        shape, kernels = (n, x.shape[1]), set()
        for values in (arguments[3], arguments[7]):
            nnzb, *blocksize = values.shape
            density = block_density(nnzb, shape, blocksize)
            kernels.add(planner.gpu_kernel(x.device, x.dtype, tuple(blocksize), density, shape, x.shape[0]))
        return (_two_linears if "cuda" in kernels else triton)(*arguments)

    return run


def _two_linears(
    x,
    g_crow,
    g_col,
    g_values,
    g_prepacked,
    u_crow,
    u_col,
    u_values,
    u_prepacked,
    out_features,
    g_bias,
    u_bias,
    activation,
):
    """bsr_linear_glu on a device that has no kernel of its own for it: with that of bsr_linear, twice."""
    linear = torch.ops.sparse_prune.bsr_linear
    up = linear(x, u_crow, u_col, u_values, u_prepacked, out_features, u_bias, "none", None)
    return linear(x, g_crow, g_col, g_values, g_prepacked, out_features, g_bias, activation, None).mul_(up)


_REFERENCE: dict[str, Callable] = {
    "bsr_linear": _reference_linear,
    "bsr_linear_glu": _two_linears,
    "bsr_linear_int8": _reference_w8a8,
    "bsr_linear_e4m3": _reference_w8a8,
    "bsr_linear_w8a16": _reference_w8a16,
    "bsr_linear_dx": reference.bsr_linear_dx,
    "bsr_sdd": reference.bsr_sdd,
    "attention": reference.attention,
    "layer_norm": reference.layer_norm,
}
for _name, _function in _REFERENCE.items():
    _library.impl(_name, _function, "CompositeExplicitAutograd")
if backends.cpu_isas():
    _library.impl("bsr_linear_e4m3", _dequantized_w8a8, "CPU")
    _library.impl("bsr_linear_w8a16", _dequantized_linear, "CPU")
backends.register_triton(_library, _REFERENCE, _on_gpu)
tiles.install()


def _fake_linear(
    x, crow_indices, col_indices, values, prepacked, out_features, bias, activation, residual, out_dtype=None
):
    return x.new_empty(x.shape[0], out_features, dtype=out_dtype)


def _fake_w8a16(
    x, crow_indices, col_indices, values, scales, prepacked, out_features, bias, activation, residual, out_dtype=None
):
    return x.new_empty(x.shape[0], out_features, dtype=out_dtype)


def _fake_w8a8(x, crow_indices, col_indices, values, scales, prepacked, out_features, *others):
    out_dtype = others[4] if len(others) > 4 else None  # bias, activation, residual, x_scale[, out_dtype]
    return x.new_empty(x.shape[0], out_features, dtype=out_dtype)


@torch.library.register_fake("sparse_prune::bsr_linear_glu", lib=_library)
def _(x, gc, gi, gv, gp, uc, ui, uv, up, out_features, gate_bias, up_bias, activation):
    return x.new_empty(x.shape[0], out_features)


def _fake_linear_dx(dy, crow_indices, col_indices, values, in_features):
    return dy.new_empty(dy.shape[0], in_features)


def _fake_sdd(dy, x, crow_indices, col_indices, block_rows, block_cols):
    return dy.new_empty(col_indices.shape[0], block_rows, block_cols)


_FAKES: dict[str, Callable] = {
    "linear": _fake_linear,
    "linear_int8": _fake_w8a8,
    "linear_e4m3": _fake_w8a8,
    "linear_w8a16": _fake_w8a16,
    "linear_dx": _fake_linear_dx,
    "sdd": _fake_sdd,
}
for _kernel in _FORCED:
    for _name, _fake in _FAKES.items():
        torch.library.register_fake(f"sparse_prune::bsr_{_name}{_kernel}", _fake, lib=_library)


@torch.library.register_fake("sparse_prune::attention", lib=_library)
def _(q, k, v, scale, bias, keep):
    return q.new_empty(q.shape)


@torch.library.register_fake("sparse_prune::layer_norm", lib=_library)
def _(x, weight, bias, eps, residual):
    return x.new_empty(x.shape)


def _save_for_backward(ctx, inputs, output):
    x, crow_indices, col_indices, values, prepacked, _, bias, activation, _, *_ = inputs
    ctx.save_for_backward(x, crow_indices, col_indices, values, prepacked, bias)
    ctx.activation = activation


def _backward(kernel: str, ctx, dy):
    """dx = dz @ W, dvalues = blocks of dz^T @ x, db = sum of dz over M, dresidual = dy, with dz = dy * act'(z).

    kernel: what the names of the operators end with. z, dz and db have the dtype of y, the products that of x.
    """
    linear, linear_dx, sdd = (
        getattr(torch.ops.sparse_prune, name + kernel) for name in ("bsr_linear", "bsr_linear_dx", "bsr_sdd")
    )
    x, crow, col, values, prepacked, bias = ctx.saved_tensors
    dz = dy.contiguous()  # [M, N]
    if ctx.activation != "none":
        # z is computed again: keeping it would cost [M, N] for every layer of a model in training.
        out_dtype = () if dy.dtype == x.dtype else (dy.dtype,)
        z = linear(x, crow, col, values, prepacked, dy.shape[1], bias, "none", None, *out_dtype)
        dz = reference.activation_grad(dz, z, ctx.activation)
    needs_x, _, _, needs_values, _, _, needs_bias, _, needs_residual, *rest = ctx.needs_input_grad
    dbias = dz.sum(0) if needs_bias else None
    dz = dz.to(x.dtype)
    dx = linear_dx(dz, crow, col, values, x.shape[1]) if needs_x else None
    dvalues = sdd(dz, x, crow, col, *values.shape[1:]) if needs_values else None
    return dx, None, None, dvalues, None, None, dbias, None, dy if needs_residual else None, *(None for _ in rest)


def _save_dx(ctx, inputs, output):
    dy, crow_indices, col_indices, values, _ = inputs
    ctx.save_for_backward(dy, crow_indices, col_indices, values)


def _backward_dx(kernel: str, ctx, g):
    """Of dx = dy @ W, for gradients of gradients: ddy = g @ W^T, dvalues = blocks of dy^T @ g."""
    linear, sdd = (getattr(torch.ops.sparse_prune, name + kernel) for name in ("bsr_linear", "bsr_sdd"))
    dy, crow, col, values = ctx.saved_tensors
    needs_dy, _, _, needs_values, _ = ctx.needs_input_grad
    g = g.contiguous()  # [M, K]
    ddy = linear(g, crow, col, values, None, dy.shape[1], None, "none", None) if needs_dy else None
    return ddy, None, None, sdd(dy, g, crow, col, *values.shape[1:]) if needs_values else None, None


def _save_sdd(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])  # dy, x, crow_indices, col_indices


def _backward_sdd(kernel: str, ctx, g):
    """Of dvalues = blocks of dy^T @ x, for gradients of gradients: with G the weight of blocks g, ddy = x @ G^T and dx = dy @ G."""
    linear, linear_dx = (getattr(torch.ops.sparse_prune, name + kernel) for name in ("bsr_linear", "bsr_linear_dx"))
    dy, x, crow, col = ctx.saved_tensors
    needs_dy, needs_x, *_ = ctx.needs_input_grad
    g = g.contiguous()  # [nnzb, R, C]
    ddy = linear(x, crow, col, g, None, dy.shape[1], None, "none", None) if needs_dy else None
    return ddy, linear_dx(dy, crow, col, g, x.shape[1]) if needs_x else None, None, None, None, None


for _kernel in _FORCED:
    for _name, _gradient, _save in (
        ("bsr_linear", _backward, _save_for_backward),
        ("bsr_linear_dx", _backward_dx, _save_dx),
        ("bsr_sdd", _backward_sdd, _save_sdd),
    ):
        torch.library.register_autograd(
            f"sparse_prune::{_name}{_kernel}",
            functools.partial(_gradient, _kernel),
            setup_context=_save,
            lib=_library,
        )


def _save_glu(ctx, inputs, output):
    x, *weights, _, gate_bias, up_bias, activation = inputs
    ctx.save_for_backward(x, *weights, gate_bias, up_bias)
    ctx.activation = activation


def _backward_glu(ctx, dy):
    """du = dy * act(z) and dz = dy * u * act'(z), with z = x @ Wg^T + bg and u = x @ Wu^T + bu computed again."""
    x, *weights, gate_bias, up_bias = ctx.saved_tensors
    linear, n = torch.ops.sparse_prune.bsr_linear, dy.shape[1]
    z = linear(x, *weights[:4], n, gate_bias, "none", None)  # [M, N]
    u = linear(x, *weights[4:], n, up_bias, "none", None)  # [M, N]
    du = dy * reference.ACTIVATIONS[ctx.activation](z)  # [M, N]
    dz = reference.activation_grad(dy * u, z, ctx.activation)  # [M, N]
    needs_x, _, _, needs_gate, _, _, _, needs_up, _, _, needs_gate_bias, needs_up_bias, _ = ctx.needs_input_grad
    dx, dvalues = None, []
    for d, (crow, col, values, _), needs in ((dz, weights[:4], needs_gate), (du, weights[4:], needs_up)):
        if needs_x:
            part = torch.ops.sparse_prune.bsr_linear_dx(d, crow, col, values, x.shape[1])
            dx = part if dx is None else dx + part
        dvalues.append(torch.ops.sparse_prune.bsr_sdd(d, x, crow, col, *values.shape[1:]) if needs else None)
    dgate_bias, dup_bias = dz.sum(0) if needs_gate_bias else None, du.sum(0) if needs_up_bias else None
    return dx, None, None, dvalues[0], None, None, None, dvalues[1], None, None, dgate_bias, dup_bias, None


torch.library.register_autograd("sparse_prune::bsr_linear_glu", _backward_glu, setup_context=_save_glu, lib=_library)


class Ready(NamedTuple):
    """A layer that the C++ kernels can run by its number, and the tensors that it must still have for that."""

    number: int
    values: Tensor
    version: int | None  # of values and scales; None for those made under inference_mode, which have none
    steps: int
    epoch: int
    crow_indices: Tensor
    col_indices: Tensor
    scales: Tensor | None
    bias: Tensor | None
    plan: planner.Plan | None
    owner: object  # gives the number back when nobody holds it any more


class _Owner:
    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self, drop: Callable[[int], None] = backends.drop_ready) -> None:
        drop(self.number)


def make_ready(packed: BsrWeight, derived: Derived, bias: Tensor | None) -> Ready | None:
    """The layer with that weight, what was derived from it and a bias, or None where only the long way runs it."""
    values, scales = packed.values, packed.scales
    if derived.prepacked is None or not values.is_cpu or values.dtype == torch.float8_e4m3fn:
        return None
    counted = [not t.is_inference() for t in (values, scales) if t is not None]  # writes, by PyTorch
    if any(counted) and not all(counted):
        return None
    tensors = (packed.crow_indices, packed.col_indices)
    n, k = packed.shape
    blocks, of_blocks = (_blocks_of(derived.prepacked, values), None) if packed.weight_only else (values, scales)
    with torch.no_grad():
        number = torch.ops.sparse_prune.cpu_ready(
            *tensors, blocks, derived.prepacked, of_blocks, bias, n, k, packed.x_scale
        )
    plan = derived.plan if derived.plan is not None and any(choice.dense for choice in derived.plan.choices) else None
    # Both only rise, so that their sum tells whether either did.
    version = values._version + (0 if scales is None else scales._version) if all(counted) else None
    seen = (version, backends.optimizer_steps, backends.epoch)
    return Ready(number, values, *seen, *tensors, scales, bias, plan, _Owner(number))


def _never_ready(*arguments: object) -> Tensor | None:
    """run_ready and run_glu_ready without the C++ extension."""
    return None


run_ready: Callable[..., Tensor | None] = _never_ready
run_glu_ready: Callable[..., Tensor | None] = _never_ready
if backends.cpu_isas():
    # OpOverload.__call__ without its frame of Python. Both give None where a layer has changed, where gradients may be
    # owed, and where autocast, a transform of torch.func, a dispatch mode or a trace has to see what happens.
    run_ready = torch.ops.sparse_prune.cpu_linear_ready.default._op
    run_glu_ready = torch.ops.sparse_prune.cpu_glu_ready.default._op
    for _name in ("cpu_linear_ready", "cpu_glu_ready"):
        _library.impl(_name, torch.library.fallthrough_kernel, "AutogradCPU")
ACTIVATION_NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}  # of the C++ enum Activation


def owes_gradient(x: Tensor, values: Tensor, bias: Tensor | None, residual: Tensor | None) -> bool:
    """Whether autograd, or a transform of torch.func, has to see what is computed from these."""
    if torch._C._are_functorch_transforms_active() or forward_mode():
        return True
    return torch.is_grad_enabled() and (
        x.requires_grad
        or values.requires_grad
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    )


def _no_backward(ctx, dy):
    raise SparsePruneError(
        "backward", "a floating-point weight", "a quantized weight", "train before quantizing, which is for inference"
    )


for _name in (name + kernel for name in QUANTIZED_OPERATORS for kernel in _FORCED):
    torch.library.register_autograd(
        f"sparse_prune::{_name}",
        _no_backward,
        setup_context=lambda ctx, inputs, output: None,
        lib=_library,
    )


def quantized_operator(values: Tensor, weight_only: bool) -> str:
    """Which of QUANTIZED_OPERATORS multiplies quantized values."""
    return QUANTIZED_OPERATORS[2 if weight_only else 0 if values.dtype == torch.int8 else 1]


def backend_for(
    device: torch.device | str,
    dtype: torch.dtype,
    backend: str = "auto",
    blocksize: tuple[int, int] = (32, 32),
    density: float | None = None,
    tokens: int | None = None,
    shape: tuple[int, int] | None = None,
    weight_only: bool = False,
    converts: bool = False,
) -> str:
    """The backend that bsr_linear runs: "cpu" (with its instruction set, "cpu:avx512"), "triton", "cuda", "reference" or "dense".

    "cpu:dequantized" are the CPU kernels for the dtype of x, which run quantized weights that have none of their own.

    With a density of blocks and M (tokens) the planner is asked too, as under "auto" when no gradient of the weight is wanted: the
    answer is "dense: reason" where it expects dense to be faster for a weight of that shape (N, K; None: a large one). On a GPU
    it also chooses between "cuda" and "triton", by M.
    dtype is that of the weight, torch.int8 or torch.float8_e4m3fn for a quantized one, which the planner leaves to the sparse
    operator; weight_only as in BsrWeight. converts: y is wanted in another dtype than that of x, which neither the planner's dense
    product nor the kernels of a GPU give.

    Raises SparsePruneError with the reason when a backend is named that cannot run.
    """
    if backend not in BACKENDS:
        raise SparsePruneError("backend", f"one of {', '.join(BACKENDS)}", repr(backend), "leave it at 'auto'")
    device = torch.device(device)
    if backend == "dense":
        return "dense: asked for"
    if backend == "auto" and density is not None and tokens is not None and not converts:
        plan = planner.plan(device, dtype, blocksize, density, shape)
        choice = None if plan is None else plan.at(tokens)
        if choice is not None and (choice.dense or choice.kernel):
            return f"dense: {choice.reason}" if choice.dense else choice.kernel
    rounds = "its kernels round x to int8 too, and this weight is weight_only" if weight_only else None
    stores = "its kernels store y in the dtype of x" if converts else None
    dequantizes = runs_dequantized(device, dtype, weight_only)
    reasons = {
        "cpu": lambda: backends.cpu_unavailable(device, torch.float32 if dequantizes else dtype),
        "triton": lambda: backends.triton_unavailable(device, dtype, blocksize) or stores,
        "cuda": lambda: backends.cuda_unavailable(device, dtype, blocksize) or rounds or stores,
    }
    for name, why_not in reasons.items():
        if backend not in (name, "auto"):
            continue
        reason = why_not()
        if reason is None:
            if name != "cpu":
                return name
            return "cpu:dequantized" if dequantizes else f"cpu:{backends.cpu_isa(dtype)}"
        if backend == name:
            raise SparsePruneError(
                "backend", "a backend that can run here", repr(name), f"{reason}; backend='auto' uses plain PyTorch"
            )
    return "reference"


def show_config() -> None:
    """Print which backends work here, why the others do not, and which table decides between sparse and dense."""
    for backend in backends.status():
        verdict = f"yes: {backend.detail}" if backend.available else f"no: {backend.reason}"
        print(f"{backend.name:<10} {verdict}")
    print(f"{'planner':<10} {planner.describe()}")
    print(f"{'on a GPU':<10} {planner.describe_gpu()}")
    if tiles.describe():
        print(f"{'tilings':<10} {tiles.describe()}")


def runs_dequantized(device: torch.device, dtype: torch.dtype, weight_only: bool) -> bool:
    """Whether a quantized weight runs by the kernels for the dtype of x: a CPU has those for int8 that round x too."""
    return device.type == "cpu" and (weight_only or dtype == torch.float8_e4m3fn)


def prepack(values: Tensor, crow_indices: Tensor) -> Tensor | None:
    """values[nnzb, R, C] in the order the CPU kernels read, or None where plain PyTorch will run."""
    if backends.cpu_unavailable(values.device, values.dtype) is not None:
        return None
    if values.dtype == torch.int8:
        return torch.ops.sparse_prune.cpu_prepack_int8(values, crow_indices)
    return torch.ops.sparse_prune.cpu_prepack(values)


def bsr_linear(
    x: Tensor,
    packed: BsrWeight,
    bias: Tensor | None = None,
    activation: Activation = "none",
    residual: Tensor | None = None,
    backend: str = "auto",
    x_scale: float | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """y[..., N] = act(x[..., K] @ W[N, K]^T + bias[N]) + residual[..., N], accumulated in float32.

    x, packed.values, bias and residual share one dtype (float32, bfloat16, float16; float64 by plain PyTorch) and device. So does
    y, or it has out_dtype, one of the first three, and then residual has that too: what was summed in float32 is rounded to it
    once, after bias (brought to it), activation and residual. The CPU kernels store it; on a GPU it takes plain PyTorch.
    Differentiable in x, packed.values, bias and residual (in forward mode, torch.func.jvp, always by plain PyTorch). backend "auto"
    runs the sparse kernel, or on a CPU, where no gradient of the weight is wanted, dense PyTorch if the planner expects that to be
    faster; the dense weight is then made once and kept beside the packed one, N * K more elements of memory.
    `backend_for(x.device, packed.values.dtype, backend, packed.blocksize, density, M, shape)` tells which runs. "cuda" runs the
    CUDA C++ kernels and "triton" Triton's.

    Where packed.values are int8 or float8_e4m3fn (BsrWeight.quantize), x, bias and residual share float32, bfloat16 or float16, but
    for out_dtype; each row of x is rounded to the same dtype by its own scale max|x| / L, or all by x_scale (None:
    packed.x_scale), where what lies beyond +-L x_scale saturates, with L = 127 or 448 the dtype's largest number; products are
    summed in int32 or float32, and the rest is float32. A row of x with NaN or infinity gives a row of NaN. Where
    packed.weight_only, x stays as it is, products with the int8 numbers are summed in float32 and then scaled. For inference: no
    gradients. A CPU has kernels for int8 beside x rounded to it; the other two run by those for the dtype of x, to which the
    blocks, scales included, are brought once ("cpu:dequantized").

    Raises SparsePruneError for shapes, dtypes or devices that do not agree, and for a backend that cannot run here.
    """
    _check_linear(x, packed, bias, activation, residual, backend, x_scale, out_dtype)
    n, out_shape = packed.shape[0], (*x.shape[:-1], packed.shape[0])
    to = () if out_dtype in (None, x.dtype) else (out_dtype,)
    weight_only, values = packed.weight_only, packed.values
    chosen = backend_for(x.device, values.dtype, backend, packed.blocksize, weight_only=weight_only, converts=bool(to))
    if to and bias is not None:
        bias = bias.to(*to)
    rows = flatten_rows(x)  # [M, K]
    flat_residual = None if residual is None else residual.reshape(-1, n).contiguous()  # [M, N]
    bsr = (packed.crow_indices, packed.col_indices, packed.values)
    derived, form = None, "plain" if backend == "dense" else ""
    if not (torch.is_grad_enabled() and packed.values.requires_grad):
        derived = packed.derived = current(packed.derived, packed, x.dtype)
        if backend == "auto" and not to:
            form = dense_form(derived, rows.shape[0])
    prepacked = None if derived is None else derived.prepacked
    forced = f"_{backend}" if backend in planner.GPU_KERNELS else ""
    if backend == "cuda" and derived is not None and prepacked is None:  # the plan would take another kernel
        derived.prepacked = prepacked = backends.cuda_layout(*bsr[:2], packed.values.detach(), packed.shape[1])
    if packed.scales is not None:
        own_scale = () if packed.weight_only else (packed.x_scale if x_scale is None else x_scale,)
        arguments = (rows, *bsr, packed.scales, prepacked, n, bias, activation, flat_residual, *own_scale, *to)
        name = quantized_operator(packed.values, packed.weight_only)
        if backend == "reference":
            with torch.no_grad():
                y = _REFERENCE[name](*arguments)
        else:
            y = getattr(torch.ops.sparse_prune, name + forced)(*arguments)
    elif form and derived is not None and not to:
        y = dense_linear(dense_weight(derived, form, packed.to_dense), form, rows, bias, activation, flat_residual)
    elif form or chosen == "reference":
        y = reference.bsr_linear(rows, *bsr, n, bias, activation, flat_residual, *to)
    else:
        run = getattr(torch.ops.sparse_prune, f"bsr_linear{forced}")
        y = run(rows, *bsr, prepacked, n, bias, activation, flat_residual, *to)
    return y.reshape(out_shape)


def bsr_linear_glu(
    x: Tensor,
    gate: BsrWeight,
    up: BsrWeight,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    activation: Activation = "silu",
    backend: str = "auto",
) -> Tensor:
    """y[..., N] = act(x[..., K] @ Wg[N, K]^T + gate_bias[N]) * (x @ Wu[N, K]^T + up_bias[N]): a gated MLP's gate and up.

    Tensors are as in bsr_linear, and so are gradients. The CPU kernel computes both products of a part of y before the next part,
    and multiplies there; up's product is rounded to the dtype of y in between. It takes weights of one dtype whose blocks are
    equally high. Triton's computes up's product first and multiplies by it as gate's is stored, under "auto". Others, quantized
    ones, those that the planner would run dense, and other backends take two calls of bsr_linear.

    Raises SparsePruneError where the weights differ in shape, and as bsr_linear.
    """
    for packed, bias in ((gate, gate_bias), (up, up_bias)):
        _check_linear(x, packed, bias, activation, None, backend, None)
    _require(gate.shape == up.shape, "up", f"a weight {gate.shape} like gate", up.shape, "pass both of one MLP")
    rows, weights = flatten_rows(x), (gate, up)  # [M, K]
    on_cpu = gate.values.device.type == "cpu"
    one_kernel = (backend == "auto" or (backend == "cpu" and on_cpu)) and gate.scales is None
    prepacked: list[Tensor | None] = [None, None]
    alike = gate.values.dtype == up.values.dtype and (not on_cpu or gate.blocksize[0] == up.blocksize[0])
    if one_kernel and alike:
        for i, packed in enumerate(weights):
            if not (torch.is_grad_enabled() and packed.values.requires_grad):
                derived = packed.derived = current(packed.derived, packed, x.dtype)
                one_kernel = one_kernel and not (backend == "auto" and dense_form(derived, rows.shape[0]))
                prepacked[i] = derived.prepacked
    else:
        one_kernel = False
    if not one_kernel:
        y = bsr_linear(x, gate, gate_bias, activation, backend=backend)
        return y * bsr_linear(x, up, up_bias, backend=backend)
    backend_for(x.device, gate.values.dtype, backend, gate.blocksize)
    arrays = [(w.crow_indices, w.col_indices, w.values, p) for w, p in zip(weights, prepacked, strict=True)]
    y = torch.ops.sparse_prune.bsr_linear_glu(
        rows, *arrays[0], *arrays[1], gate.shape[0], gate_bias, up_bias, activation
    )
    return y.reshape(*x.shape[:-1], gate.shape[0])


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, keep: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """softmax(scale * q k^T + bias) v per head, for q, k, v[B, T, heads, d] -> [B, T, heads, d]; scale defaults to 1/sqrt(d).

    bias of their dtype and keep (bool: False leaves a key out) broadcast to [B, heads, T, T]. A query that keeps no key averages
    all of them. On a CPU a kernel of ours runs where no gradient is needed, made for the lengths of encoders: it reads views of one
    qkv product in place. Otherwise PyTorch's runs.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if _wants_gradient(q, k, v, bias):
        return reference.attention(q, k, v, scale, bias, keep)
    return torch.ops.sparse_prune.attention(q, k, v, scale, bias, keep)


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return forward_mode() or (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors))


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> Tensor:
    """LayerNorm over the last dimension of x + residual, [..., H] -> [..., H]; weight and bias [H].

    Statistics are in float32. On a CPU one pass of a kernel of ours where no gradient is needed; otherwise PyTorch's.
    """
    if _wants_gradient(x, weight, bias, residual):
        return reference.layer_norm(x, weight, bias, eps, residual)
    rows = x.reshape(-1, x.shape[-1])  # [M, H]
    flat = None if residual is None else residual.reshape(rows.shape)
    return torch.ops.sparse_prune.layer_norm(rows, weight, bias, eps, flat).view(x.shape)


def flatten_rows(x: Tensor) -> Tensor:
    """x[..., K] as [M, K] with unit inner stride, a view wherever that is possible."""
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def current(derived: Derived, packed: BsrWeight, dtype: torch.dtype) -> Derived:
    """derived, or a new one if the weight (or the kernels that run here) is not that which it was made for. dtype: that of x."""
    key = derived_key(packed.values, packed.scales, packed.weight_only, dtype)
    if derived.key == key:
        return derived
    values = packed.values.detach()
    rows, cols = grid_shape(packed.shape, packed.blocksize)
    plan = planner.plan(values.device, values.dtype, packed.blocksize, packed.nnzb / (rows * cols), packed.shape)
    # Not under inference_mode, for a later call may want gradients of x.
    with torch.inference_mode(False), torch.no_grad():
        if runs_dequantized(values.device, values.dtype, packed.weight_only):
            runs = backends.cpu_unavailable(values.device, dtype) is None
            prepacked = _dequantized_layout(packed, dtype) if runs else None
        else:
            prepacked = prepack(values, packed.crow_indices)
        derived = Derived(key, prepacked, plan)
        if values.is_cuda and not packed.weight_only and "cuda" in _kernels_of(plan, values, packed, rows * cols):
            derived.prepacked = backends.cuda_layout(packed.crow_indices, packed.col_indices, values, packed.shape[1])
    return derived


def _kernels_of(plan: planner.Plan | None, values: Tensor, packed: BsrWeight, blocks: int) -> set[str]:
    """The kernels that a weight on a GPU runs by, over all M."""
    if plan is not None:
        return {choice.kernel for choice in plan.choices}
    return {planner.gpu_kernel(values.device, values.dtype, packed.blocksize, packed.nnzb / blocks, packed.shape, 1)}


def values_key(values: Tensor) -> tuple:
    """Changes whenever values were written in place or replaced, or other kernels chosen, so that what is derived is made again."""
    version = 0 if values.is_inference() else values._version
    steps = backends.optimizer_steps if values.requires_grad else 0
    return backends.epoch, version, steps, values.data_ptr(), values.dtype, values.device


def derived_key(values: Tensor, scales: Tensor | None, weight_only: bool, dtype: torch.dtype) -> tuple:
    """values_key of all that current() makes things from."""
    if scales is None or not runs_dequantized(values.device, values.dtype, weight_only):
        return values_key(values)
    return *values_key(values), values_key(scales), dtype


def dense_form(derived: Derived, tokens: int) -> str:
    """The form of the dense product that the plan chooses for M = tokens, or "" for the sparse operator.

    oneDNN's product with a reordered weight has no gradient: where any may be wanted, the plain one runs in its place.
    """
    if derived.plan is None or tokens == 0:
        return ""
    form = derived.plan.at(tokens).dense
    return "plain" if form and (torch.is_grad_enabled() or forward_mode()) else form


def dense_weight(derived: Derived, form: str, to_dense: Callable[[], Tensor]) -> Tensor:
    """The dense weight in that form, made at the first call and kept in derived."""
    if form not in derived.dense:
        # Not under inference_mode, for a later call may want gradients of x.
        with torch.inference_mode(False), torch.no_grad():
            weight = to_dense()
            derived.dense[form] = torch.ops.mkldnn._reorder_linear_weight(weight) if form == "prepacked" else weight
    return derived.dense[form]


@functools.cache
def _prepacked_product() -> Callable[..., Tensor]:
    """oneDNN's product with a reordered weight, without the microsecond of Python that torch.ops adds to each call."""
    return torch.ops.mkldnn._linear_pointwise.default._op


def dense_linear(
    weight: Tensor, form: str, rows: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None
) -> Tensor:
    """act(rows[..., K] @ weight^T + bias[N]) + residual[..., N] by PyTorch's dense product, weight as dense_weight made it."""
    prepacked = form == "prepacked"
    y = _prepacked_product()(rows, weight, bias, "none", [], "") if prepacked else F.linear(rows, weight, bias)
    if activation != "none":
        check_activation(activation)
        y = reference.ACTIVATIONS[activation](y)
    if residual is None:
        return y
    _require(
        residual.shape == y.shape, "residual", f"shape {tuple(y.shape)}", tuple(residual.shape), "match the output"
    )
    return y + residual


def _check_linear(
    x: Tensor,
    packed: BsrWeight,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    backend: str,
    x_scale: float | None,
    out_dtype: torch.dtype | None = None,
) -> None:
    """Raise SparsePruneError for arguments of bsr_linear that do not agree."""
    if not isinstance(packed, BsrWeight):
        remedy = "make it with BsrWeight.from_dense(weight, mask), or from_torch of a sparse tensor"
        raise SparsePruneError("packed", "a BsrWeight", type(packed).__name__, remedy)
    for name, tensor in (("x", x), ("bias", bias), ("residual", residual)):
        if not isinstance(tensor, Tensor) and (tensor is not None or name == "x"):
            raise SparsePruneError(name, "a tensor", type(tensor).__name__, "pass a torch.Tensor")
    n, k = packed.shape
    fits = x.ndim >= 1 and x.shape[-1] == k
    _require(
        fits, "x", f"a last dimension of {k} (in_features)", tuple(x.shape), f"pass x[..., {k}] to a weight {n, k}"
    )
    check_activation(activation)
    out_shape = (*x.shape[:-1], n)
    quantized = packed.values.dtype in QUANTIZED
    dtype, like = (x.dtype, "x") if quantized else (packed.values.dtype, "the weight")
    expected = "float32, bfloat16 or float16 beside a quantized weight"
    _require(not quantized or dtype in QUANTIZED_INPUTS, "x", expected, dtype, "cast x")
    _require(
        not quantized or backend != "dense",
        "backend",
        "auto, cpu, triton, cuda or reference beside a quantized weight",
        repr(backend),
        "leave it at 'auto', or call packed.dequantize() first",
    )
    weight_only = packed.weight_only
    with_int8 = not weight_only or packed.values.dtype == torch.int8
    _require(with_int8, "weight_only", "int8 values", packed.values.dtype, "quantize(torch.int8, weight_only=True)")
    for scale in (x_scale, packed.x_scale):
        check_x_scale(scale, packed.values.dtype, weight_only)
    out, like_out = (dtype, like) if out_dtype in (None, dtype) else (out_dtype, "out_dtype")
    expected = f"None or {dtype}, the dtype of x, or one of float32, bfloat16 and float16 from another of these"
    converted = out is dtype or {dtype, out} <= {*QUANTIZED_INPUTS}
    _require(converted, "out_dtype", expected, out, "call .to(...) of the result")
    for name, tensor, shape in (("x", x, None), ("bias", bias, (n,)), ("residual", residual, out_shape)):
        if tensor is None:
            continue
        if name == "residual":
            dtype, like = out, like_out
        remedy = f"pass {name}.to({dtype}), or cast the weight"
        _require(tensor.dtype == dtype, name, f"dtype {dtype} like {like}", tensor.dtype, remedy)
        device = packed.values.device
        _require(
            tensor.device == device, name, f"device {device} like the weight", tensor.device, f"move it to {device}"
        )
        got, remedy = tuple(tensor.shape), "it is not broadcast: pass one of that shape"
        _require(shape is None or got == shape, name, f"shape {shape}", got, remedy)


def check_activation(activation: str) -> None:
    """Raise SparsePruneError unless activation is one of ACTIVATIONS."""
    known = activation in ACTIVATIONS
    _require(known, "activation", f"one of {', '.join(ACTIVATIONS)}", repr(activation), "apply another to the result")


def _require(ok: bool, argument: str, expected: str, got: object, remedy: str) -> None:
    if not ok:
        raise SparsePruneError(argument, expected, got, remedy)
