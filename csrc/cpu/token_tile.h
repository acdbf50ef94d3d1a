// The product for blocks at most one vector of outputs high, and many tokens. tile_kernel.h broadcasts x to lanes of outputs: with one
// vector of them each product needs a load of its own, and blocks that are lower leave lanes idle. Here lanes are tokens. A panel of
// x is transposed once, and a step multiplies its NV vectors of tokens by the broadcast weights of NO outputs:
//     acc[o][v] += x[v, k] * w[k, o]
// which is NO + NV loads for NO * NV products; the sums are transposed back before they are finished. Products are added in the order
// of tile_kernel.h, so which of the two runs never shows in a result. A lane is four bytes: a float, two bf16 or four int8.
//
// Op provides: V, A (a vector of sums), step (inputs in a lane), in_parts (as in linear_tile), whole_blocks (x is padded to them), start (of
// an output's sums), tokens, weight and dot.

constexpr int64_t kLane = 4;
constexpr int kTokenOutputs = 8, kTokenVectors = 3;  // 24 sums leave registers for 3 vectors of x and a weight
constexpr int64_t kTokenColumns = 32;                // outputs finished together: a line of 16-bit y

template <class Op, int NO, int NV>
void token_tile(const LinearArgs& a, const char* x, const char* w, int64_t i, int64_t n, char* z) {
  using V = typename Op::V;
  using A = typename Op::A;
  constexpr int64_t line = 64, x_step = NV * V::W * kLane;        // bytes of a step of x, and of an output in z
  constexpr int64_t ahead = 8192, part = 256;                     // see tile_step, linear_tile
  const int64_t steps = (a.C + Op::step - 1) / Op::step, w_step = a.R * kLane, begin = a.crow[i], end = a.crow[i + 1];
  A acc[NO][NV];  // [NO][NV * W]
  SPARSE_PRUNE_UNROLL
  for (int o = 0; o < NO; ++o)
    SPARSE_PRUNE_UNROLL
    for (int v = 0; v < NV; ++v) acc[o][v] = Op::start(a, i * a.R + n + o);
  bool closed = false;
  int64_t open = 0;
  for (int64_t e = begin; e < end; ++e) {
    const int64_t k0 = a.col[e] * a.C;
    const int64_t inputs = Op::whole_blocks || a.K - k0 > a.C ? a.C : a.K - k0;
    const char* xb = x + k0 / Op::step * x_step;                                      // [steps][NV * W]
    const char* wb = w + ((a.block ? a.block[e] : e) * steps * a.R + n) * kLane;      // [steps][R]
    const char* next = x + a.col[e + 1 < end ? e + 1 : e] * a.C / Op::step * x_step;  // anywhere in the panel, which lies in L2
    if constexpr (Op::in_parts) {
      if ((open += inputs) > part) {
        SPARSE_PRUNE_UNROLL
        for (int o = 0; o < NO; ++o)
          SPARSE_PRUNE_UNROLL
          for (int v = 0; v < NV; ++v) {
            char* at = z + o * x_step + v * line;
            Op::store(at, Op::add(closed ? Op::tokens(at) : Op::zero(), acc[o][v]));
            acc[o][v] = Op::zero();
          }
        closed = true;
        open = inputs;
      }
    }
    for (int64_t k = 0; k < inputs; k += Op::step, xb += x_step, wb += w_step, next += x_step) {
      prefetch(wb + ahead);
      A xv[NV];  // [NV * W]
      SPARSE_PRUNE_UNROLL
      for (int v = 0; v < NV; ++v) {
        prefetch(next + v * line);
        xv[v] = Op::tokens(xb + v * line);
      }
      SPARSE_PRUNE_UNROLL
      for (int o = 0; o < NO; ++o) {
        const A wv = Op::weight(wb + o * kLane);
        SPARSE_PRUNE_UNROLL
        for (int v = 0; v < NV; ++v) acc[o][v] = Op::dot(acc[o][v], xv[v], wv);
      }
    }
  }
  SPARSE_PRUNE_UNROLL
  for (int o = 0; o < NO; ++o)
    SPARSE_PRUNE_UNROLL
    for (int v = 0; v < NV; ++v) {
      char* at = z + o * x_step + v * line;
      if constexpr (Op::in_parts)
        if (closed) acc[o][v] = Op::add(acc[o][v], Op::tokens(at));
      Op::store(at, acc[o][v]);
    }
}

// token_tile by outputs - 1, for panels of NV vectors.
template <class Op, int NV>
struct TokenTiles {
  void (*tile[kTokenOutputs])(const LinearArgs&, const char*, const char*, int64_t, int64_t, char*);
  template <int... NO>
  constexpr TokenTiles(std::integer_sequence<int, NO...>) : tile{token_tile<Op, NO + 1, NV>...} {}
  constexpr TokenTiles() : TokenTiles(std::make_integer_sequence<int, kTokenOutputs>()) {}
};

