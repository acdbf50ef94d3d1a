// Runs a pruned model that export.py compiled ahead of time, without Python.
//
//   run_model DIR      DIR as export.py wrote it: model.pt2, _C_cpu.so, operators.txt, and for each batch size the ids and the logits to expect
//
// Prints the largest difference from the logits that PyTorch gave; exits with 1 where it is more than rounding explains.
#include <ATen/ops/from_blob.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

template <typename T>
std::vector<T> read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), {});
  std::vector<T> values(bytes.size() / sizeof(T));
  std::copy(bytes.begin(), bytes.end(), reinterpret_cast<char*>(values.data()));
  return values;
}

// The kernels register themselves when their library is loaded; the operators they belong to are declared from their schemas.
void load_kernels(const std::string& path, const std::string& schemas) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL);
  if (!library) throw std::runtime_error(dlerror());
  auto define = reinterpret_cast<void (*)(const char*)>(dlsym(library, "sparse_prune_define_operators"));
  if (!define) throw std::runtime_error(path + " is not sparse-prune's library");
  define(schemas.c_str());
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s DIR\n", argv[0]);
    return 2;
  }
  const std::string folder = std::string(argv[1]) + "/";
  const auto schemas = read<char>(folder + "operators.txt");
  load_kernels(folder + "_C_cpu.so", {schemas.begin(), schemas.end()});
  torch::inductor::AOTIModelPackageLoader model(folder + "model.pt2");
  const auto shapes = read<int64_t>(folder + "shapes.bin");  // batch, length, batch, length, ...
  double worst = 0;
  for (size_t i = 0; i + 1 < shapes.size(); i += 2) {
    const std::string number = std::to_string(i / 2) + ".bin";
    auto ids = read<int64_t>(folder + "ids" + number);
    const auto expected = read<float>(folder + "logits" + number);
    const at::Tensor input = at::from_blob(ids.data(), {shapes[i], shapes[i + 1]}, at::kLong);
    const at::Tensor logits = model.run({input})[0].contiguous();
    if (logits.numel() != static_cast<int64_t>(expected.size())) throw std::runtime_error("logits of another shape");
    for (size_t j = 0; j < expected.size(); ++j) {
      const double apart = std::abs(logits.const_data_ptr<float>()[j] - expected[j]);
      worst = apart <= worst ? worst : apart;  // NaN is worst of all
    }
    std::printf("batch %lld x %lld: %lld logits\n", (long long)shapes[i], (long long)shapes[i + 1], (long long)logits.numel());
  }
  std::printf("largest difference %g\n", worst);
  return worst < 1e-4 ? 0 : 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "error: %s\n", error.what());
  return 1;
}
