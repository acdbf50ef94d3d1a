// fp32 and converted 16-bit products in 512-bit registers.
#include "encoder.h"
#include "target.h"

#if SPARSE_PRUNE_X86
#include <immintrin.h>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
SPARSE_PRUNE_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prfchw")

namespace sparse_prune {
namespace {
#include "activations.h"
#include "avx512.h"
#include "tile_kernel.h"
#include "encoder_kernel.h"
}  // namespace

const Kernels* avx512_kernels() {
  static const Kernels kernels = {"avx512", false, linear_any<Avx512>, sdd_any<Avx512>, panels_any<Avx512>};
  return &kernels;
}

const EncoderKernels* avx512_encoder() {
  static const EncoderKernels kernels = {attention_any<Avx512>, layer_norm_any<Avx512>};
  return &kernels;
}

}  // namespace sparse_prune
SPARSE_PRUNE_TARGET_END
#else
const sparse_prune::Kernels* sparse_prune::avx512_kernels() { return nullptr; }
const sparse_prune::EncoderKernels* sparse_prune::avx512_encoder() { return nullptr; }
#endif
