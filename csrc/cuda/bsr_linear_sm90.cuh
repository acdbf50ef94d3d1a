// y[M, N] = act(x[M, K] W[N, K]^T + b[N]) + residual[M, N] on Hopper, W block-sparse: persistent, warp-specialised, wgmma fed by TMA.
//
// A tile is 128 outputs (block-rows put together by the plan) by TOKENS rows of x. Its transpose is computed: W is the left operand, 16
// outputs a warp, from registers in fragment order; x^T the right one, from shared memory. Blocks of a cluster make tiles of the same
// rows of x and walk in step over the union of their block-columns:
//
//   line    LINE inputs of one block-column.
//   step    LINES of them that follow one another in the union. One block of the cluster, in turn, loads each x[TOKENS, LINE] for all blocks
//           that need it (multicast); each block loads what W has there for its own rows.
//   stage   what a step brings: x, the blocks of W (absent ones are not loaded), and a word that says which are present.
//   ready   mbarrier of a stage, in each block: the block's loading warp and the leader have arrived, and all bytes.
//   spent   mbarrier of a stage, in each block: its consumer warps have read the stage. W may be overwritten.
//   free    mbarrier of a stage, in the block that leads it: the consumer warps of all blocks have. x may be overwritten.
//
// A warpgroup whose rows have no block at a line passes it by; a row without a block beside one with a block is multiplied by zeros.
// Zero times NaN or infinity is NaN, and x may hold them where the row has no block: a warp that finds NaN among its sums makes them again
// from its own blocks alone.
#pragma once

#include "bsr_linear_sm90.h"
#include "epilogue.cuh"
#include "hopper.cuh"

namespace sparse_prune::sm90 {

// Parameters of the kernels, and what they are gathered into. They are plain so that a test can pass tensors for pointers.
#define SPARSE_PRUNE_SM90_PARAMETERS                                                                                         \
  const __grid_constant__ CUtensorMap x_map, const void *x, const void *values, const int *table, const void *bias,          \
      const void *residual, void *y, long long x_row, long long residual_row, int m, int n, int k, int block_rows, int groups, \
      int lines, int group_tokens, int activation
#define SPARSE_PRUNE_SM90_ARGUMENTS \
  {x, values, table, bias, residual, y, x_row, residual_row, m, n, k, block_rows, groups, lines, group_tokens, activation}

struct Arguments {
  const void* x;         // [m, k], rows x_row elements apart: what x_map describes
  const void* values;    // [nnzb * C / LINE, LINE / 16, R / 16, 32 lanes, 8]: fragments of wgmma, cuda_sm90.fragment_order
  const int* table;      // cuda_sm90.ClusterPlan
  const void* bias;      // [n] or null
  const void* residual;  // [m, n], rows residual_row elements apart, or null
  void* y;               // [m, n]
  long long x_row, residual_row;
  int m, n, k;
  int block_rows;        // R
  int groups;            // of block-rows: one for each cluster at a time
  int lines;             // of all groups
  int group_tokens;      // tiles of tokens that pass over all groups together, so that their x stays in L2
  int activation;
};

// The parts of the table.
struct Table {
  const int* begins;  // [groups + 1] first line of each group
  const int* rows;    // [groups, size, places] block-row, or -1
  const int* heads;   // [lines, 2] first input; which blocks of the cluster need x
  const int* slots;   // [lines, size, places] chunk of values, or -1
  __device__ Table(const Arguments& a, int size, int places)
      : begins(a.table), rows(begins + a.groups + 1), heads(rows + a.groups * size * places), slots(heads + 2 * a.lines) {}
};

// Which tile of tokens and which group a cluster makes at its turn: groups in order (long ones first) within a band of tokens.
struct Tile {
  int token, group;
};
__device__ inline Tile tile_of(int turn, int token_tiles, const Arguments& a) {
  int band = turn / (a.group_tokens * a.groups), within = turn - band * a.group_tokens * a.groups;
  int width = min(a.group_tokens, token_tiles - band * a.group_tokens);
  return {band * a.group_tokens + within % width, within / width};
}

constexpr uint32_t LAST = 1u << 31;  // of a stage's word: the last step of its tile. Bits 0 to 7: which block-rows of which line have a block

// The ring of stages, seen by one warp.
template <int TOKENS, int LINE, int LINES>
struct Ring {
  static constexpr int STEP = LINE * LINES;
  static constexpr int COUNT = stages(TOKENS, STEP);
  uint32_t base;
  uint32_t position = 0;  // steps so far

