// Registration of the CPU operators, and the checks that keep a kernel inside its arrays. The schemas of bsr_linear, bsr_linear_dx and
// bsr_sdd are defined in Python (sparse_prune/ops.py); here are their CPU implementations.
#include <algorithm>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "checks.h"
#include "cpu/roofline.h"

namespace {

struct Index {
  const int32_t* crow;
  const int32_t* col;
  int64_t nnzb;
};

// What a weight's tensors are called in messages.
struct Names {
  const char *crow = "crow_indices", *col = "col_indices", *values = "values", *prepacked = "prepacked", *bias = "bias";
};
constexpr Names kOnly = {};
constexpr Names kGate = {"gate_crow_indices", "gate_col_indices", "gate_values", "gate_prepacked", "gate_bias"};
constexpr Names kUp = {"up_crow_indices", "up_col_indices", "up_values", "up_prepacked", "up_bias"};

// crow_indices of `rows` block-rows that share nnzb blocks.
const int32_t* checked_crow(const Tensor& crow_indices, int64_t rows, int64_t nnzb, const char* name = kOnly.crow) {
  check_shape(crow_indices, name, {rows + 1});
  const auto* crow = static_cast<const int32_t*>(crow_indices.const_data_ptr());
  // The sign bit of a difference or an entry says what is wrong: no branches, so that vectors do it (see checked_index).
  uint32_t wrong = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const auto here = static_cast<uint32_t>(crow[i]), next = static_cast<uint32_t>(crow[i + 1]);
    wrong |= (next - here) | next;
  }
  STD_TORCH_CHECK(crow[0] == 0 && crow[rows] == nnzb && !(wrong >> 31), name, ": expected entries that rise from 0 to ", nnzb,
                  " (the number of blocks), got others");
  return crow;
}

void check_index_vector(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu(), name, ": expected a CPU tensor, got one on another device");
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int, name, ": expected dtype int32, got ",
                  torch::headeronly::toString(t.scalar_type()));
  STD_TORCH_CHECK(t.dim() == 1 && t.is_contiguous(), name, ": expected a contiguous vector, got shape ", shape_of(t));
}

// Index arrays of a pattern of rows x columns blocks. They may come from a file that nobody validated, or have been written since, so
// every call looks at every entry: a quarter of a microsecond for 3,000 blocks, which no bookkeeping about earlier calls would undercut.
Index checked_index(const Tensor& crow_indices, const Tensor& col_indices, int64_t rows, int64_t columns,
                    const Names& names = kOnly) {
  check_index_vector(crow_indices, names.crow);
  check_index_vector(col_indices, names.col);
  const int64_t nnzb = col_indices.size(0);
  const int32_t* crow = checked_crow(crow_indices, rows, nnzb, names.crow);
  const auto* col = static_cast<const int32_t*>(col_indices.const_data_ptr());
  const auto last = static_cast<uint32_t>(std::min<int64_t>(columns, std::numeric_limits<int32_t>::max()) - 1);
  uint32_t outside = 0;
  for (int64_t e = 0; e < nnzb; ++e) outside |= static_cast<uint32_t>(col[e]) | (last - static_cast<uint32_t>(col[e]));
  STD_TORCH_CHECK(!(outside >> 31), names.col, ": expected entries in [0, ", columns, "), got one outside");
  return {crow, col, nnzb};
}

int64_t blocks_along(int64_t size, int64_t block) { return (size + block - 1) / block; }

void check_values(const Tensor& values, const char* name = kOnly.values) {
  STD_TORCH_CHECK(values.dim() == 3 && values.size(1) > 0 && values.size(2) > 0, name,
                  ": expected shape [nnzb, R, C] with R, C >= 1, got ", shape_of(values));
  STD_TORCH_CHECK(values.is_cpu(), name, ": expected a CPU tensor, got one on another device");
}

