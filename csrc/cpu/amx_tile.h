// The tile instructions that the AMX kernel uses, behind one set of names. With SPARSE_PRUNE_COUNT_TILES they are counted, for the test of
// what docs/performance.md derives its bound from.
//
// Tile registers are fixed: 0..3 accumulate (row * 2 + column, or four columns), 4 and 5 hold x, 6 and 7 weights; 4 and 6 whole steps of 64
// bytes, 5 and 7 a block's own. One of each is enough: hardware renames them. Numbers in pieces have whole steps only, and use both.

struct TileConfig {  // the 64 bytes that ldtilecfg reads
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64, "ldtilecfg reads exactly 64 bytes");

#ifdef SPARSE_PRUNE_COUNT_TILES
#define SPARSE_PRUNE_COUNT(kind) ++tile_counts[kind]
#else
#define SPARSE_PRUNE_COUNT(kind)
#endif

// Not the intrinsics: GCC's tell the compiler of the first 8 bytes only, and it may then leave the other 56 unwritten.
inline void tile_load_config(const TileConfig* c) { __asm__ volatile("ldtilecfg %0" : : "m"(*c)); }
inline void tile_store_config(TileConfig* c) { __asm__ volatile("sttilecfg %0" : "=m"(*c)); }
// The intrinsics are macros that paste the register's number into the instruction, so each register gets its own function.
template <int T>
inline void tile_zero();
template <int T>
inline void tile_load(const void* p, int64_t stride);
template <int T>
inline void tile_stream(const void* p, int64_t stride);  // for what will not be read again from L1
template <int T>
inline void tile_store(void* p, int64_t stride);
template <int C, int A, int B>
inline void tile_dot_bf16();
template <int C, int A, int B>
inline void tile_dot_u8s8();
#ifdef SPARSE_PRUNE_AMX_INT8  // a file has the target of one of them only
#define SPARSE_PRUNE_DOT(T, A, B) \
  template <> inline void tile_dot_u8s8<T, A, B>() { SPARSE_PRUNE_COUNT(1); _tile_dpbusd(T, A, B); }
#else
#define SPARSE_PRUNE_DOT(T, A, B) \
  template <> inline void tile_dot_bf16<T, A, B>() { SPARSE_PRUNE_COUNT(1); _tile_dpbf16ps(T, A, B); }
#endif
SPARSE_PRUNE_DOT(0, 4, 6)
SPARSE_PRUNE_DOT(1, 4, 6)
SPARSE_PRUNE_DOT(2, 4, 6)
SPARSE_PRUNE_DOT(3, 4, 6)
SPARSE_PRUNE_DOT(0, 5, 7)
SPARSE_PRUNE_DOT(1, 5, 7)
SPARSE_PRUNE_DOT(2, 5, 7)
SPARSE_PRUNE_DOT(3, 5, 7)
#ifndef SPARSE_PRUNE_AMX_INT8
SPARSE_PRUNE_DOT(1, 4, 7)
SPARSE_PRUNE_DOT(2, 5, 6)
#endif
#undef SPARSE_PRUNE_DOT
#define SPARSE_PRUNE_ACCUMULATOR(T)                                                                               \
  template <> inline void tile_load<T>(const void* p, int64_t s) { SPARSE_PRUNE_COUNT(0); _tile_loadd(T, p, s); } \
  template <> inline void tile_zero<T>() { _tile_zero(T); }                                                       \
  template <> inline void tile_store<T>(void* p, int64_t s) { SPARSE_PRUNE_COUNT(2); _tile_stored(T, p, s); }
SPARSE_PRUNE_ACCUMULATOR(0)
SPARSE_PRUNE_ACCUMULATOR(1)
SPARSE_PRUNE_ACCUMULATOR(2)
SPARSE_PRUNE_ACCUMULATOR(3)
#undef SPARSE_PRUNE_ACCUMULATOR
#define SPARSE_PRUNE_FACTOR(T)                                                                                    \
  template <> inline void tile_load<T>(const void* p, int64_t s) { SPARSE_PRUNE_COUNT(0); _tile_loadd(T, p, s); } \
  template <> inline void tile_stream<T>(const void* p, int64_t s) { SPARSE_PRUNE_COUNT(0); _tile_stream_loadd(T, p, s); }
SPARSE_PRUNE_FACTOR(4)
SPARSE_PRUNE_FACTOR(5)
SPARSE_PRUNE_FACTOR(6)
SPARSE_PRUNE_FACTOR(7)
#undef SPARSE_PRUNE_FACTOR
#undef SPARSE_PRUNE_COUNT
