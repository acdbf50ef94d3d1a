// The int8 product that every vector instruction set shares, like tile_kernel.h, whose formats it uses to load and store floats.
// Included inside an unnamed namespace, after tile_kernel.h.
//
// Dot provides: Vec (float vectors for what follows the sums, with from_int32 and store_quantized beside what
// tile_kernel.h wants), I (a vector of W int32), B (a broadcast group of 4 inputs), uses_offsets, zero, load, store, add, to_float, weights,
// broadcast and dot: acc[n] += sum over j < 4 of x[j] * w[n, j].

constexpr int kMostInt8Rows = 14;  // of a tile

// One step of 4 inputs: NV vectors of weights by MR groups of x.
template <class Dot, int MR, int NV>
inline void int8_step(const uint8_t* x, int64_t ldx, const int8_t* w, typename Dot::I (&acc)[MR][NV]) {
  constexpr int64_t bytes = Dot::Vec::W * kInt8Step;
  for (int64_t j = 0; j < NV * bytes; j += 64) prefetch_weights<typename Dot::Vec>(w + 3072 + j);  // across the 4 KiB pages where hardware stops
  typename Dot::I b[NV];  // [NV][W][4]
  SPARSE_PRUNE_UNROLL
  for (int v = 0; v < NV; ++v) b[v] = Dot::weights(w + v * bytes);
  SPARSE_PRUNE_UNROLL
  for (int m = 0; m < MR; ++m) {
    const typename Dot::B xv = Dot::broadcast(x + m * ldx);  // [4]
    SPARSE_PRUNE_UNROLL
    for (int v = 0; v < NV; ++v) acc[m][v] = Dot::dot(acc[m][v], xv, b[v]);
  }
}

// y[m.., n..] = act(z * w_scales[n..] * x_scales[m..] + bias) + residual (times it in the second of a pair) for a rectangle of y; z has
// whole vectors.
template <class Out>
void int8_finish_as(const Int8Args& a, const int32_t* z, int64_t ldz, int64_t m0, int64_t n0, int64_t rows, int64_t cols) {
  using V = typename Out::Vec;
  using Y = typename Out::Y;
  const float* w_scales = a.w_scales + n0;
  const Y* bias = a.bias ? static_cast<const Y*>(a.bias) + n0 : nullptr;
  for (int64_t m = 0; m < rows; ++m) {
    const typename V::F x_scale = V::set1(a.x_scales[m0 + m]);
    Y* to = static_cast<Y*>(a.y) + (m0 + m) * a.N + n0;                                                        // [cols]
    const Y* from = a.residual ? static_cast<const Y*>(a.residual) + (m0 + m) * a.N + n0 : nullptr;            // [cols]
    for (int64_t n = 0; n < cols; n += V::W) {
      const int64_t count = cols - n;
      const bool whole = count >= V::W;
      typename V::F v = V::mul(V::from_int32(z + m * ldz + n), whole ? V::load(w_scales + n) : load_edge<Plain<V>>(w_scales + n, count));
      v = V::mul(v, x_scale);  // [W]
      if (bias) v = V::add(v, whole ? Out::load_y(bias + n) : load_edge<Out>(bias + n, count));
      if (a.activation != Activation::none) v = Out::activate(v, a.activation);
      if (from) {
        const typename V::F r = whole ? Out::load_y(from + n) : load_edge<Out>(from + n, count);
        v = a.pair == Pair::second ? V::mul(v, r) : V::add(v, r);
      }
      if (whole) {
        Out::store_y(to + n, v);
      } else {
        Y edge[V::W];
        Out::store_y(edge, v);
        for (int64_t j = 0; j < count; ++j) to[n + j] = edge[j];
      }
    }
  }
}

template <class V>
void int8_finish(const Int8Args& a, const int32_t* z, int64_t ldz, int64_t m0, int64_t n0, int64_t rows, int64_t cols) {
  if (a.out == DType::f32)
    int8_finish_as<Plain<V>>(a, z, ldz, m0, n0, rows, cols);
  else if (a.out == DType::bf16)
    int8_finish_as<Bf16Weights<V>>(a, z, ldz, m0, n0, rows, cols);
  else
    int8_finish_as<HalfWeights<V>>(a, z, ldz, m0, n0, rows, cols);
}

