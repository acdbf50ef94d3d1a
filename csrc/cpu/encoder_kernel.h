// Attention and LayerNorm in terms of a vector type V, included after tile_kernel.h inside an instruction set's own namespace. V adds
// to what tile_kernel.h asks: sub, mul, max, sum (over its lanes), exp2_nonpositive and transpose.
//
// Dot is the format of the products (Plain<V>, or pairs of bf16), Io the format of the tensors. Where they agree q is read in place;
// otherwise it is widened. Keys are packed once per head as [d / step][keys][step] and values as [T / step][d][step], which the products
// read in order. One block of queries at a time goes through scores, softmax and values, so that its scores stay in the L1 cache.
//
// A Dot whose products are not made of vectors has tile_steps, the steps that one takes, and product, which may read and write rows up to a
// multiple of 16: steps are then padded with zeros.

// z[MR][ldz] = sum over steps of x[m, step] * w[step][NV * W].
template <class Dot, int MR, int NV>
void product_tile(const typename Dot::X* x, int64_t ldx, const typename Dot::Wt* w, int64_t ldw, int64_t steps,
                  typename Dot::Vec::Elem* z, int64_t ldz) {
  using V = typename Dot::Vec;
  using F = typename V::F;
  F acc[MR][NV];  // [MR][NV * W]
  SPARSE_PRUNE_UNROLL
  for (int m = 0; m < MR; ++m)
    SPARSE_PRUNE_UNROLL
    for (int v = 0; v < NV; ++v) acc[m][v] = V::zero();
  for (int64_t s = 0; s < steps; ++s, x += Dot::step, w += ldw) {
    F b[NV][1];
    SPARSE_PRUNE_UNROLL
    for (int v = 0; v < NV; ++v) Dot::weights(w + v * V::W * Dot::step, b[v]);
    SPARSE_PRUNE_UNROLL
    for (int m = 0; m < MR; ++m) {
      const F xv = Dot::broadcast(x + m * ldx, 0);
      SPARSE_PRUNE_UNROLL
      for (int v = 0; v < NV; ++v) acc[m][v] = Dot::multiply_add(xv, b[v][0], acc[m][v]);
    }
  }
  SPARSE_PRUNE_UNROLL
  for (int m = 0; m < MR; ++m)
    SPARSE_PRUNE_UNROLL
    for (int v = 0; v < NV; ++v) V::store(z + m * ldz + v * V::W, acc[m][v]);
}

template <class Dot, int NV, int MR>
void product_rows(int64_t rows, const typename Dot::X* x, int64_t ldx, const typename Dot::Wt* w, int64_t ldw, int64_t steps,
                  typename Dot::Vec::Elem* z, int64_t ldz) {
  if constexpr (MR > 0) {
    if (rows == MR)
      product_tile<Dot, MR, NV>(x, ldx, w, ldw, steps, z, ldz);
    else
      product_rows<Dot, NV, MR - 1>(rows, x, ldx, w, ldw, steps, z, ldz);
  }
}

// z[rows, cols] = x[rows, steps * step] @ w[steps][cols][step], cols a multiple of W.
template <class Dot>
  requires(Dot::tile_steps == 1)
void product(int64_t rows, int64_t cols, const typename Dot::X* x, int64_t ldx, const typename Dot::Wt* w, int64_t steps,
             typename Dot::Vec::Elem* z, int64_t ldz) {
  using V = typename Dot::Vec;
  constexpr int wide = V::registers >= 32 ? 4 : 2, tall = (V::registers - 2 - wide) / wide, narrow_tall = wide == 4 ? 2 * tall : tall;
  const int64_t ldw = cols * Dot::step;
  for (int64_t n = 0; n < cols;) {
    const int vectors = cols - n >= wide * V::W ? wide : (wide == 4 && cols - n >= 2 * V::W ? 2 : 1);
    const int64_t most = vectors == wide ? tall : narrow_tall;
    for (int64_t m = 0; m < rows; m += most) {
      const int64_t high = rows - m < most ? rows - m : most;
      const auto* xm = x + m * ldx;
      const auto* wn = w + n * Dot::step;
      auto* zm = z + m * ldz + n;
      if (vectors == wide)
        product_rows<Dot, wide, tall>(high, xm, ldx, wn, ldw, steps, zm, ldz);
      else if (vectors == 2)
        product_rows<Dot, 2, narrow_tall>(high, xm, ldx, wn, ldw, steps, zm, ldz);
      else
        product_rows<Dot, 1, narrow_tall>(high, xm, ldx, wn, ldw, steps, zm, ldz);
    }
    n += vectors * V::W;
  }
}

