// The kernels of bsr_linear_sm90.cuh that are built, and their launch. Names: bsr_linear_sm90_{type}_{tokens of a tile}_{line}x{lines}.
#include <algorithm>
#include <atomic>

#include "bsr_linear_sm90.cuh"
#include "launch.h"
#include "runtime.h"

using namespace sparse_prune;

#ifndef SPARSE_PRUNE_WITHOUT_SM90A

#define KERNEL(NAME, TYPE, TOKENS, LINE, LINES)                                                                           \
  extern "C" __global__ void __launch_bounds__(sm90::THREADS, 1)                                                          \
      bsr_linear_sm90_##NAME##_##TOKENS##_##LINE##x##LINES(SPARSE_PRUNE_SM90_PARAMETERS) {                                \
    sm90::bsr_linear<TYPE, TOKENS, LINE, LINES>(&x_map, SPARSE_PRUNE_SM90_ARGUMENTS);                                     \
  }
#define KERNELS(NAME, TYPE)                                                                                               \
  KERNEL(NAME, TYPE, 256, 64, 1) KERNEL(NAME, TYPE, 256, 32, 1) KERNEL(NAME, TYPE, 256, 16, 1)                            \
  KERNEL(NAME, TYPE, 256, 16, 4) KERNEL(NAME, TYPE, 128, 64, 1) KERNEL(NAME, TYPE, 128, 32, 1)                            \
  KERNEL(NAME, TYPE, 128, 16, 1) KERNEL(NAME, TYPE, 128, 16, 4)

KERNELS(bf16, __nv_bfloat16)
KERNELS(f16, __half)

namespace {

struct Kernel {
  bool bfloat16;
  int tokens, line, lines;
  const void* function;
};

#define ENTRY(NAME, BF16, TOKENS, LINE, LINES) \
  {BF16, TOKENS, LINE, LINES, reinterpret_cast<const void*>(bsr_linear_sm90_##NAME##_##TOKENS##_##LINE##x##LINES)},
#define ENTRIES(NAME, BF16)                                                                                               \
  ENTRY(NAME, BF16, 256, 64, 1) ENTRY(NAME, BF16, 256, 32, 1) ENTRY(NAME, BF16, 256, 16, 1)                               \
  ENTRY(NAME, BF16, 256, 16, 4) ENTRY(NAME, BF16, 128, 64, 1) ENTRY(NAME, BF16, 128, 32, 1)                               \
  ENTRY(NAME, BF16, 128, 16, 1) ENTRY(NAME, BF16, 128, 16, 4)
const Kernel kKernels[] = {ENTRIES(bf16, true) ENTRIES(f16, false)};
constexpr int kKernelCount = sizeof(kKernels) / sizeof(Kernel);

// The driver's cuTensorMapEncodeTiled, asked for by name: libcuda is not linked, so that the library loads where there is no driver.
decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static const auto found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
    const bool good = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return good ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function) : nullptr;
  }();
  return found;
}

// What the arguments say, as the driver wants it; or why not.
const char* encode(CUtensorMap* map, bool bfloat16, const void* x, const sm90::TensorMapArguments& a) {
  const auto encoder = tensor_map_encoder();
  if (encoder == nullptr) return "this driver knows no tensor maps: CUDA 12.0 or younger is needed";
  const CUtensorMapSwizzle swizzle = a.swizzle == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : a.swizzle == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                       : CU_TENSOR_MAP_SWIZZLE_32B;
  const cuuint64_t dims[2] = {a.global_dim[0], a.global_dim[1]}, strides[1] = {a.global_stride[0]};
  const cuuint32_t box[2] = {a.box_dim[0], a.box_dim[1]}, each[2] = {1, 1};
  // What a box has beyond the edges is filled with zeros (OOB_FILL_NONE).
  const CUresult result = encoder(map, bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
                                  const_cast<void*>(x), dims, strides, box, each, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                                  CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "the driver refuses a tensor map of x";
}

// How many clusters of `config` run at once on a device. Asked once: it takes longer than a launch.
cudaError_t clusters_at_once(int kernel, const cudaLaunchConfig_t& config, int device, int size, int* clusters) {
  static std::atomic<int> known[kKernelCount][16][sm90::MAX_CLUSTER + 1];
  std::atomic<int>* slot = device < 16 ? &known[kernel][device][size] : nullptr;
  *clusters = slot ? slot->load() : 0;
  if (*clusters > 0) return cudaSuccess;
  const cudaError_t error = cudaOccupancyMaxActiveClusters(clusters, kKernels[kernel].function, &config);
  if (error == cudaSuccess && slot) slot->store(*clusters);
  return error;
}

}  // namespace