Tensor prepacked(const Tensor& values, sp::DType dtype) {
  const Tensor source = torch::stable::contiguous(values);
  const int64_t nnzb = source.size(0), R = source.size(1), C = source.size(2);
  Tensor out = new_tensor(source, {sp::prepacked_elements(dtype, nnzb, R, C)});
  sp::prepack(dtype, source.const_data_ptr(), nnzb, R, C, out.mutable_data_ptr(), threads(), parallel);
  return out;
}

Tensor cpu_prepack(const Tensor& values) {
  check_values(values);
  return prepacked(values, dtype_of(values, "values"));
}

// The part of a product that is x's and the caller's.
sp::LinearArgs product_of(const Tensor& x, int64_t out_features, const std::string& activation) {
  sp::LinearArgs a = {};
  a.dtype = a.out = dtype_of(x, "x");
  a.M = x.size(0), a.N = out_features, a.K = x.size(1);
  STD_TORCH_CHECK(a.N >= 0, "out_features: expected a number from 0, got ", a.N);
  a.x = x.const_data_ptr(), a.ldx = row_stride(x);
  a.activation = activation_of(activation);
  return a;
}

// The part of a product that is its weight's, whose prepacked form is to be kept until it is done.
Tensor set_weight(sp::LinearArgs& a, const Names& names, const Tensor& crow_indices, const Tensor& col_indices, const Tensor& values,
                  const std::optional<Tensor>& packed) {
  a.R = values.size(1), a.C = values.size(2);
  const Index index = checked_index(crow_indices, col_indices, blocks_along(a.N, a.R), blocks_along(a.K, a.C), names);
  check_shape(values, names.values, {index.nnzb, a.R, a.C});
  a.crow = index.crow, a.col = index.col;
  if (packed) {
    check_like(*packed, names.prepacked, values, names.values);
    check_shape(*packed, names.prepacked, {sp::prepacked_elements(a.dtype, index.nnzb, a.R, a.C)});
    STD_TORCH_CHECK(packed->is_contiguous(), names.prepacked, ": expected what cpu_prepack(values) gives, got a strided view");
  }
  const Tensor kept = packed ? *packed : prepacked(values, a.dtype);
  a.w = kept.const_data_ptr();
  return kept;
}

// A new y [M, N] of out_dtype, or without one of the dtype of x; puts it, bias and residual, which have its dtype, into their places.
Tensor set_outputs(sp::LinearArgs& a, const Tensor& x, const std::optional<ScalarType>& out_dtype, std::optional<Tensor>& bias,
                   std::optional<Tensor>& residual, const char* like = "x") {
  const bool converts = out_dtype && *out_dtype != x.scalar_type();
  Tensor y = converts ? torch::stable::new_empty(x, {a.M, a.N}, *out_dtype) : new_tensor(x, {a.M, a.N});
  a.out = dtype_of(y, "out_dtype");
  STD_TORCH_CHECK(!converts || (a.dtype != sp::DType::f64 && a.out != sp::DType::f64),
                  "out_dtype: expected float32, bfloat16 or float16 from one of these, got ", torch::headeronly::toString(*out_dtype),
                  " from ", torch::headeronly::toString(x.scalar_type()));
  a.y = y.mutable_data_ptr();
  a.bias = operand(bias, "bias", y, converts ? "out_dtype" : like, {a.N});
  a.residual = operand(residual, "residual", y, converts ? "out_dtype" : like, {a.M, a.N});
  return y;
}

Tensor bsr_linear(const Tensor& x_any, const Tensor& crow_indices, const Tensor& col_indices, const Tensor& values,
                  std::optional<Tensor> packed, int64_t out_features, std::optional<Tensor> bias, std::string activation,
                  std::optional<Tensor> residual, std::optional<ScalarType> out_dtype) {
  check_values(values);
  check_matrix(x_any, "x");
  check_like(x_any, "x", values, kOnly.values);
  const Tensor x = with_dense_rows(x_any);
  sp::LinearArgs a = product_of(x, out_features, activation);
  const Tensor kept = set_weight(a, kOnly, crow_indices, col_indices, values, packed);
  const Tensor y = set_outputs(a, x, out_dtype, bias, residual, kOnly.values);
  sp::run_linear(a, threads(), parallel);
  return y;
}