template <class Dot>
  requires(Dot::tile_steps > 1)
inline void product(int64_t rows, int64_t cols, const typename Dot::X* x, int64_t ldx, const typename Dot::Wt* w, int64_t steps,
                    typename Dot::Vec::Elem* z, int64_t ldz) {
  Dot::product(rows, cols, x, ldx, w, steps, z, ldz);
}

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// from[count] as Dot's elements; to has room for whole vectors.
template <class Dot, class Io>
void convert_row(const typename Io::Y* from, int64_t count, typename Dot::X* to) {
  using V = typename Dot::Vec;
  if constexpr (std::is_same_v<typename Dot::X, typename Io::Y>) {
    memcpy(to, from, count * sizeof *to);
  } else {
    for (int64_t j = 0; j < count; j += V::W) V::store(to + j, count - j >= V::W ? Io::load_y(from + j) : load_edge<Io>(from + j, count - j));
  }
}

template <class Dot, class Io>
struct AttentionHead {
  using V = typename Dot::Vec;
  using F = typename V::F;
  using E = typename V::Elem;
  using X = typename Dot::X;
  using Y = typename Io::Y;
  static constexpr int64_t step = Dot::step, tile_steps = Dot::tile_steps;
  static constexpr bool tiles = tile_steps > 1;
  static constexpr int64_t rows_most = tiles ? 32 : 24;  // 24 rows of 128 scores in float and as weights: 18 KiB of L1

  static constexpr E lowest = -std::numeric_limits<E>::max();

  const AttentionArgs& a;
  const int64_t b, h, keys, features, key_steps, feature_steps;
  X *packed_k, *packed_v, *weights, *row;
  E *scores, *sums, *limits, *totals, *lanes, *columns;

  AttentionHead(const AttentionArgs& args, int64_t batch, int64_t head)
      : a(args), b(batch), h(head), keys(round_up(a.T, tiles ? tile_steps * step : V::W)), features(round_up(a.d, V::W)),
        key_steps(round_up((a.T + step - 1) / step, tile_steps)), feature_steps(round_up((a.d + step - 1) / step, tile_steps)) {
    const int64_t counts[] = {round_up(feature_steps, V::W) * keys * step, key_steps * features * step, rows_most * keys * step,
                              (rows_most + 2) * features * step};
    const int64_t rows = round_up(rows_most, V::W);
    size_t bytes = sizeof(E) * (rows_most * (keys + features) + keys + rows * (V::W + 1) + V::W * V::W);
    for (int64_t count : counts) bytes += (sizeof(X) * count + 63) / 64 * 64;
    char* at = static_cast<char*>(thread_scratch(bytes));
    X** parts[] = {&packed_k, &packed_v, &weights, &row};
    for (int i = 0; i < 4; ++i) {
      *parts[i] = reinterpret_cast<X*>(at);
      at += (sizeof(X) * counts[i] + 63) / 64 * 64;
    }
    scores = reinterpret_cast<E*>(at);             // [rows_most, keys]
    sums = scores + rows_most * keys;              // [rows_most, features]
    limits = sums + rows_most * features;          // [keys]
    totals = limits + keys;                        // [rows]
    lanes = totals + rows;                         // [rows, W]
    columns = lanes + rows * V::W;                 // [W, W]
  }

  // Rows [t, t + count) of from as Dot's elements, zeros past d and T: [count][features * step].
  void gather(const Y* from, int64_t token, int64_t t, int64_t count, X* to) {
    if (features * step != a.d || t + count > a.T) memset(to, 0, sizeof(X) * count * features * step);
    for (int64_t i = 0; i < count && t + i < a.T; ++i) convert_row<Dot, Io>(from + (t + i) * token, a.d, to + i * features * step);
  }

