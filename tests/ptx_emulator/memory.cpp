// ld, st, atom, red, cp.async and what they touch.
#include <algorithm>

#include "access.h"
#include "decode.h"
#include "numbers.h"

namespace ptx {

std::string space_of(Line&, const std::string&);
Program& program_of(Line&);
void decode_bulk(Line&, Inst&);

// ---- global memory ----

u8* global_bytes(Warp& w, const Inst& i, int lane, u64 address, u32 bytes, bool write) {
  Launch& launch = *w.cta->launch;
  if (address % bytes && bytes <= 16) w.fail(i, lane, format("global address 0x%llx is no multiple of %u", (unsigned long long)address, bytes));
  static thread_local size_t last = 0;
  size_t n = launch.regions.size();
  if (last >= n) last = 0;
  for (size_t k = 0; k < n; ++k) {
    size_t r = last + k < n ? last + k : last + k - n;
    const Region& region = launch.regions[r];
    if (address < region.base || address + bytes > region.base + region.bytes) continue;
    last = r;
    u64 offset = address - region.base;
    if (region.legal)
      for (u32 b = 0; b < bytes; ++b)
        if (!region.legal[offset + b]) w.fail(i, lane, format("%s of %u bytes at byte %llu of storage %zu, between the elements of its tensors", write ? "write" : "read", bytes, (unsigned long long)offset, r));
    return region.host + offset;
  }
  last = 0;
  std::string where;
  for (size_t r = 0; r < n; ++r) {
    const Region& region = launch.regions[r];
    i64 before = i64(region.base - address), after = i64(address - region.base - region.bytes);
    if (before > 0 && before < (1 << 22)) where += format("; %lld bytes before storage %zu", (long long)before, r);
    if (after + i64(bytes) > 0 && after < (1 << 22)) where += format("; %lld bytes after the end of storage %zu (%llu bytes)", (long long)after, r, (unsigned long long)region.bytes);
  }
  w.fail(i, lane, format("global %s of %u bytes at 0x%llx is in no tensor", write ? "write" : "read", bytes, (unsigned long long)address) + where);
}

void count_global(Warp& w, const Inst&, Mask m, const Lanes& a, const u32* bytes, bool write, bool past_l1) {
  Launch& launch = *w.cta->launch;
  if (!launch.count || !m) return;
  Block& block = *w.cta->block;
  Counts& c = block.counts;
  u64 sectors[LANES * 2];
  int n = 0;
  u64 total = 0;
  bool rising = true;
  for (int l = 0; l < LANES; ++l) {
    if (!(m >> l & 1) || bytes[l] == 0) continue;
    total += bytes[l];
    for (u64 s = a.at[l] / 32; s <= (a.at[l] + bytes[l] - 1) / 32; ++s) {
      if (n && sectors[n - 1] == s) continue;
      rising &= n == 0 || sectors[n - 1] < s;
      sectors[n++] = s;
    }
  }
  if (!rising) {
    std::sort(sectors, sectors + n);
    n = std::unique(sectors, sectors + n) - sectors;
  }
  c.global_requests++;
  (write ? c.global_store_sectors : c.global_load_sectors) += n;
  (write ? c.global_store_bytes : c.global_load_bytes) += total;
  size_t r = 0;
  for (int k = 0; k < n; ++k) {
    u64 address = sectors[k] * 32;
    auto inside = [&](const Region& g) { return address + 31 >= g.base && address < g.base + g.bytes; };
    if (r >= launch.regions.size() || !inside(launch.regions[r])) {
      for (r = 0; r < launch.regions.size() && !inside(launch.regions[r]); ++r) {}
      if (r == launch.regions.size()) continue;
    }
    u64 s = sectors[k] - launch.regions[r].base / 32;
    if (write) {
      if (!block.stored[r][s]) block.stored[r][s] = true;
      block.in_l1[r][s] = 0;
    } else {
      block.loaded[r][s] = true;
      u32& brought = block.in_l1[r][s];
      if (past_l1 || brought != w.cta->serial) c.l2_load_sectors++;
      if (!past_l1) brought = w.cta->serial;
    }
  }
}

void count_sector(Warp& w, u64 sector, bool write) {
  Launch& launch = *w.cta->launch;
  if (!launch.count) return;
  for (size_t r = 0; r < launch.regions.size(); ++r) {
    const Region& g = launch.regions[r];
    if (sector * 32 + 31 < g.base || sector * 32 >= g.base + g.bytes) continue;
    (write ? w.cta->block->stored : w.cta->block->loaded)[r][sector - g.base / 32] = true;
    return;
  }
}

// ---- shared memory ----

Cta& shared_owner(Warp& w, const Inst& i, int lane, u64& address) {
  u64 rank = address >> 24;
  if (rank == 0) return *w.cta;
  address &= 0xffffff;
  if (rank > w.cta->cluster->ctas.size()) w.fail(i, lane, format("shared address of block %llu of a cluster of %zu", (unsigned long long)rank - 1, w.cta->cluster->ctas.size()));
  return *w.cta->cluster->ctas[rank - 1];
}

u32 shared_at(Warp& w, const Inst& i, int lane, u64 address, u32 bytes) {
  Cta& cta = *w.cta;
  u32 base = cta.launch->program->shared_base;
  if (address < base || address + bytes > base + cta.launch->shared_bytes)
    w.fail(i, lane, format("shared access of %u bytes at %lld, outside the %u bytes from %u on", bytes, (long long)address, cta.launch->shared_bytes, base));
  for (auto it = cta.mbarriers.lower_bound(u32(address) > 7 ? u32(address) - 7 : 0); it != cta.mbarriers.end() && it->first < address + bytes; ++it)
    if (it->second.valid && i.kind != MBARRIER) w.fail(i, lane, format("the mbarrier at %u is no ordinary memory", it->first));
  if (address % bytes && bytes <= 16) w.fail(i, lane, format("shared address %llu is no multiple of %u", (unsigned long long)address, bytes));
  return u32(address);
}

void count_shared(Warp& w, Mask m, const u32* at, u32 bytes, bool write) {
  if (!w.cta->launch->count || !m) return;
  Counts& c = w.cta->block->counts;
  // Hardware serves 128 bytes at a time: all lanes up to 4 bytes each, half a warp at 8, a quarter at 16; in each of these parts every
  // bank gives one word per wavefront. Words are told apart by a stamp that names the instruction and the part.
  std::vector<u32>& stamps = w.cta->word_stamps;
  if (stamps.size() < w.cta->shared.size() / 4 + 8) stamps.assign(w.cta->shared.size() / 4 + 8, 0);
  if (w.cta->stamp > 0xfffffff0u) std::fill(stamps.begin(), stamps.end(), w.cta->stamp = 0);
  const u32 start = w.cta->stamp + 4;
  w.cta->stamp = start;
  const int step = bytes <= 4 ? LANES : bytes == 8 ? 16 : 8;
  u32 waves = 0, distinct = 0;
  for (int from = 0, part = 0; from < LANES; from += step, ++part) {
    u8 in_bank[32] = {};
    u8 most = 0;
    for (int l = from; l < from + step; ++l) {
      if (!(m >> l & 1)) continue;
      for (u32 word = at[l] / 4; word <= (at[l] + bytes - 1) / 4; ++word) {
        u32& stamp = stamps[word];
        if (stamp == start + part) continue;
        distinct += stamp < start;
        stamp = start + part;
        most = std::max(most, ++in_bank[word % 32]);
      }
    }
    waves += most;
  }
  c.shared_wavefronts += waves;
  c.shared_ideal += (distinct + 31) / 32;
  (write ? c.shared_write_bytes : c.shared_read_bytes) += u64(__builtin_popcount(m)) * bytes;
}

namespace {

enum Space : u32 { GLOBAL, SHARED, LOCAL, PARAM, GENERIC };
enum Option : u32 { SIGNED = 1, PAST_L1 = 2 };

Space space_from(Line& l) {
  for (auto& [name, space] : std::initializer_list<std::pair<const char*, Space>>{
           {"global", GLOBAL}, {"const", GLOBAL}, {"shared", SHARED}, {"shared::cta", SHARED}, {"shared::cluster", SHARED}, {"local", LOCAL}, {"param", PARAM}, {"param::entry", PARAM}})
    if (l.take(name)) return space;
  return GENERIC;
}

// Hints and orderings that change no value here: global memory of this emulator is sequentially consistent.
void strike_hints(Line& l, u32& options) {
  for (const char* m : {"cg", "cv", "cs", "lu", "wt"})
    if (l.take(m)) options |= std::string(m) == "cg" || std::string(m) == "cv" ? PAST_L1 : 0;
  for (const char* m : {"relaxed", "acquire", "release", "volatile", "acq_rel"})
    if (l.take(m)) options |= PAST_L1;
  for (const char* m : {"ca", "wb", "nc", "weak", "sys", "gpu", "cta", "cluster", "mmio"}) l.take(m);
  for (size_t k = l.mods.size(); k-- > 0;)
    if (l.mods[k].rfind("L1::", 0) == 0 || l.mods[k].rfind("L2::", 0) == 0) {
      if (l.mods[k] == "L1::no_allocate") options |= PAST_L1;
      l.mods.erase(l.mods.begin() + k);
    }
}

Space resolve(Warp& w, const Inst& i, Mask m, Lanes& a, Space space) {
  if (space != GENERIC || !m) return space;
  auto window = [](u64 x) {
    return x - SHARED_WINDOW < WINDOW_BYTES ? SHARED : x - PARAM_WINDOW < WINDOW_BYTES ? PARAM : x - LOCAL_WINDOW < WINDOW_BYTES ? LOCAL : GLOBAL;
  };
  Space found = window(a.at[__builtin_ctz(m)]);
  for (int l = 0; l < LANES; ++l)
    if (m >> l & 1) {
      if (window(a.at[l]) != found) w.fail(i, l, "lanes of one generic access go to different spaces: not implemented");
      a.at[l] -= found == SHARED ? SHARED_WINDOW : found == PARAM ? PARAM_WINDOW : found == LOCAL ? LOCAL_WINDOW : 0;
    }
  return found;
}

u8* local_bytes(Warp& w, const Inst& i, int lane, u64 address, u32 bytes) {
  u32 each = w.cta->launch->program->local_bytes;
  if (address + bytes > each) w.fail(i, lane, format("local access of %u bytes at %llu, outside its %u bytes", bytes, (unsigned long long)address, each));
  if (address % bytes && bytes <= 16) w.fail(i, lane, format("local address %llu is no multiple of %u", (unsigned long long)address, bytes));
  return w.cta->local.data() + u64(w.index * LANES + lane) * each + address;
}

// a: bytes of an element, b: elements, c: options, d: space
template <int Bytes>
inline void copy_fixed(u8* to, const u8* from) { std::memcpy(to, from, Bytes); }
inline void copy_bytes(u8* to, const u8* from, u32 bytes) {
  switch (bytes) {
    case 1: return copy_fixed<1>(to, from);
    case 2: return copy_fixed<2>(to, from);
    case 4: return copy_fixed<4>(to, from);
    case 8: return copy_fixed<8>(to, from);
    case 16: return copy_fixed<16>(to, from);
    default: std::memcpy(to, from, bytes);
  }
}

void load(Warp& w, const Inst& i, Mask m) {
  if (!m) return;
  Lanes a = addresses(w, i, i.b);
  u32 bytes = i.a * i.b;
  alignas(64) u8 data[LANES][32];
  switch (resolve(w, i, m, a, Space(i.d))) {
    case GLOBAL: {
      u32 each[LANES];
      for (int l = 0; l < LANES; ++l)
        if (m >> l & 1) copy_bytes(data[l], global_bytes(w, i, l, a.at[l], bytes, false), bytes), each[l] = bytes;
      count_global(w, i, m, a, each, false, i.c & PAST_L1);
      break;
    }
    case SHARED: {
      u32 at[LANES];
      Mask local = m;  // lanes that stay in their own block's memory
      for (int l = 0; l < LANES; ++l)
        if (m >> l & 1) {
          Cta& owner = shared_owner(w, i, l, a.at[l]);
          copy_bytes(data[l], owner.shared.data() + (at[l] = shared_at(w, i, l, a.at[l], bytes)), bytes);
          if (&owner != w.cta) note_shared(w, i, 1u << l, at, bytes, Use::read, nullptr, 0, &owner), local &= ~(1u << l);
        }
      count_shared(w, m, at, bytes, false);
      note_shared(w, i, local, at, bytes, Use::read);
      break;
    }
    case PARAM:
      for (int l = 0; l < LANES; ++l)
        if (m >> l & 1) {
          if (a.at[l] + bytes > w.cta->launch->params.size()) w.fail(i, l, "outside the parameters");
          copy_bytes(data[l], w.cta->launch->params.data() + a.at[l], bytes);
        }
      break;
    case LOCAL:
      for (int l = 0; l < LANES; ++l)
        if (m >> l & 1) copy_bytes(data[l], local_bytes(w, i, l, a.at[l], bytes), bytes);
      w.cta->block->counts.local_bytes += u64(__builtin_popcount(m)) * bytes;
      break;
    case GENERIC: break;
  }
  for (u32 e = 0; e < i.b; ++e) {
    const Op& to = i.op[e];
    if (to.bytes == 4 && i.a == 4) {
      u32 out[LANES];
      for (int l = 0; l < LANES; ++l) std::memcpy(&out[l], data[l] + 4 * e, 4);
      put(w.reg<u32>(to), out, m);
    } else {
      for (int l = 0; l < LANES; ++l)
        if (m >> l & 1) {
          u64 v = 0;
          std::memcpy(&v, data[l] + i.a * e, i.a);
          if (i.c & SIGNED) v = u64(i64(v << (64 - 8 * i.a)) >> (64 - 8 * i.a));
          w.write(to, l, v);
        }
    }
  }
}

void store(Warp& w, const Inst& i, Mask m) {
  if (!m) return;
  Lanes a = addresses(w, i, 0);
  u32 bytes = i.a * i.b;
  alignas(64) u8 data[LANES][32];
  for (u32 e = 0; e < i.b; ++e) {
    const Op& from = i.op[1 + e];
    if (from.bytes == 4 && i.a == 4) {
      const u32* r = w.reg<u32>(from);
      for (int l = 0; l < LANES; ++l) std::memcpy(data[l] + 4 * e, &r[l], 4);
    } else {
      for (int l = 0; l < LANES; ++l) {
        u64 v = w.read(from, l);
        std::memcpy(data[l] + i.a * e, &v, i.a);
      }
    }
  }
  switch (resolve(w, i, m, a, Space(i.d))) {
    case GLOBAL: {
      u32 each[LANES];
      for (int l = 0; l < LANES; ++l)
        if (m >> l & 1) copy_bytes(global_bytes(w, i, l, a.at[l], bytes, true), data[l], bytes), each[l] = bytes;
      count_global(w, i, m, a, each, true, true);
      break;
    }
    case SHARED: {
      u32 at[LANES];
      Mask local = m;  // lanes that stay in their own block's memory
      for (int l = 0; l < LANES; ++l)
        if (m >> l & 1) {
          Cta& owner = shared_owner(w, i, l, a.at[l]);
          at[l] = shared_at(w, i, l, a.at[l], bytes);
          if (&owner == w.cta) continue;
          local &= ~(1u << l);
          note_shared(w, i, 1u << l, at, bytes, Use::write, data[0], sizeof data[0], &owner);
          copy_bytes(owner.shared.data() + at[l], data[l], bytes);
        }
      note_shared(w, i, local, at, bytes, Use::write, data[0], sizeof data[0]);
      for (int l = 0; l < LANES; ++l)
        if (local >> l & 1) copy_bytes(w.cta->shared.data() + at[l], data[l], bytes);
      count_shared(w, m, at, bytes, true);
      break;
    }
    case LOCAL:
      for (int l = 0; l < LANES; ++l)
        if (m >> l & 1) copy_bytes(local_bytes(w, i, l, a.at[l], bytes), data[l], bytes);
      w.cta->block->counts.local_bytes += u64(__builtin_popcount(m)) * bytes;
      break;
    default: w.fail(i, __builtin_ctz(m), "a store to parameters");
  }
}

void note_granule(Line& l, Space space, u32 bytes) {
  if (space == SHARED || space == GENERIC) program_of(l).granule = std::min(program_of(l).granule, bytes);
}

void ld_st(Line& l, Inst& inst) {
  bool is_load = l.name == "ld" || l.name == "ldu";
  Space space = space_from(l);
  u32 options = 0;
  bool hint = l.has("L2::cache_hint");
  strike_hints(l, options);
  inst.b = l.take("v2") ? 2 : l.take("v4") ? 4 : l.take("v8") ? 8 : 1;
  Type t = l.take_type();
  if (t.bits > 64) return;
  inst.a = t.bytes(), inst.c = options | (t.kind == 's' ? SIGNED : 0), inst.d = space;
  inst.kind = space == SHARED ? (is_load ? LOAD_SHARED : STORE_SHARED) : space == PARAM ? LOAD_PARAM : space == LOCAL ? LOCAL_KIND : is_load ? LOAD_GLOBAL : STORE_GLOBAL;
  note_granule(l, space, t.bytes());
  l.want(2 + hint);
  if (is_load) {
    for (auto& item : l.operands[0].items) l.push(item, std::max(t.bytes(), 2u), false);
    l.push_address(1, inst, 8);
    inst.run = load;
  } else {
    l.push_address(0, inst, 8);
    for (auto& item : l.operands[1].items) l.push(item, std::max(t.bytes(), 2u), false);
    inst.run = store;
  }
  if (l.ops.size() != inst.b + 1) l.fail("the vector has another length than the modifier says");
}

// ---- atomics ----

enum Atomic : u32 { ADD, MIN, MAX, INC, DEC, AND, OR, XOR, EXCH, CAS };

u64 combine(Atomic op, Type t, u64 old, u64 b, u64 c) {
  if (t.kind == 'f' && t.bits == 32 && t.lanes == 1) {
    float x = bits_float(u32(old)), y = bits_float(u32(b));
    if (op == ADD) return float_bits(x + y);
  } else if (t.kind == 'f' && t.bits == 64) {
    double x, y;
    std::memcpy(&x, &old, 8), std::memcpy(&y, &b, 8);
    x += y;
    std::memcpy(&old, &x, 8);
    return old;
  } else if (t.is_float()) {  // f16, bf16 and their pairs
    u64 r = 0;
    for (u32 k = 0; k < t.lanes; ++k) {
      u16 x = u16(old >> (16 * k)), y = u16(b >> (16 * k));
      u16 z = t.kind == 'h' ? to_bf16(from_bf16(x) + from_bf16(y)) : to_f16(from_f16(x) + from_f16(y));
      r |= u64(z) << (16 * k);
    }
    return r;
  }
  i64 so = t.bits == 32 ? i64(i32(old)) : i64(old), sb = t.bits == 32 ? i64(i32(b)) : i64(b);
  switch (op) {
    case ADD: return old + b;
    case MIN: return t.kind == 's' ? u64(std::min(so, sb)) : std::min(old, b);
    case MAX: return t.kind == 's' ? u64(std::max(so, sb)) : std::max(old, b);
    case INC: return old >= b ? 0 : old + 1;
    case DEC: return old == 0 || old > b ? b : old - 1;
    case AND: return old & b;
    case OR: return old | b;
    case XOR: return old ^ b;
    case EXCH: return b;
    case CAS: return old == b ? c : old;
  }
  return 0;
}

// a: operation, b: type, c: 1 if it returns the old value, d: space | elements << 8. Operands: [old ...], address, b ..., [c]
void atomic(Warp& w, const Inst& i, Mask m) {
  if (!m) return;
  const u32 n = i.d >> 8, base = i.c ? n : 0;
  Lanes a = addresses(w, i, base);
  Type t{char(i.b & 255), i.b >> 8 & 255, i.b >> 16};
  u32 bytes = t.bytes();
  Space space = resolve(w, i, m, a, Space(i.d & 255));
  if (space != GLOBAL && space != SHARED) w.fail(i, __builtin_ctz(m), "an atomic outside global and shared memory");
  std::unique_lock<std::mutex> lock(w.cta->launch->atomics);
  u32 at[LANES], each[LANES];
  for (int l = 0; l < LANES; ++l) {
    if (!(m >> l & 1)) continue;
    each[l] = bytes * n;
    u8* p = space == GLOBAL ? global_bytes(w, i, l, a.at[l], each[l], true) : w.cta->shared.data() + (at[l] = shared_at(w, i, l, a.at[l], each[l]));
    for (u32 e = 0; e < n; ++e) {
      u64 old = 0;
      std::memcpy(&old, p + e * bytes, bytes);
      u64 b = w.read(i.op[base + 1 + e], l), c = i.a == CAS ? w.read(i.op[base + 2], l) : 0;
      u64 fresh = combine(Atomic(i.a), t, old, b, c);
      std::memcpy(p + e * bytes, &fresh, bytes);
      if (i.c) w.write(i.op[e], l, old);
    }
  }
  w.cta->cluster->progress++;
  if (space == GLOBAL) count_global(w, i, m, a, each, true, true);
  else count_shared(w, m, at, bytes, true);
}

void atom_red(Line& l, Inst& inst) {
  inst.kind = ATOMIC;
  bool returns = l.name == "atom";
  Space space = space_from(l);
  u32 options = 0;
  bool hint = l.has("L2::cache_hint");
  strike_hints(l, options);
  l.take("noftz");
  u32 n = l.take("v2") ? 2 : l.take("v4") ? 4 : l.take("v8") ? 8 : 1;
  static const std::pair<const char*, Atomic> names[] = {{"add", ADD}, {"min", MIN}, {"max", MAX}, {"inc", INC}, {"dec", DEC}, {"and", AND}, {"or", OR}, {"xor", XOR}, {"exch", EXCH}, {"cas", CAS}};
  bool known = false;
  for (auto& [name, op] : names)
    if (!known && l.take(name)) inst.a = op, known = true;
  if (!known) l.fail("unknown atomic");
  Type t = l.take_type();
  if (t.is_float() && inst.a != ADD) return;
  inst.b = u32(t.kind) | t.bits << 8 | t.lanes << 16;
  inst.c = returns, inst.d = space | n << 8;
  if (n > 1 && (!t.is_float() || space == SHARED || l.operands[returns + 1].items.size() != n)) return;
  note_granule(l, space, t.bytes());
  size_t address = returns, sources = inst.a == CAS ? 2 : 1;
  l.want(address + 1 + sources + hint);
  if (returns) l.push_all(0, t.bytes());
  l.push_address(address, inst, 8);
  for (size_t k = 0; k < sources; ++k) l.push_all(address + 1 + k, t.bytes());
  inst.run = atomic;
}

// ---- cp.async ----

}  // namespace

void deliver(Warp& w, Copy& copy, Mask m) {
  m &= copy.pending & ~copy.delivered;
  for (int l = 0; l < LANES; ++l)
    if (m >> l & 1) {
      u8 data[16] = {};
      if (copy.valid[l]) std::memcpy(data, copy.from[l], copy.valid[l]);
      std::memcpy(w.cta->shared.data() + copy.to[l], data, copy.bytes);
    }
  copy.delivered |= m;
}

// Finishes the copies whose group lies below through[lane], for the lanes in m.
void complete_copies(Warp& w, Mask m, const u32* through, bool all) {
  size_t kept = 0;
  for (size_t k = 0; k < w.copies.size(); ++k) {
    Copy& c = w.copies[k];
    Mask ready = 0;
    for (int l = 0; l < LANES; ++l) ready |= Mask(all || c.group[l] < through[l]) << l;
    ready &= m & c.pending;
    if (ready) {
      deliver(w, c, ready);
      c.pending &= ~ready;
      w.touched |= ready;
      for (int l = 0; l < LANES; ++l)
        if (ready >> l & 1) settle_write(*w.cta, c.to[l], c.bytes, w.index, l, w.clock);
    }
    if (c.pending) {
      if (kept != k) w.copies[kept] = w.copies[k];
      ++kept;
    }
  }
  w.copies.resize(kept);
}

namespace {

// a: bytes, b: 1 if a source size follows, 2 if a predicate follows, c: options
void copy_async(Warp& w, const Inst& i, Mask m) {
  if (!m) return;
  Lanes from;
  {
    const u64* r = w.reg<u64>(i.op[1]);
    for (int l = 0; l < LANES; ++l) from.at[l] = r[l] + i64(i32(i.d));
  }
  Lanes to = addresses(w, i, 0);
  Copy c;
  c.pending = m;
  c.delivered = 0;
  c.bytes = i.a;
  c.inst = &i;
  Mask ignore = i.b == 2 ? w.predicate(i.op[2]) : 0;
  for (int l = 0; l < LANES; ++l) {
    if (!(m >> l & 1)) continue;
    c.group[l] = w.committed[l];
    c.to[l] = shared_at(w, i, l, to.at[l], i.a);
    u32 valid = i.b == 1 ? w.reg<u32>(i.op[2])[l] : ignore >> l & 1 ? 0 : i.a;
    if (valid > i.a) w.fail(i, l, format("the source size %u is greater than the copy's %u", valid, i.a));
    c.valid[l] = valid;
    c.from[l] = nullptr;
    if (valid) {
      if (from.at[l] % i.a) w.fail(i, l, format("global address 0x%llx is no multiple of %u", (unsigned long long)from.at[l], i.a));
      // Whole where it is whole; the checked pointer serves any number of bytes.
      c.from[l] = global_bytes(w, i, l, from.at[l], valid == i.a ? i.a : 1, false);
      if (valid != i.a) global_bytes(w, i, l, from.at[l] + valid - 1, 1, false);
    }
  }
  count_global(w, i, m, from, c.valid, false, i.c & PAST_L1);
  count_shared(w, m, c.to, i.a, true);
  w.touched |= m;
  for (int l = 0; l < LANES; ++l)
    if (m >> l & 1) note_pending_write(w, i, l, c.to[l], i.a);
  w.copies.push_back(c);
  if (w.cta->launch->mode == Mode::early) deliver(w, w.copies.back(), m);
}

void cp(Line& l, Inst& inst) {
  inst.kind = COPY_ASYNC;
  if (!l.take("async")) return;
  if (l.take("bulk")) return decode_bulk(l, inst);
  if (l.take("commit_group")) {
    l.want(0);
    inst.run = [](Warp& w, const Inst&, Mask m) {
      for (int k = 0; k < LANES; ++k) w.committed[k] += m >> k & 1;
    };
    return;
  }
  if (l.take("wait_group")) {
    l.want(1);
    inst.a = std::strtoul(l.operands[0].text.c_str(), nullptr, 0);
    inst.run = [](Warp& w, const Inst& i, Mask m) {
      u32 through[LANES];
      for (int k = 0; k < LANES; ++k) through[k] = w.committed[k] > i.a ? w.committed[k] - i.a : 0;
      complete_copies(w, m, through, false);
    };
    return;
  }
  if (l.take("wait_all")) {
    l.want(0);
    inst.run = [](Warp& w, const Inst&, Mask m) { complete_copies(w, m, nullptr, true); };
    return;
  }
  if (l.has("mbarrier")) return;
  if (l.take("cg")) inst.c = PAST_L1;
  else l.take("ca");
  bool hint = l.take("L2::cache_hint");
  u32 options = 0;
  strike_hints(l, options);
  if (!l.take("shared") && !l.take("shared::cta")) return;
  if (!l.take("global")) return;
  l.want(3 + hint, 4 + hint);
  Inst source;
  l.push_address(0, inst, 4);
  l.push_address(1, source, 8);
  inst.d = u32(i32(source.offset));
  inst.a = std::strtoul(l.operands[2].text.c_str(), nullptr, 0);
  if (l.operands.size() == 4u + hint) {
    const std::string& item = l.operands[3].text;
    bool predicate = item.rfind("%p", 0) == 0;
    inst.b = predicate ? 2 : 1;
    if (predicate) l.push_predicate(item);
    else l.push(item, 4);
  }
  if (inst.a == 4 || inst.a == 8 || inst.a == 16) inst.run = copy_async;
}

}  // namespace

const Family& memory_family() {
  static const Family family{{{"ld", ld_st}, {"ldu", ld_st}, {"st", ld_st}, {"atom", atom_red}, {"red", atom_red}, {"cp", cp}}};
  return family;
}

}  // namespace ptx