// A row of whole vectors, scaled and activated, on its way to y; residual (null: none) and y begin at it.
template <class Out, int NV>
inline void int8_write_row(typename Out::Vec::F (&row)[NV], const typename Out::Y* residual, bool multiplies, typename Out::Y* y, int64_t ahead) {
  using V = typename Out::Vec;
  if (residual)
    SPARSE_PRUNE_UNROLL
    for (int v = 0; v < NV; ++v) {
      const typename V::F r = Out::load_y(residual + v * V::W);
      row[v] = multiplies ? V::mul(row[v], r) : V::add(row[v], r);
    }
  Out::template store_row<NV>(y, row, false);
  // The next block-row's part of y, as in linear_tile.
  for (int64_t j = 0; j < NV * V::W; j += 64 / static_cast<int64_t>(sizeof(typename Out::Y))) prefetch_to_l2(y + ahead + j);
}

// The same for a tile of whole vectors without activation, from its registers.
template <class Dot, class Out, int MR, int NV>
inline void int8_finish_sums(const Int8Args& a, typename Dot::I (&sum)[MR][NV], int64_t m0, int64_t n) {
  using V = typename Out::Vec;
  using Y = typename Out::Y;
  typename V::F scale[NV], bias[NV];
  SPARSE_PRUNE_UNROLL
  for (int v = 0; v < NV; ++v) {
    scale[v] = V::load(a.w_scales + n + v * V::W);
    bias[v] = a.bias ? Out::load_y(static_cast<const Y*>(a.bias) + n + v * V::W) : V::zero();
  }
  // Copies that nothing written to y can be part of, for the compiler to keep in registers.
  const int64_t ld = a.N, first = m0 * ld + n, block = a.R;
  const bool multiplies = a.pair == Pair::second;
  const float* x_scales = a.x_scales + m0;                                                  // [MR]
  const Y* residual = a.residual ? static_cast<const Y*>(a.residual) + first : nullptr;     // [MR, ld]
  Y* y = static_cast<Y*>(a.y) + first;                                                      // [MR, ld]
  SPARSE_PRUNE_UNROLL
  for (int m = 0; m < MR; ++m) {
    const typename V::F x_scale = V::set1(x_scales[m]);
    typename V::F row[NV];  // [NV * W]
    SPARSE_PRUNE_UNROLL
    for (int v = 0; v < NV; ++v) row[v] = V::add(V::mul(V::mul(Dot::to_float(sum[m][v]), scale[v]), x_scale), bias[v]);
    int8_write_row<Out, NV>(row, residual ? residual + m * ld : nullptr, multiplies, y + m * ld, block);
  }
}

// The same with an activation, for sums[rows][NV * W] in memory. Out of line, like activate_tile.
template <class Out, int NV>
__attribute__((noinline)) void int8_finish_activated(const Int8Args& a, const int32_t* sums, int rows, int64_t m0, int64_t n) {
  using V = typename Out::Vec;
  using Y = typename Out::Y;
  constexpr int W = V::W;
  alignas(64) float z[kMostInt8Rows * NV * W];  // [rows][NV * W]
  for (int v = 0; v < NV; ++v) {
    const typename V::F scale = V::load(a.w_scales + n + v * W);
    const typename V::F bias = a.bias ? Out::load_y(static_cast<const Y*>(a.bias) + n + v * W) : V::zero();
    for (int at = v * W, m = 0; m < rows; ++m, at += NV * W)
      V::store(z + at, V::add(V::mul(V::mul(V::from_int32(sums + at), scale), V::set1(a.x_scales[m0 + m])), bias));
  }
  activate_tile<Out>(z, rows * NV, a.activation);
  const int64_t ld = a.N, first = m0 * ld + n;
  for (int m = 0; m < rows; ++m) {
    typename V::F row[NV];  // [NV * W]
    SPARSE_PRUNE_UNROLL
    for (int v = 0; v < NV; ++v) row[v] = V::load(z + (m * NV + v) * W);
    const Y* residual = a.residual ? static_cast<const Y*>(a.residual) + first + m * ld : nullptr;
    int8_write_row<Out, NV>(row, residual, a.pair == Pair::second, static_cast<Y*>(a.y) + first + m * ld, a.R);
  }
}

