// The register-tiled product that every vector instruction set shares. An instruction set's file sets its target, defines a
// vector type V, and includes this header inside its own unnamed namespace.
//
// A tile is MR rows of x times NV vectors of outputs. Its accumulators stay in registers across the whole column list of a block-row,
// so y is written once. Each step loads NV vectors of weights and multiplies them by MR broadcast elements of x:
//     acc[m][v] += x[m, k] * w[k, v]
// V provides: Elem, F (vector), W (lanes), zero, set1, load, store, stream (a store past the caches), fence, add, fma, activate,
// activate_to_bf16, load_bf16/f16, store_bf16/f16, bf16_pairs, bf16_per_lane (2 where it has bf16_lanes).

// Before each loop over a tile's sums: left to itself the compiler unrolls them too late to see that sums need no memory, and a tile then
// stores all of them twice.
#define SPARSE_PRUNE_UNROLL _Pragma("GCC unroll 16")

// Weights in the accumulator's own type, one input per step.
template <class V>
struct Plain {
  using Vec = V;
  using F = typename V::F;
  using X = typename V::Elem;
  using Wt = typename V::Elem;
  using Y = typename V::Elem;
  static constexpr int step = 1, parts = 1;
  static constexpr int64_t tile_steps = 1;  // for encoder_kernel.h
  static inline void weights(const Wt* w, F out[1]) { out[0] = V::load(w); }
  static inline F broadcast(const X* x, int) { return V::set1(*x); }
  static inline F broadcast_last(const X* x) { return V::set1(*x); }
  static inline F multiply_add(F x, F w, F acc) { return V::fma(x, w, acc); }
  static inline F load_y(const Y* y) { return V::load(y); }
  static inline void store_y(Y* y, F v) { V::store(y, v); }
  static inline void store_x(X* x, F v) { V::store(x, v); }
  static constexpr int per_lane = 1;  // of y, in four bytes
  static inline F lanes(const F (&v)[1]) { return v[0]; }
  static inline F exp2_nonpositive(F v) { return V::exp2_nonpositive(v); }
  static inline F activate(F v, Activation activation) { return V::activate(v, activation); }
  template <int NV>
  static inline void store_row(Y* y, const F (&v)[NV], bool past_cache) {
    for (int j = 0; j < NV; ++j) past_cache ? V::stream(y + j * V::W, v[j]) : V::store(y + j * V::W, v[j]);
  }
};

// float16 weights, converted as they are loaded; x was widened to float.
template <class V>
struct HalfWeights : Plain<V> {
  using F = typename V::F;
  using Wt = uint16_t;
  using Y = uint16_t;
  static constexpr int per_lane = 0;  // none of the instructions that lanes of two would need
  static inline void weights(const Wt* w, F out[1]) { out[0] = V::load_f16(w); }
  static inline F load_y(const Y* y) { return V::load_f16(y); }
  static inline void store_y(Y* y, F v) { V::store_f16(y, v); }
  template <int NV>
  static inline void store_row(Y* y, const F (&v)[NV], bool) {
    for (int j = 0; j < NV; ++j) V::store_f16(y + j * V::W, v[j]);
  }
};

// bfloat16 weights as pairs of inputs: one 32-bit lane holds (k, k + 1), so a shift and a mask give two float vectors.
template <class V>
struct Bf16Weights : Plain<V> {
  using F = typename V::F;
  using X = typename V::Elem;
  using Wt = uint16_t;
  using Y = uint16_t;
  static constexpr int step = 2, parts = 2, per_lane = V::bf16_per_lane;
  static inline F lanes(const F (&v)[2]) { return V::bf16_lanes(v[0], v[1]); }
  static inline void weights(const Wt* w, F out[2]) { V::bf16_pairs(w, out[0], out[1]); }
  static inline F broadcast(const X* x, int part) { return V::set1(x[part]); }
  static inline F activate(F v, Activation activation) { return V::activate_to_bf16(v, activation); }
  static inline F load_y(const Y* y) { return V::load_bf16(y); }
  static inline void store_y(Y* y, F v) { V::store_bf16(y, v); }
  template <int NV>
  static inline void store_row(Y* y, const F (&v)[NV], bool) {
    for (int j = 0; j < NV; ++j) V::store_bf16(y + j * V::W, v[j]);
  }
};

// Where a rectangle of y lies and what happens to it.
struct Finish {
  int64_t rows, cols, ldy;
  Activation activation;
  Pair pair = Pair::none;
};

