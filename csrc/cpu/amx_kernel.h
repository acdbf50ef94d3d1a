// The product by tiles that bf16 and int8 share: in bytes the two are the same. Rows of x and weights are groups of 4 bytes (2 bf16 or
// 4 int8), weights lie as [groups][R][4]. Included after tile_kernel.h and amx_tile.h, inside an unnamed namespace.
//
// Four tiles of 16 x 16 sums stay in registers: 32 rows of x by 32 outputs, or 16 by 64. A product into a tile takes 52 cycles and another into a
// different tile may start every 16, so four must be under way: where an output tile is smaller, every second step goes to sums of its own.
// What follows the sums (bias, rounding, y) has no tile instructions; it is done for one tile once the products of the next are under way.
// Nothing of x or the weights is fetched ahead: from L2 the processor's own reach covers it, and the instructions cost 43 cycles a step.
//
// Op provides: a (its LinearArgs or more), size (bytes of an input), Sum (float or uint32_t), dot<C, A, B>, and Columns<NT>(op, n, cols), the
// outputs from n on, of which cols exist, whose write(z, m, rows) makes rows of y from m on of sums z[NT][16][16].

constexpr int64_t kTile = 16;  // rows of a tile, and sums in one of its rows

struct AmxShape {
  int64_t step;         // bytes of a row of x that a tile product takes
  int64_t rows;         // rows of x in a tile
  int64_t second;       // row at which the second tile of x begins
  int64_t ldx, x_bytes; // bytes from one row of x to the next, and in a row
  bool streams;         // x would push the weights out of L1
};

// The sums of a finished tile, on their way to y.
template <class Op>
struct Unfinished {
  alignas(64) typename Op::Sum z[4][kTile * kTile];  // tile 2 * (its x) + (its weights): [16][16]
  int64_t m, n, cols, rows, second;
  int64_t fresh;   // the first row that y does not have yet
  int tall, wide;  // tiles of x and of weights; 0: there is none
  int other;       // z[t ^ other] holds the other half of z[t]; 0: there is none
};

// The largest divisor of a block's bytes per row that is a multiple of a group and fits a row of a tile.
inline int64_t bytes_per_step(int64_t block_bytes) {
  for (int64_t step = 64; step > 0; step -= 4)
    if (block_bytes % step == 0) return step;
  return 0;
}

// A product of tiles takes 16 cycles, however few of the 64 bytes are used, and one of vectors 16 cycles per row of x: tiles win from
// some 4 rows and 16 bytes on. A last block that is cut must still hold whole steps.
inline bool tiles_fit(int64_t R, int64_t block_bytes, int64_t x_bytes, int64_t height) {
  const int64_t step = bytes_per_step(block_bytes);
  return R % kTile == 0 && step >= 16 && x_bytes % step == 0 && height >= 4;
}

// Loads the configuration unless this thread has it already: ldtilecfg also clears every tile.
inline void configure(const AmxShape& s, bool four_columns = false) {
  TileConfig want = {}, have = {};
  want.palette = 1;
  for (int t = 0; t < 8; ++t) {
    want.rows[t] = static_cast<uint8_t>(t < 6 ? s.rows : s.step / 4);                       // weights: [groups][16][4 bytes]
    want.row_bytes[t] = static_cast<uint16_t>(t == 4 || t == 5 ? s.step : 4 * kTile);       // x: [rows][step]
  }
  if (four_columns) {
    want.rows[5] = want.rows[6];
    want.row_bytes[5] = want.row_bytes[6];
  }
  __asm__ volatile("" : : : "memory");  // a tile load does not tell the compiler what it reads: x must have been written by now
  tile_store_config(&have);
  if (memcmp(&want, &have, sizeof want) != 0) tile_load_config(&want);
}

template <int NT, class Op>
void write_tile(const Op& op, Unfinished<Op>& u) {
  const typename Op::template Columns<NT> columns(op, u.n, u.cols);
  for (int t = 0; t < u.tall; ++t) {
    auto* z = u.z[2 * t];  // [NT][16][16]
    if (u.other)
      for (int v = 0; v < NT; ++v)
        for (int64_t j = 0; j < u.rows * kTile; ++j) u.z[2 * t + v][j] += u.z[(2 * t + v) ^ u.other][j];
    // Tiles may share rows, and what is a pair's residual would be multiplied twice.
    const int64_t m = u.m + t * u.second, done = u.fresh > m ? u.fresh - m : 0;
    columns.write(z + done * kTile, m + done, u.rows - done);
    u.fresh = m + u.rows;
  }
}

