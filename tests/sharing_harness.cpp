// Kernels that only write down what they are given, for the test of how the dispatcher shares a product between threads: compiled with
// csrc/cpu/dispatch.cpp and scratch.cpp, and with nothing else.
#include "../csrc/cpu/dispatch.h"

#include <vector>

namespace sparse_prune {
namespace {

int64_t current_task;
std::vector<int64_t> written;  // task, m0, m1, i0, i1 of each call

void write_down(const LinearArgs&, int64_t m0, int64_t m1, int64_t i0, int64_t i1) {
  for (int64_t v : {current_task, m0, m1, i0, i1}) written.push_back(v);
}

void one_by_one(int64_t tasks, void (*body)(void*, int64_t), void* context) {
  for (current_task = 0; current_task < tasks; ++current_task) body(context, current_task);
}

const Kernels kernels = {"none", true, write_down, nullptr, nullptr};

}  // namespace

const Kernels* portable_kernels() { return &kernels; }
const Kernels* portable_f64_kernels() { return &kernels; }
const Kernels* avx2_kernels() { return &kernels; }
const Kernels* avx512_kernels() { return &kernels; }
const Kernels* avx512_bf16_kernels() { return &kernels; }
const Kernels* amx_bf16_kernels() { return &kernels; }
const Int8Kernels* portable_int8_kernels() { return nullptr; }
const Int8Kernels* avx2_int8_kernels() { return nullptr; }
const Int8Kernels* avx512_vnni_kernels() { return nullptr; }
const Int8Kernels* avx512_bf16_int8_kernels() { return nullptr; }
const Int8Kernels* amx_int8_kernels() { return nullptr; }
const EncoderKernels* portable_encoder() { return nullptr; }
const EncoderKernels* portable_f64_encoder() { return nullptr; }
const EncoderKernels* avx2_encoder() { return nullptr; }
const EncoderKernels* avx512_encoder() { return nullptr; }
const EncoderKernels* avx512_bf16_encoder() { return nullptr; }
const EncoderKernels* amx_bf16_encoder() { return nullptr; }

}  // namespace sparse_prune

// The calls of a float32 product by that many threads, five numbers each, into calls; returns how many there were.
extern "C" int64_t share(int64_t threads, int64_t M, int64_t N, int64_t K, int64_t R, int64_t C, const int32_t* crow, int64_t* calls) {
  using namespace sparse_prune;
  LinearArgs a = {};
  a.M = M, a.N = N, a.K = K, a.R = R, a.C = C, a.crow = crow;
  written.clear();
  run_linear(a, threads, one_by_one);
  for (size_t v = 0; v < written.size(); ++v) calls[v] = written[v];
  return static_cast<int64_t>(written.size()) / 5;
}
