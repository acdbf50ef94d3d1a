// Branches, barriers, and what the lanes of a warp tell each other.
#include <algorithm>

#include "access.h"
#include "decode.h"

namespace ptx {

void decode_proxy_fence(Line&, Inst&);
void branch_to(Line&, Inst&, const std::string&);

namespace {

void bra(Line& l, Inst& inst) {
  inst.kind = CONTROL;
  inst.flow = Flow::branch;
  l.take("uni");
  l.want(1);
  branch_to(l, inst, l.operands[0].text);
}
void exit_(Line& l, Inst& inst) {
  inst.kind = CONTROL;
  inst.flow = Flow::exit;
  l.take("uni");
  l.want(0);
}
void nothing(Warp&, const Inst&, Mask) {}

// ---- barriers of the CTA ----

// a: 0 sync, 1 arrive. Operands: barrier, [threads]
void barrier(Warp& w, const Inst& i, Mask m) {
  Cta& cta = *w.cta;
  int lane = __builtin_ctz(m);
  u64 id = w.read(i.op[0], lane);
  if (id > 15) w.fail(i, lane, format("barrier %llu, of 16", (unsigned long long)id));
  u32 everyone = cta.launch->block[0] * cta.launch->block[1] * cta.launch->block[2];
  u32 threads = i.ops > 1 ? w.reg<u32>(i.op[1])[lane] : (everyone + LANES - 1) / LANES * LANES;
  if (threads % LANES || threads == 0) w.fail(i, lane, format("a barrier of %u threads, no multiple of the warp's", threads));
  Barrier& b = cta.barriers[id];
  if (b.arrived == 0) b.expected = threads, b.first = &i;
  else if (b.expected != threads)
    w.fail(i, lane, format("barrier %llu is awaited by %u threads here and by %u at line %u", (unsigned long long)id, threads, b.expected, b.first->line));
  release(w, m, b.view);
  if (i.a) advance(w, m, false);
  b.arrived += LANES;
  if (i.a == 0) b.waiting.push_back(w.index);
  if (b.arrived > b.expected) w.fail(i, lane, format("more than %u threads arrive at barrier %llu", threads, (unsigned long long)id));
  if (b.arrived == b.expected) {
    for (u32 other : b.waiting) {
      Warp& o = cta.warps[other];
      o.barrier = -1;
      acquire(o, o.alive, b.view);
      advance(o, o.alive, true);
    }
    b.view = View{};
    b.arrived = 0;
    b.waiting.clear();
    cta.cluster->progress++;
  } else if (i.a == 0) {
    w.barrier = int(id);
  }
}
// a: 0 arrive, 1 wait; b: relaxed
void cluster_barrier(Warp& w, const Inst& i, Mask m) {
  Cluster& c = *w.cta->cluster;
  if (i.a == 0) {
    if (!i.b) release(w, m, c.open);
    advance(w, m, false);
    w.cluster_phase = c.phase + 1;
    if (++c.arrived == c.warps) {
      c.arrived = 0;
      c.phase++;
      c.done = std::move(c.open);
      c.open = View{};
      c.progress++;
    }
  } else if (c.phase < w.cluster_phase) {
    w.again = true;
  } else {
    if (w.cluster_phase == 0) w.fail(i, 0, "barrier.cluster.wait without an arrive before it");
    acquire(w, m, c.done);
    advance(w, m, true);
  }
}
void bar(Line& l, Inst& inst) {
  inst.kind = BARRIER;
  if (l.take("cluster")) {
    inst.sync = Sync::aligned;
    inst.a = l.take("wait");
    if (!inst.a && !l.take("arrive")) return;
    inst.b = l.take("relaxed");
    l.take("release"), l.take("acquire"), l.take("aligned");
    l.want(0);
    inst.run = cluster_barrier;
    return;
  }
  l.take("cta");
  if (l.take("warp")) {
    if (!l.take("sync")) return;
    l.want(1);
    l.push(l.operands[0].text, 4);
    inst.sync = Sync::members;
    inst.member_op = 0;
    inst.run = [](Warp& w, const Inst&, Mask m) { sync_lanes(w, m); };
    return;
  }
  inst.sync = Sync::aligned;
  l.take("aligned");
  bool sync = l.take("sync");
  if (!sync && !l.take("arrive")) return;
  inst.a = !sync;
  l.want(sync ? 1 : 2, 2);
  for (auto& o : l.operands) l.push(o.text, 4);
  inst.run = barrier;
}

// ---- warp ----

// a: 0 up, 1 down, 2 bfly, 3 idx; b: a predicate as second destination
void shuffle(Warp& w, const Inst& i, Mask m) {
  u32 s = 1 + i.b;
  const u32 *from = w.reg<u32>(i.op[s]), *b = w.reg<u32>(i.op[s + 1]), *c = w.reg<u32>(i.op[s + 2]);
  u32 out[LANES];
  Mask inside = 0;
  for (u32 l = 0; l < LANES; ++l) {
    u32 bound = b[l] & 31, clamp = c[l] & 31, segment = c[l] >> 8 & 31;
    u32 most = (l & segment) | (clamp & ~segment), least = l & segment;
    u32 j;
    bool p;
    switch (i.a) {
      case 0: j = l - bound, p = i32(j) >= i32(most); break;
      case 1: j = l + bound, p = j <= most; break;
      case 2: j = l ^ bound, p = j <= most; break;
      default: j = least | (bound & ~segment), p = j <= most;
    }
    if (!p) j = l;
    inside |= Mask(p) << l;
    // A lane that does not take part has nothing to give.
    out[l] = m >> (j & 31) & 1 ? from[j & 31] : FULL;
  }
  put(w.reg<u32>(i.op[0]), out, m);
  if (i.b) w.set_predicate(i.op[1], inside, m);
}
void shfl(Line& l, Inst& inst) {
  inst.kind = SHUFFLE;
  inst.sync = Sync::members;
  if (!l.take("sync")) return;
  inst.a = l.take("up") ? 0 : l.take("down") ? 1 : l.take("bfly") ? 2 : l.take("idx") ? 3 : 4;
  if (inst.a == 4 || l.take_type().bits != 32) return;
  l.want(5);
  inst.b = l.operands[0].items.size() == 2;
  l.push(l.operands[0].items[0], 4);
  if (inst.b) l.push_predicate(l.operands[0].items[1]);
  for (int k = 1; k < 5; ++k) l.push(l.operands[k].text, 4);
  inst.member_op = l.ops.size() - 1;
  inst.run = shuffle;
}

// a: 0 ballot, 1 any, 2 all, 3 uni
void vote_lanes(Warp& w, const Inst& i, Mask m) {
  Mask p = w.predicate(i.op[1]) & m;
  if (i.a == 0) {
    u32 out[LANES];
    std::fill(out, out + LANES, p);
    put(w.reg<u32>(i.op[0]), out, m);
  } else {
    bool r = i.a == 1 ? p != 0 : i.a == 2 ? p == m : p == 0 || p == m;
    w.set_predicate(i.op[0], r ? FULL : 0, m);
  }
}
void vote(Line& l, Inst& inst) {
  inst.kind = SHUFFLE;
  inst.sync = Sync::members;
  if (!l.take("sync")) return;
  inst.a = l.take("ballot") ? 0 : l.take("any") ? 1 : l.take("all") ? 2 : l.take("uni") ? 3 : 4;
  if (inst.a == 4) return;
  l.take_type();
  l.want(3);
  if (inst.a == 0) l.push(l.operands[0].text, 4);
  else l.push_predicate(l.operands[0].text);
  l.push_predicate(l.operands[1].text);
  l.push(l.operands[2].text, 4);
  inst.member_op = 2;
  inst.run = vote_lanes;
}
void activemask(Line& l, Inst& inst) {
  inst.kind = SHUFFLE;
  l.take_type();
  l.want(1);
  l.push(l.operands[0].text, 4);
  inst.run = [](Warp& w, const Inst& i, Mask m) {
    u32 out[LANES];
    std::fill(out, out + LANES, m);
    put(w.reg<u32>(i.op[0]), out, m);
  };
}
// a: 0 add, 1 min, 2 max, 3 and, 4 or, 5 xor; b: signed
void reduce(Warp& w, const Inst& i, Mask m) {
  const u32* in = w.reg<u32>(i.op[1]);
  u32 r = in[__builtin_ctz(m)];
  for (Mask rest = m & (m - 1); rest; rest &= rest - 1) {
    u32 x = in[__builtin_ctz(rest)];
    switch (i.a) {
      case 0: r += x; break;
      case 1: r = i.b ? u32(std::min(i32(r), i32(x))) : std::min(r, x); break;
      case 2: r = i.b ? u32(std::max(i32(r), i32(x))) : std::max(r, x); break;
      case 3: r &= x; break;
      case 4: r |= x; break;
      default: r ^= x;
    }
  }
  u32 out[LANES];
  std::fill(out, out + LANES, r);
  put(w.reg<u32>(i.op[0]), out, m);
}
void redux(Line& l, Inst& inst) {
  inst.kind = SHUFFLE;
  inst.sync = Sync::members;
  if (!l.take("sync")) return;
  const char* names[] = {"add", "min", "max", "and", "or", "xor"};
  inst.a = 6;
  for (u32 k = 0; k < 6; ++k)
    if (l.take(names[k])) inst.a = k;
  Type t = l.take_type();
  if (inst.a == 6 || t.is_float()) return;
  inst.b = t.kind == 's';
  l.want(3);
  for (auto& o : l.operands) l.push(o.text, 4);
  inst.member_op = 2;
  inst.run = reduce;
}
void elect(Line& l, Inst& inst) {
  inst.kind = SHUFFLE;
  inst.sync = Sync::members;
  if (!l.take("sync")) return;
  l.want(2);
  if (l.operands[0].items.size() != 2) return;
  l.push(l.operands[0].items[0], 4);
  l.push_predicate(l.operands[0].items[1]);
  l.push(l.operands[1].text, 4);
  inst.member_op = 2;
  inst.run = [](Warp& w, const Inst& i, Mask m) {
    u32 out[LANES];
    int leader = __builtin_ctz(m);
    std::fill(out, out + LANES, u32(leader));
    put(w.reg<u32>(i.op[0]), out, m);
    w.set_predicate(i.op[1], 1u << leader, m);
  };
}

// The address in shared::cluster of what lies at the same place in another block.
void mapa(Line& l, Inst& inst) {
  inst.kind = MOVE;
  bool window = !l.take("shared::cluster");
  Type t = l.take_type();
  l.want(3);
  l.push(l.operands[0].text, t.bytes());
  l.push_address(1, inst, t.bytes());
  l.push(l.operands[2].text, 4);
  inst.a = window;
  inst.run = [](Warp& w, const Inst& i, Mask m) {
    for (int k = 0; k < LANES; ++k)
      if (m >> k & 1) {
        u64 at = w.read(i.op[1], k) + u64(i.offset), rank = w.read(i.op[2], k);
        if (i.a) at -= SHARED_WINDOW;
        if (rank >= w.cta->cluster->ctas.size()) w.fail(i, k, format("block %llu of a cluster of %zu", (unsigned long long)rank, w.cta->cluster->ctas.size()));
        w.write(i.op[0], k, ((rank + 1) << 24 | (at & 0xffffff)) + (i.a ? SHARED_WINDOW : 0));
      }
  };
}

// Fences order one thread's accesses; here they are in order already.
void fence(Line& l, Inst& inst) {
  inst.kind = FENCE;
  if (l.has("proxy") || l.has("mbarrier_init")) return decode_proxy_fence(l, inst);
  for (const char* m : {"sc", "acq_rel", "cta", "gl", "gpu", "sys", "cluster"}) l.take(m);
  l.want(0);
  inst.run = nothing;
}
void griddepcontrol(Line& l, Inst& inst) {
  inst.kind = CONTROL;
  l.take("wait"), l.take("launch_dependents");
  l.want(0);
  inst.run = nothing;
}
void prefetch(Line& l, Inst& inst) {
  inst.kind = MOVE;
  l.mods.clear();
  inst.run = nothing;
}
void trap(Line& l, Inst& inst) {
  inst.kind = CONTROL;
  l.want(0);
  inst.run = [](Warp& w, const Inst& i, Mask m) { w.fail(i, __builtin_ctz(m), "the program traps (an assertion failed)"); };
}

}  // namespace

const Family& control_family() {
  static const Family family{{{"bra", bra},
                              {"ret", exit_},
                              {"exit", exit_},
                              {"bar", bar},
                              {"barrier", bar},
                              {"shfl", shfl},
                              {"vote", vote},
                              {"activemask", activemask},
                              {"redux", redux},
                              {"elect", elect},
                              {"membar", fence},
                              {"fence", fence},
                              {"griddepcontrol", griddepcontrol},
                              {"mapa", mapa},
                              {"prefetch", prefetch},
                              {"trap", trap}}};
  return family;
}

}  // namespace ptx