// Where a tile goes: its first row and output in y, and what belongs there.
template <class Fmt>
struct Place {
  typename Fmt::Y* y;               // [MR, ld]
  const typename Fmt::Y* bias;      // [cols] or null
  const typename Fmt::Y* residual;  // [MR, ld] or null
  int64_t ld, cols;
  bool whole;                       // all NV vectors exist
  bool past_cache;                  // write whole lines of y past the caches
  int64_t ahead;                    // elements from a line of y to the one to fetch when it is written; 0: none
  bool multiply;                    // by the residual, where others add it
  bool fetch;                       // weights are not in L1 yet
  int64_t row, n;                   // of y, whose pointers above are meaningless where y has another dtype than Fmt's
};

template <class V, class Y>
inline void copy_edge(Y* to, const Y* from, int64_t count) {
  if constexpr (V::W == 16)
    V::copy(to, from, count);  // one masked instruction
  else
    for (int64_t j = 0; j < count; ++j) to[j] = from[j];
}

// The edge of a row: count values, and zeros up to a whole vector.
template <class Fmt>
inline typename Fmt::F load_edge(const typename Fmt::Y* from, int64_t count) {
  typename Fmt::Y edge[Fmt::Vec::W] = {};
  copy_edge<typename Fmt::Vec>(edge, from, count);
  return Fmt::load_y(edge);
}

// y[rows, cols] = act(z + bias) + residual (times it in the second of a pair); z has whole vectors, bias[cols] and residual may be null.
template <class Fmt>
void finish(const typename Fmt::Vec::Elem* z, int64_t ldz, const typename Fmt::Y* bias, const typename Fmt::Y* residual,
            typename Fmt::Y* y, const Finish& f) {
  using V = typename Fmt::Vec;
  using Y = typename Fmt::Y;
  for (int64_t n = 0; n < f.cols; n += V::W) {
    const int64_t count = f.cols - n;
    const bool whole = count >= V::W;
    typename V::F b = V::zero();  // [W]
    if (bias) b = whole ? Fmt::load_y(bias + n) : load_edge<Fmt>(bias + n, count);
    for (int64_t m = 0; m < f.rows; ++m) {
      typename V::F v = V::add(V::load(z + m * ldz + n), b);  // [W]
      if (f.activation != Activation::none) v = Fmt::activate(v, f.activation);
      Y* to = y + m * f.ldy + n;
      if (residual) {
        const Y* from = residual + m * f.ldy + n;
        const typename V::F r = whole ? Fmt::load_y(from) : load_edge<Fmt>(from, count);
        v = f.pair == Pair::second ? V::mul(v, r) : V::add(v, r);
      }
      if (whole) {
        Fmt::store_y(to, v);
      } else {
        Y edge[V::W];
        Fmt::store_y(edge, v);
        copy_edge<V>(to, edge, count);
      }
    }
  }
}

template <class Fmt>
void finish_as(const LinearArgs& a, const typename Fmt::Vec::Elem* z, int64_t ldz, int64_t row, int64_t n, int64_t rows, int64_t cols) {
  using Y = typename Fmt::Y;
  const int64_t first = row * a.N + n;
  finish<Fmt>(z, ldz, a.bias ? static_cast<const Y*>(a.bias) + n : nullptr, a.residual ? static_cast<const Y*>(a.residual) + first : nullptr,
              static_cast<Y*>(a.y) + first, {rows, cols, a.N, a.activation, a.pair});
}

// The same from row `row` and output n of a's y on, where its dtype is not that of x.
template <class V>
__attribute__((noinline)) void finish_converted(const LinearArgs& a, const typename V::Elem* z, int64_t ldz, int64_t row, int64_t n,
                                                int64_t rows, int64_t cols) {
  if constexpr (sizeof(typename V::Elem) == sizeof(float)) {
    if (a.out == DType::bf16) return finish_as<Bf16Weights<V>>(a, z, ldz, row, n, rows, cols);
    if (a.out == DType::f16) return finish_as<HalfWeights<V>>(a, z, ldz, row, n, rows, cols);
  }
  finish_as<Plain<V>>(a, z, ldz, row, n, rows, cols);
}

inline bool converts(const LinearArgs& a) { return a.out != a.dtype; }

inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
inline void prefetch_to_l2(const void* p) { __builtin_prefetch(p, 0, 2); }

// Processors without 512-bit vectors have 32 KiB of L1, often shared with another hardware thread: weights fetched far ahead would push out
// the x of the tile, which is all that is used again from there.
template <class V>
inline void prefetch_weights(const void* p) {
  V::registers >= 32 ? prefetch(p) : prefetch_to_l2(p);
}

template <class Fmt, int NV>
inline void load_bias(const Place<Fmt>& at, typename Fmt::F (&bias)[NV]) {
  SPARSE_PRUNE_UNROLL
  for (int v = 0; v < NV; ++v) bias[v] = at.bias ? Fmt::load_y(at.bias + v * Fmt::Vec::W) : Fmt::Vec::zero();
}

