// Registration of the CUDA operators, and the checks of their arguments; what `packed` and `jobs` hold is trusted, for sparse_prune made it.
// torch's stable C++ interface only; the one function of it that only a CUDA build of torch has is looked up when it is first needed, so
// that this library loads beside any torch.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <optional>
#include <string>

#include "checks.h"
#include "cuda/launch.h"
#include "cuda/problem.h"

namespace {

using CurrentStream = AOTITorchError (*)(int32_t, void**);

CurrentStream current_stream() {
  static const CurrentStream found = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);  // torch loaded it, or nobody did
    return library ? reinterpret_cast<CurrentStream>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  return found;
}

void check_cuda(const Tensor& t, const char* name, const Tensor& like, const char* like_name) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == like.get_device_index(), name, ": expected a tensor on the CUDA device of ",
                  like_name);
}

void check_same(const Tensor& t, const char* name, const Tensor& x) {
  check_cuda(t, name, x, "x");
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), name, ": expected dtype ", torch::headeronly::toString(x.scalar_type()),
                  " like x, got ", torch::headeronly::toString(t.scalar_type()));
}

// x with unit inner stride and rows that begin at multiples of 16 bytes, as the kernels copy it; what is not so is copied here.
Tensor with_aligned_rows(const Tensor& x) {
  const int64_t m = x.size(0), k = x.size(1);
  const bool apart = m <= 1 || (x.stride(0) >= k && x.stride(0) % 8 == 0);
  if ((k <= 1 || x.stride(1) == 1) && apart && reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0) return x;
  Tensor wide = torch::stable::new_empty(x, {m, (k + 7) / 8 * 8});
  Tensor copy = torch::stable::narrow(wide, 1, 0, k);
  torch::stable::copy_(copy, x);
  return copy;
}

void check_sides(int64_t block_rows, int64_t block_cols) {
  auto side = [](int64_t s) { return s == 16 || s == 32 || s == 64 || s == 128; };
  STD_TORCH_CHECK(side(block_rows) && side(block_cols), "block_rows, block_cols: expected 16, 32, 64 or 128, got ", block_rows, " and ",
                  block_cols);
}

// Whether t is bfloat16; anything but that and float16 is an error.
bool is_bfloat16(const Tensor& t, const char* name) {
  const bool bfloat16 = t.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(bfloat16 || t.scalar_type() == ScalarType::Half, name, ": expected dtype bfloat16 or float16, got ",
                  torch::headeronly::toString(t.scalar_type()));
  return bfloat16;
}

void* stream_of(int32_t device) {
  STD_TORCH_CHECK(current_stream() != nullptr, "this torch was built without CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(current_stream()(device, &stream));
  return stream;
}

// The arguments of a product, checked.
sp::LinearProblem problem_of(const Tensor& x, const Tensor& packed, int64_t nnzb, int64_t block_rows, int64_t block_cols,
                             int64_t out_features, std::optional<Tensor>& bias, const std::string& activation,
                             std::optional<Tensor>& residual) {
  check_matrix(x, "x");
  check_cuda(x, "x", x, "x");
  check_sides(block_rows, block_cols);
  sp::LinearProblem p = {};
  p.bfloat16 = is_bfloat16(x, "x");
  p.M = x.size(0), p.N = out_features, p.K = x.size(1);
  STD_TORCH_CHECK(p.N > 0 && p.K > 0 && nnzb >= 0, "out_features, in_features: expected numbers from 1, got ", p.N, " and ", p.K);
  check_cuda(packed, "packed", x, "x");
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Byte && packed.dim() == 1 && packed.is_contiguous(),
                  "packed: expected contiguous bytes, got shape ", shape_of(packed));
  p.packed = packed.const_data_ptr();
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(p.packed) % 16 == 0, "packed: expected an address that is a multiple of 16");
  if (bias) {
    check_same(*bias, "bias", x);
    check_shape(*bias, "bias", {p.N});
    bias = torch::stable::contiguous(*bias);
    p.bias = bias->const_data_ptr();
  }
  if (residual) {
    check_same(*residual, "residual", x);
    check_shape(*residual, "residual", {p.M, p.N});
    residual = torch::stable::contiguous(*residual);
    p.residual = residual->const_data_ptr();
  }
  p.activation = static_cast<int>(activation_of(activation));
  return p;
}

