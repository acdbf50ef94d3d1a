// A door into the AMX kernels for their tests, which build them with emulated tiles (conftest.py) and call them through ctypes.
#include "../csrc/cpu/int8.h"

using namespace sparse_prune;

extern "C" {

int64_t tile_counts[3];  // loads, products, stores

void amx_linear(int64_t M, int64_t N, int64_t K, int64_t R, int64_t C, const int32_t* crow, const int32_t* col, const void* x,
                int64_t ldx, const void* w, const void* bias, int activation, const void* residual, void* y, int pair) {
  LinearArgs a = {DType::bf16, M,   N, K,    R,    C, crow, col, nullptr, x,
                  ldx,         w, bias, static_cast<Activation>(activation), residual, y, static_cast<Pair>(pair)};
  amx_bf16_kernels()->linear(a, 0, M, 0, (N + R - 1) / R);
}

void amx_int8_linear(int dtype, int64_t M, int64_t N, int64_t K, int64_t R, int64_t C, int64_t ldx, int64_t ldq, int64_t offsets_at,
                     const int32_t* crow, const int32_t* col, const void* x, const void* w, const float* w_scales, uint8_t* q,
                     float* x_scales, const void* bias, int activation, const void* residual, void* y, int pair) {
  const DType out = static_cast<DType>(dtype);
  const Int8Kernels& kernels = *amx_int8_kernels();
  kernels.quantize({out, K, x, ldx, 0, q, ldq, x_scales}, 0, M);
  Int8Args a = {};
  a.dtype = out;
  a.M = M, a.N = N, a.K = K, a.R = R, a.C = C;
  a.crow = crow, a.col = col;
  a.x = q, a.ldx = ldq, a.w = w;
  a.bias = bias, a.activation = static_cast<Activation>(activation), a.residual = residual, a.y = y, a.pair = static_cast<Pair>(pair);
  a.x_scales = x_scales, a.w_scales = w_scales;
  a.offsets = reinterpret_cast<const int32_t*>(static_cast<const char*>(w) + offsets_at);
  kernels.linear(a, 0, M, 0, (N + R - 1) / R);
}
}
