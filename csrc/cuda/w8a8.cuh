// The kernels of the sm_80 family for weights and x of 8 bits, and what rounds x: kernels_int8.cu and kernels_e4m3.cu make them.
//   bsr_linear_sm80_KIND_{bf16,f16}_{16x16,32x16,32x32}_{128,256}, bsr_linear_skinny_KIND_{bf16,f16}_{16_1,64_1,64_2}
//   quantize_rows_KIND_{bf16,f16}
// What they take beside the names is as in kernels_sm80.cu. Those of 256 tokens are empty where kTakenApart, and not launched.
#pragma once

#include <float.h>

#include "bsr_linear_skinny.cuh"
#include "bsr_linear_sm80.cuh"
#include "launch.h"
#include "runtime.h"

namespace sparse_prune::device {

__device__ __forceinline__ float largest(Int8Pair) { return 127.0f; }
__device__ __forceinline__ float largest(E4m3Pair) { return 448.0f; }
// Two numbers of at most that size, rounded half to even.
__device__ __forceinline__ uint32_t pair_of(float low, float high, Int8Pair) {
  return (__float2int_rn(low) & 0xff) | (__float2int_rn(high) & 0xff) << 8;
}
__device__ __forceinline__ uint32_t pair_of(float low, float high, E4m3Pair) {
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
}

// q[M, ldq] and scales[M] with x[m, k] ~ scales[m] * q[m, k], as reference.quantize_rows says; zeros behind the K-th. x_scale 0: each
// row's own. A block makes a row; ldq is a multiple of 16, and rows of x begin at multiples of 16 bytes.
template <class Pair, typename T>
__device__ __forceinline__ void quantize_rows(const T* __restrict__ x, uint8_t* __restrict__ q, float* __restrict__ scales, int K,
                                              int64_t ldx, int64_t ldq, float x_scale) {
  constexpr int kThreads = 128;
  __shared__ uint32_t highest_of[kThreads / 32];
  const T* row = x + blockIdx.x * ldx;
  auto load = [&](float (&v)[8], int k) {
    if (k + 8 <= K) {
      const uint4 loaded = *reinterpret_cast<const uint4*>(row + k);
      const T* values = reinterpret_cast<const T*>(&loaded);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = to_float(values[i]);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = k + i < K ? to_float(row[k + i]) : 0.0f;
    }
  };

  uint32_t highest = 0;  // bits of |x|: in this order NaN stands above infinity, and that above numbers
  for (int k = threadIdx.x * 8; k < K; k += kThreads * 8) {
    float v[8];
    load(v, k);
#pragma unroll
    for (int i = 0; i < 8; ++i) highest = max(highest, __float_as_uint(v[i]) & 0x7fffffffu);
  }
#pragma unroll
  for (int apart = 16; apart > 0; apart /= 2) highest = max(highest, __shfl_xor_sync(~0u, highest, apart));
  if (threadIdx.x % 32 == 0) highest_of[threadIdx.x / 32] = highest;
  __syncthreads();
  for (int warp = 0; warp < kThreads / 32; ++warp) highest = max(highest, highest_of[warp]);

  const bool finite = highest < 0x7f800000u;
  const float scale = x_scale > 0.0f ? x_scale : fmaxf(__uint_as_float(highest) / largest(Pair()), FLT_MIN);
  const float inverse = finite ? 1.0f / scale : 0.0f;
  if (threadIdx.x == 0) scales[blockIdx.x] = finite ? scale : __uint_as_float(0x7fffffffu);
  for (int64_t k = threadIdx.x * 8; k < ldq; k += kThreads * 8) {
    float v[8];
    load(v, static_cast<int>(k));
    uint32_t out[2] = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = finite ? fminf(fmaxf(v[i] * inverse, -largest(Pair())), largest(Pair())) : 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i / 2] |= pair_of(v[2 * i], v[2 * i + 1], Pair()) << (16 * (i % 2));
    *reinterpret_cast<uint2*>(q + blockIdx.x * ldq + k) = make_uint2(out[0], out[1]);
  }
}

}  // namespace sparse_prune::device

