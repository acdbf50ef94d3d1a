#include "kernels.h"

#include <cstdlib>
#include <new>

namespace sparse_prune {
namespace {

struct Scratch {
  void* memory = nullptr;
  size_t bytes = 0;
  ~Scratch() { std::free(memory); }
};

}  // namespace

void* thread_scratch(size_t bytes) {
  static thread_local Scratch scratch;
  if (bytes > scratch.bytes) {
    std::free(scratch.memory);
    scratch.bytes = (bytes + 63) / 64 * 64;  // aligned_alloc wants whole multiples
    scratch.memory = std::aligned_alloc(64, scratch.bytes);
    if (scratch.memory == nullptr) {
      scratch.bytes = 0;
      throw std::bad_alloc();
    }
  }
  return scratch.memory;
}

}  // namespace sparse_prune