// z[vectors][W] = act(z). Out of line: activations are long, and there is a tile for each number of rows.
template <class Fmt>
__attribute__((noinline)) void activate_tile(typename Fmt::Vec::Elem* z, int vectors, Activation activation) {
  using V = typename Fmt::Vec;
  for (int i = 0; i < vectors; ++i, z += V::W) V::store(z, Fmt::activate(V::load(z), activation));
}

// Row m of a whole place from registers, after bias and activation. The place is a copy: through a reference, each store to y would have
// it read again for the next row.
template <class Fmt, int NV>
inline void finish_row(const Place<Fmt> at, int64_t m, typename Fmt::F (&sums)[NV]) {
  using V = typename Fmt::Vec;
  if (at.residual)
    SPARSE_PRUNE_UNROLL
    for (int v = 0; v < NV; ++v) {
      const typename Fmt::F r = Fmt::load_y(at.residual + m * at.ld + v * V::W);
      sums[v] = at.multiply ? V::mul(sums[v], r) : V::add(sums[v], r);
    }
  Fmt::template store_row<NV>(at.y + m * at.ld, sums, at.past_cache);
  // The next block-row's part of y: rows are too far apart for the hardware to fetch it in time. Into L2 only: rows that are a multiple
  // of 4 KiB apart would push each other out of L1.
  if (at.ahead)
    for (int64_t j = 0; j < NV * V::W; j += 64 / sizeof(typename Fmt::Y)) prefetch_to_l2(at.y + m * at.ld + at.ahead + j);
}

// Where MR rows of x lie. Many are kept as odd multiples of their distance, of which an address takes one, two, four or eight times: as
// pointers they would not fit 16 registers, and each step would load some of them again, from ports that broadcasts need.
template <class X, int MR, bool many>
struct Rows {
  int64_t ldx, apart[(MR + 1) / 2];  // elements, and odd multiples of them in bytes
  explicit Rows(int64_t ldx) : ldx(ldx) {
    SPARSE_PRUNE_UNROLL
    for (int i = 0; many && i < (MR + 1) / 2; ++i) {
      apart[i] = (2 * i + 1) * ldx * static_cast<int64_t>(sizeof(X));
      hide(apart[i]);
    }
  }
  inline const X* at(const X* first, int m) const {
    if (!many || m == 0) return first + m * ldx;
    int times = 1;
    for (; m % 2 == 0; m /= 2) times *= 2;
    return reinterpret_cast<const X*>(reinterpret_cast<const char*>(first) + times * apart[m / 2]);
  }
  // The compiler would see through it, and make pointers of multiples.
  template <class T>
  static inline void hide(T& value) {
    __asm__("" : "+r"(value));
  }
};

// One step: NV vectors of weights by MR broadcast inputs, for each of the parts that a weight vector holds.
template <class Fmt, int MR, int NV, bool many, class F>
inline void tile_step(const typename Fmt::X* x, const Rows<typename Fmt::X, MR, many>& rows, const typename Fmt::Wt* w, bool fetch,
                      F (&acc)[MR][NV]) {
  // Weights stream from L2, L3 or memory; the hardware's prefetcher stops at each 4 KiB page, this one does not. 8 KiB are 200 ns of
  // products of 8 rows: from memory, 3 KiB came too late.
  constexpr int64_t ahead = 8192 / sizeof(typename Fmt::Wt), line = 64 / sizeof(typename Fmt::Wt);
  if (fetch)
    for (int64_t j = 0; j < NV * Fmt::Vec::W * Fmt::step; j += line) prefetch_weights<typename Fmt::Vec>(w + ahead + j);
  F b[NV][Fmt::parts];
  SPARSE_PRUNE_UNROLL
  for (int v = 0; v < NV; ++v) Fmt::weights(w + v * Fmt::Vec::W * Fmt::step, b[v]);
  SPARSE_PRUNE_UNROLL
  for (int p = 0; p < Fmt::parts; ++p)
    SPARSE_PRUNE_UNROLL
    for (int m = 0; m < MR; ++m) {
      const F xv = Fmt::broadcast(rows.at(x, m), p);
      SPARSE_PRUNE_UNROLL
      for (int v = 0; v < NV; ++v) acc[m][v] = Fmt::multiply_add(xv, b[v][p], acc[m][v]);
    }
}

