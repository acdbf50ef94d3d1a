// Avx512Int8 with bf16 rounded by one instruction in place of eight; for the files whose target has AVX512-BF16.

struct NativeBf16 : Avx512Int8 {
  static inline void store_bf16(uint16_t* p, F v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v)); }
};