  void pack() {
    const auto* k = static_cast<const Y*>(a.k) + b * a.k_batch + h * a.k_head;
    const auto* v = static_cast<const Y*>(a.v) + b * a.v_batch + h * a.v_head;
    constexpr bool same = std::is_same_v<X, Y>;
    for (int64_t t = 0; t < keys; t += V::W) {  // [d / step][keys][step]; scores of keys past T are never used
      const void* rows = k + t * a.k_token;
      int64_t apart = a.k_token;
      if (!same || a.d % (V::W * step) != 0 || t + V::W > a.T) {
        gather(k, a.k_token, t, V::W, row);
        rows = row;
        apart = features * step;
      }
      for (int64_t c = 0; c < feature_steps; c += V::W)
        V::transpose(static_cast<const char*>(rows) + c * sizeof(E), apart * sizeof(X), packed_k + (c * keys + t) * step, keys);
    }
    for (int64_t t = 0; t < key_steps * step; t += step) {  // [T / step][d][step]
      X* to = packed_v + t * features;
      if constexpr (step == 1) {
        if (features != a.d) memset(to, 0, sizeof(X) * features);
        convert_row<Dot, Io>(v + t * a.v_token, a.d, to);
      } else if (a.d == features && t + step <= a.T) {
        Dot::interleave(v + t * a.v_token, v + (t + 1) * a.v_token, features, to);
      } else {
        gather(v, a.v_token, t, step, row);
        Dot::interleave(row, row + features * step, features, to);
      }
    }
  }

  // Ask for what the next head will pack: its rows are too short, and too far apart, for the processor to guess them.
  void prefetch_next(int64_t t, int64_t rows) const {
    const bool same_batch = h + 1 < a.heads;
    if (!same_batch && b + 1 == a.B) return;
    const auto fetch = [&](const void* tensor, int64_t batch, int64_t token, int64_t head) {
      const auto* first = static_cast<const Y*>(tensor) + (same_batch ? b * batch + (h + 1) * head : (b + 1) * batch);
      for (int64_t m = t; m < t + rows; ++m)
        for (int64_t j = 0; j < a.d; j += 64 / static_cast<int64_t>(sizeof(Y))) __builtin_prefetch(first + m * token + j);
    };
    fetch(a.q, a.q_batch, a.q_token, a.q_head);
    fetch(a.k, a.k_batch, a.k_token, a.k_head);
    fetch(a.v, a.v_batch, a.v_token, a.v_head);
  }

  // What the scores of query t may reach at most: anything, the lowest number where a key is left out, nothing past T.
  void set_limits(int64_t t) {
    const auto* keep = static_cast<const uint8_t*>(a.keep.data);
    if (keep) keep += b * a.keep.batch + h * a.keep.head + t * a.keep.query;
    constexpr E all = std::numeric_limits<E>::infinity();
    for (int64_t j = 0; j < a.T; ++j) limits[j] = !keep || keep[j] ? all : lowest;
    for (int64_t j = a.T; j < keys; ++j) limits[j] = -all;
  }

  // out[m] = op over the lanes of rows[m]: sixteen rows in turn by columns, where one row at a time would wait for each of its halvings.
  template <class Op>
  void over_lanes(int64_t count, E* out, const Op& op) {
    for (int64_t m = 0; m < count; m += V::W) {
      V::transpose(lanes + m * V::W, V::W * sizeof(E), columns, V::W);
      F v = V::load(columns);
      for (int i = 1; i < V::W; ++i) v = op(v, V::load(columns + i * V::W));
      V::store(out + m, v);
    }
  }

