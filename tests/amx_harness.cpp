// A door into the AMX kernel for tests/test_cpu_kernels.py, which builds it with emulated tiles and calls it through ctypes.
#include "../csrc/cpu/kernels.h"

using namespace sparse_prune;

extern "C" void amx_linear(int64_t M, int64_t N, int64_t K, int64_t R, int64_t C, const int32_t* crow, const int32_t* col,
                           const void* x, int64_t ldx, const void* w, const void* bias, int activation, const void* residual,
                           void* y) {
  LinearArgs a = {DType::bf16, M,   N, K,    R,    C, crow, col, nullptr, x,
                  ldx,         w, bias, static_cast<Activation>(activation), residual, y};
  amx_bf16_kernels()->linear(a, 0, M, 0, (N + R - 1) / R);
}
