// What surrounds the linear layers of an encoder: attention over short sequences, and LayerNorm. Nothing here knows of torch.
#pragma once

#include "kernels.h"

namespace sparse_prune {

// An operand that broadcasts to [B, heads, T, T]: strides in elements, 0 where it repeats; keys lie side by side.
struct Broadcast {
  const void* data;  // null: absent
  int64_t batch, head, query;
};

// out[b, t, h, :] = sum over keys s of softmax_s(scale * q[b, t, h, :] . k[b, s, h, :] + bias[b, h, t, s]) * v[b, s, h, :], where a
// score with keep = 0 is replaced by the lowest float: a query that keeps no key averages all of them.
struct AttentionArgs {
  DType dtype;
  int64_t B, T, heads, d;
  const void *q, *k, *v;             // [B, T, heads, d], features side by side
  int64_t q_batch, q_token, q_head;  // strides in elements
  int64_t k_batch, k_token, k_head;
  int64_t v_batch, v_token, v_head;
  double scale;
  Broadcast bias;                    // of dtype
  Broadcast keep;                    // bytes, 0 or 1
  void* out;                         // [B, T, heads, d] contiguous
};

// y[M, H] = (z - mean) / sqrt(variance + eps) * weight + bias with z = x + residual, statistics per row in float.
struct NormArgs {
  DType dtype;
  int64_t M, H;
  const void* x;                     // [M, H]
  int64_t ldx;                       // elements from one row of x to the next
  const void* residual;              // [M, H] contiguous, or null
  const void* weight;                // [H] or null
  const void* bias;                  // [H] or null
  double eps;
  void* y;                           // [M, H] contiguous
};

// attention computes queries [t0, t1) of one head, layer_norm rows [m0, m1). None allocates beyond thread_scratch.
struct EncoderKernels {
  void (*attention)(const AttentionArgs&, int64_t b, int64_t h, int64_t t0, int64_t t1);
  void (*layer_norm)(const NormArgs&, int64_t m0, int64_t m1);
};

const EncoderKernels* portable_encoder();
const EncoderKernels* portable_f64_encoder();
const EncoderKernels* avx2_encoder();
const EncoderKernels* avx512_encoder();
const EncoderKernels* avx512_bf16_encoder();
const EncoderKernels* amx_bf16_encoder();

}  // namespace sparse_prune
