// bf16 by AMX: 2x2 tiles of 16 rows x 16 outputs, x read in place, weights in the pair order that tdpbf16ps and vdpbf16ps share.
#include "kernels.h"
#include "target.h"

#if SPARSE_PRUNE_X86
#include <immintrin.h>
#include <cstring>
#ifdef SPARSE_PRUNE_EMULATE_AMX
SPARSE_PRUNE_TARGET("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prfchw")
#else
SPARSE_PRUNE_TARGET("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prfchw")
#endif

namespace sparse_prune {
namespace {
#include "activations.h"
#include "amx_tile.h"
#include "avx512.h"
#include "tile_kernel.h"
#include "avx512_bf16.h"

constexpr int kTile = 16;  // rows of a tile, and floats in one of its rows

// Inputs per tile product: the largest even divisor of C that a tile row of 64 bytes holds.
int64_t inputs_per_step(int64_t C) {
  for (int64_t step = 2 * kTile; step > 0; step -= 2)
    if (C % step == 0) return step;
  return 0;
}

// Below 8 inputs a step the tile loads cost more than vdpbf16ps; a cut last block must still hold whole steps.
bool tiles_fit(const LinearArgs& a) {
  const int64_t step = inputs_per_step(a.C);
  return a.R % kTile == 0 && step >= 8 && a.K % step == 0;
}

// Loads the configuration unless this thread has it already: ldtilecfg also clears every tile. rows: of x and of the sums, at most 16.
void configure(int64_t step, int64_t rows) {
  TileConfig want = {}, have = {};
  want.palette = 1;
  for (int t = 0; t < 8; ++t) {
    want.rows[t] = static_cast<uint8_t>(t < 6 ? rows : step / 2);                                // weights: [step / 2][16][2]
    want.row_bytes[t] = static_cast<uint16_t>(t == 4 || t == 5 ? 2 * step : 4 * kTile);          // x: [rows][step]
  }
  tile_store_config(&have);
  if (memcmp(&want, &have, sizeof want) != 0) tile_load_config(&want);
}

// MT * rows rows (rows is 16 where MT is 2) by NT * 16 outputs, accumulated over the blocks [begin, end) of one block-row.
template <int MT, int NT>
void amx_tile(const LinearArgs& a, int64_t step, int64_t rows, const uint16_t* x, const uint16_t* w, int64_t begin, int64_t end,
              const Place<DotBf16>& at) {
  tile_zero<0>();
  if (NT > 1) tile_zero<1>();
  if (MT > 1) tile_zero<2>();
  if (MT > 1 && NT > 1) tile_zero<3>();
  const int64_t x_stride = 2 * a.ldx, w_stride = 4 * a.R;  // bytes
  for (int64_t e = begin; e < end; ++e) {
    const int64_t k0 = a.col[e] * a.C;
    const int64_t inputs = a.K - k0 < a.C ? a.K - k0 : a.C;
    const uint16_t* wb = w + (a.block ? a.block[e] : e) * a.C * a.R;  // [C / 2][R][2]
    if (e + 1 < end) {  // the next block's x is anywhere in the row, which no hardware prefetcher can know
      const uint16_t* next = x + a.col[e + 1] * a.C;
      for (int64_t j = 0; j < a.C; j += 32)
        for (int64_t m = 0; m < MT * rows; ++m) prefetch(next + m * a.ldx + j);
    }
    for (int64_t k = 0; k < inputs; k += step) {
      tile_load<6>(wb + k * a.R, w_stride);                                         // [step / 2][16][2]
      if (NT > 1) tile_load<7>(wb + k * a.R + 2 * kTile, w_stride);                 // [step / 2][16][2]
      tile_load<4>(x + k0 + k, x_stride);                                           // [rows][step]
      tile_dot_bf16<0, 4, 6>();
      if (NT > 1) tile_dot_bf16<1, 4, 7>();
      if (MT > 1) {
        tile_load<5>(x + kTile * a.ldx + k0 + k, x_stride);                         // [rows][step]
        tile_dot_bf16<2, 5, 6>();
        if (NT > 1) tile_dot_bf16<3, 5, 7>();
      }
    }
  }
  constexpr int64_t ldz = NT * kTile;
  alignas(64) float z[MT * kTile * ldz];  // [MT * rows][NT * 16]
  tile_store<0>(z, 4 * ldz);
  if (NT > 1) tile_store<1>(z + kTile, 4 * ldz);
  if (MT > 1) tile_store<2>(z + kTile * ldz, 4 * ldz);
  if (MT > 1 && NT > 1) tile_store<3>(z + kTile * ldz + kTile, 4 * ldz);
  if (!at.simple) return finish<DotBf16>(z, ldz, at.bias, at.residual, at.y, {MT * rows, at.cols, at.ld, a.activation});
  Avx512::F bias[NT];
  load_bias<DotBf16>(at, bias);
  for (int64_t m = 0; m < MT * rows; ++m) {
    Avx512::F sums[NT];
    for (int v = 0; v < NT; ++v) sums[v] = Avx512::load(z + m * ldz + v * kTile);
    finish_row<DotBf16>(a, at, m, bias, sums);
  }
}

// The order of linear_range: a group of block-rows, whose weights stay in L2, for one panel of 64 rows after another.
void linear(const LinearArgs& a, int64_t m0, int64_t m1, int64_t i0, int64_t i1) {
  const int64_t height = m1 - m0;
  // A tile product takes a cycle for each row, of x or of weights, whichever are more: below 8 rows vdpbf16ps is as fast.
  if (!tiles_fit(a) || height < 8) return avx512_bf16_kernels()->linear(a, m0, m1, i0, i1);
  const int64_t step = inputs_per_step(a.C), rows = height < kTile ? height : kTile;
  configure(step, rows);
  const auto* bias = static_cast<const uint16_t*>(a.bias);
  const auto* residual = static_cast<const uint16_t*>(a.residual);
  const bool past_cache = writes_past_cache<DotBf16>(a);
  for (int64_t g0 = i0, g1; g0 < i1; g0 = g1) {
    g1 = group_end(a, g0, i1, sizeof(uint16_t));
    for (int64_t p = m0; p < m1; p += 4 * kTile) {
      const int64_t panel_end = p + 4 * kTile < m1 ? p + 4 * kTile : m1;
      for (int64_t i = g0; i < g1; ++i) {
        const int64_t row_end = (i + 1) * a.R < a.N ? (i + 1) * a.R : a.N;
        for (int64_t n = i * a.R; n < row_end; n += 2 * kTile) {
          const bool two = (i + 1) * a.R - n > kTile;
          const int64_t wanted = two ? 2 * kTile : kTile, cols = row_end - n < wanted ? row_end - n : wanted;
          const bool simple = cols == wanted && a.activation == Activation::none;
          const auto* w = static_cast<const uint16_t*>(a.w) + 2 * (n - i * a.R);
          for (int64_t next = p, m; next < panel_end;) {
            const bool tall = panel_end - next > kTile && height >= 2 * kTile;
            const int64_t most = tall ? 2 * kTile : rows;
            // The last tile begins early enough to be whole: rows that it shares with the one before come out the same again.
            m = next + most <= m1 ? next : m1 - most;
            next = m + most;
            const auto* x = static_cast<const uint16_t*>(a.x) + m * a.ldx;
            auto tile = tall ? (two ? amx_tile<2, 2> : amx_tile<2, 1>) : (two ? amx_tile<1, 2> : amx_tile<1, 1>);
            tile(a, step, rows, x, w, a.crow[i], a.crow[i + 1],
                 {static_cast<uint16_t*>(a.y) + m * a.N + n, bias ? bias + n : nullptr, residual ? residual + m * a.N + n : nullptr, a.N,
                  cols, simple, past_cache && two});
          }
        }
      }
    }
  }
  if (past_cache) Avx512::fence();
}

}  // namespace

const Kernels* amx_bf16_kernels() {
  static const Kernels kernels = {"amx_bf16", true, linear, avx512_bf16_kernels()->sdd, avx512_bf16_kernels()->panels};
  return &kernels;
}

}  // namespace sparse_prune
SPARSE_PRUNE_TARGET_END
#else
const sparse_prune::Kernels* sparse_prune::amx_bf16_kernels() { return nullptr; }
#endif
