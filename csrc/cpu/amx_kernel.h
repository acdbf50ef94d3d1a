// The product by tiles that bf16 and int8 share: in bytes the two are the same. Rows of x and weights are groups of 4 bytes (2 bf16 or
// 4 int8), weights lie as [groups][R][4]. Included after tile_kernel.h and amx_tile.h, inside an unnamed namespace.
//
// Four tiles of 16 x 16 sums stay in registers: 32 rows of x by 32 outputs. A product into a tile takes 52 cycles and another into a
// different tile may start every 16, so four must be under way: where an output tile is smaller, every second step goes to sums of its own.
// What follows the sums (bias, rounding, y) has no tile instructions; it is done a few rows after each step of the next tile, so that
// the tile unit does not wait for it.
//
// Op provides: a (its LinearArgs or more), size (bytes of an input), Sum (float or int32_t), F (16 of them), load, add, dot<C, A, B>, and
// Columns<NT>(op, n, cols), the outputs from n on, of which cols exist, whose write(m, sums) makes row m of y.

constexpr int64_t kTile = 16;  // rows of a tile, and sums in one of its rows

struct AmxShape {
  int64_t step;         // bytes of a row of x that a tile product takes
  int64_t rows;         // rows of x in a tile
  int64_t second;       // row at which the second tile of x begins
  int64_t ldx, x_bytes; // bytes from one row of x to the next, and in a row
  bool aliased;         // rows of x compete for few sets of the L1 cache
};

// The sums of a finished tile, on their way to y.
template <class Op>
struct Unfinished {
  alignas(64) typename Op::Sum z[4][kTile * kTile];  // tile 2 * (its x) + (its weights): [16][16]
  int64_t m, n, cols, rows, second, done, total;
  int64_t fresh;  // the first row that y does not have yet
  bool wide;
  int other;  // z[t ^ other] holds the other half of z[t]; 0: there is none
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
  for (int t = 0; t < 8; ++t) {
    want.rows[t] = static_cast<uint8_t>(t < 6 ? s.rows : s.step / 4);                       // weights: [groups][16][4 bytes]
    want.row_bytes[t] = static_cast<uint16_t>(t == 4 || t == 5 ? s.step : 4 * kTile);       // x: [rows][step]
  }
  __asm__ volatile("" : : : "memory");  // a tile load does not tell the compiler what it reads: x must have been written by now
  tile_store_config(&have);
  if (memcmp(&want, &have, sizeof want) != 0) tile_load_config(&want);
}

// Write up to `count` more rows of strips of NT * 16 outputs.
template <int NT, class Op>
inline void write_rows(const Op& op, Unfinished<Op>& u, int64_t count) {
  const typename Op::template Columns<NT> columns(op, u.n, u.cols);
  for (; count > 0 && u.done < u.total; --count, ++u.done) {
    const bool below = u.done >= u.rows;  // in the second tile of x
    const int64_t row = below ? u.done - u.rows : u.done, at = u.m + row + (below ? u.second : 0);
    if (at < u.fresh) continue;  // tiles may share rows, and what is a pair's residual would be multiplied twice
    u.fresh = at + 1;
    typename Op::F sums[NT];  // [NT * 16]
    for (int v = 0; v < NT; ++v) {
      const int t = 2 * below + v;
      sums[v] = Op::load(u.z[t] + row * kTile);
      if (u.other) sums[v] = Op::add(sums[v], Op::load(u.z[t ^ u.other] + row * kTile));
    }
    columns.write(at, sums);
  }
}

template <class Op>
inline void write_rows(const Op& op, Unfinished<Op>& u, int64_t count) {
  if (u.done < u.total) u.wide ? write_rows<2>(op, u, count) : write_rows<1>(op, u, count);
}

// One step: MT tiles of x by NT of weights, into the tiles of SET where there are fewer than four. Tiles: see amx_tile.h.
template <class Op, int MT, int NT, int SET>
inline void amx_step(const char* x, int64_t second, int64_t ldx, const char* w, int64_t ldw) {
  constexpr int A = MT == 1 ? 4 + SET : 4, B = NT == 1 ? 6 + SET : 6, C = 2 * (A - 4) + B - 6;
  tile_load<B>(w, ldw);                                 // [groups][16][4]
  if constexpr (NT == 2) tile_load<7>(w + 64, ldw);     // [groups][16][4]
  tile_load<A>(x, ldx);                                 // [rows][step]
  Op::template dot<C, A, B>();
  if constexpr (NT == 2) Op::template dot<C + 1, A, 7>();
  if constexpr (MT == 2) {
    tile_load<5>(x + second, ldx);                      // [rows][step]
    Op::template dot<C + 2, 5, B>();
    if constexpr (NT == 2) Op::template dot<3, 5, 7>();
  }
}

