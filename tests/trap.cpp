// Carries out the AMX and AVX512-BF16 instructions of the kernels on processors that lack them, so that tests run their machine code: a
// SIGILL handler decodes the instruction at which the thread stopped, does to the thread's state what Intel's Software Developer's Manual
// says, and goes on behind it. Where the processor has an instruction, the processor runs it and nothing comes here.
//
// What it does not know (other instructions, 128 and 256 bits, masks) goes to the handler that was there before. What a processor would
// refuse with #UD or #GP ends the process with a message. Compiled for AVX2 and FMA.
#include <cpuid.h>
#include <immintrin.h>
#include <signal.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

extern "C" {
int64_t trapped[2];  // instructions carried out here: on tiles, on vectors
}

namespace {

[[noreturn]] void refuse(const char* instruction, const char* why) {
  fprintf(stderr, "trap.cpp: a processor would refuse this %s: %s\n", instruction, why);
  abort();
}

// Tiles live here, all other registers in the frame that Linux made for the signal.

struct TileConfig {  // as ldtilecfg reads it
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[8], reserved_row_bytes[8];
  uint8_t rows[8], reserved_rows[8];
};
static_assert(sizeof(TileConfig) == 64);

thread_local struct {
  TileConfig config;           // palette 0: not configured
  uint32_t data[8][16][16];    // [tile][row][4 bytes]; 0 outside of a tile's rows and bytes
} tiles;

struct Vector {
  uint32_t lane[16];
};

constexpr int kXmm = 160, kFeatures = 512;     // in the legacy area; XSTATE_BV, which says what the frame holds
int ymm_high, zmm_high, zmm_upper;             // bits 128..255, bits 256..511, and registers 16..31: where CPUID says

// A component that the frame lacks has its initial value, 0; from here on the frame holds it.
void complete(unsigned char* xsave) {
  uint64_t has;
  memcpy(&has, xsave + kFeatures, sizeof has);
  const struct { int bit, at, bytes; } parts[] = {{1, kXmm, 256}, {2, ymm_high, 256}, {6, zmm_high, 512}, {7, zmm_upper, 1024}};
  for (const auto& part : parts) {
    if (!(has >> part.bit & 1)) memset(xsave + part.at, 0, part.bytes);
    has |= uint64_t{1} << part.bit;
  }
  memcpy(xsave + kFeatures, &has, sizeof has);
}

// Calls piece(where in the frame, where in the vector, bytes) for each piece of a register.
template <class Piece>
void pieces_of(unsigned char* xsave, int number, Vector& v, const Piece& piece) {
  auto* bytes = reinterpret_cast<unsigned char*>(v.lane);
  if (number >= 16) return piece(xsave + zmm_upper + 64 * (number - 16), bytes, 64);
  piece(xsave + kXmm + 16 * number, bytes, 16);
  piece(xsave + ymm_high + 16 * number, bytes + 16, 16);
  piece(xsave + zmm_high + 32 * number, bytes + 32, 32);
}

Vector read_register(unsigned char* xsave, int number) {
  Vector v;
  pieces_of(xsave, number, v, [](const unsigned char* frame, unsigned char* bytes, int count) { memcpy(bytes, frame, count); });
  return v;
}

void write_register(unsigned char* xsave, int number, Vector v) {
  pieces_of(xsave, number, v, [](unsigned char* frame, const unsigned char* bytes, int count) { memcpy(frame, bytes, count); });
}

constexpr int vex(int pp, int opcode) { return pp << 8 | opcode; }  // pp: 0 none, 1 66, 2 F3, 3 F2
constexpr int evex(int pp, int opcode) { return 1 << 10 | vex(pp, opcode); }

struct Instruction {
  int code;                  // vex(...) or evex(...)
  int reg, rm, second;       // registers: ModRM.reg, ModRM.rm where it is one, vvvv
  bool memory, broadcast;
  bool sib;                  // base and index are separate operands, as tile loads want
  char* base;                // with displacement
  int64_t index;             // scaled
  int64_t length;
};

int64_t general(const ucontext_t& context, int number) {
  constexpr int order[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                             REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  return context.uc_mcontext.gregs[order[number]];
}

// False for what is neither VEX.128 nor unmasked EVEX.512 of opcode map 0F38 with W = 0. Prefixes hold register bits inverted.
bool decode(const ucontext_t& context, Instruction& in) {
  const auto* start = reinterpret_cast<const unsigned char*>(context.uc_mcontext.gregs[REG_RIP]);
  const unsigned char *p = start, first = *p++;
  if (first != 0xc4 && first != 0x62) return false;
  const bool wide = first == 0x62;
  const int p0 = *p++, p1 = *p++, p2 = wide ? *p++ : 0x08;
  if ((p0 & (wide ? 0x0f : 0x1f)) != 2 || (p1 & 0x80)) return false;
  if (wide ? !(p1 & 4) || (p2 & 0xe7) != 0x40 : p1 & 4) return false;  // a bit that is 1, 512 bits, no mask; or 128 bits
  in.broadcast = wide && (p2 & 0x10);
  in.code = (wide ? evex(0, 0) : 0) | vex(p1 & 3, *p++);
  const int modrm = *p++, mod = modrm >> 6;
  const int x = ~p0 >> 6 & 1, b = ~p0 >> 5 & 1;
  in.reg = (modrm >> 3 & 7) | (~p0 >> 7 & 1) << 3 | (wide ? ~p0 >> 4 & 1 : 0) << 4;
  in.second = (~p1 >> 3 & 15) | (~p2 >> 3 & 1) << 4;
  in.memory = mod != 3;
  in.sib = in.memory && (modrm & 7) == 4;
  in.rm = (modrm & 7) | b << 3 | (wide ? x : 0) << 4;
  in.base = nullptr;
  in.index = 0;
  if (in.memory) {
    int base = (modrm & 7) | b << 3;
    if (in.sib) {
      const int sib = *p++, index = (sib >> 3 & 7) | x << 3;
      base = (sib & 7) | b << 3;
      if (index != 4) in.index = general(context, index) << (sib >> 6);
    }
    const bool no_base = mod == 0 && (base & 7) == 5;
    int64_t address = no_base ? 0 : general(context, base);
    if (mod == 1) address += static_cast<int8_t>(*p++) * (!wide ? 1 : in.broadcast ? 4 : 64);
    if (mod == 2 || no_base) {
      int32_t displacement;
      memcpy(&displacement, p, 4);
      p += 4;
      address += displacement;
    }
    if (no_base && !in.sib) address += reinterpret_cast<int64_t>(p);  // RIP is behind the instruction, which has no immediate
    in.base = reinterpret_cast<char*>(address);
  }
  in.length = p - start;
  return true;
}

void ldtilecfg(const char* from) {
  TileConfig c;
  memcpy(&c, from, sizeof c);
  const auto nonzero = [](const auto& values) { return std::ranges::any_of(values, [](int v) { return v != 0; }); };
  if (c.palette > 1) refuse("ldtilecfg", "palette is neither 0 nor 1");
  if (c.palette == 1) {
    if (nonzero(c.reserved) || nonzero(c.reserved_row_bytes) || nonzero(c.reserved_rows)) refuse("ldtilecfg", "reserved bytes are not 0");
    if (c.start_row) {  // a processor takes it, and goes on with a load that was interrupted there; the kernels never set it
      fprintf(stderr, "trap.cpp: ldtilecfg with a start_row is not carried out\n");
      abort();
    }
    for (int t = 0; t < 8; ++t) {
      if (c.rows[t] > 16 || c.row_bytes[t] > 64) refuse("ldtilecfg", "a tile has more than 16 rows or 64 bytes in a row");
      if (!c.rows[t] != !c.row_bytes[t]) refuse("ldtilecfg", "a tile has rows without bytes or bytes without rows");
    }
  }
  tiles = {};
  if (c.palette == 1) tiles.config = c;
}

void sttilecfg(char* to) { memcpy(to, &tiles.config, sizeof tiles.config); }

void check_tile(const char* instruction, int t) {
  if (tiles.config.palette == 0) refuse(instruction, "tiles are not configured");
  if (tiles.config.rows[t] == 0) refuse(instruction, "its tile has no rows");
  if (tiles.config.row_bytes[t] % 4) refuse(instruction, "its tile's rows are not whole groups of 4 bytes");
}

void tilezero(int t) {
  check_tile("tilezero", t);
  memset(tiles.data[t], 0, sizeof tiles.data[t]);
}

void tileloadd(int t, const char* from, int64_t stride) {
  check_tile("tileloadd", t);
  memset(tiles.data[t], 0, sizeof tiles.data[t]);
  for (int r = 0; r < tiles.config.rows[t]; ++r) memcpy(tiles.data[t][r], from + r * stride, tiles.config.row_bytes[t]);
}

void tilestored(int t, char* to, int64_t stride) {
  check_tile("tilestored", t);
  for (int r = 0; r < tiles.config.rows[t]; ++r) memcpy(to + r * stride, tiles.data[t][r], tiles.config.row_bytes[t]);
}

// c[m][n] += a[m][k] * b[k][n]
struct Shape {
  int m, n, k;
};
Shape shape_of_product(const char* instruction, int c, int a, int b) {
  for (int t : {c, a, b}) check_tile(instruction, t);
  const TileConfig& now = tiles.config;
  if (c == a || c == b || a == b) refuse(instruction, "a tile is two of its operands");
  if (now.rows[c] != now.rows[a]) refuse(instruction, "sums and first factor differ in rows");
  if (now.row_bytes[c] != now.row_bytes[b]) refuse(instruction, "sums and second factor differ in bytes of a row");
  if (now.row_bytes[a] / 4 != now.rows[b]) refuse(instruction, "the first factor's groups in a row are not the second's rows");
  return {now.rows[c], now.row_bytes[c] / 4, now.rows[b]};
}

void tdpbusd(int c, int a, int b) {  // the bytes of a are unsigned, those of b signed; sums wrap
  const Shape s = shape_of_product("tdpbusd", c, a, b);
  for (int m = 0; m < s.m; ++m)
    for (int k = 0; k < s.k; ++k)
      for (int n = 0; n < s.n; ++n)
        for (int shift = 0; shift < 32; shift += 8) {
          const auto x = static_cast<uint8_t>(tiles.data[a][m][k] >> shift);
          const auto w = static_cast<int8_t>(tiles.data[b][k][n] >> shift);
          tiles.data[c][m][n] += static_cast<uint32_t>(x * w);
        }
}

// bfloat16 products round to nearest even and take denormals for 0, whatever MXCSR says: on_illegal sets these modes for itself.
float low(uint32_t pair) { return std::bit_cast<float>(pair << 16); }
float high(uint32_t pair) { return std::bit_cast<float>(pair & 0xffff0000u); }

void tdpbf16ps(int c, int a, int b) {  // even and odd elements have sums of their own, which meet at the end
  const Shape s = shape_of_product("tdpbf16ps", c, a, b);
  for (int m = 0; m < s.m; ++m) {
    float even[16] = {}, odd[16] = {};
    for (int k = 0; k < s.k; ++k)
      for (int n = 0; n < 16; ++n) {
        even[n] = std::fma(low(tiles.data[a][m][k]), low(tiles.data[b][k][n]), even[n]);
        odd[n] = std::fma(high(tiles.data[a][m][k]), high(tiles.data[b][k][n]), odd[n]);
      }
    for (int n = 0; n < s.n; ++n)
      tiles.data[c][m][n] = std::bit_cast<uint32_t>(std::bit_cast<float>(tiles.data[c][m][n]) + (even[n] + odd[n]));
  }
}

uint32_t to_bf16(uint32_t bits) {  // denormals become 0, NaN becomes quiet
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude < 0x00800000u) return bits >> 16 & 0x8000u;
  if (magnitude > 0x7f800000u) return bits >> 16 | 0x40u;
  if (magnitude == 0x7f800000u) return bits >> 16;
  return (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
}

Vector vcvtneps2bf16(const Vector& v) {  // 16 results in the lower half, 0 above
  Vector to = {};
  for (int i = 0; i < 8; ++i) to.lane[i] = to_bf16(v.lane[2 * i]) | to_bf16(v.lane[2 * i + 1]) << 16;
  return to;
}

Vector vcvtne2ps2bf16(const Vector& above, const Vector& below) {
  Vector to = vcvtneps2bf16(below);
  memcpy(to.lane + 8, vcvtneps2bf16(above).lane, 32);
  return to;
}

Vector vdpbf16ps(Vector sums, const Vector& x, const Vector& w) {
  for (int i = 0; i < 16; ++i) {
    const float sum = std::fma(high(x.lane[i]), high(w.lane[i]), std::bit_cast<float>(sums.lane[i]));
    sums.lane[i] = std::bit_cast<uint32_t>(std::fma(low(x.lane[i]), low(w.lane[i]), sum));
  }
  return sums;
}

bool on_tiles(const Instruction& in) {
  const bool two = in.second == 0 && in.reg < 8, config = two && in.memory && in.reg == 0, move = two && in.sib;
  const bool three = !in.memory && in.reg < 8 && in.rm < 8 && in.second < 8;
  if (in.code == vex(0, 0x49) && config)
    ldtilecfg(in.base + in.index);
  else if (in.code == vex(1, 0x49) && config)
    sttilecfg(in.base + in.index);
  else if (in.code == vex(3, 0x49) && two && !in.memory && in.rm == 0)
    tilezero(in.reg);
  else if ((in.code == vex(3, 0x4b) || in.code == vex(1, 0x4b)) && move)  // the second is tileloaddt1, which differs in what caches keep
    tileloadd(in.reg, in.base, in.index);
  else if (in.code == vex(2, 0x4b) && move)
    tilestored(in.reg, in.base, in.index);
  else if (in.code == vex(2, 0x5c) && three)
    tdpbf16ps(in.reg, in.rm, in.second);
  else if (in.code == vex(1, 0x5e) && three)
    tdpbusd(in.reg, in.rm, in.second);
  else
    return false;
  return true;
}

bool on_vectors(const Instruction& in, unsigned char* xsave) {
  const bool convert = in.code == evex(2, 0x72), convert_two = in.code == evex(3, 0x72), dot = in.code == evex(2, 0x52);
  if (!(convert || convert_two || dot) || (convert && in.second != 0) || (in.broadcast && !in.memory)) return false;
  Vector last;
  if (!in.memory) {
    last = read_register(xsave, in.rm);
  } else if (!in.broadcast) {
    memcpy(last.lane, in.base + in.index, 64);
  } else {
    for (uint32_t& lane : last.lane) memcpy(&lane, in.base + in.index, 4);
  }
  const Vector second = read_register(xsave, in.second);
  write_register(xsave, in.reg,
                 convert       ? vcvtneps2bf16(last)
                 : convert_two ? vcvtne2ps2bf16(second, last)
                               : vdpbf16ps(read_register(xsave, in.reg), second, last));
  return true;
}

struct sigaction previous;

// Instructions that follow each other are done in one go, since a signal takes far longer than any of them.
void on_illegal(int, siginfo_t*, void* raw) {
  auto& context = *static_cast<ucontext_t*>(raw);
  auto* xsave = reinterpret_cast<unsigned char*>(context.uc_mcontext.fpregs);
  complete(xsave);
  _mm_setcsr(0x9fc0);  // nearest even, denormals are 0, no exceptions: in this handler, for the thread's own comes back with the frame
  int64_t done = 0;
  for (Instruction in; decode(context, in); ++done) {
    const bool tile = on_tiles(in);
    if (!tile && !on_vectors(in, xsave)) break;
    ++trapped[!tile];
    context.uc_mcontext.gregs[REG_RIP] += in.length;
  }
  if (done == 0) sigaction(SIGILL, &previous, nullptr);  // the instruction runs, and fails, again
}

int offset_of(int component) {
  unsigned a, at, c, d;
  __cpuid_count(0xd, component, a, at, c, d);
  return static_cast<int>(at);
}

}  // namespace

extern "C" void trap_install() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  syscall(SYS_arch_prctl, kRequestPermission, kTileData);  // refused: tile instructions raise SIGILL, and come here
  ymm_high = offset_of(2), zmm_high = offset_of(6), zmm_upper = offset_of(7);
  struct sigaction ours = {};
  ours.sa_sigaction = on_illegal;
  ours.sa_flags = SA_SIGINFO;
  sigaction(SIGILL, &ours, &previous);
}
