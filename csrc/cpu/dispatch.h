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

// values[nnzb, R, C] -> the layout of LinearArgs::w for y = x @ W^T.
void prepack(DType dtype, const void* values, int64_t nnzb, int64_t R, int64_t C, void* out, int64_t threads, ParallelFor parallel);

// The result does not depend on threads: each output element is computed by one task, in one fixed order.
void run_linear(const LinearArgs& args, int64_t threads, ParallelFor parallel);

// dx[M, K] = dy[M, N] @ W[N, K] as y = x @ W^T of a transposed index, over the values of W where they are. args: x is dy, y is dx, w the
// values, crow and col W's own index, and N, K, R, C those of W^T.
void run_linear_dx(LinearArgs args, int64_t threads, ParallelFor parallel);

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

// Of args, x is what x was before it is rounded, by x_scale (0: each row by its own); x_scales is not used.
void run_linear_int8(const Int8Args& args, float x_scale, int64_t threads, ParallelFor parallel);
// Both of one x and one C, which x is rounded for once.
void run_linear_int8_glu(const Int8Args& gate, const Int8Args& up, float x_scale, int64_t threads, ParallelFor parallel);

}  // namespace sparse_prune
