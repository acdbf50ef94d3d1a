// bf16 by AMX: linear (amx_kernel.h), attention's products and dW, all on the pairs that tdpbf16ps and vdpbf16ps share; and float16's linear.
#include "encoder.h"
#include "target.h"

#if SPARSE_PRUNE_X86
#include <immintrin.h>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#ifdef SPARSE_PRUNE_COUNT_TILES
extern "C" int64_t tile_counts[3];  // loads, products, stores
#endif
SPARSE_PRUNE_TARGET("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prfchw")

namespace sparse_prune {
namespace {
#include "activations.h"
#include "amx_tile.h"
#include "avx512.h"
#include "tile_kernel.h"
#include "encoder_kernel.h"
#include "native_bf16.h"
#include "avx512_bf16.h"
#include "amx_kernel.h"

// bf16, or float16 in two pieces of bf16. Fmt: what y, bias and residual are.
template <class Fmt, int pieces_>
struct FloatTiles {
  using Sum = float;
  using F = Avx512::F;
  using Y = typename Fmt::Y;
  static constexpr int64_t size = 2, pieces = pieces_;
  const LinearArgs& a;
  bool past_cache;
  int64_t x_piece = 0, w_piece = 0;
  template <int C, int A, int B>
  static inline void dot() { tile_dot_bf16<C, A, B>(); }

  template <int NT>
  struct Columns {
    const LinearArgs& a;
    Place<Fmt> first;  // row 0
    F bias[NT];
    Columns(const FloatTiles& op, int64_t n, int64_t cols) : a(op.a) {
      const auto *b = static_cast<const Y*>(a.bias), *residual = static_cast<const Y*>(a.residual);
      const bool past_cache = op.past_cache && NT >= 2;
      const int64_t ahead = a.R < NT * kTile ? NT * kTile : a.R;
      first = {static_cast<Y*>(a.y) + n, b ? b + n : nullptr, residual ? residual + n : nullptr,
               a.N, cols, cols == NT * kTile, past_cache, past_cache ? 0 : ahead, a.pair == Pair::second, false, 0, n};
      if (first.whole && !converts(a)) load_bias<Fmt>(first, bias);
    }
    inline void write(const float* z, int64_t m, int64_t rows) const {
      if (converts(a)) return write_converted(z, m, rows);
      if (!first.whole) return write_edge(z, m, rows);
      const Activation activation = a.activation;
      if (activation == Activation::none && !first.residual)
        write_rows(z, m, rows, [](F) {});
      else
        write_rows(z, m, rows, [=](F& v) { v = Fmt::activate(v, activation); });
    }
    template <class Activate>
    inline void write_rows(const float* z, int64_t m, int64_t rows, const Activate& activate) const {
      const Place<Fmt> at = first;
      for (const int64_t end = m + rows; m < end; ++m, z += kTile) {
        F sums[NT];  // [NT * 16]
        SPARSE_PRUNE_UNROLL
        for (int v = 0; v < NT; ++v) {
          sums[v] = Avx512::add(Avx512::load(z + v * kTile * kTile), bias[v]);
          activate(sums[v]);
        }
        finish_row<Fmt>(at, m, sums);
      }
    }
    void write_converted(const float* z, int64_t m, int64_t rows) const {
      for (int64_t n = 0; n < first.cols; n += kTile, z += kTile * kTile)
        finish_converted<Avx512>(a, z, kTile, m, first.n + n, rows, first.cols - n < kTile ? first.cols - n : kTile);
    }
    void write_edge(const float* z, int64_t m, int64_t rows) const {
      for (int64_t n = 0; n < first.cols; n += kTile, z += kTile * kTile) {
        const int64_t at = m * a.N + n, cols = first.cols - n < kTile ? first.cols - n : kTile;
        finish<Fmt>(z, kTile, first.bias ? first.bias + n : nullptr, first.residual ? first.residual + at : nullptr, first.y + at,
                    {rows, cols, a.N, a.activation, a.pair});
      }
    }
  };
};
using Bf16Tiles = FloatTiles<DotBf16, 1>;

// Rows whose distance is not an odd number of cache lines compete for few sets of the L1 cache: those of 768 inputs take 102 cycles a step
// where 72 are due, whole pages more. A copy costs some 4 cycles a line, which pays where it is used in 4 products and more.
const char* spread_rows(const LinearArgs& a, int64_t m0, int64_t m1, int64_t i0, int64_t i1, int64_t& ldx) {
  const char* x = static_cast<const char*>(a.x) + m0 * ldx;
  const int64_t bytes = 2 * a.K, products = (a.crow[i1] - a.crow[i0]) * a.C / a.K;
  if (ldx / 64 % 2 == 1 || m1 - m0 < 2 * kTile || products < 4) return x;
  const int64_t from = ldx;
  ldx = odd_lines(bytes);
  auto* to = static_cast<char*>(thread_scratch((m1 - m0) * ldx));  // [m1 - m0, ldx]
  for (int64_t m = 0; m < m1 - m0; ++m) memcpy(to + m * ldx, x + m * from, bytes);
  return to;
}

void linear_bf16(const LinearArgs& a, int64_t m0, int64_t m1, int64_t i0, int64_t i1) {
  if (!tiles_fit(a.R, 2 * a.C, 2 * a.K, m1 - m0)) return avx512_bf16_kernels()->linear(a, m0, m1, i0, i1);
  int64_t ldx = 2 * a.ldx;
  const char* x = spread_rows(a, m0, m1, i0, i1, ldx);
  const Bf16Tiles op = {a, writes_past_cache<DotBf16>(a)};
  amx_range(op, x, ldx, 2 * a.K, m0, m1, i0, i1);
  if (op.past_cache) Avx512::fence();
}

// A float16 has 11 bits: the first 8 as a bf16 and the other 3 as a second one are the whole number, products of these are exact in float32,
// and sums are float32. Four products at 1/16 of the time of a vector's, where AVX512-FP16 would halve it and add up in float16.
using Half = HalfWeights<Avx512>;

// 16 numbers each of a and b, as store(which piece, a's, b's): the upper halves of words.
template <class Store>
inline void split(__m512 a, __m512 b, __m512& finite, const Store& store) {
  const __m512 top = _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(0xffff0000u)));
  const __m512 high_a = _mm512_and_ps(a, top), high_b = _mm512_and_ps(b, top);
  finite = _mm512_fmadd_ps(a, _mm512_setzero_ps(), finite);  // NaN once a number is not finite
  finite = _mm512_fmadd_ps(b, _mm512_setzero_ps(), finite);
  store(0, _mm512_castps_si512(high_a), _mm512_castps_si512(high_b));
  store(1, _mm512_castps_si512(_mm512_sub_ps(a, high_a)), _mm512_castps_si512(_mm512_sub_ps(b, high_b)));
}

