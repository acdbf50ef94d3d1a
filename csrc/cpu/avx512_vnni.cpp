// int8 by vpdpbusd: each 32-bit lane multiplies four inputs and adds the products to an int32 accumulator.
#include "int8.h"
#include "target.h"

#if SPARSE_PRUNE_X86
#include <immintrin.h>
#include <cstring>
SPARSE_PRUNE_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,prfchw")

namespace sparse_prune {
namespace {
#include "activations.h"
#include "avx512.h"
#include "avx512_int8.h"
#include "tile_kernel.h"
#include "int8_tile.h"

struct Vnni {
  using Vec = Avx512Int8;
  using I = __m512i;
  using B = __m512i;
  static constexpr bool uses_offsets = true;
  static constexpr int spare = 1;
  static inline I zero() { return _mm512_setzero_si512(); }
  static inline I load(const int32_t* p) { return _mm512_loadu_si512(p); }
  static inline void store(int32_t* p, I v) { _mm512_storeu_si512(p, v); }
  static inline I add(I a, I b) { return _mm512_add_epi32(a, b); }
  static inline I weights(const int8_t* w) { return _mm512_loadu_si512(w); }
  static inline B broadcast(const uint8_t* x) {
    int32_t group;
    memcpy(&group, x, sizeof group);
    return _mm512_set1_epi32(group);
  }
  static inline I dot(I acc, B x, I w) { return _mm512_dpbusd_epi32(acc, x, w); }
};

}  // namespace

const Int8Kernels* avx512_vnni_kernels() {
  static const Int8Kernels kernels = {"avx512_vnni", quantize_rows<Avx512Int8>, int8_range<Vnni>};
  return &kernels;
}

}  // namespace sparse_prune
SPARSE_PRUNE_TARGET_END
#else
const sparse_prune::Int8Kernels* sparse_prune::avx512_vnni_kernels() { return nullptr; }
#endif
