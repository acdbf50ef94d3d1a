// What int8 products need of 512-bit vectors beside avx512.h; included after tile_kernel.h.

struct Avx512Int8 : Avx512 {
  static inline F from_int32(const int32_t* p) { return _mm512_cvtepi32_ps(_mm512_loadu_si512(p)); }
  static inline void store_quantized(uint8_t* p, const F (&v)[4]) {
    __m512i near[4];
    // What is too low even for int32 becomes its lowest number, so only the other end needs a minimum before the conversion.
    SPARSE_PRUNE_UNROLL
    for (int i = 0; i < 4; ++i) near[i] = _mm512_cvtps_epi32(_mm512_min_ps(v[i], _mm512_set1_ps(127.0f)));
    const __m512i bytes = _mm512_packs_epi16(_mm512_packs_epi32(near[0], near[1]), _mm512_packs_epi32(near[2], near[3]));
    // Each 16 bytes now hold four of each vector.
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i in_order = _mm512_max_epi8(_mm512_permutexvar_epi32(order, bytes), _mm512_set1_epi8(-127));
    _mm512_storeu_si512(p, _mm512_xor_si512(in_order, _mm512_set1_epi8(static_cast<char>(0x80))));
  }
};
