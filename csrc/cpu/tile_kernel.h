// The register-tiled product that every vector instruction set shares. An instruction set's file sets its target, defines a
// vector type V, and includes this header inside its own unnamed namespace.
//
// A tile is MR rows of x times NV vectors of outputs. Its accumulators stay in registers across the whole column list of a block-row,
// so y is written once. Each step loads NV vectors of weights and multiplies them by MR broadcast elements of x:
//     acc[m][v] += x[m, k] * w[k, v]
// V provides: Elem, F (vector), W (lanes), zero, set1, load, store, add, fma, activate, load_bf16/f16, store_bf16/f16, bf16_pairs.

// Weights in the accumulator's own type, one input per step.
template <class V>
struct Plain {
  using Vec = V;
  using F = typename V::F;
  using X = typename V::Elem;
  using Wt = typename V::Elem;
  using Y = typename V::Elem;
  static constexpr int step = 1, parts = 1;
  static inline void weights(const Wt* w, F out[1]) { out[0] = V::load(w); }
  static inline F broadcast(const X* x, int) { return V::set1(*x); }
  static inline F broadcast_last(const X* x) { return V::set1(*x); }
  static inline F multiply_add(F x, F w, F acc) { return V::fma(x, w, acc); }
  static inline F load_y(const Y* y) { return V::load(y); }
  static inline void store_y(Y* y, F v) { V::store(y, v); }
};

// float16 weights, converted as they are loaded; x was widened to float.
template <class V>
struct HalfWeights : Plain<V> {
  using F = typename V::F;
  using Wt = uint16_t;
  using Y = uint16_t;
  static inline void weights(const Wt* w, F out[1]) { out[0] = V::load_f16(w); }
  static inline F load_y(const Y* y) { return V::load_f16(y); }
  static inline void store_y(Y* y, F v) { V::store_f16(y, v); }
};

// bfloat16 weights as pairs of inputs: one 32-bit lane holds (k, k + 1), so a shift and a mask give two float vectors.
template <class V>
struct Bf16Weights : Plain<V> {
  using F = typename V::F;
  using X = typename V::Elem;
  using Wt = uint16_t;
  using Y = uint16_t;
  static constexpr int step = 2, parts = 2;
  static inline void weights(const Wt* w, F out[2]) { V::bf16_pairs(w, out[0], out[1]); }
  static inline F broadcast(const X* x, int part) { return V::set1(x[part]); }
  static inline F load_y(const Y* y) { return V::load_bf16(y); }
  static inline void store_y(Y* y, F v) { V::store_bf16(y, v); }
};

struct Strip {
  int64_t rows, cols;         // valid rows and outputs of this tile
  int64_t ldy;
  Activation activation;
};

// z[rows, cols] in memory -> y = act(z + bias) + residual; serves every tile that the direct store cannot: activations and cut edges.
// bias is null or holds cols values, rounded up to whole vectors.
template <class Fmt>
void finish(const typename Fmt::Vec::Elem* z, int64_t ldz, const typename Fmt::Vec::Elem* bias, const typename Fmt::Y* residual,
            typename Fmt::Y* y, const Strip& s) {
  using V = typename Fmt::Vec;
  using Y = typename Fmt::Y;
  for (int64_t m = 0; m < s.rows; ++m) {
    for (int64_t n = 0; n < s.cols; n += V::W) {
      typename V::F v = V::load(z + m * ldz + n);  // [W]
      if (bias) v = V::add(v, V::load(bias + n));
      v = V::activate(v, s.activation);
      Y* to = y + m * s.ldy + n;
      const Y* from = residual ? residual + m * s.ldy + n : nullptr;
      const int64_t count = s.cols - n;
      if (count >= V::W) {
        if (from) v = V::add(v, Fmt::load_y(from));
        Fmt::store_y(to, v);
      } else {
        Y edge[V::W] = {};
        if (from) {
          for (int64_t j = 0; j < count; ++j) edge[j] = from[j];
          v = V::add(v, Fmt::load_y(edge));
        }
        Fmt::store_y(edge, v);
        for (int64_t j = 0; j < count; ++j) to[j] = edge[j];
      }
    }
  }
}

inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
inline void prefetch_to_write(void* p) { __builtin_prefetch(p, 1, 3); }

