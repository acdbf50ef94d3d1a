// fp32 and converted 16-bit products in 256-bit registers.
#include "encoder.h"
#include "int8.h"
#include "target.h"

#if SPARSE_PRUNE_X86
#include <immintrin.h>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
SPARSE_PRUNE_TARGET("avx2,fma,f16c,prfchw")

namespace sparse_prune {
namespace {
#include "activations.h"

struct Avx2 {
  using Elem = float;
  using F = __m256;
  static constexpr int W = 8, registers = 16, bf16_per_lane = 0;
  static inline F zero() { return _mm256_setzero_ps(); }
  static inline F set1(float v) { return _mm256_set1_ps(v); }
  static inline F load(const float* p) { return _mm256_loadu_ps(p); }
  static inline void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static inline void stream(float* p, F v) { _mm256_stream_ps(p, v); }
  static inline void fence() { _mm_sfence(); }
  static inline F add(F a, F b) { return _mm256_add_ps(a, b); }
  static inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static inline F div(F a, F b) { return _mm256_div_ps(a, b); }
  static inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static inline F min(F a, F b) { return _mm256_min_ps(a, b); }  // a NaN in b stays
  static inline F max(F a, F b) { return _mm256_max_ps(a, b); }
  static inline F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  static inline F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static inline F pow2(F n) {
    const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
  }
  static inline F less_select(F a, F b, F yes, F no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
  static inline F times_pow2(F v, F n) { return mul(v, pow2(max(set1(-127.0f), n))); }  // whose exponent -127 is that of 0
  static inline F load_bf16(const uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static inline void store_bf16(uint16_t* p, F v) {  // round to nearest even; NaN stays a quiet NaN
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i kept = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(kept), _mm256_extracti128_si256(kept, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
  }
  static inline F load_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static inline void store_f16(uint16_t* p, F v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static inline void bf16_pairs(const uint16_t* p, F& first, F& second) {
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));  // [8][2]
    first = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
    second = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static inline float sum(F v) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  // to[c][r] = from[r][c], 8 x 8 of four bytes; rows of from are `apart` bytes from each other, those of to 4 * ldto.
  static inline void transpose(const void* from, int64_t apart, void* to, int64_t ldto) {
    const auto row = [&](int i) { return _mm256_loadu_ps(reinterpret_cast<const float*>(static_cast<const char*>(from) + i * apart)); };
    F t[8];
    for (int i = 0; i < 8; i += 4) {  // t[i + j]: columns j and j + 4 of rows i .. i + 3
      const F low[2] = {_mm256_unpacklo_ps(row(i), row(i + 1)), _mm256_unpacklo_ps(row(i + 2), row(i + 3))};
      const F high[2] = {_mm256_unpackhi_ps(row(i), row(i + 1)), _mm256_unpackhi_ps(row(i + 2), row(i + 3))};
      t[i] = _mm256_shuffle_ps(low[0], low[1], 0x44);
      t[i + 1] = _mm256_shuffle_ps(low[0], low[1], 0xee);
      t[i + 2] = _mm256_shuffle_ps(high[0], high[1], 0x44);
      t[i + 3] = _mm256_shuffle_ps(high[0], high[1], 0xee);
    }
    for (int j = 0; j < 4; ++j) {
      float* out = static_cast<float*>(to) + j * ldto;
      _mm256_storeu_ps(out, _mm256_permute2f128_ps(t[j], t[4 + j], 0x20));
      _mm256_storeu_ps(out + 4 * ldto, _mm256_permute2f128_ps(t[j], t[4 + j], 0x31));
    }
  }
  static inline F exp2_nonpositive(F v) { return vector_exp2_nonpositive<Avx2>(v); }
  static inline F activate(F v, Activation a) { return vector_activate<Avx2>(v, a); }
  static inline F activate_to_bf16(F v, Activation a) { return activate(v, a); }
};

#include "tile_kernel.h"
#include "encoder_kernel.h"
#include "int8_tile.h"

struct Avx2Int8 : Avx2 {
  static inline F from_int32(const int32_t* p) { return _mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static inline void store_quantized(uint8_t* p, const F (&v)[4]) {
    __m256i near[4];
    for (int i = 0; i < 4; ++i)
      near[i] = _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(v[i], _mm256_set1_ps(-127.0f)), _mm256_set1_ps(127.0f)));
    const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(near[0], near[1]), _mm256_packs_epi32(near[2], near[3]));
    // Each 16 bytes now hold four of each vector.
    const __m256i in_order = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_xor_si256(in_order, _mm256_set1_epi8(static_cast<char>(0x80))));
  }
};

// vpmaddubsw sums two products in 16 bits, where 255 * 127 twice would saturate. So x goes in as |x| <= 127, and its sign to the weight:
// 2 * 127 * 127 fits.
struct SignTrick {
  using Vec = Avx2Int8;
  using I = __m256i;
  struct B {
    __m256i x, magnitude;
  };
  static constexpr bool uses_offsets = false;
  static constexpr int spare = 4;
  static inline I zero() { return _mm256_setzero_si256(); }
  static inline I load(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static inline void store(int32_t* p, I v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  static inline I add(I a, I b) { return _mm256_add_epi32(a, b); }
  static inline __m256 to_float(I v) { return _mm256_cvtepi32_ps(v); }
  static inline I weights(const int8_t* w) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)); }
  static inline B broadcast(const uint8_t* x) {
    int32_t group;
    memcpy(&group, x, sizeof group);
    const __m256i q = _mm256_xor_si256(_mm256_set1_epi32(group), _mm256_set1_epi8(static_cast<char>(0x80)));
    return {q, _mm256_abs_epi8(q)};
  }
  static inline I dot(I acc, B x, I w) {
    const __m256i pairs = _mm256_maddubs_epi16(x.magnitude, _mm256_sign_epi8(w, x.x));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
};
}  // namespace

const Int8Kernels* avx2_int8_kernels() {
  static const Int8Kernels kernels = {"avx2", quantize_rows<Avx2Int8>, int8_range<SignTrick>};
  return &kernels;
}

const Kernels* avx2_kernels() {
  static const Kernels kernels = {"avx2", false, linear_any<Avx2>, sdd_any<Avx2>, panels_any<Avx2>};
  return &kernels;
}

const EncoderKernels* avx2_encoder() {
  static const EncoderKernels kernels = {attention_any<Avx2>, layer_norm_any<Avx2>};
  return &kernels;
}

}  // namespace sparse_prune
SPARSE_PRUNE_TARGET_END
#else
const sparse_prune::Kernels* sparse_prune::avx2_kernels() { return nullptr; }
const sparse_prune::EncoderKernels* sparse_prune::avx2_encoder() { return nullptr; }
const sparse_prune::Int8Kernels* sparse_prune::avx2_int8_kernels() { return nullptr; }
#endif
