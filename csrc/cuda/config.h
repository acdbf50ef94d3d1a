// Which kernel a product runs and how it is launched. Plain C++, without CUDA: tests build and ask it too, so that what is emulated is
// what is launched.
#pragma once

#include <stdint.h>

namespace sparse_prune {

struct LinearLaunch {
  int block_m;       // tokens of a block: which instantiation runs
  int threads;
  int shared_bytes;  // dynamic shared memory
  int64_t blocks;    // of the grid
};

// M > 0 tokens over `tiles` tiles of a layout whose rows are `row` outputs, on a GPU of `sms` multiprocessors.
LinearLaunch linear_launch(int64_t M, int row, int64_t tiles, int sms);

}  // namespace sparse_prune
