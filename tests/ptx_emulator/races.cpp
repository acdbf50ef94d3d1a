// Races in shared memory, by happens-before.
//
// Every warp has a clock. A granule of shared memory (the smallest access in the program: 1, 2 or 4 bytes) remembers its last writer
// (agent, lane, clock) and, per warp, its last reader (lane or "several", clock). An access conflicts with a remembered one unless that one
// lies in the past of the accessing lane: same lane, or clock <= seen[agent][lane]. What a lane has seen grows only by synchronisation:
//
//   bar.sync, bar.arrive    everyone who waits has seen what everyone who arrived had done and seen
//   mbarrier                likewise between arrivals of a phase and those whose wait found it complete
//   bar.warp.sync           the lanes of its mask have seen each other; nothing else orders lanes of one warp: shfl, vote, ldmatrix and
//                           their like exchange registers and say nothing about memory
//   cp.async                a pending write from issue to the issuing lane's wait, then a write of that lane
//   bulk copies             a pending write from issue to completion, then a write of the mbarrier (agent) in that phase (clock)
//   wgmma, bulk stores      pending reads until the wait that covers them
//
// fence.proxy.async by a lane: what it has seen becomes visible to the async proxy; wgmma and bulk stores may read what ordinary stores
// or cp.async wrote only if such a fence lies between. A write that changes nothing conflicts with nothing.
//
// Known limits, all on the side of silence except the last: lanes outside a partial bar.warp.sync count as synchronised; an arrival by some
// lanes of a warp covers the others unless these touched shared memory since the warp last synchronised; in that case it does not
// cover the arriving lanes either. Atomics are not checked.
#include <algorithm>

#include "access.h"

