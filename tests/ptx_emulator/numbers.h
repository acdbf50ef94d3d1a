// Number formats that the host lacks: float16, bfloat16, e4m3, e5m2, tf32. Conversions round to nearest even unless they say otherwise.
#pragma once

#include <cmath>
#include <type_traits>

#include "state.h"

namespace ptx {

inline float bits_float(u32 b) {
  float f;
  std::memcpy(&f, &b, 4);
  return f;
}
inline u32 float_bits(float f) {
  u32 b;
  std::memcpy(&b, &f, 4);
  return b;
}

inline float from_bf16(u16 h) { return bits_float(u32(h) << 16); }
inline float from_f16(u16 h) {
  u32 sign = u32(h & 0x8000) << 16, magnitude = h & 0x7fff;
  // Scaling by 2^112 moves the exponent; subnormals become normal floats.
  float f = bits_float(magnitude << 13) * 0x1p112f;
  u32 b = float_bits(f);
  if (magnitude >= 0x7c00) b = 0x7f800000 | (magnitude & 0x3ff) << 13;
  return bits_float(sign | b);
}

enum class Round : u8 { nearest, zero, down, up, nearest_away };

// |value| as an integer multiple of 2^-shift ... rounds `magnitude` (a fixed-point number whose low `drop` bits go).
inline u64 drop_bits(u64 magnitude, u32 drop, bool negative, Round how) {
  if (drop == 0) return magnitude;
  if (drop > 63) return how == (negative ? Round::down : Round::up) && magnitude ? 1 : 0;
  u64 kept = magnitude >> drop, rest = magnitude & ((1ull << drop) - 1), half = 1ull << (drop - 1);
  switch (how) {
    case Round::nearest: return kept + (rest > half || (rest == half && (kept & 1)));
    case Round::nearest_away: return kept + (rest >= half);
    case Round::zero: return kept;
    case Round::down: return kept + (negative && rest);
    default: return kept + (!negative && rest);
  }
}

// A float to a small format of `exponent` and `mantissa` bits, without its infinities: overflow gives a magnitude beyond the format's.
inline u32 to_small(float value, u32 exponent, u32 mantissa, Round how) {
  u32 b = float_bits(value);
  bool negative = b >> 31;
  int bias = (1 << (exponent - 1)) - 1;
  int e = int(b >> 23 & 0xff) - 127;
  u64 m = b & 0x7fffff;
  if (e == -127) e = -126;  // subnormal
  else m |= 0x800000;
  int least = 1 - bias;                                   // exponent of the smallest normal number
  int drop = 23 - int(mantissa) + (e < least ? least - e : 0);
  u64 kept = drop_bits(m, drop, negative, how);
  // Normal: the hidden bit carries into the exponent field by itself.
  u32 field = e < least ? 0 : u32(e + bias - 1);
  return u32((u64(field) << mantissa) + kept);
}

inline u16 to_f16(float value, Round how = Round::nearest) {
  u32 b = float_bits(value);
  u16 sign = u16(b >> 16 & 0x8000);
  if ((b & 0x7fffffff) > 0x7f800000) return 0x7fff;  // the canonical NaN of PTX
  if ((b & 0x7fffffff) == 0x7f800000) return sign | 0x7c00;
  u32 magnitude = to_small(value, 5, 10, how);
  if (magnitude >= 0x7c00) {
    bool inf = how == Round::nearest || how == Round::nearest_away || (how == Round::up && !sign) || (how == Round::down && sign);
    magnitude = inf ? 0x7c00 : 0x7bff;
  }
  return sign | u16(magnitude);
}
inline u16 to_bf16(float value, Round how = Round::nearest) {
  u32 b = float_bits(value);
  if ((b & 0x7fffffff) > 0x7f800000) return 0x7fff;
  if (how == Round::nearest) return u16((b + 0x7fff + (b >> 16 & 1)) >> 16);
  bool negative = b >> 31;
  u16 sign = u16(b >> 16 & 0x8000);
  if ((b & 0x7fffffff) == 0x7f800000) return u16(b >> 16);
  u32 magnitude = u32(drop_bits(b & 0x7fffffff, 16, negative, how));
  if (magnitude >= 0x7f80 && !(how == Round::nearest_away || how == (negative ? Round::down : Round::up))) magnitude = 0x7f7f;
  return sign | u16(magnitude);
}
inline float from_e4m3(u8 v) {
  u32 e = v >> 3 & 15, m = v & 7;
  float f = e == 15 && m == 7 ? NAN : e ? std::ldexp(float(8 + m), int(e) - 10) : std::ldexp(float(m), -9);
  return v & 0x80 ? -f : f;
}
inline float from_e5m2(u8 v) { return from_f16(u16(v) << 8); }
inline u8 to_e4m3(float value) {  // .satfinite: beyond the largest number becomes the largest number
  u8 sign = u8(float_bits(value) >> 24 & 0x80);
  if (std::isnan(value)) return 0x7f;
  u32 magnitude = std::isinf(value) ? 0x7f : to_small(value, 4, 3, Round::nearest);
  return sign | u8(magnitude > 0x7e ? 0x7e : magnitude);
}
inline u8 to_e5m2(float value) {
  u8 sign = u8(float_bits(value) >> 24 & 0x80);
  if (std::isnan(value)) return 0x7f;
  u32 magnitude = std::isinf(value) ? 0x7f : to_small(value, 5, 2, Round::nearest);
  return sign | u8(magnitude > 0x7b ? 0x7b : magnitude);
}
inline u32 to_tf32(float value, Round how) {
  u32 b = float_bits(value);
  if ((b & 0x7fffffff) >= 0x7f800000) return b;
  u32 magnitude = u32(drop_bits(b & 0x7fffffff, 13, b >> 31, how)) << 13;
  return (b & 0x80000000) | magnitude;
}

inline float flush(float f) {
  u32 b = float_bits(f);
  return (b & 0x7f800000) == 0 ? bits_float(b & 0x80000000) : f;
}

// c[n][m] += sum over k of a[k][m] * b[n][k], k rising, for eight n and sixteen m: what mma and wgmma are made of. Products of the formats
// of tensor cores are exact in float, so that contraction changes nothing but the time it takes.
typedef float Column __attribute__((vector_size(64)));
typedef i32 IntColumn __attribute__((vector_size(64)));
template <class T>
using ColumnOf = std::conditional_t<std::is_same_v<T, float>, Column, IntColumn>;

template <class T>
#if defined(__GNUC__) && !defined(__clang__)
__attribute__((noinline, optimize("fp-contract=fast")))
#endif
inline void add_product(const T (*a)[16], const T (*b)[32], T (*c)[16], int k) {
  ColumnOf<T> sum[8];
  for (int n = 0; n < 8; ++n) sum[n] = *reinterpret_cast<const ColumnOf<T>*>(c[n]);
  for (int i = 0; i < k; ++i) {
    const ColumnOf<T> column = *reinterpret_cast<const ColumnOf<T>*>(a[i]);
#pragma GCC unroll 8
    for (int n = 0; n < 8; ++n) sum[n] += column * b[n][i];
  }
  for (int n = 0; n < 8; ++n) *reinterpret_cast<ColumnOf<T>*>(c[n]) = sum[n];
}

}  // namespace ptx