// One tile of a block-row with blocks [begin, end): x points at its first row, w at the first output of the strip.
template <class Fmt, int MR, int NV>
void linear_tile(const LinearArgs& a, const typename Fmt::X* x, int64_t ldx, const typename Fmt::Wt* w, int64_t begin, int64_t end,
                 const Place<Fmt>& place) {
  using V = typename Fmt::Vec;
  using F = typename V::F;
  const Place<Fmt> at = place;
  // An FMA takes 4 cycles and one or two start per cycle: few accumulators need several independent sums.
  constexpr int KU = MR * NV >= 8 ? 1 : (MR * NV >= 4 ? 2 : 4);
  constexpr int step = Fmt::step;
  // fp32 and fp16 weights of 512 bits: what a step takes beside its products is loads, and Intel's processors feel each. (Two parts of
  // bf16 leave no register for it.)
  constexpr bool many = MR > 8 && NV > 1 && V::registers >= 32 && Fmt::parts == 1 && std::is_same_v<typename Fmt::X, typename V::Elem>;
  // Steps: wide tiles leave the loop's own instructions too little room. Two of pairs would want more addresses than 16 registers hold.
  constexpr int unrolled = KU == 1 && NV > 1 && !many && (Fmt::parts == 1 || V::registers >= 32) ? 2 : KU;
  constexpr int64_t x_line = 64 / sizeof(typename Fmt::X);
  F acc[KU][MR][NV];  // [KU][MR][NV * W]
  SPARSE_PRUNE_UNROLL
  for (int u = 0; u < KU; ++u)
    SPARSE_PRUNE_UNROLL
    for (int m = 0; m < MR; ++m)
      SPARSE_PRUNE_UNROLL
      for (int v = 0; v < NV; ++v) acc[u][m][v] = V::zero();
  // Where y keeps the sum's full precision, sums are closed every 256 inputs, as a blocked matmul does, to keep their error, and those of
  // a row or two every 64, since a product of vectors, which has lanes of inputs, errs less; a 16-bit y hides that error, so its sums
  // run through.
  constexpr bool in_parts = sizeof(typename Fmt::Y) == sizeof(typename V::Elem);
  constexpr int64_t part = KU > 1 ? 64 : 256;
  alignas(64) typename V::Elem z[MR * NV * V::W];                   // [MR][NV * W], what was closed
  // Held in registers they would be spilled: 12 loads and 12 stores for each tile, of which most never close a sum.
  if constexpr (in_parts && V::registers < 32) __asm__ volatile("" : : "r"(z) : "memory");
  bool closed = false;
  int64_t open = 0;                                                 // inputs summed since the last closing
  const int64_t ldw = a.R * step;                                   // weights of one step
  const int64_t block_size = (a.C + step - 1) / step * ldw;
  const Rows<typename Fmt::X, MR, many> rows(ldx);
  const bool fetch = V::registers < 32 || at.fetch;
  for (int64_t e = begin; e < end; ++e) {
    const int64_t k0 = a.col[e] * a.C;
    const int64_t inputs = a.K - k0 < a.C ? a.K - k0 : a.C;
    const typename Fmt::X* xb = x + k0;                             // [MR, inputs]
    const typename Fmt::Wt* wb = w + (a.block ? a.block[e] : e) * block_size;  // [inputs / step][R][step]
    if (e + 1 < end) {  // the next block's x is anywhere in the row, which no hardware prefetcher can know
      const typename Fmt::X* next = x + a.col[e + 1] * a.C;
      for (int64_t j = 0; j < a.C; j += x_line)
        SPARSE_PRUNE_UNROLL
        for (int m = 0; m < MR; ++m) prefetch(next + m * ldx + j);
    }
    if (in_parts && (open += inputs) > part) {
      SPARSE_PRUNE_UNROLL
      for (int m = 0; m < MR; ++m)
        SPARSE_PRUNE_UNROLL
        for (int v = 0; v < NV; ++v) {
          F sum = closed ? V::load(z + (m * NV + v) * V::W) : V::zero();
          SPARSE_PRUNE_UNROLL
          for (int u = 0; u < KU; ++u) {
            sum = V::add(sum, acc[u][m][v]);
            acc[u][m][v] = V::zero();
          }
          V::store(z + (m * NV + v) * V::W, sum);
        }
      closed = true;
      open = inputs;
    }
    int64_t k = 0;
    for (; k + unrolled * step <= inputs; k += unrolled * step) {
      const typename Fmt::X* xk = xb + k;
      if constexpr (many) rows.hide(xk);
      SPARSE_PRUNE_UNROLL
      for (int u = 0; u < unrolled; ++u, wb += ldw) tile_step<Fmt, MR, NV>(xk + u * step, rows, wb, fetch, acc[u % KU]);
    }
    if (unrolled > 1)
      for (; k + step <= inputs; k += step, wb += ldw) tile_step<Fmt, MR, NV>(xb + k, rows, wb, fetch, acc[0]);
    if (step > 1 && k < inputs) {  // an odd input: its pair's other half is not x of this block
      F b[NV][Fmt::parts];
      SPARSE_PRUNE_UNROLL
      for (int v = 0; v < NV; ++v) Fmt::weights(wb + v * V::W * step, b[v]);
      SPARSE_PRUNE_UNROLL
      for (int m = 0; m < MR; ++m) {
        const F xv = Fmt::broadcast_last(xb + m * ldx + k);
        SPARSE_PRUNE_UNROLL
        for (int v = 0; v < NV; ++v) acc[0][m][v] = Fmt::multiply_add(xv, b[v][0], acc[0][m][v]);
      }
    }
  }
  SPARSE_PRUNE_UNROLL
  for (int u = 1; u < KU; ++u)
    SPARSE_PRUNE_UNROLL
    for (int m = 0; m < MR; ++m)
      SPARSE_PRUNE_UNROLL
      for (int v = 0; v < NV; ++v) acc[0][m][v] = V::add(acc[0][m][v], acc[u][m][v]);
  if (in_parts && closed)
    SPARSE_PRUNE_UNROLL
    for (int m = 0; m < MR; ++m)
      SPARSE_PRUNE_UNROLL
      for (int v = 0; v < NV; ++v) acc[0][m][v] = V::add(acc[0][m][v], V::load(z + (m * NV + v) * V::W));
  const bool converted = converts(a);
  if (at.whole && !converted) {
    F bias[NV];
    load_bias<Fmt>(at, bias);
    SPARSE_PRUNE_UNROLL
    for (int m = 0; m < MR; ++m)
      SPARSE_PRUNE_UNROLL
      for (int v = 0; v < NV; ++v) acc[0][m][v] = V::add(acc[0][m][v], bias[v]);
    if (a.activation == Activation::none) {  // straight from the registers
      SPARSE_PRUNE_UNROLL
      for (int m = 0; m < MR; ++m) finish_row<Fmt>(at, m, acc[0][m]);
      return;
    }
  }
  SPARSE_PRUNE_UNROLL
  for (int m = 0; m < MR; ++m)
    SPARSE_PRUNE_UNROLL
    for (int v = 0; v < NV; ++v) V::store(z + (m * NV + v) * V::W, acc[0][m][v]);
  if (converted) return finish_converted<V>(a, z, NV * V::W, at.row, at.n, MR, at.cols);
  if (!at.whole) return finish<Fmt>(z, NV * V::W, at.bias, at.residual, at.y, {MR, at.cols, at.ld, a.activation, a.pair});
  activate_tile<Fmt>(z, MR * NV, a.activation);
  for (int m = 0; m < MR; ++m) {
    F sums[NV];
    SPARSE_PRUNE_UNROLL
    for (int v = 0; v < NV; ++v) sums[v] = V::load(z + (m * NV + v) * V::W);
    finish_row<Fmt>(at, m, sums);
  }
}

