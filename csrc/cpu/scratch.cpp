#include "kernels.h"

#include <cstdlib>
#include <new>

namespace sparse_prune {
namespace {

struct Memory {
  void* start = nullptr;
  size_t bytes = 0;
  ~Memory() { std::free(start); }
};

}  // namespace

void* thread_scratch(size_t bytes, Scratch use) {
  static thread_local Memory memories[static_cast<int>(Scratch::count)];
  Memory& memory = memories[static_cast<int>(use)];
  if (bytes > memory.bytes) {
    std::free(memory.start);
    memory.bytes = (bytes + 63) / 64 * 64;  // aligned_alloc wants whole multiples
    memory.start = std::aligned_alloc(64, memory.bytes);
    if (memory.start == nullptr) {
      memory.bytes = 0;
      throw std::bad_alloc();
    }
  }
  return memory.start;
}

}  // namespace sparse_prune
