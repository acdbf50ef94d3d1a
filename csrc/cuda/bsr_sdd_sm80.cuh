// dvalues[b] = dy[:, outputs of b]^T @ x[:, inputs of b] for each stored block b, summed over all tokens: the gradient of the weights
// that exist, by cp.async, ldmatrix and mma.sync.
//
// A job is up to 64 units (16 outputs x 16 inputs) of a tile: its 128 outputs at up to 24 of the columns of 16 inputs that these rows
// have. Each step copies 16 tokens of dy at the outputs and of x at the columns, once for all units between them. The units are dealt
// to the 8 warps in equal shares, whatever the mask, in order of their rows, so that a warp keeps its piece of dy while it meets x.
// Where jobs are few they share the tokens, and a second kernel adds the parts in their order: the result never varies.
#pragma once

#include "epilogue.cuh"
#include "ptx.cuh"

namespace sparse_prune::device {

struct SddJob {
  int rows[8];      // dy to copy, in units of 16 outputs; -1 for none
  int columns[24];  // x to copy, in units of 16 inputs; -1 for none
  // Of warp w: slots[w * 8 / kUnits ...], -1 behind the last one.
  //   .x   place of its rows in `rows` + 256 * place of its column in `columns`
  //   .y   where it goes: the number of its first element in dvalues, divided by 16
  int2 slots[64];
};

static_assert(sizeof(SddJob) == 4 * kJobInts, "jobs are rows of a table.");

struct SddShape {
  static constexpr int kThreads = 256;
  static constexpr int kStages = 3;             // two blocks an SM, also in 100 KB (8.6, 8.9, 12.0)
  static constexpr int kPieces = 32;            // 8 of dy, 24 of x: 16 tokens x 16 numbers each
  static constexpr int kStageBytes = kPieces * 512;
  static constexpr int kSharedBytes = kStages * kStageBytes;
};

// kUnits: units one below the other that have one slot, 2 where a block-row has 32 outputs or more. C: inputs of a block.
template <typename T, int kUnits>
__device__ __forceinline__ void bsr_sdd_sm80(const T* __restrict__ dy, const T* __restrict__ x, const SddJob* __restrict__ jobs,
                                             T* __restrict__ dvalues, float* __restrict__ parts, int M, int N, int K, int64_t ldy,
                                             int64_t ldx, int C, int job_count, int splits, int64_t size) {
  static_assert(sizeof(T) == 2, "fragments hold pairs of 16-bit numbers.");
  constexpr int kSlots = 8 / kUnits, kStages = SddShape::kStages;
  extern __shared__ __align__(128) char shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const SddJob& job = jobs[blockIdx.x % job_count];
  const int part = blockIdx.x / job_count, share = ((M + 15) / 16 + splits - 1) / splits;  // steps of 16 tokens
  const int first = part * share * 16, count = min(share, (M - first + 15) / 16);

  // Warp w copies pieces w, w + 8, w + 16, w + 24; a lane 16 bytes of token lane / 2. The halves of a token's 32 bytes are swapped
  // where its number has the bit 4, so that the eight rows of one ldmatrix lie in eight different sets of banks.
  const T* from[4];
  int bytes[4];  // of these 16 that exist; -1: nothing to copy
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int unit = i == 0 ? job.rows[warp] : job.columns[warp + 8 * i - 8];
    const int at = unit * 16 + lane % 2 * 8;
    bytes[i] = unit < 0 ? -1 : max(0, min(16, ((i == 0 ? N : K) - at) * 2));
    from[i] = bytes[i] <= 0 ? dy : i == 0 ? dy + at : x + at;
  }
  const uint32_t base = shared_address(shared);
  const uint32_t to = base + warp * 512 + lane / 2 * 32 + (lane % 2 ^ (lane / 8 % 2)) * 16;
  auto load = [&](int step, int stage) {
    const int m = first + step * 16 + lane / 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (bytes[i] < 0) continue;
      const bool inside = m < M && bytes[i] > 0;  // zeros stand for tokens, outputs and inputs past the end
      copy_async(to + stage * SddShape::kStageBytes + i * 4096, inside ? from[i] + m * (i == 0 ? ldy : ldx) : dy,
                 inside ? bytes[i] : 0);
    }
  };

  int slots[kSlots];
