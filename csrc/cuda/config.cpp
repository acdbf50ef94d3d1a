#include "config.h"

#include <algorithm>
#include <functional>
#include <vector>

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

// Costs of a block are in hundredths of what 64 tokens of a tile of kTallTokens cost.
constexpr int64_t kTallCost = 400;

// Cost of the multiprocessor that is done last, where each takes the next tile as soon as it is idle: tall ones, then low ones.
int64_t makespan(int64_t tall, int64_t low, int64_t low_cost, int64_t sms) {
  // Some take one tall tile more than the others; then all that are done first take a low one each.
  const int64_t more = tall % sms, count[] = {sms - more, more};
  int64_t done[] = {tall / sms * kTallCost, more > 0 ? (tall / sms + 1) * kTallCost : 0};
  while (low > 0) {
    const int first = more > 0 && done[1] < done[0];
    low -= count[first], done[first] += low_cost;
  }
  return std::max(done[0], done[1]);
}

// Rows of tokens as LinearLaunch has them; cost of the multiprocessor that is done last, where tiles are equal.
struct Cut {
  int tokens;
  int64_t tall, whole, blocks, cost;
};

// That cut of M tokens for `tiles` tiles of outputs in two heights which is done first, and of equal ones the one with most tall tiles.
Cut cut_of(int64_t M, int64_t tiles, int64_t sms, int64_t low_cost) {
  Cut best = {};
  best.cost = INT64_MAX;
  // Low rows, as few as make units = 4 * most + 3 * low with the tall ones; then four more for every three of the tall ones, in one
  // tile of outputs after the other. More than four low tiles for each multiprocessor gain nothing.
  const int64_t units = ceil_div(M, 64), low = 3 * units % 4, most = (units - 3 * low) / 4;
  if (units < 3 * low) return best;
  for (int64_t swaps = 0; swaps <= std::min(sms, most / 3 * tiles); ++swaps) {
    const int64_t tall_tiles = most * tiles - 3 * swaps, low_tiles = low * tiles + 4 * swaps;
    const int64_t cost = makespan(tall_tiles, low_tiles, low_cost, sms), over = swaps % tiles;
    if (cost < best.cost)
      best = {kTallTokens, most - 3 * ceil_div(swaps, tiles), over > 0 ? tiles - over : 0, tall_tiles + low_tiles, cost};
  }
  return best;
}

// As a cut's cost, but where tiles cost as much as work [tiles] times that; in the order of find_place (bsr_linear_sm80.cuh).
int64_t cost_of(const Cut& cut, int64_t M, int64_t tiles, const int* work, int64_t cost, int64_t low_cost, int64_t sms) {
  std::vector<int64_t> done(sms);  // a heap
  auto run = [&](int64_t first, int64_t end, int64_t rows, int64_t each) {
    const int64_t most = kSetTokens / cut.tokens;
    for (int64_t set = 0; set < rows; set += most)
      for (int64_t tile = first; tile < end; ++tile)
        for (int64_t row = set; row < std::min(rows, set + most); ++row) {
          std::pop_heap(done.begin(), done.end(), std::greater<>());
          done.back() += each * work[tile];
          std::push_heap(done.begin(), done.end(), std::greater<>());
        }
  };
  const int64_t after = M - cut.tall * cut.tokens - (cut.whole > 0 ? kSwapTokens : 0);
  run(0, tiles, cut.tall, cost);
  if (cut.whole > 0) run(tiles - cut.whole, tiles, 3, cost), run(0, tiles - cut.whole, 4, low_cost);
  run(0, tiles, after > 0 ? ceil_div(after, kLowTokens) : 0, low_cost);
  return *std::max_element(done.begin(), done.end());
}