const char* sparse_prune::device_problem_sm90() {
  int device, major;
  if (const cudaError_t error = cudaGetDevice(&device)) return told(error);
  if (const cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) return told(error);
  if (major != 9) return "its compute capability is not 9.0";
  cudaFuncAttributes attributes;
  return told(cudaFuncGetAttributes(&attributes, kKernels[0].function));
}

const char* sparse_prune::launch_linear_sm90(const LinearProblem& p, const sm90::Packed& w, void* stream) {
  int device, major, sms;
  if (const cudaError_t error = cudaGetDevice(&device)) return told(error);
  if (const cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) return told(error);
  if (const cudaError_t error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device)) return told(error);
  if (major != 9) return "this layout is for GPUs of compute capability 9.0";
  const int64_t row_bytes = p.M > 1 ? 2 * p.ldx : (2 * p.K + 15) / 16 * 16;  // one row has no distance to the next
  if (const char* reason = sm90::refusal(reinterpret_cast<uint64_t>(p.x), p.M, p.N, p.K, row_bytes, w)) return reason;
  const sm90::Launch launch = sm90::launch_of(p.M, w, sms);
  auto fits = [&](const Kernel& k) {
    return k.bfloat16 == p.bfloat16 && k.tokens == launch.tokens && k.line == launch.line && k.lines == launch.lines;
  };
  const int kernel = std::find_if(kKernels, kKernels + kKernelCount, fits) - kKernels;
  if (kernel == kKernelCount) return "no kernel of that shape";
  const void* function = kKernels[kernel].function;

  CUtensorMap x_map;
  const auto described = sm90::x_map_arguments(p.M, p.K, row_bytes, launch.tokens, launch.line);
  if (const char* reason = encode(&x_map, p.bfloat16, p.x, described)) return reason;
  if (const cudaError_t error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, launch.shared_bytes))
    return told(error);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = w.cluster, attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(w.cluster), config.blockDim = dim3(launch.threads);
  config.dynamicSmemBytes = launch.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute, config.numAttrs = 1;
  int clusters;
  if (const cudaError_t error = clusters_at_once(kernel, config, device, w.cluster, &clusters)) return told(error);
  if (clusters < 1) return "no cluster of blocks fits this device";
  config.gridDim = dim3(static_cast<unsigned>(std::min<int64_t>(clusters, launch.turns)) * w.cluster);

  const void *x = p.x, *values = p.packed, *bias = p.bias, *residual = p.residual;
  const void* table = static_cast<const char*>(p.packed) + w.table();
  void* y = p.y;
  long long x_row = p.ldx, residual_row = p.N;
  int m = p.M, n = p.N, k = p.K, block_rows = w.block_rows, groups = w.groups, lines = w.lines, group_tokens = launch.group_tokens;
  int activation = p.activation;
  void* arguments[] = {&x_map, &x, &values, &table,      &bias,   &residual, &y,           &x_row,     &residual_row,
                       &m,     &n, &k,      &block_rows, &groups, &lines,    &group_tokens, &activation};
  return told(cudaLaunchKernelExC(&config, function, arguments));
}

#else  // built for GPUs among which there is no Hopper

const char* sparse_prune::device_problem_sm90() { return "the CUDA extension was built without sm_90a"; }
const char* sparse_prune::launch_linear_sm90(const LinearProblem&, const sm90::Packed&, void*) { return device_problem_sm90(); }

#endif