template <class Op>
inline void write_tile(const Op& op, Unfinished<Op>& u) {
  if (u.wide == 4) write_tile<4>(op, u);
  if (u.wide == 2) write_tile<2>(op, u);
  if (u.wide == 1) write_tile<1>(op, u);
}

// One step: MT tiles of x by NT of weights, into the tiles of SET where there are fewer than four. Tiles: see amx_tile.h.
template <class Op, int MT, int NT, int SET>
inline void amx_step(const char* x, int64_t second, int64_t ldx, bool streams, const char* w, int64_t ldw) {
  if constexpr (NT == 4) {
    streams ? tile_stream<4>(x, ldx) : tile_load<4>(x, ldx);  // [rows][step]
    tile_load<5>(w, ldw);                                     // [groups][16][4]
    Op::template dot<0, 4, 5>();
    tile_load<6>(w + 64, ldw);
    Op::template dot<1, 4, 6>();
    tile_load<7>(w + 128, ldw);
    Op::template dot<2, 4, 7>();
    tile_load<5>(w + 192, ldw);
    Op::template dot<3, 4, 5>();
    return;
  }
  constexpr int A = MT == 1 ? 4 + SET : 4, B = NT == 1 ? 6 + SET : 6, C = 2 * (A - 4) + B - 6;
  tile_load<B>(w, ldw);                                 // [groups][16][4]
  if constexpr (NT == 2) tile_load<7>(w + 64, ldw);     // [groups][16][4]
  streams ? tile_stream<A>(x, ldx) : tile_load<A>(x, ldx);  // [rows][step]
  Op::template dot<C, A, B>();
  if constexpr (NT == 2) Op::template dot<C + 1, A, 7>();
  if constexpr (MT == 2) {
    streams ? tile_stream<5>(x + second, ldx) : tile_load<5>(x + second, ldx);  // [rows][step]
    Op::template dot<C + 2, 5, B>();
    if constexpr (NT == 2) Op::template dot<3, 5, 7>();
  }
}

// Into u, when what is there has gone to y: rows from m (at x), of which those before `fresh` are in y, and outputs from n of block-row i,
// of which cols exist.
template <class Op, int MT, int NT>
void amx_tile(const Op& op, const AmxShape& s, const char* x, int64_t i, int64_t m, int64_t fresh, int64_t n, int64_t cols, Unfinished<Op>& u) {
  const auto& a = op.a;
  constexpr int sets = MT * NT == 4 ? 1 : 2;
  tile_zero<0>();
  if (MT * NT > 1) tile_zero<1>();
  if (MT * NT > 1) tile_zero<2>();
  tile_zero<3>();
  const int64_t step = s.step, ldx = s.ldx, second = s.second * ldx, x_bytes = s.x_bytes;
  const int64_t block_bytes = a.C * Op::size, ldw = 4 * a.R, step_w = step * a.R, block_w = block_bytes * a.R;
  const char* w = static_cast<const char*>(a.w) + (n - i * a.R) * 4;
  const int32_t *col = a.col, *block = a.block;
  const bool streams = s.streams;
  int64_t steps = 0;
  for (int64_t e = a.crow[i], end = a.crow[i + 1]; e < end; ++e) {
    const int64_t k0 = col[e] * block_bytes, bytes = x_bytes - k0 < block_bytes ? x_bytes - k0 : block_bytes;
    const char *xk = x + k0, *wk = w + (block ? block[e] : e) * block_w;  // wk: [groups][R][4]
    for (const char* x_end = xk + bytes; xk < x_end; xk += step, wk += step_w, ++steps)
      if (sets == 2 && steps & 1)
        amx_step<Op, MT, NT, 1>(xk, second, ldx, streams, wk, ldw);
      else
        amx_step<Op, MT, NT, 0>(xk, second, ldx, streams, wk, ldw);
  }
  write_tile(op, u);
  tile_store<0>(u.z[0], 4 * kTile);
  if (MT * NT > 1) tile_store<1>(u.z[1], 4 * kTile);
  if (MT * NT > 1) tile_store<2>(u.z[2], 4 * kTile);
  tile_store<3>(u.z[3], 4 * kTile);
  u.m = m, u.n = n, u.cols = cols, u.rows = s.rows, u.second = s.second, u.fresh = fresh;
  u.tall = MT, u.wide = NT, u.other = sets == 2 && steps > 1 ? (MT == 1 ? 2 : 0) + (NT == 1 ? 1 : 0) : 0;
}

