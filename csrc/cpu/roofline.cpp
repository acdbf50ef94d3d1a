// What one thread of this processor can do at best, for the roofline that benchmarks are held against: multiply-adds on registers alone,
// and bytes read in order from memory.
#include "roofline.h"

#include <chrono>
#include <string>

#include "target.h"

#if SPARSE_PRUNE_X86
#include <immintrin.h>
#endif

namespace sparse_prune {
namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// The best of several short runs, each of `flops_per_call` times some calls: a run that was interrupted does not count.
template <class Body>
double best_rate(double work_per_call, const Body& body) {
  double best = 0;
  const double end = now() + 0.05;
  for (int run = 0; run < 5 || now() < end; ++run) {
    const double start = now();
    body();
    const double rate = work_per_call / (now() - start);
    best = rate > best ? rate : best;
  }
  return best;
}

// 14 sums are more than any processor has multiply-adds under way (2 pipes of 4 to 6 cycles), and with a and b fill 16 registers.
// The empty assembly makes each sum look used and changed, so that the compiler can neither drop nor merge the work.
constexpr int64_t kSums = 14, kRounds = 20000;

#define SPARSE_PRUNE_PEAK(name, attributes, V, constraint, zero, multiply_add)                                      \
  attributes void name() {                                                                                          \
    V a = zero, b = zero, s0 = zero, s1 = zero, s2 = zero, s3 = zero, s4 = zero, s5 = zero, s6 = zero, s7 = zero,   \
      s8 = zero, s9 = zero, s10 = zero, s11 = zero, s12 = zero, s13 = zero;                                         \
    for (int64_t i = 0; i < kRounds; ++i) {                                                                         \
      __asm__ volatile("" : "+" constraint(a), "+" constraint(b));                                                  \
      s0 = multiply_add(s0), s1 = multiply_add(s1), s2 = multiply_add(s2), s3 = multiply_add(s3);                   \
      s4 = multiply_add(s4), s5 = multiply_add(s5), s6 = multiply_add(s6), s7 = multiply_add(s7);                   \
      s8 = multiply_add(s8), s9 = multiply_add(s9), s10 = multiply_add(s10), s11 = multiply_add(s11);               \
      s12 = multiply_add(s12), s13 = multiply_add(s13);                                                             \
      __asm__ volatile("" : "+" constraint(s0), "+" constraint(s1), "+" constraint(s2), "+" constraint(s3),         \
                            "+" constraint(s4), "+" constraint(s5), "+" constraint(s6), "+" constraint(s7),         \
                            "+" constraint(s8), "+" constraint(s9), "+" constraint(s10), "+" constraint(s11),       \
                            "+" constraint(s12), "+" constraint(s13));                                              \
    }                                                                                                               \
  }

typedef float Float4 __attribute__((vector_size(16)));
#if SPARSE_PRUNE_X86
#define SPARSE_PRUNE_MUL_ADD(s) (s + a * b)
SPARSE_PRUNE_PEAK(portable_peak, , Float4, "x", (Float4{}), SPARSE_PRUNE_MUL_ADD)
#define SPARSE_PRUNE_FMA256(s) _mm256_fmadd_ps(a, b, s)
SPARSE_PRUNE_PEAK(avx2_peak, __attribute__((target("avx2,fma"))), __m256, "x", _mm256_setzero_ps(), SPARSE_PRUNE_FMA256)
#define SPARSE_PRUNE_FMA512(s) _mm512_fmadd_ps(a, b, s)
SPARSE_PRUNE_PEAK(avx512_peak, __attribute__((target("avx512f"))), __m512, "v", _mm512_setzero_ps(), SPARSE_PRUNE_FMA512)
#define SPARSE_PRUNE_DPBF16(s) _mm512_dpbf16_ps(s, (__m512bh)a, (__m512bh)b)
SPARSE_PRUNE_PEAK(bf16_peak, __attribute__((target("avx512f,avx512bf16"))), __m512, "v", _mm512_setzero_ps(), SPARSE_PRUNE_DPBF16)
#define SPARSE_PRUNE_DPBUSD(s) _mm512_dpbusd_epi32(s, a, b)
SPARSE_PRUNE_PEAK(vnni_peak, __attribute__((target("avx512f,avx512vnni"))), __m512i, "v", _mm512_setzero_si512(),
                  SPARSE_PRUNE_DPBUSD)

// Four sums of 16 x 16 by two tiles of each factor. The numbers are not 0: on zeros tiles keep a clock that they do not have at work.
constexpr int64_t kTileProducts = 4;
#define SPARSE_PRUNE_TILE_PEAK(name, product)                                                                        \
  void name() {                                                                                                      \
    uint8_t config[64] = {1}; /* palette 1; bytes in a row from 16 on, rows from 48 on */                            \
    for (int t = 0; t < 8; ++t) config[16 + 2 * t] = 64, config[48 + t] = 16;                                        \
    uint16_t numbers[16 * 32];                                                                                       \
    for (int i = 0; i < 16 * 32; ++i) numbers[i] = static_cast<uint16_t>(0x3f80 + i % 97); /* bf16 from 1 to 1.75 */ \
    __asm__ volatile(                                                                                                \
        "ldtilecfg %0\n tilezero %%tmm0\n tilezero %%tmm1\n tilezero %%tmm2\n tilezero %%tmm3\n"                    \
        "tileloadd (%1,%2), %%tmm4\n tileloadd (%1,%2), %%tmm5\n"                                                    \
        "tileloadd (%1,%2), %%tmm6\n tileloadd (%1,%2), %%tmm7"                                                      \
        :                                                                                                            \
        : "m"(config), "r"(numbers), "r"(int64_t{64})                                                                \
        : "memory");                                                                                                 \
    for (int64_t i = 0; i < kRounds; ++i)                                                                            \
      __asm__ volatile(product " %tmm6, %tmm4, %tmm0\n" product " %tmm7, %tmm4, %tmm1\n"                             \
                       product " %tmm6, %tmm5, %tmm2\n" product " %tmm7, %tmm5, %tmm3");                             \
    __asm__ volatile("tilerelease");                                                                                 \
  }
SPARSE_PRUNE_TILE_PEAK(amx_bf16_peak, "tdpbf16ps")
SPARSE_PRUNE_TILE_PEAK(amx_int8_peak, "tdpbusd")
#else
void portable_peak() {
  volatile float sink;
  Float4 sum[kSums] = {}, a = {}, b = {};
  for (int64_t i = 0; i < kRounds; ++i)
    for (auto& s : sum) s += a * b;
  sink = sum[0][0];
  (void)sink;
}
#endif

void read_words(const uint64_t* words, int64_t count) {
  uint64_t sum[8] = {};
  for (int64_t i = 0; i < count; i += 8)
    for (int j = 0; j < 8; ++j) sum[j] += words[i + j];
  for (uint64_t s : sum) __asm__ volatile("" : : "r"(s));
}

#if SPARSE_PRUNE_X86
__attribute__((target("avx2"))) void read_avx2(const uint64_t* words, int64_t count) {
  __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
  const auto* from = reinterpret_cast<const __m256i*>(words);
  int64_t i = 0;
  for (; i + 4 <= count / 4; i += 4) {
    a = _mm256_or_si256(a, _mm256_loadu_si256(from + i));
    b = _mm256_or_si256(b, _mm256_loadu_si256(from + i + 1));
    c = _mm256_or_si256(c, _mm256_loadu_si256(from + i + 2));
    d = _mm256_or_si256(d, _mm256_loadu_si256(from + i + 3));
  }
  __asm__ volatile("" : : "x"(_mm256_or_si256(_mm256_or_si256(a, b), _mm256_or_si256(c, d))));
}
#endif

}  // namespace

