// Kernels for weights and x of float8_e4m3fn, from compute capability 8.9 on: their names are in w8a8.cuh.
#include "w8a8.cuh"

using namespace sparse_prune;
using namespace sparse_prune::device;

ALL(e4m3, E4m3Pair, bf16, __nv_bfloat16)
ALL(e4m3, E4m3Pair, f16, __half)

namespace {
const LinearKernel kKernels[] = {ENTRIES(e4m3, bf16, true) ENTRIES(e4m3, f16, false)};
}

const void* sparse_prune::e4m3_kernel(bool bfloat16, bool skinny, int tokens, int row_or_units, int inputs) {
  return find(kKernels, bfloat16, skinny, tokens, row_or_units, inputs);
}
