// The CPU implementations of attention and layer_norm; their schemas are defined in Python (sparse_prune/ops.py).
#include <array>
#include <optional>

#include "checks.h"

namespace {

// [B, T, heads, d] with features side by side; anything else is copied.
Tensor with_dense_features(const Tensor& t) { return t.size(3) <= 1 || t.stride(3) == 1 ? t : torch::stable::contiguous(t); }

// mask as it broadcasts to [B, heads, T, T]. Its keys lie side by side; `held` owns the copy where one had to be made.
sp::Broadcast broadcast(const std::optional<Tensor>& mask, const char* name, const sp::AttentionArgs& a, Tensor& held) {
  if (!mask) return {};
  const bool fits = mask->dim() == 4 && (mask->size(0) == 1 || mask->size(0) == a.B) && (mask->size(1) == 1 || mask->size(1) == a.heads) &&
                    (mask->size(2) == 1 || mask->size(2) == a.T) && mask->size(3) == a.T;
  STD_TORCH_CHECK(fits, name, ": expected a shape that broadcasts to [", a.B, ", ", a.heads, ", ", a.T, ", ", a.T, "] with ", a.T,
                  " keys, got ", shape_of(*mask));
  held = a.T <= 1 || mask->stride(3) == 1 ? *mask : torch::stable::contiguous(*mask);
  std::array<int64_t, 3> strides;
  for (int d = 0; d < 3; ++d) strides[d] = held.size(d) == 1 ? 0 : held.stride(d);
  return {held.const_data_ptr(), strides[0], strides[1], strides[2]};
}

Tensor attention(const Tensor& q_any, const Tensor& k_any, const Tensor& v_any, double scale, std::optional<Tensor> bias,
                 std::optional<Tensor> keep) {
  STD_TORCH_CHECK(q_any.dim() == 4, "q: expected shape [B, T, heads, d], got ", shape_of(q_any));
  const std::initializer_list<int64_t> shape = {q_any.size(0), q_any.size(1), q_any.size(2), q_any.size(3)};
  check_shape(k_any, "k", shape);
  check_shape(v_any, "v", shape);
  check_like(k_any, "k", q_any, "q");
  check_like(v_any, "v", q_any, "q");
  const Tensor q = with_dense_features(q_any), k = with_dense_features(k_any), v = with_dense_features(v_any);
  sp::AttentionArgs a = {};
  a.dtype = dtype_of(q, "q");
  a.B = q.size(0), a.T = q.size(1), a.heads = q.size(2), a.d = q.size(3);
  a.q = q.const_data_ptr(), a.q_batch = q.stride(0), a.q_token = q.stride(1), a.q_head = q.stride(2);
  a.k = k.const_data_ptr(), a.k_batch = k.stride(0), a.k_token = k.stride(1), a.k_head = k.stride(2);
  a.v = v.const_data_ptr(), a.v_batch = v.stride(0), a.v_token = v.stride(1), a.v_head = v.stride(2);
  a.scale = scale;
  Tensor held_bias = q, held_keep = q;
  if (bias) check_like(*bias, "bias", q, "q");
  a.bias = broadcast(bias, "bias", a, held_bias);
  if (keep) {
    STD_TORCH_CHECK(keep->is_cpu() && keep->scalar_type() == ScalarType::Bool, "keep: expected a bool CPU tensor, got ",
                    torch::headeronly::toString(keep->scalar_type()));
  }
  a.keep = broadcast(keep, "keep", a, held_keep);
  Tensor out = new_tensor(q, {a.B, a.T, a.heads, a.d});
  a.out = out.mutable_data_ptr();
  sp::run_attention(a, threads(), parallel);
  return out;
}

Tensor layer_norm(const Tensor& x_any, std::optional<Tensor> weight, std::optional<Tensor> bias, double eps,
                  std::optional<Tensor> residual) {
  check_matrix(x_any, "x");
  const Tensor x = with_dense_rows(x_any);
  sp::NormArgs a = {};
  a.dtype = dtype_of(x, "x");
  a.M = x.size(0), a.H = x.size(1);
  a.x = x.const_data_ptr(), a.ldx = row_stride(x);
  a.eps = eps;
  a.weight = operand(weight, "weight", x, "x", {a.H});
  a.bias = operand(bias, "bias", x, "x", {a.H});
  a.residual = operand(residual, "residual", x, "x", {a.M, a.H});
  Tensor y = new_tensor(x, {a.M, a.H});
  a.y = y.mutable_data_ptr();
  sp::run_layer_norm(a, threads(), parallel);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparse_prune, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("layer_norm", TORCH_BOX(&layer_norm));
}
