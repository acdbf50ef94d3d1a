// What the dispatcher asks of an instruction set. Nothing here or in the kernels knows of torch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sparse_prune {

enum class DType : int { f32, bf16, f16, f64 };
enum class Activation : int { none, relu, gelu, gelu_tanh, silu };

// act(x) = max(x, 0) - |x| S(|x|) for gelu, gelu_tanh and silu, which differ in S only: Phi(-a), and 1 / (1 + e^u) with u = a for silu.
// S by pieces: around n = 0, 1, ... 31 a polynomial in f = a * per_unit - n, of which [0] is the constant; the last piece is 0, and a is
// held back to it. AVX-512 finds a piece's numbers in two registers, by one instruction for each power.
template <int powers>
struct ActivationTable {
  float per_unit, limit;
  alignas(64) float power[powers][32];
};
extern const ActivationTable<8> gelu_table;  // errs by 4e-7 relative at most; 0 below -7.6
// For results of 8 bits: by 7e-6 at most, and 4e-4 relative (gelu_tanh 1.5e-3, where it is below 1e-8); gelus are 0 below -5.5, silu below -18.
extern const ActivationTable<4> gelu_table_bf16, gelu_tanh_table_bf16, silu_table_bf16;

// Elements that may be read (never used) past the end of prepacked values and panels: a kernel loads whole vectors of up to 64 bytes,
// in strips of up to four, also where a block is narrower.
constexpr int64_t kSlack = 128;

// Lanes of the widest vectors: kernels read whole ones of weights.
constexpr int64_t kLanes = 16;

// Two products that make one y: the first writes it, the second, whose residual it is, multiplies it: y = act(...) * residual.
enum class Pair : int { none, first, second };

// Rows at a distance of an odd number of cache lines do not compete for few sets of the L1 cache; bytes: of a row.
constexpr int64_t odd_lines(int64_t bytes) { return ((bytes + 63) / 64 | 1) * 64; }

// y[M, N] = act(x[M, K] @ W[N, K]^T + bias[N]) + residual[M, N], where block e of block-row i covers outputs [i*R, i*R + R) and inputs
// [col[e]*C, col[e]*C + C), both cut by N and K. The same struct serves dx, as a product with W^T through a transposed index.
struct LinearArgs {
  DType dtype;                // of x and w
  DType out;                  // of bias, residual and y: that of x and w, or any but f64
  int64_t M, N, K;
  int64_t R, C;               // outputs and inputs of one block
  const int32_t* crow;        // [ceil(N/R) + 1]
  const int32_t* col;         // [nnzb]
  const int32_t* block;       // [nnzb], where values of block e lie; null: block e lies at e
  const void* x;              // [M, K]
  int64_t ldx;                // elements from one row of x to the next
  const void* w;              // prepacked: f32, f16, f64 as [nnzb][C][R], bf16 as [nnzb][ceil(C/2)][R][2]; kSlack elements follow
  const void* bias;           // [N] or null
  Activation activation;
  const void* residual;       // [M, N] contiguous, or null
  void* y;                    // [M, N] contiguous
  Pair pair;
};

// dvalues[nnzb, R, C] = the stored blocks of dy[M, N]^T @ x[M, K], from panels of x, and of dy or dy itself.
struct SddArgs {
  DType dtype;                // of dvalues
  int64_t M, N, K, R, C;
  const int32_t* crow;        // [ceil(N/R) + 1]
  const int32_t* col;         // [nnzb]
  const void* dy;             // [M, N], and ld_dy elements from one row to the next, where Kernels::reads_dy says so; else
  int64_t ld_dy;
  const void* dy_panels;      // [ceil(N/R)][M][R], kSlack elements follow
  const void* x_panels;       // [ceil(K/C)][M][C], kSlack elements follow
  void* dvalues;              // [nnzb, R, C]
};

// A matrix [M, width] as sdd reads it: one panel per block of columns, whole blocks, zeros where the last block is cut.
struct PanelArgs {
  DType dtype;
  int64_t M, width, block;    // block columns per panel
  const void* matrix;         // [M, width]
  int64_t ld;                 // elements from one row to the next
  void* panels;               // [ceil(width/block)][M][block], or pairs of rows: [..][ceil(M/2)][block][2]
};

// linear computes rows [m0, m1) of block-rows [i0, i1), sdd the blocks of block-rows [i0, i1), panels the panels [p0, p1). None
// allocates beyond thread_scratch.
struct Kernels {
  const char* name;
  bool bf16_pairs;            // bf16 panels are pairs of bf16 rows; otherwise all 16-bit panels are float
  void (*linear)(const LinearArgs&, int64_t m0, int64_t m1, int64_t i0, int64_t i1);
  void (*sdd)(const SddArgs&, int64_t i0, int64_t i1);
  void (*panels)(const PanelArgs&, int64_t p0, int64_t p1);
  bool (*reads_dy)(const SddArgs&) = nullptr;  // whether sdd wants no panels of dy; null: it always does
};

// What a thread's scratch holds: x in another form, weights of a few block-rows, or what a product has made for the kernels of all threads.
enum class Scratch : int { x, weights, product, count };

// At least `bytes` of 64-byte aligned memory that belongs to this thread and stays valid until its next call for the same use; grows, never
// shrinks.
void* thread_scratch(size_t bytes, Scratch use = Scratch::x);

// Each returns null where the compiler cannot build it for the target processor.
const Kernels* portable_kernels();
const Kernels* portable_f64_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512_bf16_kernels();
const Kernels* amx_bf16_kernels();

}  // namespace sparse_prune
