// A door into the AMX and AVX512-BF16 kernels for their tests, which build them as they ship and with tile instructions counted
// (conftest.py), and call them through ctypes. `amx`: by tiles; otherwise AVX512-BF16 alone. All rows and blocks are one call's.
#include "../csrc/cpu/encoder.h"
#include "../csrc/cpu/int8.h"

using namespace sparse_prune;

extern "C" {

int64_t tile_counts[3];  // loads, products, stores

void linear(int amx, int dtype, int64_t M, int64_t N, int64_t K, int64_t R, int64_t C, const int32_t* crow, const int32_t* col,
            const void* x, int64_t ldx, const void* w, const void* bias, int activation, const void* residual, void* y, int pair) {
  const DType type = static_cast<DType>(dtype);
  const LinearArgs a = {type, type, M, N, K, R, C, crow, col, nullptr, x, ldx, w, bias, static_cast<Activation>(activation),
                        residual, y, static_cast<Pair>(pair)};
  (amx ? amx_bf16_kernels() : avx512_bf16_kernels())->linear(a, 0, M, 0, (N + R - 1) / R);
}

void int8_linear(int amx, int dtype, int64_t M, int64_t N, int64_t K, int64_t R, int64_t C, int64_t ldx, int64_t ldq,
                 int64_t offsets_at, const int32_t* crow, const int32_t* col, const void* x, const void* w, const float* w_scales,
                 uint8_t* q, float* x_scales, const void* bias, int activation, const void* residual, void* y, int pair) {
  const DType out = static_cast<DType>(dtype);
  const Int8Kernels& kernels = amx ? *amx_int8_kernels() : *avx512_bf16_int8_kernels();
  kernels.quantize({out, K, x, ldx, 0, q, ldq, x_scales}, 0, M);
  Int8Args a = {};
  a.dtype = a.out = out;
  a.M = M, a.N = N, a.K = K, a.R = R, a.C = C;
  a.crow = crow, a.col = col;
  a.x = q, a.ldx = ldq, a.w = w;
  a.bias = bias, a.activation = static_cast<Activation>(activation), a.residual = residual, a.y = y, a.pair = static_cast<Pair>(pair);
  a.x_scales = x_scales, a.w_scales = w_scales;
  a.offsets = reinterpret_cast<const int32_t*>(static_cast<const char*>(w) + offsets_at);
  kernels.linear(a, 0, M, 0, (N + R - 1) / R);
}

// dy and x contiguous; the panels are what the kernels write on the way.
void bf16_sdd(int amx, int64_t M, int64_t N, int64_t K, int64_t R, int64_t C, const int32_t* crow, const int32_t* col, const void* dy,
              const void* x, void* dy_panels, void* x_panels, void* dvalues) {
  const Kernels& kernels = *(amx ? amx_bf16_kernels() : avx512_bf16_kernels());
  const int64_t rows = (N + R - 1) / R;
  kernels.panels({DType::bf16, M, N, R, dy, N, dy_panels}, 0, rows);
  kernels.panels({DType::bf16, M, K, C, x, K, x_panels}, 0, (K + C - 1) / C);
  kernels.sdd({DType::bf16, M, N, K, R, C, crow, col, dy, N, dy_panels, x_panels, dvalues}, 0, rows);
}

// q, k, v, out [B, T, heads, d] contiguous.
void bf16_attention(int amx, int64_t B, int64_t T, int64_t heads, int64_t d, const void* q, const void* k, const void* v, double scale, void* out) {
  const int64_t token = heads * d, batch = T * token;
  const AttentionArgs a = {DType::bf16, B, T, heads, d, q, k, v, batch, token, d, batch, token, d, batch, token, d, scale, {}, {}, out};
  for (int64_t b = 0; b < B; ++b)
    for (int64_t h = 0; h < heads; ++h) (amx ? amx_bf16_encoder() : avx512_bf16_encoder())->attention(a, b, h, 0, T);
}

void bf16_layer_norm(int64_t M, int64_t H, const void* x, const void* residual, const void* weight, const void* bias, void* y) {
  avx512_bf16_encoder()->layer_norm({DType::bf16, M, H, x, H, residual, weight, bias, 1e-5, y}, 0, M);
}

// y[5][16] += pairs of x[16][2] and w[..][2], whose place the instruction states in each of its ways. Compilers choose between them.
__attribute__((target("avx512f,avx512bf16"))) void dot_in_every_form(const uint16_t* x, const uint16_t* w, float* y) {
  static const struct { alignas(64) uint16_t pairs[16][2]; } one = {{{0x3f80, 0x3f80}}};  // (1, 1), then zeros
  __asm__ volatile(
      "vmovups %[x], %%zmm17\n"
      "vmovups (%[w]), %%zmm9\n"
      "vmovups (%[y]), %%zmm0\n"
      "vdpbf16ps %%zmm9, %%zmm17, %%zmm0\n"
      "vmovups %%zmm0, (%[y])\n"
      "vmovups 64(%[y]), %%zmm30\n"
      "vdpbf16ps 64(%[w]), %%zmm17, %%zmm30\n"                 // a displacement of one byte, in vectors
      "vmovups %%zmm30, 64(%[y])\n"
      "vmovups 128(%[y]), %%zmm1\n"
      "vdpbf16ps 4(%[w],%[four],8), %%zmm17, %%zmm1\n"         // of four bytes, and an index
      "vmovups %%zmm1, 128(%[y])\n"
      "vmovups 192(%[y]), %%zmm15\n"
      "vdpbf16ps 8(%[w])%{1to16%}, %%zmm17, %%zmm15\n"         // one pair for all; a displacement in pairs
      "vmovups %%zmm15, 192(%[y])\n"
      "vmovups 256(%[y]), %%zmm16\n"
      "vdpbf16ps %[one], %%zmm17, %%zmm16\n"                   // from RIP
      "vmovups %%zmm16, 256(%[y])\n"
      :
      : [x] "m"(*reinterpret_cast<const char(*)[64]>(x)), [w] "r"(w), [y] "r"(y), [four] "r"(int64_t{4}), [one] "m"(one)
      : "memory", "xmm0", "xmm1", "xmm9", "xmm15", "xmm16", "xmm17", "xmm30");
}

// The 16 floats of x as bfloat16.
__attribute__((target("avx512f,avx512bf16"))) void round_to_bf16(const float* x, uint16_t* y) {
  __asm__ volatile("vcvtneps2bf16 (%0), %%ymm20\n vmovups %%ymm20, (%1)" : : "r"(x), "r"(y) : "memory", "xmm20");
}

// A product of tiles 0, 4 and 6 as 64 bytes of configuration shape them.
__attribute__((target("amx-tile,amx-bf16"))) void tile_product(const void* config) {
  __asm__ volatile("ldtilecfg (%0)\n tdpbf16ps %%tmm6, %%tmm4, %%tmm0" : : "r"(config) : "memory");
}
}
