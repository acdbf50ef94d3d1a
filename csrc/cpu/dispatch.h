// Which instruction set runs, and how work is shared between threads.
#pragma once

#include <string>

#include "encoder.h"
#include "int8.h"

namespace sparse_prune {

// Runs body(context, t) for t in [0, tasks), in any order and on any threads.
using ParallelFor = void (*)(int64_t tasks, void (*body)(void* context, int64_t task), void* context);

// The best allowed kernels for a dtype: bf16 may use all instruction sets, float32 and float16 stop at avx512, float64 is portable.
const Kernels& kernels_for(DType dtype);

// Names of the instruction sets that this processor and operating system offer, best first.
std::string available_isas();

// Allow no instruction set above `name` ("" allows all); false, changing nothing, if it is unknown or not available here.
bool force_isa(const std::string& name);

// Elements of the prepacked form of nnzb blocks [R, C], slack included.
int64_t prepacked_elements(DType dtype, int64_t nnzb, int64_t R, int64_t C);

// values[nnzb, R, C] -> the layout of LinearArgs::w for y = x @ W^T, or, transposed, for dx = dy @ W (inputs and outputs swap).
void prepack(DType dtype, const void* values, int64_t nnzb, int64_t R, int64_t C, bool transposed, void* out, int64_t threads,
             ParallelFor parallel);

// CSC index of a BSR pattern: col_start[columns + 1], row[nnzb] and block[nnzb], by block-column, rows ascending.
void transpose_index(const int32_t* crow, const int32_t* col, int64_t rows, int64_t columns, int32_t* col_start, int32_t* row,
                     int32_t* block);

// The result does not depend on threads: each output element is computed by one task, in one fixed order.
void run_linear(const LinearArgs& args, int64_t threads, ParallelFor parallel);

// y = act(x @ Wg^T + bg) * (x @ Wu^T + bu): gate has the activation, both write one y and have blocks of one R; no residuals.
void run_linear_glu(const LinearArgs& gate, const LinearArgs& up, int64_t threads, ParallelFor parallel);

// Elements (of float for 16-bit dtypes without native pairs, else of the dtype) of the panels of a [M, width] matrix, slack included.
int64_t panel_elements(DType dtype, int64_t M, int64_t width, int64_t block);
bool panels_are_float(DType dtype);
void run_panels(const PanelArgs& args, int64_t threads, ParallelFor parallel);
bool sdd_reads_dy(const SddArgs& args);
void run_sdd(const SddArgs& args, int64_t threads, ParallelFor parallel);

// Independent of threads in the same way.
void run_attention(const AttentionArgs& args, int64_t threads, ParallelFor parallel);
void run_layer_norm(const NormArgs& args, int64_t threads, ParallelFor parallel);

// The best allowed kernels for int8 weights.
const Int8Kernels& int8_kernels();

// Prepacked int8 weights of `rows` block-rows are bytes: blocks, slack, the offsets (from int8_offsets_at on), slack.
int64_t int8_offsets_at(int64_t nnzb, int64_t R, int64_t C);
int64_t int8_prepacked_bytes(int64_t nnzb, int64_t rows, int64_t R, int64_t C);

// values[nnzb, R, C] -> that form. False if a value is -128, which is outside the symmetric range and would break the sums' bound.
bool prepack_int8(const int8_t* values, const int32_t* crow, int64_t rows, int64_t R, int64_t C, void* out, int64_t threads,
                  ParallelFor parallel);

// Bytes from one row of q to the next: whole blocks and a step more, in an odd number of cache lines, since rows that are a multiple of
// 4 KiB apart compete for one set of the L1 cache.
int64_t int8_row_bytes(int64_t K, int64_t C);

void run_quantize(const QuantizeArgs& args, int64_t M, int64_t threads, ParallelFor parallel);
void run_linear_int8(const Int8Args& args, int64_t threads, ParallelFor parallel);
void run_linear_int8_glu(const Int8Args& gate, const Int8Args& up, int64_t threads, ParallelFor parallel);

}  // namespace sparse_prune
