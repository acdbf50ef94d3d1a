// The product by tiles that bf16 and int8 share: in bytes the two are the same. Rows of x and weights are groups of 4 bytes (2 bf16 or
// 4 int8), weights lie as [groups][R][4]. Included after tile_kernel.h and amx_tile.h, inside an unnamed namespace.
//
// Four tiles of 16 x 16 sums stay in registers: 32 rows of x by 32 outputs, or 16 by 64. A product takes 16 cycles (17.4 at full clock), into
// the same tile as the one before too. What follows the sums (bias, rounding, y) has no tile instructions; it is done for one tile once the
// products of the next are under way. Nothing of x or the weights is fetched ahead: from L2 the processor's own reach covers it, and the
// instructions cost 43 cycles a step.
//
// Op provides: a (its LinearArgs or more), size (bytes of an input), Sum (float or uint32_t), dot<C, A, B>, and Columns<NT>(op, n, cols), the
// outputs from n on, of which cols exist, whose write(z, m, rows) makes rows of y from m on of sums z[NT][16][16]; pieces: 2 where an
// input is the sum of two bf16, the second x_piece bytes behind the first, or w_piece.

constexpr int64_t kTile = 16;  // rows of a tile, and sums in one of its rows

struct AmxShape {
  int64_t step;                      // bytes of a row of x that a tile product takes in one block
  bool whole;                        // 64 bytes at a time where a block, or blocks side by side, have them; what is left, by `step`
  int64_t rows;                      // rows of x in a tile
  int64_t second = 0;                // row at which the second tile of x begins
  int64_t ldx = 0, x_bytes = 0;      // bytes from one row of x to the next, and in a row
  bool streams_x = false, streams_w = false;  // would push the other out of L1
};

constexpr AmxShape kWholeTiles = {4 * kTile, true, kTile};