// Rows [m0, m1) of block-rows [i0, i1), in the order of linear_range; x is row m0. Panels are four tiles high, and the second to fourth find
// the weights in L1; two where block-rows have few weights, and the lines of y, of which hardware follows 64 rows at most, decide.
template <class Op>
void amx_range(const Op& op, const char* x, int64_t ldx, int64_t x_bytes, int64_t m0, int64_t m1, int64_t i0, int64_t i1) {
  const auto& a = op.a;
  const int64_t height = m1 - m0;
  AmxShape s = {bytes_per_step(a.C * Op::size), kTile, kTile, ldx, x_bytes, false};
  // Four columns read x once for 64 outputs and write two lines of y side by side, but each of their products needs a load of weights: for
  // blocks that are as high, where the others would wait for x and y. By the whole weight, since a tile of 16 rows by 32 adds in another order
  // than one by 64, and the result must not depend on a thread's share.
  const int64_t block_rows = (a.N + a.R - 1) / a.R, weight_bytes = a.crow[block_rows] * a.C * Op::size * 4 * kTile / block_rows;
  const bool four_columns = a.R % (4 * kTile) == 0 && (s.step < 64 || weight_bytes <= 65536);
  if (four_columns) {
    s.rows = height < kTile ? height : kTile;
  } else if (height < 2 * kTile) {  // two tiles of equal height, which may share a row, or one
    s.rows = height > kTile ? (height + 1) / 2 : height;
    s.second = height - s.rows;
  }
  configure(s, four_columns);
  Unfinished<Op> u;
  u.wide = 0;
  for (int64_t g0 = i0, g1; g0 < i1; g0 = g1) {
    g1 = group_end(a, g0, i1, Op::size);
    const int64_t row_bytes = (a.crow[g1] - a.crow[g0]) * a.C * Op::size * 2 * kTile / (g1 - g0);  // of weights, 32 outputs of a block-row
    const int64_t panel = (row_bytes <= 8192 ? 4 : 8) * kTile;
    s.streams = s.step == 64 && row_bytes > 16384 && height * x_bytes > 32768;
    for (int64_t p = m0; p < m1; p += panel) {
      const int64_t panel_end = p + panel < m1 ? p + panel : m1;
      for (int64_t i = g0; i < g1; ++i) {
        const int64_t row_end = (i + 1) * a.R < a.N ? (i + 1) * a.R : a.N;
        for (int64_t n = i * a.R, wanted; n < row_end; n += wanted) {
          const bool wide = (i + 1) * a.R - n > kTile;
          wanted = (four_columns ? 4 : (wide ? 2 : 1)) * kTile;
          const int64_t cols = row_end - n < wanted ? row_end - n : wanted;
          for (int64_t next = p, m; next < panel_end;) {
            const bool tall = !four_columns && height > kTile && (height < 2 * kTile || panel_end - next > kTile);
            const int64_t most = tall ? s.second + s.rows : s.rows;
            // The last tile begins early enough to be whole, and shares rows with the one before.
            m = next + most <= m1 ? next : m1 - most;
            auto tile = tall ? (wide ? amx_tile<Op, 2, 2> : amx_tile<Op, 2, 1>) : (wide ? amx_tile<Op, 1, 2> : amx_tile<Op, 1, 1>);
            if (four_columns) tile = amx_tile<Op, 1, 4>;
            tile(op, s, x + (m - m0) * ldx, i, m, next, n, cols, u);
            next = m + most;
          }
        }
      }
    }
  }
  write_tile(op, u);
}
