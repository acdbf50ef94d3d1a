#include "config.h"

#include <algorithm>

namespace sparse_prune {

LinearLaunch linear_launch(int64_t M, int row, int64_t tiles, int sms) {
  // Clocks of the busiest multiprocessor. 128 tokens instead of 256 read weights from shared memory and L2 twice as often: by counted
  // work (docs/gpu-performance.md) a block then costs up to 1.4 times its share with rows of 16 and 32, 1.1 times with 64.
  auto cost = [&](int64_t block_m, int percent) { return ((M + block_m - 1) / block_m * tiles + sms - 1) / sms * block_m * percent; };
  const int block_m = cost(256, 100) <= cost(128, row == 64 ? 110 : 140) ? 256 : 128;
  const int stage = block_m * 64 + 128 * 64;  // 32 inputs of x and of the outputs of a tile; Sm80Tile checks it
  return {block_m, 256, stage * (block_m == 256 ? 4 : 3), (M + block_m - 1) / block_m * tiles};
}

}  // namespace sparse_prune

// For tests and tools, through ctypes.
extern "C" __attribute__((visibility("default"))) void sparse_prune_linear_launch(int64_t M, int row, int64_t tiles, int sms,
                                                                                 sparse_prune::LinearLaunch* out) {
  *out = sparse_prune::linear_launch(M, row, tiles, sms);
}
