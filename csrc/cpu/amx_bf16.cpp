// bf16 by AMX: 2x2 tiles of 16 rows x 16 outputs, x read in place, weights in the pair order that tdpbf16ps and vdpbf16ps share.
#include "kernels.h"
#include "target.h"

#if SPARSE_PRUNE_X86
#include <immintrin.h>
#include <cstring>
#ifdef SPARSE_PRUNE_EMULATE_AMX
SPARSE_PRUNE_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prfchw")
#else
SPARSE_PRUNE_TARGET("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prfchw")
#endif

namespace sparse_prune {
namespace {
#include "activations.h"
#include "amx_tile.h"
#include "avx512.h"
#include "tile_kernel.h"

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

// Loads the configuration unless this thread has it already: ldtilecfg also clears every tile.
void configure(int64_t step) {
  TileConfig want = {}, have = {};
  want.palette = 1;
  for (int t = 0; t < 8; ++t) {
    want.rows[t] = kTile;
    want.row_bytes[t] = 4 * kTile;
  }
  for (int t = 4; t < 6; ++t) want.row_bytes[t] = static_cast<uint16_t>(2 * step);  // x: [16][step]
  for (int t = 6; t < 8; ++t) want.rows[t] = static_cast<uint8_t>(step / 2);        // weights: [step / 2][16][2]
  tile_store_config(&have);
  if (memcmp(&want, &have, sizeof want) != 0) tile_load_config(&want);
}

// MT * 16 rows by NT * 16 outputs, accumulated over the column list of one block-row.
template <int MT, int NT>
void amx_tile(const LinearArgs& a, int64_t step, const uint16_t* x, const uint16_t* w, int64_t begin, int64_t end, const uint16_t* bias,
              const uint16_t* residual, uint16_t* y, const Finish& f) {
  tile_zero<0>();
  if (NT > 1) tile_zero<1>();
  if (MT > 1) tile_zero<2>();
  if (MT > 1 && NT > 1) tile_zero<3>();
  const int64_t x_stride = 2 * a.ldx, w_stride = 4 * a.R;  // bytes
  for (int64_t e = begin; e < end; ++e) {
    const int64_t k0 = a.col[e] * a.C;
    const int64_t inputs = a.K - k0 < a.C ? a.K - k0 : a.C;
    const uint16_t* wb = w + (a.block ? a.block[e] : e) * a.C * a.R;  // [C / 2][R][2]
    for (int64_t k = 0; k < inputs; k += step) {
      tile_load<6>(wb + k * a.R, w_stride);                                         // [step / 2][16][2]
      if (NT > 1) tile_load<7>(wb + k * a.R + 2 * kTile, w_stride);                 // [step / 2][16][2]
      tile_load<4>(x + k0 + k, x_stride);                                           // [16][step]
      tile_dot_bf16<0, 4, 6>();
      if (NT > 1) tile_dot_bf16<1, 4, 7>();
      if (MT > 1) {
        tile_load<5>(x + kTile * a.ldx + k0 + k, x_stride);                         // [16][step]
        tile_dot_bf16<2, 5, 6>();
        if (NT > 1) tile_dot_bf16<3, 5, 7>();
      }
    }
  }
  alignas(64) float z[MT * kTile * NT * kTile];  // [MT * 16][NT * 16]
  constexpr int64_t ldz = NT * kTile;
  tile_store<0>(z, 4 * ldz);
  if (NT > 1) tile_store<1>(z + kTile, 4 * ldz);
  if (MT > 1) tile_store<2>(z + kTile * ldz, 4 * ldz);
  if (MT > 1 && NT > 1) tile_store<3>(z + kTile * ldz + kTile, 4 * ldz);
  finish<Bf16Weights<Avx512>>(z, ldz, bias, residual, y, f);
}

void linear(const LinearArgs& a, int64_t m0, int64_t m1, int64_t i0, int64_t i1) {
  const int64_t tiled = tiles_fit(a) ? (m1 - m0) / kTile * kTile : 0;
  if (m0 + tiled < m1) avx512_bf16_kernels()->linear(a, m0 + tiled, m1, i0, i1);
  if (tiled == 0) return;
  const int64_t step = inputs_per_step(a.C);
  configure(step);
  const auto* bias_all = static_cast<const uint16_t*>(a.bias);
  const auto* residual_all = static_cast<const uint16_t*>(a.residual);
  for (int64_t i = i0; i < i1; ++i) {
    const int64_t begin = a.crow[i], end = a.crow[i + 1];
    const int64_t outputs = a.N - i * a.R < a.R ? a.N - i * a.R : a.R;
    for (int64_t r = 0; r < outputs; r += 2 * kTile) {
      const bool two = a.R - r > kTile;
      const int64_t n = i * a.R + r;
      const int64_t wanted = two ? 2 * kTile : kTile;
      Finish f = {0, outputs - r < wanted ? outputs - r : wanted, a.N, a.activation};
      const auto* w = static_cast<const uint16_t*>(a.w) + 2 * r;
      for (int64_t m = m0; m < m0 + tiled; m += f.rows) {
        f.rows = m0 + tiled - m >= 2 * kTile ? 2 * kTile : kTile;
        const auto* x = static_cast<const uint16_t*>(a.x) + m * a.ldx;
        auto tile = f.rows > kTile ? (two ? amx_tile<2, 2> : amx_tile<2, 1>) : (two ? amx_tile<1, 2> : amx_tile<1, 1>);
        tile(a, step, x, w, begin, end, bias_all ? bias_all + n : nullptr, residual_all ? residual_all + m * a.N + n : nullptr,
             static_cast<uint16_t*>(a.y) + m * a.N + n, f);
      }
    }
  }
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
