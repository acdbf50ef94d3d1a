// What a program is after decoding, and what a running grid consists of. See docs/gpu-verification.md for the rules.
//
//   Program   instructions whose operands are resolved to places in a register file
//   Warp      registers of 32 lanes, and where its lanes are in the program
//   Cta       warps, shared memory, barriers
//   Launch    grid, parameters, global memory
#pragma once

#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace ptx {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using i8 = std::int8_t;
using i16 = std::int16_t;
using i32 = std::int32_t;
using i64 = std::int64_t;

constexpr int LANES = 32;
using Mask = u32;  // one bit a lane
constexpr Mask FULL = 0xffffffffu;

// Generic addresses. Tensors lie far above, each with a gap after it; shared and param windows lie where no tensor does.
constexpr u64 SHARED_WINDOW = 0x0000100000000000ull;
constexpr u64 PARAM_WINDOW = 0x0000200000000000ull;
constexpr u64 LOCAL_WINDOW = 0x0000300000000000ull;
constexpr u64 WINDOW_BYTES = 0x0000000100000000ull;

struct Warp;
struct Cta;
struct Cluster;
struct Launch;

// Operand: 32 lanes in a warp's register file, `bytes` each (0: a predicate, stored as one Mask).
// Constants and special registers are registers too, filled when a warp starts, so that every operand is read the same way.
struct Op {
  u32 at = ~0u;
  u8 bytes = 0;
  bool negated = false;  // !p
  bool constant = false;
};

enum class Sync : u8 { none, aligned, members };  // who must be here: nobody else, the whole warp, the lanes of a member mask
enum class Flow : u8 { next, branch, exit };
enum Kind : u8 { INTEGER, FLOAT, CONVERT, MOVE, PREDICATE, CONTROL, BARRIER, SHUFFLE, LOAD_GLOBAL, STORE_GLOBAL, LOAD_SHARED, STORE_SHARED,
                 LOAD_PARAM, LOCAL_KIND, ATOMIC, COPY_ASYNC, COPY_BULK, MBARRIER, LDMATRIX, STMATRIX, MMA, WGMMA, FENCE, SPECIAL, KINDS };

struct Inst {
  void (*run)(Warp&, const Inst&, Mask) = nullptr;
  const Op* op = nullptr;  // in the order of the text, vectors flattened
  u32 ops = 0;
  Op guard;  // at == ~0u: unconditional
  Kind kind = SPECIAL;
  Sync sync = Sync::none;
  Flow flow = Flow::next;
  u8 member_op = 0;     // Sync::members: the operand that holds the mask
  u32 target = 0;       // Flow::branch
  i64 offset = 0;       // displacement of the address operand
  bool wgmma_registers = false;    // some operand is also an accumulator or a fragment of a wgmma
  u32 a = 0, b = 0, c = 0, d = 0;  // meaning depends on the family
  u32 line = 0;
  u32 index = 0;
  const char* text = nullptr;
};

struct Param {
  u32 at, bytes, align;
};

struct Variable {  // of module or function scope
  std::string space;
  u32 at, bytes, align;
};

struct Program {
  std::vector<Inst> code;
  std::vector<std::unique_ptr<Op[]>> operands;
  std::vector<std::unique_ptr<std::string>> texts;
  u32 register_bytes = 0;                             // of one warp
  std::vector<std::pair<u32, std::vector<u8>>> fill;  // constants: where in the register file, 32 lanes of bytes
  std::map<std::string, Op> specials;                 // those that the program reads
  std::vector<Param> params;
  u32 param_bytes = 0;
  u32 shared_static = 0;      // bytes of declared shared variables, from the base on
  u32 shared_base = 0;
  u32 local_bytes = 0;
  u32 granule = 4;            // the smallest access to shared memory in the text: races are tracked per granule
  std::vector<u8> globals;    // initial contents of module-scope .global and .const variables
  u64 globals_address = 0;
  u32 target = 0;             // 80 for sm_80
  u32 required_threads[3] = {0, 0, 0};
  u32 required_cluster[3] = {0, 0, 0};
  u32 most_registers = 0, most_threads = 0, least_blocks = 1;  // .maxnreg, .maxntid, .minnctapersm: 0 where not said
  std::string entry;
  std::vector<bool> wgmma_register;  // per 128 bytes of the register file
  bool async_proxy = false;
};