// The cut that a GPU runs: in tiles of one height, unless two gain clearly.
Cut best_cut(int64_t M, const Layout& layout, int sms, int most_tokens, const int* work) {
  // Fewer tokens read weights from shared memory and L2 more often: by counted work (docs/gpu-performance.md) 128 cost up to 1.4 times
  // their share of 256 with rows of 16 and 32, 1.1 times with 64; 192 a third of that more.
  const int percent = layout.row == 64 ? 110 : 140;
  const int64_t tiles = layout.tiles, low_cost = 3 * (100 + (percent - 100) / 3);
  const int64_t tall = ceil_div(M, kTallTokens), half = ceil_div(M, 128);
  const Cut halves = {128, half, 0, half * tiles, ceil_div(half * tiles, sms) * 2 * percent};
  if (most_tokens < kTallTokens) return halves;
  const Cut whole = {kTallTokens, tall, 0, tall * tiles, ceil_div(tall * tiles, sms) * kTallCost};
  const Cut& plain = whole.cost <= halves.cost ? whole : halves;
  if (work == nullptr) return plain;
  // Costs are estimates, so 2% at the least; with rows of 16 and 32, where L2 may be the limit and no waves, 5%.
  auto clear = [&](int64_t cost, int64_t of) { return cost < of - of * (layout.row == 64 ? 2 : 5) / 100; };
  const Cut cut = cut_of(M, tiles, sms, low_cost);
  if (!clear(cut.cost, plain.cost)) return plain;
  // Tiles are not equal, and the longest may come last: with the work of each the gain has to be as clear, and of 128 tokens over
  // no more than their share.
  const int64_t plain_cost = cost_of(plain, M, tiles, work, plain.tokens * kTallCost / kTallTokens, 0, sms);
  return clear(cost_of(cut, M, tiles, work, kTallCost, low_cost, sms), plain_cost) ? cut : plain;
}

// best_cut, which takes up to 80 microseconds, for the last calls of this thread: kept by a hash of the work, while M and the number of
// tiles, without which a cut would be wrong, are compared.
Cut kept_cut(int64_t M, const Layout& layout, int sms, int most_tokens, const int* work) {
  if (work == nullptr || most_tokens < kTallTokens) return best_cut(M, layout, sms, most_tokens, work);
  struct Kept {
    uint64_t key;
    int64_t M, tiles;
    Cut cut;
  };
  thread_local Kept kept[64] = {};
  uint64_t key = 0xcbf29ce484222325;  // FNV-1a, by words
  auto add = [&](int64_t value) { key = (key ^ static_cast<uint64_t>(value)) * 0x100000001b3; };
  add(M), add(layout.row), add(sms);
  for (int64_t tile = 0; tile < layout.tiles; ++tile) add(work[tile]);
  Kept& place = kept[key >> 58];
  if (place.key != key || place.M != M || place.tiles != layout.tiles)
    place = {key, M, layout.tiles, best_cut(M, layout, sms, most_tokens, work)};
  return place.cut;
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

LinearLaunch linear_launch(int64_t M, const Layout& layout, int sms, const int* work, int most_tokens) {
  if (M <= kSkinnyTokens) return skinny_launch(M, layout, sms);
  const Cut cut = kept_cut(M, layout, sms, most_tokens, work);
  LinearLaunch launch = {};
  launch.tokens = cut.tokens;
  launch.tall = static_cast<int>(cut.tall), launch.whole = static_cast<int>(cut.whole);
  // Rows of 64 and 128 tokens would need every register for more.
  launch.inputs = layout.row == 16 || layout.block_cols == 16 || (layout.row == 64 && launch.tokens == 128) ? 16 : 32;
  launch.threads = 256;
  // As Sm80Tile has it: 64 inputs of x; or 32, and of the outputs of a tile.
  launch.shared_bytes = layout.row > 16 ? 3 * launch.tokens * 128 : 4 * (launch.tokens + kTileOutputs) * 64;
  launch.blocks = cut.blocks;
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
                                                    int most_row, int sms, const int* work, sparse_prune::Layout* layout,
                                                    sparse_prune::LinearLaunch* launch) {
  *layout = sparse_prune::layout_of(out_features, nnzb, block_rows, block_cols, most_row);
  *launch = sparse_prune::linear_launch(M, *layout, sms, work);
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
