// The dot product of vpdpbusd; for files whose target has AVX512-VNNI. V is how the sums are finished.

template <class V>
struct Vnni {
  using Vec = V;
  using I = __m512i;
  using B = __m512i;
  static constexpr bool uses_offsets = true;
  static constexpr int spare = 1;
  static inline I zero() { return _mm512_setzero_si512(); }
  static inline I load(const int32_t* p) { return _mm512_loadu_si512(p); }
  static inline void store(int32_t* p, I v) { _mm512_storeu_si512(p, v); }
  static inline I add(I a, I b) { return _mm512_add_epi32(a, b); }
  static inline typename V::F to_float(I v) { return _mm512_cvtepi32_ps(v); }
  static inline I weights(const int8_t* w) { return _mm512_loadu_si512(w); }
  static inline B broadcast(const uint8_t* x) {
    int32_t group;
    memcpy(&group, x, sizeof group);
    return _mm512_set1_epi32(group);
  }
  static inline I dot(I acc, B x, I w) { return _mm512_dpbusd_epi32(acc, x, w); }
};
