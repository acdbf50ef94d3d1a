// The kernels of the sm_80 family, by name, and their launch:
//   bsr_linear_sm80_{bf16,f16}_{16x16,32x16,32x32,64x16}_{128,256}, ..._64x32_256   row x inputs that it has or lacks together, most tokens of a block
//   bsr_linear_skinny_{bf16,f16}_{16_1,64_1,64_2}                          most tokens, units of a block
#include "bsr_linear_skinny.cuh"
#include "bsr_linear_sm80.cuh"
#include "config.h"
#include "launch.h"
#include "runtime.h"

using namespace sparse_prune;
using namespace sparse_prune::device;

#define LINEAR(NAME, T, ROW, INPUTS, BLOCK_M)                                                                                       \
  extern "C" __global__ void __launch_bounds__(256, BLOCK_M == 256 ? 1 : 2) bsr_linear_sm80_##NAME##_##ROW##x##INPUTS##_##BLOCK_M( \
      const T* x, const uint4* weights, const Tile* tiles, const Step* steps, const T* bias, const T* residual, T* y, int M, int N, \
      int K, int64_t ldx, int tile_count, int tall, int whole, int ragged, int activation, int vector) {                           \
    const Epilogue<T> epilogue{bias, residual, y, M, N, activation, vector != 0};                                                  \
    bsr_linear_sm80<T, ROW, INPUTS / 16, BLOCK_M / 64>(x, weights, tiles, steps, epilogue, M, K, ldx, tile_count, tall, whole,     \
                                                       ragged);                                                                    \
  }
#define LINEARS(NAME, T)                                                                                                        \
  LINEAR(NAME, T, 16, 16, 128) LINEAR(NAME, T, 32, 16, 128) LINEAR(NAME, T, 32, 32, 128) LINEAR(NAME, T, 64, 16, 128)           \
  LINEAR(NAME, T, 16, 16, 256) LINEAR(NAME, T, 32, 16, 256) LINEAR(NAME, T, 32, 32, 256) LINEAR(NAME, T, 64, 16, 256)           \
  LINEAR(NAME, T, 64, 32, 256)

#define SKINNY(NAME, T, TOKENS, UNITS)                                                                                             \
  extern "C" __global__ void __launch_bounds__(TOKENS == 16 ? 512 : 256, TOKENS == 16 ? 1 : 2)                                    \
      bsr_linear_skinny_##NAME##_##TOKENS##_##UNITS(const T* x, const uint4* weights, const int* starts, const Piece* pieces,     \
                                                    const T* bias, const T* residual, T* y, int M, int N, int K, int64_t ldx,     \
                                                    int row_units, int order, int activation, int vector) {                       \
    const Epilogue<T> epilogue{bias, residual, y, M, N, activation, vector != 0};                                                  \
    bsr_linear_skinny<T, TOKENS / 8, UNITS>(x, weights, starts, pieces, epilogue, M, K, ldx, row_units, order);                    \
  }
#define SKINNIES(NAME, T) SKINNY(NAME, T, 16, 1) SKINNY(NAME, T, 64, 1) SKINNY(NAME, T, 64, 2)

LINEARS(bf16, __nv_bfloat16)
LINEARS(f16, __half)
SKINNIES(bf16, __nv_bfloat16)
SKINNIES(f16, __half)