  __device__ uint32_t stage() const { return position % COUNT; }
  __device__ uint32_t parity() const { return position / COUNT & 1; }
  __device__ uint32_t x(uint32_t stage, uint32_t line) const { return base + stage * x_bytes(TOKENS, STEP) + line * x_bytes(TOKENS, LINE); }
  __device__ uint32_t w(uint32_t stage, uint32_t line) const {
    return base + COUNT * x_bytes(TOKENS, STEP) + stage * w_bytes(STEP) + line * w_bytes(LINE);
  }
  __device__ uint32_t ready(uint32_t stage) const { return base + COUNT * (x_bytes(TOKENS, STEP) + w_bytes(STEP)) + 8 * stage; }
  __device__ uint32_t spent(uint32_t stage) const { return ready(stage) + 8 * COUNT; }
  __device__ uint32_t free(uint32_t stage) const { return ready(stage) + 16 * COUNT; }
  __device__ static uint32_t* word(char* shared, uint32_t stage) {
    return reinterpret_cast<uint32_t*>(shared + COUNT * (x_bytes(TOKENS, STEP) + w_bytes(STEP) + 24)) + stage;
  }
};

// The warp that loads. Lane (j, p) = j * places + p knows the block of block-row p at the j-th of the next 32 / places lines.
template <int TOKENS, int LINE, int LINES>
__device__ void load(const CUtensorMap* x_map, const Arguments& a, char* shared, Ring<TOKENS, LINE, LINES> ring, int token_tiles) {
  using namespace hopper;
  const uint32_t lane = threadIdx.x % 32, rank = cluster_rank(), size = cluster_size();
  const int places = ROWS / a.block_rows, batch = 32 / places, j = lane / places, p = lane % places;
  const int chunk = a.block_rows * LINE * 2;  // bytes of W that a block brings to a line
  const Table table(a, size, places);
  for (int turn = blockIdx.x / size; turn < token_tiles * a.groups; turn += gridDim.x / size) {
    Tile tile = tile_of(turn, token_tiles, a);
    int line = table.begins[tile.group], end = table.begins[tile.group + 1];
    int column = 0, needed = 0, slot = -1;
    auto look = [&](int first) {
      const int at = first + j;
      needed = 0, slot = -1;
      if (at >= end) return;
      column = __ldg(table.heads + 2 * at), needed = __ldg(table.heads + 2 * at + 1);
      slot = __ldg(table.slots + (at * size + rank) * places + p);
    };
    look(line);
    for (; line < end; line += batch) {
      const int now_column = column, now_slot = slot;
      const uint16_t now_needed = needed;
      look(line + batch);  // under way while these lines are loaded
      for (int i = 0; i < min(batch, end - line); i += LINES, ++ring.position) {
        const uint32_t stage = ring.stage(), ready = ring.ready(stage), within = j - i;  // the lane's line within the step
        const bool mine = within < LINES, leader = stage % size == rank;
        wait(ring.spent(stage), ring.parity() ^ 1);
        if (leader) wait(ring.free(stage), ring.parity() ^ 1);
        const uint32_t present = __ballot_sync(~0u, mine && now_slot >= 0) >> i * places;
        const uint32_t of_x = __ballot_sync(~0u, mine && p == 0 && now_needed >> rank & 1);
        if (lane == i * places) {
          *ring.word(shared, stage) = present | (line + i + LINES >= end ? LAST : 0);
          arrive_expect(ready, __popc(present) * chunk + __popc(of_x) * x_bytes(TOKENS, LINE));
        }
        if (mine && p == 0 && leader && now_needed)
          copy_box(ring.x(stage, within), x_map, now_column, tile.token * TOKENS, ready, now_needed);
        if (leader && lane < size) arrive_at(ready, lane);
        if (mine && now_slot >= 0)
          copy_bulk(ring.w(stage, within) + p * chunk, static_cast<const char*>(a.values) + (long long)now_slot * chunk, chunk, ready);
      }
    }
  }
}

// What becomes of sums: those of a warp's 16 outputs and of eight tokens at a time. Lane 4 g + t holds output rows g and g + 8 of the
// fragment, which are outputs 4 (g / 2) + g % 2 and two more, at tokens 2 t and one more. Transposed, it holds outputs 4 t to 4 t + 3 of
// token g.
template <class T>
struct Finish {
  const Arguments& a;
  int outputs;  // from this lane's first on, once transposed; none or less: beyond the edge
  float bias[2] = {0, 0};
  bool y_whole, r_whole;
  uint16_t* to;
  const uint16_t* from;

