// The tile instructions that the AMX kernel uses, behind one set of names. With SPARSE_PRUNE_EMULATE_AMX they are plain C++, so that the
// kernel's logic runs, and is tested, on processors without AMX; tile_counts then tells what a processor would have done.
//
// Tile registers are fixed: 0..3 accumulate (row * 2 + column), 4 and 5 hold x, 6 and 7 hold weights.

struct TileConfig {  // the 64 bytes that ldtilecfg reads
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64, "ldtilecfg reads exactly 64 bytes");

#ifdef SPARSE_PRUNE_EMULATE_AMX

struct EmulatedTiles {
  TileConfig config;
  unsigned char data[8][16][64];
};
static thread_local EmulatedTiles emulated;

inline void tile_load_config(const TileConfig* c) { emulated.config = *c; memset(emulated.data, 0, sizeof emulated.data); }
inline void tile_store_config(TileConfig* c) { *c = emulated.config; }
template <int T>
inline void tile_zero() { memset(emulated.data[T], 0, sizeof emulated.data[T]); }
template <int T>
inline void tile_load(const void* p, int64_t stride) {
  ++tile_counts[0];
  memset(emulated.data[T], 0, sizeof emulated.data[T]);
  for (int r = 0; r < emulated.config.rows[T]; ++r)
    memcpy(emulated.data[T][r], static_cast<const char*>(p) + r * stride, emulated.config.row_bytes[T]);
}
template <int T>
inline void tile_store(void* p, int64_t stride) {
  ++tile_counts[2];
  for (int r = 0; r < emulated.config.rows[T]; ++r)
    memcpy(static_cast<char*>(p) + r * stride, emulated.data[T][r], emulated.config.row_bytes[T]);
}
inline void emulated_dot_shapes(int C, int A, int B) {
  ++tile_counts[1];
  const TileConfig& c = emulated.config;
  if (c.row_bytes[A] / 4 != c.rows[B] || c.rows[A] != c.rows[C] || c.row_bytes[B] != c.row_bytes[C]) __builtin_trap();
}
template <int C, int A, int B>
inline void tile_dot_u8s8() {
  emulated_dot_shapes(C, A, B);
  const TileConfig& c = emulated.config;
  for (int m = 0; m < c.rows[C]; ++m)
    for (int n = 0; n < c.row_bytes[C] / 4; ++n) {
      int32_t sum;
      memcpy(&sum, &emulated.data[C][m][n * 4], 4);
      uint32_t wrapping = static_cast<uint32_t>(sum);
      for (int k = 0; k < c.row_bytes[A]; ++k)
        wrapping += static_cast<uint32_t>(emulated.data[A][m][k] * static_cast<int8_t>(emulated.data[B][k / 4][n * 4 + k % 4]));
      memcpy(&emulated.data[C][m][n * 4], &wrapping, 4);
    }
}
template <int C, int A, int B>
inline void tile_dot_bf16() {
  emulated_dot_shapes(C, A, B);
  const TileConfig& c = emulated.config;
  for (int m = 0; m < c.rows[C]; ++m)
    for (int n = 0; n < c.row_bytes[C] / 4; ++n) {
      float sum;
      memcpy(&sum, &emulated.data[C][m][n * 4], 4);
      for (int k = 0; k < c.row_bytes[A] / 2; ++k) {
        uint32_t a = 0, b = 0;
        memcpy(reinterpret_cast<char*>(&a) + 2, &emulated.data[A][m][k * 2], 2);
        memcpy(reinterpret_cast<char*>(&b) + 2, &emulated.data[B][k / 2][n * 4 + k % 2 * 2], 2);
        float fa, fb;
        memcpy(&fa, &a, 4);
        memcpy(&fb, &b, 4);
        sum += fa * fb;
      }
      memcpy(&emulated.data[C][m][n * 4], &sum, 4);
    }
}

#else

// Not the intrinsics: GCC's tell the compiler of the first 8 bytes only, and it may then leave the other 56 unwritten.
inline void tile_load_config(const TileConfig* c) { __asm__ volatile("ldtilecfg %0" : : "m"(*c)); }
inline void tile_store_config(TileConfig* c) { __asm__ volatile("sttilecfg %0" : "=m"(*c)); }
// The intrinsics are macros that paste the register's number into the instruction, so each register gets its own function.
template <int T>
inline void tile_zero();
template <int T>
inline void tile_load(const void* p, int64_t stride);
template <int T>
inline void tile_store(void* p, int64_t stride);
template <int C, int A, int B>
inline void tile_dot_bf16();
template <int C, int A, int B>
inline void tile_dot_u8s8();
#ifdef SPARSE_PRUNE_AMX_INT8  // a file has the target of one of them only
#define SPARSE_PRUNE_DOT(T, A, B) \
  template <> inline void tile_dot_u8s8<T, A, B>() { _tile_dpbusd(T, A, B); }
#else
#define SPARSE_PRUNE_DOT(T, A, B) \
  template <> inline void tile_dot_bf16<T, A, B>() { _tile_dpbf16ps(T, A, B); }
#endif
#define SPARSE_PRUNE_ACCUMULATOR(T, A, B)                                              \
  template <> inline void tile_zero<T>() { _tile_zero(T); }                            \
  template <> inline void tile_store<T>(void* p, int64_t s) { _tile_stored(T, p, s); } \
  SPARSE_PRUNE_DOT(T, A, B)
SPARSE_PRUNE_ACCUMULATOR(0, 4, 6)
SPARSE_PRUNE_ACCUMULATOR(1, 4, 7)
SPARSE_PRUNE_ACCUMULATOR(2, 5, 6)
SPARSE_PRUNE_ACCUMULATOR(3, 5, 7)
#undef SPARSE_PRUNE_ACCUMULATOR
#undef SPARSE_PRUNE_DOT
template <> inline void tile_load<4>(const void* p, int64_t s) { _tile_loadd(4, p, s); }
template <> inline void tile_load<5>(const void* p, int64_t s) { _tile_loadd(5, p, s); }
template <> inline void tile_load<6>(const void* p, int64_t s) { _tile_loadd(6, p, s); }
template <> inline void tile_load<7>(const void* p, int64_t s) { _tile_loadd(7, p, s); }

#endif