// Whether lanes are tokens for these rows and block-rows: where enough of them are filled, for a product takes three quarters of the time that
// lanes of outputs take, and where four block-rows and more use an input, which pays for transposing it. From 16 rows on both kernels
// add products in one order; below, the answer must not depend on how block-rows are shared between threads.
inline bool lanes_are_tokens(const LinearArgs& a, int64_t step, int64_t lanes, int64_t rows, int64_t i0, int64_t i1) {
  const int64_t padded = (rows + lanes - 1) / lanes * lanes;
  const int64_t blocks = rows < lanes ? a.crow[(a.N + a.R - 1) / a.R] : a.crow[i1] - a.crow[i0];
  return a.R <= lanes && a.C % step == 0 && (2 * a.R <= lanes || rows >= 2 * lanes) && 4 * rows * lanes > 3 * padded * a.R &&
         blocks * a.C >= 4 * a.K;
}

// Lanes of x[rows, x_bytes], ldx bytes apart, as [x_bytes / kLane][vectors * W], zeros past both ends.
template <class V>
void transpose_tokens(const char* x, int64_t ldx, int64_t rows, int64_t x_bytes, int64_t vectors, char* to) {
  constexpr int64_t side = V::W * kLane;
  alignas(64) char edge[V::W * side];
  for (int64_t v = 0; v < vectors; ++v)
    for (int64_t k = 0; k < x_bytes; k += side) {
      const char* from = x + v * V::W * ldx + k;
      const int64_t high = rows - v * V::W, wide = x_bytes - k;
      int64_t apart = ldx;
      if (high < V::W || wide < side) {
        memset(edge, 0, sizeof edge);
        for (int64_t m = 0; m < V::W && m < high; ++m) memcpy(edge + m * side, from + m * ldx, wide < side ? wide : side);
        from = edge;
        apart = side;
      }
      V::transpose(from, apart, to + (k / kLane * vectors * V::W + v * V::W) * kLane, vectors * V::W);
    }
}

// A part of y: the sums z[outputs][tokens] of `rows` rows from m0 + m and `cols` outputs from n on.
struct TokenPart {
  const char* z;
  int64_t tokens, m, n, rows, cols;
};

// to[rows][kTokenColumns], lanes of z by rows.
template <class V>
void turn(const TokenPart& part, char* to) {
  for (int64_t n = 0; n < part.cols; n += V::W)
    for (int64_t t = 0; t < part.rows; t += V::W)
      V::transpose(part.z + (n * part.tokens + t) * kLane, part.tokens * kLane, to + (t * kTokenColumns + n) * kLane, kTokenColumns);
}

// y[rows][kTokenColumns] = value(n, t), a vector of tokens from t on for output n, in Fmt's elements, Fmt::per_lane to a lane.
template <class Fmt, class Value>
void write_tokens(typename Fmt::Y* y, int64_t ld, int64_t rows, const Value& value) {
  using V = typename Fmt::Vec;
  constexpr int per = Fmt::per_lane, W = V::W;
  for (int64_t t = 0; t < rows; t += W)
    for (int64_t n0 = 0; n0 < kTokenColumns; n0 += W * per) {
      alignas(64) float pack[W * W], edge[W * W];  // [W lanes of outputs][W tokens], and back
      SPARSE_PRUNE_UNROLL
      for (int j = 0; j < W; ++j) {
        typename V::F v[per];
        for (int s = 0; s < per; ++s) v[s] = value(n0 + j * per + s, t);
        V::store(pack + j * W, Fmt::lanes(v));
      }
      typename Fmt::Y* to = y + t * ld + n0;
      if (rows - t >= W) {
        V::transpose(pack, W * kLane, to, ld / per);
      } else {
        V::transpose(pack, W * kLane, edge, W);
        for (int64_t i = 0; i < rows - t; ++i) memcpy(to + i * ld, edge + i * W, W * kLane);
      }
    }
}

// Calls finish(part) for the parts of rows [m0, m1) of block-rows [i0, i1). x begins at row m0; its rows are ldx bytes apart, and x_bytes
// of each are read.
template <class Op, class Finish>
void token_range(const LinearArgs& a, const char* x, int64_t ldx, int64_t x_bytes, int64_t m0, int64_t m1, int64_t i0, int64_t i1,
                 const Finish& finish) {
  using V = typename Op::V;
  static constexpr TokenTiles<Op, 1> one;
  static constexpr TokenTiles<Op, 2> two;
  static constexpr TokenTiles<Op, kTokenVectors> three;
  constexpr int64_t most = kTokenVectors * V::W;
  alignas(64) char z[kTokenColumns * most * kLane];  // [outputs][tokens]
  const int64_t group = kTokenColumns / a.R;            // block-rows finished together
  const Parts panels((m1 - m0 + V::W - 1) / V::W, kTokenVectors), outputs(a.R, kTokenOutputs);
  const int64_t padded = (x_bytes + 63) / 64 * 64;
  char* panel = static_cast<char*>(thread_scratch(padded * most));
  for (int64_t p = 0, m = 0, vectors; p < panels.count; ++p, m += vectors * V::W) {
    vectors = panels.low + (p < panels.longer);
    const auto& tile = vectors == 1 ? one.tile : (vectors == 2 ? two.tile : three.tile);
    const int64_t tokens = vectors * V::W, rows = m1 - m0 - m < tokens ? m1 - m0 - m : tokens;
    transpose_tokens<V>(x + m * ldx, ldx, rows, x_bytes, vectors, panel);
    for (int64_t i = i0, count; i < i1; i += count) {
      count = i1 - i < group ? i1 - i : group;
      for (int64_t j = 0; j < count; ++j)
        for (int64_t part = 0, n = 0, high; part < outputs.count; ++part, n += high) {
          high = outputs.low + (part < outputs.longer);
          tile[high - 1](a, panel, static_cast<const char*>(a.w), i + j, n, z + (j * a.R + n) * tokens * kLane);
        }
      const int64_t left = a.N - i * a.R;
      finish(TokenPart{z, tokens, m, i * a.R, rows, left < count * a.R ? left : count * a.R});
    }
  }
}