  // scores[rows] -> weights[rows] = e^(score - highest), not yet divided by their sums, totals[rows]. All in powers of 2: e^s = 2^(s log2 e).
  // Scores that a bias or a limit changes are written back; others are scaled again when they are read again.
  void softmax(int64_t rows, int64_t t0) {
    constexpr E log2e = E(1.44269504088896340736);
    const bool limited = a.keep.data != nullptr || keys != a.T, changed = limited || a.bias.data != nullptr;
    const E scale = static_cast<E>(a.scale) * log2e;
    const F factor = V::set1(changed ? E(1) : scale);
    for (int64_t m = 0; m < rows; ++m) {
      E* s = scores + m * keys;
      F highest = V::set1(lowest);
      if (changed) {
        const auto* bias = static_cast<const Y*>(a.bias.data);
        if (bias) bias += b * a.bias.batch + h * a.bias.head + (t0 + m) * a.bias.query;
        if (a.keep.query != 0) set_limits(t0 + m);
        for (int64_t j = 0; j < keys; j += V::W) {
          F v = V::mul(V::load(s + j), V::set1(scale));
          if (bias && j < a.T) v = V::fma(a.T - j >= V::W ? Io::load_y(bias + j) : load_edge<Io>(bias + j, a.T - j), V::set1(log2e), v);
          if (limited) v = V::min(V::load(limits + j), v);
          V::store(s + j, v);
          highest = V::max(highest, v);
        }
      } else {
        for (int64_t j = 0; j < keys; j += V::W) highest = V::max(highest, V::mul(V::load(s + j), factor));
      }
      V::store(lanes + m * V::W, highest);
    }
    over_lanes(rows, totals, [](F v, F w) { return V::max(v, w); });
    for (int64_t m = 0; m < rows; ++m) {
      const E* s = scores + m * keys;
      X* w = weights + m * keys;
      const F minus_top = V::set1(-totals[m]);
      F total = V::zero();
      for (int64_t j = 0; j < keys; j += V::W) {
        const F e = Dot::exp2_nonpositive(V::fma(V::load(s + j), factor, minus_top));
        total = V::add(total, e);
        Dot::store_x(w + j, e);
      }
      V::store(lanes + m * V::W, total);
    }
    over_lanes(rows, totals, [](F v, F w) { return V::add(v, w); });
  }

  void run(int64_t t0, int64_t t1) {
    pack();
    const auto* q = static_cast<const Y*>(a.q) + b * a.q_batch + h * a.q_head;
    auto* out = static_cast<Y*>(a.out) + (b * a.T * a.heads + h) * a.d;
    set_limits(0);
    for (int64_t t = t0; t < t1; t += rows_most) {
      const int64_t rows = t1 - t < rows_most ? t1 - t : rows_most;
      const X* x = nullptr;
      int64_t ldx = a.q_token;
      bool in_place = false;
      if constexpr (std::is_same_v<X, Y>) {
        in_place = a.d % (step * tile_steps) == 0 && (!tiles || rows % V::W == 0);
        x = q + t * a.q_token;
      }
      if (!in_place) {
        ldx = features * step;
        for (int64_t m = 0; m < rows; ++m) {
          memset(row + m * ldx, 0, sizeof(X) * ldx);
          convert_row<Dot, Io>(q + (t + m) * a.q_token, a.d, row + m * ldx);
        }
        x = row;
      }
      prefetch_next(t, rows);
      product<Dot>(rows, keys, x, ldx, packed_k, feature_steps, scores, keys);                // [rows, keys]
      softmax(rows, t);
      product<Dot>(rows, features, weights, keys, packed_v, key_steps, sums, features);       // [rows, d]
      for (int64_t m = 0; m < rows; ++m) {
        const F share = V::set1(totals[m] == 0 ? E(0) : 1 / totals[m]);
        Y* to = out + (t + m) * a.heads * a.d;
        for (int64_t c = 0; c < a.d; c += V::W) {
          const F v = V::mul(V::load(sums + m * features + c), share);
          if (a.d - c >= V::W) {
            Io::store_y(to + c, v);
          } else {
            Y edge[V::W];
            Io::store_y(edge, v);
            for (int64_t j = 0; j < a.d - c; ++j) to[c + j] = edge[j];
          }
        }
      }
    }
  }
};

