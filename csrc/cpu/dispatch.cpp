#include "dispatch.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "target.h"

#if SPARSE_PRUNE_X86
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace sparse_prune {
namespace {

// In the order in which processors got them, so that each has all below it.
enum Isa : int { portable, avx2, avx512, avx512_vnni, avx512_bf16, amx_int8, amx_bf16, isa_count };
constexpr const char* kIsaNames[isa_count] = {"portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"};

#if SPARSE_PRUNE_X86
uint64_t enabled_state() {  // XCR0: the register files that the operating system saves
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

bool amx_permission() {  // Linux hands out the 8 KiB of tile state per process, on request
#ifdef __linux__
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

Isa detect() {
#if SPARSE_PRUNE_X86
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return portable;
  const bool osxsave = c >> 27 & 1, fma = c >> 12 & 1, f16c = c >> 29 & 1;
  if (!osxsave || !fma || !f16c) return portable;
  const uint64_t state = enabled_state();
  constexpr uint64_t kYmm = 0x6, kZmm = 0xe6, kTiles = 0x60000;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return portable;
  if ((state & kYmm) != kYmm || !(b >> 5 & 1)) return portable;
  const bool foundation = b >> 16 & 1, dq = b >> 17 & 1, bw = b >> 30 & 1, vl = b >> 31 & 1;
  if ((state & kZmm) != kZmm || !(foundation && dq && bw && vl)) return avx2;
  const bool vnni = c >> 11 & 1, tile = d >> 24 & 1, tile_int8 = d >> 25 & 1, tile_bf16 = d >> 22 & 1;
  if (!vnni) return avx512;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return avx512_vnni;
  if ((state & kTiles) != kTiles || !tile || !tile_int8 || !amx_permission()) return avx512_bf16;
  return tile_bf16 ? amx_bf16 : amx_int8;
#else
  return portable;
#endif
}

Isa best() {
  static const Isa isa = detect();
  return isa;
}

std::atomic<int> allowed{isa_count};

const Kernels* kernels_of(Isa isa) {
  switch (isa) {
    case amx_bf16:
      return amx_bf16_kernels();
    case amx_int8:
    case avx512_bf16:
      return avx512_bf16_kernels();
    case avx512_vnni:
    case avx512:
      return avx512_kernels();
    case avx2:
      return avx2_kernels();
    default:
      return portable_kernels();
  }
}

const EncoderKernels& encoder_for(DType dtype) {
  const Kernels* linear = &kernels_for(dtype);
  if (dtype == DType::f64) return *portable_f64_encoder();
  if (linear == amx_bf16_kernels()) return dtype == DType::bf16 ? *amx_bf16_encoder() : *avx512_encoder();
  if (linear == avx512_bf16_kernels()) return *avx512_bf16_encoder();
  if (linear == avx512_kernels()) return *avx512_encoder();
  return linear == avx2_kernels() ? *avx2_encoder() : *portable_encoder();
}

// Below 2^18 multiply-adds (a few microseconds) handing work to another thread costs more than it saves.
int64_t useful_threads(int64_t threads, int64_t multiply_adds) {
  return std::max<int64_t>(1, std::min(threads, multiply_adds >> 18));
}

template <class Body>
void for_each_task(int64_t tasks, ParallelFor parallel, const Body& body) {
  if (tasks == 1) return body(0);
  parallel(tasks, [](void* context, int64_t task) { (*static_cast<const Body*>(context))(task); }, const_cast<Body*>(&body));
}

// Work before block-row i, in inputs per output: its blocks' columns, and about 16 for writing y.
int64_t work_before(const int32_t* crow, int64_t block_cols, int64_t i) { return crow[i] * block_cols + i * 16; }

// The first of `rows` block-rows before which there is at least `work`, by before(i).
template <class Before>
int64_t first_row_at(const Before& before, int64_t rows, int64_t work) {
  int64_t low = 0, high = rows;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (before(middle) >= work)
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

int64_t bytes_of(DType dtype) { return dtype == DType::f64 ? 8 : (dtype == DType::f32 ? 4 : 2); }

// M rows in parts of at most about `most`: whole vectors of tokens, nearly equal.
int64_t nearly_equal(int64_t M, int64_t most) {
  const int64_t parts = std::max<int64_t>(1, (M + most - 1) / most);
  return ((M + parts - 1) / parts + 15) / 16 * 16;
}

// Rows of x per pass over the weights: about 384 KiB of x, so that it stays in a 1 MiB L2 beside the weights of one block-row; at
// least 64, so that weights are read once per 64 rows; nearly equal, since a last pass of a few rows costs like one of many.
int64_t rows_per_pass(int64_t M, int64_t K, int64_t bytes) {
  return nearly_equal(M, std::min<int64_t>(256, std::max<int64_t>(64, (384 << 10) / std::max<int64_t>(1, K * bytes))));
}

// Calls run(m0, m1, i0, i1) so that together they cover y once: rows [m0, m1) of one pass, of block-rows [i0, i1). before(i) is the
// work_before i.
template <class Before, class Run>
void for_each_range(const LinearArgs& a, const Before& before, int64_t pass, int64_t threads, ParallelFor parallel, const Run& run) {
  const int64_t rows = (a.N + a.R - 1) / a.R;
  const int64_t row_work = before(rows);
  const int64_t tasks = useful_threads(threads, row_work * a.R * a.M);
  // The work of all rows of x, pass by pass, laid end to end and cut into equal parts; a block-row belongs to the part in which it begins.
  for_each_task(tasks, parallel, [&](int64_t t) {
    const int64_t total = row_work * a.M, low = total * t / tasks, high = total * (t + 1) / tasks;
    for (int64_t m0 = low / row_work / pass * pass; m0 < a.M && m0 * row_work < high; m0 += pass) {
      const int64_t m1 = std::min(a.M, m0 + pass);
      const auto first_at = [&](int64_t work) { return first_row_at(before, rows, (work - m0 * row_work + m1 - m0 - 1) / (m1 - m0)); };
      const int64_t i0 = first_at(low), i1 = first_at(high);
      if (i0 < i1) run(m0, m1, i0, i1);
    }
  });
}

// run_linear_glu for the arguments of any product, whose x has elements of x_bytes.
template <class Args>
void run_glu(Args gate, Args up, void (*linear)(const Args&, int64_t, int64_t, int64_t, int64_t), int64_t x_bytes, int64_t threads,
             ParallelFor parallel) {
  if (gate.M == 0 || gate.N == 0) return;
  up.pair = Pair::first, gate.pair = Pair::second;
  gate.residual = up.y;
  const auto before = [&](int64_t i) { return work_before(gate.crow, gate.C, i) + work_before(up.crow, up.C, i); };
  for_each_range(gate, before, rows_per_pass(gate.M, gate.K, x_bytes), threads, parallel, [&](int64_t m0, int64_t m1, int64_t i0, int64_t i1) {
    // What up writes stays in half of a 1 MiB L2 until gate multiplies it, beside the rows of x that both read.
    const int64_t group = std::max<int64_t>(1, (256 << 10) / ((m1 - m0) * gate.R * bytes_of(gate.out)));
    for (int64_t i = i0; i < i1; i += group) {
      const int64_t end = std::min(i1, i + group);
      linear(up, m0, m1, i, end);
      linear(gate, m0, m1, i, end);
    }
  });
}

// One block, [outputs][inputs] -> [ceil(inputs / step)][outputs][step].
template <class T, int step>
void prepack_block(const T* from, int64_t inputs, int64_t outputs, T* to) {
  for (int64_t k = 0; k < inputs; k += step)
    for (int64_t n = 0; n < outputs; ++n, to += step)
      for (int s = 0; s < step; ++s) to[s] = k + s < inputs ? from[n * inputs + k + s] : T(0);
}

// [rows][width] -> [ceil(rows / 2)][width][2]
void pair_rows(const uint16_t* from, int64_t rows, int64_t width, uint16_t* to) {
  for (int64_t r = 0; r < rows; r += 2, from += 2 * width, to += 2 * width)
    for (int64_t j = 0; j < width; ++j) {
      to[2 * j] = from[j];
      to[2 * j + 1] = r + 1 < rows ? from[width + j] : uint16_t{0};
    }
}

template <class T, int step>
void prepack_as(const void* values, int64_t nnzb, int64_t R, int64_t C, void* out, int64_t threads, ParallelFor parallel) {
  const int64_t size = (C + step - 1) / step * step * R;
  const int64_t tasks = useful_threads(threads, nnzb * size * 8);  // moving an element costs about 8 multiply-adds
  for_each_task(tasks, parallel, [=](int64_t t) {
    for (int64_t e = nnzb * t / tasks; e < nnzb * (t + 1) / tasks; ++e)
      prepack_block<T, step>(static_cast<const T*>(values) + e * R * C, C, R, static_cast<T*>(out) + e * size);
  });
  std::fill_n(static_cast<T*>(out) + nnzb * size, kSlack, T(0));
}

// Of blocks [C][R] that block e of a's lies in, the prepacked weights of block-rows [g0, g1): as if block e lay at e.
const void* scratch_weights(const LinearArgs& a, const Kernels& kernels, int64_t g0, int64_t g1) {
  const bool pairs = a.dtype == DType::bf16;
  const int64_t begin = a.crow[g0], end = a.crow[g1], bytes = bytes_of(a.dtype);
  const int64_t stored = bytes * a.C * a.R, size = pairs ? bytes * ((a.C + 1) / 2 * 2) * a.R : stored;
  auto* scratch = static_cast<char*>(thread_scratch((end - begin) * size + bytes * kSlack, Scratch::weights));
  for (int64_t e = begin; e < end; ++e) {
    const char* from = static_cast<const char*>(a.w) + a.block[e] * stored;
    char* to = scratch + (e - begin) * size;
    if (!pairs)
      std::memcpy(to, from, size);
    else if (kernels.bf16_pairs)
      kernels.panels({a.dtype, a.C, a.R, a.R, from, a.R, to}, 0, 1);
    else
      pair_rows(reinterpret_cast<const uint16_t*>(from), a.C, a.R, reinterpret_cast<uint16_t*>(to));
  }
  return scratch - begin * size;
}

// CSC index of a BSR pattern: start[columns + 1], row[blocks] and block[blocks], by block-column, rows ascending.
void transpose_index(const int32_t* crow, const int32_t* col, int64_t rows, int64_t columns, int32_t* start, int32_t* row, int32_t* block) {
  std::fill_n(start, columns + 1, 0);
  for (int64_t e = 0; e < crow[rows]; ++e) ++start[col[e] + 1];
  for (int64_t j = 0; j < columns; ++j) start[j + 1] += start[j];
  // start[j] is where the next block of column j goes, and in the end where those of j + 1 begin.
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t e = crow[i]; e < crow[i + 1]; ++e) {
      const int32_t at = start[col[e]]++;
      row[at] = static_cast<int32_t>(i);
      block[at] = static_cast<int32_t>(e);
    }
  std::copy_backward(start, start + columns, start + columns + 1);
  start[0] = 0;
}

// A product's rows [m0, m1).
Int8Args rows_of(Int8Args a, int64_t m0, int64_t m1) {
  const int64_t before = m0 * a.N * bytes_of(a.out);
  a.M = m1 - m0;
  a.y = static_cast<char*>(a.y) + before;
  if (a.residual) a.residual = static_cast<const char*>(a.residual) + before;
  return a;
}

// Rows of x as int8, and the scale of each.
struct RoundedRows {
  const uint8_t* q;      // [rows, ldq]: q + 128
  int64_t ldq;
  const float* scales;   // [rows]
  Int8Args put_into(Int8Args a) const {
    a.x = q, a.ldx = ldq, a.x_scales = scales;
    return a;
  }
};

// Calls run(m0, m1, x) for parts of a's rows, whose x is rounded by x_scale (0: each row by its own) in scratch that all threads read: few
// enough rows for it to stay in a shared cache, and whole passes. Rows of q are whole blocks and a step long, an odd number of cache lines.
template <class Run>
void for_each_rounded(const Int8Args& a, float x_scale, int64_t threads, ParallelFor parallel, const Run& run) {
  const int64_t ldq = odd_lines((a.K + a.C - 1) / a.C * a.C + kInt8Step - 1);
  const int64_t rows = std::min(a.M, std::max<int64_t>(256, (4 << 20) / ldq / 256 * 256));
  auto* q = static_cast<uint8_t*>(thread_scratch(rows * (ldq + static_cast<int64_t>(sizeof(float))), Scratch::product));
  auto* scales = reinterpret_cast<float*>(q + rows * ldq);
  const Int8Kernels& kernels = int8_kernels();
  for (int64_t m0 = 0; m0 < a.M; m0 += rows) {
    const int64_t m1 = std::min(a.M, m0 + rows), tasks = useful_threads(threads, (m1 - m0) * a.K * 8);
    const void* x = static_cast<const char*>(a.x) + m0 * a.ldx * bytes_of(a.dtype);
    const QuantizeArgs part = {a.dtype, a.K, x, a.ldx, x_scale, q, ldq, scales};
    for_each_task(tasks, parallel, [&](int64_t t) { kernels.quantize(part, (m1 - m0) * t / tasks, (m1 - m0) * (t + 1) / tasks); });
    run(m0, m1, RoundedRows{q, ldq, scales});
  }
}

}  // namespace

const Kernels& kernels_for(DType dtype) {
  if (dtype == DType::f64) return *portable_f64_kernels();
  int isa = std::min<int>(best(), allowed.load(std::memory_order_relaxed));
  if (dtype == DType::f32 || (dtype == DType::f16 && isa != amx_bf16)) isa = std::min<int>(isa, avx512);
  return *kernels_of(static_cast<Isa>(isa));
}

std::string available_isas() {
  std::string names;
  for (int isa = best(); isa >= 0; --isa) names += (names.empty() ? "" : ",") + std::string(kIsaNames[isa]);
  return names;
}

bool force_isa(const std::string& name) {
  if (name.empty()) {
    allowed.store(isa_count, std::memory_order_relaxed);
    return true;
  }
  for (int isa = 0; isa <= best(); ++isa)
    if (name == kIsaNames[isa]) {
      allowed.store(isa, std::memory_order_relaxed);
      return true;
    }
  return false;
}

int64_t prepacked_elements(DType dtype, int64_t nnzb, int64_t R, int64_t C) {
  return nnzb * R * (dtype == DType::bf16 ? (C + 1) / 2 * 2 : C) + kSlack;
}

void prepack(DType dtype, const void* values, int64_t nnzb, int64_t R, int64_t C, void* out, int64_t threads, ParallelFor parallel) {
  if (dtype == DType::f64)
    prepack_as<double, 1>(values, nnzb, R, C, out, threads, parallel);
  else if (dtype == DType::f32)
    prepack_as<float, 1>(values, nnzb, R, C, out, threads, parallel);
  else if (dtype == DType::f16)
    prepack_as<uint16_t, 1>(values, nnzb, R, C, out, threads, parallel);
  else
    prepack_as<uint16_t, 2>(values, nnzb, R, C, out, threads, parallel);
}

void run_linear(const LinearArgs& a, int64_t threads, ParallelFor parallel) {
  if (a.M == 0 || a.N == 0) return;
  const Kernels& kernels = kernels_for(a.dtype);
  for_each_range(a, [&](int64_t i) { return work_before(a.crow, a.C, i); }, rows_per_pass(a.M, a.K, bytes_of(a.dtype)), threads, parallel,
                 [&](int64_t m0, int64_t m1, int64_t i0, int64_t i1) { kernels.linear(a, m0, m1, i0, i1); });
}

void run_linear_dx(LinearArgs a, int64_t threads, ParallelFor parallel) {
  if (a.M == 0 || a.N == 0) return;
  const int64_t rows = (a.K + a.C - 1) / a.C, columns = (a.N + a.R - 1) / a.R, blocks = a.crow[rows];
  auto* start = static_cast<int32_t*>(thread_scratch(sizeof(int32_t) * (columns + 1 + 2 * blocks), Scratch::product));
  int32_t *row = start + columns + 1, *block = row + blocks;
  transpose_index(a.crow, a.col, rows, columns, start, row, block);
  a.crow = start, a.col = row, a.block = block;
  // [R][C] of W is [C][R] of W^T, which is how kernels read all dtypes but bf16: of that they want pairs of inputs. Those are made in scratch,
  // of a group of block-rows that stays in a 2 MiB L2 and for enough rows to be lost among their products. Elsewhere it is the block-rows of
  // the last blocks only that are copied, where vectors would reach past the values.
  const Kernels& kernels = kernels_for(a.dtype);
  const bool pairs = a.dtype == DType::bf16;
  const auto in_scratch = [&](int64_t i) {
    if (pairs || a.R % kLanes == 0 || start[i + 1] == start[i]) return pairs;
    return (blocks - 1 - block[start[i + 1] - 1]) * a.R * a.C < kLanes;
  };
  const int64_t most = (1 << 20) / (a.R * a.C * bytes_of(a.dtype));
  const auto group_end = [&](int64_t i, int64_t i1) {
    int64_t g = i + 1;
    while (g < i1 && in_scratch(g) == in_scratch(i) && (!in_scratch(i) || start[g + 1] - start[i] <= most)) ++g;
    return g;
  };
  const int64_t pass = rows_per_pass(a.M, a.K, bytes_of(a.dtype)), range = pairs ? std::max(pass, nearly_equal(a.M, 512)) : pass;
  for_each_range(a, [&](int64_t i) { return work_before(start, a.C, i); }, range, threads, parallel,
                 [&](int64_t m0, int64_t m1, int64_t i0, int64_t i1) {
    for (int64_t g0 = i0, g1; g0 < i1; g0 = g1) {
      g1 = group_end(g0, i1);
      LinearArgs group = a;
      if (in_scratch(g0)) group.w = scratch_weights(a, kernels, g0, g1), group.block = nullptr;
      for (int64_t m = m0; m < m1; m += pass) kernels.linear(group, m, std::min(m1, m + pass), g0, g1);
    }
  });
}

void run_linear_glu(const LinearArgs& gate, const LinearArgs& up, int64_t threads, ParallelFor parallel) {
  run_glu(gate, up, kernels_for(gate.dtype).linear, bytes_of(gate.dtype), threads, parallel);
}

bool panels_are_float(DType dtype) { return dtype == DType::f16 || (dtype == DType::bf16 && !kernels_for(dtype).bf16_pairs); }

int64_t panel_elements(DType dtype, int64_t M, int64_t width, int64_t block) {
  const int64_t rows = dtype == DType::bf16 ? (M + 1) / 2 * 2 : M;
  return (width + block - 1) / block * block * rows + kSlack;
}

void run_panels(const PanelArgs& a, int64_t threads, ParallelFor parallel) {
  const Kernels& kernels = kernels_for(a.dtype);
  const int64_t panels = (a.width + a.block - 1) / a.block;
  const int64_t tasks = useful_threads(threads, a.M * a.width * 8);
  for_each_task(tasks, parallel, [&](int64_t t) { kernels.panels(a, panels * t / tasks, panels * (t + 1) / tasks); });
}

bool sdd_reads_dy(const SddArgs& a) {
  const auto reads_dy = kernels_for(a.dtype).reads_dy;
  return reads_dy != nullptr && reads_dy(a);
}

void run_sdd(const SddArgs& a, int64_t threads, ParallelFor parallel) {
  const Kernels& kernels = kernels_for(a.dtype);
  const int64_t rows = (a.N + a.R - 1) / a.R, blocks = a.crow[rows];
  const int64_t tasks = useful_threads(threads, blocks * a.R * a.C * a.M);
  for_each_task(tasks, parallel, [&](int64_t t) {
    const auto before = [&](int64_t i) { return work_before(a.crow, a.C, i); };
    const int64_t total = before(rows), low = total * t / tasks, high = total * (t + 1) / tasks;
    kernels.sdd(a, first_row_at(before, rows, low), first_row_at(before, rows, high));
  });
}

void run_attention(const AttentionArgs& a, int64_t threads, ParallelFor parallel) {
  const int64_t heads = a.B * a.heads;
  if (heads == 0 || a.T == 0) return;
  const EncoderKernels& kernels = encoder_for(a.dtype);
  const int64_t workers = useful_threads(threads, heads * a.T * a.T * 2 * a.d);
  // A head in parts packs its keys and values once per part, so it is cut only where whole heads would leave threads idle.
  const int64_t parts = std::min<int64_t>((a.T + 31) / 32, (workers + heads - 1) / heads);
  const int64_t units = heads * parts, tasks = std::min(workers, units);
  for_each_task(tasks, parallel, [&](int64_t task) {
    for (int64_t u = units * task / tasks; u < units * (task + 1) / tasks; ++u) {
      const int64_t head = u / parts, part = u % parts;
      kernels.attention(a, head / a.heads, head % a.heads, a.T * part / parts, a.T * (part + 1) / parts);
    }
  });
}

void run_layer_norm(const NormArgs& a, int64_t threads, ParallelFor parallel) {
  if (a.M == 0 || a.H == 0) return;
  const EncoderKernels& kernels = encoder_for(a.dtype);
  const int64_t tasks = std::min(a.M, useful_threads(threads, a.M * a.H * 8));  // an element costs about 8 multiply-adds
  for_each_task(tasks, parallel, [&](int64_t t) { kernels.layer_norm(a, a.M * t / tasks, a.M * (t + 1) / tasks); });
}

const Int8Kernels& int8_kernels() {
  const int isa = std::min<int>(best(), allowed.load(std::memory_order_relaxed));
  if (isa >= amx_int8) return *amx_int8_kernels();
  if (isa >= avx512_bf16) return *avx512_bf16_int8_kernels();
  if (isa >= avx512_vnni) return *avx512_vnni_kernels();
  if (isa >= avx2) return *avx2_int8_kernels();
  return *portable_int8_kernels();
}

int64_t int8_offsets_at(int64_t nnzb, int64_t R, int64_t C) {
  return (nnzb * R * ((C + kInt8Step - 1) / kInt8Step * kInt8Step) + kSlack + 63) / 64 * 64;
}

int64_t int8_prepacked_bytes(int64_t nnzb, int64_t rows, int64_t R, int64_t C) {
  return int8_offsets_at(nnzb, R, C) + (rows * R + kSlack) * static_cast<int64_t>(sizeof(int32_t));
}

bool prepack_int8(const int8_t* values, const int32_t* crow, int64_t rows, int64_t R, int64_t C, void* out, int64_t threads,
                  ParallelFor parallel) {
  const int64_t nnzb = crow[rows], size = R * ((C + kInt8Step - 1) / kInt8Step * kInt8Step), at = int8_offsets_at(nnzb, R, C);
  auto* blocks = static_cast<int8_t*>(out);
  auto* offsets = reinterpret_cast<int32_t*>(blocks + at);
  std::fill_n(blocks + nnzb * size, at - nnzb * size, int8_t{0});
  std::fill_n(offsets, rows * R + kSlack, 0);
  std::atomic<bool> symmetric{true};
  const int64_t tasks = useful_threads(threads, nnzb * size * 8);  // moving an element costs about 8 multiply-adds
  for_each_task(tasks, parallel, [&](int64_t t) {
    for (int64_t i = rows * t / tasks; i < rows * (t + 1) / tasks; ++i)
      for (int64_t e = crow[i]; e < crow[i + 1]; ++e) {
        const int8_t* block = values + e * R * C;  // [R, C]
        prepack_block<int8_t, kInt8Step>(block, C, R, blocks + e * size);
        for (int64_t r = 0; r < R; ++r) {
          int32_t sum = 0, lowest = 0;
          for (int64_t c = 0; c < C; ++c) {
            sum += block[r * C + c];
            lowest = std::min<int32_t>(lowest, block[r * C + c]);
          }
          // Unsigned, since it may wrap for long rows; so does the sum of products it is added to, and their total is in range.
          const uint32_t before = static_cast<uint32_t>(offsets[i * R + r]);
          offsets[i * R + r] = static_cast<int32_t>(before - 128u * static_cast<uint32_t>(sum));
          if (lowest < -127) symmetric.store(false, std::memory_order_relaxed);
        }
      }
  });
  return symmetric.load();
}

void run_linear_int8(const Int8Args& a, float x_scale, int64_t threads, ParallelFor parallel) {
  if (a.M == 0 || a.N == 0) return;
  const Int8Kernels& kernels = int8_kernels();
  for_each_rounded(a, x_scale, threads, parallel, [&](int64_t m0, int64_t m1, const RoundedRows& x) {
    const Int8Args part = x.put_into(rows_of(a, m0, m1));
    for_each_range(part, [&](int64_t i) { return work_before(a.crow, a.C, i); }, rows_per_pass(part.M, a.K, 1), threads, parallel,
                   [&](int64_t p0, int64_t p1, int64_t i0, int64_t i1) { kernels.linear(part, p0, p1, i0, i1); });
  });
}

void run_linear_int8_glu(const Int8Args& gate, const Int8Args& up, float x_scale, int64_t threads, ParallelFor parallel) {
  if (gate.M == 0 || gate.N == 0) return;
  for_each_rounded(gate, x_scale, threads, parallel, [&](int64_t m0, int64_t m1, const RoundedRows& x) {
    run_glu(x.put_into(rows_of(gate, m0, m1)), x.put_into(rows_of(up, m0, m1)), int8_kernels().linear, 1, threads, parallel);
  });
}

}  // namespace sparse_prune