Program parse(const std::string& text, const std::string& entry);

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Counts {
  u64 kinds[KINDS] = {};
  u64 instructions = 0;      // warp instructions issued
  u64 thread_instructions = 0;
  u64 tensor_fma = 0;        // multiply-adds of mma and wgmma
  u64 shared_wavefronts = 0, shared_ideal = 0;
  u64 shared_read_bytes = 0, shared_write_bytes = 0;
  u64 global_requests = 0, global_load_sectors = 0, global_store_sectors = 0;
  u64 global_load_bytes = 0, global_store_bytes = 0;
  u64 l2_load_sectors = 0;   // global loads that no earlier load of the same CTA through L1 had brought; all of those that pass L1 by
  u64 dram_load_sectors = 0, dram_store_sectors = 0;  // distinct in the whole grid
  u64 wgmma_shared_bytes = 0;
  u64 local_bytes = 0;
};

struct Region {  // bytes of tensors that share storage
  u64 base, bytes;
  u8* host;
  const u8* legal;  // one flag per byte, or null where every byte belongs to a tensor
};

enum class Mode : u8 { late, early, random };

struct Block {  // one thread of the host works through CTAs with this
  std::vector<std::vector<u32>> in_l1;    // per region and sector: the CTA (serial number) that brought it
  std::vector<std::vector<bool>> loaded, stored;  // per region and sector
  Counts counts;
};

struct Launch {
  const Program* program;
  u32 grid[3], block[3], cluster[3];
  u32 shared_bytes;  // static and dynamic
  std::vector<u8> params;
  std::vector<Region> regions;
  Mode mode;
  u64 seed;
  bool count;
  bool races;
  u64 limit;  // warp instructions of one CTA before it counts as hung
  std::mutex atomics;
};

// cp.async of one warp instruction, on its way.
struct Copy {
  Mask pending;
  u32 group[LANES];
  u32 to[LANES];
  u32 bytes;
  u8 data[LANES][16];        // read when it was issued or ...
  const u8* from[LANES];     // ... to be read when it completes
  u32 valid[LANES];          // bytes to read; the rest is zero
  Mask delivered;            // lanes whose data lie in shared memory already (early and random mode)
  const Inst* inst;
};

// What a thread, or everyone who passed a barrier, knows: for each agent (a warp, or an mbarrier standing for the bulk copies that
// complete on it) the clock up to which its accesses to shared memory lie in the past. See races.cpp.
struct View {
  std::vector<u32> seen;    // per agent
  std::vector<u32> fenced;  // the part of it that fence.proxy.async has made visible to the async proxy
};

struct MBarrier {
  bool valid = false;
  u32 agent = 0;
  u32 expected = 0, pending = 0;  // arrivals
  i64 tx = 0;                     // bytes still expected
  u32 phase = 0;
  View open, done;
  const Inst* init = nullptr;
};

struct TensorMap {  // 128 bytes that Python makes from the arguments of cuTensorMapEncodeTiled; the layout is ours
  u64 magic;
  u64 address;
  u64 strides[4];  // bytes, of dimensions 1 to rank - 1
  u32 dims[5];
  u32 box[5];
  u32 rank, element_bytes, swizzle;  // 0, 32, 64, 128
  u32 unused[7];
};
static_assert(sizeof(TensorMap) == 128);
constexpr u32 MAX_MBARRIERS = 256;
constexpr u64 TENSOR_MAP_MAGIC = 0x70616d726f736e74ull;

// cp.async.bulk and cp.async.bulk.tensor, on their way.
struct Bulk {
  Cta* cta;             // whose shared memory, and whose mbarrier
  Cta* by;              // who issued it: block, warp, lane
  const Inst* inst;
  u32 warp, lane;
  bool to_shared;
  bool tensor;
  TensorMap map;
  i32 at[5];            // coordinates
  u64 global;           // plain bulk copies
  u32 shared, bytes;
  u32 mbarrier;         // to shared: signalled; its offset
  u32 group;            // to global: bulk group of the issuing thread
  bool read_done = false;
};

struct Wgmma {  // one warp's quarter of wgmma.mma_async, on its way
  const Inst* inst;
  u32 group;
  u64 a, b;                   // descriptors
  std::vector<u32> a_values;  // A from registers
  bool keep;                  // scale-d: D = A B + D
  bool computed = false;
  std::vector<u32> chunks;    // 16-byte pieces of shared memory that it reads
};

struct Group {  // lanes at one place of the program
  u32 pc;
  Mask mask;
  bool parked = false;  // at an instruction that other lanes must reach first
  bool asleep = false;  // waits for something outside the warp
};

