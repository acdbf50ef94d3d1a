// y[M, N] = act(x[M, K] @ W[N, K]^T + bias) + residual for many tokens, by cp.async, ldmatrix and mma.sync.
//
// A block of 8 warps makes 64 * kTokenTiles tokens x 128 outputs, or 192 tokens where it could make 256 (LinearLaunch says where). The
// outputs are those of several block-rows ("rows" below, at most 64 outputs each: a block-row of 128 is two rows) that share one walk
// over the union of their columns, 64 inputs a step (rows of 16: 32). Each step copies x at those inputs; a warp reads and multiplies
// only the blocks that its rows have, so zeros cost neither bytes nor multiplications. Steps go in turns of all stages, whose
// instructions are few; the last ones of a tile, which have nothing to copy or inputs past the end, in a loop of their own.
//
// Warps w and w + 4 share a sub-core of the SM. They have the same tokens, the first the rows of group 0 and the second those of
// group 1: every sub-core then multiplies every block once for its quarter of the tokens, and no mask can make one of them wait.
//
// The weights of a group lie in global memory in the order in which it uses them, each 16 x 16 unit as the 16 bytes that each lane
// passes to two mma, so that a warp reads on in one stream whatever blocks there are: straight into registers, a few units ahead. Four
// warps read each, three of them from L1. Rows of 16 have too little to multiply between two units for that: theirs pass through
// shared memory. Columns of the unit are permuted so that a lane's sums are 4 (rows of 16) or 8 adjacent outputs of a token.
// How much each resource is busy, and what the loop's instructions are: docs/gpu-performance.md.
#pragma once

#include "epilogue.cuh"
#include "ptx.cuh"

