// The kernels of the sm_80 family, by name: bsr_linear_sm80_{bf16,f16}_{16,32,64}_{128,256} (row, tokens of a block).
#include "bsr_linear_sm80.cuh"

using namespace sparse_prune;
using namespace sparse_prune::device;

#define LINEAR(NAME, T, ROW, TOKEN_TILES)                                                                                          \
  extern "C" __global__ void __launch_bounds__(256, TOKEN_TILES == 4 ? 1 : 2)                                                      \
      bsr_linear_sm80_##NAME(const T* x, const uint4* weights, const Tile* tiles, const Step* steps, const T* bias,                \
                             const T* residual, T* y, int M, int N, int K, int64_t ldx, int tile_count, int activation, int vector) { \
    const Epilogue<T> epilogue{bias, residual, y, M, N, activation, vector != 0};                                                  \
    bsr_linear_sm80<T, ROW, TOKEN_TILES>(x, weights, tiles, steps, epilogue, M, K, ldx, tile_count);                               \
  }
#define LINEARS(TYPE, T)                 \
  LINEAR(TYPE##_16_128, T, 16, 2)        \
  LINEAR(TYPE##_16_256, T, 16, 4)        \
  LINEAR(TYPE##_32_128, T, 32, 2)        \
  LINEAR(TYPE##_32_256, T, 32, 4)        \
  LINEAR(TYPE##_64_128, T, 64, 2)        \
  LINEAR(TYPE##_64_256, T, 64, 4)

LINEARS(bf16, __nv_bfloat16)
LINEARS(f16, __half)
