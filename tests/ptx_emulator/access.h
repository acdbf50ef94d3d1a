// The one way to memory: bounds, alignment, counters and races are checked here and nowhere else.
#pragma once

#include "state.h"

namespace ptx {

struct Lanes {
  u64 at[LANES];
};

inline Lanes addresses(Warp& w, const Inst& i, u32 op) {
  Lanes out;
  if (i.op[op].bytes == 4) {
    const u32* r = w.reg<u32>(i.op[op]);
    for (int l = 0; l < LANES; ++l) out.at[l] = u32(r[l] + u32(i.offset));
  } else {
    const u64* r = w.reg<u64>(i.op[op]);
    for (int l = 0; l < LANES; ++l) out.at[l] = r[l] + u64(i.offset);
  }
  return out;
}

// Host address of `bytes` bytes of global memory, all of them in one tensor.
u8* global_bytes(Warp& w, const Inst& i, int lane, u64 address, u32 bytes, bool write);
// Counts one warp instruction's accesses to global memory.
void count_global(Warp& w, const Inst& i, Mask m, const Lanes& a, const u32* bytes, bool write, bool past_l1);

// Offset within shared memory, checked.
u32 shared_at(Warp& w, const Inst& i, int lane, u64 address, u32 bytes);
void count_shared(Warp& w, Mask m, const u32* at, u32 bytes, bool write);

enum class Use : u8 { read, write };
// Checks one warp instruction's accesses to shared memory for races and records them.
void note_shared(Warp& w, const Inst& i, Mask m, const u32* at, u32 bytes, Use use);

void complete_copies(Warp& w, Mask m, const u32* through, bool all);
void deliver(Warp& w, Copy& copy, Mask m);

}  // namespace ptx
