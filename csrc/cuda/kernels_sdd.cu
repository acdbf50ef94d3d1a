// The kernels of a weight's gradient, by name, and their launch:
//   bsr_sdd_{bf16,f16}_{1,2}   units of a slot
//   sum_parts_{bf16,f16}
#include <algorithm>

#include "bsr_sdd_sm80.cuh"
#include "config.h"
#include "launch.h"
#include "runtime.h"

using namespace sparse_prune;
using namespace sparse_prune::device;

#define SDD(NAME, T, UNITS)                                                                                                         \
  extern "C" __global__ void __launch_bounds__(256, 2)                                                                              \
      bsr_sdd_##NAME##_##UNITS(const T* dy, const T* x, const SddJob* jobs, T* dvalues, float* parts, int M, int N, int K,          \
                               int64_t ldy, int64_t ldx, int C, int job_count, int splits, int64_t size) {                          \
    bsr_sdd_sm80<T, UNITS>(dy, x, jobs, dvalues, parts, M, N, K, ldy, ldx, C, job_count, splits, size);                             \
  }
#define SUM(NAME, T)                                                                                                                \
  extern "C" __global__ void __launch_bounds__(256) sum_parts_##NAME(const float* parts, T* to, int64_t size, int splits) {         \
    sum_parts(parts, to, size, splits);                                                                                             \
  }

SDD(bf16, __nv_bfloat16, 1)
SDD(bf16, __nv_bfloat16, 2)
SUM(bf16, __nv_bfloat16)
SDD(f16, __half, 1)
SDD(f16, __half, 2)
SUM(f16, __half)

int sparse_prune::multiprocessors() {
  int device, count;
  const bool known = cudaGetDevice(&device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess;
  return known ? count : 0;
}

const char* sparse_prune::launch_sdd(const SddProblem& p, const SddLaunch& launch, void* stream) {
  if (std::max({p.M, p.N, p.K, launch.blocks, launch.sum_blocks}) > INT32_MAX) return kTooLarge;
  const auto* sdd = p.bfloat16 ? launch.units == 1 ? reinterpret_cast<const void*>(bsr_sdd_bf16_1) : reinterpret_cast<const void*>(bsr_sdd_bf16_2)
                    : launch.units == 1 ? reinterpret_cast<const void*>(bsr_sdd_f16_1) : reinterpret_cast<const void*>(bsr_sdd_f16_2);
  const void *dy = p.dy, *x = p.x, *jobs = p.jobs;
  void *dvalues = p.dvalues, *parts = p.parts;
  int M = p.M, N = p.N, K = p.K, C = p.block_cols, job_count = p.job_count, splits = launch.splits;
  int64_t ldy = p.ldy, ldx = p.ldx, size = p.nnzb * p.block_rows * p.block_cols;
  void* arguments[] = {&dy, &x, &jobs, &dvalues, &parts, &M, &N, &K, &ldy, &ldx, &C, &job_count, &splits, &size};
  const auto queue = static_cast<cudaStream_t>(stream);
  cudaError_t error = cudaFuncSetAttribute(sdd, cudaFuncAttributeMaxDynamicSharedMemorySize, launch.shared_bytes);
  if (error == cudaSuccess)
    error = cudaLaunchKernel(sdd, dim3(launch.blocks), dim3(launch.threads), arguments, launch.shared_bytes, queue);
  if (error == cudaSuccess && splits > 1) {
    const void* sum = p.bfloat16 ? reinterpret_cast<const void*>(sum_parts_bf16) : reinterpret_cast<const void*>(sum_parts_f16);
    void* of_sum[] = {&parts, &dvalues, &size, &splits};
    error = cudaLaunchKernel(sum, dim3(launch.sum_blocks), dim3(launch.threads), of_sum, 0, queue);
  }
  return told(error);
}
