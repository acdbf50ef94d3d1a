// What the launches share, on the host. For .cu files: needs CUDA's headers.
#pragma once

#include <cuda_runtime.h>

namespace sparse_prune {

inline const char* told(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

constexpr const char* kTooLarge = "a size that int32 cannot number";

// A kernel of the sm_80 family, and what it was compiled for: outputs of a row and inputs that it has or lacks together, or units of a
// skinny block and nothing.
struct LinearKernel {
  bool bfloat16, skinny;
  int tokens, row_or_units, inputs;
  const void* function;
};

// The function of that kernel in a table, or null.
template <int kCount>
const void* find(const LinearKernel (&kernels)[kCount], bool bfloat16, bool skinny, int tokens, int row_or_units, int inputs) {
  for (const LinearKernel& k : kernels)
    if (k.bfloat16 == bfloat16 && k.skinny == skinny && k.tokens == tokens && k.row_or_units == row_or_units && k.inputs == inputs)
      return k.function;
  return nullptr;
}

}  // namespace sparse_prune