// One step: NV vectors of weights by MR broadcast inputs, for each of the parts that a weight vector holds.
template <class Fmt, int MR, int NV, class F>
inline void tile_step(const typename Fmt::X* x, int64_t ldx, const typename Fmt::Wt* w, F (&acc)[MR][NV]) {
  // Weights stream from L2, L3 or memory; the hardware's prefetcher stops at each 4 KiB page, this one does not.
  constexpr int64_t ahead = 3072 / sizeof(typename Fmt::Wt), line = 64 / sizeof(typename Fmt::Wt);
  for (int64_t j = 0; j < NV * Fmt::Vec::W * Fmt::step; j += line) prefetch(w + ahead + j);
  F b[NV][Fmt::parts];
  for (int v = 0; v < NV; ++v) Fmt::weights(w + v * Fmt::Vec::W * Fmt::step, b[v]);
  for (int p = 0; p < Fmt::parts; ++p)
    for (int m = 0; m < MR; ++m) {
      const F xv = Fmt::broadcast(x + m * ldx, p);
      for (int v = 0; v < NV; ++v) acc[m][v] = Fmt::multiply_add(xv, b[v][p], acc[m][v]);
    }
}

// One tile of a block-row: x points at its first row, w at the first output of the strip; bias is null or holds NV * W values.
template <class Fmt, int MR, int NV>
void linear_tile(const LinearArgs& a, const typename Fmt::X* x, int64_t ldx, const typename Fmt::Wt* w, int64_t begin, int64_t end,
                 const typename Fmt::Y* bias, const typename Fmt::Y* residual, typename Fmt::Y* y, const Strip& s) {
  using V = typename Fmt::Vec;
  using F = typename V::F;
  // An FMA takes 4 cycles and one or two start per cycle: few accumulators need several independent sums.
  constexpr int KU = MR * NV >= 8 ? 1 : (MR * NV >= 4 ? 2 : 4);
  constexpr int step = Fmt::step;
  constexpr int64_t x_line = 64 / sizeof(typename Fmt::X);
  for (int m = 0; m < MR; ++m)
    for (int64_t n = 0; n < s.cols; n += 64 / sizeof(typename Fmt::Y)) prefetch_to_write(y + m * s.ldy + n);
  F acc[KU][MR][NV];  // [KU][MR][NV * W]
  for (int u = 0; u < KU; ++u)
    for (int m = 0; m < MR; ++m)
      for (int v = 0; v < NV; ++v) acc[u][m][v] = V::zero();
  // Where y keeps the sum's full precision, sums are closed every 256 inputs, as a blocked matmul does, to keep their error; a 16-bit
  // y hides that error, so its sums run through.
  constexpr bool in_parts = sizeof(typename Fmt::Y) == sizeof(typename V::Elem);
  constexpr int64_t part = 256;
  alignas(64) typename V::Elem z[MR * NV * V::W];  // [MR][NV * W]
  bool closed = false;
  int64_t open = 0;                                                 // inputs summed since the last closing
  const int64_t ldw = a.R * step;                                   // weights of one step
  const int64_t block_size = (a.C + step - 1) / step * ldw;
  for (int64_t e = begin; e < end; ++e) {
    const int64_t k0 = a.col[e] * a.C;
    const int64_t inputs = a.K - k0 < a.C ? a.K - k0 : a.C;
    const typename Fmt::X* xb = x + k0;                             // [MR, inputs]
    const typename Fmt::Wt* wb = w + (a.block ? a.block[e] : e) * block_size;  // [inputs / step][R][step]
    if (e + 1 < end) {  // the next block's x is anywhere in the row, which no hardware prefetcher can know
      const typename Fmt::X* next = x + a.col[e + 1] * a.C;
      for (int64_t j = 0; j < a.C; j += x_line)
        for (int m = 0; m < MR; ++m) prefetch(next + m * ldx + j);
    }
    if (in_parts && (open += inputs) > part) {
      for (int m = 0; m < MR; ++m)
        for (int v = 0; v < NV; ++v) {
          F sum = closed ? V::load(z + (m * NV + v) * V::W) : V::zero();
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
    for (; k + KU * step <= inputs; k += KU * step)
      for (int u = 0; u < KU; ++u, wb += ldw) tile_step<Fmt, MR, NV>(xb + k + u * step, ldx, wb, acc[u]);
    if (KU > 1)
      for (; k + step <= inputs; k += step, wb += ldw) tile_step<Fmt, MR, NV>(xb + k, ldx, wb, acc[0]);
    if (step > 1 && k < inputs) {  // an odd input: its pair's other half is not x of this block
      F b[NV][Fmt::parts];
      for (int v = 0; v < NV; ++v) Fmt::weights(wb + v * V::W * step, b[v]);
      for (int m = 0; m < MR; ++m) {
        const F xv = Fmt::broadcast_last(xb + m * ldx + k);
        for (int v = 0; v < NV; ++v) acc[0][m][v] = Fmt::multiply_add(xv, b[v][0], acc[0][m][v]);
      }
    }
  }
  for (int u = 1; u < KU; ++u)
    for (int m = 0; m < MR; ++m)
      for (int v = 0; v < NV; ++v) acc[0][m][v] = V::add(acc[0][m][v], acc[u][m][v]);
  if (in_parts && closed)
    for (int m = 0; m < MR; ++m)
      for (int v = 0; v < NV; ++v) acc[0][m][v] = V::add(acc[0][m][v], V::load(z + (m * NV + v) * V::W));
  // The bias comes last: a sum that starts from it would round every product to the bias's magnitude.
  if (bias)
    for (int v = 0; v < NV; ++v) {
      const F b = Fmt::load_y(bias + v * V::W);
      for (int m = 0; m < MR; ++m) acc[0][m][v] = V::add(acc[0][m][v], b);
    }
  if (s.activation == Activation::none && s.cols == NV * V::W) {
    for (int m = 0; m < MR; ++m)
      for (int v = 0; v < NV; ++v) {
        F z = acc[0][m][v];
        if (residual) z = V::add(z, Fmt::load_y(residual + m * s.ldy + v * V::W));
        Fmt::store_y(y + m * s.ldy + v * V::W, z);
      }
    return;
  }
  for (int m = 0; m < MR; ++m)
    for (int v = 0; v < NV; ++v) V::store(z + (m * NV + v) * V::W, acc[0][m][v]);
  finish<Fmt>(z, NV * V::W, nullptr, residual, y, s);
}

template <class Fmt>
using TileFn = void (*)(const LinearArgs&, const typename Fmt::X*, int64_t, const typename Fmt::Wt*, int64_t, int64_t,
                        const typename Fmt::Y*, const typename Fmt::Y*, typename Fmt::Y*, const Strip&);

// tile_of<Fmt, NV>::row[MR - 1]; the largest MR leaves registers for NV weight vectors (times parts) and one broadcast.
template <class Fmt, int NV, int MR>
struct TileTable {
  static void fill(TileFn<Fmt>* table) {
    table[MR - 1] = linear_tile<Fmt, MR, NV>;
    TileTable<Fmt, NV, MR - 1>::fill(table);
  }
};
template <class Fmt, int NV>
struct TileTable<Fmt, NV, 0> {
  static void fill(TileFn<Fmt>*) {}
};

template <class Fmt, int NV>
constexpr int max_rows() {
  constexpr int registers = Fmt::Vec::registers;
  constexpr int rows = (registers - 1 - NV * Fmt::parts - (Fmt::parts > 1 ? 1 : 0)) / NV;
  return rows < 14 ? rows : 14;
}

template <class Fmt>
struct Tiles {
  static constexpr int widest = Fmt::Vec::registers >= 32 ? 4 : 2;
  TileFn<Fmt> one[max_rows<Fmt, 1>()], two[max_rows<Fmt, 2>()], four[max_rows<Fmt, widest>()];
  Tiles() {
    TileTable<Fmt, 1, max_rows<Fmt, 1>()>::fill(one);
    TileTable<Fmt, 2, max_rows<Fmt, 2>()>::fill(two);
    TileTable<Fmt, widest, max_rows<Fmt, widest>()>::fill(four);
  }
};

// One past the last block-row from i on whose weights stay in L2 (256 KiB of it) while all rows of x pass over them.
inline int64_t group_end(const LinearArgs& a, int64_t i, int64_t i1, int64_t weight_bytes) {
  const int64_t blocks = (256 << 10) / (a.R * a.C * weight_bytes);
  int64_t g = i + 1;
  while (g < i1 && a.crow[g + 1] - a.crow[i] <= blocks) ++g;
  return g;
}

// Rows [m0, m1) of block-rows [i0, i1). x is a.x, or its rows widened to float, as X with ldx elements per row, starting at row m0.
// A group of block-rows is finished for one panel of rows before the next panel: its x then stays in L1, and y is written along rows.
template <class Fmt>
void linear_range(const LinearArgs& a, const typename Fmt::X* x, int64_t ldx, int64_t m0, int64_t m1, int64_t i0, int64_t i1) {
  using V = typename Fmt::Vec;
  using Y = typename Fmt::Y;
  static const Tiles<Fmt> tiles;
  constexpr int widest = Tiles<Fmt>::widest, rows_widest = max_rows<Fmt, widest>(), rows_two = max_rows<Fmt, 2>();
  const bool has_wide = widest == 4 && a.R >= 4 * V::W;
  // Panels are whole tiles high, of the strips that R is made of, and nearly equal: 16 rows are 8 + 8, not 14 + 2.
  const int64_t panel = has_wide || widest == 2 ? 2 * rows_widest : rows_two;
  const int64_t rows = m1 - m0, panels = (rows + panel - 1) / panel;
  Strip s;
  s.ldy = a.N;
  s.activation = a.activation;
  for (int64_t g0 = i0, g1; g0 < i1; g0 = g1) {
    g1 = group_end(a, g0, i1, sizeof(typename Fmt::Wt));
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t from = rows * p / panels, high = rows * (p + 1) / panels - from;
      for (int64_t i = g0; i < g1; ++i) {
        const int64_t outputs = a.N - i * a.R < a.R ? a.N - i * a.R : a.R;
        for (int64_t r = 0; r < outputs;) {
          const int64_t left = outputs - r, n = i * a.R + r;
          const bool wide = has_wide && left >= 4 * V::W;
          const int vectors = wide ? 4 : (left > V::W ? 2 : 1);
          const TileFn<Fmt>* table = wide ? tiles.four : (vectors == 2 ? tiles.two : tiles.one);
          const int64_t most = wide ? rows_widest : (vectors == 2 ? rows_two : max_rows<Fmt, 1>());
          s.cols = left < vectors * V::W ? left : vectors * V::W;
          const Y* bias = a.bias ? static_cast<const Y*>(a.bias) + n : nullptr;  // [vectors * W]
          Y edge[2 * V::W] = {};
          if (bias && s.cols < vectors * V::W) {
            for (int64_t j = 0; j < s.cols; ++j) edge[j] = bias[j];
            bias = edge;
          }
          const typename Fmt::Wt* w = static_cast<const typename Fmt::Wt*>(a.w) + r * Fmt::step;
          const int64_t count = (high + most - 1) / most;
          for (int64_t t = 0; t < count; ++t) {
            const int64_t m = from + high * t / count;
            s.rows = from + high * (t + 1) / count - m;
            const int64_t at = (m0 + m) * a.N + n;
            table[s.rows - 1](a, x + m * ldx, ldx, w, a.crow[i], a.crow[i + 1], bias,
                              a.residual ? static_cast<const Y*>(a.residual) + at : nullptr, static_cast<Y*>(a.y) + at, s);
          }
          r += s.cols;
        }
      }
    }
  }
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
  for (int m = 0; m < MR; ++m)
    for (int v = 0; v < NV; ++v) acc[m][v] = V::zero();
  for (int64_t k = 0; k < steps; ++k) {
    F b[NV][1];
    for (int v = 0; v < NV; ++v) Fmt::weights(x + v * V::W * Fmt::step, b[v]);
    for (int m = 0; m < MR; ++m) {
      const F a = Fmt::broadcast(dy + m * Fmt::step, 0);
      for (int v = 0; v < NV; ++v) acc[m][v] = Fmt::multiply_add(a, b[v][0], acc[m][v]);
    }
    x += ldx;
    dy += ld_dy;
  }
  for (int m = 0; m < MR; ++m)
    for (int v = 0; v < NV; ++v) {
      typename V::Elem* to = total + (m * NV + v) * V::W;
      V::store(to, V::add(V::load(to), acc[m][v]));
    }
}

// Panel is how dy and x are stored (Plain, or pairs for native bf16), Out how dvalues are.
template <class Panel, class Out>
void sdd_range(const SddArgs& a, int64_t i0, int64_t i1) {
  using V = typename Panel::Vec;
  // 8 rows and 2 vectors leave registers for loads; sums are closed every 512 tokens, as a blocked matmul does, to keep their error.
  constexpr int MR = V::registers >= 32 ? 8 : 4, NV = 2;
  constexpr int64_t chunk = 512 / Panel::step;
  const int64_t steps = (a.M + Panel::step - 1) / Panel::step;
  const int64_t ld_dy = a.R * Panel::step, ldx = a.C * Panel::step;
  const auto* dy_panels = static_cast<const typename Panel::X*>(a.dy_panels);
  const auto* x_panels = static_cast<const typename Panel::Wt*>(a.x_panels);
  auto* out = static_cast<typename Out::Y*>(a.dvalues);
  for (int64_t i = i0; i < i1; ++i) {
    for (int64_t e = a.crow[i]; e < a.crow[i + 1]; ++e) {
      const auto* dy = dy_panels + i * steps * ld_dy;             // [steps][R][step]
      const auto* x = x_panels + a.col[e] * steps * ldx;          // [steps][C][step]
      for (int64_t r = 0; r < a.R; r += MR)
        for (int64_t c = 0; c < a.C; c += NV * V::W) {
          alignas(64) typename V::Elem total[MR * NV * V::W] = {};
          for (int64_t k = 0; k < steps; k += chunk)
            sdd_tile<Panel, MR, NV>(dy + k * ld_dy + r * Panel::step, ld_dy, x + k * ldx + c * Panel::step, ldx,
                                    steps - k < chunk ? steps - k : chunk, total);
          Strip s;
          s.rows = a.R - r < MR ? a.R - r : MR;
          s.cols = a.C - c < NV * V::W ? a.C - c : NV * V::W;
          s.ldy = a.C;
          s.activation = Activation::none;
          finish<Out>(total, NV * V::W, nullptr, nullptr, out + e * a.R * a.C + r * a.C + c, s);
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
