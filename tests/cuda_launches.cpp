// In the place of the CUDA runtime and driver: what the host code of csrc/cuda calls, so that its launches come to a test and not to a
// GPU. tests/cuda_launches.py builds it with that host code and hands each launch to the PTX emulator.
#include <cuda.h>
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <stdint.h>

#include <algorithm>
#include <cstring>

extern "C" {

struct Launch {
  const char* kernel;
  uint32_t blocks, threads, shared_bytes, cluster;
  int32_t device;     // that the code has made the current one; -1 for none
  uint64_t stream;
  void** arguments;
};
using OnLaunch = int (*)(const Launch*);          // a cudaError_t
using OnMemory = void (*)(uint64_t address, uint64_t bytes);

int planted_bug;  // cuda_launches.BUGS
OnLaunch on_launch;
OnMemory on_memory;
int fake_major = 8, fake_sms = 4, fake_clusters = 2;
uint32_t allowed_shared_bytes;  // that cudaFuncSetAttribute asked for last

void fake_cuda(OnLaunch launch, OnMemory memory, int major, int sms, int clusters) {
  on_launch = launch, on_memory = memory, fake_major = major, fake_sms = sms, fake_clusters = clusters;
}
}

int32_t current_device = -1;

// What csrc/cuda_ops.cpp gets in place of torch's guard and stream, by a patch.
struct RecordedGuard {
  explicit RecordedGuard(int32_t device);
  ~RecordedGuard();
  int32_t before;
};
// torch calls the CPU -1: device 0 here.
RecordedGuard::RecordedGuard(int32_t device) : before(current_device) { current_device = std::max(device, -1) + (device == -1); }
RecordedGuard::~RecordedGuard() { current_device = before; }
int32_t recorded_stream(int32_t, void** stream) { return *stream = reinterpret_cast<void*>(0x57), 0; }
void recorded_memory(void* address, int64_t bytes) {
  if (bytes > 0) std::memset(address, 0xff, bytes);  // NaN
  on_memory(reinterpret_cast<uint64_t>(address), bytes);
}

namespace {

cudaError_t launched(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t stream, uint32_t cluster) {
  Dl_info info;
  if (!dladdr(function, &info) || info.dli_sname == nullptr || grid.y * grid.z * block.y * block.z != 1) return cudaErrorInvalidValue;
  if (shared > std::max<size_t>(48 * 1024, allowed_shared_bytes)) return cudaErrorInvalidValue;
  const Launch launch = {info.dli_sname, grid.x, block.x, static_cast<uint32_t>(shared), cluster, current_device,
                         reinterpret_cast<uint64_t>(stream), arguments};
  return static_cast<cudaError_t>(on_launch(&launch));
}

// A tensor map that says what it was made of.
CUresult encode(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address, const cuuint64_t* dims,
                const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps, CUtensorMapInterleave interleave,
                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  const bool known = rank == 2 && steps[0] == 1 && steps[1] == 1 && interleave == CU_TENSOR_MAP_INTERLEAVE_NONE &&
                     fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;
  const uint64_t said[] = {reinterpret_cast<uint64_t>(address), dims[0], dims[1], strides[0], box[0], box[1],
                           swizzle == CU_TENSOR_MAP_SWIZZLE_NONE ? 0u : 16u << swizzle, type};
  std::memcpy(map, said, sizeof said);
  return known ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

}  // namespace

extern "C" {

cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? fake_major : attribute == cudaDevAttrMultiProcessorCount ? fake_sms : -1;
  return *value < 0 ? cudaErrorInvalidValue : cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t error) { return error == cudaErrorLaunchFailure ? "unspecified launch failure" : "another error"; }
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int value) { return allowed_shared_bytes = value, cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t*) {
  return *clusters = fake_clusters, cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t stream) {
  return launched(function, grid, block, arguments, shared, stream, 1);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  uint32_t cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i)
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) cluster = config->attrs[i].val.clusterDim.x;
  return launched(function, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes, config->stream, cluster);
}
#if CUDART_VERSION >= 12050
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
#else
cudaError_t cudaGetDriverEntryPoint(const char* name, void** function, unsigned long long, cudaDriverEntryPointQueryResult* result) {
#endif
  const bool known = std::strcmp(name, "cuTensorMapEncodeTiled") == 0;
  *function = reinterpret_cast<void*>(&encode);
  *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
}
