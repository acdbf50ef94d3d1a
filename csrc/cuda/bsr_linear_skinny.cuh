// y[M, N] = act(x[M, K] @ W[N, K]^T + bias) + residual for up to 64 tokens, where the bytes of the weight are the wall.
//
// A block makes 16 * kUnits outputs of all tokens; its warps share the weights of these outputs among them (split-K within the block)
// and add their sums through shared memory, always in the same order. Each weight is read once in the whole grid, 16 bytes a lane,
// straight to registers: y^T = W x^T, so a unit of the layout is the left operand of one mma and 8 tokens are the right one. Lanes
// read x as it lies: L2 keeps it for all blocks.
#pragma once

#include "epilogue.cuh"
#include "ptx.cuh"

namespace sparse_prune::device {

// Where a row's weights at 16 inputs are: the column, in units of 16 inputs, and the number of the first unit.
using Piece = int2;

// Numbers of shared memory between the sums of two tokens: 16-byte aligned, and four tokens in different banks.
template <int kUnits>
constexpr int kSkinnyStride = 16 * kUnits + 4;

template <typename T, int kTokenTiles, int kUnits, class Ending>
__device__ __forceinline__ void bsr_linear_skinny(const T* __restrict__ x, const uint4* __restrict__ weights,
                                                  const int* __restrict__ starts, const Piece* __restrict__ pieces,
                                                  const Ending& epilogue, int M, int K, int64_t ldx, int row_units,
                                                  int order) {
  static_assert(sizeof(T) == 2, "fragments hold pairs of 16-bit numbers, or of pairs of int8.");
  // Pieces whose loads are on their way together: as many as registers allow beside the sums, 128 a thread and none spilled.
  constexpr int kBatch = kTokenTiles == 2 ? 8 : 2 / kUnits;
  extern __shared__ __align__(16) int shared_sums[];  // [warps, tokens, kSkinnyStride]
  Sum<T>* partial = reinterpret_cast<Sum<T>*>(shared_sums);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const bool left = order == kLeftOrder;
  const int parts = row_units / kUnits, row = blockIdx.x / parts, first_unit = blockIdx.x % parts * kUnits;
  const int begin = starts[row], share = (starts[row + 1] - begin + warps - 1) / warps;
  const int from = begin + warp * share, to = min(from + share, starts[row + 1]);

  const T* x_from[kTokenTiles];  // of tokens lane / 4 + 8 i; the last token stands for those past the end
#pragma unroll
  for (int i = 0; i < kTokenTiles; ++i) x_from[i] = x + min(lane / 4 + 8 * i, M - 1) * ldx + lane % 4 * 2;

  Sum<T> sums[kUnits][kTokenTiles][4] = {};  // [outputs / 16, tokens / 8, fragment]
  for (int some = from; some < to; some += 32) {
    const Piece mine = pieces[min(some + lane, to - 1)];
    const int count = min(32, to - some);
    for (int p = 0; p < count; p += kBatch) {
      uint4 w[kBatch][kUnits];
      uint32_t b[kBatch][kTokenTiles][2];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int column = __shfl_sync(~0u, mine.x, (p + j) % 32), unit = __shfl_sync(~0u, mine.y, (p + j) % 32);
        if (p + j >= count) break;
#pragma unroll
        for (int u = 0; u < kUnits; ++u) w[j][u] = load_once(weights + (static_cast<int64_t>(unit) + first_unit + u) * 32 + lane);
        const int k = column * 16, left = K - k - lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < kTokenTiles; ++i) {
          if (8 * i >= M) break;
          const T* at = x_from[i] + k;
          if (K - k >= 16) {
            b[j][i][0] = __ldg(reinterpret_cast<const unsigned*>(at));
            b[j][i][1] = __ldg(reinterpret_cast<const unsigned*>(at + 8));
          } else {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const auto* number = reinterpret_cast<const unsigned short*>(at) + 8 * half;
              const uint32_t low = left > 8 * half ? number[0] : 0, high = left > 8 * half + 1 ? number[1] : 0;
              b[j][i][half] = low | high << 16;
            }
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (p + j >= count) break;
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
          const uint32_t y = w[j][u].y, z = w[j][u].z, a[4] = {w[j][u].x, left ? y : z, left ? z : y, w[j][u].w};
#pragma unroll
          for (int i = 0; i < kTokenTiles; ++i) {
            if (8 * i >= M) break;
            multiply_add<T>(sums[u][i], a, b[j][i][0], b[j][i][1]);
          }
        }
      }
    }
  }

  // Lane (g, t) has outputs g and g + 8 of a unit, as its columns lie, at tokens 2t and 2t + 1.
  constexpr int kStride = kSkinnyStride<kUnits>;
  const int g = lane / 4, slot = g / 2 * 4 + g % 2;
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
#pragma unroll
    for (int i = 0; i < kTokenTiles; ++i) {
      Sum<T>* at = partial + (warp * 8 * kTokenTiles + 8 * i + lane % 4 * 2) * kStride + u * 16 + slot;
      at[0] = sums[u][i][0], at[kStride] = sums[u][i][1];
      at[2] = sums[u][i][2], at[kStride + 2] = sums[u][i][3];
    }
  }
  __syncthreads();
  for (int run = threadIdx.x; run < M * 4 * kUnits; run += blockDim.x) {  // four adjacent outputs of one token
    const int m = run / (4 * kUnits), q = run % (4 * kUnits);
    Sum<T> v[4] = {};
    for (int other = 0; other < warps; ++other) {
      const Sum<T>* part = partial + (other * 8 * kTokenTiles + m) * kStride + q * 4;
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] += part[i];
    }
    const int unit = first_unit + q / 4;
    const int within = order != kRightOrder ? first_unit * 16 + q * 4 : unit / 2 * 32 + q % 4 * 8 + unit % 2 * 4;
    epilogue.store(v, m, row * row_units * 16 + within);
  }
}

}  // namespace sparse_prune::device