// y = act(x @ Wg^T + bg) * (x @ Wu^T + bu)
Tensor bsr_linear_glu(const Tensor& x_any, const Tensor& gate_crow_indices, const Tensor& gate_col_indices, const Tensor& gate_values,
                      std::optional<Tensor> gate_packed, const Tensor& up_crow_indices, const Tensor& up_col_indices,
                      const Tensor& up_values, std::optional<Tensor> up_packed, int64_t out_features, std::optional<Tensor> gate_bias,
                      std::optional<Tensor> up_bias, std::string activation) {
  check_values(gate_values, kGate.values);
  check_values(up_values, kUp.values);
  check_matrix(x_any, "x");
  check_like(x_any, "x", gate_values, kGate.values);
  check_like(up_values, kUp.values, gate_values, kGate.values);
  STD_TORCH_CHECK(up_values.size(1) == gate_values.size(1), "up_values: expected blocks of ", gate_values.size(1),
                  " outputs like gate_values, got ", up_values.size(1));
  const Tensor x = with_dense_rows(x_any);
  sp::LinearArgs gate = product_of(x, out_features, activation), up = product_of(x, out_features, "none");
  const Tensor gate_kept = set_weight(gate, kGate, gate_crow_indices, gate_col_indices, gate_values, gate_packed);
  const Tensor up_kept = set_weight(up, kUp, up_crow_indices, up_col_indices, up_values, up_packed);
  gate.bias = operand(gate_bias, kGate.bias, gate_values, kGate.values, {gate.N});
  up.bias = operand(up_bias, kUp.bias, up_values, kUp.values, {up.N});
  Tensor y = new_tensor(x, {gate.M, gate.N});
  gate.y = up.y = y.mutable_data_ptr();
  sp::run_linear_glu(gate, up, threads(), parallel);
  return y;
}

void check_int8_values(const Tensor& values) {
  check_values(values);
  STD_TORCH_CHECK(values.scalar_type() == ScalarType::Char, "values: expected dtype int8, got ",
                  torch::headeronly::toString(values.scalar_type()));
}

Tensor prepacked_int8(const Tensor& values, const int32_t* crow, int64_t rows) {
  const Tensor source = torch::stable::contiguous(values);
  const int64_t nnzb = source.size(0), R = source.size(1), C = source.size(2);
  Tensor out = new_tensor(source, {sp::int8_prepacked_bytes(nnzb, rows, R, C)});
  const auto* from = static_cast<const int8_t*>(source.const_data_ptr());
  const bool symmetric = sp::prepack_int8(from, crow, rows, R, C, out.mutable_data_ptr(), threads(), parallel);
  STD_TORCH_CHECK(symmetric, "values: expected int8 from -127 to 127, got -128");
  return out;
}

Tensor cpu_prepack_int8(const Tensor& values, const Tensor& crow_indices) {
  check_int8_values(values);
  check_index_vector(crow_indices, "crow_indices");
  STD_TORCH_CHECK(crow_indices.size(0) > 0, "crow_indices: expected at least one entry, got none");
  const int64_t rows = crow_indices.size(0) - 1;
  return prepacked_int8(values, checked_crow(crow_indices, rows, values.size(0)), rows);
}

// What an int8 product keeps of its weight until it is done.
struct Int8Kept {
  Tensor prepacked, scales;
};