namespace sparse_prune::device {

// A step of a tile as one thread reads it: there are four, for group 0 and 1 and within each for the first and the second column of a
// pair of columns of 16 inputs, which are copied together.
//   .x, .y   number of that column of the first and of the second pair, of those of 16 inputs; of another one where there is none
//   .z       which of the group's rows have weights there: bit 1 + kGroupRows * column + row (to test bit 0 takes two instructions).
//            Rows of 16: from bit 17 on the other group's; else from 9 and 17 on those of the two steps that follow. From bit 25 on:
//            how many steps of the tile follow, or 63.
//   .w       rows of 16: number of the first of these weights' units; order: group, column, row. Else 1: see `behind`
using Step = int4;
constexpr int kStepThreads = 4;
constexpr int kColumnBytes = 32;
constexpr uint32_t kFollowing = 1u << 25;

// A tile: where its steps begin, how many there are, where the weights of each group begin, in units (rows of 16: nothing), and its
// rows (row v is outputs v * kRow ...), -1 for none.
struct Tile {
  int first, steps, units[2];
  int rows[8];
};

template <int kRow, int kTokenTiles>
struct Sm80Tile {
  static constexpr int kThreads = 256;
  static constexpr int kBlockM = 64 * kTokenTiles;
  static constexpr bool kStaged = kRow == 16;  // weights pass through shared memory
  static constexpr int kColumns = kStaged ? 2 : 4;
  // 256 tokens: one block an SM, whose copies two or three stages cover, in 100 KB (8.6, 8.9, 12.0). 128 tokens: two blocks an SM, there
  // one with rows of 16.
  static constexpr int kStages = kStaged ? 4 : 3;
  static constexpr int kTokenBytes = kColumns * 32;
  static constexpr int kXBytes = kBlockM * kTokenBytes;
  static constexpr int kStageBytes = kXBytes + (kStaged ? kTileOutputs * kTokenBytes : 0);
  static constexpr int kSharedBytes = kStages * kStageBytes;
};

// What block `number` makes where tiles have rows of tokens as LinearLaunch says: outputs of which tile, from token m0 on, and, returned
// (in a struct with the others it would become a predicate anew in each turn), whether of kLowTokens only. config.cpp has the same
// order.
template <int kBlockM>
__device__ __forceinline__ bool find_place(int number, int M, int tiles, int tall, int whole, int& tile, int& m0) {
  int rows = tall, first = 0;
  bool low = false;
  m0 = 0;
  if (kBlockM == kTallTokens && number >= tall * tiles) {
    const int swapped = whole > 0 ? 4 * (tiles - whole) : 0;
    number -= tall * tiles, m0 = tall * kTallTokens;
    if (number < 3 * whole) {
      rows = 3, first = tiles - whole;
    } else if (low = true, number -= 3 * whole; number < swapped) {
      rows = 4;
    } else {
      number -= swapped, m0 += whole > 0 ? kSwapTokens : 0;
      rows = (M - m0 + kLowTokens - 1) / kLowTokens;
    }
  }
  constexpr int kSet = kSetTokens / kBlockM;
  const int set = number / (kSet * tiles) * kSet, in_set = min(kSet, rows - set), at = number % (kSet * tiles);
  tile = first + at / in_set, m0 += (set + at % in_set) * (low ? kLowTokens : kBlockM);
  return low;
}

template <int kValue>
struct Number {
  static constexpr int value = kValue;
  __device__ constexpr operator int() const { return kValue; }
};

// from + count * kEach: a product and sum of 64 bits, one instruction where a sum alone takes two, if no compiler knows count.
template <int kEach, typename P>
__device__ __forceinline__ const P* behind(const P* from, uint32_t count) {
  return reinterpret_cast<const P*>(reinterpret_cast<const char*>(from) + static_cast<uint64_t>(count) * (kEach * sizeof(P)));
}

// kTogether: columns of 16 inputs that a row has or lacks together, 2 where blocks are 32 wide or wider. ragged: how many of a tile's
// last steps may have columns that end beyond K.
template <typename T, int kRow, int kTogether, int kTokenTiles, class Ending>
__device__ __forceinline__ void bsr_linear_sm80(const T* __restrict__ x, const uint4* __restrict__ weights,
                                                const Tile* __restrict__ tiles, const Step* __restrict__ steps,
                                                const Ending& epilogue, int M, int K, int64_t ldx, int tile_count, int tall,
                                                int whole, int ragged) {
  using Shape = Sm80Tile<kRow, kTokenTiles>;
  static_assert(sizeof(T) == 2, "fragments hold pairs of 16-bit numbers, or of pairs of int8.");
  static_assert(kRow == 16 || kRow == 32 || kRow == 64, "a row is a whole number of units and at most one group.");
  static_assert(kTogether == 1 || (kTogether == 2 && !Shape::kStaged), "units of rows of 16 lie column by column.");
  constexpr int kColumns = Shape::kColumns, kPairs = kColumns / 2, kTokenBytes = Shape::kTokenBytes;
  constexpr int kGroupRows = 64 / kRow;           // rows of a group
  constexpr int kUnits = kRow / kUnit;            // units of a row in one column
  constexpr int kPiece = kUnits * kTogether;      // units that are multiplied under one condition
  constexpr int kHeld = kPiece < kTokenTiles ? kPiece : kTokenTiles;  // units in registers, most of them on their way
  constexpr int kLoaded = kGroupRows == 1 ? 1 : kTogether;            // columns of x in registers
  static_assert(kHeld <= kSpareUnits && kPiece % kHeld == 0, "what is read behind the last unit lies in the layout.");
  extern __shared__ __align__(128) char shared[];
  const int thread = threadIdx.x, lane = thread % 32, slice = thread / 32 % 4, group = thread / 128;

  int tile_number, m0;
  const bool low = find_place<Shape::kBlockM>(blockIdx.x, M, tile_count, tall, whole, tile_number, m0);
  const Tile& tile = tiles[tile_number];
  const int count = tile.steps;
  // Of every 64 tokens four warps have 16 each, so what a low tile lacks is the same part of each one's work: instructions become
  // predicated, and no more of them.
  auto has_tokens = [&](int i) { return i < kLowTokens / 64 || !low; };

  // Thread t copies 16 bytes of token t / 4 of every 64, a quarter of a pair of columns. The pieces of 16 bytes of tokens are exchanged
  // so that the eight rows of one ldmatrix lie in eight different sets of banks, and so do the eight threads that write together.
  const int piece = thread % 4, quad = thread / 4;
  const int token = kColumns == 2 ? quad : (quad & ~7) | (quad & 1) << 2 | (quad >> 1 & 3);
  auto exchange = [](int token) { return kColumns == 2 ? token / 2 % 4 : token % 8; };
  // Steps to spare lie behind the last one, so that looking ahead needs no check.
  const Step* step = steps + tile.first * kStepThreads + group * 2 + piece / 2;
  const char* x_from[kTokenTiles];  // in place of tokens past the end the last one is read
#pragma unroll
  for (int i = 0; i < kTokenTiles; ++i) {
    x_from[i] = reinterpret_cast<const char*>(x + min(m0 + token + 64 * i, M - 1) * ldx) + piece % 2 * 16;
    asm("" : "+l"(x_from[i]));  // or what it is made of would stay in registers beside it
  }
  const uint32_t base = shared_address(shared);
  uint32_t x_to[kPairs];
#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair) x_to[pair] = base + token * kTokenBytes + ((pair * 4 + piece) ^ exchange(token)) * 16;
  const uint32_t w_to = base + Shape::kXBytes + thread * 16;

  // to_end: with zeros for inputs past the end: weights there are zero, but NaN times zero is not.
  const int row_bytes = 2 * K - piece % 2 * 16;
  auto load = [&](const Step& s, int stage, auto to_end) {
    const uint32_t columns[2] = {static_cast<uint32_t>(s.x), static_cast<uint32_t>(s.y)};
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      const int bytes = min(16, max(0, row_bytes - static_cast<int>(columns[pair]) * kColumnBytes));
#pragma unroll
      for (int i = 0; i < kTokenTiles; ++i) {
        if (!has_tokens(i)) continue;
        const uint32_t to = x_to[pair] + stage * Shape::kStageBytes + i * 64 * kTokenBytes;
        if constexpr (!to_end)
          copy_async(to, behind<kColumnBytes>(x_from[i], columns[pair]));
        else
          copy_async(to, behind<kColumnBytes>(x_from[i], bytes ? columns[pair] : 0), bytes);
      }
    }
    if constexpr (Shape::kStaged) {
      const int pieces = __popc(s.z & (kFollowing - 1)) * 32;
      const uint4* from = weights + static_cast<int64_t>(s.w) * 32 + thread;
      if (thread < pieces) copy_async(w_to + stage * Shape::kStageBytes, from);
      if (thread + 256 < pieces) copy_async(w_to + stage * Shape::kStageBytes + 4096, from + 256);
    }
  };

