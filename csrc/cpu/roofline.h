// Measured limits of one thread of this processor.
#pragma once

#include <cstdint>
#include <string>

namespace sparse_prune {

// Floating-point (for avx512_vnni and amx_int8 integer) operations a second of multiply-adds on registers alone, with the instructions that
// the kernels of that name use; 0 for an unknown name. The processor must have the instructions, and the process its permission for tiles.
double peak_flops(const std::string& isa);

// Bytes a second of reading `bytes` at data in order, again and again: of the cache that holds them, or of memory.
double read_bytes_per_second(const std::string& isa, const void* data, int64_t bytes);

}  // namespace sparse_prune
