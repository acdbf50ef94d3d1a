// ldmatrix, stmatrix, movmatrix and mma.sync: fragments spread over the lanes of a warp.
#include <algorithm>

#include "access.h"
#include "decode.h"
#include "numbers.h"

namespace ptx {

Program& program_of(Line&);

namespace {

// ---- ldmatrix, stmatrix ----

// Matrix j has eight rows of 16 bytes; lane 8 j + r holds the address of its row r.
Mask rows_of(u32 matrices) { return matrices == 4 ? FULL : (1u << 8 * matrices) - 1; }

// a: matrices, b: transposed
void matrix_places(Warp& w, const Inst& i, const Lanes& address, u32* at) {
  for (u32 l = 0; l < 8 * i.a; ++l) at[l] = shared_at(w, i, l, address.at[l] - (address.at[l] >= SHARED_WINDOW ? SHARED_WINDOW : 0), 16);
}
void load_matrix(Warp& w, const Inst& i, Mask m) {
  u32 at[LANES];
  matrix_places(w, i, addresses(w, i, i.a), at);
  Mask rows = rows_of(i.a);
  count_shared(w, rows, at, 16, false);
  note_shared(w, i, rows, at, 16, Use::read);
  const u8* shared = w.cta->shared.data();
  for (u32 j = 0; j < i.a; ++j) {
    u16 e[8][8];
    for (int r = 0; r < 8; ++r) std::memcpy(e[r], shared + at[8 * j + r], 16);
    u32 out[LANES];
    for (int l = 0; l < LANES; ++l) {
      int g = l / 4, t = l % 4 * 2;
      out[l] = i.b ? u32(e[t][g]) | u32(e[t + 1][g]) << 16 : u32(e[g][t]) | u32(e[g][t + 1]) << 16;
    }
    put(w.reg<u32>(i.op[j]), out, m);
  }
}
void store_matrix(Warp& w, const Inst& i, Mask) {
  u32 at[LANES];
  matrix_places(w, i, addresses(w, i, 0), at);
  Mask rows = rows_of(i.a);
  count_shared(w, rows, at, 16, true);
  u8* shared = w.cta->shared.data();
  u8 data[LANES][16];
  for (u32 j = 0; j < i.a; ++j) {
    const u32* in = w.reg<u32>(i.op[1 + j]);
    u16 e[8][8];
    for (int l = 0; l < LANES; ++l) {
      int g = l / 4, t = l % 4 * 2;
      (i.b ? e[t][g] : e[g][t]) = u16(in[l]);
      (i.b ? e[t + 1][g] : e[g][t + 1]) = u16(in[l] >> 16);
    }
    for (int r = 0; r < 8; ++r) std::memcpy(data[8 * j + r], e[r], 16);
  }
  note_shared(w, i, rows, at, 16, Use::write, data[0], 16);
  for (u32 r = 0; r < 8 * i.a; ++r) std::memcpy(shared + at[r], data[r], 16);
}
void ld_st_matrix(Line& l, Inst& inst) {
  bool load = l.name == "ldmatrix";
  inst.kind = load ? LDMATRIX : STMATRIX;
  inst.sync = Sync::aligned;
  if (!l.take("sync") || !l.take("aligned") || !l.take("m8n8")) return;
  inst.a = l.take("x1") ? 1 : l.take("x2") ? 2 : l.take("x4") ? 4 : 0;
  inst.b = l.take("trans");
  l.take("shared"), l.take("shared::cta");
  Type t = l.take_type();
  if (t.bits != 16 || inst.a == 0) return;
  l.want(2);
  if (load) {
    l.push_all(0, 4);
    l.push_address(1, inst, 8);
    inst.run = load_matrix;
  } else {
    l.push_address(0, inst, 8);
    l.push_all(1, 4);
    inst.run = store_matrix;
  }
  if (l.ops.size() != inst.a + 1) l.fail("the vector has another length than the modifier says");
}

// ---- mma.sync ----

// With g = lane / 4, t = lane % 4 and E elements in a register:
//   register r of A holds row g + 8 (r % 2), columns 4 E (r / 2) + E t ...      (16 rows)
//   register r of B holds column g, rows 4 E r + E t ...                       (8 columns)
//   element c of C and D (float, int) is row g + 8 (c / 2), column 2 t + c % 2
// which is one rule for the figures of m16n8k4 (tf32), k8 (tf32, 16-bit), k16 (16-bit, 8-bit) and k32 (8-bit).
template <char Kind, u32 Bits>
inline auto element(u32 word, int e) {
  if constexpr (Kind == 'f') return from_f16(u16(word >> 16 * e));
  else if constexpr (Kind == 'h') return from_bf16(u16(word >> 16 * e));
  else if constexpr (Kind == 't') return bits_float(word & 0xffffe000u);  // hardware reads 19 bits
  else if constexpr (Kind == 'e') return from_e4m3(u8(word >> 8 * e));
  else if constexpr (Kind == 'g') return from_e5m2(u8(word >> 8 * e));
  else if constexpr (Kind == 's') return i32(i8(word >> 8 * e));
  else return i32(u8(word >> 8 * e));
}

// Products are exact in float; the sum runs over k in float. The order and rounding of hardware's sum are not specified.
template <char KindA, char KindB, u32 Bits, class T>
void mma_lanes(Warp& w, const Inst& i, Mask m) {
  constexpr int E = 32 / Bits;
  const int K = i.a, a_registers = K / (2 * E), b_registers = K / (4 * E);
  const int d_registers = i.b;  // 4, or 2 where D and C are f16
  alignas(64) T a[32][16], b[8][32], c[8][16];
  alignas(64) T v[E][LANES];
  for (int r = 0; r < a_registers; ++r) {
    const u32* in = w.reg<u32>(i.op[d_registers + r]);
    for (int e = 0; e < E; ++e)
      for (int l = 0; l < LANES; ++l) v[e][l] = element<KindA, Bits>(in[l], e);
    for (int t = 0; t < 4; ++t)
      for (int e = 0; e < E; ++e) {
        T* to = &a[4 * E * (r / 2) + E * t + e][8 * (r % 2)];
        for (int g = 0; g < 8; ++g) to[g] = v[e][4 * g + t];
      }
  }
  for (int r = 0; r < b_registers; ++r) {
    const u32* in = w.reg<u32>(i.op[d_registers + a_registers + r]);
    for (int e = 0; e < E; ++e)
      for (int l = 0; l < LANES; ++l) v[e][l] = element<KindB, Bits>(in[l], e);
    for (int l = 0; l < LANES; ++l)
      for (int e = 0; e < E; ++e) b[l / 4][4 * E * r + E * (l % 4) + e] = v[e][l];
  }
  const Op* op_c = i.op + d_registers + a_registers + b_registers;
  if (d_registers == 4) {
    for (int r = 0; r < 4; ++r) {
      const T* in = w.reg<T>(op_c[r]);
      for (int t = 0; t < 4; ++t)
        for (int g = 0; g < 8; ++g) c[2 * t + r % 2][8 * (r / 2) + g] = in[4 * g + t];
    }
  } else if constexpr (std::is_same_v<T, float>) {
    for (int r = 0; r < 2; ++r) {
      const u16* in = w.reg<u16>(op_c[r]);
      for (int l = 0; l < LANES; ++l)
        for (int e = 0; e < 2; ++e) c[2 * (l % 4) + e][l / 4 + 8 * r] = from_f16(in[2 * l + e]);
    }
  }
  if constexpr (std::is_same_v<T, i32>) {
    if (i.c) {  // .satfinite: a sum of products is small, so only its addition to C can overflow
      alignas(64) T sum[8][16] = {};
      add_product<T>(a, b, sum, K);
      for (int n = 0; n < 8; ++n)
        for (int r = 0; r < 16; ++r) c[n][r] = i32(std::clamp<i64>(i64(c[n][r]) + sum[n][r], INT32_MIN, INT32_MAX));
    } else {
      add_product<T>(a, b, c, K);
    }
  } else {
    add_product<T>(a, b, c, K);
  }
  if (d_registers == 4) {
    for (int r = 0; r < 4; ++r) {
      T out[LANES];
      for (int t = 0; t < 4; ++t)
        for (int g = 0; g < 8; ++g) out[4 * g + t] = c[2 * t + r % 2][8 * (r / 2) + g];
      put(w.reg<T>(i.op[r]), out, m);
    }
  } else if constexpr (std::is_same_v<T, float>) {
    for (int r = 0; r < 2; ++r) {
      u32 out[LANES];
      for (int l = 0; l < LANES; ++l) out[l] = u32(to_f16(c[2 * (l % 4)][l / 4 + 8 * r])) | u32(to_f16(c[2 * (l % 4) + 1][l / 4 + 8 * r])) << 16;
      put(w.reg<u32>(i.op[r]), out, m);
    }
  }
  w.cta->block->counts.tensor_fma += 16 * 8 * K;
}

void mma(Line& l, Inst& inst) {
  inst.kind = MMA;
  inst.sync = Sync::aligned;
  if (!l.take("sync") || !l.take("aligned")) return;
  if (!l.take("row") || !l.take("col")) return;
  for (auto& [name, k] : std::initializer_list<std::pair<const char*, u32>>{{"m16n8k4", 4}, {"m16n8k8", 8}, {"m16n8k16", 16}, {"m16n8k32", 32}})
    if (l.take(name)) inst.a = k;
  l.take("kind::f8f6f4");
  inst.c = l.take("satfinite");
  l.want(4);
  Type d = l.take_type(), a = l.take_type(), b = l.take_type(), c = l.take_type();
  if (d.kind != c.kind || d.bits != c.bits || a.bits != b.bits || inst.a == 0) return;
  u32 e = 32 / a.bits;
  inst.b = d.bits == 16 ? 2 : 4;
  for (int k = 0; k < 4; ++k) l.push_all(k, 4);
  if (l.ops.size() != inst.b * 2 + inst.a / (2 * e) + inst.a / (4 * e)) l.fail("fragments of unexpected length");
  bool wide = inst.a == 8 * e || inst.a == 4 * e;
  if (!wide) return;
  auto is = [&](char x, char y) { return a.kind == x && b.kind == y; };
  if (d.kind == 'f' && (d.bits == 32 || d.bits == 16)) {
    if (is('f', 'f') && a.bits == 16) inst.run = mma_lanes<'f', 'f', 16, float>;
    if (is('h', 'h') && d.bits == 32) inst.run = mma_lanes<'h', 'h', 16, float>;
    if (is('t', 't') && d.bits == 32) inst.run = mma_lanes<'t', 't', 32, float>;
    if (is('e', 'e')) inst.run = mma_lanes<'e', 'e', 8, float>;
    if (is('e', 'g')) inst.run = mma_lanes<'e', 'g', 8, float>;
    if (is('g', 'e')) inst.run = mma_lanes<'g', 'e', 8, float>;
    if (is('g', 'g')) inst.run = mma_lanes<'g', 'g', 8, float>;
  } else if (d.kind == 's' && d.bits == 32 && a.bits == 8) {
    if (is('s', 's')) inst.run = mma_lanes<'s', 's', 8, i32>;
    if (is('u', 'u')) inst.run = mma_lanes<'u', 'u', 8, i32>;
    if (is('s', 'u')) inst.run = mma_lanes<'s', 'u', 8, i32>;
    if (is('u', 's')) inst.run = mma_lanes<'u', 's', 8, i32>;
  }
}

// An 8 x 8 matrix of 16-bit numbers in the registers of a warp, as ldmatrix leaves it, transposed.
void movmatrix(Line& l, Inst& inst) {
  inst.kind = SHUFFLE;
  inst.sync = Sync::aligned;
  if (!l.take("sync") || !l.take("aligned") || !l.take("m8n8") || !l.take("trans") || l.take_type().bits != 16) return;
  l.want(2);
  for (auto& operand : l.operands) l.push(operand.text, 4);
  inst.run = [](Warp& w, const Inst& i, Mask m) {
    const u32* in = w.reg<u32>(i.op[1]);
    u32 out[LANES];
    for (int lane = 0; lane < LANES; ++lane) {
      int g = lane / 4, t = lane % 4 * 2;
      auto element = [&](int row, int column) { return in[4 * row + column / 2] >> 16 * (column % 2) & 0xffff; };
      out[lane] = element(t, g) | element(t + 1, g) << 16;
    }
    put(w.reg<u32>(i.op[0]), out, m);
  };
}

}  // namespace

const Family& matrix_family() {
  static const Family family{{{"ldmatrix", ld_st_matrix}, {"stmatrix", ld_st_matrix}, {"movmatrix", movmatrix}, {"mma", mma}}};
  return family;
}

}  // namespace ptx
