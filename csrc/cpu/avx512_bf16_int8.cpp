// The same products as avx512_vnni, with bf16 outputs rounded by one instruction in place of eight.
#include "int8.h"
#include "target.h"

#if SPARSE_PRUNE_X86
#include <immintrin.h>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
SPARSE_PRUNE_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,avx2,fma,f16c,prfchw")

namespace sparse_prune {
namespace {
#include "activations.h"
#include "avx512.h"
#include "native_bf16.h"
#include "tile_kernel.h"
#include "avx512_int8.h"
#include "int8_tile.h"
#include "vnni.h"
}  // namespace

const Int8Kernels* avx512_bf16_int8_kernels() {
  static const Int8Kernels kernels = {"avx512_bf16", quantize_rows<Avx512Int8>, int8_range<Vnni<NativeBf16<Avx512Int8>>>};
  return &kernels;
}

}  // namespace sparse_prune
SPARSE_PRUNE_TARGET_END
#else
const sparse_prune::Int8Kernels* sparse_prune::avx512_bf16_int8_kernels() { return nullptr; }
#endif