#pragma unroll
  for (int j = 0; j < kSlots; ++j) slots[j] = job.slots[warp * kSlots + j].x;
  float sums[kSlots][kUnits][2][4] = {};  // [slots, outputs / 16, inputs / 8, fragment]
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < count) load(s, s);
    copies_commit();
  }
  // Both operands lie token by token, and both want the transpose. Matrices of an ldmatrix: tokens 0-7 of numbers 0-7 and 8-15, then
  // tokens 8-15.
  const uint32_t lane_from = (lane % 8 + lane / 16 * 8) * 32 + (lane / 8 % 2 ^ (lane / 4 % 2)) * 16;
  for (int step = 0, stage = 0; step < count; ++step) {
    copies_wait<kStages - 2>();
    __syncthreads();  // the copies of all threads have arrived, and all warps have left the stage that is filled next
    const int fill = stage == 0 ? kStages - 1 : stage - 1;
    if (step + kStages - 1 < count) load(step + kStages - 1, fill);
    copies_commit();
    const uint32_t at = base + stage * SddShape::kStageBytes + lane_from;
    uint32_t a[kUnits][4];  // [outputs / 16] fragments of 16 outputs x 16 tokens
    int rows = -1;
#pragma unroll
    for (int j = 0; j < kSlots; ++j) {
      if (slots[j] < 0) break;
      if (rows != slots[j] % 256) {
        rows = slots[j] % 256;
#pragma unroll
        for (int u = 0; u < kUnits; ++u) load_matrix_transposed(a[u], at + (rows + u) * 512);
      }
      uint32_t b[4];  // fragments of 16 tokens x 2 * 8 inputs
      load_matrix_transposed(b, at + (8 + slots[j] / 256) * 512);
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        multiply_add<T>(sums[j][u][0], a[u], b[0], b[2]);
        multiply_add<T>(sums[j][u][1], a[u], b[1], b[3]);
      }
    }
    stage = stage == kStages - 1 ? 0 : stage + 1;
  }

#pragma unroll
  for (int j = 0; j < kSlots; ++j) {
    if (slots[j] < 0) break;
    const int64_t unit_at = static_cast<int64_t>(job.slots[warp * kSlots + j].y) * 16;
#pragma unroll
    for (int e = 0; e < kUnits * 4; ++e) {  // a lane has outputs lane / 4 and lane / 4 + 8 of a unit, at inputs 2 * (lane % 4) of 8
      const int u = e / 4, mma = e / 2 % 2, below = e % 2;
      const int64_t at = unit_at + (u * 16 + below * 8 + lane / 4) * C + mma * 8 + lane % 4 * 2;
      const float low = sums[j][u][mma][2 * below], high = sums[j][u][mma][2 * below + 1];
      if (splits > 1) {
        *reinterpret_cast<float2*>(parts + part * size + at) = make_float2(low, high);
      } else {
        *reinterpret_cast<uint32_t*>(dvalues + at) = round_pair(low, high, T());
      }
    }
  }
}

// to[size] = sum of parts[splits, size], in their order, rounded once; size is a multiple of 4. Threads of a grid of 256 each.
template <typename T>
__device__ __forceinline__ void sum_parts(const float* __restrict__ parts, T* __restrict__ to, int64_t size, int splits) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x) * 4;
  if (at >= size) return;
  float4 sum = *reinterpret_cast<const float4*>(parts + at);
  for (int part = 1; part < splits; ++part) {
    const float4 more = *reinterpret_cast<const float4*>(parts + part * size + at);
    sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
  }
  *reinterpret_cast<uint2*>(to + at) = make_uint2(round_pair(sum.x, sum.y, T()), round_pair(sum.z, sum.w, T()));
}

}  // namespace sparse_prune::device
