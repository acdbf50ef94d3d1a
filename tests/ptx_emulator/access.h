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

void count_sector(Warp& w, u64 sector, bool write);  // one that passes L1 by

// Offset within shared memory, checked.
u32 shared_at(Warp& w, const Inst& i, int lane, u64 address, u32 bytes);
// Addresses of shared::cluster: those of the own block as they are, those of block r of the cluster at (r + 1) << 24.
Cta& shared_owner(Warp& w, const Inst& i, int lane, u64& address);
void count_shared(Warp& w, Mask m, const u32* at, u32 bytes, bool write);

enum class Use : u8 { read, write };

// Races: checks one warp instruction's accesses to shared memory and records them. `values`: bytes to be written, per lane
// `stride` bytes apart, so that writing what is there already is no conflict; null if unknown.
void note_shared(Warp& w, const Inst& i, Mask m, const u32* at, u32 bytes, Use use, const u8* values = nullptr, u32 stride = 0, Cta* where = nullptr);
// Asynchronous accesses. Pending ones conflict with everything until they are settled.
void note_pending_write(Warp& w, const Inst& i, int lane, u32 at, u32 bytes, Cta* where = nullptr);  // cp.async, bulk copies: at issue
void settle_write(Cta& cta, u32 at, u32 bytes, u32 agent, u32 lane, u32 clock);
void note_pending_read(Warp& w, const Inst& i, int lane, u32 at, u32 bytes);   // wgmma, bulk copies to global memory; async proxy
void settle_read(Warp& w, u32 at, u32 bytes);
void unsettle_read(Warp& w, u32 at, u32 bytes);                                // another one is still under way

// Synchronisation.
void start_races(Cta& cta);
void release(Warp& w, Mask m, View& to);           // what lanes m know becomes part of the view
void acquire(Warp& w, Mask m, const View& from);
void advance(Warp& w, Mask m, bool ordered);       // a new clock; ordered: lanes m have waited for each other
void sync_lanes(Warp& w, Mask m);                  // bar.warp.sync
void fence_async(Warp& w, Mask m);                 // fence.proxy.async
void check_visible(Warp& w, const Inst& i, int lane, u32 at, u32 bytes, Cta* where = nullptr);  // like a read, unrecorded

void complete_copies(Warp& w, Mask m, const u32* through, bool all);
void deliver(Warp& w, Copy& copy, Mask m);
void complete_bulk(Cta& by, size_t which);
void compute_wgmma(Warp& w, Wgmma& g);
inline u32 swizzled(u32 address, u32 span) {  // span 0, 32, 64, 128: the 16-byte piece within a row of span bytes changes with the row
  return span ? address ^ ((address >> 7 & (span / 16 - 1)) << 4) : address;
}

}  // namespace ptx