// Rows from m (at x), of which those before `fresh` are in y, outputs from n of block-row i, of which cols exist. first: the weights are
// not in L1 yet.
template <class Op, int MT, int NT>
void amx_tile(const Op& op, const AmxShape& s, const char* x, int64_t i, bool first, int64_t m, int64_t fresh, int64_t n, int64_t cols,
              Unfinished<Op>& u) {
  const auto& a = op.a;
  constexpr int sets = MT * NT == 4 ? 1 : 2;
  tile_zero<0>();
  if (MT * NT > 1) tile_zero<1>();
  if (MT * NT > 1) tile_zero<2>();
  tile_zero<3>();
  const int64_t begin = a.crow[i], end = a.crow[i + 1];
  const int64_t block_bytes = a.C * Op::size, ldw = 4 * a.R, groups = block_bytes / 4;
  const int64_t steps = (end - begin) * (block_bytes / s.step), part = steps ? (u.total - u.done + steps - 1) / steps : 0;
  const char* w = static_cast<const char*>(a.w) + (n - i * a.R) * 4;
  bool odd = false;
  for (int64_t e = begin; e < end; ++e) {
    const int64_t k0 = a.col[e] * block_bytes;
    const int64_t bytes = s.x_bytes - k0 < block_bytes ? s.x_bytes - k0 : block_bytes;
    const char* wb = w + (a.block ? a.block[e] : e) * block_bytes * a.R;  // [groups][R][4]
    if (e + 1 < end) {  // the next block's x is anywhere in the row, which no hardware prefetcher can know
      const char* next = x + a.col[e + 1] * block_bytes;
      for (int64_t j = 0; j < block_bytes; j += 64)
        for (int64_t r = 0; r < (MT == 2 ? s.second : 0) + s.rows; ++r)
          s.aliased ? prefetch_to_l2(next + r * s.ldx + j) : prefetch(next + r * s.ldx + j);
      if (first) {
        const char* next_w = w + (a.block ? a.block[e + 1] : e + 1) * block_bytes * a.R;
        for (int64_t g = 0; g < groups; ++g)
          for (int v = 0; v < NT; ++v) prefetch(next_w + g * ldw + 64 * v);
      }
    }
    for (int64_t k = 0; k < bytes; k += s.step) {
      if (sets == 2 && odd)
        amx_step<Op, MT, NT, 1>(x + k0 + k, s.second * s.ldx, s.ldx, wb + k / 4 * ldw, ldw);
      else
        amx_step<Op, MT, NT, 0>(x + k0 + k, s.second * s.ldx, s.ldx, wb + k / 4 * ldw, ldw);
      odd = !odd;
      write_rows(op, u, part);
    }
  }
  write_rows(op, u, u.total);
  tile_store<0>(u.z[0], 4 * kTile);
  if (MT * NT > 1) tile_store<1>(u.z[1], 4 * kTile);
  if (MT * NT > 1) tile_store<2>(u.z[2], 4 * kTile);
  tile_store<3>(u.z[3], 4 * kTile);
  u.m = m, u.n = n, u.cols = cols, u.rows = s.rows, u.second = s.second, u.done = 0, u.total = MT * s.rows, u.fresh = fresh;
  u.wide = NT == 2, u.other = sets == 2 && steps > 1 ? (MT == 1 ? 2 : 0) + (NT == 1 ? 1 : 0) : 0;
}

// Rows [m0, m1) of block-rows [i0, i1), in the order of linear_range; x is row m0. Panels are four tiles high: the second to fourth find
// the weights in L1, and x, read once per block-row from L2, keeps below the 48 bytes a cycle that L2 delivers.
template <class Op>
void amx_range(const Op& op, const char* x, int64_t ldx, int64_t x_bytes, int64_t m0, int64_t m1, int64_t i0, int64_t i1) {
  const auto& a = op.a;
  const int64_t height = m1 - m0;
  AmxShape s = {bytes_per_step(a.C * Op::size), kTile, kTile, ldx, x_bytes, ldx % 2048 == 0};
  if (height < 2 * kTile) {  // two tiles of equal height, which may share a row, or one
    s.rows = height > kTile ? (height + 1) / 2 : height;
    s.second = height - s.rows;
  }
  configure(s);
  Unfinished<Op> u;
  u.done = u.total = 0;
  for (int64_t g0 = i0, g1; g0 < i1; g0 = g1) {
    g1 = group_end(a, g0, i1, Op::size);
    for (int64_t p = m0; p < m1; p += 8 * kTile) {
      const int64_t panel_end = p + 8 * kTile < m1 ? p + 8 * kTile : m1;
      for (int64_t i = g0; i < g1; ++i) {
        const int64_t row_end = (i + 1) * a.R < a.N ? (i + 1) * a.R : a.N;
        for (int64_t n = i * a.R; n < row_end; n += 2 * kTile) {
          const bool wide = (i + 1) * a.R - n > kTile;
          const int64_t wanted = wide ? 2 * kTile : kTile, cols = row_end - n < wanted ? row_end - n : wanted;
          for (int64_t next = p, m; next < panel_end;) {
            const bool tall = height > kTile && (height < 2 * kTile || panel_end - next > kTile);
            const int64_t most = tall ? s.second + s.rows : s.rows;
            // The last tile begins early enough to be whole, and shares rows with the one before.
            m = next + most <= m1 ? next : m1 - most;
            auto tile = tall ? (wide ? amx_tile<Op, 2, 2> : amx_tile<Op, 2, 1>) : (wide ? amx_tile<Op, 1, 2> : amx_tile<Op, 1, 1>);
            tile(op, s, x + (m - m0) * ldx, i, next == p, m, next, n, cols, u);
            next = m + most;
          }
        }
      }
    }
  }
  write_rows(op, u, u.total);
}
