// int8 by vpdpbusd: each 32-bit lane multiplies four inputs and adds the products to an int32 accumulator.
#include "int8.h"
#include "target.h"

#if SPARSE_PRUNE_X86
#include <immintrin.h>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
SPARSE_PRUNE_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,prfchw")

namespace sparse_prune {
namespace {
#include "activations.h"
#include "avx512.h"
#include "tile_kernel.h"
#include "avx512_int8.h"
#include "int8_tile.h"
#include "vnni.h"
}  // namespace

const Int8Kernels* avx512_vnni_kernels() {
  static const Int8Kernels kernels = {"avx512_vnni", quantize_rows<Avx512Int8>, int8_range<Vnni<Avx512Int8>>};
  return &kernels;
}

}  // namespace sparse_prune
SPARSE_PRUNE_TARGET_END
#else
const sparse_prune::Int8Kernels* sparse_prune::avx512_vnni_kernels() { return nullptr; }
#endif
