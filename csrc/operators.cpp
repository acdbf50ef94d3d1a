// Declares operators in a program without Python. In Python sparse_prune/ops.py does; an exported model brings their schemas along.
#include <torch/csrc/stable/library.h>

#include <sstream>
#include <string>

// schemas: one a line, "sparse_prune::name(arguments) -> result". Call it once, after this library has been loaded and before a model
// that was compiled ahead of time is.
extern "C" __attribute__((visibility("default"))) void sparse_prune_define_operators(const char* schemas) {
  using torch::stable::detail::StableLibrary;
  static StableLibrary library(StableLibrary::Kind::FRAGMENT, "sparse_prune", nullptr, __FILE__, __LINE__);
  std::istringstream lines(schemas);
  for (std::string line; std::getline(lines, line);) {
    if (!line.empty()) library.def(line.c_str());
  }
}
