// What a block-sparse product is asked for and how it is launched; host and device, without torch.
#pragma once

#include <stdint.h>

namespace sparse_prune {

// Activations, numbered as sparse_prune::Activation of the CPU kernels (csrc/cpu/kernels.h).
enum : int { kNone = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3, kSilu = 4 };

constexpr int kTileOutputs = 128;  // outputs of a tile of merged block-rows
constexpr int kUnit = 16;          // a unit is 16 outputs x 16 inputs in the order of one mma's fragments: 512 bytes

constexpr int kJobInts = 160;      // of struct SddJob

}  // namespace sparse_prune