  Sum<T> sums[kTokenTiles][kGroupRows][kUnits][2][4] = {};  // [tokens / 16, rows, outputs / 16, outputs / 8, fragment]
  uint4 w[kHeld];                                           // fragments of 16 inputs x 2 * 8 outputs
  const uint4* w_from = weights + static_cast<int64_t>(tile.units[group]) * 32 + lane;
  const uint32_t one = Shape::kStaged ? 1 : step[0].w;
  if constexpr (!Shape::kStaged) {
#pragma unroll
    for (int unit = 0; unit < kHeld; ++unit) w[unit] = load_read_only(w_from + unit * 32);
  }

  constexpr int kAhead = Shape::kStages - 1;
#pragma unroll
  for (int s = 0; s < kAhead; ++s) {
    if (s < count) load(step[s * kStepThreads], s, Number<1>());
    copies_commit();
  }
  // of the first column; others differ in the bits of 32 and 64
  const uint32_t a_from = base + (slice * 16 + lane % 16) * kTokenBytes + (lane / 16 ^ exchange(lane % 16)) * 16;
  Step ahead = step[kAhead * kStepThreads];
  uint32_t next = step[0].z, rows = 0;
  // One step. in_turn: one of a turn of all stages, each a constant, with a whole step to copy. The first of them looks up rows for all.
  auto run = [&](auto stage, auto in_turn) {
    constexpr bool kShared = in_turn && !Shape::kStaged, kAlike = in_turn && kTogether == 2 && kGroupRows == 2;
    const int at = stage * Shape::kStageBytes;
    // All lanes of a warp have the same: said so, branches need no bookkeeping of those that diverge.
    if (!kShared || stage == 0) rows = __reduce_or_sync(~0u, next);
    copies_wait<Shape::kStages - 2>();
    __syncthreads();  // the copies of all threads have arrived, and all warps have left the stage that is filled next
    const int fill = stage + kAhead < Shape::kStages ? stage + kAhead : stage - 1;
    if constexpr (in_turn) {
      load(ahead, fill, Number<0>());
    } else {
      if (rows >= kAhead * kFollowing) load(ahead, fill, Number<1>());
    }
    copies_commit();
    const int first = kShared ? 8 * stage + 1 : 1;  // bit of rows
    const Step* here = step + (in_turn ? stage : 0) * kStepThreads;
    if constexpr (!kShared)
      next = here[kStepThreads].z;
    else if (stage == Shape::kStages - kAhead)
      next = ahead.z;
    ahead = here[(kAhead + 1) * kStepThreads];
    uint32_t b = base + Shape::kXBytes + at + lane * 16;
    if constexpr (Shape::kStaged) {
      if (group) b += __popc(rows >> 16 & 0x1ff) * (kUnits * 512);
    }
#pragma unroll
    for (int column = 0; column < kColumns; column += kTogether) {
      const bool some = (rows & ((1u << kGroupRows) - 1) << (first + kGroupRows * column)) != 0;
      if constexpr (kAlike) {
        if (column == 0 && !some) break;  // in turns a group has both blocks of a step or none
      } else {
        if (!some) continue;
      }
      uint32_t a[kLoaded][kTokenTiles][4];  // [columns, tokens / 16] fragments of 16 tokens x 16 inputs
      auto load_a = [&](int c) {
#pragma unroll
        for (int i = 0; i < kTokenTiles; ++i)
          if (has_tokens(i)) load_matrix(a[c % kLoaded][i], (a_from ^ (column + c) * kColumnBytes) + at + i * 64 * kTokenBytes);
      };
#pragma unroll
      for (int c = 0; c < kLoaded; ++c) load_a(c);
      auto has = [&](int row) { return (rows & 1u << (first + kGroupRows * column + row)) != 0; };
      auto multiply = [&](int row) {
#pragma unroll
        for (int unit = 0; unit < kPiece; ++unit) {
          const int c = unit / kUnits;
          if (c >= kLoaded && unit % kUnits == 0) load_a(c);
          uint4& v = w[unit % kHeld];
          if constexpr (Shape::kStaged) v = load_shared(b + unit * 512);
#pragma unroll
          for (int i = 0; i < kTokenTiles; ++i) {
            if (!has_tokens(i)) continue;
            multiply_add<T>(sums[i][row][unit % kUnits][0], a[c % kLoaded][i], v.x, v.y);
            multiply_add<T>(sums[i][row][unit % kUnits][1], a[c % kLoaded][i], v.z, v.w);
          }
          if constexpr (!Shape::kStaged) v = load_read_only(w_from + (unit + kHeld) * 32);
        }
        b += kPiece * 512;
        w_from = behind<kPiece * 32>(w_from, one);
      };
      if constexpr (kGroupRows == 2) {
        if (has(0)) {
          multiply(0);
          if (!has(1)) continue;
        }
        multiply(1);  // it has one of them
      } else {
#pragma unroll
        for (int row = 0; row < kGroupRows; ++row)
          if (kGroupRows == 1 || has(row)) multiply(row);
      }
    }
  };
  const int least = Shape::kStages + kAhead + ragged;  // steps that are left where a turn begins, so that each of it has one to copy
  uint32_t following = (least + (Shape::kStaged ? 0 : Shape::kStages - 1)) * kFollowing;
  asm("" : "+r"(following));  // or each turn computes it again
  for (bool turn = count >= least; turn; turn = rows >= following) {
    run(Number<0>(), Number<1>());
    run(Number<1>(), Number<1>());
    run(Number<2>(), Number<1>());
    if constexpr (Shape::kStages == 4) run(Number<3>(), Number<1>());
    step = behind<Shape::kStages * kStepThreads>(step, one);
  }
  if (count > 0) {
    int stage = 0;
#pragma unroll 1
    do {
      run(stage, Number<0>());
      stage = stage + 1 < Shape::kStages ? stage + 1 : 0;
      step += kStepThreads;
    } while (rows >= kFollowing);
  }

  // A loop that is not unrolled, over registers that move: the activation's code then stands here once, not kTokenTiles times.
#pragma unroll 1
  for (int i = 0; i < kTokenTiles && has_tokens(i); ++i) {
    const int m = m0 + i * 64 + slice * 16 + lane / 4;
#pragma unroll
    for (int row = 0; row < kGroupRows; ++row) {
      const int v = tiles[tile_number].rows[group * kGroupRows + row];
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
