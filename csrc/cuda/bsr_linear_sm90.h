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

// Inputs of a line: what x has of them is 32, 64 or 128 bytes a token, one swizzle of shared memory. A block of 128 columns is two lines.
SPARSE_PRUNE_BOTH constexpr int line_of(int block_columns) { return block_columns < 64 ? block_columns : 64; }
// Lines of a step: four of tall blocks' 16 inputs, or waiting for steps and releasing them would cost more than the products do.
// Two warpgroups tell apart which of them they have; they could not where more block-rows share a warpgroup.
SPARSE_PRUNE_BOTH constexpr int lines_of(int block_rows, int block_columns) { return block_rows >= 64 && block_columns == 16 ? 4 : 1; }
// Bytes of so many inputs, a line or a step.
SPARSE_PRUNE_BOTH constexpr int x_bytes(int tokens, int inputs) { return tokens * inputs * 2; }
SPARSE_PRUNE_BOTH constexpr int w_bytes(int inputs) { return ROWS * inputs * 2; }
SPARSE_PRUNE_BOTH constexpr int stages(int tokens, int step) {
  int fit = STAGE_BYTES / (x_bytes(tokens, step) + w_bytes(step));
  return fit >= 16 ? 16 : fit >= 8 ? 8 : 4;  // a multiple of the cluster, so that one block always leads the same stages
}
// Three mbarriers and one word for every stage, after the ring.
SPARSE_PRUNE_BOTH constexpr int shared_bytes(int tokens, int step) {
  return stages(tokens, step) * (x_bytes(tokens, step) + w_bytes(step) + 3 * 8 + 4);
}

// What cuTensorMapEncodeTiled is told about x: [m, k] in two-byte numbers, rows row_bytes apart; boxes of `line` inputs and `tokens` rows.
struct TensorMapArguments {
  uint64_t global_dim[2];      // innermost first
  uint64_t global_stride[1];   // bytes
  uint32_t box_dim[2];
  uint32_t swizzle;            // bytes
};
inline TensorMapArguments x_map_arguments(int64_t m, int64_t k, int64_t row_bytes, int tokens, int line) {
  return {{uint64_t(k), uint64_t(m)}, {uint64_t(row_bytes)}, {uint32_t(line), uint32_t(tokens)}, uint32_t(2 * line)};
}

// A weight as kernels/sparse_prune_kernels/cuda_sm90.py packs it: nnzb blocks in fragment order, the table of its ClusterPlan, and where
// each row has its pieces (bsr_linear_skinny.cuh, which serves few tokens from the same weights).
struct Packed {
  int block_rows, block_columns;  // in {16, 32, 64, 128}
  int cluster;                    // blocks that share x: 1, 2 or 4
  int64_t nnzb, groups, lines;

  int row() const { return block_rows < 64 ? block_rows : 64; }  // outputs of a row
  int64_t table() const { return 2 * nnzb * block_rows * block_columns; }  // offset in bytes
  int64_t table_ints() const {
    const int64_t places = int64_t(cluster) * (ROWS / block_rows);
    return groups + 1 + groups * places + lines * (2 + places);
  }
  int64_t starts() const { return table() + (table_ints() + 3) / 4 * 16; }
  int64_t rows(int64_t out_features) const { return (out_features + block_rows - 1) / block_rows * (block_rows / row()); }
  int64_t pieces(int64_t out_features) const { return starts() + (rows(out_features) + 1 + 3) / 4 * 16; }
  int64_t bytes(int64_t out_features) const {
    return pieces(out_features) + 8 * nnzb * (block_rows / row()) * (block_columns / 16);
  }
};

struct Launch {
  int tokens, line, lines;  // which instantiation
  int threads;
  int shared_bytes;    // dynamic shared memory
  int group_tokens;    // tiles of tokens that pass over all groups together
  int64_t turns;       // tiles of a cluster: more clusters than that have nothing to do
};

// m > 0 rows of x in tiles of 128 or 256.
inline Launch launch_with(int64_t m, const Packed& w, int tokens) {
  Launch launch = {};
  launch.tokens = tokens;
  launch.line = line_of(w.block_columns);
  launch.lines = lines_of(w.block_rows, w.block_columns);
  launch.threads = THREADS;
  launch.shared_bytes = shared_bytes(tokens, launch.line * launch.lines);
  launch.group_tokens = 2048 / tokens;  // x of 2048 tokens and 4096 inputs is 16 MB, of 50 MB of L2
  launch.turns = (m + tokens - 1) / tokens * w.groups;
  return launch;
}

// The better tile on a GPU of `sms` multiprocessors, by clocks of the busiest cluster. 128 tokens bring W twice as often through L2 and
// shared memory: by predicted_clocks (cuda_sm90.py) they cost 1.3 times their share.
inline Launch launch_of(int64_t m, const Packed& w, int sms) {
  const Launch wide = launch_with(m, w, 256), narrow = launch_with(m, w, 128);
  const int64_t clusters = sms < w.cluster ? 1 : sms / w.cluster;
  auto clocks = [&](const Launch& l, int percent) { return (l.turns + clusters - 1) / clusters * l.tokens * percent; };
  return clocks(wide, 100) <= clocks(narrow, 130) ? wide : narrow;
}

// Why the kernel cannot run, or null: x[m, k] lies at an address and has rows row_bytes apart; w has n outputs.
inline const char* refusal(uint64_t x, int64_t m, int64_t n, int64_t k, int64_t row_bytes, const Packed& w) {
  const int64_t most = INT32_MAX - 2048;  // the last tile or turn goes so far beyond the end
  const int64_t turns = (m + 127) / 128 * w.groups;
  if (m > most || n > most || k > most || w.groups > most || turns > most || w.table_ints() > most)
    return "a size that int32 cannot number";
  if (k < 1) return "x must have at least one column";
  if (x % 16) return "x must begin at a multiple of 16 bytes";
  if (row_bytes % 16) return "rows of x must lie a multiple of 16 bytes apart";
  return nullptr;
}

}  // namespace sparse_prune::sm90
