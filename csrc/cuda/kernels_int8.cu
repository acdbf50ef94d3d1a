// Kernels for weights and x of int8: their names are in w8a8.cuh.
#include "w8a8.cuh"

using namespace sparse_prune;
using namespace sparse_prune::device;

ALL(int8, Int8Pair, bf16, __nv_bfloat16)
ALL(int8, Int8Pair, f16, __half)

namespace {
const LinearKernel kKernels[] = {ENTRIES(int8, bf16, true) ENTRIES(int8, f16, false)};
}

const void* sparse_prune::int8_kernel(bool bfloat16, bool skinny, int tokens, int row_or_units, int inputs) {
  return find(kKernels, bfloat16, skinny, tokens, row_or_units, inputs);
}
