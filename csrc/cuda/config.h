// Which kernel a product runs and how it is launched. Plain C++, without CUDA: tests build and ask it too, so that what is emulated is
// what is launched.
#pragma once

#include <stdint.h>

#include "bsr_linear_sm90.h"
#include "problem.h"

namespace sparse_prune {

// The layout of a weight, as kernels/sparse_prune_kernels/cuda.py makes it: weights, then tables. Offsets are in bytes.
struct Layout {
  int row;          // outputs of a row: 16, 32 or 64
  int order;        // of a unit: kRightOrder16, kRightOrder or kLeftOrder
  int block_cols;   // inputs of a block
  int64_t rows;     // of the weight
  int64_t tiles;    // of merged rows
  int64_t pieces;   // of a row at 16 inputs
  int64_t tables, starts, piece_table, steps;  // struct Tile, int, struct Piece, struct Step
  int64_t least_bytes;                         // of the whole, with one spare step at least
};

// Sides in {16, 32, 64, 128}; weights of 8 bits count pairs of inputs, and have rows of kMostRow8.
Layout layout_of(int64_t out_features, int64_t nnzb, int block_rows, int block_cols, int most_row = kMostRow);

// What bsr_linear_skinny needs of a weight packed for sm_90a; the rest is zero.
Layout layout_of_sm90(int64_t out_features, const sm90::Packed& weight);

// Up to so many tokens the bytes of the weight are the wall.
constexpr int64_t kSkinnyTokens = 64;

struct LinearLaunch {
  int skinny;        // whether bsr_linear_skinny runs, else bsr_linear_sm80
  int tokens;        // which instantiation: most tokens of a block
  int units;         // skinny: which instantiation
  int inputs;        // else: which instantiation, by the inputs that a row has or lacks together
  int threads;
  int shared_bytes;  // dynamic shared memory
  // Else: rows of `tokens` that all tiles have; then the last `whole` tiles, those with least to do, have three more where the others
  // have four of kLowTokens; then all have rows of kLowTokens to M's end. Blocks go in this order, so that the last ones are short.
  int tall, whole;
  int64_t blocks;    // of the grid
};

// M > 0 tokens, on a GPU of `sms` multiprocessors; most_tokens of a block, 128 or 256. work [tiles], what each tile has to do for a token,
// in any unit, lets tiles have two heights where that ends sooner; without it they have one.
LinearLaunch linear_launch(int64_t M, const Layout& layout, int sms, const int* work = nullptr, int most_tokens = 256);

// most_tokens of e4m3 weights on a GPU of that compute capability's major number: kTakenApart.
inline int most_tokens_of_e4m3(int major) { return major == 9 || major == 10 || major == 11 ? 128 : 256; }

struct SddLaunch {
  int units;         // which instantiation
  int splits;        // parts of the tokens; with more than one, sum_parts runs too
  int threads;       // of both
  int shared_bytes;  // dynamic shared memory of bsr_sdd_sm80
  int64_t blocks, sum_blocks;  // of the grids
};

// M > 0 tokens, nnzb > 0 blocks in `jobs` jobs.
SddLaunch sdd_launch(int64_t M, int64_t jobs, int64_t nnzb, int block_rows, int block_cols, int sms);

}  // namespace sparse_prune
