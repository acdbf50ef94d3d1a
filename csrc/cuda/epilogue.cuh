// What happens to sums before they are stored: act(sum + bias) + residual, in float32, rounded once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include "problem.h"

namespace sparse_prune::device {

__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ uint32_t round_pair(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ __forceinline__ uint32_t round_pair(float low, float high, __half) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// silu(v) = v * sigmoid(v); the tanh form of gelu is v * sigmoid(2 sqrt(2 / pi) (v + 0.044715 v^3)).
template <int kCount>
__device__ __forceinline__ void activate(float (&v)[kCount], int activation) {
  if (activation == kRelu) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] = v[i] < 0.0f ? 0.0f : v[i];  // NaN stays NaN
  } else if (activation == kGelu) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] = 0.5f * v[i] * (1.0f + erff(v[i] * 0.70710678f));
  } else if (activation != kNone) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float z = activation == kSilu ? v[i] : v[i] * (1.59576912f + 0.07135481f * v[i] * v[i]);
      v[i] = __fdividef(v[i], 1.0f + __expf(-z));
    }
  }
}

// A store of kCount adjacent outputs of one token.
template <int kCount>
struct alignas(2 * kCount) Packed {
  uint32_t pair[kCount / 2];
};

// Where outputs go. `vector`: N is a multiple of 8 and all three arrays start at multiples of 16 bytes.
template <typename T>
struct Epilogue {
  const T* bias;      // [N] or null
  const T* residual;  // [M, N] or null
  T* y;               // [M, N]
  int M, N, activation;
  bool vector;

  // v[kCount] are the sums of token m and outputs n, n + 1, ...; those outside [M, N] are dropped.
  template <int kCount>
  __device__ __forceinline__ void store(float (&v)[kCount], int m, int n) const {
    if (m >= M || n >= N) return;
    const int64_t at = static_cast<int64_t>(m) * N + n;
    if (bias) add(v, bias + n, N - n);
    activate(v, activation);
    if (residual) add(v, residual + at, N - n);
    Packed<kCount> out;
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) out.pair[i] = round_pair(v[2 * i], v[2 * i + 1], T());
    if (vector) {
      *reinterpret_cast<Packed<kCount>*>(y + at) = out;
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        if (n + i < N) y[at + i] = reinterpret_cast<const T*>(out.pair)[i];
    }
  }

 private:
  // v += from[kCount], of which the first `left` exist.
  template <int kCount>
  __device__ __forceinline__ void add(float (&v)[kCount], const T* from, int left) const {
    Packed<kCount> loaded = {};
    T* values = reinterpret_cast<T*>(loaded.pair);
    if (vector) {
      loaded = *reinterpret_cast<const Packed<kCount>*>(from);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        if (i < left) values[i] = from[i];
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] += to_float(values[i]);
  }
};

// The same of sums of products in 8 bits: act(sum * scales[n] * x_scales[m] + bias) + residual.
template <typename T>
struct ScaledEpilogue {
  Epilogue<T> epilogue;
  const float* x_scales;  // [M]
  const float* scales;    // [N]

  template <class Sum, int kCount>
  __device__ __forceinline__ void store(Sum (&sums)[kCount], int m, int n) const {
    if (m >= epilogue.M || n >= epilogue.N) return;
    const float x_scale = x_scales[m];
    float v[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] = n + i < epilogue.N ? sums[i] * scales[n + i] * x_scale : 0.0f;
    epilogue.store(v, m, n);
  }
};

}  // namespace sparse_prune::device
