// Integer, bit, floating-point and predicate instructions: each is a function of one lane, mapped over 32.
#include <algorithm>
#include <array>
#include <cfenv>
#include <limits>
#include <type_traits>

#include "decode.h"
#include "numbers.h"

namespace ptx {
namespace {

template <class D, class A, auto F>
void map1(Warp& w, const Inst& i, Mask m) {
  const A* a = w.reg<A>(i.op[1]);
  D out[LANES];
  for (int l = 0; l < LANES; ++l) out[l] = F(a[l]);
  put(w.reg<D>(i.op[0]), out, m);
}
template <class D, class A, class B, auto F>
void map2(Warp& w, const Inst& i, Mask m) {
  const A* a = w.reg<A>(i.op[1]);
  const B* b = w.reg<B>(i.op[2]);
  D out[LANES];
  for (int l = 0; l < LANES; ++l) out[l] = F(a[l], b[l]);
  put(w.reg<D>(i.op[0]), out, m);
}
template <class D, class A, class B, class C, auto F>
void map3(Warp& w, const Inst& i, Mask m) {
  const A* a = w.reg<A>(i.op[1]);
  const B* b = w.reg<B>(i.op[2]);
  const C* c = w.reg<C>(i.op[3]);
  D out[LANES];
  for (int l = 0; l < LANES; ++l) out[l] = F(a[l], b[l], c[l]);
  put(w.reg<D>(i.op[0]), out, m);
}
template <class T, auto F>
constexpr auto un = map1<T, T, F>;
template <class T, auto F>
constexpr auto bin = map2<T, T, T, F>;
template <class T, auto F>
constexpr auto tri = map3<T, T, T, T, F>;

using Run = void (*)(Warp&, const Inst&, Mask);

// Picks by width and signedness. F is a generic lambda.
template <auto F>
Run unary(Type t) {
  bool s = t.kind == 's';
  switch (t.bits) {
    case 16: return s ? Run(un<i16, F>) : Run(un<u16, F>);
    case 32: return s ? Run(un<i32, F>) : Run(un<u32, F>);
    case 64: return s ? Run(un<i64, F>) : Run(un<u64, F>);
  }
  return nullptr;
}
template <auto F>
Run binary(Type t) {
  bool s = t.kind == 's';
  switch (t.bits) {
    case 16: return s ? Run(bin<i16, F>) : Run(bin<u16, F>);
    case 32: return s ? Run(bin<i32, F>) : Run(bin<u32, F>);
    case 64: return s ? Run(bin<i64, F>) : Run(bin<u64, F>);
  }
  return nullptr;
}
template <auto F>
Run ternary(Type t) {
  bool s = t.kind == 's';
  switch (t.bits) {
    case 16: return s ? Run(tri<i16, F>) : Run(tri<u16, F>);
    case 32: return s ? Run(tri<i32, F>) : Run(tri<u32, F>);
    case 64: return s ? Run(tri<i64, F>) : Run(tri<u64, F>);
  }
  return nullptr;
}

template <class T>
using Unsigned = std::make_unsigned_t<T>;
template <class T>
struct Wider;
template <> struct Wider<u16> { using type = u32; };
template <> struct Wider<i16> { using type = i32; };
template <> struct Wider<u32> { using type = u64; };
template <> struct Wider<i32> { using type = i64; };
template <> struct Wider<u64> { using type = unsigned __int128; };
template <> struct Wider<i64> { using type = __int128; };
template <class T>
using Wide = typename Wider<T>::type;

void sources(Line& l, u32 bytes, size_t count) {
  l.want(count + 1);
  for (size_t i = 0; i <= count; ++i) l.push(l.operands[i].items[0], bytes);
}

// ---- floating point ----

// What .ftz, .sat and .relu add around an operation on floats.
template <class T>
T saturate(T v) {
  return v > T(0) ? (v < T(1) ? v : T(1)) : T(0);  // NaN becomes 0
}
template <auto F, bool Ftz, bool Sat>
struct Around {
  template <class... A>
  static float run(A... a) {
    float r = Ftz ? flush(F(flush(a)...)) : F(a...);
    return Sat ? saturate(r) : r;
  }
};
template <auto F, int N, bool Ftz, bool Sat>
Run float_run() {
  constexpr auto f = [](auto... a) { return Around<F, Ftz, Sat>::run(a...); };
  if constexpr (N == 1) return un<float, f>;
  else if constexpr (N == 2) return bin<float, f>;
  else return tri<float, f>;
}
template <auto F, int N>
Run float_pick(bool ftz, bool sat) {
  if (sat) return ftz ? float_run<F, N, true, true>() : float_run<F, N, false, true>();
  return ftz ? float_run<F, N, true, false>() : float_run<F, N, false, false>();
}

// 16-bit formats: computed in float (exact for one operation: float has more than twice their digits), rounded once.
// fma needs care: in float the sum of an exact product and c may be rounded twice; double holds it well enough for f16 and bf16.
template <bool Bf>
float widen(u16 h) {
  if constexpr (Bf) return from_bf16(h);
  else return from_f16(h);
}
template <bool Bf>
u16 narrow(double v) {
  float f = float(v);
  // Round to odd keeps the second rounding right.
  if (std::isfinite(v) && double(f) != v) {
    u32 b = float_bits(f);
    if (std::fabs(double(f)) > std::fabs(v)) b -= 1;
    f = bits_float(b | 1);
  }
  if constexpr (Bf) return to_bf16(f);
  else return to_f16(f);
}
template <bool Bf, int N, auto F, bool Relu>
void half_lanes(Warp& w, const Inst& i, Mask m) {  // i.a halves in a register
  const u32 halves = i.a;
  u16 out[LANES * 2];
  const u16* s[3];
  for (int k = 0; k < N; ++k) s[k] = w.reg<u16>(i.op[k + 1]);
  for (u32 l = 0; l < LANES * halves; ++l) {
    double r;
    if constexpr (N == 1) r = F(double(widen<Bf>(s[0][l])));
    else if constexpr (N == 2) r = F(double(widen<Bf>(s[0][l])), double(widen<Bf>(s[1][l])));
    else r = F(double(widen<Bf>(s[0][l])), double(widen<Bf>(s[1][l])), double(widen<Bf>(s[2][l])));
    if (Relu && !(r > 0) && !std::isnan(r)) r = 0;
    out[l] = narrow<Bf>(r);
  }
  if (halves == 2) put(w.reg<u32>(i.op[0]), reinterpret_cast<u32*>(out), m);
  else put(w.reg<u16>(i.op[0]), out, m);
}
template <auto F, int N>
Run half_pick(Type t, bool relu) {
  if (t.kind == 'h') return relu ? half_lanes<true, N, F, true> : half_lanes<true, N, F, false>;
  return relu ? half_lanes<false, N, F, true> : half_lanes<false, N, F, false>;
}

template <auto F, int N>
void f32x2_lanes(Warp& w, const Inst& i, Mask m) {
  float out[LANES * 2];
  const float* s[3];
  for (int k = 0; k < N; ++k) s[k] = w.reg<float>(i.op[k + 1]);
  for (int l = 0; l < LANES * 2; ++l) {
    if constexpr (N == 2) out[l] = F(s[0][l], s[1][l]);
    else out[l] = F(s[0][l], s[1][l], s[2][l]);
  }
  put(w.reg<u64>(i.op[0]), reinterpret_cast<u64*>(out), m);
}

// One floating-point operation with N sources, for every float type.
template <int N, auto F>
void floating(Line& l, Inst& inst, Type t) {
  inst.kind = FLOAT;
  bool ftz = l.take("ftz"), sat = l.take("sat"), relu = l.take("relu");
  sources(l, t.bytes(), N);
  inst.a = t.lanes;
  if (t.bits == 16) {
    if (sat) l.fail("unknown variant: .sat on 16-bit floats");
    inst.run = half_pick<F, N>(t, relu);
  } else if (t.bits == 32 && t.lanes == 1 && !relu) {
    inst.run = float_pick<F, N>(ftz, sat);
  } else if (t.bits == 32 && t.lanes == 2 && !ftz && !sat && !relu) {
    if constexpr (N >= 2) inst.run = f32x2_lanes<F, N>;
  } else if (t.bits == 64 && !relu) {
    if constexpr (N == 1) inst.run = un<double, F>;
    else if constexpr (N == 2) inst.run = bin<double, F>;
    else inst.run = tri<double, F>;
  }
}
// Directed rounding is the host's: rare enough to switch it around one warp's lanes.
template <auto F, int N>
__attribute__((noinline)) void directed(Warp& w, const Inst& i, Mask m) {
  static const int modes[] = {FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};
  float out[LANES];
  const float* s[3];
  for (int k = 0; k < N; ++k) s[k] = w.reg<float>(i.op[k + 1]);
  std::fesetround(modes[i.b]);
  for (int l = 0; l < LANES; ++l) {
    if constexpr (N == 2) out[l] = F(s[0][l], s[1][l]);
    else out[l] = F(s[0][l], s[1][l], s[2][l]);
  }
  std::fesetround(FE_TONEAREST);
  put(w.reg<float>(i.op[0]), out, m);
}

template <int N, auto F>
bool take_directed(Line& l, Inst& inst, Type t) {
  for (u32 k = 0; k < 3; ++k)
    if (t.bits == 32 && t.lanes == 1 && l.take(std::array{"rz", "rm", "rp"}[k])) {
      inst.kind = FLOAT;
      inst.b = k;
      sources(l, 4, N);
      inst.run = directed<F, N>;
      return true;
    }
  return false;
}
void nearest_only(Line& l) {
  l.take("rn");
  for (const char* other : {"rz", "rm", "rp"})
    if (l.has(other)) l.fail("only rounding to nearest is implemented");
}

constexpr auto f_min = [](auto a, auto b) { return std::isnan(a) ? b : std::isnan(b) ? a : (a < b || (a == b && std::signbit(a)) ? a : b); };
constexpr auto f_max = [](auto a, auto b) { return std::isnan(a) ? b : std::isnan(b) ? a : (a > b || (a == b && !std::signbit(a)) ? a : b); };
constexpr auto f_min_nan = [](auto a, auto b) { return std::isnan(a) || std::isnan(b) ? decltype(a)(NAN) : f_min(a, b); };
constexpr auto f_max_nan = [](auto a, auto b) { return std::isnan(a) || std::isnan(b) ? decltype(a)(NAN) : f_max(a, b); };

// .xorsign.abs: of the magnitudes, with the exclusive or of the signs unless the result is NaN.
template <auto F>
constexpr auto xorsign_abs = [](auto a, auto b) {
  auto r = F(std::fabs(a), std::fabs(b));
  return std::isnan(r) ? r : std::copysign(r, std::signbit(a) != std::signbit(b) ? decltype(r)(-1) : decltype(r)(1));
};

// ---- families ----

// sm_100 and younger: the sources that are multiplied, or the first one of a sum, are f16 or bf16 and the rest f32. Widening is exact.
template <bool Bf, auto F>
void mixed_sum(Warp& w, const Inst& i, Mask m) {
  map2<float, u16, float, [](u16 a, float b) { return F(widen<Bf>(a), b); }>(w, i, m);
}
template <bool Bf>
void mixed_fma(Warp& w, const Inst& i, Mask m) {
  map3<float, u16, u16, float, [](u16 a, u16 b, float c) { return std::fma(widen<Bf>(a), widen<Bf>(b), c); }>(w, i, m);
}
bool take_mixed(Line& l, Inst& inst, Type t) {
  bool bf = l.has("bf16");
  if (t.bits != 32 || t.lanes != 1 || !(bf || l.has("f16"))) return false;
  l.take(bf ? "bf16" : "f16");
  l.take("rn");
  inst.kind = FLOAT;
  size_t narrow = l.name == "fma" ? 2 : 1;
  l.want(narrow + 2);
  for (size_t k = 0; k < narrow + 2; ++k) l.push(l.operands[k].items[0], k >= 1 && k <= narrow ? 2 : 4);
  constexpr auto plus = [](float a, float b) { return a + b; };
  constexpr auto minus = [](float a, float b) { return a - b; };
  if (l.name == "fma") inst.run = bf ? mixed_fma<true> : mixed_fma<false>;
  else if (l.name == "add") inst.run = bf ? mixed_sum<true, plus> : mixed_sum<false, plus>;
  else inst.run = bf ? mixed_sum<true, minus> : mixed_sum<false, minus>;
  return true;
}

void add_like(Line& l, Inst& inst) {
  Type t = l.take_type();
  const std::string& n = l.name;
  if (t.is_float()) {
    if (take_mixed(l, inst, t)) return;
    if (n == "add" ? take_directed<2, [](auto a, auto b) { return a + b; }>(l, inst, t) : take_directed<2, [](auto a, auto b) { return a - b; }>(l, inst, t)) return;
    nearest_only(l);
    if (n == "add") return floating<2, [](auto a, auto b) { return a + b; }>(l, inst, t);
    if (n == "sub") return floating<2, [](auto a, auto b) { return a - b; }>(l, inst, t);
  }
  inst.kind = INTEGER;
  sources(l, t.bytes(), 2);
  if (l.take("sat")) {
    if (t.kind != 's' || t.bits != 32) l.fail("unknown variant");
    if (n == "add")
      inst.run = bin<i32, [](i32 a, i32 b) { return i32(std::clamp<i64>(i64(a) + b, INT32_MIN, INT32_MAX)); }>;
    else
      inst.run = bin<i32, [](i32 a, i32 b) { return i32(std::clamp<i64>(i64(a) - b, INT32_MIN, INT32_MAX)); }>;
    return;
  }
  t.kind = 'u';
  if (t.lanes == 2) {
    l.fail("unknown variant");
  }
  if (n == "add") inst.run = binary<[](auto a, auto b) { return decltype(a)(a + b); }>(t);
  if (n == "sub") inst.run = binary<[](auto a, auto b) { return decltype(a)(a - b); }>(t);
}

constexpr auto mul_hi = [](auto a, auto b) {
  using T = decltype(a);
  return T(Wide<T>(a) * Wide<T>(b) >> (8 * sizeof(T)));
};
template <class T>
T low_product(T a, T b) {
  return T(u64(a) * u64(b));
}

void mul(Line& l, Inst& inst) {
  Type t = l.take_type();
  if (t.is_float()) {
    if (take_directed<2, [](auto a, auto b) { return a * b; }>(l, inst, t)) return;
    nearest_only(l);
    return floating<2, [](auto a, auto b) { return a * b; }>(l, inst, t);
  }
  inst.kind = INTEGER;
  if (l.take("wide")) {
    l.want(3);
    l.push(l.operands[0].items[0], t.bytes() * 2);
    l.push(l.operands[1].items[0], t.bytes());
    l.push(l.operands[2].items[0], t.bytes());
    if (t.bits == 32) {
      if (t.kind == 's') inst.run = map2<i64, i32, i32, [](i32 a, i32 b) { return i64(a) * b; }>;
      else inst.run = map2<u64, u32, u32, [](u32 a, u32 b) { return u64(a) * b; }>;
    } else if (t.bits == 16) {
      if (t.kind == 's') inst.run = map2<i32, i16, i16, [](i16 a, i16 b) { return i32(a) * b; }>;
      else inst.run = map2<u32, u16, u16, [](u16 a, u16 b) { return u32(a) * b; }>;
    }
    return;
  }
  sources(l, t.bytes(), 2);
  if (l.take("hi")) inst.run = binary<mul_hi>(t);
  else if (l.take("lo")) inst.run = binary<[](auto a, auto b) { return low_product(a, b); }>(Type{'u', t.bits});
}

void mad(Line& l, Inst& inst) {
  Type t = l.take_type();
  if (t.is_float()) {
    l.take("rn");
    return floating<3, [](auto a, auto b, auto c) { return std::fma(a, b, c); }>(l, inst, t);
  }
  inst.kind = INTEGER;
  if (l.take("wide")) {
    l.want(4);
    l.push(l.operands[0].items[0], t.bytes() * 2);
    l.push(l.operands[1].items[0], t.bytes());
    l.push(l.operands[2].items[0], t.bytes());
    l.push(l.operands[3].items[0], t.bytes() * 2);
    if (t.bits == 32) {
      if (t.kind == 's') inst.run = map3<u64, i32, i32, u64, [](i32 a, i32 b, u64 c) { return u64(i64(a) * b) + c; }>;
      else inst.run = map3<u64, u32, u32, u64, [](u32 a, u32 b, u64 c) { return u64(a) * b + c; }>;
    } else if (t.bits == 16) {
      if (t.kind == 's') inst.run = map3<u32, i16, i16, u32, [](i16 a, i16 b, u32 c) { return u32(i32(a) * b) + c; }>;
      else inst.run = map3<u32, u16, u16, u32, [](u16 a, u16 b, u32 c) { return u32(a) * b + c; }>;
    }
    return;
  }
  sources(l, t.bytes(), 3);
  if (l.take("hi")) inst.run = ternary<[](auto a, auto b, auto c) { return decltype(a)(Unsigned<decltype(a)>(mul_hi(a, b)) + c); }>(t);
  else if (l.take("lo")) inst.run = ternary<[](auto a, auto b, auto c) { return decltype(a)(low_product(a, b) + c); }>(Type{'u', t.bits});
}

void fma_(Line& l, Inst& inst) {
  Type t = l.take_type();
  if (take_mixed(l, inst, t)) return;
  if (take_directed<3, [](auto a, auto b, auto c) { return std::fma(a, b, c); }>(l, inst, t)) return;
  nearest_only(l);
  floating<3, [](auto a, auto b, auto c) { return std::fma(a, b, c); }>(l, inst, t);
}

void div_rem(Line& l, Inst& inst) {
  Type t = l.take_type();
  if (t.is_float()) {
    nearest_only(l);
    l.take("full"), l.take("approx");  // the exact quotient is one that .full and .approx may return
    return floating<2, [](auto a, auto b) { return a / b; }>(l, inst, t);
  }
  inst.kind = INTEGER;
  sources(l, t.bytes(), 2);
  // Division by zero gives an unspecified value, here all ones; lanes that are off may hold anything.
  if (l.name == "div")
    inst.run = binary<[](auto a, auto b) {
      using T = decltype(a);
      if (b == 0) return T(-1);
      if (std::is_signed_v<T> && b == T(-1)) return T(0 - Unsigned<T>(a));
      return T(a / b);
    }>(t);
  else
    inst.run = binary<[](auto a, auto b) {
      using T = decltype(a);
      if (b == 0) return T(a);
      if (std::is_signed_v<T> && b == T(-1)) return T(0);
      return T(a % b);
    }>(t);
}

void min_max(Line& l, Inst& inst) {
  Type t = l.take_type();
  bool min = l.name == "min";
  if (t.is_float() && l.operands.size() == 4) {  // three sources, from sm_100 on
    if (l.take("NaN"))
      return min ? floating<3, [](auto a, auto b, auto c) { return f_min_nan(f_min_nan(a, b), c); }>(l, inst, t)
                 : floating<3, [](auto a, auto b, auto c) { return f_max_nan(f_max_nan(a, b), c); }>(l, inst, t);
    return min ? floating<3, [](auto a, auto b, auto c) { return f_min(f_min(a, b), c); }>(l, inst, t)
               : floating<3, [](auto a, auto b, auto c) { return f_max(f_max(a, b), c); }>(l, inst, t);
  }
  if (t.is_float()) {
    bool nan = l.take("NaN");
    if (l.has("xorsign")) {
      if (!l.take("xorsign") || !l.take("abs")) return;
      if (nan) return min ? floating<2, xorsign_abs<f_min_nan>>(l, inst, t) : floating<2, xorsign_abs<f_max_nan>>(l, inst, t);
      return min ? floating<2, xorsign_abs<f_min>>(l, inst, t) : floating<2, xorsign_abs<f_max>>(l, inst, t);
    }
    if (nan) return min ? floating<2, f_min_nan>(l, inst, t) : floating<2, f_max_nan>(l, inst, t);
    return min ? floating<2, f_min>(l, inst, t) : floating<2, f_max>(l, inst, t);
  }
  inst.kind = INTEGER;
  sources(l, t.bytes(), 2);
  inst.run = min ? binary<[](auto a, auto b) { return std::min(a, b); }>(t) : binary<[](auto a, auto b) { return std::max(a, b); }>(t);
}

void negate_abs(Line& l, Inst& inst) {
  Type t = l.take_type();
  bool neg = l.name == "neg";
  if (t.is_float()) return neg ? floating<1, [](auto a) { return -a; }>(l, inst, t) : floating<1, [](auto a) { return std::fabs(a); }>(l, inst, t);
  inst.kind = INTEGER;
  sources(l, t.bytes(), 1);
  if (neg) inst.run = unary<[](auto a) { return decltype(a)(0 - Unsigned<decltype(a)>(a)); }>(t);
  else inst.run = unary<[](auto a) { return a < 0 ? decltype(a)(0 - Unsigned<decltype(a)>(a)) : a; }>(Type{'s', t.bits});
}

void copysign(Line& l, Inst& inst) {  // the sign of a, the magnitude of b
  floating<2, [](auto a, auto b) { return std::copysign(b, a); }>(l, inst, l.take_type());
}

template <auto F>
void approximate(Line& l, Inst& inst) {
  Type t = l.take_type();
  l.take("approx"), nearest_only(l);
  floating<1, F>(l, inst, t);
}

// ---- bits ----

template <auto F>
void predicate2(Warp& w, const Inst& i, Mask m) {
  w.set_predicate(i.op[0], F(w.predicate(i.op[1]), w.predicate(i.op[2])), m);
}
void logic(Line& l, Inst& inst) {
  Type t = l.take_type();
  const std::string& n = l.name;
  if (t.kind == 'p') {
    inst.kind = PREDICATE;
    for (auto& o : l.operands) l.push_predicate(o.text);
    if (n == "and") inst.run = predicate2<[](Mask a, Mask b) { return a & b; }>;
    if (n == "or") inst.run = predicate2<[](Mask a, Mask b) { return a | b; }>;
    if (n == "xor") inst.run = predicate2<[](Mask a, Mask b) { return a ^ b; }>;
    if (n == "not") inst.run = [](Warp& w, const Inst& i, Mask m) { w.set_predicate(i.op[0], ~w.predicate(i.op[1]), m); };
    l.want(n == "not" ? 2 : 3);
    return;
  }
  inst.kind = INTEGER;
  t.kind = 'u';
  bool one = n == "not" || n == "cnot";
  sources(l, t.bytes(), one ? 1 : 2);
  if (n == "and") inst.run = binary<[](auto a, auto b) { return decltype(a)(a & b); }>(t);
  if (n == "or") inst.run = binary<[](auto a, auto b) { return decltype(a)(a | b); }>(t);
  if (n == "xor") inst.run = binary<[](auto a, auto b) { return decltype(a)(a ^ b); }>(t);
  if (n == "not") inst.run = unary<[](auto a) { return decltype(a)(~a); }>(t);
  if (n == "cnot") inst.run = unary<[](auto a) { return decltype(a)(a == 0); }>(t);
}

// Shift counts beyond the width are clamped to it.
template <class T>
Run shift_run(bool left) {
  if (left) return map2<T, T, u32, [](T a, u32 n) { return n >= 8 * sizeof(T) ? T(0) : T(Unsigned<T>(a) << n); }>;
  return map2<T, T, u32, [](T a, u32 n) { return T(a >> (n >= 8 * sizeof(T) ? (std::is_signed_v<T> ? 8 * sizeof(T) - 1 : 0) : n)) & (std::is_signed_v<T> || n < 8 * sizeof(T) ? T(-1) : T(0)); }>;
}
void shift(Line& l, Inst& inst) {
  inst.kind = INTEGER;
  Type t = l.take_type();
  l.want(3);
  l.push(l.operands[0].items[0], t.bytes());
  l.push(l.operands[1].items[0], t.bytes());
  l.push(l.operands[2].items[0], 4);
  bool left = l.name == "shl", s = t.kind == 's';
  if (t.bits == 16) inst.run = s ? shift_run<i16>(left) : shift_run<u16>(left);
  if (t.bits == 32) inst.run = s ? shift_run<i32>(left) : shift_run<u32>(left);
  if (t.bits == 64) inst.run = s ? shift_run<i64>(left) : shift_run<u64>(left);
}

void funnel(Line& l, Inst& inst) {  // shf
  inst.kind = INTEGER;
  l.take_type();
  sources(l, 4, 3);
  bool left = l.take("l");
  if (!left) l.take("r");
  if (l.take("wrap")) {
    if (left) inst.run = tri<u32, [](u32 a, u32 b, u32 c) { return u32(((u64(b) << 32 | a) << (c & 31)) >> 32); }>;
    else inst.run = tri<u32, [](u32 a, u32 b, u32 c) { return u32((u64(b) << 32 | a) >> (c & 31)); }>;
  } else if (l.take("clamp")) {
    if (left) inst.run = tri<u32, [](u32 a, u32 b, u32 c) { return c >= 32 ? a : u32(((u64(b) << 32 | a) << c) >> 32); }>;
    else inst.run = tri<u32, [](u32 a, u32 b, u32 c) { return u32((u64(b) << 32 | a) >> (c > 32 ? 32 : c)); }>;
  }
}

template <class T>
T bit_field(T a, u32 position, u32 length) {
  position &= 255, length &= 255;
  constexpr u32 width = 8 * sizeof(T);
  using U = Unsigned<T>;
  U value = position < width ? U(a) >> position : 0;
  U mask = length >= width ? U(-1) : (U(1) << length) - 1;
  U r = value & mask;
  if (std::is_signed_v<T> && length) {
    u32 sign_at = std::min(position + length - 1, width - 1);
    if (U(a) >> sign_at & 1) r |= ~mask | (position < width ? ~(U(-1) >> position) : U(-1));
  }
  return T(r);
}
void bfe(Line& l, Inst& inst) {
  inst.kind = INTEGER;
  Type t = l.take_type();
  l.want(4);
  l.push(l.operands[0].items[0], t.bytes());
  l.push(l.operands[1].items[0], t.bytes());
  l.push(l.operands[2].items[0], 4);
  l.push(l.operands[3].items[0], 4);
  bool s = t.kind == 's';
  if (t.bits == 32) inst.run = s ? Run(map3<i32, i32, u32, u32, bit_field<i32>>) : Run(map3<u32, u32, u32, u32, bit_field<u32>>);
  if (t.bits == 64) inst.run = s ? Run(map3<i64, i64, u32, u32, bit_field<i64>>) : Run(map3<u64, u64, u32, u32, bit_field<u64>>);
}
template <class T>
void bfi_lanes(Warp& w, const Inst& i, Mask m) {
  T out[LANES];
  for (int k = 0; k < LANES; ++k) {
    T a = w.reg<T>(i.op[1])[k], b = w.reg<T>(i.op[2])[k];
    u32 position = w.reg<u32>(i.op[3])[k] & 255, length = w.reg<u32>(i.op[4])[k] & 255;
    T mask = length >= 8 * sizeof(T) ? T(-1) : (T(1) << length) - 1;
    mask = position < 8 * sizeof(T) ? mask << position : 0;
    out[k] = (b & ~mask) | (position < 8 * sizeof(T) ? (a << position) & mask : 0);
  }
  put(w.reg<T>(i.op[0]), out, m);
}
void bfi(Line& l, Inst& inst) {
  inst.kind = INTEGER;
  Type t = l.take_type();
  l.want(5);
  for (int k = 0; k < 3; ++k) l.push(l.operands[k].items[0], t.bytes());
  l.push(l.operands[3].items[0], 4);
  l.push(l.operands[4].items[0], 4);
  inst.run = t.bits == 64 ? bfi_lanes<u64> : bfi_lanes<u32>;
}
void count_bits(Line& l, Inst& inst) {
  inst.kind = INTEGER;
  Type t = l.take_type();
  l.want(2);
  bool reverse = l.name == "brev";
  l.push(l.operands[0].items[0], reverse ? t.bytes() : 4);
  l.push(l.operands[1].items[0], t.bytes());
  bool wide = t.bits == 64;
  if (l.name == "popc")
    inst.run = wide ? Run(map1<u32, u64, [](u64 a) { return u32(__builtin_popcountll(a)); }>) : Run(map1<u32, u32, [](u32 a) { return u32(__builtin_popcount(a)); }>);
  if (l.name == "clz")
    inst.run = wide ? Run(map1<u32, u64, [](u64 a) { return a ? u32(__builtin_clzll(a)) : 64u; }>) : Run(map1<u32, u32, [](u32 a) { return a ? u32(__builtin_clz(a)) : 32u; }>);
  if (l.name == "bfind" && t.kind == 'u' && l.take("shiftamt"))  // how far to shift left, so that the first one bit is the sign
    inst.run = wide ? Run(map1<u32, u64, [](u64 a) { return a ? u32(__builtin_clzll(a)) : FULL; }>) : Run(map1<u32, u32, [](u32 a) { return a ? u32(__builtin_clz(a)) : FULL; }>);
  else if (l.name == "bfind" && t.kind == 'u')
    inst.run = wide ? Run(map1<u32, u64, [](u64 a) { return a ? 63u - u32(__builtin_clzll(a)) : FULL; }>) : Run(map1<u32, u32, [](u32 a) { return a ? 31u - u32(__builtin_clz(a)) : FULL; }>);
  if (reverse) {
    auto f = [](auto a) {
      decltype(a) r = 0;
      for (u32 k = 0; k < 8 * sizeof a; ++k) r |= (a >> k & 1) << (8 * sizeof a - 1 - k);
      return r;
    };
    inst.run = wide ? Run(map1<u64, u64, f>) : Run(map1<u32, u32, f>);
  }
}

u32 permute(u32 a, u32 b, u32 c) {
  u64 both = u64(b) << 32 | a;
  u32 r = 0;
  for (int k = 0; k < 4; ++k) {
    u32 s = c >> (4 * k) & 15;
    u32 byte = u32(both >> (8 * (s & 7))) & 255;
    if (s & 8) byte = byte & 128 ? 255 : 0;
    r |= byte << (8 * k);
  }
  return r;
}
void prmt(Line& l, Inst& inst) {
  inst.kind = INTEGER;
  l.take_type();
  sources(l, 4, 3);
  inst.run = tri<u32, permute>;
}
void lop3_lanes(Warp& w, const Inst& i, Mask m) {
  const u32 *a = w.reg<u32>(i.op[1]), *b = w.reg<u32>(i.op[2]), *c = w.reg<u32>(i.op[3]);
  u32 out[LANES] = {};
  for (int bit = 0; bit < 8; ++bit) {
    if (!(i.a >> bit & 1)) continue;
    u32 na = bit & 4 ? 0 : FULL, nb = bit & 2 ? 0 : FULL, nc = bit & 1 ? 0 : FULL;
    for (int k = 0; k < LANES; ++k) out[k] |= (a[k] ^ na) & (b[k] ^ nb) & (c[k] ^ nc);
  }
  put(w.reg<u32>(i.op[0]), out, m);
}
void lop3(Line& l, Inst& inst) {
  inst.kind = INTEGER;
  l.take_type();
  l.want(5);
  for (int k = 0; k < 4; ++k) l.push(l.operands[k].items[0], 4);
  inst.a = std::strtoul(l.operands[4].text.c_str(), nullptr, 0);
  inst.run = lop3_lanes;
}

void dp4a(Line& l, Inst& inst) {
  inst.kind = INTEGER;
  Type a = l.take_type(), b = l.take_type();
  sources(l, 4, 3);
  inst.a = a.kind == 's', inst.b = b.kind == 's';
  inst.run = [](Warp& w, const Inst& i, Mask m) {
    u32 out[LANES];
    for (int k = 0; k < LANES; ++k) {
      u32 sum = w.reg<u32>(i.op[3])[k];
      for (int s = 0; s < 32; s += 8) {
        u32 x = w.reg<u32>(i.op[1])[k] >> s & 255, y = w.reg<u32>(i.op[2])[k] >> s & 255;
        sum += u32((i.a ? i32(i8(x)) : i32(x)) * (i.b ? i32(i8(y)) : i32(y)));
      }
      out[k] = sum;
    }
    put(w.reg<u32>(i.op[0]), out, m);
  };
}

// ---- comparisons ----

enum Compare : u8 { EQ, NE, LT, LE, GT, GE, EQU, NEU, LTU, LEU, GTU, GEU, NUM, NAN_ };

template <class T, Compare C>
Mask compare(const T* a, const T* b) {
  Mask m = 0;
  for (int l = 0; l < LANES; ++l) {
    bool r;
    T x = a[l], y = b[l];
    if constexpr (C == EQ) r = x == y;
    else if constexpr (C == NE) r = std::is_floating_point_v<T> ? (x < y || x > y) : x != y;
    else if constexpr (C == LT) r = x < y;
    else if constexpr (C == LE) r = x <= y;
    else if constexpr (C == GT) r = x > y;
    else if constexpr (C == GE) r = x >= y;
    else if constexpr (C == EQU) r = !(x < y || x > y);
    else if constexpr (C == NEU) r = !(x == y);
    else if constexpr (C == LTU) r = !(x >= y);
    else if constexpr (C == LEU) r = !(x > y);
    else if constexpr (C == GTU) r = !(x <= y);
    else if constexpr (C == GEU) r = !(x < y);
    else if constexpr (C == NUM) r = x == x && y == y;
    else r = x != x || y != y;
    m |= Mask(r) << l;
  }
  return m;
}

// inst.a: 0 plain, 1 and, 2 or, 3 xor with a third predicate. inst.b: a second destination, the complement. inst.c: ftz, or a 16-bit format
template <class T, Compare C>
void setp_lanes(Warp& w, const Inst& i, Mask m) {
  u32 s = 1 + (i.b != 0);
  const T *a = w.reg<T>(i.op[s]), *b = w.reg<T>(i.op[s + 1]);
  Mask r;
  if constexpr (std::is_same_v<T, float>) {
    float fa[LANES], fb[LANES];
    if (i.c == 1) {
      for (int l = 0; l < LANES; ++l) fa[l] = flush(a[l]), fb[l] = flush(b[l]);
      a = fa, b = fb;
    } else if (i.c == 2 || i.c == 3) {
      const u16 *ha = w.reg<u16>(i.op[s]), *hb = w.reg<u16>(i.op[s + 1]);
      for (int l = 0; l < LANES; ++l) {
        fa[l] = i.c == 2 ? from_f16(ha[l]) : from_bf16(ha[l]);
        fb[l] = i.c == 2 ? from_f16(hb[l]) : from_bf16(hb[l]);
      }
      a = fa, b = fb;
    }
    r = compare<float, C>(a, b);
  } else {
    r = compare<T, C>(a, b);
  }
  Mask no = ~r;
  if (i.a) {
    Mask p = w.predicate(i.op[s + 2]);
    r = i.a == 1 ? r & p : i.a == 2 ? r | p : r ^ p;
    no = i.a == 1 ? no & p : i.a == 2 ? no | p : no ^ p;
  }
  w.set_predicate(i.op[0], r, m);
  if (i.b) w.set_predicate(i.op[1], no, m);
}
template <class T>
Run compare_run(Compare c) {
  switch (c) {
    case EQ: return setp_lanes<T, EQ>;
    case NE: return setp_lanes<T, NE>;
    case LT: return setp_lanes<T, LT>;
    case LE: return setp_lanes<T, LE>;
    case GT: return setp_lanes<T, GT>;
    case GE: return setp_lanes<T, GE>;
    default: break;
  }
  if constexpr (std::is_floating_point_v<T>) switch (c) {
    case EQU: return setp_lanes<T, EQU>;
    case NEU: return setp_lanes<T, NEU>;
    case LTU: return setp_lanes<T, LTU>;
    case LEU: return setp_lanes<T, LEU>;
    case GTU: return setp_lanes<T, GTU>;
    case GEU: return setp_lanes<T, GEU>;
    case NUM: return setp_lanes<T, NUM>;
    case NAN_: return setp_lanes<T, NAN_>;
    default: break;
  }
  return nullptr;
}
void setp(Line& l, Inst& inst) {
  inst.kind = PREDICATE;
  static const std::pair<const char*, Compare> names[] = {{"eq", EQ}, {"ne", NE}, {"lt", LT}, {"le", LE}, {"gt", GT}, {"ge", GE}, {"equ", EQU}, {"neu", NEU}, {"ltu", LTU}, {"leu", LEU}, {"gtu", GTU}, {"geu", GEU}, {"num", NUM}, {"nan", NAN_}, {"lo", LT}, {"ls", LE}, {"hi", GT}, {"hs", GE}};
  Type t = l.take_type();
  Compare c = EQ;
  bool known = false;
  for (auto& [name, value] : names)
    if (!known && l.take(name)) c = value, known = true;
  if (!known) l.fail("unknown comparison");
  const char* combine[] = {"", "and", "or", "xor"};
  for (u32 k = 1; k < 4; ++k)
    if (l.take(combine[k])) inst.a = k;
  l.want(inst.a ? 4 : 3);
  if (l.take("ftz")) inst.c = 1;
  for (auto& p : l.operands[0].items) l.push_predicate(p);
  inst.b = l.operands[0].items.size() == 2;
  l.push(l.operands[1].items[0], t.bytes());
  l.push(l.operands[2].items[0], t.bytes());
  if (inst.a) l.push_predicate(l.operands[3].text);
  bool s = t.kind == 's';
  if (t.lanes != 1) l.fail("unknown variant");
  if (t.is_float() && t.bits == 16) inst.c = t.kind == 'f' ? 2 : 3;
  if (t.is_float()) inst.run = t.bits == 64 ? compare_run<double>(c) : compare_run<float>(c);
  else if (t.bits == 16) inst.run = s ? compare_run<i16>(c) : compare_run<u16>(c);
  else if (t.bits == 32) inst.run = s ? compare_run<i32>(c) : compare_run<u32>(c);
  else if (t.bits == 64) inst.run = s ? compare_run<i64>(c) : compare_run<u64>(c);
}

template <class T>
void selp_lanes(Warp& w, const Inst& i, Mask m) {
  const T *a = w.reg<T>(i.op[1]), *b = w.reg<T>(i.op[2]);
  Mask p = w.predicate(i.op[3]);
  T out[LANES];
  for (int l = 0; l < LANES; ++l) out[l] = p >> l & 1 ? a[l] : b[l];
  put(w.reg<T>(i.op[0]), out, m);
}
void selp(Line& l, Inst& inst) {
  inst.kind = MOVE;
  Type t = l.take_type();
  l.want(4);
  for (int k = 0; k < 3; ++k) l.push(l.operands[k].items[0], t.bytes());
  l.push_predicate(l.operands[3].text);
  inst.run = t.bits == 16 ? selp_lanes<u16> : t.bits == 32 ? selp_lanes<u32> : selp_lanes<u64>;
}

}  // namespace

const Family& arithmetic_family() {
  static const Family family{{
      {"add", add_like},
      {"sub", add_like},
      {"mul", mul},
      {"mad", mad},
      {"fma", fma_},
      {"div", div_rem},
      {"rem", div_rem},
      {"min", min_max},
      {"max", min_max},
      {"neg", negate_abs},
      {"abs", negate_abs},
      {"rcp", approximate<[](auto a) { return decltype(a)(1) / a; }>},
      {"sqrt", approximate<[](auto a) { return std::sqrt(a); }>},
      {"rsqrt", approximate<[](auto a) { return decltype(a)(1 / std::sqrt(double(a))); }>},
      {"copysign", copysign},
      {"ex2", approximate<[](auto a) { return std::exp2(a); }>},
      {"lg2", approximate<[](auto a) { return std::log2(a); }>},
      {"sin", approximate<[](auto a) { return std::sin(a); }>},
      {"cos", approximate<[](auto a) { return std::cos(a); }>},
      {"tanh", approximate<[](auto a) { return std::tanh(a); }>},
      {"and", logic},
      {"or", logic},
      {"xor", logic},
      {"not", logic},
      {"cnot", logic},
      {"shl", shift},
      {"shr", shift},
      {"shf", funnel},
      {"bfe", bfe},
      {"bfi", bfi},
      {"popc", count_bits},
      {"clz", count_bits},
      {"bfind", count_bits},
      {"brev", count_bits},
      {"prmt", prmt},
      {"lop3", lop3},
      {"dp4a", dp4a},
      {"setp", setp},
      {"selp", selp},
  }};
  return family;
}

}  // namespace ptx
