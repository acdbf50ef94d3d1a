// SPARSE_PRUNE_TARGET("avx2,fma"): every function from here to the end of the file is compiled for these instructions. Standard headers
// come before it, so that no shared inline function is compiled for a processor that may be absent.
#pragma once

#if (defined(__x86_64__) || defined(_M_X64)) && (defined(__GNUC__) || defined(__clang__))
#define SPARSE_PRUNE_X86 1
#else
#define SPARSE_PRUNE_X86 0
#endif

#define SPARSE_PRUNE_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define SPARSE_PRUNE_TARGET(isa) SPARSE_PRUNE_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define SPARSE_PRUNE_TARGET_END _Pragma("clang attribute pop")
#else
#define SPARSE_PRUNE_TARGET(isa) SPARSE_PRUNE_PRAGMA(GCC target(isa))
#define SPARSE_PRUNE_TARGET_END
#endif
