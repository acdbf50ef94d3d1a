// What a block-sparse product is asked for and how it is launched; host and device, without torch.
#pragma once

#include <stdint.h>

namespace sparse_prune {

// Activations, numbered as sparse_prune::Activation of the CPU kernels (csrc/cpu/kernels.h).
enum : int { kNone = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3, kSilu = 4 };

constexpr int kTileOutputs = 128;  // outputs of a tile of merged block-rows
// So many tokens pass over a tile before the next one: blocks that run together share weights and x in L2.
constexpr int kSetTokens = 2048;
// Tokens of a tile, where it can have 256; and those that three of the first or four of the second kind make.
constexpr int kTallTokens = 256, kLowTokens = 192, kSwapTokens = 3 * kTallTokens;
static_assert(kSwapTokens == 4 * kLowTokens, "low rows take the place of tall ones.");
// How a unit orders its numbers (cuda.fragments, cuda_sm90.fragment_order): as right operands of two mma.sync, outputs of rows of 16 or
// of longer ones; or as the left operand of one wgmma, outputs as in rows of 16.
enum : int { kRightOrder16 = 0, kRightOrder = 1, kLeftOrder = 2 };
constexpr int kUnit = 16;          // a unit is 16 outputs x 16 inputs in the order of one mma's fragments: 512 bytes

constexpr int kUnitBytes = 512;
constexpr int kSpareUnits = 4;     // behind a layout's last one: a kernel reads that far ahead
constexpr int kMostRow = 64;       // outputs of a row at most
constexpr int kMostRow8 = 32;  // and of weights of 8 bits: with 64 and scales, two blocks on a multiprocessor lack 14 registers
constexpr int kJobInts = 160;      // of struct SddJob

}  // namespace sparse_prune
