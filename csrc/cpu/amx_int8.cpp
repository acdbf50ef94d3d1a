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
#include "tile_kernel.h"
#include "native_bf16.h"
#include "avx512_bf16.h"
#include "avx512_int8.h"
#include "int8_tile.h"
#include "vnni.h"
#include "amx_kernel.h"

struct ByteTiles {
  using V = NativeBf16<Avx512Int8>;  // for what follows the sums
  using F = V::F;
  using Dot = Vnni<V>;
  using Sum = uint32_t;  // they may wrap
  static constexpr int64_t size = 1, pieces = 1;
  const Int8Args& a;
  template <int C, int A, int B>
  static inline void dot() { tile_dot_u8s8<C, A, B>(); }

  template <int NT>
  struct Columns {
    const Int8Args& a;
    int64_t n, cols;
    Columns(const ByteTiles& op, int64_t n, int64_t cols) : a(op.a), n(n), cols(cols) {}
    inline void write(const uint32_t* z, int64_t m, int64_t rows) const {
      const auto* sums = reinterpret_cast<const int32_t*>(z);
      if (a.out == DType::f32) return write_as<Plain<V>, Plain<V>>(sums, m, rows);
      if (a.out == DType::bf16) return write_as<DotBf16, Bf16Weights<V>>(sums, m, rows);
      write_as<HalfWeights<V>, HalfWeights<V>>(sums, m, rows);
    }
    template <class Out, class Edge>
    inline void write_as(const int32_t* z, int64_t m, int64_t rows) const {
      if (cols < NT * kTile) return write_edge<Edge>(z, m, rows);
      if (const Activation activation = a.activation; activation != Activation::none)
        write_rows<Out>(z, m, rows, [=](F& v) { v = Out::activate(v, activation); });
      else
        write_rows<Out>(z, m, rows, [](F) {});
    }
    template <class Out>
    void write_edge(const int32_t* z, int64_t m, int64_t rows) const {
      alignas(64) int32_t sums[kTile * kTile];  // [rows][16]
      for (int64_t v = 0; v * kTile < cols; ++v, z += kTile * kTile) {
        const int64_t at = n + v * kTile, left = cols - v * kTile;
        for (int64_t j = 0; j < rows * kTile; j += kTile) Dot::store(sums + j, Dot::add(Dot::load(z + j), Dot::load(a.offsets + at)));
        int8_finish_as<Out>(a, sums, kTile, m, at, rows, left < kTile ? left : kTile);
      }
    }
    template <class Out, class Activate>
    inline void write_rows(const int32_t* z, int64_t m, int64_t rows, const Activate& activate) const {
      using Y = typename Out::Y;
      F scale[NT], bias[NT];
      Dot::I offset[NT];
      for (int v = 0; v < NT; ++v) {
        offset[v] = Dot::load(a.offsets + n + v * kTile);
        scale[v] = V::load(a.w_scales + n + v * kTile);
        bias[v] = a.bias ? Out::load_y(static_cast<const Y*>(a.bias) + n + v * kTile) : V::zero();
      }
      // Copies that nothing written to y can be part of, for the compiler to keep in registers.
      const int64_t ld = a.N, first = m * ld + n, block = a.R;
      const bool multiplies = a.pair == Pair::second;
      const float* x_scales = a.x_scales + m;                                                // [rows]
      const Y* residual = a.residual ? static_cast<const Y*>(a.residual) + first : nullptr;  // [rows, ld]
      Y* y = static_cast<Y*>(a.y) + first;                                                   // [rows, ld]
      for (int64_t r = 0; r < rows; ++r, z += kTile) {
        const F x_scale = V::set1(x_scales[r]);
        F row[NT];  // [NT * 16]
        SPARSE_PRUNE_UNROLL
        for (int v = 0; v < NT; ++v) {
          const F sum = Dot::to_float(Dot::add(Dot::load(z + v * kTile * kTile), offset[v]));
          row[v] = V::add(V::mul(V::mul(sum, scale[v]), x_scale), bias[v]);
          activate(row[v]);
        }
        int8_write_row<Out, NT>(row, residual ? residual + r * ld : nullptr, multiplies, y + r * ld, block);
      }
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