void check_size(const Tensor& packed, int64_t least) {
  STD_TORCH_CHECK(packed.size(0) >= least, "packed: expected the layout of this weight, at least ", least, " bytes, got shape ",
                  shape_of(packed));
}

// y of a product: launch(problem, stream) queues it and returns null, or why it cannot. `name` of the operator.
template <class Launch>
Tensor run(const char* name, const Tensor& x_any, sp::LinearProblem p, const Launch& launch) {
  const int32_t device = x_any.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  Tensor y = torch::stable::new_empty(x_any, {p.M, p.N});
  if (p.M == 0) return y;
  const Tensor x = with_aligned_rows(x_any);
  p.x = x.const_data_ptr(), p.ldx = p.M > 1 ? x.stride(0) : 0;
  p.y = y.mutable_data_ptr();
  const char* reason = launch(p, stream_of(device));
  STD_TORCH_CHECK(reason == nullptr, name, ": the launch failed: ", reason);
  return y;
}

Tensor cuda_linear(const Tensor& x, const Tensor& packed, const Tensor& work, int64_t nnzb, int64_t block_rows, int64_t block_cols,
                   int64_t out_features, std::optional<Tensor> bias, std::string activation, std::optional<Tensor> residual) {
  sp::LinearProblem p = problem_of(x, packed, nnzb, block_rows, block_cols, out_features, bias, activation, residual);
  p.layout = sp::layout_of(p.N, nnzb, static_cast<int>(block_rows), static_cast<int>(block_cols));
  check_size(packed, p.layout.least_bytes);
  STD_TORCH_CHECK(work.is_cpu() && work.scalar_type() == ScalarType::Int && work.dim() == 1 && work.is_contiguous() &&
                      work.size(0) == p.layout.tiles,
                  "work: expected int32 [", p.layout.tiles, "] on the CPU, got shape ", shape_of(work));
  p.work = static_cast<const int*>(work.const_data_ptr());
  return run("cuda_linear", x, p, [](const sp::LinearProblem& p, void* stream) { return sp::launch_linear(p, stream); });
}

Tensor cuda_linear_sm90(const Tensor& x, const Tensor& packed, int64_t nnzb, int64_t block_rows, int64_t block_cols,
                        int64_t out_features, int64_t cluster, int64_t groups, int64_t lines, std::optional<Tensor> bias,
                        std::string activation, std::optional<Tensor> residual) {
  sp::LinearProblem p = problem_of(x, packed, nnzb, block_rows, block_cols, out_features, bias, activation, residual);
  STD_TORCH_CHECK((cluster == 1 || cluster == 2 || cluster == 4) && groups > 0 && lines >= groups,
                  "cluster, groups, lines: expected those of this weight's layout, got ", cluster, ", ", groups, " and ", lines);
  const sp::sm90::Packed weight = {
      static_cast<int>(block_rows), static_cast<int>(block_cols), static_cast<int>(cluster), nnzb, groups, lines};
  p.layout = sp::layout_of_sm90(p.N, weight);
  check_size(packed, weight.bytes(p.N));
  return run("cuda_linear", x, p, [&](const sp::LinearProblem& p, void* stream) {
    return p.M <= sp::kSkinnyTokens ? sp::launch_linear(p, stream) : sp::launch_linear_sm90(p, weight, stream);
  });
}