// The same for any tile: rows from m0 and outputs from n on, of which cols exist.
template <class Dot, class Out, int MR, int NV>
inline void int8_finish_tile_as(const Int8Args& a, typename Dot::I (&sum)[MR][NV], int64_t m0, int64_t n, int64_t cols) {
  constexpr int W = Out::Vec::W;
  const bool whole = cols == NV * W;
  if (whole && a.activation == Activation::none) return int8_finish_sums<Dot, Out, MR, NV>(a, sum, m0, n);
  alignas(64) int32_t z[MR * NV * W];  // [MR][NV * W]
  SPARSE_PRUNE_UNROLL
  for (int m = 0; m < MR; ++m)
    SPARSE_PRUNE_UNROLL
    for (int v = 0; v < NV; ++v) Dot::store(z + (m * NV + v) * W, sum[m][v]);
  whole ? int8_finish_activated<Out, NV>(a, z, MR, m0, n) : int8_finish_as<Out>(a, z, NV * W, m0, n, MR, cols);
}

template <class Dot, int MR, int NV>
inline void int8_finish_tile(const Int8Args& a, typename Dot::I (&sum)[MR][NV], int64_t m0, int64_t n, int64_t cols) {
  using V = typename Dot::Vec;
  if (a.out == DType::f32) return int8_finish_tile_as<Dot, Plain<V>>(a, sum, m0, n, cols);
  if (a.out == DType::bf16) return int8_finish_tile_as<Dot, Bf16Weights<V>>(a, sum, m0, n, cols);
  return int8_finish_tile_as<Dot, HalfWeights<V>>(a, sum, m0, n, cols);
}

// One tile, rows from m and outputs from n of block-row i, of which cols exist.
template <class Dot, int MR, int NV>
void int8_tile(const Int8Args& a, int64_t m0, int64_t i, int64_t n, int64_t cols) {
  using I = typename Dot::I;
  constexpr int W = Dot::Vec::W;
  constexpr int KU = MR * NV >= 8 ? 1 : (MR * NV >= 4 ? 2 : 4);  // a product takes 4 cycles: few sums need several independent parts
  const auto* x = static_cast<const uint8_t*>(a.x) + m0 * a.ldx;                     // [MR, K]
  const auto* w = static_cast<const int8_t*>(a.w) + (n - i * a.R) * kInt8Step;
  const int32_t* offsets = a.offsets + n;
  I acc[KU][MR][NV];  // [KU][MR][NV * W]
  SPARSE_PRUNE_UNROLL
  for (int u = 0; u < KU; ++u)
    SPARSE_PRUNE_UNROLL
    for (int m = 0; m < MR; ++m)
      SPARSE_PRUNE_UNROLL
      for (int v = 0; v < NV; ++v) acc[u][m][v] = Dot::uses_offsets && u == 0 ? Dot::load(offsets + v * W) : Dot::zero();
  const int64_t steps = (a.C + kInt8Step - 1) / kInt8Step, ldw = a.R * kInt8Step, end = a.crow[i + 1];
  for (int64_t e = a.crow[i]; e < end; ++e) {
    const uint8_t* xb = x + a.col[e] * a.C;               // [MR, C]
    const int8_t* wb = w + e * steps * ldw;               // [steps][R][4]
    if (e + 1 < end) {
      const uint8_t* next = x + a.col[e + 1] * a.C;
      for (int64_t j = 0; j < a.C; j += 64)
        SPARSE_PRUNE_UNROLL
        for (int m = 0; m < MR; ++m) prefetch(next + m * a.ldx + j);
    }
    int64_t k = 0;
    for (; k + KU <= steps; k += KU)
      SPARSE_PRUNE_UNROLL
      for (int u = 0; u < KU; ++u, wb += ldw) int8_step<Dot, MR, NV>(xb + (k + u) * kInt8Step, a.ldx, wb, acc[u]);
    if (KU > 1)
      for (; k < steps; ++k, wb += ldw) int8_step<Dot, MR, NV>(xb + k * kInt8Step, a.ldx, wb, acc[0]);
  }
  SPARSE_PRUNE_UNROLL
  for (int u = 1; u < KU; ++u)
    SPARSE_PRUNE_UNROLL
    for (int m = 0; m < MR; ++m)
      SPARSE_PRUNE_UNROLL
      for (int v = 0; v < NV; ++v) acc[0][m][v] = Dot::add(acc[0][m][v], acc[u][m][v]);
  int8_finish_tile<Dot>(a, acc[0], m0, n, cols);
}

