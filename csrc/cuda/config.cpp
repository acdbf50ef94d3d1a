#include "config.h"

#include <algorithm>

#include "problem.h"

namespace sparse_prune {

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Parts of the tokens in bsr_sdd at most.
constexpr int64_t kMostParts = 8;

LinearLaunch skinny_launch(int64_t M, const Layout& layout, int sms) {
  LinearLaunch launch = {};
  launch.skinny = 1;
  launch.tokens = M <= 16 ? 16 : 64;
  // x of 16 tokens is as large as a unit's weights, and L2 has the bandwidth; more tokens are read for 32 outputs together.
  launch.units = M > 16 && layout.row > 16 ? 2 : 1;
  launch.blocks = layout.rows * (layout.row / kUnit / launch.units);
  // More warps share the pieces of a row in fewer rounds of loads; more than the 16 of a multiprocessor, which are what registers
  // allow, would make blocks wait for others. Few blocks, which leave multiprocessors idle, still draw all that memory gives: a
  // multiprocessor takes 64 bytes a clock from L2, so 23 of an A100's 108 match the 1450 that its memory delivers.
  const int most = launch.tokens == 16 ? 16 : 8;
  int warps = 4;
  while (warps < most && launch.blocks * warps * 2 <= 16 * static_cast<int64_t>(sms)) warps *= 2;
  launch.threads = 32 * warps;
  launch.shared_bytes = warps * launch.tokens * (16 * launch.units + 4) * static_cast<int>(sizeof(float));
  return launch;
}

}  // namespace

Layout layout_of(int64_t out_features, int64_t nnzb, int block_rows, int block_cols, int most_row) {
  Layout l = {};
  l.row = std::min(block_rows, most_row);
  l.block_cols = block_cols;
  l.order = l.row == 16 ? kRightOrder16 : kRightOrder;
  const int64_t block_row_count = ceil_div(out_features, block_rows);
  l.rows = block_row_count * (block_rows / l.row);
  l.tiles = ceil_div(block_row_count, kTileOutputs / block_rows);
  l.pieces = nnzb * (block_rows / l.row) * (block_cols / kUnit);
  l.tables = 2 * nnzb * block_rows * block_cols + kSpareUnits * kUnitBytes;
  l.starts = l.tables + l.tiles * 48;
  l.piece_table = l.starts + ceil_div(l.rows + 1, 4) * 16;
  l.steps = l.piece_table + ceil_div(2 * l.pieces, 4) * 16;
  l.least_bytes = l.steps + 64;
  return l;
}

Layout layout_of_sm90(int64_t out_features, const sm90::Packed& weight) {
  Layout l = {};
  l.row = weight.row(), l.order = kLeftOrder;
  l.rows = weight.rows(out_features);
  l.starts = weight.starts(), l.piece_table = weight.pieces(out_features);
  return l;
}

LinearLaunch linear_launch(int64_t M, const Layout& layout, int sms, int most_tokens) {
  if (M <= kSkinnyTokens) return skinny_launch(M, layout, sms);
  // Clocks of the busiest multiprocessor. 128 tokens instead of 256 read weights from shared memory and L2 twice as often: by counted
  // work (docs/gpu-performance.md) a block then costs up to 1.4 times its share with rows of 16 and 32, 1.1 times with 64.
  auto cost = [&](int64_t tokens, int percent) { return ceil_div(ceil_div(M, tokens) * layout.tiles, sms) * tokens * percent; };
  LinearLaunch launch = {};
  launch.tokens = most_tokens == 256 && cost(256, 100) <= cost(128, layout.row == 64 ? 110 : 140) ? 256 : 128;
  // Rows of 64 and 128 tokens would need every register for more.
  launch.inputs = layout.row == 16 || layout.block_cols == 16 || (layout.row == 64 && launch.tokens == 128) ? 16 : 32;
  launch.threads = 256;
  // As Sm80Tile has it: 64 inputs of x; or 32, and of the outputs of a tile.
  launch.shared_bytes = layout.row > 16 ? 3 * launch.tokens * 128 : 4 * (launch.tokens + kTileOutputs) * 64;
  launch.blocks = ceil_div(M, launch.tokens) * layout.tiles;
  return launch;
}

SddLaunch sdd_launch(int64_t M, int64_t jobs, int64_t nnzb, int block_rows, int block_cols, int sms) {
  SddLaunch launch = {};
  launch.units = block_rows >= 32 ? 2 : 1;
  // Two blocks for each multiprocessor, if each still has 16 steps. A part costs 8 bytes a weight, written and read in L2.
  const int64_t most = std::min<int64_t>(kMostParts, ceil_div(M, 16 * 16));
  launch.splits = static_cast<int>(std::max<int64_t>(1, std::min(most, 2 * sms / jobs)));
  launch.threads = 256;
  launch.shared_bytes = 3 * 32 * 512;  // as SddShape has it
  launch.blocks = jobs * launch.splits;
  launch.sum_blocks = launch.splits > 1 ? ceil_div(nnzb * block_rows * block_cols, 4 * launch.threads) : 0;
  return launch;
}

}  // namespace sparse_prune

// For tests and tools, through ctypes.
#define SPARSE_PRUNE_EXPORT extern "C" __attribute__((visibility("default")))
namespace sm90 = sparse_prune::sm90;

SPARSE_PRUNE_EXPORT void sparse_prune_linear_launch(int64_t M, int64_t out_features, int64_t nnzb, int block_rows, int block_cols,
                                                    int most_row, int sms, sparse_prune::Layout* layout,
                                                    sparse_prune::LinearLaunch* launch) {
  *layout = sparse_prune::layout_of(out_features, nnzb, block_rows, block_cols, most_row);
  *launch = sparse_prune::linear_launch(M, *layout, sms);
}

SPARSE_PRUNE_EXPORT void sparse_prune_sdd_launch(int64_t M, int64_t jobs, int64_t nnzb, int block_rows, int block_cols, int sms,
                                                 sparse_prune::SddLaunch* launch) {
  *launch = sparse_prune::sdd_launch(M, jobs, nnzb, block_rows, block_cols, sms);
}

// The layout for few tokens and its launch, and the launch of the kernel for Hopper: in tiles of so many tokens, or 0 for the better one.
SPARSE_PRUNE_EXPORT void sparse_prune_linear_launch_sm90(int64_t M, int64_t out_features, const sm90::Packed* weight, int sms,
                                                         int tokens, sparse_prune::Layout* few, sparse_prune::LinearLaunch* few_launch,
                                                         sm90::Launch* launch) {
  *few = sparse_prune::layout_of_sm90(out_features, *weight);
  *few_launch = sparse_prune::linear_launch(M, *few, sms);
  *launch = tokens ? sm90::launch_with(M, *weight, tokens) : sm90::launch_of(M, *weight, sms);
}
SPARSE_PRUNE_EXPORT int64_t sparse_prune_packed_bytes_sm90(int64_t out_features, const sm90::Packed* weight) {
  return weight->bytes(out_features);
}
SPARSE_PRUNE_EXPORT sm90::TensorMapArguments sparse_prune_x_map_arguments(int64_t M, int64_t K, int64_t row_bytes, int tokens, int line) {
  return sm90::x_map_arguments(M, K, row_bytes, tokens, line);
}
SPARSE_PRUNE_EXPORT const char* sparse_prune_refusal_sm90(uint64_t x, int64_t M, int64_t N, int64_t K, int64_t row_bytes,
                                                          const sm90::Packed* weight) {
  return sm90::refusal(x, M, N, K, row_bytes, *weight);
}
