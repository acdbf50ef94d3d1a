// Shapes of the sm_90a kernel that its launcher, its tests and the kernel itself must agree on. Plain C++: no CUDA, no torch.
#pragma once

#include <cstdint>

namespace sparse_prune::sm90 {

#ifdef __CUDACC__
#define SPARSE_PRUNE_BOTH __host__ __device__
#else
#define SPARSE_PRUNE_BOTH
#endif

constexpr int ROWS = 128;            // outputs of a tile in one block: two warpgroups of 64, each warp 16
constexpr int CONSUMER_WARPS = 8;    // of 16 outputs each
constexpr int THREADS = 384;         // a warpgroup that loads and two that multiply
constexpr int MAX_CLUSTER = 4;       // blocks that share x; divides every number of stages
constexpr int STAGE_BYTES = 192 * 1024;  // the ring of stages, of 227 KiB
constexpr int MAX_STAGES = 16;       // more than 16 steps ahead hide nothing that 16 do not

// Inputs of one step: a line of x is 32, 64 or 128 bytes, one swizzle of shared memory; a block of 128 columns takes two steps.
SPARSE_PRUNE_BOTH constexpr int step_of(int block_columns) { return block_columns < 64 ? block_columns : 64; }
SPARSE_PRUNE_BOTH constexpr int x_bytes(int tokens, int step) { return tokens * step * 2; }
SPARSE_PRUNE_BOTH constexpr int w_bytes(int step) { return ROWS * step * 2; }
SPARSE_PRUNE_BOTH constexpr int stages(int tokens, int step) {
  int fit = STAGE_BYTES / (x_bytes(tokens, step) + w_bytes(step));
  return fit >= 16 ? 16 : fit >= 8 ? 8 : 4;  // a multiple of the cluster, so that one block always leads the same stages
}
// Three mbarriers and one word for every stage, after the ring.
SPARSE_PRUNE_BOTH constexpr int shared_bytes(int tokens, int step) {
  return stages(tokens, step) * (x_bytes(tokens, step) + w_bytes(step) + 3 * 8 + 4);
}

// What cuTensorMapEncodeTiled is told about x: [m, k] in two-byte numbers, rows row_bytes apart; boxes of `step` inputs and `tokens` rows.
struct TensorMapArguments {
  uint64_t global_dim[2];      // innermost first
  uint64_t global_stride[1];   // bytes
  uint32_t box_dim[2];
  uint32_t swizzle;            // bytes
};
inline TensorMapArguments x_map_arguments(int64_t m, int64_t k, int64_t row_bytes, int tokens, int step) {
  return {{uint64_t(k), uint64_t(m)}, {uint64_t(row_bytes)}, {uint32_t(step), uint32_t(tokens)}, uint32_t(2 * step)};
}

// Why a tensor map cannot describe x, or null.
inline const char* x_map_refusal(uint64_t address, int64_t k, int64_t row_bytes) {
  if (address % 16) return "x must begin at a multiple of 16 bytes";
  if (row_bytes % 16) return "rows of x must lie a multiple of 16 bytes apart";
  if (k < 1 || k > INT32_MAX) return "x must have at least one column";
  return nullptr;
}

}  // namespace sparse_prune::sm90