// The part of an int8 product that is its weight's; a.N and a.K are set.
Int8Kept set_int8_weight(sp::Int8Args& a, const Tensor& crow_indices, const Tensor& col_indices, const Tensor& values,
                         const Tensor& scales, const std::optional<Tensor>& packed) {
  a.R = values.size(1), a.C = values.size(2);
  const int64_t rows = blocks_along(a.N, a.R);
  const Index index = checked_index(crow_indices, col_indices, rows, blocks_along(a.K, a.C));
  check_shape(values, "values", {index.nnzb, a.R, a.C});
  a.crow = index.crow, a.col = index.col;
  int64_t most = 0;
  for (int64_t i = 0; i < rows; ++i) most = std::max<int64_t>(most, a.crow[i + 1] - a.crow[i]);
  STD_TORCH_CHECK(most * a.C <= sp::kInt8MaxInputs, "crow_indices: expected at most ", sp::kInt8MaxInputs / a.C, " blocks of ", a.C,
                  " inputs in a block-row, since sums are int32, got ", most);
  STD_TORCH_CHECK(scales.is_cpu(), "scales: expected a CPU tensor, got one on another device");
  STD_TORCH_CHECK(scales.scalar_type() == ScalarType::Float, "scales: expected dtype float32, got ",
                  torch::headeronly::toString(scales.scalar_type()));
  check_shape(scales, "scales", {a.N});
  if (packed) {
    check_like(*packed, "prepacked", values, "values");
    check_shape(*packed, "prepacked", {sp::int8_prepacked_bytes(index.nnzb, rows, a.R, a.C)});
    STD_TORCH_CHECK(packed->is_contiguous(), "prepacked: expected what cpu_prepack_int8 gives, got a strided view");
  }
  Int8Kept kept = {packed ? *packed : prepacked_int8(values, index.crow, rows), torch::stable::contiguous(scales)};
  a.w = kept.prepacked.const_data_ptr();
  a.w_scales = static_cast<const float*>(kept.scales.const_data_ptr());
  a.offsets = reinterpret_cast<const int32_t*>(static_cast<const char*>(a.w) + sp::int8_offsets_at(index.nnzb, a.R, a.C));
  return kept;
}

// y = act((round(x / x_scales) @ W^T) * scales * x_scales + bias) + residual, the sums in int32.
Tensor bsr_linear_int8(const Tensor& x_any, const Tensor& crow_indices, const Tensor& col_indices, const Tensor& values,
                       const Tensor& scales, std::optional<Tensor> packed, int64_t out_features, std::optional<Tensor> bias,
                       std::string activation, std::optional<Tensor> residual, std::optional<double> x_scale,
                       std::optional<ScalarType> out_dtype) {
  check_int8_values(values);
  check_matrix(x_any, "x");
  STD_TORCH_CHECK(x_any.is_cpu(), "x: expected a CPU tensor, got one on another device");
  STD_TORCH_CHECK(dtype_of(x_any, "x") != sp::DType::f64,
                  "x: expected dtype float32, bfloat16 or float16 beside int8 values, got Double");
  const Tensor x = with_dense_rows(x_any);
  sp::Int8Args a = {product_of(x, out_features, activation)};
  const Int8Kept kept = set_int8_weight(a, crow_indices, col_indices, values, scales, packed);
  const Tensor y = set_outputs(a, x, out_dtype, bias, residual);
  const float scale = x_scale ? static_cast<float>(*x_scale) : 0.0f;
  STD_TORCH_CHECK(!x_scale || (scale > 0 && scale < std::numeric_limits<float>::infinity()),
                  "x_scale: expected a finite positive number, got ", x_scale.value_or(0));
  sp::run_linear_int8(a, scale, threads(), parallel);
  return y;
}

// A layer whose tensors were checked once, so that a call brings only x: what a call costs is mostly code and data that it finds outside
// the caches, and this is a third of it. Calls still check what a write in place could have spoilt, and refuse where a tensor has moved.
struct Ready {
  Tensor crow, col, values, packed;
  std::optional<Tensor> scales, bias;  // scales: of int8 values
  float x_scale;                       // of int8 values; 0: of each row its own
  sp::Int8Args a;                      // what calls have in common; of int8 values without the dtype
  const void* values_at;
  int64_t nnzb;
};

// Layers by numbers, which a caller may make up, and not by addresses, which it must not: the place in the low half, above it a count
// that tells a layer from its successor there.
struct ReadyLayers {
  std::mutex mutex;
  std::vector<std::shared_ptr<const Ready>> at;
  std::vector<int64_t> number, unused;
  int64_t count = 0;
};