namespace {

#define LINEAR_ENTRY(NAME, BF16, ROW, INPUTS, TOKENS) \
  {BF16, false, TOKENS, ROW, INPUTS, reinterpret_cast<const void*>(bsr_linear_sm80_##NAME##_##ROW##x##INPUTS##_##TOKENS)},
#define SKINNY_ENTRY(NAME, BF16, TOKENS, UNITS) \
  {BF16, true, TOKENS, UNITS, 0, reinterpret_cast<const void*>(bsr_linear_skinny_##NAME##_##TOKENS##_##UNITS)},
#define ENTRIES(NAME, BF16)                                                                                                     \
  LINEAR_ENTRY(NAME, BF16, 16, 16, 128) LINEAR_ENTRY(NAME, BF16, 32, 16, 128) LINEAR_ENTRY(NAME, BF16, 32, 32, 128)             \
  LINEAR_ENTRY(NAME, BF16, 64, 16, 128) LINEAR_ENTRY(NAME, BF16, 16, 16, 256) LINEAR_ENTRY(NAME, BF16, 32, 16, 256)             \
  LINEAR_ENTRY(NAME, BF16, 32, 32, 256) LINEAR_ENTRY(NAME, BF16, 64, 16, 256) LINEAR_ENTRY(NAME, BF16, 64, 32, 256)             \
  SKINNY_ENTRY(NAME, BF16, 16, 1) SKINNY_ENTRY(NAME, BF16, 64, 1) SKINNY_ENTRY(NAME, BF16, 64, 2)
const LinearKernel kKernels[] = {ENTRIES(bf16, true) ENTRIES(f16, false)};

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace

const char* sparse_prune::device_problem() {
  int device, major;
  if (const cudaError_t error = cudaGetDevice(&device)) return told(error);
  if (const cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) return told(error);
  if (major < 8) return "its compute capability is older than 8.0";
  cudaFuncAttributes attributes;
  return told(cudaFuncGetAttributes(&attributes, kKernels[0].function));  // no code for this device: built for other architectures
}

const char* sparse_prune::launch_linear(const LinearProblem& p, void* stream) {
  int device, sms, major;
  if (const cudaError_t error = cudaGetDevice(&device)) return told(error);
  if (const cudaError_t error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device)) return told(error);
  if (const cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) return told(error);
  const LinearLaunch launch = linear_launch(p.M, p.layout, sms, p.work, p.e4m3 ? most_tokens_of_e4m3(major) : 256);
  if (launch.blocks > INT32_MAX || p.M > INT32_MAX || p.N > INT32_MAX || p.K > INT32_MAX) return kTooLarge;
  const int row_or_units = launch.skinny ? launch.units : p.layout.row;
  const auto named = [&](const auto& of) { return of(p.bfloat16, launch.skinny, launch.tokens, row_or_units, launch.inputs); };
  const void* function = p.scales == nullptr ? named([](auto... shape) { return find(kKernels, shape...); })
                                             : named(p.e4m3 ? e4m3_kernel : int8_kernel);
  if (function == nullptr) return "no kernel of that shape";
  const char* packed = static_cast<const char*>(p.packed);
  const void *tiles = packed + p.layout.tables, *starts = packed + p.layout.starts, *pieces = packed + p.layout.piece_table;
  const void *steps = packed + p.layout.steps, *x = p.x, *bias = p.bias, *residual = p.residual;
  const void *x_scales = p.x_scales, *scales = p.scales;  // behind the others, where a kernel takes them
  void* y = p.y;
  int M = p.M, N = p.N, K = p.K, tile_count = p.layout.tiles, row_units = p.layout.row / kUnit, activation = p.activation;
  int tall = launch.tall, whole = launch.whole;
  const int step_inputs = p.layout.row == 16 ? 32 : 64;
  int ragged = p.layout.block_cols > 0 && p.K % p.layout.block_cols != 0 ? (p.layout.block_cols + step_inputs - 1) / step_inputs : 0;
  int order = p.layout.order, vector = N % 8 == 0 && aligned(bias) && aligned(residual) && aligned(y);
  int64_t ldx = p.ldx;
  void* wide[] = {&x, &packed, &tiles, &steps, &bias, &residual, &y, &M, &N, &K, &ldx, &tile_count, &tall, &whole, &ragged,
                  &activation, &vector, &x_scales, &scales};
  void* skinny[] = {&x, &packed, &starts, &pieces, &bias, &residual, &y, &M, &N, &K, &ldx, &row_units, &order, &activation,
                    &vector, &x_scales, &scales};
  cudaError_t error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, launch.shared_bytes);
  if (error == cudaSuccess)
    error = cudaLaunchKernel(function, dim3(launch.blocks), dim3(launch.threads), launch.skinny ? skinny : wide, launch.shared_bytes,
                             static_cast<cudaStream_t>(stream));
  return told(error);
}

const char* sparse_prune::launch_quantize(const QuantizeProblem& p, void* stream) {
  if (p.M > INT32_MAX || p.K > INT32_MAX) return kTooLarge;
  const void *function = (p.e4m3 ? e4m3_kernel : int8_kernel)(p.bfloat16, false, 0, 0, 0), *x = p.x;
  void *q = p.q, *scales = p.scales;
  int K = p.K;
  int64_t ldx = p.ldx, ldq = p.ldq;
  float x_scale = p.x_scale;
  void* arguments[] = {&x, &q, &scales, &K, &ldx, &ldq, &x_scale};
  return told(cudaLaunchKernel(function, dim3(p.M), dim3(128), arguments, 0, static_cast<cudaStream_t>(stream)));
}
