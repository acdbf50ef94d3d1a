// bf16 pairs in a zmm register; for the files whose target adds AVX512-BF16. Included inside their namespace, after tile_kernel.h
// and native_bf16.h.

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
  static inline void store_y(Y* y, F v) { NativeBf16<Avx512>::store_bf16(y, v); }
  static inline void store_x(X* x, F v) { store_y(x, v); }
  static constexpr int per_lane = 2;
  static inline F lanes(const F (&v)[2]) { return round_to_lanes(v[0], v[1]); }
  static inline F exp2_nonpositive(F v) { return vector_exp2_nonpositive<Avx512, 4>(v); }  // to be rounded to 8 bits
  static inline F activate(F x, Activation activation) { return Avx512::activate_to_bf16(x, activation); }
  // Two rows of x, count elements each (a multiple of 16), element by element.
  static inline void interleave(const X* first, const X* second, int64_t count, X* to) {
    for (int64_t j = 0; j < count; j += 16) {
      const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first + j)));
      const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(second + j)));
      _mm512_storeu_si512(to + 2 * j, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }
  template <int NV>
  static inline void store_row(Y* y, const F (&v)[NV], bool past_cache) {
    for (int j = 0; j + 1 < NV; j += 2) {
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(v[j + 1], v[j]);
      past_cache ? _mm512_stream_si512(reinterpret_cast<__m512i*>(y + j * 16), both) : _mm512_storeu_si512(y + j * 16, both);
    }
    if (NV % 2) store_y(y + (NV - 1) * 16, v[NV - 1]);
  }
};
