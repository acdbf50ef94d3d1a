// Launches of the CUDA kernels. Plain C++: the callers need neither CUDA's headers nor its compiler.
#pragma once

#include <stdint.h>

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
  const void* bias;    // [N] or null
  const void* residual;  // [M, N] or null
  void* y;
  int activation;  // Activation
};

// Queues the product on a stream of the current device and returns null, or why it cannot. Never waits for the device.
const char* launch_linear(const LinearProblem& problem, void* stream);

// Null where a GPU that these kernels are built for is the current device, else the reason.
const char* device_problem();

}  // namespace sparse_prune
