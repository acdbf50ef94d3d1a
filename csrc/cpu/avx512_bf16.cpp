// bf16 by vdpbf16ps: each 32-bit lane multiplies a pair of inputs and adds both products to a float accumulator.
#include "encoder.h"
#include "target.h"

#if SPARSE_PRUNE_X86
#include <immintrin.h>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
SPARSE_PRUNE_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c,prfchw")

namespace sparse_prune {
namespace {
#include "activations.h"
#include "avx512.h"
#include "tile_kernel.h"
#include "encoder_kernel.h"
#include "native_bf16.h"
#include "avx512_bf16.h"

void linear(const LinearArgs& a, int64_t m0, int64_t m1, int64_t i0, int64_t i1) {
  linear_range<DotBf16>(a, static_cast<const uint16_t*>(a.x) + m0 * a.ldx, a.ldx, m0, m1, i0, i1);
}

void sdd(const SddArgs& a, int64_t i0, int64_t i1) { sdd_range<DotBf16, DotBf16>(a, i0, i1); }

// Two neighbouring rows, column by column: the pair that vdpbf16ps sums is then a pair of tokens.
void panels(const PanelArgs& a, int64_t p0, int64_t p1) {
  const auto* matrix = static_cast<const uint16_t*>(a.matrix);
  const int64_t steps = (a.M + 1) / 2;
  for (int64_t p = p0; p < p1; ++p) {
    const int64_t valid = a.width - p * a.block < a.block ? a.width - p * a.block : a.block;
    auto* to = static_cast<uint16_t*>(a.panels) + p * steps * a.block * 2;
    for (int64_t m = 0; m < a.M; m += 2, to += 2 * a.block) {
      const uint16_t* first = matrix + m * a.ld + p * a.block;
      const uint16_t* second = first + a.ld;
      if (m + 1 < a.M) {
        const int64_t vectors = valid / 16 * 16;
        DotBf16::interleave(first, second, vectors, to);
        for (int64_t j = vectors; j < valid; ++j) {
          to[2 * j] = first[j];
          to[2 * j + 1] = second[j];
        }
      } else {
        for (int64_t j = 0; j < valid; ++j) {
          to[2 * j] = first[j];
          to[2 * j + 1] = 0;
        }
      }
      memset(to + 2 * valid, 0, (a.block - valid) * 2 * sizeof *to);
    }
  }
}

}  // namespace

const Kernels* avx512_bf16_kernels() {
  static const Kernels kernels = {"avx512_bf16", true, linear, sdd, panels};
  return &kernels;
}

const EncoderKernels* avx512_bf16_encoder() {
  static const EncoderKernels kernels = {attention_of<DotBf16, DotBf16>, layer_norm_of<DotBf16>};
  return &kernels;
}

}  // namespace sparse_prune
SPARSE_PRUNE_TARGET_END
#else
const sparse_prune::Kernels* sparse_prune::avx512_bf16_kernels() { return nullptr; }
const sparse_prune::EncoderKernels* sparse_prune::avx512_bf16_encoder() { return nullptr; }
#endif
