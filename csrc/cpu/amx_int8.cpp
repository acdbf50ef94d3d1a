// int8 by AMX. tdpbusd rather than tdpbssd, so that x and weights are those of vpdpbusd, which takes what tiles do not.
#include "int8.h"
#include "target.h"

#if SPARSE_PRUNE_X86
#include <immintrin.h>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
SPARSE_PRUNE_TARGET("amx-tile,amx-int8,avx512bf16,avx512vnni,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prfchw")
#define SPARSE_PRUNE_AMX_INT8

namespace sparse_prune {
namespace {
#include "activations.h"
#include "amx_tile.h"
#include "avx512.h"
#include "native_bf16.h"
#include "tile_kernel.h"
#include "avx512_int8.h"
#include "int8_tile.h"
#include "vnni.h"
#include "amx_kernel.h"

struct ByteTiles {
  using Dot = Vnni<NativeBf16<Avx512Int8>>;  // for what follows the sums
  using Sum = int32_t;
  using F = __m512i;
  static constexpr int64_t size = 1;
  const Int8Args& a;
  static inline F load(const int32_t* z) { return Dot::load(z); }
  static inline F add(F v, F w) { return Dot::add(v, w); }
  template <int C, int A, int B>
  static inline void dot() { tile_dot_u8s8<C, A, B>(); }

  template <int NT>
  struct Columns {
    const Int8Args& a;
    int64_t n, cols;
    F offsets[NT];
    Columns(const ByteTiles& op, int64_t n, int64_t cols) : a(op.a), n(n), cols(cols) {
      for (int v = 0; v < NT; ++v) offsets[v] = Dot::load(a.offsets + n + v * kTile);
    }
    inline void write(int64_t m, F (&sums)[NT]) const {
      F row[1][NT];  // [1][NT * 16]
      for (int v = 0; v < NT; ++v) row[0][v] = Dot::add(sums[v], offsets[v]);
      int8_finish_tile<Dot, 1, NT>(a, row, m, n, cols);
    }
  };
};

void linear(const Int8Args& a, int64_t m0, int64_t m1, int64_t i0, int64_t i1) {
  const int64_t x_bytes = (a.K + a.C - 1) / a.C * a.C;  // zeros from K on
  if (!tiles_fit(a.R, a.C, x_bytes, m1 - m0)) return avx512_bf16_int8_kernels()->linear(a, m0, m1, i0, i1);
  amx_range(ByteTiles{a}, static_cast<const char*>(a.x) + m0 * a.ldx, a.ldx, x_bytes, m0, m1, i0, i1);
}

}  // namespace

const Int8Kernels* amx_int8_kernels() {
  static const Int8Kernels kernels = {"amx_int8", avx512_bf16_int8_kernels()->quantize, linear};
  return &kernels;
}

}  // namespace sparse_prune
SPARSE_PRUNE_TARGET_END
#else
const sparse_prune::Int8Kernels* sparse_prune::amx_int8_kernels() { return nullptr; }
#endif
