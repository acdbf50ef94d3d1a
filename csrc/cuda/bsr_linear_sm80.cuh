// y[M, N] = act(x[M, K] @ W[N, K]^T + bias) + residual for many tokens, by cp.async, ldmatrix and mma.sync.
//
// A block of 8 warps makes 64 * kTokenTiles tokens x 128 outputs. The outputs are those of several block-rows ("rows" below, at most
// 64 outputs each: a block-row of 128 is two rows) that share one walk over the union of their columns, 32 inputs a step. Each step
// copies x at those inputs and exactly the weights that exist; a warp multiplies only the blocks that its rows have, so zeros cost
// neither bytes nor multiplications.
//
// Warps w and w + 4 share a sub-core of the SM. They have the same tokens, the first the rows of group 0 and the second those of
// group 1: every sub-core then multiplies every block once for its quarter of the tokens, and no mask can make one of them wait.
//
// The weights of a tile lie in global memory in the order in which they are used, each 16 x 16 unit as the 16 bytes that each lane
// passes to two mma. Columns of the unit are permuted so that a lane's sums are 4 (rows of 16) or 8 adjacent outputs of a token.
// How much each resource is busy, and why weights pass through shared memory here: docs/gpu-performance.md.
#pragma once

#include "epilogue.cuh"
#include "ptx.cuh"

namespace sparse_prune::device {

// One step of a tile: two columns of 16 inputs.
//   .x, .y   the columns, in units of 16 inputs; -1 where there is none
//   .z       which rows have weights there: bit i for row i in the first column, bit 8 + i in the second
//   .w       number of the first of these weights' units; order: group, column, row, 16 outputs
using Step = int4;

// A tile: where its steps begin, how many there are, and its rows (row v is outputs v * kRow ...), -1 for none.
struct Tile {
  int first, steps, unused[2];
  int rows[8];
};

template <int kTokenTiles>
struct Sm80Tile {
  static constexpr int kThreads = 256;
  static constexpr int kBlockM = 64 * kTokenTiles;
  // 256 tokens: one block an SM, whose copies three stages cover. 128 tokens: two blocks an SM, also in 100 KB (8.6, 8.9, 12.0).
  static constexpr int kStages = kTokenTiles == 4 ? 4 : 3;
  static constexpr int kXBytes = kBlockM * 64;  // 32 inputs of 2 bytes
  static constexpr int kWBytes = kTileOutputs * 64;
  static constexpr int kStageBytes = kXBytes + kWBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;
};

template <typename T, int kRow, int kTokenTiles, class Ending>
__device__ __forceinline__ void bsr_linear_sm80(const T* __restrict__ x, const uint4* __restrict__ weights,
                                                const Tile* __restrict__ tiles, const Step* __restrict__ steps,
                                                const Ending& epilogue, int M, int K, int64_t ldx, int tile_count) {
  using Shape = Sm80Tile<kTokenTiles>;
  static_assert(sizeof(T) == 2, "fragments hold pairs of 16-bit numbers, or of pairs of int8.");
  static_assert(kRow == 16 || kRow == 32 || kRow == 64, "a row is a whole number of units and at most one group.");
  constexpr int kGroupRows = 64 / kRow;  // rows of a group
  constexpr int kUnits = kRow / kUnit;   // units of a row in one column
  extern __shared__ __align__(128) char shared[];
  const int thread = threadIdx.x, lane = thread % 32, slice = thread / 32 % 4, group = thread / 128;

  // Blocks that run together share weights and x in L2: 2048 tokens pass over a tile of rows before the next one.
  constexpr int kTogether = 2048 / Shape::kBlockM;
  const int row_tiles = (M + Shape::kBlockM - 1) / Shape::kBlockM;
  const int set = blockIdx.x / (kTogether * tile_count) * kTogether;
  const int in_set = min(kTogether, row_tiles - set);
  const int place = blockIdx.x % (kTogether * tile_count);
  const Tile& tile = tiles[place / in_set];
  const int m0 = (set + place % in_set) * Shape::kBlockM;
  const Step* step = steps + tile.first;  // steps to spare lie behind the last one, so that looking ahead needs no check
  const int count = tile.steps;

  // Thread t copies 8 inputs of tokens t / 4, t / 4 + 64, ...; 4 x 16 bytes a token, swapped among pairs of tokens so that the eight
  // rows of one ldmatrix lie in eight different sets of banks. In place of tokens past the end the last one is read.
  const int piece = thread % 4;
  const T* x_from[kTokenTiles];
#pragma unroll
  for (int i = 0; i < kTokenTiles; ++i) x_from[i] = x + min(m0 + thread / 4 + 64 * i, M - 1) * ldx + piece % 2 * 8;
  const int inputs_left = K - piece % 2 * 8;
  const uint32_t base = shared_address(shared);
  const uint32_t x_to = base + thread / 4 * 64 + (piece ^ (thread / 8 % 4)) * 16;
  const uint32_t w_to = base + Shape::kXBytes + thread * 16;

  auto load = [&](const Step& s, int stage) {
    const int k = (piece < 2 ? s.x : s.y) * 16;
    if (k >= 0) {
      const uint32_t to = x_to + stage * Shape::kStageBytes;
      if (inputs_left - k >= 8) {
#pragma unroll
        for (int i = 0; i < kTokenTiles; ++i) copy_async(to + i * 4096, x_from[i] + k);
      } else {  // the last inputs, and zeros: weights there are zero, but NaN times zero is not
        const int bytes = max(0, (inputs_left - k) * 2);
#pragma unroll
        for (int i = 0; i < kTokenTiles; ++i) copy_async(to + i * 4096, bytes ? x_from[i] + k : x, bytes);
      }
    }
    const int pieces = __popc(s.z) * (kUnits * 32);
    const uint4* from = weights + static_cast<int64_t>(s.w) * 32 + thread;
    if (thread < pieces) copy_async(w_to + stage * Shape::kStageBytes, from);
    if (thread + 256 < pieces) copy_async(w_to + stage * Shape::kStageBytes + 4096, from + 256);
  };

  Sum<T> sums[kTokenTiles][kGroupRows][kUnits][2][4] = {};  // [tokens / 16, rows, outputs / 16, outputs / 8, fragment]

#pragma unroll
  for (int s = 0; s < Shape::kStages - 1; ++s) {
    if (s < count) load(step[s], s);
    copies_commit();
  }
  const uint32_t first_rows = ((1u << kGroupRows) - 1) * 0x101;  // of group 0, in both columns
  const uint32_t a_from = base + (slice * 16 * kTokenTiles + lane % 16) * 64 + ((lane / 16) ^ (lane % 16 / 2 % 4)) * 16;
  const uint32_t b_from = base + Shape::kXBytes + lane * 16;
  Step ahead = step[Shape::kStages - 1];
  uint32_t all = step[0].z;
  for (int s = 0, stage = 0; s < count; ++s) {
    copies_wait<Shape::kStages - 2>();
    __syncthreads();  // the copies of all threads have arrived, and all warps have left the stage that is filled next
    const int fill = stage == 0 ? Shape::kStages - 1 : stage - 1;
    if (s + Shape::kStages - 1 < count) load(ahead, fill);
    copies_commit();
    const uint32_t rows = all >> (group * kGroupRows);
    uint32_t b = b_from + stage * Shape::kStageBytes + (group ? __popc(all & first_rows) * (kUnits * 512) : 0);
    ahead = step[s + Shape::kStages];
    all = step[s + 1].z;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t present = rows >> (8 * half) & ((1u << kGroupRows) - 1);
      if (present == 0) continue;
      uint32_t a[kTokenTiles][4];  // [tokens / 16] fragments of 16 tokens x 16 inputs
#pragma unroll
      for (int i = 0; i < kTokenTiles; ++i) load_matrix(a[i], ((a_from + stage * Shape::kStageBytes) ^ (half * 32)) + i * 1024);
#pragma unroll
      for (int row = 0; row < kGroupRows; ++row) {
        if (!(present >> row & 1)) continue;
#pragma unroll
        for (int unit = 0; unit < kUnits; ++unit) {
          const uint4 w = load_shared(b);  // fragments of 16 inputs x 2 * 8 outputs
          b += 512;
#pragma unroll
          for (int i = 0; i < kTokenTiles; ++i) {
            multiply_add<T>(sums[i][row][unit][0], a[i], w.x, w.y);
            multiply_add<T>(sums[i][row][unit][1], a[i], w.z, w.w);
          }
        }
      }
    }
    stage = stage == Shape::kStages - 1 ? 0 : stage + 1;
  }

