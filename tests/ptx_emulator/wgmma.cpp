// wgmma: four warps multiply 64 rows of A by N columns of B from shared memory, asynchronously. Each warp makes its own 16 rows.
#include <algorithm>

#include "access.h"
#include "decode.h"
#include "numbers.h"

namespace ptx {

Program& program_of(Line&);

namespace {

struct Shape {  // of one wgmma, from its Inst
  Type a, b;
  u32 n, k;
  bool a_from_registers, trans_a, trans_b, f16_result;
  float scale_a, scale_b;
  u32 d_registers, a_registers;
};

// inst.a: n | k << 16; inst.b: types; inst.c: flags
enum Flag : u32 { A_REGISTERS = 1, TRANS_A = 2, TRANS_B = 4, NEGATE_A = 8, NEGATE_B = 16, F16_RESULT = 32 };
Shape shape_of(const Inst& i) {
  Shape s;
  s.n = i.a & 0xffff, s.k = i.a >> 16;
  s.a = Type{char(i.b & 255), i.b >> 8 & 255}, s.b = Type{char(i.b >> 16 & 255), i.b >> 24};
  s.a_from_registers = i.c & A_REGISTERS, s.trans_a = i.c & TRANS_A, s.trans_b = i.c & TRANS_B, s.f16_result = i.c & F16_RESULT;
  s.scale_a = i.c & NEGATE_A ? -1 : 1, s.scale_b = i.c & NEGATE_B ? -1 : 1;
  s.d_registers = s.f16_result ? s.n / 4 : s.n / 2, s.a_registers = s.a_from_registers ? 4 : 0;
  return s;
}

struct Descriptor {
  u32 start, leading, stride, span;
};
Descriptor descriptor(Warp& w, const Inst& i, u64 d) {
  static const u32 spans[] = {0, 128, 64, 32};
  if (d >> 49 & 7) w.fail(i, 0, "a matrix base offset other than 0 is not implemented");
  return {u32(d & 0x3fff) << 4, u32(d >> 16 & 0x3fff) << 4, u32(d >> 32 & 0x3fff) << 4, spans[d >> 62]};
}

// Where the 16-byte piece lies that holds element (row, k) of an operand; `row` counts M or N. PTX ISA, canonical layouts, with T
// elements to 16 bytes and s = span / 16:
//   K-major   no swizzle ((8,m),(T,2k)):((T,SBO),(1,LBO))     swizzled ((8,m),(T,2k)):((sT,SBO),(1,T))
//   MN-major  no swizzle ((T,1,m),(8,k)):((1,T,SBO),(T,LBO))  swizzled ((T,s,m),(8,k)):((1,T,LBO),(sT,SBO))
u32 piece(const Descriptor& d, bool mn_major, u32 t, u32 row, u32 k) {
  u32 s = d.span / 16, at;
  if (!mn_major) at = d.span ? row % 8 * d.span + row / 8 * d.stride + k / t * 16 : row % 8 * 16 + row / 8 * d.stride + k / t * d.leading;
  else at = d.span ? row / t % s * 16 + row / (t * s) * d.leading + k % 8 * d.span + k / 8 * d.stride : row / t * d.stride + k % 8 * 16 + k / 8 * d.leading;
  return swizzled(d.start + at, d.span);
}

template <char Kind>
inline float number(const u8* p) {
  if constexpr (Kind == 'f' || Kind == 'h') {
    u16 h;
    std::memcpy(&h, p, 2);
    return Kind == 'f' ? from_f16(h) : from_bf16(h);
  } else if constexpr (Kind == 't') {
    u32 b;
    std::memcpy(&b, p, 4);
    return bits_float(b & 0xffffe000u);
  } else if constexpr (Kind == 'e') {
    return from_e4m3(*p);
  } else if constexpr (Kind == 'g') {
    return from_e5m2(*p);
  } else {
    return Kind == 's' ? float(i8(*p)) : float(*p);
  }
}
template <char Kind>
void numbers(const u8* p, float* out) {  // 16 bytes
  constexpr int bytes = Kind == 't' ? 4 : Kind == 'f' || Kind == 'h' ? 2 : 1;
  for (int e = 0; e < 16 / bytes; ++e) out[e] = number<Kind>(p + e * bytes);
}
using Numbers = void (*)(const u8*, float*);
Numbers numbers_of(Type t) {
  switch (t.kind) {
    case 'f': return numbers<'f'>;
    case 'h': return numbers<'h'>;
    case 't': return numbers<'t'>;
    case 'e': return numbers<'e'>;
    case 'g': return numbers<'g'>;
    case 's': return numbers<'s'>;
    default: return numbers<'u'>;
  }
}

// Elements [row0, row0 + rows) x K into out[row][k], K <= 32. That the pieces lie in shared memory was checked at issue.
void fetch(Warp& w, Type type, const Descriptor& d, bool mn_major, u32 row0, u32 rows, u32 ks, float (*out)[32]) {
  u32 t = 128 / type.bits;
  const u8* shared = w.cta->shared.data();
  Numbers convert = numbers_of(type);
  float values[16];
  for (u32 r = 0; r < rows; r += mn_major ? t : 1)
    for (u32 k = 0; k < ks; k += mn_major ? 1 : t) {
      const u8* p = shared + piece(d, mn_major, t, row0 + r, k);
      if (mn_major) {
        convert(p, values);
        for (u32 e = 0; e < t && r + e < rows; ++e) out[r + e][k] = values[e];
      } else {
        convert(p, &out[r][k]);
      }
    }
}
void collect(std::vector<u32>& chunks, Type type, const Descriptor& d, bool mn_major, u32 row0, u32 rows, u32 ks) {
  u32 t = 128 / type.bits;
  for (u32 r = 0; r < rows; r += mn_major ? t : 1)
    for (u32 k = 0; k < ks; k += mn_major ? 1 : t) chunks.push_back(piece(d, mn_major, t, row0 + r, k));
}

}  // namespace

void compute_wgmma(Warp& w, Wgmma& g) {
  const Inst& i = *g.inst;
  Shape s = shape_of(i);
  g.computed = true;
  alignas(64) static thread_local float a[16][32], b[256][32];
  alignas(64) float columns[32][16];
  if (s.a_from_registers) {
    u32 bytes = s.a.bits / 8, e = 4 / bytes;
    Numbers convert = numbers_of(s.a);
    for (u32 r = 0; r < 4; ++r)
      for (u32 l = 0; l < LANES; ++l) {
        u8 word[16] = {};
        float values[16];
        std::memcpy(word, &g.a_values[r * LANES + l], 4);
        convert(word, values);
        std::copy(values, values + e, &a[l / 4 + 8 * (r % 2)][4 * e * (r / 2) + e * (l % 4)]);
      }
  } else {
    fetch(w, s.a, descriptor(w, i, g.a), s.trans_a, 16 * (w.index % 4), 16, s.k, a);
  }
  fetch(w, s.b, descriptor(w, i, g.b), s.trans_b, 0, s.n, s.k, b);
  for (u32 k = 0; k < s.k; ++k)
    for (u32 r = 0; r < 16; ++r) columns[k][r] = a[r][k] * s.scale_a * s.scale_b;
  bool integer = s.a.kind == 's' || s.a.kind == 'u';
  for (u32 n = 0; n < s.n; n += 8) {
    // Lane 4 g + t holds rows g and g + 8 (second half of the registers), columns n + 2 t and n + 2 t + 1.
    alignas(64) float c[8][16] = {};
    if (g.keep && !integer)
      for (u32 r = 0; r < 4; ++r) {
        float values[LANES];
        const u16* halves = s.f16_result ? w.reg<u16>(i.op[n / 4 + r / 2]) + r % 2 : nullptr;
        for (u32 l = 0; l < LANES; ++l) values[l] = halves ? from_f16(halves[2 * l]) : w.reg<float>(i.op[n / 2 + r])[l];
        for (u32 t = 0; t < 4; ++t)
          for (u32 g8 = 0; g8 < 8; ++g8) c[2 * t + r % 2][8 * (r / 2) + g8] = values[4 * g8 + t];
      }
    add_product<float>(columns, b + n, c, s.k);
    for (u32 r = 0; r < 4; ++r) {
      float sum[LANES];
      for (u32 t = 0; t < 4; ++t)
        for (u32 g8 = 0; g8 < 8; ++g8) sum[4 * g8 + t] = c[2 * t + r % 2][8 * (r / 2) + g8];
      if (s.f16_result) {
        for (u32 l = 0; l < LANES; ++l) w.reg<u16>(i.op[n / 4 + r / 2])[2 * l + r % 2] = to_f16(sum[l]);
      } else if (integer) {  // sums of K products of bytes are exact in float; accumulators need not be
        u32* to = w.reg<u32>(i.op[n / 2 + r]);
        for (u32 l = 0; l < LANES; ++l) to[l] = (g.keep ? to[l] : 0) + u32(i32(sum[l]));
      } else {
        std::memcpy(w.reg<float>(i.op[n / 2 + r]), sum, sizeof sum);
      }
    }
  }
}

namespace {

void mark(Warp& w, const Inst& i, const Shape& s, u8 bits, bool set) {
  for (u32 k = 0; k < s.d_registers + s.a_registers; ++k) {
    u8& state = w.wgmma_state[i.op[k].at / 128];
    state = set ? state | bits : state & ~bits;
  }
}

void issue(Warp& w, const Inst& i, Mask m) {
  Shape s = shape_of(i);
  if (!w.wgmma_fenced) w.fail(i, 0, "no wgmma.fence before the first wgmma");
  for (u32 k = 0; k < s.d_registers + s.a_registers; ++k)
    if (w.wgmma_state[i.op[k].at / 128] & 2)
      w.fail(i, 0, k < s.d_registers ? "an accumulator was accessed since the last wgmma.fence" : "a register of A was accessed since the last wgmma.fence");
  const u32 base = s.d_registers;
  Wgmma g;
  g.inst = &i;
  g.group = w.wgmma_committed;
  u32 next = base;
  if (s.a_from_registers) {
    g.a = 0;
    for (u32 r = 0; r < 4; ++r) g.a_values.insert(g.a_values.end(), w.reg<u32>(i.op[base + r]), w.reg<u32>(i.op[base + r]) + LANES);
    next += 4;
  } else {
    g.a = w.reg<u64>(i.op[next++])[0];
  }
  g.b = w.reg<u64>(i.op[next++])[0];
  for (int l = 1; l < LANES; ++l) {
    if (w.reg<u64>(i.op[next - 1])[l] != g.b || (!s.a_from_registers && w.reg<u64>(i.op[base])[l] != g.a)) w.fail(i, l, "lanes hold different matrix descriptors");
  }
  Mask keep = w.predicate(i.op[next]);
  if (keep != 0 && keep != FULL) w.fail(i, 0, "lanes disagree about scale-d");
  g.keep = keep != 0;
  if (!s.a_from_registers) collect(g.chunks, s.a, descriptor(w, i, g.a), s.trans_a, 16 * (w.index % 4), 16, s.k);
  collect(g.chunks, s.b, descriptor(w, i, g.b), s.trans_b, 0, s.n, s.k);
  for (u32 at : g.chunks) {
    shared_at(w, i, 0, at, 16);
    note_pending_read(w, i, 0, at, 16);
  }
  mark(w, i, s, 1, true);
  (void)m;
  Counts& c = w.cta->block->counts;
  c.tensor_fma += 16 * u64(s.n) * s.k;
  // The tensor core reads A once and B once for the four warps.
  c.wgmma_shared_bytes += (s.a_from_registers ? 0 : 16 * s.k * s.a.bits / 8) + s.n * s.k * s.b.bits / 32;
  w.wgmmas.push_back(std::move(g));
  if (w.cta->launch->mode == Mode::early) compute_wgmma(w, w.wgmmas.back());
  if (w.cta->launch->mode == Mode::random && w.cta->cluster->random() % 2) {
    for (Wgmma& other : w.wgmmas)
      if (!other.computed) compute_wgmma(w, other);
  }
}

void wait(Warp& w, const Inst& i, Mask) {
  u32 through = w.wgmma_committed > i.a ? w.wgmma_committed - i.a : 0;
  size_t done = 0;
  while (done < w.wgmmas.size() && w.wgmmas[done].group < through) ++done;
  for (size_t k = 0; k < done; ++k) {
    Wgmma& g = w.wgmmas[k];
    if (!g.computed) compute_wgmma(w, g);
    for (u32 at : g.chunks) settle_read(w, at, 16);
    mark(w, *g.inst, shape_of(*g.inst), 1, false);
  }
  w.wgmmas.erase(w.wgmmas.begin(), w.wgmmas.begin() + done);
  for (Wgmma& g : w.wgmmas) {  // those still under way keep their registers and operands
    for (u32 at : g.chunks) unsettle_read(w, at, 16);
    mark(w, *g.inst, shape_of(*g.inst), 1, true);
  }
}

void decode_wgmma(Line& l, Inst& inst) {
  inst.kind = WGMMA;
  inst.sync = Sync::aligned;
  program_of(l).async_proxy = true;
  bool async = l.take("mma_async");
  if (!l.take("sync") || !l.take("aligned")) return;
  if (l.take("fence")) {
    l.want(0);
    inst.run = [](Warp& w, const Inst&, Mask) {
      for (u8& s : w.wgmma_state) s &= ~2;
      w.wgmma_fenced = true;
    };
    return;
  }
  if (l.take("commit_group")) {
    l.want(0);
    inst.run = [](Warp& w, const Inst&, Mask) { w.wgmma_committed++; };
    return;
  }
  if (l.take("wait_group")) {
    l.want(1);
    inst.a = std::strtoul(l.operands[0].text.c_str(), nullptr, 0);
    inst.run = wait;
    return;
  }
  if (!async || l.mods.empty()) return;
  u32 n = 0, k = 0;
  if (std::sscanf(l.mods[0].c_str(), "m64n%uk%u", &n, &k) != 2) return;
  l.mods.erase(l.mods.begin());
  l.take("satfinite");
  Type d = l.take_type(), a = l.take_type(), b = l.take_type();
  if (n % 8 || n == 0 || n > 256 || k * a.bits != 256 || a.bits != b.bits) return;
  bool integer = a.kind == 's' || a.kind == 'u';
  if (integer ? d.kind != 's' : d.kind != 'f') return;
  if (d.bits == 16) inst.c |= F16_RESULT;
  inst.a = n | k << 16;
  inst.b = u32(a.kind) | a.bits << 8 | u32(u8(b.kind)) << 16 | b.bits << 24;
  l.want(integer ? 4 : 6, 8);
  l.push_all(0, 4);
  if (l.ops.size() != (d.bits == 16 ? n / 4 : n / 2)) l.fail("the accumulator has another length than the shape says");
  if (l.operands[1].text[0] == '{') {
    inst.c |= A_REGISTERS;
    if (l.operands[1].items.size() != 4) l.fail("A takes four registers");
    l.push_all(1, 4);
  } else {
    l.push(l.operands[1].text, 8);
  }
  auto& marked = program_of(l).wgmma_register;
  for (size_t r = 0; r < l.ops.size(); ++r) {
    if (l.ops[r].bytes != 4) continue;
    if (l.ops[r].constant) l.fail("registers of a wgmma must be registers");
    if (marked.size() <= l.ops[r].at / 128) marked.resize(l.ops[r].at / 128 + 1);
    marked[l.ops[r].at / 128] = true;
  }
  l.push(l.operands[2].text, 8);
  l.push_predicate(l.operands[3].text);
  auto number = [&](size_t at) { return std::strtol(l.operands.at(at).text.c_str(), nullptr, 0); };
  if (!integer) {
    if (number(4) == -1) inst.c |= NEGATE_A;
    if (number(5) == -1) inst.c |= NEGATE_B;
    size_t next = 6;
    if (a.bits == 16) {
      if (!(inst.c & A_REGISTERS) && number(next++)) inst.c |= TRANS_A;
      if (number(next++)) inst.c |= TRANS_B;
    }
    l.want(next);
  }
  inst.run = issue;
}

// a: registers, b: 1 inc, 0 dec. All threads of a block share a pool: what some give back, others may take, or must wait for.
void setmaxnreg(Warp& w, const Inst& i, Mask) {
  u32& free = w.cta->free_registers;
  if (w.registers == 0) w.fail(i, 0, "neither .maxnreg nor .maxntid tells how many registers threads begin with: ptxas ignores setmaxnreg");
  if (i.b ? i.a < w.registers : i.a > w.registers) w.fail(i, 0, format("a thread has %u registers already", w.registers));
  if (i.b && i.a - w.registers > free) {
    w.again = true;
    return;
  }
  free += w.registers, free -= i.a;
  w.registers = i.a;
  w.cta->cluster->progress++;
}
void decode_setmaxnreg(Line& l, Inst& inst) {
  inst.kind = CONTROL;
  inst.sync = Sync::aligned;
  l.take("sync"), l.take("aligned"), l.take_type();
  inst.b = l.take("inc");
  if (!inst.b && !l.take("dec")) return;
  l.want(1);
  inst.a = std::strtoul(l.operands[0].text.c_str(), nullptr, 0);
  if (inst.a < 24 || inst.a > 256 || inst.a % 8) l.fail("setmaxnreg takes a multiple of 8 from 24 to 256");
  inst.run = setmaxnreg;
}

}  // namespace

const Family& wgmma_family() {
  static const Family family{{{"wgmma", decode_wgmma}, {"setmaxnreg", decode_setmaxnreg}}};
  return family;
}

}  // namespace ptx
