// cvt, mov, cvta: values from one format or register to another.
#include "decode.h"
#include "numbers.h"

namespace ptx {

std::string space_of(Line&, const std::string&);

namespace {

// ---- cvt ----

// inst.a, inst.b: packed description of destination and source; inst.c: rounding; inst.d: flags
enum Flag : u32 { SAT = 1, FTZ = 2, TO_INTEGER = 4, SATFINITE = 8, RELU = 16 };

u32 pack(Type t) { return u32(t.kind) | t.bits << 8 | t.lanes << 16; }

double load_number(Type t, u64 raw, bool ftz) {
  switch (t.kind) {
    case 'f':
      if (t.bits == 16) return from_f16(u16(raw));
      if (t.bits == 32) return ftz ? flush(bits_float(u32(raw))) : bits_float(u32(raw));
      double d;
      std::memcpy(&d, &raw, 8);
      return d;
    case 'h': return from_bf16(u16(raw));
    case 'e': return from_e4m3(u8(raw));
    case 'g': return from_e5m2(u8(raw));
    case 't': return bits_float(u32(raw));
  }
  return 0;
}

double rounded(double v, Round how) {
  switch (how) {
    case Round::nearest: return std::nearbyint(v);  // the host rounds to nearest even
    case Round::zero: return std::trunc(v);
    case Round::down: return std::floor(v);
    case Round::up: return std::ceil(v);
    default: return std::round(v);
  }
}

// A double as a float, rounded as asked.
float to_float(double v, Round how) {
  float f = float(v);
  if (how == Round::nearest || double(f) == v || std::isnan(v)) return f;
  bool toward_zero = how == Round::zero || how == (v > 0 ? Round::down : Round::up);
  if (toward_zero && std::fabs(double(f)) > std::fabs(v)) return std::nextafter(f, 0.0f);
  if (!toward_zero && std::fabs(double(f)) < std::fabs(v)) return std::nextafter(f, v > 0 ? INFINITY : -INFINITY);
  return f;
}
float to_odd(double v) {  // enough digits for one more rounding, to a 16-bit format
  float f = float(v);
  if (!std::isfinite(v) || double(f) == v) return f;
  u32 b = float_bits(f);
  if (std::fabs(double(f)) > std::fabs(v)) b -= 1;
  return bits_float(b | 1);
}

u64 integer_limits(Type t, double v) {  // conversions to integer clamp; NaN becomes 0 (or the limit of 64-bit: not relied on)
  if (std::isnan(v)) return 0;
  bool s = t.kind == 's';
  double low = s ? -std::ldexp(1.0, int(t.bits) - 1) : 0, high = std::ldexp(1.0, int(t.bits) - (s ? 1 : 0));
  if (v <= low) return s ? u64(1) << (t.bits - 1) : 0;
  if (v >= high) return s ? (u64(1) << (t.bits - 1)) - 1 : t.bits == 64 ? ~u64(0) : (u64(1) << t.bits) - 1;
  return s ? u64(i64(v)) : u64(v);
}

u64 convert_one(Type d, Type s, u64 raw, Round how, u32 flags) {
  bool from_float = s.is_float() || s.kind == 'e' || s.kind == 'g' || s.kind == 't';
  bool to_small_or_float = d.is_float() || d.kind == 'e' || d.kind == 'g' || d.kind == 't';
  if (!from_float && !to_small_or_float) {  // integer to integer
    i64 value = s.bits == 64 ? i64(raw) : s.kind == 's' ? i64(raw << (64 - s.bits)) >> (64 - s.bits) : i64(raw & ((u64(1) << s.bits) - 1));
    if (flags & SAT) {
      bool big = s.kind != 's' && value < 0;  // an unsigned 64-bit number beyond the signed range
      if (d.kind == 's') {
        i64 high = i64((u64(1) << (d.bits - 1)) - 1);
        if (big || value > high) value = high;
        else if (value < -high - 1) value = -high - 1;
      } else {
        u64 high = d.bits == 64 ? ~u64(0) : (u64(1) << d.bits) - 1;
        if (!big && value < 0) value = 0;
        else if (u64(value) > high) value = i64(high);
      }
    }
    return u64(value);  // sign- or zero-extended as the source has it; the register cuts it
  }
  if (!from_float) {  // integer to float
    bool negative = false;
    u64 magnitude;
    if (s.kind == 's') {
      i64 v = i64(raw << (64 - s.bits)) >> (64 - s.bits);
      negative = v < 0;
      magnitude = negative ? 0 - u64(v) : u64(v);
    } else {
      magnitude = s.bits == 64 ? raw : raw & ((u64(1) << s.bits) - 1);
    }
    if (d.bits == 64) {
      double v = negative ? -double(magnitude) : double(magnitude);
      u64 b;
      std::memcpy(&b, &v, 8);
      return b;
    }
    // To 24 digits (float) or to odd (16 bit, which then rounds again).
    int top = magnitude ? 64 - __builtin_clzll(magnitude) : 0;
    int drop = top > 24 ? top - 24 : 0;
    u64 kept = drop_bits(magnitude, drop, negative, d.bits == 32 ? how : Round::zero);
    if (d.bits == 16 && drop && (magnitude & ((u64(1) << drop) - 1))) kept |= 1;
    float f = std::ldexp(float(kept), drop);
    if (negative) f = -f;
    if (d.bits == 32) return float_bits(f);
    return d.kind == 'h' ? to_bf16(f, how) : to_f16(f, how);
  }
  double v = load_number(s, raw, flags & FTZ);
  if (flags & TO_INTEGER && to_small_or_float) v = rounded(v, how);
  if (!to_small_or_float) return integer_limits(d, rounded(v, how));
  if (flags & RELU && !(v > 0) && !std::isnan(v)) v = 0;
  if (flags & SAT) v = v > 0 ? (v < 1 ? v : 1) : 0;
  switch (d.kind) {
    case 'e': return to_e4m3(s.kind == 'f' && s.bits == 64 ? to_odd(v) : float(v));
    case 'g': return to_e5m2(s.kind == 'f' && s.bits == 64 ? to_odd(v) : float(v));
    case 't': return to_tf32(float(v), how);
    case 'h': return to_bf16(to_odd(v), how);
    case 'f':
      if (d.bits == 16) {
        u16 h = to_f16(to_odd(v), how);
        if (flags & SATFINITE && (h & 0x7fff) == 0x7c00) h = (h & 0x8000) | 0x7bff;
        return h;
      }
      if (d.bits == 32) {
        if (std::isnan(v)) return 0x7fffffff;
        float f = to_float(v, how);
        return float_bits(flags & FTZ ? flush(f) : f);
      }
  }
  u64 b;
  std::memcpy(&b, &v, 8);
  return b;
}

Type unpack(u32 p) { return Type{char(p & 255), p >> 8 & 255, p >> 16}; }

void convert_lanes(Warp& w, const Inst& i, Mask m) {
  Type d = unpack(i.a), s = unpack(i.b);
  for (int l = 0; l < LANES; ++l)
    if (m >> l & 1) {
      u64 r = convert_one(d, s, w.read(i.op[1], l), Round(i.c), i.d);
      if (d.bits < 8 * i.op[0].bytes && d.kind != 's' && d.kind != 'u' && d.bits < 64) r &= (u64(1) << d.bits) - 1;
      // An 8-bit integer in a wider register is extended by its own sign.
      if (d.bits < 32 && (d.kind == 's' || d.kind == 'u')) r = d.kind == 's' ? u64(i64(r << (64 - d.bits)) >> (64 - d.bits)) : r & ((u64(1) << d.bits) - 1);
      w.write(i.op[0], l, r);
    }
}
// Two sources (the first to the upper half) or one packed source.
void convert_pair(Warp& w, const Inst& i, Mask m) {
  Type d = unpack(i.a), s = unpack(i.b);
  for (int l = 0; l < LANES; ++l)
    if (m >> l & 1) {
      u64 high, low;
      if (s.lanes == 2) {
        u64 both = w.read(i.op[1], l);
        high = both >> s.bits, low = both & ((u64(1) << s.bits) - 1);
      } else {
        high = w.read(i.op[1], l), low = w.read(i.op[2], l);
      }
      u64 mask = (u64(1) << d.bits) - 1;
      w.write(i.op[0], l, (convert_one(d, s, high, Round(i.c), i.d) & mask) << d.bits | (convert_one(d, s, low, Round(i.c), i.d) & mask));
    }
}

// The conversions that kernels are full of, 32 lanes at a time.
void bf16_to_f32(Warp& w, const Inst& i, Mask m) {
  u32 out[LANES];
  for (int l = 0; l < LANES; ++l) out[l] = u32(w.reg<u16>(i.op[1])[l]) << 16;
  put(w.reg<u32>(i.op[0]), out, m);
}
void f16_to_f32(Warp& w, const Inst& i, Mask m) {
  float out[LANES];
  for (int l = 0; l < LANES; ++l) out[l] = from_f16(w.reg<u16>(i.op[1])[l]);
  put(w.reg<float>(i.op[0]), out, m);
}
template <bool Bf>
void f32_pair(Warp& w, const Inst& i, Mask m) {
  u32 out[LANES];
  const float *high = w.reg<float>(i.op[1]), *low = w.reg<float>(i.op[2]);
  for (int l = 0; l < LANES; ++l) out[l] = Bf ? u32(to_bf16(high[l])) << 16 | to_bf16(low[l]) : u32(to_f16(high[l])) << 16 | to_f16(low[l]);
  put(w.reg<u32>(i.op[0]), out, m);
}
template <bool Bf>
void f32_single(Warp& w, const Inst& i, Mask m) {
  u16 out[LANES];
  const float* in = w.reg<float>(i.op[1]);
  for (int l = 0; l < LANES; ++l) out[l] = Bf ? to_bf16(in[l]) : to_f16(in[l]);
  put(w.reg<u16>(i.op[0]), out, m);
}
template <class D, class S>
void cast(Warp& w, const Inst& i, Mask m) {
  D out[LANES];
  for (int l = 0; l < LANES; ++l) out[l] = D(w.reg<S>(i.op[1])[l]);
  put(w.reg<D>(i.op[0]), out, m);
}

void cvt(Line& l, Inst& inst) {
  inst.kind = CONVERT;
  static const std::tuple<const char*, Round, bool> roundings[] = {
      {"rn", Round::nearest, false}, {"rz", Round::zero, false}, {"rm", Round::down, false}, {"rp", Round::up, false}, {"rna", Round::nearest_away, false},
      {"rni", Round::nearest, true}, {"rzi", Round::zero, true}, {"rmi", Round::down, true}, {"rpi", Round::up, true}};
  bool given = false;
  for (auto& [name, how, integer] : roundings)
    if (l.take(name)) {
      inst.c = u32(how), given = true;
      if (integer) inst.d |= TO_INTEGER;
    }
  if (l.take("sat")) inst.d |= SAT;
  if (l.take("ftz")) inst.d |= FTZ;
  if (l.take("satfinite")) inst.d |= SATFINITE;
  if (l.take("relu")) inst.d |= RELU;
  Type d = l.take_type(), s = l.take_type();
  inst.a = pack(d), inst.b = pack(s);
  if (d.lanes == 2) {
    l.want(s.lanes == 2 ? 2 : 3);
    l.push(l.operands[0].items[0], d.bytes());
    for (size_t k = 1; k < l.operands.size(); ++k) l.push(l.operands[k].items[0], s.bytes(), s.bits >= 16);
    bool plain = s.kind == 'f' && s.bits == 32 && inst.d == 0 && Round(inst.c) == Round::nearest && given;
    inst.run = plain && d.kind == 'h' ? f32_pair<true> : plain && d.kind == 'f' ? f32_pair<false> : convert_pair;
    return;
  }
  if (s.lanes == 2) return;
  l.want(2);
  l.push(l.operands[0].items[0], std::max(d.bytes(), 2u), false);
  l.push(l.operands[1].items[0], std::max(s.bytes(), 2u), false);
  u32 dw = l.ops[0].bytes, sw = l.ops[1].bytes;
  inst.run = convert_lanes;
  if (inst.d == 0 && given && Round(inst.c) == Round::nearest && s.kind == 'f' && s.bits == 32 && d.is_float() && d.bits == 16 && dw == 2)
    inst.run = d.kind == 'h' ? f32_single<true> : f32_single<false>;
  if (inst.d == 0 && !given && dw == d.bytes() && sw == s.bytes()) {
    if (d.kind == 'f' && d.bits == 32 && s.kind == 'h') inst.run = bf16_to_f32;
    if (d.kind == 'f' && d.bits == 32 && s.kind == 'f' && s.bits == 16) inst.run = f16_to_f32;
    bool ds = d.kind == 's' || d.kind == 'u', ss = s.kind == 's' || s.kind == 'u';
    if (ds && ss && d.bits == 64 && s.bits == 32) inst.run = s.kind == 's' ? cast<i64, i32> : cast<u64, u32>;
    if (ds && ss && d.bits == 32 && s.bits == 64) inst.run = cast<u32, u64>;
  }
}

// ---- mov ----

template <class T>
void move_lanes(Warp& w, const Inst& i, Mask m) {
  T out[LANES];
  std::memcpy(out, w.reg<T>(i.op[1]), sizeof out);
  put(w.reg<T>(i.op[0]), out, m);
}
void move_pack(Warp& w, const Inst& i, Mask m) {  // d <- {a, b, ...}, a lowest; i.a bits each
  for (int l = 0; l < LANES; ++l)
    if (m >> l & 1) {
      u64 r = 0;
      for (u32 k = 1; k < i.ops; ++k) r |= (i.a == 8 ? w.read(i.op[k], l) & 255 : w.read(i.op[k], l)) << (i.a * (k - 1));
      w.write(i.op[0], l, r);
    }
}
void move_unpack(Warp& w, const Inst& i, Mask m) {  // {a, b, ...} <- s, the last operand
  u64 s[LANES];
  for (int l = 0; l < LANES; ++l) s[l] = w.read(i.op[i.ops - 1], l);
  for (u32 k = 0; k + 1 < i.ops; ++k)
    for (int l = 0; l < LANES; ++l)
      if (m >> l & 1) w.write(i.op[k], l, i.a == 8 ? s[l] >> (8 * k) & 255 : s[l] >> (i.a * k));
}
void pack_halves(Warp& w, const Inst& i, Mask m) {
  u32 out[LANES];
  const u16 *a = w.reg<u16>(i.op[1]), *b = w.reg<u16>(i.op[2]);
  for (int l = 0; l < LANES; ++l) out[l] = u32(b[l]) << 16 | a[l];
  put(w.reg<u32>(i.op[0]), out, m);
}
void unpack_halves(Warp& w, const Inst& i, Mask m) {
  u16 low[LANES], high[LANES];
  const u32* s = w.reg<u32>(i.op[2]);
  for (int l = 0; l < LANES; ++l) low[l] = u16(s[l]), high[l] = u16(s[l] >> 16);
  put(w.reg<u16>(i.op[0]), low, m);
  put(w.reg<u16>(i.op[1]), high, m);
}
void pack64(Warp& w, const Inst& i, Mask m) {
  u64 out[LANES];
  const u32 *a = w.reg<u32>(i.op[1]), *b = w.reg<u32>(i.op[2]);
  for (int l = 0; l < LANES; ++l) out[l] = u64(b[l]) << 32 | a[l];
  put(w.reg<u64>(i.op[0]), out, m);
}
void mov(Line& l, Inst& inst) {
  inst.kind = MOVE;
  Type t = l.take_type();
  l.want(2);
  if (t.kind == 'p') {
    l.push_predicate(l.operands[0].text);
    l.push_predicate(l.operands[1].text);
    inst.run = [](Warp& w, const Inst& i, Mask m) { w.set_predicate(i.op[0], w.predicate(i.op[1]), m); };
    return;
  }
  size_t to = l.operands[0].items.size(), from = l.operands[1].items.size();
  bool to_vector = l.operands[0].text[0] == '{', from_vector = l.operands[1].text[0] == '{';
  if (to_vector && from_vector) return;
  inst.a = to_vector ? t.bits / to : from_vector ? t.bits / from : 0;
  if (inst.a % 8 || t.bits > 64) return;
  l.push_all(0, to_vector ? std::max(inst.a / 8, 2u) : t.bytes());  // 8-bit registers take two bytes here
  l.push_all(1, from_vector ? std::max(inst.a / 8, 2u) : t.bytes());
  if (from_vector) inst.run = from == 2 && inst.a == 32 ? pack64 : from == 2 && inst.a == 16 ? pack_halves : move_pack;
  else if (to_vector) inst.run = to == 2 && inst.a == 16 ? unpack_halves : move_unpack;
  else inst.run = t.bits == 16 ? move_lanes<u16> : t.bits == 32 ? move_lanes<u32> : move_lanes<u64>;
}

// ---- cvta ----

u64 window(const std::string& space) {
  if (space == "shared") return SHARED_WINDOW;
  if (space == "param") return PARAM_WINDOW;
  if (space == "local") return LOCAL_WINDOW;
  return 0;  // global and const: generic addresses already
}
void cvta(Line& l, Inst& inst) {
  inst.kind = MOVE;
  bool to = l.take("to");
  std::string space;
  for (const char* s : {"shared", "global", "local", "const", "param"})
    if (l.take(s)) space = s;
  l.take("::cta");
  Type t = l.take_type();
  if (space.empty() || t.bits != 64) return;
  l.want(2);
  l.push(l.operands[0].items[0], 8);
  l.push_address(1, inst, 8);
  // Shared addresses are 32 bits wide within their window.
  inst.offset += to ? -i64(window(space)) : i64(window(space));
  inst.run = [](Warp& w, const Inst& i, Mask m) {
    u64 out[LANES];
    for (int l = 0; l < LANES; ++l) out[l] = (i.op[1].bytes == 4 ? w.reg<u32>(i.op[1])[l] : w.reg<u64>(i.op[1])[l]) + i.offset;
    put(w.reg<u64>(i.op[0]), out, m);
  };
}

}  // namespace

const Family& convert_family() {
  static const Family family{{{"cvt", cvt}, {"mov", mov}, {"cvta", cvta}}};
  return family;
}

}  // namespace ptx