// Rows of a tile: what is left of the registers after NV vectors of weights and Dot::spare for a group of x and for dot itself.
template <class Dot, int NV>
constexpr int int8_rows() {
  constexpr int rows = (Dot::Vec::registers - NV - Dot::spare) / NV;
  return rows < kMostInt8Rows ? rows : kMostInt8Rows;
}

template <class Dot>
struct Int8Tiles {
  using Fn = void (*)(const Int8Args&, int64_t, int64_t, int64_t, int64_t);
  static constexpr int W = Dot::Vec::W, registers = Dot::Vec::registers;
  template <int NV>
  static constexpr int rows = int8_rows<Dot, NV>();
  template <int MR, int NV>
  static constexpr Fn tile = int8_tile<Dot, MR, NV>;
};

// token_tile.h for bytes: a lane of x is four unsigned ones, and sums start at their output's offset.
template <class Dot>
struct ByteLanes {
  using V = typename Dot::Vec;
  using A = typename Dot::I;
  static constexpr int step = kInt8Step;
  static constexpr bool in_parts = false, whole_blocks = true;
  static inline A start(const LinearArgs& a, int64_t n) {
    return Dot::broadcast(reinterpret_cast<const uint8_t*>(static_cast<const Int8Args&>(a).offsets + n));
  }
  static inline A tokens(const char* x) { return Dot::load(reinterpret_cast<const int32_t*>(x)); }
  static inline A weight(const char* w) { return Dot::broadcast(reinterpret_cast<const uint8_t*>(w)); }
  static inline A dot(A acc, A x, A w) { return Dot::dot(acc, x, w); }
  static inline void store(char* z, A v) { Dot::store(reinterpret_cast<int32_t*>(z), v); }
};

// What linear_tile's ending is to tiles, to a part whose lanes are tokens, whole and without residual.
template <class Dot, class Out>
bool int8_write_tokens(const Int8Args& a, const TokenPart& part, int64_t m) {
  using V = typename Dot::Vec;
  using Y = typename Out::Y;
  if constexpr (Out::per_lane == 0) {
    return false;
  } else {
    if (part.cols != kTokenColumns || a.residual || a.N % Out::per_lane != 0) return false;
    float bias[kTokenColumns] = {}, x_scales[kTokenVectors * V::W] = {};
    if (a.bias)
      for (int64_t n = 0; n < kTokenColumns; n += V::W) V::store(bias + n, Out::load_y(static_cast<const Y*>(a.bias) + part.n + n));
    memcpy(x_scales, a.x_scales + m, part.rows * sizeof *x_scales);
    const auto* z = reinterpret_cast<const int32_t*>(part.z);  // [kTokenColumns][tokens]
    const auto value = [&](int64_t n, int64_t t) {
      const typename V::F scaled = V::mul(V::from_int32(z + n * part.tokens + t), V::set1(a.w_scales[part.n + n]));
      const typename V::F v = V::add(V::mul(scaled, V::load(x_scales + t)), V::set1(bias[n]));
      return a.activation == Activation::none ? v : Out::activate(v, a.activation);
    };
    write_tokens<Out>(static_cast<Y*>(a.y) + m * a.N + part.n, a.N, part.rows, value);
    return true;
  }
}

template <class Dot>
void int8_finish_tokens(const Int8Args& a, const TokenPart& part, int64_t m) {
  using V = typename Dot::Vec;
  if (a.out == DType::f32 && int8_write_tokens<Dot, Plain<V>>(a, part, m)) return;
  if (a.out == DType::bf16 && int8_write_tokens<Dot, Bf16Weights<V>>(a, part, m)) return;
  alignas(64) int32_t turned[kTokenVectors * V::W * kTokenColumns];  // [tokens][outputs]
  turn<V>(part, reinterpret_cast<char*>(turned));
  int8_finish<V>(a, turned, kTokenColumns, m, part.n, part.rows, part.cols);
}

