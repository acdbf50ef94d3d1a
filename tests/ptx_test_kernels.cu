// CUDA C++ that test_ptx_emulator.py compiles with nvcc and runs: what nvcc makes of local arrays, libm, shuffles, cp.async and inline PTX.
#include <cuda_fp16.h>
#include <cuda_bf16.h>
#include <cuda_pipeline.h>

#ifdef NO_SYNC  // a planted bug: lanes read what others copied
#define SYNC()
#else
#define SYNC() __syncwarp()
#endif

extern "C" __global__ void row_sums(const float* x, float* sums, int* order, int rows, int columns) {
  // One block a row; a local array indexed at run time.
  __shared__ float partial[32];
  int row = blockIdx.x;
  float buckets[4] = {0, 0, 0, 0};
  for (int c = threadIdx.x; c < columns; c += blockDim.x)
    buckets[c % 3 + (x[row * columns + c] > 0 ? 1 : 0)] += x[row * columns + c];
  float s = buckets[0] + buckets[1] + buckets[2] + buckets[3];
  for (int d = 16; d; d >>= 1) s += __shfl_xor_sync(~0u, s, d);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = s;
  __syncthreads();
  if (threadIdx.x < 32) {
    s = threadIdx.x < blockDim.x / 32 ? partial[threadIdx.x] : 0.f;
    for (int d = 16; d; d >>= 1) s += __shfl_down_sync(~0u, s, d);
    if (threadIdx.x == 0) {
      sums[row] = s;
      order[row] = atomicAdd(&order[rows], 1);
    }
  }
}
extern "C" __global__ void functions_bf16(const __nv_bfloat16* x, __nv_bfloat16* y, int n) {
  int i = (blockIdx.x * blockDim.x + threadIdx.x) * 2;
  if (i + 1 < n) {
    float2 v = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(x + i));
    v.x = 0.5f * v.x * (1.f + erff(v.x * 0.70710678f)); v.y = v.y * tanhf(v.y) + expf(v.x) - logf(1.f + v.x * v.x) + sinf(v.y);
    *reinterpret_cast<__nv_bfloat162*>(y + i) = __floats2bfloat162_rn(v.x, v.y);
  }
}
extern "C" __global__ void matmul_tile(const half* a, const half* b, float* c, int n) {
  // 16 x 8 of c = a b^T by one warp, two stages of cp.async
  __shared__ __align__(16) half sa[2][16 * 16], sb[2][8 * 16];
  int m0 = blockIdx.x * 16, n0 = blockIdx.y * 8, t = threadIdx.x;
  auto load = [&](int stage, int k) {
    __pipeline_memcpy_async(&sa[stage][t * 8], a + (m0 + t / 2) * n + k + t % 2 * 8, 16);
    if (t < 16) __pipeline_memcpy_async(&sb[stage][t * 8], b + (n0 + t / 2) * n + k + t % 2 * 8, 16);
    __pipeline_commit();
  };
  float d[4] = {0, 0, 0, 0};
  load(0, 0);
  for (int k = 0; k < n; k += 16) {
    if (k + 16 < n) load((k / 16 + 1) & 1, k + 16);
    __pipeline_wait_prior(k + 16 < n ? 1 : 0);
    SYNC();
    unsigned x[4], y[2];
    unsigned pa = __cvta_generic_to_shared(&sa[k / 16 & 1][t % 16 * 16 + t / 16 * 8]);
    unsigned pb = __cvta_generic_to_shared(&sb[k / 16 & 1][t % 8 * 16 + t / 8 % 2 * 8]);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(pa) : "memory");
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(y[0]), "=r"(y[1]) : "r"(pb) : "memory");
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]));
    SYNC();
  }
  for (int i = 0; i < 4; ++i) c[(m0 + t / 4 + i / 2 * 8) * n + n0 + t % 4 * 2 + i % 2] = d[i];
}