struct Warp {
  Cta* cta;
  u32 index;
  u32 agent;  // number of the warp within its cluster: who it is where races are looked for
  Mask lanes;  // those that exist: the last warp of a block may have fewer
  Mask alive;
  std::vector<u8> file;
  std::vector<Group> groups;  // sorted by pc; the lowest runs
  int barrier = -1;           // blocked at this one
  bool again = false;         // the instruction did not succeed and is to run again (barrier.cluster.wait)
  u32 cluster_phase = 0;      // of the cluster barrier at which it arrived
  bool yielded = false;      // every group that could run waits for something
  bool failed_wait = false;  // the last instruction was a try_wait that did not succeed
  std::vector<Copy> copies;   // cp.async in order of issue
  std::vector<Wgmma> wgmmas;  // in order of issue
  u32 wgmma_committed = 0;
  std::vector<u8> wgmma_state;  // per 128 bytes of the file: bit 0 in use by a wgmma, bit 1 accessed since the last wgmma.fence
  bool wgmma_fenced = false;
  u32 bulk_committed[LANES] = {};
  u32 registers = 0;          // of a thread, by setmaxnreg
  u32 clock = 1;              // of its accesses to shared memory; grows with every synchronisation
  u32 own_fenced = 0;         // own accesses up to this clock are visible to the async proxy
  Mask touched = 0;           // lanes that accessed shared memory at this clock
  std::vector<u32> seen, fenced;  // [agent][lane]: a View for every lane
  u32 committed[LANES] = {};


  template <class T>
  T* reg(const Op& op) { return reinterpret_cast<T*>(file.data() + op.at); }
  Mask predicate(const Op& op) {
    Mask m = *reg<Mask>(op);
    return op.negated ? ~m : m;
  }
  void set_predicate(const Op& op, Mask value, Mask m) {
    Mask* p = reg<Mask>(op);
    *p = (*p & ~m) | (value & m);
  }
  u64 read(const Op& op, int lane) {  // zero-extended
    switch (op.bytes) {
      case 0: return predicate(op) >> lane & 1;
      case 2: return reg<u16>(op)[lane];
      case 4: return reg<u32>(op)[lane];
      default: return reg<u64>(op)[lane];
    }
  }
  void write(const Op& op, int lane, u64 value) {  // cut to the register's width
    switch (op.bytes) {
      case 0: set_predicate(op, value & 1 ? FULL : 0, 1u << lane); break;
      case 2: reg<u16>(op)[lane] = u16(value); break;
      case 4: reg<u32>(op)[lane] = u32(value); break;
      default: reg<u64>(op)[lane] = value;
    }
  }
  [[noreturn]] void fail(const Inst& inst, int lane, const std::string& what);
};

struct Barrier {
  u32 arrived = 0, expected = 0;
  std::vector<u32> waiting;  // warps
  const Inst* first = nullptr;
  View view;
};

struct Cluster {  // blocks that run together; most have one
  std::vector<std::unique_ptr<Cta>> ctas;
  u32 warps = 0;        // of all blocks
  u32 agents = 0;       // warps and mbarriers so far
  u32 arrived = 0, phase = 0;  // barrier.cluster
  View open, done;
  u64 progress = 0;     // grows whenever something happens that others may have waited for
  u64 steps = 0;
  std::mt19937_64 random;
};

struct Cta {
  Cluster* cluster;
  Launch* launch;
  Block* block;
  u32 at[3];
  u32 serial;
  std::vector<Warp> warps;
  std::vector<u8> shared;
  std::vector<u8> local;
  Barrier barriers[16];
  u32 free_registers = 0;             // of a lane, which setmaxnreg.dec left and setmaxnreg.inc may take
  std::map<u32, MBarrier> mbarriers;  // by offset in shared memory
  std::vector<Bulk> bulks;            // in order of issue
  // Who last touched each granule of shared memory; races.cpp.
  std::vector<u64> writer;
  std::vector<u32> readers;           // [granule][warp]: clock
  std::vector<u8> reader_lanes;       // [granule][warp]
  std::vector<u32> word_stamps;       // for counting wavefronts
  u32 stamp = 0;
};

template <class T>
inline void put(T* to, const T* values, Mask m) {
  if (m == FULL) {
    std::memcpy(to, values, sizeof(T) * LANES);
  } else {
    for (int l = 0; l < LANES; ++l)
      if (m >> l & 1) to[l] = values[l];
  }
}

std::string format(const char* pattern, ...) __attribute__((format(printf, 1, 2)));

}  // namespace ptx