template <class Dot>
void int8_range(const Int8Args& a, int64_t m0, int64_t m1, int64_t i0, int64_t i1) {
  using V = typename Dot::Vec;
  if constexpr (V::registers >= 32) {
    if (lanes_are_tokens(a, kInt8Step, V::W, m1 - m0, i0, i1)) {
      const int64_t whole = (a.K + a.C - 1) / a.C * a.C;
      return token_range<ByteLanes<Dot>>(a, static_cast<const char*>(a.x) + m0 * a.ldx, a.ldx, whole, m0, m1, i0, i1,
                                         [&](const TokenPart& part) { int8_finish_tokens<Dot>(a, part, m0 + part.m); });
    }
  }
  for_each_tile<Int8Tiles<Dot>>(a, 1, m0, m1, i0, i1, [&](auto tile, int64_t m, int64_t i, int64_t n, int64_t cols, bool, bool) {
    tile(a, m0 + m, i, n, cols);
  });
}

// max |x[k]|, NaN if there is one: the bits of magnitudes order like numbers, infinity and then NaN above all.
template <class Load>
float highest_magnitude(const typename Load::Y* x, int64_t count) {
  using Y = typename Load::Y;
  using Bits = std::conditional_t<sizeof(Y) == 4, uint32_t, uint16_t>;
  constexpr Bits magnitude = std::numeric_limits<Bits>::max() / 2;
  Bits top = 0;
  for (int64_t k = 0; k < count; ++k) {
    Bits bits;
    memcpy(&bits, x + k, sizeof bits);
    bits &= magnitude;
    top = bits > top ? bits : top;
  }
  Y one[Load::Vec::W] = {};
  memcpy(one, &top, sizeof top);
  float wide[Load::Vec::W];
  Load::Vec::store(wide, Load::load_y(one));
  return wide[0];
}

template <class Load>
void quantize_rows_as(const QuantizeArgs& a, int64_t m0, int64_t m1) {
  using V = typename Load::Vec;
  constexpr float smallest = 1.17549435e-38f;  // of a normal float: its reciprocal is finite, and a row of zeros stays zeros
  constexpr int64_t group = 4 * V::W;
  const int64_t whole = a.K / group * group;
  struct Scale {
    float scale, inverse;
  };
  const auto scale_of = [&](int64_t m) -> Scale {
    const float highest = highest_magnitude<Load>(static_cast<const typename Load::Y*>(a.x) + m * a.ldx, a.K);
    const float own = highest / 127 > smallest ? highest / 127 : smallest, scale = a.scale == 0 ? own : a.scale;
    return {highest < __builtin_inff() ? scale : __builtin_nanf(""), 1 / scale};
  };
  // A row's scale is found while the row before it is rounded, and the row after both is fetched: the divisions and the memory then hide.
  Scale next = m0 < m1 ? scale_of(m0) : Scale{};
  for (int64_t m = m0; m < m1; ++m) {
    const Scale row = next;
    if (m + 1 < m1) next = scale_of(m + 1);
    const auto* x = static_cast<const typename Load::Y*>(a.x) + m * a.ldx;  // [K]
    const auto* later = x + (m + 2 < m1 ? 2 * a.ldx : 0);                   // [K]
    uint8_t* q = a.q + m * a.ldq;                                           // [ldq]
    a.scales[m] = row.scale;
    memset(q + whole, 128, a.ldq - whole);
    if (row.scale != row.scale) {
      memset(q, 128, whole);
      continue;
    }
    const typename V::F inverse = V::set1(row.inverse);
    const auto quantize = [&](const typename Load::Y* from, uint8_t* to) {
      typename V::F v[4];  // [4][W]
      SPARSE_PRUNE_UNROLL
      for (int i = 0; i < 4; ++i) v[i] = V::mul(Load::load_y(from + i * V::W), inverse);
      V::store_quantized(to, v);
    };
    for (int64_t k = 0; k < whole; k += group) {
      for (int64_t j = 0; j < group; j += 64 / static_cast<int64_t>(sizeof(typename Load::Y))) prefetch(later + k + j);
      quantize(x + k, q + k);
    }
    if (whole < a.K) {
      typename Load::Y edge[group] = {};
      uint8_t last[group];
      for (int64_t k = whole; k < a.K; ++k) edge[k - whole] = x[k];
      quantize(edge, last);
      memcpy(q + whole, last, a.K - whole);
    }
  }
}

template <class V>
void quantize_rows(const QuantizeArgs& a, int64_t m0, int64_t m1) {
  if (a.dtype == DType::f32)
    quantize_rows_as<Plain<V>>(a, m0, m1);
  else if (a.dtype == DType::bf16)
    quantize_rows_as<Bf16Weights<V>>(a, m0, m1);
  else
    quantize_rows_as<HalfWeights<V>>(a, m0, m1);
}