inline bool all_finite(__m512 finite) { return _mm512_cmp_ps_mask(finite, finite, _CMP_UNORD_Q) == 0; }

// Rows [m0, m1) of x as pieces [m1 - m0][ldx bytes] of x_piece bytes, zeros from K up to x_bytes; false where a number is not finite.
bool split_x(const LinearArgs& a, int64_t m0, int64_t m1, char* to, int64_t ldx, int64_t x_piece, int64_t x_bytes) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i odd_words = _mm512_add_epi32(_mm512_mullo_epi32(lane, _mm512_set1_epi32(0x00040004)), _mm512_set1_epi32(0x00030001));
  __m512 finite = _mm512_setzero_ps();
  for (int64_t m = m0; m < m1; ++m, to += ldx) {
    const uint16_t* x = static_cast<const uint16_t*>(a.x) + m * a.ldx;
    for (int64_t k = 0; 2 * k < x_bytes; k += 32) {
      const auto load = [&](int64_t from) {
        return from + 16 <= a.K ? Half::load_y(x + from) : from < a.K ? load_edge<Half>(x + from, a.K - from) : _mm512_setzero_ps();
      };
      split(load(k), load(k + 16), finite, [&](int piece, __m512i low, __m512i high) {
        _mm512_store_si512(to + 2 * k + piece * x_piece, _mm512_permutex2var_epi16(low, odd_words, high));
      });
    }
  }
  return all_finite(finite);
}

