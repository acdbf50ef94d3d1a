// The kernels for any processor: vectors of the compiler's own, 16 bytes wide, which SSE2 and NEON both have.
#include "encoder.h"
#include "int8.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

namespace sparse_prune {
namespace {

template <class T>
T activate_one(T z, Activation activation) {
  switch (activation) {
    case Activation::relu:
      return z < 0 ? T(0) : z;
    case Activation::gelu:
      return z * T(0.5) * std::erfc(-z * T(0.70710678118654752440));
    case Activation::gelu_tanh:
      return z / (1 + std::exp(T(-2 * 0.79788456080286535588) * (z + T(0.044715) * z * z * z)));
    case Activation::silu:
      return z / (1 + std::exp(-z));
    default:
      return z;
  }
}

float float_of_bits(uint32_t bits) {
  float v;
  memcpy(&v, &bits, sizeof v);
  return v;
}

uint32_t bits_of_float(float v) {
  uint32_t bits;
  memcpy(&bits, &v, sizeof bits);
  return bits;
}

float float_of_half(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, magnitude = h & 0x7fff;
  if (magnitude >= 0x7c00) return float_of_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);  // infinity, NaN
  // Exponents differ by 112; multiplying by 2^112 also places subnormal halves exactly.
  return float_of_bits(sign | bits_of_float(float_of_bits(magnitude << 13) * float_of_bits(239u << 23)));
}

uint16_t half_of_float(float v) {  // round to nearest even
  const uint32_t bits = bits_of_float(v), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);   // NaN
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and above round to infinity
  if (magnitude < 0x38800000) {  // subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits
    return static_cast<uint16_t>(sign | (bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000));
  }
  return static_cast<uint16_t>(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

uint16_t bf16_of_float(float v) {  // round to nearest even; NaN stays a quiet NaN
  const uint32_t bits = bits_of_float(v);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <class T>
struct Lanes {
  using Elem = T;
  typedef T F __attribute__((vector_size(16)));
  static constexpr int W = 16 / sizeof(T), registers = 16, bf16_per_lane = 0;
  static inline F zero() { return F{}; }
  static inline F set1(T v) { return F{} + v; }
  static inline F load(const T* p) {
    F v;
    memcpy(&v, p, sizeof v);
    return v;
  }
  static inline void store(T* p, F v) { memcpy(p, &v, sizeof v); }
  static inline void stream(T* p, F v) { store(p, v); }
  static inline void fence() {}
  static inline F add(F a, F b) { return a + b; }
  static inline F fma(F a, F b, F c) {
#if defined(__FP_FAST_FMAF) && defined(__FP_FAST_FMA)
    for (int j = 0; j < W; ++j) c[j] = std::fma(a[j], b[j], c[j]);
    return c;
#else
    return a * b + c;
#endif
  }
  static inline F load_bf16(const uint16_t* p) {
    F v;
    for (int j = 0; j < W; ++j) v[j] = float_of_bits(static_cast<uint32_t>(p[j]) << 16);
    return v;
  }
  static inline void store_bf16(uint16_t* p, F v) {
    for (int j = 0; j < W; ++j) p[j] = bf16_of_float(v[j]);
  }
  static inline F load_f16(const uint16_t* p) {
    F v;
    for (int j = 0; j < W; ++j) v[j] = float_of_half(p[j]);
    return v;
  }
  static inline void store_f16(uint16_t* p, F v) {
    for (int j = 0; j < W; ++j) p[j] = half_of_float(v[j]);
  }
  static inline void bf16_pairs(const uint16_t* p, F& first, F& second) {
    for (int j = 0; j < W; ++j) {
      first[j] = float_of_bits(static_cast<uint32_t>(p[2 * j]) << 16);
      second[j] = float_of_bits(static_cast<uint32_t>(p[2 * j + 1]) << 16);
    }
  }
  static inline F sub(F a, F b) { return a - b; }
  static inline F mul(F a, F b) { return a * b; }
  static inline F min(F a, F b) { return a < b ? a : b; }  // a NaN in b stays
  static inline F max(F a, F b) { return a > b ? a : b; }  // a NaN in b stays
  static inline T sum(F v) {
    T total = v[0];
    for (int j = 1; j < W; ++j) total += v[j];
    return total;
  }
  // to[c][r] = from[r][c], W x W of T; rows of from are `apart` bytes from each other, those of to ldto elements.
  static inline void transpose(const void* from, int64_t apart, void* to, int64_t ldto) {
    for (int r = 0; r < W; ++r) {
      const F v = load(reinterpret_cast<const T*>(static_cast<const char*>(from) + r * apart));
      for (int c = 0; c < W; ++c) static_cast<T*>(to)[c * ldto + r] = v[c];
    }
  }
  static inline F exp2_nonpositive(F v) {
    for (int j = 0; j < W; ++j) v[j] = std::exp2(v[j]);
    return v;
  }
  static inline F activate(F v, Activation activation) {
    if (activation != Activation::none)
      for (int j = 0; j < W; ++j) v[j] = activate_one<T>(v[j], activation);
    return v;
  }
  static inline F activate_to_bf16(F v, Activation activation) { return activate(v, activation); }
};

#include "tile_kernel.h"
#include "encoder_kernel.h"
#include "int8_tile.h"

struct LanesInt8 : Lanes<float> {
  static inline F mul(F a, F b) { return a * b; }
  static inline F from_int32(const int32_t* p) {
    F v;
    for (int j = 0; j < W; ++j) v[j] = static_cast<float>(p[j]);
    return v;
  }
  static inline void store_quantized(uint8_t* p, const F (&v)[4]) {
    for (int j = 0; j < 4 * W; ++j) {
      const float one = v[j / W][j % W], near = one < -127 ? -127 : (one > 127 ? 127 : one);
      p[j] = static_cast<uint8_t>(std::lrintf(near) + 128);
    }
  }
};

struct PlainDot {
  using Vec = LanesInt8;
  typedef int32_t I __attribute__((vector_size(16)));
  struct B {
    int32_t x[kInt8Step];
  };
  static constexpr bool uses_offsets = false;
  static constexpr int spare = 6;
  static inline I zero() { return I{}; }
  static inline I load(const int32_t* p) {
    I v;
    memcpy(&v, p, sizeof v);
    return v;
  }
  static inline void store(int32_t* p, I v) { memcpy(p, &v, sizeof v); }
  static inline I add(I a, I b) { return a + b; }
  static inline Vec::F to_float(I v) { return __builtin_convertvector(v, Vec::F); }
  static inline I weights(const int8_t* w) {
    I v;
    memcpy(&v, w, sizeof v);
    return v;
  }
  static inline B broadcast(const uint8_t* x) {
    B group;
    for (int j = 0; j < kInt8Step; ++j) group.x[j] = x[j] - 128;
    return group;
  }
  static inline I dot(I acc, const B& x, I w) {  // byte j of each lane, its sign spread by two shifts
    for (int j = 0; j < kInt8Step; ++j) acc += (I)((I)(w << (24 - 8 * j)) >> 24) * x.x[j];
    return acc;
  }
};

}  // namespace

const Int8Kernels* portable_int8_kernels() {
  static const Int8Kernels kernels = {"portable", quantize_rows<LanesInt8>, int8_range<PlainDot>};
  return &kernels;
}

const Kernels* portable_kernels() {
  static const Kernels kernels = {"portable", false, linear_any<Lanes<float>>, sdd_any<Lanes<float>>,
                                  panels_any<Lanes<float>>};
  return &kernels;
}

const Kernels* portable_f64_kernels() {
  static const Kernels kernels = {"portable", false, linear_plain<Lanes<double>>, sdd_range<Plain<Lanes<double>>, Plain<Lanes<double>>>,
                                  panels_of<Plain<Lanes<double>>>};
  return &kernels;
}

const EncoderKernels* portable_encoder() {
  static const EncoderKernels kernels = {attention_any<Lanes<float>>, layer_norm_any<Lanes<float>>};
  return &kernels;
}

const EncoderKernels* portable_f64_encoder() {
  static const EncoderKernels kernels = {attention_of<Plain<Lanes<double>>, Plain<Lanes<double>>>, layer_norm_of<Plain<Lanes<double>>>};
  return &kernels;
}

}  // namespace sparse_prune