template <class Dot, class Io>
void attention_of(const AttentionArgs& a, int64_t b, int64_t h, int64_t t0, int64_t t1) {
  AttentionHead<Dot, Io>(a, b, h).run(t0, t1);
}

template <class V>
void attention_any(const AttentionArgs& a, int64_t b, int64_t h, int64_t t0, int64_t t1) {
  if (a.dtype == DType::f32)
    attention_of<Plain<V>, Plain<V>>(a, b, h, t0, t1);
  else if (a.dtype == DType::bf16)
    attention_of<Plain<V>, Bf16Weights<V>>(a, b, h, t0, t1);
  else
    attention_of<Plain<V>, HalfWeights<V>>(a, b, h, t0, t1);
}

// The sum over a row, in four partial sums: one addition takes several cycles, and one or two start per cycle.
template <class V, class Term>
typename V::Elem row_sum(int64_t width, const Term& term) {
  typename V::F part[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
  int64_t j = 0;
  for (; j + 4 * V::W <= width; j += 4 * V::W)
    for (int u = 0; u < 4; ++u) part[u] = V::add(part[u], term(j + u * V::W));
  for (; j < width; j += V::W) part[0] = V::add(part[0], term(j));
  return V::sum(V::add(V::add(part[0], part[1]), V::add(part[2], part[3])));
}

template <class Io>
void layer_norm_of(const NormArgs& a, int64_t m0, int64_t m1) {
  using V = typename Io::Vec;
  using F = typename V::F;
  using E = typename V::Elem;
  using Y = typename Io::Y;
  const int64_t width = round_up(a.H, V::W), whole = a.H / V::W * V::W;
  E* scratch = static_cast<E*>(thread_scratch(sizeof(E) * 3 * width));
  E *z = scratch, *scale = scratch + width, *shift = scale + width;  // [width] each, zeros past H
  const auto load = [&](const Y* from, int64_t j) { return j < whole ? Io::load_y(from + j) : load_edge<Io>(from + j, a.H - j); };
  for (int64_t j = 0; j < width; j += V::W) {
    V::store(scale + j, a.weight ? load(static_cast<const Y*>(a.weight), j) : V::set1(1));
    V::store(shift + j, a.bias ? load(static_cast<const Y*>(a.bias), j) : V::zero());
  }
  for (int64_t m = m0; m < m1; ++m) {
    const Y* x = static_cast<const Y*>(a.x) + m * a.ldx;
    const Y* residual = a.residual ? static_cast<const Y*>(a.residual) + m * a.H : nullptr;
    Y* y = static_cast<Y*>(a.y) + m * a.H;
    const E mean = row_sum<V>(width, [&](int64_t j) {
      F v = load(x, j);
      if (residual) v = V::add(v, load(residual, j));
      V::store(z + j, v);
      return v;
    }) / a.H;
    const F minus_mean = V::set1(-mean);
    E squares = row_sum<V>(whole, [&](int64_t j) {
      const F v = V::add(V::load(z + j), minus_mean);
      V::store(z + j, v);
      return V::mul(v, v);
    });
    for (int64_t j = whole; j < a.H; ++j) {
      z[j] -= mean;
      squares += z[j] * z[j];
    }
    const F factor = V::set1(E(1) / std::sqrt(squares / a.H + static_cast<E>(a.eps)));
    for (int64_t j = 0; j < width; j += V::W) {
      const F v = V::fma(V::mul(V::load(z + j), factor), V::load(scale + j), V::load(shift + j));
      if (j < whole) {
        Io::store_y(y + j, v);
      } else {
        Y edge[V::W];
        Io::store_y(edge, v);
        for (int64_t i = 0; i < a.H - j; ++i) y[j + i] = edge[i];
      }
    }
  }
}

template <class V>
void layer_norm_any(const NormArgs& a, int64_t m0, int64_t m1) {
  if (a.dtype == DType::f32)
    layer_norm_of<Plain<V>>(a, m0, m1);
  else if (a.dtype == DType::bf16)
    layer_norm_of<Bf16Weights<V>>(a, m0, m1);
  else
    layer_norm_of<HalfWeights<V>>(a, m0, m1);
}
