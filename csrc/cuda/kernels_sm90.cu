// The kernels of bsr_linear_sm90.cuh that are built. Names: bsr_linear_sm90_{type}_{tokens of a tile}_{inputs of a step}.
#include "bsr_linear_sm90.cuh"

#define KERNEL(NAME, TYPE, TOKENS, STEP)                                                                                  \
  extern "C" __global__ void __launch_bounds__(sparse_prune::sm90::THREADS, 1)                                            \
      bsr_linear_sm90_##NAME##_##TOKENS##_##STEP(SPARSE_PRUNE_SM90_PARAMETERS) {                                          \
    sparse_prune::sm90::bsr_linear<TYPE, TOKENS, STEP>(&x_map, SPARSE_PRUNE_SM90_ARGUMENTS);                              \
  }
#define KERNELS(NAME, TYPE) \
  KERNEL(NAME, TYPE, 256, 64) KERNEL(NAME, TYPE, 256, 32) KERNEL(NAME, TYPE, 256, 16) \
  KERNEL(NAME, TYPE, 128, 64) KERNEL(NAME, TYPE, 128, 32) KERNEL(NAME, TYPE, 128, 16)

KERNELS(bf16, __nv_bfloat16)
KERNELS(f16, __half)