// The sums of a finished tile, on their way to y.
template <class Op>
struct Unfinished {
  alignas(64) typename Op::Sum z[4][kTile * kTile];  // tile 2 * (its x) + (its weights): [16][16]
  int64_t m, n, cols, rows, second;
  int64_t fresh;   // the first row that y does not have yet
  int tall, wide;  // tiles of x and of weights; 0: there is none
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
inline void configure(const AmxShape& s) {
  TileConfig want = {}, have = {};
  want.palette = 1;
  const int64_t step = s.whole ? 64 : s.step;
  const auto set = [&](int t, int64_t rows, int64_t bytes) {
    want.rows[t] = static_cast<uint8_t>(rows);
    want.row_bytes[t] = static_cast<uint16_t>(bytes);
  };
  for (int t = 0; t < 4; ++t) set(t, s.rows, 4 * kTile);
  set(4, s.rows, step);
  set(5, s.rows, s.step);
  set(6, step / 4, 4 * kTile);
  set(7, s.step / 4, 4 * kTile);
  __asm__ volatile("" : : : "memory");  // a tile load does not tell the compiler what it reads: x must have been written by now
  tile_store_config(&have);
  if (memcmp(&want, &have, sizeof want) != 0) tile_load_config(&want);
}

template <int NT, class Op>
void write_tile(const Op& op, Unfinished<Op>& u) {
  const typename Op::template Columns<NT> columns(op, u.n, u.cols);
  for (int t = 0; t < u.tall; ++t) {
    auto* z = u.z[2 * t];  // [NT][16][16]
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

// One step: MT tiles of x by NT of weights into the tiles from C on, x by way of tile A and weights of B.
template <class Op, int MT, int NT, int C, int A, int B>
inline void amx_step(const char* x, int64_t second, int64_t ldx, bool streams_x, const char* w, int64_t ldw, bool streams_w) {
  const auto load_x = [&](const char* at) { streams_x ? tile_stream<A>(at, ldx) : tile_load<A>(at, ldx); };  // [rows][step]
  const auto load_w = [&](const char* at) { streams_w ? tile_stream<B>(at, ldw) : tile_load<B>(at, ldw); };  // [groups][16][4]
  load_x(x);
  load_w(w);
  Op::template dot<C, A, B>();
  if constexpr (NT > 1) load_w(w + 64), Op::template dot<C + 1, A, B>();
  if constexpr (NT > 2) load_w(w + 128), Op::template dot<C + 2, A, B>();
  if constexpr (NT > 3) load_w(w + 192), Op::template dot<C + 3, A, B>();
  if constexpr (MT == 2) {  // the last weights first, since they are there
    load_x(x + second);
    Op::template dot<C + NT + 1, A, B>();
    if constexpr (NT == 2) load_w(w), Op::template dot<C + 2, A, B>();
  }
}

// The same where inputs are sums of two bf16, the larger first: all four products, of which each but the first finds one factor in its tiles.
template <class Op, int MT, int NT>
inline void amx_step_in_pieces(const Op& op, const char* x, int64_t second, int64_t ldx, const char* w, int64_t ldw) {
  const auto load_x = [&](const char* at) {
    tile_load<4>(at, ldx);
    if constexpr (MT > 1) tile_load<5>(at + second, ldx);
  };
  const auto load_w = [&](const char* at) {
    tile_load<6>(at, ldw);
    if constexpr (NT > 1) tile_load<7>(at + 64, ldw);
  };
  const auto multiply = [] {
    Op::template dot<0, 4, 6>();
    if constexpr (NT > 1) Op::template dot<1, 4, 7>();
    if constexpr (MT > 1) Op::template dot<2, 5, 6>();
    if constexpr (MT > 1 && NT > 1) Op::template dot<3, 5, 7>();
  };
  load_w(w), load_x(x + op.x_piece), multiply();
  load_w(w + op.w_piece), multiply();
  load_x(x), multiply();
  load_w(w), multiply();
}

// Block-row i, NT tiles of its weights (at w) by MT of x, into the tiles from C on.
template <class Op, int MT, int NT, int C>
inline void amx_block_row(const Op& op, const AmxShape& s, const char* x, int64_t i, const char* w) {
  const auto& a = op.a;
  const int64_t step = s.step, ldx = s.ldx, second = s.second * ldx, x_bytes = s.x_bytes;
  const int64_t block_bytes = a.C * Op::size, ldw = 4 * a.R, block_w = block_bytes * a.R;
  const int32_t *col = a.col, *block = a.block;
  const bool streams_x = s.streams_x, streams_w = s.streams_w, whole = s.whole, joins = whole && block_bytes < 64;
  for (int64_t e = a.crow[i], end = a.crow[i + 1]; e < end; ++e) {
    const int64_t k0 = col[e] * block_bytes;
    const char *xk = x + k0, *wk = w + (block ? block[e] : e) * block_w;  // wk: [groups][R][4]
    int64_t bytes = block_bytes;
    if (joins)  // blocks side by side are one in memory too
      for (; e + 1 < end && col[e + 1] == col[e] + 1 && (!block || block[e + 1] == block[e] + 1); ++e) bytes += block_bytes;
    const char* x_end = xk + (x_bytes - k0 < bytes ? x_bytes - k0 : bytes);
    if constexpr (Op::pieces > 1) {
      for (; xk < x_end; xk += 64, wk += 64 * a.R) amx_step_in_pieces<Op, MT, NT>(op, xk, second, ldx, wk, ldw);
    } else {
      if (whole)
        for (; x_end - xk >= 64; xk += 64, wk += 64 * a.R) amx_step<Op, MT, NT, C, 4, 6>(xk, second, ldx, streams_x, wk, ldw, streams_w);
      for (; xk < x_end; xk += step, wk += step * a.R) amx_step<Op, MT, NT, C, 5, 7>(xk, second, ldx, streams_x, wk, ldw, streams_w);
    }
  }
}

// Into u, when what is there has gone to y: rows from m (at x), of which those before `fresh` are in y, and outputs from n on, of which cols
// exist, P tiles of them from each block-row.
template <class Op, int MT, int NT, int P>
void amx_tile(const Op& op, const AmxShape& s, const char* x, int64_t m, int64_t fresh, int64_t n, int64_t cols, Unfinished<Op>& u) {
  const auto& a = op.a;
  tile_zero<0>();
  if (NT > 1) tile_zero<1>();
  if (MT > 1 || NT > 2) tile_zero<2>();
  if (MT * NT > 2) tile_zero<3>();
  const int64_t i = n / a.R;
  const char* w = static_cast<const char*>(a.w) + (n - i * a.R) * 4;
  amx_block_row<Op, MT, P, 0>(op, s, x, i, w);
  if constexpr (NT > P) amx_block_row<Op, MT, P, P>(op, s, x, i + 1, w);
  if constexpr (NT > 2 * P) amx_block_row<Op, MT, P, 2 * P>(op, s, x, i + 2, w);
  if constexpr (NT > 3 * P) amx_block_row<Op, MT, P, 3 * P>(op, s, x, i + 3, w);
  write_tile(op, u);
  tile_store<0>(u.z[0], 4 * kTile);
  if (NT > 1) tile_store<1>(u.z[1], 4 * kTile);
  if (MT > 1 || NT > 2) tile_store<2>(u.z[2], 4 * kTile);
  if (MT * NT > 2) tile_store<3>(u.z[3], 4 * kTile);
  u.m = m, u.n = n, u.cols = cols, u.rows = s.rows, u.second = s.second, u.fresh = fresh;
  u.tall = MT, u.wide = NT;
}

// For `wide` tiles of outputs, of which a block-row has `own`.
template <class Op>
auto amx_tile_of(bool tall, int64_t wide, int64_t own) {
  if (tall) return wide == 2 ? amx_tile<Op, 2, 2, 2> : amx_tile<Op, 2, 1, 1>;
  if constexpr (Op::pieces > 1) return wide == 2 ? amx_tile<Op, 1, 2, 2> : amx_tile<Op, 1, 1, 1>;
  else if (wide == 4) return own >= 4 ? amx_tile<Op, 1, 4, 4> : own == 2 ? amx_tile<Op, 1, 4, 2> : amx_tile<Op, 1, 4, 1>;
  if (wide == 2) return own >= 2 ? amx_tile<Op, 1, 2, 2> : amx_tile<Op, 1, 2, 1>;
  return amx_tile<Op, 1, 1, 1>;
}

// Rows [m0, m1) of block-rows [i0, i1), in the order of linear_range; x is row m0. Panels are four tiles high, and the second to fourth find
// the weights in L1; two where block-rows have few weights, and the lines of y, of which hardware follows 64 rows at most, decide. Blocks of
// 16 outputs (32 where a tile's row is not full) use a line of x for too few products: their panels are 16 rows that stay in L1, and weights
// pass by from L2.
template <class Op>
void amx_range(const Op& op, const char* x, int64_t ldx, int64_t x_bytes, int64_t m0, int64_t m1, int64_t i0, int64_t i1) {
  const auto& a = op.a;
  constexpr bool one_piece = Op::pieces == 1;
  const int64_t height = m1 - m0, block_bytes = a.C * Op::size, step = bytes_per_step(block_bytes);
  AmxShape s = {step, step == 64 || 64 % block_bytes == 0, kTile, kTile, ldx, x_bytes};
  const int64_t side = 4 * kTile / a.R;  // block-rows in four tiles of outputs, where more than one
  const bool x_stays = one_piece && (side == 4 || (side == 2 && step < 64)) && a.R % kTile == 0 && kTile * x_bytes <= 32768;
  // Four columns read x once for 64 outputs and write two lines of y side by side, but each of their products needs a load of weights: for
  // blocks that are as high, where the others would wait for x and y.
  const int64_t block_rows = (a.N + a.R - 1) / a.R, weight_bytes = a.crow[block_rows] * block_bytes * 4 * kTile / block_rows;
  const bool four_columns = x_stays || (one_piece && a.R % (4 * kTile) == 0 && (step < 64 || weight_bytes <= 65536));
  if (four_columns) {
    s.rows = height < kTile ? height : kTile;
  } else if (height < 2 * kTile) {  // two tiles of equal height, which may share a row, or one
    s.rows = height > kTile ? (height + 1) / 2 : height;
    s.second = height - s.rows;
  }
  s.streams_w = x_stays;
  configure(s);
  Unfinished<Op> u;
  u.wide = 0;
  for (int64_t g0 = i0, g1; g0 < i1; g0 = g1) {
    g1 = group_end(a, g0, i1, Op::size * Op::pieces);
    if (x_stays && g1 < i1 && g1 / side * side > g0) g1 = g1 / side * side;
    // Of weights, 32 outputs of a block-row.
    const int64_t row_bytes = (a.crow[g1] - a.crow[g0]) * block_bytes * Op::pieces * 2 * kTile / (g1 - g0);
    const int64_t panel = (x_stays ? 1 : row_bytes <= 8192 ? 4 : 8) * kTile;
    s.streams_x = !x_stays && step == 64 && row_bytes > 16384 && height * x_bytes > 32768;
    const int64_t outputs = g1 * a.R < a.N ? g1 * a.R : a.N;
    for (int64_t p = m0; p < m1; p += panel) {
      const int64_t panel_end = p + panel < m1 ? p + panel : m1;
      for (int64_t n = g0 * a.R, wide; n < outputs; n += wide * kTile) {
        const int64_t row_end = (n / a.R + 1) * a.R, end = x_stays || row_end > outputs ? outputs : row_end;
        const auto fits = [&](int64_t tiles) { return n % (tiles * kTile) == 0 && n + tiles * kTile <= end; };
        wide = four_columns && fits(4) ? 4 : fits(2) ? 2 : 1;
        const int64_t cols = end - n < wide * kTile ? end - n : wide * kTile;
        for (int64_t next = p, m; next < panel_end;) {
          const bool tall = !four_columns && height > kTile && (height < 2 * kTile || panel_end - next > kTile);
          const int64_t most = tall ? s.second + s.rows : s.rows;
          // The last tile begins early enough to be whole, and shares rows with the one before.
          m = next + most <= m1 ? next : m1 - most;
          amx_tile_of<Op>(tall, wide, a.R / kTile)(op, s, x + (m - m0) * ldx, m, next, n, cols, u);
          next = m + most;
        }
      }
    }
  }
  write_tile(op, u);
}
