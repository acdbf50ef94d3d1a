// Rounding to bf16 by one instruction in place of eight; for the files whose target has AVX512-BF16.

// Lane j: the two bf16 of even[j] and odd[j].
inline __m512 round_to_lanes(__m512 even, __m512 odd) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i order = _mm512_or_si512(lane, _mm512_slli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(16)), 16));
  return _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(odd, even)));
}

template <class Base>
struct NativeBf16 : Base {
  static constexpr int bf16_per_lane = 2;
  static inline __m512 bf16_lanes(__m512 even, __m512 odd) { return round_to_lanes(even, odd); }
  static inline void store_bf16(uint16_t* p, __m512 v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v)); }
};