#define LINEAR(KIND, PAIR, NAME, T, ROW, INPUTS, BLOCK_M)                                                                          \
  extern "C" __global__ void __launch_bounds__(256, BLOCK_M == 256 || kTakenApart<PAIR> ? 1 : 2)                                   \
      bsr_linear_sm80_##KIND##_##NAME##_##ROW##x##INPUTS##_##BLOCK_M(                                                              \
          const PAIR* x, const uint4* weights, const Tile* tiles, const Step* steps, const T* bias, const T* residual, T* y,       \
          int M, int N, int K, int64_t ldx, int tile_count, int tall, int whole, int ragged, int activation, int vector,           \
          const float* x_scales, const float* scales) {                                                                            \
    const ScaledEpilogue<T> epilogue{{bias, residual, y, M, N, activation, vector != 0}, x_scales, scales};                        \
    if constexpr (!(kTakenApart<PAIR> && BLOCK_M == 256))                                                                          \
      bsr_linear_sm80<PAIR, ROW, INPUTS / 16, BLOCK_M / 64>(x, weights, tiles, steps, epilogue, M, K, ldx, tile_count, tall,       \
                                                            whole, ragged);                                                        \
  }
#define SKINNY(KIND, PAIR, NAME, T, TOKENS, UNITS)                                                                                 \
  extern "C" __global__ void __launch_bounds__(TOKENS == 16 ? 512 : 256, TOKENS == 16 ? 1 : 2)                                    \
      bsr_linear_skinny_##KIND##_##NAME##_##TOKENS##_##UNITS(                                                                     \
          const PAIR* x, const uint4* weights, const int* starts, const Piece* pieces, const T* bias, const T* residual, T* y,    \
          int M, int N, int K, int64_t ldx, int row_units, int order, int activation, int vector, const float* x_scales,          \
          const float* scales) {                                                                                                  \
    const ScaledEpilogue<T> epilogue{{bias, residual, y, M, N, activation, vector != 0}, x_scales, scales};                        \
    bsr_linear_skinny<PAIR, TOKENS / 8, UNITS>(x, weights, starts, pieces, epilogue, M, K, ldx, row_units, order);                 \
  }
#define QUANTIZE(KIND, PAIR, NAME, T)                                                                                              \
  extern "C" __global__ void __launch_bounds__(128) quantize_rows_##KIND##_##NAME(                                                 \
      const T* x, uint8_t* q, float* scales, int K, int64_t ldx, int64_t ldq, float x_scale) {                                     \
    quantize_rows<PAIR>(x, q, scales, K, ldx, ldq, x_scale);                                                                       \
  }
#define ALL(KIND, PAIR, NAME, T)                                                                                  \
  LINEAR(KIND, PAIR, NAME, T, 16, 16, 128) LINEAR(KIND, PAIR, NAME, T, 32, 16, 128)                               \
  LINEAR(KIND, PAIR, NAME, T, 32, 32, 128) LINEAR(KIND, PAIR, NAME, T, 16, 16, 256)                               \
  LINEAR(KIND, PAIR, NAME, T, 32, 16, 256) LINEAR(KIND, PAIR, NAME, T, 32, 32, 256)                               \
  SKINNY(KIND, PAIR, NAME, T, 16, 1) SKINNY(KIND, PAIR, NAME, T, 64, 1) SKINNY(KIND, PAIR, NAME, T, 64, 2)        \
  QUANTIZE(KIND, PAIR, NAME, T)

#define LINEAR_ENTRY(KIND, NAME, BF16, ROW, INPUTS, TOKENS) \
  {BF16, false, TOKENS, ROW, INPUTS, reinterpret_cast<const void*>(bsr_linear_sm80_##KIND##_##NAME##_##ROW##x##INPUTS##_##TOKENS)},
#define SKINNY_ENTRY(KIND, NAME, BF16, TOKENS, UNITS) \
  {BF16, true, TOKENS, UNITS, 0, reinterpret_cast<const void*>(bsr_linear_skinny_##KIND##_##NAME##_##TOKENS##_##UNITS)},
#define QUANTIZE_ENTRY(KIND, NAME, BF16) {BF16, false, 0, 0, 0, reinterpret_cast<const void*>(quantize_rows_##KIND##_##NAME)},
#define ENTRIES(KIND, NAME, BF16)                                                                                             \
  LINEAR_ENTRY(KIND, NAME, BF16, 16, 16, 128) LINEAR_ENTRY(KIND, NAME, BF16, 32, 16, 128)                                     \
  LINEAR_ENTRY(KIND, NAME, BF16, 32, 32, 128) LINEAR_ENTRY(KIND, NAME, BF16, 16, 16, 256)                                     \
  LINEAR_ENTRY(KIND, NAME, BF16, 32, 16, 256) LINEAR_ENTRY(KIND, NAME, BF16, 32, 32, 256)                                     \
  SKINNY_ENTRY(KIND, NAME, BF16, 16, 1) SKINNY_ENTRY(KIND, NAME, BF16, 64, 1) SKINNY_ENTRY(KIND, NAME, BF16, 64, 2)           \
  QUANTIZE_ENTRY(KIND, NAME, BF16)
