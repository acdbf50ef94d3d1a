// Launches of the CUDA kernels. Plain C++: the callers need neither CUDA's headers nor its compiler.
#pragma once

#include <stdint.h>

#include "bsr_linear_sm90.h"
#include "config.h"

namespace sparse_prune {

// y[M, N] = act(x[M, K] @ W[N, K]^T + bias) + residual in float16 or bfloat16; all pointers are device memory.
struct LinearProblem {
  bool bfloat16;
  int64_t M, N, K;
  const void* x;  // [M, K], rows ldx elements apart; both multiples of 16 bytes
  int64_t ldx;
  const void* packed;  // the layout
  Layout layout;
  const int* work;     // [tiles] on the host, or null: see linear_launch
  const void* bias;    // [N] or null
  const void* residual;  // [M, N] or null
  void* y;
  int activation;  // Activation
  // Weights of 8 bits: x is of pairs of them, and K, ldx and the layout count pairs of inputs; else both null.
  const void* x_scales;  // float [M]
  const void* scales;    // float [N]
  bool e4m3;             // else int8
};

// Queues the product on a stream of the current device and returns null, or why it cannot. Never waits for the device.
const char* launch_linear(const LinearProblem& problem, void* stream);

// q[M, K] of int8 or e4m3 and float scales[M] with x[m, k] ~ scales[m] * q[m, k]; zeros up to ldq, a multiple of 32.
struct QuantizeProblem {
  bool bfloat16, e4m3;
  int64_t M, K;
  const void* x;  // [M, K], rows ldx elements apart; both multiples of 16 bytes
  int64_t ldx;
  void *q, *scales;
  int64_t ldq;
  float x_scale;  // of all rows; 0: each row's own
};

// As launch_linear.
const char* launch_quantize(const QuantizeProblem& problem, void* stream);

// The kernel for weights of 8 bits of that shape, or null; for tokens 0 what rounds x.
const void* int8_kernel(bool bfloat16, bool skinny, int tokens, int row_or_units, int inputs);
const void* e4m3_kernel(bool bfloat16, bool skinny, int tokens, int row_or_units, int inputs);

// dvalues[nnzb, R, C]: the stored blocks of dy[M, N]^T @ x[M, K], summed in float32.
struct SddProblem {
  bool bfloat16;
  int64_t M, N, K, nnzb;
  int block_rows, block_cols;  // R, C
  const void* dy;  // [M, N], rows ldy elements apart; both multiples of 16 bytes
  int64_t ldy;
  const void* x;  // [M, K], likewise
  int64_t ldx;
  const void* jobs;  // struct SddJob [job_count], as kernels/sparse_prune_kernels/cuda.py makes them
  int64_t job_count;
  void* parts;  // float [launch.splits, nnzb, R, C] if there are several, else null
  void* dvalues;
};

// As launch_linear; launch is sdd_launch's.
const char* launch_sdd(const SddProblem& problem, const SddLaunch& launch, void* stream);

// Multiprocessors of the current device; 0 where it cannot be asked.
int multiprocessors();

// The same of many tokens by the kernel for Hopper, whose layout is another.
const char* launch_linear_sm90(const LinearProblem& problem, const sm90::Packed& weight, void* stream);

// Null where that kernel runs on the current device, else the reason.
const char* device_problem_sm90();

// Null where a GPU that these kernels are built for is the current device, else the reason.
const char* device_problem();

}  // namespace sparse_prune