// The weights of block-rows [i0, i1) as pieces [blocks][C / 2][R][2] of w_piece bytes; false where a number is not finite.
bool split_weights(const LinearArgs& a, int64_t i0, int64_t i1, char* to, int64_t w_piece) {
  __m512 finite = _mm512_setzero_ps();
  for (int64_t e = a.crow[i0]; e < a.crow[i1]; ++e) {
    const uint16_t* w = static_cast<const uint16_t*>(a.w) + (a.block ? a.block[e] : e) * a.R * a.C;  // [C][R]
    for (int64_t c = 0; c < a.C; c += 2, w += 2 * a.R)
      for (int64_t r = 0; r < a.R; r += 16, to += 64)
        split(Half::load_y(w + r), Half::load_y(w + a.R + r), finite, [&](int piece, __m512i first, __m512i second) {
          _mm512_store_si512(to + piece * w_piece, _mm512_or_si512(_mm512_srli_epi32(first, 16), second));
        });
  }
  return all_finite(finite);
}

// Weights are split for each pass of x, which is lost on few rows. Infinity and NaN have no pieces: vectors take them.
void linear_f16(const LinearArgs& a, int64_t m0, int64_t m1, int64_t i0, int64_t i1) {
  if (a.R % kTile != 0 || a.C % (2 * kTile) != 0 || m1 - m0 < kTile) return avx512_kernels()->linear(a, m0, m1, i0, i1);
  constexpr int64_t pieces = 2;
  const int64_t block_bytes = 2 * a.R * a.C, x_bytes = 2 * ((a.K + a.C - 1) / a.C * a.C);
  const int64_t ldx = odd_lines(x_bytes), x_piece = (m1 - m0) * ldx;
  const auto end_of = [&](int64_t g) { return group_end(a, g, i1, 2 * pieces); };
  int64_t most = 0;  // blocks of a group
  for (int64_t g = i0, end; g < i1; g = end) {
    end = end_of(g);
    if (a.crow[end] - a.crow[g] > most) most = a.crow[end] - a.crow[g];
  }
  auto* x = static_cast<char*>(thread_scratch(pieces * (x_piece + most * block_bytes)));
  char* w = x + pieces * x_piece;
  const auto split_rows = [&] { return split_x(a, m0, m1, x, ldx, x_piece, x_bytes); };
  if (!split_rows()) return avx512_kernels()->linear(a, m0, m1, i0, i1);
  LinearArgs split = a;
  split.block = nullptr;
  const bool past_cache = writes_past_cache<Half>(a);
  const auto multiply = [&](int64_t g0, int64_t g1) {
    const int64_t w_piece = (a.crow[g1] - a.crow[g0]) * block_bytes;
    if (!split_weights(a, g0, g1, w, w_piece)) return false;
    split.w = w - a.crow[g0] * block_bytes;
    const FloatTiles<Half, pieces> op = {split, past_cache, x_piece, w_piece};
    amx_range(op, x, ldx, x_bytes, m0, m1, g0, g1);
    return true;
  };
  for (int64_t g0 = i0, g1; g0 < i1; g0 = g1) {
    g1 = end_of(g0);
    if (multiply(g0, g1)) continue;
    for (int64_t i = g0; i < g1; ++i)  // one by one, so that bits do not depend on which of them are a group
      if (!multiply(i, i + 1)) {
        avx512_kernels()->linear(a, m0, m1, i, i + 1);
        split_rows();  // that has used the scratch
      }
  }
  if (past_cache) Avx512::fence();
}

void linear(const LinearArgs& a, int64_t m0, int64_t m1, int64_t i0, int64_t i1) {
  a.dtype == DType::f16 ? linear_f16(a, m0, m1, i0, i1) : linear_bf16(a, m0, m1, i0, i1);
}

// Products of tiles one after another, all in L1. Bytes: rows of a are lda apart, its lower tile is a_lower on and the next product's a_next;
// rows of b are ldb apart, and the next product's begin behind them.
struct Chain {
  const void* a;
  int64_t lda, a_lower, a_next;
  const void* b;
  int64_t ldb, products;
};