template <class Fmt, int NV>
constexpr int max_rows() {
  constexpr int registers = Fmt::Vec::registers;
  constexpr int rows = (registers - 1 - NV * Fmt::parts - (Fmt::parts > 1 ? 1 : 0)) / NV;
  return rows < 14 ? rows : 14;
}

// What for_each_tile wants to know of a kind of tile: W lanes, registers, the most rows of NV vectors, and the function for MR of them.
template <class Fmt>
struct LinearTiles {
  using Fn = void (*)(const LinearArgs&, const typename Fmt::X*, int64_t, const typename Fmt::Wt*, int64_t, int64_t, const Place<Fmt>&);
  static constexpr int W = Fmt::Vec::W, registers = Fmt::Vec::registers;
  template <int NV>
  static constexpr int rows = max_rows<Fmt, NV>();
  template <int MR, int NV>
  static constexpr Fn tile = linear_tile<Fmt, MR, NV>;
};

// The tiles of strips of NV vectors, by their rows - 1.
template <class Kind, int NV>
struct Strip {
  static constexpr int most = Kind::template rows<NV>;
  typename Kind::Fn tile[most];
  template <int... MR>
  constexpr Strip(std::integer_sequence<int, MR...>) : tile{Kind::template tile<MR + 1, NV>...} {}
  constexpr Strip() : Strip(std::make_integer_sequence<int, most>()) {}
};

// One past the last block-row from i on whose weights stay in L2 (256 KiB of it) while all rows of x pass over them.
inline int64_t group_end(const LinearArgs& a, int64_t i, int64_t i1, int64_t weight_bytes) {
  const int64_t blocks = (256 << 10) / (a.R * a.C * weight_bytes);
  int64_t g = i + 1;
  while (g < i1 && a.crow[g + 1] - a.crow[i] <= blocks) ++g;
  return g;
}

// A y that would not stay in a shared cache until it is read goes past them, which saves reading its lines first; a smaller one that
// does stay is read again sooner, and that of a pair at once. Measured on the pair of an FFN with 32 MiB of shared L3: at 12 MiB it loses.
template <class Fmt>
bool writes_past_cache(const LinearArgs& a) {
  constexpr int64_t line = 64, y_bytes = sizeof(typename Fmt::Y);
  const bool whole_lines = reinterpret_cast<uintptr_t>(a.y) % line == 0 && a.N * y_bytes % line == 0 && a.R * y_bytes % line == 0;
  return a.pair == Pair::none && !converts(a) && whole_lines && a.M * a.N * y_bytes >= 16 << 20;
}

