// bf16 by vdpbf16ps: each 32-bit lane multiplies a pair of inputs and adds both products to a float accumulator.
#include "encoder.h"
#include "target.h"

#if SPARSE_PRUNE_X86
#include <immintrin.h>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
SPARSE_PRUNE_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c,prfchw")

namespace sparse_prune {
namespace {
#include "activations.h"
#include "avx512.h"
#include "tile_kernel.h"
#include "encoder_kernel.h"

// x stays bf16 in place: two neighbouring inputs of a row are the pair that the instruction wants.
struct DotBf16 : Plain<Avx512> {
  using X = uint16_t;
  using Wt = uint16_t;
  using Y = uint16_t;
  static constexpr int step = 2, parts = 1;
  static inline void weights(const Wt* w, F out[1]) { out[0] = _mm512_loadu_ps(w); }
  static inline F broadcast(const X* x, int) {
    float pair;
    memcpy(&pair, x, sizeof pair);
    return _mm512_set1_ps(pair);
  }
  static inline F broadcast_last(const X* x) { return _mm512_castsi512_ps(_mm512_set1_epi32(*x)); }
  static inline F multiply_add(F x, F w, F acc) { return _mm512_dpbf16_ps(acc, (__m512bh)x, (__m512bh)w); }
  static inline F load_y(const Y* y) { return Avx512::load_bf16(y); }
  static inline void store_y(Y* y, F v) { Avx512::store_bf16(y, v); }
  template <int NV>
  static inline void store_row(Y* y, const F (&v)[NV], bool past_cache) {
    for (int j = 0; j + 1 < NV; j += 2) {
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(v[j + 1], v[j]);
      past_cache ? _mm512_stream_si512(reinterpret_cast<__m512i*>(y + j * 16), both) : _mm512_storeu_si512(y + j * 16, both);
    }
    if (NV % 2) store_y(y + (NV - 1) * 16, v[NV - 1]);
  }
};

void linear(const LinearArgs& a, int64_t m0, int64_t m1, int64_t i0, int64_t i1) {
  linear_range<DotBf16>(a, static_cast<const uint16_t*>(a.x) + m0 * a.ldx, a.ldx, m0, m1, i0, i1);
}

void sdd(const SddArgs& a, int64_t i0, int64_t i1) { sdd_range<DotBf16, DotBf16>(a, i0, i1); }

// Two neighbouring rows, column by column: the pair that vdpbf16ps sums is then a pair of tokens.
void panels(const PanelArgs& a, int64_t p0, int64_t p1) {
  const auto* matrix = static_cast<const uint16_t*>(a.matrix);
  const int64_t steps = (a.M + 1) / 2;
  for (int64_t p = p0; p < p1; ++p) {
    const int64_t valid = a.width - p * a.block < a.block ? a.width - p * a.block : a.block;
    auto* to = static_cast<uint16_t*>(a.panels) + p * steps * a.block * 2;
    for (int64_t m = 0; m < a.M; m += 2, to += 2 * a.block) {
      const uint16_t* first = matrix + m * a.ld + p * a.block;
      const uint16_t* second = first + a.ld;
      if (m + 1 < a.M) {
        for (int64_t j = 0; j < valid; ++j) {
          to[2 * j] = first[j];
          to[2 * j + 1] = second[j];
        }
      } else {
        for (int64_t j = 0; j < valid; ++j) {
          to[2 * j] = first[j];
          to[2 * j + 1] = 0;
        }
      }
      memset(to + 2 * valid, 0, (a.block - valid) * 2 * sizeof *to);
    }
  }
}

}  // namespace

const Kernels* avx512_bf16_kernels() {
  static const Kernels kernels = {"avx512_bf16", true, linear, sdd, panels};
  return &kernels;
}

const EncoderKernels* avx512_bf16_encoder() {
  static const EncoderKernels kernels = {attention_of<DotBf16, DotBf16>, layer_norm_of<DotBf16>};
  return &kernels;
}

}  // namespace sparse_prune
SPARSE_PRUNE_TARGET_END
#else
const sparse_prune::Kernels* sparse_prune::avx512_bf16_kernels() { return nullptr; }
const sparse_prune::EncoderKernels* sparse_prune::avx512_bf16_encoder() { return nullptr; }
#endif
