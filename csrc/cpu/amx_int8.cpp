// int8 by AMX: 2x2 tiles of 16 rows x 16 outputs. tdpbusd rather than tdpbssd, so that x and weights are those of vpdpbusd, which takes
// the rows below a tile.
#include "int8.h"
#include "target.h"

#if SPARSE_PRUNE_X86
#include <immintrin.h>
#include <cstring>
#ifdef SPARSE_PRUNE_EMULATE_AMX
SPARSE_PRUNE_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prfchw")
#else
SPARSE_PRUNE_TARGET("amx-tile,amx-int8,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prfchw")
#endif
#define SPARSE_PRUNE_AMX_INT8

namespace sparse_prune {
namespace {
#include "activations.h"
#include "amx_tile.h"
#include "avx512.h"
#include "avx512_int8.h"
#include "tile_kernel.h"
#include "int8_tile.h"

constexpr int kTile = 16;  // rows of a tile, and int32 in one of its rows

// Inputs per tile product: the largest divisor of C that is a multiple of 4 and fits a tile row of 64 bytes.
int64_t inputs_per_step(int64_t C) {
  for (int64_t step = 64; step > 0; step -= kInt8Step)
    if (C % step == 0) return step;
  return 0;
}

// Below 16 inputs a step the tile loads cost more than vpdpbusd.
bool tiles_fit(const Int8Args& a) { return a.R % kTile == 0 && inputs_per_step(a.C) >= 16; }

// Loads the configuration unless this thread has it already: ldtilecfg also clears every tile.
void configure(int64_t step) {
  TileConfig want = {}, have = {};
  want.palette = 1;
  for (int t = 0; t < 8; ++t) {
    want.rows[t] = kTile;
    want.row_bytes[t] = 4 * kTile;
  }
  for (int t = 4; t < 6; ++t) want.row_bytes[t] = static_cast<uint16_t>(step);              // x: [16][step]
  for (int t = 6; t < 8; ++t) want.rows[t] = static_cast<uint8_t>(step / kInt8Step);        // weights: [step / 4][16][4]
  tile_store_config(&have);
  if (memcmp(&want, &have, sizeof want) != 0) tile_load_config(&want);
}

// MT * 16 rows from m by NT * 16 outputs from n, of which cols exist, accumulated over the column list of block-row i.
template <int MT, int NT>
void amx_tile(const Int8Args& a, int64_t step, int64_t m, int64_t i, int64_t n, int64_t cols) {
  tile_zero<0>();
  if (NT > 1) tile_zero<1>();
  if (MT > 1) tile_zero<2>();
  if (MT > 1 && NT > 1) tile_zero<3>();
  const auto* x = static_cast<const uint8_t*>(a.x) + m * a.ldx;
  const auto* w = static_cast<const int8_t*>(a.w) + (n - i * a.R) * kInt8Step;
  const int64_t w_stride = kInt8Step * a.R;  // bytes
  for (int64_t e = a.crow[i]; e < a.crow[i + 1]; ++e) {
    const uint8_t* xb = x + a.col[e] * a.C;      // [MT * 16, C], zeros from K on
    const int8_t* wb = w + e * a.C * a.R;        // [C / 4][R][4]
    for (int64_t k = 0; k < a.C; k += step) {
      tile_load<6>(wb + k * a.R, w_stride);                                         // [step / 4][16][4]
      if (NT > 1) tile_load<7>(wb + k * a.R + kInt8Step * kTile, w_stride);         // [step / 4][16][4]
      tile_load<4>(xb + k, a.ldx);                                                  // [16][step]
      tile_dot_u8s8<0, 4, 6>();
      if (NT > 1) tile_dot_u8s8<1, 4, 7>();
      if (MT > 1) {
        tile_load<5>(xb + kTile * a.ldx + k, a.ldx);                                // [16][step]
        tile_dot_u8s8<2, 5, 6>();
        if (NT > 1) tile_dot_u8s8<3, 5, 7>();
      }
    }
  }
  constexpr int64_t ldz = NT * kTile;
  alignas(64) int32_t z[MT * kTile * ldz];  // [MT * 16][NT * 16]
  tile_store<0>(z, 4 * ldz);
  if (NT > 1) tile_store<1>(z + kTile, 4 * ldz);
  if (MT > 1) tile_store<2>(z + kTile * ldz, 4 * ldz);
  if (MT > 1 && NT > 1) tile_store<3>(z + kTile * ldz + kTile, 4 * ldz);
  for (int64_t row = 0; row < MT * kTile; ++row)
    for (int64_t j = 0; j < ldz; j += kTile) {
      int32_t* sums = z + row * ldz + j;  // [16]
      _mm512_store_si512(sums, _mm512_add_epi32(_mm512_load_si512(sums), _mm512_loadu_si512(a.offsets + n + j)));
    }
  int8_finish<Avx512Int8>(a, z, ldz, m, n, MT * kTile, cols);
}

void linear(const Int8Args& a, int64_t m0, int64_t m1, int64_t i0, int64_t i1) {
  const int64_t tiled = tiles_fit(a) ? (m1 - m0) / kTile * kTile : 0;
  if (m0 + tiled < m1) avx512_vnni_kernels()->linear(a, m0 + tiled, m1, i0, i1);
  if (tiled == 0) return;
  const int64_t step = inputs_per_step(a.C);
  configure(step);
  for (int64_t i = i0; i < i1; ++i) {
    const int64_t end = (i + 1) * a.R < a.N ? (i + 1) * a.R : a.N;
    for (int64_t n = i * a.R; n < end; n += 2 * kTile) {
      const bool two = (i + 1) * a.R - n > kTile;
      const int64_t wanted = two ? 2 * kTile : kTile, cols = end - n < wanted ? end - n : wanted;
      for (int64_t m = m0; m < m0 + tiled;) {
        const bool tall = m0 + tiled - m >= 2 * kTile;
        auto tile = tall ? (two ? amx_tile<2, 2> : amx_tile<2, 1>) : (two ? amx_tile<1, 2> : amx_tile<1, 1>);
        tile(a, step, m, i, n, cols);
        m += tall ? 2 * kTile : kTile;
      }
    }
  }
}

}  // namespace

const Int8Kernels* amx_int8_kernels() {
  static const Int8Kernels kernels = {"amx_int8", avx512_vnni_kernels()->quantize, linear};
  return &kernels;
}

}  // namespace sparse_prune
SPARSE_PRUNE_TARGET_END
#else
const sparse_prune::Int8Kernels* sparse_prune::amx_int8_kernels() { return nullptr; }
#endif