// Nearly equal parts of `rows`, none larger than `most`: 16 rows are 8 + 8, not 14 + 2.
struct Parts {
  int64_t count, low, longer;  // the first `longer` parts have low + 1 rows
  Parts(int64_t rows, int64_t most) : count((rows + most - 1) / most), low(count ? rows / count : 0), longer(rows - low * count) {}
};

// Calls run(tile, m, i, n, cols, whole, first) for the tiles of rows [m0, m1) of block-rows [i0, i1): from row m0 + m and output n of
// block-row i on, of which cols exist; whole says that all do, first that those weights were not used just before.
// A group of block-rows is finished for one panel of rows before the next panel, so that rows of y are written along, not down: they
// are often a multiple of 4 KiB apart.
template <class Kind, class Run>
void for_each_tile(const LinearArgs& a, int64_t weight_bytes, int64_t m0, int64_t m1, int64_t i0, int64_t i1, const Run& run) {
  constexpr int W = Kind::W;
  constexpr bool many = Kind::registers >= 32;
  static constexpr Strip<Kind, 1> one;
  static constexpr Strip<Kind, 2> two;
  static constexpr Strip<Kind, 4> wide;
  // In 16 registers strips of four vectors leave room for one or two rows of x, whose weights then stream from memory in longer pieces.
  const bool has_wide = a.R >= 4 * W && (many || m1 - m0 <= wide.most);
  // Panels are whole tiles high, of the strips that R is made of, and nearly equal.
  // Four tiles a panel: the blocks of a row are then found, and the branches that follow their number learnt, once for all four. With
  // 16 registers one: its x stays in 32 KiB of L1 over a group of block-rows, and its few rows of y are streams that hardware follows.
  const Parts panels(m1 - m0, (many ? 4 : 1) * (has_wide ? wide.most : two.most));
  for (int64_t g0 = i0, g1; g0 < i1; g0 = g1) {
    g1 = group_end(a, g0, i1, weight_bytes);
    for (int64_t p = 0, from = 0, high; p < panels.count; ++p, from += high) {
      high = panels.low + (p < panels.longer);
      const Parts by_one(high, one.most), by_two(high, two.most), by_wide(high, wide.most);
      for (int64_t i = g0; i < g1; ++i) {
        const int64_t row_end = (i + 1) * a.R < a.N ? (i + 1) * a.R : a.N;
        for (int64_t n = i * a.R, cols; n < row_end; n += cols) {
          const int64_t left = row_end - n;
          const int vectors = has_wide && left >= 4 * W ? 4 : (left > W ? 2 : 1);
          const typename Kind::Fn* tile = vectors == 4 ? wide.tile : (vectors == 2 ? two.tile : one.tile);
          const Parts& parts = vectors == 4 ? by_wide : (vectors == 2 ? by_two : by_one);
          cols = left < vectors * W ? left : vectors * W;
          for (int64_t t = 0, m = from, rows; t < parts.count; ++t, m += rows) {
            rows = parts.low + (t < parts.longer);
            run(tile[rows - 1], m, i, n, cols, cols == vectors * W, t == 0);
          }
        }
      }
    }
  }
}

// Lines of a y that stays in L2 between calls need no fetching: there it costs up to 5%.
template <class Fmt>
bool fetches_ahead(const LinearArgs& a) {
  return a.M * a.N * static_cast<int64_t>(sizeof(typename Fmt::Y)) > 1 << 20 && !writes_past_cache<Fmt>(a) && !converts(a);
}

#include "token_tile.h"

// Rows [m0, m1) of block-rows [i0, i1). x is a.x, or its rows widened to float, as X with ldx elements per row, starting at row m0.
template <class Fmt>
void linear_range(const LinearArgs& a, const typename Fmt::X* x, int64_t ldx, int64_t m0, int64_t m1, int64_t i0, int64_t i1) {
  using Y = typename Fmt::Y;
  const bool past_cache = writes_past_cache<Fmt>(a), ahead = fetches_ahead<Fmt>(a);
  if constexpr (Fmt::Vec::registers >= 32 && std::is_same_v<typename Fmt::X, typename Fmt::Wt>) {
    if (lanes_are_tokens(a, Fmt::step, Fmt::Vec::W, m1 - m0, i0, i1)) {
      token_linear<Fmt>(a, x, ldx, m0, m1, i0, i1, past_cache, ahead);
      if (past_cache) Fmt::Vec::fence();
      return;
    }
  }
  for_each_tile<LinearTiles<Fmt>>(a, sizeof(typename Fmt::Wt), m0, m1, i0, i1,
                                  [&](auto tile, int64_t m, int64_t i, int64_t n, int64_t cols, bool whole, bool first) {
    const int64_t offset = (m0 + m) * a.N + n;
    tile(a, x + m * ldx, ldx, static_cast<const typename Fmt::Wt*>(a.w) + (n - i * a.R) * Fmt::step, a.crow[i], a.crow[i + 1],
         {static_cast<Y*>(a.y) + offset, a.bias ? static_cast<const Y*>(a.bias) + n : nullptr,
          a.residual ? static_cast<const Y*>(a.residual) + offset : nullptr, a.N, cols, whole, past_cache,
          ahead ? a.R : 0, a.pair == Pair::second, first, m0 + m, n});
  });
  if (past_cache) Fmt::Vec::fence();
}

