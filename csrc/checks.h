// What every file that registers operators shares: checks with words for the user, and torch's threads for the kernels.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <string>

#include "cpu/dispatch.h"

namespace sp = sparse_prune;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

inline std::string shape_of(const Tensor& t) {
  std::string text = "[";
  for (int64_t d = 0; d < t.dim(); ++d) text += (d ? ", " : "") + std::to_string(t.size(d));
  return text + "]";
}

inline sp::DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return sp::DType::f32;
    case ScalarType::BFloat16:
      return sp::DType::bf16;
    case ScalarType::Half:
      return sp::DType::f16;
    case ScalarType::Double:
      return sp::DType::f64;
    default:
      STD_TORCH_CHECK(false, name, ": expected dtype float32, bfloat16, float16 or float64, got ",
                      torch::headeronly::toString(t.scalar_type()));
  }
}

inline void check_shape(const Tensor& t, const char* name, std::initializer_list<int64_t> expected) {
  bool same = t.dim() == static_cast<int64_t>(expected.size());
  int64_t d = 0;
  for (int64_t size : expected) same = same && t.size(d++) == size;
  if (same) return;  // no call pays for words that are not needed
  std::string text;
  for (int64_t size : expected) text += (text.empty() ? "" : ", ") + std::to_string(size);
  STD_TORCH_CHECK(false, name, ": expected shape [", text, "], got ", shape_of(t));
}

inline void check_matrix(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2, name, ": expected a matrix, got shape ", shape_of(t));
}

inline void check_like(const Tensor& t, const char* name, const Tensor& other, const char* other_name) {
  STD_TORCH_CHECK(t.is_cpu(), name, ": expected a CPU tensor, got one on another device");
  STD_TORCH_CHECK(t.scalar_type() == other.scalar_type(), name, ": expected dtype ", torch::headeronly::toString(other.scalar_type()),
                  " like ", other_name, ", got ", torch::headeronly::toString(t.scalar_type()));
}

// Where an operand that may be left out lies, null without one: checked, and made contiguous in its place.
inline const void* operand(std::optional<Tensor>& t, const char* name, const Tensor& like, const char* like_name,
                           std::initializer_list<int64_t> shape) {
  if (!t) return nullptr;
  check_like(*t, name, like, like_name);
  check_shape(*t, name, shape);
  t = torch::stable::contiguous(*t);
  return t->const_data_ptr();
}

// Unit inner stride and rows that do not overlap; anything else is copied.
inline Tensor with_dense_rows(const Tensor& t) {
  const bool dense = t.size(1) <= 1 || t.stride(1) == 1;
  const bool apart = t.size(0) <= 1 || t.stride(0) >= t.size(1);
  return dense && apart ? t : torch::stable::contiguous(t);
}

inline int64_t row_stride(const Tensor& t) { return t.size(0) > 1 ? t.stride(0) : t.size(1); }

// A new contiguous CPU tensor of the dtype of `like`. torch::stable::new_empty would look its operator up by name on each call.
inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> sizes) {
  int64_t strides[4], step = 1;
  for (auto d = static_cast<int64_t>(sizes.size()); d-- > 0; step *= std::max<int64_t>(1, sizes.begin()[d])) strides[d] = step;
  int32_t dtype;
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides, dtype,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

constexpr auto kLastActivation = static_cast<int64_t>(sp::Activation::silu);

inline sp::Activation activation_of(const std::string& name) {
  if (name == "none") return sp::Activation::none;
  if (name == "relu") return sp::Activation::relu;
  if (name == "gelu") return sp::Activation::gelu;
  if (name == "gelu_tanh") return sp::Activation::gelu_tanh;
  if (name == "silu") return sp::Activation::silu;
  STD_TORCH_CHECK(false, "activation: expected none, relu, gelu, gelu_tanh or silu, got ", name);
}

inline void parallel(int64_t tasks, void (*body)(void*, int64_t), void* context) {
  torch::stable::parallel_for(0, tasks, 1, [=](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) body(context, t);
  });
}

inline int64_t threads() { return torch::stable::get_num_threads(); }

}  // namespace