namespace ptx {

namespace {

constexpr u32 PENDING = 0xffffffffu;
constexpr u32 SEVERAL = 32;
constexpr u32 WHOLE_WARP = 33;  // a collective access that every lane has waited for

u64 pack_writer(u32 agent, u32 lane, u32 clock) { return u64(agent) << 40 | u64(lane) << 32 | clock; }

bool on(const Cta& cta) { return cta.launch->races; }

std::string who(const Cta& cta, u32 agent, u32 lane) {
  if (agent >= cta.cluster->warps) return "a bulk copy";
  std::string name = format("warp %u", u32(agent % cta.warps.size()));
  if (cta.cluster->ctas.size() > 1) name += format(" of block %u of the cluster", u32(agent / cta.warps.size()));
  return lane >= SEVERAL ? name : name + format(", lane %u", lane);
}

[[noreturn]] void race(Warp& w, const Inst& i, int lane, const char* now, const char* before, u32 at, u32 agent, u32 other, bool pending) {
  w.fail(i, lane, format("race in shared memory: %s at %u and the %s by %s %s", now, at, before, who(*w.cta, agent, other).c_str(),
                         pending ? "that may still be under way" : "are not ordered by a barrier"));
}

inline bool past(const Warp& w, u32 lane, u32 agent, u32 by, u32 clock) {
  return clock <= w.seen[agent * LANES + lane] || (agent == w.agent && (by == lane || by == WHOLE_WARP) && clock != PENDING);
}

inline void check_writer(Warp& w, const Cta& cta, const Inst& i, u32 lane, size_t g, const char* now) {
  u64 entry = cta.writer[g];
  if (entry == 0) return;
  u32 agent = u32(entry >> 40), by = u32(entry >> 32) & 63, clock = u32(entry);
  if (past(w, lane, agent, by, clock)) return;
  race(w, i, lane, now, "write", u32(g) * w.cta->launch->program->granule, agent, by, clock == PENDING);
}

void record_read(Warp& w, u32 lane, u32& entry_clock, u8& entry_lane) {
  if (entry_clock == PENDING) return;
  entry_lane = entry_clock == w.clock && entry_lane != lane ? SEVERAL : lane;
  entry_clock = w.clock;
}

void check_readers(Warp& w, const Cta& cta, const Inst& i, u32 lane, size_t g) {
  size_t warps = cta.cluster->warps;
  for (size_t v = 0; v < warps; ++v) {
    u32 clock = cta.readers[g * warps + v];
    if (clock == 0) continue;
    if (past(w, lane, v, cta.reader_lanes[g * warps + v], clock)) continue;
    race(w, i, lane, "a write", "read", u32(g) * cta.launch->program->granule, v, cta.reader_lanes[g * warps + v], clock == PENDING);
  }
}

}  // namespace

void start_races(Cta& cta) {
  if (!on(cta)) return;
  size_t granules = cta.shared.size() / cta.launch->program->granule + 1;
  cta.writer.assign(granules, 0);
  cta.readers.assign(granules * cta.cluster->warps, 0);
  cta.reader_lanes.assign(granules * cta.cluster->warps, 0);
  for (Warp& w : cta.warps) {
    w.seen.assign((cta.cluster->warps + MAX_MBARRIERS) * LANES, 0);
    w.fenced.assign(w.seen.size(), 0);
    w.clock = 1, w.own_fenced = 0, w.touched = 0;
  }
  for (Barrier& b : cta.barriers) b.view = View{};
}

void note_shared(Warp& w, const Inst& i, Mask m, const u32* at, u32 bytes, Use use, const u8* values, u32 stride, Cta* where) {
  Cta& cta = where ? *where : *w.cta;
  if (!on(cta)) return;
  w.touched |= m;
  const u32 granule = cta.launch->program->granule;
  const size_t warps = cta.cluster->warps;
  const u64 mine = pack_writer(w.agent, 0, w.clock);
  auto granules = [&](u32 l, auto visit) {
    for (size_t g = at[l] / granule, end = (at[l] + bytes + granule - 1) / granule; g < end; ++g) visit(g);
  };
  if (use == Use::read) {
    for (u32 l = 0; l < LANES; ++l)
      if (m >> l & 1) granules(l, [&](size_t g) {
        check_writer(w, cta, i, l, g, "a read");
        record_read(w, l, cta.readers[g * warps + w.agent], cta.reader_lanes[g * warps + w.agent]);
      });
    return;
  }
  for (u32 l = 0; l < LANES; ++l) {
    if (!(m >> l & 1)) continue;
    bool same = values && std::memcmp(cta.shared.data() + at[l], values + size_t(l) * stride, bytes) == 0;
    granules(l, [&](size_t g) {
      if (same && u32(cta.writer[g]) != PENDING) return;
      check_writer(w, cta, i, l, g, "a write");
      check_readers(w, cta, i, l, g);
    });
  }
  for (u32 l = 0; l < LANES; ++l) {
    if (!(m >> l & 1)) continue;
    // Lanes of one instruction may write the same value to the same place, nothing else.
    u64 entry = cta.writer[at[l] / granule];
    u32 other = u32(entry >> 32) & 63;
    if (u32(entry >> 40) == w.agent && u32(entry) == w.clock && other < l && (m >> other & 1) && at[other] == at[l] &&
        !(values && std::memcmp(values + size_t(l) * stride, values + size_t(other) * stride, bytes) == 0))
      race(w, i, l, "a write", "write", at[l], w.agent, other, false);
    granules(l, [&](size_t g) { cta.writer[g] = mine | u64(l) << 32; });
  }
}

void note_pending_write(Warp& w, const Inst& i, int lane, u32 at, u32 bytes, Cta* where) {
  Cta& cta = where ? *where : *w.cta;
  if (!on(cta)) return;
  const u32 granule = cta.launch->program->granule;
  for (size_t g = at / granule; g < (at + bytes + granule - 1) / granule; ++g) {
    check_writer(w, cta, i, lane, g, "an asynchronous write");
    check_readers(w, cta, i, lane, g);
    cta.writer[g] = pack_writer(w.agent, lane, PENDING);
  }
}
void settle_write(Cta& cta, u32 at, u32 bytes, u32 agent, u32 lane, u32 clock) {
  if (!on(cta)) return;
  const u32 granule = cta.launch->program->granule;
  for (size_t g = at / granule; g < (at + bytes + granule - 1) / granule; ++g) cta.writer[g] = pack_writer(agent, lane, clock);
}

void note_pending_read(Warp& w, const Inst& i, int lane, u32 at, u32 bytes) {
  Cta& cta = *w.cta;
  if (!on(cta)) return;
  const u32 granule = cta.launch->program->granule;
  const size_t warps = cta.cluster->warps;
  for (size_t g = at / granule; g < (at + bytes + granule - 1) / granule; ++g) {
    check_writer(w, cta, i, lane, g, "an asynchronous read");
    u64 entry = cta.writer[g];
    u32 agent = u32(entry >> 40), clock = u32(entry);
    // Ordinary stores and cp.async must be made visible to the async proxy; agents beyond the warps are bulk copies, in that proxy already.
    if (entry && agent < warps) {
      bool visible = clock <= w.fenced[agent * LANES + lane] || (agent == w.agent && clock <= w.own_fenced);
      if (!visible)
        w.fail(i, lane, format("shared memory at %u, written by %s, is read by the async proxy and no fence.proxy.async lies between", at,
                               who(cta, agent, u32(entry >> 32) & 63).c_str()));
    }
    cta.readers[g * warps + w.agent] = PENDING;
    cta.reader_lanes[g * warps + w.agent] = SEVERAL;
  }
}
void settle_read(Warp& w, u32 at, u32 bytes) {
  Cta& cta = *w.cta;
  if (!on(cta)) return;
  const u32 granule = cta.launch->program->granule;
  const size_t warps = cta.cluster->warps;
  for (size_t g = at / granule; g < (at + bytes + granule - 1) / granule; ++g) {
    cta.readers[g * warps + w.agent] = w.clock;
    cta.reader_lanes[g * warps + w.agent] = WHOLE_WARP;
  }
}

void unsettle_read(Warp& w, u32 at, u32 bytes) {
  Cta& cta = *w.cta;
  if (!on(cta)) return;
  const u32 granule = cta.launch->program->granule;
  const size_t warps = cta.cluster->warps;
  for (size_t g = at / granule; g < (at + bytes + granule - 1) / granule; ++g) cta.readers[g * warps + w.agent] = PENDING;
}

void check_visible(Warp& w, const Inst& i, int lane, u32 at, u32 bytes, Cta* where) {
  Cta& cta = where ? *where : *w.cta;
  if (!on(cta)) return;
  const u32 granule = w.cta->launch->program->granule;
  for (size_t g = at / granule; g < (at + bytes + granule - 1) / granule; ++g) check_writer(w, cta, i, lane, g, "a use");
}

void release(Warp& w, Mask m, View& to) {
  Cta& cta = *w.cta;
  if (!on(cta)) return;
  to.seen.resize(cta.cluster->warps + MAX_MBARRIERS);
  to.fenced.resize(to.seen.size());
  for (u32 a = 0; a < cta.cluster->agents; ++a)
    for (u32 l = 0; l < LANES; ++l)
      if (m >> l & 1) {
        to.seen[a] = std::max(to.seen[a], w.seen[a * LANES + l]);
        to.fenced[a] = std::max(to.fenced[a], w.fenced[a * LANES + l]);
      }
  if ((w.touched & ~m) == 0) {  // nobody else has done anything since the warp last synchronised
    to.seen[w.agent] = std::max(to.seen[w.agent], w.clock);
    to.fenced[w.agent] = std::max(to.fenced[w.agent], w.own_fenced);
  }
}
void acquire(Warp& w, Mask m, const View& from) {
  if (!on(*w.cta) || from.seen.empty()) return;
  for (u32 a = 0; a < w.cta->cluster->agents; ++a)
    for (u32 l = 0; l < LANES; ++l)
      if (m >> l & 1) {
        w.seen[a * LANES + l] = std::max(w.seen[a * LANES + l], from.seen[a]);
        w.fenced[a * LANES + l] = std::max(w.fenced[a * LANES + l], from.fenced[a]);
      }
}
void advance(Warp& w, Mask m, bool ordered) {
  if (!on(*w.cta)) return;
  u32 before = w.clock++;
  w.touched = 0;
  if (ordered)
    for (u32 l = 0; l < LANES; ++l)
      if (m >> l & 1) w.seen[w.agent * LANES + l] = before;
}
void sync_lanes(Warp& w, Mask m) {
  if (!on(*w.cta)) return;
  View all;
  release(w, m, all);
  acquire(w, m, all);
  advance(w, m, true);
}
void fence_async(Warp& w, Mask m) {
  Cta& cta = *w.cta;
  if (!on(cta)) return;
  for (u32 a = 0; a < cta.cluster->agents; ++a)
    for (u32 l = 0; l < LANES; ++l)
      if (m >> l & 1) w.fenced[a * LANES + l] = std::max(w.fenced[a * LANES + l], w.seen[a * LANES + l]);
  if ((w.touched & ~m) == 0) {
    w.own_fenced = w.clock;
    advance(w, m, false);  // what follows is not covered
  }
}

}  // namespace ptx