// z[MT * 16][NT * 16] = the chain's sum, or z and it. Sums begin at zeros from memory: at tilezero these short chains would take 145 cycles more.
template <int MT, int NT>
void multiply_chain(const Chain& chain, bool add, float* z, int64_t ldz) {
  alignas(64) static constexpr float zeros[kTile] = {};
  const int64_t ld = add ? 4 * ldz : 0;
  const auto start = [&](int64_t row, int64_t column) { return add ? z + row * kTile * ldz + column * kTile : zeros; };
  tile_load<0>(start(0, 0), ld);
  if (NT == 2) tile_load<1>(start(0, 1), ld);
  if (MT == 2) tile_load<2>(start(1, 0), ld);
  if (MT * NT == 4) tile_load<3>(start(1, 1), ld);
  const auto *a = static_cast<const char*>(chain.a), *b = static_cast<const char*>(chain.b);
  for (int64_t k = 0; k < chain.products; ++k, a += chain.a_next, b += kTile * chain.ldb)
    amx_step<Bf16Tiles, MT, NT, 0, 4, 6>(a, chain.a_lower, chain.lda, false, b, chain.ldb, false);
  tile_store<0>(z, 4 * ldz);
  if (NT == 2) tile_store<1>(z + kTile, 4 * ldz);
  if (MT == 2) tile_store<2>(z + kTile * ldz, 4 * ldz);
  if (MT * NT == 4) tile_store<3>(z + kTile * ldz + kTile, 4 * ldz);
}

// The same for as many tiles as are left: two rows and columns of them, or one.
inline void multiply(const Chain& chain, bool add, int64_t rows_left, int64_t cols_left, float* z, int64_t ldz) {
  const bool tall = rows_left > kTile, wide = cols_left > kTile;
  const auto of = tall ? (wide ? multiply_chain<2, 2> : multiply_chain<2, 1>) : (wide ? multiply_chain<1, 2> : multiply_chain<1, 1>);
  of(chain, add, z, ldz);
}

// The products of attention.
struct TiledBf16 : DotBf16 {
  static constexpr int64_t tile_steps = kTile;

  // Rows and cols up to whole tiles, steps a multiple of one's.
  static void product(int64_t rows, int64_t cols, const uint16_t* x, int64_t ldx, const uint16_t* w, int64_t steps, float* z, int64_t ldz) {
    configure(kWholeTiles);
    for (int64_t m = 0; m < rows; m += 2 * kTile)
      for (int64_t n = 0; n < cols; n += 2 * kTile)
        multiply({x + m * ldx, 2 * ldx, 2 * kTile * ldx, 4 * kTile, w + 2 * n, 4 * cols, steps / kTile}, false, rows - m, cols - n,
                 z + m * ldz + n, ldz);
  }
};

bool reads_dy(const SddArgs& a) { return a.dtype == DType::bf16 && a.R % kTile == 0 && a.C % kTile == 0 && a.M >= 2 * kTile; }