// Weights of 8 bits; `name` of the operator.
Tensor linear_w8a8(const char* name, bool e4m3, const Tensor& x_any, const Tensor& packed, const Tensor& scales, int64_t nnzb,
                   int64_t block_rows, int64_t block_cols, int64_t out_features, std::optional<Tensor> bias, const std::string& activation,
                   std::optional<Tensor> residual, std::optional<double> x_scale) {
  sp::LinearProblem p = problem_of(x_any, packed, nnzb, block_rows, block_cols, out_features, bias, activation, residual);
  STD_TORCH_CHECK(block_cols >= 32, "block_cols: expected 32, 64 or 128 beside a weight of 8 bits, got ", block_cols);
  p.layout = sp::layout_of(p.N, nnzb, static_cast<int>(block_rows), static_cast<int>(block_cols / 2), sp::kMostRow8);
  check_size(packed, p.layout.least_bytes);
  check_cuda(scales, "scales", x_any, "x");
  check_shape(scales, "scales", {p.N});
  STD_TORCH_CHECK(scales.scalar_type() == ScalarType::Float && scales.is_contiguous(), "scales: expected contiguous float32");
  p.e4m3 = e4m3;
  return run(name, x_any, p, [&](sp::LinearProblem p, void* stream) {
    sp::QuantizeProblem q = {p.bfloat16, p.e4m3, p.M, p.K, p.x, p.ldx};
    q.ldq = (p.K + 31) / 32 * 32;
    q.x_scale = static_cast<float>(x_scale.value_or(0.0));
    // Their memory may be given back before the kernels run: to work that the stream does after them.
    Tensor rounded = torch::stable::new_empty(x_any, {p.M, q.ldq}, ScalarType::Char);
    Tensor x_scales = torch::stable::new_empty(x_any, {p.M}, ScalarType::Float);
    q.q = rounded.mutable_data_ptr(), q.scales = x_scales.mutable_data_ptr();
    p.x = q.q, p.ldx = p.K = q.ldq / 2;
    p.x_scales = q.scales, p.scales = scales.const_data_ptr();
    const char* reason = sp::launch_quantize(q, stream);
    return reason ? reason : sp::launch_linear(p, stream);
  });
}

Tensor cuda_linear_int8(const Tensor& x, const Tensor& packed, const Tensor& scales, int64_t nnzb, int64_t block_rows, int64_t block_cols,
                        int64_t out_features, std::optional<Tensor> bias, std::string activation, std::optional<Tensor> residual,
                        std::optional<double> x_scale) {
  return linear_w8a8("cuda_linear_int8", false, x, packed, scales, nnzb, block_rows, block_cols, out_features, bias, activation, residual,
                     x_scale);
}

Tensor cuda_linear_e4m3(const Tensor& x, const Tensor& packed, const Tensor& scales, int64_t nnzb, int64_t block_rows, int64_t block_cols,
                        int64_t out_features, std::optional<Tensor> bias, std::string activation, std::optional<Tensor> residual,
                        std::optional<double> x_scale) {
  return linear_w8a8("cuda_linear_e4m3", true, x, packed, scales, nnzb, block_rows, block_cols, out_features, bias, activation, residual,
                     x_scale);
}

