// What int8 products need of 512-bit vectors beside avx512.h; included after it.

struct Avx512Int8 : Avx512 {
  static inline F from_int32(const int32_t* p) { return _mm512_cvtepi32_ps(_mm512_loadu_si512(p)); }
  // The bits of |a| and |b| order like the numbers, and NaN above all: highest() then tells the largest magnitude, or NaN.
  static inline F max_bits(F a, F b) {
    return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a), _mm512_castps_si512(_mm512_abs_ps(b))));
  }
  static inline float highest(F bits) {
    const int32_t top = _mm512_reduce_max_epi32(_mm512_castps_si512(bits));
    float v;
    memcpy(&v, &top, sizeof v);
    return v;
  }
  static inline void store_quantized(uint8_t* p, F v) {
    // What is too low even for int32 becomes its lowest number, so only the other end needs a minimum before the conversion.
    const __m512i near = _mm512_cvtps_epi32(_mm512_min_ps(v, _mm512_set1_ps(127.0f)));
    const __m128i bytes = _mm_max_epi8(_mm512_cvtsepi32_epi8(near), _mm_set1_epi8(-127));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_xor_si128(bytes, _mm_set1_epi8(static_cast<char>(0x80))));
  }
};