  __device__ Finish(const Arguments& a, int first_output, int first_token) : a(a) {
    const int lane = threadIdx.x % 32, g = lane / 4, n = first_output + lane % 4 * 4;
    for (int h = 0; h < 2; ++h) {
      const int output = first_output + g / 2 * 4 + h * 2 + g % 2;
      if (a.bias && output < a.n) bias[h] = device::to_float(static_cast<const T*>(a.bias)[output]);
    }
    outputs = a.n - n;
    y_whole = outputs >= 4 && a.n % 4 == 0 && reinterpret_cast<uintptr_t>(a.y) % 8 == 0;
    r_whole = outputs >= 4 && a.residual_row % 4 == 0 && reinterpret_cast<uintptr_t>(a.residual) % 8 == 0;
    to = static_cast<uint16_t*>(a.y) + (long long)(first_token + g) * a.n + n;
    from = static_cast<const uint16_t*>(a.residual) + (first_token + g) * a.residual_row + n;
  }

  // The next eight tokens, from `token` on.
  __device__ void store(const float* sums, int token) {
    using namespace hopper;
    const bool inside = token + int(threadIdx.x) % 32 / 4 < a.m;
    float v[4];
    for (int e = 0; e < 4; ++e) v[e] = sums[e] + bias[e / 2];
    device::activate(v, a.activation);
    if (a.residual) {
      uint32_t r[2] = {0, 0};
      if (inside && r_whole) {
        asm volatile("ld.global.nc.v2.b32 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "l"(from));
      } else if (inside) {
        for (int e = 0; e < 4; ++e)
          if (e < outputs) r[e / 2] |= uint32_t(from[e]) << 16 * (e % 2);
      }
      for (int h = 0; h < 2; ++h) {
        const uint32_t pair = transposed(r[h]);
        const T* values = reinterpret_cast<const T*>(&pair);
        v[2 * h] += device::to_float(values[0]), v[2 * h + 1] += device::to_float(values[1]);
      }
    }
    const uint32_t out[2] = {transposed(device::round_pair(v[0], v[1], T())), transposed(device::round_pair(v[2], v[3], T()))};
    if (inside && y_whole) {
      asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(out[0]), "r"(out[1]) : "memory");
    } else if (inside) {
      for (int e = 0; e < 4; ++e)
        if (e < outputs) to[e] = uint16_t(out[e / 2] >> 16 * (e % 2));
    }
    to += 8 * (long long)a.n, from += 8 * a.residual_row;
  }
};

// The sums of a warp for eight tokens from `token` on, of the blocks of its own block-row alone: that of the group's place `place` of
// `places`, 16 outputs `fragment` of it. By mma.sync, whose sums lie as those of wgmma do.
template <class T, int LINE>
__device__ void sum_own(float (&sums)[4], const Arguments& a, const Table& table, int group, int place, int places, int fragment,
                        int token) {
  const int lane = threadIdx.x % 32, fragments = a.block_rows / 16, row = token + lane / 4;
  const uint16_t* x = static_cast<const uint16_t*>(a.x) + row * a.x_row;
  for (float& sum : sums) sum = 0;
  for (int line = table.begins[group]; line < table.begins[group + 1]; ++line) {
    const int slot = table.slots[line * places + place];
    if (slot < 0) continue;
#pragma unroll 1
    for (int depth = 0; depth < LINE / 16; ++depth) {
      const uint4 w = static_cast<const uint4*>(a.values)[(((long long)slot * (LINE / 16) + depth) * fragments + fragment) * 32 + lane];
      const uint32_t left[4] = {w.x, w.y, w.z, w.w};
      uint32_t right[2] = {0, 0};
      for (int e = 0; e < 4; ++e) {
        const int input = table.heads[2 * line] + depth * 16 + lane % 4 * 2 + e / 2 * 8 + e % 2;
        if (row < a.m && input < a.k) right[e / 2] |= uint32_t(x[input]) << 16 * (e % 2);
      }
      device::multiply_add<T>(sums, left, right[0], right[1]);
    }
  }
}

template <int N>
using Count = std::integral_constant<int, N>;

// A warpgroup that multiplies: 64 outputs of the tile.
template <class T, int TOKENS, int LINE, int LINES>
__device__ void multiply(const Arguments& a, char* shared, Ring<TOKENS, LINE, LINES> ring, int token_tiles) {
  using namespace hopper;
  constexpr int LINE_DEPTH = LINE / 16, DEPTH = LINES * LINE_DEPTH;
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32 - 4, rank = cluster_rank(), size = cluster_size();
  const int places = ROWS / a.block_rows, place = warp * 16 / a.block_rows, fragments = a.block_rows / 16;
  // The bits of a word that are of this warpgroup's block-rows, line after line.
  const uint32_t group = places == 1 ? 1 : ((1u << places / 2) - 1) << (warp / 4 * places / 2);
  uint32_t ours = 0;
  for (int i = 0; i < LINES; ++i) ours |= group << i * places;
  const uint32_t fragment = place * a.block_rows * LINE * 2 + warp % fragments * 512 + lane * 16;  // within a line's W
  const Table table(a, size, places);

  auto release = [&](uint32_t stage) {
    __syncwarp();
    if (lane == 0) {
      arrive(ring.spent(stage));
      arrive_at(ring.free(stage), stage % size);
    }
  };
  for (int turn = blockIdx.x / size; turn < token_tiles * a.groups; turn += gridDim.x / size) {
    Tile tile = tile_of(turn, token_tiles, a);
    const int row = table.rows[(tile.group * size + rank) * places + place];
    float sums[TOKENS / 2];
#pragma unroll
    for (float& sum : sums) sum = 0;
    bool last = false;
    uint32_t stage = 0, word = 0;  // of the step to multiply
    uint32_t busy = 0, begun = 0;  // the stage that the product under way reads, and at which position; busy only if pending
    bool pending = false;
    auto next = [&] {  // to the next step at which this warpgroup has something to multiply, if the tile has one more
      while (!last) {
        stage = ring.stage();
        wait(ring.ready(stage), ring.parity());
        word = *ring.word(shared, stage);
        ++ring.position;
        last = word & LAST;
        if (word & ours) return true;
        release(stage);
        // Nothing to multiply for half a ring: the whole cluster would wait for the stage of the product under way.
        if (pending && ring.position - begun > ring.COUNT / 2) {
          wgmma_wait<0>();
          release(busy);
          pending = false;
        }
      }
      return false;
    };
    auto load_fragment = [&](uint4& w, uint32_t line, int depth) {
      asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w)
                   : "r"(ring.w(stage, line) + fragment + depth * fragments * 512)
                   : "memory");
    };
    auto multiply_add = [&](const uint4* w, const uint64_t* x, auto count) {
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < decltype(count)::value; ++k) wgmma<T>(sums, w[k], x[k]);
      wgmma_commit();
    };
    auto product = [&](uint4 (&w)[DEPTH]) {
      uint64_t x[DEPTH];
      if constexpr (LINES == 1) {
#pragma unroll
        for (int k = 0; k < DEPTH; ++k) {
          w[k] = {0, 0, 0, 0};
          if (word >> place & 1) load_fragment(w[k], 0, k);
          x[k] = matrix_descriptor(ring.x(stage, 0) + 32 * k, 2 * LINE);
        }
        multiply_add(w, x, Count<DEPTH>());
      } else {
        // As many products as lines with a block. A branch around each of them would make ptxas wait between them (C7520).
        static_assert(LINES == 4 && LINE == 16, "one product for each line");
        uint32_t left = word & ours;
        const int count = __popc(left);
#pragma unroll
        for (int k = 0; k < DEPTH; ++k, left &= left - 1) {
          const uint32_t line = left ? (__ffs(left) - 1) >> (places - 1) : 0;  // places is 1 or 2
          if (left) load_fragment(w[k], line, 0);
          x[k] = matrix_descriptor(ring.x(stage, line), 2 * LINE);
        }
        if (count == 1) multiply_add(w, x, Count<1>());
        if (count == 2) multiply_add(w, x, Count<2>());
        if (count == 3) multiply_add(w, x, Count<3>());
        if (count == 4) multiply_add(w, x, Count<4>());
      }
    };
    // Fragments of the product under way must stay in their registers while the next ones come. ptxas gives registers away after the
    // instruction that names them last, even if it goes on reading (it did, with four lines), so one behind the wait names them: a store
    // that never happens.
    auto kept = [&](const uint4 (&w)[DEPTH]) {
      if (a.activation >= 0) return;
      for (const uint4& v : w)
        asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(ring.base), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
    };
    auto retire = [&](const uint4 (&w)[DEPTH]) {  // the product before the one just begun, of fragments w
      wgmma_wait<1>();
      kept(w);
      if (pending) release(busy);
      busy = stage, begun = ring.position, pending = true;
    };
    uint4 even[DEPTH] = {}, odd[DEPTH] = {};
    while (next()) {
      product(even);
      retire(odd);
      if (!next()) break;
      product(odd);
      retire(even);
    }
    wgmma_wait<0>();
    kept(even), kept(odd);
    if (pending) release(busy);
    if (row < 0) continue;
    Finish<T> finish(a, row * a.block_rows + warp % fragments * 16, tile.token * TOKENS);
    const int end = min(a.m, (tile.token + 1) * TOKENS);
    bool again = false;
    if (a.block_rows < 64) {
      float all[4] = {};
#pragma unroll
      for (int i = 0; i < TOKENS / 2; ++i) all[i % 4] += sums[i];
      again = __any_sync(~0u, isnan(all[0] + all[1] + all[2] + all[3]));
    }
    if (again) {
#pragma unroll 1
      for (int token = tile.token * TOKENS; token < end; token += 8) {
        float own[4];
        sum_own<T, LINE>(own, a, table, tile.group, rank * places + place, size * places, warp % fragments, token);
        finish.store(own, token);
      }
    } else {
#pragma unroll
      for (int j = 0; j < TOKENS / 8; ++j) {
        if (tile.token * TOKENS + 8 * j >= end) break;
        finish.store(sums + 4 * j, tile.token * TOKENS + 8 * j);
      }
    }
  }
}