  // A loop that is not unrolled, over registers that move: the activation's code then stands here once, not kTokenTiles times.
#pragma unroll 1
  for (int i = 0; i < kTokenTiles; ++i) {
    const int m = m0 + (slice * kTokenTiles + i) * 16 + lane / 4;
#pragma unroll
    for (int row = 0; row < kGroupRows; ++row) {
      const int v = tile.rows[group * kGroupRows + row];
      if (v >= 0) {
        constexpr int kRun = kRow == 16 ? 4 : 8;  // adjacent outputs of a lane
#pragma unroll
        for (int run = 0; run < kRow / (4 * kRun); ++run) {
          const int n = v * kRow + run * 4 * kRun + lane % 4 * kRun;
#pragma unroll
          for (int below = 0; below < 2; ++below) {  // fragments hold tokens lane / 4 and lane / 4 + 8
            Sum<T> out[kRun];
#pragma unroll
            for (int e = 0; e < kRun; ++e) out[e] = sums[0][row][run * (kRun / 4) + e / 4][e / 2 % 2][2 * below + e % 2];
            epilogue.store(out, m + 8 * below, n);
          }
        }
      }
    }
#pragma unroll
    for (int j = 0; j + 1 < kTokenTiles; ++j) {
#pragma unroll
      for (int e = 0; e < kGroupRows * kUnits * 8; ++e) (&sums[j][0][0][0][0])[e] = (&sums[j + 1][0][0][0][0])[e];
    }
  }
}

}  // namespace sparse_prune::device