template <class V>
void linear_plain(const LinearArgs& a, int64_t m0, int64_t m1, int64_t i0, int64_t i1) {
  const auto* x = static_cast<const typename V::Elem*>(a.x) + m0 * a.ldx;
  linear_range<Plain<V>>(a, x, a.ldx, m0, m1, i0, i1);
}

// 16-bit x, widened to float once per range: N*density products use each element, so the copy is cheap.
template <class V>
void linear_widened(const LinearArgs& a, int64_t m0, int64_t m1, int64_t i0, int64_t i1) {
  const auto* x = static_cast<const uint16_t*>(a.x) + m0 * a.ldx;
  const int64_t ld = (a.K + V::W - 1) / V::W * V::W;
  float* wide = static_cast<float*>(thread_scratch(sizeof(float) * ld * (m1 - m0)));  // [m1 - m0, ld]
  const bool half = a.dtype == DType::f16;
  for (int64_t m = 0; m < m1 - m0; ++m) {
    int64_t k = 0;
    for (; k + V::W <= a.K; k += V::W) {
      const uint16_t* from = x + m * a.ldx + k;
      V::store(wide + m * ld + k, half ? V::load_f16(from) : V::load_bf16(from));
    }
    if (k < a.K) {
      uint16_t edge[V::W] = {};
      for (int64_t j = k; j < a.K; ++j) edge[j - k] = x[m * a.ldx + j];
      V::store(wide + m * ld + k, half ? V::load_f16(edge) : V::load_bf16(edge));
    }
  }
  if (half)
    linear_range<HalfWeights<V>>(a, wide, ld, m0, m1, i0, i1);
  else
    linear_range<Bf16Weights<V>>(a, wide, ld, m0, m1, i0, i1);
}

template <class V>
void linear_any(const LinearArgs& a, int64_t m0, int64_t m1, int64_t i0, int64_t i1) {
  if (a.dtype == DType::f32)
    linear_plain<V>(a, m0, m1, i0, i1);
  else
    linear_widened<V>(a, m0, m1, i0, i1);
}

// sum over M of dy[m, r] * x[m, c] for MR rows r and NV vectors of c, added to total[MR, NV * W].
template <class Fmt, int MR, int NV>
void sdd_tile(const typename Fmt::X* dy, int64_t ld_dy, const typename Fmt::Wt* x, int64_t ldx, int64_t steps,
              typename Fmt::Vec::Elem* total) {
  using V = typename Fmt::Vec;
  using F = typename V::F;
  F acc[MR][NV];  // [MR][NV * W]
  SPARSE_PRUNE_UNROLL
  for (int m = 0; m < MR; ++m)
    SPARSE_PRUNE_UNROLL
    for (int v = 0; v < NV; ++v) acc[m][v] = V::zero();
  for (int64_t k = 0; k < steps; ++k) {
    F b[NV][1];
    SPARSE_PRUNE_UNROLL
    for (int v = 0; v < NV; ++v) Fmt::weights(x + v * V::W * Fmt::step, b[v]);
    SPARSE_PRUNE_UNROLL
    for (int m = 0; m < MR; ++m) {
      const F a = Fmt::broadcast(dy + m * Fmt::step, 0);
      SPARSE_PRUNE_UNROLL
      for (int v = 0; v < NV; ++v) acc[m][v] = Fmt::multiply_add(a, b[v][0], acc[m][v]);
    }
    x += ldx;
    dy += ld_dy;
  }
  SPARSE_PRUNE_UNROLL
  for (int m = 0; m < MR; ++m)
    SPARSE_PRUNE_UNROLL
    for (int v = 0; v < NV; ++v) {
      typename V::Elem* to = total + (m * NV + v) * V::W;
      V::store(to, V::add(V::load(to), acc[m][v]));
    }
}