template <class Fmt>
struct FloatLanes {
  using V = typename Fmt::Vec;
  using A = typename V::F;
  static constexpr int step = Fmt::step;
  static constexpr bool in_parts = sizeof(typename Fmt::Y) == sizeof(typename V::Elem), whole_blocks = false;
  static inline A zero() { return V::zero(); }
  static inline A start(const LinearArgs&, int64_t) { return V::zero(); }
  static inline A tokens(const char* x) { return V::load(reinterpret_cast<const float*>(x)); }
  static inline A weight(const char* w) { return Fmt::broadcast(reinterpret_cast<const typename Fmt::X*>(w), 0); }
  static inline A dot(A acc, A x, A w) { return Fmt::multiply_add(x, w, acc); }
  static inline A add(A v, A w) { return V::add(v, w); }
  static inline void store(char* z, A v) { V::store(reinterpret_cast<float*>(z), v); }
};

template <class Fmt>
void token_linear(const LinearArgs& a, const typename Fmt::X* x, int64_t ldx, int64_t m0, int64_t m1, int64_t i0, int64_t i1,
                  bool past_cache, bool ahead) {
  using V = typename Fmt::Vec;
  using Y = typename Fmt::Y;
  constexpr int NV = kTokenColumns / V::W;
  constexpr int64_t size = sizeof(typename Fmt::X);
  alignas(64) float turned[kTokenVectors * V::W * kTokenColumns];  // [tokens][outputs]
  token_range<FloatLanes<Fmt>>(a, reinterpret_cast<const char*>(x), ldx * size, a.K * size, m0, m1, i0, i1, [&](const TokenPart& part) {
    const int64_t offset = (m0 + part.m) * a.N + part.n;
    const Place<Fmt> at = {static_cast<Y*>(a.y) + offset, a.bias ? static_cast<const Y*>(a.bias) + part.n : nullptr,
                           a.residual ? static_cast<const Y*>(a.residual) + offset : nullptr, a.N, part.cols,
                           part.cols == kTokenColumns, past_cache, 0, a.pair == Pair::second};
    if (!at.whole || at.residual || past_cache || converts(a) || a.N % Fmt::per_lane != 0) {
      turn<V>(part, reinterpret_cast<char*>(turned));
      if (converts(a)) return finish_converted<V>(a, turned, kTokenColumns, m0 + part.m, part.n, part.rows, part.cols);
      if (!at.whole)
        return finish<Fmt>(turned, kTokenColumns, at.bias, at.residual, at.y, {part.rows, part.cols, a.N, a.activation, a.pair});
      typename V::F bias[NV];
      load_bias<Fmt>(at, bias);
      for (int64_t t = 0; t < part.rows; ++t) {
        typename V::F sums[NV];  // [kTokenColumns]
        SPARSE_PRUNE_UNROLL
        for (int v = 0; v < NV; ++v) {
          sums[v] = V::add(V::load(turned + t * kTokenColumns + v * V::W), bias[v]);
          if (a.activation != Activation::none) sums[v] = Fmt::activate(sums[v], a.activation);
        }
        finish_row<Fmt>(at, t, sums);
      }
      return;
    }
    if (ahead)
      for (int64_t t = 0; t < part.rows; ++t)
        for (int64_t j = 0; j < kTokenColumns; j += 64 / sizeof(Y)) prefetch_to_l2(at.y + t * a.N + kTokenColumns + j);
    float bias[kTokenColumns] = {};
    if (at.bias)
      for (int64_t n = 0; n < kTokenColumns; n += V::W) V::store(bias + n, Fmt::load_y(at.bias + n));
    const auto* z = reinterpret_cast<const float*>(part.z);  // [kTokenColumns][tokens]
    const auto sum = [&](int64_t n, int64_t t) { return V::add(V::load(z + n * part.tokens + t), V::set1(bias[n])); };
    if (a.activation == Activation::none) return write_tokens<Fmt>(at.y, a.N, part.rows, sum);
    write_tokens<Fmt>(at.y, a.N, part.rows, [&](int64_t n, int64_t t) { return Fmt::activate(sum(n, t), a.activation); });
  });
}