ReadyLayers& ready_layers() {
  static auto* layers = new ReadyLayers;  // never destroyed: Python's layers may go after static objects do
  return *layers;
}

std::shared_ptr<const Ready> ready_layer(int64_t number) {
  ReadyLayers& layers = ready_layers();
  const std::lock_guard<std::mutex> lock(layers.mutex);
  const auto place = static_cast<uint32_t>(number);
  return place < layers.at.size() && layers.number[place] == number ? layers.at[place] : nullptr;
}

// The number of a layer with these tensors, to be given back by sparse_prune_drop_ready.
int64_t cpu_ready(Tensor crow_indices, Tensor col_indices, Tensor values, Tensor packed, std::optional<Tensor> scales,
                  std::optional<Tensor> bias, int64_t out_features, int64_t in_features, std::optional<double> x_scale) {
  check_values(values);
  STD_TORCH_CHECK(out_features >= 0 && in_features >= 0, "out_features, in_features: expected numbers from 0, got ", out_features,
                  " and ", in_features);
  if (scales) scales = torch::stable::contiguous(*scales);
  auto ready = std::make_shared<Ready>(Ready{crow_indices, col_indices, values, packed, scales, bias, static_cast<float>(x_scale.value_or(0))});
  sp::Int8Args& a = ready->a;
  a.N = out_features, a.K = in_features;
  if (scales) {
    check_int8_values(values);
    set_int8_weight(a, crow_indices, col_indices, values, *scales, packed);
  } else {
    a.dtype = dtype_of(values, "values");
    set_weight(a, kOnly, crow_indices, col_indices, values, packed);
  }
  ready->values_at = values.const_data_ptr(), ready->nnzb = col_indices.size(0);
  ReadyLayers& layers = ready_layers();
  const std::lock_guard<std::mutex> lock(layers.mutex);
  if (layers.unused.empty()) {
    layers.unused.push_back(static_cast<int64_t>(layers.at.size()));
    layers.at.emplace_back();
    layers.number.push_back(-1);
  }
  const int64_t place = layers.unused.back();
  layers.unused.pop_back();
  layers.at[place] = std::move(ready);
  return layers.number[place] = layers.count++ << 32 | place;
}

// The part of a product that is the layer's, as it is now; false where the layer has changed.
bool set_ready(sp::Int8Args& a, const Ready& r, const Tensor& x) {
  a = r.a;
  const ScalarType type = x.scalar_type();
  if (r.scales) {
    if (type != ScalarType::Float && type != ScalarType::BFloat16 && type != ScalarType::Half) return false;
    if (r.scales->numel() != a.N) return false;
    a.dtype = dtype_of(x, "x");
    a.w_scales = static_cast<const float*>(r.scales->const_data_ptr());
  } else if (type != r.values.scalar_type()) {
    return false;
  }
  a.out = a.dtype;
  const Index index = checked_index(r.crow, r.col, blocks_along(a.N, a.R), blocks_along(a.K, a.C));
  a.crow = index.crow, a.col = index.col;
  if (r.bias) {
    if (r.bias->scalar_type() != type || r.bias->numel() != a.N || !r.bias->is_contiguous()) return false;
    a.bias = r.bias->const_data_ptr();
  }
  return index.nnzb == r.nnzb && r.values.const_data_ptr() == r.values_at;
}

constexpr int64_t kMostDims = 8;

// The part of a product that is x's; false where its rows are not laid out as the kernels read them.
bool set_rows(sp::LinearArgs& a, const Tensor& x) {
  const int64_t dims = x.dim();
  if (dims < 1 || dims > kMostDims || x.size(dims - 1) != a.K || !x.is_cpu()) return false;
  a.M = 1;
  for (int64_t d = 0; d + 1 < dims; ++d) a.M *= x.size(d);
  a.ldx = dims == 2 ? row_stride(x) : a.K;
  a.x = x.const_data_ptr();
  return dims == 2 ? (a.K <= 1 || x.stride(1) == 1) && a.ldx >= a.K : x.is_contiguous();
}

