"""SparseLinear, the drop-in for nn.Linear, and the call that model code uses to fuse what follows a linear layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import backends, ops, planner, reference
from .bsr import QUANTIZED, BsrWeight, Derived, check_x_scale, dtype_name
from .errors import SparsePruneError
from .linears import as_matrix, is_linear
from .masks import block_density, check_blocksize
from .ops import (
    ACTIVATION_NUMBERS,
    QUANTIZED_INPUTS,
    Activation,
    bsr_linear,
    flatten_rows,
    quantized_operator,
    run_glu_ready,
    run_ready,
)
from .reference import ACTIVATIONS

is_compiling = torch.compiler.is_dynamo_compiling
is_tracing = torch._C._is_tracing  # by torch.jit.trace


class SparseLinear(nn.Module):
    """y[..., N] = act(x[..., K] @ W[N, K]^T + b[N]) + residual with W in block sparse row form.

    Called, trained, moved and saved like nn.Linear. Only the kept blocks exist: `values` [nnzb, R, C] is the parameter (gradients
    and optimizer state have its size) and the int32 buffers `crow_indices`, `col_indices` say where they belong.

    Quantized, `values` is int8 or float8_e4m3fn and frozen, beside the buffer `scales` (float32 [N], see BsrWeight.quantize); both
    keep their dtype when the layer is cast. x is then float32, bfloat16 or float16 like the bias, and no gradient passes through.
    `weight_only` (of int8; False) leaves x as it is where it would be rounded to int8 too; it may be set at any time, and is no
    part of the state dict: files have it beside the layer's shape. So have they `x_scale`, the one scale by which all rows of x
    are rounded (`sp.calibrate_` finds it); None: each row by its own, as it comes.

    The kernels read values in an order of their own, which is derived on the first call without gradients and made again when
    values change. A write through `values.data`, or to values made under inference_mode, is invisible to PyTorch's version counter:
    call `refresh_()` after one. Code that torch.compile made sees no version counter at all: there it is made again by eval(),
    load_state_dict() and to(), and after another write in place it takes a call outside of the compiled code.

    Gradients of gradients work. So do the transforms of torch.func (vmap, grad, jvp, ...), by plain PyTorch with the weight made
    dense, since kernels of torch.library cannot be transformed.

    Where the planner expects dense to be faster on this CPU at the M of a call, dense PyTorch runs in the kernel's place, and the
    dense weight is kept too: `backend_for(M)` tells; `planned = False`, or SPARSE_PRUNE_TUNING=off for all layers, forbids it.
    """

    in_features: int
    out_features: int
    planned: bool
    _derived: Derived
    _weight_only: bool
    _x_scale: float | None
    crow_indices: Tensor
    col_indices: Tensor
    values: nn.Parameter
    bias: nn.Parameter | None
    scales: Tensor  # of a quantized layer only
    _parameters: dict[str, Any]  # read directly where nn.Module's lookup would cost more than a small product

    def __init__(
        self,
        in_features: int,
        out_features: int,
        crow_indices: Tensor,
        col_indices: Tensor,
        values: Tensor,
        bias: Tensor | None = None,
        scales: Tensor | None = None,
        weight_only: bool = False,
        x_scale: float | None = None,
    ) -> None:
        super().__init__()
        self._fill(in_features, out_features, crow_indices, col_indices, values, bias, scales, weight_only, x_scale)

    def _fill(
        self,
        in_features: int,
        out_features: int,
        crow_indices: Tensor,
        col_indices: Tensor,
        values: Tensor,
        bias: Tensor | None = None,
        scales: Tensor | None = None,
        weight_only: bool = False,
        x_scale: float | None = None,
    ) -> None:
        """Make this module, new or emptied, a layer of these tensors."""
        # Straight to the dicts: register_buffer and nn.Module's __setattr__ would be most of what loading a small model takes.
        self._buffers.update(crow_indices=crow_indices, col_indices=col_indices)
        if scales is not None:
            self._buffers["scales"] = scales
        own = nn.Parameter(values, requires_grad=values.dtype not in QUANTIZED)
        self._parameters.update(values=own, bias=None if bias is None else nn.Parameter(bias))
        sizes = {"in_features": in_features, "out_features": out_features}
        vars(self).update(sizes, planned=True, _derived=Derived(), _weight_only=False, _x_scale=None)
        if weight_only:
            self.weight_only = True
        if x_scale is not None:
            self.x_scale = x_scale

    @classmethod
    def from_dense(cls, linear: nn.Linear, mask: Tensor, blocksize: Sequence[int] = (32, 32)) -> SparseLinear:
        """The kept blocks of the weight (mask: bool [ceil(N/R), ceil(K/C)]) and the bias of an nn.Linear or Conv1D, copied.

        Training mode and requires_grad follow. Raises SparsePruneError where mask and blocksize do not fit the weight.
        """
        if not is_linear(linear):
            raise SparsePruneError(
                "linear", "an nn.Linear", type(linear).__name__, "use sparsify_(model, ...) for a whole model"
            )
        packed = BsrWeight.from_dense(as_matrix(linear, linear.weight), mask, check_blocksize(blocksize))
        layer = cls.from_bsr(packed, None if linear.bias is None else linear.bias.detach().clone())
        layer.values.requires_grad_(linear.weight.requires_grad)
        return layer.train(linear.training)

    @classmethod
    def from_bsr(cls, packed: BsrWeight, bias: Tensor | None = None) -> SparseLinear:
        """A layer that shares the tensors of packed."""
        n, k = packed.shape
        index = (packed.crow_indices, packed.col_indices)
        return cls(k, n, *index, packed.values, bias, packed.scales, packed.weight_only, packed.x_scale)

    @classmethod
    def become(cls, module: nn.Module, *arguments: Any) -> SparseLinear:
        """Turn module, another linear layer, into SparseLinear(*arguments) in its place: its hooks and names in a model stay."""
        vars(module).update(_parameters={}, _buffers={})
        object.__setattr__(module, "__class__", cls)
        assert isinstance(module, cls)
        module._fill(*arguments)
        return module

    def quantize_(self, dtype: torch.dtype = torch.int8, weight_only: bool = False) -> SparseLinear:
        """Round the blocks (BsrWeight.quantize), in place, and return self; `sp.quantize_` does a whole model."""
        packed = self.packed.quantize(dtype, weight_only)
        self.values = nn.Parameter(packed.values, requires_grad=False)
        self.register_buffer("scales", packed.scales)
        self.weight_only = weight_only
        return self.refresh_()

    @property
    def weight_only(self) -> bool:
        """Whether int8 blocks meet x as it is; False: x is rounded like them. Setting it beside others raises SparsePruneError.

        True forgets x_scale.
        """
        return self._weight_only

    @weight_only.setter
    def weight_only(self, value: bool) -> None:
        if value and self.values.dtype != torch.int8:
            expected = "False but beside int8 values"
            raise SparsePruneError(
                "weight_only", expected, self.values.dtype, "quantize_(torch.int8, weight_only=True)"
            )
        self._weight_only = bool(value)
        if value:
            self._x_scale = None
        self.refresh_()

    @property
    def x_scale(self) -> float | None:
        """The scale by which all rows of x are rounded, None where each has its own. Setting one where x stays as it is raises
        SparsePruneError.
        """
        return self._x_scale

    @x_scale.setter
    def x_scale(self, value: float | None) -> None:
        check_x_scale(value, self.values.dtype, self._weight_only)
        self._x_scale = None if value is None else float(value)
        self.refresh_()

    @classmethod
    def cat(cls, layers: Sequence[SparseLinear]) -> SparseLinear:
        """One layer whose outputs are those of layers, one after another, copied: such as q, k and v from one reading of x.

        For inference: in evaluation, nothing in it requires gradients, and planned if all are. Raises SparsePruneError as
        BsrWeight.cat, which says what the weights must share.
        """
        packed = BsrWeight.cat([layer.packed for layer in layers])
        bias, biases = None, [layer.bias for layer in layers]
        like = next((b for b in biases if b is not None), None)
        if like is not None:
            lacking = (like.new_zeros(layer.out_features) for layer in layers)
            bias = torch.cat([zeros if b is None else b for b, zeros in zip(biases, lacking, strict=True)])
        joined = cls.from_bsr(packed, bias).requires_grad_(False).eval()
        joined.planned = all(layer.planned for layer in layers)
        return joined

    @property
    def blocksize(self) -> tuple[int, int]:
        """(R, C): output features and input features of a block."""
        return self.values.shape[1], self.values.shape[2]

    @property
    def packed(self) -> BsrWeight:
        """The weight as a BsrWeight that shares this layer's tensors."""
        shape = (self.out_features, self.in_features)
        scales = self._buffers.get("scales")
        index = (self.crow_indices, self.col_indices)
        return BsrWeight(shape, self.blocksize, *index, self.values, scales, self._weight_only, self._x_scale)

    @property
    def weight(self) -> Tensor:
        """The weight made dense, [N, K]: for code that reads it. Computed on each access; writing to it changes nothing.

        Of a quantized layer it is float32.
        """
        return self.packed.to_dense()

    @property
    def density(self) -> float:
        """Kept elements over N * K."""
        return self.packed.density

    def to_dense(self) -> nn.Linear:
        """The nn.Linear with the same weight and bias, zeros where blocks were pruned.

        Its dtype is that of the values, or where these are quantized that of the bias, float32 without one.
        """
        like = {"device": self.values.device, "dtype": self.compute_dtype}
        dense = nn.utils.skip_init(nn.Linear, self.in_features, self.out_features, bias=self.bias is not None, **like)
        with torch.no_grad():
            dense.weight.copy_(self.weight)
            if self.bias is not None:
                dense.bias.copy_(self.bias)
        return dense.train(self.training)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The floating-point dtype of the parameters: of values, or where these are quantized of bias, float32 without one."""
        if self.values.dtype not in QUANTIZED:
            return self.values.dtype
        return torch.float32 if self.bias is None else self.bias.dtype

    def refresh_(self) -> SparseLinear:
        """Forget what was derived from values."""
        self._derived = Derived()
        return self

    def train(self, mode: bool = True) -> SparseLinear:
        """Like Module.train; on the way to eval(), where training may have changed values, what was derived is made again."""
        super().train(mode)
        return self if mode else self._renew()

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        told = rest[-1]  # what load_state_dict raises
        before = len(told)
        super()._load_from_state_dict(state, prefix, *rest)
        if len(told) > before:
            nnzb, r, c = self.values.shape
            told.append(
                f"{prefix or 'layer'}: expected the {nnzb} blocks of {r}x{c} that this SparseLinear holds, got another pattern; "
                "sparse_prune.load_packed(model, file) takes that of a packed file"
            )
        self._renew()

    def _apply(self, fn: Callable, recurse: bool = True) -> SparseLinear:
        scales, values = self._buffers.get("scales"), self.values.data
        super()._apply(fn, recurse)
        # Module.to casts all that is floating-point; a scale rounded to 16 bits would shift its whole row of weights.
        if scales is not None and self.scales.dtype != torch.float32:
            self.scales = scales.to(self.scales.device)
        if scales is not None and self.values.dtype != values.dtype:
            self.values = nn.Parameter(values.to(self.values.device), requires_grad=False)
        return self._renew()

    def _renew(self) -> SparseLinear:
        derived = self._derived.key is not None
        if self.values.is_inference():  # no version tells whether they were written
            self.refresh_()
        if derived:
            self._current(self.values, self.compute_dtype)
        return self

    def forward(self, x: Tensor, activation: Activation = "none", residual: Tensor | None = None) -> Tensor:
        """x [..., K] -> act(x @ W^T + b) + residual, [..., N]."""
        if is_compiling():
            return self._forward_any(x, activation, residual)
        # The short way: at M = 1, and among a model's other data at any M, each step of Python costs like a product.
        ready = self._ready()
        if ready is not None:
            form = ""
            if ready.plan is not None and self.planned:
                tokens = x.numel() // self.in_features
                form = ready.plan.at(tokens).dense if tokens else ""
            if form:
                y = self._run_dense(form, x, activation, residual)
            elif residual is None and activation == "none":
                y = run_ready(x, ready.number)
            else:
                y = run_ready(x, ready.number, ACTIVATION_NUMBERS.get(activation, -1), residual)
            if y is not None:
                return y
        return self._forward_any(x, activation, residual)

    def _ready(self) -> ops.Ready | None:
        """The number by which the C++ kernels know this layer and what goes with it, unless something was replaced since."""
        ready = self._derived.ready
        if ready is None or forward_ad._current_level >= 0:  # ops.forward_mode without its call
            return None
        # Straight to the dicts: nn.Module's attribute lookup costs more than a small product, and there are several of them.
        _, values, version, steps, epoch, crow_indices, col_indices, scales, bias, _, _ = ready
        parameters, buffers = self._parameters, self._buffers
        same = (
            parameters["values"] is values
            and (version is None or values._version + (0 if scales is None else scales._version) == version)
            and (steps == backends.optimizer_steps or not values.requires_grad)
            and parameters["bias"] is bias
            and buffers["crow_indices"] is crow_indices
            and buffers["col_indices"] is col_indices
            and (scales is None or buffers["scales"] is scales)
            and epoch == backends.epoch
        )
        return ready if same else None

    def _make_ready(self, derived: Derived) -> ops.Ready | None:
        """_ready() for the calls to come: made where there is none, or something was replaced; None where it cannot be."""
        if self._ready() is None:
            derived.ready = ops.make_ready(self.packed, derived, self.bias)
        return derived.ready

    def _run_dense(self, form: str, x: Tensor, activation: Activation, residual: Tensor | None) -> Tensor | None:
        """The dense product in that form, or None where the long way has to make its weight, or to say what is wrong."""
        grads = torch.is_grad_enabled()
        form = "plain" if grads else form
        weight, shape, bias = self._derived.dense.get(form), x.shape, self._parameters["bias"]
        if (
            weight is None
            or not x.is_cpu
            or x.dtype is not weight.dtype
            or not shape
            or shape[-1] != self.in_features
            or torch.is_autocast_enabled("cpu")
            or torch._C._are_functorch_transforms_active()
            or (grads and ops.owes_gradient(x, self._parameters["values"], bias, residual))
        ):
            return None
        if residual is not None and residual.shape != (*shape[:-1], self.out_features):
            return None
        return ops.dense_linear(weight, form, x, bias, activation, residual)

    def _run_below_autograd(
        self, derived: Derived, x: Tensor, activation: Activation, residual: Tensor | None
    ) -> Tensor | None:
        """The kernel on rows x[M, K], past torch.library's autograd in Python, or None where that has to run."""
        if ops.owes_gradient(x, self.values, self.bias, residual):
            return None
        ready = self._make_ready(derived)
        if ready is None:
            return None
        return run_ready(x, ready.number, ACTIVATION_NUMBERS.get(activation, -1), residual, True)

    def _forward_any(self, x: Tensor, activation: Activation, residual: Tensor | None) -> Tensor:
        parameters, buffers = self._parameters, self._buffers
        own, bias = parameters["values"], parameters["bias"]
        values, device = own, own.device.type
        # As for nn.Linear, float64 is not cast.
        if device != "meta" and torch.is_autocast_enabled(device) and torch.float64 not in (x.dtype, own.dtype):
            dtype = torch.get_autocast_dtype(device)
            x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
            values = own if own.dtype in QUANTIZED else own.to(dtype)
            residual = None if residual is None else residual.to(dtype)
        other = residual is not None and residual.numel() * self.in_features != x.numel() * self.out_features
        if other or activation not in ACTIVATION_NUMBERS:
            self._explain(x, values, bias, activation, residual)
        if own.dtype in QUANTIZED:
            return self._forward_quantized(x, bias, activation, residual)
        shape = x.shape
        if shape[-1:] != (self.in_features,) or x.dtype != values.dtype or x.device != values.device:
            self._explain(x, values, bias, activation, residual)
        compiling = torch.compiler.is_compiling()
        tracing = not compiling and is_tracing()
        changing = values is not own or (
            own.requires_grad and torch.is_grad_enabled() and (self.training or not tracing)
        )
        if residual is not None:
            residual = residual.reshape(-1, self.out_features).contiguous()
        x, prepacked, y = flatten_rows(x), None, None
        in_graph = compiling or tracing
        if not in_graph and torch._C._are_functorch_transforms_active():
            bsr = (self.crow_indices, self.col_indices, values)
            y = reference.bsr_linear(x, *bsr, self.out_features, bias, activation, residual)
        # In training a compiled graph would keep the values that it was traced with.
        elif not changing and not (in_graph and self.training):
            derived = self._current(own, own.dtype)
            # A compiled graph serves every M, so it holds the sparse operator; sparsify_(tokens=...) decides before it is made.
            if self.planned and not in_graph:
                form = ops.dense_form(derived, x.shape[0])
                if form:
                    weight = ops.dense_weight(derived, form, lambda: self.packed.to_dense())
                    self._make_ready(derived)
                    y = ops.dense_linear(weight, form, x, bias, activation, residual)
                    return y if len(shape) == 2 else y.view(*shape[:-1], self.out_features)
            prepacked = derived.prepacked
            y = None if in_graph else self._run_below_autograd(derived, x, activation, residual)
        if y is None:
            y = torch.ops.sparse_prune.bsr_linear(
                x,
                buffers["crow_indices"],
                buffers["col_indices"],
                values,
                prepacked,
                self.out_features,
                bias,
                activation,
                residual,
            )
        return y if len(shape) == 2 else y.view(*shape[:-1], self.out_features)

    def _forward_quantized(
        self, x: Tensor, bias: Tensor | None, activation: Activation, residual: Tensor | None
    ) -> Tensor:
        values, shape, weight_only = self.values, x.shape, self._weight_only
        wrong_dtype = x.dtype not in QUANTIZED_INPUTS or (bias is not None and bias.dtype != x.dtype)
        if shape[-1:] != (self.in_features,) or x.device != values.device or wrong_dtype:
            self._explain(x, values, bias, activation, residual)
        # In training a compiled graph would keep the values that it was traced with.
        derived = None if torch.compiler.is_compiling() and self.training else self._current(values, x.dtype)
        if residual is not None:
            residual = residual.reshape(-1, self.out_features).contiguous()
        x, y = flatten_rows(x), None
        if derived is not None and not (torch.compiler.is_compiling() or is_tracing()):
            y = self._run_below_autograd(derived, x, activation, residual)
        if y is None:
            operator = getattr(torch.ops.sparse_prune, quantized_operator(values, weight_only))
            bsr = (self.crow_indices, self.col_indices, values, self.scales)
            prepacked = None if derived is None else derived.prepacked
            rest = (bias, activation, residual) if weight_only else (bias, activation, residual, self._x_scale)
            y = operator(x, *bsr, prepacked, self.out_features, *rest)
        return y if len(shape) == 2 else y.view(*shape[:-1], self.out_features)

    def _current(self, values: Tensor, dtype: torch.dtype) -> Derived:
        """What is derived from the present values for x of that dtype; under torch.compile what an earlier call left."""
        if torch.compiler.is_compiling():
            if torch.compiler.is_dynamo_compiling():
                self._derive(dtype)
        elif self._derived.key != ops.derived_key(values, self._buffers.get("scales"), self._weight_only, dtype):
            tracing = torch._C._get_tracing_state()  # what is derived belongs to the graph, how it is made does not
            torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
            try:
                self._derived = ops.current(self._derived, self.packed, dtype)
            finally:
                torch._C._set_tracing_state(tracing)  # type: ignore[attr-defined]
        return self._derived

    def _derive(self, dtype: torch.dtype) -> bool:
        """While torch.compile traces, derive for real what the code will read; torch.export keeps what an earlier call left."""
        prepacked = self._derived.prepacked
        dequantizes = ops.runs_dequantized(self.values.device, self.values.dtype, self._weight_only)
        if self._derived.key is None or (dequantizes and prepacked is not None and prepacked.dtype != dtype):
            self._derived = ops.current(self._derived, self.packed, dtype)
        return True

    # torch.compiler.assume_constant_result, without the second that it takes to import torch._dynamo. A method, since a function's
    # argument would have to be a constant too for torch 2.10.
    _derive._dynamo_marked_constant = True  # type: ignore[attr-defined]  # a mark on a function

    def backend_for(self, tokens: int) -> str:
        """What a call without gradients runs for M = tokens: "cpu:ISA", "cpu:dequantized", "cuda", "triton", "reference", or
        "dense: why"; see sp.backend_for.
        """
        values, shape = self.values, (self.out_features, self.in_features)
        density = block_density(values.shape[0], shape, self.blocksize)
        found = ops.backend_for(
            values.device, values.dtype, "auto", self.blocksize, density, tokens, shape, self._weight_only
        )
        if self.planned or not found.startswith("dense"):
            return found
        if values.is_cuda:
            return (
                planner.gpu_kernel(values.device, values.dtype, self.blocksize, density, shape, tokens) or "reference"
            )
        return ops.backend_for(values.device, values.dtype, "auto", self.blocksize)

    def _explain(
        self, x: Tensor, values: Tensor, bias: Tensor | None, activation: Activation, residual: Tensor | None
    ) -> None:
        packed = dataclasses.replace(self.packed, values=values)
        bsr_linear(x, packed, bias, activation, residual)

    def extra_repr(self) -> str:
        """What print(layer) shows between the brackets."""
        r, c = self.blocksize
        quantized = f", {dtype_name(self.values.dtype)}" if "scales" in self._buffers else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, blocksize={r}x{c}, density={self.density:.3f}, "
            f"bias={self.bias is not None}{quantized}{', weight_only' if self._weight_only else ''}"
            f"{'' if self._x_scale is None else f', x_scale={self._x_scale:.3g}'}"
        )