// Panel is how dy and x are stored (Plain, or pairs for native bf16), Out how dvalues are.
template <class Panel, class Out>
void sdd_range(const SddArgs& a, int64_t i0, int64_t i1) {
  using V = typename Panel::Vec;
  // 8 rows and 2 vectors leave registers for loads.
  constexpr int MR = V::registers >= 32 ? 8 : 4, NV = 2;
  constexpr int64_t width = NV * V::W, tile = MR * width;
  // All tiles of a block take the same few tokens before the next ones, for those of both panels to stay in 24 KiB of L1 meanwhile. A
  // tile's sums are closed with them, at least every 512 tokens, which also keeps their error.
  constexpr int64_t token_bytes = sizeof(typename Panel::X), most = 512 / Panel::step;
  const int64_t fit = (24 << 10) / ((a.R + a.C) * Panel::step * token_bytes) / 8 * 8;
  const int64_t chunk = fit > most ? most : (fit < 32 ? 32 : fit);
  const int64_t steps = (a.M + Panel::step - 1) / Panel::step;
  const int64_t ld_dy = a.R * Panel::step, ldx = a.C * Panel::step;
  const auto* dy_panels = static_cast<const typename Panel::X*>(a.dy_panels);
  const auto* x_panels = static_cast<const typename Panel::Wt*>(a.x_panels);
  auto* out = static_cast<typename Out::Y*>(a.dvalues);
  const int64_t tiles = (a.R + MR - 1) / MR * ((a.C + width - 1) / width);
  auto* sums = static_cast<typename V::Elem*>(thread_scratch(sizeof(typename V::Elem) * tiles * tile));  // [tiles][MR][width]
  for (int64_t i = i0; i < i1; ++i) {
    for (int64_t e = a.crow[i]; e < a.crow[i + 1]; ++e) {
      const auto* dy = dy_panels + i * steps * ld_dy;             // [steps][R][step]
      const auto* x = x_panels + a.col[e] * steps * ldx;          // [steps][C][step]
      for (int64_t j = 0; j < tiles * tile; j += V::W) V::store(sums + j, V::zero());
      for (int64_t k = 0; k < steps; k += chunk) {
        typename V::Elem* to = sums;
        for (int64_t r = 0; r < a.R; r += MR)
          for (int64_t c = 0; c < a.C; c += width, to += tile)
            sdd_tile<Panel, MR, NV>(dy + k * ld_dy + r * Panel::step, ld_dy, x + k * ldx + c * Panel::step, ldx,
                                    steps - k < chunk ? steps - k : chunk, to);
      }
      const typename V::Elem* from = sums;
      for (int64_t r = 0; r < a.R; r += MR)
        for (int64_t c = 0; c < a.C; c += width, from += tile) {
          const int64_t rows = a.R - r < MR ? a.R - r : MR, cols = a.C - c < width ? a.C - c : width;
          finish<Out>(from, width, nullptr, nullptr, out + e * a.R * a.C + r * a.C + c, {rows, cols, a.C, Activation::none});
        }
    }
  }
}

template <class V>
void sdd_any(const SddArgs& a, int64_t i0, int64_t i1) {
  if (a.dtype == DType::f32)
    sdd_range<Plain<V>, Plain<V>>(a, i0, i1);
  else if (a.dtype == DType::bf16)
    sdd_range<Plain<V>, Bf16Weights<V>>(a, i0, i1);
  else
    sdd_range<Plain<V>, HalfWeights<V>>(a, i0, i1);
}

// Rows of 16-bit or V's own elements -> panels of V's elements. Load is the format whose load_y reads the matrix.
template <class Load>
void panels_of(const PanelArgs& a, int64_t p0, int64_t p1) {
  using V = typename Load::Vec;
  const auto* matrix = static_cast<const typename Load::Y*>(a.matrix);
  for (int64_t p = p0; p < p1; ++p) {
    const int64_t valid = a.width - p * a.block < a.block ? a.width - p * a.block : a.block;
    auto* to = static_cast<typename V::Elem*>(a.panels) + p * a.M * a.block;
    for (int64_t m = 0; m < a.M; ++m, to += a.block) {
      const typename Load::Y* from = matrix + m * a.ld + p * a.block;
      int64_t j = 0;
      for (; j + V::W <= valid; j += V::W) V::store(to + j, Load::load_y(from + j));
      if (j < a.block) {
        typename Load::Y edge[V::W] = {};
        for (int64_t t = j; t < valid; ++t) edge[t - j] = from[t];
        typename V::Elem wide[V::W];
        V::store(wide, Load::load_y(edge));
        for (int64_t t = j; t < a.block; ++t) to[t] = t < valid ? wide[t - j] : 0;
      }
    }
  }
}

template <class V>
void panels_any(const PanelArgs& a, int64_t p0, int64_t p1) {
  if (a.dtype == DType::f32)
    panels_of<Plain<V>>(a, p0, p1);
  else if (a.dtype == DType::bf16)
    panels_of<Bf16Weights<V>>(a, p0, p1);
  else
    panels_of<HalfWeights<V>>(a, p0, p1);
}