Tensor cuda_sdd(const Tensor& dy_any, const Tensor& x_any, const Tensor& jobs, int64_t nnzb, int64_t block_rows, int64_t block_cols) {
  check_matrix(x_any, "x");
  check_matrix(dy_any, "dy");
  check_cuda(x_any, "x", x_any, "x");
  check_same(dy_any, "dy", x_any);
  check_cuda(jobs, "jobs", x_any, "x");
  check_sides(block_rows, block_cols);
  sp::SddProblem p = {};
  p.bfloat16 = is_bfloat16(x_any, "x");
  p.M = x_any.size(0), p.N = dy_any.size(1), p.K = x_any.size(1), p.nnzb = nnzb;
  p.block_rows = static_cast<int>(block_rows), p.block_cols = static_cast<int>(block_cols);
  STD_TORCH_CHECK(dy_any.size(0) == p.M, "dy: expected ", p.M, " rows like x, got ", dy_any.size(0));
  STD_TORCH_CHECK(jobs.scalar_type() == ScalarType::Int && jobs.dim() == 2 && jobs.size(1) == sp::kJobInts && jobs.is_contiguous() &&
                      (jobs.size(0) > 0) == (nnzb > 0),
                  "jobs: expected int32 [jobs, ", sp::kJobInts, "], got shape ", shape_of(jobs));
  p.jobs = jobs.const_data_ptr(), p.job_count = jobs.size(0);

  const int32_t device = x_any.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  Tensor dvalues = torch::stable::new_empty(x_any, {nnzb, block_rows, block_cols});
  if (nnzb == 0) return dvalues;
  if (p.M == 0) return torch::stable::zero_(dvalues);
  const Tensor dy = with_aligned_rows(dy_any), x = with_aligned_rows(x_any);
  p.dy = dy.const_data_ptr(), p.ldy = p.M > 1 ? dy.stride(0) : 0;
  p.x = x.const_data_ptr(), p.ldx = p.M > 1 ? x.stride(0) : 0;
  const sp::SddLaunch launch = sp::sdd_launch(p.M, p.job_count, nnzb, p.block_rows, p.block_cols, sp::multiprocessors());
  std::optional<Tensor> parts;
  if (launch.splits > 1) {
    parts = torch::stable::new_empty(x_any, {launch.splits, nnzb, block_rows, block_cols}, ScalarType::Float);
    p.parts = parts->mutable_data_ptr();
  }
  p.dvalues = dvalues.mutable_data_ptr();
  const char* reason = sp::launch_sdd(p, launch, stream_of(device));
  STD_TORCH_CHECK(reason == nullptr, "cuda_sdd: the launch failed: ", reason);
  return dvalues;
}

static_assert(static_cast<int>(sp::Activation::silu) == sp::kSilu && static_cast<int>(sp::Activation::none) == sp::kNone,
              "Activations are numbered alike on CPU and GPU.");

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sparse_prune, m) {
  m.def(
      "cuda_linear(Tensor x, Tensor packed, Tensor work, int nnzb, int block_rows, int block_cols, int out_features, Tensor? bias, "
      "str activation, Tensor? residual) -> Tensor");
  m.def(
      "cuda_linear_sm90(Tensor x, Tensor packed, int nnzb, int block_rows, int block_cols, int out_features, int cluster, int groups, "
      "int lines, Tensor? bias, str activation, Tensor? residual) -> Tensor");
  m.def(
      "cuda_linear_int8(Tensor x, Tensor packed, Tensor scales, int nnzb, int block_rows, int block_cols, int out_features, "
      "Tensor? bias, str activation, Tensor? residual, float? x_scale) -> Tensor");
  m.def(
      "cuda_linear_e4m3(Tensor x, Tensor packed, Tensor scales, int nnzb, int block_rows, int block_cols, int out_features, "
      "Tensor? bias, str activation, Tensor? residual, float? x_scale) -> Tensor");
  m.def("cuda_sdd(Tensor dy, Tensor x, Tensor jobs, int nnzb, int block_rows, int block_cols) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(sparse_prune, CUDA, m) {
  m.impl("cuda_linear", TORCH_BOX(&cuda_linear));
  m.impl("cuda_linear_sm90", TORCH_BOX(&cuda_linear_sm90));
  m.impl("cuda_linear_int8", TORCH_BOX(&cuda_linear_int8));
  m.impl("cuda_linear_e4m3", TORCH_BOX(&cuda_linear_e4m3));
  m.impl("cuda_sdd", TORCH_BOX(&cuda_sdd));
}

// For sparse_prune/backends.py, through ctypes: null where the current device can run the kernels, else why it cannot.
extern "C" __attribute__((visibility("default"))) const char* sparse_prune_cuda_problem() {
  if (current_stream() == nullptr) return "this torch was built without CUDA, or is older than 2.10";
  return sp::device_problem();
}

// The same of the kernel for Hopper and its layout.
extern "C" __attribute__((visibility("default"))) const char* sparse_prune_cuda_problem_sm90() {
  return current_stream() == nullptr ? sparse_prune_cuda_problem() : sp::device_problem_sm90();
}

// What was compiled for which architectures, as setup.py knows it.
extern "C" __attribute__((visibility("default"))) const char* sparse_prune_cuda_contents() { return SPARSE_PRUNE_CUDA_CONTENTS; }