// A new tensor like x, with a.N in place of its last size.
Tensor new_rows(const Tensor& x, int64_t features) {
  int64_t sizes[kMostDims], strides[kMostDims], step = 1;
  const int64_t dims = x.dim();
  for (int64_t d = dims; d-- > 0; step *= std::max<int64_t>(1, sizes[d])) {
    sizes[d] = d + 1 < dims ? x.size(d) : features;
    strides[d] = step;
  }
  int32_t dtype;
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// y[..., N] = act(x[..., K] @ W^T + b) + residual of a ready layer, or nothing where that is for the long way to do or to refuse in
// words, as where gradients are on, unless the caller knows that none is owed. (Autograd's key falls through to here.)
std::optional<Tensor> cpu_linear_ready(const Tensor& x, int64_t number, int64_t activation, const std::optional<Tensor>& residual,
                                       bool nothing_owed) {
  if (!nothing_owed && aoti_torch_grad_mode_is_enabled()) return std::nullopt;
  const std::shared_ptr<const Ready> layer = ready_layer(number);
  sp::Int8Args a;
  if (!layer || !set_ready(a, *layer, x) || !set_rows(a, x) || activation < 0 || activation > kLastActivation) return std::nullopt;
  a.activation = static_cast<sp::Activation>(activation);
  Tensor y = new_rows(x, a.N);
  if (residual) {
    if (residual->scalar_type() != x.scalar_type() || residual->dim() != y.dim() || !residual->is_contiguous() || !residual->is_cpu())
      return std::nullopt;
    for (int64_t d = 0; d < y.dim(); ++d)
      if (residual->size(d) != y.size(d)) return std::nullopt;
    a.residual = residual->const_data_ptr();
  }
  a.y = y.mutable_data_ptr();
  if (layer->scales) {
    sp::run_linear_int8(a, layer->x_scale, threads(), parallel);
  } else {
    sp::run_linear(a, threads(), parallel);
  }
  return y;
}

// y = act(x @ Wg^T + bg) * (x @ Wu^T + bu) of two ready layers, or nothing, likewise.
std::optional<Tensor> cpu_glu_ready(const Tensor& x, int64_t gate_number, int64_t up_number, int64_t activation) {
  if (aoti_torch_grad_mode_is_enabled()) return std::nullopt;
  const std::shared_ptr<const Ready> gate_layer = ready_layer(gate_number), up_layer = ready_layer(up_number);
  sp::Int8Args gate, up;
  if (!gate_layer || !up_layer || gate_layer->scales.has_value() != up_layer->scales.has_value()) return std::nullopt;
  if (!set_ready(gate, *gate_layer, x) || !set_ready(up, *up_layer, x) || !set_rows(gate, x) || !set_rows(up, x)) return std::nullopt;
  if (gate.N != up.N || gate.R != up.R || activation < 0 || activation > kLastActivation) return std::nullopt;
  gate.activation = static_cast<sp::Activation>(activation);
  Tensor y = new_rows(x, gate.N);
  gate.y = up.y = y.mutable_data_ptr();
  if (gate_layer->scales) {
    // x is rounded once for both, in rows as long as their blocks want.
    if (gate.C != up.C || gate_layer->x_scale != up_layer->x_scale) return std::nullopt;
    sp::run_linear_int8_glu(gate, up, gate_layer->x_scale, threads(), parallel);
  } else {
    sp::run_linear_glu(gate, up, threads(), parallel);
  }
  return y;
}

std::optional<Tensor> no_linear(const Tensor&, int64_t, int64_t, const std::optional<Tensor>&, bool) { return std::nullopt; }
std::optional<Tensor> no_glu(const Tensor&, int64_t, int64_t, int64_t) { return std::nullopt; }

// dx[M, K] = dy[M, N] @ W[N, K]
Tensor bsr_linear_dx(const Tensor& dy_any, const Tensor& crow_indices, const Tensor& col_indices, const Tensor& values,
                     int64_t in_features) {
  check_values(values);
  check_matrix(dy_any, "dy");
  check_like(dy_any, "dy", values, "values");
  const Tensor dy = with_dense_rows(dy_any);
  sp::LinearArgs a = {};
  a.dtype = a.out = dtype_of(dy, "dy");
  a.M = dy.size(0), a.N = in_features, a.K = dy.size(1);
  a.R = values.size(2), a.C = values.size(1);
  STD_TORCH_CHECK(a.N >= 0, "in_features: expected a number from 0, got ", a.N);
  const Index index = checked_index(crow_indices, col_indices, blocks_along(a.K, a.C), blocks_along(a.N, a.R));
  check_shape(values, "values", {index.nnzb, a.C, a.R});
  a.crow = index.crow, a.col = index.col;
  a.x = dy.const_data_ptr(), a.ldx = row_stride(dy);
  const Tensor blocks = torch::stable::contiguous(values);
  a.w = blocks.const_data_ptr();
  Tensor dx = new_tensor(dy, {a.M, a.N});
  a.y = dx.mutable_data_ptr();
  sp::run_linear_dx(a, threads(), parallel);
  return dx;
}

Tensor panels_of(const Tensor& matrix, sp::DType dtype, int64_t block) {
  const ScalarType type = sp::panels_are_float(dtype) ? ScalarType::Float : matrix.scalar_type();
  const int64_t elements = sp::panel_elements(dtype, matrix.size(0), matrix.size(1), block);
  Tensor panels = torch::stable::new_empty(matrix, {elements}, type);
  sp::run_panels({dtype, matrix.size(0), matrix.size(1), block, matrix.const_data_ptr(), row_stride(matrix), panels.mutable_data_ptr()},
                 threads(), parallel);
  return panels;
}

// dvalues[nnzb, R, C]: the stored blocks of dW[N, K] = dy[M, N]^T @ x[M, K].
Tensor bsr_sdd(const Tensor& dy_any, const Tensor& x_any, const Tensor& crow_indices, const Tensor& col_indices, int64_t block_rows,
               int64_t block_cols) {
  check_matrix(dy_any, "dy");
  check_matrix(x_any, "x");
  check_like(x_any, "x", dy_any, "dy");
  check_like(dy_any, "dy", x_any, "x");
  STD_TORCH_CHECK(x_any.size(0) == dy_any.size(0), "x: expected ", dy_any.size(0), " rows like dy, got ", x_any.size(0));
  STD_TORCH_CHECK(block_rows > 0 && block_cols > 0, "block_rows, block_cols: expected numbers from 1, got ", block_rows, " and ",
                  block_cols);
  const Tensor dy = with_dense_rows(dy_any), x = with_dense_rows(x_any);
  sp::SddArgs a = {};
  a.dtype = dtype_of(dy, "dy");
  a.M = dy.size(0), a.N = dy.size(1), a.K = x.size(1);
  a.R = block_rows, a.C = block_cols;
  const Index index = checked_index(crow_indices, col_indices, blocks_along(a.N, a.R), blocks_along(a.K, a.C));
  a.crow = index.crow, a.col = index.col;
  a.dy = dy.const_data_ptr(), a.ld_dy = row_stride(dy);
  const Tensor x_panels = panels_of(x, a.dtype, a.C), dy_panels = sp::sdd_reads_dy(a) ? dy : panels_of(dy, a.dtype, a.R);
  a.x_panels = x_panels.const_data_ptr(), a.dy_panels = dy_panels.const_data_ptr();
  Tensor dvalues = new_tensor(dy, {index.nnzb, a.R, a.C});
  a.dvalues = dvalues.mutable_data_ptr();
  sp::run_sdd(a, threads(), parallel);
  return dvalues;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sparse_prune, m) {
  m.def("cpu_prepack(Tensor values) -> Tensor");
  m.def("cpu_ready(Tensor crow_indices, Tensor col_indices, Tensor values, Tensor prepacked, Tensor? scales, Tensor? bias, "
        "int out_features, int in_features, float? x_scale=None) -> int");
  m.def("cpu_linear_ready(Tensor x, int ready, int activation=0, Tensor? residual=None, bool nothing_owed=False) "
        "-> Tensor?");
  m.def("cpu_glu_ready(Tensor x, int gate, int up, int activation=0) -> Tensor?");
  m.def("cpu_prepack_int8(Tensor values, Tensor crow_indices) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(sparse_prune, CPU, m) {
  m.impl("cpu_prepack", TORCH_BOX(&cpu_prepack));
  m.impl("cpu_ready", TORCH_BOX(&cpu_ready));
  m.impl("cpu_linear_ready", TORCH_BOX(&cpu_linear_ready));
  m.impl("cpu_glu_ready", TORCH_BOX(&cpu_glu_ready));
  m.impl("cpu_prepack_int8", TORCH_BOX(&cpu_prepack_int8));
  m.impl("bsr_linear", TORCH_BOX(&bsr_linear));
  m.impl("bsr_linear_glu", TORCH_BOX(&bsr_linear_glu));
  m.impl("bsr_linear_int8", TORCH_BOX(&bsr_linear_int8));
  m.impl("bsr_linear_dx", TORCH_BOX(&bsr_linear_dx));
  m.impl("bsr_sdd", TORCH_BOX(&bsr_sdd));
}

// Other devices, and whoever has to see what a layer does: autocast, transforms of torch.func, dispatch modes, tracing.
#define SPARSE_PRUNE_REFUSE(key)                             \
  STABLE_TORCH_LIBRARY_IMPL(sparse_prune, key, m) {          \
    m.impl("cpu_linear_ready", TORCH_BOX(&no_linear));       \
    m.impl("cpu_glu_ready", TORCH_BOX(&no_glu));             \
  }
SPARSE_PRUNE_REFUSE(CompositeExplicitAutograd)
SPARSE_PRUNE_REFUSE(AutocastCPU)
SPARSE_PRUNE_REFUSE(FuncTorchDynamicLayerFrontMode)
SPARSE_PRUNE_REFUSE(Functionalize)
SPARSE_PRUNE_REFUSE(Python)
SPARSE_PRUNE_REFUSE(Tracer)

// For sparse_prune/backends.py, through ctypes.
#define SPARSE_PRUNE_EXPORT extern "C" __attribute__((visibility("default")))

SPARSE_PRUNE_EXPORT const char* sparse_prune_cpu_isas() {
  static const std::string names = sp::available_isas();
  return names.c_str();
}

SPARSE_PRUNE_EXPORT int sparse_prune_force_isa(const char* name) { return sp::force_isa(name); }

// dtype of the weight: 0 float32, 1 bfloat16, 2 float16, 3 float64, 4 int8
SPARSE_PRUNE_EXPORT const char* sparse_prune_cpu_isa(int dtype) {
  return dtype == 4 ? sp::int8_kernels().name : sp::kernels_for(static_cast<sp::DType>(dtype)).name;
}

SPARSE_PRUNE_EXPORT double sparse_prune_peak_flops(const char* isa) { return sp::peak_flops(isa); }

SPARSE_PRUNE_EXPORT double sparse_prune_read_bytes_per_second(const char* isa, const void* data, int64_t bytes) {
  return sp::read_bytes_per_second(isa, data, bytes);
}

SPARSE_PRUNE_EXPORT void sparse_prune_drop_ready(int64_t number) {
  std::shared_ptr<const Ready> dropped;  // its tensors go after the lock does
  ReadyLayers& layers = ready_layers();
  const std::lock_guard<std::mutex> lock(layers.mutex);
  const auto place = static_cast<uint32_t>(number);
  if (place >= layers.at.size() || layers.number[place] != number) return;
  dropped = std::move(layers.at[place]);
  layers.number[place] = -1;
  layers.unused.push_back(place);
}
