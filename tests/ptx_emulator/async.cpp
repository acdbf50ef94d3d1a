// mbarrier, bulk and tensor copies (TMA), and the fences between proxies.
#include <algorithm>

#include "access.h"
#include "decode.h"

namespace ptx {

Program& program_of(Line&);

namespace {

constexpr u32 TO_SHARED = 1, TENSOR = 2, MULTICAST = 4;

u64 address(Warp& w, const Op& op, int lane, i32 offset) {
  return (op.bytes == 4 ? w.reg<u32>(op)[lane] : w.reg<u64>(op)[lane]) + u64(i64(offset));
}

MBarrier& mbarrier_at(Warp& w, const Inst& i, int lane, u64 where, Cta& owner) {
  u32 at = u32(where);
  auto it = owner.mbarriers.find(at);
  if (where >> 32 || it == owner.mbarriers.end() || !it->second.valid) w.fail(i, lane, format("there is no mbarrier at %llu", (unsigned long long)where));
  check_visible(w, i, lane, at, 8, &owner);
  return it->second;
}

void join(View& to, const View& from) {
  to.seen.resize(std::max(to.seen.size(), from.seen.size()));
  to.fenced.resize(to.seen.size());
  for (size_t a = 0; a < from.seen.size(); ++a) {
    to.seen[a] = std::max(to.seen[a], from.seen[a]);
    to.fenced[a] = std::max(to.fenced[a], from.fenced[a]);
  }
}

// A phase ends when all arrivals have come and all bytes too.
void settle_phase(Cta& cta, MBarrier& b) {
  if (b.pending || b.tx) return;
  b.phase++;
  b.pending = b.expected;
  join(b.done, b.open);
  if (b.done.seen.size() <= b.agent) b.done.seen.resize(cta.cluster->warps + MAX_MBARRIERS), b.done.fenced.resize(b.done.seen.size());
  b.done.seen[b.agent] = b.phase;
  cta.cluster->progress++;
}

enum Operation : u32 { INIT, INVAL, ARRIVE, ARRIVE_EXPECT, EXPECT, WAIT_PARITY, WAIT_STATE };

// a: operation, b: operands before the address, c: try (may give way)
void mbarrier(Warp& w, const Inst& i, Mask m) {
  if (!m) return;
  Cta& cta = *w.cta;
  const u32 base = i.b;
  Mask succeeded = 0;
  for (int l = 0; l < LANES; ++l) {
    if (!(m >> l & 1)) continue;
    u64 where = address(w, i.op[base], l, i32(i.offset));
    auto operand = [&](u32 k, u32 otherwise) { return i.ops > base + k ? w.reg<u32>(i.op[base + k])[l] : otherwise; };
    if (i.a == INIT) {
      u32 at = shared_at(w, i, l, where, 8);
      u32 count = operand(1, 0);
      if (count == 0 || count > (1u << 20) - 1) w.fail(i, l, format("an mbarrier of %u arrivals", count));
      MBarrier& b = cta.mbarriers[at];
      if (b.valid) w.fail(i, l, format("the mbarrier at %u, initialised at line %u, is initialised again without mbarrier.inval", at, b.init->line));
      u32 agent = b.init ? b.agent : cta.cluster->agents++;
      if (agent >= cta.cluster->warps + MAX_MBARRIERS) w.fail(i, l, "more mbarriers than this emulator follows");
      u32 phase = b.phase;
      b = MBarrier{};
      b.valid = true, b.agent = agent, b.expected = b.pending = count, b.phase = phase + (phase & 1), b.init = &i;
      u32 lanes[LANES];
      lanes[l] = at;
      note_shared(w, i, 1u << l, lanes, 8, Use::write);
      cta.cluster->progress++;
      continue;
    }
    Cta& owner = shared_owner(w, i, l, where);
    if (&owner != &cta && i.a != ARRIVE && i.a != ARRIVE_EXPECT && i.a != EXPECT) w.fail(i, l, "only arrivals reach the mbarriers of other blocks");
    MBarrier& b = mbarrier_at(w, i, l, where, owner);
    switch (i.a) {
      case INVAL:
        b.valid = false;
        break;
      case WAIT_PARITY:
        if ((b.phase & 1) != (operand(1, 0) & 1)) succeeded |= 1u << l;
        break;
      case WAIT_STATE:
        if (b.phase > w.reg<u64>(i.op[base + 1])[l]) succeeded |= 1u << l;
        break;
      case EXPECT:
        b.tx += operand(1, 0);
        settle_phase(owner, b);
        break;
      default: {
        u32 count = i.a == ARRIVE ? operand(1, 1) : 1;
        if (i.a == ARRIVE_EXPECT) b.tx += operand(1, 0);
        if (count > b.pending) w.fail(i, l, format("more arrivals than the %u that the mbarrier was initialised with (line %u)", b.expected, b.init->line));
        if (base) w.write(i.op[0], l, b.phase);
        // Lanes that arrive together do so knowing all that any of them knows.
        release(w, m, b.open);
        b.pending -= count;
        settle_phase(owner, b);
        cta.cluster->progress++;
      }
    }
    if (succeeded >> l & 1) acquire(w, 1u << l, b.done);
  }
  if (i.a == ARRIVE || i.a == ARRIVE_EXPECT) advance(w, m, false);
  if (i.a == WAIT_PARITY || i.a == WAIT_STATE) {
    w.set_predicate(i.op[0], succeeded, m);
    w.failed_wait = (m & ~succeeded) != 0;
  }
}

void decode_mbarrier(Line& l, Inst& inst) {
  inst.kind = MBARRIER;
  for (const char* m : {"shared", "shared::cta", "shared::cluster", "release", "acquire", "relaxed", "cta", "cluster"}) l.take(m);
  if (l.take_type().bits != 64) return;
  if (l.take("init")) inst.a = INIT;
  else if (l.take("inval")) inst.a = INVAL;
  else if (l.take("arrive")) inst.a = l.take("expect_tx") ? ARRIVE_EXPECT : ARRIVE;
  else if (l.take("expect_tx")) inst.a = EXPECT;
  else if (l.take("try_wait") || l.take("test_wait")) inst.a = l.take("parity") ? WAIT_PARITY : WAIT_STATE;
  else return;
  bool wait = inst.a == WAIT_PARITY || inst.a == WAIT_STATE, result = wait || inst.a == ARRIVE || inst.a == ARRIVE_EXPECT;
  inst.b = result;
  size_t k = 0;
  if (wait) l.push_predicate(l.operands.at(k++).text);
  else if (result) l.push(l.operands.at(k++).text, 8);
  l.push_address(k++, inst, 4);
  if (wait) l.want(k + 1, k + 2);  // a time limit may follow: waiting takes no time here
  if (k < l.operands.size()) l.push(l.operands[k].text, inst.a == WAIT_STATE ? 8 : 4);
  inst.run = mbarrier;
}

// ---- bulk copies ----

const TensorMap& tensor_map(Warp& w, const Inst& i, int lane, u64 where) {
  Launch& launch = *w.cta->launch;
  const u8* p;
  if (where - PARAM_WINDOW < WINDOW_BYTES || where < launch.params.size()) {
    u64 at = where < launch.params.size() ? where : where - PARAM_WINDOW;
    if (at + 128 > launch.params.size()) w.fail(i, lane, "the tensor map lies outside the parameters");
    p = launch.params.data() + at;
  } else {
    p = global_bytes(w, i, lane, where, 128, false);
  }
  if (where % 64) w.fail(i, lane, "a tensor map must be aligned to 64 bytes");
  const TensorMap& map = *reinterpret_cast<const TensorMap*>(p);
  if (map.magic != TENSOR_MAP_MAGIC) w.fail(i, lane, "this is no tensor map");
  return map;
}

// Calls f(global address or 0 outside the tensor, shared address, bytes) for each 16-byte piece, as one element run within it.
template <class F>
void each_piece(const Bulk& b, F f) {
  if (!b.tensor) {
    f(b.global, b.shared, b.bytes);
    return;
  }
  const TensorMap& t = b.map;
  u32 row_bytes = t.box[0] * t.element_bytes;
  u32 rows = b.bytes / row_bytes;
  for (u32 r = 0; r < rows; ++r) {
    u32 rest = r;
    i64 offset = 0;
    bool inside = true;
    for (u32 d = 1; d < t.rank; ++d) {
      i64 c = i64(b.at[d]) + rest % t.box[d];
      rest /= t.box[d];
      inside &= c >= 0 && c < i64(t.dims[d]);
      offset += c * i64(t.strides[d - 1]);
    }
    u32 per_piece = 16 / t.element_bytes;
    for (u32 e = 0; e < t.box[0]; e += per_piece) {
      u32 to = swizzled(b.shared + r * row_bytes + e * t.element_bytes, t.swizzle);
      u32 n = std::min(per_piece, t.box[0] - e);
      i64 first = i64(b.at[0]) + e;
      if (inside && first >= 0 && first + n <= i64(t.dims[0])) {
        f(t.address + offset + first * t.element_bytes, to, n * t.element_bytes);
      } else {
        for (u32 k = 0; k < n; ++k) {
          bool in = inside && first + k >= 0 && first + k < i64(t.dims[0]);
          f(in ? t.address + offset + (first + k) * t.element_bytes : 0, to + k * t.element_bytes, t.element_bytes);
        }
      }
    }
  }
}

// Calls f(shared address, bytes) for each 16-byte piece.
template <class F>
void each_place(const Bulk& b, F f) {
  for (u32 at = 0; at < b.bytes; at += 16) f(swizzled(b.shared + at, b.tensor ? b.map.swizzle : 0), std::min(16u, b.bytes - at));
}

}  // namespace

void complete_bulk(Cta& by, size_t which) {
  Bulk b = by.bulks[which];
  by.bulks.erase(by.bulks.begin() + which);
  Warp& w = by.warps[b.warp];
  Cta& cta = *b.cta;
  u8* shared = cta.shared.data();
  each_piece(b, [&](u64 global, u32 at, u32 bytes) {
    if (b.to_shared) {
      if (global) std::memcpy(shared + at, global_bytes(w, *b.inst, b.lane, global, 1, false), bytes);
      else std::memset(shared + at, 0, bytes);
    } else if (global) {
      std::memcpy(global_bytes(w, *b.inst, b.lane, global, 1, true), shared + at, bytes);
    }
  });
  if (b.to_shared) {
    MBarrier& m = cta.mbarriers[b.mbarrier];
    if (!m.valid) w.fail(*b.inst, b.lane, "the mbarrier was invalidated before the copy completed");
    each_place(b, [&](u32 at, u32 bytes) { settle_write(cta, at, bytes, m.agent, LANES, m.phase + 1); });
    m.tx -= b.bytes;
    settle_phase(cta, m);
  } else {
    each_place(b, [&](u32 at, u32 bytes) { settle_read(w, at, bytes); });
    for (const Bulk& other : cta.bulks)  // still being read by others of the same warp
      if (!other.to_shared && other.warp == b.warp) each_place(other, [&](u32 at, u32 bytes) { unsettle_read(w, at, bytes); });
  }
  cta.cluster->progress++;
}

namespace {

// Operands: destination, source, coordinates, [mbarrier]; a, b, c: displacements of the three addresses; d: flags, rank << 8
void bulk(Warp& w, const Inst& i, Mask m) {
  Cta& cta = *w.cta;
  Counts& counts = cta.block->counts;
  for (int l = 0; l < LANES; ++l) {
    if (!(m >> l & 1)) continue;
    Bulk b{};
    b.cta = b.by = &cta, b.inst = &i, b.warp = w.index, b.lane = l;
    b.to_shared = i.d & TO_SHARED, b.tensor = i.d & TENSOR;
    u32 rank = i.d >> 8;
    u64 first = address(w, i.op[0], l, i32(i.a)), second = address(w, i.op[1], l, i32(i.b));
    u64 global = b.to_shared ? second : first;
    u64 shared = b.to_shared ? first : second;
    if (shared - SHARED_WINDOW < WINDOW_BYTES) shared -= SHARED_WINDOW;
    if (b.tensor) {
      b.map = tensor_map(w, i, l, global);
      if (b.map.rank != rank) w.fail(i, l, format("a tensor map of rank %u", b.map.rank));
      b.bytes = b.map.element_bytes;
      for (u32 d = 0; d < rank; ++d) b.at[d] = w.reg<i32>(i.op[2 + d])[l], b.bytes *= b.map.box[d];
      u32 align = 128;
      if (shared % align) w.fail(i, l, format("a tensor copy needs shared memory aligned to %u bytes, not %llu", align, (unsigned long long)shared));
    } else {
      b.global = global;
      b.bytes = w.reg<u32>(i.op[2])[l];
      if (b.bytes % 16 || global % 16 || shared % 16) w.fail(i, l, "a bulk copy needs addresses and sizes that are multiples of 16");
      global_bytes(w, i, l, global, 1, !b.to_shared);
      if (b.bytes) global_bytes(w, i, l, global + b.bytes - 1, 1, !b.to_shared);
    }
    b.shared = shared_at(w, i, l, shared, 16);
    if (b.bytes) shared_at(w, i, l, shared + b.bytes - 1, 1);
    // Counted as it moves; checked, too: a map may describe more than its tensor.
    u64 sectors_before = 0, last = ~u64(0);
    each_piece(b, [&](u64 address, u32, u32 bytes) {
      if (!address) return;
      global_bytes(w, i, l, address, 1, !b.to_shared);
      global_bytes(w, i, l, address + bytes - 1, 1, !b.to_shared);
      for (u64 s = address / 32; s <= (address + bytes - 1) / 32; ++s)
        if (s != last) ++sectors_before, last = s, count_sector(w, s, !b.to_shared);
    });
    if (b.to_shared) {
      counts.global_load_sectors += sectors_before, counts.l2_load_sectors += sectors_before, counts.global_load_bytes += b.bytes;
      u64 barrier = address(w, i.op[i.ops - 1 - !!(i.d & MULTICAST)], l, i32(i.c));
      b.mbarrier = u32(barrier);
      // Multicast: to the same place in every block of the mask, and to the mbarrier at the same place there.
      u32 mask = i.d & MULTICAST ? w.read(i.op[i.ops - 1], l) : 0;
      u32 blocks = cta.cluster->ctas.size();
      if (mask >> blocks) w.fail(i, l, format("multicast mask 0x%x for a cluster of %u blocks", mask, blocks));
      for (u32 rank = 0; rank < blocks; ++rank) {
        if (mask ? !(mask >> rank & 1) : cta.cluster->ctas[rank].get() != &cta) continue;
        b.cta = cta.cluster->ctas[rank].get();
        mbarrier_at(w, i, l, barrier, *b.cta);
        each_place(b, [&](u32 at, u32 bytes) { note_pending_write(w, i, l, at, bytes, b.cta); });
        counts.shared_write_bytes += b.bytes;  // in every block that receives it; L2 is read once
        counts.shared_wavefronts += (b.bytes + 127) / 128, counts.shared_ideal += (b.bytes + 127) / 128;
        cta.bulks.push_back(b);
        if (cta.launch->mode == Mode::early) complete_bulk(cta, cta.bulks.size() - 1);
      }
    } else {
      counts.global_store_sectors += sectors_before, counts.global_store_bytes += b.bytes;
      counts.shared_wavefronts += (b.bytes + 127) / 128, counts.shared_ideal += (b.bytes + 127) / 128;
      counts.shared_read_bytes += b.bytes;
      b.group = w.bulk_committed[l];
      each_place(b, [&](u32 at, u32 bytes) { note_pending_read(w, i, l, at, bytes); });
      cta.bulks.push_back(b);
    }
  }
}

void wait_bulk(Warp& w, const Inst& i, Mask m) {
  for (size_t k = 0; k < w.cta->bulks.size();) {
    const Bulk& b = w.cta->bulks[k];
    bool mine = !b.to_shared && b.warp == w.index && (m >> b.lane & 1) && b.group + i.a < w.bulk_committed[b.lane];
    if (mine) complete_bulk(*w.cta, k);
    else ++k;
  }
}

}  // namespace

void decode_bulk(Line& l, Inst& inst) {  // cp.async.bulk...
  inst.kind = COPY_BULK;
  program_of(l).async_proxy = true;
  if (l.take("commit_group")) {
    l.want(0);
    inst.run = [](Warp& w, const Inst&, Mask m) {
      for (int k = 0; k < LANES; ++k) w.bulk_committed[k] += m >> k & 1;
    };
    return;
  }
  if (l.take("wait_group")) {
    l.take("read");
    l.want(1);
    inst.a = std::strtoul(l.operands[0].text.c_str(), nullptr, 0);
    inst.run = wait_bulk;
    return;
  }
  bool multicast = l.take("multicast::cluster");
  if (l.has("im2col") || l.has("prefetch") || l.has("tile::gather4")) return;
  bool tensor = l.take("tensor");
  u32 rank = 0;
  for (u32 r = 1; r <= 5; ++r)
    if (l.take(std::to_string(r) + "d")) rank = r;
  l.take("tile");
  bool hint = l.take("L2::cache_hint");
  bool to_shared = l.take("mbarrier::complete_tx::bytes");
  if (!to_shared && !l.take("bulk_group")) return;
  l.take("shared::cluster"), l.take("shared::cta"), l.take("global");
  inst.d = (to_shared ? TO_SHARED : 0) | (tensor ? TENSOR : 0) | (multicast ? MULTICAST : 0) | rank << 8;
  Inst first, second, third;
  size_t count = tensor ? 2 : 3;
  l.want(count + to_shared + multicast + hint);
  size_t map = to_shared ? 1 : 0;
  l.push_address(0, first, 8);
  l.push_address(1, second, 8);
  if (tensor) {
    auto& items = l.operands[map].items;
    if (items.size() != 2 || items[1][0] != '{') l.fail("no coordinates");
    std::string list = items[1].substr(1, items[1].size() - 2);
    size_t start = 0, n = 0;
    while (start <= list.size()) {
      size_t comma = std::min(list.find(',', start), list.size());
      std::string item = list.substr(start, comma - start);
      item.erase(0, item.find_first_not_of(" \t"));
      item.erase(item.find_last_not_of(" \t") + 1);
      l.push(item, 4);
      start = comma + 1, ++n;
    }
    if (n != rank) l.fail("as many coordinates as dimensions are needed");
  } else {
    l.push(l.operands[2].text, 4);
  }
  if (to_shared) l.push_address(count, third, 4);
  if (multicast) l.push(l.operands[count + 1].text, 2);
  inst.a = u32(first.offset), inst.b = u32(second.offset), inst.c = u32(third.offset);
  inst.run = bulk;
}

void decode_proxy_fence(Line& l, Inst& inst) {  // fence.proxy...., fence.mbarrier_init
  inst.kind = FENCE;
  if (l.take("tensormap::generic")) {  // copies look at the map when they are issued
    for (const char* m : {"proxy", "acquire", "release", "gpu", "cta", "cluster", "sys"}) l.take(m);
    inst.run = [](Warp&, const Inst&, Mask) {};
    return;
  }
  l.want(0);
  if (l.take("mbarrier_init")) {
    l.take("release"), l.take("cluster");
    inst.run = [](Warp&, const Inst&, Mask) {};
    return;
  }
  l.take("proxy");
  bool async = l.take("async") || l.take("async::generic");
  for (const char* m : {"shared::cta", "shared::cluster", "acquire", "release", "sync_restrict::shared::cluster", "sync_restrict::shared::cta", "cluster"}) l.take(m);
  if (l.take("global")) inst.run = [](Warp&, const Inst&, Mask) {};
  else if (async) inst.run = [](Warp& w, const Inst&, Mask m) { fence_async(w, m); };
}

// ---- tensor maps made on the device ----

namespace {

enum Field : u32 { GLOBAL_ADDRESS, RANK, BOX_DIM, GLOBAL_DIM, GLOBAL_STRIDE, ELEMENT_STRIDE, ELEMTYPE, INTERLEAVE, SWIZZLE, FILL, FIELDS };

// a: field, b: number of the dimension, c: 1 if the map lies in global memory. Operands: address, value
void replace_field(Warp& w, const Inst& i, Mask m) {
  for (int l = 0; l < LANES; ++l) {
    if (!(m >> l & 1)) continue;
    u64 where = address(w, i.op[0], l, i32(i.offset));
    if (where % 128) w.fail(i, l, "a tensor map must be aligned to 128 bytes");
    u8* p;
    if (i.c) {
      p = global_bytes(w, i, l, where, 128, true);
    } else {
      if (where - SHARED_WINDOW < WINDOW_BYTES) where -= SHARED_WINDOW;
      u32 at[LANES];
      at[l] = shared_at(w, i, l, where, 128);
      note_shared(w, i, 1u << l, at, 128, Use::write);
      p = w.cta->shared.data() + where;
    }
    TensorMap t;
    std::memcpy(&t, p, 128);
    u64 v = w.read(i.op[1], l);
    static const u32 bytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 4, 8, 2, 4, 4};
    static const u32 spans[] = {0, 32, 64, 128};
    u32 d = i.b;
    if (d >= 5 - (i.a == GLOBAL_STRIDE)) w.fail(i, l, "a tensor map has five dimensions");
    switch (i.a) {
      case GLOBAL_ADDRESS:
        if (v % 16) w.fail(i, l, "the tensor's address is no multiple of 16");
        t.address = v;
        t.magic = TENSOR_MAP_MAGIC;
        break;
      case RANK: t.rank = u32(v) + 1; break;  // the field holds rank - 1
      case BOX_DIM:
        if (v == 0 || v > 256) w.fail(i, l, format("a box of %llu elements", (unsigned long long)v));
        t.box[d] = u32(v);
        break;
      case GLOBAL_DIM: t.dims[d] = u32(v); break;
      case GLOBAL_STRIDE:
        if (v % 16) w.fail(i, l, format("a stride of %llu bytes, no multiple of 16", (unsigned long long)v));
        t.strides[d] = v;
        break;
      case ELEMENT_STRIDE:
        if (v != 1) w.fail(i, l, "element strides other than 1 are not implemented");
        break;
      case ELEMTYPE:
        if (v > 12) w.fail(i, l, "an unknown type of elements");
        t.element_bytes = bytes[v];
        break;
      case SWIZZLE:
        if (v > 3) w.fail(i, l, "an unknown swizzle");
        t.swizzle = spans[v];
        break;
      default:
        if (v) w.fail(i, l, "interleaved tensor maps and fills other than zero are not implemented");
    }
    std::memcpy(p, &t, 128);
  }
}

// From shared to global memory, by the whole warp, and then visible to copies that acquire it.
void publish_map(Warp& w, const Inst& i, Mask) {
  u64 to = address(w, i.op[0], 0, i32(i.a)), from = address(w, i.op[1], 0, i32(i.b));
  if (from - SHARED_WINDOW < WINDOW_BYTES) from -= SHARED_WINDOW;
  u32 at[LANES];
  at[0] = shared_at(w, i, 0, from, 128);
  note_shared(w, i, 1, at, 128, Use::read);
  std::memcpy(global_bytes(w, i, 0, to, 128, true), w.cta->shared.data() + at[0], 128);
}

void tensormap(Line& l, Inst& inst) {
  inst.kind = COPY_BULK;
  if (l.take("cp_fenceproxy")) {
    for (const char* m : {"global", "shared::cta", "tensormap::generic", "release", "gpu", "cta", "cluster", "sys", "sync", "aligned"}) l.take(m);
    inst.sync = Sync::aligned;
    l.want(3);
    Inst first, second;
    l.push_address(0, first, 8);
    l.push_address(1, second, 8);
    inst.a = u32(first.offset), inst.b = u32(second.offset);
    inst.run = publish_map;
    return;
  }
  if (!l.take("replace") || !l.take("tile")) return;
  static const char* names[] = {"global_address", "rank", "box_dim", "global_dim", "global_stride", "element_stride", "elemtype", "interleave_layout", "swizzle_mode", "fill_mode"};
  inst.a = FIELDS;
  for (u32 k = 0; k < FIELDS; ++k)
    if (l.take(names[k])) inst.a = k;
  inst.c = l.take("global");
  if (inst.a == FIELDS || (!inst.c && !l.take("shared::cta")) || !l.take("b1024")) return;
  Type t = l.take_type();
  bool ordinal = inst.a >= BOX_DIM && inst.a <= ELEMENT_STRIDE;
  l.want(2 + ordinal);
  l.push_address(0, inst, 8);
  if (ordinal) inst.b = std::strtoul(l.operands[1].text.c_str(), nullptr, 0);
  l.push(l.operands[1 + ordinal].text, t.bytes());
  inst.run = replace_field;
}

}  // namespace

const Family& async_family() {
  static const Family family{{{"mbarrier", decode_mbarrier}, {"tensormap", tensormap}}};
  return family;
}

}  // namespace ptx
