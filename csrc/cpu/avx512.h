// 16 floats in a zmm register; for the files whose target has AVX-512 F, BW, VL and DQ. Included inside their namespace.

struct Avx512 {
  using Elem = float;
  using F = __m512;
  static constexpr int W = 16, registers = 32, bf16_per_lane = 0;
  static inline F zero() { return _mm512_setzero_ps(); }
  static inline F set1(float v) { return _mm512_set1_ps(v); }
  static inline F load(const float* p) { return _mm512_loadu_ps(p); }
  static inline void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static inline void stream(float* p, F v) { _mm512_stream_ps(p, v); }
  static inline void copy(float* to, const float* from, int64_t count) {  // count < 16
    const __mmask16 some = static_cast<__mmask16>((1u << count) - 1);
    _mm512_mask_storeu_ps(to, some, _mm512_maskz_loadu_ps(some, from));
  }
  static inline void copy(uint16_t* to, const uint16_t* from, int64_t count) {
    const __mmask16 some = static_cast<__mmask16>((1u << count) - 1);
    _mm256_mask_storeu_epi16(to, some, _mm256_maskz_loadu_epi16(some, from));
  }
  static inline void fence() { _mm_sfence(); }
  static inline F add(F a, F b) { return _mm512_add_ps(a, b); }
  static inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static inline F div(F a, F b) { return _mm512_div_ps(a, b); }
  static inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static inline F min(F a, F b) { return _mm512_min_ps(a, b); }  // a NaN in b stays
  static inline F max(F a, F b) { return _mm512_max_ps(a, b); }
  static inline F abs(F a) { return _mm512_abs_ps(a); }
  static inline F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static inline F pow2(F n) { return _mm512_scalef_ps(_mm512_set1_ps(1.0f), n); }
  static inline F less_select(F a, F b, F yes, F no) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes); }
  static inline F times_pow2(F v, F n) { return _mm512_scalef_ps(v, n); }
  static inline F load_bf16(const uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static inline void store_bf16(uint16_t* p, F v) {  // round to nearest even; NaN stays a quiet NaN
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
  }
  static inline F load_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static inline void store_f16(uint16_t* p, F v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static inline void bf16_pairs(const uint16_t* p, F& first, F& second) {
    const __m512i pairs = _mm512_loadu_si512(p);  // [16][2]
    first = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    second = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static inline float sum(F v) { return _mm512_reduce_add_ps(v); }
  // to[c][r] = from[r][c], 16 x 16 of four bytes; rows of from are `apart` bytes from each other, those of to 4 * ldto.
  static inline void transpose(const void* from, int64_t apart, void* to, int64_t ldto) {
    F r[16], t[16];
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(static_cast<const char*>(from) + i * apart);
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {  // r[i + j]: columns j, j + 4, j + 8 and j + 12 of rows i .. i + 3
      r[i] = pair_low(t[i], t[i + 2]);
      r[i + 1] = pair_high(t[i], t[i + 2]);
      r[i + 2] = pair_low(t[i + 1], t[i + 3]);
      r[i + 3] = pair_high(t[i + 1], t[i + 3]);
    }
    for (int j = 0; j < 4; ++j) {
      const F even[2] = {_mm512_shuffle_f32x4(r[j], r[4 + j], 0x88), _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x88)};
      const F odd[2] = {_mm512_shuffle_f32x4(r[j], r[4 + j], 0xdd), _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xdd)};
      float* out = static_cast<float*>(to) + j * ldto;
      _mm512_storeu_ps(out, _mm512_shuffle_f32x4(even[0], even[1], 0x88));
      _mm512_storeu_ps(out + 4 * ldto, _mm512_shuffle_f32x4(odd[0], odd[1], 0x88));
      _mm512_storeu_ps(out + 8 * ldto, _mm512_shuffle_f32x4(even[0], even[1], 0xdd));
      _mm512_storeu_ps(out + 12 * ldto, _mm512_shuffle_f32x4(odd[0], odd[1], 0xdd));
    }
  }
  static inline F pair_low(F a, F b) { return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b))); }
  static inline F pair_high(F a, F b) { return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b))); }
  static inline F exp2_nonpositive(F v) { return vector_exp2_nonpositive<Avx512>(v); }
  template <int powers>
  static inline F activate(F x, const ActivationTable<powers>& table) {
    // In a float from 2^23 to 2^24 units are the last bits: adding 1.5 * 2^23 rounds, and leaves n where the permutation looks for it.
    const F per_unit = set1(table.per_unit), integers = set1(12582912.0f), a = min(set1(table.limit), abs(x));
    const F moved = fma(a, per_unit, integers), f = fma(a, per_unit, sub(integers, moved));
    const auto of_piece = [&](const float* numbers) {
      return _mm512_permutex2var_ps(load(numbers), _mm512_castps_si512(moved), load(numbers + 16));
    };
    F s = of_piece(table.power[powers - 1]);
    for (int j = powers - 2; j >= 0; --j) s = fma(s, f, of_piece(table.power[j]));
    return _mm512_fnmadd_ps(a, s, max(zero(), x));
  }
  static inline F activate(F v, Activation a) { return a == Activation::gelu ? activate(v, gelu_table) : vector_activate<Avx512>(v, a); }
  static inline F activate_to_bf16(F v, Activation a) {
    switch (a) {
      case Activation::gelu:
        return activate(v, gelu_table_bf16);
      case Activation::gelu_tanh:
        return activate(v, gelu_tanh_table_bf16);
      case Activation::silu:
        return activate(v, silu_table_bf16);
      default:
        return activate(v, a);
    }
  }
};