template <class T, int TOKENS, int LINE, int LINES>
__device__ void bsr_linear(const CUtensorMap* x_map, const Arguments& a) {
  using namespace hopper;
  extern __shared__ __align__(1024) char shared[];
  Ring<TOKENS, LINE, LINES> ring{shared_address(shared)};
  static_assert(ring.COUNT % MAX_CLUSTER == 0, "one block leads the same stages for ever");
  const int token_tiles = (a.m + TOKENS - 1) / TOKENS;
  if (threadIdx.x == 0) {
    prefetch_map(x_map);
    for (int stage = 0; stage < ring.COUNT; ++stage) {
      mbarrier_init(ring.ready(stage), 2);
      mbarrier_init(ring.spent(stage), CONSUMER_WARPS);
      if (stage % cluster_size() == cluster_rank()) mbarrier_init(ring.free(stage), CONSUMER_WARPS * cluster_size());
    }
    mbarrier_init_fence();
  }
  cluster_sync();
  if (threadIdx.x < 128) {
    registers_down<72>();
    if (threadIdx.x < 32) load<TOKENS, LINE, LINES>(x_map, a, shared, ring, token_tiles);
  } else {
    registers_up<216>();
    multiply<T, TOKENS, LINE, LINES>(a, shared, ring, token_tiles);
  }
  cluster_sync();  // no block leaves while another one may still report to it
}

}  // namespace sparse_prune::sm90