def fused_linear(
    module: nn.Module, x: Tensor, activation: Activation = "none", residual: Tensor | None = None
) -> Tensor:
    """act(module(x)) + residual, in one kernel where module is a SparseLinear and step by step where it is an nn.Linear.

    x [..., K] and residual [..., N] give [..., N], all of the layer's dtype. Raises SparsePruneError for an unknown activation.
    """
    if isinstance(module, SparseLinear):
        return module(x, activation, residual)
    ops.check_activation(activation)
    y = ACTIVATIONS[activation](module(x))
    return y if residual is None else y + residual


def fused_glu(gate: nn.Module, up: nn.Module, x: Tensor, activation: Activation = "silu") -> Tensor:
    """act(gate(x)) * up(x), x [..., K] -> [..., N]: in one kernel where that pays, else step by step.

    It does for two SparseLinear of one dtype with equally high blocks (int8: of one size), in calls on a CPU that owe no
    gradient, unless the planner runs either dense; not in the first call, which derives what later ones use. On a GPU, without
    gradients or autocast, gate's kernel multiplies by up's product (bsr_linear_glu, which has gradients too).
    """
    if type(gate) is SparseLinear and type(up) is SparseLinear and not is_compiling():
        if x.is_cuda and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cuda"):
            weights = gate.packed, up.packed
            for layer, packed in zip((gate, up), weights, strict=True):
                packed.derived = layer._current(layer.values, layer.compute_dtype)
            return ops.bsr_linear_glu(x, *weights, gate.bias, up.bias, activation)
        of_gate, of_up = gate._ready(), up._ready()
        if of_gate is not None and of_up is not None:
            plans = [layer._derived for layer, of in ((gate, of_gate), (up, of_up)) if of.plan and layer.planned]
            if not any(ops.dense_form(of, x.numel() // gate.in_features) for of in plans):
                y = run_glu_ready(x, of_gate.number, of_up.number, ACTIVATION_NUMBERS.get(activation, -1))
                if y is not None:
                    return y
    return fused_linear(gate, x, activation) * up(x)
