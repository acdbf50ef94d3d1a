// The product of int8 weights with rows of x that are rounded to int8 on the way: what the dispatcher asks of an instruction set.
//
// vpdpbusd multiplies unsigned by signed bytes, so the rounded x is stored as q + 128 in [1, 255] and each output starts its sum at
// -128 times the sum of its weights, which is known when weights are prepacked. The other way round, flipping the sign of every weight
// by that of x, costs one more instruction per product. int32 sums wrap, so an intermediate value may leave its range as long as the
// final one does not: that holds up to (2^31 - 1) / 127^2 inputs.
#pragma once

#include "kernels.h"

namespace sparse_prune {

constexpr int kInt8Step = 4;  // inputs that one 32-bit lane multiplies and sums
constexpr int64_t kInt8MaxInputs = ((int64_t{1} << 31) - 1) / (127 * 127);

// q = round(x / scale), half to even, no further than +-127.
struct QuantizeArgs {
  DType dtype;                // of x: f32, bf16 or f16
  int64_t K;
  const void* x;              // [M, K]
  int64_t ldx;                // elements from one row of x to the next
  float scale;                // of every row; 0: max |x[m, :]| / 127 of each
  uint8_t* q;                 // [M, ldq]: q + 128; 128 from K on
  int64_t ldq;
  float* scales;              // [M]; NaN for a row that holds NaN or infinity, whose q are 0
};

// y = act((q @ W^T) * w_scales[N] * x_scales[M] + bias[N]) + residual. Of LinearArgs, dtype is what x had, x is q + 128, and w is int8 [nnzb][ceil(C/4)][R][4], kSlack elements follow.
struct Int8Args : LinearArgs {
  const float* x_scales;      // [M]
  const float* w_scales;      // [N]
  const int32_t* offsets;     // [ceil(N/R) * R], kSlack elements follow
};

struct Int8Kernels {
  const char* name;
  void (*quantize)(const QuantizeArgs&, int64_t m0, int64_t m1);
  void (*linear)(const Int8Args&, int64_t m0, int64_t m1, int64_t i0, int64_t i1);
};

const Int8Kernels* portable_int8_kernels();
const Int8Kernels* avx2_int8_kernels();
const Int8Kernels* avx512_vnni_kernels();
const Int8Kernels* avx512_bf16_int8_kernels();
const Int8Kernels* amx_int8_kernels();

}  // namespace sparse_prune