double peak_flops(const std::string& isa) {
  // kSums multiplies and adds per round
  constexpr double kCalls = 2.0 * kSums * kRounds;
#if SPARSE_PRUNE_X86
  constexpr double kTiles = 2.0 * kTileProducts * kRounds * 16 * 16;
  if (isa == "amx_int8") return best_rate(kTiles * 64, amx_int8_peak);
  if (isa == "amx_bf16") return best_rate(kTiles * 32, amx_bf16_peak);
  if (isa == "avx512_vnni") return best_rate(kCalls * 64, vnni_peak);
  if (isa == "avx512_bf16") return best_rate(kCalls * 32, bf16_peak);
  if (isa == "avx512") return best_rate(kCalls * 16, avx512_peak);
  if (isa == "avx2") return best_rate(kCalls * 8, avx2_peak);
#endif
  return isa == "portable" ? best_rate(kCalls * 4, portable_peak) : 0;
}

double read_bytes_per_second(const std::string& isa, const void* data, int64_t bytes) {
  const auto* words = static_cast<const uint64_t*>(data);
  const int64_t count = bytes / 64 * 8;
#if SPARSE_PRUNE_X86
  if (isa != "portable") return best_rate(static_cast<double>(count) * 8, [=] { read_avx2(words, count); });
#endif
  return best_rate(static_cast<double>(count) * 8, [=] { read_words(words, count); });
}

}  // namespace sparse_prune