// dW. Panels of x, pairs of tokens, are the second factor of a tile product as they are. Rows of dy become the first one 32 at a time, once
// for all blocks of a block-row: pairs of tokens, 16 of which by 16 outputs are transposed. Sums of a block's tiles wait in memory between
// chunks of tokens, of which those of dy stay in L1.
void sdd(const SddArgs& a, int64_t i0, int64_t i1) {
  if (a.dtype != DType::bf16) return avx512_kernels()->sdd(a, i0, i1);
  if (!reads_dy(a)) return avx512_bf16_kernels()->sdd(a, i0, i1);
  constexpr int64_t kChunk = 16;  // tile products, of 32 tokens each
  const int64_t pairs = (a.M + 1) / 2, products = (pairs + kTile - 1) / kTile, last = pairs % kTile;  // last: pairs of a last, short product
  const int64_t size = a.R * a.C, tiles = a.R / kTile;
  int64_t most = 1;  // blocks of a block-row
  for (int64_t i = i0; i < i1; ++i) most = a.crow[i + 1] - a.crow[i] > most ? a.crow[i + 1] - a.crow[i] : most;
  const int64_t floats = most * size + kChunk * tiles * kTile * kTile, halves = 2 * kTile * (a.R + a.C);
  auto* sums = static_cast<float*>(thread_scratch(sizeof(float) * floats + sizeof(uint16_t) * halves));  // [most][R][C]
  float* turned = sums + most * size;                             // [kChunk][tiles][16][32 tokens]
  auto* pairs_dy = reinterpret_cast<uint16_t*>(sums + floats);    // [16][R][2]
  uint16_t* short_x = pairs_dy + 2 * kTile * a.R;                 // [16][C][2], zeros past the last pair
  configure(kWholeTiles);
  const auto* dy = static_cast<const uint16_t*>(a.dy);
  const auto* x_panels = static_cast<const uint16_t*>(a.x_panels);
  for (int64_t i = i0; i < i1; ++i) {
    const int64_t begin = a.crow[i], end = a.crow[i + 1];
    const int64_t outputs = a.N - i * a.R < a.R ? a.N - i * a.R : a.R;
    for (int64_t k0 = 0; k0 < products && begin < end; k0 += kChunk) {
      const int64_t k1 = k0 + kChunk < products ? k0 + kChunk : products;
      for (int64_t k = k0; k < k1; ++k) {
        const int64_t m = 2 * k * kTile, tokens = a.M - m < 2 * kTile ? a.M - m : 2 * kTile, have = (tokens + 1) / 2;
        avx512_bf16_kernels()->panels({a.dtype, tokens, outputs, a.R, dy + m * a.ld_dy + i * a.R, a.ld_dy, pairs_dy}, 0, 1);
        if (have < kTile) memset(pairs_dy + 2 * have * a.R, 0, 4 * (kTile - have) * a.R);
        for (int64_t t = 0; t < tiles; ++t)
          Avx512::transpose(pairs_dy + 2 * t * kTile, 4 * a.R, turned + ((k - k0) * tiles + t) * kTile * kTile, kTile);
      }
      const int64_t whole = k1 - k0 - (last && k1 == products);
      for (int64_t e = begin; e < end; ++e) {
        const uint16_t* x = x_panels + 2 * a.col[e] * pairs * a.C;  // [pairs][C][2]
        if (whole < k1 - k0) {
          memcpy(short_x, x + 2 * (products - 1) * kTile * a.C, 4 * last * a.C);
          memset(short_x + 2 * last * a.C, 0, 4 * (kTile - last) * a.C);
        }
        for (int64_t r = 0; r < a.R; r += 2 * kTile)
          for (int64_t c = 0; c < a.C; c += 2 * kTile) {
            float* z = sums + (e - begin) * size + r * a.C + c;
            const auto products_of = [&](int64_t k, const uint16_t* from, int64_t count, bool add) {
              const float* dy_tiles = turned + (k * tiles * kTile + r) * kTile;
              multiply({dy_tiles, 4 * kTile, 4 * kTile * kTile, 4 * tiles * kTile * kTile, from + 2 * c, 4 * a.C, count}, add, a.R - r, a.C - c, z,
                       a.C);
            };
            products_of(0, x + 2 * k0 * kTile * a.C, whole, k0 > 0);
            if (whole < k1 - k0) products_of(whole, short_x, 1, true);
          }
      }
    }
    auto* to = static_cast<uint16_t*>(a.dvalues) + begin * size;
    for (int64_t j = 0; j < (end - begin) * size; j += kTile) DotBf16::store_y(to + j, Avx512::load(sums + j));
  }
}

void panels(const PanelArgs& a, int64_t p0, int64_t p1) {
  (a.dtype == DType::bf16 ? avx512_bf16_kernels() : avx512_kernels())->panels(a, p0, p1);
}

}  // namespace

const EncoderKernels* amx_bf16_encoder() {
  static const EncoderKernels kernels = {attention_of<TiledBf16, DotBf16>, avx512_bf16_encoder()->layer_norm};
  return &kernels;
}

const Kernels* amx_bf16_kernels() {
  static const Kernels kernels = {"amx_bf16", true, linear, sdd, panels, reads_dy};
  return &kernels;
}

}  // namespace sparse_prune
SPARSE_PRUNE_TARGET_END
#else
const sparse_prune::Kernels* sparse_prune::amx_bf16_kernels() { return nullptr; }
const sparse_prune::EncoderKernels* sparse_prune::amx_bf16_encoder() { return nullptr; }
#endif
